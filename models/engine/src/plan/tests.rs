//! Plans for simulated machines, whose measurements are in the profiles in `testdata/machines`.

use std::path::Path;

use super::machine::{MachineProfile, MemoryProfile};
use super::requirements::CACHE_TYPES;
use super::*;
use crate::synth::shape;
use bitnet_burn::ModelConfig;

fn machine(name: &str) -> MachineProfile {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/machines");
    MachineProfile::read(&dir.join(format!("{name}.json"))).unwrap()
}

/// With embedding and output in F16, as published files have them.
fn needs(config: &ModelConfig) -> Requirements {
    let matrix = (config.vocab_size * config.hidden_size * 2) as u64;
    let output = if config.tied_embeddings { 0 } else { matrix };
    Requirements::with(config, DenseBytes { embedding: matrix, output, head_read: matrix })
}

fn two_b() -> Requirements {
    needs(&shape("2b-4t").unwrap())
}

/// Llama 7B's shape.
fn seven_b() -> ModelConfig {
    ModelConfig {
        hidden_size: 4096,
        intermediate_size: 11008,
        n_layers: 32,
        n_heads: 32,
        n_kv_heads: 32,
        vocab_size: 32000,
        tied_embeddings: false,
        bos_token: None,
        eos_tokens: Vec::new(),
        ..shape("2b-4t").unwrap()
    }
}

/// Llama 70B's shape.
fn seventy_b() -> ModelConfig {
    ModelConfig {
        hidden_size: 8192,
        intermediate_size: 28672,
        n_layers: 80,
        n_heads: 64,
        n_kv_heads: 8,
        ..seven_b()
    }
}

fn plan(model: &Requirements, machine: &MachineProfile) -> Plan {
    Plan::new(model, machine, &PlanRequest::default()).unwrap()
}

fn because(plan: &Plan, words: &str) {
    assert!(plan.reasons.iter().any(|reason| reason.contains(words)), "{words:?} is not in\n{plan}");
}

/// The machine with this much available memory.
fn with_available(mut machine: MachineProfile, available_bytes: u64) -> MachineProfile {
    machine.memory = Some(MemoryProfile { available_bytes, ..machine.memory.unwrap() });
    machine
}

#[test]
fn a_laptop_gives_up_precision_and_then_context_as_its_memory_shrinks() {
    let (model, laptop) = (two_b(), machine("laptop-4gb"));
    let whole = plan(&model, &laptop);
    assert_eq!((whole.kind, whole.settings.threads), (PlacementKind::CpuOnly, 2));
    assert_eq!(
        (whole.settings.kv_cache, whole.settings.context, whole.settings.rows),
        (CacheType::F32, 4096, 256)
    );
    assert!(whole.fits && !whole.fallback);
    because(&whole, "no usable GPU");
    because(&whole, "2 physical cores");
    because(&whole, "f32: keys and values exactly as computed");
    let reserve = laptop.memory_reserve();
    let beside = whole.memory[0].total() - whole.memory[0].kv_cache;
    let mut seen = Vec::new();
    for available in (0..80).rev().map(|step| reserve + beside + step * (whole.memory[0].kv_cache / 64)) {
        let machine = with_available(laptop.clone(), available);
        let plan = plan(&model, &machine);
        assert!(plan.fits && plan.memory[0].total() <= available - reserve, "{plan}");
        let settings = (plan.settings.kv_cache, plan.settings.context);
        match settings {
            (CacheType::F32, 4096) => {}
            (kind, 4096) => because(&plan, &format!("a KV cache of {}: with ", kind.name())),
            (_, _) => because(
                &plan,
                "positions: with 4096, the length that the model was trained for, cpu would need",
            ),
        }
        if seen.last() != Some(&settings) {
            seen.push(settings);
        }
    }
    let expected =
        [(CacheType::F32, 4096), (CacheType::F16, 4096), (CacheType::Int8, 4096), (CacheType::Int8, 3840)];
    assert_eq!(seen[..4], expected);
    assert!(seen[3..].iter().all(|&(kind, context)| kind == CacheType::Int8 && context >= 256), "{seen:?}");
}

#[test]
fn what_does_not_fit_at_all_is_said() {
    let machine = with_available(machine("laptop-4gb"), 1 << 30);
    let plan = plan(&two_b(), &machine);
    assert!(!plan.fits && plan.sequences.is_none());
    because(&plan, "it does not fit: cpu would need");
    because(&plan, "use more memory, or a smaller model");
    // The smallest plan.
    assert_eq!(
        (plan.settings.kv_cache, plan.settings.context, plan.settings.rows),
        (CacheType::Int8, 256, 16)
    );
}

