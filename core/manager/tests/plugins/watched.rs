//! Mistakes that the gate can't see, since they begin in use: the stage that catches each, and how many wrong results
//! reached the caller until then.

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::support::*;
use bitnet_burn_formats::reference;
use bitnet_burn_manager::gate::Stage;
use bitnet_burn_manager::plugin::PluginError;
use bitnet_burn_manager::{
    CpuKernels, Job, KernelManager, LayoutPolicy, ManagerConfig, ManagerError, Packed, Status,
};

/// A manager with a plugin of testdata/plugin.c, which has passed the gate, and the built-in kernels behind it.
fn with_plugin(path: &Path, change: impl FnOnce(&mut ManagerConfig)) -> KernelManager {
    let cache = tempfile::tempdir_in(path.parent().unwrap()).unwrap().keep();
    let mut config = config(&cache);
    change(&mut config);
    let manager = KernelManager::new(config).unwrap();
    assert_eq!(manager.load_plugin(path).unwrap()[0].status, Status::Ready);
    manager
}

/// A matrix in use.
pub(crate) struct Use {
    problem: Problem,
    scale: f32,
    choice: Arc<CpuKernels>,
    packed: Packed,
}

impl Use {
    /// To be made before the built-in kernels are there, so that the plugin is chosen.
    pub(crate) fn new(manager: &KernelManager, problem: Problem, scale: f32) -> Self {
        let (_, n, k) = problem.shape;
        let (choice, packed) = manager.choose_and_pack((n, k), LayoutPolicy::Any, &problem.weights).unwrap();
        manager.warm_up(&choice, 1);
        Self { problem, scale, choice, packed }
    }

    /// What the manager has for a call, and whether that is wrong.
    pub(crate) fn call(&self, manager: &KernelManager) -> Result<bool, ManagerError> {
        let Problem { weights, x, shape: (m, n, k) } = &self.problem;
        let (mut y, mut want) = (vec![f32::NAN; m * n], vec![0.0; m * n]);
        let bytes = match &self.packed {
            Packed::Canonical => weights,
            Packed::Private(buffer) => buffer.as_slice(),
        };
        let job = Job { choice: &self.choice, weights: bytes, scale: self.scale.into(), column: 0 };
        manager.matmul(&[job], x, &mut y, *n)?;
        // A kernel may have written into the weights.
        let weights = Problem::new(*m, *n, *k).weights;
        reference::matmul(&weights, *n, *k, self.scale, x.q(), x.stride(), x.scale(), *m, &mut want, *n);
        Ok(y.iter().zip(&want).any(|(got, want)| got.to_bits() != want.to_bits()))
    }
}

fn status(manager: &KernelManager) -> Status {
    manager.report().kernels[0].status.clone()
}

/// The reason for a quarantine and the stage that found it.
fn quarantine(manager: &KernelManager) -> (Stage, String) {
    let report = manager.report();
    let Status::Quarantined(_) = report.kernels[0].status else { panic!("{:?}", report.kernels[0]) };
    let verdict = manager.store().verdict(report.kernels[0].sha256.as_ref().unwrap()).unwrap();
    let refusal = verdict.refusal.unwrap();
    (refusal.stage, refusal.reason)
}

/// Calls until the plugin is in quarantine, and wrong results until then.
fn calls_until_quarantine(manager: &KernelManager, this: &Use, most: u64) -> (u64, u64) {
    let mut wrong = 0;
    for call in 1..=most {
        wrong += u64::from(this.call(manager).unwrap());
        if status(manager) != Status::Ready {
            return (call, wrong);
        }
    }
    panic!("nothing was found in {most} calls, and {wrong} results were wrong");
}

