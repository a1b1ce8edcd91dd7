//! Look-up tables instead of multiplications: the private packings `tl1x32` ("TL1", pairs of weights) and
//! `tl2x32` ("TL2", triples), and the tables that they index, after bitnet.cpp (arXiv 2502.11880, section 3).
//!
//! # Weights
//! A group of `G` weights w0, w1 (and w2) of a row, 2 for TL1 and 3 for TL2, is the number v that has them as
//! its balanced ternary digits: 3 w0 + w1, or 9 w0 + 3 w1 + w2. What is stored is
//!
//! ```text
//! TL1   v + 4           0 to 8, 4 bits                    2 bits a weight
//! TL2   |v|             0 to 13, 4 bits, and 1 bit: v < 0  1.67 bits a weight
//! ```
//!
//! Step j of a block of 32 rows has the eight groups k = 8G j + G i .. 8G j + G i + G, i = 0 .. 7, of each row:
//! four vectors of 32 bytes, and a fifth for TL2. Byte r of vector v is row r's, with group 2v in the low
//! nibble and 2v + 1 in the high one; bit 7 - i of byte r of the fifth is the sign of group i. The steps of a
//! block follow each other, as do the blocks. Rows behind N and weights behind K are packed as weights of zero.
//!
//! # Tables
//! For each group of an activation row there are the 16 sums w0 x0 + w1 x1 (+ w2 x2) that the four bits can
//! stand for. They take 10 bits, and byte permutations look bytes up: a sum s is split into two small digits,
//! s = 27 high + low, neither beyond 15 in magnitude. Eight of them stay within 8 bits, so that the sums of a
//! step grow in bytes and are put together once a step; with the usual split, into the high and the low byte,
//! each look-up would have to be widened by itself. Nothing is rounded: this is the lossless kind.

use std::ffi::CStr;
use std::ops::Range;

use bitnet_burn_plugin::sdk::{ActivationsRef, KernelError, KernelResult, OutputTile, WeightsRef};
use bitnet_burn_plugin::{canonical, layouts};

use crate::ternary::generic::{self, TileJob};
use crate::ternary::tile::BLOCK_ROWS;

/// The name in the ABI of the layout with groups of `G`.
pub const fn layout<const G: usize>() -> &'static CStr {
    const { assert!(G == 2 || G == 3, "there are TL1 and TL2") };
    if G == 2 { c"tl1x32" } else { c"tl2x32" }
}

/// Groups of a row in a step.
pub const GROUPS: usize = 8;
/// Bytes of the indices in a step: a nibble for each group of each row.
pub const INDEX_BYTES: usize = BLOCK_ROWS * GROUPS / 2;
/// Bytes of the tables of a group: the low digits of 16 sums, then the high ones.
pub const TABLE_BYTES: usize = 32;
/// The weight of the high digit.
pub const RADIX: i16 = 27;
/// Steps whose sums an i16 takes: each adds up to 8 * 3 * 128 in magnitude, ten times that is 30720.
pub(crate) const STEPS_PER_FLUSH: usize = 10;
/// Weights of a row up to which the kernels go: its tables take 4 MiB there.
pub(crate) const MAX_K: u64 = 1 << 18;

/// Weights of a row in a step.
pub const fn step<const G: usize>() -> usize {
    GROUPS * G
}

/// Bytes of a block's step.
pub const fn step_bytes<const G: usize>() -> usize {
    if G == 2 { INDEX_BYTES } else { INDEX_BYTES + BLOCK_ROWS }
}

/// Bytes of a block of rows of `k` weights.
pub const fn block_bytes<const G: usize>(k: usize) -> usize {
    k.div_ceil(step::<G>()) * step_bytes::<G>()
}

/// Bytes of the tables for a row of `k` activations.
pub const fn tables_bytes<const G: usize>(k: usize) -> usize {
    k.div_ceil(step::<G>()) * GROUPS * TABLE_BYTES
}

