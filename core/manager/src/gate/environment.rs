//! What a kernel must leave as it found it: the process's threads. (The floating-point environment: [`crate::float`].)

#[cfg(target_os = "linux")]
use std::fs::File;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;

/// Threads of this process, where the system tells (Linux). Its file is opened once: a confined process opens none.
#[cfg(target_os = "linux")]
pub(super) fn threads() -> Option<usize> {
    use std::os::unix::fs::FileExt as _;

    static STATUS: OnceLock<Option<File>> = OnceLock::new();
    let file = STATUS.get_or_init(|| File::open("/proc/self/status").ok()).as_ref()?;
    let mut text = [0; 4096];
    let length = file.read_at(&mut text, 0).ok()?;
    let text = String::from_utf8_lossy(&text[..length]);
    text.lines().find_map(|line| line.strip_prefix("Threads:"))?.trim().parse().ok()
}

#[cfg(not(target_os = "linux"))]
pub(super) fn threads() -> Option<usize> {
    None
}

/// Whether there are more threads than `before`, for longer than a thread that was joined needs to go.
pub(super) fn more_threads_than(before: Option<usize>) -> Option<usize> {
    let before = before?;
    let mut now = threads()?;
    for _ in 0..50 {
        if now <= before {
            return None;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
        now = threads()?;
    }
    (now > before).then(|| now - before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_that_stays_is_counted() {
        let before = threads();
        assert!(before.is_some());
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || receiver.recv());
        // Other tests' threads come and go: at least this one is more.
        assert!(threads() >= Some(2));
        drop(sender);
        assert!(thread.join().unwrap().is_err());
    }
}
