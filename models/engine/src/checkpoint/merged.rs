//! A model with an adapter merged into its projections, which become ternary again.

use std::collections::HashMap;

use bitnet_burn::{ActivationRule, AdapterValues, FloatPart, Norm, Projection, names};
use bitnet_burn_formats::{
    DenseFormat, DenseTensor, FileMap, Scales, TernaryTensor, WeightScale, canonical, ternary,
};
use serde::Serialize;

use super::embed::{EmbedDefaults, Pooling};
use super::error::LoadError;
use super::source::{Content, Rotated, Signs, Source, TensorInfo, Weights};
use super::tokenizer_source::TokenizerSource;
use super::values::aligned;
use super::{Checkpoint, f32_tensor};
use crate::adapter::{Adapter, AdapterError};

/// What merging did to a projection, or to all.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MergeLoss {
    /// The projection's module; `all`.
    pub projection: String,
    /// The size of what the adapter adds, relative to the weights': both as root mean squares.
    pub update: f64,
    /// The size of what is lost by becoming ternary, relative to the weights with the adapter.
    pub error: f64,
    /// How much of what the adapter adds is there afterwards: the part of the change that has its direction, relative to it.
    /// 1 is all of it, and 0 nothing.
    pub kept: f64,
    /// The share of the codes that changed.
    pub flipped: f64,
}

/// Sums of which a [`MergeLoss`] is made.
#[derive(Clone, Copy, Default)]
struct Sums {
    weights: f64,
    update: f64,
    wanted: f64,
    error: f64,
    along: f64,
    flipped: usize,
    count: usize,
}

impl Sums {
    fn add(&mut self, before: f32, update: f32, after: f32) {
        let [before, update, after] = [before, update, after].map(f64::from);
        let wanted = before + update;
        self.weights += before * before;
        self.update += update * update;
        self.wanted += wanted * wanted;
        self.error += (after - wanted).powi(2);
        self.along += (after - before) * update;
        let sign = |value: f64| i8::from(value > 0.0) - i8::from(value < 0.0);
        self.flipped += usize::from(sign(before) != sign(after));
        self.count += 1;
    }

    fn join(&mut self, other: Self) {
        self.weights += other.weights;
        self.update += other.update;
        self.wanted += other.wanted;
        self.error += other.error;
        self.along += other.along;
        self.flipped += other.flipped;
        self.count += other.count;
    }

    fn loss(&self, projection: String) -> MergeLoss {
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        MergeLoss {
            projection,
            update: ratio(self.update, self.weights).sqrt(),
            error: ratio(self.error, self.wanted).sqrt(),
            kept: if self.update > 0.0 { self.along / self.update } else { 1.0 },
            flipped: ratio(self.flipped as f64, self.count as f64),
        }
    }
}

/// A merged projection.
enum Part {
    Ternary(TernaryTensor),
    Scaled {
        name: String,
        codes: Vec<u8>,
        scales: Scales,
        n: usize,
        k: usize,
    },
    /// Weights that were floats, which stay floats: added where they are read.
    Floats(AdapterValues),
}

struct Merged {
    of: Box<dyn Source>,
    parts: HashMap<(usize, Projection), Part>,
}

impl Checkpoint {
    /// The model with an adapter merged into it: W + scale * B * A, and of that the ternary weights with the least squared
    /// error, with a scale for as many weights as before. Projections that are floats stay floats. With the loss of each
    /// projection, and of all, which is the last.
    ///
    /// # Errors
    /// If the weights are rotated or can't be read.
    pub fn merged(self, adapter: &Adapter) -> Result<(Self, Vec<MergeLoss>), AdapterError> {
        if self.is_rotated() {
            let problem = "the model's weights are rotated by a Hadamard transform, which a merged adapter would have to be, \
                           too; that is not implemented: use the adapter unmerged (--adapter)";
            return Err(AdapterError::Targets(problem.into()));
        }
        let (mut parts, mut losses, mut all) = (HashMap::new(), Vec::new(), Sums::default());
        for of in adapter.projections() {
            let (layer, which) = (of.layer, of.which);
            let (part, sums) = merge(self.weights(layer, which)?, &of.values)?;
            losses.push(sums.loss(names::projection_module(layer, which)));
            all.join(sums);
            parts.insert((layer, which), part);
        }
        losses.push(all.loss("all".into()));
        let Self { path, config, warnings, source, prepacked } = self;
        let source = Box::new(Merged { of: source, parts });
        Ok((Self { path, config, warnings, source, prepacked }, losses))
    }
}

