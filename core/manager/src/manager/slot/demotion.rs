//! Demotion: a kernel that failed or became slow takes a rest, and comes back after its probation.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::config::FallbackPolicy;
use super::super::lock;
use super::super::report::EventKind;
use super::figures::{median, microseconds};
use super::{Change, PROBATION_AFTER, Slot, Slowdown, State};

#[derive(Clone, Copy, Debug)]
pub(super) struct Demotion {
    /// It was slow; otherwise it failed.
    pub(super) slow: bool,
    /// The call at which it is tried again.
    pub(super) until: u64,
}

impl State {
    pub(super) fn demote(&mut self, rank: usize, slow: bool, call: u64) {
        let kernel = &mut self.kernels[rank];
        let backoff = |strikes: u32| PROBATION_AFTER << (strikes - 1).min(16);
        if kernel.strikes > 0
            && kernel.demoted.is_none()
            && call.saturating_sub(kernel.promoted_at) > 16 * backoff(kernel.strikes)
        {
            kernel.strikes = 0;
        }
        kernel.strikes += 1;
        kernel.demoted = Some(Demotion { slow, until: call + backoff(kernel.strikes) });
        if self.trial == Some(rank) {
            self.trial = None;
        }
        if let Some(race) = &mut self.race {
            race.runners.retain(|(runner, _)| *runner != rank);
            if race.runners.len() < 2 {
                self.race = None;
            }
        }
    }

    pub(super) fn promote(&mut self, rank: usize, call: u64) {
        self.kernels[rank].demoted = None;
        self.kernels[rank].promoted_at = call;
        if self.trial == Some(rank) {
            self.trial = None;
        }
    }
}

impl Slot {
    /// The kernel in use became slower, and there is no other one.
    pub(super) fn nothing_faster(
        &self,
        state: &mut State,
        head: usize,
        key: u64,
        drift: f64,
        now: Duration,
        changes: &mut Vec<Change>,
    ) {
        let figure = state.figure(head, key, None);
        let (current, expected) = (median(&figure.recent).unwrap_or(figure.expected), figure.expected);
        state.slowdown = Some(Slowdown { rank: head, time: current, expected });
        let reason = format!(
            "{}, {drift:.1} times what was expected, and there is nothing faster",
            microseconds(current)
        );
        changes.push(Change::new(EventKind::Throttled, head, reason));
        state.expect(head, key, current);
        state.rest(now);
    }

    /// [`FallbackPolicy::OnPerformanceThreshold`]: the next kernel takes over, if there is reason to think
    /// that it is faster. If all have become slow, it is the machine, and all are back.
    pub(super) fn too_slow(
        &self,
        state: &mut State,
        (head, key, drift): (usize, u64, f64),
        (call, now): (u64, Duration),
        rows: usize,
        usable: &impl Fn(usize) -> bool,
        changes: &mut Vec<Change>,
    ) {
        let current = state.figure(head, key, None).recent.clone();
        let current = median(&current).expect("it drifted");
        let rival = |rank: usize| {
            rank != head
                && state.usable(rank)
                && usable(rank)
                && state.expected(rank, head, key, rows).is_none_or(|expected| expected < current)
        };
        if self.order.ranks().any(rival) {
            state.demote(head, true, call);
            let reason = format!("{}, {drift:.1} times what was expected", microseconds(current));
            changes.push(Change::slow(head, reason));
            return;
        }
        let slow: Vec<usize> = (0..state.kernels.len())
            .filter(|&rank| state.kernels[rank].demoted.is_some_and(|demotion| demotion.slow))
            .collect();
        if slow.is_empty() {
            return self.nothing_faster(state, head, key, drift, now, changes);
        }
        for rank in slow {
            state.promote(rank, call);
            if let Some(last) = state.kernels[rank].figure(key).and_then(|figure| median(&figure.recent)) {
                state.expect(rank, key, last);
            }
        }
        state.slowdown = Some(Slowdown { rank: head, time: current, expected: current / drift });
        state.expect(head, key, current);
        let time = |rank: &usize| state.kernels[*rank].figure(key).map_or(f64::INFINITY, |f| f.expected);
        let mut by_speed = Vec::from_iter(self.order.ranks());
        by_speed.sort_by(|a, b| time(a).total_cmp(&time(b)));
        self.order.set(&by_speed);
        let reason = format!(
            "{}, {drift:.1} times what was expected, as the others before it: it is the machine (throttled, \
             or busy)",
            microseconds(current)
        );
        changes.push(Change::new(EventKind::Throttled, head, reason));
        state.rest(now);
    }

    /// A kernel failed, or a caller says so: others compute until it is tried again. With `keep_last`, the
    /// only one that is left stays.
    pub fn failed(
        &self,
        rank: usize,
        reason: String,
        policy: FallbackPolicy,
        keep_last: bool,
    ) -> Option<Change> {
        let call = self.calls.load(Ordering::Relaxed);
        let mut state = lock(&self.state);
        // It has failed in a call that began before, and takes its rest already.
        let resting =
            state.kernels.get(rank).is_some_and(|k| k.demoted.is_some()) && state.trial != Some(rank);
        if rank >= state.kernels.len()
            || resting
            || keep_last && !(0..state.kernels.len()).any(|other| other != rank && state.usable(other))
        {
            return None;
        }
        state.demote(rank, false, call);
        self.publish(&state, call, policy);
        Some(Change::new(EventKind::Demoted, rank, reason))
    }
}
