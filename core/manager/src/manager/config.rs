//! How a manager is set up.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bitnet_burn_plugin::features::{self, Features, UnknownFeature};
use serde::Serialize;

use super::objective::Objective;
use super::probe::{Machine, Probe};
use crate::error::ManagerError;
use crate::store::{self, PluginConfig};
use crate::strict::Strict;
use crate::variables::{parsed, var, warn_of_unknown};

/// [`FallbackPolicy::Adaptive`] races when a kernel takes this many times longer than expected.
pub(super) const DRIFT: f64 = 1.5;

/// The most threads that a user may ask for.
pub const MAX_THREADS: usize = 1024;

/// How a manager is set up.
#[derive(Clone, Debug)]
pub struct ManagerConfig {
    /// Threads for kernels; 0 means one per physical core.
    pub threads: usize,
    /// Whether each of them stays on a core of its own; the first core is left to the thread that calls.
    pub pin: bool,
    /// What is an error instead of something slower or less certain.
    pub strict: Strict,
    /// Use this kernel alone (`plugin/kernel`, or `kernel`), or those of this `plugin`.
    pub force: Option<String>,
    /// CPU features that no kernel of this manager may use, by their [`NAMES`](features::NAMES).
    pub masked_features: Vec<String>,
    /// Directory of the tuning results, and of the copies and verdicts of plugins; `None` keeps them in
    /// memory and in a temporary directory.
    pub cache_dir: Option<PathBuf>,
    /// Where plugins come from, and how they are checked.
    pub plugins: PluginConfig,
    /// Time that tuning may take in all; what is not measured by then is ranked by the nearest
    /// measurement.
    pub tune_budget: Duration,
    /// What the layout of weights is chosen for.
    pub objective: Objective,
    /// What happens when the kernel in use fails or becomes slow.
    pub fallback: FallbackPolicy,
    /// Seed of the places where results of plugins from files are compared. `None`: another one for every manager; its
    /// report has it.
    pub seed: Option<u64>,
    /// The clock, and the look at the memory: the machine's, or a test's.
    pub probe: Arc<dyn Probe>,
}

impl Default for ManagerConfig {
    fn default() -> Self {
        Self {
            threads: 0,
            pin: false,
            strict: Strict::NONE,
            force: None,
            masked_features: Vec::new(),
            cache_dir: None,
            plugins: PluginConfig::default(),
            tune_budget: Duration::from_secs(10),
            objective: Objective::default(),
            fallback: FallbackPolicy::default(),
            seed: None,
            probe: Arc::new(Machine),
        }
    }
}

impl ManagerConfig {
    /// The strict mode that `BITNET_STRICT_MODE` asks for.
    ///
    /// # Errors
    /// If it says something else than it should.
    pub fn strict_from_env() -> Result<Strict, ManagerError> {
        Ok(parsed("BITNET_STRICT_MODE", |expected| expected)?.unwrap_or_default())
    }

    /// The defaults, changed by `BITNET_THREADS`, `BITNET_PIN` (1 or 0), `BITNET_STRICT_MODE` (1, 0, or names of [`Strict`]),
    /// `BITNET_FALLBACK` (a [`FallbackPolicy`]), `BITNET_KERNEL`, `BITNET_CPU_MASK` (feature names, separated by commas), `BITNET_CACHE_DIR` (empty:
    /// keep nothing; unset: the user's cache directory), `BITNET_PLUGINS` (`off`, `on`, or `user`: also the
    /// user's plugin directory), `BITNET_PLUGIN_PATH` (absolute paths) and `BITNET_PLUGIN_PINS` (a file).
    ///
    /// # Errors
    /// If a variable holds something else than it should.
    pub fn from_env() -> Result<Self, ManagerError> {
        warn_of_unknown();
        let mut config = Self::default();
        let expected = "a number of threads, at most 1024";
        if let Some(threads) = parsed::<usize>("BITNET_THREADS", |_| expected)? {
            if threads > MAX_THREADS {
                return Err(ManagerError::Config {
                    name: "BITNET_THREADS",
                    value: threads.to_string(),
                    expected,
                });
            }
            config.threads = threads;
        }
        if let Some(pin) = parsed("BITNET_PIN", |_: std::num::ParseIntError| "0 or 1")? {
            config.pin = match pin {
                0u8 => false,
                1 => true,
                _ => {
                    let value = pin.to_string();
                    return Err(ManagerError::Config { name: "BITNET_PIN", value, expected: "0 or 1" });
                }
            };
        }
        config.strict = Self::strict_from_env()?;
        if let Some(fallback) = parsed("BITNET_FALLBACK", |expected| expected)? {
            config.fallback = fallback;
        }
        config.force = var("BITNET_KERNEL")?.filter(|name| !name.is_empty());
        if let Some(mask) = var("BITNET_CPU_MASK")? {
            config.masked_features =
                mask.split(',').map(|f| f.trim().to_owned()).filter(|f| !f.is_empty()).collect();
            config.mask()?;
        }
        config.cache_dir = match std::env::var_os("BITNET_CACHE_DIR") {
            Some(dir) => (!dir.is_empty()).then(|| dir.into()),
            None => store::default_cache_dir(),
        };
        config.plugins = PluginConfig::from_env()?;
        Ok(config)
    }

