//! A plan carried out: layers on the devices of a placement, and fewer of them on a GPU that has no room.

use bitnet_burn_backends::devices;
use bitnet_burn_backends::manager::manager;
use burn::tensor::Device;

use super::placement::{Placement, PlacementKind};
use super::{CPU, RunSettings};
use crate::checkpoint::Checkpoint;
use crate::load::{LoadOptions, LoadProgress, Loaded, ModelDevices, ModelError, load_on};
use crate::text::count;
use bitnet_burn::BitNet;

/// A model that is where it fits.
#[derive(Debug)]
pub struct PlacedModel {
    /// The model.
    pub model: BitNet,
    /// Matrices that were mapped from the file of packed weights beside the checkpoint.
    pub prepacked: usize,
    /// Where it is.
    pub placement: Placement,
    /// Why that is not what was asked for, in sentences, where it is not.
    pub notes: Vec<String>,
}

impl Placement {
    /// With half of the layers on each GPU, and those of workers, in the same order; the others, embedding and output on
    /// the CPU.
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

    /// The devices of a model's parts, each opened by its name.
    ///
    /// # Errors
    /// Those of `open`.
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
    /// Loads a model as a placement says. Where a GPU takes part, the largest forward pass of `settings` is tried out, as
    /// GPUs say only then that they have no memory for it; one that fails gets half of its layers, and so on, down to
    /// none.
    ///
    /// # Errors
    /// If a file or a kernel is wrong; `open`'s, for what it can't open; what a worker says against its layers; where strict
    /// mode has `no-fallback`, what a GPU says against its layers.
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
            // A type that the device lacks is no matter of memory: whoever makes the cache is told.
            if loaded.model.cache(context, kv_cache).is_err() {
                return Ok(Ok(loaded));
            }
            match loaded.model.try_out(rows, context, kv_cache) {
                Ok(()) => Ok(Ok(loaded)),
                Err(problem) => failed(placement, problem),
            }
        })
        .map(|(Loaded { model, prepacked }, placement, notes)| Self {
            model,
            prepacked,
            placement,
            notes,
        })
    }
}

/// A device of this machine other than the CPU.
fn is_gpu(device: &str) -> bool {
    device != CPU && !device.starts_with(devices::REMOTE)
}

/// What a worker said, who is named in it, is told: who named one, wants to know. On GPUs there are fewer layers to be
/// tried, as long as there are any.
fn failed<T, E: From<ModelError>>(placement: &Placement, problem: String) -> Result<Result<T, String>, E> {
    let mut workers = placement.devices().filter(|device| device.starts_with(devices::REMOTE));
    let on_gpus = placement.devices().any(is_gpu);
    match workers.any(|worker| !on_gpus || problem.contains(worker)) {
        true => Err(ModelError::Worker { problem }.into()),
        false => Ok(Err(problem)),
    }
}

/// Attempts a placement, and with fewer layers on GPUs what fails there, unless that is `strict`ly an error.
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
                // GPUs tell at length what they skipped afterwards.
                let words = problem.split_whitespace().collect::<Vec<_>>().join(" ");
                let problem: String = words.chars().take(200).collect();
                let layers = count(on_gpus(&placement) as u64, "layer");
                if strict {
                    return Err(ModelError::Placement { layers, problem }.into());
                }
                notes.push(format!(
                    "{layers} on GPUs failed ({problem}); now {} there, and the others on the CPU",
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
            "30 layers on GPUs failed (out of memory at ...); now 15 there, and the others on the CPU"
        );
        // A device that computes nothing at all leaves the CPU.
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
        // What is wrong with the files is wrong on every device.
        let wrong = || ModelError::Devices { found: 1, expected: 2 };
        assert!(fall_back::<(), _>(&start, false, |_| Err(wrong())).is_err());
        // Strictly, the first problem is one.
        let error =
            fall_back::<(), ModelError>(&start, true, |_| Ok(Err("out of memory".into()))).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("no-fallback") && text.contains("30 layers on GPUs failed (out of memory)"),
            "{text}"
        );
    }

    #[test]
    fn a_worker_s_words_are_told_and_gpus_beside_it_get_fewer_layers() {
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
