//! Models in GGUF: which keys make the configuration, which tensors the parts, and how each tensor type becomes
//! ternary.
//!
//! Names and meanings are llama.cpp's (`llama-arch.cpp`) and bitnet.cpp's. Keys are
//! looked up under the file's architecture first, then under the other names that BitNet has had, since
//! community conversions mix them.

mod config;
mod delta_net;
mod experts;
mod foreign;
pub(crate) mod hadamard;
mod keys;
pub(crate) mod names;
pub(crate) mod rope;
mod tokenizer;

use super::embed::{EmbedDefaults, Pooling};
use super::error::LoadError;
use super::missing::instead;
use super::source::{Content, FLOATS, OpenOptions, Rotated, Signs, Source, TensorInfo, Weights};
use super::tokenizer_source::TokenizerSource;
use super::values::{aligned, aligned_view, checked_rates, checked_scale, f32_tensor, floats, one_float};
use bitnet_burn::{ActivationRule, FloatPart, ModelConfig, Norm, Projection};
use bitnet_burn_formats::gguf::{GgufFile, GgufTensor, TensorType};
use bitnet_burn_formats::iq_bn::IqBn;
use bitnet_burn_formats::{
    DenseFormat, DenseTensor, FileError, FileMap, FormatError, Scales, TernaryTensor, blocks, canonical,
    ternary, tq1_0, tq2_0,
};
use bytes::Bytes;
use config::config;
pub(super) use config::what_matters;
use hadamard::Hadamard;
use keys::wrong_value;
use names::{
    ACTIVATIONS, INT8_ACTIVATIONS, bias_name, float_part_name, int8_rows, is_gptj, neox_rows, norm_name,
    norm_name_of, projection_name, projection_stem,
};
use std::collections::HashSet;
use tokenizer::{check_tokenizer, tokenizer};

const EMBEDDING: &str = "token_embd.weight";
const OUTPUT: &str = "output.weight";

/// A GGUF file with a model in it.
pub(crate) struct GgufModel {
    file: GgufFile,
    config: ModelConfig,
    pre: Option<String>,
    /// Which matrices are rotated.
    hadamard: Option<Hadamard>,
    /// Whether ternary weights with one scale have int8 activations by row, where the file says so.
    int8_activations: Option<bool>,
    /// How the others' activations are quantised, where it says so.
    activations: Option<ActivationRule>,
}

impl GgufModel {
    /// Derives the configuration, and checks that every tensor is there, in shape.
    pub(crate) fn new(
        file: GgufFile,
        options: &OpenOptions,
        warnings: &mut Vec<String>,
    ) -> Result<(Self, ModelConfig), LoadError> {
        let path = file.path();
        let mut config = config(&file, options, warnings)?;
        let hadamard = Hadamard::read(&file)?;
        if let (Some(delta), Some(hadamard)) = (&mut config.options.delta_net, &hadamard) {
            delta.grouped_output = hadamard.groups_outputs(&file, &delta.layers)?;
        }
        config.validate().map_err(|error| LoadError::Config { path: path.to_owned(), error })?;
        let model = Self {
            pre: options.pre.clone(),
            hadamard,
            // Norms before each projection are BitNet's, whatever the architecture.
            int8_activations: int8_activations(&file, &config.architecture)?
                .or(config.options.projection_norms.then_some(true)),
            activations: activations(&file)?,
            config: config.clone(),
            file,
        };
        model.check_tensors(warnings)?;
        check_tokenizer(&model.file)?;
        Ok((model, config))
    }

