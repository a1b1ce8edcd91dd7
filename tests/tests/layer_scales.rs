//! `BitLinear` with every kind of scale and of activations: forward and backward against formulas in f64, packing, files, and
//! training.

use bitnet_burn::backends::ops::{MatrixScale, TernaryMatrix};
use bitnet_burn::{
    ActivationRule, BitAttention, BitAttentionConfig, BitExpert, BitExpertsConfig, BitFeedForward,
    BitFeedForwardConfig, BitLinear, BitLinearConfig, BitLinearWeight, Quantisation, RmsNormConfig,
    WeightScale,
};
use bitnet_burn_formats::{Scales, quant};
use bitnet_burn_tests::*;
use burn::module::{Module, Param};
use burn::optim::{AdamConfig, GradientsParams};
use burn::store::{BurnpackStore, ModuleSnapshot, SafetensorsStore};
use burn::tensor::activation::relu;
use burn::tensor::{DType, Device, Tensor};

const SCALES: [WeightScale; 6] = [
    WeightScale::Tensor,
    WeightScale::Row,
    WeightScale::Group(32),
    WeightScale::Group(64),
    WeightScale::Group(128),
    WeightScale::Group(256),
];

const RULES: [ActivationRule; 6] = [
    ActivationRule::Model,
    ActivationRule::Row,
    ActivationRule::Group(32),
    ActivationRule::Group(64),
    ActivationRule::Group(128),
    ActivationRule::Float,
];

/// Every kind that layers with `k` inputs can have.
fn kinds(k: usize) -> impl Iterator<Item = Quantisation> {
    let all =
        SCALES.into_iter().flat_map(|scale| RULES.map(|activations| Quantisation { scale, activations }));
    all.filter(move |kind| kind.check(k).is_ok())
}

/// Weights of which each group of 32 has a size of its own, so that kinds of scales differ; some groups are zeros, some
/// below the smallest scale.
fn uneven(random: &mut Random, count: usize) -> Vec<f32> {
    let mut weights = random.floats(count);
    weights.chunks_mut(32).enumerate().for_each(|(i, w)| match i % 7 {
        0 => w.iter_mut().for_each(|w| *w *= 9.0),
        1 => w.iter_mut().for_each(|w| *w *= 0.01),
        2 if i % 2 == 0 => w.fill(0.0),
        3 => w.iter_mut().for_each(|w| *w *= 1e-6),
        _ => {}
    });
    weights
}

fn layer(weights: &[f32], [n, k]: [usize; 2], kind: Quantisation, device: &Device) -> BitLinear {
    let weight = Param::from_tensor(tensor(weights, [n, k], device));
    BitLinear::latent(weight).with_quantisation(kind).unwrap()
}

/// The weights that the layer multiplies by, by their definition in f64.
fn ternary(weights: &[f32], [n, k]: [usize; 2], scale: WeightScale) -> Vec<f64> {
    let run = match scale {
        WeightScale::Tensor => n * k,
        WeightScale::Row => k,
        WeightScale::Group(group) => group,
    };
    let of_run = |w: &[f32]| {
        let s = (w.iter().map(|&w| f64::from(w).abs()).sum::<f64>() / w.len() as f64).max(1e-5);
        w.iter().map(|&w| (f64::from(w) / s).round_ties_even().clamp(-1.0, 1.0) * s).collect::<Vec<_>>()
    };
    weights.chunks(run).flat_map(of_run).collect()
}

/// The activations that the layer multiplies, by the scalar reference for a row or a group of it.
fn activations(x: &[f32], k: usize, kind: Quantisation) -> Vec<f64> {
    let group = match (kind.activations, kind.scale) {
        (ActivationRule::Float, _) => return x.iter().map(|&x| f64::from(x)).collect(),
        (ActivationRule::Row, _) | (ActivationRule::Model, WeightScale::Tensor) => k,
        (ActivationRule::Model, _) => 32,
        (ActivationRule::Group(n), WeightScale::Group(group)) => n.min(group),
        (ActivationRule::Group(n), _) => n,
    };
    let of_group = |x: &[f32]| {
        let mut q = vec![0; x.len()];
        let (scale, _) = quant::absmax_row(x, &mut q);
        q.into_iter().map(move |q| f64::from(q) * f64::from(scale)).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(|row| row.chunks(group).flat_map(of_group)).collect()
}

/// a [m, k] * bᵀ of b [n, k].
fn product(a: &[f64], b: &[f64], k: usize) -> Vec<f32> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() as f32;
    a.chunks(k).flat_map(|a| b.chunks(k).map(move |b| dot(a, b))).collect()
}

