//! The dense formats: what embeddings, the lm_head and norms are stored in.
//!
//! | format | a block | value |
//! | --- | --- | --- |
//! | F32, F16, BF16 | one number | |
//! | Q8_0 | 32 weights in 34 bytes: f16 d, 32 x i8 q | d * q |
//! | Q4_0 | 32 weights in 18 bytes: f16 d, 16 bytes; byte i holds the weights i (low nibble) and 16+i | d * (q - 8) |
//! | Q6_K | 256 weights in 210 bytes, see [`q6_k_block`] | d * scale * (q - 32) |
//!
//! Decoding gives bit for bit what ggml's `dequantize_row_*` gives: products in f32, in ggml's order.
//! Encoding follows ggml's reference quantisers (`quantize_row_*_ref` in `ggml-quants.c`), for Q6_K
//! with a simpler choice of scales.

use super::{FormatError, f16_at};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Weights in a Q8_0 or Q4_0 block.
pub const QK: usize = 32;
/// Weights in a Q6_K block.
pub const QK_K: usize = 256;
/// Bytes in a Q8_0 block.
pub const Q8_0_BYTES: usize = 34;
/// Bytes in a Q4_0 block.
pub const Q4_0_BYTES: usize = 18;
/// Bytes in a Q6_K block.
pub const Q6_K_BYTES: usize = 210;

/// How a dense tensor stores its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(non_camel_case_types)] // the names are the field's
pub enum DenseFormat {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// 8 bits and an f16 scale per 32.
    Q8_0,
    /// 6 bits, an i8 scale per 16 and an f16 scale per 256.
    Q6_K,
    /// 4 bits and an f16 scale per 32.
    Q4_0,
}

impl DenseFormat {
    /// Every format.
    pub const ALL: [Self; 6] = [Self::F32, Self::F16, Self::BF16, Self::Q8_0, Self::Q6_K, Self::Q4_0];