    /// Checks names, shapes and types of all tensors against the configuration.
    fn check_tensors(&self, warnings: &mut Vec<String>) -> Result<(), LoadError> {
        let config = &self.config;
        let mut used = HashSet::new();
        for layer in 0..config.n_layers {
            for norm in Norm::of_layer(layer, config) {
                let tensor = self.dense_info(&self.norm_name(norm), "a norm")?;
                self.check_shape(tensor, &[norm.len(config)])?;
                used.insert(tensor.name.as_str());
            }
            for which in Projection::of_layer(layer, config) {
                let (n, k) = which.shape(config);
                if let (Some(number), Some(experts)) = (which.expert(), config.experts(layer)) {
                    // One tensor for all of them.
                    if number == 0 {
                        let tensor =
                            self.dense_info(&projection_name(layer, which), "the projections of experts")?;
                        self.check_shape(tensor, &[experts.count, n, k])?;
                        used.insert(tensor.name.as_str());
                    }
                    continue;
                }
                let tensor = self.info(&projection_name(layer, which))?;
                self.check_shape(tensor, &[n, k])?;
                used.insert(tensor.name.as_str());
                if let Some(scale) = self.scale_tensor(layer, which)? {
                    if self.is_dense(tensor.tensor_type) {
                        let (name, stored_as) = (&tensor.name, tensor.tensor_type.name());
                        return Err(LoadError::UnsupportedTensor {
                            path: self.file.path().to_owned(),
                            tensor: scale.name.clone(),
                            problem: format!("`{name}` is {stored_as} with scales of its own"),
                        });
                    }
                    used.insert(scale.name.as_str());
                }
                if which.has_bias(config) {
                    let bias = self.dense_info(&bias_name(layer, which), "a bias")?;
                    self.check_shape(bias, &[n])?;
                    used.insert(bias.name.as_str());
                }
            }
        }
        for layer in 0..config.n_layers {
            for which in FloatPart::of_layer(layer, config) {
                let tensor = self.dense_info(&float_part_name(layer, which), FLOATS)?;
                self.check_shape(tensor, &stored_shape(which, config))?;
                used.insert(tensor.name.as_str());
            }
        }
        let norm = self.dense_info(&norm_name(Norm::Output), "a norm")?;
        self.check_shape(norm, &[config.hidden_size])?;
        used.insert(norm.name.as_str());
        let matrices = [EMBEDDING, OUTPUT];
        for name in &matrices[..if config.tied_embeddings { 1 } else { 2 }] {
            let tensor = self.dense_info(name, "embedding and output head")?;
            self.check_shape(tensor, &[config.vocab_size, config.hidden_size])?;
            used.insert(tensor.name.as_str());
        }

        let projections = (0..config.n_layers)
            .flat_map(|layer| {
                Projection::of_layer(layer, config).into_iter().map(move |which| (layer, which))
            })
            .map(|(layer, which)| projection_name(layer, which))
            .collect::<HashSet<_>>();
        let matrix = |name: &str| [EMBEDDING, OUTPUT].contains(&name) || projections.contains(name);
        if let Some(name) = self.hadamard.as_ref().and_then(|hadamard| hadamard.other_than(matrix)) {
            return Err(LoadError::UnsupportedTensor {
                path: self.file.path().to_owned(),
                tensor: name.clone(),
                problem: "is rotated by a Hadamard transform, and is no projection, embedding or head".into(),
            });
        }
        used.extend(rope::TENSORS);
        // A tensor that is there is there for a reason: one that belongs to a layer changes the result.
        let unused: Vec<_> = self.file.tensors().iter().filter(|t| !used.contains(t.name.as_str())).collect();
        for tensor in &unused {
            let refuse = |problem: &str| LoadError::UnsupportedTensor {
                path: self.file.path().to_owned(),
                tensor: tensor.name.clone(),
                problem: problem.to_owned(),
            };
            if tensor.name.ends_with(".bias") {
                return Err(refuse(&format!("this projection has no bias in `{}`", config.architecture)));
            } else if tensor.name.starts_with("blk.") {
                let (name, layers) = (&config.architecture, config.n_layers);
                let problem = format!("a model `{name}` of {layers} layers has no such tensor");
                return Err(refuse(&problem));
            } else {
                warnings.push(format!("tensor `{}` is not used", tensor.name));
            }
        }
        Ok(())
    }

