//! Every kernel that this machine can run against a naive reference, bit for bit, called through the C
//! ABI as a host calls it.

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{CStr, c_char};
use std::ops::{Deref, DerefMut};

use bitnet_burn_cpu::PLUGIN;
use bitnet_burn_formats::reference::{ScaledActivations, scaled_matmul};
use bitnet_burn_plugin::abi::{
    ACTIVATION_SLACK, Activations, CANONICAL_ALIGNMENT, Kernel, Message, OPERATION_SCALED_TERNARY_MATMUL,
    OPERATION_TERNARY_MATMUL, Output, SCALE_F32, STATUS_INVALID_ARGUMENT, STATUS_OK, STATUS_UNSUPPORTED,
    Signature, Tile, WORKSPACE_ALIGNMENT, Weights,
};
use bitnet_burn_plugin::canonical;
use bitnet_burn_plugin::features::{self, Features};
use bitnet_burn_plugin::sdk::{self, Scales, f16_value, groups, scale_count};
use proptest::prelude::*;

/// Bytes at a given alignment and no better, with poison around them that must not be written, and whose
/// value must not matter.
struct Buffer {
    allocation: *mut u8,
    layout: Layout,
    offset: usize,
    length: usize,
}

/// Poison: as weights, four codes 2; as int8, -86.
const POISON: u8 = 0xaa;
const MARGIN: usize = 256;

impl Buffer {
    fn new(length: usize, alignment: usize) -> Self {
        // Aligned to `alignment`, but to nothing more.
        let offset = MARGIN.next_multiple_of(2 * alignment) + alignment;
        let layout = Layout::from_size_align(offset + length + MARGIN, 2 * alignment).unwrap();
        // SAFETY: the size is not zero; the bytes are initialised at once.
        let allocation = unsafe {
            let allocation = alloc(layout);
            assert!(!allocation.is_null());
            allocation.write_bytes(POISON, layout.size());
            allocation
        };
        Self { allocation, layout, offset, length }
    }

    fn filled(bytes: &[u8], alignment: usize) -> Self {
        let mut buffer = Self::new(bytes.len(), alignment);
        buffer.copy_from_slice(bytes);
        buffer
    }

    fn check_surroundings(&self) {
        // SAFETY: the allocation is initialised and as large as its layout says.
        let all = unsafe { std::slice::from_raw_parts(self.allocation, self.layout.size()) };
        let around = all[..self.offset].iter().chain(&all[self.offset + self.length..]);
        assert!(around.into_iter().all(|&b| b == POISON), "a kernel wrote outside its buffer");
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: within the allocation, initialised.
        unsafe { std::slice::from_raw_parts(self.allocation.add(self.offset), self.length) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: within the allocation, initialised, and uniquely borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.allocation.add(self.offset), self.length) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.check_surroundings();
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.allocation, self.layout) }
    }
}

/// xorshift64*, enough for test data.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
}

/// How a case's values are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Values {
    Random,
    /// All activations and all weights the same.
    Constant(i8, i8),
    /// Activations at either end of the range, weights to match: the largest sums.
    Extreme,
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    weights: Buffer,
    weight_scale: f32,
    stride: usize,
    q: Buffer,
    scale: Vec<f32>,
    sum: Vec<i32>,
    expected: Vec<f32>,
}

