//! What the fuzz targets run, as plain functions, so that ordinary tests run it, too (`tests/tests/fuzz.rs`).

pub mod core;
#[cfg(feature = "engine")]
pub mod engine;
