//! The bundle with real descriptors: every kind, what is taken and what is left, and what is closed.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    sync::{Arc, Mutex},
};

use heirloom::{
    Bundle, BundleError, CONTROL_NAME, Entry, ItemId, Kind, Limits, Typed,
    manifest::{Base, Delta, ManifestError, ServiceRecord, seal},
};
use rustix::{
    event::{EventfdFlags, epoll, eventfd},
    fs::{CWD, MemfdFlags, Mode, OFlags, memfd_create},
    net::{AddressFamily, SocketFlags, SocketType, socket_with, socketpair},
    process::{PidfdFlags, Resource, Rlimit, getpid, getrlimit, pidfd_open, setrlimit},
};
use serde::{Deserialize, Serialize};

// ---- Kinds ----

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

/// The master side of a new one, which is a terminal as much as the other.
fn pseudo_terminal() -> OwnedFd {
    File::options().read(true).write(true).open("/dev/ptmx").unwrap().into()
}

/// One descriptor of every kind, and what keeps it company until the test is over.
fn every_kind() -> (Vec<(Kind, OwnedFd)>, Vec<OwnedFd>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (client, server) = tcp_pair();
    let (unix, unix_peer) = UnixStream::pair().unwrap();
    let (packets, packets_peer) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let (reader, writer) = io::pipe().unwrap();
    let fds = vec![
        (Kind::TcpListener, TcpListener::bind("127.0.0.1:0").unwrap().into()),
        (Kind::TcpStream, server.into()),
        (Kind::UnixListener, UnixListener::bind(path("socket")).unwrap().into()),
        (Kind::UnixStream, unix.into()),
        (Kind::UnixSeqpacket, packets),
        (Kind::UdpSocket, UdpSocket::bind("127.0.0.1:0").unwrap().into()),
        (Kind::UnixDatagram, UnixDatagram::unbound().unwrap().into()),
        (Kind::PipeReader, reader.into()),
        (Kind::PipeWriter, writer.into()),
        (Kind::File, File::create(path("file")).unwrap().into()),
        (Kind::Memfd, memfd_create("test", MemfdFlags::CLOEXEC).unwrap()),
        (Kind::Eventfd, eventfd(0, EventfdFlags::CLOEXEC).unwrap()),
        (Kind::Tty, pseudo_terminal()),
        (Kind::Other, epoll::create(epoll::CreateFlags::CLOEXEC).unwrap()),
    ];
    (fds, vec![client.into(), unix_peer.into(), packets_peer], directory)
}

#[test]
fn every_kind_is_told_from_every_other() {
    let (fds, _company, _directory) = every_kind();
    for (kind, fd) in &fds {
        assert_eq!(Kind::of(fd).unwrap(), *kind);
    }
}

