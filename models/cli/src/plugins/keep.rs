//! `bitnet plugins add`, `update`, `remove` and `list --outdated`: plugins in the user's plugin directory, and a lock file that says
//! exactly which.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bitnet_burn_formats::files;
use bitnet_burn_manager::KernelManager;
use bitnet_burn_manager::store::{self, read_trusted};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::publishers::Publishers;
use super::source::{Fetched, Source};
use crate::engine::config;
use crate::output;

/// Install a plugin from a file, a directory, an archive (.tar), an https address, or hf:OWNER/NAME:FILE
///
/// The gate tries it first. It goes into the user's plugin directory, from which BITNET_PLUGINS=user loads, and into the lock
/// file. Where a publisher is trusted, a signature of a trusted publisher (SOURCE.minisig, by minisign) is required.
#[derive(Debug, Args)]
pub struct AddArgs {
    /// The source
    source: Source,
    #[command(flatten)]
    lock: LockArgs,
}

/// Install what the sources of the installed plugins have now; with --locked, exactly what the lock file says
#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// The plugins [default: all of the lock file]
    names: Vec<String>,
    #[command(flatten)]
    lock: LockArgs,
}

/// Remove an installed plugin, and its entry in the lock file
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// The plugin's name
    name: String,
    #[command(flatten)]
    file: LockFileArgs,
}

#[derive(Debug, Args)]
pub struct LockArgs {
    #[command(flatten)]
    file: LockFileArgs,
    /// Install only what has the SHA-256 of the lock file, and leave the lock file as it is
    #[arg(long)]
    locked: bool,
}

#[derive(Debug, Args)]
pub struct LockFileArgs {
    /// The lock file [default: plugins.lock in the user's configuration directory]
    #[arg(long = "lock", value_name = "FILE")]
    path: Option<PathBuf>,
}

impl LockFileArgs {
    fn path(&self) -> anyhow::Result<PathBuf> {
        let beside = || Some(store::default_pins()?.with_file_name("plugins.lock"));
        self.path.clone().or_else(beside).context("no home directory for the lock file; name one with --lock")
    }
}

/// Bytes of a lock file.
const MAX_BYTES: u64 = 4 << 20;

/// What is installed.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lock {
    version: u32,
    #[serde(default)]
    plugin: Vec<Locked>,
}

/// An installed plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Locked {
    name: String,
    version: String,
    sha256: String,
    source: String,
    /// The key of the publisher who signed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    publisher: Option<String>,
}

impl Lock {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let failed = || format!("cannot use the lock file {}", path.display());
        let bytes = match read_trusted(path, MAX_BYTES) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self { version: 1, plugin: Vec::new() });
            }
            bytes => bytes.with_context(failed)?,
        };
        let lock: Self =
            toml::from_str(std::str::from_utf8(&bytes).with_context(failed)?).with_context(failed)?;
        if lock.version != 1 {
            bail!("{}: version {}; this program knows 1", failed(), lock.version);
        }
        for plugin in &lock.plugin {
            // It becomes a file's name.
            if !is_name(&plugin.name) {
                bail!("{}: {:?} is no name of a plugin", failed(), plugin.name);
            }
        }
        Ok(lock)
    }

    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let failed = || format!("cannot write {}", path.display());
        std::fs::create_dir_all(files::directory(path)).with_context(failed)?;
        let text = toml::to_string_pretty(self)?;
        let written: std::io::Result<()> = files::replace(path, |out| {
            writeln!(
                out,
                "# Written by `bitnet plugins add`. `bitnet plugins update --locked` installs exactly this."
            )?;
            out.write_all(text.as_bytes())
        });
        written.with_context(failed)
    }

    fn find(&self, name: &str) -> Option<&Locked> {
        self.plugin.iter().find(|plugin| plugin.name == name)
    }

    fn set(&mut self, plugin: Locked) {
        self.plugin.retain(|known| known.name != plugin.name);
        self.plugin.push(plugin);
        self.plugin.sort_by(|a, b| a.name.cmp(&b.name));
    }
}

fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Where plugins are installed.
fn directory() -> anyhow::Result<PathBuf> {
    store::default_user_dir().context("no home directory for the user's plugins")
}

fn installed(name: &str) -> anyhow::Result<PathBuf> {
    Ok(directory()?.join(format!("{name}.{}", std::env::consts::DLL_EXTENSION)))
}

/// Whether the file that is installed is the one of the lock file.
fn is_installed(plugin: &Locked) -> anyhow::Result<bool> {
    Ok(std::fs::read(installed(&plugin.name)?).is_ok_and(|bytes| files::sha256(&bytes) == plugin.sha256))
}

