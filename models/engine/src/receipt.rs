//! Receipts of runs: files that record the model, the machine, the kernels, the settings and the measurements.
//! A receipt can be checked later against the files at hand and, for a generation, by generating again.
//!
//! A receipt is JSON. Its second to last line is a seal: the SHA-256 of every byte before that line. Standard tools
//! can compute it: `head -n -2 receipt.json | sha256sum`. The seal finds damage and careless edits. It is not a
//! signature: there is no key, and whoever edits a receipt on purpose can seal it again.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bitnet_burn_formats::files;
use bitnet_burn_manager::cpu;
use bitnet_burn_manager::{KernelReport, REFERENCE, Status};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::Adapter;
use crate::checkpoint::{Checkpoint, Content};
use crate::constraint::Constraint;
use crate::generate::{Finish, Generation};
use crate::load::{ActivationRule, HeadMode};
use crate::sampling::SamplingConfig;
use bitnet_burn::CacheType;
use bitnet_burn::GatedActivation;

/// The version of the receipt format that this program writes and reads.
pub const VERSION: u32 = 1;

/// The largest receipt that is read. Receipts usually have a few kilobytes, and more with a long prompt.
const MAX_BYTES: u64 = 16 << 20;

/// Why a receipt can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReceiptError {
    /// The file can't be read.
    #[error("cannot read the receipt {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file holds no valid receipt.
    #[error("{}: not a receipt of this program: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The mistake and its place.
        problem: String,
    },
    /// The receipt has another version of the format.
    #[error("{}: this is a receipt of version {found}, and this program reads version {VERSION}", path.display())]
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
    /// The revision of its source, if the build was given one (`BITNET_REVISION`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The subcommand: `run`, `bench` ...
    pub command: String,
    /// The command line after the name of the program.
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
    /// CPU features that kernels may need.
    pub features: Vec<String>,
    /// Physical cores that the process may use.
    pub physical_cores: usize,
    /// Bytes of main memory.
    pub memory_bytes: u64,
}

impl Machine {
    /// This machine.
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
            Content::File(path, identity) => {
                let (bytes, sha256) = files::sha256_of_file(path)?;
                // What computed is what was opened. After the hashing: what it read is the same, then.
                identity.check(path).map_err(io::Error::other)?;
                Ok(Self { name: name(path), bytes, sha256 })
            }
        }
    }
}

/// The model that ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecord {
    /// The path of the file or directory, as the user gave it.
    pub path: PathBuf,
    /// Every file that the model was read from.
    pub files: Vec<FileRecord>,
    /// The adapter that was added to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterRecord>,
}

/// A LoRA adapter that was added to a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterRecord {
    /// The directory, as the user gave it.
    pub path: PathBuf,
    /// Its files.
    pub files: Vec<FileRecord>,
}

impl ModelRecord {
    /// The record of an open checkpoint. This reads all of its files to hash them.
    ///
    /// # Errors
    /// If a file can't be read, or is not the one that was opened any more.
    pub fn of(checkpoint: &Checkpoint) -> io::Result<Self> {
        let files = checkpoint.contents().iter().map(FileRecord::of).collect::<io::Result<_>>()?;
        Ok(Self { path: checkpoint.path().to_owned(), files, adapter: None })
    }

    /// With the adapter that is added to the model, whose files are hashed.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn with_adapter(self, adapter: Option<&Adapter>) -> io::Result<Self> {
        let record = |adapter: &Adapter| {
            let files = adapter.contents().iter().map(FileRecord::of).collect::<io::Result<_>>()?;
            Ok::<_, io::Error>(AdapterRecord { path: adapter.path().to_owned(), files })
        };
        Ok(Self { adapter: adapter.map(record).transpose()?, ..self })
    }

    /// That the files of an open checkpoint are still the ones that were opened, as far as the system tells without
    /// reading them: a record that was made since holds for them.
    ///
    /// # Errors
    /// If a file was replaced or changed.
    pub fn still_holds(checkpoint: &Checkpoint) -> io::Result<()> {
        checkpoint.contents().iter().try_for_each(|content| match content {
            Content::Memory(..) => Ok(()),
            Content::File(path, identity) => identity.check(path).map_err(io::Error::other),
        })
    }
}

