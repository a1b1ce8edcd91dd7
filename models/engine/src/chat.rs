//! Chat templates: from messages to the text that a model was trained on.
//!
//! A model's `chat_template` is Jinja as transformers renders it (`apply_chat_template`): blocks trimmed, Python's values,
//! operators and string methods, `{% break %}`, `{% continue %}` and `{% generation %}`, the functions `raise_exception`
//! and `strftime_now` (in UTC), transformers' `tojson`, and the variables `messages`, `tools`, `documents` (none),
//! `add_generation_prompt` and the special tokens. minijinja renders it: `source` translates what it reads otherwise,
//! and `operators`, `methods` and `filters` take the place of its own. What can't be brought to Jinja2's behaviour is
//! refused; `testdata/chat/differs.json` has the list.
//!
//! A template is a program from a model's file. It can't reach anything outside, and its source, its work, its memory
//! and how deep it nests are bounded. It runs on a stack of its own; a panic there is an error.
//!
//! The text has the special tokens in it, so it is encoded without adding others
//! (`tokenizer.encode(&text, false)`).

mod dictionary;
mod engine;
mod filters;
mod methods;
mod operators;
mod source;
mod strftime;
mod strings;
mod text;
mod values;

#[cfg(test)]
mod golden;
#[cfg(test)]
mod hostile;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use minijinja::value::{Enumerator, Object, ObjectRepr, Value};
use minijinja::{Environment, Error};

pub use self::dictionary::Dictionary;
use self::engine::Refusal;
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

/// Why there is no text. Each error but the first names the template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The model came without a template.
    #[error(
        "the model has no chat template: give one with --chat-template FILE (Jinja), or a plain prompt \
         instead of messages"
    )]
    NoTemplate,
    /// The template is not valid Jinja, too long, or uses what is not supported.
    #[error("{template}, line {line}: not valid: {message}")]
    Syntax {
        /// The template's name.
        template: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// The operating system gave no thread to render on.
    #[error("{template} can't be rendered: {error}")]
    Thread {
        /// The template's name.
        template: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// The template fails on these messages, or takes more than it may.
    #[error("{template}, line {line}: {message}")]
    Render {
        /// The template's name.
        template: String,
        /// The line, from 1.
        line: usize,
        /// What happens there.
        message: String,
    },
    /// The template itself refuses the messages, with `raise_exception`.
    #[error("{template} refuses these messages (line {line}): {message}")]
    Refused {
        /// The template's name.
        template: String,
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
    name: String,
    environment: Environment<'static>,
}

/// The template's name in the environment.
const NAME: &str = "chat_template";

/// The stack to parse and render on: more than the longest source that is read can take.
const STACK: usize = 128 << 20;

impl ChatTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] with the line.
    pub fn new(source: &str) -> Result<Self, ChatError> {
        Self::named("the chat template", source)
    }

    /// As [`new`](Self::new), with what errors call it: its file, say.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] with the name and the line.
    pub fn named(name: impl Into<String>, source: &str) -> Result<Self, ChatError> {
        Self::with_clock(name.into(), source, SystemTime::now)
    }

    /// The template that came with the tokenizer.
    ///
    /// # Errors
    /// [`ChatError::NoTemplate`] if none did, [`ChatError::Syntax`] if it isn't valid.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        Self::named("the model's chat template", tokenizer.chat_template().ok_or(ChatError::NoTemplate)?)
    }

    /// As [`named`](Self::named), with another clock for `strftime_now`.
    fn with_clock(
        name: String,
        source: &str,
        clock: impl Fn() -> SystemTime + Send + Sync + 'static,
    ) -> Result<Self, ChatError> {
        let syntax = |line, message| ChatError::Syntax { template: name.clone(), line, message };
        let environment = on_own_stack(&name, || {
            let source = source::translate(source).map_err(|fault| syntax(fault.line, fault.message))?;
            let mut environment = engine::environment(clock);
            match environment.add_template_owned(NAME, source) {
                Ok(()) => Ok(environment),
                Err(e) => {
                    let (line, message) = place(&e);
                    Err(syntax(line, message))
                }
            }
        })?;
        Ok(Self { name, environment })
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
        let messages = messages.iter().map(|message| Value::from_object(message.clone())).collect();
        self.render_values(messages, Value::from(()), tokens, add_generation_prompt)
    }

    /// [`render`](Self::render) for messages that have more than a role and a content, and for tools that the model may
    /// call, each as its JSON schema. Without tools, the template's variable `tools` is Jinja's `none`.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_chat(
        &self,
        messages: &[Dictionary],
        tools: &[Dictionary],
        tokens: &TemplateTokens,
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let values = |all: &[Dictionary]| all.iter().cloned().map(Value::from).collect::<Vec<_>>();
        let tools = if tools.is_empty() { Value::from(()) } else { Value::from(values(tools)) };
        self.render_values(values(messages), tools, tokens, add_generation_prompt)
    }

    fn render_values(
        &self,
        messages: Vec<Value>,
        tools: Value,
        tokens: &TemplateTokens,
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let TemplateTokens { bos_token, eos_token, unk_token, pad_token } = tokens;
        let tokens = [
            ("bos_token", bos_token),
            ("eos_token", eos_token),
            ("unk_token", unk_token),
            ("pad_token", pad_token),
        ];
        // One that the tokenizer lacks is undefined.
        let tokens =
            tokens.into_iter().filter_map(|(name, token)| Some((name, Value::from(token.as_deref()?))));
        let others = [
            ("messages", Value::from(messages)),
            ("tools", tools),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        self.render_with(Value::from_pairs(tokens.chain(others)))
    }

    /// The text of these variables.
    fn render_with(&self, context: Value) -> Result<String, ChatError> {
        on_own_stack(&self.name, || {
            self.environment.get_template(NAME).and_then(|t| t.render(context)).map_err(|e| {
                let (line, message) = place(&e);
                let refusal = std::iter::successors(Some(&e as &dyn std::error::Error), |e| e.source())
                    .find_map(|e| e.downcast_ref::<Refusal>());
                let template = self.name.clone();
                match refusal {
                    Some(Refusal(message)) => ChatError::Refused { template, line, message: message.clone() },
                    None => ChatError::Render { template, line, message },
                }
            })
        })
    }
}

