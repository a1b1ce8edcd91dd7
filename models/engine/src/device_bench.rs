//! Measures a GPU in detail: its memory bandwidth and, for the shapes of a model, the time of every kernel and of every
//! operation of a layer. Results are compared with the CPU's before anything is timed.

use std::fmt;

use bitnet_burn_backends::measure::{self, Effort};
use bitnet_burn_backends::ops::{self, BitLinearInput, TernaryMatrix};
use bitnet_burn_formats::canonical;
use bitnet_burn_formats::random::SplitMix64;
use burn::module::Param;
use burn::tensor::{Device, Distribution, Tensor};
use serde::{Deserialize, Serialize};

use crate::bench::Spread;
use crate::text::{count, human_bytes, human_seconds};
use bitnet_burn::BitLinear;
use bitnet_burn::ModelConfig;
use bitnet_burn::Projection;

/// What [`run`] measures.
#[derive(Clone, Debug)]
pub struct DeviceBenchOptions {
    /// Rows of activations: 1 stands for decode, many for a prompt.
    pub rows: Vec<usize>,
    /// Size in bytes of the buffer that measures the bandwidth: many times the size of the caches.
    pub read_bytes: u64,
    /// How long and how often things are measured.
    pub effort: Effort,
}

impl Default for DeviceBenchOptions {
    fn default() -> Self {
        let effort = Effort { repetitions: 7, seconds: 0.02, rotated_bytes: 256 << 20 };
        Self { rows: vec![1, 512], read_bytes: 512 << 20, effort }
    }
}

impl DeviceBenchOptions {
    /// Small sizes, to test that everything works. The figures mean little.
    pub fn quick() -> Self {
        let effort = Effort { repetitions: 2, seconds: 0.001, rotated_bytes: 1 << 20 };
        Self { rows: vec![1, 17], read_bytes: 8 << 20, effort }
    }
}

/// The time of one kernel for one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatmulTime {
    /// Rows of activations.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// `plugin/kernel`.
    pub kernel: String,
    /// Bytes of the weights in the kernel's layout.
    pub weight_bytes: u64,
    /// Seconds per launch; absent if there is a problem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<Spread>,
    /// Bytes of the weights over the median time, as a fraction of the read bandwidth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction_of_bandwidth: Option<f64>,
    /// 10^9 multiply-adds a second, from the median time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multiply_adds_g_per_s: Option<f64>,
    /// Why it was not timed: it can't run, or its results are wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The time of a layer's operation as models call it: quantisation, and the chosen kernels of its matrices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationTime {
    /// The projections that share their activations: `q/k/v`, `o`, `gate/up`, `down`.
    pub projections: String,
    /// Rows of activations.
    pub m: usize,
    /// Output features of each projection.
    pub n: Vec<usize>,
    /// Input features.
    pub k: usize,
    /// Bytes of all weights in the canonical layout.
    pub weight_bytes: u64,
    /// Seconds per call.
    pub seconds: Spread,
    /// Bytes of the weights over the median time, as a fraction of the read bandwidth.
    pub fraction_of_bandwidth: f64,
}

/// The speed of an operation in elements a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ElementRate {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Elements a second.
    pub elements_per_s: Spread,
}

/// The results of [`run`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceBench {
    /// 10^9 bytes a second that the device reads from its memory.
    pub read_gb_per_s: f64,
    /// Size in bytes of the buffer that was read.
    pub read_buffer_bytes: u64,
    /// Number of kernel launches whose outputs equal the CPU's.
    pub kernels_right: usize,
    /// Number of outputs that were compared.
    pub outputs_compared: u64,
    /// Each kernel on each matrix of a layer.
    pub matmuls: Vec<MatmulTime>,
    /// Each operation of a layer.
    pub operations: Vec<OperationTime>,
    /// Quantising activations to int8 on the device.
    pub quantise: ElementRate,
    /// Packing latent weights on the device: [`BitLinear::pack`], where the host does most of the work.
    pub pack: ElementRate,
    /// Decode speed of the whole model as a fraction of the bandwidth's limit, if it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_fraction_of_bandwidth: Option<f64>,
}

