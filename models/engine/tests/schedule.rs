//! Many requests at once: an answer is the same as alone, whatever else is computed.
#![cfg(feature = "default-model")]

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use bitnet_burn_engine::generate::{Finish, GenerateError};
use bitnet_burn_engine::schedule::{
    BatchError, Completion, Event, Request, RequestError, Scheduler, SchedulerOptions, SubmitError, Ticket,
};
use bitnet_burn_engine::{Engine, EngineError, GenerateOptions};

fn engine() -> Engine {
    Engine::options().open_built_in().unwrap()
}

fn scheduler(engine: &Engine, edit: impl FnOnce(&mut SchedulerOptions)) -> Scheduler {
    let mut options = SchedulerOptions::of(engine);
    edit(&mut options);
    Scheduler::start(engine, options).unwrap()
}

fn request(engine: &Engine, prompt: &str, edit: impl FnOnce(&mut GenerateOptions)) -> Request {
    let mut options = GenerateOptions { max_new_tokens: 40, ..engine.generate_options() };
    edit(&mut options);
    Request::new(engine.encode(prompt, true).unwrap(), options)
}

/// Greedy and sampled answers, short and long ones, with penalties and stop texts.
fn requests(engine: &Engine) -> Vec<Request> {
    let prompts = [
        "There was",
        "Once there was a fox named Mo. Mo had a red ball.",
        "The dog ran to the tree. The dog ran to the tree. The dog ran to",
        "A",
        "Once there was a fox named Mo. Mo had a blue kite, and",
    ];
    let mut all = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        for temperature in [0.0, 0.8] {
            all.push(request(engine, prompt, |options| {
                options.sampling.temperature = temperature;
                options.sampling.top_p = 0.9;
                options.sampling.seed = i as u64;
                options.max_new_tokens = 10 + 13 * i;
                if i == 1 {
                    options.sampling.repetition_penalty = 1.2;
                    options.sampling.presence_penalty = 0.3;
                    options.sampling.frequency_penalty = 0.2;
                    options.sampling.logit_bias = [(97, 1.5)].into();
                }
                if i == 4 {
                    options.stop_strings = vec![" the".into()];
                }
            }));
        }
    }
    all
}

/// What a session gives: text, tokens and why they ended.
fn alone(engine: &Engine, request: &Request) -> (String, Vec<u32>, Finish) {
    let mut session = engine.session().unwrap();
    let mut text = session.generate_text(&request.prompt, &request.options).unwrap();
    let shown = text.by_ref().map(Result::unwrap).collect();
    let generation = text.finish().generation;
    (shown, generation.tokens, generation.finish)
}

fn parts(completion: Completion) -> (String, Vec<u32>, Finish) {
    assert!(!completion.in_doubt);
    (completion.text, completion.generation.tokens, completion.generation.finish)
}

#[test]
fn an_answer_depends_on_its_request_alone() {
    let engine = engine();
    let requests = requests(&engine);
    let expected: Vec<_> = requests.iter().map(|request| alone(&engine, request)).collect();
    // Few rows a step: prompts are cut. Few requests at once: most wait. No guesses, and many.
    for (rows, parallel, draft) in [(256, 16, 8), (3, 16, 0), (1, 2, 4), (7, 1, 8), (64, 5, 2)] {
        let scheduler = scheduler(&engine, |options| {
            (options.rows, options.parallel, options.draft) = (rows, parallel, draft);
        });
        for round in 0..2 {
            // In the second round, the cache has all prompts.
            let answers = scheduler.generate_batch(requests.clone());
            for (i, (answer, expected)) in answers.into_iter().zip(&expected).enumerate() {
                assert_eq!(parts(answer.unwrap()), *expected, "{rows} {parallel} {draft}: {round}, {i}");
            }
        }
        let stats = scheduler.stats();
        assert_eq!((stats.finished, stats.failed, stats.waiting), (20, 0, 0));
        assert!(stats.reused_tokens > 0 && stats.reused_prompts >= 8, "{stats:?}");
        let tokens: usize = expected.iter().map(|(_, tokens, _)| tokens.len()).sum();
        assert_eq!(stats.generated_tokens, 2 * tokens as u64);
    }
}

