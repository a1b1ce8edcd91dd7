//! BitNet models in GGUF: which keys make the configuration, which tensors the parts, and how each tensor
//! type becomes ternary.
//!
//! Names and meanings are llama.cpp's (`llama-arch.cpp`, `LLM_ARCH_BITNET`) and bitnet.cpp's. Keys are
//! looked up under the file's architecture first, then under the other names that BitNet has had, since
//! community conversions mix them.
//!
//! Files of the architecture `llama` rotate neighbouring rows of a head (GPT-J's RoPE), those of BitNet and
//! Hugging Face's of both rotate a row with the one half a head further (GPT-NeoX's): converters reorder
//! the rows of q and k, and so do [`neox_rows`] and [`gptj_rows`].

use super::{FileMap, GgufFile, GgufTensor, TensorType, Value, ValueType};
use crate::checkpoint::{
    Content, GgufTokenizer, LoadError, OpenOptions, Source, TensorInfo, TokenizerSource, aligned,
    aligned_view, checked_scale, choose_activation, floats, one_float,
};
use bitnet_burn::{Activation, ModelConfig};
use bitnet_burn::{Norm, Projection};
use bitnet_burn_formats::dense::DenseFormat;
use bitnet_burn_formats::{DenseTensor, TernaryTensor};
use bitnet_burn_formats::{ternary, tq1_0, tq2_0};
use bytes::Bytes;
use std::collections::HashSet;

/// The architectures that are read.
const ARCHITECTURES: [&str; 4] = ["bitnet-b1.58", "bitnet-25", "bitnet", LLAMA];
const ARCHITECTURES_TEXT: &str = "bitnet-b1.58, bitnet-25, bitnet, llama (with ternary projections)";
/// Llama's shape: no sub-norms, SiLU, and q and k in another order of rows.
pub(super) const LLAMA: &str = "llama";
/// Keys are looked up under these names too.
const PREFIXES: [&str; 3] = ["bitnet", "bitnet-b1.58", "bitnet-25"];
/// Keys that state the activation; llama.cpp defines none for BitNet, converters have their own.
const ACTIVATION_KEYS: [&str; 3] = ["hidden_act", "feed_forward.activation", "hidden_activation"];
const DENSE_TYPES: &str = "F32, F16, BF16, Q8_0, Q6_K, Q4_0";
/// llama.cpp's, for a file without `rope.freq_base`.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
/// Control tokens that end a turn, whatever `eos_token_id` says; llama.cpp knows them by these texts too.
const END_TOKENS: [&str; 6] =
    ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"];

/// A GGUF file with a BitNet model in it.
pub(crate) struct GgufModel {
    file: GgufFile,
    pre: Option<String>,
    n_layers: usize,
    /// The rows of a head, where q and k are in GPT-J's order.
    gptj_head: Option<usize>,
}

impl GgufModel {
    /// Derives the configuration, and checks that every tensor is there, in shape.
    pub(crate) fn new(
        file: GgufFile,
        options: &OpenOptions,
        warnings: &mut Vec<String>,
    ) -> Result<(Self, ModelConfig), LoadError> {
        let path = file.path();
        let config = config(&file, options, warnings)?;
        config.validate().map_err(|error| LoadError::Config { path: path.to_owned(), error })?;
        let gptj_head = (config.architecture == LLAMA).then_some(config.head_dim);
        let model = Self { file, pre: options.pre.clone(), n_layers: config.n_layers, gptj_head };
        model.check_tensors(&config, warnings)?;
        check_tokenizer(&model.file)?;
        Ok((model, config))
    }

