//! Training a BitNet from text: the same model that serves, in its training state.
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//!
//! use bitnet_burn_train::{Corpus, Event, TrainConfig, Trainer};
//! use burn::tensor::Device;
//!
//! let config = TrainConfig::default();
//! let corpus = Corpus::read(&["stories.txt".into()], config.data.documents)?;
//! let mut trainer = Trainer::start("run".as_ref(), config, &corpus, &Device::flex())?;
//! trainer.run(&AtomicBool::new(false), &mut |event| {
//!     if let Event::Evaluation { step, evaluation } = event {
//!         println!("step {step}: validation perplexity {:.3}", evaluation.perplexity());
//!     }
//! })?;
//! let model = trainer.into_model().pack()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A run lives in a directory: `config.toml`, `tokenizer.json`, `validation.jsonl`, `metrics.csv`, `loss.svg`,
//! and `checkpoints/step-*`, each of which is a Hugging Face directory that the engine (and transformers) can load, with float
//! masters (or, where these are in a file of their own, ternary values), beside the optimiser's state. A checkpoint is there as
//! a whole or not at all.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bitnet_burn_backends::ops;
use bitnet_burn_formats::random::SplitMix64;
use burn::module::{Module, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor};

use bitnet_burn::{BitNet, ForwardError, ModelConfig, names};
use bitnet_burn_engine::hf::HfWriteError;

use crate::store::{self, config_of, is_run, newest};
use crate::{Corpus, Dataset, Epoch, Metrics, MetricsRow, TrainConfig, Window};

/// Why training did not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's answer.
        error: std::io::Error,
    },
    /// A key or value that a run can't have.
    #[error("{place}: {problem}")]
    Config {
        /// The file, the key or the assignment.
        place: String,
        /// What is wrong.
        problem: String,
    },
    /// A file of text.
    #[error("{}: {problem}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
    /// The tokenizer.
    #[error("the tokenizer: {problem}")]
    Tokenizer {
        /// What is wrong.
        problem: String,
    },
    /// Too little text.
    #[error("{problem}")]
    TooLittle {
        /// How much there is, and how much is needed.
        problem: String,
    },
    /// The directory of the run.
    #[error("{}: {problem}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A checkpoint that can't be continued from.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A checkpoint that could not be written.
    #[error("the checkpoint was not written: {0}")]
    Write(#[from] HfWriteError),
    /// The loss is no longer a number.
    #[error(
        "step {step}: the loss is {loss}: training has diverged; resume from the last checkpoint, or start again \
         with a lower `optimizer.learning_rate` (it is {learning_rate:e})"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// The loss.
        loss: f32,
        /// The learning rate of the step.
        learning_rate: f64,
    },
    /// The forward pass.
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

impl TrainError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self::Io { path: path.to_owned(), action, error }
    }
}

/// The mean loss over a set of sequences.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Sum of -ln p of all tokens.
    pub nats: f64,
    /// Tokens.
    pub tokens: usize,
}

impl Evaluation {
    /// Mean -ln p of a token.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// e^loss.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }
}

/// What [`Trainer::run`] tells.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// A step is done.
    Step(&'a MetricsRow),
    /// The model was measured on the validation set.
    Evaluation {
        /// Steps done.
        step: u64,
        /// The result.
        evaluation: Evaluation,
    },
    /// A checkpoint was written.
    Checkpoint(&'a Path),
}

/// How [`Trainer::run`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Done,
    /// It was asked to stop, and wrote a checkpoint.
    Stopped,
}

/// A training run.
#[derive(Debug)]
pub struct Trainer {
    dir: PathBuf,
    /// Held as long as the run is: two processes must not write the same checkpoints.
    _lock: File,
    config: TrainConfig,
    data: Dataset,
    epoch: Epoch,
    model: BitNet,
    optimizer: Optimizer,
    /// Steps done.
    step: u64,
    metrics: Metrics,
}

/// AdamW, with weight decay for the matrices alone.
#[derive(Clone)]
struct Optimizer(ModuleOptimizer);

