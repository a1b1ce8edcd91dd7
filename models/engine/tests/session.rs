//! Sessions: what is kept in the cache changes nothing of what comes out.
#![cfg(feature = "default-model")]

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll, Waker};

use bitnet_burn_engine::chat::{ChatTemplate, Message};
use bitnet_burn_engine::generate::{Finish, Generation, Step};
use bitnet_burn_engine::synth::{self, SynthOptions, SynthScales};
use bitnet_burn_engine::{Engine, EngineError, GenerateOptions, Session};
use bitnet_burn_formats::DenseFormat;

fn engine() -> Engine {
    Engine::options().open_built_in().unwrap()
}

fn options(engine: &Engine, max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens, ..engine.generate_options() }
}

/// The text, its tokens, and how many tokens of the prompt the cache had.
fn answer(session: &mut Session, prompt: &str, options: &GenerateOptions) -> (String, Vec<u32>, usize) {
    let mut text = session.generate(prompt, options).unwrap();
    let shown: String = text.by_ref().map(Result::unwrap).collect();
    let generation = text.finish().generation;
    (shown, generation.tokens, generation.cached_tokens)
}

/// A future of a model in host memory never waits.
fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits"),
    }
}

#[test]
fn a_prompt_that_continues_another_computes_the_rest_alone() {
    let engine = engine();
    let options = options(&engine, 12);
    let mut session = engine.session().unwrap();
    let (first, _, cached) = answer(&mut session, "There was a", &options);
    assert_eq!(cached, 0);
    let longer = format!("There was a{first} Then");
    let (continued, tokens, cached) = answer(&mut session, &longer, &options);
    // All of the first prompt, at least; a text may be cut into other tokens than those that were generated.
    assert!(cached >= engine.encode("There was a", true).unwrap().len(), "{cached}");
    let (fresh, expected, none) = answer(&mut engine.session().unwrap(), &longer, &options);
    assert_eq!((continued, tokens, 0), (fresh, expected, none));
    // The same prompt again: its last token alone is computed.
    let prompt = engine.encode(&longer, true).unwrap();
    let (_, _, cached) = answer(&mut session, &longer, &options);
    assert_eq!(cached, prompt.len() - 1);
    // Another one: what both begin with is kept.
    let (other, _, _) = answer(&mut session, "Once there was", &options);
    assert_eq!(other, answer(&mut engine.session().unwrap(), "Once there was", &options).0);
}

#[test]
fn text_tokens_and_awaited_text_are_the_same() {
    let engine = engine();
    let options = options(&engine, 20);
    let (text, tokens, _) = answer(&mut engine.session().unwrap(), "There was", &options);
    let prompt = engine.encode("There was", true).unwrap();

    let mut session = engine.session().unwrap();
    let mut generator = session.generate_tokens(&prompt, &options).unwrap();
    let mut drawn = Vec::new();
    loop {
        match ready(generator.step_async()).unwrap() {
            Step::Prompt { done, all } => assert!(done < all),
            Step::Token(token) => drawn.push(token),
            Step::Finished(finish) => break assert_eq!(finish, Finish::Length),
        }
    }
    assert_eq!(drawn, tokens);

    let mut session = engine.session().unwrap();
    let mut awaited = session.generate("There was", &options).unwrap();
    let mut pieces = String::new();
    while let Some(piece) = ready(awaited.next_async()) {
        pieces.push_str(&piece.unwrap());
    }
    assert_eq!(pieces, text);
    assert_eq!(awaited.finish().generation.tokens, tokens);
}

#[test]
fn a_prompt_goes_through_in_chunks_and_a_cancelled_answer_leaves_a_good_cache() {
    let engine = Engine::options().rows(2).open_built_in().unwrap();
    let options = options(&engine, 16);
    let prompt = "There was a cat named Pepper who lived";
    let expected = answer(&mut engine.session().unwrap(), prompt, &options);
    let mut session = engine.session().unwrap();
    let mut text = session.generate(prompt, &options).unwrap();
    text.next().unwrap().unwrap();
    text.cancel();
    assert!(text.next().is_none());
    let cancelled = text.finish();
    assert_eq!(cancelled.generation.finish, Finish::Cancelled);
    assert!(cancelled.generation.tokens.len() < 16);
    assert_eq!(cancelled.report.generated_tokens, cancelled.generation.tokens.len());
    // Dropped without an end, too.
    drop(session.generate(prompt, &options).unwrap());
    let again = answer(&mut session, prompt, &options);
    assert_eq!((again.0, again.1), (expected.0, expected.1));
}

