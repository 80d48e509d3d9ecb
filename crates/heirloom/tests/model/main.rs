//! An exhaustive search of the takeover: the real state machines, in every order of events that can happen.
//!
//! Two processes run the machines; messages are delayed at will; either process crashes at any step, is stopped and
//! goes on (any interleaving says that), or runs into any timeout; the applications withdraw when they like; the incumbent
//! is upgraded in place, before or after; a third process, a crash restart say, grabs the service lock whenever it is
//! free, and serves, without asking anybody.
//!
//! Deliberate weakenings of the rules show that the search finds what it looks for.

mod system;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::LazyLock;

use heirloom::protocol::Fencing;
use stateright::{Checker, HasDiscoveries, Model};
use system::{Action, System, Takeover, Weakening};

#[test]
fn the_rules_hold_in_every_order_of_events() {
    let checker = Takeover::new(None).checker().threads(2).spawn_bfs().join();
    println!("{} unique states, {} in all", checker.unique_state_count(), checker.state_count());
    checker.assert_properties();
    assert!(checker.unique_state_count() > 10_000, "the model has become too small to mean anything");
}

#[test]
fn whoever_is_alive_ends_up_with_exactly_one_server_and_nobody_else_with_descriptors() {
    let graph = &*GRAPH;
    let stuck = graph.stuck();
    println!("{} states, {} of them with nobody serving for a while", graph.states.len(), graph.pausing());
    if let Some(&at) = stuck.first() {
        panic!(
            "nobody will ever serve, or somebody keeps duplicates for ever:\n{}",
            graph.path(at).join("\n")
        );
    }
}

/// Whatever the incumbent does about a successor that keeps the lock, nobody else serves meanwhile. One that waits serves in the end; one
/// that gives up has ended.
#[test]
fn every_way_of_fencing_keeps_the_rules() {
    for fencing in [Fencing::Wait, Fencing::GiveUp] {
        let checker = Takeover::with_fencing(fencing).checker().threads(2).spawn_bfs().join();
        println!("{fencing:?}: {} unique states", checker.unique_state_count());
        checker.assert_properties();
    }
    let graph = Graph::explore(&Takeover::with_fencing(Fencing::Wait));
    if let Some(&at) = graph.stuck().first() {
        panic!("nobody will ever serve:\n{}", graph.path(at).join("\n"));
    }
}

#[test]
fn weakened_rules_are_caught() {
    for (weakening, violated) in [
        (Weakening::CommitAtAccept, "somebody serves"),
        (Weakening::NoAbort, "no stale service"),
        (Weakening::NoLock, "at most one serves"),
        (Weakening::NoShutdown, "no stale service"),
        (Weakening::NoDrain, "no stale service"),
        (Weakening::EndIsRelease, "no stale service"),
        (Weakening::ExecBesideTakeover, "at most one serves"),
    ] {
        let model = Takeover::new(Some(weakening));
        if violated == "somebody serves" {
            let graph = Graph::explore(&model);
            assert!(!graph.stuck().is_empty(), "{weakening:?} was not caught");
            println!("{weakening:?}: {}", graph.path(graph.stuck()[0]).join("; "));
        } else {
            let enough = HasDiscoveries::AnyOf([violated].into());
            let checker = model.checker().threads(2).finish_when(enough).spawn_bfs().join();
            let found = checker.discovery(violated);
            let path = found.unwrap_or_else(|| panic!("{weakening:?} was not caught as: {violated}"));
            println!("{weakening:?}: {:?}", path.into_actions());
        }
    }
}

/// The tables of states in docs/protocol.md are what the search sees.
#[test]
fn the_documented_states_are_true() {
    let graph = &*GRAPH;
    let documented = documented(include_str!("../../../../docs/protocol.md"));
    let seen = graph.transitions();
    let show = |set: &BTreeSet<(String, String)>| {
        set.iter().map(|(from, to)| format!("{from} -> {to}")).collect::<Vec<_>>().join("\n")
    };
    let missing: BTreeSet<_> = seen.difference(&documented).cloned().collect();
    let invented: BTreeSet<_> = documented.difference(&seen).cloned().collect();
    assert!(
        missing.is_empty() && invented.is_empty(),
        "docs/protocol.md lacks:\n{}\n\ndocs/protocol.md invents:\n{}",
        show(&missing),
        show(&invented)
    );
}

