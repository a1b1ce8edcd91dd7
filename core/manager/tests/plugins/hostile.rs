//! Hostile plugins, each built here from source, and refused or quarantined by the stage of the gate that
//! can see it, with a message that says what happened, while the others compute on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::*;
use bitnet_burn_manager::gate::{self, Refusal, Stage};
use bitnet_burn_manager::plugin::PluginError;
use bitnet_burn_manager::{Failures, KernelManager, LayoutPolicy, ManagerConfig, Status};

/// Macros of testdata/plugin.c, and what the refusal must say.
const HOSTILE: &[(&str, &[&str], &[&str])] = &[
    (
        "one_element",
        &["IN_RUN=if (w->n == 33 && w->k == 129 && tile->n1 == 33) y->y[tile->m0 * y->stride + 20] += 1"],
        &["kernel example/plain, [1, 129] x [33, 129]ᵀ, random values", "y[0, 20] = ", "the reference has "],
    ),
    // 16 bits are enough for most sums, and not for all.
    ("overflow", &["SUM=int16_t"], &["extreme values", "the reference has "]),
    ("left_out", &["LEAVE_OUT"], &["the reference has "]),
    // It multiplies by one scale, and claims to know many.
    (
        "one_scale",
        &["OPERATION=2"],
        &["f32 scales by row of weights and row of activations", "the reference has "],
    ),
    (
        "segv",
        &["IN_RUN=*(volatile int *)(8 * w->n) = 1"],
        &["[1, 1] x [1, 1]ᵀ", "crashed with signal 11 (SIGSEGV)"],
    ),
    ("ill", &["IN_RUN=__builtin_trap()"], &["crashed with signal", "SIG"]),
    ("abort", &["IN_RUN=if (w->n == 63) abort()"], &["x [63, 512]ᵀ", "crashed with signal 6 (SIGABRT)"]),
    (
        "loop",
        &["IN_RUN=for (volatile int i = 0;; i++) {}"],
        &["[1, 1] x [1, 1]ᵀ", "it hangs: this took more than 5 s"],
    ),
    ("sleep", &["ON_LOAD=forever(NULL)"], &["loading it: it hangs"]),
    (
        "stack",
        &["IN_RUN=volatile int zero = 0; deep(&zero)"],
        &["[1, 1] x [1, 1]ᵀ", "crashed with signal", "it used its stack up"],
    ),
    (
        "behind_output",
        &["IN_RUN=((volatile uint8_t *)(y->y + (x->m - 1) * y->stride + w->n))[0] = 1"],
        &["wrote 1 byte behind the output; it crashed with signal 11"],
    ),
    (
        "before_output",
        // Two columns of another matrix are before it.
        &["IN_RUN=((volatile uint8_t *)y->y)[-9] = 1"],
        &["wrote 1 byte before the output"],
    ),
    ("neighbour", &["IN_RUN=y->y[-1] = 1"], &["it wrote before row 0 of its output"]),
    ("between_rows", &["IN_RUN=if (x->m > 1) y->y[w->n] = 1"], &["it wrote behind row 0 of its output"]),
    (
        "behind_weights",
        &["IN_RUN=(void)((volatile const uint8_t *)w->data)[w->size]"],
        &["read 1 byte behind the canonical weights; it crashed with signal 11"],
    ),
    (
        "behind_packed",
        &["PRIVATE", "IN_RUN=(void)((volatile const uint8_t *)w->data)[w->size + 63]"],
        &["behind the packed weights; it crashed with signal 11"],
    ),
    (
        "before_packed",
        &["PRIVATE", "IN_RUN=(void)((volatile const uint8_t *)w->data)[-1]"],
        &["read 1 byte before the packed weights; it crashed with signal 11"],
    ),
    ("pack_behind", &["PRIVATE", "IN_PACK=packed[w->n * w->k] = 1"], &["behind the packed weights"]),
    (
        "workspace",
        &["PRIVATE", "IN_PREPARE=workspace[x->m * x->k + 1] = 1"],
        &["wrote 2 bytes behind the workspace"],
    ),
    (
        "activations",
        &["IN_RUN=((volatile int8_t *)x->q)[0] = 1"],
        &["wrote into the activations, an input; it crashed with signal 11"],
    ),
    (
        "slack",
        &["IN_RUN=(void)((volatile int8_t *)x->q)[x->m * x->stride + 64]"],
        &["read 1 byte behind the activations; it crashed"],
    ),
    ("rounding", &["IN_RUN=fesetround(FE_TOWARDZERO)"], &["it changed the floating-point environment"]),
    (
        "rounds_in_supports",
        &["IN_SUPPORTS=fesetround(FE_UPWARD)"],
        &["it changed the floating-point environment"],
    ),
    (
        "rounds_in_packed_size",
        &["PRIVATE", "PACKED=fesetround(FE_UPWARD) + n * k"],
        &["it changed the floating-point environment"],
    ),
    (
        "loads_rounding",
        &["ON_LOAD=fesetround(FE_UPWARD)"],
        &["loading it: it changed the floating-point environment"],
    ),
    (
        "threads",
        &["IN_RUN=pthread_t t; if (w->n == 7) pthread_create(&t, NULL, forever, NULL)"],
        &["x [7, 31]ᵀ", "threads that go on after the call"],
    ),
    (
        "loads_threads",
        &["ON_LOAD=pthread_t t; pthread_create(&t, NULL, forever, NULL)"],
        &["it started 1 threads when it was loaded"],
    ),
    // Fine with one thread: a race with several.
    (
        "race",
        &[
            "IN_RUN=static volatile uint64_t last; last = tile->n0; usleep(50); if (last != tile->n0) y->y[tile->m0 * y->stride + tile->n0] += 1",
        ],
        &["tiles on several threads", "the reference has "],
    ),
    ("exit", &["IN_RUN=if (w->n == 15) exit(0)"], &["x [15, 65]ᵀ", "it ended the process with status 0"]),
    ("exit_early", &["ON_LOAD=_exit(0)"], &["loading it: it ended the process with status 0"]),
    ("exit_late", &["ON_LOAD=atexit(abort)"], &["the end of the process: it crashed with signal 6"]),
    ("workspace_size", &["PRIVATE", "WORKSPACE=s->n"], &["workspace_size depends on more than m and k"]),
    (
        "workspace_huge",
        &["PRIVATE", "WORKSPACE=1ull << 60"],
        &["it asks for a workspace of 1152921504606846976 bytes"],
    ),
    (
        "workspace_wide",
        // Right for small matrices.
        &["PRIVATE", "WORKSPACE=s->m * s->k > 300000 ? 64 : s->m * s->k"],
        &["[4, 100003] x [3, 100003]ᵀ", "behind the workspace; it crashed with signal 11"],
    ),
    (
        "packed_huge",
        &["PRIVATE", "PACKED=1ull << 60"],
        &["its packed_size of [1, 1] is 1152921504606846976 bytes"],
    ),
    ("packed_nothing", &["PRIVATE", "PACKED=0"], &["its packed_size of [1, 1] is 0"]),
    (
        "packed_tall",
        &["PRIVATE", "PACKED=n > 640 ? n * k / 2 : n * k"],
        &["[1, 36] x [49157, 36]ᵀ", "behind the packed weights"],
    ),
    (
        "packed_small",
        &["PRIVATE", "PACKED=n > 640 ? 64 : n * k"],
        &["its packed_size of [49157, 36] is 64 bytes; ternary weights take at least 350604"],
    ),
    ("unpack", &["PRIVATE", "WRONG_UNPACK"], &["unpack(pack(w)) differs from w at row 0, column 30"]),
    ("nothing", &["SUPPORTS_NOTHING"], &["it supports none of the"]),
    ("fails", &["FAIL_AT_N=100"], &["x [100, 784]ᵀ", "status 3 (failed): out of luck"]),
    ("major", &["MAJOR=9"], &["loading it: built for ABI 9.3, and this host speaks ABI 1."]),
    (
        "null",
        &["NULL_DESCRIPTOR"],
        &["loading it: its descriptor is invalid: the entry point returned no descriptor"],
    ),
    ("count", &["COUNT=0xffffffffffffffff"], &["it claims 18446744073709551615 kernels"]),
    ("symbol", &["NO_SYMBOL"], &["it does not export `bitnet_plugin`"]),
];

