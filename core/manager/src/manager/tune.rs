//! Measuring kernels against each other on the caller's shape.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bitnet_burn_plugin::canonical;
use serde::{Deserialize, Serialize};

use super::cache::Cache;
use super::parts::{Part, Scratch, run_parts};
use super::slot::RACE_TURNS;
use super::{BUCKETS, Entry, KernelManager, LayoutPolicy, ManagerConfig, abi_weights, bucket, lock, packing};
use crate::cpu;
use crate::gate::Stage;
use crate::memory::{Activations, PageArena, PageBuffer};
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_formats::reference;

/// Runs before the clock counts, and counted runs at most.
const WARM_UP: usize = 5;
const RUNS: usize = 20;
/// After so many runs, a kernel that was never faster than this many times the best median is out.
const EARLY: usize = 4;
const CLEARLY_SLOWER: f64 = 1.3;
/// After so many runs of both, a kernel whose fastest run took longer than the slowest of the best is out too:
/// for kernels that are equally fast the odds are 1 in 924 (12 over 6).
const SEPARATE: usize = 6;
/// A kernel this many times slower for fewer rows is not tried for more, and a layout whose kernels are so much
/// slower for prompts is not chosen.
pub(super) const HOPELESS: f64 = 4.0;
/// Time for one signature, whatever its size.
const SIGNATURE_BUDGET: Duration = Duration::from_millis(600);

/// How fast one kernel was for one signature.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measurement {
    /// `plugin@version/kernel`, with the file's hash where there is a file.
    pub kernel: String,
    /// Median time of one matmul in nanoseconds; `None` if it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub median_ns: Option<u64>,
    /// Its fastest run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_ns: Option<u64>,
    /// Counted runs.
    #[serde(default)]
    pub runs: u32,
    /// Why it was not measured, or stopped early.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Its results were wrong.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rejected: bool,
}

impl Measurement {
    pub(super) fn none(entry: &Entry) -> Self {
        Self { kernel: identity(entry), median_ns: None, min_ns: None, runs: 0, note: None, rejected: false }
    }
}

/// A kernel in a [`Ranking`].
#[derive(Clone, Debug)]
pub struct Candidate {
    pub(super) entry: Arc<Entry>,
    /// How fast it was.
    pub measurement: Measurement,
}

impl Candidate {
    /// `plugin/kernel`.
    pub fn kernel(&self) -> &str {
        self.entry.kernel.id()
    }

    /// Layout of its weights: `plugin/layout`, or `None` for canonical.
    pub fn layout(&self) -> Option<&str> {
        self.entry.kernel.layout()
    }
}

/// Where a ranking comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Measured in this process.
    Measured,
    /// Measured earlier, on this machine, with the same candidates.
    Cached,
    /// There is nothing to compare: one candidate, or none.
    OnlyCandidate,
    /// The tuning budget was spent; taken from the measurement for this many rows, or, for 0, the
    /// order of registration.
    Nearest(usize),
}

/// Kernels for one signature, the fastest first.
#[derive(Clone, Debug)]
pub struct Ranking {
    /// Rows of activations that were measured.
    pub rows: usize,
    /// The kernels.
    pub candidates: Vec<Candidate>,
    /// Where the order comes from.
    pub source: Source,
}

/// Bytes that the weights of a measurement of few rows rotate through: what the cache near a core does not
/// hold. (A cache of many hundred megabytes, shared by a whole server, counts as memory.)
pub fn rotation_bytes() -> usize {
    cpu::last_level_cache().unwrap_or(32 << 20).clamp(8 << 20, 64 << 20) * 2
}

/// The measurements of a manager.
#[derive(Debug)]
pub(super) struct Tuner {
    pub(super) cache: Mutex<Cache>,
    /// Rankings of this process, by signature and candidates.
    rankings: Mutex<HashMap<String, Ranking>>,
    /// One measurement at a time: two would measure each other.
    turn: Mutex<()>,
    pub(super) spent: AtomicU64,
    pub(super) tuned: AtomicU64,
    pub(super) cached: AtomicU64,
}

