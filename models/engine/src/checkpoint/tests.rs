use super::values::ROW_ALIGNMENT;
use super::*;
use crate::gguf::{GgufTypes, write_checkpoint};
use bitnet_burn::GatedActivation;
use bitnet_burn_formats::gguf::GgufWriter;
use std::process::Command;

/// A directory or file of the golden data: in `BITNET_GOLDEN_DIR`, else the part that is kept here.
fn golden(name: &str) -> Option<PathBuf> {
    let given = std::env::var_os("BITNET_GOLDEN_DIR").map(PathBuf::from);
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/golden");
    let found = given.into_iter().chain([kept]).map(|dir| dir.join(name)).find(|path| path.exists());
    if found.is_none() {
        eprintln!("SKIPPED: golden data {name} is not here; set BITNET_GOLDEN_DIR");
    }
    found
}

fn open(path: &Path) -> Checkpoint {
    let checkpoint = Checkpoint::open(path, &OpenOptions::default()).unwrap();
    assert_eq!(checkpoint.warnings(), &[] as &[String]);
    checkpoint
}

/// All projections of a model, each with its layer.
fn projections(checkpoint: &Checkpoint) -> impl Iterator<Item = (usize, Projection, TernaryTensor)> {
    (0..checkpoint.config().n_layers).flat_map(move |layer| {
        Projection::ALL.map(|which| (layer, which, checkpoint.projection(layer, which).unwrap()))
    })
}

/// Equal codes; scales within `tolerance`, relative.
fn assert_equal_ternary(a: &Checkpoint, b: &Checkpoint, tolerance: f32) {
    for (layer, which, ours) in projections(a) {
        let theirs = b.projection(layer, which).unwrap();
        assert_eq!((ours.n, ours.k), (theirs.n, theirs.k));
        assert!(ours.codes == theirs.codes, "codes of layer {layer} {which:?}");
        let (s, t) = (ours.scale, theirs.scale);
        assert!((s - t).abs() <= tolerance * s, "layer {layer} {which:?}: {ours:?} {theirs:?}");
        assert!(ours.codes.as_ptr().addr().is_multiple_of(ROW_ALIGNMENT));
    }
}

fn assert_equal_dense(a: &Checkpoint, b: &Checkpoint) {
    let n_layers = a.config().n_layers;
    for norm in (0..n_layers).flat_map(|l| Norm::of_layer(l, a.config())).chain([Norm::Output]) {
        assert_eq!(a.norm(norm).unwrap(), b.norm(norm).unwrap(), "{norm:?}");
    }
    let matrices = |c: &Checkpoint| {
        [Some(c.embedding().unwrap()), c.output().unwrap()].map(|m| m.map(|m| (m.format, m.data)))
    };
    assert!(matrices(a) == matrices(b));
}

/// The contents of an xz file, by whichever program there is.
fn unxz(path: &Path) -> Option<Vec<u8>> {
    let python = "import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())";
    let commands: [(&str, &[&str]); 2] = [("xz", &["-dc"]), ("python3", &["-c", python])];
    for (program, arguments) in commands {
        match Command::new(program).args(arguments).arg(path).output() {
            Ok(output) if output.status.success() => return Some(output.stdout),
            _ => {}
        }
    }
    eprintln!("SKIPPED: neither xz nor python3 could unpack {}", path.display());
    None
}

#[test]
fn gguf_golden_opens_and_checks() {
    let checkpoint = open(&golden("gguf/tiny_a-i2_s.gguf").expect("kept in the repository"));
    let config = checkpoint.config();
    assert_eq!((config.hidden_size, config.intermediate_size, config.n_layers), (256, 768, 2));
    assert_eq!((config.n_heads, config.n_kv_heads, config.head_dim, config.vocab_size), (4, 2, 64, 320));
    assert_eq!((config.rope_theta, config.rms_norm_eps), (500_000.0, 1e-5));
    assert_eq!(
        (config.activation, config.sub_norms, config.tied_embeddings),
        (GatedActivation::Relu2, true, true)
    );
    let report = checkpoint.check().unwrap();
    assert_eq!(report.ternary_weights, config.ternary_parameters());
    assert_eq!(report.tensors, 14 + 8 + 2);
    assert!((0.2..0.5).contains(&(report.zero_weights as f64 / report.ternary_weights as f64)), "{report:?}");
    for (_, _, tensor) in projections(&checkpoint) {
        assert_eq!(tensor.stored_as, "I2_S");
    }
    let TokenizerSource::Gguf(tokenizer) = checkpoint.tokenizer_source() else { panic!("a GGUF tokenizer") };
    assert_eq!((tokenizer.tokens.len(), tokenizer.model.as_deref()), (320, Some("gpt2")));
}

