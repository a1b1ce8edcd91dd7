//! On a GPU, or what stands in for one.

use std::ffi::CStr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bitnet_burn_formats::canonical;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_manager::gpu::{GpuOperands, close};
use bitnet_burn_manager::memory::Activations;
use bitnet_burn_manager::plugin::{Plugin, Target};
use bitnet_burn_manager::{
    KernelManager, KernelReport, ManagerConfig, ManagerError, ManagerReport, Packed, Status,
};
use bitnet_burn_plugin::abi::{Plugin as RawPlugin, Signature};
use bitnet_burn_plugin::sdk::{GpuKernel, KernelResult, Language, WeightsRef, source};

use bitnet_burn_manager::ScaleKind;
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};

use super::{body, choice};
use crate::extension::{BitLinearArgs, InputNorm, Matrix, MatrixKernels, TernaryWeight};

/// A text whose threads have one output each, and which does `$statement` before it stores the sum.
macro_rules! text {
    ($weight:literal, $statement:literal) => {
        source(concat!(
            "struct Row { scale: f32, sum: i32 }
            @group(0) @binding(0) var<storage, read_write> w: array<u32>;
            @group(0) @binding(1) var<storage, read_write> s: array<f32>;
            @group(0) @binding(2) var<storage, read_write> x: array<u32>;
            @group(0) @binding(3) var<storage, read_write> rows: array<Row>;
            @group(0) @binding(4) var<storage, read_write> p: array<u32>;
            @group(0) @binding(5) var<storage, read_write> y: array<f32>;
            @compute @workgroup_size(8, 8)
            fn one_each(@builtin(global_invocation_id) id: vec3<u32>) {
                let n = id.x;
                let m = id.y;
                if (n >= p[1] || m >= p[0]) { return; }
                var sum = 0;
                for (var k = 0u; k < p[2]; k++) {
                    let q = extractBits(bitcast<i32>(x[m * p[3] + k / 4u]), k % 4u * 8u, 8u);
                    sum += q * (",
            $weight,
            ");
                }
                ",
            $statement,
            "
                y[m * p[4] + p[5] + n] = f32(sum) * (s[0] * rows[m].scale);
            }\0"
        ))
    };
}

macro_rules! canonical_text {
    ($statement:literal) => {
        text!(
            "i32((w[n * ((p[2] + 127u) / 128u * 8u) + (k / 128u * 32u + k % 32u) / 4u] >> (k % 4u * 8u + 6u - 2u * (k \
             % 128u / 32u))) & 3u) - 1",
            $statement
        )
    };
}

macro_rules! kernel {
    ($type:ident, $name:literal, $source:expr $(, $more:item)*) => {
        struct $type;

        impl GpuKernel for $type {
            const NAME: &'static CStr = $name;
            const LANGUAGE: Language = Language::Wgsl;
            const SOURCE: &'static CStr = $source;
            const ENTRY: &'static CStr = c"one_each";
            const WORKGROUP: [u32; 3] = [8, 8, 1];
            const TILE: [u32; 2] = [8, 8];
            $($more)*
        }
    };
}

kernel!(Plain, c"plain", canonical_text!(""));
kernel!(WrongForSix, c"wrong-for-six", canonical_text!("if (p[0] == 6u && n == p[1] - 1u) { sum += 1; }"));
// Whoever counts calls on a device does so in memory that outlives them: here, what the weights' scale was.
kernel!(WrongForLargeScales, c"wrong-for-large-scales", canonical_text!("if (s[0] > 100.0) { sum += 1; }"));
kernel!(
    WritesWeights,
    c"writes-weights",
    canonical_text!("if (s[0] > 100.0 && m == 0u && n == 0u) { w[0] = 0x55555555u; }")
);
kernel!(NoText, c"no-text", source("no shader at all\0"));
kernel!(
    Bytes,
    c"bytes",
    text!("extractBits(bitcast<i32>(w[n * ((p[2] + 3u) / 4u) + k / 4u]), k % 4u * 8u, 8u)", ""),
    const LAYOUT: Option<&'static CStr> = Some(c"bytes");,
    fn granule_bytes(k: usize) -> usize {
        k.next_multiple_of(4)
    },
    fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        out.fill(0);
        let k = canonical.k();
        for (row, out) in rows.zip(out.chunks_exact_mut(Self::granule_bytes(k))) {
            for (i, out) in out[..k].iter_mut().enumerate() {
                *out = canonical.canonical_row(row).weight(i) as u8;
            }
        }
        Ok(())
    },
    fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        let k = packed.k();
        for (row, out) in rows.zip(out.chunks_exact_mut(canonical::row_bytes(k))) {
            let weights: Vec<i8> =
                packed.data()[row * Self::granule_bytes(k)..][..k].iter().map(|&w| w as i8).collect();
            canonical::pack_row(&weights, out);
        }
        Ok(())
    }
);
kernel!(
    BytesWrongForSix,
    c"bytes-wrong-for-six",
    text!(
        "extractBits(bitcast<i32>(w[n * ((p[2] + 3u) / 4u) + k / 4u]), k % 4u * 8u, 8u)",
        "if (p[0] == 6u) { sum -= 1; }"
    ),
    const LAYOUT: Option<&'static CStr> = Some(c"bytes");,
    fn supports(_: &Signature) -> bool {
        true
    },
    fn granule_bytes(k: usize) -> usize {
        Bytes::granule_bytes(k)
    },
    fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        Bytes::pack(canonical, rows, out)
    },
    fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        Bytes::unpack(packed, rows, out)
    }
);
kernel!(
    PacksWrongly,
    c"packs-wrongly",
    text!("1", ""),
    const LAYOUT: Option<&'static CStr> = Some(c"nothing");,
    fn granule_bytes(k: usize) -> usize {
        k
    },
    fn pack(_: &WeightsRef, _: Range<usize>, out: &mut [u8]) -> KernelResult {
        out.fill(0);
        Ok(())
    },
    fn unpack(_: &WeightsRef, _: Range<usize>, out: &mut [u8]) -> KernelResult {
        out.fill(canonical::ZERO_BYTE);
        Ok(())
    }
);

