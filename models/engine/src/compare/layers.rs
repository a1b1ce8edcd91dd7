//! What the layers of two models say about where they part.

use std::fmt;

use serde::Serialize;

/// Where the values of two models part, position by position: in the order of the computation, at the first place whose
/// inputs agree and whose outputs don't. Values agree if they differ by less than 2e-5 of the largest of their row.
///
/// The positions behind the first one that is [`Different`](Outcome::Different) are not looked at.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Layers {
    /// Positions that were looked at.
    pub positions: usize,
    /// Of these, those whose values agree in all layers.
    pub same: usize,
    /// Those that part by a [rounding](Outcome::Rounding).
    pub rounding: usize,
    /// Those that part where they [look back](Outcome::Inherited).
    pub inherited: usize,
    /// Those of which that [can't be said](Outcome::Unknown).
    pub unknown: usize,
    /// Those that [compute something else](Outcome::Different): at most one.
    pub different: usize,
    /// Whether roundings to int8 explain every difference; `None` if there is no difference, or it can't be said.
    pub explained_by_rounding: Option<bool>,
    /// The first position whose values part.
    pub first: Option<Place>,
    /// The first one that computes something else, if `first` is another.
    pub first_different: Option<Place>,
}

/// Why the values of a position part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// An activation lies next to the boundary between two int8 codes, and A and B round it to either side. That moves the
    /// outputs by one step times the weights of this activation. It was checked that it moves them just so, which needs
    /// equal weights.
    Rounding,
    /// The position looks back at keys and values, or a state, of earlier positions that part already.
    Inherited,
    /// The inputs agree and the outputs don't: A and B compute something else.
    Different,
    /// Rounding can't be told from another reason here.
    Unknown,
}

/// The place where the values of a position part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Place {
    /// The position.
    pub position: usize,
    /// The layer, from 0; the number of layers for what follows them.
    pub layer: usize,
    /// The part: `embedding`, `q_proj`, `attention`, `o_proj`, `gate_proj`, `activation`, `down_proj`, `lm_head` ...
    pub part: &'static str,
    /// Why they part.
    pub outcome: Outcome,
    /// Outputs of the part.
    pub outputs: usize,
    /// Outputs that differ.
    pub outputs_that_differ: usize,
    /// The output that differs most.
    pub output: usize,
    /// Its value in A.
    pub a: f32,
    /// Its value in B.
    pub b: f32,
    /// The activation that is rounded to either side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounding: Option<Rounding>,
    /// What that means, in words.
    pub meaning: String,
}

/// An activation that A and B round to different int8 codes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rounding {
    /// Which of the part's inputs.
    pub input: usize,
    /// Its value in A, in steps of int8: before rounding.
    pub a: f64,
    /// Its value in B.
    pub b: f64,
    /// Activations of this row that are rounded differently.
    pub activations: usize,
}

impl Layers {
    /// Counts a position.
    pub(super) fn add(&mut self, place: Option<Place>) {
        self.positions += 1;
        let Some(place) = place else {
            self.same += 1;
            return;
        };
        match place.outcome {
            Outcome::Rounding => self.rounding += 1,
            Outcome::Inherited => self.inherited += 1,
            Outcome::Unknown => self.unknown += 1,
            Outcome::Different => self.different += 1,
        }
        if self.first.is_none() {
            self.first = Some(place);
        } else if place.outcome == Outcome::Different {
            self.first_different = Some(place);
        }
    }

    pub(super) fn finish(mut self) -> Self {
        self.explained_by_rounding = match (self.different, self.unknown, self.rounding) {
            (1.., _, _) => Some(false),
            (0, 0, 1..) => Some(true),
            _ => None,
        };
        self
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { position, layer, part, outputs, outputs_that_differ, output, a, b, meaning, .. } = self;
        let place = if *part == "lm_head" { String::new() } else { format!("layer {layer}, ") };
        write!(
            f,
            "position {position}, {place}{part}: {outputs_that_differ} of {outputs} outputs differ, most output {output}: {a} in A, \
             {b} in B. {meaning}"
        )
    }
}