    /// Checks names, shapes and types of all tensors against the configuration.
    fn check_tensors(&self, config: &ModelConfig, warnings: &mut Vec<String>) -> Result<(), LoadError> {
        let mut used = HashSet::new();
        for layer in 0..config.n_layers {
            for norm in Norm::of_layer(layer, config.sub_norms) {
                let tensor = self.dense_info(&norm_name(norm), "a norm")?;
                self.check_shape(tensor, &[norm.len(config)])?;
                used.insert(tensor.name.as_str());
            }
            for which in Projection::ALL {
                let tensor = self.info(&projection_name(layer, which))?;
                let (n, k) = which.shape(config);
                self.check_shape(tensor, &[n, k])?;
                used.insert(tensor.name.as_str());
                if let Some(scale) = self.scale_tensor(layer, which)? {
                    used.insert(scale.name.as_str());
                }
            }
        }
        let norm = self.dense_info(&norm_name(Norm::Output), "a norm")?;
        self.check_shape(norm, &[config.hidden_size])?;
        used.insert(norm.name.as_str());
        let matrices = ["token_embd.weight", "output.weight"];
        for name in &matrices[..if config.tied_embeddings { 1 } else { 2 }] {
            let tensor = self.dense_info(name, "embedding and output head")?;
            self.check_shape(tensor, &[config.vocab_size, config.hidden_size])?;
            used.insert(tensor.name.as_str());
        }

        // A tensor that is there is there for a reason: one that belongs to a layer changes the result.
        let unused: Vec<_> = self.file.tensors().iter().filter(|t| !used.contains(t.name.as_str())).collect();
        for tensor in &unused {
            let refuse = |problem: &str| LoadError::UnsupportedTensor {
                path: self.file.path().to_owned(),
                tensor: tensor.name.clone(),
                problem: problem.to_owned(),
            };
            if tensor.name.starts_with("rope_f") {
                let values = floats(self.file.path(), &self.dense(&tensor.name, "RoPE factors")?)?;
                if values.iter().any(|&v| v != 1.0) {
                    return Err(refuse(
                        "its RoPE frequency factors are not 1, and scaled RoPE is not implemented",
                    ));
                }
            } else if tensor.name.ends_with(".bias") {
                return Err(refuse("BitNet projections have no bias"));
            } else if tensor.name.starts_with("blk.") {
                let problem =
                    format!("it is none of the tensors of a BitNet model of {} layers", self.n_layers);
                return Err(refuse(&problem));
            } else {
                warnings.push(format!("tensor `{}` is not used", tensor.name));
            }
        }
        Ok(())
    }

    fn info(&self, name: &str) -> Result<&GgufTensor, LoadError> {
        self.file.tensor(name).ok_or_else(|| LoadError::MissingTensor {
            path: self.file.path().to_owned(),
            tensor: name.to_owned(),
            help: String::new(),
        })
    }

    fn dense_info(&self, name: &str, role: &'static str) -> Result<&GgufTensor, LoadError> {
        let tensor = self.info(name)?;
        match dense_format(tensor.tensor_type) {
            Some(_) => Ok(tensor),
            None => Err(self.wrong_type(tensor, role)),
        }
    }

    fn wrong_type(&self, tensor: &GgufTensor, role: &'static str) -> LoadError {
        LoadError::UnsupportedTensorType {
            path: self.file.path().to_owned(),
            tensor: tensor.name.clone(),
            found: TensorType::describe(tensor.tensor_type.id()),
            role,
            supported: DENSE_TYPES.to_owned(),
        }
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
        let format = dense_format(tensor.tensor_type).ok_or_else(|| self.wrong_type(tensor, role))?;
        let (n, k) = tensor.matrix(); // both within the file's size, as every tensor's bytes are
        let (n, k) = (n as usize, k as usize);
        Ok(DenseTensor { name: name.to_owned(), n, k, format, data: self.file.tensor_bytes(name)? })
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
        self.file.file_map().into_iter().collect()
    }

    fn contents(&self) -> Vec<Content> {
        vec![self.file.content()]
    }

    fn projection(&self, layer: usize, which: Projection) -> Result<TernaryTensor, LoadError> {
        let name = projection_name(layer, which);
        let tensor = self.info(&name)?;
        let path = self.file.path();
        let (n, k) = tensor.matrix();
        let (n, k) = (n as usize, k as usize); // within the file's size
        let stored_as = tensor.tensor_type.name();
        let data = self.file.tensor_bytes(&name)?;
        let decoded = match tensor.tensor_type {
            TensorType::I2_S => {
                let (codes, scale) = self.file.i2_s(&name)?;
                Ok((aligned_view(codes), scale))
            }
            TensorType::TQ1_0 => tq1_0::to_canonical(&data, n, k).map(owned),
            TensorType::TQ2_0 => tq2_0::to_canonical(&data, n, k).map(owned),
            other => {
                let format = dense_format(other).ok_or_else(|| self.wrong_type(tensor, "a projection"))?;
                ternary::exact_from_dense(format, &data, n, k).map(owned)
            }
        };
        let (codes, mut scale) = decoded.map_err(|e| LoadError::NotTernary {
            path: path.to_owned(),
            tensor: name.clone(),
            stored_as,
            problem: e.to_string(),
        })?;
        // llama.cpp multiplies the product by the separate scale, whatever the weights' own scale is; here
        // the two become one.
        if let Some(extra) = self.scale_tensor(layer, which)? {
            let extra = self.dense(&extra.name, "a scale")?;
            scale *= checked_scale(path, &extra.name, one_float(path, &extra)?)?;
        }
        let scale = checked_scale(path, &name, scale)?;
        let codes = match (self.gptj_head, which) {
            (Some(head), Projection::Q | Projection::K) => aligned(neox_rows(&codes, n, head)),
            _ => codes,
        };
        Ok(TernaryTensor { name, n, k, scale, codes, stored_as })
    }

