//! A whole matrix times rows of quantised activations, shared out to threads.

use bitnet_burn_formats::dense_tiles::{TILE_ROWS, TiledFormat};

use super::{Level, Row, sums_of_parts};
use crate::threads::{Shared, Threads, rows_fit, run};

/// Bytes of weights in one task.
const TASK_BYTES: usize = 1 << 18;

/// Rows of activations whose results of a tile are kept until they are written.
const ROWS_AT_ONCE: usize = 16;

/// Quantised activations: rows of K values that [`quantise_rows`](crate::quantise::quantise_rows) made, so that none
/// is -128.
#[derive(Clone, Copy, Debug)]
pub struct Activations<'a> {
    /// Values a row.
    pub k: usize,
    /// The rows, `stride` values apart.
    pub q: &'a [i8],
    /// Values from row to row.
    pub stride: usize,
    /// absmax / 127 of each row; their number is the number of rows, M.
    pub scale: &'a [f32],
}

/// y[m, n] = sum over k of x[m, k] * w[n, k], for quantised activations x.
///
/// # Arguments
/// * `tiles`: the tiles of n rows of k weights, [`tiled_bytes`](bitnet_burn_formats::dense_tiles::tiled_bytes)
/// * `x`: M rows of K activations
/// * `y`: M rows of N results, `y_stride` elements apart; what lies between them is left alone
///
/// # Panics
/// If a slice does not have the length that the shape asks for, or the format has no rows of K weights.
pub fn linear(
    format: TiledFormat,
    tiles: &[u8],
    n: usize,
    x: Activations<'_>,
    y: &mut [f32],
    y_stride: usize,
    threads: &dyn Threads,
) {
    linear_at(Level::best(), format, tiles, n, x, y, y_stride, threads);
}

