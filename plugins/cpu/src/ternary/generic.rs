//! The matmul loops over the two weight layouts, written once; an instruction set brings the inner
//! products of one block ([`TileMicro`], [`RowMicro`]).
//!
//! Everything here is `#[inline(always)]`: it is compiled into the caller, the one function per
//! instruction set that carries `#[target_feature]`, and so with that function's instructions.

use std::array::from_fn;
use std::ops::Range;

use bitnet_burn_plugin::abi::{
    ACTIVATION_ALIGNMENT, OPERATION_SCALED_TERNARY_MATMUL, OPERATION_TERNARY_MATMUL, SCALE_ROWS, Signature,
};
use bitnet_burn_plugin::sdk::{
    ActivationsRef, KernelError, KernelResult, OutputTile, Scales, WeightsRef, group_length, groups,
    groups_fit,
};
use bitnet_burn_plugin::{canonical, layouts};

use crate::ternary::tile::{self, BLOCK_ROWS, STEP_BYTES};

/// Activation bytes that are used again for every weight block: most of a second-level cache of 1 MiB or
/// half of it, with room for the weights that stream by.
const ACTIVATION_BYTES: usize = 480 * 1024;

/// Weights of a row up to which the ABI's i32 sums can't overflow.
pub(crate) const MAX_K: u64 = 1 << 23;

/// The operation of kernels for one scale, or for many.
pub(crate) const fn operation(many_scales: bool) -> u32 {
    if many_scales { OPERATION_SCALED_TERNARY_MATMUL } else { OPERATION_TERNARY_MATMUL }
}

/// Whether the signature is a ternary matmul with one scale and at most `max_k` weights a row.
pub(crate) fn supports(signature: &Signature, max_k: u64) -> bool {
    signature.operation == OPERATION_TERNARY_MATMUL && (1..=max_k).contains(&signature.k)
}

/// Whether the signature is a ternary matmul with many scales, of groups that this crate's kernels know, and at most
/// `max_k` weights a row.
pub(crate) fn supports_scaled(signature: &Signature, max_k: u64) -> bool {
    let Signature { operation, k, weight_group, activation_group, .. } = *signature;
    operation == OPERATION_SCALED_TERNARY_MATMUL
        && (1..=max_k).contains(&k)
        && groups_fit(weight_group as usize, activation_group as usize)
}

/// The groups of a matmul with many scales.
#[derive(Clone, Copy)]
struct Groups<'a> {
    scales: Scales<'a>,
    /// Groups of weights in a row.
    weights: usize,
    /// Values that share a scale of activations.
    activation_group: usize,
    /// Groups of activations in a row, and in a group of weights.
    activations: usize,
    per_weights: usize,
}

impl<'a> Groups<'a> {
    /// Checks that scales and groups fit together.
    fn new(w: &WeightsRef<'a>, x: &ActivationsRef) -> Result<Self, KernelError> {
        let (scales, k) = (w.scales(), w.k());
        if scales == Scales::None || !groups_fit(scales.group(), x.group()) {
            return Err(KernelError::invalid(format!(
                "scales of groups of {} weights for groups of {} activations",
                scales.group(),
                x.group()
            )));
        }
        let activations = groups(k, x.group());
        let activation_group = group_length(k, x.group());
        let per_weights = if scales.group() == 0 { activations } else { scales.group() / activation_group };
        Ok(Self { scales, weights: groups(k, scales.group()), activation_group, activations, per_weights })
    }

    /// The groups of activations in group `g` of the weights.
    fn within(&self, g: usize) -> Range<usize> {
        g * self.per_weights..self.activations.min((g + 1) * self.per_weights)
    }
}

/// Products of one block of a tiled layout with activation rows. All sums are of the *codes*: sum(c * x).
///
/// # Safety
/// For both functions: the CPU has the implementation's features; `w` points to `steps` steps of
/// [`tile::STEP_BYTES`] bytes; each `x` points to the activations of as many steps; all readable.
pub(crate) trait TileMicro {
    /// Activation rows that one call of [`gemm`](Self::gemm) takes at most; at most 8.
    const MR: usize;