#[test]
fn a_scale_that_is_cached_by_shape_is_found_by_the_gate_or_by_the_first_use_of_a_matrix() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let everywhere = build(dir.path(), "everywhere", &["SCALE=cached_scale(w)"]);
    let error = manager(&dir.path().join("cache")).load_plugin(&everywhere).unwrap_err();
    let PluginError::Refused { refusal, .. } = error else { panic!("{error}") };
    assert!(refusal.reason.contains("the reference has "), "{refusal}");
    // Only for a shape that the gate does not try.
    for (name, defines) in [("canonical", &[][..]), ("private", &["PRIVATE"])] {
        let here = "SCALE=w->n == 66 ? cached_scale(w) : w->scale";
        let path = build(dir.path(), name, &[&[here], defines].concat());
        let manager = with_plugin(&path, |_| ());
        let matrices = [0.5, -0.25, 3.0].map(|scale| Use::new(&manager, Problem::new(1, 66, 256), scale));
        add_built_in(&manager);
        for _ in 0..40 {
            for matrix in &matrices {
                assert!(!matrix.call(&manager).unwrap(), "no wrong result reaches the caller");
            }
        }
        let (stage, reason) = quarantine(&manager);
        assert_eq!(stage, Stage::FirstUse);
        assert!(reason.starts_with("[1, 256] x [66, 256]ᵀ: y[0, 0] = "), "{reason}");
        assert_eq!((manager.report().doubts, manager.results_in_doubt()), (vec![], 0));
    }
}

#[test]
fn comparisons_are_dense_at_first() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // One output of many, from the second call on.
    let wrong = "IN_RUN=if (w->n == 66 && TIMES(calls) >= 1) y->y[tile->m0 * y->stride + 41] += 1";
    let path = build(dir.path(), "second", &[wrong]);
    let manager = with_plugin(&path, |_| ());
    let this = Use::new(&manager, Problem::new(1, 66, 256), 0.37);
    add_built_in(&manager);
    assert_eq!(calls_until_quarantine(&manager, &this, 3), (2, 0));
    let (stage, reason) = quarantine(&manager);
    assert_eq!(stage, Stage::InUse);
    assert!(reason.contains("y[0, 41] = ") && reason.contains("(call 2 of the kernel)"), "{reason}");
    assert_eq!(manager.results_in_doubt(), 0);
}

#[test]
fn one_place_that_becomes_wrong_is_found_and_what_was_not_compared_is_in_doubt() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let wrong = "IN_RUN=if (w->n == 600 && TIMES(calls) >= 700 && tile->n0 <= 7 && tile->n1 > 7) \
                 y->y[tile->m0 * y->stride + 7] += 3";
    let path = build(dir.path(), "one_place", &[wrong]);
    let found = |seed: Option<u64>| {
        let manager = with_plugin(&path, |config| config.seed = seed);
        let this = Use::new(&manager, Problem::new(1, 600, 64), 0.37);
        add_built_in(&manager);
        let before = manager.report();
        assert_eq!((manager.unchecked_results(), manager.results_in_doubt()), (0, 0));
        let (calls, wrong) = calls_until_quarantine(&manager, &this, 2000);
        // Compared: one row, which is all there is, at least once in 251 calls.
        assert!(wrong <= 251, "{wrong}");
        let report = manager.report();
        assert_eq!(quarantine(&manager).0, Stage::InUse);
        assert!(quarantine(&manager).1.contains("y[0, 7] = "), "{}", quarantine(&manager).1);
        // Every wrong result is among those in doubt: all but calls 1, 2, 3, 5, 9 ...
        let [doubt] = &report.doubts[..] else { panic!("{:?}", report.doubts) };
        assert_eq!((doubt.kernel.as_str(), doubt.since_call), ("example/plain", 4));
        assert!(doubt.unchecked >= wrong && doubt.unchecked < calls - 8, "{doubt:?} {calls}");
        assert_eq!(
            (manager.results_in_doubt(), manager.unchecked_results()),
            (doubt.unchecked, doubt.unchecked)
        );
        assert_eq!(report.doubts_since(&before), report.doubts);
        assert_eq!(report.doubts_since(&report), []);
        (report.seed, calls)
    };
    let first = found(Some(1));
    assert_eq!(first, found(Some(1)), "the same seed, the same places");
    let others = [found(None), found(None)];
    assert_ne!(others[0].0, others[1].0, "every manager has a seed of its own");
    assert_eq!(others[0], found(Some(others[0].0)), "the seed of the report repeats it");
}

