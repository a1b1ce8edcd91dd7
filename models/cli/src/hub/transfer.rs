//! Files from the hub into the cache. Only a file of the stated length and hash gets its name there. One that comes in part
//! stays, and the next attempt goes on where it ended.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, IsTerminal as _, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bitnet_burn_engine::text::human_bytes;
use indicatif::ProgressBar;

use super::Cached;
use super::client::{self, Client, HubError, Listing};
use super::hash::Hasher;
use super::name::check_file;
use crate::output;

/// Attempts in a row that may bring nothing.
const ATTEMPTS: u32 = 4;

/// The wait after the first of them; it doubles.
const WAIT: Duration = Duration::from_millis(500);

/// Downloads those of the wanted files that are not in the cache.
pub fn get(
    client: &Client,
    cached: &Cached,
    id: &str,
    listing: &Listing,
    wanted: &[String],
) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    for name in wanted {
        check_file(name).map_err(|problem| anyhow!("{id}: {problem}; nothing is written"))?;
        let file = listing.file(name).with_context(|| format!("{id}: the hub has no file {name}"))?;
        let link = cached.snapshot(&listing.commit).join(name);
        if !has_length(&link, file.bytes) {
            missing.push((file, link));
        }
    }
    let all: u64 = missing.iter().map(|(file, _)| file.bytes).sum();
    let bar = output::bar(all, "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}, {eta} left");
    if all > 0 && !io::stderr().is_terminal() {
        let place = cached.directory();
        output::note(format_args!("downloading {} of {id} to {}", human_bytes(all), place.display()));
    }
    let mut done = 0;
    for (file, link) in missing {
        bar.set_message(file.name.clone());
        bar.set_position(done);
        done += file.bytes;
        let blob = cached.blob(file.hash.digits());
        let transfer = Transfer { client, id, commit: &listing.commit, file, blob: &blob, bar: &bar };
        let transferred = || {
            let _lock = lock(&cached.lock(file.hash.digits()), &file.name)?;
            // Another program may have brought the file since, and another commit may have the same.
            if has_length(&link, file.bytes) {
                return Ok(());
            }
            if !has_length(&blob, file.bytes) {
                transfer.run()?;
            }
            link_to(&blob, &link)
        };
        transferred().map_err(|error: anyhow::Error| with_room(error, file, cached))?;
    }
    bar.finish_and_clear();
    Ok(())
}

fn has_length(path: &Path, bytes: u64) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == bytes)
}

/// An error, with what to do where it is that the disk is full.
fn with_room(error: anyhow::Error, file: &client::File, cached: &Cached) -> anyhow::Error {
    let full = |kind| matches!(kind, ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    match error.downcast_ref::<io::Error>() {
        Some(cause) if full(cause.kind()) => error.context(format!(
            "no room for {} ({}) in {}; what came is kept, so free some space and start again, or let HF_HOME name another \
             directory",
            file.name,
            human_bytes(file.bytes),
            cached.directory().display()
        )),
        _ => error,
    }
}

/// Waits until no other program writes the blob.
fn lock(path: &Path, name: &str) -> anyhow::Result<File> {
    let locked = || -> io::Result<File> {
        create_parent(path)?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                output::note(format_args!("another program is downloading {name}: waiting for it"));
                file.lock()?;
            }
            // Some network file systems have no locks. Files still get their names only as a whole.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
        Ok(file)
    };
    locked().with_context(|| format!("cannot lock {}", path.display()))
}

fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

/// Gives a blob its name in a snapshot: by a relative link, as Hugging Face's programs do, or by moving it there, where the
/// system does not allow links.
fn link_to(blob: &Path, link: &Path) -> anyhow::Result<()> {
    let linked = || -> io::Result<()> {
        create_parent(link)?;
        match fs::remove_file(link) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // From snapshots/COMMIT/FILE to blobs/HASH, up by one for each directory in FILE.
        let root = blob.parent().and_then(Path::parent).unwrap_or(Path::new(""));
        let depth = link.strip_prefix(root).map_or(0, |path| path.components().count());
        let target: PathBuf = (1..depth).map(|_| "..").collect();
        let target = target.join(blob.strip_prefix(root).unwrap_or(blob));
        match symlink(&target, link) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            Err(_) => fs::rename(blob, link),
        }
    };
    linked().with_context(|| format!("cannot write {}", link.display()))
}

#[cfg(unix)]
use std::os::unix::fs::symlink;
#[cfg(windows)]
use std::os::windows::fs::symlink_file as symlink;
#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// One file on its way.
struct Transfer<'a> {
    client: &'a Client,
    id: &'a str,
    commit: &'a str,
    file: &'a client::File,
    blob: &'a Path,
    bar: &'a ProgressBar,
}

