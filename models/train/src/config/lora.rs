//! What is said of adapters.

use serde::{Deserialize, Serialize};

use super::{ModelOptions, TrainConfig};
use crate::TrainError;

/// LoRA (arXiv 2106.09685): the model that `model.from` names stays as it is, and low-rank adapters of its projections are
/// trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LoraOptions {
    /// Rank of the adapters. 0: none; the weights are trained.
    pub rank: usize,
    /// An adapter's output is multiplied by alpha / rank; 0: by 1.
    pub alpha: f64,
    /// By alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    pub rank_stabilised: bool,
    /// The projections that get one: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`, or
    /// `all-linear`.
    pub targets: Vec<String>,
}

impl Default for LoraOptions {
    fn default() -> Self {
        Self { rank: 0, alpha: 0.0, rank_stabilised: false, targets: vec!["all-linear".into()] }
    }
}

impl LoraOptions {
    /// Whether adapters are trained, and nothing else.
    pub fn is_used(&self) -> bool {
        self.rank > 0
    }

    /// [`alpha`](Self::alpha) with its default.
    pub fn alpha(&self) -> f64 {
        match (self.alpha, self.rank_stabilised) {
            (0.0, false) => self.rank as f64,
            (0.0, true) => (self.rank as f64).sqrt(),
            (alpha, _) => alpha,
        }
    }

    /// Whether a run can have this.
    pub(super) fn check(&self, config: &TrainConfig) -> Result<(), TrainError> {
        let fail =
            |key: &str, problem: String| Err(TrainError::Config { place: format!("`lora.{key}`"), problem });
        let (lora, model) = (self, &config.model);
        if !lora.is_used() {
            return match *lora == LoraOptions::default() {
                true => Ok(()),
                false => fail("rank", "is 0, and other options of adapters are set; set it, too".into()),
            };
        }
        let with = |problem: &str| fail("rank", format!("is {}; {problem}", lora.rank));
        if model.from.as_os_str().is_empty() {
            return with("adapters need a model to begin with (`model.from`)");
        }
        if !config.distill.teacher.as_os_str().is_empty() || config.distill.sub_norms {
            return with("a distillation trains weights, not adapters");
        }
        if !model.ternary || model.scales != ModelOptions::default().scales || model.quantisation_warmup > 0 {
            return with(
                "the model's weights stay as they are: leave `model.ternary`, `model.scales` and \
                         `model.quantisation_warmup`",
            );
        }
        if lora.rank > 4096 {
            return with("it must be at most 4096");
        }
        if !(0.0..=1e6).contains(&lora.alpha) {
            return fail("alpha", format!("is {}; it must lie between 0 and 1e6", lora.alpha));
        }
        if lora.targets.is_empty() {
            return fail("targets", "is empty; name projections, or all-linear".into());
        }
        Ok(())
    }
}