    fn master(&self, _: usize, _: Projection) -> Result<Option<DenseTensor>, LoadError> {
        Ok(None)
    }

    fn norm(&self, which: Norm) -> Result<DenseTensor, LoadError> {
        self.dense(&norm_name(which), "a norm")
    }

    fn embedding(&self) -> Result<DenseTensor, LoadError> {
        self.dense("token_embd.weight", "the embedding")
    }

    fn output(&self) -> Result<Option<DenseTensor>, LoadError> {
        match self.file.tensor("output.weight") {
            Some(_) => self.dense("output.weight", "the output head").map(Some),
            None => Ok(None),
        }
    }

    fn tokenizer_source(&self) -> TokenizerSource {
        TokenizerSource::Gguf(Box::new(tokenizer(&self.file, self.pre.clone())))
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

fn projection_stem(layer: usize, which: Projection) -> String {
    let part = match which {
        Projection::Q => "attn_q",
        Projection::K => "attn_k",
        Projection::V => "attn_v",
        Projection::O => "attn_output",
        Projection::Gate => "ffn_gate",
        Projection::Up => "ffn_up",
        Projection::Down => "ffn_down",
    };
    format!("blk.{layer}.{part}")
}

/// `n` rows of heads of `head` rows, from GPT-J's order (row 2i rotates with 2i + 1) to GPT-NeoX's (row i
/// with i + head / 2).
pub(super) fn neox_rows(rows: &[u8], n: usize, head: usize) -> Vec<u8> {
    reordered(rows, n, head, |i| if i < head / 2 { 2 * i } else { 2 * (i - head / 2) + 1 })
}

/// The inverse of [`neox_rows`].
pub(super) fn gptj_rows(rows: &[u8], n: usize, head: usize) -> Vec<u8> {
    reordered(rows, n, head, |i| i / 2 + i % 2 * (head / 2))
}

/// Row i of each head taken from its row `from(i)`.
fn reordered(rows: &[u8], n: usize, head: usize, from: impl Fn(usize) -> usize) -> Vec<u8> {
    let bytes = rows.len() / n;
    let mut out = Vec::with_capacity(rows.len());
    for rows in rows.chunks(head * bytes) {
        (0..head).for_each(|i| out.extend_from_slice(&rows[from(i) * bytes..][..bytes]));
    }
    out
}

/// Decoded codes in a buffer with the alignment that kernels want.
fn owned((codes, scale): (Vec<u8>, f32)) -> (Bytes, f32) {
    (aligned(codes), scale)
}

/// The name of a projection's tensor in GGUF.
pub fn projection_name(layer: usize, which: Projection) -> String {
    projection_stem(layer, which) + ".weight"
}

/// The name of a norm's tensor in GGUF.
pub fn norm_name(which: Norm) -> String {
    let (layer, part) = match which {
        Norm::Attention(l) => (l, "attn_norm"),
        Norm::AttentionSub(l) => (l, "attn_sub_norm"),
        Norm::FeedForward(l) => (l, "ffn_norm"),
        Norm::FeedForwardSub(l) => (l, "ffn_sub_norm"),
        Norm::Output => return "output_norm.weight".to_owned(),
    };
    format!("blk.{layer}.{part}.weight")
}

fn dense_format(tensor_type: TensorType) -> Option<DenseFormat> {
    match tensor_type {
        TensorType::F32 => Some(DenseFormat::F32),
        TensorType::F16 => Some(DenseFormat::F16),
        TensorType::BF16 => Some(DenseFormat::BF16),
        TensorType::Q8_0 => Some(DenseFormat::Q8_0),
        TensorType::Q6_K => Some(DenseFormat::Q6_K),
        TensorType::Q4_0 => Some(DenseFormat::Q4_0),
        TensorType::TQ1_0 | TensorType::TQ2_0 | TensorType::I2_S => None,
    }
}

/// The keys of a file, under its architecture's name or another of BitNet's.
struct Keys<'a> {
    file: &'a GgufFile,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    fn find(&self, suffix: &str) -> Option<(String, &'a Value)> {
        std::iter::once(self.architecture).chain(PREFIXES).find_map(|prefix| {
            let key = format!("{prefix}.{suffix}");
            self.file.value(&key).map(|value| (key, value))
        })
    }

