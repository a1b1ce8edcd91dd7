//! Dense layers in the format of their file, and embeddings.

use bitnet_burn_formats::DenseFormat;
use bitnet_burn_formats::dense::IQ4_NL_NUMBERS;
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

pub(crate) fn dense_linear_backward<B: Backend>(
    dy: FloatTensor<B>,
    words: IntTensor<B>,
    args: &DenseArgs,
) -> FloatTensor<B> {
    let words = if args.tiled { rows_of_tiles::<B>(words, args) } else { words };
    B::float_matmul(dy, decode::<B>(words, args))
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
    let device = words.device();
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
    let float_half = |at: usize| from_bits::<B>(half(at), 5, 10);
    // The low nibbles of 16 bytes, then the high ones; and with a fifth bit each from four bytes before them.
    let nibbles =
        |at: usize| B::int_cat(vec![bits(part(at, at + 16), 0, 4), bits(part(at, at + 16), 4, 4)], 1);
    let fives = |at: usize| {
        let high = B::int_reshape(part(at, at + 4), Shape::new([blocks, 4, 1]));
        let high = B::int_cat((0..8).map(|i| bits(high.clone(), i, 1)).collect(), 2);
        let high = B::int_reshape(high, Shape::new([blocks, 32]));
        B::bitwise_or(nibbles(at + 4), B::bitwise_left_shift_scalar(high, 4i64.into()))
    };
    let values = match format {
        DenseFormat::F32 => unreachable!("returned above"),
        DenseFormat::F16 => from_bits::<B>(half(0), 5, 10),
        DenseFormat::BF16 => from_bits::<B>(half(0), 8, 7),
        DenseFormat::Q8_0 => B::float_mul(signed(part(2, 34)), from_bits::<B>(half(0), 5, 10)),
        DenseFormat::Q4_0 => B::float_mul(B::float_sub_scalar(float(nibbles(2)), 8f32.into()), float_half(0)),
        DenseFormat::IQ4_NL => {
            let codes = B::int_reshape(nibbles(2), Shape::new([blocks * 32]));
            let numbers = IQ4_NL_NUMBERS.map(f32::from).to_vec();
            let table = B::float_from_data(TensorData::new(numbers, [16]), &device);
            let numbers = B::float_select(table, 0, B::int_cast(codes, IntDType::I32));
            B::float_mul(B::float_reshape(numbers, Shape::new([blocks, 32])), float_half(0))
        }
        DenseFormat::Q4_1 => B::float_add(B::float_mul(float(nibbles(4)), float_half(0)), float_half(2)),
        DenseFormat::Q5_0 => B::float_mul(B::float_sub_scalar(float(fives(2)), 16f32.into()), float_half(0)),
        DenseFormat::Q5_1 => B::float_add(B::float_mul(float(fives(4)), float_half(0)), float_half(2)),
        DenseFormat::Q4_K | DenseFormat::Q5_K => {
            // d, dmin [0, 4), scales and mins [4, 16), Q5_K's high bits, the low bits; eight parts of 32 weights.
            let low = if format == DenseFormat::Q5_K { 48 } else { 16 };
            let codes = (0..8).map(|p| {
                let from = low + 32 * (p / 2);
                let codes = bits(part(from, from + 32), 4 * (p as i64 % 2), 4);
                if format == DenseFormat::Q4_K {
                    return codes;
                }
                let fifth = bits(part(16, 48), p as i64, 1);
                B::bitwise_or(codes, B::bitwise_left_shift_scalar(fifth, 4i64.into()))
            });
            let q = B::int_reshape(B::int_cat(codes.collect(), 1), Shape::new([blocks, 8, 32]));
            // The first four of each are the low six bits of four bytes, the others nibbles and the bits above those.
            let sixes = |at: usize, nibble: i64| {
                let above = B::bitwise_left_shift_scalar(bits(part(at, at + 4), 6, 2), 4i64.into());
                let others = B::bitwise_or(bits(part(12, 16), nibble, 4), above);
                float(B::int_cat(vec![bits(part(at, at + 4), 0, 6), others], 1))
            };
            let each = |scales: FloatTensor<B>| B::float_reshape(scales, Shape::new([blocks, 8, 1]));
            let scale = each(B::float_mul(sixes(4, 0), float_half(0)));
            let least = each(B::float_mul(sixes(8, 4), float_half(2)));
            B::float_sub(B::float_mul(float(q), scale), least)
        }
        DenseFormat::Q2_0 | DenseFormat::PQ2_0 => {
            let codes = part(2, block);
            let codes = B::int_reshape(codes, Shape::new([blocks, block - 2, 1]));
            let codes = B::int_cat((0..4).map(|i| bits(codes.clone(), 2 * i, 2)).collect(), 2);
            let codes = B::int_reshape(codes, Shape::new([blocks, format.block_len()]));
            B::float_mul(B::float_sub_scalar(float(codes), 1f32.into()), float_half(0))
        }
        DenseFormat::TQ2_0 => {
            let quarters = (0..2).flat_map(|h| (0..4).map(move |q| (h, q)));
            let codes = quarters.map(|(h, q)| bits(part(32 * h, 32 * h + 32), 2 * q, 2)).collect();
            B::float_mul(B::float_sub_scalar(float(B::int_cat(codes, 1)), 1f32.into()), float_half(64))
        }
        DenseFormat::TQ1_0 | DenseFormat::PTQ1_0 => {
            // Digit i of a byte is the integer part of 3 * frac(byte / 256 * 3^i).
            let digits = |from: usize, to: usize, count: u32| {
                (0..count).map(move |i| {
                    let fraction = bits(B::int_mul_scalar(part(from, to), 3i64.pow(i).into()), 0, 8);
                    bits(B::int_mul_scalar(fraction, 3i64.into()), 8, 2)
                })
            };
            // The bytes of five digits in two runs, and those of four.
            let runs = if format == DenseFormat::TQ1_0 { [0, 32, 48, 52] } else { [0, 16, 24, 26] };
            let [a, b, c, d] = runs;
            let codes = digits(a, b, 5).chain(digits(b, c, 5)).chain(digits(c, d, 4)).collect();
            B::float_mul(B::float_sub_scalar(float(B::int_cat(codes, 1)), 1f32.into()), float_half(d))
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
