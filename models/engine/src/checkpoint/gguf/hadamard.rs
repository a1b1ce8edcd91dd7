//! The keys `prism.hadamard.*` of Prism ML's files: which matrices were rotated by a Walsh-Hadamard transform, and how.
//!
//! The input of a tensor in `weight_names` is transformed, x' = H(s * x), and rows that are looked up in a tensor of
//! `inverse_weight_names` are transformed back, s * H(z). H acts on runs of `block_size` values; the signs s belong to the
//! width of a row. (PrismML-Eng/llama.cpp, pull request 120.) Weights that are rotated compute nonsense without it, so
//! nothing in these keys is skipped.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use bitnet_burn::Projection;
use bitnet_burn_formats::FileError;
use bitnet_burn_formats::gguf::{Array, GgufFile, Value};

use super::super::Checkpoint;
use super::super::error::LoadError;
use super::super::source::{Rotated, Signs};
use super::keys::{string, wrong_value};
use super::names::projection_name;
use super::{EMBEDDING, OUTPUT};

const PREFIX: &str = "prism.hadamard.";
const KEYS: [&str; 10] = [
    "version",
    "block_size",
    "transform",
    "axis",
    "sign_mode",
    "sign_widths",
    "sign_values",
    "weight_names",
    "inverse_weight_names",
    "gdn_v_grouped",
];

const TRANSFORM: &str = "normalized-sylvester-walsh-hadamard";
const AXIS: &str = "input-last-dimension";
/// All signs are 1.
const IDENTITY: &str = "identity";
/// The signs are in other keys.
const EXPLICIT: &str = "explicit";

/// What the keys say.
#[derive(Debug)]
pub(super) struct Hadamard {
    block: usize,
    /// By width; `None`: all of them are 1.
    signs: Option<HashMap<usize, Arc<[f32]>>>,
    weights: HashSet<String>,
    inverse: HashSet<String>,
    /// `gdn_v_grouped`.
    grouped: bool,
}

