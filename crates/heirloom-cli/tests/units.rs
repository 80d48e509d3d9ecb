//! Takeovers from inside and from outside of the unit in which a supervisor runs the incumbent.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use support::generations::{accept, listen, nobody_else_came};
use support::guests::{Guest, address_of, listening};
use support::told::Supervisor;
use support::units::Unit;
use support::*;

/// A chat in a unit, with a supervisor, and the server that it is connected to.
struct Service {
    chat: Process,
    supervisor: Supervisor,
    listener: TcpListener,
    address: String,
    server: TcpStream,
    control: PathBuf,
    notify: PathBuf,
    unit: Unit,
    _scratch: Scratch,
}

impl Service {
    fn start() -> Option<Service> {
        let unit = Unit::make()?;
        let scratch = Scratch::new();
        let (control, notify) = (scratch.path("chat.sock"), scratch.path("notify"));
        let supervisor = Supervisor::at(&notify);
        let (listener, address) = listen();
        let chat = Process::start(&mut unit.command(&supervised(chat(&address, &control, &[]), &notify)));
        let server = accept(&listener);
        supervisor.wait_for("STATUS=connected\n", 1);
        Some(Service {
            chat,
            supervisor,
            listener,
            address,
            server,
            control,
            notify,
            unit,
            _scratch: scratch,
        })
    }

    /// The same command, as anybody would start it in a terminal.
    fn outsider(&self, options: &[&str]) -> Process {
        Process::start(&mut chat(&self.address, &self.control, options))
    }

    /// As the supervisor would.
    fn restarted(&self) -> Command {
        supervised(chat(&self.address, &self.control, &[]), &self.notify)
    }

    /// Whether what the server sends comes out of this process.
    fn reaches(&mut self, chat: &Process) {
        let before = chat.stdout_len();
        self.server.write_all(b"line\n").expect("it is connected");
        wait_for("the line", || chat.stdout_len() == before + 5);
    }
}

fn supervised(mut command: Command, notify: &Path) -> Command {
    command.env("NOTIFY_SOCKET", notify);
    command
}

