//! How fast a placement will be: a roofline ("Roofline", Williams, Waterman, Patterson, CACM 2009) with the measured
//! bandwidth and peak of each device.
//!
//! Decoding a token reads, on each device in turn, the weights of its layers and the KV cache of what was before;
//! where the output is computed, the output projection. A prompt's chunk takes the longer of reading the weights once and
//! multiplying every row by every weight. What comes on top (norms, softmax, launches, moving rows between devices) is
//! left out, so this is a bound; what runs on the CPU reached of it here before ([`CpuRate`](super::CpuRate)) scales it
//! down to what is to be expected.

use serde::Serialize;

use super::machine::MachineProfile;
use super::placement::Placement;
use super::requirements::Requirements;
use super::{CPU, RunSettings};

/// What a plan promises.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Tokens a second behind an empty history.
    pub decode_tokens_per_s: f64,
    /// Tokens a second where the context is full.
    pub decode_tokens_per_s_at_full_context: f64,
    /// Tokens of a prompt a second; absent where a device's peak is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_s: Option<f64>,
    /// What the figures stand on.
    pub basis: Basis,
}

/// What a prediction stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// The roofline alone: no more than this.
    Roofline,
    /// The roofline, times what earlier runs on this machine reached of it.
    Calibrated,
}

/// 10^9 a second.
struct Rate {
    read: f64,
    multiply: Option<f64>,
}

/// Seconds of parts that follow each other.
#[derive(Default)]
struct Seconds {
    decode: f64,
    prefill: Option<f64>,
}

impl Prediction {
    /// Of a placement; `None` where a device that it needs was not measured.
    pub fn of(
        model: &Requirements,
        machine: &MachineProfile,
        placement: &Placement,
        settings: &RunSettings,
    ) -> Option<Self> {
        let at = |context: usize| seconds(model, machine, placement, settings, context);
        let (empty, full) = (at(0)?, at(settings.context)?);
        let alone = placement.devices().all(|device| device == CPU);
        let rate = machine.cpu_rate(settings.threads).filter(|_| alone);
        let (decode, prefill) =
            rate.map_or((None, None), |rate| (rate.decode_efficiency, rate.prefill_efficiency));
        let basis = if decode.is_some() { Basis::Calibrated } else { Basis::Roofline };
        Some(Self {
            decode_tokens_per_s: decode.unwrap_or(1.0) / empty.decode,
            decode_tokens_per_s_at_full_context: decode.unwrap_or(1.0) / full.decode,
            prefill_tokens_per_s: empty.prefill.map(|seconds| prefill.unwrap_or(1.0) / seconds),
            basis,
        })
    }

    /// Tokens a second behind so many positions, between the two that are known: the time of a token grows with each.
    pub fn decode_at(&self, context: usize, full: usize) -> f64 {
        let (empty, last) = (1.0 / self.decode_tokens_per_s, 1.0 / self.decode_tokens_per_s_at_full_context);
        let part = context as f64 / full.max(1) as f64;
        1.0 / (empty + (last - empty) * part)
    }
}

/// Seconds of a token behind `context` positions, and of one of a prompt.
fn seconds(
    model: &Requirements,
    machine: &MachineProfile,
    placement: &Placement,
    settings: &RunSettings,
    context: usize,
) -> Option<Seconds> {
    let mut all = Seconds { decode: 0.0, prefill: Some(0.0) };
    for stage in &placement.stages {
        let rate = rate(machine, &stage.device, settings.threads)?;
        let layers = stage.layers.len();
        let weights = model.layer_bytes(layers) as f64;
        let history = model.kv_bytes(settings.kv_cache, context, layers) as f64;
        all.decode += (weights + history) / (rate.read * 1e9);
        let read = weights / settings.rows.max(1) as f64 / (rate.read * 1e9);
        let products = model.layer_weights as f64 * layers as f64;
        let multiply = rate.multiply.map(|adds| products / (adds * 1e9));
        all.prefill = all.prefill.zip(multiply).map(|(sum, multiply)| sum + multiply.max(read));
    }
    let rate = rate(machine, &placement.dense, settings.threads)?;
    all.decode += model.head_read as f64 / (rate.read * 1e9);
    (all.decode > 0.0).then_some(all)
}

fn rate(machine: &MachineProfile, device: &str, threads: usize) -> Option<Rate> {
    if device == CPU {
        let rate = machine.cpu_rate(threads)?;
        return Some(Rate { read: rate.read_gb_per_s, multiply: rate.multiply_adds_g_per_s });
    }
    let gpu = machine.gpus.iter().find(|gpu| gpu.device == device)?;
    Some(Rate { read: gpu.read_gb_per_s?, multiply: gpu.multiply_adds_g_per_s })
}

/// What a prediction came to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Tokens a second that were predicted.
    pub predicted: f64,
    /// Tokens a second that were measured.
    pub measured: f64,
    /// The second over the first.
    pub ratio: f64,
}

impl Comparison {
    /// Of two figures that are numbers above zero.
    pub fn of(predicted: f64, measured: f64) -> Option<Self> {
        let ratio = measured / predicted;
        (ratio.is_finite() && ratio > 0.0).then_some(Self { predicted, measured, ratio })
    }
}

/// A run's speed beside what was predicted for it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PredictionOutcome {
    /// What the prediction stood on.
    pub basis: Basis,
    /// Decode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode: Option<Comparison>,
    /// Prefill.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill: Option<Comparison>,
}

impl PredictionOutcome {
    /// Of measured figures, decode behind `at` positions of a context of `full` on the average.
    pub fn of(
        prediction: &Prediction,
        (at, full): (usize, usize),
        decode: Option<f64>,
        prefill: Option<f64>,
    ) -> Self {
        let expected = prediction.decode_at(at, full);
        Self {
            basis: prediction.basis,
            decode: decode.and_then(|measured| Comparison::of(expected, measured)),
            prefill: prefill.zip(prediction.prefill_tokens_per_s).and_then(|(m, p)| Comparison::of(p, m)),
        }
    }
}
