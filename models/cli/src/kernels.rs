//! `bitnet kernels`: lists the kernels, and explains which one is chosen.

mod page;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context as _;
use bitnet_burn::Projection;
use bitnet_burn_engine::bench::Roof;
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::load;
use bitnet_burn_engine::text::{count, human_bytes};
use bitnet_burn_formats::canonical;
use bitnet_burn_manager::cpu;
use bitnet_burn_manager::{
    Candidate, KernelManager, KernelReport, LayoutCost, LayoutPolicy, ManagerReport, Objective, REFERENCE,
    Ranking, ScaleKind, Source, Status, Strict, WeightShape, rotation_bytes,
};
use clap::Args;
use serde::Serialize;

use crate::args::{FileArgs, KernelArgs};
use crate::output::{self, columns};

/// List the kernels for ternary matmuls, and explain the choice for a shape
///
/// A kernel is `ready` if this CPU has the features that it needs, and if its results equal those of the exact
/// reference. --explain and --html measure the candidates on the shapes, or take earlier measurements from the cache
/// file. They compare them with the limits of the machine, measured at the same time: for up to 4 rows, the memory's
/// read bandwidth; for more rows, multiply-adds on registers alone.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct KernelsArgs {
    #[command(flatten)]
    file: FileArgs,
    #[command(flatten)]
    kernels: KernelArgs,
    /// Explain the choice for weights with N output and K input features, for M rows or for typical numbers of rows.
    /// Can be repeated. Without a shape: explain all shapes of the model
    #[arg(long, value_name = "[Mx]NxK", num_args = 0..=1)]
    explain: Option<Vec<Shape>>,
    /// Write the explanations as an HTML page, with bar charts against the roofline and a table
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bitnet kernels
  bitnet kernels --explain 6912x2560 --threads 1
  bitnet kernels --explain 32x6912x2560 --json
  bitnet kernels --model model.gguf --explain
  bitnet kernels --model model.gguf --html kernels.html
  bitnet kernels --plugin ./libmy_kernels.so";

/// Numbers of rows that are explained by default: a token, and chunks of a prompt.
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
        // Measuring allocates weights of this size.
        if [n, k].contains(&0)
            || m == Some(0)
            || n.checked_mul(k).is_none_or(|size| size > 1 << 30)
            || n > 1 << 20
            || k > 1 << 20
            || m.is_some_and(|m| m > 1 << 20)
        {
            return Err("sizes are at least 1 and at most 2^20, and N x K is at most 2^30".into());
        }
        Ok(Self { m, n, k })
    }
}

#[derive(Serialize)]
struct Output {
    cpu: Cpu,
    threads: usize,
    strict: Strict,
    /// The user's configuration file, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    config_file: Option<PathBuf>,
    kernels: Vec<KernelReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refused_plugins: Vec<String>,
    /// The model whose shapes are explained.
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    roof: Option<Roof>,
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

/// The shape of weights to explain.
#[derive(Clone, Debug, Serialize)]
struct Weights {
    n: usize,
    k: usize,
    /// The projections of the model that have this shape.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    projections: Vec<&'static str>,
    /// Number of matrices of the model that have this shape.
    #[serde(skip_serializing_if = "Option::is_none")]
    matrices: Option<usize>,
    /// The scales, where there are many: `f16 scales of groups of 64, activations of groups of 32`.
    #[serde(skip_serializing_if = "Option::is_none")]
    scales: Option<String>,
    #[serde(skip)]
    kind: ScaleKind,
}

/// Why a kernel is used for a shape.
#[derive(Serialize)]
struct Explanation {
    m: usize,
    #[serde(flatten)]
    weights: Weights,
    /// Number of rows that were measured. It stands for similar numbers of rows.
    rows_measured: usize,
    source: Source,
    /// The kernel that will compute.
    chosen: String,
    /// The reason for this choice.
    reason: String,
    /// The layout of the weights in memory.
    layout: String,
    weight_bytes: usize,
    /// What the layouts competed on.
    objective: Objective,
    /// The cost that the objective compares, with t(M) as the time of a layout's fastest kernel for M rows.
    rule: &'static str,
    /// The layouts, the chosen one first.
    layouts: Vec<LayoutRow>,
    candidates: Vec<CandidateRow>,
    /// Kernels that say why they do not compute this.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_for_this: Vec<NotForThis>,
}

/// A layout that competed.
#[derive(Serialize)]
struct LayoutRow {
    layout: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_ns: Option<f64>,
    /// Its fastest kernel for each number of rows that the rule names.
    fastest: Vec<FastestRow>,
}

#[derive(Serialize)]
struct FastestRow {
    rows: usize,
    kernel: String,
    median_ns: u64,
}

#[derive(Serialize)]
struct NotForThis {
    kernel: String,
    reason: String,
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
    speed: Option<Speed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

/// The speed that a time corresponds to.
#[derive(Clone, Copy, Serialize)]
pub struct Speed {
    /// In 10^9 a second: bytes of weights at 2 bits, or multiply-adds.
    g_per_s: f64,
    /// As a fraction of the machine's limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_roof: Option<f64>,
}

/// What limits the speed of a matmul.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The time to read the weights once.
    Memory,
    /// The time to compute the products.
    MultiplyAdds,
}

impl Limit {
    /// The limit for a number of rows. Up to 4 rows, candidates are timed with weights that are read from memory.
    pub fn of(rows: usize) -> Self {
        if rows <= 4 { Self::Memory } else { Self::MultiplyAdds }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Memory => "GB/s",
            Self::MultiplyAdds => "G multiply-adds/s",
        }
    }