fn transposed(a: &[f64], columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|c| a.iter().skip(c).step_by(columns).copied()).collect()
}

fn assert_close(got: &[f32], want: &[f32], what: &str) {
    let largest = want.iter().fold(0f32, |a, v| a.max(v.abs()));
    let difference = max_difference(got, want);
    assert!(difference <= 1e-5 * largest, "{what}: {difference:e} of {largest:e}");
}

/// Forward, and the straight-through gradients dW = dyᵀ * quantised(x), dx = dy * ternary(W): in training, and dx of the
/// packed layer.
#[test]
fn forward_and_gradients_are_those_of_the_definition() {
    let (n, k, m) = (10, 512, 3);
    let mut random = Random(21);
    let (weights, x, dy) = (uneven(&mut random, n * k), uneven(&mut random, m * k), random.floats(m * n));
    for kind in kinds(k) {
        let (w, q) = (ternary(&weights, [n, k], kind.scale), activations(&x, k, kind));
        let d: Vec<f64> = dy.iter().map(|&d| f64::from(d)).collect();
        let y = product(&q, &w, k);
        let dx = product(&d, &transposed(&w, k), n);
        let dw = product(&transposed(&d, n), &transposed(&q, k), m);
        for device in devices() {
            let what = |part: &str| format!("{part} of {kind:?} on {device:?}");
            let trained = layer(&weights, [n, k], kind, &device);
            let packed = trained.clone().pack().unwrap();
            let input = tensor(&x, [m, k], &device);
            assert_close(&values(trained.forward(input.clone())), &y, &what("y"));
            assert_close(&values(packed.forward(input)), &y, &what("packed y"));
        }
        for device in host_devices() {
            let what = |part: &str| format!("{part} of {kind:?} on {device:?}");
            let device = device.clone().autodiff();
            let trained = layer(&weights, [n, k], kind, &device);
            let BitLinearWeight::Latent(latent) = &trained.weight else { panic!("training") };
            let packed = trained.clone().pack().unwrap();
            for (state, layer) in [("trained", &trained), ("packed", &packed)] {
                let input = tensor(&x, [m, k], &device).require_grad();
                let loss = (layer.forward(input.clone()) * tensor(&dy, [m, n], &device)).sum();
                let gradients = loss.backward();
                let got = values(input.grad(&gradients).expect("a gradient for the input"));
                assert_close(&got, &dx, &what(&format!("{state} dx")));
                if state == "trained" {
                    let got = latent.val().grad(&gradients).expect("a gradient for the weights");
                    assert_close(&values(got), &dw, &what("dW"));
                }
            }
        }
    }
}

/// The gradient of what is behind the quantisers, by differences: the straight-through one is that of a layer without them,
/// at the quantised weights and activations.
#[test]
fn gradients_are_the_slopes_at_the_quantised_values() {
    let (n, k, m) = (4, 64, 2);
    let mut random = Random(22);
    let (weights, x) = (random.floats(n * k), random.floats(m * k));
    let device = flex().autodiff();
    let loss = |w: &[f64], q: &[f64]| product(q, w, k).iter().map(|&y| f64::from(y).powi(2)).sum::<f64>();
    for kind in kinds(k) {
        let trained = layer(&weights, [n, k], kind, &device);
        let BitLinearWeight::Latent(latent) = &trained.weight else { panic!("training") };
        let input = tensor(&x, [m, k], &device).require_grad();
        let gradients = trained.forward(input.clone()).square().sum().backward();
        let (w, q) = (ternary(&weights, [n, k], kind.scale), activations(&x, k, kind));
        let (dw, dx) = (latent.val().grad(&gradients).unwrap(), input.grad(&gradients).unwrap());
        for (what, got, of_weights) in [("dW", values(dw), true), ("dx", values(dx), false)] {
            let largest = got.iter().fold(0f64, |a, &v| a.max(f64::from(v).abs()));
            for i in (0..got.len()).step_by(7) {
                let at = |step: f64| {
                    let (mut w, mut q) = (w.clone(), q.clone());
                    if of_weights {
                        w[i] += step
                    } else {
                        q[i] += step
                    }
                    loss(&w, &q)
                };
                let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
                let difference = (f64::from(got[i]) - slope).abs();
                assert!(difference <= 1e-3 * largest, "{what}[{i}] of {kind:?}: {} and {slope}", got[i]);
            }
        }
    }
}

