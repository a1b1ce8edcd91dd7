//! The dense linear layer with int8 activations: lm_head over weights as their file stores them, at the
//! speed of memory.
//!
//! With f32 activations ([`dense`](super::dense)) every weight becomes a float in registers, which for
//! Q6_K costs twice the time of reading it. With int8 activations sixteen weights and more are one
//! instruction. The weights are neither converted nor copied; the activations lose up to half a step of
//! absmax / 127 each, which is what this layer costs in exactness.
//!
//! # Numerics
//! For a row of activations x ~ q * (a / 127) and a row of weights in blocks b with scale d_b (32 weights of
//! Q8_0 and Q4_0, 256 of Q6_K),
//!
//! ```text
//! isum_b = sum over the block of w * q                                 exact, in i32
//! y      = ((+0 + isum_0 * d_0) + isum_1 * d_1 + ...) * (a / 127)      in f32
//! ```
//!
//! w is the i8 of Q8_0, the nibble less 8 of Q4_0, the six bits less 32 times its sub-block's i8 scale of
//! Q6_K. (The last is at most 256 * 32 * 128 * 128 = 2^27.) Blocks are added in ascending order; isum_b is
//! rounded to f32 (to even), and so are product and sum, separately. Every instruction set computes these
//! operations in this order, so the results are the same bits everywhere, with any number of threads and
//! rows.
//!
//! # How
//! A row's additions are one chain, so [`ROWS`] rows are computed side by side, one lane each. A tile of
//! adjacent rows is one contiguous run of bytes; while it is computed the next one is prefetched, at the same
//! pace. The integer sums of a row's block are spread over a vector's lanes; those of sixteen rows are
//! added by one transposition. `vpdpbusd` and `vpmaddubsw` multiply unsigned by signed bytes: weights enter
//! as their unsigned codes, and the sum of the activations times the codes' offset is subtracted.

use bitnet_burn_core::formats::DenseFormat;
use bitnet_burn_core::formats::dense::{Q4_0_BYTES, Q6_K_BYTES, Q8_0_BYTES, QK, QK_K};
use bitnet_burn_core::memory::Activations;
use bitnet_burn_core::pool::Pool;

use super::{Shared, rows_fit, run};

/// Weight rows of a tile: lanes of the sums.
const ROWS: usize = 16;

/// Bytes of weights in one task.
const TASK_BYTES: usize = 1 << 18;

/// Most blocks of a row in one step.
const MAX_BLOCKS: usize = 4;

/// y[m, n] = sum over k of x[m, k] * w[n, k], for quantised activations x.
///
/// # Arguments
/// * `w`: N rows of `format.row_bytes(k)` bytes each; Q8_0, Q6_K or Q4_0
/// * `x`: M rows of K activations as [`quantise_rows`](bitnet_burn_cpu::quantise::quantise_rows) makes them,
///   so that none is -128
/// * `y`: M rows of N results, `y_stride` elements apart; what lies between them is left alone
///
/// # Panics
/// If a slice does not have the length that the shape asks for, the format has no rows of K weights, or it
/// is one of floats.
pub(crate) fn linear(
    format: DenseFormat,
    w: &[u8],
    n: usize,
    x: &Activations,
    y: &mut [f32],
    y_stride: usize,
    pool: &Pool,
) {
    linear_at(Level::best(), format, w, n, x, y, y_stride, pool);
}

/// [`linear`] with a given instruction set.
#[allow(clippy::too_many_arguments, reason = "the shape of the problem: three matrices")]
fn linear_at(
    level: Level,
    format: DenseFormat,
    w: &[u8],
    n: usize,
    x: &Activations,
    y: &mut [f32],
    y_stride: usize,
    pool: &Pool,
) {
    let (m, k) = (x.m(), x.k());
    let row_bytes = format.row_bytes(k).expect("a whole number of blocks in a row");
    assert_eq!(Some(w.len()), n.checked_mul(row_bytes), "bytes of weights");
    assert!(rows_fit(y.len(), m, n, y_stride), "{m} rows of {n} results in {}", y.len());
    if m == 0 || n == 0 {
        return;
    }
    let sums = Sums::new(format, x);
    let rows = (TASK_BYTES / row_bytes.max(1)).clamp(1, 4096).next_multiple_of(ROWS);
    let y = Shared::new(y);
    let parallel = n.saturating_mul(k).saturating_mul(m) >= 1 << 18;
    run(pool, parallel, n.div_ceil(rows), &|task| {
        let from = task * rows;
        let to = (from + rows).min(n);
        level.run(&Range { format, w, row_bytes, from, to, x, sums: &sums, y: &y, y_stride });
    });
}

/// Sums of activations, which take the place of the codes' offsets.
struct Sums {
    /// Of each 32, for Q8_0 and Q4_0.
    of_32: Vec<i32>,
    /// Of each 16, for Q6_K, times -8: the offset is 32, but 16 * 128 * 32 is more than an i16 holds.
    of_16: Vec<i16>,
}

impl Sums {
    fn new(format: DenseFormat, x: &Activations) -> Self {
        let rows = x.q().chunks_exact(x.stride().max(1)).map(|row| &row[..x.k()]);
        let sum = |part: &[i8]| part.iter().map(|&q| i32::from(q)).sum::<i32>();
        match format {
            DenseFormat::Q6_K => Self {
                of_32: Vec::new(),
                of_16: rows
                    .flat_map(|row| row.as_chunks::<16>().0)
                    .map(|part| -8 * part.iter().map(|&q| i16::from(q)).sum::<i16>())
                    .collect(),
            },
            _ => Self {
                of_32: rows.flat_map(|row| row.as_chunks::<QK>().0).map(|part| sum(part)).collect(),
                of_16: Vec::new(),
            },
        }
    }

    /// Of row `m`, which has `k` activations.
    #[inline(always)]
    fn row(&self, m: usize, k: usize) -> (&[i32], &[i16]) {
        let of_32 = if self.of_32.is_empty() { &[] } else { &self.of_32[m * (k / QK)..][..k / QK] };
        let of_16 = if self.of_16.is_empty() { &[] } else { &self.of_16[m * (k / 16)..][..k / 16] };
        (of_32, of_16)
    }
}

/// A range of rows of the weights, for all rows of the activations.
struct Range<'a> {
    format: DenseFormat,
    w: &'a [u8],
    row_bytes: usize,
    from: usize,
    to: usize,
    x: &'a Activations,
    sums: &'a Sums,
    y: &'a Shared<'a, f32>,
    y_stride: usize,
}

/// An instruction set: integer sums and f32 of [`ROWS`] rows at a time.
///
/// All methods are `#[inline(always)]`: they have to be compiled into the function that enables the
/// instructions.
trait Isa: Copy + Sized {
    /// Partial i32 sums of one row.
    type V: Copy;
    /// Partial sums of four rows, which alternate.
    type Quad: Copy;
    /// An i32 for each row.
    type I: Copy;
    /// An f32 for each row.
    type F: Copy;
    /// How it reads Q8_0.
    type Q8_0: Format<Self>;
    /// How it reads Q4_0.
    type Q4_0: Format<Self>;
    /// How it reads Q6_K.
    type Q6K: Format<Self>;
    /// Whether there are registers for the sums of 4 x 4 rows (else for 4 x 2).
    const WIDE: bool;

    /// Transposes and adds, as far as that is within 128 bits.
    fn quad(self, rows: [Self::V; 4]) -> Self::Quad;
    /// Halves, from their bits.
    fn halves(self, bits: [u16; ROWS]) -> Self::F;
    /// +0 for each row.
    fn zero(self) -> Self::F;
    /// `acc + (f32)(sums + offset) * d`, each operation rounded.
    fn accumulate(self, acc: Self::F, sums: Self::I, offset: i32, d: Self::F) -> Self::F;
    /// `acc * scale`, as plain values.
    fn finish(self, acc: Self::F, scale: f32) -> [f32; ROWS];

