//! The BitNet linear layer ("The Era of 1-bit LLMs", arXiv 2402.17764; quantisers as in arXiv
//! 2504.12285, section 2).

mod import;
mod packed;
mod packing;

use std::mem::discriminant;

use bitnet_burn_backends::devices;
use bitnet_burn_backends::ops::{self, BitLinearInput, TernaryMatrix};
use bitnet_burn_formats::WeightScale;
use bitnet_burn_manager::{ManagerError, ScaleKind};
use burn::config::Config;
use burn::module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay, Param};
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::{DType, Device, Tensor};

pub use self::import::ImportError;
pub use self::packed::PackedWeight;
use crate::{ActivationRule, Adapter, ConfigError, DenseMatrix, Quantisation, Rotation};

/// Weight and epsilon of the norm that an input passes.
type InputNorm = Option<(Tensor<1>, f32)>;

/// Configuration of a [`BitLinear`].
///
/// ```
/// use bitnet_burn::{ActivationRule, BitLinearConfig, WeightScale};
/// use burn::tensor::{Device, Distribution, Tensor};
///
/// let device = Device::flex();
/// let config = BitLinearConfig::new(256, 10)
///     .with_scale(WeightScale::Group(64))
///     .with_activations(ActivationRule::Group(32));
/// let layer = config.init(&device).pack()?;
/// let x = Tensor::<2>::random([8, 256], Distribution::Default, &device);
/// assert_eq!(layer.forward(x).dims(), [8, 10]);
/// assert!(layer.to_string().contains("scale: group:64"));
/// # Ok::<(), bitnet_burn::manager::ManagerError>(())
/// ```
#[derive(Config, Debug)]
pub struct BitLinearConfig {
    /// Input features, K.
    pub d_input: usize,
    /// Output features, N.
    pub d_output: usize,
    /// Whether a bias is added to the output. Default: no (BitNet has none).
    #[config(default = false)]
    pub bias: bool,
    /// Whether the input passes an RMSNorm before it is quantised. Default: no.
    #[config(default = false)]
    pub norm: bool,
    /// Epsilon of that norm.
    #[config(default = 1e-5)]
    pub norm_eps: f64,
    /// Weights that share a scale: all, those of a row, or groups of 32, 64, 128 or 256 in a row, which divide `d_input`.
    /// Default: all, as in BitNet.
    #[config(default = "WeightScale::Tensor")]
    pub scale: WeightScale,
    /// How activations are quantised. Default: to int8 by row, as in BitNet, where all weights share a scale; to int8 by
    /// groups of 32 where they have many.
    #[config(default = "ActivationRule::Model")]
    pub activations: ActivationRule,
    /// How the latent weights are initialised. Default: as Burn's `Linear`, whose gain is 1 / sqrt(3).
    #[config(default = "Initializer::KaimingUniform{gain:0.577_350_269_189_625_8, fan_out_only:false}")]
    pub initializer: Initializer,
}

/// A linear layer with ternary weights and int8 activations: y = quantise(norm(x)) * Wᵀ (+ bias).
///
/// [`BitLinearWeight`] is its state: in *training* the weights are latent floats that every forward pass ternarises;
/// [`pack`](Self::pack) freezes them into 2 bits each. A model's layers that are not ternary are *dense*.
///
/// - Weights: s = max(mean |W|, 1e-5), W ~ s * clamp(round(W / s), -1, 1), where W are all weights, or those of a row or of a
///   group ([`WeightScale`]).
/// - Activations: a = max(max |x|, 1e-5), x ~ (a / 127) * clamp(round(x * 127 / a), -128, 127), where x is a row, or a group
///   of its values; or x as it is ([`ActivationRule`]).
///
/// Gradients pass both as if they were not there (the straight-through estimator).
///
/// Made by [`BitLinearConfig`].
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct BitLinear {
    /// [d_output, d_input], latent or packed.
    pub weight: BitLinearWeight,
    /// `[d_output]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// Norm of the input, before quantisation.
    pub norm: Option<RmsNorm>,
    /// Rotation of the input, behind the norm.
    pub rotation: Option<Rotation>,
    /// What is added to the output.
    pub adapter: Option<Adapter>,
    d_input: usize,
    d_output: usize,
    #[module(skip)]
    quantisation: Quantisation,
    #[module(skip)]
    quantised_share: f32,
}

