//! Many prompts at once, from plain threads and from tokio tasks, over one scheduler. Each answer is the one that its prompt
//! has alone.
//!
//! ```text
//! cargo run --release --example many_requests
//! ```

use std::sync::Arc;

use anyhow::Context as _;
use bitnet_burn_engine::schedule::{Event, Request, Scheduler, SchedulerOptions};
use bitnet_burn_engine::{Engine, GenerateOptions};
use tokio::sync::mpsc::unbounded_channel;

/// The tokens of an answer, as a tokio task gets them.
async fn awaited(scheduler: &Scheduler, request: Request) -> anyhow::Result<Vec<u32>> {
    let (sender, mut events) = unbounded_channel();
    // The function runs on the scheduler's thread, so it only passes the event on.
    let ticket = scheduler.submit(request, move |event| drop(sender.send(event)))?;
    let mut tokens = Vec::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Token { token, .. } => tokens.push(token),
            Event::Finished { .. } => return Ok(tokens),
            Event::Failed(error) => return Err(error.into()),
        }
    }
    // Nothing more can come: the request need not go on.
    ticket.cancel();
    anyhow::bail!("the scheduler ended")
}

fn main() -> anyhow::Result<()> {
    let engine = Engine::options().open_built_in()?;
    let scheduler = Arc::new(Scheduler::start(&engine, SchedulerOptions::of(&engine))?);
    let prompts = ["There was", "Once there was a fox named Mo.", "The owl", "One day"];
    let request = |prompt: &str| -> anyhow::Result<Request> {
        let options = GenerateOptions { max_new_tokens: 32, ..engine.generate_options() };
        Ok(Request::new(engine.encode(prompt, true)?, options))
    };

    // Alone, one after the other.
    let mut alone = Vec::new();
    for prompt in prompts {
        let mut session = engine.session()?;
        let options = request(prompt)?.options;
        let mut text = session.generate(prompt, &options)?;
        text.by_ref().try_for_each(|piece| piece.map(drop))?;
        alone.push(text.finish().generation.tokens);
    }

    // A whole batch, from this thread.
    let batch = scheduler
        .generate_batch(prompts.iter().map(|prompt| request(prompt)).collect::<Result<Vec<_>, _>>()?);
    for ((prompt, answer), alone) in prompts.iter().zip(batch).zip(&alone) {
        let answer = answer?;
        println!("{prompt}{}\n", answer.text);
        anyhow::ensure!(answer.generation.tokens == *alone, "another answer than alone");
    }

    // Tasks that await their tokens.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build()?;
    let mut tasks = Vec::new();
    for prompt in prompts {
        let (scheduler, request) = (scheduler.clone(), request(prompt)?);
        tasks.push(runtime.spawn(async move { awaited(&scheduler, request).await }));
    }
    for (task, alone) in tasks.into_iter().zip(&alone) {
        let tokens = runtime.block_on(task).context("a task panicked")??;
        anyhow::ensure!(tokens == *alone, "another answer than alone");
    }
    println!("{:?}", scheduler.stats());
    Ok(())
}

#[test]
fn all_answers_are_those_of_prompts_alone() {
    main().unwrap();
}
