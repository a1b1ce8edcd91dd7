//! `/v1/chat/completions`: an answer to messages.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bitnet_burn_engine::chat::Dictionary;
use bitnet_burn_engine::schedule::LogProbs;
use bitnet_burn_engine::tools::CallForm;
use bitnet_burn_engine::{Engine, EngineError};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::ApiError;
use crate::answer::{Answers, Piece, Usage, finish_reason, unix_time};
use crate::completions::{Choice, Head, collected, token_text};
use crate::connection::Client;
use crate::constraints::{self, ToolChoice};
use crate::fields::{Common, Fields};
use crate::models::Loaded;
use crate::serve::App;
use crate::stream::{events, of_bitnet};
use crate::text::blocking;
use crate::tool_calls::{self, Held, Offered};

/// The most log probabilities for each token.
const MOST_LOGPROBS: usize = 20;

/// What a message says: text, or parts that are text.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text, or a list of parts with a type")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part {
    Text {
        text: String,
    },
    #[serde(other)]
    Other,
}

/// A message. Its other fields (`name`, `tool_calls`, `tool_call_id`) are the template's business.
#[derive(Clone, Debug, Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Vec<WrittenCall>>,
    #[serde(flatten)]
    other: Dictionary,
}

/// A call of a tool in an assistant's message.
#[derive(Clone, Debug, Deserialize)]
struct WrittenCall {
    id: Option<String>,
    function: WrittenFunction,
}

#[derive(Clone, Debug, Deserialize)]
struct WrittenFunction {
    name: String,
    /// A JSON object as text.
    arguments: String,
}

impl Message {
    /// As the template sees it. transformers gives templates text, and arguments of calls as objects.
    fn dictionary(self, index: usize) -> Result<Dictionary, ApiError> {
        let fail = |problem: &str| {
            let message = format!("message {index} ({}): {problem}", self.role.escape_default());
            ApiError::field("messages", message)
        };
        let mut dictionary = Dictionary::default();
        dictionary.insert("role", &self.role);
        let content = match &self.content {
            Some(Content::Text(text)) => Some(text.clone()),
            Some(Content::Parts(parts)) => {
                let mut all = String::new();
                for part in parts {
                    match part {
                        Part::Text { text } => all.push_str(text),
                        Part::Other => {
                            return Err(fail("this server takes parts of the type \"text\" alone"));
                        }
                    }
                }
                Some(all)
            }
            None if self.role == "assistant" => None,
            None => return Err(fail("it has no content")),
        };
        dictionary.insert("content", content.unwrap_or_default());
        if let Some(calls) = &self.tool_calls {
            let mut all = Vec::with_capacity(calls.len());
            for call in calls {
                let arguments: Dictionary = serde_json::from_str(&call.function.arguments)
                    .map_err(|_| fail("the arguments of a tool call are no JSON object"))?;
                let mut function = Dictionary::default();
                function.insert("name", &call.function.name);
                function.insert("arguments", arguments);
                let mut written = Dictionary::default();
                written.insert("type", "function");
                call.id.iter().for_each(|id| written.insert("id", id));
                written.insert("function", function);
                all.push(written);
            }
            dictionary.insert("tool_calls", all);
        }
        dictionary.extend(self.other);
        Ok(dictionary)
    }
}

/// The tools that the model is told of, as the template sees them, and what becomes of them.
fn tools(fields: &mut Fields) -> Result<(Vec<Dictionary>, ToolChoice), ApiError> {
    let raw = fields.take::<Box<RawValue>>("tools")?;
    let choice = constraints::tool_choice(fields, raw.as_deref())?;
    if matches!(choice, ToolChoice::None) {
        return Ok((Vec::new(), choice));
    }
    let tools = raw.map_or(Ok(Vec::new()), |raw| serde_json::from_str(raw.get()));
    Ok((tools.map_err(|error| ApiError::field("tools", format!("tools: {error}")))?, choice))
}

