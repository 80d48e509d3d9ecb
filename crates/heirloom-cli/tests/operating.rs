//! docs/operating.md from the top, word for word, by somebody who has just booted a systemd.

mod support;

use std::os::unix::fs::symlink;

use support::guests::*;
use support::systemd::{Systemd, repository};

const PAGE: &str = include_str!("../../../docs/operating.md");

/// The commands of the page, a block at a time, each as root in a checkout; but for building, and for the client.
fn blocks() -> Vec<&'static str> {
    let blocks = PAGE.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.collect()
}

#[test]
fn as_the_page_says() {
    let Some(systemd) = Systemd::boot_with_network() else { return };
    // A checkout in which the program has been built.
    let checkout = systemd.path("/root/checkout");
    std::fs::create_dir_all(checkout.join("target/release")).expect("mkdir");
    std::fs::create_dir(checkout.join("units")).expect("mkdir");
    symlink("/share/heirloom", checkout.join("target/release/heirloom")).expect("a link");
    std::fs::remove_file(systemd.path("/usr/local/bin/heirloom")).expect("it is to be installed");
    for unit in std::fs::read_dir(repository("units")).expect("units") {
        let unit = unit.expect("a unit").path();
        if unit.is_file() {
            std::fs::copy(&unit, checkout.join("units").join(unit.file_name().expect("a name")))
                .expect("a copy");
        }
    }
    let do_as_told = |block: &str| {
        let commands: Vec<&str> = block.lines().filter(|line| !line.starts_with("cargo build")).collect();
        assert!(!commands.is_empty());
        let commands = format!("set -e\ncd /root/checkout\n{}\n", commands.join("\n"));
        systemd.run(&["sh", "-c", &commands])
    };
    let [install, events @ .., look] = &blocks()[..] else { panic!("there are blocks") };
    do_as_told(install);
    let shipped = "127.0.0.1:31337".parse().expect("an address");
    assert!(PAGE.contains("```sh client\nheirloom chat 127.0.0.1:31337\n```"));
    let mut guests = [Guest::join(shipped), Guest::join(shipped)];
    guests[0].line();
    let name = guests[0].name.clone();
    let mut said = 0;
    let mut say_something = || {
        said += 1;
        guests[0].say(format!("{said}\n"));
        guests[1].hears(&[&format!("<{name}> {said}")]);
    };
    say_something();
    let control = systemd.path("/run/heirloom-chat-server/control.sock");
    for command in events.iter().flat_map(|block| block.lines()) {
        do_as_told(command);
        say_something();
        systemd.wait_until_settled("heirloom-chat-server.service", &control);
    }
    assert!(said > 3);
    let shown = do_as_told(look);
    // As the page explains it: two clients, and three.
    assert!(shown.lines().any(|line| line == "5"), "{shown}");
    for part in ["Status: \"clients: 2\"", "enabled", "chat server 127.0.0.1:31337"] {
        assert!(shown.contains(part), "{part:?} is not in {shown}");
    }
}
