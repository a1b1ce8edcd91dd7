//! The side of the program: it starts the child, and asks it.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bitnet_burn_plugin::abi::{ACTIVATION_SLACK, MAX_WEIGHT_ALIGNMENT, SCALE_F16, Signature};
use bitnet_burn_plugin::sdk;

use super::call::{
    Asked, CLAIMS, Control, DESCRIBE, MOST_INPUTS, MOST_OUTPUTS, MULTIPLY, OUTPUTS, PACK, PACKED_BYTES,
    PartOf, Request, Rows, UNPACK, WHY_NOT,
};
use super::process::Process;
use super::{Held, MAX_PARTS};
use crate::cpu;
use crate::gate::{CHILD_COMMAND, keep_secrets};
use crate::manager::{Few, Part};
use crate::memory::{Activations, PageArena, SharedFile, Space};
use crate::plugin::{Described, Kernel, KernelFailure, check_packed_size};

/// How long a call is watched before the caller sleeps: if there is a core for that beside those of the child's threads, and
/// if not. It yields to other threads meanwhile.
const WATCH: [Duration; 2] = [Duration::from_millis(1), Duration::from_micros(20)];
/// How often a caller that sleeps looks whether the child is still there.
const LOOK: Duration = Duration::from_millis(20);
/// What a slow kernel takes for one multiplication. It is counted to the time that a call may take.
const WORK: Duration = Duration::from_nanos(4);
/// Bytes for the plugin's descriptor.
const DESCRIPTION: usize = 16 << 20;
/// Bytes of buffers that are kept from call to call.
const KEPT: usize = 64 << 20;
/// How often the child may be started in all, to give back weights.
const STARTS: u32 = 8;

/// A plugin in a process of its own, as the program sees it.
pub(crate) struct Contained {
    outputs: SharedFile,
    inputs: Arc<SharedFile>,
    arena: PageArena,
    described: Described,
    state: Mutex<State>,
    helper: PathBuf,
    arguments: [std::ffi::OsString; 4],
    name: String,
    patience: Duration,
    watch: Duration,
}

#[derive(Default)]
struct State {
    process: Option<Process>,
    /// Number of the last answer.
    turn: u32,
    starts: u32,
    /// What it did. It is not asked any more.
    fault: Option<String>,
}

