//! Dense arithmetic on host memory: the parts of the network that are not ternary.
//!
//! Plain functions over slices, without Burn's types, which the fast bodies of the host backends call: the
//! dense linear layer of lm_head ([`dense`]; [`dense_int8`] with int8 activations), attention over a KV cache
//! ([`attention`]), and rotary embedding, norms, gated activations and the rest ([`elementwise`]). What only
//! training needs is in [`training`], with numerics of its own.
//!
//! # Numerics
//! Results are the same, bit for bit, on every instruction set, with any number of threads, whatever the
//! number of rows in a call and however a prompt is cut into chunks. (A NaN stays a NaN; which NaN it is, is
//! not specified.) That holds because every reduction has one order, in [`dense_int8`] the one stated there,
//! else this:
//! - A dot product or a sum over `k` elements uses 16 lanes. Lane `l` starts at +0 and takes the elements
//!   `l`, `16 + l`, `32 + l`, … in ascending order, each by one fused multiply-add (one rounding). Elements
//!   past the end are skipped: lanes without one keep their value.
//! - The lanes are then added by one tree: `l + (l+8)`, `l + (l+4)`, `l + (l+2)`, `0 + 1`.
//! - Each row or each (query, head) is computed by the same operations whichever others are computed beside
//!   it.
//!
//! Every instruction set has fused multiply-add, IEEE division and square root; where the hardware lacks the
//! first (x86-64 before AVX2), [`simd::Portable`] computes the same rounding in double precision.

pub(crate) mod attention;
#[cfg(feature = "flex")]
pub(crate) mod cache_memory;
pub(crate) mod dense;
pub(crate) mod dense_int8;
pub(crate) mod elementwise;
pub(crate) mod simd;
pub(crate) mod training;

use std::marker::PhantomData;

use bitnet_burn_manager::pool::Pool;

/// A slice that several tasks of a pool write to, each its own part.
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
        // nobody else holds an overlapping part.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}

/// Runs `f(0..tasks)` on the pool, or on this thread where there is nothing to share out or `parallel` is
/// false.
pub(crate) fn run(pool: &Pool, parallel: bool, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
    if parallel && tasks > 1 && pool.threads() > 1 {
        pool.run(tasks, f);
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
