//! JSON objects for templates, with their keys in the order in which they came.

use std::fmt;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, Value};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

/// A JSON object that a template sees: a message, say, or a tool. Its keys keep their order, which loops and `tojson` show.
///
/// ```
/// # use bitnet_burn_engine::chat::{ChatTemplate, Dictionary, TemplateTokens};
/// let message: Dictionary = serde_json::from_str(r#"{"role": "user", "content": "Hi", "name": "Ann"}"#)?;
/// let template = ChatTemplate::new("{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}")?;
/// assert_eq!(template.render_chat(&[message], &[], &TemplateTokens::default(), true)?, "Ann: Hi");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Dictionary(Vec<(Arc<str>, Value)>);

impl Dictionary {
    /// Sets a key: in place, or behind the others.
    pub fn insert(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        match self.0.iter_mut().find(|(known, _)| **known == *key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key.into(), value)),
        }
    }

    /// Sets the keys of another one that are not there yet.
    pub fn extend(&mut self, other: Self) {
        for (key, value) in other.0 {
            if !self.0.iter().any(|(known, _)| *known == key) {
                self.0.push((key, value));
            }
        }
    }
}

impl From<Dictionary> for Value {
    fn from(dictionary: Dictionary) -> Self {
        Self::from_object(dictionary)
    }
}

impl Object for Dictionary {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let key = key.as_str()?;
        self.0.iter().find(|(known, _)| **known == *key).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(key, _)| Value::from(key.clone())).collect())
    }
}

impl<'de> Deserialize<'de> for Dictionary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;

        impl<'de> Visitor<'de> for Pairs {
            type Value = Dictionary;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Dictionary, A::Error> {
                let mut dictionary = Dictionary::default();
                // The last of equal keys counts, as in Python.
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    dictionary.insert(&key, value);
                }
                Ok(dictionary)
            }
        }

        deserializer.deserialize_map(Pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{ChatTemplate, TemplateTokens};

    #[test]
    fn keys_keep_their_order() {
        let text = r#"{"name": "f", "parameters": {"b": {"type": "string"}, "a": [1, 2.5, null, true]}, "name": "g"}"#;
        let tool: Dictionary = serde_json::from_str(text).unwrap();
        let render = |source: &str| {
            let template = ChatTemplate::new(source).unwrap();
            template.render_chat(&[], std::slice::from_ref(&tool), &TemplateTokens::default(), true).unwrap()
        };
        let json = r#"{"name": "g", "parameters": {"b": {"type": "string"}, "a": [1, 2.5, null, true]}}"#;
        assert_eq!(render("{{ tools[0] | tojson }}"), json);
        assert_eq!(render("{% for key in tools[0] %}{{ key }};{% endfor %}"), "name;parameters;");
        assert_eq!(render("{{ tools[0].parameters.a[1] }}{{ 'x' in tools[0] }}"), "2.5False");
        assert!(serde_json::from_str::<Dictionary>("[1]").is_err());
    }

    #[test]
    fn without_tools_there_are_none() {
        let template = ChatTemplate::new("{% if tools is none %}none{% endif %}").unwrap();
        assert_eq!(template.render_chat(&[], &[], &TemplateTokens::default(), true).unwrap(), "none");
    }
}
