//! The harness works and writes what it says: not how fast anything is.

use std::process::Command;

#[test]
fn a_quick_run_gives_every_figure_beside_its_floor() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let output = Command::new(env!("CARGO_BIN_EXE_heirloom-bench"))
        .args(["--quick", "--json"])
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
    for figure in figures {
        let number = |key: &str| figure[key].as_f64().unwrap_or(0.0);
        assert!(number("value") > 0.0 && number("floor") > 0.0, "{figure}");
        assert!((number("ratio") - number("value") / number("floor")).abs() < 1e-6, "{figure}");
    }
}

#[test]
fn the_help_says_how_the_floor_is_made() {
    let output = Command::new(env!("CARGO_BIN_EXE_heirloom-bench")).arg("--help").output().expect("run");
    let help = String::from_utf8_lossy(&output.stdout);
    assert!(help.contains("SEQPACKET") && help.contains("transfer"), "{help}");
}
