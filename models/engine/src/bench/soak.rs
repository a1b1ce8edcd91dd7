//! Whether a model that runs for long stays as it was: memory, file descriptors, threads and speed over time.

use std::fmt;
use std::time::{Duration, Instant};

use bitnet_burn::{BitNet, ForwardError, KvCache};
use bitnet_burn_backends::manager::manager;
use bitnet_burn_formats::random::SplitMix64;
use serde::{Deserialize, Serialize};

use super::ratio::{Ratio, Verdict};
use super::repetition::Repetition;
use super::stream::{self, ReadStream};
use super::{BenchError, BenchOptions, Round, Spread};
use crate::generate::GenerateError;
use crate::text::{human_bytes, human_seconds};
use crate::tokenizer::Tokenizer;

/// Samples of a whole soak. A third of them is compared with another third.
const SAMPLES: u32 = 60;

/// Growth of memory that is no leak yet, in bytes.
const SLACK: f64 = (1 << 20) as f64;

/// What was seen over time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Soak {
    /// How long it took.
    pub seconds: f64,
    /// Repetitions in all.
    pub repetitions: usize,
    /// The largest loss of speed that counts as flat, 0 to 1.
    pub tolerance: f64,
    /// The first and the last third of the samples, by quantity.
    pub trends: Vec<Trend>,
    /// Whether all of them are flat.
    pub flat: bool,
    /// What was seen, in the order of time.
    pub samples: Vec<Sample>,
}

/// What was seen at one time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds from the start.
    pub seconds: f64,
    /// Resident memory of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_bytes: Option<u64>,
    /// Open file descriptors, where the system lists them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub descriptors: Option<usize>,
    /// Threads, where the system lists them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Medians of the repetitions since the last sample, and the machine's speed.
    #[serde(flatten)]
    pub round: Round,
}

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// Resident memory in bytes.
    Memory,
    /// Open file descriptors.
    Descriptors,
    /// Threads.
    Threads,
    /// Tokens of the prompt a second.
    Prefill,
    /// Generated tokens a second.
    Decode,
}

/// How a quantity changed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trend {
    /// The quantity.
    pub quantity: Quantity,
    /// The first third of the samples.
    pub first: Spread,
    /// The last third.
    pub last: Spread,
    /// Last over first, for speeds: divided by the machine's multiply rate or read bandwidth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<Ratio>,
    /// Whether it stayed as it was, as far as noise allows to tell.
    pub flat: bool,
}

/// Resident memory, descriptors and threads of this process.
fn process() -> (Option<u64>, Option<usize>, Option<usize>) {
    use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};
    let pid = Pid::from_u32(std::process::id());
    let mut system = System::new();
    let kind = ProcessRefreshKind::nothing().with_memory().without_tasks();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, kind);
    let resident = system.process(pid).map(sysinfo::Process::memory);
    drop(system);
    let listed = |path: &str| std::fs::read_dir(path).ok().map(Iterator::count);
    // One is that of the list itself.
    let descriptors =
        listed("/proc/self/fd").or_else(|| listed("/dev/fd")).map(|count| count.saturating_sub(1));
    (resident, descriptors, listed("/proc/self/task"))
}

