//! Finds where two models part: the first place of a position whose inputs agree and whose outputs don't.
//!
//! A rounding is proved, not guessed. Let x be the input of a projection behind its norm, and s its step (the largest
//! magnitude of a row or group / 127). If A rounds activation i up and B rounds it down, output j differs by s * W\[j, i\].
//! So the candidates are the activations next to a boundary. A's own kernel computes column i of W, as the output for the
//! input that is 1 at i and 0 elsewhere. What s times these columns leaves of the difference must be float noise.

use std::ops::Range;

use bitnet_burn::backends::devices;
use bitnet_burn::backends::ops::{self, BitLinearInput};
use bitnet_burn::{
    Attention, BitBlock, BitLinear, BitLinearWeight, BitNet, CacheType, FeedForward, ForwardError,
    GatedActivation, RmsNorm, Seen, Stage,
};
use burn::tensor::{Tensor, TensorData};

use super::layers::{Layers, Outcome, Place, Rounding};
use super::{CompareError, ModelSide};
use crate::engine::Engine;
use crate::generate::{GenerateError, values};

/// Values agree if they differ by less than this part of the largest of their row. Sums in f32 stay below a tenth of it.
const NOISE: f64 = 2e-5;
/// They also agree if they differ by no more than this times what their inputs differ by: sums and products amplify noise.
const AMPLIFIED: f64 = 10.0;
/// The same for attention and gated DeltaNets. Their exponentials amplify noise by the size of the exponents.
const AMPLIFIED_BY_ATTENTION: f64 = 100.0;
/// How far an activation may be from a boundary between codes, in steps, to be tried: sums in f32 are no more exact near 127.
const BOUNDARY: f64 = 1e-4;
/// Candidates of a row that are tried, the nearest to a boundary first.
const CANDIDATES: usize = 16;
/// Bytes of the values that are kept of one side.
const KEPT: usize = 64 << 20;

/// Looks at what the layers of two models computed.
#[derive(Debug)]
pub(super) struct Examiner {
    models: [Engine; 2],
    layers: Layers,
    /// What the layers look back at.
    past: Vec<Past>,
}

/// Keys and values, or states, of earlier positions of a layer.
#[derive(Clone, Copy, Debug, Default)]
struct Past {
    /// Whether some of them part.
    parted: bool,
    /// How far those that agree are apart, relative to the largest of their row.
    noise: f64,
}

/// The values of a stage on the host, A's and B's.
struct Values {
    layer: usize,
    stage: Stage,
    width: usize,
    of: [Vec<f32>; 2],
}

/// The outputs of a part of a layer.
struct Part<'a> {
    name: &'static str,
    layer: usize,
    kind: Kind<'a>,
    /// Its stage, by number; its input is the stage in front of it.
    at: usize,
    columns: Range<usize>,
}

/// What computes a part.
enum Kind<'a> {
    Embedding,
    /// The stage in front of it is added to the residual stream, times this.
    Residual(f64),
    /// A's and B's projection, behind these norms.
    Projection([&'a BitLinear; 2], [Option<&'a RmsNorm>; 2]),
    Attention,
    DeltaNet,
    Experts,
    /// Which power of the gate it grows with.
    Activation(i32),
}

/// Why the outputs of a part differ: the rounding that explains it, and a sentence for people.
struct Judgement(Outcome, Option<Rounding>, String);

impl Judgement {
    fn new(outcome: Outcome, meaning: impl Into<String>) -> Self {
        Self(outcome, None, meaning.into())
    }

    fn different(meaning: impl Into<String>) -> Self {
        Self::new(Outcome::Different, meaning)
    }
}

impl Examiner {
    /// For two models; the reason, if their layers can't be compared.
    pub fn new(a: &ModelSide, b: &ModelSide) -> Result<Self, String> {
        let models = [a.engine.clone(), b.engine.clone()];
        let [a, b] = models.each_ref().map(|engine| {
            let shape = |block: &BitBlock| -> Vec<_> {
                let all = block.projections();
                all.iter().map(|(which, layer)| (*which, layer.d_input(), layer.d_output())).collect()
            };
            engine.model().blocks.iter().map(shape).collect::<Vec<_>>()
        });
        if a != b || a.is_empty() {
            return Err("the models have other numbers or shapes of layers".into());
        }
        Ok(Self { models, layers: Layers::default(), past: vec![Past::default(); a.len()] })
    }

