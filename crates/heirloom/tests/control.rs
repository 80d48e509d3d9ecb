//! The control socket: its messages, its path, its client, and who is at the other end.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use heirloom::control::line::MAX_REQUEST;
use heirloom::control::path::{MAX_PATH, bind, default_path, prepare_directory, relisten};
use heirloom::control::{
    Client, ClientError, Failure, FailureCode, Hello, ItemStatus, LastTakeover, LineReader, PathError, Reply,
    Request, RequestError, Status, Supervised, TooLong, VersionRange, Welcome,
};
use heirloom::descriptors::{Wait, send_with};
use heirloom::lock::{LockFile, ServiceLock, lock_path};
use heirloom::peer::{Peer, PeerPolicy};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What an application adds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Mine {
    Flush,
    Rotate {
        path: String,
    },
    #[serde(rename = "set-level")]
    Level(u8),
}

fn parse(line: &str) -> Result<Request<Mine>, RequestError> {
    Request::parse(line.as_bytes())
}

fn hello() -> Hello {
    Hello {
        protocol: VersionRange::new(1, 2),
        service: "chat-127.0.0.1:31337".to_owned(),
        program: "heirloom".to_owned(),
        version: "0.1.0".to_owned(),
        pid: 7,
        schema: VersionRange::new(1, 1),
        room: 1000,
        generation: None,
        force: false,
    }
}

mod messages {
    use super::*;

    #[test]
    fn our_own_requests() {
        assert_eq!(parse("\"Ping\"").unwrap(), Request::Ping);
        assert_eq!(parse(" \"Status\" \r").unwrap(), Request::Status);
        assert_eq!(parse("{\"Quit\":null}").unwrap(), Request::Quit);
        let line = json!({ "Takeover": hello() }).to_string();
        assert_eq!(parse(&line).unwrap(), Request::Takeover(hello()));
    }

    #[test]
    fn the_applications_requests() {
        assert_eq!(parse("\"Flush\"").unwrap(), Request::Application(Mine::Flush));
        assert_eq!(
            parse("{\"Rotate\":{\"path\":\"/x\",\"new\":1}}").unwrap(),
            Request::Application(Mine::Rotate { path: "/x".to_owned() })
        );
        assert_eq!(parse("{\"set-level\":3}").unwrap(), Request::Application(Mine::Level(3)));
    }

    #[test]
    fn an_unknown_request_is_told_from_a_malformed_one() {
        for unknown in ["\"Dance\"", "{\"Dance\":{}}", "\"ping\"", "\"\""] {
            let error = parse(unknown).unwrap_err();
            assert!(matches!(error, RequestError::Unknown(_)), "{unknown}: {error}");
            assert_eq!(error.failure().code, FailureCode::Unknown);
            let error = Request::<heirloom::control::NoRequests>::parse(unknown.as_bytes());
            assert!(matches!(error, Err(RequestError::Unknown(_))));
        }
        for malformed in [
            "",
            "{",
            "12",
            "null",
            "[]",
            "{}",
            "[\"Ping\"]",
            "\"Ping",
            "Ping",
            "{\"Ping\":1}",
            "{\"Ping\":null,\"Quit\":null}",
            "\"Takeover\"",
            "{\"Takeover\":{}}",
            "{\"Takeover\":{\"protocol\":1}}",
            "{\"Rotate\":{}}",
            "\"Rotate\"",
            "{\"set-level\":300}",
            "\"Ping\" \"Ping\"",
        ] {
            let error = parse(malformed).unwrap_err();
            assert!(matches!(error, RequestError::Malformed(_)), "{malformed}: {error}");
            assert_eq!(error.failure().code, FailureCode::Malformed);
        }
        let deep = "[".repeat(10_000);
        assert!(matches!(parse(&deep), Err(RequestError::Malformed(_))));
    }

    #[test]
    fn a_long_name_does_not_come_back_whole() {
        let error = parse(&format!("\"{}\"", "é".repeat(5000))).unwrap_err();
        assert!(error.to_string().len() < 300, "{error}");
    }

