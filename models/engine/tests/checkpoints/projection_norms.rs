//! Models with a norm of its own before each projection, as BitNet's embedding models have them: Qwen3's shape, from a Hugging
//! Face directory and from a GGUF file, against float64 written out here.

use bitnet_burn::{BitNet, Norm, Projection, Row, names};
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::load::{ActivationRule, LoadOptions, load};
use bitnet_burn_formats::random::SplitMix64;
use serde_json::json;

use crate::gguf::{Dir, F32, Raw, STRING, U32, string};
use crate::hf::{Model, assert_refused, f32s};

#[path = "../support/mod.rs"]
pub mod support;

const HIDDEN: usize = 8;
const INNER: usize = 12;
const HEADS: usize = 2;
const HEAD: usize = 4;
const VOCABULARY: usize = 4;
const TOKENS: [u32; 6] = [0, 3, 1, 1, 2, 0];
const EPS: f64 = 1e-5;
const THETA: f64 = 10_000.0;

/// Values of all tensors.
struct Weights {
    embedding: Vec<f32>,
    /// Masters.
    projections: Vec<(Projection, Vec<f32>)>,
    norms: Vec<(Norm, Vec<f32>)>,
}

fn shape(which: Projection) -> (usize, usize) {
    match which {
        Projection::Q | Projection::O => (HIDDEN, HIDDEN),
        Projection::K | Projection::V => (HEAD, HIDDEN),
        Projection::Down => (HIDDEN, INNER),
        _ => (INNER, HIDDEN),
    }
}

impl Weights {
    fn new() -> Self {
        let mut random = SplitMix64::new(11);
        let mut floats = |count: usize, from: f32| -> Vec<f32> {
            (0..count).map(|_| from + random.below(1000) as f32 / 500.0).collect()
        };
        let norm = |norm, size| (norm, size);
        let mut norms = vec![
            norm(Norm::Attention(0), HIDDEN),
            norm(Norm::Query(0), HEAD),
            norm(Norm::Key(0), HEAD),
            norm(Norm::FeedForward(0), HIDDEN),
            norm(Norm::Output, HIDDEN),
        ];
        norms.extend(Projection::ALL.map(|which| norm(Norm::Input(0, which), shape(which).1)));
        let norms = norms.into_iter().map(|(norm, size)| (norm, floats(size, 0.25))).collect();
        let mut masters = SplitMix64::new(12);
        let master = |which: Projection| {
            let (n, k) = shape(which);
            (which, (0..n * k).map(|_| (masters.below(2001) as f32 - 1000.0) / 997.0).collect())
        };
        let projections = Projection::ALL.map(master).into();
        Self { embedding: floats(VOCABULARY * HIDDEN, -1.0), projections, norms }
    }

    /// The weights that a projection is computed with: the signs of the masters, or 0, times the mean of their magnitudes.
    fn ternary(&self, which: Projection) -> Vec<f32> {
        let masters = &self.projections.iter().find(|(projection, _)| *projection == which).unwrap().1;
        let scale = masters.iter().map(|w| f64::from(w.abs())).sum::<f64>() / masters.len() as f64;
        masters.iter().map(|&w| ((f64::from(w) / scale).round().clamp(-1.0, 1.0) * scale) as f32).collect()
    }

    /// A directory of masters without `quantization_config`.
    fn directory(&self) -> Model {
        let mut model =
            Model::new(json!(null)).without("quantization_config").set("model_type", json!("qwen3"));
        model = model
            .set("hidden_act", json!("silu"))
            .set("rope_theta", json!(THETA))
            .set("head_dim", json!(HEAD));
        model.tensors =
            vec![(names::EMBEDDING.into(), "F32", vec![VOCABULARY, HIDDEN], f32s(&self.embedding))];
        for (norm, values) in &self.norms {
            model.tensors.push((names::norm_name(*norm), "F32", vec![values.len()], f32s(values)));
        }
        for (which, values) in &self.projections {
            let (n, k) = shape(*which);
            model.tensors.push((names::projection_name(0, *which), "F32", vec![n, k], f32s(values)));
        }
        model
    }