    /// Whether nothing more is to be found.
    pub fn is_done(&self) -> bool {
        self.layers.different > 0
    }

    /// Positions whose values take no more than [`KEPT`] bytes.
    pub fn rows(&self) -> usize {
        let hidden = self.models[0].checkpoint().config().hidden_size;
        let floats = |block: &BitBlock| {
            let attention = match &block.attention {
                Attention::Softmax(of) => {
                    of.q_proj.d_output() + 2 * of.k_proj.d_output() + of.o_proj.d_input()
                }
                Attention::DeltaNet(_) => 0,
            };
            let feed_forward = match &block.feed_forward {
                FeedForward::One(of) => 3 * of.gate_proj.d_output(),
                FeedForward::Experts(_) => 0,
            };
            4 * hidden + attention + feed_forward
        };
        let floats: usize = self.models[0].model().blocks.iter().map(floats).sum();
        KEPT / (4 * floats)
    }

    pub fn finish(self) -> Layers {
        self.layers.finish()
    }

    /// Looks at some positions, until one computes something else.
    pub fn examine(
        &mut self,
        positions: Range<usize>,
        seen: [Vec<Seen>; 2],
        logits: [&[f32]; 2],
    ) -> Result<(), CompareError> {
        let models = self.models.clone();
        let stages = on_host(seen)?;
        let parts = parts([models[0].model(), models[1].model()], &stages);
        for (row, position) in positions.enumerate() {
            let found = parts.iter().find(|part| self.parted(part, &stages, row));
            let place = match found {
                Some(part) => {
                    let judgement = self.judge(part, &stages, row)?;
                    Some(part.outputs(&stages, row).place(position, (part.layer, part.name), judgement))
                }
                None => self.head(position, row, &stages, logits),
            };
            self.layers.add(place);
            if self.is_done() {
                break;
            }
            for part in &parts {
                let kept = match part.kind {
                    Kind::Projection(..) if matches!(part.name, "k_proj" | "v_proj") => {
                        part.outputs(&stages, row)
                    }
                    Kind::DeltaNet => part.inputs(&stages, row),
                    _ => continue,
                };
                // Behind the place where this position parts, its inputs explain nothing.
                let behind = found.is_some_and(|found| found.at < part.at);
                let difference = kept.difference();
                let parted = difference > NOISE && (behind || self.parted(part, &stages, row));
                let past = &mut self.past[part.layer];
                match parted {
                    true => past.parted = true,
                    false => past.noise = past.noise.max(difference),
                }
            }
        }
        Ok(())
    }

    /// Whether the outputs of a part are further apart than its inputs explain.
    fn parted(&self, part: &Part<'_>, stages: &[Values], row: usize) -> bool {
        let inputs = || part.inputs(stages, row).difference();
        let explained = match part.kind {
            Kind::Embedding => 0.0,
            Kind::Residual(_) => AMPLIFIED * inputs().max(part.residual_before(stages, row)),
            Kind::Attention | Kind::DeltaNet => {
                AMPLIFIED_BY_ATTENTION * inputs().max(self.past[part.layer].noise)
            }
            Kind::Projection(..) | Kind::Experts | Kind::Activation(_) => AMPLIFIED * inputs(),
        };
        part.outputs(stages, row).difference() > NOISE.max(explained)
    }

    /// The place of a position whose layers agree, if its logits don't.
    fn head(&self, position: usize, row: usize, stages: &[Values], logits: [&[f32]; 2]) -> Option<Place> {
        let vocabulary = self.models[0].checkpoint().config().vocab_size;
        let rows = Rows { of: logits.map(|all| &all[row * vocabulary..][..vocabulary]), floor: 0.0 };
        let inputs = stages.last().map_or(0.0, |stage| stage.all(row).difference());
        if rows.difference() <= NOISE.max(AMPLIFIED * inputs) {
            return None;
        }
        let [a, b] = self.models.each_ref().map(|engine| engine.model().head_description());
        let judgement = if a != b {
            Judgement::different(format!(
                "The output projections are computed in other ways: {a} in A, {b} in B."
            ))
        } else if a.contains("int8") {
            let meaning = "Other weights of the last norm or the output projection, or a rounding of its int8 activations.";
            Judgement::new(Outcome::Unknown, meaning)
        } else {
            Judgement::different("Other weights of the last norm or the output projection.")
        };
        Some(rows.place(position, (self.past.len(), "lm_head"), judgement))
    }

