//! What other programs compute for a model, by the architecture that its GGUF file names.
//!
//! None of them reads which activation a BitNet model has: the architecture decides. Read in their sources
//! in November 2026 (llama.cpp: `src/models/bitnet.cpp`; ik_llama.cpp: `build_bitnet.cpp`), and measured in
//! microsoft/BitNet#588: under `bitnet`, squared ReLU becomes SiLU, the text gets worse, and there is no error.

use super::{GgufWriteError, TernaryType};
use crate::checkpoint::gguf::names::{LLAMA, MAPLE, MINICPM, QWEN2, QWEN3, QWEN3MOE, QWEN35};
use bitnet_burn::{DecoderOptions, GatedActivation, ModelConfig};
use std::cmp::Reverse;

/// An architecture that a GGUF file can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// `bitnet-b1.58`: sub-norms; squared ReLU where nothing else is stated.
    BitnetB158,
    /// `bitnet`: sub-norms; SiLU where nothing else is stated.
    Bitnet,
    /// `llama`: no sub-norms, SiLU, and rows of q and k in an order of their own.
    Llama,
    /// `minicpm`: as `llama`, with factors of embedding, residuals and logits.
    MiniCpm,
    /// `qwen2`: biases of q, k and v, no sub-norms, SiLU.
    Qwen2,
    /// `qwen3`: norms of queries and keys, no sub-norms, SiLU.
    Qwen3,
    /// `qwen35`: as `qwen3`, with gated DeltaNets in place of the attention of most layers.
    Qwen35,
    /// `qwen3moe`: as `qwen3`, with experts.
    Qwen3Moe,
    /// `maple`: as `qwen3moe`, with sliding windows.
    Maple,
}

impl Architecture {
    const ALL: [Self; 9] = [
        Self::BitnetB158,
        Self::Bitnet,
        Self::Llama,
        Self::MiniCpm,
        Self::Qwen2,
        Self::Qwen3,
        Self::Qwen35,
        Self::Qwen3Moe,
        Self::Maple,
    ];

    /// Its name in the file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BitnetB158 => "bitnet-b1.58",
            Self::Bitnet => "bitnet",
            Self::Llama => LLAMA,
            Self::MiniCpm => MINICPM,
            Self::Qwen2 => QWEN2,
            Self::Qwen3 => QWEN3,
            Self::Qwen35 => QWEN35,
            Self::Qwen3Moe => QWEN3MOE,
            Self::Maple => MAPLE,
        }
    }

    const fn is_bitnet(self) -> bool {
        matches!(self, Self::BitnetB158 | Self::Bitnet)
    }

    /// The one under which the fewest programs compute the model wrongly, of these one under which the most compute it
    /// rightly, and of these the source's, if it is one. `None`: it would not be this model under any.
    pub fn of(config: &ModelConfig, ternary: TernaryType) -> Option<Self> {
        let possible = Self::ALL.into_iter().filter(|architecture| architecture.problem(config).is_none());
        // Hugging Face's names of two are others.
        let own = match &*config.architecture {
            "qwen3_moe" => QWEN3MOE,
            "qwen3_5_text" => QWEN35,
            own => own,
        };
        let rank = |architecture: &Self| {
            let count = |fate: Fate| {
                READERS.iter().filter(|reader| reader.fate(config, ternary, *architecture) == fate).count()
            };
            (count(Fate::Wrong), Reverse(count(Fate::Right)), architecture.name() != own)
        };
        possible.min_by_key(rank) // the first of equals
    }

    /// Why a model can't be written under it.
    pub(super) fn problem(self, config: &ModelConfig) -> Option<&'static str> {
        let DecoderOptions { qk_norms, qkv_bias, output_bias, experts, windows, .. } = &config.options;
        let DecoderOptions { delta_net, attention_gate, rope_dim, projection_norms, .. } = &config.options;
        if experts.as_ref().is_some_and(|experts| experts.shared.is_some()) {
            return Some("has no shared expert, and this model has");
        }
        let mixed = matches!(self, Self::Qwen3Moe | Self::Maple);
        for (found, expected, lacks, has) in [
            (
                *qk_norms,
                mixed || matches!(self, Self::Qwen3 | Self::Qwen35),
                "has no norms of queries and keys, and this model has",
                "has norms of queries and keys, and this model has not",
            ),
            (
                experts.is_some(),
                mixed,
                "has no experts, and this model has",
                "has experts, and this model has not",
            ),
            (
                windows.is_some(),
                self == Self::Maple,
                "has no sliding windows, and this model has",
                "has sliding windows, and this model has not",
            ),
            (
                delta_net.is_some() || *attention_gate || rope_dim.is_some(),
                self == Self::Qwen35,
                "has no gated DeltaNets, no gates of attention and no RoPE on a part of a head, and this model has",
                "has gated DeltaNets and gates of attention, and this model has not",
            ),
        ] {
            if found != expected {
                return Some(if found { lacks } else { has });
            }
        }
        let biased = *qkv_bias || *output_bias;
        match self {
            Self::Qwen35 if delta_net.is_none() || !*attention_gate => {
                Some("has gated DeltaNets and gates of attention, and this model lacks one of them")
            }
            _ if *projection_norms && self != Self::Qwen3 => {
                Some("has no norm before each projection, and this model has")
            }
            Self::BitnetB158 | Self::Bitnet if biased => Some("has no biases, and this model has"),
            Self::Qwen2 if !*qkv_bias => Some("has biases of q, k and v, and this model has not"),
            _ if self != Self::MiniCpm && config.options.has_factors() => {
                Some("has no factors of embedding, residuals and logits, and this model has")
            }
            _ if self.is_bitnet() => None,
            _ if config.sub_norms => Some("has no sub-norms, and this model has"),
            _ if config.activation != GatedActivation::Silu => {
                Some("means SiLU, and this model has another activation")
            }
            _ => None,
        }
    }
}

