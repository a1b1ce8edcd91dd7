//! Rotary position embedding (RoFormer, arXiv 2104.09864), half rotation as in Llama: element j of a
//! head pairs with j + d / 2. (Burn's own `RotaryEncoding` pairs neighbours.)

use std::sync::Arc;

use bitnet_burn_backends::ops;
use burn::config::Config;
use burn::tensor::{Device, Tensor, TensorData};

/// Configuration of a [`RotaryEncoding`].
#[derive(Config, Debug)]
pub struct RotaryEncodingConfig {
    /// Positions that it has angles for.
    pub max_positions: usize,
    /// Values a head: even.
    pub head_dim: usize,
    /// Base of the frequencies: theta^(-2 j / head_dim).
    #[config(default = 10000.0)]
    pub theta: f64,
}

/// Rotates queries and keys by their position. The tables are computed on the host in f64 and rounded
/// once to f32, so that every device turns by the same angles.
///
/// Made by [`RotaryEncodingConfig`].
#[derive(Clone, Debug)]
pub struct RotaryEncoding {
    /// cos, sin of position p in p * head_dim / 2 ..
    tables: Arc<(Vec<f32>, Vec<f32>)>,
    max_positions: usize,
    head_dim: usize,
}

impl RotaryEncodingConfig {
    /// Computes the tables.
    ///
    /// # Panics
    /// If `head_dim` is odd.
    pub fn init(&self) -> RotaryEncoding {
        assert!(self.head_dim.is_multiple_of(2), "rotary encoding of heads of {} values", self.head_dim);
        let half = self.head_dim / 2;
        let frequencies: Vec<f64> =
            (0..half).map(|j| self.theta.powf(-2.0 * j as f64 / self.head_dim as f64)).collect();
        let angles = || (0..self.max_positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let tables = (angles().map(|a| a.cos() as f32).collect(), angles().map(|a| a.sin() as f32).collect());
        RotaryEncoding {
            tables: Arc::new(tables),
            max_positions: self.max_positions,
            head_dim: self.head_dim,
        }
    }
}

impl RotaryEncoding {
    /// Positions that it has angles for.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// cos and sin [rows, head_dim / 2] of each row's position.
    ///
    /// # Panics
    /// If a position is not below [`max_positions`](Self::max_positions).
    pub fn angles(&self, positions: &[usize], device: &Device) -> (Tensor<2>, Tensor<2>) {
        let half = self.head_dim / 2;
        let gather = |table: &[f32]| {
            let values: Vec<f32> =
                positions.iter().flat_map(|p| &table[p * half..(p + 1) * half]).copied().collect();
            Tensor::from_data(TensorData::new(values, [positions.len(), half]), device)
        };
        (gather(&self.tables.0), gather(&self.tables.1))
    }

    /// Rotates rows [M, heads * head_dim] by [`angles`](Self::angles).
    pub fn apply(&self, x: Tensor<2>, angles: &(Tensor<2>, Tensor<2>)) -> Tensor<2> {
        ops::rope(x, angles.0.clone(), angles.1.clone(), self.head_dim)
    }
}
