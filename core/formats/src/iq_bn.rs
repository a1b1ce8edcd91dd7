//! IQ1_BN and IQ2_BN (ik_llama.cpp, GGUF types 134 and 135): ternary rows that begin with their scale.
//!
//! | | scale d of a row | 64 weights | bits a weight |
//! | --- | --- | --- | --- |
//! | IQ1_BN | f16 | 13 bytes in base 3 | 1.63 |
//! | IQ2_BN | f32 | 16 bytes; byte j holds the weights j, 16+j, 32+j and 48+j in the bit pairs 1..0, 3..2, 5..4 and 7..6 | 2 |
//!
//! A weight's value is (code - 1) * d. Bytes in base 3 are fractions as in [`tq1_0`](crate::tq1_0), but with the first weight
//! in the *last* digit: byte 3i + j (i < 4, j < 3) holds the weights 16i + 5j + (0, 1, 2, 3, 4), and byte 12 the weights
//! 15, 31, 47 and 63, and a first digit 0.
//!
//! (ik_llama.cpp, `ggml-common.h`: `block_iq1_bn`, `block_iq2_bn`; `iqk_quantize.cpp`; `row_meta_size` in `ggml.c`.) Its
//! llama-quantize makes these types of I2_S files of BitNet, and of TriLM. They are read and not written.

use crate::{FormatError, SharedScale, canonical, canonical_bytes, check_length, f16_at};

/// Weights in a block.
const BLOCK: usize = 64;

/// One of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names of the formats")]
pub enum IqBn {
    /// 1.63 bits a weight, an f16 scale for a row.
    IQ1_BN,
    /// 2 bits a weight, an f32 scale for a row.
    IQ2_BN,
}

impl IqBn {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::IQ1_BN => "IQ1_BN",
            Self::IQ2_BN => "IQ2_BN",
        }
    }

    /// (bytes of a row's scale, bytes of a block).
    const fn sizes(self) -> (usize, usize) {
        match self {
            Self::IQ1_BN => (2, 13),
            Self::IQ2_BN => (4, 16),
        }
    }

    /// (number in GGUF, weights in a block, bytes in a block, bytes of a row before its blocks).
    pub(crate) const fn facts(self) -> (u32, u64, u64, u64) {
        let (scale, block) = self.sizes();
        let id = match self {
            Self::IQ1_BN => 134,
            Self::IQ2_BN => 135,
        };
        (id, BLOCK as u64, block as u64, scale as u64)
    }

    /// Canonical rows of an [n, k] tensor, and the scale of each; 0 for a row without weights.
    ///
    /// # Errors
    /// [`FormatError::Empty`], [`TooLarge`](FormatError::TooLarge), [`NotAMultiple`](FormatError::NotAMultiple) (K by 64),
    /// [`Length`](FormatError::Length), [`InvalidCode`](FormatError::InvalidCode); for a scale
    /// [`BadBlockScale`](FormatError::BadBlockScale), whose block is the row.
    pub fn to_canonical(self, data: &[u8], n: usize, k: usize) -> Result<(Vec<u8>, Vec<f32>), FormatError> {
        let (format, (scale_bytes, block_bytes)) = (self.name(), self.sizes());
        let size = canonical_bytes(format, n, k)?;
        if !k.is_multiple_of(BLOCK) {
            return Err(FormatError::NotAMultiple { format, dimension: "K", value: k, of: BLOCK });
        }
        let row_bytes = (k / BLOCK).checked_mul(block_bytes).and_then(|bytes| bytes.checked_add(scale_bytes));
        let row_bytes = row_bytes.ok_or(FormatError::TooLarge { format, n, k })?;
        let expected = n.checked_mul(row_bytes).ok_or(FormatError::TooLarge { format, n, k })?;
        check_length(format, n, k, "bytes", expected, data.len())?;
        let (mut rows, mut scales, mut weights) = (vec![0; size], Vec::with_capacity(n), vec![0i8; k]);
        let in_out = data.chunks_exact(row_bytes).zip(rows.chunks_exact_mut(canonical::row_bytes(k)));
        for (row, (bytes, out)) in in_out.enumerate() {
            let (scale, blocks) = bytes.split_at(scale_bytes);
            let blocks = blocks.chunks_exact(block_bytes).zip(weights.as_chunks_mut::<BLOCK>().0);
            let scale = match self {
                Self::IQ1_BN => {
                    blocks.for_each(|(block, weights)| decode_base_3(block, weights));
                    f16_at(scale, 0)
                }
                Self::IQ2_BN => {
                    blocks.for_each(|(block, weights)| decode_pairs(block, weights));
                    f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]])
                }
            };
            if let Some(column) = weights.iter().position(|&w| w > 1) {
                return Err(FormatError::InvalidCode { format, row, column });
            }
            if scale == 0.0 {
                // Values of 0: ik_llama.cpp writes a row of zeros as codes 2 with this scale.
                weights.fill(0);
            }
            let mut one = SharedScale::new(format);
            one.add(row, scale, weights.iter().all(|&w| w == 0))?;
            scales.push(one.finish());
            canonical::pack_row(&weights, out);
        }
        Ok((rows, scales))
    }

    /// Canonical rows and the scale of an [n, k] tensor whose rows share one. Rows without weights may have any.
    ///
    /// # Errors
    /// Those of [`to_canonical`](Self::to_canonical), and [`MixedScales`](FormatError::MixedScales), whose blocks are rows.
    pub fn with_one_scale(self, data: &[u8], n: usize, k: usize) -> Result<(Vec<u8>, f32), FormatError> {
        let (rows, scales) = self.to_canonical(data, n, k)?;
        let mut one = SharedScale::new(self.name());
        scales.iter().enumerate().try_for_each(|(row, &scale)| one.add(row, scale, scale == 0.0))?;
        Ok((rows, one.finish()))
    }
}

