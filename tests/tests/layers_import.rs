//! Layers from Burn's `Linear` and from ternary codes, and whole models of Burn's layers that become ternary.

use bitnet_burn::{
    ActivationRule, BitLinear, BitLinearWeight, ImportError, Quantisation, Ternarise, Ternary, WeightScale,
};
use bitnet_burn_tests::*;
use burn::module::{Lora, Module, Param, ParamGroup, Quantizer};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::transformer::{
    TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput, TransformerEncoderLayer,
};
use burn::nn::{LayerNorm, Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::activation::{gelu, softmax};
use burn::tensor::quantization::{Calibration, QuantScheme, QuantValue};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// A `Linear` of these weights [k, n].
fn linear(weight: Tensor<2>) -> Linear {
    Linear { weight: Param::from_tensor(weight), bias: None }
}

/// Ternary weights [n, k] with a scale for each run, as a `Linear`.
fn ternary(n: usize, k: usize, scale: WeightScale, device: &Device) -> Linear {
    let codes = Random(3).ternary(n * k);
    let run = scale.run(n, k);
    let value = |(at, code): (usize, &i8)| f32::from(*code) * (0.25 + (at / run) as f32 / 64.0);
    let weights: Vec<f32> = codes.iter().enumerate().map(value).collect();
    let weights = Tensor::<2>::from_data(TensorData::new(weights, [n, k]), device);
    linear(Tensor::from_data(weights.transpose().into_data(), device))
}

fn float(layer: BitLinear) -> BitLinear {
    let kind = Quantisation { activations: ActivationRule::Float, ..layer.quantisation() };
    layer.with_quantisation(kind).unwrap()
}

#[test]
fn a_linear_keeps_its_type_and_whether_it_is_trained() {
    let autodiff = flex().autodiff();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for trained in [true, false] {
            let mut from = linear(random_tensor(1, [64, 8], &autodiff).cast(dtype).detach());
            from.weight = from.weight.set_require_grad(trained);
            let is_trained = |layer: BitLinear| {
                let BitLinearWeight::Latent(weight) = layer.weight else { panic!("it is trained further") };
                assert_eq!(weight.val().dtype(), dtype);
                weight.val().is_require_grad()
            };
            assert_eq!(is_trained(BitLinear::from_linear(from.clone()).unwrap()), trained);
            // And where it was in validation.
            let valid = BitLinear::from_linear(from.valid()).unwrap();
            assert_eq!(is_trained(valid.train()), trained);
        }
    }
}

#[test]
fn what_would_be_lost_is_refused() {
    let device = flex();
    let lora = linear(random_tensor(1, [64, 8], &device)).apply_lora(Lora::new(2, 4.0));
    let error = BitLinear::from_linear(lora.clone()).unwrap_err();
    assert!(matches!(&error, ImportError::Reparameterization { name, .. } if name == "lora"), "{error}");
    assert!(error.to_string().contains("materialize"), "{error}");
    let merged = BitLinear::from_linear(lora.materialize()).unwrap();
    assert_eq!(merged.d_output(), 8);
    let with_norm = bitnet_burn::BitLinearConfig::new(64, 8).with_norm(true).init(&device);
    assert!(matches!(with_norm.into_linear(), Err(ImportError::NotLinear("norm"))));
}

#[test]
fn weights_that_are_ternary_already_stay_as_they_are() {
    let (n, k) = (6, 256);
    for device in [flex(), flex().autodiff()] {
        let x = random_tensor::<2>(4, [3, k], &device);
        for scale in [
            WeightScale::Tensor,
            WeightScale::Row,
            WeightScale::Group(128),
            WeightScale::Group(64),
            WeightScale::Group(32),
        ] {
            let from = ternary(n, k, scale, &device);
            let want = values(from.forward(x.clone()));
            let layer = float(BitLinear::from_linear(from).unwrap());
            assert_eq!(layer.quantisation().scale, scale);
            close(&format!("{scale}"), &values(layer.forward(x.clone())), &want, 1e-4);
            let packed = layer.clone().pack().unwrap();
            close(&format!("packed {scale}"), &values(packed.forward(x.clone())), &want, 1e-4);
            // And back.
            for state in [layer, packed] {
                let back = state.into_linear().unwrap();
                assert_eq!(values(back.weight.val()), values(ternary(n, k, scale, &device).weight.val()));
            }
        }
    }
}

