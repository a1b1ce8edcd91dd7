//! Hugging Face directories: `config.json`, and weights in one or several safetensors files.

mod config;
mod delta_net;
pub(crate) mod experts;
mod fields;
mod names;
mod style;

pub(crate) use style::EXTENSION;
pub use style::Style;

use super::embed::{EmbedDefaults, Pooling};
use super::error::LoadError;
use super::missing::{instead, listed};
use super::source::{Content, FLOATS, OpenOptions, Source, TensorInfo, Weights};
use super::tokenizer_source::TokenizerSource;
use super::values::{aligned, checked_rates, checked_scale, f32_tensor, floats, one_float};
use bitnet_burn::names::{
    EMBEDDING, HEAD, bias_name, float_part_name, norm_name, projection_name, scale_name,
};
use bitnet_burn::{ActivationRule, FloatPart, ModelConfig, Norm, Projection};
use bitnet_burn_formats::files::{FileIdentity, identity_of};
use bitnet_burn_formats::hf::unpack_to_canonical;
use bitnet_burn_formats::quant::absmean_to_canonical;
use bitnet_burn_formats::safetensors::{self, Dtype, SafeTensor, Shards};
use bitnet_burn_formats::{DenseTensor, FileError, FileMap, FormatError, TernaryTensor, read_json};
use config::config;
use fields::{Fields, QWEN3_5};
use names::older_name;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use style::{activations, style};

/// The files that are read beside the tensors and their index, by the model or by its tokenizer, where they are there.
pub const COMPANIONS: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// A Hugging Face directory with a model in it.
pub(crate) struct HfModel {
    dir: PathBuf,
    json: Value,
    tensors: BTreeMap<String, SafeTensor>,
    maps: Vec<FileMap>,
    /// The configurations and the tokenizer that are there, the safetensors, and the index if there is one.
    files: Vec<(PathBuf, FileIdentity)>,
    style: Style,
    activations: Option<ActivationRule>,
    config: ModelConfig,
}

impl HfModel {
    /// Opens the directory, derives the configuration, and checks that every tensor is there, in shape.
    pub(crate) fn open(
        dir: &Path,
        options: &OpenOptions,
        warnings: &mut Vec<String>,
    ) -> Result<(Self, ModelConfig), LoadError> {
        let path = dir.join("config.json");
        // Before they are read: what is read later and differs is found.
        let companion = |name: &&str| {
            let path = dir.join(name);
            identity_of(&path).ok().map(|identity| (path, identity))
        };
        let mut files: Vec<_> = COMPANIONS.iter().filter_map(companion).collect();
        let json: Value = read_json(&path)?;
        let fields = Fields { path: &path, json: &json };
        let unknown = fields.architecture().err();
        let opened = safetensors::open_directory(dir);
        if let Some(error) = unknown {
            return Err(with_foreign_tensors(error, opened.ok()));
        }
        let Shards { tensors, maps, files: shards } = opened?;
        files.extend(shards);
        let (tensors, is_base) = with_head_names(tensors);
        let mut config = config(dir, fields, &tensors, options, warnings)?;
        if is_base && !config.tied_embeddings && !tensors.contains_key(HEAD) {
            warnings.push(
                "the files hold a model without an output projection, for embeddings; logits are computed with the token \
                 embedding and mean nothing"
                    .into(),
            );
            config.tied_embeddings = true;
        }
        config.validate().map_err(|error| LoadError::Config { path: path.clone(), error })?;
        // Names first: who adds what `style` asks for is not to be refused for a tensor then.
        check_names(dir, &tensors, &config, warnings)?;
        let style = style(fields, &tensors, warnings)?;
        let activations = if style == Style::Values { activations(fields)? } else { None };
        let dir = dir.to_owned();
        let model = Self { dir, json, tensors, maps, files, style, activations, config: config.clone() };
        model.check_tensors()?;
        Ok((model, config))
    }

