//! From candidates to a plan.

use super::machine::{GpuProfile, MachineProfile};
use super::placement::{Placement, PlacementKind};
use super::predict::Prediction;
use super::requirements::{CACHE_TYPES, HUGE_PAGE, Requirements};
use super::{
    Alternative, CPU, DeviceMemory, Plan, PlanError, PlanRequest, RunSettings, Strategy, Tier, explain,
};
use crate::load::DEFAULT_CHUNK;
use bitnet_burn::CacheType;

/// A context up to this length is more important than speed.
pub const COMMON_CONTEXT: usize = 4096;
/// The shortest context that a plan chooses.
const LEAST_CONTEXT: usize = 256;
/// Context if the memory is unknown.
const CAREFUL_CONTEXT: usize = 2048;
/// Rows at once if memory is short or unknown.
const FEW_ROWS: usize = 64;
/// Rows at once if nothing else fits, or for the strategy `memory`.
const LEAST_ROWS: usize = 16;
/// Fraction of a GPU's memory that drivers, displays and fragmentation leave.
const GPU_FRACTION: f64 = 0.9;

/// A combination of placement and settings, with its memory and its speed.
#[derive(Clone, Debug)]
struct Candidate {
    placement: Placement,
    settings: RunSettings,
    memory: Vec<DeviceMemory>,
    prediction: Option<Prediction>,
}

impl Candidate {
    fn fits(&self) -> bool {
        self.memory.iter().all(DeviceMemory::fits)
    }

    fn total(&self) -> u64 {
        self.memory.iter().map(DeviceMemory::total).fold(0, u64::saturating_add)
    }

    fn precision(&self) -> usize {
        CACHE_TYPES.iter().rev().position(|&kind| kind == self.settings.kv_cache).unwrap_or(0)
    }

    fn devices(&self) -> usize {
        self.placement.devices().count()
    }
}

/// The inputs from which candidates are made.
struct Room<'a> {
    model: &'a Requirements,
    machine: &'a MachineProfile,
    request: &'a PlanRequest,
    fraction: f64,
}

impl Room<'_> {
    /// Bytes of a device's memory that the model may use.
    fn budget(&self, device: &str) -> Option<u64> {
        if device != CPU {
            let gpu = self.machine.gpus.iter().find(|gpu| gpu.device == device)?;
            return Some((gpu.memory_bytes? as f64 * self.fraction) as u64);
        }
        let share = |bytes: u64| match self.request.strategy {
            Strategy::Balanced => bytes / 4 * 3,
            _ => bytes,
        };
        let free = |memory: super::MemoryProfile| {
            share(memory.available_bytes.saturating_sub(self.machine.memory_reserve()))
        };
        self.request.memory.or_else(|| self.machine.memory.map(free))
    }

    fn memory(&self, placement: &Placement, settings: &RunSettings) -> Vec<DeviceMemory> {
        let mut memory = self.model.memory(placement, settings);
        for device in &mut memory {
            device.budget = self.budget(&device.device);
        }
        memory
    }

    /// Whether `layers` layers fit on a GPU, with embedding and output projection if `dense`.
    fn holds(&self, gpu: &GpuProfile, layers: usize, dense: bool, settings: &RunSettings) -> bool {
        let largest = if dense { self.model.embedding.max(self.model.output) } else { 0 };
        let budget = self.budget(&gpu.device);
        let memory = DeviceMemory { budget, ..self.model.memory_of(&gpu.device, layers, dense, settings) };
        memory.fits() && gpu.max_allocation_bytes.is_none_or(|limit| largest <= limit)
    }

    /// Fills the GPUs in their order with as many layers as fit; the rest goes to the CPU.
    fn filled(&self, gpus: &[&GpuProfile], settings: &RunSettings) -> Placement {
        let layers = self.model.layers;
        let mut parts: Vec<(String, usize)> = Vec::new();
        let mut left = layers;
        for gpu in gpus {
            if self.holds(gpu, left, true, settings) {
                parts.push((gpu.device.clone(), left));
                return Placement::over(parts, &gpu.device);
            }
            let fit = most(left, |count| self.holds(gpu, count, false, settings));
            parts.push((gpu.device.clone(), fit));
            left -= fit;
        }
        parts.push((CPU.to_owned(), left));
        Placement::over(parts, CPU)
    }

    fn candidate(&self, placement: Placement, settings: RunSettings) -> Candidate {
        let memory = self.memory(&placement, &settings);
        let prediction = Prediction::of(self.model, self.machine, &placement, &settings);
        Candidate { placement, settings, memory, prediction }
    }
}

