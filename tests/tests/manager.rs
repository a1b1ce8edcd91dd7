//! The kernel manager over the built-in kernels: every kernel is exact, choices are remembered and
//! explained, and what is not there is named.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use bitnet_burn::backends::manager::with_built_in_kernels;
use bitnet_burn_formats::reference;
use bitnet_burn_manager::cpu;
use bitnet_burn_manager::memory::Activations;
use bitnet_burn_manager::{
    CpuKernels, Job, KernelManager, LayoutPolicy, ManagerConfig, ManagerError, Packed, Source, Status, Strict,
};
use bitnet_burn_plugin::abi::CANONICAL_ALIGNMENT;
use bitnet_burn_tests::{Random, assert_same_bits, canonical_rows};
use proptest::prelude::*;

fn quiet() -> ManagerConfig {
    ManagerConfig { threads: 1, tune_budget: Duration::ZERO, ..ManagerConfig::default() }
}

fn built_in(config: ManagerConfig) -> KernelManager {
    with_built_in_kernels(config).unwrap_or_else(|error| panic!("{error}"))
}

fn ready(manager: &KernelManager) -> Vec<String> {
    let kernels = manager.report().kernels.into_iter();
    let ready = kernels.filter(|k| k.status == Status::Ready && k.target == "cpu" && !k.many_scales);
    ready.map(|k| k.kernel).collect()
}

/// A manager for every kernel of this machine, forced, with 1, 2 and 3 threads.
fn forced() -> &'static [(String, KernelManager)] {
    static MANAGERS: OnceLock<Vec<(String, KernelManager)>> = OnceLock::new();
    MANAGERS.get_or_init(|| {
        let kernels = ready(&built_in(quiet()));
        assert!(kernels.len() >= 2, "{kernels:?}");
        let each = kernels.iter().flat_map(|kernel| {
            (1..=3).map(move |threads| {
                let config =
                    ManagerConfig { threads, force: Some(kernel.clone()), strict: Strict::ALL, ..quiet() };
                (format!("{kernel} on {threads} threads"), built_in(config))
            })
        });
        each.collect()
    })
}

/// Weights in the layout of a choice.
fn packed(manager: &KernelManager, choice: &CpuKernels, canonical: &[u8]) -> Vec<u8> {
    match manager.pack(choice, canonical).unwrap() {
        Packed::Canonical => canonical.to_vec(),
        Packed::Private(buffer) => buffer.as_slice().to_vec(),
    }
}

/// Weights at an address that is as well aligned as the layout promises, and no better.
struct Aligned(Vec<u8>, usize, usize);

impl Aligned {
    fn new(choice: &CpuKernels, bytes: &[u8]) -> Self {
        let mut buffer = vec![0; bytes.len() + 2 * 4096];
        let from = buffer.as_ptr().align_offset(4096)
            + if choice.layout().is_none() { CANONICAL_ALIGNMENT } else { 0 };
        buffer[from..from + bytes.len()].copy_from_slice(bytes);
        Self(buffer, from, bytes.len())
    }

    fn bytes(&self) -> &[u8] {
        &self.0[self.1..self.1 + self.2]
    }
}

/// Activations of one kind: random, or one of those that make trouble.
fn activations(random: &mut Random, m: usize, k: usize, kind: usize) -> Activations {
    let mut x = random.floats(m * k);
    for (row, x) in x.chunks_exact_mut(k).enumerate() {
        match (kind + row) % 6 {
            0 => x.fill(3.5),                                      // all 127
            1 => x.fill(-3.5),                                     // all -127
            2 => x.fill(0.0),                                      // all zero
            3 => (0..k).for_each(|i| x[i] = [1e30, -1e30][i % 2]), // large, and alternating
            4 => x.iter_mut().for_each(|v| *v *= 1e-30),           // below the smallest scale
            _ => {}
        }
    }
    Activations::from_rows(&x, k)
}

