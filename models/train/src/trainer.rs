//! Training a BitNet from text: the same model that serves, in its training state.
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//!
//! use bitnet_burn_train::{Corpus, Event, TrainConfig, Trainer};
//! use burn::tensor::Device;
//!
//! let config = TrainConfig::default();
//! let corpus = Corpus::read(&["stories.txt".into()], &config.data)?;
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

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bitnet_burn_backends::ops;
use bitnet_burn_formats::random::SplitMix64;
use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData};

use bitnet_burn::{BitNet, ForwardError, ModelConfig, names};

use crate::calibrate::{LayerFit, calibrate};
use crate::distill::Teacher;
use crate::optimizer::{Optimizer, Scale, SquareSum, scalar};
use crate::origin::{self, Origin};
use crate::store::{self, config_of, is_run, newest};
use crate::watch::{self, Sample, Samples};
use crate::{
    Batch, Corpus, Dataset, Epoch, Metrics, MetricsRow, TrainConfig, TrainError, Window, lora, recompute,
};

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
    /// The model wrote a text.
    Sample(&'a Sample),
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
    /// The validation loss no longer fell, as `run.patience` says; it wrote a checkpoint.
    Converged,
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
    teacher: Option<Teacher>,
    fits: Vec<LayerFit>,
    untrained: Option<Evaluation>,
    optimizer: Optimizer,
    /// Steps done.
    step: u64,
    metrics: Metrics,
    samples: Samples,
}

impl Trainer {
    /// Begins a run in a directory, which is made and must not hold one.
    ///
    /// # Errors
    /// If the configuration, the text, the tokenizer or a model that it names is wrong, or the directory can't be written.
    pub fn start(
        dir: &Path,
        mut config: TrainConfig,
        corpus: &Corpus,
        device: &Device,
    ) -> Result<Self, TrainError> {
        if is_run(dir) {
            return Err(TrainError::Directory {
                path: dir.to_owned(),
                problem: "there is a training run in it; resume that, or choose another directory".into(),
            });
        }
        for path in [&mut config.model.from, &mut config.distill.teacher] {
            if !path.as_os_str().is_empty() {
                *path = origin::absolute(path)?;
            }
        }
        if config.model.from.as_os_str().is_empty() {
            config.model.from = config.distill.teacher.clone();
        }
        let origin = Origin::of(&config, device)?;
        let begin = match &origin {
            None => None,
            Some(origin) => {
                let mut files = origin.tokenizer_files()?;
                let template = &config.data.chat_template;
                if !template.as_os_str().is_empty() {
                    let text = std::fs::read(template).map_err(TrainError::io(template, "read"))?;
                    files.retain(|(name, _)| name != store::CHAT_TEMPLATE);
                    files.push((store::CHAT_TEMPLATE.into(), text));
                }
                if config.lora.is_used() {
                    files.push((store::BASE.into(), origin.record()?));
                }
                Some((origin.adopt(&mut config)?, files))
            }
        };
        config.validate()?;
        let (data, model_config) = match &begin {
            None => {
                let data = Dataset::new(corpus, &config, None)?;
                let model_config = config.model_config(data.vocab_size, data.begin);
                (data, model_config)
            }
            Some((model, files)) => {
                let vocabulary = origin::vocabulary(files, config.data.task, model, &config.model.from)?;
                (Dataset::new(corpus, &config, Some(vocabulary))?, model.clone())
            }
        };
        let in_config = |error: bitnet_burn::ConfigError| TrainError::Config {
            place: format!("`model.{}`", error.field),
            problem: error.problem,
        };
        model_config.validate().map_err(in_config)?;
        if config.lora.is_used() {
            lora::parameters(&config.lora, &model_config)?;
        }
        let teacher = Teacher::of(&config, &data, &model_config, device)?;
        std::fs::create_dir_all(dir).map_err(TrainError::io(dir, "make the directory"))?;
        let lock = lock(dir)?;
        store::begin(dir, &config, &data, begin.as_ref())?;
        Self::fresh(dir, lock, (config, data, model_config), (origin, teacher), device)
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
        let (data, model_config) = match store::model_config(dir)? {
            None => {
                let data = Dataset::new(corpus, &config, Some(crate::data::separated(tokenizer)?))?;
                let model_config = config.model_config(data.vocab_size, data.begin);
                (data, model_config)
            }
            Some(model) => {
                let files = origin::files_in(dir)?;
                let vocabulary = origin::vocabulary(&files, config.data.task, &model, dir)?;
                (Dataset::new(corpus, &config, Some(vocabulary))?, model)
            }
        };
        let teacher = Teacher::of(&config, &data, &model_config, device)?;
        let frozen = match config.lora.is_used() {
            true => Origin::of(&config, device)?,
            false => None,
        };
        if let Some(origin) = &frozen {
            store::check_base(dir, origin)?;
        }
        let Some(path) = newest(dir)? else {
            let origin = match frozen {
                Some(origin) => Some(origin),
                None => Origin::of(&config, device)?,
            };
            return Self::fresh(dir, lock, (config, data, model_config), (origin, teacher), device);
        };
        let state = store::State::read(&path)?;
        state.check(&path, &config, &data)?;
        let model = match &frozen {
            Some(origin) => lora::model(origin, &config, &lora::resumed(&path, &config, &model_config)?)?,
            None => {
                let values = store::parameters(&path, &config)?;
                let (device, quantisation) = (device.clone().autodiff(), config.model.quantisation());
                BitNet::trainable(&model_config, quantisation, &device, &mut |name, shape| {
                    values.get(name, shape)
                })?
            }
        };
        let record = store::optimizer(&path)?;
        let trainer = Self::at(state.step, dir, lock, (config, data), (model, teacher))?;
        Ok(Self { optimizer: Optimizer(trainer.optimizer.0.load_record(record)), ..trainer })
    }