/// The largest count up to `limit` for which `holds` is true. If it is true for a count, it is true for all smaller ones.
fn most(limit: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, limit);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if holds(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

pub(super) fn choose(
    model: &Requirements,
    machine: &MachineProfile,
    request: &PlanRequest,
) -> Result<Plan, PlanError> {
    check(model, machine, request)?;
    let fraction = request.gpu_memory_fraction.unwrap_or(match request.strategy {
        Strategy::Balanced => 0.75,
        _ => GPU_FRACTION,
    });
    let room = Room { model, machine, request, fraction };
    let (threads, why_threads) = threads(&room);
    let blind = machine.memory.is_none() && request.memory.is_none();
    let chosen_gpu = asked_gpu(machine, request)?;

    let contexts = contexts(model.context, request.context, blind);
    let kinds: Vec<CacheType> = match request.kv_cache {
        Some(kind) => vec![kind],
        None if blind => vec![CacheType::F32],
        None => CACHE_TYPES.to_vec(),
    };
    // Each set of GPUs is filled before the CPU gets anything. The empty set is the CPU alone.
    let mut sets: Vec<Vec<&GpuProfile>> = Vec::new();
    match chosen_gpu {
        Some(gpu) => sets.push(vec![gpu]),
        None => {
            sets.push(Vec::new());
            if request.device.is_none() && !blind {
                let cards = cards(machine);
                sets.extend(cards.iter().map(|&card| vec![card]));
                if cards.len() > 1 && request.strategy != Strategy::PowerEfficiency {
                    sets.push(cards);
                }
            }
        }
    }
    let of_rows = |rows: &[usize]| {
        let mut candidates: Vec<Candidate> = Vec::new();
        for set in &sets {
            for &kv_cache in kinds.iter().filter(|&&kind| set.iter().all(|gpu| gpu.holds(kind))) {
                for (&context, &rows) in contexts.iter().flat_map(|c| rows.iter().map(move |r| (c, r))) {
                    let settings = RunSettings { threads, context, kv_cache, rows };
                    let placement = match (set.first(), request.gpu_layers) {
                        (None, _) => Placement::cpu_only(model.layers),
                        (Some(gpu), Some(n)) if n == model.layers => Placement::gpu_only(&gpu.device, n),
                        (Some(gpu), Some(n)) => Placement::hybrid(&gpu.device, n, model.layers - n),
                        (Some(_), None) => room.filled(set, &settings),
                    };
                    candidates.push(room.candidate(placement, settings));
                }
            }
        }
        // This keeps at least one candidate: the CPU alone.
        if request.strategy == Strategy::PowerEfficiency && chosen_gpu.is_none() {
            candidates.retain(|candidate| candidate.devices() == 1);
        }
        candidates
    };
    let candidates = match request.rows {
        Some(rows) => of_rows(&[rows]),
        None if blind => of_rows(&[FEW_ROWS]),
        None if request.strategy == Strategy::Memory => of_rows(&[LEAST_ROWS]),
        None => {
            let usual = of_rows(&[DEFAULT_CHUNK, FEW_ROWS]);
            if usual.iter().any(Candidate::fits) { usual } else { of_rows(&[LEAST_ROWS]) }
        }
    };
    let Some(best) = best(&candidates, request.strategy) else {
        let gpu = chosen_gpu.map_or(CPU, |gpu| &gpu.device);
        return Err(PlanError::Range {
            what: "the KV cache",
            found: request.kv_cache.unwrap_or_default().name().into(),
            expected: format!("a type that {gpu} supports, such as f32"),
        });
    };
    let best = best.clone();
    let fits = best.fits() && !blind;
    let compared = |gpu: &&str| candidates.iter().any(|c| c.placement.layers_on(gpu) > 0);
    let mut considered: Vec<&str> = sets.iter().flatten().map(|gpu| &*gpu.device).collect();
    considered.sort_unstable();
    considered.dedup();
    let decided = explain::Decided {
        gpu_asked: chosen_gpu.is_some(),
        compared: considered.iter().copied().filter(compared).collect(),
        considered,
    };
    let mut reasons = explain::placement(&best.placement, &best.memory, machine, request, &decided);
    if blind {
        reasons.insert(0, explain::careful(request, &best.placement));
    }
    reasons.push(why_threads);
    reasons.extend(why_settings(&room, &best, blind));
    if !fits && !blind {
        reasons.insert(0, explain::too_much(&best.memory));
    }
    if best.prediction.is_none() {
        reasons.push(explain::not_measured(&best.placement, machine, threads));
    }
    let alternatives = alternatives(&candidates, &best);
    let decode = best.prediction.as_ref().map(|prediction| prediction.decode_tokens_per_s);
    Ok(Plan {
        strategy: request.strategy,
        fits,
        fallback: blind || machine.cpu.physical_cores.is_none() && request.threads.is_none(),
        kind: best.placement.kind(),
        settings: best.settings,
        gpu_memory_fraction: fraction,
        sequences: room_for(&best.memory).filter(|_| fits),
        tier: Tier::of(decode),
        placement: best.placement,
        memory: best.memory,
        prediction: best.prediction,
        reasons,
        alternatives,
    })
}

fn check(model: &Requirements, machine: &MachineProfile, request: &PlanRequest) -> Result<(), PlanError> {
    let range = |what, found: String, expected: String| Err(PlanError::Range { what, found, expected });
    if let Some(layers) = request.gpu_layers.filter(|&layers| layers > model.layers) {
        let problem = format!("the model has {}", model.layers);
        return Err(PlanError::GpuLayers { layers, problem });
    }
    if let Some(context) = request.context.filter(|context| !(1..=model.context).contains(context)) {
        return range("the context", context.to_string(), format!("between 1 and {}", model.context));
    }
    if let Some(threads) = request.threads.filter(|threads| !(1..=1024).contains(threads)) {
        return range("the number of threads", threads.to_string(), "between 1 and 1024".into());
    }
    if let Some(rows) = request.rows.filter(|rows| !(1..=1 << 16).contains(rows)) {
        return range("the number of rows at once", rows.to_string(), "between 1 and 65536".into());
    }
    if let Some(fraction) =
        request.gpu_memory_fraction.filter(|&fraction| !(fraction > 0.0 && fraction <= 1.0))
    {
        return range("the part of a GPU's memory", fraction.to_string(), "above 0 and at most 1".into());
    }
    match &request.device {
        Some(device) if device != CPU && machine.gpu(Some(device)).is_none() => {
            let gpus = machine.gpus.iter().map(|gpu| gpu.device.as_str());
            let there: Vec<&str> = std::iter::once(CPU).chain(gpus).collect();
            Err(PlanError::NoDevice { device: device.clone(), there: there.join(", ") })
        }
        _ => Ok(()),
    }
}

impl MachineProfile {
    /// The GPU that a name means: `wgpu:1`, the best GPU of `wgpu`, or without a name the best of all. Real cards are
    /// better than software GPUs, cards with known memory are better than others, and then the fastest measured one is
    /// best.
    pub fn gpu(&self, device: Option<&str>) -> Option<&GpuProfile> {
        let meant = |gpu: &&GpuProfile| match device {
            Some(name) => gpu.device == name || gpu.device.split(':').next() == Some(name),
            None => true,
        };
        let rate = |gpu: &GpuProfile| gpu.read_gb_per_s.unwrap_or(0.0);
        self.gpus.iter().filter(meant).min_by(|a, b| {
            let kind = |gpu: &GpuProfile| (gpu.software, gpu.memory_bytes.is_none());
            kind(a).cmp(&kind(b)).then(rate(b).total_cmp(&rate(a)))
        })
    }
}

/// The GPU that a request names.
fn asked_gpu<'a>(
    machine: &'a MachineProfile,
    request: &PlanRequest,
) -> Result<Option<&'a GpuProfile>, PlanError> {
    let fail = |layers, problem: &str| Err(PlanError::GpuLayers { layers, problem: problem.into() });
    match (request.device.as_deref(), request.gpu_layers) {
        (None | Some(CPU), None | Some(0)) => Ok(None),
        (Some(CPU), Some(layers)) => fail(layers, "the requested device is the CPU"),
        (Some(device), _) => Ok(machine.gpu(Some(device))),
        (None, Some(layers)) => match machine.gpu(None) {
            Some(gpu) => Ok(Some(gpu)),
            None => fail(layers, "this build finds no usable GPU on this machine"),
        },
    }
}