fn refused(manager: &KernelManager, path: &Path) -> Refusal {
    match manager.load_plugin(path) {
        Err(PluginError::Refused { refusal, .. }) => refusal,
        other => panic!("{}: {other:?}", path.display()),
    }
}

#[test]
fn every_hostile_plugin_is_refused_by_the_first_stage_and_the_others_compute_on() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let patient = manager(&cache);
    add_built_in(&patient);
    let kernels = patient.report().kernels.len();
    let mut short = config(&cache);
    short.plugins.patience = Duration::from_secs(5);
    let impatient = KernelManager::new(short).unwrap();
    let next = std::sync::atomic::AtomicUsize::new(0);
    // Those that hang take their time.
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                while let Some((name, defines, expected)) =
                    HOSTILE.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
                {
                    let path = build(dir.path(), name, defines);
                    let hangs = expected.iter().any(|part| part.contains("it hangs"));
                    let manager = if hangs { &impatient } else { &patient };
                    let refusal = refused(manager, &path);
                    assert_eq!(refusal.stage, Stage::Before);
                    let text = refusal.to_string();
                    for part in *expected {
                        assert!(text.contains(part), "{name}: {text:?} should say {part:?}");
                    }
                    // The verdict is kept: it is not tried again.
                    let known = manager.store().admit(&path).unwrap();
                    let verdict = manager.store().verdict(&known.sha256).unwrap();
                    assert_eq!(verdict.refusal, Some(refusal.clone()), "{name}");
                    assert_eq!(refused(manager, &path), refusal, "{name}");
                }
            });
        }
    });
    assert_eq!(patient.report().kernels.len(), kernels);
    check(&patient, 3, 33, 129, "the others, after all that");
}

