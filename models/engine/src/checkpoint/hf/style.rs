//! How the projections of a Hugging Face directory are stored.
//!
//! Projections come in three styles, told apart by `quantization_config` (transformers,
//! `integrations/bitnet.py`):
//!
//! | `linear_class` | `quantization_mode` | weights | scale |
//! | --- | --- | --- | --- |
//! | `autobitlinear` | `online` | float masters [out, in] | their absmean |
//! | `autobitlinear` | `offline` (or absent) | U8 [out/4, in] | `weight_scale` |
//! | `bitlinear` (or absent) | any | U8 [out/4, in] | 1 / `weight_scale` |
//!
//! 1bitLLM's configurations have `weight_bits` and `input_bits` instead, and float masters.
//!
//! Without any of these, float weights are computed as they are, as transformers does. Packed weights don't say
//! in which direction their scale goes then (a factor of 5 where it is guessed wrong, which most norms hide), and a
//! model of type `bitnet` is never meant to be computed as it is, unless its values are ternary already: such a directory is
//! refused, with the lines to add to its `config.json`.
//!
//! How the activations of such projections were quantised in training is in a key of this project, which others ignore:
//! `"bitnet_burn": {"activations": "group:64"}`, with the text of an [`ActivationRule`].

use super::super::error::LoadError;
use super::fields::Fields;
use bitnet_burn::names::{norm_name, projection_module, projection_name};
use bitnet_burn::{ActivationRule, Norm, Projection};
use bitnet_burn_formats::safetensors::{Dtype, SafeTensor, dense_format};
use bitnet_burn_formats::ternary::scaled_from_dense;
use std::collections::BTreeMap;

/// How the projections are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// `autobitlinear`, `online`: float masters, to be quantised by absmean.
    Online,
    /// `autobitlinear`, `offline`: packed; the scale multiplies.
    PackedAuto,
    /// `bitlinear`: packed; the scale divides.
    PackedInverse,
    /// No `quantization_config`: float values, computed as they are, or by their scales if they are ternary.
    Values,
}

/// 1bitLLM's configurations: float masters, for one kind of quantisation.
fn of_bits(fields: Fields<'_>, tensors: &BTreeMap<String, SafeTensor>) -> Result<Option<Style>, LoadError> {
    for (key, expected) in [("weight_bits", 1), ("input_bits", 8)] {
        match fields.size(key)? {
            None => return Ok(None),
            Some(bits) if bits == expected => {}
            Some(bits) => return Err(fields.unsupported(key, &bits.into(), &expected.to_string())),
        }
    }
    let packed = tensors.get(&projection_name(0, Projection::Q)).is_some_and(|t| t.dtype == Dtype::U8);
    Ok((!packed).then_some(Style::Online))
}

/// The key of `config.json` that is this project's.
pub(crate) const EXTENSION: &str = "bitnet_burn";

/// How the activations of projections are quantised, where that is stated.
pub(super) fn activations(fields: Fields<'_>) -> Result<Option<ActivationRule>, LoadError> {
    let Some(extension) = fields.within(EXTENSION) else { return Ok(None) };
    if !extension.json.is_object() {
        return Err(fields.wrong(EXTENSION, extension.json, "an object"));
    }
    let Some(text) = extension.str("activations")? else { return Ok(None) };
    let wrong = |problem: String| {
        extension.wrong(&format!("{EXTENSION}.activations"), &text.into(), &format!("a rule ({problem})"))
    };
    text.parse().map(Some).map_err(wrong)
}

/// Whether all values of a matrix are -s, 0 or s, with a scale s for each row or group.
fn is_ternary(tensor: &SafeTensor) -> bool {
    match (dense_format(tensor.dtype), &tensor.shape[..]) {
        (Some(format), &[n, k]) => scaled_from_dense(format, &tensor.data, n, k).is_ok(),
        _ => false,
    }
}

