//! The thread that computes: admits requests, puts the rows of each step together, and hands the logits out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use bitnet_burn::{ForwardError, KvCache, SequenceId};

use super::sequence::{Rows, Running};
use super::{Event, Request, RequestError, SchedulerOptions, Shared, Submitted};
use crate::engine::Engine;
use crate::generate::{Finish, GenerateError, values};
use crate::kept::{KeptSequences, WORTH, common};
use crate::speculate::Speculation;
use crate::tokenizer::DecodeStream;

/// Earlier prompts that are kept at most: each is compared with each new prompt.
const MOST_KEPT: usize = 256;

/// New tokens that a sequence has room for at its beginning; it grows when it has more.
const FIRST_TOKENS: usize = 256;

/// How often waiting requests are looked at while nothing is computed: their deadlines may pass.
const IDLE: Duration = Duration::from_millis(50);

/// All requests, and the model's cache.
pub(super) struct Work<'e> {
    engine: &'e Engine,
    options: SchedulerOptions,
    cache: KvCache,
    shared: &'e Shared,
    running: Vec<Running<'e>>,
    waiting: VecDeque<Box<Submitted>>,
    kept: KeptSequences,
    speculation: Option<Speculation>,
    /// The manager's count of results in doubt.
    in_doubt: u64,
}

impl<'e> Work<'e> {
    pub(super) fn new(
        engine: &'e Engine,
        options: SchedulerOptions,
        cache: KvCache,
        speculation: Option<Speculation>,
        shared: &'e Shared,
    ) -> Self {
        Self {
            engine,
            options,
            cache,
            shared,
            running: Vec::new(),
            waiting: VecDeque::new(),
            kept: KeptSequences::default(),
            speculation,
            in_doubt: engine.manager().results_in_doubt(),
        }
    }

    /// Works until the scheduler is dropped.
    pub(super) fn run(&mut self, submissions: &Receiver<Box<Submitted>>) {
        while self.receive(submissions) {
            self.give_up();
            self.admit();
            self.step();
            self.count();
        }
        // Requests that have not begun, those on their way included.
        self.waiting.extend(submissions.try_iter());
        for mut submitted in self.waiting.drain(..) {
            (submitted.on_event)(Event::Failed(RequestError::Stopped));
        }
        for mut running in self.running.drain(..) {
            running.fail(RequestError::Stopped);
        }
    }

    /// Takes new requests; waits for one where there is nothing to compute. `false` when the scheduler is dropped.
    fn receive(&mut self, submissions: &Receiver<Box<Submitted>>) -> bool {
        if self.running.is_empty() {
            let first = match self.waiting.is_empty() {
                true => submissions.recv().ok(),
                false => submissions.recv_timeout(IDLE).ok(),
            };
            self.waiting.extend(first);
        }
        loop {
            match submissions.try_recv() {
                Ok(submitted) => self.waiting.push_back(submitted),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
        !self.shared.stopping.load(Ordering::Relaxed)
    }

    /// Ends requests that were cancelled, and those whose time has passed.
    fn give_up(&mut self) {
        let now = Instant::now();
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain_mut(|submitted| {
            if submitted.cancelled.load(Ordering::Relaxed) {
                // (A generation that never began has nothing to report but that.)
                self.leave_queue(|stats| stats.cancelled += 1);
                (submitted.on_event)(Event::Finished {
                    text: String::new(),
                    generation: crate::generate::Generation::empty(submitted.request.prompt.len()),
                    in_doubt: false,
                });
                return false;
            }
            if submitted.request.deadline.is_some_and(|deadline| deadline <= now) {
                self.leave_queue(|stats| stats.failed += 1);
                (submitted.on_event)(Event::Failed(RequestError::Deadline { tokens: 0 }));
                return false;
            }
            true
        });
        self.waiting = waiting;
        for i in (0..self.running.len()).rev() {
            match self.running[i].due(now, &self.cache) {
                Ok(None) => {}
                Ok(Some(finish)) => self.finish(i, finish),
                Err(error) => self.fail(i, error),
            }
        }
    }

    /// Begins waiting requests, in order, while there is room for them.
    fn admit(&mut self) {
        while self.running.len() < self.options.parallel {
            let Some(next) = self.waiting.front() else { return };
            let promised: u64 = self.running.iter().map(Running::bytes).sum();
            let limit = self.options.cache_bytes.unwrap_or(u64::MAX);
            let room = limit.saturating_sub(promised).checked_sub(next.bytes);
            let Some(room) = room else { return };
            // A prompt that shares more with one that is being computed waits for that.
            let prompt = &next.request.prompt;
            let soon = self.running.iter().filter(|other| other.in_prompt()).any(|other| {
                let (tokens, computed) = other.tokens();
                common(tokens, prompt).min(prompt.len() - 1) > computed + WORTH
            });
            if soon {
                return;
            }
            let Some(submitted) = self.waiting.pop_front() else { return };
            self.leave_queue(|_| ());
            self.begin(submitted, room);
        }
    }

    /// Begins a request, from the longest beginning of its prompt that is at hand; `room` bytes are left for what is kept.
    fn begin(&mut self, mut submitted: Box<Submitted>, room: u64) {
        let (sequence, decoder) = match self.prepare(&submitted.request, room) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.shared.stats().failed += 1;
                return (submitted.on_event)(Event::Failed(error.into()));
            }
        };
        {
            let mut stats = self.shared.stats();
            stats.reused_tokens += sequence.1 as u64;
            stats.reused_prompts += u64::from(sequence.1 > 0);
        }
        self.running.push(Running::new(self.engine, submitted, sequence, decoder));
    }

