//! What training needs beside the model: losses, gradients, and attention of whole sequences.
//!
//! Sums over many rows are made of partial sums over [`ROWS`] rows each, added in ascending order, so that
//! results do not depend on the number of threads. Unlike the rest of the network, they are not promised to
//! be the same on every instruction set: matmuls are the `gemm` crate's.

use bitnet_burn_manager::pool::Pool;

use super::elementwise::{Gate, Relu2, Silu, turn};
use super::simd::{Isa, Kernel, Level, exp};
use super::{Shared, run};

/// Rows of a task.
const ROWS: usize = 64;

/// Calls `f(first row, its rows of out)` for parts of [`ROWS`] rows.
fn by_parts(out: &mut [f32], width: usize, pool: &Pool, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let rows = out.len() / width;
    let out = Shared::new(out);
    run(pool, rows > ROWS, rows.div_ceil(ROWS), &|task| {
        let (from, to) = (task * ROWS, ((task + 1) * ROWS).min(rows));
        // SAFETY: the tasks' rows are disjoint.
        f(from, unsafe { out.part(from * width, (to - from) * width) });
    });
}

/// The gradient of y = x / sqrt(mean(x^2) + eps) * weight for x, by rows of K: with r = 1 / sqrt(mean(x^2) +
/// eps) and g = dy * weight, dx = r * (g - x * r^2 * mean(g * x)).
///
/// # Panics
/// If the slices' lengths do not fit.
pub(crate) fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    dy: &[f32],
    eps: f32,
    dx: &mut [f32],
    pool: &Pool,
) {
    let k = weight.len();
    assert!(x.len() == dy.len() && x.len() == dx.len() && x.len().is_multiple_of(k), "rows of {k}");
    by_parts(dx, k, pool, &|first, dx| {
        let part = first * k..first * k + dx.len();
        Level::best().run(RmsNormBackward { x: &x[part.clone()], weight, dy: &dy[part], eps, dx });
    });
}

struct RmsNormBackward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    dy: &'a [f32],
    eps: f32,
    dx: &'a mut [f32],
}

impl Kernel for RmsNormBackward<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let k = self.weight.len();
        let rows = self.x.chunks_exact(k).zip(self.dy.chunks_exact(k)).zip(self.dx.chunks_exact_mut(k));
        for ((x, dy), dx) in rows {
            let r = inverse_root(x, self.eps);
            let g_x = sum(k, |i| dy[i] * self.weight[i] * x[i]) / k as f32;
            let factor = r * r * g_x;
            for (((dx, &x), &dy), &w) in dx.iter_mut().zip(x).zip(dy).zip(self.weight) {
                *dx = r * (dy * w - x * factor);
            }
        }
    }
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
fn inverse_root(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

/// The gradient of the same for the weight `[K]`: the sum over the rows of dy * x * r.
///
/// # Panics
/// If the slices' lengths do not fit.
pub(crate) fn rms_norm_backward_weight(x: &[f32], dy: &[f32], eps: f32, dw: &mut [f32], pool: &Pool) {
    let k = dw.len();
    assert!(x.len() == dy.len() && x.len().is_multiple_of(k), "rows of {k}");
    let parts = (x.len() / k).div_ceil(ROWS);
    let mut partial = vec![0f32; parts * k];
    let shared = Shared::new(&mut partial);
    run(pool, parts > 1, parts, &|task| {
        // SAFETY: each task has a part of its own.
        let sums = unsafe { shared.part(task * k, k) };
        let part = task * ROWS * k..((task + 1) * ROWS * k).min(x.len());
        Level::best().run(RmsNormBackwardWeight { x: &x[part.clone()], dy: &dy[part], eps, sums });
    });
    dw.fill(0.0);
    for part in partial.chunks_exact(k) {
        dw.iter_mut().zip(part).for_each(|(dw, part)| *dw += part);
    }
}

struct RmsNormBackwardWeight<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    eps: f32,
    sums: &'a mut [f32],
}

impl Kernel for RmsNormBackwardWeight<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let k = self.sums.len();
        for (x, dy) in self.x.chunks_exact(k).zip(self.dy.chunks_exact(k)) {
            let r = inverse_root(x, self.eps);
            for ((sum, &x), &dy) in self.sums.iter_mut().zip(x).zip(dy) {
                *sum += dy * (x * r);
            }
        }
    }
}

