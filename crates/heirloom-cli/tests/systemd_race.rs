//! A takeover under a real systemd in which somebody is killed at each step, while systemd restarts the unit: one process
//! serves again each time, nobody is disconnected, and not a byte is lost or repeated. It prints how long nobody served.
//!
//! It needs the feature `crash-points`: `cargo test -p heirloom-cli --features crash-points --test systemd_race`.

mod stream;
mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use heirloom::crash::Point;
use stream::Stream;
use support::guests::*;
use support::systemd::Systemd;
use support::talk::{Talk, assert_everything_was_heard};
use support::*;

const SERVER: &str = "heirloom-chat-server.service";
const CLIENT: &str = "heirloom-chat.service";

/// How many talk all the time.
const TALKERS: usize = 12;
/// What a chat server has in the store beside its clients.
const OWN: usize = 3;

/// Those that `systemctl reload` comes by, the preflight's included.
fn points() -> impl Iterator<Item = Point> {
    let on_the_way = |point: &Point| {
        !point.name().starts_with("in-place")
            && !matches!(point, Point::AbortSent | Point::Drained | Point::Relocked)
    };
    Point::ALL.iter().copied().filter(on_the_way)
}

#[test]
fn a_chat_server() {
    let Some(systemd) = Systemd::boot() else { return };
    systemd.install(&[SERVER]);
    let race = Race::new(&systemd, SERVER, "/run/heirloom-chat-server");
    let guests: Vec<Guest> = (0..TALKERS).map(|_| Guest::join(systemd.address)).collect();
    let names: Vec<String> = guests.iter().map(|guest| guest.name.clone()).collect();
    let talk = Talk::start(guests, &names);
    for point in points() {
        race.run(point);
        talk.wait_for_progress();
        assert_eq!(systemd.stored(SERVER), TALKERS + OWN, "{}", point.name());
    }
    assert_everything_was_heard(&talk.finish());
}

#[test]
fn a_chat_client() {
    let Some(systemd) = Systemd::boot() else { return };
    let mut stream = Stream::start();
    systemd.install_for(stream.address().parse().expect("an address"), &[CLIENT]);
    let race = Race::new(&systemd, CLIENT, "/run/heirloom-chat");
    let file = systemd.path("/var/log/heirloom-chat.txt");
    let written = || std::fs::metadata(&file).map_or(0, |file| file.len() as usize);
    let stored = systemd.stored(CLIENT);
    for point in points() {
        race.run(point);
        let before = written();
        wait_for("more of the stream", || written() > before);
        assert_eq!(systemd.stored(CLIENT), stored, "{}", point.name());
    }
    stream.ends_exact_on(0, written, || std::fs::read(&file).expect("it is there"));
}

struct Race<'s> {
    systemd: &'s Systemd,
    unit: &'s str,
    directory: &'s str,
    control: PathBuf,
}

impl<'s> Race<'s> {
    /// Starts the unit.
    fn new(systemd: &'s Systemd, unit: &'s str, directory: &'s str) -> Race<'s> {
        systemd.ctl(&["start", unit]);
        let control = systemd.path(&format!("{directory}/control.sock"));
        systemd.wait_until_settled(unit, &control);
        Race { systemd, unit, directory, control }
    }

    /// Reloads the unit, and has the process be killed that comes by this point.
    fn run(&self, point: Point) {
        let report = format!("{}/{}", self.directory, point.name());
        let variables = [
            format!("HEIRLOOM_CRASH_POINT={}:kill", point.name()),
            format!("HEIRLOOM_CRASH_REPORT={report}"),
        ];
        self.systemd.ctl(&["set-environment", &variables[0], &variables[1]]);
        // What is started anew has these variables, and the connections.
        self.systemd.ctl(&["restart", self.unit]);
        self.systemd.wait_until_settled(self.unit, &self.control);
        let report = self.systemd.path(&report);
        assert!(!Path::exists(&report), "{} was reached before", point.name());
        let mut reload = Process::start(&mut self.systemd.command(&["systemctl", "reload", self.unit]));
        wait_for(point.name(), || report.exists());
        let killed = Instant::now();
        // Not the restart alone: whoever serves has read what was said meanwhile.
        wait_for("somebody who serves", || try_status(&self.control).is_some());
        let nobody = killed.elapsed();
        let reloaded = reload.wait().success();
        self.systemd.wait_until_settled(self.unit, &self.control);
        let generation = status(&self.control).generation;
        print(point, reloaded, generation, nobody);
    }
}

fn print(point: Point, reloaded: bool, generation: u64, nobody: Duration) {
    let reload = if reloaded { "reloaded" } else { "reload failed" };
    println!("{:<27} {reload}, generation {generation}, nobody answered for {nobody:?}", point.name());
}