#[test]
fn strict_mode_does_not_go_on_with_results_in_doubt() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let wrong = "IN_RUN=if (w->n == 66 && TIMES(calls) >= 20) y->y[tile->m0 * y->stride] += 1";
    let path = build(dir.path(), "strict", &[wrong]);
    for (names, doubtful) in [("gated-plugins", true), ("plausible-figures", false)] {
        let manager = with_plugin(&path, |config| config.strict = names.parse().unwrap());
        let this = Use::new(&manager, Problem::new(1, 66, 256), 0.37);
        add_built_in(&manager);
        let mut calls = (0..40).map(|_| this.call(&manager));
        let error = calls.find_map(Result::err);
        assert_eq!(error.is_some(), doubtful, "{error:?}");
        if let Some(error) = error {
            let text = error.to_string();
            assert!(matches!(error, ManagerError::Doubtful { .. }), "{text}");
            for part in ["example/plain", "y[0, 0] = ", "26 earlier results", "compute them again"] {
                assert!(text.contains(part), "{text}");
            }
        }
        assert!(!this.call(&manager).unwrap(), "the others go on");
        assert_eq!(manager.results_in_doubt(), 26);
    }
}

/// Writes a weight of the first row, from the 300th matmul of a shape on that the gate does not try.
const OWN_WEIGHTS: &str =
    "IN_RUN=if (w->n == 66 && TIMES(calls) >= 300) *(uint8_t *)w->data = w->size > 5000 ? 2 : 0xaa";

#[test]
fn a_kernel_that_writes_into_its_packing_ends_the_process_before_anything_is_wrong() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "own_packing", &["PRIVATE", OWN_WEIGHTS]);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["watched::child", "--exact", "--nocapture", "--test-threads=1"]).env(ROLE, &path);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    // SIGBUS on some systems.
    let signal = output.status.signal();
    assert!([Some(11), Some(10)].contains(&signal), "{:?} {text}", output.status);
    let rights = text.lines().filter(|line| line.contains("right")).count();
    assert_eq!((rights, text.contains("wrong")), (300, false), "{text}");
}

const ROLE: &str = "BITNET_TEST_OWN_PACKING";

/// Not a test by itself: the process that ends.
#[test]
fn child() {
    let Some(path) = std::env::var_os(ROLE) else { return };
    let manager = with_plugin(&PathBuf::from(path), |_| ());
    let this = Use::new(&manager, Problem::new(1, 66, 256), 0.37);
    assert_eq!(this.choice.layout(), Some("example/bytes"));
    add_built_in(&manager);
    for _ in 0..2000 {
        println!("\n{}", if this.call(&manager).unwrap() { "wrong" } else { "right" });
    }
}

#[test]
fn a_kernel_that_writes_into_canonical_weights_makes_them_unusable() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "own_weights", &[OWN_WEIGHTS]);
    let manager = with_plugin(&path, |config| config.seed = Some(3));
    let this = Use::new(&manager, Problem::new(1, 66, 256), 0.37);
    add_built_in(&manager);
    let mut wrong = 0;
    let error = (0..2000).find_map(|_| match this.call(&manager) {
        Ok(is_wrong) => {
            wrong += u64::from(is_wrong);
            None
        }
        Err(error) => Some(error.to_string()),
    });
    let error = error.expect("found");
    assert!(
        error.contains("example/plain wrote into its weights") && error.contains("load the model again"),
        "{error}"
    );
    let (stage, reason) = quarantine(&manager);
    assert_eq!((stage, reason.as_str()), (Stage::InUse, "[66, 256]: it wrote into its weights"));
    assert!((1..=251).contains(&wrong) && manager.results_in_doubt() >= wrong, "{wrong}");
    // Nothing computes with what is left of them, and other weights of the shape are as good as ever.
    assert!(matches!(this.call(&manager), Err(ManagerError::Damaged { .. })));
    check(&manager, 1, 66, 256, "the model, loaded again");
}