/// How many of the most likely tokens are told with each token, if its log probability is.
fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.take("logprobs")?.unwrap_or(false);
    let top = fields.take("top_logprobs")?.unwrap_or(0);
    match (wanted, top) {
        (_, top) if top > MOST_LOGPROBS => {
            Err(ApiError::field("top_logprobs", format!("top_logprobs is at most {MOST_LOGPROBS}")))
        }
        (true, top) => Ok(Some(top)),
        (false, 0) => Ok(None),
        (false, _) => Err(ApiError::field("top_logprobs", "top_logprobs needs \"logprobs\": true")),
    }
}

/// `POST /v1/chat/completions`.
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    mut fields: Fields,
) -> Result<Response, ApiError> {
    let messages: Vec<Message> = fields.need("messages")?;
    let mut common = Common::take(&mut fields)?;
    let logprobs = logprobs(&mut fields)?;
    let (tools, choice) = tools(&mut fields)?;
    if let (Some((other, _)), ToolChoice::Call(_)) = (&common.constraint, &choice) {
        return Err(constraints::both(other, "tools"));
    }
    fields.ignore(&["parallel_tool_calls"]);
    fields.end()?;
    if messages.is_empty() {
        return Err(ApiError::field("messages", "messages is empty: there is nothing to answer"));
    }
    let model = app.models.get(common.model.as_deref()).await?;
    let form = model.call_form;
    let may_call = matches!(&choice, ToolChoice::Auto(tools) if !tools.is_empty());
    let offered = match choice {
        ToolChoice::Auto(tools) if may_call => Some(Offered { form, tools, begun: "" }),
        ToolChoice::Auto(_) | ToolChoice::None => None,
        ToolChoice::Call(tools) => {
            common.constraint = Some(("tools", form.constraint(&tools)));
            Some(Offered { form, tools, begun: form.prompt() })
        }
    };
    let begun = offered.as_ref().map_or("", |offered| offered.begun);
    let requests = {
        let (of_app, model, common) = (app.clone(), model.clone(), common.clone());
        blocking(&app, move || {
            let messages = messages.into_iter().enumerate().map(|(i, message)| message.dictionary(i));
            let prompt = prompt(&model, &messages.collect::<Result<Vec<_>, _>>()?, &tools, may_call, begun)?;
            common.requests(model.engine(), &of_app.options, prompt, (None, logprobs))
        })
        .await?
    };
    let mut answers = Answers::start(&app, model, requests, common.choices())?;
    if offered.is_some() {
        answers.show(form.special());
    }
    let head = Head {
        id: app.receipts.next_id("chatcmpl"),
        created: unix_time(),
        model: answers.model.name.clone(),
    };
    if common.stream {
        return Ok(stream(answers, head, common.include_usage, offered));
    }
    collect(answers, &client, &head, offered).await
}

/// The tokens that the answer follows, `begun` last. Tools that the model `may_call` must be in them; where it must call one,
/// it can't avoid that.
fn prompt(
    model: &Loaded,
    messages: &[Dictionary],
    tools: &[Dictionary],
    may_call: bool,
    begun: &str,
) -> Result<Vec<u32>, ApiError> {
    let engine = model.engine();
    let template = model.template.as_ref().map_err(|problem| {
        let name = &model.name;
        ApiError::invalid(format!("{name:?} can't chat: {problem}. /v1/completions continues plain text"))
    })?;
    let tokens = engine.tokenizer().ok_or(EngineError::NoTokenizer)?.template_tokens();
    let render = |tools| template.render_chat(messages, tools, &tokens, true).map_err(EngineError::from);
    let mut text = render(tools)?;
    if may_call && render(&[])? == text {
        let name = &model.name;
        let message = format!(
            "the chat template of {name:?} does not tell the model of tools: describe them in a system message, or leave \
             `tools` out"
        );
        return Err(ApiError::field("tools", message));
    }
    text.push_str(begun);
    Ok(engine.encode(&text, false)?)
}

