//! Workers under attack: whatever a client does, the worker serves the next honest one.
//!
//! The hostile clients are sockets with the protocol's bytes, and an HMAC of their own: RFC 2104 over SHA-256.
#![cfg(feature = "remote")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bitnet_burn::backends::devices;
use bitnet_burn::backends::remote::{self, Limits, Secret, Worker, WorkerError};
use bitnet_burn_tests::setup;
use burn::tensor::{Device, Tensor};
use sha2::{Digest as _, Sha256};

const SECRET: &[u8] = b"only for the tests of hostile clients";
/// More than anything here may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

const VERSION: std::ops::Range<usize> = 8..72;
const HAS_SECRET: usize = 72;
const GREETING: usize = 105;
const HELLO: usize = 108;
const PROOF: usize = 32;
/// Statuses of the worker's answer.
const WELCOME: u8 = 0;
const WRONG_SECRET: u8 = 1;
const OTHER_VERSION: u8 = 2;
const FULL: u8 = 3;

fn secret() -> Secret {
    Secret::new(SECRET).unwrap()
}

fn start(change: impl FnOnce(&mut Limits)) -> Worker {
    setup();
    let mut limits = Limits::default();
    change(&mut limits);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    Worker::start_with(listener, &Device::flex(), "flex", Some(&secret()), limits).unwrap()
}

/// A session of an honest client, which computes. The process has one session with each address.
fn honest(address: SocketAddr) -> Device {
    let device = remote::open_within(&address.to_string(), PATIENCE, Some(&secret())).unwrap();
    computes(&device);
    device
}

fn computes(device: &Device) {
    let y = devices::read(Tensor::<2>::ones([2, 2], device) + 1.0).unwrap();
    assert_eq!(y.iter::<f32>().collect::<Vec<_>>(), [2.0; 4]);
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    assert!(key.len() <= 64);
    let pad = |byte: u8| -> Vec<u8> { (0..64).map(|i| key.get(i).unwrap_or(&0) ^ byte).collect() };
    let inner = Sha256::digest([&pad(0x36)[..], &parts.concat()].concat());
    Sha256::digest([&pad(0x5c)[..], &inner].concat()).to_vec()
}

/// A hostile client that has read a worker's greeting.
struct Client {
    stream: TcpStream,
    greeting: [u8; GREETING],
}

impl Client {
    fn connect(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut greeting = [0; GREETING];
        stream.read_exact(&mut greeting).unwrap();
        Self { stream, greeting }
    }

    /// What a client with this nonce says, which takes the version from the greeting.
    fn hello(&self, nonce: u8) -> [u8; HELLO] {
        let mut hello = [nonce; HELLO];
        hello[..VERSION.end].copy_from_slice(&self.greeting[..VERSION.end]);
        hello[VERSION.end..][..4].copy_from_slice(&1000u32.to_le_bytes());
        hello
    }

    /// The worker's answer: a status and a proof.
    fn answer(&mut self, hello: &[u8; HELLO], proof: &[u8]) -> (u8, [u8; PROOF]) {
        self.stream.write_all(&[&hello[..], proof].concat()).unwrap();
        let (mut status, mut of_worker) = ([0], [0; PROOF]);
        self.stream.read_exact(&mut status).unwrap();
        self.stream.read_exact(&mut of_worker).unwrap();
        (status[0], of_worker)
    }

    /// One that knows the secret, in a session.
    fn proven(address: SocketAddr) -> Self {
        Self::try_proven(address).unwrap_or_else(|status| panic!("status {status}"))
    }

    fn try_proven(address: SocketAddr) -> Result<Self, u8> {
        let mut client = Self::connect(address);
        let hello = client.hello(7);
        let proof = hmac(SECRET, &[b"client", &client.greeting, &hello]);
        match client.answer(&hello, &proof) {
            (WELCOME, of_worker) => {
                assert_eq!(hmac(SECRET, &[b"worker", &client.greeting, &hello]), of_worker);
                Ok(client)
            }
            (status, _) => Err(status),
        }
    }

    fn record(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let length = u32::try_from(bytes.len()).unwrap();
        self.stream.write_all(&[&length.to_le_bytes()[..], bytes].concat())
    }

