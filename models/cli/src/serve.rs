//! `bitnet serve`: models behind an HTTP API.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::{Engine, EngineOptions};
use bitnet_burn_server::{ModelSource, Models, ModelsOptions, SchedulerLimits, ServerOptions};
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::args::{DraftArgs, GapArgs, LoadArgs, Model, positive, size};
use crate::output;
use crate::status::Status;

/// Serve models over HTTP, with OpenAI's API and a chat page
///
/// An answer depends on its request alone: the same request with the same seed has the same answer beside any other
/// requests, and from `bitnet run` (on CPUs). Each answer names a receipt that `bitnet receipt check --rerun` confirms.
///
/// The server prints one line with its address when it is ready, and serves until Ctrl-C or SIGTERM. Answers that are not
/// complete then have 10 seconds to finish; a second signal ends them at once.
///
/// The default address can be reached from this machine only. Every other one needs --api-key, or --no-api-key. Nothing is
/// encrypted: put a reverse proxy with TLS in front of it (docs/serving.md).
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    /// A model: a GGUF file, a Hugging Face directory, or hf:OWNER/NAME. NAME=PATH gives it the name that requests use
    /// [default: its file's name]. Can be repeated: several models are loaded when they are asked for
    /// [default: the built-in story model]
    #[arg(
        long = "model",
        short,
        value_name = "[NAME=]PATH",
        value_parser = OsStringValueParser::new().try_map(NamedModel::parse),
        help_heading = "Model"
    )]
    models: Vec<NamedModel>,
    #[command(flatten)]
    gaps: GapArgs,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    draft: DraftArgs,
    /// The address to listen on; port 0 takes a free port
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080", help_heading = "Server")]
    listen: String,
    /// Print the line as a JSON object
    #[arg(long, help_heading = "Server")]
    json: bool,
    /// A file with the key that clients must send as `Authorization: Bearer KEY` [default: BITNET_API_KEY, or none]
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    api_key: Option<PathBuf>,
    /// Let everybody ask who reaches an address other than this machine's own
    #[arg(long, conflicts_with = "api_key", help_heading = "Server")]
    no_api_key: bool,
    /// Let web pages of this origin, such as `https://example.org`, use the API; * for all. Can be repeated
    #[arg(long, value_name = "ORIGIN", help_heading = "Server")]
    cors: Vec<String>,
    /// Requests that are computed at once [default: 16]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Server")]
    parallel: Option<usize>,
    /// Requests that wait; more are refused with status 429 [default: 256]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Server")]
    queue: Option<usize>,
    /// Tokens of an answer at most, whatever a request asks for [default: as the context allows]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Server")]
    max_tokens: Option<usize>,
    /// Seconds that a request may take, with its time in the queue [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Server")]
    request_time: Option<Duration>,
    /// Memory of each model's KV cache, with what it keeps of earlier prompts (such as 4GB) [default: of 16 full contexts, or
    /// three quarters of the free memory]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Server")]
    cache_memory: Option<u64>,
    /// Memory of the loaded models together, by the size of their files: the least recently used ones are unloaded for
    /// another one [default: all stay loaded]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Server")]
    model_memory: Option<u64>,
    /// Unload a model that was not used for this long [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Server")]
    idle_time: Option<Duration>,
}

const EXAMPLES: &str = "\
Examples:
  bitnet serve                                             # the built-in model, a chat page at http://127.0.0.1:8080
  bitnet serve -m model.gguf --listen 127.0.0.1:0 --json
  bitnet serve -m small=small.gguf -m large=large.gguf --model-memory 8GB
  (umask 077; openssl rand -hex 32 > key)
  bitnet serve -m model.gguf --listen 0.0.0.0:8080 --api-key key
  curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' \\
    -d '{\"prompt\": \"There was\", \"max_tokens\": 32, \"seed\": 1}'";

/// A model with the name that requests use.
#[derive(Clone, Debug)]
struct NamedModel {
    name: String,
    model: Model,
}

impl NamedModel {
    fn parse(text: OsString) -> Result<Self, String> {
        // A path with a `=` behind a `/` is no name.
        let named = text.to_str().and_then(|text| text.split_once('='));
        let (name, place) = match named.filter(|(name, _)| !name.contains(['/', '\\', ':'])) {
            Some((name, place)) => (Some(name.to_owned()), place.into()),
            None => (None, text.clone()),
        };
        let model = Model::parse(place)?;
        let name = match (name, &model) {
            (Some(name), _) => name,
            (None, Model::Path(path)) => name_of(path),
            #[cfg(feature = "hub")]
            (None, hub) => hub.to_string().trim_start_matches("hf:").to_owned(),
        };
        if name.is_empty() || name.chars().any(char::is_control) {
            return Err("its name is empty or has control characters: give another one with NAME=PATH".into());
        }
        Ok(Self { name, model })
    }
}

