//! Carries out a plan: loads a model on the devices of a placement, with fewer layers on a GPU that fails.

use bitnet_burn_backends::devices;
use bitnet_burn_backends::manager::manager;
use burn::tensor::Device;

use super::placement::{Placement, PlacementKind};
use super::{CPU, RunSettings};
use crate::checkpoint::Checkpoint;
use crate::load::{LoadOptions, LoadProgress, Loaded, ModelDevices, ModelError, Packings, load_on};
use crate::text::count;
use bitnet_burn::BitNet;

/// A model that is loaded on the devices where it fits.
#[derive(Debug)]
pub struct PlacedModel {
    /// The model.
    pub model: BitNet,
    /// Number of matrices that were mapped from the file of packed weights next to the checkpoint.
    pub prepacked: usize,
    /// What is left to pack.
    pub packings: Packings,
    /// The placement that was used in the end.
    pub placement: Placement,
    /// If this is not the requested placement: the reasons, as sentences.
    pub notes: Vec<String>,
}

impl Placement {
    /// The placement with half of the layers on each GPU, in the same order. Workers keep their layers. The rest, embedding
    /// and output projection go to the CPU.
    pub fn with_fewer_on_gpus(&self) -> Self {
        let layers = |device: &str| match is_gpu(device) {
            true => self.layers_on(device) / 2,
            false => self.layers_on(device),
        };
        let others = self.devices().filter(|&device| device != CPU);
        let mut parts: Vec<(String, usize)> =
            others.map(|device| (device.to_owned(), layers(device))).collect();
        let left = self.layers() - parts.iter().map(|(_, layers)| layers).sum::<usize>();
        parts.push((CPU.to_owned(), left));
        Self::over(parts, CPU)
    }

    /// The device of each part of a model, opened by its name.
    ///
    /// # Errors
    /// The errors of `open`.
    pub fn devices_of<E>(&self, open: &mut dyn FnMut(&str) -> Result<Device, E>) -> Result<ModelDevices, E> {
        let dense = open(&self.dense)?;
        let mut layers = Vec::with_capacity(self.layers());
        for stage in &self.stages {
            let device = if stage.device == self.dense { dense.clone() } else { open(&stage.device)? };
            layers.extend(std::iter::repeat_n(device, stage.layers.len()));
        }
        Ok(ModelDevices { layers, dense })
    }
}

