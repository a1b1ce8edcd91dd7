//! Targets that need the engine. What a target is: [`core`](super::core).

pub mod models;
pub mod records;
pub mod texts;
