//! Rotary embedding and gated activations. (RMSNorm lives in `bitnet_burn_cpu`, beside the quantiser that it
//! is fused with.)

use bitnet_burn_manager::pool::Pool;

use super::simd::{Isa, Kernel, Level, exp};
use super::{Shared, rows_fit, run};

/// Elements from which on the work is shared out.
const PARALLEL_FROM: usize = 1 << 16;
/// Elements in one task.
const TASK: usize = 1 << 14;

/// Turns each head of each row: with x1, x2 its halves, out = (x1 * cos - x2 * sin, x2 * cos + x1 * sin).
///
/// Products and sums are rounded separately, as Hugging Face's `x * cos + rotate_half(x) * sin` does.
///
/// # Arguments
/// * `x`: rows of n_heads * head_dim values, `x_stride` elements apart
/// * `cos`, `sin`: rows of head_dim / 2 values, of each row's position
/// * `out`: rows of n_heads * head_dim values, `out_stride` elements apart
///
/// # Panics
/// If head_dim is odd or a slice is too short.
#[allow(clippy::too_many_arguments)]
pub(crate) fn rope(
    x: &[f32],
    x_stride: usize,
    rows: usize,
    n_heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    out: &mut [f32],
    out_stride: usize,
) {
    let (width, half) = (n_heads * head_dim, head_dim / 2);
    assert!(head_dim.is_multiple_of(2), "pairs of elements in a head of {head_dim}");
    assert!(rows_fit(x.len(), rows, width, x_stride), "{rows} rows of {width} in {}", x.len());
    assert!(rows_fit(out.len(), rows, width, out_stride), "{rows} rows of {width} in {}", out.len());
    assert!(cos.len() >= rows * half && sin.len() >= rows * half, "cosines and sines of {rows} rows");
    if half == 0 {
        return;
    }
    for row in 0..rows {
        let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
        let heads = x[row * x_stride..][..width].chunks_exact(head_dim);
        for (x, out) in heads.zip(out[row * out_stride..][..width].chunks_exact_mut(head_dim)) {
            turn(x, cos, sin, out);
        }
    }
}

/// One head of [`rope`].
#[inline(always)]
pub(super) fn turn(x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let half = x.len() / 2;
    let ((x1, x2), (y1, y2)) = (x.split_at(half), out.split_at_mut(half));
    let (x1, x2, y1, y2) = (&x1[..half], &x2[..half], &mut y1[..half], &mut y2[..half]);
    let (cos, sin) = (&cos[..half], &sin[..half]);
    for j in 0..half {
        y1[j] = x1[j] * cos[j] - x2[j] * sin[j];
        y2[j] = x2[j] * cos[j] + x1[j] * sin[j];
    }
}

/// Squared ReLU gating (arXiv 2109.08668, gated): out = (relu(g) * relu(g)) * u. A NaN stays one.
///
/// # Arguments
/// * `gate_up`: rows of F gates g, then F values u
/// * `out`: rows of F
///
/// # Panics
/// If `gate_up` is not twice as long as `out`, or that is no whole number of rows.
pub(crate) fn relu2_mul(gate_up: &[f32], f: usize, out: &mut [f32], pool: &Pool) {
    gated(Level::best(), gate_up, f, out, pool, Relu2);
}

/// SiLU gating (arXiv 2002.05202): out = (g * sigmoid(g)) * u.
///
/// sigmoid(g) is 1 / (1 + e) for g >= 0 and e / (1 + e) below, with e = exp(-|g|) by [`super::simd::exp`]; so
/// it is zero below -87.
///
/// # Arguments
/// * `gate_up`: rows of F gates g, then F values u
/// * `out`: rows of F
///
/// # Panics
/// If `gate_up` is not twice as long as `out`, or that is no whole number of rows.
pub(crate) fn silu_mul(gate_up: &[f32], f: usize, out: &mut [f32], pool: &Pool) {
    gated(Level::best(), gate_up, f, out, pool, Silu);
}

/// The non-linearity of a gated feed-forward network.
pub(super) trait Gate: Copy + Sync {
    /// Its value and its derivative at g.
    fn value_and_slope<I: Isa>(self, isa: I, g: f32) -> (f32, f32);
}

/// relu(g)^2.
#[derive(Clone, Copy, Debug)]
pub(super) struct Relu2;

impl Gate for Relu2 {
    #[inline(always)]
    fn value_and_slope<I: Isa>(self, _: I, g: f32) -> (f32, f32) {
        let g = if g < 0.0 { 0.0 } else { g };
        (g * g, 2.0 * g)
    }
}

/// g * sigmoid(g).
#[derive(Clone, Copy, Debug)]
pub(super) struct Silu;

impl Gate for Silu {
    #[inline(always)]
    fn value_and_slope<I: Isa>(self, isa: I, g: f32) -> (f32, f32) {
        let e = exp(isa, -g.abs());
        let sigmoid = (if g < 0.0 { e } else { 1.0 }) / (1.0 + e);
        (g * sigmoid, sigmoid * (1.0 + g * (1.0 - sigmoid)))
    }
}