    /// Sums of the 32 rows with one activation row.
    #[allow(clippy::missing_safety_doc, reason = "on the trait")]
    unsafe fn gemv(w: *const u8, steps: usize, x: *const i8) -> [i32; BLOCK_ROWS];

    /// Sums of the 32 rows with `M` activation rows.
    #[allow(clippy::missing_safety_doc, reason = "on the trait")]
    #[inline(always)]
    unsafe fn gemm<const M: usize>(w: *const u8, steps: usize, x: [*const i8; M]) -> [[i32; BLOCK_ROWS]; M] {
        // SAFETY: the caller's promise, row by row.
        x.map(|x| unsafe { Self::gemv(w, steps, x) })
    }

    /// Adds the products of a group that shares scales, `steps` steps, with `M` activation rows to `t`: with the sum `s` of
    /// a row's activations and their scale `a`, t = fma(sum(c * x) - s, a, t).
    ///
    /// # Safety
    /// As on the trait, for each `x`; the CPU has `fma`, too, where this is not the function below.
    #[inline(always)]
    unsafe fn add_group<const M: usize>(
        w: *const u8,
        steps: usize,
        x: [*const i8; M],
        s: [i32; M],
        a: [f32; M],
        t: &mut [[f32; BLOCK_ROWS]; M],
    ) {
        // SAFETY: the caller's promise.
        let sums =
            unsafe { if M == 1 { [Self::gemv(w, steps, x[0]); M] } else { Self::gemm::<M>(w, steps, x) } };
        for i in 0..M {
            for (t, sum) in t[i].iter_mut().zip(sums[i]) {
                *t = (sum.wrapping_sub(s[i]) as f32).mul_add(a[i], *t);
            }
        }
    }

    /// Whether the functions below are there: where unpacking takes a good part of [`gemm`](Self::gemm), a prompt
    /// unpacks a piece of the weights once, and all of its rows read that from the first-level cache.
    const UNPACKS: bool = false;

    /// Writes the codes of at most [`UNPACKED_STEPS`] steps out as bytes, in the order in which
    /// [`gemm_unpacked`](Self::gemm_unpacked) reads them.
    ///
    /// # Safety
    /// As on the trait.
    #[inline(always)]
    unsafe fn unpack(_w: *const u8, _steps: usize, _codes: &mut Codes) {
        unreachable!("it does not unpack");
    }

    /// What [`gemm`](Self::gemm) returns, from the codes that [`unpack`](Self::unpack) wrote for these steps.
    ///
    /// # Safety
    /// As on the trait, for each `x`; `steps` is at most [`UNPACKED_STEPS`].
    #[inline(always)]
    unsafe fn gemm_unpacked<const M: usize>(
        _codes: &Codes,
        _steps: usize,
        _x: [*const i8; M],
    ) -> [[i32; BLOCK_ROWS]; M] {
        unreachable!("it does not unpack");
    }
}

/// Steps whose codes, a byte each, take half of a first-level cache of 32 KiB.
pub(crate) const UNPACKED_STEPS: usize = 32;
/// Activation rows that share unpacked weights.
const UNPACKED_ROWS: usize = 128;

/// The codes of [`UNPACKED_STEPS`] steps, a byte each.
#[repr(align(64))]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AVX2 unpacks"))]
pub(crate) struct Codes(pub(crate) [u8; UNPACKED_STEPS * tile::STEP * BLOCK_ROWS]);

impl Codes {
    fn zeros() -> Self {
        Self([0; UNPACKED_STEPS * tile::STEP * BLOCK_ROWS])
    }
}

