//! The default bodies, in plain Burn operations, against the fast ones; and `BitLinear` in its two states.
//!
//! A backend under autodiff has default bodies for everything but the packed linear layer, so the same
//! memory computes both. (The packed layer's default body is compared in `bitnet-burn-backends`.)

use bitnet_burn::backends::manager::manager;
use bitnet_burn::backends::ops::{self, CacheLayer, TernaryMatrix};
use bitnet_burn::backends::{AttentionArgs, CacheType, DenseArgs, GatedActivation, MatrixKernels};
use bitnet_burn::{BitLinear, BitLinearConfig, BitLinearWeight, RotaryEncodingConfig};
use bitnet_burn_formats::quant;
use bitnet_burn_formats::{DenseFormat, canonical};
use bitnet_burn_manager::memory::PageArena;
use bitnet_burn_tests::*;
use burn::tensor::{Device, Tensor};

fn empty(cache_type: CacheType, shape: [usize; 3], device: &Device) -> CacheLayer {
    CacheLayer::zeros(cache_type, shape, device, &PageArena::default())
}

/// The types of caches that all devices have (NdArray has no f16).
fn common_cache_types() -> impl Iterator<Item = CacheType> {
    let all = [CacheType::F32, CacheType::F16, CacheType::Int8];
    all.into_iter().filter(|&t| host_devices().iter().all(|device| CacheLayer::supported(t, 16, device)))
}

/// An operation on every device, with the fast and with the default body: all within `tolerance` of each
/// other, relative to the largest value. (On a worker with those that go over the wire: Burn's server lacks some of the
/// operations that default bodies are made of.)
fn agree<const D: usize>(what: &str, tolerance: f32, f: &dyn Fn(&Device) -> Tensor<D>) {
    let mut first: Option<Vec<f32>> = None;
    for device in devices().into_iter().chain(host_devices().into_iter().map(Device::autodiff)) {
        let got = values(f(&device));
        let want = first.get_or_insert_with(|| got.clone());
        let largest = want.iter().fold(0f32, |a, v| a.max(v.abs()));
        let difference = max_difference(&got, want);
        assert!(difference <= tolerance * largest, "{what} on {device:?}: {difference:e} of {largest:e}");
    }
}

#[test]
fn rms_norm_rope_and_gated_activations_agree() {
    let mut random = Random(1);
    for (m, k) in [(1, 64), (5, 256), (33, 100)] {
        let (x, w) = (random.floats(m * k), random.floats(k));
        agree("rms_norm", 1e-6, &|device| {
            ops::rms_norm(tensor(&x, [m, k], device), tensor(&w, [k], device), 1e-5)
        });
    }
    for (m, heads, d) in [(1, 1, 2), (7, 3, 32), (20, 4, 128)] {
        let x = random.floats(m * heads * d);
        let positions: Vec<usize> = (0..m).map(|i| 3 * i + 5).collect();
        let rotary = RotaryEncodingConfig::new(d).with_theta(500_000.0).init();
        agree("rope", 1e-6, &|device| {
            rotary.apply(
                tensor(&x, [m, heads * d], device),
                &rotary.angles(&positions, positions.len(), device),
            )
        });
    }
    for (m, f) in [(1, 8), (9, 123)] {
        let x: Vec<f32> = random.floats(m * 2 * f).iter().map(|v| v * 8.0).collect();
        for activation in GatedActivation::ALL {
            agree("gated", 1e-6, &|device| ops::gated(tensor(&x, [m, 2 * f], device), activation));
        }
    }
}

#[test]
fn attention_over_a_cache_agrees() {
    let mut random = Random(2);
    for (m, position, n_heads, n_kv_heads, head_dim, window) in [
        (1, 0, 1, 1, 16, None),
        (6, 0, 4, 2, 64, None),
        (1, 37, 4, 2, 64, None),
        (13, 20, 6, 1, 32, None),
        (3, 5, 4, 4, 24, None),
        (1, 37, 4, 2, 64, Some(8)),
        (13, 20, 6, 1, 32, Some(1)),
        (40, 30, 2, 1, 16, Some(17)),
        (6, 5, 4, 4, 24, Some(100)),
    ] {
        let length = position + m;
        let q = random.floats(m * n_heads * head_dim);
        let [old_k, old_v] = [(); 2].map(|()| random.floats(position.max(1) * n_kv_heads * head_dim));
        let [k, v] = [(); 2].map(|()| random.floats(m * n_kv_heads * head_dim));
        let args = AttentionArgs { n_heads, n_kv_heads, head_dim, position, window };
        for cache_type in common_cache_types() {
            agree(&format!("attention {args:?} {cache_type:?}"), 2e-6, &|device| {
                let width = n_kv_heads * head_dim;
                let cache = |old: &[f32], new: &[f32]| {
                    let mut cache = empty(cache_type, [n_kv_heads, length + 9, head_dim], device);
                    if position > 0 {
                        cache = ops::cache_append(cache, tensor(old, [position, width], device), 0);
                    }
                    ops::cache_append(cache, tensor(new, [m, width], device), position)
                };
                let (keys, rows) = (cache(&old_k, &k), tensor(&q, [m, n_heads * head_dim], device));
                ops::attention(rows, keys, cache(&old_v, &v), args)
            });
        }
    }
}

