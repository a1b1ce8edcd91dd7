//! Gated DeltaNet (Yang et al., "Gated Delta Networks", arXiv 2412.06464): linear attention whose memory of a sequence has
//! one size, however long the sequence is.
//!
//! # Numerics
//! As [`simd`](crate::simd) says, with these orders. A convolution adds its taps from the oldest input to the newest, a
//! product of the memory with a key or query adds in ascending order of the key's values, all by fused multiply-adds that
//! start at +0. Decays and write strengths are computed in f64 and rounded once. A row's result does not depend on how a
//! sequence is cut into calls.

use crate::gated::{Gate, Silu};
use crate::quantise::{inverse_rms, sum_of_squares};
use crate::simd::{Isa, Kernel, Level};
use crate::threads::{Shared, Threads, run};

/// Work is shared out to threads from this many values of rows or memories on.
const PARALLEL_FROM: usize = 1 << 15;

/// Added to the sum of squares of a query or key.
const EPSILON: f32 = 1e-6;

/// The sizes of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Heads of queries and of keys.
    pub key_heads: usize,
    /// Heads of values: a multiple of `key_heads`. Each has a memory.
    pub value_heads: usize,
    /// Values of a query or key head.
    pub key_dim: usize,
    /// Values of a value head.
    pub value_dim: usize,
    /// Inputs that the convolution sees: a row's own, and those of the rows before it.
    pub taps: usize,
    /// Whether value head j reads key head j % key_heads. Otherwise it reads j / (value_heads / key_heads).
    pub tiled: bool,
}

impl Shape {
    /// Inputs of the convolution: queries, keys and values side by side.
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.values()
    }

    /// Values of all value heads.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Values of a row: the channels, the output's gates, and for each value head the logits of its decay and of its write
    /// strength.
    pub fn width(&self) -> usize {
        self.channels() + self.values() + 2 * self.value_heads
    }

    /// Values of the memories of all value heads.
    pub fn memory(&self) -> usize {
        self.value_heads * self.key_dim * self.value_dim
    }

    /// The key head that a value head reads.
    fn key_head(&self, value_head: usize) -> usize {
        match self.tiled {
            true => value_head % self.key_heads,
            false => value_head / (self.value_heads / self.key_heads),
        }
    }
}

/// What a layer has learned.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// [taps, channels], the oldest input first.
    pub convolution: &'a [f32],
    /// By value head: the rate of decay, which is not positive.
    pub decay: &'a [f32],
    /// By value head: added to the logit of the decay.
    pub time_bias: &'a [f32],
    /// The norm of a value head's output: `value_dim` of them.
    pub norm: &'a [f32],
    /// Of that norm.
    pub eps: f32,
}

/// What a layer remembers of a sequence. At its beginning all of it is zero.
#[derive(Debug)]
pub struct State<'a> {
    /// The last inputs of the convolution [taps - 1, channels], the oldest first.
    pub inputs: &'a mut [f32],
    /// [value_heads, key_dim, value_dim].
    pub memory: &'a mut [f32],
}

/// The rows of a sequence that follow those of `state`, which goes on to them.
///
/// With u = silu(convolution(rows)), q and k = the query and key heads of u divided by their lengths, q also by
/// sqrt(key_dim), and by value head: S = e^(decay * softplus(a + time_bias)) S; S = S + k (sigmoid(b) (v - Sᵀ k))ᵀ; o = Sᵀ q;
/// and the output is rms_norm(o) * silu(gate).
///
/// # Arguments
/// * `rows`: rows of [`Shape::width`] values
/// * `out`: rows of [`Shape::values`]
///
/// # Panics
/// If the sizes do not fit together.
pub fn delta_net(
    shape: Shape,
    weights: Weights<'_>,
    rows: &[f32],
    state: State<'_>,
    out: &mut [f32],
    threads: &dyn Threads,
) {
    delta_net_on(Level::best(), shape, weights, rows, state, out, threads);
}