/// Products of canonical rows with activation rows. All sums are of the *codes*: sum(c * x).
///
/// # Safety
/// For both functions: the CPU has the implementation's features; `w` points to `N` canonical rows whose
/// activations take `stride` bytes (a multiple of 64), each [`row_bytes`] long; each `x` points to `stride`
/// activations, or to [`workspace_stride`](Self::workspace_stride) bytes that
/// [`prepare_row`](Self::prepare_row) filled, where that is not 0; all readable. `M` and `N` are at most
/// what the constants say.
pub(crate) trait RowMicro {
    /// Activation rows that one call of [`gemm`](Self::gemm) takes at most; at most 4.
    const MR: usize;
    /// Weight rows that one call of [`gemm`](Self::gemm) takes: 1, 2 or 4.
    const NR: usize;
    /// Weight rows that one call of [`gemv`](Self::gemv) takes: 1, 8 or 16.
    const GROUP: usize;

    /// Bytes of workspace for an activation row of `stride` bytes; 0 to read it as it is.
    fn workspace_stride(_stride: usize) -> usize {
        0
    }

    /// Fills a row's workspace from its activations.
    fn prepare_row(_x: &[i8], _workspace: &mut [u8]) {}

    /// Sums of `N` weight rows with one activation row. Goes through the rows one after the other: several
    /// short streams at once would defeat the hardware's prefetching.
    #[allow(clippy::missing_safety_doc, reason = "on the trait")]
    unsafe fn gemv<const N: usize>(w: *const u8, stride: usize, x: *const i8) -> [i32; N];

    /// Sums of `N` weight rows with each of `M` activation rows.
    #[allow(clippy::missing_safety_doc, reason = "on the trait")]
    #[inline(always)]
    unsafe fn gemm<const M: usize, const N: usize>(
        w: *const u8,
        stride: usize,
        x: [*const i8; M],
    ) -> [[i32; N]; M] {
        // SAFETY: the caller's promise, row by row.
        x.map(|x| unsafe { Self::gemv(w, stride, x) })
    }
}

/// Bytes of a canonical row whose activations take `stride` bytes: since that is k rounded up to a multiple
/// of 64, it has as many blocks as k.
#[inline(always)]
pub(crate) const fn row_bytes(stride: usize) -> usize {
    canonical::row_bytes(stride)
}

/// That activations, weights and output belong together: what every kernel's memory safety rests on.
fn check(w: &WeightsRef, x: &ActivationsRef, y: &OutputTile) -> KernelResult {
    let (ns, ms) = (y.rows_n(), y.rows_m());
    if x.k() != w.k() || x.stride() != x.k().next_multiple_of(ACTIVATION_ALIGNMENT) {
        return Err(KernelError::invalid(format!(
            "activations of {} values with stride {} for weights of {}",
            x.k(),
            x.stride(),
            w.k()
        )));
    }
    if ns.end > w.n() || ms.end > x.m() {
        return Err(KernelError::invalid(format!("a tile {ns:?} x {ms:?} outside {} x {}", w.n(), x.m())));
    }
    Ok(())
}

/// The arguments of a matmul with weights in a tiled layout, checked against each other.
pub(crate) struct TileJob<'a> {
    w: &'a WeightsRef<'a>,
    pub(crate) x: &'a ActivationsRef<'a>,
    pub(crate) y: &'a mut OutputTile,
    /// Steps of a block.
    pub(crate) steps: usize,
    /// Bytes of a step.
    step_bytes: usize,
}

impl<'a> TileJob<'a> {
    /// Checks that the buffers have the sizes that the kernels go by, for blocks with `step` weights of a
    /// row in a step, at most 64.
    pub(crate) fn new(
        w: &'a WeightsRef,
        x: &'a ActivationsRef,
        y: &'a mut OutputTile,
        step: usize,
    ) -> Result<Self, KernelError> {
        Self::with_step_bytes(w, x, y, step, STEP_BYTES)
    }

    /// The same for layouts whose steps are not [`STEP_BYTES`] long.
    pub(crate) fn with_step_bytes(
        w: &'a WeightsRef,
        x: &'a ActivationsRef,
        y: &'a mut OutputTile,
        step: usize,
        step_bytes: usize,
    ) -> Result<Self, KernelError> {
        check(w, x, y)?;
        let steps = w.k().div_ceil(step);
        layouts::check_range(w, &y.rows_n())?;
        layouts::check_packed(w, steps * step_bytes)?;
        Ok(Self { w, x, y, steps, step_bytes })
    }

