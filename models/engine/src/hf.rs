//! Hugging Face directories: `config.json`, and weights in one or several safetensors files.
//!
//! Projections come in three styles, told apart by `quantization_config` (transformers,
//! `integrations/bitnet.py`):
//!
//! | `linear_class` | `quantization_mode` | weights | scale |
//! | --- | --- | --- | --- |
//! | `autobitlinear` | `online` | float masters [out, in] | their absmean |
//! | `autobitlinear` | `offline` (or absent) | U8 [out/4, in] | `weight_scale` |
//! | `bitlinear` (or absent) | any | U8 [out/4, in] | 1 / `weight_scale` |
//!
//! Without a `quantization_config` transformers itself would run the model unquantised, and packed
//! weights don't say in which direction their scale goes (a factor of 5 where it is guessed wrong, which
//! most norms hide). Such a directory is refused, with the lines to add to its `config.json`.

mod writer;

pub use writer::{HfWriteError, write_masters};
pub use writer::{checkpoint_size, write_bytes, write_checkpoint, write_json};

use crate::checkpoint::{
    Content, LoadError, OpenOptions, Source, TensorInfo, TokenizerSource, aligned, checked_scale,
    choose_activation, drop_foreign_tokens, floats, one_float,
};
use crate::gguf::{FileMap, map_file};
use bitnet_burn::ModelConfig;
use bitnet_burn::names::EMBEDDING;
use bitnet_burn::names::HEAD;
use bitnet_burn::names::norm_name;
use bitnet_burn::names::projection_module;
use bitnet_burn::names::projection_name;
use bitnet_burn::names::scale_name;
use bitnet_burn::{Norm, Projection};
use bitnet_burn_formats::FormatError;
use bitnet_burn_formats::dense::DenseFormat;
use bitnet_burn_formats::hf::unpack_to_canonical;
use bitnet_burn_formats::quant::absmean_to_canonical;
use bitnet_burn_formats::{DenseTensor, TernaryTensor};
use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// The weights, where they are in one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Which shard holds which tensor, where they are in several.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const MODEL_TYPES: &str = "bitnet, llama (with a BitNet quantization_config)";

/// What is read beside the tensors and their index, by the model or by its tokenizer.
const COMPANIONS: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Largest JSON file and safetensors header that are read: a hundred times what large models have.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// How the projections are stored: see the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// `autobitlinear`, `online`: float masters, to be quantised by absmean.
    Online,
    /// `autobitlinear`, `offline`: packed; the scale multiplies.
    PackedAuto,
    /// `bitlinear`: packed; the scale divides.
    PackedInverse,
}

/// A tensor of a safetensors file: a view of its map.
struct HfTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Bytes,
}

