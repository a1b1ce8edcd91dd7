//! `bitnet synth`: writes models of random weights.

use std::path::PathBuf;

use bitnet_burn::{GatedActivation, ModelConfig};
use bitnet_burn_engine::synth;
use bitnet_burn_engine::synth::{SynthOptions, SynthScales};
use bitnet_burn_engine::text::{human_bytes, human_seconds};
use bitnet_burn_formats::DenseFormat;
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::args::{DenseType, activation, positive};
use crate::output;
use crate::status::discard_when_interrupted;

/// Write a GGUF model of random ternary weights, for measurements and tests
///
/// The file has the keys, names, types and sizes of a published one, and a byte-level tokenizer. So every command works
/// with it, and generated text is nonsense. Projections have as many -1 as 0 and 1; their scales keep the variance of
/// activations at 1. A Q8_0, Q6_K or Q4_0 embedding has random valid blocks, which take as long to read as
/// real ones. The same options and seed write the same bytes.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct SynthArgs {
    /// A shape by name; the options under Sizes change it
    #[arg(long, value_name = "NAME", default_value = "tiny", value_parser = PossibleValuesParser::new(synth::SHAPES))]
    shape: String,
    /// The file to write [default: bitnet-SHAPE.gguf]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Seed of the random weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Which weights share a scale: those of a tensor (I2_S), a row (TQ2_0), or a group (group:64 is Q2_0, group:128 is
    /// PQ2_0) [default: tensor; row for experts]
    #[arg(long, value_enum, value_name = "WEIGHTS")]
    scales: Option<Scales>,
    /// Type of the embedding, and of the output head where that is not tied [default: q6_k; that of the projections with
    /// scales of groups]
    #[arg(long, value_enum, value_name = "TYPE")]
    embedding_type: Option<DenseType>,
    /// Width of the residual stream; a multiple of 128, or of 256 with a Q6_K embedding
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Sizes")]
    hidden_size: Option<usize>,
    /// Width of the feed-forward layer; a multiple of 128
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Sizes")]
    intermediate_size: Option<usize>,
    /// Number of layers
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Sizes")]
    layers: Option<usize>,
    /// Number of query heads
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Sizes")]
    heads: Option<usize>,
    /// Number of key-value heads
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Sizes")]
    kv_heads: Option<usize>,
    /// Width of a head [default: the shape's; with --hidden-size or --heads, hidden size / heads]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Sizes")]
    head_dim: Option<usize>,
    /// Size of the vocabulary
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Sizes")]
    vocab_size: Option<usize>,
    /// Context length in the header
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Sizes")]
    context_length: Option<usize>,
    /// Base of the RoPE frequencies
    #[arg(long, value_name = "X", help_heading = "Sizes")]
    rope_theta: Option<f64>,
    /// The feed-forward activation: relu2, silu, gelu or gelu_pytorch_tanh
    #[arg(long, value_name = "NAME", value_parser = activation, help_heading = "Sizes")]
    hidden_act: Option<GatedActivation>,
    /// Write an output head, instead of using the embedding as one
    #[arg(long, help_heading = "Sizes")]
    untied: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Which weights share a scale.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Scales {
    Tensor,
    Row,
    #[value(name = "group:64")]
    Group64,
    #[value(name = "group:128")]
    Group128,
}

impl From<Scales> for SynthScales {
    fn from(scales: Scales) -> Self {
        match scales {
            Scales::Tensor => Self::Tensor,
            Scales::Row => Self::Row,
            Scales::Group64 => Self::Group64,
            Scales::Group128 => Self::Group128,
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  bitnet synth --shape 2b-4t --out 2b.gguf          # BitNet b1.58 2B-4T, 790 MB
  bitnet synth --shape 2b-4t --embedding-type f16 --out 2b-f16.gguf
  bitnet synth --shape bonsai-1.7b --scales group:64 --out bonsai.gguf
  bitnet synth --shape bonsai-27b --scales group:128 --out bonsai-27b.gguf   # gated DeltaNets, 7.5 GB
  bitnet synth --hidden-size 512 --intermediate-size 1536 --layers 4 --heads 8 --kv-heads 2 --out small.gguf";

#[derive(Serialize)]
struct Output<'a> {
    path: PathBuf,
    bytes: u64,
    seconds: f64,
    seed: u64,
    embedding_type: &'static str,
    projection_type: &'static str,
    config: &'a ModelConfig,
}

impl SynthArgs {
    fn config(&self) -> anyhow::Result<ModelConfig> {
        let mut config =
            synth::shape(&self.shape).ok_or_else(|| anyhow::anyhow!("no shape {}", self.shape))?;
        let named = config.clone();
        let set = |field: &mut usize, value: Option<usize>| *field = value.unwrap_or(*field);
        set(&mut config.hidden_size, self.hidden_size);
        set(&mut config.intermediate_size, self.intermediate_size);
        if let Some(experts) = &mut config.options.experts {
            set(&mut experts.intermediate_size, self.intermediate_size);
        }
        if let Some(layers) = self.layers {
            synth::set_layers(&mut config, layers);
        }
        set(&mut config.n_heads, self.heads);
        set(&mut config.n_kv_heads, self.kv_heads);
        set(&mut config.context_length, self.context_length);
        if self.hidden_size.is_some() || self.heads.is_some() {
            config.head_dim = config.hidden_size / config.n_heads;
        }
        set(&mut config.head_dim, self.head_dim);
        if let Some(vocab_size) = self.vocab_size {
            config.vocab_size = vocab_size;
            (config.bos_token, config.eos_tokens) = synth::last_tokens(vocab_size);
        }
        config.rope_theta = self.rope_theta.unwrap_or(config.rope_theta);
        config.activation = self.hidden_act.unwrap_or(config.activation);
        config.tied_embeddings &= !self.untied;
        if config != named {
            config.name = Some(format!("synthetic, {} changed", self.shape));
        }
        Ok(config)
    }
}

pub fn run(args: SynthArgs) -> anyhow::Result<()> {
    let config = args.config()?;
    let path = args.out.clone().unwrap_or_else(|| format!("bitnet-{}.gguf", args.shape).into());
    let default = if config.options.experts.is_some() { Scales::Row } else { Scales::Tensor };
    let scales = SynthScales::from(args.scales.unwrap_or(default));
    let embedding = args.embedding_type.map_or(scales.embedding(), DenseFormat::from);
    let options = SynthOptions { config, scales, embedding, seed: args.seed };
    let bar = output::bar(0, "writing [{bar:30}] {bytes}/{total_bytes}");
    let started = std::time::Instant::now();
    discard_when_interrupted()?;
    let bytes = synth::write(&path, &options, &|done, all| {
        bar.set_length(all);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let SynthOptions { config, embedding, seed, scales } = &options;
        let projection_type = scales.tensor_type().name();
        let embedding_type = embedding.name();
        return output::print_json(&Output {
            path,
            bytes,
            seconds,
            seed: *seed,
            embedding_type,
            projection_type,
            config,
        });
    }
    let (size, time) = (human_bytes(bytes), human_seconds(seconds));
    output::note(format_args!("{}: {size} in {time}", path.display()));
    Ok(())
}
