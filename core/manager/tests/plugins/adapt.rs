//! Kernels that become slow, fail and recover while they are in use, on a clock that the kernels themselves
//! move on: no real time is looked at.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use bitnet_burn_manager::plugin::Plugin;
use bitnet_burn_manager::{
    CpuKernels, EventKind, FallbackPolicy, Feedback, Job, KernelManager, LayoutPolicy, ManagerConfig,
    ManagerError, Memory, PROBATION_AFTER, Packed, Probe, RACE_TURNS, TIMED_EVERY, TRIAL_CALLS, WINDOW,
};
use bitnet_burn_plugin::sdk::{
    ActivationsRef, KernelError, KernelResult, OutputTile, TernaryKernel, WeightsRef,
};

/// A clock that stands still until a kernel computes, and memory as the test says.
#[derive(Debug)]
struct World {
    /// Nanoseconds that linked-in kernels took.
    time: &'static AtomicU64,
    /// A file that is a byte longer for each nanosecond that a plugin in C took.
    file: Option<PathBuf>,
    memory: Mutex<Option<Memory>>,
    reads: AtomicU64,
}

impl Probe for World {
    fn now(&self) -> Duration {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let file = self.file.as_ref().and_then(|file| std::fs::metadata(file).ok());
        Duration::from_nanos(self.time.load(Ordering::Relaxed) + file.map_or(0, |file| file.len()))
    }

    fn memory(&self) -> Option<Memory> {
        *self.memory.lock().unwrap()
    }
}

/// Three linked-in kernels, `paced/a`, `b` and `c`, with a clock of their own.
struct Paced {
    time: &'static AtomicU64,
    cost: &'static [AtomicU64; 3],
    fails: &'static [AtomicBool; 3],
    plugin: &'static bitnet_burn_plugin::abi::Plugin,
}

macro_rules! paced {
    ($name:ident) => {
        static $name: Paced = {
            static TIME: AtomicU64 = AtomicU64::new(0);
            static COST: [AtomicU64; 3] =
                [AtomicU64::new(10_000), AtomicU64::new(12_000), AtomicU64::new(20_000)];
            static FAILS: [AtomicBool; 3] = [const { AtomicBool::new(false) }; 3];

            struct Kernel<const I: usize>;

            impl<const I: usize> TernaryKernel for Kernel<I> {
                const NAME: &'static std::ffi::CStr = [c"a", c"b", c"c"][I];

                fn run(w: &WeightsRef, x: &ActivationsRef, s: &[u8], y: &mut OutputTile) -> KernelResult {
                    if y.rows_n().start == 0 && y.rows_m().start == 0 {
                        TIME.fetch_add(COST[I].load(Ordering::Relaxed), Ordering::Relaxed);
                    }
                    if FAILS[I].load(Ordering::Relaxed) {
                        return Err(KernelError::failed("out of sorts"));
                    }
                    Plain::run(w, x, s, y)
                }
            }

            bitnet_burn_plugin::plugin! {
                static PLUGIN = {
                    name: c"paced", version: c"1.0.0", kernels: [Kernel<0>, Kernel<1>, Kernel<2>]
                };
            }
            Paced { time: &TIME, cost: &COST, fails: &FAILS, plugin: &PLUGIN }
        };
    };
}

impl Paced {
    fn world(&self, file: Option<PathBuf>) -> Arc<World> {
        let memory = Mutex::new(Some(Memory { available: 8 << 30, total: 16 << 30 }));
        Arc::new(World { time: self.time, file, memory, reads: AtomicU64::new(0) })
    }

    fn register(&self, manager: &KernelManager) {
        manager.register(Plugin::built_in(self.plugin).unwrap()).unwrap();
    }

    /// One thread, these kernels, measured on their own clock.
    fn manager(&self, change: impl FnOnce(&mut ManagerConfig)) -> (KernelManager, Arc<World>) {
        let world = self.world(None);
        let mut config = ManagerConfig {
            threads: 1,
            cache_dir: None,
            tune_budget: Duration::from_secs(3600),
            probe: world.clone(),
            ..ManagerConfig::default()
        };
        change(&mut config);
        let manager = KernelManager::new(config).unwrap();
        self.register(&manager);
        (manager, world)
    }

