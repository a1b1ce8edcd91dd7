//! Rotary position embedding (RoFormer, arXiv 2104.09864), half rotation as in Llama: element j of a
//! head pairs with j + d / 2. (Burn's own `RotaryEncoding` pairs neighbours.)

use std::f64::consts::PI;
use std::sync::Arc;

use bitnet_burn_backends::ops;
use burn::config::Config;
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// How the frequencies of a model differ from theta^(-2 j / d), for contexts longer than it was first trained for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// All frequencies are divided by a factor (position interpolation, arXiv 2306.15595).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1's: long wavelengths are divided by the factor, short ones stay, and those between are mixed.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Positions before scaling.
        original: usize,
    },
    /// YaRN (arXiv 2309.00071), as transformers computes it.
    Yarn {
        /// The factor.
        factor: f64,
        /// Positions before scaling.
        original: usize,
        /// Rotations within the original context above which a pair stays as it is.
        beta_fast: f64,
        /// Rotations within the original context below which a pair is divided by the factor.
        beta_slow: f64,
        /// Whether the pairs at which that begins and ends are whole numbers.
        truncate: bool,
        /// Cosine and sine are multiplied by this.
        attention_factor: f64,
    },
    /// Each frequency is divided by its own number (`rope_freqs.weight` in GGUF files).
    Divisors {
        /// head_dim / 2 of them.
        divisors: Vec<f32>,
    },
    /// LongRoPE (arXiv 2402.13753): each frequency is divided by its own number, which depends on the size of the
    /// context.
    LongRope {
        /// head_dim / 2 divisors, for contexts of up to `original` positions.
        short: Vec<f32>,
        /// head_dim / 2 divisors, for longer contexts.
        long: Vec<f32>,
        /// Positions before scaling.
        original: usize,
        /// Cosine and sine are multiplied by this.
        attention_factor: f64,
    },
}

impl RopeScaling {
    /// YaRN's factor of cosine and sine, where the model states none: 0.1 ln(factor) + 1.
    pub fn yarn_attention_factor(factor: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
    }

    /// LongRoPE's factor of cosine and sine, where the model states none: sqrt(1 + ln(s) / ln(original)), with the
    /// context s times the original one.
    pub fn long_rope_attention_factor(context: usize, original: usize) -> f64 {
        let s = context as f64 / original as f64;
        if s <= 1.0 { 1.0 } else { (1.0 + s.ln() / (original as f64).ln()).sqrt() }
    }

    /// What no model can have: numbers that are not finite or not positive, or not head_dim / 2 divisors.
    pub(crate) fn problem(&self, head_dim: usize) -> Option<String> {
        let divisors = |name: &str, divisors: &[f32]| {
            if divisors.len() != head_dim / 2 {
                return Some(format!(
                    "has {} {name}; heads of {head_dim} have {}",
                    divisors.len(),
                    head_dim / 2
                ));
            }
            let bad = divisors.iter().find(|d| !(d.is_finite() && **d > 0.0))?;
            Some(format!("has {bad} among its {name}; they must be finite and positive"))
        };
        let positive = |numbers: &[(&str, f64)]| {
            let (name, value) = numbers.iter().find(|(_, v)| !(v.is_finite() && *v > 0.0))?;
            Some(format!("has a {name} of {value}; it must be finite and positive"))
        };
        match self {
            Self::Linear { factor } => positive(&[("factor", *factor)]),
            Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original } => {
                let numbers = [("factor", *factor), ("low_freq_factor", *low), ("high_freq_factor", *high)];
                positive(&numbers).or_else(|| positive(&[("original context", *original as f64)])).or_else(|| {
                    (low >= high).then(|| format!("has low_freq_factor {low} and high_freq_factor {high}; the former must be smaller"))
                })
            }
            Self::Yarn { factor, original, beta_fast, beta_slow, attention_factor, .. } => positive(&[
                ("factor", *factor),
                ("original context", *original as f64),
                ("beta_fast", *beta_fast),
                ("beta_slow", *beta_slow),
                ("attention_factor", *attention_factor),
            ]),
            Self::Divisors { divisors: values } => divisors("divisors", values),
            Self::LongRope { short, long, original, attention_factor } => {
                divisors("short factors", short).or_else(|| divisors("long factors", long)).or_else(|| {
                    positive(&[
                        ("original context", *original as f64),
                        ("attention_factor", *attention_factor),
                    ])
                })
            }
        }
    }
}