    /// A run in its directory after so many steps, with a new optimizer.
    fn at(
        step: u64,
        dir: &Path,
        lock: File,
        (config, data): (TrainConfig, Dataset),
        (model, teacher): (BitNet, Option<Teacher>),
    ) -> Result<Self, TrainError> {
        Ok(Self {
            dir: dir.to_owned(),
            _lock: lock,
            optimizer: Optimizer::new(&config, step, &model),
            config,
            data,
            epoch: Epoch::default(),
            model,
            teacher,
            fits: Vec::new(),
            untrained: None,
            step,
            metrics: Metrics::resume(dir, step)?,
            samples: Samples::resume(dir, step)?,
        })
    }

    fn fresh(
        dir: &Path,
        lock: File,
        (config, data, model_config): (TrainConfig, Dataset, ModelConfig),
        (origin, teacher): (Option<Origin>, Option<Teacher>),
        device: &Device,
    ) -> Result<Self, TrainError> {
        if let Some(origin) = origin.as_ref().filter(|_| config.lora.is_used()) {
            let model = lora::model(origin, &config, &lora::fresh(&config, &model_config)?)?;
            return Self::at(0, dir, lock, (config, data), (model, teacher));
        }
        let mut random = SplitMix64::new(config.seed);
        let quantisation = config.model.quantisation();
        let (mut chosen, mut fits) = (BTreeMap::new(), Vec::new());
        if let (Some(origin), Some(teacher), Some(quantisation)) = (&origin, &teacher, quantisation)
            && config.calibrates()
        {
            // The beginning of the training text.
            let text = data.batch(0, 1, &mut Epoch::default()).inputs;
            let found = calibrate((origin, &teacher.model), &model_config, quantisation, &text)?;
            (chosen, fits) = (found.values, found.fits);
            store::write_fits(dir, &fits)?;
        }
        let mut untrained = None;
        if let (Some(origin), Some(_)) = (&origin, &teacher) {
            let plain = BitNet::trainable(
                &model_config,
                quantisation,
                &device.clone().autodiff(),
                &mut |name, shape| match chosen.get(name).filter(|_| !origin.has(name)) {
                    Some(gains) => Ok(gains.clone()),
                    None if origin.has(name) => origin.values(name, shape),
                    None => Ok(vec![1.0; shape.iter().product()]),
                },
            )?;
            untrained = Some(measure(&plain.valid(), &data, &config)?);
        }
        let model = BitNet::trainable::<TrainError>(
            &model_config,
            quantisation,
            &device.clone().autodiff(),
            &mut |name, shape| match (chosen.remove(name), &origin) {
                (Some(values), _) => Ok(values),
                (None, Some(origin)) if origin.has(name) => origin.values(name, shape),
                (None, _) => Ok(initial(name, shape, &mut random)),
            },
        )?;
        Ok(Self { fits, untrained, ..Self::at(0, dir, lock, (config, data), (model, teacher))? })
    }

    /// The configuration of the run.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The tokens of the run.
    pub fn data(&self) -> &Dataset {
        &self.data
    }

