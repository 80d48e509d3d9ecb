//! A program with requests of its own at the control socket, beside Ping, Status, Quit and Takeover.
//!
//! It keeps a topic. Start it, ask it, and start it again to see the topic survive:
//!
//! ```text
//! cargo run --example control_requests -- /tmp/topic/topic.sock
//! cargo run --example control_requests -- /tmp/topic/topic.sock "boats and ships"
//! echo '"Topic"' | socat - UNIX-CONNECT:/tmp/topic/topic.sock
//! echo '{"SetTopic": {"topic": "birds"}}' | socat - UNIX-CONNECT:/tmp/topic/topic.sock
//! ```
//!
//! A request is one line of JSON: an enum as serde writes it. The library answers its own requests, and gives this
//! program those that read as [`Mine`].

use std::error::Error;
use std::time::Instant;

use heirloom::control::{Client, Reply, Request};
use heirloom::{Bundle, Config, Incumbent, Outcome, Replace, Service, Start, Turn};
use serde::{Deserialize, Serialize};

/// The requests that this program adds.
#[derive(Debug, Serialize, Deserialize)]
enum Mine {
    /// Answered with the topic.
    Topic,
    /// Answered with the topic of before.
    SetTopic { topic: String },
}

/// What it answers, and also the state that it hands over.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Topic {
    topic: String,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let control = arguments.next().ok_or("usage: control_requests CONTROL_SOCKET [NEW_TOPIC]")?;
    match arguments.next() {
        Some(topic) => set(&control, topic),
        None => serve(&control),
    }
}

/// The client's side.
fn set(control: &str, topic: String) -> Result<(), Box<dyn Error>> {
    match Client::connect(control)?.request(&Request::Application(Mine::SetTopic { topic }))? {
        Reply::Application(before) => {
            println!("before it was: {}", serde_json::from_value::<Topic>(before)?.topic);
            Ok(())
        }
        Reply::Error(failure) => Err(failure.into()),
        other => Err(format!("an answer to another question: {other:?}").into()),
    }
}

/// The server's side.
fn serve(control: &str) -> Result<(), Box<dyn Error>> {
    let service = Service::new("topic").program("control_requests", env!("CARGO_PKG_VERSION"));
    let (mut incumbent, mut topic): (Incumbent<Mine>, Topic) =
        match heirloom::start(control.as_ref(), service, Config::default(), Replace::Try)? {
            Start::Fresh(incumbent) => (incumbent, Topic::default()),
            Start::Successor(successor) => {
                let complete = successor.receive()?.ready()?;
                // Before accepting: what cannot be read is a reason to leave everything as it is.
                let topic = complete.bundle().state()?.unwrap_or_default();
                (complete.accept()?.incumbent, topic)
            }
            Start::InPlace(taken) => (taken.incumbent, taken.bundle.state()?.unwrap_or_default()),
            Start::Preflight(preflight) => match preflight.state::<Topic>() {
                Ok(_) => return Ok(preflight.pass()?),
                Err(error) => return Ok(preflight.refuse(error)?),
            },
            Start::Older(_) => return Err("the incumbent keeps no topic".into()),
        };
    println!("keeping the topic, generation {}", incumbent.generation());

    'serving: loop {
        heirloom::runtime::blocking::wait(&incumbent, &mut Vec::new(), None)?;
        loop {
            match incumbent.turn(Instant::now())? {
                Turn::Idle => break,
                Turn::Request(mut asked) => match asked.request() {
                    Some(Mine::Topic) => asked.reply(&topic),
                    Some(Mine::SetTopic { topic: new }) => {
                        asked.reply(&std::mem::replace(&mut topic, Topic { topic: new }));
                    }
                    None => {}
                },
                Turn::Offer(offer) => offer.begin_bundle(&bundle(&topic)?)?,
                Turn::Batch(batch) => batch.send(|_| None),
                Turn::Freeze(freeze) => match freeze.release_bundle(&bundle(&topic)?)? {
                    Outcome::Resumed(why) => eprintln!("serving on: {why}"),
                    Outcome::Taken(_) => return Ok(()),
                    Outcome::Superseded(why) => return Err(why.into()),
                },
                Turn::Quit(_) => break 'serving,
                Turn::Closed(_) | Turn::Delegated(_) => {}
            }
        }
    }
    incumbent.retire();
    Ok(())
}

fn bundle(topic: &Topic) -> Result<Bundle, Box<dyn Error>> {
    let mut bundle = Bundle::new();
    bundle.set_state(topic)?;
    Ok(bundle)
}