    /// A WebSocket with Burn's server, behind the gate.
    fn upgrade(&mut self) {
        let request = "GET /session HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                       Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        self.record(request.as_bytes()).unwrap();
        let mut text = Vec::new();
        while !text.ends_with(b"\r\n\r\n") {
            let mut length = [0; 4];
            self.stream.read_exact(&mut length).unwrap();
            let mut record = vec![0; u32::from_le_bytes(length) as usize];
            self.stream.read_exact(&mut record).unwrap();
            text.extend(record);
        }
        assert!(text.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&text));
    }

    /// Reads until the worker closes the connection.
    fn reads_the_end(mut self) {
        let (began, mut bytes) = (Instant::now(), [0; 4096]);
        while matches!(self.stream.read(&mut bytes), Ok(n) if n > 0) {
            assert!(began.elapsed() < PATIENCE, "it goes on and on");
        }
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    }
}

/// A frame's header with a length, masked with zeros.
fn frame(length: u64) -> Vec<u8> {
    [&[0x82, 0xff][..], &length.to_be_bytes(), &[0; 4]].concat()
}

#[test]
fn garbage_opens_no_session() {
    let worker = start(|_| ());
    let sessions = b"GET /session HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let tls = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[0x5a; 512]].concat();
    for garbage in [&[0; 4096][..], &[0xff; 1 << 20], sessions, &tls, b"\n"] {
        let mut client = Client::connect(worker.address());
        // The worker may close before it has read everything.
        let _ = client.stream.write_all(garbage);
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        let mut more = [0];
        assert!(!matches!(client.stream.read(&mut more), Ok(1)), "nothing but the greeting is said");
    }
    // In a session, where Burn's server reads it.
    for garbage in [&[0; 4096][..], &[0xff; 1 << 16], b"GET /data HTTP/1.1\r\n\r\n", b"\r\n\r\n"] {
        let mut client = Client::proven(worker.address());
        client.record(garbage).unwrap();
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        client.reads_the_end();
        let mut client = Client::proven(worker.address());
        client.upgrade();
        client.record(&frame(garbage.len() as u64)).unwrap();
        client.record(garbage).unwrap();
        client.reads_the_end();
    }
    honest(worker.address());
}

/// Anonymous memory of this process.
#[cfg(target_os = "linux")]
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    value.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn lengths_that_are_never_sent_take_no_memory() {
    let worker = start(|_| ());
    for length in [u32::MAX, (1 << 16) + 1] {
        let mut client = Client::proven(worker.address());
        client.stream.write_all(&length.to_le_bytes()).unwrap();
        client.reads_the_end();
    }
    for length in [u64::MAX, 1 << 62, (1 << 30) + 1] {
        let mut client = Client::proven(worker.address());
        client.upgrade();
        client.record(&frame(length)).unwrap();
        client.reads_the_end();
    }
    // As much as Burn takes, in as many sessions as there are but one: promised and not sent.
    #[cfg(target_os = "linux")]
    let before = memory();
    let mut promised: Vec<Client> =
        (1..Limits::default().sessions).map(|_| Client::proven(worker.address())).collect();
    for client in &mut promised {
        client.upgrade();
        client.record(&frame(1 << 30)).unwrap();
        client.record(&[0; 1 << 16]).unwrap();
    }
    honest(worker.address());
    #[cfg(target_os = "linux")]
    assert!(memory() < before + (1 << 28), "{} MiB", (memory() - before) >> 20);
}

#[test]
fn slow_clients_lose_their_connection() {
    let limit = Duration::from_millis(400);
    let worker = start(|limits| limits.handshake = limit);
    let began = Instant::now();
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let mut client = Client::connect(worker.address());
            std::thread::spawn(move || {
                // A byte of the hello at a time.
                for byte in client.hello(7) {
                    std::thread::sleep(limit / 8);
                    if client.stream.write_all(&[byte]).is_err() {
                        break;
                    }
                }
                client.reads_the_end();
            })
        })
        .collect();
    honest(worker.address());
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(began.elapsed() >= limit && began.elapsed() < limit + PATIENCE, "{:?}", began.elapsed());
}

#[test]
fn sessions_without_a_sign_of_life_end_and_idle_ones_do_not() {
    let limit = Duration::from_millis(1500);
    let worker = start(|limits| limits.silence = limit);
    // Its link sends signs of life.
    let device =
        remote::open_within(&worker.address().to_string(), Duration::from_secs(1), Some(&secret())).unwrap();
    let began = Instant::now();
    let silent = Client::proven(worker.address());
    let mut within_a_record = Client::proven(worker.address());
    within_a_record.stream.write_all(&[9, 0, 0, 0, b'G']).unwrap();
    silent.reads_the_end();
    within_a_record.reads_the_end();
    assert!(began.elapsed() >= limit, "{:?}", began.elapsed());
    std::thread::sleep(limit / 2);
    computes(&device);
}

