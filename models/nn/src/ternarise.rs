//! Ternary weights in models whose types stay as they are, by Burn's reparameterizations.

use bitnet_burn_backends::ops;
use bitnet_burn_formats::WeightScale;
use burn::module::{Module, Param, ParamGroup, Reparameterization, Reparameterizer};
use burn::tensor::Tensor;

use crate::bit_linear::{in_dtype, in_f32};

/// Makes the weights of a model's `Linear` layers ternary, whatever the model is: each forward pass computes with
/// s * clamp(round(W / s), -1, 1), and training moves the floats W, as in a [`BitLinear`](crate::BitLinear). Activations stay
/// floats.
///
/// ```
/// use bitnet_burn::{BitLinear, Ternarise, WeightScale};
/// use burn::module::{Module, ParamGroup};
/// use burn::nn::transformer::TransformerEncoderConfig;
/// use burn::tensor::Device;
///
/// let device = Device::flex();
/// let encoder = TransformerEncoderConfig::new(32, 64, 2, 1).init(&device);
/// let group = ParamGroup::all().exclude(ParamGroup::from_predicate("mha.output"));
/// let encoder = encoder.apply_reparameterization(Ternarise::new(WeightScale::Tensor).with_group(group));
///
/// // To the packed state, a layer at a time.
/// let query = BitLinear::from_linear(encoder.layers[0].mha.query.clone())?.pack()?;
/// assert!(query.to_string().contains("packed"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// - It takes every matrix of the group for the weight [d_input, d_output] of a `Linear`. Exclude embeddings, heads and
///   others by name; [`Module::freeze_group`] freezes what is not to be trained at all.
/// - Records, optimisers, `valid` and `train` see the floats. [`Module::materialize`] replaces them by the ternary values.
/// - Burn has one reparameterization for a parameter: no LoRA on top, and none below.
/// - [`BitLinear::from_linear`](crate::BitLinear::from_linear) takes a `Linear` over, with its floats and kind of scale.
#[derive(Clone, Debug)]
pub struct Ternarise {
    scale: WeightScale,
    group: ParamGroup,
}

impl Ternarise {
    /// For all matrices, with scales of this kind.
    pub fn new(scale: WeightScale) -> Self {
        Self { scale, group: ParamGroup::all() }
    }

    /// For the matrices of a group of parameters.
    pub fn with_group(self, group: ParamGroup) -> Self {
        Self { group, ..self }
    }
}

impl Reparameterizer for Ternarise {
    type Reparam = Ternary;

    /// # Panics
    /// If groups of weights do not divide the input features of a `Linear`.
    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Ternary>) {
        if D != 2 || !self.group.matches(&param.id, Some(path)) {
            return (param, None);
        }
        let k = param.lazy_shape()[0];
        if let Some(problem) = self.scale.problem(k) {
            panic!(
                "Ternarise: the scale of `{path}` is {problem}; exclude it, or choose another kind of scale"
            );
        }
        (param, Some(Ternary { scale: self.scale }))
    }
}

/// What [`Ternarise`] attaches to a weight.
#[derive(Module, Debug)]
pub struct Ternary {
    #[module(skip)]
    scale: WeightScale,
}

impl Ternary {
    /// The weights that share a scale: all, those of an output, or groups of an output's.
    pub fn scale(&self) -> WeightScale {
        self.scale
    }
}

impl Reparameterization for Ternary {
    const NAME: &'static str = "ternary";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let (shape, dtype) = (base.shape(), base.dtype());
        let &[k, n] = shape.as_slice() else { return base };
        let weight = in_f32(base).reshape([k, n]).transpose();
        in_dtype(ops::ternarise(weight, self.scale).transpose().reshape(shape), dtype)
    }
}