impl Case {
    fn new(m: usize, n: usize, k: usize, values: Values, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let stride = k.next_multiple_of(64);
        let mut q = Buffer::new(m * stride + ACTIVATION_SLACK, 64);
        let (mut scale, mut sum) = (Vec::new(), Vec::new());
        let mut x = vec![0i32; m * k];
        for (row, out) in x.chunks_exact_mut(k).zip(q.chunks_exact_mut(stride)) {
            for v in row.iter_mut() {
                *v = match values {
                    Values::Random => random.next() as i8,
                    Values::Constant(x, _) => x,
                    Values::Extreme => [127, -128][random.below(2)],
                }
                .into();
            }
            out.fill(0);
            out.iter_mut().zip(row.iter()).for_each(|(out, &v)| *out = v as u8);
            scale.push((1 + random.below(1000)) as f32 * 0.000_37);
            sum.push(row.iter().sum());
        }
        let weight_scale = 0.37 + random.below(100) as f32 * 0.013;
        let mut canonical_bytes = Vec::new();
        let mut expected = vec![0.0; m * n];
        for j in 0..n {
            let weights: Vec<i8> = (0..k)
                .map(|i| match values {
                    Values::Random => random.below(3) as i8 - 1,
                    Values::Constant(_, w) => w,
                    Values::Extreme => {
                        let sign = x[j % m * k + i].signum() as i8;
                        if j % 2 == 0 { sign } else { -sign }
                    }
                })
                .collect();
            let mut row = vec![0; canonical::row_bytes(k)];
            canonical::pack_row(&weights, &mut row);
            canonical_bytes.extend(row);
            for i in 0..m {
                let dot: i32 = x[i * k..][..k].iter().zip(&weights).map(|(&x, &w)| x * i32::from(w)).sum();
                expected[i * n + j] = dot as f32 * (weight_scale * scale[i]);
            }
        }
        let weights = Buffer::filled(&canonical_bytes, CANONICAL_ALIGNMENT);
        Self { m, n, k, weights, weight_scale, stride, q, scale, sum, expected }
    }

    fn signature(&self) -> Signature {
        Signature::ternary(self.m as u64, self.n as u64, self.k as u64, 1)
    }

    fn as_weights(&self, data: &[u8]) -> Weights {
        Weights {
            struct_size: size_of::<Weights>() as u64,
            n: self.n as u64,
            k: self.k as u64,
            data: data.as_ptr(),
            size: data.len() as u64,
            scale: self.weight_scale,
            scale_format: SCALE_F32,
            group: 0,
            scales: std::ptr::null(),
        }
    }

    fn activations(&self) -> Activations {
        Activations {
            struct_size: size_of::<Activations>() as u64,
            m: self.m as u64,
            k: self.k as u64,
            stride: self.stride as u64,
            q: self.q.as_ptr().cast(),
            scale: self.scale.as_ptr(),
            sum: self.sum.as_ptr(),
            group: 0,
            group_scale: self.scale.as_ptr(),
            group_sum: self.sum.as_ptr(),
        }
    }
}

fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the descriptor's strings are NUL-terminated and live as long as the program.
    unsafe { CStr::from_ptr(pointer) }.to_str().unwrap().to_owned()
}

fn kernels() -> impl Iterator<Item = &'static Kernel> {
    // SAFETY: the descriptor has `kernel_count` pointers to static kernels.
    (0..PLUGIN.kernel_count as usize).map(|i| unsafe { &**PLUGIN.kernels.add(i) })
}

/// Whether the kernel has to run here. (Linux lets every process that asks use AMX's tiles, since 5.16.)
fn runs_here(kernel: &Kernel) -> bool {
    let needed = Features::of(&text(kernel.features));
    features::has(needed) && (cfg!(target_os = "linux") || !needed.contains(Features::of("amx-tile")))
}

/// Packs (in several ranges), and checks that unpacking gives the canonical bytes back.
fn packed(case: &Case, kernel: &Kernel, random: &mut Random) -> Option<Buffer> {
    let pack = kernel.pack?;
    let name = text(kernel.name);
    // SAFETY: called as the ABI says, here and below: filled structs, buffers of the sizes asked for.
    let size = unsafe { kernel.packed_size.unwrap()(case.n as u64, case.k as u64) };
    assert_ne!(size, 0, "{name}");
    let mut bytes = Buffer::new(size as usize, kernel.weight_alignment as usize);
    let source = case.as_weights(&case.weights);
    for (n0, n1) in partition(case.n, kernel.row_granule as usize, random) {
        // SAFETY: as above, and the ranges are disjoint.
        let status = unsafe { pack(&source, bytes.as_mut_ptr(), n0 as u64, n1 as u64, std::ptr::null()) };
        assert_eq!(status, STATUS_OK, "{name}");
    }
    let mut back = Buffer::new(case.weights.len(), CANONICAL_ALIGNMENT);
    let packed = case.as_weights(&bytes);
    for (n0, n1) in partition(case.n, kernel.row_granule as usize, random) {
        // SAFETY: as above.
        let status = unsafe {
            kernel.unpack.unwrap()(&packed, back.as_mut_ptr(), n0 as u64, n1 as u64, std::ptr::null())
        };
        assert_eq!(status, STATUS_OK, "{name}");
    }
    assert!(*back == *case.weights, "{name} does not unpack what it packed");
    Some(bytes)
}

