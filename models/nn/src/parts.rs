//! The parts of a model and the shapes of their weights.

use crate::{DecoderOptions, DeltaNet, ModelConfig};

/// The matrices of a layer, ternary in most models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Projection {
    /// Queries, [n_heads * head_dim, hidden].
    Q,
    /// Keys, [n_kv_heads * head_dim, hidden].
    K,
    /// Values, [n_kv_heads * head_dim, hidden].
    V,
    /// Attention output, [hidden, n_heads * head_dim].
    O,
    /// Feed-forward gate, [intermediate, hidden].
    Gate,
    /// Feed-forward up, [intermediate, hidden].
    Up,
    /// Feed-forward down, [hidden, intermediate].
    Down,
    /// Queries, keys and values of a gated DeltaNet, [its channels, hidden].
    DeltaQkv,
    /// Gates of its output, [value_heads * value_dim, hidden].
    DeltaGate,
    /// Its output, [hidden, value_heads * value_dim].
    DeltaOut,
    /// The gate of an expert, by its number: [intermediate size of experts, hidden].
    ExpertGate(usize),
    /// The up projection of an expert: [intermediate size of experts, hidden].
    ExpertUp(usize),
    /// The down projection of an expert: [hidden, intermediate size of experts].
    ExpertDown(usize),
    /// The gate of the shared expert: [its intermediate size, hidden].
    SharedGate,
    /// The up projection of the shared expert: [its intermediate size, hidden].
    SharedUp,
    /// The down projection of the shared expert: [hidden, its intermediate size].
    SharedDown,
}

impl Projection {
    /// The projections of a layer without experts, in the order in which it uses them.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The projections of attention.
    pub const ATTENTION: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];

    /// The projections of every kind of layer: [`ALL`](Self::ALL), a DeltaNet's, the first expert's and the shared one's.
    pub fn every() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().chain(Self::DELTA_NET).chain(Self::of_expert(0)).chain(Self::SHARED)
    }

    /// The projections of the shared expert.
    pub const SHARED: [Self; 3] = [Self::SharedGate, Self::SharedUp, Self::SharedDown];

    /// The projections of a gated DeltaNet.
    pub const DELTA_NET: [Self; 3] = [Self::DeltaQkv, Self::DeltaGate, Self::DeltaOut];

    /// The projections of a feed-forward network.
    pub const FEED_FORWARD: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// The projections of an expert, by its number.
    pub const fn of_expert(number: usize) -> [Self; 3] {
        [Self::ExpertGate(number), Self::ExpertUp(number), Self::ExpertDown(number)]
    }

    /// The first projection of a model: its queries, or what a gated DeltaNet has for them.
    pub fn first(config: &ModelConfig) -> Self {
        if config.delta_net(0).is_some() { Self::DeltaQkv } else { Self::Q }
    }

    /// The projections of a layer: attention's or the DeltaNet's, then those of the feed-forward network or of each expert and
    /// of the shared one.
    pub fn of_layer(layer: usize, config: &ModelConfig) -> Vec<Self> {
        let mut all = match config.delta_net(layer) {
            None => Self::ATTENTION.to_vec(),
            Some(_) => Self::DELTA_NET.to_vec(),
        };
        match config.experts(layer) {
            None => all.extend(Self::FEED_FORWARD),
            Some(experts) => {
                all.extend((0..experts.count).flat_map(Self::of_expert));
                all.extend(experts.shared.map(|_| Self::SHARED).into_iter().flatten());
            }
        }
        all
    }

    /// The kinds of matrices that a token is multiplied by in layers with attention: [`ALL`](Self::ALL). In a model with experts,
    /// the first expert's take the place of the feed-forward network's.
    pub fn kinds(config: &ModelConfig) -> [Self; 7] {
        if config.options.experts.is_none() {
            return Self::ALL;
        }
        let ([q, k, v, o], [gate, up, down]) = (Self::ATTENTION, Self::of_expert(0));
        [q, k, v, o, gate, up, down]
    }

    /// Whether it counts for one token. Which experts compute a token is known only then: the first ones stand for them.
    pub fn is_read(self, config: &ModelConfig) -> bool {
        let used = config.options.experts.as_ref().map_or(0, |experts| experts.used);
        self.expert().is_none_or(|number| number < used)
    }

    /// The number of the expert that it belongs to.
    pub fn expert(self) -> Option<usize> {
        match self {
            Self::ExpertGate(number) | Self::ExpertUp(number) | Self::ExpertDown(number) => Some(number),
            _ => None,
        }
    }

    /// `q`, `gate` ...; an expert's as a feed-forward network's.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeltaQkv => "qkv",
            Self::DeltaGate => "z",
            Self::DeltaOut => "out",
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::O => "o",
            Self::Gate | Self::ExpertGate(_) => "gate",
            Self::Up | Self::ExpertUp(_) => "up",
            Self::Down | Self::ExpertDown(_) => "down",
            Self::SharedGate => "shared_gate",
            Self::SharedUp => "shared_up",
            Self::SharedDown => "shared_down",
        }
    }

    /// (N, K): output and input features. An expert's are 0 in a model without such experts, a DeltaNet's in one without.
    pub fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let of_delta = |size: fn(&DeltaNet) -> usize| config.options.delta_net.as_ref().map_or(0, size);
        let of_expert = || config.options.experts.as_ref().map_or(0, |experts| experts.intermediate_size);
        let shared = || config.options.experts.as_ref().and_then(|experts| experts.shared).unwrap_or(0);
        match self {
            // With gates, which lie behind the queries of each head.
            Self::Q if config.options.attention_gate => (2 * config.q_size(), config.hidden_size),
            Self::Q => (config.q_size(), config.hidden_size),
            Self::DeltaQkv => (of_delta(DeltaNet::channels), config.hidden_size),
            Self::DeltaGate => (of_delta(DeltaNet::values), config.hidden_size),
            Self::DeltaOut => (config.hidden_size, of_delta(DeltaNet::values)),
            Self::K | Self::V => (config.kv_size(), config.hidden_size),
            Self::O => (config.hidden_size, config.q_size()),
            Self::Gate | Self::Up => (config.intermediate_size, config.hidden_size),
            Self::Down => (config.hidden_size, config.intermediate_size),
            Self::ExpertGate(_) | Self::ExpertUp(_) => (of_expert(), config.hidden_size),
            Self::ExpertDown(_) => (config.hidden_size, of_expert()),
            Self::SharedGate | Self::SharedUp => (shared(), config.hidden_size),
            Self::SharedDown => (config.hidden_size, shared()),
        }
    }

    /// Whether the layer adds a bias to the output.
    pub fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::Q | Self::K | Self::V => config.options.qkv_bias,
            Self::O => config.options.output_bias,
            Self::Gate | Self::Up | Self::Down => false,
            Self::DeltaQkv | Self::DeltaGate | Self::DeltaOut => false,
            Self::ExpertGate(_) | Self::ExpertUp(_) | Self::ExpertDown(_) => false,
            Self::SharedGate | Self::SharedUp | Self::SharedDown => false,
        }
    }
}

