//! AVX2: `vpmaddubsw` and 16-bit sums, which are flushed to 32 bits before they can overflow.

use std::arch::x86_64::*;

use bitnet_burn_plugin::canonical::{BLOCK, BLOCK_BYTES};

use super::kernels;
use super::ymm::{ROW_PREFETCH, TILE_PREFETCH, first, groups, load_rows, split, totals};
use crate::ternary::generic::{Codes, RowMicro, TileMicro, row_bytes};
use crate::ternary::tile::{BLOCK_ROWS, STEP, STEP_BYTES};

/// The products with `vpmaddubsw ymm`.
struct Micro;

kernels!(
    Micro,
    features: ["avx2"],
    rows: c"i2s-avx2",
    tiles: c"t2-avx2",
    scaled: c"t2-avx2-scaled",
    // `TileMicro::gemv` keeps sums that are 4 times too large, of every second weight: they reach
    // 4 * 2 * 128 * K/2 in magnitude, -2^31 at K = 2^22.
    tiles_max_k: 1 << 22,
);

/// Steps, or blocks, between flushes where each adds two products of codes up to 2 << 2 to a sum: two pairs
/// of 8 * -128 are -4096, and eight times that is -2^15, just within range.
const FLUSH_SCALED: usize = 8;
/// The same where each adds four products of codes up to 2: four pairs of 2 * -128 are -2048.
const FLUSH_PLAIN: usize = 16;

/// Bytes of the codes of a step's 16 rows.
const TILE_CODES: usize = 16 * STEP;

impl TileMicro for Micro {
    const MR: usize = 4;

