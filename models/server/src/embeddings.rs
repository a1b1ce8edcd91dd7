//! `/v1/embeddings`: vectors of texts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use bitnet_burn_engine::embed::{EmbedOptions, Embedding};
use serde::Serialize;

use crate::ApiError;
use crate::fields::{Fields, OneOrMany};
use crate::serve::App;
use crate::text::blocking;

/// Texts between two looks at the clock and at the client.
const AT_ONCE: usize = 16;

/// Tells the computing thread that the client has left.
#[derive(Default)]
struct Left(Arc<AtomicBool>);

impl Drop for Left {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Texts of a request at most.
const MOST_TEXTS: usize = 2048;

/// One of the vectors.
#[derive(Serialize)]
struct Entry {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

/// As numbers, in as many digits as f32 has, or as their bytes in base64.
#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
pub(crate) struct Answer {
    object: &'static str,
    data: Vec<Entry>,
    model: String,
    usage: EmbeddingUsage,
}

#[derive(Serialize)]
struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// `POST /v1/embeddings`.
pub(crate) async fn embeddings(
    State(app): State<Arc<App>>,
    mut fields: Fields,
) -> Result<Json<Answer>, ApiError> {
    let model: Option<String> = fields.take("model")?;
    let texts = Vec::from(fields.need::<OneOrMany<String>>("input")?);
    let as_base64 = match fields.take::<String>("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::field("encoding_format", "encoding_format is float or base64")),
    };
    let dimensions: Option<usize> = fields.take("dimensions")?;
    fields.ignore(&["user"]);
    fields.end()?;
    if texts.is_empty() || texts.len() > MOST_TEXTS {
        let message = format!("input has {} texts, but must have 1 to {MOST_TEXTS}", texts.len());
        return Err(ApiError::field("input", message));
    }
    let model = app.models.get(model.as_deref()).await?;
    let one = tokio::time::timeout(app.options.request_time, model.embedding.clone().lock_owned()).await;
    let one = one.map_err(|_| ApiError::busy("other embeddings are being computed: try again later"))?;
    let computing = model.clone();
    let (deadline, left) = (Instant::now() + app.options.request_time, Left::default());
    let client_left = left.0.clone();
    let vectors = blocking(&app, move || {
        let _one = one;
        let embedder = computing.engine().embedder(&EmbedOptions::default())?;
        let mut vectors = Vec::with_capacity(texts.len());
        for texts in texts.chunks(AT_ONCE) {
            if client_left.load(Ordering::Relaxed) || Instant::now() > deadline {
                return Err(ApiError::timeout("the time for this request has passed: send fewer texts"));
            }
            vectors.extend(embedder.embed(texts)?);
        }
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
    let entry = |(index, vector): (usize, Embedding)| {
        let embedding = match as_base64 {
            true => Vector::Base64(base64(&vector.values)),
            false => Vector::Numbers(vector.values),
        };
        Entry { object: "embedding", index, embedding }
    };
    Ok(Json(Answer {
        object: "list",
        data: vectors.into_iter().enumerate().map(entry).collect(),
        model: model.name.clone(),
        usage: EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens },
    }))
}

/// The f32 values in little-endian order, in base64, as OpenAI's clients ask for by default.
fn base64(values: &[f32]) -> String {
    use base64::Engine as _;
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