impl std::fmt::Debug for Contained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contained").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Contained {
    /// Starts a child that loads a library.
    ///
    /// # Errors
    /// If it can't be started, not be confined, or the library can't be loaded: why.
    pub fn start(held: Held) -> Result<Arc<Self>, String> {
        let shared = |error: std::io::Error| format!("there is no memory to share with its process: {error}");
        let most = MOST_INPUTS + (64 << 30) + 2 * memory();
        let inputs = Arc::new(SharedFile::new(c"bitnet-inputs", most, most).map_err(shared)?);
        let outputs = SharedFile::new(c"bitnet-outputs", OUTPUTS + DESCRIPTION, OUTPUTS + MOST_OUTPUTS);
        let space = Arc::new(Space::new(inputs.clone(), MOST_INPUTS));
        let role = format!("hold:{}:{}:{}", held.threads, u8::from(held.pin), std::process::id());
        let mut contained = Self {
            outputs: outputs.map_err(shared)?,
            inputs,
            arena: PageArena::of(space),
            described: Described::default(),
            state: Mutex::default(),
            helper: held.helper.to_owned(),
            arguments: [held.library.into(), held.origin.into(), held.configuration.into(), role.into()],
            name: held.origin.file_name().map_or("plugin".into(), |name| name.to_string_lossy().into_owned()),
            patience: held.patience,
            watch: WATCH[usize::from(held.threads >= cpu::physical_cores())],
        };
        let mut state = State::default();
        contained.described = contained.begin(&mut state)?;
        contained.state = Mutex::new(state);
        Ok(Arc::new(contained))
    }

    /// Starts a child and asks what it holds.
    fn begin(&self, state: &mut State) -> Result<Described, String> {
        let start = |error: std::io::Error| format!("its process can't be started: {error}");
        self.control().restart(&Request { what: DESCRIBE, ..Request::default() });
        let mut command = Command::new(&self.helper);
        command.arg(CHILD_COMMAND).args(&self.arguments);
        // The two files are all that it gets. What the user types into a terminal, and Ctrl-C, are not for it.
        command
            .stdin(self.outputs.writable().map_err(start)?)
            .stdout(self.inputs.read_only().map_err(start)?);
        command.stderr(Stdio::piped());
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        keep_secrets(&mut command);
        *state = State {
            process: Some(Process::start(command, self.name.clone()).map_err(start)?),
            turn: 0,
            starts: state.starts + 1,
            fault: None,
        };
        self.wait(state, 2, self.patience)?;
        if let Some(failure) = self.control().failure(0) {
            return Err(failure.to_string());
        }
        let length = usize::try_from(self.control().value()).unwrap_or(usize::MAX);
        if length > DESCRIPTION {
            return Err("its descriptor is too long".into());
        }
        let mut text = vec![0u8; length];
        // SAFETY: within the part of the file that exists; the bytes are copied, whatever they are.
        unsafe { self.output().copy_to_nonoverlapping(text.as_mut_ptr(), length) };
        serde_json::from_slice(&text).map_err(|error| format!("its descriptor can't be read: {error}"))
    }

    /// The plugin's descriptor.
    pub fn described(&self) -> &Described {
        &self.described
    }

    /// Memory that its process can read.
    pub fn arena(&self) -> &PageArena {
        &self.arena
    }

    fn control(&self) -> &Control {
        // SAFETY: the beginning of our file, which lives as long as `self`.
        unsafe { Control::at(self.outputs.base()) }
    }

    fn output(&self) -> *mut u8 {
        self.outputs.base().wrapping_add(OUTPUTS)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits for an answer.
    ///
    /// # Errors
    /// If the child ends first, or does not answer in time: it is ended then.
    fn wait(&self, state: &mut State, turn: u32, patience: Duration) -> Result<(), String> {
        let control = self.control();
        let Some(process) = &state.process else { return Err("it was not started".into()) };
        let started = Instant::now();
        let mut spins = 0u32;
        let reason = loop {
            if control.turn() == turn {
                state.turn = turn;
                return Ok(());
            }
            spins = spins.wrapping_add(1);
            if !spins.is_multiple_of(64) {
                std::hint::spin_loop();
                continue;
            }
            let (ended, waited) = (process.ended(), started.elapsed());
            if ended || waited >= patience {
                // This process may have been the one that slept.
                if control.turn() == turn {
                    continue;
                }
                break match ended {
                    true => process.how(),
                    false => format!("it hangs: this took more than {:.0} s", patience.as_secs_f64()),
                };
            }
            match waited < self.watch {
                true => std::thread::yield_now(),
                false => control.host_sleeps(turn.wrapping_sub(1), LOOK.min(patience - waited)),
            }
        };
        process.end();
        state.fault = Some(reason.clone());
        Err(reason)
    }

    /// Asks the child, and waits for its answer.
    ///
    /// # Errors
    /// If it is a fault.
    fn exchange(&self, state: &mut State, request: &Request, work: u128) -> Result<(), KernelFailure> {
        if let Some(fault) = &state.fault {
            return Err(KernelFailure::Forbidden { reason: fault.clone() });
        }
        let work = WORK.as_nanos().saturating_mul(work).min(u128::from(u64::MAX / 2)) as u64;
        let turn = self.control().ask(state.turn, request);
        self.wait(state, turn, self.patience.saturating_add(Duration::from_nanos(work)))
            .map_err(|reason| KernelFailure::Forbidden { reason })
    }

    /// A call without buffers; the number in the answer.
    fn ask(&self, what: u64, kernel: &Kernel, signature: &Signature) -> Result<u64, KernelFailure> {
        let mut state = self.lock();
        let request =
            Request { what, kernel: kernel.number(), asked: Asked::from(signature), ..Request::default() };
        self.exchange(&mut state, &request, 0)?;
        self.control().failure(0).map_or_else(|| Ok(self.control().value()), Err)
    }

    /// Whether a kernel claims to compute this.
    ///
    /// # Errors
    /// If it did something forbidden.
    pub fn claims(&self, kernel: &Kernel, signature: &Signature) -> Result<bool, KernelFailure> {
        Ok(self.ask(CLAIMS, kernel, signature)? == 1)
    }

    /// Why it does not, in its own words.
    pub fn why_not(&self, kernel: &Kernel, signature: &Signature) -> Option<String> {
        match self.ask(WHY_NOT, kernel, signature) {
            Err(KernelFailure::Status { message, .. }) if !message.is_empty() => Some(message),
            _ => None,
        }
    }

    /// Bytes of its packing, if it can pack the shape.
    ///
    /// # Errors
    /// If the size is impossible, or it did something forbidden.
    pub fn packed_bytes(
        &self,
        kernel: &Kernel,
        (n, k): (usize, usize),
    ) -> Result<Option<usize>, KernelFailure> {
        let size = self.ask(PACKED_BYTES, kernel, &Signature::ternary(1, n as u64, k as u64, 1))?;
        check_packed_size(n, k, size)
    }

    /// Packs canonical weights.
    ///
    /// # Errors
    /// If the kernel fails.
    pub fn pack(
        &self,
        kernel: &Kernel,
        shape: (usize, usize),
        canonical: &[u8],
        packed: &mut [u8],
    ) -> Result<(), KernelFailure> {
        self.convert(&mut self.lock(), PACK, kernel, shape, canonical, packed)
    }

    /// The canonical form of packed weights. A child that has ended is started again for it: weights must come back.
    ///
    /// # Errors
    /// If the kernel fails.
    pub fn unpack(
        &self,
        kernel: &Kernel,
        shape: (usize, usize),
        packed: &[u8],
        canonical: &mut [u8],
    ) -> Result<(), KernelFailure> {
        let mut state = self.lock();
        if state.fault.is_some() && state.starts < STARTS {
            match self.begin(&mut state) {
                Ok(described) if described == self.described => {}
                Ok(_) => state.fault = Some("its descriptor differs from the first one".into()),
                Err(reason) => state.fault = Some(reason),
            }
        }
        self.convert(&mut state, UNPACK, kernel, shape, packed, canonical)
    }

    fn convert(
        &self,
        state: &mut State,
        what: u64,
        kernel: &Kernel,
        (n, k): (usize, usize),
        from: &[u8],
        to: &mut [u8],
    ) -> Result<(), KernelFailure> {
        let mut stage = Stage::new(&self.inputs);
        let request = Request {
            what,
            kernel: kernel.number(),
            asked: Asked { n: n as u64, k: k as u64, ..Asked::default() },
            weights: stage.weights(from)?,
            bytes: from.len() as u64,
            ..Request::default()
        };
        self.grow(to.len())?;
        self.exchange(state, &request, n as u128 * k as u128)?;
        if let Some(failure) = self.control().failure(0) {
            return Err(failure);
        }
        // SAFETY: the file has grown to this size, and the bytes are copied, whatever they are.
        unsafe { self.output().copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
        self.tidy(&stage, to.len());
        Ok(())
    }

    /// Multiplies: columns of `y`, whose rows are `stride` apart, become the products of activations and the matrices of the
    /// parts. Why one was not computed.
    pub fn multiply(
        &self,
        parts: &[Part],
        x: &Activations,
        y: &mut [f32],
        stride: usize,
    ) -> Few<Option<KernelFailure>> {
        let mut failures = Few::new();
        for parts in parts.chunks(MAX_PARTS) {
            match self.multiply_together(parts, x, y, stride) {
                Ok(some) => failures.extend(some),
                Err(failure) => failures.extend(parts.iter().map(|_| Some(failure.clone()))),
            }
        }
        failures
    }

    fn multiply_together(
        &self,
        parts: &[Part],
        x: &Activations,
        y: &mut [f32],
        stride: usize,
    ) -> Result<Few<Option<KernelFailure>>, KernelFailure> {
        let mut state = self.lock();
        let mut stage = Stage::new(&self.inputs);
        let m = x.m();
        let rows = Rows {
            m: m as u64,
            k: x.k() as u64,
            stride: x.stride() as u64,
            group: x.group() as u64,
            q: stage.put(x.bytes(), ACTIVATION_SLACK)?,
            scale: stage.put(bytes_of(x.scale()), 0)?,
            sum: stage.put(bytes_of(x.sum()), 0)?,
        };
        let columns: usize = parts.iter().map(|part| part.of.n).sum();
        let mut request = Request {
            what: MULTIPLY,
            x: rows,
            parts: parts.len() as u64,
            stride: columns as u64,
            ..Request::default()
        };
        let (mut column, mut work) = (0, 0u128);
        for (part, place) in parts.iter().zip(&mut request.part) {
            let weights = &part.weights;
            // SAFETY: filled weights, whose bytes and scales live during the call (the caller's promise, as for any kernel).
            let data = unsafe { std::slice::from_raw_parts(weights.data, weights.size as usize) };
            let scales = match weights.scales.is_null() {
                true => 0,
                false => {
                    let count = sdk::scale_count(part.of.n, part.of.k, weights.group as usize);
                    let size = if weights.scale_format == SCALE_F16 { 2 } else { 4 };
                    let bytes = count.unwrap_or(0) * size;
                    // SAFETY: as above: as many scales as the shape and the groups have.
                    stage.put(unsafe { std::slice::from_raw_parts(weights.scales, bytes) }, 0)?
                }
            };
            *place = PartOf {
                kernel: part.kernel.number(),
                asked: Asked::from(&part.of.signature(m, 0)),
                weights: match self.place_of(data) {
                    Some(place) => place,
                    None => stage.weights(data)?,
                },
                bytes: data.len() as u64,
                scale: u64::from(weights.scale.to_bits()),
                scales,
                group: weights.group,
                column: column as u64,
            };
            column += part.of.n;
            work += part.of.n as u128 * part.of.k as u128 * m as u128;
        }
        let outputs = m.checked_mul(columns).and_then(|outputs| outputs.checked_mul(4)).unwrap_or(usize::MAX);
        self.grow(outputs)?;
        self.exchange(&mut state, &request, work)?;
        let mut failures = Few::new();
        let mut column = 0;
        for (i, part) in parts.iter().enumerate() {
            let failure = self.control().failure(i);
            for row in 0..if failure.is_none() { m } else { 0 } {
                let from = self.output().wrapping_add((row * columns + column) * 4);
                let to = &mut y[row * stride + part.column..][..part.of.n];
                // SAFETY: within what the file has grown to; all bits are floats.
                unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr().cast(), 4 * to.len()) };
            }
            failures.push(failure);
            column += part.of.n;
        }
        self.tidy(&stage, outputs);
        Ok(failures)
    }

    /// Where bytes are that lie in memory that the child reads.
    fn place_of(&self, bytes: &[u8]) -> Option<u64> {
        let place = (bytes.as_ptr() as usize).checked_sub(self.inputs.base() as usize)?;
        let end = place.checked_add(bytes.len())?;
        (place >= MOST_INPUTS && end <= self.inputs.most()).then_some(place as u64)
    }

    fn grow(&self, outputs: usize) -> Result<(), KernelFailure> {
        self.outputs.grow(OUTPUTS.saturating_add(outputs)).map_err(|error| too_much(&error))
    }

    /// Gives large buffers back.
    fn tidy(&self, stage: &Stage, outputs: usize) {
        if stage.used > KEPT {
            self.inputs.release(KEPT..stage.used);
        }
        if outputs > KEPT {
            self.outputs.release(OUTPUTS + KEPT..OUTPUTS + outputs);
        }
    }
}