bitnet_burn_plugin::plugin! {
    static PLUGIN = {
        name: c"test",
        version: c"1.2.3",
        kernels: [],
        gpu_kernels: [
            Plain, WrongForSix, WrongForLargeScales, WritesWeights, NoText, Bytes, BytesWrongForSix, PacksWrongly,
        ],
    };
}

bitnet_burn_plugin::plugin! {
    static RIGHT = { name: c"right", version: c"1.2.3", kernels: [], gpu_kernels: [NoText, Plain, Bytes] };
}

/// A manager with the CPU's kernels and those of a plugin, of which one may be forced. It lives as long as the process,
/// as the manager of Burn's operations does.
fn manager_of(
    plugin: &'static RawPlugin,
    force: Option<&str>,
    tune_budget: Duration,
) -> &'static KernelManager {
    let config = ManagerConfig {
        threads: 2,
        force: force.map(str::to_owned),
        tune_budget,
        ..ManagerConfig::default()
    };
    let manager = KernelManager::new(config).unwrap();
    manager.register(Plugin::built_in(&bitnet_burn_cpu::PLUGIN).unwrap()).unwrap();
    manager.register(Plugin::built_in(plugin).unwrap()).unwrap();
    Box::leak(Box::new(manager))
}

fn forced(name: &str) -> &'static KernelManager {
    manager_of(&PLUGIN, Some(name), Duration::ZERO)
}

fn device() -> CubeDevice {
    CubeDevice::wgpu(Default::default()).unwrap()
}

fn tensor<T: bytemuck::Pod>(values: &[T], shape: [usize; 2], dtype: DType) -> CubeTensor {
    let (device, client) = (device(), device().client());
    let handle = client.create_from_slice(bytemuck::cast_slice(values));
    CubeTensor::new_contiguous(client, device, Shape::new(shape), handle, dtype)
}

