//! Products of dense matrices of 8, 6 and 4 bits with int8 activations: what an output projection (lm_head)
//! computes.
//!
//! The weights lie in *tiles* of [`ROWS`] rows. A tile has the codes and scales of the rows' GGUF blocks
//! (Q8_0, Q6_K or Q4_0), nothing rounded and not a byte more, in the order in which they are multiplied: four
//! consecutive weights of row r in the 32-bit lane r of a 64-byte vector, as in [`tile`](crate::tile), so that
//! the sums of 16 rows grow side by side and all of a matrix is one sequential stream.
//!
//! | format | a block of 16 rows, one behind the other in a tile |
//! | --- | --- |
//! | Q8_0, 32 weights a row | 8 vectors: byte i of lane r of vector j is the i8 4j + i of row r; 16 f16 d |
//! | Q4_0, 32 weights a row | 4 vectors: byte i of lane r of vector j is code 8j + i, low nibble, and 8j + 4 + i, high; 16 f16 d |
//! | Q6_K, 256 weights a row | for each group of four of the parts s of 16 weights: 4 times 16 i8 scales, those of a part in all rows first; 4 times 3 vectors: byte i of lane r has the low four bits of the codes 16s + i and 16s + 4 + i, then those of 16s + 8 + i and 16s + 12 + i, then the high two bits of all four, the first lowest. Behind the groups: 16 f16 d |
//!
//! # Numerics
//! For a row of activations x ~ q * (a / 127) and a row of weights in blocks b with scale d_b,
//!
//! ```text
//! isum_b = sum over the block of w * q                                 exact, in i32
//! y      = ((+0 + isum_0 * d_0) + isum_1 * d_1 + ...) * (a / 127)      in f32
//! ```
//!
//! w is the i8 of Q8_0, the code less 8 of Q4_0, the code less 32 times its part's i8 scale of Q6_K. (The
//! last is at most 256 * 32 * 128 * 128 = 2^27.) Blocks are added in ascending order; isum_b is rounded to
//! f32 (to even), and so are product and sum, separately. Every instruction set computes these operations in
//! this order, so the results are the same bits everywhere, with any number of threads and rows.

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod aarch64;
mod generic;
mod scalar;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::sync::OnceLock;

/// Weight rows of a tile.
pub const ROWS: usize = 16;

/// The formats of weights, by the names of GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the names are the field's")]
pub enum Format {
    /// 8 bits and an f16 scale per 32.
    Q8_0,
    /// 6 bits, an i8 scale per 16 and an f16 scale per 256.
    Q6_K,
    /// 4 bits and an f16 scale per 32.
    Q4_0,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::Q8_0, Self::Q6_K, Self::Q4_0];

    /// Weights of a row in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => 32,
            Self::Q6_K => 256,
        }
    }

    /// Bytes of a block of [`ROWS`] rows: 16 times what GGUF takes.
    pub const fn block_bytes(self) -> usize {
        ROWS * match self {
            Self::Q8_0 => 34,
            Self::Q6_K => 210,
            Self::Q4_0 => 18,
        }
    }

    /// Bytes of a tile of rows of `k` weights; `None` where `k` is no whole number of blocks, or that is too
    /// large.
    pub const fn tile_bytes(self, k: usize) -> Option<usize> {
        if k.is_multiple_of(self.block_len()) {
            (k / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }

    /// Activations that share one of the sums that [`Row`] has.
    const fn part_len(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => 32,
            Self::Q6_K => 16,
        }
    }

    /// The sums of a row's activations by parts, which take the place of the codes' offsets: appended to
    /// `sums`.
    pub fn sums(self, q: &[i8], sums: &mut Vec<i32>) {
        sums.extend(
            q.chunks_exact(self.part_len()).map(|part| part.iter().map(|&q| i32::from(q)).sum::<i32>()),
        );
    }
}

/// A quantised row of activations.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// K values, none of them -128.
    pub q: &'a [i8],
    /// What [`Format::sums`] makes of them.
    pub sums: &'a [i32],
    /// a / 127.
    pub scale: f32,
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug)]
pub struct Level(Kind);

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// AVX-512 F, BW, VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512(x86_64::Avx512),
    /// AVX2 and AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni(x86_64::By256<x86_64::AvxVnni>),
    /// AVX2 with F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(x86_64::By256<x86_64::Avx2>),
    /// NEON with the dot-product extension.
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Dotprod(aarch64::Neon<aarch64::Dotprod>),
    /// NEON.
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Neon(aarch64::Neon<aarch64::Plain>),
    /// What the target's baseline has.
    Scalar(scalar::Scalar),
}

impl Level {
    /// The instruction sets that this machine has, best first.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let levels = [
            x86_64::Avx512::new().map(Kind::Avx512),
            x86_64::AvxVnni::new().map(Kind::AvxVnni),
            x86_64::Avx2::new().map(Kind::Avx2),
        ];
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        let levels = [aarch64::Dotprod::new().map(Kind::Dotprod), aarch64::Plain::new().map(Kind::Neon)];
        #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little"))))]
        let levels = [None::<Kind>; 0];
        levels.into_iter().flatten().chain([Kind::Scalar(scalar::Scalar)]).map(Self)
    }

    /// The best of them.
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().next().unwrap_or(Self(Kind::Scalar(scalar::Scalar))))
    }

    /// The products of one tile with rows of activations.
    ///
    /// What follows the tile in memory is prefetched, as the next one to be asked for.
    ///
    /// # Arguments
    /// * `tile`: [`Format::tile_bytes`] of the rows' length
    /// * `rows`: rows of one length K
    /// * `y`: for each of `rows` the results of the tile's rows
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn products(self, format: Format, tile: &[u8], rows: &[Row<'_>], y: &mut [[f32; ROWS]]) {
        assert_eq!(rows.len(), y.len(), "rows of results");
        for row in rows {
            assert_eq!(format.tile_bytes(row.q.len()), Some(tile.len()), "bytes of a tile");
            assert_eq!(row.sums.len(), row.q.len() / format.part_len(), "sums of a row");
        }
        let job = generic::Job { format, tile, rows, y };
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(isa) => x86_64::run_avx512(isa, job),
            #[cfg(target_arch = "x86_64")]
            Kind::AvxVnni(isa) => x86_64::run_avx_vnni(isa, job),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(isa) => x86_64::run_avx2(isa, job),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Kind::Dotprod(isa) => aarch64::run_dotprod(isa, job),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Kind::Neon(isa) => aarch64::run_neon(isa, job),
            Kind::Scalar(isa) => job.run(isa),
        }
    }
}

/// `f32` from the bits of a half: the exponent is re-biased by an exact multiplication, which also
/// normalises.
#[inline(always)]
pub fn half_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let scaled = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    let quiet = if magnitude > 0x0f80_0000 { 0x0040_0000 } else { 0 };
    f32::from_bits(scaled | special | quiet | (u32::from(bits & 0x8000) << 16))
}
