//! The public layout `cpu/t5x32` ("T5"): 1.6 bits a weight, in tiles as [`t2x32`](super::t2x32) has them.
//!
//! A 64-byte vector j of a tile holds the weights k = 20j .. 20j+19 of its 16 rows, row r in the 32-bit lane
//! r. Byte i of a lane has five of them, the codes c0 .. c4 (0, 1, 2 = -1, 0, +1) at k = 20j + 4t + i for
//! t = 0 .. 4. With idx = c0 + 3 c1 + 9 c2 + 27 c3, 0 to 80, it is
//!
//! ```text
//! idx + 64 c4      where idx < 64
//! 3 idx + c4       where idx >= 64: 192 to 242
//! ```
//!
//! so that the low 6 bits, which are all that a byte permutation of 64 entries looks at, find c0 .. c3 in
//! one table or, where both high bits are set, in another, and c4 in the high bits or in a third. Weights
//! behind K are packed as code 0: the sum of code * activation leaves them out, whatever lies there.

use std::ffi::CStr;
use std::ops::Range;

use super::t2x32::STEP_BYTES;
use super::{BLOCK_ROWS, check_canonical, check_packed, check_range};
use crate::canonical;
use crate::sdk::{KernelError, KernelResult, WeightsRef};

/// The layout's name within the plugin `cpu`.
pub const LAYOUT: &CStr = c"t5x32";
/// Weights of a row in a step, one 32-bit lane.
pub const STEP: usize = 20;

/// Bytes of a block of 32 rows of `k` weights.
#[inline]
pub const fn block_bytes(k: usize) -> usize {
    k.div_ceil(STEP) * STEP_BYTES
}

/// The codes c0 .. c4 of a byte; of bytes that the packing never has, anything.
pub const fn codes(byte: u8) -> [u8; 5] {
    let (idx, c4) = match byte {
        0..192 => (byte % 64, byte / 64),
        _ => (64 + (byte - 192) / 3, (byte - 192) % 3),
    };
    [idx % 3, idx / 3 % 3, idx / 9 % 3, idx / 27 % 3, c4]
}

/// Four bytes from five times four codes, all four at once: no byte of any term exceeds 242.
#[inline(always)]
const fn encode(c: [u32; 5]) -> u32 {
    let idx = c[0] + 3 * (c[1] + 3 * (c[2] + 3 * c[3]));
    // 0xff in each byte whose idx is 64 or more.
    let high = (idx >> 6 & 0x0101_0101) * 0xff;
    (high & (3 * idx + c[4])) | (!high & (idx + (c[4] << 6)))
}

/// Packs `rows` of canonical weights (beginning at a block, ending at a block's end or at row N) into
/// `out`, which has [`block_bytes`] for each block that the range touches.
///
/// # Errors
/// If the range or a buffer's length does not fit.
pub fn pack(w: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
    check_range(w, &rows)?;
    check_canonical(w)?;
    let (row_bytes, bytes) = (canonical::row_bytes(w.k()), block_bytes(w.k()));
    if out.len() != rows.len().div_ceil(BLOCK_ROWS) * bytes {
        return Err(KernelError::invalid(format!("a packing of {} bytes has the wrong size", out.len())));
    }
    let steps = w.k().div_ceil(STEP);
    let mut codes = vec![0u8; (row_bytes / canonical::BLOCK_BYTES * canonical::BLOCK).max(steps * STEP)];
    for (block, out) in out.chunks_exact_mut(bytes).enumerate() {
        for r in 0..BLOCK_ROWS {
            let row = rows.start + block * BLOCK_ROWS + r;
            if row < rows.end {
                let source = &w.data()[row * row_bytes..][..row_bytes];
                unpack_codes(source, &mut codes);
                codes[w.k()..].fill(0);
            } else {
                codes.fill(0);
            }
            for (codes, step) in codes.chunks_exact(STEP).zip(out.chunks_exact_mut(STEP_BYTES)) {
                let word =
                    |t: usize| u32::from_le_bytes(codes[4 * t..4 * t + 4].try_into().expect("4 bytes"));
                let lane = encode([word(0), word(1), word(2), word(3), word(4)]);
                step[4 * r..4 * r + 4].copy_from_slice(&lane.to_le_bytes());
            }
        }
    }
    Ok(())
}