    #[inline(always)]
    unsafe fn gemv(w: *const u8, steps: usize, x: *const i8) -> [i32; BLOCK_ROWS] {
        // SAFETY: the caller promises the features, `steps` steps of 128 bytes at w and 16 activations for
        // each at x; a prefetch may have any address.
        unsafe {
            // acc[.][0] for the codes at bits 0 and 4, acc[.][1] for those at 2 and 6, 4 times too large.
            let masks = [_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c)];
            let mut wide = [[_mm256_setzero_si256(); 2]; 4];
            let mut start = 0;
            while start < steps {
                let end = steps.min(start + FLUSH_SCALED);
                let mut acc = [[_mm256_setzero_si256(); 2]; 4];
                for j in start..end {
                    let w = w.add(j * STEP_BYTES);
                    let x = x.add(j * STEP).cast::<i32>();
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH).cast());
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH + 64).cast());
                    let x = [
                        _mm256_set1_epi32(x.read_unaligned()),
                        _mm256_set1_epi32(x.add(1).read_unaligned()),
                        _mm256_set1_epi32(x.add(2).read_unaligned()),
                        _mm256_set1_epi32(x.add(3).read_unaligned()),
                    ];
                    for part in 0..4 {
                        let v = _mm256_loadu_si256(w.add(32 * part).cast());
                        let u = _mm256_srli_epi16::<4>(v);
                        for i in 0..2 {
                            dot(&mut acc[part][i], _mm256_and_si256(v, masks[i]), x[i]);
                            dot(&mut acc[part][i], _mm256_and_si256(u, masks[i]), x[2 + i]);
                        }
                    }
                }
                for part in 0..4 {
                    for i in 0..2 {
                        flush(&mut wide[part][i], acc[part][i]);
                    }
                }
                start = end;
            }
            let mut sums = [0; BLOCK_ROWS];
            for part in 0..4 {
                let sum = _mm256_add_epi32(wide[part][0], _mm256_srai_epi32::<2>(wide[part][1]));
                _mm256_storeu_si256(sums[8 * part..].as_mut_ptr().cast(), sum);
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn gemm<const M: usize>(w: *const u8, steps: usize, x: [*const i8; M]) -> [[i32; BLOCK_ROWS]; M] {
        // SAFETY: as in `gemv`, for each of the rows.
        unsafe {
            let mut sums = [[0; BLOCK_ROWS]; M];
            for tile in 0..2 {
                store(&mut sums, tile, tile_sums(Packed::new(w, tile), steps, x));
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn add_group<const M: usize>(
        w: *const u8,
        steps: usize,
        x: [*const i8; M],
        s: [i32; M],
        a: [f32; M],
        t: &mut [[f32; BLOCK_ROWS]; M],
    ) {
        // SAFETY: as in `gemv`, for each of the rows; and `fma`.
        unsafe {
            match steps {
                2 => add_steps::<M, 2>(w, x, s, a, t),
                4 => add_steps::<M, 4>(w, x, s, a, t),
                8 => add_steps::<M, 8>(w, x, s, a, t),
                _ => {
                    let sums = match M {
                        1 => [<Self as TileMicro>::gemv(w, steps, x[0]); M],
                        _ => <Self as TileMicro>::gemm::<M>(w, steps, x),
                    };
                    for m in 0..M {
                        for part in 0..4 {
                            let sum = _mm256_loadu_si256(sums[m][8 * part..].as_ptr().cast());
                            add_scaled(&mut t[m], part, sum, s[m], a[m]);
                        }
                    }
                }
            }
        }
    }

    const UNPACKS: bool = true;

    #[inline(always)]
    unsafe fn unpack(w: *const u8, steps: usize, codes: &mut Codes) {
        let codes = &mut codes.0[..2 * steps * TILE_CODES];
        let (first, second) = codes.split_at_mut(steps * TILE_CODES);
        // SAFETY: the caller promises the features and `steps` steps of 128 bytes at w; `first` and `second` have 256
        // bytes for each.
        unsafe {
            for (tile, codes) in [first, second].into_iter().enumerate() {
                for j in 0..steps {
                    let out = codes.as_mut_ptr().add(j * TILE_CODES).cast::<__m256i>();
                    for t in 0..4 {
                        let codes = Packed::new(w, tile).load(j, t);
                        _mm256_store_si256(out.add(2 * t), codes[0]);
                        _mm256_store_si256(out.add(2 * t + 1), codes[1]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn gemm_unpacked<const M: usize>(
        codes: &Codes,
        steps: usize,
        x: [*const i8; M],
    ) -> [[i32; BLOCK_ROWS]; M] {
        let codes = &codes.0[..2 * steps * TILE_CODES];
        // SAFETY: the caller promises the features and 16 activations for each step at each x; the codes are two tiles
        // of `steps` times 256 bytes (checked above), aligned to 64.
        unsafe {
            let mut sums = [[0; BLOCK_ROWS]; M];
            for (tile, codes) in codes.chunks_exact(steps * TILE_CODES).enumerate() {
                store(&mut sums, tile, tile_sums(Unpacked(codes.as_ptr()), steps, x));
            }
            sums
        }
    }
}

/// The codes of a tile of 16 rows.
trait TileCodes: Copy {
    /// Codes of eight rows and eight more, of weights 4t to 4t + 3 of step `j`.
    ///
    /// # Safety
    /// The CPU has AVX2, and the tile has more than `j` steps.
    unsafe fn load(self, j: usize, t: usize) -> [__m256i; 2];
}

/// As the layout has them.
#[derive(Clone, Copy)]
struct Packed(*const u8);

impl Packed {
    /// Tile 0 or 1 of a block.
    fn new(w: *const u8, tile: usize) -> Self {
        Self(w.wrapping_add(64 * tile))
    }
}

impl TileCodes for Packed {
    #[inline(always)]
    unsafe fn load(self, j: usize, t: usize) -> [__m256i; 2] {
        // SAFETY: the caller's promise: a step has 64 bytes for a tile; a prefetch may have any address.
        unsafe {
            let w = self.0.add(j * STEP_BYTES);
            if t == 0 {
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH).cast());
            }
            // (A closure would not have the features, and would be called.)
            [shifted(_mm256_loadu_si256(w.cast()), t), shifted(_mm256_loadu_si256(w.add(32).cast()), t)]
        }
    }
}

/// A byte each.
#[derive(Clone, Copy)]
struct Unpacked(*const u8);

impl TileCodes for Unpacked {
    #[inline(always)]
    unsafe fn load(self, j: usize, t: usize) -> [__m256i; 2] {
        // SAFETY: the caller's promise: a step has 256 bytes, aligned to 64.
        unsafe {
            let codes = self.0.add(j * TILE_CODES).cast::<__m256i>().add(2 * t);
            [_mm256_load_si256(codes), _mm256_load_si256(codes.add(1))]
        }
    }
}

/// Codes at the bits 2t and 2t + 1 of each byte; `t` is below 4.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn shifted(v: __m256i, t: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let v = match t {
            0 => v,
            1 => _mm256_srli_epi16::<2>(v),
            2 => _mm256_srli_epi16::<4>(v),
            _ => _mm256_srli_epi16::<6>(v),
        };
        _mm256_and_si256(v, _mm256_set1_epi8(3))
    }
}

/// Sums of a tile's 16 rows with `M` activation rows.
///
/// # Safety
/// The CPU has AVX2; the tile has `steps` steps, and there are 16 activations for each at each `x`.
#[inline(always)]
unsafe fn tile_sums<C: TileCodes, const M: usize>(
    codes: C,
    steps: usize,
    x: [*const i8; M],
) -> [[__m256i; 2]; M] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut wide = [[_mm256_setzero_si256(); 2]; M];
        let mut start = 0;
        while start < steps {
            let end = steps.min(start + FLUSH_PLAIN);
            let mut acc = [[_mm256_setzero_si256(); 2]; M];
            for j in start..end {
                add_step(&mut acc, codes, j, x);
            }
            for m in 0..M {
                for half in 0..2 {
                    flush(&mut wide[m][half], acc[m][half]);
                }
            }
            start = end;
        }
        wide
    }
}

/// Adds the products of step `j` of a tile to 16-bit sums.
///
/// # Safety
/// As for [`tile_sums`].
#[inline(always)]
unsafe fn add_step<C: TileCodes, const M: usize>(
    acc: &mut [[__m256i; 2]; M],
    codes: C,
    j: usize,
    x: [*const i8; M],
) {
    // SAFETY: the caller's promise.
    unsafe {
        for t in 0..4 {
            let codes = codes.load(j, t);
            for m in 0..M {
                let x = _mm256_set1_epi32(x[m].add(j * STEP + 4 * t).cast::<i32>().read_unaligned());
                dot(&mut acc[m][0], codes[0], x);
                dot(&mut acc[m][1], codes[1], x);
            }
        }
    }
}

/// Stores the sums of tile 0 or 1.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn store<const M: usize>(sums: &mut [[i32; BLOCK_ROWS]; M], tile: usize, of_tile: [[__m256i; 2]; M]) {
    for m in 0..M {
        for half in 0..2 {
            let out = sums[m][16 * tile + 8 * half..][..8].as_mut_ptr();
            // SAFETY: the caller's promise; there are eight values.
            unsafe { _mm256_storeu_si256(out.cast(), of_tile[m][half]) };
        }
    }
}

impl RowMicro for Micro {
    const MR: usize = 4;
    const NR: usize = 2;
    const GROUP: usize = 8;

    #[inline(always)]
    unsafe fn gemv<const N: usize>(w: *const u8, stride: usize, x: *const i8) -> [i32; N] {
        // SAFETY: the caller promises the features and N rows of that many bytes at w.
        unsafe {
            let mut rows = [_mm256_setzero_si256(); 8];
            for (r, row) in rows.iter_mut().enumerate().take(N) {
                *row = row_sums(w.add(r * row_bytes(stride)), stride, x);
            }
            first(totals(rows))
        }
    }

    #[inline(always)]
    unsafe fn gemm<const M: usize, const N: usize>(
        w: *const u8,
        stride: usize,
        x: [*const i8; M],
    ) -> [[i32; N]; M] {
        // SAFETY: the caller promises the features, N rows of stride.div_ceil(128) blocks at w and `stride`
        // activations at each x: 128 for a whole block, 64 for a last half one.
        unsafe {
            let mask = _mm256_set1_epi8(3);
            let blocks = stride.div_ceil(BLOCK);
            let mut wide = [[_mm256_setzero_si256(); N]; M];
            let mut start = 0;
            while start < blocks {
                let end = blocks.min(start + FLUSH_PLAIN);
                let mut acc = [[_mm256_setzero_si256(); N]; M];
                for b in start..end {
                    let groups = groups(stride, b);
                    let mut v = load_rows::<N>(w, stride, b);
                    for g in (0..4).rev() {
                        if g < groups {
                            for m in 0..M {
                                let x = _mm256_loadu_si256(x[m].add(b * BLOCK + 32 * g).cast());
                                for r in 0..N {
                                    dot(&mut acc[m][r], _mm256_and_si256(v[r], mask), x);
                                }
                            }
                        }
                        for v in &mut v {
                            *v = _mm256_srli_epi16::<2>(*v);
                        }
                    }
                }
                for m in 0..M {
                    for r in 0..N {
                        flush(&mut wide[m][r], acc[m][r]);
                    }
                }
                start = end;
            }
            split(wide)
        }
    }
}

/// [`TileMicro::add_group`] over `STEPS` steps, at most 8: nothing is flushed in between.
///
/// # Safety
/// The CPU has AVX2 and FMA; `STEPS` steps of 128 bytes can be read at `w`, and 16 activations for each at each `x`.
#[inline(always)]
unsafe fn add_steps<const M: usize, const STEPS: usize>(
    w: *const u8,
    x: [*const i8; M],
    s: [i32; M],
    a: [f32; M],
    t: &mut [[f32; BLOCK_ROWS]; M],
) {
    const { assert!(STEPS <= FLUSH_SCALED && FLUSH_SCALED <= FLUSH_PLAIN) }
    // SAFETY: the caller's promise; a prefetch may have any address.
    unsafe {
        let zero = _mm256_setzero_si256();
        if M == 1 {
            let broadcast = |j: usize, t: usize| {
                _mm256_set1_epi32(x[0].add(j * STEP + 4 * t).cast::<i32>().read_unaligned())
            };
            // As in `gemv`.
            let masks = [_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c)];
            let mut sums = [zero; 4];
            for (part, sum) in sums.iter_mut().enumerate() {
                let mut acc = [zero; 2];
                for j in 0..STEPS {
                    let w = w.add(j * STEP_BYTES + 32 * part);
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH).cast());
                    let v = _mm256_loadu_si256(w.cast());
                    let u = _mm256_srli_epi16::<4>(v);
                    for i in 0..2 {
                        dot(&mut acc[i], _mm256_and_si256(v, masks[i]), broadcast(j, i));
                        dot(&mut acc[i], _mm256_and_si256(u, masks[i]), broadcast(j, 2 + i));
                    }
                }
                let mut wide = [zero; 2];
                flush(&mut wide[0], acc[0]);
                flush(&mut wide[1], acc[1]);
                *sum = _mm256_add_epi32(wide[0], _mm256_srai_epi32::<2>(wide[1]));
            }
            for (part, sum) in sums.into_iter().enumerate() {
                add_scaled(&mut t[0], part, sum, s[0], a[0]);
            }
            return;
        }
        for tile in 0..2 {
            let mut acc = [[zero; 2]; M];
            for j in 0..STEPS {
                add_step(&mut acc, Packed::new(w, tile), j, x);
            }
            for m in 0..M {
                for half in 0..2 {
                    let mut sum = zero;
                    flush(&mut sum, acc[m][half]);
                    add_scaled(&mut t[m], 2 * tile + half, sum, s[m], a[m]);
                }
            }
        }
    }
}

