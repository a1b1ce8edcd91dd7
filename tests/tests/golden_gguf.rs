//! GGUF files: against an independent float64 forward pass and another engine's logits, in every tensor
//! type, and both activations.

use std::path::{Path, PathBuf};

use bitnet_burn::CacheType;
use bitnet_burn::{DecoderOptions, GatedActivation, ModelConfig};
use bitnet_burn::{Norm, Projection};
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::gguf::{norm_name, projection_name, write_config};
use bitnet_burn_engine::load::{ActivationRule, LoadOptions};
use bitnet_burn_formats::gguf::{GgufWriter, TensorType};
use bitnet_burn_formats::{DenseFormat, tq1_0, tq2_0};
use bitnet_burn_formats::{DenseTensor, TernaryTensor};
use bitnet_burn_tests::reference::{Layer, Linear, Mutation, Reference};
use bitnet_burn_tests::*;
use burn::tensor::Device;
use half::{bf16, f16};

const TOLERANCE: f32 = 1e-3;

fn golden(name: &str) -> PathBuf {
    repository_golden().join("gguf").join(name)
}

fn i2_s() -> PathBuf {
    golden("tiny_a-i2_s.gguf")
}

/// tiny_a as I2_S, and with F32 projections where the large goldens are.
fn tiny_a(temporary: &Path) -> Vec<PathBuf> {
    let mut files = vec![i2_s()];
    if let Some(dir) = golden_dir("tiny_a with F32 projections") {
        let packed = std::fs::File::open(dir.join("gguf/tiny_a-f32.gguf.xz")).unwrap();
        let mut unpacked = Vec::new();
        lzma_rs::xz_decompress(&mut std::io::BufReader::new(packed), &mut unpacked).unwrap();
        let path = temporary.join("tiny_a-f32.gguf");
        std::fs::write(&path, unpacked).unwrap();
        files.push(path);
    }
    files
}

fn tokens(n: usize) -> Vec<u32> {
    read_tokens(&golden(&format!("tiny_a-tokens{n}.txt")))
}

fn logits(path: &Path, device: &Device, ids: &[u32], quantise: bool, cache_type: CacheType) -> Vec<f32> {
    let activations = if quantise { ActivationRule::Model } else { ActivationRule::Float };
    let options = LoadOptions { activations, ..LoadOptions::default() };
    all_logits(&load(path, device, &options), ids, 256, cache_type)
}

fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let error: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
    (error / b.iter().map(|&b| square(f64::from(b))).sum::<f64>()).sqrt()
}

#[test]
fn the_oracle_agrees_with_numpy() {
    for n in [16, 37] {
        let reference = Reference::from_gguf(&i2_s());
        for (mutation, golden_name) in
            [(Mutation::None, "ref_int8"), (Mutation::NoActivationQuantisation, "ref_none")]
        {
            let want = read_npy(&golden(&format!("tiny_a-{golden_name}-{n}.npy")));
            let forward = reference.forward(&tokens(n), mutation);
            let difference = max_difference(&forward.logits.values, &want.values);
            assert!(difference < 1e-5, "{golden_name}-{n}: {difference:e}");
        }
    }
}

#[test]
fn logits_are_those_of_the_int8_reference() {
    let temporary = tempfile::tempdir().unwrap();
    for path in tiny_a(temporary.path()) {
        for (device, n) in host_devices().into_iter().flat_map(|device| [(device.clone(), 16), (device, 37)])
        {
            let want = read_npy(&golden(&format!("tiny_a-ref_int8-{n}.npy")));
            let got = logits(&path, &device, &tokens(n), true, CacheType::F32);
            let certain = Reference::from_gguf(&i2_s()).forward(&tokens(n), Mutation::None).certain();
            let vocabulary = want.shape[1];
            let difference =
                max_difference(&got[..certain * vocabulary], &want.values[..certain * vocabulary]);
            let all = max_difference(&got, &want.values);
            println!("{} {n}: {difference:.1e} over {certain} positions, {all:.1e} over all", name_of(&path));
            // In practice nothing flips; where something did, logits would move by 0.1 to 0.5.
            assert!(
                difference < TOLERANCE && all < TOLERANCE,
                "{} {n}: {difference:e}, {all:e}",
                name_of(&path)
            );
            if n == 16 {
                for (position, row) in got.chunks_exact(vocabulary).enumerate() {
                    assert_eq!(
                        argmax(row),
                        argmax(want.row(position)),
                        "{} position {position}",
                        name_of(&path)
                    );
                }
            }
        }
    }
}

