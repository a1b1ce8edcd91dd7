//! Norms and gated activations, a launch each.

use bitnet_burn_cube::rows::{self, Gate};
use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::server::Handle;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::body::params_on;
use crate::default;
use crate::extension::GatedActivation;

type B = CubeBackend;

/// Rows that a launch can have workgroups for.
const MAX_ROWS: usize = 65_535;

/// A tensor like `like` on the same device, of f32.
pub(super) fn tensor(like: &CubeTensor, handle: Handle, shape: [usize; 2]) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    CubeTensor::new_contiguous(client, device, Shape::new(shape), handle, DType::F32)
}

/// Rows and columns.
pub(super) fn dims(x: &CubeTensor) -> [usize; 2] {
    x.shape().dims()
}

pub(crate) fn rms_norm(x: CubeTensor, weight: CubeTensor, eps: f32) -> CubeTensor {
    let [m, k] = dims(&x);
    let floats = x.dtype == DType::F32 && weight.dtype == DType::F32;
    if !floats || m > MAX_ROWS || m * k == 0 || m * k > u32::MAX as usize {
        return default::rms_norm::<B>(x, weight, eps);
    }
    let (x, weight) = (into_contiguous(x), into_contiguous(weight));
    let params = params_on(&x.device, &x.client, rows::norm_params(k, eps));
    // SAFETY: contiguous f32 [m, k] and [k], and the parameters for them.
    let y = unsafe { rows::rms_norm(&x.client, x.handle.clone(), weight.handle, params, (m, k)) };
    tensor(&x, y, [m, k])
}

pub(crate) fn gated(gate_up: CubeTensor, activation: GatedActivation) -> CubeTensor {
    let [m, width] = dims(&gate_up);
    let gate = match activation {
        GatedActivation::Relu2 => Gate::Relu2,
        GatedActivation::Silu => Gate::Silu,
        GatedActivation::Sigmoid => Gate::Sigmoid,
        GatedActivation::Gelu | GatedActivation::GeluTanh => return default::gated::<B>(gate_up, activation),
    };
    if gate_up.dtype != DType::F32 || m * width == 0 || m * width > u32::MAX as usize {
        return default::gated::<B>(gate_up, activation);
    }
    let (x, f) = (into_contiguous(gate_up), width / 2);
    let params = params_on(&x.device, &x.client, rows::gated_params(m, f));
    // SAFETY: contiguous f32 [m, 2 * f], fewer than 2^32, and the parameters for them.
    let y = unsafe { rows::gated(&x.client, x.handle.clone(), params, gate, (m, f)) };
    tensor(&x, y, [m, f])
}
