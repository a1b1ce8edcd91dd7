//! Hugging Face's packed weights: uint8 [out/4, in], four rows of the matrix in each byte.
//!
//! With R = out/4, byte [r, c] holds the weights of the rows r, R+r, 2R+r and 3R+r in column c, in
//! the bit pairs 1..0, 3..2, 5..4 and 7..6: interleaved by quarters of the output dimension, not four
//! neighbours. A 2-bit value is the weight plus one; 3 does not occur. (transformers,
//! `integrations/bitnet.py`: `pack_weights` and `unpack_weights`.)
//!
//! The scale is a tensor of its own beside it, and whether to multiply or to divide by it depends on
//! the checkpoint's `linear_class`: the loader's business.

use super::{FormatError, canonical, canonical_bytes, check_canonical, check_length};

const FORMAT: &str = "Hugging Face packed";

/// Bytes of a packed [out_features, in_features] matrix.
///
/// # Errors
/// As [`unpack_to_canonical`], but for codes and length.
pub fn packed_bytes(out_features: usize, in_features: usize) -> Result<usize, FormatError> {
    canonical_bytes(FORMAT, out_features, in_features)?;
    if !out_features.is_multiple_of(4) {
        return Err(FormatError::NotAMultiple { format: FORMAT, dimension: "N", value: out_features, of: 4 });
    }
    let (n, k) = (out_features, in_features);
    (n / 4).checked_mul(k).ok_or(FormatError::TooLarge { format: FORMAT, n, k })
}

/// Canonical rows of the matrix that `packed`, uint8 [out_features/4, in_features], holds.
///
/// ```
/// use bitnet_burn_formats::{canonical::Row, hf};
///
/// // One column of four rows: the weights 1, 0, -1, 1 from the lowest bits up.
/// let rows = hf::unpack_to_canonical(&[0b10_00_01_10], 4, 1)?;
/// assert_eq!(rows.len(), 4 * 32);
/// assert_eq!([0, 1, 2, 3].map(|n| Row(&rows[32 * n..]).weight(0)), [1, 0, -1, 1]);
/// assert_eq!(hf::pack_from_canonical(&rows, 4, 1)?, [0b10_00_01_10]);
/// # Ok::<(), bitnet_burn_formats::FormatError>(())
/// ```
///
/// # Errors
/// [`FormatError::Empty`], [`TooLarge`](FormatError::TooLarge),
/// [`NotAMultiple`](FormatError::NotAMultiple) (out_features by 4), [`Length`](FormatError::Length),
/// or [`InvalidCode`](FormatError::InvalidCode) with the first offender in the order of the bytes.
pub fn unpack_to_canonical(
    packed: &[u8],
    out_features: usize,
    in_features: usize,
) -> Result<Vec<u8>, FormatError> {
    let (n, k) = (out_features, in_features);
    check_length(FORMAT, n, k, "bytes", packed_bytes(n, k)?, packed.len())?;
    let mut rows = vec![0; canonical_bytes(FORMAT, n, k)?];
    let row_bytes = canonical::row_bytes(k);
    let quarter = n / 4;
    let mut weights = vec![0; k];
    for (r, bytes) in packed.chunks_exact(k).enumerate() {
        if bytes.iter().fold(0, |bad, &b| bad | (b & (b >> 1))) & 0b01_01_01_01 != 0 {
            return Err(first_invalid(bytes, r, quarter));
        }
        for i in 0..4 {
            for (w, &byte) in weights.iter_mut().zip(bytes) {
                *w = ((byte >> (2 * i)) & 3) as i8 - 1;
            }
            canonical::pack_row(&weights, &mut rows[(r + i * quarter) * row_bytes..][..row_bytes]);
        }
    }
    Ok(rows)
}

#[cold]
fn first_invalid(bytes: &[u8], r: usize, quarter: usize) -> FormatError {
    let code_3 = |byte: u8| (0..4).find(|i| (byte >> (2 * i)) & 3 == 3);
    let (column, i) =
        bytes.iter().enumerate().find_map(|(c, &byte)| Some((c, code_3(byte)?))).unwrap_or((0, 0));
    FormatError::InvalidCode { format: FORMAT, row: r + i * quarter, column }
}

