//! Layers on several devices: the CPU, and one or two GPUs or what stands in for them (lavapipe, opened twice). Without
//! an adapter these tests fail: whoever builds the feature wants it tested.
#![cfg(feature = "wgpu")]

use std::path::Path;

use bitnet_burn::BitNet;
use bitnet_burn::CacheType;
use bitnet_burn::backends::devices;
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::load::{LoadOptions, ModelDevices, ModelError, load_on};
use bitnet_burn_engine::plan::{CPU, MachineProfile, Measure, PlacedModel, Placement, RunSettings};
use bitnet_burn_tests::reference::{Mutation, Reference};
use bitnet_burn_tests::*;
use burn::tensor::{Device, DeviceKind};

const TOLERANCE: f32 = 1e-3;

/// `wgpu` and `wgpu:0` are two devices to Burn, with clients and memory of their own, be they one adapter or not.
fn open(name: &str) -> Result<Device, ModelError> {
    Ok(match name {
        CPU => Device::flex(),
        "wgpu" => Device::wgpu(Default::default()),
        other => devices::open(other).expect("an adapter"),
    })
}

fn checkpoint(path: &Path) -> Checkpoint {
    setup();
    Checkpoint::open(path, &Default::default()).unwrap()
}

fn placed(checkpoint: &Checkpoint, placement: &Placement) -> BitNet {
    let devices = placement.devices_of(&mut open).unwrap();
    let model = load_on(checkpoint, &devices, &LoadOptions::default(), &mut |_| {}).unwrap().model;
    // The KV cache of a layer is where the layer is.
    let cache = model.cache(64, CacheType::F32).unwrap();
    assert!(cache.devices() == devices.layers && model.layer_devices() == devices.layers);
    assert!(model.device() == devices.dense);
    model
}

/// The CPU alone, every split with the GPU in front, all layers on it with the output on the CPU, the GPU alone, the CPU
/// in front, and two GPUs with and without the CPU.
fn placements(layers: usize) -> Vec<Placement> {
    let over = |parts: &[(&str, usize)], dense: &str| {
        Placement::over(parts.iter().map(|&(name, count)| (name.to_owned(), count)), dense)
    };
    let mut all: Vec<Placement> = (0..=layers).map(|k| Placement::hybrid("wgpu", k, layers - k)).collect();
    all.push(Placement::gpu_only("wgpu", layers));
    all.push(over(&[(CPU, 1), ("wgpu", layers - 1)], "wgpu"));
    all.push(over(&[("wgpu:0", 1), ("wgpu", layers - 1)], "wgpu"));
    if layers > 2 {
        all.push(over(&[("wgpu", 1), ("wgpu:0", 1), (CPU, layers - 2)], CPU));
    }
    all
}

#[test]
fn logits_of_every_split_are_those_of_one_device() {
    for (path, prompts) in [
        (repository_golden().join("hf/A-packed-auto"), [1, 16]),
        (repository_golden().join("gguf/tiny_a-i2_s.gguf"), [3, 16]),
    ] {
        let reference = if path.is_dir() { Reference::from_hf(&path) } else { Reference::from_gguf(&path) };
        let checkpoint = checkpoint(&path);
        let layers = checkpoint.config().n_layers;
        let vocabulary = checkpoint.config().vocab_size;
        let host = placed(&checkpoint, &Placement::cpu_only(layers));
        let prompts = prompts.map(|n| {
            let tokens: Vec<u32> = (0..n).map(|i| (i * 37 + 11) as u32 % vocabulary as u32).collect();
            // Up to where a rounding may fall to the other side.
            let certain = reference.forward(&tokens, Mutation::None).certain().min(n);
            let want = all_logits(&host, &tokens, 256, CacheType::F32);
            (tokens, certain, want)
        });
        for placement in placements(layers) {
            let model = placed(&checkpoint, &placement);
            for (tokens, certain, want) in &prompts {
                for chunk in [256, 5] {
                    let got = all_logits(&model, tokens, chunk, CacheType::F32);
                    let end = certain * vocabulary;
                    let difference = max_difference(&got[..end], &want[..end]);
                    let what = format!("{placement}, {} tokens in chunks of {chunk}", tokens.len());
                    assert!(difference < TOLERANCE, "{what}: {difference:e}");
                    assert!(max_difference(&got, want) < 1.0, "{what}");
                }
            }
        }
    }
}

