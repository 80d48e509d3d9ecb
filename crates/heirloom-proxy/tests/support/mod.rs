//! What the tests of the engine share: engines in this process, backends, and waiting for conditions.
#![allow(dead_code, reason = "each test binary uses a part of it")]

#[path = "../../../heirloom-cli/tests/support/random.rs"]
pub(crate) mod random;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use heirloom::manifest::Changes;
use heirloom::{Bundle, ItemId, Limits};
use heirloom_proxy::{Config, Engine, Frozen, Prepared, Ready, Report};
use rustix::net::{AddressFamily, SocketType};

/// How long anything may take on a loaded machine before a test calls it a failure.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < give_up, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn config(text: &str) -> Config {
    Config::parse(text, "test.toml").unwrap_or_else(|error| panic!("{error}"))
}

/// A listener at any port, and its backends.
pub(crate) fn simple(to: &[SocketAddr], more: &str) -> Config {
    let to: Vec<String> = to.iter().map(|to| format!("{:?}", to.to_string())).collect();
    let to = to.join(", ");
    config(&format!("threads = 2\n[[listener]]\nlisten = \"127.0.0.1:0\"\nto = [{to}]\n{more}"))
}

pub(crate) fn fresh(config: Config) -> Engine {
    Prepared::new(config).unwrap().offer(&Bundle::new()).unwrap().start(Bundle::new())
}

/// Where the first listener is.
pub(crate) fn address(engine: &Engine) -> SocketAddr {
    engine.report().listeners[0].address.parse().unwrap()
}

pub(crate) fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    stream
}

/// Waits until the engine says so of itself.
pub(crate) fn wait_until(engine: &Engine, what: &str, condition: impl Fn(&Report) -> bool) {
    let give_up = Instant::now() + LONG;
    loop {
        let report = engine.report();
        if condition(&report) {
            return;
        }
        assert!(Instant::now() < give_up, "waited in vain: {what}: {report:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A backend, the connections of which are each served in a thread.
pub(crate) fn backend(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let serve = serve.clone();
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// A port at which nobody listens, and which is not given to others.
pub(crate) fn refuses() -> (SocketAddr, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let client = TcpStream::connect(address).unwrap();
    let (held, _) = listener.accept().unwrap();
    drop(client);
    (address, held)
}

/// A listener with a full queue: who comes next is not even answered.
pub(crate) fn stuck() -> (SocketAddr, OwnedFd, Vec<TcpStream>) {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let address = SocketAddr::try_from(rustix::net::getsockname(&socket).unwrap()).unwrap();
    let in_queue: Vec<TcpStream> =
        (0..2).map_while(|_| TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok()).collect();
    assert!(!in_queue.is_empty());
    (address, socket, in_queue)
}

/// Sends back what it gets; what a thread sees as an error ends it.
pub(crate) fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 65_536];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// Says something, and reads it back.
pub(crate) fn talk(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).unwrap();
    hear(stream, text);
}

/// Reads exactly this.
pub(crate) fn hear(stream: &mut TcpStream, text: &str) {
    let mut heard = vec![0; text.len()];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(String::from_utf8(heard).unwrap(), text);
}

/// Hands everything over to an engine with another configuration, as two processes do it; `meanwhile` happens between the offer
/// and the freeze.
pub(crate) fn hand_over(engine: Engine, config: Config, meanwhile: impl FnOnce()) -> Engine {
    hand_over_slowly(engine, config, meanwhile, || {}, || {})
}

/// The same; `in_the_pause` happens while nobody serves, and `at_last` when the next engine does and this one has not gone.
pub(crate) fn hand_over_slowly(
    mut engine: Engine,
    config: Config,
    meanwhile: impl FnOnce(),
    in_the_pause: impl FnOnce(),
    at_last: impl FnOnce(),
) -> Engine {
    let (ready, bundle, frozen) = complete(&mut engine, config, meanwhile);
    in_the_pause();
    drop(frozen);
    let next = ready.start(bundle);
    at_last();
    engine.leave(LONG);
    next
}

/// Everything until there is a successor that could serve.
pub(crate) fn complete(
    engine: &mut Engine,
    config: Config,
    meanwhile: impl FnOnce(),
) -> (Ready, Bundle, Frozen<'_>) {
    let limits = Limits::default();
    let base = engine.offer();
    let crc = base.encode(&limits).unwrap().crc;
    let copy = |id: ItemId| engine.descriptor(id).unwrap().try_clone_to_owned().unwrap();
    let descriptors: BTreeMap<ItemId, OwnedFd> =
        base.items.iter().map(|entry| (entry.id, copy(entry.id))).collect();
    let mut prepared = Prepared::new(config).unwrap();
    for entry in &base.items {
        use std::os::fd::AsFd;
        prepared.register(entry.into(), descriptors[&entry.id].as_fd()).unwrap();
    }
    let count = base.items.len();
    let mut bundle = Bundle::from_parts(base, descriptors).unwrap();
    let mut ready = prepared.offer(&bundle).unwrap();
    meanwhile();
    let mut frozen = engine.freeze();
    let mut delta = frozen.delta();
    delta.base_crc = crc;
    delta.count = (count + delta.added.len() - delta.ended.len()) as u64;
    let changes = Changes::of(&delta);
    let late = delta
        .added
        .iter()
        .map(|entry| (entry.id, frozen.descriptor(entry.id).unwrap().try_clone_to_owned().unwrap()))
        .collect();
    bundle.apply(delta, crc, late).unwrap();
    ready.complete(&bundle, &changes).unwrap();
    (ready, bundle, frozen)
}
