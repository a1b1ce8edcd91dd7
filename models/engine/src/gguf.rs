//! Writing models as GGUF, with the names and keys that llama.cpp and bitnet.cpp know.

mod config;
mod matrices;
mod readers;

use crate::checkpoint::gguf::names::{bias_name, float_part_name, is_gptj, norm_name_of};
use crate::checkpoint::{Checkpoint, LoadError};
use bitnet_burn::{FloatPart, ModelConfig, Norm, Projection};
use bitnet_burn_formats::gguf::GgufWriter;
use bitnet_burn_formats::{DenseFormat, DenseTensor, WriteError};
use std::io;

pub use crate::checkpoint::gguf::names::{norm_name, projection_name};
pub use bitnet_burn_formats::gguf::TernaryType;
pub use matrices::{MatrixError, encoded};
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
    /// What no GGUF file says.
    #[error("GGUF cannot hold this model: {problem}; a Hugging Face directory can")]
    Inexpressible {
        /// What it has.
        problem: String,
    },
}

/// How the tensors of a model are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GgufTypes {
    /// The projections.
    pub ternary: TernaryType,
    /// The embedding and the output head; `None`: as the checkpoint has them, or like the projections if that is exact.
    pub dense: Option<DenseFormat>,
    /// The architecture that the file names; `None`: the one under which most programs compute the model.
    pub architecture: Option<Architecture>,
    /// Whether projections that the type can't hold exactly become the nearest that it can hold.
    pub requantise: bool,
}

impl GgufTypes {
    /// What other programs get wrong about a model that is written like this, in sentences. No program says so
    /// itself.
    pub fn warnings(&self, config: &ModelConfig) -> Vec<String> {
        match self.architecture(config) {
            Some(architecture) => readers::warnings(config, self.ternary, architecture),
            None => Vec::new(),
        }
    }

    fn architecture(&self, config: &ModelConfig) -> Option<Architecture> {
        self.architecture.or_else(|| Architecture::of(config, self.ternary))
    }
}

/// Adds the keys of a configuration, so that a reader finds the same one. `hidden_act` states the
/// activation, whatever the architecture.
///
/// The architecture is [`Architecture::of`] the model. In a `llama` file the rows of q and k are in another
/// order: [`write_checkpoint`] sees to that.
///
/// # Errors
/// [`WriteError::Duplicate`], [`GgufWriteError::Inexpressible`].
pub fn write_config(writer: &mut GgufWriter<'_>, config: &ModelConfig) -> Result<(), GgufWriteError> {
    let architecture = Architecture::of(config, TernaryType::I2_S);
    config::write(writer, architecture.ok_or_else(|| readers::no_architecture(config))?, config)
}

/// Adds a whole model but its tokenizer: configuration, projections, biases, norms and routers, embedding and head.
/// Tensors are read and converted when their turn to be written comes.
///
/// # Arguments
/// - `config`: the checkpoint's, with the name and the tokens that the copy is to have
///
/// # Errors
/// [`WriteError::Tensor`] where a type cannot hold a tensor: I2_S, PQ2_0 and PTQ1_0 need a K that is a multiple of 128,
/// TQ1_0, TQ2_0 and Q6_K of 256, Q2_0 of 64, Q8_0 and Q4_0 of 32. [`GgufWriteError::Load`] where the embedding or the
/// head can't be read. [`GgufWriteError::Architecture`] for `llama` and a model that is none, and
/// [`GgufWriteError::Inexpressible`]. Weights that the type can't hold exactly are found when they are written: that is a
/// [`WriteError::Io`] with a [`MatrixError`] in it.
pub fn write_checkpoint<'a>(
    writer: &mut GgufWriter<'a>,
    config: &ModelConfig,
    checkpoint: &'a Checkpoint,
    types: GgufTypes,
) -> Result<(), GgufWriteError> {
    let architecture = types.architecture(config).ok_or_else(|| readers::no_architecture(config))?;
    if let Some(problem) = architecture.problem(config) {
        let instead =
            Architecture::of(config, types.ternary).ok_or_else(|| readers::no_architecture(config))?;
        let (asked, instead) = (architecture.name(), instead.name());
        return Err(GgufWriteError::Architecture { asked, problem, instead });
    }
    config::write(writer, architecture, config)?;
    config::write_rotations(writer, checkpoint)?;
    config::write_activations(writer, architecture, checkpoint, types.ternary)?;
    config::write_pooling(writer, architecture, checkpoint)?;
    config::write_rope_tensors(writer, config)?;
    matrix(writer, "token_embd.weight", checkpoint.embedding()?, types)?;
    for layer in 0..config.n_layers {
        for which in Norm::of_layer(layer, config) {
            norm(writer, checkpoint, (which, architecture))?;
        }
        for which in FloatPart::of_layer(layer, config) {
            float_part(writer, checkpoint, layer, which)?;
        }
        for all in tensors_of_layer(layer, config) {
            let which = all[0];
            let turns = matches!(which, Projection::Q | Projection::K) && is_gptj(architecture.name());
            let head = turns.then_some(config.head_dim);
            let (n, k) = which.shape(config);
            let mut dims = vec![k as u64, n as u64];
            dims.extend(which.expert().map(|_| all.len() as u64));
            writer.tensor(projection_name(layer, which), &dims, types.ternary, move |out| {
                for which in all {
                    let weights = checkpoint.weights(layer, which).map_err(io::Error::other)?;
                    matrices::write(&weights, types, head, out)?;
                }
                Ok(())
            })?;
            if which.has_bias(config) {
                writer.tensor(bias_name(layer, which), &[n as u64], DenseFormat::F32, move |out| {
                    let bias = checkpoint.bias(layer, which).map_err(io::Error::other)?;
                    let bytes: Vec<u8> = bias.iter().flat_map(|v| v.to_le_bytes()).collect();
                    out.write_all(&matrices::ordered(&bytes, n, head))
                })?;
            }
        }
    }
    norm(writer, checkpoint, (Norm::Output, architecture))?;
    if let Some(output) = checkpoint.output()? {
        matrix(writer, "output.weight", output, types)?;
    }
    Ok(())
}

