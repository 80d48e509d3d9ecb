//! Sizes on the command line: a number of bytes, or of `k` or `M` (1,024 bytes, and 1,024 of those).

/// The largest backlog, in bytes: what is unsent has to fit into a manifest when the server is replaced.
pub(super) const LARGEST: usize = 256 << 20;

/// Reads a size of at most [`LARGEST`].
pub(in crate::chat) fn parse(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        _ => (text, 0),
    };
    let number: usize =
        digits.parse().map_err(|_| "a size is a number of bytes, such as 65536, 64k or 4M")?;
    number
        .checked_mul(1 << shift)
        .filter(|&size| size <= LARGEST)
        .ok_or_else(|| format!("at most {}M are possible", LARGEST >> 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_suffixes() {
        let sizes = ["0", "65536", "64k", "4M", "256m"].map(|text| parse(text).unwrap());
        assert_eq!(sizes, [0, 65_536, 65_536, 4 << 20, LARGEST]);
    }

    #[test]
    fn what_is_no_size() {
        for text in
            ["", "k", "-1", "4G", "4 M", "1.5M", "257M", "99999999999999999999", "18446744073709551615M", "é"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
