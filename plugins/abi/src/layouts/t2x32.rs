//! The public layout `cpu/t2x32` ("T2"): 2 bits a weight, in tiles of 16 rows, two tiles to a block.
//!
//! A 64-byte vector j of a tile holds the weights k = 16j .. 16j+15 of its 16 rows, row r in the 32-bit
//! lane r. Byte i of a lane is
//!
//! ```text
//! c[r][16j + i] | c[r][16j + 4 + i] << 2 | c[r][16j + 8 + i] << 4 | c[r][16j + 12 + i] << 6
//! ```
//!
//! with the codes 0, 1, 2 = -1, 0, +1, so that four consecutive activations, broadcast to all lanes,
//! meet their weights in one byte dot-product, and the sums of 16 rows grow side by side in one register.
//! The vectors of a block's two tiles alternate, vector j of tile t of block b is at
//!
//! ```text
//! ((b * ceil(K/16) + j) * 2 + t) * 64
//! ```
//!
//! which makes a run over any range of blocks one sequential stream. Rows behind N and weights behind K
//! are packed as code 1, a weight of zero.

use std::ffi::CStr;
use std::ops::Range;

use super::{check_canonical, check_packed, check_range};
use crate::canonical;
use crate::sdk::{KernelError, KernelResult, WeightsRef};

pub use super::BLOCK_ROWS;

/// The layout's name within the plugin `cpu`.
pub const LAYOUT: &CStr = c"t2x32";
/// Weights of a row in a step, one 32-bit lane.
pub const STEP: usize = 16;
/// Bytes of a block's step: one 64-byte vector for each of the two tiles.
pub const STEP_BYTES: usize = 128;

/// Steps of a block of rows of `k` weights.
#[inline]
pub const fn steps(k: usize) -> usize {
    k.div_ceil(STEP)
}

/// Bytes of a block of rows of `k` weights.
#[inline]
pub const fn block_bytes(k: usize) -> usize {
    steps(k) * STEP_BYTES
}

/// A lane of four zero weights a byte.
const ZERO_LANE: u32 = u32::from_ne_bytes([canonical::ZERO_BYTE; 4]);
/// The lowest bit pair of each byte of a lane.
const LOW: u32 = 0x0303_0303;
/// Steps that one canonical block fills.
const STEPS_PER_CANONICAL: usize = canonical::BLOCK / STEP;

/// Turns the 16 bytes that half a canonical block has into the lanes of four steps.
///
/// Word t of the half holds, at bit pair 6 - 2g of its bytes, the weights 32g + 16h + 4t + i of the
/// canonical block (half h, byte i); that is byte i of the lane of step 2g + h at bit pair 2t. So the
/// conversion transposes a 4 x 4 matrix of bit pairs in each byte.
#[inline(always)]
fn half_to_lanes(words: [u32; 4]) -> [u32; 4] {
    let mut lanes = [0; 4];
    for (g, lane) in lanes.iter_mut().enumerate() {
        let shift = 6 - 2 * g;
        *lane = (words[0] >> shift & LOW)
            | (words[1] >> shift & LOW) << 2
            | (words[2] >> shift & LOW) << 4
            | (words[3] >> shift & LOW) << 6;
    }
    lanes
}

/// The inverse of [`half_to_lanes`].
#[inline(always)]
fn lanes_to_half(lanes: [u32; 4]) -> [u32; 4] {
    let mut words = [0; 4];
    for (t, word) in words.iter_mut().enumerate() {
        let shift = 2 * t;
        *word = (lanes[0] >> shift & LOW) << 6
            | (lanes[1] >> shift & LOW) << 4
            | (lanes[2] >> shift & LOW) << 2
            | (lanes[3] >> shift & LOW);
    }
    words
}

