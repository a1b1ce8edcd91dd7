//! The keys of scaled RoPE, by what they do: those that leave every angle as it is are accepted.
//!
//! llama.cpp's and bitnet.cpp's converters write `linear` with the factor 1 into every file of 1bitLLM's
//! models. The formulas are llama.cpp's (`rope_yarn`): with the factor f, an angle is divided by f (`linear`),
//! or mixed with what it is divided by f (`yarn`), and cosine and sine are multiplied by
//! `attn_factor` (1 + 0.1 ln f).

use super::super::error::LoadError;
use super::config::Keys;

/// Where the factor is; the second is llama.cpp's older name. 0 stands for 1.
const FACTORS: [&str; 2] = ["rope.scaling.factor", "rope.scale_linear"];

/// Refuses keys that scale RoPE.
pub(super) fn check_scaling(keys: &Keys<'_>) -> Result<(), LoadError> {
    let unsupported = |key: String, found: String, supported: &str| LoadError::Unsupported {
        path: keys.file.path().to_owned(),
        what: key,
        found,
        supported: supported.into(),
    };
    let neutral = |suffix: &str, values: &[f64], supported: &str| match keys.float(suffix)? {
        Some(found) if !values.contains(&found) => {
            let key = keys.find(suffix).map_or_else(|| suffix.to_owned(), |(key, _)| key);
            Err(unsupported(key, found.to_string(), supported))
        }
        found => Ok(found.is_some()),
    };
    const ONE: &str = "1, which leaves RoPE as it is";
    let stated = keys.find("rope.scaling.type");
    // A file without a type is scaled linearly if it has a factor.
    let kind = stated.as_ref().map_or("linear", |(_, kind)| kind.as_str().unwrap_or_default());
    match (kind, stated) {
        ("linear" | "yarn" | "none", _) | (_, None) => {}
        (_, Some((key, kind))) => {
            return Err(unsupported(key, kind.to_string(), "none, and linear or yarn with a factor of 1"));
        }
    }
    neutral("rope.scaling.attn_factor", &[1.0], ONE)?;
    if kind == "none" {
        return Ok(());
    }
    let mut has_factor = false;
    for suffix in FACTORS {
        has_factor |= neutral(suffix, &[0.0, 1.0], ONE)?;
    }
    if kind == "yarn" {
        neutral("rope.scaling.yarn_attn_factor", &[1.0], ONE)?;
        if !has_factor {
            return Err(keys.missing(FACTORS[0]));
        }
    }
    Ok(())
}
