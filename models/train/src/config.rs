//! What a training run is made of: a TOML or JSON file, each key with a default, unknown keys refused.

mod lora;

use std::path::{Path, PathBuf};

pub use self::lora::LoraOptions;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use bitnet_burn::{
    ActivationRule, ConfigError, DecoderOptions, GatedActivation, ModelConfig, Quantisation, WeightScale,
};

/// A training run. The defaults are those of the model that the program carries.
///
/// ```
/// use bitnet_burn_train::TrainConfig;
///
/// let config = TrainConfig::from_toml("seed = 7\n[model]\nn_layers = 2\n")?;
/// assert_eq!((config.seed, config.model.n_layers, config.model.hidden_size), (7, 2, 256));
/// assert!(TrainConfig::from_toml("[model]\nlayers = 2\n").is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TrainConfig {
    /// Of the initial weights, the order of the text, and the choice of the validation set.
    pub seed: u64,
    /// The model.
    pub model: ModelOptions,
    /// The tokenizer.
    pub tokenizer: TokenizerOptions,
    /// The text.
    pub data: DataOptions,
    /// Learning from another model.
    pub distill: DistillOptions,
    /// Adapters in place of weights.
    pub lora: LoraOptions,
    /// AdamW and its schedule.
    pub optimizer: OptimizerOptions,
    /// Steps, evaluations and checkpoints.
    pub run: RunOptions,
}

/// The model to train. The size of the vocabulary is the tokenizer's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ModelOptions {
    /// A model to begin with, a GGUF file, a Hugging Face directory or a training run: its sizes and its tokenizer take the
    /// place of those in the configuration. Empty: from nothing.
    pub from: PathBuf,
    /// The model's name in exported files.
    pub name: String,
    /// Width of the residual stream. (I2_S files need multiples of 128.)
    pub hidden_size: usize,
    /// Width of the feed-forward layer. (The same.)
    pub intermediate_size: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head; 0: `hidden_size / n_heads`.
    pub head_dim: usize,
    /// Positions that the model can see.
    pub context_length: usize,
    /// Base of the RoPE frequencies.
    pub rope_theta: f64,
    /// Epsilon of the norms.
    pub rms_norm_eps: f32,
    /// Of the feed-forward layer: `relu2`, `silu`, `gelu` or `gelu_pytorch_tanh`.
    pub activation: GatedActivation,
    /// RMSNorm before the output and the down projections, as BitNet b1.58 2B-4T has it.
    pub sub_norms: bool,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// Ternary weights and int8 activations. `false` trains BitNet's float twin, to compare with: it can't
    /// be exported.
    pub ternary: bool,
    /// Weights that share a scale: `tensor`, `row` or `group:N`.
    pub scales: WeightScale,
    /// How activations are quantised: `model` (`row` with one scale for each tensor, else `group:32`), `row`, `group:N` or
    /// `float`.
    pub activations: ActivationRule,
    /// Steps over which quantisation is blended in, for a model that begins as floats: step i computes with i / N of it.
    /// 0: quantised from the start.
    pub quantisation_warmup: u64,
}

impl ModelOptions {
    /// How the projections are quantised; `None` for the float twin.
    pub fn quantisation(&self) -> Option<Quantisation> {
        let Self { scales: scale, activations, .. } = *self;
        self.ternary.then_some(Quantisation { scale, activations })
    }
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            from: PathBuf::new(),
            name: "bitnet-burn".into(),
            hidden_size: 256,
            intermediate_size: 640,
            n_layers: 4,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 0,
            context_length: 256,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            activation: GatedActivation::Relu2,
            sub_norms: true,
            tied_embeddings: true,
            ternary: true,
            scales: WeightScale::Tensor,
            activations: ActivationRule::Model,
            quantisation_warmup: 0,
        }
    }
}

