//! Records of packed layers: canonical whatever kernel packed them, with a version, and refused where they do not fit.

use std::path::Path;
use std::process::Command;
use std::sync::Once;
use std::time::Duration;

use bitnet_burn::backends::manager;
use bitnet_burn::backends::ops::{MatrixScale, TernaryMatrix};
use bitnet_burn::{ActivationRule, BitLinear, BitLinearConfig, BitLinearWeight, WeightScale};
use bitnet_burn_formats::Scales;
use bitnet_burn_manager::{KernelReport, ManagerConfig, Status};
use bitnet_burn_tests::*;
use burn::module::{Module, Param, ParamGroup, Quantizer};
use burn::store::{BurnpackStore, ModuleRecord, ModuleSnapshot, ModuleStore, SafetensorsStore};
use burn::tensor::quantization::{Calibration, QuantScheme};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

const KINDS: [(WeightScale, ActivationRule); 4] = [
    (WeightScale::Tensor, ActivationRule::Model),
    (WeightScale::Row, ActivationRule::Row),
    (WeightScale::Group(64), ActivationRule::Group(32)),
    (WeightScale::Tensor, ActivationRule::Float),
];

const SHAPE: [usize; 2] = [48, 256];

/// The devices in host memory, on a machine whose kernel has a packing of its own for many scales. (A kernel is for one
/// scale or for many; weights that the forced one is not for stay canonical.)
fn private_devices() -> Vec<Device> {
    static FORCED: Once = Once::new();
    FORCED.call_once(|| {
        let from_env = ManagerConfig::from_env().unwrap();
        let config =
            ManagerConfig { threads: 2, cache_dir: None, tune_budget: Duration::ZERO, ..from_env.clone() };
        let force = from_env.force.unwrap_or_else(|| {
            let kernels = manager::with_built_in_kernels(config.clone()).unwrap().report().kernels;
            let private = |kernel: &KernelReport| {
                is_ready(kernel) && kernel.many_scales && kernel.layout != "canonical"
            };
            kernels.into_iter().find(private).expect("a kernel with a packing of its own").kernel
        });
        manager::configure(ManagerConfig { force: Some(force), ..config }, &[]).unwrap();
    });
    vec![
        Device::flex(),
        #[cfg(feature = "ndarray")]
        #[allow(deprecated, reason = "Burn deprecates NdArray in favour of Flex, and still supports it")]
        Device::ndarray(),
    ]
}

fn is_ready(kernel: &KernelReport) -> bool {
    kernel.status == Status::Ready && kernel.target == "cpu"
}

fn flex() -> Device {
    private_devices().swap_remove(0)
}

fn config((scale, activations): (WeightScale, ActivationRule)) -> BitLinearConfig {
    let [n, k] = SHAPE;
    BitLinearConfig::new(k, n).with_bias(true).with_norm(true).with_scale(scale).with_activations(activations)
}

/// A packed layer, the same in each process.
fn packed(kind: (WeightScale, ActivationRule), seed: u64, device: &Device) -> BitLinear {
    let [n, k] = SHAPE;
    let mut layer = config(kind).init(device);
    let weights = TensorData::new(Random(seed).floats(n * k), SHAPE);
    layer.weight = BitLinearWeight::Latent(Param::from_data(weights, device));
    layer.bias = Some(Param::from_data(TensorData::new(Random(seed + 1).floats(n), [n]), device));
    layer.pack().unwrap()
}

fn outputs(layer: &BitLinear, device: &Device) -> Vec<u32> {
    let k = SHAPE[1];
    let x = Tensor::<2>::from_data(TensorData::new(Random(7).floats(3 * k), [3, k]), device);
    layer.forward(x).into_data().iter::<f32>().map(f32::to_bits).collect()
}

fn is_private(layer: &BitLinear) -> bool {
    layer.to_string().contains("packed for this machine")
}

/// All ways in which Burn saves and loads a module.
#[derive(Clone, Copy, Debug)]
enum Format {
    Safetensors,
    Burnpack,
    Record,
}

impl Format {
    const ALL: [Self; 3] = [Self::Safetensors, Self::Burnpack, Self::Record];

    fn save<M: Module>(self, module: &M, path: &Path) {
        match self {
            Self::Safetensors => {
                module.save_into(&mut SafetensorsStore::from_file(path).overwrite(true)).unwrap()
            }
            Self::Burnpack => module.save_into(&mut BurnpackStore::from_file(path).overwrite(true)).unwrap(),
            Self::Record => module.clone().into_record().save(path).unwrap(),
        }
    }

