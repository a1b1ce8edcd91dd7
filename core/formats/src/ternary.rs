//! Ternary weights that a file stores in a dense format.
//!
//! Converters that know nothing of ternary weights write a BitNet projection as F32, F16 or BF16
//! with the values {-s, 0, s}, and requantise it to Q8_0 or Q4_0. Such a tensor is read exactly or
//! refused. It must not go through absmean again: mean|W| of a tensor of which a third is zero is
//! about 0.67 s, so the scale would be a third off.
//!
//! # Q4_0
//!
//! `quantize_row_q4_0_ref` takes d = max / -8, where max is the first value of the largest magnitude
//! with its sign, and q = min(15, trunc(x / d + 8.5)). In a ternary tensor max is the first non-zero
//! value of the block, +s or -s, so x/d is one of three numbers:
//!
//! | x | x/d | q | decoded by ggml, d * (q - 8) |
//! | --- | --- | --- | --- |
//! | max | -8 | trunc(0.5) = 0 | -8 d = max |
//! | 0 | 0 | trunc(8.5) = 8 | 0 |
//! | -max | 8 | trunc(16.5) = 16, clipped to 15 | 7 d = -7/8 max |
//!
//! The code for +8 does not exist, so ggml's own decoding makes one sign of each block an eighth too
//! small. But the signs are all there: q = 8 is zero, and otherwise the weight has the sign of
//! d * (q - 8), with s = 8 |d| (a multiplication by a power of two, so exact). d is an f16, so s is
//! what the converter had, rounded to f16. Any other code shows that the tensor was not ternary.

use super::dense::{Q4_0_BYTES, QK, q4_0_codes};
use super::{
    DenseFormat, FormatError, Scales, SharedScale, canonical, canonical_bytes, check_length, check_values,
    f16_at, tq1_0, tq2_0,
};
use rayon::prelude::*;

/// Canonical rows and the scale s of [n, k] values, all of which are -s, 0 or s.
///
/// s is the magnitude of the first non-zero value; a tensor of zeros has the scale 0.
///
/// ```
/// use bitnet_burn_formats::{canonical::Row, ternary};
///
/// let (rows, scale) = ternary::exact_from_f32_rows(&[0.5, 0.0, -0.5], 1, 3)?;
/// assert_eq!(scale, 0.5);
/// assert_eq!([0, 1, 2].map(|k| Row(&rows).weight(k)), [1, 0, -1]);
/// # Ok::<(), bitnet_burn_formats::FormatError>(())
/// ```
///
/// # Errors
/// [`FormatError::Empty`], [`TooLarge`](FormatError::TooLarge), [`Length`](FormatError::Length);
/// [`NotTernary`](FormatError::NotTernary) with row, column and value of the first offender, or
/// [`NotFinite`](FormatError::NotFinite) where the first non-zero value is a NaN or infinite.
pub fn exact_from_f32_rows(values: &[f32], n: usize, k: usize) -> Result<(Vec<u8>, f32), FormatError> {
    let size = check_values("F32", n, k, values.len())?;
    let mut reader = Reader::new(size, k);
    for row in values.chunks_exact(k) {
        reader.row(row)?;
    }
    Ok(reader.finish())
}

/// Groups of weights that [`scaled_from_dense`] looks for, after whole rows.
pub const GROUPS: [usize; 4] = [256, 128, 64, 32];

