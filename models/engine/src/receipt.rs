//! Receipts: what a run was made of (model, machine, kernels, settings) and what it measured, in a file that
//! can be checked later against the files at hand, and, for a generation, by generating once more.
//!
//! A receipt is JSON whose last line but one is a seal: the SHA-256 of every byte before that line. No tool of
//! ours is needed to recompute it: `head -n -2 receipt.json | sha256sum`. The seal finds edits and damage. It
//! is no signature by a key: whoever edits a receipt on purpose can seal it again.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bitnet_burn_formats::files;
use bitnet_burn_manager::cpu;
use bitnet_burn_manager::{KernelReport, REFERENCE, Status};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::checkpoint::{Checkpoint, Content};
use crate::generate::{Finish, Generation};
use crate::load::HeadMode;
use crate::sampling::SamplingConfig;
use bitnet_burn::CacheType;
use bitnet_burn::GatedActivation;

/// The version of the format that is written and read.
pub const VERSION: u32 = 1;

/// A receipt has some kilobytes, and some more for a long prompt.
const MAX_BYTES: u64 = 16 << 20;

/// Why a receipt can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReceiptError {
    /// The file.
    #[error("cannot read the receipt {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What is in it.
    #[error("{}: not a receipt of this program: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
    /// A receipt of another time.
    #[error("{}: a receipt of version {found}; this program reads version {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
}

/// The program that ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// Its version.
    pub version: String,
    /// The revision of its source, where the build was told (`BITNET_REVISION`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// What it did: `run`, `bench` ...
    pub command: String,
    /// Its command line behind the name of the program.
    pub arguments: Vec<String>,
}

/// The machine that it ran on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// `x86_64`, `aarch64` ...
    pub architecture: String,
    /// The operating system with its version.
    pub os: String,
    /// The processor's features that kernels may ask for.
    pub features: Vec<String>,
    /// Cores that the process might use, hardware threads of one counted once.
    pub physical_cores: usize,
    /// Bytes of main memory.
    pub memory_bytes: u64,
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        let memory = sysinfo::MemoryRefreshKind::nothing().with_ram();
        let kind = sysinfo::RefreshKind::nothing().with_memory(memory);
        Self {
            cpu: cpu::model().to_owned(),
            architecture: std::env::consts::ARCH.to_owned(),
            os: sysinfo::System::long_os_version().unwrap_or_else(|| std::env::consts::OS.to_owned()),
            features: cpu::features().iter().map(|&f| f.to_owned()).collect(),
            physical_cores: cpu::physical_cores(),
            memory_bytes: sysinfo::System::new_with_specifics(kind).total_memory(),
        }
    }
}

/// A file that the model was read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Its name, without directories.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content, in hexadecimal.
    pub sha256: String,
}

impl FileRecord {
    fn of(content: &Content) -> io::Result<Self> {
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match content {
            Content::Memory(path, bytes) => {
                Ok(Self { name: name(path), bytes: bytes.len() as u64, sha256: files::sha256(bytes) })
            }
            Content::File(path) => {
                let (bytes, sha256) = sha256_of_file(path)?;
                Ok(Self { name: name(path), bytes, sha256 })
            }
        }
    }
}

/// Size and SHA-256 of a regular file.
fn sha256_of_file(path: &Path) -> io::Result<(u64, String)> {
    let context = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    // A device or a pipe has no end.
    if !std::fs::metadata(path).map_err(context)?.is_file() {
        return Err(context(io::Error::other("not a regular file")));
    }
    let mut file = std::fs::File::open(path).map_err(context)?;
    let mut hash = Sha256::new();
    let bytes = io::copy(&mut file, &mut hash).map_err(context)?;
    Ok((bytes, files::hex(&hash.finalize())))
}

/// The model that ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecord {
    /// The file or directory, as it was named.
    pub path: PathBuf,
    /// Every file that it was read from.
    pub files: Vec<FileRecord>,
}

impl ModelRecord {
    /// Of an open checkpoint: reads all of its files, which takes as long as that takes.
    ///
    /// # Errors
    /// If one can't be read.
    pub fn of(checkpoint: &Checkpoint) -> io::Result<Self> {
        let files = checkpoint.contents().iter().map(FileRecord::of).collect::<io::Result<_>>()?;
        Ok(Self { path: checkpoint.path().to_owned(), files })
    }
}

