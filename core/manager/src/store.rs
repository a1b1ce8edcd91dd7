//! Which plugins may be loaded from files, and what is kept of them.
//!
//! * Only from named places: files and directories that the user names, `BITNET_PLUGIN_PATH`, and, where
//!   the configuration says so, the user's own plugin directory. Never from the working directory.
//! * Files and directories that everybody may write are refused. Symbolic links are followed first: the
//!   file and the directories that count are the ones at both ends.
//! * A file is read once. What is hashed is what is copied, and the copy is what the gate tries and the
//!   program runs, so that replacing the file meanwhile changes nothing.
//! * Where a file of SHA-256 pins is in force, nothing else is loaded.
//!
//! What is kept, in `plugins/` of the cache directory (of a temporary directory where there is none):
//!
//! ```text
//! <sha256>/plugin.so            the copy
//! <sha256>/verdict-<key>.json   the gate's verdict for this CPU's features, the ABI, the gate's version and the configuration
//! ```

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cpu;
use crate::error::ManagerError;
use crate::gate::{self, GATE_VERSION, Report, Stage};
use crate::plugin::PluginError;
use crate::temporary::Temporary;
use crate::variables::var;
use bitnet_burn_formats::files;

/// Where plugins come from, and how they are checked.
#[derive(Clone, Debug)]
pub struct PluginConfig {
    /// Whether plugins are loaded from files at all.
    pub enabled: bool,
    /// Whether each computes in a process of its own, which reaches no files, no network and no other processes. Where that is
    /// not possible, a plugin is refused. The process is the [`helper`](Self::helper).
    pub contained: bool,
    /// Files and directories to load from, beside those that a caller names.
    pub path: Vec<PathBuf>,
    /// The user's plugin directory, if it is to be loaded from; it need not exist.
    pub user_dir: Option<PathBuf>,
    /// File of SHA-256 pins: a plugin that is not in it is refused.
    pub pins: Option<PathBuf>,
    /// The program that tries plugins ([`gate::child`]). Without one, only plugins with a verdict are
    /// loaded.
    pub helper: Option<PathBuf>,
    /// What plugins get that ask for their configuration: any text without NUL. A verdict holds for the same text alone.
    pub configuration: String,
    /// How long one case of the gate may take, before the plugin counts as hanging.
    pub patience: Duration,
    /// Names the GPU that kernels for GPUs would run on, or says why there is none, as the helper does. Verdicts
    /// from another GPU are ignored; without this function, any verdict holds.
    pub gpu: Option<fn() -> String>,
}

impl Default for PluginConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            contained: false,
            path: Vec::new(),
            user_dir: None,
            pins: None,
            helper: None,
            configuration: String::new(),
            patience: Duration::from_secs(10),
            gpu: None,
        }
    }
}

impl PluginConfig {
    /// The defaults, changed by `BITNET_PLUGINS` (see [`switch`](Self::switch)),
    /// `BITNET_PLUGIN_PATH` (absolute paths, separated as in `PATH`), `BITNET_PLUGIN_PINS` (a file;
    /// empty: none; unset: the user's, if there is one) and `BITNET_PLUGIN_CONFIG` (any text).
    ///
    /// # Errors
    /// If a variable holds something else than it should.
    pub(crate) fn from_env() -> Result<Self, ManagerError> {
        let mut config = Self::default();
        let wrong =
            |name, value: &str, expected| ManagerError::Config { name, value: value.into(), expected };
        let switches = var("BITNET_PLUGINS")?.unwrap_or_default();
        config.switch(&switches).map_err(|expected| wrong("BITNET_PLUGINS", &switches, expected))?;
        config.configuration = var("BITNET_PLUGIN_CONFIG")?.unwrap_or_default();
        let path = std::env::var_os("BITNET_PLUGIN_PATH").unwrap_or_default();
        for entry in std::env::split_paths(&path) {
            // An empty entry means the working directory in PATH. Here it means nothing.
            if entry.as_os_str().is_empty() {
                continue;
            }
            if entry.is_relative() {
                return Err(wrong(
                    "BITNET_PLUGIN_PATH",
                    &path.to_string_lossy(),
                    "absolute paths: plugins never depend on the working directory",
                ));
            }
            config.path.push(entry);
        }
        config.pins = match std::env::var_os("BITNET_PLUGIN_PINS") {
            Some(file) => (!file.is_empty()).then(|| file.into()),
            None => default_pins().filter(|file| file.exists()),
        };
        Ok(config)
    }