/// Canonical rows and the scales of an [n, k] tensor of any dense format, in each of whose groups all values are -s, 0 or
/// s, with a scale s of their own.
///
/// The groups are the largest with which that holds: whole rows, or one of [`GROUPS`]. A group of zeros has the scale 0.
/// The last group of a row may be shorter. The scales are f16 where each of them is one.
///
/// ```
/// use bitnet_burn_formats::{DenseFormat, canonical::Row, ternary};
///
/// let values = [0.5, 0.0, -0.5, 0.25, 0.25, 0.0];
/// let data: Vec<u8> = values.iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
/// let (rows, scales) = ternary::scaled_from_dense(DenseFormat::F32, &data, 2, 3)?;
/// assert_eq!((scales.group(), scales.get(0, 0, 3), scales.get(1, 0, 3)), (0, 0.5, 0.25));
/// assert_eq!([0, 1, 2].map(|k| Row(&rows).weight(k)), [1, 0, -1]);
/// # Ok::<(), bitnet_burn_formats::FormatError>(())
/// ```
///
/// # Errors
/// [`FormatError::Empty`], [`TooLarge`](FormatError::TooLarge),
/// [`NotAMultiple`](FormatError::NotAMultiple) (K by the format's block), [`Length`](FormatError::Length);
/// [`NotTernary`](FormatError::NotTernary) with row, column and value of an offender and the scale of its group of 32
/// (or of its block, in a format of ternary blocks), and [`NotFinite`](FormatError::NotFinite) where a scale is a NaN or
/// infinite.
pub fn scaled_from_dense(
    format: DenseFormat,
    data: &[u8],
    n: usize,
    k: usize,
) -> Result<(Vec<u8>, Scales), FormatError> {
    let (size, row_bytes) = check_dense(format, data, n, k)?;
    let unit = if format.is_ternary() { format.block_len() } else { GROUPS[GROUPS.len() - 1] };
    let units = k.div_ceil(unit);
    let (mut rows, mut scales) = (vec![0; size], vec![0f32; n * units]); // no more than there are values
    let parts = data
        .par_chunks_exact(row_bytes)
        .zip(rows.par_chunks_exact_mut(canonical::row_bytes(k)))
        .zip(scales.par_chunks_exact_mut(units))
        .enumerate();
    parts.try_for_each_init(
        || (vec![0i8; k], vec![0f32; k]),
        |(weights, values), (row, ((data, out), scales))| {
            match &format.facts().ternary {
                Some(ternary) => {
                    (ternary.read)(data, weights, scales);
                    check_blocks(weights, scales, unit)
                }
                None => {
                    format.decode_row(data, values).and_then(|()| units_of(values, weights, scales, unit))
                }
            }
            .map_err(|error| error.in_row(row))?;
            canonical::pack_row(weights, out);
            Ok(())
        },
    )?;
    let coarser = |group: &usize| group.is_multiple_of(unit) && *group < k;
    let holds =
        |count: usize| scales.par_chunks(units).all(|row| row.chunks(count).all(|of| shared(of).is_some()));
    let group = match holds(units) {
        true => 0,
        false => GROUPS.into_iter().filter(coarser).find(|group| holds(group / unit)).unwrap_or(unit),
    };
    let count = if group == 0 { units } else { group / unit };
    let folded: Vec<f32> =
        scales.chunks(units).flat_map(|row| row.chunks(count).map(|of| shared(of).unwrap_or(0.0))).collect();
    Ok((rows, Scales::from_rows(&folded, n, k, group)?))
}

/// Number of weights of a matrix [n, k] in canonical rows that are zero.
pub fn zeros(rows: &[u8], n: usize, k: usize) -> u64 {
    // Code 1 is a pair of bits with the lower one set and the upper one not.
    let pairs = |byte: u8| u64::from((byte & !(byte >> 1) & 0b01_01_01_01).count_ones());
    let all: u64 = rows.iter().map(|&byte| pairs(byte)).sum();
    let padding = rows.len() as u64 * 4 - n as u64 * k as u64;
    all.saturating_sub(padding)
}

/// Checks the bytes of a tensor [n, k]; the bytes of its canonical rows, and of a row of the format.
fn check_dense(format: DenseFormat, data: &[u8], n: usize, k: usize) -> Result<(usize, usize), FormatError> {
    let name = format.name();
    let size = canonical_bytes(name, n, k)?;
    let row_bytes = format.checked_row_bytes(k)?;
    let expected = n.checked_mul(row_bytes).ok_or(FormatError::TooLarge { format: name, n, k })?;
    check_length(name, n, k, "bytes", expected, data.len())?;
    Ok((size, row_bytes))
}

/// The scale of neighbours, of which those that are 0 have any; `None` if they differ.
fn shared(scales: &[f32]) -> Option<f32> {
    let first = scales.iter().copied().find(|&s| s != 0.0).unwrap_or(0.0);
    scales.iter().all(|&s| s == 0.0 || s == first).then_some(first)
}

/// Checks blocks of a row; those of zeros get the scale 0.
fn check_blocks(weights: &[i8], scales: &mut [f32], block: usize) -> Result<(), FormatError> {
    for (index, (weights, scale)) in weights.chunks(block).zip(scales).enumerate() {
        let (mut any, mut bad) = (false, false);
        for &w in weights {
            any |= w != 0;
            bad |= w > 1;
        }
        let column = index * block;
        if !scale.is_finite() {
            return Err(FormatError::NotFinite { row: 0, column, value: *scale });
        }
        if bad {
            let column = column + weights.iter().position(|&w| w > 1).unwrap_or(0);
            return Err(FormatError::NotTernary { row: 0, column, value: 2.0 * *scale, scale: *scale });
        }
        if !any {
            *scale = 0.0;
        }
    }
    Ok(())
}

