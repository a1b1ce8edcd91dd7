//! Gradients of the operations.

use bitnet_burn_formats::WeightScale;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend};

use super::{
    BitLinearArgs, DenseArgs, GatedActivation, InputNorm, SelfAttentionArgs, TernaryBackend, TernaryWeight,
    WeightGroup,
};

#[derive(Debug)]
struct BitLinearBackward;

/// Codes and scales of the inner backend.
type Saved<B> = Vec<(IntTensor<B>, FloatTensor<B>)>;

fn weights<B: TernaryBackend>(saved: Saved<B>) -> WeightGroup<B> {
    let matrices = saved.into_iter().map(|(codes, scale)| TernaryWeight { codes, scale });
    WeightGroup::from_vec(matrices.collect())
}

impl<B: TernaryBackend> Backward<B, 1> for BitLinearBackward {
    type State = (Saved<B>, BitLinearArgs);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node_x] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (saved, args) = ops.state;
        if let Some(node) = node_x {
            grads.register::<B>(node.id, B::bit_linear_backward(dy, weights(saved), args));
        }
    }
}

#[derive(Debug)]
struct StraightThrough;

impl<B: Backend> Backward<B, 1> for StraightThrough {
    type State = ();

    fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node_x] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let Some(node) = node_x {
            grads.register::<B>(node.id, dy);
        }
    }
}

#[derive(Debug)]
struct DenseLinearBackward;

impl<B: TernaryBackend> Backward<B, 1> for DenseLinearBackward {
    type State = (IntTensor<B>, DenseArgs);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node_x] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (words, args) = ops.state;
        if let Some(node) = node_x {
            grads.register::<B>(node.id, B::dense_linear_backward(dy, words, args));
        }
    }
}

#[derive(Debug)]
struct RmsNormBackward;

impl<B: TernaryBackend> Backward<B, 2> for RmsNormBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, f32);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node_x, node_weight] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (x, weight, eps) = ops.state;
        if let Some(node) = node_weight {
            let dw = B::rms_norm_backward_weight(x.clone(), dy.clone(), eps);
            grads.register::<B>(node.id, dw);
        }
        if let Some(node) = node_x {
            grads.register::<B>(node.id, B::rms_norm_backward(x, weight, dy, eps));
        }
    }
}

#[derive(Debug)]
struct GatedBackward;

impl<B: TernaryBackend> Backward<B, 1> for GatedBackward {
    type State = (FloatTensor<B>, GatedActivation);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node_x] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (gate_up, activation) = ops.state;
        if let Some(node) = node_x {
            grads.register::<B>(node.id, B::gated_backward(gate_up, dy, activation));
        }
    }
}

#[derive(Debug)]
struct SelfAttentionBackward;

impl<B: TernaryBackend> Backward<B, 1> for SelfAttentionBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, SelfAttentionArgs);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node_x] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (qkv, cos, sin, args) = ops.state;
        if let Some(node) = node_x {
            grads.register::<B>(node.id, B::self_attention_backward(qkv, cos, sin, dy, args));
        }
    }
}

#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: TernaryBackend> Backward<B, 1> for CrossEntropyBackward {
    type State = (FloatTensor<B>, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node_x] = ops.parents;
        let d = grads.consume::<B>(&ops.node);
        let (logits, targets) = ops.state;
        if let Some(node) = node_x {
            grads.register::<B>(node.id, B::cross_entropy_backward(logits, targets, d));
        }
    }
}

/// Gradients that differ from those of the default bodies, or are cheaper. A packed layer's codes and
/// scales are constants; the gradient for its input is the straight-through estimator's.
impl<B: TernaryBackend, C: CheckpointStrategy> TernaryBackend for Autodiff<B, C> {
    fn bit_linear(
        x: FloatTensor<Self>,
        norm: InputNorm<Self>,
        matrices: WeightGroup<Self>,
        args: BitLinearArgs,
    ) -> FloatTensor<Self> {
        // The norm differentiates by itself.
        let x = match norm {
            InputNorm::None => x,
            InputNorm::Rms(weight) => Self::rms_norm(x, weight, args.eps),
        };
        let saved: Saved<B> =
            matrices.into_vec().into_iter().map(|w| (w.codes, w.scale.into_primitive())).collect();
        let forward = |x, saved| B::bit_linear(x, InputNorm::None, weights(saved), args.clone());
        match BitLinearBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = forward(x.into_primitive(), saved.clone());
                prep.finish((saved, args), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(forward(x.into_primitive(), saved)),
        }
    }

    fn dense_linear(x: FloatTensor<Self>, words: IntTensor<Self>, args: DenseArgs) -> FloatTensor<Self> {
        let prep = DenseLinearBackward.prepare::<C>([x.node()]).compute_bound();
        let y = B::dense_linear(x.into_primitive(), words.clone(), args);
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((words, args), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn fake_quantise(x: FloatTensor<Self>, group: usize) -> FloatTensor<Self> {
        let prep = StraightThrough.prepare::<C>([x.node()]).compute_bound();
        prep.stateless(B::fake_quantise(x.into_primitive(), group))
    }

    fn ternarise(w: FloatTensor<Self>, scale: WeightScale) -> FloatTensor<Self> {
        let prep = StraightThrough.prepare::<C>([w.node()]).compute_bound();
        prep.stateless(B::ternarise(w.into_primitive(), scale))
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        let prep = RmsNormBackward.prepare::<C>([x.node(), weight.node()]).compute_bound();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        let y = B::rms_norm(x.clone(), weight.clone(), eps);
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, weight, eps), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn gated(gate_up: FloatTensor<Self>, activation: GatedActivation) -> FloatTensor<Self> {
        let prep = GatedBackward.prepare::<C>([gate_up.node()]).compute_bound();
        let gate_up = gate_up.into_primitive();
        let y = B::gated(gate_up.clone(), activation);
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((gate_up, activation), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn self_attention(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        args: SelfAttentionArgs,
    ) -> FloatTensor<Self> {
        let prep = SelfAttentionBackward.prepare::<C>([qkv.node()]).compute_bound();
        // The angles are constants.
        let (qkv, cos, sin) = (qkv.into_primitive(), cos.into_primitive(), sin.into_primitive());
        let y = B::self_attention(qkv.clone(), cos.clone(), sin.clone(), args);
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((qkv, cos, sin, args), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        let prep = CrossEntropyBackward.prepare::<C>([logits.node()]).compute_bound();
        let logits = logits.into_primitive();
        let y = B::cross_entropy(logits.clone(), targets.clone());
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((logits, targets), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
