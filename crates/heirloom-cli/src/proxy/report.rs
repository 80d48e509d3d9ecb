//! What a proxy says of itself, as a table.

use std::fmt::Write as _;

use heirloom::control::Status;
use heirloom_proxy::Report;

use super::serve::SERVICE;

/// What of a status is a proxy's.
pub(crate) fn of(status: &Status) -> Option<Report> {
    let application = status.application.clone().filter(|_| status.name == SERVICE)?;
    serde_json::from_value(application).ok()
}

/// The table, with a line for each listener and each backend.
pub(crate) fn table(report: &Report) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<14} {value}");
    };
    row(
        "connections",
        format!(
            "{} of at most {}, {:.1} new a second",
            report.connections, report.max_connections, report.connections_per_second
        ),
    );
    row(
        "traffic",
        format!(
            "{}/s from clients, {}/s to clients",
            bytes(report.up_bytes_per_second),
            bytes(report.down_bytes_per_second)
        ),
    );
    row("pipes", format!("{} in use, {} of at most {}", report.pipes_in_use, report.pipes, report.max_pipes));
    let of_loops: Vec<String> = report.connections_of_loops.iter().map(usize::to_string).collect();
    row("threads", format!("{}, with connections: {}", report.threads, of_loops.join(", ")));
    let mut lines = vec![
        ["LISTENER", "ADDRESS", "POOL", "OPEN", "TOTAL", "REFUSED", "FROM CLIENTS", "TO CLIENTS"]
            .map(String::from),
    ];
    lines.extend(report.listeners.iter().map(|listener| {
        [
            listener.name.clone(),
            listener.address.clone(),
            listener.pool.clone().unwrap_or_else(|| "(no longer configured)".into()),
            open(listener.connections, listener.max_connections),
            listener.total_connections.to_string(),
            listener.refused.to_string(),
            bytes(listener.up_bytes as f64),
            bytes(listener.down_bytes as f64),
        ]
    }));
    out.push_str(&aligned(&lines));
    let mut lines = vec![
        ["BACKEND", "ADDRESS", "POOL", "OPEN", "TOTAL", "FAILED", "FROM CLIENTS", "TO CLIENTS"]
            .map(String::from),
    ];
    lines.extend(report.backends.iter().map(|backend| {
        let gone = if backend.configured { "" } else { " (no longer configured)" };
        [
            backend.name.clone(),
            backend.address.clone(),
            format!("{}{gone}", backend.pool),
            open(backend.connections, backend.max_connections),
            backend.total_connections.to_string(),
            backend.failed.to_string(),
            bytes(backend.up_bytes as f64),
            bytes(backend.down_bytes as f64),
        ]
    }));
    out.push_str(&aligned(&lines));
    out
}

fn open(now: usize, most: Option<usize>) -> String {
    most.map_or_else(|| now.to_string(), |most| format!("{now}/{most}"))
}

/// An amount for people.
fn bytes(count: f64) -> String {
    if count < 999.95 {
        return format!("{count:.0} B");
    }
    let mut count = count / 1000.0;
    for unit in ["kB", "MB", "GB"] {
        if count < 999.95 {
            return format!("{count:.1} {unit}");
        }
        count /= 1000.0;
    }
    format!("{count:.1} TB")
}

/// Lines with columns below each other, after an empty one.
fn aligned<const N: usize>(lines: &[[String; N]]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut out = String::from("\n");
    for line in lines {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use heirloom_proxy::{BackendReport, ListenerReport};

    use super::super::serve::SERVICE;

    use super::*;

    #[test]
    fn everything_is_in_the_table() {
        let report = Report {
            connections: 3,
            max_connections: 100,
            up_bytes_per_second: 1234.0,
            listeners: vec![ListenerReport {
                name: "web".into(),
                address: "127.0.0.1:80".into(),
                max_connections: Some(7),
                connections: 3,
                up_bytes: 12_345_678,
                ..ListenerReport::default()
            }],
            backends: vec![BackendReport {
                name: "one".into(),
                pool: "app".into(),
                ..BackendReport::default()
            }],
            ..Report::default()
        };
        let table = table(&report);
        for part in [
            "3 of at most 100",
            "1.2 kB/s from clients",
            "web       127.0.0.1:80  (no longer configured)  3/7",
            "12.3 MB",
            "one               app (no longer configured)  0 ",
        ] {
            assert!(table.contains(part), "{part:?} is not in\n{table}");
        }
        assert_eq!((bytes(999.0), bytes(999_949.0)), ("999 B".into(), "999.9 kB".into()));
        assert_eq!((bytes(999_951.0), bytes(5e18)), ("1.0 MB".into(), "5000000.0 TB".into()));
    }

    #[test]
    fn only_a_proxy_is_shown_as_one() {
        let mut status = Status { name: SERVICE.into(), ..Status::default() };
        assert!(of(&status).is_none());
        status.application = serde_json::to_value(Report::default()).ok();
        assert_eq!(of(&status), Some(Report::default()));
        status.name = "another".into();
        assert!(of(&status).is_none());
    }
}
