//! Makes a line harmless to show: what could steer a terminal is written out instead.
//!
//! Like ncat's, an escape is a backslash and the byte as three octal digits (`\033`). Escaped are control characters but
//! tab and carriage return, both the old ones (U+0000 to U+001F, and U+007F) and those that came with eight bits (U+0080
//! to U+009F), and every byte that is no valid UTF-8. Unlike ncat, which escapes every byte from 128 on, other UTF-8 passes.

use std::io::Write;

/// Appends `line` to `into`, escaped.
pub(super) fn escape(line: &[u8], into: &mut Vec<u8>) {
    for chunk in line.utf8_chunks() {
        let mut rest = chunk.valid();
        while let Some(at) = rest.find(is_unsafe) {
            let (harmless, from) = rest.split_at(at);
            let length = from.chars().next().map_or(0, char::len_utf8);
            into.extend_from_slice(harmless.as_bytes());
            escape_bytes(&from.as_bytes()[..length], into);
            rest = &from[length..];
        }
        into.extend_from_slice(rest.as_bytes());
        escape_bytes(chunk.invalid(), into);
    }
}

fn is_unsafe(character: char) -> bool {
    character.is_control() && !matches!(character, '\t' | '\r' | '\n')
}

fn escape_bytes(bytes: &[u8], into: &mut Vec<u8>) {
    for byte in bytes {
        // Memory takes everything.
        let _ = write!(into, "\\{byte:03o}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn escaped(line: &[u8]) -> String {
        let mut into = Vec::new();
        escape(line, &mut into);
        String::from_utf8(into).expect("what is escaped is text")
    }

    #[test]
    fn what_steers_a_terminal_is_written_out() {
        assert_eq!(escaped(b"\x1b[2J\x07\x7f\x00"), r"\033[2J\007\177\000");
        // U+009B is what ESC [ is in eight bits.
        assert_eq!(escaped("a\u{9b}b\u{80}".as_bytes()), r"a\302\233b\302\200");
    }

    #[test]
    fn text_passes() {
        let text = "tab\tcarriage return\r é ß 漢 🦀 \u{a0} \\033";
        assert_eq!(escaped(text.as_bytes()), text);
    }

    #[test]
    fn what_is_no_utf8_is_written_out_and_what_follows_is_not() {
        assert_eq!(escaped(b"\xff\xfea\xc3"), r"\377\376a\303");
        assert_eq!(escaped(b"\xe2\x82z"), r"\342\202z");
        // A surrogate, and an overlong slash.
        assert_eq!(escaped(b"\xed\xa0\x80\xc0\xaf"), r"\355\240\200\300\257");
    }

    proptest! {
        #[test]
        fn nothing_escapes_the_escape(line: Vec<u8>) {
            let escaped = escaped(&line);
            prop_assert!(!escaped.chars().any(is_unsafe));
            prop_assert!(escaped.len() <= 4 * line.len());
        }

        #[test]
        fn what_is_escaped_can_be_told(line: Vec<u8>) {
            // Without backslashes of its own, a line can be had back.
            let line: Vec<u8> = line.into_iter().filter(|&byte| byte != b'\\').collect();
            let (escaped, mut back) = (escaped(&line).into_bytes(), Vec::new());
            let mut rest = &escaped[..];
            while let [byte, after @ ..] = rest {
                let (meant, after) = match byte {
                    b'\\' => {
                        let (octal, after) = after.split_at(3);
                        let octal = std::str::from_utf8(octal).expect("three digits");
                        (u8::from_str_radix(octal, 8).expect("octal ones"), after)
                    }
                    &byte => (byte, after),
                };
                back.push(meant);
                rest = after;
            }
            prop_assert_eq!(back, line);
        }

        #[test]
        fn lines_one_by_one_are_escaped_as_all_at_once(lines: Vec<Vec<u8>>) {
            let separate: Vec<String> = lines.iter().map(|line| escaped(line)).collect();
            prop_assert_eq!(separate.join("\n"), escaped(&lines.join(&b'\n')));
        }
    }
}
