//! The default bodies against the fast ones of host memory. (Operations that have default bodies on a device with
//! autodiff are compared in the tests package.)

use bitnet_burn_formats::dense_tiles::tile;
use bitnet_burn_formats::{WeightScale, quant};
use bitnet_burn_manager::ScaleKind;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend};
use burn::tensor::TensorData;

use super::*;
use crate::extension::{
    BitLinearArgs, DeltaNetArgs, DeltaNetShape, DeltaNetTensors, DeltaNetWeights, DenseArgs, InputNorm,
    Matrix, SelfAttentionArgs, TernaryBackend, TernaryWeight, WeightGroup,
};

/// Small pseudo-random numbers in 0..n.
fn numbers(seed: u32, count: usize, n: u32) -> impl Iterator<Item = u32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..count).map(move |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % n
    })
}

fn floats<B: Backend>(values: Vec<f32>, shape: &[usize]) -> FloatTensor<B> {
    B::float_from_data(TensorData::new(values, shape.to_vec()), &Default::default())
}

fn values<B: Backend>(tensor: FloatTensor<B>) -> Vec<f32> {
    let data = ready(B::float_into_data(tensor));
    data.try_to_vec().expect("f32")
}

/// What a future gives, which is there already.
fn ready<T, E: std::fmt::Debug>(future: impl Future<Output = Result<T, E>>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.as_mut().poll(&mut context) {
        std::task::Poll::Ready(result) => result.expect("host memory"),
        std::task::Poll::Pending => unreachable!("host memory answers at once"),
    }
}

/// Weights of one to three matrices: as the operations take them, and -1, 0, 1 with the scales.
type Weights<B> = (WeightGroup<B>, Vec<(Vec<i8>, f32)>);

fn weights<B: Backend>(ns: &[usize], k: usize) -> Weights<B> {
    let plain: Vec<(Vec<i8>, f32)> = ns
        .iter()
        .map(|&n| (numbers(n as u32, n * k, 3).map(|c| c as i8 - 1).collect(), 0.03 + n as f32 / 100.0))
        .collect();
    let mut matrices = plain.iter().map(|(codes, scale)| {
        let words: Vec<u32> = codes
            .chunks_exact(k)
            .flat_map(|row| {
                let mut bytes = vec![0; bitnet_burn_plugin::canonical::row_bytes(k)];
                bitnet_burn_plugin::canonical::pack_row(row, &mut bytes);
                bytes
                    .chunks_exact(4)
                    .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect::<Vec<_>>()
            })
            .collect();
        let shape = [codes.len() / k, k.div_ceil(128) * 8];
        let codes = B::int_from_data(TensorData::new(words, shape), &Default::default());
        TernaryWeight { codes, scale: floats::<B>(vec![*scale], &[1]) }
    });
    let weights = match (matrices.next(), matrices.next(), matrices.next()) {
        (Some(a), Some(b), Some(c)) => WeightGroup::Three(a, b, c),
        (Some(a), Some(b), None) => WeightGroup::Two(a, b),
        (Some(a), _, _) => WeightGroup::One(a),
        _ => panic!("one to three matrices"),
    };
    (weights, plain)
}

