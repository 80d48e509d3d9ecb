//! The proxy's unit under a real systemd: a reload takes up the configuration as it is now and drops nobody, and one that is no good
//! changes nothing.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use support::echo::Echo;
use support::systemd::Systemd;
use support::*;

const UNIT: &str = "heirloom-proxy.service";
const ROUNDS: usize = 5;

struct Caller(TcpStream);

impl Caller {
    fn connect(to: SocketAddr) -> Caller {
        let stream = TcpStream::connect(to).expect("it listens");
        stream.set_read_timeout(Some(LONG)).expect("a socket");
        Caller(stream)
    }

    fn hears(&mut self, text: &str) {
        let mut heard = vec![0; text.len()];
        self.0.read_exact(&mut heard).expect("it lives");
        assert_eq!(String::from_utf8_lossy(&heard), text);
    }

    fn talks(&mut self) {
        self.0.write_all(b"hello").expect("it lives");
        self.hears("hello");
    }
}

fn configuration(listen: SocketAddr, to: &str) -> String {
    let log = "[access_log]\npath = \"/var/log/heirloom-proxy/access.log\"\n";
    format!("{log}[[listener]]\nname = \"main\"\nlisten = \"{listen}\"\nto = [\"{to}\"]\n")
}

#[test]
fn a_reload_drops_nobody() {
    let Some(systemd) = Systemd::boot() else { return };
    systemd.install_as_shipped(UNIT);
    let backends = [Echo::tcp("one"), Echo::tcp("two")];
    let at = SocketAddr::new(systemd.address.ip(), 8080);
    let file = systemd.path("/etc/heirloom/proxy.toml");
    let configure = |text: &str| {
        std::fs::create_dir_all(file.parent().expect("a directory")).expect("/etc is in memory");
        std::fs::write(&file, text).expect("/etc is in memory");
    };
    configure(&configuration(at, backends[0].address()));
    systemd.ctl(&["start", UNIT]);
    let control = systemd.path("/run/heirloom-proxy/control.sock");
    let mut callers = Vec::new();
    for round in 0..ROUNDS {
        let before = status(&control);
        let mut caller = Caller::connect(at);
        caller.hears(["one\n", "two\n"][round % 2]);
        callers.push(caller);
        configure(&configuration(at, backends[(round + 1) % 2].address()));
        systemd.ctl(&["reload", UNIT]);
        systemd.wait_until_settled(UNIT, &control);
        let now = status(&control);
        assert!(now.pid != before.pid && now.generation == before.generation + 1, "{before:?}, {now:?}");
        callers.iter_mut().for_each(Caller::talks);

        configure("lisen = 1\n");
        let refused = systemd.output(&["systemctl", "reload", UNIT]);
        assert!(!refused.status.success());
        systemd.wait_until_settled(UNIT, &control);
        assert_eq!(status(&control).pid, now.pid);
        callers.iter_mut().for_each(Caller::talks);
    }
    assert!(systemd.journal(UNIT).contains("unknown key `lisen`"), "{}", systemd.journal(UNIT));
    drop(callers.pop());
    let log = systemd.path("/var/log/heirloom-proxy/access.log");
    wait_for("a line of the access log", || {
        std::fs::read_to_string(&log).is_ok_and(|log| log.contains(" main ") && log.contains(" closed "))
    });
    systemd.ctl(&["stop", UNIT]);
    assert_eq!(systemd.processes(UNIT), [0; 0]);
    for caller in &mut callers {
        let ended = caller.0.read(&mut [0; 1]);
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    }
}