/// Learning from another model: a student with ternary projections from a teacher of the same vocabulary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct DistillOptions {
    /// The model to learn from; empty: none. Without `model.from` the student begins with its weights.
    pub teacher: PathBuf,
    /// Whether the student gets RMSNorms before its output and down projections, as BitDistill (arXiv 2510.13998) has it.
    pub sub_norms: bool,
    /// How the first ternary weights are chosen: `calibrated` or `absmean`.
    pub initial: Initial,
    /// Weight of the loss on the text, -ln p.
    pub cross_entropy: f64,
    /// Weight of the divergence from the teacher's probabilities.
    pub logits: f64,
    /// Both models' logits are divided by this for the divergence, which is multiplied by its square.
    pub temperature: f64,
}

impl Default for DistillOptions {
    fn default() -> Self {
        Self {
            teacher: PathBuf::new(),
            sub_norms: false,
            initial: Initial::Calibrated,
            cross_entropy: 1.0,
            logits: 1.0,
            temperature: 1.0,
        }
    }
}

/// How the first ternary weights of a distillation are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Initial {
    /// With the scales that keep the outputs of each layer on the text. With a warm-up of quantisation as `Absmean`: it begins
    /// with the float weights themselves.
    #[default]
    Calibrated,
    /// As BitNet's rule makes them of the float weights.
    Absmean,
}

/// The tokenizer: a given one, or one trained on the text (byte-level BPE).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TokenizerOptions {
    /// A `tokenizer.json` with an end-of-text token; empty: train one.
    pub file: PathBuf,
    /// Size of a trained one: 257 to 65536. (It is smaller if the text has fewer pairs to merge.)
    pub vocab_size: usize,
}

impl Default for TokenizerOptions {
    fn default() -> Self {
        Self { file: PathBuf::new(), vocab_size: 1024 }
    }
}

/// How files of plain text are cut into documents. JSON Lines and Parquet have one in every row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Documents {
    /// A file is a document.
    #[default]
    File,
    /// A paragraph is: empty lines separate them.
    Paragraph,
    /// A line is.
    Line,
}

/// The text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct DataOptions {
    /// What is learned: `text`, or conversations (`sft`), of which the assistant's part counts.
    pub task: Task,
    /// The Jinja template of conversations, for a model that has none; empty: the model's own.
    pub chat_template: PathBuf,
    /// How plain text is cut into documents: `file`, `paragraph` or `line`.
    pub documents: Documents,
    /// The key in JSON Lines and the column in Parquet. Empty: `text`, and for conversations `messages`, a list of objects
    /// with `role` and `content`.
    pub column: String,
    /// Rows of JSON Lines and Parquet that may be left out because they hold no text.
    pub bad_rows: u64,
    /// The shares in which sequences are drawn from the sources of text, a number for each; empty: each document once an
    /// epoch.
    pub weights: Vec<f64>,
    /// The share of the documents that is kept for validation, above 0 and up to 0.5. Of fewer than 20
    /// documents, it is the last part of each. Unused where there is text for validation.
    pub validation: f64,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            task: Task::Text,
            chat_template: PathBuf::new(),
            documents: Documents::File,
            column: String::new(),
            bad_rows: 0,
            weights: Vec::new(),
            validation: 0.02,
        }
    }
}

impl DataOptions {
    /// The key of documents in JSON Lines, and the column in Parquet.
    pub fn column(&self) -> &str {
        match (&self.column[..], self.task) {
            ("", Task::Text) => "text",
            ("", Task::Sft) => "messages",
            (column, _) => column,
        }
    }
}

/// What is learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Text: each token.
    #[default]
    Text,
    /// Conversations: what the assistant says.
    Sft,
}

/// AdamW with the two stages of the BitNet b1.58 reports ("The Era of 1-bit LLMs: Training Tips, Code and
/// FAQ"; arXiv 2504.12285, section 3): a high learning rate, which falls linearly; half-way it drops to
/// `second_stage` of what it was at the start and falls from there to `final_learning_rate`, and weight
/// decay is switched off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct OptimizerOptions {
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Learning rate at the start of the second half, as a share of `learning_rate`. At most 1.
    pub second_stage: f64,
    /// Learning rate of the last step.
    pub final_learning_rate: f64,
    /// Steps over which the learning rate rises from 0.
    pub warmup_steps: u64,
    /// Weight decay of the matrices in the first half. Norms have none.
    pub weight_decay: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// The largest norm of all gradients together; larger ones are scaled down. 0: no limit.
    pub gradient_clipping: f64,
}

