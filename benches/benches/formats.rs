//! Packing, unpacking and quantising one down projection of 2B-4T [2560, 6912], and a row of its
//! embedding. This is what loading, exporting and training spend their time on.

use std::hint::black_box;
use std::time::Duration;

use bitnet_burn_benches::Random;
use bitnet_burn_cpu::quantise::quantise_rows;
use bitnet_burn_formats::dense::DenseFormat;
use bitnet_burn_formats::quant;
use bitnet_burn_formats::{canonical, check_canonical, hf, tq1_0, tq2_0};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const N: usize = 2560;
const K: usize = 6912;

fn formats(criterion: &mut Criterion) {
    let mut random = Random::new(1);
    let weights = random.ternary(N * K);
    let row_bytes = canonical::row_bytes(K);
    let mut rows = vec![0; N * row_bytes];
    let pack = |weights: &[i8], rows: &mut [u8]| {
        for (w, row) in weights.chunks_exact(K).zip(rows.chunks_exact_mut(row_bytes)) {
            canonical::pack_row(w, row);
        }
    };
    pack(&weights, &mut rows);

    let mut group = criterion.benchmark_group("ternary");
    group.throughput(Throughput::Elements((N * K) as u64));
    group.bench_function("i2_s_pack", |b| b.iter(|| pack(black_box(&weights), &mut rows)));
    let mut back = vec![0i8; N * K];
    let mut unpack = || {
        for (w, row) in back.chunks_exact_mut(K).zip(rows.chunks_exact(row_bytes)) {
            canonical::unpack_row(black_box(row), w);
        }
    };
    unpack();
    group.bench_function("i2_s_unpack", |b| b.iter(&mut unpack));
    assert!(weights == back, "what was packed is unpacked");
    group
        .bench_function("i2_s_check", |b| b.iter(|| check_canonical(black_box(&rows), N, K).expect("valid")));
    let tq2 = tq2_0::from_canonical(&rows, N, K, 0.5).expect("packs");
    let tq1 = tq1_0::from_canonical(&rows, N, K, 0.5).expect("packs");
    let packed = hf::pack_from_canonical(&rows, N, K).expect("packs");
    group.bench_function("tq2_0_to_i2_s", |b| {
        b.iter(|| tq2_0::to_canonical(black_box(&tq2), N, K).expect("valid"))
    });
    group.bench_function("tq1_0_to_i2_s", |b| {
        b.iter(|| tq1_0::to_canonical(black_box(&tq1), N, K).expect("valid"))
    });
    group.bench_function("i2_s_to_tq2_0", |b| {
        b.iter(|| tq2_0::from_canonical(black_box(&rows), N, K, 0.5).expect("packs"));
    });
    group.bench_function("i2_s_to_tq1_0", |b| {
        b.iter(|| tq1_0::from_canonical(black_box(&rows), N, K, 0.5).expect("packs"));
    });
    group.bench_function("hf_to_i2_s", |b| {
        b.iter(|| hf::unpack_to_canonical(black_box(&packed), N, K).expect("valid"));
    });
    let masters = random.floats(N * K);
    group.bench_function("absmean_to_i2_s", |b| {
        b.iter(|| quant::absmean_to_canonical(black_box(&masters), N, K).expect("finite"));
    });
    group.finish();

    let mut group = criterion.benchmark_group("activations");
    for m in [1, 128] {
        let x = random.floats(m * K);
        let (mut q, mut scale, mut sum) = (vec![0; m * K], vec![0.0; m], vec![0; m]);
        group.throughput(Throughput::Elements((m * K) as u64));
        group.bench_function(format!("absmax_m{m}"), |b| {
            b.iter(|| quantise_rows(black_box(&x), K, &mut q, K, &mut scale, &mut sum));
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("dense_rows");
    let x = random.floats(2560);
    let mut out = vec![0.0; 2560];
    group.throughput(Throughput::Elements(2560));
    for format in DenseFormat::ALL {
        let mut row = vec![0; format.row_bytes(2560).expect("whole blocks")];
        format.encode_row(&x, &mut row).expect("encodes");
        group.bench_function(format!("decode_{}", format.name()), |b| {
            b.iter(|| format.decode_row(black_box(&row), &mut out).expect("decodes"));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = formats
}
criterion_main!(benches);
