//! Q8_0, Q6_K and Q4_0 matrices in tiles of 16 rows, as kernels with int8 activations read them.
//!
//! A tile holds the codes and scales of the rows' GGUF blocks, nothing rounded and not a byte more, in the order in
//! which they are multiplied: four consecutive weights of row r in the 32-bit lane r of a 64-byte vector. So the sums
//! of 16 rows grow side by side, and a whole matrix is one sequential stream. A last tile of fewer rows is filled up
//! with zero bytes, whose scales are 0.
//!
//! | format | a block of 16 rows; blocks follow one another in a tile |
//! | --- | --- |
//! | Q8_0, 32 weights a row | 8 vectors: byte i of lane r of vector j is the i8 4j + i of row r; 16 f16 d |
//! | Q4_0, 32 weights a row | 4 vectors: byte i of lane r of vector j is code 8j + i, low nibble, and 8j + 4 + i, high; 16 f16 d |
//! | Q6_K, 256 weights a row | for each group of four of the parts s of 16 weights: 4 times 16 i8 scales, those of a part in all rows first; 4 times 3 vectors: byte i of lane r has the low four bits of the codes 16s + i and 16s + 4 + i, then those of 16s + 8 + i and 16s + 12 + i, then the high two bits of all four, the first lowest. Behind the groups: 16 f16 d |
//!
//! [`TiledFormat`] and the functions beside it say where these parts begin. Whoever packs, unpacks or multiplies
//! tiles takes the places from here.

use super::dense::{
    DenseFormat, Q4_0_BYTES, Q6_K_BYTES, Q8_0_BYTES, QK, QK_K, q4_0_codes, q6_k_codes, set_q6_k_codes,
};
use super::{FormatError, check_length};
use rayon::prelude::*;

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;

/// Bytes of a vector: four weights of each row.
pub const VECTOR_BYTES: usize = 4 * TILE_ROWS;

/// Bytes of a group of four parts of Q6_K: their scales, and three vectors each.
pub const Q6_K_GROUP_BYTES: usize = 4 * (TILE_ROWS + 3 * VECTOR_BYTES);

/// Where in its group the three vectors of part `s` (0 to 3) of Q6_K begin.
pub const fn q6_k_vectors_at(s: usize) -> usize {
    4 * TILE_ROWS + 3 * VECTOR_BYTES * s
}

/// Where in its group the 16 scales of part `s` (0 to 3) of Q6_K begin.
pub const fn q6_k_scales_at(s: usize) -> usize {
    TILE_ROWS * s
}

/// The formats that tiles hold: those whose weights are integers with scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the names are GGUF's")]
pub enum TiledFormat {
    /// 8 bits, and an f16 scale for 32 weights.
    Q8_0,
    /// 6 bits, an i8 scale for 16 weights and an f16 scale for 256.
    Q6_K,
    /// 4 bits, and an f16 scale for 32 weights.
    Q4_0,
}

impl TiledFormat {
    /// Every one of them.
    pub const ALL: [Self; 3] = [Self::Q8_0, Self::Q6_K, Self::Q4_0];

    /// The tiles of a format, if it has them.
    pub const fn of(format: DenseFormat) -> Option<Self> {
        match format {
            DenseFormat::Q8_0 => Some(Self::Q8_0),
            DenseFormat::Q6_K => Some(Self::Q6_K),
            DenseFormat::Q4_0 => Some(Self::Q4_0),
            _ => None,
        }
    }

    /// The same format in rows.
    pub const fn rows(self) -> DenseFormat {
        match self {
            Self::Q8_0 => DenseFormat::Q8_0,
            Self::Q6_K => DenseFormat::Q6_K,
            Self::Q4_0 => DenseFormat::Q4_0,
        }
    }

    /// Weights of a row in a block.
    pub const fn block_len(self) -> usize {
        self.rows().block_len()
    }

    /// Bytes of a block of [`TILE_ROWS`] rows.
    pub const fn block_bytes(self) -> usize {
        TILE_ROWS * self.rows().block_bytes()
    }

    /// Where in a block the 16 f16 scales d begin: behind everything else.
    pub const fn halves_at(self) -> usize {
        self.block_bytes() - 2 * TILE_ROWS
    }

    /// Bytes of a tile of rows of `k` weights; `None` where `k` is no whole number of blocks, or that is too
    /// large.
    pub const fn tile_bytes(self, k: usize) -> Option<usize> {
        match self.rows().row_bytes(k) {
            Some(row) => row.checked_mul(TILE_ROWS),
            None => None,
        }
    }
}