/// A Hugging Face directory with a BitNet model in it.
pub(crate) struct HfModel {
    dir: PathBuf,
    json: Value,
    tensors: BTreeMap<String, HfTensor>,
    maps: Vec<FileMap>,
    /// The safetensors, and the index if there is one.
    shards: Vec<PathBuf>,
    style: Style,
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
        let json: Value = read_json(&path)?;
        let fields = Fields { path: &path, json: &json };
        fields.architecture()?;
        let Shards { tensors, maps, files: shards } = read_tensors(dir)?;
        let config = config(dir, fields, &tensors, options, warnings)?;
        config.validate().map_err(|error| LoadError::Config { path: path.clone(), error })?;
        let style = style(fields, &tensors, warnings)?;
        let model = Self { dir: dir.to_owned(), json, tensors, maps, shards, style, config: config.clone() };
        model.check_tensors(warnings)?;
        Ok((model, config))
    }

    fn tensor(&self, name: &str) -> Result<&HfTensor, LoadError> {
        self.tensors.get(name).ok_or_else(|| LoadError::MissingTensor {
            path: self.dir.clone(),
            tensor: name.to_owned(),
            help: String::new(),
        })
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
        LoadError::UnsupportedTensorType {
            path: self.dir.clone(),
            tensor: name.to_owned(),
            found: format!("{found:?}"),
            role,
            supported: supported.to_owned(),
        }
    }

    /// A tensor of floats as rows of its last dimension.
    fn dense(&self, name: &str, role: &'static str) -> Result<DenseTensor, LoadError> {
        let tensor = self.tensor(name)?;
        let format = match tensor.dtype {
            Dtype::F32 => DenseFormat::F32,
            Dtype::F16 => DenseFormat::F16,
            Dtype::BF16 => DenseFormat::BF16,
            other => return Err(self.wrong_type(name, other, role, "F32, F16, BF16")),
        };
        let k = tensor.shape.last().copied().unwrap_or(1);
        let n = tensor.shape.iter().rev().skip(1).product();
        Ok(DenseTensor { name: name.to_owned(), n, k, format, data: tensor.data.clone() })
    }

    /// Checks names, shapes and types of all tensors against the configuration.
    fn check_tensors(&self, warnings: &mut Vec<String>) -> Result<(), LoadError> {
        let config = &self.config;
        let mut used = HashSet::new();
        for layer in 0..config.n_layers {
            for norm in Norm::of_layer(layer, config.sub_norms) {
                let name = norm_name(norm);
                self.check_shape(&name, &[norm.len(config)])?;
                self.dense(&name, "a norm")?;
                used.insert(name);
            }
            for which in Projection::ALL {
                let name = projection_name(layer, which);
                let dtype = self.tensor(&name)?.dtype;
                let (n, k) = which.shape(config);
                if self.style == Style::Online {
                    if dtype == Dtype::U8 {
                        return Err(LoadError::Quantization {
                            path: self.dir.join("config.json"),
                            problem: format!(
                                "quantization_mode is `online`, which needs float masters, but tensor \
                                 `{name}` is packed (U8)"
                            ),
                        });
                    }
                    self.dense(&name, "a master")?;
                    self.check_shape(&name, &[n, k])?;
                } else {
                    if dtype != Dtype::U8 {
                        let role =
                            "a packed projection (quantization_mode `offline`, or linear_class `bitlinear`)";
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
                    self.dense(&scale, "a scale")?;
                    used.insert(scale);
                }
                used.insert(name);
            }
        }
        let norm = norm_name(Norm::Output);
        self.check_shape(&norm, &[config.hidden_size])?;
        self.dense(&norm, "a norm")?;
        used.insert(norm);
        if !config.tied_embeddings && !self.tensors.contains_key(HEAD) {
            return Err(LoadError::MissingTensor {
                path: self.dir.clone(),
                tensor: HEAD.into(),
                help: "; `tie_word_embeddings` in config.json is false, or absent, which means false".into(),
            });
        }
        for name in &[EMBEDDING, HEAD][..if config.tied_embeddings { 1 } else { 2 }] {
            self.check_shape(name, &[config.vocab_size, config.hidden_size])?;
            self.dense(name, "embedding and output head")?;
            used.insert((*name).to_owned());
        }

        // A tensor that is there is there for a reason: one that belongs to a layer changes the result.
        for name in self.tensors.keys().filter(|&name| !used.contains(name)) {
            if name.ends_with("rotary_emb.inv_freq") {
                continue; // what older versions saved although it follows from the configuration
            }
            let problem = if name.ends_with(".bias") {
                "BitNet projections have no bias".to_owned()
            } else if name.starts_with("model.layers.") {
                format!("it is none of the tensors of a BitNet model of {} layers", config.n_layers)
            } else {
                warnings.push(format!("tensor `{name}` is not used"));
                continue;
            };
            return Err(LoadError::UnsupportedTensor {
                path: self.dir.clone(),
                tensor: name.clone(),
                problem,
            });
        }
        Ok(())
    }
}

impl Source for HfModel {
    fn maps(&self) -> Vec<&FileMap> {
        self.maps.iter().collect()
    }