    /// Switches plugins `off` or `on`; `on` is also `user`, `contained`, or both with a comma: those of the user's directory
    /// are loaded, too; each plugin computes in a process of its own.
    ///
    /// # Errors
    /// What the text should be.
    pub fn switch(&mut self, text: &str) -> Result<(), &'static str> {
        let (mut enabled, mut contained, mut user) = (true, false, false);
        match text.trim() {
            "" | "on" | "1" => {}
            "off" | "0" => enabled = false,
            text => {
                for name in text.split(',') {
                    match name.trim() {
                        "user" => user = true,
                        "contained" => contained = true,
                        _ => return Err("off, on or user, contained, or \"user,contained\""),
                    }
                }
            }
        }
        (self.enabled, self.contained) = (enabled, contained);
        self.user_dir = default_user_dir().filter(|_| user);
        Ok(())
    }

    /// The libraries to load, in the order in which they are: those that the caller names (files and
    /// directories), those of the search path, those of the user's directory. A directory stands for the
    /// libraries in it, by name. The list of problems is for places that can't be read.
    pub fn find(&self, named: &[PathBuf]) -> (Vec<PathBuf>, Vec<PluginError>) {
        let (mut files, mut problems) = (Vec::new(), Vec::new());
        // Switched off, what a caller names is refused one by one, with that reason.
        let (path, user) = match self.enabled {
            true => (&self.path[..], self.user_dir.as_ref().filter(|dir| dir.is_dir())),
            false => (&[][..], None),
        };
        for place in named.iter().chain(path).chain(user) {
            match libraries(place) {
                Ok(found) => files.extend(found),
                Err(error) => problems.push(error),
            }
        }
        (files, problems)
    }
}

