//! What a model needs, computed from the headers of its files. Nothing here reads a weight.

use bitnet_burn_formats::canonical;
use serde::Serialize;

use super::placement::Placement;
use super::{CPU, DeviceMemory, RunSettings};
use crate::checkpoint::{Checkpoint, LoadError};
use crate::load::HeadMode;
use crate::projection;
use bitnet_burn::CacheType;
use bitnet_burn::{Experts, FloatPart, ModelConfig, Norm, Projection};

/// What a model needs. All sizes are in bytes unless stated otherwise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Requirements {
    /// Number of layers.
    pub layers: usize,
    /// Positions that the model was trained for.
    pub context: usize,
    /// The projections of one layer: ternary weights in the canonical layout, at 2 bits each (kernels' own layouts take
    /// as much or less), others as the file has them.
    pub layer_projections: u64,
    /// What a token reads of them: all; of experts, those that compute it.
    pub layer_read: u64,
    /// The norms of one layer, and its other parts that are floats: a router to experts, an adapter's matrices.
    pub layer_norms: u64,
    /// Number of ternary weights of one layer that a token is multiplied by.
    pub layer_weights: u64,
    /// The embedding in its stored format.
    pub embedding: u64,
    /// The output projection in the format that is computed with; 0 if it shares the embedding's memory.
    pub output: u64,
    /// Bytes of the output projection that each token reads.
    pub head_read: u64,
    /// The last norm.
    pub last_norm: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Size of the vocabulary.
    pub vocabulary: u64,
    /// Bytes of a position in the KV cache of one layer, by type: f32, f16, int8.
    pub kv_per_position: [u64; 3],
    /// Bytes of the state that a layer keeps of a sequence, however long that is. Layers that differ count as their mean.
    pub state_per_layer: u64,
    /// Number of f32 values of a row that a layer needs at the same time: see [`activations`](Self::activations).
    row_values: u64,
    /// Width of the widest matmul input.
    widest: u64,
    heads: u64,
    query_values: u64,
    /// Positions of sliding windows, and the number of layers that have them.
    windows: (usize, usize),
}

/// Classes of devices whose operations need different workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceClass {
    /// The host, with this number of threads.
    Host(usize),
    /// A GPU.
    Gpu,
}

impl DeviceClass {
    /// The class of a device of a placement.
    pub fn of(device: &str, threads: usize) -> Self {
        if device == CPU { Self::Host(threads) } else { Self::Gpu }
    }
}

/// Size of a forward pass: its rows, and the positions that attention looks back over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardSize {
    /// Rows at once.
    pub rows: usize,
    /// Positions of the KV cache.
    pub context: usize,
}

/// The keys and values of a sequence share pages of this size, where the system has them.
pub(super) const HUGE_PAGE: u64 = 2 << 20;

/// The cache types in the order of [`Requirements::kv_per_position`].
pub(super) const CACHE_TYPES: [CacheType; 3] = [CacheType::F32, CacheType::F16, CacheType::Int8];

