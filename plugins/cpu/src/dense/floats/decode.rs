//! How the weights of each format become vectors of f32.

use bitnet_burn_formats::dense::{
    IQ4_NL_BYTES, PQ2_0_BYTES, PTQ1_0_BYTES, Q2_0_BYTES, Q4_0_BYTES, Q4_1_BYTES, Q4_K_BYTES, Q5_0_BYTES,
    Q5_1_BYTES, Q5_K_BYTES, Q6_K_BYTES, Q8_0_BYTES, QK, QK_K, iq4_nl_block, q4_1_block, q4_k_block,
    q5_0_block, q5_1_block, q5_k_block,
};
use bitnet_burn_formats::{tq1_0, tq2_0};

use crate::simd::{Isa, LANES};

/// How to get at the weights of a format: steps of `LEN` weights in `UNITS` units (mostly bytes), each in
/// `PARTS` parts of V vectors.
pub(super) trait Decoder<const V: usize> {
    /// What a row is a slice of.
    type Unit: Copy;
    const LEN: usize;
    const UNITS: usize;
    const PARTS: usize = 1;
    /// Whether a part takes too many registers for a tile with several activations.
    const DECODED_ONCE: bool = false;
    /// Whether rows are always decoded as a whole before they are multiplied: for formats that would make a tile's
    /// code long.
    const ROW_FIRST: bool = false;

    /// The vectors of one part of a step.
    fn decode<I: Isa>(isa: I, step: &[Self::Unit], part: usize) -> [I::F; V];

    /// Weight `i` of a row; only where `LEN` is more than one block of the format.
    #[inline(always)]
    fn single<I: Isa>(_isa: I, _row: &[Self::Unit], _i: usize) -> f32 {
        unreachable!("rows are whole blocks")
    }
}

/// `N` bytes at `at`.
#[inline(always)]
fn bytes<const N: usize>(from: &[u8], at: usize) -> &[u8; N] {
    from[at..].first_chunk().expect("within the block")
}

/// The values of a row.
#[inline(always)]
pub(super) fn decode_row<I: Isa, D: Decoder<V>, const V: usize>(
    isa: I,
    w: &[D::Unit],
    values: &mut [f32],
    next: Option<*const u8>,
) {
    let (steps, rest) = (values.len() / D::LEN, values.len() % D::LEN);
    for step in 0..steps {
        if let Some(next) = next {
            for line in (0..D::UNITS * size_of::<D::Unit>()).step_by(64) {
                isa.prefetch(next.wrapping_add(step * D::UNITS * size_of::<D::Unit>() + line));
            }
        }
        for part in 0..D::PARTS {
            let to = &mut values[step * D::LEN + part * V * LANES..][..V * LANES];
            let decoded = D::decode(isa, &w[step * D::UNITS..][..D::UNITS], part);
            for (&v, to) in decoded.iter().zip(to.as_chunks_mut().0) {
                isa.store(v, to);
            }
        }
    }
    let from = values.len() - rest;
    for (i, value) in values[from..].iter_mut().enumerate() {
        *value = D::single(isa, w, from + i);
    }
}

pub(super) struct F32;

pub(super) struct F16;
pub(super) struct BF16;

#[allow(non_camel_case_types)]
pub(super) struct Q8_0;

#[allow(non_camel_case_types)]
pub(super) struct Q4_0;

pub(super) struct Q6K;

/// Values decoded before.
pub(super) struct Decoded;

impl Decoder<2> for Decoded {
    type Unit = f32;
    const LEN: usize = 32;
    const UNITS: usize = 32;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[f32], _part: usize) -> [I::F; 2] {
        let (vectors, _) = step.as_chunks();
        [isa.load(&vectors[0]), isa.load(&vectors[1])]
    }
    #[inline(always)]
    fn single<I: Isa>(_isa: I, row: &[f32], i: usize) -> f32 {
        row[i]
    }
}

impl Decoder<4> for F32 {
    type Unit = u8;
    const LEN: usize = 64;
    const UNITS: usize = 256;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; 4] {
        let mut v = [isa.splat(0.0); 4];
        for (i, v) in v.iter_mut().enumerate() {
            *v = isa.f32_bytes(bytes(step, 64 * i));
        }
        v
    }
    #[inline(always)]
    fn single<I: Isa>(_isa: I, row: &[u8], i: usize) -> f32 {
        f32::from_le_bytes(*bytes(row, 4 * i))
    }
}

impl Decoder<4> for F16 {
    type Unit = u8;
    const LEN: usize = 64;
    const UNITS: usize = 128;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; 4] {
        let mut v = [isa.splat(0.0); 4];
        for (i, v) in v.iter_mut().enumerate() {
            *v = isa.f16_bytes(bytes(step, 32 * i));
        }
        v
    }
    #[inline(always)]
    fn single<I: Isa>(isa: I, row: &[u8], i: usize) -> f32 {
        let mut lanes = [0.0; LANES];
        isa.store(isa.splat_f16(u16::from_le_bytes(*bytes(row, 2 * i))), &mut lanes);
        lanes[0]
    }
}