impl Tuner {
    pub fn new(config: &ManagerConfig) -> Self {
        Self {
            cache: Mutex::new(Cache::open(config.cache_dir.as_deref())),
            rankings: Mutex::default(),
            turn: Mutex::new(()),
            spent: AtomicU64::new(0),
            tuned: AtomicU64::new(0),
            cached: AtomicU64::new(0),
        }
    }

    pub fn tuned(&self) -> u64 {
        self.tuned.load(Ordering::Relaxed)
    }

    pub fn cached(&self) -> u64 {
        self.cached.load(Ordering::Relaxed)
    }

    pub fn cache_file(&self) -> (Option<PathBuf>, Option<String>) {
        let cache = lock(&self.cache);
        (cache.path().map(Into::into), cache.problem.clone())
    }
}

/// How the cache names a kernel: with the exact build that was measured.
pub(super) fn identity(entry: &Entry) -> String {
    let (_, name) = entry.kernel.id().split_once('/').expect("an id is plugin/kernel");
    format!("{}/{name}", entry.kernel.plugin().identity())
}

impl KernelManager {
    /// The candidates for `m` rows of [n, k], the fastest first; measured if nobody has yet.
    pub(super) fn rank(&self, m: usize, n: usize, k: usize, policy: LayoutPolicy) -> Ranking {
        let index = bucket(m);
        let rows = BUCKETS[index].1;
        let entries = self.candidates(rows, n, k, policy);
        if entries.len() <= 1 {
            let candidates = entries
                .into_iter()
                .map(|entry| Candidate { measurement: Measurement::none(&entry), entry })
                .collect();
            return Ranking { rows, candidates, source: Source::OnlyCandidate };
        }
        let signature = self.signature_text(rows, n, k);
        let mut identities: Vec<_> = entries.iter().map(|entry| identity(entry)).collect();
        identities.sort();
        let key = format!("{signature} {}", identities.join(" "));
        if let Some(ranking) = lock(&self.tuner.rankings).get(&key) {
            return ranking.clone();
        }
        // What is known for fewer rows tells what need not be tried for more.
        let fewer = (index > 0 && rows > 8).then(|| self.rank(BUCKETS[index - 1].1, n, k, policy));
        let _turn = lock(&self.tuner.turn);
        if let Some(ranking) = lock(&self.tuner.rankings).get(&key) {
            return ranking.clone();
        }
        let cached = lock(&self.tuner.cache).get(&signature).and_then(|known| ranked(&entries, known));
        let ranking = if let Some(candidates) = cached {
            self.tuner.cached.fetch_add(1, Ordering::Relaxed);
            Ranking { rows, candidates, source: Source::Cached }
        } else if self.tuner.spent.load(Ordering::Relaxed) >= self.config.tune_budget.as_nanos() as u64 {
            match fewer.or_else(|| self.nearest(n, k, &identities)) {
                Some(near) => {
                    let measured = match near.source {
                        Source::Nearest(measured) => measured,
                        _ => near.rows,
                    };
                    Ranking { rows, source: Source::Nearest(measured), ..near }
                }
                None => Ranking { rows, candidates: unmeasured(entries), source: Source::Nearest(0) },
            }
        } else {
            let started = self.config.probe.now();
            let measurements = self.measure(rows, n, k, &entries, fewer.as_ref());
            let elapsed = self.config.probe.now().saturating_sub(started);
            self.tuner.spent.fetch_add(elapsed.as_nanos() as u64, Ordering::Relaxed);
            self.tuner.tuned.fetch_add(1, Ordering::Relaxed);
            tracing::info!(signature, ?elapsed, "tuned");
            let entries: Vec<_> = entries.into_iter().filter(|entry| entry.ready()).collect();
            let candidates = ranked(&entries, &measurements).unwrap_or_else(|| unmeasured(entries));
            lock(&self.tuner.cache).insert(signature, measurements);
            Ranking { rows, candidates, source: Source::Measured }
        };
        lock(&self.tuner.rankings).insert(key, ranking.clone());
        ranking
    }