    fn gguf(&self) -> Raw {
        let mut raw = Raw::new().key("general.architecture", STRING, string("qwen3"));
        for (key, value) in [
            ("context_length", 32),
            ("embedding_length", HIDDEN),
            ("block_count", 1),
            ("feed_forward_length", INNER),
            ("attention.head_count", HEADS),
            ("attention.head_count_kv", 1),
            ("attention.key_length", HEAD),
            ("attention.value_length", HEAD),
            ("vocab_size", VOCABULARY),
        ] {
            raw = raw.key(&format!("qwen3.{key}"), U32, (value as u32).to_le_bytes());
        }
        raw = raw
            .key("qwen3.attention.layer_norm_rms_epsilon", F32, (EPS as f32).to_le_bytes())
            .key("qwen3.rope.freq_base", F32, (THETA as f32).to_le_bytes())
            .tensor("token_embd.weight", &[HIDDEN as u64, VOCABULARY as u64], 0, f32s(&self.embedding));
        for (norm, values) in &self.norms {
            let name = match norm {
                Norm::Attention(_) => "blk.0.attn_norm",
                Norm::Query(_) => "blk.0.attn_q_norm",
                Norm::Key(_) => "blk.0.attn_k_norm",
                Norm::FeedForward(_) => "blk.0.ffn_norm",
                Norm::Output => "output_norm",
                Norm::Input(_, which) => &format!("blk.0.{}_norm_in", stem(*which)),
                other => panic!("{other:?}"),
            };
            raw = raw.tensor(&format!("{name}.weight"), &[values.len() as u64], 0, f32s(values));
        }
        for which in Projection::ALL {
            let ((n, k), values) = (shape(which), self.ternary(which));
            let name = format!("blk.0.{}.weight", stem(which));
            raw = raw.tensor(&name, &[k as u64, n as u64], 0, f32s(&values));
        }
        raw
    }

    fn norm(&self, which: Norm) -> &[f32] {
        &self.norms.iter().find(|(norm, _)| *norm == which).unwrap().1
    }

    /// y = W norm(x).
    fn project(&self, which: Projection, x: &[f64]) -> Vec<f64> {
        let x = rms(x, self.norm(Norm::Input(0, which)));
        multiply(&self.ternary(which), &x)
    }

    /// The logits of all tokens.
    fn logits(&self) -> Vec<f64> {
        let mut keys: Vec<Vec<f64>> = Vec::new();
        let mut values: Vec<Vec<f64>> = Vec::new();
        let mut logits = Vec::new();
        for (position, &token) in TOKENS.iter().enumerate() {
            let mut x: Vec<f64> = doubles(&self.embedding[token as usize * HIDDEN..][..HIDDEN]);
            let normed = rms(&x, self.norm(Norm::Attention(0)));
            let head = |x: &[f64], norm: Norm| turned(rms(x, self.norm(norm)), position);
            let queries = self.project(Projection::Q, &normed);
            keys.push(head(&self.project(Projection::K, &normed), Norm::Key(0)));
            values.push(self.project(Projection::V, &normed));
            let mut context = Vec::new();
            for query in queries.chunks(HEAD) {
                let query = head(query, Norm::Query(0));
                let scores = keys.iter().map(|key| dot(&query, key) / (HEAD as f64).sqrt()).map(f64::exp);
                let scores: Vec<f64> = scores.collect();
                let sum: f64 = scores.iter().sum();
                let value =
                    |i: usize| scores.iter().zip(&values).map(|(p, value)| p / sum * value[i]).sum::<f64>();
                context.extend((0..HEAD).map(value));
            }
            add(&mut x, &self.project(Projection::O, &context));
            let normed = rms(&x, self.norm(Norm::FeedForward(0)));
            let (gate, up) = (self.project(Projection::Gate, &normed), self.project(Projection::Up, &normed));
            let gated: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(&mut x, &self.project(Projection::Down, &gated));
            logits.extend(multiply(&self.embedding, &rms(&x, self.norm(Norm::Output))));
        }
        logits
    }
}

fn stem(which: Projection) -> &'static str {
    match which {
        Projection::Q => "attn_q",
        Projection::K => "attn_k",
        Projection::V => "attn_v",
        Projection::O => "attn_output",
        Projection::Gate => "ffn_gate",
        Projection::Up => "ffn_up",
        Projection::Down => "ffn_down",
        other => panic!("{other:?}"),
    }
}

