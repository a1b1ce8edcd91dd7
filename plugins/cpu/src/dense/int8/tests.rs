//! The products of one tile, by every instruction set, against the layout's description.

use super::*;
use crate::simd::half_to_f32;

/// A xorshift generator: the numbers need no quality.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 32) as u8).collect()
    }
}

/// Arbitrary bytes with finite scales; now and then a block of the extreme codes.
fn tile(random: &mut Random, format: TiledFormat, k: usize) -> Vec<u8> {
    let mut tile = random.bytes(format.tile_bytes(k).unwrap());
    for block in tile.chunks_exact_mut(format.block_bytes()) {
        match random.next() % 8 {
            0 => block.fill(0xff),
            1 => block.fill(0x80),
            2 => block.fill(0x7f),
            3 => block.fill(0),
            _ => {}
        }
        for half in block[format.halves_at()..].as_chunks_mut::<2>().0 {
            *half = match random.next() % 4 {
                // 1 / 1024, the smallest subnormal, -1.5.
                0 => 0x1400u16.to_le_bytes(),
                1 => 1u16.to_le_bytes(),
                2 => 0xbe00u16.to_le_bytes(),
                _ => ((random.next() >> 20) as u16 & 0xbbff).to_le_bytes(),
            };
        }
    }
    tile
}

/// The weight `i` of row `r` of a block as an integer, from the layout's description.
fn weight(format: TiledFormat, block: &[u8], r: usize, i: usize) -> i32 {
    let lane = |vector: usize, byte: usize| block[64 * vector + 4 * r + byte];
    match format {
        TiledFormat::Q8_0 => i32::from(lane(i / 4, i % 4) as i8),
        TiledFormat::Q4_0 => i32::from(lane(i / 8, i % 4) >> (4 * (i / 4 % 2)) & 15) - 8,
        TiledFormat::Q6_K => {
            let (s, t) = (i / 16, i / 4 % 4);
            let group = &block[832 * (s / 4)..][..832];
            let lane = |vector: usize| group[64 + 64 * (3 * (s % 4) + vector) + 4 * r + i % 4];
            let low = lane(t / 2) >> (4 * (t % 2)) & 15;
            let two = lane(2) >> (2 * t) & 3;
            let scale = i32::from(group[16 * (s % 4) + r] as i8);
            (i32::from(low | two << 4) - 32) * scale
        }
    }
}

fn specification(format: TiledFormat, tile: &[u8], row: &Row<'_>) -> [f32; TILE_ROWS] {
    let mut y = [0.0; TILE_ROWS];
    for (r, y) in y.iter_mut().enumerate() {
        let mut acc = 0f32;
        let blocks = tile.chunks_exact(format.block_bytes()).zip(row.q.chunks_exact(format.block_len()));
        for (block, q) in blocks {
            let sum: i64 = q
                .iter()
                .enumerate()
                .map(|(i, &q)| i64::from(q) * i64::from(weight(format, block, r, i)))
                .sum();
            let d = &block[format.halves_at() + 2 * r..][..2];
            acc += i32::try_from(sum).unwrap() as f32 * half_to_f32(u16::from_le_bytes([d[0], d[1]]));
        }
        *y = acc * row.scale;
    }
    y
}

fn every_level(format: TiledFormat, tile: &[u8], rows: &[Vec<i8>], scale: f32) {
    let sums: Vec<Vec<i32>> = rows
        .iter()
        .map(|q| {
            let mut sums = Vec::new();
            sums_of_parts(format, q, &mut sums);
            sums
        })
        .collect();
    let rows: Vec<Row<'_>> = rows.iter().zip(&sums).map(|(q, sums)| Row { q, sums, scale }).collect();
    let want: Vec<[f32; TILE_ROWS]> = rows.iter().map(|row| specification(format, tile, row)).collect();
    for level in Level::available() {
        for count in 0..=rows.len() {
            let mut y = vec![[7.0; TILE_ROWS]; count];
            level.products(format, tile, &rows[..count], &mut y);
            let same =
                |(got, want): (&f32, &f32)| got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(
                y.as_flattened().iter().zip(want.as_flattened()).all(same),
                "{format:?} {level:?}, {count} rows of {}:\n{y:?}\n{want:?}",
                tile.len()
            );
        }
    }
}

#[test]
fn every_instruction_set_computes_the_specification() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for format in TiledFormat::ALL {
        for blocks in [1, 2, 3, 8, 10] {
            let k = blocks * format.block_len();
            for count in [1, 2, 3, 4, 5, 9] {
                let tile = tile(&mut random, format, k);
                let rows: Vec<Vec<i8>> = (0..count)
                    .map(|_| random.bytes(k).into_iter().map(|b| (b as i8).max(-127)).collect())
                    .collect();
                every_level(format, &tile, &rows, 0.01);
            }
        }
    }
}

#[test]
fn the_largest_sums_are_exact() {
    for format in TiledFormat::ALL {
        let k = 512;
        for fill in [0u8, 0x80, 0x7f, 0xff, 0x88, 0xf0, 0x0f] {
            for scale in [0x80, 0x7f] {
                let mut tile = vec![fill; format.tile_bytes(k).unwrap()];
                for block in tile.chunks_exact_mut(format.block_bytes()) {
                    if format == TiledFormat::Q6_K {
                        (0..4).for_each(|group| block[832 * group..][..64].fill(scale));
                    }
                    // The largest half.
                    block[format.halves_at()..].as_chunks_mut::<2>().0.fill(0x7bffu16.to_le_bytes());
                }
                every_level(format, &tile, &[vec![127; k], vec![-127; k], vec![0; k]], 1.0);
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_is_nan_and_a_scale_may_be_anything() {
    let mut random = Random(5);
    for format in TiledFormat::ALL {
        let k = 2 * format.block_len();
        let mut tile = tile(&mut random, format, k);
        every_level(format, &tile, &[vec![0; k]], f32::NAN);
        let at = format.halves_at();
        for (i, bits) in [0x7c00u16, 0xfc00, 0x7e01, 0x8000].into_iter().enumerate() {
            tile[at + 2 * i..][..2].copy_from_slice(&bits.to_le_bytes());
        }
        every_level(format, &tile, &[vec![3; k]], 0.5);
    }
}

#[test]
#[should_panic(expected = "bytes of a tile")]
fn a_tile_of_another_size_is_refused() {
    let q = [0; 64];
    let row = Row { q: &q, sums: &[0; 2], scale: 1.0 };
    Level::best().products(TiledFormat::Q8_0, &[0; 544], &[row], &mut [[0.0; TILE_ROWS]]);
}
