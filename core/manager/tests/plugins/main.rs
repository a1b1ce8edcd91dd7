//! Plugins from files. Most are built here, with the system's C compiler.
//!
//! Not on statically linked targets, which can't load libraries: the emulated ARM tests are such.
#![cfg(all(unix, not(target_feature = "crt-static")))]

mod adapt;
mod attacks;
mod beyond;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod contained;
mod gpu;
mod grown;
mod hostile;
mod objective;
mod policy;
mod support;
mod templates;
mod watched;