/// The projections that share their activations.
fn operations_of(config: &ModelConfig) -> [(&'static str, Vec<Projection>); 4] {
    let [q, k, v, o, gate, up, down] = Projection::kinds(config);
    [("q/k/v", vec![q, k, v]), ("o", vec![o]), ("gate/up", vec![gate, up]), ("down", vec![down])]
}

/// Why [`run`] failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot measure the device: {0}")]
pub struct DeviceBenchError(String);

/// Measures a GPU with the shapes of a model. Many launches are timed together, between two waits, and medians are used.
///
/// # Errors
/// If the device is not a GPU, or fails.
pub fn run(
    device: &Device,
    config: &ModelConfig,
    options: &DeviceBenchOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<DeviceBench, DeviceBenchError> {
    let effort = &options.effort;
    let operations_of = operations_of(config);
    let mut shapes = Projection::kinds(config).map(|projection| projection.shape(config)).to_vec();
    shapes.sort_unstable();
    shapes.dedup();
    let steps = 3 + options.rows.len() * (shapes.len() + operations_of.len());
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress(done, steps);
    };

    let read_gb_per_s = measure::read_gb_per_s(device, options.read_bytes).map_err(DeviceBenchError)?;
    step();
    let fraction = |bytes: u64, seconds: f64| bytes as f64 / seconds / (read_gb_per_s * 1e9);
    let mut matmuls = Vec::new();
    let (mut kernels_right, mut outputs_compared) = (0, 0);
    for &m in &options.rows {
        for &(n, k) in &shapes {
            for time in measure::matmul(device, (m, n, k), effort).map_err(DeviceBenchError)? {
                let seconds = time.seconds.as_ref().ok().and_then(|seconds| Spread::of(seconds));
                if seconds.is_some() {
                    kernels_right += 1;
                    outputs_compared += (m * n) as u64;
                }
                matmuls.push(MatmulTime {
                    m,
                    n,
                    k,
                    kernel: time.kernel,
                    weight_bytes: time.weight_bytes,
                    seconds,
                    fraction_of_bandwidth: seconds.map(|s| fraction(time.weight_bytes, s.median)),
                    multiply_adds_g_per_s: seconds.map(|s| (m * n * k) as f64 / s.median / 1e9),
                    problem: time.seconds.err(),
                });
            }
            step();
        }
    }
    let mut operations = Vec::new();
    for (name, projections) in operations_of {
        let shapes: Vec<_> = projections.iter().map(|projection| projection.shape(config)).collect();
        for &m in &options.rows {
            operations.push(operation(device, name, m, &shapes, effort, &fraction)?);
            step();
        }
    }
    let (rows, columns) = (options.rows.iter().copied().max().unwrap_or(1), config.hidden_size);
    let rate = |rows: usize, columns: usize, seconds: &[f64]| {
        let rates: Vec<f64> = seconds.iter().map(|seconds| (rows * columns) as f64 / seconds).collect();
        let elements_per_s =
            Spread::of(&rates).ok_or_else(|| DeviceBenchError("the clock measured no time".into()))?;
        Ok(ElementRate { rows, columns, elements_per_s })
    };
    let seconds = measure::quantise(device, (rows, columns), effort).map_err(DeviceBenchError)?;
    let quantise = rate(rows, columns, &seconds)?;
    step();
    let [.., down] = Projection::kinds(config);
    let (n, k) = down.shape(config);
    let pack = rate(n, k, &pack_seconds(device, n, k, effort)?)?;
    step();
    Ok(DeviceBench {
        read_gb_per_s,
        read_buffer_bytes: options.read_bytes,
        kernels_right,
        outputs_compared,
        matmuls,
        operations,
        quantise,
        pack,
        decode_fraction_of_bandwidth: None,
    })
}

fn wait(device: &Device) -> Result<(), String> {
    device.sync().map_err(|error| error.to_string())
}

/// Measures one operation. It rotates through copies of its weights, so that no cache holds them.
fn operation(
    device: &Device,
    name: &str,
    m: usize,
    shapes: &[(usize, usize)],
    effort: &Effort,
    fraction: &dyn Fn(u64, f64) -> f64,
) -> Result<OperationTime, DeviceBenchError> {
    let error_of = |error: &dyn fmt::Display| DeviceBenchError(error.to_string());
    let k = shapes[0].1;
    let bytes: usize = shapes.iter().map(|&(n, k)| n * canonical::row_bytes(k)).sum();
    let copies = if m > 4 { 1 } else { (effort.rotated_bytes / bytes.max(1)).clamp(1, 64) };
    let mut random = SplitMix64::new(7);
    let matrices: Vec<Vec<TernaryMatrix>> = (0..copies)
        .map(|_| {
            let matrix = |&(n, k): &(usize, usize)| {
                TernaryMatrix::prepared(random.weights(n, k).into(), 0.021, n, k, device)
            };
            shapes.iter().map(matrix).collect::<Result<_, _>>().map_err(|error| error_of(&error))
        })
        .collect::<Result<_, _>>()?;
    let x = Tensor::<2>::random([m, k], Distribution::Uniform(-1.0, 1.0), device);
    let call = |i: usize| {
        let input = BitLinearInput { norm: None, quantise: true };
        ops::bit_linear(x.clone(), input, matrices[i % copies].clone())
    };
    // The first call compiles, compares and chooses kernels, and reports their errors.
    call(0).map_err(|error| error_of(&error))?.try_into_data().map_err(|error| error_of(&error))?;
    let mut failed = None;
    let timed = effort.time(|i| failed = failed.take().or(call(i).err()), || wait(device));
    if let Some(error) = failed {
        return Err(error_of(&error));
    }
    let seconds = timed.map_err(DeviceBenchError)?;
    let seconds = Spread::of(&seconds).ok_or_else(|| error_of(&"the clock measured no time"))?;
    Ok(OperationTime {
        projections: name.into(),
        m,
        n: shapes.iter().map(|&(n, _)| n).collect(),
        k,
        weight_bytes: bytes as u64,
        seconds,
        fraction_of_bandwidth: fraction(bytes as u64, seconds.median),
    })
}

/// Seconds of packing latent weights [N, K].
fn pack_seconds(device: &Device, n: usize, k: usize, effort: &Effort) -> Result<Vec<f64>, DeviceBenchError> {
    let latent = Tensor::<2>::random([n, k], Distribution::Uniform(-1.0, 1.0), device);
    wait(device).map_err(DeviceBenchError)?;
    let mut failed = None;
    let pack = |_| {
        let layer = BitLinear::latent(Param::from_tensor(latent.clone()));
        failed = failed.take().or(layer.pack().err());
    };
    // Packing waits for the device by itself, because the host packs.
    let once = Effort { seconds: 0.0, ..*effort };
    let timed = once.time(pack, || wait(device)).map_err(DeviceBenchError)?;
    match failed {
        Some(error) => Err(DeviceBenchError(error.to_string())),
        None => Ok(timed),
    }
}

impl fmt::Display for DeviceBench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { read_gb_per_s, read_buffer_bytes, kernels_right, outputs_compared, .. } = self;
        writeln!(f, "device read  {read_gb_per_s:.1} GB/s, of {}", human_bytes(*read_buffer_bytes))?;
        let all = self.matmuls.len();
        let (kernels, sums) = (count(all as u64, "kernel"), count(*outputs_compared, "sum"));
        let (below, every) = if *kernels_right == all { ("", "all ") } else { (", see below", "") };
        writeln!(
            f,
            "correctness  {kernels_right} of {kernels} by shape right{below}: {every}{sums} equal the CPU's"
        )?;
        for (label, rate) in [("quantise", self.quantise), ("pack", self.pack)] {
            let ElementRate { rows, columns, elements_per_s: Spread { median, min, max } } = rate;
            let [median, min, max] = [median, min, max].map(|rate| rate / 1e9);
            writeln!(f, "{label:<11}  [{rows}, {columns}]: {median:.3} G elements/s ({min:.3}-{max:.3})")?;
        }
        if let Some(fraction) = self.decode_fraction_of_bandwidth {
            writeln!(
                f,
                "decode       {:.1} % of the limit that the device's bandwidth sets",
                fraction * 100.0
            )?;
        }
        writeln!(
            f,
            "\n{:>4} {:>13}  {:<22} {:>24} {:>8} {:>8} {:>10}",
            "M", "N x K", "kernel", "a launch", "GB/s", "of read", "G mul-add/s"
        )?;
        let time = |Spread { median, min, max }: Spread| {
            format!("{} ({}-{})", human_seconds(median), us(min), us(max))
        };
        for matmul in &self.matmuls {
            let MatmulTime { m, n, k, kernel, weight_bytes, .. } = matmul;
            write!(f, "{m:>4} {:>13}  {kernel:<22} ", format!("{n} x {k}"))?;
            match (matmul.seconds, matmul.fraction_of_bandwidth, matmul.multiply_adds_g_per_s) {
                (Some(seconds), Some(fraction), Some(adds)) => writeln!(
                    f,
                    "{:>24} {:>8.1} {:>6.1} % {adds:>10.1}",
                    time(seconds),
                    *weight_bytes as f64 / seconds.median / 1e9,
                    fraction * 100.0
                )?,
                _ => writeln!(f, "{}", matmul.problem.as_deref().unwrap_or("not timed"))?,
            }
        }
        writeln!(
            f,
            "\n{:>4}  {:<8} {:>24} {:>24} {:>8} {:>8}",
            "M", "layer", "N x K", "a call", "GB/s", "of read"
        )?;
        for operation in &self.operations {
            let OperationTime { projections, m, n, k, weight_bytes, seconds, fraction_of_bandwidth } =
                operation;
            let n: Vec<String> = n.iter().map(usize::to_string).collect();
            writeln!(
                f,
                "{m:>4}  {projections:<8} {:>24} {:>24} {:>8.1} {:>6.1} %",
                format!("{} x {k}", n.join("+")),
                time(*seconds),
                *weight_bytes as f64 / seconds.median / 1e9,
                fraction_of_bandwidth * 100.0
            )?;
        }
        Ok(())
    }
}

