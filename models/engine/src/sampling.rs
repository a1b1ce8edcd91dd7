//! From logits to a token, and from tokens to the end of a text: the sampler and the stop strings.
//!
//! The order of the steps is fixed, and it is the usual one (transformers' logits processors before its
//! warpers; top-p: Holtzman et al., arXiv 1904.09751; min-p: arXiv 2407.01082; repetition penalty: CTRL,
//! arXiv 1909.05858):
//!
//! 1. **repetition penalty** on the raw logits, because its definition depends on their sign;
//! 2. **presence penalty, frequency penalty and bias**, which are added (OpenAI's API);
//! 3. **temperature**, so that the truncations below see the distribution that is drawn from;
//! 4. **top-k**, which depends on the order only (and so makes everything after it cheap);
//! 5. **softmax** in f64 over what is left;
//! 6. **top-p**: the smallest set of most likely tokens whose probabilities sum to at least p;
//! 7. **min-p**: tokens with at least min_p times the probability of the most likely one;
//! 8. **draw** from the renormalised rest.
//!
//! The same seed, logits and history give the same tokens on every platform: the generator
//! (xoshiro256++) and the exponential function are written out here, since `rand`'s `StdRng` may change with
//! its version and the C library's `exp` differs between systems in the last bit.

use std::cmp::Ordering;
use std::collections::BTreeMap;

/// How the next token is chosen. The default is greedy.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct SamplingConfig {
    /// Divides the logits; 0 is greedy (the most likely token, the lowest id among equals).
    pub temperature: f32,
    /// Only the k most likely tokens; 0 is off. Among equal logits the lower ids are kept.
    pub top_k: usize,
    /// Only the smallest set of most likely tokens with a total probability of at least p; 1 is off.
    pub top_p: f32,
    /// Only tokens with at least `min_p` times the probability of the most likely one; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred already; 1 is off.
    pub repetition_penalty: f32,
    /// How many of the last tokens the repetition penalty looks at; 0 is all of them.
    pub repetition_window: usize,
    /// Subtracted from the logits of tokens that the answer has; 0 is off. The prompt does not count.
    #[serde(skip_serializing_if = "is_zero")]
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token as often as the answer has it; 0 is off. The prompt does not count.
    #[serde(skip_serializing_if = "is_zero")]
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// The seed of the generator.
    pub seed: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(value: &f32) -> bool {
    *value == 0.0
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
        }
    }
}

impl SamplingConfig {
    /// Greedy decoding: the default, by name.
    pub fn greedy() -> Self {
        Self::default()
    }

    /// Checks that every setting is in its range.
    ///
    /// # Errors
    /// [`SamplingError::Setting`] with the name of the first setting that isn't, its value and its range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |name, value: f32, ok: bool, range| {
            if ok { Ok(()) } else { Err(SamplingError::Setting { name, value, range }) }
        };
        let t = self.temperature;
        check("temperature", t, t.is_finite() && t >= 0.0, "a finite number, 0 (greedy) or more")?;
        let p = self.top_p;
        check("top_p", p, p > 0.0 && p <= 1.0, "more than 0 and at most 1 (off)")?;
        let m = self.min_p;
        check("min_p", m, (0.0..=1.0).contains(&m), "between 0 (off) and 1")?;
        let r = self.repetition_penalty;
        check("repetition_penalty", r, r.is_finite() && r > 0.0, "a finite number more than 0 (1 is off)")?;
        let finite = "a finite number (0 is off)";
        check("presence_penalty", self.presence_penalty, self.presence_penalty.is_finite(), finite)?;
        check("frequency_penalty", self.frequency_penalty, self.frequency_penalty.is_finite(), finite)?;
        self.logit_bias
            .values()
            .try_for_each(|&bias| check("logit_bias", bias, bias.is_finite(), "finite numbers"))
    }

    /// Whether logits are changed before anything is cut off or drawn.
    fn changes_logits(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || !self.logit_bias.is_empty()
    }
}

