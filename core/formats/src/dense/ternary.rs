//! Blocks of ternary weights as values: a scale d for each block, and weights times d.

use super::blocks::{each_block, encode_blocks, inverse, random_scale, signed_max};
use crate::random::SplitMix64;
use crate::{FormatError, TernaryBlocks};
use half::f16;

impl<const LEN: usize, const BYTES: usize> TernaryBlocks<LEN, BYTES> {
    /// The weights of a row of blocks, and the scale of each.
    pub(crate) fn decode_row(&self, row: &[u8], weights: &mut [i8], scales: &mut [f32]) {
        let blocks = row.as_chunks::<BYTES>().0.iter().zip(weights.as_chunks_mut::<LEN>().0);
        for ((block, weights), scale) in blocks.zip(scales) {
            *scale = (self.decode)(block, weights);
        }
    }

    /// The values of a row of blocks.
    pub(crate) fn decode_values(&self, row: &[u8], out: &mut [f32]) {
        each_block(row, out, |block, out: &mut [f32; LEN]| {
            let mut weights = [0; LEN];
            let d = (self.decode)(block, &mut weights);
            for (value, w) in out.iter_mut().zip(weights) {
                *value = f32::from(w) * d;
            }
        });
    }

    /// The row of weights that are -1, 0 or 1, with the scale of each block.
    pub(crate) fn encode_row(&self, weights: &[i8], scales: &[f16], row: &mut [u8]) {
        let blocks = weights.as_chunks::<LEN>().0.iter().zip(row.as_chunks_mut::<BYTES>().0);
        for ((weights, block), &scale) in blocks.zip(scales) {
            (self.encode)(weights, scale, block);
        }
    }

    /// The row with the least squared error: values that have the largest magnitudes of a block become d, their mean
    /// magnitude, and -d, and the others 0. A block that is ternary with an f16 as its scale is written exactly.
    pub(crate) fn encode_nearest(&self, x: &[f32], row: &mut [u8]) -> Result<(), FormatError> {
        encode_blocks(self.format, x, row, |x: &[f32; LEN], block| {
            let (d, least) = nearest_scale(x);
            let scale = f16::from_f32(d);
            let weight = |v: f32| if v.abs() < least { 0 } else { i8::from(v > 0.0) - i8::from(v < 0.0) };
            let weights = if scale == f16::ZERO { [0; LEN] } else { x.map(weight) };
            (self.encode)(&weights, scale, block);
            d
        })
    }

    /// As ggml: d = max|x|, and x / d rounded half away from zero.
    pub(crate) fn encode_values(&self, x: &[f32], row: &mut [u8]) -> Result<(), FormatError> {
        encode_blocks(self.format, x, row, |x: &[f32; LEN], block| {
            let d = signed_max(x).abs();
            let id = inverse(d);
            // No more than 1 but where d is so small that 1 / d overflows.
            let weights = x.map(|v| (v * id).round().clamp(-1.0, 1.0) as i8);
            (self.encode)(&weights, f16::from_f32(d), block);
            d
        })
    }

    /// Appends a block of random weights, with a scale between half and one and a half times the usual one.
    pub(crate) fn random(&self, deviation: f32, random: &mut SplitMix64, out: &mut Vec<u8>) {
        let mut weights = [0; LEN];
        for chunk in weights.chunks_mut(32) {
            let mut word = random.next_u64();
            for w in chunk {
                *w = (word % 3) as i8 - 1;
                word /= 3;
            }
        }
        // Of root mean square 1.
        let uniform = (random.next_u64() >> 40) as f32 / (1 << 24) as f32;
        let factor = (0.5 + uniform) / (13f32 / 12.0).sqrt();
        let mut block = [0; BYTES];
        (self.encode)(&weights, random_scale(deviation * factor, 3.0, 1.0), &mut block);
        out.extend(block);
    }
}

/// The scale d with which finite values are best approximated by -d, 0 and d, and the least magnitude that becomes d.
///
/// Of the j largest magnitudes with the sum S, the best d is S / j, and the squared error that of zeros less S^2 / j.
fn nearest_scale(x: &[f32]) -> (f32, f32) {
    let mut magnitudes: Vec<f32> = x.iter().map(|v| v.abs()).collect();
    magnitudes.sort_unstable_by(|a, b| b.total_cmp(a));
    let (mut sum, mut best) = (0f64, (0.0, 0.0, 0.0));
    for (index, &magnitude) in magnitudes.iter().enumerate() {
        let count = (index + 1) as f64;
        sum += f64::from(magnitude);
        // Equal ones belong together.
        let last = magnitudes.get(index + 1).is_none_or(|&next| next < magnitude);
        if last && sum * sum / count > best.0 {
            best = (sum * sum / count, (sum / count) as f32, magnitude);
        }
    }
    (best.1, best.2)
}
