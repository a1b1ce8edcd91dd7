//! Ternary matrices on a device, and the linear layer of them.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use bitnet_burn_formats::{Scales, canonical};
use bitnet_burn_manager::{CpuKernels, LayoutPolicy, ManagerError, Packed, ScaleKind, WeightShape};
use bitnet_burn_plugin::sdk;
use burn::backend::Dispatch;
#[cfg(feature = "cube")]
use burn::backend::DispatchDevice;
use burn::tensor::{AllocationProperty, Bytes, DType, Device, Int, Tensor, TensorData};

use super::{is_host, words};
#[cfg(feature = "cube")]
use crate::devices;
use crate::extension::{
    BitLinearArgs, Faster, HostKernels, InputNorm, Matrix, MatrixKernels, Repacked, TernaryBackend,
    TernaryWeight, WeightGroup,
};
use crate::manager::{forget_error, manager, take_error};

/// A packed ternary matrix [N, K] on a device.
#[derive(Clone, Debug)]
pub struct TernaryMatrix {
    /// U32 words: canonical rows [N, ceil(K / 128) * 8], or one row [1, words] of a kernel's private
    /// packing.
    pub codes: Tensor<2, Int>,
    /// weight = code * scale: `[1]`, or many in blocks of 32 rows, as [`Scales`] has them.
    pub scale: Tensor<1>,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Which weights share a scale, and which activations do.
    pub scales: ScaleKind,
    /// The chosen kernels; `None` for canonical codes on a device that has no kernels, or whose
    /// kernels are chosen at the first use.
    pub choice: Option<MatrixKernels>,
}

/// The scale of a ternary matrix, or its scales.
#[derive(Clone, Debug)]
pub enum MatrixScale {
    /// One, for activations with a scale for each row.
    One(f32),
    /// A scale for each group.
    Groups {
        /// The scales.
        scales: Scales,
        /// Activations that share a scale: a multiple of 32 that divides the weights' group, or 0 for the whole row, where
        /// that is the weights' group, too.
        activations: usize,
    },
}

impl From<f32> for MatrixScale {
    fn from(scale: f32) -> Self {
        Self::One(scale)
    }
}

impl MatrixScale {
    /// Which weights share a scale, and which activations do.
    pub fn kind(&self) -> ScaleKind {
        match self {
            Self::One(_) => ScaleKind::One,
            Self::Groups { scales, activations } => ScaleKind::Groups {
                weights: scales.group(),
                activations: *activations,
                half: scales.is_half(),
            },
        }
    }

    /// As a tensor, with its kind there: a device without f16 has f32.
    fn on(self, device: &Device) -> (Tensor<1>, ScaleKind) {
        let (scales, activations) = match self {
            Self::One(scale) => return (Tensor::from_floats([scale], device), ScaleKind::One),
            Self::Groups { scales, activations } => (scales, activations),
        };
        let half = scales.is_half() && holds_f16(device);
        let (dtype, size) = if half { (DType::F16, 2) } else { (DType::F32, 4) };
        let data = match (half, scales.as_sdk()) {
            (false, sdk::Scales::F16 { values, .. }) => {
                TensorData::new(values.iter().map(|&bits| sdk::f16_value(bits)).collect(), [values.len()])
            }
            // In place.
            _ => {
                let count = scales.bytes().len() / size;
                let bytes = Bytes::from_shared(scales.bytes().clone(), AllocationProperty::Other);
                TensorData::from_bytes(bytes, [count], dtype)
            }
        };
        let kind = ScaleKind::Groups { weights: scales.group(), activations, half };
        (Tensor::from_data(data, (device, dtype)), kind)
    }
}

/// Whether a device keeps f16 scales as they are; others get f32.
pub fn holds_f16(device: &Device) -> bool {
    is_host(device) && device.supports_dtype(DType::F16)
}

/// Codes for the GPU that a device is, where kernels of plugins are faster than the default body.
#[cfg(feature = "cube")]
fn on_gpu(
    codes: &[u8],
    n: usize,
    k: usize,
    device: &Device,
) -> Result<Option<(MatrixKernels, Packed)>, ManagerError> {
    let DispatchDevice::Cube(device) = device.clone().without_autodiff().as_dispatch().clone() else {
        return Ok(None);
    };
    let prepared = crate::gpu::choose_and_pack(manager(), &device, n, k, codes)?;
    Ok(prepared.map(|(matrix, packed)| (MatrixKernels::Gpu(Arc::new(matrix)), packed)))
}

