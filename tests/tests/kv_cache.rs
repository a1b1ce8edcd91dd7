//! The KV cache: whatever is done to it, a sequence's logits are those of the sequence alone, bit for bit.

use bitnet_burn::ModelConfig;
use bitnet_burn::{BitNet, ForwardError, Row};
use bitnet_burn::{CacheError, CacheType, KvCache, SequenceId};
use bitnet_burn_engine::generate;
use bitnet_burn_engine::generate::{Finish, GenerateOptions};
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_tests::*;
use burn::module::Module;
use burn::tensor::Device;

const VOCABULARY: usize = 320;

fn models() -> Vec<BitNet> {
    let dir = repository_golden().join("hf/A-packed-auto");
    host_devices().iter().map(|device| load(&dir, device, &LoadOptions::default())).collect()
}

/// Each with every type of cache that its device has.
fn models_and_types() -> impl Iterator<Item = (BitNet, CacheType)> {
    models()
        .into_iter()
        .flat_map(|model| cache_types(&model).into_iter().map(move |cache_type| (model.clone(), cache_type)))
}

fn tokens(seed: u64, n: usize) -> Vec<u32> {
    let mut random = Random(seed);
    (0..n).map(|_| random.below(VOCABULARY) as u32).collect()
}

fn rows(tokens: &[u32], sequence: SequenceId, position: usize) -> Vec<Row> {
    tokens.iter().enumerate().map(|(i, &token)| Row { token, sequence, position: position + i }).collect()
}

/// Appends tokens and returns the logits of all of them.
fn append(model: &BitNet, cache: &mut KvCache, sequence: SequenceId, tokens: &[u32]) -> Vec<f32> {
    let rows = rows(tokens, sequence, cache.length(sequence).unwrap());
    forward(model, cache, &rows).unwrap()
}

fn forward(model: &BitNet, cache: &mut KvCache, rows: &[Row]) -> Result<Vec<f32>, ForwardError> {
    let wanted: Vec<usize> = (0..rows.len()).collect();
    Ok(model.forward(rows, &wanted, cache)?.into_data().try_to_vec().unwrap())
}

/// The logits of the last `last` tokens of a sequence that is alone.
fn alone(model: &BitNet, tokens: &[u32], last: usize, cache_type: CacheType) -> Vec<f32> {
    all_logits(model, tokens, 256, cache_type)[(tokens.len() - last) * VOCABULARY..].to_vec()
}

#[test]
fn a_fork_and_its_origin_go_on_independently() {
    for (model, cache_type) in models_and_types() {
        let (history, a, b) = (tokens(1, 20), tokens(2, 9), tokens(3, 14));
        let mut cache = model.cache(64, cache_type).unwrap();
        let origin = cache.add_sequence(0);
        append(&model, &mut cache, origin, &history);
        let fork = cache.fork(origin).unwrap();
        assert_eq!(cache.length(fork).unwrap(), 20);
        // Token by token in turn, so that each would see what the other writes.
        let (mut of_origin, mut of_fork) = (Vec::new(), Vec::new());
        for (i, &token) in b.iter().enumerate() {
            if let Some(&token) = a.get(i) {
                of_origin.extend(append(&model, &mut cache, origin, &[token]));
            }
            of_fork.extend(append(&model, &mut cache, fork, &[token]));
        }
        let with = |tail: &[u32]| [&history, tail].concat();
        assert_same_bits(&of_origin, &alone(&model, &with(&a), 9, cache_type), "the origin");
        assert_same_bits(&of_fork, &alone(&model, &with(&b), 14, cache_type), "the fork");
        // The origin's end is not the fork's.
        cache.remove(origin).unwrap();
        let more = append(&model, &mut cache, fork, &a);
        assert_same_bits(&more, &alone(&model, &[with(&b), a.clone()].concat(), 9, cache_type), "the fork");
    }
}

