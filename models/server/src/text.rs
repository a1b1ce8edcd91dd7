//! The models' names, and texts as tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::ApiError;
use crate::fields::Fields;
use crate::models::Status;
use crate::serve::App;

fn entry(app: &App, name: &str, status: &Status) -> Value {
    let mut of_bitnet = json!(status);
    of_bitnet["loaded"] = json!(matches!(status, Status::Ready { .. }));
    json!({
        "id": name,
        "object": "model",
        "created": app.started,
        "owned_by": "bitnet",
        "bitnet": of_bitnet,
    })
}

/// `GET /v1/models`.
pub(crate) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let all: Vec<Value> = app.models.list().iter().map(|(name, status)| entry(&app, name, status)).collect();
    Json(json!({ "object": "list", "data": all }))
}

/// `GET /v1/models/{name}`.
pub(crate) async fn model(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let name = name.map_or_else(|_| String::new(), |Path(name)| name);
    let found = app.models.list().into_iter().find(|(known, _)| *known == name);
    match found {
        Some((name, status)) => Ok(Json(entry(&app, name, &status))),
        None => Err(ApiError::not_found(
            "model_not_found",
            "there is no model of this name; GET /v1/models lists them",
        )),
    }
}

/// `POST /tokenize`.
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    mut fields: Fields,
) -> Result<Json<Value>, ApiError> {
    let model: Option<String> = fields.take("model")?;
    let content: String = fields.need("content")?;
    let add_special = fields.take("add_special")?.unwrap_or(false);
    fields.end()?;
    let model = app.models.get(model.as_deref()).await?;
    let tokens = blocking(&app, move || Ok(model.engine().encode(&content, add_special)?)).await?;
    Ok(Json(json!({ "tokens": tokens })))
}

/// `POST /detokenize`.
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    mut fields: Fields,
) -> Result<Json<Value>, ApiError> {
    let model: Option<String> = fields.take("model")?;
    let tokens: Vec<u32> = fields.need("tokens")?;
    fields.end()?;
    let model = app.models.get(model.as_deref()).await?;
    let decode = move || {
        let engine = model.engine();
        let tokenizer = engine.tokenizer().ok_or(bitnet_burn_engine::EngineError::NoTokenizer)?;
        Ok(tokenizer.decode(&tokens, false).map_err(bitnet_burn_engine::EngineError::from)?)
    };
    let content = blocking(&app, decode).await?;
    Ok(Json(json!({ "content": content })))
}

/// Runs what takes long, such as cutting a long text into tokens, on a thread that may block. Few run at once; the others
/// wait for their turn, and leave with their client.
pub(crate) async fn blocking<T: Send + 'static>(
    app: &App,
    run: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let turn = tokio::time::timeout(app.options.request_time, app.turns.clone().acquire_owned()).await;
    let Ok(Ok(turn)) = turn else {
        return Err(ApiError::busy("too many requests are being prepared: try again later"));
    };
    let run = move || {
        let result = run();
        // Work goes on when its client has left, and so does its turn.
        drop(turn);
        result
    };
    tokio::task::spawn_blocking(run).await.unwrap_or_else(|_| {
        tracing::error!("a request panicked: please report it");
        Err(ApiError::internal("the server failed on this request; its log has the reason"))
    })
}
