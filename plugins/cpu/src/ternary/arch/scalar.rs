//! Portable kernels, for every CPU. Written on small arrays that compilers turn into whatever vectors
//! the target has.

use std::ffi::CStr;
use std::ops::Range;
use std::slice::from_raw_parts;

use bitnet_burn_plugin::abi::{OPERATION_SCALED_TERNARY_MATMUL, Signature};
use bitnet_burn_plugin::canonical::{BLOCK, BLOCK_BYTES};
use bitnet_burn_plugin::sdk::{ActivationsRef, KernelResult, OutputTile, TernaryKernel, WeightsRef};

use crate::ternary::generic::{self, MAX_K, RowJob, RowMicro, TileJob, TileMicro, row_bytes};
use crate::ternary::tile::{self, BLOCK_ROWS, STEP, STEP_BYTES};

/// The products in portable Rust.
struct Scalar;

/// Blocks, or steps, that an i16 accumulator takes: each adds at most 4 * 2 * 128 in magnitude (4 * 3 * 128
/// for invalid codes), so that 16 stay below 2^15.
const BLOCKS_PER_FLUSH: usize = 16;

impl RowMicro for Scalar {
    const MR: usize = 1;
    const NR: usize = 1;
    const GROUP: usize = 1;

    #[inline(always)]
    unsafe fn gemv<const N: usize>(w: *const u8, stride: usize, x: *const i8) -> [i32; N] {
        let bytes = row_bytes(stride);
        // SAFETY: the caller's promise: N rows of that many bytes, and `stride` activations.
        let (w, x) = unsafe { (from_raw_parts(w, N * bytes), from_raw_parts(x, stride)) };
        let mut sums = [0; N];
        for (sum, w) in sums.iter_mut().zip(w.chunks_exact(bytes)) {
            *sum = row(w, x);
        }
        sums
    }
}

/// Sum of one row with one activation row.
#[inline(always)]
fn row(w: &[u8], x: &[i8]) -> i32 {
    let (w, _) = w.as_chunks::<BLOCK_BYTES>();
    let (x, half) = x.as_chunks::<BLOCK>();
    let mut total = [0i32; 32];
    for (w, x) in w.chunks(BLOCKS_PER_FLUSH).zip(x.chunks(BLOCKS_PER_FLUSH)) {
        let mut sums = [0i16; 32];
        for (w, x) in w.iter().zip(x) {
            for i in 0..32 {
                let dot = i16::from(w[i] >> 6) * i16::from(x[i])
                    + i16::from(w[i] >> 4 & 3) * i16::from(x[32 + i])
                    + i16::from(w[i] >> 2 & 3) * i16::from(x[64 + i])
                    + i16::from(w[i] & 3) * i16::from(x[96 + i]);
                sums[i] += dot;
            }
        }
        for (total, sum) in total.iter_mut().zip(sums) {
            *total = total.wrapping_add(i32::from(sum));
        }
    }
    if let (Some(w), Ok(x)) = (w.get(x.len()), <&[i8; BLOCK / 2]>::try_from(half)) {
        // The activations end in the middle of the last block.
        for i in 0..32 {
            let dot =
                i16::from(w[i] >> 6) * i16::from(x[i]) + i16::from(w[i] >> 4 & 3) * i16::from(x[32 + i]);
            total[i] = total[i].wrapping_add(i32::from(dot));
        }
    }
    total.into_iter().fold(0, i32::wrapping_add)
}

impl TileMicro for Scalar {
    const MR: usize = 1;

