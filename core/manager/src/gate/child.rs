//! The child's side of the gate.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::environment;
use super::{
    Confinement, Event, FOR_GPU, GATE_VERSION, GPU_FOLLOWS, NO_GPU_RUNTIME, cases, declared, gpu, host_abi,
};
use crate::contained::{self, Contained, Held};
use crate::cpu;
use crate::gpu::GpuDevice;
use crate::plugin::{Kernel, Plugin, Target, log_to};
use crate::pool::Pool;
#[cfg(unix)]
use crate::process::keep_alone;
use crate::process::take_stdout;
use crate::sandbox::Confined;

/// How long a packing of a kernel for GPUs may take. (The parent has a limit for the whole case.)
const PATIENCE: Duration = Duration::from_secs(60);

/// Threads that compute at once.
const THREADS: usize = 4;
/// The stack of what tries the plugin: a program's first thread may have a small one.
const STACK: usize = 8 << 20;

/// Opens the GPU that kernels are tried on. The error says why there is no GPU.
type Open<'a> = &'a dyn Fn() -> Result<Box<dyn GpuDevice>, String>;

/// The helper's side of the gate's first stage: `arguments` are those behind
/// [`CHILD_COMMAND`](super::CHILD_COMMAND). Loads and tries the plugin, and reports on stdout. Nothing
/// else may run in this process: the plugin may end it at any time. Call it on the program's first thread, before there are
/// others: on Linux the process is confined, and what was started before would not be.
///
/// ```no_run
/// use bitnet_burn_manager::gate;
///
/// let mut arguments = std::env::args_os().skip(1);
/// if arguments.next().is_some_and(|first| first == gate::CHILD_COMMAND) {
///     std::process::exit(gate::child(arguments));
/// }
/// ```
///
/// The same process holds a plugin that computes [contained](crate::store::PluginConfig::contained).
///
/// Returns the status for the process to end with: 0 if the plugin passed, 1 if not, 2 if the arguments
/// or the system are at fault.
///
/// Kernels for GPUs are not tried, and not used: [`child_with_gpu`] tries them.
pub fn child(arguments: impl Iterator<Item = OsString>) -> i32 {
    begin(arguments, None)
}

/// [`child`], with a GPU to try kernels on that are GPU source. `open` is called if there are such kernels, in a process of
/// their own, after those for the CPU; its error says why there is no GPU.
pub fn child_with_gpu(
    arguments: impl Iterator<Item = OsString>,
    open: &dyn Fn() -> Result<Box<dyn GpuDevice>, String>,
) -> i32 {
    begin(arguments, Some(open))
}

fn begin(mut arguments: impl Iterator<Item = OsString>, open: Option<Open>) -> i32 {
    let (Some(library), Some(origin), Some(configuration), role, None) =
        (arguments.next(), arguments.next(), arguments.next(), arguments.next(), arguments.next())
    else {
        eprintln!("the gate's helper takes a library, the name to call it by, and a configuration for it");
        return 2;
    };
    let (library, origin) = (PathBuf::from(library), PathBuf::from(origin));
    let configuration = configuration.to_string_lossy();
    let role = role.map(|role| role.to_string_lossy().into_owned());
    let for_gpu = match role.as_deref() {
        None => false,
        Some(FOR_GPU) => true,
        Some(role) => return contained::hold(&library, &origin, &configuration, role),
    };
    let out = match own_output() {
        Ok(out) => Reporter(Arc::new(out)),
        Err(error) => {
            eprintln!("the gate's helper can't set itself up: {error}");
            return 2;
        }
    };
    out.say(&Event::Hello { gate: GATE_VERSION, abi: host_abi() });
    let log = out.clone();
    log_to(move |level, text| log.say(&Event::Log { line: format!("{level}: {text}") }));
    let tried = match (for_gpu, open) {
        (true, Some(open)) => try_on_gpu(&library, &origin, &configuration, open, &out),
        (true, None) => Err(NO_GPU_RUNTIME.into()),
        (false, _) => try_confined(&library, &origin, &configuration, open.is_some(), &out),
    };
    match tried {
        Ok(()) => {
            out.say(&Event::Done);
            0
        }
        Err(reason) => {
            out.say(&Event::Wrong { reason });
            1
        }
    }
}

/// Confines the process, and then tries the plugin.
fn try_confined(
    library: &Path,
    origin: &Path,
    configuration: &str,
    has_gpu: bool,
    out: &Reporter,
) -> Result<(), String> {
    // It opens what it counts with.
    environment::threads();
    let mut confined = Confined::new(library);
    let confinement = match &confined {
        Ok(confined) => confined.confinement.clone(),
        Err(reason) => Confinement { layers: Vec::new(), missing: vec![reason.clone()] },
    };
    out.say(&Event::Confined { confinement });
    // Threads that it starts are confined as it is.
    let mut work = || try_plugin((library, origin, configuration), has_gpu, &mut confined, out);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, &mut work);
        let thread = thread.map_err(|error| format!("the gate has no thread: {error}"))?;
        thread.join().unwrap_or_else(|_| Err("the gate itself failed".into()))
    })
}

/// Loads the library, and says so.
fn load(
    (library, origin, configuration): (&Path, &Path, &str),
    confined: &mut Result<Confined, String>,
) -> Result<Plugin, String> {
    let plugin = Plugin::load_as(library, origin, configuration).map_err(|error| {
        // Its source says what the loader said; and the parent names the file itself.
        let text = error.to_string();
        text.strip_prefix(&format!("plugin {}: ", origin.display())).map(str::to_owned).unwrap_or(text)
    })?;
    confined.as_mut().map_or(Ok(()), Confined::loaded)?;
    Ok(plugin)
}

