//! From a checkpoint to a model: devices, packed weights, the output projection, and the choice of kernels.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use bitnet_burn::ActivationRule;
use bitnet_burn::{
    BitBlock, BitLinear, BitNet, DenseMatrix, DenseMatrixError, FloatPart, ModelConfig, Norm, Projection,
    RmsNorm, Rotation, rms_norm,
};
use bitnet_burn_backends::manager::manager;
use bitnet_burn_backends::ops::{self, Packing, TernaryMatrix};
use bitnet_burn_backends::{MatrixKernels, devices};
use bitnet_burn_formats::{DenseFormat, DenseTensor, FileMap, FormatError};
use bitnet_burn_manager::{LayoutPolicy, ManagerError, ScaleKind};
use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};

use crate::adapter::Adapter;
use crate::checkpoint::{Checkpoint, LoadError, Rotated, Signs};
pub use crate::head::HeadMode;
use crate::prepack::Prepacked;
use crate::projection::{self, Ternary};

/// Why a model could not be made from a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The checkpoint.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The kernels.
    #[error(transparent)]
    Kernel(#[from] ManagerError),
    /// Devices for another number of layers.
    #[error("devices for {found} layers; the model has {expected}")]
    Devices {
        /// Layers that devices were given for.
        found: usize,
        /// Layers of the model.
        expected: usize,
    },
    /// Layers can't be where they were to be, and strict mode does not let them be elsewhere.
    #[error("strict mode (no-fallback): {layers} on GPUs failed ({problem})")]
    Placement {
        /// Layers on GPUs, in words.
        layers: String,
        /// What a GPU said.
        problem: String,
    },
    /// A projection that strict mode does not let be computed with f32 activations.
    #[error("strict mode (quantised-kernels): {tensor} ({}) would be computed with f32 activations: {reason}", format.name())]
    Dense {
        /// Its tensor.
        tensor: String,
        /// Its format.
        format: DenseFormat,
        /// Why.
        reason: String,
    },
    /// Activations can't be quantised by row.
    #[error(
        "{tensor} has a scale for each {group} weights of a row, so that activations need a scale for each group, too; use \
         activations `group:{group}`"
    )]
    Row {
        /// Its tensor.
        tensor: String,
        /// Weights that share a scale.
        group: usize,
    },
    /// Scales of a shape that no matrix has.
    #[error(transparent)]
    Scales(FormatError),
    /// A worker that layers were to be on failed.
    #[error("the model can't be where it was to be: {problem}")]
    Worker {
        /// What it, or the connection to it, said.
        problem: String,
    },
    /// The output projection can't be computed as asked.
    #[error("the output projection {0}")]
    Head(#[from] DenseMatrixError),
}

/// The devices of a model's parts. Layers of one device follow each other best: rows move wherever two differ.
#[derive(Clone, Debug)]
pub struct ModelDevices {
    /// One for each layer; its KV cache is there, too.
    pub layers: Vec<Device>,
    /// Of the embedding, the last norm and the output projection.
    pub dense: Device,
}

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// How activations are quantised. ([`Checkpoint::activations`]: what the files declare.)
    pub activations: ActivationRule,
    /// Rows of the largest forward pass: kernels are measured for up to this many.
    pub max_rows: usize,
    /// How the output projection (lm_head) is computed.
    pub head: HeadMode,
    /// Whether weights that were [packed before](crate::prepack) are taken from the file beside the model.
    pub prepacked: bool,
    /// Whether projections in host memory whose rows can be read where they lie in a mapped file compute with those, by
    /// kernels that nobody measured, until [`Loaded::packings`] has run. Results are the same bits before and after.
    pub in_place: bool,
    /// What is added to the outputs of projections.
    pub adapter: Option<Arc<Adapter>>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            activations: ActivationRule::Model,
            max_rows: DEFAULT_CHUNK,
            head: HeadMode::File,
            prepacked: true,
            in_place: false,
            adapter: None,
        }
    }
}

/// Rows of a prompt that are computed at once, if nothing else is asked for.
pub const DEFAULT_CHUNK: usize = 256;

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadProgress {
    /// Measuring kernels on the shapes of the model: (done, all).
    Tuning(usize, usize),
    /// Packing layers: (done, all).
    Packing(usize, usize),
}

/// A model that was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// The model.
    pub model: BitNet,
    /// Matrices that were mapped from the file of [packed weights](crate::prepack) beside the checkpoint.
    pub prepacked: usize,
    /// What is left to pack, of projections that compute [in place](LoadOptions::in_place).
    pub packings: Packings,
}

/// Measurements and packings that a model can do without, and is faster with.
#[derive(Default)]
pub struct Packings {
    /// Each with the file that its rows are in.
    left: Vec<(Packing, FileMap)>,
    rows: usize,
}

