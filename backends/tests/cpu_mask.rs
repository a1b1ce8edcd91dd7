//! `BITNET_CPU_MASK` takes instruction sets from all SIMD of a process, and no result changes.
//!
//! The mask belongs to the process, so each one gets a process: this test program, asked for one of its tests.

#![cfg(feature = "flex")]

use std::process::Command;

use bitnet_burn_backends::{
    AttentionArgs, BitLinearArgs, CacheTensor, CachedAttention, DenseArgs, GatedActivation, InputNorm,
    Matrix, TernaryBackend, TernaryWeight, WeightGroup,
};
use bitnet_burn_formats::dense_tiles::{tile, tiled_bytes};
use bitnet_burn_formats::{DenseFormat, canonical};
use bitnet_burn_manager::ScaleKind;
use burn::backend::Flex;
use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, TensorData, f16, try_read_sync};

/// Numbers in [-1, 1), the same in every process.
fn numbers(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn floats(values: Vec<f32>, shape: &[usize]) -> FloatTensor<Flex> {
    Flex::float_from_data(TensorData::new(values, shape.to_vec()), &Default::default())
}

fn random(seed: u32, shape: &[usize]) -> FloatTensor<Flex> {
    floats(numbers(seed, shape.iter().product()), shape)
}

fn words(mut bytes: Vec<u8>) -> IntTensor<Flex> {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let words: Vec<u32> = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let shape = [1, words.len()];
    Flex::int_from_data(TensorData::new(words, shape), &Default::default())
}

/// FNV-1a over the bits of the results.
struct Hash(u64);

impl Hash {
    fn add(&mut self, tensor: FloatTensor<Flex>) {
        let data = try_read_sync(Flex::float_into_data(tensor)).expect("host memory").expect("floats");
        assert!(data.iter::<f32>().all(f32::is_finite));
        for byte in data.iter::<f32>().flat_map(|value| value.to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

fn cache(dtype: DType, shape: [usize; 3]) -> CacheTensor<Flex> {
    let count: usize = shape.iter().product();
    let device = &Default::default();
    match dtype {
        DType::I8 => CacheTensor::Int8 {
            codes: Flex::int_from_data(TensorData::new(vec![0i8; count], shape), device),
            scale: floats(vec![0.0; count / shape[2]], &shape[..2]),
        },
        DType::F16 => CacheTensor::Float(Flex::float_from_data(
            TensorData::new(vec![f16::from_f32(0.0); count], shape),
            device,
        )),
        _ => CacheTensor::Float(floats(vec![0.0; count], &shape)),
    }
}

/// Every operation of inference.
fn everything() -> u64 {
    let mut hash = Hash(0xcbf2_9ce4_8422_2325);
    // The first one needs no threads: it has to set the mask all the same.
    hash.add(Flex::rms_norm(random(1, &[3, 300]), random(2, &[300]), 1e-5));
    hash.add(Flex::fake_quantise(random(3, &[40, 1000]), 0));
    hash.add(Flex::gated(random(4, &[5, 2 * 333]), GatedActivation::Silu));

    let (n, k) = (100, 300);
    let codes: Vec<i8> = numbers(5, n * k).iter().map(|v| (v * 1.5).round() as i8).collect();
    let mut rows = vec![0; n * canonical::row_bytes(k)];
    for (row, codes) in rows.chunks_exact_mut(canonical::row_bytes(k)).zip(codes.chunks_exact(k)) {
        canonical::pack_row(codes, row);
    }
    for m in [1, 7] {
        let weight = TernaryWeight { codes: words(rows.clone()), scale: floats(vec![0.3], &[1]) };
        let matrices = vec![Matrix { n, scales: ScaleKind::One, choice: None }];
        let args = BitLinearArgs { k, matrices, eps: 1e-5, quantise: true };
        let norm = InputNorm::Rms(random(6, &[k]));
        hash.add(Flex::bit_linear(random(7, &[m, k]), norm, WeightGroup::One(weight), args));
    }

    let (n, k) = (50, 512);
    for format in DenseFormat::ALL {
        let row = format.row_bytes(k).expect("whole blocks");
        let mut rows = vec![0; n * row];
        for (values, row) in numbers(8, n * k).chunks_exact(k).zip(rows.chunks_exact_mut(row)) {
            format.encode_row(values, row).expect("small values");
        }
        for m in [1, 6] {
            let args = DenseArgs::new(format, n, k);
            hash.add(Flex::dense_linear(random(9, &[m, k]), words(rows.clone()), args));
            let Some(size) = tiled_bytes(format, n, k) else { continue };
            let mut tiles = vec![0; size];
            tile((format, &rows), (n, k), (format, &mut tiles)).expect("whole blocks");
            let args = DenseArgs { tiled: true, ..args.with_int8().expect("integers") };
            hash.add(Flex::dense_linear(random(9, &[m, k]), words(tiles), args));
        }
    }

    let (n_heads, n_kv_heads, head_dim, capacity) = (8, 2, 40, 600);
    for dtype in [DType::F32, DType::F16, DType::I8] {
        let shape = [n_kv_heads, capacity, head_dim];
        let (mut keys, mut values) = (cache(dtype, shape), cache(dtype, shape));
        // Many rows, then one.
        for (position, m) in [(0, 500), (500, 1), (501, 3)] {
            let qkv = random(10 + m as u32, &[m, (n_heads + 2 * n_kv_heads) * head_dim]);
            let angles = [20 + m as u32, 30].map(|seed| random(seed, &[m, head_dim / 2]));
            let [cos, sin] = angles;
            let args = AttentionArgs { n_heads, n_kv_heads, head_dim, position, window: None };
            let CachedAttention { context, keys: k, values: v } =
                Flex::cached_attention(qkv, cos, sin, keys, values, args);
            (keys, values) = (k, v);
            hash.add(context);
        }
    }
    hash.0
}

/// What a process with this mask prints: levels and results.
#[test]
fn in_this_process() {
    let hash = everything();
    let (vectors, int8) = (bitnet_burn_cpu::simd::Level::best(), bitnet_burn_cpu::dense::int8::Level::best());
    println!("\nmasked: {vectors:?}; {int8:?}; {hash:016x}");
}

fn with_mask(mask: &str) -> (String, String) {
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["in_this_process", "--exact", "--nocapture", "--test-threads=1"])
        .env("BITNET_CPU_MASK", mask)
        .output()
        .expect("this program runs");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "mask {mask}: {text}");
    let line = text.lines().find_map(|line| line.strip_prefix("masked: ")).expect("the line of the test");
    let (levels, hash) = line.rsplit_once("; ").expect("levels and results");
    (levels.to_owned(), hash.to_owned())
}

#[test]
fn a_masked_process_computes_the_same_bits_with_fewer_instructions() {
    let (best, want) = with_mask("");
    let baseline = "Portable(Portable); Level(Scalar(Scalar))";
    for (mask, absent) in [
        ("avx512f", "Avx512"),
        ("avx512f,avxvnni", "Vnni"),
        ("avx2,neon", "Avx"),
        ("avx512f, avx2, neon", "Neon"),
        ("dotprod", "Dotprod"),
    ] {
        let (levels, got) = with_mask(mask);
        assert!(!levels.contains(absent), "{mask}: {levels}");
        assert_eq!(got, want, "{mask}: {levels} and {best}");
        if mask.contains("avx2") {
            assert_eq!(levels, baseline, "{mask}");
        }
    }
}
