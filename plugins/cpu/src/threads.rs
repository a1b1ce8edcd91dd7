//! How work is shared out: the caller's threads, and slices that their tasks write to.

use std::marker::PhantomData;

/// Threads that the caller lends to an operation.
///
/// # Safety
/// [`run`](Self::run) calls the task at most once with each index, only with indices below the number of tasks, and
/// returns (or unwinds) only after every call has ended. The operations hand each index a part of the result of its
/// own.
pub unsafe trait Threads: Sync {
    /// Number of threads, the caller's included.
    fn threads(&self) -> usize;

    /// Runs `task(0)` to `task(tasks - 1)`, each once, on any of the threads, and returns when all are done.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// A slice that several tasks write to, each its own part.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Shared` only hands out parts through `part`, whose callers promise that no two of them overlap,
// so sharing it between threads moves disjoint `&mut [T]` to them, which `T: Send` allows.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Wraps `slice` for the duration of one parallel section.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The elements `from .. from + len`.
    ///
    /// # Panics
    /// If they are not within the slice.
    ///
    /// # Safety
    /// No other part that overlaps this one may be alive.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &mut [T] {
        assert!(from <= self.len && len <= self.len - from, "part {from}+{len} of {}", self.len);
        // SAFETY: the range lies within the slice borrowed for 'a (asserted), and the caller promises that
        // no other part that overlaps is alive.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}

/// Runs `f(0..tasks)` on the threads, or on this one alone where there is nothing to share out or `parallel` is
/// false.
pub(crate) fn run(threads: &dyn Threads, parallel: bool, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
    if parallel && tasks > 1 && threads.threads() > 1 {
        threads.run(tasks, f);
    } else {
        (0..tasks).for_each(f);
    }
}

/// Whether a row of `width` elements in every `stride` elements, `rows` times, lies within `len` elements.
pub(crate) fn rows_fit(len: usize, rows: usize, width: usize, stride: usize) -> bool {
    rows == 0
        || (width <= stride || rows == 1)
            && (rows - 1).checked_mul(stride).and_then(|s| s.checked_add(width)).is_some_and(|s| s <= len)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::Threads;

    /// This many threads, started for each call.
    pub(crate) struct Scoped(pub(crate) usize);

    // SAFETY: the counter gives each index out once, those from `tasks` on are not used, and the scope ends after
    // its threads.
    unsafe impl Threads for Scoped {
        fn threads(&self) -> usize {
            self.0
        }

        fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
            let next = AtomicUsize::new(0);
            let work = || {
                loop {
                    match next.fetch_add(1, Ordering::Relaxed) {
                        index if index < tasks => task(index),
                        _ => break,
                    }
                }
            };
            std::thread::scope(|scope| {
                (1..self.0).for_each(|_| {
                    scope.spawn(work);
                });
                work();
            });
        }
    }
}