/// The codes of a canonical row, a byte each.
fn unpack_codes(row: &[u8], codes: &mut [u8]) {
    let (blocks, _) = row.as_chunks::<{ canonical::BLOCK_BYTES }>();
    let (codes, _) = codes.as_chunks_mut::<{ canonical::BLOCK }>();
    for (block, codes) in blocks.iter().zip(codes) {
        for g in 0..4 {
            for (code, byte) in codes[32 * g..32 * g + 32].iter_mut().zip(block) {
                *code = byte >> (6 - 2 * g) & 3;
            }
        }
    }
}

/// The inverse of [`pack`]: writes the canonical `rows` to `out`.
///
/// # Errors
/// If the range or a buffer's length does not fit.
pub fn unpack(w: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
    check_range(w, &rows)?;
    check_packed(w, block_bytes(w.k()))?;
    let (row_bytes, bytes) = (canonical::row_bytes(w.k()), block_bytes(w.k()));
    if out.len() != rows.len() * row_bytes {
        return Err(KernelError::invalid(format!(
            "{} bytes for canonical rows are the wrong size",
            out.len()
        )));
    }
    let mut weights = vec![0i8; w.k().next_multiple_of(STEP)];
    for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
        let (block, r) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
        let steps = w.data()[block * bytes..][..bytes].chunks_exact(STEP_BYTES);
        for (step, weights) in steps.zip(weights.chunks_exact_mut(STEP)) {
            for (i, &byte) in step[4 * r..4 * r + 4].iter().enumerate() {
                for (t, code) in codes(byte).into_iter().enumerate() {
                    weights[4 * t + i] = code as i8 - 1;
                }
            }
        }
        canonical::pack_row(&weights[..w.k()], out);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_the_packing_has_five_codes() {
        let mut seen = std::collections::HashSet::new();
        for number in 0..243u32 {
            let digits: [u8; 5] = std::array::from_fn(|t| (number / 3u32.pow(t as u32) % 3) as u8);
            let lane = encode(digits.map(|digit| u32::from(digit) * 0x0101_0101));
            let [byte, rest @ ..] = lane.to_le_bytes();
            assert_eq!(rest, [byte; 3]);
            assert!(seen.insert(byte));
            assert_eq!(codes(byte), digits, "byte {byte}");
        }
        // Neighbours don't disturb each other.
        assert_eq!(
            encode([0x0200_0001, 0x0200_0000, 0x0200_0000, 0x0200_0000, 0x0202_0002]).to_le_bytes(),
            [
                codes_byte([1, 0, 0, 0, 2]),
                codes_byte([0, 0, 0, 0, 0]),
                codes_byte([0, 0, 0, 0, 2]),
                codes_byte([2, 2, 2, 2, 2]),
            ]
        );
    }

    fn codes_byte(wanted: [u8; 5]) -> u8 {
        (0..243).find(|&byte| codes(byte) == wanted).unwrap()
    }

    #[test]
    fn packing_is_the_documented_layout_and_unpacks_to_what_it_was() {
        for (n, k) in
            [(1, 1), (31, 19), (32, 20), (33, 21), (64, 127), (65, 128), (40, 129), (70, 1000), (96, 2560)]
        {
            let canonical_bytes = crate::layouts::t2x32::tests::canonical_rows(n, k);
            let w = WeightsRef::new(n, k, 1.0, &canonical_bytes);
            let mut packed = vec![0xff; n.div_ceil(32) * block_bytes(k)];
            pack(&w, 0..n, &mut packed).unwrap();
            for row in 0..n.next_multiple_of(32) {
                for i in 0..k.next_multiple_of(20) {
                    let (block, r, j, in_step) = (row / 32, row % 32, i / 20, i % 20);
                    let at = ((block * k.div_ceil(20) + j) * 2 + r / 16) * 64 + 4 * (r % 16) + in_step % 4;
                    let expected = if row < n && i < k { w.canonical_row(row).code(i) } else { 0 };
                    assert_eq!(codes(packed[at])[in_step / 4], expected, "n {n} k {k} row {row} weight {i}");
                }
            }
            let mut back = vec![0xff; canonical_bytes.len()];
            unpack(&WeightsRef::new(n, k, 1.0, &packed), 0..n, &mut back).unwrap();
            assert_eq!(back, canonical_bytes, "n {n} k {k}");
        }
    }
}
