use std::fs;
use std::io::Read;
use std::sync::Mutex;

use rustix::fs::{CWD, FileType, Mode, fcntl_getfl, mknodat};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use super::super::queue::CAPACITY;
use super::super::record::End;
use super::*;

/// How long anything may take on a loaded machine.
const LONG: Duration = Duration::from_secs(60);

fn record(client: &str, number: u64) -> AccessRecord {
    AccessRecord {
        unix_ms: 0,
        client: client.to_owned(),
        listener: "web".into(),
        backend: Some("b".into()),
        end: End::Closed,
        from_client: number,
        from_backend: 0,
        connect: Some(Duration::ZERO),
        duration: Duration::ZERO,
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < give_up, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// What was said in the program's log about the access logs, by all tests.
static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps what is said.
struct Listening;

impl Subscriber for Listening {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(String::new());
        event.record(&mut fields);
        SAID.lock().unwrap().push(fields.0);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!("{field}={value:?} ");
    }
}

/// Begins to keep what is said, in all tests of this program.
fn listen() {
    // If another test was faster, there is one that listens.
    let _ = tracing::subscriber::set_global_default(Listening);
}

/// How often something was said about this log.
fn said(log: &str, what: &str) -> usize {
    SAID.lock().unwrap().iter().filter(|line| line.contains(log) && line.contains(what)).count()
}

/// The numbers of the lines of this client, which are to be whole.
fn numbers(text: &str, client: &str) -> Vec<u64> {
    assert!(text.is_empty() || text.ends_with('\n'));
    let of_client = text.lines().filter(|line| line.split(' ').nth(1) == Some(client));
    of_client
        .map(|line| {
            let number = line.split("from_client=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
            let number = number.parse().unwrap();
            assert_eq!(format!("{line}\n"), record(client, number).line(AccessFormat::Text));
            number
        })
        .collect()
}

fn to_file(path: &std::path::Path) -> AccessWriter {
    AccessWriter::open(&AccessLog { path: Some(path.to_owned()), format: AccessFormat::Text }).unwrap()
}

#[test]
fn every_line_of_several_loops_and_processes_arrives_whole_and_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.log");
    fs::write(&path, "what was there\n").unwrap();
    // As two processes have it in a handover: two descriptions of one file.
    let writers = [to_file(&path), to_file(&path)];
    let clients = ["a", "b", "c", "d"];
    thread::scope(|scope| {
        for (index, client) in clients.iter().enumerate() {
            let writer = &writers[index % 2];
            scope.spawn(move || {
                for number in 0..10_000 {
                    wait_for("room", || writer.submit(record(client, number)));
                }
            });
        }
    });
    for writer in writers {
        assert!(writer.close(LONG));
    }
    let text = fs::read_to_string(&path).unwrap();
    let text = text.strip_prefix("what was there\n").unwrap();
    assert_eq!(text.lines().count(), 40_000);
    for client in clients {
        assert!(numbers(text, client).into_iter().eq(0..10_000), "{client}");
    }
}

#[test]
fn a_flush_waits_for_what_was_taken_in() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.log");
    let writer = to_file(&path);
    assert!(writer.flush(Duration::ZERO), "there is nothing to wait for");
    for number in 0..100 {
        assert!(writer.submit(record("a", number)));
        assert!(writer.flush(LONG));
        assert_eq!(numbers(&fs::read_to_string(&path).unwrap(), "a").len() as u64, number + 1);
    }
    assert_eq!(writer.dropped(), 0);
    // Without being asked, too.
    assert!(writer.submit(record("b", 0)));
    wait_for("a line", || fs::read_to_string(&path).unwrap().contains(" b web "));
}