pub fn add(args: &AddArgs) -> anyhow::Result<()> {
    let path = args.lock.file.path()?;
    let mut lock = Lock::read(&path)?;
    let source = args.source.to_string();
    let known = lock.plugin.iter().find(|plugin| plugin.source == source).cloned();
    if args.lock.locked && known.is_none() {
        bail!("{source}: the lock file {} has no plugin of this source (--locked)", path.display());
    }
    let plugin = install(&args.source, known.as_ref(), &lock, args.lock.locked)?;
    let text =
        format!("{} {} installed: {}", plugin.name, plugin.version, installed(&plugin.name)?.display());
    if !args.lock.locked {
        lock.set(plugin);
        lock.write(&path)?;
    }
    output::print(format_args!("{text}\nlock file: {}", path.display()))?;
    let (config, _) = config()?;
    if config.plugins.user_dir.is_none() {
        output::note(
            "BITNET_PLUGINS=user, or plugins = \"user\" in the configuration file, loads installed plugins",
        );
    }
    if config.plugins.pins.is_some() {
        output::note("there are pins: `bitnet plugins trust FILE` adds the installed file to them");
    }
    Ok(())
}

pub fn update(args: &UpdateArgs) -> anyhow::Result<()> {
    let path = args.lock.file.path()?;
    let mut lock = Lock::read(&path)?;
    for name in &args.names {
        if lock.find(name).is_none() {
            bail!("{name}: the lock file {} has no plugin of this name", path.display());
        }
    }
    let wanted = |plugin: &&Locked| args.names.is_empty() || args.names.contains(&plugin.name);
    let all: Vec<Locked> = lock.plugin.iter().filter(wanted).cloned().collect();
    let mut lines = Vec::new();
    for known in all {
        let Locked { name, version, .. } = &known;
        // Nothing is downloaded for what is there.
        if args.lock.locked && is_installed(&known)? {
            lines.push(format!("{name} {version} is installed"));
            continue;
        }
        let source: Source =
            known.source.parse().map_err(|problem| anyhow::anyhow!("{}: {problem}", path.display()))?;
        let plugin = install(&source, Some(&known), &lock, args.lock.locked)?;
        lines.push(match plugin.sha256 == known.sha256 {
            true => format!("{name} {version} is up to date"),
            false => format!("{name} {version} is now {}", plugin.version),
        });
        if !args.lock.locked {
            lock.set(plugin);
            lock.write(&path)?;
        }
    }
    if lines.is_empty() {
        lines.push(format!("no plugins in {}", path.display()));
    }
    output::print(lines.join("\n"))
}

pub fn remove(args: &RemoveArgs) -> anyhow::Result<()> {
    let path = args.file.path()?;
    let mut lock = Lock::read(&path)?;
    let Some(plugin) = lock.find(&args.name).cloned() else {
        bail!("{}: the lock file {} has no plugin of this name", args.name, path.display());
    };
    let file = installed(&plugin.name)?;
    match std::fs::remove_file(&file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", file.display()));
        }
        _ => {}
    }
    lock.plugin.retain(|known| known.name != plugin.name);
    lock.write(&path)?;
    output::print(format_args!("{} {} removed", plugin.name, plugin.version))
}

/// What the sources have now, for `list --outdated`.
#[derive(Serialize)]
pub struct Outdated {
    name: String,
    version: String,
    source: String,
    /// SHA-256 of what the source has now, or why that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    available: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    outdated: bool,
}

pub fn outdated(file: &LockFileArgs) -> anyhow::Result<Vec<Outdated>> {
    let lock = Lock::read(&file.path()?)?;
    let state = |plugin: Locked| {
        let fetched =
            plugin.source.parse::<Source>().map_err(anyhow::Error::msg).and_then(|source| source.fetch());
        let (available, problem) = match fetched {
            Ok(fetched) => (Some(files::sha256(&fetched.library)), None),
            Err(error) => (None, Some(output::in_one_line(error))),
        };
        let Locked { name, version, source, sha256, .. } = plugin;
        let outdated = available.as_ref().is_some_and(|available| *available != sha256);
        Outdated { name, version, source, available, problem, outdated }
    };
    Ok(lock.plugin.into_iter().map(state).collect())
}

impl Outdated {
    pub fn text(&self) -> String {
        let Self { name, version, source, problem, .. } = self;
        match (problem, self.outdated) {
            (Some(problem), _) => format!("{name} {version}: {problem}"),
            (None, true) => {
                format!("{name} {version}: {source} has another file; `bitnet plugins update {name}`")
            }
            (None, false) => format!("{name} {version}: up to date"),
        }
    }
}

