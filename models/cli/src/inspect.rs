//! `bitnet inspect`: shows the content of a model's files, and the memory that the model needs.

use std::collections::BTreeMap;

use bitnet_burn::{CacheType, DeltaNet, Experts, ModelConfig, Projection, SlidingWindows};
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::text::human_bytes;
use bitnet_burn_formats::canonical;
use clap::Args;
use serde::Serialize;

use crate::args::{FileArgs, KvCacheType, ThreadArgs, positive};
use crate::output::{self, columns, print};

/// Show the content of a model's files: configuration, metadata and tensors, and the memory that the model needs
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InspectArgs {
    #[command(flatten)]
    file: FileArgs,
    #[command(flatten)]
    _threads: ThreadArgs,
    /// Read the whole file, and check that every ternary weight is -1, 0 or 1 and every other value is finite. Float
    /// projections whose values are ternary by tensor, row or group are counted as such
    #[arg(long)]
    check: bool,
    /// List every tensor, instead of one line for the same tensor in all layers
    #[arg(long)]
    tensors: bool,
    /// Positions (tokens) to compute the size of the KV cache for [default: the length that the model was trained for]
    #[arg(long, value_name = "N", value_parser = positive)]
    context: Option<usize>,
    /// Type of the keys and values in the KV cache
    #[arg(long, value_enum, default_value_t = KvCacheType::F32)]
    kv_cache: KvCacheType,
    /// Print one JSON object, with every tensor
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bitnet inspect -m model.gguf
  bitnet inspect -m model.gguf --check
  bitnet inspect -m model/ --json | jq '.tensors[] | select(.type == \"BF16\") | .name'";

#[derive(Serialize)]
struct Report<'a> {
    path: String,
    config: &'a ModelConfig,
    parameters: Parameters,
    memory: Memory,
    metadata: Vec<Entry>,
    tensors: Vec<Tensor>,
    warnings: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<Check>,
}

#[derive(Serialize)]
struct Parameters {
    ternary: u64,
    /// Of a model with experts: those that a token is multiplied by.
    #[serde(skip_serializing_if = "Option::is_none")]
    ternary_per_token: Option<u64>,
    dense: u64,
}

/// Sizes that follow from the header.
#[derive(Serialize)]
struct Memory {
    /// All tensors in their stored format. They are mapped, and only what is read takes memory.
    tensor_bytes: u64,
    /// The ternary weights at 2 bits. Kernels with their own layout make a copy of this size.
    ternary_bytes: u64,
    kv_cache_type: &'static str,
    kv_cache_bytes_per_token: u64,
    context: usize,
    kv_cache_bytes: u64,
    /// The states of gated DeltaNets, for each sequence.
    #[serde(skip_serializing_if = "is_zero")]
    state_bytes: u64,
}

fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

#[derive(Serialize)]
struct Entry {
    key: String,
    value: String,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    r#type: String,
    shape: Vec<u64>,
    bytes: u64,
}

#[derive(Serialize)]
struct Check {
    tensors: usize,
    ternary_weights: u64,
    zero_weights: u64,
    /// Projections by the weights that share a scale: `tensor`, `row`, `group:64`.
    scales: BTreeMap<String, usize>,
    dense_values: u64,
    bytes: u64,
    seconds: f64,
}