impl Default for OptimizerOptions {
    fn default() -> Self {
        Self {
            learning_rate: 4e-3,
            second_stage: 0.5,
            final_learning_rate: 1e-5,
            warmup_steps: 100,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            gradient_clipping: 1.0,
        }
    }
}

/// Steps, evaluations and checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RunOptions {
    /// Steps of the optimiser.
    pub steps: u64,
    /// Sequences a step.
    pub batch_size: usize,
    /// Parts of a step's sequences that are computed one after the other, to save memory. It divides `batch_size`.
    pub accumulate: usize,
    /// Whether the backward pass computes each block again, so that only the blocks' inputs are kept: less memory for a third
    /// more time, and the same gradients.
    pub recompute: bool,
    /// Tokens of a sequence; 0: the model's context.
    pub sequence_length: usize,
    /// Steps between evaluations on the validation set.
    pub evaluate_every: u64,
    /// Sequences of the validation set that an evaluation looks at; 0: all.
    pub evaluation_sequences: usize,
    /// Evaluations without a better validation loss after which the run ends; 0: never.
    pub patience: u64,
    /// Prompts that the model continues at each evaluation.
    pub samples: Vec<String>,
    /// Tokens that it writes.
    pub sample_tokens: usize,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Checkpoints that are kept, the newest ones.
    pub keep: usize,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            steps: 1500,
            batch_size: 16,
            accumulate: 1,
            recompute: false,
            sequence_length: 0,
            evaluate_every: 100,
            evaluation_sequences: 128,
            patience: 0,
            samples: Vec::new(),
            sample_tokens: 40,
            checkpoint_every: 250,
            keep: 2,
        }
    }
}