/// Real GPUs with known memory, the fastest first.
fn cards(machine: &MachineProfile) -> Vec<&GpuProfile> {
    let mut cards: Vec<&GpuProfile> =
        machine.gpus.iter().filter(|gpu| !gpu.software && gpu.memory_bytes.is_some()).collect();
    cards.sort_by(|a, b| b.read_gb_per_s.unwrap_or(0.0).total_cmp(&a.read_gb_per_s.unwrap_or(0.0)));
    cards
}

/// The number of threads, and the reason.
fn threads(room: &Room<'_>) -> (usize, String) {
    if let Some(threads) = room.request.threads {
        return (threads, format!("{} as asked for", explain::threads(threads)));
    }
    let Some(cores) = room.machine.cpu.physical_cores else {
        return (
            1,
            "the system does not report the number of cores: 1 thread (--threads sets another number)".into(),
        );
    };
    let all = || {
        let (threads, physical) =
            (explain::threads(cores), crate::text::count(cores as u64, "physical core"));
        (
            cores,
            format!(
                "{threads} for {physical}: a second hardware thread per core would share its units and gain nothing"
            ),
        )
    };
    match room.request.strategy {
        Strategy::Balanced if cores > 2 => {
            let (fewer, threads) = (cores - 1, explain::threads(cores - 1));
            (fewer, format!("{threads}: one of {cores} physical cores stays free for other programs"))
        }
        Strategy::PowerEfficiency => {
            let speed = |threads: usize| {
                let settings = RunSettings { threads, context: 1, kv_cache: CacheType::F32, rows: 1 };
                let placement = Placement::cpu_only(room.model.layers);
                let prediction = Prediction::of(room.model, room.machine, &placement, &settings)?;
                Some(prediction.decode_tokens_per_s)
            };
            let measured = room.machine.cpu.rates.iter().map(|rate| rate.threads).filter(|&t| t <= cores);
            let enough = |threads: &usize| match (speed(*threads), speed(cores)) {
                (Some(some), Some(best)) => some >= best * 0.9,
                _ => false,
            };
            match measured.filter(enough).min() {
                Some(fewer) if fewer < cores => (
                    fewer,
                    format!("{}: enough for 90 % of the decode speed of {cores}", explain::threads(fewer)),
                ),
                _ => all(),
            }
        }
        _ => all(),
    }
}

