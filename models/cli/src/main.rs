//! `bitnet`: runs, inspects, converts and measures BitNet models.

mod args;
mod bench;
mod chat;
mod compare;
mod constraint;
mod distill;
mod embed;
mod engine;
mod export;
mod habits;
#[cfg(feature = "hub")]
mod hub;
mod inspect;
mod kernels;
mod logits;
mod output;
mod page;
mod perplexity;
mod plan;
mod plugins;
mod prepack;
mod receipt;
mod run;
mod sampling;
mod serve;
mod settings;
mod status;
mod sweep;
mod synth;
mod tokenize;
mod train;
mod worker;

use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Instant;

use bitnet_burn::backends::manager::{gate_child, results_in_doubt};
use bitnet_burn_manager::gate;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::status::Status;

/// Run, inspect, convert and measure BitNet (1.58-bit) models.
///
/// A model is a GGUF file, a Hugging Face directory (config.json with safetensors), or hf:OWNER/NAME, a model of the Hugging
/// Face Hub.
#[derive(Debug, Parser)]
#[command(name = "bitnet", version, after_long_help = ENVIRONMENT, propagate_version = true)]
#[command(arg_required_else_help = true, subcommand_required = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const ENVIRONMENT: &str = "\
Environment (a flag wins over its variable, and a variable wins over the configuration file):
  BITNET_THREADS      number of threads that run the kernels (--threads); default: one per physical core
  BITNET_PIN          1: pin each kernel thread to a core of its own (--pin)
  BITNET_KERNEL       use only this kernel (--kernel)
  BITNET_PLUGINS      off: load no kernel plugins; user: also load those in the user's plugin directory;
                      contained: each computes in a confined process of its own (Linux); user,contained: both
  BITNET_PLUGIN_PATH  kernel plugins: absolute files and directories, separated as in PATH (--plugin)
  BITNET_PLUGIN_PINS  file of SHA-256 pins: refuse all other plugins (`bitnet plugins trust`)
  BITNET_PLUGIN_CONFIG
                      text for kernel plugins that ask for their configuration, such as name.key=value;name.other=value
  BITNET_CPU_MASK     CPU features to ignore, separated by commas
  BITNET_STRICT_MODE  turn silent fallbacks into errors (--strict): 1 for all, or a list of no-fallback,
                      quantised-kernels, gated-plugins and plausible-figures, separated by commas
  BITNET_FALLBACK     what to do if a kernel fails or becomes slow: never, on-error, threshold:1.5, adaptive
  BITNET_CACHE_DIR    directory for measurements, verdicts on plugins and the lines typed in `chat`;
                      empty: keep nothing; default: the user's cache directory
  BITNET_REMOTE_TIMEOUT
                      seconds without a sign of life until a worker (--device remote:HOST:PORT) is given up;
                      default: 10
  BITNET_API_KEY      the key that clients of `bitnet serve` must send (--api-key)
  BITNET_WORKER_SECRET
                      the secret that a worker and its clients share (--secret-file)
  BITNET_CONFIG       the configuration file; empty: none; default: the user's config.toml, if it exists
  HF_HOME             directory of Hugging Face's programs, where downloaded models are kept, in `hub`;
                      default: huggingface in the user's cache directory
  HF_HUB_CACHE        the directory of downloaded models itself
  HF_HUB_OFFLINE      1: download nothing, use what is there
  HF_ENDPOINT         the server of the Hugging Face Hub; default: https://huggingface.co
  HF_TOKEN            the user's token for the hub, for private models and those with terms
  HF_TOKEN_PATH       the file with the token; default: token in HF_HOME
  RUST_LOG            the log messages on stderr, such as `info` or `bitnet_burn_manager=debug`; default: warn

Exit status: 0 done, 1 error, 2 wrong usage. `bench`, `compare`, `plan`, `receipt check` and `train`
have more.

