//! What is kept of each matrix that a kernel from a file computes with: when its next result is compared, and a
//! projection of the weights, so that a comparison covers a whole row of outputs at little cost.
//!
//! The comparison is Freivalds' (1977). Before the kernel touches the weights w [N, K], their rows are added up, each
//! times a random odd number: v[k] = sum over n of r[n] * w[n, k]. A row of right sums s over activations q fulfils
//!
//! ```text
//! sum over n of r[n] * s[n] = sum over k of v[k] * q[k]    (modulo 2^32)
//! ```
//!
//! One wrong sum is always found, and several miss each other out once in 2^31 or so. That takes N + K products, where
//! the outputs take N * K. The sums are found again in the outputs: as long as they stay below 2^22, the f32 product
//! with the scales leaves no doubt which one it was, and it must give the same bits again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_plugin::canonical::{BLOCK, BLOCK_BYTES, row_bytes};

use super::lock;
use crate::pool::Pool;

/// A matrix's results are compared at least once in this many calls. (The first ones are compared more often.)
pub(super) const COMPARED_EVERY: u64 = 251;
/// Beyond this many matrices of a shape, all are forgotten: each is compared in full once more.
const MOST: usize = 1 << 14;
/// A sum below this is certain.
const CERTAIN: f64 = (1 << 22) as f64;
/// Products of scales whose multiples up to [`CERTAIN`] are neither subnormal nor infinite.
const SCALES: std::ops::Range<f32> = f32::MIN_POSITIVE..1e30;

/// The call after which the result is compared next, once that of `call` was: twice as far away every time, and from
/// [`COMPARED_EVERY`] on at random, so that a model's matrices take turns.
pub(super) fn next_comparison(call: u64, seed: u64) -> u64 {
    call + match call {
        0 => 1,
        1..COMPARED_EVERY => call,
        _ => 1 + SplitMix64::new(seed ^ call).below(COMPARED_EVERY),
    }
}

/// The matrices of one shape that kernels from files compute with.
#[derive(Debug, Default)]
pub(super) struct Matrices {
    multipliers: OnceLock<Vec<u32>>,
    known: RwLock<HashMap<Key, Arc<Matrix>>>,
    /// The kernel that wrote into the weights: nothing may compute with them.
    damaged: OnceLock<String>,
}

/// A kernel, where its weights lie, and the bits of their scale, or where their scales lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub kernel: usize,
    pub weights: usize,
    pub scale: usize,
}

/// What [`Matrices::count`] finds.
#[derive(Debug)]
pub(super) enum Known {
    /// The kernel has not computed with this matrix.
    No,
    /// The result is not compared this time.
    NotDue,
    /// It is.
    Due(Arc<Matrix>),
}

/// What is known of a matrix.
#[derive(Debug)]
pub(super) struct Matrix {
    pub projection: Projection,
    /// A checksum of its scales, where it has many.
    pub scales: Option<u64>,
    /// How often the manager had chosen kernels for weights before: as long as that stays, no other matrix can have taken
    /// this one's place in memory.
    pub loads: u64,
    calls: AtomicU64,
    due: AtomicU64,
}

impl Matrix {
    pub fn new((projection, scales): (Projection, Option<u64>), loads: u64) -> Self {
        // The call that makes it known is compared in full.
        Self {
            projection,
            scales,
            loads,
            calls: AtomicU64::new(1),
            due: AtomicU64::new(next_comparison(0, 0)),
        }
    }
}

impl Matrices {
    /// Counts a call with a matrix; it is always due if it is `wanted`.
    pub fn count(&self, key: Key, seed: u64, wanted: bool) -> Known {
        let known = self.known.read().unwrap_or_else(|e| e.into_inner());
        let Some(matrix) = known.get(&key) else { return Known::No };
        let call = matrix.calls.fetch_add(1, Ordering::Relaxed);
        if call >= matrix.due.load(Ordering::Relaxed) {
            matrix.due.store(next_comparison(call, seed ^ matrix.projection.salt()), Ordering::Relaxed);
        } else if !wanted {
            return Known::NotDue;
        }
        Known::Due(matrix.clone())
    }