impl Requirements {
    /// The requirements of a checkpoint whose output projection is computed as `head` says.
    ///
    /// # Errors
    /// If a tensor is missing.
    pub fn of(checkpoint: &Checkpoint, head: HeadMode) -> Result<Self, LoadError> {
        let embedding = checkpoint.embedding()?;
        let output = checkpoint.output()?;
        let stored = output.as_ref().unwrap_or(&embedding);
        let format = head.format(stored);
        let head_read = match format == stored.format {
            true => stored.data.len() as u64,
            false => format.row_bytes(stored.k).unwrap_or(usize::MAX).saturating_mul(stored.n) as u64,
        };
        // On the host, int8 products need a copy in tiles, in any format, and those with ternary weights a packing.
        let packed = stored.format.is_ternary() && projection::computes_head(checkpoint, head)?;
        let own = output.is_some() || format != stored.format || head.int8_format(stored).is_some() || packed;
        let sizes = DenseBytes {
            embedding: embedding.data.len() as u64,
            output: if own { head_read } else { 0 },
            head_read,
        };
        let config = checkpoint.config();
        let mut requirements = Self::with(config, sizes);
        // Layers that differ count as their mean.
        let layers = match config.options.delta_net {
            None => typical_layer(config).0..typical_layer(config).0 + 1,
            Some(_) => 0..config.n_layers,
        };
        let (mut dense, mut floats) = (Some((0u64, 0u64)), 0u64);
        for layer in layers.clone() {
            for which in Projection::of_layer(layer, config) {
                let bytes = checkpoint.dense_bytes(layer, which);
                let read = which.is_read(config);
                dense = dense.zip(bytes).map(|((all, sum), bytes)| {
                    (all.saturating_add(bytes), sum.saturating_add(if read { bytes } else { 0 }))
                });
            }
            for which in FloatPart::of_layer(layer, config) {
                floats += checkpoint.float_part(layer, which)?.data.len() as u64;
            }
        }
        let count = layers.len().max(1) as u64;
        if let Some((all, read)) = dense {
            (requirements.layer_projections, requirements.layer_read) =
                (all.div_ceil(count), read.div_ceil(count));
        }
        requirements.layer_norms += floats.div_ceil(count);
        Ok(requirements)
    }

    /// The requirements of a model of this shape, with embedding and output matrices of these sizes, without routers to
    /// experts. Where some layers have experts, all are taken for such ones.
    pub fn with(config: &ModelConfig, dense: DenseBytes) -> Self {
        let (_, experts) = typical_layer(config);
        // The projections of a layer: how many it has of each kind, and how many a token is multiplied by.
        let (count, used) = experts.map_or((1, 1), |of| (of.count as u64, of.used as u64));
        let feed_forward =
            if experts.is_some() { Projection::of_expert(0) } else { Projection::FEED_FORWARD };
        // (The sizes of a shared expert are 0 where there is none.)
        let shared = Projection::SHARED.map(|which| (which, 1, 1));
        let feed_forward: Vec<_> =
            feed_forward.map(|which| (which, count, used)).into_iter().chain(shared).collect();
        let sum_of = |kinds: &[Projection], of: &dyn Fn(usize) -> usize| {
            let each = kinds.iter().map(|which| {
                let (n, k) = which.shape(config);
                (n as u64).saturating_mul(of(k) as u64)
            });
            each.fold(0, u64::saturating_add)
        };
        let sum = |of: &dyn Fn(usize) -> usize, number: &dyn Fn(u64, u64) -> u64| {
            let attention =
                mean(config, sum_of(&Projection::ATTENTION, of), sum_of(&Projection::DELTA_NET, of));
            let each = feed_forward
                .iter()
                .map(|&(which, count, used)| sum_of(&[which], of).saturating_mul(number(count, used)));
            each.fold(attention, u64::saturating_add)
        };
        let norms = Norm::of_layer(0, config).map(|norm| norm.len(config) as u64 * 4).sum();
        let [hidden, inter, q, kv] =
            [config.hidden_size, config.intermediate_size, config.q_size(), config.kv_size()]
                .map(|v| v as u64);
        // The residual stream twice (a block's input and its sum), plus the larger of attention (queries, keys and values,
        // their rotated copies, the heads' output) and feed-forward (gate, up and their product).
        // A gated DeltaNet: its inputs, which are convolved, and its outputs.
        let delta = config.options.delta_net.as_ref();
        let delta = delta.map_or(0, |delta| 2 * delta.channels() as u64 + 3 * delta.values() as u64);
        let attention = (3 * q + 3 * kv).max(delta);
        // With experts: the normalised rows, the logits of the router, and of the rows of one expert its inputs and outputs.
        let feed_forward = experts.map_or(3 * inter, |experts| {
            let widest = experts.intermediate_size.max(experts.shared.unwrap_or(0));
            4 * hidden + experts.count as u64 + 3 * widest as u64
        });
        Self {
            layers: config.n_layers,
            context: config.context_length,
            layer_projections: sum(&canonical::row_bytes, &|count, _| count),
            layer_read: sum(&canonical::row_bytes, &|_, used| used),
            layer_norms: norms,
            layer_weights: sum(&|k| k, &|_, used| used),
            embedding: dense.embedding,
            output: dense.output,
            head_read: dense.head_read,
            last_norm: hidden * 4,
            hidden,
            vocabulary: config.vocab_size as u64,
            kv_per_position: CACHE_TYPES
                .map(|kind| config.kv_bytes_per_token(kind) as u64 / config.n_layers.max(1) as u64),
            state_per_layer: config.state_bytes() as u64 / config.n_layers.max(1) as u64,
            row_values: 2 * hidden + attention.max(feed_forward),
            widest: hidden.max(q).max(
                experts.map_or(inter, |experts| {
                    experts.intermediate_size.max(experts.shared.unwrap_or(0)) as u64
                }),
            ),
            heads: config.n_heads as u64,
            query_values: q,
            windows: config.options.windows.as_ref().map_or((usize::MAX, 0), |windows| {
                (windows.positions, windows.layers.iter().filter(|&&sliding| sliding).count())
            }),
        }
    }

