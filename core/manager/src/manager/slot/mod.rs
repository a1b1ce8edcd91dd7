//! The kernels for one shape and bucket of rows in use: who computes the next call, who failed and when it
//! is tried again, and whether what computes is still as fast as it was.
//!
//! A call costs a few atomic operations: it counts itself, and reads the order and the number of the next call that is
//! timed. One call in [`TIMED_EVERY`] is; so are all calls of a kernel on probation, and those of a race.
//!
//! * **Like with like.** A timed call runs one matrix by itself, for exactly that many rows (beyond 16 rows,
//!   where time goes with them, the time of a row counts). Its time is compared with what is *expected* of
//!   the kernel: the lowest [`WINDOW`]-sample median that it has had here, and, as long as there is none, the
//!   time that was measured in tuning. Tuning times decode from memory; a small model that lives in the cache
//!   is faster. What other kernels are expected to take is therefore what tuning has for them, times what
//!   the kernel in use gained.
//! * **Drift.** [`WINDOW`] samples in a row that all took longer than a factor times what is expected.
//! * **Race.** The kernel in use and its best rivals take turns in the next calls; results are the same bits,
//!   so callers do not notice. Another one wins only if it is [`CLEAR_WIN`] times as fast; what all took is expected
//!   from then on; and the next race has to wait, longer each time.
//! * **Slowdown.** Where no kernel of the layout is as fast as expected, that is told: the weights may be packed anew for
//!   others, and the slot is left then.
//! * **Probation.** A demoted kernel computes [`TRIAL_CALLS`] calls once [`PROBATION_AFTER`] calls have gone by,
//!   twice as many with each demotion. If all go well, it is back at its place.

mod demotion;
mod figures;
mod order;
mod race;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use self::demotion::Demotion;
use self::figures::{Standing, key};
pub(super) use self::figures::{median, microseconds, scaled};
use self::order::{Order, RANKS};
use self::race::{Race, Why};
use super::config::FallbackPolicy;
use super::report::EventKind;
use super::{Ranking, Source, lock};

/// One call in this many is timed.
pub const TIMED_EVERY: u64 = 64;
/// Samples that are looked at together.
pub const WINDOW: usize = 8;
/// Calls until a demoted kernel is tried again, the first time.
pub const PROBATION_AFTER: u64 = 128;
/// Calls that it has to do well then.
pub const TRIAL_CALLS: u32 = 4;
/// Timed turns of each kernel in a race; one more comes before them and does not count.
pub const RACE_TURNS: usize = 7;
/// Time between two races of a slot, at first and at most.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Slot {
    /// The kernels, as tuning found them: a rank here is the number of a kernel from then on.
    ranking: OnceLock<Ranking>,
    /// The order in which they are asked.
    order: Order,
    /// Calls so far.
    calls: AtomicU64,
    /// The number of the next call that takes the lock: to be timed, or to try a demoted kernel again.
    due: AtomicU64,
    /// The weights are in another layout by now, and none of these kernels is asked.
    left: AtomicBool,
    /// The rank and the exact number of rows that were looked at last and known already (`watch`).
    pub watched: AtomicU64,
    /// The rank and the exact number of rows that were tried last and known already (`walls`).
    pub walled: AtomicU64,
    state: Mutex<State>,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            ranking: OnceLock::new(),
            order: Order::default(),
            calls: AtomicU64::new(0),
            due: AtomicU64::new(u64::MAX),
            left: AtomicBool::new(false),
            watched: AtomicU64::new(0),
            walled: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// By rank.
    kernels: Vec<Standing>,
    /// The kernel that is on probation.
    trial: Option<usize>,
    race: Option<Race>,
    /// A caller asked for a race.
    wanted: bool,
    /// No race before this, unless a caller asks.
    rest_until: Duration,
    pause: Duration,
    /// What was found last and not told yet.
    slowdown: Option<Slowdown>,
}

/// All kernels that read a layout are slow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Slowdown {
    /// The fastest of them.
    pub rank: usize,
    /// What it takes, and what was expected of the kernel in use: nanoseconds, [`scaled`].
    pub time: f64,
    pub expected: f64,
}

impl Slowdown {
    /// How many times slower than expected.
    pub fn factor(&self) -> f64 {
        self.time / self.expected
    }
}

/// Something to report.
#[derive(Debug, PartialEq)]
pub(super) struct Change {
    pub kind: EventKind,
    pub rank: usize,
    pub reason: String,
    /// It was demoted because it was slow.
    pub slow: bool,
    /// Times by rank on tuning's scale, if the order of the kernels is another now.
    pub measured: Vec<(usize, u64)>,
}