    fn tensor(&self, name: &str) -> Result<&SafeTensor, LoadError> {
        find(&self.dir, &self.tensors, name).map(|(_, tensor)| tensor)
    }

    fn check_shape(&self, name: &str, expected: &[usize]) -> Result<(), LoadError> {
        let tensor = self.tensor(name)?;
        if tensor.shape == expected {
            return Ok(());
        }
        let widen = |shape: &[usize]| shape.iter().map(|&d| d as u64).collect();
        Err(LoadError::WrongShape {
            path: self.dir.clone(),
            tensor: name.to_owned(),
            found: widen(&tensor.shape),
            expected: widen(expected),
        })
    }

    fn wrong_type(&self, name: &str, found: Dtype, role: &'static str, supported: &str) -> LoadError {
        let error = FileError::UnsupportedTensorType {
            path: self.dir.clone(),
            tensor: name.to_owned(),
            found: format!("{found:?}"),
            role,
            supported: supported.to_owned(),
        };
        error.into()
    }

    /// A tensor of floats as rows of its last dimension.
    fn dense(&self, name: &str, role: &'static str) -> Result<DenseTensor, LoadError> {
        let tensor = self.tensor(name)?;
        let format = safetensors::dense_format(tensor.dtype)
            .ok_or_else(|| self.wrong_type(name, tensor.dtype, role, "F32, F16, BF16"))?;
        let k = tensor.shape.last().copied().unwrap_or(1);
        let n = tensor.shape.iter().rev().skip(1).product();
        Ok(DenseTensor { name: name.to_owned(), n, k, format, data: tensor.data.clone() })
    }

    /// Checks shapes and types of all tensors against the configuration.
    fn check_tensors(&self) -> Result<(), LoadError> {
        let config = &self.config;
        for layer in 0..config.n_layers {
            for norm in Norm::of_layer(layer, config) {
                let name = norm_name(norm);
                self.check_shape(&name, &[norm.len(config)])?;
                self.dense(&name, "a norm")?;
            }
            for which in Projection::of_layer(layer, config) {
                self.check_projection(layer, which)?;
            }
            for which in FloatPart::of_layer(layer, config) {
                let name = float_part_name(layer, which);
                self.check_shape(&name, &which.checkpoint_shape(config))?;
                self.dense(&name, FLOATS)?;
            }
        }
        let norm = norm_name(Norm::Output);
        self.check_shape(&norm, &[config.hidden_size])?;
        self.dense(&norm, "a norm")?;
        for name in matrices(config) {
            self.check_shape(name, &[config.vocab_size, config.hidden_size])?;
            self.dense(name, "embedding and output head")?;
        }
        Ok(())
    }

    fn check_projection(&self, layer: usize, which: Projection) -> Result<(), LoadError> {
        let name = projection_name(layer, which);
        let dtype = self.tensor(&name)?.dtype;
        let (n, k) = which.shape(&self.config);
        if which.has_bias(&self.config) {
            let bias = bias_name(layer, which);
            self.check_shape(&bias, &[n])?;
            self.dense(&bias, "a bias")?;
        }
        if self.style == Style::Values {
            self.dense(&name, "a projection without quantization_config")?;
            return self.check_shape(&name, &[n, k]);
        }
        if self.style == Style::Online {
            if dtype == Dtype::U8 {
                return Err(LoadError::Quantization {
                    path: self.dir.join("config.json"),
                    problem: format!(
                        "quantization_mode is `online`, which needs float masters, but tensor `{name}` is packed \
                         (U8)"
                    ),
                });
            }
            let scale = scale_name(layer, which);
            if self.tensors.contains_key(&scale) {
                return Err(LoadError::UnsupportedTensor {
                    path: self.dir.clone(),
                    tensor: scale,
                    problem: format!("`{name}` is a float master, whose scale is its absmean"),
                });
            }
            self.dense(&name, "a master")?;
            return self.check_shape(&name, &[n, k]);
        }
        if dtype != Dtype::U8 {
            let role = "a packed projection (quantization_mode `offline`, or linear_class `bitlinear`)";
            return Err(self.wrong_type(&name, dtype, role, "U8"));
        }
        if !n.is_multiple_of(4) {
            return Err(LoadError::Unsupported {
                path: self.dir.clone(),
                what: format!("the number of rows of tensor `{name}`"),
                found: n.to_string(),
                supported: "packed matrices of a multiple of 4 rows".into(),
            });
        }
        self.check_shape(&name, &[n / 4, k])?;
        let scale = scale_name(layer, which);
        let shape = &self.tensor(&scale)?.shape;
        if shape.iter().any(|&d| d != 1) {
            self.check_shape(&scale, &[1])?;
        }
        self.dense(&scale, "a scale").map(drop)
    }
}