    /// The block of weight row `n`: `steps` steps.
    #[inline(always)]
    pub(crate) fn weights(&self, n: usize) -> *const u8 {
        self.blocks(n, 1)
    }

    /// `count` blocks from that of weight row `n`, one behind the other.
    #[inline(always)]
    pub(crate) fn blocks(&self, n: usize, count: usize) -> *const u8 {
        let bytes = self.steps * self.step_bytes;
        self.w.data()[n / BLOCK_ROWS * bytes..][..count * bytes].as_ptr()
    }

    /// Computes the tile.
    ///
    /// # Safety
    /// The CPU has the features of `K`.
    #[inline(always)]
    pub(crate) unsafe fn run<K: TileMicro>(mut self) {
        let (ns, ms) = (self.y.rows_n(), self.y.rows_m());
        for chunk in chunks(ms, rows_in_cache(self.x.stride())) {
            for n in ns.clone().step_by(BLOCK_ROWS) {
                let mut m = chunk.start;
                while m < chunk.end {
                    if K::UNPACKS && chunk.end - m > 2 * K::MR {
                        let end = chunk.end.min(m + UNPACKED_ROWS);
                        // SAFETY: the caller's promise; (m, n) begins a block of the tile with rows up to `end`.
                        unsafe { self.unpacked_block::<K>(m..end, n) };
                        m = end;
                        continue;
                    }
                    let rows = (chunk.end - m).min(K::MR).min(8);
                    // SAFETY: the caller's promise; (m, n) begins a block of the tile and has `rows` rows.
                    unsafe {
                        match rows {
                            // (Numbers of rows that it does not take are not compiled.)
                            1 if K::MR >= 1 => self.block::<K, 1>(m, n),
                            2 if K::MR >= 2 => self.block::<K, 2>(m, n),
                            3 if K::MR >= 3 => self.block::<K, 3>(m, n),
                            4 if K::MR >= 4 => self.block::<K, 4>(m, n),
                            5 if K::MR >= 5 => self.block::<K, 5>(m, n),
                            6 if K::MR >= 6 => self.block::<K, 6>(m, n),
                            7 if K::MR >= 7 => self.block::<K, 7>(m, n),
                            _ if K::MR >= 8 => self.block::<K, 8>(m, n),
                            _ => unreachable!("at most MR rows"),
                        }
                    }
                    m += rows;
                }
            }
        }
    }

    /// Computes y[m .. m + M, n .. n + 32], cut off at the tile's end.
    ///
    /// # Safety
    /// The CPU has the features of `K`.
    #[inline(always)]
    unsafe fn block<K: TileMicro, const M: usize>(&mut self, m: usize, n: usize) {
        let (weights, steps) = (self.weights(n), self.steps);
        let rows: [*const i8; M] = from_fn(|i| self.x.padded_row(m + i).as_ptr());
        // SAFETY: a block has `steps` steps. Of the last one's activations, at most 64, those behind the k of
        // a row are its padding (`check`), the next row's, or the slack behind the last row. Features: the
        // caller.
        let sums = unsafe {
            if M == 1 { [K::gemv(weights, steps, rows[0]); M] } else { K::gemm::<M>(weights, steps, rows) }
        };
        self.store(m, n, &sums);
    }