impl Change {
    fn new(kind: EventKind, rank: usize, reason: String) -> Self {
        Self { kind, rank, reason, slow: false, measured: Vec::new() }
    }

    fn slow(rank: usize, reason: String) -> Self {
        Self { slow: true, ..Self::new(EventKind::Demoted, rank, reason) }
    }
}

impl State {
    fn usable(&self, rank: usize) -> bool {
        self.kernels[rank].demoted.is_none()
    }
}

impl Slot {
    /// The ranking; asks for it at the first use.
    pub fn ranking(&self, policy: FallbackPolicy, rank: impl FnOnce() -> Ranking) -> &Ranking {
        self.ranking.get_or_init(|| {
            let ranking = rank();
            // What was measured for other rows orders kernels, and says nothing of their times.
            let measured = !matches!(ranking.source, Source::Nearest(_));
            let mut state = lock(&self.state);
            state.kernels = ranking
                .candidates
                .iter()
                .take(RANKS)
                .map(|c| Standing {
                    tuned: c.measurement.median_ns.filter(|_| measured).map(|ns| ns as f64),
                    ..Standing::default()
                })
                .collect();
            self.order.set(&Vec::from_iter(0..state.kernels.len()));
            state.pause = PAUSE;
            self.publish(&state, 0, policy);
            drop(state);
            ranking
        })
    }

    /// The ranking, if there has been a call.
    pub fn known(&self) -> Option<&Ranking> {
        self.ranking.get()
    }

    /// None of the kernels is asked any more.
    pub fn leave(&self) {
        self.left.store(true, Ordering::Relaxed);
    }

    /// Whether that was said.
    pub fn left(&self) -> bool {
        self.left.load(Ordering::Relaxed)
    }

    /// Counts a call: its number, and whether it is due.
    pub fn count(&self) -> (u64, bool) {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        (call, call >= self.due.load(Ordering::Relaxed))
    }

    /// The first kernel in order that will do.
    pub fn first(&self, usable: impl Fn(usize) -> bool) -> Option<usize> {
        self.order.first(usable)
    }

    /// Writes down what calls read: who is demoted, and the next call that matters.
    fn publish(&self, state: &State, call: u64, policy: FallbackPolicy) {
        self.order.set_demoted((0..state.kernels.len()).filter(|&rank| !state.usable(rank)));
        let busy = state.race.is_some() || state.trial.is_some() || state.wanted;
        let sample = if policy.factor().is_some() { call + TIMED_EVERY } else { u64::MAX };
        let probation = state.kernels.iter().filter_map(|k| k.demoted.map(|d| d.until)).min();
        let due = if busy { 0 } else { sample.min(probation.unwrap_or(u64::MAX)) };
        self.due.store(due, Ordering::Relaxed);
    }