/// The name of a file without `.gguf`, or of a directory.
fn name_of(path: &Path) -> String {
    let gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    let name = if gguf { path.file_stem() } else { path.file_name() };
    name.unwrap_or_default().to_string_lossy().into_owned()
}

/// From a second to a year.
fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 1..=31_536_000) => Ok(Duration::from_secs(seconds)),
        _ => Err("it must be a number from 1 to 31536000".into()),
    }
}

/// Bytes of a model's files.
fn bytes_of(path: &Path) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |meta| meta.len());
    match std::fs::read_dir(path) {
        Ok(files) => files.flatten().map(|file| size(&file.path())).sum(),
        Err(_) => size(path),
    }
}

#[derive(serde::Serialize)]
struct Serves<'a> {
    address: String,
    models: Vec<&'a str>,
    version: &'static str,
}

pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // The kernels have threads of their own.
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the server's threads")?;
    let result = runtime.block_on(serve(args));
    // A model may still be loading.
    runtime.shutdown_background();
    result
}

async fn serve(mut args: ServeArgs) -> anyhow::Result<()> {
    // First of all, so that a wrong address fails at once.
    let listener = TcpListener::bind(&args.listen).await.with_context(|| {
        format!("cannot listen on {}; an address is HOST:PORT, and port 0 takes a free one", args.listen)
    })?;
    let address = listener.local_addr().context("the address that the server listens on is unknown")?;
    let options = args.server_options(address)?;
    if args.load.adapter.is_some() && args.models.len() > 1 {
        bail!("--adapter is for one model, and {} are to be served", args.models.len());
    }
    if args.draft.draft_model.is_some() && args.models.len() > 1 {
        bail!("--draft-model guesses for one model: serve {} models by as many servers", args.models.len());
    }
    // What is missing of it is downloaded before the server is ready.
    let of_draft = args.draft.draft_model.as_ref().map(Model::locate).transpose()?;
    let draft_bytes = of_draft.map_or(0, |path| bytes_of(&path));
    let load = Arc::new(Loading { load: args.load, gaps: args.gaps, draft: args.draft.clone() });
    let mut sources = Vec::new();
    for NamedModel { name, model } in std::mem::take(&mut args.models) {
        // What is missing of a model on the hub is downloaded before the server is ready.
        let path = model.locate()?.into_owned();
        // Before anybody asks for it.
        std::fs::metadata(&path).with_context(|| format!("--model: cannot open {}", path.display()))?;
        let load = load.clone();
        let bytes = bytes_of(&path) + draft_bytes;
        let open = move || load.open(|gaps| Ok(Checkpoint::open(&path, &gaps.options())?));
        sources.push(ModelSource { name, bytes, open: Box::new(open) });
    }
    if sources.is_empty() {
        sources.push(built_in(load)?);
    }
    let names: Vec<String> = sources.iter().map(|source| source.name.clone()).collect();
    let models = Models::new(
        sources,
        ModelsOptions {
            memory: args.model_memory,
            idle: args.idle_time,
            scheduler: SchedulerLimits {
                parallel: args.parallel,
                queue: args.queue,
                cache_bytes: args.cache_memory,
                draft: args.draft.draft,
            },
        },
    );
    let models = Arc::new(models.map_err(|problem| anyhow!("--model: {problem}"))?);
    let stop = Arc::new(Notify::new());
    let signal = stop.clone();
    let signals = std::sync::atomic::AtomicUsize::new(0);
    ctrlc::set_handler(move || match signals.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
        0 => signal.notify_one(),
        _ => Status::Interrupted.exit(),
    })
    .context("cannot catch Ctrl-C")?;
    let stopped = async move { stop.notified().await };
    let server = bitnet_burn_server::serve(listener, models.clone(), options, stopped);
    tokio::pin!(server);
    // A single model is loaded at once; `/health` says so meanwhile.
    if names.len() == 1 {
        tokio::select! {
            loaded = models.load_first() => loaded.map_err(|error| match error.downcast::<Shown>() {
                Ok(shown) => shown.0,
                Err(error) => anyhow!(error),
            })?,
            result = &mut server => return result.map_err(|problem| anyhow!("--cors: {problem}")),
        }
    }
    if args.json {
        let models = names.iter().map(String::as_str).collect();
        let version = env!("CARGO_PKG_VERSION");
        output::print_json(&Serves { address: address.to_string(), models, version })?;
    } else {
        output::print(format_args!("listening at http://{address}, {}", names.join(", ")))?;
    }
    server.await.map_err(|problem| anyhow!("--cors: {problem}"))
}