#[test]
fn exceptions_do_not_get_out_and_libraries_that_are_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(dir.path());
    for (name, content) in [("text.so", &b"not a library at all"[..]), ("empty.so", b"")] {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        assert!(refused(&manager, &path).to_string().contains("loading it: not a loadable library"));
    }
    let missing = manager.load_plugin(&dir.path().join("missing.so")).unwrap_err();
    assert!(matches!(missing, PluginError::Read { .. }), "{missing}");

    let cxx = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    if !has_compiler() || Command::new(&cxx).arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "no C++ compiler in CI");
        return eprintln!("SKIPPED: a plugin that throws (no C++ compiler `{cxx}`)");
    }
    let (source, object) = (dir.path().join("throws.cpp"), dir.path().join("throws.o"));
    std::fs::write(&source, "extern \"C\" void throws() { throw 1; }\n").unwrap();
    run(Command::new(&cxx).args(["-c", "-fPIC", "-o"]).arg(&object).arg(&source));
    let flags =
        ["-fexceptions", "-DEXTERNAL=throws", "-DIN_RUN=throws()", object.to_str().unwrap(), "-lstdc++"];
    let path = build_with(&package().join("../../plugins/abi/include"), dir.path(), "throws", &flags);
    let text = refused(&manager, &path).to_string();
    assert!(text.contains("[1, 1] x [1, 1]ᵀ") && text.contains("crashed with signal 6 (SIGABRT)"), "{text}");
}

