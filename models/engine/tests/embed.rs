//! Vectors of texts: what they depend on, and what they do not.
#![cfg(feature = "default-model")]

use bitnet_burn::Row;
use bitnet_burn_engine::embed::{EmbedOptions, Embedding, Pooling, Prompt, cosine};
use bitnet_burn_engine::{Engine, EngineError};

const TEXTS: [&str; 5] = [
    "There was a fox named Mo.",
    "a",
    "Mo the fox ran up the hill, and the sun was out. There was a bird in a tree, and it sang a song for the fox.",
    "There was a bird named Mo.",
    "The end.",
];

fn engine(rows: usize) -> Engine {
    Engine::options().rows(rows).open_built_in().unwrap()
}

fn options(pooling: Pooling) -> EmbedOptions {
    EmbedOptions { pooling: Some(pooling), ..EmbedOptions::default() }
}

#[test]
fn a_vector_has_the_same_bits_in_every_batch() {
    for pooling in [Pooling::Last, Pooling::Mean] {
        let options = options(pooling);
        let together = engine(256).embed(&TEXTS, &options).unwrap();
        for rows in [1, 7, 32] {
            assert_eq!(engine(rows).embed(&TEXTS, &options).unwrap(), together, "{pooling}, {rows} rows");
        }
        let one = engine(256);
        let alone: Vec<Embedding> =
            TEXTS.iter().map(|text| one.embed(&[text], &options).unwrap().remove(0)).collect();
        assert_eq!(alone, together, "{pooling}");
        let length = cosine(&alone[0].values, &alone[0].values);
        assert!((length - 1.0).abs() < 1e-12);
        for vector in &together {
            let norm: f64 = vector.values.iter().map(|&value| f64::from(value).powi(2)).sum();
            assert!((norm - 1.0).abs() < 1e-6, "{norm}");
        }
        assert!(cosine(&alone[0].values, &alone[3].values) > cosine(&alone[0].values, &alone[4].values));
    }
}

#[test]
fn vectors_are_pooled_from_the_hidden_states() {
    let engine = engine(256);
    let tokens = engine.encode(TEXTS[0], true).unwrap();
    let mut cache = engine.cache().unwrap();
    let sequence = cache.add_sequence(tokens.len());
    let rows: Vec<Row> =
        tokens.iter().enumerate().map(|(position, &token)| Row { token, sequence, position }).collect();
    let wanted: Vec<usize> = (0..rows.len()).collect();
    let states = engine.model().forward_states(&rows, &wanted, &mut cache).unwrap();
    let [n, width] = states.dims();
    let states = states.into_data().try_to_vec::<f32>().unwrap();
    let mean: Vec<f32> =
        (0..width).map(|i| states.iter().skip(i).step_by(width).sum::<f32>() / n as f32).collect();
    let embed = |pooling| {
        let options = EmbedOptions { normalise: Some(false), ..options(pooling) };
        engine.embed(&[TEXTS[0]], &options).unwrap().remove(0)
    };
    assert_eq!(embed(Pooling::Last).values, states[states.len() - width..]);
    let pooled = embed(Pooling::Mean);
    assert_eq!(pooled.tokens, n);
    assert!(pooled.values.iter().zip(&mean).all(|(a, b)| (a - b).abs() < 1e-5));
    // The files of this model say nothing.
    let embedder = engine.embedder(&EmbedOptions::default()).unwrap();
    assert_eq!((embedder.pooling(), embedder.normalises(), embedder.prompt()), (Pooling::Last, true, ""));
}

#[test]
fn prompts_go_in_front_of_the_text() {
    let engine = engine(256);
    let with = |prompt: Prompt, text: &str| {
        let options = EmbedOptions { prompt: Some(prompt), ..options(Pooling::Mean) };
        engine.embed(&[text], &options).unwrap().remove(0)
    };
    let plain =
        engine.embed(&["Instruct: find a fox\nQuery: Mo"], &options(Pooling::Mean)).unwrap().remove(0);
    assert_eq!(with(Prompt::Instruction("find a fox".into()), "Mo"), plain);
    assert_eq!(with(Prompt::Text("Instruct: find a fox\n".into()), "Query: Mo"), plain);
    let options = EmbedOptions { prompt: Some(Prompt::Named("query".into())), ..EmbedOptions::default() };
    let error = engine.embed(&["Mo"], &options).unwrap_err();
    assert!(matches!(error, EngineError::NoSuchPrompt { .. }), "{error}");
}

#[test]
fn texts_without_a_vector_are_named() {
    let engine = Engine::options().context(16).open_built_in().unwrap();
    let embedder = engine.embedder(&EmbedOptions::default()).unwrap();
    let error = |texts: &[Vec<u32>]| embedder.embed_tokens(texts).unwrap_err().to_string();
    assert_eq!(error(&[vec![1], vec![]]), "text 2: it has no tokens");
    assert!(error(&[vec![1], vec![1], vec![1; 17]]).starts_with("text 3: it has 17 tokens, the context 16"));
    assert!(error(&[vec![u32::MAX]]).contains("vocabulary"));
    assert_eq!(embedder.embed_tokens(&[]).unwrap(), []);
    assert_eq!(embedder.embed_tokens(&[vec![1; 16]]).unwrap()[0].tokens, 16);
}
