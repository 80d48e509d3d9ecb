//! `heirloom run` as a command of the program, and the other commands at its control socket.

mod support;

use std::process::Command;

use support::{Process, Scratch, heirloom, wait_for};

fn run(scratch: &Scratch, options: &[&str], script: &str) -> Command {
    let mut command = heirloom();
    command.arg("run").arg("--control").arg(scratch.path("run.sock")).args(options);
    command.args(["--", "sh", "-c", script]);
    command
}

/// Another command at the control socket: its code, and what it says.
fn ask(scratch: &Scratch, words: &[&str]) -> (i32, String) {
    let mut command = heirloom();
    let (asked, options) = words.split_first().expect("a command");
    let output = command
        .arg(asked)
        .arg("--control")
        .arg(scratch.path("run.sock"))
        .args(options)
        .output()
        .expect("it runs");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().expect("a code"), String::from_utf8(said).expect("text"))
}

#[test]
fn the_exit_code_is_the_commands_and_wrong_usage_is_two() {
    let scratch = Scratch::new();
    for (options, script, code) in [
        (&["--restart", "never"][..], "exit 42", 42),
        (&["--restart", "never"], "kill -KILL $$", 137),
        (&["--tries", "2"], "exit 3", 3),
        (&[], "exit 0", 0),
        (&["--listen", "nowhere"], "exit 0", 2),
    ] {
        Process::start(&mut run(&scratch, options, script)).wait_for_code(code);
    }
    Process::start(heirloom().arg("run")).wait_for_code(2);
    let mut nothing = heirloom();
    nothing.arg("run").arg("--control").arg(scratch.path("run.sock")).args(["--", "no-such-program"]);
    Process::start(&mut nothing).wait_for_code(127);
}

#[test]
fn the_name_of_the_command_is_that_of_the_control_socket() {
    let scratch = Scratch::new();
    let runtime = scratch.path("runtime");
    std::fs::create_dir(&runtime).expect("a directory");
    let mut command = heirloom();
    command.args(["run", "--", "sh", "-c", "exec sleep 1000"]).env("XDG_RUNTIME_DIR", &runtime);
    let mut process = Process::start(&mut command);
    let ask = |what: &str| {
        let asked = heirloom().args([what, "--name", "run-sh"]).env("XDG_RUNTIME_DIR", &runtime).output();
        asked.expect("it runs").status.success()
    };
    wait_for("it answers", || ask("ping"));
    assert!(ask("quit"));
    process.wait_for_code(143);
}

#[test]
fn the_other_commands_show_it_upgrade_it_and_end_it() {
    let scratch = Scratch::new();
    let script = "exec sleep 1000";
    let mut process = Process::start(&mut run(&scratch, &["--listen", "web=127.0.0.1:0"], script));
    wait_for("it answers", || ask(&scratch, &["ping"]).0 == 0);
    let (_, shown) = ask(&scratch, &["status"]);
    for part in [
        "sh -c exec sleep 1000",
        "running, pid ",
        "web (tcp-listener",
        "stored         0",
        "restarts       0",
    ] {
        assert!(shown.contains(part), "{part:?} is not in\n{shown}");
    }
    let (_, inspected) = ask(&scratch, &["inspect"]);
    assert!(inspected.contains("web"), "{inspected}");

    let (code, said) = ask(&scratch, &["upgrade", "--", "-c", "exec sleep 2000"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("(sh -c exec sleep 2000)"), "{said}");
    let (code, said) = ask(&scratch, &["upgrade", "--program", "/bin/false"]);
    assert_eq!(code, 5, "{said}");
    assert!(said.contains("the previous command serves"), "{said}");
    let (code, said) = ask(&scratch, &["upgrade", "--self", "--dry-run"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("could be upgraded in place"), "{said}");
    let (code, said) = ask(&scratch, &["upgrade", "--self"]);
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("upgraded in place: generation 0") && said.contains("became generation 1"),
        "{said}"
    );
    let (_, shown) = ask(&scratch, &["status"]);
    assert!(shown.contains("sh -c exec sleep 2000") && shown.contains("generation     1"), "{shown}");
    assert_eq!(ask(&scratch, &["quit"]).0, 0);
    process.wait_for_code(143);
}
