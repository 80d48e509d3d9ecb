//! The proxy under `heirloom run`: an upgrade of what that runs hands over.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;

use support::echo::Echo;
use support::upgrading::upgrade;
use support::*;

#[test]
fn an_upgrade_of_what_is_run_keeps_the_connections() {
    let scratch = Scratch::new();
    let (above, control) = (scratch.path("run.sock"), scratch.path("proxy.sock"));
    let echo = Echo::tcp("echo");
    let mut command = heirloom();
    command.arg("run").arg("--control").arg(&above).arg("--").arg(env!("CARGO_BIN_EXE_heirloom"));
    command.args(["proxy", "--listen", "127.0.0.1:0", "--to", echo.address(), "--control"]).arg(&control);
    let mut run = Process::start(&mut command);
    wait_for("the proxy", || try_status(&control).is_some());
    let report = status(&control).application.expect("a proxy's");
    let address = report["listeners"][0]["address"].as_str().expect("an address").to_owned();
    let mut client = TcpStream::connect(address).expect("it listens");
    client.set_read_timeout(Some(LONG)).expect("a socket");
    let hears = |client: &mut TcpStream, text: &str| {
        let mut heard = vec![0; text.len()];
        client.read_exact(&mut heard).expect("it lives");
        assert_eq!(String::from_utf8_lossy(&heard), text);
    };
    hears(&mut client, "echo\n");
    for generation in 1..4 {
        let before = status(&control);
        upgrade::<&str>(&above, &[]).done();
        let now = status(&control);
        assert!(now.pid != before.pid && now.generation == generation, "{before:?}, {now:?}");
        let supervised = status(&above).supervised.expect("it runs something");
        assert_eq!(supervised.pid, Some(now.pid));
        client.write_all(b"hello").expect("it lives");
        hears(&mut client, "hello");
    }
    let mut quit = heirloom();
    quit.arg("quit").arg("--control").arg(&above);
    Process::start(&mut quit).wait_for_code(0);
    run.wait_for_code(0);
    assert!(matches!(client.read(&mut [0; 1]), Ok(0) | Err(_)));
}
