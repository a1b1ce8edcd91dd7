//! Devices by name: `flex`, `wgpu:1`, `remote:HOST:PORT`, and which layers are on which.
//!
//! The names are those of `--device`, of reports and of receipts.

use std::fmt;
use std::str::FromStr;

use bitnet_burn_backends::devices;
use burn::tensor::Device;

use crate::plan::{CPU, MachineProfile, Placement};

/// Why a device was not found or opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A name that no device has.
    #[error(
        "{name:?} is not a device; choose {}flex, ndarray, wgpu, metal, cuda, rocm or remote:HOST:PORT",
        if *or_auto { "auto, " } else { "" }
    )]
    Unknown {
        /// The name.
        name: String,
        /// Whether `auto` could stand in its place.
        or_auto: bool,
    },
    /// A worker without an address.
    #[error("{0}: a worker is named by its address, such as remote:127.0.0.1:7158")]
    Address(String),
    /// Something that is not the number of a device.
    #[error("{0:?} is not the number of a device")]
    Number(String),
    /// A number for the CPU.
    #[error("{0}: this device has no numbers")]
    OneHost(String),
    /// Something that is not a number of layers.
    #[error("{0:?} is not a number of layers")]
    Layers(String),
    /// Several devices without a number of layers.
    #[error("say how many layers are on each device, such as wgpu:0=12,flex: the last one takes the rest")]
    Ambiguous,
    /// A device that is named twice.
    #[error("{0} is named twice")]
    Twice(DeviceName),
    /// Another number of layers than the model has.
    #[error("{spec} has places for {given} layers; the model has {layers}")]
    Places {
        /// The devices.
        spec: DeviceSpec,
        /// Layers that they have places for.
        given: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A backend that was not compiled in.
    #[error("the device {0} is not compiled in: build with `cargo build --release --features {0}`")]
    NotCompiledIn(&'static str),
    /// No backend for the CPU was compiled in.
    #[error("no backend for the CPU is compiled in: build with `cargo build --release --features flex`")]
    NoHost,
    /// The device, or the driver, refused.
    #[error("{name}: {problem}")]
    Unusable {
        /// The device.
        name: DeviceName,
        /// What was said.
        problem: String,
    },
    /// A worker refused, or is not there.
    #[error("{0}")]
    Worker(String),
}

/// Burn's backends, by the features of this package.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceKind {
    /// The CPU.
    Flex,
    /// The CPU, through NdArray.
    Ndarray,
    /// A GPU, through wgpu.
    Wgpu,
    /// Apple's GPU, through Metal.
    Metal,
    /// An NVIDIA GPU, through CUDA.
    Cuda,
    /// An AMD GPU, through ROCm.
    Rocm,
    /// The device that a worker serves.
    Remote,
}

impl DeviceKind {
    /// All but [`Remote`](Self::Remote), which needs an address.
    pub const LOCAL: [Self; 6] = [Self::Flex, Self::Ndarray, Self::Wgpu, Self::Metal, Self::Cuda, Self::Rocm];

    /// The first one that is compiled in.
    pub fn compiled() -> Self {
        Self::LOCAL.into_iter().find(|kind| kind.is_compiled_in()).unwrap_or(Self::Flex)
    }

    /// The first one that is compiled in and computes in host memory.
    ///
    /// # Errors
    /// If there is none.
    pub fn host() -> Result<Self, DeviceError> {
        let host = Self::compiled();
        if host.is_host() && host.is_compiled_in() { Ok(host) } else { Err(DeviceError::NoHost) }
    }

