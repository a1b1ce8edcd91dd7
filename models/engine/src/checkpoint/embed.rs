//! What a model's files say about embeddings: how the hidden states of a text become one vector.
//!
//! | file | says |
//! | --- | --- |
//! | `modules.json` | what follows the model: pooling, normalisation, further layers |
//! | `1_Pooling/config.json` | which states are pooled |
//! | `config_sentence_transformers.json` | prompts that go in front of a text, by name |
//! | GGUF | `ARCHITECTURE.pooling_type`: 0 none, 1 mean, 2 CLS, 3 last, 4 rank (llama.cpp's `llama_pooling_type`) |
//!
//! The first three are those of sentence-transformers (<https://sbert.net>, `Pooling.py` and `SentenceTransformer.py`).

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use bitnet_burn_formats::gguf::GgufFile;
use bitnet_burn_formats::read_json;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::LoadError;

/// The files that are read for embeddings, where they are there.
pub const EMBED_COMPANIONS: [&str; 3] = [MODULES, POOLING, PROMPTS];

const MODULES: &str = "modules.json";
const POOLING: &str = "1_Pooling/config.json";
const PROMPTS: &str = "config_sentence_transformers.json";

/// What is pooled of the hidden states of a text behind the last norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The last token's.
    Last,
    /// The mean of all tokens'.
    Mean,
}

impl Pooling {
    const SUPPORTED: &str = "last, mean";

    /// llama.cpp's number for it.
    pub(crate) fn gguf(self) -> u32 {
        match self {
            Self::Mean => 1,
            Self::Last => 3,
        }
    }
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Last => "last",
            Self::Mean => "mean",
        })
    }
}

impl FromStr for Pooling {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "last" => Ok(Self::Last),
            "mean" => Ok(Self::Mean),
            _ => Err(format!("possible values: {}", Self::SUPPORTED)),
        }
    }
}

/// What a model's files say about embeddings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EmbedDefaults {
    /// What is pooled, if they say so.
    pub pooling: Option<Pooling>,
    /// Whether vectors are divided by their L2 norm, if they say so.
    pub normalise: Option<bool>,
    /// That the mean is taken without the tokens of the prompt.
    pub mean_without_prompt: bool,
    /// Prompts by name.
    pub prompts: BTreeMap<String, String>,
    /// The name of the prompt that all texts get for which none is chosen.
    pub default_prompt: Option<String>,
}

/// A module of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Default, Deserialize)]
struct Prompts {
    #[serde(default)]
    prompts: BTreeMap<String, String>,
    default_prompt_name: Option<String>,
}

impl EmbedDefaults {
    pub(super) fn of_gguf(file: &GgufFile, asked: Option<Pooling>) -> Result<Self, LoadError> {
        let architecture =
            file.value("general.architecture").and_then(|value| value.as_str()).unwrap_or_default();
        let key = format!("{architecture}.pooling_type");
        let Some(value) = file.value(&key).filter(|_| asked.is_none()) else { return Ok(Self::default()) };
        let pooling = match value.as_u64() {
            Some(0) => None,
            Some(1) => Some(Pooling::Mean),
            Some(3) => Some(Pooling::Last),
            _ => {
                let supported = "0 (none), 1 (mean), 3 (last); --pooling chooses another one";
                return Err(unsupported(file.path(), &key, value.to_string(), supported));
            }
        };
        Ok(Self { pooling, ..Self::default() })
    }

    pub(super) fn of_directory(dir: &Path, asked: Option<Pooling>) -> Result<Self, LoadError> {
        let mut defaults = Self::default();
        if let Some(modules) = read::<Vec<Module>>(dir, MODULES)? {
            // `sentence_transformers.models.Pooling`; newer files have longer paths.
            let is = |module: &Module, name: &str| module.kind.rsplit('.').next() == Some(name);
            let known = |module: &Module| {
                ["Transformer", "Normalize"].iter().any(|name| is(module, name))
                    || is(module, "Pooling") && POOLING.strip_suffix("/config.json") == Some(&module.path)
            };
            if let Some(other) = modules.iter().find(|module| !known(module)) {
                let found = format!("{} at {:?}", other.kind, other.path);
                let supported = "Transformer, Pooling at \"1_Pooling\", Normalize";
                return Err(unsupported(&dir.join(MODULES), "a module", found, supported));
            }
            defaults.normalise = Some(modules.iter().any(|module| is(module, "Normalize")));
        }
        if let Some(config) = read::<Value>(dir, POOLING)? {
            defaults.mean_without_prompt = config["include_prompt"] == false;
            if asked.is_none() {
                defaults.pooling = pooling_of(&dir.join(POOLING), &config)?;
            }
        }
        if let Some(Prompts { prompts, default_prompt_name }) = read(dir, PROMPTS)? {
            if let Some(name) = default_prompt_name.as_ref().filter(|name| !prompts.contains_key(*name)) {
                let supported = "the name of one of its `prompts`";
                return Err(unsupported(
                    &dir.join(PROMPTS),
                    "`default_prompt_name`",
                    format!("{name:?}"),
                    supported,
                ));
            }
            (defaults.prompts, defaults.default_prompt) = (prompts, default_prompt_name);
        }
        Ok(defaults)
    }
}

