//! Flags that several subcommands share.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, anyhow, bail};
use bitnet_burn::Activation;
use bitnet_burn::CacheType;
use bitnet_burn::backends::devices;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::load::HeadMode;
use bitnet_burn_engine::plan::{CPU, MachineProfile, Placement};
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_manager::Strict;
use burn::tensor::Device;
use clap::{Args, ValueEnum};

/// The model's files.
#[derive(Debug, Args)]
pub struct FileArgs {
    /// The model: a GGUF file, or a directory with config.json and safetensors [default: the built-in story
    /// model]
    #[arg(long, short, value_name = "PATH", help_heading = "Model")]
    pub model: Option<PathBuf>,
    /// The feed-forward activation, for files that don't name it: relu2 or silu
    #[arg(long, value_name = "NAME", value_parser = activation, help_heading = "Model")]
    pub hidden_act: Option<Activation>,
    /// The pre-tokenizer, for GGUF files that don't name it (llama-bpe, gpt-2, qwen2 ...)
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub pre: Option<String>,
}

impl FileArgs {
    /// Opens the files and logs their warnings.
    pub fn open(&self) -> anyhow::Result<Checkpoint> {
        let options = OpenOptions { hidden_act: self.hidden_act, pre: self.pre.clone() };
        match &self.model {
            Some(path) => Ok(Checkpoint::open(path, &options)?),
            #[cfg(feature = "default-model")]
            None => Ok(bitnet_burn_engine::embedded::checkpoint()?),
            #[cfg(not(feature = "default-model"))]
            None => bail!("--model is missing, and this build has no built-in model (feature default-model)"),
        }
    }
}

/// The number of threads.
#[derive(Debug, Args)]
pub struct ThreadArgs {
    /// Number of threads that run the kernels [default: one per physical core]
    #[arg(long, short, value_name = "N", value_parser = threads, help_heading = "Kernels")]
    pub threads: Option<usize>,
}

/// The choice of kernels.
#[derive(Debug, Args)]
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

/// The model, the kernels, the device and the context.
#[derive(Debug, Args)]
pub struct EngineArgs {
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub kernels: KernelArgs,
    /// The device that computes: flex (the CPU), ndarray, wgpu, metal, cuda or rocm, if the cargo feature of that name is
    /// compiled in; remote:HOST:PORT for the device of a `bitnet worker`; auto for the choice of `bitnet plan`; or
    /// several devices with their numbers of layers, such as wgpu:0=12,flex [default: the CPU]
    #[arg(long, value_name = "DEVICE", help_heading = "Kernels")]
    pub device: Option<DeviceArg>,
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
    /// Ignore the file that `bitnet prepack` wrote, and pack the weights while loading
    #[arg(long, help_heading = "Kernels")]
    pub no_prepacked: bool,
    /// Write a receipt for `bitnet receipt check`: the model, the machine, kernels and plugins with their hashes, the
    /// settings, the prompt and the report. Reads the model's files a second time
    #[arg(long, value_name = "FILE")]
    pub receipt: Option<PathBuf>,
}

impl EngineArgs {
    /// The requested context, or the model's, at most `default`.
    pub fn context(&self, checkpoint: &Checkpoint, default: usize) -> anyhow::Result<usize> {
        let trained = checkpoint.config().context_length;
        match self.context {
            None => Ok(trained.min(default)),
            Some(context) if context <= trained => Ok(context),
            Some(context) => bail!("--context {context}: the model was trained for {trained} positions"),
        }
    }
}

/// The value of `--device`. Reports and receipts name devices the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceArg {
    /// The choice of a plan.
    Auto,
    /// Devices in the order of the layers, with their numbers of layers. One device can be without a number and takes the
    /// remaining layers. The embedding and the output projection are on the last device.
    On(Vec<(DeviceName, Option<usize>)>),
}

impl DeviceArg {
    /// One device for everything.
    pub fn one(kind: DeviceKind) -> Self {
        Self::On(vec![(kind.into(), None)])
    }

    /// The placement, with the names that plans use for devices.
    pub fn placement(&self, layers: usize) -> anyhow::Result<Option<Placement>> {
        let Self::On(parts) = self else { return Ok(None) };
        let given: usize = parts.iter().filter_map(|(_, count)| *count).fold(0, usize::saturating_add);
        let open = parts.iter().any(|(_, count)| count.is_none());
        if given > layers || given < layers && !open {
            bail!("--device {self}: this places {given} layers, and the model has {layers}");
        }
        let counted = parts.iter().map(|(name, count)| (name.in_plans(), count.unwrap_or(layers - given)));
        let last = parts.last().map_or_else(|| CPU.to_owned(), |(name, _)| name.in_plans());
        Ok(Some(Placement::over(counted, &last)))
    }

