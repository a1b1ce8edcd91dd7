//! What a worker and a client say before a session: both prove that they know the same secret.
//!
//! The worker greets with its version and a nonce. The client answers with its version, a nonce and a proof. The worker
//! answers with a status and its own proof. A proof is HMAC-SHA-256, with the secret as the key, over the prover's role
//! and both messages before. So no proof can be used twice, or sent back to its sender. Proofs are compared in constant
//! time. Without a secret the key is empty, and everything else is the same.
//!
//! After this, nothing is signed or encrypted. docs/devices.md explains tunnels.

use std::fmt;
use std::io::Read as _;
use std::path::Path;

use ring::hmac;
use ring::rand::{SecureRandom as _, SystemRandom};

use super::version;

const MAGIC: [u8; 8] = *b"bitnet\0\x01";
/// Bytes of a version's text, with zeros behind it.
const VERSION: usize = 64;
const NONCE: usize = 32;
/// Bytes of a proof.
pub(super) const PROOF: usize = 32;
/// Bytes of a greeting: magic, version, whether there is a secret, nonce.
pub(super) const GREETING: usize = MAGIC.len() + VERSION + 1 + NONCE;
/// Bytes of what a client says before its proof: magic, version, milliseconds of its timeout, nonce.
pub(super) const HELLO: usize = MAGIC.len() + VERSION + 4 + NONCE;
/// Bytes of a worker's answer: status, proof.
pub(super) const ANSWER: usize = 1 + PROOF;

/// The roles that proofs are for.
const CLIENT: &[u8] = b"client";
const WORKER: &[u8] = b"worker";
/// For what a session over Burn's protocol begins with.
const SESSION: &[u8] = b"session";

/// A secret that a worker and its clients share.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// The fewest bytes of a secret. Whoever sees a handshake can try secrets, so short ones can be found.
    pub const MIN: usize = 16;
    /// The most bytes of a secret.
    pub const MAX: usize = 4096;
    /// The environment variable with a secret.
    pub const VARIABLE: &str = "BITNET_WORKER_SECRET";

    /// A secret, without white space at its ends.
    ///
    /// # Errors
    /// In words, if it is shorter than [`Secret::MIN`] or longer than [`Secret::MAX`].
    pub fn new(secret: &[u8]) -> Result<Self, String> {
        let secret = secret.trim_ascii();
        let (min, max) = (Self::MIN, Self::MAX);
        match secret.len() {
            n if n < min => {
                Err(format!("the secret has {n} bytes, and at least {min} are needed (openssl rand -hex 32)"))
            }
            n if n > max => Err(format!("the secret has more than {max} bytes")),
            _ => Ok(Self(secret.to_vec())),
        }
    }

    /// The secret in a file.
    ///
    /// # Errors
    /// In words, if it can't be read, or has no secret, or (on Unix) other users may read it.
    pub fn read(path: &Path) -> Result<Self, String> {
        let fail = |problem: String| format!("{}: {problem}", path.display());
        let file = std::fs::File::open(path).map_err(|error| fail(error.to_string()))?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = file.metadata().map_err(|error| fail(error.to_string()))?.permissions().mode();
            if mode & 0o077 != 0 {
                return Err(fail(format!(
                    "other users may read the secret (mode {:o}); chmod 600",
                    mode & 0o777
                )));
            }
        }
        let mut secret = Vec::new();
        file.take(Self::MAX as u64 + 64).read_to_end(&mut secret).map_err(|error| fail(error.to_string()))?;
        Self::new(&secret).map_err(fail)
    }

    /// The secret in [`Secret::VARIABLE`], if it is set.
    ///
    /// # Errors
    /// In words, if there is no secret in it.
    pub fn from_environment() -> Result<Option<Self>, String> {
        let Some(secret) = std::env::var_os(Self::VARIABLE) else { return Ok(None) };
        Self::new(secret.as_encoded_bytes())
            .map(Some)
            .map_err(|problem| format!("{}: {problem}", Self::VARIABLE))
    }
}

/// The key of a secret, or of none.
pub(super) fn key(secret: Option<&Secret>) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, secret.map_or(&[], |secret| &secret.0))
}