/// Contexts to try: the requested one, or the model's, with its sixteenths and its halves.
fn contexts(trained: usize, asked: Option<usize>, blind: bool) -> Vec<usize> {
    match asked {
        Some(context) => vec![context],
        None if blind => vec![trained.min(CAREFUL_CONTEXT)],
        None => {
            let part = |sixteenths: usize| trained / 16 * sixteenths / LEAST_CONTEXT * LEAST_CONTEXT;
            let halves =
                std::iter::successors(Some(trained), |&context| Some(context / 2).filter(|&half| half > 0));
            let shorter = (1..16).map(part).chain(halves).filter(|&context| context >= LEAST_CONTEXT);
            let mut all: Vec<usize> = shorter.chain([trained]).collect();
            all.sort_unstable();
            all.dedup();
            all
        }
    }
}

/// The best candidate that fits; if none fits, the smallest.
fn best(candidates: &[Candidate], strategy: Strategy) -> Option<&Candidate> {
    let mut fit: Vec<&Candidate> = candidates.iter().filter(|c| c.fits()).collect();
    if fit.is_empty() {
        return candidates.iter().min_by_key(|c| c.total());
    }
    let enough = fit.iter().map(|c| c.settings.context).max().unwrap_or(0).min(COMMON_CONTEXT);
    fit.retain(|c| c.settings.context >= enough);
    if strategy == Strategy::Memory {
        let longest = fit.iter().map(|c| c.settings.context).max().unwrap_or(0);
        fit.retain(|c| c.settings.context == longest);
        return fit.into_iter().min_by_key(|c| c.total());
    }
    // If not all devices were measured, assume that a GPU is faster than the CPU.
    let measured = fit.iter().all(|c| c.prediction.is_some());
    let speed = |c: &Candidate| match &c.prediction {
        Some(prediction) if measured => prediction.decode_tokens_per_s,
        _ => {
            let dense = usize::from(c.placement.dense != CPU);
            (c.placement.layers() - c.placement.layers_on(CPU) + dense) as f64
        }
    };
    let slack = if strategy == Strategy::Balanced { 1.25 } else { 1.1 };
    let fastest = fit.iter().map(|c| speed(c)).fold(0.0, f64::max);
    fit.retain(|c| speed(c) * slack >= fastest);
    fit.into_iter().max_by(|a, b| {
        let key =
            |c: &Candidate| (c.settings.context, c.precision(), usize::MAX - c.devices(), c.settings.rows);
        key(a).cmp(&key(b)).then(speed(a).total_cmp(&speed(b)))
    })
}

