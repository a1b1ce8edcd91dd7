use std::collections::HashSet;

use super::teller::{Choice, Teller};
use super::*;

#[test]
fn a_seed_tells_the_same_stories_everywhere() {
    let first = Stories::new(1).next().unwrap();
    assert_eq!(
        first.text,
        "This is the story of Jasper, a clever raccoon who lived next to the bakery. He was good at telling \
         jokes, but not at keeping secrets. Early one morning he took the path to the barn. It was warm there \
         and smelled of hay. A warm wind was blowing. He almost stepped on a gosling. It was all alone and \
         very cold. \"You poor thing,\" said Jasper. He remembered what Grandma always did. Very gently he \
         dried it with a towel. Then its mother came around the corner. It hopped and danced for joy. \
         \"Goodbye!\" shouted Jasper. \"Take care of yourself!\" That evening he told Grandma all about it \
         over hot cocoa."
    );
    assert!(Stories::new(7).take(50).eq(Stories::new(7).take(50)));
    assert_ne!(Stories::new(8).next(), Stories::new(7).next());
}

#[test]
fn stories_do_not_repeat() {
    let stories: Vec<Story> = Stories::new(3).take(5000).collect();
    let texts: HashSet<&str> = stories.iter().map(|story| story.text.as_str()).collect();
    assert_eq!(texts.len(), stories.len());
    let told: HashSet<&str> = stories.iter().map(|story| story.plot).collect();
    assert_eq!(told.len(), plots::PLOTS.len());
}

/// Every story has one derivation, with the probability that it was told with.
#[test]
fn stories_are_unambiguous() {
    for story in Stories::new(11).take(20) {
        let reading = read(&story.text);
        assert_eq!(reading.derivations, 1, "{}", story.text);
        assert_eq!(reading.understood, story.text.len());
        assert!((reading.bits - story.bits).abs() < 1e-6, "{reading:?}, told with {} bits", story.bits);
    }
}

#[test]
fn other_texts_are_no_stories() {
    let story = Stories::new(5).next().unwrap().text;
    for (text, understood) in [
        (String::new(), 0),
        (story[..100].to_owned(), 100),
        (format!("{story} The end."), story.len()),
        (format!("{}\u{e9}{}", &story[..100], &story[101..]), 100),
    ] {
        let reading = read(&text);
        assert_eq!((reading.derivations, reading.bits), (0, f64::INFINITY), "{text}");
        assert_eq!(reading.understood, understood, "{text}");
    }
}

/// At every choice of a story the probabilities of the alternatives sum to one.
#[test]
fn probabilities_sum_to_one() {
    for seed in 0..10 {
        let mut random = SplitMix64::new(seed);
        let mut told = Teller::random(&mut random);
        plots::story(&mut told);
        for (i, choice) in told.choices.iter().enumerate() {
            let weights = (0..choice.of).map(|chosen| {
                let mut script = told.choices[..=i].to_vec();
                script[i].chosen = chosen;
                let mut other = Teller::replaying(&script, &told.text);
                plots::story(&mut other);
                let Choice { weight, total, of, .. } = other.choices[i];
                assert_eq!((total, of), (choice.total, choice.of));
                weight
            });
            assert_eq!(weights.sum::<u32>(), choice.total);
        }
    }
}

/// The choices are made with the probabilities that are accounted for them.
#[test]
fn choices_have_their_probabilities() {
    // The sum of independent deviations with mean 0, in units of its standard deviation.
    let (mut uniform, mut uniform_variance) = (0.0, 0.0);
    let (mut unlike, mut unlike_variance) = (0.0, 0.0);
    let mut random = SplitMix64::new(0);
    for _ in 0..2000 {
        let mut teller = Teller::random(&mut random);
        plots::story(&mut teller);
        for &Choice { chosen, weight, total, of } in &teller.choices {
            if weight * of == total {
                uniform += f64::from(chosen) - f64::from(of - 1) / 2.0;
                uniform_variance += (f64::from(of).powi(2) - 1.0) / 12.0;
            } else {
                assert_eq!(of, 2, "only `sometimes` is weighted");
                let p = f64::from(weight) / f64::from(total);
                let second = if chosen == 1 { p } else { 1.0 - p };
                unlike += f64::from(chosen) - second;
                unlike_variance += p * (1.0 - p);
            }
        }
    }
    assert!(f64::abs(uniform) < 4.0 * uniform_variance.sqrt(), "{uniform} of {uniform_variance}");
    assert!(unlike_variance > 100.0);
    assert!(f64::abs(unlike) < 4.0 * unlike_variance.sqrt(), "{unlike} of {unlike_variance}");
}

#[test]
fn entropy_adds_up() {
    let stories: Vec<Story> = Stories::new(2).take(500).collect();
    let entropy: Entropy = stories.iter().collect();
    let bits: f64 = stories.iter().map(|story| story.bits).sum();
    assert_eq!((entropy.stories, entropy.bits), (500, bits));
    assert!((60.0..90.0).contains(&entropy.per_story()), "{entropy:?}");
    assert!((0.1..2.0).contains(&entropy.standard_error()), "{entropy:?}");
    // One token per character, and one per story.
    let perplexity = entropy.perplexity(entropy.characters);
    assert!((perplexity.log2() - entropy.per_character()).abs() < 1e-12);
    assert!((entropy.perplexity(500).log2() - entropy.per_story()).abs() < 1e-9);
}

/// What a proofreader checks.
#[test]
fn stories_are_well_written() {
    let mut random = SplitMix64::new(4);
    for _ in 0..8000 {
        let mut teller = Teller::random(&mut random);
        plots::story(&mut teller);
        let people: Vec<_> = teller.people().collect();
        let text = teller.text.as_str();
        let words: Vec<&str> = text.split(' ').collect();
        assert!((50..=200).contains(&words.len()), "{} words: {text}", words.len());
        assert!(text.is_ascii() && text.trim() == text && !text.contains("  "), "{text}");
        assert!(!text.contains(['{', '}', '~', '^', '\n']), "{text}");
        assert!(text.contains(people[0].name), "{text}");

        // Sentences begin with a capital and end with a stop; quotes open and close.
        assert!(text.trim_end_matches('"').ends_with(['.', '!', '?']), "{text}");
        let mut open = false;
        for word in &words {
            let quotes = word.matches('"').count();
            assert_eq!(word.starts_with('"') && !open, quotes > 0 && !open, "{word} in {text}");
            open ^= quotes % 2 == 1;
        }
        assert!(!open, "{text}");
        for pair in words.windows(2) {
            let [word, next] = pair else { unreachable!("windows of two") };
            if word.ends_with(['.', '!', '?']) {
                assert!(next.trim_start_matches('"').starts_with(|c: char| c.is_ascii_uppercase()), "{text}");
            }
            let vowel = next.trim_matches('"').starts_with(['a', 'e', 'i', 'o', 'u']);
            match *word {
                "a" | "A" => assert!(!vowel, "{word} {next}: {text}"),
                "an" | "An" => assert!(vowel, "{word} {next}: {text}"),
                _ => assert!(word != next || word.ends_with(','), "{word} {next}: {text}"),
            }
        }

        // Among women nobody is called he, and among men nobody is called she.
        let plain = text.to_lowercase();
        let said = |pronouns: [&str; 4]| {
            plain.split(|c: char| !c.is_alphabetic()).any(|word| pronouns.contains(&word))
        };
        assert!(people.iter().any(|person| !person.she) || !said(["he", "him", "his", "himself"]), "{text}");
        assert!(people.iter().any(|person| person.she) || !said(["she", "her", "hers", "herself"]), "{text}");
    }
}