#[test]
fn a_desktop_without_gpu_computes_on_its_physical_cores() {
    let plan = plan(&two_b(), &machine("desktop-16-cores"));
    assert_eq!((plan.kind, plan.settings.threads, plan.tier), (PlacementKind::CpuOnly, 16, Tier::Fast));
    assert_eq!((plan.settings.kv_cache, plan.settings.context), (CacheType::F32, 4096));
    because(&plan, "16 threads for 16 physical cores");
    // The roofline: 65 * 10^9 bytes a second over the bytes of a token.
    let bytes = 2_084_044_800 / 4 + 30 * (3 * 2560 + 6912) * 4 + 128_256 * 2560 * 2;
    let prediction = plan.prediction.unwrap();
    assert!((prediction.decode_tokens_per_s - 65e9 / bytes as f64).abs() < 0.01, "{prediction:?}");
    let full = 65e9 / (bytes as f64 + 153_600.0 * 4096.0);
    assert!((prediction.decode_tokens_per_s_at_full_context - full).abs() < 0.01, "{prediction:?}");
    assert!((prediction.decode_at(4096, 4096) - full).abs() < 0.01);
    // A prompt: 4 * 10^12 multiply-adds a second over those of a token.
    assert!((prediction.prefill_tokens_per_s.unwrap() - 4e12 / 2_084_044_800.0).abs() < 0.1);
    assert_eq!(prediction.basis, Basis::Roofline);
}

#[test]
fn runs_on_a_machine_calibrate_what_is_expected_there() {
    let mut desktop = machine("desktop-16-cores");
    let roofline = plan(&two_b(), &desktop).prediction.unwrap();
    for rate in &mut desktop.cpu.rates {
        (rate.decode_efficiency, rate.prefill_efficiency) = (Some(0.5), Some(0.25));
    }
    let calibrated = plan(&two_b(), &desktop).prediction.unwrap();
    assert_eq!(calibrated.basis, Basis::Calibrated);
    assert_eq!(calibrated.decode_tokens_per_s, roofline.decode_tokens_per_s * 0.5);
    assert_eq!(calibrated.prefill_tokens_per_s.unwrap(), roofline.prefill_tokens_per_s.unwrap() * 0.25);
}

#[test]
fn a_7b_model_on_an_8_gb_gpu_goes_by_its_bytes() {
    let (model, machine) = (needs(&seven_b()), machine("gpu-8gb"));
    let load = ForwardSize { rows: 256, context: 4096 };
    let beside = model.layer_bytes(32)
        + model.dense_bytes()
        + model.activations(256, true)
        + model.workspace(DeviceClass::Gpu, load);
    let with = |kind| (beside + model.kv_bytes(kind, 4096, 32)) as f64;
    let all = (8u64 << 30) as f64;
    // The whole model fits with exact keys and values.
    assert!(with(CacheType::F32) < all * 0.9);
    assert_eq!(plan(&model, &machine).settings.kv_cache, CacheType::F32);
    // With a budget in between, f32 does not fit with 256 rows at once and 4096 positions, and f16 does.
    let fraction = (with(CacheType::F32) + with(CacheType::F16)) / 2.0 / all;
    let of_it = PlanRequest { gpu_memory_fraction: Some(fraction), ..PlanRequest::default() };
    let plan = Plan::new(&model, &machine, &of_it).unwrap();
    assert_eq!(
        (plan.kind, plan.settings.kv_cache, plan.settings.context),
        (PlacementKind::GpuOnly, CacheType::F16, 4096)
    );
    because(&plan, "everything on the GPU: ");
    because(&plan, "a KV cache of f16: with f32, wgpu:0 would need");
    assert!(plan.alternatives.iter().any(|other| other.placement.kind() == PlacementKind::CpuOnly), "{plan}");
    // With f32 requested, the size of the cache decides how many layers fit on the GPU.
    let request =
        PlanRequest { kv_cache: Some(CacheType::F32), rows: Some(256), context: Some(4096), ..of_it };
    let exact = Plan::new(&model, &machine, &request).unwrap();
    assert!(matches!(exact.kind, PlacementKind::Hybrid { .. }) && exact.fits, "{exact}");
}

