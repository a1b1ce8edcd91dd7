//! Tokens that are guessed ahead and checked: they are those of the run without guesses, bit for bit.
#![cfg(feature = "default-model")]

use bitnet_burn_engine::generate::{Finish, Generation};
use bitnet_burn_engine::load::HeadMode;
use bitnet_burn_engine::schedule::{Request, Scheduler, SchedulerOptions};
use bitnet_burn_engine::speculate::Drafts;
use bitnet_burn_engine::synth::{self, SynthOptions, SynthScales};
use bitnet_burn_engine::{Engine, EngineError, EngineOptions, GenerateOptions, Session};
use bitnet_burn_formats::DenseFormat;

fn plain() -> Engine {
    Engine::options().open_built_in().unwrap()
}

/// The built-in model with a draft model: itself, as these options change it.
fn drafted(of_draft: EngineOptions) -> Engine {
    Engine::options().draft_model(of_draft.open_built_in().unwrap()).open_built_in().unwrap()
}

/// Nearly as exact: most of its guesses are right, and some are not.
fn nearly() -> EngineOptions {
    Engine::options().head(HeadMode::Requantised(DenseFormat::Q4_0))
}

/// Greedy and sampled ones with several seeds, with penalties, stop texts, and limits of all lengths.
fn requests(engine: &Engine) -> Vec<Request> {
    let prompts =
        ["There was", "Once there was a fox named Mo. Mo had a red ball, and Mo had a red ball, and", "A"];
    let mut all = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        for seed in 0..4 {
            let mut options = GenerateOptions { max_new_tokens: 60, ..engine.generate_options() };
            options.sampling.temperature = [0.0, 0.7, 1.0, 1.3][seed];
            options.sampling.seed = seed as u64;
            if seed == 2 {
                options.sampling.top_p = 0.9;
                options.sampling.repetition_penalty = 1.1;
                options.sampling.frequency_penalty = 0.2;
                options.stop_strings = vec!["ing".into()];
            }
            if i == 2 {
                options.max_new_tokens = seed;
            }
            all.push(Request::new(engine.encode(prompt, true).unwrap(), options));
        }
    }
    all
}

fn answer(session: &mut Session, request: &Request) -> (String, Generation) {
    let mut text = session.generate_text(&request.prompt, &request.options).unwrap();
    let shown = text.by_ref().map(Result::unwrap).collect();
    (shown, text.finish().generation)
}

fn expected(engine: &Engine) -> Vec<(String, Vec<u32>, Finish)> {
    let alone = |request: &Request| {
        let (text, generation) = answer(&mut engine.session().unwrap(), request);
        assert_eq!(generation.drafts, Drafts::default());
        (text, generation.tokens, generation.finish)
    };
    requests(engine).iter().map(alone).collect()
}

#[test]
fn a_session_with_a_draft_model_gives_the_same_tokens() {
    let engine = plain();
    let expected = expected(&engine);
    let mut sessions = vec![engine.session().unwrap().draft(5).unwrap()];
    for of_draft in [Engine::options(), nearly()] {
        sessions.push(drafted(of_draft).session().unwrap());
    }
    for (i, mut session) in sessions.into_iter().enumerate() {
        let mut all = Drafts::default();
        // One session for all: both caches are cut to what the next prompt has in common.
        for (request, expected) in requests(&engine).iter().zip(&expected) {
            let (text, generation) = answer(&mut session, request);
            all += generation.drafts;
            assert_eq!((text, generation.tokens, generation.finish), *expected, "{i}");
        }
        if i > 0 {
            assert!(all.model.drafted > 0, "{i}: {all:?}");
        }
        assert_eq!(i == 0, all.model.drafted == 0, "{all:?}");
    }
}

#[test]
fn a_scheduler_with_a_draft_model_gives_the_same_tokens() {
    let engine = plain();
    let expected = expected(&engine);
    for of_draft in [Engine::options(), nearly()] {
        let engine = drafted(of_draft);
        for (parallel, rows, draft) in [(16, 256, 8), (1, 256, 8), (3, 4, 2), (16, 256, 0)] {
            let options = SchedulerOptions { parallel, rows, draft, ..SchedulerOptions::of(&engine) };
            let scheduler = Scheduler::start(&engine, options).unwrap();
            let answers = scheduler.generate_batch(requests(&engine));
            for (answer, expected) in answers.into_iter().zip(&expected) {
                let answer = answer.unwrap();
                let found = (answer.text, answer.generation.tokens, answer.generation.finish);
                assert_eq!(found, *expected, "{parallel} {rows} {draft}");
            }
            let stats = scheduler.stats();
            assert_eq!(draft == 0, stats.drafts.model.drafted == 0, "{stats:?}");
            assert!(stats.drafts.model.accepted <= stats.drafts.model.drafted);
            assert_eq!(stats.failed, 0);
        }
    }
}

