//! Strict mode.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Strict mode: what is an error, where the default is to go on with something slower or less certain.
///
/// It concerns the ternary matmuls. A backend that was asked for by name and computes them with operations
/// of its own is no fallback.
///
/// As text (`BITNET_STRICT_MODE`), `1`, `true` or `all` is everything, `0`, `false` or nothing is nothing,
/// and the fields' names, separated by commas (`no-fallback,gated-plugins`), are these.
///
/// ```
/// use bitnet_burn_manager::Strict;
///
/// assert_eq!("1".parse(), Ok(Strict::ALL));
/// let strict: Strict = "no-fallback, gated-plugins".parse()?;
/// assert!(strict.no_fallback && strict.gated_plugins && !strict.quantised_kernels);
/// assert_eq!(strict.to_string(), "no-fallback, gated-plugins");
/// # Ok::<(), &'static str>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

    /// Whether the reference may compute.
    pub(crate) fn allows_reference(self) -> bool {
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
