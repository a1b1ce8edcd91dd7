//! From the training state to the packed one, and back.

use bitnet_burn_backends::ops::{self, MatrixScale, TernaryMatrix};
use bitnet_burn_formats::{Scales, WeightScale, canonical, quant};
use bitnet_burn_manager::{ManagerError, ScaleKind};
use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use bytes::Bytes;

use super::packed::scale_kind;
use super::{BitLinear, BitLinearWeight, PackedWeight, in_f32};
use crate::Quantisation;

impl BitLinear {
    /// The layer with its weights frozen: exactly the codes and the scales that the training state's
    /// forward pass computes with. On a device in host memory they are packed for the kernels that
    /// are the fastest on this machine; float activations have none, and are multiplied in plain operations. A layer in
    /// another state stays as it is.
    ///
    /// # Errors
    /// If no kernel may compute the layer (in strict mode), memory is short, or a parameter has a NaN or an infinity: the
    /// error names the parameter and the place.
    ///
    /// # Panics
    /// If the tensors can't be read back from their device.
    pub fn pack(self) -> Result<Self, ManagerError> {
        let BitLinearWeight::Latent(weight) = &self.weight else { return Ok(self) };
        let ((n, k), scale) = ((self.d_output, self.d_input), self.quantisation.scale);
        // Packed weights are constants, on the device without gradients.
        let device = weight.val().device().without_autodiff();
        let latent = in_f32(weight.val().detach());
        check_finite(&format!("weight [{n}, {k}] (parameter {})", weight.id), latent.clone(), k)?;
        if let Some(bias) = &self.bias {
            check_finite(&format!("bias [{n}] (parameter {})", bias.id), bias.val().detach(), n)?;
        }
        if let Some(norm) = &self.norm {
            let gamma = &norm.gamma;
            check_finite(&format!("norm.gamma [{k}] (parameter {})", gamma.id), gamma.val().detach(), k)?;
        }
        let values: Vec<f32> = ops::ternarise(latent, scale).into_data().iter::<f32>().collect();
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let problem =
                format!("a scale of weights [{n}, {k}], at row {}, is beyond the range of f32", at / k);
            return Err(ManagerError::Operands(problem));
        }
        let codes: Vec<i8> = values.iter().map(|&v| i8::from(v > 0.0) - i8::from(v < 0.0)).collect();
        let largest = |values: &[f32]| values.iter().fold(0f32, |a, v| a.max(v.abs()));
        let mut scales: Vec<f32> = values.chunks(scale.run(n, k)).map(largest).collect();
        if scale_kind(self.quantisation, k) == ScaleKind::One {
            // Without a code that is not zero all weights are below half of the smallest scale.
            scales[0] = scales[0].max(quant::EPSILON);
        }
        let codes = canonical_rows(&codes, k);
        let matrix = matrix_of(codes, scales, [n, k], self.quantisation, &device)?;
        let training = weight.val().device().is_autodiff();
        let weight = PackedWeight::new(matrix, self.quantisation, training);
        Ok(Self { weight: BitLinearWeight::Packed(weight), ..self })
    }

    /// The layer with packed weights in the layout of the kernels that are the fastest on this machine, such as after loading
    /// a record, which is canonical. Float activations have no kernels. A layer in another state stays as it is.
    ///
    /// # Errors
    /// As [`pack`](Self::pack), or if the kernel that packed the weights before can't unpack them.
    ///
    /// # Panics
    /// If the weights can't be read back from their device.
    pub fn repack(self) -> Result<Self, ManagerError> {
        let quantised = self.activation_group().is_some();
        self.with_layout(|matrix| if quantised { matrix.repacked() } else { matrix.into_canonical() })
    }

    /// The layer with packed weights in the canonical layout, as records have them. A layer in another state stays as it is.
    ///
    /// # Errors
    /// If the kernel that packed the weights can't unpack them.
    pub fn into_canonical(self) -> Result<Self, ManagerError> {
        self.with_layout(TernaryMatrix::into_canonical)
    }

    fn with_layout(
        self,
        layout: impl FnOnce(TernaryMatrix) -> Result<TernaryMatrix, ManagerError>,
    ) -> Result<Self, ManagerError> {
        let BitLinearWeight::Packed(weight) = self.weight else { return Ok(self) };
        let matrix = layout(weight.matrix())?;
        Ok(Self { weight: BitLinearWeight::Packed(weight.with_layout(matrix)), ..self })
    }

    /// The layer in the training state, to train it further: latent weights of which the forward pass
    /// makes exactly the codes and the scales that were packed (with a negative scale, their opposites). What the weights
    /// were before packing is gone: all that share a scale and a code share a magnitude (but for one, which makes the mean
    /// exact). They have gradients where the layer is in training: if it was packed there, or after
    /// [`train`](burn::module::Module::train). A layer in another state stays as it is.
    ///
    /// # Errors
    /// If the kernel that packed the weights can't unpack them, or they have scales that training can't make: in
    /// groups that do not divide a row, or smaller than 1e-5 and not 0.
    ///
    /// # Panics
    /// If the weights can't be read back from their device.
    pub fn unpack(self) -> Result<Self, ManagerError> {
        let BitLinearWeight::Packed(weight) = &self.weight else { return Ok(self) };
        let (matrix, training) = (weight.matrix(), weight.training);
        let ((n, k), scale) = ((self.d_output, self.d_input), self.quantisation.scale);
        let wrong = |problem: String| ManagerError::Operands(format!("weights [{n}, {k}] {problem}"));
        if let Err(error) = self.quantisation.check(k) {
            return Err(wrong(format!("can't be trained further: {error}")));
        }
        let device = matrix.codes.device();
        let device = if training { device.autodiff() } else { device };
        let (codes, scales) = codes_and_scales(matrix, scale)?;
        let mut weights = Vec::with_capacity(n * k);
        for (codes, scale) in codes.chunks(scale.run(n, k)).zip(scales) {
            if scale != 0.0 && scale.abs() < quant::EPSILON {
                let least = quant::EPSILON;
                return Err(wrong(format!(
                    "have a scale of {scale:e}; training makes scales from {least:e} on"
                )));
            }
            weights.extend(latent(codes, scale));
        }
        let weights = Tensor::from_data(TensorData::new(weights, [n, k]), &device);
        Ok(Self { weight: BitLinearWeight::Latent(Param::from_tensor(weights)), ..self })
    }
}

