//! A client's side of the connection to a worker: it ends when the worker does, or stops answering.
//!
//! Burn's client waits for an answer as long as it takes, and it takes for ever from a worker that is stopped. So its
//! session runs through a link in this process, which passes bytes on, asks the worker for a sign of life beside it,
//! and cuts the session when there was none for [`timeout`]: whatever waits for an answer, or for room to send, then
//! gets an error. The sign of life does not wait for the worker's computing, so a slow worker is none that stopped.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use burn::backend::RemoteDevice;
use burn::remote::{ConnectError, RemoteHost};
use burn::tensor::{Device, Tensor, TensorData};

use super::{client, name, remote, version};
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

/// Whether a process answers at an address: any answer to a request of HTTP, which Burn's sessions begin with, will do.
fn sign_of_life(address: SocketAddr, within: Duration) -> io::Result<()> {
    let began = Instant::now();
    let mut stream = TcpStream::connect_timeout(&address, within)?;
    let left = within.saturating_sub(began.elapsed()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))?;
    stream.write_all(b"HEAD / HTTP/1.0\r\n\r\n")?;
    stream.read_exact(&mut [0])
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
    fn pass_on(self: Arc<Self>, near: TcpListener, mut far: TcpStream) -> io::Result<()> {
        let (mut near, _) = near.accept()?;
        near.set_nodelay(true)?;
        let (mut from_far, mut to_near) = (far.try_clone()?, near.try_clone()?);
        {
            let mut sockets = self.sockets.lock().unwrap_or_else(|e| e.into_inner());
            sockets.extend([near.try_clone()?, far.try_clone()?]);
        }
        // It may have been cut before there was anything to close.
        if let Some(reason) = self.broken.get() {
            self.cut(reason.clone());
        }
        let back = self.clone();
        thread::Builder::new().name("bitnet-link-back".into()).spawn(move || {
            let _ = io::copy(&mut from_far, &mut to_near);
            back.cut("the worker closed the connection; it ended, or its log says why".into());
        })?;
        let _ = io::copy(&mut near, &mut far);
        self.cut("the connection to the worker is closed".into());
        Ok(())
    }

    /// Cuts the session when the worker gives no sign of life for so long.
    fn watch(&self, address: SocketAddr, timeout: Duration) {
        let mut last = Instant::now();
        while self.broken.get().is_none() {
            let asked = Instant::now();
            let left = timeout.saturating_sub(last.elapsed());
            if left.is_zero() {
                return self.cut(format!("the worker has not answered for {} s", timeout.as_secs_f64()));
            }
            if sign_of_life(address, left).is_ok() {
                last = asked;
            }
            thread::sleep((timeout / 5).min(timeout.saturating_sub(last.elapsed())));
        }
    }
}

/// [`open_within`] the seconds of `BITNET_REMOTE_TIMEOUT`, or 10.
///
/// # Errors
/// As there, and if the variable is no number.
pub fn open(address: &str) -> Result<Device, String> {
    open_within(address, timeout()?)
}

/// The device of the worker at HOST:PORT. From now on the worker has to give a sign of life within the timeout, or the
/// session ends, and what is read from it is an error. A worker that was opened before keeps its session, while that
/// lasts.
///
/// Tensors of two workers don't move from one to the other by themselves: they go through the client.
///
/// # Errors
/// In words, if no worker answers there within the timeout, or it is of another version.
pub fn open_within(address: &str, timeout: Duration) -> Result<Device, String> {
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
    let peer = far.peer_addr().map_err(unreachable)?;
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
    let watcher = link.clone();
    start("bitnet-link-watch", Box::new(move || watcher.watch(peer, timeout)))?;
    let passes = link.clone();
    start(
        "bitnet-link",
        Box::new(move || {
            let there = passes.clone();
            if let Err(error) = passes.pass_on(near, far) {
                there.cut(error.to_string());
            }
        }),
    )?;
    let host = RemoteHost::websocket(&format!("ws://{url}")).with_credential(version());
    let opened = catching_panics(|| {
        let device = Device::remote_options(&host).init().map_err(|error| match error {
            ConnectError::Unauthorized => {
                format!("the worker there is of another version; this is {}", version())
            }
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
