//! How the weights of each format become vectors of f32.

use bitnet_burn_formats::dense::{PQ2_0_BYTES, Q2_0_BYTES, Q4_0_BYTES, Q6_K_BYTES, Q8_0_BYTES, QK, QK_K};
use bitnet_burn_formats::tq2_0;

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
    /// Whether rows are always decoded as a whole, by [`DenseFormat::decode_row`](bitnet_burn_formats::DenseFormat), before
    /// they are multiplied.
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

/// Any format, decoded by rows.
pub(super) struct ByRow;

impl Decoder<2> for ByRow {
    type Unit = u8;
    const LEN: usize = 32;
    const UNITS: usize = 0;
    const ROW_FIRST: bool = true;

    #[inline(always)]
    fn decode<I: Isa>(_isa: I, _step: &[u8], _part: usize) -> [I::F; 2] {
        unreachable!("rows are decoded as a whole")
    }
}

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

#[allow(non_camel_case_types)]
pub(super) struct Q2_0;

#[allow(non_camel_case_types)]
pub(super) struct PQ2_0;

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