#[test]
fn what_an_8_gb_gpu_has_no_room_for_is_on_the_cpu() {
    let (model, machine) = (needs(&seventy_b()), machine("gpu-8gb"));
    let plan = plan(&model, &machine);
    let PlacementKind::Hybrid { cpu_layers, gpu_layers } = plan.kind else { panic!("{plan}") };
    assert!(plan.fits && gpu_layers > 0 && cpu_layers + gpu_layers == 80, "{plan}");
    assert_eq!((plan.placement.stages[0].device.as_str(), plan.placement.dense.as_str()), ("wgpu:0", CPU));
    because(&plan, "the whole model does not fit on the GPU");
    // One more layer does not fit.
    let request = PlanRequest {
        gpu_layers: Some(gpu_layers + 1),
        context: Some(plan.settings.context),
        kv_cache: Some(plan.settings.kv_cache),
        rows: Some(plan.settings.rows),
        ..PlanRequest::default()
    };
    let more = Plan::new(&model, &machine, &request).unwrap();
    assert!(!more.fits, "{more}");
    because(&more, "wgpu:0 would need");
}

#[test]
fn two_gpus_share_what_is_too_much_for_one() {
    let two = plan(&needs(&seventy_b()), &machine("two-gpus-8gb"));
    let one = plan(&needs(&seventy_b()), &machine("gpu-8gb"));
    assert!(two.placement.layers_on(CPU) < one.placement.layers_on(CPU), "{two}");
    assert!(two.placement.layers_on("wgpu:0") > 0 && two.placement.layers_on("wgpu:1") > 0, "{two}");
    // A model that fits on one GPU is not split.
    assert_eq!(plan(&two_b(), &machine("two-gpus-8gb")).placement.devices().count(), 1);
}

#[test]
fn an_80_gb_gpu_takes_everything() {
    for model in [two_b(), needs(&seven_b()), needs(&seventy_b())] {
        let plan = plan(&model, &machine("gpu-80gb"));
        assert_eq!((plan.kind, plan.settings.kv_cache), (PlacementKind::GpuOnly, CacheType::F32), "{plan}");
        assert_eq!((plan.settings.context, plan.settings.rows), (4096, 256));
        assert!(plan.fits && plan.placement.dense == "cuda:0");
        because(&plan, "everything on the GPU");
    }
}

#[test]
fn a_buffer_that_the_gpu_does_not_give_stays_on_the_cpu() {
    let mut machine = machine("gpu-8gb");
    machine.gpus[0].max_allocation_bytes = Some(1 << 29);
    let plan = plan(&two_b(), &machine);
    // The embedding, in f16, has 0.66 GB.
    assert_eq!(plan.kind, PlacementKind::Hybrid { cpu_layers: 0, gpu_layers: 30 });
    because(&plan, "embedding and output do not fit there and are on the CPU");
}

#[test]
fn a_program_that_acts_as_a_gpu_is_never_preferred() {
    let machine = machine("software-gpu");
    for strategy in Strategy::ALL {
        let request = PlanRequest { strategy, ..PlanRequest::default() };
        let plan = Plan::new(&two_b(), &machine, &request).unwrap();
        assert_eq!(plan.kind, PlacementKind::CpuOnly);
        because(&plan, "it is a software GPU");
    }
    // It is used only on request.
    let request = PlanRequest { device: Some("wgpu".into()), ..PlanRequest::default() };
    let plan = Plan::new(&two_b(), &machine, &request).unwrap();
    assert_eq!((plan.kind, plan.tier), (PlacementKind::GpuOnly, Tier::Unknown));
    because(&plan, "slower than the CPU");
    because(&plan, "no speed is predicted: the memory bandwidth of wgpu:0 was not measured");
}

#[test]
fn a_gpu_whose_memory_is_not_known_is_for_whoever_asks() {
    let mut machine = machine("gpu-8gb");
    machine.gpus[0].memory_bytes = None;
    let plan = plan(&two_b(), &machine);
    assert_eq!(plan.kind, PlacementKind::CpuOnly);
    because(&plan, "its driver does not report its memory");
    because(&plan, "the CPU: no GPU was a candidate");
    let request = PlanRequest { device: Some("wgpu:0".into()), ..PlanRequest::default() };
    let asked = Plan::new(&two_b(), &machine, &request).unwrap();
    assert_eq!(asked.kind, PlacementKind::GpuOnly);
    because(&asked, "does not report its memory, which may be too small");
}