/// The weights of a [`BitLinear`].
#[derive(Module, Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "a handful of layers a model; boxing would only be one more hop"
)]
pub enum BitLinearWeight {
    /// Training: latent floats [d_output, d_input].
    Latent(Param<Tensor<2>>),
    /// Frozen: 2 bits a weight.
    Packed(PackedWeight),
    /// Frozen weights of any format, multiplied by float activations: for layers that are not ternary, or that were
    /// trained without quantised activations.
    Dense(DenseMatrix),
}

impl BitLinearConfig {
    /// How the layer quantises.
    pub fn quantisation(&self) -> Quantisation {
        Quantisation { scale: self.scale, activations: self.activations }
    }

    /// A layer in the training state.
    ///
    /// # Panics
    /// If the layer has no input or no output features, or can't be quantised so ([`Quantisation::check`] says why), or this
    /// build has no operations for the device: the message names the feature.
    pub fn init(&self, device: &Device) -> BitLinear {
        let [n, k] = self.checked(device);
        let weight = self.initializer.init_with([n, k], Some(k), Some(n), device);
        self.with_weight(BitLinearWeight::Latent(weight), device)
    }

    /// A layer in the packed state to load a record into, without initialising, packing or measuring anything before. Until
    /// then its weights are zeros.
    ///
    /// # Panics
    /// As [`init`](Self::init).
    pub fn init_packed(&self, device: &Device) -> BitLinear {
        let [n, k] = self.checked(device);
        let weight = PackedWeight::uninitialized([n, k], self.quantisation(), device);
        self.with_weight(BitLinearWeight::Packed(weight), device)
    }

    fn checked(&self, device: &Device) -> [usize; 2] {
        if let Some(problem) = devices::unsupported(device) {
            panic!("BitLinearConfig: {problem}");
        }
        let (n, k) = (self.d_output, self.d_input);
        assert!(n > 0 && k > 0, "BitLinearConfig: d_input is {k} and d_output {n}; both must be at least 1");
        self.quantisation().check(k).unwrap_or_else(|error| panic!("BitLinearConfig: {error}"));
        [n, k]
    }

    fn with_weight(&self, weight: BitLinearWeight, device: &Device) -> BitLinear {
        let (n, k) = (self.d_output, self.d_input);
        BitLinear {
            weight,
            bias: self.bias.then(|| Param::from_tensor(Tensor::zeros([n], device))),
            norm: self.norm.then(|| RmsNormConfig::new(k).with_epsilon(self.norm_eps).init(device)),
            rotation: None,
            adapter: None,
            d_input: k,
            d_output: n,
            quantisation: self.quantisation(),
            quantised_share: 1.0,
        }
    }
}

impl BitLinear {
    /// A layer in the training state, without norm and bias, of latent weights [d_output, d_input]. It quantises as BitNet
    /// does; [`with_quantisation`](Self::with_quantisation) changes that.
    pub fn latent(weight: Param<Tensor<2>>) -> Self {
        let shape = weight.val().dims();
        Self::of(BitLinearWeight::Latent(weight), shape, Quantisation::default())
    }

    fn of(weight: BitLinearWeight, [n, k]: [usize; 2], quantisation: Quantisation) -> Self {
        let (bias, norm, rotation, adapter) = (None, None, None, None);
        let (d_input, d_output, quantised_share) = (k, n, 1.0);
        Self { weight, bias, norm, rotation, adapter, d_input, d_output, quantisation, quantised_share }
    }

