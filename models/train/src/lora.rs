//! LoRA: a model stays as it is, packed and on the kernels that serve it, and low-rank adapters of its projections are trained
//! (arXiv 2106.09685).

use std::path::Path;

use bitnet_burn::{Adapter, AdapterValues, BitNet, ModelConfig};
use bitnet_burn_engine::adapter::{self, AdaptedProjection, AdapterError, AdapterOptions, targets_named};
use bitnet_burn_formats::random::SplitMix64;
use burn::module::Module;

use crate::config::LoraOptions;
use crate::origin::Origin;
use crate::{TrainConfig, TrainError};

/// What the configuration asks for, in PEFT's terms.
fn options(config: &TrainConfig) -> AdapterOptions {
    let LoraOptions { rank, rank_stabilised, .. } = config.lora;
    let base = config.model.from.display().to_string();
    AdapterOptions { rank, alpha: config.lora.alpha(), rank_stabilised, base }
}

/// Adapters that change nothing yet, as PEFT begins: B is zero, and A uniform up to 1 / sqrt(input features).
pub(crate) fn fresh(
    config: &TrainConfig,
    model: &ModelConfig,
) -> Result<Vec<AdaptedProjection>, AdapterError> {
    let (rank, scale) = (config.lora.rank, options(config).scale());
    let mut random = SplitMix64::new(config.seed);
    let of = |(layer, which): (usize, bitnet_burn::Projection)| {
        let (n, k) = which.shape(model);
        let width = 2.0 / (k as f64).sqrt();
        let mut uniform = || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
        let a = (0..rank * k).map(|_| (uniform() * width) as f32).collect();
        let values = AdapterValues { a, b: vec![0.0; n * rank], rank, scale };
        AdaptedProjection { layer, which, values }
    };
    Ok(targets_named(&config.lora.targets, model)?.into_iter().map(of).collect())
}

/// The adapters of a checkpoint of a run.
pub(crate) fn resumed(
    checkpoint: &Path,
    config: &TrainConfig,
    model: &ModelConfig,
) -> Result<Vec<AdaptedProjection>, TrainError> {
    let read = adapter::Adapter::open(checkpoint, model)?;
    let expected = targets_named(&config.lora.targets, model)?;
    let found = read.projections().iter().map(|of| (of.layer, of.which));
    if !found.eq(expected) || read.projections().iter().any(|of| of.values.rank != config.lora.rank) {
        let problem = "its adapter is for other projections, or of another rank, than the configuration says";
        return Err(TrainError::Checkpoint { path: checkpoint.to_owned(), problem: problem.into() });
    }
    Ok(read.projections().to_vec())
}

/// The origin as it computes, frozen, with adapters that are trained.
pub(crate) fn model(
    origin: &Origin,
    config: &TrainConfig,
    adapters: &[AdaptedProjection],
) -> Result<BitNet, TrainError> {
    let mut model = origin.frozen(config.model.activations)?.train().freeze();
    // Numbered, so that an optimiser's state finds them again in another process.
    for (number, AdaptedProjection { layer, which, values }) in adapters.iter().enumerate() {
        let block = &mut model.blocks[*layer];
        let device = block.device().autodiff();
        let ids = [2 * number as u64 + 1, 2 * number as u64 + 2];
        for (_, linear) in block.projections_mut().into_iter().filter(|(found, _)| found == which) {
            *linear = linear.clone().with_adapter(Adapter::trainable(values, ids, &device));
        }
    }
    Ok(model)
}

/// Writes the adapters of a model in training.
pub(crate) fn write(dir: &Path, config: &TrainConfig, model: &BitNet) -> Result<(), AdapterError> {
    let mut projections = Vec::new();
    for (layer, block) in model.blocks.iter().enumerate() {
        for (which, linear) in block.projections() {
            if let Some(values) = linear.adapter.as_ref().and_then(Adapter::values) {
                projections.push(AdaptedProjection { layer, which, values });
            }
        }
    }
    adapter::write(dir, &options(config), &projections)
}

/// The number of values that are trained.
pub(crate) fn parameters(lora: &LoraOptions, model: &ModelConfig) -> Result<u64, AdapterError> {
    let of = |(_, which): (usize, bitnet_burn::Projection)| {
        let (n, k) = which.shape(model);
        (n as u64 + k as u64).saturating_mul(lora.rank as u64)
    };
    Ok(targets_named(&lora.targets, model)?.into_iter().map(of).sum())
}