/// Bytes of a matrix [n, k] in tiles; `None` where the format holds floats, k is no whole number of blocks, or
/// that is too large.
pub const fn tiled_bytes(format: DenseFormat, n: usize, k: usize) -> Option<usize> {
    let Some(format) = TiledFormat::of(format) else { return None };
    match format.tile_bytes(k) {
        Some(tile) => tile.checked_mul(n.div_ceil(TILE_ROWS)),
        None => None,
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
    let (tiled, row) = check(to, (n, k), out)?;
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
            match tiled {
                TiledFormat::Q8_0 => tile_blocks(rows, row, tile, q8_0),
                TiledFormat::Q6_K => tile_blocks(rows, row, tile, q6_k),
                TiledFormat::Q4_0 => tile_blocks(rows, row, tile, q4_0),
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
    let (tiled, row) = check(format, (n, k), tiles)?;
    check_length(format.name(), n, k, "bytes", n * row, out.len())?;
    if k == 0 {
        return Ok(());
    }
    each_part(out, TILE_ROWS * row, |first, out| {
        for (i, rows) in out.chunks_mut(TILE_ROWS * row).enumerate() {
            let tile = &tiles[(first + i) * TILE_ROWS * row..][..TILE_ROWS * row];
            match tiled {
                TiledFormat::Q8_0 => untile_blocks(tile, row, rows, q8_0_back),
                TiledFormat::Q6_K => untile_blocks(tile, row, rows, q6_k_back),
                TiledFormat::Q4_0 => untile_blocks(tile, row, rows, q4_0_back),
            }
        }
        Ok(())
    })
}

/// The format's tiles and the bytes of a row, if it has tiles and their length fits.
fn check(
    format: DenseFormat,
    (n, k): (usize, usize),
    tiles: &[u8],
) -> Result<(TiledFormat, usize), FormatError> {
    let row = format.checked_row_bytes(k)?;
    let tiled = TiledFormat::of(format).ok_or(FormatError::NoTiles { format: format.name() })?;
    let size = tiled_bytes(format, n, k).ok_or(FormatError::TooLarge { format: format.name(), n, k })?;
    check_length(format.name(), n, k, "bytes", size, tiles.len())?;
    Ok((tiled, row))
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
        set_lane(out, VECTOR_BYTES * j, r, word(block, 2 + 4 * j));
    }
    out[TiledFormat::Q8_0.halves_at() + 2 * r..][..2].copy_from_slice(&block[..2]);
}

fn q8_0_back(from: &[u8], r: usize, block: &mut [u8; Q8_0_BYTES]) {
    for j in 0..8 {
        block[2 + 4 * j..][..4].copy_from_slice(&lane(from, VECTOR_BYTES * j, r).to_le_bytes());
    }
    block[..2].copy_from_slice(&from[TiledFormat::Q8_0.halves_at() + 2 * r..][..2]);
}

fn q4_0(block: &[u8; Q4_0_BYTES], r: usize, out: &mut [u8]) {
    let codes = q4_0_codes(block);
    for j in 0..4 {
        set_lane(out, VECTOR_BYTES * j, r, word(&codes, 8 * j) | word(&codes, 8 * j + 4) << 4);
    }
    out[TiledFormat::Q4_0.halves_at() + 2 * r..][..2].copy_from_slice(&block[..2]);
}

fn q4_0_back(from: &[u8], r: usize, block: &mut [u8; Q4_0_BYTES]) {
    let mut codes = [0u8; QK];
    for j in 0..4 {
        let lane = lane(from, VECTOR_BYTES * j, r);
        codes[8 * j..][..4].copy_from_slice(&(lane & NIBBLES).to_le_bytes());
        codes[8 * j + 4..][..4].copy_from_slice(&(lane >> 4 & NIBBLES).to_le_bytes());
    }
    for i in 0..16 {
        block[2 + i] = codes[i] | codes[16 + i] << 4;
    }
    block[..2].copy_from_slice(&from[TiledFormat::Q4_0.halves_at() + 2 * r..][..2]);
}

/// Where in a block the vectors and the scales of part `s` (0 to 15) of Q6_K begin.
const fn q6_k_part(s: usize) -> (usize, usize) {
    let group = s / 4 * Q6_K_GROUP_BYTES;
    (group + q6_k_vectors_at(s % 4), group + q6_k_scales_at(s % 4))
}

fn q6_k(block: &[u8; Q6_K_BYTES], r: usize, out: &mut [u8]) {
    let codes = q6_k_codes(block);
    for s in 0..16 {
        let (vectors, scales) = q6_k_part(s);
        let [a, b, c, d] = [0, 4, 8, 12].map(|i| word(&codes, 16 * s + i));
        set_lane(out, vectors, r, a & NIBBLES | (b & NIBBLES) << 4);
        set_lane(out, vectors + VECTOR_BYTES, r, c & NIBBLES | (d & NIBBLES) << 4);
        let [a, b, c, d] = [a, b, c, d].map(|codes| codes >> 4 & PAIRS);
        set_lane(out, vectors + 2 * VECTOR_BYTES, r, a | b << 2 | c << 4 | d << 6);
        out[scales + r] = block[192 + s];
    }
    out[TiledFormat::Q6_K.halves_at() + 2 * r..][..2].copy_from_slice(&block[208..]);
}

fn q6_k_back(from: &[u8], r: usize, block: &mut [u8; Q6_K_BYTES]) {
    let mut codes = [0u8; QK_K];
    for s in 0..16 {
        let (vectors, scales) = q6_k_part(s);
        let low = [lane(from, vectors, r), lane(from, vectors + VECTOR_BYTES, r)];
        let high = lane(from, vectors + 2 * VECTOR_BYTES, r);
        for t in 0..4 {
            let code = low[t / 2] >> (4 * (t % 2)) & NIBBLES | (high >> (2 * t) & PAIRS) << 4;
            codes[16 * s + 4 * t..][..4].copy_from_slice(&code.to_le_bytes());
        }
        block[192 + s] = from[scales + r];
    }
    block[208..].copy_from_slice(&from[TiledFormat::Q6_K.halves_at() + 2 * r..][..2]);
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