    fn judge(&self, part: &Part<'_>, stages: &[Values], row: usize) -> Result<Judgement, CompareError> {
        let earlier = self.past.get(part.layer).is_some_and(|past| past.parted);
        let caches = self.models.each_ref().map(|engine| engine.settings().kv_cache);
        Ok(match &part.kind {
            Kind::Embedding => Judgement::different("Other embeddings."),
            Kind::Residual(_) => Judgement::different(
                "What is added agrees, the sum does not: other factors of the residual stream.",
            ),
            Kind::Activation(_) => Judgement::different("Gate and up agree: another activation function."),
            Kind::Experts => Judgement::new(
                Outcome::Unknown,
                "Experts are not looked into: another router or expert, or a rounding.",
            ),
            Kind::DeltaNet if earlier => {
                Judgement::new(Outcome::Inherited, "Inputs of earlier positions have parted.")
            }
            Kind::DeltaNet => Judgement::new(
                Outcome::Unknown,
                "Gated DeltaNets are not looked into: other weights, or a rounding.",
            ),
            Kind::Attention if earlier => {
                Judgement::new(Outcome::Inherited, "Keys or values of earlier positions have parted.")
            }
            Kind::Attention if caches[0] != caches[1] => {
                let [a, b] = caches.map(|kind| format!("{kind:?}").to_lowercase());
                Judgement::different(format!(
                    "Queries, keys and values agree. The KV cache of A is {a}, that of B {b}."
                ))
            }
            Kind::Attention if caches[0] == CacheType::Int8 => Judgement::new(
                Outcome::Unknown,
                "Queries, keys and values agree: other attention, or a rounding of the int8 KV cache.",
            ),
            Kind::Attention => Judgement::different(
                "Queries, keys and values agree: another RoPE (base, scaling, layout), other norms of queries and keys, or \
                 another window.",
            ),
            Kind::Projection(layers, norms) => {
                let (inputs, outputs) = (part.inputs(stages, row), part.outputs(stages, row));
                self.judge_projection(&inputs, &outputs, *layers, *norms)?
            }
        })
    }

    fn judge_projection(
        &self,
        inputs: &Rows<'_>,
        outputs: &Rows<'_>,
        layers: [&BitLinear; 2],
        norms: [Option<&RmsNorm>; 2],
    ) -> Result<Judgement, CompareError> {
        let rules = [0, 1].map(|i| {
            let quantises = self.models[i].model().quantises();
            let packed = matches!(layers[i].weight, BitLinearWeight::Packed(_));
            layers[i].activation_group().filter(|_| quantises && packed)
        });
        if rules[0] != rules[1] {
            let [a, b] = rules.map(|rule| match rule {
                None => "in f32".to_owned(),
                Some(0) => "as int8 by rows".to_owned(),
                Some(group) => format!("as int8 by groups of {group}"),
            });
            return Ok(Judgement::different(format!("A takes the activations {a}, B {b}.")));
        }
        if layers.iter().any(|layer| layer.rotation.is_some()) {
            let meaning =
                "Its input is rotated: other weights, or a rounding, which is not looked for there.";
            return Ok(Judgement::new(Outcome::Unknown, meaning));
        }
        let mut x = inputs.of.map(|row| row.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>());
        for (i, x) in x.iter_mut().enumerate() {
            for norm in norms[i].into_iter().chain(&layers[i].norm) {
                normalise(x, norm)?;
            }
        }
        let largest = x.iter().flatten().fold(0.0f64, |largest, v| largest.max(v.abs()));
        let apart = x[0].iter().zip(&x[1]).fold(0.0f64, |apart, (a, b)| apart.max((a - b).abs())) / largest;
        if apart > NOISE.max(AMPLIFIED * inputs.difference()) {
            let meaning =
                "Its input agrees, and differs behind the norm in front of it: other weights of the norm.";
            return Ok(Judgement::different(meaning));
        }
        if let Some(group) = rules[0]
            && let Some(rounding) =
                rounding([&x[0], &x[1]], NOISE.max(AMPLIFIED * apart), outputs, group, layers[0])?
        {
            let Rounding { input, a, b, activations } = rounding;
            let others = match activations {
                1 => String::new(),
                more => format!(" ({} more like it)", more - 1),
            };
            let meaning = format!(
                "A rounding to int8 explains it: input {input} is {a:.6} steps in A and {b:.6} in B{others}."
            );
            return Ok(Judgement(Outcome::Rounding, Some(rounding), meaning));
        }
        if let Some(ratio) = outputs.ratio() {
            let meaning = format!("B's outputs are {ratio:.6} times A's: another scale of the weights.");
            return Ok(Judgement::different(meaning));
        }
        if outputs.are_permuted() {
            let meaning =
                "Both have the same outputs in another order: the rows of the weights are permuted.";
            return Ok(Judgement::different(meaning));
        }
        Ok(Judgement::different(
            "Its input agrees, and no rounding explains it: other weights, scales or biases.",
        ))
    }
}