#[test]
fn a_chat_keeps_what_was_said() {
    let engine = engine();
    let options = options(&engine, 6);
    let template =
        || ChatTemplate::new("{% for m in messages %}{{ m.content }}.{% endfor %}{{ ' Then' }}").unwrap();
    let mut session = engine.session().unwrap().with_template(template());
    let mut text = session.chat("There was a cat", &options).unwrap();
    let first: String = text.by_ref().map(Result::unwrap).collect();
    assert_eq!(text.finish().generation.cached_tokens, 0);
    session.push(Message::new("assistant", first));
    let mut text = session.chat("And a dog", &options).unwrap();
    let second: String = text.by_ref().map(Result::unwrap).collect();
    assert!(text.finish().generation.cached_tokens > 0);
    let roles: Vec<&str> = session.messages().iter().map(|message| &*message.role).collect();
    assert_eq!(roles, ["user", "assistant", "user"]);

    let mut alone = engine.session().unwrap().with_template(template());
    session.messages()[..2].iter().for_each(|message| alone.push(message.clone()));
    let whole: String = alone.chat("And a dog", &options).unwrap().map(Result::unwrap).collect();
    assert_eq!(whole, second);

    // A template that refuses leaves the chat as it was.
    let refusing = ChatTemplate::new("{{ raise_exception('no') }}").unwrap();
    let mut session = engine.session().unwrap().with_template(refusing);
    assert!(matches!(session.chat("Hello", &options), Err(EngineError::Chat(_))));
    assert!(session.messages().is_empty());
}

/// A model of random weights. Its tokenizer spells every text in bytes; most of what it generates is longer tokens.
fn random() -> Engine {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let config = synth::shape("tiny").unwrap();
    let (scales, embedding) = (SynthScales::Tensor, DenseFormat::Q6_K);
    synth::write(&path, &SynthOptions { config, scales, embedding, seed: 8 }, &|_, _| {}).unwrap();
    Engine::options().open(path).unwrap()
}

/// One turn: the answer is pushed as this makes it.
fn turn(
    session: &mut Session,
    message: &str,
    options: &GenerateOptions,
    heard: impl Fn(String) -> String,
) -> Generation {
    let mut text = session.chat(message, options).unwrap();
    let content: String = text.by_ref().map(Result::unwrap).collect();
    let generation = text.finish().generation;
    session.push(Message::new("assistant", heard(content)));
    generation
}

#[test]
fn a_chat_keeps_the_tokens_that_were_generated() {
    let engine = random();
    let options = options(&engine, 20);
    let plain = engine.chat_template().unwrap();
    let trimming = "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}: {{ m.content | trim }}<|eot_id|>\
                    {% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}";
    for template in [plain, ChatTemplate::new(trimming).unwrap()] {
        let mut session = engine.session().unwrap().with_template(template);
        let first = turn(&mut session, "Hello", &options, |answer| answer);
        let content = session.messages()[1].content.clone();
        assert!(content.starts_with(' ') && engine.encode(&content, false).unwrap() != first.tokens);

        // New are the last token, which was drawn and not computed, and the text behind the answer.
        let second = turn(&mut session, "Again", &options, |answer| answer);
        assert_eq!(second.cached_tokens, first.prompt_tokens + 20 - 1);
        let mut tokens = engine.encode("<|begin_of_text|>User: Hello<|eot_id|>Assistant: ", false).unwrap();
        tokens.extend(&first.tokens);
        tokens.extend(engine.encode("<|eot_id|>User: Again<|eot_id|>Assistant: ", false).unwrap());
        let mut fresh = engine.session().unwrap();
        let mut generator = fresh.generate_tokens(&tokens, &options).unwrap();
        while !matches!(generator.step().unwrap(), Step::Finished(_)) {}
        assert_eq!(generator.generation().tokens, second.tokens);

        // A turn is taken back: another message behind the first answer, which is still there.
        session.replace(session.messages()[..2].to_vec());
        let other = turn(&mut session, "Away", &options, |answer| answer);
        assert_eq!(other.cached_tokens, first.prompt_tokens + 20 + "<User: A".len());
        assert_eq!(session.messages().len(), 4);
    }
}