/// Of sentence-transformers' configuration: flags `pooling_mode_*`, or since version 5.3 the name in `pooling_mode`. Several
/// at once stand for their vectors one behind the other.
fn pooling_of(path: &Path, config: &Value) -> Result<Option<Pooling>, LoadError> {
    const FLAG: &str = "pooling_mode_";
    let mut modes: Vec<&str> = match &config["pooling_mode"] {
        Value::String(mode) => vec![mode],
        Value::Array(modes) => modes.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let flags = config.as_object().into_iter().flatten().filter(|(_, value)| **value == true);
    modes.extend(flags.filter_map(|(key, _)| key.strip_prefix(FLAG)));
    match &modes[..] {
        [] => Ok(None),
        ["lasttoken"] => Ok(Some(Pooling::Last)),
        ["mean" | "mean_tokens"] => Ok(Some(Pooling::Mean)),
        others => {
            let supported = "lasttoken or mean, one of them; --pooling chooses another one";
            Err(unsupported(path, "the pooling mode", others.join(", "), supported))
        }
    }
}

/// A JSON file of the directory, if it is there.
fn read<T: serde::de::DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>, LoadError> {
    let path = dir.join(name);
    if path.exists() { Ok(Some(read_json(&path)?)) } else { Ok(None) }
}

fn unsupported(path: &Path, what: &str, found: String, supported: &str) -> LoadError {
    LoadError::Unsupported {
        path: path.to_owned(),
        what: what.to_owned(),
        found,
        supported: supported.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)], asked: Option<Pooling>) -> Result<EmbedDefaults, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("1_Pooling")).unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        EmbedDefaults::of_directory(dir.path(), asked).map_err(|error| error.to_string())
    }

    const WITH_NORM: &str = r#"[
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#;

    #[test]
    fn the_files_of_sentence_transformers_are_read() {
        assert_eq!(of(&[], None).unwrap(), EmbedDefaults::default());
        let last = r#"{"word_embedding_dimension": 8, "pooling_mode_mean_tokens": false,
            "pooling_mode_lasttoken": true, "include_prompt": true}"#;
        let prompts =
            r#"{"prompts": {"query": "Instruct: x\nQuery:", "document": ""}, "default_prompt_name": null}"#;
        let defaults = of(&[(MODULES, WITH_NORM), (POOLING, last), (PROMPTS, prompts)], None).unwrap();
        assert_eq!((defaults.pooling, defaults.normalise), (Some(Pooling::Last), Some(true)));
        assert_eq!(defaults.prompts["query"], "Instruct: x\nQuery:");
        assert!(defaults.default_prompt.is_none() && !defaults.mean_without_prompt);
        let mean = r#"{"pooling_mode_mean_tokens": true, "include_prompt": false}"#;
        let defaults = of(&[(POOLING, mean)], None).unwrap();
        assert_eq!((defaults.pooling, defaults.normalise), (Some(Pooling::Mean), None));
        assert!(defaults.mean_without_prompt);
        assert_eq!(
            of(&[(POOLING, r#"{"pooling_mode": "lasttoken"}"#)], None).unwrap().pooling,
            Some(Pooling::Last)
        );
        let without_norm = WITH_NORM.replace("models.Normalize", "models.Transformer");
        assert_eq!(of(&[(MODULES, &without_norm)], None).unwrap().normalise, Some(false));
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let error = |files: &[(&str, &str)]| of(files, None).unwrap_err();
        let cls = r#"{"pooling_mode_cls_token": true}"#;
        assert!(error(&[(POOLING, cls)]).contains("1_Pooling/config.json: the pooling mode is cls_token"));
        // Whoever names one knows better.
        assert_eq!(of(&[(POOLING, cls)], Some(Pooling::Mean)).unwrap().pooling, None);
        let both = r#"{"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": true}"#;
        assert!(error(&[(POOLING, both)]).contains("lasttoken, mean_tokens"));
        let dense = WITH_NORM.replace("models.Normalize", "models.Dense");
        assert!(error(&[(MODULES, &dense)]).contains("models.Dense at \"2_Normalize\""));
        let elsewhere = WITH_NORM.replace("1_Pooling", "2_Pooling");
        assert!(error(&[(MODULES, &elsewhere)]).contains("2_Pooling"));
        assert!(error(&[(PROMPTS, r#"{"default_prompt_name": "query"}"#)]).contains("default_prompt_name"));
        assert!(error(&[(MODULES, "{}")]).contains("not the JSON that was expected"));
    }
}
