//! Matrix multiplication by matrix units (tensor cores), for prompts.
//!
//! With int8 units sums are exact i32. With f16 units they are exact, too: products are whole numbers up to 128, which an
//! f16 holds, and sums of 131072 of them are whole numbers that the unit's f32 holds.

use cubecl::prelude::*;

/// Input features up to which sums in f32 are exact: each product is up to 128.
pub(crate) const F16_EXACT: u64 = (1 << 24) / 128;

/// Weights along K at a time: what one of the four bit pairs of a block's bytes is.
const STEP: u32 = 32;
/// Planes of 32 threads, each of which has its own rows.
const PLANES: u32 = 4;
const THREADS: u32 = 32 * PLANES;
/// Of what a unit reads and writes, in bytes.
const ALIGNMENT: usize = 32;
/// Rows, columns and depth of what a unit multiplies.
const UNIT: u32 = 16;

/// int8 x int8 to i32.
#[cube(launch_unchecked)]
pub(crate) fn gemm_i8(
    weights: &[u32],
    scale: &[f32],
    x: &[u32],
    rows: &[u32],
    params: &[u32],
    y: &mut [f32],
    #[comptime] tall: u32,
    #[comptime] wide: u32,
) {
    multiply::<i8, i32>(weights, scale, x, rows, params, y, tall, wide);
}

/// f16 x f16 to f32, where that is what there is.
#[cube(launch_unchecked)]
pub(crate) fn gemm_f16(
    weights: &[u32],
    scale: &[f32],
    x: &[u32],
    rows: &[u32],
    params: &[u32],
    y: &mut [f32],
    #[comptime] tall: u32,
    #[comptime] wide: u32,
) {
    multiply::<half::f16, f32>(weights, scale, x, rows, params, y, tall, wide);
}

/// Four int8 of a word, as what the unit multiplies.
#[cube]
fn four<E: Numeric>(word: u32) -> Vector<E, Const<4>> {
    Vector::cast_from(Vector::<i8, Const<4>>::reinterpret(word))
}

/// Where vector i of rows of eight is.
#[cube]
fn place(i: u32, #[comptime] rows: u32) -> u32 {
    (i % 8 / 4 * rows + i / 8) * 4 + i % 4
}

/// Tiles of 64 `tall` rows by 16 `wide` output features: each of four planes has 16 `tall` rows, and all features.
#[cube]
fn multiply<E: Numeric, A: Numeric>(
    weights: &[u32],
    scale: &[f32],
    x: &[u32],
    rows: &[u32],
    params: &[u32],
    y: &mut [f32],
    #[comptime] tall: u32,
    #[comptime] wide: u32,
) {
    let m = params[0];
    let n = params[1];
    let x_stride = params[3];
    let words = x_stride / 4;
    let plane = UNIT_POS_Y;
    let unit = plane * 32 + UNIT_POS_X;
    let tile_m = comptime!(PLANES * UNIT * tall);
    let tile_n = comptime!(UNIT * wide);
    let n0 = CUBE_POS_X * tile_n;
    let m0 = CUBE_POS_Y * tile_m;

    // Rows of 16 values, in vectors of four, first those of the upper half of the step: what a unit reads begins at a
    // multiple of 32 bytes.
    let mut shared_x = Shared::<[Vector<E, Const<4>>]>::new_aligned_slice(
        comptime!((tile_m * STEP / 4) as usize),
        ALIGNMENT,
    );
    let mut shared_w = Shared::<[Vector<E, Const<4>>]>::new_aligned_slice(
        comptime!((tile_n * STEP / 4) as usize),
        ALIGNMENT,
    );
    let mut sums = Sequence::<cmma::Matrix<A>>::new();
    #[unroll]
    for _ in 0..comptime!(tall * wide) {
        sums.push(cmma::Matrix::<A>::from_value(
            cmma::MatrixIdent::Accumulator,
            UNIT as usize,
            UNIT as usize,
            UNIT as usize,
            cmma::MatrixLayout::Undefined,
            A::from_int(0),
        ));
    }

    let steps = x_stride / 8;
    let mut step = 0u32;
    while step < steps {
        // Eight words of weights a row, of which this step takes a bit pair, and eight of activations.
        let block = step / 4;
        let shift = 6 - step % 4 * 2;
        let mut i = unit;
        while i < comptime!(tile_n * STEP / 4) {
            let from = (n0 + i / 8).min(n - 1);
            let codes = (weights[(from * words + block * 8 + i % 8) as usize] >> shift) & 0x0303_0303u32;
            // Less one, byte by byte.
            shared_w[place(i, tile_n) as usize] =
                four::<E>(((codes | 0x8080_8080u32) - 0x0101_0101u32) ^ 0x8080_8080u32);
            i += THREADS;
        }
        let mut i = unit;
        while i < comptime!(tile_m * STEP / 4) {
            let from = (m0 + i / 8).min(m - 1);
            shared_x[place(i, tile_m) as usize] = four::<E>(x[(from * x_stride + step * 8 + i % 8) as usize]);
            i += THREADS;
        }
        sync_cube();
        #[unroll]
        for depth in 0..comptime!(STEP / UNIT) {
            #[unroll]
            for down in 0..tall {
                let row = (plane * tall + down) * UNIT;
                let from = (comptime!(depth * tile_m) + row) * comptime!(UNIT / 4);
                let a = cmma::Matrix::<Vector<E, Const<4>>>::from_slice(
                    cmma::MatrixIdent::A,
                    UNIT as usize,
                    UNIT as usize,
                    UNIT as usize,
                    cmma::MatrixLayout::RowMajor,
                    &shared_x[from as usize..],
                    UNIT,
                );
                #[unroll]
                for right in 0..wide {
                    let from = comptime!((depth * tile_n + right * UNIT) * UNIT / 4);
                    let b = cmma::Matrix::<Vector<E, Const<4>>>::from_slice(
                        cmma::MatrixIdent::B,
                        UNIT as usize,
                        UNIT as usize,
                        UNIT as usize,
                        cmma::MatrixLayout::ColMajor,
                        &shared_w[from as usize..],
                        UNIT,
                    );
                    let sum = sums.index(comptime!((down * wide + right) as usize));
                    cmma::execute(&a, &b, sum, sum);
                }
            }
        }
        sync_cube();
        step += 1;
    }

    // A unit's sums at a time through memory that its plane has for itself.
    let mut own = Shared::<[A]>::new_aligned_slice(comptime!((PLANES * UNIT * UNIT) as usize), ALIGNMENT);
    let from = plane * comptime!(UNIT * UNIT);
    #[unroll]
    for down in 0..tall {
        #[unroll]
        for right in 0..wide {
            let sum = sums.index(comptime!((down * wide + right) as usize));
            cmma::store(&mut own[from as usize..], sum, UNIT, cmma::MatrixLayout::RowMajor);
            sync_cube();
            let mut i = UNIT_POS_X;
            while i < comptime!(UNIT * UNIT) {
                let row = m0 + (plane * tall + down) * UNIT + i / UNIT;
                let feature = n0 + right * UNIT + i % UNIT;
                if row < m && feature < n {
                    let a = f32::reinterpret(rows[(2 * row) as usize]);
                    let to = row * params[4] + params[5] + feature;
                    y[to as usize] = f32::cast_from(own[(from + i) as usize]) * (scale[0] * a);
                }
                i += 32;
            }
            sync_cube();
        }
    }
}
