//! Hugging Face directory -> GGUF (I2_S) -> the same logits, bit for bit.

use bitnet_burn::bitnet::LoadOptions;
use bitnet_burn::checkpoint::{Checkpoint, OpenOptions, Projection};
use bitnet_burn::gguf::{GgufTypes, GgufWriter};
use bitnet_burn::nn::CacheType;
use bitnet_burn_tests::*;

#[test]
fn a_model_written_as_gguf_gives_the_same_logits_bit_for_bit() {
    let temporary = tempfile::tempdir().unwrap();
    for dir in hf_models() {
        let path = temporary.path().join(format!("{}.gguf", name_of(&dir)));
        let checkpoint = Checkpoint::open(&dir, &OpenOptions::default()).unwrap();
        let mut writer = GgufWriter::new();
        writer.checkpoint(&checkpoint, GgufTypes::default()).unwrap();
        let size = writer.file_size();
        writer.write(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), size);

        let written = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
        written.check().unwrap();
        let (a, b) = (checkpoint.embedding().unwrap(), written.embedding().unwrap());
        assert_eq!((a.format, &a.data), (b.format, &b.data), "the embedding is stored in its own type");
        assert_eq!(checkpoint.output().unwrap().map(|t| t.data), written.output().unwrap().map(|t| t.data));
        for which in Projection::ALL {
            let (a, b) = (checkpoint.projection(0, which).unwrap(), written.projection(0, which).unwrap());
            assert_eq!((a.scale.to_bits(), &a.codes), (b.scale.to_bits(), &b.codes), "{which:?}");
            assert_eq!(b.stored_as, "I2_S");
        }
        let goldens = read_goldens(&dir.join("goldens.safetensors"));
        for device in host_devices() {
            let [from_hf, from_gguf] = [&dir, &path].map(|path| load(path, &device, &LoadOptions::default()));
            for n in [1, 16, 64] {
                let ids = goldens[&format!("seq{n}.input_ids")].ids();
                let [a, b] = [&from_hf, &from_gguf].map(|model| all_logits(model, &ids, 256, CacheType::F32));
                assert_same_bits(&a, &b, &format!("{} seq{n}", name_of(&dir)));
            }
        }
    }
}