    fn roof(self, roof: &Roof) -> Option<f64> {
        match self {
            Self::Memory => Some(roof.read_gb_per_s),
            Self::MultiplyAdds => roof.multiply_adds_g_per_s,
        }
    }

    pub fn speed(self, (m, n, k): (usize, usize, usize), ns: u64, roof: &Roof) -> Speed {
        let work = match self {
            Self::Memory => n * canonical::row_bytes(k),
            Self::MultiplyAdds => m * n * k,
        };
        let g_per_s = work as f64 / ns.max(1) as f64;
        Speed { g_per_s, of_roof: self.roof(roof).map(|roof| g_per_s / roof) }
    }
}

pub fn run(args: KernelsArgs) -> anyhow::Result<()> {
    let asked = args.explain.is_some() || args.html.is_some() || args.file.model.is_some();
    let shapes = args.explain.unwrap_or_default();
    let (mut config, config_file) = crate::engine::config()?;
    if asked {
        // No model is waiting to be loaded, so there is time to measure everything.
        config.tune_budget = Duration::from_secs(300);
    }
    let (manager, refused_plugins) = args.kernels.configure_with(config)?;
    let mut wanted: Vec<(Option<usize>, Weights)> = shapes
        .iter()
        .map(|&Shape { m, n, k }| {
            let (projections, kind) = (Vec::new(), ScaleKind::One);
            (m, Weights { n, k, projections, matrices: None, scales: None, kind })
        })
        .collect();
    let mut model = None;
    if asked && (shapes.is_empty() || args.file.model.is_some()) {
        let checkpoint = args.file.open()?;
        let config = checkpoint.config();
        model = Some(config.name.clone().unwrap_or_else(|| checkpoint.path().display().to_string()));
        wanted.extend(weights_of(&checkpoint)?.into_iter().map(|weights| (None, weights)));
    }
    let roof = match wanted.is_empty() {
        true => None,
        false => Some(
            Roof::measure(manager.pool(), rotation_bytes())
                .context("cannot allocate the buffer that measures the read bandwidth")?,
        ),
    };
    let mut explanations = Vec::new();
    for (m, weights) in wanted {
        for m in m.map_or(TYPICAL_ROWS.to_vec(), |m| vec![m]) {
            if let Some(roof) = &roof {
                explanations.push(explain(manager, m, weights.clone(), roof)?);
            }
        }
    }
    let ManagerReport { threads, strict, kernels: list, cache_file, cache_problem, .. } = manager.report();
    let output = Output {
        cpu: Cpu { model: cpu::model(), physical_cores: cpu::physical_cores(), features: cpu::features() },
        threads,
        strict,
        config_file,
        kernels: list,
        refused_plugins,
        model,
        roof,
        explanations,
        cache_file,
        cache_problem,
    };
    if let (Some(path), Some(roof)) = (&args.html, &output.roof) {
        output::write_file(path, |out| Ok(out.write_all(page::html(&output, roof).as_bytes())?))?;
    }
    if args.json { output::print_json(&output) } else { output::print(output.text().trim_end()) }
}

/// The shapes of a model's ternary matrices, in the order in which a layer uses them.
fn weights_of(checkpoint: &Checkpoint) -> anyhow::Result<Vec<Weights>> {
    let config = checkpoint.config();
    let mut all: Vec<Weights> = Vec::new();
    let layers = (0..config.n_layers)
        .flat_map(|layer| Projection::of_layer(layer, config).into_iter().map(move |p| (layer, p)));
    for (layer, projection) in layers {
        let (n, k) = projection.shape(config);
        let known = match all.iter().position(|weights| (weights.n, weights.k) == (n, k)) {
            Some(known) => known,
            // The first of a shape stands for all.
            None => {
                let Some(kind) = load::scale_kind(checkpoint, layer, projection)? else { continue };
                let scales = (kind != ScaleKind::One).then(|| kind.to_string());
                all.push(Weights { n, k, projections: Vec::new(), matrices: Some(0), scales, kind });
                all.len() - 1
            }
        };
        if !all[known].projections.contains(&projection.name()) {
            all[known].projections.push(projection.name());
        }
        all[known].matrices = all[known].matrices.map(|matrices| matrices + 1);
    }
    Ok(all)
}

