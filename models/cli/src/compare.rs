//! `bitnet compare`: two models, or a model and the logits of another program, on the same tokens.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, anyhow, bail};
use bitnet_burn::GatedActivation;
use bitnet_burn_engine::compare::{
    self, CompareError, Comparison, Figures, Layers, LogitsFile, Side, Tolerance, Verdict,
};
use bitnet_burn_engine::device::DeviceSpec;
use bitnet_burn_engine::load::ActivationRule;
use bitnet_burn_engine::report::{AdapterSummary, ModelSummary};
use bitnet_burn_engine::text::count;
use bitnet_burn_engine::{Engine, EngineOptions};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::args::{
    EngineArgs, FileArgs, GapArgs, KvCacheType, LmHead, LoadArgs, Model, activation, positive, read_text,
    read_tokens,
};
use crate::output;
use crate::status::Status;

/// Compare the logits of two models, of a model and another program, or of two settings of one model
///
/// A and B are models (a GGUF file, a directory with config.json, hf:OWNER/NAME) or files of logits: .npy as `bitnet logits`
/// writes it, or safetensors, f16, bf16, f32 or f64, [positions, vocabulary]. A tensor of a safetensors file is named as
/// FILE.safetensors:NAME. A is the reference: errors are B - A, and KL divergences are KL(A || B).
///
/// Flags that begin with --b- are settings of B alone; the others are those of both.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CompareArgs {
    /// The reference: a model or a file of logits
    #[arg(value_name = "A", value_parser = Source::parser())]
    a: Source,
    /// What is compared with it
    #[arg(value_name = "B", value_parser = Source::parser())]
    b: Source,
    /// A file with the token ids, separated by commas or white space
    #[arg(long, value_name = "FILE")]
    tokens_file: Option<PathBuf>,
    /// A text file, which the model's tokenizer turns into tokens, with BOS in front if the model expects it; - reads stdin
    #[arg(long, value_name = "FILE", conflicts_with = "tokens_file")]
    text: Option<PathBuf>,
    /// Use at most this many tokens
    #[arg(long, value_name = "N", value_parser = positive)]
    max_tokens: Option<usize>,
    /// Limits, separated by commas, such as correlation>=0.999,kl_mean<=0.01. The names are those of the JSON: correlation,
    /// cosine, mse, max_abs_error, mean_abs_error, kl_mean, kl_p99, kl_max, top1_agreement, top5_agreement,
    /// perplexity_ratio (B's divided by A's). If a limit is broken, the exit status is 3
    #[arg(long, value_name = "LIMITS")]
    tolerance: Option<Tolerance>,
    #[command(flatten)]
    gaps: GapArgs,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    b_settings: BArgs,
    /// Rows that are computed at once. While layers are compared it may be fewer, so that their values fit into memory
    #[arg(long, value_name = "N", value_parser = positive, default_value_t = 64)]
    chunk: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Settings of B that differ from A's.
#[derive(Debug, Args)]
struct BArgs {
    /// B's --device
    #[arg(long, value_name = "DEVICE", help_heading = "Settings of B")]
    b_device: Option<DeviceSpec>,
    /// B's --kv-cache
    #[arg(long, value_enum, hide_possible_values = true, help_heading = "Settings of B")]
    b_kv_cache: Option<KvCacheType>,
    /// B's --lm-head
    #[arg(
        long,
        value_enum,
        value_name = "MODE",
        hide_possible_values = true,
        help_heading = "Settings of B"
    )]
    b_lm_head: Option<LmHead>,
    /// B's --activations
    #[arg(long, value_name = "RULE", help_heading = "Settings of B")]
    b_activations: Option<ActivationRule>,
    /// B's --adapter
    #[arg(long, value_name = "DIR", help_heading = "Settings of B")]
    b_adapter: Option<PathBuf>,
    /// B's --hidden-act
    #[arg(long, value_name = "NAME", value_parser = activation, help_heading = "Settings of B")]
    b_hidden_act: Option<GatedActivation>,
    /// B's --kernel. A process has one choice of kernels, so another process computes B. Its logits go through a file in the
    /// temporary directory, and layers are not compared
    #[arg(long, value_name = "NAME", help_heading = "Settings of B")]
    b_kernel: Option<String>,
}

