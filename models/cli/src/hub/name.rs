//! Names of models on the hub, and of files in them.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// `hf:OWNER/NAME`, or `hf:OWNER/NAME:FILE` for one of its GGUF files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    id: String,
    file: Option<String>,
}

impl HubName {
    /// What such a name begins with.
    pub const PREFIX: &str = "hf:";

    /// OWNER/NAME.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The GGUF file, or one of its parts.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", Self::PREFIX, self.id)?;
        self.file.as_ref().map_or(Ok(()), |file| write!(f, ":{file}"))
    }
}

impl FromStr for HubName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.strip_prefix(Self::PREFIX).unwrap_or(text);
        let (id, file) = match name.split_once(':') {
            Some((id, file)) => (id, Some(file)),
            None => (name, None),
        };
        if !id.split_once('/').is_some_and(|(owner, name)| is_name(owner) && is_name(name)) {
            return Err(format!(
                "{id:?} is not the name of a model on the Hugging Face Hub; expected hf:OWNER/NAME or hf:OWNER/NAME:FILE.gguf"
            ));
        }
        if let Some(file) = file {
            check_file(file)?;
            if !Path::new(file).extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
                return Err(format!(
                    "{file:?} is not the name of a GGUF file; hf:{id} without it stands for a directory with config.json and \
                     safetensors"
                ));
            }
        }
        Ok(Self { id: id.to_owned(), file: file.map(str::to_owned) })
    }
}

/// What the hub allows for owners and models: up to 96 letters, digits, `-`, `_` and `.`; `-` and `.` neither at an end nor
/// twice in a row.
fn is_name(text: &str) -> bool {
    let is_allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    (1..=96).contains(&text.len())
        && text.bytes().all(is_allowed)
        && !text.starts_with(['-', '.'])
        && !text.ends_with(['-', '.'])
        && !text.contains("--")
        && !text.contains("..")
}

/// That a file's name stays in its directory, on all systems.
pub(super) fn check_file(name: &str) -> Result<(), String> {
    let is_component = |part: &str| {
        !part.is_empty()
            && part.len() <= 255
            && !part.ends_with('.')
            && !part.contains(|c: char| c.is_control() || "\\:*?\"<>|".contains(c))
    };
    match name.len() <= 1024 && name.split('/').all(is_component) {
        true => Ok(()),
        false => Err(format!("{name:?} is not a name that a file of a model can have")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["hf:prism-ml/Bonsai-1.7B_x", "hf:o/n:a.gguf", "hf:o/n:Q4/a-00001-of-00002.GGUF"] {
            assert_eq!(good.parse::<HubName>().unwrap().to_string(), good);
        }
        for bad in [
            "hf:",
            "hf:o",
            "hf:/n",
            "hf:o/",
            "hf:o/n/x",
            "hf:../n",
            "hf:o/..",
            "hf:o/.n",
            "hf:o/n-",
            "hf:o/a--b",
            "hf:o/a b",
            "hf:o/ü",
            "hf:o/n?x",
            "hf:o/n#",
            "hf:o\\n/m",
            "hf:o/n@main",
            "hf:o/n%2e",
        ] {
            assert!(bad.parse::<HubName>().unwrap_err().contains("hf:OWNER/NAME"), "{bad}");
        }
        assert!(format!("hf:o/{}", "n".repeat(97)).parse::<HubName>().is_err());
        for bad in [
            "",
            "/a.gguf",
            "../a.gguf",
            "b/../a.gguf",
            "b//a.gguf",
            "./a.gguf",
            "b/a.gguf/",
            "C:/a.gguf",
            "b\\a.gguf",
            "a\n.gguf",
            "a\0.gguf",
            ".../a.gguf",
            "a.gguf:x",
        ] {
            assert!(format!("hf:o/n:{bad}").parse::<HubName>().is_err(), "{bad:?}");
        }
        assert!("hf:o/n:config.json".parse::<HubName>().unwrap_err().contains("without it"));
    }
}
