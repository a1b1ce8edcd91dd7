//! What training needs beside the model: losses, gradients, and attention of whole sequences.
//!
//! Sums over many rows are made of partial sums over 64 rows each, added in ascending order, so that
//! results do not depend on the number of threads. Unlike the rest of the network, they are not promised to
//! be the same on every instruction set: matmuls are the `gemm` crate's.

mod cross_entropy;
mod gated;
mod norm;
mod self_attention;

pub use self::cross_entropy::{cross_entropy, cross_entropy_backward};
pub use self::gated::{
    gelu_mul_backward, gelu_tanh_mul_backward, relu2_mul_backward, sigmoid_mul_backward, silu_mul_backward,
};
pub use self::norm::{rms_norm_backward, rms_norm_backward_weight};
pub use self::self_attention::{Shape, self_attention, self_attention_backward};
use crate::simd::{Isa, exp};
use crate::threads::{Shared, Threads, run};

/// Rows of a task.
const ROWS: usize = 64;

/// Calls `f(first row, its rows of out)` for parts of [`ROWS`] rows.
fn by_parts(out: &mut [f32], width: usize, threads: &dyn Threads, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let rows = out.len() / width;
    let out = Shared::new(out);
    run(threads, rows > ROWS, rows.div_ceil(ROWS), &|task| {
        let (from, to) = (task * ROWS, ((task + 1) * ROWS).min(rows));
        // SAFETY: the tasks' rows are disjoint.
        f(from, unsafe { out.part(from * width, (to - from) * width) });
    });
}

/// A sum over `0..k` in 16 lanes, which vectorises.
#[inline(always)]
fn sum(k: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let whole = k / 16 * 16;
    for i in (0..whole).step_by(16) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(i + lane);
        }
    }
    for i in whole..k {
        lanes[i - whole] += term(i);
    }
    lanes.iter().sum()
}

#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(f32::NEG_INFINITY, |a, &v| if v > a { v } else { a })
}

/// out = factor * softmax(x).
#[inline(always)]
fn softmax<I: Isa>(isa: I, x: &[f32], out: &mut [f32], factor: f32) {
    let top = largest(x);
    for (out, &x) in out.iter_mut().zip(x) {
        *out = exp(isa, x - top);
    }
    let factor = factor / sum(out.len(), |i| out[i]);
    out.iter_mut().for_each(|v| *v *= factor);
}