/// [`self_attention`] in f64, row by row.
fn naive_self_attention(qkv: &[f32], cos: &[f32], sin: &[f32], args: &SelfAttentionArgs) -> Vec<f32> {
    let SelfAttentionArgs { n_heads, n_kv_heads, head_dim: d, length, window } = *args;
    let width = (n_heads + 2 * n_kv_heads) * d;
    let mut out = Vec::new();
    for sequence in qkv.chunks_exact(length * width) {
        let head = |row: usize, head: usize| &sequence[row * width + head * d..][..d];
        let turned = |row: usize, of: usize| -> Vec<f64> {
            let x = head(row, of);
            let angle = |i: usize| (f64::from(cos[row * d / 2 + i]), f64::from(sin[row * d / 2 + i]));
            let pair = |i: usize| (f64::from(x[i]), f64::from(x[i + d / 2]));
            let low = (0..d / 2).map(|i| pair(i).0 * angle(i).0 - pair(i).1 * angle(i).1);
            let high = (0..d / 2).map(|i| pair(i).1 * angle(i).0 + pair(i).0 * angle(i).1);
            low.chain(high).collect()
        };
        for row in 0..length {
            let first = if let Some(window) = window { (row + 1).max(window) - window } else { 0 };
            for h in 0..n_heads {
                let (q, kv) = (turned(row, h), h / (n_heads / n_kv_heads));
                let score = |p: usize| -> f64 {
                    turned(p, n_heads + kv).iter().zip(&q).map(|(k, q)| k * q).sum::<f64>()
                        / (d as f64).sqrt()
                };
                let weights: Vec<f64> = (first..=row).map(|p| score(p).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..d).map(|i| {
                    let value = |p: usize| f64::from(head(p, n_heads + n_kv_heads + kv)[i]);
                    let sum: f64 = (first..=row).zip(&weights).map(|(p, w)| w * value(p)).sum();
                    (sum / total) as f32
                }));
            }
        }
    }
    out
}

fn close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0f32, |a, v| a.max(v.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance * largest, "{what}, value {i}: {got:e} and {want:e}");
    }
}

fn bit_linear_is_the_same<B: TernaryBackend>() {
    for (m, ns, k) in [(1, &[5][..], 128), (3, &[7, 7], 784), (9, &[16, 3, 5], 100), (2, &[64], 513)] {
        let what = format!("[{m}, {k}] x {ns:?}");
        let total: usize = ns.iter().sum();
        let x: Vec<f32> = numbers(m as u32, m * k, 2001).map(|v| v as f32 / 1000.0 - 1.0).collect();
        let norm: Vec<f32> = (0..k).map(|i| 0.5 + (i % 7) as f32 / 7.0).collect();
        let args = |quantise| BitLinearArgs {
            k,
            matrices: ns.iter().map(|&n| Matrix { n, scales: ScaleKind::One, choice: None }).collect(),
            eps: 1e-5,
            quantise,
        };
        let (weights, plain) = weights::<B>(ns, k);
        let again = || match &weights {
            WeightGroup::One(a) => WeightGroup::One(copy(a)),
            WeightGroup::Two(a, b) => WeightGroup::Two(copy(a), copy(b)),
            WeightGroup::Three(a, b, c) => WeightGroup::Three(copy(a), copy(b), copy(c)),
        };
        fn copy<B: Backend>(w: &TernaryWeight<B>) -> TernaryWeight<B> {
            TernaryWeight { codes: w.codes.clone(), scale: w.scale.clone() }
        }
        let input = || floats::<B>(x.clone(), &[m, k]);
        for quantise in [true, false] {
            for with_norm in [false, true] {
                let norm = || match with_norm {
                    true => InputNorm::Rms(floats::<B>(norm.clone(), &[k])),
                    false => InputNorm::None,
                };
                let fast = values::<B>(B::bit_linear(input(), norm(), again(), args(quantise)));
                let plain = values::<B>(bit_linear::<B>(input(), norm(), again(), &args(quantise)));
                // Nothing but the last bits of the scales and, with the norm, of the input.
                close(&fast, &plain, 1e-6, &format!("{what} quantise {quantise} norm {with_norm}"));
            }
        }
        // The sums are exact: with a row scale of one and weights' scales of one they are integers.
        let whole: Vec<f32> = numbers(7, m * k, 255).map(|v| v as f32 - 127.0).collect();
        let whole: Vec<f32> = whole.chunks_exact(k).flat_map(|row| [&[127.0], &row[1..]].concat()).collect();
        let ones = |w: WeightGroup<B>| {
            let mut w =
                w.into_vec().into_iter().map(|w| TernaryWeight { scale: floats::<B>(vec![1.0], &[1]), ..w });
            match (w.next(), w.next(), w.next()) {
                (Some(a), Some(b), Some(c)) => WeightGroup::Three(a, b, c),
                (Some(a), Some(b), None) => WeightGroup::Two(a, b),
                (Some(a), _, _) => WeightGroup::One(a),
                _ => panic!("one to three matrices"),
            }
        };
        let mut sums = vec![0f32; m * total];
        for (row, out) in whole.chunks_exact(k).zip(sums.chunks_exact_mut(total)) {
            let mut q = vec![0; k];
            assert_eq!(quant::absmax_row(row, &mut q).0, 1.0);
            let all = plain.iter().flat_map(|(codes, _)| codes.chunks_exact(k));
            for (out, codes) in out.iter_mut().zip(all) {
                *out = codes.iter().zip(&q).map(|(&c, &q)| i32::from(c) * i32::from(q)).sum::<i32>() as f32;
            }
        }
        let x = || floats::<B>(whole.clone(), &[m, k]);
        let fast = values::<B>(B::bit_linear(x(), InputNorm::None, ones(again()), args(true)));
        let default = values::<B>(bit_linear::<B>(x(), InputNorm::None, ones(again()), &args(true)));
        assert_eq!((&fast, &default), (&sums, &sums), "{what}");

        let dy: Vec<f32> = numbers(11, m * total, 2001).map(|v| v as f32 / 1000.0 - 1.0).collect();
        let dy = || floats::<B>(dy.clone(), &[m, total]);
        let fast = values::<B>(B::bit_linear_backward(dy(), again(), args(true)));
        let default = values::<B>(bit_linear_backward::<B>(dy(), again(), &args(true)));
        close(&fast, &default, 1e-6, &format!("{what} backward"));
    }
}