#[test]
fn i2_s_and_floats_of_the_same_model_are_the_same() {
    let Some(packed) = golden("gguf/tiny_a-f32.gguf.xz") else { return };
    let Some(bytes) = unxz(&packed) else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny_a-f32.gguf");
    std::fs::write(&path, bytes).unwrap();
    let floats = open(&path);
    assert_eq!(floats.projection(0, Projection::Q).unwrap().stored_as, "F32");
    let i2_s = open(&golden("gguf/tiny_a-i2_s.gguf").expect("kept in the repository"));
    assert_equal_ternary(&i2_s, &floats, 0.0);
    let (ours, theirs) = (i2_s.config(), floats.config());
    assert_eq!(ModelConfig { name: None, ..ours.clone() }, ModelConfig { name: None, ..theirs.clone() });
}

#[test]
fn the_styles_of_hugging_face_hold_the_same_codes() {
    let auto = open(&golden("hf/A-packed-auto").expect("kept in the repository"));
    let inverse = open(&golden("hf/A-packed-bitlinear").expect("kept in the repository"));
    assert_eq!(auto.config(), inverse.config());
    assert_eq!((auto.config().vocab_size, auto.config().bos_token), (320, Some(312)));
    // Scales were rounded to bf16 (8 bits), in either direction.
    assert_equal_ternary(&auto, &inverse, 1.0 / 128.0);
    auto.check().unwrap();
    if let Some(path) = golden("hf/A-online-bf16") {
        let online = open(&path);
        assert_equal_ternary(&online, &auto, 1.0 / 256.0);
        assert_eq!(online.projection(0, Projection::Q).unwrap().stored_as, "BF16 master (absmean)");
    }
    if let Some(path) = golden("hf/A-online-f32") {
        let report = open(&path).check().unwrap();
        assert_eq!(report.ternary_weights, auto.config().ternary_parameters());
    }
    if let (Some(auto), Some(inverse)) = (golden("hf/B-packed-auto"), golden("hf/B-packed-bitlinear")) {
        let (auto, inverse) = (open(&auto), open(&inverse));
        assert_equal_ternary(&auto, &inverse, 2e-7);
        let config = auto.config();
        assert_eq!((config.rope_theta, config.rms_norm_eps, config.tied_embeddings), (10_000.0, 1e-6, false));
        auto.check().unwrap();
    }
}

#[test]
fn a_model_survives_the_way_into_gguf() {
    let names = ["A-packed-auto", "A-packed-bitlinear", "A-online-bf16", "A-online-f32", "B-packed-auto"];
    for path in names.iter().filter_map(|name| golden(&format!("hf/{name}"))) {
        let original = open(&path);
        let dir = tempfile::tempdir().unwrap();
        let mut writer = GgufWriter::new();
        write_checkpoint(&mut writer, original.config(), &original, GgufTypes::default()).unwrap();
        writer.write(&dir.path().join("model.gguf")).unwrap();

        let copy = open(dir.path()); // the only GGUF file in it
        let expected = ModelConfig { architecture: "bitnet-b1.58".into(), ..original.config().clone() };
        assert_eq!(copy.config(), &expected);
        assert_equal_ternary(&original, &copy, 0.0);
        assert_equal_dense(&original, &copy);
        assert_eq!(copy.check().unwrap().zero_weights, original.check().unwrap().zero_weights);
    }
}

#[test]
fn a_checkpoint_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
    shared::<LoadError>();
}
