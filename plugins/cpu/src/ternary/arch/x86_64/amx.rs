//! Intel AMX: `tdpbsud` on tiles of 16 rows by 64 bytes, 16384 products an instruction.
//!
//! The tiled layouts happen to be what the matrix unit wants: four consecutive weights of each of 16 rows,
//! side by side, are a row of its right operand, and both layouts hold such rows one over the other in a
//! vector's bits. So weights are unpacked without shuffles, into a place that stays in the first cache, while
//! those before them are multiplied. The left operand are the activations where they lie.
//!
//! The instructions are written as assembly, since Rust has no stable intrinsics for them. The system must
//! allow a process to use the unit (Linux: `arch_prctl(ARCH_REQ_XCOMP_PERM)`), which is asked for at the
//! first call.

use std::arch::asm;
use std::ffi::CStr;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use bitnet_burn_plugin::abi::Signature;
use bitnet_burn_plugin::features::{self, Features};
use bitnet_burn_plugin::sdk::{
    ActivationsRef, KernelError, KernelResult, OutputTile, TernaryKernel, WeightsRef,
};

use crate::ternary::generic::{self, TileJob};
use crate::ternary::tile::{self, BLOCK_ROWS, STEP_BYTES};
use crate::ternary::trits;

/// 32-row blocks of the layout `t2x32`.
pub(crate) type Tiles = Amx<Pairs>;
/// 32-row blocks of the layout `t5x32`.
pub(crate) type Trits = Amx<Fives>;

/// Packs or unpacks rows: [`tile::pack`], [`tile::unpack`], or another layout's.
type Repack = fn(&WeightsRef, Range<usize>, &mut [u8]) -> KernelResult;

/// The sums of activation rows with a block of weights.
///
/// # Safety
/// The CPU has AVX-512BW, VBMI and AMX; the unit is configured for the rows that the pointer points to, each of
/// which has as many readable bytes as the number says; the block has weights for all of them, in groups as
/// [`Weights`] says.
type Products = unsafe fn(&mut Places, Weights, *const i8, usize, &mut Sums);

/// A tiled layout, and its products.
pub(crate) trait Packing: Send + Sync + 'static {
    /// The kernel's name.
    const NAME: &'static CStr;
    /// The layout's name.
    const LAYOUT: &'static CStr;
    /// Weights of a row in a step.
    const STEP: usize;
    /// Packs canonical rows.
    const PACK: Repack;
    /// Its inverse.
    const UNPACK: Repack;
    /// With up to 16 activation rows, and with 17 to 32.
    const PRODUCTS: [Products; 2];
}

/// 2 bits a weight.
pub(crate) struct Pairs;

impl Packing for Pairs {
    const NAME: &'static CStr = c"t2-amx";
    const LAYOUT: &'static CStr = tile::LAYOUT;
    const STEP: usize = tile::STEP;
    const PACK: Repack = tile::pack;
    const UNPACK: Repack = tile::unpack;
    const PRODUCTS: [Products; 2] = [pairs_of_one, pairs_of_two];
}

/// 1.6 bits a weight.
pub(crate) struct Fives;

impl Packing for Fives {
    const NAME: &'static CStr = c"t5-amx";
    const LAYOUT: &'static CStr = trits::LAYOUT;
    const STEP: usize = trits::STEP;
    const PACK: Repack = trits::pack;
    const UNPACK: Repack = trits::unpack;
    const PRODUCTS: [Products; 2] = [fives_of_one, fives_of_two];
}

/// A block of weights in groups of 16 steps, of which the last is at `last`: elsewhere where it had to be
/// filled up.
#[derive(Clone, Copy)]
pub(crate) struct Weights {
    first: *const u8,
    last: *const u8,
    groups: usize,
}

/// The kernel for a layout.
pub(crate) struct Amx<P>(PhantomData<P>);

