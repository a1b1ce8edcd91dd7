//! The tokens of a training run: the tokenizer, the validation set, and batches of sequences.
//!
//! Everything follows from the text, the configuration and its seed: which documents are for validation,
//! and the sequences of every step. So a run that is resumed needs no state but the number of its step.

use bitnet_burn_formats::random::SplitMix64;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use crate::config::{Task, TrainConfig};
use crate::corpus::shuffle;
use crate::sft::Chat;
use crate::{Corpus, TrainError};

/// The token between documents, of a trained tokenizer.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Names under which given tokenizers have one.
const END_OF_TEXT_NAMES: [&str; 4] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>"];

/// A sequence to be measured on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The tokens that the model sees, as many as the sequence is long.
    pub inputs: Vec<u32>,
    /// The token that follows each of them; as many as count: behind those, `inputs` is filled up.
    pub targets: Vec<u32>,
    /// Which of the targets count: all of a text, what the assistant says of a conversation.
    pub counts: Vec<bool>,
}

/// The sequences of a step, one behind the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The tokens that the model sees.
    pub inputs: Vec<u32>,
    /// The token behind each of them.
    pub targets: Vec<u32>,
    /// Which targets count; `None`: all.
    pub counts: Option<Vec<bool>>,
}

/// The tokenizer of a model that there is already.
pub(crate) struct Vocabulary {
    /// `tokenizer.json`.
    pub json: Vec<u8>,
    /// Rows of the model's embedding, at least as many as the tokenizer has tokens.
    pub size: usize,
    /// The token that begins a document.
    pub begin: u32,
    /// The one that ends it, if that is another one.
    pub end: Option<u32>,
    /// How conversations are written, for a run that learns such.
    pub chat: Option<Chat>,
}

/// The tokens of a run.
#[derive(Debug)]
pub struct Dataset {
    /// The tokenizer, as its file has it.
    pub tokenizer_json: Vec<u8>,
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// The token that begins a document.
    pub begin: u32,
    /// SHA-256 of the text.
    pub sha256: String,
    /// The documents for validation.
    pub validation_texts: Vec<String>,
    /// What sequences are drawn from: all documents, or with weights those of each source.
    pools: Vec<Pool>,
    /// The validation set: documents from their beginning, cut where they are longer than a sequence.
    validation: Vec<Window>,
    length: usize,
    seed: u64,
}

/// Documents that are shuffled together.
#[derive(Debug)]
struct Pool {
    documents: Tokens,
    /// Sequences in an epoch.
    sequences: usize,
    /// Its share of all sequences; 1 if it is the only one.
    share: f64,
}

/// The tokens of documents.
#[derive(Debug)]
enum Tokens {
    /// Each with the token that begins it: they are joined and cut into sequences.
    Texts(Vec<Vec<u32>>),
    /// A sequence each.
    Conversations(Vec<Window>),
}

impl Dataset {
    /// Splits the text, trains or reads the tokenizer unless one is given, and applies it.
    pub(crate) fn new(
        corpus: &Corpus,
        config: &TrainConfig,
        vocabulary: Option<Vocabulary>,
    ) -> Result<Self, TrainError> {
        let (training, validation) =
            corpus.split(config.data.validation, config.seed, config.data.task == Task::Sft);
        let wrong = |problem: String| TrainError::Tokenizer { problem };
        let Vocabulary { json, size, begin, end, chat } = match vocabulary {
            Some(vocabulary) => vocabulary,
            None if config.tokenizer.file.as_os_str().is_empty() => {
                let all: Vec<&str> = training.iter().flatten().copied().collect();
                separated(train_tokenizer(&all, config.tokenizer.vocab_size)?)?
            }
            None => {
                let path = &config.tokenizer.file;
                separated(std::fs::read(path).map_err(TrainError::io(path, "read the tokenizer"))?)?
            }
        };
        let tokenizer = Tokenizer::from_bytes(&json).map_err(|error| wrong(error.to_string()))?;
        let length = config.sequence_length();
        let encode = |texts: Vec<&str>| -> Result<Vec<Vec<u32>>, TrainError> {
            let encodings =
                tokenizer.encode_batch_fast(texts, false).map_err(|error| wrong(error.to_string()))?;
            let tokens = |encoding: &tokenizers::Encoding| {
                let document = std::iter::once(begin).chain(encoding.get_ids().iter().copied());
                document.chain(end).collect()
            };
            let tokens: Vec<Vec<u32>> = encodings.iter().map(tokens).collect();
            known(tokens.iter().flatten(), size)?;
            Ok(tokens)
        };
        let validation_texts = validation.iter().map(|&text| text.to_owned()).collect();
        let chat = chat.filter(|_| config.data.task == Task::Sft);
        let mut number = 0;
        let mut converse = |texts: Vec<&str>, chat: &Chat| -> Result<Vec<Window>, TrainError> {
            let windows = texts.into_iter().map(|text| {
                number += 1;
                chat.window(text, number, length)
            });
            let windows = windows.filter_map(Result::transpose).collect::<Result<Vec<_>, _>>()?;
            known(windows.iter().flat_map(|window| window.inputs.iter().chain(&window.targets)), size)?;
            Ok(windows)
        };
        let mut documents = Vec::new();
        for texts in training {
            documents.push(match &chat {
                None => Tokens::Texts(encode(texts)?),
                Some(chat) => Tokens::Conversations(converse(texts, chat)?),
            });
        }
        let validation: Vec<Window> = match &chat {
            Some(chat) => converse(validation, chat)?,
            None => encode(validation)?
                .into_iter()
                .flat_map(|mut tokens| {
                    if end.is_none() {
                        tokens.push(begin);
                    }
                    windows(tokens, begin, length).collect::<Vec<_>>()
                })
                .collect(),
        };
        Ok(Self {
            tokenizer_json: json,
            vocab_size: size,
            begin,
            sha256: corpus.sha256(),
            validation_texts,
            pools: pools(documents, &config.data.weights, length)?,
            validation,
            length,
            seed: config.seed,
        })
    }

