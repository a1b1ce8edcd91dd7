//! The CPU's kernels in the [tuner](super::tuner): rankings of them, and the inputs that they are measured on.

use std::sync::{Arc, Mutex};

use bitnet_burn_plugin::canonical;

use super::measurement::{Measurement, Source};
use super::parts::{Part, Scratch, run_parts};
use super::tuner::{Contest, Inputs, Standings, Unfit};
use super::weights::rows;
use super::{BUCKETS, Entry, KernelManager, LayoutPolicy, Scale, ScaleKind, WeightShape, lock, packing};
use crate::contained::Contained;
use crate::cpu;
use crate::gate::Stage;
use crate::memory::{Activations, PageArena, PageBuffer};
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_formats::{Scales, reference};
use bitnet_burn_plugin::sdk::groups;

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

/// How the cache names a kernel: with the exact build that was measured.
pub(super) fn identity(entry: &Entry) -> String {
    let (_, name) = entry.kernel.id().split_once('/').expect("an id is plugin/kernel");
    format!("{}/{name}", entry.kernel.plugin().identity())
}

/// The CPU's kernels for weights of a shape.
pub(super) struct CpuContest<'a> {
    pub manager: &'a KernelManager,
    pub of: WeightShape,
    pub policy: LayoutPolicy,
}

impl Contest for CpuContest<'_> {
    type Kernel = Arc<Entry>;

    fn signature(&self, rows: usize) -> String {
        let (threads, WeightShape { n, k, scales }) = (self.manager.pool.threads(), self.of);
        let groups = match scales {
            ScaleKind::One => String::new(),
            ScaleKind::Groups { weights, activations, half } => {
                format!(" groups={weights}/{activations} scales={}", if half { "f16" } else { "f32" })
            }
        };
        format!("ternary m={rows} n={n} k={k}{groups} threads={threads}")
    }

    fn kernels(&self, rows: usize) -> Vec<Arc<Entry>> {
        self.manager.candidates(rows, self.of, self.policy)
    }

    fn name(&self, entry: &Arc<Entry>) -> String {
        identity(entry)
    }

    fn layout(&self, entry: &Arc<Entry>) -> Option<(String, usize)> {
        let layout = entry.kernel.layout()?;
        Some((layout.to_owned(), entry.kernel.weight_bytes(self.of.n, self.of.k).unwrap_or(0)))
    }

    /// Measuring few rows is cheap.
    fn prunes(&self, rows: usize) -> bool {
        rows > BUCKETS[2].1
    }

    fn ready(&self, entry: &Arc<Entry>) -> bool {
        entry.ready()
    }

    fn reject(&self, entry: &Arc<Entry>, reason: String) {
        entry.reject(reason);
    }

    fn inputs<'a>(&'a self, m: usize, entries: &'a [Arc<Entry>]) -> Box<dyn Inputs + 'a> {
        let seed = (self.of.n * 31 + self.of.k) as u64;
        Box::new(CpuInputs::new(self.manager, self.of, entries, m, &mut SplitMix64::new(seed)))
    }
}

/// Private layout of weights, if they have one, and their bytes.
type Layout<'a> = (Option<&'a str>, Option<usize>);

struct CpuInputs<'a> {
    manager: &'a KernelManager,
    of: WeightShape,
    entries: &'a [Arc<Entry>],
    weights: Vec<u8>,
    /// `None` for one scale.
    scales: Option<Scales>,
    x: Activations,
    y: Vec<f32>,
    expected: Sample,
    /// Copies of the weights in each layout.
    copies: usize,
    /// The weights by layout and size, or why they can't be packed.
    layouts: Vec<(Layout<'a>, Result<Vec<PageBuffer>, String>)>,
}

impl Inputs for CpuInputs<'_> {
    fn admit(&mut self, kernel: usize) -> Result<(), Unfit> {
        let (entry, n, k) = (&self.entries[kernel], self.of.n, self.of.k);
        let layout = self.layout(kernel);
        if self.layouts.iter().all(|(known, _)| *known != layout) {
            let packed = copies(self.manager, entry, n, k, &self.weights, self.copies);
            self.layouts.push((layout, packed));
        }
        let (_, packed) = self.layouts.iter().find(|(known, _)| *known == layout).expect("packed above");
        if let Err(reason) = packed {
            return Err(Unfit { reason: reason.clone(), rejected: false });
        }
        self.y.fill(f32::NAN);
        let between_walls = || {
            let part = self.part(kernel, 0)?;
            let tried = self.manager.run_between_walls(entry, &part, &self.x);
            tried.map(drop).map_err(|failure| failure.to_string())
        };
        let right = between_walls().and_then(|()| self.run_once(kernel, 0));
        right.and_then(|()| self.expected.compare(&self.y)).map_err(|reason| {
            let reason = format!("[{}, {k}] x [{n}, {k}]ᵀ: {reason}", self.x.m());
            // If it is from a file, its verdict knows, until it is forgotten.
            self.manager.condemn(entry, Stage::FirstUse, reason.clone());
            Unfit { reason, rejected: entry.watch.is_none() }
        })
    }

    fn run(&mut self, kernel: usize, turn: usize) -> Result<u64, String> {
        let probe = &self.manager.config.probe;
        let started = probe.now();
        self.run_once(kernel, turn)?;
        Ok(probe.now().saturating_sub(started).as_nanos() as u64)
    }
}