#[test]
fn a_reader_that_sleeps_costs_lines_beyond_the_queue_and_no_waiting() {
    let (mut reader, pipe) = io::pipe().unwrap();
    let shared = pipe.try_clone().unwrap();
    let writer = AccessWriter::to(pipe.into(), "stdout".into(), AccessFormat::Text).unwrap();
    // More than the pipe, the thread and the queue have room for together. This ends, though nobody reads.
    let taken =
        (0..4 * CAPACITY as u64).filter(|number| writer.submit(record("a", *number))).collect::<Vec<_>>();
    assert!((CAPACITY..4 * CAPACITY).contains(&taken.len()), "{}", taken.len());
    assert_eq!(writer.dropped(), (4 * CAPACITY - taken.len()) as u64);
    assert!(!writer.flush(Duration::from_millis(10)));
    let flags = fcntl_getfl(&shared).unwrap();
    assert!(!flags.contains(OFlags::NONBLOCK), "stdout is shared");
    drop(shared);

    let reading = thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).map(|_| text)
    });
    assert!(writer.close(LONG));
    assert_eq!(numbers(&reading.join().unwrap().unwrap(), "a"), taken);
}

#[test]
fn nobody_is_waited_for_beyond_the_deadline() {
    listen();
    let (reader, pipe) = io::pipe().unwrap();
    let writer = AccessWriter::to(pipe.into(), "sleeping".into(), AccessFormat::Text).unwrap();
    for number in 0..CAPACITY as u64 {
        writer.submit(record("a", number));
    }
    let queue = writer.queue.clone();
    assert!(!writer.close(Duration::from_millis(10)));
    // The thread ends by itself, and what it has not written counts as dropped.
    wait_for("the thread's end", || queue.dropped() > 0);
    wait_for("the last words", || said("log=\"sleeping\"", "were dropped") == 1);
    drop(reader);
}

#[test]
fn a_full_disk_ends_nothing() {
    let writer = to_file(std::path::Path::new("/dev/full"));
    let taken = (0..3 * CAPACITY as u64).filter(|number| writer.submit(record("a", *number))).count();
    assert!((CAPACITY..3 * CAPACITY).contains(&taken), "{taken}");
    assert!(!writer.flush(Duration::from_millis(10)));
    let queue = writer.queue.clone();
    drop(writer);
    wait_for("the thread's end", || queue.dropped() == 3 * CAPACITY as u64);
}

#[test]
fn an_error_is_said_once_and_then_the_lines_that_wait_are_written() {
    listen();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let name = path.display().to_string();
    let log = AccessLog { path: Some(path.clone()), format: AccessFormat::Text };
    let error = AccessWriter::open(&log).unwrap_err().to_string();
    assert!(error.contains("cannot open the access log"), "nobody reads it: {error}");

    let open =
        || OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(&path).unwrap();
    let reader = open();
    let writer = to_file(&path);
    drop(reader);
    assert!(writer.submit(record("a", 1)));
    wait_for("an error", || said(&name, "cannot write the access log: Broken pipe") > 0);
    // Each flush is another try.
    for _ in 0..5 {
        assert!(!writer.flush(Duration::from_millis(10)), "nobody reads it");
    }
    assert_eq!(said(&name, "cannot write"), 1);
    assert_eq!(said(&name, "written again"), 0);
    let mut reader = open();
    assert!(writer.submit(record("a", 2)));
    assert!(writer.close(LONG));
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(numbers(&text, "a"), [1, 2]);
    assert_eq!(said(&name, "written again"), 1);
    assert_eq!(said(&name, "were dropped"), 0);
}

#[test]
fn a_log_that_was_moved_away_is_written_on_until_it_is_opened_anew() {
    let directory = tempfile::tempdir().unwrap();
    let (path, moved) = (directory.path().join("a.log"), directory.path().join("a.log.1"));
    let before = to_file(&path);
    fs::rename(&path, &moved).unwrap();
    let after = to_file(&path);
    assert!(before.submit(record("a", 1)) && after.submit(record("a", 2)));
    assert!(before.close(LONG) && after.close(LONG));
    assert_eq!(numbers(&fs::read_to_string(&moved).unwrap(), "a"), [1]);
    assert_eq!(numbers(&fs::read_to_string(&path).unwrap(), "a"), [2]);
}