const EXAMPLES: &str = "\
Exit status: 3 if a limit of --tolerance is broken.

Examples:
  bitnet compare model.gguf converted.gguf --text wiki.txt --max-tokens 512
  bitnet compare logits-of-transformers.npy model/ --tokens-file ids.txt
  bitnet compare goldens.safetensors:logits model.gguf --tokens-file ids.txt --json
  bitnet compare model.gguf model.gguf --text wiki.txt --b-lm-head q6_k --tolerance 'kl_mean<=0.01'";

/// A side, by its place.
#[derive(Clone, Debug)]
enum Source {
    Logits(PathBuf),
    Model(Model),
}

impl Source {
    fn parser() -> impl TypedValueParser<Value = Self> {
        OsStringValueParser::new().try_map(|text: OsString| match Path::new(&text) {
            path if LogitsFile::recognises(path) => Ok(Self::Logits(path.to_owned())),
            _ => Model::parse(text).map(Self::Model),
        })
    }

    fn model(&self) -> Option<&Model> {
        match self {
            Self::Model(model) => Some(model),
            Self::Logits(_) => None,
        }
    }

    /// The logits, if it is a file of them.
    fn logits(&self) -> Result<Option<LogitsFile>, CompareError> {
        match self {
            Self::Model(_) => Ok(None),
            Self::Logits(path) => LogitsFile::open(path).map(Some),
        }
    }
}

/// What was compared.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Summary {
    /// A file of logits.
    Logits { path: String },
    Model {
        #[serde(flatten)]
        model: ModelSummary,
        device: String,
        lm_head: Option<String>,
        activations: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        adapter: Option<AdapterSummary>,
        kv_cache: String,
    },
    /// A model that another process computed.
    Process { path: String, kernel: String },
}

#[derive(Serialize)]
struct Output {
    a: Summary,
    b: Summary,
    #[serde(flatten)]
    comparison: Comparison,
    /// The limits; empty without `--tolerance`.
    tolerance: Vec<Verdict>,
    /// Whether all of them are kept; absent without `--tolerance`.
    #[serde(skip_serializing_if = "Option::is_none")]
    within_tolerance: Option<bool>,
}

