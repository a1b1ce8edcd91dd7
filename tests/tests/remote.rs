//! Layers on workers: in this process and in processes of their own, all over loopback.
#![cfg(feature = "remote")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bitnet_burn::BitNet;
use bitnet_burn::backends::devices;
use bitnet_burn::backends::ops::{self, BitLinearInput, MatrixScale, TernaryMatrix};
use bitnet_burn::backends::remote::{self, Worker};
use bitnet_burn::backends::{CacheType, DenseArgs};
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::generate;
use bitnet_burn_engine::generate::GenerateOptions;
use bitnet_burn_engine::load::{HeadMode, LoadOptions, ModelError, load_on};
use bitnet_burn_engine::plan::{CPU, PlacedModel, Placement, RunSettings};
use bitnet_burn_formats::{DenseFormat, Scales, canonical};
use bitnet_burn_tests::*;
use burn::backend::ir::{CustomOpIr, ScalarIr, TensorIr};
use burn::backend::{DispatchDevice, Remote};
use burn::remote::CustomOpClient;
use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};

/// More than a test may wait beyond the timeout of a worker that does not answer.
const PATIENCE: Duration = Duration::from_secs(20);

fn name(worker: &Worker) -> String {
    format!("{}{}", devices::REMOTE, worker.address())
}

/// Devices by their names in placements.
fn open(name: &str) -> Result<Device, ModelError> {
    match name {
        CPU => Ok(Device::flex()),
        other => devices::open(other).map_err(|problem| ModelError::Worker { problem }),
    }
}

fn checkpoint(path: &str) -> Checkpoint {
    setup();
    Checkpoint::open(&repository_golden().join(path), &Default::default()).unwrap()
}

fn placed(checkpoint: &Checkpoint, placement: &Placement, options: &LoadOptions) -> BitNet {
    let devices = placement.devices_of(&mut open).unwrap();
    load_on(checkpoint, &devices, options, &mut |_| {}).unwrap().model
}

fn over(parts: &[(&str, usize)], dense: &str) -> Placement {
    Placement::over(parts.iter().map(|&(name, count)| (name.to_owned(), count)), dense)
}

#[test]
fn a_pipeline_of_two_workers_computes_the_bits_of_one_process() {
    let (one, two) = (worker().unwrap(), worker().unwrap());
    let (first, second) = (name(&one), name(&two));
    for path in ["hf/A-packed-auto", "gguf/tiny_a-i2_s.gguf"] {
        let checkpoint = checkpoint(path);
        let (layers, vocabulary) = (checkpoint.config().n_layers, checkpoint.config().vocab_size);
        let tokens: Vec<u32> = (0..16).map(|i| (i * 37 + 11) % vocabulary as u32).collect();
        let half = layers / 2;
        let placements = [
            over(&[(&first, half), (&second, layers - half)], &second),
            over(&[(&first, half), (CPU, layers - half)], CPU),
            over(&[(CPU, half), (&second, layers - half)], &second),
            over(&[(&first, layers)], CPU),
        ];
        for head in [HeadMode::File, HeadMode::Requantised(DenseFormat::Q8_0)] {
            let options = LoadOptions { head, ..LoadOptions::default() };
            let local = placed(&checkpoint, &Placement::cpu_only(layers), &options);
            for placement in &placements {
                let model = placed(&checkpoint, placement, &options);
                for cache_type in [CacheType::F32, CacheType::F16, CacheType::Int8] {
                    for chunk in [256, 5] {
                        let want = all_logits(&local, &tokens, chunk, cache_type);
                        let got = all_logits(&model, &tokens, chunk, cache_type);
                        let same = want.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(
                            same && want.len() == got.len(),
                            "{path}: {placement}, {cache_type:?}, {head:?}, chunks of {chunk}"
                        );
                    }
                }
                assert_eq!(greedy(&model, &tokens, 24), greedy(&local, &tokens, 24), "{path}: {placement}");
            }
        }
    }
}

