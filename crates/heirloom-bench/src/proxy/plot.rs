//! What was compared, for a page: plots as SVG, with bars for each case, and lines where a quantity is told by the number of
//! connections; and a table for each suite as Markdown.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use crate::proxy::comparison::{Comparison, DIRECT, brief};

const WIDTH: f64 = 900.0;
/// Of a line with its name at the left.
const LEFT: f64 = 300.0;
const RIGHT: f64 = 90.0;
const BAR: f64 = 14.0;
const SPACE: f64 = 12.0;
const TOP: f64 = 64.0;

/// A colour for each column, the same in all plots; they can be told apart without seeing red or green.
fn colour(column: &str) -> &'static str {
    match column {
        DIRECT => "#bbbbbb",
        "heirloom" => "#0072b2",
        "haproxy" => "#e69f00",
        "haproxy splice" => "#f5cf7a",
        "nginx" => "#009e73",
        _ => "#7fceb9",
    }
}

/// One plot: which comparisons are in it.
struct Plot {
    file: &'static str,
    title: &'static str,
    holds: fn(&Comparison) -> bool,
}

const BARS: [Plot; 7] = [
    Plot { file: "streams.svg", title: "Streams, GB/s (more is better)", holds: |one| one.unit == "GB/s" },
    Plot {
        file: "processor.svg",
        title: "Processor time of the proxy for a GB, ms (less is better)",
        holds: |one| one.case.contains(": CPU per GB"),
    },
    Plot {
        file: "requests.svg",
        title: "Short connections a second (more is better)",
        holds: |one| one.unit == "1/s",
    },
    Plot {
        file: "latency-1.svg",
        title: "Round trip of 64 B on 1 connection, µs (less is better)",
        holds: |one| one.case.starts_with("messages on 1 ") && one.case.contains(": p"),
    },
    Plot {
        file: "latency-64.svg",
        title: "Round trip of 64 B on each of 64 connections, µs (less is better)",
        holds: |one| one.case.starts_with("messages on 64 ") && one.case.contains(": p"),
    },
    Plot {
        file: "memory.svg",
        title: "Memory of the proxy for an idle connection, bytes (less is better)",
        holds: |one| one.case.starts_with("memory"),
    },
    Plot {
        file: "reload.svg",
        title: "Processes left behind, connections dropped, seconds until the old one is gone (less is better)",
        holds: |one| {
            let ends = ["left behind", ": dropped", "reload: old one gone", "upgrade: old one gone"];
            one.suite == "reload" && ends.iter().any(|end| one.case.ends_with(end))
        },
    },
];

/// Writes plots and tables of whatever was measured into the directory.
pub(crate) fn write(comparisons: &[Comparison], directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let save = |file: &str, svg: String| {
        let path = directory.join(file);
        std::fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))
    };
    for plot in &BARS {
        let held: Vec<&Comparison> = comparisons.iter().filter(|one| (plot.holds)(one)).collect();
        if !held.is_empty() {
            save(plot.file, bars(plot.title, &held))?;
        }
    }
    let gaps: Vec<(f64, &Comparison)> = comparisons
        .iter()
        .filter(|one| one.suite == "gap")
        .filter_map(|one| Some((connections(one)?, one)))
        .collect();
    if !gaps.is_empty() {
        save(
            "gap.svg",
            lines("What a handover adds to the longest gap, µs (median; less is better)", &gaps),
        )?;
    }
    for one_suite in comparisons.chunk_by(|one, next| one.suite == next.suite) {
        save(&format!("{}.md", one_suite[0].suite), table(one_suite))?;
    }
    Ok(())
}

/// The medians of a suite, in Markdown.
fn table(all: &[Comparison]) -> String {
    let mut table = String::from("| |");
    for (name, _) in &all[0].columns {
        let _ = write!(table, " {name} |");
    }
    let _ = write!(table, "\n|---|{}\n", "---|".repeat(all[0].columns.len()));
    for one in all {
        let unit = if one.unit.is_empty() { String::new() } else { format!(", {}", one.unit) };
        let _ = write!(table, "| {}{unit} |", one.case);
        for (name, _) in &one.columns {
            let median = one.medians().find(|(column, _)| column == name);
            let _ = write!(table, " {} |", median.map_or(String::new(), |(_, value)| brief(value)));
        }
        table.push('\n');
    }
    table
}

/// How many connections a gap was measured with, if it is one of those to be drawn.
fn connections(gap: &Comparison) -> Option<f64> {
    gap.case.strip_suffix(" connections")?.parse().ok()
}

/// Bars side by side, a group for each comparison, each group to its own scale when their units differ.
fn bars(title: &str, all: &[&Comparison]) -> String {
    let most = |one: &Comparison| one.medians().map(|(_, value)| value).fold(f64::MIN_POSITIVE, f64::max);
    let one_unit = all.iter().all(|one| one.unit == all[0].unit);
    let common = all.iter().map(|one| most(one)).fold(f64::MIN_POSITIVE, f64::max);
    let mut body = String::new();
    let mut y = TOP;
    for one in all {
        let scale = (WIDTH - LEFT - RIGHT) / if one_unit { common } else { most(one) };
        let medians: Vec<_> = one.medians().collect();
        let middle = y + medians.len() as f64 * BAR / 2.0;
        body += &text(LEFT - 10.0, middle + 4.0, "end", &one.case);
        for (name, value) in medians {
            let width = (value * scale).max(0.5);
            let _ = writeln!(
                body,
                r#"<rect x="{LEFT}" y="{y:.1}" width="{width:.1}" height="{:.1}" fill="{}"/>"#,
                BAR - 2.0,
                colour(name)
            );
            let end = LEFT + width + 5.0;
            body += &text(end, y + BAR - 4.0, "start", &format!("{} {}", brief(value), one.unit));
            y += BAR;
        }
        y += SPACE;
    }
    page(title, all, y, &body)
}

