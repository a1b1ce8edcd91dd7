//! A dense matrix: embedding and lm_head.

use bitnet_burn_backends::ops::{self, DenseError};
use bitnet_burn_backends::{DenseArgs, NoInt8};
use bitnet_burn_formats::{DenseFormat, DenseTensor};
use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
    ParamId,
};
use burn::tensor::{Device, Int, Tensor, TensorData};
use bytes::Bytes;

/// Why a matrix can't have the form that was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DenseMatrixError {
    /// Its type can't be multiplied by int8 activations.
    #[error("{tensor}: {source}")]
    Int8 {
        /// Its tensor.
        tensor: String,
        /// The type, and those that can.
        source: NoInt8,
    },
    /// It can't be written in another format.
    #[error("{tensor} as {}: {source}", format.name())]
    Convert {
        /// Its tensor.
        tensor: String,
        /// The format.
        format: DenseFormat,
        /// Why.
        source: DenseError,
    },
}

/// A matrix [N, K], see [`DenseWeight`] for its two states.
#[derive(Clone, Debug)]
pub struct DenseMatrix {
    /// The weights.
    pub weight: DenseWeight,
    args: DenseArgs,
    /// The format that the weights had before they were requantised.
    from: Option<DenseFormat>,
}

/// The weights of a [`DenseMatrix`].
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one or two of them a model")]
pub enum DenseWeight {
    /// Training: floats [N, K].
    Float(Param<Tensor<2>>),
    /// Frozen: the raw bytes of the file (F32, F16, BF16, Q8_0, Q6_K, Q4_0) as U32 words [1, words],
    /// memory-mapped on devices in host memory. They are decoded to f32 where they are used, or multiplied by
    /// int8 activations ([`DenseMatrix::int8`], in tiles where those are faster).
    Stored(Param<Tensor<2, Int>>),
}

impl DenseMatrix {
    /// A loaded tensor on a device.
    pub fn new(tensor: DenseTensor, device: &Device) -> Self {
        let DenseTensor { n, k, format, data, .. } = tensor;
        let words = ops::words(data.clone(), [1, data.len().div_ceil(4)], device);
        let weight = DenseWeight::Stored(Param::initialized(ParamId::new(), words));
        Self { weight, args: DenseArgs::new(format, n, k), from: None }
    }

    /// A loaded tensor on a device, as `format` (Q8_0, Q6_K or Q4_0; its own, or another that loses some of
    /// it), with [`forward`](Self::forward) quantising its input to int8, by absmax and row. That is faster,
    /// and off by up to half a step (of 127 for the largest) for each input. In host memory the weights are a
    /// copy in tiles, which has no [`rows`](Self::rows).
    ///
    /// # Errors
    /// If the format holds floats, or can't hold the values or the shape, or memory is short.
    pub fn int8(tensor: DenseTensor, format: DenseFormat, device: &Device) -> Result<Self, DenseMatrixError> {
        Self::int8_prepacked(tensor, format, None, device)
    }

    /// [`int8`](Self::int8), with the tiles that it makes in host memory, if they are there already.
    pub fn int8_prepacked(
        tensor: DenseTensor,
        format: DenseFormat,
        tiles: Option<Bytes>,
        device: &Device,
    ) -> Result<Self, DenseMatrixError> {
        let DenseTensor { n, k, format: from, data, name } = tensor;
        let args = match DenseArgs::new(format, n, k).with_int8() {
            Ok(args) => args,
            Err(source) => return Err(DenseMatrixError::Int8 { tensor: name, source }),
        };
        let (words, args) = match tiles {
            Some(tiles) => ops::tiled_matrix(tiles, args, device),
            None => ops::dense_matrix((from, data), args, device)
                .map_err(|source| DenseMatrixError::Convert { tensor: name, format, source })?,
        };
        let weight = DenseWeight::Stored(Param::initialized(ParamId::new(), words));
        Ok(Self { weight, args, from: (from != format).then_some(from) })
    }

    /// A loaded tensor on a device, as a copy in `format`.
    ///
    /// # Errors
    /// If the format can't hold the values or the shape, or memory is short.
    pub fn converted(
        tensor: DenseTensor,
        format: DenseFormat,
        device: &Device,
    ) -> Result<Self, DenseMatrixError> {
        let DenseTensor { n, k, format: from, data, name } = tensor;
        let (words, args) = ops::dense_matrix((from, data), DenseArgs::new(format, n, k), device)
            .map_err(|source| DenseMatrixError::Convert { tensor: name, format, source })?;
        let weight = DenseWeight::Stored(Param::initialized(ParamId::new(), words));
        Ok(Self { weight, args, from: (from != format).then_some(from) })
    }

    /// The format that the weights had before they were requantised.
    pub fn requantised_from(&self) -> Option<DenseFormat> {
        self.from
    }

