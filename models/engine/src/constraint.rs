//! Answers of a given form: a JSON schema, a regular expression, a choice of texts, or a grammar.
//!
//! Before each token is drawn, the crate `llguidance` says which tokens can go on towards a complete answer. All others
//! are excluded. Tokens that end the generation are allowed when the answer is complete, and only then. So an answer
//! that ends by itself has the form, and one that reaches its limit of tokens is a beginning of such an answer.
//!
//! Special tokens are never a part of such an answer. Tokens are drawn as without a constraint otherwise: the same seed
//! gives the same answer.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::text::human_bytes;
use crate::tokenizer::Tokenizer;

/// The form that an answer must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    /// Any JSON object.
    Json,
    /// JSON that is valid by this schema, which is JSON as text.
    JsonSchema(String),
    /// A text that this regular expression matches from its beginning to its end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of this grammar, in `llguidance`'s dialect of Lark.
    Grammar(String),
}

/// Why an answer can't have a form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConstraintError {
    /// The description is not valid, or not supported.
    #[error("the {kind} can't be used: {problem}")]
    Invalid {
        /// What it is: "JSON schema", "regular expression" ...
        kind: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The description is too large.
    #[error("the {kind} has {}, and at most {} are allowed: make it smaller",
        human_bytes(*.bytes as u64), human_bytes(LARGEST as u64))]
    TooLarge {
        /// What it is.
        kind: &'static str,
        /// Its size.
        bytes: usize,
    },
    /// The model's tokens can't be used.
    #[error("this model can't have constrained answers: {0}")]
    Model(String),
    /// No token can go on, and the answer is not complete.
    #[error(
        "no token of the model can continue the {kind} after {tokens} tokens of the answer: its vocabulary lacks the text \
         that must follow"
    )]
    DeadEnd {
        /// What it is.
        kind: &'static str,
        /// Tokens of the answer so far.
        tokens: usize,
    },
    /// The form takes more work or memory than a step may.
    #[error("the {kind} became too complex after {tokens} tokens of the answer: {problem}")]
    TooComplex {
        /// What it is.
        kind: &'static str,
        /// Tokens of the answer so far.
        tokens: usize,
        /// What was exceeded.
        problem: String,
    },
    /// A generator without an engine has no tokens' texts.
    #[error("a constraint needs a Session or a Scheduler: they know the texts of the model's tokens")]
    NoEngine,
}

/// The largest description, in bytes.
const LARGEST: usize = 64 << 10;
/// White space between two tokens of JSON at most. Small models never end it otherwise.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,20}";
/// States of the lexer for one answer at most: each takes 1 or 2 KB.
const LEXER_STATES: usize = 50_000;
/// Compiled constraints that are kept.
const MOST_KEPT: usize = 16;
/// Bytes of the stack on which descriptions are compiled. The library recurses: each level of a description takes up to
/// 64 KB of stack, and at least 36 bytes of its text. Only what is used takes memory.
const STACK: usize = 256 << 20;

impl Constraint {
    fn kind(&self) -> &'static str {
        match self {
            Self::Json => "JSON",
            Self::JsonSchema(_) => "JSON schema",
            Self::Regex(_) => "regular expression",
            Self::Choice(_) => "choice",
            Self::Grammar(_) => "grammar",
        }
    }

    fn grammar(&self) -> Result<TopLevelGrammar, ConstraintError> {
        let kind = self.kind();
        let invalid = |problem: &str| ConstraintError::Invalid { kind, problem: problem.to_owned() };
        let bytes = match self {
            Self::Json => 0,
            Self::JsonSchema(text) | Self::Regex(text) | Self::Grammar(text) => text.len(),
            Self::Choice(texts) => texts.iter().map(String::len).sum(),
        };
        if bytes > LARGEST {
            return Err(ConstraintError::TooLarge { kind, bytes });
        }
        Ok(match self {
            Self::Json => TopLevelGrammar::from_json_schema(json_schema(json!({ "type": "object" }))),
            Self::JsonSchema(text) => {
                let schema: Value = serde_json::from_str(text)
                    .map_err(|error| invalid(&format!("it is no JSON: {error}")))?;
                if !(schema.is_object() || schema.is_boolean()) {
                    return Err(invalid("a schema is an object, or true or false"));
                }
                TopLevelGrammar::from_json_schema(json_schema(schema))
            }
            Self::Regex(text) if text.is_empty() => return Err(invalid("it is empty")),
            // The library would leave it out.
            Self::Regex(text) if (text.len() - text.trim_end_matches('\\').len()) % 2 == 1 => {
                return Err(invalid("it ends in a backslash that escapes nothing"));
            }
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Choice(texts) => {
                if texts.is_empty() || texts.iter().any(String::is_empty) {
                    return Err(invalid("it needs one text at least, and none may be empty"));
                }
                let texts: Vec<String> = texts.iter().map(|text| lark_text(text)).collect();
                TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | ")))
            }
            Self::Grammar(text) if text.trim().is_empty() => return Err(invalid("it is empty")),
            Self::Grammar(text) => TopLevelGrammar::from_lark(text.clone()),
        })
    }
}

