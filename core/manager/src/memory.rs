//! Memory for privately packed weights, and for activations.
//!
//! Decode reads every weight once a token; with 4 KiB pages the page walks alone cost a third of the
//! bandwidth. A single matrix is often smaller than a huge page, so weights share large chunks that
//! ask the system for huge pages.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_plugin::abi::{self, ACTIVATION_ALIGNMENT, ACTIVATION_SLACK};
use memmap2::MmapMut;

const CHUNK: usize = 64 << 20;
const HUGE_PAGE: usize = 2 << 20;

/// Hands out page-backed buffers for packed weights, and for KV caches.
#[derive(Debug, Default)]
pub struct WeightArena {
    /// The chunk that is being filled, and how much of it is taken.
    current: Mutex<Option<(Arc<Chunk>, usize)>>,
    /// Whether buffers are written to, so that the system gives their memory now and not when they are used.
    committed: bool,
}

#[derive(Debug)]
struct Chunk {
    map: MmapMut,
    base: *mut u8,
    size: usize,
}

// SAFETY: the pointer is into `map`, which the chunk owns; disjoint parts are handed out.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

/// A part of a [`WeightArena`] that belongs to its owner alone.
#[derive(Debug)]
pub struct WeightBuffer {
    chunk: Arc<Chunk>,
    offset: usize,
    size: usize,
}

impl WeightArena {
    /// Buffers of memory that the system has really given: it may promise more than it has, and keep the promise page by
    /// page.
    pub fn committed() -> Self {
        Self { committed: true, ..Self::default() }
    }

    /// A zeroed buffer of `size` bytes, aligned to `alignment` (a power of two up to 4096).
    ///
    /// # Errors
    /// If the system has no memory left.
    pub fn allocate(&self, size: usize, alignment: usize) -> std::io::Result<WeightBuffer> {
        let mut buffer = self.reserve(size, alignment)?;
        if self.committed {
            buffer.as_mut_slice().fill(0);
        }
        Ok(buffer)
    }

    fn reserve(&self, size: usize, alignment: usize) -> std::io::Result<WeightBuffer> {
        debug_assert!(alignment.is_power_of_two() && alignment as u64 <= abi::MAX_WEIGHT_ALIGNMENT);
        let mut current = self.current.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((chunk, used)) = &mut *current {
            let offset = used.next_multiple_of(alignment);
            if offset.checked_add(size).is_some_and(|end| end <= chunk.size) {
                *used = offset + size;
                return Ok(WeightBuffer { chunk: chunk.clone(), offset, size });
            }
        }
        let chunk = Arc::new(Chunk::new(size.max(CHUNK))?);
        // A buffer that fills its own chunk leaves the shared one to the small ones.
        if size < CHUNK {
            *current = Some((chunk.clone(), size));
        }
        Ok(WeightBuffer { chunk, offset: 0, size })
    }
}

impl Chunk {
    fn new(size: usize) -> std::io::Result<Self> {
        let size = size.next_multiple_of(HUGE_PAGE);
        let mut map = MmapMut::map_anon(size + HUGE_PAGE)?;
        // Advice: a system without huge pages is slower, not wrong.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_mut_ptr();
        let base = start.wrapping_add(start.align_offset(HUGE_PAGE));
        Ok(Self { map, base, size })
    }
}

impl WeightBuffer {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        debug_assert!(self.offset + self.size <= self.chunk.size && self.chunk.size <= self.chunk.map.len());
        // SAFETY: the range lies within the chunk's map, which lives as long as `self`, and no other
        // buffer was given any of it.
        unsafe { std::slice::from_raw_parts(self.chunk.base.add(self.offset), self.size) }
    }

    /// The bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.chunk.base.add(self.offset), self.size) }
    }
}

impl AsRef<[u8]> for WeightBuffer {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

/// Zeroed bytes aligned for vector loads.
#[derive(Debug)]
pub struct AlignedBytes {
    data: NonNull<u8>,
    size: usize,
}

// SAFETY: it owns its memory like a Vec.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above.
unsafe impl Sync for AlignedBytes {}

const ALIGNMENT: usize = 64;

impl AlignedBytes {
    /// `size` zero bytes, aligned to 64.
    ///
    /// # Panics
    /// If `size` exceeds `isize::MAX`; aborts if there is no memory.
    pub fn zeroed(size: usize) -> Self {
        if size == 0 {
            return Self { data: NonNull::<u128>::dangling().cast(), size };
        }
        let layout = Self::layout(size);
        // SAFETY: the layout's size is not zero.
        let data = unsafe { alloc_zeroed(layout) };
        let data = NonNull::new(data).unwrap_or_else(|| handle_alloc_error(layout));
        Self { data, size }
    }

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, ALIGNMENT).expect("an allocation of more than isize::MAX bytes")
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if self.size != 0 {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.data.as_ptr(), Self::layout(self.size)) }
        }
    }
}

impl std::ops::Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `size` initialised bytes, or none at a dangling pointer.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.size) }
    }
}

impl std::ops::DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is unique.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.size) }
    }
}

/// Quantised activations in the form that kernels read: `m` rows of `k` int8 values, 64-byte aligned
/// and zero-filled to a multiple of 64, with the scale (absmax / 127) and sum of each row.
///
/// The buffers are kept from call to call.
#[derive(Debug)]
pub struct Activations {
    m: usize,
    k: usize,
    q: AlignedBytes,
    scale: Vec<f32>,
    sum: Vec<i32>,
}

