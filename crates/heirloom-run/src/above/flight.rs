//! How many descriptors may be in flight.
//!
//! An unprivileged user may have as many as the limit on open files of the process that sends one more. That would be the
//! command as well, which has a limit of its own: so the vault stays below that, and the command can always send.

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::page::CAPACITY;

/// What is left free: a page that is written anew is in flight twice, and so much for messages.
const FREE: usize = CAPACITY + 64;

/// CAP_SYS_ADMIN and CAP_SYS_RESOURCE, either of which lifts the limit.
const PRIVILEGED: u64 = 1 << 21 | 1 << 24;

/// How many the vault may have, with this process as the one that sends descriptors beside this one.
pub(crate) fn most(command: Option<u32>) -> usize {
    if is_privileged() {
        return usize::MAX;
    }
    let own = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let theirs = command.and_then(soft_limit).unwrap_or(own);
    let limit = usize::try_from(own.min(theirs)).unwrap_or(usize::MAX);
    limit.saturating_sub(FREE).max(limit / 2)
}

/// Another process's soft limit on open files.
fn soft_limit(pid: u32) -> Option<u64> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Whether this process has a privilege that lifts the limit: in the first user namespace, where alone it counts.
fn is_privileged() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let first = map.split_whitespace().eq(["0", "0", "4294967295"]);
    effective & PRIVILEGED != 0 && first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_a_process_is_read() {
        let own = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert_eq!(soft_limit(std::process::id()).unwrap_or(u64::MAX), own);
        assert_eq!(soft_limit(0), None);
        assert!(most(None) > 0);
    }
}