impl<'a> CpuInputs<'a> {
    fn new(
        manager: &'a KernelManager,
        of: WeightShape,
        entries: &'a [Arc<Entry>],
        m: usize,
        random: &mut SplitMix64,
    ) -> Self {
        let WeightShape { n, k, scales: kind } = of;
        let weights = random.weights(n, k);
        let x = Activations::random(random, m, k, kind.activation_group());
        let scales = random_scales(of, random);
        let expected = Sample::new(&weights, (n, k), scale_of(&scales), &x, random);
        // Decode finds its weights in memory, not in cache: rotate over copies that no cache holds.
        let one = n * canonical::row_bytes(k);
        let copies = if m <= 4 { (rotation_bytes() / one).clamp(1, 64) } else { 1 };
        let (y, layouts) = (vec![0f32; m * n], Vec::new());
        Self { manager, of, entries, weights, scales, x, y, expected, copies, layouts }
    }

    /// Other activations.
    fn renew(&mut self, random: &mut SplitMix64) {
        let WeightShape { n, k, scales: kind } = self.of;
        self.x = Activations::random(random, self.x.m(), k, kind.activation_group());
        self.expected = Sample::new(&self.weights, (n, k), scale_of(&self.scales), &self.x, random);
    }

    fn layout(&self, kernel: usize) -> Layout<'a> {
        let kernel = &self.entries[kernel].kernel;
        (kernel.layout(), kernel.weight_bytes(self.of.n, self.of.k))
    }

    /// A kernel on one of the copies of its weights.
    fn part(&self, kernel: usize, turn: usize) -> Result<Part<'_>, String> {
        let (entry, n, k) = (&self.entries[kernel], self.of.n, self.of.k);
        let layout = self.layout(kernel);
        let packed = self.layouts.iter().find(|(known, _)| *known == layout);
        let Some((_, Ok(buffers))) = packed else { return Err("its weights are not packed".into()) };
        let bytes = buffers[turn % buffers.len()].as_slice();
        let bytes = match entry.kernel.layout() {
            Some(_) => packing::own_bytes(entry, n, k, bytes),
            None => &bytes[MISALIGNED..],
        };
        let weights = scale_of(&self.scales).weights(n, k, bytes);
        Ok(Part { kernel: &entry.kernel, of: self.of, weights, column: 0 })
    }

    fn run_once(&mut self, kernel: usize, turn: usize) -> Result<(), String> {
        let mut y = std::mem::take(&mut self.y);
        let failure = self.part(kernel, turn).map(|part| {
            let (pool, scratch) = (&self.manager.pool, Scratch::default());
            run_parts(pool, &scratch, &[part], &self.x, &mut y, self.of.n).remove(0)
        });
        self.y = y;
        match failure? {
            None => Ok(()),
            Some(failure) => Err(failure.to_string()),
        }
    }
}

/// A memory-mapped file aligns tensors to 32 bytes, so that vectors of 64 straddle cache lines: so do the canonical
/// weights of a measurement.
const MISALIGNED: usize = 32;

fn copies(
    manager: &KernelManager,
    entry: &Entry,
    n: usize,
    k: usize,
    weights: &[u8],
    copies: usize,
) -> Result<Vec<PageBuffer>, String> {
    let ordinary = PageArena::default();
    let arena = entry.kernel.contained().map_or(&ordinary, Contained::arena);
    let first = if entry.kernel.layout().is_some() {
        manager.pack_between_walls(entry, n, k, weights).map_err(|e| e.to_string())?;
        packing::pack(entry, &manager.pool, arena, n, k, weights).map_err(|e| e.to_string())?
    } else {
        let mut buffer = arena.allocate(weights.len() + MISALIGNED, 64).map_err(|e| e.to_string())?;
        buffer.as_mut_slice()[MISALIGNED..].copy_from_slice(weights);
        buffer
    };
    let (size, alignment) = (first.as_slice().len(), entry.kernel.weight_alignment().max(64));
    let rest = (1..copies).map(|_| arena.allocate(size, alignment));
    let mut rest = rest.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    let empty = Mutex::new(rest.iter_mut());
    manager.pool.run(copies - 1, &|_| {
        let buffer = lock(&empty).next();
        if let Some(buffer) = buffer {
            buffer.as_mut_slice().copy_from_slice(first.as_slice());
        }
    });
    rest.insert(0, first);
    Ok(rest)
}