    /// The name that GGUF tools use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q6_K => "Q6_K",
            Self::Q4_0 => "Q4_0",
        }
    }

    /// Weights in a block: 1 for the floats.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 => QK,
            Self::Q6_K => QK_K,
        }
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => Q8_0_BYTES,
            Self::Q6_K => Q6_K_BYTES,
            Self::Q4_0 => Q4_0_BYTES,
        }
    }

    /// Bytes of a row of `k` weights; `None` where `k` is no whole number of blocks or the size
    /// overflows.
    pub const fn row_bytes(self, k: usize) -> Option<usize> {
        if k.is_multiple_of(self.block_len()) {
            (k / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }

    /// Bytes of a row of `k` weights, or which of the two reasons there is against it.
    pub(crate) fn checked_row_bytes(self, k: usize) -> Result<usize, FormatError> {
        let (format, of) = (self.name(), self.block_len());
        if !k.is_multiple_of(of) {
            return Err(FormatError::NotAMultiple { format, dimension: "K", value: k, of });
        }
        self.row_bytes(k).ok_or(FormatError::TooLarge { format, n: 1, k })
    }

    fn check_row(self, k: usize, bytes: usize) -> Result<(), FormatError> {
        super::check_length(self.name(), 1, k, "bytes", self.checked_row_bytes(k)?, bytes)
    }

    /// The values of a row, as ggml's `dequantize_row_*` computes them.
    ///
    /// # Arguments
    /// * `row`: [`row_bytes`](Self::row_bytes)`(out.len())` bytes
    /// * `out`: K values
    ///
    /// # Errors
    /// [`FormatError::NotAMultiple`] or [`Length`](FormatError::Length) where the two lengths don't
    /// fit; nothing is written then.
    ///
    /// ```
    /// use bitnet_burn_formats::DenseFormat;
    ///
    /// let mut row = [0; 34];
    /// DenseFormat::Q8_0.encode_row(&[127.0; 32], &mut row)?;
    /// let mut values = [0.0; 32];
    /// DenseFormat::Q8_0.decode_row(&row, &mut values)?;
    /// assert_eq!(values, [127.0; 32]);
    /// # Ok::<(), bitnet_burn_formats::FormatError>(())
    /// ```
    pub fn decode_row(&self, row: &[u8], out: &mut [f32]) -> Result<(), FormatError> {
        self.check_row(out.len(), row.len())?;
        match self {
            Self::F32 => {
                for (value, &bytes) in out.iter_mut().zip(row.as_chunks().0) {
                    *value = f32::from_le_bytes(bytes);
                }
            }
            Self::F16 => {
                // In runs that `half` converts with the machine's instructions.
                for (values, bytes) in out.chunks_mut(64).zip(row.chunks(128)) {
                    let mut halves = [f16::ZERO; 64];
                    for (half, &bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                        *half = f16::from_le_bytes(bytes);
                    }
                    halves[..values.len()].convert_to_f32_slice(values);
                }
            }
            Self::BF16 => {
                for (value, &bytes) in out.iter_mut().zip(row.as_chunks().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
                }
            }
            Self::Q8_0 => each_block(row, out, q8_0_block),
            Self::Q6_K => each_block(row, out, q6_k_block),
            Self::Q4_0 => each_block(row, out, q4_0_block),
        }
        Ok(())
    }

    /// Writes a row of `x.len()` values as `row`.
    ///
    /// The floats are rounded to nearest even. Q8_0 and Q4_0 are byte for byte ggml's reference
    /// quantisers. Q6_K takes for each 16 weights the scale that maps the value of the largest
    /// magnitude to -32, where ggml searches for the scale with the least squared error; its blocks
    /// are as valid, the error somewhat larger.
    ///
    /// # Errors
    /// [`FormatError::NotAMultiple`] or [`Length`](FormatError::Length) where the two lengths don't
    /// fit; for the block formats [`NotFinite`](FormatError::NotFinite) (row 0) and
    /// [`ScaleOverflow`](FormatError::ScaleOverflow), `row` then being unspecified.
    pub fn encode_row(&self, x: &[f32], row: &mut [u8]) -> Result<(), FormatError> {
        self.check_row(x.len(), row.len())?;
        match self {
            Self::F32 => {
                for (bytes, value) in row.as_chunks_mut().0.iter_mut().zip(x) {
                    *bytes = value.to_le_bytes();
                }
                return Ok(());
            }
            Self::F16 => {
                for (bytes, &value) in row.as_chunks_mut().0.iter_mut().zip(x) {
                    *bytes = f16::from_f32(value).to_le_bytes();
                }
                return Ok(());
            }
            Self::BF16 => {
                for (bytes, &value) in row.as_chunks_mut().0.iter_mut().zip(x) {
                    *bytes = bf16::from_f32(value).to_le_bytes();
                }
                return Ok(());
            }
            Self::Q8_0 | Self::Q6_K | Self::Q4_0 => {}
        }
        if let Some(column) = x.iter().position(|v| !v.is_finite()) {
            return Err(FormatError::NotFinite { row: 0, column, value: x[column] });
        }
        let overflow = match self {
            Self::Q8_0 => encode_blocks(x, row, encode_q8_0),
            Self::Q6_K => encode_blocks(x, row, encode_q6_k),
            _ => encode_blocks(x, row, encode_q4_0),
        };
        overflow.map_err(|(block, scale)| FormatError::ScaleOverflow { format: self.name(), block, scale })
    }
}

#[inline(always)]
fn each_block<const BYTES: usize, const LEN: usize>(
    row: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, out) in row.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, out);
    }
}

/// The 32 values of a Q8_0 block: d * q.
///
/// This and the other block decoders have loops without branches and are inlined always, so that a
/// caller compiled for a richer instruction set gets them vectorised for it.
#[inline(always)]
pub(crate) fn q8_0_block(block: &[u8; Q8_0_BYTES], out: &mut [f32; QK]) {
    let d = f16_at(block, 0);
    for (value, &q) in out.iter_mut().zip(&block[2..]) {
        *value = f32::from(q as i8) * d;
    }
}

/// The 32 values of a Q4_0 block: d * (q - 8).
#[inline(always)]
pub(crate) fn q4_0_block(block: &[u8; Q4_0_BYTES], out: &mut [f32; QK]) {
    let (d, codes) = (f16_at(block, 0), q4_0_codes(block));
    for (value, q) in out.iter_mut().zip(codes) {
        *value = f32::from(q as i8 - 8) * d;
    }
}

