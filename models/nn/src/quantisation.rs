//! How weights and activations of ternary projections are quantised.

use std::fmt;
use std::str::FromStr;

use bitnet_burn_formats::WeightScale;
use bitnet_burn_manager::ScaleKind;
use serde::{Deserialize, Serialize};

use crate::{ConfigError, ModelConfig, Projection};

/// How a ternary layer quantises its weights and its activations. The default is BitNet's: one scale for all weights, and
/// int8 by row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Quantisation {
    /// Weights that share a scale.
    pub scale: WeightScale,
    /// Activations that share one.
    pub activations: ActivationRule,
}

impl Quantisation {
    /// Whether it is BitNet's: one scale for all weights, and int8 by row.
    pub fn is_bitnet(self) -> bool {
        self.scale == WeightScale::Tensor
            && matches!(self.activations, ActivationRule::Model | ActivationRule::Row)
    }

    /// Checks that a layer with `d_input` input features can be quantised so.
    ///
    /// # Errors
    /// If groups of weights do not divide the input features, are none of 32, 64, 128 and 256, or are smaller than what
    /// shares a scale of activations: a row.
    pub fn check(self, d_input: usize) -> Result<(), ConfigError> {
        if let Some(problem) = self.scale.problem(d_input) {
            return Err(ConfigError { field: "scale", problem: format!("is {problem}") });
        }
        if let (ActivationRule::Row, group @ WeightScale::Group(_)) = (self.activations, self.scale) {
            let problem = format!(
                "is row, and the weights share a scale in groups: their activations need a scale for each group, too; \
                 use {group}"
            );
            return Err(ConfigError { field: "activations", problem });
        }
        match self.activations {
            ActivationRule::Group(group) if !is_group(group) => {
                let problem = format!("is {}: {GROUP_TEXT}", self.activations);
                Err(ConfigError { field: "activations", problem })
            }
            _ => Ok(()),
        }
    }

    /// Checks that all projections of a model can be quantised so.
    ///
    /// # Errors
    /// As [`check`](Self::check), naming the projection.
    pub fn check_model(self, config: &ModelConfig) -> Result<(), ConfigError> {
        let mut all = (0..config.n_layers).flat_map(|layer| Projection::of_layer(layer, config));
        all.try_for_each(|which| {
            let (n, k) = which.shape(config);
            self.check(k).map_err(|ConfigError { field, problem }| {
                let problem = format!("{problem} ({} projections [{n}, {k}])", which.name());
                ConfigError { field, problem }
            })
        })
    }

    /// Activations of a row of `d_input` values that share a scale, 0 for the whole row; `None` where they are not quantised.
    pub fn activation_group(self, d_input: usize) -> Option<usize> {
        match (self.scale, self.activations) {
            (WeightScale::Tensor, ActivationRule::Model) => Some(0),
            (scale, rule) => rule.group(scale.group(), d_input),
        }
    }

    /// The rule by which activations of `d_input` values are computed: what [`ActivationRule::Model`] stands for, with the
    /// group that the weights and the row allow.
    pub fn activation_rule(self, d_input: usize) -> ActivationRule {
        match self.activation_group(d_input) {
            None => ActivationRule::Float,
            Some(0) => ActivationRule::Row,
            Some(group) => ActivationRule::Group(group),
        }
    }

    /// The rules by which the activations of a model's projections are computed, each once.
    pub fn activation_rules(self, config: &ModelConfig) -> Vec<ActivationRule> {
        let mut rules = Vec::new();
        for which in (0..config.n_layers).flat_map(|layer| Projection::of_layer(layer, config)) {
            let rule = self.activation_rule(which.shape(config).1);
            if !rules.contains(&rule) {
                rules.push(rule);
            }
        }
        rules
    }

    /// That of packed weights.
    pub(crate) fn of_packed(scales: ScaleKind) -> Self {
        let ScaleKind::Groups { weights, activations, .. } = scales else { return Self::default() };
        let scale = if weights == 0 { WeightScale::Row } else { WeightScale::Group(weights) };
        let rule = if activations == 0 { ActivationRule::Row } else { ActivationRule::Group(activations) };
        Self { scale, activations: rule }
    }
}

