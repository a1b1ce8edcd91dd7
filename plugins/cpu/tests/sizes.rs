//! Sizes whose products wrap around are refused by every function that takes them, before anything is computed with
//! them. (Tests run with overflow checks, whose panics are the wrong ones.)

use std::panic::{AssertUnwindSafe, catch_unwind};

use bitnet_burn_cpu::attention::{self, CacheMut, CacheRef};
use bitnet_burn_cpu::quantise::{Quantised, quantise_on};
use bitnet_burn_cpu::{Threads, rope, training};

/// Says that there are four threads.
struct Four;

// SAFETY: each index once, and all calls have ended when `run` returns.
unsafe impl Threads for Four {
    fn threads(&self) -> usize {
        4
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

fn refused(what: &str, expected: &str, call: impl FnOnce()) {
    let payload = catch_unwind(AssertUnwindSafe(call)).expect_err(what);
    let text = payload.downcast_ref::<String>().cloned();
    let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| text.to_string())).unwrap();
    assert!(text.contains(expected), "{what}: {text:?} should say {expected:?}");
}

#[test]
fn sizes_that_wrap_around_are_refused() {
    let beyond = "exceeds the memory of any machine";
    let (many, wide) = (1usize << 32, 1usize << 63);
    // 2^32 heads of 2^32 elements are none at all, modulo 2^64.
    let shape = attention::Shape {
        n_heads: many,
        n_kv_heads: many,
        head_dim: many,
        capacity: 1,
        scale: 1.0,
        window: None,
    };
    refused("append", beyond, || attention::append(CacheMut::F32(&mut []), shape, 0, 1, &[], 0));
    refused("attention", beyond, || {
        let (keys, values) = (CacheRef::F32(&[]), CacheRef::F32(&[]));
        attention::attention(&[], 0, 1, keys, values, shape, 0, &mut [], 0, &Four);
    });
    refused("rope", "a row that a machine can address", || {
        rope::rope(&[], 0, 1, many, many, &[], &[], &mut [], 0);
    });
    refused("rope", "cosines and sines", || rope::rope(&[], 0, wide, 0, 4, &[], &[], &mut [], 0));

    let x = vec![1.0; 1 << 15];
    refused("quantise_on", "too few int8 values", || {
        let (q, scale, sum) = (&mut vec![0; 1 << 15][..], &mut [0.0; 4][..], &mut [0; 4][..]);
        quantise_on(&Four, &x, 1 << 13, None, Quantised { q, stride: 1 << 62, group: 0, scale, sum });
    });

    refused("cross_entropy", "rows of", || {
        training::cross_entropy(&x[..10], &[0, 1], wide + 5, &mut [0.0; 2], &Four);
    });
    refused("cross_entropy_backward", "rows of", || {
        training::cross_entropy_backward(&x[..10], &[0, 1], &[1.0; 2], wide + 5, &mut [0.0; 10], &Four);
    });
    refused("relu2_mul_backward", "are no rows of", || {
        training::relu2_mul_backward(&x[..4], &[1.0; 2], wide, &mut [0.0; 4], &Four);
    });

    let shape = |n_heads, head_dim, length| training::Shape {
        n_heads,
        n_kv_heads: n_heads,
        head_dim,
        length,
        window: None,
    };
    for (heads, head_dim, length) in [(1 << 62, 4, 1), (1, 1 << 62, 1), (1, 2, 1 << 62), (2, 1 << 61, 2)] {
        let shape = shape(heads, head_dim, length);
        refused("self_attention", "are no sequences", || {
            training::self_attention(&x[..48], &x, &x, shape, &mut [0.0; 16], &Four);
        });
        refused("self_attention_backward", "are no sequences", || {
            training::self_attention_backward(&x[..48], &x, &x, &x[..16], shape, &mut [0.0; 48], &Four);
        });
    }
}