#[test]
fn an_unknown_machine_gets_the_careful_plan() {
    let unknown = machine("unknown");
    let plan = plan(&two_b(), &unknown);
    assert!(plan.fallback && !plan.fits && plan.prediction.is_none() && plan.tier == Tier::Unknown);
    assert_eq!((plan.kind, plan.settings.threads, plan.settings.rows), (PlacementKind::CpuOnly, 1, 64));
    assert_eq!((plan.settings.context, plan.settings.kv_cache), (2048, CacheType::F32));
    because(
        &plan,
        "does not report its memory: to be safe, the CPU alone, a short context, few rows at once (--memory",
    );
    // Requested settings are not replaced by careful ones.
    let asked = PlanRequest {
        device: Some(CPU.into()),
        context: Some(4096),
        rows: Some(256),
        kv_cache: Some(CacheType::F16),
        ..PlanRequest::default()
    };
    let asked = Plan::new(&two_b(), &unknown, &asked).unwrap();
    because(&asked, "does not report its memory: the requested settings may not fit (--memory");
    because(&plan, "the system does not report the number of cores");
    // Requested values replace unknown ones.
    let request = PlanRequest { threads: Some(4), memory: Some(3_000_000_000), ..PlanRequest::default() };
    let told = Plan::new(&two_b(), &unknown, &request).unwrap();
    assert!(
        told.fits && !told.fallback && told.settings.threads == 4 && told.settings.context == 4096,
        "{told}"
    );
}

#[test]
fn strategies_differ_in_what_an_expert_would() {
    let desktop = machine("desktop-16-cores");
    let of = |strategy| {
        Plan::new(&two_b(), &desktop, &PlanRequest { strategy, ..PlanRequest::default() }).unwrap()
    };
    let memory = of(Strategy::Memory);
    assert_eq!((memory.settings.kv_cache, memory.settings.rows), (CacheType::Int8, 16));
    // Half of the cores have 60 of 65 GB/s.
    let power = of(Strategy::PowerEfficiency);
    assert_eq!(power.settings.threads, 8);
    because(&power, "enough for 90 % of the decode speed of 16");
    let balanced = of(Strategy::Balanced);
    assert_eq!(balanced.settings.threads, 15);
    assert_eq!(
        balanced.memory[0].budget.unwrap(),
        of(Strategy::Performance).memory[0].budget.unwrap() / 4 * 3
    );
    // A single device is used.
    let request = PlanRequest { strategy: Strategy::PowerEfficiency, ..PlanRequest::default() };
    let plan = Plan::new(&needs(&seventy_b()), &machine("gpu-8gb"), &request).unwrap();
    assert_eq!(plan.kind, PlacementKind::CpuOnly, "{plan}");
}

#[test]
fn requests_are_met_or_refused() {
    let (model, gpu) = (two_b(), machine("gpu-8gb"));
    let with = |request: PlanRequest| Plan::new(&model, &gpu, &request);
    let none = PlanRequest::default;
    let plan = with(PlanRequest { gpu_layers: Some(10), threads: Some(3), ..none() }).unwrap();
    assert_eq!(plan.kind, PlacementKind::Hybrid { cpu_layers: 20, gpu_layers: 10 });
    assert_eq!(plan.settings.threads, 3);
    because(&plan, "10 layers on wgpu:0, as requested; 20 on the CPU");
    assert_eq!(with(PlanRequest { gpu_layers: Some(30), ..none() }).unwrap().kind, PlacementKind::GpuOnly);
    assert_eq!(with(PlanRequest { gpu_layers: Some(0), ..none() }).unwrap().kind, PlacementKind::CpuOnly);
    assert_eq!(
        with(PlanRequest { device: Some(CPU.into()), ..none() }).unwrap().kind,
        PlacementKind::CpuOnly
    );
    let plan =
        with(PlanRequest { context: Some(512), kv_cache: Some(CacheType::F16), rows: Some(8), ..none() })
            .unwrap();
    assert_eq!((plan.settings.context, plan.settings.rows), (512, 8));
    let error = |request: PlanRequest| with(request).unwrap_err().to_string();
    for (request, expected) in [
        (
            PlanRequest { device: Some("cuda:0".into()), ..none() },
            "there is no device cuda:0; this machine has cpu, wgpu:0",
        ),
        (PlanRequest { gpu_layers: Some(31), ..none() }, "cannot place 31 layers on a GPU: the model has 30"),
        (
            PlanRequest { gpu_layers: Some(3), device: Some(CPU.into()), ..none() },
            "the requested device is the CPU",
        ),
        (PlanRequest { context: Some(5000), ..none() }, "the context is 5000; it must be between 1 and 4096"),
        (PlanRequest { gpu_memory_fraction: Some(f64::NAN), ..none() }, "must be above 0 and at most 1"),
        (PlanRequest { rows: Some(0), ..none() }, "the number of rows at once is 0"),
    ] {
        let error = error(request);
        assert!(error.contains(expected), "{expected:?}: {error}");
    }
    let mut without_f16 = gpu.clone();
    without_f16.gpus[0].precisions.retain(|precision| precision != "f16");
    let on_gpu = |kind| PlanRequest { device: Some("wgpu".into()), kv_cache: Some(kind), ..none() };
    let error = Plan::new(&model, &without_f16, &on_gpu(CacheType::F16)).unwrap_err().to_string();
    assert!(error.contains("a type that wgpu:0 supports"), "{error}");
    // Four int8 codes share a 32-bit word, which every GPU has.
    assert!(Plan::new(&model, &without_f16, &on_gpu(CacheType::Int8)).unwrap().fits);
    let nothing = Plan::new(&model, &machine("laptop-4gb"), &PlanRequest { gpu_layers: Some(1), ..none() });
    assert!(nothing.unwrap_err().to_string().contains("this build finds no usable GPU"));
}