/// The settings of a generation: with the model, they determine its tokens. Also the digest of these tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationRecord {
    /// The prompt.
    pub prompt_token_ids: Vec<u32>,
    /// The largest number of tokens to generate.
    pub max_new_tokens: usize,
    /// How tokens were sampled, with the seed.
    pub sampling: SamplingConfig,
    /// Tokens that end the generation.
    pub stop_tokens: Vec<u32>,
    /// Texts that end the generation.
    pub stop_strings: Vec<String>,
    /// The form that the answer had to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub constraint: Option<Constraint>,
    /// Rows of the prompt that were computed at once.
    pub chunk: usize,
    /// Positions of the KV cache.
    pub context: usize,
    /// Type of the KV cache.
    pub kv_cache: CacheType,
    /// Whether a full context forgot its oldest positions.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sliding_window: bool,
    /// How the output projection was computed.
    pub lm_head: HeadMode,
    /// How activations were quantised.
    #[serde(default)]
    pub activations: ActivationRule,
    /// The feed-forward activation, if the user named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_act: Option<GatedActivation>,
    /// The pre-tokenizer, if the user named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre: Option<String>,
    /// The generated tokens.
    pub result: TokensRecord,
}

/// Number and digest of generated tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokensRecord {
    /// Number of tokens.
    pub tokens: usize,
    /// SHA-256 of their ids as decimal numbers separated by spaces, as `--print-ids` prints them.
    pub ids_sha256: String,
    /// Why the generation ended.
    pub finish: Finish,
}

impl TokensRecord {
    /// The record of a finished generation.
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
    /// SHA-256 of the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Number of matmuls that it computed.
    pub calls: u64,
    /// The rest of the kernel's report.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// The report of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// `flex`, `ndarray`, `wgpu` ...
    pub device: String,
    /// Threads of the kernels.
    pub threads: usize,
    /// Kernels that computed.
    pub kernels: Vec<KernelRecord>,
    /// The rest of the report.
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
    /// The generation, if the command generated tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<GenerationRecord>,
    /// The report of the run.
    pub report: Figures,
}

/// A receipt that was read from a file.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// The content.
    pub receipt: Receipt,
    /// The seal in the file.
    pub stated: String,
    /// The seal computed from the file.
    pub computed: String,
    intact: bool,
}

/// The last two lines of a sealed receipt.
fn seal(sha256: &str) -> String {
    format!("  \"sha256\": \"{sha256}\"\n}}\n")
}

impl Receipt {
    /// Makes a receipt for a run of this process. `report` is the run's report and contains the fields of an
    /// [`Execution`](crate::report::Execution).
    ///
    /// # Errors
    /// If `report` lacks these fields.
    pub fn new(
        command: &str,
        model: ModelRecord,
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
            model,
            generation,
            report: serde_json::from_value(serde_json::to_value(report)?)?,
        })
    }

    /// The sealed text of the file.
    ///
    /// # Errors
    /// If a number is not finite, which can't be written as JSON. Receipts of [`Receipt::new`] have no such numbers.
    pub fn to_text(&self) -> Result<String, serde_json::Error> {
        let text = serde_json::to_string_pretty(self)?;
        let head = format!("{},\n", text.strip_suffix("\n}").unwrap_or(&text));
        let seal = seal(&files::sha256(head.as_bytes()));
        Ok(head + &seal)
    }

    /// Reads a receipt. It does not check the seal; [`Sealed::check`] does.
    ///
    /// # Errors
    /// If the file can't be read, or is not a receipt of this version.
    pub fn read(path: &Path) -> Result<Sealed, ReceiptError> {
        let read = |source| ReceiptError::Read { path: path.to_owned(), source };
        let invalid = |problem: String| ReceiptError::Invalid { path: path.to_owned(), problem };
        let file = std::fs::File::open(path).map_err(read)?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(invalid(format!("the file has more than {MAX_BYTES} bytes")));
        }
        let text = String::from_utf8(bytes).map_err(|_| invalid("the file is not text".into()))?;

        /// The field that all versions have.
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
        // Not a struct with `flatten`, because that would accept unknown fields.
        let mut value: Map<String, Value> = serde_json::from_str(text)?;
        let missing = || serde::de::Error::missing_field("sha256");
        let Some(Value::String(stated)) = value.remove("sha256") else { return Err(missing()) };
        let receipt = serde_json::from_value(Value::Object(value))?;
        let head = text.rfind("  \"sha256\": ").map_or(text, |end| &text[..end]);
        let computed = files::sha256(head.as_bytes());
        // There must be nothing after the seal.
        let intact = text.strip_prefix(head).is_some_and(|tail| tail == seal(&computed));
        Ok(Self { receipt, stated, computed, intact })
    }

    /// Checks whether the file is unchanged since it was written.
    pub fn check(&self) -> Check {
        let what = "seal".to_owned();
        match self.intact {
            true => Check { what, outcome: CheckOutcome::Agrees, expected: None, found: None },
            false if self.stated == self.computed => Check::differs(
                what,
                "the seal at the end, and nothing after it",
                "another layout: the receipt was changed after it was written",
            ),
            false => {
                let found = format!("{}: the receipt was changed after it was written", self.computed);
                Check::differs(what, &self.stated, found)
            }
        }
    }
}

