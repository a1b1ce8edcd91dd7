//! `/v1/completions`: text behind a text.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bitnet_burn_engine::Engine;
use bitnet_burn_engine::schedule::LogProbs;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::answer::{Answers, Piece, Usage, finish_reason, unix_time};
use crate::connection::Client;
use crate::fields::{Common, Fields};
use crate::serve::App;
use crate::stream::{events, of_bitnet};
use crate::text::blocking;

/// New tokens where nothing else is asked for, as in OpenAI's API.
const DEFAULT_TOKENS: usize = 16;
/// The most log probabilities for each token.
const MOST_LOGPROBS: usize = 20;

/// One or several prompts, as text or as tokens.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text, token ids, or a list of either")]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

impl Prompts {
    fn tokens(self, engine: &Engine) -> Result<Vec<Vec<u32>>, ApiError> {
        let encode = |text: &String| Ok(engine.encode(text, true)?);
        match self {
            Self::Text(text) => Ok(vec![encode(&text)?]),
            Self::Texts(texts) => texts.iter().map(encode).collect(),
            Self::Tokens(tokens) => Ok(vec![tokens]),
            Self::TokenLists(lists) => Ok(lists),
        }
    }
}

/// Prompts of a request at most.
const MOST_PROMPTS: usize = 64;

/// `POST /v1/completions`.
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    mut fields: Fields,
) -> Result<Response, ApiError> {
    let prompt: Prompts = fields.need("prompt")?;
    let common = Common::take(&mut fields)?;
    let logprobs: Option<usize> = fields.take("logprobs")?;
    if logprobs.is_some_and(|logprobs| logprobs > MOST_LOGPROBS) {
        return Err(ApiError::field("logprobs", format!("logprobs is at most {MOST_LOGPROBS}")));
    }
    if fields.take("echo")?.unwrap_or(false) {
        return Err(ApiError::field("echo", "echo is not supported: leave it out"));
    }
    if fields.take::<String>("suffix")?.is_some() {
        return Err(ApiError::field("suffix", "suffix is not supported: leave it out"));
    }
    if fields.take::<u64>("best_of")?.is_some_and(|best_of| best_of != 1) {
        return Err(ApiError::field("best_of", "best_of is not supported: use n"));
    }
    fields.end()?;
    let model = app.models.get(common.model.as_deref()).await?;
    let requests = {
        let (of_app, model, common) = (app.clone(), model.clone(), common.clone());
        blocking(&app, move || {
            let prompts = prompt.tokens(model.engine())?;
            if prompts.is_empty() || prompts.len() > MOST_PROMPTS {
                let message =
                    format!("prompt has {} prompts, but must have 1 to {MOST_PROMPTS}", prompts.len());
                return Err(ApiError::field("prompt", message));
            }
            let mut requests = Vec::new();
            for prompt in prompts {
                let limits = (Some(DEFAULT_TOKENS), logprobs);
                requests.extend(common.requests(model.engine(), &of_app.options, prompt, limits)?);
            }
            Ok(requests)
        })
        .await?
    };
    let mut answers = Answers::start(&app, model, requests, common.choices())?;
    let head =
        Head { id: app.receipts.next_id("cmpl"), created: unix_time(), model: answers.model.name.clone() };
    if common.stream {
        return Ok(stream(answers, head, common.include_usage));
    }
    let choices = collected(&mut answers, &client).await?;
    let engine = answers.model.engine();
    let entry = |(index, choice): (usize, &Choice)| {
        let logprobs = (!choice.logprobs.is_empty()).then(|| logprobs_of(engine, &choice.logprobs));
        let finish = choice.end.as_ref().map(|(generation, _)| finish_reason(generation.finish));
        json!({ "index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": finish })
    };
    let entries: Vec<Value> = choices.iter().enumerate().map(entry).collect();
    let ends = || choices.iter().filter_map(|choice| choice.end.as_ref());
    let mut body = head.object("text_completion");
    body["choices"] = json!(entries);
    body["usage"] = json!(Usage::of(ends().map(|(generation, details)| (generation, details))));
    body["bitnet"] = of_bitnet(ends().map(|(_, details)| details).collect::<Vec<_>>().into_iter());
    Ok(Json(body).into_response())
}

