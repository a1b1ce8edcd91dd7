//! How many guesses are worth their rows: what was accepted so far, and what forward passes took.

/// How often the guesses of one answer were right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acceptance(f64);

impl Default for Acceptance {
    fn default() -> Self {
        Self(0.5)
    }
}

impl Acceptance {
    /// The share of new guesses in the average.
    const SHARE: f64 = 0.2;

    /// Of `drafted` guesses, the first `accepted` were right.
    pub(crate) fn learn(&mut self, drafted: usize, accepted: usize) {
        // Guesses behind a wrong one say nothing.
        for right in (0..drafted.min(accepted + 1)).map(|guess| guess < accepted) {
            self.0 += Self::SHARE * (f64::from(u8::from(right)) - self.0);
        }
        self.0 = self.0.clamp(0.02, 0.98);
    }

    /// There was something to guess, and it was not tried: slowly, it becomes worth a try again.
    pub(crate) fn idle(&mut self) {
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
#[derive(Debug, Default)]
pub(crate) struct RowCosts(Vec<f64>);

impl RowCosts {
    /// What each further row costs, relative to the first, until it was measured.
    const UNKNOWN: f64 = 0.1;
    const SHARE: f64 = 0.2;

    pub(crate) fn learn(&mut self, rows: usize, seconds: f64) {
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
    pub(crate) fn best(&self, rows: usize, acceptance: Acceptance, most: usize) -> usize {
        let others = (rows - 1) as f64;
        best(most, |drafted| Some((others + acceptance.expected(drafted)) / self.of(rows + drafted)?))
    }
}

/// The same for guesses of a draft model, of which all `rows` answers get as many: each takes a pass of `draft`.
pub(crate) fn best_of_model(
    target: &RowCosts,
    draft: &RowCosts,
    rows: usize,
    acceptance: Acceptance,
    most: usize,
) -> usize {
    let Some(pass) = draft.of(rows) else {
        // One measures it.
        return if target.of(rows).is_some() { most.min(1) } else { 0 };
    };
    best(most, |drafted| {
        let seconds = target.of(rows * (drafted + 1))? + drafted as f64 * pass;
        Some(acceptance.expected(drafted) / seconds)
    })
}

/// The number of guesses, 0 to `most`, with the highest rate, and the fewest among equals. 0 if rates are not known yet.
fn best(most: usize, rate: impl Fn(usize) -> Option<f64>) -> usize {
    let rates = (0..=most).map_while(|drafted| Some((drafted, rate(drafted)?)));
    rates.max_by(|(a, x), (b, y)| x.total_cmp(y).then(b.cmp(a))).map_or(0, |(drafted, _)| drafted)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_draft_model_guesses_where_both_models_times_say_so() {
        let costs = |first: f64, further: f64| {
            let mut costs = RowCosts::default();
            (1..=40).for_each(|rows| costs.learn(rows, first + further * (rows - 1) as f64));
            costs
        };
        let (target, nothing) = (costs(1.0, 0.05), RowCosts::default());
        let worth =
            |target, draft, rows, acceptance| best_of_model(target, draft, rows, Acceptance(acceptance), 8);
        assert_eq!(worth(&nothing, &nothing, 1, 0.9), 0, "a step without guesses is measured first");
        assert_eq!(worth(&target, &nothing, 1, 0.9), 1, "then one guess");
        let fast = costs(0.05, 0.005);
        assert_eq!(worth(&target, &fast, 1, 0.98), 8);
        assert!((1..8).contains(&worth(&target, &fast, 1, 0.5)));
        assert_eq!(worth(&target, &fast, 1, 0.05), 0);
        // As slow as the model that checks.
        assert_eq!(worth(&target, &target, 1, 0.98), 0);
        // Several answers together have more rows to pay for.
        assert!(worth(&target, &fast, 4, 0.6) < worth(&target, &fast, 1, 0.6));
    }

    #[test]
    fn acceptance_follows_what_happens() {
        let mut acceptance = Acceptance::default();
        (0..20).for_each(|_| acceptance.learn(4, 4));
        assert!(acceptance.0 > 0.9);
        (0..40).for_each(|_| acceptance.learn(4, 0));
        assert!(acceptance.0 < 0.05);
        (0..100).for_each(|_| acceptance.idle());
        assert!((0.2..0.4).contains(&acceptance.0));
    }
}