/// That a model has what no architecture has together.
pub(super) fn no_architecture(config: &ModelConfig) -> GgufWriteError {
    let why = |architecture: Architecture| {
        Some(format!("`{}` {}", architecture.name(), architecture.problem(config)?))
    };
    let why: Vec<_> = Architecture::ALL.into_iter().filter_map(why).collect();
    GgufWriteError::Inexpressible { problem: format!("no architecture is right for it: {}", why.join("; ")) }
}

/// What becomes of a model in a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is computed.
    Right,
    /// The program refuses the file.
    Refused,
    /// Another function is computed, without an error.
    Wrong,
}

/// A program that reads GGUF files.
struct Reader {
    name: &'static str,
    /// The activation under `bitnet-b1.58`; `None`: it does not know the name.
    b158: Option<GatedActivation>,
    /// Whether it reads an output head of its own under `bitnet-b1.58`. Under `bitnet`, none does.
    b158_head: bool,
    /// What it knows besides BitNet's.
    architectures: &'static [Architecture],
    /// The ternary types.
    types: &'static [TernaryType],
}

const READERS: [Reader; 5] = [
    Reader {
        name: "llama.cpp",
        b158: None,
        b158_head: false,
        architectures: &Architecture::ALL,
        types: &[TernaryType::TQ1_0, TernaryType::TQ2_0, TernaryType::Q2_0],
    },
    Reader {
        name: "Prism ML's llama.cpp",
        b158: None,
        b158_head: false,
        architectures: &[
            Architecture::Llama,
            Architecture::MiniCpm,
            Architecture::Qwen2,
            Architecture::Qwen3,
            Architecture::Qwen35,
            Architecture::Qwen3Moe,
        ],
        types: &[TernaryType::Q2_0, TernaryType::PQ2_0, TernaryType::PTQ1_0],
    },
    Reader {
        name: "bitnet.cpp before July 2026",
        b158: Some(GatedActivation::Relu2),
        b158_head: true,
        architectures: &[Architecture::Llama, Architecture::MiniCpm, Architecture::Qwen2],
        types: &[TernaryType::I2_S, TernaryType::TQ1_0, TernaryType::TQ2_0],
    },
    Reader {
        name: "bitnet.cpp since July 2026",
        b158: Some(GatedActivation::Silu),
        b158_head: false,
        architectures: &[Architecture::Llama, Architecture::MiniCpm, Architecture::Qwen2],
        types: &[TernaryType::I2_S, TernaryType::TQ1_0, TernaryType::TQ2_0],
    },
    // Computes with I2_S only after its llama-quantize has made IQ2_BN of it.
    Reader {
        name: "ik_llama.cpp",
        b158: Some(GatedActivation::Relu2),
        b158_head: true,
        architectures: &[
            Architecture::Llama,
            Architecture::MiniCpm,
            Architecture::Qwen2,
            Architecture::Qwen3,
            Architecture::Qwen3Moe,
        ],
        types: &[TernaryType::I2_S],
    },
];

impl Reader {
    fn fate(&self, config: &ModelConfig, ternary: TernaryType, architecture: Architecture) -> Fate {
        // (No program is known to read norms before each projection.)
        if !self.types.contains(&ternary) || config.options.projection_norms {
            return Fate::Refused;
        }
        let (activation, sub_norms, head) = match architecture {
            Architecture::BitnetB158 => (self.b158, true, self.b158_head),
            Architecture::Bitnet => (Some(GatedActivation::Silu), true, false),
            _ if !self.architectures.contains(&architecture) => return Fate::Refused,
            _ => (Some(GatedActivation::Silu), false, true),
        };
        // Llama's loader knows all biases, Qwen2's those of q, k and v.
        let biases = match architecture {
            Architecture::Llama | Architecture::MiniCpm => true,
            Architecture::Qwen2 => !config.options.output_bias,
            _ => !config.options.qkv_bias && !config.options.output_bias,
        };
        // Tensors that are missing or too many are an error everywhere.
        let fits = sub_norms == config.sub_norms && (head || config.tied_embeddings) && biases;
        match activation {
            Some(activation) if fits && activation == config.activation => Fate::Right,
            Some(_) if fits => Fate::Wrong,
            _ => Fate::Refused,
        }
    }
}

