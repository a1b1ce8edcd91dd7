//! A generator of simple stories: the text that the small model of this project learns from.
//!
//! The stories come from a probabilistic grammar of a little world, the valley: its people in `world`, what
//! can happen to them in `plots`, the machine in `teller`. A story is a sequence of random choices, each
//! with a known probability, so that a story comes with the exact probability of its derivation, and a corpus
//! with its entropy:
//!
//! - The mean of -log2 p(derivation) is an unbiased estimate of the entropy of derivations, H(D).
//! - H(D) = H(text) + H(D | text): it is the entropy of the text if no text has two derivations, and else an
//!   upper bound. [`read`] finds all derivations of a text, and thereby its exact probability; the tests find
//!   one for every story that they read.
//! - No model that has not seen the stories can, in expectation, spend fewer bits on them than H(text). So
//!   total bits / tokens is the floor of its cross-entropy in bits per token, and 2 to this power the floor of
//!   its perplexity, for any tokenizer ([`Entropy::perplexity`]).
//!
//! The text depends on the seed alone, on every machine. (The bits are sums of logarithms, and may differ in
//! the last place.)
//!
//! ```
//! use bitnet_burn_examples::stories::{Entropy, Stories, read};
//!
//! let stories: Vec<_> = Stories::new(1).take(10).collect();
//! println!("{}", stories[0].text);
//! println!("{:.1} bits a story", stories.iter().collect::<Entropy>().per_story());
//! assert_eq!(read(&stories[0].text).derivations, 1);
//! assert_eq!(read("Once there was an hedgehog.").derivations, 0);
//! ```

mod plots;
mod teller;
#[cfg(test)]
mod tests;
mod world;

use bitnet_burn_formats::random::SplitMix64;

use teller::{Choice, Teller};

/// One story.
#[derive(Clone, Debug, PartialEq)]
pub struct Story {
    /// 80 to 180 words of ASCII on one line, sentences separated by single spaces.
    pub text: String,
    /// -log2 of the probability of its derivation.
    pub bits: f64,
    /// The name of its plot.
    pub plot: &'static str,
}

/// Stories without end, the same ones for a seed. They are independent of each other.
#[derive(Clone, Debug)]
pub struct Stories(SplitMix64);

impl Stories {
    /// The stories of a seed.
    pub fn new(seed: u64) -> Self {
        Self(SplitMix64::new(seed))
    }
}

impl Iterator for Stories {
    type Item = Story;

    fn next(&mut self) -> Option<Story> {
        let mut teller = Teller::random(&mut self.0);
        let plot = plots::story(&mut teller);
        Some(Story { bits: teller.bits(), text: teller.text, plot })
    }
}

/// The entropy of a corpus, estimated from its stories.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Entropy {
    /// Stories.
    pub stories: usize,
    /// Their bytes, which are their characters, without line ends.
    pub characters: usize,
    /// Their words, as separated by spaces.
    pub words: usize,
    /// The sum of their bits.
    pub bits: f64,
    squares: f64,
}

impl Entropy {
    /// Adds a story.
    pub fn add(&mut self, story: &Story) {
        self.stories += 1;
        self.characters += story.text.len();
        self.words += story.text.split(' ').count();
        self.bits += story.bits;
        self.squares += story.bits * story.bits;
    }

    /// Bits per story; NaN without stories.
    pub fn per_story(&self) -> f64 {
        self.bits / self.stories as f64
    }

    /// The standard error of [`per_story`](Self::per_story), as an estimate of the grammar's entropy.
    pub fn standard_error(&self) -> f64 {
        let n = self.stories as f64;
        ((self.squares / n - self.per_story().powi(2)).max(0.0) / (n - 1.0)).sqrt()
    }

    /// Bits per character.
    pub fn per_character(&self) -> f64 {
        self.bits / self.characters as f64
    }

    /// The lowest perplexity that a model can expect that splits these stories into so many tokens, with the
    /// token that ends a story if it has to predict that too: 2^(bits / tokens).
    pub fn perplexity(&self, tokens: usize) -> f64 {
        (self.bits / tokens as f64).exp2()
    }
}

impl<'a> FromIterator<&'a Story> for Entropy {
    fn from_iter<T: IntoIterator<Item = &'a Story>>(stories: T) -> Self {
        let mut entropy = Self::default();
        stories.into_iter().for_each(|story| entropy.add(story));
        entropy
    }
}

/// What the grammar makes of a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// In how many ways the grammar tells exactly this text; 0 if it never does.
    pub derivations: usize,
    /// -log2 of the probability of the text, over all derivations; infinite if there are none.
    pub bits: f64,
    /// The bytes at the beginning of the text with which some story begins: all of them if the text is a
    /// story, or one that was cut off.
    pub understood: usize,
}

/// Reads a text back, by trying all choices whose words agree with it.
pub fn read(text: &str) -> Reading {
    let mut script: Vec<Choice> = Vec::new();
    let (mut derivations, mut probability, mut understood) = (0, 0.0, 0);
    loop {
        let mut teller = Teller::replaying(&script, text);
        plots::story(&mut teller);
        understood = understood.max(teller.text.len());
        if !teller.lost && teller.text.len() == text.len() {
            derivations += 1;
            probability += (-teller.bits()).exp2();
        }
        // The next script in the order of a depth-first search.
        script = teller.choices;
        while let Some(last) = script.pop() {
            if last.chosen + 1 < last.of {
                script.push(Choice { chosen: last.chosen + 1, ..last });
                break;
            }
        }
        if script.is_empty() {
            return Reading { derivations, bits: -f64::log2(probability), understood };
        }
    }
}