/// What both models computed, stage by stage.
fn on_host(seen: [Vec<Seen>; 2]) -> Result<Vec<Values>, CompareError> {
    let [a, b] = seen;
    let both = a.into_iter().zip(b);
    both.map(|(a, b)| {
        let (layer, stage, width) = (a.layer, a.stage, a.values.dims()[1]);
        Ok(Values { layer, stage, width, of: [values(a.values)?, values(b.values)?] })
    })
    .collect()
}

/// The parts of two models of one shape, in the order of the computation.
fn parts<'a>(models: [&'a BitNet; 2], stages: &[Values]) -> Vec<Part<'a>> {
    let mut parts = Vec::new();
    for (at, Values { layer, stage, width, .. }) in stages.iter().enumerate() {
        let layer = *layer;
        let mut start = 0;
        let mut part = |name, width: usize, kind| {
            parts.push(Part { name, layer, kind, at, columns: start..start + width });
            start += width;
        };
        let residual = Kind::Residual(f64::from(models[0].config().options.residual_scale));
        let blocks = (models[0].blocks.get(layer), models[1].blocks.get(layer));
        let (Some(a), Some(b)) = blocks else {
            part("residual", *width, residual);
            continue;
        };
        match (stage, &a.attention, &b.attention) {
            (Stage::Input, ..) if layer == 0 => part("embedding", *width, Kind::Embedding),
            (Stage::Input | Stage::Middle, ..) => part("residual", *width, residual),
            (Stage::Qkv, Attention::Softmax(a), Attention::Softmax(b)) => {
                let norms = [Some(&a.input_norm), Some(&b.input_norm)];
                for (name, a, b) in [
                    ("q_proj", &a.q_proj, &b.q_proj),
                    ("k_proj", &a.k_proj, &b.k_proj),
                    ("v_proj", &a.v_proj, &b.v_proj),
                ] {
                    part(name, a.d_output(), Kind::Projection([a, b], norms));
                }
            }
            (Stage::Context, ..) => part("attention", *width, Kind::Attention),
            (Stage::Attention, Attention::Softmax(a), Attention::Softmax(b)) => {
                part("o_proj", *width, Kind::Projection([&a.o_proj, &b.o_proj], [None, None]));
            }
            (Stage::Attention, ..) => part("delta_net", *width, Kind::DeltaNet),
            _ => {}
        }
        match (stage, &a.feed_forward, &b.feed_forward) {
            (Stage::GateUp, FeedForward::One(a), FeedForward::One(b)) => {
                let norms = [Some(&a.input_norm), Some(&b.input_norm)];
                for (name, a, b) in
                    [("gate_proj", &a.gate_proj, &b.gate_proj), ("up_proj", &a.up_proj, &b.up_proj)]
                {
                    part(name, a.d_output(), Kind::Projection([a, b], norms));
                }
            }
            (Stage::Gated, ..) => {
                let squares = models.iter().any(|model| model.config().activation == GatedActivation::Relu2);
                part("activation", *width, Kind::Activation(if squares { 2 } else { 1 }));
            }
            (Stage::FeedForward, FeedForward::One(a), FeedForward::One(b)) => {
                part("down_proj", *width, Kind::Projection([&a.down_proj, &b.down_proj], [None, None]));
            }
            (Stage::FeedForward, ..) => part("experts", *width, Kind::Experts),
            _ => {}
        }
    }
    parts
}

