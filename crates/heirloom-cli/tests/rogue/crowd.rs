//! An incumbent with so many descriptors that they do not go on their way all at once.

use std::fs::File;
use std::time::Instant;

use heirloom::runtime::blocking;
use heirloom::{Bundle, Config, Incumbent, NoRequests, Outcome, Replace, Service, Start, Turn};

use super::{Rogue, say};

/// More than the batches that may be unread hold.
pub(crate) const DESCRIPTORS: usize = 3000;

pub(super) fn run(rogue: &Rogue) {
    heirloom::descriptors::raise_limit().expect("setrlimit");
    let service = Service::new(format!("chat {}", rogue.server));
    let started = heirloom::start::<NoRequests>(&rogue.control, service, Config::default(), Replace::Never);
    let Start::Fresh(mut incumbent) = started.expect("nobody serves") else { panic!("somebody serves") };
    let mut bundle = Bundle::new();
    for number in 0..DESCRIPTORS {
        let null = File::open("/dev/null").expect("open");
        bundle.add_plain(format!("descriptor {number}"), null).expect("added");
    }
    say("serving");
    while !turns(&mut incumbent, &bundle) {
        blocking::wait(&incumbent, &mut Vec::new(), None).expect("poll");
    }
    say("TAKEN");
}

/// Takes turns until there is nothing to do; true when a successor serves.
fn turns(incumbent: &mut Incumbent<NoRequests>, bundle: &Bundle) -> bool {
    loop {
        match incumbent.turn(Instant::now()).expect("a turn") {
            Turn::Idle => return false,
            Turn::Offer(offer) => offer.begin_bundle(bundle).expect("an offer"),
            Turn::Batch(batch) => batch.send(|id| bundle.descriptor(id)),
            Turn::Freeze(freeze) => match freeze.release_bundle(bundle).expect("a delta") {
                Outcome::Taken(_) => return true,
                outcome => say(&format!("{outcome:?}")),
            },
            Turn::Request(_) | Turn::Quit(_) | Turn::Closed(_) | Turn::Delegated(_) => {}
        }
    }
}
