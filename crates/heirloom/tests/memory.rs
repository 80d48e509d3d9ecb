//! What a manifest claims costs its receiver nothing: memory is spent on what is there. A test binary of its own, because the
//! peak of memory is the whole process's.

use heirloom::Limits;
use heirloom::manifest::{Base, Delta, ManifestError, read_sealed, seal};

/// More than a few bytes of input are worth, far less than what they claim.
const ENOUGH_KIB: u64 = 8 * 1024;

/// The most memory that this process ever had (`proc_pid_status(5)`).
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// A manifest of one part with a right header: `body` is believed to be what was sent.
fn framed(part: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"HEIRLOOM".to_vec();
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(part.to_le_bytes());
    bytes.extend(crc32fast::hash(body).to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    bytes
}

#[test]
fn what_is_claimed_is_not_allocated() {
    let limits = Limits::default();
    let before = peak_kib();
    // In a few bytes: lists of a million entries, which the limits allow, and strings of 256 MiB, which they allow too.
    let (many, long) = ((limits.items as u32).to_be_bytes(), (limits.state_bytes as u32).to_be_bytes());
    for key in 0..12 {
        for (major, length) in [(0x9a, many), (0xba, many), (0x5a, long), (0x7a, long)] {
            let body: Vec<u8> = [0xa1, key, major].into_iter().chain(length).collect();
            for error in [
                Base::decode(&framed(1, &body), &limits).map(drop),
                Delta::decode(&framed(2, &body), &limits).map(drop),
            ] {
                assert!(error.is_err(), "key {key}, {major:x}");
            }
        }
    }
    // A header that claims all that may be, in front of nothing.
    let mut bytes = framed(1, b"");
    bytes[16..24].copy_from_slice(&(limits.manifest_bytes as u64).to_le_bytes());
    assert!(Base::decode(&bytes, &limits).is_err());
    // A memfd that is larger than what is allowed is not read.
    let memfd = seal("large", &vec![0; 4 << 20]).expect("memfd");
    let read = read_sealed(&memfd, 1 << 20);
    assert!(matches!(read, Err(ManifestError::Limit { .. })), "{read:?}");
    let grown = peak_kib() - before;
    assert!(grown < ENOUGH_KIB, "{grown} KiB for what was only claimed");
}