    /// Asks for the cache line at `p` (any address is allowed), here and now.
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        #[cfg(target_arch = "x86_64")]
        x86::prefetch(p);
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }
}

/// How an instruction set multiplies the rows of a format: steps of `BLOCKS` blocks.
trait Format<I: Isa> {
    /// Weights of a block.
    const LEN: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Where a block has its f16 scale.
    const D: usize;
    /// Blocks of a step, at most [`MAX_BLOCKS`].
    const BLOCKS: usize = 1;
    /// What the products' codes are more than the weights (0: `dot` takes care of that).
    const OFFSET: i32;
    /// The activations of a step.
    type X: Copy;
    /// The codes of a row's step.
    type W: Copy;

    /// Activations, and their [`Sums`] by 16, where the format has them.
    fn activations(isa: I, x: &[i8], of_16: &[i16]) -> Self::X;
    /// A step of a row, from its first block on.
    fn weights(isa: I, w: &[u8]) -> Self::W;
    /// The sums of the products, spread over the lanes.
    fn dot(isa: I, w: &Self::W, x: &Self::X) -> I::V;
    /// Adds what is left to add, for each of the step's blocks (what follows them is unspecified).
    fn columns(isa: I, quads: [I::Quad; 4]) -> [I::I; MAX_BLOCKS];

    /// The scales of each of the step's blocks (what follows them is unspecified).
    #[inline(always)]
    fn scales(isa: I, rows: &Rows<'_>) -> [I::F; MAX_BLOCKS] {
        let mut scales = [isa.halves(rows.halves(Self::D)); MAX_BLOCKS];
        for (block, scales) in scales.iter_mut().enumerate().take(Self::BLOCKS).skip(1) {
            *scales = isa.halves(rows.halves(block * Self::BYTES + Self::D));
        }
        scales
    }
}

impl Range<'_> {
    #[inline(always)]
    fn run<I: Isa>(&self, isa: I) {
        match self.format {
            DenseFormat::Q8_0 => self.of_format::<I, I::Q8_0>(isa),
            DenseFormat::Q4_0 => self.of_format::<I, I::Q4_0>(isa),
            DenseFormat::Q6_K => self.of_format::<I, I::Q6K>(isa),
            format => panic!("{} has no int8 path", format.name()),
        }
    }

    #[inline(always)]
    fn of_format<I: Isa, F: Format<I>>(&self, isa: I) {
        match (self.x.m(), I::WIDE) {
            (1, _) => self.tiles::<I, F, 1>(isa),
            (_, true) => self.tiles::<I, F, 4>(isa),
            (_, false) => self.tiles::<I, F, 2>(isa),
        }
    }

    /// Tiles of [`ROWS`] rows of weights by C rows of activations; fewer rows repeat the last one.
    #[inline(always)]
    fn tiles<I: Isa, F: Format<I>, const C: usize>(&self, isa: I) {
        let m = self.x.m();
        for n in (self.from..self.to).step_by(ROWS) {
            let rows = ROWS.min(self.to - n);
            let w = &self.w[n * self.row_bytes..(n + rows) * self.row_bytes];
            let mut at = [0; ROWS];
            for (r, at) in at.iter_mut().enumerate() {
                *at = r.min(rows - 1) * self.row_bytes;
            }
            for from in (0..m).step_by(C) {
                // (This address may lie behind the weights.)
                let next = w.as_ptr().wrapping_add(ROWS * self.row_bytes);
                let mut of = [0; C];
                for (c, of) in of.iter_mut().enumerate() {
                    *of = (from + c).min(m - 1);
                }
                let sums = self.tile::<I, F, C>(isa, w, &at, of, next);
                for (c, sums) in sums.iter().enumerate().take(m - from) {
                    // SAFETY: the task of this range is the only one that writes its columns, one part at a
                    // time.
                    let y = unsafe { self.y.part((from + c) * self.y_stride + n, rows) };
                    y.copy_from_slice(&sums[..rows]);
                }
            }
        }
    }

    /// [`ROWS`] rows of weights, those that begin at `at` in `w`, by the rows `of` of the activations.
    #[inline(always)]
    fn tile<I: Isa, F: Format<I>, const C: usize>(
        &self,
        isa: I,
        w: &[u8],
        at: &[usize; ROWS],
        of: [usize; C],
        next: *const u8,
    ) -> [[f32; ROWS]; C] {
        let (k, stride) = (self.x.k(), self.x.stride());
        let blocks = k / F::LEN;
        let step_bytes = F::BLOCKS * F::BYTES;
        assert!(at.iter().all(|&at| at <= w.len() && blocks * F::BYTES <= w.len() - at), "rows of weights");
        let mut acc = [isa.zero(); C];
        // A last step of fewer blocks is one of copies with zeros behind them.
        let mut rest_w = [0u8; MAX_REST * ROWS];
        let mut rest_at = [0; ROWS];
        let mut rest_x = [[0i8; MAX_BLOCKS * QK]; C];
        for step in 0..blocks.div_ceil(F::BLOCKS) {
            let first = step * F::BLOCKS;
            let count = F::BLOCKS.min(blocks - first);
            let rest = F::BLOCKS > 1 && count < F::BLOCKS;
            if rest {
                for r in 0..ROWS {
                    let from = &w[at[r] + first * F::BYTES..][..count * F::BYTES];
                    rest_at[r] = r * step_bytes;
                    rest_w[rest_at[r]..][..from.len()].copy_from_slice(from);
                }
                for c in 0..C {
                    let from = &self.x.q()[of[c] * stride + first * F::LEN..][..count * F::LEN];
                    rest_x[c][..from.len()].copy_from_slice(from);
                }
            }
            let (from, at, base) = if rest { (&rest_w[..], &rest_at, 0) } else { (w, at, first * F::BYTES) };
            let activations = |c: usize| {
                let of_16 = self.sums.row(of[c], k).1.get(first * F::LEN / 16..).unwrap_or_default();
                let q = if rest { &rest_x[c] } else { &self.x.q()[of[c] * stride + first * F::LEN..] };
                (q, of_16)
            };
            let (q, of_16) = activations(0);
            let mut x = [F::activations(isa, q, of_16); C];
            for (c, x) in x.iter_mut().enumerate().skip(1) {
                let (q, of_16) = activations(c);
                *x = F::activations(isa, q, of_16);
            }
            // SAFETY: a row is `blocks` blocks, and lies within `w` (asserted above); a step that is not of
            // the rest ends with it at the latest. The rest has a step of bytes for each row.
            let rows = unsafe { Rows::new(from, at, base, step_bytes) };
            // Unrolled by hand, which keeps the sums in registers.
            let next = next.wrapping_add(step * ROWS * step_bytes);
            let a = four::<I, F, C>(isa, &rows, 0, &x, next);
            let b = four::<I, F, C>(isa, &rows, 4, &x, next);
            let c = four::<I, F, C>(isa, &rows, 8, &x, next);
            let d = four::<I, F, C>(isa, &rows, 12, &x, next);
            let scales = F::scales(isa, &rows);
            for i in 0..C {
                let columns = F::columns(isa, [a[i], b[i], c[i], d[i]]);
                for block in 0..count {
                    let offset = match F::OFFSET {
                        0 => 0,
                        offset => -offset * self.sums.row(of[i], k).0[first + block],
                    };
                    acc[i] = isa.accumulate(acc[i], columns[block], offset, scales[block]);
                }
            }
        }
        let mut sums = [[0.0; ROWS]; C];
        for c in 0..C {
            sums[c] = isa.finish(acc[c], self.x.scale()[of[c]]);
        }
        sums
    }
}

