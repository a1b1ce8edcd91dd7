//! `bitnet chat`: a conversation in the terminal.

mod lines;

use std::fs::File;
use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, anyhow, bail};
use bitnet_burn_engine::chat::{ChatError, Message};
use bitnet_burn_engine::generate::{Finish, GenerateOptions};
use bitnet_burn_engine::speculate::DraftCounts;
use bitnet_burn_engine::text::count;
use bitnet_burn_engine::{Answer, Engine, EngineError, Session};
use clap::Args;

use self::lines::{Input, Lines, Next};
use crate::args::{DraftArgs, EngineArgs, positive, read_template};
use crate::output;
use crate::sampling::SamplingArgs;

/// Talk to a model
///
/// A conversation, with the model's chat template. The KV cache is kept: an answer computes the new message alone, and a status
/// line says what it computed. /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the program.
///
/// If stdin is no terminal, each line of it is a message or a command, and stdout has the answers alone. A line that fails is
/// reported on stderr; the others are done, and the exit status is 1.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ChatArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    draft: DraftArgs,
    /// The system's message
    #[arg(long, value_name = "TEXT", help_heading = "Chat")]
    system: Option<String>,
    /// A chat template (Jinja) in place of the model's
    #[arg(long, value_name = "FILE", help_heading = "Chat")]
    chat_template: Option<PathBuf>,
    /// Tokens of an answer at most
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1024, value_parser = positive)]
    max_new_tokens: usize,
    /// No status line behind an answer
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

const EXAMPLES: &str = "\
Examples:
  bitnet chat -m model.gguf
  bitnet chat -m model.gguf --system 'Answer in one sentence.' --temperature 0.7 --top-p 0.9
  printf '%s\\n' 'Why is the sky blue?' 'And at dusk?' '/save sky.json' | bitnet chat -m model.gguf --quiet";

const HELP: &str = "\
/system TEXT  Replaces the system's message; without TEXT, removes it
/reset        Forgets the conversation, and keeps the system's message
/undo         Takes back the last message and its answer
/save FILE    Writes the conversation as JSON
/load FILE    Goes on with a conversation that was saved, in place of this one
/quit         Ends the program, as Ctrl-D does
A line that ends in \\ goes on in the next one.
\"\"\" begins and ends a message of several lines.
A message that begins with / needs a space in front.
Ctrl-C stops an answer.";

/// The largest conversation that is loaded.
const MAX_BYTES: u64 = 16 << 20;

pub fn run(args: ChatArgs) -> anyhow::Result<()> {
    let sampling = args.sampling.config(false)?;
    let template = args.chat_template.as_deref().map(read_template).transpose()?;
    let draft = args.draft.open(&args.engine.load, &args.engine.file.gaps)?;
    let engine = args.engine.open(|options| options.packed_in_background().draft_model(draft))?;
    let model = engine.checkpoint().path().display().to_string();
    let template = match template.map_or_else(|| engine.chat_template(), Ok) {
        Err(EngineError::Chat(ChatError::NoTemplate)) => bail!(
            "{model} has no chat template: the files do not say how a conversation looks to this model. \
             --chat-template FILE (Jinja) gives a template; `bitnet run --prompt TEXT` continues a text instead"
        ),
        template => template?,
    };
    let mut session = args.draft.session(&engine)?.with_template(template);
    session.replace(args.system.iter().map(|text| Message::new("system", text)).collect());

    let terminal = std::io::stdin().is_terminal();
    let stop = Arc::new(AtomicBool::new(false));
    let mut lines = match terminal {
        true => {
            // Until now, and in scripts, Ctrl-C ends the program.
            signal_hook::flag::register(signal_hook::consts::SIGINT, stop.clone())
                .context("cannot catch Ctrl-C")?;
            let directory = engine.manager().config().cache_dir.as_ref();
            Lines::terminal(directory.map(|directory| directory.join("chat-history")))?
        }
        false => Lines::script(),
    };
    let seed = sampling.seed;
    if !args.quiet {
        let seed = if sampling.temperature > 0.0 { format!(", seed {seed}") } else { String::new() };
        let help = if terminal { " /help lists the commands, Ctrl-D ends." } else { "" };
        output::note(format_args!("{model}, context {}{seed}.{help}", engine.settings().context));
    }
    let options =
        GenerateOptions { max_new_tokens: args.max_new_tokens, sampling, ..engine.generate_options() };
    let can_grow = args.engine.load.context.is_some();
    let mut chat = Chat { engine, session, options, seed, stop, quiet: args.quiet, can_grow };
    let mut failed = 0;
    loop {
        // Before the line is read: a Ctrl-C right behind it is meant for the answer.
        chat.stop.store(false, Ordering::Relaxed);
        let done = match lines.next()? {
            Next::End => break,
            Next::Interrupted => {
                output::note("Ctrl-D or /quit ends the program.");
                continue;
            }
            Next::NoText => Err(anyhow!("the line is no UTF-8 text, so it is left out")),
            Next::Input(Input::Command(command)) if command == "/quit" => break,
            Next::Input(Input::Command(command)) => chat.command(&command),
            Next::Input(Input::Message(message)) if message.is_empty() => continue,
            Next::Input(Input::Message(message)) => {
                let done = chat.answer(&message);
                chat.drop_unanswered();
                done
            }
        };
        match done {
            Err(error) if output::is_broken_pipe(&error) => return Err(error),
            Err(error) => {
                output::print_error(&error);
                failed += 1;
            }
            Ok(()) => {}
        }
    }
    if failed > 0 && !terminal {
        bail!("{} of stdin failed", count(failed, "line"));
    }
    Ok(())
}

