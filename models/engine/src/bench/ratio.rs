//! How much faster one set of measurements is than another, and how sure that is.
//!
//! The estimate is Hodges and Lehmann's: the median of all ratios of a new sample to an old one. Its interval is the set of
//! ratios that the rank test of Mann and Whitney (samples that were measured at different times) or of Wilcoxon (pairs that
//! were measured in turns) does not reject at 5 percent (Hollander, Wolfe, Chicken, "Nonparametric Statistical Methods",
//! chapters 3 and 4). Neither assumes a distribution. Too few rounds give no interval.

use serde::{Deserialize, Serialize};

/// Quantile of the normal distribution: 95 percent lie between minus this and this.
const Z: f64 = 1.96;

/// A ratio of two speeds, new over old: above 1 is faster.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// The estimate.
    pub ratio: f64,
    /// The interval that it is in, with a confidence of 95 percent. Absent if there are too few rounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
}

impl Ratio {
    /// Of samples that were measured at different times; `None` if a side has none.
    pub fn of_groups(old: &[f64], new: &[f64]) -> Option<Self> {
        let (n, m) = (old.len() as f64, new.len() as f64);
        let ratios = new.iter().flat_map(|new| old.iter().map(move |old| new / old)).collect();
        Self::of_sorted(ratios, n * m / 2.0 - Z * (n * m * (n + m + 1.0) / 12.0).sqrt())
    }

    /// Of pairs (old, new) that were measured in turns; `None` without a pair.
    pub fn of_pairs(pairs: &[(f64, f64)]) -> Option<Self> {
        let n = pairs.len() as f64;
        let logs: Vec<f64> = pairs.iter().map(|(old, new)| (new / old).ln()).collect();
        let mean = |i: usize, j: usize| f64::midpoint(logs[i], logs[j]).exp();
        let means = (0..logs.len()).flat_map(|i| (i..logs.len()).map(move |j| (i, j)));
        let means = means.map(|(i, j)| mean(i, j)).collect();
        Self::of_sorted(means, n * (n + 1.0) / 4.0 - Z * (n * (n + 1.0) * (2.0 * n + 1.0) / 24.0).sqrt())
    }

    /// The interval leaves out `rank` ratios at each end, of which the outermost one belongs to it.
    fn of_sorted(mut ratios: Vec<f64>, rank: f64) -> Option<Self> {
        if ratios.iter().any(|ratio| !ratio.is_finite()) {
            return None;
        }
        ratios.sort_by(f64::total_cmp);
        let (lower, upper) = (ratios.get(ratios.len().checked_sub(1)? / 2)?, ratios.get(ratios.len() / 2)?);
        let rank = rank.floor() as usize;
        let ends =
            |rank: usize| Some([*ratios.get(rank - 1)?, *ratios.get(ratios.len().checked_sub(rank)?)?]);
        Some(Self {
            ratio: f64::midpoint(*lower, *upper),
            interval: if rank >= 1 { ends(rank) } else { None },
        })
    }

    /// What the ratio says about a loss or a gain of more than `tolerance` (0.05 is 5 percent).
    pub fn verdict(self, tolerance: f64) -> Verdict {
        let Some([low, high]) = self.interval else { return Verdict::TooFewRounds };
        match () {
            () if high < 1.0 - tolerance => Verdict::Worse,
            () if low > 1.0 + tolerance => Verdict::Better,
            () if low >= 1.0 - tolerance && high <= 1.0 + tolerance => Verdict::Same,
            () => Verdict::Noise,
        }
    }
}

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The whole interval is beyond the tolerance.
    Worse,
    /// Likewise, in the other direction.
    Better,
    /// The whole interval is within the tolerance.
    Same,
    /// The interval reaches from within the tolerance to beyond it: the noise is too large to tell.
    Noise,
    /// Too few rounds for an interval.
    TooFewRounds,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Worse => "worse",
            Self::Better => "better",
            Self::Same => "the same",
            Self::Noise => "no difference beyond noise",
            Self::TooFewRounds => "too few rounds to tell",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_rank_tests() {
        assert_eq!(Ratio::of_groups(&[], &[1.0]), None);
        assert_eq!(Ratio::of_groups(&[0.0], &[0.0]), None, "no ratio");
        // 3 and 3 rounds can't reject at 5 percent (the smallest p is 2 / 20); 4 and 4 can (2 / 70).
        let three = Ratio::of_groups(&[1.0; 3], &[2.0; 3]).unwrap();
        assert_eq!((three.ratio, three.interval), (2.0, None));
        assert_eq!(three.verdict(0.05), Verdict::TooFewRounds);
        let four = Ratio::of_groups(&[1.0, 1.0, 1.0, 1.25], &[2.0, 2.0, 2.0, 2.5]).unwrap();
        assert_eq!((four.ratio, four.interval), (2.0, Some([1.6, 2.5])));
        // 5 pairs can't (2 / 32), 6 can (2 / 64).
        assert_eq!(Ratio::of_pairs(&[(1.0, 2.0); 5]).unwrap().interval, None);
        let six = Ratio::of_pairs(&[(1.0, 2.0); 6]).unwrap();
        assert!((six.ratio - 2.0).abs() < 1e-12 && six.interval.is_some());
    }

    #[test]
    fn verdicts_need_the_whole_interval() {
        let verdict = |low, high| Ratio { ratio: 1.0, interval: Some([low, high]) }.verdict(0.05);
        assert_eq!(verdict(0.5, 0.94), Verdict::Worse);
        assert_eq!(verdict(0.5, 0.96), Verdict::Noise);
        assert_eq!(verdict(0.96, 1.04), Verdict::Same);
        assert_eq!(verdict(0.96, 1.2), Verdict::Noise);
        assert_eq!(verdict(1.06, 1.2), Verdict::Better);
        // Equal speeds with noise.
        let noisy = [0.8, 0.9, 1.0, 1.1, 1.2];
        assert_eq!(Ratio::of_groups(&noisy, &noisy).unwrap().verdict(0.05), Verdict::Noise);
        let slow: Vec<f64> = noisy.iter().map(|speed| speed / 3.0).collect();
        assert_eq!(Ratio::of_groups(&noisy, &slow).unwrap().verdict(0.05), Verdict::Worse);
    }
}