impl Hadamard {
    /// Reads the keys of a file, if it has some.
    pub(super) fn read(file: &GgufFile) -> Result<Option<Self>, LoadError> {
        let ours = |(key, _): &&(String, Value)| key.starts_with(PREFIX);
        let mut found = file.metadata().iter().filter(ours).peekable();
        if found.peek().is_none() {
            return Ok(None);
        }
        for (key, value) in found {
            if !KEYS.contains(&&key[PREFIX.len()..]) {
                return Err(unsupported(file, key, value, KEYS.join(", ")));
            }
        }
        let expected = |key: &str, expected: &[&str]| {
            let full = format!("{PREFIX}{key}");
            match string(file, &full)? {
                Some(text) if expected.contains(&text.as_str()) => Ok(text),
                _ => Err(unsupported(file, &full, value(file, key)?, expected.join(", "))),
            }
        };
        let version = value(file, "version")?;
        if version.as_u64() != Some(1) {
            return Err(unsupported(file, &format!("{PREFIX}version"), version, "1".into()));
        }
        expected("transform", &[TRANSFORM])?;
        expected("axis", &[AXIS])?;
        let size = value(file, "block_size")?;
        let block = size.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| n.is_power_of_two());
        let Some(block) = block.filter(|&n| n <= 1 << 23) else {
            return Err(wrong_value(file, format!("{PREFIX}block_size"), size, "a power of two"));
        };
        let signs = match expected("sign_mode", &[IDENTITY, EXPLICIT])?.as_str() {
            IDENTITY => None,
            _ => Some(signs(file)?),
        };
        let names = |key: &str| -> Result<HashSet<String>, LoadError> {
            let full = format!("{PREFIX}{key}");
            let Some(value) = file.value(&full) else { return Ok(HashSet::new()) };
            let names = value.as_array().map(|names| names.strings().map(str::to_owned).collect::<Vec<_>>());
            match names {
                Some(names) if value.as_array().is_some_and(|all| all.len() == names.len()) => {
                    Ok(names.into_iter().collect())
                }
                _ => Err(wrong_value(file, full, value, "names of tensors")),
            }
        };
        let grouped = match file.value(&format!("{PREFIX}gdn_v_grouped")) {
            None => false,
            Some(value) => {
                let wrong = || wrong_value(file, format!("{PREFIX}gdn_v_grouped"), value, "a bool");
                value.as_bool().ok_or_else(wrong)?
            }
        };
        let (weights, inverse) = (names("weight_names")?, names("inverse_weight_names")?);
        let this = Self { block, signs, weights, inverse, grouped };
        for name in this.weights.iter().chain(&this.inverse) {
            let Some(tensor) = file.tensor(name) else {
                return Err(FileError::MissingTensor {
                    path: file.path().to_owned(),
                    tensor: name.clone(),
                    help: format!("; the keys `{PREFIX}*` name it"),
                }
                .into());
            };
            let (_, k) = tensor.matrix();
            let signs = |k: usize| this.signs.as_ref().is_none_or(|signs| signs.contains_key(&k));
            if !(k as usize).is_multiple_of(block) || !signs(k as usize) {
                return Err(LoadError::UnsupportedTensor {
                    path: file.path().to_owned(),
                    tensor: name.clone(),
                    problem: format!(
                        "rows of {k} values can't be transformed in runs of {block}, or `{PREFIX}sign_widths` lacks them"
                    ),
                });
            }
        }
        Ok(Some(this))
    }

    /// The rotation of a tensor's input of `k` values, if it has one.
    pub(super) fn of_input(&self, tensor: &str, k: usize) -> Option<Signs> {
        self.weights.contains(tensor).then(|| self.of_width(k))
    }

    /// That of the rows of `k` values that are looked up in a tensor.
    pub(super) fn of_rows(&self, tensor: &str, k: usize) -> Option<Signs> {
        self.inverse.contains(tensor).then(|| self.of_width(k))
    }

    /// Whether the output projections of gated DeltaNets, in the layers that have one, take their value heads in Hugging
    /// Face's order: those that are rotated, if `gdn_v_grouped` is set.
    ///
    /// # Errors
    /// If that differs from layer to layer.
    pub(super) fn groups_outputs(&self, file: &GgufFile, layers: &[bool]) -> Result<bool, LoadError> {
        let names = (0..).zip(layers).filter(|(_, has)| **has);
        let mut names = names.map(|(layer, _)| projection_name(layer, Projection::DeltaOut));
        let rotated = |name: &String| self.grouped && self.weights.contains(name);
        let Some(first) = names.next() else { return Ok(false) };
        match names.find(|name| rotated(name) != rotated(&first)) {
            None => Ok(rotated(&first)),
            Some(name) => Err(LoadError::UnsupportedTensor {
                path: file.path().to_owned(),
                tensor: name,
                problem: format!(
                    "`{PREFIX}gdn_v_grouped` is set, and of this and `{first}` only one is in `{PREFIX}weight_names`"
                ),
            }),
        }
    }

    /// A tensor that is rotated and none of these.
    pub(super) fn other_than(&self, known: impl Fn(&str) -> bool) -> Option<&String> {
        self.weights.iter().chain(&self.inverse).find(|name| !known(name))
    }

    fn of_width(&self, k: usize) -> Signs {
        let signs = match &self.signs {
            Some(signs) => signs.get(&k).cloned().unwrap_or_default(), // checked when they were read
            None => vec![1.0; k].into(),
        };
        Signs { signs, block: self.block }
    }
}

