//! The parts of a model and the shapes of their weights.

use crate::ModelConfig;

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
    /// The gate of an expert, by its number: [intermediate size of experts, hidden].
    ExpertGate(usize),
    /// The up projection of an expert: [intermediate size of experts, hidden].
    ExpertUp(usize),
    /// The down projection of an expert: [hidden, intermediate size of experts].
    ExpertDown(usize),
}

impl Projection {
    /// The projections of a layer without experts, in the order in which it uses them.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The projections of attention.
    pub const ATTENTION: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];

    /// The projections of an expert, by its number.
    pub const fn of_expert(number: usize) -> [Self; 3] {
        [Self::ExpertGate(number), Self::ExpertUp(number), Self::ExpertDown(number)]
    }

    /// The projections of a layer: [`ALL`](Self::ALL), or attention's and then each expert's.
    pub fn of_layer(layer: usize, config: &ModelConfig) -> Vec<Self> {
        match config.experts(layer) {
            None => Self::ALL.to_vec(),
            Some(experts) => {
                Self::ATTENTION.into_iter().chain((0..experts.count).flat_map(Self::of_expert)).collect()
            }
        }
    }

    /// The kinds of matrices that a token is multiplied by: [`ALL`](Self::ALL). In a model with experts, the first expert's
    /// take the place of the feed-forward network's.
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
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::O => "o",
            Self::Gate | Self::ExpertGate(_) => "gate",
            Self::Up | Self::ExpertUp(_) => "up",
            Self::Down | Self::ExpertDown(_) => "down",
        }
    }

    /// (N, K): output and input features. An expert's are 0 in a model without experts.
    pub fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let of_expert = || config.options.experts.as_ref().map_or(0, |experts| experts.intermediate_size);
        match self {
            Self::Q => (config.q_size(), config.hidden_size),
            Self::K | Self::V => (config.kv_size(), config.hidden_size),
            Self::O => (config.hidden_size, config.q_size()),
            Self::Gate | Self::Up => (config.intermediate_size, config.hidden_size),
            Self::Down => (config.hidden_size, config.intermediate_size),
            Self::ExpertGate(_) | Self::ExpertUp(_) => (of_expert(), config.hidden_size),
            Self::ExpertDown(_) => (config.hidden_size, of_expert()),
        }
    }

    /// Whether the layer adds a bias to the output.
    pub fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::Q | Self::K | Self::V => config.options.qkv_bias,
            Self::O => config.options.output_bias,
            Self::Gate | Self::Up | Self::Down => false,
            Self::ExpertGate(_) | Self::ExpertUp(_) | Self::ExpertDown(_) => false,
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
    /// Number of weights.
    pub fn len(self, config: &ModelConfig) -> usize {
        match self {
            Self::Attention(_) | Self::FeedForward(_) | Self::Output => config.hidden_size,
            Self::Query(_) | Self::Key(_) => config.head_dim,
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
            | Self::AttentionSub(l)
            | Self::FeedForward(l)
            | Self::FeedForwardSub(l)
            | Self::Input(l, _) => Some(l),
            Self::Output => None,
        }
    }

    /// The norms of a layer, in the order in which they are used; those of single projections behind the others.
    pub fn of_layer(layer: usize, config: &ModelConfig) -> impl Iterator<Item = Self> + use<> {
        let (sub_norms, qk_norms) = (config.sub_norms, config.options.qk_norms);
        let all = [
            (true, Self::Attention(layer)),
            (qk_norms, Self::Query(layer)),
            (qk_norms, Self::Key(layer)),
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