    fn load<M: Module>(self, module: &mut M, path: &Path) -> Result<(), String> {
        match self {
            Self::Safetensors => {
                let loaded = module.load_from(&mut SafetensorsStore::from_file(path));
                loaded.map(|_| ()).map_err(|error| error.to_string())
            }
            Self::Burnpack => {
                let loaded = module.load_from(&mut BurnpackStore::from_file(path));
                loaded.map(|_| ()).map_err(|error| error.to_string())
            }
            Self::Record => {
                let record = ModuleRecord::load(path).map_err(|error| error.to_string())?;
                *module = module.clone().try_load_record(record).map_err(|error| error.to_string())?;
                Ok(())
            }
        }
    }
}

#[test]
fn private_packings_are_saved_canonical_and_loaded_into_any_packed_layer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.bpk");
    for device in private_devices() {
        for kind in KINDS {
            let layer = packed(kind, 1, &device);
            let private = matches!(kind, (WeightScale::Row | WeightScale::Group(_), _));
            assert_eq!(is_private(&layer), private, "{kind:?}");
            let want = outputs(&layer, &device);
            for format in Format::ALL {
                format.save(&layer, &path);
                let targets = [
                    config(kind).init_packed(&device),
                    packed(kind, 3, &device),
                    packed(kind, 3, &device).into_canonical().unwrap(),
                ];
                for mut target in targets {
                    format.load(&mut target, &path).unwrap();
                    assert_eq!(outputs(&target, &device), want, "{format:?} {kind:?} on {device:?}");
                    assert!(!is_private(&target));
                    let again = target.repack().unwrap();
                    assert_eq!(is_private(&again), is_private(&layer));
                    assert_eq!(outputs(&again, &device), want, "packed anew");
                }
            }
            // Saving left the layer as it was.
            assert_eq!(is_private(&layer), private);
        }
    }
}

#[test]
fn a_record_has_a_version_the_scale_kind_and_canonical_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    let layer = packed(KINDS[2], 1, &flex());
    Format::Safetensors.save(&layer, &path);
    let mut store = SafetensorsStore::from_file(&path);
    let tensors = store.get_all_tensors().unwrap();
    let of = |name: &str| {
        let tensor = &tensors[name];
        (tensor.dtype, tensor.shape.to_vec())
    };
    assert_eq!(of("weight.Packed.words"), (DType::U32, vec![48, 16]));
    assert_eq!(of("weight.Packed.scale"), (DType::F32, vec![64 * 4]));
    let format = burn::store::bridge::to_data(&tensors["weight.Packed.format"]).unwrap();
    assert_eq!(format.iter::<i64>().collect::<Vec<_>>(), [1, 48, 256, 64, 32]);
    let canonical = layer.into_canonical().unwrap().matrix().unwrap().codes.into_data();
    burn::store::bridge::to_data(&tensors["weight.Packed.words"]).unwrap().assert_eq(&canonical, true);
}

