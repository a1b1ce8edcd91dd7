//! Models by name: loaded when they are first asked for, unloaded when others need their memory or when they are idle.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bitnet_burn_engine::Engine;
use bitnet_burn_engine::chat::{ChatError, ChatTemplate};
use bitnet_burn_engine::receipt::ModelRecord;
use bitnet_burn_engine::schedule::{Scheduler, SchedulerOptions};
use bitnet_burn_engine::tools::CallForm;
use serde::Serialize;

use crate::ApiError;

/// Why a model can't be loaded.
pub type LoadError = Box<dyn std::error::Error + Send + Sync>;

/// Opens a model's files.
type Open = Box<dyn Fn() -> Result<Engine, LoadError> + Send + Sync>;

/// A model that can be loaded.
pub struct ModelSource {
    /// What requests call it.
    pub name: String,
    /// Bytes that it will take, roughly: its files' size.
    pub bytes: u64,
    /// Opens it.
    pub open: Open,
}

impl std::fmt::Debug for ModelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelSource").field("name", &self.name).field("bytes", &self.bytes).finish()
    }
}

/// How models share the machine.
#[derive(Clone, Debug, Default)]
pub struct ModelsOptions {
    /// Bytes that the loaded models may take together, by the size of their files. `None`: all stay loaded.
    pub memory: Option<u64>,
    /// A model that was not used for this long is unloaded. `None`: it stays.
    pub idle: Option<Duration>,
    /// Changes the scheduler's defaults for an engine.
    pub scheduler: SchedulerLimits,
}

/// Limits of each model's scheduler. What is `None` is as [`SchedulerOptions::of`] says.
#[derive(Clone, Copy, Debug, Default)]
pub struct SchedulerLimits {
    /// Requests that are computed at once at most.
    pub parallel: Option<usize>,
    /// Requests that wait at most.
    pub queue: Option<usize>,
    /// Bytes of the KV cache at most.
    pub cache_bytes: Option<u64>,
    /// Tokens that are guessed ahead at most.
    pub draft: Option<usize>,
}

/// A model that is ready.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub name: String,
    pub scheduler: Scheduler,
    /// Or the reason why the model has no template.
    pub template: Result<ChatTemplate, String>,
    /// How it calls tools.
    pub call_form: CallForm,
    /// Embeddings are computed one request after the other: each uses all threads.
    pub embedding: Arc<tokio::sync::Mutex<()>>,
    /// The hashes of its files, once they were asked for.
    pub record: OnceLock<ModelRecord>,
}

impl Loaded {
    pub(crate) fn engine(&self) -> &Engine {
        self.scheduler.engine()
    }
}

/// What `/health` and `/v1/models` say about a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum Status {
    Unloaded,
    Loading,
    Ready { chat: bool, context: usize },
    Failed { problem: String },
}

#[derive(Debug)]
struct Entry {
    source: Arc<ModelSource>,
    /// Held while it is loaded, so that this happens once.
    loaded: tokio::sync::Mutex<Option<Arc<Loaded>>>,
    status: Mutex<Status>,
    used: Mutex<Instant>,
}

/// All models of a server.
#[derive(Debug)]
pub struct Models {
    entries: Vec<Entry>,
    options: ModelsOptions,
    /// One model is loaded at a time: loading takes all threads, and the memory must be counted.
    loading: tokio::sync::Mutex<()>,
    /// New requests pass it. It is closed while a model waits for the memory of others.
    gate: tokio::sync::RwLock<()>,
}

/// Why a model is not there.
#[derive(Debug)]
enum NotLoaded {
    /// It can't be loaded.
    Failed(LoadError),
    /// Requests for other models use the memory.
    Busy,
}