    #[test]
    fn additions_of_other_versions_do_no_harm() {
        let line = r#"{"Takeover":{"protocol":{"min":1,"max":9,"x":0},"service":"s","pid":1,
            "schema":{"min":0,"max":0},"room":5,"later":[1,2]}}"#;
        let Request::Takeover(hello) = parse(line).unwrap() else { panic!() };
        assert_eq!((hello.program.as_str(), hello.generation, hello.force), ("", None, false));
        let reply = Reply::parse(br#"{"Error":{"code":"from-the-future","hint":1}}"#).unwrap();
        let failure = Failure::new(FailureCode::Failed, "");
        assert_eq!(reply, Reply::Error(failure));
        let reply = Reply::parse(br#"{"Status":{}}"#).unwrap();
        assert_eq!(reply, Reply::Status(Status::default()));
    }

    #[test]
    fn failure_codes_have_their_names() {
        let names = [
            (FailureCode::Busy, "busy"),
            (FailureCode::WrongService, "wrong-service"),
            (FailureCode::Protocol, "protocol"),
            (FailureCode::Schema, "schema"),
            (FailureCode::Room, "room"),
            (FailureCode::Permission, "permission"),
            (FailureCode::Unknown, "unknown"),
            (FailureCode::Malformed, "malformed"),
            (FailureCode::TooLong, "too-long"),
            (FailureCode::Failed, "failed"),
        ];
        for (code, name) in names {
            assert_eq!(serde_json::to_value(code).unwrap(), name);
            assert_eq!(serde_json::from_value::<FailureCode>(json!(name)).unwrap(), code);
        }
    }

    #[test]
    fn versions_meet_at_the_newest_in_common() {
        let range = VersionRange::new;
        assert_eq!(range(1, 3).meet(range(2, 5)), Some(3));
        assert_eq!(range(2, 5).meet(range(1, 3)), Some(3));
        assert_eq!(range(1, 9).meet(range(4, 5)), Some(5));
        assert_eq!(range(1, 2).meet(range(3, 4)), None);
        assert_eq!(range(3, 1).meet(range(1, 3)), None);
        assert_eq!(range(0, 0).meet(range(0, u32::MAX)), Some(0));
    }

    fn range() -> impl Strategy<Value = VersionRange> {
        (any::<u32>(), any::<u32>()).prop_map(|(min, max)| VersionRange { min, max })
    }

    fn any_hello() -> impl Strategy<Value = Hello> {
        let texts = (any::<String>(), any::<String>(), any::<String>());
        let numbers = (any::<u32>(), any::<u64>(), any::<Option<u64>>(), any::<bool>());
        (range(), range(), texts, numbers).prop_map(
            |(protocol, schema, (service, program, version), (pid, room, generation, force))| Hello {
                protocol,
                service,
                program,
                version,
                pid,
                schema,
                room,
                generation,
                force,
            },
        )
    }

    fn any_request() -> impl Strategy<Value = Request<Mine>> {
        prop_oneof![
            Just(Request::Ping),
            Just(Request::Status),
            Just(Request::Quit),
            any_hello().prop_map(Request::Takeover),
            Just(Request::Application(Mine::Flush)),
            any::<String>().prop_map(|path| Request::Application(Mine::Rotate { path })),
            any::<u8>().prop_map(|level| Request::Application(Mine::Level(level))),
        ]
    }

    fn any_status() -> impl Strategy<Value = Status> {
        let item = (any::<u64>(), any::<String>(), any::<String>(), any::<Option<u32>>())
            .prop_map(|(id, name, kind, put_by)| ItemStatus { id, name, kind, put_by });
        let supervised = (any::<Vec<String>>(), any::<Option<u32>>(), any::<[String; 2]>(), any::<u64>())
            .prop_map(|(command, pid, [state, text], limit)| Supervised {
                refused: command.clone(),
                command,
                pid,
                state,
                ended: Some(text.clone()),
                text,
                limit,
                kept_above: Some(limit).filter(|limit| limit % 2 == 0),
            });
        let last = (
            any::<String>(),
            any::<Option<String>>(),
            any::<Option<u32>>(),
            any::<[u64; 4]>(),
            any::<Option<u64>>(),
        )
            .prop_map(|(outcome, reason, peer_pid, numbers, pause_us)| LastTakeover {
                outcome,
                reason,
                peer_pid,
                items: numbers[0],
                bytes: numbers[1],
                pause_us,
                total_us: numbers[2],
                at_unix_ms: numbers[3],
            });
        (
            any::<[String; 3]>(),
            any::<[u64; 3]>(),
            any::<(u32, u32, bool)>(),
            prop::collection::vec(item, 0..4),
            prop::collection::btree_map(any::<String>(), any::<u64>(), 0..4),
            prop::option::of(last),
            prop::option::of(supervised),
        )
            .prop_map(
                |(texts, numbers, (pid, protocol, running), items, counters, last, supervised)| {
                    let [name, program, version] = texts;
                    Status {
                        name,
                        pid,
                        generation: numbers[0],
                        program,
                        version,
                        protocol,
                        started_unix_ms: numbers[1],
                        serving_since_unix_ms: numbers[2],
                        items,
                        counters,
                        takeover_running: running,
                        last_takeover: last,
                        supervised,
                        application: (numbers[0] % 2 == 0).then(|| numbers[1].into()),
                    }
                },
            )
    }

    fn any_reply() -> impl Strategy<Value = Reply> {
        let codes =
            prop_oneof![Just(FailureCode::Busy), Just(FailureCode::TooLong), Just(FailureCode::Outsider)];
        let welcome = (any::<[u32; 3]>(), any::<[u64; 2]>(), any::<[String; 2]>(), any::<bool>()).prop_map(
            |([protocol, pid, schema], [generation, items], [program, version], outsider)| Welcome {
                protocol,
                generation,
                pid,
                program,
                version,
                schema,
                items,
                outsider,
            },
        );
        prop_oneof![
            Just(Reply::Pong),
            Just(Reply::Bye),
            any_status().prop_map(Reply::Status),
            welcome.prop_map(Reply::Takeover),
            (codes, any::<String>()).prop_map(|(code, text)| Reply::Error(Failure::new(code, text))),
            any::<Vec<u32>>().prop_map(|numbers| Reply::Application(json!(numbers))),
            any::<String>().prop_map(|text| Reply::Application(json!({ "Flushed": text }))),
        ]
    }

    /// The one line that a message is, without its newline.
    fn only_line(bytes: &[u8]) -> &[u8] {
        let line = bytes.strip_suffix(b"\n").expect("no newline at the end");
        assert!(!line.contains(&b'\n'));
        line
    }

    proptest! {
        #[test]
        fn requests_round_trip(request in any_request()) {
            let bytes = request.to_line().unwrap();
            prop_assert_eq!(Request::<Mine>::parse(only_line(&bytes)).unwrap(), request);
        }

        #[test]
        fn replies_round_trip(reply in any_reply()) {
            let bytes = reply.to_line();
            prop_assert_eq!(Reply::parse(only_line(&bytes)).unwrap(), reply);
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in any::<Vec<u8>>()) {
            let _ = Request::<Mine>::parse(&bytes);
            let _ = Request::<Value>::parse(&bytes);
            let _ = Reply::parse(&bytes);
        }

        #[test]
        fn damaged_messages_are_read_without_a_panic(
            request in any_request(), at in any::<prop::sample::Index>(), byte in any::<u8>()
        ) {
            let mut bytes = request.to_line().unwrap();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = Request::<Mine>::parse(&bytes);
            let _ = Reply::parse(&bytes);
        }

        #[test]
        fn lines_come_out_as_they_went_in_however_they_are_cut(
            lines in prop::collection::vec("[^\r\n]{0,20}", 0..20),
            rest in "[^\r\n]{0,20}",
            returns in any::<bool>(),
            piece in 1_usize..40,
        ) {
            let end = if returns { "\r\n" } else { "\n" };
            let mut stream: String = lines.iter().flat_map(|line| [line, end]).collect();
            stream.push_str(&rest);
            let mut reader = LineReader::new(100);
            let mut out = Vec::new();
            for bytes in stream.as_bytes().chunks(piece) {
                reader.feed(bytes);
                while let Some(line) = reader.next_line().unwrap() {
                    out.push(String::from_utf8(line).unwrap());
                }
            }
            prop_assert_eq!(out, lines);
            prop_assert_eq!(reader.take_rest(), rest.as_bytes());
            prop_assert_eq!(reader.next_line(), Ok(None));
        }
    }

    #[test]
    fn lines_are_bounded_whether_they_end_or_not() {
        let mut lines = LineReader::new(4);
        lines.feed(b"1234\n12345\n1\n");
        assert_eq!(lines.next_line(), Ok(Some(b"1234".to_vec())));
        assert_eq!(lines.next_line(), Err(TooLong { limit: 4 }));
        assert_eq!(lines.next_line(), Err(TooLong { limit: 4 }));

        let mut lines = LineReader::new(4);
        lines.feed(b"123");
        assert_eq!(lines.next_line(), Ok(None));
        lines.feed(b"4");
        assert_eq!(lines.next_line(), Ok(None));
        lines.feed(b"5");
        assert_eq!(lines.next_line(), Err(TooLong { limit: 4 }));
    }

    #[test]
    fn a_hello_fits_in_a_request_line() {
        let line = Request::<Mine>::Takeover(hello()).to_line().unwrap();
        assert!(line.len() < MAX_REQUEST / 10);
    }
}

