//! Plugins in a process of their own: the same bits, and nothing else of this process, of its files or of the network is
//! within their reach. The same plugins reach it all from within this process.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::policy::{SHAPES, cpu_plugin};
use crate::support::*;
use bitnet_burn_manager::plugin::PluginError;
use bitnet_burn_manager::{Job, KernelManager, LayoutPolicy, ManagerConfig, Packed, Status};

fn with(cache: &Path, contained: bool, change: impl FnOnce(&mut ManagerConfig)) -> KernelManager {
    let mut config = config(cache);
    config.plugins.contained = contained;
    change(&mut config);
    KernelManager::new(config).unwrap()
}

fn contained(cache: &Path) -> KernelManager {
    with(cache, true, |_| ())
}

fn status(manager: &KernelManager) -> Status {
    manager.report().kernels[0].status.clone()
}

#[test]
fn the_same_bits_as_in_process() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, defines) in [
        ("canonical", &[][..]),
        ("private", &["PRIVATE", "GRANULE=8", "ALIGNMENT=4096"]),
        ("small", &["PRIVATE", "GRANULE=3", "ALIGNMENT=1"]),
    ] {
        let path = build(dir.path(), name, defines);
        let manager = contained(&dir.path().join("cache"));
        let reports = manager.load_plugin(&path).unwrap();
        assert_eq!((reports[0].kernel.as_str(), &reports[0].status), ("example/plain", &Status::Ready));
        for (m, n, k) in SHAPES {
            for call in 0..4 {
                check(&manager, m, n, k, &format!("{name}, call {call}"));
            }
        }
        let report = manager.report();
        assert_eq!(report.kernels[0].calls, 4 * SHAPES.len() as u64);
        assert_eq!((report.reference_calls, report.fallbacks.len()), (0, 0), "{:?}", report.fallbacks);
    }
}

#[test]
fn the_built_in_kernels_compute_the_same_from_a_process_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = cpu_plugin();
    let manager = contained(dir.path());
    let reports = manager.load_plugin(path).unwrap();
    let ready = reports.into_iter().filter(|r| r.status == Status::Ready && !r.many_scales);
    let ready: Vec<_> = ready.map(|r| r.kernel).collect();
    assert!(ready.len() >= 2, "{ready:?}");
    for kernel in ready {
        let manager = with(dir.path(), true, |config| config.force = Some(kernel.clone()));
        manager.load_plugin(path).unwrap();
        for (m, n, k) in SHAPES {
            check(&manager, m, n, k, &kernel);
        }
        let report = manager.report();
        let used: Vec<_> = report.kernels.iter().filter(|k| k.calls > 0).map(|k| &k.kernel).collect();
        assert_eq!(used, [&kernel], "{:?}", report.fallbacks);
    }
}

#[test]
fn several_matrices_of_one_call_share_their_activations() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "plain", &["PRIVATE", "GRANULE=4"]);
    let manager = contained(&dir.path().join("cache"));
    manager.load_plugin(&path).unwrap();
    let (m, k) = (5, 200);
    let problems: Vec<_> = (0..11).map(|i| Problem::new(m, 16 + 7 * i, k)).collect();
    let packed: Vec<_> = problems
        .iter()
        .map(|p| manager.choose_and_pack((p.shape.1, k), LayoutPolicy::Any, &p.weights).unwrap())
        .collect();
    let stride = problems.iter().map(|p| p.shape.1 + 1).sum::<usize>();
    let mut jobs = Vec::new();
    let mut column = 0;
    for (problem, (choice, packed)) in problems.iter().zip(&packed) {
        let Packed::Private(weights) = packed else { panic!("it packs") };
        jobs.push(Job { choice, weights: weights.as_slice(), scale: 0.25.into(), column });
        column += problem.shape.1 + 1;
    }
    let mut y = vec![7.0; m * stride];
    for _ in 0..3 {
        y.fill(7.0);
        manager.matmul(&jobs, &problems[0].x, &mut y, stride).unwrap();
    }
    for (problem, job) in problems.iter().zip(&jobs) {
        let n = problem.shape.1;
        let (mut want, x) = (vec![0.0; m * n], &problems[0].x);
        let (weights, scales) = (&problem.weights, x.scale());
        bitnet_burn_formats::reference::matmul(
            weights,
            n,
            k,
            0.25,
            x.q(),
            x.stride(),
            scales,
            m,
            &mut want,
            n,
        );
        for (row, want) in want.chunks(n).enumerate() {
            let got = &y[row * stride + job.column..][..n + 1];
            assert!(got[..n] == *want && got[n] == 7.0, "{n}: {got:?} {want:?}");
        }
    }
    assert_eq!(status(&manager), Status::Ready);
}