    fn costs(&self, costs: [u64; 3]) {
        for (cost, ns) in self.cost.iter().zip(costs) {
            cost.store(ns, Ordering::Relaxed);
        }
    }

    fn fail(&self, fails: [bool; 3]) {
        for (known, fails) in self.fails.iter().zip(fails) {
            known.store(fails, Ordering::Relaxed);
        }
    }
}

/// What happened, as (what, kernel, how often).
fn events(manager: &KernelManager) -> Vec<(EventKind, String, u64)> {
    let events = manager.report().events;
    events.into_iter().map(|e| (e.kind, e.kernel.unwrap_or_default(), e.count)).collect()
}

fn of_kind(manager: &KernelManager, kind: EventKind) -> u64 {
    events(manager).iter().filter(|e| e.0 == kind).map(|e| e.2).sum()
}

/// Matmuls over one choice.
struct Use {
    problem: Problem,
    choice: Arc<CpuKernels>,
    packed: Packed,
}

impl Use {
    fn new(manager: &KernelManager, m: usize) -> Self {
        let problem = Problem::new(m, 66, 32);
        let (choice, packed) =
            manager.choose_and_pack((66, 32), LayoutPolicy::Any, &problem.weights).unwrap();
        Self { problem, choice, packed }
    }

    /// So many exact results.
    fn calls(&self, manager: &KernelManager, count: u64) {
        for _ in 0..count {
            self.problem.check(manager, &self.choice, &self.packed, "in use");
        }
    }

    /// The kernel that computes most of the next calls.
    fn by(&self, manager: &KernelManager) -> String {
        let before = manager.report();
        self.calls(manager, 5);
        manager.report().used_since(&before)[0].kernel.clone()
    }
}

/// A kernel that has become slow is found out within so many calls, the race included.
const BOUND: u64 = TIMED_EVERY * (WINDOW as u64 + 1) + 4 * (RACE_TURNS as u64 + 1);

paced!(ADAPTIVE);

#[test]
fn a_kernel_that_becomes_slow_loses_to_a_rival_and_wins_again_when_it_has_recovered() {
    let (manager, world) = ADAPTIVE.manager(|_| ());
    let one = Use::new(&manager, 1);
    assert_eq!(one.by(&manager), "paced/a");
    one.calls(&manager, 2000);
    assert_eq!(events(&manager), []);
    ADAPTIVE.costs([30_000, 12_000, 20_000]);
    one.calls(&manager, BOUND);
    assert_eq!(events(&manager), [(EventKind::Retuned, "paced/b".into(), 1)]);
    assert_eq!(one.by(&manager), "paced/b");
    let reason = manager.report().events[0].reason.clone();
    assert_eq!(
        reason, "12.0 us for paced/b, now that paced/a takes 30.0 us, 3.0 times what was expected",
        "the figures are exact on this clock"
    );
    // It stays slow. It is tried again now and then, less and less often, and nothing is said.
    let turns = |manager: &KernelManager| manager.report().kernels[0].calls;
    let before = turns(&manager);
    one.calls(&manager, 40_000);
    assert_eq!(events(&manager).len(), 1);
    let tried = turns(&manager) - before;
    assert!(tried <= 10 * (RACE_TURNS as u64 + 1), "{tried} calls of 40000");
    // Recovered.
    ADAPTIVE.costs([10_000, 12_000, 20_000]);
    let pause = Duration::from_secs(601).as_nanos() as u64;
    world.time.fetch_add(pause, Ordering::Relaxed);
    one.calls(&manager, BOUND);
    assert_eq!(one.by(&manager), "paced/a");
    assert_eq!(events(&manager)[1..], [(EventKind::Retuned, "paced/a".into(), 1)]);
    // Other rows have figures of their own.
    let eight = Use::new(&manager, 8);
    eight.calls(&manager, 500);
    assert_eq!(events(&manager).len(), 2);
    assert_eq!(manager.report().kernels.iter().map(|k| k.failures.total()).sum::<u64>(), 0);
}

paced!(THROTTLED);

