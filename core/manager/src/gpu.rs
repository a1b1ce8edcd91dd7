//! Kernels that are GPU source text, as far as the host knows them without a GPU: how their operands lie in the
//! device's buffers ([`abi::Gpu`](bitnet_burn_plugin::abi::Gpu) is the contract), how exact they must be, and the
//! device that others provide, so that the [gate](crate::gate) can try them.

use bitnet_burn_plugin::abi::GPU_ACTIVATION_BLOCK;

use crate::memory::Activations;
use crate::plugin::{Kernel, Target};

/// Outputs may differ from the two separate f32 products by this many units in the last place.
pub(crate) const MAX_ULP: u32 = 2;

/// A GPU that compiles kernels from text and runs them.
pub trait GpuDevice {
    /// Runtime and device, for reports.
    fn name(&self) -> String;

    /// The language that it takes.
    fn target(&self) -> Target;

    /// What a kernel needs and the device lacks.
    fn lacking(&self, kernel: &Kernel) -> Option<String>;

    /// Compiles a kernel, and runs it once over `y`, which it finds and leaves as it is but for the kernel's outputs.
    ///
    /// # Errors
    /// If the text does not compile, the device refuses the launch or fails, or an input has changed.
    fn run(&self, kernel: &Kernel, operands: &GpuOperands, y: &mut [f32]) -> Result<(), String>;
}

/// The inputs of a GPU kernel, as they lie in its buffers.
#[derive(Clone, Debug)]
pub struct GpuOperands {
    /// Rows of activations, output and input features.
    pub shape: (usize, usize, usize),
    /// The weights in the kernel's layout.
    pub weights: Vec<u32>,
    /// weight = code * scale.
    pub scale: f32,
    /// Four int8 a word.
    pub x: Vec<u32>,
    /// Scale (the bits of an f32) and sum (the bits of an i32) of each row.
    pub rows: Vec<[u32; 2]>,
    /// See [`params`].
    pub params: [u32; 8],
}

impl GpuOperands {
    /// Operands of [m, k] activations and [n, k] weights, for an output whose rows are `y_stride` apart and whose
    /// column `y_column` is the kernel's first.
    pub fn new(
        weights: &[u8],
        scale: f32,
        x: &Activations,
        n: usize,
        y_stride: usize,
        y_column: usize,
    ) -> Self {
        let (m, k) = (x.m(), x.k());
        let stride = x_stride(k);
        let mut words = vec![0; m * stride];
        for (row, out) in x.q().chunks_exact(x.stride().max(1)).zip(words.chunks_exact_mut(stride)) {
            for (values, word) in row[..k].chunks(4).zip(out) {
                let mut bytes = [0; 4];
                for (byte, &value) in bytes.iter_mut().zip(values) {
                    *byte = value as u8;
                }
                *word = u32::from_le_bytes(bytes);
            }
        }
        let rows = x.scale().iter().zip(x.sum()).map(|(a, &sum)| [a.to_bits(), sum as u32]).collect();
        let params = params(m, n, k, y_stride, y_column);
        Self { shape: (m, n, k), weights: self::le_words(weights), scale, x: words, rows, params }
    }
}

/// The parameters that a kernel gets.
///
/// # Panics
/// If one is beyond 32 bits, which a kernel counts in.
pub fn params(m: usize, n: usize, k: usize, y_stride: usize, y_column: usize) -> [u32; 8] {
    [m, n, k, x_stride(k), y_stride, y_column, 0, 0].map(|value| {
        u32::try_from(value)
            .unwrap_or_else(|_| panic!("{value} exceeds the 32 bits that a kernel of a GPU counts in"))
    })
}

/// Words from one row of activations to the next.
pub fn x_stride(k: usize) -> usize {
    k.div_ceil(GPU_ACTIVATION_BLOCK) * GPU_ACTIVATION_BLOCK / 4
}

/// Bytes as little-endian words, the last one filled up with zeros.
pub fn le_words(bytes: &[u8]) -> Vec<u32> {
    let word = |bytes: &[u8]| {
        let mut word = [0; 4];
        word[..bytes.len()].copy_from_slice(bytes);
        u32::from_le_bytes(word)
    };
    bytes.chunks(4).map(word).collect()
}

/// Activations [m, k] as they were read back from a device: the inverse of [`GpuOperands::new`].
///
/// # Panics
/// If there are fewer words than m rows of k values take.
pub fn activations(words: &[u32], rows: &[[u32; 2]], m: usize, k: usize) -> Activations {
    let stride = x_stride(k);
    let mut activations = Activations::default();
    let parts = activations.resize(m, k);
    for i in 0..m {
        let out = &mut parts.q[i * parts.stride..][..parts.stride];
        out.fill(0);
        for (j, value) in out[..k].iter_mut().enumerate() {
            *value = words[i * stride + j / 4].to_le_bytes()[j % 4] as i8;
        }
        (parts.scale[i], parts.sum[i]) = (f32::from_bits(rows[i][0]), rows[i][1] as i32);
    }
    activations
}

/// Whether an output is as exact as it must be. Where the exact one is not finite or subnormal, devices may do as
/// they like.
pub fn close(got: f32, want: f32) -> bool {
    if !want.is_finite() || want.abs() <= f32::MIN_POSITIVE {
        return !want.is_finite() || got.abs() <= f32::MIN_POSITIVE * 2.0;
    }
    // Floats of one sign are ordered as their bits are.
    got.is_sign_positive() == want.is_sign_positive() && got.to_bits().abs_diff(want.to_bits()) <= MAX_ULP
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_go_to_the_device_and_back() {
        let x: Vec<f32> = (0..3 * 131).map(|i| (i as f32 * 0.7).sin()).collect();
        let x = Activations::from_rows(&x, 131);
        let operands = GpuOperands::new(&[1, 2, 3, 4, 5], 0.5, &x, 7, 12, 2);
        assert_eq!(operands.weights, [0x0403_0201, 5]);
        assert_eq!(operands.params, [3, 7, 131, 64, 12, 2, 0, 0]);
        assert_eq!(operands.x.len(), 3 * 64);
        // Zeros up to whole blocks.
        assert!(operands.x[33..64].iter().all(|&word| word == 0));
        let back = activations(&operands.x, &operands.rows, 3, 131);
        assert_eq!((back.q(), back.scale(), back.sum()), (x.q(), x.scale(), x.sum()));
    }

    #[test]
    fn two_units_in_the_last_place_are_close_and_three_are_not() {
        let next = |x: f32, steps: i32| f32::from_bits((x.to_bits() as i32 + steps) as u32);
        for x in [1.0f32, -3.7e-20, 1e30] {
            for (steps, expected) in [(0, true), (2, true), (-2, true), (3, false), (-3, false)] {
                assert_eq!(close(next(x, steps), x), expected, "{x:e} and {steps} units");
            }
            assert!(!close(-x, x) && !close(f32::NAN, x) && !close(f32::INFINITY, x) && !close(0.0, x));
        }
        assert!(close(-0.0, 0.0) && close(0.0, 1e-40) && !close(1e-30, 0.0));
        assert!(close(0.0, f32::NAN) && close(1.0, f32::INFINITY));
    }
}
