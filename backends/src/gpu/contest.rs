//! A GPU's kernels and the operation's default body in the manager's tuner.

use std::time::{Duration, Instant};

use bitnet_burn_formats::canonical;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_manager::ScaleKind;
use bitnet_burn_manager::memory::PageBuffer;
use bitnet_burn_manager::{Contest, DEFAULT_BODY, Inputs, KernelManager, Unfit};
use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl::server::Handle;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice, cubecl};

use super::body::{self, Input, Part};
use super::choice::{self, Candidate};
use crate::default;
use crate::extension::{BitLinearArgs, InputNorm, Matrix, TernaryWeight, WeightGroup};

/// Decode reads its weights from memory, not from a cache: measured with copies that take turns, of this many bytes in
/// all and this many at most.
const ROTATED: usize = 64 << 20;
const MOST_COPIES: usize = 64;
/// Waiting for a GPU takes longer than a small kernel: launches that take this long in all are timed together, but this
/// many at most.
const WORTH_A_SYNC: Duration = Duration::from_micros(500);
const MOST_AT_ONCE: u64 = 64;

/// Weights that kernels are measured with are codes times this.
pub(super) const SCALE: f32 = 0.021;

/// The kernels for weights [n, k] on a device, and the default body.
pub(super) struct GpuContest<'a> {
    pub manager: &'a KernelManager,
    pub device: &'a CubeDevice,
    pub n: usize,
    pub k: usize,
}

impl GpuContest<'_> {
    /// The candidates for `m` rows, the fastest first. A kernel without a time is not among them: the default body is
    /// preferred to what was not measured.
    pub fn fastest(&self, m: usize) -> Vec<Candidate> {
        let kernels = self.manager.rank_in(self, m).kernels.into_iter();
        let timed = kernels.filter(|(kernel, known)| kernel.is_none() || known.median_ns.is_some());
        timed.map(|(kernel, _)| kernel).collect()
    }
}

impl Contest for GpuContest<'_> {
    type Kernel = Candidate;

    fn signature(&self, rows: usize) -> String {
        let (Self { n, k, .. }, client) = (self, self.device.client());
        let device = &client.properties().identity.name;
        format!("ternary m={rows} n={n} k={k} device={} {device}", client.name())
    }

    fn kernels(&self, rows: usize) -> Vec<Candidate> {
        let kernels = choice::kernels(self.manager, self.device, rows, self.n, self.k);
        kernels.into_iter().map(Some).chain([None]).collect()
    }

    fn name(&self, kernel: &Candidate) -> String {
        kernel.as_ref().map_or_else(|| DEFAULT_BODY.into(), |kernel| kernel.identity())
    }

    fn layout(&self, kernel: &Candidate) -> Option<(String, usize)> {
        let kernel = kernel.as_ref()?;
        Some((kernel.kernel().layout()?.to_owned(), kernel.weight_bytes(self.n, self.k).unwrap_or(0)))
    }

    /// A measurement compiles kernels, which is never cheap.
    fn prunes(&self, rows: usize) -> bool {
        rows > 1
    }

    fn ready(&self, kernel: &Candidate) -> bool {
        kernel.as_ref().is_none_or(|kernel| kernel.ready())
    }

    /// A kernel that was wrong is in quarantine, which does not come from the cache.
    fn reject(&self, _: &Candidate, _: String) {}

    fn inputs<'a>(&'a self, m: usize, kernels: &'a [Candidate]) -> Box<dyn Inputs + 'a> {
        let (n, k) = (self.n, self.k);
        let mut random = SplitMix64::new((n * 31 + k) as u64);
        let weights = random.weights(n, k);
        let x: Vec<f32> = (0..m * k).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
        let x = self.tensor(bytemuck::cast_slice(&x), Shape::new([m, k]));
        Box::new(GpuInputs {
            contest: self,
            kernels,
            input: Input::new(x, InputNorm::None, 0.0),
            scale: self.tensor(bytemuck::cast_slice(&[SCALE]), Shape::new([1])),
            copies: if m <= 4 { (ROTATED / weights.len().max(1)).clamp(1, MOST_COPIES) } else { 1 },
            weights,
            packed: vec![Vec::new(); kernels.len()],
            at_once: vec![1; kernels.len()],
        })
    }
}

