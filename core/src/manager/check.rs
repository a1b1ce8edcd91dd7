//! The check that a kernel passes before it may compute: random and adversarial inputs over small
//! shapes, compared bit for bit with the reference.

use bitnet_burn_plugin::canonical;

use super::abi_weights;
use super::execute::{Part, Scratch, run_parts};
use crate::memory::{Activations, WeightArena};
use crate::plugin::Kernel;
use crate::pool::Pool;
use crate::reference;

/// [M, N, K]: one row and many, output and input features on both sides of vector and block sizes.
const SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (1, 7, 31),
    (1, 32, 128),
    (1, 33, 129),
    (1, 64, 256),
    (1, 100, 784),
    (1, 48, 2560),
    (2, 16, 384),
    (3, 17, 100),
    (4, 31, 257),
    (5, 96, 640),
    (9, 40, 500),
    (17, 35, 130),
    (33, 65, 260),
];

/// A small generator with a fixed sequence (SplitMix64, Steele et al. 2014): the same inputs on every
/// machine and in every version.
pub(super) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Canonical weights [n, k], uniform over -1, 0, 1.
    pub fn weights(&mut self, n: usize, k: usize) -> Vec<u8> {
        let row = canonical::row_bytes(k);
        let mut bytes = vec![canonical::ZERO_BYTE; n * row];
        let mut codes = vec![0i8; k];
        for out in bytes.chunks_exact_mut(row) {
            for chunk in codes.chunks_mut(16) {
                let mut word = self.next();
                for code in chunk {
                    *code = (((word & 0xff) * 3) >> 8) as i8 - 1;
                    word = word.rotate_right(4);
                }
            }
            canonical::pack_row(&codes, out);
        }
        bytes
    }

    /// Activations [m, k] with values over the whole int8 range that the quantiser can produce.
    pub fn activations(&mut self, m: usize, k: usize) -> Activations {
        let mut activations = Activations::default();
        let parts = activations.resize(m, k);
        for i in 0..m {
            let row = &mut parts.q[i * parts.stride..][..parts.stride];
            row.fill(0);
            for q in &mut row[..k] {
                *q = ((self.next() >> 32) as u32 % 255) as i8;
                *q = if *q == -128 { 127 } else { *q };
            }
            parts.sum[i] = row.iter().map(|&q| i32::from(q)).sum();
            parts.scale[i] = (self.next() % 1000 + 1) as f32 / 4096.0;
        }
        activations
    }
}

/// Compares a kernel with the reference on every shape that it supports.
///
/// # Errors
/// The first case that fails, in words.
pub(super) fn check(kernel: &Kernel) -> Result<(), String> {
    let pool = Pool::new(1).map_err(|error| error.to_string())?;
    let mut random = Random::new(0x1b17);
    let mut tried = 0;
    for (m, n, k) in SHAPES {
        let signature = bitnet_burn_plugin::abi::Signature::ternary(m as u64, n as u64, k as u64, 1);
        if !kernel.supports(&signature) {
            continue;
        }
        tried += 1;
        let mut weights = random.weights(n, k);
        let mut x = random.activations(m, k);
        // Whole rows of one value, on both sides: the largest sums, and no cancellation.
        let row = canonical::row_bytes(k);
        for (i, value) in [-1i8, 1, 0].into_iter().enumerate().take(n) {
            canonical::pack_row(&vec![value; k], &mut weights[i * row..][..row]);
        }
        if m >= 3 {
            let parts = x.resize(m, k);
            for (i, value) in [127i8, -127, 0].into_iter().enumerate() {
                parts.q[i * parts.stride..][..k].fill(value);
                parts.sum[i] = i32::from(value) * k as i32;
            }
        }
        compare(kernel, &pool, &weights, n, k, &x)
            .map_err(|reason| format!("[{m}, {k}] x [{n}, {k}]ᵀ: {reason}"))?;
    }
    if tried == 0 {
        return Err(format!("it supports none of the {} shapes that kernels are checked on", SHAPES.len()));
    }
    Ok(())
}

fn compare(
    kernel: &Kernel,
    pool: &Pool,
    weights: &[u8],
    n: usize,
    k: usize,
    x: &Activations,
) -> Result<(), String> {
    let m = x.m();
    let scale = 0.037_f32;
    // As badly aligned as canonical weights may be.
    let canonical_bytes = Misaligned::new(weights);
    let mut packed = None;
    let bytes = if kernel.layout().is_some() {
        let buffer =
            super::execute::pack(kernel, pool, &WeightArena::default(), n, k, canonical_bytes.bytes())
                .map_err(|error| error.to_string())?;
        let back =
            super::execute::unpack(kernel, n, k, buffer.as_slice()).map_err(|error| error.to_string())?;
        if let Some(at) = (0..n * k).find(|&i| {
            let row = canonical::row_bytes(k);
            let of = |data: &[u8]| canonical::Row(&data[i / k * row..][..row]).code(i % k);
            of(&back) != of(weights)
        }) {
            return Err(format!("unpack(pack(w)) differs from w at row {}, column {}", at / k, at % k));
        }
        packed.insert(buffer).as_slice()
    } else {
        canonical_bytes.bytes()
    };
    // A margin around the output shows writes outside of the tile (in memory that is ours).
    const MARGIN: usize = 16;
    let poison = f32::from_bits(0x7fc0_dead);
    let stride = n + 3;
    let mut y = vec![poison; MARGIN + m * stride + MARGIN];
    let part = Part { kernel, weights: abi_weights(n, k, scale, bytes), column: 0 };
    let end = y.len() - MARGIN;
    if let Some(failure) =
        run_parts(pool, &Scratch::default(), &[part], x, &mut y[MARGIN..end], stride).remove(0)
    {
        return Err(failure.to_string());
    }
    let mut expected = vec![poison; y.len()];
    let out = &mut expected[MARGIN..end];
    reference::matmul(weights, n, k, scale, x.q(), x.stride(), x.scale(), m, out, stride);
    for (i, (&got, &want)) in y.iter().zip(&expected).enumerate() {
        if got.to_bits() != want.to_bits() {
            let (row, column) = match i.checked_sub(MARGIN) {
                Some(i) if i < m * stride => (i / stride, i % stride),
                _ => return Err(format!("it wrote outside of its output ({got:e})")),
            };
            if column >= n {
                return Err(format!("it wrote behind row {row} of its output ({got:e})"));
            }
            return Err(format!("y[{row}, {column}] = {got:e}, the reference has {want:e}"));
        }
    }
    Ok(())
}

/// Canonical bytes at an address that is a multiple of 4 and of nothing larger.
struct Misaligned(crate::memory::AlignedBytes, usize);

const OFFSET: usize = bitnet_burn_plugin::abi::CANONICAL_ALIGNMENT;

impl Misaligned {
    fn new(bytes: &[u8]) -> Self {
        let mut buffer = crate::memory::AlignedBytes::zeroed(bytes.len() + OFFSET);
        buffer[OFFSET..].copy_from_slice(bytes);
        Self(buffer, bytes.len())
    }

    fn bytes(&self) -> &[u8] {
        &self.0[OFFSET..OFFSET + self.1]
    }
}
