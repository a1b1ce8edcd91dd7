//! Q8_0, Q6_K and Q4_0 matrices in tiles of 16 rows, as kernels with int8 activations read them.
//!
//! A tile holds the codes and scales of the rows' blocks, all of them and nothing else, four consecutive
//! weights of row r in lane r of 64-byte vectors. Which vectors hold what is the kernels' matter:
//! `bitnet_burn_cpu::dense` has the table. A last tile of fewer rows is filled up with zero bytes, whose scales
//! are 0.

use super::dense::{
    DenseFormat, Q4_0_BYTES, Q6_K_BYTES, Q8_0_BYTES, QK, QK_K, q4_0_codes, q6_k_codes, set_q6_k_codes,
};
use super::{FormatError, check_length};
use rayon::prelude::*;

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;

/// Bytes of a matrix [n, k] in tiles; `None` where the format holds floats, k is no whole number of blocks, or
/// that is too large.
pub const fn tiled_bytes(format: DenseFormat, n: usize, k: usize) -> Option<usize> {
    let tiles = n.div_ceil(TILE_ROWS);
    match (format, format.row_bytes(k)) {
        (DenseFormat::Q8_0 | DenseFormat::Q6_K | DenseFormat::Q4_0, Some(row)) => {
            match row.checked_mul(TILE_ROWS) {
                Some(tile) => tile.checked_mul(tiles),
                None => None,
            }
        }
        _ => None,
    }
}

/// Puts rows into tiles, on all of rayon's threads; rows of another format are decoded and encoded first, as
/// [`requantise`](super::dense::requantise) does.
///
/// # Arguments
/// * `w`: `n` rows of `from.row_bytes(k)` bytes
/// * `out`: [`tiled_bytes`] of the format `to`
///
/// # Errors
/// If a length does not fit, there are no tiles of the format, or it can't hold the values (`out` is
/// unspecified then).
pub fn tile(
    (from, w): (DenseFormat, &[u8]),
    (n, k): (usize, usize),
    (to, out): (DenseFormat, &mut [u8]),
) -> Result<(), FormatError> {
    let from_row = from.checked_row_bytes(k)?;
    check_length(from.name(), n, k, "bytes", n.saturating_mul(from_row), w.len())?;
    let row = check(to, (n, k), out)?;
    if k == 0 {
        return Ok(());
    }
    each_part(out, TILE_ROWS * row, |first, tiles| {
        let (mut values, mut encoded) = (Vec::new(), Vec::new());
        for (i, tile) in tiles.chunks_exact_mut(TILE_ROWS * row).enumerate() {
            let first = (first + i) * TILE_ROWS;
            let mut rows = &w[first * from_row..(first + TILE_ROWS).min(n) * from_row];
            if from != to {
                values.resize(k, 0.0);
                encoded.resize(TILE_ROWS * row, 0);
                let mut count = 0;
                for (row, out) in rows.chunks_exact(from_row).zip(encoded.chunks_exact_mut(row)) {
                    let done = from.decode_row(row, &mut values).and_then(|()| to.encode_row(&values, out));
                    done.map_err(|error| error.in_row(first + count))?;
                    count += 1;
                }
                rows = &encoded[..count * row];
            }
            match to {
                DenseFormat::Q8_0 => tile_blocks(rows, row, tile, q8_0),
                DenseFormat::Q6_K => tile_blocks(rows, row, tile, q6_k),
                _ => tile_blocks(rows, row, tile, q4_0),
            }
        }
        Ok(())
    })
}

/// The inverse of [`tile`]: writes the rows to `out`.
///
/// # Errors
/// As [`tile`].
pub fn untile(
    format: DenseFormat,
    tiles: &[u8],
    (n, k): (usize, usize),
    out: &mut [u8],
) -> Result<(), FormatError> {
    let row = check(format, (n, k), tiles)?;
    check_length(format.name(), n, k, "bytes", n * row, out.len())?;
    if k == 0 {
        return Ok(());
    }
    each_part(out, TILE_ROWS * row, |first, out| {
        for (i, rows) in out.chunks_mut(TILE_ROWS * row).enumerate() {
            let tile = &tiles[(first + i) * TILE_ROWS * row..][..TILE_ROWS * row];
            match format {
                DenseFormat::Q8_0 => untile_blocks(tile, row, rows, q8_0_back),
                DenseFormat::Q6_K => untile_blocks(tile, row, rows, q6_k_back),
                _ => untile_blocks(tile, row, rows, q4_0_back),
            }
        }
        Ok(())
    })
}

