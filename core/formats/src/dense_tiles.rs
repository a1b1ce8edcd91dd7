//! Q8_0, Q6_K and Q4_0 matrices in tiles of 16 rows, as kernels with int8 activations read them.
//!
//! A tile holds the codes and scales of the rows' blocks, all of them and nothing else, four consecutive
//! weights of row r in lane r of 64-byte vectors. Which vectors hold what is the kernels' matter:
//! `bitnet_burn_cpu::dense` has the table. A last tile of fewer rows is filled up with zero bytes, whose scales
//! are 0.

pub use super::dense::TILE_ROWS;

use super::dense::{DenseFormat, Tiles};
use super::{FormatError, check_length};
use rayon::prelude::*;

/// Bytes of a matrix [n, k] in tiles; `None` where the format holds floats, k is no whole number of blocks, or
/// that is too large.
pub const fn tiled_bytes(format: DenseFormat, n: usize, k: usize) -> Option<usize> {
    let tiles = n.div_ceil(TILE_ROWS);
    match (&format.facts().tiles, format.row_bytes(k)) {
        (Some(_), Some(row)) => match row.checked_mul(TILE_ROWS) {
            Some(tile) => tile.checked_mul(tiles),
            None => None,
        },
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
    let (tiles_of, row) = check(to, (n, k), out)?;
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
            (tiles_of.tile)(rows, row, tile);
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
    let (tiles_of, row) = check(format, (n, k), tiles)?;
    check_length(format.name(), n, k, "bytes", n * row, out.len())?;
    if k == 0 {
        return Ok(());
    }
    each_part(out, TILE_ROWS * row, |first, out| {
        for (i, rows) in out.chunks_mut(TILE_ROWS * row).enumerate() {
            let tile = &tiles[(first + i) * TILE_ROWS * row..][..TILE_ROWS * row];
            (tiles_of.untile)(tile, row, rows);
        }
        Ok(())
    })
}

/// The format's tiles and the bytes of a row, if it has tiles and their length fits.
fn check(
    format: DenseFormat,
    (n, k): (usize, usize),
    tiles: &[u8],
) -> Result<(&'static Tiles, usize), FormatError> {
    let row = format.checked_row_bytes(k)?;
    let Some(tiles_of) = &format.facts().tiles else {
        return Err(FormatError::NoTiles { format: format.name() });
    };
    let size = tiled_bytes(format, n, k).ok_or(FormatError::TooLarge { format: format.name(), n, k })?;
    check_length(format.name(), n, k, "bytes", size, tiles.len())?;
    Ok((tiles_of, row))
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