    /// A sequence for a request, how much of the prompt its cache holds, and what decodes the answer.
    fn prepare(
        &mut self,
        request: &Request,
        room: u64,
    ) -> Result<((SequenceId, usize), Option<DecodeStream<'e>>), GenerateError> {
        let prompt = &request.prompt;
        // First, so that no sequence is left behind.
        let decoder = self.engine.tokenizer().map(|t| t.decode_stream_after(prompt, true)).transpose()?;
        let sequence = match self.resume(prompt, room)? {
            Some(resumed) => resumed,
            None => {
                let new = request.options.max_new_tokens.min(FIRST_TOKENS);
                (self.cache.add_sequence(prompt.len().saturating_add(new)), 0)
            }
        };
        Ok((sequence, decoder))
    }

    /// A sequence whose cache holds a beginning of `prompt`, and how much of it.
    fn resume(&mut self, prompt: &[u32], room: u64) -> Result<Option<(SequenceId, usize)>, GenerateError> {
        // Results that came into doubt must not reach later answers.
        let in_doubt = self.engine.manager().results_in_doubt();
        if in_doubt != self.in_doubt {
            self.in_doubt = in_doubt;
            self.kept.shrink(0, 0, &mut self.cache)?;
        }
        // The last token is computed again: its logits are needed.
        let wanted = &prompt[..prompt.len() - 1];
        let of_running = self.running.iter().map(|other| {
            let (tokens, computed) = other.tokens();
            (common(&tokens[..computed], wanted), other.sequence)
        });
        let of_running = of_running.max_by_key(|&(length, _)| length).filter(|&(length, _)| length >= WORTH);
        let of_kept = self.kept.find(wanted);
        let length = of_running.map_or(0, |(length, _)| length).max(of_kept.map_or(0, |(length, _)| length));
        let sequence = match (of_running, of_kept) {
            (_, Some((kept, index))) if kept == length => {
                Some(self.kept.take(index, wanted, &mut self.cache)?)
            }
            (Some((_, running)), _) => Some(self.cache.fork(running).map_err(ForwardError::from)?),
            _ => None,
        };
        self.shrink_kept(room)?;
        let Some(sequence) = sequence else { return Ok(None) };
        // (Of a model with gated DeltaNets, less may be left.)
        let computed = self.cache.truncate(sequence, length).map_err(ForwardError::from)?;
        Ok(Some((sequence, computed)))
    }