/// How the activations of ternary projections are quantised. Projections that are not ternary have f32 activations. Its text
/// is `model`, `row`, `group:N` or `float`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ActivationRule {
    /// As the model's files declare: to int8 by row (BitNet, and [layers](crate::BitLinearConfig) with one scale for all
    /// weights). Where they declare nothing, and in layers with many scales, to int8 by groups of 32 values. (The engine does
    /// not quantise a file's activations on GPUs then, which have no kernels for many scales.)
    #[default]
    Model,
    /// To int8 with a scale for each row.
    Row,
    /// To int8 with a scale for each group of this many values, a multiple of 32; for weights that share a scale in smaller
    /// groups, these; for rows that are not longer, the row.
    Group(usize),
    /// Not at all: what a float reference computes, and slow.
    Float,
}

impl ActivationRule {
    /// The values that share a scale of activations, where the model declares nothing.
    pub const GROUP: usize = 32;

    /// Activations that share a scale, for rows of `k` weights with many scales, of which `group` share one; 0 is a row.
    /// `None`: the rule does not fit such weights, or quantises nothing.
    pub fn group(self, group: usize, k: usize) -> Option<usize> {
        let at_most = |n: usize| match group {
            0 if n >= k => 0,
            0 => n,
            group => common(n, group),
        };
        match self {
            Self::Model => Some(at_most(Self::GROUP)),
            Self::Group(n) => Some(at_most(n)),
            Self::Row if group == 0 => Some(0),
            Self::Row | Self::Float => None,
        }
    }
}

fn is_group(n: usize) -> bool {
    n > 0 && n <= LARGEST_GROUP && n.is_multiple_of(32)
}

/// Rows are shorter.
const LARGEST_GROUP: usize = 8_388_576;

const GROUP_TEXT: &str = "a group is a multiple of 32 values, such as group:32, and has 8388576 at most";

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
            Some(Ok(n)) if is_group(n) => return Ok(Self::Group(n)),
            Some(_) => return Err(format!("{text:?}: {GROUP_TEXT}")),
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
        let of = |rule: ActivationRule, group| rule.group(group, 256);
        assert_eq!([0, 32, 64, 128].map(|g| of(ActivationRule::Group(64), g)), [64, 32, 64, 64].map(Some));
        assert_eq!(of(ActivationRule::Group(96), 64), Some(32));
        assert_eq!([0, 64].map(|g| of(ActivationRule::Row, g)), [Some(0), None]);
        assert_eq!(of(ActivationRule::Float, 0), None);
        // A group that is not shorter than the row is the row.
        assert_eq!([224, 256, 4096].map(|n| of(ActivationRule::Group(n), 0)), [224, 0, 0].map(Some));
        assert_eq!(of(ActivationRule::Group(4096), 128), Some(128));
        assert_eq!([32, 31].map(|k| ActivationRule::Model.group(0, k)), [Some(0); 2]);
    }

    #[test]
    fn weights_and_activations_fit_together() {
        use WeightScale::{Group, Row, Tensor};
        let of = |scale, activations| Quantisation { scale, activations };
        for (scale, rule, group) in [
            (Tensor, ActivationRule::Model, Some(0)),
            (Tensor, ActivationRule::Group(64), Some(64)),
            (Row, ActivationRule::Model, Some(32)),
            (Row, ActivationRule::Row, Some(0)),
            (Group(64), ActivationRule::Model, Some(32)),
            (Group(64), ActivationRule::Group(128), Some(64)),
            (Group(64), ActivationRule::Float, None),
        ] {
            of(scale, rule).check(192).unwrap();
            assert_eq!(of(scale, rule).activation_group(192), group, "{scale}, {rule}");
        }
        for (scale, rule, k, expected) in [
            (Group(64), ActivationRule::Model, 96, "`scale` is group:64, which does not divide rows of 96"),
            (Group(96), ActivationRule::Model, 96, "32, 64, 128 or 256"),
            (Group(64), ActivationRule::Row, 64, "use group:64"),
            (Tensor, ActivationRule::Group(33), 66, "multiple of 32"),
        ] {
            let error = of(scale, rule).check(k).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        for kind in [(0, 0), (0, 96), (64, 32), (128, 128)] {
            let scales = ScaleKind::Groups { weights: kind.0, activations: kind.1, half: true };
            assert_eq!(Quantisation::of_packed(scales).activation_group(192), Some(kind.1));
        }
    }
}
