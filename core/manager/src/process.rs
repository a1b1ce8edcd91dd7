//! What plugins could do to the process: print, crash, end it, or never return.
//!
//! Every call of a plugin's function is entered in a table while it runs. A program that [guards](guard_process) itself names
//! the function that was running when the process ends within it.
#![allow(unsafe_code, reason = "descriptors and signals of the process")]

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Takes stdout away from everything else in the process: what is returned writes to it, and what plugins print goes to
/// stderr.
///
/// # Errors
/// If the process has no stdout, or no descriptor is left.
#[cfg(unix)]
pub fn take_stdout() -> io::Result<File> {
    use std::os::fd::FromRawFd as _;

    let check = |result: libc::c_int| match result {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    };
    // SAFETY: system calls on descriptors of this process; the duplicate belongs to the file from here on.
    unsafe {
        let out = File::from_raw_fd(check(libc::fcntl(libc::STDOUT_FILENO, libc::F_DUPFD_CLOEXEC, 3))?);
        check(libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO))?;
        Ok(out)
    }
}

/// A duplicate of stdout. On this system, plugins that print write to stdout, too.
///
/// # Errors
/// If the process has no stdout.
#[cfg(not(unix))]
pub fn take_stdout() -> io::Result<File> {
    use std::os::windows::io::{AsHandle as _, OwnedHandle};

    let handle: OwnedHandle = io::stdout().as_handle().try_clone_to_owned()?;
    Ok(File::from(handle))
}

/// Prepares a process that is going to hold a plugin: it leaves no core dump, has no descriptor beyond the first three and
/// `kept`, and, on Linux, ends with its parent.
///
/// # Errors
/// Those of the system.
#[cfg(unix)]
pub(crate) fn keep_alone(kept: Option<libc::c_int>) -> io::Result<()> {
    let check = |result: libc::c_int| match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    // SAFETY: system calls that concern this process alone.
    unsafe {
        // Crashing is what this process is for.
        let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        check(libc::setrlimit(libc::RLIMIT_CORE, &raw const limit))?;
        #[cfg(target_os = "linux")]
        {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            // What the parent left open. (Before Linux 5.9 there is no such call; descriptors of Rust programs are
            // closed by `exec`.)
            let close =
                |from: libc::c_uint, to: libc::c_uint| libc::syscall(libc::SYS_close_range, from, to, 0);
            match kept.and_then(|kept| libc::c_uint::try_from(kept).ok()).filter(|kept| *kept > 2) {
                None => close(3, libc::c_uint::MAX),
                Some(kept) => {
                    if kept > 3 {
                        close(3, kept - 1);
                    }
                    close(kept + 1, libc::c_uint::MAX)
                }
            };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = kept;
    Ok(())
}

/// What a plugin is asked to do: its kernel's name, its function, and M, N and K (0 where there is none).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub kernel: &'static str,
    pub function: &'static str,
    pub shape: [usize; 3],
}

/// One thread's calls.
struct Slot {
    taken: AtomicBool,
    /// Begun and ended calls: odd while one runs.
    calls: AtomicU64,
    kernel: AtomicPtr<u8>,
    kernel_bytes: AtomicUsize,
    function: AtomicPtr<u8>,
    function_bytes: AtomicUsize,
    shape: [AtomicUsize; 3],
}

static SLOTS: [Slot; 1100] = [const {
    Slot {
        taken: AtomicBool::new(false),
        calls: AtomicU64::new(0),
        kernel: AtomicPtr::new(null_mut()),
        kernel_bytes: AtomicUsize::new(0),
        function: AtomicPtr::new(null_mut()),
        function_bytes: AtomicUsize::new(0),
        shape: [const { AtomicUsize::new(0) }; 3],
    }
}; 1100];

thread_local! {
    /// Without a destructor, so that a signal handler may read it. The inner option is `None` if the table is full.
    static MINE: Cell<Option<Option<&'static Slot>>> = const { Cell::new(None) };
    static RELEASE: Release = const { Release };
}

/// Gives the thread's slot back when the thread ends.
struct Release;

impl Drop for Release {
    fn drop(&mut self) {
        if let Some(Some(slot)) = MINE.replace(Some(None)) {
            slot.taken.store(false, Ordering::Release);
        }
    }
}

/// What `f`, a call of a plugin's function, returns.
#[inline]
pub(crate) fn within<T>(call: Call, f: impl FnOnce() -> T) -> T {
    let Some(slot) = MINE.get().unwrap_or_else(enter) else { return f() };
    let calls = slot.calls.load(Relaxed);
    slot.kernel.store(call.kernel.as_ptr().cast_mut(), Relaxed);
    slot.kernel_bytes.store(call.kernel.len(), Relaxed);
    slot.function.store(call.function.as_ptr().cast_mut(), Relaxed);
    slot.function_bytes.store(call.function.len(), Relaxed);
    slot.shape.iter().zip(call.shape).for_each(|(place, size)| place.store(size, Relaxed));
    slot.calls.store(calls + 1, Ordering::Release);
    let result = f();
    slot.calls.store(calls + 2, Ordering::Release);
    result
}

#[cold]
fn enter() -> Option<&'static Slot> {
    let slot = SLOTS.iter().find(|slot| slot.taken.compare_exchange(false, true, AcqRel, Relaxed).is_ok());
    if slot.is_some() {
        RELEASE.with(|_| ());
    }
    MINE.set(Some(slot));
    slot
}

