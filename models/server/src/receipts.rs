//! Receipts of answers: what anybody needs to compute an answer again and to compare it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use axum::extract::{Path as UrlPath, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bitnet_burn_engine::generate::Generation;
use bitnet_burn_engine::receipt::{GenerationRecord, ModelRecord, Receipt};
use bitnet_burn_engine::report::{Execution, RunReport};
use bitnet_burn_engine::schedule::Request;

use crate::ApiError;
use crate::models::Loaded;
use crate::serve::App;

/// Answers whose receipts can be had. Older ones are forgotten.
const MOST: usize = 1024;

/// What a receipt is made of, once it is asked for.
pub(crate) struct Stored {
    model: Weak<Loaded>,
    generation: Generation,
    record: GenerationRecord,
    execution: Execution,
}

impl Stored {
    /// Of an answer that is complete.
    pub(crate) fn new(
        model: &Arc<Loaded>,
        request: &Request,
        generation: Generation,
        execution: Execution,
    ) -> Self {
        let engine = model.engine();
        let record = engine.generation_record(&request.prompt, &request.options, false, &generation);
        Self { model: Arc::downgrade(model), generation, record, execution }
    }

    /// The receipt's text. Reads the model's files, the first time.
    fn text(&self) -> Result<String, ApiError> {
        let model = self.model.upgrade().ok_or_else(|| {
            ApiError::not_found("receipt_not_found", "the model of this answer was unloaded since")
        })?;
        let engine = model.engine();
        let fail = |error: &dyn std::fmt::Display| {
            tracing::error!("a receipt can't be made: {error}");
            ApiError::internal("the receipt can't be made; the server's log has the reason")
        };
        let record = match model.record.get() {
            Some(record) => {
                ModelRecord::still_holds(engine.checkpoint()).map_err(|error| fail(&error))?;
                record
            }
            None => {
                let record = engine.model_record().map_err(|error| fail(&error))?;
                model.record.get_or_init(|| record)
            }
        };
        let mut report = RunReport::new(engine.summary().clone(), &self.generation, self.execution.clone());
        report.seed = (self.record.sampling.temperature > 0.0).then_some(self.record.sampling.seed);
        // No path of this machine leaves it.
        let mut record = record.clone();
        record.path = file_name(&record.path);
        if let Some(adapter) = &mut record.adapter {
            adapter.path = file_name(&adapter.path);
        }
        if let Some(adapter) = &mut report.execution.adapter {
            adapter.path = file_name(&adapter.path);
        }
        report.model.path = file_name(&report.model.path);
        report.execution.tuning.cache_file = None;
        for kernel in &mut report.execution.kernels {
            kernel.origin = file_name(Path::new(&kernel.origin)).to_string_lossy().into_owned();
        }
        let generation = Some(self.record.clone());
        let mut receipt = Receipt::new("serve", record, &report, generation).map_err(|error| fail(&error))?;
        receipt.program.arguments.clear();
        receipt.to_text().map_err(|error| fail(&error))
    }
}

fn file_name(path: &Path) -> PathBuf {
    path.file_name().map_or_else(PathBuf::new, PathBuf::from)
}

/// The receipts of the last answers.
#[derive(Default)]
pub(crate) struct Receipts {
    stored: Mutex<VecDeque<(String, Arc<Stored>)>>,
    count: AtomicU64,
}

impl Receipts {
    /// Keeps it, and gives its name.
    pub(crate) fn store(&self, stored: Stored) -> String {
        use std::hash::{BuildHasher as _, Hasher as _, RandomState};
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        // Names can't be guessed: a receipt has its prompt.
        let random = || RandomState::new().build_hasher().finish();
        let name = format!("r{count:x}-{:016x}{:016x}", random(), random());
        let mut all = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MOST {
            all.pop_front();
        }
        all.push_back((name.clone(), Arc::new(stored)));
        name
    }

    /// A new name that begins with `kind`, for a response.
    pub(crate) fn next_id(&self, kind: &str) -> String {
        format!("{kind}-{:x}-{:x}", crate::answer::unix_time(), self.count.fetch_add(1, Ordering::Relaxed))
    }

    fn find(&self, name: &str) -> Option<Arc<Stored>> {
        let all = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().find(|(stored, _)| stored == name).map(|(_, stored)| stored.clone())
    }
}

/// `GET /v1/receipts/{id}`.
pub(crate) async fn receipt(
    State(app): State<Arc<App>>,
    UrlPath(id): UrlPath<String>,
) -> Result<Response, ApiError> {
    let stored = app.receipts.find(&id).ok_or_else(|| {
        let message = format!("there is no receipt of that name: the last {MOST} answers have one");
        ApiError::not_found("receipt_not_found", message)
    })?;
    // It may read and hash gigabytes.
    let text = crate::text::blocking(&app, move || stored.text()).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}