    fn projection(&self, layer: usize, which: Projection) -> Result<TernaryTensor, LoadError> {
        let name = projection_name(layer, which);
        let tensor = self.tensor(&name)?;
        let (n, k) = which.shape(&self.config);
        let stored_as = match (self.style, tensor.dtype) {
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
        let (codes, scale) = if self.style == Style::Online {
            let values = floats(&self.dir, &self.dense(&name, "a master")?)?;
            absmean_to_canonical(&values, n, k).map_err(not_ternary)?
        } else {
            let codes = unpack_to_canonical(&tensor.data, n, k).map_err(not_ternary)?;
            let stored = self.dense(&scale_name(layer, which), "a scale")?;
            let mut scale = one_float(&self.dir, &stored)?;
            if self.style == Style::PackedInverse {
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
        Ok(TernaryTensor { name, n, k, scale, codes: aligned(codes), stored_as })
    }

    fn master(&self, layer: usize, which: Projection) -> Result<Option<DenseTensor>, LoadError> {
        let name = projection_name(layer, which);
        if self.style == Style::Online { self.dense(&name, "a master").map(Some) } else { Ok(None) }
    }

    fn norm(&self, which: Norm) -> Result<DenseTensor, LoadError> {
        self.dense(&norm_name(which), "a norm")
    }

    fn embedding(&self) -> Result<DenseTensor, LoadError> {
        self.dense(EMBEDDING, "the embedding")
    }

    fn output(&self) -> Result<Option<DenseTensor>, LoadError> {
        self.dense(HEAD, "the output head").map(Some)
    }

    fn tokenizer_source(&self) -> TokenizerSource {
        TokenizerSource::Hf { dir: self.dir.clone() }
    }

    fn contents(&self) -> Vec<Content> {
        let beside = COMPANIONS.iter().map(|name| self.dir.join(name)).filter(|path| path.exists());
        beside.chain(self.shards.iter().cloned()).map(Content::File).collect()
    }

    fn tensors(&self) -> Vec<TensorInfo> {
        let info = |(name, t): (&String, &HfTensor)| TensorInfo {
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

/// Reads a JSON file of sensible size.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, LoadError> {
    let io = |action| move |error| LoadError::Io { path: path.to_owned(), action, error };
    let file = std::fs::File::open(path).map_err(io("open"))?;
    let size = file.metadata().map_err(io("open"))?.len();
    if size > MAX_JSON_BYTES {
        return Err(LoadError::Limit {
            path: path.to_owned(),
            what: "the size of the file in bytes".into(),
            found: size,
            limit: MAX_JSON_BYTES,
        });
    }
    let mut bytes = Vec::new();
    file.take(MAX_JSON_BYTES).read_to_end(&mut bytes).map_err(io("read"))?;
    serde_json::from_slice(&bytes).map_err(|e| LoadError::Json {
        path: path.to_owned(),
        problem: format!("not the JSON that was expected: {e}"),
    })
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Maps all weights of the directory.
/// All tensors, the maps that they are views of, and the files.
#[derive(Default)]
struct Shards {
    tensors: BTreeMap<String, HfTensor>,
    maps: Vec<FileMap>,
    files: Vec<PathBuf>,
}

fn read_tensors(dir: &Path) -> Result<Shards, LoadError> {
    let single = dir.join(SINGLE);
    if single.exists() {
        return read_shard(&single);
    }
    let index_path = dir.join(INDEX);
    if !index_path.exists() {
        return Err(LoadError::NoModel {
            path: dir.to_owned(),
            problem: format!(
                "the directory has neither {SINGLE} nor {INDEX} (PyTorch's .bin files are not read)"
            ),
        });
    }
    let index: Index = read_json(&index_path)?;
    let shards: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    let mut all = Shards { files: vec![index_path.clone()], ..Shards::default() };
    let mut shard_of = BTreeMap::new();
    for shard in shards {
        if !is_plain_file_name(shard) {
            return Err(LoadError::ShardEscapes { path: index_path, shard: shard.to_owned() });
        }
        let of_shard = read_shard(&dir.join(shard))?;
        all.maps.extend(of_shard.maps);
        all.files.extend(of_shard.files);
        for (name, tensor) in of_shard.tensors {
            if all.tensors.insert(name.clone(), tensor).is_some() {
                return Err(LoadError::Duplicate { path: dir.to_owned(), what: "tensor", name });
            }
            shard_of.insert(name, shard);
        }
    }
    for (name, shard) in &index.weight_map {
        if shard_of.get(name).copied() != Some(shard) {
            let help = format!(" from {shard}, where {INDEX} says that it is");
            return Err(LoadError::MissingTensor { path: dir.to_owned(), tensor: name.clone(), help });
        }
    }
    Ok(all)
}

/// Whether a name stays in its directory, on any system.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', ':', '\0'])
        && name.ends_with(".safetensors")
}

/// Maps one safetensors file. Its header is checked by the safetensors crate: lengths, that the tensors
/// cover the data exactly, and that each is as long as its type and shape say.
fn read_shard(path: &Path) -> Result<Shards, LoadError> {
    let (map, file_map) = map_file(path)?;
    let invalid = |problem: String| LoadError::Safetensors { path: path.to_owned(), problem };
    let size = map.len() as u64;
    let truncated = |what: &str, at, needed| LoadError::Truncated {
        path: path.to_owned(),
        what: what.to_owned(),
        at,
        needed,
        size,
    };
    let Some(length) = map.first_chunk::<8>().map(|l| u64::from_le_bytes(*l)) else {
        return Err(truncated("the length of the header", 0, 8));
    };
    if length > MAX_JSON_BYTES {
        return Err(LoadError::Limit {
            path: path.to_owned(),
            what: "the length of the header (perhaps this is no safetensors file)".into(),
            found: length,
            limit: MAX_JSON_BYTES,
        });
    }
    if length > size - 8 {
        return Err(truncated("the header", 8, length));
    }
    let data_start = 8 + length as usize;

    // The crate adds up offsets without checking for overflow, so none may be larger than the file.
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&map[8..data_start])
        .map_err(|e| invalid(format!("its header is not JSON: {e}")))?;
    let mut end = 0;
    for (name, info) in &header {
        for offset in info.get("data_offsets").and_then(Value::as_array).into_iter().flatten() {
            let offset = offset.as_u64().unwrap_or(u64::MAX);
            if offset > size {
                return Err(invalid(format!(
                    "tensor `{name}` has an offset of {offset} in a file of {size} bytes"
                )));
            }
            end = end.max(offset);
        }
    }
    let data_size = size - data_start as u64;
    if end > data_size {
        let problem = format!(
            "its tensors need {end} bytes behind the header, and there are {data_size}: truncated; download it \
             again"
        );
        return Err(invalid(problem));
    }
    let (_, metadata) = SafeTensors::read_metadata(&map).map_err(|e| invalid(e.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets; // covered by the data, which the crate has checked
        let data = map.slice(data_start + start..data_start + end);
        tensors.insert(name, HfTensor { dtype: info.dtype, shape: info.shape.clone(), data });
    }
    Ok(Shards { tensors, maps: file_map.into_iter().collect(), files: vec![path.to_owned()] })
}

/// The fields of a configuration file, or of an object in it.
#[derive(Clone, Copy)]
struct Fields<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl<'a> Fields<'a> {
    /// A field that is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    fn within(&self, key: &str) -> Option<Self> {
        Some(Self { path: self.path, json: self.get(key)? })
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> LoadError {
        let mut found = value.to_string();
        if let Some((end, _)) = found.char_indices().nth(80) {
            found.truncate(end);
            found += "...";
        }
        LoadError::WrongValue {
            path: self.path.to_owned(),
            key: key.to_owned(),
            found,
            expected: expected.to_owned(),
        }
    }

    fn missing(&self, key: &str) -> LoadError {
        LoadError::MissingKey { path: self.path.to_owned(), key: key.to_owned(), help: String::new() }
    }

    fn unsupported(&self, key: &str, value: &Value, supported: &str) -> LoadError {
        LoadError::Unsupported {
            path: self.path.to_owned(),
            what: format!("`{key}`"),
            found: value.to_string(),
            supported: supported.to_owned(),
        }
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(key, value, expected))
    }

    fn size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        self.read(key, "a non-negative integer", |v| usize::try_from(v.as_u64()?).ok())
    }

    fn required_size(&self, key: &str) -> Result<usize, LoadError> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, LoadError> {
        self.read(key, "a number", Value::as_f64)
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, LoadError> {
        self.read(key, "true or false", Value::as_bool)
    }

    fn str(&self, key: &str) -> Result<Option<&'a str>, LoadError> {
        self.read(key, "a string", Value::as_str)
    }

    /// A token, or several: both occur.
    fn tokens(&self, key: &str) -> Result<Option<Vec<u32>>, LoadError> {
        let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
        self.read(key, "a token's id or a list of them", |value| match value {
            Value::Array(items) => items.iter().map(id).collect(),
            value => Some(vec![id(value)?]),
        })
    }

    /// Refuses models of other shapes than those implemented.
    fn architecture(&self) -> Result<&'a str, LoadError> {
        if !self.json.is_object() {
            let problem = "a configuration is a JSON object, and this is none".into();
            return Err(LoadError::Json { path: self.path.to_owned(), problem });
        }
        match self.str("model_type")? {
            Some(known @ ("bitnet" | "llama")) => Ok(known),
            Some(other) => Err(LoadError::Architecture {
                path: self.path.to_owned(),
                found: other.to_owned(),
                supported: MODEL_TYPES,
            }),
            None => Err(self.missing("model_type")),
        }
    }
}

fn config(
    dir: &Path,
    fields: Fields<'_>,
    tensors: &BTreeMap<String, HfTensor>,
    options: &OpenOptions,
    warnings: &mut Vec<String>,
) -> Result<ModelConfig, LoadError> {
    let architecture = fields.architecture()?;
    for key in ["attention_bias", "mlp_bias"] {
        if let Some(value) = fields.get(key).filter(|_| fields.bool(key).is_ok_and(|b| b == Some(true))) {
            return Err(fields.unsupported(key, value, "false"));
        }
    }
    let hidden_size = fields.required_size("hidden_size")?;
    let n_heads = fields.required_size("num_attention_heads")?;
    let head_dim = match fields.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if n_heads > 0 && hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => {
            let expected = format!("a divisor of the hidden size {hidden_size}");
            return Err(fields.wrong("num_attention_heads", &Value::from(n_heads), &expected));
        }
    };
    let rope_theta = rope_theta(fields, architecture, warnings)?;
    let stated = fields.str("hidden_act")?.map(|name| ("hidden_act", name));
    let activation = choose_activation(fields.path, options, stated, warnings, || {
        Err(LoadError::UnknownActivation {
            path: fields.path.to_owned(),
            problem: "key `hidden_act` is missing: pass --hidden-act relu2 (BitNet b1.58 2B-4T) or \
                      --hidden-act silu (Llama and the older BitNet models)"
                .into(),
        })
    })?;

    let generation_path = dir.join("generation_config.json");
    let generation: Value = if generation_path.exists() { read_json(&generation_path)? } else { Value::Null };
    let generation = Fields { path: &generation_path, json: &generation };
    let tokens =
        |key| Ok::<_, LoadError>(generation.tokens(key)?.or(fields.tokens(key)?).unwrap_or_default());

    let mut config = ModelConfig {
        architecture: architecture.to_owned(),
        name: fields.str("_name_or_path")?.filter(|name| !name.is_empty()).map(str::to_owned),
        hidden_size,
        intermediate_size: fields.required_size("intermediate_size")?,
        n_layers: fields.required_size("num_hidden_layers")?,
        n_heads,
        n_kv_heads: fields.size("num_key_value_heads")?.unwrap_or(n_heads),
        head_dim,
        vocab_size: fields.required_size("vocab_size")?,
        context_length: fields.required_size("max_position_embeddings")?,
        rope_theta,
        rms_norm_eps: fields.float("rms_norm_eps")?.ok_or_else(|| fields.missing("rms_norm_eps"))? as f32,
        activation,
        sub_norms: tensors.keys().any(|name| name.ends_with("_sub_norm.weight")),
        // transformers' default; the configurations of tied models say so.
        tied_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
        bos_token: tokens("bos_token_id")?.first().copied(),
        eos_tokens: tokens("eos_token_id")?,
    };
    drop_foreign_tokens(&mut config, warnings);
    Ok(config)
}

/// The base of RoPE: `rope_theta`, since version 5 in `rope_parameters`. Scaled variants are refused.
fn rope_theta(fields: Fields<'_>, architecture: &str, warnings: &mut Vec<String>) -> Result<f64, LoadError> {
    let mut theta = fields.float("rope_theta")?;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = fields.within(key) else { continue };
        if !rope.json.is_object() {
            return Err(fields.wrong(key, rope.json, "an object"));
        }
        for kind in ["rope_type", "type"] {
            if let Some(value) = rope.get(kind).filter(|v| v.as_str() != Some("default")) {
                return Err(fields.unsupported(&format!("{key}.{kind}"), value, "\"default\""));
            }
        }
        if let Some(value) = rope.get("partial_rotary_factor").filter(|v| v.as_f64() != Some(1.0)) {
            return Err(fields.unsupported(&format!("{key}.partial_rotary_factor"), value, "1.0"));
        }
        if let Some(newer) = rope.float("rope_theta")? {
            if let Some(older) = theta.filter(|&t| t != newer) {
                warnings.push(format!(
                    "`{key}.rope_theta` is {newer}, `rope_theta` is {older}; the former is used"
                ));
            }
            theta = Some(newer);
        }
    }
    if let Some(value) = fields.get("partial_rotary_factor").filter(|v| v.as_f64() != Some(1.0)) {
        return Err(fields.unsupported("partial_rotary_factor", value, "1.0"));
    }
    Ok(theta.unwrap_or_else(|| {
        // transformers' defaults.
        let default = if architecture == "bitnet" { 500_000.0 } else { 10_000.0 };
        warnings.push(format!("`rope_theta` is missing; {default} is used, as transformers does"));
        default
    }))
}