impl TrainConfig {
    /// Reads a `.toml` or `.json` file.
    ///
    /// # Errors
    /// If it can't be read, is not of its kind, or has keys or values that a run can't have.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(path).map_err(TrainError::io(path, "read"))?;
        let wrong = |problem: String| TrainError::Config { place: path.display().to_string(), problem };
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => Self::from_toml(&text).map_err(wrong),
            Some("json") => serde_json::from_str(&text).map_err(|error| wrong(error.to_string())),
            _ => Err(wrong("a configuration is a .toml or a .json file".into())),
        }
    }

    /// Parses TOML.
    ///
    /// # Errors
    /// What is wrong, with the line.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    /// The configuration as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("plain tables of numbers and texts")
    }

    /// Changes one value: `run.steps=100`, `model.activation=silu`.
    ///
    /// # Errors
    /// If there is no such key, or it can't have that value.
    pub fn set(&mut self, assignment: &str) -> Result<(), TrainError> {
        let wrong = |problem: String| TrainError::Config { place: assignment.to_owned(), problem };
        let Some((key, value)) = assignment.split_once('=') else {
            return Err(wrong("give a key and its value, such as run.steps=100".into()));
        };
        let (key, value) = (key.trim(), value.trim());
        let mut table = toml::Table::try_from(&*self).expect("as in to_toml");
        let mut entry = &mut table;
        let mut parts = key.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                if !entry.contains_key(part) {
                    return Err(wrong(format!("there is no key `{key}`")));
                }
                // Numbers, true and false are such; everything else is text.
                let parsed = toml::from_str::<toml::Table>(&format!("v = {value}")).ok();
                let parsed = parsed.and_then(|mut table| table.remove("v"));
                entry.insert(part.into(), parsed.unwrap_or_else(|| toml::Value::String(value.into())));
                break;
            }
            match entry.get_mut(part) {
                Some(toml::Value::Table(inner)) => entry = inner,
                _ => return Err(wrong(format!("there is no section `{part}`"))),
            }
        }
        *self = table.try_into().map_err(|error: toml::de::Error| wrong(error.message().to_owned()))?;
        Ok(())
    }

    /// Tokens of a sequence.
    pub fn sequence_length(&self) -> usize {
        match self.run.sequence_length {
            0 => self.model.context_length,
            length => length,
        }
    }

    /// The model's configuration, with a tokenizer's vocabulary.
    pub fn model_config(&self, vocab_size: usize, end_of_text: u32) -> ModelConfig {
        let m = &self.model;
        let head_dim = if m.head_dim == 0 { m.hidden_size / m.n_heads.max(1) } else { m.head_dim };
        ModelConfig {
            architecture: "bitnet".into(),
            name: Some(m.name.clone()),
            hidden_size: m.hidden_size,
            intermediate_size: m.intermediate_size,
            n_layers: m.n_layers,
            n_heads: m.n_heads,
            n_kv_heads: m.n_kv_heads,
            head_dim,
            vocab_size,
            context_length: m.context_length,
            rope_theta: m.rope_theta,
            rms_norm_eps: m.rms_norm_eps,
            activation: m.activation,
            sub_norms: m.sub_norms,
            tied_embeddings: m.tied_embeddings,
            bos_token: Some(end_of_text),
            eos_tokens: vec![end_of_text],
            options: DecoderOptions::default(),
        }
    }

    /// Checks everything that does not need the text.
    ///
    /// # Errors
    /// The first value that a run can't have.
    pub fn validate(&self) -> Result<(), TrainError> {
        let fail =
            |key: &str, problem: String| Err(TrainError::Config { place: format!("`{key}`"), problem });
        let (run, optimizer) = (&self.run, &self.optimizer);
        for (key, value) in [
            ("run.steps", run.steps),
            ("run.batch_size", run.batch_size as u64),
            ("run.accumulate", run.accumulate as u64),
            ("run.evaluate_every", run.evaluate_every),
            ("run.checkpoint_every", run.checkpoint_every),
            ("run.keep", run.keep as u64),
        ] {
            if value == 0 {
                return fail(key, "is 0; it must be at least 1".into());
            }
        }
        if !run.batch_size.is_multiple_of(run.accumulate) {
            let problem = format!(
                "is {}, which does not divide the {} sequences of a step",
                run.accumulate, run.batch_size
            );
            return fail("run.accumulate", problem);
        }
        let (length, context) = (self.sequence_length(), self.model.context_length);
        if length < 2 || length > context {
            return fail(
                "run.sequence_length",
                format!("is {length}; it must lie between 2 and `model.context_length`, {context}"),
            );
        }
        if run.batch_size.checked_mul(length).is_none_or(|tokens| tokens > 1 << 24) {
            return fail("run.batch_size", format!("is {}, too many sequences of {length}", run.batch_size));
        }
        if self.tokenizer.file.as_os_str().is_empty() && !(257..=65536).contains(&self.tokenizer.vocab_size) {
            let problem = format!("is {}; it must lie between 257 and 65536", self.tokenizer.vocab_size);
            return fail("tokenizer.vocab_size", problem);
        }
        if !(self.data.validation > 0.0 && self.data.validation <= 0.5) {
            let problem = format!("is {}; it must be above 0 and at most 0.5", self.data.validation);
            return fail("data.validation", problem);
        }
        if !self.model.from.as_os_str().is_empty() && !self.tokenizer.file.as_os_str().is_empty() {
            return fail("tokenizer.file", "is set; a run from a model keeps the model's tokenizer".into());
        }
        if self.data.task == Task::Sft && self.model.from.as_os_str().is_empty() {
            return fail(
                "data.task",
                "is sft; conversations need a model to begin with (`model.from`)".into(),
            );
        }
        if let Some(weight) = self.data.weights.iter().find(|w| !(w.is_finite() && **w > 0.0)) {
            return fail("data.weights", format!("has {weight}; weights are finite and above 0"));
        }
        for (key, value, max) in [
            ("optimizer.learning_rate", optimizer.learning_rate, 1.0),
            ("optimizer.second_stage", optimizer.second_stage, 1.0),
            ("optimizer.final_learning_rate", optimizer.final_learning_rate, optimizer.learning_rate),
            ("optimizer.weight_decay", f64::from(optimizer.weight_decay), 10.0),
            ("optimizer.beta1", f64::from(optimizer.beta1), 0.9999),
            ("optimizer.beta2", f64::from(optimizer.beta2), 0.99999),
            ("optimizer.epsilon", f64::from(optimizer.epsilon), 1.0),
            ("optimizer.gradient_clipping", optimizer.gradient_clipping, 1e9),
            ("distill.cross_entropy", self.distill.cross_entropy, 1e6),
            ("distill.logits", self.distill.logits, 1e6),
            ("distill.temperature", self.distill.temperature, 1e3),
        ] {
            if !(0.0..=max).contains(&value) {
                return fail(key, format!("is {value}; it must lie between 0 and {max}"));
            }
        }
        if optimizer.learning_rate == 0.0 {
            return fail("optimizer.learning_rate", "is 0; nothing would be learned".into());
        }
        if self.distill.temperature == 0.0 {
            return fail("distill.temperature", "is 0; logits are divided by it".into());
        }
        if self.distill.cross_entropy + self.distill.logits == 0.0 {
            return fail(
                "distill.logits",
                "and `distill.cross_entropy` are 0; nothing would be learned".into(),
            );
        }
        if optimizer.epsilon == 0.0 {
            return fail("optimizer.epsilon", "is 0; a step could divide by zero".into());
        }
        self.lora.check(self)?;
        let model = self.model_config(2, 0);
        let wrong =
            |key: &str, problem: String| TrainError::Config { place: format!("`model.{key}`"), problem };
        model.validate().map_err(|ConfigError { field, problem, .. }| wrong(field, problem))?;
        let default = Quantisation::default();
        match self.model.quantisation() {
            Some(quantisation) => {
                quantisation.check_model(&model).map_err(|ConfigError { field, problem, .. }| {
                    wrong(if field == "scale" { "scales" } else { field }, problem)
                })
            }
            None if self.model.scales != default.scale => {
                fail("model.scales", format!("is {}; the float twin has none", self.model.scales))
            }
            None if self.model.activations != default.activations => {
                let found = self.model.activations;
                fail("model.activations", format!("is {found}; the float twin's are floats"))
            }
            None => Ok(()),
        }
    }

    /// The learning rate of a step, from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let (o, steps) = (&self.optimizer, self.run.steps as f64);
        if step < o.warmup_steps {
            return o.learning_rate * (step + 1) as f64 / o.warmup_steps as f64;
        }
        let rest = 1.0 - step as f64 / steps;
        let peak =
            if self.second_stage(step) { 2.0 * o.second_stage * o.learning_rate } else { o.learning_rate };
        // The first stage falls as if it were to end with the run; the second one begins half-way.
        (peak * rest).max(o.final_learning_rate)
    }

    /// How far a step quantises, from 0: lambda = min(step / N, 1), as in the warm-up of Llama3-8B-1.58 (Hugging Face,
    /// "Fine-tuning LLMs to 1.58bit").
    pub fn quantised_share(&self, step: u64) -> f64 {
        match self.model.quantisation_warmup {
            0 => 1.0,
            warmup => (step as f64 / warmup as f64).min(1.0),
        }
    }

    /// Whether a run chooses its first scales by the outputs of the layers.
    pub(crate) fn calibrates(&self) -> bool {
        let d = &self.distill;
        d.initial == Initial::Calibrated
            && self.model.quantisation_warmup == 0
            && d.teacher == self.model.from
    }

    /// Whether a step is in the second half.
    pub fn second_stage(&self, step: u64) -> bool {
        step * 2 >= self.run.steps
    }

    /// The weight decay of a step.
    pub fn weight_decay(&self, step: u64) -> f32 {
        if self.second_stage(step) { 0.0 } else { self.optimizer.weight_decay }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_toml_and_json() {
        let mut config = TrainConfig::default();
        config.set("model.activation=silu").unwrap();
        config.set("optimizer.learning_rate = 0.001").unwrap();
        config.set("tokenizer.file=a/b.json").unwrap();
        config.set("run.steps=10").unwrap();
        config.set("model.scales=group:64").unwrap();
        config.set("model.activations=float").unwrap();
        assert_eq!((config.model.activation, config.run.steps), (GatedActivation::Silu, 10));
        let quantisation = Quantisation { scale: WeightScale::Group(64), activations: ActivationRule::Float };
        assert_eq!(config.model.quantisation(), Some(quantisation));
        assert_eq!(TrainConfig::from_toml(&config.to_toml()).unwrap(), config);
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<TrainConfig>(&json).unwrap(), config);
    }

    #[test]
    fn what_a_run_cannot_have_is_named() {
        let refuse = |assignment: &str| {
            let mut config = TrainConfig::default();
            let result = config.set(assignment).and_then(|()| config.validate());
            result.unwrap_err().to_string()
        };
        for (assignment, expected) in [
            ("run.steps=0", "run.steps"),
            ("run.step=5", "run.step"),
            ("runs.steps=5", "runs"),
            ("run.steps", "key and its value"),
            ("run.steps=many", "u64"),
            ("run.sequence_length=257", "256"),
            ("model.n_kv_heads=3", "n_kv_heads"),
            ("model.activation=tanh", "relu2"),
            ("model.scales=group:96", "32, 64, 128 or 256"),
            ("model.scales=group:256", "does not divide rows of 640 weights (down projections [256, 640])"),
            ("model.activations=int8", "model, row, group:N, float"),
            ("data.validation=0.9", "0.5"),
            ("data.documents=page", "paragraph"),
            ("data.weights=[1, 0]", "above 0"),
            ("data.weights=1", "sequence"),
            ("data.bad_rows=-1", "data.bad_rows"),
            ("data.task=sft", "model.from"),
            ("lora.rank=4", "model.from"),
            ("lora.alpha=4", "`lora.rank`: is 0"),
            ("distill.temperature=0", "divided by it"),
            ("distill.initial=best", "calibrated"),
            ("run.accumulate=3", "does not divide the 16"),
            ("tokenizer.vocab_size=100", "257"),
            ("optimizer.learning_rate=nan", "learning_rate"),
            ("optimizer.learning_rate=0", "learning_rate"),
            ("optimizer.second_stage=1.5", "second_stage"),
        ] {
            let message = refuse(assignment);
            assert!(message.contains(expected), "{assignment}: {message}");
        }
    }

    #[test]
    fn scales_and_activations_must_fit_together() {
        let mut config = TrainConfig::default();
        config.set("model.scales=group:64").unwrap();
        config.validate().unwrap();
        config.set("model.activations=row").unwrap();
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains("`model.activations`") && error.contains("use group:64"), "{error}");
        config.set("model.activations=model").unwrap();
        config.set("model.ternary=false").unwrap();
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains("`model.scales`") && error.contains("float twin"), "{error}");
    }

    #[test]
    fn the_schedule_has_two_stages() {
        let mut config = TrainConfig::default();
        config.set("run.steps=1000").unwrap();
        config.set("optimizer.learning_rate=1.0").unwrap();
        config.set("optimizer.second_stage=0.4").unwrap();
        let rate = |step| config.learning_rate(step);
        assert!((rate(0) - 0.01).abs() < 1e-9 && (rate(99) - 1.0).abs() < 1e-9);
        assert!((rate(250) - 0.75).abs() < 1e-9 && (rate(499) - 0.501).abs() < 1e-9);
        assert!((rate(500) - 0.4).abs() < 1e-9 && (rate(750) - 0.2).abs() < 1e-9);
        assert_eq!((config.weight_decay(499), config.weight_decay(500)), (0.1, 0.0));
        assert_eq!(rate(999).max(1e-5), rate(999));
    }
}
