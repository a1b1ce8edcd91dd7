//! A program that draws frames and has one thread: each frame takes what a character has said since the last one, and never
//! waits. The scheduler computes on a thread of its own.
//!
//! ```text
//! cargo run --release --example one_token_a_frame
//! ```

use std::io::Write as _;
use std::sync::mpsc::{TryRecvError, channel};
use std::time::{Duration, Instant};

use bitnet_burn_engine::schedule::{Event, Request, Scheduler, SchedulerOptions};
use bitnet_burn_engine::{Engine, GenerateOptions};

const FRAME: Duration = Duration::from_millis(16);

fn main() -> anyhow::Result<()> {
    let engine = Engine::options().open_built_in()?;
    let scheduler = Scheduler::start(&engine, SchedulerOptions::of(&engine))?;
    let options = GenerateOptions { max_new_tokens: 64, ..engine.generate_options() };
    let (sender, events) = channel();
    let request = Request::new(engine.encode("There was", true)?, options);
    // Its ticket could silence the character.
    scheduler.submit(request, move |event| drop(sender.send(event)))?;
    print!("There was");
    let (mut frames, mut longest) = (0, Duration::ZERO);
    'speech: loop {
        let frame = Instant::now();
        loop {
            match events.try_recv() {
                Ok(Event::Token { text, .. }) => print!("{text}"),
                Ok(Event::Finished { text, .. }) => {
                    println!("{text}");
                    break 'speech;
                }
                Err(TryRecvError::Disconnected) => anyhow::bail!("the scheduler ended"),
                Ok(Event::Failed(error)) => return Err(error.into()),
                // Nothing new: draw.
                Err(TryRecvError::Empty) => break,
            }
        }
        std::io::stdout().flush()?;
        frames += 1;
        longest = longest.max(frame.elapsed());
        std::thread::sleep(FRAME.saturating_sub(frame.elapsed()));
    }
    println!("{frames} frames; the longest waited {} µs for the text", longest.as_micros());
    Ok(())
}
