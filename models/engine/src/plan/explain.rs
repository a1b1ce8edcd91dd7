//! Plans as text: the reasons, and the table that `bitnet plan` prints.

use std::fmt;

use super::machine::MachineProfile;
use super::placement::{Placement, PlacementKind};
use super::predict::{Basis, Comparison, Prediction, PredictionOutcome};
use super::{CPU, DeviceMemory, Plan, PlanRequest, Strategy, Tier};
use crate::text::{count, human_bytes, line};

pub(super) fn threads(count: usize) -> String {
    crate::text::count(count as u64, "thread")
}

/// The first device that needs more than its budget, as text.
pub(super) fn over_budget(memory: &[DeviceMemory]) -> Option<String> {
    let over = memory.iter().find(|memory| !memory.fits())?;
    let budget = human_bytes(over.budget.unwrap_or(0));
    Some(format!("{} would need {}, and the limit is {budget}", over.device, human_bytes(over.total())))
}

/// States that a plan does not fit, and what would help.
pub(super) fn too_much(memory: &[DeviceMemory]) -> String {
    let what = over_budget(memory).unwrap_or_else(|| "it needs a larger buffer than the GPU allows".into());
    let kv = memory.iter().filter(|memory| !memory.fits()).any(|memory| memory.kv_cache > memory.total() / 4);
    let help =
        if kv { "use a shorter --context, or more memory" } else { "use more memory, or a smaller model" };
    format!("it does not fit: {what}; {help}")
}

pub(super) fn not_measured(placement: &Placement, machine: &MachineProfile, threads: usize) -> String {
    let unknown = placement.devices().find(|&device| match device {
        CPU => machine.cpu_rate(threads).is_none(),
        gpu => machine.gpus.iter().any(|g| g.device == gpu && g.read_gb_per_s.is_none()),
    });
    format!("no speed is predicted: the memory bandwidth of {} was not measured", unknown.unwrap_or(CPU))
}

/// States that the memory is unknown, and what the plan chose because of that.
pub(super) fn careful(request: &PlanRequest, placement: &Placement) -> String {
    let on_cpu = request.device.is_none() && placement.kind() == PlacementKind::CpuOnly;
    let choices = [
        (on_cpu, "the CPU alone"),
        (request.context.is_none(), "a short context"),
        (request.rows.is_none(), "few rows at once"),
    ];
    let chosen: Vec<&str> = choices.into_iter().filter_map(|(chosen, what)| chosen.then_some(what)).collect();
    let what = match &chosen[..] {
        [] => "the requested settings may not fit".to_owned(),
        chosen => format!("to be safe, {}", chosen.join(", ")),
    };
    format!("the system does not report its memory: {what} (--memory sets the limit)")
}

/// The GPUs among which the placement was chosen.
pub(super) struct Decided<'a> {
    /// Whether the request names a GPU.
    pub gpu_asked: bool,
    /// GPUs that could have been chosen.
    pub considered: Vec<&'a str>,
    /// GPUs that at least one candidate uses.
    pub compared: Vec<&'a str>,
}

/// The reasons for the devices.
pub(super) fn placement(
    placement: &Placement,
    memory: &[DeviceMemory],
    machine: &MachineProfile,
    request: &PlanRequest,
    decided: &Decided<'_>,
) -> Vec<String> {
    let mut reasons = Vec::new();
    let gpu_asked = decided.gpu_asked;
    let of = |device: &str| memory.iter().find(|memory| memory.device == device);
    let fraction = |device: &str| match of(device) {
        Some(memory) => {
            let budget = memory.budget.map_or("unknown".into(), human_bytes);
            format!("{} on {device}, limit {budget}", human_bytes(memory.total()))
        }
        None => String::new(),
    };
    let first = placement.devices().next().unwrap_or(CPU);
    let asked = if gpu_asked { ", as requested" } else { "" };
    match placement.kind() {
        PlacementKind::CpuOnly if request.device.as_deref() == Some(CPU) => {
            reasons.push("the CPU, as requested".into())
        }
        PlacementKind::CpuOnly if request.gpu_layers == Some(0) => {
            reasons.push("the CPU: no layers on a GPU, as requested".into());
        }
        PlacementKind::CpuOnly if machine.gpus.is_empty() => {
            reasons.push("the CPU: this build finds no usable GPU on this machine".into());
        }
        PlacementKind::CpuOnly if decided.compared.is_empty() => {
            reasons.push("the CPU: no GPU was a candidate".into());
        }
        PlacementKind::CpuOnly => {
            reasons.push(format!("the CPU: the strategy ranks it above {}", decided.compared.join(", ")));
        }
        PlacementKind::GpuOnly => {
            let what = placement.devices().map(fraction).collect::<Vec<_>>().join(", ");
            reasons.push(format!("everything on the GPU{asked}: {what}"));
        }
        PlacementKind::Hybrid { cpu_layers, gpu_layers } if request.gpu_layers.is_some() => {
            let layers = count(gpu_layers as u64, "layer");
            reasons.push(format!("{layers} on {first}, as requested; {cpu_layers} on the CPU"));
        }
        PlacementKind::Hybrid { cpu_layers: 0, .. } => reasons.push(format!(
            "all layers on {first}{asked} ({}); embedding and output do not fit there and are on the CPU",
            fraction(first)
        )),
        PlacementKind::Hybrid { cpu_layers, gpu_layers } => {
            let layers = count(gpu_layers as u64, "layer");
            let gpus: Vec<String> =
                placement.devices().filter(|&device| device != CPU).map(fraction).collect();
            reasons.push(format!(
                "the whole model does not fit on the GPU{asked}: the first {layers} do ({}); the other {cpu_layers}, embedding \
                 and output are on the CPU",
                gpus.join(", ")
            ));
        }
    }
    for gpu in &machine.gpus {
        let name =
            if gpu.name.is_empty() { gpu.device.clone() } else { format!("{} ({})", gpu.device, gpu.name) };
        if placement.layers_on(&gpu.device) > 0 {
            if gpu.memory_bytes.is_none() {
                reasons.push(format!("{name} does not report its memory, which may be too small"));
            }
            if gpu.software {
                reasons
                    .push(format!("{name} is a software GPU, which is slower than the CPU: for tests only"));
            }
        } else if gpu.software {
            reasons.push(format!("{name} is not used: it is a software GPU, which is slower than the CPU"));
        } else if gpu.memory_bytes.is_none() && request.device.is_none() {
            reasons.push(format!(
                "{name} is not used: its driver does not report its memory (use --device {}, or a --machine file with \
                 memory_bytes)",
                gpu.device
            ));
        } else if decided.considered.contains(&&*gpu.device) && !decided.compared.contains(&&*gpu.device) {
            let why = match request.kv_cache.filter(|&kind| !gpu.holds(kind)) {
                Some(kind) => format!("it does not support a KV cache of {}", kind.name()),
                None if request.strategy == Strategy::PowerEfficiency => {
                    "the whole model does not fit".into()
                }
                None => "not even one layer fits".into(),
            };
            reasons.push(format!("{name} is not used: {why}"));
        }
    }
    reasons
}

