//! A client's side of the connection to a worker: it ends when the worker does, or stops answering.
//!
//! Burn's client waits for an answer as long as it takes, and it takes for ever from a worker that is stopped. So its
//! session runs through a link in this process. The link proves the secret, has the worker prove it, and passes bytes
//! on in records as the worker's [gate](super::gate) does. It cuts the session when no record came for [`timeout`]:
//! whatever waits for an answer, or for room to send, then gets an error. The gate sends empty records while the worker
//! computes, so a slow worker is not treated as dead.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, ToSocketAddrs as _};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use burn::backend::RemoteDevice;
use burn::remote::{ConnectError, RemoteHost};
use burn::tensor::{Device, Tensor, TensorData};

use super::handshake::{self, ANSWER, GREETING, Greeting, Hello, PROOF, Secret, Status, Transcript};
use super::{RECORD, beat, client, name, remote, version};
use crate::devices::{REMOTE, catching_panics};

/// A session with a worker.
struct Link {
    /// HOST:PORT, as it was asked for.
    address: String,
    /// Both ends of the session.
    sockets: Mutex<Vec<TcpStream>>,
    /// Why it is over.
    broken: OnceLock<String>,
}

/// A link that was opened, and the device behind it.
struct Open {
    link: Arc<Link>,
    device: RemoteDevice,
    /// The worker's name for its device: `flex`, `wgpu:0`.
    serves: String,
}

fn open_links() -> MutexGuard<'static, Vec<Open>> {
    static LINKS: Mutex<Vec<Open>> = Mutex::new(Vec::new());
    LINKS.lock().unwrap_or_else(|e| e.into_inner())
}

fn with_link<R>(device: &Device, f: impl FnOnce(&Open) -> R) -> Option<R> {
    let device = remote(device)?;
    open_links().iter().find(|open| open.device == device).map(f)
}

/// The address of the worker that a device is on, if this process opened it with [`open`].
pub(crate) fn address(device: &Device) -> Option<String> {
    with_link(device, |open| open.link.address.clone())
}

/// Whether a device is a worker's that computes in host memory.
pub fn computes_in_host_memory(device: &Device) -> bool {
    with_link(device, |open| matches!(open.serves.as_str(), "flex" | "ndarray")).unwrap_or(false)
}

/// How long a worker may give no sign of life: `BITNET_REMOTE_TIMEOUT` in seconds, or 10 s.
fn timeout() -> Result<Duration, String> {
    const VARIABLE: &str = "BITNET_REMOTE_TIMEOUT";
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(Duration::from_secs(10)) };
    let seconds = text.to_str().and_then(|text| text.parse::<f64>().ok());
    match seconds.filter(|seconds| (0.1..=86400.0).contains(seconds)) {
        Some(seconds) => Ok(Duration::from_secs_f64(seconds)),
        None => Err(format!("{VARIABLE}={}: expected seconds, from 0.1 to 86400", text.to_string_lossy())),
    }
}

