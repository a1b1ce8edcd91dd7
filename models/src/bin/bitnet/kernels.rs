//! `bitnet kernels`: which kernels there are, and why which of them is used.

use std::path::PathBuf;
use std::str::FromStr;

use bitnet_burn::core::cpu;
use bitnet_burn::core::manager::{
    KernelManager, KernelReport, LayoutPolicy, ManagerReport, Source, Status, Strict,
};
use clap::Args;
use serde::Serialize;

use crate::args::KernelArgs;
use crate::output::{self, columns};

/// List the kernels for ternary matmuls, and explain the choice for a shape
///
/// A kernel is `ready` when this CPU has the features that it needs and its results were those of the exact
/// reference. For --explain, candidates are measured on the shape (or remembered from the cache file).
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct KernelsArgs {
    #[command(flatten)]
    kernels: KernelArgs,
    /// Explain the choice for weights of N output and K input features, for M rows or for typical numbers of
    /// rows; may be repeated
    #[arg(long, value_name = "[Mx]NxK")]
    explain: Vec<Shape>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bitnet kernels
  bitnet kernels --explain 6912x2560 --threads 1
  bitnet kernels --explain 32x6912x2560 --json
  bitnet kernels --plugin ./libmy_kernels.so";

/// Rows that are explained where none are named: a token, and chunks of a prompt.
const TYPICAL_ROWS: [usize; 3] = [1, 32, 128];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub m: Option<usize>,
    pub n: usize,
    pub k: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Result<Vec<usize>, _> =
            text.split(['x', 'X', '×', '*']).map(|p| p.trim().parse()).collect();
        let (m, n, k) = match numbers.as_deref() {
            Ok(&[n, k]) => (None, n, k),
            Ok(&[m, n, k]) => (Some(m), n, k),
            _ => return Err("a shape is NxK or MxNxK, such as 6912x2560".into()),
        };
        // Measuring makes weights of this size.
        if [n, k].contains(&0)
            || m == Some(0)
            || n.checked_mul(k).is_none_or(|size| size > 1 << 30)
            || k > 1 << 23
        {
            return Err("sizes are at least 1, N x K at most 2^30 and K at most 2^23".into());
        }
        Ok(Self { m, n, k })
    }
}

#[derive(Serialize)]
struct Output {
    cpu: Cpu,
    threads: usize,
    strict: Strict,
    kernels: Vec<KernelReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refused_plugins: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    explanations: Vec<Explanation>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_problem: Option<String>,
}

#[derive(Serialize)]
struct Cpu {
    model: &'static str,
    physical_cores: usize,
    features: &'static [&'static str],
}

/// Why a kernel is used for a shape.
#[derive(Serialize)]
struct Explanation {
    m: usize,
    n: usize,
    k: usize,
    /// Rows that were measured: they stand for numbers of rows nearby.
    rows_measured: usize,
    source: Source,
    /// The kernel that will compute.
    chosen: String,
    /// The layout that the weights are kept in.
    layout: String,
    weight_bytes: usize,
    candidates: Vec<CandidateRow>,
}

