//! A successor that is made of the library's stages, as a program's is, and that is stopped between two of them.

use heirloom::{Config, NoRequests, Replace, Service, Start, TakeoverError};

use super::{Rogue, give_up, say};

/// The points, in order: "admitted", "prepared", "complete".
pub(super) fn run(rogue: &Rogue) {
    let service = Service::new(format!("chat {}", rogue.server));
    let started = heirloom::start::<NoRequests>(&rogue.control, service, Config::default(), Replace::Must);
    let Start::Successor(successor) = started.expect("admitted") else { panic!("nobody to take over from") };
    rogue.pause_at("admitted");
    let offered = successor.receive().unwrap_or_else(|error| ended(&error));
    rogue.pause_at("prepared");
    let complete = offered.ready().unwrap_or_else(|error| ended(&error));
    rogue.pause_at("complete");
    let _taken = complete.accept::<NoRequests>().unwrap_or_else(|error| ended(&error));
    say("SERVES");
}

fn ended(error: &TakeoverError) -> ! {
    give_up(&error.to_string());
}
