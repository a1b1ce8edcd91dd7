//! A mixture of experts (Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538): many feed-forward
//! networks, of which a router chooses a few for each row.

use bitnet_burn_backends::{GatedActivation, devices, ops};
use burn::config::Config;
use burn::module::{Initializer, Module};
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::bit_linear::{check_features, in_dtype, in_f32, side_by_side};
use crate::feed_forward::Gate;
use crate::{ActivationRule, BitLinear, BitLinearConfig, DenseMatrix, ForwardError, WeightScale};

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
    /// What joins gate and up. Default: BitNet's squared ReLU.
    #[config(default = "GatedActivation::Relu2")]
    pub activation: GatedActivation,
    /// Gates are at most this, and what they are multiplied by lies between minus this and this.
    pub clamp: Option<f32>,
    /// Weights of a projection that share a scale.
    #[config(default = "WeightScale::Tensor")]
    pub scale: WeightScale,
    /// How the projections' activations are quantised.
    #[config(default = "ActivationRule::Model")]
    pub activations: ActivationRule,
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
/// so that its result does not depend on the rows beside it. That of a [shared expert](SharedExpert) comes last.
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
    /// What every row passes beside its experts, if there is something.
    pub shared: Option<SharedExpert>,
    used: usize,
    renormalise: bool,
    #[module(skip)]
    gate: Gate,
}

/// An expert that computes every row (Qwen2 MoE): sigmoid(gate * x) * down(activation(gate_proj(x)) * up(x)).
#[derive(Module, Debug)]
pub struct SharedExpert {
    /// Its projections.
    pub expert: BitExpert,
    /// [1, hidden_size]; it sees float activations.
    pub gate: DenseMatrix,
}

impl SharedExpert {
    /// One of given parts: gate, up and down projections, and the gate of the whole.
    pub fn assemble([gate_proj, up_proj, down_proj]: [BitLinear; 3], gate: DenseMatrix) -> Self {
        Self { expert: BitExpert { gate_proj, up_proj, down_proj }, gate }
    }

    fn forward(&self, x: Tensor<2>, gate: Gate, quantise: bool) -> Result<Tensor<2>, ForwardError> {
        let logits = self.gate.forward(x.clone());
        let ones = Tensor::ones(logits.dims(), &logits.device());
        let weights = ops::gated(Tensor::cat(vec![logits, ones], 1), GatedActivation::Sigmoid);
        Ok(self.expert.forward(x, gate, quantise)? * weights)
    }
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
    pub fn init(&self, device: &Device) -> BitExperts {
        let linear = |d_in, d_out| {
            let config = BitLinearConfig::new(d_in, d_out);
            config.with_scale(self.scale).with_activations(self.activations).init(device)
        };
        let up = || linear(self.hidden_size, self.intermediate_size);
        let down = || linear(self.intermediate_size, self.hidden_size);
        let experts = (0..self.experts).map(|_| [up(), up(), down()]).collect();
        let shape = [self.experts, self.hidden_size];
        let initializer = Initializer::KaimingUniform { gain: 1.0 / 3f64.sqrt(), fan_out_only: false };
        let router = initializer.init_with(shape, Some(self.hidden_size), Some(self.experts), device);
        let norm = RmsNormConfig::new(self.hidden_size).with_epsilon(self.eps).init(device);
        self.assemble(norm, DenseMatrix::trainable(router), experts)
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
            shared: None,
            used,
            renormalise: self.renormalise,
            gate: Gate { activation: self.activation, clamp: self.clamp },
        }
    }
}

impl BitExperts {
    /// The same with a shared expert.
    pub fn with_shared(self, shared: Option<SharedExpert>) -> Self {
        Self { shared, ..self }
    }

