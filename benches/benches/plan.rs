//! Planning, from a profile of the machine that is kept on disk: what a start of the program waits for.
//!
//! `detect` reads the profile and asks the system for its memory, `requirements` looks at the headers of an open
//! model, `plan` chooses for simulated machines, and `all` is the three of them with opening the model's file.

use std::path::Path;
use std::time::Duration;

use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::load::HeadMode;
use bitnet_burn_engine::plan::{MachineProfile, Measure, Plan, PlanRequest, Requirements};
use criterion::{Criterion, criterion_group, criterion_main};

/// The limit of a plan from what is kept.
const LIMIT: Duration = Duration::from_millis(100);

fn plan(c: &mut Criterion) {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/engine/testdata");
    let path = models.join("golden/gguf/tiny_a-i2_s.gguf");
    let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).expect("a model of the repository");
    let requirements = Requirements::of(&checkpoint, HeadMode::File).expect("its headers");
    let dir = tempfile::tempdir().expect("a directory");
    // Measures, and keeps it.
    MachineProfile::detect(Some(dir.path()), Measure::Missing, None);

    let all = || {
        let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).expect("a model of the repository");
        let requirements = Requirements::of(&checkpoint, HeadMode::File).expect("its headers");
        let machine = MachineProfile::detect(Some(dir.path()), Measure::Missing, None);
        Plan::new(&requirements, &machine, &PlanRequest::default()).expect("no wishes")
    };
    let clock = std::time::Instant::now();
    all();
    let took = clock.elapsed();
    assert!(took < LIMIT, "a plan from what is kept took {took:?}");

    let mut group = c.benchmark_group("plan");
    group.bench_function("detect", |b| {
        b.iter(|| MachineProfile::detect(Some(dir.path()), Measure::Missing, None));
    });
    group.bench_function("requirements", |b| b.iter(|| Requirements::of(&checkpoint, HeadMode::File)));
    for name in ["laptop-4gb", "two-gpus-8gb"] {
        let machine = MachineProfile::read(&models.join(format!("machines/{name}.json"))).expect("a profile");
        group
            .bench_function(name, |b| b.iter(|| Plan::new(&requirements, &machine, &PlanRequest::default())));
    }
    group.bench_function("all", |b| b.iter(all));
    group.finish();
}

criterion_group!(benches, plan);
criterion_main!(benches);
