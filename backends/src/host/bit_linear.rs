//! The ternary linear layer, by the manager's kernels.

use bitnet_burn_formats::canonical;
use bitnet_burn_manager::profile::{self, Operation};
use bitnet_burn_manager::{Job, KernelManager, LayoutPolicy, ManagerError, Packed, ScaleKind, WeightShape};
use bitnet_burn_plugin::sdk::group_length;
use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;

use super::{HostBackend, dims, quantise, with_activations};
use crate::default;
use crate::extension::{
    BitLinearArgs, HostKernels, InputNorm, MatrixKernels, Repacked, TernaryWeight, WeightGroup,
};
use crate::manager::{leave_error, manager};

/// The kernels that were chosen for the matrices, or now are.
fn choices(manager: &KernelManager, args: &BitLinearArgs) -> Result<Vec<HostKernels>, ManagerError> {
    args.matrices
        .iter()
        .map(|matrix| match &matrix.choice {
            Some(MatrixKernels::Host(kernels)) => Ok(kernels.clone()),
            // Weights that were packed for a GPU are canonical when they come here (`ops::bit_linear`).
            _ => manager
                .choose(
                    WeightShape { n: matrix.n, k: args.k, scales: matrix.scales },
                    LayoutPolicy::Canonical,
                )
                .map(HostKernels::from),
        })
        .collect()
}

pub(crate) fn bit_linear<B: HostBackend>(
    x: FloatTensor<B>,
    norm: InputNorm<B>,
    weights: WeightGroup<B>,
    args: BitLinearArgs,
) -> FloatTensor<B> {
    let [m, k] = dims(&x);
    let _span = profile::span_of(Operation::TernaryMatmul, || shapes(&args));
    let weights = weights.into_vec();
    let total = args.total_n();
    let manager = manager();
    let choices = match choices(manager, &args) {
        Ok(choices) => choices,
        Err(error) => return failed::<B>(error, m, total),
    };
    if !args.quantise {
        // Float activations: a reference, in plain operations.
        return match canonical_weights::<B>(manager, weights, &choices, args.k) {
            Ok(weights) => default::bit_linear::<B>(x, norm, weights, &args),
            Err(error) => failed::<B>(error, m, total),
        };
    }
    let mut y = vec![0f32; m * total];
    let words: Vec<_> = weights.iter().map(|w| B::words(&w.codes)).collect();
    let scales: Vec<_> = weights.iter().map(|w| B::scales(&w.scale)).collect();
    let mut column = 0;
    let jobs: Vec<Job> = scales
        .iter()
        .zip(&words)
        .zip(&choices)
        .map(|((scales, words), kernels)| {
            // Once: it may become packed meanwhile.
            let (choice, packed) = match kernels.called() {
                Some(Repacked { choice, weights }) => (choice, Some(weights)),
                None => (&**kernels, None),
            };
            let bytes = match packed {
                Some(Packed::Private(weights)) => weights.as_slice(),
                Some(Packed::Canonical) | None => bytemuck::cast_slice(words),
            };
            let job = Job {
                choice,
                // Words are whole; a private packing may end within one.
                weights: bytes.get(..choice.weight_bytes()).unwrap_or(bytes),
                scale: scales.of(choice.weight_shape().scales),
                column,
            };
            column += choice.shape().0;
            job
        })
        .collect();
    let result = with_activations(|activations| {
        let values = B::floats(&x);
        let weight = match &norm {
            InputNorm::None => None,
            InputNorm::Rms(weight) => Some(B::floats(weight)),
        };
        let norm = weight.as_deref().map(|weight| (weight, args.eps));
        {
            let _span = profile::span(Operation::Quantisation);
            quantise(&values, k, norm, activations.resize_groups(m, k, args.activation_group()));
        }
        manager.matmul(&jobs, activations, &mut y, total)
    });
    match result {
        Ok(()) => B::tensor(y, Shape::new([m, total])),
        Err(error) => failed::<B>(error, m, total),
    }
}

/// The matrices as a profile names them: N x K of each.
fn shapes(args: &BitLinearArgs) -> String {
    let shapes: Vec<String> = args.matrices.iter().map(|matrix| format!("{}x{}", matrix.n, args.k)).collect();
    shapes.join(" + ")
}

/// Leaves the error for the caller, and NaN for whoever does not ask.
fn failed<B: HostBackend>(error: ManagerError, m: usize, n: usize) -> FloatTensor<B> {
    leave_error(error);
    B::tensor(vec![f32::NAN; m * n], Shape::new([m, n]))
}

