//! Takeovers between two pods of a node: an old one and a new one, as a rolling update with a surge makes them.

mod pod;
mod rogue;
mod stream;
mod support;

use pod::*;
use support::guests::Guest;
use support::talk::{Talk, Talker};
use support::traffic::Traffic;
use support::*;
use rustix::process::Signal;

/// How many talk all the time.
const TALKERS: usize = 8;

/// Not a test of its own: what a rogue does when it is started.
#[test]
fn rogue() {
    rogue::run();
}

fn talk(address: std::net::SocketAddr) -> Talk {
    let guests: Vec<Guest> = (0..TALKERS).map(|_| Guest::join(address)).collect();
    let names: Vec<String> = guests.iter().map(|guest| guest.name.clone()).collect();
    let talk = Talk::start(guests, &names);
    talk.wait_for_progress();
    talk
}

/// Fails unless everybody has heard everything that the others have said, and those who have come and gone.
#[track_caller]
fn assert_heard(talkers: &[Talker], visitors: &[String]) {
    for listener in talkers {
        for speaker in talkers.iter().filter(|speaker| speaker.guest.name != listener.guest.name) {
            let heard = listener.ear.count(&speaker.guest.name);
            assert_eq!(heard, speaker.said, "lines of {} at {}", speaker.guest.name, listener.guest.name);
        }
        assert_eq!(listener.ear.left, talkers[0].ear.left, "everybody hears of the same");
        for visitor in visitors {
            assert_eq!(listener.ear.count(visitor), 1, "of {visitor} at {}", listener.guest.name);
        }
        assert_eq!(listener.ear.left.len(), visitors.len(), "somebody was disconnected");
    }
}

/// The old pod's namespaces end with it but for its network, which is without a process and without a name then: the connections
/// keep it, and the listener, at which others still come in.
#[test]
fn a_new_pod_takes_over_and_the_old_network_goes_on() {
    let Some(node) = Node::start() else { return };
    let networks = [node.network(1), node.network(2)];
    let spec = |number: usize| Spec { network: Some(&networks[number]), ..Spec::default() };
    let mut old = node.server(spec(0), "try");
    let address = old.address(Some(&networks[0]));
    let (namespaces, network) = (old.namespaces(), node.id_of(&networks[0]));
    let talk = talk(address);
    let traffic = Traffic::start(address);
    let mut new = node.server(spec(1), "try");
    old.process.wait_for_code(0);
    talk.wait_for_progress();
    let (mut visitors, lost) = traffic.finish();
    assert_eq!(lost, 0, "not let in");
    for namespace in namespaces {
        assert!(!has_a_process(&namespace), "somebody is left in {}", namespace.display());
    }
    let status = node.wait_for_generation(1);
    assert_eq!((status.pid, status.last_takeover.expect("one").peer_pid), (1, None));

    node.forget(&networks[0]);
    assert!(!has_a_process(&network) && has_a_process(&node.id_of(&networks[1])));
    talk.wait_for_progress();
    let traffic = Traffic::start(address);
    talk.wait_for_progress();
    let (more, lost) = traffic.finish();
    assert_eq!(lost, 0, "not let in");
    visitors.extend(more);
    assert_heard(&talk.finish(), &visitors);
    new.signal(Signal::TERM);
    new.process.wait_for_code(0);
}
