//! The side of the child: it confines itself, loads the library, and does what it is asked.

use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bitnet_burn_plugin::abi::{self, SCALE_F16, SCALE_F32, STATUS_FAILED};
use memmap2::{MmapOptions, MmapRaw};

use super::MAX_PARTS;
use super::call::{
    CLAIMS, Control, DESCRIBE, MOST_OUTPUTS, MULTIPLY, OUTPUTS, PACK, PACKED_BYTES, Request, UNPACK, WHY_NOT,
};
use crate::manager::{Few, Part, Scratch, SharedBytes, abi_weights, by_granules, run_here};
use crate::plugin::{Kernel, KernelFailure, Plugin, log_to};
use crate::pool::Pool;
use crate::process::keep_alone;
use crate::sandbox::Confined;

/// How long it watches for a call before it sleeps.
const WATCH: Duration = Duration::from_micros(100);
/// The stack of the thread that serves, which computes, too.
const STACK: usize = 8 << 20;

/// Holds a plugin until the parent ends, or the plugin does. `role` is what the parent says:
/// `hold:THREADS:PINNED:PARENT`. Returns the status for the process to end with.
pub(crate) fn hold(library: &Path, origin: &Path, configuration: &str, role: &str) -> i32 {
    let numbers: Option<Vec<usize>> = role
        .strip_prefix("hold:")
        .and_then(|role| role.split(':').map(|number| number.parse().ok()).collect());
    let Some([threads, pin, parent]) = numbers.as_deref() else {
        eprintln!("the gate's helper knows no role {role:?}");
        return 2;
    };
    let shared = match Shared::take(*parent) {
        Ok(shared) => shared,
        Err(error) => {
            eprintln!("the process of a contained plugin can't set itself up: {error}");
            return 2;
        }
    };
    log_to(|level, text| eprintln!("{level}: {text}"));
    let confined = match Confined::new(library) {
        Ok(confined) => confined,
        Err(reason) => return shared.refuse(format!("it can't be confined: {reason}")),
    };
    // Threads that are started from here on are confined as this one is.
    let serve = || match load(library, origin, configuration, confined) {
        Ok(plugin) => match if *pin == 1 { Pool::pinned(*threads) } else { Pool::new(*threads) } {
            Ok(pool) => shared.serve(plugin, &pool),
            Err(error) => shared.refuse(format!("its threads can't be started: {error}")),
        },
        Err(reason) => shared.refuse(reason),
    };
    std::thread::scope(|scope| {
        match std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, serve) {
            Ok(thread) => thread.join().unwrap_or(101),
            Err(error) => shared.refuse(format!("it has no thread: {error}")),
        }
    })
}

fn load(
    library: &Path,
    origin: &Path,
    configuration: &str,
    mut confined: Confined,
) -> Result<Plugin, String> {
    let plugin = Plugin::load_as(library, origin, configuration).map_err(|error| error.to_string())?;
    confined.loaded()?;
    Ok(plugin)
}

/// What is shared with the parent.
struct Shared {
    inputs: MmapRaw,
    outputs: MmapRaw,
}

