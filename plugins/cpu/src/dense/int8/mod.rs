//! Dense matrices of 8, 6 and 4 bits times int8 activations: an output projection (lm_head) at the speed of memory.
//!
//! With f32 activations ([`floats`](super::floats)) every weight becomes a float in registers, which for
//! Q6_K costs twice the time of reading it. With int8 activations one instruction multiplies sixteen weights and
//! more. The price is exactness: each activation moves by up to half a step of absmax / 127.
//!
//! The weights lie in [tiles](bitnet_burn_formats::dense_tiles), which hold the bits of their GGUF blocks.
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
mod linear;
mod scalar;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use bitnet_burn_formats::dense_tiles::{TILE_ROWS, TiledFormat};

pub use self::linear::{Activations, linear};

/// Activations that share one of the sums that [`Row`] has.
const fn part_len(format: TiledFormat) -> usize {
    match format {
        TiledFormat::Q8_0 | TiledFormat::Q4_0 => 32,
        TiledFormat::Q6_K => 16,
    }
}

/// The sums of a row's activations by parts, which take the place of the codes' offsets: appended to
/// `sums`.
fn sums_of_parts(format: TiledFormat, q: &[i8], sums: &mut Vec<i32>) {
    sums.extend(q.chunks_exact(part_len(format)).map(|part| part.iter().map(|&q| i32::from(q)).sum::<i32>()));
}

/// A quantised row of activations.
#[derive(Clone, Copy, Debug)]
struct Row<'a> {
    /// K values, none of them -128.
    q: &'a [i8],
    /// Their [`sums_of_parts`].
    sums: &'a [i32],
    /// a / 127.
    scale: f32,
}

/// An instruction set that this machine has and this process may use.
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
    /// The instruction sets that this machine has and that are not [masked](bitnet_burn_plugin::features::mask),
    /// best first.
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
        Self::available().next().unwrap_or(Self(Kind::Scalar(scalar::Scalar)))
    }

    /// The products of one tile with rows of activations.
    ///
    /// What follows the tile in memory is prefetched, as the next one to be asked for.
    ///
    /// # Arguments
    /// * `tile`: [`TiledFormat::tile_bytes`] of the rows' length
    /// * `rows`: rows of one length K
    /// * `y`: for each of `rows` the results of the tile's rows
    ///
    /// # Panics
    /// If a length does not fit.
    fn products(self, format: TiledFormat, tile: &[u8], rows: &[Row<'_>], y: &mut [[f32; TILE_ROWS]]) {
        assert_eq!(rows.len(), y.len(), "rows of results");
        for row in rows {
            assert_eq!(format.tile_bytes(row.q.len()), Some(tile.len()), "bytes of a tile");
            assert_eq!(row.sums.len(), row.q.len() / part_len(format), "sums of a row");
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