/// The keys for the rotations of a checkpoint; none if it has none.
///
/// # Errors
/// Why no keys say what it has: blocks of several sizes, or several signs for a width.
pub(crate) fn keys(checkpoint: &Checkpoint) -> Result<Vec<(String, Value)>, String> {
    let config = checkpoint.config();
    let (mut block, mut signs) = (None, BTreeMap::new());
    let mut rotated = |of: Rotated| -> Result<bool, String> {
        let Some(found) = checkpoint.rotation(of) else { return Ok(false) };
        if *block.get_or_insert(found.block) != found.block {
            return Err("its rotations have blocks of several sizes".into());
        }
        let width = found.signs.len();
        if *signs.entry(width).or_insert_with(|| found.signs.clone()) != found.signs {
            return Err(format!("its rotations of {width} values have several signs"));
        }
        Ok(true)
    };
    let (mut weights, mut inverse) = (Vec::new(), Vec::new());
    for layer in 0..config.n_layers {
        for which in Projection::of_layer(layer, config) {
            // The experts of a layer are one tensor.
            if rotated(Rotated::Projection(layer, which))? && which.expert().is_none_or(|number| number == 0)
            {
                weights.push(projection_name(layer, which));
            }
        }
    }
    if rotated(Rotated::Output)? {
        weights.push(if config.tied_embeddings { EMBEDDING } else { OUTPUT }.to_owned());
    }
    if rotated(Rotated::Embedding)? {
        inverse.push(EMBEDDING.to_owned());
    }
    let Some(block) = block else { return Ok(Vec::new()) };
    let widths = Array::from_i32(signs.keys().map(|&width| width as i32)); // checked with the configuration
    let values = Array::from_i32(signs.values().flat_map(|signs| signs.iter().map(|&sign| sign as i32)));
    let grouped = config.options.delta_net.as_ref().is_some_and(|delta| delta.grouped_output);
    let keys: [(&str, Value); 10] = [
        ("version", 1u32.into()),
        ("block_size", (block as u32).into()),
        ("transform", TRANSFORM.into()),
        ("axis", AXIS.into()),
        ("sign_mode", EXPLICIT.into()),
        ("sign_widths", widths.into()),
        ("sign_values", values.into()),
        ("weight_names", Array::from_strings(weights).into()),
        ("inverse_weight_names", Array::from_strings(inverse).into()),
        ("gdn_v_grouped", grouped.into()),
    ];
    Ok(keys.into_iter().map(|(key, value)| (format!("{PREFIX}{key}"), value)).collect())
}

fn value<'a>(file: &'a GgufFile, key: &str) -> Result<&'a Value, LoadError> {
    let key = format!("{PREFIX}{key}");
    let missing =
        || LoadError::MissingKey { path: file.path().to_owned(), key: key.clone(), help: String::new() };
    file.value(&key).ok_or_else(missing)
}

fn unsupported(file: &GgufFile, key: &str, value: &Value, supported: String) -> LoadError {
    LoadError::Unsupported {
        path: file.path().to_owned(),
        what: key.to_owned(),
        found: value.to_string(),
        supported,
    }
}

fn signs(file: &GgufFile) -> Result<HashMap<usize, Arc<[f32]>>, LoadError> {
    let numbers = |key: &str| {
        let value = value(file, key)?;
        let numbers = value.as_array().and_then(|array| array.to_i64());
        numbers.ok_or_else(|| wrong_value(file, format!("{PREFIX}{key}"), value, "whole numbers"))
    };
    let (widths, values) = (numbers("sign_widths")?, numbers("sign_values")?);
    let wrong = |key: &str, expected: &str| {
        Err(wrong_value(file, format!("{PREFIX}{key}"), value(file, key)?, expected))
    };
    if values.iter().any(|sign| sign.abs() != 1) {
        return wrong("sign_values", "numbers that are -1 or 1");
    }
    let (mut signs, mut rest) = (HashMap::new(), &values[..]);
    for width in widths {
        let part =
            usize::try_from(width).ok().filter(|&width| width > 0).and_then(|n| rest.split_at_checked(n));
        let Some((part, behind)) = part else {
            return wrong("sign_widths", "widths whose sum is the number of signs");
        };
        signs.insert(part.len(), part.iter().map(|&sign| sign as f32).collect());
        rest = behind;
    }
    match rest {
        [] => Ok(signs),
        _ => wrong("sign_widths", "widths whose sum is the number of signs"),
    }
}
