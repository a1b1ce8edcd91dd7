//! The kernels for one shape and bucket of rows in use: who computes the next call, who failed and when it
//! is tried again, and whether what computes is still as fast as it was.
//!
//! A call costs two atomic operations: its number, and whether that is the one which somebody waits for.
//! One in [`SAMPLE_EVERY`] is, and is timed; so are all calls of a kernel on probation, and those of a race.
//!
//! * **Like with like.** A timed call runs one matrix by itself, for exactly that many rows (beyond 16 rows,
//!   where time goes with them, the time of a row counts). Its time is compared with what is *expected* of
//!   the kernel: the lowest [`WINDOW`]-sample median that it has had here, and, as long as there is none, the
//!   time that was measured in tuning. Tuning times decode from memory; a small model that lives in the cache
//!   is faster. What other kernels are expected to take is therefore what tuning has for them, times what
//!   the kernel in use gained.
//! * **Drift.** [`WINDOW`] samples in a row that all took longer than a factor times what is expected.
//! * **Race.** The kernel in use and its best rivals take turns in the next calls; results are the same bits,
//!   so nobody notices. Another one wins only if it is [`CLEAR_WIN`] times as fast; what all took is expected
//!   from then on; and the next race has to wait, longer each time.
//! * **Probation.** A demoted kernel computes [`TRIAL_CALLS`] calls once [`PROBATION_AFTER`] calls have gone by,
//!   twice as many with each demotion. If all go well, it is back at its place.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use super::config::FallbackPolicy;
use super::report::EventKind;
use super::{Ranking, Source, lock};

/// One call in so many is timed.
pub const SAMPLE_EVERY: u64 = 64;
/// Samples that are looked at together.
pub const WINDOW: usize = 8;
/// [`FallbackPolicy::Adaptive`] races when a kernel takes so many times longer than expected.
pub const DRIFT: f64 = 1.5;
/// Calls until a demoted kernel is tried again, the first time.
pub const PROBATION_AFTER: u64 = 128;
/// Calls that it has to do well then.
pub const TRIAL_CALLS: u32 = 4;
/// Timed turns of each kernel in a race; one more comes before them and does not count.
pub const RACE_TURNS: usize = 7;
/// Kernels that race against the one in use, at most.
const RIVALS: usize = 3;
/// A rival wins if its time is so much of the other's.
const CLEAR_WIN: f64 = 0.9;
/// Time between two races of a slot, at first and at most.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// A race waits for so many calls with other numbers of rows.
const RACE_PATIENCE: u32 = 4096;

/// What ranks behind so many kernels is never needed: 4 bits a rank, and an end.
const RANKS: usize = 15;
const END: u64 = 0xf;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Slot {
    ranking: OnceLock<Ranking>,
    /// The ranks in the order in which they are asked, 4 bits each from the lowest on, and [`END`]. Written
    /// by whoever holds the state.
    order: AtomicU64,
    /// Calls so far.
    calls: AtomicU64,
    /// The call that the state waits for.
    due: AtomicU64,
    /// The rank and the exact number of rows that were looked at last and known already (`watch`).
    pub watched: AtomicU64,
    state: Mutex<State>,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            ranking: OnceLock::new(),
            order: AtomicU64::new(END),
            calls: AtomicU64::new(0),
            due: AtomicU64::new(u64::MAX),
            watched: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// By rank.
    kernels: Vec<Standing>,
    /// All ranks, the fastest first, as far as is known now.
    by_speed: Vec<usize>,
    /// The kernel that is on probation.
    trial: Option<usize>,
    race: Option<Race>,
    /// Somebody asked for a race.
    wanted: bool,
    /// No race before this, unless somebody asks.
    rest_until: Duration,
    pause: Duration,
}

/// What is known of one kernel here.
#[derive(Debug, Default)]
struct Standing {
    /// Nanoseconds that tuning has, for `Ranking::rows` rows.
    tuned: Option<f64>,
    demoted: Option<Demotion>,
    /// Demotions in a row, for the back-off, and the call of the last promotion.
    strikes: u32,
    promoted_at: u64,
    /// Calls done well on probation.
    good: u32,
    figures: Vec<(u64, Figure)>,
}