/// A file itself, or the libraries in a directory, by name.
fn libraries(place: &Path) -> Result<Vec<PathBuf>, PluginError> {
    if !place.is_dir() {
        return Ok(vec![place.to_owned()]);
    }
    let read = |source| PluginError::Read { path: place.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(place).map_err(read)? {
        let file = entry.map_err(read)?.path();
        if file.extension().is_some_and(|e| e == std::env::consts::DLL_EXTENSION) {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        let extension = std::env::consts::DLL_EXTENSION;
        tracing::warn!(directory = %place.display(), "there is no .{extension} file in this directory");
    }
    Ok(files)
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// `$XDG_CACHE_HOME/bitnet-burn`, `~/.cache/bitnet-burn`, `~/Library/Caches/bitnet-burn` or
/// `%LOCALAPPDATA%\bitnet-burn`, whichever the system has.
pub(crate) fn default_cache_dir() -> Option<PathBuf> {
    user_dir("XDG_CACHE_HOME", ".cache", "Library/Caches")
}

/// Where [`PluginConfig::user_dir`] is by default: `plugins` in `$XDG_DATA_HOME/bitnet-burn`,
/// `~/.local/share/bitnet-burn`, `~/Library/Application Support/bitnet-burn` or
/// `%LOCALAPPDATA%\bitnet-burn`.
pub fn default_user_dir() -> Option<PathBuf> {
    Some(user_dir("XDG_DATA_HOME", ".local/share", "Library/Application Support")?.join("plugins"))
}

/// Where [`PluginConfig::pins`] are by default: `plugin-pins` in `$XDG_CONFIG_HOME/bitnet-burn`,
/// `~/.config/bitnet-burn`, `~/Library/Application Support/bitnet-burn` or `%LOCALAPPDATA%\bitnet-burn`.
pub fn default_pins() -> Option<PathBuf> {
    Some(user_dir("XDG_CONFIG_HOME", ".config", "Library/Application Support")?.join("plugin-pins"))
}

/// The user's configuration file: `config.toml` beside the [pins](default_pins).
pub fn default_config() -> Option<PathBuf> {
    Some(default_pins()?.with_file_name("config.toml"))
}

fn user_dir(xdg: &str, unix: &str, mac: &str) -> Option<PathBuf> {
    let base = if cfg!(windows) {
        variable("LOCALAPPDATA")?
    } else if cfg!(target_os = "macos") {
        variable("HOME")?.join(mac)
    } else {
        let home = || Some(variable("HOME")?.join(unix));
        variable(xdg).filter(|dir| dir.is_absolute()).or_else(home)?
    };
    Some(base.join("bitnet-burn"))
}

/// A plugin's file as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The copy: what the gate tries and the program loads.
    pub library: PathBuf,
    /// The file that it is a copy of, links resolved.
    pub origin: PathBuf,
    /// SHA-256 of both.
    pub sha256: String,
}

/// A plugin that the store knows.
#[derive(Clone, Debug, Serialize)]
pub struct Known {
    /// SHA-256 of the file.
    pub sha256: String,
    /// Bytes of the copy, if it is still there.
    pub bytes: Option<u64>,
    /// The verdict for this machine and this gate, if there is one.
    pub report: Option<Report>,
    /// Whether it is pinned; `None` where no pins are in force.
    pub pinned: Option<bool>,
}

/// The copies and verdicts of plugins. See the [module](self).
#[derive(Debug)]
pub struct PluginStore {
    config: PluginConfig,
    root: Option<PathBuf>,
    temporary: OnceLock<Temporary>,
}

const VERDICT_VERSION: u32 = 1;
/// No plugin is as large as this.
const MAX_LIBRARY: u64 = 1 << 30;
const MAX_VERDICT: u64 = 4 << 20;
const MAX_PINS: u64 = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Verdict {
    version: u32,
    /// CPU features that it holds for.
    features: Vec<String>,
    report: Report,
}

impl PluginStore {
    /// A store in `plugins/` of the cache directory, or, without one, in a temporary directory that goes
    /// with this value, or with the process.
    pub fn new(config: PluginConfig, cache_dir: Option<&Path>) -> Self {
        Self { config, root: cache_dir.map(|dir| dir.join("plugins")), temporary: OnceLock::new() }
    }

    /// How plugins are found and checked.
    pub fn config(&self) -> &PluginConfig {
        &self.config
    }

    /// Where copies and verdicts are kept; `None` for a temporary place.
    pub fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// Reads a file, if the policy allows it, and keeps a copy.
    ///
    /// # Errors
    /// If plugins are switched off, the program is linked statically, the file can't be read, everybody may
    /// write it, or it is not pinned while pins are in force; or if a copy can't be kept.
    pub fn admit(&self, path: &Path) -> Result<Stored, PluginError> {
        if !self.config.enabled {
            return Err(PluginError::Off { path: path.to_owned() });
        }
        if cfg!(all(unix, target_feature = "crt-static")) {
            return Err(PluginError::StaticHost { path: path.to_owned() });
        }
        let read = |source| PluginError::Read { path: path.to_owned(), source };
        let origin = path.canonicalize().map_err(read)?;
        // Whoever may change a link's directory decides where the link leads.
        let named = std::path::absolute(path).map_err(read)?;
        for place in [&named, &origin] {
            check_directories(place)
                .map_err(|reason| PluginError::Policy { path: path.to_owned(), reason })?;
        }
        let bytes = read_file(&origin, MAX_LIBRARY).map_err(|problem| problem.into_error(path))?;
        let sha256 = files::sha256(&bytes);
        self.check_pin(path, &sha256)?;
        let library = self
            .keep(&sha256, &bytes)
            .map_err(|source| PluginError::Copy { path: path.to_owned(), source })?;
        Ok(Stored { library, origin, sha256 })
    }

    /// Writes the copy, unless it is there.
    fn keep(&self, sha256: &str, bytes: &[u8]) -> std::io::Result<PathBuf> {
        if let Some(root) = &self.root {
            match keep_in(root, sha256, bytes) {
                Ok(library) => return Ok(library),
                // A full or read-only disk costs the memory of verdicts, not the plugin.
                Err(error) => {
                    tracing::warn!(directory = %root.display(), %error, "plugins are kept in a temporary directory");
                }
            }
        }
        let temporary = match self.temporary.get() {
            Some(dir) => dir,
            None => {
                let dir = Temporary::new("bitnet-plugins-")?;
                self.temporary.get_or_init(|| dir)
            }
        };
        keep_in(temporary.path(), sha256, bytes)
    }

    fn check_pin(&self, path: &Path, sha256: &str) -> Result<(), PluginError> {
        let Some(pins) = &self.config.pins else { return Ok(()) };
        if read_pins(pins)?.iter().any(|(pin, _)| pin == sha256) {
            return Ok(());
        }
        Err(PluginError::NotPinned { path: path.to_owned(), sha256: sha256.to_owned(), pins: pins.clone() })
    }

    /// The verdict for a file, on this machine, if there is one.
    pub fn verdict(&self, sha256: &str) -> Option<Report> {
        let path = self.verdict_file(sha256)?;
        match read_verdict(&path, sha256) {
            Ok(report) => report,
            Err(problem) => {
                tracing::warn!(path = %path.display(), problem, "ignoring a plugin's verdict");
                None
            }
        }
    }

    /// Keeps a verdict. A later pass does not lift a quarantine: [`forget`](Self::forget) does.
    pub fn remember(&self, report: &Report) {
        let Some(path) = self.verdict_file(&report.sha256) else { return };
        let quarantine = |report: &Report| report.refusal.as_ref().is_some_and(|r| r.stage != Stage::Before);
        if !quarantine(report) && self.verdict(&report.sha256).is_some_and(|known| quarantine(&known)) {
            return;
        }
        let verdict = Verdict { version: VERDICT_VERSION, features: features(), report: report.clone() };
        if let Err(error) = write_verdict(&path, &verdict) {
            tracing::warn!(path = %path.display(), %error, "a plugin's verdict can't be kept");
        }
    }

    fn verdict_file(&self, sha256: &str) -> Option<PathBuf> {
        let mut key = format!("{}\n{}\n{GATE_VERSION}", features().join(","), gate::host_abi());
        if !self.config.configuration.is_empty() {
            key = format!("{key}\n{}", self.config.configuration);
        }
        let key = &files::sha256(key.as_ref())[..16];
        let root = self.root.as_deref().or_else(|| Some(self.temporary.get()?.path()))?;
        Some(root.join(sha256).join(format!("verdict-{key}.json")))
    }

    /// The plugins that are kept, by hash.
    ///
    /// # Errors
    /// If the directory or the pins can't be read.
    pub fn known(&self) -> Result<Vec<Known>, PluginError> {
        let pins = self.config.pins.as_deref().map(read_pins).transpose()?;
        let mut known = Vec::new();
        let Some(root) = &self.root else { return Ok(known) };
        let entries = match std::fs::read_dir(root) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(known),
            entries => entries.map_err(|source| PluginError::Read { path: root.clone(), source })?,
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(sha256) = name.to_str().filter(|name| is_sha256(name)) else { continue };
            known.push(Known {
                sha256: sha256.to_owned(),
                bytes: std::fs::metadata(entry.path().join(library_name())).ok().map(|m| m.len()),
                report: self.verdict(sha256),
                pinned: pins.as_ref().map(|pins| pins.iter().any(|(pin, _)| pin == sha256)),
            });
        }
        known.sort_by(|a, b| a.sha256.cmp(&b.sha256));
        Ok(known)
    }

    /// Forgets the copy and all verdicts of a file, a quarantine too; whether there were any.
    ///
    /// # Errors
    /// If they can't be removed.
    pub fn forget(&self, sha256: &str) -> std::io::Result<bool> {
        let Some(root) = self.root.as_deref().filter(|_| is_sha256(sha256)) else { return Ok(false) };
        match std::fs::remove_dir_all(root.join(sha256)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn features() -> Vec<String> {
    cpu::features().iter().map(|&f| f.to_owned()).collect()
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn library_name() -> String {
    format!("plugin.{}", std::env::consts::DLL_EXTENSION)
}

/// Why a file was not read.
enum Problem {
    Io(std::io::Error),
    Policy(String),
}

impl Problem {
    fn into_error(self, path: &Path) -> PluginError {
        match self {
            Self::Io(source) => PluginError::Read { path: path.to_owned(), source },
            Self::Policy(reason) => PluginError::Policy { path: path.to_owned(), reason },
        }
    }
}

/// The bytes of a file that not everybody may write. The file that was looked at is the file that is
/// read.
fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, Problem> {
    let file = std::fs::File::open(path).map_err(Problem::Io)?;
    let metadata = file.metadata().map_err(Problem::Io)?;
    if !metadata.is_file() {
        return Err(Problem::Policy("it is no regular file".into()));
    }
    if everybody_may_write(&metadata) {
        return Err(Problem::Policy(
            "everybody may write it; `chmod o-w` it, or copy it to a place of your own".into(),
        ));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Problem::Io)?;
    if bytes.len() as u64 > limit {
        return Err(Problem::Policy(format!("it has more than {limit} bytes")));
    }
    Ok(bytes)
}

/// The bytes of a file that decides what code is loaded, under the rule for plugins: not everybody may write
/// the file or the directories in which it lies, at both ends of a link.
///
/// # Errors
/// Those of the system; one of the kind `PermissionDenied` with the reason where the rule refuses the file;
/// and if it has more than `limit` bytes.
pub fn read_trusted(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let denied = |reason| std::io::Error::new(std::io::ErrorKind::PermissionDenied, reason);
    let found = path.canonicalize()?;
    for place in [&std::path::absolute(path)?, &found] {
        check_directories(place).map_err(denied)?;
    }
    read_file(&found, limit).map_err(|problem| match problem {
        Problem::Io(error) => error,
        Problem::Policy(reason) => denied(reason),
    })
}

#[cfg(unix)]
fn everybody_may_write(metadata: &std::fs::Metadata) -> bool {
    std::os::unix::fs::MetadataExt::mode(metadata) & 0o002 != 0
}

/// Windows: permissions are not bits, and profile directories are their owner's.
#[cfg(not(unix))]
fn everybody_may_write(_: &std::fs::Metadata) -> bool {
    false
}

/// Whether entries of a directory belong to whoever made them, although everybody may make some.
#[cfg(unix)]
fn is_sticky(metadata: &std::fs::Metadata) -> bool {
    std::os::unix::fs::MetadataExt::mode(metadata) & 0o1000 != 0
}

#[cfg(not(unix))]
fn is_sticky(_: &std::fs::Metadata) -> bool {
    false
}

/// Checks that other users can't replace the file: its directory is not writable by everybody, nor are the
/// directories above, unless they are sticky as /tmp is.
fn check_directories(file: &Path) -> Result<(), String> {
    for (level, dir) in file.ancestors().skip(1).enumerate() {
        let metadata =
            std::fs::metadata(dir).map_err(|error| format!("its directory {}: {error}", dir.display()))?;
        if everybody_may_write(&metadata) && (level == 0 || !is_sticky(&metadata)) {
            return Err(format!(
                "everybody may write the directory {}; move it to a place of your own",
                dir.display()
            ));
        }
    }
    Ok(())
}

fn keep_in(root: &Path, sha256: &str, bytes: &[u8]) -> std::io::Result<PathBuf> {
    let dir = root.join(sha256);
    make_private(root)?;
    make_private(&dir)?;
    let library = dir.join(library_name());
    // Bits rot, and programs that clean caches leave halves.
    if std::fs::read(&library).is_ok_and(|known| known == bytes) {
        return Ok(library);
    }
    let mut copy = tempfile::NamedTempFile::new_in(&dir)?;
    copy.write_all(bytes)?;
    #[cfg(unix)]
    copy.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o500))?;
    copy.as_file().sync_all()?;
    copy.persist(&library)?;
    Ok(library)
}

/// A directory of the user's own.
fn make_private(dir: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)?;
    if everybody_may_write(&std::fs::metadata(dir)?) {
        let problem = format!("everybody may write the directory {}", dir.display());
        return Err(std::io::Error::other(problem));
    }
    Ok(())
}

/// `None` if there is no such file; an error if it can't be used.
fn read_verdict(path: &Path, sha256: &str) -> Result<Option<Report>, String> {
    let bytes = match read_file(path, MAX_VERDICT) {
        Ok(bytes) => bytes,
        Err(Problem::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(Problem::Io(error)) => return Err(format!("can't be read: {error}")),
        Err(Problem::Policy(reason)) => return Err(reason),
    };
    let verdict: Verdict = serde_json::from_slice(&bytes).map_err(|error| format!("is damaged: {error}"))?;
    let Verdict { version, features: of, report } = verdict;
    // The name says all this: a file that was renamed, or written by hand.
    if version != VERDICT_VERSION
        || of != features()
        || report.sha256 != sha256
        || report.gate != GATE_VERSION
        || report.abi != gate::host_abi()
    {
        return Err("is for another file, machine, ABI or gate".into());
    }
    Ok(Some(report))
}

fn write_verdict(path: &Path, verdict: &Verdict) -> std::io::Result<()> {
    let dir = path.parent().expect("a verdict lies in a directory");
    make_private(dir)?;
    files::replace_private(path, |out| {
        serde_json::to_writer_pretty(&mut *out, verdict)?;
        out.write_all(b"\n")
    })
}

/// The pins of a file: SHA-256 and name on each line, as `sha256sum` prints them; `#` begins a comment.
///
/// # Errors
/// If the file can't be read, everybody may write it, or a line is no pin.
pub fn read_pins(path: &Path) -> Result<Vec<(String, String)>, PluginError> {
    let invalid = |reason: String| PluginError::Pins { path: path.to_owned(), reason };
    let bytes = read_file(path, MAX_PINS).map_err(|problem| match problem {
        Problem::Io(error) => invalid(error.to_string()),
        Problem::Policy(reason) => invalid(reason),
    })?;
    let text = String::from_utf8(bytes).map_err(|_| invalid("it is no text".into()))?;
    let mut pins = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let (hash, name) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let hash = hash.to_ascii_lowercase();
        if !is_sha256(&hash) {
            let shown: String = line.chars().take(40).collect();
            return Err(invalid(format!("line {}: {shown:?} is no SHA-256 with a name behind it", i + 1)));
        }
        // `sha256sum -b` marks binary files.
        pins.push((hash, name.trim().trim_start_matches('*').to_owned()));
    }
    Ok(pins)
}

/// Writes pins, with a comment on top.
///
/// # Errors
/// If the file can't be written.
pub fn write_pins(path: &Path, pins: &[(String, String)]) -> std::io::Result<()> {
    std::fs::create_dir_all(files::directory(path))?;
    files::replace_private(path, |out| {
        writeln!(out, "# Plugins that bitnet-burn may load: as long as this file is there, no others.")?;
        for (hash, name) in pins {
            // A name is for people: it must not break the line.
            let name: String =
                name.chars().map(|c| if c.is_control() || c == '#' { '_' } else { c }).collect();
            writeln!(out, "{hash}  {name}")?;
        }
        Ok(())
    })
}