/// The gradient of relu(gate)^2 * up: rows [gate, up] and dy to rows [d gate, d up].
pub(crate) fn relu2_mul_backward(gate_up: &[f32], dy: &[f32], f: usize, out: &mut [f32], pool: &Pool) {
    gated_backward(gate_up, dy, f, out, pool, Relu2);
}

/// The gradient of silu(gate) * up.
pub(crate) fn silu_mul_backward(gate_up: &[f32], dy: &[f32], f: usize, out: &mut [f32], pool: &Pool) {
    gated_backward(gate_up, dy, f, out, pool, Silu);
}

fn gated_backward(gate_up: &[f32], dy: &[f32], f: usize, out: &mut [f32], pool: &Pool, gate: impl Gate) {
    assert!(gate_up.len() == out.len() && gate_up.len() == 2 * dy.len(), "gates and values for {}", dy.len());
    by_parts(out, 2 * f, pool, &|first, out| {
        let gate_up = &gate_up[2 * first * f..][..out.len()];
        let dy = &dy[first * f..][..out.len() / 2];
        Level::best().run(GatedBackward { gate_up, dy, f, out, gate });
    });
}

struct GatedBackward<'a, G> {
    gate_up: &'a [f32],
    dy: &'a [f32],
    f: usize,
    out: &'a mut [f32],
    gate: G,
}

impl<G: Gate> Kernel for GatedBackward<'_, G> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let f = self.f;
        let rows = self.gate_up.chunks_exact(2 * f).zip(self.dy.chunks_exact(f));
        for ((gate_up, dy), out) in rows.zip(self.out.chunks_exact_mut(2 * f)) {
            let (g, u) = gate_up.split_at(f);
            let (dg, du) = out.split_at_mut(f);
            for ((((dg, du), &g), &u), &dy) in dg.iter_mut().zip(du).zip(g).zip(u).zip(dy) {
                let (value, slope) = self.gate.value_and_slope(isa, g);
                *dg = dy * u * slope;
                *du = dy * value;
            }
        }
    }
}

