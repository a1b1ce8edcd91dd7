//! Limits for the figures of a comparison: `correlation>=0.999,kl_mean<=0.01`.

use std::str::FromStr;

use serde::Serialize;

use super::Figures;

/// The figures that limits can name.
const NAMES: [&str; 11] = [
    "correlation",
    "cosine",
    "mse",
    "max_abs_error",
    "mean_abs_error",
    "kl_mean",
    "kl_p99",
    "kl_max",
    "top1_agreement",
    "top5_agreement",
    "perplexity_ratio",
];

/// Limits, all of which must be kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Tolerance(Vec<Limit>);

/// The smallest or the largest value of a figure.
#[derive(Clone, Debug, PartialEq)]
struct Limit {
    /// As it was given.
    text: String,
    name: &'static str,
    at_least: bool,
    value: f64,
}

/// A limit and what was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// The limit, as `kl_mean<=0.01`.
    pub limit: String,
    /// The figure; `None` where there is none, as a perplexity without tokens. No limit is kept then.
    pub found: Option<f64>,
    /// Whether the limit is kept.
    pub kept: bool,
}

impl FromStr for Tolerance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let limit = |text: &str| -> Result<Limit, String> {
            let (name, at_least, value) = match (text.split_once(">="), text.split_once("<=")) {
                (Some((name, value)), None) => (name.trim(), true, value.trim()),
                (None, Some((name, value))) => (name.trim(), false, value.trim()),
                _ => return Err(format!("`{text}`: expected NAME>=NUMBER or NAME<=NUMBER")),
            };
            let known = NAMES.into_iter().find(|known| *known == name);
            let name = known.ok_or_else(|| format!("`{name}`: the names are {}", NAMES.join(", ")))?;
            let number = value.parse().ok().filter(|value: &f64| value.is_finite());
            let value = number.ok_or_else(|| format!("`{value}` is no number"))?;
            Ok(Limit { text: text.to_owned(), name, at_least, value })
        };
        text.split(',').map(|text| limit(text.trim())).collect::<Result<_, _>>().map(Self)
    }
}

impl Tolerance {
    /// Each limit's verdict, in their order.
    pub fn judge(&self, figures: &Figures) -> Vec<Verdict> {
        let verdict = |limit: &Limit| {
            let found = figures.by_name(limit.name);
            let kept = |found: f64| if limit.at_least { found >= limit.value } else { found <= limit.value };
            Verdict { limit: limit.text.clone(), found, kept: found.is_some_and(kept) }
        };
        self.0.iter().map(verdict).collect()
    }
}

impl Figures {
    fn by_name(&self, name: &str) -> Option<f64> {
        match name {
            "correlation" => self.correlation,
            "cosine" => self.cosine,
            "mse" => Some(self.mse),
            "max_abs_error" => Some(self.max_abs_error),
            "mean_abs_error" => Some(self.mean_abs_error),
            "kl_mean" => Some(self.kl_mean),
            "kl_p99" => Some(self.kl_p99),
            "kl_max" => Some(self.kl_max),
            "top1_agreement" => Some(self.top1_agreement),
            "top5_agreement" => Some(self.top5_agreement),
            "perplexity_ratio" => self.perplexity_ratio,
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::Sums;
    use super::*;

    #[test]
    fn limits_are_named_kept_and_broken() {
        let mut sums = Sums::default();
        sums.push(&[1.0, 0.0, 2.0], &[1.0, 0.5, 2.0], None);
        let figures = sums.finish(3).unwrap();
        let tolerance: Tolerance =
            "max_abs_error<=0.5, top1_agreement>=1,mse<=0.01,perplexity_ratio<=2".parse().unwrap();
        let verdicts = tolerance.judge(&figures);
        assert_eq!(verdicts.iter().map(|v| v.kept).collect::<Vec<_>>(), [true, true, false, false]);
        assert_eq!((verdicts[0].limit.as_str(), verdicts[0].found), ("max_abs_error<=0.5", Some(0.5)));
        assert_eq!(verdicts[3].found, None);
        // Every name is a figure of the JSON.
        let json = serde_json::to_value(&figures).unwrap();
        for name in NAMES {
            assert_eq!(json[name].as_f64(), figures.by_name(name), "{name}");
        }
    }

    #[test]
    fn wrong_limits_are_refused() {
        for (text, expected) in [
            ("", "expected NAME>=NUMBER"),
            ("mse", "expected NAME>=NUMBER"),
            ("mse<0.1", "expected NAME>=NUMBER"),
            ("mse<=0.1,", "expected NAME>=NUMBER"),
            ("error<=1", "the names are correlation, cosine"),
            ("mse<=x", "`x` is no number"),
            ("mse<=nan", "`nan` is no number"),
        ] {
            let error = text.parse::<Tolerance>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
