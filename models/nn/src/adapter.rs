//! Low-rank adapters of projections (LoRA, arXiv 2106.09685): the layer stays as it is, packed or dense, and a product of two
//! thin matrices is added to its output.

use bitnet_burn_formats::{DenseFormat, DenseTensor};
use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};

use crate::DenseMatrix;

/// What is added to a projection's output: scale * B(A(x)), of the input as the projection gets it (behind its norm, before
/// rotation and quantisation).
#[derive(Module, Debug)]
pub struct Adapter {
    /// A: [rank, d_input].
    pub a: DenseMatrix,
    /// B: [d_output, rank].
    pub b: DenseMatrix,
    #[module(skip)]
    scale: f32,
}

/// The values of an [`Adapter`].
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterValues {
    /// A [rank, d_input] in row-major order.
    pub a: Vec<f32>,
    /// B [d_output, rank] in row-major order.
    pub b: Vec<f32>,
    /// Columns of B.
    pub rank: usize,
    /// What the product is multiplied by: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
    pub scale: f32,
}

impl Adapter {
    /// An adapter whose matrices are trained, on a device with gradients. `ids` are those of A and B: an optimiser's state finds
    /// them again in another process.
    ///
    /// # Panics
    /// If the values are no whole rows.
    pub fn trainable(values: &AdapterValues, ids: [u64; 2], device: &Device) -> Self {
        let (k, n) = values.shape();
        let matrix = |values: &[f32], shape: [usize; 2], id: u64| {
            let values = Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), device);
            DenseMatrix::trainable(Param::initialized(ParamId::from(id), values).set_require_grad(true))
        };
        Self {
            a: matrix(&values.a, [values.rank, k], ids[0]),
            b: matrix(&values.b, [n, values.rank], ids[1]),
            scale: values.scale,
        }
    }

    /// An adapter that computes alone.
    ///
    /// # Panics
    /// As [`trainable`](Self::trainable).
    pub fn new(values: &AdapterValues, device: &Device) -> Self {
        let (k, n) = values.shape();
        let matrix = |name: &str, values: &[f32], [n, k]: [usize; 2]| {
            assert_eq!(values.len(), n * k, "{name} [{n}, {k}]");
            let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let (name, format, data) = (name.to_owned(), DenseFormat::F32, data.into());
            DenseMatrix::new(DenseTensor { name, n, k, format, data }, device)
        };
        Self {
            a: matrix("lora_A", &values.a, [values.rank, k]),
            b: matrix("lora_B", &values.b, [n, values.rank]),
            scale: values.scale,
        }
    }

    /// The same with its matrices stored, on the device without gradients.
    ///
    /// # Panics
    /// If they can't be read back from their device.
    pub fn into_stored(self) -> Self {
        Self { a: self.a.into_stored(), b: self.b.into_stored(), ..self }
    }

    /// Rows of A.
    pub fn rank(&self) -> usize {
        self.a.args().n
    }

    /// The factor of the product.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The values of an adapter that is trained; `None` for one that computes alone.
    ///
    /// # Panics
    /// If they can't be read back from their device.
    pub fn values(&self) -> Option<AdapterValues> {
        let values = |matrix: &DenseMatrix| -> Option<Vec<f32>> {
            Some(matrix.float_weight()?.val().into_data().iter::<f32>().collect())
        };
        Some(AdapterValues { a: values(&self.a)?, b: values(&self.b)?, rank: self.rank(), scale: self.scale })
    }

    /// x [M, d_input]; the output is [M, d_output].
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.b.forward(self.a.forward(x)) * self.scale
    }
}

impl AdapterValues {
    /// Input and output features.
    pub fn shape(&self) -> (usize, usize) {
        let rank = self.rank.max(1);
        (self.a.len() / rank, self.b.len() / rank)
    }

    /// Row `n` of scale * B * A.
    pub fn row(&self, n: usize) -> Vec<f32> {
        let (k, _) = self.shape();
        let mut row = vec![0f32; k];
        for (b, a) in self.b[n * self.rank..(n + 1) * self.rank].iter().zip(self.a.chunks_exact(k)) {
            row.iter_mut().zip(a).for_each(|(sum, a)| *sum += b * a);
        }
        row.iter_mut().for_each(|value| *value *= self.scale);
        row
    }
}
