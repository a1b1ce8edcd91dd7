//! Which device computes which layers.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::CPU;
use crate::text::count;

/// Consecutive layers on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// `cpu`, a GPU: `wgpu:0`, `cuda:1`, or a worker: `remote:HOST:PORT`.
    pub device: String,
    /// The layers, from zero.
    pub layers: Range<usize>,
}

/// An ordered list of devices and their layers. Rows move between devices only where the device changes. The KV cache of
/// a layer is on the layer's device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// In the order of the layers. Each stage begins where the previous one ends, and has at least one layer.
    pub stages: Vec<Stage>,
    /// The device of the embedding, the last norm and the output projection.
    pub dense: String,
}

/// What kinds of devices a placement uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlacementKind {
    /// The CPU alone.
    CpuOnly,
    /// One GPU, or several.
    GpuOnly,
    /// GPUs and the CPU.
    Hybrid {
        /// Layers on the CPU.
        cpu_layers: usize,
        /// Layers on GPUs.
        gpu_layers: usize,
    },
}

impl Placement {
    /// Everything on the CPU.
    pub fn cpu_only(layers: usize) -> Self {
        Self::over([(CPU.to_owned(), layers)], CPU)
    }

    /// Everything on a GPU.
    pub fn gpu_only(gpu: &str, layers: usize) -> Self {
        Self::over([(gpu.to_owned(), layers)], gpu)
    }

    /// The first layers on a GPU; the others, embedding and output projection on the CPU.
    pub fn hybrid(gpu: &str, gpu_layers: usize, cpu_layers: usize) -> Self {
        Self::over([(gpu.to_owned(), gpu_layers), (CPU.to_owned(), cpu_layers)], CPU)
    }

    /// Each device with its number of layers, in this order. Devices without layers are left out.
    pub fn over(parts: impl IntoIterator<Item = (String, usize)>, dense: &str) -> Self {
        let mut stages: Vec<Stage> = Vec::new();
        let mut next = 0usize;
        for (device, layers) in parts {
            let end = next.saturating_add(layers);
            if layers > 0 {
                stages.push(Stage { device, layers: next..end });
            }
            next = end;
        }
        Self { stages, dense: dense.to_owned() }
    }

    /// Number of all layers.
    pub fn layers(&self) -> usize {
        self.stages.last().map_or(0, |stage| stage.layers.end)
    }

    /// Number of layers on a device.
    pub fn layers_on(&self, device: &str) -> usize {
        self.stages.iter().filter(|stage| stage.device == device).map(|stage| stage.layers.len()).sum()
    }

    /// Every device once, in the order of its first use.
    pub fn devices(&self) -> impl Iterator<Item = &str> {
        let all = || self.stages.iter().map(|stage| stage.device.as_str()).chain([self.dense.as_str()]);
        all()
            .enumerate()
            .filter(move |(i, device)| !all().take(*i).any(|d| d == *device))
            .map(|(_, device)| device)
    }

    /// What kinds of devices it uses.
    pub fn kind(&self) -> PlacementKind {
        let cpu_layers = self.layers_on(CPU);
        match (self.devices().any(|device| device == CPU), self.devices().any(|device| device != CPU)) {
            (true, true) => PlacementKind::Hybrid { cpu_layers, gpu_layers: self.layers() - cpu_layers },
            (false, true) => PlacementKind::GpuOnly,
            (_, false) => PlacementKind::CpuOnly,
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Stage { device, layers: Range { start, end } } in &self.stages {
            match end - start {
                1 => write!(f, "layer {start} on {device}, ")?,
                _ => write!(f, "layers {start} to {} on {device}, ", end - 1)?,
            }
        }
        write!(f, "embedding and output on {}", self.dense)
    }
}

impl fmt::Display for PlacementKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CpuOnly => f.write_str("the CPU alone"),
            Self::GpuOnly => f.write_str("GPU alone"),
            Self::Hybrid { cpu_layers, gpu_layers } => {
                write!(
                    f,
                    "hybrid, {} on GPUs and {cpu_layers} on the CPU",
                    count(*gpu_layers as u64, "layer")
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_follow_each_other_and_devices_come_once() {
        let hybrid = Placement::hybrid("wgpu:0", 3, 5);
        assert_eq!((hybrid.layers(), hybrid.layers_on("wgpu:0"), hybrid.layers_on(CPU)), (8, 3, 5));
        assert_eq!(hybrid.devices().collect::<Vec<_>>(), ["wgpu:0", CPU]);
        assert_eq!(hybrid.kind(), PlacementKind::Hybrid { cpu_layers: 5, gpu_layers: 3 });
        assert_eq!(
            hybrid.to_string(),
            "layers 0 to 2 on wgpu:0, layers 3 to 7 on cpu, embedding and output on cpu"
        );
        assert_eq!(Placement::hybrid("wgpu:0", 0, 8), Placement::cpu_only(8));
        assert_eq!(Placement::cpu_only(8).kind(), PlacementKind::CpuOnly);
        assert_eq!(Placement::gpu_only("cuda:0", 8).kind(), PlacementKind::GpuOnly);
        // All layers on the GPU with embedding and output on the CPU differs from everything on the GPU.
        assert_eq!(
            Placement::hybrid("wgpu:0", 8, 0).kind(),
            PlacementKind::Hybrid { cpu_layers: 0, gpu_layers: 8 }
        );
        let two = Placement::over([("wgpu:0".into(), 1), ("wgpu:1".into(), 7)], "wgpu:1");
        assert_eq!(two.kind(), PlacementKind::GpuOnly);
        assert_eq!(
            two.to_string(),
            "layer 0 on wgpu:0, layers 1 to 7 on wgpu:1, embedding and output on wgpu:1"
        );
    }
}
