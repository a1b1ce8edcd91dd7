//! The registry: plugins come in, their kernels are checked or their verdict is read, and each has an entry.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use bitnet_burn_plugin::abi::{OPERATION_SCALED_TERNARY_MATMUL, Signature};

use super::report::{self, Failures};
use super::{KernelManager, KernelReport, ManagerError, Status, lock, walls, watch};
use crate::contained::{Contained, Held};
use crate::cpu;
use crate::gate;
use crate::plugin::{Kernel, Origin, Plugin, PluginError, Target};
use crate::store;

/// A registered kernel, with what is known of it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(super) kernel: Kernel,
    /// Set once, from `Ready`, when the kernel turns out to be wrong.
    pub(super) status: RwLock<Status>,
    /// Whether the status is `Ready`, for the hot path.
    pub(super) ready: AtomicBool,
    pub(super) calls: AtomicU64,
    /// By kind.
    pub(super) failures: [AtomicU64; 3],
    /// For kernels from files, and for GPUs: what was compared in use.
    pub(super) watch: Option<watch::Watch>,
    /// For kernels from files: the shapes at which they were tried between walls.
    pub(super) tried: walls::Tried,
}

impl Entry {
    pub(super) fn ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    pub(super) fn status(&self) -> Status {
        self.status.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    pub(super) fn fail(&self, kind: report::Failure) {
        self.failures[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn reject(&self, reason: String) {
        tracing::warn!(kernel = self.kernel.id(), reason, "kernel rejected");
        self.set(Status::Rejected(reason));
    }

    pub(super) fn set(&self, status: Status) {
        self.ready.store(status == Status::Ready, Ordering::Relaxed);
        *self.status.write().unwrap_or_else(|e| e.into_inner()) = status;
    }
}

impl KernelManager {
    /// Registers the kernels of a plugin that is linked in, and compares each that this machine can run
    /// with the reference, in this process. A kernel that is wrong is rejected, with the reason, and the
    /// others stay. Weights prepared earlier keep their choice.
    ///
    /// # Errors
    /// If a plugin of this name is registered already.
    pub fn register(&self, plugin: Plugin) -> Result<Vec<KernelReport>, PluginError> {
        self.enter(plugin, &|kernel| {
            if kernel.gpu().is_some() {
                // Its results are watched on the device that it is used on.
                return Status::Ready;
            }
            match gate::check_in_process(kernel) {
                Ok(()) => Status::Ready,
                Err(reason) => {
                    tracing::warn!(kernel = kernel.id(), reason, "kernel rejected");
                    Status::Rejected(reason)
                }
            }
        })
    }

    /// Loads a plugin from a file and registers its kernels, if the [policy](crate::store) allows the file
    /// and the [gate] finds nothing wrong: the gate runs in a process of its own, unless its
    /// verdict is known. What is loaded is a copy. A file with the same content as one that is loaded
    /// already is the same plugin.
    ///
    /// # Errors
    /// If the policy refuses the file, the gate could not be run or refuses the plugin, or another plugin
    /// of its name is registered.
    pub fn load_plugin(&self, path: &Path) -> Result<Vec<KernelReport>, PluginError> {
        let stored = self.store.admit(path)?;
        let same =
            |origin: &Origin| matches!(origin, Origin::File { sha256, .. } if *sha256 == stored.sha256);
        let loaded = lock(&self.plugins).iter().any(|plugin| same(plugin.origin()));
        if loaded {
            let entries = self.entries();
            return Ok(entries
                .iter()
                .filter(|e| same(e.kernel.plugin().origin()))
                .map(|e| report(e))
                .collect());
        }
        let config = self.store.config();
        let elsewhere = |known: &gate::Report| {
            let gpu = config.gpu.filter(|_| known.gpu.is_some())?();
            known.is_of_another_gpu(&gpu, config.helper.as_deref()).then_some(gpu)
        };
        let (verdict, elsewhere) =
            match self.store.verdict(&stored.sha256).map(|known| (elsewhere(&known), known)) {
                Some((None, known)) => (known, None),
                Some((Some(gpu), known)) if config.helper.is_none() => (known, Some(gpu)),
                _ => (self.examine(path, &stored)?, None),
            };
        if let Some(refusal) = verdict.refusal {
            return Err(PluginError::Refused { path: path.to_owned(), refusal });
        }
        let plugin = match config.contained {
            false => Plugin::load_as(&stored.library, &stored.origin, &config.configuration)?,
            true => self.contain(path, &stored)?,
        };
        self.enter(plugin, &|kernel| {
            // A kernel for a GPU can be used where the gate had one to try it on.
            let tried = verdict.kernels.iter().find(|result| result.kernel == kernel.id());
            let Some(tried) = tried.filter(|tried| tried.declared == gate::declared(kernel)) else {
                return Status::Rejected(
                    "the gate has not tried it: what the plugin declares here is not what it declared there"
                        .into(),
                );
            };
            match (&tried.unavailable, &elsewhere) {
                (None, _) if kernel.gpu().is_none() => Status::Ready,
                (Some(reason), _) => Status::Unavailable(reason.clone()),
                (None, Some(gpu)) => Status::Unavailable(format!(
                    "it was tried on {}, and this is {gpu}",
                    verdict.gpu.as_deref().unwrap_or("no GPU")
                )),
                (None, None) => Status::Ready,
            }
        })
    }

    /// A plugin in a process of its own.
    fn contain(&self, path: &Path, stored: &store::Stored) -> Result<Plugin, PluginError> {
        let config = self.store.config();
        let refused = |reason: String| PluginError::Contained { path: path.to_owned(), reason };
        let helper = config
            .helper
            .as_deref()
            .ok_or_else(|| refused("no helper program is configured that could hold it".into()))?;
        let contained = Contained::start(Held {
            helper,
            library: &stored.library,
            origin: &stored.origin,
            configuration: &config.configuration,
            threads: self.pool.threads(),
            pin: self.config.pin,
            patience: config.patience,
        });
        Plugin::contained(contained.map_err(refused)?, &stored.origin, stored.sha256.clone())
    }

    /// Runs the gate on a plugin's file, whatever is known of it, keeps the verdict, and gives it back.
    ///
    /// # Errors
    /// If the policy refuses the file, or the gate could not be run.
    pub fn verify_plugin(&self, path: &Path) -> Result<gate::Report, PluginError> {
        let stored = self.store.admit(path)?;
        self.examine(path, &stored)
    }

    fn examine(&self, path: &Path, stored: &store::Stored) -> Result<gate::Report, PluginError> {
        let config = self.store.config();
        let Some(helper) = &config.helper else {
            return Err(PluginError::Unverified { path: path.to_owned() });
        };
        let (library, origin, sha256) = (&stored.library, &stored.origin, &stored.sha256);
        let report = gate::examine(helper, library, origin, sha256, &config.configuration, config.patience)
            .map_err(|source| PluginError::Gate { path: path.to_owned(), source })?;
        tracing::info!(plugin = %path.display(), passed = report.passed(), seconds = report.seconds, "gate");
        for warning in &report.warnings {
            tracing::warn!(plugin = %path.display(), "{warning}");
        }
        self.store.remember(&report);
        Ok(report)
    }

    /// Registers a plugin's kernels; `judge` says what becomes of one that this machine can run.
    fn enter(
        &self,
        plugin: Plugin,
        judge: &dyn Fn(&Kernel) -> Status,
    ) -> Result<Vec<KernelReport>, PluginError> {
        let plugin = Arc::new(plugin);
        {
            let mut plugins = lock(&self.plugins);
            if let Some(other) = plugins.iter().find(|p| p.name() == plugin.name()) {
                return Err(PluginError::Duplicate {
                    origin: plugin.origin().to_string(),
                    name: plugin.name().into(),
                    version: plugin.version().into(),
                    other: other.origin().to_string(),
                    other_version: other.version().into(),
                });
            }
            plugins.push(plugin.clone());
        }
        let foreign = *plugin.origin() != Origin::BuiltIn;
        let mut reports = Vec::new();
        for kernel in plugin.kernels() {
            let lacking = match kernel.target() {
                _ if let Some(unknown) = kernel.unknown() => Some(unknown),
                Target::CubeCl if foreign => Some("only kernels that are linked in can be CubeCL's".into()),
                Target::Cpu => cpu::lacking(kernel.features(), &self.config.masked_features),
                Target::Wgsl | Target::Cuda | Target::CubeCl | Target::Unknown(_) => None,
            };
            let status = match lacking {
                Some(reason) => Status::Unavailable(reason),
                None => judge(&kernel),
            };
            let watched = foreign || kernel.gpu().is_some();
            let entry = Arc::new(Entry {
                kernel,
                ready: AtomicBool::new(status == Status::Ready),
                status: RwLock::new(status),
                calls: AtomicU64::new(0),
                failures: Default::default(),
                watch: watched.then(watch::Watch::default),
                tried: walls::Tried::default(),
            });
            reports.push(report(&entry));
            self.entries.write().unwrap_or_else(|e| e.into_inner()).push(entry);
        }
        lock(&self.choices).clear();
        Ok(reports)
    }

    /// Whether a kernel claims to compute this, and to hold the weights. If it does something forbidden while it is
    /// asked, it is taken out of use.
    pub(super) fn claims(&self, entry: &Entry, signature: &Signature) -> bool {
        let kernel = &entry.kernel;
        let answer = kernel.claims(signature).and_then(|claims| {
            Ok(claims && kernel.packed_bytes(signature.n as usize, signature.k as usize)?.is_some())
        });
        answer.unwrap_or_else(|failure| {
            self.condemn(entry, gate::Stage::FirstUse, failure.to_string());
            false
        })
    }

    /// Takes a kernel out of use that is wrong, or did what none may; one from a file with its whole plugin.
    pub(super) fn condemn(&self, entry: &Entry, stage: gate::Stage, reason: String) {
        match entry.watch {
            Some(_) => self.quarantine(entry, stage, reason),
            None => entry.reject(reason),
        }
    }

    /// Checks that the forced kernel, if there is one, exists.
    ///
    /// # Errors
    /// If it does not.
    pub fn validate(&self) -> Result<(), ManagerError> {
        let Some(name) = &self.config.force else { return Ok(()) };
        let entries = self.entries();
        if entries.iter().any(|entry| names(&entry.kernel, name)) {
            return Ok(());
        }
        Err(self.unknown_kernel(name))
    }

    pub(super) fn unknown_kernel(&self, name: &str) -> ManagerError {
        let entries = self.entries();
        let known: Vec<_> = entries.iter().map(|entry| entry.kernel.id()).collect();
        ManagerError::UnknownKernel { name: name.to_owned(), known: known.join(", ") }
    }

    pub(super) fn entries(&self) -> Vec<Arc<Entry>> {
        self.entries.read().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

/// Whether a name means a kernel: `plugin/kernel`, `kernel`, or `plugin` for all of its kernels.
pub(super) fn names(kernel: &Kernel, name: &str) -> bool {
    let (plugin, short) = kernel.id().split_once('/').expect("an id is plugin/kernel");
    [kernel.id(), plugin, short].contains(&name)
}

pub(super) fn report(entry: &Entry) -> KernelReport {
    let plugin = entry.kernel.plugin();
    KernelReport {
        kernel: entry.kernel.id().into(),
        version: plugin.version().into(),
        origin: plugin.origin().to_string(),
        sha256: match plugin.origin() {
            Origin::BuiltIn => None,
            Origin::File { sha256, .. } => Some(sha256.clone()),
        },
        target: entry.kernel.target().to_string(),
        layout: entry.kernel.layout().unwrap_or("canonical").into(),
        many_scales: entry.kernel.operation() == OPERATION_SCALED_TERNARY_MATMUL,
        features: entry.kernel.features().to_vec(),
        status: entry.status(),
        calls: entry.calls.load(Ordering::Relaxed),
        failures: {
            let [status, wrong, slow] = [0, 1, 2].map(|i: usize| entry.failures[i].load(Ordering::Relaxed));
            Failures { status, wrong, slow }
        },
    }
}
