//! The text of a training run: documents, their split, the tokenizer, and batches of sequences.
//!
//! Everything follows from the text, the configuration and its seed: which documents are for validation,
//! and the sequences of every step. So a run that is resumed needs no state but the number of its step.

use std::path::PathBuf;

use bitnet_burn_formats::files;
use bitnet_burn_formats::random::SplitMix64;
use sha2::{Digest, Sha256};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use crate::TrainError;
use crate::config::{Documents, TrainConfig};

/// The token between documents, of a trained tokenizer.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Names under which given tokenizers have one.
const END_OF_TEXT_NAMES: [&str; 4] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>"];

/// Fewer documents than these are not split as a whole.
const FEW: usize = 20;

/// Documents of text, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Corpus {
    documents: Vec<String>,
}

impl Corpus {
    /// Documents that are there already; empty ones are left out.
    pub fn new(documents: impl IntoIterator<Item = String>) -> Self {
        Self { documents: documents.into_iter().filter(|text| !text.trim().is_empty()).collect() }
    }

    /// Reads files: plain text, or JSON Lines (`.jsonl`) with a `text` in every line.
    ///
    /// # Errors
    /// If a file can't be read, is empty, is not UTF-8, or a line is no such object.
    pub fn read(files: &[PathBuf], documents: Documents) -> Result<Self, TrainError> {
        let mut all = Vec::new();
        for path in files {
            let bytes = std::fs::read(path).map_err(TrainError::io(path, "read"))?;
            let wrong = |problem: String| TrainError::Text { path: path.clone(), problem };
            let text = String::from_utf8(bytes).map_err(|error| {
                let at = error.utf8_error().valid_up_to();
                let line = error.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count() + 1;
                wrong(format!("not UTF-8: byte {at}, on line {line}, is 0x{:02x}", error.as_bytes()[at]))
            })?;
            let text = text.strip_prefix('\u{feff}').unwrap_or(&text).replace("\r\n", "\n");
            let before = all.len();
            if path.extension().is_some_and(|extension| extension == "jsonl") {
                for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                    #[derive(serde::Deserialize)]
                    struct Line {
                        text: String,
                    }
                    let line: Line = serde_json::from_str(line).map_err(|error| {
                        wrong(format!("line {} is no object with a `text`: {error}", i + 1))
                    })?;
                    all.push(line.text);
                }
            } else {
                match documents {
                    Documents::File => all.push(text),
                    Documents::Line => all.extend(text.lines().map(str::to_owned)),
                    Documents::Paragraph => all.extend(paragraphs(&text)),
                }
            }
            if all[before..].iter().all(|text| text.trim().is_empty()) {
                return Err(wrong("there is no text in it".into()));
            }
        }
        Ok(Self::new(all))
    }

    /// The documents.
    pub fn documents(&self) -> &[String] {
        &self.documents
    }

    /// SHA-256 of the documents.
    fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for text in &self.documents {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        files::hex(&hash.finalize())
    }

    /// (training, validation).
    fn split(&self, share: f64, seed: u64) -> (Vec<&str>, Vec<&str>) {
        let documents: Vec<&str> = self.documents.iter().map(String::as_str).collect();
        if documents.len() >= FEW {
            let mut order: Vec<usize> = (0..documents.len()).collect();
            shuffle(&mut order, &mut SplitMix64::new(seed ^ 0x5711));
            let count = ((documents.len() as f64 * share).round() as usize).max(1);
            let mut validation = vec![false; documents.len()];
            order[..count].iter().for_each(|&i| validation[i] = true);
            let of = |which: bool| {
                documents.iter().zip(&validation).filter(|&(_, &v)| v == which).map(|(d, _)| *d).collect()
            };
            return (of(false), of(true));
        }
        let cut = |text: &'_ str| {
            let mut at = (text.len() as f64 * (1.0 - share)) as usize;
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        documents.into_iter().map(|text| text.split_at(cut(text))).unzip()
    }
}

fn paragraphs(text: &str) -> Vec<String> {
    let mut all = vec![String::new()];
    for line in text.lines() {
        let last = all.last_mut().expect("one at least");
        if line.trim().is_empty() {
            all.push(String::new());
        } else {
            if !last.is_empty() {
                last.push('\n');
            }
            last.push_str(line);
        }
    }
    all
}

