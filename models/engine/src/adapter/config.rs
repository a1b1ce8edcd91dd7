//! `adapter_config.json`: what of PEFT's `LoraConfig` is computed, and what is refused.

use std::path::{Path, PathBuf};

use bitnet_burn_formats::read_json;
use serde_json::{Map, Value};

use super::AdapterError;

/// The largest rank, as a bound on what a file can ask for.
const MAX_RANK: u64 = 1 << 16;

/// Keys without influence on what a trained adapter computes, whatever their value.
const INFORMATION: [&str; 13] = [
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
];

/// Keys that are read below.
const READ: [&str; 9] = [
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "task_type",
    "use_rslora",
];

/// What is computed of a configuration.
pub(super) struct Config {
    path: PathBuf,
    rank: usize,
    alpha: f64,
    rank_stabilised: bool,
    ranks: Vec<(String, f64)>,
    alphas: Vec<(String, f64)>,
}

impl Config {
    pub fn read(path: &Path) -> Result<Self, AdapterError> {
        let keys: Map<String, Value> = read_json(path)?;
        let wrong = |key: &str, problem: &str| AdapterError::Key {
            path: path.to_owned(),
            key: key.to_owned(),
            value: keys.get(key).map_or_else(|| "missing".to_owned(), shown),
            problem: problem.to_owned(),
        };
        if keys.get("peft_type").and_then(Value::as_str) != Some("LORA") {
            return Err(wrong("peft_type", "adapters of the type \"LORA\" are read"));
        }
        match keys.get("task_type") {
            None | Some(Value::Null) => {}
            Some(Value::String(task)) if task == "CAUSAL_LM" => {}
            _ => {
                return Err(wrong(
                    "task_type",
                    "adapters of causal language models (\"CAUSAL_LM\") are read",
                ));
            }
        }
        match keys.get("bias") {
            None | Some(Value::Null) => {}
            Some(Value::String(bias)) if bias == "none" => {}
            _ => return Err(wrong("bias", "trained biases are not implemented; train with bias = \"none\"")),
        }
        match keys.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(Value::String(name)) if ["gaussian", "eva", "orthogonal"].contains(&name.as_str()) => {}
            _ => {
                let problem = "such an adapter belongs to weights that its initialisation changed; let PEFT save it as a \
                               plain one (path_initial_model_for_weight_conversion)";
                return Err(wrong("init_lora_weights", problem));
            }
        }
        let used = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::String(text) => !text.is_empty(),
            Value::Array(list) => !list.is_empty(),
            Value::Object(map) => !map.is_empty(),
            Value::Bool(true) | Value::Number(_) => true,
        };
        let known = |key: &str| INFORMATION.contains(&key) || READ.contains(&key);
        if let Some((key, _)) = keys.iter().find(|(key, value)| !known(key) && used(value)) {
            let problem = "this is not implemented, and may change what the adapter computes; train the adapter without it, \
                           or merge it with PEFT into a float model";
            return Err(wrong(key, problem));
        }
        let rank = keys.get("r").and_then(Value::as_u64).filter(|rank| (1..=MAX_RANK).contains(rank));
        let rank = rank.ok_or_else(|| wrong("r", "a rank from 1 to 65536 is expected"))?;
        let alpha = keys.get("lora_alpha").and_then(Value::as_f64).filter(|alpha| alpha.is_finite());
        let alpha = alpha.ok_or_else(|| wrong("lora_alpha", "a number is expected"))?;
        let rank_stabilised = match keys.get("use_rslora") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(value)) => *value,
            _ => return Err(wrong("use_rslora", "true or false is expected")),
        };
        let patterns = |key: &str, fits: &dyn Fn(f64) -> bool| -> Result<Vec<(String, f64)>, AdapterError> {
            let map = match keys.get(key) {
                None | Some(Value::Null) => return Ok(Vec::new()),
                Some(Value::Object(map)) => map,
                _ => return Err(wrong(key, "an object of names and numbers is expected")),
            };
            let plain = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "_.".contains(c));
            map.iter()
                .map(|(name, value)| match value.as_f64().filter(|value| fits(*value)) {
                    _ if !plain(name) => Err(wrong(
                        key,
                        "names of modules are read, such as `q_proj`; regular expressions are not",
                    )),
                    None => Err(wrong(key, "a number of this kind is not expected")),
                    Some(value) => Ok((name.clone(), value)),
                })
                .collect()
        };
        let is_rank = |value: f64| value.fract() == 0.0 && (1.0..=MAX_RANK as f64).contains(&value);
        Ok(Self {
            path: path.to_owned(),
            rank: rank as usize,
            alpha,
            rank_stabilised,
            ranks: patterns("rank_pattern", &is_rank)?,
            alphas: patterns("alpha_pattern", &|value| value.is_finite())?,
        })
    }

    /// Rank and factor of a module.
    pub fn of(&self, module: &str) -> Result<(usize, f32), AdapterError> {
        let rank = self.pattern("rank_pattern", &self.ranks, module)?.map_or(self.rank, |rank| rank as usize);
        let alpha = self.pattern("alpha_pattern", &self.alphas, module)?.unwrap_or(self.alpha);
        Ok((rank, factor(alpha, rank, self.rank_stabilised)))
    }

    /// What a pattern says of a module: it fits the end of the module's name.
    fn pattern(&self, key: &str, all: &[(String, f64)], module: &str) -> Result<Option<f64>, AdapterError> {
        let fits =
            |name: &str| module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        let mut found = all.iter().filter(|(name, _)| fits(name));
        let Some((name, value)) = found.next() else { return Ok(None) };
        match found.find(|(_, other)| other != value) {
            None => Ok(Some(*value)),
            Some((other, _)) => Err(AdapterError::Key {
                path: self.path.clone(),
                key: key.to_owned(),
                value: format!("different for `{name}` and `{other}`"),
                problem: format!("both fit `{module}`; leave one of them"),
            }),
        }
    }
}

/// What the product of the matrices is multiplied by.
pub(super) fn factor(alpha: f64, rank: usize, rank_stabilised: bool) -> f32 {
    let rank = rank as f64;
    (alpha / if rank_stabilised { rank.sqrt() } else { rank }) as f32
}

/// A value as JSON, cut.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{} ...", &text[..at]),
        None => text,
    }
}