#[test]
fn a_cache_holds_the_same_whichever_body_wrote_it() {
    let rows = Random(3).floats(4 * 6);
    for cache_type in common_cache_types() {
        let written = |device: &Device| {
            let cache = empty(cache_type, [2, 9, 3], device);
            let cache = ops::cache_append(cache, tensor(&rows[..6], [1, 6], device), 8);
            ops::cache_append(cache, tensor(&rows[6..], [3, 6], device), 2)
        };
        // The codes of an int8 cache are whole numbers, and its scales are those of the other body.
        agree(&format!("cache_append {cache_type:?}"), 0.0, &|device| match written(device) {
            CacheLayer::Float(cache) => cache,
            CacheLayer::Int8 { codes, .. } => {
                let codes: Vec<f32> = codes.into_data().iter::<f32>().collect();
                tensor(&codes, [2, 9, 3], device)
            }
        });
        agree(&format!("scales {cache_type:?}"), 1e-7, &|device| match written(device) {
            CacheLayer::Float(cache) => cache.reshape([2, 27]),
            CacheLayer::Int8 { scale, .. } => scale,
        });
    }
}

#[test]
fn every_dense_format_decodes_the_same() {
    let mut random = Random(4);
    for format in DenseFormat::ALL {
        // Whole blocks; with rows that are whole words, and (34 and 18 bytes, 3 x 2 bytes) that are not.
        let shapes: &[(usize, usize)] = match format.block_len() {
            256 => &[(3, 256), (8, 512)],
            128 => &[(3, 128), (8, 384)],
            64 => &[(3, 64), (7, 192)],
            32 => &[(3, 32), (7, 96), (8, 256)],
            _ => &[(5, 3), (8, 256)],
        };
        for &(n, k) in shapes {
            let rows = random.floats(n * k);
            let mut bytes = vec![0; n * format.row_bytes(k).unwrap()];
            for (row, out) in rows.chunks_exact(k).zip(bytes.chunks_exact_mut(format.row_bytes(k).unwrap())) {
                format.encode_row(row, out).unwrap();
            }
            let mut want = vec![0.0; n * k];
            for (row, out) in bytes.chunks_exact(format.row_bytes(k).unwrap()).zip(want.chunks_exact_mut(k)) {
                format.decode_row(row, out).unwrap();
            }
            let args = DenseArgs::new(format, n, k);
            let words =
                |device: &Device| ops::words(bytes.clone().into(), [1, bytes.len().div_ceil(4)], device);
            let ids: Vec<u32> = vec![n as u32 - 1, 0, 1, 1];
            let gathered: Vec<f32> =
                ids.iter().flat_map(|&id| &want[id as usize * k..][..k]).copied().collect();
            for fast in host_devices() {
                for device in [fast.clone(), fast.autodiff()] {
                    let got = values(ops::dense_rows(words(&device), &ids, args));
                    assert_same_bits(&got, &gathered, &format!("{args:?} on {device:?}"));
                }
            }
            let x = random.floats(3 * k);
            agree(&format!("{args:?}"), 2e-6, &|device| {
                ops::dense_linear(tensor(&x, [3, k], device), words(device), args)
            });
        }
    }
}

/// Codes and scale of a packed layer, whatever its packing.
fn codes_of(layer: &BitLinear) -> (Vec<i8>, f32) {
    let TernaryMatrix { codes, scale, n, k, choice, .. } = layer.matrix().expect("packed");
    let words: Vec<u32> = codes.into_data().try_to_vec().unwrap();
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    if let Some(MatrixKernels::Host(choice)) = choice {
        bytes.truncate(choice.weight_bytes());
        bytes = manager().unpack(&choice, &bytes).unwrap();
    }
    let mut weights = vec![0; n * k];
    for (row, out) in bytes.chunks_exact(canonical::row_bytes(k)).zip(weights.chunks_exact_mut(k)) {
        canonical::unpack_row(row, out);
    }
    (weights, values(scale)[0])
}