#[derive(Clone, Copy, Debug)]
struct Demotion {
    /// It was slow; otherwise it failed.
    slow: bool,
    /// The call at which it is tried again.
    until: u64,
}

/// Times for one number of rows, in nanoseconds (of a row, beyond 16).
#[derive(Clone, Debug)]
struct Figure {
    expected: f64,
    recent: Vec<f64>,
}

/// Kernels that take turns.
#[derive(Debug)]
struct Race {
    key: u64,
    /// Ranks with their times; the first is the one in use.
    runners: Vec<(usize, Vec<f64>)>,
    turn: usize,
    patience: u32,
    why: Why,
}

/// Why there is a race.
#[derive(Clone, Copy, Debug)]
enum Why {
    /// The kernel in use takes so many times longer than expected.
    Drift(f64),
    /// This kernel lost the last race, and may be what it was again.
    Again(usize),
    /// Somebody asked.
    Asked,
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

/// Rows that kernels compute at a time, at most: a number of them in between costs as much as the next multiple.
const ROW_BLOCK: usize = 16;

/// What figures are kept by: exact numbers of rows up to 16, and 0 for all above.
fn key(m: usize) -> u64 {
    if m <= ROW_BLOCK { m as u64 } else { 0 }
}

/// A call's time as figures keep it.
fn scaled(elapsed: Duration, m: usize) -> f64 {
    elapsed.as_nanos() as f64 / if key(m) == 0 { m.next_multiple_of(ROW_BLOCK) as f64 } else { 1.0 }
}

fn median(times: &[f64]) -> Option<f64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

fn microseconds(ns: f64) -> String {
    format!("{:.1} us", ns / 1e3)
}

impl Figure {
    fn push(&mut self, time: f64) {
        if self.recent.len() == WINDOW {
            self.recent.remove(0);
        }
        self.recent.push(time);
        if self.recent.len() == WINDOW {
            self.expected = self.expected.min(median(&self.recent).expect("just pushed"));
        }
    }

    /// How many times longer than expected it takes, if every sample of a whole window took longer than
    /// `factor` times that.
    fn drift(&self, factor: f64) -> Option<f64> {
        let slow = self.recent.len() == WINDOW && self.recent.iter().all(|&t| t > factor * self.expected);
        (slow && self.expected > 0.0).then(|| median(&self.recent).expect("a window") / self.expected)
    }
}

impl Standing {
    fn figure(&self, key: u64) -> Option<&Figure> {
        self.figures.iter().find(|(known, _)| *known == key).map(|(_, figure)| figure)
    }
}

impl State {
    fn usable(&self, rank: usize) -> bool {
        self.kernels[rank].demoted.is_none()
    }

    /// What tuning has for a kernel, if it has that for these rows.
    fn tuned(&self, rank: usize, key: u64, rows: usize) -> Option<f64> {
        let tuned = self.kernels[rank].tuned?;
        match key {
            0 => Some(tuned / rows.next_multiple_of(ROW_BLOCK) as f64),
            m if m == rows as u64 => Some(tuned),
            _ => None,
        }
    }

    /// What a kernel is expected to take, if anything is known; `head` is the one in use.
    fn expected(&self, rank: usize, head: usize, key: u64, rows: usize) -> Option<f64> {
        if let Some(figure) = self.kernels[rank].figure(key).filter(|figure| figure.expected.is_finite()) {
            return Some(figure.expected);
        }
        let gain = self.kernels[head]
            .figure(key)
            .filter(|figure| figure.expected.is_finite())
            .and_then(|figure| Some(figure.expected / self.kernels[head].tuned.filter(|&t| t > 0.0)?));
        match gain {
            // For other rows than tuning's, the same ratio holds well enough.
            Some(gain) => Some(self.kernels[rank].tuned? * gain),
            None => self.tuned(rank, key, rows),
        }
    }