    /// Live calls have timed some of a ranking's kernels (by rank, nanoseconds on tuning's scale), and
    /// another order came of it: the next ranking of the signature, and the next process, know.
    pub(super) fn remeasured(&self, n: usize, k: usize, ranking: &Ranking, times: &[(usize, u64)]) {
        let signature = self.signature_text(ranking.rows, n, k);
        let mut cache = lock(&self.tuner.cache);
        let Some(mut measurements) = cache.get(&signature).cloned() else { return };
        for &(rank, time) in times {
            let identity = identity(&ranking.candidates[rank].entry);
            if let Some(known) = measurements.iter_mut().find(|m| m.kernel == identity) {
                (known.median_ns, known.min_ns) = (Some(time), Some(time));
                known.runs = RACE_TURNS as u32;
                known.note = Some("compared again over live calls".into());
            }
        }
        cache.insert_in_passing(signature.clone(), measurements);
        drop(cache);
        lock(&self.tuner.rankings).retain(|key, _| !key.starts_with(&format!("{signature} ")));
    }

    fn signature_text(&self, rows: usize, n: usize, k: usize) -> String {
        format!("ternary m={rows} n={n} k={k} threads={}", self.pool.threads())
    }

    /// Another ranking of the same weights and candidates.
    fn nearest(&self, n: usize, k: usize, identities: &[String]) -> Option<Ranking> {
        let rankings = lock(&self.tuner.rankings);
        BUCKETS.iter().rev().find_map(|(_, rows)| {
            let key = format!("{} {}", self.signature_text(*rows, n, k), identities.join(" "));
            rankings.get(&key).cloned()
        })
    }