/// What a plugin does that begins in use, and what is said of it.
const ENDS: &[(&str, &str, &str)] = &[
    ("segv", "*(volatile int *)(8 * w->n) = 1", "it crashed with signal 11 (SIGSEGV)"),
    ("abort", "abort()", "it crashed with signal 6 (SIGABRT)"),
    ("kill", "raise(SIGKILL)", "it crashed with signal 9"),
    ("exit", "exit(0)", "it ended the process with status 0"),
    ("exit_at_once", "_exit(3)", "it ended the process with status 3"),
    ("hang", "for (;;) usleep(1000)", "it hangs: this took more than 5 s"),
    ("loop", "for (volatile int i = 0;; i++) {}", "it hangs: this took more than 5 s"),
    ("stack", "volatile int zero = 0; deep(&zero)", "it crashed with signal"),
    ("activations", "((volatile int8_t *)x->q)[0] = 1", "it crashed with signal 11 (SIGSEGV)"),
    ("weights", "((volatile uint8_t *)w->data)[0] = 1", "it crashed with signal 11 (SIGSEGV)"),
    ("beyond", "((volatile char *)y->y)[1ull << 36] = 1", "it crashed with signal"),
    ("rounding", "fesetround(FE_UPWARD)", "it changed the floating-point environment"),
];

#[test]
fn what_ends_or_stops_the_plugin_is_a_fault_of_the_kernel_and_the_host_lives_on() {
    if !has_compiler() {
        return;
    }
    for (name, what, reason) in ENDS {
        for (layout, more) in [("canonical", &[][..]), ("private", &["PRIVATE", "GRANULE=2"])] {
            let dir = tempfile::tempdir().unwrap();
            let cache = dir.path().join("cache");
            // Of a shape that the gate does not try, from the third matmul on: the first is compared as a whole.
            let hook = format!("IN_RUN=if (w->n == 78 && tile->n0 == 0 && TIMES(calls) >= 2) {{ {what}; }}");
            let path = build(dir.path(), name, &[&[hook.as_str()], more].concat());
            // The gate's verdict, without haste.
            assert!(contained(&cache).verify_plugin(&path).unwrap().passed(), "{name}");
            let manager = with(&cache, true, |config| config.plugins.patience = Duration::from_secs(5));
            manager.load_plugin(&path).unwrap();
            let prepare = |problem: &Problem| {
                let (_, n, k) = problem.shape;
                manager.choose_and_pack((n, k), LayoutPolicy::Any, &problem.weights).unwrap()
            };
            let problems = [Problem::new(1, 76, 256), Problem::new(2, 78, 256)];
            let ready = problems.each_ref().map(prepare);
            add_built_in(&manager);
            for call in 0..6 {
                for (problem, (choice, packed)) in problems.iter().zip(&ready) {
                    problem.check(&manager, choice, packed, &format!("{name}, {layout}, call {call}"));
                }
            }
            let Status::Quarantined(text) = status(&manager) else {
                panic!("{name}, {layout}: {:?}", manager.report().kernels[0])
            };
            assert!(text.contains(reason), "{name}, {layout}: {text:?} should say {reason:?}");
            let report = manager.report();
            assert!(report.fallbacks.iter().any(|f| f.kernel == "example/plain"), "{name}, {layout}");
            assert_eq!(report.reference_calls, 0, "{name}, {layout}: {:?}", report.fallbacks);
            // Later processes know.
            assert!(matches!(contained(&cache).load_plugin(&path), Err(PluginError::Refused { .. })));
        }
    }
}

