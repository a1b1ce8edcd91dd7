//! How long kernels take: what is measured in use, and what is expected.

use std::time::Duration;

use super::{Demotion, State, WINDOW};

/// What is known of one kernel here.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// Nanoseconds that tuning has, for `Ranking::rows` rows.
    pub(super) tuned: Option<f64>,
    pub(super) demoted: Option<Demotion>,
    /// Demotions in a row, for the back-off, and the call of the last promotion.
    pub(super) strikes: u32,
    pub(super) promoted_at: u64,
    /// Calls done well on probation.
    pub(super) good: u32,
    pub(super) figures: Vec<(u64, Figure)>,
}

/// Times for one number of rows, in nanoseconds (of a row, beyond 16).
#[derive(Clone, Debug)]
pub(super) struct Figure {
    pub(super) expected: f64,
    pub(super) recent: Vec<f64>,
}

/// Rows that kernels compute at a time, at most: a number of them in between costs as much as the next multiple.
const ROW_BLOCK: usize = 16;

/// What figures are kept by: exact numbers of rows up to 16, and 0 for all above.
pub(super) fn key(m: usize) -> u64 {
    if m <= ROW_BLOCK { m as u64 } else { 0 }
}

/// A call's time as figures keep it.
pub(in crate::manager) fn scaled(elapsed: Duration, m: usize) -> f64 {
    elapsed.as_nanos() as f64 / if key(m) == 0 { m.next_multiple_of(ROW_BLOCK) as f64 } else { 1.0 }
}

pub(in crate::manager) fn median(times: &[f64]) -> Option<f64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

pub(in crate::manager) fn microseconds(ns: f64) -> String {
    format!("{:.1} us", ns / 1e3)
}

impl Figure {
    pub(super) fn push(&mut self, time: f64) {
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
    pub(super) fn drift(&self, factor: f64) -> Option<f64> {
        let slow = self.recent.len() == WINDOW && self.recent.iter().all(|&t| t > factor * self.expected);
        (slow && self.expected > 0.0).then(|| median(&self.recent).expect("a window") / self.expected)
    }
}

impl Standing {
    pub(super) fn figure(&self, key: u64) -> Option<&Figure> {
        self.figures.iter().find(|(known, _)| *known == key).map(|(_, figure)| figure)
    }
}

impl State {
    /// What tuning has for a kernel, if it has that for these rows.
    pub(super) fn tuned(&self, rank: usize, key: u64, rows: usize) -> Option<f64> {
        let tuned = self.kernels[rank].tuned?;
        match key {
            0 => Some(tuned / rows.next_multiple_of(ROW_BLOCK) as f64),
            m if m == rows as u64 => Some(tuned),
            _ => None,
        }
    }

    /// What a kernel is expected to take, if anything is known; `head` is the one in use.
    pub(super) fn expected(&self, rank: usize, head: usize, key: u64, rows: usize) -> Option<f64> {
        if let Some(figure) = self.kernels[rank].figure(key).filter(|figure| figure.expected.is_finite()) {
            return Some(figure.expected);
        }
        match self.gain(head, key) {
            // For other rows than tuning's, the same ratio holds well enough.
            Some(gain) => Some(self.kernels[rank].tuned? * gain),
            None => self.tuned(rank, key, rows),
        }
    }

    /// What a kernel is expected to take, as a part of what tuning has for it.
    pub(super) fn gain(&self, rank: usize, key: u64) -> Option<f64> {
        let figure = self.kernels[rank].figure(key).filter(|figure| figure.expected.is_finite())?;
        Some(figure.expected / self.kernels[rank].tuned.filter(|&tuned| tuned > 0.0)?)
    }

    pub(super) fn figure(&mut self, rank: usize, key: u64, expected: Option<f64>) -> &mut Figure {
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
    pub(super) fn expect(&mut self, rank: usize, key: u64, time: f64) {
        let figure = self.figure(rank, key, None);
        figure.expected = time;
        figure.recent.clear();
    }
}
