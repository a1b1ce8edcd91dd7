//! RoPE's scaling, from keys and tensors.
//!
//! The keys are llama.cpp's. Values that leave every angle as it is are no scaling: converters write `linear` with the
//! factor 1 into every file of 1bitLLM's models. YaRN is computed as in transformers. llama.cpp ignores
//! `yarn_beta_fast`, `yarn_beta_slow` and `yarn_attn_factor` for most architectures; where they say something else
//! than its defaults, that is a warning.

use super::super::error::LoadError;
use super::super::values::floats;
use super::config::Keys;
use super::dense;
use bitnet_burn::RopeScaling;
use bitnet_burn_formats::FileError;

/// The divisors of the frequencies, and LongRoPE's two sets of them.
pub(crate) const TENSORS: [&str; 3] =
    ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];
/// What kind of scaling it is.
pub(crate) const TYPE: &str = "rope.scaling.type";
/// Positions before scaling.
pub(crate) const ORIGINAL: &str = "rope.scaling.original_context_length";
/// What cosines and sines are multiplied by.
pub(crate) const ATTENTION_FACTOR: &str = "rope.scaling.attn_factor";
/// Where the factor is; the second is llama.cpp's older name. 0 stands for 1.
pub(crate) const FACTORS: [&str; 2] = ["rope.scaling.factor", "rope.scale_linear"];
/// transformers' and llama.cpp's defaults of YaRN.
pub(crate) const BETAS: (f64, f64) = (32.0, 1.0);

/// The values of one of [`TENSORS`].
fn divisors(keys: &Keys<'_>, name: &str) -> Result<Option<Vec<f32>>, LoadError> {
    let Some(tensor) = keys.file.tensor(name) else { return Ok(None) };
    let Some(tensor) = dense(keys.file, tensor)? else { return Ok(None) };
    floats(keys.file.path(), &tensor).map(Some)
}

/// How RoPE's frequencies are scaled.
pub(super) fn scaling(
    keys: &Keys<'_>,
    context_length: usize,
    warnings: &mut Vec<String>,
) -> Result<Option<RopeScaling>, LoadError> {
    let unsupported = |key: String, found: String, supported: &str| LoadError::Unsupported {
        path: keys.file.path().to_owned(),
        what: key,
        found,
        supported: supported.into(),
    };
    let stated = keys.find(TYPE);
    // A file without a type is scaled linearly if it has a factor.
    let kind = stated.as_ref().map_or("linear", |(_, kind)| kind.as_str().unwrap_or_default());
    let mut factor = None;
    for suffix in FACTORS {
        let Some(found) = keys.float(suffix)?.filter(|_| kind != "none") else { continue };
        let found = if found == 0.0 { 1.0 } else { found };
        if factor.is_some_and(|factor| factor != found) {
            let problem = format!("{found}, and another key says {}", factor.unwrap_or_default());
            return Err(unsupported(format!("`{suffix}`"), problem, "one factor"));
        }
        factor = Some(found);
    }
    let attention = keys.float(ATTENTION_FACTOR)?;
    let frequencies = divisors(keys, TENSORS[0])?.filter(|divisors| divisors.iter().any(|&d| d != 1.0));
    let original = keys.size(ORIGINAL)?.filter(|&original| original > 0);
    let scaling = match (kind, stated) {
        ("none", _) => None,
        ("linear", _) | (_, None) => {
            factor.filter(|&factor| factor != 1.0).map(|factor| RopeScaling::Linear { factor })
        }
        ("yarn", _) => {
            let factor = factor.ok_or_else(|| keys.missing(FACTORS[0]))?;
            yarn(keys, factor, original.unwrap_or(context_length), attention, warnings)?
        }
        ("longrope", _) => {
            let [short, long] = [TENSORS[1], TENSORS[2]].map(|name| divisors(keys, name));
            let missing = |tensor: &str| FileError::MissingTensor {
                path: keys.file.path().to_owned(),
                tensor: tensor.to_owned(),
                help: "; `rope.scaling.type` is longrope".into(),
            };
            let original = original.unwrap_or(context_length);
            Some(RopeScaling::LongRope {
                short: short?.ok_or_else(|| missing(TENSORS[1]))?,
                long: long?.ok_or_else(|| missing(TENSORS[2]))?,
                original,
                attention_factor: attention
                    .unwrap_or_else(|| RopeScaling::long_rope_attention_factor(context_length, original)),
            })
        }
        (_, Some((key, kind))) => {
            return Err(unsupported(key, kind.to_string(), "none, linear, yarn, longrope"));
        }
    };
    if let Some(attention) = attention.filter(|&a| a != 1.0 && matches!(kind, "linear" | "none")) {
        let key = "`rope.scaling.attn_factor`".into();
        return Err(unsupported(key, attention.to_string(), "1, or with yarn or longrope"));
    }
    match (scaling, frequencies) {
        (scaling, None) => Ok(scaling),
        (None, Some(divisors)) => Ok(Some(RopeScaling::Divisors { divisors })),
        (Some(_), Some(_)) => Err(LoadError::UnsupportedTensor {
            path: keys.file.path().to_owned(),
            tensor: TENSORS[0].into(),
            problem: format!("`rope.scaling.type` is {kind}: one way of scaling is supported, not both"),
        }),
    }
}

fn yarn(
    keys: &Keys<'_>,
    factor: f64,
    original: usize,
    attention: Option<f64>,
    warnings: &mut Vec<String>,
) -> Result<Option<RopeScaling>, LoadError> {
    let logarithm = keys.float("rope.scaling.yarn_log_multiplier")?.filter(|&m| m != 0.0);
    if let Some(found) = logarithm {
        return Err(LoadError::Unsupported {
            path: keys.file.path().to_owned(),
            what: "`rope.scaling.yarn_log_multiplier`".into(),
            found: found.to_string(),
            supported: "0".into(),
        });
    }
    let mut ignored = Vec::new();
    let mut stated = |suffix: &str, default: f64| -> Result<f64, LoadError> {
        let key = format!("rope.scaling.yarn_{suffix}");
        let Some(found) = keys.float(&key)? else { return Ok(default) };
        if (found - default).abs() > 1e-6 * default {
            ignored.push(format!(
                "`{key}` is {found} and is used, as in transformers; llama.cpp computes with {default}"
            ));
        }
        Ok(found)
    };
    let (beta_fast, beta_slow) = (stated("beta_fast", BETAS.0)?, stated("beta_slow", BETAS.1)?);
    let attention_factor =
        stated("attn_factor", RopeScaling::yarn_attention_factor(factor))? * attention.unwrap_or(1.0);
    if factor == 1.0 && attention_factor == 1.0 {
        return Ok(None);
    }
    warnings.append(&mut ignored);
    let truncate = true;
    Ok(Some(RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention_factor }))
}
