//! Answers to command lines that were written for llama.cpp: what a flag is called here, and what a negative
//! number would mean there. Only looked at when clap has refused the command line.

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, Error, ErrorKind};
use clap::{ArgAction, Command};

/// Flags of llama.cpp's programs that are not flags here, and what to write instead.
const FLAGS: &[(&[&str], &str)] = &[
    (&["-ngl", "--n-gpu-layers"], "--gpu-layers N; leave it out for the CPU"),
    (&["-c", "--ctx-size"], "--context N; leave it out for the length that the model was trained for"),
    (&["--n-predict", "--predict"], "--max-new-tokens N (-n)"),
    (&["-b", "--batch-size", "-ub", "--ubatch-size"], "--chunk N"),
    (&["-tb", "--threads-batch"], "--threads N for all phases"),
    (&["-s"], "--seed N; leave it out for a random one"),
    (&["--temp"], "--temperature T"),
    (&["--repeat-last-n"], "--repeat-window N"),
    (
        &["-cnv", "--conversation", "-i", "--interactive", "--jinja"],
        "--chat: the model's chat template, for one answer; `bitnet chat` is a conversation",
    ),
    (&["-no-cnv", "--no-conversation"], "nothing: without --chat there is no chat template"),
    (&["-sys", "--system-prompt"], "--system TEXT"),
    (&["-f", "--file"], "--prompt \"$(cat FILE)\""),
    (&["-r", "--reverse-prompt"], "--stop TEXT"),
    (&["-e", "--escape"], "nothing: the shell writes escapes (in bash: $'\\n')"),
    (
        &["-fa", "--flash-attn", "--mlock", "--no-mmap", "--no-warmup", "--numa"],
        "nothing: there is no such choice",
    ),
    (&["-ctk", "--cache-type-k", "-ctv", "--cache-type-v"], "--kv-cache TYPE for keys and values"),
    (&["-dev", "-mg", "--main-gpu", "-sm", "--split-mode", "-ts", "--tensor-split"], "--device"),
    (&["-hf", "-hfr", "--hf-repo"], "--model hf:OWNER/NAME:FILE.gguf"),
    (
        &["-lcs", "-lcd", "--lookup-cache-static", "--lookup-cache-dynamic"],
        "nothing: what repeats itself is looked up in the text so far (--draft)",
    ),
    (&["-md", "--model-draft", "--spec-draft-model"], "--draft-model PATH"),
    (&["--draft-max", "--draft-n", "--spec-draft-n-max"], "--draft N"),
];

/// What a number below zero means to llama.cpp, and how that is said here.
const NEGATIVE: &[(&str, &str)] = &[
    ("--seed", "for a random seed leave --seed out; the report names it"),
    (
        "--max-new-tokens",
        "generation always has a limit: give a large one, such as -n 100000; it ends at the end of the text anyway",
    ),
    ("--repeat-window", "0 is all tokens"),
    ("--gpu-layers", "for all layers give the model's number of them, or --device with the name of the GPU"),
    ("--threads", "for one thread per core leave --threads out"),
    ("--context", "for the length that the model was trained for leave --context out"),
];

/// Negative numbers are values of flags, not flags: what they are not good for is then said by the flag's own
/// parser.
pub fn with_negative_numbers(command: Command) -> Command {
    let takes_values = |action: &ArgAction| matches!(action, ArgAction::Set | ArgAction::Append);
    command
        .mut_args(|arg| {
            let is_flag = !arg.is_positional() && takes_values(arg.get_action());
            if is_flag { arg.allow_negative_numbers(true) } else { arg }
        })
        .mut_subcommands(with_negative_numbers)
}

/// Adds to a refusal what somebody who is used to llama.cpp needs to know.
pub fn explain(mut error: Error, arguments: &[String]) -> Error {
    let text = |kind: ContextKind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        _ => "",
    };
    // "--seed <N>" or "-c".
    let argument = text(ContextKind::InvalidArg).split([' ', '=']).next().unwrap_or_default();
    let negative =
        text(ContextKind::InvalidValue).strip_prefix('-').is_some_and(|n| n.parse::<f64>().is_ok());
    let tips: Vec<String> = match error.kind() {
        ErrorKind::ValueValidation if negative => {
            NEGATIVE.iter().filter(|(flag, _)| *flag == argument).map(|(_, tip)| (*tip).to_owned()).collect()
        }
        ErrorKind::UnknownArgument | ErrorKind::ValueValidation | ErrorKind::InvalidValue => {
            // clap reads `-ngl` as `-n gl`, and `-cnv` as `-c`: such flags are looked for as they stand.
            let is_meant = |flag: &str| {
                let given = |argument: &String| {
                    argument.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
                };
                (flag == argument || flag.len() > 2 && !flag.starts_with("--")) && arguments.iter().any(given)
            };
            let tip = |(flags, instead): &(&[&str], &str)| {
                let flag = flags.iter().find(|flag| is_meant(flag))?;
                Some(format!("llama.cpp's `{flag}` is here: {instead}"))
            };
            FLAGS.iter().filter_map(tip).collect()
        }
        _ => Vec::new(),
    };
    if !tips.is_empty() {
        let tips = tips.into_iter().map(StyledStr::from).collect();
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flag in the table that is one here would be explained away. Commands that read other files have
    /// short flags of their own.
    #[test]
    fn no_flag_of_the_table_is_a_flag_of_run() {
        let command = <crate::Cli as clap::CommandFactory>::command();
        let run = command.find_subcommand("run").unwrap();
        for flag in FLAGS.iter().flat_map(|(flags, _)| *flags) {
            for arg in run.get_arguments() {
                let long = arg.get_long().map(|long| format!("--{long}"));
                let short = arg.get_short().map(|short| format!("-{short}"));
                assert!(![long, short].contains(&Some((*flag).to_owned())), "{flag}");
            }
        }
        let known = |flag: &str| run.get_arguments().any(|arg| arg.get_long() == flag.strip_prefix("--"));
        assert!(NEGATIVE.iter().all(|(flag, _)| known(flag)));
    }
}
