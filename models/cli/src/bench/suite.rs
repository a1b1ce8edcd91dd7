//! Several models and settings in one run, as one table: Markdown, and a page with bars.
//!
//! Each run is a process of its own, because a process has one choice of kernels and one peak of memory.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use bitnet_burn_engine::bench::{BenchReport, Figure};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::BenchArgs;
use super::turns::common;
use crate::output;
use crate::page::{self, escape};

/// Several runs, and where their table goes.
#[derive(Debug, Args)]
pub struct SuiteArgs {
    /// Measure all runs that a TOML file lists, each in a process of its own, and print one table in Markdown. A run is
    /// [[run]] with args = ["-m", "model.gguf", "--threads", "1"], and a name if it should have one. Flags of this command
    /// are those of all runs
    #[arg(
        long,
        help_heading = "Suite",
        value_name = "FILE",
        conflicts_with_all = ["record", "against", "require", "profile", "receipt", "gpu_suite", "ab", "against_program", "soak"]
    )]
    pub suite: Option<PathBuf>,
    /// Write the table of --suite to a file
    #[arg(long, help_heading = "Suite", value_name = "FILE", requires = "suite")]
    markdown: Option<PathBuf>,
    /// Write the table of --suite with bars as an HTML page
    #[arg(long, help_heading = "Suite", value_name = "FILE", requires = "suite")]
    html: Option<PathBuf>,
}

/// The file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Suite {
    run: Vec<Run>,
}

/// A run of it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    name: Option<String>,
    args: Vec<String>,
}

/// A run that was measured.
#[derive(Serialize)]
struct Measured {
    name: String,
    report: BenchReport,
}

/// The columns of the table. The first two have bars on the page.
const COLUMNS: [(&str, Figure); 6] = [
    ("Prefill", Figure::Prefill),
    ("Decode", Figure::Decode),
    ("First token", Figure::FirstToken),
    ("Token, 99 %", Figure::TokenP99),
    ("Peak memory", Figure::PeakMemory),
    ("Load", Figure::Load),
];

pub fn run(args: &BenchArgs, path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("--suite: cannot read {shown}"))?;
    let suite: Suite = toml::from_str(&text).with_context(|| format!("--suite {shown}"))?;
    if suite.run.is_empty() {
        bail!("--suite {shown}: it has no [[run]]");
    }
    let shared = common(std::env::args_os(), false);
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let bar = output::bar(suite.run.len() as u64, "measuring [{bar:30}] {pos}/{len}");
    let mut measured = Vec::new();
    for Run { name, args } in suite.run {
        let name = name.unwrap_or_else(|| args.join(" "));
        let report =
            measure(&program, &shared, &args).with_context(|| format!("--suite {shown}, run {name:?}"))?;
        measured.push(Measured { name, report });
        bar.inc(1);
    }
    bar.finish_and_clear();
    let table = markdown(&measured);
    if let Some(path) = &args.suite.markdown {
        output::write_file(path, |out| Ok(out.write_all(table.as_bytes())?))?;
    }
    if let Some(path) = &args.suite.html {
        output::write_file(path, |out| Ok(out.write_all(html(&measured).as_bytes())?))?;
    }
    match args.json {
        true => output::print_json(&measured),
        false if args.suite.markdown.is_none() && args.suite.html.is_none() => {
            output::print(table.trim_end())
        }
        false => Ok(()),
    }
}