/// 0..length in random pieces that begin at multiples of `granule`, in a random order.
fn partition(length: usize, granule: usize, random: &mut Random) -> Vec<(usize, usize)> {
    let granules = length.div_ceil(granule);
    let mut cuts: Vec<usize> = (0..random.below(4)).map(|_| random.below(granules + 1)).collect();
    cuts.extend([0, granules]);
    cuts.sort_unstable();
    cuts.dedup();
    let mut pieces: Vec<_> =
        cuts.windows(2).map(|w| (w[0] * granule, (w[1] * granule).min(length))).collect();
    for i in (1..pieces.len()).rev() {
        pieces.swap(i, random.below(i + 1));
    }
    pieces
}

/// Runs one kernel on the case in random tiles and compares every bit.
fn check(case: &Case, kernel: &Kernel, random: &mut Random) {
    let name = text(kernel.name);
    let shape = (case.m, case.n, case.k);
    let signature = case.signature();
    // SAFETY: called as the ABI says, here and below.
    assert_eq!(unsafe { kernel.supports.unwrap()(&signature) }, 1, "{name} {shape:?}");
    let private = packed(case, kernel, random);
    let weights = case.as_weights(private.as_deref().unwrap_or(&case.weights));
    // SAFETY: as above.
    let size = unsafe { kernel.workspace_size.unwrap()(&signature) };
    let mut workspace = Buffer::new(size as usize, WORKSPACE_ALIGNMENT);
    let x = case.activations();
    // SAFETY: as above.
    let status = unsafe { kernel.prepare.unwrap()(&x, workspace.as_mut_ptr(), std::ptr::null()) };
    assert_eq!(status, STATUS_OK, "{name} {shape:?}");

    // Rows of the output stand apart, and what lies between must stay as it is.
    let gap = random.below(3);
    let stride = case.n + gap;
    let canary = f32::from_bits(0x7fc0_dead);
    let mut y = Buffer::new(4 * (case.m * stride), 4);
    for value in y.chunks_exact_mut(4) {
        value.copy_from_slice(&canary.to_ne_bytes());
    }
    let output =
        Output { struct_size: size_of::<Output>() as u64, y: y.as_mut_ptr().cast(), stride: stride as u64 };
    for (n0, n1) in partition(case.n, kernel.row_granule as usize, random) {
        for (m0, m1) in partition(case.m, 1, random) {
            let tile = Tile::new(n0..n1, m0..m1);
            let mut buffer = [0 as c_char; 200];
            let message = Message {
                struct_size: size_of::<Message>() as u64,
                text: buffer.as_mut_ptr(),
                capacity: buffer.len() as u64,
                context: std::ptr::null(),
            };
            // SAFETY: as above; tiles run one after the other.
            let status =
                unsafe { kernel.run.unwrap()(&weights, &x, workspace.as_ptr(), &output, &tile, &message) };
            assert_eq!(status, STATUS_OK, "{name} {shape:?}: {}", text(buffer.as_ptr()));
        }
    }
    for m in 0..case.m {
        for n in 0..stride {
            let got = u32::from_ne_bytes(y[4 * (m * stride + n)..][..4].try_into().unwrap());
            let expected = if n < case.n { case.expected[m * case.n + n] } else { canary };
            assert_eq!(got, expected.to_bits(), "{name} {shape:?} at ({m}, {n})");
        }
    }
    case.weights.check_surroundings();
    case.q.check_surroundings();
}

fn check_all(m: usize, n: usize, k: usize, values: Values, seed: u64) {
    let case = Case::new(m, n, k, values, seed);
    let mut random = Random::new(seed + 1);
    for kernel in unscaled() {
        check(&case, kernel, &mut random);
    }
}

/// The kernels for one scale that run here.
fn unscaled() -> impl Iterator<Item = &'static Kernel> {
    kernels().filter(|kernel| runs_here(kernel) && kernel.operation == OPERATION_TERNARY_MATMUL)
}