#[test]
fn a_session_that_is_full_is_said_and_ends_with_its_client() {
    let worker = start(|limits| limits.sessions = 2);
    let held = [Client::proven(worker.address()), Client::proven(worker.address())];
    assert_eq!(Client::try_proven(worker.address()).err(), Some(FULL));
    let error = remote::open_within(&worker.address().to_string(), PATIENCE, Some(&secret())).unwrap_err();
    assert!(error.contains("as many sessions as it takes"), "{error}");
    drop(held);
    let began = Instant::now();
    while Client::try_proven(worker.address()).is_err() {
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn clients_that_leave_within_a_request_leave_nothing() {
    let worker = start(|_| ());
    // More than there are sessions.
    let many = 3 * Limits::default().sessions;
    for i in 0..many {
        let began = Instant::now();
        let mut client = loop {
            match Client::try_proven(worker.address()) {
                Ok(client) => break client,
                Err(status) => assert_eq!((status, began.elapsed() < PATIENCE), (FULL, true)),
            }
        };
        match i % 4 {
            0 => client.stream.write_all(&[1, 0]).unwrap(),
            1 => client.record(b"GET /session HT").unwrap(),
            2 => client.upgrade(),
            _ => {
                client.upgrade();
                client.record(&frame(1 << 20)).unwrap();
                client.record(&[0x93; 1000]).unwrap();
            }
        }
    }
    honest(worker.address());
}

/// Whatever it asked for is computed first, so nobody gets more by coming again and again.
#[test]
fn a_session_counts_until_what_it_asked_for_is_computed() {
    let process = Process::start_with(1 << 20, 1);
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_client_process", "--ignored", "--nocapture"])
        .env(ROLE, process.address.to_string())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(child.success(), "{child}");
    // It is gone, and what it asked for is not.
    assert_eq!(Client::try_proven(process.address).err(), Some(FULL));
    let began = Instant::now();
    while Client::try_proven(process.address).is_err() {
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "the process that other tests start"]
fn a_client_process() {
    let Some(address) = std::env::var(ROLE).ok().and_then(|text| text.parse().ok()) else { return };
    let device = honest(address);
    let x = Tensor::<2>::ones([200, 200], &device);
    let began = Instant::now();
    devices::read(x.clone().matmul(x.clone())).unwrap();
    // Three seconds of work, and so many small operations that it is sent.
    let times = 3.0 / began.elapsed().as_secs_f64();
    let y = (0..times as usize + 1).fold(x.clone(), |y, _| y.matmul(x.clone()));
    let z: Vec<_> = (0..1000).map(|_| Tensor::<1>::ones([1], &device)).collect();
    std::thread::sleep(Duration::from_millis(300));
    // Nothing is dropped, and so nothing waited for.
    std::mem::forget((y, z));
    std::process::exit(0);
}

#[test]
fn clients_and_workers_of_another_version_are_refused() {
    let worker = start(|_| ());
    let mut client = Client::connect(worker.address());
    let mut hello = client.hello(7);
    hello[VERSION].fill(0);
    hello[VERSION][..20].copy_from_slice(b"bitnet-burn 0.0.0, x");
    let proof = hmac(SECRET, &[b"client", &client.greeting, &hello]);
    assert_eq!(client.answer(&hello, &proof).0, OTHER_VERSION);
    client.reads_the_end();
    let mut greeting = Client::connect(worker.address()).greeting;
    greeting[VERSION].copy_from_slice(&hello[VERSION]);
    let error = opened(impostor(greeting, |_| panic!("it is not answered")));
    assert!(error.contains("of another version, \"bitnet-burn 0.0.0, x\"; this is"), "{error}");
    honest(worker.address());
}

/// Listens once, greets, and answers a client's hello and proof.
fn impostor(greeting: [u8; GREETING], answer: impl Fn(&[u8]) -> Vec<u8> + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&greeting).unwrap();
        let mut said = [0; HELLO + PROOF];
        if stream.read_exact(&mut said).is_ok() {
            stream.write_all(&answer(&said)).unwrap();
        }
    });
    address
}

fn opened(address: SocketAddr) -> String {
    remote::open_within(&address.to_string(), PATIENCE, Some(&secret())).unwrap_err()
}

