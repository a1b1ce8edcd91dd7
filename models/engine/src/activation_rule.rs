//! How the activations of ternary projections are quantised.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the activations of ternary projections are quantised. Projections that are not ternary have f32 activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ActivationRule {
    /// As the model's files declare: to int8 by row (BitNet). Where they declare nothing, to int8 by groups of
    /// 32 values in host memory, and not at all on GPUs, which have no kernels for many scales.
    #[default]
    Model,
    /// To int8 with a scale for each row.
    Row,
    /// To int8 with a scale for each group of this many values, a multiple of 32; for weights that share a scale in smaller
    /// groups, these.
    Group(usize),
    /// Not at all: what a float reference computes, and slow.
    Float,
}

/// The values that share a scale of activations, where the model declares nothing.
pub(crate) const GROUP: usize = 32;

impl ActivationRule {
    /// Activations that share a scale, for weights of which `group` share one; 0 is a row. `None`: the rule does not fit such
    /// weights.
    pub(crate) fn group(self, group: usize) -> Option<usize> {
        let at_most = |n: usize| if group == 0 { n } else { common(n, group) };
        match self {
            Self::Model => Some(at_most(GROUP)),
            Self::Group(n) => Some(at_most(n)),
            Self::Row if group == 0 => Some(0),
            Self::Row | Self::Float => None,
        }
    }
}

/// The greatest common divisor.
fn common(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common(b, a % b) }
}

impl fmt::Display for ActivationRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model => f.write_str("model"),
            Self::Row => f.write_str("row"),
            Self::Group(n) => write!(f, "group:{n}"),
            Self::Float => f.write_str("float"),
        }
    }
}

impl From<ActivationRule> for String {
    fn from(rule: ActivationRule) -> Self {
        rule.to_string()
    }
}

impl TryFrom<String> for ActivationRule {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for ActivationRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("group:").map(str::parse) {
            Some(Ok(n)) if n > 0 && n < 1 << 23 && usize::is_multiple_of(n, 32) => return Ok(Self::Group(n)),
            Some(_) => return Err(format!("{text:?}: a group is a multiple of 32 values, such as group:32")),
            None => {}
        }
        match text {
            "model" => Ok(Self::Model),
            "row" => Ok(Self::Row),
            "float" => Ok(Self::Float),
            _ => Err(format!("{text:?}: possible values: model, row, group:N, float")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_have_names() {
        for (text, rule) in [
            ("model", ActivationRule::Model),
            ("row", ActivationRule::Row),
            ("group:96", ActivationRule::Group(96)),
            ("float", ActivationRule::Float),
        ] {
            assert_eq!((text.parse(), rule.to_string()), (Ok(rule), text.to_owned()));
        }
        for text in
            ["", "rows", "group", "group:", "group:0", "group:33", "group:-32", "group:99999999999999999999"]
        {
            assert!(text.parse::<ActivationRule>().is_err(), "{text}");
        }
    }

    #[test]
    fn groups_of_activations_divide_those_of_weights() {
        assert_eq!([0, 32, 64, 128].map(|g| ActivationRule::Group(64).group(g)), [64, 32, 64, 64].map(Some));
        assert_eq!(ActivationRule::Group(96).group(64), Some(32));
        assert_eq!([0, 64].map(|g| ActivationRule::Row.group(g)), [Some(0), None]);
        assert_eq!(ActivationRule::Float.group(0), None);
    }
}