    /// Which kernel a due call is to run and time; `None`: the first in order, untimed.
    pub fn attend(
        &self,
        call: u64,
        m: usize,
        policy: FallbackPolicy,
        usable: impl Fn(usize) -> bool,
        changes: &mut Vec<Change>,
    ) -> Option<usize> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let key = key(m);
        let head = self.first(&usable);
        if state.wanted {
            state.wanted = false;
            if let Some(head) = head {
                self.start_race(state, head, key, Why::Asked, &usable);
            }
        }
        if let Some(race) = &mut state.race {
            if race.key == key {
                for _ in 0..race.runners.len() {
                    let (rank, _) = race.runners[race.turn % race.runners.len()];
                    race.turn += 1;
                    if usable(rank) {
                        return Some(rank);
                    }
                }
            }
            race.patience -= 1;
            if race.patience == 0 {
                state.race = None;
                self.publish(state, call, policy);
            }
            return None;
        }
        if state.trial.is_none() {
            let ripe = |k: &Standing| k.demoted.is_some_and(|d| d.until <= call);
            let ripe: Vec<usize> = (0..state.kernels.len()).filter(|&r| ripe(&state.kernels[r])).collect();
            for rank in ripe {
                if usable(rank) {
                    state.trial = Some(rank);
                    state.kernels[rank].good = 0;
                    let strikes = state.kernels[rank].strikes;
                    let after = PROBATION_AFTER << (strikes - 1).min(16);
                    let reason = format!("tried again after {after} calls");
                    changes.push(Change::new(EventKind::Probation, rank, reason));
                    break;
                }
                // Quarantined meanwhile, or weights that it can't read: later.
                let demotion = state.kernels[rank].demoted.as_mut().expect("it is demoted");
                demotion.until = call + (PROBATION_AFTER << 16);
            }
        }
        let trial = state.trial.filter(|&rank| usable(rank));
        if trial.is_none() {
            state.trial = None;
        }
        self.publish(state, call, policy);
        // Without figures to keep, a call that is only counted needs no clock.
        trial.or(head.filter(|_| policy.factor().is_some()))
    }

    /// What a call that [`attend`](Self::attend) gave out took. Says so if it turns out that all kernels are slow.
    pub fn timed(
        &self,
        rank: usize,
        call: (u64, usize),
        times: (Duration, Duration),
        policy: FallbackPolicy,
        usable: impl Fn(usize) -> bool,
        changes: &mut Vec<Change>,
    ) -> Option<Slowdown> {
        self.take_time(rank, call, times, policy, usable, changes);
        lock(&self.state).slowdown.take()
    }

    fn take_time(
        &self,
        rank: usize,
        (call, m): (u64, usize),
        (elapsed, now): (Duration, Duration),
        policy: FallbackPolicy,
        usable: impl Fn(usize) -> bool,
        changes: &mut Vec<Change>,
    ) {
        let ranking = self.ranking.get().expect("a call has been given out");
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let (key, time) = (key(m), scaled(elapsed, m));
        if let Some(race) = state.race.as_mut().filter(|race| race.key == key) {
            if let Some((_, times)) = race.runners.iter_mut().find(|(runner, _)| *runner == rank) {
                times.push(time);
            }
            // One that can't run any more, or not these weights, is not waited for.
            let done = |times: &Vec<f64>| times.len() > RACE_TURNS;
            let late = race.runners.iter().any(|(_, times)| times.len() > 4 * RACE_TURNS);
            if late || race.runners.iter().all(|(_, times)| done(times)) {
                let race = state.race.take().expect("it is there");
                self.finish_race(state, race, ranking, now, changes);
                self.publish(state, call, policy);
            }
            return;
        }
        let head = self.first(&usable).unwrap_or(rank);
        let expected = state.expected(rank, head, key, ranking.rows);
        if let Some(demotion) = state.kernels[rank].demoted {
            if state.trial != Some(rank) {
                // Demoted by another call meanwhile.
                return;
            }
            let factor = policy.factor().unwrap_or(f64::INFINITY);
            // Slower than it was, and than what computes in its place.
            let in_place = state.expected(head, head, key, ranking.rows).filter(|_| head != rank);
            let slow = expected.is_some_and(|expected| time > factor * expected)
                && in_place.is_none_or(|in_place| time >= in_place);
            if demotion.slow && slow {
                state.demote(rank, true, call);
                let reason = format!("still slow: {}", microseconds(time));
                changes.push(Change::slow(rank, reason));
            } else {
                state.kernels[rank].good += 1;
                if state.kernels[rank].good >= TRIAL_CALLS {
                    state.promote(rank, call);
                    if demotion.slow {
                        state.expect(rank, key, time);
                    }
                    let reason = format!("{TRIAL_CALLS} calls went well");
                    changes.push(Change::new(EventKind::Promoted, rank, reason));
                }
            }
            return self.publish(state, call, policy);
        }
        let Some(factor) = policy.factor() else { return };
        let figure = state.figure(rank, key, expected);
        figure.push(time);
        let drift = figure.drift(factor).filter(|_| rank == head);
        if now < state.rest_until {
            return;
        }
        let adaptive = policy == FallbackPolicy::Adaptive;
        if let Some(drift) = drift {
            if now > state.rest_until + state.pause * 8 {
                state.pause = PAUSE;
            }
            match adaptive {
                true if self.start_race(state, head, key, Why::Drift(drift), &usable) => {}
                true => self.nothing_faster(state, head, key, drift, now, changes),
                false => {
                    self.too_slow(state, (head, key, drift), (call, now), ranking.rows, &usable, changes)
                }
            }
            self.publish(state, call, policy);
        } else if adaptive && self.order.ranks().next() != Some(0) && state.usable(0) && usable(0) {
            // Another kernel than tuning's has won a race. That may have been for a while only.
            if !self.start_race(state, head, key, Why::Again(0), &usable) {
                state.rest(now);
            }
            self.publish(state, call, policy);
        }
    }
}