    /// Computes y[rows, n .. n + 32], cut off at the tile's end; at most [`UNPACKED_ROWS`] rows.
    ///
    /// # Safety
    /// The CPU has the features of `K`.
    #[inline(always)]
    unsafe fn unpacked_block<K: TileMicro>(&mut self, rows: Range<usize>, n: usize) {
        let weights = self.weights(n);
        let mut codes = Codes::zeros();
        let mut sums = [[0i32; BLOCK_ROWS]; UNPACKED_ROWS];
        for from in (0..self.steps).step_by(UNPACKED_STEPS) {
            let steps = UNPACKED_STEPS.min(self.steps - from);
            // SAFETY: a block has `self.steps` steps. Features: the caller.
            unsafe { K::unpack(weights.add(from * STEP_BYTES), steps, &mut codes) };
            for m in rows.clone().step_by(K::MR.min(4)) {
                let sums = &mut sums[m - rows.start..];
                // SAFETY: the caller's promise; the rows are the tile's.
                unsafe {
                    match (rows.end - m).min(K::MR) {
                        1 => self.add_unpacked::<K, 1>(m, &codes, from, steps, sums),
                        2 => self.add_unpacked::<K, 2>(m, &codes, from, steps, sums),
                        3 => self.add_unpacked::<K, 3>(m, &codes, from, steps, sums),
                        _ => self.add_unpacked::<K, 4>(m, &codes, from, steps, sums),
                    }
                }
            }
        }
        self.store(rows.start, n, &sums[..rows.len()]);
    }

    /// Adds the products of the steps from `from` with the rows m .. m + M to the sums.
    ///
    /// # Safety
    /// The CPU has the features of `K`.
    #[inline(always)]
    unsafe fn add_unpacked<K: TileMicro, const M: usize>(
        &self,
        m: usize,
        codes: &Codes,
        from: usize,
        steps: usize,
        sums: &mut [[i32; BLOCK_ROWS]],
    ) {
        let rows: [*const i8; M] = from_fn(|i| self.x.padded_row(m + i).as_ptr());
        // SAFETY: as in `block`, from the activations of step `from`.
        let products = unsafe { K::gemm_unpacked::<M>(codes, steps, rows.map(|x| x.add(from * tile::STEP))) };
        for (sums, products) in sums.iter_mut().zip(products) {
            for (sum, product) in sums.iter_mut().zip(products) {
                *sum = sum.wrapping_add(product);
            }
        }
    }

    /// Computes the tile with many scales. The layout has [`STEP`](tile::STEP) weights of a row in a step.
    ///
    /// # Errors
    /// If scales and groups do not fit.
    ///
    /// # Safety
    /// The CPU has the features of `K`.
    #[inline(always)]
    pub(crate) unsafe fn run_scaled<K: TileMicro>(mut self) -> KernelResult {
        let groups = Groups::new(self.w, self.x)?;
        let (ns, ms) = (self.y.rows_n(), self.y.rows_m());
        for chunk in chunks(ms, rows_in_cache(self.x.stride())) {
            for n in ns.clone().step_by(BLOCK_ROWS) {
                let mut m = chunk.start;
                while m < chunk.end {
                    let rows = (chunk.end - m).min(K::MR).min(8);
                    // SAFETY: the caller's promise; (m, n) begins a block of the tile and has `rows` rows.
                    unsafe {
                        match rows {
                            // (Numbers of rows that it does not take are not compiled.)
                            1 if K::MR >= 1 => self.scaled_block::<K, 1>(m, n, groups),
                            2 if K::MR >= 2 => self.scaled_block::<K, 2>(m, n, groups),
                            3 if K::MR >= 3 => self.scaled_block::<K, 3>(m, n, groups),
                            4 if K::MR >= 4 => self.scaled_block::<K, 4>(m, n, groups),
                            5 if K::MR >= 5 => self.scaled_block::<K, 5>(m, n, groups),
                            6 if K::MR >= 6 => self.scaled_block::<K, 6>(m, n, groups),
                            7 if K::MR >= 7 => self.scaled_block::<K, 7>(m, n, groups),
                            _ if K::MR >= 8 => self.scaled_block::<K, 8>(m, n, groups),
                            _ => unreachable!("at most MR rows"),
                        }
                    }
                    m += rows;
                }
            }
        }
        Ok(())
    }

