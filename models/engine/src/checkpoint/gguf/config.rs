//! A model's configuration, from the keys of a GGUF file.

use super::super::choices::{choose_activation, drop_foreign_tokens};
use super::super::error::LoadError;
use super::super::source::OpenOptions;
use super::super::tokenizer_source::end_of_generation;
use super::delta_net::delta_net;
use super::experts::{experts, has_experts, swiglu_clamp, windows};
use super::foreign::foreign_parts;
use super::keys::{string, token, wrong_value};
use super::names::{LLAMA, MAPLE, MINICPM, QWEN2, QWEN2MOE, QWEN3, QWEN3MOE, QWEN35, norm_name};
use super::rope::scaling;
use bitnet_burn::{DecoderOptions, GatedActivation, ModelConfig, Norm, Projection};
use bitnet_burn_formats::FileError;
use bitnet_burn_formats::gguf::{GgufFile, Value};
use std::collections::HashSet;
use std::path::Path;

/// The architectures that are read.
const ARCHITECTURES: [&str; 11] =
    ["bitnet-b1.58", "bitnet-25", "bitnet", LLAMA, MAPLE, MINICPM, QWEN2, QWEN2MOE, QWEN3, QWEN35, QWEN3MOE];
const ARCHITECTURES_TEXT: &str =
    "bitnet-b1.58, bitnet-25, bitnet, llama, maple, minicpm, qwen2, qwen2moe, qwen3, qwen35, qwen3moe";
/// Keys are looked up under these names too.
const PREFIXES: [&str; 3] = ["bitnet", "bitnet-b1.58", "bitnet-25"];
/// Keys that state the activation; llama.cpp defines none for BitNet, converters have their own.
const ACTIVATION_KEYS: [&str; 3] = ["hidden_act", "feed_forward.activation", "hidden_activation"];
/// llama.cpp's, for a file without `rope.freq_base`.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// The keys of a file, under its architecture's name or another of BitNet's.
pub(super) struct Keys<'a> {
    pub(super) file: &'a GgufFile,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    pub(super) fn find(&self, suffix: &str) -> Option<(String, &'a Value)> {
        std::iter::once(self.architecture).chain(PREFIXES).find_map(|prefix| {
            let key = format!("{prefix}.{suffix}");
            self.file.value(&key).map(|value| (key, value))
        })
    }

    pub(super) fn unsupported(&self, key: String, value: &Value, supported: &str) -> LoadError {
        let (path, found) = (self.file.path().to_owned(), value.to_string());
        LoadError::Unsupported { path, what: key, found, supported: supported.to_owned() }
    }

    pub(super) fn wrong(&self, key: String, value: &Value, expected: &str) -> LoadError {
        wrong_value(self.file, key, value, expected)
    }

    pub(super) fn missing(&self, suffix: &str) -> LoadError {
        let others: Vec<_> =
            PREFIXES.iter().filter(|&&p| p != self.architecture).map(|p| format!("{p}.{suffix}")).collect();
        LoadError::MissingKey {
            path: self.file.path().to_owned(),
            key: format!("{}.{suffix}", self.architecture),
            help: format!("; {} would do as well", others.join(" or ")),
        }
    }

    /// A size. An array with a number for each layer will do if all are equal.
    pub(super) fn size(&self, suffix: &str) -> Result<Option<usize>, LoadError> {
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

    pub(super) fn required_size(&self, suffix: &str) -> Result<usize, LoadError> {
        self.size(suffix)?.ok_or_else(|| self.missing(suffix))
    }

    pub(super) fn float(&self, suffix: &str) -> Result<Option<f64>, LoadError> {
        let Some((key, value)) = self.find(suffix) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong(key, value, "a floating-point number"))
    }
}

/// An architecture that is not read; `lacks` says what it has that the others have not.
fn check_architecture(
    path: &Path,
    architecture: &str,
    lacks: impl FnOnce() -> String,
) -> Result<(), LoadError> {
    if ARCHITECTURES.contains(&architecture) {
        return Ok(());
    }
    let (path, found) = (path.to_owned(), architecture.to_owned());
    Err(LoadError::Architecture { path, found, supported: ARCHITECTURES_TEXT, lacks: lacks() })
}