fn explain(manager: &KernelManager, m: usize, weights: Weights, roof: &Roof) -> anyhow::Result<Explanation> {
    let Weights { n, k, kind, .. } = weights;
    let of = WeightShape { n, k, scales: kind };
    let choice = manager.choose(of, LayoutPolicy::Any)?;
    let ranking = manager.explain(m, of);
    let objective = manager.config().objective;
    let layout_row = |LayoutCost { layout: name, fastest, cost }: LayoutCost| LayoutRow {
        layout: layout(name.as_deref()).to_owned(),
        cost_ns: cost,
        fastest: fastest
            .into_iter()
            .filter_map(|(rows, fastest)| {
                let (kernel, median_ns) = fastest?;
                Some(FastestRow { rows, kernel, median_ns })
            })
            .collect(),
    };
    let best = ranking.candidates.iter().filter_map(|c| c.measurement.median_ns).min();
    let chosen = ranking.candidates.iter().find(|c| c.layout() == choice.layout());
    let rows = match ranking.source {
        Source::Nearest(rows) => rows,
        _ => ranking.rows,
    };
    let limit = Limit::of(rows);
    let row = |c: &Candidate| CandidateRow {
        kernel: c.kernel().to_owned(),
        layout: layout(c.layout()).to_owned(),
        median_ns: c.measurement.median_ns,
        runs: c.measurement.runs,
        times_slower: c.measurement.median_ns.zip(best).map(|(ns, best)| ns as f64 / best.max(1) as f64),
        speed: c.measurement.median_ns.map(|ns| limit.speed((rows, n, k), ns, roof)),
        note: c.measurement.note.clone(),
    };
    Ok(Explanation {
        m,
        weights,
        rows_measured: rows,
        chosen: chosen.map_or(REFERENCE, |c| c.kernel()).to_owned(),
        reason: reason(&ranking, chosen),
        layout: layout(choice.layout()).to_owned(),
        weight_bytes: choice.weight_bytes(),
        objective,
        rule: objective.rule(),
        layouts: manager.layouts(of).into_iter().map(layout_row).collect(),
        not_for_this: manager
            .reasons(m, of)
            .into_iter()
            .map(|(kernel, reason)| NotForThis { kernel, reason })
            .collect(),
        candidates: ranking.candidates.iter().map(row).collect(),
        source: ranking.source,
    })
}

fn layout(name: Option<&str>) -> &str {
    name.unwrap_or("canonical")
}

/// Why this kernel was chosen, as a sentence.
fn reason(ranking: &Ranking, chosen: Option<&Candidate>) -> String {
    let Some(chosen) = chosen else {
        return "no kernel can compute this shape, so the reference does".into();
    };
    let time = |c: &Candidate| c.measurement.median_ns;
    let Some(ns) = time(chosen) else {
        return match ranking.source {
            Source::OnlyCandidate => "the only candidate".into(),
            _ => "not measured".into(),
        };
    };
    let times = |other: u64, ns: u64| format!("{:.2} times", other as f64 / ns.max(1) as f64);
    let mut others: Vec<_> = ranking.candidates.iter().filter(|c| c.kernel() != chosen.kernel()).collect();
    others.sort_by_key(|c| time(c).unwrap_or(u64::MAX));
    match others.first().and_then(|other| Some((other, time(other)?))) {
        None => "the only measured candidate".into(),
        Some((other, slower)) if slower >= ns => {
            format!(
                "the fastest of {}: {} as fast as {}",
                others.len() + 1,
                times(slower, ns),
                other.kernel()
            )
        }
        Some((other, faster)) => format!(
            "the fastest in the layout {}, which has the lowest cost, or the fewest bytes of those within noise (5 to 15 %). \
             {} in {} would be {} as fast here",
            layout(chosen.layout()),
            other.kernel(),
            layout(other.layout()),
            times(ns, faster),
        ),
    }
}

/// The limits of the machine, in one line.
fn roof_text(roof: &Roof) -> String {
    let mut text = format!("memory reads {:.1} GB/s", roof.read_gb_per_s);
    if let Some(peak) = roof.multiply_adds_g_per_s {
        text.push_str(&format!(", registers {peak:.0} G multiply-adds/s"));
    }
    text
}

