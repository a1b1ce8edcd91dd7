//! Matrices with many scales, by row or by group: every kernel, through the manager, and every device, against the reference.

use std::time::Duration;

use bitnet_burn::backends::manager::with_built_in_kernels;
use bitnet_burn::backends::ops::{self, BitLinearInput, MatrixScale, TernaryMatrix};
use bitnet_burn_formats::reference::{ScaledActivations, scaled_matmul};
use bitnet_burn_formats::{Scales, canonical};
use bitnet_burn_manager::memory::Activations;
use bitnet_burn_manager::{
    Job, KernelManager, LayoutPolicy, ManagerConfig, ManagerError, Packed, Scale, ScaleKind, Status, Strict,
    WeightShape,
};
use bitnet_burn_plugin::sdk;
use bitnet_burn_tests::*;
use burn::tensor::{Device, Tensor, TensorData};

/// Weights and activations that share a scale.
const GROUPS: [(usize, usize); 9] =
    [(0, 0), (0, 32), (0, 128), (32, 32), (64, 32), (64, 64), (128, 32), (128, 128), (256, 64)];

/// A matrix with scales of every kind, and activations for it.
struct Problem {
    shape: (usize, usize, usize),
    codes: Vec<u8>,
    scales: Scales,
    activations: usize,
    x: Vec<f32>,
}

impl Problem {
    fn new(
        random: &mut Random,
        (m, n, k): (usize, usize, usize),
        (group, activations): (usize, usize),
    ) -> Self {
        let half = random.below(2) == 0;
        let value = |random: &mut Random| match random.below(8) {
            0 => 0.0,
            1 => -0.5,
            2 => 2f32.powi(-20),
            _ => (1 + random.below(200)) as f32 / if half { 256.0 } else { 255.0 },
        };
        let groups = sdk::groups(k, group);
        let rows: Vec<f32> = (0..n * groups).map(|_| value(random)).collect();
        let codes = canonical_rows(&random.ternary(n * k), k);
        let mut x = random.floats(m * k);
        x.chunks_mut(32).enumerate().for_each(|(i, x)| match i % 7 {
            0 => x.fill(0.0),
            1 => x.iter_mut().for_each(|v| *v *= 100.0),
            2 => x.iter_mut().for_each(|v| *v *= 1e-7),
            _ => {}
        });
        let scales = Scales::from_rows(&rows, n, k, group).unwrap();
        Self { shape: (m, n, k), codes, scales, activations, x }
    }

    fn kind(&self) -> WeightShape {
        let (_, n, k) = self.shape;
        let (weights, half) = (self.scales.group(), self.scales.is_half());
        WeightShape { n, k, scales: ScaleKind::Groups { weights, activations: self.activations, half } }
    }

    fn quantised(&self) -> Activations {
        Activations::from_groups(&self.x, self.shape.2, self.activations)
    }

    fn expected(&self) -> Vec<f32> {
        let ((m, n, k), x) = (self.shape, self.quantised());
        let rows = ScaledActivations { m, q: x.q(), stride: x.stride(), group: x.group(), scale: x.scale() };
        let mut y = vec![0.0; m * n];
        scaled_matmul(&self.codes, (n, k), self.scales.as_sdk(), rows, &mut y, n);
        y
    }

    fn matrix(&self, device: &Device) -> TernaryMatrix {
        let (_, n, k) = self.shape;
        let scale = MatrixScale::Groups { scales: self.scales.clone(), activations: self.activations };
        TernaryMatrix::prepared(self.codes.clone().into(), scale, n, k, device).unwrap()
    }

    fn on(&self, device: &Device, quantise: bool) -> Vec<f32> {
        let (m, _, k) = self.shape;
        let x = Tensor::<2>::from_data(TensorData::new(self.x.clone(), [m, k]), device);
        let y =
            ops::bit_linear(x, BitLinearInput { norm: None, quantise }, vec![self.matrix(device)]).unwrap();
        y.into_data().iter::<f32>().collect()
    }
}

fn manager(force: Option<&str>, threads: usize) -> KernelManager {
    let config = ManagerConfig {
        threads,
        force: force.map(str::to_owned),
        tune_budget: Duration::ZERO,
        strict: Strict::ALL,
        ..ManagerConfig::default()
    };
    with_built_in_kernels(config).unwrap()
}