/// Where the lane of row `r` of a block lies in the block's step.
#[inline(always)]
const fn lane_offset(r: usize) -> usize {
    // Tile r / 16 has its own 64 bytes, and a lane has four.
    4 * r
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Packs `rows` of canonical weights (beginning at a block, ending at a block's end or at row N) into
/// `out`, which has [`block_bytes`] for each block that the range touches.
///
/// # Errors
/// If the range or a buffer's length does not fit.
pub fn pack(w: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
    let row_bytes = canonical::row_bytes(w.k());
    check_range(w, &rows)?;
    check_canonical(w)?;
    let bytes = block_bytes(w.k());
    if out.len() != rows.len().div_ceil(BLOCK_ROWS) * bytes {
        return Err(KernelError::invalid(format!("a packing of {} bytes has the wrong size", out.len())));
    }
    for (block, out) in out.chunks_exact_mut(bytes).enumerate() {
        let first = rows.start + block * BLOCK_ROWS;
        let count = BLOCK_ROWS.min(rows.end - first);
        let source = &w.data()[first * row_bytes..][..count * row_bytes];
        // 1 KiB of output per canonical block: it stays in the first cache while the rows fill it.
        for (b, out) in out.chunks_mut(STEPS_PER_CANONICAL * STEP_BYTES).enumerate() {
            if let Ok(out) = <&mut [u8; STEPS_PER_CANONICAL * STEP_BYTES]>::try_from(&mut *out) {
                pack_canonical_block(source, row_bytes, b, count, out);
            } else {
                let mut whole = [0; STEPS_PER_CANONICAL * STEP_BYTES];
                pack_canonical_block(source, row_bytes, b, count, &mut whole);
                out.copy_from_slice(&whole[..out.len()]);
            }
        }
    }
    Ok(())
}

/// Packs canonical block `b` of `count` rows into eight steps.
#[inline(always)]
fn pack_canonical_block(
    source: &[u8],
    row_bytes: usize,
    b: usize,
    count: usize,
    out: &mut [u8; STEPS_PER_CANONICAL * STEP_BYTES],
) {
    for r in 0..BLOCK_ROWS {
        let at = lane_offset(r);
        for half in 0..2 {
            let lanes = if r < count {
                let bytes = &source[r * row_bytes + b * canonical::BLOCK_BYTES + 16 * half..][..16];
                half_to_lanes([word(&bytes[0..]), word(&bytes[4..]), word(&bytes[8..]), word(&bytes[12..])])
            } else {
                [ZERO_LANE; 4]
            };
            for (g, lane) in lanes.into_iter().enumerate() {
                out[(2 * g + half) * STEP_BYTES + at..][..4].copy_from_slice(&lane.to_le_bytes());
            }
        }
    }
}

/// The inverse of [`pack`]: writes the canonical `rows` to `out`.
///
/// # Errors
/// If the range or a buffer's length does not fit.
pub fn unpack(w: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
    let row_bytes = canonical::row_bytes(w.k());
    check_range(w, &rows)?;
    check_packed(w, block_bytes(w.k()))?;
    if out.len() != rows.len() * row_bytes {
        return Err(KernelError::invalid(format!(
            "{} bytes for canonical rows are the wrong size",
            out.len()
        )));
    }
    let bytes = block_bytes(w.k());
    let steps = steps(w.k());
    for (block, out) in out.chunks_mut(BLOCK_ROWS * row_bytes).enumerate() {
        let source = &w.data()[(rows.start / BLOCK_ROWS + block) * bytes..][..bytes];
        for b in 0..row_bytes / canonical::BLOCK_BYTES {
            for (r, row) in out.chunks_exact_mut(row_bytes).enumerate() {
                let at = lane_offset(r);
                for half in 0..2 {
                    let mut lanes = [ZERO_LANE; 4];
                    for (g, lane) in lanes.iter_mut().enumerate() {
                        let step = b * STEPS_PER_CANONICAL + 2 * g + half;
                        if step < steps {
                            *lane = word(&source[step * STEP_BYTES + at..][..4]);
                        }
                    }
                    let place = &mut row[b * canonical::BLOCK_BYTES + 16 * half..][..16];
                    for (bytes, word) in place.chunks_exact_mut(4).zip(lanes_to_half(lanes)) {
                        bytes.copy_from_slice(&word.to_le_bytes());
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Some weights [n, k].
    pub(crate) fn canonical_rows(n: usize, k: usize) -> Vec<u8> {
        let mut rows = vec![0; n * canonical::row_bytes(k)];
        for (n, row) in rows.chunks_exact_mut(canonical::row_bytes(k)).enumerate() {
            let weights: Vec<i8> = (0..k).map(|i| ((n * 31 + i * 7 + i / 5) % 3) as i8 - 1).collect();
            canonical::pack_row(&weights, row);
        }
        rows
    }

    /// The layout, transcribed from the module's formulas.
    fn code(packed: &[u8], k_total: usize, row: usize, k: usize) -> u8 {
        let (block, r) = (row / 32, row % 32);
        let (j, in_step) = (k / 16, k % 16);
        let vector = ((block * k_total.div_ceil(16) + j) * 2 + r / 16) * 64;
        (packed[vector + 4 * (r % 16) + in_step % 4] >> (2 * (in_step / 4))) & 3
    }

    #[test]
    fn packing_is_the_documented_layout_and_unpacks_to_what_it_was() {
        for (n, k) in
            [(1, 1), (31, 15), (32, 16), (33, 17), (64, 127), (65, 128), (40, 129), (70, 1000), (96, 2560)]
        {
            let canonical_bytes = canonical_rows(n, k);
            let w = WeightsRef::new(n, k, 1.0, &canonical_bytes);
            let mut packed = vec![0xff; n.div_ceil(32) * block_bytes(k)];
            pack(&w, 0..n, &mut packed).unwrap();
            for row in 0..n.next_multiple_of(32) {
                for i in 0..k.next_multiple_of(16) {
                    let expected = if row < n && i < k { w.canonical_row(row).code(i) } else { 1 };
                    assert_eq!(code(&packed, k, row, i), expected, "n {n} k {k} row {row} weight {i}");
                }
            }
            let mut back = vec![0xff; canonical_bytes.len()];
            unpack(&WeightsRef::new(n, k, 1.0, &packed), 0..n, &mut back).unwrap();
            assert_eq!(back, canonical_bytes, "n {n} k {k}");
        }
    }

    #[test]
    fn wrong_ranges_and_sizes_are_refused() {
        let bytes = vec![canonical::ZERO_BYTE; canonical::row_bytes(20) * 40];
        let w = WeightsRef::new(40, 20, 1.0, &bytes);
        let mut out = vec![0; 2 * block_bytes(20)];
        assert!(pack(&w, 1..40, &mut out).is_err());
        assert!(pack(&w, 0..39, &mut out).is_err());
        assert!(pack(&w, 0..72, &mut out).is_err());
        assert!(pack(&w, 0..40, &mut out[1..]).is_err());
        assert!(pack(&WeightsRef::new(41, 20, 1.0, &bytes), 0..41, &mut out).is_err());
        assert!(pack(&w, 0..40, &mut out).is_ok());
    }
}