#[test]
fn a_prompt_that_begins_like_another_is_computed_from_there() {
    let engine = engine();
    let scheduler = scheduler(&engine, |_| ());
    let system = "Once there was a fox named Mo. Mo had a red ball and a blue kite, and Mo liked the wind. ";
    let first = request(&engine, system, |_| ());
    let tokens = first.prompt.len();
    let one = scheduler.generate(first.clone()).unwrap();
    assert_eq!(one.generation.cached_tokens, 0);
    // The same again: its last token alone is computed. Another end: the common beginning is not.
    let again = scheduler.generate(first.clone()).unwrap();
    assert_eq!(again.generation.cached_tokens, tokens - 1);
    assert_eq!(parts(again), parts(one));
    let other = request(&engine, &format!("{system}One day"), |_| ());
    let cached = scheduler.generate(other.clone()).unwrap();
    assert!(cached.generation.cached_tokens + 2 >= tokens, "{}", cached.generation.cached_tokens);
    assert_eq!(parts(cached), alone(&engine, &other));
    // Several at once with a new beginning: one computes it, the others start from there.
    let before = scheduler.stats().prompt_tokens;
    let text = "The bird sang a song in the tall tree by the lake, and all of the children came to hear it. ";
    let many: Vec<_> = (0..4)
        .map(|seed| {
            request(&engine, text, |options| {
                options.sampling.temperature = 1.0;
                options.sampling.seed = seed;
            })
        })
        .collect();
    let length = many[0].prompt.len() as u64;
    let expected: Vec<_> = many.iter().map(|request| alone(&engine, request)).collect();
    let answers = scheduler.generate_batch(many);
    for (answer, expected) in answers.into_iter().zip(expected) {
        assert_eq!(parts(answer.unwrap()), expected);
    }
    assert!(scheduler.stats().prompt_tokens - before < 2 * length, "{:?}", scheduler.stats());
}

#[test]
fn what_is_kept_gives_way_to_what_runs() {
    let engine = engine();
    let bytes = engine.sequence_bytes(200);
    // Room for two requests.
    let scheduler = scheduler(&engine, |options| options.cache_bytes = Some(2 * bytes));
    let all: Vec<_> = (0..6)
        .map(|i| request(&engine, &format!("{i} There was"), |options| options.max_new_tokens = 100))
        .collect();
    let expected: Vec<_> = all.iter().map(|request| alone(&engine, request)).collect();
    for (answer, expected) in scheduler.generate_batch(all).into_iter().zip(expected) {
        assert_eq!(parts(answer.unwrap()), expected);
        assert!(scheduler.stats().cache_bytes <= 2 * bytes);
    }
    // More than there is, even alone.
    let small = self::scheduler(&engine, |options| options.cache_bytes = Some(engine.sequence_bytes(1) / 2));
    let refused = small.generate(request(&engine, "There", |_| ()));
    assert!(matches!(refused, Err(BatchError::Submit(SubmitError::TooLarge { .. }))), "{refused:?}");
}

fn submit(scheduler: &Scheduler, request: Request) -> Result<(Ticket, Receiver<Event>), SubmitError> {
    let (sender, events) = channel();
    let ticket = scheduler.submit(request, move |event| drop(sender.send(event)))?;
    Ok((ticket, events))
}

fn end(events: &Receiver<Event>) -> Event {
    events.iter().find(|event| !matches!(event, Event::Token { .. })).expect("a last event")
}