/// What a generation was asked for, all that its tokens depend on beside the model; and its tokens' digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationRecord {
    /// The prompt.
    pub prompt_token_ids: Vec<u32>,
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// How they were drawn, with the seed.
    pub sampling: SamplingConfig,
    /// Tokens that end it.
    pub stop_tokens: Vec<u32>,
    /// Texts that end it.
    pub stop_strings: Vec<String>,
    /// Rows of the prompt that were computed at once.
    pub chunk: usize,
    /// Positions of the KV cache.
    pub context: usize,
    /// Its type.
    pub kv_cache: CacheType,
    /// Whether a context that was full forgot its oldest positions.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sliding_window: bool,
    /// How the output projection was computed.
    pub lm_head: HeadMode,
    /// The feed-forward activation, where it was named beside the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_act: Option<GatedActivation>,
    /// The pre-tokenizer, where it was named beside the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre: Option<String>,
    /// What came of it.
    pub result: TokensRecord,
}

/// The tokens of a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokensRecord {
    /// How many.
    pub tokens: usize,
    /// SHA-256 of their ids as decimal numbers with a space between, which is what `--print-ids` prints.
    pub ids_sha256: String,
    /// Why it ended.
    pub finish: Finish,
}

impl TokensRecord {
    /// Of a generation that has ended.
    pub fn of(generation: &Generation) -> Self {
        let ids: Vec<String> = generation.tokens.iter().map(u32::to_string).collect();
        Self {
            tokens: generation.tokens.len(),
            ids_sha256: files::sha256(ids.join(" ").as_bytes()),
            finish: generation.finish,
        }
    }
}

/// A kernel that computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelRecord {
    /// `plugin/kernel`.
    pub kernel: String,
    /// Version of its plugin.
    pub version: String,
    /// "built in", or the plugin's file.
    pub origin: String,
    /// SHA-256 of that file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Matmuls that it computed.
    pub calls: u64,
    /// The rest of its report.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// The report of the run: figures, settings, fallbacks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// `flex`, `ndarray`, `wgpu` ...
    pub device: String,
    /// Threads of the kernels.
    pub threads: usize,
    /// Kernels that computed.
    pub kernels: Vec<KernelRecord>,
    /// Everything else that was reported.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// A receipt. See the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// Version of the format: [`VERSION`].
    pub bitnet_receipt: u32,
    /// When it was written: seconds since 1970.
    pub unix_time: u64,
    /// The program.
    pub program: Program,
    /// The machine.
    pub machine: Machine,
    /// The model.
    pub model: ModelRecord,
    /// What was generated, where something was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<GenerationRecord>,
    /// What was measured.
    pub report: Figures,
}

/// A receipt as it was read.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// What it says.
    pub receipt: Receipt,
    /// The seal that it bears.
    pub stated: String,
    /// The seal that it should bear.
    pub computed: String,
    intact: bool,
}

/// What makes the last two lines of a sealed receipt.
fn seal(sha256: &str) -> String {
    format!("  \"sha256\": \"{sha256}\"\n}}\n")
}

impl Receipt {
    /// A receipt for a run of this process, now. `report` is the run's report, with an
    /// [`Execution`](crate::report::Execution) in it.
    ///
    /// # Errors
    /// If the model's files can't be read, or `report` lacks what every report has.
    pub fn new(
        command: &str,
        checkpoint: &Checkpoint,
        report: &impl Serialize,
        generation: Option<GenerationRecord>,
    ) -> io::Result<Self> {
        Ok(Self {
            bitnet_receipt: VERSION,
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            program: Program {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                revision: option_env!("BITNET_REVISION").map(str::to_owned),
                command: command.to_owned(),
                arguments: std::env::args_os()
                    .skip(1)
                    .map(|argument| argument.to_string_lossy().into_owned())
                    .collect(),
            },
            machine: Machine::here(),
            model: ModelRecord::of(checkpoint)?,
            generation,
            report: serde_json::from_value(serde_json::to_value(report)?)?,
        })
    }

