//! The manager in use: it picks a kernel for each call, hears how that went, reacts to short memory and to
//! what callers tell it, and keeps a list of what happened. What it decides by is in [`slot`](super::slot).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::CpuKernels;
use super::report::{Event, EventKind, Failure};
use super::slot::Change;
use super::{Entry, FallbackPolicy, Job, KernelManager, LayoutPolicy, ManagerError, Memory, Status, lock};
use crate::memory::Activations;

/// Memory is short below this fraction of all there is.
pub const LOW_MEMORY: u64 = 16;
/// The memory is looked at once in this time, at most.
const MEMORY_EVERY: Duration = Duration::from_secs(1);

/// What a caller tells the manager ([`KernelManager::adapt`]).
#[derive(Clone, Debug, PartialEq)]
pub enum Feedback {
    /// Compare the kernels in use with their rivals again.
    Retune,
    /// A measured speed and the wanted one, in any unit of which more is better (tokens a second). Less than
    /// wanted means [`Retune`](Self::Retune).
    Speed {
        /// What was measured.
        measured: f64,
        /// What is wanted.
        goal: f64,
    },
    /// Memory is short (or no longer): keep new weights where they are, in the canonical layout. The
    /// manager sees for itself when the machine's is; this is for limits that it does not know.
    LowMemory(bool),
    /// A kernel of the CPU did something wrong that the manager could not see. Others compute until it is
    /// tried again, as after a failure.
    Misbehaved {
        /// `plugin/kernel` or `kernel`, or `plugin` for all of its kernels.
        kernel: String,
        /// What, for the report.
        reason: String,
    },
}

/// What is known of the memory.
#[derive(Debug, Default)]
pub(super) struct MemoryWatch {
    /// The manager's own finding, and the caller's word.
    low: AtomicBool,
    told: AtomicBool,
    /// Nanoseconds on the clock.
    next_look: AtomicU64,
}

fn available(memory: Memory) -> String {
    format!("{} of {} MiB are available", memory.available >> 20, memory.total >> 20)
}

/// The kernel for a call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn<'a> {
    pub rank: usize,
    pub entry: &'a Arc<Entry>,
    /// The number of the call, if it is to be timed.
    pub timed: Option<u64>,
}