#[cfg(not(feature = "cube"))]
fn on_gpu(_: &[u8], _: usize, _: usize, _: &Device) -> Result<Option<(MatrixKernels, Packed)>, ManagerError> {
    Ok(None)
}

impl TernaryMatrix {
    /// Canonical codes as they are: rows of [`canonical::row_bytes`]`(k)` bytes.
    ///
    /// # Panics
    /// If the bytes are not [N, K] in the canonical layout.
    pub fn canonical(
        codes: bytes::Bytes,
        scale: impl Into<MatrixScale>,
        n: usize,
        k: usize,
        device: &Device,
    ) -> Self {
        Self::canonical_of(codes, scale.into().on(device), n, k, device)
    }

    fn canonical_of(
        codes: bytes::Bytes,
        (scale, scales): (Tensor<1>, ScaleKind),
        n: usize,
        k: usize,
        device: &Device,
    ) -> Self {
        assert_eq!(Some(codes.len()), canonical::matrix_bytes(n, k), "canonical codes of [{n}, {k}]");
        let codes = words(codes, [n, canonical::row_bytes(k) / 4], device);
        Self { codes, scale, n, k, scales, choice: None }
    }

    /// Canonical codes in the layout that the fastest kernels for the device read; canonical where there are
    /// none, and in host memory while [memory is low](bitnet_burn_manager::KernelManager::memory_is_low).
    ///
    /// # Errors
    /// If no kernel may compute the shape, or it can't be packed.
    pub fn prepared(
        codes: bytes::Bytes,
        scale: impl Into<MatrixScale>,
        n: usize,
        k: usize,
        device: &Device,
    ) -> Result<Self, ManagerError> {
        Self::prepared_in(LayoutPolicy::Any, codes, scale, n, k, device)
    }

    /// [`prepared`](Self::prepared) in a layout that the policy allows.
    ///
    /// # Errors
    /// As [`prepared`](Self::prepared).
    pub fn prepared_in(
        policy: LayoutPolicy,
        codes: bytes::Bytes,
        scale: impl Into<MatrixScale>,
        n: usize,
        k: usize,
        device: &Device,
    ) -> Result<Self, ManagerError> {
        let (scale, scales) = scale.into().on(device);
        let (choice, packed) = if is_host(device) {
            let (choice, packed) = manager().choose_and_pack(WeightShape { n, k, scales }, policy, &codes)?;
            (MatrixKernels::Host(choice.into()), packed)
        } else {
            // (The kernels of GPUs are for one scale.)
            let one = scales == ScaleKind::One;
            match if one { on_gpu(&codes, n, k, device)? } else { None } {
                Some(prepared) => prepared,
                None => return Ok(Self::canonical_of(codes, (scale, scales), n, k, device)),
            }
        };
        let scale = (scale, scales);
        match packed {
            Packed::Canonical => {
                Ok(Self { choice: Some(choice), ..Self::canonical_of(codes, scale, n, k, device) })
            }
            Packed::Private(buffer) => {
                Ok(Self::packed(choice, bytes::Bytes::from_owner(buffer), scale, (n, k), device))
            }
        }
    }

    /// A matrix that computes at once, with the canonical codes where they lie and with kernels that were not measured; and
    /// the packing for the fastest kernels, which is still to be [run](Packing::run). `None` on devices outside of host memory,
    /// and where [`choose_unmeasured`](bitnet_burn_manager::KernelManager::choose_unmeasured) has no kernel.
    ///
    /// # Panics
    /// If the bytes are not [N, K] in the canonical layout.
    pub fn in_place(
        codes: bytes::Bytes,
        scale: f32,
        n: usize,
        k: usize,
        device: &Device,
    ) -> Option<(Self, Packing)> {
        let choice = is_host(device).then(|| manager().choose_unmeasured((n, k))).flatten()?;
        let faster = Arc::new(Faster::default());
        let packing = Packing { codes: codes.clone(), of: (n, k).into(), faster: Arc::downgrade(&faster) };
        let choice = Some(MatrixKernels::Host(HostKernels::until(choice, faster)));
        Some((Self { choice, ..Self::canonical(codes, scale, n, k, device) }, packing))
    }

