//! Required figures: `decode>=15,first-token<=0.2s`, or a TOML file of them.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{BenchReport, Figure};

/// Limits, all of which must be kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Requirements(Vec<Limit>);

/// The smallest or the largest value of a figure.
#[derive(Clone, Debug, PartialEq)]
struct Limit {
    figure: Figure,
    at_least: bool,
    value: f64,
}

/// A limit and what was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Requirement {
    /// The figure.
    pub figure: Figure,
    /// Whether the limit is the smallest value; else it is the largest.
    pub at_least: bool,
    /// The limit: tokens a second, seconds, bytes or a part of a whole.
    pub limit: f64,
    /// What was measured. Rates are the median of all repetitions.
    pub found: f64,
    /// Whether the limit is kept.
    pub kept: bool,
}

impl Limit {
    fn parse(text: &str) -> Result<Self, String> {
        let (name, at_least, value) = match (text.split_once(">="), text.split_once("<=")) {
            (Some((name, value)), None) => (name, true, value),
            (None, Some((name, value))) => (name, false, value),
            _ => return Err(format!("`{text}`: expected NAME>=VALUE or NAME<=VALUE")),
        };
        let figure: Figure = name.trim().parse()?;
        let value = figure.unit().parse(value).map_err(|problem| format!("{figure}: {problem}"))?;
        Ok(Self { figure, at_least, value })
    }
}

impl FromStr for Requirements {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(|text| Limit::parse(text.trim())).collect::<Result<_, _>>().map(Self)
    }
}

impl Requirements {
    /// From names with their limits, such as `decode` with `>= 15`.
    ///
    /// # Errors
    /// The first that is wrong, and what would be right.
    pub fn of_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, String> {
        let limit = |(name, limit): (&str, &str)| match limit.trim_start().starts_with(['<', '>']) {
            true => Limit::parse(&format!("{name}{limit}")),
            false => Err(format!("{name} = \"{limit}\": expected \">= VALUE\" or \"<= VALUE\"")),
        };
        pairs.into_iter().map(limit).collect::<Result<_, _>>().map(Self)
    }

    /// The figures that they name.
    pub fn figures(&self) -> impl Iterator<Item = Figure> {
        self.0.iter().map(|limit| limit.figure)
    }

    /// Each limit's verdict, in their order.
    ///
    /// # Errors
    /// The first figure that was not measured.
    pub fn judge(&self, report: &BenchReport) -> Result<Vec<Requirement>, Figure> {
        let verdict = |&Limit { figure, at_least, value }: &Limit| {
            let found = figure.of(report).ok_or(figure)?;
            let kept = if at_least { found >= value } else { found <= value };
            Ok(Requirement { figure, at_least, limit: value, found, kept })
        };
        self.0.iter().map(verdict).collect()
    }
}

impl std::fmt::Display for Requirement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { figure, at_least, limit, found, kept } = self;
        let (sign, verdict) = (if *at_least { ">=" } else { "<=" }, if *kept { "kept" } else { "missed" });
        write!(f, "{verdict}: {figure} {sign} {}, measured {}", figure.show(*limit), figure.show(*found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_units_and_what_is_wrong_is_named() {
        let Requirements(limits) = "decode>=15, first-token <= 200ms,peak-memory<=1.2GB".parse().unwrap();
        let seen: Vec<_> = limits.iter().map(|l| (l.figure, l.at_least, l.value)).collect();
        assert_eq!(
            seen,
            [
                (Figure::Decode, true, 15.0),
                (Figure::FirstToken, false, 0.2),
                (Figure::PeakMemory, false, 1.2e9)
            ]
        );
        assert_eq!(
            Requirements::of_pairs([("decode", ">= 15 tokens/s"), ("of-bandwidth", ">=50%")]),
            "decode>=15,of-bandwidth>=0.5".parse()
        );
        for (text, parts) in [
            ("speed>=3", &["`speed`", "decode, prefill, first-token"][..]),
            ("decode=3", &["`decode=3`", "NAME>=VALUE"]),
            ("decode>=fast", &["decode: `fast`", "none, tokens/s"]),
            ("first-token<=0.2", &["first-token: `0.2`", "s, ms, us, min, h"]),
            ("peak-memory<=1TB", &["`1TB`", "kB, MB, GB"]),
            ("", &["expected NAME"]),
        ] {
            let error = text.parse::<Requirements>().unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{text}: {error}");
        }
        assert!(Requirements::of_pairs([("decode", "15")]).unwrap_err().contains("decode = \"15\""));
    }
}
