//! From the weights of a projection to a layer: the form in which they are kept.

use bitnet_burn::{ActivationRule, BitLinear, DenseMatrix, Projection};
use bitnet_burn_backends::manager::manager;
use bitnet_burn_backends::ops::{self, MatrixScale, TernaryMatrix};
use bitnet_burn_formats::{DenseTensor, FormatError, Scales, TernaryTensor, ternary};
use bitnet_burn_manager::{LayoutPolicy, ManagerError, WeightShape};
use burn::tensor::Device;
use bytes::Bytes;

use crate::checkpoint::{Checkpoint, LoadError, Weights};
use crate::head::HeadMode;
use crate::load::ModelError;

/// Ternary weights with their scale or scales.
pub(crate) struct Ternary {
    pub codes: Bytes,
    pub scale: MatrixScale,
    pub n: usize,
    pub k: usize,
}

impl Ternary {
    /// The weights of a projection, with activations by a rule; `None` for one that is not ternary, or that the rule does not
    /// fit.
    pub fn of(weights: Weights, rule: ActivationRule) -> Option<Self> {
        match weights {
            Weights::Ternary(TernaryTensor { codes, scale, n, k, .. }) => {
                Some(Self { codes, scale: scale.into(), n, k })
            }
            Weights::Dense(tensor) => Self::read(&tensor, rule).ok()?.ok(),
        }
    }

    /// The weights that a tensor holds with many scales, or why it is not ternary.
    ///
    /// # Errors
    /// If the rule does not fit them.
    fn read(tensor: &DenseTensor, rule: ActivationRule) -> Result<Result<Self, FormatError>, ModelError> {
        let DenseTensor { name, n, k, format, data } = tensor;
        let (codes, scales) = match ternary::scaled_from_dense(*format, data, *n, *k) {
            Ok(found) => found,
            Err(error) => return Ok(Err(error)),
        };
        let group = scales.group();
        let Some(activations) = rule.group(group, *k) else {
            return Err(ModelError::Row { tensor: name.clone(), group });
        };
        let scale = MatrixScale::Groups { scales, activations };
        Ok(Ok(Self { codes: codes.into(), scale, n: *n, k: *k }))
    }

    /// As kernels are chosen for them.
    pub fn shape(&self) -> WeightShape {
        WeightShape { n: self.n, k: self.k, scales: self.scale.kind() }
    }

    fn into_layer(self, policy: LayoutPolicy, device: &Device) -> Result<BitLinear, ManagerError> {
        let Self { codes, scale, n, k } = self;
        Ok(BitLinear::from_matrix(TernaryMatrix::prepared_in(policy, codes, scale, n, k, device)?))
    }
}

/// Whether an output projection that is ternary is computed like the layers: where no activations are declared. (Types that
/// have int8 activations by row with one scale have none with many, which only the values show.)
///
/// # Errors
/// If the first projection can't be read.
pub(crate) fn computes_head(checkpoint: &Checkpoint, head: HeadMode) -> Result<bool, LoadError> {
    let first = Projection::first(checkpoint.config());
    Ok(head == HeadMode::File
        && (checkpoint.dense_bytes(0, first).is_some()
            || matches!(checkpoint.weights(0, first)?, Weights::Dense(_))))
}

/// Canonical codes with one scale, and their output and input features, if the weights are such and kernels for them compute
/// with activations by this rule.
pub(crate) fn with_one_scale(weights: &Weights, rule: ActivationRule) -> Option<(&Bytes, f32, usize, usize)> {
    let Weights::Ternary(TernaryTensor { codes, scale, n, k, .. }) = weights else { return None };
    let by_row = match rule {
        ActivationRule::Float => false,
        ActivationRule::Model | ActivationRule::Row => true,
        ActivationRule::Group(_) => rule.group(0, *k) == Some(0),
    };
    by_row.then_some((codes, *scale, *n, *k))
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
            // One group for the whole row.
            ActivationRule::Group(_) if rule.group(0, k) == Some(0) => {
                Ternary { codes, scale: scale.into(), n, k }
            }
            ActivationRule::Group(activations) => {
                let scales = Scales::from_rows(&vec![scale; n], n, k, 0).map_err(ModelError::Scales)?;
                Ternary { codes, scale: MatrixScale::Groups { scales, activations }, n, k }
            }
        },
        Weights::Dense(tensor) => {
            let reason = match rule {
                ActivationRule::Float => "float activations were asked for".into(),
                _ if lacks_kernels(rule, device) => "its device has no kernels for many scales".into(),
                _ => match Ternary::read(&tensor, rule)? {
                    Ok(ternary) => return Ok(ternary.into_layer(policy, device)?),
                    Err(error) => error.to_string(),
                },
            };
            if manager().config().strict.quantised_kernels {
                return Err(ModelError::Dense { tensor: tensor.name, format: tensor.format, reason });
            }
            return Ok(BitLinear::dense(DenseMatrix::new(tensor, device)));
        }
    };
    Ok(ternary.into_layer(policy, device)?)
}

/// A layer of the output projection's weights, if they are ternary and there are kernels for them.
///
/// # Errors
/// As [`linear`].
pub(crate) fn ternary_head(
    tensor: &DenseTensor,
    rule: ActivationRule,
    device: &Device,
) -> Result<Option<BitLinear>, ModelError> {
    if lacks_kernels(rule, device) {
        return Ok(None);
    }
    match Ternary::read(tensor, rule)? {
        Ok(ternary) => Ok(Some(ternary.into_layer(LayoutPolicy::Any, device)?)),
        Err(_) => Ok(None),
    }
}

/// Whether f32 activations are the faster ones for many scales, and nothing else was asked for: GPUs have no kernels for
/// them. (A worker that computes in host memory has, and computes the same bits as this process.)
fn lacks_kernels(rule: ActivationRule, device: &Device) -> bool {
    rule == ActivationRule::Model && !ops::reads_tiles(device)
}
