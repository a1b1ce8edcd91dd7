//! What a model computes beside its ternary layers, by the kernels for GPUs (or what stands in for one, lavapipe) and by
//! the bodies for host memory. Without an adapter this fails: whoever builds the feature wants it tested.
#![cfg(feature = "wgpu")]

use bitnet_burn::RotaryEncodingConfig;
use bitnet_burn::backends::ops::{self, CacheLayer};
use bitnet_burn::backends::{AttentionArgs, CacheType, DenseArgs, GatedActivation};
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_manager::memory::PageArena;
use bitnet_burn_tests::*;
use burn::tensor::{DType, Device, Tensor};

fn gpu() -> Device {
    Device::wgpu(Default::default())
}

/// An operation on the GPU as on the host.
fn agree<const D: usize>(what: &str, tolerance: f32, f: impl Fn(&Device) -> Tensor<D>) {
    close(what, &values(f(&gpu())), &values(f(&Device::flex())), tolerance);
}

#[test]
fn norms_and_gated_activations_are_those_of_the_host() {
    setup();
    let mut random = Random(1);
    for (m, k) in [(1, 1), (1, 64), (5, 256), (33, 100), (2, 6912)] {
        let (x, w) = (random.floats(m * k), random.floats(k));
        agree("rms_norm", 1e-6, |device| {
            ops::rms_norm(tensor(&x, [m, k], device), tensor(&w, [k], device), 1e-5)
        });
        // A view of wider rows.
        agree("rms_norm of a part", 1e-6, |device| {
            let x = tensor(&x, [m, k], device).slice([0..m, k / 2..k]);
            ops::rms_norm(x, tensor(&w[k / 2..], [k - k / 2], device), 1e-5)
        });
    }
    for (m, f) in [(1, 8), (9, 123), (3, 6912)] {
        let x: Vec<f32> = random.floats(m * 2 * f).iter().map(|v| v * 8.0).collect();
        for activation in [GatedActivation::Relu2, GatedActivation::Silu] {
            agree("gated", 1e-6, |device| ops::gated(tensor(&x, [m, 2 * f], device), activation));
        }
    }
}

/// A sequence on a device, of one layer.
struct Sequence<'a> {
    device: &'a Device,
    args: AttentionArgs,
    caches: Option<(CacheLayer, CacheLayer)>,
}

impl<'a> Sequence<'a> {
    fn new(device: &'a Device, args: AttentionArgs, cache_type: CacheType, capacity: usize) -> Self {
        let shape = [args.n_kv_heads, capacity, args.head_dim];
        let empty = || CacheLayer::zeros(cache_type, shape, device, &PageArena::default());
        Self { device, args, caches: Some((empty(), empty())) }
    }

    /// Attends the next rows.
    fn attend(&mut self, qkv: &[f32]) -> Vec<f32> {
        let AttentionArgs { n_heads, n_kv_heads, head_dim, position, .. } = self.args;
        let width = (n_heads + 2 * n_kv_heads) * head_dim;
        let m = qkv.len() / width;
        let positions: Vec<usize> = (position..position + m).collect();
        let rotary = RotaryEncodingConfig::new(head_dim).with_theta(500_000.0).init();
        let angles = rotary.angles(&positions, positions.len(), self.device);
        let qkv = tensor(qkv, [m, width], self.device);
        let (context, caches) = ops::cached_attention(qkv, angles, self.caches.take().unwrap(), self.args);
        self.caches = Some(caches);
        self.args.position += m;
        values(context)
    }

    /// What its cache holds, as floats.
    fn cached(&self) -> Vec<f32> {
        let (keys, cached) = self.caches.clone().unwrap();
        let floats = |cache| match cache {
            CacheLayer::Float(tensor) => values(tensor),
            CacheLayer::Int8 { codes, scale } => {
                let bytes: Vec<i8> = match codes.dtype() {
                    DType::U32 => bytemuck_i8(codes.into_data().iter::<i64>().map(|word| word as u32)),
                    _ => codes.into_data().iter::<i64>().map(|code| code as i8).collect(),
                };
                let scale = values(scale);
                let d = bytes.len() / scale.len();
                bytes.iter().enumerate().map(|(i, &code)| f32::from(code) * scale[i / d]).collect()
            }
        };
        [floats(keys), floats(cached)].concat()
    }
}

/// The bytes of words.
fn bytemuck_i8(words: impl Iterator<Item = u32>) -> Vec<i8> {
    words.flat_map(|word| word.to_le_bytes()).map(|byte| byte as i8).collect()
}