/// The weights and the scales of a row of values.
fn units_of(values: &[f32], weights: &mut [i8], scales: &mut [f32], unit: usize) -> Result<(), FormatError> {
    let units = values.chunks(unit).zip(weights.chunks_mut(unit)).zip(scales);
    for (index, ((values, weights), scale)) in units.enumerate() {
        weights_of(values, scale, weights).map_err(|error| error.moved(0, index * unit))?;
    }
    Ok(())
}

/// Canonical rows and the scale s of an [n, k] tensor of any dense format.
///
/// Q4_0 is read by signs as the [module](self) describes, and TQ1_0 and TQ2_0 by their [codes](tq1_0). Every other format must decode to nothing
/// but -s, 0 and s, as in [`exact_from_f32_rows`].
///
/// # Errors
/// [`FormatError::Empty`], [`TooLarge`](FormatError::TooLarge),
/// [`NotAMultiple`](FormatError::NotAMultiple) (K by the format's block),
/// [`Length`](FormatError::Length); then as [`exact_from_f32_rows`], or for Q4_0
/// [`NotTernaryCode`](FormatError::NotTernaryCode), [`BadBlockScale`](FormatError::BadBlockScale),
/// [`ZeroBlockScale`](FormatError::ZeroBlockScale), [`MixedScales`](FormatError::MixedScales) (their
/// scales being s = 8 |d|).
pub fn exact_from_dense(
    format: DenseFormat,
    data: &[u8],
    n: usize,
    k: usize,
) -> Result<(Vec<u8>, f32), FormatError> {
    let (size, row_bytes) = check_dense(format, data, n, k)?;
    match format {
        DenseFormat::Q4_0 => return q4_0_signs(data, size, k),
        DenseFormat::TQ1_0 => return tq1_0::to_canonical(data, n, k),
        DenseFormat::TQ2_0 => return tq2_0::to_canonical(data, n, k),
        _ => {}
    }
    let mut reader = Reader::new(size, k);
    let mut values = vec![0.0; k];
    for row in data.chunks_exact(row_bytes) {
        format.decode_row(row, &mut values)?;
        reader.row(&values)?;
    }
    Ok(reader.finish())
}

/// `data` holds whole rows, `size` the bytes of as many canonical ones.
fn q4_0_signs(data: &[u8], size: usize, k: usize) -> Result<(Vec<u8>, f32), FormatError> {
    let format = DenseFormat::Q4_0.name();
    let mut rows = vec![0; size];
    let mut weights = vec![0i8; k];
    let mut scale = SharedScale::new(format);
    let (blocks, _) = data.as_chunks::<Q4_0_BYTES>();
    let rows_of_blocks = blocks.chunks_exact(k / QK).zip(rows.chunks_exact_mut(canonical::row_bytes(k)));
    for (row, (blocks, out)) in rows_of_blocks.enumerate() {
        for (b, (bytes, weights)) in blocks.iter().zip(weights.as_chunks_mut::<QK>().0).enumerate() {
            let block = row * (k / QK) + b;
            let (d, codes) = (f16_at(bytes, 0), q4_0_codes(bytes));
            if let Some(index) = codes.iter().position(|q| !matches!(q, 0 | 8 | 15)) {
                return Err(FormatError::NotTernaryCode { format, block, index, code: codes[index] });
            }
            let sign = if d < 0.0 { -1 } else { 1 };
            for (w, &q) in weights.iter_mut().zip(&codes) {
                *w = (i8::from(q > 8) - i8::from(q < 8)) * sign;
            }
            scale.add(block, 8.0 * d.abs(), codes == [8; QK])?;
        }
        canonical::pack_row(&weights, out);
    }
    Ok((rows, scale.finish()))
}

/// Takes rows of values one after the other.
struct Reader {
    rows: Vec<u8>,
    weights: Vec<i8>,
    next_row: usize,
    scale: f32,
}

impl Reader {
    fn new(size: usize, k: usize) -> Self {
        Self { rows: vec![0; size], weights: vec![0; k], next_row: 0, scale: 0.0 }
    }

