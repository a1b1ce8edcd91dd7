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

#[cfg(test)]
mod tests {
    use super::*;

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
