//! A worker's gate: the only way from the network to Burn's server, which listens on a loopback port.
//!
//! The gate lets a client in after the [handshake], and then passes bytes on in records: a length in four bytes, and so
//! many bytes of Burn's protocol. An empty record is a sign of life. Everything that a client can make the gate keep is
//! limited: records, connections without a proof, sessions, and time. The gate has a thread of its own, so that what
//! Burn's server reads and computes does not keep it from giving signs of life.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ring::hmac;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

use super::handshake::{self, ANSWER, Greeting, HELLO, Hello, PROOF, Secret, Status, Transcript};
use super::{RECORD, beat};

/// What a worker lets its clients use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Sessions at once.
    pub sessions: usize,
    /// Connections that have not proven yet that they know the secret. One more ends the oldest of them.
    pub unproven: usize,
    /// Time for the proof.
    pub handshake: Duration,
    /// Time until a client without a sign of life loses its session.
    pub silence: Duration,
    /// Memory of the process in bytes. Above it, all sessions end. On Linux only.
    pub memory: Option<u64>,
    /// Time until the worker stops serving, if the end of all sessions did not free enough memory.
    pub relief: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions: 16,
            unproven: 64,
            handshake: Duration::from_secs(10),
            silence: Duration::from_secs(60),
            memory: None,
            relief: Duration::from_secs(5),
        }
    }
}

/// How often the memory is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Memory of this process in bytes, also what is swapped out; `None` where the system does not tell.
fn memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    // Without pages of files, such as a mapped model's.
    Some((kib("RssAnon:")? + kib("VmSwap:").unwrap_or(0)) * 1024)
}

/// See the module's documentation.
pub(super) struct Gate {
    key: hmac::Key,
    has_secret: bool,
    limits: Limits,
    /// Where Burn's server listens.
    inner: SocketAddr,
    free: Arc<Semaphore>,
    /// Sessions by the address that Burn's server sees.
    open: Mutex<HashMap<SocketAddr, Transcript>>,
    no_memory: AtomicBool,
    cut: Notify,
}

