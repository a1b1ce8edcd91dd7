//! What a kernel reads and writes: weights, activations, and the tile of the output.

use std::ops::Range;

use crate::abi::{self, Activations, Output, Tile, Weights};
use crate::canonical;

/// A weight matrix, canonical or privately packed.
#[derive(Clone, Copy, Debug)]
pub struct WeightsRef<'a> {
    n: usize,
    k: usize,
    scale: f32,
    data: &'a [u8],
    scales: Scales<'a>,
}

/// The scales of [`OPERATION_SCALED_TERNARY_MATMUL`](abi::OPERATION_SCALED_TERNARY_MATMUL), laid out as
/// [`Weights::scales`] says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scales<'a> {
    /// None: one scale for all, [`WeightsRef::scale`].
    None,
    /// f32.
    F32 {
        /// Weights of a row that share a scale; 0 for the whole row.
        group: usize,
        /// The scales.
        values: &'a [f32],
    },
    /// The bits of IEEE half precision.
    F16 {
        /// As above.
        group: usize,
        /// The scales.
        values: &'a [u16],
    },
}

/// Groups in a row of `k` values; a `group` of 0 is the whole row.
pub const fn groups(k: usize, group: usize) -> usize {
    if group == 0 { 1 } else { k.div_ceil(group) }
}

/// Values of a group, but for the last of a row; a `group` of 0 is the whole row of `k`.
pub const fn group_length(k: usize, group: usize) -> usize {
    if group == 0 { k } else { group }
}

/// Whether a group of weights is a whole number of groups of activations, which are multiples of 32; 0 is a whole row.
pub const fn groups_fit(weights: usize, activations: usize) -> bool {
    match (weights, activations) {
        (0, 0) => true,
        (_, 0) => false,
        (weights, activations) => activations.is_multiple_of(32) && weights.is_multiple_of(activations),
    }
}

/// Number of scales of an [n, k] matrix with the padding of the last block of rows, or `None` where that overflows.
pub const fn scale_count(n: usize, k: usize, group: usize) -> Option<usize> {
    match n.checked_next_multiple_of(abi::SCALE_ROWS) {
        Some(rows) => rows.checked_mul(groups(k, group)),
        None => None,
    }
}

/// The value of a finite half-precision number, exactly.
#[inline(always)]
pub const fn f16_value(bits: u16) -> f32 {
    // The exponent's bias differs by 112; the product puts it right, also for subnormal numbers.
    let magnitude = f32::from_bits((bits as u32 & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | (bits as u32 & 0x8000) << 16)
}

impl Scales<'_> {
    /// Weights of a row that share a scale; 0 for the whole row.
    pub fn group(&self) -> usize {
        match self {
            Self::None => 0,
            Self::F32 { group, .. } | Self::F16 { group, .. } => *group,
        }
    }

    /// The scales of the block of [`SCALE_ROWS`](abi::SCALE_ROWS) rows that begins at row n0, of group `g` of `groups`.
    ///
    /// # Panics
    /// If there are no such scales.
    #[inline(always)]
    pub fn block(&self, n0: usize, g: usize, groups: usize) -> [f32; abi::SCALE_ROWS] {
        let at = (n0 / abi::SCALE_ROWS * groups + g) * abi::SCALE_ROWS;
        match self {
            Self::None => panic!("a matrix with one scale has no blocks of them"),
            Self::F32 { values, .. } => *values[at..].first_chunk().expect("a whole block"),
            Self::F16 { values, .. } => {
                let bits: &[u16; abi::SCALE_ROWS] = values[at..].first_chunk().expect("a whole block");
                bits.map(f16_value)
            }
        }
    }
}

impl<'a> WeightsRef<'a> {
    /// A view of packed bytes.
    pub fn new(n: usize, k: usize, scale: f32, data: &'a [u8]) -> Self {
        Self { n, k, scale, data, scales: Scales::None }
    }

    /// The same with many scales.
    pub fn with_scales(self, scales: Scales<'a>) -> Self {
        Self { scales, ..self }
    }

