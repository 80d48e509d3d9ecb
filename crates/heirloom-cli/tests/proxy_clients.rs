//! Real clients talk to real servers through a proxy that is replaced in every way there is: none of them notices.

mod clients;
mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use clients::http::{Nginx, curl};
use clients::postgres::{Postgres, Session, psql};
use clients::redis::{Redis, redis_cli};
use clients::terminal::{Shells, Terminal};
use clients::{Checksum, copy_through, join, websocket};
use support::generations::assert_same;
use support::proxy::{Gate, Handover, Proxy};
use support::random::Random;
use support::*;

/// How long the file is that is downloaded: a gigabyte takes some twenty seconds, most of them for its bytes and checksums.
const DOWNLOAD: u64 = 1 << 30;
/// How long the one is that is uploaded.
const UPLOAD: u64 = 256 << 20;
/// How many rows are copied into and out of a database, and how long one is.
const ROWS: u64 = 1_000_000;
const ROW: u64 = 65;
/// How many messages are heard over a WebSocket after each handover at least.
const MESSAGES: u64 = 200;

#[test]
fn psql_is_in_one_transaction_all_the_while() {
    let Some(postgres) = Postgres::start() else { return };
    let unix_socket = format!("unix:{}", postgres.unix_socket().display());
    for backend in [postgres.address(), &unix_socket] {
        let mut proxy = Proxy::to(backend);
        let mut session = Session::start(&proxy.address());
        let mut other = Session::start(&proxy.address());
        postgres.ask("CREATE TABLE kept (n int)");
        assert_eq!(session.ask("BEGIN"), "");
        session.ask("CREATE TEMP TABLE mine (n int)");
        let identity = "SELECT pg_backend_pid(), txid_current()";
        let me = session.ask(identity);
        let mut rows = 0;
        for how in Handover::EACH.into_iter().chain(Handover::EACH) {
            // A statement that cannot end before the handover has: the other session lets it.
            let lock = 1000 + rows;
            other.ask(&format!("SELECT pg_advisory_lock({lock})"));
            session.say(&format!("INSERT INTO mine SELECT {rows} FROM pg_advisory_xact_lock({lock})"));
            wait_for("a statement that waits", || {
                postgres.ask("SELECT count(*) FROM pg_locks WHERE NOT granted") == b"1\n"
            });
            proxy.hand_over(how);
            assert_eq!(other.ask(&format!("SELECT pg_advisory_unlock({lock})")), "t");
            assert_eq!(session.answer(), "");
            session.ask(&format!("INSERT INTO kept VALUES ({rows})"));
            rows += 1;
            assert_eq!(session.ask("SELECT count(*) FROM mine"), rows.to_string(), "{how:?}");
            assert_eq!(session.ask(identity), me, "{how:?}");
        }
        assert_eq!(postgres.ask("SELECT count(*) FROM kept"), b"0\n", "it is not committed yet");
        assert_eq!(session.ask("COMMIT"), "");
        assert_eq!(
            postgres.ask("SELECT count(*), sum(n) FROM kept"),
            format!("{rows}|{}\n", rows * (rows - 1) / 2).as_bytes()
        );
        postgres.ask("DROP TABLE kept");
        session.quit();
        other.quit();
        proxy.finish();
    }
}

#[test]
fn psql_copies_into_a_table_and_out_of_it() {
    let Some(postgres) = Postgres::start() else { return };
    let unix_socket = format!("unix:{}", postgres.unix_socket().display());
    let rows = rows();
    for backend in [postgres.address(), &unix_socket] {
        let mut proxy = Proxy::to(backend);
        postgres.ask("CREATE TABLE copied (row text)");
        let mut copy = psql(&proxy.address());
        copy.args(["-c", "COPY copied FROM STDIN"]);
        upload(&mut proxy, &mut copy, std::io::Cursor::new(rows.clone()), rows.len() as u64);
        assert_eq!(postgres.ask("SELECT count(*) FROM copied"), format!("{ROWS}\n").as_bytes());
        assert_same(&postgres.ask("COPY copied TO STDOUT"), &rows);

        let mut copy = psql(&proxy.address());
        copy.args(["-c", "COPY copied TO STDOUT"]);
        let copied = download(&mut proxy, &mut copy, Vec::new(), rows.len() as u64);
        assert_same(&copied, &rows);
        postgres.ask("DROP TABLE copied");
        proxy.finish();
    }
}

#[test]
fn curl_downloads_a_gigabyte_and_uploads_a_part_of_it() {
    let Some(nginx) = Nginx::start() else { return };
    let expected = random_file(&nginx.file("download"), DOWNLOAD);
    let mut proxy = Proxy::to(nginx.address());
    let mut checksum = Checksum::start();
    let sink = checksum.input();
    let mut get = curl(&proxy.address(), "download");
    download(&mut proxy, &mut get, sink, DOWNLOAD);
    assert_eq!(checksum.finish(), expected);

    let file = || File::open(nginx.file("download")).expect("the file").take(UPLOAD);
    let mut put = curl(&proxy.address(), "upload");
    // From stdin, as it comes.
    put.args(["--upload-file", "-"]);
    upload(&mut proxy, &mut put, file(), UPLOAD);
    let uploaded = File::open(nginx.file("upload")).expect("the file is there");
    assert_eq!(uploaded.metadata().expect("stat").len(), UPLOAD);
    assert_eq!(Checksum::of(uploaded), Checksum::of(file()));
    proxy.finish();
}

