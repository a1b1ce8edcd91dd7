//! A decode step allocates as often at every context length, and as much but for a row of attention scores in
//! each layer: nothing of the history is copied.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use bitnet_burn::CacheType;
use bitnet_burn::ModelConfig;
use bitnet_burn::Row;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::load::{HeadMode, LoadOptions};
use bitnet_burn_engine::synth;
use bitnet_burn_engine::synth::{SynthOptions, SynthScales};
use bitnet_burn_formats::DenseFormat;
use support::device;

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

fn count(size: usize) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(size, Ordering::Relaxed);
}

// SAFETY: the system's allocator does everything; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(ptr, layout, size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// (One test, so that nobody else allocates meanwhile.)
#[test]
fn a_decode_step_allocates_the_same_at_every_context_length() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let config = ModelConfig { context_length: 1024, ..synth::shape("tiny").unwrap() };
    let layers = config.n_layers;
    synth::write(
        &path,
        &SynthOptions { config, scales: SynthScales::Tensor, embedding: DenseFormat::Q6_K, seed: 1 },
        &|_, _| {},
    )
    .unwrap();
    let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
    for (head, kind) in [
        (HeadMode::File, CacheType::F32),
        (HeadMode::Int8, CacheType::F16),
        (HeadMode::Int8, CacheType::Int8),
    ] {
        let options = LoadOptions { head, ..LoadOptions::default() };
        let model = bitnet_burn_engine::load::load(&checkpoint, &device(), &options, &mut |_| {}).unwrap();
        let Ok(mut cache) = model.cache(1024, kind) else { continue };
        let sequence = cache.add_sequence(1024);
        let mut step = |position: usize| {
            let before = (CALLS.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
            let row = Row { token: (position % 200) as u32, sequence, position };
            let logits = model.forward(&[row], &[0], &mut cache).unwrap();
            let after = (CALLS.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
            drop(logits);
            (after.0 - before.0, after.1 - before.1)
        };
        // The least of several: the test's harness, and tasks that begin, allocate too.
        let mut least = |positions: std::ops::Range<usize>| {
            positions.map(&mut step).min_by_key(|&(calls, bytes)| (bytes, calls)).unwrap()
        };
        least(0..100);
        let early = least(100..140);
        least(140..900);
        let late = least(900..940);
        // A score is an f32; a cached position of the smallest cache takes dozens of bytes.
        let scores = layers * (940 - 100) * size_of::<f32>();
        let within = late.0 <= early.0 && late.1 <= early.1 + scores;
        assert!(within, "{kind:?}: {early:?} (calls, bytes), then {late:?}");
        println!("{kind:?}: {late:?} (calls, bytes) a step of {layers} layers");
    }
}