/// The index and the sign of a group of weights (-1, 0, 1); of others, any index of four bits.
#[inline(always)]
fn encode<const G: usize>(weights: &[i8]) -> (u8, bool) {
    let number = weights[..G].iter().fold(0, |number, weight| 3 * number + weight);
    if G == 2 { ((number + 4) as u8 & 15, false) } else { (number.unsigned_abs() & 15, number < 0) }
}

/// The weights that an index stands for, with the sign +; the indices that no weights have stand for zeros.
const fn decode<const G: usize>(index: u8) -> [i8; G] {
    let mut weights = [0; G];
    // The digits 0, 1, 2 of the number that is larger by 11 or 111 in ternary are the weights + 1.
    let (mut rest, end) = if G == 2 { (index, 9) } else { (index + 13, 27) };
    if rest < end {
        let mut i = G;
        while i > 0 {
            i -= 1;
            weights[i] = (rest % 3) as i8 - 1;
            rest /= 3;
        }
    }
    weights
}

/// Packs `rows` of canonical weights (beginning at a block, ending at a block's end or at row N) into
/// `out`, which has [`block_bytes`] for each block that the range touches.
///
/// # Errors
/// If the range or a buffer's length does not fit.
pub fn pack<const G: usize>(w: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
    layouts::check_range(w, &rows)?;
    layouts::check_canonical(w)?;
    let (row_bytes, bytes) = (canonical::row_bytes(w.k()), block_bytes::<G>(w.k()));
    if out.len() != rows.len().div_ceil(BLOCK_ROWS) * bytes {
        return Err(KernelError::invalid(format!("a packing of {} bytes has the wrong size", out.len())));
    }
    let mut weights = vec![0i8; w.k().next_multiple_of(step::<G>())];
    for (block, out) in out.chunks_exact_mut(bytes).enumerate() {
        for r in 0..BLOCK_ROWS {
            let row = rows.start + block * BLOCK_ROWS + r;
            if row < rows.end {
                let row = &w.data()[row * row_bytes..][..row_bytes];
                canonical::unpack_row(row, &mut weights[..w.k()]);
            } else {
                weights.fill(0);
            }
            let steps = out.chunks_exact_mut(step_bytes::<G>());
            for (weights, step) in weights.chunks_exact(step::<G>()).zip(steps) {
                let mut signs = 0;
                for (v, weights) in weights.chunks_exact(2 * G).enumerate() {
                    let (low, high) = (encode::<G>(weights), encode::<G>(&weights[G..]));
                    step[BLOCK_ROWS * v + r] = low.0 | high.0 << 4;
                    signs = signs << 2 | u8::from(low.1) << 1 | u8::from(high.1);
                }
                if G == 3 {
                    step[INDEX_BYTES + r] = signs;
                }
            }
        }
    }
    Ok(())
}

/// The inverse of [`pack`]: writes the canonical `rows` to `out`.
///
/// # Errors
/// If the range or a buffer's length does not fit.
pub fn unpack<const G: usize>(w: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
    layouts::check_range(w, &rows)?;
    layouts::check_packed(w, block_bytes::<G>(w.k()))?;
    let (row_bytes, bytes) = (canonical::row_bytes(w.k()), block_bytes::<G>(w.k()));
    if out.len() != rows.len() * row_bytes {
        return Err(KernelError::invalid(format!(
            "{} bytes for canonical rows are the wrong size",
            out.len()
        )));
    }
    let mut weights = vec![0i8; w.k().next_multiple_of(step::<G>())];
    for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
        let (block, r) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
        let steps = w.data()[block * bytes..][..bytes].chunks_exact(step_bytes::<G>());
        for (step, weights) in steps.zip(weights.chunks_exact_mut(step::<G>())) {
            let signs = if G == 3 { step[INDEX_BYTES + r] } else { 0 };
            for (i, weights) in weights.chunks_exact_mut(G).enumerate() {
                let index = step[BLOCK_ROWS * (i / 2) + r] >> (4 * (i % 2)) & 15;
                weights.copy_from_slice(&decode::<G>(index));
                if signs << i & 0x80 != 0 {
                    weights.iter_mut().for_each(|w| *w = -*w);
                }
            }
        }
        canonical::pack_row(&weights[..w.k()], out);
    }
    Ok(())
}