/// The 32 codes q (0..16) of a Q4_0 block.
#[inline(always)]
pub fn q4_0_codes(block: &[u8; Q4_0_BYTES]) -> [u8; QK] {
    let mut codes = [0; QK];
    for i in 0..QK / 2 {
        codes[i] = block[2 + i] & 15;
        codes[QK / 2 + i] = block[2 + i] >> 4;
    }
    codes
}

/// The 256 values of a Q6_K block: d * scale * (q - 32), the first product first.
///
/// | bytes | |
/// | --- | --- |
/// | 0..128 | the low 4 bits of q; the first 64 bytes are for the weights 0..128, the others for 128..256. In each half, byte i holds the weights i (low nibble) and 64+i (high nibble), for i in 0..64 |
/// | 128..192 | the high 2 bits of q, 32 bytes for each half: byte i holds the weights i, 32+i, 64+i, 96+i of the half in the bit pairs 1..0, 3..2, 5..4, 7..6 |
/// | 192..208 | an i8 scale for each 16 weights |
/// | 208..210 | f16 d |
#[inline(always)]
pub fn q6_k_block(block: &[u8; Q6_K_BYTES], out: &mut [f32; QK_K]) {
    let codes = q6_k_codes(block);
    let d = f16_at(block, 208);
    // Written out: of a loop over the parts LLVM makes gathers across them, several times slower.
    q6_k_part::<0>(block, &codes, d, out);
    q6_k_part::<1>(block, &codes, d, out);
    q6_k_part::<2>(block, &codes, d, out);
    q6_k_part::<3>(block, &codes, d, out);
    q6_k_part::<4>(block, &codes, d, out);
    q6_k_part::<5>(block, &codes, d, out);
    q6_k_part::<6>(block, &codes, d, out);
    q6_k_part::<7>(block, &codes, d, out);
    q6_k_part::<8>(block, &codes, d, out);
    q6_k_part::<9>(block, &codes, d, out);
    q6_k_part::<10>(block, &codes, d, out);
    q6_k_part::<11>(block, &codes, d, out);
    q6_k_part::<12>(block, &codes, d, out);
    q6_k_part::<13>(block, &codes, d, out);
    q6_k_part::<14>(block, &codes, d, out);
    q6_k_part::<15>(block, &codes, d, out);
}

/// The 256 codes q (0..64) of a Q6_K block.
#[inline(always)]
pub fn q6_k_codes(block: &[u8; Q6_K_BYTES]) -> [u8; QK_K] {
    let mut codes = [0u8; QK_K];
    let (low, high) = (&block[..128], &block[128..192]);
    for half in 0..2 {
        for i in 0..32 {
            let (l0, l1, h) = (low[64 * half + i], low[64 * half + 32 + i], high[32 * half + i]);
            codes[128 * half + i] = l0 & 15 | (h & 3) << 4;
            codes[128 * half + 32 + i] = l1 & 15 | (h & 12) << 2;
            codes[128 * half + 64 + i] = l0 >> 4 | h & 0x30;
            codes[128 * half + 96 + i] = l1 >> 4 | (h & 0xc0) >> 2;
        }
    }
    codes
}

/// The inverse of [`q6_k_codes`]: writes the codes, and nothing else of the block.
pub(crate) fn set_q6_k_codes(codes: &[u8; QK_K], block: &mut [u8; Q6_K_BYTES]) {
    for half in 0..2 {
        let c = &codes[128 * half..];
        for i in 0..64 {
            block[64 * half + i] = c[i] & 15 | c[64 + i] << 4;
        }
        for i in 0..32 {
            let high = |quarter: usize| c[32 * quarter + i] >> 4;
            block[128 + 32 * half + i] = high(0) | high(1) << 2 | high(2) << 4 | high(3) << 6;
        }
    }
}

/// The 16 values of the part of a Q6_K block that shares scale `PART`.
#[inline(always)]
fn q6_k_part<const PART: usize>(block: &[u8; Q6_K_BYTES], codes: &[u8; QK_K], d: f32, out: &mut [f32; QK_K]) {
    let scale = d * f32::from(block[192 + PART] as i8);
    for i in 16 * PART..16 * PART + 16 {
        out[i] = scale * f32::from(codes[i] as i8 - 32);
    }
}

