//! A packed `BitLinear` against what Burn has for the same [M, 2560] x [2560, 6912]: a `Linear` in f32 on
//! Flex, and, with the feature `ndarray`, Burn's own 2-bit quantised matmul (Q2S) on NdArray.
//!
//! Rounds alternate between them, so that all of them meet the machine in the same moods; each line has
//! medians and the ratio. Outputs are compared first: with the same ternary weights they agree but for the
//! quantisation of activations.

use std::hint::black_box;
use std::time::Instant;

use bitnet_burn::BitLinear;
use bitnet_burn_backends::manager::configure;
use bitnet_burn_backends::ops::TernaryMatrix;
use bitnet_burn_benches::{Random, threads};
use bitnet_burn_engine::bench::Spread;
use bitnet_burn_formats::canonical;
use bitnet_burn_manager::ManagerConfig;
use burn::module::Param;
use burn::nn::Linear;
#[cfg(feature = "ndarray")]
use burn::tensor::quantization::{QuantScheme, QuantStore, QuantValue};
use burn::tensor::{Device, Tensor, TensorData};

const K: usize = 2560;
const N: usize = 6912;
const SCALE: f32 = 0.02;
const ROUNDS: usize = 9;

/// Seconds of one call, after as many as fill a tenth of a second.
fn time(f: &dyn Fn() -> Tensor<2>) -> f64 {
    let started = Instant::now();
    let mut calls = 0;
    while calls == 0 || started.elapsed().as_secs_f64() < 0.1 {
        black_box(f());
        calls += 1;
    }
    started.elapsed().as_secs_f64() / f64::from(calls)
}

/// The largest difference, over the largest value.
fn difference(a: Tensor<2>, b: Tensor<2>) -> f32 {
    let values = |t: Tensor<2>| t.into_data().iter::<f32>().collect::<Vec<_>>();
    let (a, b) = (values(a), values(b));
    let largest = a.iter().fold(0f32, |max, v| max.max(v.abs()));
    a.iter().zip(&b).fold(0f32, |max, (a, b)| max.max((a - b).abs())) / largest
}

/// Prints a line for each M.
fn compare(name: &str, device: &Device, theirs: &dyn Fn(Tensor<2>) -> Tensor<2>, weights: &[i8]) {
    let mut codes = vec![0; N * canonical::row_bytes(K)];
    for (row, out) in weights.chunks_exact(K).zip(codes.chunks_exact_mut(canonical::row_bytes(K))) {
        canonical::pack_row(row, out);
    }
    let matrix = TernaryMatrix::prepared(codes.into(), SCALE, N, K, device).expect("packs");
    let ours = BitLinear::from_matrix(matrix);
    let mut random = Random::new(2);
    for m in [1, 8, 32, 128] {
        let x = Tensor::<2>::from_data(TensorData::new(random.floats(m * K), [m, K]), device);
        let off = difference(theirs(x.clone()), ours.forward(x.clone()));
        assert!(off < 0.05, "{name} computes something else: {off}");
        let (mut our_times, mut their_times) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            our_times.push(time(&|| ours.forward(x.clone())));
            their_times.push(time(&|| theirs(x.clone())));
        }
        let median = |times: &[f64]| Spread::of(times).expect("rounds").median;
        let (our, their) = (median(&our_times), median(&their_times));
        println!(
            "M = {m:3}: BitLinear {:9.1} us, {name} {:10.1} us, ratio {:6.1}; outputs differ by {off:.4}",
            our * 1e6,
            their * 1e6,
            their / our
        );
    }
}

fn main() {
    let config = ManagerConfig { threads: threads(), ..ManagerConfig::default() };
    configure(config, &[]).expect("nobody has used the kernels yet");
    println!("BitLinear on {} thread(s); Burn's matmuls on RAYON_NUM_THREADS or all", threads());
    let weights = Random::new(1).ternary(N * K);
    // Burn keeps a linear layer's weights as [K, N].
    let transposed: Vec<f32> = (0..K * N).map(|i| f32::from(weights[i % N * K + i / N]) * SCALE).collect();
    let dense = |device: &Device| Tensor::<2>::from_data(TensorData::new(transposed.clone(), [K, N]), device);

    let device = Device::flex();
    let linear = Linear { weight: Param::from_tensor(dense(&device)), bias: None };
    compare("Linear in f32 on Flex", &device, &|x| linear.forward(x), &weights);

    #[cfg(feature = "ndarray")]
    {
        #[allow(deprecated, reason = "it is what is measured")]
        let device = Device::ndarray();
        let scheme = QuantScheme::default().with_value(QuantValue::Q2S).with_store(QuantStore::Native);
        let quantised = dense(&device).quantize_dynamic(&scheme);
        compare("Q2S on NdArray", &device, &|x| x.matmul(quantised.clone()), &weights);
    }
    #[cfg(not(feature = "ndarray"))]
    println!("--features ndarray measures Burn's Q2S matmul on NdArray, too");
}
