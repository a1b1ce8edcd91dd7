//! Initial scales for a float model that becomes ternary: those that keep the outputs of its layers on a text.
//!
//! For each set of weights that share a scale, several thresholds t are tried. A weight w becomes 0 if |w| <= t, else
//! sign(w) * s, with the s of least squared error where each input is as large as the text makes it (its mean square). The
//! best threshold is kept. Latent weights are then stretched, in order and without a jump, so that absmean makes exactly these
//! codes and this scale.

use std::collections::BTreeMap;

use bitnet_burn::backends::ops;
use bitnet_burn::formats::quant::EPSILON;
use bitnet_burn::{
    BitNet, CacheType, ForwardError, ModelConfig, Norm, Projection, Quantisation, Row, Stage, WeightScale,
    names,
};
use burn::tensor::{Device, Tensor, TensorData};

use crate::TrainError;
use crate::origin::Origin;

/// How much of a projection's output ternary weights lose, before training: the squared error of its outputs on a text,
/// relative to their squares.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct LayerFit {
    /// The layer.
    pub layer: usize,
    /// The projection: `q`, `down` ...
    pub projection: &'static str,
    /// With the scales that absmean makes of the float weights.
    pub absmean_error: f64,
    /// With the chosen scales.
    pub error: f64,
}

/// What a student begins with in place of its origin's weights.
pub(crate) struct Calibration {
    /// By the parameter's name.
    pub values: BTreeMap<String, Vec<f32>>,
    pub fits: Vec<LayerFit>,
}

/// Rows of a projection's input: [M, K].
struct Inputs {
    rows: Vec<f32>,
    k: usize,
}

impl Inputs {
    /// The mean square of each column.
    fn moments(&self) -> Vec<f64> {
        let mut moments = vec![0.0; self.k];
        for row in self.rows.chunks_exact(self.k) {
            moments.iter_mut().zip(row).for_each(|(moment, x)| *moment += f64::from(x * x));
        }
        let count = (self.rows.len() / self.k).max(1) as f64;
        moments.iter_mut().for_each(|moment| *moment /= count);
        moments
    }

    /// Each row divided by its root mean square and multiplied by the gains.
    fn normalised(&self, gains: &[f32], eps: f32) -> Self {
        let mut rows = self.rows.clone();
        for row in rows.chunks_exact_mut(self.k) {
            let square = row.iter().map(|x| x * x).sum::<f32>() / self.k as f32;
            let factor = 1.0 / (square + eps).sqrt();
            row.iter_mut().zip(gains).for_each(|(x, gain)| *x *= factor * gain);
        }
        Self { rows, k: self.k }
    }

    fn tensor(&self, device: &Device) -> Tensor<2> {
        let shape = [self.rows.len() / self.k, self.k];
        Tensor::from_data(TensorData::new(self.rows.clone(), shape), device)
    }
}

