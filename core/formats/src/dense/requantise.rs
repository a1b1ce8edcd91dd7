//! From one dense format to another.

use super::DenseFormat;
use crate::{FormatError, check_length};
use rayon::prelude::*;

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
    check_length(from.name(), n, k, "bytes", n.saturating_mul(from_bytes), w.len())?;
    check_length(to.name(), n, k, "bytes", n.saturating_mul(to_bytes), out.len())?;
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
