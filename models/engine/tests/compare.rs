//! Comparisons: on golden logits of other programs, and on models that differ in one thing.

use std::path::{Path, PathBuf};

use bitnet_burn::{CacheType, GatedActivation};
use bitnet_burn_engine::checkpoint::OpenOptions;
use bitnet_burn_engine::compare::{
    CompareError, Comparison, LogitsFile, Outcome, Place, Side, Tolerance, compare,
};
use bitnet_burn_engine::load::{ActivationRule, HeadMode};
use bitnet_burn_engine::{Engine, EngineOptions};
use bitnet_burn_formats::gguf::GgufFile;
use bitnet_burn_formats::safetensors::open_file;
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/golden").join(name)
}

fn tiny() -> PathBuf {
    golden("gguf/tiny_a-i2_s.gguf")
}

fn tokens(n: usize) -> Vec<u32> {
    let text = std::fs::read_to_string(golden(&format!("gguf/tiny_a-tokens{n}.txt"))).unwrap();
    text.split_whitespace().map(|token| token.parse().unwrap()).collect()
}

fn options() -> EngineOptions {
    Engine::options().without_tokenizer()
}

fn file(name: &str) -> Side {
    Side::Logits(LogitsFile::open(&golden(name)).unwrap())
}

fn model(path: &Path, options: EngineOptions, tokens: &[u32]) -> Side {
    Side::model(options.open(path).unwrap(), tokens.len()).unwrap()
}

fn compared(mut a: Side, mut b: Side, tokens: &[u32]) -> Comparison {
    compare(&mut a, &mut b, Some(tokens), 16, &mut |_| {}).unwrap()
}

fn assert_within(comparison: &Comparison, tolerance: &str) {
    let verdicts = tolerance.parse::<Tolerance>().unwrap().judge(&comparison.figures);
    assert!(verdicts.iter().all(|verdict| verdict.kept), "{verdicts:?}");
}

#[test]
fn golden_logits_are_within_the_tolerances_of_the_golden_tests() {
    // Those that tests/tests/golden_gguf.rs and golden_hf.rs state.
    const INT8: &str = "max_abs_error<=1e-3,correlation>=0.999999,top1_agreement>=1,kl_max<=1e-6";
    const FLOAT: &str = "max_abs_error<=1e-4,correlation>=0.999999,top1_agreement>=1,kl_max<=1e-8";
    for n in [16, 37] {
        let ids = tokens(n);
        let got =
            compared(file(&format!("gguf/tiny_a-ref_int8-{n}.npy")), model(&tiny(), options(), &ids), &ids);
        assert_within(&got, INT8);
        assert_eq!((got.figures.positions, got.figures.vocabulary), (n, 320));
        let float = || options().activations(ActivationRule::Float);
        let got =
            compared(file(&format!("gguf/tiny_a-ref_none-{n}.npy")), model(&tiny(), float(), &ids), &ids);
        assert_within(&got, FLOAT);
        // ik_llama.cpp, whose KV cache is f16.
        let peer =
            compared(file(&format!("gguf/tiny_a-ik_f32-{n}.npy")), model(&tiny(), float(), &ids), &ids);
        assert_within(&peer, "max_abs_error<=2e-2,correlation>=0.99999");
        // Missing quantisation of activations is seen by the error, not by the correlation.
        let wrong =
            compared(file(&format!("gguf/tiny_a-ref_int8-{n}.npy")), model(&tiny(), float(), &ids), &ids);
        assert!(wrong.figures.max_abs_error > 0.1, "{:?}", wrong.figures);
        assert!(wrong.figures.correlation.unwrap() > 0.999);
    }
    for name in ["A-packed-auto", "A-packed-bitlinear"] {
        let goldens = golden(&format!("hf/{name}/goldens.safetensors"));
        let ids = open_file(&goldens).unwrap().tensors["seq16.input_ids"].data.clone();
        let ids: Vec<u32> = ids.chunks_exact(8).map(|id| u32::from(id[0]) + 256 * u32::from(id[1])).collect();
        let side = file(&format!("hf/{name}/goldens.safetensors:seq16.logits"));
        let got = compared(side, model(&golden(&format!("hf/{name}")), options(), &ids), &ids);
        assert_within(&got, INT8);
    }
}

