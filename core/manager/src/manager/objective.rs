//! What layouts of weights compete on.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// What the layout of weights is chosen for: the lowest cost, in nanoseconds, where t(M) is the time of the layout's fastest
/// kernel for M rows.
///
/// | | cost | a model that |
/// | --- | --- | --- |
/// | `Balanced` | t(1) + 2 t(32) / 32, times 1.25 where t(1) is more than 1.15 times the lowest | reads two tokens of prompts for each token that it writes |
/// | `Decode` | t(1) | writes |
/// | `Prefill` | t(32) / 32 | reads |
/// | `Throughput` | t(8) / 8 + 2 t(32) / 32 | does as with `Balanced`, for eight requests at once |
///
/// Costs within noise of the lowest count as the same: then the layout with the fewest bytes is chosen. Noise is how much longer
/// the medians of the cheapest took than its fastest runs, at least 5 % and at most 15 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Requests with a prompt and an answer.
    #[default]
    Balanced,
    /// One token after the other.
    Decode,
    /// Prompts.
    Prefill,
    /// Many requests at once.
    Throughput,
}

impl Objective {
    /// The rows whose times make the cost, and how many rows of them each unit of work takes.
    pub(super) fn terms(self) -> &'static [(usize, f64)] {
        match self {
            Self::Balanced => &[(1, 1.0), (32, 2.0)],
            Self::Decode => &[(1, 1.0)],
            Self::Prefill => &[(32, 1.0)],
            Self::Throughput => &[(8, 1.0), (32, 2.0)],
        }
    }

    /// How many times longer than the lowest the first of the times may be, and what the cost is multiplied by if it is longer:
    /// a model should write slowly only if prompts gain much.
    pub(super) fn limit(self) -> Option<(f64, f64)> {
        (self == Self::Balanced).then_some((1.15, 1.25))
    }

    /// The cost as a formula.
    pub fn rule(self) -> &'static str {
        match self {
            Self::Balanced => "t(1) + 2 t(32) / 32, times 1.25 where t(1) is more than 1.15 times the lowest",
            Self::Decode => "t(1)",
            Self::Prefill => "t(32) / 32",
            Self::Throughput => "t(8) / 8 + 2 t(32) / 32",
        }
    }
}

/// The error says what is expected.
impl FromStr for Objective {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "balanced" => Ok(Self::Balanced),
            "decode" => Ok(Self::Decode),
            "prefill" => Ok(Self::Prefill),
            "throughput" => Ok(Self::Throughput),
            _ => Err("expected balanced, decode, prefill or throughput"),
        }
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Balanced => "balanced",
            Self::Decode => "decode",
            Self::Prefill => "prefill",
            Self::Throughput => "throughput",
        })
    }
}

/// What is known of a layout of weights of one shape.
#[derive(Clone, Debug)]
pub struct LayoutCost {
    /// `plugin/layout`; `None` for canonical.
    pub layout: Option<String>,
    /// Rows, and the fastest kernel for them with its median time in nanoseconds.
    pub fastest: Vec<(usize, Option<(String, u64)>)>,
    /// What the [`Objective`] makes of the times, in nanoseconds; `None` if one of them is not known.
    pub cost: Option<f64>,
}