    /// Tokens for training.
    pub fn training_tokens(&self) -> usize {
        self.pools.iter().map(Pool::tokens).sum()
    }

    /// Tokens that the validation set counts.
    pub fn validation_tokens(&self) -> usize {
        self.validation.iter().map(Window::counted).sum()
    }

    /// The validation set.
    pub fn validation(&self) -> &[Window] {
        &self.validation
    }

    /// The sequences of a step, from 0: `batch_size` of them, and the token behind each.
    ///
    /// An epoch's documents are shuffled and joined, cut into sequences, and those are shuffled; what is left
    /// of an epoch that is no whole step begins the next one. With weights, each source has epochs of its own.
    pub fn batch(&self, step: u64, batch_size: usize, epoch: &mut Epoch) -> Batch {
        let (mut inputs, mut targets, mut counts) = (Vec::new(), Vec::new(), None);
        for i in 0..batch_size as u64 {
            let (number, index) = epoch.draw(step * batch_size as u64 + i, &self.pools);
            let pool = &self.pools[number];
            let order = &mut epoch.orders[number];
            order.go_to(index / pool.sequences as u64, (number, self));
            let sequence = order.sequences[(index % pool.sequences as u64) as usize];
            match &pool.documents {
                Tokens::Texts(_) => {
                    let start = sequence * self.length;
                    inputs.extend(&order.tokens[start..start + self.length]);
                    targets.extend(&order.tokens[start + 1..start + self.length + 1]);
                }
                Tokens::Conversations(windows) => {
                    let window = &windows[sequence];
                    inputs.extend(&window.inputs);
                    targets.extend(&window.targets);
                    targets.resize(inputs.len(), 0);
                    let counts = counts.get_or_insert_with(Vec::new);
                    counts.extend(&window.counts);
                    counts.resize(inputs.len(), false);
                }
            }
        }
        Batch { inputs, targets, counts }
    }
}

impl Window {
    /// How many targets count.
    pub fn counted(&self) -> usize {
        self.counts.iter().filter(|&&counts| counts).count()
    }
}

impl Pool {
    fn tokens(&self) -> usize {
        self.documents.count()
    }
}

impl Tokens {
    /// Tokens that are learned.
    fn count(&self) -> usize {
        match self {
            Self::Texts(documents) => documents.iter().map(Vec::len).sum(),
            Self::Conversations(windows) => windows.iter().map(Window::counted).sum(),
        }
    }

    /// Those of several sources together.
    fn joined(all: Vec<Self>) -> Self {
        let (mut texts, mut conversations) = (Vec::new(), Vec::new());
        for tokens in all {
            match tokens {
                Self::Texts(more) => texts.extend(more),
                Self::Conversations(more) => conversations.extend(more),
            }
        }
        if conversations.is_empty() { Self::Texts(texts) } else { Self::Conversations(conversations) }
    }
}

