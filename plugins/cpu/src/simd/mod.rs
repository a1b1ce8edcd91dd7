//! Sixteen `f32` lanes on whatever vectors the machine has.
//!
//! An algorithm is written once, as a `Kernel`, over the operations of `Isa`; `Level::run` compiles it
//! for AVX-512, for AVX2 and for the target's baseline, and picks one. Every operation of `Isa` gives the
//! same bits on every instruction set, so the kernels do too. (One generic algorithm over a small vector trait is
//! the scheme of the `memchr` crate; the proof by token is that of `pulp`.)
//!
//! # Numerics
//! Attention, the dense layers, the norms and the gates give the same bits on every instruction set, with any
//! number of threads, whatever the number of rows in a call and however a prompt is cut into chunks. (A NaN stays a
//! NaN; its payload is unspecified.) Every reduction has one order. The products with
//! [int8 activations](crate::dense::int8) state theirs; all others use this one:
//! - A dot product or a sum over `k` elements uses 16 lanes. Lane `l` starts at +0 and takes the elements
//!   `l`, `16 + l`, `32 + l`, … in ascending order, each by one fused multiply-add (one rounding). Elements
//!   past the end are skipped: lanes without one keep their value.
//! - The lanes are then added by one tree: `l + (l+8)`, `l + (l+4)`, `l + (l+2)`, `0 + 1`.
//! - Each row or each (query, head) is computed by the same operations, whatever else is in the call.
//!
//! Every instruction set has fused multiply-add, IEEE division and square root. x86-64 before AVX2 lacks the first;
//! there [`Portable`] computes the same rounding in double precision.
//!
//! What only [training](crate::training) needs has numerics of its own.

mod portable;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use half::f16;

pub use self::portable::Portable;
pub(crate) use self::portable::half_to_f32;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes of `f32` and the operations on them that the kernels of this module need.
///
/// All methods are `#[inline(always)]`: they have to be compiled into the function that enables the
/// instructions.
pub(crate) trait Isa: Copy + Send + Sync {
    /// Sixteen lanes.
    type F: Copy;
    /// Whether there are registers for a tile of 4 x 4 vectors (else for 2 x 2).
    const WIDE: bool;

    /// All lanes `v`.
    fn splat(self, v: f32) -> Self::F;
    /// All lanes the value of an IEEE half.
    fn splat_f16(self, bits: u16) -> Self::F;
    /// Sixteen values.
    fn load(self, v: &[f32; 16]) -> Self::F;
    /// Sixteen halves.
    fn load_f16(self, v: &[f16; 16]) -> Self::F;
    /// Sixteen little-endian `f32`.
    fn f32_bytes(self, v: &[u8; 64]) -> Self::F;
    /// Sixteen little-endian halves.
    fn f16_bytes(self, v: &[u8; 32]) -> Self::F;
    /// Sixteen little-endian `bf16`.
    fn bf16_bytes(self, v: &[u8; 32]) -> Self::F;
    /// Sixteen signed bytes.
    fn i8_bytes(self, v: &[u8; 16]) -> Self::F;
    /// The low nibbles less 8, and the high nibbles less 8.
    fn nibbles(self, v: &[u8; 16]) -> [Self::F; 2];
    /// Four times sixteen 6-bit values less 32, as Q6_K holds them: the low nibbles of `a` with bits 0..2 of
    /// `high`, those of `b` with bits 2..4, the high nibbles of `a` with bits 4..6, those of `b` with bits
    /// 6..8.
    fn sixes(self, a: &[u8; 16], b: &[u8; 16], high: &[u8; 16]) -> [Self::F; 4];
    /// Sixteen ternary weights times `d`: `d` times each 2-bit code less 1, four codes a byte, the lowest first.
    fn ternary_pairs(self, v: &[u8; 4], d: Self::F) -> Self::F;
    /// Four times sixteen ternary weights times `d`: `d` times the bits 0..2 of each byte less 1, then those of the
    /// bits 2..4, 4..6 and 6..8.
    fn ternary_quarters(self, v: &[u8; 16], d: Self::F) -> [Self::F; 4];
    /// Sixteen ternary weights times `d`: `d` times a base-3 digit of each byte less 1, as
    /// [`tq1_0`](bitnet_burn_formats::tq1_0) describes them. A digit is given by 256 * 3^i.
    fn ternary_digits(self, v: &[u8; 16], powers: &[u16; 16], d: Self::F) -> Self::F;
    /// Writes sixteen values.
    fn store(self, v: Self::F, to: &mut [f32; 16]);

    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a * b + c` in the first `n` lanes, `c` in the others.
    fn fma_first(self, n: usize, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The sum of the lanes by the tree of this module's numerics.
    fn sum(self, v: Self::F) -> f32;
    /// The [`sum`](Self::sum) of each of sixteen vectors.
    fn sums(self, v: [Self::F; 16]) -> Self::F;
    /// Transposes sixteen vectors.
    fn transpose(self, v: [Self::F; 16]) -> [Self::F; 16];

    /// `a * b + c` of single values, rounded once.
    fn fma1(self, a: f32, b: f32, c: f32) -> f32;

    /// Asks for the cache line at `p` (any address is allowed), for the second-level cache: what lies behind the
    /// loop's next steps would only push their data out of the first.
    fn prefetch(self, p: *const u8);

    /// Up to sixteen values, zeros in the lanes behind them.
    #[inline(always)]
    fn load_first(self, v: &[f32]) -> Self::F {
        let mut lanes = [0.0; LANES];
        lanes[..v.len()].copy_from_slice(v);
        self.load(&lanes)
    }
}

/// A computation that is compiled for every instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Out;
    /// Computes it; must be `#[inline(always)]`, as everything that it calls in its hot loops.
    fn run<I: Isa>(self, isa: I) -> Self::Out;
}

