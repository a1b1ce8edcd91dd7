//! Dense matrices in the formats of model files, as the embedding and the output projection have them: rows looked up,
//! and products with few rows of activations, decoded on the way.
//!
//! A row is read in units of 8 weights, which in every format of blocks share a scale. Blocks begin at any even byte, so
//! words are put together of two.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::bits::{bfloat, half};
use crate::rows::words_of_row;

/// How weights are stored: little-endian floats, or llama.cpp's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of an IEEE single.
    Bf16,
    /// Blocks of 32: a half d, 32 int8; d * q.
    Q8_0,
    /// Blocks of 256: 128 bytes of lower four bits, 64 of upper two, 16 int8 scales, a half d; d * scale * (q - 32).
    Q6K,
    /// Blocks of 32: a half d, 16 bytes of which the lower four bits are the first 16 weights; d * (q - 8).
    Q4_0,
    /// Blocks of 32: halves d and m, 16 bytes as those of Q4_0; d * q + m.
    Q4_1,
    /// Blocks of 32: a half d, a word of fifth bits, 16 bytes as those of Q4_0; d * (q - 16).
    Q5_0,
    /// Blocks of 32: halves d and m, a word of fifth bits, 16 bytes as those of Q4_0; d * q + m.
    Q5_1,
    /// Blocks of 256: halves d and dmin, 12 bytes of 6-bit scales and mins, 128 bytes of four bits; d * scale * q -
    /// dmin * min.
    Q4K,
    /// The same with 32 bytes of fifth bits before the four bits.
    Q5K,
    /// Blocks of 32 as those of Q4_0; d * one of 16 numbers.
    Iq4Nl,
    /// Ternary, blocks of 64: a half d, 2 bits a weight in order; d * (q - 1).
    Q2_0,
    /// Ternary, blocks of 128: the same.
    Pq2_0,
    /// Ternary, blocks of 128: bytes of five base-3 digits, 16 and 8, two of four, a half d; d * (digit - 1).
    Ptq1_0,
    /// Ternary, blocks of 256: bytes of five base-3 digits, 32 and 16, four of four, a half d; d * (digit - 1).
    Tq1_0,
    /// Ternary, blocks of 256: two halves of 32 bytes with 2 bits of four weights, a half d; d * (q - 1).
    Tq2_0,
}

impl Format {
    /// Weights and bytes of a block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q6K => (256, 210),
            Self::Q4_0 | Self::Iq4Nl => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q2_0 => (64, 18),
            Self::Pq2_0 => (128, 34),
            Self::Ptq1_0 => (128, 28),
            Self::Tq1_0 => (256, 54),
            Self::Tq2_0 => (256, 66),
        }
    }

    /// Every one of them.
    pub const ALL: [Self; 17] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q6K,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Iq4Nl,
        Self::Q2_0,
        Self::Pq2_0,
        Self::Ptq1_0,
        Self::Tq1_0,
        Self::Tq2_0,
    ];

    /// Whether it holds floats, without blocks.
    pub(crate) const fn is_float(self) -> bool {
        self.block().0 == 1
    }

    /// Whether its blocks have a minimum beside the scale.
    pub(crate) const fn has_minimum(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K)
    }

    /// Whether it can be multiplied by int8 activations: weights are integers times a scale.
    pub const fn has_int8(self) -> bool {
        !self.is_float() && !self.has_minimum()
    }

    /// Whether it holds weights in base 3.
    const fn is_base3(self) -> bool {
        matches!(self, Self::Ptq1_0 | Self::Tq1_0)
    }
}

/// A matrix [n, k].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// How it is stored, in rows without gaps.
    pub format: Format,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
}

/// Threads that share a row of weights, and rows of weights a workgroup.
pub(crate) const LANES: u32 = 32;
pub(crate) const GROUPS: u32 = 8;
/// Threads of a workgroup that decodes.
pub(crate) const DECODERS: u32 = 256;
/// Workgroups in one dimension, at most.
const MAX_COUNT: usize = 65_535;
/// Rows of activations beyond which decoding the matrix once is better than reading it for every few.
pub const MAX_ROWS: usize = 32;

