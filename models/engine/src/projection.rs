//! From the weights of a projection to a layer: the form in which they are kept, and how their activations are quantised.

use std::fmt;
use std::str::FromStr;

use bitnet_burn::{BitLinear, DenseMatrix, Projection};
use bitnet_burn_backends::manager::manager;
use bitnet_burn_backends::ops::{self, MatrixScale, TernaryMatrix};
use bitnet_burn_formats::{DenseTensor, Scales, TernaryTensor, ternary};
use bitnet_burn_manager::{LayoutPolicy, ManagerError, WeightShape};
use burn::tensor::Device;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, Weights};
use crate::head::HeadMode;
use crate::load::ModelError;

/// How the activations of ternary projections are quantised. Projections that are not ternary have f32 activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ActivationRule {
    /// As the model's files declare: to int8 by row (BitNet). Where they declare nothing, to int8 by groups of
    /// 32 values in host memory, and not at all on GPUs, which have no kernels for many scales.
    #[default]
    Model,
    /// To int8 with a scale for each row.
    Row,
    /// To int8 with a scale for each group of this many values, a multiple of 32; for weights that share a scale in smaller
    /// groups, these.
    Group(usize),
    /// Not at all: what a float reference computes, and slow.
    Float,
}

/// The values that share a scale of activations, where the model declares nothing.
pub const GROUP: usize = 32;

impl ActivationRule {
    /// Activations that share a scale, for weights of which `group` share one (0: a row).
    pub(crate) fn group(self, group: usize) -> Option<usize> {
        let at_most = |n: usize| if group == 0 { n } else { common(n, group) };
        match self {
            Self::Model => Some(at_most(GROUP)),
            Self::Group(n) => Some(at_most(n)),
            Self::Row if group == 0 => Some(0),
            Self::Row | Self::Float => None,
        }
    }
}

/// The greatest common divisor.
fn common(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common(b, a % b) }
}

impl fmt::Display for ActivationRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model => f.write_str("model"),
            Self::Row => f.write_str("row"),
            Self::Group(n) => write!(f, "group:{n}"),
            Self::Float => f.write_str("float"),
        }
    }
}

impl From<ActivationRule> for String {
    fn from(rule: ActivationRule) -> Self {
        rule.to_string()
    }
}

impl TryFrom<String> for ActivationRule {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for ActivationRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("group:").map(str::parse) {
            Some(Ok(n)) if n > 0 && n < 1 << 23 && usize::is_multiple_of(n, 32) => return Ok(Self::Group(n)),
            Some(_) => return Err(format!("{text:?}: a group is a multiple of 32 values, such as group:32")),
            None => {}
        }
        match text {
            "model" => Ok(Self::Model),
            "row" => Ok(Self::Row),
            "float" => Ok(Self::Float),
            _ => Err(format!("{text:?}: possible values: model, row, group:N, float")),
        }
    }
}

/// Ternary weights with their scale or scales.
pub(crate) struct Ternary {
    pub codes: Bytes,
    pub scale: MatrixScale,
    pub n: usize,
    pub k: usize,
}

/// The weights in the form in which kernels take them, if they are ternary, for activations as the model declares.
pub(crate) fn packable(weights: Weights) -> Option<Ternary> {
    match weights {
        Weights::Ternary(TernaryTensor { codes, scale, n, k, .. }) => {
            Some(Ternary { codes, scale: scale.into(), n, k })
        }
        Weights::Dense(tensor) => {
            let (codes, scales) =
                ternary::scaled_from_dense(tensor.format, &tensor.data, tensor.n, tensor.k).ok()?;
            of_groups(&tensor, codes, scales, ActivationRule::Model).ok()
        }
    }
}

/// Whether an output projection that is ternary is computed like the layers: where no activations are declared.
pub(crate) fn computes_head(checkpoint: &Checkpoint, head: HeadMode) -> bool {
    head == HeadMode::File && checkpoint.dense_bytes(0, Projection::Q).is_some()
}

impl Ternary {
    /// As kernels are chosen for them.
    pub fn shape(&self) -> WeightShape {
        WeightShape { n: self.n, k: self.k, scales: self.scale.kind() }
    }

    fn into_layer(self, policy: LayoutPolicy, device: &Device) -> Result<BitLinear, ManagerError> {
        let Self { codes, scale, n, k } = self;
        Ok(BitLinear::from_matrix(TernaryMatrix::prepared_in(policy, codes, scale, n, k, device)?))
    }
}

