//! Q6_K: 256 weights in 210 bytes, laid out as [`q6_k_block`] says. A value is d * scale * (q - 32).

use super::blocks::{each_block, encode_blocks, random_scale, signed_max};
use super::facts::Facts;
use crate::f16_at;
use half::f16;

/// Weights in a Q6_K block.
pub const QK_K: usize = 256;
/// Bytes in a Q6_K block.
pub const Q6_K_BYTES: usize = 210;

pub(super) const FACTS: Facts = Facts {
    name: "Q6_K",
    gguf_type: 14,
    dtype: None,
    block_len: QK_K,
    block_bytes: Q6_K_BYTES,
    ternary: None,
    decode: |row, out| each_block(row, out, q6_k_block),
    encode: |x, row| encode_blocks("Q6_K", x, row, encode),
    random: |deviation, random, out| {
        // 6-bit codes, then 16 scales of 8 to 15 with a sign, then d.
        random.bytes(192, out);
        let (sizes, signs) = (random.next_u64(), random.next_u64());
        for i in 0..16 {
            let size = 8 + (sizes >> (3 * i) & 7) as i8;
            out.push(if signs >> i & 1 == 1 { -size } else { size } as u8);
        }
        // The root mean square of 8 .. 15.
        out.extend(random_scale(deviation, 64.0, 11.73).to_le_bytes());
    },
};

/// The 256 values of a Q6_K block: d * scale * (q - 32), the first product first.
///
/// | bytes | |
/// | --- | --- |
/// | 0..128 | the low 4 bits of q; the first 64 bytes are for the weights 0..128, the others for 128..256. In each half, byte i holds the weights i (low nibble) and 64+i (high nibble), for i in 0..64 |
/// | 128..192 | the high 2 bits of q, 32 bytes for each half: byte i holds the weights i, 32+i, 64+i, 96+i of the half in the bit pairs 1..0, 3..2, 5..4, 7..6 |
/// | 192..208 | an i8 scale for each 16 weights |
/// | 208..210 | f16 d |
#[inline(always)]
pub fn q6_k_block(block: &[u8; Q6_K_BYTES], out: &mut [f32; QK_K]) {
    let codes = q6_k_codes(block);
    let d = f16_at(block, 208);
    // Written out: of a loop over the parts LLVM makes gathers across them, several times slower.
    q6_k_part::<0>(block, &codes, d, out);
    q6_k_part::<1>(block, &codes, d, out);
    q6_k_part::<2>(block, &codes, d, out);
    q6_k_part::<3>(block, &codes, d, out);
    q6_k_part::<4>(block, &codes, d, out);
    q6_k_part::<5>(block, &codes, d, out);
    q6_k_part::<6>(block, &codes, d, out);
    q6_k_part::<7>(block, &codes, d, out);
    q6_k_part::<8>(block, &codes, d, out);
    q6_k_part::<9>(block, &codes, d, out);
    q6_k_part::<10>(block, &codes, d, out);
    q6_k_part::<11>(block, &codes, d, out);
    q6_k_part::<12>(block, &codes, d, out);
    q6_k_part::<13>(block, &codes, d, out);
    q6_k_part::<14>(block, &codes, d, out);
    q6_k_part::<15>(block, &codes, d, out);
}

/// The 256 codes q (0..64) of a Q6_K block.
#[inline(always)]
pub fn q6_k_codes(block: &[u8; Q6_K_BYTES]) -> [u8; QK_K] {
    let mut codes = [0u8; QK_K];
    let (low, high) = (&block[..128], &block[128..192]);
    for half in 0..2 {
        for i in 0..32 {
            let (l0, l1, h) = (low[64 * half + i], low[64 * half + 32 + i], high[32 * half + i]);
            codes[128 * half + i] = l0 & 15 | (h & 3) << 4;
            codes[128 * half + 32 + i] = l1 & 15 | (h & 12) << 2;
            codes[128 * half + 64 + i] = l0 >> 4 | h & 0x30;
            codes[128 * half + 96 + i] = l1 >> 4 | (h & 0xc0) >> 2;
        }
    }
    codes
}

/// The inverse of [`q6_k_codes`]: writes the codes, and nothing else of the block.
pub(crate) fn set_q6_k_codes(codes: &[u8; QK_K], block: &mut [u8; Q6_K_BYTES]) {
    for half in 0..2 {
        let c = &codes[128 * half..];
        for i in 0..64 {
            block[64 * half + i] = c[i] & 15 | c[64 + i] << 4;
        }
        for i in 0..32 {
            let high = |quarter: usize| c[32 * quarter + i] >> 4;
            block[128 + 32 * half + i] = high(0) | high(1) << 2 | high(2) << 4 | high(3) << 6;
        }
    }
}

/// The 16 values of the part of a Q6_K block that shares scale `PART`.
#[inline(always)]
fn q6_k_part<const PART: usize>(block: &[u8; Q6_K_BYTES], codes: &[u8; QK_K], d: f32, out: &mut [f32; QK_K]) {
    let scale = d * f32::from(block[192 + PART] as i8);
    for i in 16 * PART..16 * PART + 16 {
        out[i] = scale * f32::from(codes[i] as i8 - 32);
    }
}

/// As `quantize_row_q6_K_ref`, but with the scale of 16 weights from their largest magnitude.
fn encode(x: &[f32; QK_K], block: &mut [u8; Q6_K_BYTES]) -> f32 {
    let mut scales = [0.0; 16];
    for (scale, x) in scales.iter_mut().zip(x.as_chunks::<16>().0) {
        *scale = signed_max(x) / -32.0;
    }
    // The largest of the scales becomes -128.
    let d = signed_max(&scales) / -128.0;
    let stored = f16::from_f32(d);
    block.fill(0);
    if stored == f16::ZERO || stored.is_infinite() {
        // All values below what f16 resolves: a block of zeros. (Infinite: the caller's error.)
        return d;
    }
    let mut codes = [32u8; QK_K];
    for part in 0..16 {
        let scale = (scales[part] / d).round_ties_even().min(127.0);
        block[192 + part] = scale as i8 as u8;
        let step = stored.to_f32() * scale;
        if step != 0.0 {
            for i in 16 * part..16 * part + 16 {
                codes[i] = ((x[i] / step).round_ties_even().clamp(-32.0, 31.0) + 32.0) as u8;
            }
        }
    }
    set_q6_k_codes(&codes, block);
    [block[208], block[209]] = stored.to_le_bytes();
    d
}
