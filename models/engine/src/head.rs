//! How a model's output projection is computed.

use bitnet_burn_backends::DenseArgs;
use bitnet_burn_formats::{DenseFormat, DenseTensor};
use serde::{Deserialize, Serialize};

/// How the output projection (lm_head) is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadMode {
    /// f32 activations.
    #[default]
    File,
    /// Activations are quantised to int8, by absmax and row, as those of the ternary layers are: faster
    /// where the weights are Q6_K or Q4_0, and an approximation. (A logit changes by up to half a step,
    /// 1/254 of the largest activation, for each of its weights.) Weights of floats have no such mode. In host
    /// memory they are copied into the order in which the kernels read them; the embedding stays as it is.
    Int8,
    /// A copy of the weights in another format, made when the model is loaded: Q8_0, Q6_K or Q4_0 with int8
    /// activations as above, fewer bytes to read for every token, and a further approximation; F16, BF16 or F32 with
    /// f32 activations. The embedding stays as the file has it.
    Requantised(DenseFormat),
}

impl HeadMode {
    /// The format of the weights that int8 activations are multiplied by, where they are.
    pub fn int8_format(self, tensor: &DenseTensor) -> Option<DenseFormat> {
        match self {
            Self::File => None,
            Self::Int8 => Some(tensor.format),
            Self::Requantised(format) => Some(format).filter(|f| DenseArgs::INT8_FORMATS.contains(f)),
        }
    }

    /// The format that the weights are kept in.
    pub fn format(self, tensor: &DenseTensor) -> DenseFormat {
        match self {
            Self::File | Self::Int8 => tensor.format,
            Self::Requantised(format) => format,
        }
    }
}