/// A service's lock and the path of its control socket, in a directory of their own.
struct Place {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl Place {
    fn new() -> Place {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s.sock");
        Place { _directory: directory, path }
    }

    fn lock(&self) -> ServiceLock {
        LockFile::open(lock_path(&self.path)).unwrap().try_lock().unwrap()
    }

    fn listen(&self) -> UnixListener {
        let listener = bind(&self.path, &self.lock()).unwrap();
        listener.set_nonblocking(false).unwrap();
        listener
    }
}

/// Tries until there is a result, with a deadline.
///
/// What a test closes may stay open a moment longer in a process that another test is just starting,
/// until that process execs.
fn soon<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(Instant::now() < deadline, "it never came to be");
        thread::sleep(Duration::from_millis(1));
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

mod paths {
    use super::*;

    #[test]
    fn names_that_are_no_file_names_are_refused() {
        for name in ["", ".", "..", "a/b", "/", "a\0b"] {
            let error = default_path(name).unwrap_err();
            assert!(matches!(error, PathError::Name { .. }), "{name:?}: {error}");
        }
        let error = default_path(&"x".repeat(200));
        assert!(matches!(error, Err(PathError::TooLong { .. } | PathError::NoRuntimeDirectory { .. })));
    }

    #[test]
    fn only_the_last_directory_is_made_and_for_its_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let ours = directory.path().join("heirloom");
        prepare_directory(&ours.join("s.sock")).unwrap();
        assert_eq!(fs::metadata(&ours).unwrap().permissions().mode() & 0o7777, 0o700);
        prepare_directory(&ours.join("s.sock")).unwrap();

