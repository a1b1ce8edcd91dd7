//! Chat templates: from messages to the text that a model was trained on.
//!
//! A model's `chat_template` is Jinja as transformers renders it (`apply_chat_template`): blocks trimmed,
//! undefined values empty, Python's string methods, `{% break %}` and `{% continue %}`, the functions
//! `raise_exception` and `strftime_now`, a `tojson` that writes what Python's `json.dumps` writes, and the
//! variables `messages`, `tools` and `documents` (none), `add_generation_prompt` and the special tokens.
//! minijinja renders it.
//!
//! A template is a program from a model's file. It can't reach anything outside, its steps are counted and it
//! runs on a stack of its own that is large enough for what so many steps can nest; its memory is not limited.
//!
//! The text has the special tokens in it, so it is encoded without adding others
//! (`tokenizer.encode(&text, false)`).

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior};

use crate::tokenizer::Tokenizer;

pub use crate::tokenizer::TemplateTokens;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// Who says it: usually `system`, `user` or `assistant`; what else there may be is the template's business.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of this role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// In the order in which Python's dictionaries have them, which `tojson` and loops show.
impl Object for Message {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "role" => Some(self.role.as_str().into()),
            "content" => Some(self.content.as_str().into()),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Str(&["role", "content"])
    }
}

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The model came without a template.
    #[error(
        "the model has no chat template: give one with --chat-template FILE (Jinja), or a plain prompt \
         instead of messages"
    )]
    NoTemplate,
    /// The template is not valid Jinja.
    #[error("the chat template is not valid, line {line}: {message}")]
    Syntax {
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// The operating system gave no thread to render on.
    #[error("the chat template can't be rendered: {0}")]
    Thread(std::io::Error),
    /// The template fails on these messages.
    #[error("the chat template fails in line {line}: {message}")]
    Render {
        /// The line, from 1.
        line: usize,
        /// What happens there.
        message: String,
    },
    /// The template itself refuses the messages, with `raise_exception`.
    #[error("the chat template refuses these messages: {message}")]
    Refused {
        /// The template's words.
        message: String,
        /// The line, from 1.
        line: usize,
    },
}

/// A parsed chat template.
///
/// ```
/// # use bitnet_burn_engine::chat::{ChatTemplate, Message, TemplateTokens};
/// let template = ChatTemplate::new("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")?;
/// let text = template.render(&[Message::new("user", "Hi")], &TemplateTokens::default(), true)?;
/// assert_eq!(text, "user: Hi\n");
/// # Ok::<(), bitnet_burn_engine::chat::ChatError>(())
/// ```
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

/// The template's name in the environment; minijinja's messages show it.
const NAME: &str = "chat_template";

/// How deep `tojson` follows lists in lists. A template can nest them without end.
const MAX_DEPTH: usize = 64;

/// How many instructions a template may take: some 100 a message are usual.
const MAX_STEPS: u64 = 500_000;

/// The stack to render on. A template can wrap a list in a list with every few steps, and dropping the
/// outermost takes a stack frame for each: 40 MB without optimisation.
const STACK: usize = 64 << 20;

impl ChatTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] with the line.
    pub fn new(source: &str) -> Result<Self, ChatError> {
        Self::with_clock(source, SystemTime::now)
    }

    /// The template that came with the tokenizer.
    ///
    /// # Errors
    /// [`ChatError::NoTemplate`] if none did, [`ChatError::Syntax`] if it isn't valid.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        Self::new(tokenizer.chat_template().ok_or(ChatError::NoTemplate)?)
    }

    /// As [`new`](Self::new), with another clock for `strftime_now`.
    fn with_clock(
        source: &str,
        clock: impl Fn() -> SystemTime + Send + Sync + 'static,
    ) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(|state, value, method, arguments| {
            // minijinja-contrib 2.24 does not come back from counting nothing in a string.
            if method == "count" && arguments.first().is_some_and(|a| a.as_str() == Some("")) {
                return Err(Error::new(ErrorKind::InvalidOperation, "count: there is nothing to count"));
            }
            minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments)
        });
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
        });
        environment.add_function("strftime_now", move |format: &str| strftime(format, clock()));
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(|e| {
            let (line, message) = place(&e);
            ChatError::Syntax { line, message }
        })?;
        Ok(Self { environment })
    }

    /// The text of these messages.
    ///
    /// # Arguments
    /// - `tokens`: the special tokens ([`Tokenizer::template_tokens`])
    /// - `add_generation_prompt`: end with what begins the assistant's answer
    ///
    /// # Errors
    /// [`ChatError::Refused`] if the template does not want these messages (an unknown role, say),
    /// [`ChatError::Render`] if it fails on them.
    pub fn render(
        &self,
        messages: &[Message],
        tokens: &TemplateTokens,
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let fail = |e: Error| {
            let (line, message) = place(&e);
            let refusal = std::iter::successors(Some(&e as &dyn std::error::Error), |e| e.source())
                .find_map(|e| e.downcast_ref::<Refusal>());
            match refusal {
                Some(Refusal(message)) => ChatError::Refused { line, message: message.clone() },
                None => ChatError::Render { line, message },
            }
        };
        let render = || {
            let messages: Vec<Value> = messages.iter().map(|m| Value::from_object(m.clone())).collect();
            let context = minijinja::context! {
                messages,
                tools => (),
                documents => (),
                add_generation_prompt,
                ..Value::from_serialize(tokens)
            };
            self.environment.get_template(NAME).and_then(|t| t.render(context)).map_err(fail)
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK);
            let panicked = |_| ChatError::Render { line: 1, message: "the template engine panicked".into() };
            thread.spawn_scoped(scope, render).map_err(ChatError::Thread)?.join().map_err(panicked)?
        })
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").finish_non_exhaustive()
    }
}

