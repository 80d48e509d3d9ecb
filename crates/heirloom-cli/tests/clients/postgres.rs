//! A PostgreSQL cluster of its own, and psql.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::process::Signal;

use super::{host_and_port, start_on_a_free_port};
use crate::support::{Process, Scratch, have, skip, wait_for};

/// Whom the server runs as where the tests are root's, whom it refuses.
const USER: &str = "postgres";

/// A server with an empty database, at a port and at a UNIX socket.
pub(crate) struct Postgres {
    server: Process,
    address: String,
    directory: PathBuf,
    _scratch: Scratch,
}

impl Postgres {
    /// Makes the cluster and starts the server, or skips the test.
    pub(crate) fn start() -> Option<Postgres> {
        let Some(programs) = programs() else {
            skip("PostgreSQL is not installed (apt-get install postgresql)");
            return None;
        };
        let scratch = Scratch::new();
        scratch.open_to_others();
        let directory = scratch.path("pg");
        std::fs::create_dir(&directory).expect("mkdir");
        if let Some((user, group)) = other_user() {
            chown(&directory, Some(user), Some(group)).expect("chown");
        }
        let data = directory.join("data");
        let mut initdb = as_other_user(&programs.join("initdb"), &directory);
        initdb.args([
            "--auth",
            "trust",
            "--username",
            USER,
            "--encoding",
            "UTF8",
            "--locale",
            "C",
            "--no-sync",
            "-D",
        ]);
        let made = initdb.arg(&data).output().expect("initdb can be started");
        assert!(made.status.success(), "initdb:\n{}", String::from_utf8_lossy(&made.stderr));
        let (server, address) = start_on_a_free_port(|port| {
            let mut postgres = as_other_user(&programs.join("postgres"), &directory);
            postgres.arg("-D").arg(&data).args(["-F", "-c", "listen_addresses=127.0.0.1", "-c"]);
            postgres.arg(format!("unix_socket_directories={}", directory.display()));
            postgres.args(["-p", &port.to_string()]);
            postgres
        });
        let postgres = Postgres { server, address, directory, _scratch: scratch };
        wait_for("a server that is ready", || postgres.try_ask("SELECT 1").status.success());
        Some(postgres)
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Its UNIX socket.
    pub(crate) fn unix_socket(&self) -> PathBuf {
        self.directory.join(format!(".s.PGSQL.{}", host_and_port(&self.address).1))
    }

    /// Asks the server itself.
    #[track_caller]
    pub(crate) fn ask(&self, sql: &str) -> Vec<u8> {
        let output = self.try_ask(sql);
        assert!(output.status.success(), "{sql}:\n{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn try_ask(&self, sql: &str) -> Output {
        psql(&self.address).args(["-c", sql]).output().expect("psql can be started")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Killed, it would leave shared memory behind.
        if self.server.is_running() {
            self.server.signal(Signal::QUIT);
            self.server.wait_for_exit();
        }
    }
}

/// `psql` at this address, as it is in scripts.
pub(crate) fn psql(address: &str) -> Command {
    let (host, port) = host_and_port(address);
    let mut command = Command::new("psql");
    command.args([
        "-X",
        "-q",
        "-A",
        "-t",
        "-v",
        "ON_ERROR_STOP=1",
        "-U",
        USER,
        "-h",
        host,
        "-p",
        port,
        "postgres",
    ]);
    for variable in ["PGOPTIONS", "PGSERVICE", "PGSSLMODE", "PGDATABASE", "PGPASSFILE"] {
        command.env_remove(variable);
    }
    command
}

/// A psql in which statement after statement is typed.
pub(crate) struct Session {
    psql: Process,
    /// How many statements have been typed.
    typed: usize,
    /// How much of what it has written has been read.
    read: usize,
}

impl Session {
    pub(crate) fn start(address: &str) -> Session {
        Session { psql: Process::start(&mut psql(address)), typed: 0, read: 0 }
    }

    /// Types a statement.
    pub(crate) fn say(&mut self, sql: &str) {
        self.typed += 1;
        let line = format!("{sql};\n\\echo {}\n", mark(self.typed));
        self.psql.write(line.as_bytes());
    }

    /// The answer to the last statement.
    #[track_caller]
    pub(crate) fn answer(&mut self) -> String {
        let end = format!("{}\n", mark(self.typed));
        let mut answer = String::new();
        wait_for("an answer to a statement", || {
            answer = String::from_utf8(self.psql.stdout().split_off(self.read)).expect("text");
            assert!(self.psql.is_running(), "psql has ended: {}", self.psql.stderr());
            answer.ends_with(&end)
        });
        self.read += answer.len();
        answer.truncate(answer.len() - end.len());
        answer.trim_end().to_owned()
    }

    #[track_caller]
    pub(crate) fn ask(&mut self, sql: &str) -> String {
        self.say(sql);
        self.answer()
    }

    /// Ends it.
    pub(crate) fn quit(mut self) {
        drop(self.psql.stdin.take());
        self.psql.wait_for_code(0);
        assert_eq!(self.psql.stderr(), "");
    }
}

fn mark(number: usize) -> String {
    format!("answered {number}")
}

/// Where the programs are: Debian has those of the server in a directory for each version.
fn programs() -> Option<PathBuf> {
    if !have("psql") || (rustix::process::geteuid().is_root() && other_user().is_none()) {
        return None;
    }
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let debian = versions.filter_map(|version| Some(version.ok()?.path().join("bin")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut all = debian.chain(std::env::split_paths(&path));
    all.find(|programs| ["initdb", "postgres"].iter().all(|program| programs.join(program).is_file()))
}

/// Whom it runs as, unless that is the user of the tests.
fn other_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    let user = users.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|user| user[0] == USER)?;
    Some((user[2].parse().ok()?, user[3].parse().ok()?))
}

fn as_other_user(program: &Path, directory: &Path) -> Command {
    let mut command = match other_user() {
        None => Command::new(program),
        Some((user, group)) => {
            let mut command = Command::new("setpriv");
            command.args([format!("--reuid={user}"), format!("--regid={group}")]);
            command.args(["--clear-groups", "--"]).arg(program);
            command
        }
    };
    // It may not be allowed to look at where the tests run.
    command.current_dir(directory);
    command
}
