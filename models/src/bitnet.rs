//! BitNet b1.58 ("BitNet b1.58 2B4T Technical Report", arXiv 2504.12285): the whole model, from rows
//! of tokens to logits.
//!
//! ```text
//! x = embedding[token]
//! for each block:
//!     q, k, v = BitLinear(rms_norm(x))
//!     x += BitLinear(sub_norm(attention(rope(q), rope(k), v)))
//!     gate, up = BitLinear(rms_norm(x))
//!     x += BitLinear(sub_norm(relu(gate)^2 * up))
//! logits = lm_head(rms_norm(x))
//! ```
//!
//! The forward pass takes rows of (token, sequence, position): a chunk of a prompt, one token each of
//! several sequences, or both at once are the same code.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use bitnet_burn_backends::manager::manager;
use bitnet_burn_backends::ops::{self, DenseError, TernaryMatrix};
use bitnet_burn_backends::{DenseArgs, Kernels, NoInt8, devices};
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_manager::{LayoutPolicy, ManagerError};
use burn::module::{Module, Param, ParamId};
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, DenseTensor, LoadError, Norm, Projection};
use crate::config::{Activation, ModelConfig};
use crate::hf;
use crate::nn::{
    BitAttentionConfig, BitBlock, BitFeedForward, BitLinear, BitLinearWeight, CacheError, CacheType,
    DenseMatrix, DenseWeight, GatedActivation, KvCache, RotaryEncoding, RotaryEncodingConfig, SequenceId,
};
use crate::prepack::Prepacked;

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
    /// A worker that layers were to be on failed.
    #[error("the model can't be where it was to be: {problem}")]
    Worker {
        /// What it, or the connection to it, said.
        problem: String,
    },
    /// The output projection is of a type that [`HeadMode::Int8`] can't compute with.
    #[error("the output projection {tensor}: {source}")]
    Head {
        /// Its tensor.
        tensor: String,
        /// The type, and those that can.
        source: NoInt8,
    },
    /// The output projection can't be written in the form that [`HeadMode::Int8`] or
    /// [`HeadMode::Requantised`] asks for.
    #[error("the output projection {tensor} as {}: {source}", format.name())]
    Requantise {
        /// Its tensor.
        tensor: String,
        /// The format.
        format: DenseFormat,
        /// Why.
        source: DenseError,
    },
}

/// Why a forward pass failed.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The kernels.
    #[error(transparent)]
    Kernel(#[from] ManagerError),
    /// The KV cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A token that the vocabulary lacks.
    #[error("token {token} is not in the model's vocabulary of {vocabulary}")]
    Token {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// A device failed.
    #[error("a device failed: {0}")]
    Device(String),
    /// Rows that do not continue their sequences.
    #[error("row {row}: {problem}")]
    Rows {
        /// The row.
        row: usize,
        /// What is wrong.
        problem: String,
    },
}

/// One row of a forward pass: a token at the next position of its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Token id.
    pub token: u32,
    /// The sequence in the KV cache.
    pub sequence: SequenceId,
    /// Position in the sequence: its length in the cache, plus the rows before this one.
    pub position: usize,
}

/// Where attention finds the keys and values of earlier positions.
#[derive(Debug)]
pub enum History<'a> {
    /// In the KV cache, which the rows are appended to.
    Cache(&'a mut KvCache),
    /// Nowhere: the rows are whole sequences.
    None {
        /// Rows of each.
        length: usize,
    },
}

/// The rows of a forward pass, as layers see them.
#[derive(Debug)]
pub struct Batch {
    /// Runs of rows of one sequence, where there is a cache.
    pub(crate) sequences: Vec<SequenceRows>,
    /// The rows' positions; without a cache, one sequence's.
    positions: Vec<usize>,
    /// Their cosines and sines, on the device of the layer that computes.
    pub(crate) angles: (Tensor<2>, Tensor<2>),
    /// Whether activations are quantised.
    pub(crate) quantise: bool,
}

/// Consecutive rows of one sequence.
#[derive(Debug)]
pub(crate) struct SequenceRows {
    pub id: SequenceId,
    pub rows: Range<usize>,
    /// Of the first.
    pub position: usize,
}