/// All addresses of a name share the time.
fn connect(address: &str, timeout: Duration) -> io::Result<TcpStream> {
    let began = Instant::now();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        let left = timeout.saturating_sub(began.elapsed()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

static SECRET: OnceLock<Secret> = OnceLock::new();

/// The secret for all workers that this process opens with [`open`], in place of `BITNET_WORKER_SECRET`. The first one
/// stays.
pub fn use_secret(secret: Secret) {
    let _ = SECRET.set(secret);
}

fn secret() -> Result<Option<Secret>, String> {
    SECRET.get().cloned().map_or_else(Secret::from_environment, |secret| Ok(Some(secret)))
}

/// The other side of a handshake.
struct Handshake<'a> {
    stream: &'a TcpStream,
    began: Instant,
    timeout: Duration,
}

impl Handshake<'_> {
    /// Fills the buffer within the time that is left.
    fn read<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (mut bytes, mut read) = ([0; N], 0);
        while read < N {
            let left = self.timeout.saturating_sub(self.began.elapsed());
            if left.is_zero() {
                return Err(silent(self.timeout));
            }
            self.stream.set_read_timeout(Some(left)).map_err(|error| error.to_string())?;
            match self.stream.read(&mut bytes[read..]) {
                Ok(0) => return Err("no worker answers there: the connection was closed".into()),
                Ok(n) => read += n,
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(format!("no worker answers there: {error}")),
            }
        }
        Ok(bytes)
    }

    /// Proves the secret, and has the worker prove it. Returns the credential of the session.
    fn shake(&mut self, secret: Option<&Secret>) -> Result<[u8; PROOF], String> {
        const OTHER: usize = 8;
        let begin = self.read::<OTHER>()?;
        if !Greeting::is_one(&begin) {
            return Err("no worker answers there: another program does".into());
        }
        let rest = self.read::<{ GREETING - OTHER }>()?;
        let greeting = Greeting([&begin[..], &rest].concat().try_into().expect("the sum of the parts"));
        let other = |found: String| {
            format!("the worker there is of another version, {found:?}; this is {:?}", version())
        };
        if let Some(found) = greeting.other_version() {
            return Err(other(found));
        }
        let flags = format!("--secret-file F, or {}", Secret::VARIABLE);
        match (greeting.has_secret(), secret) {
            (true, None) => return Err(format!("the worker there needs a secret: {flags}")),
            (false, Some(_)) => {
                return Err(
                    "the worker there was started without a secret, so it can't prove that it knows yours"
                        .into(),
                );
            }
            _ => {}
        }
        let hello = Hello::new(self.timeout)?;
        let transcript = Transcript::new(&handshake::key(secret), &greeting, &hello);
        let message = [&hello.0[..], &transcript.by_client()].concat();
        let mut stream = self.stream;
        stream.write_all(&message).map_err(|error| format!("no worker answers there: {error}"))?;
        let answer = self.read::<ANSWER>()?;
        let refused = |status: Status| answer[0] == status as u8;
        Err(if refused(Status::Welcome) {
            if transcript.is_workers(&answer[1..]) {
                return Ok(transcript.credential());
            }
            "what answers there does not know the secret".into()
        } else if refused(Status::WrongSecret) {
            "the worker there has another secret".into()
        } else if refused(Status::Full) {
            "the worker there has as many sessions as it takes; try again later".into()
        } else if refused(Status::NoMemory) {
            "the worker there has no memory left; try again later".into()
        } else {
            // Among them Status::OtherVersion, which the greeting told already.
            format!("the worker there refuses the session (status {})", answer[0])
        })
    }
}

fn silent(timeout: Duration) -> String {
    format!("the worker has not answered for {} s", timeout.as_secs_f64())
}

