//! A golden model in every other format -> the same logits, bit for bit, so that what holds of the one (see
//! `golden_hf.rs`, `golden_gguf.rs`) holds of the other.

use std::ops::ControlFlow;

use bitnet_burn::CacheType;
use bitnet_burn::Projection;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::gguf::{GgufTypes, TernaryType};
use bitnet_burn_engine::hf::Style;
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_tests::*;
use bitnet_burn_train::export::{ExportOptions, Target, export};

#[test]
fn a_golden_model_in_another_format_gives_the_same_logits_bit_for_bit() {
    let gguf = |ternary| Target::Gguf(GgufTypes { ternary, ..GgufTypes::default() });
    let hf = |style| Target::Hf { style, dense: None };
    let targets = [
        ("I2_S", gguf(TernaryType::I2_S)),
        ("TQ2_0", gguf(TernaryType::TQ2_0)),
        ("TQ1_0", gguf(TernaryType::TQ1_0)),
        ("packed", hf(Style::PackedAuto)),
        ("inverse", hf(Style::PackedInverse)),
        ("master", hf(Style::Online)),
    ];
    let temporary = tempfile::tempdir().unwrap();
    let mut compared = 0;
    for dir in hf_models() {
        let checkpoint = Checkpoint::open(&dir, &OpenOptions::default()).unwrap();
        let online = checkpoint.master(0, Projection::Q).unwrap().is_some();
        let goldens = read_goldens(&dir.join("goldens.safetensors"));
        for device in host_devices() {
            let model = load(&dir, &device, &LoadOptions::default());
            let prompts = [1, 16, 64].map(|n| goldens[&format!("seq{n}.input_ids")].ids());
            let expected = prompts.each_ref().map(|ids| all_logits(&model, ids, 256, CacheType::F32));
            for (name, target) in targets.iter().filter(|(name, _)| online || *name != "master") {
                let what = format!("{} as {name}", name_of(&dir));
                let path = temporary.path().join("model");
                let options = ExportOptions { overwrite: true, ..ExportOptions::new(*target) };
                let summary =
                    export(&checkpoint, &path, &options, &mut |_| ControlFlow::Continue(())).unwrap();
                match name {
                    // An f16 can't hold a scale of f32, and not every f32 is a reciprocal.
                    &"TQ2_0" | &"TQ1_0" | &"inverse" if !summary.is_exact() => {}
                    _ => {
                        assert!(summary.is_exact(), "{what}: {summary:?}");
                        let copy = load(&path, &device, &LoadOptions::default());
                        for (ids, expected) in prompts.iter().zip(&expected) {
                            let logits = all_logits(&copy, ids, 256, CacheType::F32);
                            assert_same_bits(expected, &logits, &what);
                        }
                        compared += 1;
                    }
                }
                if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }
                    .unwrap();
            }
        }
    }
    // The packed goldens of A have scales of bf16, which f16 holds.
    assert!(compared >= 8, "{compared}");
}