impl<P: Packing> TernaryKernel for Amx<P> {
    const NAME: &'static CStr = P::NAME;
    const LAYOUT: Option<&'static CStr> = Some(P::LAYOUT);
    const FEATURES: &'static CStr = c"avx512f,avx512bw,avx512vl,avx512vbmi,amx-tile,amx-int8";
    const ROW_GRANULE: usize = BLOCK_ROWS;

    fn supports(signature: &Signature) -> bool {
        generic::supports(signature, generic::MAX_K)
    }

    fn granule_bytes(k: usize) -> usize {
        k.div_ceil(P::STEP) * STEP_BYTES
    }

    fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        P::PACK(canonical, rows, out)
    }

    fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        P::UNPACK(packed, rows, out)
    }

    fn run(w: &WeightsRef, x: &ActivationsRef, _workspace: &[u8], y: &mut OutputTile) -> KernelResult {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
        fn run<P: Packing>(job: TileJob) {
            // SAFETY: `permitted` found the features.
            unsafe { multiply::<P>(job) }
        }
        if !permitted() {
            return Err(KernelError::unsupported("this CPU lacks AMX, or the system does not allow it"));
        }
        let job = TileJob::new(w, x, y, P::STEP)?;
        // SAFETY: `permitted` found the features.
        unsafe { run::<P>(job) };
        Ok(())
    }
}

/// Whether this CPU has AMX with int8 products (and AVX-512 beside it) and the system lets this process use
/// it, which is asked for once.
fn permitted() -> bool {
    const NEEDED: Features = Features::of("avx512f,avx512bw,avx512vl,avx512vbmi,amx-tile,amx-int8");
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    features::has(NEEDED) && *PERMITTED.get_or_init(request)
}

/// Asks Linux for the tiles' state (Documentation/arch/x86/xstate.rst).
#[cfg(target_os = "linux")]
fn request() -> bool {
    const SYS_ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: a system call that takes two numbers and touches no memory of this process; the registers that
    // the kernel may change are declared.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Other systems have no request that is tested here.
#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false
}

/// Rows of a tile of the unit.
const TILE_ROWS: usize = 16;
/// Bytes of a row of a tile: four weights of each of 16 rows, or 64 activations.
const ROW: usize = 64;
/// Activation rows that are multiplied at once: two tiles.
const PAIR_ROWS: usize = 2 * TILE_ROWS;
/// Steps of weights that are unpacked to one place: four tiles of the unit of one layout, five of the other.
const GROUP_STEPS: usize = 16;
/// Bytes of such a group.
const GROUP: usize = GROUP_STEPS * STEP_BYTES;
/// Bytes of an unpacked group, for either of the block's 16 rows: five tiles, or four and room.
const PLANE: usize = 5 * TILE_ROWS * ROW;
/// Bytes of an unpacked group.
const PLACE: usize = 2 * PLANE;

/// Two places for unpacked groups: one is multiplied while the other is filled.
#[repr(align(64))]
pub(crate) struct Places(MaybeUninit<[u8; 2 * PLACE]>);

/// Sums of [activation rows, weight rows], in whole cache lines.
#[repr(align(64))]
pub(crate) struct Sums([[i32; BLOCK_ROWS]; PAIR_ROWS]);

