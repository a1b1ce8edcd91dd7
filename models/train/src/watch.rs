//! What one watches while a model learns: codes that flip, and texts that it writes.

use std::path::{Path, PathBuf};

use bitnet_burn::{BitLinearWeight, BitNet, CacheType, ForwardError, Row};
use bitnet_burn_backends::ops;
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::{TrainError, store};

const SAMPLES: &str = "samples.jsonl";

/// The codes of all ternary projections of a model in the training state: -1, 0 or 1 for each weight.
pub(crate) fn codes(model: &mut BitNet) -> Vec<i8> {
    let mut codes = Vec::new();
    for block in &mut model.blocks {
        for (_, layer) in block.projections_mut() {
            if let BitLinearWeight::Latent(weight) = &layer.weight {
                let ternary = ops::ternarise(weight.val().detach(), layer.quantisation().scale).into_data();
                codes.extend(ternary.iter::<f32>().map(|v| i8::from(v > 0.0) - i8::from(v < 0.0)));
            }
        }
    }
    codes
}

/// The share of the codes that differ.
pub(crate) fn flipped(before: &[i8], after: &[i8]) -> f64 {
    let count = before.iter().zip(after).filter(|(before, after)| before != after).count();
    count as f64 / before.len().max(1) as f64
}

/// A text that the model wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Steps done.
    pub step: u64,
    /// What it was given.
    pub prompt: String,
    /// What it wrote behind that: the most probable token each time.
    pub text: String,
}

/// What the model writes behind a prompt, up to `count` tokens.
pub(crate) fn sample(
    model: &BitNet,
    tokenizer_json: &[u8],
    (begin, prompt): (u32, &str),
    count: usize,
) -> Result<String, TrainError> {
    let wrong = |error: tokenizers::Error| TrainError::Tokenizer { problem: error.to_string() };
    let tokenizer = Tokenizer::from_bytes(tokenizer_json).map_err(wrong)?;
    let encoding = tokenizer.encode_fast(prompt, false).map_err(wrong)?;
    let mut tokens: Vec<u32> = std::iter::once(begin).chain(encoding.get_ids().iter().copied()).collect();
    let context = model.config().context_length;
    if tokens.len() >= context {
        let problem = format!("has {} tokens, and the model sees {context}", tokens.len());
        return Err(TrainError::Config { place: format!("`run.samples`: {prompt:?}"), problem });
    }
    let ends = &model.config().eos_tokens;
    let capacity = context.min(tokens.len() + count);
    let mut cache = model.cache(capacity, CacheType::F32).map_err(ForwardError::from)?;
    let sequence = cache.add_sequence(capacity);
    let (mut done, mut written) = (0, Vec::new());
    while written.len() < count && tokens.len() < capacity {
        let rows: Vec<Row> = (done..tokens.len())
            .map(|position| Row { token: tokens[position], sequence, position })
            .collect();
        let logits = model.forward(&rows, &[rows.len() - 1], &mut cache)?.into_data();
        let best = logits.iter::<f32>().enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
        let next = best.map_or(begin, |(token, _)| token as u32);
        if next == begin || ends.contains(&next) {
            break;
        }
        done = tokens.len();
        tokens.push(next);
        written.push(next);
    }
    tokenizer.decode(&written, true).map_err(wrong)
}

/// The samples of a run, in its `samples.jsonl`.
#[derive(Debug)]
pub(crate) struct Samples {
    path: PathBuf,
    all: Vec<Sample>,
}

impl Samples {
    /// Takes the file up again after `step`; later samples are dropped, since they are written again.
    pub fn resume(dir: &Path, step: u64) -> Result<Self, TrainError> {
        let path = dir.join(SAMPLES);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(TrainError::io(&path, "read")(error)),
        };
        // Lines that are none of ours are dropped, too.
        let all = text.lines().filter_map(|line| serde_json::from_str(line).ok());
        Ok(Self { path, all: all.filter(|sample: &Sample| sample.step <= step).collect() })
    }

    pub fn add(&mut self, sample: Sample) -> Result<(), TrainError> {
        self.all.push(sample);
        let line = |sample: &Sample| serde_json::json!(sample).to_string() + "\n";
        store::write_file(&self.path, self.all.iter().map(line).collect::<String>().as_bytes())
    }
}