/// The sums of the products of four rows from `r` on, while as many bytes at `next` are prefetched.
///
/// A line now and a line then: asked for all at once, they would occupy what the loads need.
#[inline(always)]
fn four<I: Isa, F: Format<I>, const C: usize>(
    isa: I,
    rows: &Rows<'_>,
    r: usize,
    x: &[F::X; C],
    next: *const u8,
) -> [I::Quad; C] {
    let step_bytes = F::BLOCKS * F::BYTES;
    let next = next.wrapping_add(r * step_bytes);
    let ahead = |i: usize| {
        for line in ((i * step_bytes).next_multiple_of(64)..(i + 1) * step_bytes).step_by(64) {
            isa.prefetch(next.wrapping_add(line));
        }
    };
    ahead(0);
    let a = dots::<I, F, C>(isa, rows.row(r), x);
    ahead(1);
    let b = dots::<I, F, C>(isa, rows.row(r + 1), x);
    ahead(2);
    let c = dots::<I, F, C>(isa, rows.row(r + 2), x);
    ahead(3);
    let d = dots::<I, F, C>(isa, rows.row(r + 3), x);
    let mut quads = [isa.quad([a[0], b[0], c[0], d[0]]); C];
    for i in 1..C {
        quads[i] = isa.quad([a[i], b[i], c[i], d[i]]);
    }
    quads
}

#[inline(always)]
fn dots<I: Isa, F: Format<I>, const C: usize>(isa: I, w: &[u8], x: &[F::X; C]) -> [I::V; C] {
    let weights = F::weights(isa, w);
    let mut dots = [F::dot(isa, &weights, &x[0]); C];
    for c in 1..C {
        dots[c] = F::dot(isa, &weights, &x[c]);
    }
    dots
}

/// The bytes of one step of [`ROWS`] rows.
struct Rows<'a> {
    w: &'a [u8],
    at: &'a [usize; ROWS],
    base: usize,
    step_bytes: usize,
}

impl<'a> Rows<'a> {
    /// Rows that begin at `at` in `w`, from byte `base` of each on.
    ///
    /// # Safety
    /// `at + base + step_bytes` must be at most the length of `w`, for each of the rows.
    #[inline(always)]
    unsafe fn new(w: &'a [u8], at: &'a [usize; ROWS], base: usize, step_bytes: usize) -> Self {
        debug_assert!(at.iter().all(|at| at + base + step_bytes <= w.len()));
        Self { w, at, base, step_bytes }
    }

    /// A row's step.
    #[inline(always)]
    fn row(&self, r: usize) -> &'a [u8] {
        let from = self.at[r] + self.base;
        // SAFETY: within `w`, as `new`'s caller promised.
        unsafe { self.w.get_unchecked(from..from + self.step_bytes) }
    }

    /// The bits of the halves at byte `at` of each row's step.
    ///
    /// # Panics
    /// If that is not within the step.
    #[inline(always)]
    fn halves(&self, at: usize) -> [u16; ROWS] {
        let mut halves = [0; ROWS];
        for (r, half) in halves.iter_mut().enumerate() {
            *half = u16::from_le_bytes(*bytes(self.row(r), at));
        }
        halves
    }
}

/// Bytes of a row's step of small blocks.
const MAX_REST: usize = 2 * Q8_0_BYTES + 8;
const _: () = assert!(MAX_REST >= 4 * Q4_0_BYTES && MAX_REST >= 2 * Q8_0_BYTES);

/// `N` bytes at `at`.
#[inline(always)]
fn bytes<const N: usize>(from: &[u8], at: usize) -> &[u8; N] {
    from[at..].first_chunk().expect("within the block")
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug)]
enum Level {
    /// AVX-512 F, BW, VL, DQ, VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
    /// AVX2 and AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni(x86::By256<x86::AvxVnni>),
    /// AVX2 with F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::By256<x86::Avx2>),
    /// What the target's baseline has.
    Portable(portable::Portable),
}

impl Level {
    /// The instruction sets that this machine has, best first.
    fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let levels = [
            x86::Avx512::new().map(Self::Avx512),
            x86::AvxVnni::new().map(Self::AvxVnni),
            x86::Avx2::new().map(Self::Avx2),
        ];
        #[cfg(not(target_arch = "x86_64"))]
        let levels = [None::<Self>; 0];
        levels.into_iter().flatten().chain([Self::Portable(portable::Portable)])
    }

    /// The best of them.
    fn best() -> Self {
        static BEST: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::available().next().unwrap_or(Self::Portable(portable::Portable)))
    }

    /// Computes a range with these instructions.
    fn run(self, range: &Range<'_>) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(isa) => x86::run_avx512(isa, range),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(isa) => x86::run_avx_vnni(isa, range),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => x86::run_avx2(isa, range),
            Self::Portable(isa) => range.run(isa),
        }
    }
}

mod portable {
    //! Plain Rust, whose loops compilers vectorise.

    use super::super::simd::half_to_f32;
    use super::*;
    use bitnet_burn_core::formats::dense::{q4_0_codes, q6_k_codes};

    /// Plain Rust.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Portable;

    impl Isa for Portable {
        type V = i32;
        type Quad = [i32; 4];
        type I = [i32; ROWS];
        type F = [f32; ROWS];
        type Q8_0 = Q8_0;
        type Q4_0 = Q4_0;
        type Q6K = Q6K;
        const WIDE: bool = false;

        #[inline(always)]
        fn quad(self, rows: [i32; 4]) -> [i32; 4] {
            rows
        }
        #[inline(always)]
        fn halves(self, bits: [u16; ROWS]) -> [f32; ROWS] {
            let mut halves = [0.0; ROWS];
            for (half, bits) in halves.iter_mut().zip(bits) {
                *half = half_to_f32(bits);
            }
            halves
        }
        #[inline(always)]
        fn zero(self) -> [f32; ROWS] {
            [0.0; ROWS]
        }
        #[inline(always)]
        fn accumulate(
            self,
            mut acc: [f32; ROWS],
            sums: [i32; ROWS],
            offset: i32,
            d: [f32; ROWS],
        ) -> [f32; ROWS] {
            for r in 0..ROWS {
                acc[r] += (sums[r] + offset) as f32 * d[r];
            }
            acc
        }
        #[inline(always)]
        fn finish(self, acc: [f32; ROWS], scale: f32) -> [f32; ROWS] {
            acc.map(|acc| acc * scale)
        }
    }

    #[inline(always)]
    fn one_column(quads: [[i32; 4]; 4]) -> [[i32; ROWS]; MAX_BLOCKS] {
        let mut column = [0; ROWS];
        column.copy_from_slice(quads.as_flattened());
        [column; MAX_BLOCKS]
    }

    /// The products of a small block. Inlined, the arrays would be taken apart into single numbers, and the
    /// loop not be vectorised.
    #[inline(never)]
    fn block(w: &[i8; QK], x: &[i8; QK]) -> i32 {
        products(w, x)
    }

    #[inline(always)]
    fn products<const N: usize>(w: &[i8; N], x: &[i8; N]) -> i32 {
        let mut lanes = [0i32; 8];
        for (w, x) in w.as_chunks::<8>().0.iter().zip(x.as_chunks::<8>().0) {
            for l in 0..8 {
                lanes[l] += i32::from(i16::from(w[l]) * i16::from(x[l]));
            }
        }
        lanes.iter().sum()
    }

    /// Codes less their offset.
    #[inline(always)]
    fn less<const N: usize>(codes: &[u8; N], offset: u8) -> [i8; N] {
        let mut w = [0; N];
        for (w, &code) in w.iter_mut().zip(codes) {
            *w = code.wrapping_sub(offset) as i8;
        }
        w
    }

    #[inline(always)]
    fn first<const N: usize>(x: &[i8]) -> [i8; N] {
        *x.first_chunk().expect("a step's activations")
    }

    #[allow(non_camel_case_types, reason = "the names are the formats'")]
    pub(super) struct Q8_0;
    #[allow(non_camel_case_types, reason = "the names are the formats'")]
    pub(super) struct Q4_0;
    pub(super) struct Q6K;