    /// Computes y[m .. m + M, n .. n + 32] with many scales, cut off at the tile's end.
    ///
    /// # Safety
    /// The CPU has the features of `K`.
    #[inline(always)]
    unsafe fn scaled_block<K: TileMicro, const M: usize>(&mut self, m: usize, n: usize, groups: Groups) {
        const { assert!(BLOCK_ROWS == SCALE_ROWS) }
        let (weights, k, group) = (self.weights(n), self.w.k(), groups.activation_group);
        let rows: [*const i8; M] = from_fn(|i| self.x.padded_row(m + i).as_ptr());
        let (a, s): ([&[f32]; M], [&[i32]; M]) =
            (from_fn(|i| self.x.group_scales(m + i)), from_fn(|i| self.x.group_sums(m + i)));
        let mut y = [[0f32; BLOCK_ROWS]; M];
        for g in 0..groups.weights {
            let mut t = [[0f32; BLOCK_ROWS]; M];
            for part in groups.within(g) {
                let from = part * group;
                let steps = group.min(k - from).div_ceil(tile::STEP);
                // SAFETY: a block has k.div_ceil(STEP) steps, and `from` begins one, since groups but the last are whole
                // steps (`groups_fit`). Of the last step's activations those behind the k of a row are its padding (`check`),
                // the next row's, or the slack behind the last row. Features: the caller.
                unsafe {
                    let (w, x) = (weights.add(from / tile::STEP * STEP_BYTES), rows.map(|x| x.add(from)));
                    K::add_group::<M>(w, steps, x, s.map(|s| s[part]), a.map(|a| a[part]), &mut t);
                }
            }
            let scales = groups.scales.block(n, g, groups.weights);
            for i in 0..M {
                for r in 0..BLOCK_ROWS {
                    y[i][r] = scales[r].mul_add(t[i][r], y[i][r]);
                }
            }
        }
        let count = BLOCK_ROWS.min(self.y.rows_n().end - n);
        for (i, values) in y.iter().enumerate() {
            let out = self.y.at(m + i, n);
            // SAFETY: `at` checked (m, n); the elements n .. n + count follow it within the tile, which belongs to this
            // call alone.
            unsafe { out.copy_from_nonoverlapping(values.as_ptr(), count) }
        }
    }

    /// Stores y[m .. m + sums.len(), n .. n + 32], cut off at the tile's end, from sums of codes.
    #[inline(always)]
    pub(crate) fn store(&mut self, m: usize, n: usize, sums: &[[i32; BLOCK_ROWS]]) {
        for (i, sums) in sums.iter().enumerate() {
            self.store_row(m + i, n, sums, self.x.sum(m + i));
        }
    }

    /// Stores y[m, n .. n + 32], cut off at the tile's end, from sums that are `offset` too large.
    #[inline(always)]
    pub(crate) fn store_row(&mut self, m: usize, n: usize, sums: &[i32; BLOCK_ROWS], offset: i32) {
        let scale = self.w.scale() * self.x.scale(m);
        let count = BLOCK_ROWS.min(self.y.rows_n().end - n);
        let mut values = [0f32; BLOCK_ROWS];
        for (value, sum) in values.iter_mut().zip(sums) {
            *value = sum.wrapping_sub(offset) as f32 * scale;
        }
        let out = self.y.at(m, n);
        // SAFETY: `at` checked (m, n); the elements n .. n + count follow it within the tile, which belongs
        // to this call alone. The two cases differ in speed only.
        unsafe {
            match count {
                BLOCK_ROWS => out.copy_from_nonoverlapping(values.as_ptr(), BLOCK_ROWS),
                _ => out.copy_from_nonoverlapping(values.as_ptr(), count),
            }
        }
    }
}

/// Bytes of workspace of a canonical kernel.
pub(crate) fn workspace_size<K: RowMicro>(m: usize, k: usize) -> usize {
    m.saturating_mul(K::workspace_stride(k.next_multiple_of(ACTIVATION_ALIGNMENT)))
}

