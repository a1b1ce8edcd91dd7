//! Many requests at once: one thread owns the model and computes the rows of all requests together.
//!
//! Each step is one forward pass. It takes the next row of every answer, and rows of the prompts that are not complete
//! yet, up to a number of rows: a long prompt is computed in slices beside the answers of others (continuous batching).
//! A row has the same bits beside any other rows, so on CPUs an answer depends on its request alone: the tokens are those
//! of a [`Session`](crate::Session) with the same prompt and options. On GPUs they may differ in the last bits.
//!
//! - A request is admitted when the KV cache has memory for all of its positions. Until then it waits, in order. A request
//!   that runs is never dropped for want of memory.
//! - Prompts that begin like an earlier one start from its cache. The least recently used beginnings give way first.
//! - Tokens are guessed ahead and checked, several in one forward pass ([`speculate`](crate::speculate)): they are the same
//!   as without guessing.
//!
//! ```
//! use bitnet_burn_engine::Engine;
//! use bitnet_burn_engine::schedule::{Request, Scheduler, SchedulerOptions};
//!
//! # #[cfg(feature = "default-model")] {
//! let engine = Engine::options().open_built_in()?;
//! let scheduler = Scheduler::start(&engine, SchedulerOptions::of(&engine))?;
//! let request = |prompt| -> Result<_, bitnet_burn_engine::EngineError> {
//!     let mut options = engine.generate_options();
//!     options.max_new_tokens = 8;
//!     Ok(Request::new(engine.encode(prompt, true)?, options))
//! };
//! let answers = scheduler.generate_batch([request("There was")?, request("A fox")?]);
//! for answer in answers {
//!     println!("{}", answer?.text);
//! }
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod sequence;
mod work;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use serde::Serialize;

use crate::constraint::Constrained;
use crate::engine::{Engine, EngineError};
use crate::generate::{GenerateError, GenerateOptions, Generation};
use crate::sampling::{Sampler, StopMatcher};
use crate::speculate::{DEFAULT_DRAFT, Drafts, Speculation};
use crate::text::human_bytes;
use work::Work;

/// How much is computed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerOptions {
    /// Rows of a forward pass at most. All answers' next tokens are computed in each; what is left is for prompts.
    pub rows: usize,
    /// Requests that are computed at once at most.
    pub parallel: usize,
    /// Requests that wait at most; a further one is [`SubmitError::Busy`].
    pub queue: usize,
    /// Bytes of the KV cache at most, those of earlier prompts included. `None`: unlimited.
    pub cache_bytes: Option<u64>,
    /// Tokens that are guessed ahead at most. 0: none are. On GPUs none are either way.
    pub draft: usize,
}

impl SchedulerOptions {
    /// The defaults for an engine: the rows that it was opened with, 16 requests at once, 256 that wait, up to 8 guessed
    /// tokens, and the memory of 16 full contexts, or three quarters of what is free if that is less.
    pub fn of(engine: &Engine) -> Self {
        let parallel = 16;
        let full = engine.sequence_bytes(engine.settings().context).saturating_mul(parallel as u64);
        let free = engine.cache_room().map_or(u64::MAX, |bytes| bytes / 4 * 3);
        Self {
            rows: engine.settings().rows,
            parallel,
            queue: 256,
            cache_bytes: Some(full.min(free)),
            draft: DEFAULT_DRAFT,
        }
    }
}

/// One prompt that is to be continued.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// How it is continued. (`chunk` is not read: a prompt gets the rows that a step has for it.)
    pub options: GenerateOptions,
    /// The answer ends with an error when this has passed.
    pub deadline: Option<Instant>,
    /// With each token, its log probability and those of this many most likely tokens.
    pub logprobs: Option<usize>,
}

impl Request {
    /// A request without a deadline and log probabilities.
    pub fn new(prompt: Vec<u32>, options: GenerateOptions) -> Self {
        Self { prompt, options, deadline: None, logprobs: None }
    }
}

/// Natural logarithms of probabilities: the softmax of a position's logits, before temperature and all other settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LogProbs {
    /// Of the token that was drawn.
    pub chosen: f32,
    /// The most likely tokens, the most likely one first.
    pub top: Vec<(u32, f32)>,
}

/// What happens to a request, in order. The last event is [`Finished`](Self::Finished) or [`Failed`](Self::Failed).
#[derive(Debug)]
pub enum Event {
    /// A token was drawn.
    Token {
        /// Its id.
        token: u32,
        /// Text that is certain now: whole characters, and no part of a stop string. Often empty.
        text: String,
        /// If they were asked for.
        logprobs: Option<LogProbs>,
    },
    /// The answer is complete.
    Finished {
        /// The rest of the text.
        text: String,
        /// All tokens, why they ended, and the times.
        generation: Generation,
        /// Whether a plugin's kernel turned out to be wrong meanwhile, so that the answer may be.
        in_doubt: bool,
    },
    /// There is no answer, or no more of it.
    Failed(RequestError),
}