impl Shared {
    /// Maps the files that are stdin and stdout, and puts stderr in their places.
    fn take(parent: usize) -> std::io::Result<Self> {
        // SAFETY: descriptors that the parent has opened; they are not closed here.
        let [outputs, inputs] =
            [0, 1].map(|descriptor| ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(descriptor) }));
        let most = usize::try_from(inputs.metadata()?.len()).map_err(std::io::Error::other)?;
        let shared = Self {
            outputs: MmapOptions::new().len(OUTPUTS + MOST_OUTPUTS).no_reserve_swap().map_raw(&*outputs)?,
            inputs: MmapOptions::new().len(most).no_reserve_swap().map_raw_read_only(&*inputs)?,
        };
        for descriptor in [0, 1] {
            // SAFETY: descriptors of this process.
            if unsafe { libc::dup2(libc::STDERR_FILENO, descriptor) } == -1 {
                return Err(std::io::Error::last_os_error());
            }
        }
        keep_alone(None)?;
        // SAFETY: asks for a number.
        if usize::try_from(unsafe { libc::getppid() }).ok() != Some(parent) {
            return Err(std::io::Error::other("the parent has ended"));
        }
        Ok(shared)
    }

    fn control(&self) -> &Control {
        // SAFETY: the beginning of the file, which stays mapped.
        unsafe { Control::at(self.outputs.as_mut_ptr()) }
    }

    fn output(&self) -> *mut u8 {
        self.outputs.as_mut_ptr().wrapping_add(OUTPUTS)
    }

    fn input(&self, place: u64) -> *const u8 {
        self.inputs.as_ptr().wrapping_add(place as usize)
    }

    /// # Safety
    /// The parent wrote as many bytes there, and leaves them as they are during the call.
    unsafe fn input_bytes(&self, place: u64, bytes: u64) -> &[u8] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.input(place), bytes as usize) }
    }

    /// Answers the first question with the reason why there is no plugin.
    fn refuse(&self, reason: String) -> i32 {
        self.control().answer(1, 0, &[Some(failed(reason))]);
        1
    }

    /// Does what the parent asks, for as long as the process lives.
    fn serve(&self, plugin: Plugin, pool: &Pool) -> i32 {
        let description = serde_json::to_vec(&plugin.describe()).expect("plain data");
        let kernels = Arc::new(plugin).kernels();
        let scratch = Scratch::default();
        let mut turn = 1;
        loop {
            self.await_turn(turn);
            let request = self.control().request();
            let (value, failures) = match request.what {
                DESCRIBE => {
                    // SAFETY: the parent has made room; what is longer it does not read.
                    unsafe {
                        self.output()
                            .copy_from_nonoverlapping(description.as_ptr(), description.len().min(16 << 20))
                    };
                    (description.len() as u64, Few::from_iter([None]))
                }
                MULTIPLY => (0, self.multiply(&kernels, pool, &scratch, &request)),
                _ => match self.ask(&kernels, pool, &request) {
                    Ok(value) => (value, Few::from_iter([None])),
                    Err(failure) => (0, Few::from_iter([Some(failure)])),
                },
            };
            self.control().answer(turn, value, &failures);
            turn = turn.wrapping_add(2);
        }
    }

    fn await_turn(&self, turn: u32) {
        let control = self.control();
        let mut since = Instant::now();
        let mut spins = 0u32;
        while control.turn() != turn {
            std::hint::spin_loop();
            spins = spins.wrapping_add(1);
            if !spins.is_multiple_of(64) {
                continue;
            }
            if since.elapsed() > WATCH {
                control.child_sleeps(turn.wrapping_sub(1));
                since = Instant::now();
            }
            // The caller may be on the same core.
            std::thread::yield_now();
        }
    }

    /// Everything but a multiplication.
    fn ask(&self, kernels: &[Kernel], pool: &Pool, request: &Request) -> Result<u64, KernelFailure> {
        let kernel = kernel_of(kernels, request.kernel)?;
        let (n, k) = (request.asked.n as usize, request.asked.k as usize);
        match request.what {
            CLAIMS => kernel.claims(&request.asked.signature()).map(u64::from),
            WHY_NOT => match kernel.why_not(&request.asked.signature()) {
                Some(message) => Err(KernelFailure::Status { status: 0, message }),
                None => Ok(0),
            },
            PACKED_BYTES => Ok(kernel.packed_bytes(n, k)?.unwrap_or(0) as u64),
            PACK | UNPACK => {
                // SAFETY: the parent wrote the weights there.
                let weights =
                    abi_weights(n, k, 1.0, unsafe { self.input_bytes(request.weights, request.bytes) });
                let out = SharedBytes(self.output());
                by_granules(kernel, pool, n, &|rows| {
                    // SAFETY: the parent has made room for all rows, and the ranges are disjoint and begin at granules. The
                    // beginning of the outputs is aligned to pages.
                    unsafe {
                        match request.what {
                            PACK => kernel.pack(&weights, out.pointer(), rows),
                            _ => kernel.unpack(&weights, out.pointer(), rows),
                        }
                    }
                })?;
                Ok(0)
            }
            what => Err(failed(format!("the process knows no call {what}"))),
        }
    }

    fn multiply(
        &self,
        kernels: &[Kernel],
        pool: &Pool,
        scratch: &Scratch,
        request: &Request,
    ) -> Few<Option<KernelFailure>> {
        let mut parts: Few<Part> = Few::new();
        for part in &request.part[..(request.parts as usize).min(MAX_PARTS)] {
            let kernel = match kernel_of(kernels, part.kernel) {
                Ok(kernel) => kernel,
                Err(failure) => return request.part.iter().map(|_| Some(failure.clone())).collect(),
            };
            let (n, k) = (part.asked.n as usize, part.asked.k as usize);
            // SAFETY: the parent wrote the weights there.
            let data = unsafe { self.input_bytes(part.weights, part.bytes) };
            let scale = f32::from_bits(part.scale as u32);
            let mut weights = abi_weights(n, k, scale, data);
            if part.scales != 0 {
                weights.scale_format =
                    if part.asked.scale_format as u32 == SCALE_F16 { SCALE_F16 } else { SCALE_F32 };
                weights.group = part.group;
                weights.scales = self.input(part.scales);
            }
            parts.push(Part { kernel, of: part.asked.shape(), weights, column: part.column as usize });
        }
        let x = &request.x;
        let (scale, sum) = (self.input(x.scale).cast(), self.input(x.sum).cast());
        let x = abi::Activations {
            struct_size: size_of::<abi::Activations>() as u64,
            m: x.m,
            k: x.k,
            stride: x.stride,
            q: self.input(x.q).cast(),
            scale,
            sum,
            group: x.group,
            group_scale: scale,
            group_sum: sum,
        };
        // SAFETY: activations that the parent wrote, and outputs for which it made room: all columns of all rows.
        unsafe { run_here(pool, scratch, &parts, &x, (self.output().cast(), request.stride as usize)) }
    }
}

fn kernel_of(kernels: &[Kernel], number: u64) -> Result<&Kernel, KernelFailure> {
    let kernel = usize::try_from(number).ok().and_then(|number| kernels.get(number));
    kernel.ok_or_else(|| failed(format!("the plugin has no kernel {number}")))
}

fn failed(message: String) -> KernelFailure {
    KernelFailure::Status { status: STATUS_FAILED, message }
}