/// The reasons for the KV cache, the context and the rows.
fn why_settings(room: &Room<'_>, best: &Candidate, blind: bool) -> Vec<String> {
    let mut reasons = Vec::new();
    let RunSettings { context, kv_cache, rows, .. } = best.settings;
    // Memory of the next better setting with the same placement.
    let instead = |settings: RunSettings| explain::over_budget(&room.memory(&best.placement, &settings));
    let asked = |what: &str| format!("{what}, as requested");
    reasons.push(match (room.request.kv_cache, kv_cache) {
        (Some(kind), _) => asked(&format!("a KV cache of {}", kind.name())),
        (None, CacheType::F32) => "a KV cache of f32: keys and values exactly as computed".into(),
        (None, kind) if room.request.strategy == Strategy::Memory => {
            format!("a KV cache of {}: the smallest type that the device supports", kind.name())
        }
        (None, kind) => {
            let wider = if kind == CacheType::Int8 { CacheType::F16 } else { CacheType::F32 };
            let why = instead(RunSettings { kv_cache: wider, ..best.settings })
                .unwrap_or_else(|| "fewer layers or positions fit".into());
            format!("a KV cache of {}: with {}, {why}", kind.name(), wider.name())
        }
    });
    reasons.push(match room.request.context {
        Some(context) => asked(&format!("a context of {context} positions")),
        None if context == room.model.context => {
            format!("a context of {context} positions: the length that the model was trained for")
        }
        None if blind => {
            format!(
                "a context of {context} positions of {}, because the memory is unknown",
                room.model.context
            )
        }
        None => {
            let why = instead(RunSettings { context: room.model.context, ..best.settings })
                .unwrap_or_else(|| "fewer layers fit on the GPU".into());
            format!(
                "a context of {context} positions: with {}, the length that the model was trained for, {why}",
                room.model.context
            )
        }
    });
    if let Some(rows) = room.request.rows {
        reasons.push(asked(&format!("{rows} rows of a prompt at once")));
    } else if room.request.strategy == Strategy::Memory {
        reasons.push(format!("{rows} rows of a prompt at once, to keep activations small"));
    } else if rows < DEFAULT_CHUNK && !blind {
        let why = instead(RunSettings { rows: DEFAULT_CHUNK, ..best.settings })
            .unwrap_or_else(|| "activations would need more memory".into());
        reasons.push(format!("{rows} rows of a prompt at once: with {DEFAULT_CHUNK}, {why}"));
    }
    reasons
}

/// Number of sequences that fit at the same time; `None` if a budget is unknown.
fn room_for(memory: &[DeviceMemory]) -> Option<u64> {
    let of = |memory: &DeviceMemory| {
        let Some(left) = memory.budget?.checked_sub(memory.total()) else { return Some(0) };
        // A further sequence takes whole pages.
        let more = memory.kv_cache.checked_next_multiple_of(HUGE_PAGE).unwrap_or(u64::MAX);
        Some(left.checked_div(more).map_or(u64::MAX, |more| more.saturating_add(1)))
    };
    memory.iter().map(of).collect::<Option<Vec<_>>>()?.into_iter().min()
}

/// Number of sequences of the settings' context that fit at the same time; `None` if the memory is unknown.
pub(super) fn sequences(
    model: &Requirements,
    machine: &MachineProfile,
    placement: &Placement,
    settings: &RunSettings,
) -> Option<u64> {
    let room = Room { model, machine, request: &PlanRequest::default(), fraction: GPU_FRACTION };
    room_for(&room.memory(placement, settings))
}

/// The best candidate of every other combination of devices, and why it was not chosen.
fn alternatives(candidates: &[Candidate], best: &Candidate) -> Vec<Alternative> {
    let name = |kind: PlacementKind| std::mem::discriminant(&kind);
    let key = |c: &Candidate| {
        (name(c.placement.kind()), c.placement.devices().map(str::to_owned).collect::<Vec<_>>())
    };
    let mut seen = vec![key(best)];
    let mut others = Vec::new();
    for candidate in candidates {
        if seen.contains(&key(candidate)) {
            continue;
        }
        seen.push(key(candidate));
        let same: Vec<Candidate> = candidates.iter().filter(|c| key(c) == key(candidate)).cloned().collect();
        let Some(other) = self::best(&same, Strategy::Performance) else { continue };
        let decode = other.prediction.as_ref().map(|p| p.decode_tokens_per_s);
        let chosen = best.prediction.as_ref().map(|p| p.decode_tokens_per_s);
        let why_not = match (other.fits(), decode, chosen) {
            (false, ..) => explain::too_much(&other.memory),
            (true, Some(other), Some(best)) if other < best => {
                format!("decode is {:.1} times slower", best / other)
            }
            _ if other.settings.context < best.settings.context => "its context is shorter".into(),
            _ if other.precision() < best.precision() => "its KV cache is less exact".into(),
            _ => "the strategy does not rank it higher".into(),
        };
        others.push(Alternative {
            placement: other.placement.clone(),
            kv_cache: other.settings.kv_cache,
            context: other.settings.context,
            decode_tokens_per_s: decode,
            why_not,
        });
    }
    others
}
