//! Which kernels of plugins multiply by the weights of one shape on one device: those that are faster than the
//! operation's default body, measured there.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use bitnet_burn_formats::canonical;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_manager::memory::PageBuffer;
use bitnet_burn_manager::plugin::Target;
use bitnet_burn_manager::{
    BUCKETS, DEFAULT_BODY, GpuKernel, KernelManager, ManagerError, Measurement, Packed, bucket,
};
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice, cubecl};
use cubecl::client::Client;
use cubecl::server::Handle;

use super::body::{self, Input, Part};
use super::launch;
use crate::default;
use crate::extension::{BitLinearArgs, InputNorm, Matrix, TernaryWeight, TernaryWeights};

/// Runs before the clock counts, and counted runs at most.
const WARM_UP: usize = 2;
const RUNS: usize = 20;
/// Time for one signature, whatever its size.
const SIGNATURE_BUDGET: Duration = Duration::from_millis(600);
/// What was so many times slower than the fastest for fewer rows is not tried for more.
const HOPELESS: f64 = 4.0;
/// A layout that is this close in decode speed counts as equal, and prefill decides.
const SLACK: f64 = 1.05;
/// Decode reads its weights from memory, not from a cache: measured with copies that take turns, up to so many bytes.
const ROTATED: usize = 64 << 20;
const MOST_COPIES: usize = 64;

/// A kernel, or the operation's default body.
type Candidate = Option<GpuKernel>;

/// What was chosen for weights [n, k] on a device.
#[derive(Debug)]
pub struct GpuKernels {
    device: CubeDevice,
    n: usize,
    k: usize,
    /// A kernel that packs the weights into the private layout that they are in; `None` for canonical ones.
    packer: Option<GpuKernel>,
    /// By bucket of rows, the fastest first.
    rankings: [OnceLock<Vec<Candidate>>; BUCKETS.len()],
    /// The kernels that have failed here.
    failed: Mutex<Vec<GpuKernel>>,
    /// Kernels and exact numbers of rows whose results were compared.
    seen: Mutex<HashSet<(GpuKernel, usize)>>,
}

/// How the weights of one matrix are kept on a GPU, and who computes with them.
#[derive(Debug)]
pub struct GpuMatrix {
    pub(super) choice: Arc<GpuKernels>,
    /// The weights' canonical words, once something needs them that does not read the private layout.
    pub(super) canonical: OnceLock<CubeTensor>,
}

impl GpuMatrix {
    /// Private layout (`plugin/layout`) that the weights are packed in, or `None` for canonical.
    pub fn layout(&self) -> Option<&str> {
        self.choice.packer.as_ref().and_then(|kernel| kernel.kernel().layout())
    }

    /// Bytes of the weights in that layout, with what the manager keeps behind them.
    pub fn weight_bytes(&self) -> usize {
        self.choice.weight_bytes()
    }

