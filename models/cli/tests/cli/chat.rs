//! Conversations: from a pipe, and in a terminal.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::{Place, error};

/// A place with a model that answers without an end, in ASCII.
fn endless() -> Place {
    let place = Place::empty();
    let synth = ["synth", "--shape", "tiny", "--seed", "8", "--context-length", "16384"];
    place.ok(&[&synth[..], &["--out", "model.gguf"]].concat());
    place
}

/// What a conversation writes to stdout and stderr, and its exit status.
fn chat(place: &Place, args: &[&str], stdin: impl AsRef<[u8]>) -> (String, String, Option<i32>) {
    let call = [&["chat", "-m", "model.gguf"][..], args].concat();
    let mut command = place.command(&call);
    command.env("RUST_LOG", "error").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_ref()).unwrap();
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap(), status.code())
}

/// Tokens of the status lines: of the prompt, computed and reused; of the answer; and all in the context.
fn statuses(text: &str) -> Vec<[usize; 4]> {
    let line = |line: &str| {
        let numbers =
            line.strip_prefix("[tokens: ")?.split([' ', ';', ']']).filter_map(|word| word.parse().ok());
        let [computed, reused, answer, used, context] = numbers.collect::<Vec<usize>>().try_into().unwrap();
        assert_eq!((context, used), (16384, computed + reused + answer), "{text}");
        Some([computed, reused, answer, used])
    };
    text.lines().filter_map(line).collect()
}

/// Role and content of each message in a file.
fn saved(place: &Place, name: &str) -> Vec<(String, String)> {
    let messages: Vec<Value> = serde_json::from_slice(&std::fs::read(place.path(name)).unwrap()).unwrap();
    let part = |message: &Value, key: &str| message[key].as_str().unwrap().to_owned();
    messages.iter().map(|message| (part(message, "role"), part(message, "content"))).collect()
}

#[test]
fn no_turn_computes_the_turns_before_it_again() {
    let place = endless();
    let stdin = "Hello\nAgain\n/undo\nWhat\n/save chat.json\n\n/quit\nnever read\n";
    let (answers, log, status) = chat(&place, &["-n", "20"], stdin);
    assert_eq!(status, Some(0), "{log}");
    // The vocabulary has a token for each byte. BOS, "User: ", the message, the end of turn and "Assistant: ".
    let turn = |message: &str| "User: ".len() + message.len() + 1 + "Assistant: ".len();
    let [first, second, third] = statuses(&log).try_into().unwrap();
    assert_eq!(first, [1 + turn("Hello"), 0, 20, first[3]]);
    // New are the last token of the answer before, which was drawn and not yet computed, and the end of its turn.
    assert_eq!(second, [2 + turn("Again"), first[3] - 1, 20, second[3]]);
    // The turn that was taken back begins in the same way.
    let common = 1 + "User: ".len();
    assert_eq!(third, [1 + turn("What") - common, first[3] + common, 20, third[3]]);

    // One answer a line: nothing else is on stdout.
    let answers: Vec<&str> = answers.lines().collect();
    let messages = saved(&place, "chat.json");
    let roles: Vec<&str> = messages.iter().map(|(role, _)| &**role).collect();
    let contents: Vec<&str> = messages.iter().map(|(_, content)| &**content).collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
    assert_eq!(contents, ["Hello", answers[0], "What", answers[2]]);

    // The answers are those that `run` gives to the same text.
    let run = ["run", "-m", "model.gguf", "-p", "Hello", "--chat", "-n", "20"];
    assert_eq!(place.ok(&run), format!("{}\n", answers[0]));
    // Another place of the beginning: all is computed again, and the conversation goes on.
    let stdin = "/load chat.json\n/system Be kind\nOn\n/reset\n/system\n/save new.json\nHello\n";
    let (again, log, status) = chat(&place, &["-n", "20", "--system", "S"], stdin);
    assert_eq!((status, again.lines().nth(1)), (Some(0), Some(answers[0])), "{log}");
    let [on, hello] = statuses(&log).try_into().unwrap();
    assert_eq!((on[1], hello[1]), (0, 1));
    assert!(on[3] > third[3] && saved(&place, "new.json").is_empty());
}

#[test]
fn several_lines_are_one_message() {
    let place = endless();
    let stdin = "one\\\ntwo\n\"\"\"\n/three\n\n four\\\n\"\"\"\n /five\n/save chat.json\n";
    let (_, log, status) = chat(&place, &["-n", "1", "--system", "S"], stdin);
    assert_eq!(status, Some(0), "{log}");
    let messages = saved(&place, "chat.json");
    assert_eq!(messages[0], ("system".into(), "S".into()));
    let said: Vec<&str> =
        messages.iter().filter(|(role, _)| role == "user").map(|(_, content)| &**content).collect();
    assert_eq!(said, ["one\ntwo", "/three\n\n four\\", "/five"]);
}