#[test]
fn a_terminal_keeps_its_shell() {
    let Some(shells) = Shells::start() else { return };
    let mut proxy = Proxy::to(shells.address());
    let mut terminal = Terminal::connect(&proxy.address());
    let shell = terminal.run("echo $$ $(tty)");
    assert!(shell.contains(" /dev/pts/"), "{shell}");
    let mut sum = 0;
    for how in Handover::EACH.into_iter().chain(Handover::EACH) {
        sum += 1;
        terminal.command("sum=$((sum + 1)); echo ready; cat");
        terminal.wait_for_lines("ready", sum);
        terminal.type_in("before\r");
        // Once as it is typed, and once by cat.
        terminal.wait_for_lines("before", 2 * sum);
        proxy.hand_over(how);
        terminal.type_in("after\r");
        terminal.wait_for_lines("after", 2 * sum);
        // Control-C: cat ends, and the shell goes on.
        terminal.type_in("\x03");
        assert_eq!(terminal.run("echo $sum"), sum.to_string(), "{how:?}");
        assert_eq!(terminal.run("echo $$ $(tty)"), shell, "{how:?}");
    }
    terminal.leave();
    proxy.finish();
}

#[test]
fn a_web_socket_carries_messages_both_ways() {
    let seed = Random::seeded().next();
    let progress = Arc::<websocket::Progress>::default();
    let (address, server) = websocket::serve(seed, &progress);
    let mut proxy = Proxy::to(&address);
    let client = websocket::connect(&proxy.address(), seed, &progress);
    for how in Handover::EACH.into_iter().chain(Handover::EACH) {
        let heard = progress.heard();
        wait_for("messages", || {
            assert!(!server.is_finished() && !client.is_finished(), "one has ended before {how:?}");
            progress.heard() >= heard + MESSAGES
        });
        proxy.hand_over(how);
    }
    progress.stop();
    let (client, server) = (join("the client's end", client), join("the server's end", server));
    assert_eq!(client.messages_heard, server.messages_said);
    assert_eq!(server.messages_heard, client.messages_said);
    assert!(client.pongs > 0 && server.pongs > 0, "{client:?} {server:?}");
    proxy.finish();
}

#[test]
fn a_subscriber_of_redis_hears_each_message_once() {
    let Some(redis) = Redis::start() else { return };
    let mut proxy = Proxy::to(redis.address());
    let subscriber = Process::start(redis_cli(&proxy.address()).args(["SUBSCRIBE", "channel"]));
    let mut expected = "subscribe\nchannel\n1\n".to_owned();
    let heard = |expected: &str| {
        wait_for("what is published", || subscriber.stdout_len() >= expected.len());
        assert_same(&subscriber.stdout(), expected.as_bytes());
    };
    heard(&expected);
    let mut publisher = Process::start(&mut redis_cli(&proxy.address()));
    let mut published = 0;
    let mut publish = |expected: &mut String| {
        let next = published + 1000;
        let commands: String =
            (published..next).map(|number| format!("PUBLISH channel {number}\n")).collect();
        publisher.write(commands.as_bytes());
        expected.extend((published..next).map(|number| format!("message\nchannel\n{number}\n")));
        published = next;
    };
    for how in Handover::EACH.into_iter().chain(Handover::EACH) {
        // Those are on their way while it is handed over.
        publish(&mut expected);
        proxy.hand_over(how);
        heard(&expected);
        publish(&mut expected);
        heard(&expected);
    }
    drop(publisher.stdin.take());
    publisher.wait_for_code(0);
    // Each was heard by one, as the publisher is told.
    assert_same(&publisher.stdout(), "1\n".repeat(published).as_bytes());
    proxy.finish();
}

/// Has a client send this, from its stdin, while it is handed over in each way, twice.
#[track_caller]
fn upload(proxy: &mut Proxy, client: &mut Command, what: impl Read + Send + 'static, length: u64) {
    let gate = Arc::<Gate>::default();
    let mut client = Process::start_between(client, Stdio::piped(), Stdio::null());
    let feeder = copy_through(&gate, what, client.stdin.take().expect("a pipe"));
    proxy.hand_over_during(&gate, length, 2);
    drop(join("all is sent", feeder));
    client.wait_for_code(0);
}

/// Has a client receive so much, to its stdout, while it is handed over in each way, twice. Returns where it was put.
#[track_caller]
fn download<W: Write + Send + 'static>(proxy: &mut Proxy, client: &mut Command, to: W, length: u64) -> W {
    let gate = Arc::<Gate>::default();
    let (from, stdout) = std::io::pipe().expect("pipe");
    let mut client = Process::start_between(client, Stdio::null(), stdout);
    let reader = copy_through(&gate, from, to);
    proxy.hand_over_during(&gate, length, 2);
    let to = join("all is received", reader);
    client.wait_for_code(0);
    to
}

/// The lines of a table, of random digits.
fn rows() -> Vec<u8> {
    let mut random = Random::seeded();
    let mut rows = Vec::with_capacity((ROWS * ROW) as usize);
    for _ in 0..ROWS {
        let [a, b, c, d] = std::array::from_fn(|_| random.next());
        writeln!(rows, "{a:016x}{b:016x}{c:016x}{d:016x}").expect("memory takes it");
    }
    rows
}

/// Writes a file of random bytes; its checksum. Without holes, for which no byte would have to be moved.
fn random_file(path: &Path, length: u64) -> String {
    let random = File::open("/dev/urandom").expect("random bytes").take(length);
    std::io::copy(&mut { random }, &mut File::create(path).expect("a file")).expect("it can be written");
    Checksum::of(File::open(path).expect("the file"))
}
