//! Three hundred connections through a proxy that is replaced in all ways, in random order, by all kinds of programs and with
//! all kinds of configurations: none is dropped, no byte is wrong, and nothing is left behind.
//!
//! `HEIRLOOM_SEED` repeats a run.

mod support;

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;

use support::builds::other_profile;
use support::echo::{Busy, Caller, Echo, Manner, Pattern, Visitors, wait_for_each};
use support::proxy::{Handover, Proxy, THREADS};
use support::random::Random;
use support::upgrading::this_program;
use support::*;

/// How many connections there are, how many of them are busy, and how many of these do not wait for an answer.
const CONNECTIONS: usize = 300;
const BUSY: usize = 30;
const AT_ONCE: usize = 10;
/// One connection in so many comes from a UNIX socket.
const LOCAL: usize = 5;

/// What is done to the proxy.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// It is replaced, or is to be, with the same configuration.
    Hand(Handover),
    /// A program of the other profile takes over, or this one again.
    OtherProgram { by_hand: bool, in_place: bool },
    /// One listener more, or less.
    ToggleListener,
    /// One backend less, or more.
    ToggleBackend,
    /// A configuration with an address that somebody else has.
    Unbindable,
    /// A configuration that is none.
    Unreadable,
}

const STEPS: [Step; 21] = [
    Step::Hand(Handover::Reload),
    Step::Hand(Handover::Upgrade),
    Step::Hand(Handover::Upgrade),
    Step::Hand(Handover::InPlace),
    Step::Hand(Handover::InPlace),
    Step::Hand(Handover::Takeover),
    Step::Hand(Handover::Takeover),
    Step::Hand(Handover::Refused),
    Step::OtherProgram { by_hand: true, in_place: false },
    Step::OtherProgram { by_hand: false, in_place: false },
    Step::OtherProgram { by_hand: false, in_place: true },
    Step::OtherProgram { by_hand: false, in_place: false },
    Step::ToggleListener,
    Step::ToggleListener,
    Step::ToggleListener,
    Step::ToggleListener,
    Step::ToggleBackend,
    Step::ToggleBackend,
    Step::ToggleBackend,
    Step::Unbindable,
    Step::Unreadable,
];

#[test]
fn nothing_is_dropped_and_nothing_is_left_behind() {
    let mut random = Random::seeded();
    let other = other_profile();
    let mut scene = Scene::new(&mut random);
    let without_connections = scene.proxy.descriptors();
    let mut callers: Vec<Caller> = (0..CONNECTIONS).map(|number| scene.call(number)).collect();
    // A socket for each side of a connection, and nothing else.
    let with_idle_ones = without_connections + 2 * CONNECTIONS;
    scene.waits_for_descriptors(with_idle_ones);
    let busy = callers.split_off(CONNECTIONS - BUSY).into_iter().enumerate().map(|(number, caller)| {
        let manner = if number < AT_ONCE { Manner::AtOnce } else { Manner::InTurn };
        Busy::start(caller, manner, Random::from(random.next()))
    });
    let busy: Vec<Busy> = busy.collect();
    let visitors = Visitors::start(scene.proxy.address(), scene.pattern.clone());

    let mut steps = STEPS;
    random.shuffle(&mut steps);
    for step in steps {
        println!("{step:?}");
        scene.take(step, &other);
        wait_for_each(&busy);
        scene.looks_right();
    }

    let came = visitors.finish();
    callers.extend(busy.into_iter().map(Busy::stop));
    println!("{came} visitors came meanwhile");
    // As at the beginning, and nothing of what was there in between.
    scene.end_with_the_first_configuration();
    for in_place in [false, true] {
        if in_place {
            scene.proxy.hand_over(Handover::InPlace);
        } else {
            scene.proxy.take_over(this_program(), THREADS);
        }
        scene.waits_for_descriptors(with_idle_ones);
        for caller in &mut callers {
            caller.exchange(1000);
        }
    }
    scene.waits_for_descriptors(with_idle_ones);
    assert_eq!(scene.open(), CONNECTIONS as u64);
    for caller in callers {
        caller.hang_up(1000);
    }
    wait_for("all to have hung up", || scene.open() == 0);
    scene.waits_for_descriptors(without_connections);
    scene.proxy.finish();
    // Each connection that a backend has had is in the access log, once.
    let accepted: u64 = scene.backends.iter().map(Echo::accepted).sum();
    let log = std::fs::read_to_string(&scene.places.access_log).expect("the access log");
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    assert_eq!(lines.filter(|line| !line["backend"].is_null()).count() as u64, accepted);
}

/// The files that the configuration names.
struct Places {
    /// A listener's UNIX socket.
    local: PathBuf,
    access_log: PathBuf,
}

/// The proxy, its backends, and what it is configured to do.
struct Scene {
    proxy: Proxy,
    /// The second one comes and goes.
    backends: [Echo; 3],
    has_second_backend: bool,
    has_extra_listener: bool,
    /// Where the extra listener listens or has listened.
    extra: Option<String>,
    /// Those who came by the extra listener.
    guests: Vec<Caller>,
    places: Places,
    pattern: Arc<Pattern>,
    _scratch: Scratch,
}

