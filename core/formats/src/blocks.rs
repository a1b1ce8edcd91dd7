//! Writing ternary matrices as blocks of ternary weights with an f16 scale each: Q2_0, PQ2_0, PTQ1_0, TQ1_0, TQ2_0.
//!
//! What the blocks can't hold exactly is an error of [`write()`] with row, column and scale. [`write_nearest`] writes it
//! nevertheless, with the least squared error.

use crate::dense::facts::Ternary;
use crate::{DenseFormat, FormatError, Scales, canonical, check_canonical};
use bitnet_burn_plugin::sdk::group_length;
use half::f16;
use rayon::prelude::*;

/// The blocks of canonical rows [n, k] with their scales: byte for byte what llama.cpp makes of the same values in floats.
/// A block without weights has the scale 0, as it writes it.
///
/// ```
/// use bitnet_burn_formats::{DenseFormat, Scales, blocks, canonical};
///
/// let mut row = vec![0; canonical::row_bytes(128)];
/// canonical::pack_row(&[1; 128], &mut row);
/// let scales = Scales::from_rows(&[0.5, 0.25], 1, 128, 64)?;
/// let data = blocks::write(DenseFormat::Q2_0, &row, 1, 128, &scales)?;
/// let mut values = [0.0; 128];
/// DenseFormat::Q2_0.decode_row(&data, &mut values)?;
/// assert_eq!((values[63], values[64]), (0.5, 0.25));
/// # Ok::<(), bitnet_burn_formats::FormatError>(())
/// ```
///
/// # Arguments
/// * `format`: one of [ternary blocks](DenseFormat::is_ternary)
///
/// # Errors
/// [`FormatError::NoTernaryBlocks`]; [`Empty`](FormatError::Empty), [`TooLarge`](FormatError::TooLarge),
/// [`Length`](FormatError::Length) and [`InvalidCode`](FormatError::InvalidCode) of the rows;
/// [`NotAMultiple`](FormatError::NotAMultiple) (K by the format's block). Of non-zero weights: their scale is
/// [none](FormatError::BadScale), is [no f16](FormatError::ScaleNotF16), or is
/// [not that of their block](FormatError::SmallerGroups).
///
/// # Panics
/// If the scales are those of a matrix with fewer rows or columns.
pub fn write(
    format: DenseFormat,
    codes: &[u8],
    n: usize,
    k: usize,
    scales: &Scales,
) -> Result<Vec<u8>, FormatError> {
    let group = group_length(k, scales.group());
    write_rows(format, codes, n, k, group, |row, group| scales.get(row, group, k))
}

/// [`write()`] with one scale for all weights.
pub(crate) fn write_one_scale(
    format: DenseFormat,
    codes: &[u8],
    n: usize,
    k: usize,
    scale: f32,
) -> Result<Vec<u8>, FormatError> {
    write_rows(format, codes, n, k, k, |_, _| scale)
}

/// The blocks that come nearest to [n, k] values, in the sense of least squares. Values that the format holds are written
/// exactly.
///
/// # Arguments
/// * `format`: one of [ternary blocks](DenseFormat::is_ternary)
/// * `values`: writes the values of a row
///
/// # Errors
/// [`FormatError::NoTernaryBlocks`], [`NotAMultiple`](FormatError::NotAMultiple), [`TooLarge`](FormatError::TooLarge);
/// [`NotFinite`](FormatError::NotFinite), [`ScaleOverflow`](FormatError::ScaleOverflow), and those of `values`.
pub fn write_nearest(
    format: DenseFormat,
    n: usize,
    k: usize,
    values: impl Fn(usize, &mut [f32]) -> Result<(), FormatError> + Sync,
) -> Result<Vec<u8>, FormatError> {
    let (ternary, row_bytes, mut data) = blocks_of(format, n, k)?;
    let rows = data.par_chunks_exact_mut(row_bytes.max(1)).enumerate();
    rows.try_for_each_init(
        || vec![0f32; k],
        |x, (row, out)| {
            let written = values(row, x).and_then(|()| (ternary.write_nearest)(x, out));
            written.map_err(|error| error.in_row(row))
        },
    )?;
    Ok(data)
}

