//! The fields of requests, and what they must be.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::Instant;

use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, Request as HttpRequest};
use axum::http::StatusCode;
use bitnet_burn_engine::Engine;
use bitnet_burn_engine::schedule::Request;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::ApiError;
use crate::serve::ServerOptions;

/// A JSON body, whose mistakes are told in the API's shape.
pub(crate) struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: HttpRequest, state: &S) -> Result<Self, ApiError> {
        match axum::Json::<T>::from_request(request, state).await {
            Ok(axum::Json(body)) => Ok(Self(body)),
            Err(JsonRejection::MissingJsonContentType(_)) => Err(ApiError::status(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "the body must be JSON: send the header `Content-Type: application/json`",
            )),
            Err(error) if error.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(ApiError::status(
                StatusCode::PAYLOAD_TOO_LARGE,
                "the body is larger than this server takes",
            )),
            Err(error) if error.status() == StatusCode::REQUEST_TIMEOUT => {
                Err(ApiError::status(StatusCode::REQUEST_TIMEOUT, "the body came too slowly"))
            }
            Err(error) => Err(ApiError::invalid(error.body_text())),
        }
    }
}

/// One or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
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
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Common {
    pub model: Option<String>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    seed: Option<i64>,
    stop: Option<OneOrMany<String>>,
    n: Option<u64>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<Map<String, Value>>,
    // These change nothing here, and clients send them.
    #[serde(rename = "user")]
    _user: Option<Value>,
    #[serde(rename = "store")]
    _store: Option<Value>,
    #[serde(rename = "metadata")]
    _metadata: Option<Value>,
    #[serde(rename = "service_tier")]
    _service_tier: Option<Value>,
    #[serde(rename = "safety_identifier")]
    _safety_identifier: Option<Value>,
    #[serde(rename = "prompt_cache_key")]
    _prompt_cache_key: Option<Value>,
}

/// The most answers to one request.
const MOST_CHOICES: u64 = 16;
/// The most stop texts, and the bytes of the longest.
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;

impl Common {
    /// Answers that were asked for.
    pub(crate) fn choices(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=MOST_CHOICES => Ok(n as usize),
            n => Err(ApiError::field("n", format!("n is {n}, but must be 1 to {MOST_CHOICES}"))),
        }
    }

    pub(crate) fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// The request of each answer to this prompt. Each further answer has the next seed.
    ///
    /// # Errors
    /// For values that are out of range or that are not supported.
    pub(crate) fn requests(
        &self,
        engine: &Engine,
        options: &ServerOptions,
        prompt: Vec<u32>,
        (default_tokens, logprobs): (Option<usize>, Option<usize>),
    ) -> Result<Vec<Request>, ApiError> {
        for (name, value) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            if value.is_some_and(|value| value != 0.0) {
                let message = format!("{name} is not supported: leave it out, or use repetition_penalty");
                return Err(ApiError::field(name, message));
            }
        }
        if self.logit_bias.as_ref().is_some_and(|bias| !bias.is_empty()) {
            return Err(ApiError::field("logit_bias", "logit_bias is not supported: leave it out"));
        }
        let mut generate = engine.generate_options();
        let asked = self.max_completion_tokens.or(self.max_tokens);
        generate.max_new_tokens = match asked {
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
        // The standard library seeds its hash maps at random. (Of 53 bits, so that it is exact in JavaScript.)
        let random = || RandomState::new().build_hasher().finish() >> 11;
        // A negative seed is as good as another.
        let seed = self.seed.map_or_else(random, |seed| seed as u64);
        generate.stop_strings = self.stop.clone().map_or_else(Vec::new, Vec::from);
        if generate.stop_strings.len() > MOST_STOPS
            || generate.stop_strings.iter().any(|stop| stop.is_empty() || stop.len() > LONGEST_STOP)
        {
            let message = format!("stop takes at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} bytes each");
            return Err(ApiError::field("stop", message));
        }
        let request = |choice| {
            let mut generate = generate.clone();
            generate.sampling.seed = seed.wrapping_add(choice as u64);
            let deadline = Some(Instant::now() + options.request_time);
            Request { prompt: prompt.clone(), options: generate, deadline, logprobs }
        };
        Ok((0..self.choices()?).map(request).collect())
    }
}

/// Refuses fields that this API does not know, as OpenAI's does.
pub(crate) fn refuse_unknown(fields: &Map<String, Value>) -> Result<(), ApiError> {
    match fields.iter().find(|(_, value)| !value.is_null()) {
        None => Ok(()),
        Some((name, _)) => {
            let name: String = name.chars().take(100).collect();
            Err(ApiError::field(&name, format!("the field {name:?} is not known here: leave it out")))
        }
    }
}