    /// Bytes of the weights of `layers` layers.
    pub fn layer_bytes(&self, layers: usize) -> u64 {
        (self.layer_projections.saturating_add(self.layer_norms)).saturating_mul(layers as u64)
    }

    /// Bytes of the weights of `layers` layers that a token reads.
    pub fn layer_bytes_read(&self, layers: usize) -> u64 {
        (self.layer_read.saturating_add(self.layer_norms)).saturating_mul(layers as u64)
    }

    /// Bytes of embedding, last norm and output projection.
    pub fn dense_bytes(&self) -> u64 {
        self.embedding.saturating_add(self.output).saturating_add(self.last_norm)
    }

    /// Bytes of the KV cache of `positions` positions in `layers` layers.
    pub fn kv_bytes(&self, kind: CacheType, positions: usize, layers: usize) -> u64 {
        let index = CACHE_TYPES.iter().position(|&known| known == kind).expect("all types are listed");
        self.kv_per_position[index].saturating_mul(positions as u64).saturating_mul(layers as u64)
    }

    /// Bytes of the memory that the cache takes for a sequence of `positions` positions in `layers` layers, where the system gives
    /// memory in huge pages.
    pub fn sequence_bytes(&self, kind: CacheType, positions: usize, layers: usize) -> u64 {
        let keys = self.kv_bytes(kind, positions, layers);
        let keys = keys.checked_next_multiple_of(HUGE_PAGE).unwrap_or(u64::MAX);
        keys.saturating_add(self.state_bytes(layers))
    }

    /// Bytes of the states of `layers` layers for a sequence: as they are, as they become, and as they were kept.
    pub fn state_bytes(&self, layers: usize) -> u64 {
        self.state_per_layer.saturating_mul(3).saturating_mul(layers as u64)
    }

    /// Bytes of the KV cache and of states that a token reads behind `positions` positions in `layers` layers, of which as many have sliding
    /// windows as in the whole model, in proportion.
    pub fn kv_bytes_read(&self, kind: CacheType, positions: usize, layers: usize) -> u64 {
        let (window, sliding) = self.windows;
        let all = self.kv_bytes(kind, positions, layers);
        let hidden = all - self.kv_bytes(kind, positions.min(window), layers);
        let keys = all - (hidden as f64 * sliding as f64 / self.layers.max(1) as f64) as u64;
        // A state is read and written.
        keys.saturating_add(self.state_per_layer.saturating_mul(2).saturating_mul(layers as u64))
    }

    /// The memory that each device of a placement needs.
    pub fn memory(&self, placement: &Placement, settings: &RunSettings) -> Vec<DeviceMemory> {
        let of = |device: &str| {
            self.memory_of(device, placement.layers_on(device), placement.dense == device, settings)
        };
        placement.devices().map(of).collect()
    }