/// The weight of each activation of a group in each of the 16 sums.
const fn coefficients<const G: usize>() -> [[i16; 16]; G] {
    let mut coefficients = [[0; 16]; G];
    let mut index = 0;
    while index < 16 {
        let weights = decode::<G>(index as u8);
        let mut i = 0;
        while i < G {
            coefficients[i][index] = weights[i] as i16;
            i += 1;
        }
        index += 1;
    }
    coefficients
}

/// The digits low and high of `sum` (-384 to 384), both from -15 to 15: sum = [`RADIX`] high + low.
#[inline(always)]
fn digits(sum: i16) -> (i8, i8) {
    // Division by 27, rounded or nearly so.
    let high = (sum * 19 + 256) >> 9;
    ((sum - RADIX * high) as i8, high as i8)
}

/// Fills a row's tables, [`tables_bytes`] long, from its activations.
#[inline(always)]
fn fill_tables<const G: usize>(x: &[i8], tables: &mut [u8]) {
    let coefficients = const { coefficients::<G>() };
    for (x, tables) in x.chunks(step::<G>()).zip(tables.chunks_exact_mut(GROUPS * TABLE_BYTES)) {
        // The weights behind the last activation are zeros; so are these.
        let mut groups = [[0; G]; GROUPS];
        groups.as_flattened_mut()[..x.len()].copy_from_slice(x);
        for (x, table) in groups.iter().zip(tables.as_chunks_mut::<TABLE_BYTES>().0) {
            // Arrays of a fixed length, which compilers make vectors of.
            let mut sums = [0i16; 16];
            for (x, coefficients) in x.iter().zip(&coefficients) {
                for entry in 0..16 {
                    sums[entry] += i16::from(*x) * coefficients[entry];
                }
            }
            for entry in 0..16 {
                let (low, high) = digits(sums[entry]);
                (table[entry], table[16 + entry]) = (low as u8, high as u8);
            }
        }
    }
}

/// Fills the tables of all activation rows, one row's behind the other's.
///
/// # Errors
/// If the workspace is too small.
#[inline(always)]
pub(crate) fn prepare<const G: usize>(x: &ActivationsRef, workspace: &mut [u8]) -> KernelResult {
    check_workspace::<G>(x, workspace)?;
    for (m, tables) in workspace.chunks_exact_mut(tables_bytes::<G>(x.k())).enumerate().take(x.m()) {
        fill_tables::<G>(x.row(m), tables);
    }
    Ok(())
}

/// That a workspace has the tables of all activation rows.
fn check_workspace<const G: usize>(x: &ActivationsRef, workspace: &[u8]) -> KernelResult {
    match x.m().checked_mul(tables_bytes::<G>(x.k())) {
        Some(bytes) if workspace.len() >= bytes => Ok(()),
        _ => Err(KernelError::invalid(format!("a workspace of {} bytes is too small", workspace.len()))),
    }
}

/// Sums of blocks, from an instruction set's look-ups.
///
/// # Safety
/// The CPU has the implementation's features; `w` points to `B` blocks of `steps` steps of [`step_bytes`],
/// `tables` to the [`TABLE_BYTES`] of [`GROUPS`] groups for each step; all readable.
pub(crate) trait TableMicro {
    /// Sums w * x of the 32 rows of `B` blocks, 1 or 2, with one activation row, for groups of `G` weights. Two
    /// blocks share what is read of the tables, which are larger than their weights.
    #[allow(clippy::missing_safety_doc, reason = "on the trait")]
    unsafe fn gemv<const G: usize, const B: usize>(
        w: *const u8,
        steps: usize,
        tables: *const u8,
    ) -> [[i32; BLOCK_ROWS]; B];
}

/// The arguments of a matmul with weights in groups of `G`, checked against each other.
pub(crate) struct TableJob<'a, const G: usize> {
    tile: TileJob<'a>,
    /// What [`prepare`] wrote.
    tables: &'a [u8],
}

