//! The fields of requests, and what they must be.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{FromRequest, Request as HttpRequest};
use axum::http::{HeaderValue, StatusCode, header};
use bitnet_burn_engine::generate::GenerateError;
use bitnet_burn_engine::schedule::Request;
use bitnet_burn_engine::{Engine, EngineError};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::ApiError;
use crate::constraints::{self, Asked};
use crate::serve::ServerOptions;

/// Time for a whole body.
const BODY_TIME: Duration = Duration::from_secs(60);

/// The fields of a JSON body. Each is read by its name, so that a mistake is told with it.
pub(crate) struct Fields(BTreeMap<String, Box<RawValue>>);

impl<S: Send + Sync> FromRequest<S> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: HttpRequest, state: &S) -> Result<Self, ApiError> {
        let kind = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
        let kind = kind.and_then(|kind| kind.split(|&byte| byte == b';').next());
        if !kind.is_some_and(|kind| kind.trim_ascii().eq_ignore_ascii_case(b"application/json")) {
            let message = "the body must be JSON: send the header `Content-Type: application/json`";
            return Err(ApiError::status(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let body = tokio::time::timeout(BODY_TIME, Bytes::from_request(request, state)).await;
        let body =
            body.map_err(|_| ApiError::status(StatusCode::REQUEST_TIMEOUT, "the body did not come in time"))?;
        let body = body.map_err(|error| match error.status() {
            StatusCode::PAYLOAD_TOO_LARGE => too_large(),
            _ => ApiError::invalid("the body is malformed, not complete, or came too slowly"),
        })?;
        match serde_json::from_slice(&body) {
            Ok(fields) => Ok(Self(fields)),
            Err(error) => Err(ApiError::invalid(format!("the body is no JSON object: {error}"))),
        }
    }
}

/// A body that is larger than the server takes.
pub(crate) fn too_large() -> ApiError {
    ApiError::status(StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than this server takes")
}

impl Fields {
    /// The value of a field; `None` where it is missing or null.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.0.remove(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map_err(|error| {
            // (The error's line and column would count from the value's beginning.)
            let problem = error.to_string();
            let problem = problem.split_once(" at line ").map_or(&*problem, |(problem, _)| problem);
            ApiError::field(name, format!("{name}: {problem}"))
        })
    }

    /// The value of a field that must be there.
    pub(crate) fn need<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| ApiError::field(name, format!("the field {name:?} is missing")))
    }

    /// Takes fields that change nothing here and that clients send.
    pub(crate) fn ignore(&mut self, names: &[&str]) {
        names.iter().for_each(|name| drop(self.0.remove(*name)));
    }

    /// Refuses all other fields, as OpenAI's API does.
    pub(crate) fn end(self) -> Result<(), ApiError> {
        match self.0.iter().find(|(_, value)| value.get() != "null") {
            None => Ok(()),
            Some((name, _)) => {
                let name: String = name.chars().take(100).collect();
                Err(ApiError::field(&name, format!("the field {name:?} is not known here: leave it out")))
            }
        }
    }
}

/// One or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text, or a list of texts")]
pub(crate) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> From<OneOrMany<T>> for Vec<T> {
    fn from(values: OneOrMany<T>) -> Self {
        match values {
            OneOrMany::One(value) => vec![value],
            OneOrMany::Many(values) => values,
        }
    }
}

/// How the end of a stream is told.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    pub include_usage: bool,
}

/// Fields that chats and completions have in common.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    pub model: Option<String>,
    pub stream: bool,
    /// Whether the end of a stream says what was used.
    pub include_usage: bool,
    max_tokens: Option<u64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: f32,
    frequency_penalty: f32,
    logit_bias: BTreeMap<u32, f32>,
    seed: Option<i64>,
    stop: Vec<String>,
    n: u64,
    /// The form of the answers, and the field that asks for it.
    pub constraint: Option<Asked>,
}

/// The most answers to one request.
const MOST_CHOICES: u64 = 16;
/// The most stop texts, and the bytes of the longest.
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;