    fn packed(
        choice: MatrixKernels,
        packed: bytes::Bytes,
        (scale, scales): (Tensor<1>, ScaleKind),
        (n, k): (usize, usize),
        device: &Device,
    ) -> Self {
        let count = packed.len().div_ceil(4);
        let codes = words(packed, [1, count], device);
        Self { codes, scale, n, k, scales, choice: Some(choice) }
    }

    /// Weights that were packed before as `choice` says, on a device in host memory.
    ///
    /// # Panics
    /// If they have another size or other scales than the choice's.
    pub fn prepacked(
        choice: Arc<CpuKernels>,
        packed: bytes::Bytes,
        scale: impl Into<MatrixScale>,
        device: &Device,
    ) -> Self {
        assert_eq!(packed.len(), choice.weight_bytes(), "bytes of packed weights");
        let (shape, scale) = (choice.shape(), scale.into().on(device));
        assert_eq!(scale.1, choice.weight_shape().scales, "the scales that the kernels were chosen for");
        Self::packed(MatrixKernels::Host(choice.into()), packed, scale, shape, device)
    }

    /// The same matrix with canonical codes, for saving it or for another device.
    ///
    /// # Errors
    /// If the kernel that packed it can't unpack it.
    ///
    /// # Panics
    /// If the codes can't be read back from their device.
    pub fn into_canonical(self) -> Result<Self, ManagerError> {
        let Some(choice) = self.choice.filter(|choice| choice.layout().is_some()) else {
            return Ok(Self { choice: None, ..self });
        };
        let device = self.codes.device();
        let words: Vec<u32> = self.codes.into_data().iter::<i64>().map(|word| word as u32).collect();
        let packed: &[u8] = bytemuck::cast_slice(&words);
        let canonical = match &choice {
            MatrixKernels::Host(choice) => manager().unpack(choice, &packed[..choice.weight_bytes()])?,
            #[cfg(feature = "cube")]
            MatrixKernels::Gpu(matrix) => matrix.unpack(manager(), &packed[..matrix.weight_bytes()])?,
        };
        let codes = self::words(canonical.into(), [self.n, canonical::row_bytes(self.k) / 4], &device);
        Ok(Self { codes, choice: None, ..self })
    }

    /// The same matrix in the layout that the fastest kernels for its device read, as [`prepared`](Self::prepared) chooses it.
    ///
    /// # Errors
    /// As [`prepared`](Self::prepared), or if the kernel that packed it can't unpack it.
    ///
    /// # Panics
    /// If the matrix can't be read back from its device.
    pub fn repacked(self) -> Result<Self, ManagerError> {
        let Self { codes, scale, n, k, scales, .. } = self.into_canonical()?;
        let (device, half) = (codes.device(), scale.dtype() == DType::F16);
        let bytes = |data: TensorData| bytes::Bytes::copy_from_slice(data.as_bytes());
        let scale = match scales {
            ScaleKind::One => MatrixScale::One(scale.into_scalar::<f32>()),
            ScaleKind::Groups { weights, activations, .. } => {
                let scales = Scales::stored(bytes(scale.into_data()), half, n, k, weights);
                let scales = scales.map_err(|error| ManagerError::Operands(error.to_string()))?;
                MatrixScale::Groups { scales, activations }
            }
        };
        Self::prepared(bytes(codes.into_data()), scale, n, k, &device)
    }

    /// As kernels on the device that it is on read it: a private packing of another device's kernels is unpacked.
    fn where_it_is(self) -> Result<Self, ManagerError> {
        let host = is_host(&self.codes.device());
        match &self.choice {
            Some(MatrixKernels::Host(_)) if !host => self.into_canonical(),
            #[cfg(feature = "cube")]
            Some(MatrixKernels::Gpu(_)) if host || devices::is_remote(&self.codes.device()) => {
                self.into_canonical()
            }
            _ => Ok(self),
        }
    }