    /// The text of the file, sealed.
    ///
    /// # Errors
    /// None that a receipt of [`Receipt::new`] has: JSON has no infinities, and neither have reports.
    pub fn to_text(&self) -> Result<String, serde_json::Error> {
        let text = serde_json::to_string_pretty(self)?;
        let head = format!("{},\n", text.strip_suffix("\n}").unwrap_or(&text));
        let seal = seal(&files::sha256(head.as_bytes()));
        Ok(head + &seal)
    }

    /// Reads a receipt. That its seal is broken is no error yet: [`Sealed::check`] says so.
    ///
    /// # Errors
    /// If the file can't be read, or is no receipt of this version.
    pub fn read(path: &Path) -> Result<Sealed, ReceiptError> {
        let read = |source| ReceiptError::Read { path: path.to_owned(), source };
        let invalid = |problem: String| ReceiptError::Invalid { path: path.to_owned(), problem };
        let file = std::fs::File::open(path).map_err(read)?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(invalid(format!("it has more than {MAX_BYTES} bytes")));
        }
        let text = String::from_utf8(bytes).map_err(|_| invalid("it is not text".into()))?;

        /// What versions have in common.
        #[derive(Deserialize)]
        struct Common {
            bitnet_receipt: u64,
        }
        let Common { bitnet_receipt: found } =
            serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        if found != u64::from(VERSION) {
            return Err(ReceiptError::Version { path: path.to_owned(), found });
        }
        Sealed::parse(&text).map_err(|error| invalid(error.to_string()))
    }
}

impl Sealed {
    fn parse(text: &str) -> Result<Self, serde_json::Error> {
        // With `flatten`, the parts could not refuse what they don't know.
        let mut value: Map<String, Value> = serde_json::from_str(text)?;
        let missing = || serde::de::Error::missing_field("sha256");
        let Some(Value::String(stated)) = value.remove("sha256") else { return Err(missing()) };
        let receipt = serde_json::from_value(Value::Object(value))?;
        let head = text.rfind("  \"sha256\": ").map_or(text, |end| &text[..end]);
        let computed = files::sha256(head.as_bytes());
        // Nothing may be hidden behind the seal, either.
        let intact = text.strip_prefix(head).is_some_and(|tail| tail == seal(&computed));
        Ok(Self { receipt, stated, computed, intact })
    }

    /// Whether the file is as it was written.
    pub fn check(&self) -> Check {
        let what = "seal".to_owned();
        match self.intact {
            true => Check { what, outcome: CheckOutcome::Agrees, expected: None, found: None },
            false if self.stated == self.computed => Check::differs(
                what,
                "the seal at the end, and nothing behind it",
                "another layout: the receipt was changed after it was written",
            ),
            false => {
                let found = format!("{}: the receipt was changed after it was written", self.computed);
                Check::differs(what, &self.stated, found)
            }
        }
    }
}

/// What became of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckOutcome {
    /// It is as the receipt says.
    Agrees,
    /// What it takes is not at hand.
    Unchecked,
    /// It is not as the receipt says.
    Differs,
}

/// One thing that a receipt says, compared with what is at hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// `seal`, `model NAME`, `plugin NAME`, `kernel NAME`, `tokens`.
    pub what: String,
    /// Whether they agree.
    pub outcome: CheckOutcome,
    /// What the receipt says, where they don't.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// What there is, or why that is not known; what goes beyond the receipt, where they agree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
}

impl Check {
    fn agrees(what: impl Into<String>) -> Self {
        Self { what: what.into(), outcome: CheckOutcome::Agrees, expected: None, found: None }
    }

    fn differs(what: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        let (expected, found) = (Some(expected.into()), Some(found.into()));
        Self { what: what.into(), outcome: CheckOutcome::Differs, expected, found }
    }

    /// Something that can't be compared here.
    pub fn unchecked(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), outcome: CheckOutcome::Unchecked, expected: None, found: Some(why.into()) }
    }
}