    pub fn learn(&self, key: Key, matrix: Arc<Matrix>) {
        let mut known = self.known.write().unwrap_or_else(|e| e.into_inner());
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(key, matrix);
    }

    /// The random odd number of each row.
    pub fn multipliers(&self, n: usize, seed: u64) -> &[u32] {
        self.multipliers.get_or_init(|| {
            let mut random = SplitMix64::new(seed);
            (0..n).map(|_| random.next_u64() as u32 | 1).collect()
        })
    }

    /// From now on the weights are not used, since a kernel wrote into them.
    pub fn damage(&self, kernel: &str) {
        self.damaged.get_or_init(|| kernel.to_owned());
    }

    /// The kernel that did.
    pub fn damaged(&self) -> Option<&String> {
        self.damaged.get()
    }
}

/// The rows of a matrix, each times its multiplier, added up: K sums modulo 2^32.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Projection(Vec<u32>);

impl Projection {
    /// Of canonical weights [N, k], with N multipliers.
    pub fn new(pool: &Pool, weights: &[u8], k: usize, multipliers: &[u32]) -> Self {
        /// Blocks of a task: what a row's part of them takes stays in the nearest cache.
        const TASK: usize = 16;
        let row_bytes = row_bytes(k);
        let all: u32 = multipliers.iter().fold(0, |sum, &r| sum.wrapping_add(r));
        let mut sums = vec![0u32; row_bytes / BLOCK_BYTES * BLOCK];
        let tasks = sums.len().div_ceil(TASK * BLOCK);
        let parts = Mutex::new(sums.chunks_mut(TASK * BLOCK).enumerate());
        pool.run(tasks, &|_| {
            let part = lock(&parts).next();
            let Some((part, sums)) = part else { return };
            for (row, &r) in weights.chunks_exact(row_bytes).zip(multipliers) {
                let blocks = row[part * TASK * BLOCK_BYTES..].chunks_exact(BLOCK_BYTES);
                for (bytes, sums) in blocks.zip(sums.chunks_exact_mut(BLOCK)) {
                    for (group, sums) in sums.chunks_exact_mut(BLOCK_BYTES).enumerate() {
                        for (sum, byte) in sums.iter_mut().zip(bytes) {
                            let code = u32::from(byte >> (6 - 2 * group) & 3);
                            *sum = sum.wrapping_add(r.wrapping_mul(code));
                        }
                    }
                }
            }
            // A code is one more than its weight.
            sums.iter_mut().for_each(|sum| *sum = sum.wrapping_sub(all));
        });
        sums.truncate(k);
        Self(sums)
    }

    /// A number that tells matrices apart: their comparisons do not fall on the same calls.
    fn salt(&self) -> u64 {
        self.0.iter().take(4).fold(0, |salt, &sum| salt.rotate_left(17) ^ u64::from(sum))
    }