    fn info(&self, name: &str) -> Result<&GgufTensor, LoadError> {
        let missing = || FileError::MissingTensor {
            path: self.file.path().to_owned(),
            tensor: name.to_owned(),
            help: instead(name, self.file.tensors().iter().map(|t| t.name.as_str())),
        };
        Ok(self.file.tensor(name).ok_or_else(missing)?)
    }

    fn dense_info(&self, name: &str, role: &'static str) -> Result<&GgufTensor, LoadError> {
        let tensor = self.info(name)?;
        match tensor.tensor_type {
            TensorType::Dense(_) => Ok(tensor),
            _ => Err(self.wrong_type(tensor, role)),
        }
    }

    fn wrong_type(&self, tensor: &GgufTensor, role: &'static str) -> LoadError {
        let error = FileError::UnsupportedTensorType {
            path: self.file.path().to_owned(),
            tensor: tensor.name.clone(),
            found: TensorType::describe(tensor.tensor_type.id()),
            role,
            supported: DenseFormat::names(),
        };
        error.into()
    }

    /// Compares a shape, rows first; further dimensions of 1 don't matter.
    fn check_shape(&self, tensor: &GgufTensor, expected: &[usize]) -> Result<(), LoadError> {
        let mut dims = tensor.dims.clone();
        while dims.len() > expected.len() && dims.last() == Some(&1) {
            dims.pop();
        }
        let expected: Vec<u64> = expected.iter().map(|&d| d as u64).collect();
        if dims.iter().rev().eq(&expected) {
            return Ok(());
        }
        Err(LoadError::WrongShape {
            path: self.file.path().to_owned(),
            tensor: tensor.name.clone(),
            found: tensor.shape(),
            expected,
        })
    }

    fn dense(&self, name: &str, role: &'static str) -> Result<DenseTensor, LoadError> {
        let tensor = self.info(name)?;
        match dense(&self.file, tensor)? {
            Some(tensor) => Ok(tensor),
            None => Err(self.wrong_type(tensor, role)),
        }
    }

    /// What is not ternary with one scale, in the order of rows that the model has.
    fn dense_projection(&self, tensor: &GgufTensor, which: Projection) -> Result<Weights, LoadError> {
        let tensor = self.dense(&tensor.name, "a projection")?;
        if let Some(number) = which.expert() {
            // The matrices lie one behind the other, each of whole rows.
            let experts = self.experts();
            let (n, bytes) = (tensor.n / experts, tensor.data.len() / experts);
            let data = tensor.data.slice(number * bytes..(number + 1) * bytes);
            let name = format!("{} (expert {number})", tensor.name);
            return Ok(Weights::Dense(DenseTensor { name, n, data, ..tensor }));
        }
        let data = match self.permuted(which) {
            Some(head) => Bytes::from_owner(neox_rows(&tensor.data, tensor.n, head)),
            None => tensor.data,
        };
        Ok(Weights::Dense(DenseTensor { data, ..tensor }))
    }

    /// Whether projections of a type have no int8 activations by row, whatever they hold.
    fn is_dense(&self, tensor_type: TensorType) -> bool {
        match self.int8_activations {
            Some(int8) if tensor_type != TensorType::I2_S => !int8,
            _ => !int8_rows(&self.config.architecture, tensor_type),
        }
    }

    fn norm_name(&self, which: Norm) -> String {
        norm_name_of(&self.config.architecture, which)
    }

    /// The rows of a head, where those of this projection are in GPT-J's order.
    fn permuted(&self, which: Projection) -> Option<usize> {
        let permuted = matches!(which, Projection::Q | Projection::K) && is_gptj(&self.config.architecture);
        permuted.then_some(self.config.head_dim)
    }

    /// Experts whose matrices lie in one tensor.
    fn experts(&self) -> usize {
        self.config.options.experts.as_ref().map_or(1, |experts| experts.count.max(1))
    }