fn measure(program: &Path, shared: &[OsString], args: &[String]) -> anyhow::Result<BenchReport> {
    let mut command = Command::new(program);
    command.arg("bench").args(args).args(shared).arg("--json").stdin(Stdio::null());
    let output = command.output().context("cannot start a process")?;
    if !output.status.success() {
        bail!("`bench` failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("`bench --json` printed no report")
}

/// What the runs have in common: the processor.
fn machine() -> String {
    format!("{}, {}", bitnet_burn_manager::cpu::model(), std::env::consts::OS)
}

/// The model with its kernels' threads, for people.
fn model(report: &BenchReport) -> String {
    let file = report.model.path.file_name().unwrap_or(report.model.path.as_os_str());
    format!("{}, {}", file.to_string_lossy(), report.execution.device)
}

fn cell(report: &BenchReport, figure: Figure) -> Option<String> {
    figure.of(report).map(|value| figure.show(value))
}

/// The least and the most of a rate.
fn range(report: &BenchReport, figure: Figure) -> Option<[f64; 2]> {
    let spread = match figure {
        Figure::Prefill => report.result.prefill_tokens_per_s,
        Figure::Decode => report.result.decode_tokens_per_s,
        _ => None,
    };
    spread.map(|spread| [spread.min, spread.max])
}

fn markdown(measured: &[Measured]) -> String {
    // A bar would be a column's end.
    let plain = |text: &str| text.replace('|', "\\|").replace(['\n', '\r'], " ");
    let mut table = format!("Measured by `bitnet bench --suite` on {}.\n\n", plain(&machine()));
    let heads: Vec<&str> = COLUMNS.iter().map(|(head, _)| *head).collect();
    // Writing to a string can't fail.
    let _ = writeln!(table, "| Run | Model | Threads | {} |", heads.join(" | "));
    let _ = writeln!(table, "| --- | --- | --- |{}", " --- |".repeat(heads.len()));
    for Measured { name, report } in measured {
        let _ = write!(table, "| {} | {} | {}", plain(name), plain(&model(report)), report.execution.threads);
        for (_, figure) in COLUMNS {
            let range = range(report, figure).map(|[min, max]| format!(" ({min:.2} to {max:.2})"));
            let cell = cell(report, figure).unwrap_or_else(|| "-".to_owned());
            let _ = write!(table, " | {cell}{}", range.unwrap_or_default());
        }
        table.push_str(" |\n");
    }
    table
}

fn html(measured: &[Measured]) -> String {
    let intro = format!(
        "<p>{}.</p>\n<p class=\"muted\">Measured by <code>bitnet bench --suite</code>, version {}. Rates are the median of all \
         repetitions, and longer is faster. Each run is a process of its own.</p>",
        escape(&machine()),
        env!("CARGO_PKG_VERSION")
    );
    let mut body = String::new();
    for (head, figure) in COLUMNS.into_iter().take(2) {
        let most = measured.iter().filter_map(|run| figure.of(&run.report)).fold(0.0, f64::max);
        if most > 0.0 {
            let _ = writeln!(body, "<section>\n<h2>{head}</h2>\n<figure>");
            for Measured { name, report } in measured {
                push_bar(&mut body, name, report, figure, most);
            }
            body.push_str("</figure>\n</section>\n");
        }
    }
    body.push_str(
        "<section>\n<h2>All figures</h2>\n<div class=\"wide\"><table>\n<thead><tr><th>Run</th><th>Model</th>",
    );
    body.push_str("<th class=\"n\">Threads</th>");
    for (head, _) in COLUMNS {
        let _ = write!(body, "<th class=\"n\">{head}</th>");
    }
    body.push_str("</tr></thead>\n<tbody>\n");
    for Measured { name, report } in measured {
        let (name, model, threads) = (escape(name), escape(&model(report)), report.execution.threads);
        let _ = write!(body, "<tr><td>{name}</td><td>{model}</td><td class=\"n\">{threads}</td>");
        for (_, figure) in COLUMNS {
            let cell = cell(report, figure).map_or("&ndash;".into(), |cell| escape(&cell));
            let _ = write!(body, "<td class=\"n\">{cell}</td>");
        }
        body.push_str("</tr>\n");
    }
    body.push_str("</tbody>\n</table></div>\n</section>\n");
    page::html("Figures", &intro, &body)
}

fn push_bar(body: &mut String, name: &str, report: &BenchReport, figure: Figure, most: f64) {
    let _ = write!(body, "<div class=\"row\"><span class=\"name\">{}</span>", escape(name));
    match figure.of(report) {
        Some(value) => {
            let width = value / most * 100.0;
            let range =
                range(report, figure).map(|[min, max]| format!("{min:.1} to {max:.1}")).unwrap_or_default();
            let _ = write!(
                body,
                "<span class=\"track\"><i style=\"width:{width:.2}%\"></i></span><span class=\"n\">{}</span>\
                 <span></span><span class=\"n\">{range}</span>",
                escape(&figure.show(value)),
            );
        }
        None => body.push_str("<span class=\"track\"><em>not measured</em></span>"),
    }
    body.push_str("</div>\n");
}
