//! The child's side of the gate.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use super::environment;
use super::{Event, GATE_VERSION, GPU_FOLLOWS, NO_GPU_RUNTIME, cases, declared, gpu, host_abi};
use crate::cpu;
use crate::gpu::GpuDevice;
use crate::plugin::{Kernel, LogLevel, Plugin, Target, log_to};
use crate::pool::Pool;
use crate::process::take_stdout;

/// Threads that compute at once.
const THREADS: usize = 4;

/// The helper's side of the gate's first stage: `arguments` are those behind
/// [`CHILD_COMMAND`](super::CHILD_COMMAND). Loads and tries the plugin, and reports on stdout. Nothing
/// else may run in this process: the plugin may end it at any time.
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
/// Returns the status for the process to end with: 0 if the plugin passed, 1 if not, 2 if the arguments
/// or the system are at fault.
///
/// Kernels for GPUs are not tried, and not used: [`child_with_gpu`] tries them.
pub fn child(arguments: impl Iterator<Item = OsString>) -> i32 {
    child_with_gpu(arguments, &|| Err(NO_GPU_RUNTIME.into()))
}

/// [`child`], with a GPU to try kernels on that are GPU source. `open` is called if there are such kernels, after those
/// for the CPU; its error says why there is no GPU.
pub fn child_with_gpu(
    mut arguments: impl Iterator<Item = OsString>,
    open: &dyn Fn() -> Result<Box<dyn GpuDevice>, String>,
) -> i32 {
    let (Some(library), Some(origin), Some(configuration), None) =
        (arguments.next(), arguments.next(), arguments.next(), arguments.next())
    else {
        eprintln!("the gate's helper takes a library, the name to call it by, and a configuration for it");
        return 2;
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
    log_to(move |level, text| {
        let level = match level {
            LogLevel::Error => "error",
            LogLevel::Warning => "warning",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
        };
        log.say(&Event::Log { line: format!("{level}: {text}") });
    });
    let configuration = configuration.to_string_lossy();
    match try_plugin(library.into(), origin.into(), &configuration, open, &out) {
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

fn try_plugin(
    library: PathBuf,
    origin: PathBuf,
    configuration: &str,
    open: &dyn Fn() -> Result<Box<dyn GpuDevice>, String>,
    out: &Reporter,
) -> Result<(), String> {
    let pool = Pool::new(THREADS).map_err(|error| format!("the gate has no threads: {error}"))?;
    let threads = environment::threads();
    out.say(&Event::Trying { what: "loading it".into() });
    let plugin = Plugin::load_as(&library, &origin, configuration).map_err(|error| {
        // Its source says what the loader said; and the parent names the file itself.
        let text = error.to_string();
        text.strip_prefix(&format!("plugin {}: ", origin.display())).map(str::to_owned).unwrap_or(text)
    })?;
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
            let reason = reason.clone();
            out.say(&Event::Unavailable { kernel: kernel.id().into(), declared: declared(kernel), reason });
        }
        unknown.is_none()
    });
    let (for_cpu, others): (Vec<Kernel>, Vec<Kernel>) =
        kernels.into_iter().partition(|kernel| kernel.target() == Target::Cpu);
    for kernel in for_cpu {
        let id = kernel.id();
        if let Some(missing) = cpu::lacking(kernel.features(), &[]) {
            out.say(&Event::Unavailable { kernel: id.into(), declared: declared(&kernel), reason: missing });
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
    // A driver starts threads: from here on, new threads are not counted against the plugin.
    out.say(&Event::Trying { what: "opening the GPU".into() });
    eprint!("{GPU_FOLLOWS}");
    let device = open();
    let words = device.as_ref().map_or_else(Clone::clone, |device| device.name());
    out.say(&Event::Gpu { words });
    for kernel in others {
        let id = kernel.id();
        let device = match &device {
            Ok(device) if device.target() == kernel.target() => device,
            Ok(device) => {
                let reason =
                    format!("it is for {}, and {} takes {}", kernel.target(), device.name(), device.target());
                out.say(&Event::Unavailable { kernel: id.into(), declared: declared(&kernel), reason });
                continue;
            }
            Err(reason) => {
                let reason = format!("it is for {}, and {reason}", kernel.target());
                out.say(&Event::Unavailable { kernel: id.into(), declared: declared(&kernel), reason });
                continue;
            }
        };
        if let Some(missing) = device.lacking(&kernel) {
            out.say(&Event::Unavailable { kernel: id.into(), declared: declared(&kernel), reason: missing });
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
}

/// Takes stdout away from the plugin, and makes this process end quietly when it has to.
fn own_output() -> std::io::Result<File> {
    let out = take_stdout()?;
    #[cfg(unix)]
    {
        use std::os::fd::AsRawFd as _;

        let check = |result: libc::c_int| match result {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        };
        // SAFETY: system calls that concern this process alone.
        unsafe {
            // No core dumps: crashing is what this process is for.
            let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            check(libc::setrlimit(libc::RLIMIT_CORE, &raw const limit))?;
            // Ends with the parent.
            #[cfg(target_os = "linux")]
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        }
        super::guard::faults::install(out.as_raw_fd())?;
    }
    Ok(out)
}
