//! The devices besides host memory that this build can compute on, as Burn finds them.

use std::sync::{Mutex, PoisonError};

use burn::tensor::Device;

/// A GPU, or what stands in for one.
#[derive(Clone, Debug)]
pub struct GpuInfo {
    /// What names it: `wgpu:0`, `cuda:1`. The number counts the devices of the runtime.
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

/// All GPUs of the runtimes that are compiled in, and what went wrong where one could not be asked. Opens every one of
/// them.
pub fn gpus() -> (Vec<GpuInfo>, Vec<String>) {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    return found::gpus();
    #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
    (Vec::new(), Vec::new())
}

/// The names of the runtimes that are compiled in: `wgpu`, `cuda`.
pub fn runtimes() -> Vec<&'static str> {
    let all = [("wgpu", cfg!(feature = "wgpu")), ("cuda", cfg!(feature = "cuda"))];
    all.into_iter().filter_map(|(name, compiled)| compiled.then_some(name)).collect()
}

/// What a GPU can do at most, measured by CubeCL's probes: bytes read, and f32 multiply-adds, in 10^9 a second.
/// `None` for what it has no probe for. Takes some seconds at the first time.
pub fn peak(device: &Device) -> (Option<f64>, Option<f64>) {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    return found::peak(device);
    #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
    {
        let _ = device;
        (None, None)
    }
}

/// The GPU of a name that [`GpuInfo::id`] has, tried out.
///
/// # Errors
/// In words, if it is not there or does not compute.
pub fn open(id: &str) -> Result<Device, String> {
    let all = of_runtime(id.split(':').next().unwrap_or_default());
    let index: Option<usize> = id.split_once(':').and_then(|(_, index)| index.parse().ok());
    match index {
        Some(index) => match all.get(index) {
            Some(device) => tried(|| device.clone()),
            None => Err(format!("there is no device {id}; there are {} of its kind", all.len())),
        },
        None => Err(format!("{id}: a GPU is named by its runtime and number, such as wgpu:0")),
    }
}

/// A GPU, tried out: runtimes panic where there is none.
///
/// # Errors
/// What it said, in words.
pub fn tried(open: impl FnOnce() -> Device) -> Result<Device, String> {
    quietly(|| {
        let device = open();
        let data = burn::tensor::Tensor::<1>::ones([1], &device).try_into_data();
        data.map(|_| device).map_err(|error| error.to_string())
    })
    .and_then(|device| device)
}

/// Without a word on stderr, and with what a panic said as an error: runtimes of GPUs panic where others return an error.
/// One at a time, and not from within another.
///
/// # Errors
/// What the panic said.
pub fn quietly<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
    // The hook is the process's.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let hook = take_hook();
    set_hook(Box::new(|_| ()));
    let result = catch_unwind(AssertUnwindSafe(run));
    set_hook(hook);
    result.map_err(|payload| {
        payload
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| payload.downcast_ref::<&str>().map(|&s| s.to_owned()))
            .unwrap_or_else(|| "unknown error".into())
    })
}

/// The devices of a runtime, in the order of their numbers.
fn of_runtime(runtime: &str) -> Vec<Device> {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    use burn::tensor::DeviceType;
    match runtime {
        #[cfg(feature = "wgpu")]
        "wgpu" => quietly(|| Device::enumerate(DeviceType::Wgpu).into_iter().collect()).unwrap_or_default(),
        #[cfg(feature = "cuda")]
        "cuda" => quietly(|| Device::enumerate(DeviceType::Cuda).into_iter().collect()).unwrap_or_default(),
        _ => Vec::new(),
    }
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod found {
    use burn::backend::DispatchDevice;
    use burn::tensor::{DType, Device};
    use burn_cubecl::cubecl;
    use cubecl::client::Client;
    use cubecl::ir::{ElemType, FloatKind};
    use cubecl::std::throughput::measure_peak_throughput;
    use cubecl::throughput::{MemoryAccess, ThroughputKey, ThroughputMode};

    use super::{GpuInfo, of_runtime, quietly, runtimes};

    pub fn gpus() -> (Vec<GpuInfo>, Vec<String>) {
        let (mut gpus, mut problems) = (Vec::new(), Vec::new());
        for runtime in runtimes() {
            for (index, device) in of_runtime(runtime).into_iter().enumerate() {
                let id = format!("{runtime}:{index}");
                match quietly(|| info(id.clone(), &device)) {
                    Ok(Some(gpu)) => gpus.push(gpu),
                    Ok(None) => {}
                    Err(problem) => problems.push(format!("{id} could not be asked: {problem}")),
                }
            }
        }
        (gpus, problems)
    }

    fn client(device: &Device) -> Option<Client> {
        match device.clone().without_autodiff().as_dispatch() {
            DispatchDevice::Cube(device) => Some(device.client()),
            #[allow(unreachable_patterns, reason = "with no other backend")]
            _ => None,
        }
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

    pub fn peak(device: &Device) -> (Option<f64>, Option<f64>) {
        let Some(client) = client(device) else { return (None, None) };
        let g_per_s = |mode: ThroughputMode| {
            let key = ThroughputKey { mode };
            let value = quietly(|| measure_peak_throughput(&client, key)).ok()?.ok()?;
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
