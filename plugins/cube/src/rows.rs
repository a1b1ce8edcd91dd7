//! What is done to rows of activations around matrix multiplications: RMSNorm, the gated activation, and quantisation
//! into the form that kernels for GPUs read.

use bitnet_burn_plugin::abi::GPU_ACTIVATION_BLOCK;
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// Threads that share a row.
pub(crate) const THREADS: u32 = 256;

/// The sum of what all threads of the workgroup bring, in a fixed order.
#[cube]
fn sum_of_all<N: Numeric>(value: N) -> N {
    let unit = UNIT_POS_X;
    let mut shared = Shared::<[N]>::new_slice(THREADS as usize);
    shared[unit as usize] = value;
    sync_cube();
    let mut half = CUBE_DIM_X / 2;
    while half > 0 {
        if unit < half {
            let other = shared[(unit + half) as usize];
            shared[unit as usize] += other;
        }
        sync_cube();
        half /= 2;
    }
    shared[0]
}

/// 1 for a value that is not finite. It is seen in the bits, since shading languages may assume that there is no such thing.
#[cube]
pub(crate) fn odd(value: f32) -> u32 {
    u32::cast_from((u32::reinterpret(value) & 0x7f80_0000u32) == 0x7f80_0000u32)
}

/// What values are quantised to int8 with: a = max(max |x|, 1e-5), and whether all of them are finite.
#[derive(CubeType)]
pub(crate) struct Absmax {
    a: f32,
    to_int8: f32,
    finite: bool,
}

#[cube]
impl Absmax {
    /// Of the largest magnitudes that all `threads` of the workgroup bring, and of what was [`odd`] there.
    pub fn of_all(largest: f32, odd: u32, #[comptime] threads: u32) -> Absmax {
        let unit = UNIT_POS_X;
        let mut magnitudes = Shared::<[f32]>::new_slice(threads as usize);
        let mut odds = Shared::<[u32]>::new_slice(threads as usize);
        magnitudes[unit as usize] = largest;
        odds[unit as usize] = odd;
        sync_cube();
        let mut half = CUBE_DIM_X / 2;
        while half > 0 {
            if unit < half {
                magnitudes[unit as usize] = magnitudes[unit as usize].max(magnitudes[(unit + half) as usize]);
                odds[unit as usize] |= odds[(unit + half) as usize];
            }
            sync_cube();
            half /= 2;
        }
        let a = magnitudes[0].max(1e-5f32);
        Absmax { a, to_int8: 127.0f32 / a, finite: odds[0] == 0 }
    }

    /// q = clamp(round_half_even(x * (127 / a)), -128, 127); 0 where not all values are finite.
    pub fn code(&self, value: f32) -> i32 {
        let scaled = (value * self.to_int8).round();
        select(self.finite, i32::cast_from(scaled.clamp(-128.0f32, 127.0f32)), 0i32)
    }

    /// The bits of a / 127, or of NaN.
    pub fn scale(&self) -> u32 {
        select(self.finite, u32::reinterpret(self.a / 127.0f32), 0x7fc0_0000u32)
    }
}

/// A code in byte i of a word.
#[cube]
pub(crate) fn byte(code: i32, i: u32) -> u32 {
    (u32::reinterpret(code) & 0xffu32) << (8 * i)
}

/// sqrt(mean(x^2) + eps) of the row that begins at `from`.
#[cube]
fn root_mean_square(x: &[f32], from: u32, k: u32, eps: f32) -> f32 {
    let mut squares = 0.0f32;
    let mut i = UNIT_POS_X;
    while i < k {
        let value = x[(from + i) as usize];
        squares += value * value;
        i += THREADS;
    }
    (sum_of_all::<f32>(squares) / f32::cast_from(k) + eps).sqrt()
}