impl Matrix {
    /// Whether the kernels can be launched for it: rows of whole units, and offsets that words hold.
    pub fn supported(&self) -> bool {
        let bytes = self.row_bytes().checked_mul(self.n);
        let Some(values) = self.n.checked_mul(self.k) else { return false };
        let decoders = (values / 8).div_ceil(DECODERS as usize);
        self.k.is_multiple_of(8)
            && self.k.is_multiple_of(self.format.block().0)
            && bytes.is_some_and(|bytes| bytes < u32::MAX as usize)
            && self.n.div_ceil(GROUPS as usize) <= MAX_COUNT
            && decoders.div_ceil(MAX_COUNT) <= MAX_COUNT
            && values <= u32::MAX as usize
    }

    fn row_bytes(&self) -> usize {
        let (weights, bytes) = self.format.block();
        self.k / weights * bytes
    }

    fn words(&self) -> usize {
        (self.n * self.row_bytes()).div_ceil(4)
    }

    /// The parameters of the kernels for m rows of activations, or m rows looked up.
    pub fn params(&self, m: usize) -> [u32; 8] {
        let words = words_of_row(self.k) as u32;
        [m as u32, self.n as u32, self.k as u32, self.row_bytes() as u32, words, 0, 0, 0]
    }
}

/// Four bytes that begin anywhere.
#[cube]
fn word_at(words: &[u32], byte: u32) -> u32 {
    let index = byte / 4u32;
    let shift = byte % 4u32 * 8u32;
    let low = words[index as usize] >> shift;
    // The same word again where they begin with it: nothing behind the last word is read.
    let high = words[(index + shift.div_ceil(32u32)) as usize] << ((32u32 - shift) & 31u32);
    select(shift == 0u32, low, low | high)
}

#[cube]
fn byte_at(words: &[u32], byte: u32) -> u32 {
    (words[(byte / 4u32) as usize] >> (byte % 4u32 * 8u32)) & 0xffu32
}

/// Two bytes that begin at an even one.
#[cube]
fn half_at(words: &[u32], byte: u32) -> f32 {
    half((words[(byte / 4u32) as usize] >> (byte % 4u32 * 8u32)) & 0xffffu32)
}

/// Four bytes less a number up to 64, where none is above 127.
#[cube]
fn less(bytes: u32, number: u32) -> u32 {
    ((bytes | 0x8080_8080u32) - number * 0x0101_0101u32) ^ 0x8080_8080u32
}

#[cube]
fn signed(byte: u32) -> i32 {
    (i32::reinterpret(byte << 24u32)) >> 24i32
}

/// Eight weights of a row of blocks: int8, four a word, their scale, and what is added to the products with it.
#[derive(CubeType)]
struct Eight {
    low: u32,
    high: u32,
    scale: f32,
    minimum: f32,
}

/// Four bits, which are to be the lowest, as the fifth bits of four bytes.
#[cube]
fn fifths(bits: u32) -> u32 {
    (bits & 1u32) << 4u32 | (bits & 2u32) << 11u32 | (bits & 4u32) << 18u32 | (bits & 8u32) << 25u32
}

/// Four 2-bit codes of a byte as four bytes.
#[cube]
fn pairs(byte: u32) -> u32 {
    byte & 3u32 | (byte & 12u32) << 6u32 | (byte & 48u32) << 12u32 | (byte & 192u32) << 18u32
}

/// Digit `n` of a byte in base 3: what 3 times the fraction of byte / 256 * 3^n has above the point.
#[cube]
fn digit(byte: u32, n: u32) -> u32 {
    let nine = select(n >= 2u32, 9u32, 1u32);
    let eighty_one = select(n >= 4u32, 9u32, 1u32);
    let three = select(n % 2u32 == 1u32, 3u32, 1u32);
    (((byte * nine * eighty_one * three) & 0xffu32) * 3u32) >> 8u32
}

