//! Flags that several subcommands share.

use std::borrow::Cow;
use std::ffi::OsString;
use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bitnet_burn::CacheType;
use bitnet_burn::GatedActivation;
use bitnet_burn_engine::chat::ChatTemplate;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::device::DeviceSpec;
use bitnet_burn_engine::load::{ActivationRule, HeadMode};
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_manager::{MAX_THREADS, Objective, Strict};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};

#[cfg(feature = "hub")]
use crate::hub::{self, HubName};

/// A model by its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Model {
    /// A GGUF file or a Hugging Face directory.
    Path(PathBuf),
    /// On the Hugging Face Hub, from where it is downloaded.
    #[cfg(feature = "hub")]
    Hub(HubName),
}

impl Model {
    /// For clap.
    pub fn parser() -> impl TypedValueParser<Value = Self> {
        OsStringValueParser::new().try_map(Self::parse)
    }

    /// From the text of an argument.
    pub fn parse(text: OsString) -> Result<Self, String> {
        match text.to_str().filter(|text| text.starts_with("hf:")) {
            #[cfg(feature = "hub")]
            Some(name) => name.parse().map(Self::Hub),
            #[cfg(not(feature = "hub"))]
            Some(_) => Err("this build downloads nothing (feature hub); give the path of a model".into()),
            None => Ok(Self::Path(text.into())),
        }
    }

    /// The path to open. What is missing of a model on the hub is downloaded.
    pub fn locate(&self) -> anyhow::Result<Cow<'_, Path>> {
        match self {
            Self::Path(path) => Ok(Cow::Borrowed(path)),
            #[cfg(feature = "hub")]
            Self::Hub(name) => Ok(Cow::Owned(hub::get(name)?)),
        }
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            #[cfg(feature = "hub")]
            Self::Hub(name) => name.fmt(f),
        }
    }
}

/// The model's files.
#[derive(Debug, Args)]
pub struct FileArgs {
    /// The model: a GGUF file, a directory with config.json and safetensors, or hf:OWNER/NAME or hf:OWNER/NAME:FILE.gguf for
    /// one of the Hugging Face Hub, which is downloaded once [default: the built-in story model]
    #[arg(long, short, value_name = "PATH", value_parser = Model::parser(), help_heading = "Model")]
    pub model: Option<Model>,
    #[command(flatten)]
    pub gaps: GapArgs,
}

/// What a model's files leave out.
#[derive(Clone, Debug, Default, Args)]
pub struct GapArgs {
    /// The feed-forward activation, for files that don't name it: relu2, silu, gelu or gelu_pytorch_tanh
    #[arg(long, value_name = "NAME", value_parser = activation, help_heading = "Model")]
    pub hidden_act: Option<GatedActivation>,
    /// The pre-tokenizer, for GGUF files that don't name it (llama-bpe, gpt-2, qwen2 ...)
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub pre: Option<String>,
}

impl GapArgs {
    /// The flags as options for opening a checkpoint.
    pub fn options(&self) -> OpenOptions {
        OpenOptions { hidden_act: self.hidden_act, pre: self.pre.clone() }
    }
}

impl FileArgs {
    /// Opens the files and logs their warnings.
    pub fn open(&self) -> anyhow::Result<Checkpoint> {
        match &self.model {
            Some(model) => Ok(Checkpoint::open(&model.locate()?, &self.gaps.options())?),
            #[cfg(feature = "default-model")]
            None => Ok(bitnet_burn_engine::embedded::checkpoint()?),
            #[cfg(not(feature = "default-model"))]
            None => bail!("--model is missing, and this build has no built-in model (feature default-model)"),
        }
    }
}

/// The number of threads.
#[derive(Clone, Debug, Args)]
pub struct ThreadArgs {
    /// Number of threads that run the kernels [default: one per physical core]
    #[arg(long, short, value_name = "N", value_parser = threads, help_heading = "Kernels")]
    pub threads: Option<usize>,
}