    fn row(&mut self, values: &[f32]) -> Result<(), FormatError> {
        let row = self.next_row;
        weights_of(values, &mut self.scale, &mut self.weights).map_err(|error| error.moved(row, 0))?;
        let row_bytes = canonical::row_bytes(values.len());
        canonical::pack_row(&self.weights, &mut self.rows[row * row_bytes..][..row_bytes]);
        self.next_row += 1;
        Ok(())
    }

    fn finish(self) -> (Vec<u8>, f32) {
        (self.rows, self.scale)
    }
}

/// The weights of values that share a scale: the given one, or the magnitude of the first non-zero value if that is
/// zero. Errors are those of row 0.
fn weights_of(values: &[f32], scale: &mut f32, weights: &mut [i8]) -> Result<(), FormatError> {
    if *scale == 0.0
        && let Some(column) = values.iter().position(|&v| v != 0.0)
    {
        let value = values[column];
        if !value.is_finite() {
            return Err(FormatError::NotFinite { row: 0, column, value });
        }
        *scale = value.abs();
    }
    let s = *scale;
    // Without a branch, so that it runs in vectors; the culprit is looked for when there is one.
    let mut good = true;
    for (w, &v) in weights.iter_mut().zip(values) {
        *w = i8::from(v == s) - i8::from(v == -s);
        good &= v.abs() == s || v == 0.0;
    }
    if s == 0.0 {
        // Zeros before the first non-zero value: both comparisons held.
        weights.fill(0);
    }
    if !good {
        let culprit = |v: &f32| !(v.abs() == s || *v == 0.0);
        let column = values.iter().position(culprit).unwrap_or(0);
        return Err(FormatError::NotTernary { row: 0, column, value: values[column], scale: s });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::canonical::Row;
    use super::super::testing::{canonical_rows, f16_scale, floats, matrix};
    use super::*;
    use half::f16;
    use proptest::prelude::*;

    fn encode(format: DenseFormat, values: &[f32]) -> Vec<u8> {
        let mut data = vec![0; format.row_bytes(values.len()).unwrap()];
        format.encode_row(values, &mut data).unwrap();
        data
    }

    #[test]
    fn gguf_py_golden_of_q4_0() {
        let values = floats(include_bytes!("../testdata/dense/ternary.input.f32.bin"));
        let data = include_bytes!("../testdata/dense/ternary.q4_0.bin");
        let (rows, scale) = exact_from_dense(DenseFormat::Q4_0, data, 3, 512).unwrap();
        assert_eq!((rows, scale), exact_from_f32_rows(&values, 3, 512).unwrap());
        // Both signs of d occur, so both directions of the codes were read.
        let signs = data.as_chunks::<18>().0.iter().map(|b| f16::from_le_bytes([b[0], b[1]]));
        let (negative, positive): (Vec<_>, Vec<_>) = signs.partition(|d| *d < f16::ZERO);
        assert!(negative.len() > 5 && positive.len() > 5);
    }

    #[test]
    fn the_first_value_that_is_not_ternary_is_named() {
        let mut values = vec![0.0; 4 * 200];
        values[200 + 3] = -0.5;
        values[400 + 7] = 0.5;
        values[600] = -0.0;
        assert!(exact_from_f32_rows(&values, 4, 200).is_ok());
        for bad in [0.25, -1.0, f32::INFINITY, 1e-40] {
            values[600 + 199] = bad;
            assert_eq!(
                exact_from_f32_rows(&values, 4, 200),
                Err(FormatError::NotTernary { row: 3, column: 199, value: bad, scale: 0.5 })
            );
        }
        values[600 + 199] = f32::NAN;
        let error = exact_from_f32_rows(&values, 4, 200).unwrap_err();
        assert!(matches!(error, FormatError::NotTernary { row: 3, column: 199, .. }));
        values[1] = f32::INFINITY;
        assert!(matches!(
            exact_from_f32_rows(&values, 4, 200),
            Err(FormatError::NotFinite { row: 0, column: 1, .. })
        ));
        assert!(matches!(
            exact_from_f32_rows(&values, 4, 199),
            Err(FormatError::Length { expected: 796, .. })
        ));
    }

    fn scaled(
        format: DenseFormat,
        values: &[f32],
        n: usize,
        k: usize,
    ) -> Result<(Vec<u8>, Scales), FormatError> {
        let data: Vec<u8> = values.chunks(k).flat_map(|row| encode(format, row)).collect();
        scaled_from_dense(format, &data, n, k)
    }

    #[test]
    fn groups_have_scales_of_their_own() {
        let (n, k) = (3, 300);
        let mut values = vec![0.0; n * k];
        for (i, v) in values.iter_mut().enumerate() {
            let (row, column) = (i / k, i % k);
            let scale = (1 + row * 10 + column / 64) as f32;
            *v = [scale, 0.0, -scale, -0.0][i % 4];
        }
        values[k..][64..128].fill(0.0); // a group of zeros
        let (rows, scales) = scaled(DenseFormat::F32, &values, n, k).unwrap();
        assert_eq!(scales.group(), 64);
        for (i, &v) in values.iter().enumerate() {
            let weight = Row(&rows[i / k * canonical::row_bytes(k)..]).weight(i % k);
            assert_eq!(f32::from(weight) * scales.get(i / k, i % k / 64, k), v);
        }
        assert_eq!(scales.get(1, 1, k), 0.0);
        values[2 * k + 130] = f32::NAN;
        assert!(matches!(
            scaled(DenseFormat::F32, &values, n, k),
            Err(FormatError::NotTernary { row: 2, column: 130, scale: 23.0, .. })
        ));
        values[2 * k + 128] = f32::INFINITY;
        let infinite = scaled(DenseFormat::F32, &values, n, k);
        assert!(matches!(infinite, Err(FormatError::NotFinite { row: 2, column: 128, .. })));
        assert!(matches!(
            scaled_from_dense(DenseFormat::F32, &[0; 48], 3, 5),
            Err(FormatError::Length { expected: 60, .. })
        ));
    }

    #[test]
    fn the_coarsest_grouping_is_found() {
        let (n, k) = (4, 512);
        let of = |format: DenseFormat, scale: &dyn Fn(usize, usize) -> usize| {
            let value = |i: usize| scale(i / k, i % k) as f32 * [1.0, 0.0, -1.0][i % 3];
            let found = scaled(format, &(0..n * k).map(value).collect::<Vec<_>>(), n, k);
            found.map(|(_, scales)| scales.group())
        };
        for format in [DenseFormat::F32, DenseFormat::BF16, DenseFormat::Q2_0] {
            assert_eq!(of(format, &|_, _| 1), Ok(0));
            assert_eq!(of(format, &|row, _| row), Ok(0));
            // Groups of zeros have any scale.
            assert_eq!(of(format, &|row, column| row * (column / 64 % 2)), Ok(0));
            for group in [256, 128, 64] {
                assert_eq!(of(format, &|row, column| 1 + row + column / group), Ok(group), "{format:?}");
            }
        }
        assert_eq!(of(DenseFormat::F16, &|row, column| 1 + row + column / 32), Ok(32));
        assert_eq!(of(DenseFormat::TQ1_0, &|row, column| 1 + row + column / 256), Ok(256));
        let small = of(DenseFormat::F32, &|row, column| 1 + row + column / 16);
        assert_eq!(small, Err(FormatError::NotTernary { row: 0, column: 17, value: -2.0, scale: 1.0 }));
    }

    #[test]
    fn blocks_that_are_not_ternary_are_refused() {
        let mut data = vec![0; 18 * 4];
        for block in data.chunks_mut(18) {
            block[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
            block[2..].fill(0b10_01_00_01);
        }
        let read = |data: &[u8]| scaled_from_dense(DenseFormat::Q2_0, data, 2, 128);
        assert_eq!(read(&data).unwrap().1.group(), 0);
        data[3 * 18 + 2 + 5] = 0b01_11_01_01;
        let expected = FormatError::NotTernary { row: 1, column: 64 + 22, value: 1.0, scale: 0.5 };
        assert_eq!(read(&data), Err(expected));
        data[18 + 1] = 0x7c;
        assert_eq!(read(&data), Err(FormatError::NotFinite { row: 0, column: 64, value: f32::INFINITY }));
    }

    #[test]
    fn a_tensor_of_zeros_has_the_scale_zero() {
        for format in DenseFormat::ALL {
            let data = encode(format, &[0.0; 512]);
            let zeros = (canonical_rows(&[0; 512], 256), 0.0);
            assert_eq!(exact_from_dense(format, &data, 2, 256), Ok(zeros), "{}", format.name());
        }
    }

    #[test]
    fn q4_0_that_is_not_ternary_is_refused() {
        let mut values = vec![0.5; 128];
        values[40..].fill(-0.5);
        let good = encode(DenseFormat::Q4_0, &values);
        let read = |data: &[u8]| exact_from_dense(DenseFormat::Q4_0, data, 2, 64);
        assert_eq!(read(&good).unwrap().1, 0.5);

        let mut data = good.clone();
        data[2 * 18 + 2 + 5] = 0x1f; // weight 5 keeps 15, weight 16 + 5 gets 1
        assert_eq!(
            read(&data),
            Err(FormatError::NotTernaryCode { format: "Q4_0", block: 2, index: 21, code: 1 })
        );
        data.copy_from_slice(&good);
        data[3 * 18..3 * 18 + 2].copy_from_slice(&f16::from_f32(0.125).to_le_bytes());
        assert_eq!(
            read(&data),
            Err(FormatError::MixedScales {
                format: "Q4_0",
                block: 3,
                scale: 1.0,
                first_block: 0,
                first: 0.5
            })
        );
        data[3 * 18..3 * 18 + 2].copy_from_slice(&[0, 0x80]);
        assert_eq!(read(&data), Err(FormatError::ZeroBlockScale { format: "Q4_0", block: 3 }));
        assert!(matches!(
            exact_from_dense(DenseFormat::Q4_0, &data, 2, 60),
            Err(FormatError::NotAMultiple { value: 60, of: 32, .. })
        ));
    }

    proptest! {
        #[test]
        fn every_value_comes_back(
            (n, k, weights) in matrix(1, 40, 1, 200), group in 1usize..5, seed in any::<u64>(), half in any::<bool>(),
        ) {
            let mut random = crate::random::SplitMix64::new(seed);
            let (unit, one) = (32 * group, if half { 1.0 } else { 1.000_01 });
            let groups = k.div_ceil(unit);
            let scales: Vec<f32> = (0..n * groups).map(|_| random.below(3) as f32 * one).collect();
            let scale = |i: usize| scales[i / k * groups + i % k / unit];
            let values: Vec<f32> = weights.iter().enumerate().map(|(i, &w)| f32::from(w) * scale(i)).collect();
            let (rows, found) = scaled(DenseFormat::F32, &values, n, k).unwrap();
            let size = if found.group() == 0 { k } else { found.group() };
            for (i, value) in values.iter().enumerate() {
                let weight = Row(&rows[i / k * canonical::row_bytes(k)..]).weight(i % k);
                prop_assert_eq!(f32::from(weight) * found.get(i / k, i % k / size, k), *value);
            }
        }

        #[test]
        fn every_dense_format_gives_back_what_it_can_hold(
            (n, k, weights) in matrix(1, 4, 32, 320), scale in f16_scale(),
        ) {
            let values: Vec<f32> = weights.iter().map(|&w| f32::from(w) * scale).collect();
            let zero = weights.iter().all(|&w| w == 0);
            let expected = (canonical_rows(&weights, k), if zero { 0.0 } else { scale });
            prop_assert_eq!(&exact_from_f32_rows(&values, n, k).unwrap(), &expected);
            for format in [DenseFormat::F32, DenseFormat::F16] {
                let data = encode(format, &values);
                prop_assert_eq!(&exact_from_dense(format, &data, n, k).unwrap(), &expected);
            }
            // bf16 rounds the scale, Q8_0 stores a 127th of it as f16, Q4_0 an eighth (which f16 holds
            // unless it becomes subnormal): the same weights, with the scale as stored.
            if scale > 1e-3 {
                let back = exact_from_dense(DenseFormat::Q4_0, &encode(DenseFormat::Q4_0, &values), n, k);
                prop_assert_eq!(&back.unwrap(), &expected);
                for format in [DenseFormat::BF16, DenseFormat::Q8_0] {
                    let (rows, s) = exact_from_dense(format, &encode(format, &values), n, k).unwrap();
                    prop_assert_eq!(&rows, &expected.0);
                    prop_assert!((s - expected.1).abs() <= expected.1 / 256.0);
                }
            }
        }

        #[test]
        fn any_bytes_give_a_result_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), n in 0usize..4, k in 0usize..80,
        ) {
            for format in DenseFormat::ALL {
                let _ = exact_from_dense(format, &bytes, n, k);
                let _ = exact_from_dense(format, &bytes, n, k * 32);
                let _ = scaled_from_dense(format, &bytes, n, k);
                let _ = scaled_from_dense(format, &bytes, n, k * 32);
            }
        }
    }
}