#[test]
fn a_machine_that_becomes_slow_is_told_from_a_kernel_and_nothing_flips() {
    let (manager, _) = THROTTLED.manager(|_| ());
    let one = Use::new(&manager, 1);
    one.calls(&manager, 1000);
    for factor in [2, 4] {
        THROTTLED.costs([10_000 * factor, 12_000 * factor, 20_000 * factor]);
        one.calls(&manager, BOUND);
        let count = if factor == 2 { 1 } else { 2 };
        // Waiting for the next race takes a second on the clock, and calls.
        one.calls(&manager, 100_000);
        assert_eq!(events(&manager), [(EventKind::Throttled, "paced/a".into(), count)]);
        assert_eq!(one.by(&manager), "paced/a");
    }
    let reason = manager.report().events[0].reason.clone();
    assert!(reason.contains("2.0 times what was expected") && reason.contains("slower alike"), "{reason}");
    // Fast again: nothing to say, and the next slowness is seen again.
    THROTTLED.costs([10_000, 12_000, 20_000]);
    one.calls(&manager, 2000);
    assert_eq!(events(&manager).len(), 1);
    // The one in use became slower than it was, the others not, and it is the fastest still.
    THROTTLED.costs([17_000, 19_000, 20_000]);
    one.calls(&manager, 100_000);
    assert_eq!(one.by(&manager), "paced/a");
    let report = manager.report();
    let retuned = report.events.iter().find(|event| event.kind == EventKind::Retuned).unwrap();
    assert_eq!(retuned.kernel.as_deref(), Some("paced/a"));
    assert!(retuned.reason.contains("still the fastest"), "{retuned:?}");
}

paced!(THRESHOLD);

#[test]
fn beyond_a_threshold_a_kernel_is_demoted_until_probation_goes_well() {
    let (manager, _) =
        THRESHOLD.manager(|config| config.fallback = FallbackPolicy::OnPerformanceThreshold(2.0));
    let one = Use::new(&manager, 1);
    one.calls(&manager, 1000);
    THRESHOLD.costs([19_000, 12_000, 20_000]);
    one.calls(&manager, 2000);
    assert_eq!(events(&manager), [], "1.9 times is not enough");
    THRESHOLD.costs([30_000, 12_000, 20_000]);
    one.calls(&manager, BOUND);
    let first = manager.report().events.remove(0);
    assert_eq!((first.kind, first.kernel.as_deref()), (EventKind::Demoted, Some("paced/a")));
    assert_eq!(one.by(&manager), "paced/b");
    let failures = manager.report().kernels[0].failures;
    assert!(failures.slow > 0 && failures.total() == failures.slow, "{failures:?}");
    // Probation, with a back-off that doubles.
    one.calls(&manager, PROBATION_AFTER * 31);
    let probations = of_kind(&manager, EventKind::Probation);
    assert!((4..=5).contains(&probations), "{:?}", events(&manager));
    assert_eq!(of_kind(&manager, EventKind::Promoted), 0);
    THRESHOLD.costs([10_000, 12_000, 20_000]);
    one.calls(&manager, PROBATION_AFTER * 64);
    assert_eq!(of_kind(&manager, EventKind::Promoted), 1);
    assert_eq!(one.by(&manager), "paced/a");
    // The machine becomes slow: one after the other is found slow, and then all are back.
    THRESHOLD.costs([50_000, 60_000, 100_000]);
    one.calls(&manager, 4 * BOUND);
    assert_eq!(of_kind(&manager, EventKind::Throttled), 1, "{:?}", events(&manager));
    one.calls(&manager, 4 * BOUND);
    assert_eq!(one.by(&manager), "paced/a");
    assert_eq!(of_kind(&manager, EventKind::Throttled), 1, "{:?}", events(&manager));
}

paced!(FAILING);