/// Fisher and Yates.
fn shuffle<T>(items: &mut [T], random: &mut SplitMix64) {
    for i in (1..items.len()).rev() {
        items.swap(i, random.below(i as u64 + 1) as usize);
    }
}

/// A sequence to learn from or to be measured on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The tokens that the model sees, as many as the sequence is long.
    pub inputs: Vec<u32>,
    /// The token that follows each of them; as many as count: behind those, `inputs` is filled up.
    pub targets: Vec<u32>,
}

/// The tokens of a run.
#[derive(Debug)]
pub struct Dataset {
    /// The tokenizer, as its file has it.
    pub tokenizer_json: Vec<u8>,
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// The token between documents.
    pub end_of_text: u32,
    /// SHA-256 of the text.
    pub sha256: String,
    /// The documents for validation.
    pub validation_texts: Vec<String>,
    /// Documents for training, each with the end-of-text before it.
    training: Vec<Vec<u32>>,
    /// The validation set: documents from their beginning, cut where they are longer than a sequence.
    validation: Vec<Window>,
    length: usize,
    seed: u64,
}

impl Dataset {
    /// Splits the text, trains or reads the tokenizer unless one is given (as the bytes of its file), and
    /// applies it.
    ///
    /// # Errors
    /// If the tokenizer can't be read or has no end-of-text token, or there is too little text for a
    /// sequence.
    pub fn new(
        corpus: &Corpus,
        config: &TrainConfig,
        tokenizer: Option<Vec<u8>>,
    ) -> Result<Self, TrainError> {
        let (training, validation) = corpus.split(config.data.validation, config.seed);
        let tokenizer_json = match tokenizer {
            Some(json) => json,
            None if config.tokenizer.file.as_os_str().is_empty() => {
                train_tokenizer(&training, config.tokenizer.vocab_size)?
            }
            None => {
                let path = &config.tokenizer.file;
                std::fs::read(path).map_err(TrainError::io(path, "read the tokenizer"))?
            }
        };
        let wrong = |problem: String| TrainError::Tokenizer { problem };
        let tokenizer = Tokenizer::from_bytes(&tokenizer_json).map_err(|error| wrong(error.to_string()))?;
        let vocab_size = tokenizer.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let end_of_text =
            END_OF_TEXT_NAMES.iter().find_map(|name| tokenizer.token_to_id(name)).ok_or_else(|| {
                wrong(format!("it has no token between documents: one of {}", END_OF_TEXT_NAMES.join(", ")))
            })?;
        let length = config.sequence_length();
        let encode = |texts: Vec<&str>| -> Result<Vec<Vec<u32>>, TrainError> {
            let encodings =
                tokenizer.encode_batch_fast(texts, false).map_err(|error| wrong(error.to_string()))?;
            Ok(encodings
                .iter()
                .map(|encoding| {
                    std::iter::once(end_of_text).chain(encoding.get_ids().iter().copied()).collect()
                })
                .collect())
        };
        let validation_texts = validation.iter().map(|&text| text.to_owned()).collect();
        let training = encode(training)?;
        let validation: Vec<Window> = encode(validation)?
            .into_iter()
            .flat_map(|tokens| windows(tokens, end_of_text, length).collect::<Vec<_>>())
            .collect();
        let tokens: usize = training.iter().map(Vec::len).sum();
        if tokens <= length {
            let problem = format!(
                "{tokens} tokens for training are less than one sequence of {length}; give more text, or a \
                 shorter `run.sequence_length`"
            );
            return Err(TrainError::TooLittle { problem });
        }
        Ok(Self {
            tokenizer_json,
            vocab_size,
            end_of_text,
            sha256: corpus.sha256(),
            validation_texts,
            training,
            validation,
            length,
            seed: config.seed,
        })
    }

    /// Tokens for training.
    pub fn training_tokens(&self) -> usize {
        self.training.iter().map(Vec::len).sum()
    }

    /// Tokens that the validation set counts.
    pub fn validation_tokens(&self) -> usize {
        self.validation.iter().map(|window| window.targets.len()).sum()
    }

