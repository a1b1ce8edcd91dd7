//! Answers as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::mpsc::channel;

use crate::answer::{Answers, Details, Piece, Usage};

/// Events that wait for a slow client before its answer does.
const AHEAD: usize = 64;
/// A comment is sent when nothing else was for this long, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Server-sent events of the chunks that `each` makes of the answers' pieces, and `[DONE]`. An error ends them. Where there
/// is a `usage` object, it is the last chunk, completed with what was used. When the client leaves, the answers are
/// cancelled.
pub(crate) fn events(
    mut answers: Answers,
    mut each: impl FnMut(&Answers, Piece) -> Vec<Value> + Send + 'static,
    usage: Option<Value>,
) -> Response {
    let (sender, receiver) = channel::<Event>(AHEAD);
    tokio::spawn(async move {
        let mut ends: Vec<(bitnet_burn_engine::generate::Generation, Details)> = Vec::new();
        loop {
            let piece = tokio::select! {
                piece = answers.next() => piece,
                () = sender.closed() => return,
            };
            let chunks = match piece {
                None => break,
                Some(Err(error)) => {
                    // (The client is gone if this fails.)
                    drop(sender.send(data(&error.to_json())).await);
                    return;
                }
                Some(Ok(piece)) => {
                    if let Piece::Finished { generation, details, .. } = &piece {
                        ends.push((generation.clone(), details.clone()));
                    }
                    each(&answers, piece)
                }
            };
            for chunk in chunks {
                if sender.send(data(&chunk)).await.is_err() {
                    return;
                }
            }
        }
        if let Some(mut last) = usage {
            last["choices"] = json!([]);
            last["usage"] = json!(Usage::of(ends.iter().map(|(generation, details)| (generation, details))));
            last["bitnet"] = of_bitnet(ends.iter().map(|(_, details)| details));
            drop(sender.send(data(&last)).await);
        }
        drop(sender.send(Event::default().data("[DONE]")).await);
    });
    let events = stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|event| (Ok::<_, Infallible>(event), receiver))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

fn data(value: &Value) -> Event {
    // JSON has no line breaks of its own.
    Event::default().data(value.to_string())
}

/// What this server says of the answers, beyond OpenAI's fields.
pub(crate) fn of_bitnet<'a>(details: impl Iterator<Item = &'a Details> + Clone) -> Value {
    let mut value = json!(details.clone().next());
    let receipts: Vec<&str> = details.map(|details| details.receipt.as_str()).collect();
    if receipts.len() > 1 {
        value["receipts"] = json!(receipts);
    }
    value
}