    /// Whether the architecture is one of BitNet's, whose projections must be ternary.
    fn is_bitnet(&self) -> bool {
        self.config.architecture.starts_with("bitnet")
    }

    /// The tensor that holds a projection's separate scale, under any of the names in use.
    fn scale_tensor(&self, layer: usize, which: Projection) -> Result<Option<&GgufTensor>, LoadError> {
        let stem = projection_stem(layer, which);
        let names = [".scale", ".weight_scale", ".weight.scale", "_scale", "_scale.weight", ".scale.weight"];
        let mut found: Option<&GgufTensor> = None;
        for tensor in names.iter().filter_map(|suffix| self.file.tensor(&format!("{stem}{suffix}"))) {
            if let Some(first) = found {
                return Err(LoadError::UnsupportedTensor {
                    path: self.file.path().to_owned(),
                    tensor: tensor.name.clone(),
                    problem: format!("`{}` is a scale of the same projection; one is expected", first.name),
                });
            }
            self.dense_info(&tensor.name, "a scale")?;
            self.check_shape(tensor, &[1])?;
            found = Some(tensor);
        }
        Ok(found)
    }
}

impl Source for GgufModel {
    fn maps(&self) -> Vec<&FileMap> {
        self.file.parts().filter_map(|part| part.file_map()).collect()
    }

    fn contents(&self) -> Vec<Content> {
        let content = |part: &GgufFile| {
            let path = part.path().to_owned();
            match part.file_map() {
                Some(map) => Content::File(path, map.identity().clone()),
                None => Content::Memory(path, part.contents().clone()),
            }
        };
        self.file.parts().map(content).collect()
    }

    fn weights(&self, layer: usize, which: Projection) -> Result<Weights, LoadError> {
        let name = projection_name(layer, which);
        let tensor = self.info(&name)?;
        let path = self.file.path();
        let (n, k) = tensor.matrix();
        let (n, k) = (n as usize, k as usize); // within the file's size
        let stored_as = tensor.tensor_type.name();
        if which.expert().is_some() || self.is_dense(tensor.tensor_type) {
            return self.dense_projection(tensor, which);
        }
        let data = self.file.tensor_bytes(&name)?;
        let decoded = match tensor.tensor_type {
            TensorType::I2_S => {
                let (codes, scale) = self.file.i2_s(&name)?;
                Ok((aligned_view(codes), scale))
            }
            TensorType::IqBn(format) => format.with_one_scale(&data, n, k).map(owned),
            TensorType::TQ1_0 => tq1_0::to_canonical(&data, n, k).map(owned),
            TensorType::TQ2_0 => tq2_0::to_canonical(&data, n, k).map(owned),
            TensorType::Dense(format) => ternary::exact_from_dense(format, &data, n, k).map(owned),
        };
        let (codes, mut scale) = match decoded {
            Ok(decoded) => decoded,
            Err(_) if !self.is_bitnet() && self.scale_tensor(layer, which)?.is_none() => {
                return self.dense_projection(tensor, which);
            }
            Err(error) => {
                let (path, tensor, problem) = (path.to_owned(), name, error.to_string());
                return Err(LoadError::NotTernary { path, tensor, stored_as, problem });
            }
        };
        // llama.cpp multiplies the product by the separate scale, whatever the weights' own scale is; here
        // the two become one.
        if let Some(extra) = self.scale_tensor(layer, which)? {
            let extra = self.dense(&extra.name, "a scale")?;
            scale *= checked_scale(path, &extra.name, one_float(path, &extra)?)?;
        }
        let scale = checked_scale(path, &name, scale)?;
        let codes = match self.permuted(which) {
            Some(head) => aligned(neox_rows(&codes, n, head)),
            None => codes,
        };
        Ok(Weights::Ternary(TernaryTensor { name, n, k, scale, codes, stored_as }))
    }

