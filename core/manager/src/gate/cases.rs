//! What a kernel is tried on: random and adversarial inputs over many shapes, compared bit for bit with
//! the reference, with every buffer between walls.

use std::fmt::{Display, Formatter};
use std::sync::Mutex;

use bitnet_burn_plugin::abi::{
    self, ACTIVATION_ALIGNMENT, ACTIVATION_SLACK, CANONICAL_ALIGNMENT, OPERATION_SCALED_TERNARY_MATMUL,
    Output, SCALE_ROWS, Signature, Tile, WORKSPACE_ALIGNMENT,
};
use bitnet_burn_plugin::{canonical, sdk};

use super::environment;
use super::guard::{Place, Walled, Walls};
use crate::float::FloatControl;
use crate::manager::{ScaleKind, ThreadScratch, WeightShape};
use crate::memory::Activations;
use crate::plugin::{Kernel, KernelFailure};
use crate::pool::Pool;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_formats::reference;

/// [M, N, K]: one row and many, output and input features on both sides of vector and block sizes. The
/// first [`QUICK`] are what kernels that are linked in are tried on at every start.
const SHAPES: [(usize, usize, usize); 34] = [
    (1, 1, 1),
    (1, 7, 31),
    (1, 32, 128),
    (1, 33, 129),
    (1, 64, 256),
    (1, 100, 784),
    (1, 48, 2560),
    (2, 16, 384),
    (3, 17, 100),
    (4, 31, 257),
    (5, 96, 640),
    (9, 40, 500),
    (17, 35, 130),
    (33, 65, 260),
    // One more and one less than a block, and blocks that kernels are made for.
    (1, 5, 127),
    (1, 2, 255),
    (2, 3, 64),
    (1, 15, 65),
    (1, 63, 512),
    (4, 64, 2048),
    (8, 32, 1024),
    (7, 9, 511),
    (16, 128, 128),
    // Rows of real models, and longer: sums that 16 bits do not hold.
    (1, 640, 2560),
    (1, 64, 6912),
    (2, 32, 4096),
    (3, 24, 6912),
    (1, 4, 32768),
    (2, 8, 14336),
    // Prompts.
    (64, 64, 512),
    (130, 16, 192),
    (257, 8, 128),
    // Sizes that are computed wrongly only where a matrix is very wide or very tall. (The largest sum is below 2^24,
    // which f32 holds, and the workgroups of a GPU are below 2^16.)
    (4, 3, 100_003),
    (1, 49_157, 36),
];

const QUICK: usize = 14;

/// How the output is cut into calls of `run`.
#[derive(Clone, Copy, Debug)]
enum Tiling {
    /// In one.
    Whole,
    /// As finely as the kernel allows, the last first.
    Finest,
    /// Into blocks, which several threads compute at once.
    Threads,
}

/// What the matrices hold.
#[derive(Clone, Copy, Debug)]
enum Values {
    /// Random numbers, with some rows of one value.
    Random,
    /// The largest sums there are, alternating signs, scales of every size, a row that is not finite.
    Extreme,
}

/// The groups that share a scale, of weights and of activations (0: whole rows), and whether the weights' scales are f16.
type Groups = (usize, usize, bool);

/// The groups that kernels for many scales are tried on, in turn.
const GROUPS: [(usize, usize); 15] = [
    (128, 128),
    (0, 0),
    (128, 32),
    (64, 64),
    (0, 32),
    (64, 32),
    (256, 256),
    (0, 128),
    (128, 64),
    (32, 32),
    (0, 64),
    (256, 32),
    (0, 256),
    (256, 64),
    (256, 128),
];

/// One case.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    m: usize,
    n: usize,
    k: usize,
    tiling: Tiling,
    values: Values,
    /// `None`: one scale for all weights, and one for each row of activations.
    groups: Option<Groups>,
    place: Place,
    walls: Walls,
}

