//! Where the time of a prompt and of a token goes, from the spans of profiled repetitions.

use std::collections::BTreeMap;
use std::time::Duration;

use bitnet_burn_manager::profile::{Operation, Part, Span};
use serde::{Deserialize, Serialize};

use super::Spread;
use super::repetition::Timed;

/// Where the time goes. Each time is that of the thread that runs the model, without the spans inside, so that the times of a
/// phase add up to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// The prompt and the tokens behind it, as far as they were measured.
    pub phases: Vec<Phase>,
    /// The spans of the last repetition, in the order in which they began.
    #[serde(skip)]
    pub spans: Vec<Span>,
}

/// The prompt, or the tokens behind it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// `prefill` or `decode`.
    pub phase: Operation,
    /// Tokens of all profiled repetitions.
    pub tokens: usize,
    /// Seconds by a clock of their own: forward passes, logits and drawing tokens.
    pub wall_seconds: f64,
    /// The sum of all rows.
    pub spans_seconds: f64,
    /// What profiling cost: speed without it over speed with it, minus 1. Below zero, it is the noise of the measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overhead: Option<f64>,
    /// What took the time, the largest first.
    pub rows: Vec<ProfileRow>,
}

/// What took time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProfileRow {
    /// The operation; absent for everything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<Operation>,
    /// The part of the model.
    pub part: Part,
    /// Shapes N x K of the matrices; empty where there are none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub shape: String,
    /// How often.
    pub calls: usize,
    /// Seconds in all.
    pub seconds: f64,
    /// Its part of the phase, 0 to 1.
    pub share: f64,
}

/// What makes a row.
type Key = (Operation, Option<Operation>, Part, String);

/// Collects profiled repetitions.
#[derive(Default)]
pub(super) struct Profiler {
    rows: BTreeMap<Key, (usize, Duration)>,
    repetitions: usize,
    tokens: usize,
    prefill: Duration,
    decode: Duration,
    /// Tokens a second of each repetition.
    rates: [Vec<f64>; 2],
    spans: Vec<Span>,
}

/// Each span's time without the spans inside, with the phase that it belongs to.
fn exclusive(spans: &[Span]) -> Vec<(Option<Operation>, Duration)> {
    let mut own: Vec<Duration> = spans.iter().map(|span| span.time).collect();
    let mut phases: Vec<Option<Operation>> = Vec::with_capacity(spans.len());
    for span in spans {
        let phase = match (span.operation, span.parent) {
            (phase @ (Operation::Prefill | Operation::Decode), None) => Some(phase),
            (_, Some(parent)) => {
                own[parent] = own[parent].saturating_sub(span.time);
                phases[parent]
            }
            (_, None) => None,
        };
        phases.push(phase);
    }
    phases.into_iter().zip(own).collect()
}

impl Profiler {
    /// Adds a repetition.
    pub fn push(&mut self, timed: &Timed, spans: Vec<Span>) {
        for (span, (phase, time)) in spans.iter().zip(exclusive(&spans)) {
            let Some(phase) = phase else { continue };
            let operation = match span.operation {
                Operation::Prefill | Operation::Decode | Operation::Part => None,
                operation => Some(operation),
            };
            let row = self.rows.entry((phase, operation, span.part, span.detail.clone())).or_default();
            row.0 += 1;
            row.1 += time;
        }
        let drawn = |from: usize| timed.sampling.iter().skip(from).sum::<Duration>();
        let first = usize::from(timed.prefill.is_some());
        let text = |from: usize| timed.detokenisation.iter().skip(from).sum::<Duration>();
        self.decode += timed.steps.iter().sum::<Duration>() + drawn(first) + text(first);
        if let Some(prefill) = timed.prefill {
            let of_first = |times: &[Duration]| times.first().copied().unwrap_or_default();
            self.prefill += prefill + of_first(&timed.sampling) + of_first(&timed.detokenisation);
            self.rates[0].push(1.0 / prefill.as_secs_f64());
        }
        self.rates[1].extend(timed.decode_rate());
        self.tokens += timed.steps.len();
        self.repetitions += 1;
        self.spans = spans;
    }