    /// The number of values that are trained.
    pub fn parameters(&self) -> u64 {
        let model = self.model.config();
        match self.config.lora.is_used() {
            true => lora::parameters(&self.config.lora, model).unwrap_or_default(),
            false => model.ternary_parameters() + model.dense_parameters(),
        }
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

    /// How well the ternary weights that a distillation begins with stand for the teacher's; empty for other runs, and after
    /// resuming.
    pub fn fits(&self) -> &[LayerFit] {
        &self.fits
    }

    /// The loss of a distillation's origin on the validation set when it is made ternary by absmean, and not trained; `None` for
    /// other runs, and after resuming.
    pub fn untrained(&self) -> Option<Evaluation> {
        self.untrained
    }

    /// The loss of the teacher on the validation set, if there is one.
    ///
    /// # Errors
    /// If a forward pass fails.
    pub fn evaluate_teacher(&self) -> Result<Option<Evaluation>, TrainError> {
        self.teacher.as_ref().map(|teacher| measure(&teacher.model, &self.data, &self.config)).transpose()
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
        let step = self.step;
        let learning_rate = self.config.learning_rate(step);
        if step > 0 && self.config.weight_decay(step) != self.config.weight_decay(step - 1) {
            let record = self.optimizer.0.to_record();
            self.optimizer = Optimizer(Optimizer::new(&self.config, step, &self.model).0.load_record(record));
        }
        let quantised = self.config.quantised_share(step);
        set_share(&mut self.model, quantised);
        let batch = self.data.batch(step, self.config.run.batch_size, &mut self.epoch);
        let (losses, mut grads) = self.gradients(&batch)?;
        let diverged = |loss: f32| TrainError::Diverged {
            step: step + 1,
            loss,
            learning_rate,
            checkpoint: newest(&self.dir).unwrap_or_default(),
        };
        if !losses.objective.is_finite() {
            return Err(diverged(losses.objective as f32));
        }
        let mut squares = SquareSum { grads: &grads, sum: 0.0 };
        self.model.visit(&mut squares);
        let norm = squares.sum.sqrt();
        if !norm.is_finite() {
            return Err(diverged(f32::NAN));
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
            tokens: self.step * batch.inputs.len() as u64,
            loss: losses.text,
            divergence: losses.teacher,
            learning_rate,
            gradient_norm: norm,
            quantised,
            flipped: None,
            tokens_per_second: batch.inputs.len() as f64 / seconds,
            validation_loss: None,
            validation_perplexity: None,
        })
    }

    /// The losses of a step and their gradients, of `run.accumulate` parts of its sequences one after the other.
    fn gradients(&self, batch: &Batch) -> Result<(Losses, GradientsParams), TrainError> {
        let (length, parts) = (self.config.sequence_length(), self.config.run.accumulate);
        let rows = self.config.run.batch_size / parts * length;
        let counted = |counts: &[bool]| counts.iter().filter(|&&counts| counts).count().max(1) as f64;
        let all = batch.counts.as_deref().map(counted);
        let mut sum = Losses::default();
        let mut accumulator = GradientsAccumulator::new();
        for (part, (inputs, targets)) in batch.inputs.chunks(rows).zip(batch.targets.chunks(rows)).enumerate()
        {
            let counts = batch.counts.as_ref().map(|counts| &counts[part * rows..(part + 1) * rows]);
            // The part's share of the mean.
            let share = match (counts, all) {
                (Some(counts), Some(all)) => counted(counts) / all,
                _ => 1.0 / parts as f64,
            };
            let mean = |losses: Tensor<1>| match counts {
                None => losses.mean(),
                Some(counts) => {
                    let mask: Vec<f32> = counts.iter().map(|&counts| f32::from(u8::from(counts))).collect();
                    let mask = Tensor::from_data(TensorData::new(mask, [rows]), &losses.device());
                    (losses * mask).sum() / counted(counts)
                }
            };
            let objective = |logits: Tensor<2>| -> Result<(Tensor<1>, Losses), TrainError> {
                let options = &self.config.distill;
                let divergence = match &self.teacher {
                    Some(teacher) => {
                        let input = (inputs, length);
                        Some(mean(teacher.divergence(logits.clone(), input, options.temperature)?))
                    }
                    None => None,
                };
                let text = mean(ops::cross_entropy(logits, targets));
                let value = |loss: &Tensor<1>| f64::from(scalar(loss.clone().detach()));
                let mut losses = Losses { text: value(&text) * share, ..Losses::default() };
                let objective = match divergence {
                    Some(divergence) => {
                        losses.teacher = Some(value(&divergence) * share);
                        text * options.cross_entropy + divergence * options.logits
                    }
                    None => text,
                };
                losses.objective = value(&objective);
                Ok((if parts == 1 { objective } else { objective * share }, losses))
            };
            let (losses, grads) = if self.config.run.recompute {
                recompute::gradients(&self.model, inputs, length, objective)?
            } else {
                let (objective, losses) = objective(self.model.forward_sequences(inputs, length)?)?;
                (losses, GradientsParams::from_grads(objective.backward(), &self.model))
            };
            sum.add(losses);
            if parts == 1 {
                return Ok((sum, grads));
            }
            accumulator.accumulate(&self.model, grads);
        }
        Ok((sum, accumulator.grads()))
    }

