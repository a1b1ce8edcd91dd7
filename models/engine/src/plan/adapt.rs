//! A plan that meets reality: what a run measured changes the next one.

use std::path::{Path, PathBuf};

use bitnet_burn_formats::files;
use bitnet_burn_manager::LOW_MEMORY;
use serde::{Deserialize, Serialize};

use super::choose;
use super::machine::{MachineProfile, MemoryProfile};
use super::{CPU, Plan, PlanError, PlanRequest, Requirements};
use crate::text::{count, human_bytes};

/// What was seen while a plan was carried out; `None` for what was not looked at.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Main memory now.
    pub memory: Option<MemoryProfile>,
    /// The part of the processor that other programs use, 0 to 1.
    pub others_use: Option<f64>,
    /// Decode in tokens a second behind a short history.
    pub decode_tokens_per_s: Option<f64>,
    /// A GPU that failed with the plan's layers on it: for lack of memory, unless `problem` says otherwise.
    pub out_of_memory: Option<String>,
    /// What was said against those layers, where that is known.
    pub problem: Option<String>,
    /// The layers that it held in the end, where that was found out; half of the plan's otherwise.
    pub layers_left: Option<usize>,
}

/// What a run showed about plans for a model on a machine: what later ones are held to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lesson {
    /// Compute there: [`PlanRequest::device`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// So many layers on that GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_layers: Option<usize>,
    /// So many threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// So many bytes of main memory: not kept, as later plans look at what is free then.
    #[serde(skip)]
    pub memory: Option<u64>,
    /// Why, in sentences.
    pub reasons: Vec<String>,
}

/// So much slower than predicted counts.
const MUCH_SLOWER: f64 = 0.5;
/// So much of the processor in use by others counts.
const BUSY: f64 = 0.25;

impl Plan {
    /// The [best one](Plan::new), held to the [lesson](Lesson) that an earlier run with this request left in the cache
    /// directory, if there is one that can be kept and costs no memory that is not there; with that lesson's reasons, which are among the plan's, too.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn learnt(
        cache_dir: Option<&Path>,
        model: &Requirements,
        machine: &MachineProfile,
        request: &PlanRequest,
    ) -> Result<(Self, Vec<String>), PlanError> {
        let free = Self::new(model, machine, request)?;
        if let Some(lesson) = Lesson::recall(cache_dir, model, request) {
            let kept = lesson.kept(request, machine);
            // A damaged one may ask for what can't be.
            if kept != *request
                && let Ok(mut plan) = Self::new(model, machine, &kept)
                && (plan.fits || !free.fits)
            {
                let reasons: Vec<String> =
                    lesson.reasons.iter().map(|reason| format!("an earlier run: {reason}")).collect();
                plan.reasons.splice(0..0, reasons.iter().cloned());
                return Ok((plan, reasons));
            }
        }
        Ok((free, Vec::new()))
    }

    /// What was observed that calls for another plan: short memory, a GPU that ran out of it, a processor that others use
    /// where the speed suffers from that. `None` where nothing does.
    pub fn lesson(&self, observed: &Observed) -> Option<Lesson> {
        let mut lesson = Lesson::default();
        if let Some(gpu) = &observed.out_of_memory {
            let before = self.placement.layers_on(gpu);
            let fewer = observed.layers_left.unwrap_or_else(|| fewer_layers(before));
            let words = observed.problem.as_deref().unwrap_or("out of memory");
            let none = fewer == 0 && (before <= 1 || observed.layers_left.is_some());
            // What failed with any number of layers and for another reason may work the next time.
            if !none || names_memory(words) {
                (lesson.device, lesson.gpu_layers) =
                    if none { (Some(CPU.into()), None) } else { (Some(gpu.clone()), Some(fewer)) };
                let before = count(before as u64, "layer");
                lesson.reasons.push(format!("{before} on {gpu} failed ({words}): {fewer} now"));
            }
        }
        if let Some(memory) = observed.memory
            && memory.available_bytes < memory.total_bytes / LOW_MEMORY
        {
            // What the run holds already is its own.
            let own =
                self.memory.iter().filter(|m| m.device == CPU).map(super::DeviceMemory::total).sum::<u64>();
            let lacking = (memory.total_bytes / LOW_MEMORY).saturating_sub(memory.available_bytes);
            lesson.memory = Some(own.saturating_sub(lacking));
            let (available, total) = (human_bytes(memory.available_bytes), human_bytes(memory.total_bytes));
            lesson.reasons.push(format!("memory is short: {available} of {total} are left"));
        }
        let slow = match (&self.prediction, observed.decode_tokens_per_s) {
            (Some(prediction), Some(measured)) => measured < prediction.decode_tokens_per_s * MUCH_SLOWER,
            _ => false,
        };
        if let Some(busy) =
            observed.others_use.filter(|&busy| slow && busy > BUSY && self.settings.threads > 1)
        {
            let idle = (self.settings.threads as f64 * (1.0 - busy.min(1.0))).floor().max(1.0) as usize;
            if idle < self.settings.threads {
                lesson.threads = Some(idle);
                lesson.reasons.push(format!(
                    "other programs use {:.0} % of the processor, and decode is less than half as fast as predicted: \
                     {idle} threads",
                    busy * 100.0
                ));
            }
        }
        (!lesson.reasons.is_empty()).then_some(lesson)
    }

    /// The plan for what was observed ([`lesson`](Self::lesson)): short memory plans anew with what is left, a GPU that ran
    /// out of memory gets fewer layers, and a processor that others use gets fewer threads. `None` where nothing calls for
    /// a change.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn adapted(
        &self,
        model: &Requirements,
        machine: &MachineProfile,
        request: &PlanRequest,
        observed: &Observed,
    ) -> Result<Option<Self>, PlanError> {
        let Some(lesson) = self.lesson(observed) else { return Ok(None) };
        let (mut machine, mut request) = (machine.clone(), request.clone());
        if lesson.device.is_some() {
            (request.device, request.gpu_layers) = (lesson.device.clone(), lesson.gpu_layers);
        }
        if lesson.memory.is_some() {
            (request.memory, machine.memory) = (lesson.memory, observed.memory);
        }
        request.threads = lesson.threads.or(request.threads);
        let mut plan = choose::choose(model, &machine, &request)?;
        plan.reasons.splice(0..0, lesson.reasons);
        Ok(Some(plan))
    }
}

