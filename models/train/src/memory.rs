//! How much memory a run takes, by its sizes.

use bitnet_burn::{FloatPart, ModelConfig, Norm, Projection};
use burn::tensor::Device;
use serde::Serialize;

use crate::origin::{self, Origin};
use crate::{TrainConfig, TrainError, lora};

/// The memory of a run's parts, in bytes. Activations are an estimate: what the backward pass needs of each layer's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Parameters that are trained.
    pub parameters: u64,
    /// Their floats.
    pub weights: u64,
    /// Their gradients.
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// The ternary values of the projections, which a step computes with.
    pub ternary: u64,
    /// What the layers keep for the backward pass.
    pub activations: u64,
    /// Logits and their gradients; with a teacher also its logits.
    pub logits: u64,
    /// The teacher's weights, as their files hold them.
    pub teacher: u64,
    /// The weights of a model that adapters are trained for, as its files hold them.
    pub base: u64,
}

impl MemoryPlan {
    /// All parts together. The text and its tokens, 4 bytes each, come on top.
    pub fn total(&self) -> u64 {
        let Self {
            parameters: _,
            weights,
            gradients,
            optimizer,
            ternary,
            activations,
            logits,
            teacher,
            base,
        } = *self;
        [weights, gradients, optimizer, ternary, activations, logits, teacher, base]
            .into_iter()
            .fold(0, u64::saturating_add)
    }

    /// The memory of a run with this configuration. Where a tokenizer is trained, the vocabulary counts as full.
    ///
    /// # Errors
    /// If the configuration is wrong, or a model that it names can't be opened.
    pub fn of(mut config: TrainConfig, device: &Device) -> Result<Self, TrainError> {
        if config.model.from.as_os_str().is_empty() {
            config.model.from.clone_from(&config.distill.teacher);
        }
        let origin = Origin::of(&config, device)?;
        let model = match &origin {
            Some(origin) => origin.adopt(&mut config)?,
            None => config.model_config(config.tokenizer.vocab_size, 0),
        };
        config.validate()?;
        let path = &config.distill.teacher;
        let teacher = match path.as_os_str().is_empty() {
            true => 0,
            false => origin::open(path)?.tensors().iter().map(|tensor| tensor.bytes).sum(),
        };
        let plan = Self::of_model(&config, &model, teacher);
        let Some(origin) = origin.filter(|_| config.lora.is_used()) else { return Ok(plan) };
        let parameters = lora::parameters(&config.lora, &model)?;
        // As many copies of each as of the weights.
        let copies = plan.gradients / plan.weights.max(1);
        Ok(Self {
            parameters,
            weights: parameters.saturating_mul(4),
            gradients: parameters.saturating_mul(4).saturating_mul(copies),
            optimizer: parameters.saturating_mul(8),
            ternary: 0,
            base: origin.bytes(),
            ..plan
        })
    }

    fn of_model(config: &TrainConfig, model: &ModelConfig, teacher: u64) -> Self {
        let product = |factors: &[usize]| factors.iter().fold(1u64, |all, &n| all.saturating_mul(n as u64));
        let (mut projections, mut others) = (0u64, 0u64);
        let mut per_row = 0u64;
        for layer in 0..model.n_layers {
            let mut widths = 0u64;
            for which in Projection::of_layer(layer, model) {
                let (n, k) = which.shape(model);
                projections = projections.saturating_add(product(&[n, k]));
                if which.is_read(model) {
                    // The input, normalised and quantised, and the output.
                    widths = widths.saturating_add(n as u64 + k as u64);
                }
            }
            others += Norm::of_layer(layer, model).map(|norm| norm.len(model) as u64).sum::<u64>();
            let floats = FloatPart::of_layer(layer, model).into_iter();
            others += floats.map(|part| product(&part.shape(model))).sum::<u64>();
            // Residuals, norms and gated activations beside the projections.
            let beside = 4 * model.hidden_size as u64 + 2 * model.intermediate_size as u64;
            per_row = per_row.saturating_add(widths).saturating_add(beside);
        }
        let tables = if model.tied_embeddings { 1 } else { 2 };
        others += model.hidden_size as u64 + product(&[tables, model.vocab_size, model.hidden_size]);
        let parameters = projections.saturating_add(others);
        let rows = config.run.batch_size / config.run.accumulate.max(1) * config.sequence_length();
        let layers = model.n_layers.max(1) as u64;
        let activations = match config.run.recompute {
            false => per_row,
            // The inputs of all, and what one layer keeps.
            true => per_row / layers + layers.saturating_mul(model.hidden_size as u64),
        };
        let logits = if teacher > 0 { 6 } else { 3 };
        let accumulated = if config.run.accumulate > 1 { 2 } else { 1 };
        Self {
            parameters,
            weights: parameters.saturating_mul(4),
            gradients: parameters.saturating_mul(4 * accumulated),
            optimizer: parameters.saturating_mul(8),
            ternary: if config.model.ternary { projections.saturating_mul(4) } else { 0 },
            activations: activations.saturating_mul(4).saturating_mul(rows as u64),
            logits: product(&[logits, 4, rows, model.vocab_size]),
            teacher,
            base: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accumulating_saves_activations_alone() {
        let mut config = TrainConfig::default();
        let whole = MemoryPlan::of(config.clone(), &Device::flex()).unwrap();
        // 4 layers of [256, 256], 2 x [128, 256], [256, 256], 2 x [640, 256] and [256, 640]; the embedding; 19 norms.
        let projections = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 640 * 256);
        assert_eq!(whole.parameters, projections + 1024 * 256 + 4 * (3 * 256 + 640) + 256);
        assert_eq!((whole.weights, whole.optimizer), (4 * whole.parameters, 8 * whole.parameters));
        assert_eq!((whole.ternary, whole.logits), (4 * projections, 3 * 4 * 16 * 256 * 1024));
        config.set("run.accumulate=4").unwrap();
        let parts = MemoryPlan::of(config.clone(), &Device::flex()).unwrap();
        assert_eq!((parts.activations, parts.logits), (whole.activations / 4, whole.logits / 4));
        assert!(parts.total() < whole.total() && parts.weights == whole.weights);
        config.set("run.recompute=true").unwrap();
        let recomputed = MemoryPlan::of(config.clone(), &Device::flex()).unwrap();
        assert!(recomputed.activations < parts.activations && recomputed.logits == parts.logits);
        config.set("run.batch_size=0").unwrap();
        assert!(MemoryPlan::of(config, &Device::flex()).is_err());
    }
}