fn random(seed: u32, count: usize) -> Vec<f32> {
    numbers(seed, count, 4001).map(|v| v as f32 / 1000.0 - 2.0).collect()
}

/// The gradients of sum(f(inputs) * dy) for the inputs, by Burn's own differentiation.
fn differentiated<A: AutodiffBackend>(
    inputs: &[(Vec<f32>, Vec<usize>)],
    dy: &[f32],
    f: impl Fn(Vec<FloatTensor<A>>) -> FloatTensor<A>,
) -> Vec<Vec<f32>> {
    let inputs: Vec<FloatTensor<A>> = inputs
        .iter()
        .map(|(values, shape)| A::float_set_require_grad(floats::<A>(values.clone(), shape), true))
        .collect();
    let y = f(inputs.clone());
    let dy = floats::<A>(dy.to_vec(), &dims(&y));
    let grads = A::backward(A::float_sum(A::float_mul(y, dy)));
    inputs.iter().map(|x| values::<A::InnerBackend>(A::grad(x, &grads).expect("a gradient"))).collect()
}

/// What training adds: each fast body and each gradient against the default forward body, which Burn
/// differentiates.
fn training_is_the_same<B: TernaryBackend>() {
    for (m, k) in [(1, 1), (3, 17), (130, 96)] {
        let (x, w, dy) = (random(1, m * k), random(2, k), random(3, m * k));
        let shape = [m, k];
        let tensor = |v: &[f32]| floats::<B>(v.to_vec(), &shape);
        let weight = || floats::<B>(w.clone(), &[k]);
        let plain = rms_norm::<B>(tensor(&x), weight(), 1e-3);
        close(&values::<B>(B::rms_norm(tensor(&x), weight(), 1e-3)), &values::<B>(plain), 1e-6, "rms_norm");
        let inputs = [(x.clone(), shape.to_vec()), (w.clone(), vec![k])];
        let want = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
            let w = v.remove(1);
            rms_norm::<Autodiff<B>>(v.remove(0), w, 1e-3)
        });
        let whole = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
            let w = v.remove(1);
            Autodiff::<B>::rms_norm(v.remove(0), w, 1e-3)
        });
        for (name, dx) in [
            ("fast", B::rms_norm_backward(tensor(&x), weight(), tensor(&dy), 1e-3)),
            ("default", rms_norm_backward::<B>(tensor(&x), weight(), tensor(&dy), 1e-3)),
            ("autodiff", floats::<B>(whole[0].clone(), &shape)),
        ] {
            close(&values::<B>(dx), &want[0], 1e-5, &format!("rms_norm dx {name}"));
        }
        for (name, dw) in [
            ("fast", B::rms_norm_backward_weight(tensor(&x), tensor(&dy), 1e-3)),
            ("default", rms_norm_backward_weight::<B>(tensor(&x), tensor(&dy), 1e-3)),
            ("autodiff", floats::<B>(whole[1].clone(), &[k])),
        ] {
            close(&values::<B>(dw), &want[1], 1e-5, &format!("rms_norm dw {name}"));
        }
    }
    for (m, f) in [(1, 3), (130, 40)] {
        let (x, dy) = (random(4, m * 2 * f), random(5, m * f));
        let tensor = || floats::<B>(x.clone(), &[m, 2 * f]);
        let d = || floats::<B>(dy.clone(), &[m, f]);
        for activation in GatedActivation::ALL {
            let plain = values::<B>(gated::<B>(tensor(), activation));
            close(&values::<B>(B::gated(tensor(), activation)), &plain, 1e-6, "gated");
            let inputs = [(x.clone(), vec![m, 2 * f])];
            let want = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
                gated::<Autodiff<B>>(v.remove(0), activation)
            });
            let whole = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
                Autodiff::<B>::gated(v.remove(0), activation)
            });
            for (name, dx) in [
                ("fast", values::<B>(B::gated_backward(tensor(), d(), activation))),
                ("default", values::<B>(gated_backward::<B>(tensor(), d(), activation))),
                ("autodiff", whole[0].clone()),
            ] {
                close(&dx, &want[0], 1e-5, &format!("{activation:?} {name}"));
            }
        }
    }
    for (m, n) in [(1, 2), (130, 75)] {
        let (x, d) = (random(6, m * n), random(7, m));
        let ids: Vec<i32> = numbers(8, m, n as u32).map(|v| v as i32).collect();
        let targets = || B::int_from_data(TensorData::new(ids.clone(), [m]), &Default::default());
        let logits = || floats::<B>(x.clone(), &[m, n]);
        let fast = values::<B>(B::cross_entropy(logits(), targets()));
        close(&fast, &values::<B>(cross_entropy::<B>(logits(), targets())), 1e-6, "cross_entropy");
        for (row, (&got, &target)) in fast.iter().zip(&ids).enumerate() {
            let row = &x[row * n..][..n];
            let total: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
            let want = total.ln() - f64::from(row[target as usize]);
            assert!((f64::from(got) - want).abs() < 1e-5 * want.max(1.0), "{got} {want}");
        }
        let inputs = [(x.clone(), vec![m, n])];
        let want = differentiated::<Autodiff<B>>(&inputs, &d, |mut v| {
            cross_entropy::<Autodiff<B>>(v.remove(0), targets())
        });
        let whole = differentiated::<Autodiff<B>>(&inputs, &d, |mut v| {
            Autodiff::<B>::cross_entropy(v.remove(0), targets())
        });
        let d = || floats::<B>(d.clone(), &[m]);
        for (name, dx) in [
            ("fast", values::<B>(B::cross_entropy_backward(logits(), targets(), d()))),
            ("default", values::<B>(cross_entropy_backward::<B>(logits(), targets(), d()))),
            ("autodiff", whole[0].clone()),
        ] {
            close(&dx, &want[0], 1e-5, &format!("cross_entropy {name}"));
        }
    }
    for (sequences, length, n_heads, n_kv_heads, head_dim, window) in [
        (1, 1, 1, 1, 2, None),
        (2, 5, 2, 1, 8, None),
        (3, 70, 6, 2, 16, None),
        (1, 129, 2, 2, 4, None),
        (2, 5, 2, 1, 8, Some(1)),
        (2, 70, 4, 2, 16, Some(9)),
        (1, 129, 2, 2, 4, Some(100)),
    ] {
        let args = SelfAttentionArgs { n_heads, n_kv_heads, head_dim, length, window };
        let (m, width) = (sequences * length, (n_heads + 2 * n_kv_heads) * head_dim);
        let (x, dy) = (random(9, m * width), random(10, m * n_heads * head_dim));
        let angles: Vec<f32> =
            (0..length * head_dim / 2).map(|i| (i % (head_dim / 2) + 1) as f32 * 0.1 * i as f32).collect();
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let shape = [length, head_dim / 2];
        let of = |v: &[f32]| floats::<B>(v.to_vec(), &shape);
        let lifted = |v: &[f32]| floats::<Autodiff<B>>(v.to_vec(), &shape);
        let qkv = || floats::<B>(x.clone(), &[m, width]);
        let d = || floats::<B>(dy.clone(), &[m, n_heads * head_dim]);
        let plain = values::<B>(self_attention::<B>(qkv(), of(&cos), of(&sin), &args));
        let fast = values::<B>(B::self_attention(qkv(), of(&cos), of(&sin), args));
        close(&fast, &plain, 2e-6, &format!("{args:?}"));
        let naive = naive_self_attention(&x, &cos, &sin, &args);
        close(&plain, &naive, 2e-6, &format!("{args:?}"));
        let inputs = [(x.clone(), vec![m, width])];
        let want = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
            self_attention::<Autodiff<B>>(v.remove(0), lifted(&cos), lifted(&sin), &args)
        });
        let whole = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
            Autodiff::<B>::self_attention(v.remove(0), lifted(&cos), lifted(&sin), args)
        });
        for (name, dx) in [
            ("fast", values::<B>(B::self_attention_backward(qkv(), of(&cos), of(&sin), d(), args))),
            ("default", values::<B>(self_attention_backward::<B>(qkv(), of(&cos), of(&sin), d(), &args))),
            ("autodiff", whole[0].clone()),
        ] {
            close(&dx, &want[0], 1e-5, &format!("{args:?} {name}"));
        }
    }
}