impl Common {
    /// # Errors
    /// For values that are not supported.
    pub(crate) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let penalty = |fields: &mut Fields, name: &str| -> Result<f32, ApiError> {
            let value = fields.take::<f32>(name)?.unwrap_or(0.0);
            match (-2.0..=2.0).contains(&value) {
                true => Ok(value),
                false => Err(ApiError::field(name, format!("{name} is {value}, but must be -2 to 2"))),
            }
        };
        let presence_penalty = penalty(fields, "presence_penalty")?;
        let frequency_penalty = penalty(fields, "frequency_penalty")?;
        let logit_bias = fields.take::<BTreeMap<u32, f32>>("logit_bias")?.unwrap_or_default();
        if let Some((token, bias)) = logit_bias.iter().find(|(_, bias)| !(-100.0..=100.0).contains(*bias)) {
            let message = format!("logit_bias of token {token} is {bias}, but must be -100 to 100");
            return Err(ApiError::field("logit_bias", message));
        }
        fields.ignore(&[
            "user",
            "store",
            "metadata",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
        ]);
        let (new, old) = (fields.take("max_completion_tokens")?, fields.take("max_tokens")?);
        let stop = fields.take::<OneOrMany<String>>("stop")?.map_or_else(Vec::new, Vec::from);
        if stop.len() > MOST_STOPS || stop.iter().any(|stop| stop.is_empty() || stop.len() > LONGEST_STOP) {
            let message = format!("stop takes at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} bytes each");
            return Err(ApiError::field("stop", message));
        }
        let n = fields.take("n")?.unwrap_or(1);
        if !(1..=MOST_CHOICES).contains(&n) {
            return Err(ApiError::field("n", format!("n is {n}, but must be 1 to {MOST_CHOICES}")));
        }
        Ok(Self {
            model: fields.take("model")?,
            stream: fields.take("stream")?.unwrap_or(false),
            include_usage: fields.take::<StreamOptions>("stream_options")?.unwrap_or_default().include_usage,
            max_tokens: new.or(old),
            temperature: fields.take("temperature")?,
            top_p: fields.take("top_p")?,
            top_k: fields.take("top_k")?,
            min_p: fields.take("min_p")?,
            repetition_penalty: fields.take("repetition_penalty")?,
            presence_penalty,
            frequency_penalty,
            logit_bias,
            seed: fields.take("seed")?,
            stop,
            n,
            constraint: constraints::take(fields)?,
        })
    }

    /// Answers to each prompt.
    pub(crate) fn choices(&self) -> usize {
        self.n as usize
    }

    /// The request of each answer to this prompt. Each further answer has the next seed.
    ///
    /// # Errors
    /// For values that are out of range.
    pub(crate) fn requests(
        &self,
        engine: &Engine,
        options: &ServerOptions,
        prompt: Vec<u32>,
        (default_tokens, logprobs): (Option<usize>, Option<usize>),
    ) -> Result<Vec<Request>, ApiError> {
        let mut generate = engine.generate_options();
        generate.max_new_tokens = match self.max_tokens {
            Some(0) => return Err(ApiError::field("max_tokens", "max_tokens is 0, but must be at least 1")),
            Some(tokens) => usize::try_from(tokens).unwrap_or(usize::MAX),
            None => default_tokens.unwrap_or(usize::MAX),
        };
        generate.max_new_tokens = generate.max_new_tokens.min(options.max_tokens);
        let sampling = &mut generate.sampling;
        sampling.temperature = self.temperature.unwrap_or(1.0);
        sampling.top_p = self.top_p.unwrap_or(1.0);
        sampling.top_k = self.top_k.unwrap_or(0).try_into().unwrap_or(usize::MAX);
        sampling.min_p = self.min_p.unwrap_or(0.0);
        sampling.repetition_penalty = self.repetition_penalty.unwrap_or(1.0);
        sampling.presence_penalty = self.presence_penalty;
        sampling.frequency_penalty = self.frequency_penalty;
        sampling.logit_bias.clone_from(&self.logit_bias);
        let vocabulary = engine.checkpoint().config().vocab_size;
        if let Some(token) = self.logit_bias.keys().find(|&&token| token as usize >= vocabulary) {
            let message = format!("logit_bias has token {token}, and the model has {vocabulary} tokens");
            return Err(ApiError::field("logit_bias", message));
        }
        // The standard library seeds its hash maps at random. (Of 53 bits, so that it is exact in JavaScript.)
        let random = || RandomState::new().build_hasher().finish() >> 11;
        // A negative seed is as good as another.
        let seed = self.seed.map_or_else(random, |seed| seed as u64);
        generate.stop_strings.clone_from(&self.stop);
        if let Some((field, constraint)) = &self.constraint {
            engine.check_constraint(constraint).map_err(|error| match error {
                EngineError::Generate(GenerateError::Constraint(error)) => {
                    ApiError::field(field, format!("{field}: {error}"))
                }
                error => error.into(),
            })?;
            generate.constraint = Some(constraint.clone());
        }
        let request = |choice| {
            let mut generate = generate.clone();
            generate.sampling.seed = seed.wrapping_add(choice);
            let deadline = Some(Instant::now() + options.request_time);
            Request { prompt: prompt.clone(), options: generate, deadline, logprobs }
        };
        Ok((0..self.n).map(request).collect())
    }
}
