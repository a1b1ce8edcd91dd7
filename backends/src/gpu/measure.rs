//! The figures of [`crate::measure`] on CubeCL's devices.

use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_manager::gpu::params;
use bitnet_burn_manager::memory::PageBuffer;
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeDevice, cubecl};
use cubecl::server::Handle;
use cubecl::std::throughput::measure_peak_throughput;
use cubecl::throughput::{MemoryAccess, MemorySpec, ThroughputKey, ThroughputMode};

use super::body::{self, Input, Part};
use super::choice;
use super::contest::SCALE;
use super::launch::{self, Buffers};
use crate::devices::catching_panics;
use crate::effort::{Effort, KernelTime};
use crate::extension::InputNorm;
use crate::manager::manager;

/// As many copies of weights as ever take turns.
const MOST_COPIES: usize = 256;

fn tensor(device: &CubeDevice, values: &[f32], shape: impl Into<Shape>) -> CubeTensor {
    let client = device.client();
    let handle = client.create_from_slice(bytemuck::cast_slice(values));
    CubeTensor::new_contiguous(client, device.clone(), shape.into(), handle, DType::F32)
}

/// Activations between -1 and 1.
fn activations(device: &CubeDevice, m: usize, k: usize) -> Input {
    let mut random = SplitMix64::new((m * 31 + k) as u64);
    let values: Vec<f32> = (0..m * k).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
    Input::new(tensor(device, &values, [m, k]), InputNorm::None, 0.0)
}

/// Waits until a buffer is written, and says what went wrong on the way there.
fn wait(device: &CubeDevice, written: &Handle) -> Result<(), String> {
    let waited = cubecl::future::block_on(device.client().sync_buffers([written]));
    waited.map_err(|error| body::error_text(&error))
}

pub(crate) fn matmul(
    device: &CubeDevice,
    (m, n, k): (usize, usize, usize),
    effort: &Effort,
) -> Result<Vec<KernelTime>, String> {
    let (manager, client) = (manager(), device.client());
    let weights = SplitMix64::new((n * 31 + k) as u64).weights(n, k);
    let x = activations(device, m, k);
    let scale = tensor(device, &[SCALE], [1]);
    let params = client.create_from_slice(bytemuck::cast_slice(&params(m, n, k, n, 0)));
    let quantised = x.quantise();
    let y = client.empty(m * n * 4);
    wait(device, &quantised.words)?;
    let mut times = Vec::new();
    for kernel in choice::kernels(manager, device, m, n, k) {
        let weight_bytes = kernel.weight_bytes(n, k).unwrap_or(0);
        let seconds = || -> Result<Vec<f64>, String> {
            let packed = match kernel.kernel().layout() {
                None => None,
                Some(_) => Some(manager.pack_for_gpu(&kernel, n, k, &weights).map_err(|e| e.to_string())?),
            };
            let bytes = packed.as_ref().map_or(&weights[..], PageBuffer::as_slice);
            let count = effort.rotated_bytes / bytes.len().max(1);
            let copies: Vec<Handle> =
                (0..count.clamp(1, MOST_COPIES)).map(|_| client.create_from_slice(bytes)).collect();
            let part = Part { kernel: &kernel, weights: &copies[0], scale: &scale.handle, n };
            body::run_checked(manager, &x, &part, (&weights, SCALE)).map_err(|e| e.to_string())??;
            if !kernel.ready() {
                return Err("its outputs are not those of the CPU's kernels".into());
            }
            let run = |i: usize| {
                let buffers = Buffers {
                    weights: copies[i % copies.len()].clone(),
                    scale: scale.handle.clone(),
                    x: quantised.words.clone(),
                    rows: quantised.rows.clone(),
                    params: params.clone(),
                    y: y.clone(),
                };
                // SAFETY: weights as the kernel packed them or canonical, rows as they were quantised, parameters for
                // these sizes, and an output of [m, n].
                unsafe { launch::launch(&client, kernel.kernel(), (m, n, k), buffers) };
            };
            effort.time(run, || wait(device, &y))
        };
        times.push(KernelTime {
            kernel: kernel.kernel().id().to_string(),
            weight_bytes: weight_bytes as u64,
            seconds: catching_panics(seconds).and_then(|seconds| seconds),
        });
    }
    Ok(times)
}

pub(crate) fn quantise(
    device: &CubeDevice,
    (m, k): (usize, usize),
    effort: &Effort,
) -> Result<Vec<f64>, String> {
    let x = activations(device, m, k);
    // Of the last launch.
    let written = std::cell::RefCell::new(x.x().handle.clone());
    let run = |_| *written.borrow_mut() = x.quantise().words;
    catching_panics(|| effort.time(run, || wait(device, &written.borrow()))).and_then(|seconds| seconds)
}

pub(crate) fn read_gb_per_s(device: &CubeDevice, bytes: u64) -> Result<f64, String> {
    let key = ThroughputKey { mode: ThroughputMode::Memory(MemorySpec::new(MemoryAccess::Read, bytes)) };
    let measured = catching_panics(|| measure_peak_throughput(&device.client(), key))?;
    let rate = measured.map_err(|error| error.to_string())?.bytes_per_s(&key) / 1e9;
    if rate.is_finite() && rate > 0.0 { Ok(rate) } else { Err("the device's clock says nothing".into()) }
}
