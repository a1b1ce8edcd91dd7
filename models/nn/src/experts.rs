//! A mixture of experts (Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538): many feed-forward
//! networks, of which a router chooses a few for each row.

use bitnet_burn_backends::{GatedActivation, devices, ops};
use burn::config::Config;
use burn::module::{Initializer, Module};
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::bit_linear::side_by_side;
use crate::feed_forward::Gate;
use crate::{BitLinear, BitLinearConfig, DenseMatrix, ForwardError};

/// Configuration of [`BitExperts`].
#[derive(Config, Debug)]
pub struct BitExpertsConfig {
    /// Size of the residual stream.
    pub hidden_size: usize,
    /// Size between the projections of an expert.
    pub intermediate_size: usize,
    /// Number of experts.
    pub experts: usize,
    /// Experts that compute a row.
    pub used: usize,
    /// Whether the weights of a row's experts are divided by their sum.
    #[config(default = true)]
    pub renormalise: bool,
    /// Gates are at most this, and what they are multiplied by lies between minus this and this.
    pub clamp: Option<f32>,
    /// Epsilon of the norm.
    #[config(default = 1e-5)]
    pub eps: f64,
}

/// sum over a row's experts e of p_e * down_e(activation(gate_e(x)) * up_e(x)), with x = norm(input) and
/// p = softmax(router * x).
///
/// A row's experts are the `used` ones with the largest p; of equal ones, those with the lower number. Their p are divided
/// by their sum if the layer renormalises. The rows of one expert are computed together, and only the weights of experts that
/// have rows are read. **A row's contributions are added in ascending order of the experts' numbers**, each rounded to f32,
/// so that its result does not depend on the rows beside it.
///
/// Made by [`BitExpertsConfig`], or from a checkpoint.
#[derive(Module, Debug)]
pub struct BitExperts {
    /// Norm of the input, shared by the router and all experts.
    pub input_norm: RmsNorm,
    /// [experts, hidden_size]; it sees float activations.
    pub router: DenseMatrix,
    /// The experts.
    pub experts: Vec<BitExpert>,
    used: usize,
    renormalise: bool,
    #[module(skip)]
    gate: Gate,
}

/// The projections of an expert.
#[derive(Module, Debug)]
pub struct BitExpert {
    /// Gate.
    pub gate_proj: BitLinear,
    /// Up.
    pub up_proj: BitLinear,
    /// Down.
    pub down_proj: BitLinear,
}

impl BitExpertsConfig {
    /// A layer in the training state.
    pub fn init(&self, activation: GatedActivation, device: &Device) -> BitExperts {
        let up = || BitLinearConfig::new(self.hidden_size, self.intermediate_size).init(device);
        let down = || BitLinearConfig::new(self.intermediate_size, self.hidden_size).init(device);
        let experts = (0..self.experts).map(|_| [up(), up(), down()]).collect();
        let shape = [self.experts, self.hidden_size];
        let initializer = Initializer::KaimingUniform { gain: 1.0 / 3f64.sqrt(), fan_out_only: false };
        let router = initializer.init_with(shape, Some(self.hidden_size), Some(self.experts), device);
        let norm = RmsNormConfig::new(self.hidden_size).with_epsilon(self.eps).init(device);
        self.assemble(norm, DenseMatrix::trainable(router), experts, activation)
    }

    /// A layer of given parts: gate, up and down of each expert.
    ///
    /// # Panics
    /// If there are other numbers of experts, or a row has none or more than there are.
    pub fn assemble(
        &self,
        input_norm: RmsNorm,
        router: DenseMatrix,
        experts: Vec<[BitLinear; 3]>,
        activation: GatedActivation,
    ) -> BitExperts {
        let (count, routed, used) = (experts.len(), router.args().n, self.used);
        assert!(count == self.experts && routed == count, "{count} experts, a router to {routed}: {self:?}");
        assert!((1..=count).contains(&used), "{used} experts for a row, of {count}");
        let expert =
            |[gate_proj, up_proj, down_proj]: [BitLinear; 3]| BitExpert { gate_proj, up_proj, down_proj };
        BitExperts {
            input_norm,
            router,
            experts: experts.into_iter().map(expert).collect(),
            used,
            renormalise: self.renormalise,
            gate: Gate { activation, clamp: self.clamp },
        }
    }
}

