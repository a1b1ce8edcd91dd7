//! The caches of earlier texts, whose beginnings later prompts may share.

use bitnet_burn::{ForwardError, KvCache, SequenceId};

use crate::generate::GenerateError;

/// Tokens in common that are worth a copy of the cache.
pub(crate) const WORTH: usize = 8;

/// A sequence that no request uses any more.
#[derive(Debug)]
struct Kept {
    sequence: SequenceId,
    /// The tokens that the cache holds.
    tokens: Vec<u32>,
    bytes: u64,
    used: u64,
}

/// Sequences that no request uses any more.
#[derive(Debug, Default)]
pub(crate) struct KeptSequences {
    all: Vec<Kept>,
    clock: u64,
}

/// How many tokens two texts have in common at their beginning.
pub(crate) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl KeptSequences {
    /// Keeps a sequence whose cache holds `tokens` in `bytes` bytes.
    pub(crate) fn keep(&mut self, sequence: SequenceId, tokens: Vec<u32>, bytes: u64) {
        self.clock += 1;
        self.all.push(Kept { sequence, tokens, bytes, used: self.clock });
    }

    /// The longest beginning of `prompt` that one of them holds: its length, and which it is.
    pub(crate) fn find(&self, prompt: &[u32]) -> Option<(usize, usize)> {
        let found = self.all.iter().enumerate().map(|(i, kept)| (common(&kept.tokens, prompt), i));
        found.max_by_key(|&(length, i)| (length, self.all[i].used)).filter(|&(length, _)| length >= WORTH)
    }

    /// A sequence that holds what the one at `index` holds: itself, if it is a beginning of `prompt`, or else a fork.
    pub(crate) fn take(
        &mut self,
        index: usize,
        prompt: &[u32],
        cache: &mut KvCache,
    ) -> Result<SequenceId, GenerateError> {
        self.clock += 1;
        if prompt.starts_with(&self.all[index].tokens) {
            return Ok(self.all.swap_remove(index).sequence);
        }
        self.all[index].used = self.clock;
        Ok(cache.fork(self.all[index].sequence).map_err(ForwardError::from)?)
    }

    /// Their bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.all.iter().map(|kept| kept.bytes).sum()
    }

    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    /// Forgets the least recently used ones until they take at most `bytes` bytes and are at most `count`.
    pub(crate) fn shrink(
        &mut self,
        bytes: u64,
        count: usize,
        cache: &mut KvCache,
    ) -> Result<(), GenerateError> {
        while self.bytes() > bytes || self.all.len() > count {
            let oldest = self.all.iter().enumerate().min_by_key(|(_, kept)| kept.used);
            let Some((oldest, _)) = oldest else { return Ok(()) };
            let kept = self.all.swap_remove(oldest);
            cache.remove(kept.sequence).map_err(ForwardError::from)?;
        }
        Ok(())
    }
}