/// Experts are chosen here and computed there, with windows in the operations that go over.
#[test]
fn a_mixture_with_windows_computes_the_bits_of_one_process() {
    let Some(golden) = golden_dir("a mixture on a worker") else { return };
    let worker = worker().unwrap();
    let file = golden.join("2026/gguf/maple-small-q2_0.gguf");
    setup();
    let checkpoint = Checkpoint::open(&file, &Default::default()).unwrap();
    let tokens: Vec<u32> = (0..30).map(|i| (i * 37 + 11) % 317).collect();
    let options = LoadOptions::default();
    let local = placed(&checkpoint, &Placement::cpu_only(2), &options);
    let model = placed(&checkpoint, &over(&[(&name(&worker), 2)], CPU), &options);
    for (cache_type, chunk) in [(CacheType::F32, 256), (CacheType::Int8, 7)] {
        let [want, got] = [&local, &model].map(|model| all_logits(model, &tokens, chunk, cache_type));
        assert!(want == got, "{cache_type:?}, chunks of {chunk}");
    }
}

#[test]
fn a_session_is_shared_and_devices_are_named() {
    let worker = worker().unwrap();
    let address = worker.address().to_string();
    let device = remote::open(&address).unwrap();
    assert!(device == remote::open(&address).unwrap(), "one session for all layers");
    assert_eq!(devices::name(&device), name(&worker));
    assert!(devices::is_remote(&device) && !devices::is_remote(&Device::flex()));
    assert!(remote::computes_in_host_memory(&device) && !ops::is_host(&device));
}

/// Placed, tried out and reported as one that the program loads.
#[test]
fn a_placement_on_a_worker_is_loaded_and_one_that_is_gone_is_an_error_that_names_it() {
    let checkpoint = checkpoint("gguf/tiny_a-i2_s.gguf");
    let layers = checkpoint.config().n_layers;
    let settings = RunSettings { threads: 1, context: 64, kv_cache: CacheType::F16, rows: 16 };
    let (worker, gone) = (worker().unwrap(), worker().unwrap());
    let load = |placement: &Placement, open: &mut dyn FnMut(&str) -> Result<Device, ModelError>| {
        PlacedModel::load(&checkpoint, placement, &settings, &LoadOptions::default(), open, &mut |_| {})
    };
    let split = over(&[(&name(&worker), 1), (CPU, layers - 1)], CPU);
    let placed = load(&split, &mut open).unwrap();
    assert!(placed.placement == split && placed.notes.is_empty(), "{:?}", placed.notes);
    // It ends between opening and loading.
    let lost = name(&gone);
    let opened = open(&lost).unwrap();
    drop(gone);
    let split = over(&[(&lost, 1), (CPU, layers - 1)], CPU);
    let mut known = |name: &str| if name == lost { Ok(opened.clone()) } else { open(name) };
    let error = load(&split, &mut known).unwrap_err().to_string();
    assert!(error.contains(&lost) && error.contains("can't be where it was to be"), "{error}");
    // Nobody listens there now.
    let error = load(&split, &mut open).unwrap_err().to_string();
    assert!(error.contains(&lost) && error.contains("no worker answers there"), "{error}");
}

#[test]
fn an_address_without_a_worker_is_an_error_within_the_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let began = Instant::now();
    // It listens, and never answers.
    let error = remote::open_within(&address, Duration::from_millis(500), None).unwrap_err();
    assert!(error.contains(&address) && error.contains("has not answered for 0.5 s"), "{error}");
    drop(listener);
    let error = remote::open_within(&address, PATIENCE, None).unwrap_err();
    assert!(error.contains(&address) && error.contains("no worker answers there"), "{error}");
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    // It answers, but not as a worker does.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = (&stream).write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let error = remote::open_within(&address, PATIENCE, None).unwrap_err();
    assert!(error.contains(&address) && error.contains("no worker answers there"), "{error}");
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
}