/// `-ln softmax(logits)[target]`, by rows of `n` logits.
///
/// # Panics
/// If a target is not below `n`, or the slices' lengths do not fit.
pub(crate) fn cross_entropy(logits: &[f32], targets: &[u32], n: usize, out: &mut [f32], pool: &Pool) {
    assert!(logits.len() == targets.len() * n && out.len() == targets.len(), "rows of {n}");
    assert!(targets.iter().all(|&t| (t as usize) < n), "a target beyond {n}");
    by_parts(out, 1, pool, &|first, out| {
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

#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(f32::NEG_INFINITY, |a, &v| if v > a { v } else { a })
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
pub(crate) fn cross_entropy_backward(
    logits: &[f32],
    targets: &[u32],
    d: &[f32],
    n: usize,
    out: &mut [f32],
    pool: &Pool,
) {
    assert!(
        logits.len() == targets.len() * n && out.len() == logits.len() && d.len() == targets.len(),
        "rows of {n}"
    );
    assert!(targets.iter().all(|&t| (t as usize) < n), "a target beyond {n}");
    by_parts(out, n, pool, &|first, out| {
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

/// Shape of [`self_attention`].
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    /// Rows of a sequence.
    pub length: usize,
}

impl Shape {
    fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Values of a row of queries, keys and values.
    fn width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Queries of one block of rows against all rows up to them: this many at a time.
const BLOCK: usize = 64;

/// A matrix in memory, with the distances of its rows and columns.
#[derive(Clone, Copy)]
struct View<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    fn new(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { values, rows, columns, row_stride, column_stride: 1 }
    }

    fn transposed(self) -> Self {
        let Self { values, rows, columns, row_stride, column_stride } = self;
        Self { values, rows: columns, columns: rows, row_stride: column_stride, column_stride: row_stride }
    }

    fn end(&self) -> usize {
        if self.rows == 0 || self.columns == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}

/// out (+)= a * b, rows of out `stride` apart, on this thread.
fn matmul(out: &mut [f32], stride: usize, a: View<'_>, b: View<'_>, add: bool) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert!(b.rows == k && m > 0 && n > 0 && k > 0 && n <= stride, "[{m}, {k}] times [{}, {n}]", b.rows);
    assert!(out.len() >= (m - 1) * stride + n && a.values.len() >= a.end() && b.values.len() >= b.end());
    // SAFETY: every element that the strides and sizes name lies within its slice (asserted), and `out` is
    // borrowed exclusively.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            add,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// One sequence's rows for one kv head: everything that attention needs, contiguous.
struct Head<'a> {
    shape: Shape,
    /// [group][length, d], turned and scaled by 1 / sqrt(d).
    q: Vec<f32>,
    /// [length, d], turned.
    k: Vec<f32>,
    /// From the first value on, rows `width` apart.
    v: &'a [f32],
}

impl<'a> Head<'a> {
    fn new(shape: Shape, qkv: &'a [f32], cos: &[f32], sin: &[f32], head: usize) -> Self {
        let Shape { n_heads, n_kv_heads, head_dim: d, length } = shape;
        let (width, group, half) = (shape.width(), shape.group(), d / 2);
        let angles = |row: usize| (&cos[row * half..][..half], &sin[row * half..][..half]);
        let mut q = vec![0f32; group * length * d];
        for g in 0..group {
            for row in 0..length {
                let x = &qkv[row * width + (head * group + g) * d..][..d];
                let (cos, sin) = angles(row);
                turn(x, cos, sin, &mut q[(g * length + row) * d..][..d]);
            }
        }
        q.iter_mut().for_each(|q| *q *= shape.scale());
        let mut k = vec![0f32; length * d];
        for row in 0..length {
            let x = &qkv[row * width + (n_heads + head) * d..][..d];
            let (cos, sin) = angles(row);
            turn(x, cos, sin, &mut k[row * d..][..d]);
        }
        Self { shape, q, k, v: &qkv[(n_heads + n_kv_heads + head) * d..] }
    }

    fn keys(&self, rows: usize) -> View<'_> {
        let d = self.shape.head_dim;
        View::new(&self.k, rows, d, d)
    }

    fn values(&self, rows: usize) -> View<'_> {
        View::new(self.v, rows, self.shape.head_dim, self.shape.width())
    }

    fn queries(&self, g: usize, from: usize, to: usize) -> View<'_> {
        let Shape { head_dim: d, length, .. } = self.shape;
        View::new(&self.q[(g * length + from) * d..], to - from, d, d)
    }

    /// softmax(q kᵀ) of the rows `from..to` over the rows `..to`, zero where a row does not look.
    fn weights(&self, g: usize, from: usize, to: usize, scores: &mut [f32], out: &mut [f32]) {
        matmul(scores, to, self.queries(g, from, to), self.keys(to).transposed(), false);
        Level::best().run(CausalSoftmax { scores, from, to, out });
    }
}

struct CausalSoftmax<'a> {
    scores: &'a [f32],
    from: usize,
    to: usize,
    out: &'a mut [f32],
}

impl Kernel for CausalSoftmax<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let rows = self.scores.chunks_exact(self.to).zip(self.out.chunks_exact_mut(self.to));
        for ((scores, out), row) in rows.zip(self.from..self.to) {
            let (seen, hidden) = out.split_at_mut(row + 1);
            softmax(isa, &scores[..=row], seen, 1.0);
            hidden.fill(0.0);
        }
    }
}

/// Causal attention of sequences over themselves, see `TernaryBackend::self_attention`.
///
/// # Panics
/// If the slices' lengths do not fit.
pub(crate) fn self_attention(
    qkv: &[f32],
    cos: &[f32],
    sin: &[f32],
    shape: Shape,
    out: &mut [f32],
    pool: &Pool,
) {
    let Shape { n_heads, n_kv_heads, head_dim: d, length } = shape;
    let (width, out_width, group) = (shape.width(), n_heads * d, shape.group());
    let sequences = qkv.len() / (width * length);
    assert!(out.len() == sequences * length * out_width, "{sequences} sequences of {length}");
    let out = Shared::new(out);
    run(pool, true, sequences * n_kv_heads, &|task| {
        let (sequence, head) = (task / n_kv_heads, task % n_kv_heads);
        let first = sequence * length;
        let parts = Head::new(shape, &qkv[first * width..][..length * width], cos, sin, head);
        let mut scores = vec![0f32; BLOCK * length];
        let mut weights = vec![0f32; BLOCK * length];
        let mut y = vec![0f32; BLOCK * d];
        for g in 0..group {
            for from in (0..length).step_by(BLOCK) {
                let to = (from + BLOCK).min(length);
                let (scores, weights) = (&mut scores[..(to - from) * to], &mut weights[..(to - from) * to]);
                parts.weights(g, from, to, scores, weights);
                matmul(&mut y, d, View::new(weights, to - from, to, to), parts.values(to), false);
                for (row, y) in (from..to).zip(y.chunks_exact(d)) {
                    // SAFETY: each (row, head) belongs to one task.
                    let out = unsafe { out.part((first + row) * out_width + (head * group + g) * d, d) };
                    out.copy_from_slice(y);
                }
            }
        }
    });
}