/// Encodes block after block; `Err` is the block whose scale overflows, and that scale.
fn encode_blocks<const LEN: usize, const BYTES: usize>(
    x: &[f32],
    row: &mut [u8],
    encode: impl Fn(&[f32; LEN], &mut [u8; BYTES]) -> f32,
) -> Result<(), (usize, f32)> {
    for (i, (x, block)) in x.as_chunks().0.iter().zip(row.as_chunks_mut().0).enumerate() {
        let d = encode(x, block);
        if f16::from_f32(d).is_infinite() {
            return Err((i, d));
        }
    }
    Ok(())
}

/// 1/d, or zero for the zero that a block of zeros has.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value of the largest magnitude, with its sign; the first of several.
fn signed_max(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |max, &v| if v.abs() > max.abs() { v } else { max })
}

/// `quantize_row_q8_0_ref`: d = max|x| / 127, q = x / d rounded half away from zero.
fn encode_q8_0(x: &[f32; QK], block: &mut [u8; Q8_0_BYTES]) -> f32 {
    let d = signed_max(x).abs() / 127.0;
    let id = inverse(d);
    [block[0], block[1]] = f16::from_f32(d).to_le_bytes();
    for (q, &v) in block[2..].iter_mut().zip(x) {
        *q = (v * id).round() as i8 as u8;
    }
    d
}

/// `quantize_row_q4_0_ref`: d = max / -8 with max the signed value of the largest magnitude, so that
/// it gets code 0; q = min(15, trunc(x / d + 8.5)).
fn encode_q4_0(x: &[f32; QK], block: &mut [u8; Q4_0_BYTES]) -> f32 {
    let d = signed_max(x) / -8.0;
    let id = inverse(d);
    [block[0], block[1]] = f16::from_f32(d).to_le_bytes();
    for i in 0..QK / 2 {
        let code = |v: f32| ((v * id + 8.5) as u8).min(15);
        block[2 + i] = code(x[i]) | code(x[QK / 2 + i]) << 4;
    }
    d
}

/// As `quantize_row_q6_K_ref`, but with the scale of 16 weights from their largest magnitude.
fn encode_q6_k(x: &[f32; QK_K], block: &mut [u8; Q6_K_BYTES]) -> f32 {
    let mut scales = [0.0; 16];
    for (scale, x) in scales.iter_mut().zip(x.as_chunks::<16>().0) {
        *scale = signed_max(x) / -32.0;
    }
    // The largest of the scales becomes -128.
    let d = signed_max(&scales) / -128.0;
    let stored = f16::from_f32(d);
    block.fill(0);
    if stored == f16::ZERO || stored.is_infinite() {
        // All values below what f16 resolves: a block of zeros. (Infinite: the caller's error.)
        return d;
    }
    let mut codes = [32u8; QK_K];
    for part in 0..16 {
        let scale = (scales[part] / d).round_ties_even().min(127.0);
        block[192 + part] = scale as i8 as u8;
        let step = stored.to_f32() * scale;
        if step != 0.0 {
            for i in 16 * part..16 * part + 16 {
                codes[i] = ((x[i] / step).round_ties_even().clamp(-32.0, 31.0) + 32.0) as u8;
            }
        }
    }
    set_q6_k_codes(&codes, block);
    [block[208], block[209]] = stored.to_le_bytes();
    d
}