/// Adds the embedding or the head: in another format if one is asked for, like the projections if it is ternary like them.
fn matrix(
    writer: &mut GgufWriter<'_>,
    name: &str,
    tensor: DenseTensor,
    types: GgufTypes,
) -> Result<(), WriteError> {
    let asked = types.dense.filter(|&format| format != tensor.format);
    match asked {
        Some(format) => {
            let dims = [tensor.k as u64, tensor.n as u64];
            writer.tensor(name, &dims, format, move |out| tensor.write_as(format, out))?
        }
        None if types.dense.is_some() => writer.dense(name, tensor)?,
        None => writer.dense(name, matrices::like_projections(tensor, types.ternary))?,
    };
    Ok(())
}

/// The projections of a layer by tensors: one has the matrices of all experts.
pub(crate) fn tensors_of_layer(layer: usize, config: &ModelConfig) -> Vec<Vec<Projection>> {
    let of_layer = Projection::of_layer(layer, config).into_iter();
    let mut tensors: Vec<Vec<_>> =
        of_layer.filter(|which| which.expert().is_none()).map(|which| vec![which]).collect();
    if let Some(experts) = config.experts(layer) {
        let parts = [Projection::ExpertGate, Projection::ExpertUp, Projection::ExpertDown];
        tensors.extend(parts.map(|part| (0..experts.count).map(part).collect()));
    }
    tensors
}

/// Adds a part that is floats in every model, as the reader takes it.
fn float_part(
    writer: &mut GgufWriter<'_>,
    checkpoint: &Checkpoint,
    layer: usize,
    which: FloatPart,
) -> Result<(), GgufWriteError> {
    let (name, tensor) = (float_part_name(layer, which), checkpoint.float_part(layer, which)?);
    match which {
        FloatPart::Router | FloatPart::SharedRouter | FloatPart::DeltaDecay | FloatPart::DeltaStrength => {
            writer.dense(name, tensor)?;
        }
        FloatPart::DeltaConvolution => {
            // In the order of Hugging Face's.
            let values = which.to_checkpoint(&checkpoint.floats(&tensor)?, checkpoint.config());
            writer.tensor(name, &[tensor.n as u64, tensor.k as u64], DenseFormat::F32, move |out| {
                values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
            })?;
        }
        FloatPart::DeltaRate | FloatPart::DeltaBias => {
            writer.vector(name, checkpoint.floats(&tensor)?)?;
        }
    }
    Ok(())
}

fn norm<'a>(
    writer: &mut GgufWriter<'a>,
    checkpoint: &'a Checkpoint,
    (which, architecture): (Norm, Architecture),
) -> Result<(), WriteError> {
    let dims = [which.len(checkpoint.config()) as u64];
    writer.tensor(norm_name_of(architecture.name(), which), &dims, DenseFormat::F32, move |out| {
        let weights = checkpoint.norm(which).map_err(io::Error::other)?;
        weights.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()))
    })?;
    Ok(())
}
