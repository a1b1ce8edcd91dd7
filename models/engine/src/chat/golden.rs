//! Against Jinja2: `testdata/chat/make_goldens.py` wrote what it makes of these templates.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use minijinja::Value;

use super::{ChatError, ChatTemplate, Message, TemplateTokens, engine, source};

/// The time that `strftime_now` shows in the goldens.
const NOW: u64 = 1_721_910_896;

/// Renders with variables that are written as Python's `repr` writes a dictionary.
fn render(source: &str, variables: &str) -> Result<String, ChatError> {
    let clock = || UNIX_EPOCH + Duration::from_secs(NOW);
    let expression = source::translate(&format!("{{{{ {variables} }}}}")).unwrap();
    let expression = expression.strip_prefix("{{").unwrap().strip_suffix("}}").unwrap();
    let environment = engine::environment(clock);
    let variables: Value = environment.compile_expression(expression).unwrap().eval(()).unwrap();
    ChatTemplate::with_clock("t.jinja".into(), source, clock)?.render_with(variables)
}

#[derive(serde::Deserialize)]
struct Golden {
    name: String,
    template: String,
    variables: String,
    /// Absent where Jinja2 fails.
    text: Option<String>,
}

/// What is made of templates of which Jinja2 makes something else.
#[derive(Debug, Default, PartialEq, serde::Deserialize, serde::Serialize)]
struct Differs {
    /// Errors, where Jinja2 writes a text.
    refused: BTreeMap<String, String>,
    /// Texts, where Jinja2 fails.
    lenient: BTreeMap<String, String>,
    /// Other texts.
    other: BTreeMap<String, String>,
}

fn read<T: serde::de::DeserializeOwned>(name: &str) -> T {
    let path = format!("{}/testdata/chat/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn templates_are_rendered_as_jinja2_does() {
    let goldens: Vec<Golden> = read("goldens.json");
    let expected: Differs = read("differs.json");
    let mut differs = Differs::default();
    assert!(goldens.iter().filter(|golden| golden.text.is_some()).count() > 300);
    for Golden { name, template, variables, text } in goldens {
        match (render(&template, &variables), text) {
            (Ok(own), Some(text)) if own == text => {}
            (Ok(own), Some(_)) => drop(differs.other.insert(name, own)),
            (Ok(own), None) => drop(differs.lenient.insert(name, own)),
            (Err(e), Some(_)) => drop(differs.refused.insert(name, e.to_string())),
            (Err(_), None) => {}
        }
    }
    assert!(differs == expected, "{}", serde_json::to_string_pretty(&differs).unwrap());
}

/// The inputs that showed differences first.
#[test]
fn found_in_use() {
    let render = |source: &str| {
        let messages = [Message::new("user", "Hi")];
        ChatTemplate::new(source).unwrap().render(&messages, &TemplateTokens::default(), true).unwrap()
    };
    assert_eq!(render("a\r\n{% for m in messages %}\r\n{{ m.content }}\r\n{% endfor %}\rb\r\n"), "a\nHi\nb");
    let dict = "{{ {'name': 'f', 'arguments': {'b': 1, 'a': 2}} | tojson }}";
    assert_eq!(render(dict), r#"{"name": "f", "arguments": {"b": 1, "a": 2}}"#);
    assert_eq!(render("{{ {'b': 1, 'a': 2} | dictsort(by='value', reverse=true) }}"), "[('a', 2), ('b', 1)]");
    assert_eq!(render("{{ ['b', 'A'] | sort(case_sensitive=true, reverse=true) }}"), "['b', 'A']");
    assert_eq!(render("{{ ['a', 'A'] | unique(case_sensitive=true) | list }}"), "['a', 'A']");
    assert_eq!(render("{{ '' and 'x' }}|{{ ('' and 'x') + 'q' }}"), "|q");
}
