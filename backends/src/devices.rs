//! The devices besides host memory that this build can compute on, as Burn finds them.

use std::cell::Cell;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(any(feature = "flex", feature = "ndarray", feature = "cube", feature = "remote"))]
use burn::backend::DispatchDevice;
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// A GPU, or what stands in for one.
#[derive(Clone, Debug)]
pub struct GpuInfo {
    /// What names it: `wgpu:0`, `cuda:1`. The number counts the devices of the [runtime](runtimes).
    pub id: String,
    /// As its driver names it.
    pub name: String,
    /// The compiler behind it: `wgpu<wgsl>`, `cuda`.
    pub runtime: String,
    /// Whether no card computes, but a program on the CPU (lavapipe and the like).
    pub software: bool,
    /// Its memory, where the runtime tells: CUDA does, wgpu mostly does not.
    pub memory_bytes: Option<u64>,
    /// The largest buffer that can be had at once.
    pub max_allocation_bytes: u64,
    /// What its kernels may use: `plane`, `matrix units`.
    pub features: Vec<String>,
    /// Types that it computes with: `f32`, `f16`, `i8` ...
    pub precisions: Vec<String>,
    /// To compute on.
    pub device: Device,
}

/// All GPUs of the runtimes that are compiled in and lack [nothing](missing), and what went wrong where one could not be
/// asked. Opens every one of them.
pub fn gpus() -> (Vec<GpuInfo>, Vec<String>) {
    #[cfg(feature = "cube")]
    return found::gpus();
    #[cfg(not(feature = "cube"))]
    (Vec::new(), Vec::new())
}

/// The names of the runtimes that are compiled in: `wgpu`, `metal`, `cuda`, `rocm`.
pub fn runtimes() -> Vec<&'static str> {
    let all = [
        ("wgpu", cfg!(feature = "wgpu")),
        ("metal", cfg!(feature = "metal")),
        ("cuda", cfg!(feature = "cuda")),
        ("rocm", cfg!(feature = "rocm")),
    ];
    all.into_iter().filter_map(|(name, compiled)| compiled.then_some(name)).collect()
}

/// What runtimes that are compiled in need of the system and do not find, in sentences. It is looked for each time.
pub fn missing() -> Vec<String> {
    runtimes().into_iter().filter_map(|runtime| Some(format!("{runtime}: {}", lacking(runtime)?))).collect()
}