/// Fills the workspace of a canonical kernel.
#[inline(always)]
pub(crate) fn prepare<K: RowMicro>(x: &ActivationsRef, workspace: &mut [u8]) -> KernelResult {
    let stride = K::workspace_stride(x.stride());
    if stride != 0 {
        if workspace.len() < x.m() * stride {
            return Err(KernelError::invalid(format!(
                "a workspace of {} bytes is too small",
                workspace.len()
            )));
        }
        for (m, row) in workspace.chunks_exact_mut(stride).enumerate().take(x.m()) {
            K::prepare_row(x.padded_row(m), row);
        }
    }
    Ok(())
}

/// The arguments of a matmul with canonical weights, checked against each other.
pub(crate) struct RowJob<'a> {
    w: &'a WeightsRef<'a>,
    x: &'a ActivationsRef<'a>,
    workspace: &'a [u8],
    y: &'a mut OutputTile,
}

impl<'a> RowJob<'a> {
    /// Checks that the buffers have the sizes that the kernels go by.
    pub(crate) fn new<K: RowMicro>(
        w: &'a WeightsRef,
        x: &'a ActivationsRef,
        workspace: &'a [u8],
        y: &'a mut OutputTile,
    ) -> Result<Self, KernelError> {
        check(w, x, y)?;
        if canonical::matrix_bytes(w.n(), w.k()).is_none_or(|bytes| w.data().len() < bytes) {
            return Err(KernelError::invalid(format!(
                "{} bytes are too few for canonical weights",
                w.data().len()
            )));
        }
        if workspace.len() < workspace_size::<K>(x.m(), x.k()) {
            return Err(KernelError::invalid(format!(
                "a workspace of {} bytes is too small",
                workspace.len()
            )));
        }
        Ok(Self { w, x, workspace, y })
    }

    /// Computes the tile.
    ///
    /// # Safety
    /// The CPU has the features of `K`, for which the job was checked.
    #[inline(always)]
    pub(crate) unsafe fn run<K: RowMicro>(mut self) {
        let (ns, ms) = (self.y.rows_n(), self.y.rows_m());
        for chunk in chunks(ms, rows_in_cache(self.x.stride())) {
            let group = if chunk.len() == 1 { K::GROUP } else { K::NR };
            let mut n = ns.start;
            while n < ns.end {
                // Whole groups, then what is left row by row.
                let count = if ns.end - n >= group { group } else { 1 };
                let mut m = chunk.start;
                while m < chunk.end {
                    let rows = (chunk.end - m).min(K::MR).min(8);
                    // SAFETY: the caller's promise; (m, n) begins `rows` by `count` elements of the tile.
                    unsafe {
                        match (chunk.len(), count) {
                            (1, 16) => self.single::<K, 16>(m, n),
                            (1, 8) => self.single::<K, 8>(m, n),
                            (1, _) => self.single::<K, 1>(m, n),
                            (_, 4) => self.several::<K, 4>(m, n, rows),
                            (_, 2) => self.several::<K, 2>(m, n, rows),
                            (_, _) => self.several::<K, 1>(m, n, rows),
                        }
                    }
                    m += rows;
                }
                n += count;
            }
        }
    }

    /// Computes y[m, n .. n + N].
    ///
    /// # Safety
    /// The CPU has the features of `K`, for which the job was checked.
    #[inline(always)]
    unsafe fn single<K: RowMicro, const N: usize>(&mut self, m: usize, n: usize) {
        let (weights, x) = (self.weights::<N>(n), self.activations::<K>(m));
        // SAFETY: the two functions return what the micro-kernel reads. Features: the caller.
        let sums = unsafe { K::gemv::<N>(weights, self.x.stride(), x) };
        self.store(m, n, sums);
    }