impl Display for Case {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let Self { m, n, k, .. } = self;
        let values = self.values();
        let tiling = match self.tiling {
            Tiling::Whole => "one tile",
            Tiling::Finest => "the smallest tiles",
            Tiling::Threads => "tiles on several threads",
        };
        let place = match self.place {
            Place::End => "buffers that end where memory ends",
            Place::Start => "buffers that begin where memory begins",
            Place::Odd => "buffers aligned no better than promised",
        };
        write!(f, "[{m}, {k}] x [{n}, {k}]ᵀ, {values}, {tiling}, {place}")?;
        match self.groups {
            None => Ok(()),
            Some((weights, activations, half)) => {
                let format = if half { "f16" } else { "f32" };
                let of = |group: usize| match group {
                    0 => "row".to_owned(),
                    group => format!("{group} values"),
                };
                write!(
                    f,
                    ", {format} scales by {} of weights and {} of activations",
                    of(weights),
                    of(activations)
                )
            }
        }
    }
}

/// Tries a kernel that is linked in, within this process: fewer shapes, and marks instead of walls.
///
/// # Errors
/// The first case that fails.
pub(crate) fn check_in_process(kernel: &Kernel) -> Result<(), String> {
    let pool = Pool::new(1).map_err(|error| error.to_string())?;
    let cases = SHAPES[..QUICK].iter().map(|&(m, n, k)| Case {
        m,
        n,
        k,
        tiling: Tiling::Threads,
        values: Values::Random,
        groups: None,
        place: Place::Odd,
        walls: Walls::Marks,
    });
    let mut last = None;
    let checked = FloatControl::kept_by(|| check(kernel, &pool, cases, &mut |case| last = Some(*case)));
    checked.and_then(|result| result).map(|_| ()).map_err(|reason| match last {
        Some(case) => format!("{case}: {reason}"),
        None => reason,
    })
}

/// All cases of the gate for kernels of GPUs, where the host tiles nothing.
pub(super) fn of_gpus() -> impl Iterator<Item = Case> {
    let ways = [(Place::End, Values::Random), (Place::Start, Values::Extreme)];
    SHAPES.iter().flat_map(move |&(m, n, k)| {
        // Mesa's software GPU ends a loop after 65,535 turns.
        let k = k.min(65_003);
        ways.map(|(place, values)| Case {
            m,
            n,
            k,
            tiling: Tiling::Whole,
            values,
            groups: None,
            place,
            walls: Walls::Pages,
        })
    })
}

/// All cases of the gate.
pub(super) fn all() -> impl Iterator<Item = Case> {
    let ways = [
        (Place::End, Tiling::Whole, Values::Random),
        (Place::Start, Tiling::Finest, Values::Extreme),
        (Place::Odd, Tiling::Threads, Values::Random),
        (Place::End, Tiling::Threads, Values::Extreme),
    ];
    SHAPES.iter().flat_map(move |&(m, n, k)| {
        let (groups, walls) = (None, Walls::Pages);
        ways.map(|(place, tiling, values)| Case { m, n, k, tiling, values, groups, place, walls })
    })
}

/// Tries a kernel on the cases that it supports, announcing each; how many there were.
///
/// # Errors
/// What is wrong with the case that was announced last.
pub(super) fn check(
    kernel: &Kernel,
    pool: &Pool,
    cases: impl Iterator<Item = Case>,
    announce: &mut dyn FnMut(&Case),
) -> Result<u64, String> {
    let threads = (pool.threads() > 1).then(environment::threads).flatten();
    let mut random = SplitMix64::new(0x1b17);
    let (mut tried, mut offered) = (0, 0);
    for case in cases {
        offered += 1;
        let Some(case) = claimed(kernel, case, offered, pool)? else { continue };
        tried += 1;
        announce(&case);
        case.run(kernel, pool, &mut random)?;
        if let Some(more) = environment::more_threads_than(threads) {
            return Err(format!("it started {more} threads that go on after the call"));
        }
    }
    if tried == 0 {
        let (m, n, k) = SHAPES[SHAPES.len() / 2];
        let why = kernel.why_not(&Signature::ternary(m as u64, n as u64, k as u64, 1));
        let why = why.map_or(String::new(), |why| format!("; of [{m}, {k}] x [{n}, {k}]ᵀ it says: {why}"));
        return Err(format!("it supports none of the {offered} cases that kernels are tried on{why}"));
    }
    Ok(tried)
}