/// How the projections are stored, from `quantization_config`.
pub(super) fn style(
    fields: Fields<'_>,
    tensors: &BTreeMap<String, SafeTensor>,
    warnings: &mut Vec<String>,
) -> Result<Style, LoadError> {
    let refuse = |problem: String| LoadError::Quantization { path: fields.path.to_owned(), problem };
    let Some(quantization) = fields.within("quantization_config") else {
        if let Some(style) = of_bits(fields, tensors)? {
            return Ok(style);
        }
        let first = projection_name(0, Projection::Q);
        let stored = tensors.get(&first);
        let packed = stored.is_some_and(|t| t.dtype == Dtype::U8);
        if !packed && has_norms(tensors) && !stored.is_some_and(is_ternary) {
            // BitNet's embedding models say it by nothing else.
            warnings.push(
                "`quantization_config` is missing; a norm before each projection stands for BitNet's layers, so weights \
                 become ternary by their absmean, and activations are int8 by row"
                    .into(),
            );
            return Ok(Style::Online);
        }
        if !packed && (fields.architecture()? != "bitnet" || stored.is_some_and(is_ternary)) {
            return Ok(Style::Values);
        }
        const AUTO: &str = r#"{"quant_method": "bitnet", "linear_class": "autobitlinear""#;
        return Err(refuse(if packed {
            format!(
                "`quantization_config` is missing, so that nothing says in which direction the scales of the \
                 packed weights (`{first}` is U8) go; add {AUTO}, \"quantization_mode\": \"offline\"}} if they \
                 multiply, or {{\"quant_method\": \"bitnet\", \"linear_class\": \"bitlinear\"}} if they divide"
            )
        } else {
            format!(
                "`quantization_config` is missing: without it this is a model with plain float weights, which \
                 transformers would run without any quantisation; if the weights are masters trained for \
                 BitNet, add {AUTO}, \"quantization_mode\": \"online\"}}"
            )
        }));
    };
    match quantization.str("quant_method")? {
        Some("bitnet") => {}
        Some(other) => {
            return Err(refuse(format!("`quant_method` is \"{other}\"; only \"bitnet\" is supported")));
        }
        None => return Err(quantization.missing("quantization_config.quant_method")),
    }
    if quantization.bool("use_rms_norm")? == Some(true) && !has_norms(tensors) {
        return Err(refuse(
            "`use_rms_norm` (a norm inside every projection) is true, and the projections have no tensors `norm.weight`"
                .into(),
        ));
    }
    if let Some(modules) = quantization.get("modules_to_not_convert") {
        let expected = "a list of strings";
        let list = modules
            .as_array()
            .ok_or_else(|| quantization.wrong("modules_to_not_convert", modules, expected))?;
        for module in list {
            let name = module
                .as_str()
                .ok_or_else(|| quantization.wrong("modules_to_not_convert", module, expected))?;
            if Projection::every().any(|p| projection_module(0, p).contains(name))
                || name.starts_with("model.layers.")
            {
                return Err(refuse(format!(
                    "`modules_to_not_convert` has \"{name}\": models with projections that are not ternary are \
                     not supported"
                )));
            }
        }
    }
    let mode = quantization.str("quantization_mode")?;
    if let Some(other) = mode.filter(|m| !matches!(*m, "online" | "offline")) {
        return Err(refuse(format!("`quantization_mode` is \"{other}\"; supported: online, offline")));
    }
    match quantization.str("linear_class")? {
        Some("autobitlinear") if mode == Some("online") => Ok(Style::Online),
        Some("autobitlinear") => Ok(Style::PackedAuto),
        None | Some("bitlinear") => {
            if mode == Some("online") {
                warnings.push(
                    "`quantization_mode` is online, but linear_class `bitlinear` is always packed; read as such"
                        .into(),
                );
            }
            Ok(Style::PackedInverse)
        }
        Some(other) => {
            Err(refuse(format!("`linear_class` is \"{other}\"; supported: autobitlinear, bitlinear")))
        }
    }
}

/// Whether each projection has a norm of its own.
pub(super) fn has_norms(tensors: &BTreeMap<String, SafeTensor>) -> bool {
    tensors.contains_key(&norm_name(Norm::Input(0, Projection::Q)))
}