/// How often a model that waits for memory looks for it, and how long it waits.
const LOOK: Duration = Duration::from_millis(20);
const WAIT: Duration = Duration::from_secs(60);

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What they hold is replaced as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Models {
    /// Models of different names.
    ///
    /// # Errors
    /// If there is none, two have the same name, or one is larger than the memory for all.
    pub fn new(sources: Vec<ModelSource>, options: ModelsOptions) -> Result<Self, String> {
        if sources.is_empty() {
            return Err("a server needs at least one model".into());
        }
        for (i, source) in sources.iter().enumerate() {
            if sources[..i].iter().any(|other| other.name == source.name) {
                return Err(format!("two models are named {:?}: give one another name", source.name));
            }
        }
        let entry = |source| Entry {
            source: Arc::new(source),
            loaded: tokio::sync::Mutex::default(),
            status: Mutex::new(Status::Unloaded),
            used: Mutex::new(Instant::now()),
        };
        if let Some((memory, large)) =
            options.memory.and_then(|memory| Some((memory, sources.iter().find(|s| s.bytes > memory)?)))
        {
            let (name, bytes) = (&large.name, large.bytes);
            return Err(format!("{name:?} has {bytes} bytes, and all models together may take {memory}"));
        }
        let entries = sources.into_iter().map(entry).collect();
        Ok(Self {
            entries,
            options,
            loading: tokio::sync::Mutex::default(),
            gate: tokio::sync::RwLock::default(),
        })
    }

    /// The names and what is known of the models, in their order.
    pub(crate) fn list(&self) -> Vec<(&str, Status)> {
        let of = |entry: &'_ Entry| locked(&entry.status).clone();
        self.entries.iter().map(|entry| (entry.source.name.as_str(), of(entry))).collect()
    }

    /// Loads the first model, which is the one of requests that name none.
    ///
    /// # Errors
    /// If it can't be loaded.
    pub async fn load_first(self: &Arc<Self>) -> Result<(), LoadError> {
        match self.load(0).await {
            Ok(_) => Ok(()),
            Err(NotLoaded::Failed(error)) => Err(error),
            Err(NotLoaded::Busy) => Err("other models use the memory".into()),
        }
    }

    /// The models that are loaded now.
    pub(crate) fn ready(&self) -> Vec<Arc<Loaded>> {
        let loaded = |entry: &Entry| entry.loaded.try_lock().ok().and_then(|loaded| loaded.clone());
        self.entries.iter().filter_map(loaded).collect()
    }

    /// The model of this name; the first one where a request names none.
    pub(crate) async fn get(self: &Arc<Self>, name: Option<&str>) -> Result<Arc<Loaded>, ApiError> {
        let index = match name {
            None => 0,
            Some(name) => {
                self.entries.iter().position(|entry| entry.source.name == name).ok_or_else(|| {
                    let names: Vec<_> = self.entries.iter().map(|entry| entry.source.name.as_str()).collect();
                    let name: String = name.chars().take(100).collect();
                    let message =
                        format!("there is no model named {name:?}; there are: {}", names.join(", "));
                    ApiError::not_found("model_not_found", message)
                })?
            }
        };
        self.load(index).await.map_err(|problem| {
            let name = &self.entries[index].source.name;
            match problem {
                NotLoaded::Busy => ApiError::busy(format!(
                    "the model {name:?} is not loaded, and requests for other models use the memory: try again later"
                )),
                NotLoaded::Failed(error) => {
                    tracing::error!("model {name}: {error}");
                    ApiError::unavailable(format!(
                        "the model {name:?} can't be loaded; the server's log has the reason"
                    ))
                }
            }
        })
    }

    async fn load(self: &Arc<Self>, index: usize) -> Result<Arc<Loaded>, NotLoaded> {
        drop(self.gate.read().await);
        let entry = &self.entries[index];
        *locked(&entry.used) = Instant::now();
        if let Some(loaded) = &*entry.loaded.lock().await {
            return Ok(loaded.clone());
        }
        // A task of its own: it goes on when the client that asked leaves.
        let this = self.clone();
        let task = tokio::spawn(async move { this.load_now(index).await });
        task.await.unwrap_or_else(|_| Err(NotLoaded::Failed("loading panicked: please report it".into())))
    }

    async fn load_now(&self, index: usize) -> Result<Arc<Loaded>, NotLoaded> {
        let _one = self.loading.lock().await;
        let entry = &self.entries[index];
        if let Some(loaded) = &*entry.loaded.lock().await {
            return Ok(loaded.clone());
        }
        if !self.make_room(index) {
            // New requests wait, so that those that run come to an end.
            let _closed = self.gate.write().await;
            let begun = Instant::now();
            while !self.make_room(index) {
                if begun.elapsed() > WAIT {
                    return Err(NotLoaded::Busy);
                }
                tokio::time::sleep(LOOK).await;
            }
        }
        *locked(&entry.status) = Status::Loading;
        let (source, limits) = (entry.source.clone(), self.options.scheduler);
        let result = tokio::task::spawn_blocking(move || open(&source, limits)).await;
        let result = result.unwrap_or_else(|_| Err("loading panicked: please report it".into()));
        *locked(&entry.status) = match &result {
            Ok(loaded) => {
                Status::Ready { chat: loaded.template.is_ok(), context: loaded.engine().settings().context }
            }
            // Without paths: this is shown to clients.
            Err(_) => {
                Status::Failed { problem: "it can't be loaded; the server's log has the reason".into() }
            }
        };
        let loaded = Arc::new(result.map_err(NotLoaded::Failed)?);
        *entry.loaded.lock().await = Some(loaded.clone());
        Ok(loaded)
    }

    /// Unloads the least recently used models that no request uses, until there is memory for another one. `false` if there
    /// is not.
    fn make_room(&self, wanted: usize) -> bool {
        let Some(memory) = self.options.memory else { return true };
        let needed = self.entries[wanted].source.bytes;
        loop {
            let loaded = self.entries.iter().filter(|entry| match entry.loaded.try_lock() {
                Ok(loaded) => loaded.is_some(),
                // It is being looked up.
                Err(_) => true,
            });
            let taken: u64 = loaded.map(|entry| entry.source.bytes).sum();
            if taken.saturating_add(needed) <= memory {
                return true;
            }
            let mut idle: Vec<&Entry> = self.entries.iter().collect();
            idle.sort_by_key(|entry| *locked(&entry.used));
            if !idle.into_iter().any(Entry::unload) {
                return false;
            }
        }
    }

    /// Unloads models that were not used for long.
    pub(crate) fn unload_idle(&self) {
        let Some(idle) = self.options.idle else { return };
        for entry in &self.entries {
            if locked(&entry.used).elapsed() >= idle && entry.unload() {
                tracing::info!("model {} was idle and is unloaded", entry.source.name);
            }
        }
    }
}