/// A case that the kernel claims: for kernels with many scales, with the next groups that it knows.
fn claimed(kernel: &Kernel, case: Case, turn: u64, pool: &Pool) -> Result<Option<Case>, String> {
    let claims = |case: &Case| kernel.claims(&signature(case, pool)).map_err(|failure| failure.to_string());
    if kernel.operation() != OPERATION_SCALED_TERNARY_MATMUL {
        return Ok(claims(&case)?.then_some(case));
    }
    for i in 0..2 * GROUPS.len() {
        // Whole turns of the groups differ in the scales' type.
        let at = turn as usize + i;
        let (weights, activations) = GROUPS[at % GROUPS.len()];
        let case = Case { groups: Some((weights, activations, at / GROUPS.len() % 2 == 1)), ..case };
        if claims(&case)? {
            return Ok(Some(case));
        }
    }
    Ok(None)
}

fn signature(case: &Case, pool: &Pool) -> Signature {
    let Case { m, n, k, groups, .. } = *case;
    let scales = groups.map_or(ScaleKind::One, |(weights, activations, half)| ScaleKind::Groups {
        weights,
        activations,
        half,
    });
    WeightShape { n, k, scales }.signature(m, pool.threads())
}

/// What a case with many scales has beside [`Case::inputs`], and the outputs.
struct Scaled {
    /// f32, or the bits of f16.
    scales: Vec<u8>,
    group_scale: Vec<f32>,
    group_sum: Vec<i32>,
    expected: Vec<f32>,
}

/// A quiet NaN that no arithmetic produces: what outputs hold before.
pub(super) const POISON: f32 = f32::from_bits(0x7fc0_dead);

impl Case {
    /// The weights' scale. A shape is tried with several, one after the other: common, subnormal, negative and large.
    pub(super) fn scale(&self) -> f32 {
        match (self.values, self.tiling) {
            (Values::Random, Tiling::Whole) => 0.037,
            (Values::Extreme, Tiling::Finest) => 1e-40,
            (Values::Random, _) => -1.375,
            (Values::Extreme, _) => 3e4,
        }
    }

