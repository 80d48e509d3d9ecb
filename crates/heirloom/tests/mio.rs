//! The example `echo_mio`, as a real server under takeovers.

mod support;

mod echo {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{Shutdown, SocketAddr, TcpStream};
    use std::path::Path;
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::thread;

    use heirloom::control::{Reply, Request};
    use heirloom::upgrade::{Upgrade, Upgraded, ask};
    use heirloom::{ItemId, Kind, NoRequests, Service};
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use crate::support::{LONG, Process, Scratch, example, serve, status, stretch, successor, wait_for};

    fn service() -> Service {
        Service::new("echo")
    }

    /// Starts the example, fresh or as a successor, and waits until it serves.
    fn start(program: &Path, control: &Path) -> (Process, SocketAddr) {
        let mut process = Process::start(Command::new(program).arg(control));
        let serving = process.line("serving ");
        let address = serving.split(',').next().and_then(|address| address.parse().ok());
        (process, address.unwrap_or_else(|| panic!("no address in {serving:?}")))
    }

    /// A client that checks that everything comes back.
    struct Client {
        socket: TcpStream,
        seed: u64,
        sent: u64,
        received: u64,
    }

    impl Client {
        fn connect(address: SocketAddr, seed: u64) -> Self {
            let socket = TcpStream::connect(address).unwrap();
            socket.set_read_timeout(Some(LONG)).unwrap();
            Client { socket, seed, sent: 0, received: 0 }
        }

        fn send(&mut self, bytes: usize) {
            self.socket.write_all(&stretch(self.seed, self.sent, bytes)).unwrap();
            self.sent += bytes as u64;
        }

        fn receive(&mut self, bytes: usize) {
            let mut buffer = vec![0; bytes];
            self.socket.read_exact(&mut buffer).unwrap();
            self.check(&buffer);
        }

        fn check(&mut self, bytes: &[u8]) {
            let expected = stretch(self.seed, self.received, bytes.len());
            assert!(bytes == expected, "connection {} differs after byte {}", self.seed, self.received);
            self.received += bytes.len() as u64;
        }

        fn round_trip(&mut self, bytes: usize) {
            self.send(bytes);
            self.receive(bytes);
        }

        /// Sends without reading until the server cannot take any more: its buffers are full of unsent bytes then.
        fn stuff(&mut self) {
            let patience = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };
            self.socket.set_nonblocking(true).unwrap();
            loop {
                match self.socket.write(&stretch(self.seed, self.sent, 64 * 1024)) {
                    Ok(n) => self.sent += n as u64,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
                        if poll(&mut fds, Some(&patience)).unwrap() == 0 {
                            break;
                        }
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            self.socket.set_nonblocking(false).unwrap();
        }

        /// Sends and receives until it is told to stop, and then once more: after the last takeover.
        fn keep_busy(mut self, stop: &AtomicBool, trips: &AtomicU64) {
            let mut last = false;
            while !last {
                last = stop.load(Ordering::SeqCst);
                self.round_trip(1 + (self.sent * 7919 % 6000) as usize);
                trips.fetch_add(1, Ordering::Relaxed);
            }
            self.finish();
        }

        /// Sends nothing more, reads to the end, and checks that nothing is missing.
        fn finish(mut self) {
            self.socket.shutdown(Shutdown::Write).unwrap();
            let mut buffer = vec![0; 64 * 1024];
            loop {
                match self.socket.read(&mut buffer).unwrap() {
                    0 => break,
                    n => self.check(&buffer[..n]),
                }
            }
            assert_eq!(self.received, self.sent, "connection {} ended early", self.seed);
        }
    }