#[test]
fn packing_and_unpacking_keep_codes_and_scales() {
    let mut random = Random(23);
    for [n, k] in [[40, 256], [3, 512], [7, 100]] {
        let (weights, x) = (uneven(&mut random, n * k), random.floats(5 * k));
        for kind in kinds(k) {
            for device in host_devices() {
                let input = || tensor(&x, [5, k], &device);
                let trained = layer(&weights, [n, k], kind, &device);
                let packed = trained.clone().pack().unwrap();
                let want = values(packed.forward(input()));
                assert_close(&want, &values(trained.forward(input())), &format!("{kind:?}"));
                let canonical = packed.clone().into_canonical().unwrap();
                assert_eq!(values(canonical.forward(input())), want, "{kind:?}");
                let again = packed.unpack().unwrap();
                assert!(matches!(again.weight, BitLinearWeight::Latent(_)));
                assert_eq!(again.quantisation(), kind);
                let again = again.pack().unwrap();
                let (a, b) = (again.into_canonical().unwrap().matrix(), canonical.matrix());
                let (a, b) = (a.unwrap(), b.unwrap());
                assert_eq!(a.scales, b.scales);
                assert_eq!(values(a.scale), values(b.scale), "scales of {kind:?}");
                a.codes.into_data().assert_eq(&b.codes.into_data(), true);
            }
        }
    }
}

/// Scales that files may have, and training can't make.
#[test]
fn frozen_weights_are_trained_further_or_refused() {
    let (n, k) = (3, 128);
    let mut random = Random(26);
    let codes = random.ternary(n * k);
    let device = flex();
    let x = tensor(&random.floats(2 * k), [2, k], &device);
    let of = |scales: &[f32], group: usize, activations: usize| {
        let scales = Scales::from_rows(scales, n, k, group).unwrap();
        let scale = MatrixScale::Groups { scales, activations };
        let codes = canonical_rows(&codes, k).into();
        BitLinear::from_matrix(TernaryMatrix::prepared(codes, scale, n, k, &device).unwrap())
    };
    // With a negative scale, codes of the opposite sign.
    let signed = of(&[0.5, -0.25, 0.0, -3.0, 0.001, 7.0], 64, 32);
    let want = values(signed.forward(x.clone()));
    let trained = signed.unpack().unwrap();
    assert_eq!(trained.quantisation().scale, WeightScale::Group(64));
    assert_eq!(values(trained.clone().pack().unwrap().forward(x.clone())), want);
    assert_close(&values(trained.forward(x)), &want, "unpacked");
    for (layer, expected) in [
        (of(&[0.5, 1e-6, 0.5], 0, 0), "scale of 1e-6"),
        (of(&[0.5; 6], 96, 32), "group:96: weights share a scale in groups of 32, 64, 128 or 256"),
    ] {
        let error = layer.unpack().unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("[3, 128]"), "{error}");
    }
}

#[test]
fn every_kind_survives_both_kinds_of_file() {
    let dir = tempfile::tempdir().unwrap();
    let (n, k) = (48, 256);
    let mut random = Random(24);
    for device in host_devices() {
        let weights = uneven(&mut random, n * k);
        for kind in kinds(k) {
            let config = BitLinearConfig::new(k, n)
                .with_bias(true)
                .with_norm(true)
                .with_scale(kind.scale)
                .with_activations(kind.activations);
            let mut latent = layer(&weights, [n, k], kind, &device)
                .with_bias(Param::from_tensor(tensor(&random.floats(n), [n], &device)))
                .with_norm(RmsNormConfig::new(k).init(&device));
            latent.norm.as_mut().unwrap().gamma = Param::from_tensor(tensor(&random.floats(k), [k], &device));
            let packed = latent.clone().pack().unwrap();
            let input = tensor(&random.floats(5 * k), [5, k], &device);
            for (state, layer) in [("latent", latent), ("packed", packed)] {
                let want = values(layer.forward(input.clone()));
                let other = || match state {
                    "latent" => config.init(&device),
                    _ => config.init_packed(&device),
                };
                let path = dir.path().join(state);
                let loaded = [
                    {
                        let store = || SafetensorsStore::from_file(&path).overwrite(true);
                        layer.save_into(&mut store()).unwrap();
                        let mut loaded = other();
                        loaded.load_from(&mut store()).unwrap();
                        loaded
                    },
                    {
                        let store = || BurnpackStore::from_file(&path).overwrite(true);
                        layer.save_into(&mut store()).unwrap();
                        let mut loaded = other();
                        loaded.load_from(&mut store()).unwrap();
                        loaded
                    },
                ];
                for loaded in loaded {
                    let got = values(loaded.forward(input.clone()));
                    assert_eq!(got, want, "{state} {kind:?} on {device:?}");
                    if state == "packed" {
                        assert_eq!(loaded.matrix().unwrap().codes.dtype(), DType::U32);
                        let again = loaded.unpack().unwrap().pack().unwrap();
                        assert_eq!(values(again.forward(input.clone())), want, "{kind:?}");
                    }
                }
            }
        }
    }
}