#[test]
fn an_answer_that_was_changed_is_computed_as_it_is_now() {
    let engine = random();
    let options = options(&engine, 20);
    for heard in [|answer: String| answer + "!", |_| "No".to_owned(), |_| String::new()] {
        let mut session = engine.session().unwrap();
        let first = turn(&mut session, "Hello", &options, heard);
        let second = turn(&mut session, "Again", &options, heard);
        assert!(second.cached_tokens >= first.prompt_tokens, "the prompt is kept");
        let text = session.messages()[1].content.clone();
        let expected = format!(
            "<|begin_of_text|>User: Hello<|eot_id|>Assistant: {text}<|eot_id|>User: Again<|eot_id|>Assistant: "
        );
        let mut said = engine.session().unwrap();
        session.messages()[..2].iter().for_each(|message| said.push(message.clone()));
        let prompt = said.chat_prompt("Again").unwrap();
        assert_eq!(prompt, engine.encode(&expected, false).unwrap());
        if text.ends_with('!') {
            // The tokens of the answer are kept, and spell less.
            assert_eq!(second.cached_tokens, first.prompt_tokens + 20 - 1);
        } else {
            let mut alone = said.generate_tokens(&prompt, &options).unwrap();
            while !matches!(alone.step().unwrap(), Step::Finished(_)) {}
            assert_eq!(alone.generation().tokens, second.tokens);
        }
    }
}

#[test]
fn a_message_that_does_not_fit_is_not_added() {
    let engine = Engine::options().context(4).open_built_in().unwrap();
    let template = ChatTemplate::new("{{ messages[-1].content }}").unwrap();
    let mut session = engine.session().unwrap().with_template(template);
    let options = options(&engine, 2);
    let error = session.chat("There was a cat named Pepper", &options).unwrap_err();
    assert!(matches!(error, EngineError::PromptTooLong { context: 4, .. }), "{error}");
    assert!(session.messages().is_empty());
    assert_eq!(turn(&mut session, "There", &options, |answer| answer).tokens.len(), 2);
}

#[test]
fn a_flag_ends_an_answer_before_the_next_pass() {
    let engine = Engine::options().rows(2).open_built_in().unwrap();
    let options = options(&engine, 16);
    let prompt = "There was a cat named Pepper who lived";
    let flag = Arc::new(AtomicBool::new(true));
    let mut session = engine.session().unwrap();
    let mut text = session.generate(prompt, &options).unwrap().cancel_when(flag.clone());
    assert!(text.next().is_none() && ready(text.next_async()).is_none());
    let generation = text.finish().generation;
    assert_eq!((generation.finish, generation.tokens.len()), (Finish::Cancelled, 0));
    // Nothing of the prompt was computed.
    assert_eq!(answer(&mut session, prompt, &options).2, 0);
}

#[test]
fn what_can_not_be_generated_is_an_error() {
    let engine = Engine::options().context(4).open_built_in().unwrap();
    let options = options(&engine, 4);
    let mut session = engine.session().unwrap();
    let error = session.generate("There was a cat named Pepper", &options).unwrap_err();
    assert!(matches!(error, EngineError::PromptTooLong { context: 4, .. }), "{error}");
    assert!(session.generate_tokens(&[], &options).is_err());
    // The model's own context bounds what can be asked for.
    let error = Engine::options().context(1 << 30).open_built_in().unwrap_err();
    assert!(matches!(error, EngineError::Context { .. }), "{error}");
    let ids = Engine::options().without_tokenizer().open_built_in().unwrap();
    assert!(matches!(ids.session().unwrap().generate("Hello", &options), Err(EngineError::NoTokenizer)));
    let options = GenerateOptions { stop_tokens: Vec::new(), ..options };
    let mut session = ids.session().unwrap();
    let mut tokens = session.generate_tokens(&[1], &options).unwrap();
    while !matches!(tokens.step().unwrap(), Step::Finished(_)) {}
    assert_eq!(tokens.generation().tokens.len(), 4);
}
