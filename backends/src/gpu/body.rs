//! `bit_linear` with the kernels of plugins: activations are normalised and quantised on the device, and the kernels
//! write their columns of one output.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use bitnet_burn_cube::rows;
use bitnet_burn_formats::canonical;
use bitnet_burn_manager::gpu::{activations, le_words, params};
use bitnet_burn_manager::memory::Activations;
use bitnet_burn_manager::{GpuKernel, KernelManager, ManagerError, ScaleKind, checksum};
use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl::client::Client;
use burn_cubecl::cubecl::server::{Handle, ServerError};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};

use super::choice::{self, GpuMatrix};
use super::launch::{self, Buffers};
use crate::default;
use crate::extension::{BitLinearArgs, InputNorm, Matrix, MatrixKernels, TernaryWeight, WeightGroup};
use crate::manager::{leave_gpu_error, manager};

type B = CubeBackend;

/// Activations on the device: see [`bitnet_burn_plugin::abi::Gpu`], buffers 2 and 3.
#[derive(Clone, Debug)]
pub(super) struct Quantised {
    pub words: Handle,
    pub rows: Handle,
    pub m: usize,
    pub k: usize,
}

/// Rows of activations, with the norm that they pass first.
#[derive(Clone, Debug)]
pub(super) struct Input {
    /// f32 [M, K], contiguous.
    x: CubeTensor,
    /// Weight `[K]`, contiguous, and epsilon.
    norm: Option<(CubeTensor, f32)>,
}

impl Input {
    pub fn new(x: CubeTensor, norm: InputNorm<B>, eps: f32) -> Self {
        let norm = match norm {
            InputNorm::None => None,
            InputNorm::Rms(weight) => Some((into_contiguous(weight), eps)),
        };
        Self { x: into_contiguous(x), norm }
    }

    /// The rows before the norm.
    pub fn x(&self) -> &CubeTensor {
        &self.x
    }

    fn into_parts(self) -> (CubeTensor, InputNorm<B>) {
        (self.x, self.norm.map_or(InputNorm::None, |(weight, _)| InputNorm::Rms(weight)))
    }

    fn shape(&self) -> (usize, usize) {
        let [m, k] = self.x.shape()[..] else { unreachable!("rows of activations have two dimensions") };
        (m, k)
    }

    /// Normalises and quantises the rows.
    pub fn quantise(&self) -> Quantised {
        let (x, (m, k)) = (&self.x, self.shape());
        let eps = self.norm.as_ref().map_or(0.0, |(_, eps)| *eps);
        let params = params_on(&x.device, &x.client, rows::quantise_params(k, eps));
        let norm = self.norm.as_ref().map(|(weight, _)| weight.handle.clone());
        // SAFETY: x is contiguous f32 [m, k], a norm's weight [k], and the parameters are those for them.
        let (words, rows) = unsafe { rows::quantise(&x.client, x.handle.clone(), norm, params, m, k) };
        Quantised { words, rows, m, k }
    }
}

/// One matrix of a launch.
pub(super) struct Part<'a> {
    pub kernel: &'a GpuKernel,
    /// In the kernel's layout.
    pub weights: &'a Handle,
    pub scale: &'a Handle,
    /// Output features.
    pub n: usize,
}

pub(crate) fn bit_linear(
    x: CubeTensor,
    norm: InputNorm<B>,
    weights: WeightGroup<B>,
    mut args: BitLinearArgs,
) -> CubeTensor {
    let m = x.shape()[0];
    let (client, device) = (x.client.clone(), x.device.clone());
    let k = args.k;
    // The kernels of GPUs are for one scale.
    let one = |matrix: &Matrix| matrix.scales == ScaleKind::One;
    for matrix in args.matrices.iter_mut().filter(|m| args.quantise && m.choice.is_none() && one(m)) {
        let chosen = choice::canonical(manager(), &device, matrix.n, k);
        matrix.choice = chosen.map(|matrix| MatrixKernels::Gpu(Arc::new(matrix)));
    }
    let chosen = args.matrices.iter().all(one) && args.matrices.iter().any(|matrix| gpu(matrix).is_some());
    // A launch has 2^16 - 1 workgroups for rows at most, and kernels number values with 32 bits.
    let fits = m.saturating_mul(args.k.max(args.total_n())) <= u32::MAX as usize;
    let rows = (1..1 << 16).contains(&m) && fits;
    let result = if chosen && args.quantise && rows && x.dtype == DType::F32 {
        with_kernels(manager(), Input::new(x, norm, args.eps), weights.into_vec(), &args)
    } else {
        canonical_weights(manager(), weights.into_vec(), &args)
            .map(|weights| default::bit_linear::<B>(x, norm, weights, &args))
    };
    result.unwrap_or_else(|error| {
        leave_gpu_error(error);
        upload(&client, &device, &vec![f32::NAN; m * args.total_n()], m)
    })
}