    /// The host device that was named, if there is one.
    pub fn host(&self) -> Option<DeviceKind> {
        let Self::On(parts) = self else { return None };
        parts.iter().map(|(name, _)| name.kind).find(|kind| kind.is_host())
    }

    /// Replaces GPUs without a number by the one that plans would choose, if this machine's GPUs are known.
    pub fn resolved(self, machine: &MachineProfile) -> anyhow::Result<Self> {
        let Self::On(mut parts) = self else { return Ok(self) };
        // This variable chooses wgpu's default GPU itself.
        let chosen = std::env::var_os("CUBECL_WGPU_DEFAULT_DEVICE").is_some();
        let open = |name: &DeviceName| match name.kind {
            DeviceKind::Wgpu => name.index.is_none() && !chosen,
            DeviceKind::Remote => false,
            kind => name.index.is_none() && !kind.is_host(),
        };
        for (name, _) in parts.iter_mut().filter(|(name, _)| open(name)) {
            if let Some(gpu) = machine.gpu(Some(name.kind.name())) {
                *name = gpu.device.parse().map_err(anyhow::Error::msg)?;
            }
        }
        // Parse again, to find a GPU that is named twice: with and without its number.
        Self::On(parts).to_string().parse().map_err(|problem| anyhow!("--device: {problem}"))
    }

    /// The value of `--device` for a placement. The CPU is named by `host`, or by the default host device.
    pub fn of(placement: &Placement, host: Option<DeviceKind>) -> anyhow::Result<Self> {
        let name = |device: &str| match (device, host) {
            (CPU, Some(kind)) => Ok(kind.into()),
            (device, _) => device.parse::<DeviceName>().map_err(anyhow::Error::msg),
        };
        if placement.devices().count() == 1 {
            return Ok(Self::On(vec![(name(&placement.dense)?, None)]));
        }
        let mut parts: Vec<_> = (placement.stages.iter())
            .map(|stage| Ok((name(&stage.device)?, Some(stage.layers.len()))))
            .collect::<anyhow::Result<_>>()?;
        if placement.stages.last().is_none_or(|stage| stage.device != placement.dense) {
            parts.push((name(&placement.dense)?, Some(0)));
        }
        Ok(Self::On(parts))
    }
}

impl fmt::Display for DeviceArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::On(parts) = self else { return f.write_str("auto") };
        for (i, (name, count)) in parts.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{name}")?;
            if let Some(count) = count {
                write!(f, "={count}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let part = |part: &str| {
            let (name, count) = match part.split_once('=') {
                Some((name, count)) => {
                    let layers = count.parse::<usize>().ok().filter(|&layers| layers < 1 << 20);
                    (name, Some(layers.ok_or_else(|| format!("{count:?} is not a number of layers"))?))
                }
                None => (part, None),
            };
            let name = name.parse::<DeviceName>().map_err(|problem| {
                match problem.contains("possible are flex") {
                    true if part == text => problem.replace("possible are flex", "possible are auto, flex"),
                    _ => problem,
                }
            })?;
            Ok((name, count))
        };
        let parts = text.split(',').map(part).collect::<Result<Vec<_>, String>>()?;
        if parts.iter().filter(|(_, count)| count.is_none()).count() > 1 {
            return Err(
                "only one device can be without a number of layers, such as flex in wgpu:0=12,flex".into()
            );
        }
        for (i, (name, _)) in parts.iter().enumerate() {
            let host = |name: &DeviceName| name.kind.is_host();
            if parts[..i].iter().any(|(other, _)| other == name || host(other) && host(name)) {
                return Err(format!("{name} is named twice"));
            }
        }
        Ok(Self::On(parts))
    }
}

/// The name of a device: `flex`, `wgpu` (the default GPU), `wgpu:1`, `remote:127.0.0.1:7158`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceName {
    pub kind: DeviceKind,
    /// The number of a GPU among those of its runtime.
    pub index: Option<usize>,
    /// The address of a worker, for remote devices.
    pub address: Option<String>,
}

impl From<DeviceKind> for DeviceName {
    fn from(kind: DeviceKind) -> Self {
        Self { kind, index: None, address: None }
    }
}

impl DeviceName {
    /// Its name in plans.
    fn in_plans(&self) -> String {
        if self.kind.is_host() { CPU.to_owned() } else { self.to_string() }
    }

