//! Rotation of a matrix's input, which spreads outliers before activations are quantised.

use bitnet_burn_backends::ops;
use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};

/// A Walsh-Hadamard transform of runs of a row's values, with signs: x' = H(s * x). The weights that it belongs to were
/// rotated once, so that their product with x' is that of the original weights with x.
#[derive(Module, Debug)]
pub struct Rotation {
    /// -1 or 1: `[K]`.
    pub signs: Param<Tensor<1>>,
    #[module(skip)]
    block: usize,
}

impl Rotation {
    /// A rotation of runs of `block` values, a power of two that divides the number of signs.
    pub fn new(signs: Vec<f32>, block: usize, device: &Device) -> Self {
        let count = signs.len();
        let signs = Tensor::from_data(TensorData::new(signs, [count]), device).set_require_grad(false);
        Self { signs: Param::initialized(ParamId::new(), signs), block }
    }

    /// What tells rotations apart; copies of one are the same.
    pub(crate) fn id(&self) -> (ParamId, usize) {
        (self.signs.id, self.block)
    }

    /// H(s * x) of rows [M, K].
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        ops::hadamard(x, self.signs.val(), self.block, false)
    }

    /// s * H(x) of rows [M, K], which takes [`forward`](Self::forward) back.
    pub fn inverse(&self, x: Tensor<2>) -> Tensor<2> {
        ops::hadamard(x, self.signs.val(), self.block, true)
    }
}
