//! The kernels, one folder or file per instruction set.

#![allow(
    clippy::needless_range_loop,
    reason = "a register's number runs through several arrays at once, as in the formulas"
)]

pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;
