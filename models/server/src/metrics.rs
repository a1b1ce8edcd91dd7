//! `/metrics`: what Prometheus reads.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bitnet_burn_engine::schedule::SchedulerStats;
use bitnet_burn_engine::speculate::DraftCounts;
use prometheus_client::encoding::text::{encode, encode_registry};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::ApiError;
use crate::serve::App;

/// The model.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByModel {
    model: String,
}

/// The kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKernel {
    kernel: String,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Outcome {
    Accepted,
    Refused,
    Finished,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    model: String,
    outcome: Outcome,
}

/// Where guesses come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Source {
    LookUp,
    DraftModel,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BySource {
    model: String,
    source: Source,
}

type Histograms = Family<ByModel, Histogram, fn() -> Histogram>;

/// What is counted as it happens. The scheduler counts the rest.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<ByOutcome, Counter>,
    first_token: Histograms,
    next_token: Histograms,
}

/// From a millisecond to two minutes.
const FIRST_TOKEN: [f64; 14] =
    [0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0];
/// From a tenth of a millisecond to five seconds.
const NEXT_TOKEN: [f64; 14] =
    [0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("bitnet");
        let requests = Family::<ByOutcome, Counter>::default();
        registry.register("requests", "Answers asked for, by what became of them", requests.clone());
        let first_token: Histograms = Family::new_with_constructor(|| Histogram::new(FIRST_TOKEN));
        let help = "Seconds from a request to the first token of its answer";
        registry.register("first_token_seconds", help, first_token.clone());
        let next_token: Histograms = Family::new_with_constructor(|| Histogram::new(NEXT_TOKEN));
        registry.register("token_seconds", "Seconds between two tokens of an answer", next_token.clone());
        Self { registry, requests, first_token, next_token }
    }

    fn count(&self, model: &str, outcome: Outcome) {
        self.requests.get_or_create(&ByOutcome { model: model.to_owned(), outcome }).inc();
    }

    pub(crate) fn submitted(&self, model: &str, accepted: bool) {
        self.count(model, if accepted { Outcome::Accepted } else { Outcome::Refused });
    }

    pub(crate) fn finished(&self, model: &str) {
        self.count(model, Outcome::Finished);
    }

    pub(crate) fn failed(&self, model: &str) {
        self.count(model, Outcome::Failed);
    }

    pub(crate) fn first_token(&self, model: &str, time: Duration) {
        self.first_token.get_or_create(&ByModel { model: model.to_owned() }).observe(time.as_secs_f64());
    }

    pub(crate) fn next_token(&self, model: &str, time: Duration) {
        self.next_token.get_or_create(&ByModel { model: model.to_owned() }).observe(time.as_secs_f64());
    }
}

type Value = fn(&SchedulerStats) -> u64;

const COUNTERS: [(&str, &str, Value); 7] = [
    ("prompt_tokens", "Tokens of prompts that were computed", |s| s.prompt_tokens),
    ("reused_tokens", "Tokens of prompts that the cache had", |s| s.reused_tokens),
    ("reused_prompts", "Prompts of which the cache had a beginning", |s| s.reused_prompts),
    ("generated_tokens", "Tokens of answers", |s| s.generated_tokens),
    ("cancelled_requests", "Answers whose clients left", |s| s.cancelled),
    ("steps", "Forward passes", |s| s.steps),
    ("rows", "Rows of all forward passes", |s| s.rows),
];

type Count = fn(&DraftCounts) -> u64;

const DRAFTS: [(&str, &str, Count); 2] = [
    ("drafted_tokens", "Tokens that were guessed ahead, by where the guesses came from", |counts| {
        counts.drafted
    }),
    ("accepted_tokens", "Guessed tokens that were right, by where the guesses came from", |counts| {
        counts.accepted
    }),
];

const GAUGES: [(&str, &str, Value); 4] = [
    ("running_requests", "Requests that are computed", |s| s.running as u64),
    ("waiting_requests", "Requests that wait", |s| s.waiting as u64),
    ("cache_bytes", "Bytes of the KV cache that are promised or kept", |s| s.cache_bytes),
    ("kept_prompts", "Earlier prompts whose cache is kept", |s| s.kept as u64),
];

/// `GET /metrics`.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let fail = |error: std::fmt::Error| ApiError::internal(format!("the metrics can't be written: {error}"));
    let mut text = String::new();
    encode_registry(&mut text, &app.metrics.registry).map_err(fail)?;
    // The schedulers' counts, as they are now.
    let mut now = Registry::with_prefix("bitnet");
    let models = app.models.ready();
    let stats: Vec<(ByModel, SchedulerStats)> =
        models.iter().map(|model| (ByModel { model: model.name.clone() }, model.scheduler.stats())).collect();
    for (name, help, value) in COUNTERS {
        let family = Family::<ByModel, Counter>::default();
        for (model, stats) in &stats {
            family.get_or_create(model).inc_by(value(stats));
        }
        now.register(name, help, family);
    }
    for (name, help, value) in DRAFTS {
        let family = Family::<BySource, Counter>::default();
        for (ByModel { model }, stats) in &stats {
            let sources =
                [(Source::LookUp, &stats.drafts.look_up), (Source::DraftModel, &stats.drafts.model)];
            for (source, counts) in sources {
                family.get_or_create(&BySource { model: model.clone(), source }).inc_by(value(counts));
            }
        }
        now.register(name, help, family);
    }
    for (name, help, value) in GAUGES {
        let family = Family::<ByModel, Gauge>::default();
        for (model, stats) in &stats {
            family.get_or_create(model).set(value(stats).try_into().unwrap_or(i64::MAX));
        }
        now.register(name, help, family);
    }
    if let Some(model) = models.first() {
        // One manager computes for all models.
        let execution = model.engine().execution();
        let calls = Family::<ByKernel, Counter>::default();
        for kernel in execution.kernels.iter().filter(|kernel| kernel.calls > 0) {
            calls.get_or_create(&ByKernel { kernel: kernel.kernel.clone() }).inc_by(kernel.calls);
        }
        now.register("kernel_calls", "Matmuls by kernel", calls);
        let fallbacks = Counter::<u64>::default();
        fallbacks.inc_by(execution.fallbacks.len() as u64);
        now.register("fallbacks", "Kernels that failed and were replaced", fallbacks);
    }
    encode(&mut text, &now).map_err(fail)?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}