    fn matrix(&self) -> Matrix {
        Matrix { n: self.n, scales: self.scales, choice: self.choice.clone() }
    }

    fn into_weight(self) -> TernaryWeight<Dispatch> {
        TernaryWeight { codes: self.codes.into_dispatch(), scale: self.scale.into_dispatch() }
    }
}

/// The packing of a matrix that [computes already](TernaryMatrix::in_place).
#[derive(Debug)]
pub struct Packing {
    codes: bytes::Bytes,
    of: WeightShape,
    faster: Weak<Faster>,
}

impl Packing {
    /// The matrix's shape: output and input features.
    pub fn shape(&self) -> (usize, usize) {
        (self.of.n, self.of.k)
    }

    /// The canonical codes.
    pub fn codes(&self) -> &bytes::Bytes {
        &self.codes
    }

    /// Whether the matrix still exists.
    pub fn is_needed(&self) -> bool {
        self.faster.strong_count() > 0
    }

    /// Whether the matrix has computed, or is about to.
    pub fn has_computed(&self) -> bool {
        self.faster.upgrade().is_some_and(|faster| faster.called.load(Ordering::Relaxed))
    }

    /// Chooses the fastest kernels for prompts of up to `rows` rows, measuring them where that has not been done on this
    /// machine, and packs the codes for them. The matrix's next call uses them; its results stay the same bits.
    ///
    /// # Errors
    /// If no kernel may compute the shape, or it can't be packed. The matrix computes as before then.
    pub fn run(self, rows: usize) -> Result<(), ManagerError> {
        let (choice, packed) = manager().choose_and_pack(self.of, LayoutPolicy::Any, &self.codes)?;
        manager().warm_up(&choice, rows);
        if let Some(faster) = self.faster.upgrade() {
            // It was empty: this packing is the only one of its matrix.
            let _ = faster.packed.set(Repacked { choice, weights: packed });
        }
        Ok(())
    }
}

/// How a [`bit_linear`] treats its input.
#[derive(Clone, Debug)]
pub struct BitLinearInput {
    /// Weight `[K]` and epsilon of an RMSNorm before quantisation.
    pub norm: Option<(Tensor<1>, f32)>,
    /// Whether activations are quantised to int8, by rows as BitNet defines, or by the groups that the matrices ask for.
    pub quantise: bool,
}

/// y = concat(quantise(norm(x)) * W_iᵀ) for one to three matrices over the same input.
///
/// # Shapes
/// x [M, K]; the output is [M, sum of N].
///
/// # Errors
/// In strict mode, if no kernel may compute it.
///
/// # Panics
/// If the shapes or the groups of activations do not fit, or there are not one to three matrices.
pub fn bit_linear(
    x: Tensor<2>,
    input: BitLinearInput,
    matrices: Vec<TernaryMatrix>,
) -> Result<Tensor<2>, ManagerError> {
    let [_, k] = x.dims();
    for matrix in &matrices {
        assert_eq!(matrix.k, k, "an input of {k} features for weights [{}, {}]", matrix.n, matrix.k);
        let group = |matrix: &TernaryMatrix| matrix.scales.activation_group();
        assert_eq!(group(matrix), group(&matrices[0]), "matrices over one input share its groups");
    }
    let (norm, eps) = match input.norm {
        None => (InputNorm::None, 0.0),
        Some((weight, eps)) => {
            assert_eq!(weight.dims(), [k], "the norm's weight");
            (InputNorm::Rms(weight.into_dispatch()), eps)
        }
    };
    let matrices: Vec<_> = matrices.into_iter().map(TernaryMatrix::where_it_is).collect::<Result<_, _>>()?;
    let args = BitLinearArgs {
        k,
        matrices: matrices.iter().map(TernaryMatrix::matrix).collect(),
        eps,
        quantise: input.quantise,
    };
    let weights = WeightGroup::from_vec(matrices.into_iter().map(TernaryMatrix::into_weight).collect());
    forget_error();
    let y = Dispatch::bit_linear(x.into_dispatch(), norm, weights, args);
    match take_error() {
        None => Ok(Tensor::from_dispatch(y)),
        Some(error) => Err(error),
    }
}