/// Microseconds.
fn us(seconds: f64) -> String {
    format!("{:.1}", seconds * 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_timed_says_why() {
        let spread = |median: f64| Spread { median, min: median / 2.0, max: median * 2.0 };
        let matmul = |kernel: &str, seconds: Option<Spread>, problem: Option<&str>| MatmulTime {
            m: 1,
            n: 640,
            k: 2560,
            kernel: kernel.into(),
            weight_bytes: 409_600,
            seconds,
            fraction_of_bandwidth: seconds.map(|_| 0.5),
            multiply_adds_g_per_s: seconds.map(|_| 2000.0),
            problem: problem.map(str::to_owned),
        };
        let rate = ElementRate { rows: 512, columns: 2560, elements_per_s: spread(2e9) };
        let mut bench = DeviceBench {
            read_gb_per_s: 1000.0,
            read_buffer_bytes: 512 << 20,
            kernels_right: 1,
            outputs_compared: 640,
            matmuls: vec![
                matmul("cube/right", Some(spread(1e-6)), None),
                matmul("a/wrong", None, Some("no")),
            ],
            operations: Vec::new(),
            quantise: rate,
            pack: rate,
            decode_fraction_of_bandwidth: Some(0.25),
        };
        let text = bench.to_string();
        for expected in [
            "device read  1000.0 GB/s, of 537 MB",
            "correctness  1 of 2 kernels by shape right, see below: 640 sums equal the CPU's",
            "quantise     [512, 2560]: 2.000 G elements/s (1.000-4.000)",
            "decode       25.0 % of the limit that the device's bandwidth sets",
            "1.0 us (0.5-2.0)    409.6   50.0 %     2000.0",
            "   1    640 x 2560  a/wrong                no\n",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        bench.matmuls.pop();
        let text = bench.to_string();
        assert!(text.contains("1 of 1 kernel by shape right: all 640 sums equal the CPU's"), "{text}");
    }

    #[test]
    fn the_host_is_no_gpu() {
        let config = crate::synth::shape("tiny").unwrap();
        let device = Device::default();
        if ops::is_host(&device) {
            let error = run(&device, &config, &DeviceBenchOptions::quick(), &mut |_, _| {}).unwrap_err();
            assert!(error.to_string().contains("this is no GPU"), "{error}");
        }
    }
}