impl BitExperts {
    /// The layer's contribution to the residual stream. Input and output: [rows, hidden_size].
    ///
    /// The router's choice is made on the host: a GPU is waited for.
    ///
    /// # Errors
    /// If a kernel refuses, or a device fails.
    pub fn forward(&self, x: Tensor<2>, quantise: bool) -> Result<Tensor<2>, ForwardError> {
        let device = x.device();
        let [rows, _] = x.dims();
        let x = ops::rms_norm(x, self.input_norm.gamma.val(), self.input_norm.epsilon as f32);
        let logits = self.router.forward(x.clone());
        let chosen = self.choose(logits.clone())?;
        let tracked = device.is_autodiff().then(|| self.tracked_weights(logits, &chosen));
        let mut out = Tensor::zeros(x.dims(), &device);
        // Where each expert is in `chosen`, a row after the other.
        let mut places_of = vec![Vec::new(); self.experts.len()];
        for (at, choice) in chosen.iter().enumerate() {
            places_of[choice.expert].push(at);
        }
        for (expert, places) in self.experts.iter().zip(places_of).filter(|(_, places)| !places.is_empty()) {
            let weights = match &tracked {
                Some(weights) => weights.clone().select(0, indices(&places, &device)),
                None => {
                    let weights = places.iter().map(|&at| chosen[at].weight).collect();
                    Tensor::from_data(TensorData::new(weights, [places.len(), 1]), &device)
                }
            };
            let rows_of: Vec<usize> = places.iter().map(|&at| at / self.used).collect();
            if rows_of.len() == rows {
                out = out + expert.forward(x.clone(), self.gate, quantise)? * weights;
            } else {
                let rows_of = indices(&rows_of, &device);
                let y = expert.forward(x.clone().select(0, rows_of.clone()), self.gate, quantise)?;
                out = out.select_assign(0, rows_of, y * weights, IndexingUpdateOp::Add);
            }
        }
        Ok(out)
    }

    /// What the router chooses, `used` experts for each row.
    fn choose(&self, logits: Tensor<2>) -> Result<Vec<Choice>, ForwardError> {
        let data = match logits.device().is_autodiff() {
            true => logits.into_data(),
            false => devices::read(logits).map_err(ForwardError::Device)?,
        };
        let logits: Vec<f32> = data.iter::<f32>().collect();
        let rows = logits.chunks_exact(self.experts.len());
        Ok(rows.flat_map(|row| choose(row, self.used, self.renormalise)).collect())
    }

    /// The weights of what was chosen [chosen, 1], as a function of the logits that gradients pass.
    fn tracked_weights(&self, logits: Tensor<2>, chosen: &[Choice]) -> Tensor<2> {
        let (rows, device) = (chosen.len() / self.used, logits.device());
        let experts: Vec<usize> = chosen.iter().map(|choice| choice.expert).collect();
        let experts = indices(&experts, &device).reshape([rows, self.used]);
        let weights = softmax(logits, 1).gather(1, experts);
        let weights = match self.renormalise {
            true => weights.clone() / weights.sum_dim(1),
            false => weights,
        };
        weights.reshape([rows * self.used, 1])
    }
}

impl BitExpert {
    fn forward(&self, x: Tensor<2>, gate: Gate, quantise: bool) -> Result<Tensor<2>, ForwardError> {
        let gate_up = side_by_side(x, None, quantise, &[&self.gate_proj, &self.up_proj])?;
        Ok(self.down_proj.forward_rows(gate.apply(gate_up), quantise)?)
    }
}

/// An expert of a row, and the weight of what it computes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Choice {
    expert: usize,
    weight: f32,
}

/// The experts with the `used` largest logits of a row, in descending order, of equal ones first the one with the lower
/// number; and the softmax of the logits, computed in f64 and rounded once.
fn choose(logits: &[f32], used: usize, renormalise: bool) -> Vec<Choice> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Zeros of both signs are equal.
    let key = |expert: usize| logits[expert] + 0.0;
    order.sort_by(|&a, &b| key(b).total_cmp(&key(a)));
    let top = order.first().map_or(0.0, |&expert| f64::from(logits[expert]));
    let weight = |&expert: &usize| (f64::from(logits[expert]) - top).exp();
    let divided_by = if renormalise { &order[..used] } else { &order[..] };
    let total: f64 = divided_by.iter().map(weight).sum();
    order[..used]
        .iter()
        .map(|expert| Choice { expert: *expert, weight: (weight(expert) / total) as f32 })
        .collect()
}

fn indices(values: &[usize], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.iter().map(|&value| value as i64).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}