/// The weights with their codes in the canonical layout.
fn canonical_weights<B: HostBackend>(
    manager: &KernelManager,
    weights: Vec<TernaryWeight<B>>,
    choices: &[HostKernels],
    k: usize,
) -> Result<WeightGroup<B>, ManagerError> {
    let mut canonical = Vec::with_capacity(weights.len());
    for (weight, choice) in weights.into_iter().zip(choices) {
        let TernaryWeight { codes, scale } = weight;
        let codes = if choice.layout().is_none() {
            codes
        } else {
            let n = choice.shape().0;
            let words = B::words(&codes);
            let bytes = manager.unpack(choice, &bytemuck::cast_slice(&words)[..choice.weight_bytes()])?;
            let words: Vec<u32> =
                bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let device = codes.device();
            B::int_from_data(burn::tensor::TensorData::new(words, [n, k.div_ceil(128) * 8]), &device)
        };
        canonical.push(TernaryWeight { codes, scale });
    }
    Ok(WeightGroup::from_vec(canonical))
}

/// The gradient for the input, of a few rows of the weights as floats at a time.
pub(crate) fn bit_linear_backward<B: HostBackend>(
    dy: FloatTensor<B>,
    weights: WeightGroup<B>,
    args: BitLinearArgs,
) -> FloatTensor<B> {
    let manager = manager();
    let m = dims(&dy)[0];
    match choices(manager, &args)
        .and_then(|choices| canonical_weights::<B>(manager, weights.into_vec(), &choices, args.k))
    {
        Ok(weights) => unpacked_backward::<B>(dy, weights, &args),
        Err(error) => failed::<B>(error, m, args.k),
    }
}

/// [`bit_linear_backward`] with canonical codes.
fn unpacked_backward<B: HostBackend>(
    dy: FloatTensor<B>,
    weights: WeightGroup<B>,
    args: &BitLinearArgs,
) -> FloatTensor<B> {
    let (k, row_bytes) = (args.k, canonical::row_bytes(args.k));
    let mut column = 0;
    let mut codes = vec![0i8; k];
    let mut dx = None;
    for (weight, matrix) in weights.into_vec().into_iter().zip(&args.matrices) {
        let words = B::words(&weight.codes);
        let rows: &[u8] = bytemuck::cast_slice(&words);
        let (group, scales) = match matrix.scales {
            ScaleKind::One => (0, vec![B::floats(&weight.scale)[0]; matrix.n]),
            ScaleKind::Groups { weights, .. } => {
                let scales = default::scales_by_rows::<B>(weight.scale, matrix.n);
                (weights, B::floats(&scales).into_owned())
            }
        };
        let (groups, group) = (scales.len() / matrix.n, group_length(k, group));
        let mut scales = scales.chunks_exact(groups);
        let mut rows = rows.chunks_exact(row_bytes);
        dx = backward_tiles::<B>(dx, (&dy, column), (matrix.n, k), |values| {
            canonical::unpack_row(rows.next().expect("a row of codes"), &mut codes);
            let scales = scales.next().expect("scales of a row");
            let parts = values.chunks_mut(group).zip(codes.chunks(group)).zip(scales);
            for ((values, codes), scale) in parts {
                values.iter_mut().zip(codes).for_each(|(value, &code)| *value = f32::from(code) * scale);
            }
        });
        column += matrix.n;
    }
    dx.expect("WeightGroup holds one to three matrices")
}

/// Rows of weights that are floats at a time.
const TILE: usize = 256;

/// Adds to `dx` the columns of dy from `column` on times weights [n, k], whose rows `decode` gives one after the other.
pub(super) fn backward_tiles<B: HostBackend>(
    mut dx: Option<FloatTensor<B>>,
    (dy, column): (&FloatTensor<B>, usize),
    (n, k): (usize, usize),
    mut decode: impl FnMut(&mut [f32]),
) -> Option<FloatTensor<B>> {
    for from in (0..n).step_by(TILE) {
        let rows = TILE.min(n - from);
        let mut values = vec![0f32; rows * k];
        values.chunks_exact_mut(k).for_each(&mut decode);
        let part = default::columns_of::<B>(dy, column + from..column + from + rows);
        let product = B::float_matmul(part, B::tensor(values, Shape::new([rows, k])));
        dx = Some(match dx {
            Some(dx) => B::float_add(dx, product),
            None => product,
        });
    }
    dx
}