impl Lesson {
    /// PlanRequest that keep to it, where they say nothing else; a device that is not there any more is not asked for.
    pub fn kept(&self, request: &PlanRequest, machine: &MachineProfile) -> PlanRequest {
        let mut request = request.clone();
        let there = |device: &String| device == CPU || machine.gpu(Some(device)).is_some();
        if request.device.is_none()
            && request.gpu_layers.is_none()
            && let Some(device) = self.device.clone().filter(there)
        {
            (request.device, request.gpu_layers) = (Some(device), self.gpu_layers);
        }
        request.threads = request.threads.or(self.threads);
        request
    }

    /// What was learnt about a model and such a request on this machine; what is wrong with the file costs the lesson, and nothing else.
    pub fn recall(cache_dir: Option<&Path>, model: &Requirements, request: &PlanRequest) -> Option<Self> {
        let path = Self::path(cache_dir, model, request)?;
        let lesson = serde_json::from_str(&super::machine::read_text(&path).ok()?);
        lesson
            .inspect_err(|error| {
                tracing::warn!(path = %path.display(), %error, "ignoring what was learnt from a run");
            })
            .ok()
    }

    /// Keeps it for later plans of this model with the same request on this machine, beside what was kept before: the newer
    /// one counts where both say something.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn keep(
        &self,
        cache_dir: Option<&Path>,
        model: &Requirements,
        request: &PlanRequest,
    ) -> std::io::Result<()> {
        let Some(path) = Self::path(cache_dir, model, request) else { return Ok(()) };
        let before = Self::recall(cache_dir, model, request).unwrap_or_default();
        let both = self.clone().after(before);
        std::fs::create_dir_all(files::directory(&path))?;
        files::replace_private(&path, |out| {
            serde_json::to_writer_pretty(&mut *out, &both)?;
            out.write_all(b"\n")
        })
    }

    /// This one, with what an earlier one said besides.
    fn after(self, before: Self) -> Self {
        let (device, gpu_layers) = match self.device {
            Some(device) => (Some(device), self.gpu_layers),
            None => (before.device, before.gpu_layers),
        };
        let mut reasons = before.reasons;
        for reason in self.reasons {
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
        Self {
            device,
            gpu_layers,
            threads: self.threads.or(before.threads),
            memory: self.memory.or(before.memory),
            reasons,
        }
    }

    /// Forgets what was learnt on this machine about any model.
    pub(super) fn forget_all(cache_dir: Option<&Path>) {
        let start = format!("{PREFIX}{}-", super::machine::key());
        for entry in cache_dir.into_iter().flat_map(std::fs::read_dir).flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(&start)) {
                // It may be another process's, or read-only: then it is learnt again, or kept.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// One file for a machine, a model and a request, by what plans know of them.
    fn path(cache_dir: Option<&Path>, model: &Requirements, request: &PlanRequest) -> Option<PathBuf> {
        let mut model = serde_json::to_vec(model).ok()?;
        model.extend(format!("{request:?}").into_bytes());
        let model = &files::sha256(&model)[..16];
        Some(cache_dir?.join(format!("{PREFIX}{}-{model}.json", super::machine::key())))
    }
}

/// In the file's name, so that another version's is not read.
const PREFIX: &str = "lesson-v2-";

/// Whether a device's words are about memory.
fn names_memory(words: &str) -> bool {
    let words = words.to_lowercase();
    ["memory", "alloc"].iter().any(|name| words.contains(name))
}

/// Layers for a device that had no room for so many.
pub(crate) fn fewer_layers(before: usize) -> usize {
    before / 2
}