/// What other programs and other versions may have written.
#[derive(Module, Debug)]
struct Foreign {
    weight: ForeignWeight,
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a test")]
enum ForeignWeight {
    Packed(ForeignParts),
}

#[derive(Module, Debug)]
struct ForeignParts {
    /// As layers were saved before records had versions.
    codes: Option<Param<Tensor<2, Int>>>,
    format: Option<Param<Tensor<1, Int>>>,
    words: Option<Param<Tensor<2, Int>>>,
    scale: Option<Param<Tensor<1>>>,
}

impl Foreign {
    fn new(parts: ForeignParts) -> Self {
        Self { weight: ForeignWeight::Packed(parts) }
    }
}

fn ints<const D: usize>(values: Vec<i64>, shape: [usize; D], dtype: DType) -> Option<Param<Tensor<D, Int>>> {
    let data = TensorData::new(values, shape);
    Some(Param::initialized(Default::default(), Tensor::from_data(data, (&flex(), dtype))))
}

fn foreign(format: [i64; 5], word: i64, scale: f32, dtype: DType) -> Foreign {
    Foreign::new(ForeignParts {
        codes: None,
        format: ints(format.to_vec(), [5], DType::I32),
        words: ints(vec![word; 48 * 16], [48, 16], dtype),
        scale: Some(Param::from_data([scale], &flex())),
    })
}

#[test]
fn records_that_do_not_fit_are_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.bpk");
    let device = flex();
    let (good, zeros) = ([1, 48, 256, -1, 0], 0x5555_5555);
    let with = |at: usize, value: i64| {
        let mut format = good;
        format[at] = value;
        foreign(format, zeros, 0.5, DType::U32)
    };
    let without = |words: bool| {
        let ForeignWeight::Packed(parts) = foreign(good, zeros, 0.5, DType::U32).weight;
        Foreign::new(match words {
            true => ForeignParts { words: None, ..parts },
            false => ForeignParts { scale: None, ..parts },
        })
    };
    let old = |words: [usize; 2]| {
        let scale = Some(Param::from_data([0.5], &flex()));
        let codes = ints(vec![zeros; words[0] * words[1]], words, DType::U32);
        Foreign::new(ForeignParts { codes, format: None, words: None, scale })
    };
    let private = old([1, 48 * 16]);
    let cases = [
        (private, "older than version 1"),
        (old([48, 16]), "older than version 1"),
        (with(0, 2), "has version 2, and this version of bitnet-burn reads version 1"),
        (with(2, 250), "the record has weights [48, 250] with scale tensor and activations row"),
        (
            with(3, 0),
            "with scale row and activations row, and this layer has weights [48, 256] with scale tensor",
        ),
        (with(3, 64), "scale group:64"),
        (with(4, 32), "activations group:32"),
        (with(4, -1), "activations float"),
        (without(true), "together or not at all"),
        (without(false), "together or not at all"),
        (foreign(good, 0xffff_ffff, 0.5, DType::U32), "code"),
        (foreign(good, zeros, f32::NAN, DType::U32), "scale 0 is not finite"),
        (foreign(good, zeros, 0.5, DType::I64), "instead of U32"),
    ];
    for (file, reason) in &cases {
        for format in Format::ALL {
            format.save(file, &path);
            for mut target in [packed(KINDS[0], 3, &device), config(KINDS[0]).init_packed(&device)] {
                // (Norm and bias are not in the file.)
                (target.norm, target.bias) = (None, None);
                let before = outputs(&target, &device);
                let error = format.load(&mut target, &path).unwrap_err();
                assert!(error.contains(reason) && error.contains("weight"), "{format:?}: {error}");
                assert_eq!(outputs(&target, &device), before, "{reason}: the layer has changed");
            }
        }
    }
    for format in Format::ALL {
        format.save(&with(0, 1), &path);
        let mut target = packed(KINDS[0], 3, &device);
        (target.norm, target.bias) = (None, None);
        format.load(&mut target, &path).unwrap();
        assert!(outputs(&target, &device).iter().all(|&y| f32::from_bits(y) == 0.0));
    }
}

#[test]
fn partial_records_change_only_what_they_have() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.bpk");
    let device = flex();
    let (source, target) = (packed(KINDS[2], 1, &device), packed(KINDS[2], 3, &device));
    let partial = |record: ModuleRecord| {
        let loaded = target.clone().try_load_record(record.allow_partial(true).allow_unused(true)).unwrap();
        (outputs(&loaded, &device), is_private(&loaded))
    };
    // The bias alone.
    let group = ParamGroup::from_path("bias");
    let bias = source.clone().into_record_group(group);
    let want = target.clone().with_bias(source.bias.clone().unwrap());
    assert_eq!(partial(bias), (outputs(&want, &device), true));
    // The weights alone.
    let weights = source.clone().into_record_group(ParamGroup::from_predicate("weight"));
    let want = source.clone().with_bias(target.bias.clone().unwrap());
    assert_eq!(partial(weights), (outputs(&want, &device), false));
    // Half of the weights: they stay as they are, and the result says so.
    let half = source.clone().into_record_group(ParamGroup::from_path("weight.Packed.words"));
    assert_eq!(partial(half), (outputs(&target, &device), true));
    source
        .save_into(
            &mut SafetensorsStore::from_file(&path)
                .filter(burn::store::PathFilter::new().with_regex("words|bias|norm")),
        )
        .unwrap();
    let mut loaded = target;
    let result = loaded.load_from(&mut SafetensorsStore::from_file(&path).allow_partial(true)).unwrap();
    assert!(result.missing.iter().any(|(path, _)| path.contains("refused")), "{result}");
    // A latent layer is no packed one.
    source.save_into(&mut BurnpackStore::from_file(&path).overwrite(true)).unwrap();
    let error = config(KINDS[2]).init(&device).load_from(&mut BurnpackStore::from_file(&path)).unwrap_err();
    assert!(error.to_string().contains("weight.Latent"), "{error}");
}

