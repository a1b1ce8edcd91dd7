//! Flags that say how tokens are drawn.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};

use bitnet_burn_engine::sampling::SamplingConfig;
use clap::Args;

/// How a token is drawn. Without any of these flags, the most likely one (greedy).
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling (default: greedy, the most likely token)")]
pub struct SamplingArgs {
    /// The most likely token, which is the default
    #[arg(long, conflicts_with = "temperature")]
    greedy: bool,
    /// Divides the logits; 0 is greedy
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Draw from the K most likely tokens only
    #[arg(long, value_name = "K", requires = "temperature")]
    top_k: Option<usize>,
    /// Draw from the most likely tokens that make up this probability
    #[arg(long, value_name = "P", requires = "temperature")]
    top_p: Option<f32>,
    /// Draw from tokens that have at least this fraction of the most likely one's probability
    #[arg(long, value_name = "P", requires = "temperature")]
    min_p: Option<f32>,
    /// Makes tokens that occurred less likely; 1 is off
    #[arg(long, value_name = "R")]
    repeat_penalty: Option<f32>,
    /// How many of the last tokens the penalty looks at; 0 is all of them
    #[arg(long, value_name = "N", requires = "repeat_penalty")]
    repeat_window: Option<usize>,
    /// Seed of the sampler [default: a random one, which is named on stderr]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// `stories`: for the built-in model, which has more than one to tell.
    pub fn config(&self, stories: bool) -> anyhow::Result<SamplingConfig> {
        let mut config = SamplingConfig::greedy();
        if stories && !self.greedy && self.temperature.is_none() {
            (config.temperature, config.top_p) = (0.7, 0.95);
        }
        config.temperature = self.temperature.unwrap_or(config.temperature);
        config.top_k = self.top_k.unwrap_or(config.top_k);
        config.top_p = self.top_p.unwrap_or(config.top_p);
        config.min_p = self.min_p.unwrap_or(config.min_p);
        config.repetition_penalty = self.repeat_penalty.unwrap_or(config.repetition_penalty);
        config.repetition_window = self.repeat_window.unwrap_or(config.repetition_window);
        // The standard library seeds its hash maps at random.
        config.seed = self.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        config.validate()?;
        Ok(config)
    }
}
