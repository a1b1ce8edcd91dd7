//! A plan that meets reality: what a run measured changes the next one.

use bitnet_burn_core::manager::LOW_MEMORY;

use super::choose;
use super::machine::{MachineProfile, MemoryProfile};
use super::{CPU, Plan, PlanError, Requirements, Wishes};
use crate::report::human_bytes;

/// What was seen while a plan was carried out; `None` for what was not looked at.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Main memory now.
    pub memory: Option<MemoryProfile>,
    /// The part of the processor that other programs use, 0 to 1.
    pub others_use: Option<f64>,
    /// Decode in tokens a second behind a short history.
    pub decode_tokens_per_s: Option<f64>,
    /// A GPU that ran out of memory with the plan's layers on it.
    pub out_of_memory: Option<String>,
}

/// So much slower than predicted counts.
const MUCH_SLOWER: f64 = 0.5;
/// So much of the processor in use by others counts.
const BUSY: f64 = 0.25;

impl Plan {
    /// The plan for what was observed: short memory plans anew with what is left, a GPU that ran out of memory gets
    /// half of its layers, and a processor that others use gets fewer threads where the speed suffers from it. `None`
    /// where nothing calls for a change.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn adapted(
        &self,
        model: &Requirements,
        machine: &MachineProfile,
        wishes: &Wishes,
        observed: &Observed,
    ) -> Result<Option<Self>, PlanError> {
        let (mut machine, mut wishes) = (machine.clone(), wishes.clone());
        let mut reasons = Vec::new();
        if let Some(gpu) = &observed.out_of_memory {
            let before = self.placement.layers_on(gpu);
            let fewer = fewer_layers(before);
            if fewer == 0 && before <= 1 {
                (wishes.device, wishes.gpu_layers) = (Some(CPU.into()), None);
            } else {
                (wishes.device, wishes.gpu_layers) = (Some(gpu.clone()), Some(fewer));
            }
            reasons.push(format!("{gpu} ran out of memory with {before} layers: {fewer} now"));
        }
        if let Some(memory) = observed.memory
            && memory.available_bytes < memory.total_bytes / LOW_MEMORY
        {
            // What the run holds already is its own.
            let own =
                self.memory.iter().filter(|m| m.device == CPU).map(super::DeviceMemory::total).sum::<u64>();
            let lacking = (memory.total_bytes / LOW_MEMORY).saturating_sub(memory.available_bytes);
            wishes.memory = Some(own.saturating_sub(lacking));
            machine.memory = Some(memory);
            let (available, total) = (human_bytes(memory.available_bytes), human_bytes(memory.total_bytes));
            reasons.push(format!("memory is short: {available} of {total} are left"));
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
                wishes.threads = Some(idle);
                reasons.push(format!(
                    "other programs use {:.0} % of the processor, and decode is less than half as fast as predicted: \
                     {idle} threads",
                    busy * 100.0
                ));
            }
        }
        if reasons.is_empty() {
            return Ok(None);
        }
        let mut plan = choose::choose(model, &machine, &wishes)?;
        plan.reasons.splice(0..0, reasons);
        Ok(Some(plan))
    }
}

/// Layers for a device that had no room for so many.
pub(crate) fn fewer_layers(before: usize) -> usize {
    before / 2
}