#[test]
fn a_kernel_that_fails_is_demoted_counted_and_back_after_probation() {
    for policy in [FallbackPolicy::OnError, FallbackPolicy::Adaptive] {
        FAILING.fail([false; 3]);
        let (manager, world) = FAILING.manager(|config| config.fallback = policy);
        let one = Use::new(&manager, 1);
        one.calls(&manager, 300);
        let reads = world.reads.load(Ordering::Relaxed);
        FAILING.fail([true, false, false]);
        one.calls(&manager, 1);
        assert_eq!(events(&manager), [(EventKind::Demoted, "paced/a".into(), 1)]);
        assert_eq!(one.by(&manager), "paced/b");
        // 128, 256 and 512 calls later it is tried again, in vain.
        one.calls(&manager, PROBATION_AFTER * 7 + 20);
        let report = manager.report();
        assert_eq!(report.kernels[0].failures.status, 4, "{:?}", report.events);
        assert_eq!(report.fallbacks[0].count, 4);
        assert_eq!(report.fallbacks[0].replacement, "paced/b");
        assert_eq!(of_kind(&manager, EventKind::Promoted), 0);
        FAILING.fail([false; 3]);
        one.calls(&manager, PROBATION_AFTER * 8 + u64::from(TRIAL_CALLS));
        assert_eq!(of_kind(&manager, EventKind::Promoted), 1, "{:?}", events(&manager));
        assert_eq!(one.by(&manager), "paced/a");
        assert_eq!(manager.report().reference_calls, 0);
        if policy == FallbackPolicy::OnError {
            // Only calls on probation are timed.
            let read = world.reads.load(Ordering::Relaxed) - reads;
            assert!(read <= 2 * (3 + u64::from(TRIAL_CALLS)), "{read} looks at the clock");
        }
        // All of them fail: the reference computes, and they come back.
        FAILING.fail([true; 3]);
        one.calls(&manager, 1);
        assert_eq!(manager.report().reference_calls, 1);
        FAILING.fail([false; 3]);
        one.calls(&manager, PROBATION_AFTER * 40);
        assert_eq!(one.by(&manager), "paced/a");
    }
}

paced!(NEVER);

#[test]
fn what_is_forbidden_is_an_error_that_says_so() {
    let errors = |fails: bool, change: &dyn Fn(&mut ManagerConfig)| {
        NEVER.fail([false; 3]);
        let (manager, world) = NEVER.manager(|config| change(config));
        let problem = Problem::new(1, 66, 32);
        let choice = manager.choose((66, 32), LayoutPolicy::Any).unwrap();
        manager.warm_up(&choice, 1);
        NEVER.fail([fails, false, false]);
        let job = Job { choice: &choice, weights: &problem.weights, scale: 1.0.into(), column: 0 };
        let mut y = vec![0.0; 66];
        let reads = world.reads.load(Ordering::Relaxed);
        let results: Vec<_> = (0..300).map(|_| manager.matmul(&[job], &problem.x, &mut y, 66)).collect();
        let reads = world.reads.load(Ordering::Relaxed) - reads;
        (results.into_iter().filter_map(Result::err).collect::<Vec<_>>(), reads)
    };
    let (none, _) = errors(false, &|config| config.fallback = FallbackPolicy::Never);
    assert!(none.is_empty());
    let (all, reads) = errors(true, &|config| config.fallback = FallbackPolicy::Never);
    assert_eq!((all.len(), reads), (300, 0), "the others are not asked");
    let forced = |config: &mut ManagerConfig| config.force = Some("paced/a".into());
    let (failed, _) = errors(true, &|config| {
        forced(config);
        config.fallback = FallbackPolicy::Never;
    });
    let text = failed[0].to_string();
    for part in ["paced/a", "[1, 32] x [66, 32]ᵀ", "out of sorts", "the fallback policy (never)"] {
        assert!(text.contains(part), "{text}");
    }
    let (failed, _) = errors(true, &|config| {
        forced(config);
        config.strict = "no-fallback".parse().unwrap();
    });
    assert!(failed[0].to_string().contains("strict mode (no-fallback)"), "{}", failed[0]);
    // Others may take over, the reference may not, and there are no others.
    let (failed, _) = errors(true, &|config| {
        forced(config);
        config.strict = "quantised-kernels".parse().unwrap();
    });
    assert_eq!(failed.len(), 300, "it is tried every time, as nothing else may compute");
    assert!(matches!(failed[0], ManagerError::NoFallback { .. }), "{}", failed[0]);
    let (failed, _) = errors(true, &forced);
    assert!(failed.is_empty());
}

