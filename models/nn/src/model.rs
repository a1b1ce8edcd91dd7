//! A decoder of BitLinear layers, from rows of tokens to logits: BitNet b1.58 ("BitNet b1.58 2B4T Technical Report",
//! arXiv 2504.12285), and with [`DecoderOptions`](crate::DecoderOptions) the models of its kin.
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
//! Some models have experts in place of the feed-forward network ([`BitExperts`](crate::BitExperts)), or a gated DeltaNet in
//! place of the attention of some layers ([`BitDeltaNet`](crate::BitDeltaNet)).
//!
//! The forward pass takes rows of (token, sequence, position): a chunk of a prompt, one token each of
//! several sequences, or both at once are the same code.

use bitnet_burn_backends::{devices, ops};
use bitnet_burn_manager::ManagerError;
use bitnet_burn_manager::profile::{self, Operation, Part};
use burn::module::{Module, Param, ParamId};
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor, TensorData};

use crate::seen::Keep;
use crate::{
    Batch, BitBlock, BitLinear, CacheError, CacheType, DenseMatrix, History, KvCache, ModelConfig,
    RotaryEncoding, RotaryEncodingConfig, Rotation, Row, Seen, Stage,
};

/// Why a forward pass failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
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
    /// A row whose result is wanted, and that is not there.
    #[error("the result of row {wanted} is wanted; the rows are 0..{rows}")]
    Wanted {
        /// The row.
        wanted: usize,
        /// The number of rows.
        rows: usize,
    },
    /// No result is wanted.
    #[error("no row is wanted; name at least one, such as the last")]
    NothingWanted,
    /// Rows that do not continue their sequences.
    #[error("row {row}: {problem}")]
    Rows {
        /// The row.
        row: usize,
        /// What is wrong.
        problem: String,
    },
}

/// The model.
#[derive(Module, Debug)]
pub struct BitNet {
    /// Token embedding [vocabulary, hidden], and lm_head where that is tied.
    pub embedding: DenseMatrix,
    /// The rotation of the embedding's rows, which is taken back.
    pub embedding_rotation: Option<Rotation>,
    /// The blocks.
    pub blocks: Vec<BitBlock>,
    /// The norm before the head.
    pub norm: RmsNorm,
    /// lm_head [vocabulary, hidden], where it is not tied, or has another form than the embedding.
    pub output: Option<BitLinear>,
    #[module(skip)]
    rotary: RotaryEncoding,
    #[module(skip)]
    config: ModelConfig,
    #[module(skip)]
    quantise: bool,
}

impl BitNet {
    /// A model of given parts; `quantise` says whether activations are quantised to int8.
    pub fn assemble(
        config: ModelConfig,
        quantise: bool,
        embedding: DenseMatrix,
        blocks: Vec<BitBlock>,
        norm: RmsNorm,
        output: Option<BitLinear>,
    ) -> Self {
        let rotary = RotaryEncodingConfig::new(config.rope_dim())
            .with_theta(config.rope_theta)
            .with_scaling(config.options.rope_scaling.clone())
            .init();
        Self { embedding, embedding_rotation: None, blocks, norm, output, rotary, config, quantise }
    }

