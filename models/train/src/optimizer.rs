//! The optimiser, and what is done to gradients.

use bitnet_burn::BitNet;
use burn::module::{Module, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::Tensor;

use crate::TrainConfig;

/// AdamW, with weight decay for the matrices alone.
#[derive(Clone)]
pub(crate) struct Optimizer(pub ModuleOptimizer);

impl std::fmt::Debug for Optimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdamW")
    }
}

impl Optimizer {
    pub fn new(config: &TrainConfig, step: u64, model: &BitNet) -> Self {
        let o = &config.optimizer;
        let adam = AdamWConfig::new().with_beta_1(o.beta1).with_beta_2(o.beta2).with_epsilon(o.epsilon);
        let decaying = adam.clone().with_weight_decay(config.weight_decay(step)).build();
        let mut norms = Vectors(Vec::new());
        model.visit(&mut norms);
        let group = ParamGroup::from_ids(norms.0);
        Self(ModuleOptimizer::from(decaying).with_group(group, adam.with_weight_decay(0.0).build(), None))
    }
}

/// Collects the parameters that are vectors: the norms.
struct Vectors(Vec<ParamId>);

impl ModuleVisitor for Vectors {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if D == 1 {
            self.0.push(param.id);
        }
    }
}

/// Adds up the squares of all gradients.
pub(crate) struct SquareSum<'a> {
    pub grads: &'a GradientsParams,
    pub sum: f64,
}

impl ModuleVisitor for SquareSum<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id) {
            self.sum += f64::from(scalar(grad.square().sum()));
        }
    }
}

/// Multiplies all gradients.
pub(crate) struct Scale<'a> {
    pub grads: &'a mut GradientsParams,
    pub factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            self.grads.register(param.id, grad * self.factor);
        }
    }
}

pub(crate) fn scalar(tensor: Tensor<1>) -> f32 {
    tensor.into_data().iter::<f32>().next().expect("a scalar has a value")
}