/// An error about an unknown architecture, with the tensors that no known one has.
fn with_foreign_tensors(error: LoadError, shards: Option<Shards>) -> LoadError {
    let (LoadError::Architecture { path, found, supported, .. }, Some(shards)) = (&error, shards) else {
        return error;
    };
    let projections = Projection::every()
        .flat_map(|which| [projection_name(0, which), bias_name(0, which), scale_name(0, which)]);
    let norms =
        Norm::ALL.into_iter().chain(Projection::ALL.map(|which| Norm::Input(0, which))).map(norm_name);
    let floats = FloatPart::every().map(|which| float_part_name(0, which));
    let known = projections.chain(norms).chain(floats).chain([EMBEDDING, HEAD].map(str::to_owned));
    let mut known: BTreeSet<String> = known.collect();
    known.extend(known.clone().iter().filter_map(|name| older_name(name)));
    let tensors =
        shards.tensors.keys().map(|name| numbered(name)).filter(|name| !known.contains(name)).collect();
    LoadError::Architecture {
        path: path.clone(),
        found: found.clone(),
        supported,
        lacks: listed(&tensors, &BTreeSet::new()),
    }
}

/// The name that a tensor has in the first layer, of the first expert.
fn numbered(name: &str) -> String {
    let parts = name.split('.').map(|part| if part.parse::<usize>().is_ok() { "0" } else { part });
    parts.collect::<Vec<_>>().join(".")
}

/// A tensor, and the name that it has in the files.
fn find<'a>(
    dir: &Path,
    tensors: &'a BTreeMap<String, SafeTensor>,
    name: &str,
) -> Result<(&'a String, &'a SafeTensor), LoadError> {
    let found = tensors.get_key_value(name).or_else(|| tensors.get_key_value(&older_name(name)?));
    let missing = || {
        let help = match name {
            HEAD => "; `tie_word_embeddings` in config.json is false, or absent, which means false".into(),
            _ => instead(name, tensors.keys().map(String::as_str)),
        };
        FileError::MissingTensor { path: dir.to_owned(), tensor: name.to_owned(), help }
    };
    Ok(found.ok_or_else(missing)?)
}

/// Tensors of a model that was saved without its output projection, as models for embeddings are, under the names that they
/// have with one: transformers then leaves out `model.` in front. And whether they were such.
fn with_head_names(tensors: BTreeMap<String, SafeTensor>) -> (BTreeMap<String, SafeTensor>, bool) {
    const PREFIX: &str = "model.";
    let is_base = EMBEDDING.strip_prefix(PREFIX).is_some_and(|name| tensors.contains_key(name))
        && !tensors.keys().any(|name| name.starts_with(PREFIX));
    if !is_base {
        return (tensors, false);
    }
    let named = |(name, tensor): (String, SafeTensor)| match name == HEAD {
        true => (name, tensor),
        false => (format!("{PREFIX}{name}"), tensor),
    };
    (tensors.into_iter().map(named).collect(), true)
}

/// The names of the embedding and of the output head, where there is one.
fn matrices(config: &ModelConfig) -> &'static [&'static str] {
    if config.tied_embeddings { &[EMBEDDING] } else { &[EMBEDDING, HEAD] }
}

