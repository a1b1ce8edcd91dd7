//! Systems on which nothing is contained.

use std::path::Path;
use std::sync::Arc;

use bitnet_burn_plugin::abi::Signature;

use super::Held;
use crate::manager::{Few, Part};
use crate::memory::{Activations, PageArena};
use crate::plugin::{Described, Kernel, KernelFailure};

/// Plugins are not contained on this system, so this has no values.
#[derive(Debug)]
pub(crate) enum Contained {}

impl Contained {
    pub fn start(_: Held) -> Result<Arc<Self>, String> {
        Err(format!(
            "this version contains plugins on Linux alone (x86-64 and aarch64), and this is {}",
            std::env::consts::OS
        ))
    }

    pub fn described(&self) -> &Described {
        match *self {}
    }

    pub fn arena(&self) -> &PageArena {
        match *self {}
    }

    pub fn claims(&self, _: &Kernel, _: &Signature) -> Result<bool, KernelFailure> {
        match *self {}
    }

    pub fn why_not(&self, _: &Kernel, _: &Signature) -> Option<String> {
        match *self {}
    }

    pub fn packed_bytes(&self, _: &Kernel, _: (usize, usize)) -> Result<Option<usize>, KernelFailure> {
        match *self {}
    }

    pub fn pack(&self, _: &Kernel, _: (usize, usize), _: &[u8], _: &mut [u8]) -> Result<(), KernelFailure> {
        match *self {}
    }

    pub fn unpack(&self, _: &Kernel, _: (usize, usize), _: &[u8], _: &mut [u8]) -> Result<(), KernelFailure> {
        match *self {}
    }

    pub fn multiply(
        &self,
        _: &[Part],
        _: &Activations,
        _: &mut [f32],
        _: usize,
    ) -> Few<Option<KernelFailure>> {
        match *self {}
    }
}

/// The child's side.
pub(crate) fn hold(_: &Path, _: &Path, _: &str, role: &str) -> i32 {
    eprintln!("the gate's helper knows no role {role:?} on this system");
    2
}