#[test]
fn the_odd_ones() {
    let kind = |fd: BorrowedFd<'_>| Kind::of(fd).unwrap();
    let directory = tempfile::tempdir().unwrap();

    // Sockets that do nothing yet, of either family of addresses.
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        let Ok(stream) = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None) else {
            assert_eq!(family, AddressFamily::INET6, "every host has IPv4");
            continue;
        };
        assert_eq!(kind(stream.as_fd()), Kind::TcpStream);
        let datagram = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None).unwrap();
        assert_eq!(kind(datagram.as_fd()), Kind::UdpSocket);
    }
    let netlink = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, None).unwrap();
    assert_eq!(kind(netlink.as_fd()), Kind::Other);

    // A FIFO is a pipe, whichever way it is open.
    let fifo = directory.path().join("fifo");
    rustix::fs::mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
    let both = rustix::fs::open(&fifo, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    assert_eq!(kind(both.as_fd()), Kind::PipeReader);
    let write = rustix::fs::open(&fifo, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    assert_eq!(kind(write.as_fd()), Kind::PipeWriter);

    // Files on tmpfs have seals as memfds have, and an unlinked file has a "(deleted)" name as they do.
    if let Ok(file) = tempfile::tempfile_in("/dev/shm") {
        assert_eq!(kind(file.as_fd()), Kind::File);
    }
    assert_eq!(kind(tempfile::tempfile().unwrap().as_fd()), Kind::File);
    assert_eq!(kind(seal("sealed", b"x").unwrap().as_fd()), Kind::Memfd);

    // Not everything that is a character device is a terminal.
    assert_eq!(kind(File::open("/dev/null").unwrap().as_fd()), Kind::Other);
    assert_eq!(kind(File::open(directory.path()).unwrap().as_fd()), Kind::Other);

    // Kernel objects that fstat calls regular files.
    assert_eq!(kind(File::open("/proc/self/ns/net").unwrap().as_fd()), Kind::Other);
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    assert_eq!(kind(pidfd.as_fd()), Kind::Other);
}

#[test]
fn each_type_takes_its_own_kinds_and_no_others() {
    fn check<T: Typed>(accepted: &[Kind]) {
        let (fds, _company, _directory) = every_kind();
        let mut bundle = Bundle::new();
        for (kind, fd) in fds {
            let id = bundle.add_plain("item", fd).unwrap();
            let taken = bundle.take_id::<T>(id);
            assert_eq!(taken.is_ok(), accepted.contains(&kind), "{kind} as {}", std::any::type_name::<T>());
            match taken {
                Ok(_) => assert!(bundle.entry(id).is_none()),
                Err(error) => {
                    assert!(matches!(error, BundleError::WrongType { .. }), "{error}");
                    assert!(bundle.descriptor(id).is_some(), "it stays");
                }
            }
        }
        assert_eq!(bundle.close_rest().len(), 14 - accepted.len());
    }
    check::<TcpListener>(&[Kind::TcpListener]);
    check::<TcpStream>(&[Kind::TcpStream]);
    check::<UdpSocket>(&[Kind::UdpSocket]);
    check::<UnixListener>(&[Kind::UnixListener]);
    check::<UnixStream>(&[Kind::UnixStream]);
    check::<UnixDatagram>(&[Kind::UnixDatagram]);
    check::<io::PipeReader>(&[Kind::PipeReader]);
    check::<io::PipeWriter>(&[Kind::PipeWriter]);
    check::<File>(&[Kind::File, Kind::Memfd, Kind::Tty, Kind::PipeReader, Kind::PipeWriter]);
    let all: Vec<Kind> = every_kind().0.iter().map(|(kind, _)| *kind).collect();
    check::<OwnedFd>(&all);
}

// ---- Handing over ----

/// What a takeover does to a bundle: written down, read again, and its descriptors moved.
fn handed_over(bundle: &mut Bundle) -> Result<Bundle, BundleError> {
    let limits = Limits::default();
    let base = bundle.base(ServiceRecord { name: "test".into(), generation: 4, ..ServiceRecord::default() });
    let base = Base::decode(&base.encode(&limits).unwrap().bytes, &limits).unwrap();
    Bundle::from_parts(base, descriptors(bundle))
}

fn descriptors(bundle: &mut Bundle) -> BTreeMap<ItemId, OwnedFd> {
    let ids: Vec<ItemId> = bundle.entries().map(|e| e.id).collect();
    ids.into_iter().map(|id| (id, bundle.remove(id).unwrap())).collect()
}

#[test]
fn everything_arrives_and_the_counter_goes_on() {
    let (fds, _company, _directory) = every_kind();
    let kinds: Vec<Kind> = fds.iter().map(|(kind, _)| *kind).collect();
    let mut old = Bundle::new();
    old.set_state(&BTreeMap::from([("topic", "news")])).unwrap();
    for (i, (_, fd)) in fds.into_iter().enumerate() {
        old.add(format!("item {i}"), fd, &i).unwrap();
    }
    assert_eq!(old.len(), 14);

    let mut new = handed_over(&mut old).unwrap();
    assert!(old.is_empty());
    assert_eq!((new.service().name.as_str(), new.service().generation), ("test", 4));
    assert_eq!(new.state::<BTreeMap<String, String>>().unwrap().unwrap()["topic"], "news");
    assert_eq!(new.entries().map(|e| e.kind).collect::<Vec<_>>(), kinds);
    for (i, kind) in kinds.iter().enumerate() {
        let taken = new.take::<OwnedFd>(&format!("item {i}")).unwrap();
        assert_eq!((taken.id, taken.state::<usize>().unwrap()), (ItemId(i as u64 + 1), Some(i)));
        assert_eq!(Kind::of(&taken.descriptor).unwrap(), *kind);
    }
    assert_eq!(new.add_plain("next", io::pipe().unwrap().0).unwrap(), ItemId(15));
    assert_eq!(new.close_rest().len(), 1);
}

#[test]
fn a_connection_goes_on_with_its_bytes() {
    let (mut client, server) = tcp_pair();
    client.write_all(b"before").unwrap();
    let mut old = Bundle::new();
    old.add("client", server, &"half a li").unwrap();

    let mut new = handed_over(&mut old).unwrap();
    drop(old);
    client.write_all(b" after").unwrap();
    let mut taken = new.take::<TcpStream>("client").unwrap();
    assert_eq!(taken.state::<String>().unwrap().as_deref(), Some("half a li"));
    let mut got = [0; 12];
    taken.descriptor.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"before after");
    taken.descriptor.write_all(b"!").unwrap();
    client.read_exact(&mut got[..1]).unwrap();
    assert_eq!(got[0], b'!');
}