/// Why no token could be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// A setting is out of its range.
    #[error("{name} is {value}, but must be {range}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// There are no logits.
    #[error("there are no logits to choose a token from")]
    Empty,
    /// A logit is NaN or +infinity: the model computed garbage.
    #[error("the logit of token {id} is {value}: the model's output is not usable")]
    NotFinite {
        /// The token.
        id: u32,
        /// Its logit.
        value: f32,
    },
    /// Every token is excluded.
    #[error("all {n} logits are -inf: there is no token to choose")]
    AllExcluded {
        /// How many there are.
        n: usize,
    },
    /// A token of the bias is not in the vocabulary.
    #[error("logit_bias has token {id}, but there are {n} tokens")]
    Bias {
        /// The token.
        id: u32,
        /// How many tokens there are.
        n: usize,
    },
    /// A token of the history is not in the vocabulary.
    #[error("the history holds token {id}, but there are {n} logits")]
    History {
        /// The token.
        id: u32,
        /// How many logits there are.
        n: usize,
    },
    /// A stop string is empty: it would stop everything at once.
    #[error("stop string {index} is empty")]
    EmptyStop {
        /// Which one, from 0.
        index: usize,
    },
}

/// One token that may still be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    /// Its share of the probability, relative to the most likely token's 1.
    weight: f64,
}

/// More likely first, lower ids first among equals. The logits are not NaN.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Chooses tokens; see the [module](self) for the steps and their order.
///
/// Its buffers are kept between calls: after the first call nothing is allocated.
///
/// ```
/// # use bitnet_burn_engine::sampling::{Sampler, SamplingConfig};
/// let config = SamplingConfig { temperature: 0.7, top_p: 0.9, seed: 1, ..Default::default() };
/// let mut sampler = Sampler::new(config)?;
/// let token = sampler.sample(&[0.5, 3.0, -1.0, 2.5], &[], 0)?;
/// assert!(token < 4);
/// # Ok::<(), bitnet_burn_engine::sampling::SamplingError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplingConfig,
    random: Xoshiro256,
    logits: Vec<f32>,
    window: Vec<u32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler with these settings, seeded with [`SamplingConfig::seed`].
    ///
    /// # Errors
    /// [`SamplingError::Setting`], as [`SamplingConfig::validate`].
    pub fn new(config: SamplingConfig) -> Result<Self, SamplingError> {
        config.validate()?;
        let random = Xoshiro256::new(config.seed);
        Ok(Self { config, random, logits: Vec::new(), window: Vec::new(), candidates: Vec::new() })
    }

    /// The settings.
    pub fn config(&self) -> &SamplingConfig {
        &self.config
    }

    /// Chooses the next token.
    ///
    /// # Arguments
    /// - `logits`: one per token of the vocabulary; -inf excludes a token
    /// - `history`: the tokens so far, prompt included, oldest first; only penalties read them
    /// - `answer`: how many of the last ones are the answer's
    ///
    /// # Errors
    /// If there is nothing to choose from: no logits, a NaN or +inf among them, all of them -inf, or a token
    /// of a penalty or of the bias that has no logit.
    pub fn sample(&mut self, logits: &[f32], history: &[u32], answer: usize) -> Result<u32, SamplingError> {
        if logits.is_empty() {
            return Err(SamplingError::Empty);
        }
        // One pass that vectorises; which one it was is found out only when it matters.
        if !logits.iter().fold(true, |ok, &l| ok & (l < f32::INFINITY)) {
            let id = logits.iter().position(|&l| l.is_nan() || l == f32::INFINITY).unwrap_or(0);
            return Err(SamplingError::NotFinite { id: id as u32, value: logits[id] });
        }

        let changed = self.config.changes_logits();
        if changed {
            self.change(logits, history, answer)?;
        }
        let config = &self.config;
        let logits = if changed { &self.logits[..] } else { logits };

        let (best, max) = argmax(logits);
        if max == f32::NEG_INFINITY {
            return Err(SamplingError::AllExcluded { n: logits.len() });
        }
        if config.temperature == 0.0 || config.top_k == 1 {
            return Ok(best);
        }

        let candidates = &mut self.candidates;
        candidates.clear();
        if config.top_k > 0 && config.top_k < logits.len() {
            top_k(logits, config.top_k, candidates);
        } else {
            candidates.extend(all(logits));
        }

        let temperature = f64::from(config.temperature);
        let mut total = 0.0;
        for c in candidates.iter_mut() {
            c.weight = exp((f64::from(c.logit) - f64::from(max)) / temperature);
            total += c.weight;
        }
        if config.top_p < 1.0 {
            top_p(candidates, f64::from(config.top_p) * total);
        }
        if config.min_p > 0.0 {
            // The most likely token's weight is exp(0) = 1, so it always stays.
            let least = f64::from(config.min_p);
            candidates.retain(|c| c.weight >= least);
        }

        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let mut rest = self.random.unit() * total;
        let mut chosen = best;
        for c in candidates.iter().filter(|c| c.weight > 0.0) {
            chosen = c.id;
            rest -= c.weight;
            if rest < 0.0 {
                break;
            }
        }
        Ok(chosen)
    }

    /// The logits with penalties and bias, in `self.logits`.
    fn change(&mut self, logits: &[f32], history: &[u32], answer: usize) -> Result<(), SamplingError> {
        let Self { config, logits: changed, window, .. } = self;
        changed.clear();
        changed.extend_from_slice(logits);
        let n = logits.len();
        let mut logit = |id: u32, change: &dyn Fn(f32) -> f32| -> Option<()> {
            let logit = changed.get_mut(id as usize)?;
            // A huge logit could be carried beyond f32.
            *logit = change(*logit).min(f32::MAX);
            Some(())
        };
        let last = |count: usize| &history[history.len().saturating_sub(count)..];
        if config.repetition_penalty != 1.0 {
            let penalty = config.repetition_penalty;
            sort(
                window,
                if config.repetition_window == 0 { history } else { last(config.repetition_window) },
            );
            window.dedup();
            for &id in &*window {
                logit(id, &|l| if l > 0.0 { l / penalty } else { l * penalty })
                    .ok_or(SamplingError::History { id, n })?;
            }
        }
        if config.presence_penalty != 0.0 || config.frequency_penalty != 0.0 {
            sort(window, last(answer));
            for same in window.chunk_by(|a, b| a == b) {
                let (id, times) = (same[0], same.len() as f32);
                logit(id, &|l| l - config.presence_penalty - times * config.frequency_penalty)
                    .ok_or(SamplingError::History { id, n })?;
            }
        }
        for (&id, bias) in &config.logit_bias {
            logit(id, &|l| l + bias).ok_or(SamplingError::Bias { id, n })?;
        }
        Ok(())
    }
}