pub(crate) fn bit_linear_backward(
    dy: CubeTensor,
    weights: WeightGroup<B>,
    args: BitLinearArgs,
) -> CubeTensor {
    let m = dy.shape()[0];
    let (client, device) = (dy.client.clone(), dy.device.clone());
    canonical_weights(manager(), weights.into_vec(), &args)
        .map(|weights| default::bit_linear_backward::<B>(dy, weights, &args))
        .unwrap_or_else(|error| {
            leave_gpu_error(error);
            upload(&client, &device, &vec![f32::NAN; m * args.k], m)
        })
}

fn gpu(matrix: &Matrix) -> Option<&GpuMatrix> {
    match &matrix.choice {
        Some(MatrixKernels::Gpu(matrix)) => Some(matrix),
        _ => None,
    }
}

fn upload(client: &Client, device: &CubeDevice, values: &[f32], m: usize) -> CubeTensor {
    let shape = Shape::new([m, values.len() / m.max(1)]);
    let handle = client.create_from_slice(bytemuck::cast_slice(values));
    CubeTensor::new_contiguous(client.clone(), device.clone(), shape, handle, DType::F32)
}

/// The operation by whatever was chosen for each matrix.
pub(super) fn with_kernels(
    manager: &KernelManager,
    input: Input,
    weights: Vec<TernaryWeight<B>>,
    args: &BitLinearArgs,
) -> Result<CubeTensor, ManagerError> {
    let (m, k) = input.shape();
    for matrix in &args.matrices {
        if let Some(kernel) = gpu(matrix).and_then(|gpu| gpu.damaged.get()) {
            let kernel = kernel.clone();
            return Err(ManagerError::Damaged { kernel, what: "its weights", n: matrix.n, k });
        }
    }
    let weights: Vec<_> = weights
        .into_iter()
        .map(|TernaryWeight { codes, scale }| TernaryWeight::<B> {
            codes: into_contiguous(codes),
            scale: into_contiguous(scale),
        })
        .collect();
    let kernels: Vec<Option<GpuKernel>> =
        args.matrices.iter().map(|matrix| gpu(matrix)?.choice.kernel(manager, &input.x.client, m)).collect();
    let mut parts = Vec::with_capacity(weights.len());
    for ((matrix, weight), kernel) in args.matrices.iter().zip(&weights).zip(&kernels) {
        let known = |kernel: &&GpuKernel| gpu(matrix).is_some_and(|gpu| gpu.choice.knows(kernel, m));
        parts.extend(kernel.as_ref().filter(known).map(|kernel| Part {
            kernel,
            weights: &weight.codes.handle,
            scale: &weight.scale.handle,
            n: matrix.n,
        }));
    }
    if parts.len() < weights.len() {
        return one_by_one(manager, &input, weights, &kernels, args);
    }
    let (y, quantised) = run(&input, &parts);
    let due: Vec<bool> = parts.iter().map(|part| part.kernel.count(manager)).collect();
    if due.contains(&true) && !spot_check(manager, &due, &parts, &weights, &quantised, &y, args)? {
        return one_by_one(manager, &input, weights, &kernels, args);
    }
    Ok(y)
}

/// Each matrix by itself: where a kernel's result is to be compared before it may be believed, or a matrix has none.
fn one_by_one(
    manager: &KernelManager,
    input: &Input,
    weights: Vec<TernaryWeight<B>>,
    kernels: &[Option<GpuKernel>],
    args: &BitLinearArgs,
) -> Result<CubeTensor, ManagerError> {
    let (m, k) = input.shape();
    let mut outputs = Vec::with_capacity(weights.len());
    for ((matrix, weight), kernel) in args.matrices.iter().zip(weights).zip(kernels) {
        let mut output = None;
        if let (Some(gpu), Some(kernel)) = (gpu(matrix), kernel.as_ref().filter(|kernel| kernel.ready())) {
            let part =
                Part { kernel, weights: &weight.codes.handle, scale: &weight.scale.handle, n: matrix.n };
            let scale = scale(&weight)?;
            let codes = canonical_bytes(manager, gpu, &weight)?;
            gpu.checksum.get_or_init(|| checksum(&codes));
            match run_checked(manager, input, &part, (&codes, scale))? {
                Ok(y) => {
                    if kernel.ready() {
                        kernel.count_compared();
                        gpu.choice.learn(kernel, m);
                    }
                    output = Some(upload(&input.x.client, &input.x.device, &y, m));
                }
                Err(reason) => {
                    gpu.choice.fail(kernel);
                    manager.gpu_failed(kernel, (m, matrix.n, k), reason)?;
                }
            }
        }
        outputs.push(match output {
            Some(output) => output,
            None => {
                let args = BitLinearArgs { matrices: vec![matrix.clone()], ..args.clone() };
                let weights = canonical_weights(manager, vec![weight], &args)?;
                let (x, norm) = input.clone().into_parts();
                default::bit_linear::<B>(x, norm, weights, &args)
            }
        });
    }
    Ok(default::concat::<B>(outputs))
}

