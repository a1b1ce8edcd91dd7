//! From flags to a model that is ready, with what the report wants to know about the way there.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use bitnet_burn::backends::manager;
use bitnet_burn::bitnet::{BitNet, LoadOptions, LoadProgress};
use bitnet_burn::checkpoint::Checkpoint;
use bitnet_burn::core::manager::{KernelManager, ManagerReport, Status};
use bitnet_burn::core::plugin::PluginError;
use bitnet_burn::core::ManagerConfig;
use bitnet_burn::report::{ModelSummary, Receipt};
use bitnet_burn::tokenizer::Tokenizer;

use crate::args::{EngineArgs, KernelArgs};
use crate::output;

/// The process's kernel manager, set up from the environment and the flags.
pub struct Kernels {
    pub manager: &'static KernelManager,
    /// Plugins that were refused, and kernels of plugins that were rejected.
    pub refused: Vec<String>,
}

impl KernelArgs {
    /// Sets the manager up. A plugin that is refused is reported, and in strict mode an error.
    pub fn configure(&self) -> anyhow::Result<Kernels> {
        let mut config = ManagerConfig::from_env()?;
        if let Some(threads) = self.threads.threads {
            config.threads = threads;
        }
        if self.kernel.is_some() {
            config.force.clone_from(&self.kernel);
        }
        let from_env = std::env::var_os("BITNET_PLUGIN_PATH").unwrap_or_default();
        // An empty entry would mean the working directory in PATH; here it means nothing.
        let from_env = std::env::split_paths(&from_env).filter(|path| !path.as_os_str().is_empty());
        let mut files = Vec::new();
        for path in from_env.chain(self.plugins.iter().cloned()) {
            files.extend(libraries(&path)?);
        }
        let mut seen = Vec::new();
        files.retain(|file: &PathBuf| {
            let file = file.canonicalize().unwrap_or_else(|_| file.clone());
            let new = !seen.contains(&file);
            seen.push(file);
            new
        });
        let strict = config.strict;
        let (manager, errors) = manager::configure(config, &files)?;
        if strict && let Some(error) = errors.into_iter().next() {
            return Err(error).context("strict mode: a plugin is refused");
        } else {
            Ok(Kernels { manager, refused: refused(manager, &files, strict)? })
        }
    }
}

/// A file itself, or the libraries in a directory, by name.
fn libraries(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let file = entry.with_context(|| format!("cannot read {}", path.display()))?.path();
        if file.extension().is_some_and(|e| e == std::env::consts::DLL_EXTENSION) {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        output::warning(format_args!(
            "{}: there is no .{} file in this directory of plugins",
            path.display(),
            std::env::consts::DLL_EXTENSION
        ));
    }
    Ok(files)
}

fn refused(_: &KernelManager, _: &[PathBuf], _: bool) -> anyhow::Result<Vec<String>> {
    unreachable!()
}