/// Checks that every tensor of the model is there, and no other that would change the result. Scales of
/// packed projections may be there.
fn check_names(
    dir: &Path,
    tensors: &BTreeMap<String, SafeTensor>,
    config: &ModelConfig,
    warnings: &mut Vec<String>,
) -> Result<(), LoadError> {
    let mut used = HashSet::new();
    for layer in 0..config.n_layers {
        let norms = Norm::of_layer(layer, config);
        let all = Projection::of_layer(layer, config);
        let projections = all.iter().map(|&which| projection_name(layer, which));
        let floats = FloatPart::of_layer(layer, config).into_iter();
        let floats = floats.map(|which| float_part_name(layer, which));
        for name in norms.into_iter().map(norm_name).chain(floats).chain(projections) {
            used.insert(find(dir, tensors, &name)?.0);
        }
        let scales = all.iter().map(|&which| scale_name(layer, which));
        used.extend(scales.filter_map(|name| tensors.get_key_value(&name)).map(|(name, _)| name));
        for which in all.into_iter().filter(|which| which.has_bias(config)) {
            used.insert(find(dir, tensors, &bias_name(layer, which))?.0);
        }
    }
    used.insert(find(dir, tensors, &norm_name(Norm::Output))?.0);
    for name in matrices(config) {
        used.insert(find(dir, tensors, name)?.0);
    }

    // A tensor that is there is there for a reason: one that belongs to a layer changes the result.
    for name in tensors.keys().filter(|name| !used.contains(name)) {
        if name.ends_with("rotary_emb.inv_freq") {
            continue; // what older versions saved although it follows from the configuration
        }
        let problem = if name.ends_with(".bias") {
            format!("this projection has no bias in `{}`", config.architecture)
        } else if name.starts_with("model.layers.") {
            format!("a model `{}` of {} layers has no such tensor", config.architecture, config.n_layers)
        } else {
            warnings.push(format!("tensor `{name}` is not used"));
            continue;
        };
        return Err(LoadError::UnsupportedTensor { path: dir.to_owned(), tensor: name.clone(), problem });
    }
    Ok(())
}

impl Source for HfModel {
    fn maps(&self) -> Vec<&FileMap> {
        self.maps.iter().collect()
    }

    fn weights(&self, layer: usize, which: Projection) -> Result<Weights, LoadError> {
        let name = projection_name(layer, which);
        let style = self.style;
        let tensor = self.tensor(&name)?;
        let (n, k) = which.shape(&self.config);
        let stored_as = match (style, tensor.dtype) {
            (Style::Values, _) => {
                return self.dense(&name, "a projection without quantization_config").map(Weights::Dense);
            }
            (Style::PackedAuto, _) => "U8 packed (autobitlinear)",
            (Style::PackedInverse, _) => "U8 packed (bitlinear)",
            (Style::Online, Dtype::F16) => "F16 master (absmean)",
            (Style::Online, Dtype::BF16) => "BF16 master (absmean)",
            (Style::Online, _) => "F32 master (absmean)",
        };
        let not_ternary = |e: FormatError| LoadError::NotTernary {
            path: self.dir.clone(),
            tensor: name.clone(),
            stored_as,
            problem: e.to_string(),
        };
        let (codes, scale) = if style == Style::Online {
            let values = floats(&self.dir, &self.dense(&name, "a master")?)?;
            absmean_to_canonical(&values, n, k).map_err(not_ternary)?
        } else {
            let codes = unpack_to_canonical(&tensor.data, n, k).map_err(not_ternary)?;
            let stored = self.dense(&scale_name(layer, which), "a scale")?;
            let mut scale = one_float(&self.dir, &stored)?;
            if style == Style::PackedInverse {
                if scale == 0.0 {
                    return Err(LoadError::InvalidScale {
                        path: self.dir.clone(),
                        tensor: stored.name,
                        value: scale,
                        help: " and not zero: linear_class `bitlinear` divides by it",
                    });
                }
                scale = 1.0 / scale;
            }
            (codes, checked_scale(&self.dir, &stored.name, scale)?)
        };
        Ok(Weights::Ternary(TernaryTensor { name, n, k, scale, codes: aligned(codes), stored_as }))
    }