/// An error with its causes, which the server's log shows in one line.
#[derive(Debug)]
struct Shown(anyhow::Error);

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for Shown {}

/// How models are opened.
struct Loading {
    load: LoadArgs,
    gaps: GapArgs,
    draft: DraftArgs,
}

impl Loading {
    fn open(
        &self,
        checkpoint: impl FnOnce(&GapArgs) -> anyhow::Result<Checkpoint>,
    ) -> Result<Engine, bitnet_burn_server::LoadError> {
        let engine = || {
            let draft = self.draft.open(&self.load, &self.gaps)?;
            let started = Instant::now();
            let checkpoint = checkpoint(&self.gaps)?;
            let set = |options: EngineOptions| options.packed_in_background().draft_model(draft);
            self.load.open(checkpoint, started, &self.gaps, set)
        };
        engine().map_err(|error: anyhow::Error| Box::new(Shown(error)).into())
    }
}

#[cfg(feature = "default-model")]
fn built_in(load: Arc<Loading>) -> anyhow::Result<ModelSource> {
    let open = move || load.open(|_| Ok(bitnet_burn_engine::embedded::checkpoint()?));
    Ok(ModelSource { name: "stories".into(), bytes: 0, open: Box::new(open) })
}

#[cfg(not(feature = "default-model"))]
fn built_in(_: Arc<Loading>) -> anyhow::Result<ModelSource> {
    bail!("--model is missing, and this build has no built-in model (feature default-model)")
}

impl ServeArgs {
    fn server_options(&self, address: SocketAddr) -> anyhow::Result<ServerOptions> {
        let api_key = self.key()?;
        let local = address.ip().is_loopback();
        if !local && api_key.is_none() && !self.no_api_key {
            bail!(
                "--listen {}: other machines can reach this address. Give a key with --api-key FILE, or let everybody ask \
                 with --no-api-key",
                self.listen
            );
        }
        let defaults = ServerOptions::default();
        Ok(ServerOptions {
            // A proxy on this machine sends its own names, so a key is enough.
            local_names_only: local && api_key.is_none(),
            api_key,
            cors: self.cors.clone(),
            max_tokens: self.max_tokens.unwrap_or(defaults.max_tokens),
            request_time: self.request_time.unwrap_or(defaults.request_time),
            ..defaults
        })
    }

    /// The key in the file, or in the variable.
    fn key(&self) -> anyhow::Result<Option<String>> {
        if self.no_api_key {
            return Ok(None);
        }
        let (key, from) = match &self.api_key {
            Some(path) => {
                let key = std::fs::read_to_string(path)
                    .with_context(|| format!("--api-key: cannot read {} as text", path.display()))?;
                #[cfg(unix)]
                {
                    use std::os::unix::fs::PermissionsExt as _;
                    let mode = std::fs::metadata(path).map_or(0, |meta| meta.permissions().mode());
                    if mode & 0o077 != 0 {
                        let path = path.display();
                        bail!(
                            "--api-key {path}: other users may read it; make it private with: chmod 600 {path}"
                        );
                    }
                }
                (key, path.display().to_string())
            }
            None => match std::env::var("BITNET_API_KEY") {
                Ok(key) => (key, "BITNET_API_KEY".to_owned()),
                Err(std::env::VarError::NotPresent) => return Ok(None),
                Err(error) => bail!("BITNET_API_KEY: {error}"),
            },
        };
        let key = key.trim();
        if key.len() < 8 || key.contains(|c: char| c.is_whitespace() || c.is_control()) {
            bail!("{from}: an API key has at least 8 characters, and no white space among them");
        }
        Ok(Some(key.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_names() {
        let name =
            |text: &str| NamedModel::parse(text.into()).map(|model| (model.name, model.model.to_string()));
        let named = |name: &str, path: &str| Ok((name.to_owned(), path.to_owned()));
        assert_eq!(name("a/b/small.gguf"), named("small", "a/b/small.gguf"));
        assert_eq!(name("a/b/model.v2"), named("model.v2", "a/b/model.v2"));
        assert_eq!(name("big=a/b=c.gguf"), named("big", "a/b=c.gguf"));
        assert_eq!(name("./a=b.gguf"), named("a=b", "./a=b.gguf"));
        #[cfg(feature = "hub")]
        assert_eq!(name("hf:owner/name"), named("owner/name", "hf:owner/name"));
        for wrong in ["=a.gguf", "/", "a\n=b"] {
            assert!(name(wrong).is_err(), "{wrong}");
        }
    }
}