#[test]
fn functions_that_do_not_return_are_faults_too() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    for (name, defines) in [
        ("supports", &["IN_SUPPORTS=if (s->n == 78) for (;;) usleep(1000)"][..]),
        ("packed_size", &["PRIVATE", "PACKED=({ if (n == 78) _exit(1); n * k; })"]),
        ("pack", &["PRIVATE", "IN_PACK=if (w->n == 78) raise(SIGSEGV)"]),
        ("unpack", &["PRIVATE", "IN_UNPACK=if (w->n == 78) for (;;) usleep(1000)"]),
    ] {
        let path = build(dir.path(), name, defines);
        assert!(contained(&cache).verify_plugin(&path).unwrap().passed(), "{name}");
        let manager = with(&cache, true, |config| config.plugins.patience = Duration::from_secs(5));
        manager.load_plugin(&path).unwrap();
        add_built_in(&manager);
        for _ in 0..2 {
            check(&manager, 2, 78, 256, name);
        }
        assert!(matches!(status(&manager), Status::Quarantined(_)), "{name}: {:?}", status(&manager));
    }
}

/// What a plugin tries in a constructor and in `run`: an expression that is true if it got through.
fn attempts(canary: &str, port: u16) -> Vec<(&'static str, String)> {
    let address = format!(
        "struct sockaddr_in a = {{.sin_family = AF_INET, .sin_port = htons({port}), .sin_addr = {{htonl(INADDR_LOOPBACK)}}}};"
    );
    vec![
        ("reads a file", format!("({{ int f = open(\"{canary}\", O_RDONLY); char c; f >= 0 && read(f, &c, 1) == 1; }})")),
        ("reads the user's directory", "(opendir(getenv(\"HOME\") ? getenv(\"HOME\") : \"/\") != NULL)".into()),
        ("sees the environment", "(getenv(\"PATH\") != NULL)".into()),
        ("asks for a file's size", format!("({{ struct stat s; stat(\"{canary}\", &s) == 0; }})")),
        ("writes a file", format!("(open(\"{canary}.made\", O_CREAT | O_WRONLY, 0600) >= 0)")),
        ("removes a file", format!("(link(\"{canary}\", \"{canary}.link\") == 0 && unlink(\"{canary}.link\") == 0)")),
        ("opens a socket", "(socket(AF_INET, SOCK_STREAM, 0) >= 0)".into()),
        (
            "connects",
            format!("({{ {address} int s = socket(AF_INET, SOCK_STREAM, 0); connect(s, (void *)&a, sizeof a) == 0; }})"),
        ),
        ("starts a process", "({ pid_t p = fork(); if (!p) _exit(0); p > 0; })".into()),
        ("runs a program", "(system(\"true\") == 0)".into()),
        ("signals its parent", "(kill(getppid(), 0) == 0)".into()),
        ("reads another process", "(ptrace(PTRACE_SEIZE, getppid(), 0, 0) == 0)".into()),
        ("uses a device", "(open(\"/dev/null\", O_RDONLY) >= 0)".into()),
        ("writes into its inputs", "({ int r = 0; if (x) r = mprotect((void *)((uintptr_t)x->q & ~4095ul), 4096, PROT_READ | PROT_WRITE) == 0; r; })".into()),
    ]
}

const INCLUDES: &str = "#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
static int reached;
";

/// The table of docs/plugins-trust.md: what each reaches from within the process, and from its own.
#[test]
fn a_contained_plugin_reaches_nothing() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let canary = dir.path().join("canary");
    std::fs::write(&canary, "secret").unwrap();
    let attempts = attempts(canary.to_str().unwrap(), listener.local_addr().unwrap().port());
    for (i, (what, attempt)) in attempts.iter().enumerate() {
        let header = dir.path().join(format!("attempt{i}.h"));
        std::fs::write(&header, INCLUDES).unwrap();
        // What it reaches shows in its result, once it is in use: the gate's shapes are right.
        let in_run = format!(
            "IN_RUN=if ({attempt}) reached = 1; if (reached && w->n == 77) y->y[tile->m0 * y->stride] += 1"
        );
        let on_load =
            format!("ON_LOAD=const bitnet_activations_t *x = NULL; (void)x; if ({attempt}) reached = 1");
        let flags = ["-include", header.to_str().unwrap(), "-w"];
        let defines = [in_run, on_load].map(|define| format!("-D{define}"));
        let flags: Vec<&str> = flags.into_iter().chain(defines.iter().map(String::as_str)).collect();
        let include = package().join("../../plugins/abi/include");
        let path = build_with(&include, dir.path(), &format!("attempt{i}"), &flags);
        for is_contained in [false, true] {
            let manager = with(&dir.path().join(format!("cache{is_contained}")), is_contained, |_| ());
            let reports = manager.load_plugin(&path).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(reports[0].status, Status::Ready, "{what}");
            let problem = Problem::new(1, 77, 256);
            let (choice, packed) =
                manager.choose_and_pack((77, 256), LayoutPolicy::Any, &problem.weights).unwrap();
            for _ in 0..3 {
                problem.check(&manager, &choice, &packed, what);
            }
            let reached = status(&manager) != Status::Ready;
            println!(
                "{what:30} {:12} {}",
                if is_contained { "contained" } else { "in process" },
                if reached { "yes" } else { "no" }
            );
            assert_eq!(reached, !is_contained, "{what}: {:?}", status(&manager));
        }
    }
}