/// Quantises rows and launches the kernels on them; the unchecked output.
pub(super) fn run(input: &Input, parts: &[Part]) -> (CubeTensor, Quantised) {
    let ((m, k), x) = (input.shape(), &input.x);
    let client = &x.client;
    let total: usize = parts.iter().map(|part| part.n).sum();
    let y = client.empty(m * total * 4);
    let quantised = input.quantise();
    let mut column = 0;
    for part in parts {
        let params = params_on(&x.device, client, params(m, part.n, k, total, column));
        let buffers = Buffers {
            weights: part.weights.clone(),
            scale: part.scale.clone(),
            x: quantised.words.clone(),
            rows: quantised.rows.clone(),
            params,
            y: y.clone(),
        };
        // SAFETY: weights of the kernel's own size or canonical, rows as they were quantised, and room for all columns.
        unsafe { launch::launch(client, part.kernel.kernel(), (m, part.n, k), buffers) };
        column += part.n;
    }
    let shape = Shape::new([m, total]);
    let y = CubeTensor::new_contiguous(client.clone(), x.device.clone(), shape, y, DType::F32);
    (y, quantised)
}

/// Runs a kernel, and compares its result with a trusted one, which is returned; or why it could not be run.
/// A kernel that was wrong is in quarantine then.
///
/// # Errors
/// If it was wrong, and the policy forbids a fallback.
pub(super) fn run_checked(
    manager: &KernelManager,
    input: &Input,
    part: &Part,
    (codes, scale): (&[u8], f32),
) -> Result<Result<Vec<f32>, String>, ManagerError> {
    // A driver may panic on what it does not expect.
    let run = || -> Result<(Vec<f32>, Activations), ServerError> {
        let (y, quantised) = run(input, std::slice::from_ref(part));
        let client = &input.x.client;
        let y = read(client, &y.handle)?;
        Ok((y, read_activations(client, &quantised)?))
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Err(_) => Ok(Err("the device panicked".into())),
        Ok(Err(error)) => Ok(Err(error_text(&error))),
        Ok(Ok((mut y, activations))) => {
            manager.check_first(part.kernel, (part.n, codes, scale), &activations, &mut y)?;
            Ok(Ok(y))
        }
    }
}

/// Compares some results of the kernels whose turn it is; whether they are right.
fn spot_check(
    manager: &KernelManager,
    due: &[bool],
    parts: &[Part],
    weights: &[TernaryWeight<B>],
    quantised: &Quantised,
    y: &CubeTensor,
    args: &BitLinearArgs,
) -> Result<bool, ManagerError> {
    let total = args.total_n();
    let values: Vec<f32> = read(&y.client, &y.handle).map_err(|error| lost(&error))?;
    let x = read_activations(&y.client, quantised).map_err(|error| lost(&error))?;
    let (mut right, mut column) = (true, 0);
    for (((part, due), weight), matrix) in parts.iter().zip(due).zip(weights).zip(&args.matrices) {
        if let (true, Some(gpu)) = (due, gpu(matrix)) {
            let own: Vec<f32> =
                values.chunks_exact(total).flat_map(|row| &row[column..][..part.n]).copied().collect();
            let codes = match canonical_bytes(manager, gpu, weight) {
                Ok(codes) if *gpu.checksum.get_or_init(|| checksum(&codes)) == checksum(&codes) => codes,
                // The private layout has a checksum of its own.
                Ok(_) | Err(ManagerError::Unpack { .. }) => {
                    gpu.damaged.get_or_init(|| part.kernel.kernel().id().to_owned());
                    return Err(manager.wrote_into_weights(part.kernel, (matrix.n, x.k())));
                }
                Err(error) => return Err(error),
            };
            right &= manager.spot_check(part.kernel, (part.n, &codes, scale(weight)?), &x, &own)?;
        }
        column += part.n;
    }
    Ok(right)
}

