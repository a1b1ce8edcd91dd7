//! Which kernels of plugins multiply by the weights of one shape on one device: those that are faster than the
//! operation's default body, measured there.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use bitnet_burn_formats::canonical;
use bitnet_burn_manager::plugin::Target;
use bitnet_burn_manager::{BUCKETS, GpuKernel, KernelManager, ManagerError, Packed, bucket, checksum};
use burn_cubecl::CubeDevice;
use burn_cubecl::cubecl::client::Client;
use burn_cubecl::tensor::CubeTensor;

use super::contest::GpuContest;
use super::launch;

/// A kernel, or the operation's default body.
pub(super) type Candidate = Option<GpuKernel>;

/// What was chosen for weights [n, k] on a device.
#[derive(Debug)]
pub struct GpuKernels {
    device: CubeDevice,
    n: usize,
    k: usize,
    /// A kernel that packs the weights into the private layout that they are in; `None` for canonical ones.
    packer: Option<GpuKernel>,
    /// The kernels that a call asks, the fastest first, by bucket of rows.
    orders: [OnceLock<Vec<Candidate>>; BUCKETS.len()],
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
    /// Checksum of the canonical weights, taken before a kernel computed with them.
    pub(super) checksum: OnceLock<u64>,
    /// The kernel that wrote into the weights: nothing may compute with them.
    pub(super) damaged: OnceLock<String>,
}

impl GpuMatrix {
    fn new(choice: Arc<GpuKernels>) -> Self {
        let (canonical, checksum, damaged) = Default::default();
        Self { choice, canonical, checksum, damaged }
    }

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
        let matrix = GpuMatrix::new(choice);
        matrix.checksum.get_or_init(|| checksum(weights));
        return Ok(Some((matrix, packed)));
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
    Some(GpuMatrix::new(choice))
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

/// `None` if the default body is the fastest, for decode and for prompts.
fn decide(manager: &KernelManager, device: &CubeDevice, n: usize, k: usize) -> Option<GpuKernels> {
    // Some are for decode alone, some for prompts.
    let mut kernels = [1, 32].into_iter().flat_map(|m| self::kernels(manager, device, m, n, k)).peekable();
    if kernels.peek().is_none() || k > 1 << 23 {
        return None;
    }
    let packer = if manager.config().force.is_some() {
        kernels.next().filter(|kernel| kernel.kernel().layout().is_some())
    } else {
        let contest = GpuContest { manager, device, n, k };
        if [1, 32].into_iter().all(|m| contest.fastest(m)[0].is_none()) {
            return None;
        }
        manager.packer_in(&contest).flatten()
    };
    Some(GpuKernels {
        device: device.clone(),
        n,
        k,
        packer,
        orders: Default::default(),
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
        let order = self.orders[bucket(m)].get_or_init(|| self.order(manager, BUCKETS[bucket(m)].1));
        let failed = lock(&self.failed);
        let may = |kernel: &GpuKernel| {
            kernel.ready()
                && !failed.contains(kernel)
                && kernel.supports(m, self.n, self.k)
                && kernel.kernel().gpu().is_some_and(|source| launch::fits(client, source, m, self.n))
        };
        order.iter().find(|kernel| kernel.as_ref().is_none_or(may)).cloned().flatten()
    }

    /// The candidates that read the weights as they are, the fastest first.
    fn order(&self, manager: &KernelManager, m: usize) -> Vec<Candidate> {
        let layout = self.packer.as_ref().and_then(|packer| packer.kernel().layout());
        let reads = |kernel: &GpuKernel| {
            kernel.kernel().layout() == layout
                && kernel.weight_bytes(self.n, self.k) == Some(self.weight_bytes())
        };
        if manager.config().force.is_some() {
            let forced = kernels(manager, &self.device, m, self.n, self.k);
            return forced.into_iter().filter(reads).map(Some).collect();
        }
        let contest = GpuContest { manager, device: &self.device, n: self.n, k: self.k };
        // The default body reads canonical weights: from a private layout they would be unpacked.
        let reads = |kernel: &Candidate| kernel.as_ref().map_or(layout.is_none(), reads);
        contest.fastest(m).into_iter().filter(reads).collect()
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