impl fmt::Debug for Packings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packings").field("matrices", &self.len()).finish_non_exhaustive()
    }
}

/// How long packing waits for the first call of a model.
const PATIENCE: Duration = Duration::from_secs(1);

impl Packings {
    /// Number of matrices.
    pub fn len(&self) -> usize {
        self.left.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// Waits until the model has computed once, but at most a second: the first token comes sooner if all cores compute
    /// it. Then it measures kernels where that has not been done on this machine, and packs one matrix after the other, until
    /// all are packed, `stop` is set or nobody has the model. The file's pages of packed rows are given back.
    pub fn run(self, stop: &AtomicBool) {
        let waiting_since = Instant::now();
        let idle = |(packing, _): &(Packing, FileMap)| packing.is_needed() && !packing.has_computed();
        while self.left.last().is_some_and(idle)
            && waiting_since.elapsed() < PATIENCE
            && !stop.load(Ordering::Relaxed)
        {
            std::thread::sleep(Duration::from_millis(2));
        }
        for (packing, map) in self.left {
            if stop.load(Ordering::Relaxed) || !packing.is_needed() {
                return;
            }
            let ((n, k), codes) = (packing.shape(), packing.codes().clone());
            match packing.run(self.rows) {
                Ok(()) => map.release_part(&codes),
                Err(error) => {
                    tracing::warn!("a matrix [{n}, {k}] is read where it lies from now on: {error}");
                }
            }
        }
    }
}

/// Loads a checkpoint's model onto a device, with the kernels that are the fastest there. Weights that the
/// chosen kernels read as the file stores them stay in the memory map.
///
/// # Errors
/// If a tensor is missing or wrong, or a kernel refuses.
pub fn load(
    checkpoint: &Checkpoint,
    device: &Device,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<BitNet, ModelError> {
    let layers = vec![device.clone(); checkpoint.config().n_layers];
    let devices = ModelDevices { layers, dense: device.clone() };
    Ok(load_on(checkpoint, &devices, options, progress)?.model)
}

/// [`load`] with layers on several devices.
///
/// # Errors
/// As there, and if there is not one device for each layer.
pub fn load_on(
    checkpoint: &Checkpoint,
    devices: &ModelDevices,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded, ModelError> {
    let config = checkpoint.config().clone();
    if devices.layers.len() != config.n_layers {
        return Err(ModelError::Devices { found: devices.layers.len(), expected: config.n_layers });
    }
    let rule = checkpoint.activations(options.activations);
    let quantise = rule != ActivationRule::Float;
    let device = &devices.dense;
    let norm = |which: Norm| -> Result<RmsNorm, ModelError> {
        let device = which.layer().map_or(device, |layer| &devices.layers[layer]);
        Ok(rms_norm(checkpoint.norm(which)?, config.rms_norm_eps, device))
    };
    let host = devices.layers.iter().chain([device]).any(ops::is_host);
    let prepacked = match options.prepacked && quantise && host {
        true => Prepacked::beside(checkpoint).unwrap_or_else(|error| {
            tracing::warn!("packed weights are not used: {error}");
            None
        }),
        false => None,
    };
    let weights = |layer: usize, which: Projection| -> Result<BitLinear, ModelError> {
        let device = &devices.layers[layer];
        if let Some(prepacked) = prepacked.as_ref().filter(|_| ops::is_host(device))
            && let Some(packed) = prepacked.projection(layer, which, rule, device)?
        {
            return Ok(packed.into_layer(device));
        }
        projection::linear(checkpoint.weights(layer, which)?, rule, LayoutPolicy::Any, device)
    };
    let in_place = |layer: usize, which: Projection| -> Result<Option<_>, ModelError> {
        let device = &devices.layers[layer];
        if !options.in_place || prepacked.is_some() || !ops::is_host(device) {
            return Ok(None);
        }
        let weights = checkpoint.weights(layer, which)?;
        let Some((codes, scale, n, k)) = projection::with_one_scale(&weights, rule) else { return Ok(None) };
        let Some(map) = checkpoint.map_of(codes) else { return Ok(None) };
        let placed = TernaryMatrix::in_place(codes.clone(), scale, n, k, device);
        Ok(placed.map(|(matrix, packing)| (BitLinear::from_matrix(matrix), (packing, map))))
    };
    if quantise {
        let on_host = (0..config.n_layers).filter(|&layer| ops::is_host(&devices.layers[layer]));
        let is_in_place = |layer, which| Ok(in_place(layer, which)?.is_some());
        choose_kernels(&config, options.max_rows, on_host, is_in_place, weights, progress)?;
    }
    let mut packings = Packings { left: Vec::new(), rows: options.max_rows };
    let left = RefCell::new(&mut packings.left);
    let weights = |layer: usize, which: Projection| match in_place(layer, which)? {
        Some((layer, packing)) => {
            left.borrow_mut().push(packing);
            Ok(layer)
        }
        None => weights(layer, which),
    };
    // One rotation for each width, which all layers of a device share.
    let rotations: RefCell<Vec<(Signs, Device, Rotation)>> = RefCell::default();
    let rotation = |of: Rotated, device: &Device| {
        let signs = checkpoint.rotation(of)?;
        let mut known = rotations.borrow_mut();
        if let Some((.., rotation)) = known.iter().find(|(s, d, _)| *s == signs && d == device) {
            return Some(rotation.clone());
        }
        let rotation = Rotation::new(signs.signs.to_vec(), signs.block, device);
        known.push((signs, device.clone(), rotation.clone()));
        Some(rotation)
    };
    let linear = |layer: usize, which: Projection| -> Result<BitLinear, ModelError> {
        let linear = match rotation(Rotated::Projection(layer, which), &devices.layers[layer]) {
            Some(rotation) => weights(layer, which)?.with_rotation(rotation),
            None => weights(layer, which)?,
        };
        let linear = if which.has_bias(&config) {
            let bias = checkpoint.bias(layer, which)?;
            let bias = TensorData::new(bias, [linear.d_output()]);
            let bias = Tensor::<1>::from_data(bias, &devices.layers[layer]);
            linear.with_bias(Param::initialized(ParamId::new(), bias))
        } else {
            linear
        };
        Ok(match options.adapter.as_ref().and_then(|adapter| adapter.get(layer, which)) {
            Some(values) => linear.with_adapter(bitnet_burn::Adapter::new(values, &devices.layers[layer])),
            None => linear,
        })
    };
    let float = |layer: usize, which: FloatPart| -> Result<DenseMatrix, ModelError> {
        Ok(DenseMatrix::new(checkpoint.float_part(layer, which)?, &devices.layers[layer]))
    };
    // The head first: while it is copied its pages of the file take memory, too.
    let embedding = checkpoint.embedding()?;
    let output = checkpoint.output()?;
    for DenseTensor { name, data, .. } in [Some(&embedding), output.as_ref()].into_iter().flatten() {
        if devices::is_remote(device) && data.len() > devices::LARGEST_REMOTE {
            let problem = format!(
                "{name} has {} bytes, and a worker takes matrices of up to {}; leave embedding and output on this \
                 machine",
                data.len(),
                devices::LARGEST_REMOTE
            );
            return Err(ModelError::Worker { problem });
        }
    }
    // One matrix can be both, where rows can be looked up in what the head computes with.
    let head_rotation = rotation(Rotated::Output, device);
    let tied =
        output.is_none() && head_rotation.is_none() && options.head.format(&embedding) == embedding.format;
    // Where no activations are declared, a ternary head is computed like the other layers.
    let ternary_head = match quantise && projection::computes_head(checkpoint, options.head)? {
        true => {
            let packed = prepacked.as_ref().filter(|_| ops::is_host(device));
            match packed.map(|packed| packed.ternary_head(rule, device)).transpose()?.flatten() {
                Some(packed) => Some(packed.into_layer(device)),
                None => {
                    let stored = output.as_ref().unwrap_or(&embedding);
                    projection::ternary_head(stored, rule, device)?
                }
            }
        }
        false => None,
    };
    let (embedding, output) = match options.head.int8_format(&embedding) {
        _ if ternary_head.is_some() => {
            checkpoint.read_by_rows(&embedding);
            (DenseMatrix::new(embedding, device), ternary_head)
        }
        None if tied => (DenseMatrix::new(embedding, device), None),
        Some(format) if tied && !ops::reads_tiles(device) => {
            (DenseMatrix::int8(embedding, format, device)?, None)
        }
        _ => {
            let output = output.unwrap_or_else(|| embedding.clone());
            let tiles = prepacked.as_ref().filter(|_| ops::is_host(device));
            let output = head(output, options.head, tiles, device)?;
            checkpoint.read_by_rows(&embedding);
            (DenseMatrix::new(embedding, device), Some(BitLinear::dense(output)))
        }
    };
    let output = match (output, head_rotation) {
        (Some(output), Some(rotation)) => Some(output.with_rotation(rotation)),
        (output, _) => output,
    };
    checkpoint.release();
    let mut blocks = Vec::with_capacity(config.n_layers);
    for i in 0..config.n_layers {
        progress(LoadProgress::Packing(i, config.n_layers));
        blocks.push(BitBlock::assemble(&config, i, norm, linear, float)?);
        // What was packed is not needed in the file's form; what is read in place comes back.
        checkpoint.release();
    }
    progress(LoadProgress::Packing(config.n_layers, config.n_layers));
    let norm = norm(Norm::Output)?;
    let model = BitNet::assemble(config, quantise, embedding, blocks, norm, output)
        .with_embedding_rotation(rotation(Rotated::Embedding, device));
    Ok(Loaded { model, prepacked: prepacked.map_or(0, |prepacked| prepacked.used()), packings })
}

/// The output projection of a loaded model.
fn head(
    tensor: DenseTensor,
    mode: HeadMode,
    prepacked: Option<&Prepacked>,
    device: &Device,
) -> Result<DenseMatrix, ModelError> {
    let Some(format) = mode.int8_format(&tensor) else {
        return match mode.format(&tensor) {
            format if format == tensor.format => Ok(DenseMatrix::new(tensor, device)),
            format => Ok(DenseMatrix::converted(tensor, format, device)?),
        };
    };
    let tiles = prepacked.and_then(|prepacked| prepacked.head(format, (tensor.n, tensor.k)));
    Ok(DenseMatrix::int8_prepacked(tensor, format, tiles, device)?)
}

/// Measures the kernels on the shapes of the projections of these layers, where that has not been done on this machine. What
/// computes in place does not wait for it.
fn choose_kernels(
    config: &ModelConfig,
    max_rows: usize,
    layers: impl Iterator<Item = usize>,
    is_in_place: impl Fn(usize, Projection) -> Result<bool, ModelError>,
    linear: impl Fn(usize, Projection) -> Result<BitLinear, ModelError>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<(), ModelError> {
    let mut shapes: Vec<((usize, usize), usize, Projection)> = Vec::new();
    let all = layers
        .flat_map(|layer| Projection::of_layer(layer, config).into_iter().map(move |which| (layer, which)));
    for (layer, projection) in all {
        let shape = projection.shape(config);
        if shapes.iter().all(|(known, ..)| *known != shape) && !is_in_place(layer, projection)? {
            shapes.push((shape, layer, projection));
        }
    }
    if shapes.is_empty() {
        return Ok(());
    }
    for (i, &(_, layer, which)) in shapes.iter().enumerate() {
        progress(LoadProgress::Tuning(i, shapes.len()));
        let Some(matrix) = linear(layer, which)?.matrix() else { continue };
        if let Some(MatrixKernels::Host(choice)) = matrix.choice {
            manager().warm_up(&choice, max_rows);
        }
    }
    progress(LoadProgress::Tuning(shapes.len(), shapes.len()));
    Ok(())
}

/// Which scales a projection has, and which activations share one, with activations as the model declares; `None` for a
/// projection that is not ternary.
///
/// # Errors
/// If the weights can't be read.
pub fn scale_kind(
    checkpoint: &Checkpoint,
    layer: usize,
    which: Projection,
) -> Result<Option<ScaleKind>, LoadError> {
    let rule = checkpoint.activations(ActivationRule::Model);
    Ok(Ternary::of(checkpoint.weights(layer, which)?, rule).map(|weights| weights.shape().scales))
}

/// Drops the private packings of kernels, for when memory is short
/// ([`KernelManager::memory_is_low`](bitnet_burn_manager::KernelManager::memory_is_low)): the layers read
/// canonical weights from then on, where `checkpoint`, the one that the model was built from, has them.
/// Those of a GGUF file of type I2_S are in the memory map, and need no other memory; what the file has
/// in another form takes as much as its packing did. Results stay the same, bit for bit.
///
/// The number of bytes of the packings: 0 with a forced kernel, which stays with its own.
///
/// # Errors
/// If a tensor can't be read any more, or a kernel refuses. Layers before it have changed then, and the
/// model is whole.
pub fn release_packings(model: &mut BitNet, checkpoint: &Checkpoint) -> Result<usize, ModelError> {
    let mut released = 0;
    if manager().config().force.is_some() {
        return Ok(0);
    }
    for (i, block) in model.blocks.iter_mut().enumerate() {
        for (which, layer) in block.projections_mut() {
            let Some(matrix) = layer.matrix() else { continue };
            // What a GPU's memory holds, is not this memory.
            let Some(MatrixKernels::Host(choice)) = matrix.choice else { continue };
            let choice = choice.computing();
            if choice.layout().is_none() {
                continue;
            }
            if matrix.scales != ScaleKind::One {
                // Its fast kernels are those of the packing.
                continue;
            }
            let (weights, device) = (checkpoint.weights(i, which)?, matrix.codes.device());
            let rule = ActivationRule::Model;
            layer.weight = projection::linear(weights, rule, LayoutPolicy::Canonical, &device)?.weight;
            released += choice.weight_bytes();
        }
    }
    if released > 0 {
        tracing::info!(released, "private packings were dropped; weights are read as the file has them");
    }
    Ok(released)
}
