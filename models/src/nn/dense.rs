//! A dense matrix in the format of its file: embedding and lm_head.

use bitnet_burn_backends::{DenseArgs, NoInt8, ops};
use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Int, Tensor};

use crate::checkpoint::DenseTensor;

/// A matrix [N, K] that stays as its file stores it (F32, F16, BF16, Q8_0, Q6_K, Q4_0), memory-mapped
/// on devices in host memory, and is decoded to f32 where it is used; or multiplied by int8 activations as it
/// is ([`with_int8`](Self::with_int8)).
#[derive(Module, Debug)]
pub struct StoredMatrix {
    /// The raw bytes as U32 words [1, words].
    pub words: Param<Tensor<2, Int>>,
    #[module(skip)]
    args: DenseArgs,
}

impl StoredMatrix {
    /// A loaded tensor on a device.
    pub fn new(tensor: DenseTensor, device: &Device) -> Self {
        let DenseTensor { n, k, format, data, .. } = tensor;
        let words = ops::words(data.clone(), [1, data.len().div_ceil(4)], device);
        Self { words: Param::initialized(ParamId::new(), words), args: DenseArgs::new(format, n, k) }
    }

    /// The same, with [`forward`](Self::forward) quantising its input to int8, by absmax and row. That is
    /// faster where decoding the weights takes longer than reading them, and off by up to half a step (of
    /// 127 for the largest) for each input. [`rows`](Self::rows) stays as it is.
    ///
    /// # Errors
    /// If the format holds floats.
    pub fn with_int8(mut self) -> Result<Self, NoInt8> {
        self.args = self.args.with_int8()?;
        Ok(self)
    }

    /// Format and shape, and whether activations are quantised.
    pub fn args(&self) -> DenseArgs {
        self.args
    }

    /// y = x * Wᵀ. x [M, K]; the output is [M, N].
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        ops::dense_linear(x, self.words.val(), self.args)
    }

    /// Rows of the matrix. The output is [ids, K].
    ///
    /// # Panics
    /// If an id is not below N.
    pub fn rows(&self, ids: &[u32]) -> Tensor<2> {
        ops::dense_rows(self.words.val(), ids, self.args)
    }
}