impl Entry {
    /// Unloads it, if it is loaded and no request uses it.
    fn unload(&self) -> bool {
        let Ok(mut loaded) = self.loaded.try_lock() else { return false };
        if loaded.as_ref().is_none_or(|loaded| Arc::strong_count(loaded) > 1) {
            return false;
        }
        *loaded = None;
        *locked(&self.status) = Status::Unloaded;
        true
    }
}

fn open(source: &ModelSource, limits: SchedulerLimits) -> Result<Loaded, LoadError> {
    let engine = (source.open)()?;
    let defaults = SchedulerOptions::of(&engine);
    let options = SchedulerOptions {
        parallel: limits.parallel.unwrap_or(defaults.parallel),
        queue: limits.queue.unwrap_or(defaults.queue),
        cache_bytes: limits.cache_bytes.or(defaults.cache_bytes),
        draft: limits.draft.unwrap_or(defaults.draft),
        ..defaults
    };
    let scheduler = Scheduler::start(&engine, options)?;
    // Its errors are shown to clients, so they name no path.
    let template = match engine.tokenizer().map(ChatTemplate::of) {
        Some(Ok(template)) => Ok(template),
        None | Some(Err(ChatError::NoTemplate)) => Err("the model has no chat template".to_owned()),
        Some(Err(error)) => Err(error.to_string()),
    };
    let source_of_template = engine.tokenizer().and_then(|tokenizer| tokenizer.chat_template());
    Ok(Loaded {
        name: source.name.clone(),
        scheduler,
        template,
        call_form: CallForm::of(source_of_template.unwrap_or_default()),
        embedding: Arc::default(),
        record: OnceLock::new(),
    })
}