paced!(FEEDBACK);

#[test]
fn feedback_of_callers_has_effects() {
    let (manager, world) = FEEDBACK.manager(|config| config.fallback = FallbackPolicy::OnError);
    let one = Use::new(&manager, 1);
    assert_eq!(one.by(&manager), "paced/a");
    FEEDBACK.costs([30_000, 12_000, 20_000]);
    one.calls(&manager, 2000);
    assert_eq!(one.by(&manager), "paced/a", "nobody reads the clock");
    assert_eq!(manager.adapt(Feedback::Speed { measured: 20.0, goal: 20.0 }).unwrap(), 0);
    assert_eq!(manager.adapt(Feedback::Speed { measured: 7.0, goal: 20.0 }).unwrap(), 1);
    one.calls(&manager, 4 * (RACE_TURNS as u64 + 1));
    assert_eq!(one.by(&manager), "paced/b");
    assert_eq!(events(&manager), [(EventKind::Retuned, "paced/b".into(), 1)]);
    FEEDBACK.costs([10_000, 12_000, 20_000]);
    assert_eq!(manager.adapt(Feedback::Retune).unwrap(), 1);
    one.calls(&manager, 4 * (RACE_TURNS as u64 + 1));
    assert_eq!(one.by(&manager), "paced/a");

    let misbehaved =
        |kernel: &str| Feedback::Misbehaved { kernel: kernel.into(), reason: "the fan is loud".into() };
    assert!(matches!(manager.adapt(misbehaved("z")), Err(ManagerError::UnknownKernel { .. })));
    assert_eq!(manager.adapt(misbehaved("a")).unwrap(), 1);
    assert_eq!(one.by(&manager), "paced/b");
    assert!(manager.report().events.iter().any(|e| e.reason == "the fan is loud"));
    one.calls(&manager, PROBATION_AFTER + 10);
    assert_eq!(one.by(&manager), "paced/a");

    // Memory: what the manager sees, and what it is told.
    assert!(!manager.memory_is_low());
    *world.memory.lock().unwrap() = Some(Memory { available: 1 << 29, total: 16 << 30 });
    assert!(!manager.memory_is_low(), "it is looked at once a second at most");
    world.time.fetch_add(2_000_000_000, Ordering::Relaxed);
    assert!(manager.memory_is_low());
    *world.memory.lock().unwrap() = Some(Memory { available: 2 << 30, total: 16 << 30 });
    world.time.fetch_add(2_000_000_000, Ordering::Relaxed);
    assert!(!manager.memory_is_low());
    manager.adapt(Feedback::LowMemory(true)).unwrap();
    assert!(manager.memory_is_low());
    manager.adapt(Feedback::LowMemory(false)).unwrap();
    let of = |kind| of_kind(&manager, kind);
    assert_eq!((of(EventKind::LowMemory), of(EventKind::MemoryBack)), (2, 2));
}

#[test]
fn short_of_memory_new_weights_stay_canonical() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "private", &["PRIVATE", "GRANULE=8"]);
    static STILL: AtomicU64 = AtomicU64::new(0);
    let memory = Mutex::new(Some(Memory { available: 1 << 29, total: 16 << 30 }));
    // One that reads canonical weights, and takes its time.
    let slow = ["NAME=\"plain\"", "IN_RUN=if (tile->n0 == 0) tick(9000)"];
    let (plain, clock) = build_with_clock(dir.path(), "plain", &slow);
    let world = Arc::new(World { time: &STILL, file: Some(clock), memory, reads: AtomicU64::new(0) });
    let config = ManagerConfig {
        probe: world.clone(),
        tune_budget: Duration::from_secs(3600),
        ..config(&dir.path().join("cache"))
    };
    let manager = KernelManager::new(config).unwrap();
    manager.load_plugin(&path).unwrap();
    let only = Use::new(&manager, 1).choice;
    assert_eq!(only.layout(), Some("example/bytes"), "better than the reference");
    drop(only);
    manager.load_plugin(&plain).unwrap();
    let scarce = Use::new(&manager, 1);
    assert_eq!((scarce.choice.layout(), manager.memory_is_low()), (None, true));
    scarce.calls(&manager, 2);
    *world.memory.lock().unwrap() = Some(Memory { available: 8 << 30, total: 16 << 30 });
    assert_eq!(Use::new(&manager, 1).choice.layout(), Some("example/bytes"));
    assert_eq!(
        events(&manager),
        [(EventKind::LowMemory, String::new(), 1), (EventKind::MemoryBack, String::new(), 1)]
    );
    // An embedder's limit.
    manager.adapt(Feedback::LowMemory(true)).unwrap();
    assert_eq!(Use::new(&manager, 1).choice.layout(), None);
}