#[test]
fn where_it_cant_be_contained_it_is_refused_with_the_reason() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "plain", &[]);
    let cache = dir.path().join("cache");
    let report = contained(&cache).verify_plugin(&path).unwrap();
    assert!(report.passed());
    let layers = report.confinement.layers.join("\n");
    assert!(
        layers.contains("seccomp: no sockets") && layers.contains("limits: "),
        "{:?}",
        report.confinement
    );
    for (helper, reason) in [
        (None, "no helper program is configured that could hold it"),
        (Some("/nonexistent"), "its process can't be started"),
        (Some("/bin/true"), "it ended the process with status 0"),
    ] {
        let manager = with(&cache, true, |config| config.plugins.helper = helper.map(Into::into));
        let error = manager.load_plugin(&path).unwrap_err();
        assert!(matches!(error, PluginError::Contained { .. }), "{error}");
        let error = error.to_string();
        assert!(error.contains("it can't be contained") && error.contains(reason), "{error}");
    }
}

#[test]
fn its_process_ends_with_the_manager() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "plain", &[]);
    let holders = || {
        let name = path.to_str().unwrap().as_bytes();
        let has_it = |entry: std::io::Result<std::fs::DirEntry>| {
            let line = std::fs::read(entry.ok()?.path().join("cmdline")).ok()?;
            line.windows(name.len()).any(|part| part == name).then_some(())
        };
        std::fs::read_dir("/proc").unwrap().filter_map(has_it).count()
    };
    // In a thread that ends while the plugin is in use.
    let cache = dir.path().join("cache");
    let manager = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let manager = contained(&cache);
                manager.load_plugin(&path).unwrap();
                manager
            })
            .join()
            .unwrap()
    });
    check(&manager, 1, 76, 256, "after its thread has ended");
    assert_eq!((holders(), status(&manager)), (1, Status::Ready));
    drop(manager);
    let deadline = Instant::now() + Duration::from_secs(20);
    while holders() > 0 {
        assert!(Instant::now() < deadline, "the process is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a call costs more than in process: of a product that takes next to no time itself.
#[test]
#[ignore = "a measurement"]
fn the_cost_of_a_call() {
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "plain", &["PRIVATE"]);
    let (m, n, k) = (1, 8, 64);
    let problem = Problem::new(m, n, k);
    let times = |is_contained: bool, pause: Duration| {
        let manager = with(&dir.path().join("cache"), is_contained, |config| config.threads = 1);
        manager.load_plugin(&path).unwrap();
        let (choice, packed) = manager.choose_and_pack((n, k), LayoutPolicy::Any, &problem.weights).unwrap();
        let Packed::Private(weights) = &packed else { panic!("it packs") };
        let job = Job { choice: &choice, weights: weights.as_slice(), scale: 0.5.into(), column: 0 };
        let mut y = vec![0.0; n];
        let mut times: Vec<f64> = Vec::new();
        let calls = if pause.is_zero() { 20_000 } else { 500 };
        for _ in 0..calls {
            std::thread::sleep(pause);
            let started = Instant::now();
            manager.matmul(&[job], &problem.x, &mut y, n).unwrap();
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    for (what, pause) in [("one after the other", Duration::ZERO), ("5 ms apart", Duration::from_millis(5))] {
        let (here, there) = (times(false, pause), times(true, pause));
        println!(
            "calls {what}: {here:.1} us in process, {there:.1} us contained, {:.1} us more",
            there - here
        );
    }
}
