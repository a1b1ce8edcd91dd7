//! The shape of a model: one configuration for every kind of file.
//!
//! GGUF metadata and Hugging Face's `config.json` both become a [`ModelConfig`]; the model is built from
//! it alone. Names are those of the Hugging Face configuration where the two differ.

use bitnet_burn_backends::{CacheType, GatedActivation};
use serde::{Deserialize, Serialize};

use crate::{DeltaNet, Experts, FloatPart, Projection, RopeScaling, SlidingWindows};

/// A field of a [`ModelConfig`] that no model can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
#[non_exhaustive]
pub struct ConfigError {
    /// The field of [`ModelConfig`].
    pub field: &'static str,
    /// What is wrong with it, with the numbers.
    pub problem: String,
}

/// Everything about a model but its weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// What the file calls it: `bitnet-b1.58`, `bitnet-25`, `bitnet` (GGUF); `bitnet`, `llama` (Hugging Face).
    pub architecture: String,
    /// The model's name, where the file has one.
    pub name: Option<String>,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; each serves `n_heads / n_kv_heads` query heads.
    pub n_kv_heads: usize,
    /// Width of a head; even, since RoPE rotates pairs.
    pub head_dim: usize,
    /// Number of tokens: rows of the embedding.
    pub vocab_size: usize,
    /// Positions that the model was trained for.
    pub context_length: usize,
    /// Base of the RoPE frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f32,
    /// Of the feed-forward layer.
    pub activation: GatedActivation,
    /// Whether there is an RMSNorm before the attention's output projection and before the down projection.
    pub sub_norms: bool,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// The token that begins a sequence.
    pub bos_token: Option<u32>,
    /// The tokens that end one.
    pub eos_tokens: Vec<u32>,
    /// What it has that BitNet has not.
    #[serde(default, skip_serializing_if = "DecoderOptions::is_default")]
    pub options: DecoderOptions,
}

/// What a decoder may have that BitNet has not. The default is BitNet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecoderOptions {
    /// Whether every query and key head passes an RMSNorm before RoPE (Qwen3).
    pub qk_norms: bool,
    /// Whether the input of every projection passes an RMSNorm of its own right before it, behind the norm that it shares
    /// with others (BitNet's embedding models).
    pub projection_norms: bool,
    /// Whether the projections of queries, keys and values have biases (Qwen2).
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the attention's output is multiplied by the sigmoid of gates, which q_proj has behind the queries of each
    /// head (Qwen3.5).
    pub attention_gate: bool,
    /// Values of a head that RoPE turns, the first ones; all of them if nothing is stated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_dim: Option<usize>,
    /// How RoPE's frequencies are scaled.
    pub rope_scaling: Option<RopeScaling>,
    /// The embedding is multiplied by this (MiniCPM).
    pub embedding_scale: f32,
    /// What attention and feed-forward add to the residual stream is multiplied by this (MiniCPM).
    pub residual_scale: f32,
    /// The logits are divided by this (MiniCPM).
    pub logit_divisor: f32,
    /// Experts in place of the feed-forward networks (Qwen3 MoE, Maple).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<Experts>,
    /// Sliding windows in the attention of some layers (Maple).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub windows: Option<SlidingWindows>,
    /// Gated DeltaNets in place of the attention of some layers (Qwen3.5).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta_net: Option<DeltaNet>,
    /// By layer: gates are at most this, and what they are multiplied by lies between minus this and this (Maple). 0 stands
    /// for no limit; so does an empty list, for all layers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub swiglu_clamp: Vec<f32>,
}

impl Default for DecoderOptions {
    fn default() -> Self {
        Self {
            qk_norms: false,
            projection_norms: false,
            qkv_bias: false,
            output_bias: false,
            attention_gate: false,
            rope_dim: None,
            rope_scaling: None,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_divisor: 1.0,
            experts: None,
            windows: None,
            delta_net: None,
            swiglu_clamp: Vec::new(),
        }
    }
}

impl DecoderOptions {
    /// Whether the decoder is BitNet's.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether embedding, residuals or logits have factors.
    pub fn has_factors(&self) -> bool {
        [self.embedding_scale, self.residual_scale, self.logit_divisor]
            .into_iter()
            .any(|factor| factor != 1.0)
    }
}

