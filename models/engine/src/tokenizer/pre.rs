//! The pre-tokenizers of GGUF files: how a text is cut into words before BPE merges within each.
//!
//! `tokenizer.ggml.pre` is a name that stands for regular expressions; what each name means was laid down by
//! llama.cpp, whose converter writes it. Where the model's own `tokenizer.json` has the expression, it stands
//! here as there. Several expressions apply one after the other, each to the pieces that the one before left.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::normalizer::SplitDelimiterBehavior;

/// A pre-tokenizer and what goes with it.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    /// The names by which files know it.
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// A word that is a token is that token, whether or not the merges lead there.
    pub(super) ignore_merges: bool,
    /// Whether BOS goes in front of a text if the file doesn't say.
    pub(super) add_bos: bool,
}

/// GPT-2's, which the library's `ByteLevel` has built in.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 3.5's: marks belong to the letters that they stand on.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// MiniCPM 5's, behind one that cuts numbers into groups of three.
const MINICPM5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// All names of llama.cpp's for these expressions, and those of its relatives: `falcon_e` is bitnet.cpp's,
/// `openpangu` ik_llama.cpp's. llama.cpp has more with expressions of their own, for models that are not
/// read here; and `jina-v1-en`, `jina-v2-code` and `roberta-bpe`, which also put a separator behind a text.
const PRE_TOKENIZERS: [PreTokenizer; 11] = [
    PreTokenizer {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "falcon_e",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        patterns: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer {
        names: &["dbrx", "smaug-bpe", "chatglm-bpe"],
        patterns: &[LLAMA3],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer { names: &["glm4", "glm5"], patterns: &[LLAMA3], ignore_merges: true, add_bos: false },
    // llama.cpp's own, from before it knew any names; files that were converted then still carry it.
    PreTokenizer {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        patterns: &[GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        patterns: &[r"\p{N}", GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
            "openpangu",
        ],
        patterns: &[QWEN2],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer { names: &["qwen35"], patterns: &[QWEN35], ignore_merges: false, add_bos: false },
    PreTokenizer {
        names: &["minicpm5"],
        patterns: &[r"\p{N}{1,3}", MINICPM5],
        ignore_merges: true,
        add_bos: false,
    },
    PreTokenizer { names: &["tekken"], patterns: &[TEKKEN], ignore_merges: true, add_bos: true },
    PreTokenizer {
        names: &["gpt-4o", "llama4", "kanana2", "talkie"],
        patterns: &[GPT4O],
        ignore_merges: false,
        add_bos: false,
    },
];

/// The pre-tokenizer with this name.
pub(super) fn find(name: &str) -> Option<&'static PreTokenizer> {
    PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name))
}

/// The first name of the pre-tokenizer with these expressions.
pub(super) fn with_patterns(patterns: &[String], ignore_merges: bool) -> Option<&'static str> {
    let found = PRE_TOKENIZERS.iter().find(|p| p.patterns == patterns && p.ignore_merges == ignore_merges);
    found.map(|p| p.names[0])
}

/// The first name of each, those first that treat merges in this way.
pub(super) fn all(ignore_merges: bool) -> Vec<&'static str> {
    let (alike, others): (Vec<_>, Vec<_>) =
        PRE_TOKENIZERS.iter().partition(|p| p.ignore_merges == ignore_merges);
    alike.into_iter().chain(others).map(|p| p.names[0]).collect()
}

/// The first name of each, for messages.
pub(super) fn names() -> String {
    let names: Vec<_> = PRE_TOKENIZERS.iter().map(|pre| pre.names[0]).collect();
    format!("{} and llama.cpp's other names for these", names.join(", "))
}