    impl Format<Portable> for Q8_0 {
        const LEN: usize = QK;
        const BYTES: usize = Q8_0_BYTES;
        const D: usize = 0;
        const OFFSET: i32 = 0;
        type X = [i8; QK];
        type W = [i8; QK];

        #[inline(always)]
        fn activations(_: Portable, x: &[i8], _: &[i16]) -> [i8; QK] {
            first(x)
        }
        #[inline(always)]
        fn weights(_: Portable, w: &[u8]) -> [i8; QK] {
            less(bytes(w, 2), 0)
        }
        #[inline(always)]
        fn dot(_: Portable, w: &[i8; QK], x: &[i8; QK]) -> i32 {
            block(w, x)
        }
        #[inline(always)]
        fn columns(_: Portable, quads: [[i32; 4]; 4]) -> [[i32; ROWS]; MAX_BLOCKS] {
            one_column(quads)
        }
    }

    impl Format<Portable> for Q4_0 {
        const LEN: usize = QK;
        const BYTES: usize = Q4_0_BYTES;
        const D: usize = 0;
        const OFFSET: i32 = 0;
        type X = [i8; QK];
        type W = [i8; QK];

        #[inline(always)]
        fn activations(_: Portable, x: &[i8], _: &[i16]) -> [i8; QK] {
            first(x)
        }
        #[inline(always)]
        fn weights(_: Portable, w: &[u8]) -> [i8; QK] {
            less(&q4_0_codes(bytes(w, 0)), 8)
        }
        #[inline(always)]
        fn dot(_: Portable, w: &[i8; QK], x: &[i8; QK]) -> i32 {
            block(w, x)
        }
        #[inline(always)]
        fn columns(_: Portable, quads: [[i32; 4]; 4]) -> [[i32; ROWS]; MAX_BLOCKS] {
            one_column(quads)
        }
    }

    impl Format<Portable> for Q6K {
        const LEN: usize = QK_K;
        const BYTES: usize = Q6_K_BYTES;
        const D: usize = 208;
        const OFFSET: i32 = 0;
        type X = [i8; QK_K];
        /// Weights without their scales, and the scales.
        type W = ([i8; QK_K], [i8; 16]);

        #[inline(always)]
        fn activations(_: Portable, x: &[i8], _: &[i16]) -> [i8; QK_K] {
            first(x)
        }
        #[inline(always)]
        fn weights(_: Portable, w: &[u8]) -> Self::W {
            (less(&q6_k_codes(bytes(w, 0)), 32), less(bytes(w, 192), 0))
        }
        #[inline(always)]
        fn dot(_: Portable, (w, scales): &Self::W, x: &[i8; QK_K]) -> i32 {
            let parts = w.as_chunks::<16>().0.iter().zip(x.as_chunks::<16>().0).zip(scales);
            parts.map(|((w, x), &scale)| products(w, x) * i32::from(scale)).sum()
        }
        #[inline(always)]
        fn columns(_: Portable, quads: [[i32; 4]; 4]) -> [[i32; ROWS]; MAX_BLOCKS] {
            one_column(quads)
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The same in vectors of 256 bits (AVX2, with AVX-VNNI or without) and of 512 (AVX-512 with VNNI).

    use std::arch::x86_64::*;

    use super::*;

    /// Calls an intrinsic inside a method of a token.
    macro_rules! by_token {
        ($($body:tt)*) => {
            // SAFETY: `self` or `isa` is a token, which only `new` makes, after detecting the instructions;
            // memory is reached through references to arrays of at least the size that is read or written,
            // by unaligned loads and stores.
            unsafe { $($body)* }
        };
    }

    /// Proof that the CPU has AVX-512 F, BW, VL, DQ and VNNI, and what [`Avx2`] proves.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Avx512(());

    /// Proof that the CPU has AVX-VNNI, and what [`Avx2`] proves.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct AvxVnni(());

    /// Proof that the CPU has AVX2 and F16C.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Avx2(());

    /// Vectors of 256 bits, with the multiply-adds of `D`.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct By256<D>(D);

    impl Avx512 {
        pub(super) fn new() -> Option<Self> {
            (is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni")
                && Avx2::new().is_some())
            .then_some(Self(()))
        }
    }

    impl AvxVnni {
        pub(super) fn new() -> Option<By256<Self>> {
            (is_x86_feature_detected!("avxvnni") && Avx2::new().is_some()).then_some(By256(Self(())))
        }
    }

    impl Avx2 {
        pub(super) fn new() -> Option<By256<Self>> {
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(By256(Self(())))
        }
    }

    /// Not the intrinsic, which compilers move past arithmetic and loads, so that a step's prefetches end up
    /// in one place: loads stay on their side of a block of assembly that might write memory.
    #[inline(always)]
    pub(super) fn prefetch(p: *const u8) {
        // SAFETY: SSE is part of x86-64, and prefetching is a hint that touches no memory and never faults.
        unsafe { std::arch::asm!("prefetcht0 [{}]", in(reg) p, options(nostack, preserves_flags)) }
    }

    pub(super) fn run_avx512(isa: Avx512, range: &Range<'_>) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,f16c")]
        fn compiled(isa: Avx512, range: &Range<'_>) {
            range.run(isa);
        }
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { compiled(isa, range) }
    }

    pub(super) fn run_avx_vnni(isa: By256<AvxVnni>, range: &Range<'_>) {
        #[target_feature(enable = "avxvnni,avx2,f16c")]
        fn compiled(isa: By256<AvxVnni>, range: &Range<'_>) {
            range.run(isa);
        }
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { compiled(isa, range) }
    }

    pub(super) fn run_avx2(isa: By256<Avx2>, range: &Range<'_>) {
        #[target_feature(enable = "avx2,f16c")]
        fn compiled(isa: By256<Avx2>, range: &Range<'_>) {
            range.run(isa);
        }
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { compiled(isa, range) }
    }

    /// The multiply-adds of bytes and of 16-bit integers, in 256 bits.
    pub(super) trait Dot: Copy {
        /// What [`Dot::signed`] adds to the weights.
        const OFFSET: i32;
        /// Sums of four products each of unsigned bytes up to 63 with signed ones.
        fn unsigned(self, w: __m256i, x: __m256i) -> __m256i;
        /// Sums of four products each of the signed bytes `w` plus `OFFSET` with signed ones that are not
        /// -128.
        fn signed(self, w: __m256i, x: __m256i) -> __m256i;
        /// `acc` plus sums of two products each of 16-bit integers.
        fn add_pairs(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i;
    }

    impl Dot for Avx2 {
        const OFFSET: i32 = 0;

        /// No pair of products is more than 2 * 63 * 128 < 2^15.
        #[inline(always)]
        fn unsigned(self, w: __m256i, x: __m256i) -> __m256i {
            by_token!(_mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)))
        }
        /// |w| times x with w's sign: no pair of products is more than 2 * 128 * 127 < 2^15.
        #[inline(always)]
        fn signed(self, w: __m256i, x: __m256i) -> __m256i {
            by_token!({
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
            })
        }
        #[inline(always)]
        fn add_pairs(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
            by_token!(_mm256_add_epi32(acc, _mm256_madd_epi16(a, b)))
        }
    }

    impl Dot for AvxVnni {
        const OFFSET: i32 = 128;