    /// Opens the device, if it is compiled in and this machine has it.
    pub fn open(&self) -> anyhow::Result<Device> {
        match (self.index, &self.address) {
            (None, None) => self.kind.open(),
            _ => {
                self.kind.compiled_in()?;
                devices::open(&self.to_string()).map_err(|problem| match self.address {
                    // The message begins with the worker's name.
                    Some(_) => anyhow!("--device {problem}"),
                    None => anyhow!("--device {self}: {problem}"),
                })
            }
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        if let Some(address) = &self.address {
            write!(f, ":{address}")?;
        }
        self.index.map_or(Ok(()), |index| write!(f, ":{index}"))
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == DeviceKind::Remote.name() || text.starts_with(devices::REMOTE) {
            let address = text.strip_prefix(devices::REMOTE).unwrap_or_default();
            let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
            if port.and_then(|port| port.parse::<u16>().ok()).is_none_or(|port| port == 0) {
                return Err(format!(
                    "{text}: the name of a worker has its address, such as remote:127.0.0.1:7158"
                ));
            }
            return Ok(Self { address: Some(address.to_owned()), ..DeviceKind::Remote.into() });
        }
        let (kind, index) = match text.split_once(':') {
            Some((kind, index)) => (kind, Some(index)),
            None => (text, None),
        };
        let kind = match kind {
            CPU => DeviceKind::host()?,
            kind => DeviceKind::from_str(kind, false).map_err(|_| {
                format!(
                    "there is no device {kind:?}; possible are flex, ndarray, wgpu, metal, cuda, rocm and remote:HOST:PORT"
                )
            })?,
        };
        let number =
            |index: &str| index.parse().map_err(|_| format!("{index:?} is not the number of a device"));
        let index = index.map(number).transpose()?;
        if kind.is_host() && index.is_some() {
            return Err(format!("{text}: there is only one {}, which has no number", kind.name()));
        }
        Ok(Self { index, ..kind.into() })
    }
}

/// Burn's backends. Each has a cargo feature of this package with its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// The CPU
    Flex,
    /// The CPU, through Burn's NdArray backend
    Ndarray,
    /// A GPU, through wgpu
    Wgpu,
    /// An Apple GPU, through Metal
    Metal,
    /// An NVIDIA GPU, through CUDA
    Cuda,
    /// An AMD GPU, through ROCm
    Rocm,
    /// The device of a worker; needs an address
    #[value(skip)]
    Remote,
}

impl DeviceKind {
    /// The first device that is compiled in.
    pub fn compiled() -> Self {
        *Self::value_variants().iter().find(|kind| kind.is_compiled_in()).unwrap_or(&Self::Flex)
    }

    /// The first device that is compiled in and is the host.
    pub fn host() -> Result<Self, String> {
        if Self::compiled().is_host() && cfg!(any(feature = "flex", feature = "ndarray")) {
            return Ok(Self::compiled());
        }
        Err("this build has no CPU device: build with `cargo build --release --features flex`".into())
    }

    /// Its name, which is also the name of its cargo feature.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::Ndarray => "ndarray",
            Self::Wgpu => "wgpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
            Self::Remote => "remote",
        }
    }

    /// Whether it is the host.
    pub fn is_host(self) -> bool {
        matches!(self, Self::Flex | Self::Ndarray)
    }

    fn is_compiled_in(self) -> bool {
        match self {
            Self::Flex => cfg!(feature = "flex"),
            Self::Ndarray => cfg!(feature = "ndarray"),
            Self::Remote => cfg!(feature = "remote"),
            gpu => devices::runtimes().contains(&gpu.name()),
        }
    }

    /// An error that names the cargo feature, if this device is not compiled in.
    pub fn compiled_in(self) -> anyhow::Result<()> {
        let name = self.name();
        if !self.is_compiled_in() {
            bail!("--device {name} is not compiled in: build with `cargo build --release --features {name}`");
        }
        Ok(())
    }

    /// Opens the device, if it is compiled in and this machine has it.
    pub fn open(self) -> anyhow::Result<Device> {
        self.compiled_in()?;
        match self {
            #[cfg(feature = "flex")]
            Self::Flex => Ok(Device::flex()),
            #[cfg(feature = "ndarray")]
            #[allow(deprecated, reason = "NdArray still has users")]
            Self::Ndarray => Ok(Device::ndarray()),
            Self::Remote => bail!("the name of a worker has its address, such as remote:127.0.0.1:7158"),
            gpu => devices::open(gpu.name()).map_err(|problem| {
                anyhow!("--device {}: there is no usable GPU here: {problem}", gpu.name())
            }),
        }
    }
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

