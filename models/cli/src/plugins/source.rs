//! Where plugins come from: files, directories, archives, `https` addresses and repositories of the Hugging Face Hub.

use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, bail};

/// Bytes of a library or an archive, and of a signature.
const MAX_BYTES: u64 = 256 << 20;
const MAX_SIGNATURE: u64 = 64 << 10;
/// What a signature's file has behind the name of what it signs.
const SIGNATURE: &str = ".minisig";

/// A place that a plugin comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A library, a directory with one, or an archive with one.
    Path(PathBuf),
    /// `https`, or `http` on this machine.
    Address(String),
    /// `hf:OWNER/NAME:FILE`.
    Hub { id: String, file: String },
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(name) = text.strip_prefix("hf:") {
            let is_name = |part: &str| {
                !part.is_empty()
                    && !part.starts_with('.')
                    && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            };
            let parts = name.split_once(':').and_then(|(id, file)| Some((id, id.split_once('/')?, file)));
            return match parts {
                Some((id, (owner, name), file))
                    if is_name(owner) && is_name(name) && file.split('/').all(is_name) =>
                {
                    Ok(Self::Hub { id: id.to_owned(), file: file.to_owned() })
                }
                _ => Err(format!("{text:?}: expected hf:OWNER/NAME:FILE")),
            };
        }
        if let Some(server) = text.strip_prefix("http://") {
            let is_here = ["127.0.0.1", "localhost", "[::1]"]
                .iter()
                .any(|here| server.strip_prefix(here).is_some_and(|rest| rest.starts_with([':', '/'])));
            if !is_here {
                return Err(format!("{text:?}: not encrypted; use https"));
            }
        }
        if text.starts_with("https://") || text.starts_with("http://") {
            return Ok(Self::Address(text.to_owned()));
        }
        match text.is_empty() {
            true => Err("an empty name".into()),
            false => Ok(Self::Path(text.into())),
        }
    }
}

/// As it is read, with an absolute path.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => match path.canonicalize() {
                Ok(path) => write!(f, "{}", path.display()),
                Err(_) => write!(f, "{}", path.display()),
            },
            Self::Address(address) => f.write_str(address),
            Self::Hub { id, file } => write!(f, "hf:{id}:{file}"),
        }
    }
}

/// What came from a source.
#[derive(Debug)]
pub struct Fetched {
    pub library: Vec<u8>,
    /// What the signature is of: the library, or the archive that it was in.
    pub signed: Option<Vec<u8>>,
    /// The text of the signature beside it.
    pub signature: Option<String>,
}

impl Fetched {
    pub fn signed(&self) -> &[u8] {
        self.signed.as_deref().unwrap_or(&self.library)
    }
}

impl Source {
    /// Reads or downloads the plugin, and the signature beside it.
    pub fn fetch(&self) -> anyhow::Result<Fetched> {
        let (name, bytes, signature) = match self {
            Self::Path(path) if path.is_dir() => {
                let file = only_library(path)?;
                (name_of(&file), read(&file, MAX_BYTES)?, read_signature(&file)?)
            }
            Self::Path(path) => (name_of(path), read(path, MAX_BYTES)?, read_signature(path)?),
            Self::Address(address) => {
                let get = |address: &str, limit| download(address, limit);
                (
                    address.clone(),
                    get(address, MAX_BYTES)?,
                    get(&format!("{address}{SIGNATURE}"), MAX_SIGNATURE)?,
                )
            }
            Self::Hub { id, file } => {
                let signature = from_hub(id, &format!("{file}{SIGNATURE}"), MAX_SIGNATURE)?;
                (file.clone(), from_hub(id, file, MAX_BYTES)?, signature)
            }
        };
        let bytes = bytes.with_context(|| format!("{self}: there is no such file"))?;
        let signature = signature
            .map(|bytes| {
                String::from_utf8(bytes).with_context(|| format!("{self}{SIGNATURE}: not a signature"))
            })
            .transpose()?;
        Ok(match is_archive(&name) {
            false => Fetched { library: bytes, signed: None, signature },
            true => Fetched {
                library: unpack(&bytes).with_context(|| format!("{self}: cannot use the archive"))?,
                signed: Some(bytes),
                signature,
            },
        })
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is_archive(name: &str) -> bool {
    name.ends_with(".tar")
}

fn is_library(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == std::env::consts::DLL_EXTENSION)
}

/// The library in a directory.
fn only_library(directory: &Path) -> anyhow::Result<PathBuf> {
    let failed = || format!("cannot read {}", directory.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        if is_library(&path) {
            found.push(path);
        }
    }
    match &mut found[..] {
        [one] => Ok(std::mem::take(one)),
        several => bail!(
            "{}: {} files with the extension .{}; it must be one (name the file)",
            directory.display(),
            several.len(),
            std::env::consts::DLL_EXTENSION
        ),
    }
}

/// The library in an archive. Nothing else of it is read.
fn unpack(archive: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut found = None;
    for entry in tar::Archive::new(archive).entries()? {
        let entry = entry?;
        if !entry.header().entry_type().is_file() || !is_library(&entry.path()?) {
            continue;
        }
        if found.is_some() {
            bail!("it has several libraries; it must have one");
        }
        let mut bytes = Vec::new();
        entry.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_BYTES {
            bail!("its library has more than {MAX_BYTES} bytes");
        }
        found = Some(bytes);
    }
    found.with_context(|| format!("it has no file with the extension .{}", std::env::consts::DLL_EXTENSION))
}

fn read(path: &Path, limit: u64) -> anyhow::Result<Option<Vec<u8>>> {
    let failed = || format!("cannot read {}", path.display());
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.with_context(failed)?,
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).with_context(failed)?;
    if bytes.len() as u64 > limit {
        bail!("{}: more than {limit} bytes", path.display());
    }
    Ok(Some(bytes))
}

