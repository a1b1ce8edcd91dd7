//! Distillation: a student learns from the probabilities that its teacher gives each token, beside the text itself
//! (Hinton et al., arXiv 1503.02531; for ternary students BitDistill, arXiv 2510.13998).

use std::collections::BTreeMap;

use bitnet_burn::{BitNet, ForwardError, ModelConfig};
use bitnet_burn_engine::load::{LoadOptions, load};
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Tensor};
use tokenizers::Tokenizer;

use crate::{Dataset, TrainConfig, TrainError, origin};

/// The model that is learned from, frozen.
pub(crate) struct Teacher {
    pub model: BitNet,
}

impl Teacher {
    /// Loads the teacher that a configuration names, if it names one.
    pub fn of(
        config: &TrainConfig,
        data: &Dataset,
        student: &ModelConfig,
        device: &Device,
    ) -> Result<Option<Self>, TrainError> {
        let path = &config.distill.teacher;
        if path.as_os_str().is_empty() {
            return Ok(None);
        }
        let checkpoint = origin::open(path)?;
        let wrong = |problem: String| TrainError::Model { path: checkpoint.path().to_owned(), problem };
        let files = origin::tokenizer_files(&checkpoint)?;
        let json = files.first().map(|(_, bytes)| &bytes[..]).unwrap_or_default();
        if let Some(difference) = difference(json, &data.tokenizer_json)? {
            return Err(wrong(format!(
                "this teacher has another vocabulary than the student: {difference}; a student learns from the \
                 probabilities of its own tokens"
            )));
        }
        let found = checkpoint.config().vocab_size;
        if found != student.vocab_size {
            return Err(wrong(format!(
                "this teacher's embedding has {found} rows, and the student's {}",
                student.vocab_size
            )));
        }
        let options = LoadOptions { prepacked: false, ..LoadOptions::default() };
        let device = device.clone().without_autodiff();
        let model =
            load(&checkpoint, &device, &options, &mut |_| {}).map_err(|error| wrong(error.to_string()))?;
        Ok(Some(Self { model }))
    }

    /// The Kullback-Leibler divergence of the student's probabilities from the teacher's at a temperature, in nats, times
    /// the temperature squared: that keeps gradients at the size that they have at 1.
    ///
    /// # Shapes
    /// logits: the student's, [sequences * length, vocabulary]. The output is [sequences * length].
    pub fn divergence(
        &self,
        logits: Tensor<2>,
        (inputs, length): (&[u32], usize),
        temperature: f64,
    ) -> Result<Tensor<1>, ForwardError> {
        let wanted = self.model.forward_sequences(inputs, length)? / temperature;
        let rows = inputs.len();
        let (wanted, log_wanted) = (softmax(wanted.clone(), 1), log_softmax(wanted, 1));
        let entropy: Tensor<2> = (wanted.clone() * log_wanted).sum_dim(1);
        let found = log_softmax(logits / temperature, 1);
        let crossed: Tensor<2> = (wanted.autodiff() * found).sum_dim(1);
        let divergence = (entropy.autodiff() - crossed) * (temperature * temperature);
        Ok(divergence.reshape([rows]))
    }
}

/// How two tokenizers' vocabularies differ, if they do.
fn difference(teacher: &[u8], student: &[u8]) -> Result<Option<String>, TrainError> {
    let vocabulary = |json: &[u8]| -> Result<BTreeMap<u32, String>, TrainError> {
        let tokenizer = Tokenizer::from_bytes(json)
            .map_err(|error| TrainError::Tokenizer { problem: error.to_string() })?;
        Ok(tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect())
    };
    let (teacher, student) = (vocabulary(teacher)?, vocabulary(student)?);
    if teacher.len() != student.len() {
        return Ok(Some(format!("it has {} tokens, and the student {}", teacher.len(), student.len())));
    }
    let other = teacher.iter().find(|&(id, token)| student.get(id) != Some(token));
    Ok(other.map(|(id, token)| {
        let own = student.get(id).map_or("nothing".to_owned(), |token| format!("`{token}`"));
        format!("its token {id} is `{token}`, and the student's is {own}")
    }))
}

impl std::fmt::Debug for Teacher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Teacher")
    }
}