#[test]
fn packing_keeps_the_codes_and_the_outputs_of_the_training_state() {
    // K no multiple of 128, nor of anything.
    for (k, n) in [(784, 100), (256, 64), (37, 5), (130, 1)] {
        for device in devices() {
            for (bias, norm) in [(false, false), (true, true)] {
                let layer = BitLinearConfig::new(k, n).with_bias(bias).with_norm(norm).init(&device);
                let BitLinearWeight::Latent(latent) = &layer.weight else { panic!("training") };
                let latent = values(latent.val());
                let x = tensor(&Random(k as u64).floats(2 * 3 * k), [2, 3, k], &device);
                let want = values(layer.forward(x.clone()));
                let packed = layer.pack().unwrap();
                let got = packed.forward(x);
                assert_eq!(got.dims(), [2, 3, n]);
                let largest = want.iter().fold(0f32, |a, v| a.max(v.abs()));
                let difference = max_difference(&values(got), &want);
                assert!(
                    difference <= 1e-5 * largest,
                    "[{n}, {k}] on {device:?}: {difference:e} of {largest:e}"
                );

                let (codes, scale) = codes_of(&packed);
                let want = quant::absmean_quantise(&latent, scale);
                assert!(codes == want, "codes of [{n}, {k}]");
                // A backend's mean may differ from the host's in the last bits.
                let relative = (scale / quant::absmean_scale(&latent) - 1.0).abs();
                assert!(relative < 1e-6, "scale of [{n}, {k}]: {relative:e}");
                // Packing twice changes nothing.
                assert_eq!(codes_of(&packed.pack().unwrap()), (codes, scale));
            }
        }
    }
}

#[test]
fn the_packed_layers_gradient_is_dy_times_its_weights() {
    for device in devices() {
        for (k, n, m) in [(784, 100, 3), (128, 32, 1)] {
            let layer = BitLinearConfig::new(k, n).init(&device.clone().autodiff()).pack().unwrap();
            let (codes, scale) = codes_of(&layer);
            let mut random = Random(9);
            let (x, dy) = (random.floats(m * k), random.floats(m * n));
            let x = tensor(&x, [m, k], &device.clone().autodiff()).require_grad();
            let y = layer.forward(x.clone());
            let loss = (y * tensor(&dy, [m, n], &device.clone().autodiff())).sum();
            let gradients = loss.backward();
            let got = values(x.grad(&gradients).expect("a gradient for the input"));
            let mut want = vec![0f64; m * k];
            for (row, want) in want.chunks_exact_mut(k).enumerate() {
                for (j, codes) in codes.chunks_exact(k).enumerate() {
                    let d = f64::from(dy[row * n + j]) * f64::from(scale);
                    want.iter_mut().zip(codes).for_each(|(w, &c)| *w += d * f64::from(c));
                }
            }
            let want: Vec<f32> = want.into_iter().map(|v| v as f32).collect();
            let largest = want.iter().fold(0f32, |a, v| a.max(v.abs()));
            let difference = max_difference(&got, &want);
            assert!(difference <= 1e-5 * largest, "{device:?}: {difference:e} of {largest:e}");
        }
    }
}

/// The straight-through estimator: dW = dyᵀ * quantised(x), dx = dy * quantised(W), as if neither had
/// been rounded.
#[test]
fn latent_gradients_pass_the_quantisers_straight_through() {
    let (k, n, m) = (200, 30, 4);
    for device in host_devices() {
        let device = device.autodiff();
        let layer = BitLinearConfig::new(k, n).init(&device);
        let BitLinearWeight::Latent(latent) = &layer.weight else { panic!("training") };
        let latent_values = values(latent.val());
        let mut random = Random(10);
        let (x, dy) = (random.floats(m * k), random.floats(m * n));
        let input = tensor(&x, [m, k], &device).require_grad();
        let loss = (layer.forward(input.clone()) * tensor(&dy, [m, n], &device)).sum();
        let gradients = loss.backward();

        let (codes, scale) = codes_of(&layer.clone().pack().unwrap());
        let mut quantised = Vec::new();
        for row in x.chunks_exact(k) {
            let mut q = vec![0; k];
            let (a, _) = quant::absmax_row(row, &mut q);
            quantised.extend(q.iter().map(|&q| f64::from(q) * f64::from(a)));
        }
        let (mut dw, mut dx) = (vec![0f64; n * k], vec![0f64; m * k]);
        for row in 0..m {
            for j in 0..n {
                let d = f64::from(dy[row * n + j]);
                for i in 0..k {
                    dw[j * k + i] += d * quantised[row * k + i];
                    dx[row * k + i] += d * f64::from(codes[j * k + i]) * f64::from(scale);
                }
            }
        }
        for (what, got, want) in [
            ("dW", values(latent.val().grad(&gradients).expect("a gradient for the weights")), dw),
            ("dx", values(input.grad(&gradients).expect("a gradient for the input")), dx),
        ] {
            let want: Vec<f32> = want.into_iter().map(|v| v as f32).collect();
            let largest = want.iter().fold(0f32, |a, v| a.max(v.abs()));
            let difference = max_difference(&got, &want);
            assert!(difference <= 1e-5 * largest, "{what} on {device:?}: {difference:e} of {largest:e}");
        }
        assert_eq!(latent_values, values(latent.val()), "the latent weights are what they were");
    }
}