    /// The memory that `layers` layers need on a device, with embedding and output projection if `dense`. Without budget.
    pub(super) fn memory_of(
        &self,
        device: &str,
        layers: usize,
        dense: bool,
        settings: &RunSettings,
    ) -> DeviceMemory {
        let RunSettings { threads, context, kv_cache, rows } = *settings;
        let (of_layers, of_dense) = (self.layer_bytes(layers), if dense { self.dense_bytes() } else { 0 });
        DeviceMemory {
            device: device.to_owned(),
            weights: of_layers.saturating_add(of_dense),
            kv_cache: self.kv_bytes(kv_cache, context, layers).saturating_add(self.state_bytes(layers)),
            activations: self.activations(rows, dense),
            workspace: self.workspace(DeviceClass::of(device, threads), ForwardSize { rows, context }),
            budget: None,
        }
    }

    /// Bytes of the f32 activations of a forward pass, and of one row of logits if the device computes the output.
    pub fn activations(&self, rows: usize, with_output: bool) -> u64 {
        let logits = if with_output { self.vocabulary * 4 } else { 0 };
        self.row_values.saturating_mul(4).saturating_mul(rows as u64).saturating_add(logits)
    }

    /// Bytes that operations need for a short time. These are int8 activations; on the host, attention scores for each
    /// thread; on a GPU, transposed queries and attention outputs and, for up to 16 rows, partial results of every 64
    /// positions. (Not counted: if `perplexity` computes the logits of more than 32 rows at once on a GPU, it decodes the
    /// output projection to f32.)
    pub fn workspace(&self, place: DeviceClass, load: ForwardSize) -> u64 {
        let [rows, context] = [load.rows as u64, load.context as u64];
        let quantised = self.widest.saturating_mul(rows);
        match place {
            DeviceClass::Host(threads) => {
                let scores = context.saturating_mul(4).saturating_mul(self.heads);
                quantised.saturating_add(scores.saturating_mul(threads as u64))
            }
            DeviceClass::Gpu => {
                let chunks = context.div_ceil(64).saturating_mul(rows.min(16));
                let parts = (self.query_values + 2 * self.heads).saturating_mul(chunks).saturating_mul(4);
                let queries = self.query_values.saturating_mul(rows).saturating_mul(2 * 4);
                quantised.saturating_add(parts).saturating_add(queries)
            }
        }
    }
}

/// The mean over the layers of what those with attention have, and those with a gated DeltaNet.
fn mean(config: &ModelConfig, attention: u64, delta: u64) -> u64 {
    let Some(of) = &config.options.delta_net else { return attention };
    let (all, deltas) = (of.layers.len().max(1) as u64, of.layers.iter().filter(|&&has| has).count() as u64);
    let sum = attention.saturating_mul(all - deltas).saturating_add(delta.saturating_mul(deltas));
    sum.div_ceil(all)
}

/// A layer that stands for all: the first with experts if there are some, else the first.
fn typical_layer(config: &ModelConfig) -> (usize, Option<&Experts>) {
    let with = (0..config.n_layers).find_map(|layer| Some((layer, config.experts(layer)?)));
    with.map_or((0, None), |(layer, experts)| (layer, Some(experts)))
}

