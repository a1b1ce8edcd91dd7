//! Gradients block by block: the forward pass keeps the inputs of the blocks alone, and the backward pass computes each block
//! again before it goes through it (activation checkpointing, arXiv 1604.06174).

use bitnet_burn::BitNet;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};

use crate::TrainError;

/// The gradients of what `objective` makes of the logits of whole sequences, and what else it gives.
pub(crate) fn gradients<T>(
    model: &BitNet,
    inputs: &[u32],
    length: usize,
    objective: impl FnOnce(Tensor<2>) -> Result<(Tensor<1>, T), TrainError>,
) -> Result<(T, GradientsParams), TrainError> {
    let plain = model.valid();
    let mut kept = Vec::with_capacity(model.blocks.len());
    let mut x = plain.embed_sequences(inputs, length)?;
    for block in 0..model.blocks.len() {
        kept.push(x.clone());
        x = plain.forward_block(block, x, length)?;
    }
    drop(plain);
    let mut all = GradientsParams::new();
    let input = x.autodiff().require_grad();
    let (value, others) = objective(model.logits_of(input.clone())?)?;
    let mut grads = value.backward();
    let mut dy = gradient_of(&input, &mut grads);
    join(&mut all, grads, model);
    let learns_embedding = model.embedding.float_weight().is_some();
    for (number, x) in kept.into_iter().enumerate().rev() {
        let wants_gradient = number > 0 || learns_embedding;
        let input = if wants_gradient { x.autodiff().require_grad() } else { x.autodiff() };
        let y = model.forward_block(number, input.clone(), length)?;
        // Its gradient for y is dy, exactly.
        let mut grads = (y * dy.clone().autodiff()).sum().backward();
        if wants_gradient {
            dy = gradient_of(&input, &mut grads);
        }
        join(&mut all, grads, &model.blocks[number]);
    }
    if learns_embedding {
        let x = model.embed_sequences(inputs, length)?;
        join(&mut all, (x * dy.autodiff()).sum().backward(), model);
    }
    Ok((others, all))
}

fn gradient_of(x: &Tensor<2>, grads: &mut Gradients) -> Tensor<2> {
    x.grad_remove(grads).expect("what a loss depends on has a gradient")
}

/// Adds the gradients of a module's parameters.
fn join<M: Module>(all: &mut GradientsParams, grads: Gradients, module: &M) {
    let new = GradientsParams::from_grads(grads, module);
    module.visit(&mut Join { all, new });
}

struct Join<'a> {
    all: &'a mut GradientsParams,
    new: GradientsParams,
}

impl ModuleVisitor for Join<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(new) = self.new.remove::<D>(param.id) else { return };
        let sum = match self.all.remove::<D>(param.id) {
            Some(sum) => sum + new,
            None => new,
        };
        self.all.register(param.id, sum);
    }
}