fn delta_net_on(
    level: Level,
    shape: Shape,
    weights: Weights<'_>,
    rows: &[f32],
    state: State<'_>,
    out: &mut [f32],
    threads: &dyn Threads,
) {
    let Shape { key_heads, value_heads, key_dim, value_dim, taps, .. } = shape;
    let (channels, width, values) = (shape.channels(), shape.width(), shape.values());
    assert!(key_heads > 0 && value_heads > 0 && value_heads.is_multiple_of(key_heads), "{shape:?}");
    assert!(key_dim > 0 && value_dim > 0 && taps > 0, "{shape:?}");
    assert!(rows.len().is_multiple_of(width), "{} values are no rows of {width}", rows.len());
    let m = rows.len() / width;
    assert_eq!(out.len(), m * values, "outputs of {m} rows");
    assert_eq!(weights.convolution.len(), taps * channels, "the convolution of {shape:?}");
    assert_eq!((weights.decay.len(), weights.time_bias.len()), (value_heads, value_heads), "{shape:?}");
    assert_eq!(weights.norm.len(), value_dim, "the norm of {shape:?}");
    assert_eq!(
        (state.inputs.len(), state.memory.len()),
        ((taps - 1) * channels, shape.memory()),
        "{shape:?}"
    );

    let mut convolved = vec![0f32; m * channels];
    {
        let (inputs, convolved) = (&*state.inputs, Shared::new(&mut convolved));
        run(threads, m * channels >= PARALLEL_FROM, m, &|row| {
            // SAFETY: each row is one task's.
            let out = unsafe { convolved.part(row * channels, channels) };
            level.run(Convolve { shape, weights: weights.convolution, rows, inputs, row, out });
        });
    }
    let (memory, shared_out) = (Shared::new(state.memory), Shared::new(out));
    run(threads, m * shape.memory() >= PARALLEL_FROM, value_heads, &|head| {
        let size = key_dim * value_dim;
        // SAFETY: each head's memory is one task's.
        let memory = unsafe { memory.part(head * size, size) };
        let mut known = vec![0f32; value_dim];
        for row in 0..m {
            let (values_of, of_row) =
                (&convolved[row * channels..][..channels], &rows[row * width..][..width]);
            let logits = &of_row[channels + values..];
            // SAFETY: the part of a row that belongs to a head is one task's.
            let out = unsafe { shared_out.part(row * values + head * value_dim, value_dim) };
            let (decay, strength) =
                gates(logits[head], weights.time_bias[head], weights.decay[head], logits[value_heads + head]);
            level.run(Step {
                shape,
                head,
                values: values_of,
                decay,
                strength,
                memory,
                known: &mut known,
                out,
            });
            known.copy_from_slice(out);
            let gate = &of_row[channels + head * value_dim..][..value_dim];
            level.run(NormGate { x: &known, norm: weights.norm, eps: weights.eps, gate, out });
        }
    });
    // The inputs that the next row's convolution sees.
    let kept = (taps - 1) * channels;
    let fresh = m.min(taps - 1);
    state.inputs.copy_within(fresh * channels.., 0);
    for (i, row) in (m - fresh..m).enumerate() {
        let to = kept - (fresh - i) * channels;
        state.inputs[to..to + channels].copy_from_slice(&rows[row * width..][..channels]);
    }
}

/// e^(rate * softplus(a + bias)), and sigmoid(b).
fn gates(a: f32, bias: f32, rate: f32, b: f32) -> (f32, f32) {
    let x = f64::from(a + bias);
    let softplus = x.max(0.0) + (-x.abs()).exp().ln_1p();
    ((f64::from(rate) * softplus).exp() as f32, (1.0 / (1.0 + (-f64::from(b)).exp())) as f32)
}

/// One row's convolution, its SiLU, and the lengths of queries and keys.
struct Convolve<'a> {
    shape: Shape,
    weights: &'a [f32],
    rows: &'a [f32],
    inputs: &'a [f32],
    row: usize,
    out: &'a mut [f32],
}

impl Kernel for Convolve<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { shape, weights, rows, inputs, row, out } = self;
        let (channels, width, before) = (shape.channels(), shape.width(), shape.taps - 1);
        for (tap, weights) in weights.chunks_exact(channels).enumerate() {
            // The rows of the state, and behind them those of this call.
            let at = row + tap;
            let input = match at.checked_sub(before) {
                None => &inputs[at * channels..][..channels],
                Some(row) => &rows[row * width..][..channels],
            };
            for ((out, &x), &w) in out.iter_mut().zip(input).zip(weights) {
                *out = isa.fma1(x, w, *out);
            }
        }
        for out in out.iter_mut() {
            *out = Silu.value_and_slope(isa, *out).0;
        }
        let keys = shape.key_heads * shape.key_dim;
        let root = 1.0 / (shape.key_dim as f32).sqrt();
        for (i, head) in out[..2 * keys].chunks_exact_mut(shape.key_dim).enumerate() {
            let length = (sum_of_squares(isa, head) + EPSILON).sqrt();
            let factor = if i < shape.key_heads { root } else { 1.0 };
            head.iter_mut().for_each(|x| *x = *x / length * factor);
        }
    }
}

