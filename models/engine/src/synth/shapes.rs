//! The shapes of known models.

use bitnet_burn::{DecoderOptions, DeltaNet, Experts, GatedActivation, ModelConfig, SlidingWindows};

/// The names that [`shape`] knows.
pub const SHAPES: [&str; 14] = [
    "tiny",
    "tiny-hybrid",
    "tiny-experts",
    "small",
    "0.7b",
    "2b-4t",
    "bonsai-1.7b",
    "bonsai-4b",
    "bonsai-8b",
    "bonsai-27b",
    "maple-20b-a1b",
    "llama3-8b",
    "bitnet-3b",
    "trilm-3.9b",
];

/// A model's shape by name: `2b-4t` is BitNet b1.58 2B-4T (arXiv 2504.12285), `0.7b` the older BitNet
/// b1.58 of 0.7 billion parameters, `bitnet-3b` of 3; `bonsai-*` are Ternary-Bonsai's (Qwen3; the largest has gated DeltaNets),
/// `llama3-8b` is Llama 3 8B, `trilm-3.9b` the largest of TriLM (arXiv 2407.12327). `maple-20b-a1b` has Maple's layers, experts
/// and windows; its widths are chosen for its numbers of parameters, since no published configuration was at hand.
/// `tiny`, `tiny-hybrid`, `tiny-experts` and `small` are for tests.
pub fn shape(name: &str) -> Option<ModelConfig> {
    let base = ModelConfig {
        architecture: "bitnet-b1.58".into(),
        name: Some(format!("synthetic {name}")),
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
    };
    let sized = |hidden_size,
                 intermediate_size,
                 n_layers,
                 [n_heads, n_kv_heads, head_dim]: [usize; 3],
                 vocab_size| {
        let (bos_token, eos_tokens) = last_tokens(vocab_size);
        ModelConfig {
            hidden_size,
            intermediate_size,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab_size,
            bos_token,
            eos_tokens,
            ..base.clone()
        }
    };
    Some(match name {
        "2b-4t" => base,
        "0.7b" => ModelConfig {
            architecture: "bitnet".into(),
            context_length: 2048,
            rope_theta: 10_000.0,
            activation: GatedActivation::Silu,
            ..sized(1536, 4096, 24, [16, 16, 96], 32_002)
        },
        "bitnet-3b" => ModelConfig {
            architecture: "bitnet".into(),
            context_length: 2048,
            rope_theta: 10_000.0,
            activation: GatedActivation::Silu,
            ..sized(3200, 8640, 26, [32, 32, 100], 32_002)
        },
        "bonsai-1.7b" => qwen3(sized(2048, 6144, 28, [16, 8, 128], 151_936)),
        "bonsai-4b" => qwen3(sized(2560, 9728, 36, [32, 8, 128], 151_936)),
        "bonsai-8b" => {
            ModelConfig { tied_embeddings: false, ..qwen3(sized(4096, 12_288, 36, [32, 8, 128], 151_936)) }
        }
        "bonsai-27b" => hybrid(sized(5120, 17_408, 64, [24, 4, 256], 248_320), [16, 48, 128, 128]),
        "maple-20b-a1b" => maple(sized(2048, 512, 24, [32, 4, 128], 151_936), 256, 8, 512),
        "trilm-3.9b" => ModelConfig {
            architecture: "llama".into(),
            context_length: 2048,
            rope_theta: 10_000.0,
            activation: GatedActivation::Silu,
            sub_norms: false,
            tied_embeddings: false,
            ..sized(3072, 9216, 30, [24, 24, 128], 50_688)
        },
        "tiny-hybrid" => {
            ModelConfig { context_length: 512, ..hybrid(sized(256, 512, 4, [4, 2, 64], 512), [2, 4, 64, 64]) }
        }
        "tiny-experts" => {
            ModelConfig { context_length: 512, ..maple(sized(256, 256, 4, [4, 2, 64], 512), 8, 2, 32) }
        }
        "llama3-8b" => ModelConfig {
            architecture: "llama".into(),
            context_length: 8192,
            activation: GatedActivation::Silu,
            sub_norms: false,
            tied_embeddings: false,
            ..sized(4096, 14_336, 32, [32, 8, 128], 128_256)
        },
        "small" => sized(768, 2048, 12, [12, 4, 64], 32_000),
        "tiny" => ModelConfig { context_length: 512, ..sized(256, 640, 2, [4, 2, 64], 512) },
        _ => return None,
    })
}

