//! The end of a text: stop strings.

use super::SamplingError;

/// What [`StopMatcher::push`] lets through.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopOutput {
    /// Text that is certainly not part of a stop string, in order; may be empty.
    pub text: String,
    /// The index of the stop string that ended the text; nothing comes after it.
    pub stopped: Option<usize>,
}

/// Finds stop strings in streamed text and holds back what may be the beginning of one.
///
/// The text ends before the stop string that is complete first (the longest of several that are complete at
/// the same character). That does not depend on how the text is cut into chunks, and generation need not go
/// on to see whether a longer stop string would have begun earlier. What is held back is the longest end of
/// the text that begins a stop string, and no more (Knuth, Morris and Pratt's automaton, one per stop string:
/// constant work per byte, whatever the stop strings).
///
/// ```
/// # use bitnet_burn_engine::sampling::StopMatcher;
/// let mut stops = StopMatcher::new(["\nUser:"])?;
/// assert_eq!(stops.push("Hello\nU").text, "Hello");
/// assert_eq!(stops.push("niverse\nUs").text, "\nUniverse");
/// assert_eq!(stops.push("er: Hi").stopped, Some(0));
/// # Ok::<(), bitnet_burn_engine::sampling::SamplingError>(())
/// ```
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Automaton>,
    held: String,
    stopped: Option<usize>,
}

/// One stop string, how it overlaps itself, and how much of it the text ends with.
#[derive(Debug, Clone)]
struct Automaton {
    pattern: Vec<u8>,
    /// `fallback[i]`: the longest proper prefix that is a suffix of `pattern[..=i]`.
    fallback: Vec<usize>,
    matched: usize,
}

impl Automaton {
    fn new(pattern: &str) -> Self {
        let pattern = pattern.as_bytes().to_vec();
        let mut fallback = vec![0; pattern.len()];
        let mut matched = 0;
        for i in 1..pattern.len() {
            while matched > 0 && pattern[matched] != pattern[i] {
                matched = fallback[matched - 1];
            }
            matched += usize::from(pattern[matched] == pattern[i]);
            fallback[i] = matched;
        }
        Self { pattern, fallback, matched: 0 }
    }

    /// Whether the pattern is complete with this byte. Not to be called again after it was.
    fn push(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.pattern[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(self.pattern[self.matched] == byte);
        self.matched == self.pattern.len()
    }
}

impl StopMatcher {
    /// A matcher for these stop strings; with none, everything passes.
    ///
    /// # Errors
    /// [`SamplingError::EmptyStop`] if one of them is empty.
    pub fn new<S: AsRef<str>>(stops: impl IntoIterator<Item = S>) -> Result<Self, SamplingError> {
        let automaton = |(index, stop): (usize, S)| match stop.as_ref() {
            "" => Err(SamplingError::EmptyStop { index }),
            stop => Ok(Automaton::new(stop)),
        };
        let stops = stops.into_iter().enumerate().map(automaton).collect::<Result<_, _>>()?;
        Ok(Self { stops, held: String::new(), stopped: None })
    }

    /// Takes the next piece of text and returns what may be shown now. After a stop string nothing may.
    pub fn push(&mut self, text: &str) -> StopOutput {
        if self.stopped.is_some() {
            return StopOutput { text: String::new(), stopped: self.stopped };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            let mut longest = 0;
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.push(byte) && stop.pattern.len() > longest {
                    longest = stop.pattern.len();
                    self.stopped = Some(index);
                }
            }
            if longest > 0 {
                // What an automaton has matched is never longer than what is held, so this can't be negative.
                self.held.truncate((before + i + 1).saturating_sub(longest));
                return StopOutput { text: std::mem::take(&mut self.held), stopped: self.stopped };
            }
        }
        // Both the text and the stop strings are UTF-8, so a common piece begins and ends between characters.
        let hold = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len().saturating_sub(hold));
        StopOutput { text: std::mem::replace(&mut self.held, held), stopped: None }
    }

    /// The text is over: returns what was held back.
    pub fn flush(&mut self) -> String {
        self.stops.iter_mut().for_each(|stop| stop.matched = 0);
        std::mem::take(&mut self.held)
    }

    /// The index of the stop string that ended the text, if one did.
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
                #[test]
        fn stops_do_not_depend_on_chunks(
            text in "[abä€]{0,40}",
            stops in prop::collection::vec("[abä€]{1,5}", 0..4),
            cuts in prop::collection::vec(0usize..5, 0..40),
        ) {
            // The definition: the first end of a stop string, and the longest stop string that ends there.
            let end = (1..=text.len()).find(|&e| {
                text.is_char_boundary(e) && stops.iter().any(|s| text[..e].ends_with(s.as_str()))
            });
            let expected = match end {
                None => &text[..],
                Some(e) => {
                    let found = stops.iter().filter(|s| text[..e].ends_with(s.as_str()));
                    &text[..e - found.map(String::len).max().unwrap_or(0)]
                }
            };

            let mut matcher = StopMatcher::new(&stops).unwrap();
            let mut shown = String::new();
            let mut seen = String::new();
            let mut chars = text.chars();
            let mut cuts = cuts.into_iter().chain(std::iter::repeat(1));
            while seen.len() < text.len() {
                let chunk: String = chars.by_ref().take(cuts.next().unwrap()).collect();
                seen.push_str(&chunk);
                let out = matcher.push(&chunk);
                shown.push_str(&out.text);
                prop_assert_eq!(out.stopped, matcher.stopped());
                if out.stopped.is_some() {
                    prop_assert!(matcher.push("more").text.is_empty());
                    break;
                }
                // Minimal: one more character shown, and the beginning of a stop string would be out.
                let held = &seen[shown.len()..];
                prop_assert!(held.is_empty() || stops.iter().any(|s| s.starts_with(held)));
                let longest = (0..=seen.len())
                    .filter(|&i| seen.is_char_boundary(i))
                    .find(|&i| stops.iter().any(|s| s.starts_with(&seen[i..])));
                prop_assert_eq!(held, &seen[longest.unwrap_or(seen.len())..]);
            }
            prop_assert_eq!(matcher.stopped().is_some(), end.is_some());
            if let Some(index) = matcher.stopped() {
                let whole = format!("{shown}{}", stops[index]);
                prop_assert!(text.starts_with(&whole));
            }
            shown.push_str(&matcher.flush());
            prop_assert_eq!(shown, expected);
        }
    }

    #[test]
    fn stop_strings_must_not_be_empty() {
        assert_eq!(StopMatcher::new(["a", ""]).unwrap_err(), SamplingError::EmptyStop { index: 1 });
        let mut none = StopMatcher::new::<&str>([]).unwrap();
        assert_eq!(none.push("all of it").text, "all of it");
        assert_eq!(none.flush(), "");
    }
}