/// Why a runtime can't have a device here, whatever the cards: libraries that it loads when it is first used, and
/// panics without.
fn lacking(runtime: &str) -> Option<String> {
    match runtime {
        #[cfg(feature = "cuda")]
        "cuda" => cuda::lacking(),
        // HIP's libraries are looked for by the runtime itself, and Metal is there or not.
        _ => None,
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    const DRIVER: &str = "NVIDIA's driver";
    const COMPILER: &str = "NVRTC, the compiler for its kernels and a part of the CUDA toolkit,";

    /// What is loaded, by the names that cudarc tries.
    const LIBRARIES: [(&str, &[&str]); 2] = if cfg!(windows) {
        [(DRIVER, &["nvcuda.dll"]), (COMPILER, &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"])]
    } else {
        [
            (DRIVER, &["libcuda.so", "libcuda.so.1"]),
            (COMPILER, &["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11"]),
        ]
    };

    pub fn lacking() -> Option<String> {
        libraries().or_else(headers)
    }

    /// CubeCL's kernels include headers, from where it looks for them.
    fn headers() -> Option<String> {
        let usual = ["/usr/local/cuda", "/opt/cuda", "/usr/bin/nvcc"];
        let there = cfg!(windows)
            || std::env::var_os("CUDA_PATH").is_some()
            || usual.iter().any(|path| std::path::Path::new(path).exists());
        (!there).then(|| {
            "the headers of the CUDA toolkit are not there (it is neither in /usr/local/cuda nor where CUDA_PATH says)"
                .to_owned()
        })
    }

    fn libraries() -> Option<String> {
        LIBRARIES.iter().find_map(|(what, names)| {
            // SAFETY: loading runs the library's initialisers. They are those of the libraries that the runtime loads by
            // the same names as soon as it is used.
            let there = names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok());
            (!there).then(|| format!("{what} is not there ({} can't be loaded)", names[0]))
        })
    }
}

/// What a GPU can do at most, measured by CubeCL's probes: bytes read, and f32 multiply-adds, in 10^9 a second.
/// `None` for what it has no probe for. Takes some seconds at the first time.
pub fn peak(device: &Device) -> (Option<f64>, Option<f64>) {
    #[cfg(feature = "cube")]
    return found::peak(device);
    #[cfg(not(feature = "cube"))]
    {
        let _ = device;
        (None, None)
    }
}

/// What a GPU's runtime has of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes of tensors.
    pub in_use_bytes: u64,
    /// Bytes that round these up.
    pub padding_bytes: u64,
    /// Bytes that were taken from the device: they are kept for later tensors, so it is the most that there has been,
    /// unless somebody asked for a cleanup.
    pub reserved_bytes: u64,
}

impl Usage {
    /// The part of what was taken that no tensor has, 0 to 1.
    pub fn fragmentation(&self) -> f64 {
        1.0 - (self.in_use_bytes as f64 / self.reserved_bytes.max(1) as f64).min(1.0)
    }
}

/// The memory that this process has on a GPU; `None` for other devices.
pub fn usage(device: &Device) -> Option<Usage> {
    #[cfg(feature = "cube")]
    return found::usage(device);
    #[cfg(not(feature = "cube"))]
    {
        let _ = device;
        None
    }
}

/// What the name of a device on another machine begins with: `remote:HOST:PORT` is the worker's that listens there
/// (feature `remote`).
pub const REMOTE: &str = "remote:";

/// Bytes of the largest tensor that goes to a worker or back: Burn's limit for a message is a GiB, with what is around.
pub const LARGEST_REMOTE: usize = (1 << 30) - (1 << 16);

/// The GPU of a name that [`GpuInfo::id`] has, tried out, without a number the runtime's default one; or the device of a
/// [worker](REMOTE).
///
/// # Errors
/// In words, if it is not there or does not compute.
pub fn open(id: &str) -> Result<Device, String> {
    if let Some(address) = id.strip_prefix(REMOTE) {
        #[cfg(feature = "remote")]
        return crate::remote::open(address);
        #[cfg(not(feature = "remote"))]
        return Err(format!("{REMOTE}{address}: workers are not compiled in (feature remote)"));
    }
    let (runtime, index) = match id.split_once(':') {
        None => (id, None),
        Some((runtime, index)) => match index.parse::<usize>() {
            Ok(index) => (runtime, Some(index)),
            Err(_) => return Err(format!("{id}: a GPU is named by its runtime and number, such as wgpu:0")),
        },
    };
    if let Some(problem) = lacking(runtime) {
        return Err(problem);
    }
    // wgpu has an opinion on which of several adapters is the default.
    #[cfg(feature = "wgpu")]
    if id == "wgpu" {
        return tried(|| Device::wgpu(Default::default()));
    }
    let all = of_runtime(runtime)?;
    match all.get(index.unwrap_or(0)) {
        Some(device) => tried(|| device.clone()),
        None => Err(format!("there is no device {id}; there are {} of its kind", all.len())),
    }
}

/// What a device is called: `remote:HOST:PORT` for one on a worker, for others what Burn calls it.
pub fn name(device: &Device) -> String {
    #[cfg(feature = "remote")]
    if let Some(address) = crate::remote::address(device) {
        return format!("{REMOTE}{address}");
    }
    format!("{device:?}")
}

/// Why layers can't compute on a device: this build has no operations for its backend.
pub fn unsupported(device: &Device) -> Option<String> {
    match device.clone().without_autodiff().as_dispatch() {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => None,
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => None,
        #[cfg(feature = "cube")]
        DispatchDevice::Cube(_) => None,
        #[cfg(feature = "remote")]
        DispatchDevice::Remote(_) => None,
        #[allow(unreachable_patterns, reason = "with all of Burn's backends there is no other")]
        _ => Some(of_missing(&format!("{device:?}"))),
    }
}

/// What a backend lacks, by the name that its devices print.
fn of_missing(device: &str) -> String {
    let features = [
        ("Flex", "`flex`"),
        ("NdArray", "`ndarray`"),
        ("Cube", "`wgpu` (or `metal`, `cuda`, `rocm`)"),
        ("Remote", "`remote`"),
    ];
    match features.into_iter().find(|(name, _)| device.contains(name)) {
        Some((_, feature)) => {
            format!("bitnet-burn was built without its feature {feature}, which the device {device} needs")
        }
        None => format!(
            "bitnet-burn has no operations for the device {device}; use Flex, NdArray or a GPU of CubeCL's"
        ),
    }
}

/// Whether a device is on a worker.
pub fn is_remote(device: &Device) -> bool {
    #[cfg(feature = "remote")]
    return crate::remote::address(device).is_some();
    #[cfg(not(feature = "remote"))]
    {
        let _ = device;
        false
    }
}

/// The values of a tensor. What went wrong on its device while it was computed shows here.
///
/// # Errors
/// That, in words; of a worker, also that it ended, or gave no sign of life for too long.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<TensorData, String> {
    #[cfg(feature = "remote")]
    if let Some(data) = crate::remote::read(&tensor) {
        return data;
    }
    tensor.try_into_data().map_err(|error| error.to_string())
}