    /// Its name, which is that of its feature.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::Ndarray => "ndarray",
            Self::Wgpu => "wgpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
            Self::Remote => "remote",
        }
    }

    /// Whether it computes in host memory.
    pub fn is_host(self) -> bool {
        matches!(self, Self::Flex | Self::Ndarray)
    }

    fn is_compiled_in(self) -> bool {
        match self {
            Self::Flex => cfg!(feature = "flex"),
            Self::Ndarray => cfg!(feature = "ndarray"),
            Self::Remote => cfg!(feature = "remote"),
            gpu => devices::runtimes().contains(&gpu.name()),
        }
    }

    /// That it is compiled in.
    ///
    /// # Errors
    /// [`DeviceError::NotCompiledIn`].
    pub fn compiled_in(self) -> Result<(), DeviceError> {
        if self.is_compiled_in() { Ok(()) } else { Err(DeviceError::NotCompiledIn(self.name())) }
    }

    /// The device, if it is compiled in and there is one.
    ///
    /// # Errors
    /// If not.
    pub fn open(self) -> Result<Device, DeviceError> {
        self.compiled_in()?;
        match self {
            #[cfg(feature = "flex")]
            Self::Flex => Ok(Device::flex()),
            #[cfg(feature = "ndarray")]
            #[allow(deprecated, reason = "NdArray still has users")]
            Self::Ndarray => Ok(Device::ndarray()),
            Self::Remote => Err(DeviceError::Address(self.name().to_owned())),
            gpu => devices::open(gpu.name()).map_err(|problem| DeviceError::Unusable {
                name: gpu.into(),
                problem: format!("there is no usable GPU here: {problem}"),
            }),
        }
    }
}

/// A device: `flex`, `wgpu` (the default one), `wgpu:1`, `remote:127.0.0.1:7158`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceName {
    /// Its backend.
    pub kind: DeviceKind,
    /// The number of a GPU among those of its kind.
    pub index: Option<usize>,
    /// The address of a worker, which a remote device has.
    pub address: Option<String>,
}

impl From<DeviceKind> for DeviceName {
    fn from(kind: DeviceKind) -> Self {
        Self { kind, index: None, address: None }
    }
}

impl DeviceName {
    /// The name that plans give it.
    fn in_plans(&self) -> String {
        if self.kind.is_host() { CPU.to_owned() } else { self.to_string() }
    }

    /// The device, if it is compiled in and there is one.
    ///
    /// # Errors
    /// If not.
    pub fn open(&self) -> Result<Device, DeviceError> {
        if self.index.is_none() && self.address.is_none() {
            return self.kind.open();
        }
        self.kind.compiled_in()?;
        devices::open(&self.to_string()).map_err(|problem| match self.address {
            // The problem begins with the worker's name.
            Some(_) => DeviceError::Worker(problem),
            None => DeviceError::Unusable { name: self.clone(), problem },
        })
    }

    /// A device by its name in plans, where the CPU is `host`, or the default backend.
    ///
    /// # Errors
    /// If the name is no device's, or the device can't be opened.
    pub fn open_planned(name: &str, host: Option<DeviceKind>) -> Result<Device, DeviceError> {
        match (name, host) {
            (CPU, Some(host)) => host.open(),
            (name, _) => name.parse::<Self>()?.open(),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        if let Some(address) = &self.address {
            write!(f, ":{address}")?;
        }
        self.index.map_or(Ok(()), |index| write!(f, ":{index}"))
    }
}

impl FromStr for DeviceName {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        if text == DeviceKind::Remote.name() || text.starts_with(devices::REMOTE) {
            let address = text.strip_prefix(devices::REMOTE).unwrap_or_default();
            let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
            if port.and_then(|port| port.parse::<u16>().ok()).is_none_or(|port| port == 0) {
                return Err(DeviceError::Address(text.to_owned()));
            }
            return Ok(Self { address: Some(address.to_owned()), ..DeviceKind::Remote.into() });
        }
        let (kind, index) = match text.split_once(':') {
            Some((kind, index)) => (kind, Some(index)),
            None => (text, None),
        };
        let unknown = || DeviceError::Unknown { name: kind.to_owned(), or_auto: false };
        let kind = match kind {
            CPU => DeviceKind::host()?,
            kind => DeviceKind::LOCAL.into_iter().find(|known| known.name() == kind).ok_or_else(unknown)?,
        };
        let number = |index: &str| index.parse().map_err(|_| DeviceError::Number(index.to_owned()));
        let index = index.map(number).transpose()?;
        if kind.is_host() && index.is_some() {
            return Err(DeviceError::OneHost(text.to_owned()));
        }
        Ok(Self { index, ..kind.into() })
    }
}

/// Where a model computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    /// Where a plan says.
    Auto,
    /// On these devices, in the order of the layers, with the layers on each. The one without a number takes all that
    /// are left. Embedding and output are on the last one.
    On(Vec<(DeviceName, Option<usize>)>),
}

