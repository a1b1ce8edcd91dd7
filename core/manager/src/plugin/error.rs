//! Why a plugin is not used.

use std::path::PathBuf;

use bitnet_burn_plugin::abi::{ABI_MAJOR, ABI_MINOR, ENTRY_SYMBOL};

use crate::gate::{GateError, Refusal, Stage};

/// Why a plugin was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PluginError {
    /// The host is linked statically. A library would bring a second C library, in which threads and panics crash.
    #[error(
        "plugin {}: this program is linked statically and loads no plugins; build it without \
         `-C target-feature=+crt-static`", path.display()
    )]
    StaticHost {
        /// The file.
        path: PathBuf,
    },
    /// The file can't be read.
    #[error("plugin {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no library that this system can load.
    #[error(
        "plugin {}: not a loadable library: {reason} (a copy of the file is loaded: what it needs must be linked in, \
         or be a library of the system)", path.display()
    )]
    Load {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// The library did something forbidden while it was loaded.
    #[error("plugin {}: {reason} when it was loaded", path.display())]
    Loading {
        /// The file.
        path: PathBuf,
        /// What it did.
        reason: String,
    },
    /// The library does not export the entry point.
    #[error(
        "plugin {}: it does not export `{ENTRY_SYMBOL}`, so it is no bitnet-burn plugin \
         (Rust: `export_plugin!`; C: see bitnet_plugin.h)", path.display()
    )]
    NoEntry {
        /// The file.
        path: PathBuf,
    },
    /// Built for another major version of the ABI.
    #[error(
        "plugin {origin}: built for ABI {major}.{minor}, and this host speaks ABI \
         {ABI_MAJOR}.{ABI_MINOR}; rebuild it against bitnet-burn-plugin {ABI_MAJOR}"
    )]
    Version {
        /// Where it came from.
        origin: String,
        /// Its major version.
        major: u32,
        /// Its minor version.
        minor: u32,
    },
    /// The descriptor breaks the ABI.
    #[error("plugin {origin}: its descriptor is invalid: {reason}")]
    Descriptor {
        /// Where it came from.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// Another plugin of the same name is there already.
    #[error(
        "plugin {origin}: version {version} of a plugin named `{name}`, and version {other_version} of \
         `{name}` is in use already ({other}); the first one stays, so name the one that you want first, or \
         give it a name of its own"
    )]
    Duplicate {
        /// Where it came from.
        origin: String,
        /// The name.
        name: String,
        /// Its version.
        version: String,
        /// Where the other one came from.
        other: String,
        /// The other one's version.
        other_version: String,
    },
    /// Plugins from files are switched off.
    #[error("plugin {}: plugins are switched off (BITNET_PLUGINS=off)", path.display())]
    Off {
        /// The file.
        path: PathBuf,
    },
    /// Other users could have put the file there.
    #[error("plugin {}: {reason}", path.display())]
    Policy {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Pins are in force, and the file is not among them.
    #[error(
        "plugin {}: its SHA-256 {sha256} is not in {}; `bitnet plugins trust` adds it", path.display(),
        pins.display()
    )]
    NotPinned {
        /// The file.
        path: PathBuf,
        /// Its hash.
        sha256: String,
        /// The file of pins.
        pins: PathBuf,
    },
    /// The pins can't be read, so nothing is loaded.
    #[error("the pins of plugins, {}: {reason}", path.display())]
    Pins {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no place for the copy that is checked and run.
    #[error("plugin {}: a copy of it can't be kept: {source}", path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It was never checked on this machine, and there is no helper program to check it.
    #[error(
        "plugin {}: the gate has not tried it on this machine, and no helper program is configured that \
         could; `bitnet plugins verify` does it", path.display()
    )]
    Unverified {
        /// The file.
        path: PathBuf,
    },
    /// The gate could not be run.
    #[error("plugin {}: {source}", path.display())]
    Gate {
        /// The file.
        path: PathBuf,
        /// Why.
        source: GateError,
    },
    /// It can't be held in a process of its own.
    #[error(
        "plugin {}: it can't be contained (BITNET_PLUGINS=contained): {reason}; without `contained`, it is loaded into the \
         program itself", path.display()
    )]
    Contained {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The gate found it wrong.
    #[error("plugin {}: {}: {refusal}", path.display(), match refusal.stage {
        Stage::Before => "the gate refuses it",
        Stage::FirstUse | Stage::InUse => "quarantined, since it was wrong in use",
    })]
    Refused {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        refusal: Refusal,
    },
}