    /// What the matrices hold, for messages.
    pub(super) fn values(&self) -> &'static str {
        match self.values {
            Values::Random => "random values",
            Values::Extreme => "extreme values",
        }
    }

    /// M, N, K.
    pub(super) fn shape(&self) -> (usize, usize, usize) {
        (self.m, self.n, self.k)
    }

    /// Weights and activations.
    pub(super) fn inputs(&self, random: &mut SplitMix64) -> (Vec<u8>, Activations) {
        let Self { m, n, k, .. } = *self;
        let (mut weights, mut x) = (random.weights(n, k), Activations::random(random, m, k, 0));
        let row = canonical::row_bytes(k);
        let alternating: Vec<i8> = (0..k).map(|i| 1 - 2 * (i % 2) as i8).collect();
        let ternary = |kind: usize| match kind {
            0 => vec![-1; k],
            1 => vec![1; k],
            2 => vec![0; k],
            _ => alternating.clone(),
        };
        // Whole rows of one value, on both sides: the largest sums, and no cancellation.
        let (rows_n, rows_m) = match self.values {
            Values::Random => (n.min(3), if m >= 3 { 3 } else { 0 }),
            Values::Extreme => (n, m),
        };
        for i in 0..rows_n {
            canonical::pack_row(&ternary(i % 4), &mut weights[i * row..][..row]);
        }
        let parts = x.resize(m, k);
        for i in 0..rows_m {
            let q = &mut parts.q[i * parts.stride..][..k];
            for (q, code) in q.iter_mut().zip(ternary([1, 0, 2, 3][i % 4])) {
                *q = 127 * code;
            }
            parts.sum[i] = q.iter().map(|&q| i32::from(q)).sum();
            if matches!(self.values, Values::Extreme) {
                parts.scale[i] = [1.0, 1e-30, 1e-5 / 127.0, 1e30][i % 4];
            }
        }
        // What the quantiser makes of a row with an infinity.
        if m >= 6 && matches!(self.values, Values::Extreme) {
            parts.q[5 * parts.stride..][..k].fill(0);
            (parts.sum[5], parts.scale[5]) = (0, f32::NAN);
        }
        (weights, x)
    }

    /// Scales of every kind: common, negative, large, tiny, subnormal and zero; and what the reference computes with them.
    fn scaled(&self, groups: Groups, weights: &[u8], x: &Activations, random: &mut SplitMix64) -> Scaled {
        let (Self { m, n, k, .. }, (weight_group, group, half)) = (*self, groups);
        let count = sdk::scale_count(n, k, weight_group).expect("a case's shape");
        let mut bits = Vec::with_capacity(count);
        let mut full = Vec::with_capacity(count);
        for i in 0..count {
            // Rows behind n have zeros.
            let row = i / SCALE_ROWS / sdk::groups(k, weight_group) * SCALE_ROWS + i % SCALE_ROWS;
            let any = random.next_u64();
            let magnitude = match (self.values, any >> 60) {
                _ if row >= n => 0,
                (_, 0) => 0,
                (Values::Extreme, 1..4) => any as u16 % 0x400,
                (Values::Extreme, _) => any as u16 % 0x7c00,
                // From 2^-9 to 2^-1.
                (Values::Random, _) => 0x1800 + any as u16 % 0x2000,
            };
            bits.push(magnitude | (any >> 32) as u16 & if row < n { 0x8000 } else { 0 });
            let wide = if half || any >> 40 & 7 > 0 { 1.0 } else { 1e-33 };
            full.push(sdk::f16_value(bits[i]) * wide * if half { 1.0 } else { 1.000_123 });
        }
        let scales = match half {
            true => sdk::Scales::F16 { group: weight_group, values: &bits },
            false => sdk::Scales::F32 { group: weight_group, values: &full },
        };
        let (length, groups) = (sdk::group_length(k, group), sdk::groups(k, group));
        let group_sum = x.q().chunks_exact(x.stride()).flat_map(|row| row[..k].chunks(length));
        let group_sum: Vec<i32> = group_sum.map(|group| group.iter().map(|&q| i32::from(q)).sum()).collect();
        // The scales of rows, some of which are not finite, times some of the groups.
        let factor = |i: usize| if groups == 1 { 1.0 } else { [1.0, 0.25, 3.0, 0.001][i % 4] };
        let group_scale: Vec<f32> = (0..m * groups).map(|i| x.scale()[i / groups] * factor(i)).collect();
        let activations =
            reference::ScaledActivations { m, q: x.q(), stride: x.stride(), group, scale: &group_scale };
        let mut expected = vec![0f32; m * n];
        reference::scaled_matmul(weights, (n, k), scales, activations, &mut expected, n);
        let scales = match half {
            true => bits.iter().flat_map(|bits| bits.to_ne_bytes()).collect(),
            false => bytes_of_floats(&full),
        };
        Scaled { scales, group_scale, group_sum, expected }
    }

    fn walled(&self, name: &'static str, size: usize, alignment: usize) -> Result<Walled, String> {
        Walled::new(name, size, alignment, self.place, self.walls)
            .map_err(|error| format!("the gate has no memory for {name}: {error}"))
    }

    /// A read-only input between walls.
    pub(super) fn input(&self, name: &'static str, bytes: &[u8], alignment: usize) -> Result<Walled, String> {
        let mut buffer = self.walled(name, bytes.len(), alignment)?;
        buffer.bytes_mut().copy_from_slice(bytes);
        freeze(&mut buffer)?;
        Ok(buffer)
    }

    fn run(&self, kernel: &Kernel, pool: &Pool, random: &mut SplitMix64) -> Result<(), String> {
        let Self { m, n, k, .. } = *self;
        let (weights, x) = self.inputs(random);
        let weight_scale = self.scale();
        let mut expected = vec![0f32; m * n];
        let scaled = self.groups.map(|groups| self.scaled(groups, &weights, &x, random));
        match &scaled {
            Some(scaled) => expected.clone_from(&scaled.expected),
            None => {
                let (q, y) = (x.q(), &mut expected);
                reference::matmul(&weights, n, k, weight_scale, q, x.stride(), x.scale(), m, y, n);
            }
        }

        let canonical = self.input("the canonical weights", &weights, CANONICAL_ALIGNMENT)?;
        let packed = match kernel.layout() {
            None => canonical,
            Some(_) => self.pack(kernel, &canonical, n, k)?,
        };

        let mut q =
            self.walled("the activations", m * x.stride() + ACTIVATION_SLACK, ACTIVATION_ALIGNMENT)?;
        let rows: &[u8] = bytes_of(x.q());
        q.bytes_mut()[..rows.len()].copy_from_slice(rows);
        freeze(&mut q)?;
        let scale = self.input("the rows' scales", &bytes_of_floats(x.scale()), 4)?;
        let sums: Vec<u8> = x.sum().iter().flat_map(|sum| sum.to_ne_bytes()).collect();
        let sum = self.input("the rows' sums", &sums, 4)?;
        let mut abi_x = abi::Activations {
            q: q.as_ptr().cast(),
            scale: scale.as_ptr().cast(),
            sum: sum.as_ptr().cast(),
            group_scale: scale.as_ptr().cast(),
            group_sum: sum.as_ptr().cast(),
            ..x.as_abi()
        };
        let mut of_groups = Vec::new();
        if let (Some(scaled), Some((_, group, _))) = (&scaled, self.groups) {
            let group_scale = self.input("the groups' scales", &bytes_of_floats(&scaled.group_scale), 4)?;
            let sums: Vec<u8> = scaled.group_sum.iter().flat_map(|sum| sum.to_ne_bytes()).collect();
            let group_sum = self.input("the groups' sums", &sums, 4)?;
            abi_x.group = group as u64;
            abi_x.group_scale = group_scale.as_ptr().cast();
            abi_x.group_sum = group_sum.as_ptr().cast();
            of_groups.extend([group_scale, group_sum, self.input("the weights' scales", &scaled.scales, 4)?]);
        }

        let workspace_size = |signature| {
            kernel.workspace_size(&signature).map_err(|failure: KernelFailure| failure.to_string())
        };
        let size = workspace_size(signature(self, pool))?;
        let other = Signature { n: n as u64 + 1, threads: 1, ..signature(self, pool) };
        if workspace_size(other)? != size {
            return Err("workspace_size depends on more than m and k".into());
        }
        if size > crate::plugin::max_workspace(m, x.stride()) {
            return Err(KernelFailure::Workspace { bytes: size }.to_string());
        }
        let mut workspace = self.walled("the workspace", size, WORKSPACE_ALIGNMENT)?;
        // SAFETY: filled activations, and a workspace of the size that the kernel asked for.
        unsafe { kernel.prepare(&abi_x, workspace.as_mut_ptr()) }.map_err(|failure| failure.to_string())?;
        workspace.check()?;
        freeze(&mut workspace)?;

        let size = kernel.scratch_size(&signature(self, pool)).map_err(|failure| failure.to_string())?;
        let other = Signature { threads: 1, ..signature(self, pool) };
        if kernel.scratch_size(&other).map_err(|failure| failure.to_string())? != size {
            return Err("scratch_size depends on more than m, n and k".into());
        }
        if size > crate::plugin::max_workspace(m, x.stride()) {
            return Err(KernelFailure::Workspace { bytes: size }.to_string());
        }
        // One between walls for each thread.
        let scratch = (0..pool.threads())
            .filter(|_| size > 0)
            .map(|_| self.walled("a thread's scratch", size, WORKSPACE_ALIGNMENT));
        let mut scratch: Vec<Walled> = scratch.collect::<Result<_, _>>()?;
        let of_threads: Vec<ThreadScratch> =
            scratch.iter_mut().map(|buffer| ThreadScratch::new(buffer.as_mut_ptr(), size)).collect();

        // Some columns of another matrix on the left, as when several share an output.
        let (column, stride) = (2, n + 5);
        let count = column + (m - 1) * stride + n;
        let mut y = self.walled("the output", count * 4, 4)?;
        for out in y.bytes_mut().chunks_exact_mut(4) {
            out.copy_from_slice(&POISON.to_ne_bytes());
        }
        let output = SharedOutput(Output {
            struct_size: size_of::<Output>() as u64,
            y: y.as_mut_ptr().cast::<f32>().wrapping_add(column),
            stride: stride as u64,
        });
        let mut abi_weights = crate::manager::abi_weights(n, k, weight_scale, packed.bytes());
        if let (Some((group, _, half)), Some(scales)) = (self.groups, of_groups.last()) {
            abi_weights.scale = 0.0;
            abi_weights.scale_format = if half { abi::SCALE_F16 } else { abi::SCALE_F32 };
            abi_weights.group = group as u64;
            abi_weights.scales = scales.as_ptr();
        }
        let prepared = workspace.bytes();
        let tiles = self.tiles(kernel.row_granule());
        let failure: Mutex<Option<String>> = Mutex::default();
        let fail = |reason: String| {
            failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(reason);
        };
        let run = |tile: &Tile| {
            let thread = pool.thread();
            let mut tile = Tile { thread: thread as u32, ..*tile };
            if let Some(scratch) = of_threads.get(thread) {
                // Each thread has a buffer of its own here, and this is the first scratch in it.
                tile = scratch.give(tile, 0);
            }
            // SAFETY: filled structs, buffers as large as the ABI says, tiles that do not overlap, scratch of the thread.
            let result = unsafe { kernel.run(&abi_weights, &abi_x, prepared.as_ptr(), output.get(), &tile) };
            if let Err(error) = result {
                fail(error.to_string());
            }
        };
        match self.tiling {
            Tiling::Threads => pool.run(tiles.len(), &|i| run(&tiles[i])),
            _ => tiles.iter().rev().for_each(run),
        }
        if let Some(reason) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
            return Err(reason);
        }
        let all = [&packed, &q, &scale, &sum, &workspace, &y].into_iter().chain(&of_groups).chain(&scratch);
        for buffer in all {
            buffer.check()?;
        }
        let values: Vec<f32> =
            y.bytes().chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().expect("4 bytes"))).collect();
        compare(&values, &expected, (n, stride, column), |got, want| {
            got.to_bits() == want.to_bits() || (want.is_nan() && got.is_nan())
        })
    }

    /// The weights in the kernel's packing, packed range by range, from the last to the first, and
    /// unpacked again.
    pub(super) fn pack(
        &self,
        kernel: &Kernel,
        canonical: &Walled,
        n: usize,
        k: usize,
    ) -> Result<Walled, String> {
        let size = kernel.packed_bytes(n, k).map_err(|failure| failure.to_string())?;
        let size =
            size.ok_or_else(|| format!("it supports the shape, and its packed_size of [{n}, {k}] is 0"))?;
        let mut packed = self.walled("the packed weights", size, kernel.weight_alignment())?;
        let weights = crate::manager::abi_weights(n, k, 1.0, canonical.bytes());
        let words = |what: &str| {
            let what = what.to_owned();
            move |failure: KernelFailure| format!("{what}: {failure}")
        };
        let step = match self.tiling {
            Tiling::Whole => n.next_multiple_of(kernel.row_granule()),
            _ => kernel.row_granule(),
        };
        for start in (0..n).step_by(step).rev() {
            let rows = start..(start + step).min(n);
            // SAFETY: a buffer of the size and the alignment that the kernel asked for.
            unsafe { kernel.pack(&weights, packed.as_mut_ptr(), rows) }.map_err(words("pack"))?;
        }
        packed.check()?;
        canonical.check()?;
        freeze(&mut packed)?;
        let mut back = self.walled("the unpacked weights", canonical.bytes().len(), CANONICAL_ALIGNMENT)?;
        let weights = crate::manager::abi_weights(n, k, 1.0, packed.bytes());
        for start in (0..n).step_by(step) {
            let rows = start..(start + step).min(n);
            // SAFETY: filled weights of the kernel's own packing, and room for all rows.
            unsafe { kernel.unpack(&weights, back.as_mut_ptr(), rows) }.map_err(words("unpack"))?;
        }
        back.check()?;
        packed.check()?;
        match difference(back.bytes(), canonical.bytes(), k) {
            None => Ok(packed),
            Some(place) => Err(format!("unpack(pack(w)) differs from w {place}")),
        }
    }

    fn tiles(&self, granule: usize) -> Vec<Tile> {
        let (rows_n, rows_m) = match self.tiling {
            Tiling::Whole => (self.n.next_multiple_of(granule), self.m),
            Tiling::Finest => (granule, 1),
            Tiling::Threads => (self.n.div_ceil(6).next_multiple_of(granule), self.m.div_ceil(2)),
        };
        let mut tiles = Vec::new();
        for n0 in (0..self.n).step_by(rows_n) {
            for m0 in (0..self.m).step_by(rows_m) {
                tiles.push(Tile::new(n0..(n0 + rows_n).min(self.n), m0..(m0 + rows_m).min(self.m)));
            }
        }
        tiles
    }
}