        #[inline(always)]
        fn unsigned(self, w: __m256i, x: __m256i) -> __m256i {
            by_token!(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w, x))
        }
        /// With its sign bit turned, w is w + 128.
        #[inline(always)]
        fn signed(self, w: __m256i, x: __m256i) -> __m256i {
            by_token!({
                let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w, x)
            })
        }
        #[inline(always)]
        fn add_pairs(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
            by_token!(_mm256_dpwssd_avx_epi32(acc, a, b))
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load256(from: &[u8; 32]) -> __m256i {
        // SAFETY: 32 bytes behind a reference.
        unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load128(from: &[u8; 16]) -> __m128i {
        // SAFETY: 16 bytes behind a reference.
        unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
    }

    /// 32 activations from `at` on.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn load_x(x: &[i8], at: usize) -> __m256i {
        let x: &[i8; 32] = x[at..].first_chunk().expect("a step's activations");
        // SAFETY: 32 bytes behind a reference.
        unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load_of_16(of_16: &[i16]) -> __m256i {
        let of_16: &[i16; 16] = of_16.first_chunk().expect("a block's sums");
        // SAFETY: 32 bytes behind a reference.
        unsafe { _mm256_loadu_si256(of_16.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn vector(bits: [u16; ROWS]) -> __m256i {
        let [a, b, c, e, f, g, h, i, j, k, l, m, n, o, p, q] = bits.map(|bits| bits as i16);
        _mm256_setr_epi16(a, b, c, e, f, g, h, i, j, k, l, m, n, o, p, q)
    }

    impl<D: Dot> Isa for By256<D> {
        type V = __m256i;
        type Quad = __m256i;
        type I = [__m256i; 2];
        type F = [__m256; 2];
        type Q8_0 = Q8_0;
        type Q4_0 = Q4_0;
        type Q6K = Q6K;
        const WIDE: bool = false;

        #[inline(always)]
        fn quad(self, [a, b, c, d]: [__m256i; 4]) -> __m256i {
            by_token!({
                let ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
                let cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
                _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd))
            })
        }
        #[inline(always)]
        fn halves(self, bits: [u16; ROWS]) -> [__m256; 2] {
            by_token!({
                let d = vector(bits);
                [
                    _mm256_cvtph_ps(_mm256_castsi256_si128(d)),
                    _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(d)),
                ]
            })
        }
        #[inline(always)]
        fn zero(self) -> [__m256; 2] {
            by_token!([_mm256_setzero_ps(); 2])
        }
        #[inline(always)]
        fn accumulate(
            self,
            mut acc: [__m256; 2],
            sums: [__m256i; 2],
            offset: i32,
            d: [__m256; 2],
        ) -> [__m256; 2] {
            for h in 0..2 {
                acc[h] = by_token!({
                    let sums = _mm256_cvtepi32_ps(_mm256_add_epi32(sums[h], _mm256_set1_epi32(offset)));
                    _mm256_add_ps(acc[h], _mm256_mul_ps(sums, d[h]))
                });
            }
            acc
        }
        #[inline(always)]
        fn finish(self, acc: [__m256; 2], scale: f32) -> [f32; ROWS] {
            let mut out = [0.0; ROWS];
            for h in 0..2 {
                let out = &mut out[8 * h..][..8];
                by_token!(_mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(acc[h], _mm256_set1_ps(scale))));
            }
            out
        }
    }

    /// The sums over a vector, of one block each.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn column256([a, b, c, d]: [__m256i; 4]) -> [[__m256i; 2]; MAX_BLOCKS] {
        let ab = _mm256_add_epi32(
            _mm256_permute2x128_si256::<0x20>(a, b),
            _mm256_permute2x128_si256::<0x31>(a, b),
        );
        let cd = _mm256_add_epi32(
            _mm256_permute2x128_si256::<0x20>(c, d),
            _mm256_permute2x128_si256::<0x31>(c, d),
        );
        [[ab, cd]; MAX_BLOCKS]
    }

    #[allow(non_camel_case_types, reason = "the names are the formats'")]
    pub(super) struct Q8_0;
    #[allow(non_camel_case_types, reason = "the names are the formats'")]
    pub(super) struct Q4_0;
    pub(super) struct Q6K;

    impl<D: Dot> Format<By256<D>> for Q8_0 {
        const LEN: usize = QK;
        const BYTES: usize = Q8_0_BYTES;
        const D: usize = 0;
        const OFFSET: i32 = D::OFFSET;
        type X = __m256i;
        type W = __m256i;

        #[inline(always)]
        fn activations(_isa: By256<D>, x: &[i8], _: &[i16]) -> __m256i {
            by_token!(load_x(x, 0))
        }
        #[inline(always)]
        fn weights(_isa: By256<D>, w: &[u8]) -> __m256i {
            by_token!(load256(bytes(w, 2)))
        }
        #[inline(always)]
        fn dot(isa: By256<D>, w: &__m256i, x: &__m256i) -> __m256i {
            isa.0.signed(*w, *x)
        }
        #[inline(always)]
        fn columns(_isa: By256<D>, quads: [__m256i; 4]) -> [[__m256i; 2]; MAX_BLOCKS] {
            by_token!(column256(quads))
        }
    }

    impl<D: Dot> Format<By256<D>> for Q4_0 {
        const LEN: usize = QK;
        const BYTES: usize = Q4_0_BYTES;
        const D: usize = 0;
        const OFFSET: i32 = 8;
        type X = __m256i;
        type W = __m256i;

