//! The gate: what a plugin from a file must pass before it may compute for anybody.
//!
//! No finite test proves a kernel right, so there are three stages:
//!
//! 1. Before use: many cases (random and adversarial inputs over many shapes, every buffer between
//!    guard pages, several tilings, several threads), compared bit for bit with the reference, **in a
//!    child process**: a crash, a hang or a stray write ends the child, and the plugin is refused. The
//!    child is a helper program that calls [`child`]: `bitnet` itself, `bitnet-gate` of this package, or
//!    one of the embedder's own; never the embedding program. The verdict is kept
//!    ([`PluginStore`](crate::store::PluginStore)).
//! 2. In use, the first result for every exact (M, N, K), and for every matrix, is compared with a built-in kernel's, and the
//!    built-in kernel's is returned.
//! 3. After that, one call in many is compared with the reference in random places.
//!
//! Kernels that are GPU source go through the same stages, where the helper has a GPU
//! ([`child_with_gpu`]): a text can hang a device or, since it is compiled without bounds checks, crash a driver
//! that runs in the process, too. A second child does that, which loads no library: a driver can't be confined.
//!
//! The second and third are the [manager](crate::KernelManager)'s. All three find mistakes, not malice. On Linux the child
//! is confined (`sandbox`) before it loads the library, so that a plugin that is only tried reaches nothing; what
//! passes is native code, and runs with the rights of the program, unless it is contained (`contained`).

mod cases;
mod child;
mod environment;
mod gpu;
mod guard;

use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, UNIX_EPOCH};

use bitnet_burn_formats::files;
use bitnet_burn_plugin::abi::{ABI_MAJOR, ABI_MINOR};
use serde::{Deserialize, Serialize};

pub(crate) use self::cases::{check_in_process, difference};
pub use self::child::{child, child_with_gpu};
pub(crate) use self::guard::{Place, Walled, Walls};
use crate::plugin::{Kernel, shared_statics, shown};
pub use crate::sandbox::Confinement;

/// Changes with what the gate looks at. Verdicts of another version are ignored.
pub const GATE_VERSION: u32 = 6;

/// First argument of the helper program, before the library, the name that messages call it by, the configuration, and
/// what the child is for, if that is not to try the plugin.
pub const CHILD_COMMAND: &str = "gate-child";

/// What a child is for: to try the kernels that are GPU source.
const FOR_GPU: &str = "gpu";

/// Why a helper without a GPU runtime did not try a kernel for one.
pub(crate) const NO_GPU_RUNTIME: &str = "the gate's helper has no GPU runtime";

/// The line on stderr behind which a GPU's driver may print, too.
const GPU_FOLLOWS: &str = "the gate opens the GPU\n";

/// The whole gate may take this many times as long as one case.
const WHOLE: u32 = 12;

/// What the child says, one JSON object a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    /// The first line.
    Hello { gate: u32, abi: String },
    /// What it is confined by, before it loads the library.
    Confined { confinement: Confinement },
    /// What comes next, before it is tried.
    Trying { what: String },
    /// The descriptor is valid.
    Plugin { name: String, version: String, abi: String },
    /// What the plugin writes to the host's log.
    Log { line: String },
    /// All cases of a kernel went well.
    Kernel {
        kernel: String,
        declared: String,
        cases: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        device: Option<String>,
    },
    /// The kernels for GPUs are for another child.
    GpuFollows,
    /// The GPU that the others are tried on, or why there is none.
    Gpu { words: String },
    /// A kernel that this machine, or this helper, can't run.
    Unavailable { kernel: String, declared: String, reason: String },
    /// What was tried went wrong.
    Wrong { reason: String },
    /// Where the access was that will now end the process.
    Fault { what: String },
    /// All went well.
    Done,
}

