//! What a configuration becomes after the caller's wishes and the size of the vocabulary.

use super::error::LoadError;
use super::source::OpenOptions;
use bitnet_burn::{GatedActivation, ModelConfig};
use std::path::Path;

/// The feed-forward activation: the option, else what the file states under `(key, name)`, else the default.
pub(super) fn choose_activation(
    path: &Path,
    options: &OpenOptions,
    stated: Option<(&str, &str)>,
    warnings: &mut Vec<String>,
    default: impl FnOnce() -> Result<GatedActivation, LoadError>,
) -> Result<GatedActivation, LoadError> {
    let of_file = match stated {
        None => default(),
        Some((key, name)) => GatedActivation::from_name(name).ok_or_else(|| LoadError::UnknownActivation {
            path: path.to_owned(),
            problem: format!(
                "key `{key}` is \"{name}\", an activation that is not supported; supported: relu2, silu, gelu, \
                 gelu_pytorch_tanh (gelu_new)"
            ),
        }),
    };
    let Some(asked) = options.hidden_act else { return of_file };
    match (of_file, stated) {
        (Ok(found), None) if found != asked => {
            warnings.push(format!(
                "the activation is {asked} as asked for; by its architecture it would be {found}"
            ));
        }
        (Ok(found), Some((key, _))) if found != asked => {
            warnings.push(format!("the activation is {asked} as asked for; key `{key}` says {found}"));
        }
        (Err(e), Some(_)) => warnings.push(format!("the activation is {asked} as asked for; {e}")),
        _ => {}
    }
    Ok(asked)
}

/// Removes special tokens outside the vocabulary: they could never be embedded or sampled.
pub(super) fn drop_foreign_tokens(config: &mut ModelConfig, warnings: &mut Vec<String>) {
    let size = config.vocab_size;
    let mut known = |what: &str, id: u32| {
        let known = (id as usize) < size;
        if !known {
            warnings.push(format!("the {what} token {id} is outside the vocabulary of {size} and ignored"));
        }
        known
    };
    config.bos_token = config.bos_token.filter(|&id| known("beginning", id));
    config.eos_tokens.retain(|&id| known("end", id));
}
