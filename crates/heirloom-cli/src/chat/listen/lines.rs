//! Cuts what a client sends into lines, however it arrives.
//!
//! A line is given out when its end has come, without the newline. One that is longer than [`LONGEST`] is given out in
//! pieces of that length, or up to three bytes less so that no UTF-8 character is cut; so the memory is bounded.
//! The lines depend on the bytes alone, not on how many of them came at a time.

/// The longest piece of a line that is given out at once, in bytes.
pub(super) const LONGEST: usize = 64 * 1024;

/// The beginning of a line, the end of which is awaited.
#[derive(Debug, Default)]
pub(super) struct Lines {
    half: Vec<u8>,
}

impl Lines {
    /// Goes on with a line that has begun.
    pub(super) fn resume(half: Vec<u8>) -> Lines {
        Lines { half }
    }

    /// What has come of a line that has not ended.
    pub(super) fn half(&self) -> &[u8] {
        &self.half
    }

    /// Takes in what has arrived, and gives out each line that is complete with it.
    pub(super) fn push(&mut self, mut bytes: &[u8], mut line: impl FnMut(&[u8])) {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            self.extend(&bytes[..end], &mut line);
            line(&self.half);
            self.half.clear();
            bytes = &bytes[end + 1..];
        }
        self.extend(bytes, &mut line);
    }

    /// Nothing more will come: gives out the line that has not ended, if there is one.
    pub(super) fn finish(&mut self, line: impl FnOnce(&[u8])) {
        if !self.half.is_empty() {
            line(&self.half);
            self.half.clear();
        }
    }

    fn extend(&mut self, bytes: &[u8], line: &mut impl FnMut(&[u8])) {
        self.half.extend_from_slice(bytes);
        let mut given = 0;
        // A line of exactly that length is whole: its newline may be the next to come.
        while self.half.len() - given > LONGEST {
            let piece = piece(&self.half[given..]);
            line(&self.half[given..given + piece]);
            given += piece;
        }
        self.half.drain(..given);
    }
}

/// Where to cut bytes that are more than [`LONGEST`]: there, unless a character begins before and ends behind it.
fn piece(bytes: &[u8]) -> usize {
    let length = |lead: u8| match lead {
        0xc0..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf7 => 4,
        _ => 1,
    };
    (1..=3).map(|back| LONGEST - back).find(|&at| at + length(bytes[at]) > LONGEST).unwrap_or(LONGEST)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// The lines of these reads.
    fn lines<'r>(reads: impl IntoIterator<Item = &'r [u8]>) -> Vec<Vec<u8>> {
        let (mut lines, mut given) = (Lines::default(), Vec::new());
        for read in reads {
            lines.push(read, |line| given.push(line.to_vec()));
            assert!(lines.half().len() <= LONGEST);
        }
        lines.finish(|line| given.push(line.to_vec()));
        given
    }

    #[test]
    fn a_half_line_waits_for_its_end() {
        let mut lines = Lines::default();
        let mut given = Vec::new();
        lines.push(b"one\ntw", |line| given.push(line.to_vec()));
        assert_eq!((given.len(), lines.half()), (1, &b"tw"[..]));
        let mut lines = Lines::resume(lines.half().to_vec());
        lines.push(b"o\n\n\r\n", |line| given.push(line.to_vec()));
        assert_eq!(given, [&b"one"[..], b"two", b"", b"\r"]);
        lines.finish(|line| panic!("{line:?}"));
    }

    #[test]
    fn a_long_line_comes_in_pieces() {
        let long = vec![b'x'; LONGEST];
        assert_eq!(lines([&long[..], b"\n"]), std::slice::from_ref(&long));
        assert_eq!(lines([&long[..], b"y\n"]), [long.clone(), b"y".to_vec()]);
        assert_eq!(lines([&long[..], &long, &long, b"y"]), [&long[..], &long, &long, b"y"]);
    }

    #[test]
    fn a_piece_ends_between_characters() {
        for character in ["é", "漢", "🦀"] {
            for before in 0..5 {
                let text = "x".repeat(LONGEST - before) + &character.repeat(2 * LONGEST);
                let given = lines([text.as_bytes()]);
                assert!(given.iter().all(|piece| std::str::from_utf8(piece).is_ok()));
                assert_eq!(given.concat(), text.as_bytes());
                let (_, pieces) = given.split_last().expect("some");
                assert!(pieces.iter().all(|piece| piece.len() <= LONGEST && piece.len() > LONGEST - 4));
            }
        }
        // What is no text is cut at the length.
        assert_eq!(lines([&[0x80; LONGEST + 1][..]])[0].len(), LONGEST);
    }

    /// Bytes in which what is interesting is frequent, and lines are long.
    fn input() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            Just(b"\n".to_vec()),
            "[a-z]{0,20}".prop_map(String::into_bytes),
            prop::collection::vec(any::<u8>(), 0..10),
            (LONGEST - 5..LONGEST + 5).prop_map(|length| vec![b'x'; length]),
            (LONGEST / 3 - 2..LONGEST / 3 + 2).prop_map(|length| "漢".repeat(length).into_bytes()),
        ];
        prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn however_the_input_is_cut_the_lines_are_the_same(
            input in input(),
            cuts in prop::collection::vec(any::<Index>(), 0..20),
            resumed: bool,
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(input.len() + 1)).collect();
            cuts.extend([0, input.len()]);
            cuts.sort_unstable();
            let reads = cuts.windows(2).map(|pair| &input[pair[0]..pair[1]]);
            let (mut pieces, mut given) = (Lines::default(), Vec::new());
            for read in reads {
                pieces.push(read, |line| given.push(line.to_vec()));
                if resumed {
                    pieces = Lines::resume(pieces.half().to_vec());
                }
            }
            pieces.finish(|line| given.push(line.to_vec()));
            prop_assert_eq!(given, lines([&input[..]]));
        }

        #[test]
        fn nothing_is_lost(input in input()) {
            let given = lines([&input[..]]);
            let without_newlines: Vec<u8> = input.iter().copied().filter(|&byte| byte != b'\n').collect();
            prop_assert_eq!(given.concat(), without_newlines);
        }
    }
}
