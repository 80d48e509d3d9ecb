//! A real systemd, as PID 1 of namespaces of its own (`scripts/systemd-box.sh`), with this project's units and program in it.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{LONG, Process, Scratch, have, skip, status, try_status, wait_for};

/// Where the units listen as they are.
const AS_SHIPPED: &str = "127.0.0.1:31337";
/// The exit code of the box where there can be none.
const UNABLE: i32 = 77;

/// A box that is booted: this machine's systemd, or that of the system that `HEIRLOOM_SYSTEMD_ROOT` says (`CONTRIBUTING.md`); it is taken down when it goes out of scope, or when this process ends.
pub(crate) struct Systemd {
    /// It runs a program that ends with its stdin.
    script: Process,
    /// The PID of that systemd, out here.
    pid: u32,
    /// The address at which units listen here: no other box has it.
    pub(crate) address: SocketAddr,
    share: Scratch,
}

impl Systemd {
    /// Boots one. `None`, said loudly, where that cannot be.
    pub(crate) fn boot() -> Option<Systemd> {
        Systemd::boot_with(&[])
    }

    /// Boots one with a network of its own, which this thread enters.
    pub(crate) fn boot_with_network() -> Option<Systemd> {
        let systemd = Systemd::boot_with(&["--private-network"])?;
        let network = std::fs::File::open(format!("/proc/{}/ns/net", systemd.pid)).expect("it has one");
        let kind = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(network.as_fd(), kind).expect("we are root");
        Some(systemd)
    }

    fn boot_with(options: &[&str]) -> Option<Systemd> {
        if !have("unshare") || !Path::new("/lib/systemd/systemd").exists() {
            skip("no systemd is installed");
            return None;
        }
        let share = Scratch::new();
        share.open_to_others();
        let program = share.path("heirloom");
        // A link, unless it is on another file system.
        std::fs::hard_link(env!("CARGO_BIN_EXE_heirloom"), &program)
            .or_else(|_| std::fs::copy(env!("CARGO_BIN_EXE_heirloom"), &program).map(drop))
            .expect("the program");
        let pid_file = share.path("pid");
        let mut command = Command::new(repository("scripts/systemd-box.sh"));
        if let Some(root) = std::env::var_os("HEIRLOOM_SYSTEMD_ROOT") {
            command.arg("--root").arg(root);
        }
        command.args(options).arg("--share").arg(share.path("")).arg("--pid-file").arg(&pid_file).arg("cat");
        let mut script = Process::start(&mut command);
        wait_for("systemd to boot", || pid_file.exists() || !script.is_running());
        if !pid_file.exists() {
            assert_eq!(script.wait().code(), Some(UNABLE), "{}", script.stderr());
            skip(&script.stderr());
            return None;
        }
        let pid = std::fs::read_to_string(&pid_file).expect("it is there").trim().parse().expect("a pid");
        let systemd = Systemd { script, pid, address: own_address(), share };
        systemd.run(&["ln", "-s", "/share/heirloom", "/usr/local/bin/heirloom"]);
        Some(systemd)
    }

    /// Installs units of this project, that listen at [`Systemd::address`].
    pub(crate) fn install(&self, units: &[&str]) {
        self.install_for(self.address, units);
    }

    /// Installs units of this project, that listen at or connect to this address.
    pub(crate) fn install_for(&self, address: SocketAddr, units: &[&str]) {
        for unit in units {
            let shipped = std::fs::read_to_string(repository("units").join(unit)).expect("a unit");
            assert!(shipped.contains(AS_SHIPPED), "{unit}");
            self.write_unit(unit, &shipped.replace(AS_SHIPPED, &address.to_string()));
        }
        self.ctl(&["daemon-reload"]);
    }

    /// Installs a unit of this project that does not say itself where it listens.
    pub(crate) fn install_as_shipped(&self, unit: &str) {
        let shipped = std::fs::read_to_string(repository("units").join(unit)).expect("a unit");
        assert!(!shipped.contains(AS_SHIPPED), "{unit}");
        self.write_unit(unit, &shipped);
        self.ctl(&["daemon-reload"]);
    }

    /// Adds settings to a unit.
    pub(crate) fn drop_in(&self, unit: &str, settings: &str) {
        let directory = format!("{unit}.d");
        std::fs::create_dir_all(self.path("/etc/systemd/system").join(&directory)).expect("mkdir");
        self.write_unit(&format!("{directory}/test.conf"), settings);
        self.ctl(&["daemon-reload"]);
    }

    fn write_unit(&self, unit: &str, contents: &str) {
        std::fs::write(self.path("/etc/systemd/system").join(unit), contents).expect("a unit file");
    }