/// One workgroup a row: x / sqrt(mean(x^2) + eps) * weight. Parameters: k, the bits of eps.
#[cube(launch_unchecked)]
pub(crate) fn rms_norm_rows(x: &[f32], weight: &[f32], y: &mut [f32], params: &[u32]) {
    let k = params[0];
    let from = CUBE_POS_X * k;
    let root = root_mean_square(x, from, k, f32::reinterpret(params[1]));
    let mut i = UNIT_POS_X;
    while i < k {
        y[(from + i) as usize] = x[(from + i) as usize] / root * weight[i as usize];
        i += THREADS;
    }
}

/// One workgroup a row: its norm where `normed`, its largest magnitude, then its values. The same arithmetic as the
/// default body's, in the same order: a = max(max |x|, 1e-5), q = clamp(round_half_even(x * (127 / a)), -128, 127). A
/// row with a value that is not finite gets q = 0 and scale NaN. Parameters: k, words from row to row, the bits of eps.
#[cube(launch_unchecked)]
pub(crate) fn quantise_rows(
    x: &[f32],
    weight: &[f32],
    words: &mut [u32],
    rows: &mut [u32],
    params: &[u32],
    #[comptime] normed: bool,
) {
    let k = params[0];
    let stride = params[1];
    let row = CUBE_POS_X;
    let unit = UNIT_POS_X;
    let root = if comptime!(normed) {
        root_mean_square(x, row * k, k, f32::reinterpret(params[2]))
    } else {
        f32::new(1.0)
    };
    let mut largest = 0.0f32;
    let mut not_finite = 0u32;
    let mut i = unit;
    while i < k {
        let value = normalised(x, weight, row * k, i, root, normed);
        not_finite |= odd(value);
        largest = largest.max(value.abs());
        i += THREADS;
    }
    let absmax = Absmax::of_all(largest, not_finite, THREADS);

    let mut sum = 0i32;
    let mut word = unit;
    while word < stride {
        let mut packed = 0u32;
        for j in 0..4u32 {
            let column = word * 4 + j;
            if column < k {
                let q = absmax.code(normalised(x, weight, row * k, column, root, normed));
                sum += q;
                packed |= byte(q, j);
            }
        }
        words[(row * stride + word) as usize] = packed;
        word += THREADS;
    }
    let sum = sum_of_all::<i32>(sum);
    if unit == 0 {
        rows[(row * 2) as usize] = absmax.scale();
        rows[(row * 2 + 1) as usize] = u32::reinterpret(sum);
    }
}

/// A value of the row that begins at `from`, normalised where `normed`.
#[cube]
fn normalised(x: &[f32], weight: &[f32], from: u32, i: u32, root: f32, #[comptime] normed: bool) -> f32 {
    let value = x[(from + i) as usize];
    if comptime!(normed) { value / root * weight[i as usize] } else { value }
}

/// The gated activation of a feed-forward network, or of an attention's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// relu(gate)^2 * up
    Relu2,
    /// silu(gate) * up
    Silu,
    /// sigmoid(gate) * up
    Sigmoid,
}

/// One value a thread. Parameters: rows, values of an output row.
#[cube(launch_unchecked)]
pub(crate) fn gated_rows(gate_up: &[f32], y: &mut [f32], params: &[u32], #[comptime] gate: Gate) {
    let f = params[1];
    let at = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * THREADS + UNIT_POS_X;
    if at < params[0] * f {
        let from = at / f * (2 * f) + at % f;
        let g = gate_up[from as usize];
        let activated = if comptime!(gate == Gate::Relu2) {
            // What is no number stays none.
            let relu = select(g < 0.0f32, 0.0f32, g);
            relu * relu
        } else if comptime!(gate == Gate::Silu) {
            g / ((0.0f32 - g).exp() + 1.0f32)
        } else {
            1.0f32 / ((0.0f32 - g).exp() + 1.0f32)
        };
        y[at as usize] = activated * gate_up[(from + f) as usize];
    }
}

/// The parameters of [`gated`].
pub fn gated_params(m: usize, f: usize) -> [u32; 8] {
    [m as u32, f as u32, 0, 0, 0, 0, 0, 0]
}