/// [`linear`] with a given instruction set.
#[allow(clippy::too_many_arguments, reason = "the shape of the problem: three matrices")]
fn linear_at(
    level: Level,
    format: TiledFormat,
    tiles: &[u8],
    n: usize,
    x: Activations<'_>,
    y: &mut [f32],
    y_stride: usize,
    threads: &dyn Threads,
) {
    let (m, k) = (x.scale.len(), x.k);
    let tile_bytes = format.tile_bytes(k).expect("a whole number of blocks in a row");
    assert_eq!(Some(tiles.len()), tile_bytes.checked_mul(n.div_ceil(TILE_ROWS)), "bytes of weights");
    assert!(rows_fit(x.q.len(), m, k, x.stride), "{m} rows of {k} activations in {}", x.q.len());
    assert!(rows_fit(y.len(), m, n, y_stride), "{m} rows of {n} results in {}", y.len());
    if m == 0 || n == 0 || k == 0 {
        (0..m).for_each(|m| y[m * y_stride..][..n].fill(0.0));
        return;
    }
    let mut sums = Vec::new();
    let q = |m: usize| &x.q[m * x.stride..][..k];
    (0..m).for_each(|m| sums_of_parts(format, q(m), &mut sums));
    let parts = sums.len() / m;
    let rows: Vec<Row<'_>> =
        (0..m).map(|m| Row { q: q(m), sums: &sums[m * parts..][..parts], scale: x.scale[m] }).collect();

    let in_task = (TASK_BYTES / tile_bytes).clamp(1, 256);
    let y = Shared::new(y);
    let parallel = n.saturating_mul(k).saturating_mul(m) >= 1 << 18;
    run(threads, parallel, n.div_ceil(TILE_ROWS).div_ceil(in_task), &|task| {
        let mut results = [[0.0; TILE_ROWS]; ROWS_AT_ONCE];
        let first = task * in_task;
        for (tile, bytes) in tiles[first * tile_bytes..].chunks_exact(tile_bytes).take(in_task).enumerate() {
            let at = (first + tile) * TILE_ROWS;
            let count = TILE_ROWS.min(n - at);
            for (part, rows) in rows.chunks(ROWS_AT_ONCE).enumerate() {
                level.products(format, bytes, rows, &mut results[..rows.len()]);
                for (i, results) in results[..rows.len()].iter().enumerate() {
                    let m = part * ROWS_AT_ONCE + i;
                    // SAFETY: the task of this tile is the only one that writes its columns, one part at a
                    // time.
                    let y = unsafe { y.part(m * y_stride + at, count) };
                    y.copy_from_slice(&results[..count]);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use bitnet_burn_formats::dense::{q4_0_codes, q6_k_codes};
    use bitnet_burn_formats::dense_tiles;
    use half::f16;

    use super::*;
    use crate::simd::tests::Rng;
    use crate::threads::tests::Scoped;

    /// Quantised rows that own their memory, a few values apart.
    struct Quantised {
        k: usize,
        q: Vec<i8>,
        stride: usize,
        scale: Vec<f32>,
    }

    impl Quantised {
        fn m(&self) -> usize {
            self.scale.len()
        }

        fn row(&self, m: usize) -> &[i8] {
            &self.q[m * self.stride..][..self.k]
        }

        fn view(&self) -> Activations<'_> {
            Activations { k: self.k, q: &self.q, stride: self.stride, scale: &self.scale }
        }
    }

    /// Where a block has its scale.
    fn d_at(format: TiledFormat) -> usize {
        if format == TiledFormat::Q6_K { 208 } else { 0 }
    }

    /// Arbitrary bytes with a finite d; now and then a block of all ones or all zeros, which have the
    /// extreme codes.
    fn blocks(rng: &mut Rng, format: TiledFormat, n: usize, k: usize) -> Vec<u8> {
        let mut w = rng.bytes(n * format.rows().row_bytes(k).unwrap());
        let d = d_at(format);
        for block in w.chunks_exact_mut(format.rows().block_bytes()) {
            match rng.next() % 8 {
                0 => block.fill(0xff),
                1 => block.fill(0x80),
                2 => block.fill(0x7f),
                3 => block.fill(0),
                _ => {}
            }
            let half = if rng.next().is_multiple_of(4) {
                rng.next() as u16
            } else {
                0x2c00 | rng.next() as u16 & 0x83ff
            };
            block[d..d + 2].copy_from_slice(&half.to_le_bytes());
            if block[d + 1] & 0x7c == 0x7c {
                block[d + 1] &= 0x83;
            }
        }
        w
    }

    /// Quantised rows: of floats, of the extremes alone, of alternating extremes, of zeros.
    fn activations(rng: &mut Rng, m: usize, k: usize) -> Quantised {
        let rows: Vec<f32> = (0..m)
            .flat_map(|m| match (m + 1) % 5 {
                0 => vec![0.0; k],
                1 | 4 => rng.f32s(k),
                2 => vec![if rng.next().is_multiple_of(2) { 3.0 } else { -3.0 }; k],
                _ => (0..k).map(|i| if i % 2 == 0 { 1e-3 } else { -1e-3 }).collect(),
            })
            .collect();
        quantised(&rows, k)
    }

    fn quantised(rows: &[f32], k: usize) -> Quantised {
        let (m, stride) = (rows.len() / k, k.next_multiple_of(64));
        let mut x = Quantised { k, q: vec![0; m * stride], stride, scale: vec![0.0; m] };
        crate::quantise::quantise_rows(rows, k, &mut x.q, stride, &mut x.scale, &mut vec![0; m]);
        x
    }

    /// Weights of a block as integers, with the sub-blocks' scales, and d.
    fn integers(format: TiledFormat, block: &[u8]) -> (Vec<i32>, f32) {
        let d = d_at(format);
        let d = f16::from_le_bytes([block[d], block[d + 1]]).to_f32();
        let w = match format {
            TiledFormat::Q8_0 => block[2..].iter().map(|&q| i32::from(q as i8)).collect(),
            TiledFormat::Q4_0 => {
                q4_0_codes(block.try_into().unwrap()).iter().map(|&q| i32::from(q) - 8).collect()
            }
            _ => {
                let codes = q6_k_codes(block.try_into().unwrap());
                let scale = |i: usize| i32::from(block[192 + i / 16] as i8);
                codes.iter().enumerate().map(|(i, &q)| (i32::from(q) - 32) * scale(i)).collect()
            }
        };
        (w, d)
    }

    /// The numerics of this module, written down once more.
    fn specification(format: TiledFormat, w: &[u8], n: usize, x: &Quantised) -> Vec<f32> {
        let bytes = format.rows().row_bytes(x.k).unwrap();
        let mut y = Vec::new();
        for m in 0..x.m() {
            let q = x.row(m);
            for n in 0..n {
                let mut acc = 0f32;
                let blocks = w[n * bytes..(n + 1) * bytes].chunks_exact(format.rows().block_bytes());
                for (block, q) in blocks.zip(q.chunks_exact(format.block_len())) {
                    let (w, d) = integers(format, block);
                    let sum: i64 = w.iter().zip(q).map(|(&w, &q)| i64::from(w) * i64::from(q)).sum();
                    acc += i32::try_from(sum).unwrap() as f32 * d;
                }
                y.push(acc * x.scale[m]);
            }
        }
        y
    }

    fn tiles(format: TiledFormat, w: &[u8], (n, k): (usize, usize)) -> Vec<u8> {
        let rows = format.rows();
        let mut tiles = vec![0; dense_tiles::tiled_bytes(rows, n, k).unwrap()];
        dense_tiles::tile((rows, w), (n, k), (rows, &mut tiles)).unwrap();
        tiles
    }

    fn every_level(format: TiledFormat, w: &[u8], n: usize, x: &Quantised, pools: &[Scoped]) {
        let want = specification(format, w, n, x);
        let tiles = tiles(format, w, (n, x.k));
        let stride = n + 3;
        for level in Level::available() {
            for pool in pools {
                let mut y = vec![7.0; x.m() * stride];
                linear_at(level, format, &tiles, n, x.view(), &mut y, stride, pool);
                for (m, y) in y.chunks(stride).enumerate() {
                    let same = |(y, want): (&f32, &f32)| {
                        y.to_bits() == want.to_bits() || y.is_nan() && want.is_nan()
                    };
                    let want = &want[m * n..(m + 1) * n];
                    assert!(
                        y.iter().zip(want).all(same),
                        "{} {level:?}: row {m} of {}x{n}x{}, {} threads\n{y:?}\n{want:?}",
                        format.rows().name(),
                        x.m(),
                        x.k,
                        pool.threads()
                    );
                    assert_eq!(y[n..], [7.0; 3]);
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_and_thread_count_computes_the_specification() {
        let mut rng = Rng(31);
        let pools = [1, 2, 3].map(Scoped);
        for format in TiledFormat::ALL {
            let ks: &[usize] = match format.block_len() {
                32 => &[32, 64, 96, 128, 160, 224, 320, 2560],
                _ => &[256, 512, 768, 2560],
            };
            for &k in ks {
                let shapes = [(1, 1), (3, 1), (16, 2), (17, 3), (31, 4), (33, 5), (48, 9), (50, 1), (18, 35)];
                for (n, m) in shapes {
                    let w = blocks(&mut rng, format, n, k);
                    every_level(format, &w, n, &activations(&mut rng, m, k), &pools);
                }
            }
        }
    }

    #[test]
    fn the_shapes_of_models() {
        let mut rng = Rng(32);
        let pools = [Scoped(2)];
        for format in TiledFormat::ALL {
            for (n, k, m) in [(301, 2560, 1), (161, 6912, 1), (35, 6912, 3)] {
                let w = blocks(&mut rng, format, n, k);
                every_level(format, &w, n, &activations(&mut rng, m, k), &pools);
            }
        }
    }

    #[test]
    fn the_largest_sums_are_exact() {
        let pool = [Scoped(1)];
        let k = 512;
        for format in TiledFormat::ALL {
            for fill in [0u8, 0x80, 0x7f, 0xff, 0x81, 0x88, 0xf0, 0x0f] {
                for scale in [0x80, 0x7f] {
                    let n = 3;
                    let mut w = vec![fill; n * format.rows().row_bytes(k).unwrap()];
                    for block in w.chunks_exact_mut(format.rows().block_bytes()) {
                        if format == TiledFormat::Q6_K {
                            block[192..208].fill(scale);
                        }
                        block[d_at(format)..d_at(format) + 2].copy_from_slice(&f16::MAX.to_le_bytes());
                    }
                    let rows = [vec![5.0; k], vec![-5.0; k]].concat();
                    every_level(format, &w, n, &quantised(&rows, k), &pool);
                }
            }
        }
    }

    #[test]
    fn rows_that_are_not_finite_are_nan() {
        let mut rng = Rng(33);
        let (n, k) = (20, 256);
        let mut rows = rng.f32s(3 * k);
        rows[k + 7] = f32::INFINITY;
        let x = quantised(&rows, k);
        for format in TiledFormat::ALL {
            let w = blocks(&mut rng, format, n, k);
            let mut y = vec![0.0; 3 * n];
            linear(format, &tiles(format, &w, (n, k)), n, x.view(), &mut y, n, &Scoped(1));
            assert!(y[n..2 * n].iter().all(|y| y.is_nan()));
            assert!(y[..n].iter().chain(&y[2 * n..]).all(|y| y.is_finite()));
        }
    }

    #[test]
    fn several_tasks_agree_with_one() {
        let mut rng = Rng(34);
        let pools = [1, 2, 3].map(Scoped);
        for format in TiledFormat::ALL {
            let k = 1024;
            let n = 3 * TASK_BYTES / format.rows().row_bytes(k).unwrap() + 5;
            let w = blocks(&mut rng, format, n, k);
            every_level(format, &w, n, &activations(&mut rng, 1, k), &pools);
        }
    }

    #[test]
    fn close_to_double_precision() {
        let mut rng = Rng(35);
        let (n, k) = (64, 2560);
        let rows = rng.f32s(k);
        let x = quantised(&rows, k);
        for format in TiledFormat::ALL {
            let bytes = format.rows().row_bytes(k).unwrap();
            let mut w = vec![0; n * bytes];
            for row in w.chunks_exact_mut(bytes) {
                format.rows().encode_row(&rng.f32s(k), row).unwrap();
            }
            let mut y = vec![0.0; n];
            linear(format, &tiles(format, &w, (n, k)), n, x.view(), &mut y, n, &Scoped(1));
            let mut row = vec![0.0; k];
            for (y, w) in y.iter().zip(w.chunks_exact(bytes)) {
                format.rows().decode_row(w, &mut row).unwrap();
                let step = f64::from(x.scale[0]);
                let of_codes = || row.iter().zip(x.row(0)).map(|(&w, &q)| f64::from(w) * f64::from(q) * step);
                let size = of_codes().map(f64::abs).sum::<f64>();
                // Against the quantised activations, only f32's rounding: three times a block of at most 80.
                let want = of_codes().sum::<f64>();
                assert!((f64::from(*y) - want).abs() <= 1e-5 * size, "{}: {y} {want}", format.rows().name());
                // Against the activations, at most half a step of each.
                let want = row.iter().zip(&rows).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>();
                let half_steps = row.iter().map(|&w| f64::from(w.abs()) * step / 2.0).sum::<f64>();
                let error = (f64::from(*y) - want).abs();
                assert!(error <= half_steps + 1e-5 * size, "{}: {y} {want}", format.rows().name());
            }
        }
    }
}