/// A projection with what an adapter adds to it.
fn merge(weights: Weights, adapter: &AdapterValues) -> Result<(Part, Sums), LoadError> {
    let (n, k) = weights.shape();
    let shared = match &weights {
        Weights::Ternary(_) => Some((WeightScale::Tensor, false)),
        Weights::Dense(tensor) => {
            let scaled = ternary::scaled_from_dense(tensor.format, &tensor.data, n, k).ok();
            scaled.map(|(_, scales)| match scales.group() {
                0 => (WeightScale::Row, scales.is_half()),
                group => (WeightScale::Group(group), scales.is_half()),
            })
        }
    };
    let mut sums = Sums::default();
    let Some((shared, half)) = shared else {
        each_row(&weights, adapter, |before, update, _| {
            before
                .iter()
                .zip(update)
                .for_each(|(&before, &update)| sums.add(before, update, before + update));
        })?;
        return Ok((Part::Floats(adapter.clone()), sums));
    };
    let mut wanted = vec![0f32; n * k];
    each_row(&weights, adapter, |before, update, row| {
        let wanted = &mut wanted[row * k..(row + 1) * k];
        wanted
            .iter_mut()
            .zip(before.iter().zip(update))
            .for_each(|(wanted, (before, update))| *wanted = before + update);
    })?;
    let run = shared.run(n, k).max(1);
    let mut scales = Vec::with_capacity((n * k).div_ceil(run));
    let mut sizes = Vec::with_capacity(run);
    for weights in wanted.chunks_mut(run) {
        sizes.clear();
        sizes.extend(weights.iter().map(|w| w.abs()));
        let (threshold, scale) = nearest(&mut sizes);
        let scale = if half { half::f16::from_f32(scale).to_f32() } else { scale };
        weights.iter_mut().for_each(|w| *w = if w.abs() >= threshold { 1f32.copysign(*w) } else { 0.0 });
        scales.push(scale);
    }
    let row_bytes = canonical::row_bytes(k);
    let mut codes = vec![0u8; n * row_bytes];
    let mut ternary = vec![0i8; k];
    each_row(&weights, adapter, |before, update, row| {
        let signs = &wanted[row * k..(row + 1) * k];
        for (column, (&before, &update)) in before.iter().zip(update).enumerate() {
            ternary[column] = signs[column] as i8;
            sums.add(before, update, signs[column] * scales[(row * k + column) / run]);
        }
        canonical::pack_row(&ternary, &mut codes[row * row_bytes..(row + 1) * row_bytes]);
    })?;
    let part = match weights {
        Weights::Ternary(tensor) => {
            Part::Ternary(TernaryTensor { codes: aligned(codes), scale: scales[0], ..tensor })
        }
        Weights::Dense(DenseTensor { name, .. }) => {
            let scales = Scales::from_rows(&scales, n, k, shared.group());
            let scales = scales
                .map_err(|error| LoadError::Unmerged { tensor: name.clone(), problem: error.to_string() })?;
            Part::Scaled { name, codes, scales, n, k }
        }
    };
    Ok((part, sums))
}

/// Goes through the rows of weights and of what an adapter adds to them.
fn each_row(
    weights: &Weights,
    adapter: &AdapterValues,
    mut see: impl FnMut(&[f32], &[f32], usize),
) -> Result<(), LoadError> {
    let (n, k) = weights.shape();
    let mut before = vec![0f32; k];
    for row in 0..n {
        weights.decode_row(row, &mut before).map_err(|error| LoadError::Unmerged {
            tensor: weights.name().to_owned(),
            problem: error.to_string(),
        })?;
        see(&before, &adapter.row(row), row);
    }
    Ok(())
}

/// The least size of a weight whose code is not zero, and the scale, that leave the least squared error; of sizes in any order,
/// which are sorted.
///
/// Of the k largest sizes with the sum s the best scale is s / k, and zeros for the others leave the squares of all, less
/// s² / k.
fn nearest(sizes: &mut [f32]) -> (f32, f32) {
    sizes.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut best = (0.0, f32::INFINITY, 0f32);
    let mut sum = 0f64;
    for (i, &size) in sizes.iter().enumerate() {
        sum += f64::from(size);
        let count = (i + 1) as f64;
        // All of one size have one code.
        let is_last = sizes.get(i + 1) != Some(&size);
        if is_last && sum * sum / count > best.0 {
            best = (sum * sum / count, size, (sum / count) as f32);
        }
    }
    (best.1, best.2)
}