impl Slot {
    fn running(&self) -> Option<(u64, Call)> {
        let calls = self.calls.load(Acquire);
        if calls.is_multiple_of(2) {
            return None;
        }
        let text = |pointer: &AtomicPtr<u8>, bytes: &AtomicUsize| {
            // Pointer and length may be of two calls, if another thread reads while the next one begins; then `calls`
            // has changed, and they are not used.
            (pointer.load(Relaxed), bytes.load(Relaxed))
        };
        let (kernel, function) =
            (text(&self.kernel, &self.kernel_bytes), text(&self.function, &self.function_bytes));
        let shape = [0, 1, 2].map(|i| self.shape[i].load(Relaxed));
        if self.calls.load(Acquire) != calls {
            return None;
        }
        // SAFETY: the call is still the same, so that each pair is that of one `&'static str`.
        let [kernel, function] = [kernel, function].map(|(pointer, bytes)| unsafe {
            std::str::from_utf8_unchecked(std::slice::from_raw_parts(pointer, bytes))
        });
        Some((calls, Call { kernel, function, shape }))
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [m, n, k] = self.shape;
        write!(f, "kernel {}, function {} (m = {m}, n = {n}, k = {k})", self.kernel, self.function)
    }
}

/// How long a plugin's function may run, in [`POLL`]s: until it is named, and until the process ends.
const NAMED: u32 = 6;
const ENDED: u32 = 24;
const POLL: Duration = Duration::from_secs(5);

/// Has the function of a plugin named on stderr in which the process crashes, ends by `exit`, or hangs. After `exit` the
/// status is 1, whatever the plugin said. One that does not return is named after 30 seconds, and ends the process after
/// two minutes, with status 1.
///
/// For programs, as they start: it sets handlers of signals (SIGSEGV, SIGILL, SIGFPE, SIGABRT) and of `exit`, and starts a
/// thread.
pub fn guard_process() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        #[cfg(unix)]
        unix::install();
        let watch = || {
            let mut seen = vec![(0, 0); SLOTS.len()];
            loop {
                std::thread::sleep(POLL);
                watch(&SLOTS, &mut seen, &mut |call, polls| match polls {
                    NAMED => eprintln!("warning: {call} has not returned for 30 seconds"),
                    ENDED => {
                        eprintln!("error: {call} has not returned for two minutes; the program ends");
                        end(1);
                    }
                    _ => {}
                });
            }
        };
        // Without a thread for it, only hanging is not noticed.
        let _ = std::thread::Builder::new().name("bitnet-watch".into()).spawn(watch);
    });
}

/// Tells `each` of the calls that are the same as at the last poll, and for how many polls they have been.
fn watch(slots: &[Slot], seen: &mut [(u64, u32)], each: &mut dyn FnMut(Call, u32)) {
    for (slot, (last, polls)) in slots.iter().zip(seen) {
        match slot.running() {
            Some((calls, call)) if calls == *last => {
                *polls += 1;
                each(call, *polls);
            }
            Some((calls, _)) => (*last, *polls) = (calls, 0),
            None => *polls = 0,
        }
    }
}

