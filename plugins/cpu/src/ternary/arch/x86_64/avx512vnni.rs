//! AVX-512 VNNI: `vpdpbusd` on 512-bit registers, 64 products an instruction.

use std::arch::x86_64::*;

use bitnet_burn_plugin::canonical::{BLOCK, BLOCK_BYTES};

use super::kernels;
use crate::ternary::generic::{RowMicro, TileMicro, row_bytes};
use crate::ternary::tile::{BLOCK_ROWS, STEP, STEP_BYTES};

/// The products with `vpdpbusd zmm`.
struct Micro;

kernels!(
    Micro,
    features: ["avx512f", "avx512bw", "avx512vl", "avx512vnni"],
    rows: c"i2s-avx512vnni",
    tiles: c"t2-avx512vnni",
    scaled: c"t2-avx512vnni-scaled",
    // `TileMicro::gemv` keeps sums that are 64 times too large, of every fourth weight: they reach
    // 64 * 2 * 128 * K/4 in magnitude, -2^31 at K = 2^19.
    tiles_max_k: 1 << 19,
);

/// Bytes ahead to prefetch: what it takes to keep up with memory on one sequential stream.
const TILE_PREFETCH: usize = 4096;
/// The same for rows, which are short.
const ROW_PREFETCH: usize = 2048;

impl TileMicro for Micro {
    const MR: usize = 8;

    #[inline(always)]
    unsafe fn gemv(w: *const u8, steps: usize, x: *const i8) -> [i32; BLOCK_ROWS] {
        // SAFETY: the caller promises the features, `steps` steps of 128 bytes at w and 16 activations for
        // each at x; a prefetch may have any address.
        unsafe {
            let masks = pair_masks();
            let mut acc = [[_mm512_setzero_si512(); 4]; 2];
            for j in 0..steps {
                let w = w.add(j * STEP_BYTES);
                let x = broadcasts(x.add(j * STEP));
                for tile in 0..2 {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(64 * tile + TILE_PREFETCH).cast());
                    let v = _mm512_loadu_si512(w.add(64 * tile).cast());
                    for t in 0..4 {
                        acc[tile][t] = _mm512_dpbusd_epi32(acc[tile][t], _mm512_and_si512(v, masks[t]), x[t]);
                    }
                }
            }
            unscaled(acc)
        }
    }

    #[inline(always)]
    unsafe fn gemm<const M: usize>(w: *const u8, steps: usize, x: [*const i8; M]) -> [[i32; BLOCK_ROWS]; M] {
        // SAFETY: as in `gemv`, for each of the rows.
        unsafe {
            let mask = _mm512_set1_epi8(3);
            // Few activation rows leave registers free: more sums, so that each waits less for itself.
            let spread = match M {
                1 | 2 => 4,
                3 | 4 => 2,
                _ => 1,
            };
            let mut acc = [[[_mm512_setzero_si512(); 2]; 4]; M];
            for j in 0..steps {
                let w = w.add(j * STEP_BYTES);
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH).cast());
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH + 64).cast());
                let v = [_mm512_loadu_si512(w.cast()), _mm512_loadu_si512(w.add(64).cast())];
                // Unpacking costs nothing here: it runs beside the products, on other ports.
                let codes = [
                    [_mm512_and_si512(v[0], mask), _mm512_and_si512(v[1], mask)],
                    [shifted::<2>(v[0], mask), shifted::<2>(v[1], mask)],
                    [shifted::<4>(v[0], mask), shifted::<4>(v[1], mask)],
                    [shifted::<6>(v[0], mask), shifted::<6>(v[1], mask)],
                ];
                for t in 0..4 {
                    for m in 0..M {
                        let x = x[m].add(j * STEP + 4 * t).cast::<i32>().read_unaligned();
                        let x = _mm512_set1_epi32(x);
                        let acc = &mut acc[m][t % spread];
                        acc[0] = _mm512_dpbusd_epi32(acc[0], codes[t][0], x);
                        acc[1] = _mm512_dpbusd_epi32(acc[1], codes[t][1], x);
                    }
                }
            }
            let mut sums = [[0; BLOCK_ROWS]; M];
            for m in 0..M {
                for tile in 0..2 {
                    let mut sum = acc[m][0][tile];
                    for t in 1..spread {
                        sum = _mm512_add_epi32(sum, acc[m][t][tile]);
                    }
                    _mm512_storeu_si512(sums[m][16 * tile..].as_mut_ptr().cast(), sum);
                }
            }
            sums
        }
    }
}

/// The bit pairs of every byte. Codes are not shifted down but multiplied where they lie: the sums of pair t
/// are 4^t times too large, see [`unscaled`].
///
/// # Safety
/// The CPU has AVX-512BW.
#[inline(always)]
pub(super) unsafe fn pair_masks() -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        [
            _mm512_set1_epi8(0x03),
            _mm512_set1_epi8(0x0c),
            _mm512_set1_epi8(0x30),
            _mm512_set1_epi8(0xc0u8 as i8),
        ]
    }
}

