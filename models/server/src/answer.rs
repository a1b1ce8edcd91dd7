//! The answers to one HTTP request, while they are computed.

use std::sync::Arc;
use std::time::Instant;

use bitnet_burn_engine::generate::{Finish, Generation};
use bitnet_burn_engine::schedule::{Event, Request, RequestError, Ticket};
use serde::Serialize;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::ApiError;
use crate::models::Loaded;
use crate::receipts::Stored;
use crate::serve::App;

/// Answers that are being computed. Dropping them cancels what is not complete: their client is gone.
pub(crate) struct Answers {
    app: Arc<App>,
    pub model: Arc<Loaded>,
    events: UnboundedReceiver<(usize, Event)>,
    tickets: Vec<Ticket>,
    choices: Vec<Choice>,
    /// Answers to each prompt.
    per_prompt: usize,
    left: usize,
    started: Instant,
    /// Special tokens whose text belongs to the answers.
    shown: Vec<(u32, &'static str)>,
}

/// One of the answers.
struct Choice {
    request: Request,
    last_token: Option<Instant>,
}

/// Numbers of tokens, as OpenAI counts them.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptDetails,
}

/// Tokens of prompts that were not computed again.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct PromptDetails {
    pub cached_tokens: usize,
}

impl Usage {
    /// Of prompts and their answers.
    pub(crate) fn of<'a>(ends: impl Iterator<Item = (&'a Generation, &'a Details)>) -> Self {
        let mut usage = Self::default();
        for (generation, details) in ends {
            if details.begins_prompt {
                usage.prompt_tokens += generation.prompt_tokens;
                usage.prompt_tokens_details.cached_tokens += generation.cached_tokens;
            }
            usage.completion_tokens += generation.tokens.len();
        }
        usage.total_tokens = usage.prompt_tokens + usage.completion_tokens;
        usage
    }
}

/// What this server says beyond OpenAI's fields.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Details {
    /// For `/v1/receipts/ID`.
    pub receipt: String,
    /// The seed, with which the same request has the same answer.
    pub seed: i64,
    /// The kernels that have computed since the model was loaded.
    pub kernels: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_second: Option<f64>,
    /// Whether a plugin's kernel turned out to be wrong meanwhile, so that the answer may be.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub in_doubt: bool,
    /// Whether this is the first answer to its prompt, which is counted once.
    #[serde(skip)]
    pub begins_prompt: bool,
}

/// A piece of an answer.
#[allow(clippy::large_enum_variant, reason = "it is taken apart at once")]
pub(crate) enum Piece {
    /// A token and the text that is certain now.
    Token {
        choice: usize,
        token: u32,
        text: String,
        logprobs: Option<bitnet_burn_engine::schedule::LogProbs>,
    },
    /// The rest of its text, and what became of it.
    Finished { choice: usize, text: String, generation: Generation, details: Details },
}

impl Answers {
    /// Hands the requests to the model's scheduler; `per_prompt` of them follow each other with the same prompt.
    pub(crate) fn start(
        app: &Arc<App>,
        model: Arc<Loaded>,
        requests: Vec<Request>,
        per_prompt: usize,
    ) -> Result<Self, ApiError> {
        let most = model.scheduler.options().queue;
        if requests.len() > most {
            let message = format!(
                "this asks for {} answers at once, and at most {most} may wait here: ask for fewer",
                requests.len()
            );
            return Err(ApiError::invalid(message));
        }
        let (sender, events) = unbounded_channel();
        let left = requests.len();
        let mut answers = Self {
            app: app.clone(),
            model,
            events,
            tickets: Vec::with_capacity(left),
            choices: Vec::with_capacity(left),
            per_prompt: per_prompt.max(1),
            left,
            started: Instant::now(),
            shown: Vec::new(),
        };
        for (choice, request) in requests.into_iter().enumerate() {
            let sender = sender.clone();
            // Where nobody receives any more, the ticket is cancelled.
            let on_event = move |event| drop(sender.send((choice, event)));
            let ticket = answers.model.scheduler.submit(request.clone(), on_event);
            app.metrics.submitted(&answers.model.name, ticket.is_ok());
            answers.tickets.push(ticket?);
            answers.choices.push(Choice { request, last_token: None });
        }
        Ok(answers)
    }

    /// Gives these special tokens, as far as the model has them, a text in the answers.
    pub(crate) fn show(&mut self, special: &[&'static str]) {
        let Some(tokenizer) = self.model.engine().tokenizer() else { return };
        // Others have it already.
        let is_hidden = |id: u32| tokenizer.decode(&[id], true).is_ok_and(|text| text.is_empty());
        let found =
            special.iter().filter_map(|&text| Some((tokenizer.id(text).filter(|&id| is_hidden(id))?, text)));
        self.shown = found.collect();
    }

    /// What comes next; `None` when all answers are complete.
    pub(crate) async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        if self.left == 0 {
            return None;
        }
        // The scheduler drops its senders without a last event only if its thread died.
        let stopped = (0, Event::Failed(RequestError::Stopped));
        let (choice, event) = self.events.recv().await.unwrap_or(stopped);
        Some(match event {
            Event::Token { token, mut text, logprobs } => {
                self.measure(choice);
                if let Some((_, special)) = self.shown.iter().find(|(id, _)| *id == token) {
                    text.push_str(special);
                }
                Ok(Piece::Token { choice, token, text, logprobs })
            }
            Event::Finished { text, generation, in_doubt } => {
                self.left -= 1;
                self.app.metrics.finished(&self.model.name);
                let details = self.details(choice, &generation, in_doubt);
                Ok(Piece::Finished { choice, text, generation, details })
            }
            Event::Failed(error) => {
                // One error ends the whole response.
                self.left = 0;
                self.app.metrics.failed(&self.model.name);
                Err(error.into())
            }
        })
    }

    fn measure(&mut self, choice: usize) {
        let now = Instant::now();
        let last = &mut self.choices[choice].last_token;
        match last {
            None => self.app.metrics.first_token(&self.model.name, now - self.started),
            Some(last) => self.app.metrics.next_token(&self.model.name, now - *last),
        }
        *last = Some(now);
    }

    fn details(&self, choice: usize, generation: &Generation, in_doubt: bool) -> Details {
        let request = &self.choices[choice].request;
        let execution = self.model.engine().execution();
        let kernels = execution.kernels.iter().filter(|kernel| kernel.calls > 0);
        let kernels = kernels.map(|kernel| kernel.kernel.clone()).collect();
        let decode: f64 = generation.steps.iter().map(std::time::Duration::as_secs_f64).sum();
        let stored = Stored::new(&self.model, request, generation.clone(), execution);
        Details {
            receipt: self.app.receipts.store(stored),
            // As requests give it.
            seed: request.options.sampling.seed as i64,
            kernels,
            first_token_seconds: generation.first_token.map(|time| time.as_secs_f64()),
            decode_tokens_per_second: (decode > 0.0).then(|| generation.steps.len() as f64 / decode),
            in_doubt,
            begins_prompt: choice.is_multiple_of(self.per_prompt),
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.tickets.iter().for_each(Ticket::cancel);
    }
}

/// OpenAI's word for the end of an answer.
pub(crate) fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::StopToken | Finish::StopString | Finish::Constraint => "stop",
        // (Nobody sees the end of a cancelled answer but in a race.)
        Finish::Length | Finish::Context | Finish::Cancelled => "length",
    }
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    use std::time::{SystemTime, UNIX_EPOCH};
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
