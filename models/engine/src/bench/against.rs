//! A measurement compared with earlier ones, or with those of another program that were made in turns.

use std::fmt;

use bitnet_burn_manager::cpu;
use serde::{Deserialize, Serialize};

use super::ratio::{Ratio, Verdict};
use super::{BenchReport, Build, Figure, Record, Round, Spread};

/// What speeds are divided by, so that a machine that became slower is not taken for a program that did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normaliser {
    /// The read bandwidth of the memory, around each round.
    ReadBandwidth,
    /// The int8 multiply-adds of registers, around each round.
    MultiplyAdds,
    /// The other program's speed in the same turn.
    Turns,
}

impl fmt::Display for Normaliser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadBandwidth => "divided by the read bandwidth",
            Self::MultiplyAdds => "divided by the multiply rate",
            Self::Turns => "in turns",
        })
    }
}

/// A figure, before and now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// The figure.
    pub figure: Figure,
    /// Before: all rounds, as they were measured.
    pub before: Spread,
    /// Now, likewise.
    pub now: Spread,
    /// Rounds before and now.
    pub rounds: [usize; 2],
    /// What the rounds were divided by; absent for figures that do not depend on speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub normalised: Option<Normaliser>,
    /// How good it is now, compared with before: above 1 is better.
    #[serde(flatten)]
    pub ratio: Ratio,
    /// What that means.
    pub verdict: Verdict,
}

/// A measurement compared with earlier ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Against {
    /// What measured before.
    pub program: Build,
    /// Number of its runs.
    pub runs: usize,
    /// The largest loss that is accepted, 0 to 1.
    pub tolerance: f64,
    /// The figures.
    pub changes: Vec<Change>,
}

impl Against {
    /// Compares a measurement with a [baseline](Record::baseline) of it, which has at least one record.
    pub fn of(baseline: &[Record], now: &Record, tolerance: f64) -> Option<Self> {
        let program = baseline.first()?.program.clone();
        let before: Vec<&BenchReport> = baseline.iter().map(|record| &record.report).collect();
        let speed = |figure| speed(figure, &before, &now.report, tolerance);
        let changes =
            [speed(Figure::Prefill), speed(Figure::Decode), memory(&before, &now.report, tolerance)];
        Some(Self {
            program,
            runs: baseline.len(),
            tolerance,
            changes: changes.into_iter().flatten().collect(),
        })
    }

    /// Whether something became worse by more than the tolerance.
    pub fn is_worse(&self) -> bool {
        is_worse(&self.changes)
    }
}

/// Whether something became worse by more than the tolerance.
pub fn is_worse(changes: &[Change]) -> bool {
    changes.iter().any(|change| change.verdict == Verdict::Worse)
}

/// A speed, and what it is divided by in a round.
fn sample(figure: Figure, round: &Round) -> Option<f64> {
    match figure {
        Figure::Prefill => round.prefill_tokens_per_s,
        Figure::Decode => round.decode_tokens_per_s,
        _ => None,
    }
}

/// The bound of a figure is the bandwidth where a token's weights come from memory, and else how fast the machine computes.
fn normaliser(figure: Figure, reports: &[&BenchReport]) -> Normaliser {
    let in_cache = |report: &&BenchReport| {
        cpu::last_level_cache().is_some_and(|cache| report.result.bytes_per_token < cache as u64)
    };
    let multiplies = |report: &&BenchReport| {
        report.result.rounds.iter().all(|round| round.multiply_adds_g_per_s.is_some())
    };
    let computes = figure == Figure::Prefill || reports.iter().any(in_cache);
    match computes && reports.iter().all(multiplies) {
        true => Normaliser::MultiplyAdds,
        false => Normaliser::ReadBandwidth,
    }
}

fn speed(figure: Figure, before: &[&BenchReport], now: &BenchReport, tolerance: f64) -> Option<Change> {
    let all: Vec<&BenchReport> = before.iter().copied().chain([now]).collect();
    let normalised = normaliser(figure, &all);
    let rounds = |reports: &[&BenchReport]| -> (Vec<f64>, Vec<f64>) {
        let rounds = reports.iter().flat_map(|report| &report.result.rounds);
        let values = rounds.filter_map(|round| {
            let divisor = match normalised {
                Normaliser::MultiplyAdds => round.multiply_adds_g_per_s?,
                _ => round.read_gb_per_s,
            };
            sample(figure, round).map(|value| (value, value / divisor))
        });
        values.unzip()
    };
    let ((raw_before, before), (raw_now, now)) = (rounds(before), rounds(&[now]));
    let ratio = Ratio::of_groups(&before, &now)?;
    Some(Change {
        figure,
        before: Spread::of(&raw_before)?,
        now: Spread::of(&raw_now)?,
        rounds: [before.len(), now.len()],
        normalised: Some(normalised),
        verdict: ratio.verdict(tolerance),
        ratio,
    })
}