/// The sums of a block's 32 rows from those of each tile's four bit pairs, pair t 4^t times too large.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
pub(super) unsafe fn unscaled(acc: [[__m512i; 4]; 2]) -> [i32; BLOCK_ROWS] {
    let mut sums = [0; BLOCK_ROWS];
    for (sums, [a0, a1, a2, a3]) in sums.as_chunks_mut::<16>().0.iter_mut().zip(acc) {
        // SAFETY: the caller's promise; 16 sums are 64 bytes.
        unsafe {
            let low = _mm512_add_epi32(a0, _mm512_srai_epi32::<2>(a1));
            let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(a2), _mm512_srai_epi32::<6>(a3));
            _mm512_storeu_si512(sums.as_mut_ptr().cast(), _mm512_add_epi32(low, high));
        }
    }
    sums
}

/// Four groups of four activations, each in all lanes.
///
/// # Safety
/// The CPU has AVX-512F, and 16 activations can be read at `x`.
#[inline(always)]
unsafe fn broadcasts(x: *const i8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let x = x.cast::<i32>();
        [
            _mm512_set1_epi32(x.read_unaligned()),
            _mm512_set1_epi32(x.add(1).read_unaligned()),
            _mm512_set1_epi32(x.add(2).read_unaligned()),
            _mm512_set1_epi32(x.add(3).read_unaligned()),
        ]
    }
}

/// The codes at bit `SHIFT` of each byte.
///
/// # Safety
/// The CPU has AVX-512BW.
#[inline(always)]
pub(super) unsafe fn shifted<const SHIFT: u32>(v: __m512i, mask: __m512i) -> __m512i {
    // SAFETY: the caller's promise. The shift moves bits between the bytes of a pair, the mask drops them.
    unsafe { _mm512_and_si512(_mm512_srli_epi16::<SHIFT>(v), mask) }
}

/// Weights of a vector: two canonical blocks.
const PAIR: usize = 2 * BLOCK;
/// Bytes of a vector.
const PAIR_BYTES: usize = 2 * BLOCK_BYTES;

/// A pair of blocks needs the activations of bit group g from both blocks in one vector, so `prepare`
/// sorts each 256 of them as [g 0 of block 0, g 0 of block 1, g 1 of block 0, ...], zero behind the end.
impl RowMicro for Micro {
    const MR: usize = 4;
    const NR: usize = 4;
    const GROUP: usize = 16;

    fn workspace_stride(stride: usize) -> usize {
        stride.next_multiple_of(PAIR)
    }