/// A plugin that passes the first stage, the only one until [`add_built_in`].
pub fn in_use(dir: &Path, name: &str, defines: &[&str]) -> (KernelManager, PathBuf) {
    let path = build(dir, name, defines);
    let manager = manager(&dir.join("cache"));
    let reports = manager.load_plugin(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!((reports.len(), &reports[0].status), (1, &Status::Ready));
    (manager, path)
}

pub fn quarantined(manager: &KernelManager, path: &Path, stage: Stage, reason: &str) {
    let report = manager.report();
    let kernel = report.kernels.iter().find(|k| k.kernel == "example/plain").unwrap();
    let Status::Quarantined(text) = &kernel.status else { panic!("{kernel:?}") };
    assert!(text.contains(reason), "{text:?} should say {reason:?}");
    // Later processes know.
    let later = crate::support::manager(&path.parent().unwrap().join("cache"));
    let refusal = refused(&later, path);
    assert_eq!(refusal.stage, stage);
    assert!(refusal.to_string().contains(reason), "{refusal}");
    let error = later.load_plugin(path).unwrap_err().to_string();
    assert!(error.contains("quarantined, since it was wrong in use"), "{error}");
    // The gate finds nothing, and that does not lift the quarantine; forgetting does.
    assert!(later.verify_plugin(path).unwrap().passed());
    assert_eq!(refused(&later, path).stage, stage);
    let sha256 = later.store().admit(path).unwrap().sha256;
    assert!(later.store().forget(&sha256).unwrap());
    assert_eq!(later.load_plugin(path).unwrap()[0].status, Status::Ready);
}

#[test]
fn wrong_for_a_shape_that_the_gate_does_not_try_is_seen_at_its_first_use() {
    if !has_compiler() {
        return;
    }
    let wrong = "IN_RUN=if (w->n == 77 && tile->n1 == 77) y->y[tile->m0 * y->stride + 76] += 1";
    for (name, defines) in [("canonical", &[wrong][..]), ("private", &["PRIVATE", "GRANULE=8", wrong])] {
        let dir = tempfile::tempdir().unwrap();
        let (manager, path) = in_use(dir.path(), name, defines);
        let prepare = |problem: &Problem| {
            let (_, n, k) = problem.shape;
            manager.choose_and_pack((n, k), LayoutPolicy::Any, &problem.weights).unwrap()
        };
        let (good, bad) = (Problem::new(2, 76, 256), Problem::new(2, 77, 256));
        let ((good_choice, good_packed), (bad_choice, bad_packed)) = (prepare(&good), prepare(&bad));
        assert_eq!(good_choice.layout().is_some(), name == "private");
        add_built_in(&manager);
        good.check(&manager, &good_choice, &good_packed, "a shape that it can do");
        bad.check(&manager, &bad_choice, &bad_packed, "the right result is returned");
        let calls = |manager: &KernelManager| manager.report().kernels[0].calls;
        let before = calls(&manager);
        for _ in 0..3 {
            // Weights that are in its packing are multiplied on.
            good.check(&manager, &good_choice, &good_packed, "after the quarantine");
            bad.check(&manager, &bad_choice, &bad_packed, "after the quarantine");
            check(&manager, 2, 77, 256, "new weights after the quarantine");
        }
        assert_eq!(calls(&manager), before, "none of its kernels computes any more");
        let report = manager.report();
        assert_eq!(report.reference_calls, 0, "{:?}", report.fallbacks);
        let fallback = &report.fallbacks[0];
        assert_eq!((fallback.kernel.as_str(), fallback.count), ("example/plain", 1));
        assert!(fallback.replacement.starts_with("cpu/"), "{fallback:?}");
        quarantined(&manager, &path, Stage::FirstUse, "[2, 256] x [77, 256]ᵀ: y[0, 76] = ");
    }
}

#[test]
fn wrong_for_a_shape_that_is_measured_is_seen_before_it_is_timed() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let wrong = "IN_RUN=if (w->n == 77 && tile->n1 == 77) y->y[tile->m0 * y->stride + 76] += 1";
    let path = build(dir.path(), "measured", &[wrong]);
    let tuning = || {
        let config = ManagerConfig { tune_budget: Duration::from_secs(60), ..config(&cache) };
        let manager = KernelManager::new(config).unwrap();
        manager.load_plugin(&path).unwrap();
        add_built_in(&manager);
        manager
    };
    let manager = tuning();
    let names = |manager: &KernelManager, n: usize| -> Vec<String> {
        manager.explain(1, (n, 256)).candidates.iter().map(|c| c.kernel().to_owned()).collect()
    };
    assert!(names(&manager, 76).contains(&"example/plain".to_owned()));
    assert!(!names(&manager, 77).contains(&"example/plain".to_owned()));
    quarantined(&manager, &path, Stage::FirstUse, "[1, 256] x [77, 256]ᵀ: ");
    // Forgotten, it is a candidate again, also for what was measured before.
    let again = tuning();
    assert!(names(&again, 77).contains(&"example/plain".to_owned()));
}

#[test]
fn wrong_after_a_thousand_calls_is_seen_by_the_samples() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let wrong = "IN_RUN=if (w->n == 66 && TIMES(calls) >= 1000) \
                 for (uint64_t n = tile->n0; n < tile->n1; n++) y->y[tile->m0 * y->stride + n] += 1";
    for (name, defines) in [("canonical", &[wrong][..]), ("private", &["PRIVATE", wrong])] {
        let (manager, path) = in_use(dir.path(), name, defines);
        let problem = Problem::new(1, 66, 256);
        let (choice, packed) =
            manager.choose_and_pack((66, 256), LayoutPolicy::Any, &problem.weights).unwrap();
        add_built_in(&manager);
        let ready = || manager.report().kernels[0].status == Status::Ready;
        let mut y = vec![0.0; 66];
        let weights = match &packed {
            bitnet_burn_manager::Packed::Canonical => &problem.weights,
            bitnet_burn_manager::Packed::Private(buffer) => buffer.as_slice(),
        };
        let job = bitnet_burn_manager::Job { choice: &choice, weights, scale: 0.37.into(), column: 0 };
        for call in 0..1500 {
            if !ready() {
                assert!((1000..=1000 + 251).contains(&call), "seen at call {call}");
                break;
            }
            manager.matmul(&[job], &problem.x, &mut y, 66).unwrap();
        }
        assert!(!ready());
        problem.check(&manager, &choice, &packed, "after the quarantine");
        quarantined(&manager, &path, Stage::InUse, "the reference has ");
    }
}

