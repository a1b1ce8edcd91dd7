//! A classifier with BitLinear layers, trained by Burn's `Learner` beside its twin of f32 layers, then packed,
//! saved and loaded.
//!
//! ```text
//! cargo run --release --example classifier --features learner
//! ```

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use bitnet_burn::{BitLinear, BitLinearConfig};
use bitnet_burn_examples::digits::{CLASSES, Digit, PIXELS, accuracy, batch, digits};
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::InMemDataset;
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::module::{Module, ModuleDisplay};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::optim::AdamWConfig;
use burn::store::{ModuleSnapshot, SafetensorsStore};
use burn::tensor::{Device, Int, Tensor, activation::relu};
use burn::train::metric::{AccuracyMetric, LossMetric, MetricDefinition, MetricId};
use burn::train::renderer::{
    EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation, MetricsRendererTraining,
};
use burn::train::{
    ClassificationOutput, InferenceStep, Learner, SupervisedTraining, TrainOutput, TrainStep,
    logger::{EvaluationProgressLogger, TrainingProgressLogger},
};

/// Three layers, ternary or f32.
#[derive(Module, Debug)]
struct Classifier<L: Layer> {
    first: L,
    second: L,
    third: L,
}

/// What the classifier asks of a layer.
trait Layer: Module + ModuleDisplay + Sync + 'static {
    fn new(inputs: usize, outputs: usize, device: &Device) -> Self;
    fn forward(&self, x: Tensor<2>) -> Tensor<2>;
}

/// With a norm before quantisation, which keeps the activations' range steady.
fn layer(inputs: usize, outputs: usize) -> BitLinearConfig {
    BitLinearConfig::new(inputs, outputs).with_norm(true)
}

impl Layer for BitLinear {
    fn new(inputs: usize, outputs: usize, device: &Device) -> Self {
        layer(inputs, outputs).init(device)
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.forward(x)
    }
}

/// The same in f32.
#[derive(Module, Debug)]
struct NormLinear {
    norm: RmsNorm,
    linear: Linear,
}

impl Layer for NormLinear {
    fn new(inputs: usize, outputs: usize, device: &Device) -> Self {
        Self {
            norm: RmsNormConfig::new(inputs).init(device),
            linear: LinearConfig::new(inputs, outputs).with_bias(false).init(device),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.linear.forward(self.norm.forward(x))
    }
}

impl<L: Layer> Classifier<L> {
    fn new(hidden: usize, device: &Device) -> Self {
        Self {
            first: L::new(PIXELS, hidden, device),
            second: L::new(hidden, hidden, device),
            third: L::new(hidden, CLASSES, device),
        }
    }

    fn forward(&self, images: Tensor<2>) -> Tensor<2> {
        self.third.forward(relu(self.second.forward(relu(self.first.forward(images)))))
    }

    fn classify(&self, Images { images, labels }: Images) -> ClassificationOutput {
        let output = self.forward(images);
        let loss = CrossEntropyLossConfig::new().init(&output.device());
        ClassificationOutput::new(loss.forward(output.clone(), labels.clone()), output, labels)
    }
}

impl Classifier<BitLinear> {
    /// For inference: 2 bits a weight.
    fn pack(self) -> anyhow::Result<Self> {
        Ok(Self { first: self.first.pack()?, second: self.second.pack()?, third: self.third.pack()? })
    }

    /// To load a file into.
    fn init_packed(hidden: usize, device: &Device) -> Self {
        let layer = |inputs, outputs| layer(inputs, outputs).init_packed(device);
        Self { first: layer(PIXELS, hidden), second: layer(hidden, hidden), third: layer(hidden, CLASSES) }
    }
}

/// A batch.
#[derive(Clone, Debug)]
struct Images {
    images: Tensor<2>,
    labels: Tensor<1, Int>,
}

struct DigitBatcher;

impl Batcher<Digit, Images> for DigitBatcher {
    fn batch(&self, digits: Vec<Digit>, device: &Device) -> Images {
        let (images, labels) = batch(&digits, device);
        Images { images, labels }
    }
}

impl<L: Layer> TrainStep for Classifier<L> {
    type Input = Images;
    type Output = ClassificationOutput;