impl std::fmt::Debug for Optimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdamW")
    }
}

impl Optimizer {
    fn new(config: &TrainConfig, step: u64, model: &BitNet) -> Self {
        let o = &config.optimizer;
        let adam = AdamWConfig::new().with_beta_1(o.beta1).with_beta_2(o.beta2).with_epsilon(o.epsilon);
        let decaying = adam.clone().with_weight_decay(config.weight_decay(step)).build();
        let mut norms = Vectors(Vec::new());
        model.visit(&mut norms);
        let group = ParamGroup::from_ids(norms.0);
        Self(ModuleOptimizer::from(decaying).with_group(group, adam.with_weight_decay(0.0).build(), None))
    }
}

/// Collects the parameters that are vectors: the norms.
struct Vectors(Vec<ParamId>);

impl ModuleVisitor for Vectors {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if D == 1 {
            self.0.push(param.id);
        }
    }
}

/// Adds up the squares of all gradients.
struct SquareSum<'a> {
    grads: &'a GradientsParams,
    sum: f64,
}

impl ModuleVisitor for SquareSum<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id) {
            self.sum += f64::from(scalar(grad.square().sum()));
        }
    }
}

/// Multiplies all gradients.
struct Scale<'a> {
    grads: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            self.grads.register(param.id, grad * self.factor);
        }
    }
}

fn scalar(tensor: Tensor<1>) -> f32 {
    tensor.into_data().iter::<f32>().next().expect("a scalar has a value")
}

impl Trainer {
    /// Begins a run in a directory, which is made and must not hold one.
    ///
    /// # Errors
    /// If the configuration, the text or the tokenizer is wrong, or the directory can't be written.
    pub fn start(
        dir: &Path,
        config: TrainConfig,
        corpus: &Corpus,
        device: &Device,
    ) -> Result<Self, TrainError> {
        config.validate()?;
        if is_run(dir) {
            return Err(TrainError::Directory {
                path: dir.to_owned(),
                problem: "there is a training run in it; resume that, or choose another directory".into(),
            });
        }
        let data = Dataset::new(corpus, &config, None)?;
        let model_config = config.model_config(data.vocab_size, data.end_of_text);
        let in_config = |error: bitnet_burn::ConfigError| TrainError::Config {
            place: format!("`model.{}`", error.field),
            problem: error.problem,
        };
        model_config.validate().map_err(in_config)?;
        std::fs::create_dir_all(dir).map_err(TrainError::io(dir, "make the directory"))?;
        let lock = lock(dir)?;
        store::begin(dir, &config, &data)?;
        Self::fresh(dir, lock, config, data, &model_config, device)
    }

    /// Continues the run in a directory from its newest checkpoint, or from the beginning if it has none:
    /// with the same text, to the same bits as if it had never been interrupted (on the same machine with as
    /// many threads).
    ///
    /// # Errors
    /// If there is no run, a checkpoint is damaged, or the text has changed.
    pub fn resume(dir: &Path, corpus: &Corpus, device: &Device) -> Result<Self, TrainError> {
        let config = config_of(dir)?;
        config.validate()?;
        let lock = lock(dir)?;
        store::clean(dir);
        let tokenizer = dir.join(store::TOKENIZER);
        let tokenizer = std::fs::read(&tokenizer).map_err(TrainError::io(&tokenizer, "read"))?;
        let data = Dataset::new(corpus, &config, Some(tokenizer))?;
        let model_config = config.model_config(data.vocab_size, data.end_of_text);
        let Some(path) = newest(dir)? else {
            return Self::fresh(dir, lock, config, data, &model_config, device);
        };
        let state = store::State::read(&path)?;
        state.check(&path, &config, &data)?;
        let mut values = store::parameters(&path, &config)?;
        let device = device.clone().autodiff();
        let quantisation = config.model.quantisation();
        let model = BitNet::trainable(&model_config, quantisation, &device, &mut |name, shape| {
            values.take(name, shape)
        })?;
        let optimizer = Optimizer::new(&config, state.step, &model);
        let optimizer = Optimizer(optimizer.0.load_record(store::optimizer(&path)?));
        let metrics = Metrics::resume(dir, state.step)?;
        let epoch = Epoch::default();
        Ok(Self {
            dir: dir.to_owned(),
            _lock: lock,
            config,
            data,
            epoch,
            model,
            optimizer,
            step: state.step,
            metrics,
        })
    }

