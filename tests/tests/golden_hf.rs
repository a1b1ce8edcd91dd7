//! End to end against Hugging Face transformers.

use bitnet_burn::bitnet::LoadOptions;
use bitnet_burn::nn::CacheType;
use bitnet_burn_tests::*;
use burn::tensor::Device;

#[test]
fn quick() {
    let Some(dir) = golden_dir("hf") else { return };
    for name in ["A-online-bf16", "A-online-f32", "A-packed-auto", "A-packed-bitlinear", "B-packed-auto", "B-packed-bitlinear"] {
        let dir = dir.join("hf").join(name);
        let model = load(&dir, &Device::flex(), &LoadOptions::default());
        let goldens = read_goldens(&dir.join("goldens.safetensors"));
        for n in [1, 16, 64] {
            let ids = goldens[&format!("seq{n}.input_ids")].ids();
            let golden = &goldens[&format!("seq{n}.logits")];
            for chunk in [1, 7, 256] {
                let logits = all_logits(&model, &ids, chunk, CacheType::F32);
                println!("{name} {n} chunk {chunk}: {}", max_difference(&logits, &golden.values));
            }
        }
    }
}
