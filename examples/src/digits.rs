//! Images of digits to classify, made instead of downloaded: the strokes of a 5 x 7 font, scaled, sheared, moved
//! and blurred at random, with noise, on 16 x 16 pixels.

use bitnet_burn_formats::random::SplitMix64;
use burn::tensor::{Device, Int, Tensor, TensorData};

/// Pixels of a side.
pub const SIDE: usize = 16;
/// Pixels of an image.
pub const PIXELS: usize = SIDE * SIDE;
/// The digits 0 to 9.
pub const CLASSES: usize = 10;

/// Rows of five pixels, from the top.
const FONT: [[u8; 7]; CLASSES] = [
    [0b01110, 0b10001, 0b10011, 0b10101, 0b11001, 0b10001, 0b01110],
    [0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110],
    [0b01110, 0b10001, 0b00001, 0b00010, 0b00100, 0b01000, 0b11111],
    [0b11111, 0b00010, 0b00100, 0b00010, 0b00001, 0b10001, 0b01110],
    [0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010],
    [0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110],
    [0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110],
    [0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000],
    [0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110],
    [0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100],
];

/// An image and what it shows.
#[derive(Clone, Debug)]
pub struct Digit {
    /// [`PIXELS`] values in -1 .. 1, row by row.
    pub pixels: Vec<f32>,
    /// 0 to 9.
    pub label: u8,
}

/// The images of a seed, all labels equally likely.
pub fn digits(seed: u64, count: usize) -> Vec<Digit> {
    let mut random = SplitMix64::new(seed);
    (0..count).map(|_| draw(&mut random)).collect()
}

fn draw(random: &mut SplitMix64) -> Digit {
    let label = random.below(CLASSES as u64) as u8;
    let mut between = |a: f32, b: f32| a + (b - a) * (random.next_u64() >> 40) as f32 / (1 << 24) as f32;
    let (width, height) = (between(1.3, 2.3), between(1.3, 2.1));
    let (shear_x, shear_y) = (between(-0.4, 0.4), between(-0.15, 0.15));
    let (move_x, move_y) = (between(-1.5, 1.5), between(-1.5, 1.5));
    let (ink, paper, noise) = (between(0.6, 1.0), between(-1.0, -0.4), between(0.2, 0.6));
    let font = FONT[usize::from(label)];
    // 1 where the font has ink, 0 elsewhere.
    let ink_at = |x: i32, y: i32| match (0..5).contains(&x) && (0..7).contains(&y) {
        true => f32::from(font[y as usize] >> (4 - x) & 1),
        false => 0.0,
    };
    let mut pixels = Vec::with_capacity(PIXELS);
    for row in 0..SIDE {
        for column in 0..SIDE {
            // From the image to the font, both seen from their centres, and between its pixels.
            let (x, y) = (column as f32 - 7.5 - move_x, row as f32 - 7.5 - move_y);
            let (u, v) = (2.0 + (x + shear_x * y) / width, 3.0 + (y + shear_y * x) / height);
            let (left, top) = (u.floor(), v.floor());
            let (right_share, bottom_share) = (u - left, v - top);
            let (i, j) = (left as i32, top as i32);
            let line = |j| (1.0 - right_share) * ink_at(i, j) + right_share * ink_at(i + 1, j);
            let strength = (1.0 - bottom_share) * line(j) + bottom_share * line(j + 1);
            let value = paper + (ink - paper) * strength + noise * between(-1.0, 1.0);
            pixels.push(value.clamp(-1.0, 1.0));
        }
    }
    Digit { pixels, label }
}

/// The images [count, [`PIXELS`]] and their labels `[count]`.
pub fn batch(digits: &[Digit], device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
    let pixels: Vec<f32> = digits.iter().flat_map(|digit| digit.pixels.iter().copied()).collect();
    let labels: Vec<i32> = digits.iter().map(|digit| i32::from(digit.label)).collect();
    (
        Tensor::from_data(TensorData::new(pixels, [digits.len(), PIXELS]), device),
        Tensor::from_data(TensorData::new(labels, [digits.len()]), device),
    )
}

/// The share of rows whose largest output is their label's.
pub fn accuracy(outputs: Tensor<2>, labels: Tensor<1, Int>) -> f32 {
    outputs.argmax(1).squeeze_dim::<1>(1).equal(labels).float().mean().into_scalar()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_the_same_images_of_all_digits() {
        let (a, b) = (digits(1, 200), digits(1, 200));
        for (a, b) in a.iter().zip(&b) {
            assert_eq!((a.label, &a.pixels), (b.label, &b.pixels));
            assert_eq!(a.pixels.len(), PIXELS);
            assert!(a.pixels.iter().all(|pixel| (-1.0..=1.0).contains(pixel)));
        }
        assert!((0..10).all(|label| a.iter().any(|digit| digit.label == label)));
        assert_ne!(digits(2, 1)[0].pixels, a[0].pixels);
    }

    #[cfg(feature = "flex")]
    #[test]
    fn accuracy_counts_the_largest_outputs() {
        let device = Device::flex();
        let outputs = Tensor::from_floats([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.5]], &device);
        let labels = Tensor::from_ints([1, 0, 0, 0], &device);
        assert_eq!(accuracy(outputs, labels), 0.75);
    }
}
