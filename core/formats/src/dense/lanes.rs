//! Blocks in tiles: four consecutive weights of row r in lane r of 64-byte vectors.

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;

/// Up to 16 rows as a tile: `put(block of a row, row, block of the tile)` for each.
#[inline(always)]
pub(super) fn tile_blocks<const BYTES: usize>(
    rows: &[u8],
    row_bytes: usize,
    tile: &mut [u8],
    put: impl Fn(&[u8; BYTES], usize, &mut [u8]),
) {
    if rows.len() < TILE_ROWS * row_bytes {
        tile.fill(0);
    }
    for (b, out) in tile.chunks_exact_mut(TILE_ROWS * BYTES).enumerate() {
        for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
            put(&row.as_chunks().0[b], r, out);
        }
    }
}

#[inline(always)]
pub(super) fn untile_blocks<const BYTES: usize>(
    tile: &[u8],
    row_bytes: usize,
    rows: &mut [u8],
    get: impl Fn(&[u8], usize, &mut [u8; BYTES]),
) {
    for (b, from) in tile.chunks_exact(TILE_ROWS * BYTES).enumerate() {
        for (r, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
            get(from, r, &mut row.as_chunks_mut().0[b]);
        }
    }
}

/// Lane `r` of the vector at `at`.
#[inline(always)]
pub(super) fn lane(block: &[u8], at: usize, r: usize) -> u32 {
    u32::from_le_bytes(*block[at + 4 * r..].first_chunk().expect("within the block"))
}

#[inline(always)]
pub(super) fn set_lane(block: &mut [u8], at: usize, r: usize, lane: u32) {
    block[at + 4 * r..][..4].copy_from_slice(&lane.to_le_bytes());
}

/// Four codes.
#[inline(always)]
pub(super) fn word(codes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes(*codes[i..].first_chunk().expect("within the block"))
}

pub(super) const NIBBLES: u32 = 0x0f0f_0f0f;
pub(super) const PAIRS: u32 = 0x0303_0303;