    fn wrong(&self, key: String, value: &Value, expected: &str) -> LoadError {
        wrong_value(self.file, key, value, expected)
    }

    fn missing(&self, suffix: &str) -> LoadError {
        let others: Vec<_> =
            PREFIXES.iter().filter(|&&p| p != self.architecture).map(|p| format!("{p}.{suffix}")).collect();
        LoadError::MissingKey {
            path: self.file.path().to_owned(),
            key: format!("{}.{suffix}", self.architecture),
            help: format!("; {} would do as well", others.join(" or ")),
        }
    }

    /// A size. An array with a number for each layer will do if all are equal.
    fn size(&self, suffix: &str) -> Result<Option<usize>, LoadError> {
        let Some((key, value)) = self.find(suffix) else { return Ok(None) };
        let number = match value {
            Value::Array(items) => {
                let numbers = items.to_i64().unwrap_or_default();
                match numbers.first() {
                    Some(first) if numbers.iter().all(|n| n == first) => u64::try_from(*first).ok(),
                    _ => return Err(self.wrong(key, value, "one number for all layers")),
                }
            }
            value => value.as_u64(),
        };
        match number.and_then(|n| usize::try_from(n).ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, value, "a non-negative integer")),
        }
    }

    fn required_size(&self, suffix: &str) -> Result<usize, LoadError> {
        self.size(suffix)?.ok_or_else(|| self.missing(suffix))
    }

    fn float(&self, suffix: &str) -> Result<Option<f64>, LoadError> {
        let Some((key, value)) = self.find(suffix) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong(key, value, "a floating-point number"))
    }
}

fn wrong_value(file: &GgufFile, key: String, value: &Value, expected: &str) -> LoadError {
    LoadError::WrongValue {
        path: file.path().to_owned(),
        key,
        found: format!("{value} ({})", value.value_type()),
        expected: expected.to_owned(),
    }
}

