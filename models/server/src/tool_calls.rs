//! Calls of tools in answers, as OpenAI shows them.

use bitnet_burn_engine::sampling::StopMatcher;
use bitnet_burn_engine::tools::{CallForm, Tool, ToolCall};
use serde_json::{Value, json};

/// The tools that a model was told of, and how it calls them.
#[derive(Clone, Debug)]
pub(crate) struct Offered {
    pub form: CallForm,
    pub tools: Vec<Tool>,
    /// What the prompt ends with that is the beginning of a call.
    pub begun: &'static str,
}

impl Offered {
    /// The text before the calls of a whole answer, and the calls.
    pub(crate) fn split(&self, text: &str) -> (String, Vec<ToolCall>) {
        let whole = format!("{}{text}", self.begun);
        let (text, calls) = self.form.split(&whole, &self.tools);
        (text.to_owned(), calls)
    }
}

/// An answer whose calls of tools are told when they are complete.
#[derive(Default)]
pub(crate) struct Held {
    /// If tools were offered: what they are, and what finds where the first call begins. It holds back what may become that.
    offered: Option<(Offered, StopMatcher)>,
    /// The whole text, if tools were offered, and how much of it was shown.
    seen: String,
    shown: usize,
}

impl Held {
    pub(crate) fn new(offered: Option<&Offered>) -> Self {
        let matcher =
            |offered: &Offered| Some((offered.clone(), StopMatcher::new(offered.form.begins()).ok()?));
        let mut held = Self { offered: offered.and_then(matcher), ..Self::default() };
        if let Some(offered) = offered {
            held.push(offered.begun);
        }
        held
    }

    /// The text that may be shown now.
    pub(crate) fn push(&mut self, text: &str) -> String {
        let Some((_, matcher)) = &mut self.offered else { return text.to_owned() };
        self.seen.push_str(text);
        let text = matcher.push(text).text;
        self.shown += text.len();
        text
    }

    /// The text that was held back, and the calls.
    pub(crate) fn end(&mut self) -> (String, Vec<ToolCall>) {
        let Some((offered, _)) = &self.offered else { return (String::new(), Vec::new()) };
        let rest = &self.seen[self.shown..];
        match offered.form.parse(rest, &offered.tools) {
            Some(calls) => (String::new(), calls),
            // What only looks like a call is text.
            None => (rest.to_owned(), Vec::new()),
        }
    }
}

/// The calls as OpenAI shows them. `id` makes their names.
pub(crate) fn to_json(form: CallForm, calls: &[ToolCall], id: &str, with_index: bool) -> Value {
    let call = |(i, call): (usize, &ToolCall)| {
        let id = match form {
            // Templates of this form refuse other ids than those of nine letters and digits.
            CallForm::Mistral | CallForm::MistralArgs => short_id(id, i),
            _ => format!("call_{id}_{i}"),
        };
        let mut value = json!({
            "id": id,
            "type": "function",
            "function": { "name": call.name, "arguments": call.arguments },
        });
        if with_index {
            value["index"] = json!(i);
        }
        value
    };
    calls.iter().enumerate().map(call).collect()
}

/// Nine letters and digits for a call, by FNV-1a of its answer's id.
fn short_id(id: &str, call: usize) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let bytes = id.bytes().chain(call.to_le_bytes());
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut digit = || {
        let digit = DIGITS[(hash % 36) as usize];
        hash /= 36;
        char::from(digit)
    };
    (0..9).map(|_| digit()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(form: CallForm, begun: &'static str) -> Offered {
        let tools = vec![Tool { name: "now".into(), parameters: None }];
        Offered { form, tools, begun }
    }

    /// What a stream of these pieces shows at once, what it shows at the end, and its calls.
    fn streamed(offered: &Offered, pieces: &[&str]) -> (String, String, Vec<ToolCall>) {
        let mut held = Held::new(Some(offered));
        let shown: String = pieces.iter().map(|piece| held.push(piece)).collect();
        let (rest, calls) = held.end();
        (shown, rest, calls)
    }

    #[test]
    fn streams_show_text_at_once_and_calls_at_the_end() {
        let now = ToolCall { name: "now".into(), arguments: "{}".into() };
        for (form, begun, pieces) in [
            (
                CallForm::Hermes,
                "",
                &["Well. <tool", "_call>{\"name\": \"now\", ", "\"arguments\": {}}</tool_call>"][..],
            ),
            (CallForm::Llama, "", &["Well. <|python_tag|>", "{\"name\"", ": \"now\", \"parameters\": {}}"]),
            (CallForm::Llama, "", &["Well. {\"na", "me\": \"now\", \"parameters\": {}}"]),
            (CallForm::Mistral, "", &["Well. [TOOL_CALLS]", " [{\"name\": \"now\", \"arguments\": {}}]"]),
            (CallForm::MistralArgs, "", &["Well. ", "[TOOL_CALLS]", "now", "[ARGS]", "{}"]),
            (CallForm::Xml, "", &["Well. <tool_call>\n<func", "tion=now>\n</function>\n</tool_call>"]),
        ] {
            let offered = offered(form, begun);
            let found = streamed(&offered, pieces);
            assert_eq!(found, ("Well. ".into(), String::new(), vec![now.clone()]), "{form:?}");
            assert_eq!(offered.split(&pieces.concat()), ("Well.".into(), vec![now.clone()]), "{form:?}");
        }
        // The prompt has the beginning of the call.
        let begun = offered(CallForm::Mistral, "[TOOL_CALLS]");
        let pieces = ["[{\"name\": \"now\", ", "\"arguments\": {}}]"];
        assert_eq!(streamed(&begun, &pieces), (String::new(), String::new(), vec![now.clone()]));
        assert_eq!(begun.split(&pieces.concat()), (String::new(), vec![now]));
        // What only looks like a call.
        let llama = offered(CallForm::Llama, "");
        let pieces = ["It is {\"name\": ", "1} here"];
        assert_eq!(streamed(&llama, &pieces), ("It is ".into(), "{\"name\": 1} here".into(), Vec::new()));
        assert_eq!(llama.split(&pieces.concat()), (pieces.concat(), Vec::new()));
        assert_eq!(streamed(&llama, &["a {\"n"]), ("a ".into(), "{\"n".into(), Vec::new()));
        // Without tools.
        let mut held = Held::new(None);
        assert_eq!((held.push("<tool_call>"), held.end().0), ("<tool_call>".into(), String::new()));
    }

    #[test]
    fn ids_are_what_the_model_s_template_takes() {
        let calls = [
            ToolCall { name: "now".into(), arguments: "{}".into() },
            ToolCall { name: "b".into(), arguments: "{}".into() },
        ];
        let hermes = to_json(CallForm::Hermes, &calls, "x", true);
        assert_eq!((&hermes[0]["id"], &hermes[1]["index"]), (&json!("call_x_0"), &json!(1)));
        let mistral = to_json(CallForm::Mistral, &calls, "x", false);
        let ids: Vec<&str> = (0..2).map(|i| mistral[i]["id"].as_str().unwrap()).collect();
        assert!(
            ids.iter().all(|id| id.len() == 9 && id.bytes().all(|b| b.is_ascii_alphanumeric())),
            "{ids:?}"
        );
        assert_ne!(ids[0], ids[1]);
    }
}