/// One row of one value head: the memory decays, learns the row's value for its key, and answers its query.
struct Step<'a> {
    shape: Shape,
    head: usize,
    /// The row's queries, keys and values.
    values: &'a [f32],
    decay: f32,
    strength: f32,
    memory: &'a mut [f32],
    /// `value_dim` values of scratch.
    known: &'a mut [f32],
    out: &'a mut [f32],
}

impl Kernel for Step<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { shape, head, values, decay, strength, memory, known, out } = self;
        let Shape { key_heads, key_dim, value_dim, .. } = shape;
        let (from, keys) = (shape.key_head(head) * key_dim, key_heads * key_dim);
        let q = &values[from..][..key_dim];
        let k = &values[keys + from..][..key_dim];
        let v = &values[2 * keys + head * value_dim..][..value_dim];
        known.fill(0.0);
        for (row, &k) in memory.chunks_exact_mut(value_dim).zip(k) {
            for (s, known) in row.iter_mut().zip(known.iter_mut()) {
                *s *= decay;
                *known = isa.fma1(*s, k, *known);
            }
        }
        // What the memory is to learn.
        for (known, &v) in known.iter_mut().zip(v) {
            *known = (v - *known) * strength;
        }
        out.fill(0.0);
        for (row, (&k, &q)) in memory.chunks_exact_mut(value_dim).zip(k.iter().zip(q)) {
            for (s, (&learned, out)) in row.iter_mut().zip(known.iter().zip(out.iter_mut())) {
                *s = isa.fma1(k, learned, *s);
                *out = isa.fma1(*s, q, *out);
            }
        }
    }
}