struct Chat {
    engine: Engine,
    session: Session,
    options: GenerateOptions,
    /// The next answer's.
    seed: u64,
    /// Set by Ctrl-C.
    stop: Arc<AtomicBool>,
    quiet: bool,
    /// The context is smaller than the model's, by a flag.
    can_grow: bool,
}

impl Chat {
    fn command(&mut self, command: &str) -> anyhow::Result<()> {
        let (name, argument) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let argument = argument.trim();
        let file = || match argument {
            "" => bail!("{name} FILE: the name of the file is missing"),
            path => Ok(Path::new(path)),
        };
        match name {
            "/help" => output::note(HELP),
            "/system" => self.set_system(argument),
            "/reset" => {
                self.keep(usize::from(self.has_system()));
                output::note("The conversation begins anew.");
            }
            "/undo" => {
                let last = self.session.messages().iter().rposition(|message| message.role == "user");
                self.keep(last.context("/undo: the conversation has no message yet")?);
                output::note("Your last message and its answer are taken back.");
            }
            "/save" => {
                let (path, messages) = (file()?, self.session.messages());
                output::write_file(path, |out| {
                    serde_json::to_writer_pretty(&mut *out, messages)?;
                    Ok(writeln!(out)?)
                })?;
                output::note(format_args!("Saved {} to {}.", messages_of(messages), path.display()));
            }
            "/load" => {
                let path = file()?;
                let messages = read(path).with_context(|| format!("cannot load {}", path.display()))?;
                output::note(format_args!("Loaded {} from {}.", messages_of(&messages), path.display()));
                self.session.replace(messages);
            }
            _ => bail!(
                "there is no command {name}: /help lists them. A message that begins with / needs a space in front"
            ),
        }
        Ok(())
    }

    fn has_system(&self) -> bool {
        self.session.messages().first().is_some_and(|message| message.role == "system")
    }

    fn set_system(&mut self, text: &str) {
        let system = (!text.is_empty()).then(|| Message::new("system", text));
        let others = self.session.messages().iter().skip(usize::from(self.has_system())).cloned();
        let messages: Vec<Message> = system.into_iter().chain(others).collect();
        let done = if text.is_empty() { "removed" } else { "set" };
        let again = if messages.len() > 1 { "; the next answer computes the conversation again" } else { "" };
        output::note(format_args!("The system's message is {done}{again}."));
        self.session.replace(messages);
    }

    /// Forgets all messages but the first `messages`.
    fn keep(&mut self, messages: usize) {
        let kept = self.session.messages().iter().take(messages).cloned().collect();
        self.session.replace(kept);
    }

    /// Takes the last message back if nothing answers it.
    fn drop_unanswered(&mut self) {
        let messages = self.session.messages();
        if messages.last().is_some_and(|message| message.role == "user") {
            self.keep(messages.len() - 1);
        }
    }

    fn answer(&mut self, message: &str) -> anyhow::Result<()> {
        // A message that is asked again gets another answer, and a conversation with --seed is the same again.
        self.options.sampling.seed = self.seed;
        self.seed = self.seed.wrapping_add(1);
        let text = match self.session.chat(message, &self.options) {
            Err(EngineError::PromptTooLong { tokens, context }) => {
                return Err(anyhow!(
                    "with this message the conversation has {tokens} tokens, and the context {context}. The message was \
                     not added. {}",
                    advice(self.can_grow)
                ));
            }
            text => text?,
        };
        let mut text = text.cancel_when(self.stop.clone());
        let mut content = String::new();
        let log = output::HeldLog::new();
        let failure = loop {
            match text.next() {
                None => break None,
                Some(Err(error)) => break Some(error.into()),
                Some(Ok(piece)) => {
                    content.push_str(&piece);
                    if let Err(error) = output::write_generated(&piece) {
                        break Some(anyhow::Error::new(error).context("cannot write to stdout"));
                    }
                }
            }
        };
        let answer = text.finish();
        let nothing =
            content.is_empty() && (failure.is_some() || answer.generation.finish == Finish::Cancelled);
        if !nothing {
            self.session.push(Message::new("assistant", content));
        }
        output::print("")?;
        drop(log);
        if nothing {
            output::note("Nothing was answered. Your message is taken back.");
        }
        match failure {
            Some(error) => return Err(error),
            None if !nothing => self.status(&answer),
            None => {}
        }
        Ok(())
    }