/// Part `part` of eight values in `t`: t = fma(sum - s, a, t).
///
/// # Safety
/// The CPU has AVX2 and FMA.
#[inline(always)]
unsafe fn add_scaled(t: &mut [f32; BLOCK_ROWS], part: usize, sum: __m256i, s: i32, a: f32) {
    let t = t[8 * part..][..8].as_mut_ptr();
    // SAFETY: the caller's promise; `t` has eight values.
    unsafe {
        let sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(s)));
        _mm256_storeu_ps(t, _mm256_fmadd_ps(sum, _mm256_set1_ps(a), _mm256_loadu_ps(t)));
    }
}

/// The products of one row, in eight sums.
///
/// # Safety
/// The CPU has AVX2; a row of stride.div_ceil(128) blocks can be read at `w`, and `stride` activations at `x`.
#[inline(always)]
unsafe fn row_sums(w: *const u8, stride: usize, x: *const i8) -> __m256i {
    // SAFETY: the caller's promise: 128 activations for a whole block, 64 for a last half one; a prefetch
    // may have any address.
    unsafe {
        let (blocks, half) = (stride / BLOCK, stride % BLOCK);
        // acc[0] for the bits 0 and 4, acc[1] for 2 and 6, 4 times too large: at most
        // 4 * 2 * 128 * 2^23/16 = 2^29 in a lane.
        let masks = [_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c)];
        let mut wide = [_mm256_setzero_si256(); 2];
        let mut start = 0;
        while start < blocks {
            let end = blocks.min(start + FLUSH_SCALED);
            let mut acc = [_mm256_setzero_si256(); 2];
            for b in start..end {
                let w = w.add(b * BLOCK_BYTES);
                let x = x.add(b * BLOCK);
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(ROW_PREFETCH).cast());
                let v = _mm256_loadu_si256(w.cast());
                let u = _mm256_srli_epi16::<4>(v);
                for i in 0..2 {
                    // Bits 1..0 hold group 3, 3..2 group 2, 5..4 group 1, 7..6 group 0.
                    let (low, high) = (x.add(32 * (3 - i)), x.add(32 * (1 - i)));
                    dot(&mut acc[i], _mm256_and_si256(v, masks[i]), _mm256_loadu_si256(low.cast()));
                    dot(&mut acc[i], _mm256_and_si256(u, masks[i]), _mm256_loadu_si256(high.cast()));
                }
            }
            flush(&mut wide[0], acc[0]);
            flush(&mut wide[1], acc[1]);
            start = end;
        }
        if half != 0 {
            let u = _mm256_srli_epi16::<4>(_mm256_loadu_si256(w.add(blocks * BLOCK_BYTES).cast()));
            for i in 0..2 {
                let mut acc = _mm256_setzero_si256();
                let x = _mm256_loadu_si256(x.add(blocks * BLOCK + 32 * (1 - i)).cast());
                dot(&mut acc, _mm256_and_si256(u, masks[i]), x);
                flush(&mut wide[i], acc);
            }
        }
        _mm256_add_epi32(wide[0], _mm256_srai_epi32::<2>(wide[1]))
    }
}

/// Adds pairs of products to sixteen 16-bit sums. A pair is at most 2 * 3 << 2 * 128 in magnitude even for
/// invalid codes, so that the instruction's own sum does not saturate.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn dot(acc: &mut __m256i, codes: __m256i, x: __m256i) {
    // SAFETY: the caller's promise.
    unsafe { *acc = _mm256_add_epi16(*acc, _mm256_maddubs_epi16(codes, x)) }
}

/// Adds pairs of 16-bit sums, the two of each 32-bit lane, to 32-bit sums.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn flush(wide: &mut __m256i, acc: __m256i) {
    // SAFETY: the caller's promise.
    unsafe { *wide = _mm256_add_epi32(*wide, _mm256_madd_epi16(acc, _mm256_set1_epi16(1))) }
}
