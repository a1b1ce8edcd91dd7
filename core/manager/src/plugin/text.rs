//! Strings that a plugin brings, made fit to be shown.

/// On one line, and without characters that steer a terminal or reorder what stands around them: white space becomes
/// a space, all others become U+FFFD.
///
/// Every string of a plugin that people will read goes through here when it arrives: versions, features, messages, what
/// the loader, a driver or the gate's child says.
pub(crate) fn shown(text: &str) -> String {
    let shown = |c: char| match c {
        '\t' | '\n' | '\r' | '\u{85}' | '\u{2028}' | '\u{2029}' => ' ',
        // Invisible characters, and directions of writing.
        '\u{61c}'
        | '\u{200b}'..='\u{200f}'
        | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}' => char::REPLACEMENT_CHARACTER,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn a_text_stays_on_its_line_and_steers_no_terminal() {
        let version = "1.0\x1b[31mRED\x1b]0;title\x07\nline2 passed: all";
        assert_eq!(shown(version), "1.0\u{fffd}[31mRED\u{fffd}]0;title\u{fffd} line2 passed: all");
        assert_eq!(shown("a\u{202e}b\u{9b}c\r\n"), "a\u{fffd}b\u{fffd}c  ");
        assert_eq!(shown("1.0-β [3, 4]ᵀ"), "1.0-β [3, 4]ᵀ");
    }
}
