//! `heirloom proxy --check`: what a configuration file means, and what is wrong with it and where.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use support::*;

fn written(scratch: &Scratch, text: &str) -> PathBuf {
    let path = scratch.path("web.toml");
    fs::write(&path, text).expect("write");
    path
}

/// What it prints to stdout and to stderr, when it ends with this code.
#[track_caller]
fn check(file: &Path, code: i32) -> (String, String) {
    let mut process = Process::start(heirloom().args(["proxy", "--check"]).arg(file));
    process.wait_for_code(code);
    (String::from_utf8(process.stdout()).expect("UTF-8"), process.stderr())
}

/// The configuration in docs/proxy.md, which is to be right.
fn documented() -> &'static str {
    let page = include_str!("../../../docs/proxy.md");
    let (_, example) = page.split_once("```toml\n").expect("an example");
    example.split_once("```").expect("its end").0
}

#[test]
fn it_says_what_a_file_means_with_what_is_there_by_default() {
    let scratch = Scratch::new();
    let file = written(&scratch, documented());
    let (said, complaints) = check(&file, 0);
    assert!(complaints.is_empty() || is_of_the_limit(&complaints), "{complaints}");
    let page = include_str!("../../../docs/proxy.md");
    assert!(page.contains(&said), "docs/proxy.md shows something else than:\n{said}");
}

/// Whether it is the one warning that there is on a machine with few descriptors.
fn is_of_the_limit(complaints: &str) -> bool {
    complaints.contains("toml: warning: started from here it would end: ")
        && complaints.contains(" descriptors, and the limit on open files is ")
        && complaints.lines().count() == 1
}

#[test]
fn what_there_are_too_few_descriptors_for_is_no_mistake() {
    let scratch = Scratch::new();
    let text = "max_connections = 1000\n[[listener]]\nlisten = ':80'\nto = ['127.0.0.1:81']\n";
    let file = written(&scratch, text);
    let mut command = std::process::Command::new("sh");
    command.args([
        "-c",
        "ulimit -n 1024; exec \"$@\"",
        "sh",
        env!("CARGO_BIN_EXE_heirloom"),
        "proxy",
        "--check",
    ]);
    let mut process = Process::start(command.arg(file));
    process.wait_for_code(0);
    assert!(is_of_the_limit(&process.stderr()), "{}", process.stderr());
    assert!(process.stderr().contains("1000 connections need 2"), "{}", process.stderr());
}

#[test]
fn all_that_differs_is_said() {
    let scratch = Scratch::new();
    let text = r#"
[access_log]
[[listener]]
listen = "unix:/run/front.sock"
pool = "app"
mode = "0660"
keepalive = false
[[listener]]
listen = "127.0.0.1:80"
max_connections = 1
to = ["unix:/run/app.sock"]
nodelay = false
[pool.app]
keepalive = false
backends = ["localhost:9001", "127.0.0.1:9002"]
[pool.spare]
backends = ["127.0.0.1:9001"]
"#;
    let file = written(&scratch, text);
    let (said, complaints) = check(&file, 0);
    assert_eq!(complaints, format!("{}: warning: no listener uses the pool \"spare\"\n", file.display()));
    for line in [
        "listener unix:/run/front.sock, to the pool app",
        "    backlog 4096, mode 0660",
        "listener 127.0.0.1:80, to the pool 127.0.0.1:80",
        "    at most 1 connection, keepalive 1m, delay, backlog 4096",
        "    connect timeout 5s, 1 retry, no keepalive, nodelay",
        "    connect timeout 5s, no retries",
        "threads: one for each processor",
        "access log: text to stdout",
    ] {
        assert!(said.lines().any(|said| said == line), "{line} is not in\n{said}");
    }
    assert!(said.contains("    backend localhost:9001, which is "), "{said}");

    let file = written(&scratch, "[[listener]]\nname = 'all'\nlisten = ':80'\nto = ['127.0.0.1:81']\n");
    let (said, _) = check(&file, 0);
    assert!(said.starts_with("listener all at :80, which is [::]:80, to the pool all\n"), "{said}");
}

#[test]
fn what_is_wrong_is_said_with_its_place_and_nothing_else() {
    let scratch = Scratch::new();
    for (text, expected) in [
        ("[[listener]]\nlisten = ':80'\n  tp = ['127.0.0.1:81']\n", "3:3: unknown key `tp`: is it `to`?"),
        (
            "[[listener]]\nlisten = ':80'\npool = 'app'\n",
            "3:8: there is no pool \"app\": write [pool.app] with `backends`",
        ),
        ("[[listener]\n", "1:12: "),
        ("", "1:1: there is no listener: "),
    ] {
        let file = written(&scratch, text);
        let (said, complaints) = check(&file, 1);
        assert_eq!(said, "");
        assert!(complaints.starts_with(&format!("{}:{expected}", file.display())), "{complaints}");
        assert_eq!(complaints.lines().count(), 1, "{complaints}");
    }
    let none = scratch.path("none.toml");
    let (_, complaints) = check(&none, 1);
    assert!(
        complaints.starts_with(&format!("cannot read the configuration {}: No such file", none.display())),
        "{complaints}"
    );
}

#[test]
fn a_proxy_does_not_start_with_what_is_wrong() {
    let scratch = Scratch::new();
    let control = scratch.path("proxy.sock");
    let file = written(&scratch, "threads = 'two'\n");
    let mut process =
        Process::start(heirloom().args(["proxy", "--config"]).arg(&file).arg("--control").arg(&control));
    process.wait_for_code(1);
    let expected = format!("{}:1:11: `threads` is to be a number, not a string", file.display());
    assert!(process.stderr().contains(&expected), "{}", process.stderr());

    let mut process = Process::start(
        heirloom().args(["proxy", "--listen", "80", "--to", "127.0.0.1:81", "--control"]).arg(&control),
    );
    process.wait_for_code(1);
    assert!(process.stderr().contains("\"80\" has no port: write HOST:PORT"), "{}", process.stderr());
    assert!(!control.exists(), "nothing is left where nobody serves");
}