pub(super) fn read<T: bytemuck::Pod>(client: &Client, handle: &Handle) -> Result<Vec<T>, ServerError> {
    Ok(bytemuck::pod_collect_to_vec(&client.read_one(handle.clone())?))
}

pub(super) fn read_activations(client: &Client, quantised: &Quantised) -> Result<Activations, ServerError> {
    let words: Vec<u32> = read(client, &quantised.words)?;
    let rows: Vec<[u32; 2]> = read(client, &quantised.rows)?;
    Ok(activations(&words, &rows, quantised.m, quantised.k))
}

fn scale(weight: &TernaryWeight<B>) -> Result<f32, ManagerError> {
    let values: Vec<f32> = read(&weight.scale.client, &weight.scale.handle).map_err(|error| lost(&error))?;
    Ok(values.first().copied().unwrap_or(f32::NAN))
}

/// The weights' canonical bytes, read back from the device.
fn canonical_bytes(
    manager: &KernelManager,
    gpu: &GpuMatrix,
    weight: &TernaryWeight<B>,
) -> Result<Vec<u8>, ManagerError> {
    let bytes: Vec<u8> = read(&weight.codes.client, &weight.codes.handle).map_err(|error| lost(&error))?;
    match bytes.get(..gpu.weight_bytes()) {
        Some(bytes) => gpu.unpack(manager, bytes),
        None => Err(ManagerError::Operands(format!(
            "{} bytes of weights on the device, where {} were packed",
            bytes.len(),
            gpu.weight_bytes()
        ))),
    }
}

/// The weights with their codes in the canonical layout, unpacked once where a kernel's own packing is in the way.
fn canonical_weights(
    manager: &KernelManager,
    weights: Vec<TernaryWeight<B>>,
    args: &BitLinearArgs,
) -> Result<WeightGroup<B>, ManagerError> {
    let mut canonical = Vec::with_capacity(weights.len());
    for (TernaryWeight { codes, scale }, matrix) in weights.into_iter().zip(&args.matrices) {
        let codes = match gpu(matrix).filter(|gpu| gpu.layout().is_some()) {
            None => codes,
            Some(gpu) => match gpu.canonical.get() {
                Some(codes) => codes.clone(),
                None => {
                    let weight = TernaryWeight::<B> { codes: into_contiguous(codes), scale: scale.clone() };
                    let bytes = canonical_bytes(manager, gpu, &weight)?;
                    let (client, device) = (&weight.codes.client, &weight.codes.device);
                    let handle = client.create_from_slice(bytemuck::cast_slice(&le_words(&bytes)));
                    let shape = Shape::new([matrix.n, canonical::row_bytes(args.k) / 4]);
                    let codes =
                        CubeTensor::new_contiguous(client.clone(), device.clone(), shape, handle, DType::U32);
                    gpu.canonical.get_or_init(|| codes).clone()
                }
            },
        };
        canonical.push(TernaryWeight { codes, scale });
    }
    Ok(WeightGroup::from_vec(canonical))
}

/// Parameters on a device: few different ones, again and again.
pub(super) fn params_on(device: &CubeDevice, client: &Client, params: [u32; 8]) -> Handle {
    type Known = HashMap<(CubeDevice, [u32; 8]), Handle>;
    static KNOWN: Mutex<Option<Known>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap_or_else(|e| e.into_inner());
    let known = known.get_or_insert_default();
    // Prompts of ever other lengths.
    if known.len() > 4096 {
        known.clear();
    }
    let create = || client.create_from_slice(bytemuck::cast_slice(&params));
    known.entry((device.clone(), params)).or_insert_with(create).clone()
}

/// What a device's failure says: the innermost causes, without what leads to them and the traces that follow.
pub(super) fn error_text(error: &ServerError) -> String {
    const WRAPPERS: [&str; 5] = [
        "Several failures at once",
        "The bytes were never written",
        "A launch error happened",
        "A compilation error happened",
        "An error caused the compilation to fail",
    ];
    let text = error.to_string();
    let lines = text.lines().map(str::trim).filter(|line| {
        !line.is_empty() && *line != "Caused by:" && !WRAPPERS.iter().any(|wrapper| line.starts_with(wrapper))
    });
    let lines: Vec<&str> =
        lines.take_while(|line| !line.to_lowercase().contains("backtrace")).take(20).collect();
    match lines.is_empty() {
        true => text.lines().next().unwrap_or_default().to_owned(),
        false => lines.join(" ").chars().take(600).collect(),
    }
}

fn lost(error: &ServerError) -> ManagerError {
    ManagerError::Device(error_text(error))
}