        #[inline(always)]
        fn activations(_isa: By256<D>, x: &[i8], _: &[i16]) -> __m256i {
            by_token!(load_x(x, 0))
        }
        #[inline(always)]
        fn weights(_isa: By256<D>, w: &[u8]) -> __m256i {
            by_token!({
                let w = load128(bytes(w, 2));
                let w = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(w), _mm_srli_epi16::<4>(w));
                _mm256_and_si256(w, _mm256_set1_epi8(15))
            })
        }
        #[inline(always)]
        fn dot(isa: By256<D>, w: &__m256i, x: &__m256i) -> __m256i {
            isa.0.unsigned(*w, *x)
        }
        #[inline(always)]
        fn columns(_isa: By256<D>, quads: [__m256i; 4]) -> [[__m256i; 2]; MAX_BLOCKS] {
            by_token!(column256(quads))
        }
    }

    impl<D: Dot> Format<By256<D>> for Q6K {
        const LEN: usize = QK_K;
        const BYTES: usize = Q6_K_BYTES;
        const D: usize = 208;
        const OFFSET: i32 = 0;
        /// Activations, and their sums.
        type X = ([__m256i; 8], __m256i);
        /// Codes, and scales.
        type W = ([__m256i; 8], __m128i);

        #[inline(always)]
        fn activations(_isa: By256<D>, x: &[i8], of_16: &[i16]) -> Self::X {
            let mut v = [by_token!(load_of_16(of_16)); 8];
            for (i, v) in v.iter_mut().enumerate() {
                *v = by_token!(load_x(x, 32 * i));
            }
            (v, by_token!(load_of_16(of_16)))
        }
        #[inline(always)]
        fn weights(_isa: By256<D>, w: &[u8]) -> Self::W {
            by_token!({
                let scales = load128(bytes(w, 192));
                let (low, two) = (_mm256_set1_epi8(0x0f), _mm256_set1_epi8(0x30));
                let mut codes = [low; 8];
                for half in 0..2 {
                    let a = load256(bytes(w, 64 * half));
                    let b = load256(bytes(w, 64 * half + 32));
                    let h = load256(bytes(w, 128 + 32 * half));
                    let high =
                        [_mm256_slli_epi16::<4>(h), _mm256_slli_epi16::<2>(h), h, _mm256_srli_epi16::<2>(h)];
                    let nibbles = [a, b, _mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)];
                    for i in 0..4 {
                        codes[4 * half + i] = _mm256_or_si256(
                            _mm256_and_si256(nibbles[i], low),
                            _mm256_and_si256(high[i], two),
                        );
                    }
                }
                (codes, scales)
            })
        }
        #[inline(always)]
        fn dot(isa: By256<D>, (codes, scales): &Self::W, (x, of_16): &Self::X) -> __m256i {
            // -8 * sums, four times.
            let mut acc = by_token!({
                let offsets = _mm256_madd_epi16(_mm256_cvtepi8_epi16(*scales), *of_16);
                _mm256_slli_epi32::<2>(offsets)
            });
            for i in 0..8 {
                // Two scales, eight times each: those of the vector's lower and upper half.
                let two = by_token!({
                    let index = _mm_set1_epi64x(0x0101_0101_0101_0101 * 2 * i as i64);
                    let index = _mm_add_epi8(index, _mm_set_epi64x(0x0101_0101_0101_0101, 0));
                    _mm256_cvtepi8_epi16(_mm_shuffle_epi8(*scales, index))
                });
                acc = isa.0.add_pairs(acc, by_token!(_mm256_maddubs_epi16(codes[i], x[i])), two);
            }
            acc
        }
        #[inline(always)]
        fn columns(_isa: By256<D>, quads: [__m256i; 4]) -> [[__m256i; 2]; MAX_BLOCKS] {
            by_token!(column256(quads))
        }
    }

    impl Isa for Avx512 {
        type V = __m512i;
        type Quad = __m512i;
        type I = __m512i;
        type F = __m512;
        type Q8_0 = Q8_0;
        type Q4_0 = Q4_0;
        type Q6K = Q6K;
        const WIDE: bool = true;

        #[inline(always)]
        fn quad(self, [a, b, c, d]: [__m512i; 4]) -> __m512i {
            by_token!({
                let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
                let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
                _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
            })
        }
        #[inline(always)]
        fn halves(self, bits: [u16; ROWS]) -> __m512 {
            by_token!(_mm512_cvtph_ps(vector(bits)))
        }
        #[inline(always)]
        fn zero(self) -> __m512 {
            by_token!(_mm512_setzero_ps())
        }
        #[inline(always)]
        fn accumulate(self, acc: __m512, sums: __m512i, offset: i32, d: __m512) -> __m512 {
            by_token!({
                let sums = _mm512_cvtepi32_ps(_mm512_add_epi32(sums, _mm512_set1_epi32(offset)));
                _mm512_add_ps(acc, _mm512_mul_ps(sums, d))
            })
        }
        #[inline(always)]
        fn finish(self, acc: __m512, scale: f32) -> [f32; ROWS] {
            let mut out = [0.0; ROWS];
            by_token!(_mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(acc, _mm512_set1_ps(scale))));
            out
        }
    }

    /// 64 activations from `at` on.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_x512(x: &[i8], at: usize) -> __m512i {
        let x: &[i8; 64] = x[at..].first_chunk().expect("a step's activations");
        // SAFETY: 64 bytes behind a reference.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    /// Two vectors' parts of 128 bits, pairs of them added.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn pairs(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b))
    }

    /// Indices for `_mm512_permutex2var_epi16`: parts of `n` elements of the first vector and of the second
    /// by turns, from element `from[0]`, `from[1]`, ... of both.
    const fn alternate<const PARTS: usize>(from: [i16; PARTS], n: usize) -> [i16; 32] {
        let mut index = [0; 32];
        let mut i = 0;
        while i < 32 && i / (2 * n) < PARTS {
            let second = if i / n % 2 == 1 { 32 } else { 0 };
            index[i] = from[i / (2 * n)] + (i % n) as i16 + second;
            i += 1;
        }
        index
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn index(of: &'static [i16; 32]) -> __m512i {
        // SAFETY: 64 bytes behind a reference.
        unsafe { _mm512_loadu_si512(of.as_ptr().cast()) }
    }

    /// The first 64 bytes of a row's step, which have all its scales.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn head(rows: &Rows<'_>, r: usize) -> __m512i {
        let head: &[u8; 64] = bytes(rows.row(r), 0);
        // SAFETY: 64 bytes behind a reference.
        unsafe { _mm512_loadu_si512(head.as_ptr().cast()) }
    }

    /// Elements of sixteen vectors by three rounds of merging two; the last is left to the caller.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn merged(rows: &Rows<'_>, by: [&'static [i16; 32]; 3]) -> [__m512i; 2] {
        let [one, two, three] = [index(by[0]), index(by[1]), index(by[2])];
        let mut half = [one; 2];
        for (i, half) in half.iter_mut().enumerate() {
            let r = 8 * i;
            let a = _mm512_permutex2var_epi16(head(rows, r), one, head(rows, r + 1));
            let b = _mm512_permutex2var_epi16(head(rows, r + 2), one, head(rows, r + 3));
            let c = _mm512_permutex2var_epi16(head(rows, r + 4), one, head(rows, r + 5));
            let d = _mm512_permutex2var_epi16(head(rows, r + 6), one, head(rows, r + 7));
            let ab = _mm512_permutex2var_epi16(a, two, b);
            let cd = _mm512_permutex2var_epi16(c, two, d);
            *half = _mm512_permutex2var_epi16(ab, three, cd);
        }
        half
    }

    /// Two blocks a step, one in each half of a vector.
    impl Format<Avx512> for Q8_0 {
        const LEN: usize = QK;
        const BYTES: usize = Q8_0_BYTES;
        const D: usize = 0;
        const BLOCKS: usize = 2;
        const OFFSET: i32 = 128;
        type X = __m512i;
        type W = __m512i;

        #[inline(always)]
        fn activations(_isa: Avx512, x: &[i8], _: &[i16]) -> __m512i {
            by_token!(load_x512(x, 0))
        }
        #[inline(always)]
        fn weights(_isa: Avx512, w: &[u8]) -> __m512i {
            by_token!({
                let (a, b) = (load256(bytes(w, 2)), load256(bytes(w, 2 + Q8_0_BYTES)));
                let w = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
                // With its sign bit turned, w is w + 128.
                _mm512_xor_si512(w, _mm512_set1_epi8(-128))
            })
        }
        #[inline(always)]
        fn dot(_isa: Avx512, w: &__m512i, x: &__m512i) -> __m512i {
            by_token!(_mm512_dpbusd_epi32(_mm512_setzero_si512(), *w, *x))
        }
        #[inline(always)]
        fn columns(_isa: Avx512, [a, b, c, d]: [__m512i; 4]) -> [__m512i; MAX_BLOCKS] {
            by_token!({
                let (ab, cd) = (pairs(a, b), pairs(c, d));
                let first = _mm512_shuffle_i32x4::<0x88>(ab, cd);
                let second = _mm512_shuffle_i32x4::<0xdd>(ab, cd);
                [first, second, first, second]
            })
        }
        /// The scales are the elements 0 and 17 of a step.
        #[inline(always)]
        fn scales(_isa: Avx512, rows: &Rows<'_>) -> [__m512; MAX_BLOCKS] {
            static BY: [[i16; 32]; 4] =
                [alternate([0, 17], 1), alternate([0, 2], 2), alternate([0, 4], 4), alternate([0, 8], 8)];
            by_token!({
                let [a, b] = merged(rows, [&BY[0], &BY[1], &BY[2]]);
                let d = _mm512_permutex2var_epi16(a, index(&BY[3]), b);
                let first = _mm512_cvtph_ps(_mm512_castsi512_si256(d));
                let second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(d));
                [first, second, first, second]
            })
        }
    }

    /// Four blocks a step, one in each 128 bits of a vector.
    impl Format<Avx512> for Q4_0 {
        const LEN: usize = QK;
        const BYTES: usize = Q4_0_BYTES;
        const D: usize = 0;
        const BLOCKS: usize = 4;
        const OFFSET: i32 = 8;
        /// The first and the second sixteen of each block, which are the low and the high nibbles.
        type X = [__m512i; 2];
        type W = [__m512i; 2];

        #[inline(always)]
        fn activations(_isa: Avx512, x: &[i8], _: &[i16]) -> [__m512i; 2] {
            by_token!({
                let (a, b) = (load_x512(x, 0), load_x512(x, 64));
                [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b)]
            })
        }
        #[inline(always)]
        fn weights(_isa: Avx512, w: &[u8]) -> [__m512i; 2] {
            by_token!({
                let a = _mm256_castsi128_si256(load128(bytes(w, 2)));
                let a = _mm256_inserti128_si256::<1>(a, load128(bytes(w, 2 + Q4_0_BYTES)));
                let b = _mm256_castsi128_si256(load128(bytes(w, 2 + 2 * Q4_0_BYTES)));
                let b = _mm256_inserti128_si256::<1>(b, load128(bytes(w, 2 + 3 * Q4_0_BYTES)));
                let w = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
                let low = _mm512_set1_epi8(15);
                [_mm512_and_si512(w, low), _mm512_and_si512(_mm512_srli_epi16::<4>(w), low)]
            })
        }
        #[inline(always)]
        fn dot(_isa: Avx512, w: &[__m512i; 2], x: &[__m512i; 2]) -> __m512i {
            by_token!({
                let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w[0], x[0]);
                _mm512_dpbusd_epi32(sums, w[1], x[1])
            })
        }
        #[inline(always)]
        fn columns(_isa: Avx512, [a, b, c, d]: [__m512i; 4]) -> [__m512i; MAX_BLOCKS] {
            by_token!({
                let (ab, cd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
                let (ab1, cd1) = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d));
                [
                    _mm512_shuffle_i32x4::<0x88>(ab, cd),
                    _mm512_shuffle_i32x4::<0x88>(ab1, cd1),
                    _mm512_shuffle_i32x4::<0xdd>(ab, cd),
                    _mm512_shuffle_i32x4::<0xdd>(ab1, cd1),
                ]
            })
        }
        /// The scales are the elements 0, 9, 18 and 27 of a step.
        #[inline(always)]
        fn scales(_isa: Avx512, rows: &Rows<'_>) -> [__m512; MAX_BLOCKS] {
            static BY: [[i16; 32]; 5] = [
                alternate([0, 9, 18, 27], 1),
                alternate([0, 2, 4, 6], 2),
                alternate([0, 4, 8, 12], 4),
                alternate([0, 8], 8),
                alternate([16, 24], 8),
            ];
            by_token!({
                let [a, b] = merged(rows, [&BY[0], &BY[1], &BY[2]]);
                let d = _mm512_permutex2var_epi16(a, index(&BY[3]), b);
                let e = _mm512_permutex2var_epi16(a, index(&BY[4]), b);
                [
                    _mm512_cvtph_ps(_mm512_castsi512_si256(d)),
                    _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(d)),
                    _mm512_cvtph_ps(_mm512_castsi512_si256(e)),
                    _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(e)),
                ]
            })
        }
    }

    /// Which of a block's scales the 16-bit elements of its vector `i` have: one for each 128 bits.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn scale_index(i: usize) -> __m512i {
        let each = 0x0001_0001_0001_0001 * 4 * i as i64;
        let (a, b) = (each, each + 0x0001_0001_0001_0001);
        let (c, d) = (each + 2 * 0x0001_0001_0001_0001, each + 3 * 0x0001_0001_0001_0001);
        _mm512_setr_epi64(a, a, b, b, c, c, d, d)
    }

    impl Format<Avx512> for Q6K {
        const LEN: usize = QK_K;
        const BYTES: usize = Q6_K_BYTES;
        const D: usize = 208;
        const OFFSET: i32 = 0;
        /// Activations, and their sums.
        type X = ([__m512i; 4], __m256i);
        /// Codes, and scales.
        type W = ([__m512i; 4], __m256i);

        #[inline(always)]
        fn activations(_isa: Avx512, x: &[i8], of_16: &[i16]) -> Self::X {
            by_token!({
                let v = [load_x512(x, 0), load_x512(x, 64), load_x512(x, 128), load_x512(x, 192)];
                (v, load_of_16(of_16))
            })
        }
        #[inline(always)]
        fn weights(_isa: Avx512, w: &[u8]) -> Self::W {
            by_token!({
                let scales = _mm256_cvtepi8_epi16(load128(bytes(w, 192)));
                let (low, two) = (_mm512_set1_epi8(0x0f), _mm512_set1_epi8(0x30));
                // Bits 0..2 of a byte belong to the first 32 of 128 weights, bits 2..4 to the next, and so on.
                let left = _mm512_inserti64x4::<1>(_mm512_set1_epi16(4), _mm256_set1_epi16(2));
                let right = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(2));
                let mut codes = [low; 4];
                for half in 0..2 {
                    let nibbles: &[u8; 64] = bytes(w, 64 * half);
                    let nibbles = _mm512_loadu_si512(nibbles.as_ptr().cast());
                    let high = _mm512_broadcast_i64x4(load256(bytes(w, 128 + 32 * half)));
                    let a = _mm512_and_si512(nibbles, low);
                    let b = _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), low);
                    // 0xEA: (x & y) | z.
                    let shifted = _mm512_sllv_epi16(high, left);
                    codes[2 * half] = _mm512_ternarylogic_epi32::<0xEA>(shifted, two, a);
                    let shifted = _mm512_srlv_epi16(high, right);
                    codes[2 * half + 1] = _mm512_ternarylogic_epi32::<0xEA>(shifted, two, b);
                }
                (codes, scales)
            })
        }
        /// No pair of products is more than 2 * 63 * 128 < 2^15.
        #[inline(always)]
        fn dot(_isa: Avx512, (codes, scales): &Self::W, (x, of_16): &Self::X) -> __m512i {
            by_token!({
                // -8 * sums, four times.
                let offsets = _mm256_slli_epi32::<2>(_mm256_madd_epi16(*scales, *of_16));
                let mut acc = _mm512_zextsi256_si512(offsets);
                let all = _mm512_castsi256_si512(*scales);
                for i in 0..4 {
                    let products = _mm512_maddubs_epi16(codes[i], x[i]);
                    let scales = _mm512_permutexvar_epi16(scale_index(i), all);
                    acc = _mm512_dpwssd_epi32(acc, products, scales);
                }
                acc
            })
        }
        #[inline(always)]
        fn columns(_isa: Avx512, [a, b, c, d]: [__m512i; 4]) -> [__m512i; MAX_BLOCKS] {
            by_token!([pairs(pairs(a, b), pairs(c, d)); MAX_BLOCKS])
        }
    }
}