impl<'a, const G: usize> TableJob<'a, G> {
    /// Checks that the buffers have the sizes that the kernels go by.
    pub(crate) fn new(
        w: &'a WeightsRef,
        x: &'a ActivationsRef,
        workspace: &'a [u8],
        y: &'a mut OutputTile,
    ) -> Result<Self, KernelError> {
        let tile = TileJob::with_step_bytes(w, x, y, step::<G>(), step_bytes::<G>())?;
        check_workspace::<G>(x, workspace)?;
        Ok(Self { tile, tables: workspace })
    }

    /// Computes the tile, one activation row after the other: each has tables of its own, and only the
    /// weights are still in cache when the next row's turn comes.
    ///
    /// # Safety
    /// The CPU has the features of `K`.
    #[inline(always)]
    pub(crate) unsafe fn run<K: TableMicro>(mut self) {
        let (ns, ms) = (self.tile.y.rows_n(), self.tile.y.rows_m());
        for chunk in generic::chunks(ms, generic::rows_in_cache(tables_bytes::<G>(self.tile.x.k()))) {
            for n in ns.clone().step_by(2 * BLOCK_ROWS) {
                for m in chunk.clone() {
                    // SAFETY: the caller's promise; (m, n) begins a block of the tile, behind which there is
                    // another one in the second case.
                    unsafe {
                        match ns.end - n {
                            1..=BLOCK_ROWS => self.blocks::<K, 1>(m, n),
                            _ => self.blocks::<K, 2>(m, n),
                        }
                    }
                }
            }
        }
    }

    /// Computes y[m, n .. n + 32 B], cut off at the tile's end.
    ///
    /// # Safety
    /// The CPU has the features of `K`.
    #[inline(always)]
    unsafe fn blocks<K: TableMicro, const B: usize>(&mut self, m: usize, n: usize) {
        let bytes = tables_bytes::<G>(self.tile.x.k());
        let (weights, tables) = (self.tile.blocks(n, B), self.tables[m * bytes..][..bytes].as_ptr());
        // SAFETY: a block has `steps` steps, and the tables have as many. Features: the caller.
        let sums = unsafe { K::gemv::<G, B>(weights, self.tile.steps, tables) };
        for (b, sums) in sums.iter().enumerate() {
            self.tile.store_row(m, n + b * BLOCK_ROWS, sums, 0);
        }
    }
}