/// The choice of kernels.
#[derive(Clone, Debug, Args)]
pub struct KernelArgs {
    #[command(flatten)]
    pub threads: ThreadArgs,
    /// Pin each kernel thread to a core of its own, and leave the first core to the main thread (Linux, Windows,
    /// FreeBSD)
    #[arg(long, help_heading = "Kernels")]
    pub pin: bool,
    /// Use only this kernel: `plugin/kernel` or `kernel` (see `bitnet kernels`); or only the kernels of a `plugin`
    #[arg(long, value_name = "NAME", help_heading = "Kernels")]
    pub kernel: Option<String>,
    /// Load a kernel plugin, or all plugins of a directory. This runs their code. Can be repeated
    #[arg(long = "plugin", value_name = "PATH", help_heading = "Kernels")]
    pub plugins: Vec<PathBuf>,
    /// What the layout of weights is chosen for: `decode` (one token after the other), `prefill` (prompts), `throughput` (many
    /// requests at once), or `balanced`. `bitnet kernels --explain` shows the rule [default: balanced]
    #[arg(long, value_name = "GOAL", help_heading = "Kernels")]
    pub optimise_for: Option<Objective>,
    /// Turn silent fallbacks into errors: all of them, or a list of no-fallback, quantised-kernels,
    /// gated-plugins and plausible-figures, separated by commas
    #[arg(
        long,
        value_name = "NAMES",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        help_heading = "Kernels"
    )]
    pub strict: Option<Strict>,
}

/// The model, and how it is loaded.
#[derive(Debug, Args)]
pub struct EngineArgs {
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub load: LoadArgs,
}

/// The kernels, the device and the context.
#[derive(Clone, Debug, Args)]
pub struct LoadArgs {
    #[command(flatten)]
    pub kernels: KernelArgs,
    /// The device that computes: flex (the CPU), ndarray, wgpu, metal, cuda or rocm, if the cargo feature of that name is
    /// compiled in; remote:HOST:PORT for the device of a `bitnet worker`; auto for the choice of `bitnet plan`; or
    /// several devices with their numbers of layers, such as wgpu:0=12,flex [default: the CPU]
    #[arg(long, value_name = "DEVICE", help_heading = "Kernels")]
    pub device: Option<DeviceSpec>,
    #[command(flatten)]
    pub secret: SecretArgs,
    /// A LoRA adapter, which is added to the model's projections: a directory as PEFT writes it, or a run of `bitnet train
    /// --lora`
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub adapter: Option<PathBuf>,
    /// Number of layers on the GPU; the others are on the CPU. With all layers, the embedding and the output projection
    /// are on the GPU, too
    #[arg(long, value_name = "N", help_heading = "Kernels")]
    pub gpu_layers: Option<usize>,
    /// Positions (tokens) of the KV cache [default: the length that the model was trained for]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Model")]
    pub context: Option<usize>,
    /// Type of the keys and values in the KV cache [default: f32; with --device auto, the most exact type that fits]
    #[arg(long, value_enum, help_heading = "Model")]
    pub kv_cache: Option<KvCacheType>,
    /// How the output projection (lm_head) is computed
    #[arg(long, value_enum, value_name = "MODE", default_value_t = LmHead::File, help_heading = "Model")]
    pub lm_head: LmHead,
    /// How the activations of ternary layers are quantised: model (as the model's files declare: by row; or group:32, where
    /// they declare nothing), row, group:N (int8 with a scale for each row, or for each N values), or float (not at all: to
    /// compare with floating-point references, slow)
    #[arg(long, value_name = "RULE", default_value_t = ActivationRule::Model, help_heading = "Model")]
    pub activations: ActivationRule,
    /// Ignore the file that `bitnet prepack` wrote, and pack the weights while loading
    #[arg(long, help_heading = "Kernels")]
    pub no_prepacked: bool,
}

/// Tokens that are guessed ahead and checked.
#[derive(Clone, Debug, Args)]
pub struct DraftArgs {
    /// A smaller model with the same tokenizer, which guesses tokens ahead: the model checks several in one forward pass.
    /// This changes no token, and is done where it is measured to pay. On the CPU
    #[arg(long, value_name = "PATH", value_parser = Model::parser(), help_heading = "Model")]
    pub draft_model: Option<Model>,
    /// Tokens that are guessed ahead at most, from the text so far and by --draft-model; 0 for none. They change no answer
    /// [default: 8 with --draft-model and in `serve`, or else 0]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub draft: Option<usize>,
}