#[test]
fn the_same_model_guesses_every_token() {
    let engine = drafted(Engine::options());
    for request in requests(&engine).iter().filter(|request| request.options.max_new_tokens > 10) {
        let mut session = engine.session().unwrap();
        let Drafts { model, .. } = answer(&mut session, request).1.drafts;
        // (Without the random numbers of the answer, the guesses for sampled ones would be wrong now and then.)
        assert!(model.drafted > 0 && model.accepted == model.drafted, "{model:?}");
    }
}

#[test]
fn answers_of_a_form_are_the_same() {
    let (engine, other) = (plain(), drafted(nearly()));
    let mut request = requests(&engine).remove(5);
    request.options.constraint =
        Some(bitnet_burn_engine::Constraint::Regex(r"( Mo (had|liked) (a|the) [a-z]+\.){2,9}".into()));
    let one = answer(&mut engine.session().unwrap(), &request);
    let two = answer(&mut other.session().unwrap(), &request);
    assert_eq!((one.0, one.1.tokens), (two.0, two.1.tokens));
}

#[test]
fn a_full_context_ends_the_answer_at_the_same_token() {
    let mut generations = Vec::new();
    for draft in [None, Some(plain())] {
        let engine = Engine::options().context(40).draft_model(draft).open_built_in().unwrap();
        let mut request = requests(&engine).remove(1);
        request.options.max_new_tokens = 1000;
        request.options.stop_tokens.clear();
        generations.push(answer(&mut engine.session().unwrap(), &request));
    }
    assert_eq!(generations[0].1.finish, Finish::Context);
    assert_eq!(generations[0].1.tokens, generations[1].1.tokens);
    // A draft model with the smaller context stops guessing where that is full.
    let small = Engine::options().context(20);
    let engine = drafted(small);
    let request = &requests(&engine)[1];
    let (_, generation) = answer(&mut engine.session().unwrap(), request);
    assert_eq!(generation.tokens, answer(&mut plain().session().unwrap(), request).1.tokens);
    assert!(generation.drafts.model.drafted <= 20, "{:?}", generation.drafts);
}

#[test]
fn guesses_stop_where_an_answer_is_cancelled() {
    let engine = drafted(Engine::options());
    let request = &requests(&engine)[1];
    let (_, whole) = answer(&mut plain().session().unwrap(), request);
    let mut session = engine.session().unwrap();
    for tokens in [1, 3, 10, 30] {
        let mut text = session.generate_tokens(&request.prompt, &request.options).unwrap();
        while text.generation().tokens.len() < tokens {
            text.step().unwrap();
        }
        text.cancel();
        let found = text.into_generation();
        assert_eq!((&found.tokens[..], found.finish), (&whole.tokens[..tokens], Finish::Cancelled));
    }
    // The next prompt continues the last answer.
    let mut next = request.clone();
    next.prompt.extend_from_slice(&whole.tokens[..20]);
    let alone = answer(&mut plain().session().unwrap(), &next);
    let after = answer(&mut session, &next);
    assert_eq!((alone.0, alone.1.tokens), (after.0, after.1.tokens));
}

#[test]
fn another_tokenizer_is_refused_with_the_first_token_that_differs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let config = synth::shape("tiny").unwrap();
    let options = SynthOptions { config, scales: SynthScales::Tensor, embedding: DenseFormat::Q6_K, seed: 7 };
    synth::write(&path, &options, &|_, _| {}).unwrap();
    let draft = Engine::open(path).unwrap();
    let tokenizers = (plain(), draft.clone());
    let token = |engine: &Engine, id| engine.tokenizer().unwrap().token(id);
    let error = Engine::options().draft_model(draft).open_built_in().unwrap_err();
    let EngineError::DraftTokenizer { id, model, draft } = &error else { panic!("{error}") };
    assert_eq!(token(&tokenizers.0, *id).as_ref(), Some(model));
    assert_eq!(token(&tokenizers.1, *id).as_ref(), Some(draft));
    assert_ne!(model, draft);
    for before in 0..*id {
        assert_eq!(token(&tokenizers.0, before), token(&tokenizers.1, before));
    }
    assert!(error.to_string().contains(&format!("token {id} is {model:?} in the model")), "{error}");
    // Without a tokenizer nothing can be compared.
    let none = Engine::options().without_tokenizer().open_built_in().unwrap();
    let error = Engine::options().draft_model(none).open_built_in().unwrap_err();
    assert!(matches!(error, EngineError::DraftNoTokenizer { of: "draft model" }), "{error}");
}