#[test]
fn the_descriptor_is_what_a_host_expects() {
    assert_eq!(text(PLUGIN.name), "cpu");
    assert_eq!(text(PLUGIN.version), env!("CARGO_PKG_VERSION"));
    let names: Vec<String> = kernels().map(|k| text(k.name)).collect();
    let mut unique = names.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), names.len(), "{names:?}");
    assert!(names.contains(&"i2s-scalar".into()) && names.contains(&"t2-scalar".into()));
    for kernel in kernels() {
        let layout = match text(kernel.name).split_once('-').unwrap().0 {
            "i2s" => "",
            "t2" => "t2x32",
            "t5" => "t5x32",
            "tl1" => "tl1x32",
            "tl2" => "tl2x32",
            other => panic!("{other}"),
        };
        assert_eq!(text(kernel.layout), layout);
        assert_eq!(kernel.row_granule, if layout.is_empty() { 1 } else { 32 });
    }
}

#[test]
fn every_number_of_activation_rows() {
    for m in (1..=20).chain([31, 32, 33, 47, 48, 49, 63, 64, 65, 96]) {
        check_all(m, 37, 300, Values::Random, m as u64);
    }
}

#[test]
fn awkward_depths() {
    let depths = [
        1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 191, 192, 193, 255, 256, 257, 320, 384,
        511, 513, 640, 1000, 1024, 1025, 1536, 2048, 2049, 2560, 4096, 4160, 6912,
    ];
    for k in depths {
        for (m, n) in [(1, 33), (9, 5)] {
            check_all(m, n, k, Values::Random, k as u64);
        }
    }
}

#[test]
fn awkward_widths() {
    for n in (1..=100).step_by(3).chain([31, 32, 33, 63, 64, 65, 96, 128]) {
        check_all(1 + n % 5, n, 200, Values::Random, n as u64);
    }
}

#[test]
fn extreme_values() {
    for k in [1, 64, 100, 128, 2048, 2560, 6912, 16384] {
        for x in [127, -127, -128, 0] {
            for w in [-1, 0, 1] {
                check_all(1, 32, k, Values::Constant(x, w), 5);
                check_all(9, 33, k, Values::Constant(x, w), 6);
            }
        }
        check_all(4, 40, k, Values::Extreme, 7);
        check_all(1, 40, k, Values::Extreme, 8);
    }
}

#[test]
fn many_activation_rows_in_several_cache_chunks() {
    check_all(64, 40, 2560, Values::Random, 1);
    check_all(215, 33, 2500, Values::Random, 2);
}

/// At the largest depth that a kernel claims, the largest sums still come out.
#[test]
fn the_largest_claimed_depth() {
    let mut random = Random::new(1);
    for kernel in unscaled() {
        let claimed = (0..=23).map(|e| 1usize << e).rfind(|&k| {
            let signature = Signature::ternary(1, 2, k as u64, 1);
            // SAFETY: a filled signature.
            unsafe { kernel.supports.unwrap()(&signature) == 1 }
        });
        let k = claimed.unwrap();
        for (x, w) in [(-128, 1), (127, 1), (-128, -1)] {
            for m in [1, 2] {
                check(&Case::new(m, 2, k, Values::Constant(x, w), 1), kernel, &mut random);
            }
        }
        let signature = Signature::ternary(1, 2, (1 << 23) + 1, 1);
        // SAFETY: a filled signature.
        assert_eq!(unsafe { kernel.supports.unwrap()(&signature) }, 0);
    }
}

/// A row that held a NaN has the scale NaN, and so have its results.
#[test]
fn a_scale_of_nan_reaches_every_result() {
    let mut case = Case::new(3, 40, 100, Values::Constant(0, 1), 1);
    case.scale[1] = f32::NAN;
    case.expected[40..80].fill(f32::NAN);
    let mut random = Random::new(1);
    for kernel in unscaled() {
        check(&case, kernel, &mut random);
    }
}

