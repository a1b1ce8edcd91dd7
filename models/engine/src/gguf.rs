//! Writing models as GGUF, with the names and keys that llama.cpp and bitnet.cpp know.

mod readers;

use crate::checkpoint::gguf::names::gptj_rows;
use crate::checkpoint::{Checkpoint, LoadError};
use bitnet_burn::{ModelConfig, Norm, Projection};
use bitnet_burn_formats::gguf::GgufWriter;
use bitnet_burn_formats::{DenseFormat, DenseTensor, TernaryTensor, WriteError};
use std::io;

pub use crate::checkpoint::gguf::names::{norm_name, projection_name};
pub use bitnet_burn_formats::gguf::TernaryType;
pub use readers::Architecture;

/// Why a model was not written as GGUF.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufWriteError {
    /// The file can't be written.
    #[error(transparent)]
    File(#[from] WriteError),
    /// The model to be written could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// An architecture under which no program computes the model.
    #[error("architecture `{asked}` {problem}; `{instead}` is the one for this model")]
    Architecture {
        /// The architecture that was asked for.
        asked: &'static str,
        /// Why not.
        problem: &'static str,
        /// The one that would have been chosen.
        instead: &'static str,
    },
}

/// How the tensors of a model are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GgufTypes {
    /// The projections.
    pub ternary: TernaryType,
    /// The embedding and the output head; `None`: as the checkpoint has them.
    pub dense: Option<DenseFormat>,
    /// The architecture that the file names; `None`: the one under which most programs compute the model.
    pub architecture: Option<Architecture>,
}

impl GgufTypes {
    /// What other programs get wrong about a model that is written like this, in sentences. No program says so
    /// itself.
    pub fn warnings(&self, config: &ModelConfig) -> Vec<String> {
        readers::warnings(config, self.ternary, self.architecture(config))
    }

    fn architecture(&self, config: &ModelConfig) -> Architecture {
        self.architecture.unwrap_or_else(|| Architecture::of(config, self.ternary))
    }
}

/// Adds the keys of a configuration, so that a reader finds the same one. `hidden_act` states the
/// activation, whatever the architecture.
///
/// The architecture is [`Architecture::of`] the model. In a `llama` file the rows of q and k are in another
/// order: [`write_checkpoint`] sees to that.
///
/// # Errors
/// [`WriteError::Duplicate`].
pub fn write_config(writer: &mut GgufWriter<'_>, config: &ModelConfig) -> Result<(), WriteError> {
    config_as(writer, Architecture::of(config, TernaryType::I2_S).name(), config)
}

fn config_as(
    writer: &mut GgufWriter<'_>,
    architecture: &str,
    config: &ModelConfig,
) -> Result<(), WriteError> {
    writer.set("general.architecture", architecture)?;
    if let Some(name) = &config.name {
        writer.set("general.name", name.as_str())?;
    }
    let mut sizes = vec![
        ("vocab_size", config.vocab_size),
        ("context_length", config.context_length),
        ("embedding_length", config.hidden_size),
        ("block_count", config.n_layers),
        ("feed_forward_length", config.intermediate_size),
        ("rope.dimension_count", config.head_dim),
        ("attention.head_count", config.n_heads),
        ("attention.head_count_kv", config.n_kv_heads),
    ];
    if config.q_size() != config.hidden_size || config.options.qk_norms {
        sizes
            .extend([("attention.key_length", config.head_dim), ("attention.value_length", config.head_dim)]);
    }
    for (suffix, size) in sizes {
        // As u32, which readers expect; what ModelConfig::validate lets through fits.
        writer.set(format!("{architecture}.{suffix}"), u32::try_from(size).unwrap_or(u32::MAX))?;
    }
    writer.set(format!("{architecture}.attention.layer_norm_rms_epsilon"), config.rms_norm_eps)?;
    writer.set(format!("{architecture}.rope.freq_base"), config.rope_theta as f32)?;
    writer.set(format!("{architecture}.hidden_act"), config.activation.name())?;
    let tokens = [
        ("bos_token_id", config.bos_token),
        ("eos_token_id", config.eos_tokens.first().copied()),
        ("eot_token_id", config.eos_tokens.get(1).copied()),
    ];
    for (key, token) in tokens {
        if let Some(token) = token {
            writer.set(format!("tokenizer.ggml.{key}"), token)?;
        }
    }
    Ok(())
}

