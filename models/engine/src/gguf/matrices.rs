//! Ternary matrices in the types of GGUF files.

use super::{GgufTypes, TernaryType};
use crate::checkpoint::Weights;
use crate::checkpoint::gguf::names::gptj_rows;
use bitnet_burn_formats::gguf::write_i2_s;
use bitnet_burn_formats::{
    DenseFormat, DenseTensor, FormatError, Scales, TernaryTensor, blocks, check_canonical, ternary,
};
use std::borrow::Cow;
use std::io::{self, Write};

/// Why the type that was asked for can't hold a matrix.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MatrixError {
    /// It has other scales than the type can hold, or values that are not ternary.
    #[error("tensor `{tensor}`: {error}")]
    Inexact {
        /// The tensor's name in the source.
        tensor: String,
        /// Row, column and scale or value.
        error: FormatError,
    },
    /// I2_S weights have int8 activations by row everywhere.
    #[error("tensor `{tensor}` has several scales, or no int8 activations by row: what I2_S stands for")]
    Activations {
        /// The tensor's name in the source.
        tensor: String,
    },
}

/// The blocks of a projection in one of the types with a scale for each.
///
/// # Arguments
/// * `requantise`: whether they may be the nearest instead of the same weights
///
/// # Errors
/// [`MatrixError`]: it has other scales than the blocks can hold, or values that are not ternary.
pub fn encoded(weights: &Weights, format: DenseFormat, requantise: bool) -> Result<Vec<u8>, MatrixError> {
    let (n, k) = weights.shape();
    let data = match weights {
        Weights::Ternary(TernaryTensor { codes, scale, .. }) if !requantise => {
            Scales::from_rows(&vec![*scale; n], n, k, 0)
                .and_then(|scales| blocks::write(format, codes, n, k, &scales))
        }
        Weights::Dense(tensor) if !requantise => as_blocks(tensor, format),
        _ => {
            let valid = match weights {
                Weights::Ternary(tensor) => check_canonical(&tensor.codes, n, k),
                Weights::Dense(_) => Ok(()),
            };
            let values = |row: usize, values: &mut [f32]| weights.decode_row(row, values);
            valid.and_then(|()| blocks::write_nearest(format, n, k, values))
        }
    };
    data.map_err(|error| MatrixError::Inexact { tensor: weights.name().to_owned(), error })
}

/// A dense matrix with the same values in blocks.
fn as_blocks(tensor: &DenseTensor, format: DenseFormat) -> Result<Vec<u8>, FormatError> {
    let (n, k) = (tensor.n, tensor.k);
    let (codes, scales) = ternary::scaled_from_dense(tensor.format, &tensor.data, n, k)?;
    blocks::write(format, &codes, n, k, &scales)
}

/// The embedding or the head in the projections' type, if that has blocks that hold exactly what it is; else as it is.
pub(super) fn like_projections(tensor: DenseTensor, ternary: TernaryType) -> DenseTensor {
    let other = ternary.blocks().filter(|&format| format != tensor.format);
    match other.map(|format| (format, as_blocks(&tensor, format))) {
        Some((format, Ok(data))) => DenseTensor { format, data: data.into(), ..tensor },
        _ => tensor,
    }
}

/// Writes a projection.
///
/// # Arguments
/// * `head`: rows of a head, where they go into GPT-J's order
///
/// # Errors
/// Those of `out`, and a [`MatrixError`] as [`io::Error::other`].
pub(super) fn write(
    weights: &Weights,
    types: GgufTypes,
    head: Option<usize>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let inexact = |tensor: &str, error| MatrixError::Inexact { tensor: tensor.to_owned(), error };
    match (types.ternary.blocks(), weights) {
        (Some(format), _) => {
            let data = encoded(weights, format, types.requantise).map_err(io::Error::other)?;
            out.write_all(&ordered(&data, weights.shape().0, head))
        }
        (None, Weights::Ternary(TernaryTensor { name, codes, n, k, scale, .. })) => {
            check_canonical(codes, *n, *k).map_err(|error| io::Error::other(inexact(name, error)))?;
            write_i2_s(out, &ordered(codes, *n, head), *scale)
        }
        (None, Weights::Dense(tensor)) => {
            Err(io::Error::other(MatrixError::Activations { tensor: tensor.name.clone() }))
        }
    }
}

/// Rows in the order in which they are written.
pub(super) fn ordered(rows: &[u8], n: usize, head: Option<usize>) -> Cow<'_, [u8]> {
    match head {
        Some(head) => Cow::Owned(gptj_rows(rows, n, head)),
        None => Cow::Borrowed(rows),
    }
}
