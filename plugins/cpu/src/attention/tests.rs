//! Attention against double precision, between instruction sets, threads, chunks and types of cache.

use half::f16;

use super::*;
use crate::simd::tests::{Rng, bits};
use crate::threads::tests::Scoped;

struct Case {
    shape: Shape,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
    q_stride: usize,
}

impl Case {
    /// A cache that holds `positions`, garbage behind them, and a query at each position.
    fn new(seed: u64, n_heads: usize, n_kv_heads: usize, head_dim: usize, positions: usize) -> Self {
        Self::windowed(seed, [n_heads, n_kv_heads, head_dim], positions, None)
    }

    fn windowed(
        seed: u64,
        [n_heads, n_kv_heads, head_dim]: [usize; 3],
        positions: usize,
        window: Option<usize>,
    ) -> Self {
        let mut rng = Rng(seed);
        let capacity = positions + 9;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = Shape { n_heads, n_kv_heads, head_dim, capacity, scale, window };
        let mut cache = || {
            let mut cache = vec![f32::NAN; n_kv_heads * capacity * head_dim];
            let x = rng.f32s(positions * n_kv_heads * head_dim);
            append(CacheMut::F32(&mut cache), shape, 0, positions, &x, n_kv_heads * head_dim);
            cache
        };
        let (k, v) = (cache(), cache());
        let q_stride = n_heads * head_dim + 5;
        let q = rng.f32s(positions * q_stride).into_iter().map(|q| q * 4.0).collect();
        Self { shape, k, v, q, q_stride }
    }

    fn run(&self, level: Level, rows: std::ops::Range<usize>, pool: &Scoped) -> Vec<f32> {
        self.run_with(level, rows, pool, CacheRef::F32(&self.k), CacheRef::F32(&self.v))
    }

    fn run_with(
        &self,
        level: Level,
        rows: std::ops::Range<usize>,
        pool: &Scoped,
        k: CacheRef,
        v: CacheRef,
    ) -> Vec<f32> {
        let width = self.shape.n_heads * self.shape.head_dim;
        let stride = width + 3;
        let mut out = vec![7.0; rows.len() * stride];
        let q = &self.q[rows.start * self.q_stride..];
        let n = rows.len();
        attention_at(level, q, self.q_stride, n, k, v, self.shape, rows.start, &mut out, stride, pool);
        assert!(out.chunks(stride).all(|row| row[width..] == [7.0; 3]));
        out.chunks(stride).flat_map(|row| &row[..width]).copied().collect()
    }

    fn in_f64(&self, row: usize) -> Vec<f64> {
        let Shape { n_heads, n_kv_heads, head_dim, capacity, scale, window } = self.shape;
        let first = window.map_or(0, |window| (row + 1).saturating_sub(window));
        let mut out = Vec::new();
        for head in 0..n_heads {
            let q = &self.q[row * self.q_stride + head * head_dim..][..head_dim];
            let at = |p: usize| (head / (n_heads / n_kv_heads) * capacity + p) * head_dim;
            let scores: Vec<f64> = (first..=row)
                .map(|p| {
                    let k = &self.k[at(p)..][..head_dim];
                    q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
                        * f64::from(scale)
                })
                .collect();
            let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let l: f64 = scores.iter().map(|s| (s - m).exp()).sum();
            for d in 0..head_dim {
                let weighted = (first..=row).zip(&scores);
                let sum: f64 = weighted.map(|(p, s)| (s - m).exp() * f64::from(self.v[at(p) + d])).sum();
                out.push(sum / l);
            }
        }
        out
    }
}

const SHAPES: [(usize, usize, usize, usize); 6] =
    [(4, 1, 16, 70), (8, 2, 64, 300), (3, 3, 100, 140), (5, 1, 24, 530), (12, 2, 32, 257), (20, 5, 128, 66)];

#[test]
fn close_to_double_precision() {
    let pool = Scoped(2);
    for (i, (heads, kv_heads, head_dim, positions)) in SHAPES.into_iter().enumerate() {
        let case = Case::new(i as u64, heads, kv_heads, head_dim, positions);
        let got = case.run(Level::best(), 0..positions, &pool);
        for row in [0, 1, 15, 63, 64, positions / 2, positions - 1] {
            for (got, want) in got[row * heads * head_dim..].iter().zip(case.in_f64(row)) {
                assert!((f64::from(*got) - want).abs() < 2e-6, "{heads}x{head_dim}, row {row}: {got} {want}");
            }
        }
    }
}

/// Windows of one position, within a vector, of a tile, over two tiles, and longer than the sequence.
const WINDOWS: [usize; 6] = [1, 8, 37, 256, 300, 1000];

