//! Environment variables.

use std::env::VarError;
use std::str::FromStr;

use crate::error::ManagerError;

/// A variable's text, if it is set. One that is not UTF-8 is an error: it must not count as unset.
pub(crate) fn var(name: &'static str) -> Result<Option<String>, ManagerError> {
    match std::env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(value)) => {
            let value = value.to_string_lossy().into_owned();
            Err(ManagerError::Config { name, value, expected: "text in UTF-8" })
        }
    }
}

/// What a variable holds, if it is set.
pub(crate) fn parsed<T: FromStr>(
    name: &'static str,
    expected: impl FnOnce(T::Err) -> &'static str,
) -> Result<Option<T>, ManagerError> {
    let Some(value) = var(name)? else { return Ok(None) };
    match value.parse() {
        Ok(parsed) => Ok(Some(parsed)),
        Err(error) => Err(ManagerError::Config { name, value, expected: expected(error) }),
    }
}

/// The project's variables. Those of its tests begin with `BITNET_TEST_`.
const KNOWN: [&str; 18] = [
    "BITNET_API_KEY",
    "BITNET_BLESS",
    "BITNET_CACHE_DIR",
    "BITNET_CONFIG",
    "BITNET_CPU_MASK",
    "BITNET_FALLBACK",
    "BITNET_GOLDEN_DIR",
    "BITNET_KERNEL",
    "BITNET_PIN",
    "BITNET_PLUGINS",
    "BITNET_PLUGIN_CONFIG",
    "BITNET_PLUGIN_PATH",
    "BITNET_PLUGIN_PINS",
    "BITNET_REMOTE_TIMEOUT",
    "BITNET_REVISION",
    "BITNET_STRICT_MODE",
    "BITNET_THREADS",
    "BITNET_WORKER_SECRET",
];

/// Logs variables that look like the project's, and that nothing reads.
pub(crate) fn warn_of_unknown() {
    for name in unknown(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok())) {
        tracing::warn!("{name} is set, and no variable of bitnet-burn has this name: is it misspelt?");
    }
}

fn unknown(names: impl Iterator<Item = String>) -> impl Iterator<Item = String> {
    names.filter(|name| {
        name.starts_with("BITNET_") && !name.starts_with("BITNET_TEST_") && !KNOWN.contains(&name.as_str())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_names_are_found() {
        let names = ["BITNET_THREAD", "BITNET_THREADS", "BITNET_TEST_OUT", "BITNET", "PATH"];
        let found: Vec<_> = unknown(names.into_iter().map(str::to_owned)).collect();
        assert_eq!(found, ["BITNET_THREAD"]);
    }

    #[test]
    fn the_documentation_has_the_same_names() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/environment.md");
        let page = std::fs::read_to_string(page).unwrap();
        let mut names: Vec<&str> = page
            .split('`')
            .skip(1)
            .step_by(2)
            .filter(|name| name.starts_with("BITNET_") && !name.starts_with("BITNET_TEST_"))
            .collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names, KNOWN);
    }

    #[cfg(unix)]
    #[test]
    fn a_variable_that_is_not_utf_8_is_not_unset() {
        use std::os::unix::ffi::OsStrExt as _;
        const NAME: &str = "BITNET_TEST_OF_UTF_8";
        assert_eq!(var(NAME).unwrap(), None);
        // SAFETY: no other test reads or writes a variable of this name.
        #[allow(unsafe_code, reason = "the environment is the test")]
        unsafe {
            std::env::set_var(NAME, std::ffi::OsStr::from_bytes(b"1\xff"));
        }
        let error = var(NAME).unwrap_err().to_string();
        assert!(error.contains("BITNET_TEST_OF_UTF_8=1") && error.contains("UTF-8"), "{error}");
    }
}
