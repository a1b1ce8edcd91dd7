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
use bitnet_burn_manager::memory::PageArena;
use burn::tensor::{Device, Tensor, TensorData};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Of BitNet b1.58 2B-4T, as the heads.
const LAYERS: usize = 30;
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
            let empty = CacheLayer::zeros(cache_type, shape, &device, &PageArena::default());
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
            // Decode reads each layer's keys and values once a token: from memory, not from a cache.
            let arena = PageArena::default();
            let rows =
                TensorData::new(random.floats(KV_HEADS * context * HEAD_DIM), [context, KV_HEADS * HEAD_DIM]);
            let rows = Tensor::<2>::from_data(rows, &device);
            let full =
                || cache_append(CacheLayer::zeros(cache_type, shape, &device, &arena), rows.clone(), 0);
            let layers: Vec<_> = (0..LAYERS).map(|_| (full(), full())).collect();
            let mut layer = layers.iter().cycle();
            let args = AttentionArgs {
                n_heads: HEADS,
                n_kv_heads: KV_HEADS,
                head_dim: HEAD_DIM,
                position,
                window: None,
            };
            let mut group = criterion.benchmark_group(format!("attention_{name}"));
            group.throughput(Throughput::Bytes(
                (2 * KV_HEADS * context * cache_type.row_bytes(HEAD_DIM)) as u64,
            ));
            group.bench_function(BenchmarkId::from_parameter(context), |b| {
                b.iter(|| {
                    let (keys, values) = layer.next().expect("endless").clone();
                    attention(black_box(q.clone()), keys, values, args)
                });
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
