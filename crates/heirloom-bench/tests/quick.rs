//! The harness works and writes what it says: not how fast anything is.

use std::path::Path;
use std::process::Command;

#[test]
fn a_quick_run_gives_every_figure_beside_its_floor() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let output = Command::new(env!("CARGO_BIN_EXE_heirloom-bench"))
        .args(["transfer", "pause", "store", "--quick", "--json"])
        .arg(file.path())
        .output()
        .expect("run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("floor p50") && table.contains("100 connections, idle"), "{table}");
    let figures: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(file.path()).expect("read")).expect("JSON");
    let has = |suite: &str, case: &str, n: u64, unit: &str| {
        let found = figures.iter().find(|figure| figure["suite"] == suite && figure["case"] == case);
        let figure = found.unwrap_or_else(|| panic!("{suite} has no {case}: {table}"));
        assert_eq!((&figure["n"], &figure["unit"]), (&n.into(), &unit.into()), "{figure}");
    };
    for percentile in ["p50", "p90", "p99", "max"] {
        for case in ["1 connection, idle", "1 connection, 100 B each", "100 connections, idle"] {
            has("transfer", &format!("{case}, {percentile}"), 8, "ns");
            has("pause", &format!("{case}, {percentile}"), 8, "µs");
            has("pause", &format!("{case}: until taken, {percentile}"), 8, "µs");
        }
        for way in ["one a message", "one a connection"] {
            has("transfer", &format!("100 connections, {way}, {percentile}"), 3, "ns");
        }
        has("pause", &format!("100 connections, gap, {percentile}"), 198, "µs");
        has("pause", &format!("100 connections, gap without a takeover, {percentile}"), 198, "µs");
    }
    // So few take so little memory that none need be added.
    let takes_time =
        |figure: &serde_json::Value| !figure["case"].as_str().is_some_and(|case| case.contains("memory"));
    for figure in figures.into_iter().filter(takes_time) {
        let number = |key: &str| figure[key].as_f64().unwrap_or(0.0);
        assert!(number("value") > 0.0 && number("floor") > 0.0, "{figure}");
        assert!((number("ratio") - number("value") / number("floor")).abs() < 1e-6, "{figure}");
    }
}

/// With whatever proxies are here: on a machine that has none, the program says what is missing.
#[test]
fn a_quick_run_compares_the_proxies_that_are_here() {
    let bench = Path::new(env!("CARGO_BIN_EXE_heirloom-bench"));
    let (file, plots) =
        (tempfile::NamedTempFile::new().expect("a file"), tempfile::tempdir().expect("a directory"));
    let output = Command::new(bench)
        .args(["relay", "reload", "gap", "--quick", "--plot"])
        .arg(plots.path())
        .arg("--json")
        .arg(file.path())
        .output()
        .expect("run");
    let (table, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !bench.with_file_name("heirloom").exists() {
        assert!(!output.status.success() && errors.contains("cargo build -p heirloom-cli"), "{errors}");
        return;
    }
    assert!(output.status.success(), "{errors}");
    let figures: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(file.path()).expect("read")).expect("JSON");
    let value = |suite: &str, case: &str| {
        let found = figures.iter().find(|figure| figure["suite"] == suite && figure["case"] == case);
        let figure = found.unwrap_or_else(|| panic!("{suite} has no {case}: {table}"));
        figure["value"].as_f64().expect("a number")
    };
    let here = [
        ("heirloom", true),
        ("haproxy", !errors.contains("haproxy IS LEFT OUT")),
        ("nginx", !errors.contains("nginx IS LEFT OUT")),
    ];
    for (proxy, _) in here.into_iter().filter(|(_, is_here)| *is_here) {
        for setting in ["pinned, 1 thread", "free, 2 threads"] {
            for case in ["1 stream", "256 streams", "short connections", "messages on 64 connections: p99"] {
                assert!(value("relay", &format!("{case}, {setting}, {proxy}, p50")) > 0.0, "{table}");
            }
            assert!(
                value("relay", &format!("16 streams: CPU per GB, {setting}, {proxy}, p50")) > 0.0,
                "{table}"
            );
        }
        for lost in ["dropped", "bytes wrong", "new ones refused"] {
            assert_eq!(
                value("reload", &format!("60, 6 echo, 2+2: {lost}, {proxy}, p50")),
                0.0,
                "{proxy}: {table}"
            );
        }
        assert!(value("reload", &format!("60, 6 echo, 2+2: bytes right, {proxy}, p50")) > 0.0, "{table}");
        assert!(value("gap", &format!("100 connections: with a handover, {proxy}, p50")) > 0.0, "{table}");
    }
    assert_eq!(value("reload", "60, 6 echo, 2+2: processes left behind, heirloom, p50"), 0.0, "{table}");
    for plot in ["streams", "processor", "requests", "latency-1", "latency-64", "memory", "reload", "gap"] {
        let svg = std::fs::read_to_string(plots.path().join(format!("{plot}.svg"))).expect(plot);
        assert!(svg.starts_with("<svg") && svg.contains("heirloom"), "{svg}");
    }
}

#[test]
fn the_help_says_how_the_floor_is_made() {
    let output = Command::new(env!("CARGO_BIN_EXE_heirloom-bench")).arg("--help").output().expect("run");
    let help = String::from_utf8_lossy(&output.stdout);
    assert!(help.contains("SEQPACKET") && help.contains("transfer"), "{help}");
}