/// What every object of a response begins with.
#[derive(Clone)]
pub(crate) struct Head {
    pub id: String,
    pub created: u64,
    pub model: String,
}

impl Head {
    pub(crate) fn object(&self, object: &str) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model })
    }
}

/// An answer while it is collected.
#[derive(Default)]
pub(crate) struct Choice {
    pub text: String,
    pub logprobs: Vec<(u32, LogProbs)>,
    pub end: Option<(bitnet_burn_engine::generate::Generation, crate::answer::Details)>,
}

/// All answers, when they are complete. Nobody waits for them when the client has left.
pub(crate) async fn collected(answers: &mut Answers, client: &Client) -> Result<Vec<Choice>, ApiError> {
    let mut choices: Vec<Choice> = Vec::new();
    let left = client.left();
    tokio::pin!(left);
    loop {
        let piece = tokio::select! {
            piece = answers.next() => piece,
            () = &mut left => return Err(ApiError::invalid("the client has left")),
        };
        let Some(piece) = piece else { break };
        let (choice, text, logprobs) = match piece? {
            Piece::Token { choice, token, text, logprobs } => {
                (choice, text, logprobs.map(|logprobs| (token, logprobs)))
            }
            Piece::Finished { choice, text, generation, details } => {
                choice_at(&mut choices, choice).end = Some((generation, details));
                (choice, text, None)
            }
        };
        let choice = choice_at(&mut choices, choice);
        choice.text.push_str(&text);
        choice.logprobs.extend(logprobs);
    }
    Ok(choices)
}

/// The answer of this index.
fn choice_at(choices: &mut Vec<Choice>, index: usize) -> &mut Choice {
    if choices.len() <= index {
        choices.resize_with(index + 1, Choice::default);
    }
    &mut choices[index]
}

/// A token's text, as far as it is text, and its bytes, if it has bytes of its own.
pub(crate) fn token_text(engine: &Engine, token: u32) -> (String, Option<&[u8]>) {
    let Some(tokenizer) = engine.tokenizer() else { return (String::new(), None) };
    match tokenizer.bytes(token) {
        Some(bytes) => (String::from_utf8_lossy(bytes).into_owned(), Some(bytes)),
        None => (tokenizer.decode(&[token], false).unwrap_or_default(), None),
    }
}

fn logprobs_of(engine: &Engine, logprobs: &[(u32, LogProbs)]) -> Value {
    let top = |logprobs: &LogProbs| -> Map<String, Value> {
        logprobs.top.iter().map(|&(token, value)| (token_text(engine, token).0, json!(value))).collect()
    };
    json!({
        "tokens": logprobs.iter().map(|(token, _)| token_text(engine, *token).0).collect::<Vec<_>>(),
        "token_logprobs": logprobs.iter().map(|(_, logprobs)| logprobs.chosen).collect::<Vec<_>>(),
        "top_logprobs": logprobs.iter().map(|(_, logprobs)| top(logprobs)).collect::<Vec<_>>(),
    })
}

/// The answers as a stream.
fn stream(answers: Answers, head: Head, usage: bool) -> Response {
    let chunk = {
        let head = head.clone();
        move |choice: Value| {
            let mut chunk = head.object("text_completion");
            chunk["choices"] = json!([choice]);
            chunk
        }
    };
    let each = move |answers: &Answers, piece: Piece| match piece {
        Piece::Token { choice, token, text, logprobs } => {
            if text.is_empty() && logprobs.is_none() {
                return Vec::new();
            }
            let logprobs = logprobs.map(|logprobs| logprobs_of(answers.model.engine(), &[(token, logprobs)]));
            let entry = json!({ "index": choice, "text": text, "logprobs": logprobs, "finish_reason": null });
            vec![chunk(entry)]
        }
        Piece::Finished { choice, text, generation, .. } => {
            let finish = finish_reason(generation.finish);
            vec![chunk(json!({ "index": choice, "text": text, "logprobs": null, "finish_reason": finish }))]
        }
    };
    events(answers, each, usage.then(|| head.object("text_completion")))
}