/// Rows and matrices over them, prepared by a manager for the device.
struct Problem {
    manager: &'static KernelManager,
    k: usize,
    scale: f32,
    /// Canonical bytes and output features.
    matrices: Vec<(Vec<u8>, usize)>,
    weights: Vec<(CubeTensor, CubeTensor)>,
    args: BitLinearArgs,
}

impl Problem {
    fn new(manager: &'static KernelManager, k: usize, ns: &[usize], scale: f32) -> Self {
        let mut random = SplitMix64::new(k as u64);
        let matrices: Vec<_> = ns.iter().map(|&n| (random.weights(n, k), n)).collect();
        let (mut weights, mut chosen) = (Vec::new(), Vec::new());
        for (bytes, n) in &matrices {
            let prepared = choice::choose_and_pack(manager, &device(), *n, k, bytes).unwrap();
            let (choice, bytes) = match &prepared {
                None => (None, &bytes[..]),
                Some((_, Packed::Canonical)) => (prepared.map(|(matrix, _)| matrix), &bytes[..]),
                Some((_, Packed::Private(_))) => {
                    let Some((matrix, Packed::Private(buffer))) = prepared else { unreachable!() };
                    let words = bitnet_burn_manager::gpu::le_words(buffer.as_slice());
                    weights.push(tensor(&words, [1, words.len()], DType::U32));
                    (Some(matrix), &[][..])
                }
            };
            if !bytes.is_empty() {
                let words = bitnet_burn_manager::gpu::le_words(bytes);
                weights.push(tensor(&words, [*n, words.len() / n], DType::U32));
            }
            chosen.push(Matrix {
                n: *n,
                scales: ScaleKind::One,
                choice: choice.map(|matrix| MatrixKernels::Gpu(Arc::new(matrix))),
            });
        }
        let scales = tensor(&[scale], [1, 1], DType::F32);
        let weights = weights.into_iter().map(|codes| (codes, scales.clone())).collect();
        let args = BitLinearArgs { k, matrices: chosen, eps: 0.0, quantise: true };
        Self { manager, k, scale, matrices, weights, args }
    }

    fn weights(&self) -> Vec<TernaryWeight<CubeBackend>> {
        let weight = |(codes, scale): &(CubeTensor, CubeTensor)| TernaryWeight {
            codes: codes.clone(),
            scale: scale.clone(),
        };
        self.weights.iter().map(weight).collect()
    }

    /// Computes m rows, and compares them with what the CPU makes of the activations as the device quantised them.
    fn check(&self, m: usize, seed: u64) {
        let mut random = SplitMix64::new(seed);
        let x: Vec<f32> = (0..m * self.k).map(|_| random.below(20001) as f32 / 1000.0 - 10.0).collect();
        let x = tensor(&x, [m, self.k], DType::F32);
        let y = body::with_kernels(self.manager, input(&x), self.weights(), &self.args).unwrap();
        let got: Vec<f32> = body::read(&y.client, &y.handle).unwrap();
        let activations = quantised(&x);
        let total: usize = self.matrices.iter().map(|(_, n)| n).sum();
        assert_eq!(got.len(), m * total);
        let mut column = 0;
        for (weights, n) in &self.matrices {
            let mut want = vec![0f32; m * n];
            let (q, stride, scale) = (activations.q(), activations.stride(), activations.scale());
            bitnet_burn_formats::reference::matmul(
                weights, *n, self.k, self.scale, q, stride, scale, m, &mut want, *n,
            );
            for (i, want) in want.iter().enumerate() {
                let got = got[i / n * total + column + i % n];
                assert!(
                    bitnet_burn_manager::gpu::close(got, *want),
                    "[{}, {}] of {n}: {got:e} {want:e}",
                    i / n,
                    i % n
                );
            }
            column += n;
        }
    }
}

/// Rows as the device's kernel quantises them.
fn quantised(x: &CubeTensor) -> Activations {
    body::read_activations(&x.client, &input(x).quantise()).unwrap()
}

fn input(x: &CubeTensor) -> body::Input {
    body::Input::new(x.clone(), InputNorm::None, 0.0)
}

fn kernel(report: &ManagerReport, id: &str) -> KernelReport {
    report.kernels.iter().find(|kernel| kernel.kernel == id).unwrap().clone()
}