    /// The validation set.
    pub fn validation(&self) -> &[Window] {
        &self.validation
    }

    /// Sequences in an epoch.
    pub fn sequences(&self) -> usize {
        (self.training_tokens() - 1) / self.length
    }

    /// The sequences of a step, from 0: `batch_size` of them, and the token behind each.
    ///
    /// An epoch's documents are shuffled and joined, cut into sequences, and those are shuffled; what is left
    /// of an epoch that is no whole step begins the next one.
    pub fn batch(&self, step: u64, batch_size: usize, epoch: &mut Epoch) -> (Vec<u32>, Vec<u32>) {
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        let sequences = self.sequences() as u64;
        for i in 0..batch_size as u64 {
            let index = step * batch_size as u64 + i;
            epoch.go_to(index / sequences, self);
            let start = epoch.order[(index % sequences) as usize] * self.length;
            inputs.extend(&epoch.tokens[start..start + self.length]);
            targets.extend(&epoch.tokens[start + 1..start + self.length + 1]);
        }
        (inputs, targets)
    }
}

/// The tokens of an epoch in its order: what [`Dataset::batch`] keeps from call to call.
#[derive(Debug, Default)]
pub struct Epoch {
    number: Option<u64>,
    tokens: Vec<u32>,
    order: Vec<usize>,
}

