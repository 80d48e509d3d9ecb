//! The harness works and writes what it says: not how fast anything is.

use std::process::Command;

#[test]
fn a_quick_run_gives_every_figure_beside_its_floor() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let output = Command::new(env!("CARGO_BIN_EXE_heirloom-bench"))
        .args(["takeover", "--quick", "--json"])
        .arg(file.path())
        .output()
        .expect("run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("pause, median"));
    let figures: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(file.path()).expect("read")).expect("JSON");
    assert_eq!(figures.len(), 4);
    for figure in figures {
        assert_eq!(figure["suite"], "takeover");
        assert_eq!(figure["n"], 20);
        let number = |key: &str| figure[key].as_f64().unwrap_or(0.0);
        assert!(number("value") > 0.0 && number("floor") > 0.0, "{figure}");
        assert!((number("ratio") - number("value") / number("floor")).abs() < 1e-6, "{figure}");
    }
}