/// Codes in the canonical layout.
pub(super) fn canonical_rows(codes: &[i8], k: usize) -> Bytes {
    let row_bytes = canonical::row_bytes(k);
    let mut bytes = vec![0u8; codes.len() / k * row_bytes];
    for (codes, row) in codes.chunks_exact(k).zip(bytes.chunks_exact_mut(row_bytes)) {
        canonical::pack_row(codes, row);
    }
    bytes.into()
}

/// A matrix of canonical rows, with a scale for each run of weights that share one: packed for the kernels of this machine,
/// where activations are quantised.
pub(super) fn matrix_of(
    codes: Bytes,
    scales: Vec<f32>,
    [n, k]: [usize; 2],
    quantisation: Quantisation,
    device: &Device,
) -> Result<TernaryMatrix, ManagerError> {
    let scale = match scale_kind(quantisation, k) {
        ScaleKind::One => MatrixScale::One(scales[0]),
        ScaleKind::Groups { weights, activations, .. } => {
            let rows = if quantisation.scale == WeightScale::Tensor { scales.repeat(n) } else { scales };
            // In f32, so that the layer can move to any device.
            let scales = Scales::f32_from_rows(&rows, n, k, weights);
            let scales = scales.map_err(|error| ManagerError::Operands(error.to_string()))?;
            MatrixScale::Groups { activations, scales }
        }
    };
    match quantisation.activation_group(k) {
        Some(_) => TernaryMatrix::prepared(codes, scale, n, k, device),
        None => Ok(TernaryMatrix::canonical(codes, scale, n, k, device)),
    }
}