/// The whole response at once.
async fn collect(
    mut answers: Answers,
    client: &Client,
    head: &Head,
    offered: Option<Offered>,
) -> Result<Response, ApiError> {
    let choices = collected(&mut answers, client).await?;
    let engine = answers.model.engine();
    let entry = |(index, choice): (usize, &Choice)| {
        let mut finish = choice.end.as_ref().map(|(generation, _)| finish_reason(generation.finish));
        let mut message = json!({ "role": "assistant", "content": choice.text });
        if let Some(offered) = &offered
            && let (text, calls) = offered.split(&choice.text)
            && !calls.is_empty()
        {
            finish = Some("tool_calls");
            let id = format!("{}_{index}", head.id);
            message["tool_calls"] = tool_calls::to_json(offered.form, &calls, &id, false);
            message["content"] = if text.is_empty() { Value::Null } else { text.into() };
        }
        let logprobs = (!choice.logprobs.is_empty()).then(|| logprobs_of(engine, &choice.logprobs));
        json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": finish })
    };
    let entries: Vec<Value> = choices.iter().enumerate().map(entry).collect();
    let ends: Vec<_> = choices.iter().filter_map(|choice| choice.end.as_ref()).collect();
    let mut body = head.object("chat.completion");
    body["choices"] = json!(entries);
    body["usage"] = json!(Usage::of(ends.iter().map(|(generation, details)| (generation, details))));
    body["bitnet"] = of_bitnet(ends.iter().map(|(_, details)| details));
    Ok(Json(body).into_response())
}

fn logprobs_of(engine: &Engine, logprobs: &[(u32, LogProbs)]) -> Value {
    let of = |token: u32, value: f32| {
        let (text, bytes) = token_text(engine, token);
        json!({ "token": text, "logprob": value, "bytes": bytes })
    };
    let entry = |(token, logprobs): &(u32, LogProbs)| {
        let mut entry = of(*token, logprobs.chosen);
        entry["top_logprobs"] = logprobs.top.iter().map(|&(token, value)| of(token, value)).collect();
        entry
    };
    json!({ "content": logprobs.iter().map(entry).collect::<Vec<_>>(), "refusal": null })
}

/// The answers as a stream.
fn stream(answers: Answers, head: Head, usage: bool, offered: Option<Offered>) -> Response {
    let last = usage.then(|| head.object("chat.completion.chunk"));
    let form = offered.as_ref().map_or(CallForm::Hermes, |offered| offered.form);
    // With whether it has begun.
    let mut held: Vec<(bool, Held)> = Vec::new();
    let each = move |answers: &Answers, piece: Piece| {
        let chunk = |choice: usize, delta: Value, logprobs: Option<Value>, finish: Option<&str>| {
            let mut chunk = head.object("chat.completion.chunk");
            chunk["choices"] =
                json!([{ "index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish }]);
            chunk
        };
        let (Piece::Token { choice, .. } | Piece::Finished { choice, .. }) = &piece;
        let choice = *choice;
        if held.len() <= choice {
            held.resize_with(choice + 1, || (false, Held::new(offered.as_ref())));
        }
        let (begun, of_choice) = &mut held[choice];
        let mut chunks = Vec::new();
        if !*begun {
            *begun = true;
            chunks.push(chunk(choice, json!({ "role": "assistant", "content": "" }), None, None));
        }
        match piece {
            Piece::Token { token, text, logprobs, .. } => {
                let text = of_choice.push(&text);
                let logprobs =
                    logprobs.map(|logprobs| logprobs_of(answers.model.engine(), &[(token, logprobs)]));
                if !text.is_empty() || logprobs.is_some() {
                    chunks.push(chunk(choice, json!({ "content": text }), logprobs, None));
                }
            }
            Piece::Finished { text, generation, .. } => {
                let mut text = of_choice.push(&text);
                let (rest, calls) = of_choice.end();
                text.push_str(&rest);
                if !text.is_empty() {
                    chunks.push(chunk(choice, json!({ "content": text }), None, None));
                }
                let mut finish = finish_reason(generation.finish);
                if !calls.is_empty() {
                    finish = "tool_calls";
                    let calls = tool_calls::to_json(form, &calls, &format!("{}_{choice}", head.id), true);
                    chunks.push(chunk(choice, json!({ "tool_calls": calls }), None, None));
                }
                chunks.push(chunk(choice, json!({}), None, Some(finish)));
            }
        }
        chunks
    };
    events(answers, each, last)
}