/// Several matrices over the same activations, through a manager, and through the reference.
fn check(manager: &KernelManager, what: &str, m: usize, ns: &[usize], k: usize, kind: usize, seed: u64) {
    let mut random = Random(seed);
    let x = activations(&mut random, m, k, kind);
    let gap = random.below(5);
    let stride = ns.iter().map(|n| n + gap).sum::<usize>() + random.below(9);
    let poison = f32::from_bits(0x7fc0_dead);
    let (mut y, mut want) = (vec![poison; m * stride], vec![poison; m * stride]);
    let (mut choices, mut buffers, mut column) = (Vec::new(), Vec::new(), 0);
    for (i, &n) in ns.iter().enumerate() {
        let weights = match (kind + i) % 5 {
            0 => vec![1; n * k],
            1 => vec![-1; n * k],
            2 => vec![0; n * k],
            _ => random.ternary(n * k),
        };
        let canonical = canonical_rows(&weights, k);
        let choice = manager.choose((n, k), LayoutPolicy::Any).unwrap();
        let bytes = packed(manager, &choice, &canonical);
        assert_eq!(bytes.len(), choice.weight_bytes(), "{what} [{n}, {k}]");
        assert!(
            manager.unpack(&choice, &bytes).unwrap() == canonical,
            "{what}: unpack(pack(w)) of [{n}, {k}]"
        );
        let scale = 0.01 + random.float().abs();
        let out = &mut want[column..];
        reference::matmul(&canonical, n, k, scale, x.q(), x.stride(), x.scale(), m, out, stride);
        buffers.push((Aligned::new(&choice, &bytes), scale, column));
        choices.push(choice);
        column += n + gap;
    }
    let jobs: Vec<Job> = choices
        .iter()
        .zip(&buffers)
        .map(|(choice, (weights, scale, column))| Job {
            choice,
            weights: weights.bytes(),
            scale: (*scale).into(),
            column: *column,
        })
        .collect();
    manager.matmul(&jobs, &x, &mut y, stride).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_same_bits(&y, &want, &format!("{what}: [{m}, {k}] x {ns:?}, kind {kind}"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_kernel_equals_the_reference(
        m in prop_oneof![Just(1usize), 2usize..6, 6usize..40],
        ns in prop::collection::vec(1usize..100, 1..4),
        k in prop_oneof![1usize..40, 40usize..700, Just(128), Just(256), Just(384), Just(1000)],
        kind in 0usize..6,
        seed in any::<u64>(),
    ) {
        for (what, manager) in forced() {
            check(manager, what, m, &ns, k, kind, seed);
        }
    }
}

#[test]
fn every_kernel_equals_the_reference_on_shapes_of_models() {
    // Prefill blocks of activations, long rows, and the head of a layer of an MLP.
    for (m, ns, k) in
        [(1, &[640, 160, 160][..], 2560), (70, &[33], 6912), (300, &[64, 32], 256), (3, &[100], 784)]
    {
        for (what, manager) in forced() {
            check(manager, what, m, ns, k, 5, 1);
        }
    }
}

#[test]
fn the_kernels_that_run_are_the_forced_ones() {
    for (what, manager) in forced() {
        check(manager, what, 2, &[17], 130, 5, 2);
        let report = manager.report();
        let used: Vec<_> = report.kernels.iter().filter(|k| k.calls > 0).map(|k| k.kernel.as_str()).collect();
        assert_eq!(used, [what.split(' ').next().unwrap()]);
        assert_eq!((report.reference_calls, report.fallbacks.len(), report.tuned), (0, 0, 0), "{what}");
    }
}

#[test]
fn rows_that_are_not_finite_become_nan_alone() {
    for (what, manager) in forced() {
        let mut x = Random(3).floats(3 * 200);
        x[200 + 77] = f32::NAN;
        x[400 + 3] = f32::INFINITY;
        let x = Activations::from_rows(&x, 200);
        let canonical = canonical_rows(&Random(4).ternary(5 * 200), 200);
        let choice = manager.choose((5, 200), LayoutPolicy::Any).unwrap();
        let weights = Aligned::new(&choice, &packed(manager, &choice, &canonical));
        let mut y = vec![0.0; 15];
        let job = Job { choice: &choice, weights: weights.bytes(), scale: 1.0.into(), column: 0 };
        manager.matmul(&[job], &x, &mut y, 5).unwrap();
        assert!(y[..5].iter().all(|v| v.is_finite()), "{what}");
        assert!(y[5..].iter().all(|v| v.is_nan()), "{what}: {y:?}");
    }
}

/// Chooses and measures what a model of one shape needs; the order of the kernels for each bucket.
fn start(dir: &Path, threads: usize) -> (KernelManager, Vec<Vec<String>>) {
    let config = ManagerConfig {
        threads,
        cache_dir: Some(dir.to_owned()),
        tune_budget: Duration::from_secs(60),
        ..ManagerConfig::default()
    };
    let manager = built_in(config);
    let choice = manager.choose((96, 256), LayoutPolicy::Any).unwrap();
    manager.warm_up(&choice, 8);
    let order = [1, 3, 8]
        .map(|m| manager.explain(m, (96, 256)).candidates.iter().map(|c| c.kernel().to_owned()).collect());
    (manager, order.to_vec())
}

#[test]
fn the_second_start_tunes_nothing_and_a_lost_cache_only_costs_tuning() {
    let dir = tempfile::tempdir().unwrap();
    let (first, order) = start(dir.path(), 1);
    let report = first.report();
    assert!(report.tuned > 0 && report.cached == 0, "{report:?}");
    let file = report.cache_file.unwrap();
    assert!(std::fs::read_to_string(&file).unwrap().contains("\"median_ns\""), "a readable file");

    let (second, same) = start(dir.path(), 1);
    let report = second.report();
    assert!(report.tuned == 0 && report.cached > 0, "{report:?}");
    assert_eq!(order, same);
    let layouts = [&first, &second]
        .map(|m| m.choose((96, 256), LayoutPolicy::Any).unwrap().layout().map(str::to_owned));
    assert_eq!(layouts[0], layouts[1]);

    // Other threads are another machine.
    assert!(start(dir.path(), 2).0.report().tuned > 0);
    // ... which takes nothing away from this one.
    assert_eq!(start(dir.path(), 1).0.report().tuned, 0);

    for damage in ["", "{\"version\": 1, \"cpu\"", "\u{0}\u{1}\u{2}", "[1, 2]"] {
        std::fs::write(&file, damage).unwrap();
        let (damaged, _) = start(dir.path(), 1);
        let report = damaged.report();
        assert!(report.tuned > 0 && report.cached == 0, "{damage:?}: {report:?}");
        assert!(report.cache_problem.is_some(), "{damage:?} is reported");
        check(&damaged, "a manager whose cache was damaged", 2, &[96], 256, 5, 5);
        let (repaired, _) = start(dir.path(), 1);
        assert_eq!((repaired.report().tuned, repaired.report().cache_problem), (0, None), "{damage:?}");
    }
    std::fs::remove_file(&file).unwrap();
    let report = start(dir.path(), 1).0.report();
    assert!(report.tuned > 0 && report.cache_problem.is_none(), "{report:?}");
    assert_eq!(start(dir.path(), 1).0.report().tuned, 0);
}

#[test]
fn explain_lists_the_candidates_with_their_medians() {
    let manager = built_in(ManagerConfig { tune_budget: Duration::from_secs(60), ..quiet() });
    let ranking = manager.explain(1, (64, 256));
    assert_eq!((ranking.rows, &ranking.source), (1, &Source::Measured));
    let mut names: Vec<_> = ranking.candidates.iter().map(|c| c.kernel().to_owned()).collect();
    let medians: Vec<_> =
        ranking.candidates.iter().map(|c| c.measurement.median_ns.unwrap_or(u64::MAX)).collect();
    assert!(medians[0] < u64::MAX && medians.is_sorted(), "{medians:?}");
    for candidate in &ranking.candidates {
        let m = &candidate.measurement;
        assert!(
            m.median_ns.is_some() && m.runs > 0 || m.note.is_some(),
            "{m:?} says why it was not measured"
        );
    }
    names.sort();
    let mut all = ready(&manager);
    all.sort();
    assert_eq!(names, all, "every kernel of this machine is a candidate");
    // What was not measured in time says so.
    let ranking = built_in(quiet()).explain(1, (64, 256));
    assert_eq!((ranking.source, ranking.candidates.len()), (Source::Nearest(0), all.len()));
}

#[test]
fn masked_features_make_kernels_unavailable_and_say_why() {
    let everything = built_in(quiet()).report().kernels;
    for feature in cpu::features() {
        let manager = built_in(ManagerConfig { masked_features: vec![(*feature).to_owned()], ..quiet() });
        for (kernel, before) in manager.report().kernels.iter().zip(&everything) {
            if kernel.features.iter().any(|f| f == feature) {
                let Status::Unavailable(reason) = &kernel.status else {
                    panic!("{kernel:?} runs without {feature}")
                };
                assert!(reason.contains(&format!("{feature} (masked)")), "{reason}");
            } else {
                assert_eq!(kernel.status, before.status);
            }
        }
        check(&manager, &format!("without {feature}"), 3, &[20, 7], 300, 5, 6);
    }
    // Nothing but portable code.
    let masked_features = cpu::features().iter().map(|&f| f.to_owned()).collect();
    let manager = built_in(ManagerConfig { masked_features, strict: Strict::ALL, ..quiet() });
    assert!(ready(&manager).iter().all(|k| k.contains("scalar")) && !ready(&manager).is_empty());
    check(&manager, "without any feature", 3, &[20, 7], 300, 5, 6);
}

#[test]
fn a_kernel_can_be_forced_by_its_short_name_and_an_unknown_one_is_an_error() {
    let force = |name: &str| built_in(ManagerConfig { force: Some(name.into()), ..quiet() });
    force("t2-scalar").validate().unwrap();
    force("cpu/t2-scalar").validate().unwrap();
    let ranking = force("t2-scalar").explain(1, (32, 128));
    assert_eq!((ranking.candidates.len(), ranking.source), (1, Source::OnlyCandidate));
    // All kernels of a plugin.
    let ranking = force("cpu").explain(1, (32, 128));
    assert_eq!(ranking.candidates.len(), ready(&built_in(quiet())).len());
    let error = force("fastest").validate().unwrap_err().to_string();
    assert!(error.contains("no kernel is named `fastest`; there are: cpu/"), "{error}");
    assert!(error.contains("cpu/t2-scalar"), "{error}");
}

#[test]
fn strict_mode_names_what_is_missing_and_otherwise_the_reference_computes() {
    let features = ["avx2", "neon"].map(str::to_owned).to_vec();
    let all: Vec<_> = built_in(quiet()).report().kernels;
    let Some(simd) = all.iter().find(|k| k.features.iter().any(|f| features.contains(f))) else { return };
    let config = ManagerConfig { force: Some(simd.kernel.clone()), masked_features: features, ..quiet() };
    let strict = built_in(ManagerConfig { strict: Strict::ALL, ..config.clone() });
    strict.validate().unwrap();
    let error = strict.choose((64, 128), LayoutPolicy::Any).unwrap_err();
    assert!(matches!(error, ManagerError::NoKernel { .. }));
    let text = error.to_string();
    for part in ["strict mode", "[64, 128]", &simd.kernel, "(masked)"] {
        assert!(text.contains(part), "{text} names {part}");
    }
    let lenient = built_in(config);
    check(&lenient, "the reference", 2, &[64, 3], 128, 5, 7);
    let report = lenient.report();
    assert_eq!(report.reference_calls, 2, "counted: {report:?}");
    let used = report.used_since(&built_in(quiet()).report());
    assert_eq!((used.len(), used[0].kernel.as_str()), (1, "reference"));

    let empty = KernelManager::new(ManagerConfig { strict: Strict::ALL, ..quiet() }).unwrap();
    let error = empty.choose((1, 1), LayoutPolicy::Any).unwrap_err().to_string();
    assert!(error.contains("No kernel is registered"), "{error}");
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let manager = built_in(quiet());
    for (n, k) in [(0, 128), (128, 0), (1, (1 << 23) + 1)] {
        assert!(
            matches!(manager.choose((n, k), LayoutPolicy::Any), Err(ManagerError::Operands(_))),
            "[{n}, {k}]"
        );
    }
    let choice = manager.choose((8, 128), LayoutPolicy::Canonical).unwrap();
    assert_eq!(choice.layout(), None);
    assert!(manager.pack(&choice, &[0; 100]).is_err());
    let weights = Aligned::new(&choice, &canonical_rows(&[1; 8 * 128], 128));
    let x = Activations::from_rows(&[1.0; 256], 128);
    let job = |column: usize| Job { choice: &choice, weights: weights.bytes(), scale: 1.0.into(), column };
    let mut y = [0.0; 40];
    let mut fails = |jobs: &[Job], x: &Activations, length: usize, stride: usize, what: &str| {
        let error = manager.matmul(jobs, x, &mut y[..length], stride).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    fails(&[job(0)], &Activations::from_rows(&[1.0; 127], 127), 40, 20, "do not fit activations [1, 127]");
    fails(
        &[Job { weights: &weights.bytes()[1..], ..job(0) }],
        &x,
        40,
        20,
        "take 256 bytes in the layout canonical, not 255",
    );
    fails(&[job(0), job(7)], &x, 40, 20, "overlap");
    fails(&[job(13)], &x, 40, 20, "exceed");
    fails(&[job(0)], &x, 27, 20, "can't hold 2 rows of 20");
    manager.matmul(&[job(0), job(8)], &x, &mut y[..36], 20).unwrap();
}
