//! Layers from what other code made: Burn's `Linear`, and ternary codes; and back to a `Linear`.

use bitnet_burn_backends::ops::{self, TernaryMatrix};
use bitnet_burn_formats::{DenseFormat, FormatError, Scales, WeightScale, ternary};
use bitnet_burn_manager::ManagerError;
use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Int, Tensor, TensorData};
use bytes::Bytes;

use super::packing::matrix_of;
use super::{BitLinear, BitLinearWeight, PackedWeight, in_f32};
use crate::{ActivationRule, ConfigError, Quantisation, Ternary};

/// Why weights can't become those of a [`BitLinear`], or the other way round.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// It would be lost.
    #[error(
        "the weight [{k}, {n}] has a reparameterization ({name}), which a BitLinear would lose; call `Module::materialize` \
         first to merge it into the weight"
    )]
    Reparameterization {
        /// Its name, such as `lora`.
        name: String,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
    },
    /// Burn quantised it to something else.
    #[error(
        "the weight [{k}, {n}] is quantised, and its values are not ternary by rows of inputs ({source}); dequantise it \
         first to train it further as floats"
    )]
    Quantised {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// What is not ternary.
        source: FormatError,
    },
    /// Codes that are not ternary.
    #[error("the code {code} at row {row}, column {column} is not -1, 0 or 1")]
    Code {
        /// The code.
        code: i64,
        /// Output feature.
        row: usize,
        /// Input feature.
        column: usize,
    },
    /// Scales that do not fit the codes.
    #[error(
        "scales {found:?} for codes [{n}, {k}]; they are [1, 1] for all weights, [{n}, 1] for rows, or [{n}, groups] for groups \
         of 32, 64, 128 or 256 weights, which divide {k}"
    )]
    Scales {
        /// Their shape.
        found: [usize; 2],
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
    },
    /// The layer computes more than a `Linear` does.
    #[error("a Linear has no {0}; apply it before the Linear, and take it from the layer first")]
    NotLinear(&'static str),
    /// The layer has an adapter, which is no part of its weights.
    #[error("the layer has an adapter, which a Linear would lose; take it from the layer first")]
    Adapter,
    /// Weights and activations do not fit together.
    #[error(transparent)]
    Quantisation(#[from] ConfigError),
    /// The weights can't be prepared.
    #[error(transparent)]
    Kernel(#[from] ManagerError),
}

impl BitLinear {
    /// A layer in the training state with the weights and the bias of a `Linear`, for quantisation-aware fine-tuning. (Burn
    /// keeps a `Linear`'s weight as [d_input, d_output]; it is transposed.)
    ///
    /// - It keeps the weight's type (F16, BF16) and whether it is trained.
    /// - Weights that are ternary already (-s, 0 and s, with one s for all, for each output or for groups of 32, 64, 128 or
    ///   256 inputs) keep exactly these values. So do those that Burn quantised to ternary ones (`Q2S`). Absmean alone would
    ///   change their scales.
    /// - A weight that [`Ternarise`](crate::Ternarise) made ternary keeps its latent values and its kind of scale, with float
    ///   activations, as the `Linear` has.
    ///
    /// # Errors
    /// If the layer would lose something: a LoRA adapter, or what else reparameterizes the weight; or if Burn quantised the
    /// weight to values that are not ternary.
    ///
    /// # Panics
    /// If the weight can't be read back from its device.
    pub fn from_linear(linear: Linear) -> Result<Self, ImportError> {
        let Linear { weight, bias } = linear;
        let base = weight.base();
        let ([k, n], device) = (base.dims(), base.device());
        let ternarised = weight.reparameterization::<Ternary>().map(Ternary::scale);
        if let (None, Some(name)) = (ternarised, reparameterization(&weight)) {
            return Err(ImportError::Reparameterization { name, n, k });
        }
        let (quantised, trained) = (matches!(base.dtype(), DType::QFloat(_)), is_trained(&weight));
        let base = if quantised { base.dequantize() } else { base };
        let dtype = base.dtype();
        // A tensor of its own: contiguous, and a leaf of the graph.
        let values = base.detach().transpose().into_data();
        let with_bias = |layer: Self| Self { bias, ..layer };
        if ternarised.is_none() {
            let floats: Vec<u8> = values.iter::<f32>().flat_map(f32::to_le_bytes).collect();
            match ternary::scaled_from_dense(DenseFormat::F32, &floats, n, k) {
                Ok((codes, scales)) if (0..n).any(|row| has_scale(&scales, row, k)) => {
                    let scale = scales.shared_by(n, k);
                    let quantisation = Quantisation { scale, activations: ActivationRule::Model };
                    quantisation.check(k)?;
                    let rows = rows_of(&scales, scale, [n, k]);
                    // Canonical: they are not computed with.
                    let canonical = Quantisation { activations: ActivationRule::Float, ..quantisation };
                    let plain = device.clone().without_autodiff();
                    let matrix = matrix_of(Bytes::from(codes), rows, [n, k], canonical, &plain)?;
                    let weight = PackedWeight::new(matrix, quantisation, device.is_autodiff());
                    let layer = Self::of(BitLinearWeight::Packed(weight), [n, k], quantisation).unpack()?;
                    return Ok(with_bias(layer.trained(trained, dtype)));
                }
                Err(source) if quantised => return Err(ImportError::Quantised { n, k, source }),
                _ => {}
            }
        }
        let latent =
            Param::from_tensor(Tensor::from_data(values, (&device, dtype))).set_require_grad(trained);
        let layer = Self::latent(latent);
        Ok(with_bias(match ternarised {
            None => layer,
            Some(scale) => {
                layer.with_quantisation(Quantisation { scale, activations: ActivationRule::Float })?
            }
        }))
    }

    /// A layer in the packed state of codes -1, 0 and 1, without norm and bias: weight = code * scale.
    ///
    /// ```
    /// use bitnet_burn::{ActivationRule, BitLinear};
    /// use burn::tensor::{Device, Int, Tensor};
    ///
    /// let device = Device::flex();
    /// let codes = Tensor::<2, Int>::from_ints([[1, 0, -1], [0, 1, 1]], &device);
    /// let scales = Tensor::<2>::from_floats([[0.5], [0.25]], &device); // one for each row
    /// let layer = BitLinear::from_ternary(codes, scales, ActivationRule::Float)?;
    /// let y = layer.forward(Tensor::<2>::from_floats([[1.0, 2.0, 3.0]], &device));
    /// assert_eq!(y.into_data().iter::<f32>().collect::<Vec<_>>(), [-1.0, 1.25]);
    /// # Ok::<(), bitnet_burn::ImportError>(())
    /// ```
    ///
    /// # Shapes
    /// - codes: [d_output, d_input]
    /// - scales: [1, 1] for all weights, [d_output, 1] for rows, or [d_output, groups]
    ///
    /// # Errors
    /// If a code is another number, the scales do not fit or are not finite, or the activations do not fit the scales.
    ///
    /// # Panics
    /// If the tensors can't be read back from their device.
    pub fn from_ternary(
        codes: Tensor<2, Int>,
        scales: Tensor<2>,
        activations: ActivationRule,
    ) -> Result<Self, ImportError> {
        let (device, [n, k], found) = (codes.device().without_autodiff(), codes.dims(), scales.dims());
        let scale = match found {
            [1, 1] => WeightScale::Tensor,
            [rows, 1] if rows == n => WeightScale::Row,
            [rows, groups] if rows == n && groups > 0 && k.is_multiple_of(groups) => {
                WeightScale::Group(k / groups)
            }
            _ => return Err(ImportError::Scales { found, n, k }),
        };
        if n == 0 || k == 0 || scale.problem(k).is_some() {
            return Err(ImportError::Scales { found, n, k });
        }
        let quantisation = Quantisation { scale, activations };
        quantisation.check(k)?;
        let mut ternary = Vec::with_capacity(n * k);
        for (at, code) in codes.into_data().iter::<i64>().enumerate() {
            match code {
                -1..=1 => ternary.push(code as i8),
                _ => return Err(ImportError::Code { code, row: at / k, column: at % k }),
            }
        }
        let scales: Vec<f32> = scales.into_data().iter::<f32>().collect();
        if let Some(at) = scales.iter().position(|scale| !scale.is_finite()) {
            let problem = format!("the scale {} of row {} is not finite", scales[at], at / found[1]);
            return Err(ManagerError::Operands(problem).into());
        }
        let matrix =
            matrix_of(super::packing::canonical_rows(&ternary, k), scales, [n, k], quantisation, &device)?;
        let weight = PackedWeight::new(matrix, quantisation, false);
        Ok(Self::of(BitLinearWeight::Packed(weight), [n, k], quantisation))
    }

    /// A `Linear` with the weights that the layer multiplies by, as F32: exactly -s, 0 and s. Burn's `quantize_weights` packs
    /// them again without loss where one s is for all (`Q2S`, `Calibration::MinMax`). Its activations stay floats, so
    /// outputs differ by the layer's quantisation of activations.
    ///
    /// # Errors
    /// If the layer has a norm, a rotation or an adapter, or its packed weights can't be unpacked.
    ///
    /// # Panics
    /// If the weights can't be read back from their device.
    pub fn into_linear(self) -> Result<Linear, ImportError> {
        if self.norm.is_some() {
            return Err(ImportError::NotLinear("norm"));
        }
        if self.rotation.is_some() {
            return Err(ImportError::NotLinear("rotation"));
        }
        if self.adapter.is_some() {
            return Err(ImportError::Adapter);
        }
        let ([n, k], scale) = ([self.d_output, self.d_input], self.quantisation.scale);
        let (values, device) = match &self.weight {
            BitLinearWeight::Latent(weight) => {
                let ternary = ops::ternarise(in_f32(weight.val().detach()), scale);
                (ternary.into_data(), weight.val().device())
            }
            BitLinearWeight::Packed(weight) => {
                let device = weight.codes.lazy_device();
                let matrix: TernaryMatrix = weight.matrix();
                let (codes, scales) = super::packing::codes_and_scales(matrix, scale)?;
                let runs = codes.chunks(scale.run(n, k)).zip(&scales);
                let values =
                    runs.flat_map(|(codes, &s)| codes.iter().map(move |&c| f32::from(c) * s)).collect();
                (TensorData::new(values, [n, k]), device)
            }
            BitLinearWeight::Dense(matrix) => {
                let rows: Vec<u32> = (0..n as u32).collect();
                (matrix.rows(&rows).into_data(), matrix.device())
            }
        };
        let weight = Tensor::<2>::from_data(values, &device).transpose();
        let weight = Tensor::from_data(weight.into_data(), &device);
        Ok(Linear { weight: Param::from_tensor(weight), bias: self.bias })
    }

    /// In the training state: with this type, and trained or not.
    fn trained(self, trained: bool, dtype: DType) -> Self {
        let BitLinearWeight::Latent(weight) = self.weight else { return self };
        let value = super::in_dtype(weight.val().detach(), dtype);
        let weight = Param::from_tensor(value).set_require_grad(trained);
        Self { weight: BitLinearWeight::Latent(weight), ..self }
    }
}

fn has_scale(scales: &Scales, row: usize, k: usize) -> bool {
    (0..k.checked_div(scales.group()).unwrap_or(1)).any(|group| scales.get(row, group, k) != 0.0)
}

/// The scales of runs of weights that share one. Rows of zeros have that of the others where all share one.
fn rows_of(scales: &Scales, scale: WeightScale, [n, k]: [usize; 2]) -> Vec<f32> {
    match scale {
        WeightScale::Tensor => {
            vec![(0..n).map(|row| scales.get(row, 0, k)).find(|&s| s != 0.0).unwrap_or(0.0)]
        }
        WeightScale::Row => (0..n).map(|row| scales.get(row, 0, k)).collect(),
        WeightScale::Group(group) => {
            let groups = k / group;
            (0..n * groups).map(|at| scales.get(at / groups, at % groups, k)).collect()
        }
    }
}

/// The name of what reparameterizes a parameter.
fn reparameterization(param: &Param<Tensor<2>>) -> Option<String> {
    #[derive(Default)]
    struct Name(Option<String>);
    impl ModuleVisitor for Name {
        fn enter_module(&mut self, name: &str, container: &str) {
            if container == "Reparameterization" {
                self.0 = Some(name.to_owned());
            }
        }
    }
    let mut name = Name::default();
    param.visit(&mut name);
    name.0
}

/// Whether a parameter is trained where its module is in training.
fn is_trained(param: &Param<Tensor<2>>) -> bool {
    let value = param.base();
    match value.is_autodiff() || matches!(value.dtype(), DType::QFloat(_)) {
        true => value.is_require_grad(),
        false => param.clone().train().base().is_require_grad(),
    }
}
