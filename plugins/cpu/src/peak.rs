//! The most that a core can do: multiply on registers alone, with the kernels' instruction; and read.
//!
//! Kernels stay below the first, since each also loads, unpacks and adds up. With weights in memory they stay below
//! the second too. Times are compared with this roof; a figure above it is a mistake in the measurement.

/// Multiplies int8 values and adds the products up for a while on this thread, with the widest instruction that
/// the kernels of this crate would use here; returns how many multiply-adds that were. `None` where the crate
/// has portable kernels only.
pub fn multiply_adds(rounds: u32) -> Option<u64> {
    let per_round = run(rounds.max(1), true)?;
    Some(u64::from(rounds.max(1)) * per_round)
}

/// The same with the widest instruction on vectors, where [`multiply_adds`] may use a matrix unit.
pub fn vector_multiply_adds(rounds: u32) -> Option<u64> {
    let per_round = run(rounds.max(1), false)?;
    Some(u64::from(rounds.max(1)) * per_round)
}

/// Reads bytes, and does nothing with them but to add them up as words, in several independent sums so that
/// loads are all it waits for; up to 511 bytes at the end are left out.
pub fn read(bytes: &[u8]) -> u64 {
    const LANES: usize = 64;
    let mut sums = [0u64; LANES];
    for block in bytes.as_chunks::<{ LANES * 8 }>().0 {
        for (sum, word) in sums.iter_mut().zip(block.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.iter().fold(0, |a, &b| a.wrapping_add(b))
}

/// Independent sums: more than an instruction's latency times the units that execute it.
#[cfg(target_arch = "x86_64")]
fn run(rounds: u32, matrix_unit: bool) -> Option<u64> {
    use std::arch::asm;

    use bitnet_burn_plugin::features::{self, Features};

    const AVX512_VNNI: Features = Features::of("avx512f,avx512vnni");
    const AVX_VNNI: Features = Features::of("avxvnni");
    const AVX2: Features = Features::of("avx2");

    // What the registers hold is zero, and does not matter to integers.
    macro_rules! spin {
        ([$($line:expr),+ $(,)?]) => {
            // SAFETY: the instructions' features were detected; they read and write vector registers alone,
            // which the ABI's clobbers name all of, and count `rounds` down, which is at least 1.
            unsafe {
                asm!(
                    "vzeroall",
                    "2:",
                    $($line,)+
                    "dec ecx",
                    "jnz 2b",
                    "vzeroupper",
                    inout("ecx") rounds => _,
                    clobber_abi("sysv64"),
                    options(nomem, nostack),
                )
            }
        };
    }
    macro_rules! dot {
        ($instruction:literal, $register:literal, [$($sum:literal)+]) => {
            spin!([$(concat!(
                $instruction, " ", $register, $sum, ", ", $register, "14, ", $register, "15"
            )),+])
        };
    }
    macro_rules! multiply_and_add {
        ([$($sum:literal $product:literal)+]) => {
            spin!([$(concat!(
                "vpmaddubsw ymm", $product, ", ymm14, ymm15\n",
                "vpaddw ymm", $sum, ", ymm", $sum, ", ymm", $product
            )),+])
        };
    }

    if let Some(per_round) =
        matrix_unit.then(|| crate::ternary::arch::x86_64::amx::multiply_adds(rounds)).flatten()
    {
        Some(per_round)
    } else if features::has(AVX512_VNNI) {
        dot!("vpdpbusd", "zmm", [0 1 2 3 4 5 6 7 8 9 10 11]);
        Some(12 * 64)
    } else if features::has(AVX_VNNI) {
        dot!("{{vex}} vpdpbusd", "ymm", [0 1 2 3 4 5 6 7 8 9 10 11]);
        Some(12 * 32)
    } else if features::has(AVX2) {
        multiply_and_add!([0 7 1 8 2 9 3 10 4 11 5 12 6 13]);
        Some(7 * 32)
    } else {
        None
    }
}

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
fn run(rounds: u32, _: bool) -> Option<u64> {
    use std::arch::asm;

    use bitnet_burn_plugin::features::{self, Features};

    const I8MM: Features = Features::of("neon,i8mm");
    const DOTPROD: Features = Features::of("neon,dotprod");

    macro_rules! spin {
        ($name:ident, $features:literal, $instruction:literal, $sums:literal, $operands:literal) => {
            #[target_feature(enable = $features)]
            fn $name(rounds: u32) {
                // SAFETY: the function has the instructions' features; they write the vector registers that
                // the ABI's clobbers name, and count `rounds` down, which is at least 1.
                unsafe {
                    asm!(
                        "2:",
                        spin!(@ $instruction, $sums, $operands, 0),
                        spin!(@ $instruction, $sums, $operands, 1),
                        spin!(@ $instruction, $sums, $operands, 2),
                        spin!(@ $instruction, $sums, $operands, 3),
                        spin!(@ $instruction, $sums, $operands, 4),
                        spin!(@ $instruction, $sums, $operands, 5),
                        spin!(@ $instruction, $sums, $operands, 6),
                        spin!(@ $instruction, $sums, $operands, 7),
                        spin!(@ $instruction, $sums, $operands, 16),
                        spin!(@ $instruction, $sums, $operands, 17),
                        spin!(@ $instruction, $sums, $operands, 18),
                        spin!(@ $instruction, $sums, $operands, 19),
                        spin!(@ $instruction, $sums, $operands, 20),
                        spin!(@ $instruction, $sums, $operands, 21),
                        spin!(@ $instruction, $sums, $operands, 22),
                        spin!(@ $instruction, $sums, $operands, 23),
                        "subs w9, w9, #1",
                        "b.ne 2b",
                        inout("x9") rounds => _,
                        clobber_abi("C"),
                        options(nomem, nostack),
                    )
                }
            }
        };
        (@ $instruction:literal, $sums:literal, $operands:literal, $sum:literal) => {
            concat!($instruction, " v", $sum, ".", $sums, ", ", $operands)
        };
    }
    spin!(matrix, "neon,i8mm", "smmla", "4s", "v30.16b, v31.16b");
    spin!(dot, "neon,dotprod", "sdot", "4s", "v30.16b, v31.16b");
    spin!(long, "neon", "smlal", "8h", "v30.8b, v31.8b");

    // SAFETY: the features were detected.
    unsafe {
        if features::has(I8MM) {
            matrix(rounds);
            Some(16 * 32)
        } else if features::has(DOTPROD) {
            dot(rounds);
            Some(16 * 16)
        } else {
            long(rounds);
            Some(16 * 8)
        }
    }
}

#[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little"))))]
fn run(_: u32, _: bool) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::multiply_adds;

    #[test]
    fn the_count_is_that_of_the_rounds() {
        let Some(one) = multiply_adds(1) else { return };
        assert!(one >= 64);
        assert_eq!(multiply_adds(1000), Some(1000 * one));
        assert_eq!(multiply_adds(0), Some(one));
        assert!(super::vector_multiply_adds(1).is_some_and(|vector| (64..=one).contains(&vector)));
    }
}