Examples:
  bitnet run --model model.gguf --prompt 'The capital of France is'
  bitnet run --model hf:OWNER/NAME:FILE.gguf --prompt 'The capital of France is'
  bitnet chat --model model.gguf
  bitnet serve --model model.gguf --listen 127.0.0.1:8080
  bitnet inspect --model model.gguf --check
  bitnet embed --model model.gguf 'One text' 'Another text'
  bitnet synth --shape 2b-4t --out synthetic.gguf
  bitnet bench --model synthetic.gguf -p 128 -n 64 --threads 1
  bitnet plan --model model.gguf
  bitnet compare model.gguf logits.npy --tokens-file ids.txt
  bitnet kernels --explain 6912x2560
  bitnet convert model/ --to gguf";

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Chat(chat::ChatArgs),
    Serve(serve::ServeArgs),
    Inspect(inspect::InspectArgs),
    Tokenize(tokenize::TokenizeArgs),
    Embed(embed::EmbedArgs),
    Kernels(kernels::KernelsArgs),
    Bench(Box<bench::BenchArgs>),
    Plan(plan::PlanArgs),
    Synth(synth::SynthArgs),
    Perplexity(perplexity::PerplexityArgs),
    Logits(logits::LogitsArgs),
    Compare(Box<compare::CompareArgs>),
    Train(train::TrainArgs),
    Distill(distill::DistillArgs),
    Export(export::ExportArgs),
    Convert(export::ConvertArgs),
    Prepack(prepack::PrepackArgs),
    Plugins(plugins::PluginsArgs),
    Worker(worker::WorkerArgs),
    Receipt(receipt::ReceiptArgs),
}

/// The stack of all that the program does. The main thread's own may be too small: `ulimit -s`, or Windows' 1 MiB.
const STACK: usize = 8 << 20;

/// When the program started.
static STARTED: OnceLock<Instant> = OnceLock::new();

/// When the program started: what runs before `main` is not counted.
pub(crate) fn started() -> Instant {
    *STARTED.get_or_init(Instant::now)
}

fn main() -> ExitCode {
    started();
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == gate::CHILD_COMMAND) {
        // Plugins are tried, or computed with, in this process, on its first thread: it confines itself.
        output::start_logging();
        std::process::exit(gate_child(arguments));
    }
    let thread = std::thread::Builder::new().name("main".into()).stack_size(STACK).spawn(program);
    match thread {
        // (A panic has been told, and has this status in all Rust programs.)
        Ok(thread) => thread.join().unwrap_or(ExitCode::from(101)),
        Err(error) => {
            output::print_error(&anyhow::Error::new(error).context("the system gives the program no thread"));
            Status::Error.into()
        }
    }
}

fn program() -> ExitCode {
    bitnet_burn_formats::outlive_truncation();
    let cli = parse();
    output::start_logging();
    output::take_stdout();
    bitnet_burn_manager::guard_process();
    let result = match cli.command {
        Command::Run(args) => run::run(*args),
        Command::Chat(args) => chat::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Embed(args) => embed::run(args),
        Command::Kernels(args) => kernels::run(args),
        Command::Synth(args) => synth::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Train(args) => train::run(args),
        Command::Distill(args) => distill::run(args),
        Command::Export(args) => export::export(args),
        Command::Convert(args) => export::convert(args),
        Command::Prepack(args) => prepack::run(args),
        Command::Plugins(args) => plugins::run(args),
        Command::Worker(args) => worker::run(args),
        Command::Bench(args) => return exit(bench::run(*args)),
        Command::Compare(args) => return exit(compare::run(*args)),
        Command::Plan(args) => return exit(plan::run(args)),
        Command::Receipt(args) => return exit(receipt::run(args)),
    };
    exit(result.map(|()| Status::Done.into()))
}

/// The command line; ends the program where it asks for help or is wrong.
fn parse() -> Cli {
    let mut command = habits::with_negative_numbers(Cli::command());
    let matches = command.try_get_matches_from_mut(std::env::args_os());
    let parsed = matches.and_then(|m| Cli::from_arg_matches(&m).map_err(|error| error.format(&mut command)));
    parsed.unwrap_or_else(|error| {
        let arguments: Vec<_> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
        habits::explain(error, &arguments).exit()
    })
}

fn exit(result: anyhow::Result<ExitCode>) -> ExitCode {
    let in_doubt = results_in_doubt();
    match result {
        // A line on stderr has named the file.
        Ok(_) if bitnet_burn_formats::any_truncated() => Status::Error.into(),
        Ok(_) if in_doubt > 0 => {
            output::warning(format_args!(
                "a plugin turned out to be wrong, and {in_doubt} results that it gave before were not compared: what is \
                 above may be wrong. Run the command again: the plugin is in quarantine"
            ));
            Status::Doubt.into()
        }
        Ok(code) => code,
        // The reader closed the pipe, as in `bitnet inspect ... | head`.
        Err(error) if output::is_broken_pipe(&error) => Status::Done.into(),
        Err(error) => {
            output::print_error(&error);
            Status::Error.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::habits::with_negative_numbers(super::Cli::command()).debug_assert();
    }
}