#[test]
fn attention_over_every_type_of_cache_is_that_of_the_host() {
    setup();
    let mut random = Random(2);
    let (gpu, host) = (gpu(), Device::flex());
    let all = &[CacheType::F32, CacheType::F16, CacheType::Int8][..];
    // Compiling takes its time on a processor. Heads of a group that fit one workgroup, and that don't; widths that are
    // no multiple of the threads.
    let shapes = [
        ((20, 5, 128), None, all),
        ((7, 1, 20), None, all),
        ((3, 3, 12), None, &all[..1]),
        ((16, 1, 256), None, &all[1..2]),
        // Windows within a chunk, and of a chunk and more.
        ((7, 1, 20), Some(37), &all[..1]),
        ((7, 1, 20), Some(70), &all[2..]),
    ];
    for ((n_heads, n_kv_heads, head_dim), window, cache_types) in shapes {
        let args = AttentionArgs { n_heads, n_kv_heads, head_dim, position: 0, window };
        let width = (n_heads + 2 * n_kv_heads) * head_dim;
        for &cache_type in cache_types {
            let what = format!("{args:?} {cache_type:?}");
            let [mut there, mut here] =
                [&gpu, &host].map(|device| Sequence::new(device, args, cache_type, 211));
            // Angles differ in nothing; products may round a value to the other side of a step.
            let (context, cached) = match cache_type {
                CacheType::F32 => (2e-6, 1e-6),
                CacheType::F16 => (2e-5, 6e-4),
                CacheType::Int8 => (1e-3, 1e-2),
            };
            // Beginnings, ends and middles of chunks of 64; one row, few rows, and many.
            for m in [1, 2, 17, 43, 1, 1, 70, 16, 1, 40, 1] {
                let qkv = random.floats(m * width);
                let what = format!("{what}, {m} rows at {}", there.args.position);
                close(&what, &there.attend(&qkv), &here.attend(&qkv), context);
            }
            close(&what, &there.cached(), &here.cached(), cached);
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_rows_and_those_behind() {
    setup();
    let gpu = gpu();
    let args = AttentionArgs { n_heads: 2, n_kv_heads: 1, head_dim: 16, position: 0, window: None };
    let width = 4 * 16;
    let rows = Random(7).floats(20 * width);
    for cache_type in [CacheType::F32, CacheType::Int8] {
        let want = Sequence::new(&gpu, args, cache_type, 20).attend(&rows);
        // In a key, or in a value.
        for at in [12 * width + 2 * 16 + 3, 12 * width + 3 * 16 + 3] {
            let mut rows = rows.clone();
            rows[at] = f32::INFINITY;
            let got = Sequence::new(&gpu, args, cache_type, 20).attend(&rows);
            assert_eq!(got[..12 * 32], want[..12 * 32], "{cache_type:?}");
            for row in got[12 * 32..].chunks(32) {
                assert!(row.iter().any(|v| !v.is_finite()), "{cache_type:?} {at}: {row:?}");
            }
        }
    }
}

/// What lies before the windows of all rows is not seen, whatever it is.
#[test]
fn what_is_not_finite_is_hidden_by_a_window() {
    setup();
    let gpu = gpu();
    for window in [5, 70] {
        let args =
            AttentionArgs { n_heads: 7, n_kv_heads: 1, head_dim: 20, position: 0, window: Some(window) };
        let width = 9 * 20;
        let mut rows = Random(8).floats(200 * width);
        // In a key and in a value of the first rows.
        for at in [7 * 20 + 3, 8 * 20 + 3] {
            rows[at] = f32::INFINITY;
            rows[width + at] = f32::NAN;
        }
        for chunk in [1, 7, 200] {
            let mut sequence = Sequence::new(&gpu, args, CacheType::F32, 200);
            let out: Vec<f32> = rows.chunks(chunk * width).flat_map(|rows| sequence.attend(rows)).collect();
            for (row, out) in out.chunks(7 * 20).enumerate().skip(1 + window) {
                assert!(out.iter().all(|v| v.is_finite()), "window {window}, chunks of {chunk}, row {row}");
            }
        }
    }
}

#[test]
fn chunks_of_a_prompt_change_last_bits_at_most() {
    setup();
    let gpu = gpu();
    let args = AttentionArgs { n_heads: 8, n_kv_heads: 2, head_dim: 32, position: 0, window: None };
    let width = 12 * 32;
    let qkv = Random(3).floats(150 * width);
    for cache_type in [CacheType::F16, CacheType::Int8] {
        let whole = Sequence::new(&gpu, args, cache_type, 150).attend(&qkv);
        for rows in [1, 100] {
            let mut sequence = Sequence::new(&gpu, args, cache_type, 150);
            let parts: Vec<f32> = qkv.chunks(rows * width).flat_map(|rows| sequence.attend(rows)).collect();
            close(&format!("{cache_type:?} by {rows}"), &parts, &whole, 1e-6);
        }
    }
}

#[test]
fn a_cache_that_is_shared_is_copied_before_it_is_written_to() {
    setup();
    let gpu = gpu();
    let args = AttentionArgs { n_heads: 2, n_kv_heads: 1, head_dim: 16, position: 0, window: None };
    let mut random = Random(4);
    for cache_type in [CacheType::F32, CacheType::F16, CacheType::Int8] {
        let mut first = Sequence::new(&gpu, args, cache_type, 100);
        first.attend(&random.floats(10 * 64));
        let before = first.cached();
        let mut second = Sequence { device: &gpu, args: first.args, caches: first.caches.clone() };
        second.attend(&random.floats(64));
        assert_eq!(first.cached(), before, "{cache_type:?}");
        assert_ne!(second.cached(), before, "{cache_type:?}");
    }
}

#[test]
fn halves_are_rounded_as_ieee_754_has_it() {
    setup();
    // Every kind of number, in one head of the values.
    let odd = [
        0.0,
        -0.0,
        1.0,
        -2.5,
        65504.0,
        65519.9,
        65520.0,
        -1e9,
        6.1e-5,
        6.097e-5,
        -5.96e-8,
        2.98e-8,
        2.99e-8,
        1e-9,
        1.000_488_3,
        1.000_976_6,
        1.001_464_8,
        f32::INFINITY,
    ];
    let mut random = Random(5);
    let d = 512;
    let many = (odd.len()..d).map(|_| random.float() * 2f32.powi(random.below(40) as i32 - 25));
    let numbers: Vec<f32> = odd.into_iter().chain(many).collect();
    let args = AttentionArgs { n_heads: 1, n_kv_heads: 1, head_dim: d, position: 0, window: None };
    let gpu = gpu();
    let mut sequence = Sequence::new(&gpu, args, CacheType::F16, 1);
    sequence.attend(&[vec![0.0; d], vec![1.0; d], numbers.clone()].concat());
    let got = sequence.cached();
    for (got, number) in got[d..].iter().zip(&numbers) {
        let want = burn::tensor::f16::from_f32(*number).to_f32();
        assert_eq!(got.to_bits(), want.to_bits(), "{number:e}: {got:e}, not {want:e}");
    }
}

#[test]
fn dense_matrices_of_every_format_are_those_of_the_host() {
    setup();
    let mut random = Random(6);
    for format in DenseFormat::ALL {
        // Rows that are whole words, and rows (of 34, 18 and 210 bytes) that are not; K of no whole unit.
        let shapes: &[(usize, usize)] = match format.block_len() {
            256 => &[(3, 256), (21, 512)],
            128 => &[(3, 128), (8, 384)],
            64 => &[(3, 64), (7, 192)],
            32 => &[(3, 32), (7, 96), (40, 256)],
            _ => &[(5, 3), (8, 256), (13, 40)],
        };
        for &(n, k) in shapes {
            let row_bytes = format.row_bytes(k).unwrap();
            let mut bytes = vec![0; n * row_bytes];
            for (row, out) in random.floats(n * k).chunks_exact(k).zip(bytes.chunks_exact_mut(row_bytes)) {
                format.encode_row(row, out).unwrap();
            }
            let words =
                |device: &Device| ops::words(bytes.clone().into(), [1, bytes.len().div_ceil(4)], device);
            let args = DenseArgs::new(format, n, k);
            let ids: Vec<u32> = vec![n as u32 - 1, 0, 1, 1];
            // Looking up decodes, exactly.
            agree(&format!("rows of {args:?}"), 0.0, |device| ops::dense_rows(words(device), &ids, args));
            // 32 rows are the most that are not decoded for.
            for m in [1, 2, 3, 32, 33] {
                let x = random.floats(m * k);
                for args in [Some(args), args.with_int8().ok()].into_iter().flatten() {
                    agree(&format!("{m} rows times {args:?}"), 2e-6, |device| {
                        ops::dense_linear(tensor(&x, [m, k], device), words(device), args)
                    });
                }
            }
        }
    }
}