/// What the gate found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`GATE_VERSION`] of the gate that looked.
    pub gate: u32,
    /// ABI of the host.
    pub abi: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// Where the file was.
    pub file: PathBuf,
    /// Name, version and ABI of the plugin, once its descriptor was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugin: Option<Description>,
    /// If it has kernels for GPUs: the one that they were to be tried on, or why there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
    /// The program that tried it: path, size and time of modification.
    pub helper: String,
    /// What that process was confined by when it loaded the library.
    #[serde(default)]
    pub confinement: Confinement,
    /// Kernels that were tried, or can't be on this machine.
    pub kernels: Vec<KernelResult>,
    /// Why the plugin is refused; `None` if it passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Refusal>,
    /// What is no reason to refuse the plugin, and its author should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// What it wrote to the host's log: the first [`MAX_LOG`] lines.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

/// Lines of a plugin's log that a [`Report`] keeps.
pub const MAX_LOG: usize = 64;

impl Report {
    /// Whether a kernel was tried on this machine, and all that were tried are right. A plugin of which nothing could be
    /// tried is not refused, but it has not passed either.
    pub fn passed(&self) -> bool {
        self.refusal.is_none() && self.kernels.iter().any(|kernel| kernel.unavailable.is_none())
    }

    /// Whether kernels for GPUs were tried on another GPU than this one, or on none, where `helper` may have it.
    pub(crate) fn is_of_another_gpu(&self, gpu: &str, helper: Option<&Path>) -> bool {
        match self.gpu.as_deref() {
            None => false,
            Some(NO_GPU_RUNTIME) => helper.is_none_or(|helper| identity(helper) != self.helper),
            Some(tried) => tried != gpu,
        }
    }
}

/// What tells a helper from another one, and from its next build.
fn identity(helper: &Path) -> String {
    let known = std::fs::metadata(helper).and_then(|file| Ok((file.len(), file.modified()?)));
    let known = known.ok().and_then(|(bytes, at)| Some((bytes, at.duration_since(UNIX_EPOCH).ok()?)));
    let (bytes, at) = known.unwrap_or_default();
    format!("{} ({bytes} bytes, {} ms)", helper.display(), at.as_millis())
}

/// A plugin's descriptor, as reports show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Its version, as its author counts.
    pub version: String,
    /// ABI that it was built for.
    pub abi: String,
}

/// A kernel that did not fail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelResult {
    /// `plugin/kernel`.
    pub kernel: String,
    /// What the plugin declared of it. A kernel that is declared in another way is not the one that was tried.
    pub declared: String,
    /// Cases that went well.
    pub cases: u64,
    /// The GPU that it was tried on, if it is for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Why it was not tried on this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unavailable: Option<String>,
}

/// Why a plugin is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The stage that saw it.
    pub stage: Stage,
    /// What was being tried: the kernel and the case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trying: Option<String>,
    /// What went wrong.
    pub reason: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.trying {
            Some(trying) => write!(f, "{trying}: {}", self.reason),
            None => f.write_str(&self.reason),
        }
    }
}

/// The stages of the gate. See the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// In the child process, before use.
    Before,
    /// The first result for a shape.
    FirstUse,
    /// A sample of later results.
    InUse,
}

/// The gate could not be run: this says nothing about the plugin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GateError {
    /// The helper can't be started.
    #[error("the gate's helper program {} can't be started: {source}", helper.display())]
    Start {
        /// The program.
        helper: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The helper does not speak the gate's protocol, or another version of it.
    #[error("{} is no helper for gate version {GATE_VERSION} and ABI {ABI_MAJOR}.{ABI_MINOR}: {reason}", helper.display())]
    Protocol {
        /// The program.
        helper: PathBuf,
        /// What it said.
        reason: String,
    },
}

/// What a plugin declares of a kernel, as far as it is data: layout, target, features, alignment, granule, and the hash of
/// a GPU's text.
pub(crate) fn declared(kernel: &Kernel) -> String {
    let text = kernel.gpu().map_or(String::new(), |gpu| files::sha256(format!("{gpu:?}").as_ref()));
    format!(
        "{} {} [{}] aligned to {}, granule {} {text}",
        kernel.declared_layout().unwrap_or("canonical"),
        kernel.target(),
        kernel.features().join(","),
        kernel.weight_alignment(),
        kernel.row_granule(),
    )
    .trim_end()
    .to_owned()
}