    /// The layer's contribution to the residual stream. Input and output: [rows, hidden_size].
    ///
    /// The router's choice is made on the host: a GPU is waited for.
    ///
    /// # Errors
    /// If a kernel refuses, or a device fails.
    pub fn forward(&self, x: Tensor<2>, quantise: bool) -> Result<Tensor<2>, ForwardError> {
        check_features("BitExperts", self.router.args().k, &x.dims());
        let device = x.device();
        let [rows, _] = x.dims();
        if rows == 0 {
            return Ok(x);
        }
        let dtype = x.dtype();
        let x = ops::rms_norm(in_f32(x), self.input_norm.gamma.val(), self.input_norm.epsilon as f32);
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
        match &self.shared {
            Some(shared) => Ok(in_dtype(out + shared.forward(x, self.gate, quantise)?, dtype)),
            None => Ok(in_dtype(out, dtype)),
        }
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

#[cfg(test)]
mod tests {
    use burn::module::{Param, ParamId};

    use super::*;

    fn chosen(logits: &[f32], used: usize, renormalise: bool) -> Vec<(usize, f32)> {
        choose(logits, used, renormalise).into_iter().map(|choice| (choice.expert, choice.weight)).collect()
    }

    #[test]
    fn of_equal_logits_the_lower_number_comes_first() {
        let experts = |logits: &[f32], used| -> Vec<usize> {
            choose(logits, used, true).into_iter().map(|choice| choice.expert).collect()
        };
        assert_eq!(experts(&[1.0, 3.0, 2.0, 3.0, 3.0], 2), [1, 3]);
        assert_eq!(experts(&[0.0, -0.0, 0.0, -1.0], 3), [0, 1, 2]);
        assert_eq!(experts(&[-0.0, 0.0], 1), [0]);
        assert_eq!(experts(&[5.0, 5.0, 5.0], 3), [0, 1, 2]);
        assert_eq!(experts(&[f32::NEG_INFINITY, 0.0], 2), [1, 0]);
    }

    #[test]
    fn weights_are_the_softmax_over_all_or_over_the_chosen() {
        let ln = |v: f32| v.ln();
        let logits = [ln(1.0), ln(4.0), ln(2.0), ln(1.0)];
        let close = |got: Vec<(usize, f32)>, want: [(usize, f32); 2]| {
            for (got, want) in got.iter().zip(want) {
                assert!(got.0 == want.0 && (got.1 - want.1).abs() < 1e-6, "{got:?} {want:?}");
            }
        };
        close(chosen(&logits, 2, false), [(1, 0.5), (2, 0.25)]);
        close(chosen(&logits, 2, true), [(1, 2.0 / 3.0), (2, 1.0 / 3.0)]);
        // Logits that no exponential holds.
        close(chosen(&[3000.0, -3000.0, 3000.0], 2, false), [(0, 0.5), (2, 0.5)]);
        // One expert has all of the weight if it is renormalised.
        assert_eq!(chosen(&logits, 1, true), [(1, 1.0)]);
        assert!(choose(&[0.0, f32::NAN, 1.0], 2, true)[0].weight.is_nan());
    }

    /// Numbers between -1 and 1 that look random and are the same everywhere.
    fn numbers(seed: usize, count: usize) -> Vec<f32> {
        let number = |i: usize| (((seed * 31 + i + 1) as u64).wrapping_mul(2_654_435_761) >> 8) % 20_011;
        (0..count).map(|i| number(i) as f32 / 10_005.0 - 1.0).collect()
    }

    fn layer(experts: usize, used: usize, renormalise: bool, device: &Device) -> BitExperts {
        let matrix = |seed: usize, [n, k]: [usize; 2], scale: f32| {
            let values = numbers(seed, n * k).into_iter().map(|v| v * scale).collect();
            Param::from_tensor(Tensor::<2>::from_data(TensorData::new(values, [n, k]), device))
        };
        let expert = |e: usize| {
            let of = |part: usize, shape| BitLinear::latent(matrix(3 * e + part, shape, 0.4));
            [of(0, [24, 16]), of(1, [24, 16]), of(2, [16, 24])]
        };
        BitExpertsConfig::new(16, 24, experts, used)
            .with_renormalise(renormalise)
            .with_activation(GatedActivation::Silu)
            .with_clamp(Some(0.5))
            .assemble(
                RmsNormConfig::new(16).init(device),
                DenseMatrix::trainable(matrix(999, [experts, 16], 1.0)),
                (0..experts).map(expert).collect(),
            )
    }

    fn rows(count: usize, device: &Device) -> Tensor<2> {
        Tensor::from_data(TensorData::new(numbers(5000, count * 16), [count, 16]), device)
    }

    fn values(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    /// The formula, an expert and a row at a time.
    fn naive(layer: &BitExperts, x: &Tensor<2>, quantise: bool) -> Vec<f32> {
        let x = ops::rms_norm(x.clone(), layer.input_norm.gamma.val(), layer.input_norm.epsilon as f32);
        let mut out = Vec::new();
        for row in 0..x.dims()[0] {
            let x = x.clone().slice([row..row + 1, 0..16]);
            let logits = values(layer.router.forward(x.clone()));
            let mut choices = choose(&logits, layer.used, layer.renormalise);
            choices.sort_by_key(|choice| choice.expert);
            let mut sum = vec![0f32; 16];
            for Choice { expert, weight } in choices {
                let expert = &layer.experts[expert];
                let gate = values(expert.gate_proj.forward_rows(x.clone(), quantise).unwrap());
                let up = values(expert.up_proj.forward_rows(x.clone(), quantise).unwrap());
                let clamp = layer.gate.clamp.unwrap();
                let inner = gate.iter().zip(up).map(|(&gate, up)| {
                    let gate = gate.min(clamp);
                    gate / (1.0 + (-gate).exp()) * up.clamp(-clamp, clamp)
                });
                let inner = TensorData::new(inner.collect::<Vec<f32>>(), [1, 24]);
                let inner = Tensor::from_data(inner, &x.device());
                let y = values(expert.down_proj.forward_rows(inner, quantise).unwrap());
                sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += weight * y);
            }
            out.extend(sum);
        }
        out
    }

    #[test]
    fn the_layer_is_the_formula() {
        let device = Device::flex();
        for (experts, used, renormalise) in [(1, 1, true), (5, 2, true), (5, 2, false), (4, 4, true)] {
            let layer = layer(experts, used, renormalise, &device);
            let x = rows(9, &device);
            let want = naive(&layer, &x, false);
            for (i, (got, want)) in values(layer.forward(x, false).unwrap()).iter().zip(want).enumerate() {
                assert!((got - want).abs() < 1e-5, "{experts}, {used}, {i}: {got} {want}");
            }
        }
    }

    fn shared(device: &Device) -> SharedExpert {
        let matrix = |seed: usize, [n, k]: [usize; 2], scale: f32| {
            let values = numbers(seed, n * k).into_iter().map(|v| v * scale).collect();
            Param::from_tensor(Tensor::<2>::from_data(TensorData::new(values, [n, k]), device))
        };
        let of = |seed, shape| BitLinear::latent(matrix(seed, shape, 0.4));
        let gate = DenseMatrix::trainable(matrix(1999, [1, 16], 1.0));
        SharedExpert::assemble([of(2000, [40, 16]), of(2100, [40, 16]), of(2200, [16, 40])], gate)
    }

    #[test]
    fn a_shared_expert_is_added_with_the_sigmoid_of_its_gate() {
        let device = Device::flex();
        let layer = layer(5, 2, true, &device);
        let x = rows(9, &device);
        let alone = values(layer.forward(x.clone(), false).unwrap());
        let both = layer.with_shared(Some(shared(&device)));
        let got = values(both.forward(x.clone(), false).unwrap());
        let of = |seed, count: usize, scale: f64| -> Vec<f64> {
            numbers(seed, count).into_iter().map(|v| f64::from(v) * scale).collect()
        };
        let product = |w: &[f64], x: &[f64]| -> Vec<f64> {
            w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
        };
        let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
        for (row, x) in values(x).chunks(16).enumerate() {
            let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let scale = (x.iter().map(|x| x * x).sum::<f64>() / 16.0 + both.input_norm.epsilon).sqrt();
            let x: Vec<f64> = x.iter().map(|x| x / scale).collect();
            let weight = sigmoid(product(&of(1999, 16, 1.0), &x)[0]);
            let (gate, up) = (product(&of(2000, 640, 0.4), &x), product(&of(2100, 640, 0.4), &x));
            let inner = gate.iter().zip(up).map(|(&g, u)| {
                let g = g.min(0.5);
                g * sigmoid(g) * u.clamp(-0.5, 0.5)
            });
            let y = product(&of(2200, 640, 0.4), &inner.collect::<Vec<f64>>());
            for (i, y) in y.into_iter().enumerate() {
                let (got, want) = (f64::from(got[row * 16 + i]), f64::from(alone[row * 16 + i]) + weight * y);
                assert!((got - want).abs() < 1e-5, "{row}, {i}: {got} {want}");
            }
        }
    }

    #[test]
    fn gradients_pass_the_gate_of_the_shared_expert() {
        let device = Device::flex().autodiff();
        let x = rows(6, &device);
        let layer = layer(4, 2, true, &device);
        let total = |shared: SharedExpert| {
            let y = layer.clone().with_shared(Some(shared)).forward(x.clone(), false).unwrap();
            (y.clone() * y).sum()
        };
        let of = shared(&device);
        let crate::DenseWeight::Float(gate) = &of.gate.weight else { panic!("training") };
        let gradients = total(of.clone()).backward();
        let got: Vec<f32> =
            gate.val().grad(&gradients).expect("of the gate").into_data().iter::<f32>().collect();
        let weights: Vec<f32> = gate.val().into_data().iter::<f32>().collect();
        for at in [0, 7, 15] {
            let moved = |by: f32| {
                let mut weights = weights.clone();
                weights[at] += by;
                let weights = Tensor::<2>::from_data(TensorData::new(weights, [1, 16]), &device);
                let gate = DenseMatrix::trainable(Param::initialized(ParamId::new(), weights));
                f64::from(total(SharedExpert { gate, ..of.clone() }).into_scalar::<f32>())
            };
            let want = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            let got = f64::from(got[at]);
            assert!((got - want).abs() < 0.02 * want.abs().max(0.01), "{at}: {got} {want}");
        }
        let crate::BitLinearWeight::Latent(down) = &of.expert.down_proj.weight else { panic!("training") };
        assert!(down.val().grad(&gradients).is_some(), "the shared expert learns");
    }

    /// A row's experts one by one, their contributions added in ascending order of the numbers, or in descending order.
    fn added(layer: &BitExperts, x: &Tensor<2>, ascending: bool) -> Vec<f32> {
        let x = ops::rms_norm(x.clone(), layer.input_norm.gamma.val(), layer.input_norm.epsilon as f32);
        let mut choices = layer.choose(layer.router.forward(x.clone())).unwrap();
        choices.sort_by_key(|choice| choice.expert);
        if !ascending {
            choices.reverse();
        }
        let mut sum = vec![0f32; 16];
        for Choice { expert, weight } in choices {
            let y = values(layer.experts[expert].forward(x.clone(), layer.gate, true).unwrap());
            sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += weight * y);
        }
        sum
    }

    #[test]
    fn rows_do_not_depend_on_the_rows_beside_them() {
        let device = Device::flex();
        let layer = layer(5, 3, true, &device);
        let pack = |linear: &BitLinear| linear.clone().pack().unwrap();
        let packed = layer.experts.iter().map(|expert| BitExpert {
            gate_proj: pack(&expert.gate_proj),
            up_proj: pack(&expert.up_proj),
            down_proj: pack(&expert.down_proj),
        });
        let (experts, router) = (packed.collect(), layer.router.clone().into_stored());
        let layer = BitExperts { experts, router, ..layer };
        let x = rows(37, &device);
        let whole = values(layer.forward(x.clone(), true).unwrap());
        for chunk in [1, 2, 5, 36] {
            for from in (0..37).step_by(chunk) {
                let to = (from + chunk).min(37);
                let part = values(layer.forward(x.clone().slice([from..to, 0..16]), true).unwrap());
                assert_eq!(part, whole[from * 16..to * 16], "rows {from}..{to}");
            }
        }
        // The order of the sum is the documented one, and another would show.
        let by_row = |ascending| -> Vec<f32> {
            (0..37)
                .flat_map(|row| added(&layer, &x.clone().slice([row..row + 1, 0..16]), ascending))
                .collect()
        };
        assert_eq!(by_row(true), whole);
        assert_ne!(by_row(false), whole);
    }

    #[test]
    fn gradients_pass_the_weights_of_the_experts() {
        for renormalise in [true, false] {
            let device = Device::flex().autodiff();
            let layer = layer(4, 2, renormalise, &device);
            let x = rows(6, &device);
            let total = |layer: &BitExperts| {
                let y = layer.forward(x.clone(), false).unwrap();
                // Outputs that count differently.
                (y.clone() * y).sum()
            };
            let crate::DenseWeight::Float(router) = &layer.router.weight else { panic!("training") };
            let gradients = total(&layer).backward();
            let got: Vec<f32> =
                router.val().grad(&gradients).expect("of the router").into_data().iter::<f32>().collect();
            let weights: Vec<f32> = router.val().into_data().iter::<f32>().collect();
            for at in [0, 17, 40, 63] {
                let moved = |by: f32| {
                    let mut weights = weights.clone();
                    weights[at] += by;
                    let weights = Tensor::<2>::from_data(TensorData::new(weights, [4, 16]), &device);
                    let router = DenseMatrix::trainable(Param::initialized(ParamId::new(), weights));
                    f64::from(total(&BitExperts { router, ..layer.clone() }).into_scalar::<f32>())
                };
                let want = (moved(1e-3) - moved(-1e-3)) / 2e-3;
                let got = f64::from(got[at]);
                assert!(
                    (got - want).abs() < 0.02 * want.abs().max(0.01),
                    "{renormalise}, {at}: {got} {want}"
                );
            }
            let crate::BitLinearWeight::Latent(gate) = &layer.experts[0].gate_proj.weight else {
                panic!("training")
            };
            assert!(gate.val().grad(&gradients).is_some(), "an expert that has rows learns");
        }
    }
}
