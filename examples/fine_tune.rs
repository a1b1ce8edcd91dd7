//! An existing model made ternary: its `Linear` layers become `BitLinear` layers of the same weights. That costs
//! accuracy, and a little training with ternary weights in the loop (quantisation-aware fine-tuning) brings it
//! back.
//!
//! ```text
//! cargo run --release --example fine_tune
//! ```

use bitnet_burn::BitLinear;
use bitnet_burn_examples::digits::{CLASSES, Digit, PIXELS, accuracy, batch, digits};
use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor, activation::relu};

/// The model as it was: three linear layers.
#[derive(Module, Debug)]
struct Mlp {
    first: Linear,
    second: Linear,
    third: Linear,
}

/// The same model with ternary weights.
#[derive(Module, Debug)]
struct BitMlp {
    first: BitLinear,
    second: BitLinear,
    third: BitLinear,
}

impl Mlp {
    fn new(hidden: usize, device: &Device) -> Self {
        Self {
            first: LinearConfig::new(PIXELS, hidden).init(device),
            second: LinearConfig::new(hidden, hidden).init(device),
            third: LinearConfig::new(hidden, CLASSES).init(device),
        }
    }

    /// The conversion: every layer keeps its weights and its bias, and sees them as ternary from now on.
    fn into_ternary(self) -> anyhow::Result<BitMlp> {
        Ok(BitMlp {
            first: BitLinear::from_linear(self.first)?,
            second: BitLinear::from_linear(self.second)?,
            third: BitLinear::from_linear(self.third)?,
        })
    }
}

impl BitMlp {
    /// For inference: 2 bits a weight.
    fn pack(self) -> anyhow::Result<Self> {
        Ok(Self { first: self.first.pack()?, second: self.second.pack()?, third: self.third.pack()? })
    }
}

/// What training and testing need of both.
trait Classify: Module {
    fn classify(&self, images: Tensor<2>) -> Tensor<2>;
}

impl Classify for Mlp {
    fn classify(&self, images: Tensor<2>) -> Tensor<2> {
        let hidden = relu(self.second.forward(relu(self.first.forward(images))));
        self.third.forward(hidden)
    }
}

impl Classify for BitMlp {
    fn classify(&self, images: Tensor<2>) -> Tensor<2> {
        let hidden = relu(self.second.forward(relu(self.first.forward(images))));
        self.third.forward(hidden)
    }
}

/// Trains on the device with autodiff, which the model is on.
fn train<M: Classify>(mut model: M, digits: &[Digit], epochs: usize, device: &Device) -> M {
    let mut optimizer = AdamConfig::new().init();
    let loss = CrossEntropyLossConfig::new().init(device);
    let batches: Vec<_> = digits.chunks(64).map(|digits| batch(digits, device)).collect();
    let steps = epochs * batches.len();
    for step in 0..steps {
        let (images, labels) = batches[step % batches.len()].clone();
        let loss = loss.forward(model.classify(images), labels);
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        // Falls to zero: codes that would still flip settle.
        let rate = 1e-3 * (1.0 - step as f64 / steps as f64);
        model = optimizer.step(rate, model, gradients);
    }
    model
}

/// Accuracy at every stage, and the share of test images for which packing did not change the answer.
struct Report {
    float: f32,
    converted: f32,
    tuned: f32,
    packed: f32,
    agreement: f32,
}

fn run(hidden: usize, images: usize, [epochs, tuning_epochs]: [usize; 2]) -> anyhow::Result<Report> {
    let device = Device::flex();
    let autodiff = device.clone().autodiff();
    device.seed(42);
    let training = digits(1, images);
    let (images, labels) = batch(&digits(2, 2000), &device);

    let float = train(Mlp::new(hidden, &autodiff), &training, epochs, &autodiff);
    let converted = float.clone().into_ternary()?;
    let tuned = train(converted.clone(), &training, tuning_epochs, &autodiff);

    // `valid` leaves autodiff: testing is inference.
    let outputs = tuned.valid().classify(images.clone());
    let packed = tuned.valid().pack()?.classify(images.clone());
    let answers = outputs.clone().argmax(1).squeeze_dim::<1>(1);
    Ok(Report {
        float: accuracy(float.valid().classify(images.clone()), labels.clone()),
        converted: accuracy(converted.valid().classify(images), labels.clone()),
        tuned: accuracy(outputs, labels.clone()),
        packed: accuracy(packed.clone(), labels),
        agreement: accuracy(packed, answers),
    })
}

fn main() -> anyhow::Result<()> {
    let report = run(128, 8000, [10, 5])?;
    println!("{:.1} %  f32, after 10 epochs", 100.0 * report.float);
    println!("{:.1} %  its layers made ternary", 100.0 * report.converted);
    println!("{:.1} %  after 5 epochs of training with ternary weights", 100.0 * report.tuned);
    println!("{:.1} %  packed into 2 bits a weight", 100.0 * report.packed);
    // Float rounding can move an activation over a rounding boundary of int8.
    println!("         with the same answer for {:.2} % of the images", 100.0 * report.agreement);
    Ok(())
}

#[test]
fn fine_tuning_repairs_what_ternary_weights_break() {
    let Report { float, converted, tuned, packed, agreement } = run(64, 1600, [8, 4]).unwrap();
    assert!(float > 0.8, "{float}");
    assert!(converted < float - 0.05, "{converted} of {float}");
    assert!(tuned > converted + 0.02 && tuned > float - 0.1, "{tuned} after {converted}, of {float}");
    assert!(agreement > 0.995 && (packed - tuned).abs() < 0.005, "{packed} for {tuned}, {agreement} agree");
}
