//! The tuner: kernels compete for the multiplications by weights of one shape, on a CPU or a GPU, by the same rules.
//!
//! What was measured is kept in the [cache](super::cache) and nowhere else; an order of kernels is computed from it on
//! request. A device takes part as a [`Contest`]: it says which kernels it has, and runs one when the tuner
//! says so.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::cache::Cache;
use super::measurement::{Measurement, Source};
use super::{BUCKETS, ManagerConfig, Objective, Probe, bucket, lock};

/// Runs before the clock counts, and counted runs at most.
const WARM_UP: usize = 5;
const RUNS: usize = 20;
/// After this many runs, a kernel that was never faster than this many times the best median is out.
const EARLY: usize = 4;
const CLEARLY_SLOWER: f64 = 1.3;
/// After this many runs of both, a kernel whose fastest run took longer than the slowest of the best is out too:
/// for kernels that are equally fast the odds are 1 in 924 (12 over 6).
const SEPARATE: usize = 6;
/// A kernel this many times slower for fewer rows is not tried for more.
const HOPELESS: f64 = 4.0;
/// Time for one signature, whatever its size.
const SIGNATURE_BUDGET: Duration = Duration::from_millis(600);

/// Kernels that compete for the multiplications by weights of one shape on one device.
pub trait Contest {
    /// A kernel.
    type Kernel: Clone;

    /// What the cache calls `rows` rows: rows, shape and device.
    fn signature(&self, rows: usize) -> String;

    /// The kernels that can compute `rows` rows now.
    fn kernels(&self, rows: usize) -> Vec<Self::Kernel>;

    /// What the cache calls a kernel: this exact build.
    fn name(&self, kernel: &Self::Kernel) -> String;

    /// Private layout of its weights, with their bytes; `None` for canonical.
    fn layout(&self, kernel: &Self::Kernel) -> Option<(String, usize)>;

    /// Whether kernels that were hopeless for fewer rows are left out for `rows`.
    fn prunes(&self, rows: usize) -> bool;

    /// Whether a kernel may still compute, after it was tried.
    fn ready(&self, kernel: &Self::Kernel) -> bool;

    /// A kernel of this build was found wrong, in an earlier process.
    fn reject(&self, kernel: &Self::Kernel, reason: String);

    /// Makes inputs of `rows` rows, for these kernels to run on.
    fn inputs<'a>(&'a self, rows: usize, kernels: &'a [Self::Kernel]) -> Box<dyn Inputs + 'a>;
}

/// The inputs of a measurement. Kernels are numbered as [`Contest::inputs`] got them.
pub trait Inputs {
    /// Packs the weights for a kernel and compares its result with a trusted one.
    ///
    /// # Errors
    /// Why it can't take part.
    fn admit(&mut self, kernel: usize) -> Result<(), Unfit>;

    /// Nanoseconds of a run. `turn` counts the runs of all kernels: weights of few rows are read from copies that take
    /// turns, so that no cache holds them.
    ///
    /// # Errors
    /// Why it failed.
    fn run(&mut self, kernel: usize, turn: usize) -> Result<u64, String>;
}

/// Why a kernel can't take part in a measurement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// For the measurement's note.
    pub reason: String,
    /// Its result was wrong, and the cache shall say so.
    pub rejected: bool,
}

/// What is known of the kernels of a [`Contest`] for some rows: the fastest first, then those without a time, in the
/// order of registration.
#[derive(Clone, Debug)]
pub struct Standings<K> {
    /// Rows of activations that stand for their bucket.
    pub rows: usize,
    /// The kernels.
    pub kernels: Vec<(K, Measurement)>,
    /// Where the order comes from.
    pub source: Source,
}

/// A layout of weights, with the first kernel that packs it.
#[derive(Clone, Debug)]
pub(super) struct Weighed<K> {
    /// The private layout with its bytes; `None` for canonical.
    pub layout: Option<(String, usize)>,
    pub packer: K,
    /// Its fastest kernel for each of the [`Objective`]'s rows, with its median and its fastest run.
    pub fastest: Vec<Option<(K, (u64, u64))>>,
    /// What its cost is multiplied by.
    factor: f64,
}

impl<K> Weighed<K> {
    /// The [`Objective`]'s cost, by a time of each kernel; `None` if there is not one for each term.
    pub fn cost(&self, terms: &[(usize, f64)], time: impl Fn((u64, u64)) -> u64) -> Option<f64> {
        let each = terms.iter().zip(&self.fastest);
        each.map(|(&(rows, weight), fastest)| {
            let (_, times) = fastest.as_ref()?;
            Some(self.factor * weight * time(*times) as f64 / rows as f64)
        })
        .sum()
    }
}

