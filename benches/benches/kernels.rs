//! Every ternary kernel that this machine can run, on the shapes of 2B-4T.
//!
//! Throughput is in bytes of weights for M = 1, where memory is the limit, and in multiply-adds above.
//! The weights rotate through copies that together exceed the last-level cache several times over, as
//! the layers of a model do; the read bandwidth of the same run stands beside the results.

use std::hint::black_box;
use std::time::Duration;

use bitnet_burn::bench::{ReadStream, Spread};
use bitnet_burn_backends::manager::with_built_in_kernels;
use bitnet_burn_benches::{Random, SHAPES, threads};
use bitnet_burn_core::cpu;
use bitnet_burn_core::formats::canonical;
use bitnet_burn_core::manager::{Job, KernelManager, LayoutPolicy, ManagerConfig, Packed, Status};
use bitnet_burn_core::memory::Activations;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Weights of one shape in one kernel's layout: enough copies that none is cached when its turn comes.
enum Copies {
    Canonical(Vec<Vec<u8>>),
    Private(Vec<Packed>),
}

impl Copies {
    fn get(&self, i: usize) -> &[u8] {
        match self {
            Self::Canonical(copies) => aligned(&copies[i % copies.len()]),
            Self::Private(copies) => match &copies[i % copies.len()] {
                Packed::Private(buffer) => buffer.as_slice(),
                Packed::Canonical => unreachable!("private layouts only"),
            },
        }
    }
}

/// Canonical weights are 32-byte aligned; the vectors are that much longer.
fn aligned(bytes: &[u8]) -> &[u8] {
    let skip = bytes.as_ptr().align_offset(canonical::BLOCK_BYTES);
    &bytes[skip..bytes.len() - (canonical::BLOCK_BYTES - skip)]
}

fn manager(force: Option<String>) -> KernelManager {
    let config = ManagerConfig { threads: threads(), force, cache_dir: None, ..ManagerConfig::default() };
    with_built_in_kernels(config).expect("the built-in kernels")
}

fn read_bandwidth(manager: &KernelManager) -> Spread {
    let stream = ReadStream::new(ReadStream::default_bytes(), manager.pool()).expect("memory");
    let samples: Vec<f64> = (0..7).map(|_| stream.gb_per_s(manager.pool())).collect();
    Spread::of(&samples).expect("seven samples")
}

fn kernels(criterion: &mut Criterion) {
    let all = manager(None);
    let report = all.report();
    let show = |when: &str| {
        let spread = read_bandwidth(&all);
        let (median, min, max) = (spread.median, spread.min, spread.max);
        println!(
            "read bandwidth {when}: {median:.1} GB/s ({min:.1} to {max:.1}), {} threads",
            report.threads
        );
    };
    show("before");
    let cache = cpu::last_level_cache().unwrap_or(64 << 20);
    for (name, n, k) in SHAPES {
        let mut random = Random::new(n as u64);
        let weights = random.ternary(n * k);
        let mut rows = vec![0; n * canonical::row_bytes(k)];
        for (w, row) in weights.chunks_exact(k).zip(rows.chunks_exact_mut(canonical::row_bytes(k))) {
            canonical::pack_row(w, row);
        }
        let copies = (3 * cache).clamp(64 << 20, 512 << 20).div_ceil(rows.len());
        for kernel in report.kernels.iter().filter(|kernel| kernel.status == Status::Ready) {
            let manager = manager(Some(kernel.kernel.clone()));
            let choice = manager.choose(n, k, LayoutPolicy::Any).expect("the kernel does the shape");
            let copies = if choice.layout().is_none() {
                let mut padded = vec![0; rows.len() + canonical::BLOCK_BYTES];
                let make = |_| {
                    let mut copy =
                        std::mem::replace(&mut padded, vec![0; rows.len() + canonical::BLOCK_BYTES]);
                    let skip = copy.as_ptr().align_offset(canonical::BLOCK_BYTES);
                    copy[skip..skip + rows.len()].copy_from_slice(&rows);
                    copy
                };
                Copies::Canonical((0..copies).map(make).collect())
            } else {
                let pack = |_| manager.pack(&choice, &rows).expect("packs");
                Copies::Private((0..copies).map(pack).collect())
            };
            for m in [1, 8, 32, 128] {
                // Portable code needs seconds for a prompt, and is there for correctness.
                if m > 8 && kernel.features.is_empty() {
                    continue;
                }
                let x = Activations::from_rows(&random.floats(m * k), k);
                let mut y = vec![0.0; m * n];
                let mut group = criterion.benchmark_group(format!("{name}_{n}x{k}_m{m}"));
                group.throughput(match m {
                    1 => Throughput::Bytes(choice.weight_bytes() as u64),
                    _ => Throughput::Elements((m * n * k) as u64),
                });
                let mut turn = 0;
                group.bench_function(BenchmarkId::from_parameter(&kernel.kernel), |bencher| {
                    bencher.iter(|| {
                        turn += 1;
                        let job = Job { choice: &choice, weights: copies.get(turn), scale: 1.0, column: 0 };
                        manager.matmul(&[job], &x, black_box(&mut y), n).expect("computes");
                    });
                });
                group.finish();
            }
            assert!(manager.report().reference_calls == 0, "{} fell back", kernel.kernel);
        }
    }
    show("after");
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = kernels
}
criterion_main!(benches);