#[test]
fn requests_end_when_they_are_cancelled_or_late_or_the_scheduler_ends() {
    let engine = engine();
    let scheduler = scheduler(&engine, |options| options.parallel = 1);
    let long = request(&engine, "There was", |options| {
        options.max_new_tokens = usize::MAX;
        options.stop_tokens = Vec::new();
    });
    let (running, of_running) = submit(&scheduler, long.clone()).unwrap();
    let first = of_running.recv().unwrap();
    assert!(matches!(first, Event::Token { .. }), "{first:?}");
    // They wait for the first one, which has all of the time in the world.
    let (waiting, of_waiting) = submit(&scheduler, long.clone()).unwrap();
    waiting.cancel();
    let late = Request { deadline: Some(Instant::now()), ..long.clone() };
    let (_, of_late) = submit(&scheduler, late).unwrap();
    let event = end(&of_waiting);
    assert!(matches!(&event, Event::Finished { generation, .. } if generation.finish == Finish::Cancelled));
    let event = end(&of_late);
    assert!(matches!(event, Event::Failed(RequestError::Deadline { tokens: 0 })), "{event:?}");
    running.cancel();
    let event = end(&of_running);
    assert!(matches!(&event, Event::Finished { generation, .. }
        if matches!(generation.finish, Finish::Cancelled | Finish::Context)));
    // One that is late while it runs.
    let soon = Request { deadline: Some(Instant::now() + Duration::from_millis(5)), ..long.clone() };
    let (_, of_soon) = submit(&scheduler, soon).unwrap();
    let event = end(&of_soon);
    assert!(
        matches!(event, Event::Failed(RequestError::Deadline { .. }))
            || matches!(&event, Event::Finished { generation, .. } if generation.finish == Finish::Context),
        "{event:?}"
    );
    let (_, of_last) = submit(&scheduler, long).unwrap();
    drop(scheduler);
    let event = end(&of_last);
    assert!(matches!(event, Event::Failed(RequestError::Stopped) | Event::Finished { .. }), "{event:?}");
}

#[test]
fn what_can_not_be_computed_is_refused_at_once() {
    let engine = engine();
    let scheduler = scheduler(&engine, |options| {
        options.queue = 1;
        options.parallel = 1;
    });
    let refuse = |edit: &dyn Fn(&mut Request)| {
        let mut request = request(&engine, "There was", |_| ());
        edit(&mut request);
        submit(&scheduler, request).unwrap_err()
    };
    let error = refuse(&|request| request.prompt.clear());
    assert!(matches!(error, SubmitError::Engine(EngineError::Generate(GenerateError::EmptyPrompt))));
    let context = engine.settings().context;
    let error = refuse(&|request| request.prompt = vec![1; context + 1]);
    assert!(matches!(error, SubmitError::Engine(EngineError::PromptTooLong { .. })));
    let error = refuse(&|request| request.prompt.push(u32::MAX));
    assert!(error.to_string().contains("4294967295"), "{error}");
    let error = refuse(&|request| request.options.sampling.temperature = f32::NAN);
    assert!(error.to_string().starts_with("temperature"), "{error}");
    let error = refuse(&|request| request.options.stop_strings = vec![String::new()]);
    assert!(error.to_string().contains("stop string"), "{error}");
    // One runs, one waits, and there is no place for a third.
    let long = request(&engine, "There was", |options| {
        options.max_new_tokens = usize::MAX;
        options.stop_tokens = Vec::new();
    });
    let busy = (0..3).map(|_| submit(&scheduler, long.clone())).filter_map(Result::err).next();
    assert!(matches!(busy, Some(SubmitError::Busy { .. })), "{busy:?}");
}

#[test]
fn log_probabilities_come_with_each_token() {
    let engine = engine();
    let scheduler = scheduler(&engine, |_| ());
    let request = Request { logprobs: Some(3), ..request(&engine, "There was", |_| ()) };
    let answer = scheduler.generate(request).unwrap();
    assert_eq!(answer.logprobs.len(), answer.generation.tokens.len());
    for (token, logprobs) in answer.generation.tokens.iter().zip(&answer.logprobs) {
        // Greedy: the most likely token.
        assert_eq!(logprobs.top[0], (*token, logprobs.chosen));
        assert!(logprobs.top.len() == 3 && logprobs.chosen <= 0.0);
        assert!(logprobs.top.is_sorted_by(|a, b| a.1 >= b.1));
    }
}