pub fn run(args: InspectArgs) -> anyhow::Result<()> {
    let checkpoint = args.file.open()?;
    let config = checkpoint.config();
    let tensors = checkpoint.tensors().into_iter();
    let tensors: Vec<_> = tensors
        .map(|t| Tensor { name: t.name, r#type: t.type_name, shape: t.shape, bytes: t.bytes })
        .collect();
    let memory = memory(&args, config, &tensors);
    let check = if args.check { Some(check(&checkpoint)?) } else { None };
    let per_token = config.options.experts.as_ref().map(|_| config.ternary_parameters_per_token());
    let parameters = Parameters {
        ternary: config.ternary_parameters(),
        ternary_per_token: per_token,
        dense: config.dense_parameters(),
    };
    let metadata = checkpoint.metadata().into_iter().map(|(key, value)| Entry { key, value }).collect();
    let path = checkpoint.path().display().to_string();
    let warnings = checkpoint.warnings();
    let report = Report { path, config, parameters, memory, metadata, tensors, warnings, check };
    if args.json { output::print_json(&report) } else { print(report.text(args.tensors).trim_end()) }
}

fn memory(args: &InspectArgs, config: &ModelConfig, tensors: &[Tensor]) -> Memory {
    let all = (0..config.n_layers).flat_map(|layer| Projection::of_layer(layer, config));
    let ternary = all.map(|projection| {
        let (n, k) = projection.shape(config);
        (n as u64).saturating_mul(canonical::row_bytes(k) as u64)
    });
    let ternary = ternary.fold(0, u64::saturating_add);
    let per_token = config.kv_bytes_per_token(args.kv_cache.into()) as u64;
    let context = args.context.unwrap_or(config.context_length);
    Memory {
        tensor_bytes: tensors.iter().map(|t| t.bytes).sum(),
        ternary_bytes: ternary,
        kv_cache_type: CacheType::from(args.kv_cache).name(),
        kv_cache_bytes_per_token: per_token,
        context,
        kv_cache_bytes: per_token.saturating_mul(context as u64),
        state_bytes: config.state_bytes() as u64,
    }
}

fn check(checkpoint: &Checkpoint) -> anyhow::Result<Check> {
    let started = std::time::Instant::now();
    let report = checkpoint.check()?;
    Ok(Check {
        tensors: report.tensors,
        ternary_weights: report.ternary_weights,
        zero_weights: report.zero_weights,
        scales: report.scales,
        dense_values: report.dense_values,
        bytes: report.bytes,
        seconds: started.elapsed().as_secs_f64(),
    })
}

impl Report<'_> {
    fn text(&self, all_tensors: bool) -> String {
        let c = self.config;
        let row = |label: &str, value: String| vec![label.to_owned(), value];
        let mut rows = vec![row("file", self.path.clone()), row("architecture", c.architecture.clone())];
        rows.extend(c.name.iter().map(|name| row("name", name.clone())));
        let tied = if c.tied_embeddings { "tied to the embedding" } else { "a matrix of its own" };
        let per_token = self.parameters.ternary_per_token;
        let per_token = per_token.map_or(String::new(), |count| format!(" ({count} for a token)"));
        let sub_norms = match (c.sub_norms, c.options.projection_norms) {
            (true, _) => "with sub-norms",
            (false, true) => "a norm before each projection",
            (false, false) => "without sub-norms",
        };
        rows.extend([
            row("hidden size", c.hidden_size.to_string()),
            row("feed-forward", feed_forward(c, sub_norms)),
            row("layers", format!("{}{}", c.n_layers, delta_nets(c))),
            row("heads", format!("{} of {}, {} for keys and values", c.n_heads, c.head_dim, c.n_kv_heads)),
            row("vocabulary", c.vocab_size.to_string()),
            row("output head", tied.into()),
            row("context", format!("{}{}", c.context_length, windows(c))),
            row("RoPE theta", c.rope_theta.to_string()),
            row("RMSNorm eps", format!("{:e}", c.rms_norm_eps)),
            row("BOS", c.bos_token.map_or("none".into(), |t| t.to_string())),
            row("EOS", c.eos_tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")),
            row(
                "parameters",
                format!("{} ternary{per_token}, {} dense", self.parameters.ternary, self.parameters.dense),
            ),
        ]);
        let mut text = columns(&rows);

        let m = &self.memory;
        text.push_str("\nMemory\n");
        text.push_str(&columns(&[
            row("  tensors", format!("{} (mapped, as the file stores them)", human_bytes(m.tensor_bytes))),
            row(
                "  ternary at 2 bits",
                format!(
                    "{} (additional, if the fastest kernels have a layout of their own)",
                    human_bytes(m.ternary_bytes)
                ),
            ),
            row(
                "  KV cache",
                format!(
                    "{} for {} positions, {} per token ({})",
                    human_bytes(m.kv_cache_bytes),
                    m.context,
                    human_bytes(m.kv_cache_bytes_per_token),
                    m.kv_cache_type
                ),
            ),
        ]));
        if m.state_bytes > 0 {
            let states = format!("{} for each sequence (gated DeltaNets)", human_bytes(m.state_bytes));
            text.push_str(&columns(&[row("  states", states)]));
        }

        text.push_str("\nTypes\n");
        let mut types: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for tensor in &self.tensors {
            let (count, bytes) = types.entry(&tensor.r#type).or_default();
            *count += 1;
            *bytes += tensor.bytes;
        }
        let rows: Vec<_> = types
            .iter()
            .map(|(name, (count, bytes))| vec![format!("  {name}"), count.to_string(), human_bytes(*bytes)])
            .collect();
        text.push_str(&columns(&rows));

        text.push_str("\nMetadata\n");
        let rows: Vec<_> = self
            .metadata
            .iter()
            .map(|entry| row(&format!("  {}", entry.key), entry.value.replace(['\n', '\r'], " ")))
            .collect();
        text.push_str(&columns(&rows));

        text.push_str("\nTensors (rows first)\n");
        text.push_str(&columns(&self.tensor_rows(all_tensors)));
        for warning in self.warnings {
            text.push_str(&format!("\nwarning: {warning}\n"));
        }
        if let Some(check) = &self.check {
            let zeros = 100.0 * check.zero_weights as f64 / check.ternary_weights.max(1) as f64;
            text.push_str(&format!(
                "\nChecked: {} tensors, {} ternary weights ({zeros:.1} % zero{}), {} other values, all valid\n",
                check.tensors,
                check.ternary_weights,
                scales(&check.scales),
                check.dense_values
            ));
        }
        text
    }

    /// One row per tensor, or one row for the same tensor in all layers.
    fn tensor_rows(&self, all: bool) -> Vec<Vec<String>> {
        let mut rows: Vec<(String, &Tensor, usize)> = Vec::new();
        let mut known: BTreeMap<(String, &str, &[u64]), usize> = BTreeMap::new();
        for tensor in &self.tensors {
            let name = if all { tensor.name.clone() } else { without_layer(&tensor.name) };
            let index = *known.entry((name.clone(), &tensor.r#type, &tensor.shape)).or_insert(rows.len());
            match rows.get_mut(index) {
                Some((_, _, count)) => *count += 1,
                None => rows.push((name, tensor, 1)),
            }
        }
        let shape = |shape: &[u64]| shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
        rows.iter()
            .map(|(name, tensor, count)| {
                let times = if *count > 1 { format!("{count} x ") } else { String::new() };
                vec![
                    format!("  {name}"),
                    tensor.r#type.clone(),
                    shape(&tensor.shape),
                    format!("{times}{}", human_bytes(tensor.bytes)),
                ]
            })
            .collect()
    }
}

/// `; scales by group:64`, or `; scales by row in 12 projections, tensor in 2 projections`.
fn scales(projections: &BTreeMap<String, usize>) -> String {
    let kinds: Vec<_> = match projections.len() {
        0 => return String::new(),
        1 => projections.keys().cloned().collect(),
        _ => projections.iter().map(|(kind, count)| format!("{kind} in {count} projections")).collect(),
    };
    format!("; scales by {}", kinds.join(", "))
}

fn feed_forward(c: &ModelConfig, sub_norms: &str) -> String {
    let one = format!("{}, {}, {sub_norms}", c.intermediate_size, c.activation);
    let Some(Experts { count, used, intermediate_size, shared, dense_layers, .. }) = &c.options.experts
    else {
        return one;
    };
    let shared = shared.map_or(String::new(), |size| format!(" and a shared one of {size}"));
    let experts = format!("{used} of {count} experts of {intermediate_size}{shared}, {}", c.activation);
    match dense_layers.len() {
        0 => experts,
        layers => format!("{experts}; {layers} layers without experts: {one}"),
    }
}

/// `, 48 of them with a gated DeltaNet (...)`, or nothing.
fn delta_nets(c: &ModelConfig) -> String {
    let Some(delta) = &c.options.delta_net else { return String::new() };
    let count = delta.layers.iter().filter(|&&has| has).count();
    let DeltaNet { key_heads, value_heads, key_dim, value_dim, .. } = delta;
    format!(
        ", {count} of them with a gated DeltaNet ({key_heads} key heads of {key_dim}, {value_heads} value heads of \
         {value_dim})"
    )
}

/// `, in 18 of 24 layers a window of 512`, or nothing.
fn windows(c: &ModelConfig) -> String {
    let Some(SlidingWindows { positions, layers, .. }) = &c.options.windows else { return String::new() };
    let sliding = layers.iter().filter(|&&sliding| sliding).count();
    if sliding == 0 {
        return String::new();
    }
    format!(", in {sliding} of {} layers a window of {positions}", layers.len())
}

/// `blk.7.attn_q.weight` -> `blk.*.attn_q.weight`.
fn without_layer(name: &str) -> String {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    name.split('.').map(|part| if is_number(part) { "*" } else { part }).collect::<Vec<_>>().join(".")
}
