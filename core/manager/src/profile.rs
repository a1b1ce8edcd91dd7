//! Where the time of a forward pass goes: spans of operations on the thread that asked for them.
//!
//! Code that computes opens a [`span`] for an operation and a [`part`] for the part of the model around it. Both close
//! when they are dropped, and nest. While no thread records, opening one reads one atomic number and does nothing else.

use std::cell::RefCell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What takes the time of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Operation {
    /// The prompt, as a whole.
    Prefill,
    /// A generated token, as a whole.
    Decode,
    /// A part of the model, as a whole.
    Part,
    /// Ternary matrix products.
    TernaryMatmul,
    /// Products with matrices of floats or of their blocks: output heads, routers.
    DenseMatmul,
    /// Attention over the KV cache.
    Attention,
    /// What a gated DeltaNet does between its projections.
    DeltaNet,
    /// Writing keys and values into the KV cache.
    KvCache,
    /// Rotary position embedding.
    Rope,
    /// Norms that are operations of their own.
    Norm,
    /// Quantising activations, with the norm before it.
    Quantisation,
    /// The gated activation of feed-forward networks.
    Activation,
    /// Walsh-Hadamard transforms.
    Hadamard,
    /// Looking up rows of the embedding.
    Embedding,
    /// Adding to the residual stream.
    Residual,
    /// Copying the logits to the caller.
    Logits,
    /// Drawing a token.
    Sampling,
    /// Waiting until the other threads have finished their parts of an operation.
    Waiting,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Part => "part",
            Self::TernaryMatmul => "ternary matmul",
            Self::DenseMatmul => "dense matmul",
            Self::Attention => "attention",
            Self::DeltaNet => "gated DeltaNet",
            Self::KvCache => "KV cache",
            Self::Rope => "RoPE",
            Self::Norm => "norm",
            Self::Quantisation => "quantisation",
            Self::Activation => "gated activation",
            Self::Hadamard => "Hadamard transform",
            Self::Embedding => "embedding",
            Self::Residual => "residual",
            Self::Logits => "reading the logits",
            Self::Sampling => "sampling",
            Self::Waiting => "waiting for threads",
        })
    }
}

/// A part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Attention layers, and gated DeltaNets.
    Attention,
    /// Feed-forward networks and experts.
    FeedForward,
    /// The last norm and the output projection.
    Head,
    /// Everything outside of them.
    Rest,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attention => "attention",
            Self::FeedForward => "feed-forward",
            Self::Head => "head",
            Self::Rest => "rest",
        })
    }
}

/// A span of a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// What it did.
    pub operation: Operation,
    /// The part of the model around it.
    pub part: Part,
    /// Shapes of the matrices. Empty for operations without matrices.
    pub detail: String,
    /// When it began, from the start of the recording.
    pub start: Duration,
    /// How long it took, with the spans in it.
    pub time: Duration,
    /// The span around it, as an index into the recording.
    pub parent: Option<usize>,
}

/// Number of threads that record.
static RECORDING: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

struct Recorder {
    began: Instant,
    spans: Vec<Span>,
    /// Spans that are open, the innermost last.
    open: Vec<usize>,
}

/// Records the spans of this thread until it is finished or dropped.
#[derive(Debug)]
pub struct Recording(PhantomData<*const ()>);

impl Recording {
    /// Starts. A recording of the same thread that goes on is replaced.
    pub fn start() -> Self {
        let recorder = Recorder { began: Instant::now(), spans: Vec::new(), open: Vec::new() };
        RECORDER.set(Some(recorder));
        RECORDING.fetch_add(1, Ordering::Relaxed);
        Self(PhantomData)
    }

    /// Ends, with all spans in the order in which they began.
    pub fn finish(self) -> Vec<Span> {
        RECORDER.take().map(|recorder| recorder.spans).unwrap_or_default()
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        RECORDER.set(None);
        RECORDING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An open span, which closes when it is dropped.
#[must_use = "the span ends when this is dropped"]
#[derive(Debug)]
pub struct Open {
    recorded: bool,
    of_thread: PhantomData<*const ()>,
}

impl Drop for Open {
    #[inline]
    fn drop(&mut self) {
        if self.recorded {
            close();
        }
    }
}

/// Opens a span.
#[inline]
pub fn span(operation: Operation) -> Open {
    span_of(operation, String::new)
}

/// Opens a span with shapes, which are put into words only if they are recorded.
#[inline]
pub fn span_of(operation: Operation, detail: impl FnOnce() -> String) -> Open {
    let recorded = RECORDING.load(Ordering::Relaxed) > 0 && open(operation, None, detail);
    Open { recorded, of_thread: PhantomData }
}

/// Opens a span around a part of the model.
#[inline]
pub fn part(part: Part) -> Open {
    let recorded = RECORDING.load(Ordering::Relaxed) > 0 && open(Operation::Part, Some(part), String::new);
    Open { recorded, of_thread: PhantomData }
}

#[cold]
fn open(operation: Operation, part: Option<Part>, detail: impl FnOnce() -> String) -> bool {
    RECORDER.with_borrow_mut(|recorder| {
        let Some(Recorder { began, spans, open }) = recorder else { return false };
        let parent = open.last().copied();
        let part = part.or(parent.map(|parent| spans[parent].part)).unwrap_or(Part::Rest);
        open.push(spans.len());
        let span =
            Span { operation, part, detail: detail(), start: Duration::ZERO, time: Duration::ZERO, parent };
        spans.push(span);
        if let Some(span) = spans.last_mut() {
            span.start = began.elapsed();
        }
        true
    })
}

#[cold]
fn close() {
    RECORDER.with_borrow_mut(|recorder| {
        let Some(Recorder { began, spans, open }) = recorder else { return };
        let now = began.elapsed();
        if let Some(span) = open.pop().and_then(|index| spans.get_mut(index)) {
            span.time = now.saturating_sub(span.start);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_nest_and_belong_to_the_thread_that_records() {
        drop(span(Operation::Norm));
        let recording = Recording::start();
        {
            let _decode = span(Operation::Decode);
            {
                let _part = part(Part::FeedForward);
                let _matmul = span_of(Operation::TernaryMatmul, || "4x8".into());
                let _inner = span(Operation::Waiting);
            }
            let _rest = span(Operation::Sampling);
            std::thread::spawn(|| drop(span(Operation::Rope))).join().unwrap();
        }
        let spans = recording.finish();
        let seen: Vec<_> = spans.iter().map(|s| (s.operation, s.part, s.parent)).collect();
        assert_eq!(
            seen,
            [
                (Operation::Decode, Part::Rest, None),
                (Operation::Part, Part::FeedForward, Some(0)),
                (Operation::TernaryMatmul, Part::FeedForward, Some(1)),
                (Operation::Waiting, Part::FeedForward, Some(2)),
                (Operation::Sampling, Part::Rest, Some(0)),
            ]
        );
        assert_eq!(spans[2].detail, "4x8");
        for span in &spans {
            let Some(parent) = span.parent.map(|parent| &spans[parent]) else { continue };
            assert!(parent.start <= span.start && span.start + span.time <= parent.start + parent.time);
        }
        // A span that outlives the recording closes nothing.
        let recording = Recording::start();
        let open = span(Operation::Norm);
        assert_eq!(recording.finish().len(), 1);
        drop(open);
        assert!(!span(Operation::Norm).recorded);
    }
}