impl Values {
    fn row(&self, row: usize, columns: &Range<usize>) -> [&[f32]; 2] {
        self.of.each_ref().map(|values| &values[row * self.width..][columns.clone()])
    }

    fn all(&self, row: usize) -> Rows<'_> {
        Rows { of: self.row(row, &(0..self.width)), floor: 0.0 }
    }
}

impl Part<'_> {
    fn outputs<'v>(&self, stages: &'v [Values], row: usize) -> Rows<'v> {
        let inputs = || self.inputs(stages, row);
        let floor = match self.kind {
            Kind::Residual(factor) => factor.abs() * inputs().largest(),
            // The largest product that there can be.
            Kind::Activation(power) => {
                let half = |columns: Range<usize>| {
                    Rows { of: inputs().of.map(|row| &row[columns.clone()]), floor: 0.0 }.largest()
                };
                let width = self.columns.len();
                half(0..width).powi(power) * half(width..2 * width)
            }
            _ => 0.0,
        };
        Rows { of: stages[self.at].row(row, &self.columns), floor }
    }

    fn inputs<'v>(&self, stages: &'v [Values], row: usize) -> Rows<'v> {
        stages[self.at.saturating_sub(1)].all(row)
    }

    /// How far the residual stream was apart before something was added to it.
    fn residual_before(&self, stages: &[Values], row: usize) -> f64 {
        let residual = |stage: &&Values| matches!(stage.stage, Stage::Input | Stage::Middle);
        stages[..self.at].iter().rev().find(residual).map_or(0.0, |stage| stage.all(row).difference())
    }
}

/// A row of A and the same row of B.
struct Rows<'a> {
    of: [&'a [f32]; 2],
    /// The largest value of what they are made of.
    floor: f64,
}

impl Rows<'_> {
    fn largest(&self) -> f64 {
        let largest = |row: &[f32]| row.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
        f64::from(largest(self.of[0]).max(largest(self.of[1]))).max(self.floor)
    }

    /// The errors, B - A.
    fn errors(&self) -> impl Iterator<Item = f64> {
        self.of[0].iter().zip(self.of[1]).map(|(&a, &b)| f64::from(b) - f64::from(a))
    }

    /// The largest error, relative to the largest value.
    fn difference(&self) -> f64 {
        match self.errors().fold(0.0f64, |largest, error| largest.max(error.abs())) {
            0.0 => 0.0,
            error => error / self.largest(),
        }
    }

    /// B divided by A, if that is one number for all.
    fn ratio(&self) -> Option<f64> {
        let dot =
            |[a, b]: [&[f32]; 2]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let [a, b] = self.of;
        let ratio = dot([a, b]) / dot([a, a]);
        let noise = NOISE * self.largest();
        let mut pairs = a.iter().zip(b);
        pairs.all(|(&a, &b)| (f64::from(b) - ratio * f64::from(a)).abs() <= noise).then_some(ratio)
    }

    /// Whether both have the same values in another order.
    fn are_permuted(&self) -> bool {
        let [a, b] = self.of.map(|row| {
            let mut sorted = row.to_vec();
            sorted.sort_by(f32::total_cmp);
            sorted
        });
        Rows { of: [&a, &b], floor: self.floor }.difference() <= NOISE
    }

    fn place(
        &self,
        position: usize,
        (layer, part): (usize, &'static str),
        Judgement(outcome, rounding, meaning): Judgement,
    ) -> Place {
        let noise = NOISE * self.largest();
        let errors = || self.errors().map(f64::abs).enumerate();
        let output = errors().max_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(output, _)| output);
        Place {
            position,
            layer,
            part,
            outcome,
            outputs: self.of[0].len(),
            outputs_that_differ: errors().filter(|(_, error)| *error > noise).count(),
            output,
            a: self.of[0][output],
            b: self.of[1][output],
            rounding,
            meaning,
        }
    }
}

