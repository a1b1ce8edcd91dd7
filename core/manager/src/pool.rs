//! The one thread pool that every kernel runs on.
//!
//! A fork-join per matmul, hundreds a token, has to cost about a microsecond: workers spin for a
//! moment after each job (the next one follows at once while a model runs) and sleep on a condition
//! variable otherwise. Workers that are late miss the job instead of delaying it, so that an
//! oversubscribed machine still makes progress at the speed of the threads that do run.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use core_affinity::CoreId;

use crate::cpu;
use crate::profile::{self, Operation};

/// How long an idle worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// Set while the job may be entered; the count of workers inside is in the bits below it.
const OPEN: u64 = 1 << 16;
const COUNT: u64 = OPEN - 1;
const GENERATION: u32 = 32;

/// A fixed number of threads (the caller's is one of them) that run the tasks of one job at a time.
pub struct Pool {
    shared: Arc<Shared>,
    /// Jobs of concurrent callers follow each other.
    caller: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

type Task<'a> = &'a (dyn Fn(usize) + Sync);

struct Shared {
    /// Generation of the job, whether it is open, and how many workers are inside.
    state: AtomicU64,
    /// The job; written only while closed and empty, read only from inside.
    job: UnsafeCell<(Task<'static>, usize)>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

// SAFETY: `job` is the only field that is not Sync by itself. It is written by the one caller that
// holds `Pool::caller` while the state is closed and counts no worker inside, and read only by workers
// that have entered, which the state allows only after that write was published.
unsafe impl Sync for Shared {}
// SAFETY: as above; the task it refers to is Sync.
unsafe impl Send for Shared {}

thread_local! {
    /// Whether this thread is running a task: a job started from within one runs inline.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// Number of this thread in its pool; 0 for callers.
    static NUMBER: Cell<usize> = const { Cell::new(0) };
}

impl Pool {
    /// A pool of `threads` threads, of which `threads - 1` are started now.
    ///
    /// # Errors
    /// If the system can't start a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        Self::start(threads, &[])
    }

    /// The same with each of the threads that are started pinned to a core of its own. The first core is left to
    /// the caller's thread, which is not pinned: what it starts later would be, too.
    ///
    /// # Errors
    /// If the system can't start a thread or pin one, or has fewer cores than `threads`.
    pub fn pinned(threads: usize) -> std::io::Result<Self> {
        // Elsewhere it would be a hint.
        if !cfg!(any(
            target_os = "linux",
            target_os = "android",
            target_os = "windows",
            target_os = "freebsd"
        )) {
            return Err(std::io::Error::other("threads can't be pinned on this system"));
        }
        let cores = cpu::by_cores();
        if threads > cores.len() {
            let problem = format!("{threads} threads can't be pinned to {} cores", cores.len());
            return Err(std::io::Error::other(problem));
        }
        Self::start(threads, &cores)
    }

    fn start(threads: usize, cores: &[CoreId]) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new((&|_| (), 0)),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let (send, pinned) = mpsc::channel();
        let mut pool = Self { shared, caller: Mutex::new(()), workers: Vec::new() };
        for i in 1..threads.clamp(1, COUNT as usize) {
            let (shared, send) = (pool.shared.clone(), send.clone());
            let core = cores.get(i).copied();
            pool.workers.push(std::thread::Builder::new().name(format!("bitnet-{i}")).spawn(move || {
                let pinned = core.is_none_or(core_affinity::set_for_current);
                // Without pinning there is no receiver.
                let _ = send.send(if pinned { Ok(()) } else { Err(core) });
                drop(send);
                NUMBER.set(i);
                shared.work();
            })?);
        }
        drop(send);
        if !cores.is_empty()
            && let Some(Err(Some(core))) = pinned.into_iter().find(Result::is_err)
        {
            return Err(refused(core));
        }
        Ok(pool)
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// In a task of this pool: the number of the thread that runs it, below [`threads`](Self::threads). No other task of the
    /// job runs on a thread of this number at the same time.
    pub fn thread(&self) -> usize {
        // A worker of another pool, whose number may be higher, runs a job inline: alone.
        NUMBER.get().min(self.workers.len())
    }

    /// Runs `task(0)` to `task(tasks - 1)`, each once, on the pool's threads and the caller's, and
    /// returns when all are done. A job started from within a task runs inline.
    ///
    /// # Panics
    /// If a task panics, with its payload, once no thread works on the job any more; tasks that had not
    /// begun by then may be left out.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || tasks <= 1 || INSIDE.get() {
            for i in 0..tasks {
                task(i);
            }
            return;
        }
        let _turn = self.caller.lock().unwrap_or_else(|e| e.into_inner());
        let shared = &*self.shared;
        // SAFETY: this only lengthens the lifetime. No worker is inside after this function returns or unwinds: it
        // waits for the count to reach zero with the job closed. Nothing between here and there unwinds: the only
        // foreign code is the task, whose panics `drain` catches, and their payloads, which `drain` does not drop;
        // locking and waking do not panic.
        let task: Task<'static> = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        // SAFETY: this thread holds `caller`, and the state is closed and empty since the last job.
        unsafe { *shared.job.get() = (task, tasks) };
        shared.next.store(0, Ordering::Relaxed);
        let generation = (shared.state.load(Ordering::Relaxed) >> GENERATION).wrapping_add(1);
        shared.state.store(generation << GENERATION | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _sleep = shared.sleep.lock().unwrap_or_else(|e| e.into_inner());
            shared.wake.notify_all();
        }
        shared.drain(task, tasks);
        let _waiting = profile::span(Operation::Waiting);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while shared.state.load(Ordering::Acquire) & COUNT != 0 {
            spins += 1;
            if spins.is_multiple_of(1 << 14) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        let payload = shared.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }
}

fn refused(core: CoreId) -> std::io::Error {
    std::io::Error::other(format!("the system does not pin a thread to core {}", core.id))
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _sleep = self.shared.sleep.lock().unwrap_or_else(|e| e.into_inner());
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks; there is nothing to learn from its result.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Shared {
    /// Runs tasks until none is left.
    fn drain(&self, task: Task, tasks: usize) {
        INSIDE.set(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next.fetch_add(1, Ordering::Relaxed);
                if i >= tasks {
                    break;
                }
                task(i);
            }
        }));
        INSIDE.set(false);
        if let Err(payload) = outcome {
            let mut first = self.panic.lock().unwrap_or_else(|e| e.into_inner());
            match &*first {
                None => *first = Some(payload),
                // The caller gets one. Dropping another would run its code, which may panic again, while other threads
                // are still inside.
                Some(_) => std::mem::forget(payload),
            }
        }
    }

    /// Whether there is an open job that this worker has not been inside of.
    fn fresh(&self, state: u64, last: u64) -> bool {
        state & OPEN != 0 && state >> GENERATION != last
    }

    fn work(&self) {
        let mut last = 0;
        let mut idle_since = Instant::now();
        let mut spins = 0u32;
        while !self.stop.load(Ordering::Relaxed) {
            let state = self.state.load(Ordering::Acquire);
            if self.fresh(state, last) {
                if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
                {
                    last = state >> GENERATION;
                    // SAFETY: entered while open, so the caller's write happened before, and it does
                    // not write again before this worker leaves.
                    let (task, tasks) = unsafe { *self.job.get() };
                    self.drain(task, tasks);
                    self.state.fetch_sub(1, Ordering::AcqRel);
                    idle_since = Instant::now();
                }
                continue;
            }
            std::hint::spin_loop();
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(64) && idle_since.elapsed() > SPIN {
                self.rest(last);
                idle_since = Instant::now();
            }
        }
    }

    /// Sleeps until there is something to do. The caller publishes a job before it looks for
    /// sleepers, and a sleeper announces itself before it looks for a job, both sequentially
    /// consistent, so one of them sees the other.
    fn rest(&self, last: u64) {
        let mut sleep = self.sleep.lock().unwrap_or_else(|e| e.into_inner());
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !self.stop.load(Ordering::SeqCst) && !self.fresh(self.state.load(Ordering::SeqCst), last) {
            sleep = self.wake.wait(sleep).unwrap_or_else(|e| e.into_inner());
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_also_after_the_workers_slept() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for round in 0..300 {
                let counts: Vec<AtomicUsize> = (0..round % 17).map(|_| AtomicUsize::new(0)).collect();
                pool.run(counts.len(), &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                if round % 100 == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn pinned_threads_stay_on_their_cores_and_the_caller_is_free() {
        let cores = cpu::by_cores();
        let threads = cores.len().min(3);
        let pool = Pool::pinned(threads).unwrap();
        let seen = Mutex::new(Vec::new());
        let all = std::sync::Barrier::new(threads);
        pool.run(threads, &|_| {
            all.wait();
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            seen.lock().unwrap().push((name, core_affinity::get_core_ids().unwrap()));
        });
        for (name, allowed) in seen.into_inner().unwrap() {
            match name.strip_prefix("bitnet-").and_then(|i| i.parse::<usize>().ok()) {
                Some(i) => assert_eq!(allowed, [cores[i]]),
                None => assert_eq!(allowed.len(), cores.len()),
            }
        }
        let error = Pool::pinned(cores.len() + 1).unwrap_err().to_string();
        assert!(error.contains(&format!("{} cores", cores.len())), "{error}");
    }

    #[test]
    fn callers_on_several_threads_and_nested_jobs_do_not_mix() {
        let pool = Pool::new(3).unwrap();
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(5, &|_| {
                            pool.run(2, &|_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 50 * 5 * 2);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2).unwrap();
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|i| {
                if i == 5 {
                    panic!("task five")
                }
            })
        }));
        assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"task five"));
        let ran = AtomicUsize::new(0);
        pool.run(8, &|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 8);
    }

    /// Panics when it is dropped, unless that is while a panic unwinds.
    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            if !std::thread::panicking() {
                panic!("the payload's drop");
            }
        }
    }

    #[test]
    fn a_second_payload_whose_drop_panics_does_not_end_the_job_while_a_worker_is_inside() {
        let pool = Pool::new(3).unwrap();
        let (inside, panicked, done) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
        let caller = std::thread::current().id();
        let slow = AtomicBool::new(false);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(3, &|_| {
                inside.fetch_add(1, Ordering::SeqCst);
                // All three threads are in.
                while inside.load(Ordering::SeqCst) < 3 {
                    std::thread::yield_now();
                }
                let is_caller = std::thread::current().id() == caller;
                if !is_caller && !slow.swap(true, Ordering::SeqCst) {
                    // Until both others have panicked, and a moment longer, in which `run` could return.
                    while panicked.load(Ordering::SeqCst) < 2 {
                        std::thread::yield_now();
                    }
                    std::thread::sleep(Duration::from_millis(200));
                    done.store(true, Ordering::SeqCst);
                    return;
                }
                // The caller's payload is the second one.
                while is_caller && panicked.load(Ordering::SeqCst) < 1 {
                    std::thread::yield_now();
                }
                if is_caller {
                    std::thread::sleep(Duration::from_millis(50));
                }
                panicked.fetch_add(1, Ordering::SeqCst);
                std::panic::panic_any(Bomb);
            });
        }));
        assert!(done.load(Ordering::SeqCst), "run returned while a worker was inside");
        let payload = caught.unwrap_err();
        assert!(payload.is::<Bomb>());
        std::mem::forget(payload);
    }
}
