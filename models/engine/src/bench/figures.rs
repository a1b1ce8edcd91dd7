//! The figures of a measurement that have names: what `--require` can ask for.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{BenchReport, BenchResult};
use crate::text::{human_bytes, human_seconds};

/// A figure of a [`BenchReport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Figure {
    /// Median of the generated tokens a second.
    Decode,
    /// Median of the prompt's tokens a second.
    Prefill,
    /// Median of the seconds from the request to the first token.
    FirstToken,
    /// Seconds from the start of the process to the first token.
    StartToFirstToken,
    /// Seconds between tokens: the median.
    TokenP50,
    /// The 95th percentile.
    TokenP95,
    /// The 99th percentile.
    TokenP99,
    /// The largest.
    TokenMax,
    /// Seconds until the model was loaded.
    Load,
    /// Peak of the resident memory in bytes.
    PeakMemory,
    /// Bytes of the KV cache.
    KvCache,
    /// Bytes that a token reads.
    BytesPerToken,
    /// Decode speed as a part of what the bandwidth allows, 0 to 1.
    OfBandwidth,
}

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Tokens a second.
    TokensPerSecond,
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
    /// A part of a whole.
    Fraction,
}

impl Figure {
    /// All figures.
    pub const ALL: [Self; 13] = [
        Self::Decode,
        Self::Prefill,
        Self::FirstToken,
        Self::StartToFirstToken,
        Self::TokenP50,
        Self::TokenP95,
        Self::TokenP99,
        Self::TokenMax,
        Self::Load,
        Self::PeakMemory,
        Self::KvCache,
        Self::BytesPerToken,
        Self::OfBandwidth,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Prefill => "prefill",
            Self::FirstToken => "first-token",
            Self::StartToFirstToken => "start-to-first-token",
            Self::TokenP50 => "token-p50",
            Self::TokenP95 => "token-p95",
            Self::TokenP99 => "token-p99",
            Self::TokenMax => "token-max",
            Self::Load => "load",
            Self::PeakMemory => "peak-memory",
            Self::KvCache => "kv-cache",
            Self::BytesPerToken => "bytes-per-token",
            Self::OfBandwidth => "of-bandwidth",
        }
    }

    /// The names of all figures, separated by commas.
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// What it counts.
    pub fn unit(self) -> Unit {
        match self {
            Self::Decode | Self::Prefill => Unit::TokensPerSecond,
            Self::PeakMemory | Self::KvCache | Self::BytesPerToken => Unit::Bytes,
            Self::OfBandwidth => Unit::Fraction,
            _ => Unit::Seconds,
        }
    }

    /// Its value; `None` where it was not measured.
    pub fn of(self, report: &BenchReport) -> Option<f64> {
        let result: &BenchResult = &report.result;
        let token = || result.latency?.token_seconds;
        match self {
            Self::Decode => result.decode_tokens_per_s.map(|spread| spread.median),
            Self::Prefill => result.prefill_tokens_per_s.map(|spread| spread.median),
            Self::FirstToken => result.latency.map(|latency| latency.first_token_seconds.median),
            Self::StartToFirstToken => result.start_to_first_token_seconds,
            Self::TokenP50 => token().map(|latency| latency.p50),
            Self::TokenP95 => token().map(|latency| latency.p95),
            Self::TokenP99 => token().map(|latency| latency.p99),
            Self::TokenMax => token().map(|latency| latency.max),
            Self::Load => Some(report.load_seconds),
            Self::PeakMemory => result.peak_rss_bytes.map(|bytes| bytes as f64),
            Self::KvCache => Some(result.kv_cache_bytes as f64),
            Self::BytesPerToken => Some(result.bytes_per_token as f64),
            Self::OfBandwidth => result.decode_fraction_of_bandwidth,
        }
    }

    /// What to measure, where it was not measured.
    pub fn needs(self) -> &'static str {
        match self {
            Self::Decode => "-n of at least 1",
            Self::Prefill | Self::FirstToken | Self::StartToFirstToken => "-p of at least 1",
            Self::TokenP50 | Self::TokenP95 | Self::TokenP99 | Self::TokenMax => "-p and -n of at least 1",
            Self::PeakMemory => "a system that reports the peak of the memory",
            Self::OfBandwidth => "-n of at least 1, and the CPU as the device",
            Self::Load | Self::KvCache | Self::BytesPerToken => "nothing",
        }
    }

    /// A value for people.
    pub fn show(self, value: f64) -> String {
        match self.unit() {
            Unit::TokensPerSecond => format!("{value:.2} tokens/s"),
            Unit::Seconds => human_seconds(value),
            Unit::Bytes => human_bytes(value as u64),
            Unit::Fraction => format!("{value:.3}"),
        }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Figure {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|figure| figure.name() == name);
        known.ok_or_else(|| format!("`{name}`: the names are {}", Self::names()))
    }
}

impl Unit {
    /// Its factors by name, the basic unit first.
    fn factors(self) -> &'static [(&'static str, f64)] {
        match self {
            Self::TokensPerSecond => &[("", 1.0), ("tokens/s", 1.0), ("/s", 1.0)],
            Self::Seconds => &[("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("min", 60.0), ("h", 3600.0)],
            Self::Bytes => &[
                ("B", 1.0),
                ("kB", 1e3),
                ("MB", 1e6),
                ("GB", 1e9),
                ("KiB", 1024.0),
                ("MiB", 1048576.0),
                ("GiB", 1073741824.0),
            ],
            Self::Fraction => &[("", 1.0), ("%", 0.01)],
        }
    }

    /// Reads a value with its unit: `15`, `0.2s`, `1.2GB`.
    ///
    /// # Errors
    /// What is wrong with it, and what would be right.
    pub fn parse(self, text: &str) -> Result<f64, String> {
        let text = text.trim();
        let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
        let (number, unit) = (&text[..end], text[end..].trim());
        let factor = self.factors().iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
        let number = number.parse().ok().filter(|value: &f64| value.is_finite());
        match (number, factor) {
            (Some(number), Some((_, factor))) => Ok(number * factor),
            _ => {
                let names: Vec<&str> = self
                    .factors()
                    .iter()
                    .map(|(name, _)| if name.is_empty() { "none" } else { *name })
                    .collect();
                Err(format!("`{text}`: expected a number with its unit ({})", names.join(", ")))
            }
        }
    }
}