#[test]
fn sequences_have_room_as_long_as_memory_is_known() {
    let (model, desktop) = (needs(&shape("2b-4t").unwrap()), machine("desktop-16-cores"));
    let settings = plan(&model, &desktop).settings;
    let place = Placement::cpu_only(model.layers);
    let room = place.sequences(&model, &desktop, &settings).unwrap();
    assert_eq!(Some(room), plan(&model, &desktop).sequences);
    let short = RunSettings { context: settings.context / 2, ..settings };
    assert!(place.sequences(&model, &desktop, &short).unwrap() > room);
    let memory = desktop.memory.map(|m| MemoryProfile { available_bytes: m.total_bytes / 16 + 1, ..m });
    let full = MachineProfile { memory, ..desktop.clone() };
    assert_eq!(place.sequences(&model, &full, &settings), Some(0));
    assert_eq!(place.sequences(&model, &MachineProfile { memory: None, ..desktop }, &settings), None);
}

#[test]
fn every_plan_is_whole_and_can_be_told() {
    let machines =
        ["laptop-4gb", "desktop-16-cores", "gpu-8gb", "two-gpus-8gb", "gpu-80gb", "software-gpu", "unknown"];
    let long = ModelConfig { context_length: 131_072, n_kv_heads: 8, ..seven_b() };
    for config in [shape("2b-4t").unwrap(), seven_b(), seventy_b(), long] {
        let model = needs(&config);
        for name in machines {
            for strategy in Strategy::ALL {
                let machine = machine(name);
                let plan =
                    Plan::new(&model, &machine, &PlanRequest { strategy, ..PlanRequest::default() }).unwrap();
                let mut next = 0;
                for stage in &plan.placement.stages {
                    assert!(stage.layers.start == next && stage.layers.end > next, "{plan}");
                    next = stage.layers.end;
                }
                assert_eq!((next, plan.placement.layers()), (config.n_layers, config.n_layers));
                assert_eq!(plan.memory.len(), plan.placement.devices().count());
                let budgets = plan.memory.iter().all(DeviceMemory::fits);
                assert!(plan.fits && budgets || !plan.fits && (!budgets || plan.fallback), "{name}: {plan}");
                assert!(plan.reasons.len() >= 4, "{plan}");
                let json = serde_json::to_value(&plan).unwrap();
                assert!(json["placement"]["stages"].is_array() && json["kv_cache"].is_string(), "{json}");
            }
        }
    }
}

#[test]
fn absurd_machines_and_models_do_not_panic() {
    let mut absurd = machine("gpu-8gb");
    absurd.memory = Some(MemoryProfile { total_bytes: u64::MAX, available_bytes: u64::MAX });
    absurd.gpus[0].memory_bytes = Some(u64::MAX);
    let mut nothing = machine("gpu-8gb");
    nothing.memory = Some(MemoryProfile { total_bytes: 0, available_bytes: 0 });
    nothing.gpus[0].memory_bytes = Some(0);
    let huge = ModelConfig {
        n_layers: 1 << 14,
        context_length: 1 << 30,
        hidden_size: 1 << 20,
        ..shape("2b-4t").unwrap()
    };
    let tiny = ModelConfig { n_layers: 1, context_length: 1, ..shape("2b-4t").unwrap() };
    for machine in [absurd, nothing] {
        for config in [&huge, &tiny, &shape("2b-4t").unwrap()] {
            for strategy in Strategy::ALL {
                Plan::new(&needs(config), &machine, &PlanRequest { strategy, ..PlanRequest::default() })
                    .unwrap()
                    .to_string();
            }
        }
    }
    assert_eq!(CACHE_TYPES.len(), needs(&tiny).kv_per_position.len());
}
