//! Packed weights beside a model: the same bits, and nothing of another model, kernel or program.

mod support;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use bitnet_burn::Row;
use bitnet_burn::{BitLinear, CacheType};
use bitnet_burn::{DecoderOptions, GatedActivation, ModelConfig};
use bitnet_burn_backends::MatrixKernels;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::load::{
    ActivationRule, HeadMode, LoadOptions, LoadProgress, Loaded, ModelDevices, load_on,
};
use bitnet_burn_engine::prepack;
use bitnet_burn_engine::prepack::{PrepackError, Prepacked};
use bitnet_burn_engine::synth;
use bitnet_burn_engine::synth::{SynthOptions, SynthScales};
use bitnet_burn_formats::reference::{ScaledActivations, scaled_matmul};
use bitnet_burn_formats::{DenseFormat, ternary};
use bitnet_burn_manager::CpuKernels;
use bitnet_burn_manager::memory::Activations;
use burn::tensor::{Tensor, TensorData};
use support::device;
use tempfile::TempDir;

/// This machine's kernels may read canonical rows of so small a model; then there is only the head to pack.
fn model(directory: &TempDir, seed: u64) -> PathBuf {
    let path = directory.path().join("model.gguf");
    let config: ModelConfig = synth::shape("tiny").unwrap();
    let options = SynthOptions { config, scales: SynthScales::Tensor, embedding: DenseFormat::Q6_K, seed };
    synth::write(&path, &options, &|_, _| {}).unwrap();
    path
}

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path, &OpenOptions::default()).unwrap()
}

fn load(checkpoint: &Checkpoint, head: HeadMode, prepacked: bool) -> Loaded {
    let options = LoadOptions { head, prepacked, ..LoadOptions::default() };
    let layers = vec![device(); checkpoint.config().n_layers];
    load_on(checkpoint, &ModelDevices { layers, dense: device() }, &options, &mut |_| {}).unwrap()
}

