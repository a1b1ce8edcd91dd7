//! Quantisation of activations on a GPU, into the form that kernels from plugins read.

use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::server::Handle;

use bitnet_burn_core::gpu;

/// Threads that share a row.
const THREADS: u32 = 64;

/// Activations on the device: see [`bitnet_burn_plugin::abi::Gpu`], buffers 2 and 3.
#[derive(Clone, Debug)]
pub(super) struct Quantised {
    pub words: Handle,
    pub rows: Handle,
    pub m: usize,
    pub k: usize,
}

/// One workgroup a row: its largest magnitude, then its values. The same arithmetic as the default body's, in the same
/// order: a = max(max |x|, 1e-5), q = clamp(round_half_even(x * (127 / a)), -128, 127). A row with a value that is not
/// finite gets q = 0 and scale NaN; what is not finite is seen in the bits, since shading languages may assume that
/// there is no such thing.
#[cube(launch_unchecked)]
fn quantise_rows(x: &[f32], words: &mut [u32], rows: &mut [u32], params: &[u32]) {
    let k = params[2];
    let stride = params[3];
    let row = CUBE_POS_X;
    let unit = UNIT_POS_X;
    let mut largest = Shared::<[f32]>::new_slice(THREADS as usize);
    let mut odd = Shared::<[u32]>::new_slice(THREADS as usize);
    let mut sums = Shared::<[i32]>::new_slice(THREADS as usize);

    let mut a = 0.0f32;
    let mut not_finite = 0u32;
    let mut i = unit;
    while i < k {
        let value = x[(row * k + i) as usize];
        if (u32::reinterpret(value) & 0x7f80_0000u32) == 0x7f80_0000u32 {
            not_finite = 1u32;
        }
        a = a.max(value.abs());
        i += THREADS;
    }
    largest[unit as usize] = a;
    odd[unit as usize] = not_finite;
    sync_cube();
    let mut half = CUBE_DIM_X / 2;
    while half > 0 {
        if unit < half {
            largest[unit as usize] = largest[unit as usize].max(largest[(unit + half) as usize]);
            odd[unit as usize] |= odd[(unit + half) as usize];
        }
        sync_cube();
        half /= 2;
    }
    let a = largest[0].max(1e-5f32);
    let finite = odd[0] == 0;
    let to_int8 = 127.0f32 / a;

    let mut sum = 0i32;
    let mut word = unit;
    while word < stride {
        let mut packed = 0u32;
        for j in 0..4u32 {
            let column = word * 4 + j;
            if finite && column < k {
                let scaled = (x[(row * k + column) as usize] * to_int8).round();
                let q = i32::cast_from(scaled.clamp(-128.0f32, 127.0f32));
                sum += q;
                packed |= (u32::reinterpret(q) & 0xffu32) << (8 * j);
            }
        }
        words[(row * stride + word) as usize] = packed;
        word += THREADS;
    }
    sums[unit as usize] = sum;
    sync_cube();
    let mut half = CUBE_DIM_X / 2;
    while half > 0 {
        if unit < half {
            sums[unit as usize] += sums[(unit + half) as usize];
        }
        sync_cube();
        half /= 2;
    }
    if unit == 0 {
        rows[(row * 2) as usize] = select(finite, u32::reinterpret(a / 127.0f32), 0x7fc0_0000u32);
        rows[(row * 2 + 1) as usize] = u32::reinterpret(sums[0]);
    }
}

/// Quantises the rows of x [M, K], which is contiguous; `params` are those of a kernel over it.
pub(super) fn quantise(x: &CubeTensor, params: Handle, m: usize, k: usize) -> Quantised {
    let client = &x.client;
    let stride = gpu::x_stride(k);
    let words = client.empty(m * stride * 4);
    let rows = client.empty(m * 8);
    // SAFETY: the handles hold as many elements as is said, and the kernel stays within them: row < m, column < k,
    // word < stride.
    unsafe {
        quantise_rows::launch_unchecked(
            client,
            CubeCount::Static(m as u32, 1, 1),
            CubeDim::new_1d(THREADS),
            BufferArg::from_raw_parts(x.handle.clone(), m * k),
            BufferArg::from_raw_parts(words.clone(), m * stride),
            BufferArg::from_raw_parts(rows.clone(), m * 2),
            BufferArg::from_raw_parts(params, 8),
        );
    }
    Quantised { words, rows, m, k }
}
