//! The embedding and the output projection, from the bytes of their files.

use bitnet_burn_cube::dense::{self, Activations, Format, Matrix};
use bitnet_burn_formats::DenseFormat;
use burn::backend::ops::IntTensorOps;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::server::Handle;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::body::{Input, params_on};
use super::rows::{dims, tensor};
use crate::default;
use crate::extension::{DenseArgs, InputNorm};

type B = CubeBackend;

/// The matrix, if the kernels take it.
fn matrix(args: &DenseArgs) -> Option<Matrix> {
    let format = match args.format {
        DenseFormat::F32 => Format::F32,
        DenseFormat::F16 => Format::F16,
        DenseFormat::BF16 => Format::Bf16,
        DenseFormat::Q8_0 => Format::Q8_0,
        DenseFormat::Q6_K => Format::Q6K,
        DenseFormat::Q4_0 => Format::Q4_0,
        DenseFormat::Q4_1 => Format::Q4_1,
        DenseFormat::Q5_0 => Format::Q5_0,
        DenseFormat::Q5_1 => Format::Q5_1,
        DenseFormat::Q4_K => Format::Q4K,
        DenseFormat::Q5_K => Format::Q5K,
        DenseFormat::IQ4_NL => Format::Iq4Nl,
        DenseFormat::Q2_0 => Format::Q2_0,
        DenseFormat::PQ2_0 => Format::Pq2_0,
        DenseFormat::PTQ1_0 => Format::Ptq1_0,
        DenseFormat::TQ1_0 => Format::Tq1_0,
        DenseFormat::TQ2_0 => Format::Tq2_0,
    };
    Some(Matrix { format, n: args.n, k: args.k }).filter(|matrix| matrix.supported() && !args.tiled)
}

pub(crate) fn dense_linear(x: CubeTensor, words: CubeTensor, args: DenseArgs) -> CubeTensor {
    let [m, _] = dims(&x);
    let Some(matrix) = matrix(&args).filter(|_| x.dtype == DType::F32 && m > 0) else {
        return default::dense_linear::<B>(x, words, &args);
    };
    let words = into_contiguous(words).handle;
    if m > dense::MAX_ROWS {
        let weights = decode(&x, &matrix, words, None, args.n);
        return default::decoded_linear::<B>(x, weights, &args);
    }
    let params = params_on(&x.device, &x.client, matrix.params(m));
    let input = Input::new(x, InputNorm::None, 0.0);
    let (x, client) = (input.x(), &input.x().client);
    let activations = if args.int8 {
        let quantised = input.quantise();
        Activations::Int8(quantised.words, quantised.rows)
    } else {
        Activations::F32(x.handle.clone())
    };
    // SAFETY: the matrix's words, rows [m, k] of contiguous f32 or as they were quantised, and the parameters for them.
    let y = unsafe { dense::linear(client, &matrix, words, activations, params, m) };
    tensor(x, y, [m, matrix.n])
}

pub(crate) fn dense_rows(words: CubeTensor, ids: CubeTensor, args: DenseArgs) -> CubeTensor {
    let m = ids.meta.num_elements();
    match matrix(&args).filter(|_| m > 0 && m * args.k <= u32::MAX as usize) {
        None => default::dense_rows::<B>(words, ids, &args),
        Some(matrix) => {
            // Not negative, so that the words of i32 are those of u32.
            let ids = if ids.dtype == DType::I32 { ids } else { B::int_cast(ids, DType::I32.into()) };
            let (words, ids) = (into_contiguous(words), into_contiguous(ids));
            decode(&words, &matrix, words.handle.clone(), Some(ids.handle), m)
        }
    }
}

/// Rows, all or those of `ids`, as f32.
fn decode(on: &CubeTensor, matrix: &Matrix, words: Handle, ids: Option<Handle>, m: usize) -> CubeTensor {
    let params = params_on(&on.device, &on.client, matrix.params(m));
    // SAFETY: the matrix's words, m ids that were checked to be below n, and the parameters for them.
    let y = unsafe { dense::decode(&on.client, matrix, words, ids, params, m) };
    tensor(on, y, [m, matrix.k])
}