fn config(
    file: &GgufFile,
    options: &OpenOptions,
    warnings: &mut Vec<String>,
) -> Result<ModelConfig, LoadError> {
    let path = || file.path().to_owned();
    let architecture = string(file, "general.architecture")?.ok_or_else(|| LoadError::MissingKey {
        path: path(),
        key: "general.architecture".into(),
        help: format!("; supported: {ARCHITECTURES_TEXT}"),
    })?;
    if !ARCHITECTURES.contains(&architecture.as_str()) {
        return Err(LoadError::Architecture {
            path: path(),
            found: architecture,
            supported: ARCHITECTURES_TEXT,
        });
    }
    if let Some(parts) = file.value("split.count").and_then(Value::as_u64).filter(|&n| n > 1) {
        return Err(LoadError::Unsupported {
            path: path(),
            what: "split.count".into(),
            found: parts.to_string(),
            supported: "a model in one file (llama-gguf-split --merge makes one)".into(),
        });
    }
    let keys = Keys { file, architecture: &architecture };

    let hidden_size = keys.required_size("embedding_length")?;
    let n_heads = keys.required_size("attention.head_count")?;
    let head_dim = match keys.size("attention.key_length")? {
        Some(key_length) => key_length,
        None if n_heads > 0 && hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => {
            return Err(LoadError::WrongValue {
                path: path(),
                key: format!("{architecture}.attention.head_count"),
                found: n_heads.to_string(),
                expected: format!("a divisor of the embedding length {hidden_size}"),
            });
        }
    };
    // Features that would change the result and that nothing here implements.
    for (suffix, expected) in
        [("attention.value_length", head_dim), ("rope.dimension_count", head_dim), ("expert_count", 0)]
    {
        if let Some(found) = keys.size(suffix)?.filter(|&found| found != expected) {
            return Err(LoadError::Unsupported {
                path: path(),
                what: format!("{architecture}.{suffix}"),
                found: found.to_string(),
                supported: format!("{expected}"),
            });
        }
    }
    if let Some((key, value)) = keys.find("rope.scaling.type").filter(|(_, v)| v.as_str() != Some("none")) {
        return Err(LoadError::Unsupported {
            path: path(),
            what: key,
            found: value.to_string(),
            supported: "none".into(),
        });
    }
    let rope_theta = match keys.float("rope.freq_base")? {
        Some(theta) => theta,
        None => {
            warnings.push(format!(
                "key `{architecture}.rope.freq_base` is missing; {DEFAULT_ROPE_THETA} is used, as \
                 llama.cpp does"
            ));
            DEFAULT_ROPE_THETA
        }
    };
    let vocab_size = vocabulary(&keys, warnings)?;
    let intermediate_size = keys.required_size("feed_forward_length")?;
    let n_layers = keys.required_size("block_count")?;

    let stated = ACTIVATION_KEYS.iter().find_map(|suffix| keys.find(suffix));
    let stated = match &stated {
        Some((key, value)) => Some((
            key.as_str(),
            value.as_str().ok_or_else(|| keys.wrong(key.clone(), value, "the name of an activation"))?,
        )),
        None => None,
    };
    let is_2b = (hidden_size, intermediate_size, n_layers, vocab_size) == (2560, 6912, 30, 128_256);
    let activation = choose_activation(file.path(), options, stated, warnings, || match &*architecture {
        "bitnet-b1.58" | "bitnet-25" => Ok(Activation::Relu2),
        _ if is_2b => Err(LoadError::UnknownActivation {
            path: path(),
            problem: format!(
                "architecture `{architecture}` usually means SiLU, but this is the shape of BitNet b1.58 \
                 2B-4T, which has squared ReLU, and no key `{architecture}.hidden_act` says which: pass \
                 --hidden-act relu2 or --hidden-act silu"
            ),
        }),
        _ => Ok(Activation::Silu),
    })?;

    // All layers have both norms or none has; check_tensors names the one that is missing or too many.
    let sub_norms = file.tensors().iter().any(|t| t.name.ends_with("_sub_norm.weight"));
    let mut config = ModelConfig {
        name: string(file, "general.name")?,
        hidden_size,
        intermediate_size,
        n_layers,
        n_heads,
        n_kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        vocab_size,
        context_length: keys.required_size("context_length")?,
        rope_theta,
        rms_norm_eps: keys
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon"))? as f32,
        activation,
        sub_norms,
        tied_embeddings: file.tensor("output.weight").is_none(),
        bos_token: token(file, "tokenizer.ggml.bos_token_id")?,
        eos_tokens: end_tokens(file)?,
        architecture,
    };
    crate::checkpoint::drop_foreign_tokens(&mut config, warnings);
    Ok(config)
}

/// The key, else the rows of the embedding (which the tokens should agree with).
fn vocabulary(keys: &Keys<'_>, warnings: &mut Vec<String>) -> Result<usize, LoadError> {
    let tokens =
        keys.file.value("tokenizer.ggml.tokens").and_then(Value::as_array).map(|tokens| tokens.len());
    let rows = keys.file.tensor("token_embd.weight").and_then(|t| usize::try_from(t.matrix().0).ok());
    let size = keys.size("vocab_size")?.or(rows).or(tokens).ok_or_else(|| keys.missing("vocab_size"))?;
    if let Some(tokens) = tokens.filter(|&tokens| tokens != size) {
        warnings.push(format!("the vocabulary is {size}, but `tokenizer.ggml.tokens` has {tokens} entries"));
    }
    Ok(size)
}

fn string(file: &GgufFile, key: &str) -> Result<Option<String>, LoadError> {
    match file.value(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(value) => Err(wrong_value(file, key.to_owned(), value, "a string")),
    }
}

/// A token's id; some writers put -1 for "none".
fn token(file: &GgufFile, key: &str) -> Result<Option<u32>, LoadError> {
    match file.value(key) {
        None | Some(Value::U32(u32::MAX) | Value::I32(-1) | Value::I64(-1)) => Ok(None),
        Some(value) => match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(wrong_value(file, key.to_owned(), value, "a token's id")),
        },
    }
}