/// Measures kernels against each other, and keeps the results.
#[derive(Debug)]
pub(super) struct Tuner {
    cache: Mutex<Cache>,
    /// One measurement at a time: two would measure each other.
    turn: Mutex<()>,
    probe: Arc<dyn Probe>,
    objective: Objective,
    /// Nanoseconds for measurements, and those spent.
    budget: u64,
    spent: AtomicU64,
}

impl Tuner {
    pub fn new(config: &ManagerConfig) -> Self {
        Self {
            cache: Mutex::new(Cache::open(config.cache_dir.as_deref())),
            turn: Mutex::new(()),
            probe: config.probe.clone(),
            objective: config.objective,
            budget: config.tune_budget.as_nanos() as u64,
            spent: AtomicU64::new(0),
        }
    }

    /// Signatures that were measured in this process, and those that were found in the file.
    pub fn counts(&self) -> (u64, u64) {
        lock(&self.cache).counts()
    }

    pub fn cache_file(&self) -> (Option<PathBuf>, Option<String>) {
        let cache = lock(&self.cache);
        (cache.path().map(Into::into), cache.problem.clone())
    }

    /// Whether the budget leaves time for another measurement.
    pub fn has_time(&self) -> bool {
        self.spent.load(Ordering::Relaxed) < self.budget
    }

    /// What was measured under a signature.
    pub fn measurements(&self, signature: &str) -> Option<Vec<Measurement>> {
        lock(&self.cache).get(signature).cloned()
    }

    /// The kernels for `m` rows, the fastest first; measured if that has not been done on this machine.
    pub fn rank<C: Contest>(&self, contest: &C, m: usize) -> Standings<C::Kernel> {
        let index = bucket(m);
        let rows = BUCKETS[index].1;
        let kernels = contest.kernels(rows);
        if kernels.len() <= 1 {
            return Standings { rows, kernels: unmeasured(contest, kernels), source: Source::OnlyCandidate };
        }
        let signature = contest.signature(rows);
        let known = || {
            let (measurements, source) =
                lock(&self.cache).look_up(&signature, |known| covers(contest, &kernels, known))?;
            Some(Standings { rows, kernels: ordered(contest, kernels.clone(), &measurements), source })
        };
        if let Some(known) = known() {
            return known;
        }
        // What is known for fewer rows tells what need not be tried for more.
        let fewer = (index > 0 && contest.prunes(rows)).then(|| self.rank(contest, BUCKETS[index - 1].1));
        let _turn = lock(&self.turn);
        if let Some(known) = known() {
            return known;
        }
        if !self.has_time() {
            return self.nearest(contest, rows, kernels, fewer);
        }
        let started = self.probe.now();
        let measurements = self.measure(contest, rows, &kernels, fewer.as_ref());
        let elapsed = self.probe.now().saturating_sub(started);
        self.spent.fetch_add(elapsed.as_nanos() as u64, Ordering::Relaxed);
        tracing::info!(signature, ?elapsed, "tuned");
        let kernels = kernels.into_iter().filter(|kernel| contest.ready(kernel)).collect();
        let kernels = ordered(contest, kernels, &measurements);
        lock(&self.cache).insert(signature, measurements);
        Standings { rows, kernels, source: Source::Measured }
    }

    /// The kernels for a bucket of rows, the fastest first as far as it is known. Nothing is measured.
    pub fn known<C: Contest>(&self, contest: &C, index: usize) -> Standings<C::Kernel> {
        let rows = BUCKETS[index].1;
        let kernels = contest.kernels(rows);
        let known =
            lock(&self.cache).look_up(&contest.signature(rows), |known| covers(contest, &kernels, known));
        match known {
            Some((measurements, source)) => {
                Standings { rows, kernels: ordered(contest, kernels, &measurements), source }
            }
            None => self.nearest(contest, rows, kernels, None),
        }
    }

    /// There is no time to measure: the order for other rows, fewer ones if there are.
    fn nearest<C: Contest>(
        &self,
        contest: &C,
        rows: usize,
        kernels: Vec<C::Kernel>,
        fewer: Option<Standings<C::Kernel>>,
    ) -> Standings<C::Kernel> {
        let measured = |rows: usize| {
            let measurements = self.measurements(&contest.signature(rows))?;
            covers(contest, &kernels, &measurements).then_some((measurements, rows))
        };
        let near = match fewer {
            Some(fewer) => {
                let measured = match fewer.source {
                    Source::Nearest(measured) => measured,
                    _ => fewer.rows,
                };
                Some((fewer.kernels.into_iter().map(|(_, measurement)| measurement).collect(), measured))
            }
            None => BUCKETS.iter().rev().find_map(|(_, rows)| measured(*rows)),
        };
        match near {
            Some((measurements, measured)) => {
                let kernels = ordered(contest, kernels, &measurements);
                Standings { rows, kernels, source: Source::Nearest(measured) }
            }
            None => Standings { rows, kernels: unmeasured(contest, kernels), source: Source::Nearest(0) },
        }
    }