#[test]
fn both_sides_need_the_same_secret() {
    let worker = start(|_| ());
    let address = worker.address().to_string();
    let other = Secret::new(b"another secret of the tests").unwrap();
    let error = remote::open_within(&address, PATIENCE, Some(&other)).unwrap_err();
    assert!(error.contains(&address) && error.contains("has another secret"), "{error}");
    let error = remote::open_within(&address, PATIENCE, None).unwrap_err();
    assert!(error.contains("needs a secret: --secret-file F, or BITNET_WORKER_SECRET"), "{error}");
    // Every bit of a proof counts.
    for bit in [0, 7, 100, 255] {
        let mut client = Client::connect(worker.address());
        let hello = client.hello(1);
        let mut proof = hmac(SECRET, &[b"client", &client.greeting, &hello]);
        proof[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(client.answer(&hello, &proof), (WRONG_SECRET, [0; PROOF]));
        client.reads_the_end();
    }
    honest(worker.address());
    // A worker without a secret can't have it stolen, or pretend to know it.
    let open = bitnet_burn_tests::worker().unwrap();
    let error = remote::open_within(&open.address().to_string(), PATIENCE, Some(&secret())).unwrap_err();
    assert!(error.contains("was started without a secret"), "{error}");
    for listen in ["0.0.0.0:0", "[::]:0"] {
        // There may be no IPv6.
        let Ok(listener) = TcpListener::bind(listen) else { continue };
        let error = Worker::start(listener, &Device::flex(), "flex").unwrap_err();
        assert!(matches!(error, WorkerError::NoSecret(_)), "{error}");
        assert!(error.to_string().contains("--secret-file F, or BITNET_WORKER_SECRET"), "{error}");
    }
}

#[test]
fn secrets_are_long_and_their_owners_own() {
    assert!(Secret::new(b"  123456789012345\n").unwrap_err().contains("15 bytes"));
    assert!(Secret::new(&[b'x'; 5000]).is_err());
    assert_eq!(format!("{:?}", secret()), "Secret(..)");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("secret");
    assert!(Secret::read(&path).unwrap_err().contains("secret: "));
    std::fs::write(&path, [SECRET, b"\n"].concat()).unwrap();
    #[cfg(unix)]
    for (mode, fits) in [(0o644, false), (0o640, false), (0o602, false), (0o600, true), (0o400, true)] {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let read = Secret::read(&path);
        assert_eq!(read.is_ok(), fits, "{mode:o}: {read:?}");
        assert!(fits || read.unwrap_err().contains("other users may read the secret"));
    }
    // What is read is the secret, without the end of the line.
    let worker = start(|_| ());
    let read = Secret::read(&path).unwrap();
    computes(&remote::open_within(&worker.address().to_string(), PATIENCE, Some(&read)).unwrap());
}

#[test]
fn proofs_can_t_be_used_again_or_sent_back() {
    let worker = start(|_| ());
    let mut client = Client::connect(worker.address());
    let hello = client.hello(3);
    let proof = hmac(SECRET, &[b"client", &client.greeting, &hello]);
    let (status, of_worker) = client.answer(&hello, &proof);
    assert_eq!(status, WELCOME);
    // Again, in the session that it was for and in another one; and the worker's own proof.
    for proof in [&proof[..], &of_worker] {
        let mut again = Client::connect(worker.address());
        assert_ne!(again.greeting[HAS_SECRET..], client.greeting[HAS_SECRET..], "a nonce is used once");
        assert_eq!(again.answer(&hello, proof), (WRONG_SECRET, [0; PROOF]));
    }
    client.record(&[&hello[..], &proof].concat()).unwrap();
    client.reads_the_end();
    // A worker that sends the client's proof back, that sends an old one of the true worker, and that says yes only.
    let greeting = Client::connect(worker.address()).greeting;
    let welcome = |proof: &[u8]| [&[WELCOME], proof].concat();
    for (i, answer) in [
        Box::new(move |said: &[u8]| welcome(&said[HELLO..])) as Box<dyn Fn(&[u8]) -> Vec<u8> + Send>,
        Box::new(move |_| welcome(&of_worker)),
        Box::new(move |_| welcome(&[0; PROOF])),
    ]
    .into_iter()
    .enumerate()
    {
        let error = opened(impostor(greeting, answer));
        assert!(error.contains("does not know the secret"), "{i}: {error}");
    }
    honest(worker.address());
}

/// A worker in a process of its own, this test binary's, with so many MiB more memory than it begins with.
struct Process {
    child: Child,
    address: SocketAddr,
}

const ROLE: &str = "BITNET_TEST_WORKER";

impl Process {
    fn start(mebibytes: u64) -> Self {
        Self::start_with(mebibytes, Limits::default().sessions)
    }

    fn start_with(mebibytes: u64, sessions: usize) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_worker_process", "--ignored", "--nocapture"]);
        command.env(ROLE, format!("{mebibytes} {sessions}")).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = lines.find_map(|line| Some(line.unwrap().split_once("WORKER ")?.1.to_owned()));
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| println!("{line}")));
        Self { child, address: address.expect("it says where it listens").parse().unwrap() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "the process that other tests start"]