    fn dense_bytes(&self, layer: usize, which: Projection) -> Option<u64> {
        let tensor = self.info(&projection_name(layer, which)).ok()?;
        match which.expert() {
            Some(_) => Some(tensor.bytes / self.experts() as u64),
            None => self.is_dense(tensor.tensor_type).then_some(tensor.bytes),
        }
    }

    fn bias(&self, layer: usize, which: Projection) -> Result<DenseTensor, LoadError> {
        let bias = self.dense(&bias_name(layer, which), "a bias")?;
        let Some(head) = self.permuted(which) else { return Ok(bias) };
        let data = Bytes::from_owner(neox_rows(&bias.data, bias.k, head));
        Ok(DenseTensor { data, ..bias })
    }

    fn master(&self, _: usize, _: Projection) -> Result<Option<DenseTensor>, LoadError> {
        Ok(None)
    }

    fn float_part(&self, layer: usize, which: FloatPart) -> Result<DenseTensor, LoadError> {
        let tensor = self.dense(&float_part_name(layer, which), FLOATS)?;
        let values = || floats(self.file.path(), &tensor);
        Ok(match which {
            FloatPart::DeltaConvolution => {
                let values = which.from_checkpoint(&values()?, &self.config);
                f32_tensor(&tensor.name, which.shape(&self.config), &values)
            }
            // Not their logarithms, as in a checkpoint.
            FloatPart::DeltaRate => {
                checked_rates(self.file.path(), &tensor.name, &values()?)?;
                tensor
            }
            _ => tensor,
        })
    }

    fn norm(&self, which: Norm) -> Result<DenseTensor, LoadError> {
        self.dense(&self.norm_name(which), "a norm")
    }

    fn embedding(&self) -> Result<DenseTensor, LoadError> {
        self.dense(EMBEDDING, "the embedding")
    }

    fn output(&self) -> Result<Option<DenseTensor>, LoadError> {
        match self.file.tensor(OUTPUT) {
            Some(_) => self.dense(OUTPUT, "the output head").map(Some),
            None => Ok(None),
        }
    }

    fn rotation(&self, of: Rotated) -> Option<Signs> {
        let hadamard = self.hadamard.as_ref()?;
        let width = |name: &str| Some(self.file.tensor(name)?.matrix().1 as usize);
        match of {
            Rotated::Projection(layer, which) => {
                let name = projection_name(layer, which);
                hadamard.of_input(&name, width(&name)?)
            }
            Rotated::Embedding => hadamard.of_rows(EMBEDDING, width(EMBEDDING)?),
            Rotated::Output => match width(OUTPUT) {
                Some(k) => hadamard.of_input(OUTPUT, k),
                // The table itself: (s * H(z)) x = z H(s * x).
                None => {
                    let k = width(EMBEDDING)?;
                    hadamard.of_input(EMBEDDING, k).or_else(|| hadamard.of_rows(EMBEDDING, k))
                }
            },
        }
    }

    fn activations(&self) -> Option<ActivationRule> {
        self.activations
    }

    fn tokenizer_source(&self) -> TokenizerSource {
        TokenizerSource::Gguf(Box::new(tokenizer(&self.file, self.pre.clone())))
    }

    fn embed_defaults(&self, asked: Option<Pooling>) -> Result<EmbedDefaults, LoadError> {
        EmbedDefaults::of_gguf(&self.file, asked)
    }

    fn tensors(&self) -> Vec<TensorInfo> {
        let info = |t: &GgufTensor| TensorInfo {
            name: t.name.clone(),
            type_name: t.tensor_type.name().to_owned(),
            shape: t.shape(),
            bytes: t.bytes,
        };
        self.file.tensors().iter().map(info).collect()
    }

    fn metadata(&self) -> Vec<(String, String)> {
        let version = ("GGUF.version".to_owned(), self.file.version().to_string());
        let keys = self.file.metadata().iter().map(|(key, value)| (key.clone(), value.to_string()));
        std::iter::once(version).chain(keys).collect()
    }
}