/// Sends an operation as nobody's client does, and reads its last output.
fn ask(
    device: &Device,
    op: &'static str,
    inputs: &[TensorIr],
    outputs: &[(Vec<usize>, DType)],
    scalars: Vec<ScalarIr>,
) -> Result<TensorData, String> {
    let DispatchDevice::Remote(on_worker) = device.as_dispatch() else { panic!("a worker's device") };
    let client = CustomOpClient::new(on_worker);
    let out = |(shape, dtype): &(Vec<usize>, DType)| {
        TensorIr::uninit(client.create_empty_handle(), Shape::from(shape.clone()), *dtype)
    };
    let rank = outputs.last().unwrap().0.len();
    let outputs: Vec<_> = outputs.iter().map(out).collect();
    let y = client.register(CustomOpIr::with_scalars(op, inputs, &outputs, scalars)).pop().unwrap();
    match rank {
        3 => devices::read(Tensor::<3>::from_primitive::<Remote>(y)),
        _ => devices::read(Tensor::<2>::from_primitive::<Remote>(y)),
    }
}

/// What an operation would make of a request that nobody checked, so that its outputs' shapes give nothing away.
fn unchecked(op: &str, inputs: &[TensorIr], scalars: &[ScalarIr]) -> Vec<(Vec<usize>, DType)> {
    let float = |shape: &[usize]| (shape.to_vec(), DType::F32);
    match op {
        "bit_linear" => {
            let n = match scalars.last() {
                Some(&ScalarIr::UInt(n)) => n as usize,
                _ => 1,
            };
            vec![float(&[inputs[0].shape[0], n])]
        }
        "rms_norm" | "rope" => vec![float(&[2, 8])],
        "cache_append" if inputs.len() == 3 => vec![(vec![2, 8, 4], DType::I8), float(&[2, 8])],
        "cache_append" => vec![float(&[2, 8, 4])],
        "attention" => vec![float(&[1, 8])],
        "cached_attention" => vec![float(&[1, 8]), float(&[1, 8, 4]), float(&[1, 8, 4])],
        "gated" => vec![float(&[1, 3])],
        "dense_linear" => vec![float(&[1, 1])],
        "dense_rows" => vec![float(&[1, 32])],
        _ => vec![float(&[1, 4])],
    }
}

