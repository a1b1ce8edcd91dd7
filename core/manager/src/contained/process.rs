//! The child as a process: it is started, its words are handed on, and its end is noticed.

use std::io::{BufRead as _, BufReader, Read};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};

use crate::gate::end_of;
use crate::plugin::shown;

/// Bytes of a plugin's words that are handed on.
const WORDS: u64 = 256 << 10;

/// A child, which does not outlive this value, nor this process.
pub(super) struct Process(Arc<Life>);

#[derive(Default)]
struct Life {
    ended: AtomicBool,
    /// How.
    how: Mutex<String>,
    /// Its number, as long as no other process can have it.
    number: Mutex<Option<libc::pid_t>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Process {
    /// Starts a program, whose words on stderr are handed on under a name.
    ///
    /// # Errors
    /// If the system can't.
    pub fn start(mut command: Command, name: String) -> std::io::Result<Self> {
        let life = Arc::new(Life::default());
        let (send, started) = mpsc::channel();
        let own = life.clone();
        // A thread of its own, which lives as long as the child: Linux ends a child with the thread that started it.
        std::thread::Builder::new().name("bitnet-contain".into()).spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    // Whoever waits for it is there.
                    let _ = send.send(Err(error));
                    return;
                }
            };
            // With its copies of the descriptors.
            drop(command);
            *lock(&own.number) = libc::pid_t::try_from(child.id()).ok();
            let _ = send.send(Ok(()));
            if let Some(pipe) = child.stderr.take() {
                hand_on(pipe, &name);
            }
            wait(child.id());
            *lock(&own.number) = None;
            *lock(&own.how) = match child.wait() {
                Ok(status) => end_of(status, None),
                Err(error) => format!("it ended ({error})"),
            };
            own.ended.store(true, Ordering::Release);
        })?;
        started.recv().unwrap_or_else(|_| Err(std::io::Error::other("its thread ended")))?;
        Ok(Self(life))
    }

    pub fn ended(&self) -> bool {
        self.0.ended.load(Ordering::Acquire)
    }

    /// How it ended.
    pub fn how(&self) -> String {
        lock(&self.0.how).clone()
    }

    /// Ends it, if it runs.
    pub fn end(&self) {
        if let Some(number) = *lock(&self.0.number) {
            // SAFETY: a signal to a child that was not waited for, so that the number is still its own.
            unsafe { libc::kill(number, libc::SIGKILL) };
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits for the end of a child, whose number stays its own.
fn wait(child: u32) {
    loop {
        // SAFETY: an all-zero siginfo is valid, and the system fills it.
        let result = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            libc::waitid(libc::P_PID, child, &raw mut info, libc::WEXITED | libc::WNOWAIT)
        };
        if result == 0 || std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// Prints what a plugin writes, line by line, under its name.
fn hand_on(pipe: impl Read, name: &str) {
    let mut pipe = BufReader::new(pipe);
    let mut left = WORDS;
    loop {
        let mut line = Vec::new();
        match pipe.by_ref().take(4096).read_until(b'\n', &mut line) {
            Ok(count) if count > 0 => {
                if left > 0 {
                    eprintln!("{name}: {}", shown(String::from_utf8_lossy(&line).trim_end()));
                }
                left = left.saturating_sub(count as u64);
            }
            _ => return,
        }
    }
}
