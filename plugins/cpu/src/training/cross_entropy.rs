//! The loss of a language model and its gradient.

use super::{by_parts, largest, softmax, sum};
use crate::simd::{Isa, Kernel, Level, exp};
use crate::threads::Threads;

/// `-ln softmax(logits)[target]`, by rows of `n` logits.
///
/// # Panics
/// If a target is not below `n`, or the slices' lengths do not fit.
pub fn cross_entropy(logits: &[f32], targets: &[u32], n: usize, out: &mut [f32], threads: &dyn Threads) {
    assert!(Some(logits.len()) == targets.len().checked_mul(n) && out.len() == targets.len(), "rows of {n}");
    assert!(targets.iter().all(|&t| (t as usize) < n), "a target beyond {n}");
    by_parts(out, 1, threads, &|first, out| {
        let logits = &logits[first * n..][..out.len() * n];
        Level::best().run(CrossEntropy { logits, targets: &targets[first..][..out.len()], n, out });
    });
}

struct CrossEntropy<'a> {
    logits: &'a [f32],
    targets: &'a [u32],
    n: usize,
    out: &'a mut [f32],
}

impl Kernel for CrossEntropy<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for ((row, &target), out) in self.logits.chunks_exact(self.n).zip(self.targets).zip(self.out) {
            let top = largest(row);
            let total = sum(row.len(), |i| exp(isa, row[i] - top));
            *out = total.ln() - (row[target as usize] - top);
        }
    }
}

/// The gradient of [`cross_entropy`] for the logits: d * (softmax(logits) - 1 at the target).
///
/// # Panics
/// As [`cross_entropy`].
pub fn cross_entropy_backward(
    logits: &[f32],
    targets: &[u32],
    d: &[f32],
    n: usize,
    out: &mut [f32],
    threads: &dyn Threads,
) {
    assert!(
        Some(logits.len()) == targets.len().checked_mul(n)
            && out.len() == logits.len()
            && d.len() == targets.len(),
        "rows of {n}"
    );
    assert!(targets.iter().all(|&t| (t as usize) < n), "a target beyond {n}");
    by_parts(out, n, threads, &|first, out| {
        let rows = out.len() / n;
        let (logits, targets) = (&logits[first * n..][..out.len()], &targets[first..][..rows]);
        Level::best().run(CrossEntropyBackward { logits, targets, d: &d[first..][..rows], n, out });
    });
}

struct CrossEntropyBackward<'a> {
    logits: &'a [f32],
    targets: &'a [u32],
    d: &'a [f32],
    n: usize,
    out: &'a mut [f32],
}

impl Kernel for CrossEntropyBackward<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let rows = self.logits.chunks_exact(self.n).zip(self.out.chunks_exact_mut(self.n));
        for (((row, out), &target), &d) in rows.zip(self.targets).zip(self.d) {
            softmax(isa, row, out, d);
            out[target as usize] -= d;
        }
    }
}