/// The model.
#[derive(Module, Debug)]
pub struct BitNet {
    /// Token embedding [vocabulary, hidden], and lm_head where that is tied.
    pub embedding: DenseMatrix,
    /// The blocks.
    pub blocks: Vec<BitBlock>,
    /// The norm before the head.
    pub norm: RmsNorm,
    /// lm_head [vocabulary, hidden], where it is not tied.
    pub output: Option<DenseMatrix>,
    #[module(skip)]
    rotary: RotaryEncoding,
    #[module(skip)]
    config: ModelConfig,
    #[module(skip)]
    quantise: bool,
    #[module(skip)]
    prepacked: usize,
}

/// The devices of a model's parts. Layers of one device follow each other best: rows move wherever two differ.
#[derive(Clone, Debug)]
pub struct ModelDevices {
    /// One for each layer; its KV cache is there, too.
    pub layers: Vec<Device>,
    /// Of the embedding, the last norm and the output projection.
    pub dense: Device,
}

/// Gives the values of a parameter by its name and shape.
pub type ValuesOf<'a, E> = dyn FnMut(&str, &[usize]) -> Result<Vec<f32>, E> + 'a;

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Quantise activations to int8, as BitNet does. Without, the model is what a float reference
    /// computes, and slow.
    pub quantise_activations: bool,
    /// Rows of the largest forward pass: kernels are measured for up to this many.
    pub max_rows: usize,
    /// How the output projection (lm_head) is computed.
    pub head: HeadMode,
    /// Whether weights that were [packed before](crate::prepack) are taken from the file beside the model.
    pub prepacked: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { quantise_activations: true, max_rows: DEFAULT_CHUNK, head: HeadMode::File, prepacked: true }
    }
}

/// How the output projection (lm_head) is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadMode {
    /// f32 activations.
    #[default]
    File,
    /// Activations are quantised to int8, by absmax and row, as those of the ternary layers are: faster
    /// where the weights are Q6_K or Q4_0, and an approximation. (A logit changes by up to half a step,
    /// 1/254 of the largest activation, for each of its weights.) Weights of floats have no such mode. In host
    /// memory they are copied into the order in which the kernels read them; the embedding stays as it is.
    Int8,
    /// A copy of the weights in another format, made when the model is loaded: Q8_0, Q6_K or Q4_0 with int8
    /// activations as above, fewer bytes to read for every token, and a further approximation; F16, BF16 or F32 with
    /// f32 activations. The embedding stays as the file has it.
    Requantised(DenseFormat),
}

impl HeadMode {
    /// The format of the weights that int8 activations are multiplied by, where they are.
    pub fn int8_format(self, tensor: &DenseTensor) -> Option<DenseFormat> {
        match self {
            Self::File => None,
            Self::Int8 => Some(tensor.format),
            Self::Requantised(format) => Some(format).filter(|f| DenseArgs::INT8_FORMATS.contains(f)),
        }
    }