/// The gradient of [`self_attention`] for its queries, keys and values, of dy like its output.
///
/// # Panics
/// If the slices' lengths do not fit.
pub(crate) fn self_attention_backward(
    qkv: &[f32],
    cos: &[f32],
    sin: &[f32],
    dy: &[f32],
    shape: Shape,
    out: &mut [f32],
    pool: &Pool,
) {
    let Shape { n_heads, n_kv_heads, head_dim: d, length } = shape;
    let (width, dy_width, group, half) = (shape.width(), n_heads * d, shape.group(), d / 2);
    let sequences = qkv.len() / (width * length);
    assert!(out.len() == qkv.len() && dy.len() == sequences * length * dy_width, "{sequences} of {length}");
    // Turning by the opposite angle is the gradient of turning.
    let back: Vec<f32> = sin.iter().map(|s| -s).collect();
    let out = Shared::new(out);
    run(pool, true, sequences * n_kv_heads, &|task| {
        let (sequence, head) = (task / n_kv_heads, task % n_kv_heads);
        let first = sequence * length;
        let parts = Head::new(shape, &qkv[first * width..][..length * width], cos, sin, head);
        let mut scores = vec![0f32; BLOCK * length];
        let mut weights = vec![0f32; BLOCK * length];
        let mut d_weights = vec![0f32; BLOCK * length];
        let mut dq = vec![0f32; length * d];
        let mut dk = vec![0f32; length * d];
        let mut dv = vec![0f32; length * d];
        // SAFETY: each (row, query head) and (row, kv head) belongs to one task, which holds one at a time.
        let place = |row: usize, column: usize| unsafe { out.part((first + row) * width + column * d, d) };
        let turn_back = |row: usize, x: &[f32], out: &mut [f32]| {
            turn(x, &cos[row * half..][..half], &back[row * half..][..half], out);
        };
        for g in 0..group {
            for from in (0..length).step_by(BLOCK) {
                let to = (from + BLOCK).min(length);
                let size = (to - from) * to;
                let (weights, d_weights) = (&mut weights[..size], &mut d_weights[..size]);
                parts.weights(g, from, to, &mut scores[..size], weights);
                let column = (head * group + g) * d;
                let dy = View::new(&dy[(first + from) * dy_width + column..], to - from, d, dy_width);
                matmul(d_weights, to, dy, parts.values(to).transposed(), false);
                matmul(&mut dv, d, View::new(weights, to - from, to, to).transposed(), dy, true);
                Level::best().run(SoftmaxBackward { weights, d: d_weights, to });
                let d_scores = View::new(d_weights, to - from, to, to);
                matmul(&mut dq[from * d..], d, d_scores, parts.keys(to), false);
                matmul(&mut dk, d, d_scores.transposed(), parts.queries(g, from, to), true);
            }
            dq.iter_mut().for_each(|dq| *dq *= shape.scale());
            for (row, dq) in dq.chunks_exact(d).enumerate() {
                turn_back(row, dq, place(row, head * group + g));
            }
        }
        for row in 0..length {
            turn_back(row, &dk[row * d..][..d], place(row, n_heads + head));
            place(row, n_heads + n_kv_heads + head).copy_from_slice(&dv[row * d..][..d]);
        }
    });
}

/// d = weights * (d - sum(weights * d)), by rows of `to`.
struct SoftmaxBackward<'a> {
    weights: &'a [f32],
    d: &'a mut [f32],
    to: usize,
}

impl Kernel for SoftmaxBackward<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        for (weights, d) in self.weights.chunks_exact(self.to).zip(self.d.chunks_exact_mut(self.to)) {
            let mean = sum(weights.len(), |i| weights[i] * d[i]);
            d.iter_mut().zip(weights).for_each(|(d, w)| *d = w * (*d - mean));
        }
    }
}