fn a_worker_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let Some((mebibytes, sessions)) = role.split_once(' ') else { return };
    let (mebibytes, sessions) = (mebibytes.parse::<u64>().unwrap(), sessions.parse().unwrap());
    #[cfg(target_os = "linux")]
    let memory = Some(memory() + (mebibytes << 20));
    #[cfg(not(target_os = "linux"))]
    let memory = Some(mebibytes << 20);
    let worker = start(|limits| (limits.memory, limits.sessions) = (memory, sessions));
    println!("WORKER {}", worker.address());
    panic!("{}", worker.wait());
}

#[test]
fn a_thousand_connections_keep_nobody_out() {
    let process = Process::start(1 << 20);
    let before = honest(process.address);
    // As many as this process may have.
    let held: Vec<TcpStream> = (0..1000).map_while(|_| TcpStream::connect(process.address).ok()).collect();
    assert!(held.len() >= 200, "{}", held.len());
    computes(&before);
    let began = Instant::now();
    let mut client = Client::proven(process.address);
    client.upgrade();
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    // All but the last ones are closed, so a thousand more do not add up.
    let open = held.iter().filter(|stream| {
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut bytes = Vec::new();
        // Until its end, or until there is nothing more to read.
        matches!(stream.take(1 << 20).read_to_end(&mut bytes), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    });
    assert!(open.count() <= Limits::default().unproven);
    computes(&before);
}

/// Over Burn's own operations.
#[cfg(target_os = "linux")]
#[test]
fn sessions_that_take_too_much_memory_end() {
    let process = Process::start(256);
    let greedy = honest(process.address);
    let mut kept = Vec::new();
    let error = loop {
        let more = Tensor::<1>::ones([1 << 21], &greedy);
        kept.push(more.clone());
        match devices::read(more.narrow(0, 0, 1)) {
            Ok(_) => assert!(kept.len() < 200, "{} MiB", kept.len() * 8),
            Err(error) => break error,
        }
    };
    assert!(error.contains(&process.address.to_string()) && kept.len() > 16, "{} {error}", kept.len());
    let began = Instant::now();
    let next = loop {
        match remote::open_within(&process.address.to_string(), PATIENCE, Some(&secret())) {
            Ok(device) => break device,
            // Until it is freed.
            Err(error) => assert!(error.contains("no memory") && began.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    computes(&next);
}

/// What docs/devices.md says of one operation: the worker ends, and not the machine.
#[cfg(target_os = "linux")]
#[test]
fn one_operation_that_takes_too_much_memory_ends_the_worker() {
    let mut process = Process::start(128);
    let greedy = honest(process.address);
    // 4 GiB.
    let error = devices::read(Tensor::<1>::ones([1 << 30], &greedy).narrow(0, 0, 1)).unwrap_err();
    assert!(error.contains(&process.address.to_string()), "{error}");
    let began = Instant::now();
    while process.child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < PATIENCE, "it goes on");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn memory_that_does_not_come_back_ends_the_worker() {
    let began = Instant::now();
    let worker = start(|limits| limits.memory = Some(1));
    let error = worker.wait();
    assert!(matches!(error, WorkerError::Memory(_)) && began.elapsed() < PATIENCE, "{error}");
}

/// Ports at which a process listens.
#[cfg(target_os = "linux")]
fn ports(pid: u32) -> Vec<u16> {
    let sockets: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let of_row = |row: &str| {
        let columns: Vec<&str> = row.split_whitespace().collect();
        let listens = columns[3] == "0A" && sockets.iter().any(|inode| inode == columns[9]);
        let port = columns[1].rsplit_once(':').unwrap().1;
        listens.then(|| u16::from_str_radix(port, 16).unwrap())
    };
    table.lines().skip(1).filter_map(of_row).collect()
}

/// A program of the worker's machine finds the port that Burn's server listens on.
#[cfg(target_os = "linux")]
#[test]
fn nobody_comes_past_the_gate() {
    use burn::remote::{ConnectError, RemoteHost};
    let process = Process::start(1 << 20);
    let mut ports = ports(process.child.id());
    ports.retain(|&port| port != process.address.port());
    let [port] = ports[..] else { panic!("{ports:?}") };
    let host = RemoteHost::websocket(&format!("ws://127.0.0.1:{port}"));
    for credential in [&b""[..], SECRET, &[0; PROOF]] {
        let refused = Device::remote_options(&host.clone().with_credential(credential)).init();
        assert!(matches!(refused, Err(ConnectError::Unauthorized)), "{refused:?}");
    }
    honest(process.address);
}