impl KernelManager {
    /// The candidates for `m` rows and weights of a shape, the fastest first; measured if that has not been done yet.
    pub(super) fn rank(&self, m: usize, of: WeightShape, policy: LayoutPolicy) -> Ranking {
        let Standings { rows, kernels, source } =
            self.tuner.rank(&CpuContest { manager: self, of, policy }, m);
        let candidates =
            kernels.into_iter().map(|(entry, measurement)| Candidate { entry, measurement }).collect();
        Ranking { rows, candidates, source }
    }

    /// Live calls have timed some of a ranking's kernels (by rank, nanoseconds on tuning's scale), and
    /// another order came of it.
    pub(super) fn remeasured(&self, of: WeightShape, ranking: &Ranking, times: &[(usize, u64)]) {
        let contest = CpuContest { manager: self, of, policy: LayoutPolicy::Any };
        let times = times.iter().map(|&(rank, time)| (identity(&ranking.candidates[rank].entry), time));
        self.tuner.remeasured(&contest.signature(ranking.rows), times);
    }
}

/// Nanoseconds of each turn of a kernel, or why it did not run to the end.
pub type Turns = Result<Vec<u64>, String>;

impl KernelManager {
    /// Lets kernels (`plugin/kernel`) compute `m` rows with weights of a shape in turn, `turns` times each, in another order and
    /// with other activations in each turn, after one that is not counted. Weights and activations follow from the seed. Every
    /// result is compared with the reference in random places, outside of the time.
    ///
    /// The result has the times of those that can compute the shape, by name.
    pub fn race(
        &self,
        m: usize,
        of: impl Into<WeightShape>,
        kernels: &[&str],
        turns: usize,
        seed: u64,
    ) -> Vec<(String, Turns)> {
        let of = of.into();
        let mut entries = self.candidates(m, of, LayoutPolicy::Any);
        entries.retain(|entry| kernels.contains(&entry.kernel.id()));
        let mut random = SplitMix64::new(seed);
        let mut inputs = CpuInputs::new(self, of, &entries, m, &mut random);
        let admit = |inputs: &mut CpuInputs<'_>, i: usize| inputs.admit(i).map_err(|unfit| unfit.reason);
        let mut results: Vec<Turns> =
            (0..entries.len()).map(|i| admit(&mut inputs, i).map(|()| Vec::new())).collect();
        for turn in 0..=turns {
            inputs.renew(&mut random);
            let first = random.below(entries.len().max(1) as u64) as usize;
            for i in (0..entries.len()).map(|i| (first + i) % entries.len()) {
                let Ok(times) = &mut results[i] else { continue };
                inputs.y.fill(f32::NAN);
                let time = inputs.run(i, turn);
                let checked = time.and_then(|time| inputs.expected.compare(&inputs.y).map(|()| time));
                match checked {
                    Ok(time) if turn > 0 => times.push(time),
                    Ok(_) => {}
                    Err(reason) => results[i] = Err(reason),
                }
            }
        }
        entries.iter().map(|entry| entry.kernel.id().to_owned()).zip(results).collect()
    }
}

const SCALE: f32 = 0.021;

/// The scales that such weights are measured with.
fn random_scales(of: WeightShape, random: &mut SplitMix64) -> Option<Scales> {
    let ScaleKind::Groups { weights, half, .. } = of.scales else { return None };
    let count = of.n * groups(of.k, weights);
    let step = if half { 1.0 / 4096.0 } else { 1.0 / 4095.0 };
    let values: Vec<f32> = (0..count).map(|_| (1 + random.below(255)) as f32 * step).collect();
    Some(Scales::from_rows(&values, of.n, of.k, weights).expect("scales of this shape"))
}

fn scale_of(scales: &Option<Scales>) -> Scale<'_> {
    scales.as_ref().map_or(Scale::One(SCALE), |scales| Scale::Groups(scales.as_sdk()))
}

/// Some of the outputs that the reference has for a shape.
struct Sample(Vec<(usize, f32)>);

impl Sample {
    fn new(
        weights: &[u8],
        (n, k): (usize, usize),
        scale: Scale<'_>,
        x: &Activations,
        random: &mut SplitMix64,
    ) -> Self {
        let row = canonical::row_bytes(k);
        let of: Vec<usize> = (0..n.min(24))
            .map(|i| if i < 2 { i * (n - 1) } else { random.next_u64() as usize % n })
            .collect();
        let mut sample = Vec::new();
        for m in [0, x.m() / 2, x.m() - 1] {
            for &r in &of {
                let weights = &weights[r * row..][..row];
                let y = match scale {
                    Scale::One(scale) => {
                        let sum = reference::row_sum_products(weights, &x.q()[m * x.stride()..][..k]);
                        sum as f32 * (scale * x.scale()[m])
                    }
                    Scale::Groups(scales) => {
                        reference::scaled_row(weights, (r, k), scales, rows(x, m..m + 1))[0]
                    }
                };
                sample.push((m * n + r, y));
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