impl Default for Activations {
    fn default() -> Self {
        Self { m: 0, k: 0, q: AlignedBytes::zeroed(0), scale: Vec::new(), sum: Vec::new() }
    }
}

/// The parts of [`Activations`] that a quantiser writes.
#[derive(Debug)]
pub struct ActivationsMut<'a> {
    /// Values; row m begins at m * `stride`. What lies between k and the stride must be zero.
    pub q: &'a mut [i8],
    /// Bytes from row to row.
    pub stride: usize,
    /// Row scales.
    pub scale: &'a mut [f32],
    /// Row sums.
    pub sum: &'a mut [i32],
}

impl Activations {
    /// Makes room for [m, k] and gives the parts to fill. What they hold before is unspecified.
    pub fn resize(&mut self, m: usize, k: usize) -> ActivationsMut<'_> {
        (self.m, self.k) = (m, k);
        let stride = self.stride();
        let size = m * stride + ACTIVATION_SLACK;
        if self.q.len() < size {
            self.q = AlignedBytes::zeroed(size);
        }
        self.scale.resize(m, 0.0);
        self.sum.resize(m, 0);
        // SAFETY: i8 and u8 have the same layout, and the borrow is handed on.
        let q = unsafe { std::slice::from_raw_parts_mut(self.q.as_mut_ptr().cast::<i8>(), m * stride) };
        ActivationsMut { q, stride, scale: &mut self.scale, sum: &mut self.sum }
    }

    /// Quantises rows of f32 with the scalar reference; kernels' users have faster ones.
    pub fn from_rows(x: &[f32], k: usize) -> Self {
        let mut activations = Self::default();
        let m = x.len() / k;
        let parts = activations.resize(m, k);
        for (i, row) in x.chunks_exact(k).enumerate() {
            let q = &mut parts.q[i * parts.stride..][..parts.stride];
            q[k..].fill(0);
            (parts.scale[i], parts.sum[i]) = bitnet_burn_formats::quant::absmax_row(row, &mut q[..k]);
        }
        activations
    }

    /// Activations [m, k] with values over the whole int8 range that the quantiser can produce.
    pub(crate) fn random(random: &mut SplitMix64, m: usize, k: usize) -> Self {
        let mut activations = Self::default();
        let parts = activations.resize(m, k);
        for i in 0..m {
            let row = &mut parts.q[i * parts.stride..][..parts.stride];
            row.fill(0);
            for q in &mut row[..k] {
                *q = ((random.next_u64() >> 32) as u32 % 255) as i8;
                *q = if *q == -128 { 127 } else { *q };
            }
            parts.sum[i] = row.iter().map(|&q| i32::from(q)).sum();
            parts.scale[i] = (random.next_u64() % 1000 + 1) as f32 / 4096.0;
        }
        activations
    }

    /// Rows.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Values a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes from row to row.
    pub fn stride(&self) -> usize {
        self.k.next_multiple_of(ACTIVATION_ALIGNMENT)
    }

    /// All rows, [`stride`](Self::stride) apart.
    pub fn q(&self) -> &[i8] {
        // SAFETY: i8 and u8 have the same layout; the buffer is at least this long.
        unsafe { std::slice::from_raw_parts(self.q.as_ptr().cast::<i8>(), self.m * self.stride()) }
    }

    /// Row scales.
    pub fn scale(&self) -> &[f32] {
        &self.scale
    }

    /// Row sums.
    pub fn sum(&self) -> &[i32] {
        &self.sum
    }

    /// As kernels get it.
    pub(crate) fn as_abi(&self) -> abi::Activations {
        abi::Activations {
            struct_size: size_of::<abi::Activations>() as u64,
            m: self.m as u64,
            k: self.k as u64,
            stride: self.stride() as u64,
            q: self.q.as_ptr().cast(),
            scale: self.scale.as_ptr(),
            sum: self.sum.as_ptr(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_disjoint_and_zero() {
        let arena = WeightArena::default();
        let mut buffers: Vec<_> = (1..40).map(|i| arena.allocate(i * 1000, 1 << (i % 13)).unwrap()).collect();
        buffers.push(arena.allocate(CHUNK + 5, 64).unwrap());
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.as_slice().iter().all(|&b| b == 0));
            buffer.as_mut_slice().fill(i as u8 + 1);
        }
        for (i, buffer) in buffers.iter().enumerate() {
            assert!(buffer.as_slice().iter().all(|&b| b == i as u8 + 1));
            if i < 39 {
                assert_eq!(buffer.as_slice().as_ptr() as usize % (1 << ((i + 1) % 13)), 0);
            }
        }
    }

    #[test]
    fn activations_are_laid_out_as_kernels_expect() {
        let x: Vec<f32> = (0..3 * 70).map(|i| i as f32 - 100.0).collect();
        let a = Activations::from_rows(&x, 70);
        assert_eq!((a.m(), a.k(), a.stride()), (3, 70, 128));
        assert_eq!(a.q().as_ptr() as usize % 64, 0);
        for m in 0..3 {
            let row = &a.q()[m * 128..][..128];
            assert!(row[70..].iter().all(|&v| v == 0));
            assert_eq!(row[..70].iter().map(|&v| i32::from(v)).sum::<i32>(), a.sum()[m]);
        }
    }
}