/// How the projections are stored, from `quantization_config`.
fn style(
    fields: Fields<'_>,
    tensors: &BTreeMap<String, HfTensor>,
    warnings: &mut Vec<String>,
) -> Result<Style, LoadError> {
    let refuse = |problem: String| LoadError::Quantization { path: fields.path.to_owned(), problem };
    let Some(quantization) = fields.within("quantization_config") else {
        let first = projection_name(0, Projection::Q);
        let packed = tensors.get(&first).is_some_and(|t| t.dtype == Dtype::U8);
        const AUTO: &str = r#"{"quant_method": "bitnet", "linear_class": "autobitlinear""#;
        return Err(refuse(if packed {
            format!(
                "`quantization_config` is missing, so that nothing says in which direction the scales of the \
                 packed weights (`{first}` is U8) go; add {AUTO}, \"quantization_mode\": \"offline\"}} if they \
                 multiply, or {{\"quant_method\": \"bitnet\", \"linear_class\": \"bitlinear\"}} if they divide"
            )
        } else {
            format!(
                "`quantization_config` is missing: without it this is a model with plain float weights, which \
                 transformers would run without any quantisation; if the weights are masters trained for \
                 BitNet, add {AUTO}, \"quantization_mode\": \"online\"}}"
            )
        }));
    };
    match quantization.str("quant_method")? {
        Some("bitnet") => {}
        Some(other) => {
            return Err(refuse(format!("`quant_method` is \"{other}\"; only \"bitnet\" is supported")));
        }
        None => return Err(quantization.missing("quantization_config.quant_method")),
    }
    if quantization.bool("use_rms_norm")? == Some(true) {
        return Err(refuse(
            "`use_rms_norm` (a norm inside every projection) is true; only false is supported".into(),
        ));
    }
    if let Some(modules) = quantization.get("modules_to_not_convert") {
        let expected = "a list of strings";
        let list = modules
            .as_array()
            .ok_or_else(|| quantization.wrong("modules_to_not_convert", modules, expected))?;
        for module in list {
            let name = module
                .as_str()
                .ok_or_else(|| quantization.wrong("modules_to_not_convert", module, expected))?;
            if Projection::ALL.iter().any(|&p| projection_module(0, p).contains(name))
                || name.starts_with("model.layers.")
            {
                return Err(refuse(format!(
                    "`modules_to_not_convert` has \"{name}\": models with projections that are not ternary are \
                     not supported"
                )));
            }
        }
    }
    let mode = quantization.str("quantization_mode")?;
    if let Some(other) = mode.filter(|m| !matches!(*m, "online" | "offline")) {
        return Err(refuse(format!("`quantization_mode` is \"{other}\"; supported: online, offline")));
    }
    match quantization.str("linear_class")? {
        Some("autobitlinear") => Ok(if mode == Some("online") { Style::Online } else { Style::PackedAuto }),
        None | Some("bitlinear") => {
            if mode == Some("online") {
                warnings.push(
                    "`quantization_mode` is online, but linear_class `bitlinear` is always packed; read as such"
                        .into(),
                );
            }
            Ok(Style::PackedInverse)
        }
        Some(other) => {
            Err(refuse(format!("`linear_class` is \"{other}\"; supported: autobitlinear, bitlinear")))
        }
    }
}
