//! `heirloom run` and programs that know nothing of it: a Python server that uses the distribution's python3-systemd, systemd's
//! own systemd-socket-proxyd, and nginx with a socket that was opened for it.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use support::*;

/// Not any other Python: the modules of the distribution's packages belong to this one.
const PYTHON: &str = "/usr/bin/python3";

/// `heirloom run --control PATH OPTIONS -- COMMAND`.
fn run(control: &Path, options: &[&str], command: &[&str]) -> Process {
    let mut run = heirloom();
    run.arg("run").arg("--control").arg(control).args(options).arg("--").args(command);
    Process::start(&mut run)
}

/// The last value that a program has printed behind a word. It is read on a thread of its own: a line that was written before an
/// answer was sent may come to be known after it.
fn told(process: &Process, word: &str) -> Option<u32> {
    let said = process.stdout();
    let said = String::from_utf8_lossy(&said[..said.iter().rposition(|&b| b == b'\n')?]).into_owned();
    let words: Vec<&str> = said.split_whitespace().collect();
    words.windows(2).rev().find(|pair| pair[0] == word)?[1].parse().ok()
}

#[track_caller]
fn wait_told(process: &mut Process, word: &str) -> u32 {
    let mut value = None;
    wait_for(word, || {
        value = told(process, word);
        value.is_some() || !process.is_running()
    });
    value.unwrap_or_else(|| panic!("it has not said {word:?}; stderr:\n{}", process.stderr()))
}

/// Kills it, and waits until it is dead: until then it may take in what it is sent.
fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid.cast_signed()).expect("a pid"), Signal::KILL).expect("it runs");
    wait_for("its end", || proc::has_ended(pid));
}

/// A client that says a line and hears what is answered.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(port: u32) -> Client {
        let stream =
            TcpStream::connect(("127.0.0.1", u16::try_from(port).expect("a port"))).expect("connect");
        stream.set_read_timeout(Some(LONG)).expect("a time limit");
        Client(BufReader::new(stream))
    }

    /// The connection's number, how many lines its server has had from it, and the server's pid.
    fn ask(&mut self) -> [u32; 3] {
        self.0.get_mut().write_all(b"hello\n").expect("send");
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        let numbers: Vec<u32> = line.split_whitespace().map(|word| word.parse().expect("a number")).collect();
        numbers.try_into().unwrap_or_else(|_| panic!("an answer of three numbers, not {line:?}"))
    }
}

fn python_with_systemd() -> bool {
    let found = Command::new(PYTHON).args(["-c", "import systemd.daemon"]).output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        skip("python3-systemd is not installed (apt-get install python3-systemd)");
    }
    found
}

fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(name)
}

#[test]
fn a_python_server_keeps_its_connections_when_it_is_killed_restarted_and_upgraded() {
    if !python_with_systemd() {
        return;
    }
    const CLIENTS: usize = 20;
    let scratch = Scratch::new();
    let control = scratch.path("run.sock");
    let server = program("kept.py");
    let server = server.to_str().expect("UTF-8");
    let mut run = run(&control, &["--listen", "main=127.0.0.1:0"], &[PYTHON, server]);
    let port = wait_told(&mut run, "port");
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| Client::connect(port)).collect();
    let mut pid = wait_told(&mut run, "pid");
    let numbers: Vec<u32> = clients
        .iter_mut()
        .map(|client| {
            let [number, lines, by] = client.ask();
            assert_eq!((lines, by), (1, pid));
            number
        })
        .collect();
    let ask_all = |clients: &mut Vec<Client>, run: &mut Process, pid: &mut u32, how: &str| {
        let answered = clients.iter_mut().zip(&numbers).map(|(client, number)| {
            let [same, lines, by] = client.ask();
            assert_eq!((same, lines), (*number, 1), "{how}");
            assert_ne!(by, *pid, "{how}");
            by
        });
        let answered: Vec<u32> = answered.collect();
        let by = answered[0];
        assert!(answered.iter().all(|&one| one == by), "{how}: by one process, not {answered:?}");
        wait_for("its line", || told(run, "pid") == Some(by));
        *pid = by;
        assert_eq!(told(run, "restored"), Some(CLIENTS as u32), "{how}");
    };
    for _ in 0..5 {
        kill(pid);
        ask_all(&mut clients, &mut run, &mut pid, "after SIGKILL");
    }
    // It knows nothing of takeovers: it is ended, and started again with the store.
    let upgraded =
        heirloom().args(["upgrade", "--control"]).arg(&control).output().expect("heirloom upgrade");
    assert!(upgraded.status.success(), "{upgraded:?}");
    ask_all(&mut clients, &mut run, &mut pid, "after an upgrade");
    let itself = heirloom().args(["upgrade", "--self", "--control"]).arg(&control).output().expect("upgrade");
    assert!(itself.status.success(), "{itself:?}");
    kill(pid);
    ask_all(&mut clients, &mut run, &mut pid, "after run itself was upgraded, and the server killed");

    // A connection that ends is not kept.
    let mut gone = clients.pop().expect("one");
    gone.0.get_mut().shutdown(std::net::Shutdown::Write).expect("shutdown");
    assert_eq!(gone.0.read(&mut [0; 1]).expect("end-of-file"), 0);
    kill(pid);
    wait_for("one less", || told(&run, "restored") == Some(CLIENTS as u32 - 1));
    run.signal(Signal::TERM);
    // The program knows no SIGTERM.
    run.wait_for_code(128 + 15);
    assert_eq!(clients[0].0.read(&mut [0; 1]).expect("end-of-file"), 0, "the store has ended with run");
}