/// activation(gate) * up [m, f] of rows [m, 2 * f] of f32 that hold gate and up side by side, without gaps.
///
/// # Safety
/// `gate_up` holds 2 * m * f values, fewer than 2^32, and `params` the [parameters](gated_params) for m and f.
pub unsafe fn gated(
    client: &Client,
    gate_up: Handle,
    params: Handle,
    gate: Gate,
    (m, f): (usize, usize),
) -> Handle {
    let y = client.empty(m * f * 4);
    let groups = (m * f).div_ceil(THREADS as usize);
    let x = groups.clamp(1, 65_535);
    // SAFETY: the handles hold as many elements as is said; threads behind the last value do nothing.
    unsafe {
        gated_rows::launch_unchecked(
            client,
            CubeCount::Static(x as u32, groups.div_ceil(x) as u32, 1),
            CubeDim::new_1d(THREADS),
            BufferArg::from_raw_parts(gate_up, 2 * m * f),
            BufferArg::from_raw_parts(y.clone(), m * f),
            BufferArg::from_raw_parts(params, 8),
            gate,
        );
    }
    y
}

/// Words of int8 from row to row of quantised activations.
pub fn words_of_row(k: usize) -> usize {
    k.div_ceil(GPU_ACTIVATION_BLOCK) * GPU_ACTIVATION_BLOCK / 4
}

/// The parameters of [`quantise`] for rows of k values, with the epsilon of their norm.
pub fn quantise_params(k: usize, eps: f32) -> [u32; 8] {
    [k as u32, words_of_row(k) as u32, eps.to_bits(), 0, 0, 0, 0, 0]
}

/// Quantises rows x [M, K] of f32 without gaps between them, after RMSNorm with a weight `[K]`, where there is one. The
/// words, and the scales and sums, of [`bitnet_burn_plugin::abi::Gpu`].
///
/// # Safety
/// `x` holds m * k values, `norm` k, and `params` the [parameters](quantise_params) for k.
pub unsafe fn quantise(
    client: &Client,
    x: Handle,
    norm: Option<Handle>,
    params: Handle,
    m: usize,
    k: usize,
) -> (Handle, Handle) {
    let stride = words_of_row(k);
    let words = client.empty(m * stride * 4);
    let rows = client.empty(m * 8);
    let normed = norm.is_some();
    // SAFETY: the handles hold as many elements as is said, and the kernel stays within them: row < m, column < k,
    // word < stride. Without a norm the weight is not read.
    unsafe {
        quantise_rows::launch_unchecked(
            client,
            CubeCount::Static(m as u32, 1, 1),
            CubeDim::new_1d(THREADS),
            BufferArg::from_raw_parts(x.clone(), m * k),
            BufferArg::from_raw_parts(norm.unwrap_or(x), k),
            BufferArg::from_raw_parts(words.clone(), m * stride),
            BufferArg::from_raw_parts(rows.clone(), m * 2),
            BufferArg::from_raw_parts(params, 8),
            normed,
        );
    }
    (words, rows)
}

/// The parameters of [`rms_norm`].
pub fn norm_params(k: usize, eps: f32) -> [u32; 8] {
    [k as u32, eps.to_bits(), 0, 0, 0, 0, 0, 0]
}

/// x / sqrt(mean(x^2) + eps) * weight of rows x [M, K] of f32 without gaps between them.
///
/// # Safety
/// `x` holds m * k values, `weight` k, and `params` the [parameters](norm_params) for k.
pub unsafe fn rms_norm(
    client: &Client,
    x: Handle,
    weight: Handle,
    params: Handle,
    (m, k): (usize, usize),
) -> Handle {
    let y = client.empty(m * k * 4);
    // SAFETY: the handles hold as many elements as is said, and the kernel stays within them: row < m, column < k.
    unsafe {
        rms_norm_rows::launch_unchecked(
            client,
            CubeCount::Static(m as u32, 1, 1),
            CubeDim::new_1d(THREADS),
            BufferArg::from_raw_parts(x, m * k),
            BufferArg::from_raw_parts(weight, k),
            BufferArg::from_raw_parts(y.clone(), m * k),
            BufferArg::from_raw_parts(params, 8),
        );
    }
    y
}