    /// One forward pass.
    fn step(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let parts = match self.parts() {
            Ok(parts) => parts,
            Err(error) => return self.fail_all(error),
        };
        let mut rows = Vec::new();
        let mut wanted = Vec::new();
        for (_, part) in &parts {
            let end = rows.len() + part.rows.len();
            wanted.extend(end - part.wanted..end);
            rows.extend_from_slice(&part.rows);
        }
        let in_prompts =
            rows.len() - parts.iter().map(|(i, part)| self.answer_rows_of(*i, part)).sum::<usize>();
        // A step without a complete prompt or an answer has no logits to read, but a forward pass gives some.
        let asked = if wanted.is_empty() { &[rows.len() - 1][..] } else { &wanted[..] };
        let began = Instant::now();
        let logits = self.engine.model().forward(&rows, asked, &mut self.cache).map_err(GenerateError::from);
        let logits =
            logits.and_then(|logits| if wanted.is_empty() { Ok(Vec::new()) } else { values(logits) });
        let logits = logits.and_then(|logits| {
            self.engine.checkpoint().intact()?;
            Ok(logits)
        });
        let logits = match logits {
            Ok(logits) => logits,
            Err(error) => return self.fail_all(error),
        };
        if let Some(speculation) = self.speculation.as_mut().filter(|_| in_prompts == 0) {
            speculation.costs.learn(rows.len(), began.elapsed().as_secs_f64());
        }
        {
            let mut stats = self.shared.stats();
            stats.steps += 1;
            stats.rows += rows.len() as u64;
            stats.prompt_tokens += in_prompts as u64;
        }
        let vocabulary = if wanted.is_empty() { 1 } else { logits.len() / wanted.len() };
        let mut rest = &logits[..];
        let mut over = Vec::new();
        for (i, part) in parts {
            let (of_part, others) = rest.split_at(part.wanted * vocabulary);
            rest = others;
            let running = &mut self.running[i];
            let (drafts, before) = (running.drafts(), running.generated());
            let taken = running.take(part.rows.len(), of_part, vocabulary, &mut self.cache);
            let mut stats = self.shared.stats();
            stats.drafts += running.drafts().since(drafts);
            stats.generated_tokens += (running.generated() - before) as u64;
            match taken {
                Ok(finish) => over.extend(finish.map(|finish| (i, Ok(finish)))),
                Err(error) => over.push((i, Err(error))),
            }
        }
        // From the last one on: removing one moves the later ones.
        for (i, result) in over.into_iter().rev() {
            match result {
                Ok(finish) => self.finish(i, finish),
                Err(error) => self.fail(i, error.into()),
            }
        }
    }

    fn answer_rows_of(&self, i: usize, part: &Rows) -> usize {
        if self.running[i].in_prompt() { 0 } else { part.rows.len() }
    }

    /// The rows of the next step, by the index of their request, in its order: a row of each answer with its guesses, and
    /// equal shares of what is left for the prompts.
    fn parts(&mut self) -> Result<Vec<(usize, Rows)>, GenerateError> {
        let answers = self.running.iter().filter(|running| !running.in_prompt()).count();
        let prompts = self.running.len() - answers;
        // Beside prompts there is nothing to gain: the step is long, and limited by arithmetic.
        if prompts == 0
            && !self.cache.needs_snapshots()
            && let Some(speculation) = &mut self.speculation
        {
            let cache = &self.cache;
            let all = self.running.iter_mut().map(|running| running.guessable(cache)).collect();
            speculation.guess(answers, all)?;
        }
        let mut left = self.options.rows.saturating_sub(answers).max(usize::from(answers == 0));
        let mut shares = prompts;
        let mut parts = Vec::with_capacity(self.running.len());
        for (i, running) in self.running.iter_mut().enumerate() {
            if running.in_prompt() {
                // With more answers than rows, prompts go on by a row each.
                let share = (left / shares).max(1);
                shares -= 1;
                let part = running.prompt_rows(share, &mut self.cache)?;
                left = left.saturating_sub(part.rows.len());
                parts.push((i, part));
            } else {
                parts.push((i, running.answer_rows()));
            }
        }
        Ok(parts)
    }

    /// Ends a request with its answer, and keeps its cache for prompts that begin the same.
    fn finish(&mut self, i: usize, finish: Finish) {
        let mut running = self.running.remove(i);
        {
            let mut stats = self.shared.stats();
            match finish {
                Finish::Cancelled => stats.cancelled += 1,
                _ => stats.finished += 1,
            }
        }
        running.finish(finish, self.engine.manager().results_in_doubt());
        self.leave(&mut running);
        let sequence = running.sequence;
        let tokens = running.into_computed();
        let bytes = self.engine.sequence_bytes(tokens.len().next_power_of_two());
        self.kept.keep(sequence, tokens, bytes);
        let promised: u64 = self.running.iter().map(Running::bytes).sum();
        let room = self.options.cache_bytes.unwrap_or(u64::MAX).saturating_sub(promised);
        if let Err(error) = self.shrink_kept(room) {
            tracing::error!("a sequence of the KV cache can't be removed: {error}; please report it");
        }
    }

