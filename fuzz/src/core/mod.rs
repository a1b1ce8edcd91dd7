//! Targets that need the formats and the manager only.
//!
//! A target takes any bytes, and returns whether they were accepted. It panics if the code under test panics, or accepts
//! what it should refuse, or if what was read is not what is read again after it was written.

pub mod caches;
pub mod descriptor;
pub mod gguf;
pub mod safetensors;