    fn figure(&mut self, rank: usize, key: u64, expected: Option<f64>) -> &mut Figure {
        let figures = &mut self.kernels[rank].figures;
        let index = match figures.iter().position(|(known, _)| *known == key) {
            Some(index) => index,
            None => {
                let figure = Figure { expected: expected.unwrap_or(f64::INFINITY), recent: Vec::new() };
                figures.push((key, figure));
                figures.len() - 1
            }
        };
        &mut figures[index].1
    }

    /// From now on, this is expected.
    fn expect(&mut self, rank: usize, key: u64, time: f64) {
        let figure = self.figure(rank, key, None);
        figure.expected = time;
        figure.recent.clear();
    }

    fn rest(&mut self, now: Duration) {
        self.rest_until = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    fn demote(&mut self, rank: usize, slow: bool, call: u64) {
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

    fn promote(&mut self, rank: usize, call: u64) {
        self.kernels[rank].demoted = None;
        self.kernels[rank].promoted_at = call;
        if self.trial == Some(rank) {
            self.trial = None;
        }
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
            state.by_speed = (0..state.kernels.len()).collect();
            state.pause = PAUSE;
            self.publish(&state, 0, policy);
            drop(state);
            ranking
        })
    }

    /// The ranking, if somebody has asked for it.
    pub fn known(&self) -> Option<&Ranking> {
        self.ranking.get()
    }

    /// Counts a call: its number, and whether the state waits for it.
    pub fn count(&self) -> (u64, bool) {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        (call, call >= self.due.load(Ordering::Relaxed))
    }

    /// The first kernel in order that will do.
    pub fn first(&self, usable: impl Fn(usize) -> bool) -> Option<usize> {
        let mut order = self.order.load(Ordering::Relaxed);
        while order & END != END {
            let rank = (order & END) as usize;
            if usable(rank) {
                return Some(rank);
            }
            order >>= 4;
        }
        None
    }

    /// Writes down what calls read: the order, and the next call that matters.
    fn publish(&self, state: &State, call: u64, policy: FallbackPolicy) {
        let ranks = state.by_speed.iter().filter(|&&rank| state.usable(rank));
        let order = ranks.rev().fold(END, |order, &rank| order << 4 | rank as u64);
        self.order.store(order, Ordering::Relaxed);
        let busy = state.race.is_some() || state.trial.is_some() || state.wanted;
        let sample = if policy.factor().is_some() { call + SAMPLE_EVERY } else { u64::MAX };
        let probation = state.kernels.iter().filter_map(|k| k.demoted.map(|d| d.until)).min();
        let due = if busy { 0 } else { sample.min(probation.unwrap_or(u64::MAX)) };
        self.due.store(due, Ordering::Relaxed);
    }

    /// Which kernel a call that the state waits for is to run and time; `None`: the first in order, untimed.
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

    /// What a call that [`attend`](Self::attend) gave out took.
    pub fn timed(
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
        } else if adaptive && state.by_speed.first() != Some(&0) && state.usable(0) && usable(0) {
            // Another kernel than tuning's has won a race. That may have been for a while only.
            if !self.start_race(state, head, key, Why::Again(0), &usable) {
                state.rest(now);
            }
            self.publish(state, call, policy);
        }
    }