/// Both bodies of the quantisers against their definitions, in f64 where they add.
fn quantisers_are_the_same<B: TernaryBackend>() {
    for (m, k) in [(1, 1), (3, 40), (70, 33), (5, 256), (2, 1000)] {
        let mut plain = random(11, m * k);
        // Runs of other sizes, of zeros, and of values below the smallest scale.
        plain.chunks_mut(32).enumerate().for_each(|(i, x)| match i % 5 {
            0 => x.iter_mut().for_each(|x| *x *= 50.0),
            1 => x.fill(0.0),
            2 => x.iter_mut().for_each(|x| *x *= 1e-6),
            _ => {}
        });
        let x = || floats::<B>(plain.clone(), &[m, k]);
        for group in [0, 32, 64, 96, 128] {
            let what = format!("fake_quantise [{m}, {k}] by {group}");
            let of_group = |x: &[f32]| {
                let mut q = vec![0; x.len()];
                let (scale, _) = quant::absmax_row(x, &mut q);
                q.into_iter().map(move |q| f32::from(q) * scale).collect::<Vec<_>>()
            };
            let length = if group == 0 { k } else { group };
            let want: Vec<f32> =
                plain.chunks(k).flat_map(|row| row.chunks(length).flat_map(of_group)).collect();
            assert_eq!(values::<B>(B::fake_quantise(x(), group)), want, "{what}");
            close(&values::<B>(fake_quantise::<B>(x(), group)), &want, 1e-6, &what);
        }
        for scale in [WeightScale::Tensor, WeightScale::Row, WeightScale::Group(32), WeightScale::Group(256)]
        {
            let group = scale.group();
            if group > 0 && k % group > 0 {
                continue;
            }
            let what = format!("ternarise [{m}, {k}] by {scale}");
            let fast = values::<B>(B::ternarise(x(), scale));
            let default = values::<B>(ternarise::<B>(x(), scale));
            let run = scale.run(m, k);
            for (i, w) in plain.chunks(run).enumerate() {
                let mean = w.iter().map(|&w| f64::from(w).abs()).sum::<f64>() / w.len() as f64;
                let s = mean.max(f64::from(quant::EPSILON));
                for (j, &w) in w.iter().enumerate() {
                    let want = (f64::from(w) / s).round_ties_even().clamp(-1.0, 1.0) * s;
                    for got in [fast[i * run + j], default[i * run + j]] {
                        let error = (f64::from(got) - want).abs();
                        assert!(error <= 1e-6 * s, "{what}: {got} and {want} at {i}, {j}");
                    }
                }
            }
        }
    }
}