    /// [`masked_features`](Self::masked_features) as a set.
    ///
    /// # Errors
    /// If one of the names is unknown.
    pub fn mask(&self) -> Result<Features, ManagerError> {
        self.masked_features.iter().try_fold(Features::NONE, |mask, name| match Features::named(name) {
            Ok(feature) => Ok(mask.with(feature)),
            Err(UnknownFeature(value)) => {
                Err(ManagerError::Config { name: "BITNET_CPU_MASK", value, expected: features::NAMES_TEXT })
            }
        })
    }

    /// What happens when the kernel in use fails or becomes slow, strict mode considered.
    pub(super) fn policy(&self) -> FallbackPolicy {
        if self.strict.no_fallback { FallbackPolicy::Never } else { self.fallback }
    }
}

/// What happens when the kernel in use fails, or becomes slower than it was. Every kernel gives the same
/// bits, so that none of this changes a result.
///
/// With every setting but `Never`, a kernel that returns a status other than OK is replaced by the next one
/// of its ranking in that very call, the last one by the reference; it is demoted for this shape and bucket
/// of rows, tried again after 128 calls (twice as many with each demotion in a row), and back at its place
/// after 4 calls that went well. The settings differ in what time means:
///
/// | | a kernel that becomes slow |
/// | --- | --- |
/// | `OnError` | is not noticed: no clock is read |
/// | `OnPerformanceThreshold(x)` | is demoted when it takes more than x times what is expected, while another one promises to be faster |
/// | `Adaptive` | races against its rivals over the next live calls when it takes more than 1.5 times what is expected; the fastest one computes from then on, and is written into the cache of measurements |
///
/// As text (`BITNET_FALLBACK`): `never`, `on-error`, `threshold:1.5`, `adaptive`.
///
/// ```
/// use bitnet_burn_manager::FallbackPolicy;
///
/// assert_eq!("threshold:2".parse(), Ok(FallbackPolicy::OnPerformanceThreshold(2.0)));
/// assert!("threshold:0.5".parse::<FallbackPolicy>().is_err());
/// assert_eq!(FallbackPolicy::default().to_string(), "adaptive");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum FallbackPolicy {
    /// The kernel that was chosen computes, or the call is an error. [`Strict::no_fallback`] means this,
    /// whatever the policy.
    Never,
    /// Others take over from a kernel that fails.
    OnError,
    /// Also from one that takes more than this many times (above 1) the expected time.
    OnPerformanceThreshold(f64),
    /// Also from one that is no longer the fastest.
    #[default]
    Adaptive,
}

impl FallbackPolicy {
    /// How many times longer than expected is too slow; `None` if nothing is.
    pub(super) fn factor(self) -> Option<f64> {
        match self {
            Self::Never | Self::OnError => None,
            Self::OnPerformanceThreshold(factor) => Some(factor),
            Self::Adaptive => Some(DRIFT),
        }
    }
}

/// The error says what is expected.
impl FromStr for FallbackPolicy {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = "never, on-error, adaptive, or threshold:X with X above 1, as in threshold:1.5";
        match text.trim() {
            "never" => Ok(Self::Never),
            "on-error" => Ok(Self::OnError),
            "adaptive" | "" => Ok(Self::Adaptive),
            text => {
                let factor = text.strip_prefix("threshold:").and_then(|factor| factor.parse::<f64>().ok());
                let factor = factor.filter(|factor| factor.is_finite() && *factor > 1.0).ok_or(expected)?;
                Ok(Self::OnPerformanceThreshold(factor))
            }
        }
    }
}

/// As it is read.
impl fmt::Display for FallbackPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::OnError => f.write_str("on-error"),
            Self::OnPerformanceThreshold(factor) => write!(f, "threshold:{factor}"),
            Self::Adaptive => f.write_str("adaptive"),
        }
    }
}

/// As text.
impl Serialize for FallbackPolicy {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_as_they_are_shown() {
        use FallbackPolicy::{Adaptive, Never, OnError, OnPerformanceThreshold};
        for policy in [Never, OnError, OnPerformanceThreshold(1.5), Adaptive] {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        for text in ["threshold", "threshold:", "threshold:1", "threshold:nan", "threshold:inf", "always"] {
            assert!(text.parse::<FallbackPolicy>().is_err(), "{text}");
        }
    }

    #[test]
    fn masks_have_known_names() {
        let config = |name: &str| ManagerConfig { masked_features: vec![name.into()], ..Default::default() };
        // Of whichever architecture.
        for name in ["avx2", "neon", "amx-tile"] {
            assert_eq!(config(name).mask().unwrap(), Features::of(name));
        }
        let error = config("avx5").mask().unwrap_err().to_string();
        assert!(error.contains("BITNET_CPU_MASK=avx5") && error.contains("avx512vnni"), "{error}");
        assert!(super::super::KernelManager::new(config("avx5")).is_err());
    }

    #[test]
    fn strictness_is_read_as_it_is_shown() {
        for text in ["1", "true", "all"] {
            assert_eq!(text.parse(), Ok(Strict::ALL));
        }
        for text in ["", "0", "false", " "] {
            assert_eq!(text.parse(), Ok(Strict::NONE));
        }
        assert_eq!(Strict::ALL.to_string().parse(), Ok(Strict::ALL));
        assert_eq!(Strict::NONE.to_string(), "off");
        for text in ["2", "yes", "no-fallback,", "no_fallback", "no-fallback;gated-plugins"] {
            assert!(text.parse::<Strict>().unwrap_err().contains("gated-plugins"), "{text}");
        }
    }
}