    fn dense_bytes(&self, layer: usize, which: Projection) -> Option<u64> {
        let tensor =
            self.tensor(&projection_name(layer, which)).ok().filter(|_| self.style == Style::Values)?;
        Some(tensor.data.len() as u64)
    }

    fn bias(&self, layer: usize, which: Projection) -> Result<DenseTensor, LoadError> {
        self.dense(&bias_name(layer, which), "a bias")
    }

    fn master(&self, layer: usize, which: Projection) -> Result<Option<DenseTensor>, LoadError> {
        let name = projection_name(layer, which);
        if self.style == Style::Online { self.dense(&name, "a master").map(Some) } else { Ok(None) }
    }

    fn float_part(&self, layer: usize, which: FloatPart) -> Result<DenseTensor, LoadError> {
        let tensor = self.dense(&float_part_name(layer, which), FLOATS)?;
        if matches!(
            which,
            FloatPart::Router | FloatPart::SharedRouter | FloatPart::DeltaDecay | FloatPart::DeltaStrength
        ) {
            return Ok(tensor);
        }
        let values = which.from_checkpoint(&floats(&self.dir, &tensor)?, &self.config);
        if which == FloatPart::DeltaRate {
            checked_rates(&self.dir, &tensor.name, &values)?;
        }
        Ok(f32_tensor(&tensor.name, which.shape(&self.config), &values))
    }

    fn norm(&self, which: Norm) -> Result<DenseTensor, LoadError> {
        let tensor = self.dense(&norm_name(which), "a norm")?;
        if self.config.architecture != QWEN3_5 || matches!(which, Norm::Delta(_)) {
            return Ok(tensor);
        }
        // transformers multiplies by one more.
        let values: Vec<f32> = floats(&self.dir, &tensor)?.into_iter().map(|weight| 1.0 + weight).collect();
        Ok(f32_tensor(&tensor.name, [tensor.n, tensor.k], &values))
    }

    fn embedding(&self) -> Result<DenseTensor, LoadError> {
        self.dense(EMBEDDING, "the embedding")
    }

    fn output(&self) -> Result<Option<DenseTensor>, LoadError> {
        self.dense(HEAD, "the output head").map(Some)
    }

    fn activations(&self) -> Option<ActivationRule> {
        self.activations
    }

    fn tokenizer_source(&self) -> TokenizerSource {
        TokenizerSource::Hf { dir: self.dir.clone() }
    }

    fn embed_defaults(&self, asked: Option<Pooling>) -> Result<EmbedDefaults, LoadError> {
        EmbedDefaults::of_directory(&self.dir, asked)
    }

    fn contents(&self) -> Vec<Content> {
        self.files.iter().map(|(path, identity)| Content::File(path.clone(), identity.clone())).collect()
    }

    fn tensors(&self) -> Vec<TensorInfo> {
        let info = |(name, t): (&String, &SafeTensor)| TensorInfo {
            name: name.clone(),
            type_name: format!("{:?}", t.dtype),
            shape: t.shape.iter().map(|&d| d as u64).collect(),
            bytes: t.data.len() as u64,
        };
        self.tensors.iter().map(info).collect()
    }

    fn metadata(&self) -> Vec<(String, String)> {
        const SHOWN_CHARS: usize = 200;
        let Some(object) = self.json.as_object() else { return Vec::new() };
        let line = |(key, value): (&String, &Value)| {
            let mut text = value.to_string();
            if let Some((end, _)) = text.char_indices().nth(SHOWN_CHARS) {
                let bytes = text.len();
                text.truncate(end);
                text += &format!("... ({bytes} bytes)");
            }
            (key.clone(), text)
        };
        object.iter().map(line).collect()
    }
}