impl From<HeadMode> for LmHead {
    fn from(mode: HeadMode) -> Self {
        match mode {
            HeadMode::File => Self::File,
            HeadMode::Int8 => Self::Int8,
            HeadMode::Requantised(DenseFormat::Q8_0) => Self::Q8_0,
            HeadMode::Requantised(DenseFormat::Q6_K) => Self::Q6_K,
            HeadMode::Requantised(DenseFormat::Q4_0) => Self::Q4_0,
            HeadMode::Requantised(DenseFormat::F32) => Self::F32,
            HeadMode::Requantised(DenseFormat::F16) => Self::F16,
            HeadMode::Requantised(DenseFormat::BF16) => Self::Bf16,
        }
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

pub fn activation(name: &str) -> Result<Activation, String> {
    Activation::from_name(name).ok_or_else(|| "possible values: relu2, silu".into())
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
    positive(text).and_then(|n| if n <= 1024 { Ok(n) } else { Err("it must be at most 1024".into()) })
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
    use bitnet_burn_engine::plan::GpuProfile;

    use super::*;

    #[test]
    fn devices_are_named_with_their_layers() {
        let choice = |text: &str| text.parse::<DeviceArg>();
        for text in [
            "auto",
            "flex",
            "wgpu",
            "cuda:1",
            "wgpu:0=12,flex",
            "wgpu:0=3,wgpu:1=4,flex=0",
            "cuda=1,ndarray=2",
            "remote:127.0.0.1:7158",
            "remote:[::1]:7001=12,remote:worker.local:7002=10,flex",
        ] {
            assert_eq!(choice(text).unwrap().to_string(), text);
        }
        for (text, expected) in [
            ("abacus", "there is no device \"abacus\"; possible are auto, flex"),
            ("abacus,flex", "there is no device \"abacus\"; possible are flex"),
            ("wgpu:x", "\"x\" is not the number of a device"),
            ("flex:1", "there is only one flex"),
            ("wgpu=many,flex", "\"many\" is not a number of layers"),
            ("wgpu,flex", "only one device can be without a number of layers"),
            ("wgpu=1,wgpu=2", "wgpu is named twice"),
            ("remote:a:1=1,remote:a:1=2", "remote:a:1 is named twice"),
            ("remote", "has its address"),
            ("remote:7158", "has its address"),
            ("remote::7158", "has its address"),
            ("remote:a:0", "has its address"),
            ("flex=1,ndarray", "ndarray is named twice"),
            ("auto,flex", "there is no device \"auto\""),
            ("", "there is no device \"\""),
        ] {
            let error = choice(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let placement = |text: &str| choice(text).unwrap().placement(30).map(Option::unwrap);
        for (text, expected) in [
            ("flex", Placement::cpu_only(30)),
            ("wgpu", Placement::gpu_only("wgpu", 30)),
            ("wgpu:0=12,flex", Placement::hybrid("wgpu:0", 12, 18)),
            ("wgpu:0=30,flex", Placement::hybrid("wgpu:0", 30, 0)),
            ("remote:a:1=12,flex", Placement::hybrid("remote:a:1", 12, 18)),
        ] {
            let placement = placement(text).unwrap();
            assert_eq!(placement, expected, "{text}");
            let named = DeviceArg::of(&placement, Some(DeviceKind::Flex)).unwrap();
            assert_eq!(named.placement(30).unwrap().unwrap(), placement, "{named}");
        }
        // A GPU without a number is the one that plans would choose, if the GPUs are known.
        let gpu = |device: &str, rate| GpuProfile {
            device: device.into(),
            read_gb_per_s: Some(rate),
            ..GpuProfile::default()
        };
        let gpus = vec![gpu("wgpu:0", 50.0), gpu("wgpu:1", 500.0), gpu("cuda:0", 400.0)];
        let machine = MachineProfile { gpus, ..MachineProfile::default() };
        let unknown = MachineProfile::default();
        let resolved = |text: &str, machine| choice(text).unwrap().resolved(machine).map(|c| c.to_string());
        assert_eq!(resolved("wgpu=3,flex", &machine).unwrap(), "wgpu:1=3,flex");
        assert_eq!(resolved("wgpu:0,cuda=2", &machine).unwrap(), "wgpu:0,cuda:0=2");
        assert_eq!(resolved("wgpu", &unknown).unwrap(), "wgpu");
        let twice = resolved("wgpu=1,wgpu:1=2", &machine).unwrap_err().to_string();
        assert!(twice.contains("wgpu:1 is named twice"), "{twice}");
        for text in ["wgpu=31,flex", "wgpu=3,flex=4"] {
            assert!(placement(text).unwrap_err().to_string().contains("the model has 30"), "{text}");
        }
    }

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