/// A receipt of what a command did.
#[derive(Debug, Args)]
pub struct ReceiptArgs {
    /// Write a receipt for `bitnet receipt check`: the model, the machine, kernels and plugins with their hashes, the
    /// settings, the prompt and the report. Reads the model's files a second time
    #[arg(long, value_name = "FILE")]
    pub receipt: Option<PathBuf>,
}

/// The secret of workers and their clients.
#[derive(Clone, Debug, Default, Args)]
pub struct SecretArgs {
    /// The file with the secret that a `bitnet worker` and its clients share; only its owner may read it
    #[arg(long, value_name = "FILE", help_heading = "Kernels")]
    pub secret_file: Option<PathBuf>,
}

/// Types of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvCacheType {
    /// 4 bytes per value: exactly as computed
    F32,
    /// 2 bytes per value: half of f32's memory
    F16,
    /// 1 byte per value, and a scale for each position and head: a quarter of f32's memory
    Int8,
}

/// Types of embeddings and output heads.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[allow(non_camel_case_types, reason = "the names are the formats'")]
pub enum DenseType {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q6_k")]
    Q6_K,
    #[value(name = "q4_0")]
    Q4_0,
}

impl From<DenseType> for DenseFormat {
    fn from(kind: DenseType) -> Self {
        match kind {
            DenseType::F32 => Self::F32,
            DenseType::F16 => Self::F16,
            DenseType::Bf16 => Self::BF16,
            DenseType::Q8_0 => Self::Q8_0,
            DenseType::Q6_K => Self::Q6_K,
            DenseType::Q4_0 => Self::Q4_0,
        }
    }
}

/// Ways to compute the output projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(non_camel_case_types, reason = "the names are the field's")]
pub enum LmHead {
    /// Weights as stored, f32 activations. Use this to compare results
    File,
    /// Weights as stored, int8 activations. Changes logits by about 1 % of their spread, so close decisions between tokens
    /// can change. For Q8_0, Q6_K and Q4_0 weights; faster for the last two
    Int8,
    /// A Q8_0 copy of the weights, made while loading, with int8 activations. For files with an F16 or F32 head
    #[value(name = "q8_0")]
    Q8_0,
    /// The same with a Q6_K copy: smaller, faster and less exact
    #[value(name = "q6_k")]
    Q6_K,
    /// The same with a Q4_0 copy: the fastest and the least exact
    #[value(name = "q4_0")]
    Q4_0,
    /// An F32 copy of the weights, with f32 activations
    F32,
    /// An F16 copy of the weights, with f32 activations. Keeps 11 significant bits
    F16,
    /// A BF16 copy of the weights, with f32 activations. Keeps 8 significant bits and F32's range
    Bf16,
}

impl From<LmHead> for HeadMode {
    fn from(mode: LmHead) -> Self {
        match mode {
            LmHead::File => Self::File,
            LmHead::Int8 => Self::Int8,
            LmHead::Q8_0 => Self::Requantised(DenseFormat::Q8_0),
            LmHead::Q6_K => Self::Requantised(DenseFormat::Q6_K),
            LmHead::Q4_0 => Self::Requantised(DenseFormat::Q4_0),
            LmHead::F32 => Self::Requantised(DenseFormat::F32),
            LmHead::F16 => Self::Requantised(DenseFormat::F16),
            LmHead::Bf16 => Self::Requantised(DenseFormat::BF16),
        }
    }
}

impl TryFrom<HeadMode> for LmHead {
    type Error = anyhow::Error;

    fn try_from(mode: HeadMode) -> anyhow::Result<Self> {
        Ok(match mode {
            HeadMode::File => Self::File,
            HeadMode::Int8 => Self::Int8,
            HeadMode::Requantised(DenseFormat::Q8_0) => Self::Q8_0,
            HeadMode::Requantised(DenseFormat::Q6_K) => Self::Q6_K,
            HeadMode::Requantised(DenseFormat::Q4_0) => Self::Q4_0,
            HeadMode::Requantised(DenseFormat::F32) => Self::F32,
            HeadMode::Requantised(DenseFormat::F16) => Self::F16,
            HeadMode::Requantised(DenseFormat::BF16) => Self::Bf16,
            HeadMode::Requantised(other) => {
                anyhow::bail!("the output projection can't be copied as {} here", other.name())
            }
        })
    }
}