/// Base-3 weight `e` of a block of 128 or 256: TQ1_0's order, or with everything halved PTQ1_0's.
#[cube]
fn digit_of(words: &[u32], block: u32, e: u32, #[comptime] format: Format) -> u32 {
    let run = comptime!(if matches!(format, Format::Tq1_0) { 32u32 } else { 16u32 });
    let half = comptime!(run / 2u32);
    let last = comptime!(run / 8u32);
    // The weights up to 5 runs, those up to 5 halves behind them, and the others.
    let second = comptime!(5u32 * run);
    let third = comptime!(second + 5u32 * half);
    let in_second = e - second.min(e);
    let in_third = e - third.min(e);
    let at = select(e < second, e % run, run + in_second % half);
    let at = select(e < third, at, run + half + in_third % last);
    let n = select(e < second, e / run, in_second / half);
    let n = select(e < third, n, in_third / last);
    digit(byte_at(words, block + at), n)
}

/// What a code of IQ4_NL stands for, as a byte.
#[cube]
fn number(code: u32) -> u32 {
    // -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113
    let low = select(code & 4u32 == 0u32, 0xbfad_9881u32, 0xf6ea_ddcfu32);
    let high = select(code & 4u32 == 0u32, 0x2619_0d01u32, 0x7159_4535u32);
    (select(code & 8u32 == 0u32, low, high) >> ((code & 3u32) * 8u32)) & 0xffu32
}

/// [`number`] of four codes, one a byte.
#[cube]
fn numbers(codes: u32) -> u32 {
    number(codes & 15u32)
        | number(codes >> 8u32 & 15u32) << 8u32
        | number(codes >> 16u32 & 15u32) << 16u32
        | number(codes >> 24u32 & 15u32) << 24u32
}