/// Why a request failed after it was accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The model, the sampler or the tokenizer. If the forward pass of a step failed, each of its requests has the message.
    #[error("{0}")]
    Generate(Arc<GenerateError>),
    /// The deadline has passed.
    #[error("the time for this request has passed, after {tokens} tokens of its answer")]
    Deadline {
        /// Tokens that were generated.
        tokens: usize,
    },
    /// The scheduler ended first.
    #[error("the model was unloaded before the answer was complete")]
    Stopped,
}

/// Why a request was not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// Too many requests wait.
    #[error("{waiting} requests are waiting already: try again later")]
    Busy {
        /// Requests that wait.
        waiting: usize,
    },
    /// The prompt, or an option.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// It does not fit the memory for the KV cache, even alone.
    #[error(
        "the prompt and {new} new tokens need {} of KV cache, and there are {}: ask for fewer tokens",
        human_bytes(*.bytes), human_bytes(*.limit)
    )]
    TooLarge {
        /// Tokens to generate at most, as far as the context goes.
        new: usize,
        /// Bytes of the KV cache for prompt and answer.
        bytes: u64,
        /// Bytes of the whole KV cache.
        limit: u64,
    },
    /// The scheduler has ended.
    #[error("the model was unloaded")]
    Stopped,
}

/// An accepted request. It goes on when this is dropped.
#[derive(Clone, Debug)]
pub struct Ticket(Arc<AtomicBool>);

impl Ticket {
    /// Ends the request before the next step. It is [`Finished`](Event::Finished) then, as cancelled.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A complete answer.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The whole text. Empty for a model without a tokenizer.
    pub text: String,
    /// The tokens, why they ended, and the times.
    pub generation: Generation,
    /// Log probabilities of each token, if they were asked for.
    pub logprobs: Vec<LogProbs>,
    /// Whether a plugin's kernel turned out to be wrong meanwhile, so that the answer may be.
    pub in_doubt: bool,
}

/// What a scheduler has done so far, and what it is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SchedulerStats {
    /// Requests that are computed now.
    pub running: usize,
    /// Requests that wait now.
    pub waiting: usize,
    /// Requests that were answered completely.
    pub finished: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Tokens of prompts that were computed.
    pub prompt_tokens: u64,
    /// Tokens of prompts that an earlier request's cache had.
    pub reused_tokens: u64,
    /// Requests that began with what an earlier request's cache had.
    pub reused_prompts: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Tokens that were guessed ahead.
    pub drafts: Drafts,
    /// Forward passes.
    pub steps: u64,
    /// Rows of all forward passes.
    pub rows: u64,
    /// Bytes that are promised to running requests and taken by earlier prompts.
    pub cache_bytes: u64,
    /// Earlier prompts whose cache is kept.
    pub kept: usize,
}

type OnEvent = Box<dyn FnMut(Event) + Send>;

/// A request on its way to the scheduler's thread.
struct Submitted {
    request: Request,
    /// Made where errors still reach the caller.
    sampler: Sampler,
    constrained: Option<Box<Constrained>>,
    stops: StopMatcher,
    /// Of the KV cache for all of its positions.
    bytes: u64,
    cancelled: Arc<AtomicBool>,
    on_event: OnEvent,
    at: Instant,
}

/// What all threads see.
#[derive(Debug, Default)]
struct Shared {
    stats: Mutex<SchedulerStats>,
    stopping: AtomicBool,
}

/// Computes many requests at once; see the [module](self). Dropping it ends all requests.
#[derive(Debug)]
pub struct Scheduler {
    engine: Engine,
    options: SchedulerOptions,
    shared: Arc<Shared>,
    submissions: Option<mpsc::Sender<Box<Submitted>>>,
    thread: Option<JoinHandle<()>>,
}

impl Scheduler {
    /// Starts the thread that computes.
    ///
    /// # Errors
    /// If a device does not support the KV cache's type, or the system gives no thread.
    pub fn start(engine: &Engine, options: SchedulerOptions) -> Result<Self, EngineError> {
        let options =
            SchedulerOptions { rows: options.rows.max(1), parallel: options.parallel.max(1), ..options };
        let cache = engine.cache()?;
        let speculation = Speculation::new(engine, options.draft)?;
        let shared = Arc::new(Shared::default());
        let (submissions, receiver) = mpsc::channel();
        let thread = {
            let (engine, shared) = (engine.clone(), shared.clone());
            std::thread::Builder::new().name("scheduler".into()).stack_size(8 << 20).spawn(move || {
                let mut work = Work::new(&engine, options, cache, speculation, &shared);
                // The requests' callers are told, as their functions are dropped.
                if catch_unwind(AssertUnwindSafe(|| work.run(&receiver))).is_err() {
                    shared.stopping.store(true, Ordering::Relaxed);
                    tracing::error!(
                        "the scheduler's thread panicked: its requests are lost; please report it"
                    );
                }
            })
        };
        let thread = Some(thread.map_err(|error| EngineError::Thread { error })?);
        Ok(Self { engine: engine.clone(), options, shared, submissions: Some(submissions), thread })
    }