/// `tokens` in order, in place of what `sorted` had.
fn sort(sorted: &mut Vec<u32>, tokens: &[u32]) {
    sorted.clear();
    sorted.extend_from_slice(tokens);
    sorted.sort_unstable();
}

/// The largest logit and the lowest id that has it; id 0 if all are -inf.
fn argmax(logits: &[f32]) -> (u32, f32) {
    // Two passes, since a maximum vectorises and a maximum with its place does not.
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &l| if l > m { l } else { m });
    let id = logits.iter().position(|&l| l == max).unwrap_or(0);
    (id as u32, max)
}

fn all(logits: &[f32]) -> impl Iterator<Item = Candidate> + '_ {
    (0u32..).zip(logits).map(|(id, &logit)| Candidate { id, logit, weight: 0.0 })
}

/// The `k` first of `logits` by rank, ranked, into the empty `kept`.
///
/// One pass keeps at most 4k candidates; a selection cuts them down to k whenever they are full and raises
/// the bar for the rest, so that a vocabulary of 128k costs about one comparison a token.
fn top_k(logits: &[f32], k: usize, kept: &mut Vec<Candidate>) {
    let full = k.saturating_mul(4).max(256);
    let mut bar = f32::NEG_INFINITY;
    for c in all(logits) {
        // Later tokens lose against equal ones, having a higher id. The first k have nobody to lose against.
        if c.logit > bar || (kept.len() < k && c.logit == bar) {
            kept.push(c);
            if kept.len() >= full {
                kept.select_nth_unstable_by(k - 1, by_rank);
                kept.truncate(k);
                bar = kept[k - 1].logit;
            }
        }
    }
    if kept.len() > k {
        kept.select_nth_unstable_by(k - 1, by_rank);
        kept.truncate(k);
    }
    kept.sort_unstable_by(by_rank);
}