fn try_plugin(
    library: (&Path, &Path, &str),
    has_gpu: bool,
    confined: &mut Result<Confined, String>,
    out: &Reporter,
) -> Result<(), String> {
    let pool = Pool::new(THREADS).map_err(|error| format!("the gate has no threads: {error}"))?;
    let threads = environment::threads();
    out.say(&Event::Trying { what: "loading it".into() });
    let plugin = load(library, confined)?;
    if let Some(more) = environment::more_threads_than(threads) {
        return Err(format!("it started {more} threads when it was loaded"));
    }
    out.say(&Event::Plugin {
        name: plugin.name().into(),
        version: plugin.version().into(),
        abi: plugin.abi(),
    });
    let mut kernels = Arc::new(plugin).kernels();
    kernels.retain(|kernel| {
        let unknown = kernel.unknown();
        if let Some(reason) = &unknown {
            out.cannot(kernel, reason.clone());
        }
        unknown.is_none()
    });
    let (for_cpu, others): (Vec<Kernel>, Vec<Kernel>) =
        kernels.into_iter().partition(|kernel| kernel.target() == Target::Cpu);
    for kernel in for_cpu {
        let id = kernel.id();
        if let Some(missing) = cpu::lacking(kernel.features(), &[]) {
            out.cannot(&kernel, missing);
            continue;
        }
        out.say(&Event::Trying { what: format!("kernel {id}") });
        let cases = cases::check(&kernel, &pool, cases::all(), &mut |case| {
            out.say(&Event::Trying { what: format!("kernel {id}, {case}") });
        })?;
        out.say(&Event::Kernel { kernel: id.into(), declared: declared(&kernel), cases, device: None });
    }
    if others.is_empty() {
        return Ok(());
    }
    if !has_gpu {
        out.say(&Event::Gpu { words: NO_GPU_RUNTIME.into() });
        for kernel in &others {
            out.cannot(kernel, format!("it is for {}, and {NO_GPU_RUNTIME}", kernel.target()));
        }
        return Ok(());
    }
    for kernel in &others {
        let id = kernel.id();
        out.say(&Event::Trying { what: format!("kernel {id}") });
        gpu::check_packing(kernel, &mut |case| {
            out.say(&Event::Trying { what: format!("kernel {id}, {case}") });
        })?;
    }
    out.say(&Event::GpuFollows);
    Ok(())
}

/// Tries the kernels that are GPU source. The driver needs files and devices, so the library is in another process, where that
/// can be confined.
fn try_on_gpu(
    library: &Path,
    origin: &Path,
    configuration: &str,
    open: Open,
    out: &Reporter,
) -> Result<(), String> {
    out.say(&Event::Trying { what: "loading it".into() });
    let helper = std::env::current_exe().map_err(|error| format!("the gate can't find itself: {error}"))?;
    let held = Contained::start(Held {
        helper: &helper,
        library,
        origin,
        configuration,
        threads: 1,
        pin: false,
        patience: PATIENCE,
    });
    let plugin = match held {
        Ok(contained) => {
            // (Messages name the file by its path.)
            Plugin::contained(contained, origin, String::new()).map_err(|error| error.to_string())?
        }
        Err(reason) => {
            tracing::warn!(reason, "the plugin is not contained");
            load((library, origin, configuration), &mut Err(reason))?
        }
    };
    let mut kernels = Arc::new(plugin).kernels();
    kernels.retain(|kernel| kernel.unknown().is_none() && kernel.target() != Target::Cpu);
    out.say(&Event::Trying { what: "opening the GPU".into() });
    eprint!("{GPU_FOLLOWS}");
    let device = open();
    let words = device.as_ref().map_or_else(Clone::clone, |device| device.name());
    out.say(&Event::Gpu { words });
    for kernel in kernels {
        let id = kernel.id();
        let device = match &device {
            Ok(device) if device.target() == kernel.target() => device,
            Ok(device) => {
                let reason =
                    format!("it is for {}, and {} takes {}", kernel.target(), device.name(), device.target());
                out.cannot(&kernel, reason);
                continue;
            }
            Err(reason) => {
                out.cannot(&kernel, format!("it is for {}, and {reason}", kernel.target()));
                continue;
            }
        };
        if let Some(missing) = device.lacking(&kernel) {
            out.cannot(&kernel, missing);
            continue;
        }
        out.say(&Event::Trying { what: format!("kernel {id}") });
        let cases = gpu::check(&kernel, &**device, &mut |case| {
            out.say(&Event::Trying { what: format!("kernel {id}, {case}") });
        })?;
        out.say(&Event::Kernel {
            kernel: id.into(),
            declared: declared(&kernel),
            cases,
            device: Some(device.name()),
        });
    }
    Ok(())
}

/// Where events go.
#[derive(Clone)]
struct Reporter(Arc<File>);

impl Reporter {
    fn say(&self, event: &Event) {
        let mut line = serde_json::to_vec(event).expect("an event is plain data");
        line.push(b'\n');
        // In one write, so that a crash can't leave half a line. If the parent is gone, the line is not needed.
        let _ = (&*self.0).write_all(&line);
    }

    /// A kernel can't be tried here.
    fn cannot(&self, kernel: &Kernel, reason: String) {
        self.say(&Event::Unavailable { kernel: kernel.id().into(), declared: declared(kernel), reason });
    }
}

/// Takes stdout away from the plugin, and makes this process end quietly when it has to.
fn own_output() -> std::io::Result<File> {
    let out = take_stdout()?;
    #[cfg(unix)]
    {
        use std::os::fd::AsRawFd as _;

        keep_alone(Some(out.as_raw_fd()))?;
        super::guard::faults::install(out.as_raw_fd())?;
    }
    Ok(out)
}