#[test]
fn scales_in_f16_are_saved_as_f32() {
    let [n, k] = SHAPE;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.bpk");
    let device = flex();
    let scales = Scales::from_rows(&[[0.5, -0.25, 2.0, 1.0]; 48].concat(), n, k, 64).unwrap();
    assert!(scales.is_half());
    let codes = canonical_rows(&Random(5).ternary(n * k), k);
    let scale = MatrixScale::Groups { scales, activations: 32 };
    let layer = BitLinear::from_matrix(TernaryMatrix::prepared(codes.into(), scale, n, k, &device).unwrap());
    let want = outputs(&layer, &device);
    for format in Format::ALL {
        format.save(&layer, &path);
        for to in private_devices() {
            let mut loaded = BitLinearConfig::new(k, n).with_scale(WeightScale::Group(64)).init_packed(&to);
            format.load(&mut loaded, &path).unwrap();
            assert_eq!(outputs(&loaded, &to), want);
        }
    }
}

/// What Burn does with modules besides saving them keeps a private packing and its results.
#[test]
fn mappers_of_burn_leave_packed_weights_alone() {
    let device = flex();
    for kind in [KINDS[1], KINDS[2]] {
        let layer = packed(kind, 1, &device);
        let want = outputs(&layer, &device);
        let mut quantizer = Quantizer::new(Calibration::MinMax, QuantScheme::default());
        let scales = ParamGroup::from_predicate("weight");
        for (what, mapped) in [
            ("no_grad", layer.clone().no_grad()),
            ("unfreeze", layer.clone().unfreeze()),
            ("valid", layer.clone().valid()),
            ("train", layer.clone().train().valid()),
            ("fork", layer.clone().fork(&device)),
            ("quantize", layer.clone().quantize_weights_group(&mut quantizer, scales)),
        ] {
            assert_eq!(outputs(&mapped, &device), want, "{what}");
            assert!(is_private(&mapped), "{what}");
        }
    }
}

#[test]
fn a_packed_layer_counts_its_weights() {
    let device = flex();
    for kind in KINDS {
        let latent = config(kind).init(&device);
        let (n, k) = (latent.d_output(), latent.d_input());
        for layer in [latent.clone(), latent.pack().unwrap(), config(kind).init_packed(&device)] {
            assert_eq!(layer.num_params(), n * k + n + k);
            assert!(layer.to_string().contains("params: 12592"), "{layer}");
        }
    }
}

#[test]
fn unpacked_weights_have_gradients_where_the_module_is_in_training() {
    let device = flex();
    let gradients = |layer: &BitLinear| {
        let BitLinearWeight::Latent(weight) = &layer.weight else { panic!("it is unpacked") };
        let x = Tensor::<2>::ones([2, SHAPE[1]], &device.clone().autodiff());
        weight.val().is_require_grad()
            && weight.val().grad(&layer.forward(x).sum().backward()).is_some_and(|g| g.dims() == SHAPE)
    };
    let trained = packed(KINDS[0], 1, &device.clone().autodiff());
    assert!(gradients(&trained.clone().unpack().unwrap()), "packed in training");
    let valid = trained.valid();
    let unpacked = valid.clone().unpack().unwrap();
    let BitLinearWeight::Latent(weight) = &unpacked.weight else { panic!("it is unpacked") };
    assert!(!weight.val().is_autodiff());
    assert!(gradients(&unpacked.train()) && gradients(&valid.train().unpack().unwrap()));
}

#[test]
fn what_is_not_finite_is_named() {
    let device = flex();
    let latent = || config(KINDS[0]).init(&device);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![0.5; 48 * 256];
        values[2 * 256 + 7] = bad;
        let mut layer = latent();
        let weight = Param::from_data(TensorData::new(values, SHAPE), &device);
        let id = weight.id;
        layer.weight = BitLinearWeight::Latent(weight);
        let error = layer.pack().unwrap_err().to_string();
        let expected = format!("weight [48, 256] (parameter {id}) is {bad} at row 2, column 7");
        assert!(error.contains(&expected), "{error}");
        let mut layer = latent();
        layer.bias = Some(Param::from_data(TensorData::new(vec![bad; 48], [48]), &device));
        let error = layer.pack().unwrap_err().to_string();
        assert!(error.contains("bias [48] (parameter"), "{error}");
    }
}