fn logits(Loaded { model, .. }: &Loaded) -> Vec<u32> {
    let tokens = [3u32, 9, 27, 81, 243, 17];
    let mut cache = model.cache(tokens.len(), CacheType::F32).unwrap();
    let sequence = cache.add_sequence(tokens.len());
    let rows: Vec<Row> =
        tokens.iter().enumerate().map(|(position, &token)| Row { token, sequence, position }).collect();
    let y = model.forward(&rows, &[0, 3, 5], &mut cache).unwrap();
    y.into_data().try_to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn packed_weights_give_the_same_bits_and_say_so() {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = open(&model(&directory, 3));
    for head in [HeadMode::Int8, HeadMode::Requantised(DenseFormat::Q4_0)] {
        let mut last = (0, 0);
        let summary = prepack::write(&checkpoint, head, &mut |done, all| last = (done, all)).unwrap();
        assert!(last.0 == last.1 && last.1 > 1);
        assert_eq!(summary.path, directory.path().join("model.gguf.prepacked"));
        assert_eq!(std::fs::metadata(&summary.path).unwrap().len(), summary.bytes);
        let packed: usize = summary.layouts.values().sum();
        let (plain, mapped) = (load(&checkpoint, head, false), load(&checkpoint, head, true));
        assert_eq!((plain.prepacked, mapped.prepacked), (0, packed));
        assert!(logits(&plain) == logits(&mapped), "{head:?}");
        assert_eq!(plain.model.head_description(), mapped.model.head_description());
        // Another head is made in memory.
        let other = load(&checkpoint, HeadMode::Requantised(DenseFormat::Q8_0), true);
        assert_eq!(other.prepacked, packed - 1);
        let plain = load(&checkpoint, HeadMode::Requantised(DenseFormat::Q8_0), false);
        assert!(logits(&other) == logits(&plain));
    }
}

#[test]
fn packed_weights_with_many_scales_give_the_same_bits() {
    for (scales, embedding) in [
        (SynthScales::Group64, DenseFormat::Q2_0),
        (SynthScales::Group128, DenseFormat::PQ2_0),
        (SynthScales::Row, DenseFormat::F16),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        let tiny = synth::shape("tiny").unwrap();
        let config = ModelConfig {
            intermediate_size: 768,
            sub_norms: false,
            activation: GatedActivation::Silu,
            options: DecoderOptions { qk_norms: true, ..DecoderOptions::default() },
            ..tiny
        };
        synth::write(&path, &SynthOptions { config, scales, embedding, seed: 1 }, &|_, _| {}).unwrap();
        let checkpoint = open(&path);
        let summary = prepack::write(&checkpoint, HeadMode::File, &mut |_, _| {}).unwrap();
        let packed: usize = summary.layouts.values().sum();
        let (plain, mapped) =
            (load(&checkpoint, HeadMode::File, false), load(&checkpoint, HeadMode::File, true));
        assert_eq!((plain.prepacked, mapped.prepacked), (0, packed));
        // Two layers, and the head where it is ternary.
        assert_eq!(packed, 14 + usize::from(embedding != DenseFormat::F16), "{:?}", summary.layouts);
        assert!(logits(&plain) == logits(&mapped), "{scales:?}");
        // Other activations, in the same layout or packed anew.
        let other = |prepacked: bool| {
            let activations = ActivationRule::Group(64);
            let options = LoadOptions { activations, prepacked, ..LoadOptions::default() };
            let devices = ModelDevices { layers: vec![device(); 2], dense: device() };
            load_on(&checkpoint, &devices, &options, &mut |_| {}).unwrap()
        };
        assert!(logits(&other(true)) == logits(&other(false)) && logits(&other(true)) != logits(&plain));
    }
}

/// llama.cpp's files do not say that weights with many scales have no int8 activations by row: their values do.
#[test]
fn heads_of_ternary_blocks_are_computed_like_layers_with_many_scales() {
    for embedding in [DenseFormat::TQ1_0, DenseFormat::TQ2_0] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        let config = ModelConfig {
            intermediate_size: 768,
            sub_norms: false,
            activation: GatedActivation::Silu,
            tied_embeddings: false,
            ..synth::shape("tiny").unwrap()
        };
        let (n, k) = (config.vocab_size, config.hidden_size);
        let options = SynthOptions { config, scales: SynthScales::Row, embedding, seed: 5 };
        synth::write(&path, &options, &|_, _| {}).unwrap();
        let stated = logits(&load(&open(&path), HeadMode::File, false));
        let mut bytes = std::fs::read(&path).unwrap();
        let key = b"llama.int8_activations";
        let at = bytes.windows(key.len()).position(|window| window == key).unwrap();
        bytes[at..at + key.len()].copy_from_slice(b"other.int8_activations");
        std::fs::write(&path, bytes).unwrap();

        let checkpoint = open(&path);
        assert_eq!(checkpoint.config().architecture, "llama");
        let loaded = load(&checkpoint, HeadMode::File, false);
        let description = loaded.model.head_description();
        assert_eq!(description, "ternary (int8 activations by groups of 32)", "{embedding:?}");
        assert!(logits(&loaded) == stated, "{embedding:?}");
        // The head alone, against the definition.
        let x: Vec<f32> = (0..3 * k).map(|i| ((i * 7919) % 1000) as f32 / 300.0 - 1.6).collect();
        let head = loaded.model.output.as_ref().unwrap();
        let rows = Tensor::<2>::from_data(TensorData::new(x.clone(), [3, k]), &device());
        let y = head.forward(rows).into_data().try_to_vec::<f32>().unwrap();
        let stored = checkpoint.output().unwrap().unwrap();
        let (codes, scales) = ternary::scaled_from_dense(stored.format, &stored.data, n, k).unwrap();
        let q = Activations::from_groups(&x, k, 32);
        let rows =
            ScaledActivations { m: 3, q: q.q(), stride: q.stride(), group: q.group(), scale: q.scale() };
        let mut expected = vec![0.0; 3 * n];
        scaled_matmul(&codes, (n, k), scales.as_sdk(), rows, &mut expected, n);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert!(bits(&y) == bits(&expected), "{embedding:?}");

        let packed: usize =
            prepack::write(&checkpoint, HeadMode::File, &mut |_, _| {}).unwrap().layouts.values().sum();
        let mapped = load(&checkpoint, HeadMode::File, true);
        assert_eq!((packed, mapped.prepacked), (15, 15));
        assert!(logits(&mapped) == stated, "{embedding:?}");
    }
}