/// How the format is written, the bytes of a row, and room for the matrix.
fn blocks_of(
    format: DenseFormat,
    n: usize,
    k: usize,
) -> Result<(&'static Ternary, usize, Vec<u8>), FormatError> {
    let name = format.name();
    let ternary = format.facts().ternary.as_ref().ok_or(FormatError::NoTernaryBlocks { format: name })?;
    let row_bytes = format.checked_row_bytes(k)?;
    let size = n.checked_mul(row_bytes).ok_or(FormatError::TooLarge { format: name, n, k })?;
    Ok((ternary, row_bytes, vec![0; size]))
}

fn write_rows(
    format: DenseFormat,
    codes: &[u8],
    n: usize,
    k: usize,
    group: usize,
    scale: impl Fn(usize, usize) -> f32 + Sync,
) -> Result<Vec<u8>, FormatError> {
    check_canonical(codes, n, k)?;
    let (ternary, row_bytes, mut data) = blocks_of(format, n, k)?;
    let (name, block) = (format.name(), format.block_len());
    let rows = codes.par_chunks_exact(canonical::row_bytes(k)).zip(data.par_chunks_exact_mut(row_bytes));
    rows.enumerate().try_for_each_init(
        || (vec![0i8; k], vec![f16::ZERO; k / block]),
        |(weights, scales), (row, (codes, out))| {
            canonical::unpack_row(codes, weights);
            for (index, (weights, d)) in weights.chunks(block).zip(&mut *scales).enumerate() {
                // As llama.cpp writes a block without weights.
                *d = f16::ZERO;
                let (start, end) = (index * block, (index + 1) * block);
                let (mut column, mut first) = (start, None);
                while column < end {
                    let next = end.min((column / group + 1) * group);
                    let zeros = weights[column - start..next - start].iter().all(|&w| w == 0);
                    let scale = scale(row, column / group);
                    match first {
                        _ if zeros => {}
                        None => (*d, first) = (exact(name, row, column, scale)?, Some(scale)),
                        Some(first) if first == scale => {}
                        Some(first) => {
                            let format = name;
                            return Err(FormatError::SmallerGroups {
                                format,
                                block,
                                row,
                                column,
                                scale,
                                first,
                            });
                        }
                    }
                    column = next;
                }
            }
            (ternary.write)(weights, scales, out);
            Ok(())
        },
    )?;
    Ok(data)
}

