//! Quantised activations, and the aligned bytes that hold them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_plugin::abi::{self, ACTIVATION_ALIGNMENT, ACTIVATION_SLACK};
use bitnet_burn_plugin::sdk::{group_length, groups};

/// Zeroed bytes aligned for vector loads.
#[derive(Debug)]
pub(crate) struct AlignedBytes {
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
/// and zero-filled to a multiple of 64, with the scale (absmax / 127) and sum of each row, or of each group of a row's
/// values.
///
/// The buffers are kept from call to call.
#[derive(Debug)]
pub struct Activations {
    m: usize,
    k: usize,
    /// Values that share a scale; 0 for the whole row.
    group: usize,
    q: AlignedBytes,
    scale: Vec<f32>,
    sum: Vec<i32>,
}

impl Default for Activations {
    fn default() -> Self {
        Self { m: 0, k: 0, group: 0, q: AlignedBytes::zeroed(0), scale: Vec::new(), sum: Vec::new() }
    }
}

/// The parts of [`Activations`] that a quantiser writes.
#[derive(Debug)]
pub struct ActivationsMut<'a> {
    /// Values; row m begins at m * `stride`. What lies between k and the stride must be zero.
    pub q: &'a mut [i8],
    /// Bytes from row to row.
    pub stride: usize,
    /// Values that share a scale; 0 for the whole row. The last group of a row may be shorter.
    pub group: usize,
    /// Scales [m, groups].
    pub scale: &'a mut [f32],
    /// Sums [m, groups].
    pub sum: &'a mut [i32],
}

impl Activations {
    /// Makes room for [m, k] with a scale for each row, and gives the parts to fill. What they hold before is
    /// unspecified.
    ///
    /// # Panics
    /// If m rows of k values, each filled up to a multiple of 64, take more bytes than a machine can address.
    pub fn resize(&mut self, m: usize, k: usize) -> ActivationsMut<'_> {
        self.resize_groups(m, k, 0)
    }

    /// [`resize`](Self::resize) with a scale for each `group` of a row's values; 0 is the whole row.
    ///
    /// # Panics
    /// As there.
    pub fn resize_groups(&mut self, m: usize, k: usize, group: usize) -> ActivationsMut<'_> {
        let size = k.checked_next_multiple_of(ACTIVATION_ALIGNMENT).and_then(|stride| {
            let size = m.checked_mul(stride)?.checked_add(ACTIVATION_SLACK)?;
            isize::try_from(size).ok().map(|_| size)
        });
        let size = size.unwrap_or_else(|| panic!("activations [{m}, {k}] exceed the memory of any machine"));
        // Without rows until there is room for them: allocating may panic, too.
        (self.m, self.k, self.group) = (0, k, group);
        if self.q.len() < size {
            self.q = AlignedBytes::zeroed(size);
        }
        let scales = m * groups(k, group); // no more than there are values, or one a row
        self.scale.resize(scales, 0.0);
        self.sum.resize(scales, 0);
        self.m = m;
        let stride = self.stride();
        // SAFETY: i8 and u8 have the same layout, and the borrow is handed on.
        let q = unsafe { std::slice::from_raw_parts_mut(self.q.as_mut_ptr().cast::<i8>(), m * stride) };
        ActivationsMut { q, stride, group, scale: &mut self.scale, sum: &mut self.sum }
    }

    /// Quantises rows of f32 with the scalar reference; kernels' users have faster ones.
    pub fn from_rows(x: &[f32], k: usize) -> Self {
        Self::from_groups(x, k, 0)
    }

    /// [`from_rows`](Self::from_rows) with a scale for each `group` of a row's values; 0 is the whole row.
    pub fn from_groups(x: &[f32], k: usize, group: usize) -> Self {
        let mut activations = Self::default();
        let (m, length, groups) = (x.len() / k, group_length(k, group), groups(k, group));
        let parts = activations.resize_groups(m, k, group);
        for (i, row) in x.chunks_exact(k).enumerate() {
            let q = &mut parts.q[i * parts.stride..][..parts.stride];
            q[k..].fill(0);
            for (g, (x, q)) in row.chunks(length).zip(q[..k].chunks_mut(length)).enumerate() {
                let at = i * groups + g;
                (parts.scale[at], parts.sum[at]) = bitnet_burn_formats::quant::absmax_row(x, q);
            }
        }
        activations
    }

    /// Activations [m, k] with values over the whole int8 range that the quantiser can produce,
    /// and a scale for each `group` of a row's values; 0 is the whole row.
    pub(crate) fn random(random: &mut SplitMix64, m: usize, k: usize, group: usize) -> Self {
        let mut activations = Self::default();
        let (length, groups) = (group_length(k, group), groups(k, group));
        let parts = activations.resize_groups(m, k, group);
        for i in 0..m {
            let row = &mut parts.q[i * parts.stride..][..parts.stride];
            row.fill(0);
            for q in &mut row[..k] {
                *q = ((random.next_u64() >> 32) as u32 % 255) as i8;
                *q = if *q == -128 { 127 } else { *q };
            }
            for (g, values) in row[..k].chunks(length).enumerate() {
                parts.sum[i * groups + g] = values.iter().map(|&q| i32::from(q)).sum();
                parts.scale[i * groups + g] = (random.next_u64() % 1000 + 1) as f32 / 4096.0;
            }
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

    /// [`q`](Self::q) as bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.q[..self.m * self.stride()]
    }

    /// Values that share a scale; 0 for the whole row.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Scales of the rows, or of their groups: [m, groups].
    pub fn scale(&self) -> &[f32] {
        &self.scale
    }

    /// Sums of the rows, or of their groups: [m, groups].
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
            group: self.group as u64,
            group_scale: self.scale.as_ptr(),
            group_sum: self.sum.as_ptr(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_no_machine_has_are_refused_and_leave_nothing_behind() {
        let mut activations = Activations::from_rows(&[1.0; 6], 3);
        for (m, k) in
            [(16, 1 << 60), (1 << 60, 16), (1, usize::MAX), (usize::MAX, 1), (1, 1 << 63), (3, 1 << 62)]
        {
            let resized = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                activations.resize(m, k);
            }));
            let panic = *resized.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(panic, format!("activations [{m}, {k}] exceed the memory of any machine"));
            assert_eq!((activations.m(), activations.k(), activations.q().len()), (2, 3, 128));
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