/// Runs a model for `duration`: repetitions of `options.prompt_tokens` and `options.generated_tokens`, each a new sequence. A
/// first repetition is not counted. `progress` receives the elapsed time.
///
/// # Errors
/// If the options ask for nothing, or for more than the context has, or if the model fails.
pub fn soak(
    model: &BitNet,
    tokenizer: Option<&Tokenizer>,
    options: &BenchOptions,
    (duration, tolerance): (Duration, f64),
    progress: &mut dyn FnMut(Duration),
) -> Result<Soak, BenchError> {
    let BenchOptions { prompt_tokens, generated_tokens, .. } = *options;
    let context = options.context.min(model.config().context_length);
    if prompt_tokens + generated_tokens == 0 {
        return Err(BenchError::Nothing);
    }
    options.check(context)?;
    let cache = || -> Result<KvCache, GenerateError> {
        let cache = model.cache(context, options.kv_cache).map_err(ForwardError::from)?;
        Ok(if options.preallocate { cache.preallocated() } else { cache })
    };
    let mut random = SplitMix64::new(options.seed);
    let mut repetition = Repetition { model, tokenizer, random: &mut random, chunk: options.chunk };
    let pool = manager().pool();
    let stream = ReadStream::new(ReadStream::default_bytes(), pool)?;
    repetition.run(cache()?, 1, prompt_tokens, generated_tokens)?;
    let began = Instant::now();
    let (mut samples, mut repetitions) = (Vec::new(), 0);
    for i in 1..=SAMPLES {
        let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
        loop {
            let timed = repetition.run(cache()?, 1, prompt_tokens, generated_tokens)?;
            prefills.extend(timed.prefill_rate(prompt_tokens));
            decodes.extend(timed.decode_rate());
            repetitions += 1;
            progress(began.elapsed());
            if began.elapsed() >= duration * i / SAMPLES {
                break;
            }
        }
        let median = |rates: &[f64]| Spread::of(rates).map(|spread| spread.median);
        let (resident_bytes, descriptors, threads) = process();
        samples.push(Sample {
            seconds: began.elapsed().as_secs_f64(),
            resident_bytes,
            descriptors,
            threads,
            round: Round {
                prefill_tokens_per_s: median(&prefills),
                decode_tokens_per_s: median(&decodes),
                read_gb_per_s: stream.quarter_gb_per_s(pool),
                multiply_adds_g_per_s: stream::multiply_adds_g_per_s(pool),
            },
        });
        // A repetition that takes longer than the rest of the time leaves fewer samples.
        if began.elapsed() >= duration && samples.len() >= 12 {
            break;
        }
    }
    Ok(Soak::of(samples, repetitions, began.elapsed(), tolerance))
}

impl Soak {
    fn of(samples: Vec<Sample>, repetitions: usize, took: Duration, tolerance: f64) -> Self {
        let third = samples.len() / 3;
        let ends = [&samples[..third], &samples[samples.len() - third..]];
        let spreads = |value: &dyn Fn(&Sample) -> Option<f64>| {
            let [first, last] = ends.map(|end| end.iter().filter_map(value).collect::<Vec<f64>>());
            Some((Spread::of(&first)?, Spread::of(&last)?))
        };
        let count = |quantity, slack: f64, value: &dyn Fn(&Sample) -> Option<f64>| {
            let (first, last) = spreads(value)?;
            Some(Trend { quantity, first, last, ratio: None, flat: last.min <= first.max + slack })
        };
        let multiplies = samples.iter().all(|sample| sample.round.multiply_adds_g_per_s.is_some());
        let speed = |quantity, value: &dyn Fn(&Round) -> Option<f64>| {
            let (first, last) = spreads(&|sample| value(&sample.round))?;
            let normalised = |end: &[Sample]| -> Vec<f64> {
                let divided = |Sample { round, .. }: &Sample| {
                    let machine = round.multiply_adds_g_per_s.filter(|_| multiplies);
                    Some(value(round)? / machine.unwrap_or(round.read_gb_per_s))
                };
                end.iter().filter_map(divided).collect()
            };
            let ratio = Ratio::of_groups(&normalised(ends[0]), &normalised(ends[1]))?;
            let flat = ratio.verdict(tolerance) != Verdict::Worse;
            Some(Trend { quantity, first, last, ratio: Some(ratio), flat })
        };
        let trends: Vec<Trend> = [
            count(Quantity::Memory, SLACK, &|sample| sample.resident_bytes.map(|bytes| bytes as f64)),
            count(Quantity::Descriptors, 0.0, &|sample| sample.descriptors.map(|count| count as f64)),
            count(Quantity::Threads, 0.0, &|sample| sample.threads.map(|count| count as f64)),
            speed(Quantity::Prefill, &|round| round.prefill_tokens_per_s),
            speed(Quantity::Decode, &|round| round.decode_tokens_per_s),
        ]
        .into_iter()
        .flatten()
        .collect();
        let flat = trends.iter().all(|trend| trend.flat);
        Self { seconds: took.as_secs_f64(), repetitions, tolerance, trends, flat, samples }
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Descriptors => "descriptors",
            Self::Threads => "threads",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        })
    }
}

