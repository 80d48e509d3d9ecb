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
    assert!(String::from_utf8_lossy(&output.stdout).contains("pause, median"));
    let figures: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(file.path()).expect("read")).expect("JSON");
    for (suite, count, n, unit) in
        [("takeover", 4, 20, "µs"), ("pause", 4, 5, "µs"), ("transfer", 4, 5, "ns")]
    {
        let of_suite = figures.iter().filter(|figure| figure["suite"] == suite);
        assert_eq!(of_suite.clone().count(), count, "{suite}");
        for figure in of_suite {
            assert!(figure["case"].is_string(), "{figure}");
            assert_eq!((&figure["n"], &figure["unit"]), (&n.into(), &unit.into()), "{figure}");
        }
    }
    assert_eq!(figures.len(), 12);
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