#[test]
fn requests_that_can_t_be_computed_end_their_session_and_not_the_worker() {
    let worker = worker().unwrap();
    let address = worker.address().to_string();
    let floats = |device: &Device, shape: [usize; 2]| {
        Tensor::<2>::ones(shape, device).try_into_primitive::<Remote>().unwrap().into_ir()
    };
    let vector = |device: &Device, k: usize| {
        Tensor::<1>::ones([k], device).try_into_primitive::<Remote>().unwrap().into_ir()
    };
    let cube = |device: &Device, shape: [usize; 3]| {
        Tensor::<3>::ones(shape, device).try_into_primitive::<Remote>().unwrap().into_ir()
    };
    let ints = |device: &Device, shape: [usize; 2], dtype: DType| {
        Tensor::<2, Int>::ones(shape, (device, dtype)).try_into_primitive::<Remote>().unwrap().into_ir()
    };
    let size = |value: u64| ScalarIr::UInt(value);
    let sizes = |values: &[u64]| values.iter().map(|&v| ScalarIr::UInt(v)).collect::<Vec<_>>();
    let (yes, no) = (ScalarIr::Bool(true), ScalarIr::Bool(false));
    let eps = ScalarIr::Float(1e-5);
    let linear = |k: u64, n: u64| vec![size(k), eps, yes, no, size(n)];
    let q8 = DenseFormat::Q8_0 as u64;
    type Request<'a> = (&'static str, Box<dyn Fn(&Device) -> (Vec<TensorIr>, Vec<ScalarIr>) + 'a>);
    let requests: Vec<Request> = vec![
        ("bit_linear", Box::new(|d| (vec![floats(d, [1, 128])], linear(128, 1)))),
        (
            "bit_linear",
            Box::new(|d| {
                (vec![floats(d, [1, 128]), ints(d, [4, 8], DType::U32), vector(d, 1)], linear(128, 5))
            }),
        ),
        (
            "bit_linear",
            Box::new(|d| {
                (vec![floats(d, [1, 128]), ints(d, [4, 8], DType::I32), vector(d, 1)], linear(128, 4))
            }),
        ),
        (
            "bit_linear",
            Box::new(|d| {
                (vec![floats(d, [1, 100]), ints(d, [4, 8], DType::U32), vector(d, 1)], linear(128, 4))
            }),
        ),
        (
            "bit_linear",
            Box::new(|d| {
                (vec![cube(d, [1, 1, 128]), ints(d, [4, 8], DType::U32), vector(d, 1)], linear(128, 4))
            }),
        ),
        (
            "bit_linear",
            Box::new(|d| {
                (vec![floats(d, [1, 128]), ints(d, [4, 8], DType::U32), vector(d, 2)], linear(128, 4))
            }),
        ),
        (
            "bit_linear",
            Box::new(|d| {
                (vec![floats(d, [0, 128]), ints(d, [0, 8], DType::U32), vector(d, 1)], linear(128, 0))
            }),
        ),
        (
            "bit_linear",
            Box::new(|d| {
                (vec![floats(d, [1, 128]), ints(d, [4, 8], DType::U32), vector(d, 1)], linear(u64::MAX, 4))
            }),
        ),
        ("bit_linear", Box::new(|d| (vec![floats(d, [1, 128])], vec![]))),
        // An output that no memory holds: a million rows of as many.
        (
            "bit_linear",
            Box::new(|d| {
                (
                    vec![floats(d, [1 << 20, 1]), ints(d, [1 << 16, 8], DType::U32), vector(d, 1)],
                    linear(1, 1 << 16),
                )
            }),
        ),
        ("rms_norm", Box::new(|d| (vec![floats(d, [2, 8]), vector(d, 7)], vec![eps]))),
        ("rms_norm", Box::new(|d| (vec![floats(d, [2, 8]), vector(d, 8)], vec![yes]))),
        ("rope", Box::new(|d| (vec![floats(d, [2, 8]), floats(d, [2, 2]), floats(d, [1, 2])], sizes(&[4])))),
        ("rope", Box::new(|d| (vec![floats(d, [2, 8]), floats(d, [2, 2]), floats(d, [2, 2])], sizes(&[0])))),
        ("cache_append", Box::new(|d| (vec![cube(d, [2, 8, 4]), floats(d, [2, 8])], sizes(&[7])))),
        ("cache_append", Box::new(|d| (vec![cube(d, [2, 8, 4]), floats(d, [2, 9])], sizes(&[0])))),
        (
            "cache_append",
            Box::new(|d| (vec![cube(d, [2, 8, 4]), vector(d, 2), floats(d, [2, 8])], sizes(&[0]))),
        ),
        (
            "attention",
            Box::new(|d| {
                (vec![floats(d, [1, 8]), cube(d, [2, 8, 4]), cube(d, [2, 8, 4])], sizes(&[2, 2, 4, 8, 0]))
            }),
        ),
        (
            "attention",
            Box::new(|d| {
                (vec![floats(d, [1, 8]), cube(d, [2, 8, 4]), cube(d, [2, 4, 4])], sizes(&[2, 2, 4, 5, 0]))
            }),
        ),
        (
            "attention",
            Box::new(|d| {
                (vec![floats(d, [1, 8]), cube(d, [2, 8, 4]), cube(d, [2, 8, 4])], sizes(&[2, 0, 4, 0, 0]))
            }),
        ),
        (
            "cached_attention",
            Box::new(|d| {
                let angles = || floats(d, [1, 2]);
                let qkv = floats(d, [1, 15]);
                let caches = [cube(d, [1, 8, 4]), cube(d, [1, 8, 4])];
                ([qkv, angles(), angles()].into_iter().chain(caches).collect(), sizes(&[2, 1, 4, 0, 0]))
            }),
        ),
        (
            "cached_attention",
            Box::new(|d| {
                let angles = || floats(d, [1, 2]);
                let qkv = floats(d, [1, 16]);
                let caches = [cube(d, [1, 8, 4]), cube(d, [1, 8, 4])];
                ([qkv, angles(), angles()].into_iter().chain(caches).collect(), sizes(&[2, 1, 4, 8, 0]))
            }),
        ),
        // Without the window.
        (
            "attention",
            Box::new(|d| {
                (vec![floats(d, [1, 8]), cube(d, [2, 8, 4]), cube(d, [2, 8, 4])], sizes(&[2, 2, 4, 0]))
            }),
        ),
        ("gated", Box::new(|d| (vec![floats(d, [1, 7])], vec![no]))),
        (
            "dense_linear",
            Box::new(|d| {
                (
                    vec![floats(d, [1, 32]), ints(d, [1, 8], DType::U32)],
                    vec![size(q8), size(1), size(32), no, no],
                )
            }),
        ),
        (
            "dense_linear",
            Box::new(|d| {
                (
                    vec![floats(d, [1, 32]), ints(d, [1, 9], DType::U32)],
                    vec![size(99), size(1), size(32), no, no],
                )
            }),
        ),
        (
            "dense_linear",
            Box::new(|d| {
                (
                    vec![floats(d, [1, 32]), ints(d, [1, 99], DType::U32)],
                    vec![size(0), size(1), size(32), yes, no],
                )
            }),
        ),
        (
            "dense_rows",
            Box::new(|d| {
                (
                    vec![ints(d, [1, 9], DType::U32), ints(d, [1, 1], DType::I32)],
                    vec![size(q8), size(1), size(32), no, no],
                )
            }),
        ),
        (
            "dense_rows",
            Box::new(|d| {
                let id = Tensor::<1, Int>::ones([1], (d, DType::I32))
                    .try_into_primitive::<Remote>()
                    .unwrap()
                    .into_ir();
                (vec![ints(d, [1, 9], DType::U32), id], vec![size(q8), size(1), size(32), no, no])
            }),
        ),
        ("unheard_of", Box::new(|_| (vec![], vec![]))),
    ];
    for (i, (op, request)) in requests.iter().enumerate() {
        let device = remote::open(&address).unwrap();
        let (inputs, scalars) = request(&device);
        let outputs = unchecked(op, &inputs, &scalars);
        let op: &'static str = Box::leak(format!("bitnet_burn::{op}").into_boxed_str());
        let problem = ask(&device, op, &inputs, &outputs, scalars).unwrap_err();
        assert!(problem.contains(&address), "{i}, {op}: {problem}");
    }
    // Bytes that are no session at all.
    for garbage in [&b"\0\0\0\0"[..], b"GET /session HTTP/1.1\r\n\r\n", &[0xff; 4096]] {
        TcpStream::connect(worker.address()).unwrap().write_all(garbage).unwrap();
    }
    let device = remote::open(&address).unwrap();
    let fine = devices::read(Tensor::<2>::ones([2, 2], &device) + 1.0).unwrap();
    assert_eq!(fine.iter::<f32>().collect::<Vec<_>>(), [2.0; 4], "and it still serves");
}