/// Machines differ in the kernels that they choose, and so in their private packings. This test is one machine for each
/// layout: a process whose kernel is forced. Each one saves, and each one loads what the others saved.
#[test]
fn records_cross_machines() {
    const DIRECTORY: &str = "LAYER_RECORDS_DIRECTORY";
    const NAME: &str = "LAYER_RECORDS_MACHINE";
    let device = flex();
    let file = |dir: &Path, machine: &str, kind: usize, format: Format| {
        dir.join(format!("{machine}-{kind}-{format:?}.bpk"))
    };
    let (Some(dir), Some(me)) = (std::env::var_os(DIRECTORY), std::env::var_os(NAME)) else {
        let dir = tempfile::tempdir().unwrap();
        let mut layouts = Vec::new();
        for kernel in manager::manager().report().kernels {
            let layout = (kernel.layout.clone(), kernel.many_scales);
            if is_ready(&kernel) && !layouts.iter().any(|(other, _)| *other == layout) {
                layouts.push((layout, kernel.kernel));
            }
        }
        assert!(layouts.len() >= 4, "{layouts:?}");
        for step in ["save", "load"] {
            for (i, (layout, kernel)) in layouts.iter().enumerate() {
                let private = if layout.0 == "canonical" { "canonical" } else { "private" };
                let machine = format!("{step}-{private}-{i}");
                let out = Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "records_cross_machines", "--nocapture"])
                    .env(DIRECTORY, dir.path())
                    .env(NAME, machine)
                    .env("BITNET_KERNEL", kernel)
                    .output()
                    .unwrap();
                assert!(out.status.success(), "{step} {layout:?}: {}", String::from_utf8_lossy(&out.stderr));
            }
        }
        return;
    };
    let (dir, me) = (Path::new(&dir), me.to_string_lossy().into_owned());
    let kinds = || KINDS.into_iter().enumerate().filter(|(_, kind)| kind.1 != ActivationRule::Float);
    let [step, layout, machine] = me.split('-').collect::<Vec<_>>().try_into().unwrap();
    match step {
        "save" => {
            let private = kinds().any(|(_, kind)| is_private(&packed(kind, 1, &device)));
            assert_eq!(private, layout == "private");
            for (i, kind) in kinds() {
                for format in Format::ALL {
                    format.save(&packed(kind, 1, &device), &file(dir, machine, i, format));
                }
            }
        }
        _ => {
            let machines = std::fs::read_dir(dir).unwrap().count() / (kinds().count() * Format::ALL.len());
            assert!(machines >= 2);
            for machine in 0..machines {
                for (i, kind) in kinds() {
                    let want = outputs(&packed(kind, 1, &device), &device);
                    for format in Format::ALL {
                        for mut target in [config(kind).init_packed(&device), packed(kind, 3, &device)] {
                            let path = file(dir, &machine.to_string(), i, format);
                            format.load(&mut target, &path).unwrap();
                            assert_eq!(outputs(&target, &device), want, "{machine} {kind:?} {format:?}");
                            assert_eq!(outputs(&target.repack().unwrap(), &device), want);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn records_cross_backends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.bpk");
    let (host, gpu) = (flex(), Device::wgpu(Default::default()));
    let words = |layer: &BitLinear| {
        layer
            .clone()
            .into_canonical()
            .unwrap()
            .matrix()
            .unwrap()
            .codes
            .into_data()
            .iter::<i64>()
            .collect::<Vec<_>>()
    };
    for kind in KINDS {
        for (from, to) in [(&host, &gpu), (&gpu, &host)] {
            let layer = packed(kind, 1, from);
            for format in Format::ALL {
                format.save(&layer, &path);
                let mut loaded = config(kind).init_packed(to);
                format.load(&mut loaded, &path).unwrap();
                assert_eq!(words(&loaded), words(&layer), "{kind:?}");
                let moved = loaded.to_device(from);
                assert_eq!(outputs(&moved, from), outputs(&layer, from), "{kind:?} {format:?} back again");
            }
        }
    }
}