/// Configuration of a [`RotaryEncoding`].
#[derive(Config, Debug)]
pub struct RotaryEncodingConfig {
    /// Values a head: even.
    pub head_dim: usize,
    /// Base of the frequencies: theta^(-2 j / head_dim).
    #[config(default = 10000.0)]
    pub theta: f64,
    /// How they are scaled.
    pub scaling: Option<RopeScaling>,
}

/// Rotates queries and keys by their position. Angles, cosines and sines are computed on the host in
/// f64 and rounded once to f32, so that every device turns by the same angles.
///
/// Made by [`RotaryEncodingConfig`].
#[derive(Clone, Debug)]
pub struct RotaryEncoding {
    /// head_dim / 2 of them.
    frequencies: Arc<[f64]>,
    /// Those of contexts with more positions than this.
    long: Option<(usize, Arc<[f64]>)>,
    /// Cosines and sines are multiplied by this.
    magnitude: f64,
}

impl RotaryEncodingConfig {
    /// Computes the frequencies.
    ///
    /// # Panics
    /// If `head_dim` is odd, or the scaling has other numbers of divisors than head_dim / 2.
    pub fn init(&self) -> RotaryEncoding {
        assert!(self.head_dim.is_multiple_of(2), "rotary encoding of heads of {} values", self.head_dim);
        let exponent = |j: usize| -2.0 * j as f64 / self.head_dim as f64;
        let plain: Vec<f64> = (0..self.head_dim / 2).map(|j| self.theta.powf(exponent(j))).collect();
        let divided = |divisors: &[f32]| -> Arc<[f64]> {
            assert_eq!(divisors.len(), plain.len(), "divisors of the frequencies");
            plain.iter().zip(divisors).map(|(f, &d)| f / f64::from(d)).collect()
        };
        let (frequencies, long, magnitude) = match &self.scaling {
            None => (plain.into(), None, 1.0),
            Some(RopeScaling::Linear { factor }) => (plain.iter().map(|f| f / factor).collect(), None, 1.0),
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original }) => {
                let scale = |f: &f64| {
                    // Rotations within the original context: its length by the wavelength.
                    let rotations = *original as f64 * f / (2.0 * PI);
                    let kept = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let kept = kept.clamp(0.0, 1.0);
                    (1.0 - kept) * f / factor + kept * f
                };
                (plain.iter().map(scale).collect(), None, 1.0)
            }
            Some(RopeScaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
            }) => {
                // The pair that makes this number of rotations within the original context.
                let pair = |rotations: f64| {
                    let log = (*original as f64 / (rotations * 2.0 * PI)).ln();
                    self.head_dim as f64 * log / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair(*beta_fast), pair(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(self.head_dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let scale = |(j, f): (usize, &f64)| {
                    let divided = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * divided + f * (1.0 - divided)
                };
                (plain.iter().enumerate().map(scale).collect(), None, *attention_factor)
            }
            Some(RopeScaling::Divisors { divisors }) => (divided(divisors), None, 1.0),
            Some(RopeScaling::LongRope { short, long, original, attention_factor }) => {
                (divided(short), Some((*original, divided(long))), *attention_factor)
            }
        };
        RotaryEncoding { frequencies, long, magnitude }
    }
}

impl RotaryEncoding {
    /// The head_dim / 2 frequencies in a sequence of up to `context` positions, and what cosines and sines are multiplied by.
    pub fn frequencies(&self, context: usize) -> (&[f64], f64) {
        let frequencies = match &self.long {
            Some((original, long)) if context > *original => long,
            _ => &self.frequencies,
        };
        (frequencies, self.magnitude)
    }

    /// cos and sin [rows, head_dim / 2] of each row's position, in a sequence of up to `context` positions. That
    /// number chooses between LongRoPE's two sets of frequencies, as in llama.cpp: so results do not depend on how a
    /// prompt was cut into chunks.
    pub fn angles(&self, positions: &[usize], context: usize, device: &Device) -> (Tensor<2>, Tensor<2>) {
        let (frequencies, magnitude) = self.frequencies(context);
        let size = positions.len() * frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for &position in positions {
            for frequency in frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push((c * magnitude) as f32);
                sin.push((s * magnitude) as f32);
            }
        }
        let shape = [positions.len(), frequencies.len()];
        let tensor = |values| Tensor::from_data(TensorData::new(values, shape), device);
        (tensor(cos), tensor(sin))
    }

    /// Rotates rows [M, heads * head_dim] by [`angles`](Self::angles).
    pub fn apply(&self, x: Tensor<2>, angles: &(Tensor<2>, Tensor<2>)) -> Tensor<2> {
        ops::rope(x, angles.0.clone(), angles.1.clone(), 2 * self.frequencies.len())
    }
}
