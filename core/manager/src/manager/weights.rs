//! What is multiplied by: the shape of a weight matrix with the kind of its scales, and one matrix of a matmul.

use bitnet_burn_formats::reference::{self, ScaledActivations};
use bitnet_burn_plugin::abi::{self, OPERATION_SCALED_TERNARY_MATMUL, Signature};
use bitnet_burn_plugin::canonical;
use bitnet_burn_plugin::sdk::{Scales, WeightsRef, groups, groups_fit, scale_count};

use super::{CpuKernels, ManagerError};
use crate::memory::Activations;

/// A matrix of weights [n, k], as kernels are chosen for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightShape {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Its scales, and those of the activations that it is multiplied by.
    pub scales: ScaleKind,
}

/// Which weights share a scale, and which activations do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// One scale for the matrix, and one for each row of activations.
    #[default]
    One,
    /// Scales for groups of a row's values. A group is a multiple of 32 values, or 0 for the whole row; that of the weights
    /// is a whole number of those of the activations.
    Groups {
        /// Weights that share a scale.
        weights: usize,
        /// Activations that share a scale.
        activations: usize,
        /// Whether the weights' scales are f16; they are f32 otherwise.
        half: bool,
    },
}

impl ScaleKind {
    /// Activations of a row that share a scale; 0 for the whole row.
    pub fn activation_group(self) -> usize {
        match self {
            Self::One => 0,
            Self::Groups { activations, .. } => activations,
        }
    }
}

impl std::fmt::Display for ScaleKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self::Groups { weights, activations, half } = *self else { return f.write_str("one scale") };
        let of = |group: usize| if group == 0 { "rows".into() } else { format!("groups of {group}") };
        let kind = if half { "f16" } else { "f32" };
        write!(f, "{kind} scales of {}, activations of {}", of(weights), of(activations))
    }
}

impl From<(usize, usize)> for WeightShape {
    /// [n, k] with one scale.
    fn from((n, k): (usize, usize)) -> Self {
        Self { n, k, scales: ScaleKind::One }
    }
}

impl std::fmt::Display for WeightShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { n, k, scales } = self;
        match scales {
            ScaleKind::One => write!(f, "[{n}, {k}]"),
            ScaleKind::Groups { .. } => write!(f, "[{n}, {k}] with {scales}"),
        }
    }
}

impl WeightShape {
    /// Checks that there can be such a matrix.
    ///
    /// # Errors
    /// If no matrix has such a shape, or its groups do not fit together.
    pub fn check(&self) -> Result<(), ManagerError> {
        let Self { n, k, scales } = *self;
        let bytes = canonical::matrix_bytes(n, k).filter(|&bytes| isize::try_from(bytes).is_ok());
        if n == 0 || k == 0 || k as u64 > 1 << 23 || bytes.is_none() {
            return Err(ManagerError::Operands(format!(
                "weights [{n}, {k}]: both must be at least 1, K at most 2^23, and the bytes must be addressable"
            )));
        }
        let ScaleKind::Groups { weights, activations, .. } = scales else { return Ok(()) };
        if groups_fit(weights, activations) {
            return Ok(());
        }
        Err(ManagerError::Operands(format!(
            "weights {self}: groups are multiples of 32, and those of weights are multiples of those of activations"
        )))
    }

    /// The signature of the multiplication by `m` rows on a number of threads.
    pub(crate) fn signature(&self, m: usize, threads: usize) -> Signature {
        let plain = Signature::ternary(m as u64, self.n as u64, self.k as u64, threads as u32);
        match self.scales {
            ScaleKind::One => plain,
            ScaleKind::Groups { weights, activations, half } => Signature {
                operation: OPERATION_SCALED_TERNARY_MATMUL,
                weight_group: weights as u64,
                activation_group: activations as u64,
                scale_format: if half { abi::SCALE_F16 } else { abi::SCALE_F32 },
                ..plain
            },
        }
    }
}

/// The scale of a [`Job`]'s weights, or their scales: weight = code * scale.
#[derive(Clone, Copy, Debug)]
pub enum Scale<'a> {
    /// One for all of them.
    One(f32),
    /// Those of groups, in blocks of 32 rows.
    Groups(Scales<'a>),
}

impl From<f32> for Scale<'_> {
    fn from(scale: f32) -> Self {
        Self::One(scale)
    }
}

impl<'a> Scale<'a> {
    /// Whether these are the scales of such a shape.
    fn fits(self, shape: &WeightShape) -> bool {
        let count = |group| scale_count(shape.n, shape.k, group);
        match (self, shape.scales) {
            (Self::One(_), ScaleKind::One) => true,
            (Self::Groups(Scales::F32 { group, values }), ScaleKind::Groups { weights, half: false, .. }) => {
                group == weights && count(group) == Some(values.len())
            }
            (Self::Groups(Scales::F16 { group, values }), ScaleKind::Groups { weights, half: true, .. }) => {
                group == weights && count(group) == Some(values.len())
            }
            _ => false,
        }
    }

    /// Filled weights for the ABI.
    pub(super) fn weights(self, n: usize, k: usize, data: &'a [u8]) -> abi::Weights {
        match self {
            Self::One(scale) => WeightsRef::new(n, k, scale, data),
            Self::Groups(scales) => WeightsRef::new(n, k, 0.0, data).with_scales(scales),
        }
        .as_abi()
    }

    /// y [m, n], rows of `stride`, of activations and canonical weights [n, k], by the reference.
    pub(super) fn reference(
        self,
        weights: &[u8],
        (n, k): (usize, usize),
        x: &Activations,
        y: &mut [f32],
        stride: usize,
    ) {
        match self {
            Self::One(scale) => {
                reference::matmul(weights, n, k, scale, x.q(), x.stride(), x.scale(), x.m(), y, stride);
            }
            Self::Groups(scales) => {
                reference::scaled_matmul(weights, (n, k), scales, rows(x, 0..x.m()), y, stride);
            }
        }
    }
}

/// Some rows of activations, as the reference takes them.
pub(super) fn rows(x: &Activations, rows: std::ops::Range<usize>) -> ScaledActivations<'_> {
    let groups = groups(x.k(), x.group());
    ScaledActivations {
        m: rows.len(),
        q: &x.q()[rows.start * x.stride()..],
        stride: x.stride(),
        group: x.group(),
        scale: &x.scale()[rows.start * groups..],
    }
}

/// One matrix of a [`KernelManager::matmul`](super::KernelManager::matmul).
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// What [`KernelManager::choose`](super::KernelManager::choose) chose for the shape.
    pub choice: &'a CpuKernels,
    /// The weights in the chosen layout.
    pub weights: &'a [u8],
    /// Their scale, or their scales.
    pub scale: Scale<'a>,
    /// Column of the output where this matrix's features begin.
    pub column: usize,
}

impl Job<'_> {
    /// # Errors
    /// If the scales are not those that the kernels were chosen for, or the activations' groups are not.
    pub(super) fn check_scales(&self, x: &Activations) -> Result<(), ManagerError> {
        let of = &self.choice.of;
        if !self.scale.fits(of) {
            return Err(ManagerError::Operands(format!("other scales than those of weights {of}")));
        }
        if x.group() != of.scales.activation_group() {
            return Err(ManagerError::Operands(format!(
                "activations with scales of groups of {} (0: of rows) for weights {of}",
                x.group()
            )));
        }
        Ok(())
    }
}