#[cube]
fn eight(words: &[u32], row: u32, unit: u32, #[comptime] format: Format) -> Eight {
    let bytes = comptime!(format.block().1 as u32);
    let units = comptime!(format.block().0 as u32 / 8u32);
    let block = row + unit / units * bytes;
    let unit = unit % units;
    if comptime!(format == Format::Q8_0) {
        let at = block + 2u32 + unit * 8u32;
        let low = word_at(words, at);
        let high = word_at(words, at + 4u32);
        Eight { low, high, scale: half_at(words, block), minimum: 0.0f32 }
    } else if comptime!(units == 4u32) {
        // Blocks of 32 with four bits: the halves of bytes, and perhaps a minimum and fifth bits before them.
        let fifth = comptime!(matches!(format, Format::Q5_0 | Format::Q5_1));
        let bits_at = comptime!(if format.has_minimum() { 4u32 } else { 2u32 });
        let codes_at = comptime!(if fifth { bits_at + 4u32 } else { bits_at });
        let at = block + codes_at + unit % 2u32 * 8u32;
        let shift = unit / 2u32 * 4u32;
        let mut low = (word_at(words, at) >> shift) & 0x0f0f_0f0fu32;
        let mut high = (word_at(words, at + 4u32) >> shift) & 0x0f0f_0f0fu32;
        if comptime!(fifth) {
            let bits = byte_at(words, block + bits_at + unit);
            low |= fifths(bits);
            high |= fifths(bits >> 4u32);
        }
        if comptime!(format == Format::Q4_0) {
            low = less(low, 8u32);
            high = less(high, 8u32);
        } else if comptime!(format == Format::Q5_0) {
            low = less(low, 16u32);
            high = less(high, 16u32);
        } else if comptime!(format == Format::Iq4Nl) {
            low = numbers(low);
            high = numbers(high);
        }
        let mut minimum = 0.0f32;
        if comptime!(format.has_minimum()) {
            minimum = half_at(words, block + 2u32);
        }
        Eight { low, high, scale: half_at(words, block), minimum }
    } else if comptime!(format.has_minimum()) {
        // Q4_K and Q5_K: parts of 32, two of them in 32 bytes.
        let part = unit / 4u32;
        let i = unit % 4u32 * 8u32;
        let fifth = comptime!(format == Format::Q5K);
        let codes_at = comptime!(if fifth { 48u32 } else { 16u32 });
        let at = block + codes_at + part / 2u32 * 32u32 + i;
        let shift = part % 2u32 * 4u32;
        let mut low = (word_at(words, at) >> shift) & 0x0f0f_0f0fu32;
        let mut high = (word_at(words, at + 4u32) >> shift) & 0x0f0f_0f0fu32;
        if comptime!(fifth) {
            low |= ((word_at(words, block + 16u32 + i) >> part) & 0x0101_0101u32) << 4u32;
            high |= ((word_at(words, block + 20u32 + i) >> part) & 0x0101_0101u32) << 4u32;
        }
        // 6 bits of the scale and of the minimum: in bytes of their own, or in nibbles and above those bytes' 6 bits.
        let j = part % 4u32;
        let a = byte_at(words, block + 4u32 + j);
        let b = byte_at(words, block + 8u32 + j);
        let c = byte_at(words, block + 12u32 + j);
        let scale = select(part < 4u32, a & 63u32, c & 15u32 | a >> 6u32 << 4u32);
        let least = select(part < 4u32, b & 63u32, c >> 4u32 | b >> 6u32 << 4u32);
        let scale = half_at(words, block) * f32::cast_from(scale);
        let minimum = -(half_at(words, block + 2u32) * f32::cast_from(least));
        Eight { low, high, scale, minimum }
    } else if comptime!(matches!(format, Format::Q2_0 | Format::Pq2_0)) {
        let at = block + 2u32 + unit * 2u32;
        let low = less(pairs(byte_at(words, at)), 1u32);
        let high = less(pairs(byte_at(words, at + 1u32)), 1u32);
        Eight { low, high, scale: half_at(words, block), minimum: 0.0f32 }
    } else if comptime!(format == Format::Tq2_0) {
        // Two halves of four quarters of 32.
        let at = block + unit / 16u32 * 32u32 + unit % 4u32 * 8u32;
        let shift = unit % 16u32 / 4u32 * 2u32;
        let low = less((word_at(words, at) >> shift) & 0x0303_0303u32, 1u32);
        let high = less((word_at(words, at + 4u32) >> shift) & 0x0303_0303u32, 1u32);
        Eight { low, high, scale: half_at(words, block + 64u32), minimum: 0.0f32 }
    } else if comptime!(format.is_base3()) {
        let mut low = 0u32;
        let mut high = 0u32;
        #[unroll]
        for i in 0..4u32 {
            low |= digit_of(words, block, unit * 8u32 + i, format) << (i * 8u32);
            high |= digit_of(words, block, unit * 8u32 + 4u32 + i, format) << (i * 8u32);
        }
        let scale = half_at(words, block + comptime!(bytes - 2u32));
        Eight { low: less(low, 1u32), high: less(high, 1u32), scale, minimum: 0.0f32 }
    } else {
        // Q6_K: two halves of four quarters of 32.
        let part = unit / 16u32;
        let quarter = unit % 16u32 / 4u32;
        let i = unit % 4u32 * 8u32;
        let at_low = block + 64u32 * part + 32u32 * (quarter % 2u32) + i;
        let at_high = block + 128u32 + 32u32 * part + i;
        let shift_low = quarter / 2u32 * 4u32;
        let shift_high = quarter * 2u32;
        let low = (word_at(words, at_low) >> shift_low) & 0x0f0f_0f0fu32
            | ((word_at(words, at_high) >> shift_high) & 0x0303_0303u32) << 4u32;
        let high = (word_at(words, at_low + 4u32) >> shift_low) & 0x0f0f_0f0fu32
            | ((word_at(words, at_high + 4u32) >> shift_high) & 0x0303_0303u32) << 4u32;
        let scale = signed(byte_at(words, block + 192u32 + 8u32 * part + 2u32 * quarter + i / 16u32));
        let scale = f32::cast_from(scale) * half_at(words, block + 208u32);
        Eight { low: less(low, 32u32), high: less(high, 32u32), scale, minimum: 0.0f32 }
    }
}