    /// What a path inside is called out here.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.pid))
    }

    /// A file of the directory that is /share inside.
    pub(crate) fn shared(&self, name: &str) -> PathBuf {
        self.share.path(name)
    }

    /// A command inside, outside of all units.
    pub(crate) fn command(&self, command: &[&str]) -> Command {
        let mut inside = Command::new("nsenter");
        inside.args(["--all", "--root", "--wd", "--target", &self.pid.to_string(), "env", "-i"]);
        inside.args(["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/root", "SYSTEMD_COLORS=0"]);
        inside.args(command);
        inside
    }

    /// Runs a command inside to its end.
    pub(crate) fn output(&self, command: &[&str]) -> Output {
        self.command(command).stdin(Stdio::null()).output().expect("nsenter")
    }

    /// Runs a command inside that has to succeed, and returns what it prints.
    #[track_caller]
    pub(crate) fn run(&self, command: &[&str]) -> String {
        let output = self.output(command);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "{command:?}: {}\n{}\n{}",
            output.status,
            text(&output.stderr),
            text(&self.output(&["journalctl", "--no-pager", "-n", "40"]).stdout)
        );
        text(&output.stdout)
    }

    /// `systemctl`, which has to succeed.
    #[track_caller]
    pub(crate) fn ctl(&self, arguments: &[&str]) {
        self.run(&[&["systemctl"], arguments].concat());
    }

    /// Which systemd it is.
    pub(crate) fn version(&self) -> u32 {
        let said = self.run(&["systemctl", "--version"]);
        said.split_whitespace().nth(1).and_then(|version| version.parse().ok()).expect("a version")
    }

    /// What the journal has of a unit.
    pub(crate) fn journal(&self, unit: &str) -> String {
        self.run(&["journalctl", "--sync"]);
        self.run(&["journalctl", "--no-pager", "-u", unit])
    }

    /// Properties of a unit, one a line, in the order of systemd's own.
    #[track_caller]
    pub(crate) fn property(&self, unit: &str, name: &str) -> String {
        self.run(&["systemctl", "show", unit, "-P", name]).trim().to_owned()
    }

    /// The unit's main process, as it is called inside.
    pub(crate) fn main_pid(&self, unit: &str) -> u32 {
        self.property(unit, "MainPID").parse().expect("a pid")
    }

    /// How many descriptors systemd stores for a unit.
    pub(crate) fn stored(&self, unit: &str) -> usize {
        self.property(unit, "NFileDescriptorStore").parse().expect("a number")
    }

    /// The processes of a unit, as they are called inside.
    pub(crate) fn processes(&self, unit: &str) -> Vec<u32> {
        let list = self.path(&format!("/sys/fs/cgroup/system.slice/{unit}/cgroup.procs"));
        let list = std::fs::read_to_string(list).unwrap_or_default();
        // The reader is in another pid namespace; there is one cgroup and one namespace for all of them.
        list.split_whitespace().filter_map(|pid| self.inside(pid.parse().ok()?)).collect()
    }

    /// What a process out here is called inside (proc_pid_status(5)).
    fn inside(&self, pid: u32) -> Option<u32> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        line.split_whitespace().next_back()?.parse().ok()
    }

    /// Kills a unit's main process.
    pub(crate) fn kill_main(&self, unit: &str) {
        self.ctl(&["kill", "--signal=KILL", "--kill-who=main", unit]);
    }

    /// Waits until the unit is active, its only process is the one that serves at this control socket, and systemd takes that for
    /// the main one.
    pub(crate) fn wait_until_settled(&self, unit: &str, control: &Path) {
        wait_for(&format!("{unit} to be active, with the process that serves"), || {
            self.property(unit, "ActiveState") == "active"
                && try_status(control).is_some_and(|status| {
                    status.pid == self.main_pid(unit) && self.processes(unit) == [status.pid]
                })
        });
        assert_eq!(self.main_pid(unit), status(control).pid);
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let journal = self.output(&["journalctl", "--no-pager", "-n", "200"]);
            eprintln!("{}", String::from_utf8_lossy(&journal.stdout));
        }
        // It takes everything down; killed, it could not.
        drop(self.script.stdin.take());
        let give_up = Instant::now() + LONG;
        while self.script.is_running() && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A file of the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// An address of the loopback interface that no other box of this machine has.
fn own_address() -> SocketAddr {
    static BOXES: AtomicU8 = AtomicU8::new(0);
    let [.., high, low] = std::process::id().to_be_bytes();
    let port = 31337;
    SocketAddr::from(([127, 64 + BOXES.fetch_add(1, Ordering::Relaxed), high, low], port))
}
