//! Guessing the next tokens by looking them up in the text so far, and how many guesses are worth their rows.
//!
//! Text that copies or edits something repeats runs of tokens. Where the last tokens occurred before, what followed them is
//! the guess (prompt look-up decoding). A guess that is wrong costs its row of the forward pass and nothing else: the
//! sampler draws each token from the same logits, in the same order, as without guesses.

/// The longest and the shortest run of tokens that is looked up.
const LONGEST: usize = 4;
const SHORTEST: usize = 2;
/// Tokens that are searched, from the end. A search of them takes microseconds.
const SEARCHED: usize = 8192;

/// What followed the latest earlier occurrence of the last tokens of `history`: at most `most` tokens. Longer runs are
/// looked up first.
pub(super) fn look_up(history: &[u32], most: usize) -> &[u32] {
    let from = history.len().saturating_sub(SEARCHED);
    let text = &history[from..];
    for length in (SHORTEST..=LONGEST.min(text.len().saturating_sub(1))).rev() {
        let (before, last) = text.split_at(text.len() - length);
        // Occurrences may overlap the last tokens, but not be them.
        let found = (0..before.len()).rev().find(|&at| text[at..at + length] == *last);
        if let Some(at) = found {
            let next = at + length;
            return &text[next..(next + most).min(text.len())];
        }
    }
    &[]
}

/// How often the guesses of one answer were right.
#[derive(Clone, Copy, Debug)]
pub(super) struct Acceptance(f64);

impl Acceptance {
    /// The share of new guesses in the average.
    const SHARE: f64 = 0.2;

    pub(super) const fn new() -> Self {
        Self(0.5)
    }

    /// Of `drafted` guesses, the first `accepted` were right.
    pub(super) fn learn(&mut self, drafted: usize, accepted: usize) {
        // Guesses behind a wrong one say nothing.
        for right in (0..drafted.min(accepted + 1)).map(|guess| guess < accepted) {
            self.0 += Self::SHARE * (f64::from(u8::from(right)) - self.0);
        }
        self.0 = self.0.clamp(0.02, 0.98);
    }

    /// There was something to guess, and it was not tried: slowly, it becomes worth a try again.
    pub(super) fn idle(&mut self) {
        if self.0 < 0.3 {
            self.0 += 0.005;
        }
    }

    /// Tokens that a forward pass with `drafted` guesses gives on average.
    fn expected(self, drafted: usize) -> f64 {
        (0..=drafted).map(|n| self.0.powi(n as i32)).sum()
    }
}

/// Seconds of forward passes that compute answers alone, by their rows.
#[derive(Clone, Debug, Default)]
pub(super) struct RowCosts(Vec<f64>);

impl RowCosts {
    /// What each further row costs, relative to the first, until it was measured.
    const UNKNOWN: f64 = 0.1;
    const SHARE: f64 = 0.2;

    pub(super) fn learn(&mut self, rows: usize, seconds: f64) {
        if self.0.len() <= rows {
            self.0.resize(rows + 1, 0.0);
        }
        let cost = &mut self.0[rows];
        *cost = if *cost == 0.0 { seconds } else { *cost + Self::SHARE * (seconds - *cost) };
    }

    /// What was measured for the nearest number of rows, at most as many, and what further rows may cost.
    fn of(&self, rows: usize) -> Option<f64> {
        let known = (1..=rows.min(self.0.len().saturating_sub(1))).rev().find(|&n| self.0[n] > 0.0)?;
        let scale = |n: usize| 1.0 + Self::UNKNOWN * (n - 1) as f64;
        Some(self.0[known] * scale(rows) / scale(known))
    }

    /// How many guesses one answer should have in a step that has `rows` rows without them, so that all answers together
    /// get the most tokens a second.
    pub(super) fn best(&self, rows: usize, acceptance: Acceptance, most: usize) -> usize {
        let Some(plain) = self.of(rows) else { return 0 };
        let rate = |drafted: usize| {
            let others = (rows - 1) as f64;
            let cost = self.of(rows + drafted).unwrap_or(f64::INFINITY);
            (others + acceptance.expected(drafted)) * plain / cost
        };
        (0..=most).max_by(|&a, &b| rate(a).total_cmp(&rate(b)).then(b.cmp(&a))).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_longest_run_is_the_guess() {
        assert_eq!(look_up(&[1, 2, 3, 4, 5, 1, 2], 3), [3, 4, 5]);
        assert_eq!(look_up(&[1, 2, 3, 4, 5, 1, 2], 9), [3, 4, 5, 1, 2]);
        // The latest of equally long runs.
        assert_eq!(look_up(&[1, 2, 3, 1, 2, 4, 1, 2], 1), [4]);
        // A longer run wins over a later one.
        assert_eq!(look_up(&[7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1), [3]);
        // A run that overlaps itself.
        assert_eq!(look_up(&[5, 5, 5], 4), [5]);
        for nothing in [&[][..], &[1], &[1, 2], &[1, 2, 3, 4], &[1, 1]] {
            assert!(look_up(nothing, 4).is_empty(), "{nothing:?}");
        }
    }

    #[test]
    fn guesses_are_made_where_they_pay() {
        let mut costs = RowCosts::default();
        assert_eq!(costs.best(1, Acceptance(0.9), 8), 0, "nothing was measured yet");
        // A row costs nothing: all are worth it. It costs as much as the first: only sure ones are.
        (1..=9).for_each(|rows| costs.learn(rows, 1.0));
        assert_eq!(costs.best(1, Acceptance(0.5), 8), 8);
        let mut costs = RowCosts::default();
        (1..=9).for_each(|rows| costs.learn(rows, rows as f64));
        assert_eq!(costs.best(1, Acceptance(0.9), 8), 0);
        let mut costs = RowCosts::default();
        (1..=9).for_each(|rows| costs.learn(rows, 1.0 + 0.3 * (rows - 1) as f64));
        assert_eq!(costs.best(1, Acceptance(0.1), 8), 0);
        assert!((1..8).contains(&costs.best(1, Acceptance(0.7), 8)));
    }

    #[test]
    fn acceptance_follows_what_happens() {
        let mut acceptance = Acceptance::new();
        (0..20).for_each(|_| acceptance.learn(4, 4));
        assert!(acceptance.0 > 0.9);
        (0..40).for_each(|_| acceptance.learn(4, 0));
        assert!(acceptance.0 < 0.05);
        (0..100).for_each(|_| acceptance.idle());
        assert!((0.2..0.4).contains(&acceptance.0));
    }
}