#[test]
fn int8_tiles_and_rows_of_codes_are_multiplied_there() {
    let worker = worker().unwrap();
    let device = remote::open(&worker.address().to_string()).unwrap();
    let mut random = Random(7);
    let (m, n, k) = (3, 20, 96);
    let rows: Vec<f32> = random.floats(n * k);
    let bytes: Vec<u8> = rows.iter().flat_map(|v| v.to_le_bytes()).collect();
    let args = DenseArgs::new(DenseFormat::Q8_0, n, k).with_int8().unwrap();
    let x = random.floats(m * k);
    let mut codes = vec![0u8; canonical::matrix_bytes(n, k).unwrap()];
    for row in codes.chunks_exact_mut(canonical::row_bytes(k)) {
        let values: Vec<i8> = (0..k).map(|_| (random.bits() % 3) as i8 - 1).collect();
        canonical::pack_row(&values, row);
    }
    let scales: Vec<f32> = random.floats(n * k.div_ceil(64));
    let scales = Scales::from_rows(&scales, n, k, 64).unwrap();
    let results = [Device::flex(), device].map(|device| {
        let x = || Tensor::<2>::from_data(TensorData::new(x.clone(), [m, k]), &device);
        let (words, args) =
            ops::dense_matrix((DenseFormat::F32, bytes.clone().into()), args, &device).unwrap();
        assert!(args.tiled);
        let matrix = || TernaryMatrix::prepared(codes.clone().into(), 0.5, n, k, &device).unwrap();
        let input = || BitLinearInput { norm: None, quantise: true };
        let y = ops::bit_linear(x(), input(), vec![matrix(), matrix(), matrix()]).unwrap();
        let float = BitLinearInput { norm: None, quantise: false };
        let reference = ops::bit_linear(x(), float, vec![matrix()]).unwrap();
        let scale = || MatrixScale::Groups { scales: scales.clone(), activations: 32 };
        let scaled = TernaryMatrix::prepared(codes.clone().into(), scale(), n, k, &device).unwrap();
        let scaled = ops::bit_linear(x(), input(), vec![scaled]).unwrap();
        let tensors = [ops::dense_linear(x(), words, args), y, reference, scaled];
        tensors.map(|y| devices::read(y).unwrap().iter::<f32>().map(f32::to_bits).collect::<Vec<_>>())
    });
    assert_eq!(results[0], results[1]);
}