    /// The profile; `plain` are repetitions that were not profiled, each before one that was.
    pub fn finish(self, plain: &[Timed], prompt_tokens: usize) -> Profile {
        let prefills: Vec<f64> =
            plain.iter().filter_map(|timed| Some(1.0 / timed.prefill?.as_secs_f64())).collect();
        let decodes: Vec<f64> = plain.iter().filter_map(Timed::decode_rate).collect();
        let phases = [
            (Operation::Prefill, self.prefill, self.repetitions * prompt_tokens, (&prefills, &self.rates[0])),
            (Operation::Decode, self.decode, self.tokens, (&decodes, &self.rates[1])),
        ];
        let phase = |(phase, wall, tokens, (plain, profiled)): (
            Operation,
            Duration,
            usize,
            (&Vec<f64>, &Vec<f64>),
        )| {
            let of_phase = || self.rows.iter().filter(|((of, ..), _)| *of == phase);
            let spans_seconds = of_phase().map(|(_, (_, time))| time.as_secs_f64()).sum::<f64>();
            let row = |((_, operation, part, shape), (calls, time)): (&Key, &(usize, Duration))| ProfileRow {
                operation: *operation,
                part: *part,
                shape: shape.clone(),
                calls: *calls,
                seconds: time.as_secs_f64(),
                share: time.as_secs_f64() / spans_seconds,
            };
            let mut rows: Vec<ProfileRow> = of_phase().map(row).collect();
            rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
            let overhead = Spread::of(plain).zip(Spread::of(profiled));
            Phase {
                phase,
                tokens,
                wall_seconds: wall.as_secs_f64(),
                spans_seconds,
                overhead: overhead.map(|(plain, profiled)| plain.median / profiled.median - 1.0),
                rows,
            }
        };
        let phases = phases.into_iter().filter(|(_, wall, ..)| !wall.is_zero()).map(phase).collect();
        Profile { phases, spans: self.spans }
    }
}

impl Phase {
    /// The part of the time that no operation has, 0 to 1.
    pub fn everything_else(&self) -> f64 {
        self.rows.iter().filter(|row| row.operation.is_none()).map(|row| row.share).sum()
    }
}

/// An event of Chrome's trace format ("complete": with its duration).
#[derive(Serialize)]
struct TraceEvent {
    name: String,
    cat: Part,
    ph: &'static str,
    /// Microseconds.
    ts: f64,
    dur: f64,
    pid: u32,
    tid: u32,
}

/// A file of Chrome's trace format.
#[derive(Serialize)]
struct Trace {
    #[serde(rename = "traceEvents")]
    events: Vec<TraceEvent>,
    #[serde(rename = "displayTimeUnit")]
    unit: &'static str,
}

impl Profile {
    /// The spans of the last repetition in Chrome's trace format, which Perfetto and chrome://tracing show. A track is the
    /// thread that runs the model.
    ///
    /// # Errors
    /// If `out` can't be written.
    pub fn write_trace(&self, out: impl std::io::Write) -> serde_json::Result<()> {
        let event = |span: &Span| TraceEvent {
            name: match (span.operation, span.detail.as_str()) {
                (Operation::Part, _) => span.part.to_string(),
                (operation, "") => operation.to_string(),
                (operation, shape) => format!("{operation} {shape}"),
            },
            cat: span.part,
            ph: "X",
            ts: span.start.as_secs_f64() * 1e6,
            dur: span.time.as_secs_f64() * 1e6,
            pid: 1,
            tid: 1,
        };
        let trace = Trace { events: self.spans.iter().map(event).collect(), unit: "ms" };
        serde_json::to_writer(out, &trace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(operation: Operation, part: Part, [start, time]: [u64; 2], parent: Option<usize>) -> Span {
        let [start, time] = [start, time].map(Duration::from_millis);
        Span { operation, part, detail: String::new(), start, time, parent }
    }

    #[test]
    fn times_of_rows_add_up_to_the_phase() {
        let spans = vec![
            span(Operation::Norm, Part::Rest, [0, 5], None),
            span(Operation::Decode, Part::Rest, [5, 100], None),
            span(Operation::Part, Part::Attention, [6, 70], Some(1)),
            span(Operation::TernaryMatmul, Part::Attention, [7, 60], Some(2)),
            span(Operation::Waiting, Part::Attention, [8, 20], Some(3)),
            span(Operation::Sampling, Part::Rest, [80, 10], Some(1)),
        ];
        let timed = Timed {
            steps: vec![Duration::from_millis(90)],
            sampling: vec![Duration::from_millis(10)],
            ..Timed::default()
        };
        let mut profiler = Profiler::default();
        profiler.push(&timed, spans);
        let profile = profiler.finish(&[timed], 0);
        let [phase] = &profile.phases[..] else { panic!("{profile:?}") };
        assert_eq!((phase.phase, phase.tokens), (Operation::Decode, 1));
        assert!((phase.wall_seconds - 0.1).abs() < 1e-9 && (phase.spans_seconds - 0.1).abs() < 1e-9);
        let rows: Vec<_> = phase
            .rows
            .iter()
            .map(|row| (row.operation, row.part, (row.share * 100.0).round() as u32))
            .collect();
        assert_eq!(
            rows,
            [
                (Some(Operation::TernaryMatmul), Part::Attention, 40),
                (None, Part::Rest, 20),
                (Some(Operation::Waiting), Part::Attention, 20),
                (None, Part::Attention, 10),
                (Some(Operation::Sampling), Part::Rest, 10),
            ]
        );
        assert!((phase.everything_else() - 0.3).abs() < 1e-9);
        assert_eq!(phase.overhead, Some(0.0));
        let mut trace = Vec::new();
        profile.write_trace(&mut trace).unwrap();
        let trace: serde_json::Value = serde_json::from_slice(&trace).unwrap();
        assert_eq!(trace["traceEvents"][2]["name"], "attention");
        assert_eq!(trace["traceEvents"][3]["dur"], 60_000.0);
    }
}