    /// Measures the model on the validation set, quantised as it will be served (or what is asked for of it:
    /// `run.evaluation_sequences`).
    ///
    /// # Errors
    /// If a forward pass fails.
    pub fn evaluate(&self) -> Result<Evaluation, TrainError> {
        let mut model = self.model.valid();
        set_share(&mut model, 1.0);
        measure(&model, &self.data, &self.config)
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
            if self.stagnates() {
                observe(Event::Checkpoint(&self.checkpoint()?));
                self.metrics.plot(&self.config.model.name)?;
                return Ok(Outcome::Converged);
            }
            let last = self.step + 1 == run.steps;
            let evaluates = last || (self.step + 1).is_multiple_of(run.evaluate_every);
            let ternarises = self.config.model.ternary && !self.config.lora.is_used();
            let codes = (evaluates && ternarises).then(|| watch::codes(&mut self.model));
            let mut row = self.step()?;
            if evaluates {
                row.flipped = codes.map(|codes| watch::flipped(&codes, &watch::codes(&mut self.model)));
                let evaluation = self.evaluate()?;
                row.validation_loss = Some(evaluation.loss());
                row.validation_perplexity = Some(evaluation.perplexity());
                observe(Event::Evaluation { step: self.step, evaluation });
                for prompt in &run.samples {
                    let mut model = self.model.valid();
                    set_share(&mut model, 1.0);
                    let (json, begin) = (&self.data.tokenizer_json, self.data.begin);
                    let text = watch::sample(&model, json, (begin, prompt), run.sample_tokens)?;
                    let sample = Sample { step: self.step, prompt: prompt.clone(), text };
                    observe(Event::Sample(&sample));
                    self.samples.add(sample)?;
                }
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

    /// Whether the last evaluations brought no better validation loss, as many as `run.patience` says.
    fn stagnates(&self) -> bool {
        let losses: Vec<f64> = self.metrics.rows().iter().filter_map(|row| row.validation_loss).collect();
        let best = losses.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(at, _)| at);
        let patience = self.config.run.patience;
        patience > 0 && losses.len() > best && (losses.len() - 1 - best) as u64 >= patience
    }
}

/// The means of a step's tokens, in nats.
#[derive(Clone, Copy, Default)]
struct Losses {
    /// What the gradients are of.
    objective: f64,
    /// -ln p.
    text: f64,
    /// From the teacher.
    teacher: Option<f64>,
}

impl Losses {
    fn add(&mut self, other: Self) {
        self.objective += other.objective;
        self.text += other.text;
        if let Some(teacher) = other.teacher {
            *self.teacher.get_or_insert(0.0) += teacher;
        }
    }
}

/// Sets how far training quantises the projections.
fn set_share(model: &mut BitNet, share: f64) {
    for block in &mut model.blocks {
        block.projections_mut().into_iter().for_each(|(_, layer)| layer.set_quantised_share(share as f32));
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

/// The loss of a model on what a run measures of its validation set.
fn measure(model: &BitNet, data: &Dataset, config: &TrainConfig) -> Result<Evaluation, TrainError> {
    let windows = data.validation();
    let count = match config.run.evaluation_sequences {
        0 => windows.len(),
        count => count.min(windows.len()),
    };
    Ok(evaluate(model, &windows[..count], config.run.batch_size / config.run.accumulate)?)
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
            let counted = losses.iter().zip(&window.counts).filter(|&(_, counts)| *counts);
            evaluation.nats += counted.map(|(&loss, _)| f64::from(loss)).sum::<f64>();
            evaluation.tokens += window.counted();
        }
    }
    Ok(evaluation)
}