fn base_of(entries: Vec<Entry>) -> Base {
    Base { next_id: 100, items: entries, ..Base::default() }
}

fn listed(id: u64, name: &str, kind: Kind) -> Entry {
    Entry { id: ItemId(id), name: name.into(), kind, state: vec![] }
}

#[test]
fn a_descriptor_of_another_kind_is_told_with_name_and_both_kinds() {
    let (unix, mut peer) = UnixStream::pair().unwrap();
    let base = base_of(vec![listed(7, "web", Kind::TcpListener)]);
    let error = Bundle::from_parts(base, BTreeMap::from([(ItemId(7), unix.into())])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "item \"web\" (id 7) should be a tcp-listener, and the descriptor that arrived is a unix-stream"
    );
    assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the descriptor was closed");
}

#[test]
fn nothing_else_passes_for_a_tcp_stream() {
    let (fds, _company, _directory) = every_kind();
    for (kind, fd) in fds {
        let base = base_of(vec![listed(7, "connection", Kind::TcpStream)]);
        match Bundle::from_parts(base, BTreeMap::from([(ItemId(7), fd)])) {
            Ok(_) => assert_eq!(kind, Kind::TcpStream),
            Err(BundleError::WrongKind { real, .. }) => assert_eq!(real, kind),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_kind_that_the_other_program_did_not_know_is_found_out() {
    let (unix, _peer) = UnixStream::pair().unwrap();
    let base = base_of(vec![listed(7, "new thing", Kind::Other)]);
    let mut bundle = Bundle::from_parts(base, BTreeMap::from([(ItemId(7), unix.into())])).unwrap();
    assert_eq!(bundle.entry(ItemId(7)).unwrap().kind, Kind::UnixStream);
    bundle.take::<UnixStream>("new thing").unwrap();
}

#[test]
fn descriptors_and_entries_must_match_one_to_one() {
    let base = base_of(vec![listed(1, "a", Kind::PipeReader), listed(2, "b", Kind::PipeReader)]);
    let pipe = || OwnedFd::from(io::pipe().unwrap().0);
    let one = BTreeMap::from([(ItemId(1), pipe())]);
    let error = Bundle::from_parts(base.clone(), one).unwrap_err();
    assert!(matches!(&error, BundleError::NoDescriptor { item } if item.contains("\"b\"")), "{error}");

    let three = (1..=3).map(|id| (ItemId(id), pipe())).collect();
    let error = Bundle::from_parts(base, three).unwrap_err();
    assert!(matches!(error, BundleError::NotListed { id: ItemId(3) }), "{error}");
}

#[test]
fn the_control_listener_travels_apart() {
    let directory = tempfile::tempdir().unwrap();
    let control = UnixListener::bind(directory.path().join("control")).unwrap();
    let base = base_of(vec![listed(0, CONTROL_NAME, Kind::UnixListener)]);
    let mut bundle = Bundle::from_parts(base, BTreeMap::from([(ItemId::CONTROL, control.into())])).unwrap();
    assert_eq!(bundle.base(ServiceRecord::default()).items, []);
    let taken = bundle.take_id::<UnixListener>(ItemId::CONTROL).unwrap();

    let error = bundle.add_plain(CONTROL_NAME, taken.descriptor).unwrap_err();
    assert!(matches!(error, BundleError::ReservedName { .. }), "{error}");
    assert!(bundle.is_empty());
}

#[test]
fn a_delta_brings_a_bundle_up_to_date() {
    let limits = Limits::default();
    let mut old = Bundle::new();
    old.set_state(&1).unwrap();
    let mut peers = Vec::new();
    let mut connect = |bundle: &mut Bundle, state: u32| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        peers.push(theirs);
        bundle.add("conn", ours, &state).unwrap()
    };
    let (kept, changed, ended) = (connect(&mut old, 10), connect(&mut old, 20), connect(&mut old, 30));
    let was = old.base(ServiceRecord::default());
    let crc = was.encode(&limits).unwrap().crc;
    let offered = old.entries().map(|e| (e.id, duplicate(old.descriptor(e.id).unwrap()))).collect();
    let mut new = Bundle::from_parts(was.clone(), offered).unwrap();
    assert_eq!(
        new.take::<UnixStream>("conn").unwrap_err().to_string(),
        "the bundle holds 3 items called \"conn\": take them all, or one by its id"
    );

    old.set_state(&2).unwrap();
    old.update(changed, &21).unwrap();
    drop(old.remove(ended));
    let added = connect(&mut old, 40);
    let mut now = old.base(ServiceRecord::default());
    now.service.counters.insert("bytes_in".into(), 7);
    let delta = Delta::between(&was, crc, &now).unwrap();
    let arrived = || BTreeMap::from([(added, duplicate(old.descriptor(added).unwrap()))]);

    // One that does not fit changes nothing.
    let before = new.base(ServiceRecord::default());
    let wrong = new.apply(delta.clone(), crc ^ 1, arrived()).unwrap_err();
    assert!(matches!(wrong, BundleError::Manifest(ManifestError::WrongBase { .. })), "{wrong}");
    let short = Delta { count: 9, ..delta.clone() };
    assert!(matches!(
        new.apply(short, crc, arrived()),
        Err(BundleError::Manifest(ManifestError::Count { announced: 9, found: 3 }))
    ));
    let missing = new.apply(delta.clone(), crc, BTreeMap::new()).unwrap_err();
    assert!(matches!(missing, BundleError::NoDescriptor { .. }), "{missing}");
    assert_eq!(new.base(ServiceRecord::default()), before);

    new.apply(delta.clone(), crc, arrived()).unwrap();
    assert_eq!(new.base(new.service().clone()), was.apply(delta, crc).unwrap());
    assert_eq!(new.state::<u32>().unwrap(), Some(2));
    let states: Vec<_> =
        new.take_all::<UnixStream>("conn").iter().map(|t| (t.id, t.state::<u32>().unwrap())).collect();
    assert_eq!(states, [(kept, Some(10)), (changed, Some(21)), (added, Some(40))]);
    assert_eq!(peers[2].read(&mut [0]).unwrap(), 0, "the item that ended is closed on both sides");
    assert_eq!(old.close_rest().len(), 3);
}

fn duplicate(fd: BorrowedFd<'_>) -> OwnedFd {
    fd.try_clone_to_owned().unwrap()
}

// ---- Taking ----

#[test]
fn taking_by_name_wants_exactly_one_of_the_right_type() {
    let mut bundle = Bundle::new();
    let first = bundle.add_plain("twin", io::pipe().unwrap().0).unwrap();
    let second = bundle.add_plain("twin", UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();

    let error = bundle.take::<UdpSocket>("nobody").unwrap_err();
    assert!(matches!(&error, BundleError::NoSuchName { name } if name == "nobody"), "{error}");
    let error = bundle.take::<UdpSocket>("twin").unwrap_err();
    assert!(matches!(&error, BundleError::Ambiguous { name, count: 2 } if name == "twin"), "{error}");
    assert!(matches!(bundle.take_id::<UdpSocket>(ItemId(99)), Err(BundleError::NoSuchId { id: ItemId(99) })));

    // All of a name that fit; the other twin stays, and is now the only one.
    assert_eq!(bundle.take_all::<UdpSocket>("twin").iter().map(|t| t.id).collect::<Vec<_>>(), [second]);
    assert_eq!(bundle.take_all::<UdpSocket>("twin").len(), 0);
    let error = bundle.take::<TcpStream>("twin").unwrap_err();
    assert_eq!(
        error.to_string(),
        "item \"twin\" (id 1, pipe-reader) cannot be taken as a std::net::tcp::TcpStream; it stays in the bundle"
    );
    let taken = bundle.take::<io::PipeReader>("twin").unwrap();
    assert_eq!((taken.id, taken.name.as_str()), (first, "twin"));
    assert_eq!(taken.state::<u32>().unwrap(), None, "a plain item has no state");
    assert!(bundle.is_empty());
    // What is added after the index was made is found as well.
    bundle.add_plain("twin", taken.descriptor).unwrap();
    bundle.take::<io::PipeReader>("twin").unwrap();
}

#[test]
fn state_of_another_type_is_an_error_that_says_whose() {
    let mut bundle = Bundle::new();
    assert_eq!(bundle.state::<u32>().unwrap(), None);
    bundle.set_state("text").unwrap();
    let error = bundle.state::<u32>().unwrap_err();
    assert!(error.to_string().starts_with("the application state: "), "{error}");
    bundle.add("conn", io::pipe().unwrap().0, "text").unwrap();
    let error = bundle.take::<OwnedFd>("conn").unwrap().state::<u32>().unwrap_err();
    assert!(error.to_string().starts_with("the state of item \"conn\" (id 1): "), "{error}");
    assert!(matches!(bundle.update(ItemId(1), &1), Err(BundleError::NoSuchId { .. })));
}

#[test]
fn older_and_newer_programs_read_each_other_s_state() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Old {
        user: String,
        lines: u32,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct New {
        user: String,
        lines: u64,
        #[serde(default)]
        colours: BTreeMap<String, u8>,
        away: Option<String>,
    }
    let old = || Old { user: "alice".into(), lines: 3 };
    let new = || New {
        user: "alice".into(),
        lines: 3,
        colours: BTreeMap::from([("sky".into(), 4)]),
        away: Some("lunch".into()),
    };

    let mut upgrade = Bundle::new();
    upgrade.set_state(&old()).unwrap();
    upgrade.add("conn", io::pipe().unwrap().0, &old()).unwrap();
    let mut upgraded = handed_over(&mut upgrade).unwrap();
    let expected = New { colours: BTreeMap::new(), away: None, ..new() };
    assert_eq!(upgraded.state::<New>().unwrap().unwrap(), expected);
    assert_eq!(upgraded.take::<OwnedFd>("conn").unwrap().state::<New>().unwrap().unwrap(), expected);

    let mut downgrade = Bundle::new();
    downgrade.set_state(&new()).unwrap();
    downgrade.add("conn", io::pipe().unwrap().0, &new()).unwrap();
    let mut downgraded = handed_over(&mut downgrade).unwrap();
    assert_eq!(downgraded.state::<Old>().unwrap().unwrap(), old());
    assert_eq!(downgraded.take::<OwnedFd>("conn").unwrap().state::<Old>().unwrap().unwrap(), old());
}

#[test]
fn many_items_are_taken_by_name_quickly() {
    // Were look-ups linear, this would be some 10^10 comparisons. The descriptors are duplicates of one.
    const ITEMS: usize = 20_000;
    let null = File::open("/dev/null").unwrap();
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let mut bundle = Bundle::new();
    let mut names = Vec::new();
    for i in 0..ITEMS {
        let Ok(fd) = null.try_clone() else { break };
        names.push(format!("client {i}"));
        bundle.add_plain(names[i].as_str(), fd).unwrap();
    }
    for name in &names {
        bundle.take::<OwnedFd>(name).unwrap();
    }
    assert!(bundle.is_empty());
}

// ---- Closing ----

/// Keeps the text of every event.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Log {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{field}={value:?} ");
            }
        }
        let mut text = Text(format!("{} ", event.metadata().level()));
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

fn logged(what: impl FnOnce()) -> Vec<String> {
    let log = Log::default();
    tracing::subscriber::with_default(log.clone(), what);
    log.0.lock().unwrap().clone()
}

fn bundle_of(items: usize) -> (Bundle, Vec<UnixStream>) {
    let mut bundle = Bundle::new();
    let peers = (0..items)
        .map(|i| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            bundle.add_plain(format!("conn {i}"), ours).unwrap();
            theirs
        })
        .collect();
    (bundle, peers)
}

