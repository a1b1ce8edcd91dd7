//! Rotary position embedding.

use crate::threads::rows_fit;

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
pub fn rope(
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
    let half = head_dim / 2;
    let width = n_heads.checked_mul(head_dim).expect("a row that a machine can address");
    assert!(head_dim.is_multiple_of(2), "pairs of elements in a head of {head_dim}");
    assert!(rows_fit(x.len(), rows, width, x_stride), "{rows} rows of {width} in {}", x.len());
    assert!(rows_fit(out.len(), rows, width, out_stride), "{rows} rows of {width} in {}", out.len());
    let turns = rows.checked_mul(half).is_some_and(|turns| turns <= cos.len().min(sin.len()));
    assert!(turns, "cosines and sines of {rows} rows");
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
pub(crate) fn turn(x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let half = x.len() / 2;
    let ((x1, x2), (y1, y2)) = (x.split_at(half), out.split_at_mut(half));
    let (x1, x2, y1, y2) = (&x1[..half], &x2[..half], &mut y1[..half], &mut y2[..half]);
    let (cos, sin) = (&cos[..half], &sin[..half]);
    for j in 0..half {
        y1[j] = x1[j] * cos[j] - x2[j] * sin[j];
        y2[j] = x2[j] * cos[j] + x1[j] * sin[j];
    }
}

#[cfg(test)]
mod tests {
    use super::rope;
    use crate::simd::tests::Rng;

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
}