fn read_signature(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    let mut name = path.as_os_str().to_owned();
    name.push(SIGNATURE);
    read(Path::new(&name), MAX_SIGNATURE)
}

#[cfg(feature = "hub")]
fn download(address: &str, limit: u64) -> anyhow::Result<Option<Vec<u8>>> {
    crate::hub::address(address, limit)
}

#[cfg(feature = "hub")]
fn from_hub(id: &str, file: &str, limit: u64) -> anyhow::Result<Option<Vec<u8>>> {
    crate::hub::file(id, file, limit)
}

#[cfg(not(feature = "hub"))]
fn download(address: &str, _: u64) -> anyhow::Result<Option<Vec<u8>>> {
    bail!("{address}: this build downloads nothing (feature hub); give the path of a file")
}

#[cfg(not(feature = "hub"))]
fn from_hub(id: &str, _: &str, _: u64) -> anyhow::Result<Option<Vec<u8>>> {
    bail!("hf:{id}: this build downloads nothing (feature hub); give the path of a file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart_and_what_is_not_encrypted_is_refused() {
        let parse = |text: &str| text.parse::<Source>();
        assert_eq!(parse("a.so"), Ok(Source::Path("a.so".into())));
        assert_eq!(
            parse("hf:owner/name:x86/a.so"),
            Ok(Source::Hub { id: "owner/name".into(), file: "x86/a.so".into() })
        );
        for address in ["https://a.example/x.so", "http://127.0.0.1:80/x.so", "http://localhost/x.so"] {
            assert_eq!(parse(address), Ok(Source::Address(address.into())));
        }
        for wrong in
            ["", "hf:owner", "hf:owner/name", "hf:owner/name:../a", "hf:o/n:", "http://a.example/x.so"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(parse("http://127.0.0.1.example/x.so").unwrap_err().contains("use https"));
    }

    #[test]
    fn an_archive_has_one_library() {
        let archive = |files: &[&str]| {
            let mut builder = tar::Builder::new(Vec::new());
            for file in files {
                let mut header = tar::Header::new_gnu();
                header.set_size(3);
                header.set_mode(0o644);
                header.set_cksum();
                builder.append_data(&mut header, file, &b"abc"[..]).unwrap();
            }
            builder.into_inner().unwrap()
        };
        let library = format!("lib/a.{}", std::env::consts::DLL_EXTENSION);
        assert_eq!(unpack(&archive(&["readme", &library])).unwrap(), b"abc");
        assert!(unpack(&archive(&["readme"])).unwrap_err().to_string().contains("no file with"));
        let other = format!("b.{}", std::env::consts::DLL_EXTENSION);
        assert!(unpack(&archive(&[&library, &other])).unwrap_err().to_string().contains("several"));
        assert!(unpack(b"no archive").is_err());
    }
}
