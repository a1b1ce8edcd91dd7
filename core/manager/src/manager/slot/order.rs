//! The order of a slot's kernels: which of them a call asks first. It is kept here and nowhere else.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

/// Kernels of a slot, at most: a rank takes 4 bits, and one value marks the end. Slower kernels are never asked.
pub(super) const RANKS: usize = 15;
const END: u64 = 0xf;

/// Every rank once, the fastest kernel first, as far as is known now. Calls read it without a lock; whoever holds the
/// slot's state writes it.
#[derive(Debug)]
pub(super) struct Order {
    /// 4 bits a rank, from the lowest bits on, and [`END`].
    ranks: AtomicU64,
    /// The ranks that are demoted, a bit each: they keep their place and are not asked.
    demoted: AtomicU16,
}

impl Default for Order {
    fn default() -> Self {
        Self { ranks: AtomicU64::new(END), demoted: AtomicU16::new(0) }
    }
}

impl Order {
    /// Replaces the order.
    pub fn set(&self, ranks: &[usize]) {
        debug_assert!(ranks.len() <= RANKS);
        let ranks = ranks.iter().rev().fold(END, |order, &rank| order << 4 | rank as u64);
        self.ranks.store(ranks, Ordering::Relaxed);
    }

    /// Replaces the demoted ranks.
    pub fn set_demoted(&self, ranks: impl Iterator<Item = usize>) {
        self.demoted.store(ranks.fold(0, |bits, rank| bits | 1 << rank), Ordering::Relaxed);
    }

    /// All ranks, demoted ones too.
    pub fn ranks(&self) -> impl Iterator<Item = usize> + use<> {
        let mut ranks = self.ranks.load(Ordering::Relaxed);
        std::iter::from_fn(move || {
            let rank = ranks & END;
            ranks >>= 4;
            (rank != END).then_some(rank as usize)
        })
    }

    /// The first rank that is not demoted and that will do.
    pub fn first(&self, usable: impl Fn(usize) -> bool) -> Option<usize> {
        let demoted = self.demoted.load(Ordering::Relaxed);
        self.ranks().find(|&rank| demoted & 1 << rank == 0 && usable(rank))
    }
}
