//! Gradients of gated activations.

use super::by_parts;
use crate::gated::{Gate, Gelu, GeluTanh, Relu2, Sigmoid, Silu};
use crate::simd::{Isa, Kernel, Level};
use crate::threads::Threads;

/// The gradient of relu(gate)^2 * up: rows [gate, up] and dy to rows [d gate, d up].
///
/// # Panics
/// If the slices' lengths do not fit, or `dy` is no whole number of rows of `f`.
pub fn relu2_mul_backward(gate_up: &[f32], dy: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads) {
    gated_backward(gate_up, dy, f, out, threads, Relu2);
}

/// The gradient of silu(gate) * up.
///
/// # Panics
/// As [`relu2_mul_backward`].
pub fn silu_mul_backward(gate_up: &[f32], dy: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads) {
    gated_backward(gate_up, dy, f, out, threads, Silu);
}

/// The gradient of sigmoid(gate) * up.
///
/// # Panics
/// As [`relu2_mul_backward`].
pub fn sigmoid_mul_backward(gate_up: &[f32], dy: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads) {
    gated_backward(gate_up, dy, f, out, threads, Sigmoid);
}

/// The gradient of gelu(gate) * up.
///
/// # Panics
/// As [`relu2_mul_backward`].
pub fn gelu_mul_backward(gate_up: &[f32], dy: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads) {
    gated_backward(gate_up, dy, f, out, threads, Gelu);
}

/// The gradient of gelu(gate) * up, in the approximation with tanh.
///
/// # Panics
/// As [`relu2_mul_backward`].
pub fn gelu_tanh_mul_backward(gate_up: &[f32], dy: &[f32], f: usize, out: &mut [f32], threads: &dyn Threads) {
    gated_backward(gate_up, dy, f, out, threads, GeluTanh);
}

fn gated_backward(
    gate_up: &[f32],
    dy: &[f32],
    f: usize,
    out: &mut [f32],
    threads: &dyn Threads,
    gate: impl Gate,
) {
    assert!(gate_up.len() == out.len() && gate_up.len() == 2 * dy.len(), "gates and values for {}", dy.len());
    if dy.is_empty() {
        return;
    }
    assert!(f > 0 && dy.len().is_multiple_of(f), "{} gradients are no rows of {f}", dy.len());
    by_parts(out, 2 * f, threads, &|first, out| {
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
