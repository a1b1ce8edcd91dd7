//! Dense layers in the format of their file, and embeddings.

use bitnet_burn_formats::DenseFormat;
use bitnet_burn_formats::dense_tiles::untile;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{FloatDType, IntDType, Shape, TensorData, try_read_sync};

use super::{dims, quantise, slice};
use crate::extension::DenseArgs;

pub(crate) fn dense_linear<B: Backend>(
    x: FloatTensor<B>,
    words: IntTensor<B>,
    args: &DenseArgs,
) -> FloatTensor<B> {
    let words = if args.tiled { rows_of_tiles::<B>(words, args) } else { words };
    decoded_linear::<B>(x, decode::<B>(words, args), args)
}

/// [`dense_linear`] with weights [N, K] that are decoded.
pub(crate) fn decoded_linear<B: Backend>(
    x: FloatTensor<B>,
    weights: FloatTensor<B>,
    args: &DenseArgs,
) -> FloatTensor<B> {
    let weights = B::float_transpose(weights);
    if !args.int8 {
        return B::float_matmul(x, weights);
    }
    let (q, scale) = quantise::<B>(x);
    B::float_mul(B::float_matmul(q, weights), scale)
}

pub(crate) fn dense_rows<B: Backend>(
    words: IntTensor<B>,
    ids: IntTensor<B>,
    args: &DenseArgs,
) -> FloatTensor<B> {
    let row = args.format.row_bytes(args.k).expect("checked when the tensor was made");
    let words = flat::<B>(words);
    if !row.is_multiple_of(4) {
        return B::float_select(decode::<B>(words, args), 0, ids);
    }
    let words = B::int_slice(words, &slice(&[0..args.n * row / 4]));
    let rows = B::int_select(B::int_reshape(words, Shape::new([args.n, row / 4])), 0, ids);
    let m = dims(&rows)[0];
    decode::<B>(B::int_reshape(rows, Shape::new([m * row / 4])), &DenseArgs { n: m, ..*args })
}

/// Rows of what lies in tiles, by way of the host: tiles are for the bodies that host memory has.
fn rows_of_tiles<B: Backend>(words: IntTensor<B>, args: &DenseArgs) -> IntTensor<B> {
    let device = words.device();
    let data = try_read_sync(B::int_into_data(words)).expect("a device that is read at once");
    let words: Vec<u32> = data.expect("a tensor's data").iter::<i64>().map(|word| word as u32).collect();
    let tiles = &bytemuck::cast_slice(&words)[..args.bytes().expect("checked when the tensor was made")];
    let size = DenseArgs { tiled: false, ..*args }.bytes().expect("tiles are no smaller");
    let mut rows = vec![0u32; size.div_ceil(4)];
    let out = &mut bytemuck::cast_slice_mut(&mut rows)[..size];
    untile(args.format, tiles, (args.n, args.k), out).expect("tiles of that size");
    let count = rows.len();
    B::int_from_data(TensorData::new(rows, [count]), &device)
}

/// Words in one dimension, whatever shape they are kept in.
fn flat<B: Backend>(words: IntTensor<B>) -> IntTensor<B> {
    let count = words.shape().num_elements();
    B::int_reshape(words, Shape::new([count]))
}