impl PreTokenizer {
    /// For the library: the cuts, then bytes to GPT-2's characters.
    pub(super) fn build(&self) -> tokenizers::Result<Sequence> {
        let split = |pattern: &&str| {
            let pattern = SplitPattern::Regex(pattern.to_string());
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map(PreTokenizerWrapper::from)
        };
        let mut steps = self.patterns.iter().map(split).collect::<tokenizers::Result<Vec<_>>>()?;
        steps.push(ByteLevel::new(false, true, false).into());
        Ok(Sequence::new(steps))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    /// The words that the `tokenizers` package of Python makes of the same texts with the pre-tokenizers of
    /// the models' own `tokenizer.json`; another regex engine (Oniguruma) and, for `gpt-2` and `smollm`, other
    /// pre-tokenizers. `default` has no such model and follows llama.cpp's definition alone.
    #[test]
    fn words_equal_those_of_the_models_own_pre_tokenizers() {
        let goldens = include_str!("../../testdata/tokenizer/pre_goldens.json");
        let goldens: serde_json::Value = serde_json::from_str(goldens).unwrap();
        let texts: Vec<String> = serde_json::from_value(goldens["texts"].clone()).unwrap();
        let words: std::collections::BTreeMap<String, Vec<Vec<String>>> =
            serde_json::from_value(goldens["words"].clone()).unwrap();
        assert!(texts.len() >= 24 && words.len() >= 8);
        for (name, expected) in &words {
            let pre = find(name).unwrap().build().unwrap();
            for (text, expected) in texts.iter().zip(expected) {
                let mut string = PreTokenizedString::from(text.as_str());
                pre.pre_tokenize(&mut string).unwrap();
                let splits = string.get_splits(OffsetReferential::Original, OffsetType::Byte);
                let found: Vec<_> = splits.iter().map(|(word, ..)| *word).collect();
                assert_eq!(&found, expected, "{name}: {text:?}");
            }
        }
    }

    /// What ternary models have in `tokenizer.ggml.pre`: BitNet b1.58 2B-4T and Llama3-8B-1.58, Falcon3-1.58bit,
    /// Falcon-E, Ternary-Bonsai, Ternary-Bonsai 2, MiniCPM 5. Each does the same as one with goldens above.
    #[test]
    fn ternary_models_have_their_pre_tokenizer() {
        let goldens = include_str!("../../testdata/tokenizer/pre_goldens.json");
        let goldens: serde_json::Value = serde_json::from_str(goldens).unwrap();
        for name in ["llama-bpe", "falcon3", "falcon_e", "qwen2", "qwen35", "minicpm5"] {
            assert!(goldens["words"][find(name).unwrap().names[0]].is_array(), "{name}");
        }
    }

    /// llama.cpp's names in November 2026 that are not read: each has an expression, a normaliser or an end of
    /// texts that no other has. All others are.
    #[test]
    fn the_names_that_are_not_read_are_unknown() {
        const OTHERS: &str = "deepseek-llm deepseek-coder deepseek-v3 hunyuan-dense hy_v4 joyai-llm spark2_5 youtu \
            falcon poro-chat bloom gpt3-finnish viking chameleon jais-2 gemma4 granite-embed-multi-311m mmbert \
            sarvam-moe jina-v1-en jina-v2-code roberta-bpe whitespace granite-embed-multi-97m tiny_aya cohere2moe \
            kimi-k2 superbpe bailingmoe bailingmoe2 llada-moe seed-coder ufakzeka afmoe laguna exaone-moe \
            minimax-m2";
        assert!(OTHERS.split_whitespace().all(|name| find(name).is_none()));
        let read: usize = PRE_TOKENIZERS.iter().map(|pre| pre.names.len()).sum();
        // 92 of llama.cpp's, without `falcon_e` and `openpangu`.
        assert_eq!(read - 2 + OTHERS.split_whitespace().count(), 92);
    }

    #[test]
    fn default_is_not_gpt_2() {
        let words = |name: &str, text: &str| {
            let mut string = PreTokenizedString::from(text);
            find(name).unwrap().build().unwrap().pre_tokenize(&mut string).unwrap();
            let splits = string.get_splits(OffsetReferential::Original, OffsetType::Byte);
            splits.iter().map(|(word, ..)| word.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(words("gpt-2", "it's 12345"), ["it", "'s", "Ġ12345"]);
        assert_eq!(words("default", "it's 12345"), ["it", "'", "s", "Ġ", "123", "45"]);
    }

    #[test]
    fn every_name_is_unique_and_builds() {
        let mut all: Vec<_> = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).collect();
        let n = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), n);
        assert!(PRE_TOKENIZERS.iter().all(|pre| pre.build().is_ok()));
        assert!(find("no-such").is_none());
    }
}