    /// A layer in the packed state, without norm and bias.
    pub fn from_matrix(matrix: TernaryMatrix) -> Self {
        let (shape, quantisation) = ([matrix.n, matrix.k], Quantisation::of_packed(matrix.scales));
        let weight = PackedWeight::new(matrix, quantisation, false);
        Self::of(BitLinearWeight::Packed(weight), shape, quantisation)
    }

    /// A layer that is not ternary, without norm and bias.
    pub fn dense(matrix: DenseMatrix) -> Self {
        let shape = [matrix.args().n, matrix.args().k];
        Self::of(BitLinearWeight::Dense(matrix), shape, Quantisation::default())
    }

    /// The same layer in the training state, quantised in another way.
    ///
    /// # Errors
    /// If it can't be quantised so, or is not in the training state.
    pub fn with_quantisation(self, quantisation: Quantisation) -> Result<Self, ConfigError> {
        quantisation.check(self.d_input)?;
        match self.weight {
            BitLinearWeight::Latent(_) => Ok(Self { quantisation, ..self }),
            BitLinearWeight::Packed(_) | BitLinearWeight::Dense(_) => {
                let problem = "is frozen: its quantisation is that which it was packed with".into();
                Err(ConfigError { field: "weight", problem })
            }
        }
    }

    /// How it quantises. (Dense layers quantise nothing.)
    pub fn quantisation(&self) -> Quantisation {
        self.quantisation
    }

    /// Sets how far training quantises: a layer in the training state computes with `x + share * (quantised(x) - x)` for
    /// weights and activations. 1, the default, is what [`pack`](Self::pack) keeps; a share that rises from 0 to 1 lets a
    /// float model become ternary step by step (the warm-up of Llama3-8B-1.58).
    pub fn set_quantised_share(&mut self, share: f32) {
        self.quantised_share = share;
    }

    /// Activations of a row that share a scale, as [`Quantisation::activation_group`] says.
    pub fn activation_group(&self) -> Option<usize> {
        self.quantisation.activation_group(self.d_input)
    }

    /// The same layer with a norm before quantisation.
    pub fn with_norm(self, norm: RmsNorm) -> Self {
        Self { norm: Some(norm), ..self }
    }

    /// The same layer with a rotation of its input.
    pub fn with_rotation(self, rotation: Rotation) -> Self {
        Self { rotation: Some(rotation), ..self }
    }

    /// The same layer with a bias `[d_output]`.
    pub fn with_bias(self, bias: Param<Tensor<1>>) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// The same layer with an adapter.
    ///
    /// # Panics
    /// If the adapter has other features.
    pub fn with_adapter(self, adapter: Adapter) -> Self {
        let (found, expected) = ([adapter.b.args().n, adapter.a.args().k], [self.d_output, self.d_input]);
        assert!(
            found == expected && adapter.b.args().k == adapter.rank(),
            "BitLinear: an adapter for {found:?} (output and input features) of a layer of {expected:?}"
        );
        Self { adapter: Some(adapter), ..self }
    }

    /// Input features.
    pub fn d_input(&self) -> usize {
        self.d_input
    }

    /// Output features.
    pub fn d_output(&self) -> usize {
        self.d_output
    }

