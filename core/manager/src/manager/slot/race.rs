//! Races: kernels take turns in live calls, and the fastest one computes from then on.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::config::DRIFT;
use super::super::report::EventKind;
use super::super::{Ranking, lock};
use super::figures::{median, microseconds};
use super::{Change, LONGEST_PAUSE, RACE_TURNS, Slot, Slowdown, State};

/// Kernels that race against the one in use, at most.
const RIVALS: usize = 3;
/// A rival wins if it takes less than this part of the time of the kernel in use.
const CLEAR_WIN: f64 = 0.9;
/// A race is given up after this many calls with other numbers of rows.
const RACE_PATIENCE: u32 = 4096;

/// Kernels that take turns.
#[derive(Debug)]
pub(super) struct Race {
    pub(super) key: u64,
    /// Ranks with their times; the first is the one in use.
    pub(super) runners: Vec<(usize, Vec<f64>)>,
    pub(super) turn: usize,
    pub(super) patience: u32,
    pub(super) why: Why,
}

/// Why there is a race.
#[derive(Clone, Copy, Debug)]
pub(super) enum Why {
    /// The kernel in use takes this many times longer than expected.
    Drift(f64),
    /// This kernel lost the last race, and may be what it was again.
    Again(usize),
    /// A caller asked.
    Asked,
}

impl State {
    pub(super) fn rest(&mut self, now: Duration) {
        self.rest_until = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

impl Slot {
    /// Begins a race of the kernel in use against those which may be faster. Whether there are any.
    pub(super) fn start_race(
        &self,
        state: &mut State,
        head: usize,
        key: u64,
        why: Why,
        usable: &impl Fn(usize) -> bool,
    ) -> bool {
        let rows = self.ranking.get().map_or(1, |ranking| ranking.rows);
        let current = state.kernels[head].figure(key).and_then(|figure| median(&figure.recent));
        let mut rivals: Vec<(usize, f64)> = self
            .order
            .ranks()
            .filter(|&rank| rank != head && state.usable(rank) && usable(rank))
            .map(|rank| match why {
                Why::Again(this) if this == rank => (rank, 0.0),
                _ => (rank, state.expected(rank, head, key, rows).unwrap_or(f64::INFINITY)),
            })
            .collect();
        rivals.sort_by(|a, b| a.1.total_cmp(&b.1));
        // One at least, to tell a slow kernel from a slow machine.
        let promising = rivals.iter().filter(|(_, expected)| current.is_none_or(|c| *expected < c)).count();
        rivals.truncate(promising.clamp(1, RIVALS));
        if rivals.is_empty() {
            return false;
        }
        let runners = std::iter::once(head).chain(rivals.into_iter().map(|(rank, _)| rank));
        state.race = Some(Race {
            key,
            runners: runners.map(|rank| (rank, Vec::with_capacity(RACE_TURNS + 1))).collect(),
            turn: 0,
            patience: RACE_PATIENCE,
            why,
        });
        state.trial = None;
        true
    }

    pub(super) fn finish_race(
        &self,
        state: &mut State,
        race: Race,
        ranking: &Ranking,
        now: Duration,
        changes: &mut Vec<Change>,
    ) {
        let Race { key, runners, why, .. } = race;
        let head = runners[0].0;
        // The first turn found its code and its buffers in memory.
        let times: Vec<(usize, f64)> = runners
            .iter()
            .filter(|(rank, times)| times.len() > RACE_TURNS && state.usable(*rank))
            .filter_map(|(rank, times)| Some((*rank, median(&times[1..])?)))
            .collect();
        let name = |rank: usize| ranking.candidates[rank].kernel();
        let ratio = |state: &State, rank: usize, time: f64| {
            let expected = state.expected(rank, head, key, ranking.rows).filter(|&e| e > 0.0)?;
            Some(time / expected)
        };
        let Some(&(_, of_head)) = times.iter().find(|(rank, _)| *rank == head) else {
            return state.rest(now);
        };
        let slower = ratio(state, head, of_head);
        let mut order = times.clone();
        let handicap = |rank: usize, time: f64| if rank == head { time * CLEAR_WIN } else { time };
        order.sort_by(|a, b| handicap(a.0, a.1).total_cmp(&handicap(b.0, b.1)));
        let (winner, of_winner) = order[0];
        // Others that slowed down at least half as much make it the machine. Without figures of others we can't tell.
        let alike = slower.is_some_and(|slower| {
            let threshold = 1.0 + (slower - 1.0) / 2.0;
            let others = times.iter().filter(|(rank, _)| *rank != head);
            let ratios: Vec<f64> = others.filter_map(|&(rank, time)| ratio(state, rank, time)).collect();
            !ratios.is_empty() && ratios.iter().all(|&ratio| ratio >= threshold)
        });
        if let (Why::Drift(_), Some(slower)) = (why, slower) {
            let slowdown = Slowdown { rank: winner, time: of_winner, expected: of_head / slower };
            state.slowdown = Some(slowdown).filter(|slowdown| slowdown.factor() > DRIFT);
        }
        if winner != head {
            let was = slower.map_or(String::new(), |s| format!(", {s:.1} times what was expected"));
            let reason = format!(
                "{} for {}, now that {} takes {}{was}",
                microseconds(of_winner),
                name(winner),
                name(head),
                microseconds(of_head),
            );
            let measured = match state.gain(head, key).filter(|&gain| gain > 0.0) {
                Some(gain) => times.iter().map(|&(rank, time)| (rank, (time / gain) as u64)).collect(),
                None => Vec::new(),
            };
            changes.push(Change { measured, ..Change::new(EventKind::Retuned, winner, reason) });
        } else if let Why::Drift(drift) = why {
            let now_takes = format!("{}, {drift:.1} times what was expected", microseconds(of_head));
            changes.push(match alike {
                true => {
                    let reason = format!(
                        "{now_takes}, and the others became slower alike: it is the machine (throttled, or busy)"
                    );
                    Change::new(EventKind::Throttled, head, reason)
                }
                false => {
                    let reason = format!("{now_takes}, and still the fastest");
                    Change::new(EventKind::Retuned, head, reason)
                }
            });
        }
        for &(rank, time) in &times {
            state.expect(rank, key, time);
        }
        let rest = self.order.ranks().filter(|rank| !order.iter().any(|(raced, _)| raced == rank));
        self.order.set(&Vec::from_iter(order.iter().map(|(rank, _)| *rank).chain(rest)));
        state.rest(now);
    }

    /// The next calls are a race, whatever the figures say. Whether there is anything to compare.
    pub fn ask_for_a_race(&self) -> bool {
        let mut state = lock(&self.state);
        let several = (0..state.kernels.len()).filter(|&rank| state.usable(rank)).count() > 1;
        if several && state.race.is_none() {
            state.wanted = true;
            self.due.store(0, Ordering::Relaxed);
        }
        several
    }
}
