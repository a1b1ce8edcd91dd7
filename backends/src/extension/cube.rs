//! The bodies on GPUs.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_cubecl::CubeBackend;

use super::{
    AttentionArgs, BitLinearArgs, CacheTensor, CachedAttention, DenseArgs, GatedActivation, InputNorm,
    TernaryBackend, WeightGroup,
};

impl TernaryBackend for CubeBackend {
    fn bit_linear(
        x: FloatTensor<Self>,
        norm: InputNorm<Self>,
        weights: WeightGroup<Self>,
        args: BitLinearArgs,
    ) -> FloatTensor<Self> {
        crate::gpu::bit_linear(x, norm, weights, args)
    }

    fn bit_linear_backward(
        dy: FloatTensor<Self>,
        weights: WeightGroup<Self>,
        args: BitLinearArgs,
    ) -> FloatTensor<Self> {
        crate::gpu::bit_linear_backward(dy, weights, args)
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        crate::gpu::rms_norm(x, weight, eps)
    }

    fn cached_attention(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        keys: CacheTensor<Self>,
        values: CacheTensor<Self>,
        args: AttentionArgs,
    ) -> CachedAttention<Self> {
        crate::gpu::cached_attention(qkv, cos, sin, keys, values, args)
    }

    fn gated(gate_up: FloatTensor<Self>, activation: GatedActivation) -> FloatTensor<Self> {
        crate::gpu::gated(gate_up, activation)
    }

    fn dense_linear(x: FloatTensor<Self>, words: IntTensor<Self>, args: DenseArgs) -> FloatTensor<Self> {
        crate::gpu::dense_linear(x, words, args)
    }

    fn dense_rows(words: IntTensor<Self>, ids: IntTensor<Self>, args: DenseArgs) -> FloatTensor<Self> {
        crate::gpu::dense_rows(words, ids, args)
    }
}