#[test]
fn rows_are_quantised_as_on_the_host() {
    let mut random = SplitMix64::new(3);
    for (m, k) in [(1, 1), (3, 63), (2, 64), (5, 130), (1, 2560), (300, 17)] {
        let mut x: Vec<f32> = (0..m * k).map(|_| random.below(2001) as f32 / 64.0 - 15.625).collect();
        // A row of zeros, ties, and the largest magnitude at the end.
        x[..k].fill(0.0);
        if m > 2 {
            x[k..2 * k].iter_mut().enumerate().for_each(|(i, x)| *x = (i % 7) as f32 + 0.5);
            x[2 * k - 1] = -127.0;
        }
        let (got, want) = (quantised(&tensor(&x, [m, k], DType::F32)), Activations::from_rows(&x, k));
        assert_eq!((got.q(), got.sum()), (want.q(), want.sum()), "[{m}, {k}]");
        for (got, want) in got.scale().iter().zip(want.scale()) {
            assert!(bitnet_burn_manager::gpu::close(*got, *want), "[{m}, {k}]: {got:e} {want:e}");
        }
    }
    // What is not finite does not pass for a number.
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let x = [1.0, 2.0, odd, 4.0, 1.0, 2.0, 3.0, 4.0];
        let got = quantised(&tensor(&x, [2, 4], DType::F32));
        assert!(got.scale()[0].is_nan() && got.q()[..4] == [0; 4] && got.sum()[0] == 0, "{odd}");
        assert_eq!((&got.q()[64..68], got.scale()[1]), (&[32, 64, 95, 127][..], 4.0 / 127.0), "{odd}");
    }
}

#[test]
fn a_forced_kernel_computes_what_the_reference_does() {
    for (name, layout) in [("plain", None), ("bytes", Some("test/bytes"))] {
        let manager = forced(name);
        for (k, ns) in [(128, &[32][..]), (130, &[7, 9, 64]), (1, &[1, 1]), (700, &[33, 5])] {
            let problem = Problem::new(manager, k, ns, 0.37);
            for matrix in &problem.args.matrices {
                assert_eq!(matrix.choice.as_ref().unwrap().layout(), layout, "{name}");
            }
            // The first time compared, then believed.
            for m in [1, 1, 3, 3, 70, 70] {
                problem.check(m, (m + k) as u64);
            }
        }
        let report = manager.report();
        let (used, calls) = (kernel(&report, &format!("test/{name}")), 6 * (1 + 3 + 2 + 2));
        assert_eq!((used.calls, used.failures.total(), used.target.as_str()), (calls, 0, "wgsl"));
        assert!(report.fallbacks.is_empty() && report.reference_calls == 0, "{report:?}");
    }
}

/// Those for few rows, and those for many.
fn cubecl_kernels() -> Vec<bitnet_burn_manager::GpuKernel> {
    let manager = manager_of(&bitnet_burn_cube::PLUGIN, None, Duration::ZERO);
    let mut kernels = Vec::new();
    for m in [1, 17] {
        kernels.extend(manager.gpu_kernels(Target::CubeCl, (m, 100, 256)));
    }
    assert_eq!(kernels.len(), 9);
    kernels
}

/// The manager does not offer them for lavapipe, which does not say that it has subgroups, and has them.
#[test]
fn kernels_over_subgroups_compute_what_the_reference_does() {
    let device = super::open_gpu().unwrap();
    let mut random = SplitMix64::new(11);
    let mut tried = 0;
    for kernel in cubecl_kernels().iter().filter(|kernel| !kernel.kernel().features().is_empty()) {
        let kernel = kernel.kernel();
        for (m, n, k) in [(1, 1, 1), (3, 33, 130), (16, 130, 2560), (1, 40, 6912)] {
            let weights = random.weights(n, k);
            let x: Vec<f32> = (0..m * k).map(|_| random.below(2001) as f32 / 100.0 - 10.0).collect();
            let x = Activations::from_rows(&x, k);
            let mut want = vec![0f32; m * n];
            let (q, stride, scale) = (x.q(), x.stride(), x.scale());
            bitnet_burn_formats::reference::matmul(&weights, n, k, 0.37, q, stride, scale, m, &mut want, n);
            let mut y = vec![f32::NAN; m * n];
            device.run(kernel, &GpuOperands::new(&weights, 0.37, &x, n, n, 0), &mut y).unwrap();
            for (got, want) in y.iter().zip(&want) {
                assert!(close(*got, *want), "{} [{m}, {n}, {k}]: {got:e} {want:e}", kernel.id());
            }
            tried += 1;
        }
    }
    assert_eq!(tried, 2 * 4);
}