impl Epoch {
    fn go_to(&mut self, number: u64, data: &Dataset) {
        if self.number == Some(number) {
            return;
        }
        let mut random = SplitMix64::new(data.seed ^ (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut documents: Vec<usize> = (0..data.training.len()).collect();
        shuffle(&mut documents, &mut random);
        self.tokens.clear();
        documents.iter().for_each(|&i| self.tokens.extend(&data.training[i]));
        self.order = (0..data.sequences()).collect();
        shuffle(&mut self.order, &mut random);
        self.number = Some(number);
    }
}

/// A document's sequences, the last one filled up.
fn windows(mut tokens: Vec<u32>, end_of_text: u32, length: usize) -> impl Iterator<Item = Window> {
    tokens.push(end_of_text);
    let count = (tokens.len() - 1).div_ceil(length);
    (0..count).map(move |i| {
        let end = ((i + 1) * length).min(tokens.len() - 1);
        let mut inputs = tokens[i * length..end].to_vec();
        inputs.resize(length, end_of_text);
        Window { inputs, targets: tokens[i * length + 1..end + 1].to_vec() }
    })
}

/// Byte-level BPE as GPT-2 has it, which every text can be written in; the text's beginning is marked by
/// the end of the one before.
fn train_tokenizer(texts: &[&str], vocab_size: usize) -> Result<Vec<u8>, TrainError> {
    let train = || -> tokenizers::Result<Vec<u8>> {
        let mut tokenizer = Tokenizer::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        let mut trainer: TrainerWrapper = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build()
            .into();
        tokenizer.train(&mut trainer, texts.iter())?;
        let id = tokenizer.token_to_id(END_OF_TEXT).unwrap_or_default();
        let template = TemplateProcessing::builder()
            .try_single(format!("{END_OF_TEXT} $A"))?
            .special_tokens(vec![(END_OF_TEXT, id)])
            .build()?;
        tokenizer.with_post_processor(Some(template));
        Ok(tokenizer.to_string(true)?.into_bytes())
    };
    train().map_err(|error| TrainError::Tokenizer { problem: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(n: usize) -> Corpus {
        Corpus::new((0..n).map(|i| format!("The {i}th fox has {} tails, and it is happy.", i * 7)))
    }

    fn config() -> TrainConfig {
        let mut config = TrainConfig::default();
        config.set("tokenizer.vocab_size=300").unwrap();
        config.set("run.sequence_length=16").unwrap();
        config.set("data.validation=0.1").unwrap();
        config
    }

    #[test]
    fn an_epoch_has_every_token_once() {
        let data = Dataset::new(&corpus(40), &config(), None).unwrap();
        assert_eq!(data.vocab_size, 300);
        let per_epoch = data.sequences();
        let mut epoch = Epoch::default();
        let mut firsts = Vec::new();
        for step in 0..2 * per_epoch as u64 {
            let (inputs, targets) = data.batch(step, 1, &mut epoch);
            assert_eq!((inputs.len(), &inputs[1..]), (16, &targets[..15]));
            firsts.push(inputs);
        }
        let count = |from: usize| {
            let mut counts = vec![0; data.vocab_size];
            firsts[from..from + per_epoch].iter().flatten().for_each(|&t| counts[t as usize] += 1);
            counts.iter().sum::<usize>()
        };
        assert_eq!((count(0), count(per_epoch)), (per_epoch * 16, per_epoch * 16));
        assert_ne!(firsts[..per_epoch], firsts[per_epoch..]);
        // A step is the same wherever a run begins, and with other steps' batches beside it.
        let (inputs, _) = data.batch(per_epoch as u64 / 2, 2, &mut Epoch::default());
        let (again, _) = data.batch(per_epoch as u64 / 2, 2, &mut epoch);
        assert_eq!(inputs, again);
    }

    #[test]
    fn validation_documents_are_kept_apart_and_whole() {
        let corpus = corpus(40);
        let config = config();
        let (training, validation) = corpus.split(0.1, 1);
        assert_eq!((training.len(), validation.len()), (36, 4));
        assert!(validation.iter().all(|text| !training.contains(text)));
        assert_ne!(corpus.split(0.1, 2).1, validation);
        let data = Dataset::new(&corpus, &config, None).unwrap();
        let tokenizer = Tokenizer::from_bytes(&data.tokenizer_json).unwrap();
        let (_, texts) = corpus.split(0.1, config.seed);
        let mut windows = data.validation().iter();
        for text in texts {
            let mut joined = Vec::new();
            loop {
                let window = windows.next().unwrap();
                assert_eq!(window.inputs.len(), 16);
                joined.extend(&window.targets);
                if joined.last() == Some(&data.end_of_text) {
                    break;
                }
                assert_eq!(window.targets.len(), 16);
            }
            joined.pop();
            assert_eq!(tokenizer.decode(&joined, false).unwrap(), text);
        }
        assert!(windows.next().is_none());
    }

    #[test]
    fn one_document_gives_its_end() {
        let text = "ä".repeat(500);
        let corpus = Corpus::new([text]);
        let (training, validation) = corpus.split(0.1, 0);
        assert_eq!((training[0].len(), validation[0].len()), (900, 100));
    }

    #[test]
    fn files_are_read_as_documents() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            vec![path]
        };
        let text = file("a.txt", b"one\r\ntwo\n\n\nthree\n");
        let read = |path: &[PathBuf], documents| Corpus::read(path, documents).map(|c| c.documents);
        assert_eq!(read(&text, Documents::File).unwrap(), ["one\ntwo\n\n\nthree\n"]);
        assert_eq!(read(&text, Documents::Line).unwrap(), ["one", "two", "three"]);
        assert_eq!(read(&text, Documents::Paragraph).unwrap(), ["one\ntwo", "three"]);
        let lines = file("b.jsonl", b"{\"text\": \"one\", \"id\": 3}\n\n{\"text\": \"two\\nthree\"}\n");
        assert_eq!(read(&lines, Documents::File).unwrap(), ["one", "two\nthree"]);
        for (name, bytes, expected) in [
            ("c.txt", &b""[..], "no text"),
            ("d.txt", b" \n\n ", "no text"),
            ("e.txt", b"one\ntw\xff", "byte 6, on line 2, is 0xff"),
            ("f.jsonl", b"{\"text\": \"one\"}\n{\"txt\": 1}", "line 2"),
            ("g.jsonl", b"", "no text"),
        ] {
            let error = read(&file(name, bytes), Documents::File).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(expected), "{error}");
        }
        let error = read(&[dir.path().join("none.txt")], Documents::File).unwrap_err().to_string();
        assert!(error.contains("none.txt"), "{error}");
    }

    #[test]
    fn too_little_text_is_refused() {
        let error = Dataset::new(&Corpus::new(["a".to_owned()]), &config(), None).unwrap_err().to_string();
        assert!(error.contains("sequence"), "{error}");
    }
}