/// Largest value accepted in each field: far above any model, low enough that no product overflows.
pub(crate) mod limit {
    pub const HIDDEN: usize = 1 << 20;
    pub const INTERMEDIATE: usize = 1 << 22;
    pub const LAYERS: usize = 1 << 14;
    pub const EXPERTS: usize = 1 << 14;
    pub const HEADS: usize = 1 << 16;
    pub const HEAD_DIM: usize = 1 << 14;
    pub const VOCABULARY: usize = 1 << 26;
    pub const CONTEXT: usize = 1 << 30;
    pub const TAPS: usize = 64;
}

impl ModelConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// The first field that no model can have: a zero or absurd size, heads that don't divide, an odd
    /// `head_dim`, a non-finite constant, a token outside the vocabulary.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let err = |field, problem: String| Err(ConfigError { field, problem });
        if self.architecture.is_empty() {
            return err("architecture", "is empty".into());
        }
        for (field, value, max) in [
            ("hidden_size", self.hidden_size, limit::HIDDEN),
            ("intermediate_size", self.intermediate_size, limit::INTERMEDIATE),
            ("n_layers", self.n_layers, limit::LAYERS),
            ("n_heads", self.n_heads, limit::HEADS),
            ("n_kv_heads", self.n_kv_heads, limit::HEADS),
            ("head_dim", self.head_dim, limit::HEAD_DIM),
            ("vocab_size", self.vocab_size, limit::VOCABULARY),
            ("context_length", self.context_length, limit::CONTEXT),
        ] {
            if value == 0 || value > max {
                return err(field, format!("is {value}; it must be between 1 and {max}"));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let problem =
                format!("is {}, which does not divide the {} query heads", self.n_kv_heads, self.n_heads);
            return err("n_kv_heads", problem);
        }
        if !self.head_dim.is_multiple_of(2) {
            return err("head_dim", format!("is {}; RoPE needs an even number", self.head_dim));
        }
        if self.q_size() > limit::INTERMEDIATE {
            let problem = format!("is {}: with {} heads that is too wide", self.head_dim, self.n_heads);
            return err("head_dim", problem);
        }
        if !(self.rope_theta.is_finite() && self.rope_theta >= 1.0) {
            return err("rope_theta", format!("is {}; it must be a number of at least 1", self.rope_theta));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return err("rms_norm_eps", format!("is {:e}; it must lie between 0 and 1", self.rms_norm_eps));
        }
        let DecoderOptions { rope_scaling, embedding_scale, residual_scale, logit_divisor, .. } =
            &self.options;
        let DecoderOptions { experts, windows, delta_net, swiglu_clamp, .. } = &self.options;
        if let Some(problem) = experts.as_ref().and_then(|experts| experts.problem(self.n_layers)) {
            return err("options.experts", problem);
        }
        if experts.is_some() && self.sub_norms {
            return err("sub_norms", "is true; experts have none".into());
        }
        if self.options.projection_norms && (experts.is_some() || delta_net.is_some() || self.sub_norms) {
            let problem = "is true; models with sub-norms, experts or gated DeltaNets have no norm before each projection";
            return err("options.projection_norms", problem.into());
        }
        if let Some(problem) = windows.as_ref().and_then(|windows| windows.problem(self.n_layers)) {
            return err("options.windows", problem);
        }
        if let Some(problem) = delta_net.as_ref().and_then(|delta| delta.problem(self.n_layers)) {
            return err("options.delta_net", problem);
        }
        if delta_net.is_some() && self.sub_norms {
            return err("sub_norms", "is true; a DeltaNet has none".into());
        }
        if let Some(dim) =
            self.options.rope_dim.filter(|dim| *dim == 0 || *dim > self.head_dim || !dim.is_multiple_of(2))
        {
            let max = self.head_dim;
            return err("options.rope_dim", format!("is {dim}; it must be even and between 2 and {max}"));
        }
        if ![0, self.n_layers].contains(&swiglu_clamp.len()) {
            let (found, layers) = (swiglu_clamp.len(), self.n_layers);
            return err("options.swiglu_clamp", format!("has {found} numbers for {layers} layers"));
        }
        if let Some(clamp) = swiglu_clamp.iter().find(|clamp| !(clamp.is_finite() && **clamp >= 0.0)) {
            return err("options.swiglu_clamp", format!("has {clamp}; it must be finite and not negative"));
        }
        if let Some(problem) = rope_scaling.as_ref().and_then(|scaling| scaling.problem(self.rope_dim())) {
            return err("options.rope_scaling", problem);
        }
        for (field, value) in [
            ("options.embedding_scale", embedding_scale),
            ("options.residual_scale", residual_scale),
            ("options.logit_divisor", logit_divisor),
        ] {
            if !(value.is_finite() && *value > 0.0) {
                return err(field, format!("is {value}; it must be finite and positive"));
            }
        }
        if let Some(bos) = self.bos_token.filter(|&t| t as usize >= self.vocab_size) {
            return err("bos_token", format!("is {bos}, outside the vocabulary of {}", self.vocab_size));
        }
        if let Some(eos) = self.eos_tokens.iter().find(|&&t| t as usize >= self.vocab_size) {
            return err("eos_tokens", format!("has {eos}, outside the vocabulary of {}", self.vocab_size));
        }
        Ok(())
    }

    /// Values of a head that RoPE turns.
    pub fn rope_dim(&self) -> usize {
        self.options.rope_dim.unwrap_or(self.head_dim)
    }

    /// Width of all query heads together.
    pub fn q_size(&self) -> usize {
        self.n_heads.saturating_mul(self.head_dim)
    }

    /// Width of all key heads (or value heads) together.
    pub fn kv_size(&self) -> usize {
        self.n_kv_heads.saturating_mul(self.head_dim)
    }

    /// Bytes that a token takes in the KV cache of all layers.
    pub fn kv_bytes_per_token(&self, cache_type: CacheType) -> usize {
        let layers = self.n_layers - self.delta_net_layers().min(self.n_layers);
        let heads = self.n_kv_heads.saturating_mul(2).saturating_mul(layers);
        heads.saturating_mul(cache_type.row_bytes(self.head_dim))
    }

    /// The experts of a layer, where it has some.
    pub fn experts(&self, layer: usize) -> Option<&Experts> {
        self.options.experts.as_ref().filter(|experts| experts.dense_layers.binary_search(&layer).is_err())
    }

    /// The gated DeltaNet of a layer, where it has one.
    pub fn delta_net(&self, layer: usize) -> Option<&DeltaNet> {
        self.options.delta_net.as_ref().filter(|delta| delta.layers.get(layer) == Some(&true))
    }

    /// Number of layers that have a gated DeltaNet.
    fn delta_net_layers(&self) -> usize {
        let delta = self.options.delta_net.as_ref();
        delta.map_or(0, |delta| delta.layers.iter().filter(|&&has| has).count())
    }

    /// Bytes that the DeltaNets of all layers take for each sequence, however long it is.
    pub fn state_bytes(&self) -> usize {
        let Some(delta) = &self.options.delta_net else { return 0 };
        let memory = delta.values().saturating_mul(delta.key_dim);
        let inputs = delta.taps.saturating_sub(1).saturating_mul(delta.channels());
        memory.saturating_add(inputs).saturating_mul(4).saturating_mul(self.delta_net_layers())
    }

    /// Positions that a row sees in the attention of a layer, its own included; `None`: all up to its own.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let windows = self.options.windows.as_ref();
        windows.filter(|windows| windows.layers.get(layer) == Some(&true)).map(|windows| windows.positions)
    }

    /// Whether queries and keys of a layer are turned by RoPE.
    pub fn has_rope(&self, layer: usize) -> bool {
        let windows = self.options.windows.as_ref();
        windows.is_none_or(|windows| windows.global_rope || windows.layers.get(layer) == Some(&true))
    }

    /// The limit of gates and of what they are multiplied by in a layer.
    pub fn swiglu_clamp(&self, layer: usize) -> Option<f32> {
        self.options.swiglu_clamp.get(layer).copied().filter(|&clamp| clamp > 0.0)
    }

    /// Number of weights in the projections of all layers, those of all experts among them.
    pub fn ternary_parameters(&self) -> u64 {
        self.weights_of_layers(|experts| experts.count)
    }

    /// Number of those weights that a token is multiplied by: of the experts, those that compute a row.
    pub fn ternary_parameters_per_token(&self) -> u64 {
        self.weights_of_layers(|experts| experts.used)
    }

    fn weights_of_layers(&self, experts: impl Fn(&Experts) -> usize) -> u64 {
        let size = |which: Projection| {
            let (n, k) = which.shape(self);
            (n as u64).saturating_mul(k as u64)
        };
        let sum = |all: &[Projection]| all.iter().map(|&which| size(which)).fold(0, u64::saturating_add);
        let layers = self.n_layers as u64;
        let deltas = (self.delta_net_layers() as u64).min(layers);
        let without_experts = match &self.options.experts {
            Some(of) => of.dense_layers.iter().filter(|&&layer| layer < self.n_layers).count() as u64,
            None => layers,
        };
        let of_experts = self
            .options
            .experts
            .as_ref()
            .map_or(0, |of| sum(&Projection::of_expert(0)).saturating_mul(experts(of) as u64))
            .saturating_add(sum(&Projection::SHARED));
        [
            (layers - deltas, sum(&Projection::ATTENTION)),
            (deltas, sum(&Projection::DELTA_NET)),
            (without_experts, sum(&Projection::FEED_FORWARD)),
            (layers - without_experts, of_experts),
        ]
        .into_iter()
        .fold(0, |all, (layers, size)| all.saturating_add(layers.saturating_mul(size)))
    }

    /// Number of weights in the embedding, in the output head where it is another tensor, and in the layers' matrices that
    /// are floats in every model.
    pub fn dense_parameters(&self) -> u64 {
        let one = (self.vocab_size as u64).saturating_mul(self.hidden_size as u64);
        let matrices = if self.tied_embeddings { one } else { one.saturating_mul(2) };
        let of_layer = |layer: usize| {
            let sizes = FloatPart::of_layer(layer, self).into_iter().map(|part| {
                let [rows, columns] = part.shape(self);
                (rows as u64).saturating_mul(columns as u64)
            });
            sizes.fold(0, u64::saturating_add)
        };
        if self.options.experts.is_none() && self.options.delta_net.is_none() {
            return matrices;
        }
        (0..self.n_layers).map(of_layer).fold(matrices, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BitNet b1.58 2B-4T.
    fn bitnet_2b() -> ModelConfig {
        ModelConfig {
            architecture: "bitnet-b1.58".into(),
            name: Some("2B-4T".into()),
            hidden_size: 2560,
            intermediate_size: 6912,
            n_layers: 30,
            n_heads: 20,
            n_kv_heads: 5,
            head_dim: 128,
            vocab_size: 128_256,
            context_length: 4096,
            rope_theta: 500_000.0,
            rms_norm_eps: 1e-5,
            activation: GatedActivation::Relu2,
            sub_norms: true,
            tied_embeddings: true,
            bos_token: Some(128_000),
            eos_tokens: vec![128_001, 128_009],
            options: DecoderOptions::default(),
        }
    }

    fn experts(config: &mut ModelConfig) -> &mut Experts {
        let dense_layers = vec![0, 7];
        let experts = Experts {
            count: 256,
            used: 8,
            intermediate_size: 768,
            renormalise: true,
            shared: None,
            dense_layers,
        };
        config.options.experts.insert(experts)
    }

    fn windows(config: &mut ModelConfig) -> &mut SlidingWindows {
        let layers = (0..30).map(|layer| layer % 4 != 3).collect();
        config.options.windows.insert(SlidingWindows { positions: 512, layers, global_rope: false })
    }

    fn delta_net(config: &mut ModelConfig) -> &mut DeltaNet {
        config.sub_norms = false;
        config.options.delta_net.insert(DeltaNet {
            layers: (0..30).map(|layer| layer % 4 != 3).collect(),
            key_heads: 16,
            value_heads: 48,
            key_dim: 128,
            value_dim: 128,
            taps: 4,
            tiled: false,
            grouped_output: false,
        })
    }

    #[test]
    fn delta_nets_are_of_their_layers() {
        let mut config = bitnet_2b();
        let (all, token) = (config.ternary_parameters(), config.kv_bytes_per_token(CacheType::F32));
        delta_net(&mut config);
        config.validate().unwrap();
        assert_eq!(
            (config.delta_net(2).map(|delta| delta.values()), config.delta_net(3)),
            (Some(6144), None)
        );
        let (attention, delta) = (2 * 2560 * 2560 + 2 * 640 * 2560, 2560 * (10240 + 2 * 6144));
        assert_eq!(config.ternary_parameters(), all + 23 * (delta - attention));
        assert_eq!(config.dense_parameters(), 328_335_360 + 23 * (2 * 48 * 2560 + 10240 * 4 + 2 * 48));
        assert_eq!(config.kv_bytes_per_token(CacheType::F32), token * 7 / 30);
        assert_eq!(config.state_bytes(), 23 * 4 * (48 * 128 * 128 + 3 * 10240));
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&json).unwrap(), config);
    }

    #[test]
    fn experts_and_windows_are_of_their_layers() {
        let mut config = bitnet_2b();
        let dense = config.ternary_parameters();
        assert_eq!(config.ternary_parameters_per_token(), dense);
        config.sub_norms = false;
        experts(&mut config);
        windows(&mut config);
        config.options.swiglu_clamp = [7.0, 0.0].repeat(15);
        config.validate().unwrap();
        let of_experts = |count: u64| 28 * 3 * 2560 * (count * 768 - 6912);
        assert_eq!(config.ternary_parameters(), dense + of_experts(256));
        assert_eq!(config.ternary_parameters_per_token(), dense - 28 * 3 * 2560 * (6912 - 8 * 768));
        assert_eq!(config.dense_parameters(), 328_335_360 + 28 * 256 * 2560);
        assert_eq!((config.experts(7), config.experts(8).map(|e| e.used)), (None, Some(8)));
        assert_eq!((config.window(2), config.window(3)), (Some(512), None));
        assert_eq!((config.has_rope(2), config.has_rope(3)), (true, false));
        assert_eq!((config.swiglu_clamp(2), config.swiglu_clamp(3)), (Some(7.0), None));
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&json).unwrap(), config);
    }

    #[test]
    fn the_2b_model_has_the_published_size() {
        let config = bitnet_2b();
        config.validate().unwrap();
        assert_eq!(config.ternary_parameters(), 2_084_044_800);
        assert_eq!(config.dense_parameters(), 328_335_360);
        assert_eq!(config.kv_bytes_per_token(CacheType::F32), 153_600);
        assert_eq!(config.kv_bytes_per_token(CacheType::Int8), 39_600);
    }

    #[test]
    fn survives_json() {
        let config = bitnet_2b();
        let json = serde_json::to_string(&config).unwrap();
        assert!(json.contains(r#""activation":"relu2""#), "{json}");
        assert_eq!(serde_json::from_str::<ModelConfig>(&json).unwrap(), config);
    }

    #[test]
    fn every_field_is_checked() {
        type Change = fn(&mut ModelConfig);
        let changes: &[(&str, Change)] = &[
            ("architecture", |c| c.architecture.clear()),
            ("hidden_size", |c| c.hidden_size = 0),
            ("hidden_size", |c| c.hidden_size = usize::MAX),
            ("intermediate_size", |c| c.intermediate_size = 0),
            ("intermediate_size", |c| c.intermediate_size = usize::MAX),
            ("n_layers", |c| c.n_layers = 0),
            ("n_layers", |c| c.n_layers = 1 << 40),
            ("n_heads", |c| c.n_heads = 0),
            ("n_kv_heads", |c| c.n_kv_heads = 0),
            ("n_kv_heads", |c| c.n_kv_heads = 7),
            ("n_kv_heads", |c| c.n_kv_heads = 40),
            ("head_dim", |c| c.head_dim = 0),
            ("head_dim", |c| c.head_dim = 127),
            ("head_dim", |c| {
                c.n_heads = 1 << 16;
                c.n_kv_heads = 1;
                c.head_dim = 1 << 14;
            }),
            ("vocab_size", |c| c.vocab_size = 0),
            ("vocab_size", |c| c.vocab_size = 1 << 40),
            ("context_length", |c| c.context_length = 0),
            ("rope_theta", |c| c.rope_theta = f64::NAN),
            ("rope_theta", |c| c.rope_theta = 0.0),
            ("rope_theta", |c| c.rope_theta = f64::INFINITY),
            ("rms_norm_eps", |c| c.rms_norm_eps = 0.0),
            ("rms_norm_eps", |c| c.rms_norm_eps = f32::NAN),
            ("rms_norm_eps", |c| c.rms_norm_eps = -1e-5),
            ("bos_token", |c| c.bos_token = Some(128_256)),
            ("eos_tokens", |c| c.eos_tokens.push(u32::MAX)),
            ("options.embedding_scale", |c| c.options.embedding_scale = f32::INFINITY),
            ("options.residual_scale", |c| c.options.residual_scale = 0.0),
            ("options.logit_divisor", |c| c.options.logit_divisor = f32::NAN),
            ("options.rope_scaling", |c| c.options.rope_scaling = Some(RopeScaling::Linear { factor: 0.0 })),
            ("options.rope_scaling", |c| {
                c.options.rope_scaling = Some(RopeScaling::Divisors { divisors: vec![1.0; 63] });
            }),
            ("options.experts", |c| experts(c).count = 0),
            ("options.experts", |c| experts(c).count = 1 << 20),
            ("options.experts", |c| experts(c).used = 0),
            ("options.experts", |c| experts(c).used = 257),
            ("options.experts", |c| experts(c).intermediate_size = 0),
            ("options.experts", |c| experts(c).dense_layers.push(30)),
            ("options.experts", |c| experts(c).dense_layers.push(7)),
            ("sub_norms", |c| _ = experts(c)),
            ("options.projection_norms", |c| c.options.projection_norms = true),
            ("options.windows", |c| windows(c).positions = 0),
            ("options.windows", |c| windows(c).positions = usize::MAX),
            ("options.windows", |c| windows(c).layers.truncate(29)),
            ("options.delta_net", |c| delta_net(c).layers.truncate(29)),
            ("options.delta_net", |c| delta_net(c).key_heads = 0),
            ("options.delta_net", |c| delta_net(c).key_heads = 5),
            ("options.delta_net", |c| delta_net(c).value_heads = usize::MAX),
            ("options.delta_net", |c| delta_net(c).value_dim = 0),
            ("options.delta_net", |c| delta_net(c).key_dim = 1 << 15),
            ("options.delta_net", |c| delta_net(c).taps = 1),
            ("options.delta_net", |c| delta_net(c).grouped_output = true),
            ("sub_norms", |c| {
                delta_net(c);
                c.sub_norms = true;
            }),
            ("options.rope_dim", |c| c.options.rope_dim = Some(0)),
            ("options.rope_dim", |c| c.options.rope_dim = Some(63)),
            ("options.rope_dim", |c| c.options.rope_dim = Some(130)),
            ("options.swiglu_clamp", |c| c.options.swiglu_clamp = vec![7.0; 29]),
            ("options.swiglu_clamp", |c| c.options.swiglu_clamp = vec![-7.0; 30]),
            ("options.swiglu_clamp", |c| c.options.swiglu_clamp = vec![f32::INFINITY; 30]),
        ];
        for (field, change) in changes {
            let mut config = bitnet_2b();
            change(&mut config);
            assert_eq!(config.validate().unwrap_err().field, *field, "{config:?}");
        }
    }

    #[test]
    fn helpers_do_not_overflow_on_absurd_sizes() {
        let mut config = bitnet_2b();
        config.n_layers = usize::MAX;
        config.hidden_size = usize::MAX;
        config.n_kv_heads = usize::MAX;
        assert_eq!(config.ternary_parameters(), u64::MAX);
        assert_eq!(config.kv_bytes_per_token(CacheType::F32), usize::MAX);
        assert_eq!(config.dense_parameters(), u64::MAX);
    }
}