    /// The same model with an embedding whose rows are rotated.
    pub fn with_embedding_rotation(self, rotation: Option<Rotation>) -> Self {
        Self { embedding_rotation: rotation, ..self }
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether activations are quantised to int8.
    pub fn quantises(&self) -> bool {
        self.quantise
    }

    /// The output projection, lm_head or the embedding where that is tied; `None` for one that is ternary.
    pub fn head(&self) -> Option<&DenseMatrix> {
        match &self.output {
            None => Some(&self.embedding),
            Some(output) => output.dense_matrix(),
        }
    }

    /// How the output projection is computed, for reports: `file (Q6_K, f32 activations)`.
    pub fn head_description(&self) -> String {
        match (self.head(), self.output.as_ref().and_then(BitLinear::matrix)) {
            (Some(matrix), _) => matrix.description(),
            (None, Some(matrix)) if self.quantise => match matrix.scales.activation_group() {
                0 => "ternary (int8 activations)".into(),
                group => format!("ternary (int8 activations by groups of {group})"),
            },
            (None, _) => "ternary (f32 activations)".into(),
        }
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
        let cache =
            KvCache::on_devices(shape, context.min(c.context_length), cache_type, self.layer_devices())?;
        Ok(match &c.options.delta_net {
            Some(delta) => cache.with_delta_nets(&delta.layers),
            None => cache,
        })
    }

    /// Appends the rows to their sequences and returns the logits of the rows `wanted`.
    ///
    /// Rows of one sequence are consecutive, and continue it.
    ///
    /// # Shapes
    /// The output is [wanted, vocabulary].
    ///
    /// # Errors
    /// If a row does not continue its sequence, a token is not in the vocabulary, `wanted` is empty or names a row that is
    /// not there, the cache is another model's, the context is full, or a kernel refuses. The sequences' lengths are
    /// unchanged then.
    pub fn forward(
        &self,
        rows: &[Row],
        wanted: &[usize],
        cache: &mut KvCache,
    ) -> Result<Tensor<2>, ForwardError> {
        self.logits(self.forward_states(rows, wanted, cache)?)
    }

    /// [`forward`](Self::forward) without the output projection: the hidden states behind the last norm of the rows
    /// `wanted`, of which embeddings of texts are made.
    ///
    /// # Shapes
    /// The output is [wanted, hidden].
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_states(
        &self,
        rows: &[Row],
        wanted: &[usize],
        cache: &mut KvCache,
    ) -> Result<Tensor<2>, ForwardError> {
        Ok(self.states(rows, wanted, cache, Keep::default())?.0)
    }

    /// [`forward`](Self::forward) of all rows, with what the layers computed on the way, in the order of the computation:
    /// to find where two models part.
    ///
    /// # Shapes
    /// The logits are [rows, vocabulary].
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_seen(
        &self,
        rows: &[Row],
        cache: &mut KvCache,
    ) -> Result<(Tensor<2>, Vec<Seen>), ForwardError> {
        let all: Vec<usize> = (0..rows.len()).collect();
        let (states, keep) = self.states(rows, &all, cache, Keep::all())?;
        Ok((self.logits(states)?, keep.into_seen()))
    }

    fn states(
        &self,
        rows: &[Row],
        wanted: &[usize],
        cache: &mut KvCache,
        keep: Keep,
    ) -> Result<(Tensor<2>, Keep), ForwardError> {
        self.check_tokens(rows.iter().map(|row| row.token))?;
        // (Without rows, that is what is wrong: the batch says so.)
        if !rows.is_empty() {
            if wanted.is_empty() {
                return Err(ForwardError::NothingWanted);
            }
            if let Some(&wanted) = wanted.iter().find(|&&wanted| wanted >= rows.len()) {
                return Err(ForwardError::Wanted { wanted, rows: rows.len() });
            }
        }
        let (layers, found) = (self.blocks.len(), cache.devices().len());
        if layers != found {
            let problem = format!("it has {found} layers, and the model {layers}");
            return Err(CacheError::Foreign(problem).into());
        }
        let mut batch = Batch::over_cache(rows, cache, &self.rotary, self.quantise, &self.device())?;
        batch.keep = keep;
        let tokens: Vec<u32> = rows.iter().map(|row| row.token).collect();
        let x = self.hidden(&tokens, &mut batch, &mut History::Cache(cache))?;
        batch.keep.see(self.blocks.len(), Stage::Input, &x);
        batch.finish(cache)?;
        Ok((self.normalised(select_rows(x, wanted))?, batch.keep))
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
        self.logits(self.hidden_states(tokens, length)?)
    }

    /// [`forward_sequences`](Self::forward_sequences) without the output projection: the hidden states behind the last norm,
    /// with gradients in training. The mean over a sequence's rows is an embedding of its text:
    /// `states.reshape([sequences, length, hidden]).mean_dim(1)`.
    ///
    /// # Shapes
    /// tokens: [sequences * length]; the output is [sequences * length, hidden].
    ///
    /// # Errors
    /// As [`forward_sequences`](Self::forward_sequences).
    pub fn hidden_states(&self, tokens: &[u32], length: usize) -> Result<Tensor<2>, ForwardError> {
        Ok(self.sequences_states(tokens, length, Keep::default())?.0)
    }

    /// [`forward_sequences`](Self::forward_sequences), with what the layers computed on the way, in the order of the
    /// computation. In training these have gradients, too: for losses on layers, as in distillation.
    ///
    /// # Errors
    /// As [`forward_sequences`](Self::forward_sequences).
    pub fn forward_sequences_seen(
        &self,
        tokens: &[u32],
        length: usize,
    ) -> Result<(Tensor<2>, Vec<Seen>), ForwardError> {
        let (states, keep) = self.sequences_states(tokens, length, Keep::all())?;
        Ok((self.logits(states)?, keep.into_seen()))
    }

    fn sequences_states(
        &self,
        tokens: &[u32],
        length: usize,
        keep: Keep,
    ) -> Result<(Tensor<2>, Keep), ForwardError> {
        self.check_sequences(tokens, length)?;
        let mut batch = Batch::whole_sequences(length, &self.rotary, self.quantise, &self.device());
        batch.keep = keep;
        let x = self.hidden(tokens, &mut batch, &mut History::None { length })?;
        batch.keep.see(self.blocks.len(), Stage::Input, &x);
        Ok((self.normalised(x)?, batch.keep))
    }

    /// The residual stream behind the last block, on that block's device.
    fn hidden(
        &self,
        tokens: &[u32],
        batch: &mut Batch,
        history: &mut History<'_>,
    ) -> Result<Tensor<2>, ForwardError> {
        let mut x = self.embedded(tokens);
        let mut here = self.device();
        for (i, block) in self.blocks.iter().enumerate() {
            let device = block.device();
            if let History::Cache(cache) = history
                && cache.devices()[i] != device
            {
                let problem = format!("its layer {i} is on another device than the model's");
                return Err(CacheError::Foreign(problem).into());
            }
            if device != here {
                x = moved(x, &device)?;
                batch.move_to(&self.rotary, &device);
                here = device;
            }
            x = block.forward(x, i, batch, history)?;
        }
        Ok(x)
    }

    /// What goes into the first block.
    fn embedded(&self, tokens: &[u32]) -> Tensor<2> {
        let _span = profile::span(Operation::Embedding);
        let mut x = self.embedding.rows(tokens);
        if let Some(rotation) = &self.embedding_rotation {
            x = rotation.inverse(x);
        }
        match self.config.options.embedding_scale {
            1.0 => x,
            scale => x * scale,
        }
    }

    /// What goes into the first block for tokens of whole sequences: [`forward_sequences`](Self::forward_sequences) is this,
    /// [`forward_block`](Self::forward_block) for each block, and [`logits_of`](Self::logits_of).
    ///
    /// # Errors
    /// As [`forward_sequences`](Self::forward_sequences).
    pub fn embed_sequences(&self, tokens: &[u32], length: usize) -> Result<Tensor<2>, ForwardError> {
        self.check_sequences(tokens, length)?;
        Ok(self.embedded(tokens))
    }

    /// A block over the rows of whole sequences of `length` each, which are on the block's device.
    ///
    /// # Errors
    /// If there is no such block, the rows are not whole sequences, or a kernel refuses.
    pub fn forward_block(
        &self,
        block: usize,
        x: Tensor<2>,
        length: usize,
    ) -> Result<Tensor<2>, ForwardError> {
        let Some(layer) = self.blocks.get(block) else {
            let problem = format!("block {block} of a model of {}", self.blocks.len());
            return Err(ForwardError::Rows { row: 0, problem });
        };
        let batch = Batch::whole_sequences(length, &self.rotary, self.quantise, &layer.device());
        layer.forward(x, block, &batch, &mut History::None { length })
    }

    /// The logits of what comes out of the last block.
    ///
    /// # Errors
    /// If a device or a kernel fails.
    pub fn logits_of(&self, x: Tensor<2>) -> Result<Tensor<2>, ForwardError> {
        self.logits(self.normalised(x)?)
    }

    /// Behind the last norm, on the device of the output projection.
    fn normalised(&self, x: Tensor<2>) -> Result<Tensor<2>, ForwardError> {
        let _part = profile::part(Part::Head);
        let device = self.device();
        let x = if self.blocks.last().is_some_and(|block| block.device() != device) {
            moved(x, &device)?
        } else {
            x
        };
        Ok(ops::rms_norm(x, self.norm.gamma.val(), self.norm.epsilon as f32))
    }

    fn logits(&self, x: Tensor<2>) -> Result<Tensor<2>, ForwardError> {
        let _part = profile::part(Part::Head);
        let logits = match &self.output {
            None => self.embedding.forward(x),
            Some(output) => output.forward_rows(x, self.quantise)?,
        };
        Ok(match self.config.options.logit_divisor {
            1.0 => logits,
            divisor => logits / divisor,
        })
    }

    fn check_sequences(&self, tokens: &[u32], length: usize) -> Result<(), ForwardError> {
        self.check_tokens(tokens.iter().copied())?;
        if length == 0 || tokens.is_empty() || !tokens.len().is_multiple_of(length) {
            let problem = format!("{} tokens are not whole sequences of {length}", tokens.len());
            return Err(ForwardError::Rows { row: 0, problem });
        }
        Ok(())
    }

    fn check_tokens(&self, mut tokens: impl Iterator<Item = u32>) -> Result<(), ForwardError> {
        let vocabulary = self.embedding.args().n;
        match tokens.find(|&token| token as usize >= vocabulary) {
            None => Ok(()),
            Some(token) => Err(ForwardError::Token { token, vocabulary }),
        }
    }
}

/// An RMSNorm with these weights.
pub fn rms_norm(weight: Vec<f32>, eps: f32, device: &Device) -> RmsNorm {
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