/// The RMSNorm weights; numbers are layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Norm {
    /// Before q, k and v: `[hidden]`.
    Attention(usize),
    /// Of every query head, before RoPE: `[head_dim]`. Only with `qk_norms`.
    Query(usize),
    /// Of every key head, before RoPE: `[head_dim]`. Only with `qk_norms`.
    Key(usize),
    /// Of the output of every value head of a gated DeltaNet: `[value_dim]`.
    Delta(usize),
    /// Between attention and its output projection: [n_heads * head_dim]. Only with `sub_norms`.
    AttentionSub(usize),
    /// Before gate and up: `[hidden]`.
    FeedForward(usize),
    /// Before the down projection: `[intermediate]`. Only with `sub_norms`.
    FeedForwardSub(usize),
    /// Right before a projection: of as many values as it has input features. Only with `projection_norms`.
    Input(usize, Projection),
    /// Before the output head: `[hidden]`.
    Output,
}

impl Norm {
    /// All norms but those of [projections](Self::Input), those of layers in the first one.
    pub const ALL: [Self; 8] = [
        Self::Attention(0),
        Self::Query(0),
        Self::Key(0),
        Self::Delta(0),
        Self::AttentionSub(0),
        Self::FeedForward(0),
        Self::FeedForwardSub(0),
        Self::Output,
    ];

    /// Number of weights.
    pub fn len(self, config: &ModelConfig) -> usize {
        match self {
            Self::Attention(_) | Self::FeedForward(_) | Self::Output => config.hidden_size,
            Self::Query(_) | Self::Key(_) => config.head_dim,
            Self::Delta(_) => config.options.delta_net.as_ref().map_or(0, |delta| delta.value_dim),
            Self::AttentionSub(_) => config.q_size(),
            Self::FeedForwardSub(_) => config.intermediate_size,
            Self::Input(_, projection) => projection.shape(config).1,
        }
    }

