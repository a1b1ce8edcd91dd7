//! The gated activations of feed-forward networks.

use crate::simd::{Isa, Kernel, Level, exp};
use crate::threads::{Shared, Threads, run};

/// Elements from which on the work is shared out.
const PARALLEL_FROM: usize = 1 << 16;

/// Elements in one task.
const TASK: usize = 1 << 14;

/// Squared ReLU gating (arXiv 2109.08668, gated): out = (relu(g) * relu(g)) * u. A NaN stays one.
///
/// # Arguments
/// * `gate_up`: rows of F gates g, then F values u
/// * `out`: rows of F
///
/// # Panics
/// If `gate_up` is not twice as long as `out`, or that is no whole number of rows.
pub fn relu2_mul(gate_up: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads) {
    gated(Level::best(), gate_up, f, out, threads, Relu2);
}

/// SiLU gating (arXiv 2002.05202): out = (g * sigmoid(g)) * u.
///
/// sigmoid(g) is 1 / (1 + e) for g >= 0 and e / (1 + e) below, with e = exp(-|g|) by `simd::exp`; so
/// it is zero below -87.
///
/// # Arguments
/// * `gate_up`: rows of F gates g, then F values u
/// * `out`: rows of F
///
/// # Panics
/// If `gate_up` is not twice as long as `out`, or that is no whole number of rows.
pub fn silu_mul(gate_up: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads) {
    gated(Level::best(), gate_up, f, out, threads, Silu);
}

/// Sigmoid gating (the gated linear unit, arXiv 1612.08083): out = sigmoid(g) * u, with the sigmoid of [`silu_mul`].
///
/// # Arguments
/// * `gate_up`: rows of F gates g, then F values u
/// * `out`: rows of F
///
/// # Panics
/// If `gate_up` is not twice as long as `out`, or that is no whole number of rows.
pub fn sigmoid_mul(gate_up: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads) {
    gated(Level::best(), gate_up, f, out, threads, Sigmoid);
}

/// The non-linearity of a gated feed-forward network.
pub(crate) trait Gate: Copy + Sync {
    /// Its value and its derivative at g.
    fn value_and_slope<I: Isa>(self, isa: I, g: f32) -> (f32, f32);
}

/// relu(g)^2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Relu2;

impl Gate for Relu2 {
    #[inline(always)]
    fn value_and_slope<I: Isa>(self, _: I, g: f32) -> (f32, f32) {
        let g = if g < 0.0 { 0.0 } else { g };
        (g * g, 2.0 * g)
    }
}

/// g * sigmoid(g).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Silu;

impl Gate for Silu {
    #[inline(always)]
    fn value_and_slope<I: Isa>(self, isa: I, g: f32) -> (f32, f32) {
        let sigmoid = sigmoid(isa, g);
        (g * sigmoid, sigmoid * (1.0 + g * (1.0 - sigmoid)))
    }
}

/// sigmoid(g).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sigmoid;

impl Gate for Sigmoid {
    #[inline(always)]
    fn value_and_slope<I: Isa>(self, isa: I, g: f32) -> (f32, f32) {
        let sigmoid = sigmoid(isa, g);
        (sigmoid, sigmoid * (1.0 - sigmoid))
    }
}

#[inline(always)]
fn sigmoid<I: Isa>(isa: I, g: f32) -> f32 {
    let e = exp(isa, -g.abs());
    (if g < 0.0 { e } else { 1.0 }) / (1.0 + e)
}

fn gated(level: Level, gate_up: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads, gate: impl Gate) {
    assert!(gate_up.len() == 2 * out.len(), "{} gates and values for {}", gate_up.len(), out.len());
    if out.is_empty() {
        return;
    }
    assert!(f > 0 && out.len().is_multiple_of(f), "{} results are no rows of {f}", out.len());
    by_rows(out, f, threads, &|row, out| {
        let (g, u) = gate_up[2 * row * f..][..2 * out.len()].split_at(f);
        level.run(Gated { g, u, out, gate });
    });
}

/// Calls `f(row, its values)` for each row of `out`, in parallel where there are many.
fn by_rows(out: &mut [f32], width: usize, threads: &dyn Threads, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let rows = out.len() / width;
    let at_once = (TASK / width).max(1);
    let parallel = out.len() >= PARALLEL_FROM;
    let out = Shared::new(out);
    run(threads, parallel, rows.div_ceil(at_once), &|task| {
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
    use super::*;
    use crate::simd::tests::{Rng, bits};
    use crate::threads::tests::Scoped;

    /// Close to double precision, and the same bits on every instruction set and number of threads.
    fn check(
        pools: &[Scoped],
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
        let pools = [1, 2, 3].map(Scoped);
        for (rows, f) in [(1, 1), (3, 37), (2, 6912), (40, 6912)] {
            let scale = [0.1, 1.0, 30.0, 100.0];
            let gate_up: Vec<f32> =
                rng.f32s(2 * rows * f).into_iter().enumerate().map(|(i, v)| v * scale[i % 4]).collect();
            check(&pools, &gate_up, rows, f, Relu2, &|g: f64| g.max(0.0).powi(2));
            check(&pools, &gate_up, rows, f, Silu, &|g: f64| g / (1.0 + (-g).exp()));
            check(&pools, &gate_up, rows, f, Sigmoid, &|g: f64| 1.0 / (1.0 + (-g).exp()));
        }
        let mut out = [0.0; 2];
        relu2_mul(&[-3.0, 3.0, 5.0, 5.0], 2, &mut out, &pools[0]);
        assert_eq!(out, [0.0, 45.0]);
        silu_mul(&[-200.0, 200.0, 5.0, 5.0], 2, &mut out, &pools[0]);
        assert_eq!(out, [0.0, 1000.0]);
        sigmoid_mul(&[-200.0, 200.0, 5.0, 5.0], 2, &mut out, &pools[0]);
        assert_eq!(out, [0.0, 5.0]);
    }
}