/// What `raise_exception` was called with, on its way through minijinja.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

/// Where an error happened, and what.
fn place(error: &Error) -> (usize, String) {
    let message = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    (error.line().unwrap_or(1), message)
}

/// transformers has a block of its own, `{% generation %}` to `{% endgeneration %}`, which marks the
/// assistant's words for training and renders what is in it; here that is `{% if true %}`.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, after)) = rest.split_once("{%") {
        out.push_str(before);
        out.push_str("{%");
        rest = after;
        let Some((tag, _)) = after.split_once("%}") else { break };
        let is_sign = |c| c == '-' || c == '+';
        let inner = tag.strip_prefix(is_sign).unwrap_or(tag);
        let inner = inner.strip_suffix(is_sign).unwrap_or(inner);
        let replacement = match inner.trim() {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&tag.replacen(inner.trim(), replacement, 1));
        rest = &after[tag.len()..];
    }
    out.push_str(rest);
    out
}

/// `tojson(indent=...)` as transformers defines it: Python's `json.dumps` with `ensure_ascii=False`.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // The others that transformers knows have no effect here, or none on what is not ASCII.
    for name in ["ensure_ascii", "sort_keys", "separators"] {
        let _: Option<Value> = options.get(name)?;
    }
    options.assert_all_used()?;
    let mut out = String::new();
    write_json(value, indent.map(|n| n.min(16)), 0, &mut out)?;
    Ok(out)
}

fn write_json(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) -> Result<(), Error> {
    let error = |message: String| Error::new(ErrorKind::BadSerialization, message);
    if depth > MAX_DEPTH {
        return Err(error(format!("tojson: more than {MAX_DEPTH} lists in lists")));
    }
    let scalar = |out: &mut String| {
        out.push_str(&serde_json::to_string(value).map_err(|e| error(e.to_string()))?);
        Ok(())
    };
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::String => scalar(out),
        kind @ (ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) => {
            let map = kind == ValueKind::Map;
            out.push(if map { '{' } else { '[' });
            let mut empty = true;
            for item in value.try_iter()? {
                if !empty {
                    out.push_str(separator);
                }
                empty = false;
                new_line(out, depth + 1);
                if map {
                    let key = item.as_str().map_or_else(|| item.to_string(), str::to_owned);
                    out.push_str(&serde_json::to_string(&key).map_err(|e| error(e.to_string()))?);
                    out.push_str(": ");
                    write_json(&value.get_item(&item)?, indent, depth + 1, out)?;
                } else {
                    write_json(&item, indent, depth + 1, out)?;
                }
            }
            if !empty {
                new_line(out, depth);
            }
            out.push(if map { '}' } else { ']' });
            Ok(())
        }
        other => Err(error(format!("tojson: a value of type {other} is not JSON"))),
    }
}