#[cfg(test)]
mod tests {
    use bitnet_burn_core::formats::dense::{q4_0_codes, q6_k_codes};
    use half::f16;

    use super::super::simd::tests::Rng;
    use super::*;

    const FORMATS: [DenseFormat; 3] = [DenseFormat::Q8_0, DenseFormat::Q6_K, DenseFormat::Q4_0];

    /// Where a block has its scale.
    fn d_at(format: DenseFormat) -> usize {
        if format == DenseFormat::Q6_K { 208 } else { 0 }
    }

    /// Arbitrary bytes with a finite d; now and then a block of all ones or all zeros, which have the
    /// extreme codes.
    fn blocks(rng: &mut Rng, format: DenseFormat, n: usize, k: usize) -> Vec<u8> {
        let mut w = rng.bytes(n * format.row_bytes(k).unwrap());
        let d = d_at(format);
        for block in w.chunks_exact_mut(format.block_bytes()) {
            match rng.next() % 8 {
                0 => block.fill(0xff),
                1 => block.fill(0x80),
                2 => block.fill(0x7f),
                3 => block.fill(0),
                _ => {}
            }
            let half = if rng.next().is_multiple_of(4) {
                rng.next() as u16
            } else {
                0x2c00 | rng.next() as u16 & 0x83ff
            };
            block[d..d + 2].copy_from_slice(&half.to_le_bytes());
            if block[d + 1] & 0x7c == 0x7c {
                block[d + 1] &= 0x83;
            }
        }
        w
    }

    /// Quantised rows: of floats, of the extremes alone, of alternating extremes, of zeros.
    fn activations(rng: &mut Rng, m: usize, k: usize) -> Activations {
        let rows: Vec<f32> = (0..m)
            .flat_map(|m| match (m + 1) % 5 {
                0 => vec![0.0; k],
                1 | 4 => rng.f32s(k),
                2 => vec![if rng.next().is_multiple_of(2) { 3.0 } else { -3.0 }; k],
                _ => (0..k).map(|i| if i % 2 == 0 { 1e-3 } else { -1e-3 }).collect(),
            })
            .collect();
        quantised(&rows, k)
    }