fn assert_closed(peers: Vec<UnixStream>) {
    for mut peer in peers {
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn dropping_a_bundle_closes_what_is_left_and_warns_of_it() {
    let (bundle, peers) = bundle_of(12);
    let log = logged(|| drop(bundle));
    assert_eq!(log.len(), 1);
    assert!(log[0].starts_with("WARN ") && log[0].contains("count=12"), "{}", log[0]);
    assert!(log[0].contains("\"conn 0\"") && log[0].contains("\"conn 9\""), "{}", log[0]);
    assert!(!log[0].contains("conn 10"), "ten names are enough: {}", log[0]);
    assert_closed(peers);
}

#[test]
fn an_empty_bundle_goes_quietly() {
    let log = logged(|| {
        let (mut bundle, _peers) = bundle_of(1);
        bundle.take::<UnixStream>("conn 0").unwrap();
    });
    assert_eq!(log, [""; 0]);
}

#[test]
fn closing_the_rest_says_what_it_was_and_is_no_surprise() {
    let (bundle, peers) = bundle_of(3);
    let mut rest = Vec::new();
    let log = logged(|| rest = bundle.close_rest());
    assert_eq!(log, [""; 0]);
    let names: Vec<&str> = rest.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["conn 0", "conn 1", "conn 2"]);
    assert_closed(peers);
}

#[test]
fn what_was_taken_outlives_the_bundle() {
    let (mut bundle, mut peers) = bundle_of(2);
    let mut taken = bundle.take::<UnixStream>("conn 1").unwrap();
    assert_eq!(bundle.close_rest().len(), 1);
    taken.descriptor.write_all(b"x").unwrap();
    peers.pop().unwrap().read_exact(&mut [0]).unwrap();
    assert_closed(peers);
}