/// Rows of one format as rows of another: decoded, as [`DenseFormat::decode_row`] does, and encoded again, on
/// all of rayon's threads. What the other format can't hold is lost.
///
/// # Arguments
/// * `w`: `n` rows of `from.row_bytes(k)` bytes
/// * `out`: `n` rows of `to.row_bytes(k)` bytes
///
/// # Errors
/// Those of [`DenseFormat::decode_row`] and [`encode_row`](DenseFormat::encode_row), where an error names a
/// row, the row of the matrix; `out` is unspecified then.
pub fn requantise(
    from: DenseFormat,
    w: &[u8],
    to: DenseFormat,
    out: &mut [u8],
    (n, k): (usize, usize),
) -> Result<(), FormatError> {
    let (from_bytes, to_bytes) = (from.checked_row_bytes(k)?, to.checked_row_bytes(k)?);
    super::check_length(from.name(), n, k, "bytes", n.saturating_mul(from_bytes), w.len())?;
    super::check_length(to.name(), n, k, "bytes", n.saturating_mul(to_bytes), out.len())?;
    if k == 0 {
        return Ok(());
    }
    const ROWS: usize = 64;
    out.par_chunks_mut(ROWS * to_bytes).enumerate().try_for_each(|(part, out)| {
        let mut values = vec![0.0; k];
        let rows = (part * ROWS..).zip(w[part * ROWS * from_bytes..].chunks_exact(from_bytes));
        for ((n, w), out) in rows.zip(out.chunks_exact_mut(to_bytes)) {
            let done = from.decode_row(w, &mut values).and_then(|()| to.encode_row(&values, out));
            done.map_err(|error| error.in_row(n))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_bits, floats};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requantising_is_decoding_and_encoding() {
        let (n, k) = (150, 512);
        let mut random = crate::random::SplitMix64::new(1);
        let values: Vec<f32> = (0..n * k).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
        for from in DenseFormat::ALL {
            let w: Vec<u8> = values.chunks(k).flat_map(|row| encode(from, row)).collect();
            for to in DenseFormat::ALL {
                let mut out = vec![0xee; n * to.row_bytes(k).unwrap()];
                requantise(from, &w, to, &mut out, (n, k)).unwrap();
                let rows = w.chunks(from.row_bytes(k).unwrap());
                let expected: Vec<u8> = rows.flat_map(|row| encode(to, &decode(from, row))).collect();
                assert!(out == expected, "{} to {}", from.name(), to.name());
            }
        }
    }

    #[test]
    fn requantising_names_the_row_that_it_can_not_do() {
        let mut w: Vec<u8> = (0..100 * 32).flat_map(|_| 1f32.to_le_bytes()).collect();
        w[(70 * 32 + 5) * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let mut out = vec![0; 100 * 34];
        let q8_0 =
            |w: &[u8], out: &mut [u8], k| requantise(DenseFormat::F32, w, DenseFormat::Q8_0, out, (100, k));
        let error = q8_0(&w, &mut out, 32).unwrap_err();
        assert!(matches!(error, FormatError::NotFinite { row: 70, column: 5, .. }), "{error}");
        assert!(q8_0(&w, &mut out, 31).is_err());
        assert!(q8_0(&w[4..], &mut out, 32).is_err());
        assert!(q8_0(&w, &mut out[1..], 32).is_err());
    }

    const INPUT: &[u8] = include_bytes!("../testdata/dense/input.f32.bin");

    fn decode(format: DenseFormat, row: &[u8]) -> Vec<f32> {
        let mut out = vec![f32::NAN; row.len() / format.block_bytes() * format.block_len()];
        format.decode_row(row, &mut out).unwrap();
        out
    }

    fn encode(format: DenseFormat, x: &[f32]) -> Vec<u8> {
        let mut row = vec![0xee; format.row_bytes(x.len()).unwrap()];
        format.encode_row(x, &mut row).unwrap();
        row
    }

    macro_rules! golden {
        ($name:literal) => {
            (
                &include_bytes!(concat!("../testdata/dense/", $name, ".bin"))[..],
                floats(include_bytes!(concat!("../testdata/dense/", $name, ".f32.bin"))),
            )
        };
    }

    #[test]
    fn gguf_py_goldens() {
        for (format, (bytes, values)) in [
            (DenseFormat::F16, golden!("f16")),
            (DenseFormat::BF16, golden!("bf16")),
            (DenseFormat::Q8_0, golden!("q8_0")),
            (DenseFormat::Q4_0, golden!("q4_0")),
            (DenseFormat::Q6_K, golden!("q6_k")),
        ] {
            assert_bits(&decode(format, bytes), &values);
            if format != DenseFormat::Q6_K {
                assert_eq!(encode(format, &floats(INPUT)), bytes, "{}", format.name());
            }
        }
        assert_bits(&decode(DenseFormat::F32, INPUT), &floats(INPUT));
        assert_eq!(encode(DenseFormat::F32, &floats(INPUT)), INPUT);
    }

    #[test]
    fn row_bytes_refuses_parts_of_blocks_and_overflow() {
        assert_eq!(DenseFormat::Q6_K.row_bytes(2560), Some(2100));
        assert_eq!(DenseFormat::Q6_K.row_bytes(2560 + 32), None);
        assert_eq!(DenseFormat::Q8_0.row_bytes(31), None);
        assert_eq!(DenseFormat::F32.row_bytes(usize::MAX / 2), None);
        assert_eq!(DenseFormat::F16.row_bytes(7), Some(14));
        for format in DenseFormat::ALL {
            let mut out = vec![0.0; format.block_len()];
            let row = vec![0; format.block_bytes() + 1];
            assert!(matches!(format.decode_row(&row, &mut out), Err(FormatError::Length { .. })));
            let mut row = vec![0; format.block_bytes() - 1];
            assert!(matches!(format.encode_row(&out, &mut row), Err(FormatError::Length { .. })));
            if format.block_len() > 1 {
                assert!(matches!(
                    format.decode_row(&row, &mut [0.0; 5]),
                    Err(FormatError::NotAMultiple { value: 5, .. })
                ));
            }
        }
    }

    #[test]
    fn what_a_block_cannot_hold_is_refused() {
        for format in [DenseFormat::Q8_0, DenseFormat::Q4_0, DenseFormat::Q6_K] {
            let mut x = vec![1.0; 512];
            let mut row = vec![0; format.row_bytes(512).unwrap()];
            x[300] = f32::NEG_INFINITY;
            assert_eq!(
                format.encode_row(&x, &mut row),
                Err(FormatError::NotFinite { row: 0, column: 300, value: f32::NEG_INFINITY })
            );
            x[300] = 1e30;
            let block = 300 / format.block_len();
            assert!(matches!(
                format.encode_row(&x, &mut row),
                Err(FormatError::ScaleOverflow { block: b, .. }) if b == block
            ));
            // Less than f16 resolves is zero.
            assert_eq!(decode(format, &encode(format, &[1e-12; 256])), [0.0; 256]);
        }
    }

    /// Root mean square of normal values' error, against the published figures of the formats.
    #[test]
    fn errors_are_as_small_as_the_formats_allow() {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        let x: Vec<f32> = (0..4096).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
        for (format, limit) in
            [(DenseFormat::Q8_0, 0.006), (DenseFormat::Q6_K, 0.025), (DenseFormat::Q4_0, 0.1)]
        {
            let back = decode(format, &encode(format, &x));
            let squares: f32 = x.iter().zip(&back).map(|(a, b)| (a - b) * (a - b)).sum();
            let rms = (squares / x.len() as f32).sqrt();
            assert!(rms < limit && rms > limit / 4.0, "{}: {rms}", format.name());
        }
    }

    proptest! {
        #[test]
        fn encoded_blocks_are_close_to_their_values(
            x in proptest::collection::vec(-1.0f32..1.0, 256), exponent in -10i32..10,
        ) {
            let x: Vec<f32> = x.iter().map(|v| v * 2f32.powi(exponent)).collect();
            for (format, steps) in
                [(DenseFormat::Q8_0, 200.0), (DenseFormat::Q6_K, 16.0), (DenseFormat::Q4_0, 6.0)]
            {
                let back = decode(format, &encode(format, &x));
                for (x, back) in x.chunks(format.block_len()).zip(back.chunks(format.block_len())) {
                    let max = signed_max(x).abs();
                    for (v, b) in x.iter().zip(back) {
                        // A fraction of the largest, and what d loses where it is a subnormal f16.
                        prop_assert!((v - b).abs() <= max / steps + 4096.0 * 2f32.powi(-25));
                    }
                }
            }
        }

        /// Decoded once, the floats survive any number of further trips.
        #[test]
        fn floats_round_trip(bits in proptest::collection::vec(any::<u16>(), 1..70)) {
            for format in [DenseFormat::F16, DenseFormat::BF16] {
                let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
                let values = decode(format, &bytes);
                let back = decode(format, &encode(format, &values));
                for (a, b) in values.iter().zip(&back) {
                    prop_assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
                }
            }
        }

        #[test]
        fn any_bytes_decode(bytes in proptest::collection::vec(any::<u8>(), 0..500), k in 0usize..600) {
            for format in DenseFormat::ALL {
                let mut out = vec![0.0; k];
                let fits = format.row_bytes(k) == Some(bytes.len());
                prop_assert_eq!(format.decode_row(&bytes, &mut out).is_ok(), fits);
                let whole = bytes.len() / format.block_bytes() * format.block_bytes();
                decode(format, &bytes[..whole]);
            }
        }
    }
}
