//! Measurements that are judged: kept in a history, compared with it, and compared with what is required.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bitnet_burn_engine::Engine;
use bitnet_burn_engine::bench::{
    Against, BenchOptions, BenchReport, Figure, Record, Requirement, Requirements, Settings, Unit,
};
use bitnet_burn_engine::text::count;
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use serde::Serialize;

/// What happens with the figures.
#[derive(Debug, Args)]
pub struct JudgeArgs {
    /// Add this measurement to a history: a line of JSON with the machine, the program, the settings and the report
    #[arg(long, help_heading = "Judging", value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Compare prefill, decode and memory with the last program in a history that --record wrote, with the same machine and
    /// settings. Speeds are divided by the machine's speed in each round. If something is worse by more than --tolerance,
    /// beyond noise, the exit status is 3
    #[arg(long, help_heading = "Judging", value_name = "FILE")]
    pub against: Option<PathBuf>,
    /// The largest loss that --against, --against-program and --soak accept, as a part of 1
    #[arg(
        long,
        help_heading = "Judging",
        value_name = "FRACTION",
        default_value = "0.05",
        value_parser = fraction
    )]
    pub tolerance: f64,
    /// Required figures, separated by commas, such as decode>=15,first-token<=0.2s,peak-memory<=1.2GB; or a TOML file of
    /// lines such as decode = ">= 15". The names: decode, prefill (tokens/s), first-token, start-to-first-token, token-p50,
    /// token-p95, token-p99, token-max, load (s, ms, us), peak-memory, kv-cache, bytes-per-token (kB, MB, GB), of-bandwidth
    /// (0 to 1). If one is missed, the exit status is 3
    #[arg(
        long,
        help_heading = "Judging",
        value_name = "LIST",
        value_parser = OsStringValueParser::new().try_map(requirements)
    )]
    pub require: Option<Requirements>,
}

/// A part of 1, for clap.
pub fn fraction(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.0..1.0).contains(&value) => Ok(value),
        _ => Err("it must be at least 0 and below 1: 0.05 is 5 percent".into()),
    }
}

/// A time, for clap.
pub fn duration(text: &str) -> Result<Duration, String> {
    let seconds = Unit::Seconds.parse(text)?;
    match Duration::try_from_secs_f64(seconds) {
        // A month is more than anybody waits for, and less than clocks can add.
        Ok(time) if !time.is_zero() && time <= Duration::from_secs(31 * 24 * 3600) => Ok(time),
        _ => Err(format!("`{text}`: it must be above 0, and at most 744h")),
    }
}

/// A list, or the content of a file.
fn requirements(text: OsString) -> Result<Requirements, String> {
    let path = Path::new(&text);
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml")) {
        let content =
            std::fs::read_to_string(path).map_err(|error| format!("cannot read the file: {error}"))?;
        let table: toml::Table = content.parse().map_err(|error| format!("{error}"))?;
        let pair = |(name, value): (&'_ String, &'_ toml::Value)| match value.as_str() {
            Some(limit) => Ok((name.clone(), limit.to_owned())),
            None => Err(format!("{name} = {value}: expected \">= VALUE\" or \"<= VALUE\"")),
        };
        let pairs = table.iter().map(pair).collect::<Result<Vec<_>, _>>()?;
        return Requirements::of_pairs(pairs.iter().map(|(name, limit)| (name.as_str(), limit.as_str())));
    }
    text.to_str().ok_or("it is not valid UTF-8")?.parse()
}

/// What a measurement is compared with.
pub struct Prepared {
    settings: Settings,
    /// Empty without `--against`.
    baseline: Vec<Record>,
}

/// What was found.
#[derive(Default, Serialize)]
pub struct Judgement {
    /// The comparison of `--against`.
    #[serde(skip_serializing_if = "Option::is_none")]
    against: Option<Against>,
    /// The verdicts of `--require`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    require: Vec<Requirement>,
    /// Whether nothing became worse, and nothing is missed; absent where nothing was judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    passed: Option<bool>,
}

impl JudgeArgs {
    /// Refuses what can't be judged, before anything is measured.
    pub fn check(&self, prompt: usize, generate: usize) -> anyhow::Result<()> {
        let unmeasured = |figure: &Figure| match figure {
            Figure::Decode | Figure::OfBandwidth => generate == 0,
            Figure::Prefill | Figure::FirstToken | Figure::StartToFirstToken => prompt == 0,
            Figure::TokenP50 | Figure::TokenP95 | Figure::TokenP99 | Figure::TokenMax => {
                prompt * generate == 0
            }
            _ => false,
        };
        if let Some(figure) = self.require.iter().flat_map(Requirements::figures).find(unmeasured) {
            bail!("--require {figure}: it is measured with {}", figure.needs());
        }
        if let Some(path) = &self.record {
            let opened = OpenOptions::new().append(true).create(true).open(path);
            opened.with_context(|| format!("--record: cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// What the measurement is compared with, which is looked for before it is made.
    pub fn prepare(&self, engine: &Engine, options: &BenchOptions) -> anyhow::Result<Prepared> {
        let settings = Settings::of(engine, options);
        let baseline = match &self.against {
            Some(path) => Record::baseline(path, &settings).context("--against")?,
            None => Vec::new(),
        };
        Ok(Prepared { settings, baseline })
    }

    /// Compares, judges and records a measurement.
    pub fn judge(&self, prepared: Prepared, report: &BenchReport) -> anyhow::Result<Judgement> {
        let mut judgement = Judgement::default();
        if let Some(required) = &self.require {
            let not_measured = |figure: Figure| {
                anyhow!("--require {figure}: it was not measured; it takes {}", figure.needs())
            };
            judgement.require = required.judge(report).map_err(not_measured)?;
        }
        if self.record.is_some() || self.against.is_some() {
            let record = Record::new(prepared.settings, report.clone());
            let record =
                record.context("cannot look at this program's file, whose size and time are recorded")?;
            judgement.against = Against::of(&prepared.baseline, &record, self.tolerance);
            if let Some(path) = &self.record {
                record.append(path).context("--record")?;
            }
        }
        let worse = judgement.against.as_ref().is_some_and(Against::is_worse);
        let missed = judgement.require.iter().any(|requirement| !requirement.kept);
        judgement.passed = (self.against.is_some() || self.require.is_some()).then_some(!worse && !missed);
        Ok(judgement)
    }
}

impl Judgement {
    /// Whether something is worse or missed.
    pub fn failed(&self) -> bool {
        self.passed == Some(false)
    }

    /// A line a verdict, for people.
    pub fn text(&self) -> String {
        let mut lines = Vec::new();
        if let Some(Against { program, runs, changes, .. }) = &self.against {
            lines.push(format!("\nagainst {} of {program}", count(*runs as u64, "run")));
            lines.extend(changes.iter().map(ToString::to_string));
        }
        if !self.require.is_empty() {
            lines.push("\nrequired".to_owned());
            lines.extend(self.require.iter().map(ToString::to_string));
        }
        lines.into_iter().map(|line| format!("{line}\n")).collect()
    }
}
