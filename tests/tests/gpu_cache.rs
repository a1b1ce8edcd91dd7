//! A token costs no copy of the history on a GPU either, with Burn's fusion and without: shown by the memory that the
//! runtime takes from the device. (A test binary of its own, since that is the process's.) Without an adapter this fails.
#![cfg(feature = "wgpu")]

use bitnet_burn::CacheType;
use bitnet_burn::backends::devices;
use bitnet_burn_backends::ops::{self, CacheLayer};
use burn::tensor::{Device, Tensor};

#[test]
fn rows_are_written_into_a_cache_in_place() {
    let device = Device::wgpu(Default::default());
    let (heads, capacity, d) = (4, 1 << 15, 64);
    // 32 MiB, in a page of its own.
    let bytes = (heads * capacity * d * 4) as u64;
    let mut cache = CacheLayer::zeros(CacheType::F32, [heads, capacity, d], &device, &Default::default());
    let append = |cache: CacheLayer, position: usize| {
        let rows = Tensor::<2>::full([1, heads * d], position as f32, &device);
        ops::cache_append(cache, rows, position)
    };
    let usage = || devices::usage(&device).unwrap();
    for position in 0..2 {
        cache = append(cache, position);
        device.sync().unwrap();
    }
    let before = usage();
    assert!(before.in_use_bytes >= bytes, "{before:?}");
    for position in 2..20 {
        cache = append(cache, position);
        device.sync().unwrap();
        let now = usage();
        assert!(now.reserved_bytes < before.reserved_bytes + bytes / 2, "{before:?}, {now:?}");
        assert!(now.in_use_bytes < bytes * 3 / 2, "{now:?}");
    }
    // Somebody else's cache is copied before it is written to.
    let shared = cache.clone();
    cache = append(cache, 20);
    device.sync().unwrap();
    let two = usage();
    assert!(two.in_use_bytes >= 2 * bytes, "{two:?}");
    let first = |cache: CacheLayer| match cache {
        CacheLayer::Float(tensor) => {
            let values = tensor.slice([0..1, 0..21, 0..1]).into_data();
            values.iter::<f32>().collect::<Vec<f32>>()
        }
        CacheLayer::Int8 { .. } => unreachable!("an f32 cache"),
    };
    let expected: Vec<f32> = (0..21).map(|position| position as f32).collect();
    assert_eq!(first(cache), expected);
    assert_eq!(first(shared)[..20], expected[..20]);
    assert_eq!(devices::usage(&Device::flex()), None);
}
