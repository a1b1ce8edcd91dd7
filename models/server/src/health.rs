//! Whether the server can answer.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::models::Status;
use crate::serve::App;

/// `GET /health`: 200 where a model is ready or can be loaded, 503 while the only ones load or after they failed.
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    let all: Vec<Status> = app.models.list().into_iter().map(|(_, status)| status).collect();
    let any = |wanted: fn(&Status) -> bool| all.iter().any(wanted);
    let (code, status) = if any(|s| matches!(s, Status::Ready { .. } | Status::Unloaded)) {
        (StatusCode::OK, "ready")
    } else if any(|s| *s == Status::Loading) {
        (StatusCode::SERVICE_UNAVAILABLE, "loading")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "failed")
    };
    (code, Json(json!({ "status": status }))).into_response()
}