    /// Applies the layer.
    ///
    /// # Shapes
    /// - input: `[..., d_input]`, F32, F16 or BF16
    /// - output: `[..., d_output]` of the same type. (The layer computes in F32.)
    ///
    /// # Panics
    /// If the input has other features, or in strict mode if no kernel may compute the layer
    /// ([`try_forward`](Self::try_forward) returns that instead).
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        self.try_forward(input).unwrap_or_else(|error| panic!("{error}"))
    }

    /// [`forward`](Self::forward) that returns the kernels' errors.
    ///
    /// # Errors
    /// In strict mode, if no kernel may compute the layer.
    pub fn try_forward<const D: usize>(&self, input: Tensor<D>) -> Result<Tensor<D>, ManagerError> {
        let (mut shape, dtype) = (input.dims(), input.dtype());
        check_features("BitLinear", self.d_input, &shape);
        let rows: usize = shape[..D - 1].iter().product();
        shape[D - 1] = self.d_output;
        if rows == 0 {
            return Ok(Tensor::zeros(shape, (&input.device(), dtype)));
        }
        let x = in_f32(input).reshape([rows, self.d_input]);
        let y = self.forward_rows(x, true)?;
        Ok(in_dtype(y.reshape(shape), dtype))
    }

    /// [`try_forward`](Self::try_forward) of rows [M, d_input], with or without quantising them to int8.
    pub(crate) fn forward_rows(&self, x: Tensor<2>, quantise: bool) -> Result<Tensor<2>, ManagerError> {
        let layers = &[self];
        adapted(x, self.norm_input(), layers, |x, norm| {
            let (x, norm) = self.rotated(x, norm);
            fused(x, norm, quantise, layers)
        })
    }

    /// The rotated input, or, where there is no rotation, the input and the norm that it still has to pass.
    fn rotated(&self, x: Tensor<2>, norm: InputNorm) -> (Tensor<2>, InputNorm) {
        match (&self.rotation, norm) {
            (None, norm) => (x, norm),
            (Some(rotation), None) => (rotation.forward(x), None),
            (Some(rotation), Some((gamma, eps))) => (rotation.forward(ops::rms_norm(x, gamma, eps)), None),
        }
    }

    /// The norm as the fused operation takes it.
    pub(crate) fn norm_input(&self) -> InputNorm {
        self.norm.as_ref().map(|norm| (in_f32(norm.gamma.val()), norm.epsilon as f32))
    }

    /// Bytes of the weights with their scales, which a forward pass of one row reads.
    pub fn weight_bytes(&self) -> u64 {
        match &self.weight {
            BitLinearWeight::Latent(weight) => 4 * weight.val().dims().iter().product::<usize>() as u64,
            BitLinearWeight::Dense(matrix) => matrix.args().bytes().unwrap_or(usize::MAX) as u64,
            BitLinearWeight::Packed(weight) => {
                let scales = match weight.scales {
                    ScaleKind::One => 0,
                    ScaleKind::Groups { .. } => {
                        weight.scale.val().dims()[0] * weight.scale.val().dtype().size()
                    }
                };
                (4 * weight.codes.val().dims().iter().product::<usize>() + scales) as u64
            }
        }
    }

    /// The weights of a layer that is not ternary; `None` in the other states.
    pub fn dense_matrix(&self) -> Option<&DenseMatrix> {
        match &self.weight {
            BitLinearWeight::Dense(matrix) => Some(matrix),
            BitLinearWeight::Latent(_) | BitLinearWeight::Packed(_) => None,
        }
    }

    /// The packed matrix, for operations over several layers; `None` in the other states.
    pub fn matrix(&self) -> Option<TernaryMatrix> {
        match &self.weight {
            BitLinearWeight::Latent(_) | BitLinearWeight::Dense(_) => None,
            BitLinearWeight::Packed(weight) => Some(weight.matrix()),
        }
    }
}

/// # Panics
/// If an input has other features than a layer.
pub(crate) fn check_features(layer: &str, expected: usize, found: &[usize]) {
    assert!(
        found.last() == Some(&expected),
        "{layer}: expected an input of [..., {expected}], found {found:?}"
    );
}

/// What layers compute with.
pub(crate) fn in_f32<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    in_dtype(x, DType::F32)
}

/// In the type that the input had.
pub(crate) fn in_dtype<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}

