//! What the gate can't see, because it is right for all shapes that the gate tries, or for the first calls: found at the
//! first use of a shape between walls, or at the call that does it. No caller gets a wrong result, the plugin is in
//! quarantine, and nothing of it outlives the call.

use std::path::Path;

use bitnet_burn_formats::reference;
use bitnet_burn_manager::gate::Stage;
use bitnet_burn_manager::memory::Activations;
use bitnet_burn_manager::{CpuKernels, Job, KernelManager, LayoutPolicy, Packed, Status};

use crate::hostile::{in_use, quarantined};
use crate::support::*;

/// A matmul with the result that it must have, which is computed before any plugin runs.
struct Known {
    problem: Problem,
    want: Vec<u32>,
}

const SCALE: f32 = 0.37;

impl Known {
    fn new(m: usize, n: usize, k: usize) -> Self {
        let problem = Problem::new(m, n, k);
        let (x, mut want) = (&problem.x, vec![0.0; m * n]);
        reference::matmul(&problem.weights, n, k, SCALE, x.q(), x.stride(), x.scale(), m, &mut want, n);
        Self { want: want.iter().map(|y| y.to_bits()).collect(), problem }
    }

    fn prepare(&self, manager: &KernelManager) -> (std::sync::Arc<CpuKernels>, Packed) {
        let (_, n, k) = self.problem.shape;
        manager.choose_and_pack((n, k), LayoutPolicy::Any, &self.problem.weights).unwrap()
    }

    fn check(
        &self,
        manager: &KernelManager,
        (choice, packed): &(std::sync::Arc<CpuKernels>, Packed),
        what: &str,
    ) {
        let (m, n, _) = self.problem.shape;
        let weights = match packed {
            Packed::Canonical => &self.problem.weights,
            Packed::Private(buffer) => buffer.as_slice(),
        };
        let mut y = vec![f32::NAN; m * n];
        manager
            .matmul(&[Job { choice, weights, scale: SCALE.into(), column: 0 }], &self.problem.x, &mut y, n)
            .unwrap();
        let got: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
        assert!(got == self.want, "{what}: {:?} differs from the reference", self.problem.shape);
    }
}

/// Statements, and what they must be quarantined for: for shapes that the gate does not try.
const FIRST_USE: &[(&str, &[&str], &str)] = &[
    ("workspace", &["PRIVATE", "WORKSPACE=s->k == 700 ? 64 : s->m * s->k"], "behind the workspace"),
    (
        "packed",
        &["PRIVATE", "PACKED=n == 77 ? n * k / 2 : n * k"],
        "weights [77, 700]: it wrote 1 byte behind the packed weights",
    ),
    (
        "packed_tiny",
        &["PRIVATE", "PACKED=n == 77 ? 64 : n * k"],
        "its packed_size of [77, 700] is 64 bytes; ternary weights take at least 10679",
    ),
    (
        "unpacked",
        &["PRIVATE", "IN_UNPACK=if (w->n == 77 && n1 == 77) canonical[77 * row + 5] = 1"],
        "weights [77, 700]: it wrote 6 bytes behind the unpacked weights",
    ),
    (
        "output",
        &["IN_RUN=if (w->n == 77 && tile->n1 == 77) y->y[(x->m - 1) * y->stride + 77 + 1] = 1"],
        "[2, 700] x [77, 700]ᵀ: it wrote 5 bytes behind the output",
    ),
    (
        "activations",
        &["IN_RUN=if (w->n == 77) ((volatile int8_t *)x->q)[1] = 111"],
        "[2, 700] x [77, 700]ᵀ: it wrote into the activations, an input",
    ),
    (
        "rounding_in_run",
        &["IN_RUN=if (w->n == 77) fesetround(FE_UPWARD)"],
        "[2, 700] x [77, 700]ᵀ: it changed the floating-point environment",
    ),
    (
        "rounding_in_pack",
        &["PRIVATE", "IN_PACK=if (w->n == 77) fesetround(FE_UPWARD)"],
        "weights [77, 700]: it changed the floating-point environment",
    ),
    (
        "rounding_in_unpack",
        &["PRIVATE", "IN_UNPACK=if (w->n == 77) fesetround(FE_UPWARD)"],
        "weights [77, 700]: it changed the floating-point environment",
    ),
    (
        "rounding_in_prepare",
        &["PRIVATE", "IN_PREPARE=if (x->k == 700) fesetround(FE_UPWARD)"],
        "[2, 700] x [77, 700]ᵀ: it changed the floating-point environment",
    ),
    (
        "rounding_in_workspace_size",
        &["PRIVATE", "WORKSPACE=(s->k == 700 ? fesetround(FE_UPWARD) : 0) + s->m * s->k"],
        "[2, 700] x [77, 700]ᵀ: it changed the floating-point environment",
    ),
    (
        "rounding_in_packed_size",
        &["PRIVATE", "PACKED=(n == 77 ? fesetround(FE_UPWARD) : 0) + n * k"],
        "it changed the floating-point environment",
    ),
    (
        "rounding_in_supports",
        &["IN_SUPPORTS=if (s->n == 77) fesetround(FE_UPWARD)"],
        "it changed the floating-point environment",
    ),
];

