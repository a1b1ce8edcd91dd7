//! The canonical weight layout: rows of I2_S, the format of BitNet's GGUF files (type 36).
//!
//! 128 weights take 32 bytes: byte i holds the weights i, 32+i, 64+i and 96+i of the block in the bit
//! pairs 7..6, 5..4, 3..2 and 1..0. The codes 0, 1, 2 stand for -1, 0, +1; code 3 is invalid. It is the
//! same on every architecture.
//!
//! In memory every row is padded to whole blocks with code 1 (a weight of zero; a zero byte would
//! mean -1), so any K works. For K % 128 == 0 this is exactly how a GGUF file lays out the tensor's
//! data, so files are used in place.

/// Weights in a block.
pub const BLOCK: usize = 128;
/// Bytes in a block.
pub const BLOCK_BYTES: usize = 32;
/// A byte of four zero weights (code 1 four times): the padding.
pub const ZERO_BYTE: u8 = 0b01_01_01_01;

/// Bytes of one row of `k` weights.
pub const fn row_bytes(k: usize) -> usize {
    k.div_ceil(BLOCK) * BLOCK_BYTES
}

/// Bytes of an [n, k] matrix, or `None` where that overflows.
pub const fn matrix_bytes(n: usize, k: usize) -> Option<usize> {
    n.checked_mul(row_bytes(k))
}

/// Byte offset within the row, and bit shift within the byte, of weight `k`.
#[inline(always)]
pub const fn position(k: usize) -> (usize, u32) {
    let in_block = k % BLOCK;
    (k / BLOCK * BLOCK_BYTES + in_block % 32, 6 - 2 * (in_block / 32) as u32)
}

/// One canonical row.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a>(pub &'a [u8]);

impl Row<'_> {
    /// The 2-bit code of weight `k`: 0, 1 or 2 in valid data.
    #[inline(always)]
    pub fn code(&self, k: usize) -> u8 {
        let (byte, shift) = position(k);
        (self.0[byte] >> shift) & 3
    }

    /// Weight `k`: -1, 0 or 1.
    #[inline(always)]
    pub fn weight(&self, k: usize) -> i8 {
        self.code(k) as i8 - 1
    }
}

/// Packs a row of weights (each -1, 0 or 1) into `row`, which is [`row_bytes`] long; pads with zeros.
///
/// # Panics
/// If `row` is not exactly [`row_bytes`]`(weights.len())` long.
pub fn pack_row(weights: &[i8], row: &mut [u8]) {
    assert_eq!(row.len(), row_bytes(weights.len()), "canonical row of the wrong length");
    let mut blocks = weights.chunks_exact(BLOCK);
    let mut out = row.chunks_exact_mut(BLOCK_BYTES);
    for (block, bytes) in (&mut blocks).zip(&mut out) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            let code = |g: usize| (block[32 * g + i] + 1) as u8;
            *byte = code(0) << 6 | code(1) << 4 | code(2) << 2 | code(3);
        }
    }
    let rest = blocks.remainder();
    if !rest.is_empty() {
        let bytes = out.next().expect("row_bytes leaves a block for the rest");
        bytes.fill(ZERO_BYTE);
        for (k, &w) in rest.iter().enumerate() {
            let (byte, shift) = position(k);
            bytes[byte] = bytes[byte] & !(3 << shift) | ((w + 1) as u8) << shift;
        }
    }
}

/// Unpacks the first `weights.len()` weights of a row.
///
/// # Panics
/// If `row` is shorter than [`row_bytes`]`(weights.len())`.
pub fn unpack_row(row: &[u8], weights: &mut [i8]) {
    assert!(row.len() >= row_bytes(weights.len()), "canonical row too short");
    let k = weights.len();
    for (b, bytes) in row.chunks_exact(BLOCK_BYTES).enumerate().take(k.div_ceil(BLOCK)) {
        let base = b * BLOCK;
        for g in 0..4 {
            let start = base + 32 * g;
            for i in 0..32.min(k.saturating_sub(start)) {
                weights[start + i] = ((bytes[i] >> (6 - 2 * g)) & 3) as i8 - 1;
            }
        }
    }
}

/// Position of the first byte that holds an invalid code (3), if any.
pub fn find_invalid(data: &[u8]) -> Option<usize> {
    data.iter().position(|&b| b & (b >> 1) & ZERO_BYTE != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_of_one_block_is_the_one_in_the_files() {
        let mut weights = [0i8; 128];
        weights[0] = -1; // byte 0, bits 7..6 = 0
        weights[33] = 1; // byte 1, bits 5..4 = 2
        weights[127] = 1; // byte 31, bits 1..0 = 2
        let mut row = [0u8; 32];
        pack_row(&weights, &mut row);
        assert_eq!(row[0], 0b00_01_01_01);
        assert_eq!(row[1], 0b01_10_01_01);
        assert_eq!(row[31], 0b01_01_01_10);
        assert!(row[2..31].iter().all(|&b| b == ZERO_BYTE));
    }

    #[test]
    fn every_length_survives_a_round_trip_and_pads_with_zero_weights() {
        for k in 1..400 {
            let weights: Vec<i8> = (0..k).map(|i| (i * 7 % 3) as i8 - 1).collect();
            let mut row = vec![0xffu8; row_bytes(k)];
            pack_row(&weights, &mut row);
            assert_eq!(find_invalid(&row), None);
            let mut back = vec![9i8; k];
            unpack_row(&row, &mut back);
            assert_eq!(back, weights);
            for i in 0..row.len() * 4 {
                assert_eq!(Row(&row).weight(i), weights.get(i).copied().unwrap_or(0), "k {k} i {i}");
            }
        }
    }

    #[test]
    fn invalid_codes_are_found() {
        assert_eq!(find_invalid(&[0b10_01_00_10, 0b01_11_00_00]), Some(1));
    }
}