/// Chooses the scales of all projections of attention and of feed-forward networks without experts, and the gains of
/// sub-norms that the origin lacks. `model` is the origin as it computes, `tokens` a sequence of a text.
pub(crate) fn calibrate(
    (origin, model): (&Origin, &BitNet),
    student: &ModelConfig,
    quantisation: Quantisation,
    tokens: &[u32],
) -> Result<Calibration, TrainError> {
    let device = model.device();
    let mut cache = model.cache(tokens.len(), CacheType::F32).map_err(ForwardError::from)?;
    let sequence = cache.add_sequence(tokens.len());
    let rows: Vec<Row> =
        tokens.iter().enumerate().map(|(position, &token)| Row { token, sequence, position }).collect();
    let (_, seen) = model.forward_seen(&rows, &mut cache)?;
    drop(cache);
    let mut values = BTreeMap::new();
    let mut fits = Vec::new();
    let (config, eps) = (model.config(), model.config().rms_norm_eps);
    for layer in 0..config.n_layers {
        let at = |stage: Stage| -> Option<Inputs> {
            let found = seen.iter().find(|seen| seen.layer == layer && seen.stage == stage)?;
            let k = found.values.dims()[1];
            Some(Inputs { rows: found.values.clone().into_data().iter::<f32>().collect(), k })
        };
        let behind = |stage: Stage, norm: Norm| -> Result<Option<Inputs>, TrainError> {
            let Some(inputs) = at(stage) else { return Ok(None) };
            let gains = origin.values(&names::norm_name(norm), &[inputs.k])?;
            Ok(Some(inputs.normalised(&gains, eps)))
        };
        let attention = behind(Stage::Input, Norm::Attention(layer))?;
        let feed_forward = behind(Stage::Middle, Norm::FeedForward(layer))?;
        let (context, gated) = (at(Stage::Context), at(Stage::Gated));
        for which in Projection::of_layer(layer, config) {
            let (inputs, sub_norm) = match which {
                Projection::Q | Projection::K | Projection::V => (&attention, None),
                Projection::Gate | Projection::Up => (&feed_forward, None),
                Projection::O => (&context, Some(Norm::AttentionSub(layer))),
                Projection::Down => (&gated, Some(Norm::FeedForwardSub(layer))),
                _ => continue,
            };
            let (n, k) = which.shape(config);
            let Some(inputs) = inputs.as_ref().filter(|inputs| inputs.k == k) else { continue };
            let name = names::projection_name(layer, which);
            let weights = origin.values(&name, &[n, k])?;
            // What the student's projection sees: behind a sub-norm, which keeps the size of its inputs on the whole.
            let new_norm =
                sub_norm.map(names::norm_name).filter(|norm| student.sub_norms && !origin.has(norm));
            let own = new_norm.map(|norm| {
                let moments = inputs.moments();
                let size = (moments.iter().sum::<f64>() / k as f64).sqrt().max(1e-6) as f32;
                let gains = vec![size; k];
                let own = inputs.normalised(&gains, eps);
                values.insert(norm, gains);
                own
            });
            let own = own.as_ref().unwrap_or(inputs);
            let wanted = inputs.tensor(&device).matmul(matrix(&weights, n, k, &device).transpose());
            let size = sum_of_squares(wanted.clone());
            let error = |weights: &[f32]| {
                let ternary = ops::ternarise(matrix(weights, n, k, &device), quantisation.scale);
                let found = own.tensor(&device).matmul(ternary.transpose());
                sum_of_squares(found - wanted.clone()) / size.max(f64::MIN_POSITIVE)
            };
            let stretched = stretched(&weights, &own.moments(), quantisation.scale, (n, k));
            let (absmean_error, chosen) = (error(&weights), error(&stretched));
            let better = chosen < absmean_error;
            fits.push(LayerFit {
                layer,
                projection: which.name(),
                absmean_error,
                error: if better { chosen } else { absmean_error },
            });
            if better {
                values.insert(name, stretched);
            }
        }
    }
    Ok(Calibration { values, fits })
}

fn matrix(values: &[f32], n: usize, k: usize, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values.to_vec(), [n, k]), device)
}

fn sum_of_squares(tensor: Tensor<2>) -> f64 {
    tensor.into_data().iter::<f32>().map(|x| f64::from(x) * f64::from(x)).sum()
}

/// Latent weights [n, k] of which absmean makes the chosen codes and scales; `moments` are the mean squares of the inputs.
fn stretched(weights: &[f32], moments: &[f64], scale: WeightScale, (n, k): (usize, usize)) -> Vec<f32> {
    let run = scale.run(n, k).max(1);
    let mut all = Vec::with_capacity(weights.len());
    for (number, weights) in weights.chunks(run).enumerate() {
        let start = number * run;
        let moment = |i: usize| moments[(start + i) % k];
        match choose(weights, moment) {
            Some((threshold, scale)) => all.extend(stretch(weights, threshold, scale)),
            None => all.extend(weights),
        }
    }
    all
}