    fn fresh(
        dir: &Path,
        lock: File,
        config: TrainConfig,
        data: Dataset,
        model_config: &ModelConfig,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let mut random = SplitMix64::new(config.seed);
        let model = BitNet::trainable::<TrainError>(
            model_config,
            config.model.quantisation(),
            &device.clone().autodiff(),
            &mut |name, shape| Ok(initial(name, shape, &mut random)),
        )?;
        let optimizer = Optimizer::new(&config, 0, &model);
        let metrics = Metrics::resume(dir, 0)?;
        let epoch = Epoch::default();
        Ok(Self { dir: dir.to_owned(), _lock: lock, config, data, epoch, model, optimizer, step: 0, metrics })
    }

    /// The configuration of the run.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The tokens of the run.
    pub fn data(&self) -> &Dataset {
        &self.data
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// The model in its training state.
    pub fn model(&self) -> &BitNet {
        &self.model
    }

    /// Ends the run.
    pub fn into_model(self) -> BitNet {
        self.model
    }

    /// What was measured so far.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// One step of the optimiser.
    ///
    /// # Errors
    /// If the loss is not finite; the model is unchanged then.
    pub fn step(&mut self) -> Result<MetricsRow, TrainError> {
        let start = Instant::now();
        let (step, length) = (self.step, self.config.sequence_length());
        let learning_rate = self.config.learning_rate(step);
        if step > 0 && self.config.weight_decay(step) != self.config.weight_decay(step - 1) {
            let record = self.optimizer.0.to_record();
            self.optimizer = Optimizer(Optimizer::new(&self.config, step, &self.model).0.load_record(record));
        }
        let (inputs, targets) = self.data.batch(step, self.config.run.batch_size, &mut self.epoch);
        let logits = self.model.forward_sequences(&inputs, length)?;
        let loss = ops::cross_entropy(logits, &targets).mean();
        let value = scalar(loss.clone().detach());
        if !value.is_finite() {
            return Err(TrainError::Diverged { step: step + 1, loss: value, learning_rate });
        }
        let mut grads = GradientsParams::from_grads(loss.backward(), &self.model);
        let mut squares = SquareSum { grads: &grads, sum: 0.0 };
        self.model.visit(&mut squares);
        let norm = squares.sum.sqrt();
        if !norm.is_finite() {
            return Err(TrainError::Diverged { step: step + 1, loss: f32::NAN, learning_rate });
        }
        let limit = self.config.optimizer.gradient_clipping;
        if limit > 0.0 && norm > limit {
            self.model.visit(&mut Scale { grads: &mut grads, factor: limit / norm });
        }
        self.model = self.optimizer.0.step(learning_rate, self.model.clone(), grads);
        self.step += 1;
        let seconds = start.elapsed().as_secs_f64();
        Ok(MetricsRow {
            step: self.step,
            tokens: self.step * inputs.len() as u64,
            loss: f64::from(value),
            learning_rate,
            gradient_norm: norm,
            tokens_per_second: inputs.len() as f64 / seconds,
            validation_loss: None,
            validation_perplexity: None,
        })
    }

    /// Measures the model on the validation set, in its training state (or what is asked for of it:
    /// `run.evaluation_sequences`).
    ///
    /// # Errors
    /// If a forward pass fails.
    pub fn evaluate(&self) -> Result<Evaluation, TrainError> {
        let windows = self.data.validation();
        let count = match self.config.run.evaluation_sequences {
            0 => windows.len(),
            count => count.min(windows.len()),
        };
        Ok(evaluate(&self.model.valid(), &windows[..count], self.config.run.batch_size)?)
    }

    /// Writes a checkpoint, and drops those that are older than the ones to keep.
    ///
    /// # Errors
    /// If it can't be written: nothing is left of it then, and the older ones are still there.
    pub fn checkpoint(&mut self) -> Result<PathBuf, TrainError> {
        self.metrics.flush()?;
        store::write(&self.dir, &self.config, &self.data, &self.model, &self.optimizer.0, self.step)
    }

    /// Trains to the last step, with evaluations and checkpoints on the way and at the end, or until `stop`
    /// is set: then a checkpoint is written at once.
    ///
    /// # Errors
    /// If a step, an evaluation or a checkpoint fails.
    pub fn run(
        &mut self,
        stop: &AtomicBool,
        observe: &mut dyn FnMut(Event<'_>),
    ) -> Result<Outcome, TrainError> {
        let run = self.config.run.clone();
        let mut plotted = Instant::now();
        while self.step < run.steps {
            if stop.load(Ordering::Relaxed) {
                observe(Event::Checkpoint(&self.checkpoint()?));
                self.metrics.plot(&self.config.model.name)?;
                return Ok(Outcome::Stopped);
            }
            let mut row = self.step()?;
            let last = self.step == run.steps;
            if last || self.step.is_multiple_of(run.evaluate_every) {
                let evaluation = self.evaluate()?;
                row.validation_loss = Some(evaluation.loss());
                row.validation_perplexity = Some(evaluation.perplexity());
                observe(Event::Evaluation { step: self.step, evaluation });
            }
            self.metrics.add(row.clone())?;
            observe(Event::Step(&row));
            if last || plotted.elapsed() > Duration::from_secs(30) {
                self.metrics.plot(&self.config.model.name)?;
                plotted = Instant::now();
            }
            if last || self.step.is_multiple_of(run.checkpoint_every) {
                observe(Event::Checkpoint(&self.checkpoint()?));
            }
        }
        Ok(Outcome::Done)
    }
}

/// The run's lock, for as long as the file is open.
fn lock(dir: &Path) -> Result<File, TrainError> {
    let path = dir.join(".lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(TrainError::io(&path, "open"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(TrainError::Directory {
            path: dir.to_owned(),
            problem: "another process is training in it".into(),
        }),
        // A file system without locks: go without.
        Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// Initial values: norms 1, matrices uniform with a standard deviation of 1 / sqrt(K), embeddings of 0.02.
fn initial(name: &str, shape: &[usize], random: &mut SplitMix64) -> Vec<f32> {
    let [n, k] = *shape else { return vec![1.0; shape.iter().product()] };
    let deviation =
        if name == names::EMBEDDING || name == names::HEAD { 0.02 } else { 1.0 / (k as f64).sqrt() };
    let width = deviation * 12f64.sqrt();
    let mut uniform = || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
    (0..n * k).map(|_| (uniform() * width) as f32).collect()
}

/// The loss of a model, in either state, over sequences; `batch_size` of them at a time.
///
/// # Errors
/// If a forward pass fails.
pub fn evaluate(model: &BitNet, windows: &[Window], batch_size: usize) -> Result<Evaluation, ForwardError> {
    let mut evaluation = Evaluation { nats: 0.0, tokens: 0 };
    for batch in windows.chunks(batch_size.max(1)) {
        let length = batch[0].inputs.len();
        let inputs: Vec<u32> = batch.iter().flat_map(|window| window.inputs.iter().copied()).collect();
        let logits = model.forward_sequences(&inputs, length)?;
        let targets: Vec<u32> = batch
            .iter()
            .flat_map(|window| window.targets.iter().copied().chain(std::iter::repeat(0)).take(length))
            .collect();
        let losses: Vec<f32> = ops::cross_entropy(logits, &targets).into_data().iter::<f32>().collect();
        for (window, losses) in batch.iter().zip(losses.chunks(length)) {
            let counted = &losses[..window.targets.len()];
            evaluation.nats += counted.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            evaluation.tokens += counted.len();
        }
    }
    Ok(evaluation)
}