/// Computes the job's tile.
///
/// # Safety
/// The CPU has AVX-512BW, VBMI and AMX, and the system lets the process use it.
#[inline(always)]
unsafe fn multiply<P: Packing>(mut job: TileJob) {
    let (ns, ms) = (job.y.rows_n(), job.y.rows_m());
    let stride = job.x.stride();
    let groups = job.steps.div_ceil(GROUP_STEPS);
    let left = job.steps - (groups - 1) * GROUP_STEPS;
    let mut unit = Unit { rows: 0 };
    let mut places = Places(MaybeUninit::uninit());
    let mut sums = Sums([[0; BLOCK_ROWS]; PAIR_ROWS]);
    // A last group that has to be filled up: zeros behind its steps are codes that multiply as zeros.
    let mut filled = [0; GROUP];
    for chunk in generic::chunks(ms, generic::rows_in_cache(stride).next_multiple_of(PAIR_ROWS)) {
        for n in ns.clone().step_by(BLOCK_ROWS) {
            let first = job.weights(n);
            let mut last = first.wrapping_add((groups - 1) * GROUP);
            if left < GROUP_STEPS {
                // SAFETY: these are the block's last steps, less than a group.
                unsafe { filled.as_mut_ptr().copy_from_nonoverlapping(last, left * STEP_BYTES) };
                last = filled.as_ptr();
            }
            for m in chunk.clone().step_by(PAIR_ROWS) {
                let rows = PAIR_ROWS.min(chunk.end - m);
                let x = job.x.padded_rows(m..m + rows).as_ptr();
                // SAFETY: the caller's promise for the features; the unit is configured for the rows, of
                // `stride` bytes each, and the block has steps for all k of them.
                unsafe {
                    unit.configure(rows);
                    let products = P::PRODUCTS[usize::from(rows > TILE_ROWS)];
                    products(&mut places, Weights { first, last, groups }, x, stride, &mut sums);
                }
                job.store(m, n, &sums.0[..rows]);
            }
        }
    }
}

/// The unit, configured for this number of activation rows (0: not yet) until this is dropped.
struct Unit {
    rows: usize,
}

impl Unit {
    /// # Safety
    /// The CPU has AMX, and the system lets the process use it; `rows` is 1 to [`PAIR_ROWS`].
    #[inline(always)]
    unsafe fn configure(&mut self, rows: usize) {
        if self.rows == rows {
            return;
        }
        #[repr(align(64))]
        struct Configuration([u8; 64]);
        let mut config = Configuration([0; 64]);
        // Palette 1: eight tiles.
        config.0[0] = 1;
        // 0 to 3 are sums, [activation rows, 16 weight rows] of i32; 4 and 5 activations; 6 and 7 weights.
        let (first, second) = (rows.min(TILE_ROWS) as u8, rows.saturating_sub(TILE_ROWS) as u8);
        for (tile, rows) in [first, first, second, second, first, second, 16, 16].into_iter().enumerate() {
            config.0[16 + 2 * tile] = if rows == 0 { 0 } else { ROW as u8 };
            config.0[48 + tile] = rows;
        }
        // SAFETY: the caller's promise; the 64 bytes are a configuration as the manual has it (Intel SDM,
        // LDTILECFG).
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) config.0.as_ptr(), options(nostack, preserves_flags, readonly));
        }
        self.rows = rows;
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: gives back the state that `configure` took; without any it does nothing.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
}

/// Multiplies tiles that stay in the unit, with four independent sums, `rounds` (at least 1) times; how many
/// multiply-adds a round has. `None` without the unit.
pub(crate) fn multiply_adds(rounds: u32) -> Option<u64> {
    if !permitted() {
        return None;
    }
    let mut unit = Unit { rows: 0 };
    // SAFETY: the unit is permitted; what the tiles hold is zero after `ldtilecfg`, and does not matter.
    unsafe {
        unit.configure(PAIR_ROWS);
        asm!(
            "2:",
            "tdpbsud tmm0, tmm4, tmm6",
            "tdpbsud tmm1, tmm4, tmm7",
            "tdpbsud tmm2, tmm5, tmm6",
            "tdpbsud tmm3, tmm5, tmm7",
            "dec {rounds:e}",
            "jnz 2b",
            rounds = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nomem, nostack),
        );
    }
    Some(4 * (TILE_ROWS * TILE_ROWS * ROW) as u64)
}