#[test]
fn windows_are_close_to_double_precision() {
    let pool = Scoped(2);
    for (i, window) in WINDOWS.into_iter().enumerate() {
        for (heads, kv_heads, head_dim, positions) in SHAPES {
            let shape = [heads, kv_heads, head_dim];
            let case = Case::windowed(i as u64 + 200, shape, positions, Some(window));
            let got = case.run(Level::best(), 0..positions, &pool);
            for row in [0, 7, 8, 36, 37, 63, 64, positions / 2, positions - 1] {
                for (got, want) in got[row * heads * head_dim..].iter().zip(case.in_f64(row)) {
                    let difference = (f64::from(*got) - want).abs();
                    assert!(difference < 2e-6, "window {window}, row {row}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn windows_give_the_same_bits_by_chunks_threads_and_instruction_sets() {
    let pools = [1, 3].map(Scoped);
    for (i, window) in WINDOWS.into_iter().enumerate() {
        for (heads, kv_heads, head_dim, positions) in SHAPES {
            let shape = [heads, kv_heads, head_dim];
            let mut case = Case::windowed(i as u64 + 300, shape, positions, Some(window));
            let want = bits(&case.run(Level::best(), 0..positions, &pools[0]));
            for level in Level::available() {
                for (pool, chunk) in [(0, 1), (1, 7), (1, 41), (0, positions)] {
                    let by_chunks: Vec<f32> = (0..positions)
                        .step_by(chunk)
                        .flat_map(|from| case.run(level, from..(from + chunk).min(positions), &pools[pool]))
                        .collect();
                    assert!(bits(&by_chunks) == want, "{level:?}, window {window}, chunks of {chunk}");
                }
            }
            // A window that holds all positions changes no bit.
            if window >= positions {
                case.shape.window = None;
                assert!(bits(&case.run(Level::best(), 0..positions, &pools[1])) == want, "window {window}");
            }
        }
    }
}

/// What lies before a window is not read, whatever it is.
#[test]
fn a_window_hides_what_is_not_a_number() {
    for rows in [1, 60] {
        let mut case = Case::windowed(3, [4, 1, 32], 400, Some(100));
        let first = 400 - rows + 1 - 100;
        case.k[..first * 32].fill(f32::NAN);
        case.v[..first * 32].fill(f32::INFINITY);
        let out = case.run(Level::best(), 400 - rows..400, &Scoped(1));
        assert!(out.iter().all(|v| v.is_finite()), "{rows} rows");
    }
}

#[test]
#[should_panic = "a window of no positions"]
fn a_window_has_a_position() {
    Case::windowed(1, [2, 1, 16], 3, Some(0)).run(Level::best(), 0..3, &Scoped(1));
}

#[test]
fn instruction_sets_threads_and_chunks_agree() {
    let pools = [1, 2, 3].map(Scoped);
    for (i, (heads, kv_heads, head_dim, positions)) in SHAPES.into_iter().enumerate() {
        let case = Case::new(i as u64 + 50, heads, kv_heads, head_dim, positions);
        let want = bits(&case.run(Level::best(), 0..positions, &pools[0]));
        for level in Level::available() {
            for (pool, chunk) in pools.iter().zip([1, 7, 3]) {
                let by_chunks: Vec<f32> = (0..positions)
                    .step_by(chunk)
                    .flat_map(|from| case.run(level, from..(from + chunk).min(positions), pool))
                    .collect();
                assert!(bits(&by_chunks) == want, "{level:?}, chunks of {chunk}, {heads}x{head_dim}");
            }
            for (pool, chunk) in pools.iter().rev().zip([positions, 64, 41]) {
                let by_chunks: Vec<f32> = (0..positions)
                    .step_by(chunk)
                    .flat_map(|from| case.run(level, from..(from + chunk).min(positions), pool))
                    .collect();
                assert!(bits(&by_chunks) == want, "{level:?}, chunks of {chunk}, {heads}x{head_dim}");
            }
        }
    }
}

/// A cache and the f32 cache of its values give the same bits, by one call, by threads and in chunks.
fn same_as_its_values(case: &Case, k: CacheRef, v: CacheRef, what: &str) {
    let positions = case.shape.capacity - 9;
    let pools = [1, 3].map(Scoped);
    let want = bits(&case.run(Level::best(), 0..positions, &pools[0]));
    for level in Level::available() {
        assert!(bits(&case.run_with(level, 0..positions, &pools[1], k, v)) == want, "{what}, {level:?}");
        for (pool, chunk) in pools.iter().zip([1, 7]) {
            let by_chunks: Vec<f32> = (0..positions)
                .step_by(chunk)
                .flat_map(|from| case.run_with(level, from..(from + chunk).min(positions), pool, k, v))
                .collect();
            assert!(bits(&by_chunks) == want, "{what}, {level:?}, chunks of {chunk}");
        }
    }
}

#[test]
fn half_precision_is_the_same_computation_on_rounded_values() {
    for (i, (heads, kv_heads, head_dim, positions)) in SHAPES.into_iter().enumerate() {
        let mut case = Case::new(i as u64 + 90, heads, kv_heads, head_dim, positions);
        let round = |v: &[f32]| v.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>();
        let (k, v) = (round(&case.k), round(&case.v));
        case.k = k.iter().map(|k| k.to_f32()).collect();
        case.v = v.iter().map(|v| v.to_f32()).collect();
        let (k, v) = (CacheRef::F16(&k), CacheRef::F16(&v));
        same_as_its_values(&case, k, v, &format!("f16, {heads}x{head_dim}"));
    }
}

#[test]
fn int8_is_the_same_computation_on_codes_times_scales() {
    for (i, (heads, kv_heads, head_dim, positions)) in SHAPES.into_iter().enumerate() {
        let mut case = Case::new(i as u64 + 130, heads, kv_heads, head_dim, positions);
        // Quantises the cache in place; what no position holds stays NaN.
        let shape = case.shape;
        let quantise = |values: &mut [f32]| {
            let mut codes = vec![77; values.len()];
            let mut scale = vec![f32::NAN; values.len() / head_dim];
            for position in 0..positions {
                let heads = (0..kv_heads).map(|h| (h * shape.capacity + position) * head_dim);
                let x: Vec<f32> = heads.flat_map(|at| values[at..at + head_dim].to_vec()).collect();
                let cache = CacheMut::Int8 { codes: &mut codes, scale: &mut scale };
                append(cache, shape, position, 1, &x, x.len());
            }
            for ((value, &code), row) in values.iter_mut().zip(&codes).zip(0..) {
                *value = f32::from(code) * scale[row / head_dim];
            }
            (codes, scale)
        };
        let ((k, k_scale), (v, v_scale)) = (quantise(&mut case.k), quantise(&mut case.v));
        let k = CacheRef::Int8 { codes: &k, scale: &k_scale };
        let v = CacheRef::Int8 { codes: &v, scale: &v_scale };
        same_as_its_values(&case, k, v, &format!("int8, {heads}x{head_dim}"));
    }
}

#[test]
fn appending_int8_keeps_a_scale_for_each_position_and_head() {
    let shape = Shape { n_heads: 2, n_kv_heads: 2, head_dim: 3, capacity: 4, scale: 1.0, window: None };
    // [row][head][element]: of an absmax of 127 and of 254, of zeros, and with a value that is no number.
    let x = [127.0, -3.5, 2.5, 254.0, -127.0, 1.0, 0.0, 0.0, 0.0, f32::INFINITY, 1.0, 2.0];
    let (mut codes, mut scale) = ([9i8; 24], [9.0; 8]);
    append(CacheMut::Int8 { codes: &mut codes, scale: &mut scale }, shape, 1, 2, &x, 6);
    // Ties go to the even code; zeros have the smallest scale.
    assert_eq!(codes[..12], [9, 9, 9, 127, -4, 2, 0, 0, 0, 9, 9, 9]);
    assert_eq!(codes[12..18], [9, 9, 9, 127, -64, 0]);
    assert_eq!(codes[21..], [9, 9, 9]);
    assert_eq!((scale[..2].to_vec(), scale[3..6].to_vec()), (vec![9.0, 1.0], vec![9.0, 9.0, 2.0]));
    assert_eq!((scale[2], scale[7]), (1e-5 / 127.0, 9.0));
    assert!(scale[6].is_nan());
}

#[test]
#[should_panic = "of different types"]
fn keys_and_values_are_of_one_type() {
    let case = Case::new(1, 2, 1, 16, 3);
    let v = vec![f16::ZERO; case.v.len()];
    case.run_with(Level::best(), 0..3, &Scoped(1), CacheRef::F32(&case.k), CacheRef::F16(&v));
}

#[test]
fn appending_rounds_and_touches_nothing_else() {
    let shape = Shape { n_heads: 2, n_kv_heads: 2, head_dim: 3, capacity: 4, scale: 1.0, window: None };
    let x = [1.0, 2.0, 3.0, 4.0, 5.0, 1e6, 0.0, 1.0 / 3.0, -2049.0, 8.0, 9.0, 1e-9, 2051.0, 11.0];
    let mut cache = [-1.0; 24];
    append(CacheMut::F32(&mut cache), shape, 1, 2, &x, 8);
    let untouched = [-1.0; 3];
    let want = [untouched, [1.0, 2.0, 3.0], [-2049.0, 8.0, 9.0], untouched];
    assert_eq!(cache[..12], want.concat());
    let want = [untouched, [4.0, 5.0, 1e6], [1e-9, 2051.0, 11.0], untouched];
    assert_eq!(cache[12..], want.concat());
    let mut halves = [f16::NEG_ONE; 24];
    append(CacheMut::F16(&mut halves), shape, 1, 2, &x, 8);
    for (half, cached) in halves.iter().zip(cache) {
        assert_eq!(*half, f16::from_f32(cached));
    }
    assert_eq!(halves[12 + 5], f16::INFINITY);
    assert_eq!((halves[6].to_f32(), halves[12 + 7].to_f32()), (-2048.0, 2052.0));
}

#[test]
fn a_nan_stays_in_its_rows() {
    let pool = Scoped(1);
    let mut case = Case::new(7, 4, 2, 32, 40);
    case.q[20 * case.q_stride] = f32::NAN;
    let out = case.run(Level::best(), 0..40, &pool);
    for (row, out) in out.chunks(4 * 32).enumerate() {
        assert_eq!(out[..32].iter().all(|v| v.is_nan()), row == 20);
        assert!(out[32..].iter().all(|v| v.is_finite()));
    }
}