    /// The format that the weights are kept in.
    pub fn format(self, tensor: &DenseTensor) -> DenseFormat {
        match self {
            Self::File | Self::Int8 => tensor.format,
            Self::Requantised(format) => format,
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

impl BitNet {
    /// Builds the model on a device, with the kernels that are the fastest there. Weights that the
    /// chosen kernels read as the file stores them stay in the memory map.
    ///
    /// # Errors
    /// If a tensor is missing or wrong, or a kernel refuses.
    pub fn from_checkpoint(
        checkpoint: &Checkpoint,
        device: &Device,
        options: &LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let layers = vec![device.clone(); checkpoint.config().n_layers];
        Self::placed(checkpoint, &ModelDevices { layers, dense: device.clone() }, options, progress)
    }

    /// [`from_checkpoint`](Self::from_checkpoint) with layers on several devices.
    ///
    /// # Errors
    /// As there, and if there is not one device for each layer.
    pub fn placed(
        checkpoint: &Checkpoint,
        devices: &ModelDevices,
        options: &LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        if devices.layers.len() != config.n_layers {
            return Err(ModelError::Devices { found: devices.layers.len(), expected: config.n_layers });
        }
        if devices.layers.iter().any(ops::is_host) && options.quantise_activations {
            choose_kernels(&config, options.max_rows, progress)?;
        }
        let device = &devices.dense;
        let norm = |which: Norm| -> Result<RmsNorm, ModelError> {
            let device = which.layer().map_or(device, |layer| &devices.layers[layer]);
            Ok(rms_norm(checkpoint.norm(which)?, config.rms_norm_eps, device))
        };
        let host = devices.layers.iter().chain([device]).any(ops::is_host);
        let prepacked = match options.prepacked && options.quantise_activations && host {
            true => Prepacked::beside(checkpoint).unwrap_or_else(|error| {
                tracing::warn!("packed weights are not used: {error}");
                None
            }),
            false => None,
        };
        let linear = |layer: usize, which: Projection| -> Result<BitLinear, ModelError> {
            let device = &devices.layers[layer];
            if let Some(prepacked) = prepacked.as_ref().filter(|_| ops::is_host(device)) {
                let (n, k) = which.shape(&config);
                let choice = manager().choose(n, k, LayoutPolicy::Any)?;
                if let Some((packed, scale)) = prepacked.projection(layer, which, &choice) {
                    let matrix = TernaryMatrix::prepacked(choice, packed, scale, device);
                    return Ok(BitLinear::from_matrix(matrix));
                }
            }
            let t = checkpoint.projection(layer, which)?;
            let matrix = if options.quantise_activations {
                TernaryMatrix::prepared(t.codes, t.scale, t.n, t.k, device)?
            } else {
                TernaryMatrix::canonical(t.codes, t.scale, t.n, t.k, device)
            };
            Ok(BitLinear::from_matrix(matrix))
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
        let tied = output.is_none() && options.head.format(&embedding) == embedding.format;
        let (embedding, output) = match options.head.int8_format(&embedding) {
            None if tied => (DenseMatrix::new(embedding, device), None),
            Some(format) if tied && !ops::reads_tiles(device) => {
                (DenseMatrix::int8(embedding, format, device)?, None)
            }
            _ => {
                let output = output.unwrap_or_else(|| embedding.clone());
                let tiles = prepacked.as_ref().filter(|_| ops::is_host(device));
                let output = head(output, options.head, tiles, device)?;
                checkpoint.read_by_rows(&embedding);
                (DenseMatrix::new(embedding, device), Some(output))
            }
        };
        checkpoint.release();
        let mut blocks = Vec::with_capacity(config.n_layers);
        for i in 0..config.n_layers {
            progress(LoadProgress::Packing(i, config.n_layers));
            blocks.push(block(&config, i, norm, linear)?);
            // What was packed is not needed in the file's form; what is read in place comes back.
            checkpoint.release();
        }
        progress(LoadProgress::Packing(config.n_layers, config.n_layers));
        let norm = norm(Norm::Output)?;
        let model = Self::assemble(config, options.quantise_activations, embedding, blocks, norm, output);
        Ok(Self { prepacked: prepacked.map_or(0, |prepacked| prepacked.used()), ..model })
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
    pub fn release_packings(&mut self, checkpoint: &Checkpoint) -> Result<usize, ModelError> {
        let mut released = 0;
        if manager().config().force.is_some() {
            return Ok(0);
        }
        for (i, block) in self.blocks.iter_mut().enumerate() {
            for (which, layer) in Projection::ALL.into_iter().zip(block.projections_mut()) {
                let Some(matrix) = layer.matrix() else { continue };
                // What a GPU's memory holds, is not this memory.
                let Some(Kernels::Host(choice)) = matrix.choice else { continue };
                if choice.layout().is_none() {
                    continue;
                }
                let t = checkpoint.projection(i, which)?;
                let device = matrix.codes.device();
                let matrix =
                    TernaryMatrix::prepared_in(LayoutPolicy::Canonical, t.codes, t.scale, t.n, t.k, &device)?;
                let canonical = BitLinear::from_matrix(matrix);
                layer.weight = canonical.weight;
                released += choice.weight_bytes();
            }
        }
        if released > 0 {
            tracing::info!(released, "private packings were dropped; weights are read as the file has them");
        }
        Ok(released)
    }

    /// A model in the training state, on a device with or without gradients: latent weights and float
    /// embeddings, by their names and shapes in a Hugging Face checkpoint ([N, K] and `[K]`), all asked for
    /// in the same order every time. Without `quantise` it is BitNet's float twin: the same model with its
    /// weights and activations as they are.
    ///
    /// # Errors
    /// Those of `values`.
    ///
    /// # Panics
    /// If `values` gives other numbers of values than asked for.
    pub fn trainable<E>(
        config: &ModelConfig,
        quantise: bool,
        device: &Device,
        values: &mut ValuesOf<'_, E>,
    ) -> Result<Self, E> {
        // The parameters are numbered, so that an optimiser's state finds them again in another process.
        let next = Cell::new(1);
        let number = || ParamId::from(next.replace(next.get() + 1));
        let values = RefCell::new(values);
        let matrix = |name: &str, shape: (usize, usize)| -> Result<Param<Tensor<2>>, E> {
            let shape = [shape.0, shape.1];
            let data = TensorData::new((values.borrow_mut())(name, &shape)?, shape);
            Ok(Param::initialized(number(), Tensor::from_data(data, device).require_grad()))
        };
        let norm = |which: Norm| -> Result<RmsNorm, E> {
            let weight = (values.borrow_mut())(&hf::norm_name(which), &[which.len(config)])?;
            let mut norm = rms_norm(weight, config.rms_norm_eps, device);
            norm.gamma = Param::initialized(number(), norm.gamma.into_value().require_grad());
            Ok(norm)
        };
        let linear = |layer: usize, which: Projection| -> Result<BitLinear, E> {
            Ok(BitLinear::latent(matrix(&hf::projection_name(layer, which), which.shape(config))?))
        };
        let table = (config.vocab_size, config.hidden_size);
        let embedding = DenseMatrix::trainable(matrix(hf::EMBEDDING, table)?);
        let blocks =
            (0..config.n_layers).map(|i| block(config, i, norm, linear)).collect::<Result<_, E>>()?;
        let last = norm(Norm::Output)?;
        let output = if config.tied_embeddings {
            None
        } else {
            Some(DenseMatrix::trainable(matrix(hf::HEAD, table)?))
        };
        Ok(Self::assemble(config.clone(), quantise, embedding, blocks, last, output))
    }

    /// The parameters of a model in the training state, as [`trainable`](Self::trainable) asks for them:
    /// name, shape and values.
    ///
    /// # Panics
    /// If a layer is packed, or the values can't be read back from their device.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let mut parameters = Vec::new();
        let mut add = |name: String, data: TensorData| {
            parameters.push((name, data.shape().to_vec(), data.iter::<f32>().collect()));
        };
        let float = |matrix: &DenseMatrix| match &matrix.weight {
            DenseWeight::Float(weight) => weight.val().into_data(),
            DenseWeight::Stored(_) => panic!("a frozen embedding has no parameters"),
        };
        add(hf::EMBEDDING.to_owned(), float(&self.embedding));
        for (i, block) in self.blocks.iter().enumerate() {
            let (attention, feed_forward) = (&block.attention, &block.feed_forward);
            for (which, layer) in Projection::ALL.into_iter().zip(block.projections()) {
                match &layer.weight {
                    BitLinearWeight::Latent(weight) => {
                        add(hf::projection_name(i, which), weight.val().into_data());
                    }
                    BitLinearWeight::Packed(_) => panic!("a packed layer has no parameters"),
                }
            }
            for (which, norm) in [
                (Norm::Attention(i), Some(&attention.input_norm)),
                (Norm::AttentionSub(i), attention.o_proj.norm.as_ref()),
                (Norm::FeedForward(i), Some(&feed_forward.input_norm)),
                (Norm::FeedForwardSub(i), feed_forward.down_proj.norm.as_ref()),
            ] {
                if let Some(norm) = norm {
                    add(hf::norm_name(which), norm.gamma.val().into_data());
                }
            }
        }
        add(hf::norm_name(Norm::Output), self.norm.gamma.val().into_data());
        if let Some(output) = &self.output {
            add(hf::HEAD.to_owned(), float(output));
        }
        parameters
    }

    /// The model with its weights frozen, on the device without gradients: ternary layers packed for the
    /// fastest kernels of this machine, embeddings in F32.
    ///
    /// # Errors
    /// If no kernel may compute a layer, or memory is short.
    ///
    /// # Panics
    /// If the weights can't be read back from their device.
    pub fn pack(self) -> Result<Self, ManagerError> {
        let mut model = if self.device().is_autodiff() { self.valid() } else { self };
        for block in &mut model.blocks {
            for layer in block.projections_mut() {
                *layer = layer.clone().pack()?;
            }
        }
        model.embedding = model.embedding.freeze();
        model.output = model.output.map(DenseMatrix::freeze);
        Ok(model)
    }

    fn assemble(
        config: ModelConfig,
        quantise: bool,
        embedding: DenseMatrix,
        blocks: Vec<BitBlock>,
        norm: RmsNorm,
        output: Option<DenseMatrix>,
    ) -> Self {
        let rotary = RotaryEncodingConfig::new(config.head_dim).with_theta(config.rope_theta).init();
        Self { embedding, blocks, norm, output, rotary, config, quantise, prepacked: 0 }
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The output projection: lm_head, or the embedding where that is tied.
    pub fn head(&self) -> &DenseMatrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// How the output projection is computed, for reports: `file (Q6_K, f32 activations)`,
    /// `requantised (Q6_K from F16, int8 activations)`.
    pub fn head_name(&self) -> String {
        let head = self.head();
        let DenseArgs { format, int8, .. } = head.args();
        match (head.requantised_from(), int8) {
            (Some(from), true) => {
                format!("requantised ({} from {}, int8 activations)", format.name(), from.name())
            }
            (Some(from), false) => {
                format!("converted ({} from {}, f32 activations)", format.name(), from.name())
            }
            (None, true) => format!("int8 ({}, int8 activations)", format.name()),
            (None, false) => format!("file ({}, f32 activations)", format.name()),
        }
    }

    /// Matrices that were [packed before](crate::prepack), and mapped.
    pub fn prepacked(&self) -> usize {
        self.prepacked
    }

    /// The device of its embedding and its output; of all its weights, where it is on one device.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }

    /// The devices of its layers.
    pub fn layer_devices(&self) -> Vec<Device> {
        self.blocks.iter().map(BitBlock::device).collect()
    }

    /// Whether all of it is in host memory.
    pub fn is_host(&self) -> bool {
        ops::is_host(&self.device()) && self.layer_devices().iter().all(ops::is_host)
    }

    /// An empty KV cache for up to `context` positions a sequence (at most the model's own context), each layer's on
    /// the layer's device.
    ///
    /// # Errors
    /// If a device does not support the type.
    pub fn cache(&self, context: usize, cache_type: CacheType) -> Result<KvCache, CacheError> {
        let c = &self.config;
        let shape = [c.n_kv_heads, c.head_dim];
        KvCache::on_devices(shape, context.min(c.context_length), cache_type, self.layer_devices())
    }

    /// Whether its devices have the memory for it: computes the last `rows` rows of a sequence that fills `context`
    /// positions, and forgets them. What a device says against it, in words; a device that panics says something, too.
    ///
    /// # Errors
    /// That.
    pub fn try_out(&self, rows: usize, context: usize, cache_type: CacheType) -> Result<(), String> {
        let compute = || -> Result<(), String> {
            self.arrived()?;
            let words = |error: ForwardError| error.to_string();
            let mut cache = self.cache(context, cache_type).map_err(|error| words(error.into()))?;
            let sequence = cache.add_sequence(cache.capacity());
            let rows = rows.clamp(1, cache.capacity());
            let first = cache.capacity() - rows;
            cache.advance(sequence, first).map_err(|error| words(error.into()))?;
            let rows: Vec<Row> =
                (first..first + rows).map(|position| Row { token: 0, sequence, position }).collect();
            let logits = self.forward(&rows, &[rows.len() - 1], &mut cache).map_err(words)?;
            devices::read(logits).map(|_| ())
        };
        devices::catching_panics(compute)?
    }

    /// That the weights which are not in host memory are where they were sent: a device that had no room for them says so
    /// when they are read, and kernels that read them would be blamed for it. (A worker that had no room for them is
    /// gone.)
    fn arrived(&self) -> Result<(), String> {
        let words = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
        let tells = |device: &Device| !ops::is_host(device) && !devices::is_remote(device);
        if tells(&self.device()) {
            for (what, matrix) in
                [("the embedding", Some(&self.embedding)), ("the output", self.output.as_ref())]
            {
                if let Some(DenseWeight::Stored(stored)) = matrix.map(|matrix| &matrix.weight) {
                    let first = stored.val().slice([0..1, 0..1]);
                    first.try_into_data().map_err(|error| words(what, &error))?;
                }
            }
        }
        for (i, block) in self.blocks.iter().enumerate().filter(|(_, block)| tells(&block.device())) {
            for matrix in block.projections().iter().filter_map(|layer| layer.matrix()) {
                let first = matrix.codes.slice([0..1, 0..1]);
                first.try_into_data().map_err(|error| words(&format!("layer {i}"), &error))?;
            }
        }
        Ok(())
    }

    /// Appends the rows to their sequences and returns the logits of the rows `wanted`.
    ///
    /// Rows of one sequence are consecutive, and continue it.
    ///
    /// # Shapes
    /// The output is [wanted, vocabulary].
    ///
    /// # Errors
    /// If a row does not continue its sequence, a token is not in the vocabulary, the context is
    /// full, or a kernel refuses. The sequences' lengths are unchanged then.
    pub fn forward(
        &self,
        rows: &[Row],
        wanted: &[usize],
        cache: &mut KvCache,
    ) -> Result<Tensor<2>, ForwardError> {
        let mut batch = self.batch(rows, cache)?;
        let tokens: Vec<u32> = rows.iter().map(|row| row.token).collect();
        let x = self.hidden(&tokens, &mut batch, &mut History::Cache(cache))?;
        for sequence in &batch.sequences {
            cache.advance(sequence.id, sequence.rows.len())?;
        }
        self.logits(select_rows(x, wanted))
    }

    /// The logits of all rows of whole sequences of `length` tokens each, without a cache: what training
    /// computes. The same code as [`forward`](Self::forward) but for where attention looks.
    ///
    /// # Shapes
    /// tokens: [sequences * length]; the output is [sequences * length, vocabulary].
    ///
    /// # Errors
    /// If a token is not in the vocabulary, the tokens are not whole sequences, or a kernel refuses.
    pub fn forward_sequences(&self, tokens: &[u32], length: usize) -> Result<Tensor<2>, ForwardError> {
        self.check_tokens(tokens.iter().copied())?;
        if length == 0 || tokens.is_empty() || !tokens.len().is_multiple_of(length) {
            let problem = format!("{} tokens are not whole sequences of {length}", tokens.len());
            return Err(ForwardError::Rows { row: 0, problem });
        }
        let positions: Vec<usize> = (0..length).collect();
        let angles = self.rotary.angles(&positions, &self.device());
        let mut batch = Batch { sequences: Vec::new(), positions, angles, quantise: self.quantise };
        self.logits(self.hidden(tokens, &mut batch, &mut History::None { length })?)
    }

    /// The residual stream behind the last block, on that block's device.
    fn hidden(
        &self,
        tokens: &[u32],
        batch: &mut Batch,
        history: &mut History<'_>,
    ) -> Result<Tensor<2>, ForwardError> {
        let mut x = self.embedding.rows(tokens);
        let mut here = self.device();
        for (i, block) in self.blocks.iter().enumerate() {
            let device = block.device();
            if device != here {
                x = moved(x, &device)?;
                batch.angles = self.rotary.angles(&batch.positions, &device);
                here = device;
            }
            x = block.forward(x, i, batch, history)?;
        }
        Ok(x)
    }

    fn logits(&self, x: Tensor<2>) -> Result<Tensor<2>, ForwardError> {
        let device = self.device();
        let x = if self.blocks.last().is_some_and(|block| block.device() != device) {
            moved(x, &device)?
        } else {
            x
        };
        let x = ops::rms_norm(x, self.norm.gamma.val(), self.norm.epsilon as f32);
        Ok(self.head().forward(x))
    }

    fn check_tokens(&self, mut tokens: impl Iterator<Item = u32>) -> Result<(), ForwardError> {
        let vocabulary = self.embedding.args().n;
        match tokens.find(|&token| token as usize >= vocabulary) {
            None => Ok(()),
            Some(token) => Err(ForwardError::Token { token, vocabulary }),
        }
    }

    /// Checks the rows, makes room for them in the cache, and looks up their angles.
    fn batch(&self, rows: &[Row], cache: &mut KvCache) -> Result<Batch, ForwardError> {
        self.check_tokens(rows.iter().map(|row| row.token))?;
        let mut sequences: Vec<SequenceRows> = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            let fail = |problem: String| Err(ForwardError::Rows { row: i, problem });
            match sequences.last_mut() {
                Some(last) if last.id == row.sequence => {
                    let next = last.position + last.rows.len();
                    if row.position != next {
                        return fail(format!("position {}, the sequence continues at {next}", row.position));
                    }
                    last.rows.end += 1;
                }
                _ => {
                    if sequences.iter().any(|s| s.id == row.sequence) {
                        return fail("rows of one sequence must be consecutive".into());
                    }
                    let next = cache.length(row.sequence)?;
                    if row.position != next {
                        return fail(format!("position {}, the sequence continues at {next}", row.position));
                    }
                    sequences.push(SequenceRows { id: row.sequence, rows: i..i + 1, position: next });
                }
            }
        }
        if sequences.is_empty() {
            return Err(ForwardError::Rows {
                row: 0,
                problem: "a forward pass takes at least one row".into(),
            });
        }
        for sequence in &sequences {
            cache.reserve(sequence.id, sequence.rows.len())?;
        }
        let positions: Vec<usize> = rows.iter().map(|row| row.position).collect();
        let angles = self.rotary.angles(&positions, &self.device());
        Ok(Batch { sequences, positions, angles, quantise: self.quantise })
    }
}

/// A block of given parts.
fn block<E>(
    config: &ModelConfig,
    i: usize,
    norm: impl Fn(Norm) -> Result<RmsNorm, E>,
    linear: impl Fn(usize, Projection) -> Result<BitLinear, E>,
) -> Result<BitBlock, E> {
    let with_norm = |linear: BitLinear, which: Norm| -> Result<BitLinear, E> {
        if config.sub_norms { Ok(linear.with_norm(norm(which)?)) } else { Ok(linear) }
    };
    let attention =
        BitAttentionConfig::new(config.hidden_size, config.n_heads, config.n_kv_heads, config.head_dim);
    let activation = match config.activation {
        Activation::Relu2 => GatedActivation::Relu2,
        Activation::Silu => GatedActivation::Silu,
    };
    let projections = [
        linear(i, Projection::Q)?,
        linear(i, Projection::K)?,
        linear(i, Projection::V)?,
        with_norm(linear(i, Projection::O)?, Norm::AttentionSub(i))?,
    ];
    let feed_forward = [
        linear(i, Projection::Gate)?,
        linear(i, Projection::Up)?,
        with_norm(linear(i, Projection::Down)?, Norm::FeedForwardSub(i))?,
    ];
    Ok(BitBlock {
        attention: attention.assemble(norm(Norm::Attention(i))?, projections),
        feed_forward: BitFeedForward::assemble(norm(Norm::FeedForward(i))?, feed_forward, activation),
    })
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
            format => DenseMatrix::converted(tensor, format, device),
        };
    };
    let tiles = prepacked.and_then(|prepacked| prepacked.head(format, (tensor.n, tensor.k)));
    DenseMatrix::int8_prepacked(tensor, format, tiles, device)
}

fn rms_norm(weight: Vec<f32>, eps: f32, device: &Device) -> RmsNorm {
    let k = weight.len();
    let gamma = Tensor::from_data(TensorData::new(weight, [k]), device);
    let mut norm = RmsNormConfig::new(k).with_epsilon(f64::from(eps)).init(device);
    norm.gamma = Param::initialized(ParamId::new(), gamma);
    norm
}

/// On another device. What went wrong on the one that it leaves shows here.
fn moved(x: Tensor<2>, device: &Device) -> Result<Tensor<2>, ForwardError> {
    if x.device().is_autodiff() {
        return Ok(x.to_device(device));
    }
    let data = devices::read(x).map_err(ForwardError::Device)?;
    Ok(Tensor::from_data(data, device))
}

fn select_rows(x: Tensor<2>, wanted: &[usize]) -> Tensor<2> {
    let [m, k] = x.dims();
    if wanted.len() == m && wanted.iter().enumerate().all(|(i, &w)| i == w) {
        return x;
    }
    let rows: Vec<Tensor<2>> = wanted.iter().map(|&i| x.clone().slice([i..i + 1, 0..k])).collect();
    if rows.len() == 1 { rows.into_iter().next().expect("one") } else { Tensor::cat(rows, 0) }
}

/// Measures the kernels on the model's shapes, where that has not been done on this machine.
fn choose_kernels(
    config: &ModelConfig,
    max_rows: usize,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<(), ManagerError> {
    let mut shapes: Vec<(usize, usize)> = Vec::new();
    for projection in Projection::ALL {
        let shape = projection.shape(config);
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    for (i, &(n, k)) in shapes.iter().enumerate() {
        progress(LoadProgress::Tuning(i, shapes.len()));
        let choice = manager().choose(n, k, LayoutPolicy::Any)?;
        manager().warm_up(&choice, max_rows);
    }
    progress(LoadProgress::Tuning(shapes.len(), shapes.len()));
    Ok(())
}