/// Assembly that unpacks vector `$tile` of step `$step` of the group at `w` to the place at `next`, with
/// 2 bits a weight.
macro_rules! unpack_pairs {
    ($step:literal, $tile:literal) => {
        concat!(
            "vmovdqu64 zmm0, [{w} + 128*", $step, " + 64*", $tile, "]\n",
            unpack_pairs!(store "256", $step, $tile),
        )
    };
    // The codes in zmm0, to rows of 64 bytes; `$rows` bytes a step.
    (store $rows:literal, $step:literal, $tile:literal) => {
        concat!(
            "vpsrlw zmm1, zmm0, 2\n",
            "vpsrlw zmm2, zmm0, 4\n",
            "vpsrlw zmm3, zmm0, 6\n",
            "vpandd zmm0, zmm0, zmm7\n",
            "vpandd zmm1, zmm1, zmm7\n",
            "vpandd zmm2, zmm2, zmm7\n",
            "vpandd zmm3, zmm3, zmm7\n",
            "vmovdqa64 [{next} + {plane}*", $tile, " + ", $rows, "*", $step, "], zmm0\n",
            "vmovdqa64 [{next} + {plane}*", $tile, " + ", $rows, "*", $step, " + 64], zmm1\n",
            "vmovdqa64 [{next} + {plane}*", $tile, " + ", $rows, "*", $step, " + 128], zmm2\n",
            "vmovdqa64 [{next} + {plane}*", $tile, " + ", $rows, "*", $step, " + 192], zmm3\n",
        )
    };
}

/// The same with 1.6 bits a weight: see [`trits`] for what the tables are.
macro_rules! unpack_fives {
    ($step:literal, $tile:literal) => {
        concat!(
            "vmovdqu64 zmm4, [{w} + 128*", $step, " + 64*", $tile, "]\n",
            "vpcmpnltub k1, zmm4, zmm8\n",
            "vpermb zmm0, zmm4, zmm9\n",
            "vpermb zmm0 {{k1}}, zmm4, zmm10\n",
            "vpandd zmm5, zmm4, zmm8\n",
            "vpermb zmm5 {{k1}}, zmm4, zmm11\n",
            "vpsrlw zmm5, zmm5, 6\n",
            "vpandd zmm5, zmm5, zmm7\n",
            "vmovdqa64 [{next} + {plane}*", $tile, " + 320*", $step, " + 256], zmm5\n",
            unpack_pairs!(store "320", $step, $tile),
        )
    };
}

/// Assembly that multiplies tile `$tile` of the group at `place` by the next 64 activations of two tiles of
/// rows, or of one.
macro_rules! multiply {
    (two, $tile:literal) => {
        concat!(
            "tileloadd tmm6, [{place} + {row} + 1024*",
            $tile,
            "]\n",
            "tileloadd tmm4, [{x0} + {stride} + 64*",
            $tile,
            "]\n",
            "tdpbsud tmm0, tmm4, tmm6\n",
            "tileloadd tmm7, [{place} + {row} + {plane} + 1024*",
            $tile,
            "]\n",
            "tdpbsud tmm1, tmm4, tmm7\n",
            "tileloadd tmm5, [{x1} + {stride} + 64*",
            $tile,
            "]\n",
            "tdpbsud tmm2, tmm5, tmm6\n",
            "tdpbsud tmm3, tmm5, tmm7\n",
        )
    };
    (one, $tile:literal) => {
        concat!(
            "tileloadd tmm6, [{place} + {row} + 1024*",
            $tile,
            "]\n",
            "tileloadd tmm4, [{x0} + {stride} + 64*",
            $tile,
            "]\n",
            "tdpbsud tmm0, tmm4, tmm6\n",
            "tileloadd tmm7, [{place} + {row} + {plane} + 1024*",
            $tile,
            "]\n",
            "tdpbsud tmm1, tmm4, tmm7\n",
        )
    };
}

