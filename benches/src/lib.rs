//! Benchmarks on the shapes of BitNet b1.58 2B-4T, one file each in `benches/`. From the root of the
//! repository:
//!
//! | command | measures |
//! | --- | --- |
//! | `cargo bench --bench kernels` | every kernel that this machine can run, as fractions of what memory and registers allow |
//! | `cargo bench --bench selection` | the time until the kernel for a matmul is known |
//! | `cargo bench --bench formats` | packing, unpacking and quantising |
//! | `cargo bench --bench kv_cache` | append and attention by context length |
//! | `cargo bench --bench layers` | `BitLinear` against Burn's `Linear`, and against its Q2S with `--features ndarray` |
//! | `cargo bench --bench peers --features peers` | a model beside llama.cpp, which this builds: see the file |
//! | `cargo bench --bench plan` | planning where a model runs, from a profile of the machine that is kept |
//! | `cargo bench --bench training` | training: tokens a second, the share of matmuls, fused against composed |
//!
//! `-- --quick` is several times faster and less exact; `-- NAME` runs what matches. `BITNET_THREADS`
//! sets the threads of the kernels, 1 if unset. Whole models are measured by `bitnet bench`.

/// (name, N, K) of the ternary matrices of BitNet b1.58 2B-4T.
pub const SHAPES: [(&str, usize, usize); 4] =
    [("q_o", 2560, 2560), ("k_v", 640, 2560), ("gate_up", 6912, 2560), ("down", 2560, 6912)];

/// `BITNET_THREADS`, 1 if unset.
///
/// # Panics
/// If it is no number.
pub fn threads() -> usize {
    match std::env::var("BITNET_THREADS") {
        Ok(threads) => threads.parse().expect("BITNET_THREADS is a number"),
        Err(_) => 1,
    }
}

/// xorshift64*: random bits for weights and activations.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator; equal seeds give equal sequences.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Floats in -1..1.
    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    /// Weights -1, 0 and 1.
    pub fn ternary(&mut self, count: usize) -> Vec<i8> {
        (0..count).map(|_| ((self.bits() >> 33) % 3) as i8 - 1).collect()
    }
}
