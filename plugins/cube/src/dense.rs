//! Dense matrices in the formats of model files, as the embedding and the output projection have them: rows looked up,
//! and products with few rows of activations, decoded on the way.
//!
//! A row is read in units of 8 weights, which in every format of blocks share a scale. Blocks of 34, 18 and 210 bytes
//! begin anywhere, so words are put together of two.

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
}

impl Format {
    /// Weights and bytes of a block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q6K => (256, 210),
            Self::Q4_0 => (32, 18),
        }
    }

    /// Whether it holds floats, without blocks.
    pub(crate) const fn is_float(self) -> bool {
        self.block().0 == 1
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

/// Eight weights of a row of blocks: int8, four a word, and their scale.
#[derive(CubeType)]
struct Eight {
    low: u32,
    high: u32,
    scale: f32,
}

#[cube]
fn eight(words: &[u32], row: u32, unit: u32, #[comptime] format: Format) -> Eight {
    if comptime!(format == Format::Q8_0) {
        let block = row + unit / 4u32 * 34u32;
        let at = block + 2u32 + unit % 4u32 * 8u32;
        Eight { low: word_at(words, at), high: word_at(words, at + 4u32), scale: half_at(words, block) }
    } else if comptime!(format == Format::Q4_0) {
        let block = row + unit / 4u32 * 18u32;
        let at = block + 2u32 + unit % 2u32 * 8u32;
        let shift = unit % 4u32 / 2u32 * 4u32;
        let low = (word_at(words, at) >> shift) & 0x0f0f_0f0fu32;
        let high = (word_at(words, at + 4u32) >> shift) & 0x0f0f_0f0fu32;
        Eight { low: less(low, 8u32), high: less(high, 8u32), scale: half_at(words, block) }
    } else {
        // Two halves of four quarters of 32.
        let block = row + unit / 32u32 * 210u32;
        let part = unit % 32u32 / 16u32;
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
        Eight { low: less(low, 32u32), high: less(high, 32u32), scale }
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
            values[i as usize] = f32::cast_from(low) * eight.scale;
            values[(i + 4) as usize] = f32::cast_from(high) * eight.scale;
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
/// If floats are to be multiplied by int8.
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
    assert!(!(int8 && matrix.format.is_float()), "floats times int8");
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

/// Rows `ids` [m] of the matrix, or its m = n rows, as f32 [m, k].
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
