//! Matrices as files hold them: views of a memory map, or buffers of their own.

use std::fmt;
use std::io::{self, Write};

use bytes::Bytes;

use crate::{DenseFormat, ternary};

/// A ternary matrix, W = scale * codes.
#[derive(Clone)]
pub struct TernaryTensor {
    /// The tensor's name in the file.
    pub name: String,
    /// Output features: rows.
    pub n: usize,
    /// Input features: columns.
    pub k: usize,
    /// One scale for the whole tensor, finite. Includes a separate scale tensor where the file has one.
    pub scale: f32,
    /// Rows in the canonical layout (I2_S padded to whole blocks), `n * k.div_ceil(128) * 32` bytes,
    /// aligned to 32: a view of the memory map where the file holds just that, else a buffer of its own.
    ///
    /// Codes read from a GGUF I2_S tensor are not scanned for the invalid code 3 when they are opened (that
    /// would read the whole file); a full check of the file does.
    pub codes: Bytes,
    /// How the file holds it: `I2_S`, `TQ2_0`, `BF16 master (absmean)` ...
    pub stored_as: &'static str,
}

impl fmt::Debug for TernaryTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, n, k, scale, codes, stored_as } = self;
        write!(f, "TernaryTensor({name:?}, [{n}, {k}], scale {scale:e}, {stored_as}, {} bytes)", codes.len())
    }
}

/// A matrix in one of the dense formats: the embedding or the output head.
#[derive(Clone)]
pub struct DenseTensor {
    /// The tensor's name in the file.
    pub name: String,
    /// Rows.
    pub n: usize,
    /// Columns: the contiguous dimension.
    pub k: usize,
    /// How a row is encoded.
    pub format: DenseFormat,
    /// `n` rows: a view of the memory map, aligned as the file has it.
    pub data: Bytes,
}

impl fmt::Debug for DenseTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, n, k, format, data } = self;
        write!(f, "DenseTensor({name:?}, [{n}, {k}], {format:?}, {} bytes)", data.len())
    }
}

impl TernaryTensor {
    /// Number of weights that are zero.
    pub fn zeros(&self) -> u64 {
        ternary::zeros(&self.codes, self.n, self.k)
    }
}

impl DenseTensor {
    /// Writes the rows in another format, rounded as [`DenseFormat::encode_row`] does.
    pub fn write_as(&self, format: DenseFormat, out: &mut dyn Write) -> io::Result<()> {
        let mut values = vec![0.0; self.k];
        let mut bytes = vec![0; format.row_bytes(self.k).unwrap_or(0)];
        for n in 0..self.n {
            let row = self.row(n).ok_or_else(|| io::Error::other(format!("row {n} is not in the data")))?;
            self.format.decode_row(row, &mut values).map_err(io::Error::other)?;
            format.encode_row(&values, &mut bytes).map_err(io::Error::other)?;
            out.write_all(&bytes)?;
        }
        Ok(())
    }

    /// The bytes of row `n`, or `None` where there is no such row.
    pub fn row(&self, n: usize) -> Option<&[u8]> {
        let bytes = self.format.row_bytes(self.k)?;
        let start = n.checked_mul(bytes)?;
        self.data.get(start..start.checked_add(bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_counted_without_the_padding() {
        use crate::canonical::{pack_row, row_bytes};
        let weights: Vec<i8> = (0..200).map(|i| [0, 1, -1, 0, 1][i % 5]).collect();
        let mut codes = vec![0; row_bytes(200)];
        pack_row(&weights, &mut codes);
        let codes = codes.repeat(3).into();
        let tensor =
            TernaryTensor { name: String::new(), n: 3, k: 200, scale: 1.0, codes, stored_as: "test" };
        assert_eq!(tensor.zeros(), 3 * 80);
    }
}
