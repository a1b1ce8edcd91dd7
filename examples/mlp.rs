//! A network of your own with BitLinear layers: trained with ternary weights by the straight-through
//! estimator, then packed into 2 bits a weight, with the same outputs up to float rounding.
//!
//! ```text
//! cargo run --release --example mlp
//! cargo run --release --example mlp --features ndarray -- ndarray
//! ```

use bitnet_burn::{BitLinear, BitLinearConfig};
use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Int, Tensor, activation::relu};

const FEATURES: usize = 784;
const HIDDEN: usize = 100;
const CLASSES: usize = 10;

/// Two BitLinear layers. The norm before quantisation keeps the activations' range steady.
#[derive(Module, Debug)]
struct Mlp {
    hidden: BitLinear,
    output: BitLinear,
}

impl Mlp {
    fn new(device: &Device) -> Self {
        Self {
            hidden: BitLinearConfig::new(FEATURES, HIDDEN).init(device),
            output: BitLinearConfig::new(HIDDEN, CLASSES).with_norm(true).init(device),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.output.forward(relu(self.hidden.forward(x)))
    }

    /// For inference: ternary codes instead of floats.
    fn pack(self) -> anyhow::Result<Self> {
        Ok(Self { hidden: self.hidden.pack()?, output: self.output.pack()? })
    }
}

/// Points around one centre per class.
fn batch(centres: &Tensor<2>, size: usize, device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
    let labels = Tensor::<1>::random([size], Distribution::Uniform(0.0, CLASSES as f64), device).int();
    let labels = labels.clamp(0, CLASSES as i64 - 1);
    let noise = Tensor::random([size, FEATURES], Distribution::Normal(0.0, 4.0), device);
    (centres.clone().select(0, labels.clone()) + noise, labels)
}

/// The share of rows whose largest output is their label's.
fn accuracy(outputs: Tensor<2>, labels: Tensor<1, Int>) -> f32 {
    outputs.argmax(1).squeeze_dim::<1>(1).equal(labels).float().mean().into_scalar()
}

fn main() -> anyhow::Result<()> {
    let device = match std::env::args().nth(1).as_deref() {
        None | Some("flex") => Device::flex(),
        #[cfg(feature = "ndarray")]
        #[allow(deprecated, reason = "Burn recommends Flex; NdArray still works")]
        Some("ndarray") => Device::ndarray(),
        Some(other) => anyhow::bail!("no device {other}; there are flex and, with its feature, ndarray"),
    };
    device.seed(42);
    let centres = Tensor::random([CLASSES, FEATURES], Distribution::Normal(0.0, 1.0), &device);

    // Train on the same device with autodiff.
    let autodiff = device.clone().autodiff();
    let mut model = Mlp::new(&autodiff);
    println!("{model}");
    let mut optimizer = AdamConfig::new().init();
    let loss = CrossEntropyLossConfig::new().init(&autodiff);
    for step in 0..=60 {
        let (x, labels) = batch(&centres, 64, &device);
        let outputs = model.forward(Tensor::from_inner(x));
        let loss = loss.forward(outputs, Tensor::from_inner(labels));
        if step % 10 == 0 {
            println!("step {step:2}: loss {:.3}", loss.clone().into_scalar::<f32>());
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(2e-3, model, gradients);
    }

    // Infer on the plain device, before and after packing.
    let trained = model.valid();
    let (x, labels) = batch(&centres, 1000, &device);
    let before = trained.forward(x.clone());
    let packed = trained.pack()?;
    println!("{packed}");
    let after = packed.forward(x);
    let difference: f32 = (before - after.clone()).abs().max().into_scalar();
    println!(
        "accuracy {:.3}; packing changed the outputs by at most {difference:e}",
        accuracy(after, labels)
    );
    Ok(())
}
