//! The public layouts: packings of weights that every plugin may read by their name, beside the kernels that are built in.
//!
//! A kernel whose [`layout`](crate::abi::Kernel::layout) is `cpu/t2x32` or `cpu/t5x32` brings no packing: the host packs, and
//! kernels of several plugins read the same bytes. So a kernel for prompts can join the built-in one for decode. Its
//! `row_granule` is a multiple of 32, and weights are aligned to 64 bytes. The bits never change; another layout gets
//! another name.

pub mod t2x32;
pub mod t5x32;

use std::ops::Range;

use crate::abi::{self, Message, Status};
use crate::canonical;
use crate::sdk::{self, KernelError, KernelResult, Packing, Signature, WeightsRef};

/// Weight rows in a block of the public layouts: two tiles of 16.
pub const BLOCK_ROWS: usize = 32;
/// Alignment of weights in public layouts.
pub const ALIGNMENT: usize = 64;

/// A layout that every plugin may read.
#[derive(Clone, Copy, Debug)]
pub struct PublicLayout {
    /// Its name in [`layout`](crate::abi::Kernel::layout).
    pub name: &'static str,
    /// As [`Kernel::packed_size`](crate::abi::Kernel::packed_size).
    pub packed_size: unsafe extern "C" fn(n: u64, k: u64) -> u64,
    /// As [`Kernel::pack`](crate::abi::Kernel::pack), for ranges that begin at multiples of [`BLOCK_ROWS`].
    pub pack: Pack,
    /// As [`Kernel::unpack`](crate::abi::Kernel::unpack).
    pub unpack: Pack,
}

/// A function that packs or unpacks.
pub type Pack = unsafe extern "C" fn(*const abi::Weights, *mut u8, u64, u64, *const Message) -> Status;

/// All of them.
pub static PUBLIC: [PublicLayout; 2] = [layout::<T2>("cpu/t2x32"), layout::<T5>("cpu/t5x32")];

/// The public layout of this name.
pub fn find(name: &str) -> Option<&'static PublicLayout> {
    PUBLIC.iter().find(|layout| layout.name == name)
}

const fn layout<P: Packing>(name: &'static str) -> PublicLayout {
    PublicLayout { name, packed_size: sdk::packed_size::<P>, pack: sdk::pack::<P>, unpack: sdk::unpack::<P> }
}

struct T2;
struct T5;

macro_rules! packing {
    ($type:ident, $module:ident) => {
        impl Packing for $type {
            const ROW_GRANULE: usize = BLOCK_ROWS;

            fn supports(_: &Signature) -> bool {
                false
            }

            fn why_not(_: &Signature) -> Option<String> {
                None
            }

            fn granule_bytes(k: usize) -> usize {
                $module::block_bytes(k)
            }

            fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
                $module::pack(canonical, rows, out)
            }

            fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
                $module::unpack(packed, rows, out)
            }
        }
    };
}

packing!(T2, t2x32);
packing!(T5, t5x32);

/// Checks that `rows` are whole blocks of `w`, but for a last one cut off at N.
///
/// # Errors
/// If they are not.
#[inline]
pub fn check_range(w: &WeightsRef, rows: &Range<usize>) -> KernelResult {
    let ends_well = rows.end == w.n() || (rows.end < w.n() && rows.end.is_multiple_of(BLOCK_ROWS));
    if rows.start > rows.end || !rows.start.is_multiple_of(BLOCK_ROWS) || !ends_well {
        return Err(KernelError::invalid(format!("rows {rows:?} of {} are not whole blocks of 32", w.n())));
    }
    Ok(())
}

/// Checks that `w` has all bytes of canonical weights.
///
/// # Errors
/// If it has fewer.
#[inline]
pub fn check_canonical(w: &WeightsRef) -> KernelResult {
    if canonical::matrix_bytes(w.n(), w.k()).is_none_or(|bytes| w.data().len() < bytes) {
        return Err(KernelError::invalid(format!(
            "{} bytes are too few for canonical weights",
            w.data().len()
        )));
    }
    Ok(())
}

/// Checks that `w` has all its blocks of `block_bytes`.
///
/// # Errors
/// If it has fewer.
#[inline]
pub fn check_packed(w: &WeightsRef, block_bytes: usize) -> KernelResult {
    let needed = w.n().div_ceil(BLOCK_ROWS).checked_mul(block_bytes);
    if needed.is_none_or(|bytes| w.data().len() < bytes) {
        return Err(KernelError::invalid(format!("{} bytes are too few for packed weights", w.data().len())));
    }
    Ok(())
}
