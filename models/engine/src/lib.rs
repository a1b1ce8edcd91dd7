//! Opens BitNet checkpoints and generates text with them.
//!
//! - [`Engine`] opens a model with everything that it needs; a [`Session`] generates with it.
//! - [`checkpoint`] opens GGUF files and Hugging Face directories; [`load`](mod@load) makes models of them;
//!   [`gguf`] and [`hf`] write them.
//! - [`adapter`]: LoRA adapters, which are added to a model's projections.
//! - [`schedule`]: many requests at once, whose answers do not depend on each other.
//! - [`speculate`]: tokens that are guessed and checked.
//! - [`embed`](mod@embed): vectors of texts.
//! - [`tokenizer`], [`chat`], [`sampling`] and [`generate`](mod@generate): prompts in, text out.
//! - [`compare`](mod@compare): two models, or a model and the logits of another program.
//! - [`constraint`]: answers of a given form, such as a JSON schema.
//! - [`tools`]: calls of functions in answers.
//! - [`plan`]: where a model should run, and how fast it will be.
//! - [`report`] and [`receipt`]: what a run measured, and what it was made of.

pub mod adapter;
pub mod bench;
pub mod chat;
pub mod checkpoint;
pub mod compare;
pub mod constraint;
pub mod device;
pub mod device_bench;
pub mod embed;
#[cfg(feature = "default-model")]
pub mod embedded;
mod engine;
pub mod generate;
pub mod gguf;
mod head;
pub mod hf;
mod kept;
pub mod load;
pub mod plan;
pub mod plausible;
pub mod prepack;
mod projection;
pub mod receipt;
pub mod report;
pub mod sampling;
pub mod schedule;
mod session;
pub mod speculate;
pub mod synth;
pub mod text;
pub mod tokenizer;
pub mod tools;

pub use constraint::{Constraint, ConstraintError};
pub use engine::{Engine, EngineError, EngineOptions, OpenEvent};
pub use generate::GenerateOptions;
pub use session::{Answer, Session, Text};

// The example of the README runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