/// Keeps the first candidates by rank, ranked, up to and with the one at which their weights reach `target`.
fn top_p(candidates: &mut Vec<Candidate>, target: f64) {
    let (mut ranked, mut sum, mut step) = (0, 0.0, 256);
    while ranked < candidates.len() {
        // Ranks a growing piece at a time: a sharp distribution needs the first few of its 128k tokens only.
        let rest = &mut candidates[ranked..];
        let piece = step.min(rest.len());
        if piece < rest.len() {
            rest.select_nth_unstable_by(piece - 1, by_rank);
        }
        rest[..piece].sort_unstable_by(by_rank);
        for (i, c) in rest[..piece].iter().enumerate() {
            sum += c.weight;
            if sum >= target {
                candidates.truncate(ranked + i + 1);
                return;
            }
        }
        ranked += piece;
        step *= 4;
    }
}

/// e^x for x <= 0, to about 1e-15 relative, by IEEE operations alone: the same bits on every platform.
///
/// x = k ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, after Cody and Waite), e^r by its Taylor series to
/// r^13 / 13!, whose remainder is below 5e-18.
fn exp(x: f64) -> f64 {
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    /// 1.5 * 2^52: adding and subtracting it rounds to an integer, without a call where there is no
    /// instruction for that.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    const INVERSE_FACTORIALS: [f64; 14] = {
        let mut table = [1.0; 14];
        let (mut n, mut factorial) = (1, 1.0);
        while n < 14 {
            factorial *= n as f64;
            table[n] = 1.0 / factorial;
            n += 1;
        }
        table
    };
    if x < -700.0 {
        return 0.0;
    }
    let k = (x * std::f64::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - k * LN2_HIGH) - k * LN2_LOW;
    let sum = INVERSE_FACTORIALS.iter().rev().fold(0.0, |sum, c| sum * r + c);
    // k lies in -1010..=0: a normal power of two.
    sum * f64::from_bits(((1023 + k as i64) as u64) << 52)
}

/// xoshiro256++ (Blackman and Vigna, <https://prng.di.unimi.it>), seeded by SplitMix64 as its authors advise.
#[derive(Debug, Clone)]
struct Xoshiro256([u64; 4]);

impl Xoshiro256 {
    fn new(mut seed: u64) -> Self {
        Self(std::array::from_fn(|_| {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }))
    }

    fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number in [0, 1), one of 2^53.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// What [`StopMatcher::push`] lets through.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopOutput {
    /// Text that is certainly not part of a stop string, in order; may be empty.
    pub text: String,
    /// The index of the stop string that ended the text; nothing comes after it.
    pub stopped: Option<usize>,
}

/// Finds stop strings in streamed text and holds back what may be the beginning of one.
///
/// The text ends before the stop string that is complete first (the longest of several that are complete at
/// the same character). That does not depend on how the text is cut into chunks, and generation need not go
/// on to see whether a longer stop string would have begun earlier. What is held back is the longest end of
/// the text that begins a stop string, and no more (Knuth, Morris and Pratt's automaton, one per stop string:
/// constant work per byte, whatever the stop strings).
///
/// ```
/// # use bitnet_burn_engine::sampling::StopMatcher;
/// let mut stops = StopMatcher::new(["\nUser:"])?;
/// assert_eq!(stops.push("Hello\nU").text, "Hello");
/// assert_eq!(stops.push("niverse\nUs").text, "\nUniverse");
/// assert_eq!(stops.push("er: Hi").stopped, Some(0));
/// # Ok::<(), bitnet_burn_engine::sampling::SamplingError>(())
/// ```
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Automaton>,
    held: String,
    stopped: Option<usize>,
}

/// One stop string, how it overlaps itself, and how much of it the text ends with.
#[derive(Debug, Clone)]
struct Automaton {
    pattern: Vec<u8>,
    /// `fallback[i]`: the longest proper prefix that is a suffix of `pattern[..=i]`.
    fallback: Vec<usize>,
    matched: usize,
}

impl Automaton {
    fn new(pattern: &str) -> Self {
        let pattern = pattern.as_bytes().to_vec();
        let mut fallback = vec![0; pattern.len()];
        let mut matched = 0;
        for i in 1..pattern.len() {
            while matched > 0 && pattern[matched] != pattern[i] {
                matched = fallback[matched - 1];
            }
            matched += usize::from(pattern[matched] == pattern[i]);
            fallback[i] = matched;
        }
        Self { pattern, fallback, matched: 0 }
    }