    /// Begins a race of the kernel in use against those which may be faster. Whether there are any.
    fn start_race(
        &self,
        state: &mut State,
        head: usize,
        key: u64,
        why: Why,
        usable: &impl Fn(usize) -> bool,
    ) -> bool {
        let rows = self.ranking.get().map_or(1, |ranking| ranking.rows);
        let current = state.kernels[head].figure(key).and_then(|figure| median(&figure.recent));
        let mut rivals: Vec<(usize, f64)> = state
            .by_speed
            .iter()
            .filter(|&&rank| rank != head && state.usable(rank) && usable(rank))
            .map(|&rank| match why {
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

    fn finish_race(
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
        // Half as much slower as the kernel in use is like it; what nobody knows, can't tell.
        let alike = slower.is_some_and(|slower| {
            let threshold = 1.0 + (slower - 1.0) / 2.0;
            let others = times.iter().filter(|(rank, _)| *rank != head);
            let ratios: Vec<f64> = others.filter_map(|&(rank, time)| ratio(state, rank, time)).collect();
            !ratios.is_empty() && ratios.iter().all(|&ratio| ratio >= threshold)
        });
        let gain = state.kernels[head]
            .figure(key)
            .filter(|figure| figure.expected.is_finite() && figure.expected > 0.0)
            .and_then(|figure| Some(figure.expected / state.kernels[head].tuned?));
        if winner != head {
            let was = slower.map_or(String::new(), |s| format!(", {s:.1} times what was expected"));
            let reason = format!(
                "{} for {}, now that {} takes {}{was}",
                microseconds(of_winner),
                name(winner),
                name(head),
                microseconds(of_head),
            );
            let measured = match gain.filter(|&gain| gain > 0.0) {
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
        let rest = state.by_speed.iter().filter(|rank| !order.iter().any(|(raced, _)| raced == *rank));
        state.by_speed = order.iter().map(|(rank, _)| *rank).chain(rest.copied()).collect();
        state.rest(now);
    }

    /// The kernel in use became slower, and there is no other one.
    fn nothing_faster(
        &self,
        state: &mut State,
        head: usize,
        key: u64,
        drift: f64,
        now: Duration,
        changes: &mut Vec<Change>,
    ) {
        let figure = state.figure(head, key, None);
        let current = median(&figure.recent).unwrap_or(figure.expected);
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
    fn too_slow(
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
        if state.by_speed.iter().any(|&rank| rival(rank)) {
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
        state.expect(head, key, current);
        let time = |rank: &usize| state.kernels[*rank].figure(key).map_or(f64::INFINITY, |f| f.expected);
        let mut by_speed = state.by_speed.clone();
        by_speed.sort_by(|a, b| time(a).total_cmp(&time(b)));
        state.by_speed = by_speed;
        let reason = format!(
            "{}, {drift:.1} times what was expected, as the others before it: it is the machine (throttled, \
             or busy)",
            microseconds(current)
        );
        changes.push(Change::new(EventKind::Throttled, head, reason));
        state.rest(now);
    }

    /// A kernel failed, or somebody says so: others compute until it is tried again. With `keep_last`, the
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

#[cfg(test)]
mod tests {
    use bitnet_burn_plugin::sdk::{ActivationsRef, KernelResult, OutputTile, TernaryKernel, WeightsRef};
    use proptest::prelude::*;

    use super::*;
    use crate::manager::{KernelManager, LayoutPolicy, ManagerConfig};
    use crate::plugin::Plugin;

    struct Kernel<const I: usize>;

    impl<const I: usize> TernaryKernel for Kernel<I> {
        const NAME: &'static std::ffi::CStr = [c"a", c"b", c"c", c"d"][I];

        fn run(w: &WeightsRef, x: &ActivationsRef, _: &[u8], y: &mut OutputTile) -> KernelResult {
            for m in y.rows_m() {
                for n in y.rows_n() {
                    let codes = w.canonical_row(n);
                    let dot = (0..w.k()).map(|k| i32::from(codes.weight(k)) * i32::from(x.row(m)[k])).sum();
                    y.set(m, n, dot, w, x);
                }
            }
            Ok(())
        }
    }

    bitnet_burn_plugin::plugin! {
        static PLUGIN = {
            name: c"four", version: c"1.0.0", kernels: [Kernel<0>, Kernel<1>, Kernel<2>, Kernel<3>]
        };
    }

    /// Four kernels, with the times that tuning is to have for them.
    fn ranking(tuned: [Option<u64>; 4]) -> Ranking {
        let config = ManagerConfig { threads: 1, tune_budget: Duration::ZERO, ..ManagerConfig::default() };
        let manager = KernelManager::new(config).unwrap();
        manager.register(Plugin::built_in(&PLUGIN).unwrap()).unwrap();
        let mut ranking = manager.rank(1, 8, 128, LayoutPolicy::Any);
        for (candidate, tuned) in ranking.candidates.iter_mut().zip(tuned) {
            candidate.measurement.median_ns = tuned;
        }
        Ranking { source: Source::Measured, ..ranking }
    }

    fn policies() -> impl Strategy<Value = FallbackPolicy> {
        use FallbackPolicy::{Adaptive, OnError, OnPerformanceThreshold};
        prop_oneof![Just(OnError), Just(OnPerformanceThreshold(1.2)), Just(Adaptive)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever kernels do, every call gets one that may compute while there is one, nobody who is
        /// demoted computes but on probation, and what stops being wrong stops being reported.
        #[test]
        fn calls_get_a_kernel_whatever_happens(
            policy in policies(),
            tuned in any::<[Option<u16>; 4]>(),
            spells in prop::collection::vec(
                // Rows, cost of each kernel, which fail, which are out of use, and for how many calls.
                (1usize..40, any::<[u16; 4]>(), 0u8..16, 0u8..16, 1u64..400), 1..30,
            ),
        ) {
            let ranking = ranking(tuned.map(|t| t.map(u64::from)));
            let slot = Slot::default();
            let mut now = Duration::ZERO;
            slot.ranking(policy, || ranking);
            let mut spells = spells;
            // In the end all is well, for long.
            spells.push((1, [1000, 1100, 1200, 1300], 0, 0, 300_000));
            let mut late = 0;
            for (m, costs, failing, unusable, calls) in spells {
                for i in 0..calls {
                    let (call, awaited) = slot.count();
                    let usable = |rank: usize| unusable & 1 << rank == 0;
                    let mut changes = Vec::new();
                    let timed =
                        if awaited { slot.attend(call, m, policy, usable, &mut changes) } else { None };
                    let Some(rank) = timed.or_else(|| slot.first(usable)) else {
                        let state = lock(&slot.state);
                        let none = (0..4).all(|rank| !usable(rank) || !state.usable(rank));
                        prop_assert!(none, "somebody could compute");
                        continue;
                    };
                    prop_assert!(usable(rank));
                    {
                        let state = lock(&slot.state);
                        prop_assert!(state.usable(rank) || state.trial == Some(rank));
                    }
                    let elapsed = Duration::from_nanos(u64::from(costs[rank]) * m as u64);
                    now += elapsed;
                    if failing & 1 << rank != 0 {
                        changes.extend(slot.failed(rank, "it fails".into(), policy, false));
                    } else if timed.is_some() {
                        slot.timed(rank, (call, m), (elapsed, now), policy, usable, &mut changes);
                    }
                    if i > 250_000 {
                        late += changes.len();
                    }
                }
            }
            prop_assert_eq!(late, 0, "nothing happens any more");
            let state = lock(&slot.state);
            let mut order = state.by_speed.clone();
            order.sort_unstable();
            prop_assert_eq!(order, vec![0, 1, 2, 3]);
            prop_assert!(state.kernels.iter().all(|kernel| kernel.demoted.is_none_or(|d| d.until > 300_000)));
        }
    }

    #[test]
    fn tuning_times_are_scaled_by_what_the_kernel_in_use_gained() {
        let slot = Slot::default();
        let policy = FallbackPolicy::Adaptive;
        slot.ranking(policy, || ranking([Some(100_000), Some(120_000), None, Some(400_000)]));
        // In the cache, it takes a third of what it took from memory.
        let mut changes = Vec::new();
        for call in 0..WINDOW as u64 {
            let elapsed = Duration::from_micros(33);
            slot.timed(0, (call, 1), (elapsed, Duration::ZERO), policy, |_| true, &mut changes);
        }
        assert_eq!(changes, []);
        let state = lock(&slot.state);
        let expected = [0, 1, 2, 3].map(|rank| state.expected(rank, 0, 1, 1));
        assert_eq!(expected, [Some(33_000.0), Some(39_600.0), None, Some(132_000.0)]);
        // Nothing is known of other rows.
        assert_eq!(state.expected(0, 0, 2, 1), None);
    }
}
