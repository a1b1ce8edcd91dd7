//! A kernel plugin to start from: a packing of its own, and two kernels that read it.
//!
//! ```sh
//! cargo build --release
//! bitnet plugins verify target/release/libexample_kernels.so
//! bitnet plugins bench target/release/libexample_kernels.so
//! ```
//!
//! # The packing
//! Decode is limited by how fast weights come from memory, so they should come as one stream, 2 bits each,
//! and need no shuffling. Eight rows lie side by side: 16 weights of each make a 32-bit lane, eight lanes a
//! 256-bit vector.
//!
//! ```text
//! step s of a granule, 32 bytes:  lane r = row r, weights 16 s .. 16 s + 16
//! byte b of a lane:               weights 16 s + b, + 4, + 8, + 12, in bits 1..0, 3..2, 5..4, 7..6
//! ```
//!
//! Four weights at the same bits of a lane meet four activations that follow each other, so one broadcast
//! of 4 bytes serves eight rows, and every lane ends up with its own row's sum: no horizontal additions.
//!
//! # The arithmetic
//! Codes are u = c + 1 in {0, 1, 2}, unsigned as `vpmaddubsw` wants one side to be. The host gives the sum
//! of each row of activations, and sum(q * c) = sum(q * u) - sum(q).

use std::ffi::CStr;
use std::ops::Range;

use bitnet_burn_plugin::sdk::*;

/// Rows side by side.
const ROWS: usize = 8;
/// Weights of a row in one step.
const STEP: usize = 16;
/// Bytes of a step.
const STEP_BYTES: usize = 32;
/// Activations are zero up to a multiple of this, and so the packing may be as long.
const PADDED: usize = 64;

/// Steps of a granule: the zeros behind a row of activations make what lies behind K harmless.
fn steps(k: usize) -> usize {
    k.next_multiple_of(PADDED) / STEP
}

/// Byte in its granule, and bits in that byte, of weight `k` of row `r`.
fn position(r: usize, k: usize) -> (usize, u32) {
    let in_step = k % STEP;
    (k / STEP * STEP_BYTES + r * 4 + in_step % 4, 2 * (in_step / 4) as u32)
}

fn granule_bytes(k: usize) -> usize {
    steps(k) * STEP_BYTES
}

fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) {
    // A zero byte would be four weights of -1; where there is no row or no weight, that is as good as any.
    out.fill(0);
    for n in rows.clone() {
        let (granule, r) = ((n - rows.start) / ROWS, n % ROWS);
        let out = &mut out[granule * granule_bytes(canonical.k())..];
        let codes = canonical.canonical_row(n);
        for k in 0..canonical.k() {
            let (byte, shift) = position(r, k);
            out[byte] |= codes.code(k) << shift;
        }
    }
}

fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) {
    let k = packed.k();
    let mut weights = vec![0i8; k];
    for (n, out) in rows.zip(out.chunks_exact_mut(bitnet_burn_plugin::canonical::row_bytes(k))) {
        let granule = &packed.data()[n / ROWS * granule_bytes(k)..];
        for (k, weight) in weights.iter_mut().enumerate() {
            let (byte, shift) = position(n % ROWS, k);
            *weight = (granule[byte] >> shift & 3) as i8 - 1;
        }
        bitnet_burn_plugin::canonical::pack_row(&weights, out);
    }
}

/// Sums of unsigned codes times activations, of eight rows with one row of activations.
type Sums = [i32; ROWS];

/// One way to multiply a granule by M rows of activations.
trait Multiply {
    /// Sums for eight rows of weights (`steps` steps) and M rows of activations (`steps` * 16 values each).
    fn granule<const M: usize>(weights: &[u8], x: [&[i8]; M]) -> [Sums; M];
}

/// The loop over a tile: granules of weights, and within them blocks of activations.
fn run<K: Multiply>(w: &WeightsRef, x: &ActivationsRef, y: &mut OutputTile) {
    /// Rows of activations that share the unpacking of the weights.
    const M: usize = 4;
    let (bytes, width) = (granule_bytes(w.k()), steps(w.k()) * STEP);
    let (rows_n, rows_m) = (y.rows_n(), y.rows_m());
    let row = |m: usize| &x.padded_row(m)[..width];
    for first in rows_n.clone().step_by(ROWS) {
        let weights = &w.data()[first / ROWS * bytes..][..bytes];
        let last = (first + ROWS).min(rows_n.end);
        let mut store = |m: usize, sums: &Sums| {
            for n in first..last {
                y.set(m, n, sums[n - first] - x.sum(m), w, x);
            }
        };
        let mut m = rows_m.start;
        while m + M <= rows_m.end {
            let sums = K::granule(weights, std::array::from_fn::<_, M, _>(|i| row(m + i)));
            for (i, sums) in sums.iter().enumerate() {
                store(m + i, sums);
            }
            m += M;
        }
        for m in m..rows_m.end {
            store(m, &K::granule(weights, [row(m)])[0]);
        }
    }
}