#[test]
fn what_is_wrong_for_other_shapes_than_the_gates_is_found_before_it_does_harm() {
    if !has_compiler() {
        return;
    }
    for (name, defines, reason) in FIRST_USE {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad) = (Known::new(2, 76, 640), Known::new(2, 77, 700));
        let (manager, path) = in_use(dir.path(), name, defines);
        let weights = good.prepare(&manager);
        good.check(&manager, &weights, name);
        let calls = manager.report().kernels[0].calls;
        assert_eq!(calls, 1, "{name}");
        let bad_weights = bad.prepare(&manager);
        for _ in 0..3 {
            bad.check(&manager, &bad_weights, name);
            // What was packed before lies beside it in memory.
            good.check(&manager, &weights, name);
        }
        let report = manager.report();
        assert_eq!(report.kernels[0].calls, calls, "{name}: it computes no more");
        let Status::Quarantined(text) = &report.kernels[0].status else { panic!("{name}: {report:?}") };
        assert!(text.contains(reason), "{name}: {text:?} should say {reason:?}");
        // Later processes know.
        let known = manager.store().admit(&path).unwrap();
        let refusal = manager.store().verdict(&known.sha256).unwrap().refusal.unwrap();
        assert_eq!(refusal.stage, Stage::FirstUse, "{name}: {refusal}");
    }
}

#[test]
fn a_rounding_mode_that_changes_late_does_not_outlive_the_call() {
    if !has_compiler() {
        return;
    }
    let mut ways = vec![("upward", "fesetround(FE_UPWARD)")];
    if cfg!(target_arch = "x86_64") {
        // Subnormals count as zero.
        ways.push(("subnormals", "__builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040)"));
    }
    for (name, statement) in ways {
        let dir = tempfile::tempdir().unwrap();
        // Many tiles, so that both threads run it; sums and scales whose products are rounded.
        let known = Known::new(9, 300, 1000);
        let late = format!("IN_RUN=if (w->n == 300 && TIMES(calls) >= 150) {statement}");
        let (manager, path) = in_use(dir.path(), name, &[&late]);
        let weights = known.prepare(&manager);
        add_built_in(&manager);
        let mut calls = 0;
        while manager.report().kernels[0].status == Status::Ready {
            known.check(&manager, &weights, name);
            calls += 1;
            assert!(calls < 200, "{name}: nothing was seen");
        }
        // Built-in kernels, on all threads, and the reference on this one.
        for _ in 0..20 {
            known.check(&manager, &weights, name);
        }
        assert_eq!(Known::new(9, 300, 1000).want, known.want);
        let tiny = std::hint::black_box(f32::MIN_POSITIVE) / std::hint::black_box(2.0);
        assert!(tiny > 0.0 && Activations::from_rows(&[1.0, 2.0], 2).sum() == [64 + 127]);
        let text = "[9, 1000] x [300, 1000]ᵀ: it changed the floating-point environment";
        quarantined(&manager, &path, Stage::InUse, text);
    }
}

/// The library of the C source with a function that it needs and that does not exist.
fn incomplete(dir: &Path, name: &str, flags: &[&str]) -> std::path::PathBuf {
    // Lazily bound, whatever the compiler's default is: the gate does not come to the call.
    let flags =
        [&["-DEXTERNAL=linked_nowhere", "-DIN_RUN=if (w->n == 777) linked_nowhere()", "-Wl,-z,lazy"], flags];
    build_with(&package().join("../../plugins/abi/include"), dir, name, &flags.concat())
}

#[test]
#[cfg(target_os = "linux")]
fn a_missing_symbol_or_library_is_an_error_in_the_loaders_words() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(&dir.path().join("cache"));
    let text = manager.load_plugin(&incomplete(dir.path(), "symbol", &[])).unwrap_err().to_string();
    assert!(text.contains("loading it: ") && text.contains("undefined symbol: linked_nowhere"), "{text}");
    assert!(text.contains("must be linked in"), "{text}");
    // A library beside the file, which the copy does not find.
    let (source, other) = (dir.path().join("other.c"), dir.path().join("libbesides.so"));
    std::fs::write(&source, "void linked_nowhere(void) {}\n").unwrap();
    run(std::process::Command::new(compiler()).args(["-shared", "-fPIC", "-o"]).arg(&other).arg(&source));
    let path = incomplete(dir.path(), "library", &[&format!("-L{}", dir.path().display()), "-lbesides"]);
    let text = manager.load_plugin(&path).unwrap_err().to_string();
    assert!(text.contains("libbesides.so: cannot open shared object file"), "{text}");
}