#[test]
fn systemd_socket_proxyd_gets_its_socket() {
    const PROXY: &str = "/lib/systemd/systemd-socket-proxyd";
    if !Path::new(PROXY).is_file() {
        return skip("systemd-socket-proxyd is not there (apt-get install systemd)");
    }
    let backend = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = backend.local_addr().expect("an address").to_string();
    let scratch = Scratch::new();
    let door = scratch.path("door");
    let listen = door.to_str().expect("UTF-8");
    let mut run = run(&scratch.path("run.sock"), &["--listen", listen], &[PROXY, &address]);
    let mut client = None;
    wait_for("a connection", || {
        client = UnixStream::connect(&door).ok();
        client.is_some() || !run.is_running()
    });
    let mut client = client.unwrap_or_else(|| panic!("it has ended; stderr:\n{}", run.stderr()));
    let (mut server, _) = backend.accept().expect("the proxy connects");
    client.write_all(b"through the proxy").expect("send");
    let mut bytes = [0; 17];
    server.read_exact(&mut bytes).expect("receive");
    assert_eq!(&bytes, b"through the proxy");
    run.signal(Signal::TERM);
    run.wait();
}

/// nginx takes sockets by numbers in a variable of its own, which it also uses for its upgrades.
#[test]
fn nginx_serves_at_a_socket_that_was_opened_for_it_and_keeps_it_when_it_is_killed() {
    if !have("nginx") && !Path::new("/usr/sbin/nginx").is_file() {
        return skip("nginx is not installed (apt-get install nginx-light)");
    }
    let scratch = Scratch::new();
    let script = format!(
        r#"set -e
port=$({PYTHON} -c 'import socket; print(socket.socket(fileno=3).getsockname()[1])')
cat >"$1/nginx.conf" <<end
daemon off; worker_processes 1; pid $1/nginx.pid; error_log stderr;
events {{ }}
http {{ access_log off; client_body_temp_path $1/body; proxy_temp_path $1/proxy; fastcgi_temp_path $1/f;
 uwsgi_temp_path $1/u; scgi_temp_path $1/s;
 server {{ listen 127.0.0.1:$port; location / {{ return 200 "it is nginx"; }} }} }}
end
echo port $port pid $$
NGINX='3;' exec /usr/sbin/nginx -c "$1/nginx.conf"
"#
    );
    let directory = scratch.path("");
    let directory = directory.to_str().expect("UTF-8").trim_end_matches('/');
    let options = ["--listen", "127.0.0.1:0"];
    let mut run = run(&scratch.path("run.sock"), &options, &["sh", "-c", &script, "sh", directory]);
    let port = wait_told(&mut run, "port");
    let get = || {
        // The socket is open all the time: who comes while nobody serves waits.
        let mut stream = TcpStream::connect(("127.0.0.1", port as u16)).expect("connect");
        stream.set_read_timeout(Some(LONG)).expect("a time limit");
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("send");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("it is nginx"), "{answer}");
    };
    get();
    let mut master = wait_told(&mut run, "pid");
    for _ in 0..3 {
        let worker = proc::only_child(master);
        kill(master);
        kill(worker);
        get();
        let killed = master;
        wait_for("the next one's line", || {
            master = told(&run, "pid").expect("the line of the one before");
            master != killed
        });
    }
    run.signal(Signal::TERM);
    run.wait();
}