#[test]
fn a_truncated_sequence_goes_on_as_if_the_rest_had_never_been() {
    for (model, cache_type) in models_and_types() {
        let (history, wrong, right) = (tokens(4, 30), tokens(5, 25), tokens(6, 11));
        let mut cache = model.cache(128, cache_type).unwrap();
        let sequence = cache.add_sequence(0);
        append(&model, &mut cache, sequence, &history);
        append(&model, &mut cache, sequence, &wrong);
        cache.truncate(sequence, 1000).unwrap();
        assert_eq!(cache.length(sequence).unwrap(), 55);
        cache.truncate(sequence, 17).unwrap();
        let got = append(&model, &mut cache, sequence, &right);
        let whole = [&history[..17], &right].concat();
        assert_same_bits(&got, &alone(&model, &whole, 11, cache_type), "behind 17");
        cache.truncate(sequence, 0).unwrap();
        let got = append(&model, &mut cache, sequence, &right);
        assert_same_bits(&got, &alone(&model, &right, 11, cache_type), "from the start");
    }
}

#[test]
fn sequences_in_one_batch_are_each_as_if_alone() {
    for (model, cache_type) in models_and_types() {
        let histories = [tokens(7, 5), tokens(8, 40), tokens(9, 0)];
        // A chunk of a prompt, one token, and a new sequence, all in one forward pass.
        let next = [tokens(10, 13), tokens(11, 1), tokens(12, 6)];
        let mut cache = model.cache(128, cache_type).unwrap();
        let ids = [(); 3].map(|()| cache.add_sequence(0));
        for (history, &id) in histories.iter().zip(&ids).take(2) {
            append(&model, &mut cache, id, history);
        }
        let batch: Vec<Row> = (0..3).flat_map(|i| rows(&next[i], ids[i], histories[i].len())).collect();
        let got = forward(&model, &mut cache, &batch).unwrap();
        let want: Vec<f32> = (0..3)
            .flat_map(|i| alone(&model, &[&histories[i][..], &next[i]].concat(), next[i].len(), cache_type))
            .collect();
        assert_same_bits(&got, &want, "three sequences");
        // And again, in another order, one token each.
        let second = [tokens(13, 1), tokens(14, 1), tokens(15, 1)];
        let order = [2, 0, 1];
        let batch: Vec<Row> = order
            .iter()
            .flat_map(|&i| rows(&second[i], ids[i], histories[i].len() + next[i].len()))
            .collect();
        let got = forward(&model, &mut cache, &batch).unwrap();
        let whole = |i: usize| [&histories[i][..], &next[i], &second[i]].concat();
        let want: Vec<f32> = order.iter().flat_map(|&i| alone(&model, &whole(i), 1, cache_type)).collect();
        assert_same_bits(&got, &want, "one token each");
        // Only some rows' logits are wanted.
        let batch: Vec<Row> =
            (0..3).flat_map(|i| rows(&next[i], ids[i], cache.length(ids[i]).unwrap())).collect();
        let mut again = KvCache::new([2, 2, 64], 128, cache_type, &model.device()).unwrap();
        let again_ids = [(); 3].map(|()| again.add_sequence(0));
        for (i, &id) in again_ids.iter().enumerate() {
            append(&model, &mut again, id, &whole(i));
        }
        let rows: Vec<Row> = (0..3).flat_map(|i| rows(&next[i], again_ids[i], whole(i).len())).collect();
        let all = forward(&model, &mut cache, &batch).unwrap();
        let some: Vec<f32> =
            model.forward(&rows, &[19, 3], &mut again).unwrap().into_data().try_to_vec().unwrap();
        let of = |row: usize| all[row * VOCABULARY..(row + 1) * VOCABULARY].to_vec();
        assert_same_bits(&some, &[of(19), of(3)].concat(), "wanted rows");
    }
}

#[test]
fn growing_room_changes_nothing() {
    for (model, cache_type) in models_and_types() {
        let ids = tokens(16, 300);
        let want = alone(&model, &ids, 300, cache_type);
        let mut cache = model.cache(400, cache_type).unwrap();
        let sequence = cache.add_sequence(0);
        let first = cache.bytes();
        let mut got = Vec::new();
        for chunk in ids.chunks(37) {
            got.extend(append(&model, &mut cache, sequence, chunk));
        }
        assert!(cache.bytes() > first && cache.bytes() <= 400 * 2 * 2 * 2 * cache_type.row_bytes(64));
        assert_same_bits(&got, &want, &format!("{cache_type:?}"));
    }
}

