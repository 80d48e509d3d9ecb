//! What single values may be. Each is read once from a file's value, and checked by itself for those who have no file.
//!
//! What is wrong is said in words that go on after the name of the key: `` `mode` is to be … ``.

use std::num::NonZeroUsize;
use std::time::Duration;

use toml::de::DeValue;

use super::table::{kind, list, nearest};
use super::{AccessFormat, Balance};

/// How many event loops there can be.
const MAX_THREADS: usize = 1024;
/// As many characters as a name may have; the longest address has fewer.
const MAX_NAME: usize = 128;
/// The longest time, a year, which added to any moment makes another.
const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// The longest silence before a probe that the kernel takes (`MAX_TCP_KEEPIDLE`), in seconds.
const MAX_KEEPALIVE: u64 = 32_767;

type Read<T> = Result<T, String>;

pub(super) fn string(value: &DeValue<'_>) -> Read<String> {
    match value {
        DeValue::String(text) => Ok(text.clone().into_owned()),
        other => Err(format!("is to be a string in quotes, not {}", kind(other))),
    }
}

pub(super) fn boolean(value: &DeValue<'_>) -> Read<bool> {
    value.as_bool().ok_or_else(|| format!("is to be true or false, not {}", kind(value)))
}

/// A number from one bound to another, both included.
fn integer(value: &DeValue<'_>, least: u64, most: u64) -> Read<u64> {
    let number = value.as_integer().ok_or_else(|| format!("is to be a number, not {}", kind(value)))?;
    let read = u64::from_str_radix(number.as_str(), number.radix()).ok();
    read.filter(|number| (least..=most).contains(number))
        .ok_or_else(|| format!("is to be from {least} to {most}, not {number}"))
}

pub(super) fn threads(value: &DeValue<'_>) -> Read<NonZeroUsize> {
    let number = integer(value, 1, MAX_THREADS as u64)?;
    NonZeroUsize::new(number as usize).ok_or_else(|| "is zero".to_owned())
}

/// A number of connections.
pub(super) fn limit(value: &DeValue<'_>) -> Read<usize> {
    integer(value, 1, u32::MAX.into()).map(|number| number as usize)
}

pub(super) fn retries(value: &DeValue<'_>) -> Read<u32> {
    integer(value, 0, 1_000).map(|number| number as u32)
}

pub(super) fn backlog(value: &DeValue<'_>) -> Read<u32> {
    integer(value, 1, i32::MAX as u64).map(|number| number as u32)
}

/// A time that may be zero.
pub(super) fn duration(value: &DeValue<'_>) -> Read<Duration> {
    const RIGHT: &str = "is to be a duration such as \"500ms\", \"30s\" or \"1h 30m\"";
    let text = match value {
        DeValue::String(text) => text,
        DeValue::Integer(number) => return Err(format!("{RIGHT}; {number} has no unit")),
        other => return Err(format!("{RIGHT}, not {}", kind(other))),
    };
    let duration =
        humantime::parse_duration(text).map_err(|error| format!("{RIGHT}, not {text:?}: {error}"))?;
    check_duration(duration)?;
    Ok(duration)
}

pub(super) fn check_duration(duration: Duration) -> Read<()> {
    if duration > MAX_DURATION { Err("is more than a year".to_owned()) } else { Ok(()) }
}

/// A time within which something has to happen.
pub(super) fn timeout(value: &DeValue<'_>) -> Read<Duration> {
    let duration = duration(value)?;
    check_timeout(duration)?;
    Ok(duration)
}

pub(super) fn check_timeout(duration: Duration) -> Read<()> {
    if duration.is_zero() {
        return Err("is zero, so that nothing could be in time: leave it out for the default".to_owned());
    }
    check_duration(duration)
}

/// A time, or `false` for never.
pub(super) fn keepalive(value: &DeValue<'_>) -> Read<Option<Duration>> {
    match value {
        DeValue::Boolean(false) => Ok(None),
        DeValue::Boolean(true) => Err("is to be a duration such as \"60s\", or false".to_owned()),
        value => {
            let duration = duration(value)?;
            let whole = duration.subsec_nanos() == 0 && (1..=MAX_KEEPALIVE).contains(&duration.as_secs());
            if whole {
                Ok(Some(duration))
            } else {
                Err(format!("is to be whole seconds, from 1s to {MAX_KEEPALIVE}s, or false"))
            }
        }
    }
}

/// Permissions as chmod(1) has them.
pub(super) fn mode(value: &DeValue<'_>) -> Read<u32> {
    const RIGHT: &str = "is to be permissions in octal as a string, \"0660\" for instance";
    let DeValue::String(text) = value else {
        return Err(format!("{RIGHT}, not {}", kind(value)));
    };
    let octal = text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| octal && *mode <= 0o777);
    mode.ok_or_else(|| format!("{RIGHT}, not {text:?}"))
}

pub(super) fn balance(value: &DeValue<'_>) -> Read<Balance> {
    one_of(value, &[("round-robin", Balance::RoundRobin), ("least-connections", Balance::LeastConnections)])
}

pub(super) fn format(value: &DeValue<'_>) -> Read<AccessFormat> {
    one_of(value, &[("text", AccessFormat::Text), ("json", AccessFormat::Json)])
}

fn one_of<T: Copy>(value: &DeValue<'_>, choices: &[(&'static str, T)]) -> Read<T> {
    let text = string(value)?;
    if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == text) {
        return Ok(*choice);
    }
    let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
    Err(match nearest(&text, &names) {
        Some(name) => format!("is {text:?}: is it \"{name}\"?"),
        None => format!("is {text:?}: there are {}", list(&names)),
    })
}

/// What something is called in status and logs, where a name has a line to fit into.
pub(super) fn name(value: &DeValue<'_>) -> Read<String> {
    let name = string(value)?;
    check_name(&name)?;
    Ok(name)
}

pub(super) fn check_name(name: &str) -> Read<()> {
    if name.is_empty() {
        Err("is empty: give it a name, or leave it out".to_owned())
    } else if name.chars().any(char::is_control) {
        Err("has a control character in it".to_owned())
    } else if name.chars().count() > MAX_NAME {
        Err(format!("has more than {MAX_NAME} characters"))
    } else {
        Ok(())
    }
}