/// A host never calls them, but if it did, it would get an error and not an illegal instruction.
#[test]
fn kernels_for_other_cpus_refuse_to_run() {
    let case = Case::new(2, 40, 100, Values::Random, 1);
    let mut random = Random::new(1);
    for kernel in kernels().filter(|kernel| !runs_here(kernel)) {
        let name = text(kernel.name);
        let private = packed(&case, kernel, &mut random);
        let weights = case.as_weights(private.as_deref().unwrap_or(&case.weights));
        let x = case.activations();
        // SAFETY: called as the ABI says but for the features, here and below.
        let size = unsafe { kernel.workspace_size.unwrap()(&case.signature()) };
        let workspace = Buffer::new(size as usize, WORKSPACE_ALIGNMENT);
        let mut y = Buffer::new(4 * 2 * 40, 4);
        let output = Output { struct_size: size_of::<Output>() as u64, y: y.as_mut_ptr().cast(), stride: 40 };
        let tile = Tile::new(0..40, 0..2);
        // SAFETY: as above.
        let status = unsafe {
            kernel.run.unwrap()(&weights, &x, workspace.as_ptr(), &output, &tile, std::ptr::null())
        };
        assert_eq!(status, STATUS_UNSUPPORTED, "{name}");
        assert!(y.iter().all(|&b| b == POISON), "{name} wrote");
    }
}

/// The kernels that this CPU ought to run, in the order in which a host would take them untuned.
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
#[test]
fn the_features_decide_which_kernels_run() {
    let mut expected = vec!["t2-neon", "i2s-neon", "tl1-neon", "tl2-neon", "t2-scalar", "i2s-scalar"];
    if features::has(Features::of("dotprod")) {
        expected.splice(0..0, ["t2-dotprod", "i2s-dotprod"]);
        if features::has(Features::of("i8mm")) {
            expected.insert(0, "t2-i8mm");
        }
    }
    let names: Vec<String> = unscaled().map(|k| text(k.name)).collect();
    assert_eq!(names, expected);
    // Each that reads tiles does so with many scales, too.
    let twins = expected.iter().filter(|name| name.starts_with("t2-")).map(|name| format!("{name}-scaled"));
    let scaled = kernels().filter(|k| runs_here(k) && k.operation == OPERATION_SCALED_TERNARY_MATMUL);
    let scaled: Vec<String> = scaled.map(|k| text(k.name)).collect();
    assert_eq!(scaled, twins.chain(["i2s-scalar-scaled".into()]).collect::<Vec<_>>());
}