/// One pool of all documents, or with weights one for each source.
fn pools(sources: Vec<Tokens>, weights: &[f64], length: usize) -> Result<Vec<Pool>, TrainError> {
    let groups: Vec<(Tokens, f64)> = if weights.is_empty() {
        vec![(Tokens::joined(sources), 1.0)]
    } else if weights.len() == sources.len() {
        let sum: f64 = weights.iter().sum();
        sources.into_iter().zip(weights.iter().map(|weight| weight / sum)).collect()
    } else {
        let problem = format!("has {} weights for {} sources of text", weights.len(), sources.len());
        return Err(TrainError::Config { place: "`data.weights`".into(), problem });
    };
    let several = groups.len() > 1;
    let pool = |(number, (documents, share)): (usize, (Tokens, f64))| {
        let tokens = documents.count();
        if let Tokens::Conversations(windows) = &documents {
            let sequences = windows.len();
            if sequences == 0 {
                let problem = format!("no conversation has an answer within its first {length} tokens");
                return Err(TrainError::TooLittle { problem });
            }
            return Ok(Pool { sequences, documents, share });
        }
        if tokens <= length {
            let of = if several { format!(" of source {}", number + 1) } else { String::new() };
            let problem = format!(
                "{tokens} tokens{of} for training are less than one sequence of {length}; give more text, or a \
                 shorter `run.sequence_length`"
            );
            return Err(TrainError::TooLittle { problem });
        }
        Ok(Pool { sequences: (tokens - 1) / length, documents, share })
    };
    groups.into_iter().enumerate().map(pool).collect()
}

/// A tokenizer may have more tokens than its model.
fn known<'a>(mut tokens: impl Iterator<Item = &'a u32>, size: usize) -> Result<(), TrainError> {
    match tokens.find(|&&token| token as usize >= size) {
        None => Ok(()),
        Some(token) => {
            let problem = format!("the text has its token {token}, and the model's embedding {size} rows");
            Err(TrainError::Tokenizer { problem })
        }
    }
}

/// A tokenizer whose own token separates documents.
pub(crate) fn separated(json: Vec<u8>) -> Result<Vocabulary, TrainError> {
    let wrong = |problem: String| TrainError::Tokenizer { problem };
    let tokenizer = Tokenizer::from_bytes(&json).map_err(|error| wrong(error.to_string()))?;
    let size = tokenizer.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
    let begin = END_OF_TEXT_NAMES.iter().find_map(|name| tokenizer.token_to_id(name)).ok_or_else(|| {
        wrong(format!("it has no token between documents: one of {}", END_OF_TEXT_NAMES.join(", ")))
    })?;
    Ok(Vocabulary { json, size, begin, end: None, chat: None })
}

/// Where a run is in its text: what [`Dataset::batch`] keeps from call to call.
#[derive(Debug, Default)]
pub struct Epoch {
    /// Sequences drawn from all pools, and from each.
    drawn: (u64, Vec<u64>),
    orders: Vec<Order>,
}

/// The tokens of a pool's epoch in its order.
#[derive(Debug, Default)]
struct Order {
    number: Option<u64>,
    tokens: Vec<u32>,
    sequences: Vec<usize>,
}

impl Epoch {
    /// The pool of a sequence of the run, and the sequence's number in that: each sequence comes from the pool that lacks the
    /// most of its share.
    fn draw(&mut self, sequence: u64, pools: &[Pool]) -> (usize, u64) {
        self.orders.resize_with(pools.len(), Order::default);
        if pools.len() == 1 {
            return (0, sequence);
        }
        if self.drawn.0 > sequence || self.drawn.1.is_empty() {
            self.drawn = (0, vec![0; pools.len()]);
        }
        loop {
            let (all, of_pools) = &mut self.drawn;
            let lack = |i: usize| pools[i].share * (*all + 1) as f64 - of_pools[i] as f64;
            let next = (1..pools.len()).fold(0, |best, i| if lack(i) > lack(best) { i } else { best });
            let index = of_pools[next];
            of_pools[next] += 1;
            *all += 1;
            if *all > sequence {
                return (next, index);
            }
        }
    }
}

impl Order {
    fn go_to(&mut self, number: u64, (pool, data): (usize, &Dataset)) {
        if self.number == Some(number) {
            return;
        }
        let mut random = SplitMix64::new(
            data.seed
                ^ (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
                ^ (pool as u64).wrapping_mul(0xd1b5_4a32_d192_ed03),
        );
        let pool = &data.pools[pool];
        self.tokens.clear();
        if let Tokens::Texts(texts) = &pool.documents {
            let mut documents: Vec<usize> = (0..texts.len()).collect();
            shuffle(&mut documents, &mut random);
            documents.iter().for_each(|&i| self.tokens.extend(&texts[i]));
        }
        self.sequences = (0..pool.sequences).collect();
        shuffle(&mut self.sequences, &mut random);
        self.number = Some(number);
    }
}

/// A document's sequences, the last one filled up.
fn windows(tokens: Vec<u32>, filler: u32, length: usize) -> impl Iterator<Item = Window> {
    let count = (tokens.len() - 1).div_ceil(length);
    (0..count).map(move |i| {
        let end = ((i + 1) * length).min(tokens.len() - 1);
        let mut inputs = tokens[i * length..end].to_vec();
        inputs.resize(length, filler);
        let targets = tokens[i * length + 1..end + 1].to_vec();
        Window { inputs, counts: vec![true; targets.len()], targets }
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
mod tests;
