//! Errors as OpenAI's API shows them: an HTTP status, and `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bitnet_burn_engine::EngineError;
use bitnet_burn_engine::generate::GenerateError;
use bitnet_burn_engine::sampling::SamplingError;
use bitnet_burn_engine::schedule::{RequestError, SubmitError};
use serde::Serialize;

/// An error that the client is told.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
    /// Seconds after which another try makes sense.
    retry_after: Option<u64>,
}

#[derive(Clone, Debug, Serialize)]
struct ErrorBody {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        Self { status, body: ErrorBody { message, kind, param: None, code }, retry_after: None }
    }

    /// Something is wrong with the request.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message.into())
    }

    /// This field of the request is wrong.
    pub fn field(name: &str, message: impl Into<String>) -> Self {
        let mut error = Self::invalid(message);
        error.body.param = Some(name.to_owned());
        error
    }

    /// There is no such thing.
    pub fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some(code), message.into())
    }

    /// The HTTP method or the content is refused.
    pub fn status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", None, message.into())
    }

    /// The key is missing or wrong.
    pub fn key() -> Self {
        let message = "this server needs its API key: send the header `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message.into())
    }

    /// The time for the request has passed.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", Some("timeout"), message.into())
    }

    /// The server has too much to do.
    pub fn busy(message: impl Into<String>) -> Self {
        let (kind, code) = ("rate_limit_error", Some("queue_full"));
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, kind, code, message.into());
        Self { retry_after: Some(1), ..error }
    }

    /// The server can't answer now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", None, message.into());
        Self { retry_after: Some(1), ..error }
    }

    /// The server is at fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message.into())
    }

    /// The object with the key `error`.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "error": self.body })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Busy { .. } => Self::busy(error.to_string()),
            SubmitError::Engine(error) => error.into(),
            SubmitError::TooLarge { .. } => Self::field("max_tokens", error.to_string()),
            _ => Self::unavailable(error.to_string()),
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::PromptTooLong { tokens, context } => {
                let message = format!(
                    "the prompt has {tokens} tokens, the model's context here {context}: shorten the prompt"
                );
                let mut error = Self::invalid(message);
                error.body.code = Some("context_length_exceeded");
                error
            }
            EngineError::Generate(GenerateError::Sampling(SamplingError::Setting { name, .. })) => {
                Self::field(name, error.to_string())
            }
            // These are about the request: prompt, sampling, messages.
            EngineError::Generate(_)
            | EngineError::Chat(_)
            | EngineError::Tokenizer(_)
            | EngineError::NoTokenizer
            | EngineError::Text { .. }
            | EngineError::NoSuchPrompt { .. }
            | EngineError::PromptInMean => Self::invalid(error.to_string()),
            error => {
                tracing::error!("{error}");
                Self::internal("the model can't compute this; the server's log has the reason")
            }
        }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Deadline { .. } => Self::timeout(error.to_string()),
            RequestError::Generate(error) if matches!(*error, GenerateError::Constraint(_)) => {
                Self::invalid(error.to_string())
            }
            RequestError::Stopped => Self::unavailable(error.to_string()),
            error => {
                tracing::error!("a request failed: {error}");
                Self::internal("the model failed on this request; the server's log has the reason")
            }
        }
    }
}