#[test]
fn what_was_packed_for_another_model_is_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let path = model(&directory, 3);
    let packed = prepack::write(&open(&path), HeadMode::Int8, &mut |_, _| {}).unwrap().path;
    let stale = std::fs::read(&packed).unwrap();
    // A model of the same name, size and shape.
    std::fs::remove_file(&packed).unwrap();
    let checkpoint = open(&model(&directory, 4));
    let want = logits(&load(&checkpoint, HeadMode::Int8, true));
    std::fs::write(&packed, &stale).unwrap();
    let error = Prepacked::beside(&checkpoint).unwrap_err();
    assert!(matches!(error, PrepackError::Unusable { .. }), "{error}");
    assert!(error.to_string().contains("the model has changed"), "{error}");
    let loaded = load(&checkpoint, HeadMode::Int8, true);
    assert_eq!(loaded.prepacked, 0);
    assert!(logits(&loaded) == want);

    // One that pretends to be this one's: the comparison of the head finds it.
    let fresh = prepack::write(&checkpoint, HeadMode::Int8, &mut |_, _| {}).unwrap().path;
    let fresh_bytes = std::fs::read(&fresh).unwrap();
    let table = |bytes: &[u8]| {
        let tail = bytes.len() - 24;
        let length = u64::from_le_bytes(*bytes[tail + 8..].first_chunk().unwrap()) as usize;
        let table: serde_json::Value = serde_json::from_slice(&bytes[tail - length..tail]).unwrap();
        (table, tail - length)
    };
    let ((mut pretends, end), (fresh_table, _)) = (table(&stale), table(&fresh_bytes));
    pretends["model"] = fresh_table["model"].clone();
    let text = serde_json::to_vec(&pretends).unwrap();
    let ends = [xxhash_rust::xxh3::xxh3_64(&text), text.len() as u64].map(u64::to_le_bytes).concat();
    std::fs::write(&packed, [&stale[..end], &text, &ends, b"BNPACK01"].concat()).unwrap();
    let error = Prepacked::beside(&checkpoint).unwrap_err();
    assert!(error.to_string().contains("is not what the model has"), "{error}");
    assert!(logits(&load(&checkpoint, HeadMode::Int8, true)) == want);
}