/// Eight weights, decoded. `row` is the byte that its row begins with.
#[cube]
fn decoded(words: &[u32], row: u32, unit: u32, #[comptime] format: Format) -> Array<f32> {
    let mut values = Array::<f32>::new(8usize);
    if comptime!(format == Format::F32) {
        #[unroll]
        for i in 0..8u32 {
            values[i as usize] = f32::reinterpret(words[(row / 4u32 + unit * 8u32 + i) as usize]);
        }
    } else if comptime!(format.is_float()) {
        #[unroll]
        for i in 0..4u32 {
            let pair = word_at(words, row + unit * 16u32 + i * 4u32);
            if comptime!(format == Format::F16) {
                values[(i * 2) as usize] = half(pair & 0xffffu32);
                values[(i * 2 + 1) as usize] = half(pair >> 16u32);
            } else {
                values[(i * 2) as usize] = bfloat(pair & 0xffffu32);
                values[(i * 2 + 1) as usize] = bfloat(pair >> 16u32);
            }
        }
    } else {
        let eight = eight(words, row, unit, format);
        #[unroll]
        for i in 0..4u32 {
            let low = signed((eight.low >> (i * 8)) & 0xffu32);
            let high = signed((eight.high >> (i * 8)) & 0xffu32);
            if comptime!(format.has_minimum()) {
                // The products are exact, so that one rounding is left, fused or not.
                values[i as usize] = f32::cast_from(low) * eight.scale + eight.minimum;
                values[(i + 4) as usize] = f32::cast_from(high) * eight.scale + eight.minimum;
            } else {
                values[i as usize] = f32::cast_from(low) * eight.scale;
                values[(i + 4) as usize] = f32::cast_from(high) * eight.scale;
            }
        }
    }
    values
}

/// The sum of what the 32 threads of a group bring, in a fixed order.
#[cube]
fn sum_of_group(value: f32) -> f32 {
    let lane = UNIT_POS_X;
    let own = UNIT_POS_Y * LANES + lane;
    let mut shared = Shared::<[f32]>::new_slice(comptime!((LANES * GROUPS) as usize));
    shared[own as usize] = value;
    sync_cube();
    #[unroll]
    for step in 0..5u32 {
        let half = comptime!(16u32 >> step);
        if lane < half {
            shared[own as usize] += shared[(own + half) as usize];
        }
        sync_cube();
    }
    shared[(UNIT_POS_Y * LANES) as usize]
}

/// y = x * Wᵀ for `tile` rows of activations a workgroup: f32 as their bits, or with `int8` four a word, of which eight
/// products are summed exactly and multiplied by their weights' scale; `rows` then has the activations' scales.
#[cube(launch_unchecked)]
pub(crate) fn dense_gemv(
    words: &[u32],
    x: &[u32],
    rows: &[u32],
    y: &mut [f32],
    params: &[u32],
    #[comptime] format: Format,
    #[comptime] int8: bool,
    #[comptime] tile: u32,
) {
    let m = params[0];
    let n = params[1];
    let k = params[2];
    let feature = CUBE_POS_X * GROUPS + UNIT_POS_Y;
    let row = feature.min(n - 1) * params[3];
    let first = CUBE_POS_Y * tile;
    let mut sums = Array::<f32>::new(tile as usize);
    #[unroll]
    for r in 0..tile {
        sums[r as usize] = 0.0f32;
    }
    let mut unit = UNIT_POS_X;
    while unit < k / 8 {
        if comptime!(int8) {
            let eight = eight(words, row, unit, format);
            #[unroll]
            for r in 0..tile {
                let from = (first + r).min(m - 1) * params[4] + unit * 2;
                let x0 = i32::reinterpret(x[from as usize]);
                let x1 = i32::reinterpret(x[(from + 1) as usize]);
                let sum = dp4a(x0, i32::reinterpret(eight.low), 0i32);
                let sum = dp4a(x1, i32::reinterpret(eight.high), sum);
                sums[r as usize] += f32::cast_from(sum) * eight.scale;
            }
        } else {
            let values = decoded(words, row, unit, format);
            #[unroll]
            for r in 0..tile {
                let from = (first + r).min(m - 1) * k + unit * 8;
                #[unroll]
                for i in 0..8u32 {
                    sums[r as usize] += f32::reinterpret(x[(from + i) as usize]) * values[i as usize];
                }
            }
        }
        unit += LANES;
    }
    #[unroll]
    for r in 0..tile {
        let mut sum = sum_of_group(sums[r as usize]);
        if UNIT_POS_X == 0 && feature < n && first + r < m {
            if comptime!(int8) {
                sum *= f32::reinterpret(rows[((first + r) * 2) as usize]);
            }
            y[((first + r) * n + feature) as usize] = sum;
        }
    }
}