#[test]
fn what_fails_is_said_and_the_conversation_goes_on() {
    let place = endless();
    place.write("bad.json", r#"[{"role":"robot","content":"Hi"}]"#);
    let stdin = format!(
        "/undo\n/load none.json\n/load bad.json\n/save\n/save none/chat.json\n/sing\n{}\nHello\n/save chat.json\n",
        "x".repeat(60)
    );
    let (answers, log, status) = chat(&place, &["-n", "4", "--context", "64"], &stdin);
    assert_eq!(status, Some(1), "{log}");
    for part in [
        "/undo: the conversation has no message yet",
        "cannot load none.json",
        "message 1 has the role \"robot\"; expected \"user\"",
        "/save FILE: the name of the file is missing",
        "cannot write none/chat.json",
        "there is no command /sing: /help lists them",
        "the conversation has 79 tokens, and the context 64. The message was not added. /undo takes back",
        "a larger --context has more room",
        "error: 7 lines of stdin failed",
    ] {
        assert!(log.contains(part), "{part}: {log}");
    }
    assert_eq!(answers.lines().count(), 1);
    assert_eq!(saved(&place, "chat.json").len(), 2);

    // An answer that reaches the end of the context stays, and what comes next does not fit.
    let (answers, log, status) = chat(&place, &["--context", "64"], "Hello\nAgain\n/undo\nHello\n");
    assert_eq!(status, Some(1), "{log}");
    assert!(log.contains("The context is full, so the answer ends here. /undo"), "{log}");
    let answers: Vec<&str> = answers.lines().collect();
    assert_eq!((answers.len(), answers[0]), (2, answers[1]));
    // A line that is no text is left out.
    let (answers, log, status) = chat(&place, &["-n", "4"], b"\xff\nHello\n");
    assert_eq!((status, answers.lines().count()), (Some(1), 1), "{log}");
    assert!(log.contains("the line is no UTF-8 text"), "{log}");
    let (_, log, status) = chat(&place, &[], "one\\\n");
    assert_eq!(status, Some(1));
    assert!(log.contains("stdin ends within a message"), "{log}");
}

#[test]
fn a_model_without_a_chat_template_is_refused_with_the_reason() {
    let place = Place::empty();
    let mut command = place.command(&["chat"]);
    let said = error(&mut command);
    assert!(
        said.contains("(built-in) stories has no chat template") && said.contains("--chat-template"),
        "{said}"
    );
    place.write("template", "{% for m in messages %}{{ m.content }} {% endfor %}");
    let mut command = place.command(&["chat", "--chat-template", "template", "-n", "4"]);
    assert!(command.output().unwrap().status.success());
    let said = place.error(&["chat", "--chat-template", "none"]);
    assert!(said.contains("cannot read none"), "{said}");
}

/// In a pseudo-terminal, as a person types.
#[cfg(unix)]
mod terminal {
    use rexpect::process::WaitStatus;
    use rexpect::reader::Options;
    use rexpect::session::{PtySession, spawn_with_options};

    use super::*;

    /// A conversation whose answers end by Ctrl-C alone.
    struct Terminal(PtySession);

    impl Terminal {
        fn start(mut command: Command) -> Self {
            command.args(["-m", "model.gguf", "-n", "16000"]).env("RUST_LOG", "error").env("TERM", "xterm");
            command.stdin(Stdio::inherit());
            // The time is for a program that hangs.
            let options = Options::new().timeout_ms(Some(120_000));
            let mut terminal = Self(spawn_with_options(command, options).unwrap());
            terminal.until("/help lists the commands");
            terminal
        }

        fn until(&mut self, text: &str) -> String {
            self.0.exp_string(text).unwrap()
        }

        fn keys(&mut self, keys: &str) {
            self.until("> ");
            self.0.send(keys).unwrap();
            self.0.flush().unwrap();
        }

        /// Types this, stops the answer once it has begun and gives the numbers of the status line.
        fn ask(&mut self, keys: &str) -> [usize; 4] {
            self.keys(keys);
            self.until("\u{1b}[?2004l\r\n");
            self.0.exp_regex("(?s).").unwrap();
            self.0.send_control('c').unwrap();
            self.until("[tokens: ");
            let numbers = self.until("]");
            // An answer behind one that was stopped somewhere may end by itself. Then Ctrl-C is for the line editor.
            self.0.exp_regex("Stopped. The answer stays as far as it is shown|Ctrl-D or /quit ends").unwrap();
            let [status] = statuses(&format!("[tokens: {numbers}]")).try_into().unwrap();
            assert!(status[2] < 16000, "nothing stopped it: {status:?}");
            status
        }

        fn end(mut self) {
            self.keys("\u{4}");
            self.0.exp_eof().unwrap();
            assert!(matches!(self.0.process().wait().unwrap(), WaitStatus::Exited(_, 0)));
        }
    }

    #[test]
    fn a_person_types_edits_stops_and_takes_back() {
        let place = endless();
        let mut terminal = Terminal::start(place.command(&["chat"]));
        // Typed with a mistake at its end and one at its beginning: Backspace, Ctrl-A.
        let first = terminal.ask("elloo\u{7f}\u{1}H\r");
        assert_eq!(first[..2], [1 + "User: HelloAssistant: ".len() + 1, 0]);
        // The stopped answer is part of the conversation, and is not computed again.
        let second = terminal.ask("Again\r");
        assert_eq!(second[..2], [2 + "User: AgainAssistant: ".len() + 1, first[3] - 1]);
        terminal.keys("/undo\r");
        terminal.until("taken back");
        // Arrows: the line before the last one, with more at its end.
        let third = terminal.ask("\u{1b}[A\u{1b}[A, again\r");
        let common = 1 + "User: Again".len();
        assert_eq!(third[..2], [", again".len() + 1 + "Assistant: ".len(), first[3] + common]);
        // What is pasted is one message, and so is a line that goes on.
        terminal.ask("\u{1b}[200~one\rtwo\u{1b}[201~\r");
        terminal.ask("three\\\rfour\r");
        // Ctrl-C at the prompt forgets the line alone.
        terminal.keys("forgotten\u{3}");
        terminal.until("Ctrl-D or /quit ends the program");
        terminal.keys("/save chat.json\r");
        terminal.until("Saved 8 messages to chat.json.");
        terminal.end();

        let messages = saved(&place, "chat.json");
        let said: Vec<&str> = messages.iter().step_by(2).map(|(_, content)| &**content).collect();
        assert_eq!(said, ["Hello", "Again, again", "one\ntwo", "three\nfour"]);
        assert!(messages[1].1.starts_with(" w259"), "{messages:?}");

        // The lines are there the next time, for their owner alone.
        use std::os::unix::fs::PermissionsExt as _;
        let history = place.path("cache").join("chat-history");
        assert_eq!(history.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let mut terminal = Terminal::start(place.command(&["chat"]));
        assert_eq!(terminal.ask("\u{1b}[A\u{1b}[A\r")[0], 1 + "User: three\nfourAssistant: ".len() + 1);
        terminal.end();
        let mut command = place.command(&["chat"]);
        command.env("BITNET_CACHE_DIR", "");
        let before = std::fs::read(&history).unwrap();
        let mut terminal = Terminal::start(command);
        terminal.ask("Hello\r");
        terminal.end();
        assert_eq!(std::fs::read(&history).unwrap(), before);
    }

    #[test]
    fn an_answer_that_has_not_begun_is_stopped() {
        let place = endless();
        let message = |role: &str| json!({"role": role, "content": "x".repeat(7000)});
        place.write("long.json", json!([message("user"), message("assistant")]).to_string());
        let mut terminal = Terminal::start(place.command(&["chat"]));
        terminal.keys("/load long.json\r");
        terminal.until("Loaded 2 messages");
        terminal.keys("Hello\r");
        // The line editor gives the terminal back: from here on Ctrl-C is a signal.
        terminal.until("\u{1b}[?2004l");
        terminal.0.send_control('c').unwrap();
        terminal.until("Nothing was answered. Your message is taken back.");
        terminal.keys("/save chat.json\r");
        terminal.until("Saved 2 messages");
        terminal.end();
    }

    #[test]
    fn a_terminal_does_not_obey_the_model() {
        // The answers of this one have control characters.
        let place = Place::new();
        let piped = chat(&place, &["-n", "60", "--quiet"], "Hello\n").0;
        let control: Vec<char> = piped.chars().filter(|c| c.is_control() && *c != '\n').collect();
        assert!(!control.is_empty(), "{piped:?}");
        for call in [
            &["chat", "-m", "model.gguf", "-n", "60"][..],
            &["run", "-m", "model.gguf", "-n", "60", "--chat", "-p", "Hello"],
        ] {
            let mut command = place.command(call);
            command.env("RUST_LOG", "error").env("TERM", "xterm").stdin(Stdio::inherit());
            let mut terminal = spawn_with_options(command, Options::new().timeout_ms(Some(120_000))).unwrap();
            if call[0] == "chat" {
                terminal.exp_string("> ").unwrap();
                terminal.send("Hello\r").unwrap();
                terminal.flush().unwrap();
            }
            let escaped = control[0].escape_default().to_string();
            let before = terminal.exp_string(&escaped).unwrap();
            assert!(!before.contains(control[0]), "{before:?}");
            terminal.process_mut().exit().unwrap();
        }
    }
}

#[test]
fn the_chat_template_is_rendered() {
    let place = Place::new();
    let report =
        place.json(&["run", "-m", "model.gguf", "--chat", "--system", "S", "-p", "Hi", "-n", "1", "--json"]);
    let ids: Vec<String> =
        report["prompt_token_ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    let text = place.ok(&["tokenize", "-m", "model.gguf", "--decode", &ids.join(",")]);
    assert_eq!(text, "<|begin_of_text|>System: S<|eot_id|>User: Hi<|eot_id|>Assistant: \n");
    place.write("template", "{{ messages[0].content }}!");
    let report = place.json(&[
        "run",
        "-m",
        "model.gguf",
        "--chat-template",
        "template",
        "-p",
        "Hi",
        "-n",
        "1",
        "--json",
    ]);
    assert_eq!(report["prompt_token_ids"], serde_json::json!([72, 105, 33]));
}
