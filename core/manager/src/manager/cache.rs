//! Tuning results on disk: one readable JSON file per machine, written atomically, merged with what
//! other processes wrote meanwhile. Whatever is wrong with the file costs a new measurement, nothing
//! else.
//!
//! A process locks the directory to write, so that no results get lost between reading and replacing the file.
//! A process that waits in vain (or a system without such locks) writes nevertheless: then the last one wins,
//! and what the other measured is measured again. A process that is killed leaves the old file, and an
//! unfinished one that a later writer removes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File as Handle;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::measurement::{Measurement, Source};
use crate::cpu;
use bitnet_burn_formats::files;

const VERSION: u32 = 1;
/// A cache file of thousands of shapes is far below this.
const MAX_BYTES: u64 = 16 << 20;
/// How long a process waits for others that write.
const LOCK_PATIENCE: Duration = Duration::from_millis(200);

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    cpu: String,
    features: Vec<String>,
    /// By signature.
    measurements: BTreeMap<String, Vec<Measurement>>,
}

/// The measurements known for this machine.
#[derive(Debug, Default)]
pub(super) struct Cache {
    path: Option<PathBuf>,
    known: BTreeMap<String, Vec<Measurement>>,
    /// Signatures that are not in the file yet: all others are the file's, which other processes write too.
    unwritten: BTreeSet<String>,
    /// Signatures that this process has measured, and those that it has found in the file and used.
    measured: BTreeSet<String>,
    found: BTreeSet<String>,
    /// What is wrong with the file, or was.
    pub problem: Option<String>,
}

impl Cache {
    /// Reads this machine's file in `dir`, if there is one.
    pub fn open(dir: Option<&Path>) -> Self {
        let Some(dir) = dir else { return Self::default() };
        let machine = format!("{}\n{}", cpu::model(), cpu::features().join(","));
        let hash = &files::sha256(machine.as_ref())[..16];
        let path = dir.join(format!("tune-v{VERSION}-{hash}.json"));
        let (known, problem) = match read(&path) {
            Ok(known) => (known, None),
            Err(problem) => {
                tracing::warn!(path = %path.display(), problem, "ignoring the tuning cache");
                (BTreeMap::new(), Some(problem))
            }
        };
        Self { path: Some(path), known, problem, ..Self::default() }
    }

    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    pub fn get(&self, signature: &str) -> Option<&Vec<Measurement>> {
        self.known.get(signature)
    }

    /// What is known of a signature, if it will do, and where it comes from.
    pub fn look_up(
        &mut self,
        signature: &str,
        will_do: impl FnOnce(&[Measurement]) -> bool,
    ) -> Option<(Vec<Measurement>, Source)> {
        let known = self.known.get(signature).filter(|known| will_do(known))?.clone();
        if self.measured.contains(signature) {
            return Some((known, Source::Measured));
        }
        self.found.insert(signature.to_owned());
        Some((known, Source::Cached))
    }

    /// Signatures that this process has measured, and those that it has found in the file.
    pub fn counts(&self) -> (u64, u64) {
        (self.measured.len() as u64, self.found.len() as u64)
    }

    /// Keeps what this process has measured, and writes the file, after a moment's wait if others write it.
    pub fn insert(&mut self, signature: String, measurements: Vec<Measurement>) {
        self.found.remove(&signature);
        self.measured.insert(signature.clone());
        self.write(signature, measurements, LOCK_PATIENCE);
    }

    /// Replaces measurements in the middle of a matmul: if others write the file, it is written with
    /// what comes next.
    pub fn replace(&mut self, signature: String, measurements: Vec<Measurement>) {
        self.write(signature, measurements, Duration::ZERO);
    }

    fn write(&mut self, signature: String, measurements: Vec<Measurement>, patience: Duration) {
        self.known.insert(signature.clone(), measurements);
        let Some(path) = self.path.clone() else { return };
        self.unwritten.insert(signature);
        let lock = lock(&path, patience);
        if matches!(lock, Lock::Others) && patience.is_zero() {
            return;
        }
        // Another process may have written since: what it has stays.
        let mut merged = read(&path).unwrap_or_default();
        for signature in &self.unwritten {
            merged.insert(signature.clone(), self.known[signature].clone());
        }
        match write(&path, merged) {
            Ok(()) => self.unwritten.clear(),
            Err(error) => {
                let problem = format!("can't be written: {error}");
                if self.problem.as_ref() != Some(&problem) {
                    tracing::warn!(path = %path.display(), %error, "the tuning cache can't be written");
                    self.problem = Some(problem);
                }
            }
        }
    }
}