/// Fetches, checks and installs a plugin. `known` is what the lock file has of this source.
fn install(source: &Source, known: Option<&Locked>, lock: &Lock, locked: bool) -> anyhow::Result<Locked> {
    let fetched = source.fetch()?;
    let sha256 = files::sha256(&fetched.library);
    if let Some(known) = known.filter(|known| locked && known.sha256 != sha256) {
        bail!("{source}: its SHA-256 is {sha256}, and the lock file has {} (--locked)", known.sha256);
    }
    let publisher = Publishers::read()?.check(&fetched).with_context(|| source.to_string())?;
    let (name, version) = try_with_gate(source, &fetched)?;
    let plugin = Locked { name, version, sha256, source: source.to_string(), publisher };
    check_succession(&plugin, known, lock)?;
    let file = installed(&plugin.name)?;
    let failed = || format!("cannot write {}", file.display());
    std::fs::create_dir_all(files::directory(&file)).with_context(failed)?;
    let written: std::io::Result<()> = files::replace_private(&file, |out| out.write_all(&fetched.library));
    written.with_context(failed)?;
    Ok(plugin)
}

/// Whether a plugin may take the place of what the lock file has.
fn check_succession(plugin: &Locked, known: Option<&Locked>, lock: &Lock) -> anyhow::Result<()> {
    let Locked { name, version, source, .. } = plugin;
    if let Some(known) = known.filter(|known| known.name != *name) {
        bail!(
            "{source}: it had a plugin named {}, and has one named {name} now; `bitnet plugins remove {}` first, if that is right",
            known.name,
            known.name
        );
    }
    let Some(before) = lock.find(name) else { return Ok(()) };
    let help = format!("`bitnet plugins remove {name}` first, if that is right");
    if before.source != *source {
        bail!("{source}: {name} is installed from {}; {help}", before.source);
    }
    if before.publisher.is_some() && before.publisher != plugin.publisher {
        bail!("{source}: {name} was signed by another publisher; {help}");
    }
    if is_older(version, &before.version) {
        bail!(
            "{source}: it has version {version} of {name}, and {} is installed, which is newer; {help}",
            before.version
        );
    }
    if before.version == *version && before.sha256 != plugin.sha256 {
        bail!(
            "{source}: it has version {version} of {name}, as what is installed, with other content; a new content needs a new \
             version; {help}"
        );
    }
    Ok(())
}

/// Whether a version comes before another one: their numbers are compared one by one, and what is no number as text.
fn is_older(version: &str, than: &str) -> bool {
    let parts = |version: &str| -> Vec<Result<u64, String>> {
        let parts = version.split(['.', '-', '+']);
        parts.map(|part| part.parse().map_err(|_| part.to_owned())).collect()
    };
    // Numbers come after text: 1.0.0 is newer than 1.0.alpha.
    let keys = |version: &str| -> Vec<(bool, u64, String)> {
        let key = |part| match part {
            Ok(number) => (true, number, String::new()),
            Err(text) => (false, 0, text),
        };
        parts(version).into_iter().map(key).collect()
    };
    // 1.0-rc1 comes before 1.0.
    let (a, b) = (keys(version), keys(than));
    let (short, long) = if a.len() < b.len() { (&a, &b) } else { (&b, &a) };
    if long.starts_with(short) && long.len() > short.len() {
        let is_before = !long[short.len()].0;
        return if a.len() > b.len() { is_before } else { !is_before };
    }
    a < b
}

/// Name and version of a plugin that the gate lets pass.
fn try_with_gate(source: &Source, fetched: &Fetched) -> anyhow::Result<(String, String)> {
    let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
    let file = directory.path().join(format!("plugin.{}", std::env::consts::DLL_EXTENSION));
    std::fs::write(&file, &fetched.library).with_context(|| format!("cannot write {}", file.display()))?;
    let (mut config, _) = config()?;
    config.plugins.pins = None;
    config.plugins.patience = Duration::from_secs(30);
    config.threads = 1;
    let report = KernelManager::new(config)?.verify_plugin(&file)?;
    if let Some(refusal) = &report.refusal {
        bail!("{source}: the gate refuses this plugin: {refusal}");
    }
    let plugin = report.plugin.with_context(|| format!("{source}: its descriptor was not read"))?;
    if !is_name(&plugin.name) {
        bail!("{source}: {:?} is no name for a file", plugin.name);
    }
    Ok((plugin.name, plugin.version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_their_numbers() {
        for (older, newer) in [
            ("1.0", "1.1"),
            ("1.9", "1.10"),
            ("0.9.9", "1.0"),
            ("1.0", "1.0.1"),
            ("1.0-rc1", "1.0"),
            ("1.0-a", "1.0-b"),
        ] {
            assert!(is_older(older, newer) && !is_older(newer, older), "{older} {newer}");
        }
        assert!(!is_older("1.0", "1.0"));
    }
}