#[test]
fn broken_arguments_are_refused_with_a_message() {
    let case = Case::new(2, 40, 100, Values::Random, 1);
    let mut random = Random::new(1);
    for kernel in kernels().filter(|kernel| runs_here(kernel)) {
        let private = packed(&case, kernel, &mut random);
        let data = private.as_deref().unwrap_or(&case.weights);
        let whole = case.as_weights(data);
        let x = case.activations();
        let mut workspace = Buffer::new(4096, WORKSPACE_ALIGNMENT);
        let mut y = Buffer::new(4 * 2 * 40, 4);
        let output = Output { struct_size: size_of::<Output>() as u64, y: y.as_mut_ptr().cast(), stride: 40 };
        let tile = Tile::new(0..40, 0..2);
        let status_of = |weights: Weights, x: Activations, tile: Tile| {
            let mut buffer = [0 as c_char; 200];
            let message = Message {
                struct_size: size_of::<Message>() as u64,
                text: buffer.as_mut_ptr(),
                capacity: buffer.len() as u64,
                context: std::ptr::null(),
            };
            // SAFETY: every buffer is at least as large as the structs say; what is wrong is refused.
            let status =
                unsafe { kernel.run.unwrap()(&weights, &x, workspace.as_ptr(), &output, &tile, &message) };
            assert_eq!(status == STATUS_OK, text(buffer.as_ptr()).is_empty());
            status
        };
        assert_ne!(status_of(Weights { size: whole.size - 1, ..whole }, x, tile), STATUS_OK);
        assert_ne!(status_of(Weights { k: 101, ..whole }, x, tile), STATUS_OK);
        assert_ne!(status_of(Weights { n: 39, ..whole }, x, tile), STATUS_OK);
        assert_ne!(status_of(whole, Activations { stride: 64, ..x }, tile), STATUS_OK);
        assert_ne!(status_of(whole, Activations { m: 1, ..x }, tile), STATUS_OK);
        assert!(y.iter().all(|&b| b == POISON), "a refused call wrote");
        // SAFETY: as above.
        let status = unsafe { kernel.prepare.unwrap()(&x, workspace.as_mut_ptr(), std::ptr::null()) };
        assert_eq!(status, STATUS_OK);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape(m in 1usize..=20, n in 1usize..100, k in 1usize..1000, seed in any::<u32>(), extreme in any::<bool>()) {
        check_all(m, n, k, if extreme { Values::Extreme } else { Values::Random }, seed.into());
    }
}

/// A case with many scales: groups of weights and of activations, 0 for whole rows; f16 scales or f32.
#[derive(Clone, Copy, Debug)]
struct Groups {
    weights: usize,
    activations: usize,
    half: bool,
}

/// Scales of every kind: common, negative, tiny, subnormal and zero. `half`: what f16 holds.
fn some_scale(random: &mut Random, half: bool) -> f32 {
    let value = (random.below(2000) as f32 - 1000.0) / 4096.0;
    match random.below(8) {
        0 => 0.0,
        1 if half => f16_value(1 + random.below(50) as u16),
        1 => 1e-41 * value,
        2 => value * f32::EPSILON,
        _ => value,
    }
}

/// Runs every kernel for many scales on a case, in random tiles, and compares every bit with the reference.
fn check_scaled(m: usize, n: usize, k: usize, of: Groups, values: Values, seed: u64) {
    let case = Case::new(m, n, k, values, seed);
    let mut random = Random::new(seed ^ 77);
    let signature = Signature {
        operation: OPERATION_SCALED_TERNARY_MATMUL,
        weight_group: of.weights as u64,
        activation_group: of.activations as u64,
        scale_format: of.half.into(),
        ..case.signature()
    };
    let (rows, count) = (groups(k, of.activations), scale_count(n, k, of.weights).unwrap());
    let group_scale: Vec<f32> = (0..m * rows).map(|_| (1 + random.below(1000)) as f32 * 0.000_37).collect();
    let group = if of.activations == 0 { k } else { of.activations };
    let group_sum: Vec<i32> = (0..m)
        .flat_map(|m| case.q[m * case.stride..][..k].chunks(group))
        .map(|group| group.iter().map(|&q| i32::from(q as i8)).sum())
        .collect();
    let half: Vec<u16> =
        (0..count).map(|_| random.below(0x7c00) as u16 | (random.below(2) as u16) << 15).collect();
    let full: Vec<f32> = (0..count).map(|_| some_scale(&mut random, of.half)).collect();
    let scales = match of.half {
        true => Scales::F16 { group: of.weights, values: &half },
        false => Scales::F32 { group: of.weights, values: &full },
    };
    let q: Vec<i8> = case.q.iter().map(|&q| q as i8).collect();
    let x = ScaledActivations { m, q: &q, stride: case.stride, group: of.activations, scale: &group_scale };
    let mut expected = vec![0f32; m * n];
    scaled_matmul(&case.weights, (n, k), scales, x, &mut expected, n);

    let activations = Activations {
        group: of.activations as u64,
        group_scale: group_scale.as_ptr(),
        group_sum: group_sum.as_ptr(),
        ..case.activations()
    };
    let mut tried = 0;
    for kernel in kernels().filter(|k| runs_here(k) && k.operation == OPERATION_SCALED_TERNARY_MATMUL) {
        let name = text(kernel.name);
        // SAFETY: called as the ABI says, here and below.
        assert_eq!(unsafe { kernel.supports.unwrap()(&signature) }, 1, "{name} {of:?}");
        tried += 1;
        let private = packed(&case, kernel, &mut random);
        let bytes: &[u8] = private.as_deref().unwrap_or(&case.weights);
        let weights = sdk::WeightsRef::new(n, k, 0.0, bytes).with_scales(scales).as_abi();
        let mut y = Buffer::new(4 * m * n, 4);
        let output =
            Output { struct_size: size_of::<Output>() as u64, y: y.as_mut_ptr().cast(), stride: n as u64 };
        for (n0, n1) in partition(n, kernel.row_granule as usize, &mut random) {
            for (m0, m1) in partition(m, 1, &mut random) {
                let tile = Tile::new(n0..n1, m0..m1);
                // SAFETY: as above; tiles run one after the other.
                let status = unsafe {
                    kernel.run.unwrap()(
                        &weights,
                        &activations,
                        std::ptr::null(),
                        &output,
                        &tile,
                        std::ptr::null(),
                    )
                };
                assert_eq!(status, STATUS_OK, "{name} [{m}, {n}, {k}] {of:?}");
            }
        }
        for (i, (got, want)) in y.chunks_exact(4).zip(&expected).enumerate() {
            let got = f32::from_ne_bytes(got.try_into().unwrap());
            let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(same, "{name} [{m}, {n}, {k}] {of:?} at {i}: {got:e}, not {want:e}");
        }
    }
    assert!(tried >= 2);
}

/// Every pair of groups that kernels know.
fn all_groups() -> impl Iterator<Item = Groups> {
    let pairs = [
        (0, 0),
        (0, 32),
        (0, 64),
        (0, 128),
        (0, 256),
        (32, 32),
        (64, 32),
        (64, 64),
        (128, 32),
        (128, 64),
        (128, 128),
        (256, 32),
        (256, 64),
        (256, 128),
        (256, 256),
    ];
    pairs
        .into_iter()
        .flat_map(|(weights, activations)| [false, true].map(|half| Groups { weights, activations, half }))
}

#[test]
fn many_scales() {
    for (i, of) in all_groups().enumerate() {
        for (m, n, k) in
            [(1, 33, 256), (1, 64, 1000), (3, 5, 100), (5, 70, 640), (9, 31, 513), (1, 1, 1), (2, 40, 2560)]
        {
            check_scaled(m, n, k, of, Values::Random, i as u64);
        }
    }
}

#[test]
fn many_scales_with_every_number_of_activation_rows() {
    for m in (1..=17).chain([31, 33, 96]) {
        check_scaled(
            m,
            37,
            300,
            Groups { weights: 128, activations: 32, half: true },
            Values::Random,
            m as u64,
        );
        check_scaled(
            m,
            37,
            256,
            Groups { weights: 0, activations: 128, half: false },
            Values::Random,
            m as u64,
        );
    }
}

#[test]
fn many_scales_of_extreme_values() {
    for of in all_groups() {
        for (x, w) in [(127, 1), (-128, 1), (-128, -1), (127, 0)] {
            check_scaled(2, 33, 1024, of, Values::Constant(x, w), 5);
        }
        check_scaled(4, 40, 1536, of, Values::Extreme, 7);
    }
    // A sum that f32 rounds.
    let of = Groups { weights: 0, activations: 0, half: false };
    check_scaled(1, 2, 1 << 19, of, Values::Extreme, 9);
}

#[test]
fn groups_that_do_not_fit_are_refused() {
    let case = Case::new(1, 32, 256, Values::Random, 1);
    let full = vec![1.0; 32 * 16];
    for (weights, activations) in [(128, 0), (32, 64), (96, 64), (48, 16), (128, 48)] {
        for kernel in kernels().filter(|k| k.operation == OPERATION_SCALED_TERNARY_MATMUL && runs_here(k)) {
            let signature = Signature {
                operation: OPERATION_SCALED_TERNARY_MATMUL,
                weight_group: weights as u64,
                activation_group: activations as u64,
                ..case.signature()
            };
            // SAFETY: a filled signature.
            assert_eq!(unsafe { kernel.supports.unwrap()(&signature) }, 0, "{weights} {activations}");
            let private = packed(&case, kernel, &mut Random::new(1));
            let bytes: &[u8] = private.as_deref().unwrap_or(&case.weights);
            let scales = Scales::F32 { group: weights, values: &full };
            let w = sdk::WeightsRef::new(32, 256, 0.0, bytes).with_scales(scales).as_abi();
            let (scale, sum) = ([1.0; 16], [0; 16]);
            let x = Activations {
                group: activations as u64,
                group_scale: scale.as_ptr(),
                group_sum: sum.as_ptr(),
                ..case.activations()
            };
            let mut y = [0f32; 32];
            let y = Output { struct_size: size_of::<Output>() as u64, y: y.as_mut_ptr(), stride: 32 };
            let tile = Tile::new(0..32, 0..1);
            // SAFETY: filled structs with buffers of their sizes.
            let status =
                unsafe { kernel.run.unwrap()(&w, &x, std::ptr::null(), &y, &tile, std::ptr::null()) };
            assert_eq!(status, STATUS_INVALID_ARGUMENT, "{weights} {activations}");
        }
    }
}
