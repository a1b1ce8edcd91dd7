//! What Python's strings do, where Rust's differ.

use minijinja::Error;

use super::values::error;

/// What Python's `str.isspace` says.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Which ends of a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    Both,
    Left,
    Right,
}

/// `strip`, `lstrip` and `rstrip`: without blanks, or these characters.
pub fn strip<'a>(text: &'a str, characters: Option<&str>, ends: Ends) -> &'a str {
    let drop = |c: char| characters.map_or_else(|| is_space(c), |all| all.contains(c));
    let text = if ends == Ends::Right { text } else { text.trim_start_matches(drop) };
    if ends == Ends::Left { text } else { text.trim_end_matches(drop) }
}

/// `split` and `rsplit`. `times`: how often at most.
pub fn split<'a>(
    text: &'a str,
    separator: Option<&str>,
    times: usize,
    from_right: bool,
) -> Result<Vec<&'a str>, Error> {
    match separator {
        Some("") => Err(error("split: the separator is empty")),
        Some(separator) if from_right => {
            let mut parts: Vec<_> = text.rsplitn(times.saturating_add(1), separator).collect();
            parts.reverse();
            Ok(parts)
        }
        Some(separator) => Ok(text.splitn(times.saturating_add(1), separator).collect()),
        None => Ok(split_blanks(text, times, from_right)),
    }
}

fn split_blanks(text: &str, times: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    if from_right {
        loop {
            rest = rest.trim_end_matches(is_space);
            let last = rest.char_indices().rev().find(|(_, c)| is_space(*c));
            match last {
                _ if rest.is_empty() => break,
                Some((at, c)) if parts.len() < times => {
                    parts.push(&rest[at + c.len_utf8()..]);
                    rest = &rest[..at];
                }
                Some(_) | None => {
                    parts.push(rest);
                    break;
                }
            }
        }
        parts.reverse();
        return parts;
    }
    loop {
        rest = rest.trim_start_matches(is_space);
        match rest.find(is_space) {
            _ if rest.is_empty() => break,
            Some(at) if parts.len() < times => {
                parts.push(&rest[..at]);
                rest = &rest[at..];
            }
            Some(_) | None => {
                parts.push(rest);
                break;
            }
        }
    }
    parts
}

fn is_line_end(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// `splitlines`, each with its line end.
pub fn lines(text: &str) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, c)) = rest.char_indices().find(|(_, c)| is_line_end(*c)) {
        let mut end = at + c.len_utf8();
        if c == '\r' && rest[end..].starts_with('\n') {
            end += 1;
        }
        lines.push(&rest[..end]);
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// A line without its end.
pub fn without_end(line: &str) -> &str {
    line.strip_suffix("\r\n").or_else(|| line.strip_suffix(is_line_end)).unwrap_or(line)
}

/// A character at the begin of a word: upper case, but of several letters in one only the first.
fn title_case(c: char, out: &mut String) {
    match c {
        // Two letters in one character have a form for the begin of a word.
        'Ǆ'..='ǆ' => out.push('ǅ'),
        'Ǉ'..='ǉ' => out.push('ǈ'),
        'Ǌ'..='ǌ' => out.push('ǋ'),
        'Ǳ'..='ǳ' => out.push('ǲ'),
        _ => {
            for (at, upper) in c.to_uppercase().enumerate() {
                if at == 0 { out.push(upper) } else { out.extend(upper.to_lowercase()) }
            }
        }
    }
}

/// `capitalize`: the first character in upper case, the others in lower case.
pub fn capitalize(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    if let Some(first) = chars.next() {
        title_case(first, &mut out);
    }
    out + &chars.as_str().to_lowercase()
}

/// `title`: each word capitalized. The method takes everything but letters for the end of a word; Jinja2's filter takes
/// only blanks and these brackets.
pub fn title(text: &str, is_end: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    let mut begins = true;
    for c in text.chars() {
        if is_end(c) {
            out.push(c);
            begins = true;
        } else {
            if begins {
                title_case(c, &mut out)
            } else {
                out.extend(c.to_lowercase())
            }
            begins = false;
        }
    }
    out
}

/// `isalpha`, `isdigit` and their like, which hold for texts of at least one character.
pub fn all(text: &str, name: &str) -> Result<bool, Error> {
    if text.is_empty() {
        return Ok(name == "isascii");
    }
    // Python tells numbers that are digits from others, which Rust does not.
    let digit = |c: char| {
        if c.is_ascii() || !c.is_numeric() {
            return Ok(c.is_ascii_digit());
        }
        Err(error(format!("{name}: digits that are not ASCII ({c:?}) are not supported")))
    };
    let letter = |c: char| c.is_alphabetic() && !c.is_numeric();
    let mut holds = true;
    for c in text.chars() {
        holds &= match name {
            "isascii" => c.is_ascii(),
            "isspace" => is_space(c),
            "isalpha" => letter(c),
            "isalnum" => letter(c) || digit(c)?,
            _ => digit(c)?,
        };
    }
    Ok(holds)
}

/// `islower` and `isupper`: there are letters with a case, and all of them have this one.
pub fn all_case(text: &str, upper: bool) -> bool {
    let is = |c: char, upper: bool| if upper { c.is_uppercase() } else { c.is_lowercase() };
    text.chars().any(|c| is(c, upper)) && !text.chars().any(|c| is(c, !upper))
}