/// Layers over one input, which passes `norm` first, if there is one; their outputs stand side by side: [M, sum of d_output].
pub(crate) fn side_by_side(
    x: Tensor<2>,
    norm: Option<(Tensor<1>, f32)>,
    quantise: bool,
    layers: &[&BitLinear],
) -> Result<Tensor<2>, ManagerError> {
    // Without building the matrices: this runs for every layer and token.
    let state = |layer: &&BitLinear| (discriminant(&layer.weight), layer.activation_group());
    let rotation = |layer: &&BitLinear| layer.rotation.as_ref().map(Rotation::id);
    let key = |layer| (state(layer), rotation(layer));
    let alike = layers.iter().all(|layer| key(layer) == key(&layers[0]));
    if alike && layers.iter().all(|layer| layer.norm.is_none()) {
        return adapted(x, norm, layers, |x, norm| {
            let (x, norm) = layers[0].rotated(x, norm);
            fused(x, norm, quantise, layers)
        });
    }
    let x = normalised(x, norm);
    let outputs: Result<_, _> = layers.iter().map(|layer| layer.forward_rows(x.clone(), quantise)).collect();
    Ok(Tensor::cat(outputs?, 1))
}

fn normalised(x: Tensor<2>, norm: InputNorm) -> Tensor<2> {
    match norm {
        Some((gamma, eps)) => ops::rms_norm(x, gamma, eps),
        None => x,
    }
}

/// What `forward` makes of the input, and what the layers' adapters add to their outputs, which stand side by side.
fn adapted(
    x: Tensor<2>,
    norm: InputNorm,
    layers: &[&BitLinear],
    forward: impl FnOnce(Tensor<2>, InputNorm) -> Result<Tensor<2>, ManagerError>,
) -> Result<Tensor<2>, ManagerError> {
    if layers.iter().all(|layer| layer.adapter.is_none()) {
        return forward(x, norm);
    }
    let y = forward(x.clone(), norm.clone())?;
    let (x, rows, device) = (normalised(x, norm), y.dims()[0], y.device());
    let part = |layer: &&BitLinear| match &layer.adapter {
        Some(adapter) => adapter.forward(x.clone()),
        None => Tensor::zeros([rows, layer.d_output], &device),
    };
    let mut parts: Vec<_> = layers.iter().map(part).collect();
    Ok(y + if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 1) })
}

/// Layers of one state and with the same activations over one input, in one operation: they share the normalised and
/// quantised rows.
fn fused(
    x: Tensor<2>,
    norm: InputNorm,
    quantise: bool,
    layers: &[&BitLinear],
) -> Result<Tensor<2>, ManagerError> {
    let matrices: Option<Vec<_>> = layers.iter().map(|layer| layer.matrix()).collect();
    let y = match matrices {
        Some(matrices) => {
            let quantise = quantise && layers[0].activation_group().is_some();
            ops::bit_linear(x, BitLinearInput { norm, quantise }, matrices)?
        }
        None => {
            let x = normalised(x, norm);
            let dense = |layer: &&BitLinear| match &layer.weight {
                BitLinearWeight::Dense(matrix) => Some(matrix.forward(x.clone())),
                _ => None,
            };
            match layers.iter().map(dense).collect::<Option<Vec<_>>>() {
                Some(mut outputs) if outputs.len() == 1 => outputs.remove(0),
                Some(outputs) => Tensor::cat(outputs, 1),
                None => latent_linears(x, quantise, layers),
            }
        }
    };
    if layers.iter().all(|layer| layer.bias.is_none()) {
        return Ok(y);
    }
    let device = y.device();
    let bias = |layer: &&BitLinear| match &layer.bias {
        Some(bias) => in_f32(bias.val()),
        None => Tensor::zeros([layer.d_output], &device),
    };
    Ok(y + Tensor::cat(layers.iter().map(bias).collect(), 0).unsqueeze())
}