    fn leave(&mut self, running: &mut Running<'e>) {
        if let Some(speculation) = &mut self.speculation {
            running.leave(speculation);
        }
    }

    /// Forgets earlier prompts until they take at most `room` bytes.
    fn shrink_kept(&mut self, room: u64) -> Result<(), GenerateError> {
        self.kept.shrink(room, MOST_KEPT, &mut self.cache)?;
        let left = room.saturating_sub(self.kept.bytes());
        self.speculation.as_mut().map_or(Ok(()), |speculation| speculation.shrink(left))
    }

    /// Ends a request with an error.
    fn fail(&mut self, i: usize, error: RequestError) {
        let mut running = self.running.remove(i);
        self.shared.stats().failed += 1;
        running.fail(error);
        self.leave(&mut running);
        // It was there until now.
        drop(self.cache.remove(running.sequence));
    }

    /// A forward pass failed: it was all requests'.
    fn fail_all(&mut self, error: GenerateError) {
        tracing::error!("a forward pass failed: {error}");
        let error = Arc::new(error);
        for i in (0..self.running.len()).rev() {
            self.fail(i, RequestError::Generate(error.clone()));
        }
    }

    fn leave_queue(&self, also: impl FnOnce(&mut super::SchedulerStats)) {
        let mut stats = self.shared.stats();
        stats.waiting = stats.waiting.saturating_sub(1);
        also(&mut stats);
    }

    fn count(&mut self) {
        let promised: u64 = self.running.iter().map(Running::bytes).sum();
        let of_draft = self.speculation.as_ref().map_or(0, Speculation::kept_bytes);
        let mut stats = self.shared.stats();
        stats.running = self.running.len();
        stats.cache_bytes = promised + self.kept.bytes() + of_draft;
        stats.kept = self.kept.len();
    }
}

#[cfg(all(test, feature = "default-model"))]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::GenerateOptions;
    use crate::sampling::{Sampler, StopMatcher};

    #[test]
    fn guesses_that_are_right_save_steps_and_change_no_token() {
        let engine = Engine::options().open_built_in().unwrap();
        let text = "The cat sat. The dog sat. The cat sat. The dog sat. The cat sat. The dog sat. The cat";
        let prompt = engine.encode(text, true).unwrap();
        for temperature in [0.0, 0.7] {
            let mut options = GenerateOptions { max_new_tokens: 100, ..engine.generate_options() };
            options.sampling.temperature = temperature;
            // Tokens that occurred are more likely: the text repeats itself.
            options.sampling.repetition_penalty = 0.6;
            let mut session = engine.session().unwrap();
            let mut expected = session.generate_text(&prompt, &options).unwrap();
            expected.by_ref().for_each(|piece| drop(piece.unwrap()));
            let expected = expected.finish().generation.tokens;

            let shared = Shared::default();
            let limits = SchedulerOptions::of(&engine);
            let speculation = Speculation::new(&engine, limits.draft).unwrap();
            let mut work = Work::new(&engine, limits, engine.cache().unwrap(), speculation, &shared);
            let (sender, events) = channel();
            work.waiting.push_back(Box::new(Submitted {
                sampler: Sampler::new(options.sampling.clone()).unwrap(),
                constrained: None,
                stops: StopMatcher::new::<&str>([]).unwrap(),
                request: Request::new(prompt.clone(), options),
                bytes: 0,
                cancelled: Arc::new(AtomicBool::new(false)),
                on_event: Box::new(move |event| sender.send(event).unwrap()),
                at: Instant::now(),
            }));
            work.admit();
            while !work.running.is_empty() {
                // Whatever this machine takes: a row more costs nothing.
                work.speculation.as_mut().unwrap().rows_cost_nothing();
                work.give_up();
                work.step();
            }
            let tokens: Vec<u32> = events.try_iter().filter_map(token).collect();
            assert_eq!(tokens, expected);
            let stats = *shared.stats();
            let counts = stats.drafts.look_up;
            assert!(counts.accepted > 0 && counts.accepted < counts.drafted, "{stats:?}");
            // The prompt's step gives a token, and each later step one and those that were guessed right.
            assert_eq!(stats.steps + counts.accepted, stats.generated_tokens, "{stats:?}");
        }
    }

    fn token(event: Event) -> Option<u32> {
        match event {
            Event::Token { token, .. } => Some(token),
            _ => None,
        }
    }
}
