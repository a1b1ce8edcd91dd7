//! Opens BitNet checkpoints and generates text with them.
//!
//! - [`checkpoint`] opens GGUF files and Hugging Face directories; [`load`](mod@load) makes models of them.
//! - [`tokenizer`], [`chat`], [`sampling`] and [`generate`](mod@generate): prompts in, text out.
//! - [`plan`]: where a model should run, and how fast it will be.
//! - [`report`] and [`receipt`]: what a run measured, and what it was made of.

pub mod bench;
pub mod chat;
pub mod checkpoint;
pub mod device_bench;
#[cfg(feature = "default-model")]
pub mod embedded;
pub mod exact;
pub mod generate;
pub mod gguf;
pub mod hf;
pub mod load;
pub mod plan;
pub mod plausible;
pub mod prepack;
pub mod receipt;
pub mod report;
pub mod sampling;
pub mod synth;
pub mod tokenizer;

// The example of the README runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