/// The scale of non-zero weights as the f16 that it is.
fn exact(format: &'static str, row: usize, column: usize, scale: f32) -> Result<f16, FormatError> {
    if !scale.is_finite() || scale == 0.0 {
        return Err(FormatError::BadScale { format, row, column, scale });
    }
    let half = f16::from_f32(scale);
    let nearest = half.to_f32();
    if nearest == scale {
        Ok(half)
    } else {
        Err(FormatError::ScaleNotF16 { format, row, column, scale, nearest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;
    use crate::ternary::scaled_from_dense;
    use crate::testing::{canonical_rows, f16_scale, floats, matrix};
    use proptest::prelude::*;

    fn formats() -> impl Iterator<Item = DenseFormat> {
        DenseFormat::ALL.into_iter().filter(|format| format.is_ternary())
    }

    fn decoded(format: DenseFormat, data: &[u8], k: usize) -> Vec<f32> {
        let rows = data.chunks(format.row_bytes(k).unwrap());
        let decode = |row| {
            let mut values = vec![0.0; k];
            format.decode_row(row, &mut values).unwrap();
            values
        };
        rows.flat_map(decode).collect()
    }

    #[test]
    fn gguf_py_goldens() {
        let values = floats(include_bytes!("../testdata/dense/ternary.input.f32.bin"));
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let (codes, scales) = scaled_from_dense(DenseFormat::F32, &data, 3, 512).unwrap();
        for (format, golden) in [
            (DenseFormat::TQ1_0, &include_bytes!("../testdata/dense/ternary.tq1_0.bin")[..]),
            (DenseFormat::TQ2_0, include_bytes!("../testdata/dense/ternary.tq2_0.bin")),
        ] {
            assert_eq!(write(format, &codes, 3, 512, &scales).unwrap(), golden, "{}", format.name());
        }
    }

    #[test]
    fn what_blocks_cannot_hold_is_named() {
        let (n, k) = (3, 512);
        let mut weights = vec![1; n * k];
        let mut scales: Vec<f32> = (0..n * k / 64).map(|i| (1 + i / 4) as f32).collect();
        let write = |format, weights: &[i8], scales: &[f32]| {
            let scales = Scales::from_rows(scales, n, k, 64).unwrap();
            super::write(format, &canonical_rows(weights, k), n, k, &scales)
        };
        assert!(formats().all(|format| write(format, &weights, &scales).is_ok()));
        // Row 1, from column 320.
        scales[8 + 5] = 0.1;
        let nearest = f16::from_f32(0.1).to_f32();
        let not_f16 = |format| FormatError::ScaleNotF16 { format, row: 1, column: 320, scale: 0.1, nearest };
        assert_eq!(write(DenseFormat::Q2_0, &weights, &scales), Err(not_f16("Q2_0")));
        let smaller = |format, block| {
            let (row, column, scale, first) = (1, 320, 0.1, 4.0);
            FormatError::SmallerGroups { format, block, row, column, scale, first }
        };
        for format in [DenseFormat::PQ2_0, DenseFormat::PTQ1_0] {
            assert_eq!(write(format, &weights, &scales), Err(smaller(format.name(), 128)));
        }
        for format in [DenseFormat::TQ1_0, DenseFormat::TQ2_0] {
            assert_eq!(write(format, &weights, &scales), Err(smaller(format.name(), 256)));
        }
        for bad in [0.0, 1e6, 1e-9] {
            scales[8 + 5] = bad;
            let error = write(DenseFormat::Q2_0, &weights, &scales).unwrap_err();
            match error {
                FormatError::BadScale { row: 1, column: 320, .. } => assert_eq!(bad, 0.0),
                FormatError::ScaleNotF16 { row: 1, column: 320, nearest, .. } => {
                    assert!([0.0, f32::INFINITY].contains(&nearest));
                }
                other => panic!("{other}"),
            }
        }
        // Of weights that are zero, the scale does not count.
        weights[k + 320..k + 384].fill(0);
        assert!(formats().all(|format| write(format, &weights, &scales).is_ok()));

        let codes = canonical_rows(&[1; 64], 64);
        let one = Scales::from_rows(&[1.0], 1, 64, 0).unwrap();
        let error = |format| super::write(format, &codes, 1, 64, &one).unwrap_err();
        assert!(matches!(error(DenseFormat::PQ2_0), FormatError::NotAMultiple { value: 64, of: 128, .. }));
        assert_eq!(error(DenseFormat::Q8_0), FormatError::NoTernaryBlocks { format: "Q8_0" });
        let nothing = |_: usize, _: &mut [f32]| Ok(());
        assert!(write_nearest(DenseFormat::F16, 1, 64, nothing).is_err());
        assert!(write_nearest(DenseFormat::Q2_0, 1, 65, nothing).is_err());
        assert!(write_nearest(DenseFormat::Q2_0, usize::MAX, 64, nothing).is_err());
        let large = |_: usize, x: &mut [f32]| {
            x.fill(1e6);
            Ok(())
        };
        let overflow = write_nearest(DenseFormat::Q2_0, 1, 64, large);
        assert!(matches!(overflow, Err(FormatError::ScaleOverflow { .. })), "{overflow:?}");
        let nan = |_: usize, x: &mut [f32]| {
            x[7] = f32::NAN;
            Ok(())
        };
        let nan = write_nearest(DenseFormat::Q2_0, 2, 64, nan);
        assert!(matches!(nan, Err(FormatError::NotFinite { column: 7, .. })), "{nan:?}");
    }

    #[test]
    fn scales_that_f16_cannot_hold_become_the_nearest() {
        for (scale, expected) in [(0.1, f16::from_f32(0.1).to_f32()), (1e-9, 0.0)] {
            let fill = |_: usize, x: &mut [f32]| {
                x.fill(scale);
                Ok(())
            };
            let data = write_nearest(DenseFormat::TQ2_0, 2, 256, fill).unwrap();
            assert_eq!(decoded(DenseFormat::TQ2_0, &data, 256), [expected; 512]);
        }
    }

    /// No scale and no choice of weights is better than the one that is found.
    #[test]
    fn the_nearest_blocks_have_the_least_squared_error() {
        let mut random = SplitMix64::new(7);
        for round in 0..40 {
            let x: Vec<f32> = (0..64)
                .map(|i| match round % 3 {
                    0 => random.normal(),
                    1 => random.normal().powi(3),
                    // Two groups.
                    _ => [1.0, 0.0, -1.0][random.below(3) as usize] * if i < 32 { 1.0 } else { 0.37 },
                })
                .collect();
            let row = |_: usize, out: &mut [f32]| {
                out.copy_from_slice(&x);
                Ok(())
            };
            let data = write_nearest(DenseFormat::Q2_0, 1, 64, row).unwrap();
            let error =
                |values: &[f32]| -> f64 { x.iter().zip(values).map(|(a, b)| f64::from(a - b).powi(2)).sum() };
            let found = error(&decoded(DenseFormat::Q2_0, &data, 64));
            for step in 1..4000 {
                let d = step as f32 * 1e-3;
                let values = x.iter().map(|v| if v.abs() > d / 2.0 { v.signum() * d } else { 0.0 });
                let tried = error(&values.collect::<Vec<_>>());
                assert!(found <= tried * (1.0 + 1e-6) + 1e-5, "{found} with the scale {d}: {tried}");
            }
        }
    }

    proptest! {
        #[test]
        fn every_group_comes_back(
            (n, k, weights) in matrix(1, 6, 256, 768), unit in 0usize..5, halves in proptest::collection::vec(f16_scale(), 72),
        ) {
            let group = [0, 64, 128, 256, 512][unit];
            let count = if group == 0 { 1 } else { k.div_ceil(group) };
            let rows: Vec<f32> = (0..n * count).map(|i| halves[i % 72] * if i % 5 == 0 { -1.0 } else { 1.0 }).collect();
            let scales = Scales::from_rows(&rows, n, k, group).unwrap();
            let codes = canonical_rows(&weights, k);
            let value = |i: usize| f32::from(weights[i]) * scales.get(i / k, i % k / group_length(k, group), k);
            let values: Vec<f32> = (0..n * k).map(value).collect();
            for format in formats() {
                let written = write(format, &codes, n, k, &scales);
                if group != 0 && group < format.block_len() {
                    // Whether it fits is chance.
                    let Ok(data) = written else { continue };
                    prop_assert!(decoded(format, &data, k) == values);
                    continue;
                }
                let data = written.unwrap();
                prop_assert!(decoded(format, &data, k) == values, "{}", format.name());
                let row = |row: usize, x: &mut [f32]| { x.copy_from_slice(&values[row * k..][..k]); Ok(()) };
                let nearest = write_nearest(format, n, k, row).unwrap();
                prop_assert!(decoded(format, &nearest, k) == values, "{}", format.name());
                // As ggml quantises the values.
                if rows.iter().all(|&s| s > 1e-4) {
                    let mut bytes = vec![0; data.len()];
                    let row_bytes = data.len() / n;
                    for (values, row) in values.chunks(k).zip(bytes.chunks_mut(row_bytes)) {
                        format.encode_row(values, row).unwrap();
                    }
                    prop_assert_eq!(&bytes, &data, "{}", format.name());
                }
            }
        }
    }
}