impl GpuContest<'_> {
    fn tensor(&self, bytes: &[u8], shape: Shape) -> CubeTensor {
        let client = self.device.client();
        let handle = client.create_from_slice(bytes);
        CubeTensor::new_contiguous(client, self.device.clone(), shape, handle, DType::F32)
    }
}

struct GpuInputs<'a> {
    contest: &'a GpuContest<'a>,
    kernels: &'a [Candidate],
    input: Input,
    scale: CubeTensor,
    /// Canonical.
    weights: Vec<u8>,
    /// Copies of the weights in each layout.
    copies: usize,
    /// The weights as each kernel reads them.
    packed: Vec<Vec<Handle>>,
    /// Launches of each kernel that are timed together.
    at_once: Vec<u64>,
}

impl Inputs for GpuInputs<'_> {
    fn admit(&mut self, kernel: usize) -> Result<(), Unfit> {
        let unfit = |reason: String| Unfit { reason, rejected: false };
        let &GpuContest { manager, n, k, .. } = self.contest;
        let Some(candidate) = &self.kernels[kernel] else {
            self.packed[kernel] = self.upload(&self.weights);
            return Ok(());
        };
        let packed = match candidate.kernel().layout() {
            None => None,
            Some(_) => {
                let packed = manager.pack_for_gpu(candidate, n, k, &self.weights);
                Some(packed.map_err(|error| unfit(error.to_string()))?)
            }
        };
        let handles = self.upload(packed.as_ref().map_or(&self.weights[..], PageBuffer::as_slice));
        let part = Part { kernel: candidate, weights: &handles[0], scale: &self.scale.handle, n };
        body::run_checked(manager, &self.input, &part, (&self.weights, SCALE))
            .map_err(|error| unfit(error.to_string()))?
            .map_err(unfit)?;
        if !candidate.ready() {
            return Err(unfit("its results were wrong".into()));
        }
        self.packed[kernel] = handles;
        Ok(())
    }

    fn run(&mut self, kernel: usize, turn: usize) -> Result<u64, String> {
        let (copies, repeats) = (&self.packed[kernel], self.at_once[kernel] as usize);
        let clock = Instant::now();
        let mut y = self.launch(kernel, &copies[turn % copies.len()]);
        for repeat in 1..repeats {
            y = self.launch(kernel, &copies[(turn + repeat) % copies.len()]);
        }
        let result = cubecl::future::block_on(self.contest.device.client().sync_buffers([&y.handle]));
        let elapsed = clock.elapsed().as_nanos() as u64 / repeats as u64;
        self.at_once[kernel] = (WORTH_A_SYNC.as_nanos() as u64 / elapsed.max(1)).clamp(1, MOST_AT_ONCE);
        result.map(|()| elapsed).map_err(|error| body::error_text(&error))
    }
}

impl GpuInputs<'_> {
    fn upload(&self, bytes: &[u8]) -> Vec<Handle> {
        let client = self.contest.device.client();
        (0..self.copies).map(|_| client.create_from_slice(bytes)).collect()
    }

    /// The multiplication, with the quantisation of the activations.
    fn launch(&self, kernel: usize, weights: &Handle) -> CubeTensor {
        let &GpuContest { device, n, k, .. } = self.contest;
        match &self.kernels[kernel] {
            Some(kernel) => {
                body::run(&self.input, &[Part { kernel, weights, scale: &self.scale.handle, n }]).0
            }
            None => {
                let words = Shape::new([n, canonical::row_bytes(k) / 4]);
                let codes = CubeTensor::new_contiguous(
                    device.client(),
                    device.clone(),
                    words,
                    weights.clone(),
                    DType::U32,
                );
                let weight = TernaryWeight::<CubeBackend> { codes, scale: self.scale.clone() };
                let matrices = vec![Matrix { n, scales: ScaleKind::One, choice: None }];
                let args = BitLinearArgs { k, matrices, eps: 0.0, quantise: true };
                default::bit_linear(self.input.x().clone(), InputNorm::None, WeightGroup::One(weight), &args)
            }
        }
    }
}