/// A layer of a projection's weights, with the kernels that are the fastest on the device.
///
/// # Errors
/// If a kernel refuses; for weights that are not ternary, if strict mode does; if the rule does not fit the weights.
pub(crate) fn linear(
    weights: Weights,
    rule: ActivationRule,
    policy: LayoutPolicy,
    device: &Device,
) -> Result<BitLinear, ModelError> {
    let ternary = match weights {
        Weights::Ternary(TernaryTensor { codes, scale, n, k, .. }) => match rule {
            ActivationRule::Float => {
                return Ok(BitLinear::from_matrix(TernaryMatrix::canonical(codes, scale, n, k, device)));
            }
            ActivationRule::Model | ActivationRule::Row => Ternary { codes, scale: scale.into(), n, k },
            ActivationRule::Group(activations) => {
                let scales = Scales::from_rows(&vec![scale; n], n, k, 0).map_err(ModelError::Scales)?;
                Ternary { codes, scale: MatrixScale::Groups { scales, activations }, n, k }
            }
        },
        Weights::Dense(tensor) => match scaled(tensor, rule, device)? {
            Ok(ternary) => ternary,
            Err(tensor) => return Ok(BitLinear::dense(DenseMatrix::new(tensor, device))),
        },
    };
    Ok(ternary.into_layer(policy, device)?)
}

/// A layer of the output projection's weights, if they are ternary in groups.
///
/// # Errors
/// As [`linear`].
pub(crate) fn ternary_linear(
    tensor: &DenseTensor,
    rule: ActivationRule,
    device: &Device,
) -> Result<Option<BitLinear>, ModelError> {
    if lacks_kernels(rule, device) {
        return Ok(None);
    }
    let Ok((codes, scales)) = ternary::scaled_from_dense(tensor.format, &tensor.data, tensor.n, tensor.k)
    else {
        return Ok(None);
    };
    let ternary = of_groups(tensor, codes, scales, rule)?;
    Ok(Some(ternary.into_layer(LayoutPolicy::Any, device)?))
}

/// The ternary weights that a tensor holds in groups, or the tensor itself, which is computed with f32 activations.
fn scaled(
    tensor: DenseTensor,
    rule: ActivationRule,
    device: &Device,
) -> Result<Result<Ternary, DenseTensor>, ModelError> {
    let strict = manager().config().strict.quantised_kernels;
    let DenseTensor { n, k, format, .. } = tensor;
    let dense = |tensor: DenseTensor, reason: String| match strict {
        true => Err(ModelError::Dense { tensor: tensor.name, format, reason }),
        false => Ok(Err(tensor)),
    };
    if rule == ActivationRule::Float {
        return dense(tensor, "float activations were asked for".into());
    }
    if lacks_kernels(rule, device) {
        return dense(tensor, "its device has no kernels for many scales".into());
    }
    match ternary::scaled_from_dense(format, &tensor.data, n, k) {
        Ok((codes, scales)) => Ok(Ok(of_groups(&tensor, codes, scales, rule)?)),
        Err(error) => dense(tensor, error.to_string()),
    }
}

/// Whether f32 activations are the faster ones for many scales, and nothing else was asked for: GPUs have no kernels for
/// them. (A worker that computes in host memory has, and computes the same bits as this process.)
fn lacks_kernels(rule: ActivationRule, device: &Device) -> bool {
    rule == ActivationRule::Model && !ops::reads_tiles(device)
}

/// What was found in a tensor, for activations as the rule says.
fn of_groups(
    tensor: &DenseTensor,
    codes: Vec<u8>,
    scales: Scales,
    rule: ActivationRule,
) -> Result<Ternary, ModelError> {
    let Some(activations) = rule.group(scales.group) else {
        return Err(ModelError::Row { tensor: tensor.name.clone(), group: scales.group });
    };
    let scale = MatrixScale::Groups { scales, activations };
    Ok(Ternary { codes: codes.into(), scale, n: tensor.n, k: tensor.k })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_have_names() {
        for (text, rule) in [
            ("model", ActivationRule::Model),
            ("row", ActivationRule::Row),
            ("group:96", ActivationRule::Group(96)),
            ("float", ActivationRule::Float),
        ] {
            assert_eq!((text.parse(), rule.to_string()), (Ok(rule), text.to_owned()));
        }
        for text in
            ["", "rows", "group", "group:", "group:0", "group:33", "group:-32", "group:99999999999999999999"]
        {
            assert!(text.parse::<ActivationRule>().is_err(), "{text}");
        }
    }

    #[test]
    fn groups_of_activations_divide_those_of_weights() {
        assert_eq!([0, 32, 64, 128].map(|g| ActivationRule::Group(64).group(g)), [64, 32, 64, 64].map(Some));
        assert_eq!(ActivationRule::Group(96).group(64), Some(32));
        assert_eq!([0, 64].map(|g| ActivationRule::Row.group(g)), [Some(0), None]);
        assert_eq!(ActivationRule::Float.group(0), None);
    }
}