/// What is there of a file.
struct Part {
    file: File,
    hasher: Hasher,
    bytes: u64,
}

impl Transfer<'_> {
    fn run(&self) -> anyhow::Result<()> {
        let client::File { name, bytes, hash } = self.file;
        let path = self.blob.with_file_name(format!("{}.incomplete", hash.digits()));
        let mut part = self.part(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut resumed = part.bytes > 0;
        loop {
            self.complete(&mut part)?;
            let Part { file, hasher, .. } = part;
            let found = hasher.finish();
            if found == hash.digits() {
                file.sync_all().with_context(|| format!("cannot write {}", path.display()))?;
                drop(file);
                return fs::rename(&path, self.blob)
                    .with_context(|| format!("cannot rename {} to {}", path.display(), self.blob.display()));
            }
            drop(file);
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            if !std::mem::take(&mut resumed) {
                bail!(
                    "{}: {name} is not the file that the hub states: {hash} and {bytes} bytes were expected, the hash of what \
                     came is {found}. It was deleted. Start again; if this comes again, ask whoever runs the proxy, or the \
                     server that HF_ENDPOINT names",
                    self.id
                );
            }
            output::warning(format_args!("{name}: what an earlier download left is damaged; it starts anew"));
            part = self.part(&path).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }

    /// What an earlier attempt left, read and hashed.
    fn part(&self, path: &Path) -> io::Result<Part> {
        create_parent(path)?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut part = Part { file, hasher: self.file.hash.begin(self.file.bytes), bytes: 0 };
        if part.file.metadata()?.len() > self.file.bytes {
            part.file.set_len(0)?;
        }
        let mut buffer = vec![0; 1 << 18];
        loop {
            match part.file.read(&mut buffer)? {
                0 => return Ok(part),
                n => {
                    part.hasher.update(&buffer[..n]);
                    part.bytes += n as u64;
                    self.bar.inc(n as u64);
                }
            }
        }
    }

    /// Reads what is missing, in as many attempts as it takes while they bring something.
    fn complete(&self, part: &mut Part) -> anyhow::Result<()> {
        let client::File { name, bytes, .. } = self.file;
        let mut in_vain = 0;
        while part.bytes < *bytes {
            let before = part.bytes;
            let why = match self.attempt(part) {
                Ok(()) => continue,
                Err(HubError::Refused(error)) => return Err(error),
                Err(HubError::Unreachable(why)) => why,
            };
            in_vain = if part.bytes > before { 0 } else { in_vain + 1 };
            if in_vain == ATTEMPTS {
                bail!(
                    "{name}: {why}. {} of {} are there; start again to go on from there",
                    human_bytes(part.bytes),
                    human_bytes(*bytes)
                );
            }
            std::thread::sleep(WAIT * 2u32.pow(in_vain));
        }
        Ok(())
    }

    /// Reads until the end, or until the connection ends.
    fn attempt(&self, part: &mut Part) -> Result<(), HubError> {
        let client::File { name, bytes, hash } = self.file;
        let own =
            |error: io::Error| HubError::Refused(anyhow!(error).context(format!("cannot write {name}")));
        let (mut body, start) = self.client.read(self.id, self.commit, self.file, part.bytes)?;
        if start != part.bytes {
            // The server sends the file from its beginning.
            self.bar.set_position(self.bar.position().saturating_sub(part.bytes));
            part.file.set_len(0).and_then(|()| part.file.seek(SeekFrom::Start(0))).map_err(own)?;
            (part.bytes, part.hasher) = (0, hash.begin(*bytes));
        }
        let mut buffer = vec![0; 1 << 18];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) if part.bytes == *bytes => return Ok(()),
                Ok(0) => return Err(HubError::Unreachable("the connection was closed".into())),
                Ok(n) => n,
                Err(error) => return Err(HubError::Unreachable(format!("the connection broke ({error})"))),
            };
            if n as u64 > bytes - part.bytes {
                // Nothing that could be resumed.
                part.file.set_len(0).map_err(own)?;
                let problem =
                    anyhow!("{name}: more bytes came than the {bytes} that the hub states; start again");
                return Err(HubError::Refused(problem));
            }
            part.file.write_all(&buffer[..n]).map_err(own)?;
            part.hasher.update(&buffer[..n]);
            part.bytes += n as u64;
            self.bar.inc(n as u64);
        }
    }
}
