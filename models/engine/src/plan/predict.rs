//! Predicts the speed of a placement: a roofline ("Roofline", Williams, Waterman, Patterson, CACM 2009) with the measured
//! bandwidth and peak of each device.
//!
//! Decoding a token reads, on each device in turn, the weights of its layers, the KV cache of earlier tokens and, on one
//! device, the output projection. A chunk of a prompt takes the longer of two times: reading the weights once, or
//! multiplying every row by every weight. Norms, softmax, launches and transfers between devices are left out, so the
//! result is a bound. For the CPU it is scaled down by the fraction that an earlier `bench` reached
//! ([`CpuRate`](super::CpuRate)).

use serde::{Deserialize, Serialize};

use super::machine::MachineProfile;
use super::placement::Placement;
use super::requirements::Requirements;
use super::{CPU, RunSettings};

/// Predicted speed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Decoded tokens a second with an empty KV cache.
    pub decode_tokens_per_s: f64,
    /// Decoded tokens a second with a full KV cache.
    pub decode_tokens_per_s_at_full_context: f64,
    /// Tokens of a prompt a second; absent if the peak of a device is unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_s: Option<f64>,
    /// How the figures were computed.
    pub basis: Basis,
}

/// How a prediction was computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// From the roofline alone: an upper bound.
    Roofline,
    /// The roofline times the fraction that earlier runs on this machine reached.
    Calibrated,
}

/// Bytes and multiply-adds of a device, in 10^9 a second.
struct Rate {
    read: f64,
    multiply: Option<f64>,
}

/// Seconds per token, summed over the stages of a placement.
#[derive(Default)]
struct Seconds {
    decode: f64,
    prefill: Option<f64>,
}

impl Prediction {
    /// Predicts a placement; `None` if one of its devices was not measured.
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

    /// Decoded tokens a second after `context` of `full` positions. The time per token grows linearly with the context.
    pub fn decode_at(&self, context: usize, full: usize) -> f64 {
        let (empty, last) = (1.0 / self.decode_tokens_per_s, 1.0 / self.decode_tokens_per_s_at_full_context);
        let part = context as f64 / full.max(1) as f64;
        1.0 / (empty + (last - empty) * part)
    }
}

/// Seconds per decoded token after `context` positions, and per token of a prompt.
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
        let (weights, of_token) = (model.layer_bytes(layers) as f64, model.layer_bytes_read(layers) as f64);
        let history = model.kv_bytes_read(settings.kv_cache, context, layers) as f64;
        all.decode += (of_token + history) / (rate.read * 1e9);
        // Rows that choose other experts read more of them, up to all.
        let rows = settings.rows.max(1) as f64;
        let read = weights.min(of_token * rows) / rows / (rate.read * 1e9);
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

/// A predicted and a measured speed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Predicted tokens a second.
    pub predicted: f64,
    /// Measured tokens a second.
    pub measured: f64,
    /// Measured over predicted.
    pub ratio: f64,
}

impl Comparison {
    /// Compares two speeds; `None` unless the ratio is a finite number above zero.
    pub fn of(predicted: f64, measured: f64) -> Option<Self> {
        let ratio = measured / predicted;
        (ratio.is_finite() && ratio > 0.0).then_some(Self { predicted, measured, ratio })
    }
}

/// The measured speed of a run, compared with the prediction.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PredictionOutcome {
    /// How the prediction was computed.
    pub basis: Basis,
    /// Decode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode: Option<Comparison>,
    /// Prefill.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill: Option<Comparison>,
}

impl PredictionOutcome {
    /// Compares measured tokens a second with a prediction. Decode was measured after `at` positions of a context of `full`,
    /// on average.
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