/// Bytes of a row, if the format has tiles and their length fits.
fn check(format: DenseFormat, (n, k): (usize, usize), tiles: &[u8]) -> Result<usize, FormatError> {
    let row = format.checked_row_bytes(k)?;
    if format.block_len() == 1 {
        return Err(FormatError::NoTiles { format: format.name() });
    }
    let size = tiled_bytes(format, n, k).ok_or(FormatError::TooLarge { format: format.name(), n, k })?;
    check_length(format.name(), n, k, "bytes", size, tiles.len())?;
    Ok(row)
}

/// Calls `f(tile, bytes)` for parts of `out` that begin at a tile, on all of rayon's threads; one of the errors.
fn each_part(
    out: &mut [u8],
    tile_bytes: usize,
    f: impl Fn(usize, &mut [u8]) -> Result<(), FormatError> + Sync,
) -> Result<(), FormatError> {
    const TILES: usize = 8;
    out.par_chunks_mut(TILES * tile_bytes).enumerate().try_for_each(|(part, out)| f(part * TILES, out))
}

/// Up to 16 rows as a tile: `put(block of a row, row, block of the tile)` for each.
#[inline(always)]
fn tile_blocks<const BYTES: usize>(
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
fn untile_blocks<const BYTES: usize>(
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
fn lane(block: &[u8], at: usize, r: usize) -> u32 {
    u32::from_le_bytes(*block[at + 4 * r..].first_chunk().expect("within the block"))
}

#[inline(always)]
fn set_lane(block: &mut [u8], at: usize, r: usize, lane: u32) {
    block[at + 4 * r..][..4].copy_from_slice(&lane.to_le_bytes());
}

/// Four codes.
#[inline(always)]
fn word(codes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes(*codes[i..].first_chunk().expect("within the block"))
}

const NIBBLES: u32 = 0x0f0f_0f0f;
const PAIRS: u32 = 0x0303_0303;

fn q8_0(block: &[u8; Q8_0_BYTES], r: usize, out: &mut [u8]) {
    for j in 0..8 {
        set_lane(out, 64 * j, r, word(block, 2 + 4 * j));
    }
    out[512 + 2 * r..][..2].copy_from_slice(&block[..2]);
}

fn q8_0_back(from: &[u8], r: usize, block: &mut [u8; Q8_0_BYTES]) {
    for j in 0..8 {
        block[2 + 4 * j..][..4].copy_from_slice(&lane(from, 64 * j, r).to_le_bytes());
    }
    block[..2].copy_from_slice(&from[512 + 2 * r..][..2]);
}

fn q4_0(block: &[u8; Q4_0_BYTES], r: usize, out: &mut [u8]) {
    let codes = q4_0_codes(block);
    for j in 0..4 {
        set_lane(out, 64 * j, r, word(&codes, 8 * j) | word(&codes, 8 * j + 4) << 4);
    }
    out[256 + 2 * r..][..2].copy_from_slice(&block[..2]);
}

fn q4_0_back(from: &[u8], r: usize, block: &mut [u8; Q4_0_BYTES]) {
    let mut codes = [0u8; QK];
    for j in 0..4 {
        let lane = lane(from, 64 * j, r);
        codes[8 * j..][..4].copy_from_slice(&(lane & NIBBLES).to_le_bytes());
        codes[8 * j + 4..][..4].copy_from_slice(&(lane >> 4 & NIBBLES).to_le_bytes());
    }
    for i in 0..16 {
        block[2 + i] = codes[i] | codes[16 + i] << 4;
    }
    block[..2].copy_from_slice(&from[256 + 2 * r..][..2]);
}

/// Where the vectors of part `s` of a block of Q6_K begin, and row 0's scale of it.
const fn q6_k_part(s: usize) -> (usize, usize) {
    let group = s / 4 * 832;
    (group + 64 + 192 * (s % 4), group + 16 * (s % 4))
}

fn q6_k(block: &[u8; Q6_K_BYTES], r: usize, out: &mut [u8]) {
    let codes = q6_k_codes(block);
    for s in 0..16 {
        let (vectors, scales) = q6_k_part(s);
        let [a, b, c, d] = [0, 4, 8, 12].map(|i| word(&codes, 16 * s + i));
        set_lane(out, vectors, r, a & NIBBLES | (b & NIBBLES) << 4);
        set_lane(out, vectors + 64, r, c & NIBBLES | (d & NIBBLES) << 4);
        let [a, b, c, d] = [a, b, c, d].map(|codes| codes >> 4 & PAIRS);
        set_lane(out, vectors + 128, r, a | b << 2 | c << 4 | d << 6);
        out[scales + r] = block[192 + s];
    }
    out[3328 + 2 * r..][..2].copy_from_slice(&block[208..]);
}

fn q6_k_back(from: &[u8], r: usize, block: &mut [u8; Q6_K_BYTES]) {
    let mut codes = [0u8; QK_K];
    for s in 0..16 {
        let (vectors, scales) = q6_k_part(s);
        let low = [lane(from, vectors, r), lane(from, vectors + 64, r)];
        let high = lane(from, vectors + 128, r);
        for t in 0..4 {
            let code = low[t / 2] >> (4 * (t % 2)) & NIBBLES | (high >> (2 * t) & PAIRS) << 4;
            codes[16 * s + 4 * t..][..4].copy_from_slice(&code.to_le_bytes());
        }
        block[192 + s] = from[scales + r];
    }
    block[208..].copy_from_slice(&from[3328 + 2 * r..][..2]);
    set_q6_k_codes(&codes, block);
}

#[cfg(test)]
mod tests {
    use super::super::dense::requantise;
    use super::*;

    const FORMATS: [DenseFormat; 3] = [DenseFormat::Q8_0, DenseFormat::Q6_K, DenseFormat::Q4_0];

    #[test]
    fn tiles_hold_every_bit_of_the_rows() {
        let mut random = crate::random::SplitMix64::new(7);
        for format in FORMATS {
            for (n, blocks) in [(1, 1), (15, 2), (16, 3), (17, 1), (300, 2)] {
                let k = blocks * format.block_len();
                let rows: Vec<u8> =
                    (0..n * format.row_bytes(k).unwrap()).map(|_| random.below(256) as u8).collect();
                let mut tiles = vec![0xaa; tiled_bytes(format, n, k).unwrap()];
                tile((format, &rows), (n, k), (format, &mut tiles)).unwrap();
                let mut back = vec![0x55; rows.len()];
                untile(format, &tiles, (n, k), &mut back).unwrap();
                assert!(back == rows, "{} {n} x {k}", format.name());
                // What fills the last tile up is zero, and so are its rows.
                let whole = n.next_multiple_of(TILE_ROWS);
                let mut all = vec![0x55; whole * format.row_bytes(k).unwrap()];
                untile(format, &tiles, (whole, k), &mut all).unwrap();
                assert!(all[rows.len()..].iter().all(|&b| b == 0));
            }
        }
    }

    #[test]
    fn requantised_tiles_are_the_tiles_of_requantised_rows() {
        let (n, k) = (37, 512);
        let values: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut w: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        for format in FORMATS {
            let mut rows = vec![0; n * format.row_bytes(k).unwrap()];
            requantise(DenseFormat::F32, &w, format, &mut rows, (n, k)).unwrap();
            let mut want = vec![0; tiled_bytes(format, n, k).unwrap()];
            let mut got = vec![1; want.len()];
            tile((format, &rows), (n, k), (format, &mut want)).unwrap();
            tile((DenseFormat::F32, &w), (n, k), (format, &mut got)).unwrap();
            assert!(got == want, "{}", format.name());
        }
        w[4 * (20 * k + 3)..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let mut out = vec![0; tiled_bytes(DenseFormat::Q8_0, n, k).unwrap()];
        let error = tile((DenseFormat::F32, &w), (n, k), (DenseFormat::Q8_0, &mut out)).unwrap_err();
        assert!(matches!(error, FormatError::NotFinite { row: 20, .. }), "{error}");
    }

    #[test]
    fn wrong_lengths_and_floats_are_refused() {
        let mut out = vec![0; 16 * 34];
        let q8 = |w: &[u8], k, out: &mut [u8]| tile((DenseFormat::Q8_0, w), (1, k), (DenseFormat::Q8_0, out));
        assert!(q8(&[0; 34], 32, &mut out).is_ok());
        assert!(q8(&[0; 33], 32, &mut out).is_err());
        assert!(q8(&[0; 34], 32, &mut out[1..]).is_err());
        assert!(q8(&[0; 34], 33, &mut out).is_err());
        let floats = tile((DenseFormat::F16, &[0; 64]), (1, 32), (DenseFormat::F16, &mut out));
        assert_eq!(floats, Err(FormatError::NoTiles { format: "F16" }));
        assert!(untile(DenseFormat::Q8_0, &out, (1, 32), &mut [0; 34]).is_ok());
        assert!(untile(DenseFormat::Q8_0, &out, (17, 32), &mut [0; 17 * 34]).is_err());
        assert_eq!(tiled_bytes(DenseFormat::Q6_K, usize::MAX, 256), None);
    }
}
