//! Dense layers in the format of their file, and embeddings.

use bitnet_burn_cpu::dense;
use bitnet_burn_formats::dense_tiles::TiledFormat;
use bitnet_burn_manager::profile::{self, Operation};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::Shape;

use super::bit_linear::backward_tiles;
use super::{HostBackend, dims, quantise, threads, with_activations};
use crate::default;
use crate::extension::DenseArgs;

fn raw<'a>(words: &'a [u32], args: &DenseArgs) -> &'a [u8] {
    &bytemuck::cast_slice(words)[..args.bytes().expect("checked when the tensor was made")]
}

pub(crate) fn dense_linear<B: HostBackend>(
    x: FloatTensor<B>,
    words: IntTensor<B>,
    args: DenseArgs,
) -> FloatTensor<B> {
    let DenseArgs { format, n, k, int8, tiled } = args;
    if int8 != tiled {
        static SLOW: std::sync::Once = std::sync::Once::new();
        SLOW.call_once(|| tracing::warn!(?args, "weights for int8 activations that are not in tiles: slow"));
        return default::dense_linear::<B>(x, words, &args);
    }
    let _span = profile::span_of(Operation::DenseMatmul, || format!("{n}x{k} {}", format.name()));
    let m = dims(&x)[0];
    let words = B::words(&words);
    let mut y = vec![0f32; m * n];
    let (weights, values) = (raw(&words, &args), B::floats(&x));
    match TiledFormat::of(format).filter(|_| int8) {
        Some(format) => with_activations(|activations| {
            {
                let _span = profile::span(Operation::Quantisation);
                quantise(&values, k, None, activations.resize(m, k));
            }
            let x = dense::int8::Activations {
                k,
                q: activations.q(),
                stride: activations.stride(),
                scale: activations.scale(),
            };
            dense::int8::linear(format, weights, n, x, &mut y, n, &threads());
        }),
        None => dense::floats::linear(format, weights, n, k, &values, m, &mut y, n, &threads()),
    }
    B::tensor(y, Shape::new([m, args.n]))
}

/// The gradient for the input, of a few rows of the weights as floats at a time.
pub(crate) fn dense_linear_backward<B: HostBackend>(
    dy: FloatTensor<B>,
    words: IntTensor<B>,
    args: DenseArgs,
) -> FloatTensor<B> {
    if args.tiled {
        return default::dense_linear_backward::<B>(dy, words, &args);
    }
    let DenseArgs { format, n, k, .. } = args;
    let words = B::words(&words);
    let row_bytes = format.row_bytes(k).expect("checked when the tensor was made");
    let mut rows = raw(&words, &args).chunks_exact(row_bytes);
    let dx = backward_tiles::<B>(None, (&dy, 0), (n, k), |values| {
        let row = rows.next().expect("a row of the weights");
        format.decode_row(row, values).expect("a row of the format's length");
    });
    dx.unwrap_or_else(|| B::tensor(vec![0.0; dims(&dy)[0] * k], Shape::new([dims(&dy)[0], k])))
}

pub(crate) fn dense_rows<B: HostBackend>(
    words: IntTensor<B>,
    ids: IntTensor<B>,
    args: DenseArgs,
) -> FloatTensor<B> {
    let (words, ids) = (B::words(&words), B::indices(&ids));
    let mut y = vec![0f32; ids.len() * args.k];
    dense::floats::gather_rows(args.format, raw(&words, &args), args.k, &ids, &mut y);
    B::tensor(y, Shape::new([ids.len(), args.k]))
}