    fn status(&self, Answer { generation, report }: &Answer) {
        let context = self.engine.settings().context;
        // The last token of an answer may have no room any more.
        let used = (generation.prompt_tokens + generation.tokens.len()).min(context);
        if !self.quiet {
            let speed =
                report.decode_tokens_per_s.map_or_else(String::new, |speed| format!(" at {speed:.1}/s"));
            let guessed = match generation.drafts.total() {
                DraftCounts { drafted: 0, .. } => String::new(),
                DraftCounts { drafted, accepted } => format!(", {accepted} of {drafted} guesses right"),
            };
            output::note(format_args!(
                "[tokens: prompt {} computed, {} reused; answer {}{speed}{guessed}; context {used} of {context}]",
                generation.prompt_tokens - generation.cached_tokens,
                generation.cached_tokens,
                generation.tokens.len(),
            ));
        }
        match generation.finish {
            Finish::Context => output::note(format_args!(
                "The context is full, so the answer ends here. {}",
                advice(self.can_grow)
            )),
            Finish::Length => output::note(format_args!(
                "The answer ends here because it has {}: --max-new-tokens allows more.",
                count(generation.tokens.len() as u64, "token")
            )),
            Finish::Cancelled => output::note("Stopped. The answer stays as far as it is shown."),
            Finish::StopToken | Finish::StopString | Finish::Constraint => {}
        }
    }
}

/// What to do about a context that is full.
fn advice(can_grow: bool) -> String {
    let grow = if can_grow { "; a larger --context has more room" } else { "" };
    format!(
        "/undo takes back the last message and its answer, /reset begins anew, /save FILE keeps a copy{grow}"
    )
}

fn messages_of(messages: &[Message]) -> String {
    count(messages.len() as u64, "message")
}

/// The messages of a file that `/save` wrote.
fn read(path: &Path) -> anyhow::Result<Vec<Message>> {
    let mut bytes = Vec::new();
    // Before it is opened: to open a pipe would wait for its other end.
    if !std::fs::metadata(path)?.is_file() {
        bail!("it is no file");
    }
    let file = File::open(path)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        bail!("it has more than {} MiB, so it is no conversation", MAX_BYTES >> 20);
    }
    let messages: Vec<Message> =
        serde_json::from_slice(&bytes).context("it is no conversation as /save writes it")?;
    let system = usize::from(messages.first().is_some_and(|message| message.role == "system"));
    for (i, message) in messages.iter().enumerate().skip(system) {
        let expected = ["user", "assistant"][(i - system) % 2];
        if message.role != expected {
            bail!("message {} has the role {:?}; expected {expected:?}", i + 1, message.role);
        }
    }
    if (messages.len() - system) % 2 == 1 {
        bail!("its last message has no answer");
    }
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_conversation_is_checked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("chat.json");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read(&path).map_err(output::in_one_line)
        };
        assert_eq!(load("[]"), Ok(Vec::new()));
        let turn = r#"{"role":"user","content":"Hi"},{"role":"assistant","content":"Ho"}"#;
        assert_eq!(load(&format!("[{turn},{turn}]")).unwrap().len(), 4);
        let system = r#"{"role":"system","content":"S"}"#;
        assert_eq!(load(&format!("[{system},{turn}]")).unwrap()[0], Message::new("system", "S"));
        for (text, expected) in [
            ("", "it is no conversation as /save writes it: EOF"),
            ("{}", "it is no conversation as /save writes it: invalid type: map, expected a sequence"),
            (r#"[{"role":"user"}]"#, "missing field `content`"),
            (&format!("[{turn},{system}]"), "message 3 has the role \"system\"; expected \"user\""),
            (
                r#"[{"role":"assistant","content":""}]"#,
                "message 1 has the role \"assistant\"; expected \"user\"",
            ),
            (r#"[{"role":"user","content":"Hi"}]"#, "its last message has no answer"),
            (&" ".repeat((16 << 20) + 1), "it has more than 16 MiB"),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        assert!(read(directory.path()).unwrap_err().to_string().contains("it is no file"));
        assert!(read(&directory.path().join("none")).is_err());
    }
}
