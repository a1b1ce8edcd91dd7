//! A token costs no copy of the history: shown by what is allocated, not by time. (A test binary of its
//! own, since the allocator is the process's.)

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use bitnet_burn::{BitNet, Row};
use bitnet_burn::{CacheType, KvCache, SequenceId};
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_tests::*;

/// Remembers the largest allocation, and counts those that could hold a layer's keys.
struct Watching;

static LARGEST: AtomicUsize = AtomicUsize::new(0);
static LARGE: AtomicUsize = AtomicUsize::new(0);

/// Keys of one layer: 2 heads of 64 for 512 positions, as int8.
const KEYS: usize = 2 * 64 * 512;

fn note(size: usize) {
    LARGEST.fetch_max(size, Ordering::Relaxed);
    if size >= KEYS {
        LARGE.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator does all the work.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// One token; the largest allocation, and the number of those that could hold keys.
fn step(model: &BitNet, cache: &mut KvCache, sequence: SequenceId) -> (usize, usize) {
    LARGEST.store(0, Ordering::Relaxed);
    LARGE.store(0, Ordering::Relaxed);
    let row = Row { token: 7, sequence, position: cache.length(sequence).unwrap() };
    drop(model.forward(&[row], &[0], cache).unwrap().into_data());
    (LARGEST.load(Ordering::Relaxed), LARGE.load(Ordering::Relaxed))
}

#[test]
fn a_token_copies_no_history_and_a_fork_copies_it_once() {
    let dir = repository_golden().join("hf/A-packed-auto");
    for device in host_devices() {
        let model = load(&dir, &device, &LoadOptions::default());
        for cache_type in cache_types(&model) {
            let mut cache = model.cache(512, cache_type).unwrap();
            let sequence = cache.add_sequence(512);
            for length in 0..300 {
                let (largest, _) = step(&model, &mut cache, sequence);
                assert!(largest < KEYS, "{device:?} {cache_type:?} at {length}: {largest} bytes");
            }
            // A fork shares what both have seen, until one writes: keys and values of two layers, once.
            let fork = cache.fork(sequence).unwrap();
            assert_eq!(step(&model, &mut cache, fork).1, 4, "{device:?}: the fork's first token");
            for _ in 0..10 {
                assert!(step(&model, &mut cache, fork).0 < KEYS, "{device:?}: the fork's next tokens");
                assert!(step(&model, &mut cache, sequence).0 < KEYS, "{device:?}: the origin's next tokens");
            }
        }
    }
    #[cfg(feature = "remote")]
    a_worker_copies_no_history_either();
}

/// A worker in this process, whose cache is larger than whatever else is allocated.
#[cfg(feature = "remote")]
fn a_worker_copies_no_history_either() {
    use bitnet_burn::backends::ops::{self, CacheLayer};
    use bitnet_burn_manager::memory::PageArena;
    use burn::tensor::Tensor;

    let device = devices().pop().expect("the worker's");
    let positions = 1 << 16;
    // The smallest: codes of int8.
    let size = 2 * positions * 16;
    for cache_type in [CacheType::F32, CacheType::F16, CacheType::Int8] {
        let rows = || Tensor::<2>::ones([1, 32], &device);
        let append = |cache: CacheLayer, position: usize| {
            LARGEST.store(0, Ordering::Relaxed);
            let cache = ops::cache_append(cache, rows(), position);
            device.sync().unwrap();
            (cache, LARGEST.load(Ordering::Relaxed))
        };
        let mut cache = CacheLayer::zeros(cache_type, [2, positions, 16], &device, &PageArena::default());
        device.sync().unwrap();
        for position in 0..10 {
            let (new, largest) = append(cache, position);
            cache = new;
            assert!(largest < size, "{cache_type:?} at {position}: {largest} bytes");
        }
        let shared = cache.clone();
        let (_, largest) = append(cache, 10);
        assert!(largest >= size, "{cache_type:?}: what is shared is copied, not {largest} bytes");
        drop(shared);
    }
}

/// The operation itself: the cache's memory stays where it is while nobody else holds it.
#[test]
#[cfg(feature = "flex")]
fn appending_writes_where_the_cache_lies() {
    use bitnet_burn::backends::ops::{self, CacheLayer};
    use bitnet_burn_manager::memory::PageArena;
    use burn::backend::{DispatchTensorKind, Flex};
    use burn::tensor::{Device, Tensor};

    fn floats(cache: &CacheLayer) -> Tensor<3> {
        match cache {
            CacheLayer::Float(tensor) => tensor.clone(),
            CacheLayer::Int8 { .. } => panic!("a cache of f32"),
        }
    }

    fn pointer(cache: &CacheLayer) -> *const f32 {
        match floats(cache).into_dispatch().kind {
            DispatchTensorKind::Flex(tensor) => {
                let tensor: burn::backend::tensor::FloatTensor<Flex> = tensor.float();
                tensor.storage::<f32>().as_ptr()
            }
            _ => panic!("a Flex tensor"),
        }
    }

    setup();
    let device = Device::flex();
    let mut cache = CacheLayer::zeros(CacheType::F32, [2, 64, 16], &device, &PageArena::default());
    let first = pointer(&cache);
    assert_eq!(first as usize % 64, 0, "vectors begin with a cache line");
    for position in 0..60 {
        let rows = Tensor::<2>::full([1, 32], position as f32 + 1.0, &device);
        cache = ops::cache_append(cache, rows, position);
        assert_eq!(pointer(&cache), first, "position {position}");
    }
    // Shared memory is copied, and whoever shares it sees nothing of what is written.
    let shared = cache.clone();
    let moved = ops::cache_append(cache, Tensor::<2>::full([1, 32], -1.0, &device), 60);
    assert_ne!(pointer(&moved), pointer(&shared));
    let old: Vec<f32> = floats(&shared).into_data().try_to_vec().unwrap();
    let new: Vec<f32> = floats(&moved).into_data().try_to_vec().unwrap();
    for head in 0..2 {
        let at = |values: &[f32], position: usize| values[(head * 64 + position) * 16];
        assert_eq!((at(&old, 59), at(&old, 60), at(&new, 59), at(&new, 60)), (60.0, 0.0, 60.0, -1.0));
    }
}