    /// Whether the pattern is complete with this byte. Not to be called again after it was.
    fn push(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.pattern[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(self.pattern[self.matched] == byte);
        self.matched == self.pattern.len()
    }
}

impl StopMatcher {
    /// A matcher for these stop strings; with none, everything passes.
    ///
    /// # Errors
    /// [`SamplingError::EmptyStop`] if one of them is empty.
    pub fn new<S: AsRef<str>>(stops: impl IntoIterator<Item = S>) -> Result<Self, SamplingError> {
        let automaton = |(index, stop): (usize, S)| match stop.as_ref() {
            "" => Err(SamplingError::EmptyStop { index }),
            stop => Ok(Automaton::new(stop)),
        };
        let stops = stops.into_iter().enumerate().map(automaton).collect::<Result<_, _>>()?;
        Ok(Self { stops, held: String::new(), stopped: None })
    }

    /// Takes the next piece of text and returns what may be shown now. After a stop string nothing may.
    pub fn push(&mut self, text: &str) -> StopOutput {
        if self.stopped.is_some() {
            return StopOutput { text: String::new(), stopped: self.stopped };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            let mut longest = 0;
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.push(byte) && stop.pattern.len() > longest {
                    longest = stop.pattern.len();
                    self.stopped = Some(index);
                }
            }
            if longest > 0 {
                // What an automaton has matched is never longer than what is held, so this can't be negative.
                self.held.truncate((before + i + 1).saturating_sub(longest));
                return StopOutput { text: std::mem::take(&mut self.held), stopped: self.stopped };
            }
        }
        // Both the text and the stop strings are UTF-8, so a common piece begins and ends between characters.
        let hold = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len().saturating_sub(hold));
        StopOutput { text: std::mem::replace(&mut self.held, held), stopped: None }
    }

    /// The text is over: returns what was held back.
    pub fn flush(&mut self) -> String {
        self.stops.iter_mut().for_each(|stop| stop.matched = 0);
        std::mem::take(&mut self.held)
    }

    /// The index of the stop string that ended the text, if one did.
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampler(edit: impl FnOnce(&mut SamplingConfig)) -> Sampler {
        let mut config = SamplingConfig { temperature: 1.0, seed: 7, ..SamplingConfig::default() };
        edit(&mut config);
        Sampler::new(config).unwrap()
    }

    /// How often each token is drawn.
    fn counts(sampler: &mut Sampler, logits: &[f32], history: &[u32], draws: usize) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits, history, 0).unwrap() as usize] += 1;
        }
        counts
    }

    /// Pearson's chi-square against these probabilities; tokens of probability 0 must not be drawn at all.
    fn chi_square(counts: &[usize], probabilities: &[f64]) -> f64 {
        let n: usize = counts.iter().sum();
        let total: f64 = probabilities.iter().sum();
        let mut sum = 0.0;
        for (&count, p) in counts.iter().zip(probabilities) {
            let expected = n as f64 * p / total;
            if expected == 0.0 {
                assert_eq!(count, 0);
            } else {
                sum += (count as f64 - expected).powi(2) / expected;
            }
        }
        sum
    }

    /// ln(p), so that a softmax at temperature 1 gives the weights back.
    fn logits_of(weights: &[f64]) -> Vec<f32> {
        weights.iter().map(|w| w.ln() as f32).collect()
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        let mut greedy = Sampler::new(SamplingConfig::greedy()).unwrap();
        assert_eq!(greedy.sample(&[1.0, 3.0, 3.0, 2.0], &[], 0), Ok(1));
        assert_eq!(greedy.sample(&[-0.0, 0.0], &[], 0), Ok(0));
        assert_eq!(greedy.sample(&[f32::NEG_INFINITY, -5.0], &[], 0), Ok(1));
        assert_eq!(sampler(|c| c.top_k = 1).sample(&[1.0, 3.0, 3.0], &[], 0), Ok(1));
    }

    #[test]
    fn garbage_is_an_error() {
        for config in [SamplingConfig::greedy(), SamplingConfig { temperature: 1.0, ..Default::default() }] {
            let mut s = Sampler::new(config).unwrap();
            assert_eq!(s.sample(&[], &[], 0), Err(SamplingError::Empty));
            let nan = s.sample(&[0.0, f32::NAN], &[], 0);
            assert!(matches!(nan, Err(SamplingError::NotFinite { id: 1, .. })));
            let infinite = s.sample(&[f32::INFINITY, 0.0], &[], 0);
            assert!(matches!(infinite, Err(SamplingError::NotFinite { id: 0, .. })));
            let excluded = s.sample(&[f32::NEG_INFINITY; 3], &[], 0);
            assert_eq!(excluded, Err(SamplingError::AllExcluded { n: 3 }));
        }
        let foreign = sampler(|c| c.repetition_penalty = 1.1).sample(&[0.0, 1.0], &[2], 0);
        assert_eq!(foreign, Err(SamplingError::History { id: 2, n: 2 }));
    }

    #[test]
    fn settings_out_of_range_are_named() {
        type Edit = fn(&mut SamplingConfig);
        let bad: [(&str, Edit); 9] = [
            ("temperature", |c| c.temperature = -0.1),
            ("temperature", |c| c.temperature = f32::NAN),
            ("temperature", |c| c.temperature = f32::INFINITY),
            ("top_p", |c| c.top_p = 0.0),
            ("top_p", |c| c.top_p = 1.5),
            ("min_p", |c| c.min_p = -0.5),
            ("min_p", |c| c.min_p = 2.0),
            ("repetition_penalty", |c| c.repetition_penalty = 0.0),
            ("repetition_penalty", |c| c.repetition_penalty = f32::NAN),
        ];
        for (name, edit) in bad {
            let mut config = SamplingConfig::default();
            edit(&mut config);
            assert!(config.validate().unwrap_err().to_string().starts_with(name));
            assert!(Sampler::new(config).is_err());
        }
    }

    #[test]
    fn draws_follow_the_softmax() {
        let weights = [0.4, 0.3, 0.15, 0.1, 0.05];
        let counts = counts(&mut sampler(|_| ()), &logits_of(&weights), &[], 20_000);
        // 4 degrees of freedom: 23.5 is the 0.9999 quantile.
        assert!(chi_square(&counts, &weights) < 23.5, "{counts:?}");
    }

    #[test]
    fn temperature_is_a_power_of_the_probabilities() {
        let weights = [0.5, 0.3, 0.2];
        let counts = counts(&mut sampler(|c| c.temperature = 0.5), &logits_of(&weights), &[], 20_000);
        assert!(chi_square(&counts, &weights.map(|w| w * w)) < 18.4, "{counts:?}");
        // So close to 0 that every other weight vanishes.
        assert_eq!(sampler(|c| c.temperature = 1e-30).sample(&[0.0, 1.0, 0.999], &[], 0), Ok(1));
        assert_eq!(
            sampler(|c| c.temperature = f32::MIN_POSITIVE).sample(&[f32::MAX, f32::MIN], &[], 0),
            Ok(0)
        );
    }

    #[test]
    fn top_k_keeps_exactly_k() {
        let logits = [2.0, 1.0, 2.0, 0.0, 2.0];
        let counts = counts(&mut sampler(|c| c.top_k = 2), &logits, &[], 4_000);
        assert!(chi_square(&counts, &[1.0, 0.0, 1.0, 0.0, 0.0]) < 15.1, "{counts:?}");
    }

    #[test]
    fn top_p_keeps_the_smallest_sufficient_set() {
        let weights = [0.125, 0.5, 0.0625, 0.25, 0.0625];
        let kept = |p: f32| {
            let mut candidates: Vec<_> = all(&logits_of(&weights)).collect();
            for (c, w) in candidates.iter_mut().zip(weights) {
                c.weight = w;
            }
            top_p(&mut candidates, f64::from(p));
            candidates.iter().map(|c| c.id).collect::<Vec<_>>()
        };
        assert_eq!(kept(0.01), [1]);
        assert_eq!(kept(0.5), [1]);
        assert_eq!(kept(0.51), [1, 3]);
        assert_eq!(kept(0.75), [1, 3]);
        assert_eq!(kept(0.76), [1, 3, 0]);
        assert_eq!(kept(0.9375), [1, 3, 0, 2]);
        assert_eq!(kept(0.94), [1, 3, 0, 2, 4]);
        let counts = counts(&mut sampler(|c| c.top_p = 0.7), &logits_of(&weights), &[], 6_000);
        assert!(chi_square(&counts, &[0.0, 2.0, 0.0, 1.0, 0.0]) < 15.1, "{counts:?}");
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        let logits = logits_of(&[0.4, 0.25, 0.199, 0.151]);
        let counts = counts(&mut sampler(|c| c.min_p = 0.5), &logits, &[], 6_000);
        assert!(chi_square(&counts, &[0.4, 0.25, 0.0, 0.0]) < 15.1, "{counts:?}");
        assert_eq!(sampler(|c| c.min_p = 1.0).sample(&logits, &[], 0), Ok(0));
    }

    #[test]
    fn truncations_combine_in_order() {
        // Top-k first: among the three kept, 0.5 and 0.3 are 0.84 of the mass, so top-p 0.83 keeps two.
        // Over the whole vocabulary they would be 0.8, and a third would stay.
        let weights = [0.5, 0.3, 0.15, 0.05];
        let mut s = sampler(|c| {
            c.top_k = 3;
            c.top_p = 0.83;
        });
        let counts = counts(&mut s, &logits_of(&weights), &[], 6_000);
        assert!(chi_square(&counts, &[0.5, 0.3, 0.0, 0.0]) < 15.1, "{counts:?}");
    }

    #[test]
    fn repetition_penalty_counts_each_token_once_within_the_window() {
        let greedy = |penalty: f32, window: usize, logits: &[f32], history: &[u32]| {
            let config = SamplingConfig {
                repetition_penalty: penalty,
                repetition_window: window,
                ..Default::default()
            };
            Sampler::new(config).unwrap().sample(logits, history, 0).unwrap()
        };
        assert_eq!(greedy(2.0, 0, &[3.0, 1.6], &[0]), 1);
        assert_eq!(greedy(2.0, 0, &[3.0, 1.4], &[0, 0, 0]), 0);
        assert_eq!(greedy(2.0, 0, &[-1.0, -1.5], &[0]), 1);
        assert_eq!(greedy(2.0, 2, &[3.0, 1.6, 0.0], &[0, 2, 2]), 0);
        assert_eq!(greedy(2.0, 3, &[3.0, 1.6, 0.0], &[0, 2, 2]), 1);
        assert_eq!(greedy(1e-30, 0, &[f32::MAX, 1.0], &[0]), 0);
    }

    #[test]
    fn presence_and_frequency_count_the_answer_and_a_bias_is_added() {
        // The answer is the last three tokens: 1 once, 0 twice.
        let (logits, history) = ([3.0, 2.9, 2.5, 2.4], [3, 1, 0, 0]);
        let choose = |set: &dyn Fn(&mut SamplingConfig)| {
            let mut config = SamplingConfig::greedy();
            set(&mut config);
            Sampler::new(config).unwrap().sample(&logits, &history, 3)
        };
        assert_eq!(choose(&|_| ()), Ok(0));
        assert_eq!(choose(&|c| c.presence_penalty = 0.3), Ok(0), "both lose the same");
        assert_eq!(choose(&|c| c.frequency_penalty = 0.3), Ok(1), "2.4 and 2.6");
        assert_eq!(choose(&|c| (c.presence_penalty, c.frequency_penalty) = (0.3, 0.3)), Ok(2));
        assert_eq!(choose(&|c| c.logit_bias = [(3, 0.7)].into()), Ok(3));
        assert_eq!(choose(&|c| c.logit_bias = [(0, -100.0)].into()), Ok(1));
        assert_eq!(choose(&|c| c.logit_bias = [(4, 1.0)].into()), Err(SamplingError::Bias { id: 4, n: 4 }));
    }

    #[test]
    fn a_seed_gives_the_same_tokens_everywhere() {
        // The first outputs of xoshiro256++ for the state that SplitMix64 makes of 0 (its authors' C code).
        let mut random = Xoshiro256::new(0);
        assert_eq!(random.0[0], 0xe220_a839_7b1d_cdaf);
        assert_eq!(random.next(), 0x53175d61490b23df);
        let logits: Vec<f32> = (0..50).map(|i| ((i * 37 % 50) as f32) / 10.0).collect();
        let draw = |seed: u64| {
            let mut s = sampler(|c| c.seed = seed);
            (0..8).map(|_| s.sample(&logits, &[], 0).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn the_exponential_is_exact_to_the_last_bits() {
        for i in 0..200_000 {
            let x = -f64::from(i) * 0.003_4;
            let expected = x.exp();
            assert!((exp(x) - expected).abs() <= 4e-15 * expected, "{x}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
    }

    proptest! {
        #[test]
        fn top_k_is_a_sort_cut_short(
            logits in prop::collection::vec(prop_oneof![
                4 => (-20i8..20).prop_map(f32::from),
                1 => Just(f32::NEG_INFINITY),
            ], 1..3000),
            k in 1usize..400,
        ) {
            let mut kept = Vec::new();
            top_k(&logits, k, &mut kept);
            let mut sorted: Vec<_> = all(&logits).collect();
            sorted.sort_by(by_rank);
            sorted.truncate(k);
            prop_assert_eq!(
                kept.iter().map(|c| c.id).collect::<Vec<_>>(),
                sorted.iter().map(|c| c.id).collect::<Vec<_>>()
            );
        }

        #[test]
        fn top_p_is_a_sort_cut_short(logits in prop::collection::vec(-8f32..8.0, 1..3000), p in 0.01f64..1.0) {
            let mut candidates: Vec<_> = all(&logits).collect();
            candidates.iter_mut().for_each(|c| c.weight = exp(f64::from(c.logit) - 8.0));
            let target = p * candidates.iter().map(|c| c.weight).sum::<f64>();
            let mut sorted = candidates.clone();
            sorted.sort_by(by_rank);
            let mut sum = 0.0;
            let n = 1 + sorted.iter().take_while(|c| { sum += c.weight; sum < target }).count();
            top_p(&mut candidates, target);
            prop_assert_eq!(
                candidates.iter().map(|c| c.id).collect::<Vec<_>>(),
                sorted.iter().take(n).map(|c| c.id).collect::<Vec<_>>()
            );
        }

        #[test]
        fn stops_do_not_depend_on_chunks(
            text in "[abä€]{0,40}",
            stops in prop::collection::vec("[abä€]{1,5}", 0..4),
            cuts in prop::collection::vec(0usize..5, 0..40),
        ) {
            // The definition: the first end of a stop string, and the longest stop string that ends there.
            let end = (1..=text.len()).find(|&e| {
                text.is_char_boundary(e) && stops.iter().any(|s| text[..e].ends_with(s.as_str()))
            });
            let expected = match end {
                None => &text[..],
                Some(e) => {
                    let found = stops.iter().filter(|s| text[..e].ends_with(s.as_str()));
                    &text[..e - found.map(String::len).max().unwrap_or(0)]
                }
            };

            let mut matcher = StopMatcher::new(&stops).unwrap();
            let mut shown = String::new();
            let mut seen = String::new();
            let mut chars = text.chars();
            let mut cuts = cuts.into_iter().chain(std::iter::repeat(1));
            while seen.len() < text.len() {
                let chunk: String = chars.by_ref().take(cuts.next().unwrap()).collect();
                seen.push_str(&chunk);
                let out = matcher.push(&chunk);
                shown.push_str(&out.text);
                prop_assert_eq!(out.stopped, matcher.stopped());
                if out.stopped.is_some() {
                    prop_assert!(matcher.push("more").text.is_empty());
                    break;
                }
                // Minimal: one more character shown, and the beginning of a stop string would be out.
                let held = &seen[shown.len()..];
                prop_assert!(held.is_empty() || stops.iter().any(|s| s.starts_with(held)));
                let longest = (0..=seen.len())
                    .filter(|&i| seen.is_char_boundary(i))
                    .find(|&i| stops.iter().any(|s| s.starts_with(&seen[i..])));
                prop_assert_eq!(held, &seen[longest.unwrap_or(seen.len())..]);
            }
            prop_assert_eq!(matcher.stopped().is_some(), end.is_some());
            if let Some(index) = matcher.stopped() {
                let whole = format!("{shown}{}", stops[index]);
                prop_assert!(text.starts_with(&whole));
            }
            shown.push_str(&matcher.flush());
            prop_assert_eq!(shown, expected);
        }
    }

    #[test]
    fn stop_strings_must_not_be_empty() {
        assert_eq!(StopMatcher::new(["a", ""]).unwrap_err(), SamplingError::EmptyStop { index: 1 });
        let mut none = StopMatcher::new::<&str>([]).unwrap();
        assert_eq!(none.push("all of it").text, "all of it");
        assert_eq!(none.flush(), "");
    }
}