/// A GPU, tried out: runtimes panic where there is none.
///
/// # Errors
/// What it said, in words.
pub fn tried(open: impl FnOnce() -> Device) -> Result<Device, String> {
    catching_panics(|| {
        let device = open();
        let data = burn::tensor::Tensor::<1>::ones([1], &device).try_into_data();
        data.map(|_| device).map_err(|error| error.to_string())
    })
    .and_then(|device| device)
}

/// Without a word on stderr, and with what a panic said as an error: runtimes of GPUs panic where others return an error,
/// some of them on threads of their own. Other threads' panics are told as ever.
///
/// # Errors
/// What the panic said.
pub fn catching_panics<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
    thread_local! {
        static DEPTH: Cell<usize> = const { Cell::new(0) };
    }
    static ANYWHERE: AtomicUsize = AtomicUsize::new(0);
    // One hook for good: hooks are the process's, and swapping them would be everybody's concern.
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            let here = DEPTH.try_with(Cell::get).is_ok_and(|depth| depth > 0);
            let runtimes =
                || ANYWHERE.load(Ordering::Relaxed) > 0 && is_runtimes(std::thread::current().name());
            if !here && !runtimes() {
                before(info);
            }
        }));
    });
    DEPTH.set(DEPTH.get() + 1);
    ANYWHERE.fetch_add(1, Ordering::Relaxed);
    let result = catch_unwind(AssertUnwindSafe(run));
    ANYWHERE.fetch_sub(1, Ordering::Relaxed);
    DEPTH.set(DEPTH.get() - 1);
    result.map_err(|payload| {
        payload
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| payload.downcast_ref::<&str>().map(|&s| s.to_owned()))
            .unwrap_or_else(|| "unknown error".into())
    })
}

/// Whether a thread is one that CubeCL serves a device on: `DSU-0-0`, `DSD-3-0`.
fn is_runtimes(thread: Option<&str>) -> bool {
    thread.is_some_and(|name| name.starts_with("DSU-") || name.starts_with("DSD-"))
}

/// The devices of a runtime, in the order of their numbers.
fn of_runtime(runtime: &str) -> Result<Vec<Device>, String> {
    #[cfg(feature = "cube")]
    use burn::tensor::DeviceType;
    match runtime {
        #[cfg(feature = "wgpu")]
        "wgpu" => catching_panics(|| Device::enumerate(DeviceType::Wgpu).into_iter().collect()),
        #[cfg(feature = "metal")]
        "metal" => catching_panics(|| Device::enumerate(DeviceType::Metal).into_iter().collect()),
        #[cfg(feature = "cuda")]
        "cuda" => catching_panics(|| Device::enumerate(DeviceType::Cuda).into_iter().collect()),
        #[cfg(feature = "rocm")]
        "rocm" => catching_panics(|| Device::enumerate(DeviceType::Rocm).into_iter().collect()),
        _ => Ok(Vec::new()),
    }
}

#[cfg(feature = "cube")]
pub(crate) use found::{client, cube};

#[cfg(feature = "cube")]
mod found {
    use burn::backend::DispatchDevice;
    use burn::tensor::{DType, Device};
    use burn_cubecl::{CubeDevice, cubecl};
    use cubecl::MemoryScope;
    use cubecl::client::Client;
    use cubecl::ir::{ElemType, FloatKind};
    use cubecl::std::throughput::measure_peak_throughput;
    use cubecl::throughput::{MemoryAccess, ThroughputKey, ThroughputMode};

    use super::{GpuInfo, Usage, catching_panics, lacking, of_runtime, runtimes};

