//! The kernel manager that Burn's operations use.
//!
//! Burn's extension operations are static functions, so theirs is one per process: configured at the
//! start, or made from the environment at its first use. Tests and embedders can make others with
//! [`with_built_in_kernels`].

use std::cell::Cell;
use std::ffi::OsString;
use std::path::PathBuf;
#[cfg(feature = "fusion")]
use std::sync::Mutex;
use std::sync::OnceLock;

use bitnet_burn_manager::gate;
use bitnet_burn_manager::plugin::{Plugin, PluginError};
use bitnet_burn_manager::{KernelManager, ManagerConfig, ManagerError, Strict};
use bitnet_burn_plugin::features;

/// The manager could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// It is in use already, with another configuration.
    #[error("the process's kernel manager is in use already; configure it before the first operation")]
    AlreadyInUse,
    /// The manager refused its configuration.
    #[error(transparent)]
    Manager(#[from] ManagerError),
    /// A plugin was refused.
    #[error(transparent)]
    Plugin(#[from] PluginError),
    /// A plugin was refused, and strict mode asks for all of them.
    #[error(
        "strict mode (gated-plugins): {0}; without the plugin, or without gated-plugins in strict mode, the \
         others are used"
    )]
    Refused(#[source] PluginError),
}

static MANAGER: OnceLock<KernelManager> = OnceLock::new();

/// A manager with the kernels that are linked in.
///
/// # Errors
/// If the configuration is refused, or names a kernel that does not exist.
pub fn with_built_in_kernels(config: ManagerConfig) -> Result<KernelManager, SetupError> {
    let manager = KernelManager::new(config)?;
    manager.register(Plugin::built_in(&bitnet_burn_cpu::PLUGIN)?)?;
    #[cfg(feature = "cube")]
    manager.register(Plugin::built_in(&bitnet_burn_cube::PLUGIN)?)?;
    #[cfg(feature = "cube")]
    manager.register(Plugin::built_in(&bitnet_burn_cube::MATRIX_UNITS)?)?;
    Ok(manager)
}

/// Sets the process's manager up: the built-in kernels, and the plugins in `named` (files and directories)
/// and in the places of the configuration ([`PluginConfig`](bitnet_burn_manager::store::PluginConfig)). A plugin
/// that is refused does not keep the others from being used; its error is returned in the list. The CPU features that
/// the configuration masks are masked for the whole process, so that neither kernels nor the other operations use them.
///
/// # Errors
/// If the manager is in use already, its configuration is refused, or, with
/// [`Strict::gated_plugins`], a plugin is.
pub fn configure(
    config: ManagerConfig,
    named: &[PathBuf],
) -> Result<(&'static KernelManager, Vec<PluginError>), SetupError> {
    let mask = config.mask()?;
    let (manager, refused) = with_plugins(config, named)?;
    MANAGER.set(manager).map_err(|_| SetupError::AlreadyInUse)?;
    features::mask(mask);
    Ok((MANAGER.get().expect("set above"), refused))
}

/// Whether the process's kernel manager was set up, so that [`configure`] is no longer possible.
pub fn is_set_up() -> bool {
    MANAGER.get().is_some()
}

/// The helper's side of the gate ([`gate::child`]), with this build's GPU runtime, if it has one, to try kernels on that
/// are GPU source.
pub fn gate_child(arguments: impl Iterator<Item = OsString>) -> i32 {
    #[cfg(feature = "cube")]
    return gate::child_with_gpu(arguments, &crate::gpu::open_gpu);
    #[cfg(not(feature = "cube"))]
    return gate::child(arguments);
}

/// The GPU that kernels run on in this build.
#[cfg(feature = "cube")]
const GPU: Option<fn() -> String> =
    Some(|| crate::gpu::open_gpu().map_or_else(|error| error, |gpu| gpu.name()));
#[cfg(not(feature = "cube"))]
const GPU: Option<fn() -> String> = None;

