//! Random numbers that are the same everywhere: for models of random weights, the cases of the gate, and the
//! order of a training run's text.

use bitnet_burn_plugin::canonical;

/// SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators").
///
/// ```
/// use bitnet_burn_formats::random::SplitMix64;
///
/// assert_eq!(SplitMix64::new(1_234_567).next_u64(), 6_457_827_717_110_365_317);
/// ```
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// A generator with this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Canonical weights [n, k], uniform over -1, 0, 1.
    ///
    /// # Panics
    /// If k is 0, or the bytes exceed what a machine can address.
    pub fn weights(&mut self, n: usize, k: usize) -> Vec<u8> {
        let row = canonical::row_bytes(k);
        let size = canonical::matrix_bytes(n, k).expect("weights that a machine can address");
        let mut bytes = vec![canonical::ZERO_BYTE; size];
        let mut codes = vec![0i8; k];
        for out in bytes.chunks_exact_mut(row) {
            for chunk in codes.chunks_mut(16) {
                let mut word = self.next_u64();
                for code in chunk {
                    *code = (((word & 0xff) * 3) >> 8) as i8 - 1;
                    word = word.rotate_right(4);
                }
            }
            canonical::pack_row(&codes, out);
        }
        bytes
    }

    /// A number below `limit`, all equally likely to within `limit` / 2^64; 0 for a limit of 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(limit)) >> 64) as u64
    }

    /// Close to normal, with mean 0 and variance 1: the sum of four uniform values (Irwin-Hall), of variance
    /// 4 / 12.
    pub(crate) fn normal(&mut self) -> f32 {
        let word = self.next_u64();
        let sum: u32 = (0..4).map(|i| u32::from((word >> (16 * i)) as u16)).sum();
        (sum as f32 / 65536.0 - 2.0) * 1.732_050_8
    }

    /// Appends `n` random bytes.
    pub(crate) fn bytes(&mut self, n: usize, out: &mut Vec<u8>) {
        let end = out.len() + n;
        while out.len() < end {
            let word = self.next_u64().to_le_bytes();
            out.extend_from_slice(&word[..word.len().min(end - out.len())]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_is_the_published_one() {
        let mut random = SplitMix64::new(1_234_567);
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([random.next_u64(), random.next_u64(), random.next_u64()], expected);
    }
}
