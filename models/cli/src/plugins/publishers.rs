//! The publishers whose signatures (of minisign) are trusted. As soon as there is one, plugins are installed only with a
//! signature of one.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bitnet_burn_formats::files;
use bitnet_burn_manager::store::{self, read_trusted};
use minisign_verify::{PublicKey, Signature};

use super::source::Fetched;
use crate::output;

/// Bytes of the file of publishers, and of a public key's.
const MAX_BYTES: u64 = 1 << 20;

/// Public keys, in base64, each with a name for people.
#[derive(Debug, Default)]
pub struct Publishers(Vec<(String, String)>);

fn file() -> anyhow::Result<PathBuf> {
    let pins = store::default_pins().context("no home directory for the file of trusted publishers")?;
    Ok(pins.with_file_name("plugin-publishers"))
}

/// The public key that an argument is, or that the file of this name (`.pub`) has.
pub fn public_key(argument: &Path) -> anyhow::Result<Option<String>> {
    let is_key = |text: &str| PublicKey::from_base64(text).is_ok();
    if let Some(text) = argument.to_str().filter(|text| is_key(text)) {
        return Ok(Some(text.to_owned()));
    }
    if argument.extension().is_none_or(|extension| extension != "pub") {
        return Ok(None);
    }
    let bytes =
        read_trusted(argument, MAX_BYTES).with_context(|| format!("cannot read {}", argument.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    let key = text.lines().map(str::trim).find(|line| is_key(line));
    key.map(|key| Some(key.to_owned()))
        .with_context(|| format!("{}: no public key of minisign", argument.display()))
}

/// Trusts a publisher from now on.
pub fn trust(key: String, name: &str) -> anyhow::Result<()> {
    let mut publishers = Publishers::read()?;
    let path = file()?;
    if publishers.0.iter().all(|(known, _)| *known != key) {
        let name: String = name.chars().map(|c| if c.is_control() || c == '#' { '_' } else { c }).collect();
        publishers.0.push((key.clone(), name));
        let failed = || format!("cannot write {}", path.display());
        std::fs::create_dir_all(files::directory(&path)).with_context(failed)?;
        let written: std::io::Result<()> = files::replace_private(&path, |out| {
            writeln!(
                out,
                "# Publishers of plugins. As long as there is one, `bitnet plugins add` and `update` take no others."
            )?;
            publishers.0.iter().try_for_each(|(key, name)| writeln!(out, "{key}  {name}"))
        });
        written.with_context(failed)?;
    }
    output::print(format_args!(
        "{key}\ntrusted in {}; plugins without a signature of a trusted publisher are not installed",
        path.display()
    ))
}

impl Publishers {
    pub fn read() -> anyhow::Result<Self> {
        let path = file()?;
        let failed = || format!("cannot use the file of trusted publishers {}", path.display());
        let bytes = match read_trusted(&path, MAX_BYTES) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            bytes => bytes.with_context(failed)?,
        };
        let text = String::from_utf8(bytes).with_context(failed)?;
        let mut publishers = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let (key, name) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            if PublicKey::from_base64(key).is_err() {
                bail!("{}: line {} has no public key of minisign", failed(), i + 1);
            }
            publishers.push((key.to_owned(), name.trim().to_owned()));
        }
        Ok(Self(publishers))
    }

    /// The key of the trusted publisher who signed what was fetched; `None` if no publisher is trusted.
    ///
    /// # Errors
    /// If publishers are trusted, and none of them signed it.
    pub fn check(&self, fetched: &Fetched) -> anyhow::Result<Option<String>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let Some(text) = &fetched.signature else {
            bail!(
                "it is not signed (there is no .minisig beside it), and publishers are trusted, so only signed plugins are installed"
            );
        };
        let Ok(signature) = Signature::decode(text) else {
            bail!("its .minisig is no signature of minisign")
        };
        let mut problem = minisign_verify::Error::UnexpectedKeyId;
        for (key, _) in &self.0 {
            let Ok(public) = PublicKey::from_base64(key) else { continue };
            // Both kinds of signatures that minisign makes.
            match public.verify(fetched.signed(), &signature, true) {
                Ok(()) => return Ok(Some(key.clone())),
                Err(minisign_verify::Error::UnexpectedKeyId) => {}
                Err(error) => problem = error,
            }
        }
        match problem {
            minisign_verify::Error::UnexpectedKeyId => {
                bail!("it is signed by a publisher who is not trusted")
            }
            _ => bail!("its signature does not fit: the file, or the signature, was changed"),
        }
    }
}