    /// The layer, or `None` for the last norm.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::Attention(l)
            | Self::Query(l)
            | Self::Key(l)
            | Self::Delta(l)
            | Self::AttentionSub(l)
            | Self::FeedForward(l)
            | Self::FeedForwardSub(l)
            | Self::Input(l, _) => Some(l),
            Self::Output => None,
        }
    }

    /// The norms of a layer, in the order in which they are used; those of single projections behind the others.
    pub fn of_layer(layer: usize, config: &ModelConfig) -> impl Iterator<Item = Self> + use<> {
        let delta = config.delta_net(layer).is_some();
        let (sub_norms, qk_norms) = (config.sub_norms, config.options.qk_norms && !delta);
        let all = [
            (true, Self::Attention(layer)),
            (qk_norms, Self::Query(layer)),
            (qk_norms, Self::Key(layer)),
            (delta, Self::Delta(layer)),
            (sub_norms, Self::AttentionSub(layer)),
            (true, Self::FeedForward(layer)),
            (sub_norms, Self::FeedForwardSub(layer)),
        ];
        let inputs = match config.options.projection_norms {
            true => Projection::of_layer(layer, config),
            false => Vec::new(),
        };
        let inputs = inputs.into_iter().map(move |which| Self::Input(layer, which));
        all.into_iter().filter_map(|(present, norm)| present.then_some(norm)).chain(inputs)
    }
}

/// The other parts of a layer: matrices that are floats in every model, and vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatPart {
    /// The router to experts, [experts, hidden].
    Router,
    /// The gate of the shared expert, [1, hidden].
    SharedRouter,
    /// The logits of a DeltaNet's decays, [value_heads, hidden].
    DeltaDecay,
    /// The logits of its write strengths, [value_heads, hidden].
    DeltaStrength,
    /// Its convolution, [taps, channels], the oldest input first.
    DeltaConvolution,
    /// Its rates of decay, [1, value_heads]: not positive.
    DeltaRate,
    /// What is added to the logits of its decays, [1, value_heads].
    DeltaBias,
}

impl FloatPart {
    /// Those of a gated DeltaNet.
    pub const DELTA_NET: [Self; 5] =
        [Self::DeltaDecay, Self::DeltaStrength, Self::DeltaConvolution, Self::DeltaRate, Self::DeltaBias];

    /// Those of every kind of layer.
    pub fn every() -> impl Iterator<Item = Self> {
        Self::DELTA_NET.into_iter().chain([Self::Router, Self::SharedRouter])
    }

    /// Those of a layer.
    pub fn of_layer(layer: usize, config: &ModelConfig) -> Vec<Self> {
        let mut all = Vec::new();
        if config.delta_net(layer).is_some() {
            all.extend(Self::DELTA_NET);
        }
        if let Some(experts) = config.experts(layer) {
            all.push(Self::Router);
            all.extend(experts.shared.map(|_| Self::SharedRouter));
        }
        all
    }

    /// [rows, columns]; 0 rows in a model without.
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let DecoderOptions { experts, delta_net, .. } = &config.options;
        let of_delta = |size: fn(&DeltaNet) -> usize| delta_net.as_ref().map_or(0, size);
        match self {
            Self::Router => [experts.as_ref().map_or(0, |experts| experts.count), config.hidden_size],
            Self::SharedRouter => {
                let shared = experts.as_ref().and_then(|experts| experts.shared);
                [usize::from(shared.is_some()), config.hidden_size]
            }
            Self::DeltaDecay | Self::DeltaStrength => {
                [of_delta(|delta| delta.value_heads), config.hidden_size]
            }
            Self::DeltaConvolution => [of_delta(|delta| delta.taps), of_delta(DeltaNet::channels)],
            Self::DeltaRate | Self::DeltaBias => {
                [usize::from(delta_net.is_some()), of_delta(|delta| delta.value_heads)]
            }
        }
    }

    /// The shape in a Hugging Face checkpoint.
    pub fn checkpoint_shape(self, config: &ModelConfig) -> Vec<usize> {
        let [rows, columns] = self.shape(config);
        match self {
            Self::Router | Self::SharedRouter | Self::DeltaDecay | Self::DeltaStrength => vec![rows, columns],
            Self::DeltaConvolution => vec![columns, 1, rows],
            Self::DeltaRate | Self::DeltaBias => vec![columns],
        }
    }

    /// Values as a Hugging Face checkpoint has them, as layers take them.
    pub fn from_checkpoint(self, values: &[f32], config: &ModelConfig) -> Vec<f32> {
        let [rows, _] = self.shape(config);
        match self {
            Self::DeltaConvolution => transposed(values, rows),
            // transformers' `A_log`.
            Self::DeltaRate => values.iter().map(|log| -log.exp()).collect(),
            _ => values.to_vec(),
        }
    }

    /// The inverse of [`from_checkpoint`](Self::from_checkpoint), but for the rounding of a logarithm.
    pub fn to_checkpoint(self, values: &[f32], config: &ModelConfig) -> Vec<f32> {
        let [_, columns] = self.shape(config);
        match self {
            Self::DeltaConvolution => transposed(values, columns),
            Self::DeltaRate => values.iter().map(|rate| (-rate).ln()).collect(),
            _ => values.to_vec(),
        }
    }
}

/// Rows of `columns` values, with rows and columns exchanged.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns.max(1)).copied()).collect()
}