fn with_plugins(
    mut config: ManagerConfig,
    named: &[PathBuf],
) -> Result<(KernelManager, Vec<PluginError>), SetupError> {
    config.plugins.gpu = config.plugins.gpu.or(GPU);
    let (files, mut refused) = config.plugins.find(named);
    let strict = config.strict.gated_plugins;
    let manager = with_built_in_kernels(config)?;
    refused.extend(files.iter().filter_map(|path| manager.load_plugin(path).err()));
    if strict && !refused.is_empty() {
        return Err(SetupError::Refused(refused.swap_remove(0)));
    }
    if let Err(error) = manager.validate() {
        // The kernel that is missing may be one of theirs.
        for error in refused {
            tracing::warn!(%error, "a plugin is not used");
        }
        return Err(error.into());
    }
    Ok((manager, refused))
}

/// The process's manager; at the first use, from the environment ([`ManagerConfig::from_env`]), where
/// a setting that is wrong is reported and ignored, but for strict mode: with `BITNET_STRICT_MODE`, nothing
/// computes then. Plugins of the environment are loaded if a program that has the gate's helper, such as
/// `bitnet`, has found them right on this machine.
pub fn manager() -> &'static KernelManager {
    MANAGER.get_or_init(|| {
        let from_env =
            ManagerConfig::from_env().map_err(SetupError::from).and_then(|config| with_plugins(config, &[]));
        match from_env {
            Ok((manager, refused)) => {
                features::mask(manager.config().mask().expect("the manager has checked it"));
                for error in refused {
                    tracing::warn!(%error, "a plugin is not used");
                }
                manager
            }
            Err(error) => {
                tracing::error!(%error, "the kernel manager's environment is ignored");
                let strict = ManagerConfig::strict_from_env().unwrap_or(Strict::ALL);
                let config = ManagerConfig { strict, ..ManagerConfig::default() };
                match strict.any() {
                    true => KernelManager::new(config).map_err(SetupError::from),
                    false => with_built_in_kernels(config),
                }
                .expect("the default configuration needs nothing but threads")
            }
        }
    })
}

/// [`KernelManager::results_in_doubt`] of the process's manager; 0 before it is set up.
pub fn results_in_doubt() -> u64 {
    MANAGER.get().map_or(0, KernelManager::results_in_doubt)
}

thread_local! {
    /// The first error of an operation on this thread since the last [`take_error`]. Burn's
    /// operations return tensors, not results.
    static ERROR: Cell<Option<ManagerError>> = const { Cell::new(None) };
}

/// Leaves an error for [`take_error`]; the first one stays.
#[cfg(any(feature = "flex", feature = "ndarray", all(feature = "cube", not(feature = "fusion"))))]
pub(crate) fn leave_error(error: ManagerError) {
    ERROR.with(|slot| {
        let first = slot.take().unwrap_or(error);
        slot.set(Some(first));
    });
}

/// The first error of an operation that was computed after its caller had gone on.
#[cfg(feature = "fusion")]
static LATER: Mutex<Option<ManagerError>> = Mutex::new(None);

/// Leaves the error of an operation on a GPU. With the feature `fusion` its caller has gone on, and it may be on a thread
/// of the device's: whoever asks next is told.
#[cfg(feature = "cube")]
pub(crate) fn leave_gpu_error(error: ManagerError) {
    #[cfg(feature = "fusion")]
    LATER.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
    #[cfg(not(feature = "fusion"))]
    leave_error(error);
}

/// Forgets what operations before have left on this thread.
pub(crate) fn forget_error() {
    ERROR.take();
}

/// Takes the error that an operation left behind on this thread, or with the feature `fusion` an operation on a GPU before.
/// Its result was NaN.
pub fn take_error() -> Option<ManagerError> {
    #[cfg(feature = "fusion")]
    return ERROR.take().or_else(|| LATER.lock().unwrap_or_else(|e| e.into_inner()).take());
    #[cfg(not(feature = "fusion"))]
    ERROR.take()
}