/// tiny_a, with one thing changed.
struct Damaged {
    dir: TempDir,
    bytes: Vec<u8>,
    file: GgufFile,
}

impl Damaged {
    fn new() -> Self {
        let file = GgufFile::open(&tiny()).unwrap();
        Self { dir: tempfile::tempdir().unwrap(), bytes: file.contents().to_vec(), file }
    }

    /// Where a tensor's data begins and ends.
    fn tensor(&mut self, name: &str) -> &mut [u8] {
        let data = self.file.tensor_bytes(name).unwrap();
        let start = data.as_ptr() as usize - self.file.contents().as_ptr() as usize;
        &mut self.bytes[start..start + data.len()]
    }

    fn floats(mut self, name: &str, change: impl Fn(usize, f32) -> f32) -> Self {
        for (i, value) in self.tensor(name).chunks_exact_mut(4).enumerate() {
            let old = f32::from_le_bytes(value.try_into().unwrap());
            value.copy_from_slice(&change(i, old).to_le_bytes());
        }
        self
    }

    /// An f32 among the metadata.
    fn key(mut self, key: &str, value: f32) -> Self {
        let at = self.bytes.windows(key.len()).position(|bytes| bytes == key.as_bytes()).unwrap() + key.len();
        assert_eq!(self.bytes[at..at + 4], 6u32.to_le_bytes(), "an f32");
        self.bytes[at + 4..at + 8].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// Two rows of a matrix of 256 columns change places.
    fn swapped_rows(mut self, name: &str, rows: [usize; 2]) -> Self {
        let data = self.tensor(name);
        (0..64).for_each(|i| data.swap(64 * rows[0] + i, 64 * rows[1] + i));
        self
    }

    /// tiny_a against it.
    fn compared(self) -> Comparison {
        self.compared_with(options(), options())
    }

    fn compared_with(self, a: EngineOptions, b: EngineOptions) -> Comparison {
        let ids = tokens(37);
        let path = self.dir.path().join("damaged.gguf");
        std::fs::write(&path, &self.bytes).unwrap();
        compared(model(&tiny(), a, &ids), model(&path, b, &ids), &ids)
    }
}

fn first(comparison: &Comparison) -> &Place {
    comparison.layers.as_ref().unwrap().first.as_ref().unwrap()
}

#[test]
fn a_model_is_equal_to_itself_in_all_layers() {
    let ids = tokens(37);
    let got = compared(model(&tiny(), options(), &ids), model(&tiny(), options(), &ids), &ids);
    assert_within(&got, "mse<=0,max_abs_error<=0,kl_max<=0,correlation>=1,top5_agreement>=1");
    let layers = got.layers.unwrap();
    assert_eq!((layers.positions, layers.same), (37, 37));
    assert_eq!((layers.explained_by_rounding, layers.first), (None, None));
    // Looking at layers changes no bit of the logits.
    let dir = tempfile::tempdir().unwrap();
    let engine = options().open(tiny()).unwrap();
    let mut cache = engine.cache().unwrap();
    let sequence = cache.add_sequence(0);
    let mut data = Vec::new();
    let (model_, generate) = (engine.model(), bitnet_burn_engine::generate::logits);
    generate(model_, &ids, sequence, &mut cache, 5, &mut |_, rows| {
        data.extend(rows.iter().flat_map(|value| value.to_le_bytes()));
    })
    .unwrap();
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (37, 320), }\n";
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend([header.as_bytes(), &data].concat());
    std::fs::write(dir.path().join("x.npy"), bytes).unwrap();
    let mut file = Side::Logits(LogitsFile::open(&dir.path().join("x.npy")).unwrap());
    let same = compare(&mut file, &mut model(&tiny(), options(), &ids), Some(&ids), 64, &mut |_| {}).unwrap();
    assert_eq!((same.figures.max_abs_error, same.figures.perplexity_ratio), (0.0, Some(1.0)));
    assert_eq!(same.figures.perplexity_a, got.figures.perplexity_a);
    assert!(same.layers.is_none() && same.layers_absent.is_some());
}