impl Receipt {
    /// Compares the model's files with those of a model at hand. A model in one file may have another name.
    pub fn check_model(&self, at_hand: &ModelRecord) -> Vec<Check> {
        let show = |file: &FileRecord| format!("{} bytes, sha256 {}", file.bytes, file.sha256);
        let compare = |expected: &FileRecord, found: Option<&FileRecord>| {
            let what = format!("model {}", expected.name);
            match found {
                None => Check::differs(what, show(expected), "no such file"),
                Some(found) if (found.bytes, &found.sha256) == (expected.bytes, &expected.sha256) => {
                    Check::agrees(what)
                }
                Some(found) => Check::differs(what, show(expected), show(found)),
            }
        };
        let files = &self.model.files;
        if let ([expected], [found]) = (&files[..], &at_hand.files[..]) {
            return vec![compare(expected, Some(found))];
        }
        let named = |files: &[FileRecord], name: &str| files.iter().find(|file| file.name == name).cloned();
        let recorded = files.iter().map(|file| compare(file, named(&at_hand.files, &file.name).as_ref()));
        let new = at_hand.files.iter().filter(|file| named(files, &file.name).is_none());
        let new = new.map(|file| Check::differs(format!("model {}", file.name), "no such file", show(file)));
        recorded.chain(new).collect()
    }

    /// Compares the plugins whose kernels computed with files: those at hand, and those that the receipt
    /// names. Nothing of them is loaded.
    pub fn check_plugins(&self, at_hand: &[PathBuf]) -> Vec<Check> {
        let mut plugins: Vec<(&str, &str, &str)> = Vec::new();
        for kernel in &self.report.kernels {
            if let Some(sha256) = &kernel.sha256 {
                let name = kernel.kernel.split('/').next().unwrap_or_default();
                let plugin = (name, kernel.origin.as_str(), sha256.as_str());
                if !plugins.contains(&plugin) {
                    plugins.push(plugin);
                }
            }
        }
        let compare = |(name, origin, sha256): (&str, &str, &str)| {
            let what = format!("plugin {name}");
            let mut found = Vec::new();
            // A receipt is a stranger's: it may have this program read a library, and nothing else.
            let named = Some(Path::new(origin)).filter(|path| {
                path.extension().is_some_and(|extension| extension == std::env::consts::DLL_EXTENSION)
            });
            for path in at_hand.iter().map(PathBuf::as_path).chain(named) {
                match sha256_of_file(path) {
                    Ok((_, hash)) if hash == sha256 => return Check::agrees(what),
                    Ok((_, hash)) => found.push(format!("{} with sha256 {hash}", path.display())),
                    Err(_) => {}
                }
            }
            if found.is_empty() {
                return Check::unchecked(what, format!("{origin} can't be read, and no other file is named"));
            }
            found.dedup();
            Check::differs(what, format!("sha256 {sha256}"), found.join("; "))
        };
        plugins.into_iter().map(compare).collect()
    }

    /// Whether the built-in kernels that computed are among those of this build.
    pub fn check_kernels(&self, here: &[KernelReport]) -> Vec<Check> {
        let built_in = self.report.kernels.iter().filter(|kernel| kernel.sha256.is_none());
        let compare = |expected: &KernelRecord| {
            let what = format!("kernel {}", expected.kernel);
            if expected.kernel == REFERENCE {
                return Check::agrees(what);
            }
            match here.iter().find(|kernel| kernel.kernel == expected.kernel && kernel.sha256.is_none()) {
                None => Check::differs(what, format!("version {}", expected.version), "none of this name"),
                Some(found) => {
                    let mut notes = Vec::new();
                    if found.version != expected.version {
                        notes.push(format!("version {}, it was {}", found.version, expected.version));
                    }
                    if let Status::Unavailable(reason) | Status::Rejected(reason) = &found.status {
                        notes.push(format!("not usable here: {reason}"));
                    }
                    Check { found: (!notes.is_empty()).then(|| notes.join("; ")), ..Check::agrees(what) }
                }
            }
        };
        built_in.map(compare).collect()
    }
}

impl TokensRecord {
    /// Compares a generation with what it should have been.
    pub fn check(&self, found: &Self) -> Check {
        let show = |record: &Self| {
            let Self { tokens, ids_sha256, finish } = record;
            let finish = serde_json::to_string(finish).unwrap_or_default();
            format!("{tokens} tokens, sha256 of their ids {ids_sha256}, finish {finish}")
        };
        match self == found {
            true => Check::agrees("tokens"),
            false => Check::differs("tokens", show(self), show(found)),
        }
    }
}