impl Tier {
    /// Its name and its range, for people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Fast => "fast (20 tokens a second or more)",
            Self::Interactive => "interactive (5 tokens a second or more: as fast as people read)",
            Self::Slow => "slow (less than 5 tokens a second)",
            Self::Offline => "offline (less than a token a second)",
            Self::Unknown => "unknown (a device was not measured)",
        }
    }
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let most = if self.basis == Basis::Roofline { "at most " } else { "" };
        let (empty, full) = (self.decode_tokens_per_s, self.decode_tokens_per_s_at_full_context);
        write!(f, "decode {most}{empty:.1} tokens/s, {full:.1} at full context")?;
        if let Some(prefill) = self.prefill_tokens_per_s {
            write!(f, "; prefill {most}{prefill:.0} tokens/s")?;
        }
        f.write_str(match self.basis {
            Basis::Roofline => " (roofline of the measured bandwidth and peak)",
            Basis::Calibrated => " (roofline, times the part of it that `bitnet bench` reached here)",
        })
    }
}

impl fmt::Display for PredictionOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let most = if self.basis == Basis::Roofline { "at most " } else { "" };
        let parts =
            [("decode", self.decode), ("prefill", self.prefill)].into_iter().filter_map(|(what, c)| {
                let Comparison { predicted, measured, ratio } = c?;
                Some(format!(
                    "{what} {most}{predicted:.1} tokens/s, measured {measured:.1} ({:.0} %)",
                    ratio * 100.0
                ))
            });
        f.write_str(&parts.collect::<Vec<_>>().join("; "))
    }
}

impl fmt::Display for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, weights, kv_cache, activations, workspace, budget } = self;
        let [total, weights, kv_cache, activations, workspace] =
            [self.total(), *weights, *kv_cache, *activations, *workspace].map(human_bytes);
        write!(f, "{device}: {total}")?;
        if let Some(budget) = budget {
            write!(f, " of {}", human_bytes(*budget))?;
        }
        write!(
            f,
            " (weights {weights}, KV cache {kv_cache}, activations {activations}, workspace {workspace})"
        )
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = match (self.fits, self.fallback) {
            (true, false) => "",
            (true, true) | (false, true) => "; careful, because the machine's memory or cores are unknown",
            (false, false) => "; IT DOES NOT FIT",
        };
        line(f, "plan", format_args!("{} (strategy {}){fits}", self.kind, self.strategy.name()))?;
        line(f, "placement", &self.placement)?;
        let settings = &self.settings;
        line(f, "threads", settings.threads)?;
        line(f, "KV cache", format_args!("{}, {} positions", settings.kv_cache.name(), settings.context))?;
        line(f, "batch", format_args!("{} of a prompt at once", count(settings.rows as u64, "row")))?;
        if let Some(sequences) = self.sequences.filter(|&sequences| sequences < 1 << 32) {
            line(f, "sequences", format_args!("{sequences} with this context fit"))?;
        }
        let mut label = "memory";
        for memory in &self.memory {
            line(f, label, memory)?;
            label = "";
        }
        match &self.prediction {
            Some(prediction) => line(f, "speed", format_args!("{}: {prediction}", self.tier.describe()))?,
            None => line(f, "speed", self.tier.describe())?,
        }
        let mut label = "because";
        for reason in &self.reasons {
            line(f, label, reason)?;
            label = "";
        }
        let mut label = "instead of";
        for other in &self.alternatives {
            let rate =
                other.decode_tokens_per_s.map_or(String::new(), |rate| format!(", {rate:.1} tokens/s"));
            line(
                f,
                label,
                format_args!("{} ({}{rate}): {}", other.placement, other.kv_cache.name(), other.why_not),
            )?;
            label = "";
        }
        Ok(())
    }
}