#[test]
fn an_outsider_is_refused_and_told_what_to_do_instead() {
    let Some(mut service) = Service::start() else { return };
    let mut outsider = service.outsider(&["--replace", "must"]);
    outsider.wait_for_code(4);
    let said = outsider.stderr();
    let reload = format!("`systemctl reload {}`", service.unit.name);
    for part in
        [&service.unit.name, "rival", &reload, "`heirloom upgrade`", "--force", &outsider.id().to_string()]
    {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    let now = status(&service.control);
    let last = now.last_takeover.expect("it was asked for");
    assert_eq!((now.pid, now.generation, last.outcome.as_str()), (service.chat.id(), 0, "refused"));
    assert!(last.reason.expect("why").contains("belongs to"));
    let before = service.chat.stdout_len();
    service.server.write_all(b"line\n").expect("it is connected");
    wait_for("the line", || service.chat.stdout_len() == before + 5);

    // A program of protocol 0 would do the same harm, and cannot be told more.
    let mut old = UnixStream::connect(&service.control).expect("it serves");
    old.write_all(b"\"RequestFds\"\n").expect("it reads");
    let mut answer = String::new();
    BufReader::new(&old).read_line(&mut answer).expect("an answer");
    assert!(answer.contains("belongs to"), "{answer}");
    assert_eq!(status(&service.control).pid, service.chat.id());
    nobody_else_came(service.listener);
}

#[test]
fn who_belongs_to_the_unit_is_admitted_also_from_a_control_group_below() {
    let Some(mut service) = Service::start() else { return };
    // Started by the incumbent.
    let mut upgrade = heirloom();
    upgrade.args(["upgrade", "--control"]).arg(&service.control);
    Process::start(&mut upgrade).wait_for_code(0);
    wait_for_generation(&service.control, 1);
    let upgraded = status(&service.control).pid;
    assert!(service.unit.processes().contains(&upgraded));
    service.supervisor.wait_for(&format!("MAINPID={upgraded}\n"), 1);
    service.chat.wait_for_exit();

    let below = Process::start(&mut service.unit.command_below("workers", &service.restarted()));
    wait_for_generation(&service.control, 2);
    assert_eq!(status(&service.control).pid, below.id());
    service.reaches(&below);
    // Its unit is the same, so that one may take over that is not below.
    let mut beside = Process::start(&mut service.unit.command(&service.restarted()));
    wait_for_generation(&service.control, 3);
    service.reaches(&beside);
    beside.signal(Signal::TERM);
    beside.wait_for_code(0);
    nobody_else_came(service.listener);
}

/// The supervisor is told nothing of it, and what it starts takes over back, on the same connection.
#[test]
fn an_outsider_takes_over_by_force_and_the_supervisors_next_one_takes_over_back() {
    let Some(mut service) = Service::start() else { return };
    let mut outsider = service.outsider(&["--force"]);
    service.chat.wait_for_code(0);
    wait_for_generation(&service.control, 1);
    service.reaches(&outsider);
    let told = service.supervisor.all();
    assert!(!told.contains("MAINPID="), "{told}");
    // Nothing is left with a supervisor whose service it is not any more.
    service.supervisor.wait_for_part("FDSTOREREMOVE=1\nFDNAME=hl\n");
    let (put, removed) =
        (told.matches("FDSTORE=1").count(), service.supervisor.all().matches("FDSTOREREMOVE=1").count());
    assert!(put > 5 && put == removed, "{put} put, {removed} removed: {told}");

    let mut next = Process::start(&mut service.unit.command(&service.restarted()));
    outsider.wait_for_code(0);
    wait_for_generation(&service.control, 2);
    service.reaches(&next);
    service.supervisor.wait_for(&format!("READY=1\nMAINPID={}\n", next.id()), 1);
    wait_for("everything to be kept again", || {
        service.supervisor.all().matches("FDSTORE=1").count() == 2 * put
    });
    next.signal(Signal::TERM);
    next.wait_for_code(0);
    nobody_else_came(service.listener);
}

#[test]
fn a_chat_server_does_the_same() {
    let Some(unit) = Unit::make() else { return };
    let scratch = Scratch::new();
    let (control, notify) = (scratch.path("chat.sock"), scratch.path("notify"));
    let supervisor = Supervisor::at(&notify);
    let command = || listening("127.0.0.1:0", &control, &[]);
    let mut server = Process::start(&mut unit.command(&supervised(command(), &notify)));
    let mut guests = [0; 2].map(|_| Guest::join(address_of(&server)));
    guests[0].hears(&[&format!("<announce> 127.0.0.1 is connected as <{}>.", guests[1].name)]);
    let mut outsider = Process::start(&mut command());
    outsider.wait_for_code(4);
    assert!(outsider.stderr().contains(&unit.name), "{}", outsider.stderr());
    guests[0].say("half ");

    let mut command = command();
    let mut outsider = Process::start(command.arg("--force"));
    server.wait_for_code(0);
    guests[0].say("a line, ");
    supervisor.wait_for_part("FDSTOREREMOVE=1\nFDNAME=hl\n");
    let told = supervisor.all();
    assert_eq!(told.matches("FDSTORE=1").count(), told.matches("FDSTOREREMOVE=1").count(), "{told}");
    assert!(!told.contains(&format!("MAINPID={}\n", outsider.id())), "{told}");

    let mut command = listening("127.0.0.1:0", &control, &[]);
    command.arg("--replace").arg("must");
    let mut next = Process::start(&mut unit.command(&supervised(command, &notify)));
    outsider.wait_for_code(0);
    guests[0].say("and the rest\n");
    guests[1].hears(&[&format!("<{}> half a line, and the rest", guests[0].name)]);
    supervisor.wait_for(&format!("READY=1\nMAINPID={}\n", next.id()), 1);
    next.signal(Signal::TERM);
    next.wait_for_code(0);
}

/// Where nobody would start a rival, nobody is refused.
#[test]
fn without_a_supervisor_anybody_takes_over() {
    let Some(unit) = Unit::make() else { return };
    let scratch = Scratch::new();
    let control = scratch.path("chat.sock");
    let (listener, address) = listen();
    for empty in [false, true] {
        let mut command = chat(&address, &control, &[]);
        if empty {
            command.env("NOTIFY_SOCKET", "");
        }
        let mut inside = Process::start(&mut unit.command(&command));
        wait_until_connected(&control);
        let generation = status(&control).generation;
        let mut outside = Process::start(&mut chat(&address, &control, &[]));
        inside.wait_for_code(0);
        wait_for_generation(&control, generation + 1);
        outside.signal(Signal::TERM);
        outside.wait_for_code(0);
        let mut connection = accept(&listener);
        assert_eq!(connection.read(&mut [0]).expect("an orderly end"), 0);
    }
    nobody_else_came(listener);
}