fn delta_net_is_the_same<B: TernaryBackend>() {
    for (key_heads, value_heads, key_dim, value_dim, taps, tiled) in
        [(1, 1, 1, 1, 2, false), (2, 4, 8, 20, 4, false), (2, 6, 16, 4, 3, true)]
    {
        let shape = DeltaNetShape { key_heads, value_heads, key_dim, value_dim, taps, tiled };
        let args = DeltaNetArgs { shape, eps: 1e-6 };
        let (m, channels, width) = (7, shape.channels(), shape.width());
        let rows = || floats::<B>(random(1, m * width), &[m, width]);
        let weights = || DeltaNetWeights {
            convolution: floats::<B>(random(2, taps * channels), &[taps, channels]),
            decay: floats::<B>(random(3, value_heads).iter().map(|v| -v.abs()).collect(), &[value_heads]),
            time_bias: floats::<B>(random(4, value_heads), &[value_heads]),
            norm: floats::<B>(random(5, value_dim), &[value_dim]),
        };
        let state = || DeltaNetTensors {
            inputs: floats::<B>(random(6, (taps - 1) * channels), &[taps - 1, channels]),
            memory: floats::<B>(
                random(7, value_heads * key_dim * value_dim),
                &[value_heads, key_dim, value_dim],
            ),
        };
        let fast = B::delta_net(rows(), weights(), state(), args);
        let plain = delta_net::<B>(rows(), weights(), state(), &args);
        let what = format!("{args:?}");
        close(&values::<B>(fast.context), &values::<B>(plain.context), 2e-5, &what);
        close(&values::<B>(fast.state.memory), &values::<B>(plain.state.memory), 1e-5, &what);
        assert_eq!(values::<B>(fast.state.inputs), values::<B>(plain.state.inputs), "{what}");
    }
}

