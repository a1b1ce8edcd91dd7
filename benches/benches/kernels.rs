//! Every ternary kernel that this machine can run, on the shapes of 2B-4T, beside what the machine allows.
//!
//! For M = 1 memory is the limit: in each round every kernel goes once over copies of the weights that together
//! exceed the caches, as the layers of a model do, and a read-only stream over the same bytes. Above, it is
//! multiplying: beside the kernels stand products on registers alone, with the widest vector instruction and
//! with the matrix unit, where there is one. Figures are medians of the rounds; fractions are those of the
//! kernel's median and the roof's.
//!
//! Kernels for many scales run with scales of groups of 128 weights, and of groups of 128 and of 32 activations. Their
//! prompts are compared with those of the kernel of the same instructions for one scale.
//!
//! Arguments: names of kernels, or parts of them (default: all), `--quick` for fewer rounds. `BITNET_THREADS`
//! sets the threads, 1 if unset.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Mutex;
use std::time::Instant;

use bitnet_burn_backends::manager::with_built_in_kernels;
use bitnet_burn_backends::peak;
use bitnet_burn_benches::{Random, SHAPES, threads};
use bitnet_burn_engine::bench::Spread;
use bitnet_burn_formats::{Scales, canonical};
use bitnet_burn_manager::cpu;
use bitnet_burn_manager::memory::{Activations, PageArena, PageBuffer};
use bitnet_burn_manager::pool::Pool;
use bitnet_burn_manager::{
    CpuKernels, Job, KernelManager, LayoutPolicy, ManagerConfig, Packed, Scale, ScaleKind, Status,
    WeightShape,
};
use std::sync::Arc;

/// Copies of a matrix in one layout.
type Copies = Vec<PageBuffer>;

/// The kinds of scales that kernels for many are measured with.
const MANY: [ScaleKind; 2] = [
    ScaleKind::Groups { weights: 128, activations: 128, half: true },
    ScaleKind::Groups { weights: 128, activations: 32, half: true },
];

/// A kernel, with what it measured: seconds a matmul, by M.
struct Candidate {
    name: String,
    kind: ScaleKind,
    manager: KernelManager,
    choice: Arc<CpuKernels>,
    layout: String,
    times: HashMap<usize, Vec<f64>>,
}

fn manager(force: Option<String>) -> KernelManager {
    let config = ManagerConfig { threads: threads(), force, cache_dir: None, ..ManagerConfig::default() };
    with_built_in_kernels(config).expect("the built-in kernels")
}

/// Copies that together exceed the last-level cache, within what a machine has to spare.
fn copies(candidate: &Candidate, rows: &[u8], arena: &PageArena) -> Copies {
    let size = candidate.choice.weight_bytes();
    let cache = cpu::last_level_cache().unwrap_or(64 << 20);
    let count = (3 * cache).clamp(64 << 20, 256 << 20).div_ceil(size);
    let packed = match candidate.manager.pack(&candidate.choice, rows).expect("packs") {
        Packed::Canonical => None,
        Packed::Private(buffer) => Some(buffer),
    };
    let bytes = packed.as_ref().map_or(rows, |buffer| buffer.as_slice());
    (0..count)
        .map(|_| {
            let mut copy = arena.allocate(bytes.len(), 64).expect("memory");
            copy.as_mut_slice().copy_from_slice(bytes);
            copy
        })
        .collect()
}

impl Candidate {
    /// Seconds of a matmul with each of these weights, on average.
    fn time(&self, weights: &[PageBuffer], scales: &[Scales], x: &Activations, y: &mut [f32]) -> f64 {
        let (n, clock) = (self.choice.shape().0, Instant::now());
        for (weights, scales) in weights.iter().zip(scales.iter().cycle()) {
            let scale = match self.kind {
                ScaleKind::One => Scale::One(1.0),
                ScaleKind::Groups { .. } => Scale::Groups(scales.as_sdk()),
            };
            let job = Job { choice: &self.choice, weights: weights.as_slice(), scale, column: 0 };
            self.manager.matmul(&[job], x, black_box(y), n).expect("computes");
        }
        clock.elapsed().as_secs_f64() / weights.len() as f64
    }
}

