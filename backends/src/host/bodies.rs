//! [`TernaryBackend`] for the backends of host memory.

use bitnet_burn_formats::WeightScale;
use bitnet_burn_manager::profile::{self, Operation};
use burn::backend::tensor::{FloatTensor, IntTensor};

use super::{attention, bit_linear, dense, rows, training};
use crate::extension::{
    AttentionArgs, BitLinearArgs, CacheTensor, DeltaNetArgs, DeltaNetOutput, DeltaNetTensors,
    DeltaNetWeights, DenseArgs, GatedActivation, InputNorm, SelfAttentionArgs, TernaryBackend, WeightGroup,
};

macro_rules! fast_bodies {
    ($backend:ty) => {
        impl TernaryBackend for $backend {
            fn bit_linear(
                x: FloatTensor<Self>,
                norm: InputNorm<Self>,
                weights: WeightGroup<Self>,
                args: BitLinearArgs,
            ) -> FloatTensor<Self> {
                bit_linear::bit_linear::<Self>(x, norm, weights, args)
            }

            fn bit_linear_backward(
                dy: FloatTensor<Self>,
                weights: WeightGroup<Self>,
                args: BitLinearArgs,
            ) -> FloatTensor<Self> {
                bit_linear::bit_linear_backward::<Self>(dy, weights, args)
            }

            fn fake_quantise(x: FloatTensor<Self>, group: usize) -> FloatTensor<Self> {
                training::fake_quantise::<Self>(x, group)
            }

            fn ternarise(w: FloatTensor<Self>, scale: WeightScale) -> FloatTensor<Self> {
                training::ternarise::<Self>(w, scale)
            }

            fn self_attention(
                qkv: FloatTensor<Self>,
                cos: FloatTensor<Self>,
                sin: FloatTensor<Self>,
                args: SelfAttentionArgs,
            ) -> FloatTensor<Self> {
                training::self_attention::<Self>(qkv, cos, sin, &args)
            }

            fn self_attention_backward(
                qkv: FloatTensor<Self>,
                cos: FloatTensor<Self>,
                sin: FloatTensor<Self>,
                dy: FloatTensor<Self>,
                args: SelfAttentionArgs,
            ) -> FloatTensor<Self> {
                training::self_attention_backward::<Self>(qkv, cos, sin, dy, &args)
            }

            fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
                training::cross_entropy::<Self>(logits, targets)
            }

            fn cross_entropy_backward(
                logits: FloatTensor<Self>,
                targets: IntTensor<Self>,
                d: FloatTensor<Self>,
            ) -> FloatTensor<Self> {
                training::cross_entropy_backward::<Self>(logits, targets, d)
            }

            fn rms_norm_backward(
                x: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                dy: FloatTensor<Self>,
                eps: f32,
            ) -> FloatTensor<Self> {
                training::rms_norm_backward::<Self>(x, weight, dy, eps)
            }

            fn rms_norm_backward_weight(
                x: FloatTensor<Self>,
                dy: FloatTensor<Self>,
                eps: f32,
            ) -> FloatTensor<Self> {
                training::rms_norm_backward_weight::<Self>(x, dy, eps)
            }

            fn gated_backward(
                gate_up: FloatTensor<Self>,
                dy: FloatTensor<Self>,
                activation: GatedActivation,
            ) -> FloatTensor<Self> {
                training::gated_backward::<Self>(gate_up, dy, activation)
            }

            fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
                let _span = profile::span(Operation::Norm);
                rows::rms_norm::<Self>(x, weight, eps)
            }

            fn hadamard(
                x: FloatTensor<Self>,
                signs: FloatTensor<Self>,
                block: usize,
                inverse: bool,
            ) -> FloatTensor<Self> {
                let _span = profile::span(Operation::Hadamard);
                rows::hadamard::<Self>(x, signs, block, inverse)
            }

            fn rope(
                x: FloatTensor<Self>,
                cos: FloatTensor<Self>,
                sin: FloatTensor<Self>,
                head_dim: usize,
            ) -> FloatTensor<Self> {
                let _span = profile::span(Operation::Rope);
                attention::rope::<Self>(x, cos, sin, head_dim)
            }

            fn cache_append(
                cache: CacheTensor<Self>,
                rows: FloatTensor<Self>,
                position: usize,
            ) -> CacheTensor<Self> {
                let _span = profile::span(Operation::KvCache);
                attention::cache_append::<Self>(cache, rows, position)
            }

            fn attention(
                q: FloatTensor<Self>,
                keys: CacheTensor<Self>,
                values: CacheTensor<Self>,
                args: AttentionArgs,
            ) -> FloatTensor<Self> {
                let _span = profile::span(Operation::Attention);
                attention::attention::<Self>(q, keys, values, args)
            }

            fn delta_net(
                rows: FloatTensor<Self>,
                weights: DeltaNetWeights<Self>,
                state: DeltaNetTensors<Self>,
                args: DeltaNetArgs,
            ) -> DeltaNetOutput<Self> {
                let _span = profile::span(Operation::DeltaNet);
                attention::delta_net::<Self>(rows, weights, state, &args)
            }

            fn gated(gate_up: FloatTensor<Self>, activation: GatedActivation) -> FloatTensor<Self> {
                let _span = profile::span(Operation::Activation);
                rows::gated::<Self>(gate_up, activation)
            }

            fn dense_linear(
                x: FloatTensor<Self>,
                words: IntTensor<Self>,
                args: DenseArgs,
            ) -> FloatTensor<Self> {
                dense::dense_linear::<Self>(x, words, args)
            }

            fn dense_linear_backward(
                dy: FloatTensor<Self>,
                words: IntTensor<Self>,
                args: DenseArgs,
            ) -> FloatTensor<Self> {
                dense::dense_linear_backward::<Self>(dy, words, args)
            }

            fn dense_rows(
                words: IntTensor<Self>,
                ids: IntTensor<Self>,
                args: DenseArgs,
            ) -> FloatTensor<Self> {
                let _span = profile::span(Operation::Embedding);
                dense::dense_rows::<Self>(words, ids, args)
            }
        }
    };
}

#[cfg(feature = "flex")]
fast_bodies!(burn::backend::Flex);

#[cfg(feature = "ndarray")]
fast_bodies!(burn::backend::NdArray);
