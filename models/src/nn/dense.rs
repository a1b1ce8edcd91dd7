//! A dense matrix in the format of its file: embedding and lm_head.

use bitnet_burn_backends::{DenseArgs, ops};
use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Int, Tensor};

use crate::checkpoint::DenseTensor;

/// A matrix [N, K] that stays as its file stores it (F32, F16, BF16, Q8_0, Q6_K, Q4_0), memory-mapped
/// on devices in host memory, and is decoded to f32 where it is used.
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
        Self { words: Param::initialized(ParamId::new(), words), args: DenseArgs { format, n, k } }
    }

    /// Format and shape.
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