#[test]
fn codes_and_scales_become_a_packed_layer() {
    let (n, k, device) = (3, 64, flex());
    let codes = Random(5).ternary(n * k);
    let ints =
        |codes: Vec<i64>| Tensor::<2, Int>::from_data(TensorData::new(codes, [n, k]), (&device, DType::I64));
    let codes: Vec<i64> = codes.into_iter().map(i64::from).collect();
    let x = random_tensor::<2>(6, [2, k], &device);
    for shape in [[1, 1], [n, 1], [n, 2]] {
        let scales = random_tensor::<2>(7, shape, &device);
        let each = scales.clone().repeat_dim(0, n / shape[0]).repeat_dim(1, 1);
        let each = each.reshape([n, shape[1], 1]).repeat_dim(2, k / shape[1]).reshape([n, k]);
        let want = values(x.clone().matmul((ints(codes.clone()).float() * each).transpose()));
        let layer = BitLinear::from_ternary(ints(codes.clone()), scales, ActivationRule::Float).unwrap();
        close(&format!("{shape:?}"), &values(layer.forward(x.clone())), &want, 1e-4);
    }
    let from = |codes: Vec<i64>, scales: Tensor<2>, activations| {
        BitLinear::from_ternary(ints(codes), scales, activations).unwrap_err().to_string()
    };
    let ones = |shape| Tensor::<2>::ones(shape, &device);
    let mut wrong = codes.clone();
    wrong[70] = 2;
    assert!(from(wrong, ones([1, 1]), ActivationRule::Model).contains("code 2 at row 1, column 6"));
    for shape in [[2, 1], [n, 3], [n, 4], [1, n], [0, 0]] {
        let error = from(codes.clone(), ones(shape), ActivationRule::Model);
        assert!(error.contains(&format!("scales {shape:?} for codes [3, 64]")), "{error}");
    }
    assert!(from(codes.clone(), ones([n, 2]), ActivationRule::Row).contains("use group:32"));
    assert!(from(codes, ones([1, 1]) / 0.0, ActivationRule::Model).contains("not finite"));
}

#[test]
fn what_burn_quantised_to_ternary_computes_on_our_kernels_and_goes_back() {
    let device = flex();
    let (n, k) = (16, 64);
    let scheme = |value| QuantScheme::default().with_value(value);
    let quantise = |linear: Linear, calibration, value| {
        linear.quantize_weights(&mut Quantizer::new(calibration, scheme(value)))
    };
    let from = quantise(linear(random_tensor(8, [k, n], &device)), Calibration::AbsMean, QuantValue::Q2S);
    let want = from.weight.val().dequantize();
    let layer = float(BitLinear::from_linear(from).unwrap()).pack().unwrap();
    assert_eq!(layer.quantisation().scale, WeightScale::Tensor);
    let back = layer.clone().into_linear().unwrap();
    assert_eq!(values(back.weight.val()), values(want.clone()));
    let x = random_tensor::<2>(9, [2, k], &device);
    close("float activations", &values(layer.forward(x.clone())), &values(x.matmul(want.clone())), 1e-4);
    // To Burn's quantisation again, without loss.
    let again = quantise(back, Calibration::MinMax, QuantValue::Q2S);
    assert!(matches!(again.weight.val().dtype(), DType::QFloat(_)));
    assert_eq!(values(again.weight.val().dequantize()), values(want));
    let eight = quantise(linear(random_tensor(8, [k, n], &device)), Calibration::MinMax, QuantValue::Q8S);
    let error = BitLinear::from_linear(eight).unwrap_err();
    assert!(matches!(error, ImportError::Quantised { n: 16, k: 64, .. }), "{error}");
}

/// Burn's transformer, and a head that stays as it is.
#[derive(Module, Debug)]
struct Model {
    encoder: TransformerEncoder,
    head: Linear,
}

const LENGTH: usize = 4;
const WIDTH: usize = 32;
const CLASSES: usize = 2;