impl fmt::Display for Trend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { quantity, first, last, ratio, flat } = self;
        let show = |value: f64| match quantity {
            Quantity::Memory => human_bytes(value as u64),
            Quantity::Descriptors | Quantity::Threads => format!("{value:.0}"),
            Quantity::Prefill | Quantity::Decode => format!("{value:.2} tokens/s"),
        };
        let verdict = match (flat, ratio) {
            (true, _) => "flat",
            (false, None) => "grows",
            (false, Some(_)) => "slower",
        };
        write!(
            f,
            "{verdict}: {quantity} {} in the first third, {} in the last",
            show(first.median),
            show(last.median)
        )?;
        match ratio.and_then(|ratio| Some((ratio.ratio, ratio.interval?))) {
            Some((ratio, [low, high])) => {
                write!(f, "; {ratio:.3} times the machine's speed of then (95 % sure: {low:.3} to {high:.3})")
            }
            None => Ok(()),
        }
    }
}

impl fmt::Display for Soak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { repetitions, samples, .. } = self;
        let time = human_seconds(self.seconds);
        writeln!(f, "{repetitions} repetitions in {time}, {} samples", samples.len())?;
        self.trends.iter().try_for_each(|trend| writeln!(f, "{trend}"))?;
        writeln!(f, "{}", if self.flat { "flat" } else { "not flat" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaks_and_losses_are_told_from_noise() {
        let sample = |i: usize, leak: u64, loss: f64| Sample {
            seconds: i as f64,
            resident_bytes: Some(100_000_000 + (i as u64 * 7919) % 500_000 + leak * i as u64),
            descriptors: Some(9 + usize::from(leak > 0) * i),
            threads: Some(2),
            round: Round {
                prefill_tokens_per_s: None,
                decode_tokens_per_s: Some((100.0 + (i * 13 % 7) as f64) * (1.0 - loss * i as f64)),
                read_gb_per_s: 10.0,
                multiply_adds_g_per_s: None,
            },
        };
        let soak = |leak: u64, loss: f64| {
            let samples = (0..30).map(|i| sample(i, leak, loss)).collect();
            Soak::of(samples, 30, Duration::from_secs(30), 0.05)
        };
        let flat =
            |soak: &Soak| soak.trends.iter().map(|trend| (trend.quantity, trend.flat)).collect::<Vec<_>>();
        use Quantity::{Decode, Descriptors, Memory, Threads};
        let still = soak(0, 0.0);
        assert!(still.flat, "{still}");
        assert_eq!(flat(&still), [(Memory, true), (Descriptors, true), (Threads, true), (Decode, true)]);
        let leaking = soak(100_000, 0.01);
        assert!(!leaking.flat);
        assert_eq!(flat(&leaking), [(Memory, false), (Descriptors, false), (Threads, true), (Decode, false)]);
        let text = leaking.to_string();
        assert!(text.contains("grows: memory") && text.contains("slower: decode"), "{text}");
        assert!(text.ends_with("not flat\n"), "{text}");
    }

    #[test]
    fn the_process_is_looked_at() {
        let (resident, descriptors, threads) = process();
        assert!(resident.is_some_and(|bytes| bytes > 100_000));
        if cfg!(target_os = "linux") {
            assert!(descriptors.is_some_and(|count| count >= 3) && threads.is_some_and(|count| count >= 1));
        }
    }
}