/// One loop over K: multiplies the tiles of a group, and between them unpacks the next group, some steps
/// after each tile.
macro_rules! products {
    ($name:ident, $rows:ident, $unpack:ident, tiles: {$($tile:literal: [$($step:literal)*])*},
     zero: [$($zero:literal),*], store: [$($store:literal),*]) => {
        /// # Safety
        /// As [`Products`], for the layout that is unpacked and the number of rows.
        unsafe fn $name(places: &mut Places, weights: Weights, x: *const i8, stride: usize, sums: &mut Sums) {
            // SAFETY: the caller's promise. Unpacking never goes beyond the last group, which is at `last`,
            // multiplying never beyond the row's `stride` activations. All registers that are written are
            // declared; the configuration is not touched.
            unsafe {
                asm!(
                    "vmovdqa64 zmm9, [{next}]",
                    "vmovdqa64 zmm10, [{next} + 64]",
                    "vmovdqa64 zmm11, [{next} + 128]",
                    "mov {next:e}, 3",
                    "vpbroadcastb zmm7, {next:e}",
                    "mov {next:e}, 0xc0",
                    "vpbroadcastb zmm8, {next:e}",
                    $($zero,)*
                    "mov {next}, {place}",
                    "cmp {groups}, 1",
                    "cmove {w}, {last}",
                    $($($unpack!($step, 0), $unpack!($step, 1),)*)*
                    "add {next}, {size}",
                    "2:",
                    // The next group, or the last one again.
                    "add {w}, {group}",
                    "dec {groups}",
                    "cmp {groups}, 1",
                    "cmovle {w}, {last}",
                    $(
                        multiply!($rows, $tile),
                        "dec {tiles}",
                        "jz 3f",
                        $($unpack!($step, 0), $unpack!($step, 1),)*
                    )*
                    "add {x0}, {depth}",
                    "add {x1}, {depth}",
                    "xchg {place}, {next}",
                    "jmp 2b",
                    "3:",
                    "mov {row}, {sums_row}",
                    $($store,)*
                    w = inout(reg) weights.first => _,
                    last = in(reg) weights.last,
                    groups = inout(reg) weights.groups => _,
                    tiles = inout(reg) stride / ROW => _,
                    x0 = inout(reg) x => _,
                    x1 = inout(reg) x.wrapping_add(TILE_ROWS * stride) => _,
                    stride = in(reg) stride,
                    place = inout(reg) places.0.as_mut_ptr() => _,
                    next = inout(reg) trits::TABLES.0.as_ptr() => _,
                    row = inout(reg) ROW => _,
                    sums = inout(reg) sums.0.as_mut_ptr() => _,
                    plane = const PLANE,
                    size = const PLACE,
                    group = const GROUP,
                    depth = const [$($tile),*].len() * ROW,
                    sums_row = const 4 * BLOCK_ROWS,
                    out("k1") _,
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                    out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
    ($one:ident, $two:ident, $unpack:ident, tiles: $tiles:tt) => {
        products!(
            $one, one, $unpack, tiles: $tiles,
            zero: ["tilezero tmm0", "tilezero tmm1"],
            store: ["tilestored [{sums} + {row}], tmm0", "tilestored [{sums} + {row} + 64], tmm1"]
        );
        products!(
            $two, two, $unpack, tiles: $tiles,
            zero: ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
            store: [
                "tilestored [{sums} + {row}], tmm0",
                "tilestored [{sums} + {row} + 64], tmm1",
                "add {sums}, 16*{sums_row}",
                "tilestored [{sums} + {row}], tmm2",
                "tilestored [{sums} + {row} + 64], tmm3"
            ]
        );
    };
}

products!(pairs_of_one, pairs_of_two, unpack_pairs, tiles: {
    0: [0 1 2 3]
    1: [4 5 6 7]
    2: [8 9 10 11]
    3: [12 13 14 15]
});

products!(fives_of_one, fives_of_two, unpack_fives, tiles: {
    0: [0 1 2 3]
    1: [4 5 6]
    2: [7 8 9]
    3: [10 11 12]
    4: [13 14 15]
});