#[test]
fn greedy_tokens_of_a_split_are_those_of_transformers() {
    let dir = repository_golden().join("hf/A-packed-auto");
    let goldens = read_goldens(&dir.join("goldens.safetensors"));
    let checkpoint = checkpoint(&dir);
    let layers = checkpoint.config().n_layers;
    let model = placed(&checkpoint, &Placement::hybrid("wgpu", 1, layers - 1));
    let mut all = 0;
    for n in [1, 16] {
        let get = |name: &str| &goldens[&format!("seq{n}.{name}")];
        let (prompt, want) = (get("input_ids").ids(), get("gen_ids").ids());
        let sequence = [prompt.clone(), want.clone()].concat();
        let certain = Reference::from_hf(&dir).forward(&sequence, Mutation::None).certain();
        let margins = &get("gen_margin").values;
        let compared = (0..32).take_while(|&i| n - 1 + i < certain || margins[i] >= 0.5).count();
        let tokens = greedy(&model, &prompt, 32);
        assert_eq!(tokens[..compared], want[..compared], "seq{n}");
        all += compared;
    }
    assert!(all > 0, "nothing was certain enough to compare");
}

#[test]
fn a_placement_is_loaded_tried_out_and_reduced_where_it_fails() {
    let path = repository_golden().join("gguf/tiny_a-i2_s.gguf");
    let checkpoint = checkpoint(&path);
    let layers = checkpoint.config().n_layers;
    let settings = RunSettings { threads: 1, context: 64, kv_cache: CacheType::F32, rows: 16 };
    let whole = Placement::gpu_only("wgpu", layers);
    let load = |settings: &RunSettings| {
        PlacedModel::load(&checkpoint, &whole, settings, &LoadOptions::default(), &mut open, &mut |_| {})
            .unwrap()
    };
    let fine = load(&settings);
    assert!(fine.placement == whole && fine.notes.is_empty(), "{:?}", fine.notes);
    fine.model.try_out(16, 64, CacheType::F32).unwrap();
    // A GPU that is not there panics when it is used; with half of the layers there is another one.
    let mut opened = 0;
    let mut absent_at_first = |name: &str| {
        opened += usize::from(name == "wgpu");
        if name == "wgpu" && opened == 1 { Ok(Device::wgpu(DeviceKind::DiscreteGpu(99))) } else { open(name) }
    };
    let options = LoadOptions::default();
    let reduced =
        PlacedModel::load(&checkpoint, &whole, &settings, &options, &mut absent_at_first, &mut |_| {})
            .unwrap();
    assert_eq!(reduced.placement, Placement::hybrid("wgpu", layers / 2, layers - layers / 2));
    assert_eq!(reduced.notes.len(), 1);
    let note = format!("{layers} layers on GPUs failed (");
    assert!(reduced.notes[0].starts_with(&note), "{:?}", reduced.notes);
    reduced.model.try_out(16, 64, CacheType::F32).unwrap();
    // Devices for another model.
    let devices = ModelDevices { layers: vec![Device::flex(); layers + 1], dense: Device::flex() };
    let error = load_on(&checkpoint, &devices, &LoadOptions::default(), &mut |_| {}).unwrap_err();
    assert_eq!(error.to_string(), format!("devices for {} layers; the model has {layers}", layers + 1));
}

#[test]
fn a_software_gpu_is_found_and_called_one() {
    let (gpus, problems) = devices::gpus();
    assert!(!gpus.is_empty(), "{problems:?}");
    let profile = MachineProfile::detect(None, Measure::Nothing, None);
    assert!(profile.gpus.is_empty(), "nothing is opened where nothing is measured");
    for gpu in &gpus {
        println!("{gpu:?}");
        let named = ["llvmpipe", "SwiftShader"].iter().any(|name| gpu.name.contains(name));
        assert_eq!(gpu.software, named, "{gpu:?}");
        assert!(gpu.precisions.contains(&"f32".to_owned()) && gpu.max_allocation_bytes > 1 << 20);
        devices::open(&gpu.id).unwrap();
    }
    assert!(devices::open("wgpu:99").unwrap_err().contains("there is no device wgpu:99"));
    assert!(devices::open("wgpu:first").unwrap_err().contains("such as wgpu:0"));
    devices::open("wgpu").unwrap();
}
