//! Values of tensors as a model may have them: aligned, finite, in range.

use super::error::LoadError;
use bitnet_burn_formats::{DenseFormat, DenseTensor, FileError};
use bytes::Bytes;
use std::path::Path;

/// What canonical rows are aligned to: a block.
pub(super) const ROW_ALIGNMENT: usize = 32;

/// The bytes in a buffer aligned to 32; they move only if they have to.
pub(super) fn aligned(bytes: Vec<u8>) -> Bytes {
    aligned_view(Bytes::from_owner(bytes))
}

/// The bytes themselves if they are aligned to 32, else a copy that is.
pub(super) fn aligned_view(bytes: Bytes) -> Bytes {
    let misalignment = |address: *const u8| address.addr() % ROW_ALIGNMENT;
    if misalignment(bytes.as_ptr()) == 0 {
        return bytes;
    }
    let mut buffer = Vec::with_capacity(bytes.len() + ROW_ALIGNMENT);
    let start = (ROW_ALIGNMENT - misalignment(buffer.as_ptr())) % ROW_ALIGNMENT;
    buffer.resize(start, 0);
    buffer.extend_from_slice(&bytes); // within the capacity, so the buffer stays where it is
    let end = buffer.len();
    Bytes::from_owner(buffer).slice(start..end)
}

/// A scale that can be computed with.
pub(super) fn checked_scale(path: &Path, tensor: &str, value: f32) -> Result<f32, LoadError> {
    if value.is_finite() && value >= 0.0 {
        return Ok(value);
    }
    Err(LoadError::InvalidScale {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        value,
        help: " and not negative",
    })
}

/// Decodes row `n` of a tensor and checks it.
pub(super) fn decode_finite(
    path: &Path,
    tensor: &DenseTensor,
    n: usize,
    row: &mut [f32],
) -> Result<(), LoadError> {
    let impossible = |problem: String| FileError::InvalidShape {
        path: path.to_owned(),
        tensor: tensor.name.clone(),
        dims: vec![tensor.k as u64, tensor.n as u64],
        problem,
    };
    let bytes = tensor.row(n).ok_or_else(|| impossible(format!("row {n} is not in the data")))?;
    tensor.format.decode_row(bytes, row).map_err(|e| impossible(e.to_string()))?;
    match row.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(column) => Err(LoadError::NotFinite {
            path: path.to_owned(),
            tensor: tensor.name.clone(),
            row: n,
            column,
            value: row[column],
        }),
    }
}

/// All values of a small tensor, all finite.
pub(super) fn floats(path: &Path, tensor: &DenseTensor) -> Result<Vec<f32>, LoadError> {
    let mut values = vec![0.0; tensor.n * tensor.k];
    for (n, row) in values.chunks_exact_mut(tensor.k.max(1)).enumerate() {
        decode_finite(path, tensor, n, row)?;
    }
    Ok(values)
}

/// A tensor of f32.
pub(super) fn f32_tensor(name: &str, [n, k]: [usize; 2], values: &[f32]) -> DenseTensor {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    DenseTensor { name: name.to_owned(), n, k, format: DenseFormat::F32, data: aligned(data) }
}

/// The rates of decay of a gated DeltaNet.
pub(super) fn checked_rates(path: &Path, tensor: &str, rates: &[f32]) -> Result<(), LoadError> {
    match rates.iter().position(|&rate| !(rate.is_finite() && rate <= 0.0)) {
        None => Ok(()),
        Some(head) => Err(LoadError::UnsupportedTensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            problem: format!("the memory of value head {head} would grow at a rate of {}", rates[head]),
        }),
    }
}

/// The value of a tensor of one element.
pub(super) fn one_float(path: &Path, tensor: &DenseTensor) -> Result<f32, LoadError> {
    match floats(path, tensor)?[..] {
        [value] => Ok(value),
        _ => Err(LoadError::WrongShape {
            path: path.to_owned(),
            tensor: tensor.name.clone(),
            found: vec![tensor.n as u64, tensor.k as u64],
            expected: vec![1],
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_buffers_are_aligned() {
        for offset in 0..70 {
            let bytes = Bytes::from(vec![7u8; 1000]).slice(offset..);
            let view = aligned_view(bytes.clone());
            assert!(view.as_ptr().addr().is_multiple_of(ROW_ALIGNMENT) && view == bytes);
        }
        assert!(aligned(Vec::new()).is_empty());
    }
}