impl PlacedModel {
    /// Loads a model as the placement says. If a GPU takes part, this also tries the largest forward pass of `settings`,
    /// because a GPU reports full memory only when the memory is used. A GPU that fails gets half of its layers, again
    /// and again, down to none.
    ///
    /// # Errors
    /// If a file or a kernel is wrong, if `open` fails, if a worker fails, or, in strict mode `no-fallback`, if a GPU
    /// fails.
    pub fn load<E: From<ModelError>>(
        checkpoint: &Checkpoint,
        placement: &Placement,
        settings: &RunSettings,
        options: &LoadOptions,
        open: &mut dyn FnMut(&str) -> Result<Device, E>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, E> {
        let strict = manager().config().strict.no_fallback;
        fall_back(placement, strict, |placement| {
            let devices = placement.devices_of(open)?;
            if placement.kind() == PlacementKind::CpuOnly {
                return Ok(Ok(load_on(checkpoint, &devices, options, progress)?));
            }
            let load = || load_on(checkpoint, &devices, options, progress);
            let loaded = match devices::catching_panics(load) {
                Ok(loaded) => loaded?,
                Err(problem) => return failed(placement, problem),
            };
            let RunSettings { rows, context, kv_cache, .. } = *settings;
            // The device lacks this cache type, which fewer layers can't change. The caller gets the error when it makes
            // the cache.
            if loaded.model.cache(context, kv_cache).is_err() {
                return Ok(Ok(loaded));
            }
            match loaded.model.try_out(rows, context, kv_cache) {
                Ok(()) => Ok(Ok(loaded)),
                Err(problem) => failed(placement, problem),
            }
        })
        .map(|(Loaded { model, prepacked, packings }, placement, notes)| Self {
            model,
            prepacked,
            packings,
            placement,
            notes,
        })
    }
}

/// Whether a device is a GPU of this machine.
fn is_gpu(device: &str) -> bool {
    device != CPU && !device.starts_with(devices::REMOTE)
}

/// An error if a worker failed: if the message names one, or if no GPU takes part. Otherwise the message, so that fewer
/// layers are tried on the GPUs.
fn failed<T, E: From<ModelError>>(placement: &Placement, problem: String) -> Result<Result<T, String>, E> {
    let mut workers = placement.devices().filter(|device| device.starts_with(devices::REMOTE));
    let on_gpus = placement.devices().any(is_gpu);
    match workers.any(|worker| !on_gpus || problem.contains(worker)) {
        true => Err(ModelError::Worker { problem }.into()),
        false => Ok(Err(problem)),
    }
}

/// Attempts a placement, and after a failure the same with fewer layers on GPUs. If `strict`, a failure is an error.
fn fall_back<T, E: From<ModelError>>(
    placement: &Placement,
    strict: bool,
    mut attempt: impl FnMut(&Placement) -> Result<Result<T, String>, E>,
) -> Result<(T, Placement, Vec<String>), E> {
    let (mut placement, mut notes) = (placement.clone(), Vec::new());
    loop {
        match attempt(&placement)? {
            Ok(done) => return Ok((done, placement, notes)),
            Err(problem) => {
                let fewer = placement.with_fewer_on_gpus();
                let on_gpus = |placement: &Placement| {
                    let gpus = placement.devices().filter(|device| is_gpu(device));
                    gpus.map(|gpu| placement.layers_on(gpu)).sum::<usize>()
                };
                // Drivers append long lists of operations that they skipped afterwards.
                let words = problem.split_whitespace().collect::<Vec<_>>().join(" ");
                let problem: String = words.chars().take(200).collect();
                let layers = count(on_gpus(&placement) as u64, "layer");
                if strict {
                    return Err(ModelError::Placement { layers, problem }.into());
                }
                notes.push(format!(
                    "{layers} on GPUs failed ({problem}); now {} on GPUs, and the others on the CPU",
                    on_gpus(&fewer)
                ));
                placement = fewer;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_on_gpus_is_tried_with_fewer_layers_there() {
        let start = Placement::gpu_only("wgpu:0", 30);
        let mut tried = Vec::new();
        let attempt = |placement: &Placement| {
            tried.push(placement.layers_on("wgpu:0"));
            Ok::<_, ModelError>(if placement.layers_on("wgpu:0") > 5 {
                Err("out of memory\nat ...".into())
            } else {
                Ok(1)
            })
        };
        let (_, placement, notes) = fall_back(&start, false, attempt).unwrap();
        assert_eq!(tried, [30, 15, 7, 3]);
        assert_eq!(placement, Placement::hybrid("wgpu:0", 3, 27));
        assert_eq!(
            notes[0],
            "30 layers on GPUs failed (out of memory at ...); now 15 on GPUs, and the others on the CPU"
        );
        // If a device always fails, everything ends up on the CPU.
        let attempt = |placement: &Placement| {
            Ok::<_, ModelError>(if placement.kind() == PlacementKind::CpuOnly {
                Ok(())
            } else {
                Err("lost".into())
            })
        };
        let two = Placement::over([("wgpu:0".into(), 10), ("wgpu:1".into(), 20)], "wgpu:1");
        let (_, placement, notes) = fall_back(&two, false, attempt).unwrap();
        assert_eq!((placement, notes.len()), (Placement::cpu_only(30), 5));
        // An error in the files is not retried.
        let wrong = || ModelError::Devices { found: 1, expected: 2 };
        assert!(fall_back::<(), _>(&start, false, |_| Err(wrong())).is_err());
        // In strict mode, the first failure is an error.
        let error =
            fall_back::<(), ModelError>(&start, true, |_| Ok(Err("out of memory".into()))).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("no-fallback") && text.contains("30 layers on GPUs failed (out of memory)"),
            "{text}"
        );
    }

    #[test]
    fn a_workers_failure_is_an_error_and_gpus_next_to_it_get_fewer_layers() {
        let over = |gpu| Placement::over([("remote:a:1".into(), 10), ("wgpu:0".into(), gpu)], CPU);
        let whose = |placement: &Placement, problem: &str| {
            failed::<(), ModelError>(placement, problem.into()).map_err(|error| error.to_string())
        };
        assert_eq!(whose(&over(20), "out of memory"), Ok(Err("out of memory".into())));
        assert!(whose(&over(20), "remote:a:1: it ended").unwrap_err().contains("remote:a:1: it ended"));
        assert!(whose(&over(0), "out of memory").is_err());
        let fewer = over(20).with_fewer_on_gpus();
        assert_eq!(["remote:a:1", "wgpu:0", CPU].map(|device| fewer.layers_on(device)), [10, 10, 10]);
    }
}