    /// Accuracy before speed: lets every kernel be compared with a trusted result, then times them in turn.
    fn measure<C: Contest>(
        &self,
        contest: &C,
        rows: usize,
        kernels: &[C::Kernel],
        fewer: Option<&Standings<C::Kernel>>,
    ) -> Vec<Measurement> {
        let mut measurements: Vec<Measurement> =
            kernels.iter().map(|kernel| Measurement::none(contest.name(kernel))).collect();
        // Minima: on a busy machine, a few runs' median may be many times too long.
        let fastest_before = fewer.and_then(|f| f.kernels.iter().filter_map(|(_, known)| known.min_ns).min());
        for measurement in &mut measurements {
            let before = fewer.and_then(|f| f.kernels.iter().find(|(_, m)| m.kernel == measurement.kernel));
            if let (Some(best), Some((_, before))) = (fastest_before, before) {
                let slower = before.min_ns.map(|ns| ns as f64 / best as f64);
                if slower.is_none_or(|s| s > HOPELESS) {
                    let note = slower.map_or("not tried: it was not for fewer rows".into(), |s| {
                        let rows = fewer.map_or(0, |f| f.rows);
                        format!("not tried: {s:.1} times slower than the best for {rows} rows")
                    });
                    measurement.note = Some(note);
                }
            }
        }

        let mut inputs = contest.inputs(rows, kernels);
        let mut racing = Vec::new();
        for (i, measurement) in measurements.iter_mut().enumerate().filter(|(_, m)| m.note.is_none()) {
            match inputs.admit(i) {
                Ok(()) => racing.push(i),
                Err(Unfit { reason, rejected }) => {
                    (measurement.note, measurement.rejected) = (Some(reason), rejected);
                }
            }
        }

        let mut times: Vec<Vec<u64>> = vec![Vec::new(); kernels.len()];
        let started = self.probe.now();
        let elapsed = || self.probe.now().saturating_sub(started);
        let mut turn = 0;
        for round in 0..WARM_UP + RUNS {
            // The first runs tell what a round costs; large matmuls need no warm-up of milliseconds.
            if racing.is_empty()
                || (elapsed() > SIGNATURE_BUDGET && racing.iter().all(|&i| !times[i].is_empty()))
            {
                break;
            }
            // A kernel for a GPU is compiled in the first round.
            let counted = round >= WARM_UP || (round > 0 && elapsed() > SIGNATURE_BUDGET / 8);
            for &i in &racing {
                turn += 1;
                match inputs.run(i, turn) {
                    Ok(ns) if counted => times[i].push(ns),
                    Ok(_) => {}
                    Err(reason) => measurements[i].note = Some(reason),
                }
            }
            let best = racing.iter().filter_map(|&i| Some((median(&times[i])?, i))).min();
            let (best, slowest) = best.map_or((0, u64::MAX), |(median, i)| {
                let slowest = times[i].iter().max().copied().filter(|_| times[i].len() >= SEPARATE);
                (median, slowest.unwrap_or(u64::MAX))
            });
            racing.retain(|&i| {
                let runs = times[i].len();
                let fastest = times[i].iter().min().copied().unwrap_or(0);
                let out = runs >= EARLY && fastest as f64 > best as f64 * CLEARLY_SLOWER
                    || runs >= SEPARATE && fastest > slowest;
                if out && measurements[i].note.is_none() {
                    measurements[i].note = Some("clearly slower; stopped early".into());
                }
                !out && measurements[i].note.is_none()
            });
            if racing.len() == 1 && times[racing[0]].len() >= EARLY * 2 {
                break;
            }
        }
        for (measurement, times) in measurements.iter_mut().zip(&times) {
            measurement.median_ns = median(times);
            measurement.min_ns = times.iter().min().copied();
            measurement.runs = times.len() as u32;
        }
        measurements
    }