/// The best threshold and its scale, if there is one that absmean can make.
fn choose(weights: &[f32], moment: impl Fn(usize) -> f64) -> Option<(f64, f64)> {
    let mean = weights.iter().map(|w| f64::from(w.abs())).sum::<f64>() / weights.len().max(1) as f64;
    let candidates = (5..=30).map(|i| mean * f64::from(i) * 0.05);
    let of = |threshold: f64| {
        let (mut products, mut squares) = (0.0, 0.0);
        for (i, w) in weights.iter().enumerate() {
            let size = f64::from(w.abs());
            if size > threshold {
                products += moment(i) * size;
                squares += moment(i);
            }
        }
        // What the squared error is smaller by than that of zeros.
        (squares > 0.0).then(|| (products * products / squares, threshold, products / squares))
    };
    let best = candidates.filter_map(of).max_by(|a, b| a.0.total_cmp(&b.0));
    best.map(|(_, threshold, scale)| (threshold, scale))
        .filter(|(_, scale)| scale.is_finite() && *scale > 2.0 * f64::from(EPSILON))
}

/// The weights with |w| <= threshold below half of the scale, the others above it, and a mean of |w| that is the scale.
fn stretch(weights: &[f32], threshold: f64, scale: f64) -> Vec<f32> {
    // A little apart from the half, which rounding decides.
    let (below, above) = (scale * 0.499, scale * 0.501);
    let small = |size: f64| size / threshold * below;
    let (mut sum_small, mut count, mut excess) = (0.0, 0.0, 0.0);
    for w in weights {
        let size = f64::from(w.abs());
        if size <= threshold {
            sum_small += small(size);
        } else {
            count += 1.0;
            excess += size - threshold;
        }
    }
    let slope = (scale * weights.len() as f64 - sum_small - above * count) / excess;
    let stretch = |w: &f32| {
        let size = f64::from(w.abs());
        let new = if size <= threshold { small(size) } else { above + slope * (size - threshold) };
        (new as f32).copysign(*w)
    };
    weights.iter().map(stretch).collect()
}

#[cfg(test)]
mod tests {
    use bitnet_burn::formats::quant;
    use bitnet_burn::formats::random::SplitMix64;

    use super::*;

    fn weights(count: usize) -> Vec<f32> {
        let mut random = SplitMix64::new(3);
        let mut uniform = || (random.next_u64() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        (0..count).map(|_| uniform() + uniform() + uniform()).collect()
    }

    #[test]
    fn absmean_makes_the_chosen_codes_and_scale_of_stretched_weights() {
        let weights = weights(4096);
        let (threshold, scale) = choose(&weights, |_| 1.0).unwrap();
        let stretched = stretch(&weights, threshold, scale);
        let found = quant::absmean_scale(&stretched);
        assert!((f64::from(found) / scale - 1.0).abs() < 1e-5, "{found} {scale}");
        let error =
            |of: &dyn Fn(f32) -> f32| -> f64 { weights.iter().map(|&w| f64::from(w - of(w)).powi(2)).sum() };
        for (w, new) in weights.iter().zip(&stretched) {
            let code = (new / found).round_ties_even().clamp(-1.0, 1.0);
            let expected = if f64::from(w.abs()) > threshold { w.signum() } else { 0.0 };
            assert!(code == expected && (new * w > 0.0 || *w == 0.0), "{w} {new}");
        }
        let absmean = quant::absmean_scale(&weights);
        let plain = error(&|w| (w / absmean).round_ties_even().clamp(-1.0, 1.0) * absmean);
        let chosen = error(&|w| if f64::from(w.abs()) > threshold { w.signum() * scale as f32 } else { 0.0 });
        assert!(chosen < 0.9 * plain, "{chosen} {plain}");
    }

    #[test]
    fn inputs_that_are_large_count_more() {
        // The first column alone has inputs: its weight decides.
        let weights = [0.4, 1.0, 1.0, 1.0];
        let (_, scale) = choose(&weights, |i| if i == 0 { 1.0 } else { 1e-6 }).unwrap();
        assert!((scale - 0.4).abs() < 1e-3, "{scale}");
        assert!(choose(&[0.0; 8], |_| 1.0).is_none());
        assert_eq!(stretched(&[0.0; 8], &[1.0; 4], WeightScale::Row, (2, 4)), [0.0; 8]);
    }
}