/// The result of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckOutcome {
    /// The receipt is right.
    Agrees,
    /// Something that the check needs is missing.
    Unchecked,
    /// Something differs from the receipt.
    Differs,
}

/// One part of a receipt, compared with the files or results at hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// `seal`, `model NAME`, `plugin NAME`, `kernel NAME`, `tokens`.
    pub what: String,
    /// The result.
    pub outcome: CheckOutcome,
    /// The value in the receipt, if something differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// The value at hand; or why there is none; or, if both agree, a remark.
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

    /// A part that can't be compared.
    pub fn unchecked(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), outcome: CheckOutcome::Unchecked, expected: None, found: Some(why.into()) }
    }
}

impl Receipt {
    /// Compares the model's files, and its adapter's, with those of a model at hand. If the model is a single file, its name
    /// may differ.
    pub fn check_model(&self, at_hand: &ModelRecord) -> Vec<Check> {
        let adapter =
            |of: &Option<AdapterRecord>| of.iter().flat_map(|of| of.files.clone()).collect::<Vec<_>>();
        let (recorded, found) = (adapter(&self.model.adapter), adapter(&at_hand.adapter));
        let mut checks = check_files("model", &self.model.files, &at_hand.files);
        checks.extend(check_files("adapter", &recorded, &found));
        checks
    }

    /// Compares the plugins whose kernels computed with the files at hand and with the files that the receipt
    /// names. It only hashes the files and does not load them.
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
            // Receipts come from strangers. A receipt must not make this program read other files than libraries.
            let named = Some(Path::new(origin)).filter(|path| {
                path.extension().is_some_and(|extension| extension == std::env::consts::DLL_EXTENSION)
            });
            for path in at_hand.iter().map(PathBuf::as_path).chain(named) {
                match files::sha256_of_file(path) {
                    Ok((_, hash)) if hash == sha256 => return Check::agrees(what),
                    Ok((_, hash)) => found.push(format!("{} with sha256 {hash}", path.display())),
                    Err(_) => {}
                }
            }
            if found.is_empty() {
                return Check::unchecked(
                    what,
                    format!("{origin} can't be read, and no other file was given"),
                );
            }
            found.dedup();
            Check::differs(what, format!("sha256 {sha256}"), found.join("; "))
        };
        plugins.into_iter().map(compare).collect()
    }

    /// Checks whether this build has the built-in kernels that computed.
    pub fn check_kernels(&self, here: &[KernelReport]) -> Vec<Check> {
        let built_in = self.report.kernels.iter().filter(|kernel| kernel.sha256.is_none());
        let compare = |expected: &KernelRecord| {
            let what = format!("kernel {}", expected.kernel);
            if expected.kernel == REFERENCE {
                return Check::agrees(what);
            }
            match here.iter().find(|kernel| kernel.kernel == expected.kernel && kernel.sha256.is_none()) {
                None => {
                    Check::differs(what, format!("version {}", expected.version), "no kernel of this name")
                }
                Some(found) => {
                    let mut notes = Vec::new();
                    if found.version != expected.version {
                        notes.push(format!("version {}, not {}", found.version, expected.version));
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

/// Compares recorded files with those at hand. If there is a single one, its name may differ.
fn check_files(kind: &str, recorded: &[FileRecord], at_hand: &[FileRecord]) -> Vec<Check> {
    let show = |file: &FileRecord| format!("{} bytes, sha256 {}", file.bytes, file.sha256);
    let compare = |expected: &FileRecord, found: Option<&FileRecord>| {
        let what = format!("{kind} {}", expected.name);
        match found {
            None => Check::differs(what, show(expected), "no such file"),
            Some(found) if (found.bytes, &found.sha256) == (expected.bytes, &expected.sha256) => {
                Check::agrees(what)
            }
            Some(found) => Check::differs(what, show(expected), show(found)),
        }
    };
    if let ([expected], [found]) = (recorded, at_hand) {
        return vec![compare(expected, Some(found))];
    }
    let named = |files: &[FileRecord], name: &str| files.iter().find(|file| file.name == name).cloned();
    let checks = recorded.iter().map(|file| compare(file, named(at_hand, &file.name).as_ref()));
    let new = at_hand.iter().filter(|file| named(recorded, &file.name).is_none());
    let new = new.map(|file| Check::differs(format!("{kind} {}", file.name), "no such file", show(file)));
    checks.chain(new).collect()
}

impl TokensRecord {
    /// Compares a new generation with this record.
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