/// Before the program itself calls [`std::process::exit`] while kernels may be running.
pub fn expect_exit() {
    EXPECTED.store(true, Relaxed);
}

static EXPECTED: AtomicBool = AtomicBool::new(false);

/// Ends the process without calling anything.
fn end(status: i32) -> ! {
    #[cfg(unix)]
    // SAFETY: ends the process.
    unsafe {
        libc::_exit(status)
    }
    #[cfg(not(unix))]
    std::process::exit(status)
}

#[cfg(unix)]
mod unix {
    use std::io::{Cursor, Write as _};
    use std::sync::OnceLock;

    use super::*;

    const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGABRT];

    /// What was there before: std tells stack overflows.
    static PREVIOUS: OnceLock<[libc::sigaction; 4]> = OnceLock::new();

    pub fn install() {
        // SAFETY: an all-zero sigaction is valid; the handlers do only what such functions may.
        unsafe {
            let mut previous: [libc::sigaction; 4] = std::mem::zeroed();
            for (signal, previous) in SIGNALS.into_iter().zip(&mut previous) {
                libc::sigaction(signal, std::ptr::null(), previous);
            }
            let _ = PREVIOUS.set(previous);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_crash as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            for signal in SIGNALS {
                libc::sigaction(signal, &action, null_mut());
            }
            libc::atexit(on_exit);
        }
    }

    /// Writes a line to stderr, without memory and without locks.
    fn say(line: std::fmt::Arguments<'_>) {
        let mut text = Cursor::new([0u8; 1024]);
        // A longer line is cut.
        let _ = text.write_fmt(line);
        // SAFETY: writes initialised bytes to a descriptor.
        unsafe { libc::write(libc::STDERR_FILENO, text.get_ref().as_ptr().cast(), text.position() as usize) };
    }

    extern "C" fn on_crash(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        if let Some((_, call)) = MINE.get().flatten().and_then(Slot::running) {
            say(format_args!("error: {call} crashed (signal {signal}), and the program ends with it\n"));
        }
        // The instruction is repeated, or `abort` raises the signal again, and what was there before handles it.
        if let (Some(previous), Some(i)) = (PREVIOUS.get(), SIGNALS.iter().position(|&other| other == signal))
        {
            // SAFETY: filled by `install`.
            unsafe { libc::sigaction(signal, &previous[i], null_mut()) };
        }
    }

    extern "C" fn on_exit() {
        if EXPECTED.load(Relaxed) {
            return;
        }
        // The program's own end comes after all calls.
        if let Some((_, call)) = SLOTS.iter().find_map(Slot::running) {
            say(format_args!(
                "error: {call} was running when something called exit; the result is not complete\n"
            ));
            end(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: Call = Call { kernel: "plugin/kernel", function: "run", shape: [1, 2, 3] };

    #[test]
    fn a_call_is_seen_while_it_runs_and_no_longer() {
        let mine = || MINE.get().flatten().and_then(Slot::running).map(|(_, call)| call.to_string());
        assert_eq!(mine(), None);
        let during = within(CALL, mine);
        assert_eq!(during.as_deref(), Some("kernel plugin/kernel, function run (m = 1, n = 2, k = 3)"));
        assert_eq!(mine(), None);
    }

    #[test]
    fn only_a_call_that_does_not_return_is_told() {
        let (begin, end) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        let hanging = Call { kernel: "hanging", ..CALL };
        std::thread::scope(|scope| {
            scope.spawn(|| within(hanging, || (begin.wait(), end.wait())));
            begin.wait();
            let (mut seen, mut told) = (vec![(0, 0); SLOTS.len()], Vec::new());
            for _ in 0..4 {
                // Another thread calls again and again.
                within(CALL, || ());
                watch(&SLOTS, &mut seen, &mut |call, polls| {
                    if call.kernel == "hanging" {
                        told.push(polls);
                    }
                });
            }
            assert_eq!(told, [1, 2, 3]);
            end.wait();
        });
    }

    #[test]
    fn threads_give_their_places_back() {
        let taken = || SLOTS.iter().filter(|slot| slot.taken.load(Relaxed)).count();
        for _ in 0..3 * SLOTS.len() {
            std::thread::spawn(|| within(CALL, || ())).join().unwrap();
        }
        // Those of other tests' threads.
        assert!(taken() < SLOTS.len() / 2, "{}", taken());
    }
}