/// Reads the rows `| State | … | Next, Next |` of the two tables of states.
fn documented(page: &str) -> BTreeSet<(String, String)> {
    let mut transitions = BTreeSet::new();
    for (side, heading) in
        [("incumbent", "### The incumbent's states"), ("successor", "### The successor's states")]
    {
        let section = page.split(heading).nth(1).expect("the heading of a table of states");
        let section = section.split("\n#").next().unwrap_or(section);
        for row in section.lines().filter(|line| line.starts_with("| **")) {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let from = cells[1].trim_matches('*');
            for to in cells[3].split(',').map(str::trim).filter(|to| !to.is_empty() && *to != "–") {
                transitions.insert((format!("{side} {from}"), format!("{side} {to}")));
            }
        }
    }
    transitions
}

/// What there is when every rule is kept.
static GRAPH: LazyLock<Graph> = LazyLock::new(|| Graph::explore(&Takeover::new(None)));

/// The whole graph of states, for what a search of single states cannot tell.
struct Graph {
    states: Vec<System>,
    edges: Vec<Vec<(Action, usize)>>,
    parents: HashMap<usize, (usize, Action)>,
}

impl Graph {
    fn explore(model: &Takeover) -> Graph {
        let mut graph = Graph { states: model.init_states(), edges: Vec::new(), parents: HashMap::new() };
        let mut index: HashMap<System, usize> = graph.states.iter().cloned().zip(0..).collect();
        let mut queue: VecDeque<usize> = (0..graph.states.len()).collect();
        while let Some(at) = queue.pop_front() {
            let state = graph.states[at].clone();
            let mut actions = Vec::new();
            model.actions(&state, &mut actions);
            let mut edges = Vec::new();
            for action in actions {
                let Some(next) = model.next_state(&state, action) else { continue };
                let to = *index.entry(next.clone()).or_insert_with(|| {
                    graph.states.push(next);
                    queue.push_back(graph.states.len() - 1);
                    graph.parents.insert(graph.states.len() - 1, (at, action));
                    graph.states.len() - 1
                });
                edges.push((action, to));
            }
            graph.edges.push(edges);
        }
        graph
    }

    /// States from which, without further crashes, it never comes to this: somebody serves (if somebody lives who should),
    /// and nobody else holds duplicates of the descriptors.
    fn stuck(&self) -> Vec<usize> {
        let mut backwards: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (from, edges) in self.edges.iter().enumerate() {
            for (action, to) in edges {
                if !action.is_adversity() {
                    backwards.entry(*to).or_default().push(from);
                }
            }
        }
        let good = |state: &System| (state.serving() == 1 || !state.obliged()) && !state.leaks();
        let mut reaches: Vec<bool> = self.states.iter().map(good).collect();
        let mut queue: VecDeque<usize> = (0..self.states.len()).filter(|&at| reaches[at]).collect();
        while let Some(at) = queue.pop_front() {
            for &from in backwards.get(&at).into_iter().flatten() {
                if !reaches[from] {
                    reaches[from] = true;
                    queue.push_back(from);
                }
            }
        }
        (0..self.states.len()).filter(|&at| !reaches[at]).collect()
    }

    fn pausing(&self) -> usize {
        self.states.iter().filter(|state| state.serving() == 0).count()
    }

    fn path(&self, mut at: usize) -> Vec<String> {
        let mut path = vec![format!("{:?}", self.states[at])];
        while let Some((from, action)) = self.parents.get(&at) {
            path.push(format!("{action:?}"));
            at = *from;
        }
        path.reverse();
        path
    }

    fn transitions(&self) -> BTreeSet<(String, String)> {
        let mut transitions = BTreeSet::new();
        for (from, edges) in self.edges.iter().enumerate() {
            for (action, to) in edges {
                if matches!(
                    action,
                    Action::IncumbentCrashes | Action::SuccessorCrashes | Action::SuccessorSulks
                ) {
                    continue;
                }
                let (a, b) = (self.states[from].names(), self.states[*to].names());
                for (side, a, b) in [("incumbent", a.0, b.0), ("successor", a.1, b.1)] {
                    if a != b {
                        transitions.insert((format!("{side} {a}"), format!("{side} {b}")));
                    }
                }
            }
        }
        transitions
    }
}