/// Weights of files may have scales in f16; those that were trained have them in f32.
#[test]
fn scales_in_f16_load_into_a_trained_layer() {
    let dir = tempfile::tempdir().unwrap();
    let (n, k) = (33, 128);
    let (device, mut random) = (flex(), Random(28));
    let scales = Scales::from_rows(&[[0.5, -0.25]; 33].concat(), n, k, 64).unwrap();
    assert!(scales.is_half());
    let codes = canonical_rows(&random.ternary(n * k), k).into();
    let matrix = MatrixScale::Groups { scales, activations: 32 };
    let layer = BitLinear::from_matrix(TernaryMatrix::canonical(codes, matrix, n, k, &device));
    let x = tensor(&random.floats(3 * k), [3, k], &device);
    let store = || SafetensorsStore::from_file(dir.path().join("packed"));
    layer.save_into(&mut store()).unwrap();
    let mut loaded = BitLinearConfig::new(k, n).with_scale(WeightScale::Group(64)).init_packed(&device);
    loaded.load_from(&mut store()).unwrap();
    assert_eq!(values(loaded.forward(x.clone())), values(layer.forward(x)));
}

#[test]
fn a_file_of_another_kind_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("packed");
    let packed = |scale: WeightScale| {
        let layer = BitLinearConfig::new(256, 40).with_scale(scale).init(&flex());
        layer.pack().unwrap()
    };
    let store = || SafetensorsStore::from_file(&path).overwrite(true);
    packed(WeightScale::Group(64)).save_into(&mut store()).unwrap();
    for scale in [WeightScale::Tensor, WeightScale::Row, WeightScale::Group(32)] {
        let error = packed(scale).load_from(&mut store()).unwrap_err().to_string();
        assert!(error.contains("scale"), "{scale}: {error}");
    }
}

#[test]
fn every_kind_moves_between_devices() {
    let (n, k) = (20, 256);
    let mut random = Random(27);
    let (uneven, x) = (uneven(&mut random, n * k), random.floats(3 * k));
    // With scales that are f16, which not every device has.
    let halves: Vec<f32> = (0..n * k).map(|i| [0.5, -0.5][i % 2] * (1 + i / 32 % 4) as f32).collect();
    for from in host_devices() {
        for to in host_devices() {
            for (weights, kind) in kinds(k).flat_map(|kind| [(&uneven, kind), (&halves, kind)]) {
                let packed = layer(weights, [n, k], kind, &from).pack().unwrap();
                let want = values(packed.forward(tensor(&x, [3, k], &from)));
                let got = values(packed.to_device(&to).forward(tensor(&x, [3, k], &to)));
                let what = format!("{kind:?} from {from:?} to {to:?}");
                match kind.activation_group(256) {
                    Some(_) => assert_eq!(got, want, "{what}"),
                    None => assert_close(&got, &want, &what),
                }
            }
        }
    }
}

#[test]
fn layers_of_transformers_pass_their_kind_on() {
    let (device, kind) =
        (flex(), Quantisation { scale: WeightScale::Row, activations: ActivationRule::Float });
    let Quantisation { scale, activations } = kind;
    let attention = BitAttentionConfig::new(32, 2, 1, 16).with_scale(scale).with_activations(activations);
    let attention = attention.init(&device);
    let network = BitFeedForwardConfig::new(32, 64).with_scale(scale).with_activations(activations);
    let network = network.init(&device);
    let experts = BitExpertsConfig::new(32, 64, 2, 1).with_scale(scale).with_activations(activations);
    let experts = experts.init(&device);
    let BitExpert { gate_proj, up_proj, down_proj } = &experts.experts[1];
    let BitAttention { q_proj, k_proj, v_proj, o_proj, .. } = &attention;
    let BitFeedForward { gate_proj: gate, up_proj: up, down_proj: down, .. } = &network;
    for layer in [q_proj, k_proj, v_proj, o_proj, gate, up, down, gate_proj, up_proj, down_proj] {
        assert_eq!(layer.quantisation(), kind);
    }
}