    pub fn gpus() -> (Vec<GpuInfo>, Vec<String>) {
        let (mut gpus, mut problems) = (Vec::new(), Vec::new());
        for runtime in runtimes().into_iter().filter(|runtime| lacking(runtime).is_none()) {
            let devices = of_runtime(runtime).unwrap_or_else(|problem| {
                problems.push(format!("{runtime} could not be asked for its devices: {problem}"));
                Vec::new()
            });
            for (index, device) in devices.into_iter().enumerate() {
                let id = format!("{runtime}:{index}");
                match catching_panics(|| info(id.clone(), &device)) {
                    Ok(Some(gpu)) => gpus.push(gpu),
                    Ok(None) => {}
                    Err(problem) => problems.push(format!("{id} could not be asked: {problem}")),
                }
            }
        }
        (gpus, problems)
    }

    /// The device as CubeCL has it, if it is one of its own.
    pub fn cube(device: &Device) -> Option<CubeDevice> {
        match device.clone().without_autodiff().as_dispatch() {
            DispatchDevice::Cube(device) => Some(device.clone()),
            #[allow(unreachable_patterns, reason = "with no other backend")]
            _ => None,
        }
    }

    /// What such a device is reached by.
    pub fn client(device: &Device) -> Option<Client> {
        cube(device).map(|device| device.client())
    }

    fn info(id: String, device: &Device) -> Option<GpuInfo> {
        let client = client(device)?;
        let properties = client.properties();
        let features = [
            ("plane", !properties.features.plane.is_empty()),
            ("matrix units", !properties.features.matmul.cmma.is_empty()),
        ];
        let types = [("f32", DType::F32), ("f16", DType::F16), ("bf16", DType::BF16), ("i8", DType::I8)];
        let supported = |dtype: DType| device.supports_dtype(dtype);
        let physical = &properties.identity.physical;
        Some(GpuInfo {
            id,
            name: properties.identity.name.clone(),
            runtime: client.name().to_owned(),
            software: physical.is_none(),
            memory_bytes: properties.memory.max_memory(),
            max_allocation_bytes: properties.memory.max_page_size,
            features: features.into_iter().filter(|f| f.1).map(|f| f.0.to_owned()).collect(),
            precisions: types.into_iter().filter(|t| supported(t.1)).map(|t| t.0.to_owned()).collect(),
            device: device.clone(),
        })
    }

    pub fn usage(device: &Device) -> Option<Usage> {
        let client = client(device)?;
        let usage = catching_panics(|| client.memory_report(MemoryScope::Device).usage()).ok()?;
        Some(Usage {
            in_use_bytes: usage.bytes_in_use,
            padding_bytes: usage.bytes_padding,
            reserved_bytes: usage.bytes_reserved,
        })
    }

    pub fn peak(device: &Device) -> (Option<f64>, Option<f64>) {
        let Some(client) = client(device) else { return (None, None) };
        let g_per_s = |mode: ThroughputMode| {
            let key = ThroughputKey { mode };
            let value = catching_panics(|| measure_peak_throughput(&client, key)).ok()?.ok()?;
            let rate = match mode {
                ThroughputMode::Memory(_) => value.bytes_per_s(&key),
                // CubeCL counts a multiplication and an addition as two.
                _ => value.ops_per_s() / 2.0,
            };
            (rate.is_finite() && rate > 0.0).then_some(rate / 1e9)
        };
        let float = ElemType::Float(FloatKind::F32);
        (
            g_per_s(ThroughputMode::memory(MemoryAccess::Read)),
            g_per_s(ThroughputMode::ComputeDirect { dtype: float }),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_built_in_is_named() {
        let why = |device: &str| of_missing(device);
        assert!(why("NdArray(Cpu)").contains("its feature `ndarray`"));
        assert!(why("Cube(Wgpu)").contains("its feature `wgpu` (or `metal`, `cuda`, `rocm`)"));
        assert!(why("LibTorch(Cpu)").contains("no operations for the device LibTorch(Cpu)"));
        #[cfg(feature = "flex")]
        assert_eq!(unsupported(&Device::flex()), None);
    }

    #[test]
    fn what_panics_quietly_is_an_error_wherever_it_is() {
        let nested = catching_panics(|| {
            (catching_panics(|| panic!("inner {}", 1)).map(|()| 0), catching_panics(|| 2))
        });
        assert_eq!(nested, Ok((Err("inner 1".into()), Ok(2))));
        assert_eq!(catching_panics(|| panic!("outer")).map(|()| 0), Err("outer".into()));
        let others = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..4).map(|i| scope.spawn(move || catching_panics(|| panic!("{i}")).map(|()| 0))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(others, ["0", "1", "2", "3"].map(|problem| Err(problem.to_owned())));
        assert!(is_runtimes(Some("DSU-0-0")) && !is_runtimes(Some("main")) && !is_runtimes(None));
    }
}