/// Whether a socket's timeout was over.
fn is_pause(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

impl Link {
    /// Ends the session; the first reason is the one that is told.
    fn cut(&self, reason: String) {
        let _ = self.broken.set(reason);
        // Not kept: a socket is closed, and whoever waits for room to send is told, when the last handle is gone.
        for socket in std::mem::take(&mut *self.sockets.lock().unwrap_or_else(|e| e.into_inner())) {
            // What is closed already needs no closing.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Ends the session, where something could not be read, and says why.
    fn over(&self, error: &str) -> String {
        self.cut(format!("the worker ended the session ({error}); its log may say why"));
        let reason = self.broken.get().map_or(error, String::as_str);
        format!("{REMOTE}{}: {reason}", self.address)
    }

    /// Passes the bytes of the one session that comes to `near` on to the worker, and back.
    fn pass_on(self: Arc<Self>, near: TcpListener, far: TcpStream, timeout: Duration) -> io::Result<()> {
        let (near, _) = near.accept()?;
        near.set_nodelay(true)?;
        near.set_read_timeout(Some(beat(timeout)))?;
        far.set_read_timeout(Some(timeout))?;
        {
            let mut sockets = self.sockets.lock().unwrap_or_else(|e| e.into_inner());
            sockets.extend([near.try_clone()?, far.try_clone()?]);
        }
        // It may have been cut before there was anything to close.
        if let Some(reason) = self.broken.get() {
            self.cut(reason.clone());
        }
        let (from_far, to_near, back) = (far.try_clone()?, near.try_clone()?, self.clone());
        thread::Builder::new().name("bitnet-link-back".into()).spawn(move || {
            let reason = match from_worker(from_far, to_near) {
                Err(error) if is_pause(&error) => silent(timeout),
                _ => "the worker closed the connection; it ended, or its log says why".into(),
            };
            back.cut(reason);
        })?;
        let _ = to_worker(near, far);
        self.cut("the connection to the worker is closed".into());
        Ok(())
    }
}

/// Sends what comes from this process as records, and empty ones while nothing comes.
fn to_worker(mut near: TcpStream, mut far: TcpStream) -> io::Result<()> {
    let mut record = vec![0; 4 + RECORD];
    loop {
        let length = match near.read(&mut record[4..]) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if is_pause(&error) => 0,
            Err(error) => return Err(error),
        };
        record[..4].copy_from_slice(&(length as u32).to_le_bytes());
        far.write_all(&record[..4 + length])?;
    }
}

/// Passes the worker's records on, without the empty ones.
fn from_worker(mut far: TcpStream, mut near: TcpStream) -> io::Result<()> {
    let mut record = vec![0; RECORD];
    loop {
        let mut length = [0; 4];
        far.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        let record = record.get_mut(..length).ok_or(ErrorKind::InvalidData)?;
        far.read_exact(record)?;
        near.write_all(record)?;
    }
}

/// [`open_within`] the seconds of `BITNET_REMOTE_TIMEOUT`, or 10, with the secret of [`use_secret`] or
/// `BITNET_WORKER_SECRET`.
///
/// # Errors
/// As there, and if a variable has a wrong value.
pub fn open(address: &str) -> Result<Device, String> {
    open_within(address, timeout()?, secret()?.as_ref())
}

/// The device of the worker at HOST:PORT. From now on the worker has to give a sign of life within the timeout, or the
/// session ends, and what is read from it is an error. A worker that was opened before keeps its session, while that
/// lasts.
///
/// Tensors of two workers don't move from one to the other by themselves: they go through the client.
///
/// # Errors
/// In words, if no worker answers there within the timeout, or it is of another version, or does not know the secret, or
/// has no session left. An address that is not a loopback address needs a secret.
pub fn open_within(address: &str, timeout: Duration, secret: Option<&Secret>) -> Result<Device, String> {
    let fail = |problem: String| format!("{REMOTE}{address}: {problem}");
    {
        let links = open_links();
        let mut known = links.iter().filter(|open| open.link.address == address);
        if let Some(open) = known.find(|open| open.link.broken.get().is_none()) {
            return Ok(Device::new(open.device.clone()));
        }
    }
    let unreachable = |error: io::Error| fail(format!("no worker answers there: {error}"));
    let far = connect(address, timeout).map_err(unreachable)?;
    if secret.is_none() && !far.peer_addr().map_err(unreachable)?.ip().is_loopback() {
        return Err(fail(format!(
            "a worker on another machine needs a secret: --secret-file F, or {}",
            Secret::VARIABLE
        )));
    }
    let mut handshake = Handshake { stream: &far, began: Instant::now(), timeout };
    let credential = handshake.shake(secret).map_err(fail)?;
    let near = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|error| fail(error.to_string()))?;
    let url = near.local_addr().map_err(|error| fail(error.to_string()))?;
    let link = Arc::new(Link {
        address: address.to_owned(),
        sockets: Mutex::new(Vec::new()),
        broken: OnceLock::new(),
    });
    let start = |name: &str, run: Box<dyn FnOnce() + Send>| {
        let started = thread::Builder::new().name(name.into()).spawn(run);
        started.map(|_| ()).map_err(|error| fail(error.to_string()))
    };
    let passes = link.clone();
    start(
        "bitnet-link",
        Box::new(move || {
            let there = passes.clone();
            if let Err(error) = passes.pass_on(near, far, timeout) {
                there.cut(error.to_string());
            }
        }),
    )?;
    let host = RemoteHost::websocket(&format!("ws://{url}")).with_credential(credential.to_vec());
    let opened = catching_panics(|| {
        let device = Device::remote_options(&host).init().map_err(|error| match error {
            ConnectError::Unreachable { .. } | ConnectError::Handshake { .. } => match link.broken.get() {
                Some(reason) => format!("no worker answers there: {reason}"),
                None => format!("no worker answers there: {error}"),
            },
            error => error.to_string(),
        })?;
        let on_worker = remote(&device).ok_or("a device of another kind")?;
        let serves = client::text(&on_worker, name::DEVICE)?;
        open_links().push(Open { link: link.clone(), device: on_worker, serves });
        Ok(device)
    });
    opened.and_then(|opened| opened).map_err(|problem: String| {
        link.cut(problem.clone());
        fail(problem)
    })
}

/// A tensor's values, if it is on a worker: with what went wrong there while it was computed as an error.
pub(crate) fn read<const D: usize>(tensor: &Tensor<D>) -> Option<Result<TensorData, String>> {
    let device = tensor.device();
    let (link, on_worker) = with_link(&device, |open| (open.link.clone(), open.device.clone()))?;
    let checked = || -> Result<TensorData, String> {
        let data = tensor.clone().try_into_data().map_err(|error| link.over(&error.to_string()))?;
        // What fails there leaves an error, and NaN.
        if data.iter::<f32>().any(f32::is_nan) {
            let error = client::text(&on_worker, name::ERROR).map_err(|error| link.over(&error))?;
            if !error.is_empty() {
                return Err(format!("{REMOTE}{}: {error}", link.address));
            }
        }
        Ok(data)
    };
    Some(catching_panics(checked).unwrap_or_else(|panic| Err(link.over(&panic))))
}
