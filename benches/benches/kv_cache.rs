//! One layer's KV cache of 2B-4T during decode, by context length.
//!
//! `append` writes one token's keys and values: its time must not depend on the context, since the cache
//! is updated in place. (`append_to_a_copy` is what it would cost otherwise: another owner holds the
//! cache, so that it is copied.) `attention` reads the whole history, and grows with it.

use std::hint::black_box;
use std::time::Duration;

use bitnet_burn_backends::ops::{CacheLayer, attention, cache_append};
use bitnet_burn_backends::{AttentionArgs, CacheType};
use bitnet_burn_benches::Random;
use bitnet_burn_core::memory::WeightArena;
use burn::tensor::{Device, Tensor, TensorData};
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};

const HEADS: usize = 20;
const KV_HEADS: usize = 5;
const HEAD_DIM: usize = 128;

fn kv_cache(criterion: &mut Criterion) {
    let device = Device::flex();
    let mut random = Random::new(1);
    let mut row =
        |width: usize| Tensor::<2>::from_data(TensorData::new(random.floats(width), [1, width]), &device);
    let (q, k) = (row(HEADS * HEAD_DIM), row(KV_HEADS * HEAD_DIM));
    for cache_type in [CacheType::F32, CacheType::F16, CacheType::Int8] {
        let name = cache_type.name();
        for context in [128, 512, 1024, 2048, 4096] {
            // Room for exactly the context: the last token is written again and again.
            let shape = [KV_HEADS, context, HEAD_DIM];
            let empty = CacheLayer::zeros(cache_type, shape, &device, &WeightArena::default());
            let position = context - 1;

            let mut cache = Some(cache_append(empty, k.clone(), position));
            criterion.benchmark_group(format!("append_{name}")).bench_function(
                BenchmarkId::from_parameter(context),
                |b| {
                    b.iter(|| {
                        let owned = cache.take().expect("put back below");
                        cache = Some(cache_append(owned, black_box(k.clone()), position));
                    });
                },
            );
            let cache = cache.expect("put back");
            criterion.benchmark_group(format!("append_to_a_copy_{name}")).bench_function(
                BenchmarkId::from_parameter(context),
                |b| {
                    b.iter_batched(
                        || (cache.clone(), k.clone()),
                        |(cache, k)| cache_append(cache, k, position),
                        BatchSize::PerIteration,
                    );
                },
            );
            let args = AttentionArgs { n_heads: HEADS, n_kv_heads: KV_HEADS, head_dim: HEAD_DIM, position };
            criterion
                .benchmark_group(format!("attention_{name}"))
                .bench_function(BenchmarkId::from_parameter(context), |b| {
                    b.iter(|| attention(black_box(q.clone()), cache.clone(), cache.clone(), args))
                });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = kv_cache
}
criterion_main!(benches);