/// The error that matters where a file could not be parsed: tensors of a type that is not read are to be
/// expected in a file of an architecture that is not read.
pub(crate) fn what_matters(error: FileError) -> LoadError {
    if let FileError::UnknownTensorType { path, architecture: Some(architecture), .. } = &error
        && let Err(error) = check_architecture(path, architecture, String::new)
    {
        return error;
    }
    error.into()
}

/// The configuration that the keys state.
pub(super) fn config(
    file: &GgufFile,
    options: &OpenOptions,
    warnings: &mut Vec<String>,
) -> Result<ModelConfig, LoadError> {
    let path = || file.path().to_owned();
    let architecture = string(file, "general.architecture")?;
    if let Some(architecture) = &architecture {
        check_architecture(file.path(), architecture, || foreign_parts(file, architecture))?;
    }
    let architecture = architecture.ok_or_else(|| LoadError::MissingKey {
        path: path(),
        key: "general.architecture".into(),
        help: format!("; supported: {ARCHITECTURES_TEXT}"),
    })?;
    let keys = Keys { file, architecture: &architecture };

    let hidden_size = keys.required_size("embedding_length")?;
    let n_heads = keys.required_size("attention.head_count")?;
    let head_dim = match keys.size("attention.key_length")? {
        Some(key_length) => key_length,
        None if n_heads > 0 && hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => {
            return Err(FileError::WrongValue {
                path: path(),
                key: format!("{architecture}.attention.head_count"),
                found: n_heads.to_string(),
                expected: format!("a divisor of the embedding length {hidden_size}"),
            }
            .into());
        }
    };
    // Features that would change the result and that nothing here implements.
    for (suffix, expected) in
        [("attention.value_length", head_dim), ("rope.dimension_count", head_dim), ("expert_count", 0)]
    {
        if suffix == "expert_count" && has_experts(&architecture) {
            continue;
        }
        if suffix == "rope.dimension_count" && architecture == QWEN35 {
            continue;
        }
        if let Some(found) = keys.size(suffix)?.filter(|&found| found != expected) {
            return Err(LoadError::Unsupported {
                path: path(),
                what: format!("{architecture}.{suffix}"),
                found: found.to_string(),
                supported: format!("{expected}"),
            });
        }
    }
    if let Some((key, value)) =
        keys.find("attention.causal").filter(|(_, value)| value.as_bool() != Some(true))
    {
        return Err(keys.unsupported(key, value, "true: a token sees those before it"));
    }
    // Of Maple, only layers with windows turn.
    let of_windows = if architecture == MAPLE { keys.float("rope.freq_base_swa")? } else { None };
    let rope_theta = match of_windows.or(keys.float("rope.freq_base")?) {
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
    let n_layers = keys.required_size("block_count")?;
    let intermediate_size = keys.size("feed_forward_length")?;
    let experts = experts(&keys, &architecture, intermediate_size)?;
    let of_experts = experts.as_ref().map(|experts| experts.intermediate_size);
    let intermediate_size =
        intermediate_size.or(of_experts).ok_or_else(|| keys.missing("feed_forward_length"))?;

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
        "bitnet-b1.58" | "bitnet-25" => Ok(GatedActivation::Relu2),
        _ if is_2b => Err(LoadError::UnknownActivation {
            path: path(),
            problem: format!(
                "architecture `{architecture}` usually means SiLU, but this is the shape of BitNet b1.58 \
                 2B-4T, which has squared ReLU, and no key `{architecture}.hidden_act` says which: pass \
                 --hidden-act relu2 or --hidden-act silu"
            ),
        }),
        _ => Ok(GatedActivation::Silu),
    })?;

    // All layers have both norms or none has; check_tensors names the one that is missing or too many.
    let sub_norms = file.tensors().iter().any(|t| t.name.ends_with("_sub_norm.weight"));
    let context_length = keys.required_size("context_length")?;
    // Windows that hold the whole context change nothing.
    let windows = windows(&keys, &architecture, n_layers)?;
    let stated = if windows.is_none() { keys.size("attention.sliding_window")? } else { None };
    if let Some(window) = stated.filter(|&w| w != 0 && w < context_length) {
        return Err(LoadError::Unsupported {
            path: path(),
            what: format!("{architecture}.attention.sliding_window"),
            found: window.to_string(),
            supported: format!("0, and windows of at least the context of {context_length}"),
        });
    }
    let has = |name: &str| file.tensor(name).is_some();
    // Of gated DeltaNets, the first layers have no attention.
    let has_bias =
        |part: &str| (0..n_layers.min(1 << 16)).any(|layer| has(&format!("blk.{layer}.{part}.bias")));
    let biased = !architecture.starts_with("bitnet");
    let mut options = DecoderOptions {
        qk_norms: matches!(&*architecture, QWEN3 | QWEN35 | QWEN3MOE | MAPLE),
        projection_norms: has(&norm_name(Norm::Input(0, Projection::Q))),
        qkv_bias: architecture == QWEN2 || biased && has_bias("attn_q"),
        output_bias: biased && has_bias("attn_output"),
        rope_scaling: scaling(&keys, context_length, warnings)?,
        experts,
        windows,
        delta_net: delta_net(&keys, &architecture, n_layers)?,
        attention_gate: architecture == QWEN35,
        rope_dim: match &*architecture {
            QWEN35 => keys.size("rope.dimension_count")?.filter(|&dim| dim != head_dim),
            _ => None,
        },
        swiglu_clamp: swiglu_clamp(&keys, &architecture, n_layers)?,
        ..DecoderOptions::default()
    };
    if architecture == MINICPM {
        scales_of_minicpm(&keys, (n_layers, hidden_size), &mut options, warnings)?;
    }
    let mut config = ModelConfig {
        options,
        name: string(file, "general.name")?,
        hidden_size,
        intermediate_size,
        n_layers,
        n_heads,
        n_kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        vocab_size,
        context_length,
        rope_theta,
        rms_norm_eps: keys
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon"))? as f32,
        activation,
        sub_norms,
        tied_embeddings: file.tensor("output.weight").is_none() && architecture != MAPLE,
        bos_token: token(file, "tokenizer.ggml.bos_token_id")?,
        eos_tokens: end_tokens(file)?,
        architecture,
    };
    drop_foreign_tokens(&mut config, warnings);
    Ok(config)
}

