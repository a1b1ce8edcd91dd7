//! Floats of 16 bits in words of 32, without a type for them, which not every device has: in integers, and exact.

use cubecl::prelude::*;

/// An IEEE half, from the lower 16 bits.
#[cube]
pub(crate) fn half(bits: u32) -> f32 {
    let sign = (bits & 0x8000u32) << 16u32;
    let magnitude = bits & 0x7fffu32;
    // Exponents begin at 2^-14 and not at 2^-126; the largest stays the one of infinity.
    let bias = select(magnitude >= 0x7c00u32, 0x7000_0000u32, 0x3800_0000u32);
    let normal = f32::reinterpret(sign | ((magnitude << 13u32) + bias));
    // Below 2^-14: units of 2^-24.
    let small = f32::cast_from(magnitude) * 5.960_464_5e-8f32;
    let small = f32::reinterpret(u32::reinterpret(small) | sign);
    select(magnitude < 0x400u32, small, normal)
}

/// A bfloat16, from the lower 16 bits.
#[cube]
pub(crate) fn bfloat(bits: u32) -> f32 {
    f32::reinterpret(bits << 16u32)
}

/// The IEEE half that is nearest, to even where two are.
#[cube]
pub(crate) fn to_half(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    let sign = (bits >> 16u32) & 0x8000u32;
    let magnitude = bits & 0x7fff_ffffu32;
    // The sum's last bit counts 2^-24, the unit of small halves.
    let small = u32::reinterpret(f32::reinterpret(magnitude) + 0.5f32) - 0x3f00_0000u32;
    let odd = (magnitude >> 13u32) & 1u32;
    // A carry out of the mantissa is the next exponent.
    let normal = (magnitude + 0xfffu32 + odd - 0x3800_0000u32) >> 13u32;
    let rounded = select(magnitude < 0x3880_0000u32, small, normal);
    // From 65520 on the nearest is infinity.
    let finite = select(magnitude >= 0x477f_f000u32, 0x7c00u32, rounded);
    sign | select(magnitude > 0x7f80_0000u32, 0x7e00u32, finite)
}