/// A text as Lark writes it: as JSON does, with an escape more.
pub(crate) fn lark_text(text: &str) -> String {
    json!(text).to_string().replace('\x7f', "\\u007f")
}

/// A schema whose white space is limited, unless it says something about that itself.
pub(crate) fn json_schema(schema: Value) -> Value {
    let mut schema = if schema == true { json!({}) } else { schema };
    if let Value::Object(fields) = &mut schema {
        fields.entry("x-guidance").or_insert_with(|| json!({ "whitespace_pattern": WHITE_SPACE }));
    }
    schema
}

/// What a model's tokens can be constrained with.
pub(crate) struct Constraints {
    factory: ParserFactory,
    /// Tokens that are text, one bit each.
    text: Vec<u32>,
    vocabulary: usize,
    /// Compiled constraints, the most recently used last. Each answer gets a copy that shares nothing.
    kept: Mutex<VecDeque<(Constraint, Matcher)>>,
}

impl fmt::Debug for Constraints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraints").field("vocabulary", &self.vocabulary).finish_non_exhaustive()
    }
}

impl Constraints {
    /// Sorts the tokens of a vocabulary by their bytes.
    pub(crate) fn new(tokenizer: &Tokenizer) -> Result<Self, ConstraintError> {
        let Some(mut tokens) = tokenizer.token_bytes() else {
            let problem = "its tokenizer.json decodes in a way in which tokens have no bytes of their own";
            return Err(ConstraintError::Model(problem.into()));
        };
        for token in &mut tokens {
            // Longer tokens than the library takes, and the byte that it marks special tokens with: neither is needed.
            if token.len() > 512 || token.contains(&TokTrie::SPECIAL_TOKEN_MARKER) {
                token.clear();
            }
        }
        let vocabulary = tokens.len();
        let mut text = vec![0; vocabulary.div_ceil(32)];
        for (id, _) in tokens.iter().enumerate().filter(|(_, token)| !token.is_empty()) {
            text[id / 32] |= 1 << (id % 32);
        }
        // One token more than the model has: it stands for the end.
        tokens.push(Vec::new());
        let build = || -> Result<ParserFactory, String> {
            let info = TokRxInfo::new(tokens.len() as u32, vocabulary as u32);
            let tokens = ApproximateTokEnv::new(TokTrie::from(&info, &tokens));
            let tokens: TokEnv = std::sync::Arc::new(tokens);
            let slices = llguidance::earley::SlicedBiasComputer::general_slices();
            let mut factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices)
                .map_err(|error| error.to_string())?;
            factory.quiet();
            let limits = factory.limits_mut();
            limits.max_lexer_states = LEXER_STATES;
            limits.verbose_errors = false;
            Ok(factory)
        };
        let factory = on_large_stack(build).and_then(|built| built).map_err(ConstraintError::Model)?;
        Ok(Self { factory, text, vocabulary, kept: Mutex::default() })
    }

    /// What constrains one answer, from its first token on.
    ///
    /// # Errors
    /// If the description is not valid, too large, or can't be written with this vocabulary.
    pub(crate) fn of(&self, constraint: &Constraint) -> Result<Constrained, ConstraintError> {
        let matcher = self.matcher(constraint)?;
        Ok(Constrained {
            kind: constraint.kind(),
            matcher,
            text: self.text.clone(),
            end: self.vocabulary as u32,
            logits: Vec::new(),
            tokens: 0,
            complete: false,
        })
    }

    fn matcher(&self, constraint: &Constraint) -> Result<Matcher, ConstraintError> {
        let kind = constraint.kind();
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = kept.iter().position(|(known, _)| known == constraint)
                && let Some(found) = kept.remove(at)
            {
                let matcher = found.1.deep_clone();
                kept.push_back(found);
                return Ok(matcher);
            }
        }
        let compile = || {
            let grammar = constraint.grammar()?;
            let mut matcher = Matcher::new(self.factory.create_parser(grammar));
            if let Some(problem) = matcher.get_error() {
                return Err(ConstraintError::Invalid { kind, problem: readable(&problem) });
            }
            // What can't even begin is told now. (The copy keeps the compiled states as they are.)
            let begins = matcher.deep_clone().compute_mask();
            let begins = begins.map(|mask| mask.as_slice().iter().zip(&self.text).any(|(a, b)| a & b != 0));
            if begins.is_ok_and(|begins| begins) || matcher.is_accepting().unwrap_or(false) {
                return Ok(matcher);
            }
            Err(ConstraintError::DeadEnd { kind, tokens: 0 })
        };
        let compiled = on_large_stack(compile)
            .unwrap_or_else(|problem| Err(ConstraintError::Invalid { kind, problem: readable(&problem) }))?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back((constraint.clone(), compiled.deep_clone()));
        if kept.len() > MOST_KEPT {
            kept.pop_front();
        }
        Ok(compiled)
    }
}