    /// The scales of groups.
    pub fn scales(&self) -> Scales<'a> {
        self.scales
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// weight = code * scale.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The packed bytes.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Row `n` of canonical weights.
    ///
    /// # Panics
    /// If the bytes are fewer than the canonical layout needs.
    pub fn canonical_row(&self, n: usize) -> canonical::Row<'a> {
        let bytes = canonical::row_bytes(self.k);
        let from = n.checked_mul(bytes).expect("a row that a machine can address");
        canonical::Row(&self.data[from..][..bytes])
    }

    /// The same as the C ABI passes it.
    pub fn as_abi(&self) -> Weights {
        Weights {
            struct_size: size_of::<Weights>() as u64,
            n: self.n as u64,
            k: self.k as u64,
            data: self.data.as_ptr(),
            size: self.data.len() as u64,
            scale: self.scale,
            scale_format: match self.scales {
                Scales::F16 { .. } => abi::SCALE_F16,
                _ => abi::SCALE_F32,
            },
            group: self.scales.group() as u64,
            scales: match self.scales {
                Scales::None => std::ptr::null(),
                Scales::F32 { values, .. } => values.as_ptr().cast(),
                Scales::F16 { values, .. } => values.as_ptr().cast(),
            },
        }
    }

    /// # Safety
    /// `raw` is filled as [`Weights`] says, and its data outlives `'a`.
    pub(super) unsafe fn from_abi(raw: &Weights) -> Self {
        // SAFETY: the caller's promise.
        let data = unsafe { std::slice::from_raw_parts(raw.data, raw.size as usize) };
        let (n, k, group) = (raw.n as usize, raw.k as usize, raw.group as usize);
        let count = scale_count(n, k, group).unwrap_or(0);
        let scales = if raw.scales.is_null() {
            Scales::None
        } else if raw.scale_format == abi::SCALE_F16 {
            // SAFETY: that many scales of this type, aligned (ABI); the caller promises the lifetime.
            Scales::F16 { group, values: unsafe { std::slice::from_raw_parts(raw.scales.cast(), count) } }
        } else {
            // SAFETY: as above.
            Scales::F32 { group, values: unsafe { std::slice::from_raw_parts(raw.scales.cast(), count) } }
        };
        Self { n, k, scale: raw.scale, data, scales }
    }
}

/// Quantised activations.
#[derive(Clone, Copy, Debug)]
pub struct ActivationsRef<'a> {
    m: usize,
    k: usize,
    stride: usize,
    q: &'a [i8],
    scale: &'a [f32],
    sum: &'a [i32],
    group: usize,
    group_scale: &'a [f32],
    group_sum: &'a [i32],
}

impl<'a> ActivationsRef<'a> {
    /// # Safety
    /// `raw` is filled as [`Activations`] says, and its buffers outlive `'a`.
    pub unsafe fn from_abi(raw: &Activations) -> Self {
        let (m, stride, group) = (raw.m as usize, raw.stride as usize, raw.group as usize);
        // Without them (a host of an older version), a row is one group.
        let (group_scale, group_sum) = match raw.group_scale.is_null() {
            true => (raw.scale, raw.sum),
            false => (raw.group_scale, raw.group_sum),
        };
        let count = m * groups(raw.k as usize, group);
        // SAFETY: m rows of stride bytes and the slack behind them are readable (ABI), as are m scales
        // and m sums, and as many of the groups; the caller promises the lifetime.
        unsafe {
            Self {
                m,
                k: raw.k as usize,
                stride,
                q: std::slice::from_raw_parts(raw.q, m * stride),
                scale: std::slice::from_raw_parts(raw.scale, m),
                sum: std::slice::from_raw_parts(raw.sum, m),
                group,
                group_scale: std::slice::from_raw_parts(group_scale, count),
                group_sum: std::slice::from_raw_parts(group_sum, count),
            }
        }
    }