/// W [n, k] as f32.
fn decode<B: Backend>(words: IntTensor<B>, args: &DenseArgs) -> FloatTensor<B> {
    let DenseArgs { format, n, k, .. } = *args;
    let size = n * format.row_bytes(k).expect("checked when the tensor was made");
    let block = format.block_bytes();
    let blocks = size / block;
    let bits = |tensor: IntTensor<B>, shift: i64, width: i64| {
        let shifted = if shift == 0 { tensor } else { B::bitwise_right_shift_scalar(tensor, shift.into()) };
        B::bitwise_and_scalar(shifted, ((1i64 << width) - 1).into())
    };
    let words = flat::<B>(words);
    let count = dims(&words)[0];
    let float = |tensor: IntTensor<B>| B::int_into_float(tensor, FloatDType::F32);
    let whole = Shape::new([n, k]);
    if format == DenseFormat::F32 {
        return B::float_reshape(from_bits::<B>(B::int_slice(words, &slice(&[0..n * k])), 8, 23), whole);
    }
    // [words, 4] bytes, cut off at the tensor's end: [blocks, bytes of a block].
    let words = B::int_reshape(words, Shape::new([count, 1]));
    let bytes = B::int_cat((0..4).map(|i| bits(words.clone(), 8 * i, 8)).collect(), 1);
    let bytes = B::int_reshape(bytes, Shape::new([4 * count]));
    let bytes = B::int_reshape(B::int_slice(bytes, &slice(&[0..size])), Shape::new([blocks, block]));
    let part = |from: usize, to: usize| B::int_slice(bytes.clone(), &slice(&[0..blocks, from..to]));
    let half = |at: usize| {
        let high = B::bitwise_left_shift_scalar(part(at + 1, at + 2), 8i64.into());
        B::bitwise_or(part(at, at + 1), high)
    };
    // Two's complement: (b ^ 128) - 128.
    let signed = |tensor: IntTensor<B>| {
        B::float_sub_scalar(float(B::bitwise_xor_scalar(tensor, 128i64.into())), 128f32.into())
    };
    let values = match format {
        DenseFormat::F32 => unreachable!("returned above"),
        DenseFormat::F16 => from_bits::<B>(half(0), 5, 10),
        DenseFormat::BF16 => from_bits::<B>(half(0), 8, 7),
        DenseFormat::Q8_0 => B::float_mul(signed(part(2, 34)), from_bits::<B>(half(0), 5, 10)),
        DenseFormat::Q4_0 => {
            let nibbles = B::int_cat(vec![bits(part(2, 18), 0, 4), bits(part(2, 18), 4, 4)], 1);
            B::float_mul(B::float_sub_scalar(float(nibbles), 8f32.into()), from_bits::<B>(half(0), 5, 10))
        }
        DenseFormat::Q6_K => {
            // ql [0, 128), qh [128, 192), scales [192, 208), d [208, 210); two halves of 128 weights.
            let quarters = (0..2).flat_map(|h| (0..4).map(move |q| (h, q))).map(|(h, q)| {
                let low = part(64 * h + 32 * (q % 2), 64 * h + 32 * (q % 2) + 32);
                let low = bits(low, 4 * (q as i64 / 2), 4);
                let high = bits(part(128 + 32 * h, 160 + 32 * h), 2 * q as i64, 2);
                B::bitwise_or(low, B::bitwise_left_shift_scalar(high, 4i64.into()))
            });
            let q = B::float_sub_scalar(float(B::int_cat(quarters.collect(), 1)), 32f32.into());
            let scales = B::float_mul(signed(part(192, 208)), from_bits::<B>(half(208), 5, 10));
            B::float_mul(
                B::float_reshape(q, Shape::new([blocks, 16, 16])),
                B::float_reshape(scales, Shape::new([blocks, 16, 1])),
            )
        }
    };
    B::float_reshape(values, whole)
}

/// IEEE-like floats (finite) from their bits: sign, `exponent` bits, `mantissa` bits.
fn from_bits<B: Backend>(bits: IntTensor<B>, exponent: u32, mantissa: u32) -> FloatTensor<B> {
    let shape = bits.shape();
    let device = bits.device();
    let count = shape.num_elements();
    let field = |shift: u32, width: u32| {
        let shifted = B::bitwise_right_shift_scalar(bits.clone(), i64::from(shift).into());
        let field = B::bitwise_and_scalar(shifted, ((1i64 << width) - 1).into());
        B::int_reshape(field, Shape::new([count]))
    };
    let table = |values: Vec<f32>, index: IntTensor<B>| {
        let length = values.len();
        let table = B::float_from_data(TensorData::new(values, [length]), &device);
        B::float_select(table, 0, B::int_cast(index, IntDType::I32))
    };
    let e = field(mantissa, exponent);
    let bias = (1i32 << (exponent - 1)) - 1;
    let exponents = 0..1i32 << exponent;
    // Powers down to 2^-149 in two factors, each a normal number.
    let power = |e: i32| e.max(1) - bias;
    let first = table(exponents.clone().map(|e| 2f32.powi(power(e) / 2)).collect(), e.clone());
    let second = table(exponents.clone().map(|e| 2f32.powi(power(e) - power(e) / 2)).collect(), e.clone());
    let implicit = table(exponents.map(|e| f32::from(e > 0)).collect(), e);
    let fraction = B::float_mul_scalar(
        B::int_into_float(field(0, mantissa), FloatDType::F32),
        2f32.powi(-(mantissa as i32)).into(),
    );
    let sign = table(vec![1.0, -1.0], field(mantissa + exponent, 1));
    let magnitude = B::float_mul(B::float_mul(B::float_add(implicit, fraction), first), second);
    B::float_reshape(B::float_mul(magnitude, sign), shape)
}