    /// Accuracy before speed: compares every candidate with the reference on rows of this shape, then
    /// times them in turn.
    fn measure<'a>(
        &self,
        m: usize,
        n: usize,
        k: usize,
        entries: &'a [Arc<Entry>],
        fewer: Option<&Ranking>,
    ) -> Vec<Measurement> {
        let mut random = SplitMix64::new((n * 31 + k) as u64);
        let weights = random.weights(n, k);
        let x = Activations::random(&mut random, m, k);
        let mut y = vec![0f32; m * n];
        let expected = Sample::new(&weights, n, k, &x, &mut random);

        let mut measurements: Vec<Measurement> =
            entries.iter().map(|entry| Measurement::none(entry)).collect();
        // Minima: on a busy machine, a few runs' median may be many times too long.
        let fastest_before =
            fewer.and_then(|f| f.candidates.iter().filter_map(|c| c.measurement.min_ns).min());
        for (entry, measurement) in entries.iter().zip(&mut measurements) {
            let before =
                fewer.and_then(|f| f.candidates.iter().find(|c| c.entry.kernel.id() == entry.kernel.id()));
            if let (Some(best), Some(before)) = (fastest_before, before) {
                let slower = before.measurement.min_ns.map(|ns| ns as f64 / best as f64);
                if slower.is_none_or(|s| s > HOPELESS) {
                    let note = slower.map_or("not tried: it was not for fewer rows".into(), |s| {
                        format!(
                            "not tried: {s:.1} times slower than the best for {} rows",
                            fewer.map_or(0, |f| f.rows)
                        )
                    });
                    measurement.note = Some(note);
                }
            }
        }

        // Decode finds its weights in memory, not in cache: rotate over copies that no cache holds.
        let one = n * canonical::row_bytes(k);
        let copies = if m <= 4 { (rotation_bytes() / one).clamp(1, 64) } else { 1 };
        let mut layouts = Vec::new();
        let layout_of = |entry: &'a Arc<Entry>| (entry.kernel.layout(), entry.kernel.weight_bytes(n, k));
        for (entry, measurement) in entries.iter().zip(&measurements) {
            if measurement.note.is_none() && !layouts.iter().any(|(known, _)| *known == layout_of(entry)) {
                layouts.push((layout_of(entry), self.copies(entry, n, k, &weights, copies)));
            }
        }

        let mut times: Vec<Vec<u64>> = vec![Vec::new(); entries.len()];
        let mut racing = Vec::new();
        for (i, entry) in entries.iter().enumerate() {
            if measurements[i].note.is_some() {
                continue;
            }
            let buffers = match &layouts.iter().find(|(l, _)| *l == layout_of(entry)).expect("packed above").1
            {
                Ok(buffers) => buffers,
                Err(reason) => {
                    measurements[i].note = Some(reason.clone());
                    continue;
                }
            };
            y.fill(f32::NAN);
            let result = self.run_once(entry, &buffers[0], n, k, &x, &mut y);
            if let Err(reason) = result.and_then(|_| expected.compare(&y)) {
                let reason = format!("[{m}, {k}] x [{n}, {k}]ᵀ: {reason}");
                measurements[i].note = Some(reason.clone());
                match entry.watch {
                    // Its verdict knows, until it is forgotten.
                    Some(_) => self.quarantine(entry, Stage::FirstUse, reason),
                    None => {
                        measurements[i].rejected = true;
                        entry.reject(reason);
                    }
                }
                continue;
            }
            racing.push((i, buffers));
        }

        let started = self.config.probe.now();
        let elapsed = |since: Duration| self.config.probe.now().saturating_sub(since);
        let mut turn = 0;
        for round in 0..WARM_UP + RUNS {
            // The first runs tell what a round costs; large matmuls need no warm-up of milliseconds.
            if racing.is_empty()
                || (elapsed(started) > SIGNATURE_BUDGET && racing.iter().all(|(i, _)| !times[*i].is_empty()))
            {
                break;
            }
            let counted = round >= WARM_UP || elapsed(started) > SIGNATURE_BUDGET / 8;
            for (i, buffers) in &racing {
                turn += 1;
                let clock = self.config.probe.now();
                let result = self.run_once(&entries[*i], &buffers[turn % buffers.len()], n, k, &x, &mut y);
                let elapsed = elapsed(clock).as_nanos() as u64;
                match result {
                    Ok(()) if counted => times[*i].push(elapsed),
                    Ok(()) => {}
                    Err(reason) => measurements[*i].note = Some(reason),
                }
            }
            let best = racing.iter().filter_map(|(i, _)| Some((median(&times[*i])?, *i))).min();
            let (best, slowest) = best.map_or((0, u64::MAX), |(median, i)| {
                (
                    median,
                    times[i].iter().max().copied().filter(|_| times[i].len() >= SEPARATE).unwrap_or(u64::MAX),
                )
            });
            racing.retain(|(i, _)| {
                let runs = times[*i].len();
                let fastest = times[*i].iter().min().copied().unwrap_or(0);
                let out = runs >= EARLY && fastest as f64 > best as f64 * CLEARLY_SLOWER
                    || runs >= SEPARATE && fastest > slowest;
                if out && measurements[*i].note.is_none() {
                    measurements[*i].note = Some("clearly slower; stopped early".into());
                }
                !out && measurements[*i].note.is_none()
            });
            if racing.len() == 1 && times[racing[0].0].len() >= EARLY * 2 {
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

    fn copies(
        &self,
        entry: &Entry,
        n: usize,
        k: usize,
        weights: &[u8],
        copies: usize,
    ) -> Result<Vec<PageBuffer>, String> {
        let arena = PageArena::default();
        let first = if entry.kernel.layout().is_some() {
            packing::pack(entry, &self.pool, &arena, n, k, weights).map_err(|e| e.to_string())?
        } else {
            // A memory-mapped file aligns tensors to 32 bytes, so that vectors of 64 straddle cache lines.
            let mut buffer = arena.allocate(weights.len() + 32, 64).map_err(|e| e.to_string())?;
            buffer.as_mut_slice()[32..].copy_from_slice(weights);
            buffer
        };
        let (size, alignment) = (first.as_slice().len(), entry.kernel.weight_alignment().max(64));
        let rest = (1..copies).map(|_| arena.allocate(size, alignment));
        let mut rest = rest.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
        let empty = Mutex::new(rest.iter_mut());
        self.pool.run(copies - 1, &|_| {
            let buffer = lock(&empty).next();
            if let Some(buffer) = buffer {
                buffer.as_mut_slice().copy_from_slice(first.as_slice());
            }
        });
        rest.insert(0, first);
        Ok(rest)
    }

    fn run_once(
        &self,
        entry: &Entry,
        weights: &PageBuffer,
        n: usize,
        k: usize,
        x: &Activations,
        y: &mut [f32],
    ) -> Result<(), String> {
        let bytes = weights.as_slice();
        let bytes = match entry.kernel.layout() {
            Some(_) => packing::own_bytes(entry, n, k, bytes),
            None => &bytes[32..],
        };
        let part = Part { kernel: &entry.kernel, weights: abi_weights(n, k, SCALE, bytes), column: 0 };
        match run_parts(&self.pool, &Scratch::default(), &[part], x, y, n).remove(0) {
            None => Ok(()),
            Some(failure) => Err(failure.to_string()),
        }
    }
}

const SCALE: f32 = 0.021;

/// Some of the outputs that the reference has for a shape.
struct Sample(Vec<(usize, f32)>);

impl Sample {
    fn new(weights: &[u8], n: usize, k: usize, x: &Activations, random: &mut SplitMix64) -> Self {
        let row = canonical::row_bytes(k);
        let rows: Vec<usize> = (0..n.min(24))
            .map(|i| if i < 2 { i * (n - 1) } else { random.next_u64() as usize % n })
            .collect();
        let mut sample = Vec::new();
        for m in [0, x.m() / 2, x.m() - 1] {
            for &r in &rows {
                let sum =
                    reference::row_sum_products(&weights[r * row..][..row], &x.q()[m * x.stride()..][..k]);
                sample.push((m * n + r, sum as f32 * (SCALE * x.scale()[m])));
            }
        }
        Self(sample)
    }

    fn compare(&self, y: &[f32]) -> Result<(), String> {
        match self.0.iter().find(|(i, want)| y[*i].to_bits() != want.to_bits()) {
            None => Ok(()),
            Some((i, want)) => Err(format!("y[{i}] = {:e}, the reference has {want:e}", y[*i])),
        }
    }
}

fn median(times: &[u64]) -> Option<u64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

fn unmeasured(entries: Vec<Arc<Entry>>) -> Vec<Candidate> {
    entries.into_iter().map(|entry| Candidate { measurement: Measurement::none(&entry), entry }).collect()
}

/// The entries in the order of their measurements, if every one of them has one.
fn ranked(entries: &[Arc<Entry>], measurements: &[Measurement]) -> Option<Vec<Candidate>> {
    let mut candidates = Vec::with_capacity(entries.len());
    for entry in entries {
        let identity = identity(entry);
        let measurement = measurements.iter().find(|m| m.kernel == identity)?.clone();
        if measurement.rejected {
            // Found wrong by an earlier process: the same build is wrong still.
            if entry.ready() {
                entry.reject(measurement.note.unwrap_or_default());
            }
            continue;
        }
        candidates.push(Candidate { entry: entry.clone(), measurement });
    }
    // What was not measured comes last, in the order of registration.
    candidates.sort_by_key(|c| c.measurement.median_ns.unwrap_or(u64::MAX));
    Some(candidates)
}