#[test]
fn without_activation_quantisation_logits_are_those_of_float_engines() {
    let temporary = tempfile::tempdir().unwrap();
    for path in tiny_a(temporary.path()) {
        for n in [16, 37] {
            let got = logits(&path, &Device::flex(), &tokens(n), false, CacheType::F32);
            let want = read_npy(&golden(&format!("tiny_a-ref_none-{n}.npy")));
            let difference = max_difference(&got, &want.values);
            assert!(difference < 1e-4, "{} ref_none-{n}: {difference:e}", name_of(&path));
            let want = read_npy(&golden(&format!("tiny_a-ik_f32-{n}.npy")));
            let (difference, rms) = (max_difference(&got, &want.values), relative_rms(&got, &want.values));
            println!("{} ik_f32-{n}: {difference:.1e}, relative rms {rms:.1e}", name_of(&path));
            assert!(difference < 2e-2 && rms < 1e-3, "{} ik_f32-{n}: {difference:e} {rms:e}", name_of(&path));
            // The other engine keeps keys and values as f16 too: at least as close, and as close to float64
            // as 11 bits of mantissa allow.
            let half = logits(&path, &Device::flex(), &tokens(n), false, CacheType::F16);
            assert!(max_difference(&half, &want.values) < 2e-2, "{} f16 ik_f32-{n}", name_of(&path));
            assert!(max_difference(&half, &got) < 2e-2, "{} f16-{n}", name_of(&path));
        }
    }
}

/// f16 keys and values are noise of 2^-11 in front of int8 roundings, of which some then flip: 2.3 %
/// relative rms is what 1e-5 of noise on the embedding costs, and 5 % is the tolerance.
#[test]
fn an_f16_cache_costs_no_more_than_rounding_flips() {
    for n in [16, 37] {
        let got = logits(&i2_s(), &Device::flex(), &tokens(n), true, CacheType::F16);
        let want = read_npy(&golden(&format!("tiny_a-ref_int8-{n}.npy")));
        let (difference, rms) = (max_difference(&got, &want.values), relative_rms(&got, &want.values));
        println!("f16 {n}: {difference:.1e}, relative rms {rms:.1e}");
        assert!(difference < 1.0 && rms < 5e-2, "{n}: {difference:e} {rms:e}");
    }
}

/// A model of architecture `bitnet` with random weights, as the oracle and as tensors.
fn older_bitnet(seed: u64) -> (ModelConfig, Reference, Vec<(String, TernaryTensor)>) {
    let mut random = Random(seed);
    let config = ModelConfig {
        architecture: "bitnet".into(),
        name: None,
        hidden_size: 128,
        intermediate_size: 256,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 4,
        head_dim: 32,
        vocab_size: 64,
        context_length: 64,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        activation: GatedActivation::Silu,
        sub_norms: true,
        tied_embeddings: true,
        bos_token: None,
        eos_tokens: vec![],
        options: DecoderOptions::default(),
    };
    let mut tensors = Vec::new();
    let layers = (0..config.n_layers).map(|layer| {
        let linears = Projection::ALL.map(|which| {
            let (n, k) = which.shape(&config);
            let (codes, scale) = (random.ternary(n * k), 0.05 + 0.1 * random.float().abs());
            let name = projection_name(layer, which);
            let bytes = bytes::Bytes::from(canonical_rows(&codes, k));
            tensors
                .push((name.clone(), TernaryTensor { name, n, k, scale, codes: bytes, stored_as: "I2_S" }));
            let codes = codes.into_iter().map(f64::from).collect();
            Linear { codes, scale: f64::from(scale), k, uncertain: vec![] }
        });
        let mut norm = |n: usize| (0..n).map(|_| f64::from(1.0 + 0.3 * random.float())).collect();
        Layer { norms: [norm(128), norm(128), norm(128), norm(256)], linears }
    });
    let layers = layers.collect();
    let mut wide = |n: usize| random.floats(n).into_iter().map(f64::from).collect::<Vec<_>>();
    let reference = Reference {
        heads: 4,
        kv_heads: 4,
        eps: f64::from(1e-5f32),
        theta: 10_000.0,
        silu: true,
        embedding: wide(64 * 128),
        head: None,
        norm: wide(128),
        layers,
    };
    (config, reference, tensors)
}