impl Model {
    fn new(device: &Device) -> Self {
        device.seed(1);
        let encoder = TransformerEncoderConfig::new(WIDTH, 64, 2, 1).with_dropout(0.0);
        Self { encoder: encoder.init(device), head: LinearConfig::new(WIDTH, CLASSES).init(device) }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<2> {
        let y = self.encoder.forward(TransformerEncoderInput::new(x));
        let rows = y.dims()[0];
        self.head.forward(y.mean_dim(1).reshape([rows, WIDTH]))
    }
}

/// Which of two values is larger on average: sequences and their classes.
fn data(seed: u64, count: usize, device: &Device) -> (Tensor<3>, Vec<i32>) {
    let x = Random(seed).floats(count * LENGTH * WIDTH);
    let class = |x: &[f32]| i32::from(x.chunks(WIDTH).map(|x| x[0] - x[1]).sum::<f32>() > 0.0);
    let classes = x.chunks(LENGTH * WIDTH).map(class).collect();
    (Tensor::from_data(TensorData::new(x, [count, LENGTH, WIDTH]), device), classes)
}

fn train(mut model: Model, steps: usize, device: &Device) -> Model {
    let loss = CrossEntropyLossConfig::new().init(device);
    let mut optimizer = AdamConfig::new().init();
    for step in 0..steps {
        let (x, classes) = data(100 + step as u64, 32, device);
        let classes = Tensor::<1, Int>::from_data(TensorData::new(classes, [32]), device);
        let gradients = loss.forward(model.forward(x), classes).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(3e-3, model, gradients);
    }
    model
}

fn accuracy(device: &Device, forward: impl Fn(Tensor<3>) -> Tensor<2>) -> f32 {
    let (x, classes) = data(1, 128, device);
    let answers = forward(x).argmax(1).into_data();
    let right = answers.iter::<i32>().zip(classes).filter(|(answer, class)| answer == class).count();
    right as f32 / 128.0
}

/// The packed twin of the encoder's layers.
struct Packed {
    layers: Vec<PackedLayer>,
    head: Linear,
}

struct PackedLayer {
    projections: [BitLinear; 4],
    network: [BitLinear; 2],
    norms: [LayerNorm; 2],
}

impl PackedLayer {
    fn new(layer: TransformerEncoderLayer, activations: ActivationRule) -> Self {
        let pack = |linear: Linear| {
            let layer = BitLinear::from_linear(linear).unwrap();
            let kind = Quantisation { activations, ..layer.quantisation() };
            layer.with_quantisation(kind).unwrap().pack().unwrap()
        };
        Self {
            projections: [layer.mha.query, layer.mha.key, layer.mha.value, layer.mha.output].map(pack),
            network: [layer.pwff.linear_inner, layer.pwff.linear_outer].map(pack),
            norms: [layer.norm_1, layer.norm_2],
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let ([rows, length, width], heads) = (x.dims(), 2);
        let of_heads = |layer: &BitLinear| {
            layer.forward(x.clone()).reshape([rows, length, heads, width / heads]).swap_dims(1, 2)
        };
        let [q, k, v] = [0, 1, 2].map(|i| of_heads(&self.projections[i]));
        let weights = softmax(q.matmul(k.transpose()) / ((width / heads) as f32).sqrt(), 3);
        let context = weights.matmul(v).swap_dims(1, 2).reshape([rows, length, width]);
        let x = self.norms[0].forward(x + self.projections[3].forward(context));
        let inner = gelu(self.network[0].forward(x.clone()));
        self.norms[1].forward(x + self.network[1].forward(inner))
    }
}

impl Packed {
    fn new(model: Model, activations: ActivationRule) -> Self {
        let layers = model.encoder.layers.into_iter().map(|layer| PackedLayer::new(layer, activations));
        Self { layers: layers.collect(), head: model.head }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<2> {
        let rows = x.dims()[0];
        let y = self.layers.iter().fold(x, |x, layer| layer.forward(x));
        self.head.forward(y.mean_dim(1).reshape([rows, WIDTH]))
    }
}

fn ternarised(model: Model) -> Model {
    let group = ParamGroup::all().exclude(ParamGroup::from_predicate("head"));
    model.apply_reparameterization(Ternarise::new(WeightScale::Tensor).with_group(group))
}

#[test]
fn burns_transformer_becomes_ternary_trains_and_packs() {
    let of = |model: &Model, device: &Device| {
        let valid = model.valid();
        accuracy(device, |x| valid.forward(x))
    };
    let flex = flex();
    let autodiff = flex.clone().autodiff();
    let float = train(Model::new(&autodiff), 30, &autodiff);
    let before = of(&float, &flex);
    let model = ternarised(float);
    let is_ternary = |linear: &Linear| linear.weight.reparameterization::<Ternary>().is_some();
    assert!(is_ternary(&model.encoder.layers[0].mha.value) && !is_ternary(&model.head));
    let between = of(&model, &flex);
    let tuned = train(model, 30, &autodiff);
    let after = of(&tuned, &flex);
    println!("float {before}, ternarised {between}, fine-tuned {after}");
    assert!(between < before && before > 0.8 && after > 0.8, "{before}, {between}, {after}");

    #[allow(unused_mut, reason = "without wgpu")]
    let mut devices = host_devices();
    #[cfg(feature = "wgpu")]
    devices.push(Device::wgpu(Default::default()));
    for device in devices {
        // From here on each device trains by itself.
        let autodiff = device.clone().autodiff();
        let record = tuned.clone().into_record();
        let model = train(ternarised(Model::new(&autodiff)).load_record(record), 2, &autodiff);
        let valid = model.valid();
        let (x, _) = data(1, 32, &device);
        let want = values(valid.forward(x.clone()));
        // Burn's own way: the ternary values as floats.
        close("materialised", &values(valid.clone().materialize().forward(x.clone())), &want, 1e-4);
        let exact = Packed::new(valid.clone(), ActivationRule::Float);
        close("packed, float activations", &values(exact.forward(x)), &want, 1e-4);
        let fast = Packed::new(valid, ActivationRule::Row);
        let (after, packed) = (of(&model, &device), accuracy(&device, |x| fast.forward(x)));
        println!("{device:?}: fine-tuned {after}, packed with int8 {packed}");
        assert!(after > 0.8 && (packed - after).abs() < 0.05, "{packed} after {after} on {device:?}");
    }
}