/// Adds a whole model but its tokenizer: configuration, projections, norms as F32, embedding and head.
/// Tensors are read and converted when their turn to be written comes.
///
/// TQ1_0 and TQ2_0 store their scale as f16: it is rounded to the nearest.
///
/// # Arguments
/// - `config`: the checkpoint's, with the name and the tokens that the copy is to have
///
/// # Errors
/// [`WriteError::Tensor`] where a type cannot hold a tensor: I2_S needs a K that is a multiple of 128,
/// TQ1_0, TQ2_0 and Q6_K of 256, Q8_0 and Q4_0 of 32. [`GgufWriteError::Load`] where the embedding or the
/// head can't be read. [`GgufWriteError::Architecture`] for `llama` and a model that is none.
pub fn write_checkpoint<'a>(
    writer: &mut GgufWriter<'a>,
    config: &ModelConfig,
    checkpoint: &'a Checkpoint,
    types: GgufTypes,
) -> Result<(), GgufWriteError> {
    let architecture = types.architecture(config);
    if let Some(problem) = architecture.problem(config) {
        let instead = Architecture::of(config, types.ternary).name();
        return Err(GgufWriteError::Architecture { asked: architecture.name(), problem, instead });
    }
    config_as(writer, architecture.name(), config)?;
    matrix(writer, "token_embd.weight", checkpoint.embedding()?, types.dense)?;
    for layer in 0..config.n_layers {
        for which in Norm::of_layer(layer, config) {
            norm(writer, checkpoint, which)?;
        }
        for which in Projection::ALL {
            let (n, k) = which.shape(config);
            let reorder =
                matches!(which, Projection::Q | Projection::K) && architecture == Architecture::Llama;
            let head = reorder.then_some(config.head_dim);
            let dims = [k as u64, n as u64];

            writer.tensor(projection_name(layer, which), &dims, types.ternary, move |out| {
                let tensor = checkpoint.checked_projection(layer, which).map_err(io::Error::other)?;
                match head {
                    Some(head) => {
                        let codes = gptj_rows(&tensor.codes, n, head).into();
                        types.ternary.write(&TernaryTensor { codes, ..tensor }, out)
                    }
                    None => types.ternary.write(&tensor, out),
                }
            })?;
        }
    }
    norm(writer, checkpoint, Norm::Output)?;
    if let Some(output) = checkpoint.output()? {
        matrix(writer, "output.weight", output, types.dense)?;
    }
    Ok(())
}

/// Adds the embedding or the head, in another format if one is asked for.
fn matrix(
    writer: &mut GgufWriter<'_>,
    name: &str,
    tensor: DenseTensor,
    format: Option<DenseFormat>,
) -> Result<(), WriteError> {
    match format.filter(|&format| format != tensor.format) {
        None => writer.dense(name, tensor)?,
        Some(format) => {
            let dims = [tensor.k as u64, tensor.n as u64];
            writer.tensor(name, &dims, format, move |out| tensor.write_as(format, out))?
        }
    };
    Ok(())
}

fn norm<'a>(writer: &mut GgufWriter<'a>, checkpoint: &'a Checkpoint, which: Norm) -> Result<(), WriteError> {
    let dims = [which.len(checkpoint.config()) as u64];
    writer.tensor(norm_name(which), &dims, DenseFormat::F32, move |out| {
        let weights = checkpoint.norm(which).map_err(io::Error::other)?;
        weights.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()))
    })?;
    Ok(())
}