impl Decoder<4> for BF16 {
    type Unit = u8;
    const LEN: usize = 64;
    const UNITS: usize = 128;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; 4] {
        let mut v = [isa.splat(0.0); 4];
        for (i, v) in v.iter_mut().enumerate() {
            *v = isa.bf16_bytes(bytes(step, 32 * i));
        }
        v
    }
    #[inline(always)]
    fn single<I: Isa>(_isa: I, row: &[u8], i: usize) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(*bytes(row, 2 * i))) << 16)
    }
}

impl Decoder<2> for Q8_0 {
    type Unit = u8;
    const LEN: usize = QK;
    const UNITS: usize = Q8_0_BYTES;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; 2] {
        let d = isa.splat_f16(u16::from_le_bytes(*bytes(step, 0)));
        [isa.mul(isa.i8_bytes(bytes(step, 2)), d), isa.mul(isa.i8_bytes(bytes(step, 18)), d)]
    }
}

impl Decoder<2> for Q4_0 {
    type Unit = u8;
    const LEN: usize = QK;
    const UNITS: usize = Q4_0_BYTES;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; 2] {
        let d = isa.splat_f16(u16::from_le_bytes(*bytes(step, 0)));
        let [low, high] = isa.nibbles(bytes(step, 2));
        [isa.mul(low, d), isa.mul(high, d)]
    }
}

impl Decoder<8> for Q6K {
    type Unit = u8;
    const LEN: usize = QK_K;
    const UNITS: usize = Q6_K_BYTES;
    const PARTS: usize = 2;
    const DECODED_ONCE: bool = true;

    /// A half of the block: 128 weights. Its layout is in the formats' `q6_k_block`.
    #[inline(always)]
    fn decode<I: Isa>(isa: I, block: &[u8], part: usize) -> [I::F; 8] {
        let block: &[u8; Q6_K_BYTES] = bytes(block, 0);
        let d = isa.splat_f16(u16::from_le_bytes(*bytes(block, 208)));
        let mut scales = [0.0; LANES];
        isa.store(isa.mul(d, isa.i8_bytes(bytes(block, 192))), &mut scales);
        // Through memory, from where a scale is broadcast by the multiplication itself; else the compiler
        // would shuffle each out of the register.
        let scales = std::hint::black_box(&scales);
        let mut v = [isa.splat(0.0); 8];
        for i in 0..2 {
            let at = 64 * part + 16 * i;
            let high = bytes(block, 128 + 32 * part + 16 * i);
            let sixes = isa.sixes(bytes(block, at), bytes(block, at + 32), high);
            for (j, &q) in sixes.iter().enumerate() {
                v[2 * j + i] = isa.mul(isa.splat(scales[8 * part + 2 * j + i]), q);
            }
        }
        v
    }
}

/// Formats whose blocks are decoded by the function of the formats' crate, compiled for this instruction set.
macro_rules! by_block {
    ($($format:ident: $vectors:literal of $len:expr, $bytes:expr, $block:path;)*) => {
        $(
            #[allow(non_camel_case_types)]
            pub(super) struct $format;

            impl Decoder<$vectors> for $format {
                type Unit = u8;
                const LEN: usize = $len;
                const UNITS: usize = $bytes;
                const ROW_FIRST: bool = true;

                #[inline(always)]
                fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; $vectors] {
                    let mut values = [0.0; $len];
                    $block(bytes(step, 0), &mut values);
                    let mut v = [isa.splat(0.0); $vectors];
                    for (v, values) in v.iter_mut().zip(values.as_chunks().0) {
                        *v = isa.load(values);
                    }
                    v
                }
            }
        )*
    };
}

by_block! {
    Q4_1: 2 of QK, Q4_1_BYTES, q4_1_block;
    Q5_0: 2 of QK, Q5_0_BYTES, q5_0_block;
    Q5_1: 2 of QK, Q5_1_BYTES, q5_1_block;
    IQ4_NL: 2 of QK, IQ4_NL_BYTES, iq4_nl_block;
    Q4_K: 16 of QK_K, Q4_K_BYTES, q4_k_block;
    Q5_K: 16 of QK_K, Q5_K_BYTES, q5_k_block;
}

/// The factors of the five digits of bytes in base 3: 256 * 3^i.
const POWERS: [u16; 5] = [256, 3 * 256, 9 * 256, 27 * 256, 81 * 256];

#[allow(non_camel_case_types)]
pub(super) struct Q2_0;