/// The ABI of this host, as reports name it.
pub(crate) fn host_abi() -> String {
    format!("{ABI_MAJOR}.{ABI_MINOR}")
}

/// Runs the first stage of the gate on a library, in a process of its own.
///
/// # Arguments
/// * `helper`: a program that hands its arguments behind [`CHILD_COMMAND`] to [`child`]
/// * `library`: the file that will be loaded if it passes
/// * `origin`: the path that messages name
/// * `sha256`: the hash of the file
/// * `configuration`: what the user configured for plugins
/// * `patience`: how long one case may take; the whole may take twelve times as long
///
/// # Errors
/// If the helper could not be run. What the plugin does wrong is in the report.
pub(crate) fn examine(
    helper: &Path,
    library: &Path,
    origin: &Path,
    sha256: &str,
    configuration: &str,
    patience: Duration,
) -> Result<Report, GateError> {
    let started = Instant::now();
    let mut report = Report {
        gate: GATE_VERSION,
        abi: host_abi(),
        sha256: sha256.to_owned(),
        file: origin.to_owned(),
        plugin: None,
        gpu: None,
        helper: identity(helper),
        confinement: Confinement::default(),
        kernels: Vec::new(),
        refusal: None,
        warnings: std::fs::read(library).ok().and_then(|bytes| shared_statics(&bytes)).into_iter().collect(),
        log: Vec::new(),
        seconds: 0.0,
    };
    let mut converse = |role: Option<&str>| -> Result<bool, GateError> {
        let mut command = Command::new(helper);
        command.arg(CHILD_COMMAND).arg(library).arg(origin).arg(configuration).args(role);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if role.is_none() {
            keep_secrets(&mut command);
        }
        // A group of its own: what a plugin starts ends with it.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child =
            command.spawn().map_err(|source| GateError::Start { helper: helper.to_owned(), source })?;
        let mut conversation = Conversation::start(child, helper);
        report.refusal = conversation.listen(&mut report, started, patience)?;
        Ok(report.refusal.is_none() && conversation.gpu_follows)
    };
    if converse(None)? {
        converse(Some(FOR_GPU))?;
    }
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Keeps this process's environment from one that holds a plugin, but for what programs start with and log by.
pub(crate) fn keep_secrets(command: &mut Command) {
    if cfg!(unix) {
        command.env_clear();
        let kept = ["LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "RUST_LOG", "RUST_BACKTRACE", "NO_COLOR"];
        command.envs(kept.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    }
}

/// What arrives from the child.
enum Heard {
    Line(String),
    Closed,
}

/// The child, which does not outlive this value.
struct Conversation<'a> {
    child: Child,
    /// Whether its status was taken, and its number with it: from then on that may be another process's.
    reaped: bool,
    helper: &'a Path,
    heard: std::sync::mpsc::Receiver<Heard>,
    words: std::sync::mpsc::Receiver<Words>,
    /// It leaves kernels for GPUs to another child.
    gpu_follows: bool,
}

/// The last words on stderr, where stdout ends, too.
#[derive(Default)]
struct Words {
    /// The plugin's own: before a GPU was opened.
    plugin: String,
    all: String,
}

impl Drop for Conversation<'_> {
    fn drop(&mut self) {
        if !self.reaped {
            self.end_group();
            // It may have ended by itself.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl<'a> Conversation<'a> {
    fn start(mut child: Child, helper: &'a Path) -> Self {
        let (out, heard) = channel();
        let (err, words) = channel();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        // Threads of their own: a plugin that keeps a pipe open must not hold anybody up.
        std::thread::spawn(move || stdout.map(|pipe| lines(pipe, &out)));
        std::thread::spawn(move || stderr.map(|pipe| err.send(last_words(pipe))));
        Self { child, reaped: false, helper, heard, words, gpu_follows: false }
    }

    /// Listens until the child has ended, one way or another.
    fn listen(
        &mut self,
        report: &mut Report,
        started: Instant,
        patience: Duration,
    ) -> Result<Option<Refusal>, GateError> {
        let helper = self.helper;
        let protocol = |reason: String| GateError::Protocol { helper: helper.to_owned(), reason };
        let mut greeted = false;
        let (mut trying, mut fault, mut done) = (None, None, false);
        // Whatever arrives may be the plugin's words.
        let refuse = |trying: Option<String>, reason: String| {
            Ok(Some(Refusal {
                stage: Stage::Before,
                trying: trying.as_deref().map(shown),
                reason: shown(&reason),
            }))
        };
        loop {
            let left = (patience * WHOLE).saturating_sub(started.elapsed()).min(patience);
            match self.heard.recv_timeout(left) {
                Ok(Heard::Line(line)) => {
                    // What a plugin prints can't get here: the child has moved its output.
                    let Ok(event) = serde_json::from_str(&line) else {
                        if greeted {
                            continue;
                        }
                        let shown: String = line.chars().take(80).collect();
                        return Err(protocol(format!("it says {shown:?}")));
                    };
                    match event {
                        Event::Hello { gate, abi } if gate == GATE_VERSION && abi == host_abi() => {
                            greeted = true;
                        }
                        Event::Hello { gate, abi } => {
                            return Err(protocol(format!("it has gate version {gate} and ABI {abi}")));
                        }
                        // (A second child holds no plugin.)
                        Event::Confined { confinement } => report.confinement = confinement,
                        Event::Trying { what } => trying = Some(what),
                        Event::Plugin { name, version, abi } => {
                            let [name, version, abi] = [name, version, abi].map(|text| shown(&text));
                            report.plugin = Some(Description { name, version, abi });
                        }
                        Event::Log { line } => {
                            if report.log.len() < MAX_LOG {
                                report.log.push(shown(&line));
                            }
                        }
                        Event::GpuFollows => self.gpu_follows = true,
                        // As it is: it is compared with the device in use.
                        Event::Gpu { words } => report.gpu = Some(words),
                        Event::Kernel { kernel, declared, cases, device } => {
                            let (kernel, device) = (shown(&kernel), device.as_deref().map(shown));
                            let tried = KernelResult { kernel, declared, cases, device, unavailable: None };
                            report.kernels.push(tried);
                        }
                        Event::Unavailable { kernel, declared, reason } => {
                            let (kernel, unavailable) = (shown(&kernel), Some(shown(&reason)));
                            let untried =
                                KernelResult { kernel, declared, cases: 0, device: None, unavailable };
                            report.kernels.push(untried);
                        }
                        Event::Wrong { reason } => return refuse(trying, reason),
                        Event::Fault { what } => fault = Some(what),
                        Event::Done => done = true,
                    }
                }
                Ok(Heard::Closed) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if !greeted => {
                    return Err(protocol("it says nothing".into()));
                }
                Err(RecvTimeoutError::Timeout) => {
                    let whole = started.elapsed() >= patience * WHOLE;
                    let limit = if whole { patience * WHOLE } else { patience };
                    let what = if whole { "the whole gate" } else { "this" };
                    return refuse(
                        trying,
                        format!("it hangs: {what} took more than {} s", limit.as_secs_f64()),
                    );
                }
            }
        }
        let Some(status) = self.ended(patience) else {
            return refuse(trying, "it hangs: the process does not end".into());
        };
        if !greeted {
            return Err(protocol(format!("it ended with {status}{}", self.said())));
        }
        if done && status.success() {
            let printed = self.words().plugin;
            let warning = format!("it prints to stdout or stderr: {}", shown(&printed));
            if !printed.is_empty() && !report.warnings.contains(&warning) {
                report.warnings.push(warning);
            }
            return Ok(None);
        }
        let end = end_of(status, fault);
        refuse(
            if done { Some("the end of the process".into()) } else { trying },
            format!("{end}{}", self.said()),
        )
    }

    /// How the process ended, if it does within the time.
    fn ended(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        while !self.has_ended() {
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.end_group();
        self.reaped = true;
        self.child.wait().ok()
    }

    /// Whether the child has ended. Its number stays its own.
    #[cfg(unix)]
    fn has_ended(&mut self) -> bool {
        // SAFETY: an all-zero siginfo is valid, and the system fills it. P_PID with the number of a child of
        // ours that was not waited for.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
            libc::waitid(libc::P_PID, self.child.id() as libc::id_t, &raw mut info, flags) == 0
                && info.si_signo == libc::SIGCHLD
        }
    }

    #[cfg(not(unix))]
    fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Ends what the child has started, and the child.
    fn end_group(&mut self) {
        #[cfg(unix)]
        if let Ok(group) = libc::pid_t::try_from(self.child.id()) {
            // SAFETY: a signal to the group that this child leads (`process_group(0)`). It was not reaped, so
            // the number is still its own.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
    }

    /// What it left on stderr.
    fn words(&self) -> Words {
        self.words.recv_timeout(Duration::from_millis(500)).unwrap_or_default()
    }

    /// The same for a message.
    fn said(&self) -> String {
        match self.words().all {
            words if words.is_empty() => words,
            words => format!("; it said: {words}"),
        }
    }
}

/// Hands lines on, each cut at a length that no event of ours has.
fn lines(pipe: impl Read, out: &Sender<Heard>) {
    let mut reader = BufReader::new(pipe);
    loop {
        let mut line = Vec::new();
        match reader.by_ref().take(1 << 16).read_until(b'\n', &mut line) {
            Ok(count) if count > 0 => {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if out.send(Heard::Line(line)).is_err() {
                    return;
                }
            }
            _ => break,
        }
    }
    // The listener may be gone.
    let _ = out.send(Heard::Closed);
}

/// The last words of a pipe.
fn last_words(mut pipe: impl Read) -> Words {
    let (mut tail, mut plugin, mut chunk) = (Vec::new(), None, [0; 4096]);
    while let Ok(count) = pipe.read(&mut chunk) {
        if count == 0 {
            break;
        }
        tail.extend_from_slice(&chunk[..count]);
        let marker = GPU_FOLLOWS.as_bytes();
        if let Some(at) = tail.windows(marker.len()).position(|part| part == marker) {
            plugin.get_or_insert_with(|| last_lines(&tail[..at]));
            tail.drain(at..at + marker.len());
        }
        let excess = tail.len().saturating_sub(2048);
        tail.drain(..excess);
    }
    let all = last_lines(&tail);
    Words { plugin: plugin.unwrap_or_else(|| all.clone()), all }
}

/// The last line or two of a text, on one line.
fn last_lines(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut words: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    words.drain(..words.len().saturating_sub(3));
    words.join(" / ").chars().take(300).collect()
}

/// How a process ended.
pub(crate) fn end_of(status: ExitStatus, fault: Option<String>) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        let name = match signal {
            libc::SIGILL => " (SIGILL, an illegal instruction)",
            libc::SIGTRAP => " (SIGTRAP)",
            libc::SIGABRT => " (SIGABRT)",
            libc::SIGBUS => " (SIGBUS)",
            libc::SIGFPE => " (SIGFPE)",
            libc::SIGKILL => " (SIGKILL: from outside, or no memory was left)",
            libc::SIGSEGV => " (SIGSEGV)",
            libc::SIGSYS => " (SIGSYS)",
            _ => "",
        };
        let fault = fault.map_or(String::new(), |fault| format!("{fault}; "));
        return format!("{fault}it crashed with signal {signal}{name}");
    }
    let fault = fault.map_or(String::new(), |fault| format!("{fault}; "));
    match status.code() {
        Some(code) => format!("{fault}it ended the process with status {code}"),
        None => format!("{fault}it ended the process"),
    }
}