/// The directory's lock.
enum Lock {
    /// Until it is dropped.
    Held(#[expect(dead_code, reason = "released when dropped")] Handle),
    /// Others have it.
    Others,
    /// There is none here.
    None,
}

/// Asks for the directory's lock until the patience is at an end.
fn lock(path: &Path, patience: Duration) -> Lock {
    let dir = files::directory(path);
    let handle = std::fs::create_dir_all(dir).and_then(|()| Handle::open(dir));
    let Ok(handle) = handle else { return Lock::None };
    let mut waited = Duration::ZERO;
    loop {
        match handle.try_lock() {
            Ok(()) => return Lock::Held(handle),
            Err(std::fs::TryLockError::WouldBlock) if waited < patience => {
                std::thread::sleep(Duration::from_millis(2));
                waited += Duration::from_millis(2);
            }
            Err(std::fs::TryLockError::WouldBlock) => return Lock::Others,
            Err(std::fs::TryLockError::Error(_)) => return Lock::None,
        }
    }
}

fn read(path: &Path) -> Result<BTreeMap<String, Vec<Measurement>>, String> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(format!("can't be read: {error}")),
        Ok(metadata) if metadata.len() > MAX_BYTES => {
            return Err(format!("has {} bytes; no tuning cache is that long", metadata.len()));
        }
        Ok(_) => {}
    }
    let text = std::fs::read_to_string(path).map_err(|error| format!("can't be read: {error}"))?;
    let file: File = serde_json::from_str(&text).map_err(|error| format!("is damaged: {error}"))?;
    if file.version != VERSION {
        return Err(format!("has version {}, this program writes {VERSION}", file.version));
    }
    if file.cpu != cpu::model() || file.features != cpu::features() {
        return Err(format!("was measured on another machine ({})", file.cpu));
    }
    Ok(file.measurements)
}

fn write(path: &Path, measurements: BTreeMap<String, Vec<Measurement>>) -> std::io::Result<()> {
    let dir = path.parent().expect("the path has a file name in a directory");
    std::fs::create_dir_all(dir)?;
    let file = File {
        version: VERSION,
        cpu: cpu::model().to_owned(),
        features: cpu::features().iter().map(|&f| f.to_owned()).collect(),
        measurements,
    };
    files::replace_private(path, |out| {
        serde_json::to_writer_pretty(&mut *out, &file)?;
        out.write_all(b"\n")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measurement(kernel: &str) -> Vec<Measurement> {
        let kernel = kernel.into();
        vec![Measurement {
            kernel,
            median_ns: Some(5),
            min_ns: Some(4),
            runs: 20,
            note: None,
            rejected: false,
        }]
    }

    #[test]
    fn what_one_process_writes_another_reads_and_both_keep() {
        let dir = tempfile::tempdir().unwrap();
        let mut a = Cache::open(Some(dir.path()));
        let mut b = Cache::open(Some(dir.path()));
        a.insert("one".into(), measurement("x"));
        b.insert("two".into(), measurement("y"));
        let c = Cache::open(Some(dir.path()));
        assert_eq!((c.get("one").unwrap(), c.get("two").unwrap()), (&measurement("x"), &measurement("y")));
        assert_eq!(c.problem, None);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_damaged_file_is_reported_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = Cache::open(Some(dir.path())).path().unwrap().to_owned();
        for content in [
            "",
            "{",
            "[]",
            "{\"version\": 99}",
            "\u{0}\u{1}",
            "{\"version\":1,\"cpu\":\"other\",\"features\":[],\"measurements\":{}}",
        ] {
            std::fs::write(&path, content).unwrap();
            let mut cache = Cache::open(Some(dir.path()));
            assert!(cache.problem.is_some(), "{content:?}");
            cache.insert("one".into(), measurement("x"));
            assert!(Cache::open(Some(dir.path())).get("one").is_some());
        }
    }

    #[test]
    fn a_directory_that_can_not_be_written_only_costs_the_memory() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let mut cache = Cache::open(Some(&file.join("sub")));
        cache.insert("one".into(), measurement("x"));
        assert!(cache.get("one").is_some());
        assert!(cache.problem.is_some());
    }
}