pub fn run(args: CompareArgs) -> anyhow::Result<ExitCode> {
    args.check()?;
    let mut files = [args.a.logits()?, args.b.logits()?];
    let options = |options: EngineOptions| {
        let options = if args.text.is_some() { options } else { options.without_tokenizer() };
        options.rows(args.chunk).measured_context(usize::MAX)
    };
    let a = args.a.model().map(|model| args.engine(model, false).open(options)).transpose()?;
    let of_b = args.b.model().filter(|_| args.b_settings.b_kernel.is_none());
    let b = of_b.map(|model| match &a {
        // The first engine has set the kernels up.
        Some(_) => args.engine(model, true).open(options),
        None => args.engine(model, true).open(options),
    });
    let engines = [a, b.transpose()?];
    let tokens = args.tokens(&engines, &files)?;

    // It lives as long as B's logits in it.
    let mut process = None;
    if let (Some(model), Some(kernel)) = (args.b.model(), &args.b_settings.b_kernel) {
        let dir = tempfile::tempdir().context("cannot make a temporary directory for B's logits")?;
        let tokens = tokens.as_deref().ok_or(CompareError::NoTokens)?;
        files[1] = Some(args.in_another_process(model, kernel, tokens, dir.path())?);
        process = Some((dir, Summary::Process { path: model.to_string(), kernel: kernel.clone() }));
    }
    let length = tokens.as_ref().map_or(0, Vec::len);
    let mut sides = Vec::new();
    for (engine, file) in engines.into_iter().zip(files) {
        sides.push(match (engine, file) {
            (Some(engine), _) => (Summary::of(&engine), Side::model(engine, length)?),
            (None, Some(file)) => (Summary::Logits { path: file.name() }, Side::Logits(file)),
            (None, None) => bail!(CompareError::NoTokens),
        });
    }
    let [(summary_a, mut a), (summary_b, mut b)] =
        <[_; 2]>::try_from(sides).map_err(|_| anyhow!("a comparison has two sides"))?;
    let positions = a.positions().or(b.positions()).unwrap_or(length);
    let bar = output::bar(positions as u64, "comparing [{bar:30}] {pos}/{len} positions, {eta} left");
    let comparison = compare::compare(&mut a, &mut b, tokens.as_deref(), args.chunk, &mut |done| {
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let mut comparison = comparison?;
    if process.is_some() {
        comparison.layers_absent = Some("another process computed B".to_owned());
    }
    let tolerance = args.tolerance.as_ref().map(|tolerance| tolerance.judge(&comparison.figures));
    let within_tolerance = tolerance.as_ref().map(|verdicts| verdicts.iter().all(|verdict| verdict.kept));
    let (summary_b, _dir) = match process {
        Some((dir, summary)) => (summary, Some(dir)),
        None => (summary_b, None),
    };
    let tolerance = tolerance.unwrap_or_default();
    let output = Output { a: summary_a, b: summary_b, comparison, tolerance, within_tolerance };
    if args.json {
        output::print_json(&output)?;
    } else {
        output.print()?;
    }
    Ok(if within_tolerance == Some(false) { Status::Mismatch } else { Status::Done }.into())
}

impl CompareArgs {
    /// What only the sides together can get wrong.
    fn check(&self) -> anyhow::Result<()> {
        let of = &self.b_settings;
        let set = [
            ("--b-device", of.b_device.is_some()),
            ("--b-kv-cache", of.b_kv_cache.is_some()),
            ("--b-lm-head", of.b_lm_head.is_some()),
            ("--b-activations", of.b_activations.is_some()),
            ("--b-adapter", of.b_adapter.is_some()),
            ("--b-hidden-act", of.b_hidden_act.is_some()),
            ("--b-kernel", of.b_kernel.is_some()),
        ];
        let set = set.into_iter().find(|(_, is_set)| *is_set);
        if let (Source::Logits(path), Some((flag, _))) = (&self.b, set) {
            bail!("{flag} is a setting of a model, and B ({}) is a file of logits", path.display());
        }
        let models = [&self.a, &self.b].into_iter().filter_map(Source::model).count();
        if models > 0 && self.tokens_file.is_none() && self.text.is_none() {
            bail!("a model computes logits of tokens: give them with --tokens-file, or a text with --text");
        }
        if models == 0 && self.text.is_some() {
            bail!(
                "--text needs a model, whose tokenizer makes tokens of it; files of logits take --tokens-file"
            );
        }
        Ok(())
    }

    /// A model with its settings.
    fn engine(&self, model: &Model, is_b: bool) -> EngineArgs {
        let of = is_b.then_some(&self.b_settings);
        let hidden_act = of.and_then(|b| b.b_hidden_act).or(self.gaps.hidden_act);
        EngineArgs {
            file: FileArgs {
                model: Some(model.clone()),
                gaps: GapArgs { hidden_act, pre: self.gaps.pre.clone() },
            },
            load: LoadArgs {
                device: of.and_then(|b| b.b_device.clone()).or(self.load.device.clone()),
                kv_cache: of.and_then(|b| b.b_kv_cache).or(self.load.kv_cache),
                lm_head: of.and_then(|b| b.b_lm_head).unwrap_or(self.load.lm_head),
                activations: of.and_then(|b| b.b_activations).unwrap_or(self.load.activations),
                adapter: of.and_then(|b| b.b_adapter.clone()).or(self.load.adapter.clone()),
                ..self.load.clone()
            },
        }
    }

    /// The tokens, if some were given: not more than fit a model.
    fn tokens(
        &self,
        engines: &[Option<Engine>; 2],
        files: &[Option<LogitsFile>; 2],
    ) -> anyhow::Result<Option<Vec<u32>>> {
        let engines = || engines.iter().flatten();
        let vocabularies = engines().map(|engine| engine.checkpoint().config().vocab_size);
        let vocabularies = vocabularies.chain(files.iter().flatten().map(|file| file.shape()[1]));
        // If they differ, the comparison says so.
        let vocabulary = vocabularies.max().unwrap_or(0);
        let mut tokens = match (&self.tokens_file, &self.text) {
            (Some(path), _) => read_tokens(path, vocabulary)?,
            (None, Some(path)) => self.encode(&read_text(path)?, engines())?,
            (None, None) => return Ok(None),
        };
        tokens.truncate(self.max_tokens.unwrap_or(usize::MAX));
        for engine in engines() {
            let (context, path) = (engine.settings().context, engine.checkpoint().path().display());
            if tokens.len() > context {
                bail!(
                    "{} tokens do not fit into the context of {path}, {context}: --max-tokens {context} takes the first ones",
                    tokens.len()
                );
            }
        }
        Ok(Some(tokens))
    }

    /// The tokens of a text by the first model, with a warning where the second finds others.
    fn encode<'e>(&self, text: &str, engines: impl Iterator<Item = &'e Engine>) -> anyhow::Result<Vec<u32>> {
        let encoded: Vec<Vec<u32>> =
            engines.map(|engine| engine.encode(text, true)).collect::<Result<_, _>>()?;
        if let [a, b] = &encoded[..]
            && a != b
        {
            let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            output::warning(format_args!(
                "the tokenizers of A and B find other tokens in the text, from number {} on; those of A are used",
                same + 1
            ));
        }
        let tokens = encoded.into_iter().next().unwrap_or_default();
        if tokens.is_empty() {
            bail!("the text has no tokens");
        }
        Ok(tokens)
    }

    /// B's logits, which `bitnet logits` computes with another kernel.
    fn in_another_process(
        &self,
        model: &Model,
        kernel: &str,
        tokens: &[u32],
        dir: &Path,
    ) -> anyhow::Result<LogitsFile> {
        let (ids, out) = (dir.join("tokens"), dir.join("logits.npy"));
        let listed: Vec<String> = tokens.iter().map(u32::to_string).collect();
        std::fs::write(&ids, listed.join(" ")).with_context(|| format!("cannot write {}", ids.display()))?;
        let EngineArgs { file, load } = self.engine(model, true);
        let program = std::env::current_exe().context("cannot find this program's file, which computes B")?;
        let mut command = Command::new(program);
        command.arg("logits").arg("--model").arg(model.to_string());
        command.arg("--tokens-file").arg(&ids).arg("--out").arg(&out);
        command.args(["--kernel", kernel, "--lm-head", &value_name(load.lm_head)]);
        command.args(["--activations", &load.activations.to_string(), "--chunk", &self.chunk.to_string()]);
        // Its report is not needed.
        command.arg("--json");
        let mut option = |flag: &str, value: Option<String>| {
            value.into_iter().for_each(|value| {
                command.args([flag, &value]);
            });
        };
        option("--device", load.device.map(|device| device.to_string()));
        option("--kv-cache", load.kv_cache.map(value_name));
        option("--hidden-act", file.gaps.hidden_act.map(|activation| activation.name().to_owned()));
        option("--threads", load.kernels.threads.threads.map(|threads| threads.to_string()));
        load.kernels.plugins.iter().for_each(|plugin| {
            command.arg("--plugin").arg(plugin);
        });
        load.adapter.iter().for_each(|adapter| {
            command.arg("--adapter").arg(adapter);
        });
        load.secret.secret_file.iter().for_each(|file| {
            command.arg("--secret-file").arg(file);
        });
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
        let status = status.context("cannot start the process that computes B")?;
        if !status.success() {
            bail!(
                "the process that computes B with --kernel {kernel} ended with {status}; its message is above"
            );
        }
        Ok(LogitsFile::open(&out)?)
    }
}

/// The name of a flag's value.
fn value_name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

impl Summary {
    fn of(engine: &Engine) -> Self {
        let execution = engine.execution();
        Self::Model {
            model: engine.summary().clone(),
            device: execution.device,
            lm_head: execution.lm_head,
            activations: execution.activations,
            adapter: execution.adapter,
            kv_cache: value_name(KvCacheType::from(engine.settings().kv_cache)),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Logits { path } => write!(f, "{path} (logits)"),
            Self::Process { path, kernel } => write!(f, "{path} (kernel {kernel}, in another process)"),
            Self::Model { model, device, lm_head, activations, adapter, kv_cache } => {
                write!(f, "{} ({device}", model.path.display())?;
                for (name, value) in [("activations", activations), ("lm_head", lm_head)] {
                    if let Some(value) = value {
                        write!(f, ", {name} {value}")?;
                    }
                }
                if let Some(adapter) = adapter {
                    write!(f, ", adapter {adapter}")?;
                }
                write!(f, ", KV cache {kv_cache})")
            }
        }
    }
}

impl Output {
    fn print(&self) -> anyhow::Result<()> {
        let Comparison { figures, layers, layers_absent } = &self.comparison;
        let mut rows = vec![
            ("A", self.a.to_string()),
            ("B", self.b.to_string()),
            ("positions", format!("{}, with {} logits each", figures.positions, figures.vocabulary)),
        ];
        rows.extend(lines(figures));
        match (layers, layers_absent) {
            (Some(layers), _) => rows.extend(lines_of_layers(layers)),
            (None, reason) => {
                let reason = reason.as_deref().unwrap_or_default();
                rows.push(("layers", format!("not compared: {reason}")));
            }
        }
        let verdict = |verdict: &Verdict| {
            let found = verdict.found.map_or_else(|| "there is none".to_owned(), number);
            let kept = if verdict.kept { "kept" } else { "BROKEN" };
            ("limit", format!("{}: {kept}, {found}", verdict.limit))
        };
        rows.extend(self.tolerance.iter().map(verdict));
        let rows: Vec<Vec<String>> =
            rows.into_iter().map(|(name, text)| vec![name.to_owned(), text]).collect();
        output::print(output::columns(&rows).trim_end())
    }
}

/// A figure of any size.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 | 1e-3..1e6 => format!("{value:.6}"),
        _ => format!("{value:.3e}"),
    }
}