/// `eos_token_id`, `eot_token_id`, and the control tokens whose texts say that they end a turn.
fn end_tokens(file: &GgufFile) -> Result<Vec<u32>, LoadError> {
    const CONTROL: i64 = 3;
    let stated = [token(file, "tokenizer.ggml.eos_token_id")?, token(file, "tokenizer.ggml.eot_token_id")?];
    let mut end: Vec<u32> = stated.into_iter().flatten().collect();
    let array = |key| file.value(key).and_then(Value::as_array);
    if let (Some(tokens), Some(types)) = (array("tokenizer.ggml.tokens"), array("tokenizer.ggml.token_type"))
    {
        let controls = tokens.strings().zip(types.iter()).enumerate().filter(|(_, (text, kind))| {
            text.starts_with('<') && END_TOKENS.contains(text) && kind.as_i64() == Some(CONTROL)
        });
        end.extend(controls.filter_map(|(id, _)| u32::try_from(id).ok()));
    }
    let mut seen = HashSet::new();
    end.retain(|id| seen.insert(*id));
    Ok(end)
}

const TOKENIZER_STRINGS: [&str; 3] =
    ["tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"];
const TOKENIZER_BOOLS: [&str; 4] = [
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.remove_extra_whitespaces",
];
const TOKENIZER_IDS: [&str; 6] = [
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.seperator_token_id",
];

/// Checks the types of the tokenizer's keys, so that [`tokenizer`] has nothing left to refuse.
fn check_tokenizer(file: &GgufFile) -> Result<(), LoadError> {
    for key in TOKENIZER_STRINGS {
        string(file, key)?;
    }
    for key in TOKENIZER_IDS {
        token(file, key)?;
    }
    for key in TOKENIZER_BOOLS {
        if let Some(value) = file.value(key).filter(|v| v.as_bool().is_none()) {
            return Err(wrong_value(file, key.to_owned(), value, "a bool"));
        }
    }
    let mut n_tokens = None;
    for (key, allowed, expected) in [
        ("tokenizer.ggml.tokens", &[ValueType::String][..], "an array of strings"),
        ("tokenizer.ggml.merges", &[ValueType::String], "an array of strings"),
        (
            "tokenizer.ggml.scores",
            &[ValueType::F32, ValueType::F64],
            "an array of floats, one for each token",
        ),
        (
            "tokenizer.ggml.token_type",
            &[ValueType::I32, ValueType::U32],
            "an array of i32, one for each token",
        ),
    ] {
        let Some(value) = file.value(key) else { continue };
        let array = value.as_array().filter(|a| allowed.contains(&a.element_type()));
        let len = array.map(|a| a.len());
        let per_token = key.ends_with("scores") || key.ends_with("token_type");
        if len.is_none() || (per_token && len != n_tokens) {
            return Err(wrong_value(file, key.to_owned(), value, expected));
        }
        if key.ends_with("tokens") {
            n_tokens = len;
        }
    }
    Ok(())
}

/// The tokenizer's keys; [`check_tokenizer`] has seen them.
fn tokenizer(file: &GgufFile, pre: Option<String>) -> GgufTokenizer {
    let text = |key| string(file, key).ok().flatten();
    let id = |key| token(file, key).ok().flatten();
    let flag = |key| file.value(key).and_then(Value::as_bool);
    let array = |key| file.value(key).and_then(Value::as_array);
    let strings = |key| array(key).map(|a| a.strings().map(str::to_owned).collect()).unwrap_or_default();
    let [model, file_pre, chat_template] = TOKENIZER_STRINGS.map(text);
    let [add_bos, add_eos, add_space_prefix, remove_extra_whitespaces] = TOKENIZER_BOOLS.map(flag);
    let [bos, eos, eot, unk, pad, sep] = TOKENIZER_IDS.map(id);
    let types = array("tokenizer.ggml.token_type").and_then(|a| a.to_i64()).unwrap_or_default();
    GgufTokenizer {
        path: file.path().to_owned(),
        model,
        pre: pre.or(file_pre),
        tokens: strings("tokenizer.ggml.tokens"),
        scores: array("tokenizer.ggml.scores").and_then(|a| a.to_f32()).unwrap_or_default(),
        // Out of range is as good as undefined, which is 0.
        token_types: types.into_iter().map(|t| i32::try_from(t).unwrap_or(0)).collect(),
        merges: strings("tokenizer.ggml.merges"),
        bos,
        eos,
        eot,
        unk,
        pad,
        sep,
        add_bos,
        add_eos,
        add_space_prefix,
        remove_extra_whitespaces,
        chat_template,
    }
}