/// Memory has no noise that more rounds would show: the median before, and the value now. Measuring kernels takes memory, so
/// runs that did are compared with runs that did.
fn memory(before: &[&BenchReport], now: &BenchReport, tolerance: f64) -> Option<Change> {
    let figure = Figure::PeakMemory;
    let tuned = |report: &BenchReport| report.execution.tuning.measured > 0;
    let alike = before.iter().filter(|report| tuned(report) == tuned(now));
    let before: Vec<f64> = alike.filter_map(|report| figure.of(report)).collect();
    let now = figure.of(now)?;
    let spread = Spread::of(&before)?;
    let value = spread.median / now;
    let ratio = Ratio { ratio: value, interval: Some([value; 2]) };
    Some(Change {
        figure,
        before: spread,
        now: Spread::of(&[now])?,
        rounds: [before.len(), 1],
        normalised: None,
        verdict: ratio.verdict(tolerance),
        ratio,
    })
}

/// Measurements of two programs or settings in turns: (before, now) of each turn. Figures that a program lacks are left out.
pub fn in_turns(turns: &[(Figures, Figures)], tolerance: f64) -> Vec<Change> {
    let change = |(figure, value): (Figure, fn(&Figures) -> Option<f64>)| {
        let pairs: Vec<(f64, f64)> =
            turns.iter().filter_map(|(before, now)| Some((value(before)?, value(now)?))).collect();
        let (before, now): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
        let (before, now) = (Spread::of(&before)?, Spread::of(&now)?);
        let rounds = [pairs.len(); 2];
        let (ratio, normalised) = match figure {
            Figure::PeakMemory => {
                let value = before.median / now.median;
                (Ratio { ratio: value, interval: Some([value; 2]) }, None)
            }
            _ => (Ratio::of_pairs(&pairs)?, Some(Normaliser::Turns)),
        };
        Some(Change { figure, before, now, rounds, normalised, verdict: ratio.verdict(tolerance), ratio })
    };
    type Read = fn(&Figures) -> Option<f64>;
    let figures: [(Figure, Read); 3] = [
        (Figure::Prefill, |figures| figures.prefill_tokens_per_s.map(|spread| spread.median)),
        (Figure::Decode, |figures| figures.decode_tokens_per_s.map(|spread| spread.median)),
        (Figure::PeakMemory, |figures| figures.peak_rss_bytes.map(|bytes| bytes as f64)),
    ];
    figures.into_iter().filter_map(change).collect()
}

/// What every version of the program prints with `bench --json`.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Figures {
    /// Tokens of the prompt a second.
    #[serde(default)]
    pub prefill_tokens_per_s: Option<Spread>,
    /// Generated tokens a second.
    #[serde(default)]
    pub decode_tokens_per_s: Option<Spread>,
    /// Peak of the resident memory.
    #[serde(default)]
    pub peak_rss_bytes: Option<u64>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { figure, before, now, rounds: [old, new], normalised, ratio, verdict } = self;
        let (before, now) = (figure.show(before.median), figure.show(now.median));
        write!(f, "{verdict}: {figure} {now}, before {before}; {:.3} times as good", ratio.ratio)?;
        match (normalised, ratio.interval) {
            (None, _) => Ok(()),
            (Some(how), Some([low, high])) => {
                write!(f, " (95 % sure: {low:.3} to {high:.3}; {new} rounds, before {old}, {how})")
            }
            (Some(how), None) => write!(f, " ({new} rounds, before {old}, {how})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(decode: f64, memory: u64) -> Figures {
        let spread = Spread { median: decode, min: decode, max: decode };
        Figures {
            prefill_tokens_per_s: None,
            decode_tokens_per_s: Some(spread),
            peak_rss_bytes: Some(memory),
        }
    }

    #[test]
    fn turns_find_a_loss_that_a_changing_machine_hides() {
        // The machine becomes twice as slow meanwhile.
        let turns: Vec<_> = (0..8)
            .map(|i| 100.0 / f64::from(i + 1))
            .map(|v| (figures(v, 1000), figures(v * 0.8, 1100)))
            .collect();
        let changes = in_turns(&turns, 0.05);
        let seen: Vec<_> = changes.iter().map(|c| (c.figure, c.verdict, c.rounds)).collect();
        assert_eq!(
            seen,
            [(Figure::Decode, Verdict::Worse, [8, 8]), (Figure::PeakMemory, Verdict::Worse, [8, 8])]
        );
        assert!(is_worse(&changes) && (changes[0].ratio.ratio - 0.8).abs() < 1e-9);
        let same: Vec<_> = turns.iter().map(|(before, _)| (*before, *before)).collect();
        let changes = in_turns(&same, 0.05);
        assert!(!is_worse(&changes) && changes.iter().all(|change| change.verdict == Verdict::Same));
        assert!(changes[0].to_string().starts_with("the same: decode"), "{}", changes[0]);
    }
}