/// Declares `Tables<2>` and `Tables<3>`, the kernels of an instruction set for TL1 and TL2.
///
/// The host calls a kernel only on a CPU that has its features; the kernels ask once more (a cached
/// look-up), so that calling one elsewhere is an error and not undefined behaviour.
macro_rules! kernels {
    ($micro:ty, feature: $feature:tt, tl1: $tl1:literal, tl2: $tl2:literal $(,)?) => {
        /// 32-row blocks of the look-up layout with groups of `G` weights: 2 for TL1, 3 for TL2.
        pub(crate) struct Tables<const G: usize>;

        impl<const G: usize> bitnet_burn_plugin::sdk::TernaryKernel for Tables<G> {
            const NAME: &'static std::ffi::CStr = if G == 2 { $tl1 } else { $tl2 };
            const LAYOUT: Option<&'static std::ffi::CStr> = Some($crate::ternary::lut::layout::<G>());
            const FEATURES: &'static std::ffi::CStr =
                match std::ffi::CStr::from_bytes_with_nul(concat!($feature, "\0").as_bytes()) {
                    Ok(feature) => feature,
                    Err(_) => panic!("a feature contains no NUL"),
                };
            const ROW_GRANULE: usize = $crate::ternary::tile::BLOCK_ROWS;

            fn supports(signature: &bitnet_burn_plugin::abi::Signature) -> bool {
                $crate::ternary::generic::supports(signature, $crate::ternary::lut::MAX_K)
            }

            fn granule_bytes(k: usize) -> usize {
                $crate::ternary::lut::block_bytes::<G>(k)
            }

            fn pack(
                canonical: &bitnet_burn_plugin::sdk::WeightsRef,
                rows: std::ops::Range<usize>,
                out: &mut [u8],
            ) -> bitnet_burn_plugin::sdk::KernelResult {
                $crate::ternary::lut::pack::<G>(canonical, rows, out)
            }

            fn unpack(
                packed: &bitnet_burn_plugin::sdk::WeightsRef,
                rows: std::ops::Range<usize>,
                out: &mut [u8],
            ) -> bitnet_burn_plugin::sdk::KernelResult {
                $crate::ternary::lut::unpack::<G>(packed, rows, out)
            }

            fn workspace_size(m: usize, k: usize) -> usize {
                m.saturating_mul($crate::ternary::lut::tables_bytes::<G>(k))
            }

            fn prepare(
                x: &bitnet_burn_plugin::sdk::ActivationsRef,
                workspace: &mut [u8],
            ) -> bitnet_burn_plugin::sdk::KernelResult {
                #[target_feature(enable = $feature)]
                fn prepare<const G: usize>(
                    x: &bitnet_burn_plugin::sdk::ActivationsRef,
                    workspace: &mut [u8],
                ) -> bitnet_burn_plugin::sdk::KernelResult {
                    $crate::ternary::lut::prepare::<G>(x, workspace)
                }
                check_features()?;
                // SAFETY: the feature was detected.
                unsafe { prepare::<G>(x, workspace) }
            }

            fn run(
                w: &bitnet_burn_plugin::sdk::WeightsRef,
                x: &bitnet_burn_plugin::sdk::ActivationsRef,
                workspace: &[u8],
                y: &mut bitnet_burn_plugin::sdk::OutputTile,
            ) -> bitnet_burn_plugin::sdk::KernelResult {
                #[target_feature(enable = $feature)]
                fn run<const G: usize>(job: $crate::ternary::lut::TableJob<G>) {
                    // SAFETY: this function's feature is the micro-kernel's.
                    unsafe { job.run::<$micro>() }
                }
                check_features()?;
                let job = $crate::ternary::lut::TableJob::<G>::new(w, x, workspace, y)?;
                // SAFETY: the feature was detected.
                unsafe { run(job) };
                Ok(())
            }
        }

        fn check_features() -> bitnet_burn_plugin::sdk::KernelResult {
            const NEEDED: bitnet_burn_plugin::features::Features =
                bitnet_burn_plugin::features::Features::of($feature);
            match bitnet_burn_plugin::features::has(NEEDED) {
                true => Ok(()),
                false => Err(bitnet_burn_plugin::sdk::KernelError::unsupported(concat!(
                    "this CPU lacks ",
                    $feature
                ))),
            }
        }
    };
}
pub(crate) use kernels;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sum_is_its_two_digits_and_eight_of_them_stay_in_a_byte() {
        for sum in -3 * 128..=3 * 128 {
            let (low, high) = digits(sum);
            assert_eq!(i16::from(low) + RADIX * i16::from(high), sum);
            assert!(low.abs() <= 15 && high.abs() <= 15, "{sum}: {low} {high}");
        }
    }

    /// The formula of the module's documentation.
    fn number(weights: &[i8]) -> i32 {
        weights.iter().fold(0, |number, &w| 3 * number + i32::from(w))
    }

    #[test]
    fn tables_hold_the_sums_that_the_indices_stand_for() {
        fn check<const G: usize>() {
            let mut x: Vec<i8> = (0..100).map(|i| (i * 37 % 256) as u8 as i8).collect();
            x[..6].copy_from_slice(&[-128, -128, -128, 127, 127, 127]);
            let mut tables = vec![0xff; tables_bytes::<G>(x.len())];
            fill_tables::<G>(&x, &mut tables);
            x.resize(x.len().next_multiple_of(8 * G), 0);
            for (x, table) in x.chunks(G).zip(tables.chunks(32)) {
                for group in 0..3usize.pow(G as u32) {
                    let weights: Vec<i8> =
                        (0..G).map(|i| (group / 3usize.pow(i as u32) % 3) as i8 - 1).collect();
                    let (index, sign) = match G {
                        2 => (number(&weights) + 4, 1),
                        _ => (number(&weights).abs(), number(&weights).signum()),
                    };
                    let digit = |at: i32| i32::from(table[at as usize] as i8);
                    let sum: i32 = weights.iter().zip(x).map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
                    assert_eq!(sign * (digit(index) + 27 * digit(16 + index)), sum, "{weights:?} {x:?}");
                }
            }
        }
        check::<2>();
        check::<3>();
    }

    #[test]
    fn packing_is_the_documented_layout_and_unpacks_to_what_it_was() {
        fn check<const G: usize>(n: usize, k: usize) {
            let mut canonical_bytes = Vec::new();
            for row in 0..n {
                let weights: Vec<i8> = (0..k).map(|i| ((row * 31 + i * 7 + i / 5) % 3) as i8 - 1).collect();
                let mut bytes = vec![0; canonical::row_bytes(k)];
                canonical::pack_row(&weights, &mut bytes);
                canonical_bytes.extend(bytes);
            }
            let w = WeightsRef::new(n, k, 1.0, &canonical_bytes);
            let mut packed = vec![0xff; n.div_ceil(32) * block_bytes::<G>(k)];
            pack::<G>(&w, 0..n, &mut packed).unwrap();
            let step_bytes = if G == 2 { 128 } else { 160 };
            let steps = k.div_ceil(8 * G);
            assert_eq!(packed.len(), n.div_ceil(32) * steps * step_bytes);
            for row in 0..n.next_multiple_of(32) {
                for group in 0..8 * steps {
                    let (j, i, r) = (group / 8, group % 8, row % 32);
                    let step = &packed[(row / 32 * steps + j) * step_bytes..][..step_bytes];
                    let index = i32::from(step[32 * (i / 2) + r] >> (4 * (i % 2)) & 15);
                    let stored = match G {
                        2 => index - 4,
                        _ if step[128 + r] >> (7 - i) & 1 == 1 => -index,
                        _ => index,
                    };
                    let weights: Vec<i8> = (G * group..G * group + G)
                        .map(|i| if row < n && i < k { w.canonical_row(row).weight(i) } else { 0 })
                        .collect();
                    assert_eq!(stored, number(&weights), "n {n} k {k} row {row} group {group}");
                }
            }
            let mut back = vec![0xff; canonical_bytes.len()];
            unpack::<G>(&WeightsRef::new(n, k, 1.0, &packed), 0..n, &mut back).unwrap();
            assert_eq!(back, canonical_bytes, "n {n} k {k}");
        }
        for (n, k) in
            [(1, 1), (31, 15), (32, 16), (33, 17), (64, 127), (65, 128), (40, 129), (70, 1000), (96, 2560)]
        {
            check::<2>(n, k);
            check::<3>(n, k);
        }
    }

    #[test]
    fn wrong_ranges_and_sizes_are_refused() {
        let bytes = vec![canonical::ZERO_BYTE; canonical::row_bytes(20) * 40];
        let w = WeightsRef::new(40, 20, 1.0, &bytes);
        let mut out = vec![0; 2 * block_bytes::<3>(20)];
        assert!(pack::<3>(&w, 1..40, &mut out).is_err());
        assert!(pack::<3>(&w, 0..39, &mut out).is_err());
        assert!(pack::<3>(&w, 0..40, &mut out[1..]).is_err());
        assert!(pack::<3>(&WeightsRef::new(41, 20, 1.0, &bytes), 0..41, &mut out).is_err());
        assert!(pack::<3>(&w, 0..40, &mut out).is_ok());
        let packed = WeightsRef::new(40, 20, 1.0, &out);
        let mut back = vec![0; bytes.len()];
        assert!(unpack::<3>(&packed, 0..40, &mut back[1..]).is_err());
        assert!(unpack::<3>(&WeightsRef::new(65, 20, 1.0, &out), 0..65, &mut back).is_err());
        assert!(unpack::<3>(&packed, 0..40, &mut back).is_ok());
        assert_eq!(back, bytes);
    }
}