    /// The canonical form of the weights.
    ///
    /// # Errors
    /// If the kernel that packed them can't unpack them.
    pub fn unpack(&self, manager: &KernelManager, packed: &[u8]) -> Result<Vec<u8>, ManagerError> {
        let GpuKernels { n, k, packer, .. } = &*self.choice;
        match packer {
            None => Ok(packed.to_vec()),
            Some(packer) => manager.unpack_for_gpu(packer, *n, *k, packed),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Chooses kernels for weights [n, k] on a device and packs them; `None` where only the default body computes.
///
/// # Errors
/// If memory is short.
pub(crate) fn choose_and_pack(
    manager: &KernelManager,
    device: &CubeDevice,
    n: usize,
    k: usize,
    weights: &[u8],
) -> Result<Option<(GpuMatrix, Packed)>, ManagerError> {
    loop {
        let Some(choice) = choose(manager, device, (n, k), false) else { return Ok(None) };
        let packed = match &choice.packer {
            None => Packed::Canonical,
            Some(packer) => match manager.pack_for_gpu(packer, n, k, weights) {
                Ok(packed) => Packed::Private(packed),
                // Out for good, and every turn takes one out.
                Err(_) if !packer.ready() => continue,
                Err(error) => return Err(error),
            },
        };
        return Ok(Some((GpuMatrix { choice, canonical: OnceLock::new() }, packed)));
    }
}

/// The choices of this process, by manager, device, shape, and whether the weights have to stay canonical.
type Choices = HashMap<(usize, CubeDevice, usize, usize, bool), Option<Arc<GpuKernels>>>;

static CHOICES: Mutex<Option<Choices>> = Mutex::new(None);

fn choose(
    manager: &KernelManager,
    device: &CubeDevice,
    (n, k): (usize, usize),
    canonical: bool,
) -> Option<Arc<GpuKernels>> {
    let key = (std::ptr::from_ref(manager) as usize, device.clone(), n, k, canonical);
    if let Some(known) = lock(&CHOICES).get_or_insert_default().get(&key)
        && known.as_ref().and_then(|choice| choice.packer.as_ref()).is_none_or(GpuKernel::ready)
    {
        return known.clone();
    }
    let mut choice = decide(manager, device, n, k);
    if let Some(choice) = choice.as_mut().filter(|_| canonical) {
        choice.packer = None;
    }
    let choice = choice.map(Arc::new);
    // Without a measurement it is not known that nothing is faster than the default body.
    if choice.is_some() || manager.may_tune() {
        lock(&CHOICES).get_or_insert_default().insert(key, choice.clone());
    }
    choice
}

/// The kernels for canonical weights [n, k], whose kernels are chosen at the first use; `None` where the default body is
/// the fastest.
pub(super) fn canonical(
    manager: &KernelManager,
    device: &CubeDevice,
    n: usize,
    k: usize,
) -> Option<GpuMatrix> {
    let choice = choose(manager, device, (n, k), true)?;
    Some(GpuMatrix { choice, canonical: OnceLock::new() })
}

/// The kernels that can compute m rows of [n, k] on the device.
pub(super) fn kernels(
    manager: &KernelManager,
    device: &CubeDevice,
    m: usize,
    n: usize,
    k: usize,
) -> Vec<GpuKernel> {
    let client = device.client();
    let targets = [Some(Target::CubeCl), launch::target(&client)];
    let of = |target| manager.gpu_kernels(target, (m, n, k));
    let mut kernels: Vec<GpuKernel> = targets.into_iter().flatten().flat_map(of).collect();
    kernels.retain(|kernel| {
        kernel.kernel().gpu().is_some_and(|source| {
            launch::lacking(&client, source, kernel.kernel().features()).is_none()
                && launch::fits(&client, source, m, n)
        })
    });
    kernels
}

/// Which layout: by decode speed, then prefill speed, then memory. `None` if the default body is the fastest for both.
fn decide(manager: &KernelManager, device: &CubeDevice, n: usize, k: usize) -> Option<GpuKernels> {
    // Some are for decode alone, some for prompts.
    let mut kernels = self::kernels(manager, device, 1, n, k);
    for kernel in self::kernels(manager, device, 32, n, k) {
        if !kernels.contains(&kernel) {
            kernels.push(kernel);
        }
    }
    if kernels.is_empty() || k > 1 << 23 {
        return None;
    }
    let layout = |kernel: &Candidate| kernel.as_ref().and_then(|k| k.kernel().layout().map(str::to_owned));
    let packer = if manager.config().force.is_some() {
        kernels.into_iter().next()
    } else {
        let rankings = [1, 32].map(|m| measured(manager, device, m, n, k));
        let [decode, prefill] = rankings.each_ref().map(|ranking| {
            let best = ranking.iter().filter_map(|(_, ns)| *ns).min().unwrap_or(u64::MAX);
            (ranking, best as f64 * SLACK)
        });
        if decode.0.first().is_none_or(|(kernel, _)| kernel.is_none())
            && prefill.0.first().is_none_or(|(kernel, _)| kernel.is_none())
        {
            return None;
        }
        let time = |ranking: &Measured, of: &Option<String>| {
            let times = ranking.iter().filter(|(kernel, _)| layout(kernel) == *of).filter_map(|(_, ns)| *ns);
            times.min().unwrap_or(u64::MAX) as f64
        };
        let mut layouts: Vec<Option<String>> = decode.0.iter().map(|(kernel, _)| layout(kernel)).collect();
        layouts.sort();
        layouts.dedup();
        for (ranking, most) in [decode, prefill] {
            if layouts.iter().any(|l| time(ranking, l) <= most) {
                layouts.retain(|l| time(ranking, l) <= most);
            }
        }
        let bytes = |kernel: &GpuKernel| kernel.weight_bytes(n, k).unwrap_or(usize::MAX);
        let of_layouts =
            kernels.into_iter().filter(|kernel| layouts.contains(&layout(&Some(kernel.clone()))));
        if layouts.contains(&None) { None } else { of_layouts.min_by_key(bytes) }
    };
    Some(GpuKernels {
        device: device.clone(),
        n,
        k,
        packer: packer.filter(|kernel| kernel.kernel().layout().is_some()),
        rankings: Default::default(),
        failed: Mutex::default(),
        seen: Mutex::default(),
    })
}

impl GpuKernels {
    fn weight_bytes(&self) -> usize {
        match &self.packer {
            Some(packer) => packer.weight_bytes(self.n, self.k).expect("checked when chosen"),
            None => self.n * canonical::row_bytes(self.k),
        }
    }

    /// The kernel for m rows on the client of the device; `None` for the default body.
    pub(super) fn kernel(&self, manager: &KernelManager, client: &Client, m: usize) -> Candidate {
        let ranking = self.rankings[bucket(m)].get_or_init(|| self.rank(manager, BUCKETS[bucket(m)].1));
        let failed = lock(&self.failed);
        let may = |kernel: &GpuKernel| {
            kernel.ready()
                && !failed.contains(kernel)
                && kernel.supports(m, self.n, self.k)
                && kernel.kernel().gpu().is_some_and(|source| launch::fits(client, source, m, self.n))
        };
        ranking.iter().find(|kernel| kernel.as_ref().is_none_or(may)).cloned().flatten()
    }

    /// The candidates that read the weights as they are, the fastest first.
    fn rank(&self, manager: &KernelManager, m: usize) -> Vec<Candidate> {
        let layout = self.packer.as_ref().and_then(|packer| packer.kernel().layout());
        let reads = |kernel: &GpuKernel| {
            kernel.kernel().layout() == layout
                && kernel.weight_bytes(self.n, self.k) == Some(self.weight_bytes())
        };
        if manager.config().force.is_some() {
            let forced = kernels(manager, &self.device, m, self.n, self.k);
            return forced.into_iter().filter(reads).map(Some).collect();
        }
        let ranking =
            measured(manager, &self.device, m, self.n, self.k).into_iter().map(|(kernel, _)| kernel);
        // The default body reads canonical weights: from a private layout they would be unpacked.
        ranking.filter(|kernel| kernel.as_ref().map_or(layout.is_none(), reads)).collect()
    }

    /// Keeps a kernel that failed from computing with such weights.
    pub(super) fn fail(&self, kernel: &GpuKernel) {
        lock(&self.failed).push(kernel.clone());
    }

    /// Whether a kernel's result for m rows was compared.
    pub(super) fn knows(&self, kernel: &GpuKernel, m: usize) -> bool {
        lock(&self.seen).contains(&(kernel.clone(), m))
    }

    pub(super) fn learn(&self, kernel: &GpuKernel, m: usize) {
        lock(&self.seen).insert((kernel.clone(), m));
    }
}

/// Candidates with their median times in nanoseconds, the fastest first. What was not measured is not in it.
type Measured = Vec<(Candidate, Option<u64>)>;

/// The candidates for a bucket's rows of [n, k] on a device: measured, or remembered.
fn measured(manager: &KernelManager, device: &CubeDevice, m: usize, n: usize, k: usize) -> Measured {
    // One measurement at a time: two would measure each other.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = lock(&TURN);
    measured_in_turn(manager, device, m, n, k)
}

fn measured_in_turn(manager: &KernelManager, device: &CubeDevice, m: usize, n: usize, k: usize) -> Measured {
    let kernels = kernels(manager, device, m, n, k);
    let client = device.client();
    let signature =
        format!("ternary m={m} n={n} k={k} device={} {}", client.name(), client.properties().identity.name);
    let measurements = match manager.remembered(&signature, &kernels) {
        Some(known) => known,
        None if manager.may_tune() => {
            // What is known for fewer rows tells what need not be tried for more.
            let fewer =
                (bucket(m) > 0).then(|| measured_in_turn(manager, device, BUCKETS[bucket(m) - 1].1, n, k));
            let started = Instant::now();
            let measurements = measure(manager, device, (m, n, k), &kernels, fewer.as_ref());
            tracing::info!(signature, elapsed = ?started.elapsed(), "tuned");
            manager.remember(signature, measurements.clone(), started.elapsed());
            measurements
        }
        // The budget is spent: as for fewer rows.
        None if bucket(m) > 0 => {
            let fewer = measured_in_turn(manager, device, BUCKETS[bucket(m) - 1].1, n, k);
            let may = |kernel: &GpuKernel| kernels.contains(kernel);
            return fewer.into_iter().filter(|(kernel, _)| kernel.as_ref().is_none_or(may)).collect();
        }
        None => Vec::new(),
    };
    let of = |name: &str| measurements.iter().find(|m| m.kernel == name).and_then(|m| m.median_ns);
    let mut ranking: Measured = kernels
        .into_iter()
        .filter(GpuKernel::ready)
        .map(|kernel| {
            let ns = of(&kernel.measurement().kernel);
            (Some(kernel), ns)
        })
        .filter(|(_, ns)| ns.is_some())
        .collect();
    ranking.push((None, of(DEFAULT_BODY)));
    // The default body was not measured where it was hopeless, and then comes last; or where nothing was, and
    // then it is alone.
    ranking.sort_by_key(|(_, ns)| ns.unwrap_or(u64::MAX));
    ranking
}

/// Accuracy before speed: compares every kernel with a built-in one of the CPU, then times them and the default body
/// in turn, each with the quantisation that it needs.
fn measure(
    manager: &KernelManager,
    device: &CubeDevice,
    (m, n, k): (usize, usize, usize),
    kernels: &[GpuKernel],
    fewer: Option<&Measured>,
) -> Vec<Measurement> {
    let client = device.client();
    let mut random = SplitMix64::new((n * 31 + k) as u64);
    let weights = random.weights(n, k);
    let x: Vec<f32> = (0..m * k).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
    let tensor = |bytes: &[u8], shape: Shape, dtype: DType| {
        CubeTensor::new_contiguous(
            client.clone(),
            device.clone(),
            shape,
            client.create_from_slice(bytes),
            dtype,
        )
    };
    let x = tensor(bytemuck::cast_slice(&x), Shape::new([m, k]), DType::F32);
    let input = Input::new(x.clone(), InputNorm::None, 0.0);
    let scale = tensor(bytemuck::cast_slice(&[SCALE]), Shape::new([1]), DType::F32);
    let copies = if m <= 4 { (ROTATED / weights.len().max(1)).clamp(1, MOST_COPIES) } else { 1 };
    let upload =
        |bytes: &[u8]| -> Vec<Handle> { (0..copies).map(|_| client.create_from_slice(bytes)).collect() };

    let slower = |kernel: &Candidate| {
        let best = fewer?.iter().filter_map(|(_, ns)| *ns).min()?;
        let (_, ns) = fewer?.iter().find(|(known, _)| known == kernel)?;
        let times = ns.map_or(f64::INFINITY, |ns| ns as f64 / best as f64);
        (times > HOPELESS).then(|| {
            let rows = BUCKETS[bucket(m) - 1].1;
            match times.is_finite() {
                true => format!("not tried: {times:.1} times slower than the best for {rows} rows"),
                false => "not tried: it was not for fewer rows".into(),
            }
        })
    };
    let mut measurements: Vec<Measurement> = Vec::new();
    let mut racing: Vec<(usize, Candidate, Vec<Handle>)> = Vec::new();
    for kernel in kernels.iter().cloned().map(Some).chain([None]) {
        let mut measurement = match &kernel {
            Some(kernel) => kernel.measurement(),
            None => Measurement {
                kernel: DEFAULT_BODY.into(),
                median_ns: None,
                min_ns: None,
                runs: 0,
                note: None,
                rejected: false,
            },
        };
        match slower(&kernel) {
            Some(note) => measurement.note = Some(note),
            None => match &kernel {
                None => racing.push((measurements.len(), None, upload(&weights))),
                Some(kernel) => {
                    let bytes = match kernel.kernel().layout() {
                        None => Ok(None),
                        Some(_) => manager.pack_for_gpu(kernel, n, k, &weights).map(Some),
                    };
                    let tried = bytes.and_then(|packed| {
                        let handles = upload(packed.as_ref().map_or(&weights[..], PageBuffer::as_slice));
                        let part = Part { kernel, weights: &handles[0], scale: &scale.handle, n };
                        Ok(body::run_checked(manager, &input, &part, (&weights, SCALE))?.map(|_| handles))
                    });
                    match tried {
                        Ok(Ok(handles)) if kernel.ready() => {
                            racing.push((measurements.len(), Some(kernel.clone()), handles));
                        }
                        Ok(Ok(_)) => measurement.note = Some("its results were wrong".into()),
                        Ok(Err(reason)) => measurement.note = Some(reason),
                        Err(error) => measurement.note = Some(error.to_string()),
                    }
                }
            },
        }
        measurements.push(measurement);
    }

    let args = BitLinearArgs { k, matrices: vec![Matrix { n, choice: None }], eps: 0.0, quantise: true };
    let mut times: Vec<Vec<u64>> = vec![Vec::new(); measurements.len()];
    let mut at_once = vec![1; measurements.len()];
    let started = Instant::now();
    for round in 0..WARM_UP + RUNS {
        if started.elapsed() > SIGNATURE_BUDGET && racing.iter().all(|(i, _, _)| !times[*i].is_empty()) {
            break;
        }
        // The first run compiles.
        let counted = round >= WARM_UP || (round > 0 && started.elapsed() > SIGNATURE_BUDGET / 4);
        for (i, kernel, copies) in &racing {
            let run = |weights: &Handle| match kernel {
                Some(kernel) => body::run(&input, &[Part { kernel, weights, scale: &scale.handle, n }]).0,
                None => {
                    let words = Shape::new([n, canonical::row_bytes(k) / 4]);
                    let codes = CubeTensor::new_contiguous(
                        client.clone(),
                        device.clone(),
                        words,
                        weights.clone(),
                        DType::U32,
                    );
                    let weight = TernaryWeight::<CubeBackend> { codes, scale: scale.clone() };
                    default::bit_linear(x.clone(), InputNorm::None, TernaryWeights::One(weight), &args)
                }
            };
            let repeats = at_once[*i];
            let clock = Instant::now();
            let mut y = run(&copies[round % copies.len()]);
            for repeat in 1..repeats {
                y = run(&copies[(round + repeat) % copies.len()]);
            }
            let result = cubecl::future::block_on(client.sync_buffers([&y.handle]));
            let elapsed = clock.elapsed().as_nanos() as u64 / repeats as u64;
            at_once[*i] = (WORTH_A_SYNC.as_nanos() as u64 / elapsed.max(1)).clamp(1, MOST_AT_ONCE) as usize;
            match result {
                Ok(()) if counted => times[*i].push(elapsed),
                Ok(()) => {}
                Err(error) => measurements[*i].note = Some(body::error_text(&error)),
            }
        }
        racing.retain(|(i, _, _)| measurements[*i].note.is_none());
    }
    for (measurement, times) in measurements.iter_mut().zip(&mut times) {
        times.sort_unstable();
        measurement.median_ns = times.get(times.len() / 2).copied();
        measurement.min_ns = times.first().copied();
        measurement.runs = times.len() as u32;
    }
    measurements
}

/// Waiting for a GPU takes longer than a small kernel: launches of so long in all are timed together, but so many at most.
const WORTH_A_SYNC: Duration = Duration::from_micros(500);
const MOST_AT_ONCE: u64 = 64;

/// Weights that kernels are measured with are codes times this.
pub(super) const SCALE: f32 = 0.021;