/// The codes of a matrix, and the scale of each run of them that shares one by `scale`.
pub(super) fn codes_and_scales(
    matrix: TernaryMatrix,
    scale: WeightScale,
) -> Result<(Vec<i8>, Vec<f32>), ManagerError> {
    let TernaryMatrix { codes, scale: stored, n, k, scales, .. } = matrix.into_canonical()?;
    let stored: Vec<f32> = stored.into_data().iter::<f32>().collect();
    let mut scales = match scales {
        ScaleKind::One => stored,
        ScaleKind::Groups { weights, .. } => {
            let bytes = stored.iter().flat_map(|scale| scale.to_le_bytes()).collect::<Vec<_>>();
            let stored = Scales::stored(bytes.into(), false, n, k, weights);
            let stored = stored.map_err(|error| ManagerError::Operands(error.to_string()))?;
            let count = k.checked_div(weights).unwrap_or(1);
            (0..n * count).map(|at| stored.get(at / count, at % count, k)).collect()
        }
    };
    if scale == WeightScale::Tensor {
        if scales.iter().any(|&other| other != scales[0]) {
            let problem = "have scales that differ, in a layer that was made with one";
            return Err(ManagerError::Operands(format!("weights [{n}, {k}] {problem}")));
        }
        scales.truncate(1);
    }
    let words: Vec<u32> = codes.into_data().iter::<i64>().map(|word| word as u32).collect();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut codes = vec![0i8; n * k];
    for (codes, row) in codes.chunks_exact_mut(k).zip(bytes.chunks_exact(canonical::row_bytes(k))) {
        canonical::unpack_row(row, codes);
    }
    Ok((codes, scales))
}

/// # Errors
/// If a parameter, with rows of `columns` values, has a NaN or an infinity.
fn check_finite<const D: usize>(name: &str, values: Tensor<D>, columns: usize) -> Result<(), ManagerError> {
    let data = values.into_data();
    match data.iter::<f32>().enumerate().find(|(_, value)| !value.is_finite()) {
        None => Ok(()),
        Some((at, value)) => {
            let (row, column) = (at / columns, at % columns);
            Err(ManagerError::Operands(format!(
                "{name} is {value} at row {row}, column {column}: a model that diverged can't be packed"
            )))
        }
    }
}

/// Weights whose absmean codes and scale are these.
///
/// With a fraction p of the codes not zero and |w| = scale / p for those, the mean of all is the scale, and
/// every |w| is at least the scale, twice the threshold. One weight takes what rounding leaves.
fn latent(codes: &[i8], scale: f32) -> Vec<f32> {
    let count = codes.iter().filter(|&&code| code != 0).count();
    let total = f64::from(scale) * codes.len() as f64;
    let magnitude = (total / count.max(1) as f64) as f32;
    let mut weights: Vec<f32> = codes.iter().map(|&code| f32::from(code) * magnitude).collect();
    if let Some((last, &code)) = weights.iter_mut().zip(codes).rfind(|(_, code)| **code != 0) {
        let others = f64::from(magnitude) * (count - 1) as f64;
        *last = f32::from(code) * (total - others) as f32;
    }
    weights
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Distribution;

    use super::*;
    use crate::BitLinearConfig;

    #[test]
    fn packing_keeps_the_codes_and_the_scale_and_unpacking_gives_them_back() {
        let device = Device::flex();
        for (n, k) in [(96, 256), (5, 33), (1, 1), (64, 130)] {
            let layer = BitLinearConfig::new(k, n).with_bias(true).with_norm(true).init(&device);
            let x = Tensor::<2>::random([9, k], Distribution::Normal(0.0, 1.0), &device);
            let matrix = |layer: &BitLinear| {
                let matrix = layer.clone().into_canonical().unwrap().matrix().unwrap();
                let codes: Vec<i64> = matrix.codes.into_data().iter::<i64>().collect();
                (codes, matrix.scale.into_data().iter::<f32>().next().unwrap())
            };
            let latent = layer.forward(x.clone()).into_data();
            let packed = layer.clone().pack().unwrap();
            let BitLinearWeight::Latent(weight) = &layer.weight else { panic!("a new layer is latent") };
            let weights: Vec<f32> = weight.val().into_data().iter::<f32>().collect();
            assert_eq!(matrix(&packed).1, quant::absmean_scale(&weights));
            let y = packed.forward(x.clone()).into_data();
            latent.assert_approx_eq::<f32>(&y, burn::tensor::Tolerance::rel_abs(1e-5, 1e-5));
            let again = packed.clone().unpack().unwrap();
            assert!(matches!(again.weight, BitLinearWeight::Latent(_)) && again.bias.is_some());
            assert_eq!(matrix(&again.pack().unwrap()), matrix(&packed), "[{n}, {k}]");
        }
    }

    #[test]
    fn weights_of_zeros_survive() {
        let device = Device::flex();
        let zeros = Param::from_tensor(Tensor::<2>::zeros([4, 40], &device));
        let layer = BitLinear::latent(zeros).pack().unwrap().unpack().unwrap().pack().unwrap();
        let y = layer.forward(Tensor::<2>::ones([2, 40], &device)).into_data();
        assert!(y.iter::<f32>().all(|y| y == 0.0));
    }
}