/// Rows `ids`, or all, as f32: eight weights a thread.
#[cube(launch_unchecked)]
pub(crate) fn decode_rows(
    words: &[u32],
    ids: &[u32],
    y: &mut [f32],
    params: &[u32],
    #[comptime] format: Format,
    #[comptime] looked_up: bool,
) {
    let units = params[2] / 8;
    let at = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * DECODERS + UNIT_POS_X;
    let to = at / units;
    if to < params[0] {
        let from = if comptime!(looked_up) { ids[to as usize] } else { to };
        let values = decoded(words, from * params[3], at % units, format);
        #[unroll]
        for i in 0..8u32 {
            y[(at * 8 + i) as usize] = values[i as usize];
        }
    }
}

/// Rows of activations that a workgroup multiplies at once.
fn tile(m: usize) -> u32 {
    match m {
        1 => 1,
        2 => 2,
        _ => 4,
    }
}

/// Rows of activations, without gaps between them.
#[derive(Clone, Debug)]
pub enum Activations {
    /// f32 [m, k].
    F32(Handle),
    /// [Quantised](crate::rows::quantise): words, and scales and sums.
    Int8(Handle, Handle),
}

/// y = x * Wᵀ [m, n].
///
/// # Safety
/// `words` holds the matrix, which is [supported](Matrix::supported), `x` m rows of k, and `params` the
/// [parameters](Matrix::params) for m.
///
/// # Panics
/// If the format can't be multiplied by int8.
pub unsafe fn linear(
    client: &Client,
    matrix: &Matrix,
    words: Handle,
    x: Activations,
    params: Handle,
    m: usize,
) -> Handle {
    let y = client.empty(m * matrix.n * 4);
    // Without int8 the rows are not read.
    let (x, rows, int8) = match x {
        Activations::F32(x) => (x.clone(), x, false),
        Activations::Int8(words, rows) => (words, rows, true),
    };
    assert!(!int8 || matrix.format.has_int8(), "{:?} times int8", matrix.format);
    let x_words = if int8 { words_of_row(matrix.k) } else { matrix.k };
    let tile = tile(m);
    // SAFETY: the handles hold as many elements as is said, and the kernel stays within them: features below n, rows
    // below m, units below k / 8, which a row of int8 has words for, being filled up.
    unsafe {
        dense_gemv::launch_unchecked(
            client,
            CubeCount::Static((matrix.n as u32).div_ceil(GROUPS), (m as u32).div_ceil(tile), 1),
            CubeDim::new_2d(LANES, GROUPS),
            BufferArg::from_raw_parts(words, matrix.words()),
            BufferArg::from_raw_parts(x, m * x_words),
            BufferArg::from_raw_parts(rows, m * 2),
            BufferArg::from_raw_parts(y.clone(), m * matrix.n),
            BufferArg::from_raw_parts(params, 8),
            matrix.format,
            int8,
            tile,
        );
    }
    y
}

/// Rows `ids` (m of them) of the matrix, or its m = n rows, as f32 [m, k].
///
/// # Safety
/// `words` holds the matrix, which is [supported](Matrix::supported), `ids` m words that are below n, and `params` the
/// [parameters](Matrix::params) for m.
pub unsafe fn decode(
    client: &Client,
    matrix: &Matrix,
    words: Handle,
    ids: Option<Handle>,
    params: Handle,
    m: usize,
) -> Handle {
    let y = client.empty(m * matrix.k * 4);
    let groups = (m * matrix.k / 8).div_ceil(DECODERS as usize);
    let x = groups.clamp(1, MAX_COUNT);
    let looked_up = ids.is_some();
    // SAFETY: the handles hold as many elements as is said; threads behind the last row do nothing.
    unsafe {
        decode_rows::launch_unchecked(
            client,
            CubeCount::Static(x as u32, groups.div_ceil(x) as u32, 1),
            CubeDim::new_1d(DECODERS),
            BufferArg::from_raw_parts(words.clone(), matrix.words()),
            BufferArg::from_raw_parts(ids.unwrap_or(words), m),
            BufferArg::from_raw_parts(y.clone(), m * matrix.k),
            BufferArg::from_raw_parts(params, 8),
            matrix.format,
            looked_up,
        );
    }
    y
}