fn lines(figures: &Figures) -> Vec<(&'static str, String)> {
    let ratio = |value: Option<f64>| {
        value.map_or_else(|| "none: a side has no spread".to_owned(), |v| format!("{v:.9}"))
    };
    let at = &figures.max_abs_error_at;
    let largest = format!("{:.3e} at position {}, token {}", figures.max_abs_error, at.position, at.token);
    let kl = [figures.kl_mean, figures.kl_p99, figures.kl_max].map(|kl| format!("{kl:.3e}"));
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    let parting = match &figures.parting {
        None => "nowhere: the most likely token is the same at every position".to_owned(),
        Some(parting) => format!(
            "position {}: A says {} (by {:.4}), B says {} (by {:.4})",
            parting.position, parting.token_a, parting.gap_a, parting.token_b, parting.gap_b
        ),
    };
    let apart = match figures.first_apart {
        None => "nowhere: no error is above 1e-4 of its position's largest logit".to_owned(),
        Some(position) => format!("from position {position} on: an error above 1e-4 of its largest logit"),
    };
    let mut lines = vec![
        ("correlation", ratio(figures.correlation)),
        ("cosine", ratio(figures.cosine)),
        ("MSE", format!("{:.3e}", figures.mse)),
        ("largest error", largest),
        ("mean error", format!("{:.3e}", figures.mean_abs_error)),
        ("KL divergence", format!("mean {}, p99 {}, largest {}", kl[0], kl[1], kl[2])),
        ("same top 1", percent(figures.top1_agreement)),
        ("same top 5", percent(figures.top5_agreement)),
    ];
    if let (Some(a), Some(b), Some(ratio)) =
        (figures.perplexity_a, figures.perplexity_b, figures.perplexity_ratio)
    {
        lines.push(("perplexity", format!("{a:.4} of A, {b:.4} of B, ratio {ratio:.6}")));
    }
    lines.push(("apart", apart));
    lines.push(("they part", parting));
    lines
}

fn lines_of_layers(layers: &Layers) -> Vec<(&'static str, String)> {
    let counts = [
        (layers.same, "agree in all layers"),
        (layers.rounding, "part by a rounding to int8"),
        (layers.inherited, "part where they look back"),
        (layers.unknown, "part, and it is not known why"),
        (layers.different, "computes something else"),
    ];
    let counts: Vec<String> =
        counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
    let compared = format!("{} compared: {}", count(layers.positions as u64, "position"), counts.join(", "));
    let explained = match layers.explained_by_rounding {
        Some(true) => Some("activations that are rounded to the other side explain every difference"),
        Some(false) => Some("activations that are rounded to the other side do not explain it"),
        None => None,
    };
    let mut lines = vec![("layers", compared)];
    lines.extend(layers.first.iter().map(|place| ("first", place.to_string())));
    lines.extend(layers.first_different.iter().map(|place| ("different", place.to_string())));
    lines.extend(explained.map(|text| ("int8", text.to_owned())));
    lines
}