/// The packed uint8 [out_features/4, in_features] of canonical rows: the inverse of
/// [`unpack_to_canonical`].
///
/// # Errors
/// As [`unpack_to_canonical`]; a code 3 in `rows` is reported with its row and column.
pub fn pack_from_canonical(
    rows: &[u8],
    out_features: usize,
    in_features: usize,
) -> Result<Vec<u8>, FormatError> {
    let (n, k) = (out_features, in_features);
    check_canonical(rows, n, k)?;
    let mut packed = vec![0; packed_bytes(n, k)?];
    let row_bytes = canonical::row_bytes(k);
    let quarter = n / 4;
    let mut weights = vec![0; k];
    for (r, bytes) in packed.chunks_exact_mut(k).enumerate() {
        for i in 0..4 {
            canonical::unpack_row(&rows[(r + i * quarter) * row_bytes..][..row_bytes], &mut weights);
            for (byte, &w) in bytes.iter_mut().zip(&weights) {
                *byte |= ((w + 1) as u8) << (2 * i);
            }
        }
    }
    Ok(packed)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{canonical_rows, matrix};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn transformers_worked_example() {
        let example: serde_json::Value =
            serde_json::from_slice(include_bytes!("../testdata/packing_example.json")).unwrap();
        let flat = |name: &str| -> Vec<i64> {
            let rows = example[name].as_array().unwrap().iter();
            rows.flat_map(|row| row.as_array().unwrap()).map(|v| v.as_i64().unwrap()).collect()
        };
        let packed: Vec<u8> = flat("packed").iter().map(|&v| v as u8).collect();
        let codes: Vec<i8> = flat("codes").iter().map(|&v| v as i8).collect();
        assert_eq!((packed.len(), codes.len()), (4, 16));
        let rows = unpack_to_canonical(&packed, 8, 2).unwrap();
        assert_eq!(rows, canonical_rows(&codes, 2));
        assert_eq!(pack_from_canonical(&rows, 8, 2).unwrap(), packed);
    }

    #[test]
    fn the_code_3_is_reported_with_row_and_column() {
        let mut packed = [0b01_01_01_01; 2 * 300]; // 8 x 300
        packed[300 + 299] = 0b01_11_01_01; // byte row 1, bit pair 2: row 2 * 2 + 1
        assert_eq!(
            unpack_to_canonical(&packed, 8, 300),
            Err(FormatError::InvalidCode { format: FORMAT, row: 5, column: 299 })
        );
        let mut rows = canonical_rows(&[0; 8 * 3], 3);
        rows[6 * 32 + 2] = 0b11_01_01_01;
        assert_eq!(
            pack_from_canonical(&rows, 8, 3),
            Err(FormatError::InvalidCode { format: "I2_S", row: 6, column: 2 })
        );
    }

    #[test]
    fn impossible_shapes_are_errors() {
        let error = |n, k| unpack_to_canonical(&[0; 8], n, k).unwrap_err();
        assert!(matches!(error(6, 4), FormatError::NotAMultiple { dimension: "N", value: 6, of: 4, .. }));
        assert!(matches!(error(0, 4), FormatError::Empty { .. }));
        assert!(matches!(error(4, 0), FormatError::Empty { .. }));
        assert!(matches!(error(4, 9), FormatError::Length { expected: 9, got: 8, .. }));
        assert!(matches!(error(1 << 62, 1 << 62), FormatError::TooLarge { .. }));
        assert!(matches!(pack_from_canonical(&[], 6, 0), Err(FormatError::Empty { .. })));
    }

    proptest! {
        #[test]
        fn round_trip((n, k, weights) in matrix(4, 24, 1, 300)) {
            let rows = canonical_rows(&weights, k);
            let packed = pack_from_canonical(&rows, n, k).unwrap();
            for (i, &w) in weights.iter().enumerate() {
                let (row, c) = (i / k, i % k);
                let byte = packed[row % (n / 4) * k + c];
                prop_assert_eq!((byte >> (2 * (row / (n / 4)))) as i8 & 3, w + 1);
            }
            prop_assert_eq!(unpack_to_canonical(&packed, n, k).unwrap(), rows);
        }

        #[test]
        fn any_bytes_give_a_result_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..600), n in 0usize..20, k in 0usize..200,
        ) {
            if let Ok(rows) = unpack_to_canonical(&bytes, n, k) {
                prop_assert_eq!(check_canonical(&rows, n, k), Ok(()));
                prop_assert_eq!(pack_from_canonical(&rows, n, k).unwrap(), bytes.clone());
            }
            let _ = pack_from_canonical(&bytes, n, k);
        }
    }
}