#[test]
fn every_kernel_equals_the_reference() {
    let kernels = manager(None, 1).report().kernels.into_iter();
    let kernels: Vec<_> =
        kernels.filter(|k| k.status == Status::Ready && k.many_scales).map(|k| k.kernel).collect();
    assert!(kernels.len() >= 2, "{kernels:?}");
    let mut random = Random(11);
    for kernel in kernels {
        for threads in [1, 3] {
            let manager = manager(Some(&kernel), threads);
            for groups in GROUPS {
                for shape in [(1, 1, 32), (1, 70, 300), (5, 33, 257), (40, 100, 640), (3, 64, 1000)] {
                    let problem = Problem::new(&mut random, shape, groups);
                    let (m, n, _) = shape;
                    let choice = manager.choose(problem.kind(), LayoutPolicy::Any).unwrap();
                    let packed = manager.pack(&choice, &problem.codes).unwrap();
                    let weights = match &packed {
                        Packed::Canonical => &problem.codes[..],
                        Packed::Private(buffer) => buffer.as_slice(),
                    };
                    let scale = Scale::Groups(problem.scales.as_sdk());
                    let job = |column| Job { choice: &choice, weights, scale, column };
                    // Two matrices side by side.
                    let mut y = vec![f32::NAN; m * (2 * n + 1)];
                    manager.matmul(&[job(0), job(n + 1)], &problem.quantised(), &mut y, 2 * n + 1).unwrap();
                    for (y, want) in y.chunks(2 * n + 1).zip(problem.expected().chunks(n)) {
                        assert_same_bits(&y[..n], want, &format!("{kernel} {threads} {shape:?} {groups:?}"));
                        assert_same_bits(
                            &y[n + 1..],
                            want,
                            &format!("{kernel} {threads} {shape:?} {groups:?}"),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let manager = manager(None, 1);
    let problem = Problem::new(&mut Random(3), (2, 40, 256), (64, 32));
    let choice = manager.choose(problem.kind(), LayoutPolicy::Canonical).unwrap();
    let job = Job { choice: &choice, weights: &problem.codes, scale: 1.0.into(), column: 0 };
    let mut y = vec![0.0; 80];
    let mut refused = |job: Job, x: &Activations, expected: &str| {
        let error = manager.matmul(&[job], x, &mut y, 40).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let x = problem.quantised();
    refused(job, &x, "other scales than those of weights [40, 256]");
    let other = Scales::from_rows(&[1.0; 40 * 2], 40, 256, 128).unwrap();
    refused(Job { scale: Scale::Groups(other.as_sdk()), ..job }, &x, "other scales");
    let job = Job { scale: Scale::Groups(problem.scales.as_sdk()), ..job };
    let of_64 = Activations::from_groups(&problem.x, 256, 64);
    refused(job, &of_64, "activations with scales of groups of 64");
    for (weights, activations) in [(64, 0), (64, 48), (32, 64), (100, 50)] {
        let scales = ScaleKind::Groups { weights, activations, half: false };
        let error = manager.choose(WeightShape { n: 4, k: 256, scales }, LayoutPolicy::Any).unwrap_err();
        assert!(matches!(error, ManagerError::Operands(_)), "{error}");
    }
}

#[test]
fn every_device_computes_the_reference() {
    setup();
    let mut random = Random(17);
    for groups in GROUPS {
        for shape in [(1, 5, 64), (3, 70, 384), (7, 33, 300)] {
            let problem = Problem::new(&mut random, shape, groups);
            let (expected, what) = (problem.expected(), format!("{shape:?} {groups:?}"));
            let float = problem.on(&Device::flex(), false);
            for device in devices() {
                let (y, reference) = (problem.on(&device, true), problem.on(&device, false));
                match ops::is_host(&device) {
                    true => assert_same_bits(&y, &expected, &format!("{what} on {device:?}")),
                    false => bounded(&problem, &y, &expected, &format!("{what} on {device:?}")),
                }
                let largest = float.iter().fold(0f32, |a, v| a.max(v.abs()));
                let difference = max_difference(&reference, &float);
                assert!(difference <= 1e-5 * largest, "{what} on {device:?}: {difference:e} of {largest:e}");
            }
        }
    }
}

/// The bound of devices without the fused operations: G * 2^-23 times the sum of the terms' magnitudes.
fn bounded(problem: &Problem, y: &[f32], expected: &[f32], what: &str) {
    let ((_, n, k), x) = (problem.shape, problem.quantised());
    let group = sdk::group_length(k, problem.activations);
    let of_weights = sdk::group_length(k, problem.scales.group());
    let groups = k.div_ceil(group);
    for (i, (y, want)) in y.iter().zip(expected).enumerate() {
        let (m, n) = (i / n, i % n);
        let row = canonical::Row(&problem.codes[n * canonical::row_bytes(k)..]);
        let term = |g: usize| {
            let part = g * group..k.min((g + 1) * group);
            let sum: i32 =
                part.map(|c| i32::from(x.q()[m * x.stride() + c]) * i32::from(row.weight(c))).sum();
            let scale = problem.scales.get(n, g * group / of_weights, k);
            f64::from(sum.unsigned_abs()) * f64::from(x.scale()[m * groups + g]) * f64::from(scale.abs())
        };
        // Once more for the quantiser's scale, which may be off by its last bit.
        let bound = (groups + 2) as f64 * 2f64.powi(-23) * (0..groups).map(term).sum::<f64>();
        let difference = f64::from((y - want).abs());
        assert!(difference <= bound, "{what}: y[{m}, {n}] = {y:e}, expected {want:e}, bound {bound:e}");
    }
}