    /// Whether a row of outputs y is that of activations q, `scale` being the product of both scales; `None` if that can't
    /// be told in this way.
    pub fn agrees(&self, multipliers: &[u32], q: &[i8], scale: f32, y: &[f32]) -> Option<bool> {
        if scale.is_nan() {
            return Some(y.iter().all(|y| y.is_nan()));
        }
        if !SCALES.contains(&scale.abs()) {
            return None;
        }
        let inverse = 1.0 / f64::from(scale);
        let (mut total, mut exact, mut certain) = (0u32, true, true);
        for (&y, &r) in y.iter().zip(multipliers) {
            let sum = (f64::from(y) * inverse).round_ties_even();
            certain &= sum.abs() < CERTAIN;
            exact &= (sum as i32 as f32 * scale).to_bits() == y.to_bits();
            total = total.wrapping_add((sum as i32 as u32).wrapping_mul(r));
        }
        if !certain {
            return None;
        }
        let products = self.0.iter().zip(q).map(|(&sum, &q)| sum.wrapping_mul(i32::from(q) as u32));
        Some(exact && total == products.fold(0, u32::wrapping_add))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Activations;
    use bitnet_burn_formats::reference;

    #[test]
    fn a_row_agrees_with_its_projection_and_with_no_other() {
        let pool = Pool::new(2).unwrap();
        for (n, k) in [(1, 1), (7, 31), (40, 129), (33, 2560), (5, 6912)] {
            let mut random = SplitMix64::new(n as u64);
            let (weights, x) = (random.weights(n, k), Activations::random(&mut random, 1, k, 0));
            let matrices = Matrices::default();
            let multipliers = matrices.multipliers(n, 5);
            let projection = Projection::new(&pool, &weights, k, multipliers);
            for scale in [0.037, -2.5, 1e-20] {
                let s = scale * x.scale()[0];
                let mut y = vec![0.0; n];
                reference::matmul(&weights, n, k, scale, x.q(), x.stride(), x.scale(), 1, &mut y, n);
                let q = &x.q()[..k];
                assert_eq!(projection.agrees(multipliers, q, s, &y), Some(true), "[{n}, {k}] {scale}");
                for i in 0..n {
                    let right = y[i];
                    for wrong in
                        [right + s, right - 3.0 * s, f32::from_bits(right.to_bits() + 1), f32::NAN, -right]
                    {
                        y[i] = wrong;
                        let agrees = projection.agrees(multipliers, q, s, &y);
                        let same = wrong.to_bits() == right.to_bits();
                        assert!(same || agrees != Some(true), "[{n}, {k}] {scale}: {right} {wrong}");
                    }
                    y[i] = right;
                }
                // Another matrix, by one weight.
                let mut other = weights.clone();
                other[n / 2 * row_bytes(k)] ^=
                    if other[n / 2 * row_bytes(k)] >> 6 == 1 { 0x40 } else { 0xc0 };
                let other = Projection::new(&pool, &other, k, multipliers);
                assert_ne!(other, projection);
            }
            // Scales beyond what can be told.
            for scale in [0.0, f32::INFINITY, 1e-40, 1e35] {
                assert_eq!(projection.agrees(multipliers, &x.q()[..k], scale, &vec![scale; n]), None);
            }
            for (y, agrees) in [(f32::NAN, true), (1.0, false)] {
                assert_eq!(projection.agrees(multipliers, &x.q()[..k], f32::NAN, &vec![y; n]), Some(agrees));
            }
        }
    }

    #[test]
    fn comparisons_are_dense_at_first_and_never_rarer_than_promised() {
        let (mut call, mut calls) = (0, Vec::new());
        while calls.len() < 60 {
            let next = next_comparison(call, 42);
            assert!((1..=256).contains(&(next - call)), "{call} {next}");
            call = next;
            calls.push(call);
        }
        assert_eq!(calls[..9], [1, 2, 4, 8, 16, 32, 64, 128, 256]);
        let steps: Vec<u64> = calls[9..].windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(steps.iter().all(|step| *step <= COMPARED_EVERY) && steps.windows(2).any(|w| w[0] != w[1]));
    }

    #[test]
    fn a_matrix_is_known_by_kernel_place_and_scale() {
        let (pool, matrices) = (Pool::new(1).unwrap(), Matrices::default());
        let key = Key { kernel: 1, weights: 64, scale: 7 };
        let unknown = |key| matches!(matrices.count(key, 1, true), Known::No);
        assert!(unknown(key));
        let weights = SplitMix64::new(1).weights(3, 100);
        let projection = Projection::new(&pool, &weights, 100, matrices.multipliers(3, 1));
        matrices.learn(key, Arc::new(Matrix::new((projection, None), 0)));
        let due = |wanted| matches!(matrices.count(key, 1, wanted), Known::Due(_));
        let compared: Vec<u64> = (1..=128).filter(|_| due(false)).collect();
        assert_eq!(compared, [1, 2, 4, 8, 16, 32, 64, 128]);
        assert!(due(true));
        for other in [Key { kernel: 2, ..key }, Key { weights: 128, ..key }, Key { scale: 8, ..key }] {
            assert!(unknown(other));
        }
    }
}