/// What to know about a file under this architecture: which programs compute another function, and whether
/// none computes the right one.
pub(super) fn warnings(
    config: &ModelConfig,
    ternary: TernaryType,
    architecture: Architecture,
) -> Vec<String> {
    let with = |fate: Fate| -> Vec<&str> {
        let has = |reader: &&Reader| reader.fate(config, ternary, architecture) == fate;
        READERS.iter().filter(has).map(|reader| reader.name).collect()
    };
    let (name, right, wrong) = (architecture.name(), with(Fate::Right), with(Fate::Wrong));
    let mut warnings = Vec::new();
    if !wrong.is_empty() {
        let (own, other) = match config.activation {
            GatedActivation::Relu2 => ("squared ReLU", "SiLU"),
            GatedActivation::Silu => ("SiLU", "squared ReLU"),
            GatedActivation::Sigmoid => ("a sigmoid", "another function"),
            GatedActivation::Gelu | GatedActivation::GeluTanh => ("GELU", "another function"),
        };
        warnings.push(format!(
            "under architecture `{name}`, {} computes {other} where this model has {own}: wrong text, and no error",
            wrong.join(" and ")
        ));
        if let Some(best) = Architecture::of(config, ternary).filter(|&best| best != architecture) {
            warnings.push(format!("architecture `{}` is computed rightly by more programs", best.name()));
        }
    }
    warnings.push(match right[..] {
        [] => "no other program that is known computes this model".into(),
        _ if wrong.is_empty() => return warnings,
        _ => format!("{} computes it rightly", right.join(" and ")),
    });
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::shape;
    use GatedActivation::{Relu2, Silu};
    use TernaryType::{I2_S, TQ2_0};

    fn model(activation: GatedActivation, sub_norms: bool, tied_embeddings: bool) -> ModelConfig {
        ModelConfig { activation, sub_norms, tied_embeddings, ..shape("tiny").unwrap() }
    }

    /// What each program makes of each kind of model, under the architecture that is chosen: r(ight),
    /// w(rong) or - (refused), in the order of `READERS`.
    #[test]
    fn the_architecture_is_the_one_that_most_programs_compute() {
        for (config, ternary, architecture, fates) in [
            (model(Relu2, true, true), I2_S, "bitnet-b1.58", "--rwr"),
            (model(Relu2, true, true), TQ2_0, "bitnet-b1.58", "--rw-"),
            (model(Relu2, true, false), I2_S, "bitnet-b1.58", "--r-r"),
            (model(Silu, true, true), I2_S, "bitnet", "--rrr"),
            (model(Silu, true, true), TQ2_0, "bitnet", "r-rr-"),
            (model(Silu, true, false), I2_S, "bitnet", "-----"),
            (model(Silu, false, true), I2_S, "llama", "--rrr"),
            (model(Silu, false, false), TQ2_0, "llama", "r-rr-"),
            (model(Relu2, false, true), I2_S, "bitnet-b1.58", "-----"),
        ] {
            let chosen = Architecture::of(&config, ternary).unwrap();
            assert_eq!(chosen.name(), architecture, "{config:?}");
            let letter = |reader: &Reader| match reader.fate(&config, ternary, chosen) {
                Fate::Right => 'r',
                Fate::Wrong => 'w',
                Fate::Refused => '-',
            };
            assert_eq!(READERS.iter().map(letter).collect::<String>(), fates, "{config:?} {ternary:?}");
            // Whoever gets it wrong is named, and so it is if nobody gets it right.
            let said = warnings(&config, ternary, chosen).join("; ");
            for (reader, fate) in READERS.iter().zip(fates.chars()) {
                assert!(fate != 'w' || said.contains(reader.name), "{said}");
            }
            assert_eq!(said.contains("no other program"), !fates.contains('r'), "{said}");
            assert_eq!(said.is_empty(), fates.contains('r') && !fates.contains('w'), "{said}");
        }
    }

    #[test]
    fn another_architecture_says_who_computes_it_wrongly() {
        let relu2 = model(Relu2, true, true);
        let said = warnings(&relu2, I2_S, Architecture::Bitnet).join("; ");
        for part in
            ["bitnet.cpp before July 2026", "SiLU where this model has squared ReLU", "`bitnet-b1.58`"]
        {
            assert!(said.contains(part), "{said}");
        }
        let silu = warnings(&model(Silu, true, true), I2_S, Architecture::BitnetB158).join("; ");
        assert!(silu.contains("squared ReLU where this model has SiLU"), "{silu}");
        assert!(Architecture::Llama.problem(&relu2).is_some());
        assert!(Architecture::Llama.problem(&model(Relu2, false, true)).is_some());
        assert!(Architecture::Llama.problem(&model(Silu, false, true)).is_none());
    }
}
