//! The kernels, one folder or file per instruction set.

#![allow(
    clippy::needless_range_loop,
    reason = "a register's number runs through several arrays at once, as in the formulas"
)]

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) mod aarch64;
pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;