/// Bytes a second of a stream over what the kernels read.
fn read(weights: &[PageBuffer], pool: &Pool) -> f64 {
    const PIECE: usize = 1 << 18;
    let pieces: Vec<&[u8]> = weights.iter().flat_map(|weights| weights.as_slice().chunks(PIECE)).collect();
    let clock = Instant::now();
    pool.run(pieces.len(), &|i| {
        black_box(peak::read(pieces[i]));
    });
    pieces.iter().map(|piece| piece.len()).sum::<usize>() as f64 / clock.elapsed().as_secs_f64()
}

/// Multiply-adds a second on registers, on all threads.
fn multiply(pool: &Pool, rounds: impl Fn(u32) -> Option<u64> + Sync) -> Option<f64> {
    const ROUNDS: u32 = 200_000;
    rounds(1)?;
    let sum = Mutex::new(0);
    let clock = Instant::now();
    pool.run(4 * pool.threads(), &|_| {
        let products = rounds(ROUNDS).unwrap_or(0);
        *sum.lock().expect("no panic") += products;
    });
    Some(*sum.lock().expect("no panic") as f64 / clock.elapsed().as_secs_f64())
}

fn median(samples: &[f64]) -> f64 {
    Spread::of(samples).map_or(f64::NAN, |spread| spread.median)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let wanted: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let rounds = if quick { 3 } else { 9 };
    let all = manager(None);
    let report = all.report();
    let names: Vec<(String, bool)> = report
        .kernels
        .iter()
        .filter(|kernel| kernel.status == Status::Ready && kernel.target == "cpu")
        // Portable code needs seconds for a prompt, and is there for correctness.
        .filter(|kernel| !kernel.features.is_empty())
        .map(|kernel| (kernel.kernel.clone(), kernel.many_scales))
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|wanted| name.contains(wanted.as_str())))
        .collect();
    println!("{} threads, medians of {rounds} rounds in which all take turns", report.threads);
    for (shape, n, k) in SHAPES {
        measure(shape, n, k, &names, rounds, all.pool());
    }
}