/// Python's `strftime` for the codes that templates use. The time is UTC: there is no time zone data here.
fn strftime(format: &str, now: SystemTime) -> Result<String, Error> {
    const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    // 1 January 1970 was a Thursday.
    let weekday = DAYS[(days as usize + 3) % 7];
    let month_name = MONTHS[month as usize - 1];
    let (hour, minute) = (second / 3600, second / 60 % 60);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let text = match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{:02}", second % 60),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('z') => "+0000".into(),
            Some('Z') => "UTC".into(),
            Some('%') => "%".into(),
            other => {
                let code = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now: the code %{code} is not supported");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month and day of the days since 1 January 1970 (Howard Hinnant, "chrono-compatible low-level date
/// algorithms": years begin in March, so that the leap day comes last).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn render(source: &str) -> Result<String, ChatError> {
        let clock = || UNIX_EPOCH + Duration::from_secs(1_721_910_896);
        let tokens = TemplateTokens { bos_token: Some("<s>".into()), ..TemplateTokens::default() };
        let messages = [Message::new("system", "Be <brief> & \"kind\"."), Message::new("user", " Grüße\n ")];
        ChatTemplate::with_clock(source, clock)?.render(&messages, &tokens, true)
    }

    fn text(source: &str) -> String {
        render(source).unwrap()
    }

    #[test]
    fn blocks_are_trimmed_as_in_transformers() {
        let source = "\
{% for m in messages %}
    {% if m.role == 'user' %}
user
    {%- else %}
other
    {% endif %}
{% endfor %}
end
";
        assert_eq!(text(source), "other\nuserend");
    }

    #[test]
    fn python_in_templates() {
        for (source, expected) in [
            ("{{ bos_token + messages[1]['content'].strip() }}", "<s>Grüße"),
            ("{{ messages[1].content | trim }}|{{ messages[-1]['role'].upper() }}", "Grüße|USER"),
            ("{{ messages[1:] | length }}{{ messages[0].role.startswith('sys') }}", "1True"),
            ("{% if tools is none and documents is none %}none{% endif %}", "none"),
            ("{% if not eos_token is defined %}no eos{% endif %}[{{ eos_token }}]", "no eos[]"),
            ("{% if tools %}x{% endif %}{{ 'tool_calls' in messages[0] }}", "False"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            ("{% for m in messages %}{{ loop.index0 }}{% break %}{% endfor %}", "0"),
            ("{% for k, v in messages[0].items() %}{{ k }};{% endfor %}", "role;content;"),
            ("{{ messages[0].get('name', 'none') }}{{ messages[0].content is string }}", "noneTrue"),
            ("{{ add_generation_prompt }}", "True"),
            ("a{% generation %}b{%- endgeneration -%} c", "abc"),
            ("{{ 'a{% b' }}{% if true %}c{% endif %}", "a{% bc"),
        ] {
            assert_eq!(text(source), expected, "{source}");
        }
    }

    #[test]
    fn json_is_pythons() {
        assert_eq!(
            text("{{ messages | tojson }}"),
            r#"[{"role": "system", "content": "Be <brief> & \"kind\"."}, {"role": "user", "content": " Grüße\n "}]"#
        );
        assert_eq!(text("{{ [1, 2.5, none, true, [], {}] | tojson }}"), "[1, 2.5, null, true, [], {}]");
        assert_eq!(text("{{ {'a': [1, 2]} | tojson(indent=2) }}"), "{\n  \"a\": [\n    1,\n    2\n  ]\n}");
        assert!(matches!(render("{{ nothing | tojson }}"), Err(ChatError::Render { .. })));
        assert!(render("{{ 1 | tojson(indnt=2) }}").is_err());
        let deep = "{% set ns = namespace(x=[]) %}{% for i in range(500) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}";
        assert!(render(deep).unwrap_err().to_string().contains("lists in lists"));
    }

    #[test]
    fn the_date() {
        // date -u -d @1721910896
        assert_eq!(text("{{ strftime_now('%d %b %Y') }}"), "25 Jul 2024");
        assert_eq!(
            text("{{ strftime_now('%A %B %e, %H:%M:%S %p %I %F %T %y%%') }}"),
            "Thursday July 25, 12:34:56 PM 12 2024-07-25 12:34:56 24%"
        );
        assert!(render("{{ strftime_now('%Q') }}").unwrap_err().to_string().contains("%Q"));
        assert!(render("{{ strftime_now('%') }}").is_err());
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(19_783), (2024, 3, 1));
        // The end of the clock's range.
        assert!(strftime("%F", UNIX_EPOCH + Duration::from_secs(i64::MAX as u64)).is_ok());
    }

    #[test]
    fn errors_name_the_line() {
        let syntax = ChatTemplate::new("a\nb {% if %}\n").unwrap_err();
        assert!(matches!(syntax, ChatError::Syntax { line: 2, .. }), "{syntax}");
        assert!(syntax.to_string().contains("line 2"), "{syntax}");
        let failing = render("a\n\n{{ nothing.at.all }}").unwrap_err();
        assert!(matches!(failing, ChatError::Render { line: 3, .. }), "{failing}");
        let refused = render("a\n{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert!(
            matches!(&refused, ChatError::Refused { line: 2, message } if message == "roles must alternate")
        );
        for source in [
            "{% unknown %}",
            "{{ x | nofilter }}",
            "{{ nofunction() }}",
            "{% include 'x' %}",
            "{{ 1 // 0 }}",
            "{{ 'a'.count('') }}",
            "{{ 'a' + 1 }}",
        ] {
            assert!(render(source).is_err(), "{source}");
        }
    }

    #[test]
    fn a_template_without_end_is_an_error() {
        let nest = "{% set ns.x = [ns.x] %}";
        let deep =
            format!("{{% set ns = namespace(x=[]) %}}{{% for i in range(60000) %}}{nest}{{% endfor %}}");
        assert_eq!(text(&deep), "");
        let endless = "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}";
        assert!(matches!(render(endless), Err(ChatError::Render { .. })));
        assert!(render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").is_err());
        assert!(ChatTemplate::new(&"(".repeat(10_000)).is_ok());
        assert!(ChatTemplate::new(&format!("{{{{ {} }}}}", "(".repeat(100_000))).is_err());
    }

    #[test]
    fn messages_are_plain_json() {
        let message: Message = serde_json::from_str(r#"{"role":"user","content":"Hi"}"#).unwrap();
        assert_eq!(message, Message::new("user", "Hi"));
        assert_eq!(serde_json::to_string(&message).unwrap(), r#"{"role":"user","content":"Hi"}"#);
    }
}