fn gated(level: Level, gate_up: &[f32], f: usize, out: &mut [f32], pool: &Pool, gate: impl Gate) {
    assert!(gate_up.len() == 2 * out.len(), "{} gates and values for {}", gate_up.len(), out.len());
    if out.is_empty() {
        return;
    }
    assert!(f > 0 && out.len().is_multiple_of(f), "{} results are no rows of {f}", out.len());
    by_rows(out, f, pool, &|row, out| {
        let (g, u) = gate_up[2 * row * f..][..2 * out.len()].split_at(f);
        level.run(Gated { g, u, out, gate });
    });
}

/// Calls `f(row, its values)` for each row of `out`, in parallel where there are many.
fn by_rows(out: &mut [f32], width: usize, pool: &Pool, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let rows = out.len() / width;
    let at_once = (TASK / width).max(1);
    let parallel = out.len() >= PARALLEL_FROM;
    let out = Shared::new(out);
    run(pool, parallel, rows.div_ceil(at_once), &|task| {
        for row in task * at_once..((task + 1) * at_once).min(rows) {
            // SAFETY: each row belongs to one task, which holds one at a time.
            f(row, unsafe { out.part(row * width, width) });
        }
    });
}

struct Gated<'a, G> {
    g: &'a [f32],
    u: &'a [f32],
    out: &'a mut [f32],
    gate: G,
}

impl<G: Gate> Kernel for Gated<'_, G> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (out, (&g, &u)) in self.out.iter_mut().zip(self.g.iter().zip(self.u)) {
            *out = self.gate.value_and_slope(isa, g).0 * u;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::tests::{Rng, bits};
    use super::*;

    #[test]
    fn rope_turns_pairs() {
        let mut rng = Rng(1);
        let (rows, heads, head_dim, first) = (5, 3, 20, 37);
        let angles: Vec<f64> = (first..first + rows)
            .flat_map(|p| {
                (0..head_dim / 2).map(move |j| p as f64 * 500_000f64.powf(-2.0 * j as f64 / head_dim as f64))
            })
            .collect();
        let cos: Vec<f32> = angles.iter().map(|a| a.cos() as f32).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin() as f32).collect();
        let (x_stride, out_stride) = (heads * head_dim + 4, heads * head_dim + 1);
        let x = rng.f32s(rows * x_stride);
        let mut out = vec![7.0; rows * out_stride];
        rope(&x, x_stride, rows, heads, head_dim, &cos, &sin, &mut out, out_stride);
        for row in 0..rows {
            for head in 0..heads {
                for j in 0..head_dim / 2 {
                    let at = |base: usize, half: usize| base + head * head_dim + half * head_dim / 2 + j;
                    let (x1, x2) = (x[at(row * x_stride, 0)], x[at(row * x_stride, 1)]);
                    let (y1, y2) = (out[at(row * out_stride, 0)], out[at(row * out_stride, 1)]);
                    let angle = angles[row * head_dim / 2 + j];
                    let (x1, x2) = (f64::from(x1), f64::from(x2));
                    assert!((f64::from(y1) - (x1 * angle.cos() - x2 * angle.sin())).abs() < 3e-7);
                    assert!((f64::from(y2) - (x2 * angle.cos() + x1 * angle.sin())).abs() < 3e-7);
                }
            }
            assert_eq!(out[row * out_stride + heads * head_dim], 7.0);
        }
    }

    /// Close to double precision, and the same bits on every instruction set and number of threads.
    fn check(
        pools: &[Pool],
        gate_up: &[f32],
        rows: usize,
        f: usize,
        gate: impl Gate,
        exact: &dyn Fn(f64) -> f64,
    ) {
        let at = |i: usize| (gate_up[i / f * 2 * f + i % f], gate_up[i / f * 2 * f + f + i % f]);
        let mut want = vec![0.0; rows * f];
        gated(Level::best(), gate_up, f, &mut want, &pools[0], gate);
        for (i, got) in want.iter().enumerate() {
            let (g, u) = at(i);
            let exact = exact(f64::from(g)) * f64::from(u);
            let close = (f64::from(*got) - exact).abs() <= 6e-7 * exact.abs() + 2e-34;
            assert!(close, "{g} {u}: {got} {exact}");
        }
        for level in Level::available() {
            for pool in pools {
                let mut out = vec![0.0; rows * f];
                gated(level, gate_up, f, &mut out, pool, gate);
                assert!(bits(&out) == bits(&want), "{level:?}");
            }
        }
    }

    #[test]
    fn gates_agree_and_are_accurate() {
        let mut rng = Rng(2);
        let pools = [1, 2, 3].map(|threads| Pool::new(threads).unwrap());
        for (rows, f) in [(1, 1), (3, 37), (2, 6912), (40, 6912)] {
            let scale = [0.1, 1.0, 30.0, 100.0];
            let gate_up: Vec<f32> =
                rng.f32s(2 * rows * f).into_iter().enumerate().map(|(i, v)| v * scale[i % 4]).collect();
            check(&pools, &gate_up, rows, f, Relu2, &|g: f64| g.max(0.0).powi(2));
            check(&pools, &gate_up, rows, f, Silu, &|g: f64| g / (1.0 + (-g).exp()));
        }
        let mut out = [0.0; 2];
        relu2_mul(&[-3.0, 3.0, 5.0, 5.0], 2, &mut out, &pools[0]);
        assert_eq!(out, [0.0, 45.0]);
        silu_mul(&[-200.0, 200.0, 5.0, 5.0], 2, &mut out, &pools[0]);
        assert_eq!(out, [0.0, 1000.0]);
    }
}