/// The inputs of one call, one behind the other.
struct Stage<'a> {
    file: &'a SharedFile,
    used: usize,
}

impl<'a> Stage<'a> {
    fn new(file: &'a SharedFile) -> Self {
        Self { file, used: 0 }
    }

    /// Copies bytes, with room behind them that may be read; where they are.
    fn put(&mut self, bytes: &[u8], slack: usize) -> Result<u64, KernelFailure> {
        let place = self.used.next_multiple_of(64);
        let end = place.saturating_add(bytes.len()).saturating_add(slack);
        if end > MOST_INPUTS {
            return Err(too_much(&format!("{end} bytes")));
        }
        // SAFETY: within the part of the file that is for this, which the child does not read before it is asked.
        unsafe { self.file.base().add(place).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        self.used = end;
        Ok(place as u64)
    }

    /// The same for weights.
    fn weights(&mut self, bytes: &[u8]) -> Result<u64, KernelFailure> {
        self.used = self.used.next_multiple_of(MAX_WEIGHT_ALIGNMENT as usize);
        self.put(bytes, 0)
    }
}

/// Another kernel computes what is too large for this.
fn too_much(what: &dyn std::fmt::Display) -> KernelFailure {
    let message = format!("the operands are too large for a contained plugin ({what})");
    KernelFailure::Status { status: bitnet_burn_plugin::abi::STATUS_UNSUPPORTED, message }
}

fn bytes_of<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: numbers without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Bytes of memory that the machine has.
fn memory() -> usize {
    // SAFETY: asks the system for numbers.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    usize::try_from(pages).unwrap_or(0).saturating_mul(usize::try_from(page).unwrap_or(4096))
}
