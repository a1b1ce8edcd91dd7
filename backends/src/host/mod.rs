//! The bodies over host memory, for Flex and NdArray: thin bridges to the SIMD of [`bitnet_burn_cpu`] and to the
//! kernels of the [`manager`](crate::manager).
//!
//! The two backends differ only in how a tensor's memory is reached ([`HostBackend`]). Contiguous tensors are not
//! copied, least of all weights, which may be a memory-mapped file's.

mod attention;
mod bit_linear;
mod bodies;
#[cfg(feature = "flex")]
pub(crate) mod cache_memory;
mod dense;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "ndarray")]
mod ndarray;
mod rows;
mod training;

use std::borrow::Cow;
use std::sync::Mutex;

use bitnet_burn_cpu::Threads;
use bitnet_burn_cpu::attention::{CacheMut, CacheRef};
use bitnet_burn_cpu::quantise::{Quantised, quantise_on};
use bitnet_burn_manager::memory::{Activations, ActivationsMut};
use bitnet_burn_manager::pool::Pool;
use bitnet_burn_manager::{Scale, ScaleKind};
use bitnet_burn_plugin::sdk::{Scales, f16_value};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::Shape;

use crate::extension::CacheTensor;
use crate::manager::manager;

/// Rows of a tensor [M, K] in host memory.
pub(crate) struct Rows<'a> {
    values: Cow<'a, [f32]>,
    /// Elements from row to row.
    stride: usize,
}

/// Scales in host memory.
pub(crate) enum ScaleValues<'a> {
    F32(Cow<'a, [f32]>),
    /// The bits of half precision.
    #[cfg_attr(not(feature = "flex"), allow(dead_code, reason = "NdArray has no f16"))]
    F16(Cow<'a, [u16]>),
}

impl ScaleValues<'_> {
    /// As kernels take them.
    fn of(&self, kind: ScaleKind) -> Scale<'_> {
        match (self, kind) {
            (Self::F32(values), ScaleKind::Groups { weights: group, .. }) => {
                Scale::Groups(Scales::F32 { group, values })
            }
            (Self::F16(values), ScaleKind::Groups { weights: group, .. }) => {
                Scale::Groups(Scales::F16 { group, values })
            }
            (Self::F32(values), ScaleKind::One) => Scale::One(values[0]),
            (Self::F16(values), ScaleKind::One) => Scale::One(f16_value(values[0])),
        }
    }
}

/// A backend whose tensors lie in host memory.
pub(crate) trait HostBackend: Backend {
    /// A float tensor's values in row-major order.
    fn floats(tensor: &FloatTensor<Self>) -> Cow<'_, [f32]>;

    /// The rows of a tensor [M, K], which may be a view of wider rows.
    fn rows(tensor: &FloatTensor<Self>) -> Rows<'_>;

    /// The scales of a matrix, as they lie.
    fn scales(tensor: &FloatTensor<Self>) -> ScaleValues<'_> {
        ScaleValues::F32(Self::floats(tensor))
    }

    /// A U32 tensor's words.
    fn words(tensor: &IntTensor<Self>) -> Cow<'_, [u32]>;

    /// An int tensor's values, whatever its type.
    fn indices(tensor: &IntTensor<Self>) -> Vec<u32>;

    /// A new tensor.
    fn tensor(values: Vec<f32>, shape: Shape) -> FloatTensor<Self>;

    /// A KV cache to read.
    fn cache(tensor: &CacheTensor<Self>) -> CacheRef<'_>;

    /// A KV cache changed by `write`, in place if `tensor` is its only owner.
    fn update_cache(tensor: CacheTensor<Self>, write: impl FnOnce(CacheMut)) -> CacheTensor<Self>;
}

fn dims<T: TensorMetadata>(tensor: &T) -> [usize; 2] {
    let shape = tensor.shape();
    let [m, k] = shape[..] else { panic!("an operand of rank 2, not {shape:?}") };
    [m, k]
}

/// Quantised activations are as large as the activations and used for a moment: kept from call to call.
static ACTIVATIONS: Mutex<Vec<Activations>> = Mutex::new(Vec::new());

fn with_activations<R>(f: impl FnOnce(&mut Activations) -> R) -> R {
    let free = || ACTIVATIONS.lock().unwrap_or_else(|e| e.into_inner());
    let mut activations = free().pop().unwrap_or_default();
    let result = f(&mut activations);
    free().push(activations);
    result
}

/// The manager's threads, as [`bitnet_burn_cpu`] takes them.
struct OnPool<'a>(&'a Pool);

// SAFETY: a pool runs each task of a job once, and returns or unwinds when none of them is running any more.
unsafe impl Threads for OnPool<'_> {
    fn threads(&self) -> usize {
        self.0.threads()
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.0.run(tasks, task);
    }
}

/// The threads of the process's manager.
fn threads() -> OnPool<'static> {
    OnPool(manager().pool())
}

/// For operations that need no threads: the process's manager masks CPU features when it is made, and that has to
/// be before instructions are chosen.
fn masked() {
    manager();
}

/// Norm (if any) and quantisation of rows of `k` values.
fn quantise(x: &[f32], k: usize, norm: Option<(&[f32], f32)>, out: ActivationsMut) {
    let ActivationsMut { q, stride, group, scale, sum } = out;
    quantise_on(&threads(), x, k, norm, Quantised { q, stride, group, scale, sum });
}