    fn quantised(rows: &[f32], k: usize) -> Activations {
        let mut x = Activations::default();
        let parts = x.resize(rows.len() / k, k);
        bitnet_burn_cpu::quantise::quantise_rows(rows, k, parts.q, parts.stride, parts.scale, parts.sum);
        x
    }

    /// Weights of a block as integers, with the sub-blocks' scales, and d.
    fn integers(format: DenseFormat, block: &[u8]) -> (Vec<i32>, f32) {
        let d = d_at(format);
        let d = f16::from_le_bytes([block[d], block[d + 1]]).to_f32();
        let w = match format {
            DenseFormat::Q8_0 => block[2..].iter().map(|&q| i32::from(q as i8)).collect(),
            DenseFormat::Q4_0 => {
                q4_0_codes(block.try_into().unwrap()).iter().map(|&q| i32::from(q) - 8).collect()
            }
            _ => {
                let codes = q6_k_codes(block.try_into().unwrap());
                let scale = |i: usize| i32::from(block[192 + i / 16] as i8);
                codes.iter().enumerate().map(|(i, &q)| (i32::from(q) - 32) * scale(i)).collect()
            }
        };
        (w, d)
    }

    /// The numerics of this module, written down once more.
    fn specification(format: DenseFormat, w: &[u8], n: usize, x: &Activations) -> Vec<f32> {
        let bytes = format.row_bytes(x.k()).unwrap();
        let mut y = Vec::new();
        for m in 0..x.m() {
            let q = &x.q()[m * x.stride()..][..x.k()];
            for n in 0..n {
                let mut acc = 0f32;
                let blocks = w[n * bytes..(n + 1) * bytes].chunks_exact(format.block_bytes());
                for (block, q) in blocks.zip(q.chunks_exact(format.block_len())) {
                    let (w, d) = integers(format, block);
                    let sum: i64 = w.iter().zip(q).map(|(&w, &q)| i64::from(w) * i64::from(q)).sum();
                    acc += i32::try_from(sum).unwrap() as f32 * d;
                }
                y.push(acc * x.scale()[m]);
            }
        }
        y
    }

    fn every_level(format: DenseFormat, w: &[u8], n: usize, x: &Activations, pools: &[Pool]) {
        let want = specification(format, w, n, x);
        let stride = n + 3;
        for level in Level::available() {
            for pool in pools {
                let mut y = vec![7.0; x.m() * stride];
                linear_at(level, format, w, n, x, &mut y, stride, pool);
                for (m, y) in y.chunks(stride).enumerate() {
                    let same = |(y, want): (&f32, &f32)| {
                        y.to_bits() == want.to_bits() || y.is_nan() && want.is_nan()
                    };
                    let want = &want[m * n..(m + 1) * n];
                    assert!(
                        y.iter().zip(want).all(same),
                        "{} {level:?}: row {m} of {}x{n}x{}, {} threads\n{y:?}\n{want:?}",
                        format.name(),
                        x.m(),
                        x.k(),
                        pool.threads()
                    );
                    assert_eq!(y[n..], [7.0; 3]);
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_and_thread_count_computes_the_specification() {
        let mut rng = Rng(31);
        let pools = [1, 2, 3].map(|threads| Pool::new(threads).unwrap());
        for format in FORMATS {
            let ks: &[usize] = match format.block_len() {
                32 => &[32, 64, 96, 128, 160, 224, 320, 2560],
                _ => &[256, 512, 768, 2560],
            };
            for &k in ks {
                let shapes = [(1, 1), (3, 1), (16, 2), (17, 3), (31, 4), (33, 5), (48, 9), (50, 1)];
                for (n, m) in shapes {
                    let w = blocks(&mut rng, format, n, k);
                    every_level(format, &w, n, &activations(&mut rng, m, k), &pools);
                }
            }
        }
    }

    #[test]
    fn the_shapes_of_models() {
        let mut rng = Rng(32);
        let pools = [Pool::new(2).unwrap()];
        for format in FORMATS {
            for (n, k, m) in [(301, 2560, 1), (161, 6912, 1), (35, 6912, 3)] {
                let w = blocks(&mut rng, format, n, k);
                every_level(format, &w, n, &activations(&mut rng, m, k), &pools);
            }
        }
    }

    #[test]
    fn the_largest_sums_are_exact() {
        let pool = [Pool::new(1).unwrap()];
        let k = 512;
        for format in FORMATS {
            for fill in [0u8, 0x80, 0x7f, 0xff, 0x81, 0x88, 0xf0, 0x0f] {
                for scale in [0x80, 0x7f] {
                    let n = 3;
                    let mut w = vec![fill; n * format.row_bytes(k).unwrap()];
                    for block in w.chunks_exact_mut(format.block_bytes()) {
                        if format == DenseFormat::Q6_K {
                            block[192..208].fill(scale);
                        }
                        block[d_at(format)..d_at(format) + 2].copy_from_slice(&f16::MAX.to_le_bytes());
                    }
                    let rows = [vec![5.0; k], vec![-5.0; k]].concat();
                    every_level(format, &w, n, &quantised(&rows, k), &pool);
                }
            }
        }
    }

    #[test]
    fn rows_that_are_not_finite_are_nan() {
        let mut rng = Rng(33);
        let (n, k) = (20, 256);
        let mut rows = rng.f32s(3 * k);
        rows[k + 7] = f32::INFINITY;
        let x = quantised(&rows, k);
        for format in FORMATS {
            let w = blocks(&mut rng, format, n, k);
            let mut y = vec![0.0; 3 * n];
            linear(format, &w, n, &x, &mut y, n, &Pool::new(1).unwrap());
            assert!(y[n..2 * n].iter().all(|y| y.is_nan()));
            assert!(y[..n].iter().chain(&y[2 * n..]).all(|y| y.is_finite()));
        }
    }

    #[test]
    fn several_tasks_agree_with_one() {
        let mut rng = Rng(34);
        let pools = [1, 2, 3].map(|threads| Pool::new(threads).unwrap());
        for format in FORMATS {
            let k = 1024;
            let n = 3 * TASK_BYTES / format.row_bytes(k).unwrap() + 5;
            let w = blocks(&mut rng, format, n, k);
            every_level(format, &w, n, &activations(&mut rng, 1, k), &pools);
        }
    }

    #[test]
    fn close_to_double_precision() {
        let mut rng = Rng(35);
        let (n, k) = (64, 2560);
        let rows = rng.f32s(k);
        let x = quantised(&rows, k);
        for format in FORMATS {
            let bytes = format.row_bytes(k).unwrap();
            let mut w = vec![0; n * bytes];
            for row in w.chunks_exact_mut(bytes) {
                format.encode_row(&rng.f32s(k), row).unwrap();
            }
            let mut y = vec![0.0; n];
            linear(format, &w, n, &x, &mut y, n, &Pool::new(1).unwrap());
            let mut row = vec![0.0; k];
            for (y, w) in y.iter().zip(w.chunks_exact(bytes)) {
                format.decode_row(w, &mut row).unwrap();
                let step = f64::from(x.scale()[0]);
                let of_codes = || row.iter().zip(x.q()).map(|(&w, &q)| f64::from(w) * f64::from(q) * step);
                let size = of_codes().map(f64::abs).sum::<f64>();
                // Against the quantised activations, only f32's rounding: three times a block of at most 80.
                let want = of_codes().sum::<f64>();
                assert!((f64::from(*y) - want).abs() <= 1e-5 * size, "{}: {y} {want}", format.name());
                // Against the activations, at most half a step of each.
                let want = row.iter().zip(&rows).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>();
                let half_steps = row.iter().map(|&w| f64::from(w.abs()) * step / 2.0).sum::<f64>();
                let error = (f64::from(*y) - want).abs();
                assert!(error <= half_steps + 1e-5 * size, "{}: {y} {want}", format.name());
            }
        }
    }
}
