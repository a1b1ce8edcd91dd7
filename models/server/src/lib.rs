//! Serves models over HTTP, with OpenAI's API, so that an answer depends on its request alone.
//!
//! All requests for a model go to one [`Scheduler`](bitnet_burn_engine::schedule::Scheduler), which computes their rows
//! together. On CPUs a row has the same bits beside any other rows. So the same request, seed included, has the same
//! answer on an idle server, on a busy one, and from `bitnet run`. Each answer names a receipt, with which anybody can
//! repeat it.
//!
//! - [`Models`]: models by name. They are loaded when they are first asked for, and unloaded when memory or time says so.
//! - [`serve`]: answers HTTP on a listener until it is told to stop.
//!
//! What clients may do is bounded: [`ServerOptions`]. TLS is a reverse proxy's business.

mod answer;
mod chat;
mod completions;
mod connection;
mod constraints;
mod embeddings;
mod error;
mod fields;
mod health;
mod metrics;
mod models;
mod page;
mod receipts;
mod security;
mod serve;
mod stream;
mod text;
mod tool_calls;

pub use error::ApiError;
pub use models::{LoadError, ModelSource, Models, ModelsOptions, SchedulerLimits};
pub use serve::{ServerOptions, serve};

// The example of the README compiles with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
