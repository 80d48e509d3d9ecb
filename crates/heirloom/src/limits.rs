//! The bounds that a receiver enforces on what another process sends.
//!
//! Nothing that arrives is believed: every length and count is held against a [`Limits`] before memory is
//! spent on it in proportion. A sender checks the same bounds when it encodes, so that the one who could do
//! something about it hears of it first.

/// Upper bounds on everything that comes from another process.
///
/// Each field is the largest value that is still accepted. Both sides of a takeover should use the same
/// limits: what the incumbent may write, the successor has to be ready to read.
///
/// ```
/// use heirloom::Limits;
///
/// let limits = Limits { items: 50_000, ..Limits::default() };
/// assert_eq!(limits.name_bytes, 256);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Items in one manifest, and entries in any other list of it. Default 1,000,000.
    pub items: usize,
    /// Bytes in a name: of an item, a section, a counter, a service, a program, a version. Default 256.
    pub name_bytes: usize,
    /// Bytes of encoded state that one item carries. Default 16 MiB.
    pub item_state_bytes: usize,
    /// Bytes of encoded application state. Default 256 MiB.
    pub state_bytes: usize,
    /// Bytes of one manifest, header included. Default 512 MiB.
    pub manifest_bytes: usize,
    /// Bytes of one line on the control socket, newline included. Default 64 KiB.
    pub control_line_bytes: usize,
    /// Bytes of one packet on a channel. Default 32 KiB: far below what a SEQPACKET send buffer holds.
    pub packet_bytes: usize,
    /// Lines not understood on one control connection before it is cut off. Default 8.
    pub bad_lines: usize,
    /// Control connections open at a time; further ones wait in the backlog. Default 64.
    pub control_connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        const KIB: usize = 1 << 10;
        const MIB: usize = 1 << 20;
        Limits {
            items: 1_000_000,
            name_bytes: 256,
            item_state_bytes: 16 * MIB,
            state_bytes: 256 * MIB,
            manifest_bytes: 512 * MIB,
            control_line_bytes: 64 * KIB,
            packet_bytes: 32 * KIB,
            bad_lines: 8,
            control_connections: 64,
        }
    }
}

impl AsRef<Limits> for Limits {
    fn as_ref(&self) -> &Limits {
        self
    }
}
