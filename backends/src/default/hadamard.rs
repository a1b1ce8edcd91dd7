//! The Walsh-Hadamard transform.

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;

use super::{dims, slice};

pub(crate) fn hadamard<B: Backend>(
    x: FloatTensor<B>,
    signs: FloatTensor<B>,
    block: usize,
    inverse: bool,
) -> FloatTensor<B> {
    let [m, k] = dims(&x)[..] else { panic!("rows of values") };
    let signs = B::float_reshape(signs, Shape::new([1, k]));
    let mut y = if inverse { x } else { B::float_mul(x, signs.clone()) };
    let mut distance = 1;
    while distance < block {
        let pairs = m * k / (2 * distance);
        let halves = B::float_reshape(y, Shape::new([pairs, 2 * distance]));
        let a = B::float_slice(halves.clone(), &slice(&[0..pairs, 0..distance]));
        let b = B::float_slice(halves, &slice(&[0..pairs, distance..2 * distance]));
        y = B::float_cat(vec![B::float_add(a.clone(), b.clone()), B::float_sub(a, b)], 1);
        distance *= 2;
    }
    let factor = 1.0 / (block as f32).sqrt();
    let y = B::float_mul_scalar(B::float_reshape(y, Shape::new([m, k])), factor.into());
    if inverse { B::float_mul(y, signs) } else { y }
}
