//! Gradients of RMSNorm.

use super::{ROWS, by_parts, sum};
use crate::simd::{Isa, Kernel, Level};
use crate::threads::{Shared, Threads, run};

/// The gradient of y = x / sqrt(mean(x^2) + eps) * weight for x, by rows of K: with r = 1 / sqrt(mean(x^2) +
/// eps) and g = dy * weight, dx = r * (g - x * r^2 * mean(g * x)).
///
/// # Panics
/// If the slices' lengths do not fit.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    dy: &[f32],
    eps: f32,
    dx: &mut [f32],
    threads: &dyn Threads,
) {
    let k = weight.len();
    assert!(x.len() == dy.len() && x.len() == dx.len() && x.len().is_multiple_of(k), "rows of {k}");
    by_parts(dx, k, threads, &|first, dx| {
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

#[inline(always)]
fn inverse_root(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

/// The gradient of the same for the weight `[K]`: the sum over the rows of dy * x * r.
///
/// # Panics
/// If the slices' lengths do not fit.
pub fn rms_norm_backward_weight(x: &[f32], dy: &[f32], eps: f32, dw: &mut [f32], threads: &dyn Threads) {
    let k = dw.len();
    assert!(x.len() == dy.len() && x.len().is_multiple_of(k), "rows of {k}");
    let parts = (x.len() / k).div_ceil(ROWS);
    let mut partial = vec![0f32; parts * k];
    let shared = Shared::new(&mut partial);
    run(threads, parts > 1, parts, &|task| {
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