#[test]
fn each_kind_of_damage_is_found_and_told_apart() {
    // One code of row 17 of the output projection of layer 1 becomes another.
    let mut damaged = Damaged::new();
    let byte = &mut damaged.tensor("blk.1.attn_output.weight")[64 * 17 + 3];
    // Codes are 0, 1 and 2 in pairs of bits.
    let code = (*byte >> 2) & 3;
    *byte = (*byte & !(3 << 2)) | (((code + 1) % 3) << 2);
    let got = damaged.compared();
    let place = first(&got);
    assert_eq!((place.layer, place.part, place.outcome), (1, "o_proj", Outcome::Different));
    assert_eq!((place.outputs_that_differ, place.output, place.outputs), (1, 17, 256), "{place}");
    assert!(place.meaning.contains("no rounding explains it: other weights"), "{place}");
    assert_eq!(got.layers.as_ref().unwrap().explained_by_rounding, Some(false));
    assert!(got.figures.max_abs_error > 0.0 && got.figures.correlation.unwrap() > 0.9);

    // Two rows of q and of k of layer 1 change places, as a wrong layout of RoPE has them.
    let swap = |name: &str, rows| Damaged::new().swapped_rows(name, rows).compared();
    let got = swap("blk.1.attn_q.weight", [3, 40]);
    let place = first(&got);
    assert_eq!((place.position, place.layer, place.part), (0, 1, "q_proj"), "{place}");
    assert_eq!(place.outputs_that_differ, 2);
    assert!(place.meaning.contains("in another order"), "{place}");
    let got = swap("blk.0.attn_k.weight", [3, 40]);
    assert_eq!((first(&got).layer, first(&got).part), (0, "k_proj"), "{}", first(&got));

    // Another base of RoPE: position 0 is not turned.
    let got = Damaged::new().key("bitnet-b1.58.rope.freq_base", 10_000.0).compared();
    let place = first(&got);
    assert_eq!((place.position, place.layer, place.part), (1, 0, "attention"), "{place}");
    assert!(place.meaning.contains("another RoPE"), "{place}");
    assert_eq!((place.outcome, got.layers.as_ref().unwrap().same), (Outcome::Different, 1));

    // Another activation function.
    let silu =
        options().file(OpenOptions { hidden_act: Some(GatedActivation::Silu), ..OpenOptions::default() });
    let got = Damaged::new().compared_with(options(), silu);
    let place = first(&got);
    assert_eq!((place.position, place.layer, place.part), (0, 0, "activation"), "{place}");
    assert!(place.meaning.contains("another activation function"), "{place}");

    // Another scale.
    let mut damaged = Damaged::new();
    let data = damaged.tensor("blk.0.ffn_up.weight");
    let at = data.len() - 32;
    let scale = f32::from_le_bytes(data[at..at + 4].try_into().unwrap());
    data[at..at + 4].copy_from_slice(&(1.25 * scale).to_le_bytes());
    let got = damaged.compared();
    let place = first(&got);
    assert_eq!((place.layer, place.part), (0, "up_proj"), "{place}");
    assert!(place.meaning.contains("1.250000 times A's"), "{place}");

    // Another norm, of which the projections behind it would be blamed.
    let got =
        Damaged::new().floats("blk.1.ffn_norm.weight", |i, v| if i == 5 { 2.0 * v } else { v }).compared();
    let place = first(&got);
    assert_eq!((place.layer, place.part), (1, "gate_proj"), "{place}");
    assert!(place.meaning.contains("other weights of the norm"), "{place}");
    let got = Damaged::new().floats("output_norm.weight", |i, v| if i == 5 { 2.0 * v } else { v }).compared();
    assert_eq!((first(&got).layer, first(&got).part), (2, "lm_head"), "{}", first(&got));
}

#[test]
fn settings_are_told_apart() {
    let with = |b: EngineOptions| Damaged::new().compared_with(options(), b);
    for (b, part, meaning) in [
        (options().activations(ActivationRule::Float), "q_proj", "as int8 by rows, B in f32"),
        (options().kv_cache(CacheType::F16), "attention", "KV cache of A is f32, that of B f16"),
        (
            options().head(HeadMode::Requantised(bitnet_burn_formats::DenseFormat::Q8_0)),
            "lm_head",
            "other ways",
        ),
    ] {
        let got = with(b);
        assert_eq!(first(&got).part, part, "{}", first(&got));
        assert!(first(&got).meaning.contains(meaning), "{}", first(&got));
    }
}