paced!(LIBRARY);

/// A manager on the clock of a plugin in C, and the rivals of `library`.
fn with_clock(dir: &Path, path: &Path, clock: &Path) -> KernelManager {
    let probe = LIBRARY.world(Some(clock.into()));
    let config =
        ManagerConfig { probe, tune_budget: Duration::from_secs(3600), ..config(&dir.join("cache")) };
    let manager = KernelManager::new(config).unwrap();
    manager.load_plugin(path).unwrap();
    LIBRARY.register(&manager);
    manager
}

/// A plugin whose clock is a file, and the file.
fn build_with_clock(dir: &Path, name: &str, defines: &[&str]) -> (PathBuf, PathBuf) {
    let clock = dir.join(format!("{name}.clock"));
    let file = format!("CLOCK_FILE=\"{}\"", clock.display());
    (build(dir, name, &[&[file.as_str()], defines].concat()), clock)
}

#[test]
fn a_plugin_that_becomes_slow_after_being_chosen_is_replaced() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let slow = "IN_RUN=if (tile->n0 == 0 && w->n == 66) tick(TIMES(calls) < 1000 ? 8000 : 40000)";
    let (path, clock) = build_with_clock(dir.path(), "slow", &[slow]);
    let manager = with_clock(dir.path(), &path, &clock);
    let one = Use::new(&manager, 1);
    assert_eq!(one.by(&manager), "example/plain");
    one.calls(&manager, 1000 + BOUND);
    assert_eq!(events(&manager), [(EventKind::Retuned, "paced/a".into(), 1)]);
    assert_eq!(one.by(&manager), "paced/a");
    let report = manager.report();
    assert!((900..1000 + BOUND).contains(&report.kernels[0].calls), "{:?}", report.kernels[0]);
    assert_eq!(report.reference_calls, 0);
    // The next process begins with what was learnt.
    let next = with_clock(dir.path(), &path, &clock);
    assert_eq!(Use::new(&next, 1).by(&next), "paced/a");
    assert_eq!(next.report().tuned, 0);
    let note = next.explain(1, (66, 32)).candidates[0].measurement.note.clone();
    assert_eq!(note.as_deref(), Some("compared again over live calls"));
}

#[test]
fn a_plugin_that_starts_to_fail_falls_back_and_is_promoted_when_it_recovers() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fails = "IN_RUN=if (tile->n0 == 0 && w->n == 66) { tick(8000); uint64_t call = TIMES(calls); \
                 if (call >= 1000 && call < 1003) { say(message, \"tired\"); return BITNET_FAILED; } }";
    let (path, clock) = build_with_clock(dir.path(), "fails", &[fails]);
    let manager = with_clock(dir.path(), &path, &clock);
    let one = Use::new(&manager, 1);
    one.calls(&manager, 1100);
    let report = manager.report();
    assert_eq!(report.kernels[0].failures.status, 1, "{:?}", report.events);
    assert!(report.fallbacks[0].reason.contains("tired"), "{:?}", report.fallbacks);
    assert_eq!((report.fallbacks[0].replacement.as_str(), report.reference_calls), ("paced/a", 0));
    one.calls(&manager, PROBATION_AFTER * 7 + 100);
    let kinds = [EventKind::Demoted, EventKind::Probation, EventKind::Promoted];
    let plain = |kind| (kind, "example/plain".to_owned(), if kind == EventKind::Promoted { 1 } else { 3 });
    assert_eq!(events(&manager), kinds.map(plain));
    assert_eq!(manager.report().kernels[0].failures.status, 3);
    assert_eq!(one.by(&manager), "example/plain");
}

