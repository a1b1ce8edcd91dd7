//! `/v1/embeddings`: vectors of texts.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use bitnet_burn_engine::embed::EmbedOptions;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::fields::{Body, OneOrMany, refuse_unknown};
use crate::serve::App;
use crate::text::blocking;

/// Texts of a request at most.
const MOST_TEXTS: usize = 2048;

#[derive(Deserialize)]
pub(crate) struct Request {
    model: Option<String>,
    input: OneOrMany<String>,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
    #[serde(rename = "user")]
    _user: Option<Value>,
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

/// `POST /v1/embeddings`.
pub(crate) async fn embeddings(
    State(app): State<Arc<App>>,
    Body(request): Body<Request>,
) -> Result<Json<Value>, ApiError> {
    refuse_unknown(&request.unknown)?;
    let as_base64 = match request.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::field("encoding_format", "encoding_format is float or base64")),
    };
    let texts = Vec::from(request.input);
    if texts.is_empty() || texts.len() > MOST_TEXTS {
        let message = format!("input has {} texts, but must have 1 to {MOST_TEXTS}", texts.len());
        return Err(ApiError::field("input", message));
    }
    let model = app.models.get(request.model.as_deref()).await?;
    // One after the other: each uses all threads.
    let _one = model.embedding.lock().await;
    let computing = model.clone();
    let dimensions = request.dimensions;
    let vectors = blocking(move || {
        let vectors = computing.engine().embed(&texts, &EmbedOptions::default())?;
        match (dimensions, vectors.first()) {
            (Some(asked), Some(vector)) if asked != vector.values.len() => {
                let message =
                    format!("dimensions is {asked}, but this model's vectors have {}", vector.values.len());
                Err(ApiError::field("dimensions", message))
            }
            _ => Ok(vectors),
        }
    })
    .await?;
    let tokens: usize = vectors.iter().map(|vector| vector.tokens).sum();
    let entry = |(index, vector): (usize, &bitnet_burn_engine::embed::Embedding)| {
        let embedding = if as_base64 { json!(base64(&vector.values)) } else { json!(vector.values) };
        json!({ "object": "embedding", "index": index, "embedding": embedding })
    };
    let data: Vec<Value> = vectors.iter().enumerate().map(entry).collect();
    Ok(Json(json!({
        "object": "list",
        "data": data,
        "model": model.name,
        "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
    })))
}

/// The f32 values in little-endian order, in base64, as OpenAI's clients ask for by default.
fn base64(values: &[f32]) -> String {
    use base64::Engine as _;
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
