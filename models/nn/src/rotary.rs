//! Rotary position embedding (RoFormer, arXiv 2104.09864), half rotation as in Llama: element j of a
//! head pairs with j + d / 2. (Burn's own `RotaryEncoding` pairs neighbours.)

use std::sync::Arc;

use bitnet_burn_backends::ops;
use burn::config::Config;
use burn::tensor::{Device, Tensor, TensorData};

/// Configuration of a [`RotaryEncoding`].
#[derive(Config, Debug)]
pub struct RotaryEncodingConfig {
    /// Values a head: even.
    pub head_dim: usize,
    /// Base of the frequencies: theta^(-2 j / head_dim).
    #[config(default = 10000.0)]
    pub theta: f64,
}

/// Rotates queries and keys by their position. Angles, cosines and sines are computed on the host in
/// f64 and rounded once to f32, so that every device turns by the same angles.
///
/// Made by [`RotaryEncodingConfig`].
#[derive(Clone, Debug)]
pub struct RotaryEncoding {
    /// head_dim / 2 of them.
    frequencies: Arc<[f64]>,
}

impl RotaryEncodingConfig {
    /// Computes the frequencies.
    ///
    /// # Panics
    /// If `head_dim` is odd.
    pub fn init(&self) -> RotaryEncoding {
        assert!(self.head_dim.is_multiple_of(2), "rotary encoding of heads of {} values", self.head_dim);
        let exponent = |j: usize| -2.0 * j as f64 / self.head_dim as f64;
        let frequencies = (0..self.head_dim / 2).map(|j| self.theta.powf(exponent(j))).collect();
        RotaryEncoding { frequencies }
    }
}

impl RotaryEncoding {
    /// cos and sin [rows, head_dim / 2] of each row's position.
    pub fn angles(&self, positions: &[usize], device: &Device) -> (Tensor<2>, Tensor<2>) {
        let size = positions.len() * self.frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for &position in positions {
            for frequency in &*self.frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        let shape = [positions.len(), self.frequencies.len()];
        let tensor = |values| Tensor::from_data(TensorData::new(values, shape), device);
        (tensor(cos), tensor(sin))
    }

    /// Rotates rows [M, heads * head_dim] by [`angles`](Self::angles).
    pub fn apply(&self, x: Tensor<2>, angles: &(Tensor<2>, Tensor<2>)) -> Tensor<2> {
        ops::rope(x, angles.0.clone(), angles.1.clone(), 2 * self.frequencies.len())
    }
}