    fn step(&self, batch: Images) -> TrainOutput<ClassificationOutput> {
        let output = self.classify(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl<L: Layer> InferenceStep for Classifier<L> {
    type Input = Images;
    type Output = ClassificationOutput;

    fn step(&self, batch: Images) -> ClassificationOutput {
        self.classify(batch)
    }
}

/// How large and how long.
#[derive(Clone, Copy)]
struct Size {
    hidden: usize,
    images: usize,
    epochs: usize,
}

const BATCH: usize = 64;

/// Trains by Burn's Learner, which keeps its logs in the directory; returns the model for inference.
fn train<L: Layer>(
    name: &'static str,
    size: Size,
    device: &Device,
    directory: &Path,
) -> anyhow::Result<Classifier<L>> {
    device.seed(42);
    let loader = |digits: Vec<Digit>| -> std::sync::Arc<dyn DataLoader<Images>> {
        DataLoaderBuilder::new(DigitBatcher)
            .batch_size(BATCH)
            .shuffle(3)
            .set_device(device.clone())
            .build(InMemDataset::new(digits))
    };
    let steps = size.epochs * size.images.div_ceil(BATCH);
    let rate = CosineAnnealingLrSchedulerConfig::new(3e-3, steps).init().map_err(anyhow::Error::msg)?;
    let model = Classifier::<L>::new(size.hidden, &device.clone().autodiff());
    let training = SupervisedTraining::new(
        directory,
        loader(digits(1, size.images)),
        loader(digits(4, size.images / 8)),
    )
    .metrics((AccuracyMetric::new(), LossMetric::new()))
    .renderer(Box::new(EpochLines { name, metrics: HashMap::new(), values: BTreeMap::new() }))
    .with_application_logger(None)
    .num_epochs(size.epochs);
    let result = training.launch(Learner::new(model, AdamWConfig::new().init(), rate));
    match result.error {
        None => Ok(result.model.valid()),
        Some(error) => Err(anyhow::anyhow!("training ended early: {error}")),
    }
}

/// Accuracy on images that training has not seen: of the f32 twin, of the ternary model as trained, packed, and
/// loaded from its file; and the size of that file.
struct Report {
    float: f32,
    ternary: f32,
    packed: f32,
    loaded: f32,
    bytes: u64,
}

fn run(size: Size, directory: &Path) -> anyhow::Result<Report> {
    let device = Device::flex();
    let (images, labels) = batch(&digits(2, 2000), &device);
    let test = |outputs: Tensor<2>| accuracy(outputs, labels.clone());

    let float: Classifier<NormLinear> = train("f32", size, &device, &directory.join("f32"))?;
    let ternary: Classifier<BitLinear> = train("ternary", size, &device, &directory.join("ternary"))?;
    println!("{ternary}");
    let packed = ternary.clone().pack()?;
    println!("{packed}");

    // Into a file and back.
    let path = directory.join("classifier.safetensors");
    packed.save_into(&mut SafetensorsStore::from_file(&path).overwrite(true))?;
    let mut loaded = Classifier::init_packed(size.hidden, &device);
    loaded.load_from(&mut SafetensorsStore::from_file(&path))?;
    let outputs = packed.forward(images.clone());
    let difference: f32 = (outputs.clone() - loaded.forward(images.clone())).abs().max().into_scalar();
    anyhow::ensure!(difference == 0.0, "the outputs of the loaded model differ by {difference}");

    Ok(Report {
        float: test(float.forward(images.clone())),
        ternary: test(ternary.forward(images.clone())),
        packed: test(outputs),
        loaded: test(loaded.forward(images)),
        bytes: std::fs::metadata(&path)?.len(),
    })
}

fn main() -> anyhow::Result<()> {
    let directory = Path::new("target/classifier");
    let size = Size { hidden: 128, images: 8000, epochs: 10 };
    let report = run(size, directory)?;
    let weights = (PIXELS + size.hidden + CLASSES) * size.hidden;
    println!("test accuracy, f32:               {:.1} %", 100.0 * report.float);
    println!("test accuracy, ternary:           {:.1} %", 100.0 * report.ternary);
    println!("test accuracy, packed:            {:.1} %", 100.0 * report.packed);
    println!("test accuracy, saved and loaded:  {:.1} %", 100.0 * report.loaded);
    println!(
        "{weights} weights: {} bytes in f32, {} in {}",
        4 * weights,
        report.bytes,
        directory.join("classifier.safetensors").display()
    );
    Ok(())
}

/// Prints a line per epoch. (Burn's own renderers are a dashboard, with its feature `tui`, and a line per batch.)
struct EpochLines {
    name: &'static str,
    metrics: HashMap<MetricId, String>,
    /// By metric, over the validation images of the epoch so far.
    values: BTreeMap<String, f64>,
}

impl MetricsRendererTraining for EpochLines {
    fn update_train(&mut self, _: MetricState) {}

    fn update_valid(&mut self, state: MetricState) {
        if let MetricState::Numeric(entry, Some(value)) = state
            && let Some(name) = self.metrics.get(&entry.metric_id)
        {
            self.values.insert(name.clone(), value.current());
        }
    }
}

impl MetricsRenderer for EpochLines {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, metric: MetricDefinition) {
        self.metrics.insert(metric.metric_id, metric.name.to_lowercase());
    }
}

impl TrainingProgressLogger for EpochLines {
    fn start(&mut self, _: usize, _: usize, _: Option<usize>, _: Option<&str>) {}

    fn update_epoch(&mut self, epoch: usize) {
        let values: Vec<String> =
            self.values.iter().map(|(name, value)| format!("{name} {value:.3}")).collect();
        println!("{}, epoch {epoch}: validation {}", self.name, values.join(", "));
    }

    fn start_split(&mut self, _: &str, _: usize) {}

    fn update_split(&mut self, _: usize) {}

    fn end_split(&mut self) {}

    fn end(&mut self) {}

    fn log_event_training(&mut self, _: String) {}
}

impl MetricsRendererEvaluation for EpochLines {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}
}

impl EvaluationProgressLogger for EpochLines {
    fn start_global_progress(&mut self, _: usize) {}

    fn start_test(&mut self, _: &str, _: usize) {}

    fn update_test_progress(&mut self, _: usize) {}

    fn end_test(&mut self) {}

    fn end_global_progress(&mut self) {}

    fn log_event_evaluation(&mut self, _: String) {}
}

#[test]
fn a_ternary_classifier_learns_and_survives_packing_and_saving() {
    let directory = tempfile::tempdir().unwrap();
    let size = Size { hidden: 64, images: 1200, epochs: 5 };
    let Report { float, ternary, packed, loaded, bytes } = run(size, directory.path()).unwrap();
    assert!(float > 0.8, "{float}");
    assert!(ternary > float - 0.1, "{ternary} of {float}");
    assert!((packed - ternary).abs() < 0.005, "{packed} of {ternary}");
    assert_eq!(loaded, packed);
    // 256 + 64 + 128 inputs (padded to 128) of 64, 64 and 10 outputs.
    assert!((7000..12_000).contains(&bytes), "{bytes}");
}