/// For any processor: the compiler makes of it what it can.
struct Portable;

impl Multiply for Portable {
    fn granule<const M: usize>(weights: &[u8], x: [&[i8]; M]) -> [Sums; M] {
        let mut sums = [[0; ROWS]; M];
        for (s, step) in weights.chunks_exact(STEP_BYTES).enumerate() {
            for (x, sums) in x.iter().zip(&mut sums) {
                let x: &[i8; STEP] = x[s * STEP..][..STEP].try_into().expect("a step");
                for (lane, sum) in step.chunks_exact(4).zip(sums) {
                    for b in 0..4 {
                        for t in 0..4 {
                            *sum += i32::from(lane[b] >> (2 * t) & 3) * i32::from(x[4 * t + b]);
                        }
                    }
                }
            }
        }
        sums
    }
}

/// With AVX2.
#[cfg(target_arch = "x86_64")]
struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Multiply for Avx2 {
    fn granule<const M: usize>(weights: &[u8], x: [&[i8]; M]) -> [Sums; M] {
        use std::arch::x86_64::*;

        /// Steps until 16-bit sums must be widened: each adds four pairs of at most 2 * 128 to every lane's
        /// halves, 2048 in magnitude, and 16 times that is just within range.
        const FLUSH: usize = 16;

        #[target_feature(enable = "avx2")]
        fn multiply<const M: usize>(weights: &[u8], x: [&[i8]; M]) -> [Sums; M] {
            let steps = weights.len() / STEP_BYTES;
            assert!(x.iter().all(|x| x.len() >= steps * STEP));
            let (mask, ones) = (_mm256_set1_epi8(3), _mm256_set1_epi16(1));
            let mut wide = [_mm256_setzero_si256(); M];
            for start in (0..steps).step_by(FLUSH) {
                let mut narrow = [_mm256_setzero_si256(); M];
                for s in start..steps.min(start + FLUSH) {
                    // SAFETY: step s is within the weights, and so is its prefetched successor or not: a
                    // prefetch may have any address.
                    let mut codes = unsafe {
                        let step = weights.as_ptr().add(s * STEP_BYTES);
                        _mm_prefetch::<_MM_HINT_T0>(step.wrapping_add(1024).cast());
                        _mm256_loadu_si256(step.cast())
                    };
                    for t in 0..4 {
                        let low = _mm256_and_si256(codes, mask);
                        for m in 0..M {
                            // SAFETY: the rows are at least as long as the steps (asserted above).
                            let four =
                                unsafe { x[m].as_ptr().add(s * STEP + 4 * t).cast::<i32>().read_unaligned() };
                            let products = _mm256_maddubs_epi16(low, _mm256_set1_epi32(four));
                            narrow[m] = _mm256_add_epi16(narrow[m], products);
                        }
                        codes = _mm256_srli_epi16::<2>(codes);
                    }
                }
                for m in 0..M {
                    wide[m] = _mm256_add_epi32(wide[m], _mm256_madd_epi16(narrow[m], ones));
                }
            }
            wide.map(|sums| {
                let mut out = [0; ROWS];
                // SAFETY: eight 32-bit lanes, and room for eight.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), sums) };
                out
            })
        }

        // SAFETY: the host calls a kernel only where its `FEATURES` are.
        unsafe { multiply(weights, x) }
    }
}

/// A kernel over the packing: what both have in common, and what tells them apart.
macro_rules! kernel {
    ($type:ident, $name:literal, $features:literal) => {
        impl TernaryKernel for $type {
            const NAME: &'static CStr = $name;
            // The same name: the host may choose between the two call by call.
            const LAYOUT: Option<&'static CStr> = Some(c"rows8");
            const FEATURES: &'static CStr = $features;
            const ROW_GRANULE: usize = ROWS;

            fn granule_bytes(k: usize) -> usize {
                granule_bytes(k)
            }

            fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
                pack(canonical, rows, out);
                Ok(())
            }

            fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
                unpack(packed, rows, out);
                Ok(())
            }

            fn run(w: &WeightsRef, x: &ActivationsRef, _: &[u8], y: &mut OutputTile) -> KernelResult {
                run::<$type>(w, x, y);
                Ok(())
            }
        }
    };
}

kernel!(Portable, c"portable", c"");
#[cfg(target_arch = "x86_64")]
kernel!(Avx2, c"avx2", c"avx2");

#[cfg(target_arch = "x86_64")]
bitnet_burn_plugin::plugin! {
    /// The descriptor.
    pub static PLUGIN = { name: c"example-rust", version: c"0.1.0", kernels: [Avx2, Portable] };
}
#[cfg(not(target_arch = "x86_64"))]
bitnet_burn_plugin::plugin! {
    /// The descriptor.
    pub static PLUGIN = { name: c"example-rust", version: c"0.1.0", kernels: [Portable] };
}
bitnet_burn_plugin::export_plugin!(PLUGIN);