    /// The engine whose model computes.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The options.
    pub fn options(&self) -> &SchedulerOptions {
        &self.options
    }

    /// What was done so far.
    pub fn stats(&self) -> SchedulerStats {
        *self.shared.stats()
    }

    /// Hands a request over. `on_event` is told what becomes of it, on the scheduler's thread: it should do little, such
    /// as sending the event on through a channel. If the scheduler's thread dies, it is dropped without a last event.
    ///
    /// # Errors
    /// If the prompt is empty or too long, an option is impossible, or too many requests wait.
    pub fn submit(
        &self,
        request: Request,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<Ticket, SubmitError> {
        let waiting = self.shared.stats().waiting;
        if waiting >= self.options.queue {
            return Err(SubmitError::Busy { waiting });
        }
        self.enqueue(request, Box::new(on_event))
    }

    fn enqueue(&self, request: Request, on_event: OnEvent) -> Result<Ticket, SubmitError> {
        let tokens = request.prompt.len();
        let context = self.engine.settings().context;
        if tokens == 0 {
            return Err(EngineError::from(GenerateError::EmptyPrompt).into());
        }
        if tokens > context {
            return Err(EngineError::PromptTooLong { tokens, context }.into());
        }
        let vocabulary = self.engine.checkpoint().config().vocab_size;
        if let Some(&token) = request.prompt.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(EngineError::from(bitnet_burn::ForwardError::Token { token, vocabulary }).into());
        }
        let constrained = self.engine.constrain(request.options.constraint.as_ref())?;
        let sampler = Sampler::new(request.options.sampling.clone()).map_err(GenerateError::from);
        let sampler = sampler.map_err(EngineError::from)?;
        let stops = StopMatcher::new(&request.options.stop_strings).map_err(GenerateError::from);
        let stops = stops.map_err(EngineError::from)?;
        let new = request.options.max_new_tokens.min(context - tokens);
        let of_draft = self.engine.draft_model().filter(|_| self.options.draft > 0);
        let bytes = self.engine.sequence_bytes(tokens + new)
            + of_draft.map_or(0, |draft| draft.sequence_bytes(tokens + new));
        if let Some(limit) = self.options.cache_bytes.filter(|&limit| bytes > limit) {
            return Err(SubmitError::TooLarge { new, bytes, limit });
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        let ticket = Ticket(cancelled.clone());
        let at = Instant::now();
        let submitted =
            Box::new(Submitted { request, sampler, constrained, stops, bytes, cancelled, on_event, at });
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Err(SubmitError::Stopped);
        }
        // Counted here, so that the bound of the queue holds while the scheduler's thread computes.
        self.shared.stats().waiting += 1;
        match &self.submissions {
            Some(sender) if sender.send(submitted).is_ok() => Ok(ticket),
            _ => Err(SubmitError::Stopped),
        }
    }

    /// The answer to a request, when it is complete. The queue's bound does not count here: this thread waits.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), and if the request fails.
    pub fn generate(&self, request: Request) -> Result<Completion, BatchError> {
        let mut answers = self.generate_batch([request]);
        answers.pop().unwrap_or(Err(BatchError::Request(RequestError::Stopped)))
    }

    /// The answers to many requests, in their order, when all are complete.
    pub fn generate_batch(
        &self,
        requests: impl IntoIterator<Item = Request>,
    ) -> Vec<Result<Completion, BatchError>> {
        let submit = |request| {
            let (sender, events) = mpsc::channel();
            // Nobody is left to be told where sending fails.
            self.enqueue(request, Box::new(move |event| drop(sender.send(event)))).map(|_| events)
        };
        let submitted: Vec<_> = requests.into_iter().map(submit).collect();
        let collect = |events: mpsc::Receiver<Event>| {
            let (mut all, mut logprobs) = (String::new(), Vec::new());
            for event in events {
                match event {
                    Event::Token { text, logprobs: of_token, .. } => {
                        all.push_str(&text);
                        logprobs.extend(of_token);
                    }
                    Event::Finished { text, generation, in_doubt } => {
                        all.push_str(&text);
                        return Ok(Completion { text: all, generation, logprobs, in_doubt });
                    }
                    Event::Failed(error) => return Err(error.into()),
                }
            }
            Err(RequestError::Stopped.into())
        };
        submitted.into_iter().map(|events| events.map_err(BatchError::from).and_then(collect)).collect()
    }
}

/// Why there is no [`Completion`].
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// The request was not accepted.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// It failed.
    #[error(transparent)]
    Request(#[from] RequestError),
}

impl Shared {
    fn stats(&self) -> std::sync::MutexGuard<'_, SchedulerStats> {
        // Numbers alone: a panic leaves them whole.
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        // Wakes the thread where it waits for requests.
        self.submissions = None;
        if let Some(thread) = self.thread.take() {
            // Its panic was logged.
            drop(thread.join());
        }
    }
}
