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

/// GELU gating (arXiv 1606.08415, gated as in arXiv 2002.05202): out = (g * phi(g)) * u.
///
/// phi is the normal distribution's: (1 + erf(g / sqrt 2)) / 2. Below 0 it is e * p(t), above 1 - e * p(t), with
/// e = exp(-g^2 / 2) by `simd::exp`, t = 1 / (1 + 0.26 |g|) and p a polynomial; |g| counts as 13 at most. It is within 2e-7 of
/// the exact value, and within 1e-6 of its size for g > -5.
///
/// # Arguments
/// * `gate_up`: rows of F gates g, then F values u
/// * `out`: rows of F
///
/// # Panics
/// If `gate_up` is not twice as long as `out`, or that is no whole number of rows.
pub fn gelu_mul(gate_up: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads) {
    gated(Level::best(), gate_up, f, out, threads, Gelu);
}

/// GELU gating in the approximation with tanh (arXiv 1606.08415): out = (g * (1 + tanh(v)) / 2) * u, with
/// v = sqrt(2 / pi) * (g + 0.044715 g^3).
///
/// (1 + tanh(v)) / 2 is computed as sigmoid(2 v), with the sigmoid of [`silu_mul`]; in v, |g| counts as 10 at most.
///
/// # Arguments
/// * `gate_up`: rows of F gates g, then F values u
/// * `out`: rows of F
///
/// # Panics
/// If `gate_up` is not twice as long as `out`, or that is no whole number of rows.
pub fn gelu_tanh_mul(gate_up: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads) {
    gated(Level::best(), gate_up, f, out, threads, GeluTanh);
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

/// g * phi(g), with phi the normal distribution's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gelu;

impl Gate for Gelu {
    #[inline(always)]
    fn value_and_slope<I: Isa>(self, isa: I, g: f32) -> (f32, f32) {
        /// Of t^9 to t: p(t) / phi(-g) * exp(-g^2 / 2) is within 2.2e-8 of 1 for 0 <= g <= 13.5, by least squares that
        /// were weighted until the largest errors were equal.
        const P: [f32; 9] = [
            0.030_785_12,
            -0.154_196_89,
            0.254_333_8,
            -0.154_225,
            0.163_233_48,
            0.050_041_3,
            0.103_286_9,
            0.102_98,
            0.103_761_27,
        ];
        /// 1 / sqrt(2 pi)
        const DENSITY: f32 = 0.398_942_3;
        // Beyond, the exponential is not 0 yet, and the square no infinity. (A NaN stays one.)
        let x = g.clamp(-13.0, 13.0);
        let e = exp(isa, -0.5 * (x * x));
        let t = 1.0 / isa.fma1(0.26, x.abs(), 1.0);
        let mut p = P[0];
        for coefficient in &P[1..] {
            p = isa.fma1(p, t, *coefficient);
        }
        let below = e * (p * t);
        let phi = if x < 0.0 { below } else { 1.0 - below };
        (g * phi, isa.fma1(x * DENSITY, e, phi))
    }
}

/// g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))) / 2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GeluTanh;

impl Gate for GeluTanh {
    #[inline(always)]
    fn value_and_slope<I: Isa>(self, isa: I, g: f32) -> (f32, f32) {
        /// 2 sqrt(2 / pi)
        const TWICE: f32 = 1.595_769;
        const CUBIC: f32 = 0.044_715;
        // Beyond, the sigmoid is 0 or 1. (A NaN stays one.)
        let x = g.clamp(-10.0, 10.0);
        let square = x * x;
        let sigmoid = sigmoid(isa, TWICE * x * isa.fma1(CUBIC, square, 1.0));
        let inner = TWICE * isa.fma1(3.0 * CUBIC, square, 1.0);
        (g * sigmoid, isa.fma1(x * sigmoid * (1.0 - sigmoid), inner, sigmoid))
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
    use crate::simd::Portable;
    use crate::simd::tests::{Rng, bits};
    use crate::threads::tests::Scoped;

    /// Close to double precision, and the same bits on every instruction set and number of threads.
    fn check(
        pools: &[Scoped],
        gate_up: &[f32],
        rows: usize,
        f: usize,
        gate: impl Gate,
        (exact, relative, of_input): (&dyn Fn(f64) -> f64, f64, f64),
    ) {
        let at = |i: usize| (gate_up[i / f * 2 * f + i % f], gate_up[i / f * 2 * f + f + i % f]);
        let mut want = vec![0.0; rows * f];
        gated(Level::best(), gate_up, f, &mut want, &pools[0], gate);
        for (i, got) in want.iter().enumerate() {
            let (g, u) = at(i);
            let input = (f64::from(g) * f64::from(u)).abs();
            let exact = exact(f64::from(g)) * f64::from(u);
            let allowed = relative * exact.abs() + of_input * input + 2e-34;
            assert!((f64::from(*got) - exact).abs() <= allowed, "{g} {u}: {got} {exact}");
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
            let sigmoid = |g: f64| 1.0 / (1.0 + (-g).exp());
            check(&pools, &gate_up, rows, f, Relu2, (&|g: f64| g.max(0.0).powi(2), 6e-7, 0.0));
            check(&pools, &gate_up, rows, f, Silu, (&|g: f64| g * sigmoid(g), 6e-7, 0.0));
            check(&pools, &gate_up, rows, f, Sigmoid, (&sigmoid, 6e-7, 0.0));
            // Where they are tiny, the exponents' rounding shows.
            check(&pools, &gate_up, rows, f, Gelu, (&|g: f64| g * phi(g), 1e-6, 1e-11));
            let tanh = |g: f64| (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3));
            let gelu_tanh = |g: f64| g * 0.5 * (1.0 + tanh(g).tanh());
            check(&pools, &gate_up, rows, f, GeluTanh, (&gelu_tanh, 1.5e-6, 1e-9));
        }
        let mut out = [0.0; 2];
        relu2_mul(&[-3.0, 3.0, 5.0, 5.0], 2, &mut out, &pools[0]);
        assert_eq!(out, [0.0, 45.0]);
        silu_mul(&[-200.0, 200.0, 5.0, 5.0], 2, &mut out, &pools[0]);
        assert_eq!(out, [0.0, 1000.0]);
        sigmoid_mul(&[-200.0, 200.0, 5.0, 5.0], 2, &mut out, &pools[0]);
        assert_eq!(out, [0.0, 5.0]);
        for gelu in [gelu_mul, gelu_tanh_mul] {
            gelu(&[0.0, 200.0, 5.0, 5.0], 2, &mut out, &pools[0]);
            assert_eq!(out, [0.0, 1000.0]);
            gelu(&[-1e30, 1e30, 1.0, 1.0], 2, &mut out, &pools[0]);
            assert!(out[0].abs() < 1.0 && out[1] == 1e30, "{out:?}");
            gelu(&[f32::NAN, f32::NAN, 1.0, 0.0], 2, &mut out, &pools[0]);
            assert!(out.iter().all(|v| v.is_nan()), "{out:?}");
        }
    }

    /// The normal distribution: the integral of its density from 0, by Simpson's rule; far below, its continued fraction.
    fn phi(x: f64) -> f64 {
        let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        if x > 4.0 {
            return 1.0 - phi(-x);
        }
        if x < -4.0 {
            let fraction = (1..60).rev().fold(-x, |rest, k| -x + f64::from(k) / rest);
            return density(x) / fraction;
        }
        let (n, h) = (2000, x / 2000.0);
        let inner: f64 = (1..n).map(|i| density(f64::from(i) * h) * if i % 2 == 0 { 2.0 } else { 4.0 }).sum();
        0.5 + h / 3.0 * (density(0.0) + inner + density(x))
    }

    #[test]
    fn slopes_are_those_of_the_values() {
        let slope = |gate: &dyn Fn(f64) -> f64, g: f64| (gate(g + 1e-4) - gate(g - 1e-4)) / 2e-4;
        let tanh = |g: f64| (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3));
        for i in -120..=120 {
            let g = i as f32 / 8.0;
            let at = f64::from(g);
            let (_, gelu) = Gelu.value_and_slope(Portable, g);
            assert!((f64::from(gelu) - slope(&|g| g * phi(g), at)).abs() < 1e-6, "{g}: {gelu}");
            let (_, gelu) = GeluTanh.value_and_slope(Portable, g);
            let exact = slope(&|g| g * 0.5 * (1.0 + tanh(g).tanh()), at);
            assert!((f64::from(gelu) - exact).abs() < 4e-6, "{g}: {gelu} {exact}");
        }
    }
}