/// Calls a function on a thread with a large stack. A panic is an error.
fn on_large_stack<T: Send>(call: impl FnOnce() -> T + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("constraint".into()).stack_size(STACK);
        let thread = thread.spawn_scoped(scope, call).map_err(|error| error.to_string())?;
        thread.join().map_err(|_| "the library for constraints panicked; please report it".to_owned())
    })
}

/// The library's message without its states and backtraces.
fn readable(problem: &str) -> String {
    let problem = problem.split("\n<").next().unwrap_or_default().trim();
    let short: String = problem.chars().take(600).collect();
    if problem.starts_with("panic") {
        tracing::error!("llguidance: {short}; please report it");
        return "the library for constraints failed on it".to_owned();
    }
    short
}

/// Constrains one answer. (It has two kilobytes.)
pub(crate) struct Constrained {
    kind: &'static str,
    matcher: Matcher,
    text: Vec<u32>,
    /// The bit that says that the answer may end.
    end: u32,
    /// The logits with the excluded tokens at -inf.
    logits: Vec<f32>,
    tokens: usize,
    /// The answer is complete, and nothing can follow.
    complete: bool,
}

impl fmt::Debug for Constrained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constrained")
            .field("kind", &self.kind)
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

impl Constrained {
    /// The logits to draw the next token from: those that can't follow are at -inf. `None` if the answer is complete and
    /// nothing can follow.
    ///
    /// # Arguments
    /// - `logits`: [vocabulary]
    /// - `stop`: tokens that end the answer
    ///
    /// # Errors
    /// If no token can follow and the answer is not complete, or the form became too complex.
    pub(crate) fn mask(&mut self, logits: &[f32], stop: &[u32]) -> Result<Option<&[f32]>, ConstraintError> {
        if self.complete {
            return Ok(None);
        }
        let mask = match self.matcher.compute_mask() {
            Ok(mask) => mask,
            Err(_) if self.matcher.stop_reason() == llguidance::api::StopReason::NoExtensionBias => {
                return Err(self.dead_end());
            }
            Err(error) => return Err(self.too_complex(&error.to_string())),
        };
        let may_end = may_end(&mask, self.end);
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        let words = mask.as_slice().iter().zip(&self.text).map(|(mask, text)| mask & text);
        for (word, logits) in words.chain(std::iter::repeat(0)).zip(self.logits.chunks_mut(32)) {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word & (1 << bit) == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        for &token in stop {
            if let Some(logit) = self.logits.get_mut(token as usize) {
                *logit = if may_end { logits[token as usize] } else { f32::NEG_INFINITY };
            }
        }
        if self.logits.iter().any(|&logit| logit != f32::NEG_INFINITY) {
            return Ok(Some(&self.logits));
        }
        self.complete = may_end;
        if may_end { Ok(None) } else { Err(self.dead_end()) }
    }

    /// Takes the token that was drawn. Gives whether the answer is complete and nothing can follow.
    ///
    /// # Errors
    /// If the form became too complex.
    pub(crate) fn take(&mut self, token: u32) -> Result<bool, ConstraintError> {
        self.tokens += 1;
        self.matcher.consume_token(token).map_err(|error| self.too_complex(&error.to_string()))?;
        self.complete = self.matcher.is_stopped();
        Ok(self.complete)
    }

    /// Whether the answer is complete and nothing can follow.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    fn dead_end(&self) -> ConstraintError {
        ConstraintError::DeadEnd { kind: self.kind, tokens: self.tokens }
    }

    fn too_complex(&self, problem: &str) -> ConstraintError {
        ConstraintError::TooComplex { kind: self.kind, tokens: self.tokens, problem: readable(problem) }
    }
}

fn may_end(mask: &SimpleVob, end: u32) -> bool {
    (end as usize) < mask.len() && mask.is_allowed(end)
}