/// Sizes of the matrices that are not ternary, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseBytes {
    /// The embedding.
    pub embedding: u64,
    /// The output projection; 0 if it shares the embedding's memory.
    pub output: u64,
    /// Bytes that a token reads to compute its logits.
    pub head_read: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::shape;
    use bitnet_burn::SlidingWindows;

    #[test]
    fn the_2b_model_needs_what_its_shape_says() {
        let embedding = 128_256 * 2560 * 2;
        let dense = DenseBytes { embedding, output: 0, head_read: embedding };
        let needs = Requirements::with(&shape("2b-4t").unwrap(), dense);
        assert_eq!(needs.layer_weights * 30, 2_084_044_800);
        assert_eq!(needs.layer_projections * 30, 2_084_044_800 / 4);
        assert_eq!(needs.layer_norms, (2560 + 2560 + 2560 + 6912) * 4);
        for kind in CACHE_TYPES {
            let bytes = shape("2b-4t").unwrap().kv_bytes_per_token(kind) as u64;
            assert_eq!(needs.kv_bytes(kind, 4096, 30), bytes * 4096);
        }
        assert_eq!(needs.dense_bytes(), embedding + 2560 * 4);
    }

    #[cfg(feature = "default-model")]
    #[test]
    fn headers_are_enough() {
        let checkpoint = crate::embedded::checkpoint().unwrap();
        let file = Requirements::of(&checkpoint, HeadMode::File).unwrap();
        let embedding = checkpoint.embedding().unwrap();
        assert_eq!((file.embedding, file.output), (embedding.data.len() as u64, 0));
        assert_eq!(file.head_read, file.embedding);
        // A copy in another format needs memory of its own, and tokens read the copy.
        let requantised =
            Requirements::of(&checkpoint, HeadMode::Requantised(bitnet_burn_formats::DenseFormat::F32))
                .unwrap();
        assert_eq!(requantised.output, (embedding.n * embedding.k * 4) as u64);
        assert_eq!(requantised.head_read, requantised.output);
    }

    #[test]
    fn a_token_reads_the_experts_that_compute_it() {
        let mut config = shape("2b-4t").unwrap();
        config.sub_norms = false;
        let sizes = DenseBytes { embedding: 0, output: 0, head_read: 0 };
        let plain = Requirements::with(&config, sizes);
        assert_eq!(plain.layer_bytes_read(30), plain.layer_bytes(30));
        let experts = Experts {
            count: 64,
            used: 4,
            intermediate_size: 768,
            renormalise: true,
            shared: None,
            dense_layers: vec![0],
        };
        config.options.experts = Some(experts);
        let needs = Requirements::with(&config, sizes);
        let attention = plain.layer_weights - 3 * 2560 * 6912;
        assert_eq!(needs.layer_weights, attention + 4 * 3 * 2560 * 768);
        assert_eq!(needs.layer_projections * 4, attention + 64 * 3 * 2560 * 768);
        assert_eq!(needs.layer_read * 4, needs.layer_weights);
        assert_eq!(needs.layer_bytes(3) - needs.layer_bytes_read(3), 3 * 60 * 3 * 2560 * 768 / 4);
    }

    #[test]
    fn a_token_reads_the_positions_of_its_windows() {
        let mut config = shape("2b-4t").unwrap();
        let sizes = DenseBytes { embedding: 0, output: 0, head_read: 0 };
        let layers = (0..30).map(|layer| layer % 3 != 2).collect();
        config.options.windows = Some(SlidingWindows { positions: 512, layers, global_rope: false });
        let needs = Requirements::with(&config, sizes);
        let read = |positions| needs.kv_bytes_read(CacheType::F16, positions, 3);
        let of_layer = |positions| needs.kv_bytes(CacheType::F16, positions, 1);
        assert_eq!(read(512), 3 * of_layer(512));
        assert_eq!(read(4096), of_layer(4096) + 2 * of_layer(512));
        // All of them are kept.
        assert_eq!(needs.kv_bytes(CacheType::F16, 4096, 3), 3 * of_layer(4096));
    }

    #[test]
    fn absurd_shapes_do_not_overflow() {
        let mut config = shape("2b-4t").unwrap();
        (config.hidden_size, config.intermediate_size) = (1 << 20, 1 << 22);
        (config.n_layers, config.context_length) = (1 << 14, 1 << 30);
        (config.n_heads, config.n_kv_heads, config.head_dim) = (1 << 16, 1 << 16, 1 << 6);
        let needs = Requirements::with(
            &config,
            DenseBytes { embedding: u64::MAX, output: u64::MAX, head_read: u64::MAX },
        );
        assert_eq!(needs.dense_bytes(), u64::MAX);
        needs.workspace(DeviceClass::Gpu, ForwardSize { rows: usize::MAX, context: usize::MAX });
        needs.workspace(DeviceClass::Host(usize::MAX), ForwardSize { rows: usize::MAX, context: usize::MAX });
        needs.activations(usize::MAX, true);
        assert_eq!(needs.kv_bytes(CacheType::F32, usize::MAX, usize::MAX), u64::MAX);
    }
}