fn doubles(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn multiply(weights: &[f32], x: &[f64]) -> Vec<f64> {
    weights.chunks(x.len()).map(|row| dot(&doubles(row), x)).collect()
}

fn rms(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + EPS).sqrt();
    x.iter().zip(weight).map(|(x, &w)| x / scale * f64::from(w)).collect()
}

/// RoPE in halves.
fn turned(x: Vec<f64>, position: usize) -> Vec<f64> {
    let half = HEAD / 2;
    let turn = |i: usize| {
        let (sin, cos) = (position as f64 * THETA.powf(-((i % half) as f64) / half as f64)).sin_cos();
        if i < half { x[i] * cos - x[i + half] * sin } else { x[i] * cos + x[i - half] * sin }
    };
    (0..HEAD).map(turn).collect()
}

fn logits(checkpoint: &Checkpoint, activations: ActivationRule, chunk: usize) -> Vec<f32> {
    let options = LoadOptions { activations, ..LoadOptions::default() };
    let model: BitNet = load(checkpoint, &support::device(), &options, &mut |_| {}).unwrap();
    let mut cache = model.cache(32, bitnet_burn::CacheType::F32).unwrap();
    let sequence = cache.add_sequence(TOKENS.len());
    let rows: Vec<Row> =
        TOKENS.iter().enumerate().map(|(position, &token)| Row { token, sequence, position }).collect();
    let of = |rows: &[Row]| {
        let wanted: Vec<usize> = (0..rows.len()).collect();
        model.forward(rows, &wanted, &mut cache).unwrap().into_data().try_to_vec::<f32>().unwrap()
    };
    rows.chunks(chunk).flat_map(of).collect()
}

/// The largest difference over the largest value.
fn distance(ours: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(ours.len(), expected.len());
    let largest = expected.iter().fold(0.0, |a: f64, v| a.max(v.abs()));
    ours.iter().zip(expected).fold(0.0, |a: f64, (o, e)| a.max((f64::from(*o) - e).abs())) / largest
}

#[test]
fn every_projection_has_a_norm_of_its_own() {
    let weights = Weights::new();
    let expected = weights.logits();
    let opened = weights.directory().open().unwrap();
    assert!(opened.checkpoint.warnings()[0].contains("ternary by their absmean"));
    let dir = Dir::new();
    let gguf = dir.open_and_check(&weights.gguf()).unwrap();
    for checkpoint in [&opened.checkpoint, &gguf] {
        assert!(checkpoint.config().options.projection_norms);
        assert_eq!(checkpoint.norm(Norm::Input(0, Projection::Down)).unwrap().len(), INNER);
        let float = logits(checkpoint, ActivationRule::Float, 6);
        let difference = distance(&float, &expected);
        assert!(difference < 1e-5, "{}: {difference:e}", checkpoint.path().display());
        let quantised = logits(checkpoint, ActivationRule::Model, 6);
        let difference = distance(&quantised, &expected);
        assert!(difference > 0.0 && difference < 0.1, "{difference:e}");
        assert_eq!(logits(checkpoint, ActivationRule::Model, 1), quantised);
    }
}

#[test]
fn norms_that_are_missing_or_too_many_are_named() {
    let weights = Weights::new();
    let up = names::norm_name(Norm::Input(0, Projection::Up));
    assert_eq!(up, "model.layers.0.mlp.up_proj.norm.weight");
    assert_refused("missing", weights.directory().drop(&up).open(), &[&up, "missing"]);
    let q = names::norm_name(Norm::Input(0, Projection::Q));
    assert_refused(
        "too many",
        weights.directory().drop(&q).open(),
        &["proj.norm.weight", "has no such tensor"],
    );
    let short = weights.directory().tensor(&up, "F32", &[4], f32s(&[1.0; 4]));
    assert_refused("short", short.open(), &[&up, "[4]", "[8]"]);
    let mut raw = weights.gguf();
    raw.tensors.retain(|tensor| tensor.name != b"blk.0.ffn_down_norm_in.weight");
    let error = Dir::new().open_and_check(&raw).err().unwrap().to_string();
    assert!(error.contains("blk.0.ffn_down_norm_in.weight"), "{error}");
    let both =
        weights.directory().tensor("model.layers.0.mlp.ffn_sub_norm.weight", "F32", &[12], f32s(&[1.0; 12]));
    assert_refused("both", both.open(), &["sub"]);
}