fn measure(shape: &str, n: usize, k: usize, names: &[(String, bool)], rounds: usize, pool: &Pool) {
    const PROMPTS: [usize; 3] = [32, 128, 512];
    let mut random = Random::new(n as u64);
    let weights = random.ternary(n * k);
    let mut rows = vec![0; n * canonical::row_bytes(k)];
    for (w, row) in weights.chunks_exact(k).zip(rows.chunks_exact_mut(canonical::row_bytes(k))) {
        canonical::pack_row(w, row);
    }
    let arena = PageArena::default();
    let mut layouts: HashMap<String, Copies> = HashMap::new();
    let mut candidates = Vec::new();
    let kinds = |many: &bool| if *many { &MANY[..] } else { &[ScaleKind::One][..] };
    for (name, kind) in
        names.iter().flat_map(|(name, many)| kinds(many).iter().map(move |kind| (name, *kind)))
    {
        let manager = manager(Some(name.clone()));
        let Ok(choice) = manager.choose(WeightShape { n, k, scales: kind }, LayoutPolicy::Any) else {
            continue;
        };
        let layout = choice.layout().unwrap_or("i2_s").to_owned();
        let candidate =
            Candidate { name: name.clone(), kind, manager, choice, layout, times: HashMap::new() };
        layouts.entry(candidate.layout.clone()).or_insert_with(|| copies(&candidate, &rows, &arena));
        candidates.push(candidate);
    }
    // As many as copies of the weights, so that decode reads them from memory, too.
    let count = layouts.values().map(Vec::len).max().unwrap_or(0);
    let values: Vec<f32> = (0..n * k.div_ceil(128)).map(|i| (1 + i % 64) as f32 / 1024.0).collect();
    let scales: Vec<Scales> =
        (0..count).map(|_| Scales::from_rows(&values, n, k, 128).expect("scales of the shape")).collect();
    let mut x: HashMap<(usize, usize), Activations> = HashMap::new();
    for m in [1].into_iter().chain(PROMPTS) {
        let floats = random.floats(m * k);
        for group in [0, 32, 128] {
            x.insert((m, group), Activations::from_groups(&floats, k, group));
        }
    }
    let mut y = vec![0.0; PROMPTS[PROMPTS.len() - 1] * n];
    let mut reads: HashMap<&str, Vec<f64>> = HashMap::new();
    let (mut vector, mut matrix) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        // The first one warms up.
        let keep = round > 0;
        vector.extend(multiply(pool, peak::vector_multiply_adds).filter(|_| keep));
        matrix.extend(multiply(pool, peak::multiply_adds).filter(|_| keep));
        for (layout, copies) in &layouts {
            let speed = read(copies, pool);
            if keep {
                reads.entry(layout).or_default().push(speed);
            }
        }
        for candidate in &mut candidates {
            let copies = &layouts[&candidate.layout];
            for m in [1].into_iter().chain(PROMPTS) {
                let weights = match m {
                    1 => &copies[..],
                    _ => std::slice::from_ref(&copies[round % copies.len()]),
                };
                let x = &x[&(m, candidate.kind.activation_group())];
                let time = candidate.time(weights, &scales, x, &mut y[..m * n]);
                if keep {
                    candidate.times.entry(m).or_default().push(time);
                }
            }
        }
    }
    let (vector, matrix) = (median(&vector) / 1e9, median(&matrix) / 1e9);
    println!();
    println!("{shape} [{n}, {k}]; registers: {vector:.0} G multiply-adds/s on vectors, {matrix:.0} at most");
    println!(
        "| kernel | bits | M = 1, us | of the stream | M = 32, ms | 128 | 512 | of the vectors' peak | of one scale's |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for candidate in &candidates {
        let of_scales = if candidate.kind == ScaleKind::One { 0 } else { n * k.div_ceil(128) * 2 };
        let bytes = (candidate.choice.weight_bytes() + of_scales) as f64;
        let time = |m: usize| median(&candidate.times[&m]);
        let stream = bytes / time(1) / median(&reads[candidate.layout.as_str()]);
        let peaks = PROMPTS.map(|m| format!("{:.2}", (m * n * k) as f64 / time(m) / 1e9 / vector));
        let name = match candidate.kind {
            ScaleKind::One => format!("`{}`", candidate.name),
            kind => format!("`{}`, activations by {}", candidate.name, kind.activation_group()),
        };
        let plain = candidate.name.trim_end_matches("-scaled");
        let plain = candidates.iter().find(|other| other.name == plain && other.kind == ScaleKind::One);
        let of_one = PROMPTS.map(|m| match plain {
            Some(plain) => format!("{:.2}", median(&plain.times[&m]) / time(m)),
            None => "-".into(),
        });
        println!(
            "| {name} | {:.1} | {:.1} | {stream:.2} | {:.2} | {:.2} | {:.2} | {} | {} |",
            8.0 * bytes / (n * k) as f64,
            time(1) * 1e6,
            time(32) * 1e3,
            time(128) * 1e3,
            time(512) * 1e3,
            peaks.join(", "),
            of_one.join(", "),
        );
        assert!(candidate.manager.report().reference_calls == 0, "{} fell back", candidate.name);
    }
    let streams: Vec<String> = layouts
        .keys()
        .map(|layout| format!("{layout} {:.1}", median(&reads[layout.as_str()]) / 1e9))
        .collect();
    println!("streams, GB/s: {}", streams.join(", "));
}
