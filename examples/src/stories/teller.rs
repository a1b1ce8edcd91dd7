//! The machine behind the grammar: choices with exact probabilities, and templates with slots.
//!
//! A template is text with slots in braces. Slots are filled from left to right, each when it is reached:
//!
//! | slot | becomes |
//! | --- | --- |
//! | `{h}`, `{f}`, `{g}`, `{v}` | the name of the hero, the friend, a grown-up of the family, a villager |
//! | `{h.kind}`, `{f.the}` | `hedgehog`, `Bramble the hedgehog` (children: their name alone) |
//! | `{he}`, `{him}`, `{his}`, `{f.he}` ... | the pronoun of the hero, of the friend ... |
//! | `{toy}` | a word of the list `toy`, drawn at its first use, the same for the rest of the story |
//! | `{toy2}` | another word of the same list |
//! | `{~glad}` | a word of the list `glad`, drawn anew |
//! | `{a toy}`, `{^he}` | with the article a or an; with a capital |
//!
//! Words are templates themselves. Lists are looked up in the frames that the story has opened, the latest
//! first (a place brings its hiding spots, a fear its cause), and then in [`world::words`].
//!
//! Because a choice is made only where its words are about to be told, the same functions read a story back:
//! [`Teller::replaying`] follows a script of choices and stops at the first letter that differs.

use bitnet_burn_formats::random::SplitMix64;

use super::world::{self, Person, Words};

/// Lists that belong together: one of several, opened by [`Teller::frame`].
pub(super) type Frame = &'static [(&'static str, Words)];

/// One choice: which of how many.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    pub chosen: u32,
    pub weight: u32,
    /// The sum of the weights of all alternatives, and their number.
    pub total: u32,
    pub of: u32,
}

enum Source<'a> {
    Random(&'a mut SplitMix64),
    /// These alternatives, then the first one everywhere; the text must begin like this one.
    Script(&'a [Choice], &'a str),
}

/// Tells one story.
pub(super) struct Teller<'a> {
    source: Source<'a>,
    pub text: String,
    pub choices: Vec<Choice>,
    /// Whether the text has left the one that is being read; nothing is told or chosen any more.
    pub lost: bool,
    frames: Vec<Frame>,
    people: Vec<(&'static str, &'static Person)>,
    bound: Vec<(&'static str, &'static str)>,
    article: bool,
    capital: bool,
}

impl<'a> Teller<'a> {
    /// Chooses at random.
    pub fn random(random: &'a mut SplitMix64) -> Self {
        Self::new(Source::Random(random))
    }

    /// Makes the choices of `script`, and the first alternative behind its end, as long as the result is the
    /// beginning of `text`.
    pub fn replaying(script: &'a [Choice], text: &'a str) -> Self {
        Self::new(Source::Script(script, text))
    }

    fn new(source: Source<'a>) -> Self {
        Self {
            source,
            text: String::new(),
            choices: Vec::new(),
            lost: false,
            frames: Vec::new(),
            people: Vec::new(),
            bound: Vec::new(),
            article: false,
            capital: false,
        }
    }

    /// -log2 of the probability of all choices so far.
    pub fn bits(&self) -> f64 {
        self.choices.iter().map(|c| (f64::from(c.total) / f64::from(c.weight)).log2()).sum()
    }

