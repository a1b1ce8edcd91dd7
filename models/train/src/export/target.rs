//! What a target can hold at all, before anything is written.

use super::{ExportError, Target};
use bitnet_burn::{ModelConfig, Projection};
use bitnet_burn_engine::checkpoint::{Checkpoint, LoadError, Weights};
use bitnet_burn_engine::gguf::TernaryType;
use bitnet_burn_engine::hf::Style;
use bitnet_burn_formats::gguf::TensorType;

/// The type in which a checkpoint's projections are written where none is asked for: I2_S where they have int8 activations
/// by row, else their own, or Q2_0, which the most programs read.
///
/// # Errors
/// If the first projection can't be read.
pub fn default_ternary(checkpoint: &Checkpoint) -> Result<TernaryType, LoadError> {
    Ok(match checkpoint.weights(0, Projection::first(checkpoint.config()))? {
        Weights::Ternary(_) => TernaryType::I2_S,
        Weights::Dense(tensor) => TernaryType::of_blocks(tensor.format).unwrap_or(TernaryType::Q2_0),
    })
}

/// The style in which they are written where none is asked for: packed where they have int8 activations by row, else float
/// values.
///
/// # Errors
/// If the first projection can't be read.
pub fn default_style(checkpoint: &Checkpoint) -> Result<Style, LoadError> {
    Ok(match checkpoint.weights(0, Projection::first(checkpoint.config()))? {
        Weights::Ternary(_) => Style::PackedAuto,
        Weights::Dense(_) => Style::Values,
    })
}

/// Refuses what no writer could do.
pub(super) fn check(checkpoint: &Checkpoint, target: Target) -> Result<(), ExportError> {
    let config = checkpoint.config();
    let all = shapes(config);
    let int8 = matches!(checkpoint.weights(0, Projection::first(checkpoint.config()))?, Weights::Ternary(_));
    let other_activations = |format, instead| {
        const ROW: &str = "int8 activations by row";
        const OTHER: &str = "activations in groups or in f32, or several scales";
        let (stated, found) = if int8 { (OTHER, ROW) } else { (ROW, OTHER) };
        Err(ExportError::Activations { path: checkpoint.path().to_owned(), format, stated, found, instead })
    };
    let dense = match target {
        Target::Gguf(types) => {
            let tensor_type = TensorType::from(types.ternary);
            if tensor_type == TensorType::I2_S && !int8 {
                return other_activations("I2_S", "write q2_0, or another type with a scale for each block");
            }
            let of = tensor_type.block_size() as usize;
            if let Some((tensor, n, k)) = all.iter().find(|(_, _, k)| !k.is_multiple_of(of)).cloned() {
                let (format, instead) = (tensor_type.name(), instead_of_type(&all, int8));
                return Err(ExportError::Shape { tensor, n, k, format, dimension: "K", of, instead });
            }
            types.dense
        }
        Target::Hf { style: Style::Online, dense } => {
            if checkpoint.master(0, Projection::first(config))?.is_none() {
                let (stored_as, instead) = match checkpoint.weights(0, Projection::first(config))? {
                    Weights::Ternary(tensor) => (tensor.stored_as, INSTEAD_PACKED),
                    Weights::Dense(tensor) => (tensor.format.name(), INSTEAD_VALUES),
                };
                return Err(ExportError::NoMasters {
                    path: checkpoint.path().to_owned(),
                    stored_as,
                    instead,
                });
            }
            dense
        }
        Target::Hf { style: Style::Values, dense } => {
            if int8 {
                return other_activations("a directory of float values", INSTEAD_PACKED);
            }
            dense
        }
        Target::Hf { style: Style::PackedAuto | Style::PackedInverse, dense } => {
            if !int8 {
                return other_activations("the packed style", INSTEAD_VALUES);
            }
            if let Some((tensor, n, k)) = all.iter().find(|(_, n, _)| !n.is_multiple_of(4)).cloned() {
                let instead = match fits_type(TernaryType::I2_S, &all) {
                    true => "four rows go into a byte there: write a GGUF file, which has no such limit",
                    false => NO_TYPE,
                };
                let (format, instead) = ("packed uint8", instead.to_owned());
                return Err(ExportError::Shape { tensor, n, k, format, dimension: "N", of: 4, instead });
            }
            dense
        }
    };
    let Some(dense) = dense else { return Ok(()) };
    if matches!(target, Target::Hf { .. }) && dense.dtype().is_none() {
        return Err(ExportError::DenseType(dense.name()));
    }
    let (n, k, of) = (config.vocab_size, config.hidden_size, dense.block_len());
    if !k.is_multiple_of(of) {
        let instead = "F32, F16 and BF16 hold any width, Q8_0 and Q4_0 multiples of 32".to_owned();
        let (tensor, format) = ("embedding".into(), dense.name());
        return Err(ExportError::Shape { tensor, n, k, format, dimension: "K", of, instead });
    }
    Ok(())
}

/// The style of models with int8 activations by row.
const INSTEAD_PACKED: &str = "write the packed style (--style packed)";

/// The style of all others.
const INSTEAD_VALUES: &str = "write float values (--style values)";

/// What to do with a model with int8 activations by row that fits no packed format.
const NO_TYPE: &str = "neither GGUF's ternary types nor the packed style hold this model; only --style master, \
                       from float masters, does";

/// A matrix's name, N and K.
type Shape = (String, usize, usize);

/// The kinds of projections that a model has.
fn shapes(config: &ModelConfig) -> Vec<Shape> {
    let experts = Projection::kinds(config);
    let plain = config.options.experts.as_ref().is_some_and(|experts| !experts.dense_layers.is_empty());
    let plain = Projection::ALL.into_iter().filter(|which| plain && !experts.contains(which));
    let shape = |which: Projection| {
        let (n, k) = which.shape(config);
        (format!("{which:?} projection"), n, k)
    };
    let delta = Projection::DELTA_NET.into_iter().filter(|_| config.options.delta_net.is_some());
    experts.into_iter().chain(plain).chain(delta).map(shape).collect()
}

fn fits_type(ternary: TernaryType, shapes: &[Shape]) -> bool {
    let block = TensorType::from(ternary).block_size() as usize;
    shapes.iter().all(|(_, _, k)| k.is_multiple_of(block))
}

/// The types with which K is a multiple of the block, or what else there is.
fn instead_of_type(shapes: &[Shape], int8: bool) -> String {
    let fits = |ternary: &TernaryType| (int8 || ternary.blocks().is_some()) && fits_type(*ternary, shapes);
    let names = TernaryType::ALL.into_iter().filter(fits).map(|ternary| {
        let tensor_type = TensorType::from(ternary);
        format!("{tensor_type} needs {} only", tensor_type.block_size())
    });
    let names: Vec<_> = names.collect();
    let packed = shapes.iter().all(|(_, n, _)| n.is_multiple_of(4));
    let other = match (int8, packed) {
        (false, _) => "a Hugging Face directory has no such limit",
        (true, true) => "the packed style of a Hugging Face directory has no such limit",
        (true, false) if names.is_empty() => return NO_TYPE.to_owned(),
        (true, false) => return names.join(", "),
    };
    names.into_iter().chain([other.to_owned()]).collect::<Vec<_>>().join(", ")
}