fn int8_activations_are_the_same<B: TernaryBackend>() {
    for format in DenseArgs::INT8_FORMATS {
        for (n, blocks, m) in [(5, 1, 1), (19, 3, 2), (33, 8, 5)] {
            let k = blocks * format.block_len();
            let row_bytes = format.row_bytes(k).expect("whole blocks");
            let small = |v: u32| v as f32 / 1000.0 - 1.0;
            let weights: Vec<f32> = numbers(5, n * k, 2001).map(small).collect();
            let mut bytes = vec![0; (n * row_bytes).next_multiple_of(4)];
            let mut decoded = vec![0.0; n * k];
            let rows = weights.chunks_exact(k).zip(bytes.chunks_exact_mut(row_bytes));
            for ((values, row), decoded) in rows.zip(decoded.chunks_exact_mut(k)) {
                format.encode_row(values, row).expect("small values");
                format.decode_row(row, decoded).expect("a whole row");
            }
            let args = DenseArgs::new(format, n, k).with_int8().expect("one of the formats that can");
            let tiled = DenseArgs { tiled: true, ..args };
            let mut tiles = vec![0; tiled.bytes().expect("whole blocks").next_multiple_of(4)];
            let (rows, out) = (&bytes[..n * row_bytes], &mut tiles[..tiled.bytes().expect("whole blocks")]);
            tile((format, rows), (n, k), (format, out)).expect("whole blocks");
            let words = |bytes: &[u8]| {
                let words: Vec<u32> =
                    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                let count = words.len();
                B::int_from_data(TensorData::new(words, [1, count]), &Default::default())
            };
            let x: Vec<f32> = numbers(m as u32, m * k, 2001).map(small).collect();
            let input = || floats::<B>(x.clone(), &[m, k]);
            let results = [
                values::<B>(B::dense_linear(input(), words(&tiles), tiled)),
                values::<B>(B::dense_linear(input(), words(&bytes), args)),
                values::<B>(dense_linear::<B>(input(), words(&tiles), &tiled)),
                values::<B>(dense_linear::<B>(input(), words(&bytes), &args)),
            ];
            assert_eq!(results[1..], [&results[1]; 3].map(Vec::clone), "tiles are the same weights");
            // The gradient for the input: dy * W.
            let dy: Vec<f32> = numbers(9, m * n, 2001).map(small).collect();
            let mut dx = vec![0f32; m * k];
            for (dy, dx) in dy.chunks_exact(n).zip(dx.chunks_exact_mut(k)) {
                for (dy, w) in dy.iter().zip(decoded.chunks_exact(k)) {
                    dx.iter_mut().zip(w).for_each(|(dx, w)| *dx += dy * w);
                }
            }
            let dy = || floats::<B>(dy.clone(), &[m, n]);
            for (words, args) in [(words(&tiles), tiled), (words(&bytes), args)] {
                let fast = values::<B>(B::dense_linear_backward(dy(), words.clone(), args));
                close(&fast, &dx, 1e-5, "dense backward");
                let default = values::<B>(dense_linear_backward::<B>(dy(), words, &args));
                close(&default, &dx, 1e-5, "dense backward by default");
            }
            for (row, x) in x.chunks_exact(k).enumerate() {
                let mut q = vec![0; k];
                let (scale, _) = quant::absmax_row(x, &mut q);
                for (column, w) in decoded.chunks_exact(k).enumerate() {
                    let terms =
                        || w.iter().zip(&q).map(|(&w, &q)| f64::from(w) * f64::from(q) * f64::from(scale));
                    let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    for got in results.iter().map(|y| y[row * n + column]) {
                        let error = (f64::from(got) - want).abs();
                        assert!(
                            error <= 1e-5 * size,
                            "{}, [{m}, {k}] x {n}: {got} and {want}",
                            format.name()
                        );
                    }
                }
            }
        }
    }
}