#[test]
fn every_cubecl_kernel_computes_what_the_reference_does() {
    for kernel in cubecl_kernels().into_iter().filter(|kernel| kernel.kernel().features().is_empty()) {
        let name = kernel.kernel().id();
        let manager = manager_of(&bitnet_burn_cube::PLUGIN, Some(name), Duration::ZERO);
        let rows = if name.starts_with("cube/gemv") { [1, 3, 16] } else { [17, 65, 130] };
        // Less than a tile, one more than one, several; less than a block of 128, one more, many.
        for (k, ns) in [(128, &[32][..]), (130, &[7, 9, 65]), (1, &[1, 1]), (2560, &[130, 40]), (6912, &[33])]
        {
            let problem = Problem::new(manager, k, ns, 0.37);
            // The first time compared, then believed.
            for m in rows.into_iter().flat_map(|m| [m, m]) {
                problem.check(m, (m + k) as u64);
            }
        }
        let report = manager.report();
        let used = self::kernel(&report, name);
        assert_eq!((used.calls, used.failures.total(), used.target.as_str()), (6 * 9, 0, "cubecl"), "{name}");
        assert!(report.fallbacks.is_empty() && report.reference_calls == 0, "{report:?}");
    }
}

#[test]
fn a_kernel_that_is_wrong_for_a_new_shape_is_quarantined_and_the_result_is_right() {
    for name in ["wrong-for-six", "bytes-wrong-for-six"] {
        let manager = forced(name);
        let problem = Problem::new(manager, 300, &[40, 20], 0.37);
        for m in [1, 5, 6, 6, 1] {
            problem.check(m, m as u64);
        }
        let report = manager.report();
        let Status::Quarantined(reason) = kernel(&report, &format!("test/{name}")).status else {
            panic!("{report:?}")
        };
        assert!(reason.contains(&format!("kernel test/{name}, [6, 300] x [40, 300]ᵀ: y[0, ")), "{reason}");
        assert!(reason.contains("cpu/"), "the CPU's kernel is what it was compared with: {reason}");
        // With it all kernels of its plugin.
        assert!(matches!(kernel(&report, "test/plain").status, Status::Quarantined(_)));
        let [fallback] = &report.fallbacks[..] else { panic!("{report:?}") };
        assert_eq!(
            (fallback.replacement.as_str(), fallback.count, fallback.shape),
            ("default body", 1, (6, 40, 300))
        );
    }
}

#[test]
fn a_kernel_that_becomes_wrong_is_found_by_the_samples() {
    let manager = forced("wrong-for-large-scales");
    let problem = Problem::new(manager, 128, &[16], 0.5);
    problem.check(2, 1);
    // The same shape, for which it is known; other weights, for which it is wrong.
    let wrong = Problem::new(manager, 128, &[16], 512.0);
    let mut random = SplitMix64::new(9);
    let x: Vec<f32> = (0..256).map(|_| random.below(100) as f32 - 50.0).collect();
    let x = tensor(&x, [2, 128], DType::F32);
    let quarantined = |manager: &KernelManager| {
        matches!(kernel(&manager.report(), "test/wrong-for-large-scales").status, Status::Quarantined(_))
    };
    let mut calls = 0;
    while !quarantined(manager) {
        body::with_kernels(manager, input(&x), wrong.weights(), &wrong.args).unwrap();
        calls += 1;
        assert!(calls < 300, "not found");
    }
    let fallback = &manager.report().fallbacks[0];
    assert!(
        fallback.reason.contains("the reference has") && fallback.reason.contains("(call 2 of the kernel)"),
        "{fallback:?}"
    );
    wrong.check(2, 1);
}