/// rms_norm(x) * silu(gate).
struct NormGate<'a> {
    x: &'a [f32],
    norm: &'a [f32],
    eps: f32,
    gate: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for NormGate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let root = inverse_rms(isa, self.x, self.eps);
        for ((out, &x), (&w, &gate)) in self.out.iter_mut().zip(self.x).zip(self.norm.iter().zip(self.gate)) {
            *out = ((x * root) * w) * Silu.value_and_slope(isa, gate).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::{Rng, bits};
    use crate::threads::tests::Scoped;

    struct Layer {
        shape: Shape,
        convolution: Vec<f32>,
        decay: Vec<f32>,
        time_bias: Vec<f32>,
        norm: Vec<f32>,
    }

    impl Layer {
        fn new(shape: Shape) -> Self {
            let mut rng = Rng(7);
            let mut numbers = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.f32()).collect() };
            Self {
                shape,
                convolution: numbers(shape.taps * shape.channels()),
                decay: numbers(shape.value_heads).iter().map(|v| -v.abs()).collect(),
                time_bias: numbers(shape.value_heads),
                norm: numbers(shape.value_dim),
            }
        }

        fn weights(&self) -> Weights<'_> {
            let Self { convolution, decay, time_bias, norm, .. } = self;
            Weights { convolution, decay, time_bias, norm, eps: 1e-6 }
        }

        /// Outputs and memory after calls of so many rows each.
        fn run(&self, level: Level, rows: &[f32], calls: &[usize], threads: usize) -> (Vec<f32>, Vec<f32>) {
            let Shape { taps, .. } = self.shape;
            let mut inputs = vec![0.0; (taps - 1) * self.shape.channels()];
            let mut memory = vec![0.0; self.shape.memory()];
            let (mut out, mut from) = (Vec::new(), 0);
            for m in calls {
                let rows = &rows[from * self.shape.width()..][..m * self.shape.width()];
                let mut part = vec![0.0; m * self.shape.values()];
                let state = State { inputs: &mut inputs, memory: &mut memory };
                delta_net_on(level, self.shape, self.weights(), rows, state, &mut part, &Scoped(threads));
                out.extend(part);
                from += m;
            }
            (out, memory)
        }

        /// The formula in double precision.
        fn exact(&self, rows: &[f32]) -> Vec<f64> {
            let Shape { key_heads, value_heads, key_dim, value_dim, taps, tiled } = self.shape;
            let (channels, width) = (self.shape.channels(), self.shape.width());
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let mut memory = vec![vec![0f64; key_dim * value_dim]; value_heads];
            let mut out = Vec::new();
            for t in 0..rows.len() / width {
                let row: Vec<f64> = rows[t * width..][..width].iter().map(|&v| f64::from(v)).collect();
                let u: Vec<f64> = (0..channels)
                    .map(|c| {
                        let tap = |j: usize| {
                            let at = (t + j).checked_sub(taps - 1)?;
                            Some(
                                f64::from(rows[at * width + c])
                                    * f64::from(self.convolution[j * channels + c]),
                            )
                        };
                        silu((0..taps).filter_map(tap).sum())
                    })
                    .collect();
                let unit = |x: &[f64]| -> Vec<f64> {
                    let length = (x.iter().map(|v| v * v).sum::<f64>() + 1e-6).sqrt();
                    x.iter().map(|v| v / length).collect()
                };
                for h in 0..value_heads {
                    let key = if tiled { h % key_heads } else { h / (value_heads / key_heads) };
                    let q = unit(&u[key * key_dim..][..key_dim]);
                    let k = unit(&u[(key_heads + key) * key_dim..][..key_dim]);
                    let v = &u[2 * key_heads * key_dim + h * value_dim..][..value_dim];
                    let logits = &row[channels + value_heads * value_dim..];
                    let x = logits[h] + f64::from(self.time_bias[h]);
                    let decay = (f64::from(self.decay[h]) * (1.0 + x.exp()).ln()).exp();
                    let strength = 1.0 / (1.0 + (-logits[value_heads + h]).exp());
                    let s = &mut memory[h];
                    s.iter_mut().for_each(|s| *s *= decay);
                    let mut o = vec![0.0; value_dim];
                    for (c, o) in o.iter_mut().enumerate() {
                        let known: f64 = (0..key_dim).map(|i| s[i * value_dim + c] * k[i]).sum();
                        for i in 0..key_dim {
                            s[i * value_dim + c] += k[i] * strength * (v[c] - known);
                            *o += s[i * value_dim + c] * q[i] / (key_dim as f64).sqrt();
                        }
                    }
                    let root = (o.iter().map(|v| v * v).sum::<f64>() / value_dim as f64 + 1e-6).sqrt();
                    for (c, o) in o.iter().enumerate() {
                        let gate = row[channels + h * value_dim + c];
                        out.push(o / root * f64::from(self.norm[c]) * silu(gate));
                    }
                }
            }
            out
        }
    }

    fn shapes() -> [Shape; 4] {
        let shape = |[key_heads, value_heads, key_dim, value_dim, taps]: [usize; 5], tiled| Shape {
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            taps,
            tiled,
        };
        [
            shape([1, 1, 1, 1, 1], false),
            shape([2, 4, 64, 64, 4], false),
            shape([2, 6, 16, 24, 3], true),
            shape([3, 3, 20, 7, 2], false),
        ]
    }

    #[test]
    fn it_is_the_formula() {
        for shape in shapes() {
            let layer = Layer::new(shape);
            let mut rng = Rng(3);
            let rows: Vec<f32> = (0..9 * shape.width()).map(|_| rng.f32() * 2.0).collect();
            let (out, _) = layer.run(Level::best(), &rows, &[9], 1);
            for (i, (got, want)) in out.iter().zip(layer.exact(&rows)).enumerate() {
                assert!(
                    (f64::from(*got) - want).abs() < 2e-5 * (1.0 + want.abs()),
                    "{shape:?} {i}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn calls_threads_and_instruction_sets_change_no_bit() {
        for shape in shapes() {
            let layer = Layer::new(shape);
            let mut rng = Rng(5);
            let rows: Vec<f32> = (0..11 * shape.width()).map(|_| rng.f32() * 2.0).collect();
            let (out, memory) = layer.run(Level::best(), &rows, &[11], 1);
            for level in Level::available() {
                for (calls, threads) in
                    [(&[11][..], 3), (&[1; 11], 1), (&[5, 1, 1, 4], 2), (&[0, 2, 9], 1), (&[10, 1], 2)]
                {
                    let (again, memory_again) = layer.run(level, &rows, calls, threads);
                    assert!(bits(&again) == bits(&out), "{shape:?} {level:?} {calls:?}");
                    assert!(bits(&memory_again) == bits(&memory), "{shape:?} {level:?} {calls:?}");
                }
            }
        }
    }

    #[test]
    fn gates_do_not_overflow() {
        assert_eq!(gates(1e30, 1e30, -1.0, 1e30), (0.0, 1.0));
        assert_eq!(gates(-1e30, -1e30, -1.0, -1e30), (1.0, 0.0));
        assert_eq!(gates(0.0, 0.0, 0.0, 0.0), (1.0, 0.5));
    }
}