    /// Computes y[m .. m + rows, n .. n + N].
    ///
    /// # Safety
    /// The CPU has the features of `K`, for which the job was checked.
    #[inline(always)]
    unsafe fn several<K: RowMicro, const N: usize>(&mut self, m: usize, n: usize, rows: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match rows {
                1 => self.block::<K, 1, N>(m, n),
                2 => self.block::<K, 2, N>(m, n),
                3 => self.block::<K, 3, N>(m, n),
                _ => self.block::<K, 4, N>(m, n),
            }
        }
    }

    /// Computes y[m .. m + M, n .. n + N].
    ///
    /// # Safety
    /// The CPU has the features of `K`, for which the job was checked.
    #[inline(always)]
    unsafe fn block<K: RowMicro, const M: usize, const N: usize>(&mut self, m: usize, n: usize) {
        let weights = self.weights::<N>(n);
        let x: [*const i8; M] = from_fn(|i| self.activations::<K>(m + i));
        // SAFETY: the two functions return what the micro-kernel reads. Features: the caller.
        let sums = unsafe { K::gemm::<M, N>(weights, self.x.stride(), x) };
        for (i, sums) in sums.into_iter().enumerate() {
            self.store(m + i, n, sums);
        }
    }

    /// `N` weight rows from `n`.
    #[inline(always)]
    fn weights<const N: usize>(&self, n: usize) -> *const u8 {
        let bytes = row_bytes(self.x.stride());
        self.w.data()[n * bytes..][..N * bytes].as_ptr()
    }

    /// Activation row `m`, or what `prepare` made of it.
    #[inline(always)]
    fn activations<K: RowMicro>(&self, m: usize) -> *const i8 {
        match K::workspace_stride(self.x.stride()) {
            0 => self.x.padded_row(m).as_ptr(),
            stride => self.workspace[m * stride..][..stride].as_ptr().cast(),
        }
    }

    /// Stores y[m, n .. n + N] from sums of codes.
    #[inline(always)]
    fn store<const N: usize>(&mut self, m: usize, n: usize, sums: [i32; N]) {
        assert!(n + N <= self.y.rows_n().end, "rows behind the tile's end");
        let (offset, scale) = (self.x.sum(m), self.w.scale() * self.x.scale(m));
        let mut values = [0f32; N];
        for (value, sum) in values.iter_mut().zip(sums) {
            *value = sum.wrapping_sub(offset) as f32 * scale;
        }
        let out = self.y.at(m, n);
        // SAFETY: `at` checked (m, n), and the elements up to n + N follow it within the tile (asserted
        // above), which belongs to this call alone.
        unsafe { out.copy_from_nonoverlapping(values.as_ptr(), N) }
    }
}

/// Computes a tile of a matmul with many scales from canonical weights, one output after the other.
pub(crate) fn scaled_rows(w: &WeightsRef, x: &ActivationsRef, y: &mut OutputTile) -> KernelResult {
    check(w, x, y)?;
    layouts::check_canonical(w)?;
    let (groups, k) = (Groups::new(w, x)?, w.k());
    let mut weights = vec![0i8; k];
    for n in y.rows_n() {
        canonical::unpack_row(w.canonical_row(n).0, &mut weights);
        for m in y.rows_m() {
            let (q, a) = (x.row(m), x.group_scales(m));
            let mut total = 0f32;
            for g in 0..groups.weights {
                let mut t = 0f32;
                for part in groups.within(g) {
                    let from = part * groups.activation_group;
                    let to = k.min(from + groups.activation_group);
                    let products = q[from..to].iter().zip(&weights[from..to]);
                    let sum: i32 = products.map(|(&q, &w)| i32::from(q) * i32::from(w)).sum();
                    t = (sum as f32).mul_add(a[part], t);
                }
                let block = n / SCALE_ROWS * SCALE_ROWS;
                total = groups.scales.block(block, g, groups.weights)[n % SCALE_ROWS].mul_add(t, total);
            }
            // SAFETY: the element belongs to the tile (`at` checks that), which only this call accesses.
            unsafe { *y.at(m, n) = total }
        }
    }
    Ok(())
}

/// Activation rows of `stride` bytes that stay in cache together, a multiple of every micro-kernel's.
pub(crate) fn rows_in_cache(stride: usize) -> usize {
    (ACTIVATION_BYTES / stride.max(1)).next_multiple_of(8).max(8)
}

/// `range` in pieces of `length`.
#[inline(always)]
pub(crate) fn chunks(range: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(length).map(move |start| start..end.min(start + length))
}