/// An instruction set that this machine has and this process may use.
///
/// The variants hold proofs that the CPU has the instructions; only [`Level::available`] makes them.
#[derive(Clone, Copy, Debug)]
pub enum Level {
    /// AVX-512 F, BW, VL, DQ.
    #[cfg(target_arch = "x86_64")]
    Avx512(x86_64::Avx512),
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(x86_64::Avx2),
    /// What the target's baseline has (on AArch64, NEON).
    Portable(Portable),
}

impl Level {
    /// The instruction sets that this machine has and that are not [masked](bitnet_burn_plugin::features::mask),
    /// best first.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let vectors = [x86_64::Avx512::new().map(Self::Avx512), x86_64::Avx2::new().map(Self::Avx2)];
        #[cfg(not(target_arch = "x86_64"))]
        let vectors = [None::<Self>; 0];
        vectors.into_iter().flatten().chain([Self::Portable(Portable)])
    }

    /// The best of them. Two looks at a cached word, so there is no need to keep the result.
    #[inline]
    pub fn best() -> Self {
        Self::available().next().unwrap_or(Self::Portable(Portable))
    }

    /// Runs a kernel with these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(isa) => x86_64::run_avx512(isa, kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => x86_64::run_avx2(isa, kernel),
            Self::Portable(isa) => kernel.run(isa),
        }
    }
}

/// `e^x` in `f32`, within 2 ulp for -87 <= x <= 88; zero below that, infinite above; NaN for NaN.
///
/// Range reduction by Cody and Waite, then a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2] with Cephes'
/// coefficients (`expf`), all by fused multiply-adds, so the same bits everywhere; branch-free, so that loops
/// over it vectorise.
#[inline(always)]
pub(crate) fn exp<I: Isa>(isa: I, x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = isa.fma1(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, the first with few enough bits that n times it is exact.
    let r = isa.fma1(n, -355.0 / 512.0, x);
    let r = isa.fma1(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    p = isa.fma1(p, r, 1.398_2e-3);
    p = isa.fma1(p, r, 8.333_452e-3);
    p = isa.fma1(p, r, 4.166_579_6e-2);
    p = isa.fma1(p, r, 1.666_666_5e-1);
    p = isa.fma1(p, r, 0.5);
    let p = isa.fma1(p, r * r, r) + 1.0;
    // 2^n, -126 <= n <= 127 within the range.
    let y = p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let y = if x < -87.0 { 0.0 } else { y };
    if x > 88.0 { f32::INFINITY } else { y }
}