/// How a worker answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// A session begins.
    Welcome = 0,
    /// The client's proof is wrong.
    WrongSecret = 1,
    /// The client is of another version.
    OtherVersion = 2,
    /// There are as many sessions as the worker takes.
    Full = 3,
    /// The worker has as much memory as it may.
    NoMemory = 4,
}

/// Bytes of a version.
fn field(version: &str) -> [u8; VERSION] {
    let mut field = [0; VERSION];
    let n = version.len().min(VERSION);
    field[..n].copy_from_slice(&version.as_bytes()[..n]);
    field
}

fn random<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| "the system has no random numbers")?;
    Ok(bytes)
}

/// A worker's first message.
#[derive(Clone, Copy)]
pub(super) struct Greeting(pub(super) [u8; GREETING]);

impl Greeting {
    pub(super) fn new(has_secret: bool) -> Result<Self, String> {
        let parts = [&MAGIC[..], &field(&version()), &[has_secret.into()], &random::<NONCE>()?].concat();
        Ok(Self(parts.try_into().expect("the sum of the parts")))
    }

    /// Whether a worker sent it.
    pub(super) fn is_one(begin: &[u8]) -> bool {
        begin.starts_with(&MAGIC)
    }

    /// The worker's version, if it differs from ours.
    pub(super) fn other_version(&self) -> Option<String> {
        other_version(&self.0)
    }

    pub(super) fn has_secret(&self) -> bool {
        self.0[MAGIC.len() + VERSION] != 0
    }
}

/// The version in a message, if it is not this one.
fn other_version(message: &[u8]) -> Option<String> {
    let found = &message[MAGIC.len()..][..VERSION];
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        text.chars().filter(|c| !c.is_control()).collect()
    };
    (found != field(&version())).then(|| text(found))
}

/// What a client says before its proof.
#[derive(Clone, Copy)]
pub(super) struct Hello(pub(super) [u8; HELLO]);

impl Hello {
    pub(super) fn new(timeout: std::time::Duration) -> Result<Self, String> {
        let timeout = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).to_le_bytes();
        let parts = [&MAGIC[..], &field(&version()), &timeout, &random::<NONCE>()?].concat();
        Ok(Self(parts.try_into().expect("the sum of the parts")))
    }

    pub(super) fn is_one(&self) -> bool {
        self.0.starts_with(&MAGIC)
    }

    pub(super) fn other_version(&self) -> Option<String> {
        other_version(&self.0)
    }

    /// How long the client waits for a sign of life.
    pub(super) fn timeout(&self) -> std::time::Duration {
        let bytes = self.0[MAGIC.len() + VERSION..][..4].try_into().expect("four bytes");
        std::time::Duration::from_millis(u32::from_le_bytes(bytes).into())
    }
}

/// Both messages: what proofs are over.
#[derive(Clone)]
pub(super) struct Transcript {
    key: hmac::Key,
    messages: Vec<u8>,
}

impl Transcript {
    pub(super) fn new(key: &hmac::Key, greeting: &Greeting, hello: &Hello) -> Self {
        Self { key: key.clone(), messages: [&greeting.0[..], &hello.0].concat() }
    }

    fn prove(&self, role: &[u8]) -> [u8; PROOF] {
        let tag = hmac::sign(&self.key, &[role, &self.messages].concat());
        tag.as_ref().try_into().expect("SHA-256 has 32 bytes")
    }

    fn is_proven(&self, role: &[u8], proof: &[u8]) -> bool {
        hmac::verify(&self.key, &[role, &self.messages].concat(), proof).is_ok()
    }

    pub(super) fn by_client(&self) -> [u8; PROOF] {
        self.prove(CLIENT)
    }

    pub(super) fn is_clients(&self, proof: &[u8]) -> bool {
        self.is_proven(CLIENT, proof)
    }

    pub(super) fn by_worker(&self) -> [u8; PROOF] {
        self.prove(WORKER)
    }

    pub(super) fn is_workers(&self, proof: &[u8]) -> bool {
        self.is_proven(WORKER, proof)
    }

    /// What a session over Burn's protocol begins with: no other program of either machine knows it.
    pub(super) fn credential(&self) -> [u8; PROOF] {
        self.prove(SESSION)
    }

    pub(super) fn is_credential(&self, found: &[u8]) -> bool {
        self.is_proven(SESSION, found)
    }
}