impl KernelManager {
    /// The kernel for a call: the first in order that can read these weights and has not been `tried` (bits
    /// by rank), or the one whose turn it is.
    ///
    /// # Errors
    /// If the policy allows no other than a kernel that is not fit to compute any more.
    pub(super) fn select<'a>(
        &self,
        job: &Job<'a>,
        m: usize,
        tried: u16,
    ) -> Result<Option<Turn<'a>>, ManagerError> {
        let slot = job.choice.slot(m);
        let ranking = self.ranking(job.choice, m);
        let address = job.weights.as_ptr() as usize;
        let readable =
            |rank: usize| address.is_multiple_of(ranking.candidates[rank].entry.kernel.weight_alignment());
        let usable =
            |rank: usize| tried & 1 << rank == 0 && ranking.candidates[rank].entry.ready() && readable(rank);
        if slot.left() {
            return Ok(None);
        }
        let turn = |rank: usize, timed| Turn { rank, entry: &ranking.candidates[rank].entry, timed };
        if self.policy == FallbackPolicy::Never {
            let Some(rank) = slot.first(readable) else { return Ok(None) };
            return match turn(rank, None) {
                chosen if chosen.entry.ready() => Ok(Some(chosen)),
                chosen => {
                    let reason = match chosen.entry.status() {
                        Status::Ready => "it failed meanwhile".into(),
                        Status::Rejected(reason)
                        | Status::Quarantined(reason)
                        | Status::Unavailable(reason) => reason,
                    };
                    Err(self.no_fallback(chosen.entry, job.choice.shape(), m, reason))
                }
            };
        }
        if tried == 0 {
            let (call, awaited) = slot.count();
            if awaited {
                let mut changes = Vec::new();
                let rank = slot.attend(call, m, self.policy, usable, &mut changes);
                self.record(job.choice, m, changes);
                if let Some(rank) = rank {
                    return Ok(Some(turn(rank, Some(call))));
                }
            }
        }
        Ok(slot.first(usable).map(|rank| turn(rank, None)))
    }

    /// What a call that was to be timed took.
    pub(super) fn timed(
        &self,
        job: &Job,
        x: &Activations,
        turn: Turn,
        call: u64,
        (from, to): (Duration, Duration),
    ) {
        let m = x.m();
        let ranking = self.ranking(job.choice, m);
        let address = job.weights.as_ptr() as usize;
        let usable = |rank: usize| {
            let entry = &ranking.candidates[rank].entry;
            entry.ready() && address.is_multiple_of(entry.kernel.weight_alignment())
        };
        let mut changes = Vec::new();
        let elapsed = to.saturating_sub(from);
        let slot = job.choice.slot(m);
        let slow = slot.timed(turn.rank, (call, m), (elapsed, to), self.policy, usable, &mut changes);
        if slow.is_some_and(|slow| self.repack(job, x, slow)) {
            // There was something faster, after all.
            changes.retain(|change| !matches!(change.kind, EventKind::Throttled | EventKind::Retuned));
        }
        self.record(job.choice, m, changes);
        self.look_at_memory(to);
    }

    /// A kernel failed: demoted, unless there is nothing else that may compute.
    /// Whether it was.
    pub(super) fn demote(&self, choice: &CpuKernels, m: usize, rank: usize, reason: String) -> bool {
        let fallback_weights = choice.packer.as_ref().is_some_and(|packer| packer.watch.is_some());
        let keep_last = !self.config.strict.allows_reference() && !fallback_weights;
        let change = choice.slot(m).failed(rank, reason, self.policy, keep_last);
        let demoted = change.is_some();
        self.record(choice, m, change.into_iter().collect());
        demoted
    }

    fn record(&self, choice: &CpuKernels, m: usize, changes: Vec<Change>) {
        let Some(ranking) = choice.slot(m).known() else { return };
        for Change { kind, rank, reason, slow, measured } in changes {
            let entry = &ranking.candidates[rank].entry;
            if slow {
                entry.fail(Failure::Slow);
            }
            if !measured.is_empty() {
                self.remeasured(choice.of, ranking, &measured);
            }
            self.event(kind, Some(entry.kernel.id()), Some((m, choice.of.n, choice.of.k)), reason);
        }
    }

    /// Notes something, in the report and, in one line, in the log.
    pub(super) fn event(
        &self,
        kind: EventKind,
        kernel: Option<&str>,
        shape: Option<(usize, usize, usize)>,
        reason: String,
    ) {
        let (m, n, k) = shape.unwrap_or_default();
        match kind {
            EventKind::Demoted | EventKind::Throttled | EventKind::LowMemory => {
                tracing::warn!(event = ?kind, kernel, m, n, k, reason, "kernels");
            }
            EventKind::Quarantined => tracing::error!(event = ?kind, kernel, m, n, k, reason, "kernels"),
            EventKind::Probation | EventKind::Promoted | EventKind::Retuned | EventKind::MemoryBack => {
                tracing::info!(event = ?kind, kernel, m, n, k, reason, "kernels");
            }
        }
        let event = Event { kind, kernel: kernel.map(str::to_owned), shape, reason, count: 1 };
        let mut events = lock(&self.events);
        match events.iter_mut().find(|known| known.is_like(&event)) {
            Some(known) => *known = Event { count: known.count + 1, ..event },
            None => events.push(event),
        }
    }

    /// Whether memory is short: less than a sixteenth of the machine's is available, or a caller said so.
    /// New weights stay in the canonical layout then, and whoever holds weights in a private packing may
    /// move those back.
    pub fn memory_is_low(&self) -> bool {
        self.look_at_memory(self.config.probe.now());
        self.memory.low.load(Ordering::Relaxed) || self.memory.told.load(Ordering::Relaxed)
    }

    /// Looks at the memory, if that has not just been done.
    fn look_at_memory(&self, now: Duration) {
        let now = now.as_nanos() as u64;
        if now >= self.memory.next_look.load(Ordering::Relaxed)
            && let Some(memory) = self.config.probe.memory()
        {
            self.memory.next_look.store(now + MEMORY_EVERY.as_nanos() as u64, Ordering::Relaxed);
            self.note_memory(memory);
        }
    }

    fn note_memory(&self, memory: Memory) {
        let low = memory.available < memory.total / LOW_MEMORY;
        if self.memory.low.swap(low, Ordering::Relaxed) != low {
            let kind = if low { EventKind::LowMemory } else { EventKind::MemoryBack };
            self.event(kind, None, None, available(memory));
        }
    }

    /// The layouts that new weights [n, k] may have, memory considered.
    pub(super) fn allowed_layouts(&self, n: usize, k: usize, policy: LayoutPolicy) -> LayoutPolicy {
        if policy == LayoutPolicy::Canonical || self.memory.told.load(Ordering::Relaxed) {
            return LayoutPolicy::Canonical;
        }
        let Some(memory) = self.config.probe.memory() else { return policy };
        self.note_memory(memory);
        // As much as two bits a weight.
        let wanted = (n as u64).saturating_mul(k as u64) / 4;
        let least = memory.total / LOW_MEMORY;
        if memory.available >= least.saturating_add(wanted) {
            return policy;
        }
        if memory.available >= least {
            let reason = format!("{}, and a packing would take {} MiB", available(memory), wanted >> 20);
            self.event(EventKind::LowMemory, None, Some((1, n, k)), reason);
        }
        LayoutPolicy::Canonical
    }

    /// Tells the manager something that it can't see. The number of shapes (with their
    /// [bucket](super::BUCKETS) of rows) that are computed differently from now on, as far as that is known.
    ///
    /// What is asked for is done under every [`FallbackPolicy`] but `Never` (and strict mode's `no_fallback`),
    /// under which kernels stay as they were chosen, and only what is said of the memory counts. Results are
    /// the same bits in any case.
    ///
    /// ```
    /// use bitnet_burn_manager::{Feedback, KernelManager, ManagerConfig};
    ///
    /// let manager = KernelManager::new(ManagerConfig::default())?;
    /// // 12 tokens a second where 20 are wanted: the next calls compare what there is.
    /// manager.adapt(Feedback::Speed { measured: 12.0, goal: 20.0 })?;
    /// // The container that this runs in is almost full.
    /// manager.adapt(Feedback::LowMemory(true))?;
    /// assert!(manager.memory_is_low());
    /// # Ok::<(), bitnet_burn_manager::ManagerError>(())
    /// ```
    ///
    /// # Errors
    /// If there is no kernel of the name.
    pub fn adapt(&self, feedback: Feedback) -> Result<usize, ManagerError> {
        match feedback {
            // What is not a number is not enough.
            Feedback::Speed { measured, goal } if measured >= goal => Ok(0),
            Feedback::Speed { .. } | Feedback::Retune if self.policy == FallbackPolicy::Never => Ok(0),
            Feedback::Speed { .. } | Feedback::Retune => {
                let in_use = self.in_use();
                let slots = in_use.iter().flat_map(|choice| choice.slots());
                Ok(slots.filter(|(_, slot)| slot.known().is_some() && slot.ask_for_a_race()).count())
            }
            Feedback::LowMemory(low) => {
                if self.memory.told.swap(low, Ordering::Relaxed) != low {
                    let kind = if low { EventKind::LowMemory } else { EventKind::MemoryBack };
                    self.event(kind, None, None, "a caller says so".into());
                }
                Ok(0)
            }
            Feedback::Misbehaved { kernel, reason } => {
                if !self.entries().iter().any(|entry| super::registry::names(&entry.kernel, &kernel)) {
                    return Err(self.unknown_kernel(&kernel));
                }
                if self.policy == FallbackPolicy::Never {
                    return Ok(0);
                }
                let mut count = 0;
                for choice in self.in_use() {
                    for (rows, slot) in choice.slots() {
                        let candidates = slot.known().map_or(&[][..], |ranking| &ranking.candidates);
                        for (rank, candidate) in candidates.iter().enumerate() {
                            if super::registry::names(&candidate.entry.kernel, &kernel) {
                                count += usize::from(self.demote(&choice, rows, rank, reason.clone()));
                            }
                        }
                    }
                }
                Ok(count)
            }
        }
    }

    /// The choices that callers hold.
    fn in_use(&self) -> Vec<Arc<CpuKernels>> {
        let mut made = lock(&self.made);
        made.retain(|choice| choice.strong_count() > 0);
        made.iter().filter_map(std::sync::Weak::upgrade).collect()
    }
}