        let error = prepare_directory(&directory.path().join("a/b/s.sock")).unwrap_err();
        assert!(matches!(error, PathError::NoParent { .. }), "{error}");
        assert!(error.to_string().contains("mkdir -p -m 700"), "{error}");
        assert!(!directory.path().join("a").exists());
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let shared = directory.path().join("shared");
        fs::create_dir(&shared).unwrap();
        for (mode, good) in [(0o700, true), (0o755, true), (0o770, false), (0o702, false), (0o1777, false)] {
            set_mode(&shared, mode);
            let result = prepare_directory(&shared.join("s.sock"));
            assert_eq!(result.is_ok(), good, "{mode:o}");
            if let Err(error) = result {
                assert!(matches!(error, PathError::Writable { .. }), "{error}");
                assert!(error.to_string().contains("mkdir -m 700"), "{error}");
            }
        }
        assert!(prepare_directory(Path::new("/")).is_err());
    }

    #[test]
    fn a_file_is_no_directory() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let error = prepare_directory(&file.join("s.sock")).unwrap_err();
        assert!(matches!(error, PathError::NotADirectory { .. }), "{error}");
    }

    #[test]
    fn a_link_is_as_good_as_the_directory_unless_it_leads_nowhere_or_to_another() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let prepare = |name: &str| prepare_directory(&at(name).join("s.sock"));
        fs::create_dir(at("real")).unwrap();
        symlink("real", at("link")).unwrap();
        symlink(at("link"), at("second")).unwrap();
        prepare("second").unwrap();
        set_mode(&at("real"), 0o770);
        assert!(matches!(prepare("second"), Err(PathError::Writable { .. })));
        symlink("nothing", at("dangling")).unwrap();
        symlink("round", at("round")).unwrap();
        for name in ["dangling", "round"] {
            prepare(name).expect_err(name);
        }
    }

    #[test]
    fn another_users_directory_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return crate::support::skip("only root can make a directory of another user's");
        }
        let directory = tempfile::tempdir().unwrap();
        let theirs = directory.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(12345), None).unwrap();
        let error = prepare_directory(&theirs.join("s.sock")).unwrap_err();
        assert!(matches!(error, PathError::NotOurs { owner: 12345, .. }), "{error}");
        // Nor may a link be another user's, even one to a directory of ours.
        let (ours, link) = (directory.path().join("ours"), directory.path().join("link"));
        fs::create_dir(&ours).unwrap();
        symlink(&ours, &link).unwrap();
        prepare_directory(&link.join("s.sock")).unwrap();
        std::os::unix::fs::lchown(&link, Some(12345), None).unwrap();
        let error = prepare_directory(&link.join("s.sock")).unwrap_err();
        assert!(matches!(error, PathError::NotOurs { owner: 12345, .. }), "{error}");
    }

    #[test]
    fn the_socket_is_for_its_owner_close_on_exec_and_non_blocking() {
        let place = Place::new();
        let listener = bind(&place.path, &place.lock()).unwrap();
        let mode = fs::metadata(&place.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let error = listener.accept().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        let flags = rustix::io::fcntl_getfd(&listener).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        UnixStream::connect(&place.path).unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let place = Place::new();
        let lock = place.lock();
        let first = bind(&place.path, &lock).unwrap();
        let error = bind(&place.path, &lock).unwrap_err();
        assert!(matches!(error, PathError::InUse { .. }), "{error}");
        UnixStream::connect(&place.path).unwrap(); // it still works

        drop(first);
        assert!(fs::metadata(&place.path).unwrap().file_type().is_socket());
        let _second = soon(|| match bind(&place.path, &lock) {
            Err(PathError::InUse { .. }) => None,
            result => Some(result.unwrap()),
        });
        UnixStream::connect(&place.path).unwrap();
    }

    #[test]
    fn a_listener_with_a_full_backlog_is_alive() {
        let place = Place::new();
        let lock = place.lock();
        let full = bind(&place.path, &lock).unwrap();
        rustix::net::listen(&full, 0).unwrap();
        let _waiting = UnixStream::connect(&place.path).unwrap();
        let error = bind(&place.path, &lock).unwrap_err();
        assert!(matches!(error, PathError::InUse { .. }), "{error}");

        let timeout = Duration::from_millis(30);
        let error = Client::connect_within(&place.path, timeout).unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    }

    #[test]
    fn what_is_not_a_stream_socket_is_never_deleted() {
        let place = Place::new();
        let lock = place.lock();
        let refused = || {
            let error = bind(&place.path, &lock).unwrap_err();
            assert!(matches!(error, PathError::NotASocket { .. }), "{error}");
            assert!(fs::symlink_metadata(&place.path).is_ok());
        };
        fs::write(&place.path, "precious").unwrap();
        refused();
        assert_eq!(fs::read(&place.path).unwrap(), b"precious");
        fs::remove_file(&place.path).unwrap();

        fs::create_dir(&place.path).unwrap();
        refused();
        fs::remove_dir(&place.path).unwrap();

        symlink("/nowhere", &place.path).unwrap();
        refused();
        fs::remove_file(&place.path).unwrap();

        let _datagram = UnixDatagram::bind(&place.path).unwrap();
        refused();
    }

    #[test]
    fn a_path_is_as_long_as_the_kernel_allows_and_no_longer() {
        let directory = tempfile::tempdir().unwrap();
        let fill = MAX_PATH - directory.path().as_os_str().len() - 1;
        let path = directory.path().join("x".repeat(fill));
        let lock = LockFile::open(lock_path(&path)).unwrap().try_lock().unwrap();
        let _listener = bind(&path, &lock).unwrap();
        UnixStream::connect(&path).unwrap();

        let path = directory.path().join("x".repeat(fill + 1));
        let lock = LockFile::open(lock_path(&path)).unwrap().try_lock().unwrap();
        let error = bind(&path, &lock).unwrap_err();
        assert!(matches!(error, PathError::TooLong { length: 108, .. }), "{error}");
        assert!(error.to_string().contains("108") && error.to_string().contains("107"));
        let error = Client::connect(&path).unwrap_err();
        assert!(matches!(error, ClientError::Path(PathError::TooLong { .. })));
    }

    #[test]
    fn another_services_lock_proves_nothing() {
        let (place, other) = (Place::new(), Place::new());
        let error = bind(&place.path, &other.lock()).unwrap_err();
        assert!(matches!(error, PathError::WrongLock { .. }), "{error}");
        assert!(!place.path.exists());
    }
}