/// Norms of these layers that differ by float noise: no weight is another, but now and then an activation lies on a boundary.
fn noisy(layers: std::ops::Range<usize>, noise: f32) -> Damaged {
    let change = |i: usize, v: f32| v * (1.0 + if i.is_multiple_of(3) { noise } else { -0.5 * noise });
    let norms = ["attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"];
    let names = layers.flat_map(|layer| norms.map(|norm| format!("blk.{layer}.{norm}.weight")));
    names.fold(Damaged::new(), |damaged, name| damaged.floats(&name, change))
}

#[test]
fn a_rounding_is_proved_by_its_column_of_the_weights() {
    let got = noisy(0..2, 1e-6).compared();
    let layers = got.layers.as_ref().unwrap();
    assert_eq!((layers.positions, layers.explained_by_rounding), (37, Some(true)), "{layers:?}");
    assert!(layers.rounding > 0 && layers.first_different.is_none(), "{layers:?}");
    let place = first(&got);
    let rounding = place.rounding.unwrap();
    assert_eq!((place.outcome, rounding.activations), (Outcome::Rounding, 1), "{place}");
    assert_ne!(rounding.a.round(), rounding.b.round(), "{place}");
    assert!((rounding.a - rounding.b).abs() < 1e-3, "{place}");
    // A rounding moves logits a thousand times as much as the noise does.
    assert!(
        got.figures.max_abs_error > 1e-2 && got.figures.correlation.unwrap() > 0.999,
        "{:?}",
        got.figures
    );
}

#[test]
fn positions_that_look_back_at_a_rounding_inherit_it() {
    let got = noisy(0..2, 5e-6).compared();
    let layers = got.layers.as_ref().unwrap();
    assert_eq!((layers.explained_by_rounding, layers.different), (Some(true), 0), "{layers:?}");
    assert!(layers.rounding > 0 && layers.inherited > 0, "{layers:?}");
    assert_eq!(layers.same + layers.rounding + layers.inherited, 37, "{layers:?}");
}

#[test]
fn a_difference_behind_a_rounding_is_found() {
    let got = noisy(0..1, 1e-6).swapped_rows("blk.1.attn_v.weight", [0, 1]).compared();
    let layers = got.layers.as_ref().unwrap();
    assert_eq!((layers.different, layers.explained_by_rounding), (1, Some(false)));
    let different = layers.first_different.as_ref().or(layers.first.as_ref()).unwrap();
    assert_eq!((different.layer, different.part), (1, "v_proj"), "{different}");
}

fn error(a: Side, b: Side, tokens: Option<&[u32]>) -> CompareError {
    let (mut a, mut b) = (a, b);
    compare(&mut a, &mut b, tokens, 16, &mut |_| {}).unwrap_err()
}

#[test]
fn sides_that_do_not_fit_are_refused() {
    let ids = tokens(16);
    let tiny = || model(&tiny(), options(), &ids);
    assert!(matches!(error(tiny(), tiny(), None), CompareError::NoTokens));
    let positions = error(file("gguf/tiny_a-ref_int8-37.npy"), tiny(), Some(&ids));
    assert!(matches!(positions, CompareError::Positions { found: 37, expected: 16, .. }), "{positions}");
    let both = error(file("gguf/tiny_a-ref_int8-37.npy"), file("gguf/tiny_a-ref_int8-16.npy"), None);
    assert!(matches!(both, CompareError::Positions { found: 16, expected: 37, .. }), "{both}");
    #[cfg(feature = "default-model")]
    {
        let other = Side::model(options().open_built_in().unwrap(), 16).unwrap();
        let error = error(tiny(), other, Some(&ids));
        assert!(matches!(error, CompareError::Vocabulary { a: 320, .. }), "{error}");
        assert!(error.to_string().contains("tiny_a-i2_s.gguf has 320 logits"), "{error}");
    }
    let tensor = LogitsFile::open(&golden("hf/A-packed-auto/goldens.safetensors")).err().unwrap().to_string();
    assert!(tensor.contains("FILE.safetensors:NAME"), "{tensor}");
    let missing =
        LogitsFile::open(&golden("hf/A-packed-auto/goldens.safetensors:seq5.logits")).err().unwrap();
    assert!(missing.to_string().contains("no tensor `seq5.logits`"), "{missing}");
    let ids =
        LogitsFile::open(&golden("hf/A-packed-auto/goldens.safetensors:seq16.input_ids")).err().unwrap();
    assert!(ids.to_string().contains("type I64"), "{ids}");
}