/// MiniCPM's factors; MiniCPM's own, where the file has none.
fn scales_of_minicpm(
    keys: &Keys<'_>,
    (n_layers, hidden_size): (usize, usize),
    options: &mut DecoderOptions,
    warnings: &mut Vec<String>,
) -> Result<(), LoadError> {
    let DecoderOptions { embedding_scale, residual_scale, logit_divisor, .. } = options;
    for (key, value, default) in [
        ("embedding_scale", embedding_scale, 12.0),
        ("residual_scale", residual_scale, 1.4 / (n_layers as f64).sqrt()),
        ("logit_scale", logit_divisor, hidden_size as f64 / 256.0),
    ] {
        *value = match keys.float(key)? {
            Some(stated) => stated as f32,
            None => {
                warnings.push(format!("key `{MINICPM}.{key}` is missing; {default} is used, as in MiniCPM"));
                default as f32
            }
        };
    }
    Ok(())
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

/// `eos_token_id`, `eot_token_id`, and the tokens whose texts say that they end a turn, in that order.
fn end_tokens(file: &GgufFile) -> Result<Vec<u32>, LoadError> {
    let stated = [token(file, "tokenizer.ggml.eos_token_id")?, token(file, "tokenizer.ggml.eot_token_id")?];
    let mut end: Vec<u32> = stated.into_iter().flatten().collect();
    if let Some(tokens) = file.value("tokenizer.ggml.tokens").and_then(Value::as_array) {
        let by_text = (0u32..).zip(tokens.strings());
        let by_text = by_text.filter_map(|(id, text)| Some((end_of_generation(text)?, id)));
        let mut by_text: Vec<_> = by_text.collect();
        by_text.sort_unstable();
        end.extend(by_text.into_iter().map(|(_, id)| id));
    }
    let mut seen = HashSet::new();
    end.retain(|id| seen.insert(*id));
    Ok(end)
}