    /// The people of the story.
    #[cfg(test)]
    pub fn people(&self) -> impl Iterator<Item = &'static Person> {
        self.people.iter().map(|(_, person)| *person)
    }

    /// Chooses among alternatives, with probabilities proportional to their weights.
    fn choose(&mut self, weights: &[u32]) -> usize {
        if self.lost || weights.len() == 1 {
            return 0;
        }
        let total: u32 = weights.iter().sum();
        let chosen = match &mut self.source {
            Source::Random(random) => {
                let mut ticket = random.below(u64::from(total)) as u32;
                let mut chosen = 0;
                while ticket >= weights[chosen] {
                    ticket -= weights[chosen];
                    chosen += 1;
                }
                chosen
            }
            Source::Script(script, _) => script.get(self.choices.len()).map_or(0, |c| c.chosen as usize),
        };
        let (weight, of) = (weights[chosen], weights.len() as u32);
        self.choices.push(Choice { chosen: chosen as u32, weight, total, of });
        chosen
    }

    /// One of several (at most 64), all equally likely.
    pub fn pick<T: Copy>(&mut self, alternatives: &[T]) -> T {
        alternatives[self.choose(&[1; 64][..alternatives.len()])]
    }

    /// Whether something happens that happens in `times` of `of` stories.
    pub fn sometimes(&mut self, times: u32, of: u32) -> bool {
        self.choose(&[of - times, times]) == 1
    }

    /// Opens one of several frames.
    pub fn frame(&mut self, frames: &[Frame]) {
        let frame = self.pick(frames);
        self.frames.push(frame);
    }

    /// Tells one of several sentences.
    pub fn say(&mut self, sentences: Words) {
        if !self.text.is_empty() {
            self.emit(" ");
        }
        let sentence = self.pick(sentences);
        self.capital = true;
        self.tell(sentence);
    }

    /// Tells one of several sentences in one of two stories.
    pub fn may_say(&mut self, sentences: Words) {
        if self.sometimes(1, 2) {
            self.say(sentences);
        }
    }

    fn tell(&mut self, template: &'static str) {
        let mut rest = template;
        while let Some((text, behind)) = rest.split_once('{') {
            self.emit(text);
            let (slot, behind) = behind.split_once('}').expect("slots are closed");
            if self.lost {
                return;
            }
            self.slot(slot);
            rest = behind;
        }
        self.emit(rest);
    }

    fn slot(&mut self, slot: &'static str) {
        if let Some(slot) = slot.strip_prefix('^') {
            self.capital = true;
            return self.slot(slot);
        }
        if let Some(slot) = slot.strip_prefix("a ") {
            self.article = true;
            return self.slot(slot);
        }
        let (key, form) = slot.split_once('.').unwrap_or((slot, ""));
        match (key, form) {
            ("he" | "him" | "his" | "himself", "") => {
                let word = self.person("h").pronoun(key);
                self.emit(word);
            }
            ("h" | "f" | "g" | "v", _) => {
                let person = self.person(key);
                match form {
                    "" => self.tell(person.name),
                    "kind" => self.emit(person.kind),
                    "the" if person.is_child() => self.emit(person.name),
                    "the" => {
                        self.emit(person.name);
                        self.emit(" the ");
                        self.emit(person.kind);
                    }
                    pronoun => self.emit(person.pronoun(pronoun)),
                }
            }
            _ => {
                let word = self.word(slot);
                self.tell(word);
            }
        }
    }

    /// Who plays a role. Nobody plays two.
    fn person(&mut self, role: &'static str) -> &'static Person {
        if let Some((_, person)) = self.people.iter().find(|(name, _)| *name == role) {
            return person;
        }
        let free: Vec<&'static Person> = world::people(role)
            .iter()
            .filter(|person| self.people.iter().all(|(_, taken)| taken.name != person.name))
            .collect();
        let person = self.pick(&free);
        self.people.push((role, person));
        person
    }

    fn word(&mut self, slot: &'static str) -> &'static str {
        if let Some(key) = slot.strip_prefix('~') {
            return self.pick(self.words(key));
        }
        if let Some((_, word)) = self.bound.iter().find(|(name, _)| *name == slot) {
            return word;
        }
        let list = self.words(slot.trim_end_matches(|c: char| c.is_ascii_digit()));
        let free: Vec<&'static str> =
            list.iter().copied().filter(|word| self.bound.iter().all(|(_, taken)| taken != word)).collect();
        let word = self.pick(&free);
        self.bound.push((slot, word));
        word
    }

    fn words(&self, key: &str) -> Words {
        let column = |frame: &Frame| frame.iter().find(|(name, _)| *name == key).map(|(_, words)| *words);
        self.frames.iter().rev().find_map(column).unwrap_or_else(|| world::words(key))
    }

    /// Adds text, with the article and the capital that are due.
    fn emit(&mut self, text: &str) {
        let Some(first) = text.chars().next() else { return };
        if self.lost {
            return;
        }
        if std::mem::take(&mut self.article) {
            self.emit(if "aeiou".contains(first) { "an " } else { "a " });
        }
        let from = self.text.len();
        if self.capital && first == '"' {
            self.text.push(first);
            self.text.extend(text[1..].chars().next().map(|c| c.to_ascii_uppercase()));
            self.text.push_str(text.get(2..).unwrap_or(""));
            self.capital = text.len() == 1;
        } else if std::mem::take(&mut self.capital) {
            self.text.push(first.to_ascii_uppercase());
            self.text.push_str(&text[1..]);
        } else {
            self.text.push_str(text);
        }
        if let Source::Script(_, wanted) = self.source
            && !wanted[from..].starts_with(&self.text[from..])
        {
            let same = wanted.bytes().zip(self.text.bytes()).take_while(|(a, b)| a == b).count();
            self.text.truncate(same);
            self.lost = true;
        }
    }
}
