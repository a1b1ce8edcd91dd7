//! How a manager is set up.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

use super::ManagerError;
use crate::store::{self, PluginConfig};

/// How a manager is set up.
#[derive(Clone, Debug)]
pub struct ManagerConfig {
    /// Threads for kernels; 0 means one per physical core.
    pub threads: usize,
    /// What is an error instead of something slower or less certain.
    pub strict: Strict,
    /// Use this kernel alone (`plugin/kernel`, or `kernel` where that is unambiguous).
    pub force: Option<String>,
    /// CPU features to act as if the machine lacked them.
    pub masked_features: Vec<String>,
    /// Directory of the tuning results, and of the copies and verdicts of plugins; `None` keeps them in
    /// memory and in a temporary directory.
    pub cache_dir: Option<PathBuf>,
    /// Where plugins come from, and how they are checked.
    pub plugins: PluginConfig,
    /// Time that tuning may take in all; what is not measured by then is ranked by the nearest
    /// measurement.
    pub tune_budget: Duration,
}

impl Default for ManagerConfig {
    fn default() -> Self {
        Self {
            threads: 0,
            strict: Strict::NONE,
            force: None,
            masked_features: Vec::new(),
            cache_dir: None,
            plugins: PluginConfig::default(),
            tune_budget: Duration::from_secs(10),
        }
    }
}

impl ManagerConfig {
    /// The defaults, changed by `BITNET_THREADS`, `BITNET_STRICT_MODE` (1, 0, or names of [`Strict`]),
    /// `BITNET_KERNEL`, `BITNET_CPU_MASK` (feature names, separated by commas), `BITNET_CACHE_DIR` (empty:
    /// keep nothing; unset: the user's cache directory), `BITNET_PLUGINS` (`off`, `on`, or `user`: also the
    /// user's plugin directory), `BITNET_PLUGIN_PATH` (absolute paths) and `BITNET_PLUGIN_PINS` (a file).
    ///
    /// # Errors
    /// If a variable holds something else than it should.
    pub fn from_env() -> Result<Self, ManagerError> {
        let mut config = Self::default();
        if let Some(threads) = parsed("BITNET_THREADS", |_| "a number of threads")? {
            config.threads = threads;
        }
        config.strict = Strict::from_env()?;
        config.force = var("BITNET_KERNEL").filter(|name| !name.is_empty());
        if let Some(mask) = var("BITNET_CPU_MASK") {
            config.masked_features =
                mask.split(',').map(|f| f.trim().to_owned()).filter(|f| !f.is_empty()).collect();
        }
        config.cache_dir = match var("BITNET_CACHE_DIR") {
            Some(dir) => (!dir.is_empty()).then(|| dir.into()),
            None => store::default_cache_dir(),
        };
        config.plugins = PluginConfig::from_env()
            .map_err(|(name, value, expected)| ManagerError::Config { name, value, expected })?;
        Ok(config)
    }
}

fn var(name: &'static str) -> Option<String> {
    std::env::var(name).ok()
}

/// What a variable holds, if it is set.
fn parsed<T: FromStr>(
    name: &'static str,
    expected: impl FnOnce(T::Err) -> &'static str,
) -> Result<Option<T>, ManagerError> {
    let Some(value) = var(name) else { return Ok(None) };
    match value.parse() {
        Ok(parsed) => Ok(Some(parsed)),
        Err(error) => Err(ManagerError::Config { name, value, expected: expected(error) }),
    }
}

/// Strict mode: what is an error, where the default is to go on with something slower or less certain.
///
/// It concerns the ternary matmuls. A backend that was asked for by name and computes them with operations
/// of its own is no fallback.
///
/// As text (`BITNET_STRICT_MODE`), `1`, `true` or `all` is everything, `0`, `false` or nothing is nothing,
/// and the fields' names, separated by commas (`no-fallback,gated-plugins`), are these.
///
/// ```
/// use bitnet_burn_core::manager::Strict;
///
/// assert_eq!("1".parse(), Ok(Strict::ALL));
/// let strict: Strict = "no-fallback, gated-plugins".parse()?;
/// assert!(strict.no_fallback && strict.gated_plugins && !strict.quantised_kernels);
/// assert_eq!(strict.to_string(), "no-fallback, gated-plugins");
/// # Ok::<(), &'static str>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Strict {
    /// The kernel that was chosen computes: neither another one nor the reference takes over where it
    /// fails, and a shape that no kernel computes is an error.
    pub no_fallback: bool,
    /// Integer arithmetic alone: the reference is an error, whether a kernel failed or there is none.
    pub quantised_kernels: bool,
    /// A plugin that the loading policy or the gate refuses is an error; without, it is left out.
    pub gated_plugins: bool,
    /// A measured figure above what the machine can do is an error. The manager reports none; this is for
    /// the programs that do.
    pub plausible_figures: bool,
}

impl Strict {
    /// Everything is strict.
    pub const ALL: Self =
        Self { no_fallback: true, quantised_kernels: true, gated_plugins: true, plausible_figures: true };
    /// Nothing is.
    pub const NONE: Self =
        Self { no_fallback: false, quantised_kernels: false, gated_plugins: false, plausible_figures: false };

    /// Whether anything is strict.
    pub fn any(self) -> bool {
        self != Self::NONE
    }

    /// What `BITNET_STRICT_MODE` says.
    ///
    /// # Errors
    /// If it says something else than it should.
    pub fn from_env() -> Result<Self, ManagerError> {
        Ok(parsed("BITNET_STRICT_MODE", |expected| expected)?.unwrap_or_default())
    }

    /// Whether the reference may compute.
    pub(super) fn allows_reference(self) -> bool {
        !self.no_fallback && !self.quantised_kernels
    }

    fn fields(&mut self) -> [(&'static str, &mut bool); 4] {
        [
            ("no-fallback", &mut self.no_fallback),
            ("quantised-kernels", &mut self.quantised_kernels),
            ("gated-plugins", &mut self.gated_plugins),
            ("plausible-figures", &mut self.plausible_figures),
        ]
    }
}

/// The error says what is expected.
impl FromStr for Strict {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "1" | "true" | "all" => return Ok(Self::ALL),
            "" | "0" | "false" => return Ok(Self::NONE),
            _ => {}
        }
        let mut strict = Self::NONE;
        for name in text.split(',').map(str::trim) {
            let mut fields = strict.fields().into_iter();
            let (_, field) = fields.find(|(known, _)| *known == name).ok_or(
                "1, 0, or some of no-fallback, quantised-kernels, gated-plugins and plausible-figures, \
                 separated by commas",
            )?;
            *field = true;
        }
        Ok(strict)
    }
}

/// The names of what is strict, or `off`.
impl fmt::Display for Strict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut this = *self;
        let names: Vec<_> = this.fields().into_iter().filter_map(|(name, on)| on.then_some(name)).collect();
        f.write_str(if names.is_empty() { "off".to_owned() } else { names.join(", ") }.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