#[test]
fn an_int8_cache_takes_a_quarter_and_a_scale() {
    for model in models() {
        let bytes = |cache_type: CacheType| {
            let mut cache = model.cache(256, cache_type).unwrap();
            cache.add_sequence(256);
            cache.bytes()
        };
        // Heads of 64: 64 codes and a scale for 64 floats.
        assert_eq!(bytes(CacheType::Int8) * 256, bytes(CacheType::F32) * 68);
    }
}

#[test]
fn ndarray_refuses_f16_and_flex_takes_it() {
    for model in models() {
        let cache = model.cache(8, CacheType::F16);
        if format!("{:?}", model.device()).contains("NdArray") {
            assert!(matches!(cache, Err(CacheError::Type { .. })));
        } else {
            assert_eq!(cache.unwrap().cache_type(), CacheType::F16);
        }
    }
}

#[test]
fn a_full_context_is_an_error_that_changes_nothing() {
    for model in models() {
        let ids = tokens(17, 20);
        let mut cache = model.cache(16, CacheType::F32).unwrap();
        let sequence = cache.add_sequence(100);
        append(&model, &mut cache, sequence, &ids[..10]);
        let error = forward(&model, &mut cache, &rows(&ids[10..], sequence, 10)).unwrap_err();
        assert!(
            matches!(error, ForwardError::Cache(CacheError::Full { position: 19, capacity: 16 })),
            "{error}"
        );
        assert!(error.to_string().contains("context of 16"), "{error}");
        assert_eq!(cache.length(sequence).unwrap(), 10);
        let got = append(&model, &mut cache, sequence, &ids[10..16]);
        assert_same_bits(&got, &alone(&model, &ids[..16], 6, CacheType::F32), "what still fits");

        // Generation ends there.
        let sequence = cache.add_sequence(0);
        let options = GenerateOptions { max_new_tokens: 100, ..GenerateOptions::default() };
        let generation =
            generate::generate(&model, &ids[..10], sequence, &mut cache, &options, &mut |_, _| {
                std::ops::ControlFlow::Continue(())
            });
        let generation = generation.unwrap();
        assert_eq!((generation.finish, generation.tokens.len()), (Finish::Context, 7));

        // No cache is larger than the model's own context.
        assert_eq!(model.cache(1 << 40, CacheType::F32).unwrap().capacity(), 512);
    }
}

#[test]
fn rows_that_do_not_continue_their_sequences_are_refused() {
    let model = models().remove(0);
    let mut cache = model.cache(64, CacheType::F32).unwrap();
    let (a, b) = (cache.add_sequence(0), cache.add_sequence(0));
    let ids = tokens(18, 8);
    append(&model, &mut cache, a, &ids[..3]);
    let mut refuse = |rows: &[Row], what: &str| {
        let error = forward(&model, &mut cache, rows).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!((cache.length(a).unwrap(), cache.length(b).unwrap()), (3, 0), "{error}");
    };
    let row = |token: u32, sequence: SequenceId, position: usize| Row { token, sequence, position };
    refuse(&[row(1, a, 0)], "row 0: position 0, the sequence continues at 3");
    refuse(&[row(1, a, 4)], "row 0: position 4, the sequence continues at 3");
    refuse(&[row(1, a, 3), row(1, a, 5)], "row 1: position 5, the sequence continues at 4");
    refuse(&[row(1, b, 0), row(1, b, 0)], "row 1: position 0, the sequence continues at 1");
    refuse(&[row(1, a, 3), row(1, b, 0), row(1, a, 4)], "row 2: rows of one sequence must be consecutive");
    refuse(&[row(320, a, 3)], "token 320 is not in the model's vocabulary of 320");
    refuse(&[row(u32::MAX, a, 3)], "not in the model's vocabulary");
    refuse(&[], "at least one row");
    // What was refused has left no trace.
    let got = append(&model, &mut cache, a, &ids[3..]);
    assert_same_bits(&got, &alone(&model, &ids, 5, CacheType::F32), "after refusals");
    cache.remove(b).unwrap();
    assert!(matches!(cache.length(b), Err(CacheError::Unknown(1))));
    assert!(matches!(cache.fork(b), Err(CacheError::Unknown(1))));
    assert!(matches!(cache.truncate(b, 0), Err(CacheError::Unknown(1))));
    assert!(matches!(cache.remove(b), Err(CacheError::Unknown(1))));
    let error = forward(&model, &mut cache, &[row(1, b, 0)]).unwrap_err();
    assert!(error.to_string().contains("no sequence 1"), "{error}");
    // Its place is free again.
    assert_eq!(cache.add_sequence(0), b);
}

