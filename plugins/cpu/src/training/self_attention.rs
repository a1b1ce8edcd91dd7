//! Causal attention of whole sequences over themselves, and its gradient.

use super::{softmax, sum};
use crate::rope::turn;
use crate::simd::{Isa, Kernel, Level};
use crate::threads::{Shared, Threads, run};

/// Shape of [`self_attention`].
#[derive(Clone, Copy)]
pub struct Shape {
    /// Query heads, a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Heads of keys and values.
    pub n_kv_heads: usize,
    /// Elements of a head, an even number.
    pub head_dim: usize,
    /// Rows of a sequence.
    pub length: usize,
    /// Rows that a row sees, up to itself; `None`: all of them.
    pub window: Option<usize>,
}

impl Shape {
    fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Values of a row of queries, keys and values.
    fn width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Whole sequences in `qkv`.
    ///
    /// # Panics
    /// If the numbers do not fit together, or with `qkv` and the angles' cosines and sines.
    fn sequences(&self, qkv: &[f32], cos: &[f32], sin: &[f32]) -> usize {
        let Self { n_heads, n_kv_heads, head_dim: d, length, window } = *self;
        assert!(window != Some(0), "a window of no rows");
        assert!(n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads over {n_kv_heads}");
        assert!(n_heads > 0 && d > 0 && d.is_multiple_of(2), "{n_heads} heads of {d} elements");
        let row = n_kv_heads
            .checked_mul(2)
            .and_then(|kv| kv.checked_add(n_heads))
            .and_then(|all| all.checked_mul(d));
        let sequence = row.and_then(|row| row.checked_mul(length)).filter(|&values| values > 0);
        let whole = sequence.filter(|&values| qkv.len().is_multiple_of(values));
        let whole = whole.unwrap_or_else(|| panic!("{} values are no sequences of {length} rows", qkv.len()));
        // Fewer than the values of a row, which can be addressed.
        let angles = length * (d / 2);
        assert!(cos.len() >= angles && sin.len() >= angles, "cosines and sines of {length} rows");
        qkv.len() / whole
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
        let Shape { n_heads, n_kv_heads, head_dim: d, length, .. } = shape;
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
        Level::best().run(CausalSoftmax { scores, from, to, window: self.shape.window, out });
    }
}

struct CausalSoftmax<'a> {
    scores: &'a [f32],
    from: usize,
    to: usize,
    window: Option<usize>,
    out: &'a mut [f32],
}

impl Kernel for CausalSoftmax<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let rows = self.scores.chunks_exact(self.to).zip(self.out.chunks_exact_mut(self.to));
        for ((scores, out), row) in rows.zip(self.from..self.to) {
            let first = self.window.map_or(0, |window| (row + 1).saturating_sub(window));
            out[..first].fill(0.0);
            softmax(isa, &scores[first..=row], &mut out[first..=row], 1.0);
            out[row + 1..].fill(0.0);
        }
    }
}

/// Causal attention of sequences over themselves, with rotary position embedding: row m of a
/// sequence is at position m and sees the rows up to itself (of those, the last ones that its window has room for). Scores are scaled by 1 / sqrt(d).
///
/// # Panics
/// If the slices' lengths do not fit.
pub fn self_attention(
    qkv: &[f32],
    cos: &[f32],
    sin: &[f32],
    shape: Shape,
    out: &mut [f32],
    threads: &dyn Threads,
) {
    let Shape { n_heads, n_kv_heads, head_dim: d, length, .. } = shape;
    let sequences = shape.sequences(qkv, cos, sin);
    let (width, out_width, group) = (shape.width(), n_heads * d, shape.group());
    assert!(out.len() == sequences * length * out_width, "{sequences} sequences of {length}");
    let out = Shared::new(out);
    run(threads, true, sequences * n_kv_heads, &|task| {
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
pub fn self_attention_backward(
    qkv: &[f32],
    cos: &[f32],
    sin: &[f32],
    dy: &[f32],
    shape: Shape,
    out: &mut [f32],
    threads: &dyn Threads,
) {
    let Shape { n_heads, n_kv_heads, head_dim: d, length, .. } = shape;
    let sequences = shape.sequences(qkv, cos, sin);
    let (width, dy_width, group, half) = (shape.width(), n_heads * d, shape.group(), d / 2);
    assert!(out.len() == qkv.len() && dy.len() == sequences * length * dy_width, "{sequences} of {length}");
    // Turning by the opposite angle is the gradient of turning.
    let back: Vec<f32> = sin.iter().map(|s| -s).collect();
    let out = Shared::new(out);
    run(threads, true, sequences * n_kv_heads, &|task| {
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