/// 62.5 steps are 62 (half to even), and 127 * (1 / a) instead of 127 / a would miss such ties.
fn ties_are_rounded_to_even<B: TernaryBackend>() {
    for a in [127.0f32, 3.0, 0.7, 1.1, 41.0] {
        let x: Vec<f32> = (0..64).map(|i| a * (i as f32 + 0.5) / 127.0).chain([-a]).collect();
        let mut q = vec![0i8; 65];
        let (scale, _) = quant::absmax_row(&x, &mut q);
        let (codes, one) = (vec![1i8; 65], 1.0);
        let mut bytes = vec![0; bitnet_burn_plugin::canonical::row_bytes(65)];
        bitnet_burn_plugin::canonical::pack_row(&codes, &mut bytes);
        let words: Vec<u32> =
            bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let codes = B::int_from_data(TensorData::new(words, [1, 8]), &Default::default());
        let weights = WeightGroup::One(TernaryWeight { codes, scale: floats::<B>(vec![one], &[1]) });
        let args = BitLinearArgs {
            k: 65,
            matrices: vec![Matrix { n: 1, scales: ScaleKind::One, choice: None }],
            eps: 0.0,
            quantise: true,
        };
        let got = values::<B>(bit_linear::<B>(floats::<B>(x, &[1, 65]), InputNorm::None, weights, &args))[0];
        let want = q.iter().map(|&q| i32::from(q)).sum::<i32>() as f32 * scale;
        assert!((got - want).abs() <= want.abs() * 1e-6, "a = {a}: {got} and {want}");
    }
}

#[cfg(feature = "flex")]
#[test]
fn flex() {
    bit_linear_is_the_same::<burn::backend::Flex>();
    int8_activations_are_the_same::<burn::backend::Flex>();
    delta_net_is_the_same::<burn::backend::Flex>();
    ties_are_rounded_to_even::<burn::backend::Flex>();
    training_is_the_same::<burn::backend::Flex>();
    quantisers_are_the_same::<burn::backend::Flex>();
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray() {
    bit_linear_is_the_same::<burn::backend::NdArray>();
    int8_activations_are_the_same::<burn::backend::NdArray>();
    delta_net_is_the_same::<burn::backend::NdArray>();
    ties_are_rounded_to_even::<burn::backend::NdArray>();
    training_is_the_same::<burn::backend::NdArray>();
    quantisers_are_the_same::<burn::backend::NdArray>();
}