#[test]
fn other_weights_in_the_place_of_old_ones_are_no_damage() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "plain", &[]);
    let manager = with_plugin(&path, |_| ());
    let this = Use::new(&manager, Problem::new(1, 66, 256), 0.37);
    let mut other = Problem::new(1, 66, 256);
    other.weights.rotate_left(64);
    let calls = |weights: &[u8], x: &Problem| {
        for _ in 0..20 {
            let (mut y, mut want) = ([0.0; 66], [0.0; 66]);
            let job = Job { choice: &this.choice, weights, scale: 0.37.into(), column: 0 };
            manager.matmul(&[job], &x.x, &mut y, 66).unwrap();
            let x = &x.x;
            reference::matmul(weights, 66, 256, 0.37, x.q(), x.stride(), x.scale(), 1, &mut want, 66);
            assert_eq!(y, want);
        }
    };
    let mut memory = this.problem.weights.clone();
    calls(&memory, &this.problem);
    // Another model is loaded, and its weights get the memory of the first one's.
    manager.choose((66, 256), LayoutPolicy::Any).unwrap();
    memory.copy_from_slice(&other.weights);
    calls(&memory, &other);
    assert_eq!((status(&manager), manager.report().events), (Status::Ready, vec![]));
}

#[test]
fn a_kernel_that_writes_into_the_activations_is_an_error_at_once() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // After the first use, which has activations of its own between walls.
    let wrong = "IN_RUN=if (w->n == 66 && TIMES(calls) >= 1) ((int8_t *)x->q)[3] ^= 1";
    let path = build(dir.path(), "activations", &[wrong]);
    let manager = with_plugin(&path, |_| ());
    let this = Use::new(&manager, Problem::new(1, 66, 256), 0.37);
    add_built_in(&manager);
    assert!(!this.call(&manager).unwrap());
    let error = this.call(&manager).unwrap_err().to_string();
    assert!(error.contains("example/plain wrote into the activations"), "{error}");
    assert_eq!((quarantine(&manager).0, manager.results_in_doubt()), (Stage::InUse, 0));
    check(&manager, 1, 66, 256, "others");
}

#[test]
fn a_kernel_that_the_gate_has_not_tried_is_not_used() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let later = dir.path().join("later");
    let file = format!("LATER_FILE=\"{}\"", later.display());
    let path = build(dir.path(), "other_descriptor", &[&file]);
    let manager = manager(&dir.path().join("cache"));
    assert!(manager.verify_plugin(&path).unwrap().passed());
    std::fs::write(&later, "").unwrap();
    let reports = manager.load_plugin(&path).unwrap();
    let statuses: Vec<_> = reports.iter().map(|report| (report.kernel.as_str(), &report.status)).collect();
    let [("example/plain", Status::Ready), ("example/later", Status::Rejected(reason))] = statuses[..] else {
        panic!("{statuses:?}")
    };
    assert!(reason.contains("the gate has not tried it"), "{reason}");
    check(&manager, 3, 33, 129, "the kernel that was tried");
    assert_eq!(manager.report().kernels[1].calls, 0);
    // The same name for something else.
    let sha256 = manager.report().kernels[0].sha256.clone().unwrap();
    let mut verdict = manager.store().verdict(&sha256).unwrap();
    verdict.kernels[0].declared = verdict.kernels[0].declared.replace("granule 1", "granule 4");
    manager.store().remember(&verdict);
    let again = crate::support::manager(&dir.path().join("cache"));
    assert!(again.load_plugin(&path).unwrap().iter().all(|k| matches!(k.status, Status::Rejected(_))));
}
