//! The Walsh-Hadamard transform, by which some models rotate the inputs of their matrices (QuIP#, arXiv 2402.04396;
//! QuaRot, arXiv 2404.00456): outliers are spread before activations are quantised.
//!
//! H is Sylvester's matrix of `block` rows, `H[i][j] = (-1)^popcount(i & j) / sqrt(block)`, and H * H = 1. A run of values is
//! transformed in log2(block) stages of sums and differences, of neighbours at the distance 1, 2, 4 ..., and multiplied by
//! the f32 next to 1 / sqrt(block). So every CPU gets the same bits.

use crate::simd::{Isa, Kernel, Level};
use crate::threads::{Shared, Threads, run};

/// Rows are shared out to threads from this many values on.
const PARALLEL_FROM: usize = 1 << 15;

/// Replaces each row x by H(s * x), or by s * H(x) where `inverse` is set, with a transform of each run of `block` values.
///
/// # Arguments
/// * `x`: rows of K values
/// * `signs`: K signs s, -1 or 1
/// * `block`: a power of two that divides K
///
/// # Panics
/// If the rows are not whole, or `block` is no such number.
pub fn transform_rows(x: &mut [f32], signs: &[f32], block: usize, inverse: bool, threads: &dyn Threads) {
    let k = signs.len();
    assert!(block.is_power_of_two() && k > 0 && k.is_multiple_of(block), "runs of {block} in rows of {k}");
    assert!(x.len().is_multiple_of(k), "{} values are no rows of {k}", x.len());
    let (rows, parallel) = (x.len() / k, x.len() >= PARALLEL_FROM);
    let x = Shared::new(x);
    run(threads, parallel, rows, &|row| {
        // SAFETY: each row is one task's.
        let x = unsafe { x.part(row * k, k) };
        Level::best().run(Transform { x, signs, block, inverse });
    });
}

struct Transform<'a> {
    x: &'a mut [f32],
    signs: &'a [f32],
    block: usize,
    inverse: bool,
}

impl Kernel for Transform<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { x, signs, block, inverse } = self;
        let factor = 1.0 / (block as f32).sqrt();
        for (run, signs) in x.chunks_exact_mut(block).zip(signs.chunks_exact(block)) {
            if !inverse {
                run.iter_mut().zip(signs).for_each(|(x, s)| *x *= s);
            }
            let mut distance = 1;
            while distance < block {
                for pair in run.chunks_exact_mut(2 * distance) {
                    let (a, b) = pair.split_at_mut(distance);
                    for (a, b) in a.iter_mut().zip(b) {
                        (*a, *b) = (*a + *b, *a - *b);
                    }
                }
                distance *= 2;
            }
            run.iter_mut().for_each(|x| *x *= factor);
            if inverse {
                run.iter_mut().zip(signs).for_each(|(x, s)| *x *= s);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::tests::Scoped;

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect()
    }

    #[test]
    fn it_is_the_matrix_and_its_own_inverse() {
        for (rows, k, block) in [(1, 1, 1), (3, 8, 8), (2, 96, 32), (5, 1024, 256), (9, 4096, 1024)] {
            let (x, signs) = (values(rows * k), values(k).iter().map(|v| v.signum()).collect::<Vec<_>>());
            let mut y = x.clone();
            transform_rows(&mut y, &signs, block, false, &Scoped(1));
            let mut again = x.clone();
            transform_rows(&mut again, &signs, block, false, &Scoped(3));
            assert!(y == again, "threads change nothing");
            for (i, y) in y.iter().enumerate() {
                let (row, column) = (i / k * k, i % k);
                let (from, index) = (column / block * block, column % block);
                let sum: f64 = (0..block)
                    .map(|j| {
                        let sign = if (index & j).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                        sign * f64::from(signs[from + j]) * f64::from(x[row + from + j])
                    })
                    .sum();
                assert!((f64::from(*y) - sum / (block as f64).sqrt()).abs() < 1e-4, "{k} {block} {i}");
            }
            transform_rows(&mut y, &signs, block, true, &Scoped(2));
            assert!(y.iter().zip(&x).all(|(y, x)| (y - x).abs() < 1e-5));
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let signs: Vec<f32> = values(512).iter().map(|v| v.signum()).collect();
        let of = |level: Level, inverse: bool| {
            let mut x = values(512);
            level.run(Transform { x: &mut x, signs: &signs, block: 128, inverse });
            x.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        for inverse in [false, true] {
            let first = of(Level::best(), inverse);
            assert!(Level::available().all(|level| of(level, inverse) == first));
        }
    }
}