#[test]
fn a_packing_whose_kernels_became_slow_is_left_where_that_pays() {
    if !has_compiler() {
        return;
    }
    // The others take 10 us.
    for (name, now_takes, pays) in [("a_little", 13_000, false), ("much", 4_000_000, true)] {
        let dir = tempfile::tempdir().unwrap();
        let slow =
            format!("IN_RUN=if (tile->n0 == 0 && w->n == 66) tick(TIMES(calls) < 1000 ? 8000 : {now_takes})");
        let (path, clock) = build_with_clock(dir.path(), name, &["PRIVATE", "GRANULE=66", &slow]);
        let manager = with_clock(dir.path(), &path, &clock);
        let (one, other) = (Use::new(&manager, 1), Use::new(&manager, 1));
        assert_eq!(one.choice.layout(), Some("example/bytes"));
        assert_eq!(one.by(&manager), "example/plain");
        one.calls(&manager, 1000 + BOUND);
        let fastest = if pays { "paced/a" } else { "example/plain" };
        let kind = if pays { EventKind::Retuned } else { EventKind::Throttled };
        assert_eq!(events(&manager), [(kind, fastest.into(), 1)]);
        assert_eq!((one.by(&manager).as_str(), other.by(&manager).as_str()), (fastest, fastest));
        let report = manager.report();
        assert_eq!((report.reference_calls, report.fallbacks.len()), (0, 0), "nothing failed");
        if pays {
            let reason = &report.events[0].reason;
            let expected = "10.0 us for paced/a (canonical), now that example/plain takes 4000.0 us, 500.0 times what was \
                            expected: weights are packed anew";
            assert_eq!(reason, expected);
            // New weights are not packed for it, in the next process neither.
            assert_eq!(Use::new(&manager, 1).choice.layout(), None);
            let next = with_clock(dir.path(), &path, &clock);
            assert_eq!((Use::new(&next, 1).choice.layout(), next.report().tuned), (None, 0));
        }
    }
}

#[test]
fn after_a_quarantine_weights_in_the_plugins_packing_are_packed_anew_once() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let wrong = "IN_RUN=if (w->n == 66 && TIMES(calls) >= 300) \
                 for (uint64_t n = tile->n0; n < tile->n1; n++) y->y[tile->m0 * y->stride + n] += 1";
    // What it unpacks is counted on its clock. It computes in no time, and is chosen.
    let count = "IN_UNPACK=if (w->n == 66) tick(1)";
    let (path, clock) = build_with_clock(dir.path(), "unpacks", &["PRIVATE", "GRANULE=66", count, wrong]);
    let manager = with_clock(dir.path(), &path, &clock);
    let unpacked = || std::fs::metadata(&clock).unwrap().len();
    let (one, other) = (Use::new(&manager, 1), Use::new(&manager, 3));
    assert_eq!(one.choice.layout(), Some("example/bytes"));
    let job = |of: &Use, y: &mut [f32]| {
        let Packed::Private(buffer) = &of.packed else { panic!("its packing") };
        let job = Job { choice: &of.choice, weights: buffer.as_slice(), scale: 0.37.into(), column: 0 };
        manager.matmul(&[job], &of.problem.x, y, 66).unwrap();
    };
    let mut y = vec![0.0; 3 * 66];
    while of_kind(&manager, EventKind::Quarantined) == 0 {
        assert!(manager.report().kernels[0].calls < 1000);
        job(&one, &mut y);
    }
    let before = unpacked();
    one.calls(&manager, 20);
    assert!(unpacked() <= before + 1, "unpacked {} times in 20 calls", unpacked() - before);
    let before = unpacked();
    for _ in 0..20 {
        one.calls(&manager, 1);
        other.calls(&manager, 1);
    }
    assert_eq!(unpacked(), before + 1, "once for the other weights");
    assert_eq!(one.by(&manager), "paced/a");
    assert_eq!(manager.report().reference_calls, 0);
}