    /// A trainable matrix.
    pub fn trainable(weight: Param<Tensor<2>>) -> Self {
        let [n, k] = weight.val().dims();
        Self { weight: DenseWeight::Float(weight), args: DenseArgs::new(DenseFormat::F32, n, k), from: None }
    }

    /// The same with its weights stored as F32 on the device without gradients, where they are constants. (Burn's
    /// [`freeze`](Module::freeze) keeps a parameter and stops its gradients.)
    ///
    /// # Panics
    /// If the weights can't be read back from their device.
    pub fn into_stored(self) -> Self {
        let DenseWeight::Float(weight) = &self.weight else { return self };
        let device = weight.val().device().without_autodiff();
        let values: Vec<f32> = weight.val().into_data().iter::<f32>().collect();
        let DenseArgs { format, n, k, .. } = self.args;
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let name = String::from("a trained matrix");
        Self::new(DenseTensor { name, n, k, format, data: data.into() }, &device)
    }

    /// The weights of a matrix in the training state; `None` for stored ones.
    pub fn float_weight(&self) -> Option<&Param<Tensor<2>>> {
        match &self.weight {
            DenseWeight::Float(weight) => Some(weight),
            DenseWeight::Stored(_) => None,
        }
    }

    /// Format and shape, and whether activations are quantised.
    pub fn args(&self) -> DenseArgs {
        self.args
    }

    /// How it is computed as an output projection, for reports: `file (Q6_K, f32 activations)`,
    /// `requantised (Q6_K from F16, int8 activations)`.
    pub fn description(&self) -> String {
        let DenseArgs { format, int8, .. } = self.args;
        match (self.from, int8) {
            (Some(from), true) => {
                format!("requantised ({} from {}, int8 activations)", format.name(), from.name())
            }
            (Some(from), false) => {
                format!("converted ({} from {}, f32 activations)", format.name(), from.name())
            }
            (None, true) => format!("int8 ({}, int8 activations)", format.name()),
            (None, false) => format!("file ({}, f32 activations)", format.name()),
        }
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        match &self.weight {
            DenseWeight::Float(weight) => weight.val().device(),
            DenseWeight::Stored(words) => words.val().device(),
        }
    }

    /// y = x * Wᵀ. x [M, K]; the output is [M, N].
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.weight {
            DenseWeight::Float(weight) => x.matmul(weight.val().transpose()),
            DenseWeight::Stored(words) => ops::dense_linear(x, words.val(), self.args),
        }
    }

    /// Rows of the matrix. The output is [ids, K].
    ///
    /// # Panics
    /// If an id is not below N, or the weights are [for int8 activations](Self::int8) in tiles.
    pub fn rows(&self, ids: &[u32]) -> Tensor<2> {
        match &self.weight {
            DenseWeight::Float(weight) => {
                assert!(ids.iter().all(|&id| (id as usize) < self.args.n), "a row that the table lacks");
                let ids = TensorData::new(ids.iter().map(|&id| id as i32).collect(), [ids.len()]);
                weight.val().select(0, Tensor::from_data(ids, &self.device()))
            }
            DenseWeight::Stored(words) => ops::dense_rows(words.val(), ids, self.args),
        }
    }
}

/// As the derive makes it, but for the weights of a file, which count as parameters although they are words.
impl Module for DenseMatrix {
    fn num_params(&self) -> usize {
        self.args.n * self.args.k
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        visitor.enter_module("weight", "Struct:DenseMatrix");
        self.weight.visit(visitor);
        visitor.exit_module("weight", "Struct:DenseMatrix");
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        mapper.enter_module("weight", "Struct:DenseMatrix");
        let weight = self.weight.map(mapper);
        mapper.exit_module("weight", "Struct:DenseMatrix");
        Self { weight, ..self }
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.weight.collect_devices(devices)
    }

    fn to_device(self, device: &Device) -> Self {
        Self { weight: self.weight.to_device(device), ..self }
    }

    fn fork(self, device: &Device) -> Self {
        Self { weight: self.weight.fork(device), ..self }
    }

    fn valid(&self) -> Self {
        Self { weight: self.weight.valid(), ..*self }
    }

    fn train(self) -> Self {
        Self { weight: self.weight.train(), ..self }
    }

    fn materialize(self) -> Self {
        Self { weight: self.weight.materialize(), ..self }
    }
}

impl ModuleDisplayDefault for DenseMatrix {
    fn content(&self, content: Content) -> Option<Content> {
        let DenseArgs { format, n, k, .. } = self.args;
        let state = match self.weight {
            DenseWeight::Float(_) => "training",
            DenseWeight::Stored(_) => format.name(),
        };
        content.add("n", &n).add("k", &k).add("weights", &state.to_owned()).optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl ModuleDisplay for DenseMatrix {}
