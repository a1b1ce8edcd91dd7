//! From logits to a token: the sampler. [`StopMatcher`] ends a text.
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

mod stop;

use std::cmp::Ordering;
use std::collections::BTreeMap;

pub use self::stop::{StopMatcher, StopOutput};

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

    /// Draws with the random numbers that `other` will draw with.
    pub(crate) fn follow(&mut self, other: &Self) {
        self.random.clone_from(&other.random);
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

#[cfg(test)]
mod tests;