#[test]
fn weights_that_a_text_wrote_into_are_found_and_not_used_again() {
    let manager = forced("writes-weights");
    Problem::new(manager, 128, &[16], 0.5).check(2, 1);
    // The same shape, for which it is known; weights that it writes into.
    let problem = Problem::new(manager, 128, &[16], 512.0);
    let x = tensor(&[1.0; 256], [2, 128], DType::F32);
    let call = || body::with_kernels(manager, input(&x), problem.weights(), &problem.args);
    let mut calls = 0;
    let error = loop {
        match call() {
            Ok(_) => calls += 1,
            Err(error) => break error,
        }
        assert!(calls < 300, "not found");
    };
    let damaged = |error: &ManagerError| matches!(error, ManagerError::Damaged { what: "its weights", .. });
    assert!(damaged(&error), "{error}");
    let status = kernel(&manager.report(), "test/writes-weights").status;
    assert!(matches!(status, Status::Quarantined(_)), "{status:?}");
    assert!(manager.results_in_doubt() >= calls, "{calls} results were used before");
    assert!(damaged(&call().unwrap_err()));
}

#[test]
fn a_text_that_does_not_compile_leaves_the_default_body_and_the_weights() {
    let manager = forced("no-text");
    let problem = Problem::new(manager, 256, &[24, 8], 0.37);
    for m in [1, 4, 1] {
        problem.check(m, 5);
    }
    let report = manager.report();
    let used = kernel(&report, "test/no-text");
    // Once for each shape of weights.
    assert_eq!((used.calls, used.failures.status, used.status), (0, 2, Status::Ready));
    assert!(report.fallbacks[0].reason.contains("WGSL compilation failed"), "{:?}", report.fallbacks);
}

#[test]
fn a_kernel_that_packs_wrongly_is_quarantined_before_it_computes() {
    let manager = forced("packs-wrongly");
    let problem = Problem::new(manager, 128, &[8], 0.37);
    assert!(problem.args.matrices[0].choice.is_none(), "nothing is left but the default body");
    problem.check(2, 5);
    let Status::Quarantined(reason) = kernel(&manager.report(), "test/packs-wrongly").status else {
        panic!("it packs wrongly")
    };
    assert!(reason.contains("unpack(pack(w)) differs from w"), "{reason}");
}

#[test]
fn measurements_decide_and_are_remembered() {
    // Without time for measurements no kernel is preferred to the default body.
    let none = manager_of(&RIGHT, None, Duration::ZERO);
    assert!(Problem::new(none, 128, &[64], 0.37).args.matrices[0].choice.is_none());
    let manager = manager_of(&RIGHT, None, Duration::from_secs(300));
    let problem = Problem::new(manager, 512, &[96], 0.37);
    // Decode, rows in between, prefill.
    assert_eq!(manager.report().tuned, 4);
    for m in [1, 32] {
        problem.check(m, 4);
    }
    Problem::new(manager, 512, &[96], 0.37).check(1, 4);
    assert_eq!(manager.report().tuned, 4, "measured once");
    let client = device().client();
    let name = &client.properties().identity.name;
    for m in [1, 3, 8, 32] {
        let signature = format!("ternary m={m} n=96 k=512 device={} {name}", client.name());
        let measurements = manager.measurements(&signature).expect("measured");
        println!("{signature}: {measurements:?}");
        let names: Vec<_> = measurements.iter().map(|m| m.kernel.as_str()).collect();
        assert_eq!(names, ["right@1.2.3/no-text", "right@1.2.3/plain", "right@1.2.3/bytes", "default body"]);
        assert!(measurements[0].median_ns.is_none() && measurements[0].note.is_some(), "{measurements:?}");
        // What was not timed has its reason.
        assert!(measurements.iter().all(|m| m.median_ns.is_some() || m.note.is_some()), "{measurements:?}");
        assert!(measurements.iter().any(|m| m.runs > 0), "{measurements:?}");
    }
}
