//! Guesses by prompt look-up: where the last tokens occurred before, what followed them is the guess. Text that copies or
//! edits something repeats runs of tokens.

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
}