impl Output {
    fn text(&self) -> String {
        let cell = |text: &str| text.to_owned();
        let mut rows = vec![["KERNEL", "VERSION", "LAYOUT", "ORIGIN", "NEEDS", "STATUS"].map(cell).to_vec()];
        for kernel in &self.kernels {
            let status = match &kernel.status {
                Status::Ready if kernel.many_scales => "ready, for many scales".into(),
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
        let threads = count(self.threads as u64, "thread");
        text.push_str(&format!("\n{}, {threads}\n", self.cpu.model));
        if let Some(file) = &self.config_file {
            text.push_str(&format!("configuration: {}\n", file.display()));
        }
        if self.strict.any() {
            text.push_str(&format!("strict mode: {}\n", self.strict));
        }
        if let Some(roof) = &self.roof {
            text.push_str(&format!(
                "limits: {} (weights count as 2 bits in every layout)\n",
                roof_text(roof)
            ));
        }
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

impl Weights {
    /// `q, o: 60 matrices`, for weights of a model.
    fn used_by(&self) -> Option<String> {
        let matrices = self.matrices?;
        let matrices = if matrices == 1 { "1 matrix".into() } else { format!("{matrices} matrices") };
        let scales = self.scales.as_ref().map(|scales| format!(", {scales}")).unwrap_or_default();
        Some(format!("{}: {matrices}{scales}", self.projections.join(", ")))
    }
}

impl Explanation {
    /// Where the measurements come from.
    fn provenance(&self) -> String {
        let rows = count(self.rows_measured as u64, "row");
        match &self.source {
            Source::Measured => format!("measured now, with {rows}"),
            Source::Cached => format!("measured earlier, with {rows}"),
            Source::OnlyCandidate => "not measured: there is only one candidate".into(),
            Source::Nearest(0) => "not measured: the time budget was used up".into(),
            Source::Nearest(rows) => {
                format!("measured with {rows} rows instead: the time budget was used up")
            }
        }
    }

    fn text(&self) -> String {
        let Self { m, weights: Weights { n, k, .. }, rows_measured, chosen, layout, .. } = self;
        let used_by = self.weights.used_by().map(|used_by| format!("{used_by}, ")).unwrap_or_default();
        let mut text = format!(
            "{used_by}[{m}, {k}] x [{n}, {k}]ᵀ: {chosen}, weights in layout {layout}, {} ({})\n    {}\n",
            human_bytes(self.weight_bytes as u64),
            self.provenance(),
            self.reason,
        );
        let limit = Limit::of(*rows_measured);
        let rows: Vec<_> = self
            .candidates
            .iter()
            .map(|c| {
                let time =
                    c.median_ns.map_or("not measured".into(), |ns| format!("{:.1} us", ns as f64 / 1e3));
                let slower = c.times_slower.map_or(String::new(), |times| format!("{times:.2} x"));
                let mark = if c.kernel == self.chosen { "*" } else { " " };
                let speed = c.speed.map_or(String::new(), |speed| {
                    let of_roof = speed.of_roof.map_or(String::new(), |f| format!(", {:.0} %", f * 100.0));
                    format!("{:.1} {}{of_roof}", speed.g_per_s, limit.unit())
                });
                let runs = if c.runs > 0 { count(c.runs.into(), "run") } else { String::new() };
                let note = c.note.clone().unwrap_or_default();
                vec![format!("  {mark} {}", c.kernel), time, slower, speed, runs, note]
            })
            .collect();
        text.push_str(&columns(&rows));
        if self.layouts.len() > 1 {
            text.push_str(&format!(
                "    layouts compete on {} (--optimise-for {}):\n",
                self.rule, self.objective
            ));
            let rows: Vec<_> = self.layouts.iter().map(|row| row.cells(layout)).collect();
            text.push_str(&columns(&rows));
        }
        for NotForThis { kernel, reason } in &self.not_for_this {
            text.push_str(&format!("    {kernel} does not compute this: {reason}\n"));
        }
        text
    }
}

impl LayoutRow {
    fn cells(&self, chosen: &str) -> Vec<String> {
        let mark = if self.layout == chosen { "*" } else { " " };
        let microseconds = |ns: f64| format!("{:.1} us", ns / 1e3);
        let fastest = self.fastest.iter().map(|FastestRow { rows, kernel, median_ns }| {
            format!("t({rows}) = {} by {kernel}", microseconds(*median_ns as f64))
        });
        vec![
            format!("    {mark} {}", self.layout),
            self.cost_ns.map_or("no cost".into(), microseconds),
            fastest.collect::<Vec<_>>().join(", "),
        ]
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