    /// Rows.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Values a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes from one row to the next: `k` rounded up to a multiple of 64.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `m`, `k` values.
    pub fn row(&self, m: usize) -> &'a [i8] {
        &self.q[m * self.stride..][..self.k]
    }

    /// Row `m` with the zeros behind it, [`stride`](Self::stride) values, aligned to 64 bytes; another
    /// [`abi::ACTIVATION_SLACK`] bytes behind it may be read.
    pub fn padded_row(&self, m: usize) -> &'a [i8] {
        &self.q[m * self.stride..][..self.stride]
    }

    /// The rows `rows` as [`padded_row`](Self::padded_row) has them, one after the other.
    pub fn padded_rows(&self, rows: Range<usize>) -> &'a [i8] {
        &self.q[rows.start * self.stride..rows.end * self.stride]
    }

    /// Row `m`'s scale, absmax / 127.
    pub fn scale(&self, m: usize) -> f32 {
        self.scale[m]
    }

    /// Sum of row `m`'s values.
    pub fn sum(&self, m: usize) -> i32 {
        self.sum[m]
    }

    /// Values that share a scale; 0 for the whole row.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The scales of row `m`'s groups.
    pub fn group_scales(&self, m: usize) -> &'a [f32] {
        let count = groups(self.k, self.group);
        &self.group_scale[m * count..][..count]
    }

    /// The sums of row `m`'s groups.
    pub fn group_sums(&self, m: usize) -> &'a [i32] {
        let count = groups(self.k, self.group);
        &self.group_sum[m * count..][..count]
    }
}

/// The part of the output that one call computes.
#[derive(Debug)]
pub struct OutputTile {
    y: *mut f32,
    stride: usize,
    n: Range<usize>,
    m: Range<usize>,
    thread: usize,
    scratch: (*mut u8, usize),
}

impl OutputTile {
    /// # Safety
    /// The elements y[m * stride + n] with (m, n) in the tile are writable, and nobody else accesses
    /// them while this value lives; the same holds for the tile's scratch.
    pub unsafe fn from_abi(output: &Output, tile: &Tile) -> Self {
        Self {
            thread: tile.thread as usize,
            scratch: (tile.scratch, tile.scratch_size as usize),
            y: output.y,
            stride: output.stride as usize,
            n: tile.n0 as usize..tile.n1 as usize,
            m: tile.m0 as usize..tile.m1 as usize,
        }
    }

    /// Output features to compute.
    pub fn rows_n(&self) -> Range<usize> {
        self.n.clone()
    }

    /// Activation rows to compute.
    pub fn rows_m(&self) -> Range<usize> {
        self.m.clone()
    }

    /// Number of the thread that makes the call. No other call of the matmul has it at the same time.
    pub fn thread(&self) -> usize {
        self.thread
    }

    /// What `f` returns, which gets the thread's scratch: [`TernaryKernel::scratch_size`](super::TernaryKernel::scratch_size)
    /// bytes that hold anything, aligned to 64. (None with a host that is older than 1.3, and within `f`.)
    pub fn with_scratch<R>(&mut self, f: impl FnOnce(&mut [u8], &mut Self) -> R) -> R {
        let (pointer, size) = std::mem::replace(&mut self.scratch, (std::ptr::null_mut(), 0));
        let scratch = match pointer.is_null() {
            true => &mut [][..],
            // SAFETY: as many bytes (ABI), which nobody else accesses (the promise of `from_abi`'s caller); no second slice
            // of them is made while this one lives.
            false => unsafe { std::slice::from_raw_parts_mut(pointer, size) },
        };
        let result = f(scratch, self);
        self.scratch = (pointer, size);
        result
    }

    /// The place of y[m, n]; y[m, n..rows_n().end] follows it.
    ///
    /// # Panics
    /// If (m, n) is outside the tile.
    pub fn at(&mut self, m: usize, n: usize) -> *mut f32 {
        assert!(self.m.contains(&m) && self.n.contains(&n), "({m}, {n}) is outside the tile");
        // SAFETY: inside the tile, which `from_abi`'s caller promised to be within the output.
        unsafe { self.y.add(m * self.stride + n) }
    }

    /// Stores y[m, n] from the exact integer sum.
    ///
    /// # Panics
    /// If (m, n) is outside the tile.
    pub fn set(&mut self, m: usize, n: usize, sum: i32, w: &WeightsRef, x: &ActivationsRef) {
        let place = self.at(m, n);
        // SAFETY: `at` checked that the element belongs to the tile, which nobody else accesses.
        unsafe { *place = sum as f32 * (w.scale() * x.scale(m)) }
    }
}