/// A worker in a process of its own, this test binary's.
struct Process {
    child: Child,
    address: String,
}

impl Process {
    fn start(environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_worker_process", "--ignored", "--nocapture"]);
        command.env("BITNET_TEST_WORKER", "1").envs(environment.iter().copied());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = lines.find_map(|line| Some(line.unwrap().split_once("WORKER ")?.1.to_owned()));
        // Whatever else it prints, is printed here.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| println!("{line}")));
        Self { child, address: address.expect("it says where it listens") }
    }

    fn name(&self) -> String {
        format!("{}{}", devices::REMOTE, self.address)
    }

    #[cfg(unix)]
    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success(), "kill {name}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "the process that other tests start"]
fn a_worker_process() {
    if std::env::var_os("BITNET_TEST_WORKER").is_none() {
        return;
    }
    let worker = worker().unwrap();
    println!("WORKER {}", worker.address());
    panic!("{}", worker.wait());
}

/// Generates on a model whose first layer is on a worker, to which `harm` is done after the third token: the error,
/// and how long it took.
fn harmed(device: &Device, process: &str, harm: &mut dyn FnMut()) -> (String, Duration) {
    let checkpoint = checkpoint("gguf/tiny_a-i2_s.gguf");
    let layers = checkpoint.config().n_layers;
    let placement = over(&[(process, 1), (CPU, layers - 1)], CPU);
    let devices = placement
        .devices_of(&mut |name| if name == process { Ok(device.clone()) } else { open(name) })
        .unwrap();
    let model = load_on(&checkpoint, &devices, &LoadOptions::default(), &mut |_| {}).unwrap().model;
    let mut cache = model.cache(64, CacheType::F32).unwrap();
    let sequence = cache.add_sequence(64);
    let options = GenerateOptions { max_new_tokens: 40, ..GenerateOptions::default() };
    let (mut tokens, mut since) = (0, Instant::now());
    let error = generate::generate(&model, &[1, 2, 3], sequence, &mut cache, &options, &mut |_, _| {
        tokens += 1;
        if tokens == 3 {
            harm();
            since = Instant::now();
        }
        ControlFlow::Continue(())
    })
    .unwrap_err();
    (error.to_string(), since.elapsed())
}

#[test]
fn a_worker_that_is_killed_in_the_middle_is_an_error_at_once() {
    let mut process = Process::start(&[]);
    let (device, name) = (open(&process.name()).unwrap(), process.name());
    let (error, took) = harmed(&device, &name, &mut || {
        process.child.kill().unwrap();
        process.child.wait().unwrap();
    });
    assert!(error.contains("a device failed") && error.contains(&name), "{error}");
    assert!(took < PATIENCE, "{took:?}");
    // What is used of it afterwards is an error, too, and another worker is not harmed.
    let error = devices::read(Tensor::<1>::ones([4], &device)).unwrap_err();
    assert!(error.contains(&name), "{error}");
    let other = Process::start(&[]);
    let device = open(&other.name()).unwrap();
    assert!(devices::read(Tensor::<1>::ones([4], &device)).is_ok());
}

#[cfg(unix)]
#[test]
fn a_worker_that_is_stopped_is_an_error_within_the_timeout() {
    let limit = Duration::from_secs(2);
    let process = Process::start(&[]);
    let (device, name) = (remote::open_within(&process.address, limit, None).unwrap(), process.name());
    let (error, took) = harmed(&device, &name, &mut || process.signal("-STOP"));
    assert!(error.contains(&name) && error.contains("has not answered for 2 s"), "{error}");
    assert!(took < limit + PATIENCE, "{took:?}");
    process.signal("-CONT");
    // A stopped one is none while a model is loaded onto it, either: more bytes than sockets hold.
    let process = Process::start(&[]);
    let device = remote::open_within(&process.address, limit, None).unwrap();
    process.signal("-STOP");
    let began = Instant::now();
    let many: Vec<_> = (0..64)
        .map(|_| Tensor::<1>::from_data(TensorData::new(vec![1f32; 1 << 18], [1 << 18]), &device))
        .collect();
    let error = devices::read(many[63].clone()).unwrap_err();
    assert!(error.contains(&process.address) && error.contains("has not answered for 2 s"), "{error}");
    assert!(began.elapsed() < limit + PATIENCE, "{:?}", began.elapsed());
    process.signal("-CONT");
}

#[test]
fn what_strict_mode_forbids_on_a_worker_is_an_error_here() {
    let kernels = setup().report().kernels;
    let needs = |feature: &str| kernels.iter().find(|kernel| kernel.features.iter().any(|f| f == feature));
    let Some(simd) = needs("avx2").or_else(|| needs("neon")) else { return };
    // The one kernel that it may use lacks its instructions.
    let environment =
        [("BITNET_STRICT_MODE", "1"), ("BITNET_KERNEL", &simd.kernel), ("BITNET_CPU_MASK", "avx2,neon")];
    let process = Process::start(&environment);
    let device = open(&process.name()).unwrap();
    let (error, _) = harmed_at_once(&device, &process.name());
    for part in [&process.name(), "strict mode", simd.kernel.as_str()] {
        assert!(error.contains(part), "{error} names {part}");
    }
    // The error was told; the session goes on.
    let fine = devices::read(Tensor::<1>::ones([4], &device)).unwrap();
    assert_eq!(fine.iter::<f32>().sum::<f32>(), 4.0);
}

/// The error of the first token.
fn harmed_at_once(device: &Device, process: &str) -> (String, Duration) {
    harmed(device, process, &mut || unreachable!("there are no tokens"))
}

/// A worker's GPU, or what stands in for one, by the kernels that it chooses for canonical weights.
#[cfg(feature = "wgpu")]
#[test]
fn a_gpu_of_a_worker_computes_what_the_cpu_does() {
    use bitnet_burn_tests::reference::{Mutation, Reference};
    let path = "gguf/tiny_a-i2_s.gguf";
    let checkpoint = checkpoint(path);
    let (layers, vocabulary) = (checkpoint.config().n_layers, checkpoint.config().vocab_size);
    let tokens: Vec<u32> = (0..16).map(|i| (i * 37 + 11) % vocabulary as u32).collect();
    // Up to where a rounding may fall to the other side.
    let reference = Reference::from_gguf(&repository_golden().join(path));
    let certain = reference.forward(&tokens, Mutation::None).certain().min(tokens.len()) * vocabulary;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let worker = Worker::start(listener, &Device::wgpu(Default::default()), "wgpu").unwrap();
    let local = placed(&checkpoint, &Placement::cpu_only(layers), &LoadOptions::default());
    for dense in [CPU, &name(&worker)] {
        let model = placed(&checkpoint, &over(&[(&name(&worker), layers)], dense), &LoadOptions::default());
        for cache_type in cache_types(&model) {
            let want = all_logits(&local, &tokens, 5, cache_type);
            let got = all_logits(&model, &tokens, 5, cache_type);
            let difference = max_difference(&got[..certain], &want[..certain]);
            assert!(difference < 1e-3, "{cache_type:?}, {dense}: {difference:e}");
            assert!(max_difference(&got, &want) < 1.0, "{cache_type:?}, {dense}");
        }
        assert!(!remote::computes_in_host_memory(&model.layer_devices()[0]));
    }
}