/// The shape of a part in GGUF, rows first.
fn stored_shape(which: FloatPart, config: &ModelConfig) -> Vec<usize> {
    let [rows, columns] = which.shape(config);
    match which {
        FloatPart::DeltaConvolution => vec![columns, rows],
        FloatPart::SharedRouter => vec![columns],
        _ => which.checkpoint_shape(config),
    }
}

/// What the key [`ACTIVATIONS`] says.
fn activations(file: &GgufFile) -> Result<Option<ActivationRule>, LoadError> {
    let Some(value) = file.value(ACTIVATIONS) else { return Ok(None) };
    let rule = value.as_str().and_then(|text| text.parse().ok());
    let wrong = || wrong_value(file, ACTIVATIONS.to_owned(), value, "model, row, float or group:N");
    rule.map(Some).ok_or_else(wrong)
}

/// What the key [`INT8_ACTIVATIONS`] says.
fn int8_activations(file: &GgufFile, architecture: &str) -> Result<Option<bool>, LoadError> {
    let key = format!("{architecture}.{INT8_ACTIVATIONS}");
    let Some(value) = file.value(&key) else { return Ok(None) };
    let Some(stated) = value.as_bool() else { return Err(wrong_value(file, key, value, "a bool")) };
    let fixed = file.tensors().iter().any(|tensor| tensor.tensor_type == TensorType::I2_S);
    if !stated && fixed {
        return Err(LoadError::Unsupported {
            path: file.path().to_owned(),
            what: key,
            found: "false".into(),
            supported: "true, beside I2_S tensors".into(),
        });
    }
    Ok(Some(stated))
}

/// A tensor of a file, if it has a dense type, or one of ternary rows: those become blocks, or floats where blocks can't hold
/// their scales.
fn dense(file: &GgufFile, tensor: &GgufTensor) -> Result<Option<DenseTensor>, LoadError> {
    let (n, k) = tensor.matrix(); // both within the file's size, as every tensor's bytes are
    let (name, n, k) = (tensor.name.clone(), n as usize, k as usize);
    let data = file.tensor_bytes(&name)?;
    let (format, data) = match tensor.tensor_type {
        TensorType::Dense(format) => (format, data),
        TensorType::I2_S => return Ok(None),
        TensorType::IqBn(format) => {
            from_rows(format, &data, n, k).map_err(|error| LoadError::NotTernary {
                path: file.path().to_owned(),
                tensor: name.clone(),
                stored_as: format.name(),
                problem: error.to_string(),
            })?
        }
    };
    Ok(Some(DenseTensor { name, n, k, format, data }))
}

/// Ternary rows with their scales, in a dense format.
fn from_rows(format: IqBn, data: &[u8], n: usize, k: usize) -> Result<(DenseFormat, Bytes), FormatError> {
    let (codes, scales) = format.to_canonical(data, n, k)?;
    let of_rows = Scales::from_rows(&scales, n, k, 0)?;
    if let Ok(blocks) = blocks::write(DenseFormat::Q2_0, &codes, n, k, &of_rows) {
        return Ok((DenseFormat::Q2_0, blocks.into()));
    }
    let (mut weights, mut values) = (vec![0; k], Vec::with_capacity(4 * n * k));
    for (codes, scale) in codes.chunks_exact(canonical::row_bytes(k)).zip(scales) {
        canonical::unpack_row(codes, &mut weights);
        values.extend(weights.iter().flat_map(|&w| (f32::from(w) * scale).to_le_bytes()));
    }
    Ok((DenseFormat::F32, values.into()))
}

/// Decoded codes in a buffer with the alignment that kernels want.
fn owned((codes, scale): (Vec<u8>, f32)) -> (Bytes, f32) {
    (aligned(codes), scale)
}