impl Scene {
    fn new(random: &mut Random) -> Scene {
        let scratch = Scratch::new();
        let places = Places { local: scratch.path("local.sock"), access_log: scratch.path("access.log") };
        let backends = [Echo::tcp("one"), Echo::tcp("two"), Echo::unix("three", &scratch.path("three.sock"))];
        let proxy = Proxy::start(&configuration(&backends, true, false, &places));
        Scene {
            proxy,
            backends,
            has_second_backend: true,
            has_extra_listener: false,
            extra: None,
            guests: Vec::new(),
            places,
            pattern: Pattern::new(random),
            _scratch: scratch,
        }
    }

    /// A new connection.
    fn call(&self, number: usize) -> Caller {
        let address = if number.is_multiple_of(LOCAL) {
            format!("unix:{}", self.places.local.display())
        } else {
            self.proxy.address()
        };
        let mut caller = Caller::connect(&address, &self.pattern).expect("everybody is let in");
        caller.exchange(10);
        caller
    }

    fn take(&mut self, step: Step, other: &std::path::Path) {
        match step {
            Step::Hand(how) => self.proxy.hand_over(how),
            Step::OtherProgram { by_hand, in_place } => {
                let is_other = proc::program(self.proxy.status().pid) == other;
                let next = if is_other { this_program() } else { other };
                if by_hand {
                    self.proxy.take_over(next, 1);
                } else {
                    self.proxy.upgrade_to(next, in_place);
                }
            }
            Step::ToggleListener => {
                self.has_extra_listener = !self.has_extra_listener;
                self.reconfigure();
                if self.has_extra_listener {
                    let address = self.proxy.address_of("extra");
                    self.guests.push(Caller::connect(&address, &self.pattern).expect("it is let in"));
                    self.extra = Some(address);
                }
            }
            Step::ToggleBackend => {
                self.has_second_backend = !self.has_second_backend;
                self.reconfigure();
            }
            Step::Unbindable => {
                let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
                let address = taken.local_addr().expect("bound").to_string();
                let listener =
                    format!("[[listener]]\nname = \"taken\"\nlisten = \"{address}\"\npool = \"all\"\n");
                let broken = self.proxy.configuration() + &listener;
                self.proxy.refuses(&broken, &[&address, "in use"]);
            }
            Step::Unreadable => {
                let broken = self.proxy.configuration() + "lisen = 1\n";
                self.proxy.refuses(&broken, &["unknown key `lisen`"]);
            }
        }
    }

    fn reconfigure(&mut self) {
        self.proxy.configure(&configuration(
            &self.backends,
            self.has_second_backend,
            self.has_extra_listener,
            &self.places,
        ));
        self.proxy.hand_over(Handover::Reload);
    }

    /// Whoever comes now is treated as the configuration says, and whoever came before as it said then.
    fn looks_right(&mut self) {
        // As many as there are backends get to each of them, but that others may come in between.
        for number in 0..2 * LOCAL {
            let caller = self.call(number);
            assert!(self.has_second_backend || caller.server != "two", "it is not configured any more");
            caller.hang_up(10);
        }
        if self.has_second_backend {
            wait_for("a caller that gets to the second backend", || {
                let caller = self.call(1);
                let gets_there = caller.server == "two";
                caller.hang_up(0);
                gets_there
            });
        }
        if let Some(extra) = &self.extra {
            assert_eq!(TcpStream::connect(extra).is_ok(), self.has_extra_listener, "at {extra}");
        }
        for guest in &mut self.guests {
            guest.exchange(100);
        }
    }

    fn end_with_the_first_configuration(&mut self) {
        (self.has_second_backend, self.has_extra_listener) = (true, false);
        self.reconfigure();
        self.looks_right();
        self.guests.drain(..).for_each(|guest| guest.hang_up(100));
    }

    /// How many connections the backends have.
    fn open(&self) -> u64 {
        self.backends.iter().map(Echo::open).sum()
    }

    #[track_caller]
    fn waits_for_descriptors(&self, count: usize) {
        let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_for("as many descriptors as before", || self.proxy.descriptors() == count);
        }));
        let footprint = proc::Footprint::of(self.proxy.status().pid);
        assert!(waited.is_ok(), "instead of {count}, {:#?}", footprint.kinds());
    }
}

fn configuration(backends: &[Echo; 3], second: bool, extra: bool, places: &Places) -> String {
    let backends = backends.iter().enumerate().filter(|(number, _)| second || *number != 1);
    let backends: Vec<String> = backends.map(|(_, echo)| format!("\"{}\"", echo.address())).collect();
    let listener = |name: &str, address: &str| {
        format!("[[listener]]\nname = \"{name}\"\nlisten = \"{address}\"\npool = \"all\"\n")
    };
    let log = places.access_log.display();
    let mut text = format!("[access_log]\npath = \"{log}\"\nformat = \"json\"\n");
    text += &listener("main", "127.0.0.1:0");
    text += &listener("local", &format!("unix:{}", places.local.display()));
    if extra {
        text += &listener("extra", "127.0.0.2:0");
    }
    text + &format!("[pool.all]\nbackends = [{}]\n", backends.join(", "))
}