/// In a model of one layer, keys and values are those of single tokens, and RoPE sees differences of positions alone:
/// what a sliding window gives is what the tokens that it keeps give by themselves.
#[test]
fn a_sliding_window_goes_on_with_what_it_keeps() {
    setup();
    let config = ModelConfig {
        hidden_size: 48,
        intermediate_size: 64,
        n_layers: 1,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 12,
        vocab_size: VOCABULARY,
        context_length: 16,
        ..bitnet_burn_engine::synth::shape("tiny").unwrap()
    };
    let mut random = Random(9);
    let float = BitNet::trainable::<()>(&config, None, &Device::flex().autodiff(), &mut |_, shape| {
        Ok(random.floats(shape.iter().product()).iter().map(|v| v * 0.3).collect())
    });
    let float = float.unwrap().valid();
    let prompt = tokens(10, 60);
    for (cache_type, tolerance) in [(CacheType::F32, 1e-4), (CacheType::F16, 1e-2), (CacheType::Int8, 0.1)] {
        for chunk in [1, 3, 16] {
            let mut cache = float.cache(16, cache_type).unwrap().sliding();
            let sequence = cache.add_sequence(0);
            for part in prompt.chunks(chunk) {
                let got = append(&float, &mut cache, sequence, part);
                let (kept, length) = (cache.kept(sequence).unwrap(), cache.length(sequence).unwrap());
                assert!(kept <= 16 && kept >= part.len() && (length <= 16) == (kept == length));
                assert!(cache.has_room(sequence).unwrap());
                let want = alone(&float, &prompt[length - kept..length], part.len(), cache_type);
                let difference = max_difference(&got, &want);
                assert!(difference < tolerance, "{cache_type:?}, {chunk} at {length}: {difference:e}");
            }
            assert_eq!(cache.length(sequence).unwrap(), 60);
            // What is forgotten can't come back.
            let error = cache.truncate(sequence, 3).unwrap_err();
            assert!(matches!(error, CacheError::Forgotten { length: 3, .. }), "{error}");
            cache.truncate(sequence, 58).unwrap();
            assert_eq!(cache.length(sequence).unwrap(), 58);
            // More rows at once than there is room for at all.
            let error = forward(&float, &mut cache, &rows(&[1; 17], sequence, 58)).unwrap_err();
            assert!(matches!(error, ForwardError::Cache(CacheError::Full { capacity: 16, .. })), "{error}");
            // A prompt goes through in as many rows as there is room for.
            generate::prefill(&float, &prompt, sequence, &mut cache, 256).unwrap();
            assert_eq!(cache.length(sequence).unwrap(), 58 + 60);
            cache.remove(sequence).unwrap();
            assert!(matches!(cache.has_room(sequence), Err(CacheError::Unknown(_))));
        }
    }
}

#[test]
fn generation_goes_on_in_a_sliding_window() {
    for (model, cache_type) in models_and_types() {
        let options = GenerateOptions { max_new_tokens: 80, chunk: 8, ..GenerateOptions::default() };
        let run = |mut cache: KvCache| {
            let sequence = cache.add_sequence(0);
            let go_on = &mut |_: u32, _: &[f32]| std::ops::ControlFlow::Continue(());
            generate::generate(&model, &tokens(4, 20), sequence, &mut cache, &options, go_on).unwrap()
        };
        let ending = run(model.cache(32, cache_type).unwrap());
        assert_eq!((ending.finish, ending.tokens.len()), (Finish::Context, 13));
        let sliding = run(model.cache(32, cache_type).unwrap().sliding());
        assert_eq!((sliding.finish, sliding.tokens.len()), (Finish::Length, 80));
        // Up to where the context is full, nothing differs.
        assert_eq!(sliding.tokens[..13], ending.tokens);
    }
}