/// What all sizes of Qwen3 share.
pub(super) fn qwen3(size: ModelConfig) -> ModelConfig {
    ModelConfig {
        architecture: "qwen3".into(),
        context_length: 32_768,
        rope_theta: 1e6,
        rms_norm_eps: 1e-6,
        activation: GatedActivation::Silu,
        sub_norms: false,
        options: DecoderOptions { qk_norms: true, ..DecoderOptions::default() },
        ..size
    }
}

/// What all sizes of Qwen3.5 share: attention in every fourth layer, and gated DeltaNets in the others.
fn hybrid(size: ModelConfig, [key_heads, value_heads, key_dim, value_dim]: [usize; 4]) -> ModelConfig {
    let layers = (1..=size.n_layers).map(|layer| !layer.is_multiple_of(4)).collect();
    let (taps, tiled, grouped_output) = (4, true, false);
    let delta_net =
        DeltaNet { layers, key_heads, value_heads, key_dim, value_dim, taps, tiled, grouped_output };
    let config = qwen3(size);
    ModelConfig {
        architecture: "qwen35".into(),
        context_length: 262_144,
        rope_theta: 1e7,
        tied_embeddings: false,
        options: DecoderOptions {
            attention_gate: true,
            rope_dim: Some(config.head_dim / 4),
            delta_net: Some(delta_net),
            ..config.options.clone()
        },
        ..config
    }
}

/// What Maple's sizes share: experts in every layer, and windows in three of four.
fn maple(size: ModelConfig, count: usize, used: usize, positions: usize) -> ModelConfig {
    let layers: Vec<bool> = (1..=size.n_layers).map(|layer| !layer.is_multiple_of(4)).collect();
    let (intermediate_size, n_layers, config) = (size.intermediate_size, size.n_layers, qwen3(size));
    let (renormalise, shared, dense_layers) = (true, None, Vec::new());
    let experts = Experts { count, used, intermediate_size, renormalise, shared, dense_layers };
    ModelConfig {
        architecture: "maple".into(),
        tied_embeddings: false,
        options: DecoderOptions {
            experts: Some(experts),
            windows: Some(SlidingWindows { positions, layers, global_rope: false }),
            swiglu_clamp: vec![7.0; n_layers],
            ..config.options.clone()
        },
        ..config
    }
}

/// Another number of layers: where they differ, every fourth is again another kind.
pub fn set_layers(config: &mut ModelConfig, layers: usize) {
    config.n_layers = layers;
    // More than any model has are an error that is found later.
    let kinds = || (1..=layers.min(1 << 16)).map(|layer| !layer.is_multiple_of(4)).collect();
    let DecoderOptions { delta_net, windows, swiglu_clamp, .. } = &mut config.options;
    if let Some(delta) = delta_net {
        delta.layers = kinds();
    }
    if let Some(windows) = windows {
        windows.layers = kinds();
    }
    if let Some(&clamp) = swiglu_clamp.first() {
        *swiglu_clamp = vec![clamp; layers.min(1 << 16)];
    }
}

/// BOS and the two ends of text: the last three tokens of a vocabulary.
pub fn last_tokens(vocab_size: usize) -> (Option<u32>, Vec<u32>) {
    let last = vocab_size.saturating_sub(1).min(u32::MAX as usize) as u32;
    (Some(last.saturating_sub(2)), vec![last.saturating_sub(1), last])
}