#[derive(Serialize)]
struct CandidateRow {
    kernel: String,
    layout: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    median_ns: Option<u64>,
    runs: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    times_slower: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

pub fn run(args: KernelsArgs) -> anyhow::Result<()> {
    let kernels = args.kernels.configure()?;
    let mut explanations = Vec::new();
    for shape in &args.explain {
        let rows = shape.m.map_or(TYPICAL_ROWS.to_vec(), |m| vec![m]);
        for m in rows {
            explanations.push(explain(kernels.manager, m, shape.n, shape.k)?);
        }
    }
    let ManagerReport { threads, strict, kernels: list, cache_file, cache_problem, .. } =
        kernels.manager.report();
    let output = Output {
        cpu: Cpu { model: cpu::model(), physical_cores: cpu::physical_cores(), features: cpu::features() },
        threads,
        strict,
        kernels: list,
        refused_plugins: kernels.refused,
        explanations,
        cache_file,
        cache_problem,
    };
    if args.json { output::print_json(&output) } else { output::print(output.text().trim_end()) }
}

fn explain(manager: &KernelManager, m: usize, n: usize, k: usize) -> anyhow::Result<Explanation> {
    let choice = manager.choose(n, k, LayoutPolicy::Any)?;
    let ranking = manager.explain(m, n, k);
    let best = ranking.candidates.iter().filter_map(|c| c.measurement.median_ns).min();
    let chosen = ranking.candidates.iter().find(|c| c.layout() == choice.layout());
    let named = |layout: Option<&str>| layout.unwrap_or("canonical").to_owned();
    let row = |c: &bitnet_burn::core::manager::Candidate| CandidateRow {
        kernel: c.kernel().to_owned(),
        layout: named(c.layout()),
        median_ns: c.measurement.median_ns,
        runs: c.measurement.runs,
        times_slower: c.measurement.median_ns.zip(best).map(|(ns, best)| ns as f64 / best.max(1) as f64),
        note: c.measurement.note.clone(),
    };
    Ok(Explanation {
        m,
        n,
        k,
        rows_measured: ranking.rows,
        chosen: chosen.map_or(bitnet_burn::core::manager::REFERENCE, |c| c.kernel()).to_owned(),
        layout: named(choice.layout()),
        weight_bytes: choice.weight_bytes(),
        candidates: ranking.candidates.iter().map(row).collect(),
        source: ranking.source,
    })
}

impl Output {
    fn text(&self) -> String {
        let cell = |text: &str| text.to_owned();
        let mut rows = vec![["KERNEL", "VERSION", "LAYOUT", "ORIGIN", "NEEDS", "STATUS"].map(cell).to_vec()];
        for kernel in &self.kernels {
            let status = match &kernel.status {
                Status::Ready => "ready".into(),
                Status::Unavailable(reason) => format!("unavailable: {reason}"),
                Status::Rejected(reason) => format!("rejected: {reason}"),
                Status::Quarantined(reason) => format!("quarantined: {reason}"),
            };
            let needs = if kernel.features.is_empty() { "nothing".into() } else { kernel.features.join(",") };
            let KernelReport { kernel, version, layout, origin, .. } = kernel;
            rows.push([kernel, version, layout, origin, &needs, &status].map(|text| cell(text)).to_vec());
        }
        let mut text = columns(&rows);
        for refused in &self.refused_plugins {
            text.push_str(&format!("refused: {refused}\n"));
        }
        for explanation in &self.explanations {
            text.push('\n');
            text.push_str(&explanation.text());
        }
        let threads = bitnet_burn::report::count(self.threads as u64, "thread");
        text.push_str(&format!("\n{}, {threads}\n", self.cpu.model));
        match (&self.cache_file, &self.cache_problem) {
            (Some(path), Some(problem)) => {
                text.push_str(&format!("measurements: {} {problem}\n", path.display()))
            }
            (Some(path), None) => text.push_str(&format!("measurements: {}\n", path.display())),
            (None, _) => text.push_str("measurements are not kept\n"),
        }
        text
    }
}

impl Explanation {
    fn text(&self) -> String {
        let Self { m, n, k, rows_measured, chosen, layout, .. } = self;
        let source = match &self.source {
            Source::Measured => format!("measured now, with {rows_measured} rows"),
            Source::Cached => format!("measured earlier, with {rows_measured} rows"),
            Source::OnlyCandidate => "not measured: there is nothing to compare".into(),
            Source::Nearest(0) => "not measured: the time for that was spent".into(),
            Source::Nearest(rows) => {
                format!("taken from the measurement with {rows} rows: the time for more was spent")
            }
        };
        let mut text = format!(
            "[{m}, {k}] x [{n}, {k}]ᵀ: {chosen}, weights in layout {layout}, {} ({source})\n",
            bitnet_burn::report::human_bytes(self.weight_bytes as u64)
        );
        let rows: Vec<_> = self
            .candidates
            .iter()
            .map(|c| {
                let time =
                    c.median_ns.map_or("not measured".into(), |ns| format!("{:.1} us", ns as f64 / 1e3));
                let slower = c.times_slower.map_or(String::new(), |times| format!("{times:.2} x"));
                let mark = if c.kernel == self.chosen { "*" } else { " " };
                let runs = if c.runs > 0 { format!("{} runs", c.runs) } else { String::new() };
                vec![format!("  {mark} {}", c.kernel), time, slower, runs, c.note.clone().unwrap_or_default()]
            })
            .collect();
        text.push_str(&columns(&rows));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        assert_eq!("6912x2560".parse(), Ok(Shape { m: None, n: 6912, k: 2560 }));
        assert_eq!("4 x 6912 X 2560".parse(), Ok(Shape { m: Some(4), n: 6912, k: 2560 }));
        for wrong in
            ["", "5", "1x2x3x4", "ax2", "0x5", "5x0", "0x1x1", "99999999999x99999999999", "1x9999999", "-1x2"]
        {
            assert!(wrong.parse::<Shape>().is_err(), "{wrong}");
        }
    }
}