fn floats(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

#[test]
fn architecture_bitnet_is_silu() {
    let temporary = tempfile::tempdir().unwrap();
    let (config, reference, tensors) = older_bitnet(7);
    let mut random = Random(11);
    // Prompts that keep clear of rounding boundaries, so that all positions can be compared.
    let (ids, forward) = (0..1000)
        .map(|_| {
            let ids: Vec<u32> = (0..12).map(|_| random.below(64) as u32).collect();
            let forward = reference.forward(&ids, Mutation::None);
            (ids, forward)
        })
        .find(|(ids, forward)| forward.certain() == ids.len())
        .expect("one of many prompts is clear of boundaries");
    let float = reference.forward(&ids, Mutation::NoActivationQuantisation);
    let squared = Reference { silu: false, ..reference.clone() }.forward(&ids, Mutation::None);
    assert!(max_difference(&squared.logits.values, &forward.logits.values) > 0.1, "the activations differ");

    // With the activation stated by the writer, and without a key, as in the published files.
    for stated in [true, false] {
        let path = temporary.path().join(format!("bitnet-{stated}.gguf"));
        let mut writer = GgufWriter::new();
        if stated {
            write_config(&mut writer, &config).unwrap();
        } else {
            writer.set("general.architecture", "bitnet").unwrap();
            for (key, value) in [
                ("vocab_size", 64),
                ("context_length", 64),
                ("embedding_length", 128),
                ("block_count", 2),
                ("feed_forward_length", 256),
                ("attention.head_count", 4),
                ("attention.head_count_kv", 4),
            ] {
                writer.set(format!("bitnet.{key}"), value as u32).unwrap();
            }
            writer.set("bitnet.attention.layer_norm_rms_epsilon", 1e-5f32).unwrap();
            writer.set("bitnet.rope.freq_base", 10_000f32).unwrap();
        }
        let embedding: Vec<u8> = floats(&reference.embedding).iter().flat_map(|v| v.to_le_bytes()).collect();
        writer
            .tensor("token_embd.weight", &[128, 64], TensorType::Dense(DenseFormat::F32), move |out| {
                out.write_all(&embedding)
            })
            .unwrap();
        writer.vector("output_norm.weight", floats(&reference.norm)).unwrap();
        for (i, layer) in reference.layers.iter().enumerate() {
            for (which, norm) in Norm::of_layer(i, &config).zip(&layer.norms) {
                writer.vector(norm_name(which), floats(norm)).unwrap();
            }
        }
        for (name, tensor) in tensors.clone() {
            writer.i2_s(name, tensor).unwrap();
        }
        writer.write(&path).unwrap();

        let got = logits(&path, &Device::flex(), &ids, true, CacheType::F32);
        let difference = max_difference(&got, &forward.logits.values);
        assert!(difference < TOLERANCE, "stated {stated}: {difference:e}");
        let got = logits(&path, &Device::flex(), &ids, false, CacheType::F32);
        let difference = max_difference(&got, &float.logits.values);
        assert!(difference < 1e-4, "stated {stated}, float activations: {difference:e}");
    }
}

/// tiny_a with every projection in another type, and the embedding in `format`.
fn mixed(path: &Path, format: DenseFormat, mix: bool) -> Vec<f64> {
    let checkpoint = Checkpoint::open(&i2_s(), &OpenOptions::default()).unwrap();
    let config = checkpoint.config();
    let mut writer = GgufWriter::new();
    write_config(&mut writer, config).unwrap();
    let types = [
        TensorType::TQ1_0,
        TensorType::TQ2_0,
        TensorType::Dense(DenseFormat::Q4_0),
        TensorType::Dense(DenseFormat::F16),
        TensorType::Dense(DenseFormat::BF16),
        TensorType::Dense(DenseFormat::F32),
        TensorType::I2_S,
    ];
    for layer in 0..config.n_layers {
        for norm in Norm::of_layer(layer, config) {
            writer.vector(norm_name(norm), checkpoint.norm(norm).unwrap()).unwrap();
        }
        for (i, which) in Projection::ALL.into_iter().enumerate() {
            let mut t = checkpoint.projection(layer, which).unwrap();
            // All types hold a scale of 8 significant bits exactly.
            t.scale = bf16::from_f32(t.scale).to_f32();
            assert_eq!(f16::from_f32(t.scale).to_f32(), t.scale);
            let (name, n, k, scale) = (projection_name(layer, which), t.n, t.k, t.scale);
            let mut codes = vec![0i8; n * k];
            for (row, codes) in t.codes.chunks_exact(k / 4).zip(codes.chunks_exact_mut(k)) {
                bitnet_burn_formats::canonical::unpack_row(row, codes);
            }
            let values = codes.iter().map(|&c| f32::from(c) * scale);
            let tensor_type = if mix { types[(i + layer) % types.len()] } else { TensorType::I2_S };
            let data: Vec<u8> = match tensor_type {
                TensorType::TQ1_0 => tq1_0::from_canonical(&t.codes, n, k, scale).unwrap(),
                TensorType::TQ2_0 => tq2_0::from_canonical(&t.codes, n, k, scale).unwrap(),
                TensorType::Dense(DenseFormat::F16) => {
                    values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect()
                }
                TensorType::Dense(DenseFormat::BF16) => {
                    values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect()
                }
                TensorType::Dense(DenseFormat::F32) => values.flat_map(|v| v.to_le_bytes()).collect(),
                // As ggml's quantiser: the first value of the largest magnitude gets the code 0.
                TensorType::Dense(DenseFormat::Q4_0) => {
                    let values: Vec<f32> = values.collect();
                    let blocks = values.chunks_exact(32).flat_map(|block| {
                        let mut bytes = [0; 18];
                        DenseFormat::Q4_0.encode_row(block, &mut bytes).unwrap();
                        bytes
                    });
                    blocks.collect()
                }
                _ => {
                    writer.i2_s(name, t).unwrap();
                    continue;
                }
            };
            writer.tensor(name, &[k as u64, n as u64], tensor_type, move |out| out.write_all(&data)).unwrap();
        }
    }
    writer.vector("output_norm.weight", checkpoint.norm(Norm::Output).unwrap()).unwrap();

    let DenseTensor { name, n, k, format: stored, data } = checkpoint.embedding().unwrap();
    let mut row = vec![0f32; k];
    let (mut encoded, mut decoded) = (Vec::new(), Vec::new());
    for bytes in data.chunks_exact(stored.row_bytes(k).unwrap()) {
        stored.decode_row(bytes, &mut row).unwrap();
        let mut bytes = vec![0; format.row_bytes(k).unwrap()];
        format.encode_row(&row, &mut bytes).unwrap();
        format.decode_row(&bytes, &mut row).unwrap();
        encoded.extend(bytes);
        decoded.extend(row.iter().map(|&v| f64::from(v)));
    }
    writer.dense("token_embd.weight", DenseTensor { name, n, k, format, data: encoded.into() }).unwrap();
    writer.write(path).unwrap();
    decoded
}

#[test]
fn every_tensor_type_mixed_in_one_file_gives_the_same_logits() {
    let temporary = tempfile::tempdir().unwrap();
    let ids = tokens(37);
    for format in DenseFormat::ALL {
        let (plain, mix) = (temporary.path().join("plain.gguf"), temporary.path().join("mixed.gguf"));
        let decoded = mixed(&plain, format, false);
        mixed(&mix, format, true);
        let types: std::collections::HashSet<_> = Checkpoint::open(&mix, &OpenOptions::default())
            .unwrap()
            .tensors()
            .into_iter()
            .map(|t| t.type_name)
            .collect();
        assert!(types.len() >= 7, "{types:?}");
        // Ternary values are exact in all types: not a bit differs.
        let got = logits(&plain, &Device::flex(), &ids, true, CacheType::F32);
        assert_same_bits(
            &got,
            &logits(&mix, &Device::flex(), &ids, true, CacheType::F32),
            &format!("{format:?}"),
        );

        // The embedding against the oracle on the values that the type holds.
        let mut reference = Reference::from_gguf(&i2_s());
        for layer in &mut reference.layers {
            for linear in &mut layer.linears {
                linear.scale = bf16::from_f64(linear.scale).to_f64();
            }
        }
        reference.embedding = decoded;
        let forward = reference.forward(&ids, Mutation::None);
        let end = forward.certain() * 320;
        let difference = max_difference(&got[..end], &forward.logits.values[..end]);
        let all = max_difference(&got, &forward.logits.values);
        assert!(all < 1.0, "{format:?}: {all:e} beyond position {}", end / 320);
        let float = logits(&mix, &Device::flex(), &ids, false, CacheType::F32);
        let want = reference.forward(&ids, Mutation::NoActivationQuantisation).logits.values;
        let float_difference = max_difference(&float, &want);
        println!("{format:?}: {difference:.1e} over {} positions, float {float_difference:.1e}", end / 320);
        assert!(difference < TOLERANCE, "{format:?}: {difference:e}");
        assert!(float_difference < 1e-4, "{format:?} with float activations: {float_difference:e}");
    }
}