impl Source for Merged {
    fn weights(&self, layer: usize, which: Projection) -> Result<Weights, LoadError> {
        let Some(part) = self.parts.get(&(layer, which)) else { return self.of.weights(layer, which) };
        Ok(match part {
            Part::Ternary(tensor) => Weights::Ternary(tensor.clone()),
            Part::Scaled { name, codes, scales, n, k } => {
                let format = if scales.is_half() { DenseFormat::F16 } else { DenseFormat::F32 };
                let (mut row, mut data) = (vec![0i8; *k], Vec::with_capacity(n * k * format.block_bytes()));
                let group = if scales.group() == 0 { *k } else { scales.group() };
                let (mut values, mut bytes) = (vec![0f32; *k], vec![0u8; k * format.block_bytes()]);
                for (number, codes) in codes.chunks_exact(canonical::row_bytes(*k)).enumerate() {
                    canonical::unpack_row(codes, &mut row);
                    for (g, (values, codes)) in values.chunks_mut(group).zip(row.chunks(group)).enumerate() {
                        let scale = scales.get(number, g, *k);
                        values
                            .iter_mut()
                            .zip(codes)
                            .for_each(|(value, &code)| *value = f32::from(code) * scale);
                    }
                    format.encode_row(&values, &mut bytes).map_err(|error| LoadError::Unmerged {
                        tensor: name.clone(),
                        problem: error.to_string(),
                    })?;
                    data.extend_from_slice(&bytes);
                }
                Weights::Dense(DenseTensor { name: name.clone(), n: *n, k: *k, format, data: aligned(data) })
            }
            Part::Floats(adapter) => {
                let weights = self.of.weights(layer, which)?;
                let (n, k) = weights.shape();
                let mut values = Vec::with_capacity(n * k);
                each_row(&weights, adapter, |before, update, _| {
                    values.extend(before.iter().zip(update).map(|(before, update)| before + update));
                })?;
                Weights::Dense(f32_tensor(weights.name(), [n, k], &values))
            }
        })
    }

    fn dense_bytes(&self, layer: usize, which: Projection) -> Option<u64> {
        let size = |format: DenseFormat, n: usize, k: usize| Some((format.block_bytes() * n * k) as u64);
        match self.parts.get(&(layer, which)) {
            None => self.of.dense_bytes(layer, which),
            Some(Part::Ternary(_)) => None,
            Some(Part::Scaled { scales, n, k, .. }) => {
                size(if scales.is_half() { DenseFormat::F16 } else { DenseFormat::F32 }, *n, *k)
            }
            Some(Part::Floats(adapter)) => {
                let (k, n) = adapter.shape();
                size(DenseFormat::F32, n, k)
            }
        }
    }

    fn master(&self, layer: usize, which: Projection) -> Result<Option<DenseTensor>, LoadError> {
        // They are those of the weights before.
        if self.parts.contains_key(&(layer, which)) { Ok(None) } else { self.of.master(layer, which) }
    }

    fn bias(&self, layer: usize, which: Projection) -> Result<DenseTensor, LoadError> {
        self.of.bias(layer, which)
    }

    fn float_part(&self, layer: usize, which: FloatPart) -> Result<DenseTensor, LoadError> {
        self.of.float_part(layer, which)
    }

    fn norm(&self, which: Norm) -> Result<DenseTensor, LoadError> {
        self.of.norm(which)
    }

    fn embedding(&self) -> Result<DenseTensor, LoadError> {
        self.of.embedding()
    }

    fn output(&self) -> Result<Option<DenseTensor>, LoadError> {
        self.of.output()
    }

    fn rotation(&self, of: Rotated) -> Option<Signs> {
        self.of.rotation(of)
    }

    fn activations(&self) -> Option<ActivationRule> {
        self.of.activations()
    }

    fn tokenizer_source(&self) -> TokenizerSource {
        self.of.tokenizer_source()
    }

    fn embed_defaults(&self, asked: Option<Pooling>) -> Result<EmbedDefaults, LoadError> {
        self.of.embed_defaults(asked)
    }

    fn contents(&self) -> Vec<Content> {
        self.of.contents()
    }

    fn tensors(&self) -> Vec<TensorInfo> {
        self.of.tensors()
    }

    fn metadata(&self) -> Vec<(String, String)> {
        self.of.metadata()
    }

    fn maps(&self) -> Vec<&FileMap> {
        self.of.maps()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ternary_weights_stay_and_others_lose_the_least() {
        // As they are: the scale to the bit.
        let scale = 0.123_456_79f32;
        let mut sizes: Vec<f32> = (0..1000).map(|i| if i % 3 == 0 { 0.0 } else { scale }).collect();
        assert_eq!(nearest(&mut sizes), (scale, scale));
        assert_eq!(nearest(&mut [0.0; 8]), (f32::INFINITY, 0.0));
        // Against all thresholds.
        let sizes: Vec<f32> = (0..200u32).map(|i| (i * 7919 % 1009) as f32 / 1009.0).collect();
        let error = |threshold: f32, scale: f32| -> f64 {
            let error = |size: f32| if size >= threshold { size - scale } else { size };
            sizes.iter().map(|&size| f64::from(error(size)).powi(2)).sum()
        };
        let (threshold, scale) = nearest(&mut sizes.clone());
        for other in &sizes {
            let above: Vec<f32> = sizes.iter().copied().filter(|size| size >= other).collect();
            let mean = above.iter().sum::<f32>() / above.len() as f32;
            assert!(error(threshold, scale) <= error(*other, mean) + 1e-6, "{threshold} {other}");
        }
    }
}
