//! Training: tokens a second at the size of the built-in model, the share of its matmuls, and the BitNet linear
//! layer beside one put together from Burn's operations.
//!
//! Rounds are interleaved, and medians of seven are shown: `cargo bench --bench training`, and with
//! `--features ndarray` NdArray as well. `-- --quick` makes three rounds.

use std::hint::black_box;
use std::time::Instant;

use bitnet_burn::BitLinearConfig;
use bitnet_burn::ModelConfig;
use bitnet_burn::Projection;
use bitnet_burn_benches::Random;
use bitnet_burn_engine::bench::Spread;
use bitnet_burn_train::{Corpus, TrainConfig, Trainer};
use burn::tensor::{Device, Tensor, TensorData};

fn tensor(shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(Random::new(1).floats(shape[0] * shape[1]), shape), device)
}

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// Reads something of a result, for devices that compute later.
fn finish(tensor: Tensor<2>) {
    black_box(tensor.slice([0..1, 0..1]).into_data());
}

/// The matmuls of a step's weights: forward, the gradient of the input, and that of the weight.
struct Matmuls {
    /// (x [M, K], w [N, K], dy [M, N], how many).
    shapes: Vec<(Tensor<2>, Tensor<2>, Tensor<2>, usize)>,
}

impl Matmuls {
    fn new(config: &ModelConfig, m: usize, device: &Device) -> Self {
        let mut count = std::collections::BTreeMap::new();
        // q, k, v and gate, up are one matmul each: their inputs are the same.
        let n = |projections: &[Projection]| projections.iter().map(|p| p.shape(config).0).sum::<usize>();
        let k = |projection: Projection| projection.shape(config).1;
        for parts in [
            &[Projection::Q, Projection::K, Projection::V][..],
            &[Projection::O],
            &[Projection::Gate, Projection::Up],
            &[Projection::Down],
        ] {
            *count.entry((n(parts), k(parts[0]))).or_insert(0) += config.n_layers;
        }
        *count.entry((config.vocab_size, config.hidden_size)).or_insert(0) += 1;
        let shapes = count.into_iter().map(|((n, k), count)| {
            (tensor([m, k], device), tensor([n, k], device), tensor([m, n], device), count)
        });
        Self { shapes: shapes.collect() }
    }

    fn run(&self) {
        for (x, w, dy, count) in &self.shapes {
            for _ in 0..*count {
                finish(x.clone().matmul(w.clone().transpose()));
                finish(dy.clone().matmul(w.clone()));
                finish(dy.clone().transpose().matmul(x.clone()));
            }
        }
    }
}

/// The layer as one would write it with Burn's operations: forward and backward.
fn composed(x: Tensor<2>, w: Tensor<2>, dy: Tensor<2>) {
    let pass = |value: Tensor<2>, quantised: Tensor<2>| value.clone() + (quantised - value).detach();
    let s = w.clone().abs().mean().clamp_min(1e-5).reshape([1, 1]);
    let qw = (w.clone() / s.clone()).round().clamp(-1.0, 1.0) * s;
    let a = x.clone().abs().max_dim(1).clamp_min(1e-5);
    let qx = (x.clone() * (a.full_like(127.0) / a.clone())).round().clamp(-128.0, 127.0) * (a / 127.0);
    let y = pass(x, qx).matmul(pass(w, qw).transpose());
    black_box((y * dy).sum().backward());
}

fn devices() -> Vec<(&'static str, Device)> {
    vec![
        ("Flex", Device::flex()),
        #[cfg(feature = "ndarray")]
        #[allow(deprecated, reason = "NdArray still has users")]
        ("NdArray", Device::ndarray()),
    ]
}

fn median(samples: &[f64]) -> f64 {
    Spread::of(samples).expect("samples").median
}

fn main() {
    let rounds = if std::env::args().any(|arg| arg == "--quick") { 3 } else { 7 };
    if std::env::args().any(|arg| arg == "--test") {
        return; // `cargo test` runs benchmarks once, to see that they start
    }
    let mut random = Random::new(5);
    let mut word = || {
        ["the ", "fox ", "sees ", "a ", "small ", "red ", "hen, ", "and "][random.bits() as usize >> 5 & 7]
    };
    let corpus = Corpus::new((0..2000).map(|_| (0..60).map(|_| word()).collect()));
    for (name, device) in devices() {
        let mut config = TrainConfig::default();
        config.tokenizer.vocab_size = 512;
        let mut twin = config.clone();
        twin.model.ternary = false;
        let dir = tempfile::tempdir().expect("a directory");
        let trainer = |run: &str, config: &TrainConfig| {
            Trainer::start(&dir.path().join(run), config.clone(), &corpus, &device).expect("a run")
        };
        let (mut bitnet, mut float) = (trainer("bitnet", &config), trainer("float", &twin));
        let tokens = config.run.batch_size * config.sequence_length();
        let matmuls = Matmuls::new(bitnet.model().config(), tokens, &device);
        let lifted = device.clone().autodiff();
        let (n, k) = (640, 256);
        let layer = BitLinearConfig::new(k, n).init(&lifted);
        let x = tensor([tokens, k], &lifted).require_grad();
        let w = tensor([n, k], &lifted).require_grad();
        let dy = tensor([tokens, n], &lifted);
        let [mut ours, mut floats, mut multiplying, mut fused, mut naive] = [const { Vec::new() }; 5];
        for round in 0..rounds + 1 {
            let measured = [
                seconds(|| _ = bitnet.step().expect("a step")),
                seconds(|| _ = float.step().expect("a step")),
                seconds(|| matmuls.run()),
                seconds(|| drop(black_box((layer.forward(x.clone()) * dy.clone()).sum().backward()))),
                seconds(|| composed(x.clone(), w.clone(), dy.clone())),
            ];
            // The first round warms up.
            if round > 0 {
                for (samples, value) in [&mut ours, &mut floats, &mut multiplying, &mut fused, &mut naive]
                    .into_iter()
                    .zip(measured)
                {
                    samples.push(value);
                }
            }
        }
        let per_second = |samples: &[f64]| tokens as f64 / median(samples);
        let parameters =
            |config: &ModelConfig| (config.ternary_parameters() + config.dense_parameters()) as f64 / 1e6;
        println!(
            "{name}: {:.2} M parameters, {} sequences of {} a step, medians of {rounds}",
            parameters(bitnet.model().config()),
            config.run.batch_size,
            config.sequence_length()
        );
        println!("  BitNet      {:8.0} tokens/s", per_second(&ours));
        println!(
            "  float twin  {:8.0} tokens/s, {:.2} times BitNet's",
            per_second(&floats),
            median(&ours) / median(&floats)
        );
        println!("  matmuls     {:8.2} of a BitNet step's time", median(&multiplying) / median(&ours));
        println!(
            "  BitLinear [{tokens}, {k}] x [{n}, {k}], forward and backward: {:.2} ms; of Burn's operations {:.2} ms, {:.2} times that",
            median(&fused) * 1e3,
            median(&naive) * 1e3,
            median(&naive) / median(&fused)
        );
    }
}