    #[inline(always)]
    unsafe fn gemv(w: *const u8, steps: usize, x: *const i8) -> [i32; BLOCK_ROWS] {
        // SAFETY: the caller's promise.
        let (w, x) = unsafe { (from_raw_parts(w, steps * STEP_BYTES), from_raw_parts(x, steps * STEP)) };
        let (w, _) = w.as_chunks::<STEP_BYTES>();
        let (x, _) = x.as_chunks::<STEP>();
        let mut total = [0i32; BLOCK_ROWS];
        for (w, x) in w.chunks(BLOCKS_PER_FLUSH).zip(x.chunks(BLOCKS_PER_FLUSH)) {
            let mut sums = [0i16; STEP_BYTES];
            for (w, x) in w.iter().zip(x) {
                // A vector's worth of the pattern x0 x1 x2 x3 x0 x1 .. per group of four.
                let x: [[i16; 16]; 4] =
                    std::array::from_fn(|t| std::array::from_fn(|l| i16::from(x[4 * t + l % 4])));
                let (w, _) = w.as_chunks::<16>();
                let (sums, _) = sums.as_chunks_mut::<16>();
                for (sums, w) in sums.iter_mut().zip(w) {
                    for l in 0..16 {
                        let dot = i16::from(w[l] & 3) * x[0][l]
                            + i16::from(w[l] >> 2 & 3) * x[1][l]
                            + i16::from(w[l] >> 4 & 3) * x[2][l]
                            + i16::from(w[l] >> 6) * x[3][l];
                        sums[l] += dot;
                    }
                }
            }
            for (total, sums) in total.iter_mut().zip(sums.as_chunks::<4>().0) {
                let sum: i32 = sums.iter().copied().map(i32::from).sum();
                *total = total.wrapping_add(sum);
            }
        }
        total
    }
}

/// `i2s-scalar`: canonical rows, any CPU.
pub(crate) struct Rows;

impl TernaryKernel for Rows {
    const NAME: &'static CStr = c"i2s-scalar";

    fn supports(signature: &Signature) -> bool {
        generic::supports(signature, MAX_K)
    }

    fn workspace_size(m: usize, k: usize) -> usize {
        generic::workspace_size::<Scalar>(m, k)
    }

    fn prepare(x: &ActivationsRef, workspace: &mut [u8]) -> KernelResult {
        generic::prepare::<Scalar>(x, workspace)
    }

    fn run(w: &WeightsRef, x: &ActivationsRef, workspace: &[u8], y: &mut OutputTile) -> KernelResult {
        let job = RowJob::new::<Scalar>(w, x, workspace, y)?;
        // SAFETY: portable code needs no features; the job was checked for it.
        unsafe { job.run::<Scalar>() };
        Ok(())
    }
}

/// `t2-scalar`, `t2-scalar-scaled`: tiles, with one scale or with many, any CPU.
pub(crate) struct Tiles<const MANY_SCALES: bool>;

impl<const MANY_SCALES: bool> TernaryKernel for Tiles<MANY_SCALES> {
    const NAME: &'static CStr = if MANY_SCALES { c"t2-scalar-scaled" } else { c"t2-scalar" };
    const LAYOUT: Option<&'static CStr> = Some(tile::LAYOUT);
    const ROW_GRANULE: usize = BLOCK_ROWS;
    const OPERATION: u32 = generic::operation(MANY_SCALES);

    fn supports(signature: &Signature) -> bool {
        match MANY_SCALES {
            true => generic::supports_scaled(signature, MAX_K),
            false => generic::supports(signature, MAX_K),
        }
    }

    fn granule_bytes(k: usize) -> usize {
        tile::block_bytes(k)
    }

    fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        tile::pack(canonical, rows, out)
    }

    fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        tile::unpack(packed, rows, out)
    }

    fn run(w: &WeightsRef, x: &ActivationsRef, _workspace: &[u8], y: &mut OutputTile) -> KernelResult {
        let job = TileJob::new(w, x, y, tile::STEP)?;
        if MANY_SCALES {
            // SAFETY: portable code needs no features.
            return unsafe { job.run_scaled::<Scalar>() };
        }
        // SAFETY: as above.
        unsafe { job.run::<Scalar>() };
        Ok(())
    }
}

/// `i2s-scalar-scaled`: canonical rows with many scales, any CPU.
pub(crate) struct ScaledRows;

impl TernaryKernel for ScaledRows {
    const NAME: &'static CStr = c"i2s-scalar-scaled";
    const OPERATION: u32 = OPERATION_SCALED_TERNARY_MATMUL;

    fn supports(signature: &Signature) -> bool {
        generic::supports_scaled(signature, MAX_K)
    }

    fn run(w: &WeightsRef, x: &ActivationsRef, _workspace: &[u8], y: &mut OutputTile) -> KernelResult {
        generic::scaled_rows(w, x, y)
    }
}