    #[test]
    fn five_hundred_connections_echo_through_ten_takeovers() {
        const BUSY: u64 = 490;
        const STUFFED: u64 = 10;
        let Some(program) = example("echo_mio") else { return };
        heirloom::descriptors::raise_limit().unwrap();
        let scratch = Scratch::new();
        let control = scratch.control();
        let (mut server, address) = start(&program, &control);

        let mut stuffed: Vec<_> = (0..STUFFED).map(|seed| Client::connect(address, seed)).collect();
        stuffed.iter_mut().for_each(Client::stuff);
        let (stop, trips) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            for seed in STUFFED..STUFFED + BUSY {
                let client = Client::connect(address, seed);
                let (stop, trips) = (&stop, &trips);
                let thread = thread::Builder::new().stack_size(128 * 1024);
                thread.spawn_scoped(scope, move || client.keep_busy(stop, trips)).unwrap();
            }
            for generation in 1..=10 {
                let before = trips.load(Ordering::Relaxed);
                wait_for("traffic", || trips.load(Ordering::Relaxed) > before + BUSY);
                let (next, same_address) = start(&program, &control);
                std::mem::replace(&mut server, next).ends_well();
                assert_eq!(same_address, address);
                let status = status(&control);
                assert_eq!(status.generation, generation);
                assert_eq!(status.last_takeover.unwrap().items, 2 + STUFFED + BUSY);
            }
            stop.store(true, Ordering::SeqCst);
        });
        stuffed.into_iter().for_each(Client::finish);
    }

    /// By a request alone: the server starts its successor, or becomes it.
    #[test]
    fn a_hundred_connections_echo_through_upgrades_beside_and_in_place() {
        const BUSY: u64 = 100;
        let Some(program) = example("echo_mio") else { return };
        let scratch = Scratch::new();
        let control = scratch.control();
        let (_first, address) = start(&program, &control);
        let (stop, trips) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            for seed in 0..BUSY {
                let client = Client::connect(address, seed);
                let (stop, trips) = (&stop, &trips);
                scope.spawn(move || client.keep_busy(stop, trips));
            }
            for generation in 1..=12 {
                let before = trips.load(Ordering::Relaxed);
                wait_for("traffic", || trips.load(Ordering::Relaxed) > before + BUSY);
                let in_place = generation % 3 > 0;
                let upgraded = ask(&control, Upgrade { in_place, ..Upgrade::default() }, LONG);
                let Ok(Upgraded::Replaced { before, now }) = upgraded else { panic!("{upgraded:?}") };
                assert_eq!(now.generation, generation);
                assert_eq!(now.last_takeover.as_ref().unwrap().items, 2 + BUSY);
                assert_eq!(before.pid == now.pid, in_place);
            }
            stop.store(true, Ordering::SeqCst);
        });
        // The one that serves is no child of this test.
        let mut last = heirloom::control::Client::connect(&control).unwrap();
        assert_eq!(last.request(&Request::<NoRequests>::Quit).unwrap(), Reply::Bye);
        last.set_timeout(LONG);
        assert!(last.receive().is_err(), "it ends");
    }

    /// This test is the successor of one echo server and the incumbent of the next.
    #[test]
    fn what_ends_and_what_begins_during_an_offer_is_in_the_delta() {
        let Some(program) = example("echo_mio") else { return };
        let scratch = Scratch::new();
        let control = scratch.control();
        let (mut server, address) = start(&program, &control);
        let mut clients: Vec<_> = (0..3).map(|seed| Client::connect(address, seed)).collect();
        clients.iter_mut().for_each(|client| client.round_trip(1000));

        let offered = successor(&control, &service()).receive().unwrap();
        let ids: Vec<u64> = offered.bundle().entries().map(|entry| entry.id.0).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4], "the control listener, the listener and three connections");
        // One ends: its peer hears of it although a duplicate lives here.
        clients.remove(0).finish();
        // One begins, one goes on, and one becomes full.
        let mut new = Client::connect(address, 7);
        new.round_trip(1000);
        clients[0].round_trip(1000);
        clients[1].stuff();

        let complete = offered.ready().unwrap();
        let bundle = complete.bundle();
        let ids: Vec<u64> = bundle.entries().map(|entry| entry.id.0).collect();
        assert_eq!(ids, [0, 1, 3, 4, 5]);
        assert_eq!(bundle.next_id(), ItemId(6));
        let entry = |id| bundle.entry(ItemId(id)).unwrap();
        assert_eq!((entry(5).name.as_str(), entry(5).kind), ("connection", Kind::TcpStream));
        assert!(entry(3).state.is_empty() && entry(5).state.is_empty());
        assert!(!entry(4).state.is_empty(), "what it could not send back travels");
        // What arrives in the freeze waits in the socket.
        new.send(500);

        let taken = complete.accept::<NoRequests>().unwrap();
        server.ends_well();
        assert_eq!(taken.from.pid, Some(server.id()));
        let between = thread::spawn(move || serve(taken.incumbent, taken.bundle));
        let (_server, same_address) = start(&program, &control);
        between.join().unwrap();
        assert_eq!((same_address, status(&control).generation), (address, 2));
        new.receive(500);
        new.finish();
        clients.into_iter().for_each(Client::finish);
        Client::connect(address, 9).round_trip(10);
    }

    #[test]
    fn a_takeover_that_is_given_up_in_the_freeze_loses_nothing() {
        let Some(program) = example("echo_mio") else { return };
        let scratch = Scratch::new();
        let control = scratch.control();
        let (mut server, address) = start(&program, &control);
        let mut clients: Vec<_> = (0..20).map(|seed| Client::connect(address, seed)).collect();
        clients.iter_mut().for_each(|client| client.round_trip(100));
        for _ in 0..5 {
            let complete = successor(&control, &service()).receive().unwrap().ready().unwrap();
            clients.iter_mut().for_each(|client| client.send(100));
            let mut late = Client::connect(address, 99);
            late.send(10);
            complete.withdraw("a test of this");
            clients.iter_mut().for_each(|client| client.receive(100));
            late.receive(10);
            late.finish();
            wait_for("the end of the takeover", || !status(&control).takeover_running);
        }
        let (_next, _) = start(&program, &control);
        server.ends_well();
        clients.iter_mut().for_each(|client| client.round_trip(100));
        clients.into_iter().for_each(Client::finish);
        assert_eq!(status(&control).generation, 1);
    }
}