impl Gate {
    pub(super) fn new(secret: Option<&Secret>, limits: Limits, inner: SocketAddr) -> Arc<Self> {
        Arc::new(Self {
            key: handshake::key(secret),
            has_secret: secret.is_some(),
            limits,
            inner,
            free: Arc::new(Semaphore::new(limits.sessions)),
            open: Mutex::default(),
            no_memory: AtomicBool::new(false),
            cut: Notify::new(),
        })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<SocketAddr, Transcript>> {
        self.open.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether it was the gate that opened this session of Burn's server, for the client that proved the secret.
    pub(super) fn let_in(&self, session: SocketAddr, credential: &[u8]) -> bool {
        self.open().get(&session).is_some_and(|transcript| transcript.is_credential(credential))
    }

    /// Serves whoever comes.
    pub(super) async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut unproven = VecDeque::new();
        loop {
            let (stream, client) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // For example, too many open files. Those of clients without a proof end soon.
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            unproven.retain(|handshake: &tokio::task::AbortHandle| !handshake.is_finished());
            if unproven.len() >= self.limits.unproven {
                // The oldest: an honest client needs one round trip, and is not the oldest for long.
                unproven.pop_front().expect("at least one").abort();
            }
            unproven.push_back(tokio::spawn(self.clone().admit(stream, client)).abort_handle());
        }
    }

    /// Lets a client in, if it proves the secret in time.
    async fn admit(self: Arc<Self>, mut stream: TcpStream, client: SocketAddr) {
        match timeout(self.limits.handshake, self.handshake(&mut stream)).await {
            Ok(Ok((transcript, patience, permit))) => {
                tokio::spawn(async move {
                    if let Err(problem) = self.session(stream, transcript, patience).await {
                        tracing::info!(%client, %problem, "a session ended");
                    }
                    drop(permit);
                });
            }
            Ok(Err(problem)) => tracing::warn!(%client, %problem, "a client was refused"),
            Err(_) => tracing::info!(%client, "a client said nothing in time"),
        }
    }

    async fn handshake(
        &self,
        stream: &mut TcpStream,
    ) -> Result<(Transcript, Duration, OwnedSemaphorePermit), String> {
        let lost = |error: io::Error| error.to_string();
        stream.set_nodelay(true).map_err(lost)?;
        let greeting = Greeting::new(self.has_secret)?;
        stream.write_all(&greeting.0).await.map_err(lost)?;
        let (mut hello, mut proof) = (Hello([0; HELLO]), [0; PROOF]);
        stream.read_exact(&mut hello.0).await.map_err(lost)?;
        if !hello.is_one() {
            return Err("it does not speak this protocol".into());
        }
        stream.read_exact(&mut proof).await.map_err(lost)?;
        let transcript = Transcript::new(&self.key, &greeting, &hello);
        let admitted = self.judge(&hello, &transcript, &proof);
        let mut answer = [0; ANSWER];
        match &admitted {
            Ok(_) => {
                answer[0] = Status::Welcome as u8;
                answer[1..].copy_from_slice(&transcript.by_worker());
            }
            Err((status, _)) => answer[0] = *status as u8,
        }
        stream.write_all(&answer).await.map_err(lost)?;
        match admitted {
            Ok(permit) => Ok((transcript, hello.timeout(), permit)),
            Err((_, problem)) => Err(problem),
        }
    }

    /// Whether a client gets a session; if not, what it is told, and what the log is told.
    fn judge(
        &self,
        hello: &Hello,
        transcript: &Transcript,
        proof: &[u8],
    ) -> Result<OwnedSemaphorePermit, (Status, String)> {
        if let Some(found) = hello.other_version() {
            return Err((Status::OtherVersion, format!("it is of another version: {found:?}")));
        }
        if !transcript.is_clients(proof) {
            return Err((Status::WrongSecret, "it does not know the secret".into()));
        }
        if self.no_memory.load(Ordering::Relaxed) {
            return Err((Status::NoMemory, "there is no memory".into()));
        }
        let permit = self.free.clone().try_acquire_owned();
        permit.map_err(|_| (Status::Full, format!("there are {} sessions", self.limits.sessions)))
    }

    /// Passes a client's bytes on, and those of Burn's server back, until either of them ends.
    async fn session(
        &self,
        stream: TcpStream,
        transcript: Transcript,
        patience: Duration,
    ) -> Result<(), String> {
        let burn = TcpStream::connect(self.inner).await.map_err(|error| error.to_string())?;
        burn.set_nodelay(true).map_err(|error| error.to_string())?;
        let address = burn.local_addr().map_err(|error| error.to_string())?;
        self.open().insert(address, transcript);
        let (mut from_burn, mut to_burn) = burn.into_split();
        let (from_client, to_client) = stream.into_split();
        let ended = tokio::select! {
            ended = self.to_burn(from_client, &mut to_burn) => ended,
            ended = self.to_client(&mut from_burn, to_client, beat(patience)) => ended,
            () = self.cut.notified() => Err("the worker has no memory left".into()),
        };
        // The client's connection is closed by now. Its session counts until Burn has ended it, too: what was asked for
        // may still be computed.
        let mut rest = [0; 4096];
        if to_burn.shutdown().await.is_ok() {
            while from_burn.read(&mut rest).await.is_ok_and(|n| n > 0) {}
        }
        self.open().remove(&address);
        ended
    }

    async fn to_burn(&self, mut client: OwnedReadHalf, burn: &mut OwnedWriteHalf) -> Result<(), String> {
        let silent = || format!("no sign of life for {} s", self.limits.silence.as_secs_f64());
        let mut record = vec![0; RECORD];
        loop {
            let mut length = [0; 4];
            match timeout(self.limits.silence, client.read_exact(&mut length)).await.map_err(|_| silent())? {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
                read => read.map_err(|error| error.to_string())?,
            };
            let length = u32::from_le_bytes(length) as usize;
            let record = record.get_mut(..length).ok_or_else(|| format!("a record of {length} bytes"))?;
            let read = timeout(self.limits.silence, client.read_exact(record)).await.map_err(|_| silent())?;
            read.map_err(|error| error.to_string())?;
            burn.write_all(record).await.map_err(|error| error.to_string())?;
        }
    }

    async fn to_client(
        &self,
        burn: &mut OwnedReadHalf,
        mut client: OwnedWriteHalf,
        beat: Duration,
    ) -> Result<(), String> {
        let mut record = vec![0; 4 + RECORD];
        loop {
            let length = match timeout(beat, burn.read(&mut record[4..])).await {
                Err(_) => 0,
                Ok(Ok(0)) => return Ok(()),
                Ok(read) => read.map_err(|error| error.to_string())?,
            };
            record[..4].copy_from_slice(&(length as u32).to_le_bytes());
            let written = timeout(self.limits.silence, client.write_all(&record[..4 + length])).await;
            written.map_err(|_| "it does not read")?.map_err(|error| error.to_string())?;
        }
    }

    /// Ends all sessions while the process has more memory than it may. Returns when that does not help.
    pub(super) async fn watch_memory(self: Arc<Self>) -> String {
        let Some(limit) = self.limits.memory else { return std::future::pending().await };
        let mut above_since = None;
        loop {
            sleep(LOOK).await;
            let Some(bytes) = memory() else { return std::future::pending().await };
            self.no_memory.store(bytes > limit, Ordering::Relaxed);
            if bytes <= limit {
                above_since = None;
                continue;
            }
            let since = *above_since.get_or_insert_with(|| {
                tracing::warn!(bytes, limit, "too much memory is in use; all sessions end");
                Instant::now()
            });
            self.cut.notify_waiters();
            // One operation may take all of the machine's memory, and can't be stopped.
            if since.elapsed() > self.limits.relief || bytes > limit.saturating_add(limit / 4) {
                return format!("{bytes} bytes of memory are in use, and {limit} are allowed");
            }
        }
    }
}

/// The address of Burn's server.
pub(super) fn loopback() -> io::Result<std::net::TcpListener> {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
}