#[test]
fn packing_wrongly_costs_the_plugin_and_not_the_weights() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let wrong = "IN_PACK=if (w->n == 77 && n0 == 0) packed[5] = (packed[5] + 1) % 3";
    let (manager, path) = in_use(dir.path(), "packs", &["PRIVATE", wrong]);
    check(&manager, 2, 76, 256, "a shape that it can do");
    // Nothing but the reference is left.
    check(&manager, 2, 77, 256, "another layout");
    assert_eq!(manager.report().reference_calls, 1);
    quarantined(
        &manager,
        &path,
        Stage::FirstUse,
        "weights [77, 256]: unpack(pack(w)) differs from w at row 0, column 5",
    );
}

#[test]
fn a_kernel_that_starts_to_fail_is_replaced_and_counted() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fails =
        "IN_RUN=if (w->n == 66 && TIMES(calls) >= 1000) { say(message, \"tired\"); return BITNET_FAILED; }";
    let (manager, _) = in_use(dir.path(), "tired", &[fails]);
    let problem = Problem::new(1, 66, 256);
    let (choice, packed) = manager.choose_and_pack((66, 256), LayoutPolicy::Any, &problem.weights).unwrap();
    add_built_in(&manager);
    for _ in 0..1100 {
        problem.check(&manager, &choice, &packed, "before and after");
    }
    let report = manager.report();
    let kernel = &report.kernels[0];
    assert_eq!(
        (kernel.kernel.as_str(), kernel.failures, &kernel.status),
        ("example/plain", Failures { status: 1, ..Failures::default() }, &Status::Ready)
    );
    assert!((900..=1000).contains(&kernel.calls), "{kernel:?}");
    assert_eq!((report.fallbacks.len(), report.fallbacks[0].count, report.reference_calls), (1, 1, 0));
    assert!(report.fallbacks[0].reason.contains("tired"), "{:?}", report.fallbacks);
}

#[test]
fn a_newer_minor_version_is_accepted() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // A plugin of a later minor version, with fields that this host does not know.
    let (manager, path) = in_use(dir.path(), "newer", &["NEWER"]);
    check(&manager, 2, 33, 129, "a newer plugin");
    let report = manager.store().verdict(&manager.store().admit(&path).unwrap().sha256).unwrap();
    assert_eq!(report.plugin.unwrap().abi, "1.10");
}

#[test]
fn two_linked_in_plugins_live_together() {
    bitnet_burn_plugin::plugin! {
        static SECOND = { name: c"second", version: c"0.1.0", kernels: [Plain] };
    }
    use bitnet_burn_manager::plugin::Plugin;
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(dir.path());
    manager.register(Plugin::built_in(&SECOND).unwrap()).unwrap();
    add_built_in(&manager);
    check(&manager, 2, 33, 129, "two at once");
    let report = manager.report();
    assert_eq!((report.kernels[0].kernel.as_str(), report.kernels[0].calls), ("second/plain", 1));
    let again = manager.register(Plugin::built_in(&SECOND).unwrap()).unwrap_err();
    assert!(matches!(again, PluginError::Duplicate { .. }), "{again}");
}

#[test]
fn a_helper_that_is_none_is_an_error_and_no_verdict() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "plain", &[]);
    let with = |helper: Option<PathBuf>| {
        let mut config = config(&dir.path().join("cache"));
        config.plugins.helper = helper;
        config.plugins.patience = Duration::from_secs(1);
        KernelManager::new(config).unwrap()
    };
    for (helper, expected) in [
        ("/nonexistent/helper", "can't be started"),
        ("/bin/true", "it ended with"),
        ("/bin/echo", "it says \"gate-child "),
    ] {
        let error = with(Some(helper.into())).load_plugin(&path).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(helper), "{error}");
    }
    let error = with(None).load_plugin(&path).unwrap_err();
    assert!(matches!(error, PluginError::Unverified { .. }), "{error}");
    // With a verdict, no helper is needed.
    assert!(manager(&dir.path().join("cache")).verify_plugin(&path).unwrap().passed());
    assert_eq!(with(None).load_plugin(&path).unwrap()[0].status, Status::Ready);
    // The helper itself says what it wants.
    let helper = env!("CARGO_BIN_EXE_bitnet-gate");
    let output = Command::new(helper).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains(gate::CHILD_COMMAND));
    assert_eq!(Command::new(helper).arg(gate::CHILD_COMMAND).output().unwrap().status.code(), Some(2));
}
