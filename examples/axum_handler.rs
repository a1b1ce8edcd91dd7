//! A handler of a web service of your own, which streams an answer. Requests share one scheduler; a client that leaves ends
//! its request.
//!
//! ```text
//! cargo run --release --example axum_handler            # asks itself once, and ends
//! cargo run --release --example axum_handler -- serve   # curl -N 'http://127.0.0.1:8080/story?begin=There+was'
//! ```

use std::convert::Infallible;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bitnet_burn_engine::schedule::{Event, Request, Scheduler, SchedulerOptions, Ticket};
use bitnet_burn_engine::{Engine, GenerateOptions};
use futures_util::stream;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::mpsc::unbounded_channel;

struct Stories {
    engine: Engine,
    scheduler: Scheduler,
}

/// Is dropped with the body of the answer.
struct Reader(Ticket);

impl Drop for Reader {
    fn drop(&mut self) {
        // The client has left, or has read everything.
        self.0.cancel();
    }
}

#[derive(Deserialize)]
struct Asked {
    begin: String,
}

async fn story(State(stories): State<Arc<Stories>>, Query(asked): Query<Asked>) -> Response {
    let bad = |error: String| (StatusCode::BAD_REQUEST, error).into_response();
    let prompt = match stories.engine.encode(&asked.begin, true) {
        Ok(prompt) => prompt,
        Err(error) => return bad(error.to_string()),
    };
    let options = GenerateOptions { max_new_tokens: 64, ..stories.engine.generate_options() };
    let (sender, events) = unbounded_channel();
    let ticket = match stories
        .scheduler
        .submit(Request::new(prompt, options), move |event| drop(sender.send(event)))
    {
        Ok(ticket) => ticket,
        Err(error) => return bad(error.to_string()),
    };
    let reader = Reader(ticket);
    let texts = stream::unfold((events, reader), |(mut events, reader)| async move {
        match events.recv().await? {
            Event::Token { text, .. } | Event::Finished { text, .. } => {
                Some((Ok::<_, Infallible>(text), (events, reader)))
            }
            Event::Failed(_) => None,
        }
    });
    Body::from_stream(texts).into_response()
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let engine = Engine::options().open_built_in()?;
    let scheduler = Scheduler::start(&engine, SchedulerOptions::of(&engine))?;
    let app = Router::new().route("/story", get(story)).with_state(Arc::new(Stories { engine, scheduler }));
    if std::env::args().nth(1).is_some_and(|argument| argument == "serve") {
        let listener = TcpListener::bind("127.0.0.1:8080").await?;
        println!("http://{}/story?begin=There+was", listener.local_addr()?);
        return Ok(axum::serve(listener, app).await?);
    }
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).await });
    let url = format!("http://{address}/story?begin=There+was");
    let answer =
        tokio::task::spawn_blocking(move || ureq::get(&url).call()?.body_mut().read_to_string()).await?;
    println!("There was{}", answer.context("the service did not answer")?);
    Ok(())
}