/// Layers in the training state over one input, side by side in the output: one matmul of what their
/// quantisers make of input and weights; without `quantise` of these as they are, the float twin.
///
/// # Panics
/// If a layer is frozen: the layers are all in the same state.
fn latent_linears(x: Tensor<2>, quantise: bool, layers: &[&BitLinear]) -> Tensor<2> {
    let mut weights: Vec<Tensor<2>> = layers
        .iter()
        .map(|layer| match &layer.weight {
            BitLinearWeight::Latent(weight) if quantise => {
                let scale = layer.quantisation.scale;
                partly(in_f32(weight.val()), layer.quantised_share, |weight| ops::ternarise(weight, scale))
            }
            BitLinearWeight::Latent(weight) => in_f32(weight.val()),
            BitLinearWeight::Packed(_) | BitLinearWeight::Dense(_) => {
                panic!("a frozen layer beside one in the training state")
            }
        })
        .collect();
    let weight = if weights.len() == 1 { weights.remove(0) } else { Tensor::cat(weights, 0) };
    let x = match layers[0].activation_group() {
        Some(group) if quantise => partly(x, layers[0].quantised_share, |x| ops::fake_quantise(x, group)),
        _ => x,
    };
    x.matmul(weight.transpose())
}

/// x + share * (quantised(x) - x), with the gradient of x.
fn partly(x: Tensor<2>, share: f32, quantise: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
    if share >= 1.0 {
        return quantise(x);
    }
    let fixed = x.clone().detach();
    x + (quantise(fixed.clone()) - fixed) * share
}

impl ModuleDisplay for BitLinear {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let state = match &self.weight {
            BitLinearWeight::Latent(_) => "training",
            BitLinearWeight::Packed(weight) => match weight.choice.as_ref().and_then(|c| c.layout()) {
                None => "packed",
                Some(_) => "packed for this machine",
            },
            BitLinearWeight::Dense(_) => "dense",
        };
        let content = content
            .add("d_input", &self.d_input)
            .add("d_output", &self.d_output)
            .add("bias", &self.bias.is_some())
            .add("norm", &self.norm.is_some())
            .add("adapter", &self.adapter.is_some())
            .add("state", &state.to_owned());
        if self.dense_matrix().is_some() {
            return content.optional();
        }
        content
            .add("scale", &self.quantisation.scale.to_string())
            .add("activations", &self.quantisation.activation_rule(self.d_input).to_string())
            .optional()
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Distribution;

    use super::*;

    #[test]
    fn packed_layouts_compute_the_same() {
        let device = Device::flex();
        let layer = BitLinearConfig::new(256, 96).init(&device);
        let x = Tensor::<3>::random([2, 3, 256], Distribution::Normal(0.0, 1.0), &device);
        let values = |layer: &BitLinear| layer.forward(x.clone()).into_data();
        let latent = values(&layer);
        let packed = layer.pack().unwrap();
        let private = values(&packed);
        // Sums of floats against exact sums: near zero, relative to the terms.
        latent.assert_approx_eq::<f32>(&private, burn::tensor::Tolerance::rel_abs(1e-5, 1e-6));
        let canonical = packed.into_canonical().unwrap();
        assert_eq!(canonical.matrix().unwrap().codes.dims(), [96, 16]);
        values(&canonical).assert_eq(&private, true);
    }

    #[test]
    fn a_linear_layer_becomes_a_bit_linear() {
        let device = Device::flex();
        let linear = burn::nn::LinearConfig::new(12, 5).init(&device);
        let weight: Vec<f32> = linear.weight.val().into_data().iter::<f32>().collect();
        let layer = BitLinear::from_linear(linear).unwrap();
        assert_eq!((layer.d_input(), layer.d_output(), layer.bias.is_some()), (12, 5, true));
        let BitLinearWeight::Latent(latent) = &layer.weight else { panic!("it is trained further") };
        let latent: Vec<f32> = latent.val().into_data().iter::<f32>().collect();
        for (i, w) in latent.iter().enumerate() {
            assert_eq!(*w, weight[i % 12 * 5 + i / 12]);
        }
    }

    #[test]
    fn it_prints_itself_as_burns_modules_do() {
        let device = Device::flex();
        let layer = BitLinearConfig::new(8, 4).with_bias(true).init(&device);
        let text = layer.to_string();
        assert!(
            text.contains("BitLinear") && text.contains("d_input: 8") && text.contains("training"),
            "{text}"
        );
        assert!(layer.pack().unwrap().to_string().contains("packed"));
    }
}