impl From<CacheType> for KvCacheType {
    fn from(kind: CacheType) -> Self {
        match kind {
            CacheType::F32 => Self::F32,
            CacheType::F16 => Self::F16,
            CacheType::Int8 => Self::Int8,
        }
    }
}

impl From<KvCacheType> for CacheType {
    fn from(kind: KvCacheType) -> Self {
        match kind {
            KvCacheType::F32 => Self::F32,
            KvCacheType::F16 => Self::F16,
            KvCacheType::Int8 => Self::Int8,
        }
    }
}

pub fn activation(name: &str) -> Result<GatedActivation, String> {
    GatedActivation::from_name(name)
        .ok_or_else(|| "possible values: relu2, silu, gelu, gelu_pytorch_tanh".into())
}

/// A number of at least 1.
pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(n) => Ok(n),
        Err(error) => Err(format!("{error}")),
    }
}

fn threads(text: &str) -> Result<usize, String> {
    let at_most = || format!("it must be at most {MAX_THREADS}");
    positive(text).and_then(|n| if n <= MAX_THREADS { Ok(n) } else { Err(at_most()) })
}

/// Parses a number of bytes: `1500000000`, `1.5GB`, `2GiB`.
pub fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        unit => {
            return Err(format!("{unit} is not a unit of size; possible are kB, MB, GB, KiB, MiB and GiB"));
        }
    };
    let number: f64 = number.parse().map_err(|_| "a size is a number with a unit, such as 3GB".to_owned())?;
    let bytes = number * factor as f64;
    if (1.0..1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err("it must be at least 1 byte, and below 1e18 bytes".into())
    }
}

/// Reads the text in a file, or in stdin for `-`.
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text).context("cannot read text from stdin")?;
        return Ok(text);
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {} as text", path.display()))
}

/// Reads a chat template from a file.
pub fn read_template(path: &Path) -> anyhow::Result<ChatTemplate> {
    let source = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(ChatTemplate::named(path.display().to_string(), &source)?)
}

/// Reads token ids from a file. They are separated by commas or white space.
pub fn read_tokens(path: &Path, vocabulary: usize) -> anyhow::Result<Vec<u32>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = std::str::from_utf8(&bytes)
        .ok()
        .with_context(|| format!("{}: the file is not text; expected token ids", path.display()))?;
    let tokens = parse_tokens(text, vocabulary).with_context(|| path.display().to_string())?;
    if tokens.is_empty() {
        bail!("{}: the file has no token ids", path.display());
    }
    Ok(tokens)
}

/// Parses token ids, separated by commas or white space.
pub fn parse_tokens(text: &str, vocabulary: usize) -> anyhow::Result<Vec<u32>> {
    let separated = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|part| !part.is_empty());
    let id = |(i, part): (usize, &str)| match part.parse::<u32>() {
        Ok(id) if (id as usize) < vocabulary => Ok(id),
        Ok(id) => bail!("entry {}: token {id} is not in the model's vocabulary of {vocabulary}", i + 1),
        Err(_) => {
            let shown: String = part.chars().take(40).collect();
            bail!("entry {}: {shown:?} is not a token id; ids are separated by commas or white space", i + 1)
        }
    };
    separated.enumerate().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_ids_are_separated_by_commas_or_white_space() {
        assert_eq!(parse_tokens("1,2, 3\n4\t5,,\n", 6).unwrap(), [1, 2, 3, 4, 5]);
        assert!(parse_tokens("", 6).unwrap().is_empty());
        let error = |text: &str| parse_tokens(text, 6).unwrap_err().to_string();
        assert!(error("1 x").starts_with("entry 2: \"x\" is not a token id"));
        assert!(error("1 6").starts_with("entry 2: token 6 is not in the model's vocabulary of 6"));
        assert!(error("-1").contains("is not a token id"));
        assert!(error("1 4294967296").contains("is not a token id"));
    }
}
