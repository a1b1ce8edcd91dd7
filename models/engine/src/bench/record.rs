//! A history of measurements: a file with a JSON object a line, which each run adds to.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bitnet_burn::CacheType;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{BenchOptions, BenchReport};
use crate::Engine;
use crate::checkpoint::Content;
use crate::receipt::Machine;

/// The version of the lines that this program writes and reads.
pub const VERSION: u32 = 1;

/// The largest history that is read.
const MAX_BYTES: u64 = 256 << 20;

/// Why a history can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file can't be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file can't be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A line is no record.
    #[error("{}, line {line}: no record of `bench --record`: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A line has another version.
    #[error("{}, line {line}: a record of version {found}, and this program reads version {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// Its version.
        found: u64,
    },
    /// The file has too many bytes.
    #[error("{}: a history of more than {MAX_BYTES} bytes; keep its last lines", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// No record can be compared with.
    #[error("{}: {problem}", path.display())]
    NoBaseline {
        /// The file.
        path: PathBuf,
        /// Why, for the last record.
        problem: String,
    },
}

/// The program that measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// Its version.
    pub version: String,
    /// The revision of its source, if the build was given one (`BITNET_REVISION`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Size of its file: builds of one revision may differ.
    pub bytes: u64,
    /// When its file was modified: milliseconds since 1970.
    pub modified_ms: u64,
}

impl Build {
    /// This program.
    ///
    /// # Errors
    /// If its file can't be read.
    pub fn here() -> io::Result<Self> {
        let file = std::fs::metadata(std::env::current_exe()?)?;
        let modified = file.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: option_env!("BITNET_REVISION").map(str::to_owned),
            bytes: file.len(),
            modified_ms: u64::try_from(modified.as_millis()).unwrap_or(u64::MAX),
        })
    }
}

impl std::fmt::Display for Build {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.revision {
            Some(revision) => write!(f, "bitnet {} ({revision})", self.version),
            None => write!(f, "bitnet {} (modified at Unix time {})", self.version, self.modified_ms / 1000),
        }
    }
}

/// What has to be equal, so that two measurements can be compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The name of the model's file or directory.
    pub model: String,
    /// Bytes of its files.
    pub model_bytes: u64,
    /// Devices.
    pub device: String,
    /// Threads of the kernels.
    pub threads: usize,
    /// Whether each thread was pinned to a core.
    pub pinned: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated after it.
    pub generated_tokens: usize,
    /// Rows of the prompt that were computed at once.
    pub chunk: usize,
    /// Type of the KV cache.
    pub kv_cache: CacheType,
    /// How the output projection was computed.
    pub lm_head: String,
    /// How activations were quantised.
    pub activations: String,
    /// SHA-256 of the adapter that was added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// Further context lengths, which take memory, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub contexts: Vec<usize>,
    /// Numbers of sequences at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub batches: Vec<usize>,
    /// Further lengths of the prompt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<usize>,
}

impl Settings {
    /// The settings of a measurement that is to be made.
    pub fn of(engine: &Engine, options: &BenchOptions) -> Self {
        let bytes = |content: &Content| match content {
            Content::Memory(_, bytes) => bytes.len() as u64,
            Content::File(path, _) => std::fs::metadata(path).map_or(0, |metadata| metadata.len()),
        };
        let path = engine.checkpoint().path();
        let execution = engine.execution();
        Self {
            model: path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
            model_bytes: engine.checkpoint().contents().iter().map(bytes).sum(),
            device: execution.device,
            threads: execution.threads,
            pinned: execution.pinned,
            prompt_tokens: options.prompt_tokens,
            generated_tokens: options.generated_tokens,
            chunk: options.chunk,
            kv_cache: options.kv_cache,
            lm_head: execution.lm_head.unwrap_or_default(),
            activations: execution.activations.unwrap_or_default(),
            adapter: execution.adapter.map(|adapter| adapter.sha256),
            contexts: options.contexts.clone(),
            batches: options.batches.clone(),
            prompts: options.prompts.clone(),
        }
    }
}

