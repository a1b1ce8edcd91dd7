//! Many clients at once, over HTTP on loopback: no answer depends on the others, none is lost.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bitnet_burn_engine::{Engine, GenerateOptions};
use bitnet_burn_server::{ModelSource, Models, ModelsOptions, ServerOptions, serve};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use ureq::Agent;

const STREAMS: usize = 64;
const PROMPTS: [&str; 4] = [
    "There was",
    "Once there was a fox named Mo. Mo had a red ball and a blue kite, and Mo liked the wind.",
    "The dog ran. The cat ran. The dog ran. The cat ran. The dog",
    "One day",
];
const SEEDS: u64 = 8;
const TOKENS: usize = 48;

/// What a session answers.
fn alone(engine: &Engine, prompt: &str, seed: u64) -> String {
    let mut options = GenerateOptions { max_new_tokens: TOKENS, ..engine.generate_options() };
    options.sampling.seed = seed;
    // Half of the answers are greedy.
    options.sampling.temperature = if seed.is_multiple_of(2) { 0.0 } else { 0.9 };
    let mut session = engine.session().unwrap();
    session.generate(prompt, &options).unwrap().map(Result::unwrap).collect()
}

/// What the server answers, as a stream or at once.
fn ask(agent: &Agent, url: &str, prompt: &str, seed: u64, stream: bool) -> String {
    let temperature = if seed.is_multiple_of(2) { 0.0 } else { 0.9 };
    let body = json!({
        "prompt": prompt, "seed": seed, "temperature": temperature, "max_tokens": TOKENS, "stream": stream,
    });
    loop {
        let request = agent.post(url).header("Content-Type", "application/json");
        let mut response = request.send(body.to_string()).unwrap();
        if response.status().as_u16() == 429 {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        let text = response.body_mut().read_to_string().unwrap();
        assert_eq!(response.status().as_u16(), 200, "{text}");
        if !stream {
            let answer: Value = serde_json::from_str(&text).unwrap();
            return answer["choices"][0]["text"].as_str().unwrap().to_owned();
        }
        let events = text.lines().filter_map(|line| line.strip_prefix("data: "));
        assert_eq!(events.clone().next_back(), Some("[DONE]"));
        let chunks = events.filter(|event| *event != "[DONE]");
        let piece = |chunk: &str| -> String {
            let chunk: Value = serde_json::from_str(chunk).unwrap();
            chunk["choices"][0]["text"].as_str().unwrap_or_default().to_owned()
        };
        return chunks.map(piece).collect();
    }
}

/// Asks on 64 streams at once until each has had `rounds` answers or `time` has passed. Gives their number.
fn load(rounds: usize, time: Duration) -> usize {
    let engine = Engine::options().open_built_in().unwrap();
    let mut expected = BTreeMap::new();
    for prompt in PROMPTS {
        for seed in 0..SEEDS {
            expected.insert((prompt, seed), alone(&engine, prompt, seed));
        }
    }
    let source = ModelSource { name: "stories".into(), bytes: 0, open: Box::new(move || Ok(engine.clone())) };
    let models = Arc::new(Models::new(vec![source], ModelsOptions::default()).unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let url = format!("http://{}/v1/completions", listener.local_addr().unwrap());
    let server = runtime.spawn(serve(listener, models, ServerOptions::default(), async {
        // Dropping the sender stops it, too.
        drop(stopped.await);
    }));
    let agent: Agent = Agent::config_builder().http_status_as_error(false).build().into();
    let (answers, begun) = (AtomicUsize::new(0), Instant::now());
    std::thread::scope(|scope| {
        for stream in 0..STREAMS {
            let (agent, url, expected, answers) = (&agent, &url, &expected, &answers);
            scope.spawn(move || {
                for round in 0..rounds {
                    let prompt = PROMPTS[(stream + round) % PROMPTS.len()];
                    let seed = (stream / PROMPTS.len() + round) as u64 % SEEDS;
                    let answer = ask(agent, url, prompt, seed, (stream + round).is_multiple_of(3));
                    assert_eq!(answer, expected[&(prompt, seed)], "stream {stream}, round {round}");
                    answers.fetch_add(1, Ordering::Relaxed);
                    if begun.elapsed() >= time {
                        break;
                    }
                }
            });
        }
    });
    stop.send(()).unwrap();
    runtime.block_on(server).unwrap().unwrap();
    answers.into_inner()
}

#[test]
fn sixty_four_streams_get_the_answers_of_one() {
    assert_eq!(load(2, Duration::MAX), 2 * STREAMS);
}

/// `BITNET_LOAD_SECONDS=3600 cargo test --release -p bitnet-burn-server --test load -- --ignored --nocapture`
#[test]
#[ignore = "takes as long as one likes"]
fn load_for_a_long_time() {
    let seconds = std::env::var("BITNET_LOAD_SECONDS").map_or(60, |seconds| seconds.parse().unwrap());
    // Once everything has been allocated that will be.
    load(4, Duration::MAX);
    let before = memory();
    let answers = load(usize::MAX, Duration::from_secs(seconds));
    println!("{answers} answers in {seconds} s, all as expected; memory {before} to {} kB", memory());
}

/// Resident memory in kB, where the system tells it.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}