/// Runs this on a thread with a stack that is large enough. A panic there is an error.
fn on_own_stack<T: Send>(
    name: &str,
    run: impl FnOnce() -> Result<T, ChatError> + Send,
) -> Result<T, ChatError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK);
        let thread = thread
            .spawn_scoped(scope, run)
            .map_err(|error| ChatError::Thread { template: name.into(), error })?;
        thread.join().unwrap_or_else(|_| {
            let message = "the template engine panicked: please report it".into();
            Err(ChatError::Render { template: name.into(), line: 1, message })
        })
    })
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Where an error happened, and what. A template can make the text as long as it likes.
fn place(error: &Error) -> (usize, String) {
    let message = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    let message = match message.char_indices().nth(400) {
        Some((end, _)) => format!("{}...", &message[..end]),
        None => message,
    };
    (error.line().unwrap_or(1), message)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn render(source: &str) -> Result<String, ChatError> {
        let clock = || UNIX_EPOCH + Duration::from_secs(1_721_910_896);
        let tokens = TemplateTokens { bos_token: Some("<s>".into()), ..TemplateTokens::default() };
        let messages = [Message::new("system", "Be <brief> & \"kind\"."), Message::new("user", " Grüße\n ")];
        ChatTemplate::with_clock("t.jinja".into(), source, clock)?.render(&messages, &tokens, true)
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
    fn errors_name_the_line() {
        let syntax = render("a\nb {% if %}\n").unwrap_err();
        assert!(matches!(syntax, ChatError::Syntax { line: 2, .. }), "{syntax}");
        assert!(syntax.to_string().contains("line 2"), "{syntax}");
        let failing = render("a\n\n{{ nothing.at.all }}").unwrap_err();
        assert!(matches!(failing, ChatError::Render { line: 3, .. }), "{failing}");
        let refused = render("a\n{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert!(
            matches!(&refused, ChatError::Refused { line: 2, message, .. } if message == "roles must alternate")
        );
        for error in [syntax, failing, refused] {
            assert!(error.to_string().starts_with("t.jinja"), "{error}");
        }
        for source in [
            "{% unknown %}",
            "{{ x | nofilter }}",
            "{{ nofunction() }}",
            "{% include 'x' %}",
            "{{ 1 // 0 }}",
            "{{ 'a' + 1 }}",
        ] {
            assert!(render(source).is_err(), "{source}");
        }
    }

    #[test]
    fn messages_are_plain_json() {
        let message: Message = serde_json::from_str(r#"{"role":"user","content":"Hi"}"#).unwrap();
        assert_eq!(message, Message::new("user", "Hi"));
        assert_eq!(serde_json::to_string(&message).unwrap(), r#"{"role":"user","content":"Hi"}"#);
    }
}