impl From<DeviceKind> for DeviceSpec {
    fn from(kind: DeviceKind) -> Self {
        Self::On(vec![(kind.into(), None)])
    }
}

impl DeviceSpec {
    /// Which layers are where, by the names of devices in plans; `None` for [`Auto`](Self::Auto).
    ///
    /// # Errors
    /// If the devices have places for another number of layers.
    pub fn placement(&self, layers: usize) -> Result<Option<Placement>, DeviceError> {
        let Self::On(parts) = self else { return Ok(None) };
        let given: usize = parts.iter().filter_map(|(_, count)| *count).fold(0, usize::saturating_add);
        let open = parts.iter().any(|(_, count)| count.is_none());
        if given > layers || given < layers && !open {
            return Err(DeviceError::Places { spec: self.clone(), given, layers });
        }
        let counted = parts.iter().map(|(name, count)| (name.in_plans(), count.unwrap_or(layers - given)));
        let last = parts.last().map_or_else(|| CPU.to_owned(), |(name, _)| name.in_plans());
        Ok(Some(Placement::over(counted, &last)))
    }

    /// The host's device that was named.
    pub fn host(&self) -> Option<DeviceKind> {
        let Self::On(parts) = self else { return None };
        parts.iter().map(|(name, _)| name.kind).find(|kind| kind.is_host())
    }

    /// With the GPU that plans mean by `wgpu` in its place, where this machine's GPUs are known.
    ///
    /// # Errors
    /// If a device is named twice then.
    pub fn resolved(self, machine: &MachineProfile) -> Result<Self, DeviceError> {
        let Self::On(mut parts) = self else { return Ok(self) };
        // The user has chosen what wgpu's default is.
        let chosen = std::env::var_os("CUBECL_WGPU_DEFAULT_DEVICE").is_some();
        let open = |name: &DeviceName| match name.kind {
            DeviceKind::Wgpu => name.index.is_none() && !chosen,
            DeviceKind::Remote => false,
            kind => name.index.is_none() && !kind.is_host(),
        };
        for (name, _) in parts.iter_mut().filter(|(name, _)| open(name)) {
            if let Some(gpu) = machine.gpu(Some(name.kind.name())) {
                *name = gpu.device.parse()?;
            }
        }
        Self::checked(parts)
    }

    /// The devices of a placement; its CPU is `host`, or the default backend.
    ///
    /// # Errors
    /// If the placement names an unknown device.
    pub fn of(placement: &Placement, host: Option<DeviceKind>) -> Result<Self, DeviceError> {
        let name = |device: &str| match (device, host) {
            (CPU, Some(kind)) => Ok(kind.into()),
            (device, _) => device.parse::<DeviceName>(),
        };
        if placement.devices().count() == 1 {
            return Ok(Self::On(vec![(name(&placement.dense)?, None)]));
        }
        let mut parts: Vec<_> = (placement.stages.iter())
            .map(|stage| Ok((name(&stage.device)?, Some(stage.layers.len()))))
            .collect::<Result<_, DeviceError>>()?;
        if placement.stages.last().is_none_or(|stage| stage.device != placement.dense) {
            parts.push((name(&placement.dense)?, Some(0)));
        }
        Ok(Self::On(parts))
    }