mod peers {
    use super::*;

    /// Set in a process that runs one test of this file again, with the listener as its stdin.
    const RELISTEN: &str = "HEIRLOOM_TEST_RELISTEN";

    /// Not a test of its own: what the new owner of a listener does.
    #[test]
    fn new_owner() {
        if std::env::var_os(RELISTEN).is_none() {
            return;
        }
        let listener = UnixListener::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
        relisten(&listener).unwrap();
        println!("\nlistening");
        let (mut connection, _) = listener.accept().unwrap();
        connection.read_to_end(&mut Vec::new()).unwrap();
    }

    #[test]
    fn after_listening_again_the_new_owner_is_the_peer_until_it_is_killed() {
        let place = Place::new();
        let listener = place.listen();
        let early = UnixStream::connect(&place.path).unwrap();
        assert_eq!(Peer::of(&early).unwrap().pid, Some(std::process::id()));
        listener.accept().unwrap();

        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "peers::new_owner", "--nocapture"])
            .env(RELISTEN, "1")
            .stdin(Stdio::from(OwnedFd::from(listener.try_clone().unwrap())))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let listening = said.lines().map_while(Result::ok).any(|line| line == "listening");
        assert!(listening);

        let stream = UnixStream::connect(&place.path).unwrap();
        let peer = Peer::of(&stream).unwrap();
        assert_eq!(peer.pid, Some(child.id()));
        assert!(peer.to_string().starts_with(&format!("pid {} (uid ", child.id())));
        PeerPolicy::default().check(&peer).unwrap();
        assert_eq!(peer.exited().unwrap(), Some(false));

        peer.kill().unwrap();
        assert!(!child.wait().unwrap().success());
        assert_eq!(peer.exited().unwrap(), Some(true));
        peer.kill().unwrap();
        assert!(peer.pidfd().is_some());
    }

    #[test]
    fn a_stranger_is_refused_by_name() {
        if !rustix::process::geteuid().is_root() {
            return crate::support::skip("only root can become another user");
        }
        use std::os::unix::process::CommandExt;
        // It has to reach the socket first, and the socket is root's: open the way for this test.
        let place = Place::new();
        let listener = place.listen();
        listener.set_nonblocking(true).unwrap();
        set_mode(place.path.parent().unwrap(), 0o711);
        set_mode(&place.path, 0o666);
        for (uid, says) in [(12345, "uid 12345"), (65534, "user namespace")] {
            let mut stranger = Command::new("python3");
            let script =
                "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)";
            stranger.args(["-c", script]).arg(&place.path).uid(uid).gid(uid);
            let Ok(mut stranger) = stranger.spawn() else {
                return crate::support::skip("python3 plays the stranger");
            };
            let (connection, _) = soon(|| {
                assert_eq!(stranger.try_wait().unwrap(), None, "it came to nothing");
                listener.accept().ok()
            });
            let peer = Peer::of(&connection).unwrap();
            assert_eq!((peer.uid, peer.pid), (uid, Some(stranger.id())));
            let refused = PeerPolicy::default().check(&peer).unwrap_err().to_string();
            assert!(refused.contains(says), "{refused}");
            assert!(refused.contains(&stranger.id().to_string()), "{refused}");
            assert_eq!(peer.gid, uid);
            assert_eq!(PeerPolicy::default().allow_uid(uid).check(&peer).is_ok(), uid == 12345);
            assert_eq!(PeerPolicy::default().allow_gid(uid).check(&peer).is_ok(), uid == 12345);
            assert!(PeerPolicy::default().allow_gid(0).check(&peer).is_err());
            drop(connection);
            stranger.wait().unwrap();
        }
    }
}