/// A line for each column, over the logarithm of the number of connections.
fn lines(title: &str, all: &[(f64, &Comparison)]) -> String {
    let (height, left) = (320.0, 80.0);
    let values = || all.iter().flat_map(|(_, one)| one.medians()).map(|(_, value)| value);
    let (least, most) = (values().fold(0.0, f64::min), values().fold(1.0, f64::max));
    let logs = || all.iter().map(|(count, _)| count.ln());
    let (first, last) = (logs().fold(f64::MAX, f64::min), logs().fold(f64::MIN, f64::max));
    let x = |count: f64| left + (count.ln() - first) / (last - first).max(1e-9) * (WIDTH - left - RIGHT);
    let y = |value: f64| TOP + height - (value - least) / (most - least) * height;
    let mut body = String::new();
    for part in 0..=4 {
        let value = least + (most - least) * f64::from(part) / 4.0;
        let (end, at) = (WIDTH - RIGHT, y(value));
        let _ = writeln!(body, r##"<path d="M{left} {at:.1}H{end}" stroke="#dddddd"/>"##);
        body += &text(left - 8.0, at + 4.0, "end", &brief(value));
    }
    for (count, _) in all {
        body += &text(x(*count), TOP + height + 18.0, "middle", &brief(*count));
    }
    body += &text((left + WIDTH - RIGHT) / 2.0, TOP + height + 36.0, "middle", "connections");
    for (number, (name, _)) in all[0].1.columns.iter().enumerate() {
        let points: Vec<(f64, f64)> = all
            .iter()
            .filter_map(|(count, one)| {
                Some((x(*count), y(one.medians().find(|(column, _)| column == name)?.1)))
            })
            .collect();
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            body,
            r#"<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>"#,
            path.join(" "),
            colour(name)
        );
        for (x, y) in &points {
            let radius = 3 + number % 2;
            let _ =
                writeln!(body, r#"<circle cx="{x:.1}" cy="{y:.1}" r="{radius}" fill="{}"/>"#, colour(name));
        }
    }
    let comparisons: Vec<&Comparison> = all.iter().map(|(_, one)| *one).collect();
    page(title, &comparisons, TOP + height + 48.0, &body)
}

/// A page with a title, and what the colours mean.
fn page(title: &str, all: &[&Comparison], height: f64, body: &str) -> String {
    let mut legend = String::new();
    let mut x = 10.0;
    for (name, _) in &all[0].columns {
        if !all.iter().any(|one| one.medians().any(|(column, _)| column == *name)) {
            continue;
        }
        let _ = writeln!(legend, r#"<rect x="{x}" y="36" width="12" height="12" fill="{}"/>"#, colour(name));
        legend += &text(x + 17.0, 46.0, "start", name);
        x += 40.0 + 7.0 * name.len() as f64;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\">{}</text>\n{legend}{body}</svg>\n",
        escaped(title)
    )
}

fn text(x: f64, y: f64, anchor: &str, content: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>\n", escaped(content))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison(suite: &'static str, case: &str, unit: &'static str) -> Comparison {
        let columns = vec![(DIRECT, vec![]), ("heirloom", vec![2.0]), ("nginx", vec![4.0, 3.0, 5.0])];
        Comparison::new(suite, case, unit, columns)
    }

    #[test]
    fn what_was_measured_is_plotted_and_nothing_else() {
        let directory = tempfile::tempdir().expect("a directory");
        let all = [comparison("relay", "1 stream", "GB/s"), comparison("gap", "10 connections", "µs")];
        write(&all, directory.path()).expect("plots");
        let mut files: Vec<_> = std::fs::read_dir(directory.path())
            .expect("files")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("a name"))
            .collect();
        files.sort();
        assert_eq!(files, ["gap.md", "gap.svg", "relay.md", "streams.svg"]);
        let table = std::fs::read_to_string(directory.path().join("relay.md")).expect("read");
        assert_eq!(
            table,
            "| | direct | heirloom | nginx |\n|---|---|---|---|\n| 1 stream, GB/s |  | 2 | 4 |\n"
        );
        let streams = std::fs::read_to_string(directory.path().join("streams.svg")).expect("read");
        assert!(streams.contains("4 GB/s") && !streams.contains(DIRECT), "{streams}");
    }

    #[test]
    fn the_longest_bar_has_the_whole_width() {
        let svg = bars("a < b", &[&comparison("relay", "1 stream", "GB/s")]);
        let whole = WIDTH - LEFT - RIGHT;
        assert!(svg.contains(&format!("width=\"{whole:.1}\"")), "{svg}");
        assert!(svg.contains(&format!("width=\"{:.1}\"", whole / 2.0)), "{svg}");
        assert!(svg.contains("a &lt; b"), "{svg}");
    }
}
