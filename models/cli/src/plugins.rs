//! `bitnet plugins`: manages, checks and measures kernel plugins.

mod judge;
mod keep;
mod new;
mod publishers;
mod source;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bitnet_burn_formats::files;
use bitnet_burn_manager::KernelManager;
use bitnet_burn_manager::gate::{Report, Stage};
use bitnet_burn_manager::store::{self, Known, PluginStore};
use bitnet_burn_manager::{ManagerConfig, cpu};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::args::{KernelArgs, ThreadArgs};
use crate::engine::config;
use crate::kernels::Shape;
use crate::output::{self, columns};

/// Write, check, install, list, measure, judge, pin and forget kernel plugins
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PluginsArgs {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  bitnet plugins new my-kernels --lang rust
  bitnet plugins verify ./libmy_kernels.so
  bitnet plugins add https://example.org/libmy_kernels.so
  bitnet plugins bench ./libmy_kernels.so --shape 6912x2560 --threads 1
  bitnet plugins judge ./libmy_kernels.so --task task.json --history judged.jsonl
  bitnet plugins trust ./libmy_kernels.so
  bitnet plugins list
  bitnet plugins forget ./libmy_kernels.so";

#[derive(Debug, Subcommand)]
enum Command {
    New(new::NewArgs),
    Add(keep::AddArgs),
    Update(keep::UpdateArgs),
    Remove(keep::RemoveArgs),
    Verify(VerifyArgs),
    List(ListArgs),
    Bench(BenchArgs),
    Judge(judge::JudgeArgs),
    Trust(TrustArgs),
    Forget(ForgetArgs),
}

/// Check a plugin with the whole gate, in a separate process, and print a report
///
/// Exit status 0 if the plugin passed, 1 if it was refused or if this machine could try none of its kernels. This suits
/// the CI of a plugin's author. The verdict is kept and replaces an earlier one. It does not end a quarantine (`forget` does). The plugin needs no pin.
#[derive(Debug, Args)]
struct VerifyArgs {
    /// The plugin's file
    file: PathBuf,
    /// Time limit for one case, in seconds; the limit for the whole gate is twelve times as long
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    patience: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// List the plugins that were tried on this machine with their verdicts, and the places where plugins are loaded from
#[derive(Debug, Args)]
struct ListArgs {
    /// List the installed plugins instead, and whether their sources have others now
    #[arg(long)]
    outdated: bool,
    #[command(flatten)]
    lock: keep::LockFileArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Compare the speed of a plugin's kernels with the built-in ones
#[derive(Debug, Args)]
struct BenchArgs {
    /// The plugin's file
    file: PathBuf,
    /// Weights with N output and K input features, for M rows or for typical numbers of rows. Can be repeated
    /// [default: two projections of the 2B model]
    #[arg(long, value_name = "[Mx]NxK")]
    shape: Vec<Shape>,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Pin a plugin's SHA-256, or trust a publisher
///
/// While there is a pins file, all plugins that are not in it are refused. While a publisher is trusted, `add` and `update` install
/// only plugins with a signature of a trusted publisher.
#[derive(Debug, Args)]
struct TrustArgs {
    /// The plugin's file; or a publisher's public key of minisign, or the .pub file that has it
    #[arg(value_name = "FILE|PUBLISHER")]
    file: PathBuf,
    /// A name for the publisher
    #[arg(long, default_value = "")]
    name: String,
}

/// Remove a plugin's pin, its verdicts (including a quarantine), and the copy of its file
#[derive(Debug, Args)]
struct ForgetArgs {
    /// The plugin's file, or at least 8 digits of its SHA-256
    plugin: String,
}

pub fn run(args: PluginsArgs) -> anyhow::Result<()> {
    match args.command {
        Command::New(args) => new::run(&args),
        Command::Add(args) => keep::add(&args),
        Command::Update(args) => keep::update(&args),
        Command::Remove(args) => keep::remove(&args),
        Command::Verify(args) => verify(args),
        Command::List(args) => list(&args),
        Command::Bench(args) => bench(args),
        Command::Judge(args) => judge::run(&args),
        Command::Trust(args) => trust(&args),
        Command::Forget(args) => forget(&args),
    }
}

fn verify(args: VerifyArgs) -> anyhow::Result<()> {
    let (mut config, _) = config()?;
    config.plugins.pins = None;
    config.plugins.patience = Duration::from_secs(args.patience);
    config.threads = 1;
    let report = KernelManager::new(config)?.verify_plugin(&args.file)?;
    if args.json {
        #[derive(Serialize)]
        struct Output<'a> {
            passed: bool,
            cpu: &'a str,
            #[serde(flatten)]
            report: &'a Report,
        }
        output::print_json(&Output { passed: report.passed(), cpu: cpu::model(), report: &report })?;
    } else {
        output::print(describe(&report).trim_end())?;
    }
    let file = args.file.display();
    match &report.refusal {
        Some(refusal) => bail!("{file}: the gate refuses this plugin: {refusal}"),
        None if report.passed() => Ok(()),
        None => bail!("{file}: the gate tried no kernel of this plugin on this machine; the report says why"),
    }
}

/// The gate's report as text.
fn describe(report: &Report) -> String {
    let mut text = String::new();
    let name = match &report.plugin {
        Some(plugin) => format!("{} {}, ABI {}", plugin.name, plugin.version, plugin.abi),
        None => "the descriptor was not read".into(),
    };
    // Writing to a string can't fail.
    let _ = writeln!(text, "{}: {name}\nsha256 {}", report.file.display(), report.sha256);
    let rows: Vec<_> = report
        .kernels
        .iter()
        .map(|kernel| {
            let result = match &kernel.unavailable {
                Some(reason) => format!("not tried on this machine: {reason}"),
                None => {
                    let on = kernel.device.as_ref().map_or(String::new(), |device| format!(" on {device}"));
                    format!("{} cases passed{on}", kernel.cases)
                }
            };
            vec![format!("  {}", kernel.kernel), result]
        })
        .collect();
    text.push_str(&columns(&rows));
    for layer in &report.confinement.layers {
        let _ = writeln!(text, "confined by {layer}");
    }
    for reason in &report.confinement.missing {
        let _ = writeln!(text, "not confined by {reason}");
    }
    for warning in &report.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    for line in &report.log {
        let _ = writeln!(text, "log: {line}");
    }
    let verdict = match &report.refusal {
        Some(_) => "refused",
        None if report.passed() => "passed",
        None => "not tried",
    };
    let _ = writeln!(
        text,
        "{verdict} by gate {} for ABI {} in {:.1} s, on {}",
        report.gate,
        report.abi,
        report.seconds,
        cpu::model()
    );
    text
}

#[derive(Serialize)]
struct ListOutput {
    /// The user's configuration file, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    config_file: Option<PathBuf>,
    enabled: bool,
    /// Whether plugins compute in processes of their own.
    contained: bool,
    /// Files and directories from the environment or the configuration.
    path: Vec<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_dir: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pins: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kept_in: Option<PathBuf>,
    plugins: Vec<Known>,
}

fn open_store(config: &ManagerConfig) -> PluginStore {
    PluginStore::new(config.plugins.clone(), config.cache_dir.as_deref())
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    if args.outdated {
        let plugins = keep::outdated(&args.lock)?;
        if args.json {
            #[derive(Serialize)]
            struct Output {
                plugins: Vec<keep::Outdated>,
            }
            return output::print_json(&Output { plugins });
        }
        let lines: Vec<String> = plugins.iter().map(keep::Outdated::text).collect();
        return output::print(if lines.is_empty() {
            "no plugins are installed".into()
        } else {
            lines.join("\n")
        });
    }
    let (config, config_file) = config()?;
    let store = open_store(&config);
    let output = ListOutput {
        config_file,
        enabled: config.plugins.enabled,
        contained: config.plugins.contained,
        path: config.plugins.path.clone(),
        user_dir: config.plugins.user_dir.clone(),
        pins: config.plugins.pins.clone(),
        kept_in: store.root().map(Path::to_owned),
        plugins: store.known()?,
    };
    if args.json { output::print_json(&output) } else { output::print(output.text().trim_end()) }
}

impl ListOutput {
    fn text(&self) -> String {
        let mut text = String::new();
        if self.plugins.is_empty() {
            text.push_str("No plugin has been tried on this machine yet.\n");
        } else {
            let mut rows = vec![
                ["PLUGIN", "VERSION", "ABI", "SHA256", "PINNED", "VERDICT", "FILE"]
                    .map(str::to_owned)
                    .to_vec(),
            ];
            for Known { sha256, report, pinned, .. } in &self.plugins {
                let plugin = report.as_ref().and_then(|report| report.plugin.as_ref());
                let or_dash = |text: Option<&String>| text.map_or("-".to_owned(), String::clone);
                let verdict = match report {
                    None => "none for this machine and gate".into(),
                    Some(report @ Report { refusal: None, .. }) if !report.passed() => "not tried".into(),
                    Some(Report { refusal: None, kernels, .. }) => {
                        format!("passed, {} cases", kernels.iter().map(|k| k.cases).sum::<u64>())
                    }
                    Some(Report { refusal: Some(refusal), .. }) => match refusal.stage {
                        Stage::Before => "refused".into(),
                        Stage::FirstUse | Stage::InUse => "quarantined".into(),
                    },
                };
                rows.push(vec![
                    or_dash(plugin.map(|p| &p.name)),
                    or_dash(plugin.map(|p| &p.version)),
                    or_dash(plugin.map(|p| &p.abi)),
                    sha256[..16].to_owned(),
                    pinned.map_or("-", |pinned| if pinned { "yes" } else { "no" }).to_owned(),
                    verdict,
                    report.as_ref().map_or("-".into(), |report| report.file.display().to_string()),
                ]);
            }
            text.push_str(&columns(&rows));
            for Known { sha256, report, .. } in &self.plugins {
                if let Some(refusal) = report.as_ref().and_then(|report| report.refusal.as_ref()) {
                    let _ = writeln!(text, "{}: {refusal}", &sha256[..16]);
                }
            }
        }
        text.push('\n');
        if let Some(file) = &self.config_file {
            let _ = writeln!(text, "configuration: {}", file.display());
        }
        if !self.enabled {
            text.push_str("plugins are off (BITNET_PLUGINS=off, or plugins = \"off\")\n");
        }
        if self.contained {
            text.push_str(
                "each plugin computes in a process of its own (BITNET_PLUGINS=contained, or plugins = \"contained\")\n",
            );
        }
        for place in &self.path {
            let _ = writeln!(text, "loaded from: {} (BITNET_PLUGIN_PATH, or plugin_path)", place.display());
        }
        match &self.user_dir {
            Some(dir) => {
                let _ = writeln!(
                    text,
                    "loaded from: {} (BITNET_PLUGINS=user, or plugins = \"user\")",
                    dir.display()
                );
            }
            None => text.push_str(
                "not loaded from: the user's plugin directory (BITNET_PLUGINS=user changes that)\n",
            ),
        }
        match &self.pins {
            Some(pins) => {
                let _ = writeln!(text, "pins: {} (other plugins are refused)", pins.display());
            }
            None => text.push_str("pins: none (`bitnet plugins trust` creates a pins file)\n"),
        }
        match &self.kept_in {
            Some(dir) => {
                let _ = writeln!(text, "copies and verdicts: {}", dir.display());
            }
            None => text.push_str("copies and verdicts are not kept\n"),
        }
        text
    }
}

/// Numbers of rows that are measured by default: a token, and a chunk of a prompt.
const TYPICAL_ROWS: [usize; 2] = [1, 32];

#[derive(Serialize)]
struct BenchOutput {
    plugin: PathBuf,
    cpu: &'static str,
    threads: usize,
    results: Vec<BenchResult>,
}

#[derive(Serialize)]
struct BenchResult {
    /// Number of rows that were measured. It stands for similar numbers of rows.
    m: usize,
    n: usize,
    k: usize,
    /// The plugin's fastest kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    plugin: Option<Timed>,
    /// The fastest built-in kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    built_in: Option<Timed>,
    /// How many times faster the plugin's kernel is; below 1, it is slower.
    #[serde(skip_serializing_if = "Option::is_none")]
    speedup: Option<f64>,
}

#[derive(Serialize)]
struct Timed {
    kernel: String,
    median_ns: u64,
}

/// The configuration for a measurement of one plugin, and the place of its cache: no earlier measurement is used, and this one
/// is not kept.
fn alone() -> anyhow::Result<(ManagerConfig, tempfile::TempDir)> {
    let cache = tempfile::tempdir().context("cannot make a temporary directory")?;
    let (mut config, _) = config()?;
    config.cache_dir = Some(cache.path().to_owned());
    config.tune_budget = Duration::from_secs(300);
    config.force = None;
    config.plugins.path.clear();
    config.plugins.user_dir = None;
    Ok((config, cache))
}

fn bench(args: BenchArgs) -> anyhow::Result<()> {
    let kernel_args = KernelArgs {
        threads: args.threads,
        pin: false,
        kernel: None,
        plugins: vec![args.file.clone()],
        optimise_for: None,
        strict: None,
    };
    let (config, _cache) = alone()?;
    let (manager, refused) = kernel_args.configure_with(config)?;
    if let Some(reason) = refused.first() {
        bail!("{reason}");
    }
    let report = manager.report();
    let foreign: Vec<_> =
        report.kernels.iter().filter(|k| k.sha256.is_some()).map(|k| k.kernel.clone()).collect();
    let mut shapes = args.shape;
    if shapes.is_empty() {
        shapes.extend(["2560x2560", "6912x2560"].map(|s| s.parse::<Shape>().expect("a shape")));
    }
    let mut results = Vec::new();
    for Shape { m, n, k } in shapes {
        for m in m.map_or(TYPICAL_ROWS.to_vec(), |m| vec![m]) {
            let ranking = manager.explain(m, (n, k));
            let fastest = |of_plugin: bool| {
                let candidates = ranking.candidates.iter();
                let of = candidates.filter(|c| foreign.iter().any(|id| id == c.kernel()) == of_plugin);
                of.filter_map(|c| {
                    Some(Timed { kernel: c.kernel().into(), median_ns: c.measurement.median_ns? })
                })
                .min_by_key(|timed| timed.median_ns)
            };
            let (plugin, built_in) = (fastest(true), fastest(false));
            let speedup = plugin
                .as_ref()
                .zip(built_in.as_ref())
                .map(|(p, b)| b.median_ns as f64 / p.median_ns.max(1) as f64);
            results.push(BenchResult { m: ranking.rows, n, k, plugin, built_in, speedup });
        }
    }
    let output = BenchOutput { plugin: args.file, cpu: cpu::model(), threads: report.threads, results };
    if args.json { output::print_json(&output) } else { output::print(output.text().trim_end()) }
}

impl BenchOutput {
    fn text(&self) -> String {
        let mut rows = vec![
            ["M", "N", "K", "PLUGIN", "TIME", "BUILT IN", "TIME", "SPEEDUP"].map(str::to_owned).to_vec(),
        ];
        for BenchResult { m, n, k, plugin, built_in, speedup } in &self.results {
            let timed = |timed: &Option<Timed>| match timed {
                Some(Timed { kernel, median_ns }) => {
                    [kernel.clone(), format!("{:.1} us", *median_ns as f64 / 1e3)]
                }
                None => ["-".to_owned(), "not measured".to_owned()],
            };
            let [plugin, plugin_time] = timed(plugin);
            let [built_in, built_in_time] = timed(built_in);
            let speedup = speedup.map_or("-".into(), |speedup| format!("{speedup:.2} x"));
            rows.push(vec![
                m.to_string(),
                n.to_string(),
                k.to_string(),
                plugin,
                plugin_time,
                built_in,
                built_in_time,
                speedup,
            ]);
        }
        let threads = bitnet_burn_engine::text::count(self.threads as u64, "thread");
        format!("{}\n{}, {threads}\n", columns(&rows), self.cpu)
    }
}

/// The path of the pins file, which may not exist.
fn pins_file(config: &ManagerConfig) -> anyhow::Result<PathBuf> {
    let file = config.plugins.pins.clone().or_else(store::default_pins);
    file.context("no home directory for the pins file; BITNET_PLUGIN_PINS names another file")
}

/// Reads the pins; none if the file does not exist.
fn pins(file: &Path) -> anyhow::Result<Vec<(String, String)>> {
    if file.exists() { Ok(store::read_pins(file)?) } else { Ok(Vec::new()) }
}

fn trust(args: &TrustArgs) -> anyhow::Result<()> {
    if let Some(key) = publishers::public_key(&args.file)? {
        return publishers::trust(key, &args.name);
    }
    let (mut config, _) = config()?;
    let file = pins_file(&config)?;
    config.plugins.pins = None;
    let stored = open_store(&config).admit(&args.file)?;
    let mut pins = pins(&file)?;
    if !pins.iter().any(|(pin, _)| *pin == stored.sha256) {
        pins.push((stored.sha256.clone(), stored.origin.display().to_string()));
        store::write_pins(&file, &pins).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let others = bitnet_burn_engine::text::count(pins.len() as u64, "plugin");
    output::print(format_args!(
        "{}  {}\n{others} pinned in {}; other plugins are refused",
        stored.sha256,
        stored.origin.display(),
        file.display()
    ))
}

fn forget(args: &ForgetArgs) -> anyhow::Result<()> {
    let (mut config, _) = config()?;
    let file = pins_file(&config)?;
    config.plugins.pins = None;
    let store = open_store(&config);
    let mut pins = pins(&file)?;
    let known: Vec<String> =
        store.known()?.into_iter().map(|k| k.sha256).chain(pins.iter().map(|(pin, _)| pin.clone())).collect();
    let sha256 = match std::fs::read(&args.plugin) {
        Ok(bytes) => files::sha256(&bytes),
        Err(error) => {
            let digits = args.plugin.to_ascii_lowercase();
            if digits.len() < 8 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error).with_context(|| format!("cannot read {}", args.plugin));
            }
            let mut fits: Vec<_> = known.into_iter().filter(|sha256| sha256.starts_with(&digits)).collect();
            fits.sort();
            fits.dedup();
            match &mut fits[..] {
                [one] => std::mem::take(one),
                [] => {
                    bail!(
                        "no known plugin has a SHA-256 that begins with {digits}; see `bitnet plugins list`"
                    )
                }
                _ => bail!("{} known plugins have a SHA-256 that begins with {digits}", fits.len()),
            }
        }
    };
    let had = store.forget(&sha256).with_context(|| format!("cannot remove the files of {sha256}"))?;
    let before = pins.len();
    pins.retain(|(pin, _)| *pin != sha256);
    if pins.len() < before {
        store::write_pins(&file, &pins).with_context(|| format!("cannot write {}", file.display()))?;
        if pins.is_empty() {
            let file = file.display();
            output::warning(format_args!(
                "{file} has no pins any more, so all plugins are refused; delete the file to load plugins without pins"
            ));
        }
    } else if !had {
        bail!("no plugin with SHA-256 {sha256} is known");
    }
    output::print(format_args!("removed: {sha256}"))
}