#[allow(non_camel_case_types)]
pub(super) struct PQ2_0;

#[allow(non_camel_case_types)]
pub(super) struct PTQ1_0;

#[allow(non_camel_case_types)]
pub(super) struct TQ1_0;

#[allow(non_camel_case_types)]
pub(super) struct TQ2_0;

impl Decoder<4> for Q2_0 {
    type Unit = u8;
    const LEN: usize = 64;
    const UNITS: usize = Q2_0_BYTES;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, block: &[u8], _part: usize) -> [I::F; 4] {
        pairs(isa, block, 2)
    }
}

impl Decoder<4> for PQ2_0 {
    type Unit = u8;
    const LEN: usize = 128;
    const UNITS: usize = PQ2_0_BYTES;
    const PARTS: usize = 2;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, block: &[u8], part: usize) -> [I::F; 4] {
        pairs(isa, block, 2 + 16 * part)
    }
}

/// 64 weights in 2 bits each from byte `at` on, of a block that begins with its scale.
#[inline(always)]
fn pairs<I: Isa>(isa: I, block: &[u8], at: usize) -> [I::F; 4] {
    let d = isa.splat_f16(u16::from_le_bytes(*bytes(block, 0)));
    let mut v = [d; 4];
    for (i, v) in v.iter_mut().enumerate() {
        *v = isa.ternary_pairs(bytes(block, at + 4 * i), d);
    }
    v
}

impl Decoder<8> for TQ2_0 {
    type Unit = u8;
    const LEN: usize = tq2_0::BLOCK;
    const UNITS: usize = tq2_0::BLOCK_BYTES;
    const PARTS: usize = 2;

    /// A half of the block: byte i of 32 holds its weights i, 32+i, 64+i and 96+i.
    #[inline(always)]
    fn decode<I: Isa>(isa: I, block: &[u8], part: usize) -> [I::F; 8] {
        let d = isa.splat_f16(u16::from_le_bytes(*bytes(block, 64)));
        let mut v = [d; 8];
        for i in 0..2 {
            let quarters = isa.ternary_quarters(bytes(block, 32 * part + 16 * i), d);
            for (j, quarter) in quarters.into_iter().enumerate() {
                v[2 * j + i] = quarter;
            }
        }
        v
    }
}

impl Decoder<16> for TQ1_0 {
    type Unit = u8;
    const LEN: usize = tq1_0::BLOCK;
    const UNITS: usize = tq1_0::BLOCK_BYTES;
    const ROW_FIRST: bool = true;

    /// Five digits of 32 bytes, five of 16, and four of the last four bytes.
    #[inline(always)]
    fn decode<I: Isa>(isa: I, block: &[u8], _part: usize) -> [I::F; 16] {
        let d = isa.splat_f16(u16::from_le_bytes(*bytes(block, 52)));
        let mut v = [d; 16];
        for (digit, power) in POWERS.into_iter().enumerate() {
            let powers = [power; 16];
            v[2 * digit] = isa.ternary_digits(bytes(block, 0), &powers, d);
            v[2 * digit + 1] = isa.ternary_digits(bytes(block, 16), &powers, d);
            v[10 + digit] = isa.ternary_digits(bytes(block, 32), &powers, d);
        }
        let mut last = [0; 16];
        let mut powers = [0; 16];
        for i in 0..16 {
            last[i] = block[48 + i % 4];
            powers[i] = POWERS[i / 4];
        }
        v[15] = isa.ternary_digits(&last, &powers, d);
        v
    }
}

impl Decoder<8> for PTQ1_0 {
    type Unit = u8;
    const LEN: usize = 128;
    const UNITS: usize = PTQ1_0_BYTES;
    const ROW_FIRST: bool = true;

    /// Five digits of 16 bytes, five of 8, and four of the last two bytes.
    #[inline(always)]
    fn decode<I: Isa>(isa: I, block: &[u8], _part: usize) -> [I::F; 8] {
        let d = isa.splat_f16(u16::from_le_bytes(*bytes(block, 26)));
        let mut v = [d; 8];
        for (v, &power) in v.iter_mut().zip(&POWERS) {
            *v = isa.ternary_digits(bytes(block, 0), &[power; 16], d);
        }
        let mut last = [0; 48];
        let mut powers = [0; 48];
        for i in 0..40 {
            last[i] = block[16 + i % 8];
            powers[i] = POWERS[i / 8];
        }
        for i in 0..8 {
            last[40 + i] = block[24 + i % 2];
            powers[40 + i] = POWERS[i / 2];
        }
        for i in 0..3 {
            let (at, power) = (&last.as_chunks::<16>().0[i], &powers.as_chunks::<16>().0[i]);
            v[5 + i] = isa.ternary_digits(at, power, d);
        }
        v
    }
}
