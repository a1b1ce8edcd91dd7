//! What it costs to know which kernel computes: the time from entering `KernelManager::matmul` until the
//! manager calls the chosen kernel for the first time (it asks for the size of its workspace), checks of the
//! operands, counting, sampling and events included. One call in 64 is a sample, with its clock readings; the
//! figure is the mean of all calls but those that the system interrupted (more than 20 us: no sample takes so
//! long).
//!
//! `clock` is what reading the clock itself adds to every other figure.

use std::hint::black_box;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bitnet_burn_formats::canonical;
use bitnet_burn_manager::memory::Activations;
use bitnet_burn_manager::plugin::Plugin;
use bitnet_burn_manager::{FallbackPolicy, Job, KernelManager, LayoutPolicy, ManagerConfig};
use bitnet_burn_plugin::sdk::{ActivationsRef, KernelResult, OutputTile, TernaryKernel, WeightsRef};
use criterion::{Criterion, criterion_group, criterion_main};

/// Nanoseconds since the start.
fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// Beyond this, somebody else had the processor.
const INTERRUPTED: u64 = 20_000;

/// When a kernel was called for the first time in this matmul; 0 before.
static KNOWN: AtomicU64 = AtomicU64::new(0);

/// Exact and plain, and there are four of them to choose from.
struct Timed<const I: usize>;

impl<const I: usize> TernaryKernel for Timed<I> {
    const NAME: &'static std::ffi::CStr = [c"a", c"b", c"c", c"d"][I];

    fn workspace_size(_: usize, _: usize) -> usize {
        if KNOWN.load(Ordering::Relaxed) == 0 {
            KNOWN.store(now(), Ordering::Relaxed);
        }
        0
    }

    fn run(w: &WeightsRef, x: &ActivationsRef, _: &[u8], y: &mut OutputTile) -> KernelResult {
        for m in y.rows_m() {
            for n in y.rows_n() {
                let codes = w.canonical_row(n);
                let dot = (0..w.k()).map(|k| i32::from(codes.weight(k)) * i32::from(x.row(m)[k])).sum();
                y.set(m, n, dot, w, x);
            }
        }
        Ok(())
    }
}

bitnet_burn_plugin::plugin! {
    static PLUGIN = {
        name: c"timed", version: c"1.0.0", kernels: [Timed<0>, Timed<1>, Timed<2>, Timed<3>]
    };
}

/// What criterion takes for so many iterations of what was not interrupted.
fn mean(iterations: u64, mut once: impl FnMut() -> u64) -> Duration {
    let (mut total, mut count) = (0u64, 0u64);
    for _ in 0..iterations {
        let time = once();
        if time < INTERRUPTED {
            (total, count) = (total + time, count + 1);
        }
    }
    Duration::from_nanos((total as f64 / count.max(1) as f64 * iterations as f64) as u64)
}

fn selection(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("selection");
    group.bench_function("clock", |bencher| {
        bencher.iter_custom(|iterations| {
            mean(iterations, || {
                let before = now();
                now() - before
            })
        });
    });
    for policy in [FallbackPolicy::OnError, FallbackPolicy::Adaptive] {
        let config = ManagerConfig { threads: 1, fallback: policy, ..ManagerConfig::default() };
        let manager = KernelManager::new(config).expect("one thread");
        manager.register(Plugin::built_in(&PLUGIN).expect("a descriptor")).expect("registers");
        let (n, k) = (1, 128);
        let choice = manager.choose((n, k), LayoutPolicy::Any).expect("a kernel");
        manager.warm_up(&choice, 1);
        let weights = vec![canonical::ZERO_BYTE; n * canonical::row_bytes(k)];
        let x = Activations::from_rows(&vec![1.0; k], k);
        for count in [1, 3] {
            let jobs: Vec<Job> = (0..count)
                .map(|column| Job { choice: &choice, weights: &weights, scale: 1.0.into(), column })
                .collect();
            let mut y = vec![0.0; count];
            group.bench_function(format!("{policy}/matrices={count}"), |bencher| {
                bencher.iter_custom(|iterations| {
                    mean(iterations, || {
                        KNOWN.store(0, Ordering::Relaxed);
                        let entered = now();
                        manager.matmul(&jobs, &x, black_box(&mut y), count).expect("computes");
                        KNOWN.load(Ordering::Relaxed) - entered
                    })
                });
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = selection
}
criterion_main!(benches);