    /// The layouts that weights can have, the one that they should have first: the [`Objective`] says which.
    pub fn layouts<C: Contest>(&self, contest: &C) -> Vec<Weighed<C::Kernel>> {
        let terms = self.objective.terms();
        let mut layouts: Vec<Weighed<C::Kernel>> = Vec::new();
        // Some kernels are for decode alone, some for prompts. The first rows come first: the time for measuring may be spent
        // behind them.
        for kernel in terms.iter().flat_map(|&(rows, _)| contest.kernels(rows)) {
            let layout = contest.layout(&kernel);
            if layouts.iter().all(|known| known.layout != layout) {
                let fastest = vec![None; terms.len()];
                layouts.push(Weighed { layout, packer: kernel, fastest, factor: 1.0 });
            }
        }
        if layouts.len() < 2 {
            return layouts;
        }
        for (i, &(rows, _)) in terms.iter().enumerate() {
            for (kernel, measurement) in self.rank(contest, rows).kernels {
                let (Some(median), Some(min)) = (measurement.median_ns, measurement.min_ns) else { continue };
                let layout = contest.layout(&kernel);
                for known in layouts.iter_mut().filter(|known| known.layout == layout) {
                    let faster = known.fastest[i].as_ref().is_none_or(|(_, best)| (median, min) < *best);
                    if faster {
                        known.fastest[i] = Some((kernel.clone(), (median, min)));
                    }
                }
            }
        }
        if let Some((limit, factor)) = self.objective.limit() {
            let first = |layout: &Weighed<C::Kernel>| {
                layout.fastest[0].as_ref().map(|(_, (median, _))| *median as f64)
            };
            let lowest = layouts.iter().filter_map(first).fold(f64::INFINITY, f64::min);
            for layout in &mut layouts {
                if first(layout).is_some_and(|time| time > lowest * limit) {
                    layout.factor = factor;
                }
            }
        }
        let cost =
            |layout: &Weighed<C::Kernel>| layout.cost(terms, |(median, _)| median).unwrap_or(f64::INFINITY);
        layouts.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
        let (lowest, fastest) = (cost(&layouts[0]), layouts[0].cost(terms, |(_, min)| min));
        let noise = (lowest / fastest.unwrap_or(lowest).max(1.0)).clamp(1.05, 1.15);
        // Where nothing was measured, the lowest cost is infinite.
        let alike = layouts.iter().take_while(|&layout| cost(layout) <= lowest * noise).count();
        // Canonical weights are there anyway.
        layouts[..alike].sort_by_key(|known| known.layout.as_ref().map_or(0, |(_, bytes)| *bytes));
        layouts
    }

    /// A kernel that packs the layout that weights should have; `None` for the canonical one.
    pub fn packer<C: Contest>(&self, contest: &C) -> Option<C::Kernel> {
        let chosen = self.layouts(contest).into_iter().next()?;
        chosen.layout.is_some().then_some(chosen.packer)
    }

    /// What layouts compete on.
    pub fn objective(&self) -> Objective {
        self.objective
    }

    /// Live calls have timed some of the kernels of a signature, by name, on the scale of its measurements: who asks
    /// next knows, in the next process too.
    pub fn remeasured(&self, signature: &str, times: impl Iterator<Item = (String, u64)>) {
        let mut cache = lock(&self.cache);
        let Some(mut measurements) = cache.get(signature).cloned() else { return };
        for (name, time) in times {
            if let Some(known) = measurements.iter_mut().find(|m| m.kernel == name) {
                (known.median_ns, known.min_ns) = (Some(time), Some(time));
                known.runs = super::slot::RACE_TURNS as u32;
                known.note = Some("compared again over live calls".into());
            }
        }
        cache.replace(signature.to_owned(), measurements);
    }
}

/// The middle one of some times.
fn median(times: &[u64]) -> Option<u64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

fn unmeasured<C: Contest>(contest: &C, kernels: Vec<C::Kernel>) -> Vec<(C::Kernel, Measurement)> {
    let none = |kernel: C::Kernel| (kernel.clone(), Measurement::none(contest.name(&kernel)));
    kernels.into_iter().map(none).collect()
}

/// Whether every kernel has a measurement.
fn covers<C: Contest>(contest: &C, kernels: &[C::Kernel], measurements: &[Measurement]) -> bool {
    let mut names = kernels.iter().map(|kernel| contest.name(kernel));
    names.all(|name| measurements.iter().any(|m| m.kernel == name))
}

/// The kernels in the order of their measurements; those that have none come last, in the order of registration.
fn ordered<C: Contest>(
    contest: &C,
    kernels: Vec<C::Kernel>,
    measurements: &[Measurement],
) -> Vec<(C::Kernel, Measurement)> {
    let mut ordered = unmeasured(contest, kernels);
    for (_, measurement) in &mut ordered {
        if let Some(known) = measurements.iter().find(|m| m.kernel == measurement.kernel) {
            *measurement = known.clone();
        }
    }
    ordered.retain(|(kernel, measurement)| {
        // Found wrong by an earlier process: the same build is wrong still.
        if measurement.rejected && contest.ready(kernel) {
            contest.reject(kernel, measurement.note.clone().unwrap_or_default());
        }
        !measurement.rejected
    });
    ordered.sort_by_key(|(_, measurement)| measurement.median_ns.unwrap_or(u64::MAX));
    ordered
}