    fn checked(parts: Vec<(DeviceName, Option<usize>)>) -> Result<Self, DeviceError> {
        if parts.iter().filter(|(_, count)| count.is_none()).count() > 1 {
            return Err(DeviceError::Ambiguous);
        }
        for (i, (name, _)) in parts.iter().enumerate() {
            let host = |name: &DeviceName| name.kind.is_host();
            if parts[..i].iter().any(|(other, _)| other == name || host(other) && host(name)) {
                return Err(DeviceError::Twice(name.clone()));
            }
        }
        Ok(Self::On(parts))
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::On(parts) = self else { return f.write_str("auto") };
        for (i, (name, count)) in parts.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{name}")?;
            if let Some(count) = count {
                write!(f, "={count}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for DeviceSpec {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let part = |part: &str| {
            let (name, count) = match part.split_once('=') {
                Some((name, count)) => {
                    let layers = count.parse::<usize>().ok().filter(|&layers| layers < 1 << 20);
                    (name, Some(layers.ok_or_else(|| DeviceError::Layers(count.to_owned()))?))
                }
                None => (part, None),
            };
            let name = name.parse::<DeviceName>().map_err(|error| match error {
                DeviceError::Unknown { name, .. } => DeviceError::Unknown { name, or_auto: part == text },
                error => error,
            })?;
            Ok((name, count))
        };
        Self::checked(text.split(',').map(part).collect::<Result<Vec<_>, DeviceError>>()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::GpuProfile;

    #[test]
    fn devices_are_named_with_their_layers() {
        let choice = |text: &str| text.parse::<DeviceSpec>();
        for text in [
            "auto",
            "flex",
            "wgpu",
            "cuda:1",
            "wgpu:0=12,flex",
            "wgpu:0=3,wgpu:1=4,flex=0",
            "cuda=1,ndarray=2",
            "remote:127.0.0.1:7158",
            "remote:[::1]:7001=12,remote:worker.local:7002=10,flex",
        ] {
            assert_eq!(choice(text).unwrap().to_string(), text);
        }
        for (text, expected) in [
            ("abacus", "\"abacus\" is not a device; choose auto, flex"),
            ("abacus,flex", "\"abacus\" is not a device; choose flex"),
            ("wgpu:x", "\"x\" is not the number of a device"),
            ("flex:1", "this device has no numbers"),
            ("wgpu=many,flex", "\"many\" is not a number of layers"),
            ("wgpu,flex", "how many layers are on each"),
            ("wgpu=1,wgpu=2", "wgpu is named twice"),
            ("remote:a:1=1,remote:a:1=2", "remote:a:1 is named twice"),
            ("remote", "named by its address"),
            ("remote:7158", "named by its address"),
            ("remote::7158", "named by its address"),
            ("remote:a:0", "named by its address"),
            ("flex=1,ndarray", "ndarray is named twice"),
            ("auto,flex", "\"auto\" is not a device"),
            ("", "\"\" is not a device"),
        ] {
            let error = choice(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let placement = |text: &str| choice(text).unwrap().placement(30).map(Option::unwrap);
        for (text, expected) in [
            ("flex", Placement::cpu_only(30)),
            ("wgpu", Placement::gpu_only("wgpu", 30)),
            ("wgpu:0=12,flex", Placement::hybrid("wgpu:0", 12, 18)),
            ("wgpu:0=30,flex", Placement::hybrid("wgpu:0", 30, 0)),
            ("remote:a:1=12,flex", Placement::hybrid("remote:a:1", 12, 18)),
        ] {
            let placement = placement(text).unwrap();
            assert_eq!(placement, expected, "{text}");
            let named = DeviceSpec::of(&placement, Some(DeviceKind::Flex)).unwrap();
            assert_eq!(named.placement(30).unwrap().unwrap(), placement, "{named}");
        }
        // A GPU without a number is the one that plans mean, where that is known.
        let gpu = |device: &str, rate| GpuProfile {
            device: device.into(),
            read_gb_per_s: Some(rate),
            ..GpuProfile::default()
        };
        let gpus = vec![gpu("wgpu:0", 50.0), gpu("wgpu:1", 500.0), gpu("cuda:0", 400.0)];
        let machine = MachineProfile { gpus, ..MachineProfile::default() };
        let unknown = MachineProfile::default();
        let resolved = |text: &str, machine| choice(text).unwrap().resolved(machine).map(|c| c.to_string());
        assert_eq!(resolved("wgpu=3,flex", &machine).unwrap(), "wgpu:1=3,flex");
        assert_eq!(resolved("wgpu:0,cuda=2", &machine).unwrap(), "wgpu:0,cuda:0=2");
        assert_eq!(resolved("wgpu", &unknown).unwrap(), "wgpu");
        let twice = resolved("wgpu=1,wgpu:1=2", &machine).unwrap_err().to_string();
        assert!(twice.contains("wgpu:1 is named twice"), "{twice}");
        for text in ["wgpu=31,flex", "wgpu=3,flex=4"] {
            assert!(placement(text).unwrap_err().to_string().contains("the model has 30"), "{text}");
        }
    }
}