#[test]
fn configurations_are_text_and_layers_print_their_kind() {
    let device = flex();
    for kind in kinds(256) {
        let config = BitLinearConfig::new(256, 4).with_scale(kind.scale).with_activations(kind.activations);
        let json = serde_json::to_string(&config).unwrap();
        let again: BitLinearConfig = serde_json::from_str(&json).unwrap();
        assert_eq!(again.quantisation(), kind, "{json}");
        let layer = config.init(&device);
        let activations = match kind.activation_group(256) {
            None => "activations: float".to_owned(),
            Some(0) => "activations: row".to_owned(),
            Some(group) => format!("activations: group:{group}"),
        };
        for text in [layer.to_string(), layer.clone().pack().unwrap().to_string()] {
            assert!(
                text.contains(&format!("scale: {}", kind.scale)) && text.contains(&activations),
                "{text}"
            );
        }
        assert!(layer.pack().unwrap().with_quantisation(kind).is_err());
    }
    let mut wrong = serde_json::to_value(BitLinearConfig::new(96, 4)).unwrap();
    wrong["scale"] = "group:96".into();
    let error = serde_json::from_value::<BitLinearConfig>(wrong).unwrap_err().to_string();
    assert!(error.contains("32, 64, 128 or 256"), "{error}");
}

#[test]
#[should_panic(expected = "`scale` is group:64, which does not divide rows of 100 weights")]
fn groups_that_do_not_divide_the_input_are_refused() {
    BitLinearConfig::new(100, 4).with_scale(WeightScale::Group(64)).init(&flex());
}

#[test]
fn weights_that_are_no_numbers_are_not_packed() {
    let mut weights = vec![0.5; 4 * 64];
    weights[130] = f32::NAN;
    for kind in kinds(64) {
        let error = layer(&weights, [4, 64], kind, &flex()).pack().unwrap_err();
        assert!(error.to_string().contains("weight [4, 64]"), "{error}");
    }
}

/// Two layers that learn the sign of a product.
#[derive(Module, Debug)]
struct Network {
    hidden: BitLinear,
    output: BitLinear,
}

impl Network {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.output.forward(relu(self.hidden.forward(x)))
    }
}

#[test]
fn a_network_learns_with_every_kind_and_predicts_the_same_when_packed() {
    let (k, hidden, m) = (64, 128, 96);
    let mut random = Random(25);
    let x = random.floats(m * k);
    let labels: Vec<f32> = x.chunks(k).map(|x| if x[0] + x[1] - x[2] > 0.0 { 1.0 } else { -1.0 }).collect();
    let device = flex();
    let autodiff = device.clone().autodiff();
    for kind in kinds(k) {
        let mut of = |k: usize, n: usize| {
            layer(&random.floats(n * k), [n, k], kind, &autodiff)
                .with_norm(RmsNormConfig::new(k).init(&autodiff))
        };
        let mut network = Network { hidden: of(k, hidden), output: of(hidden, 1) };
        let mut optimizer = AdamConfig::new().init();
        let mut losses = Vec::new();
        for _ in 0..40 {
            let y = network.forward(tensor(&x, [m, k], &autodiff));
            let loss = (y - tensor(&labels, [m, 1], &autodiff)).square().mean();
            losses.push(values(loss.clone())[0]);
            let gradients = GradientsParams::from_grads(loss.backward(), &network);
            network = optimizer.step(1e-2, network, gradients);
        }
        assert!(losses[39] < 0.5 * losses[0], "{kind:?}: {} to {}", losses[0], losses[39]);
        let trained = network.valid();
        let packed = Network {
            hidden: trained.hidden.clone().pack().unwrap(),
            output: trained.output.clone().pack().unwrap(),
        };
        let [want, got] = [trained, packed].map(|n| values(n.forward(tensor(&x, [m, k], &device))));
        // Float noise of the first layer may turn a rounding to int8 in the second.
        let largest = want.iter().fold(0f32, |a, y| a.max(y.abs()));
        for (want, got) in want.into_iter().zip(got) {
            assert!((want - got).abs() <= 1e-2 * largest, "{kind:?}: {want} and {got}");
            assert!(
                want.signum() == got.signum() || want.abs() <= 1e-2 * largest,
                "{kind:?}: {want} and {got}"
            );
        }
    }
}