mod clients {
    use super::*;

    type Ask = Request<Mine>;

    /// Serves one connection: for each line of it, what the function writes.
    fn serve(
        listener: UnixListener,
        mut answer: impl FnMut(&mut UnixStream, Vec<u8>) + Send + 'static,
    ) -> thread::JoinHandle<()> {
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).unwrap_or(0) > 0 {
                answer(&mut stream, std::mem::take(&mut line));
            }
        })
    }

    #[test]
    fn questions_are_answered() {
        let place = Place::new();
        let server = serve(place.listen(), |stream, line| {
            let reply = match Ask::parse(line.strip_suffix(b"\n").unwrap()) {
                Ok(Request::Ping) => Reply::Pong,
                Ok(Request::Application(Mine::Level(level))) => Reply::Application(json!(level)),
                Ok(_) => Reply::Error(Failure::new(FailureCode::Busy, "later")),
                Err(error) => Reply::Error(error.failure()),
            };
            // In pieces, as a stream may be.
            for byte in reply.to_line() {
                stream.write_all(&[byte]).unwrap();
            }
        });
        let mut client = Client::connect(&place.path).unwrap();
        assert_eq!(client.request(&Ask::Ping).unwrap(), Reply::Pong);
        let reply = client.request(&Request::Application(Mine::Level(9))).unwrap();
        assert_eq!(reply, Reply::Application(json!(9)));
        let reply = client.request(&Ask::Takeover(hello())).unwrap();
        assert!(matches!(reply, Reply::Error(Failure { code: FailureCode::Busy, .. })));
        let reply = client.request(&Request::Application("Dance")).unwrap();
        assert!(matches!(reply, Reply::Error(Failure { code: FailureCode::Unknown, .. })));
        drop(client);
        server.join().unwrap();
    }

    #[test]
    fn nobody_there_is_told_from_a_stale_socket() {
        let place = Place::new();
        let error = Client::connect(&place.path).unwrap_err();
        assert!(matches!(error, ClientError::Nobody { .. }), "{error}");
        drop(place.listen());
        let error = soon(|| Client::connect(&place.path).err());
        assert!(matches!(error, ClientError::Nobody { .. }), "{error}");
        assert!(error.to_string().contains("left behind"), "{error}");
    }

    #[test]
    fn descriptors_come_in_order_with_their_line() {
        let place = Place::new();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let server = serve(place.listen(), move |stream, _| {
            stream.write_all(b"\"Po").unwrap();
            let both = [reader.as_fd(), writer.as_fd()];
            send_with(&*stream, b"ng\"\n", &both, Wait::Block).unwrap();
            stream.write_all(b"\"Bye\"\n").unwrap();
        });
        let mut client = Client::connect(&place.path).unwrap();
        client.send(&Ask::Ping).unwrap();
        let (line, mut descriptors) = client.receive().unwrap();
        assert_eq!(line, b"\"Pong\"");
        assert_eq!(descriptors.len(), 2);
        let (line, none) = client.receive().unwrap();
        assert_eq!((line.as_slice(), none.len()), (&b"\"Bye\""[..], 0));

        let writer = descriptors.pop().unwrap();
        let reader = descriptors.pop().unwrap();
        rustix::io::write(&writer, b"through").unwrap();
        let mut buffer = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut buffer).unwrap(), 7);
        drop(client);
        server.join().unwrap();
    }

    #[test]
    fn an_answer_without_a_newline_is_had_as_bytes() {
        let place = Place::new();
        let file = fs::File::open("/dev/null").unwrap();
        let server = serve(place.listen(), move |stream, _| {
            send_with(&*stream, b"hi", &[file.as_fd()], Wait::Block).unwrap();
        });
        let mut client = Client::connect(&place.path).unwrap();
        client.send(&Request::Application("RequestFds")).unwrap();
        let (bytes, descriptors) = client.receive_bytes().unwrap();
        assert_eq!((bytes.as_slice(), descriptors.len()), (&b"hi"[..], 1));
        drop(client);
        server.join().unwrap();
    }

    #[test]
    fn silence_ends_at_the_timeout_and_a_closed_connection_at_once() {
        let place = Place::new();
        let listener = place.listen();
        let mut client = Client::connect(&place.path).unwrap();
        let (stream, _) = listener.accept().unwrap();
        client.set_timeout(Duration::from_millis(30));
        let error = client.request(&Ask::Ping).unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
        client.set_timeout(Duration::from_secs(20));
        drop(stream);
        let error = client.request(&Ask::Ping).unwrap_err();
        assert!(matches!(error, ClientError::Closed { .. }), "{error}");
    }

    #[test]
    fn a_refusal_is_read_although_the_connection_is_closed() {
        let place = Place::new();
        let listener = place.listen();
        let mut client = Client::connect(&place.path).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let refusal = Reply::Error(Failure::new(FailureCode::Permission, "no"));
        stream.write_all(&refusal.to_line()).unwrap();
        drop(stream);
        assert_eq!(client.request(&Ask::Ping).unwrap(), refusal);
    }

    #[test]
    fn nonsense_is_an_error_and_the_next_answer_is_good() {
        let place = Place::new();
        let mut answers = ["what?\n", "\"Pong\"\n"].into_iter();
        let server = serve(place.listen(), move |stream, _| {
            stream.write_all(answers.next().unwrap().as_bytes()).unwrap();
        });
        let mut client = Client::connect(&place.path).unwrap();
        let error = client.request(&Ask::Ping).unwrap_err();
        assert!(matches!(error, ClientError::Reply { .. }), "{error}");
        assert_eq!(client.request(&Ask::Ping).unwrap(), Reply::Pong);
        drop(client);
        server.join().unwrap();
    }

    #[test]
    fn an_endless_answer_is_cut() {
        let place = Place::new();
        let server = serve(place.listen(), |stream, _| {
            let piece = vec![b'x'; 1 << 20];
            while stream.write_all(&piece).is_ok() {}
        });
        let mut client = Client::connect(&place.path).unwrap();
        client.set_timeout(Duration::from_secs(60));
        let error = client.request(&Ask::Ping).unwrap_err();
        assert!(matches!(error, ClientError::TooLong { .. }), "{error}");
        drop(client);
        server.join().unwrap();
    }

    #[test]
    fn too_many_descriptors_are_an_error() {
        let place = Place::new();
        let file = fs::File::open("/dev/null").unwrap();
        let server = serve(place.listen(), move |stream, _| {
            let many = vec![file.as_fd(); 200];
            while send_with(&*stream, b"x", &many, Wait::Block).is_ok() {}
        });
        let mut client = Client::connect(&place.path).unwrap();
        client.send(&Ask::Ping).unwrap();
        let error = client.receive().unwrap_err();
        assert!(matches!(error, ClientError::Descriptors { .. }), "{error}");
        drop(client);
        server.join().unwrap();
    }
}