/// An RMSNorm in f64, in place.
fn normalise(x: &mut [f64], norm: &RmsNorm) -> Result<(), CompareError> {
    let device = |problem: String| CompareError::Generate(GenerateError::Device(problem));
    let gamma = devices::read(norm.gamma.val()).map_err(device)?;
    let square = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (square + norm.epsilon).sqrt();
    x.iter_mut().zip(gamma.iter::<f32>()).for_each(|(x, gamma)| *x *= factor * f64::from(gamma));
    Ok(())
}

/// An activation next to a boundary between two codes.
struct Candidate {
    input: usize,
    /// In A and in B, in steps.
    value: [f64; 2],
    step: f64,
    distance: f64,
}

/// The activations that A and B may round differently, the nearest to a boundary first. Those of a `group` share a step; 0 is
/// the whole row.
fn candidates(x: [&[f64]; 2], group: usize) -> Vec<Candidate> {
    let group = if group == 0 { x[0].len() } else { group };
    let steps = x.map(|x| -> Vec<f64> {
        // As the quantiser has it: no step is smaller than that of 1e-5.
        x.chunks(group).map(|x| x.iter().fold(1e-5f64, |largest, v| largest.max(v.abs())) / 127.0).collect()
    });
    let candidate = |input: usize| {
        let step = steps[0][input / group];
        let value = [x[0][input] / step, x[1][input] / steps[1][input / group]];
        let boundary = ((value[0] + value[1]) / 2.0).floor() + 0.5;
        let sides = value.map(|value| value - boundary);
        let distance = sides[0].abs().min(sides[1].abs());
        let near = sides[0] * sides[1] <= 0.0 || distance <= BOUNDARY;
        near.then_some(Candidate { input, value, step, distance })
    };
    let mut all: Vec<Candidate> = (0..x[0].len()).filter_map(candidate).collect();
    all.sort_by(|a, b| a.distance.total_cmp(&b.distance));
    all.truncate(CANDIDATES);
    all
}

/// The activations that A and B round differently, if they explain all of the difference of the outputs but `noise`, relative
/// to the largest output.
fn rounding(
    x: [&[f64]; 2],
    noise: f64,
    outputs: &Rows<'_>,
    group: usize,
    layer: &BitLinear,
) -> Result<Option<Rounding>, CompareError> {
    let candidates = candidates(x, group);
    let Some(matrix) = layer.matrix().filter(|_| !candidates.is_empty()) else { return Ok(None) };
    let (n, k) = (matrix.n, matrix.k);
    let mut units = vec![0.0f32; candidates.len() * k];
    for (row, candidate) in units.chunks_exact_mut(k).zip(&candidates) {
        row[candidate.input] = 1.0;
    }
    let units = Tensor::from_data(TensorData::new(units, [candidates.len(), k]), &matrix.codes.device());
    let input = BitLinearInput { norm: None, quantise: true };
    let columns = values(ops::bit_linear(units, input, vec![matrix]).map_err(ForwardError::from)?)?;

    let mut rest: Vec<f64> = outputs.errors().collect();
    let mut rounded = Vec::new();
    for (candidate, column) in candidates.iter().zip(columns.chunks_exact(n)) {
        let column: Vec<f64> = column.iter().map(|&w| f64::from(w) * candidate.step).collect();
        let dot = |x: &[f64]| x.iter().zip(&column).map(|(x, w)| x * w).sum::<f64>();
        let steps = (dot(&rest) / dot(&column)).round();
        if steps.abs() == 1.0 {
            rest.iter_mut().zip(&column).for_each(|(rest, w)| *rest -= steps * w);
            rounded.push(candidate);
        }
    }
    let noise = noise * outputs.largest();
    let explained = rest.iter().all(|rest| rest.abs() <= noise);
    Ok(rounded.first().filter(|_| explained).map(|first| Rounding {
        input: first.input,
        a: first.value[0],
        b: first.value[1],
        activations: rounded.len(),
    }))
}