/// The first field in which two values differ: `threads is 2, and here 1`.
fn difference(there: &impl Serialize, here: &impl Serialize) -> Option<String> {
    let fields = |value: Result<Value, _>| match value {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    let (there, here) = (fields(serde_json::to_value(there)), fields(serde_json::to_value(here)));
    let name = there.keys().chain(here.keys()).find(|name| there.get(*name) != here.get(*name))?;
    let show = |fields: &Map<String, Value>| fields.get(name).map_or("nothing".to_owned(), Value::to_string);
    Some(format!("{name} is {}, and here {}", show(&there), show(&here)))
}

/// A line of a history.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The version of the format, 1 at present.
    pub bitnet_bench: u32,
    /// When it was measured: seconds since 1970.
    pub unix_time: u64,
    /// The program.
    pub program: Build,
    /// The machine.
    pub machine: Machine,
    /// The settings.
    pub settings: Settings,
    /// The report.
    pub report: BenchReport,
}

impl Record {
    /// The record of a measurement of this process.
    ///
    /// # Errors
    /// If the program's file can't be read.
    pub fn new(settings: Settings, report: BenchReport) -> io::Result<Self> {
        Ok(Self {
            bitnet_bench: VERSION,
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            program: Build::here()?,
            machine: Machine::here(),
            settings,
            report,
        })
    }

    /// Adds it to a history, which is made if it is missing.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn append(&self, path: &Path) -> Result<(), RecordError> {
        let write = || -> io::Result<()> {
            let line = format!("{}\n", serde_json::to_string(self)?);
            // In one call, so that lines of processes that write at once do not mix.
            OpenOptions::new().append(true).create(true).open(path)?.write_all(line.as_bytes())
        };
        write().map_err(|source| RecordError::Write { path: path.to_owned(), source })
    }

    /// Reads a history.
    ///
    /// # Errors
    /// If the file can't be read, or a line is no record.
    pub fn read(path: &Path) -> Result<Vec<Self>, RecordError> {
        /// The field that all versions have.
        #[derive(Deserialize)]
        struct Common {
            bitnet_bench: u64,
        }
        let read = |source| RecordError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        if file.metadata().map_err(read)?.len() > MAX_BYTES {
            return Err(RecordError::TooLarge { path: path.to_owned() });
        }
        let mut records = Vec::new();
        for (i, line) in BufReader::new(file.take(MAX_BYTES)).lines().enumerate() {
            let line = line.map_err(read)?;
            if line.trim().is_empty() {
                continue;
            }
            let invalid = |error: serde_json::Error| RecordError::Line {
                path: path.to_owned(),
                line: i + 1,
                problem: error.to_string(),
            };
            let Common { bitnet_bench: found } = serde_json::from_str(&line).map_err(invalid)?;
            if found != u64::from(VERSION) {
                return Err(RecordError::Version { path: path.to_owned(), line: i + 1, found });
            }
            records.push(serde_json::from_str(&line).map_err(invalid)?);
        }
        Ok(records)
    }

    /// The records of a history that a measurement of this machine with these settings can be compared with: those of the
    /// program that measured the same last.
    ///
    /// # Errors
    /// If the file can't be read, or there is none.
    pub fn baseline(path: &Path, settings: &Settings) -> Result<Vec<Self>, RecordError> {
        let mut records = Self::read(path)?;
        let none = |problem: String| RecordError::NoBaseline { path: path.to_owned(), problem };
        let Some(last) = records.last() else {
            return Err(none("there is no record; --record writes one".into()));
        };
        let here = Machine::here();
        let same_cpu = |there: &Machine| (&there.cpu, &there.architecture) == (&here.cpu, &here.architecture);
        let problem = match (same_cpu(&last.machine), difference(&last.settings, settings)) {
            (false, _) => format!("the processor is {}, and here {}", last.machine.cpu, here.cpu),
            (true, difference) => difference.unwrap_or_default(),
        };
        records.retain(|record| same_cpu(&record.machine) && record.settings == *settings);
        let Some(program) = records.last().map(|record| record.program.clone()) else {
            return Err(none(format!(
                "no record has the same machine and settings. In the last one, {problem}. Record a baseline with --record"
            )));
        };
        records.retain(|record| record.program == program);
        Ok(records)
    }
}