/// Compares outputs of n columns from `column` on, `stride` apart, which held [`POISON`] before.
///
/// # Errors
/// The first one that is not right, was not written, or was written beside them.
pub(super) fn compare(
    y: &[f32],
    expected: &[f32],
    (n, stride, column): (usize, usize, usize),
    right: impl Fn(f32, f32) -> bool,
) -> Result<(), String> {
    let rows = expected.len() / n;
    for (i, &got) in y.iter().enumerate() {
        let (row, column) = match i.checked_sub(column) {
            Some(i) if i % stride < n && i / stride < rows => (i / stride, i % stride),
            _ if got.to_bits() == POISON.to_bits() => continue,
            None => return Err(format!("it wrote before row 0 of its output ({got:e})")),
            Some(i) => return Err(format!("it wrote behind row {} of its output ({got:e})", i / stride)),
        };
        let want = expected[row * n + column];
        if got.to_bits() == POISON.to_bits() {
            return Err(format!("y[{row}, {column}] was not written; the reference has {want:e}"));
        }
        if !right(got, want) {
            return Err(format!("y[{row}, {column}] = {got:e}, the reference has {want:e}"));
        }
    }
    Ok(())
}

/// Where two canonical matrices differ.
pub(crate) fn difference(got: &[u8], want: &[u8], k: usize) -> Option<String> {
    let at = got.iter().zip(want).position(|(got, want)| got != want)?;
    let row_bytes = canonical::row_bytes(k);
    let row = at / row_bytes;
    let rows = [got, want].map(|bytes| canonical::Row(&bytes[row * row_bytes..][..row_bytes]));
    Some(match (0..k).find(|&i| rows[0].code(i) != rows[1].code(i)) {
        Some(column) => format!("at row {row}, column {column}"),
        None => format!("in the padding of row {row}, which must be zero weights (code 1)"),
    })
}

/// The output, shared by the calls that write disjoint tiles of it.
#[derive(Clone, Copy)]
struct SharedOutput(Output);

// SAFETY: the pointer is to a buffer that outlives the calls, which write disjoint tiles.
unsafe impl Sync for SharedOutput {}

impl SharedOutput {
    fn get(&self) -> &Output {
        &self.0
    }
}

fn freeze(buffer: &mut Walled) -> Result<(), String> {
    buffer.freeze().map_err(|error| format!("the gate can't protect a buffer: {error}"))
}

fn bytes_of(values: &[i8]) -> &[u8] {
    // SAFETY: i8 and u8 have the same layout.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}

fn bytes_of_floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}