#[test]
fn damaged_files_are_refused_and_cost_nothing_but_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = model(&directory, 5);
    let checkpoint = open(&path);
    let want = logits(&load(&checkpoint, HeadMode::Int8, false));
    let packed = prepack::write(&checkpoint, HeadMode::Int8, &mut |_, _| {}).unwrap().path;
    let whole = std::fs::read(&packed).unwrap();
    let tail = whole.len() - 24;
    let length = u64::from_le_bytes(*whole[tail + 8..].first_chunk().unwrap()) as usize;
    let with = |at: usize, bytes: &[u8]| {
        let mut damaged = whole.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        damaged
    };
    // A table that is whole and says something else.
    let table: serde_json::Value = serde_json::from_slice(&whole[tail - length..tail]).unwrap();
    let says = |field: &str, value: serde_json::Value| {
        let mut table = table.clone();
        table["tensors"][0][field] = value;
        let text = serde_json::to_vec(&table).unwrap();
        let ends = [xxhash_rust::xxh3::xxh3_64(&text), text.len() as u64].map(u64::to_le_bytes).concat();
        [&whole[..tail - length], &text, &ends, b"BNPACK01"].concat()
    };
    let damaged: [(Vec<u8>, &str); 13] = [
        (Vec::new(), "cut off"),
        (whole[..7].to_vec(), "cut off"),
        (whole[..whole.len() / 2].to_vec(), "cut off"),
        (whole[..whole.len() - 1].to_vec(), "cut off"),
        (with(whole.len() - 8, b"BNPACK99"), "cut off"),
        (with(tail + 8, &u64::MAX.to_le_bytes()), "cut off"),
        (with(tail + 8, &3u64.to_le_bytes()), "its table is damaged"),
        (with(tail - 3, b"}}}"), "its table is damaged"),
        // In the middle of the weights.
        (with((tail - length) / 2, &[whole[(tail - length) / 2] ^ 1]), " is damaged"),
        (says("offset", 64.into()), "is to lie at byte 64"),
        (says("offset", (1u64 << 40).into()), "is to lie at byte"),
        (says("bytes", u64::MAX.into()), "is to lie at byte"),
        (says("scale", (-1.0).into()), "the scale of"),
    ];
    for (i, (bytes, expected)) in damaged.iter().enumerate() {
        std::fs::write(&packed, bytes).unwrap();
        let error = Prepacked::beside(&checkpoint).unwrap_err().to_string();
        assert!(error.contains(expected), "{i}: {error}");
        let loaded = load(&checkpoint, HeadMode::Int8, true);
        assert_eq!(loaded.prepacked, 0, "{i}");
        assert!(logits(&loaded) == want, "{i}");
    }
}

#[cfg(feature = "default-model")]
#[test]
fn a_model_in_memory_has_no_place_for_it() {
    let checkpoint = bitnet_burn_engine::embedded::checkpoint().unwrap();
    let error = prepack::write(&checkpoint, HeadMode::File, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, PrepackError::InMemory(_)), "{error}");
    assert!(Prepacked::beside(&checkpoint).unwrap().is_none());
}

#[test]
fn a_model_computes_in_place_before_it_is_packed_with_the_same_bits() {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = open(&model(&directory, 5));
    let in_place = || {
        let options = LoadOptions { in_place: true, ..LoadOptions::default() };
        let layers = vec![device(); checkpoint.config().n_layers];
        load_on(&checkpoint, &ModelDevices { layers, dense: device() }, &options, &mut |progress| {
            assert!(matches!(progress, LoadProgress::Packing(..)), "nothing is measured");
        })
    };
    // The layouts of the kernels that compute, and of the codes that the layers hold.
    let layouts = |loaded: &Loaded| -> Vec<(Option<String>, Option<String>)> {
        let layout = |layer: &BitLinear| match layer.matrix().unwrap().choice {
            Some(MatrixKernels::Host(kernels)) => {
                let name = |choice: &CpuKernels| choice.layout().map(str::to_owned);
                (name(kernels.computing()), name(&kernels))
            }
            choice => panic!("{choice:?}"),
        };
        loaded.model.blocks.iter().flat_map(|block| block.projections()).map(|(_, l)| layout(l)).collect()
    };
    let mut loaded = in_place().unwrap();
    let before = logits(&loaded);
    assert!(layouts(&loaded).iter().all(|layouts| *layouts == (None, None)));
    let packings = std::mem::take(&mut loaded.packings);
    assert_eq!(packings.len(), 7 * checkpoint.config().n_layers);
    packings.run(&AtomicBool::new(false));
    assert_eq!(logits(&loaded), before);
    let packed = load(&checkpoint, HeadMode::File, false);
    assert_eq!(logits(&packed), before);
    for (now, (layout, _)) in layouts(&loaded).into_iter().zip(layouts(&packed)) {
        assert_eq!(now, (layout, None), "computed as if packed at once, and kept in place");
    }
    // What is stopped stays in place.
    let mut stopped = in_place().unwrap();
    std::mem::take(&mut stopped.packings).run(&AtomicBool::new(true));
    assert_eq!(logits(&stopped), before);
}