    #[inline(always)]
    fn prepare_row(x: &[i8], workspace: &mut [u8]) {
        for (pair, out) in workspace.chunks_exact_mut(PAIR).enumerate() {
            for g in 0..4 {
                for b in 0..2 {
                    let out = &mut out[64 * g + 32 * b..][..32];
                    match x.get(PAIR * pair + BLOCK * b + 32 * g..).and_then(|x| x.first_chunk::<32>()) {
                        Some(x) => out.copy_from_slice(&x.map(|x| x as u8)),
                        None => out.fill(0),
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn gemv<const N: usize>(w: *const u8, stride: usize, x: *const i8) -> [i32; N] {
        // SAFETY: the caller promises the features and N rows of that many bytes at w.
        unsafe {
            let mut rows = [_mm512_setzero_si512(); 16];
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
        // SAFETY: the caller promises the features, N rows of stride.div_ceil(128) blocks at w and 256
        // prepared activations for each pair of blocks at each x; a half pair is loaded under a mask.
        unsafe {
            let (pairs, half) = (stride.div_ceil(BLOCK) / 2, stride.div_ceil(BLOCK) % 2);
            let mask = _mm512_set1_epi8(3);
            let mut acc = [[_mm512_setzero_si512(); N]; M];
            for p in 0..pairs + half {
                let mut v = [_mm512_setzero_si512(); N];
                for r in 0..N {
                    let w = w.add(r * row_bytes(stride) + p * PAIR_BYTES);
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(ROW_PREFETCH).cast());
                    v[r] = load_pair(w, p < pairs);
                }
                for g in (0..4).rev() {
                    let mut codes = [_mm512_setzero_si512(); N];
                    for r in 0..N {
                        codes[r] = _mm512_and_si512(v[r], mask);
                        v[r] = _mm512_srli_epi16::<2>(v[r]);
                    }
                    for m in 0..M {
                        let x = _mm512_loadu_si512(x[m].add(p * PAIR + 64 * g).cast());
                        for r in 0..N {
                            acc[m][r] = _mm512_dpbusd_epi32(acc[m][r], codes[r], x);
                        }
                    }
                }
            }
            let mut flat = [_mm512_setzero_si512(); 16];
            for m in 0..M {
                for r in 0..N {
                    flat[m * N + r] = acc[m][r];
                }
            }
            let totals: [i32; 16] = first(totals(flat));
            let mut sums = [[0; N]; M];
            for m in 0..M {
                for r in 0..N {
                    sums[m][r] = totals[m * N + r];
                }
            }
            sums
        }
    }
}

/// The products of one row, in 16 sums.
///
/// # Safety
/// The CPU has AVX-512 VNNI; a row of stride.div_ceil(128) blocks can be read at `w`, and 256 prepared
/// activations for each pair of them at `x`.
#[inline(always)]
unsafe fn row_sums(w: *const u8, stride: usize, x: *const i8) -> __m512i {
    // SAFETY: the caller's promise; a half pair is loaded under a mask; a prefetch may have any address.
    unsafe {
        let (pairs, half) = (stride.div_ceil(BLOCK) / 2, stride.div_ceil(BLOCK) % 2);
        // acc[.][g] is 4^(3 - g) times too large; of a lane's K/64 products for each g that makes at most
        // 64 * 2 * 128 * 2^23/64 = 2^31 in magnitude (and only -2^31 is reached).
        let masks = [
            _mm512_set1_epi8(0xc0u8 as i8),
            _mm512_set1_epi8(0x30),
            _mm512_set1_epi8(0x0c),
            _mm512_set1_epi8(0x03),
        ];
        // Two vectors at a time, for enough independent sums.
        let mut acc = [[_mm512_setzero_si512(); 4]; 2];
        let mut p = 0;
        while p + 2 <= pairs {
            for u in 0..2 {
                let w = w.add((p + u) * PAIR_BYTES);
                let x = x.add((p + u) * PAIR);
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(ROW_PREFETCH).cast());
                let v = _mm512_loadu_si512(w.cast());
                for g in 0..4 {
                    let x = _mm512_loadu_si512(x.add(64 * g).cast());
                    acc[u][g] = _mm512_dpbusd_epi32(acc[u][g], _mm512_and_si512(v, masks[g]), x);
                }
            }
            p += 2;
        }
        while p < pairs + half {
            let w = w.add(p * PAIR_BYTES);
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(ROW_PREFETCH).cast());
            let v = load_pair(w, p < pairs);
            for g in 0..4 {
                let x = _mm512_loadu_si512(x.add(p * PAIR + 64 * g).cast());
                acc[0][g] = _mm512_dpbusd_epi32(acc[0][g], _mm512_and_si512(v, masks[g]), x);
            }
            p += 1;
        }
        // Each of the two shares stays within its range, their sum may not: shift first.
        let mut sum = _mm512_setzero_si512();
        for acc in acc {
            let high = _mm512_add_epi32(_mm512_srai_epi32::<6>(acc[0]), _mm512_srai_epi32::<4>(acc[1]));
            let low = _mm512_add_epi32(_mm512_srai_epi32::<2>(acc[2]), acc[3]);
            sum = _mm512_add_epi32(sum, _mm512_add_epi32(high, low));
        }
        sum
    }
}

/// Lane i of the result is the sum of the lanes of `v[i]`.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
unsafe fn totals(v: [__m512i; 16]) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let mut quads = [_mm512_setzero_si512(); 4];
        for i in 0..4 {
            // In each 128 bits: [0 + 2 of a, of b, 1 + 3 of a, of b], then [a, b, c, d].
            let [a, b, c, d] = [v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]];
            let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            quads[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        }
        // Then the 128-bit parts: those at even places plus those at odd ones, twice.
        let low = fold_parts(quads[0], quads[1]);
        let high = fold_parts(quads[2], quads[3]);
        fold_parts(low, high)
    }
}

/// The 128-bit parts [a0 + a1, a2 + a3, b0 + b1, b2 + b3].
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
unsafe fn fold_parts(a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let even = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
        _mm512_add_epi32(even, _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b))
    }
}

/// The first `N` lanes.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
unsafe fn first<const N: usize>(v: __m512i) -> [i32; N] {
    let mut all = [0; 16];
    // SAFETY: the caller's promise; `all` has 64 bytes.
    unsafe { _mm512_storeu_si512(all.as_mut_ptr().cast(), v) };
    let mut lanes = [0; N];
    lanes.copy_from_slice(&all[..N]);
    lanes
}

/// Two blocks, or one (and zero bytes, codes that multiply as 0) where the row has an odd number.
///
/// # Safety
/// The CPU has AVX-512F, and two blocks can be read at `w`, or one.
#[inline(always)]
unsafe fn load_pair(w: *const u8, both: bool) -> __m512i {
    // SAFETY: the caller's promise; masked-off elements are not accessed.
    unsafe { if both { _mm512_loadu_si512(w.cast()) } else { _mm512_maskz_loadu_epi64(0x0f, w.cast()) } }
}