/// Code 3 comes out as weight 2.
fn decode_pairs(block: &[u8], weights: &mut [i8; BLOCK]) {
    for (j, byte) in block.iter().enumerate() {
        for pair in 0..4 {
            weights[16 * pair + j] = (byte >> (2 * pair) & 3) as i8 - 1;
        }
    }
}

fn decode_base_3(block: &[u8], weights: &mut [i8; BLOCK]) {
    // Digit i, counted from the last one.
    let digit = |byte: u8, i: u32| ((u16::from(byte.wrapping_mul(3u8.pow(4 - i))) * 3) >> 8) as i8 - 1;
    for (i, weights) in weights.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        for (j, weights) in weights.as_chunks_mut::<5>().0.iter_mut().enumerate() {
            (0..).zip(weights).for_each(|(index, w)| *w = digit(block[3 * i + j], index));
        }
        weights[15] = digit(block[12], i as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{canonical_rows, matrix};
    use half::f16;
    use proptest::prelude::*;

    /// A row as ik_llama.cpp's quantisers write it, from their definition.
    fn encode(format: IqBn, weights: &[i8], scale: f32) -> Vec<u8> {
        let code = |w: i8| (w + 1) as u32;
        let fraction = |digits: &[u32]| {
            let number: u32 = digits.iter().zip([1, 3, 9, 27, 81]).map(|(digit, power)| digit * power).sum();
            (number * 256).div_ceil(243) as u8
        };
        let mut row = match format {
            IqBn::IQ1_BN => f16::from_f32(scale).to_le_bytes().to_vec(),
            IqBn::IQ2_BN => scale.to_le_bytes().to_vec(),
        };
        for block in weights.chunks(64) {
            let codes: Vec<u32> = block.iter().map(|&w| code(w)).collect();
            match format {
                IqBn::IQ1_BN => {
                    for run in codes.chunks(16) {
                        row.extend(run[..15].chunks(5).map(fraction));
                    }
                    row.push(fraction(&[codes[15], codes[31], codes[47], codes[63]]));
                }
                IqBn::IQ2_BN => {
                    for j in 0..16 {
                        let byte: u32 = (0..4).map(|pair| codes[16 * pair + j] << (2 * pair)).sum();
                        row.push(byte as u8);
                    }
                }
            }
        }
        row
    }

    const FORMATS: [IqBn; 2] = [IqBn::IQ1_BN, IqBn::IQ2_BN];

    /// By hand: weights 0, 5, 15 and 63 are 1, weight 16 is -1.
    #[test]
    fn weights_lie_where_they_should() {
        let mut weights = [0i8; 64];
        (weights[0], weights[5], weights[15], weights[63], weights[16]) = (1, 1, 1, 1, -1);
        // Zeros are 11111 in base 3, 121; the first digit of the last byte is 0.
        let of = |number: u32| (number * 256).div_ceil(243) as u8;
        let mut base_3 = [of(121); 13];
        (base_3[0], base_3[1], base_3[3], base_3[12]) = (of(122), of(122), of(120), of(40 + 1 + 27));
        let mut pairs = [0b01_01_01_01; 16];
        (pairs[0], pairs[5], pairs[15]) = (0b01_01_00_10, 0b01_01_01_10, 0b10_01_01_10);
        let rows = canonical_rows(&weights, 64);
        let data = [&f16::from_f32(0.5).to_le_bytes()[..], &base_3].concat();
        assert_eq!(IqBn::IQ1_BN.with_one_scale(&data, 1, 64), Ok((rows.clone(), 0.5)));
        let data = [&0.1f32.to_le_bytes()[..], &pairs].concat();
        assert_eq!(IqBn::IQ2_BN.with_one_scale(&data, 1, 64), Ok((rows, 0.1)));
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let weights = [1i8; 256];
        for format in FORMATS {
            let rows = |scales: [f32; 2]| {
                scales
                    .iter()
                    .zip(weights.chunks(128))
                    .flat_map(|(&s, w)| encode(format, w, s))
                    .collect::<Vec<_>>()
            };
            let good = rows([0.5, 0.25]);
            assert_eq!(
                format.to_canonical(&good, 2, 128),
                Ok((canonical_rows(&weights, 128), vec![0.5, 0.25]))
            );
            let mixed = format.with_one_scale(&good, 2, 128);
            assert!(
                matches!(mixed, Err(FormatError::MixedScales { block: 1, first_block: 0, .. })),
                "{mixed:?}"
            );
            for bad in [f32::NAN, f32::INFINITY, -0.5] {
                let error = format.to_canonical(&rows([0.5, bad]), 2, 128);
                assert!(matches!(error, Err(FormatError::BadBlockScale { block: 1, .. })), "{error:?}");
            }
            // A row of zeros.
            let zero = format.to_canonical(&rows([0.5, 0.0]), 2, 128);
            let codes = canonical_rows(&[[1; 128], [0; 128]].concat(), 128);
            assert_eq!(zero, Ok((codes, vec![0.5, 0.0])));
            assert!(matches!(format.to_canonical(&good, 1, 128), Err(FormatError::Length { .. })));
            assert!(matches!(format.to_canonical(&good, 2, 100), Err(FormatError::NotAMultiple { .. })));
            assert!(format.to_canonical(&good, usize::MAX, 128).is_err());
        }
        let mut data = encode(IqBn::IQ2_BN, &weights, 0.5);
        data[4 + 16 + 3] |= 0b00_11_00_00;
        let expected = FormatError::InvalidCode { format: "IQ2_BN", row: 0, column: 64 + 35 };
        assert_eq!(IqBn::IQ2_BN.to_canonical(&data, 1, 256), Err(expected));
    }

    proptest! {
        #[test]
        fn every_row_comes_back((n, k, weights) in matrix(1, 6, 64, 512), seed in 1u16..1000) {
            for format in FORMATS {
                let scale = |row: usize| f16::from_bits(seed * 7 + row as u16).to_f32();
                let rows = weights.chunks(k).enumerate();
                let data: Vec<u8> = rows.flat_map(|(row, weights)| encode(format, weights, scale(row))).collect();
                let zero = |row: usize| weights[row * k..][..k].iter().all(|&w| w == 0);
                let scales: Vec<f32> = (0..n).map(|row| if zero(row) { 0.0 } else { scale(row) }).collect();
                prop_assert_eq!(format.to_canonical(&data, n, k).unwrap(), (canonical_rows(&weights, k), scales));
            }
        }

        #[test]
        fn any_bytes_give_a_result_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), n in 0usize..4, k in 0usize..4,
        ) {
            for format in FORMATS {
                let _ = format.to_canonical(&bytes, n, k * 64);
                let _ = format.with_one_scale(&bytes, n, k * 64);
            }
        }
    }
}
