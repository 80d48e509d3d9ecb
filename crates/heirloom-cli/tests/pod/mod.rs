//! Pods, as Kubernetes makes them, out of namespaces alone: each has a pid, a mount, a user and, if it wants, a network namespace
//! of its own, a read-only root, and one directory that it shares with the other pods of its node.
//!
//! A node is a process that holds a mount and a network namespace, in which the test's own clients are too; nothing of it is to
//! be seen outside, and it ends with the test.

use std::fs::{self, File, Permissions};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use heirloom::control::Status;
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::support::guests::address_of;
use crate::support::proc::{has_ended, only_child, signal};
use crate::support::upgrading::{install, this_program};
use crate::support::{Process, Scratch, have, skip, wait_for};

/// Who the pods of a node are to the node, unless it is said otherwise.
pub(crate) const USER: u32 = 54_321;
/// The control socket, as pods see it.
pub(crate) const CONTROL: &str = "/shared/chat.sock";

/// What makes a pod's root directory.
const ROOT: &str = include_str!("root.sh");
/// Mounts a directory with its users mapped.
const IDMAPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs/idmapped.py");
/// A script begins with this, for the program is not in its PATH.
const HEIRLOOM: &str = "heirloom() { /program \"$@\"; }; ";
/// What a node does until it is let go: it waits for the end of its input.
const HOLD: &str = "mount -t tmpfs tmpfs /run && ip link set lo up && echo ready && exec cat";

/// Where pods run.
pub(crate) struct Node {
    holder: Process,
    scratch: Scratch,
    /// The network in which this thread was before.
    outside: File,
}

impl Node {
    /// Makes a node, whose network this thread enters, and with it the threads and processes that it starts from now on. `None`,
    /// said loudly, where there can be none.
    pub(crate) fn new() -> Option<Node> {
        if !rustix::process::geteuid().is_root() {
            skip("pods are made by root");
            return None;
        }
        let needed = ["unshare", "nsenter", "setpriv", "pivot_root", "ip"];
        if let Some(missing) = needed.into_iter().find(|program| !have(program)) {
            skip(&format!("pods are made with util-linux and iproute2, and {missing} is not there"));
            return None;
        }
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--user", "--map-root-user", "true"]).stderr(Stdio::null());
        let can = command.status().is_ok_and(|status| status.success());
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--propagation=private", "sh", "-c", HOLD]);
        let mut holder = Process::start(&mut command);
        wait_for("the node, or its end", || holder.stdout_len() > 0 || !holder.is_running());
        if !can || !holder.is_running() {
            skip(&format!("no namespaces can be made here: {}", holder.stderr()));
            return None;
        }
        let node = Node { scratch: Scratch::new(), outside: network_of("thread-self"), holder };
        enter(&network_of(&node.holder.id().to_string()));
        // Also for users who are nobody here.
        fs::set_permissions(node.scratch.path(""), Permissions::from_mode(0o711)).expect("chmod");
        node.directory("shared");
        fs::create_dir(node.scratch.path("root")).expect("mkdir");
        install(this_program(), &node.program(), "755");
        Some(node)
    }

    /// Makes a directory for pods.
    pub(crate) fn directory(&self, name: &str) -> PathBuf {
        let path = self.scratch.path(name);
        fs::create_dir(&path).expect("mkdir");
        fs::set_permissions(&path, Permissions::from_mode(0o700)).expect("chmod");
        chown(&path, Some(USER), Some(USER)).expect("chown");
        path
    }

    /// The directory that the pods share, as the node sees it.
    pub(crate) fn shared(&self) -> PathBuf {
        self.scratch.path("shared")
    }

    /// The control socket, as the node sees it.
    pub(crate) fn control(&self) -> PathBuf {
        self.shared().join("chat.sock")
    }

    /// The program, where every user can run it.
    fn program(&self) -> PathBuf {
        self.scratch.path("heirloom")
    }

    /// A network for a pod, with a cable to the node.
    pub(crate) fn network(&self, number: u8) -> Network {
        let network = Network { number };
        self.ip(&format!("netns add pod{number}"));
        self.ip(&format!("link add pod{number} type veth peer name eth0 netns pod{number}"));
        self.ip(&format!("addr add 10.0.{number}.1/24 dev pod{number}"));
        self.ip(&format!("link set pod{number} up"));
        self.ip(&format!("-n pod{number} link set lo up"));
        self.ip(&format!("-n pod{number} addr add {}/24 dev eth0", network.address()));
        self.ip(&format!("-n pod{number} link set eth0 up"));
        network
    }

    /// What the container runtime does at the end of a pod: its network has no name any more.
    pub(crate) fn forget(&self, network: &Network) {
        self.ip(&format!("netns del pod{}", network.number));
    }

    /// What a network plugin does at the end of a pod: the cable is gone.
    pub(crate) fn unplug(&self, network: &Network) {
        self.ip(&format!("link del pod{}", network.number));
    }

    /// Whether there is a way from the node into a pod's network. It goes with the network.
    pub(crate) fn is_plugged(&self, network: &Network) -> bool {
        let links = fs::read_to_string("/proc/thread-self/net/dev").expect("the node's links");
        links.contains(&format!("pod{}:", network.number))
    }

    /// The network of a pod, as long as it has a name.
    pub(crate) fn namespace_of(&self, network: &Network) -> Namespace {
        Namespace::open("net", &self.path_of(network))
    }

    fn path_of(&self, network: &Network) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/run/netns/pod{}", self.holder.id(), network.number))
    }

    fn ip(&self, arguments: &str) {
        let mut command = self.enter_mounts();
        command.arg("ip").args(arguments.split(' '));
        let output = command.stdin(Stdio::null()).output().expect("nsenter can be started");
        assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A command in the node's mount namespace; this thread is in its network already.
    fn enter_mounts(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.holder.id()));
        command
    }

    /// Starts a pod that runs the program with these arguments.
    pub(crate) fn pod(&self, spec: Spec, arguments: &[&str]) -> Pod {
        let mut program = Command::new(self.program());
        program.args(arguments);
        self.pod_of(spec, &program)
    }

    /// Starts a pod that runs a script, to which the program is `heirloom`.
    pub(crate) fn script(&self, spec: Spec, script: &str) -> Pod {
        let script = format!("{HEIRLOOM}{}", script.replace("exec heirloom", "exec /program"));
        self.start(spec, &self.program(), Command::new("sh").args(["-c", &script]))
    }

    /// Starts a pod that runs another program than the one under test.
    pub(crate) fn pod_of(&self, spec: Spec, program: &Command) -> Pod {
        let mut command = Command::new("/program");
        command.args(program.get_args());
        for (name, value) in program.get_envs() {
            command.env(name, value.expect("it is set"));
        }
        self.start(spec, program.get_program().as_ref(), &command)
    }

    /// Starts a pod with a program, that runs a command.
    fn start(&self, spec: Spec, program: &Path, run: &Command) -> Pod {
        let mut command = self.enter_mounts();
        if let Some(network) = spec.network {
            command.arg(format!("--net={}", self.path_of(network).display()));
        }
        command
            .args(["unshare", "--pid", "--mount", "--ipc", "--uts", "--cgroup", "--propagation=private"])
            .args(["--fork", "--kill-child", "sh", "-c", ROOT, "sh"])
            .args([&self.scratch.path("root"), program, &self.shared()])
            .arg(USER.to_string())
            .arg(if spec.idmapped { IDMAPPED } else { "" })
            .arg(spec.own.unwrap_or("".as_ref()))
            .args([spec.host_uid.to_string(), spec.uid.to_string()])
            .arg(run.get_program())
            .args(run.get_args())
            .envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .current_dir("/");
        Pod { process: Process::start(&mut command) }
    }

    /// A server of chat in a pod.
    pub(crate) fn server(&self, spec: Spec, replace: &str) -> Pod {
        self.pod(spec, &["chat", "--listen", "0.0.0.0:0", "--control", CONTROL, "--replace", replace])
    }

    /// Runs the program on the node as a user of it, and waits for its end.
    pub(crate) fn ask_as(&self, uid: u32, command: &[&str]) -> Process {
        let mut asking = Command::new("setpriv");
        asking.args([format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()]);
        asking.arg(self.program()).args(command).arg("--control").arg(self.control());
        let mut asking = Process::start(&mut asking);
        asking.wait();
        asking
    }

    /// What the service says of itself to its user. The node's root is nobody whom it knows.
    pub(crate) fn status(&self) -> Status {
        let mut status = None;
        wait_for("an answer to status", || {
            status = serde_json::from_slice(&self.ask_as(USER, &["status", "--json"]).stdout()).ok();
            status.is_some()
        });
        status.expect("waited for")
    }

    /// Waits until this generation serves, in a pod.
    pub(crate) fn wait_for_generation(&self, generation: u64) -> Status {
        let mut status = self.status();
        wait_for("the next generation", || {
            status = self.status();
            status.generation >= generation
        });
        assert_eq!(status.generation, generation);
        status
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        enter(&self.outside);
    }
}

/// A network namespace of a pod's own.
pub(crate) struct Network {
    number: u8,
}

impl Network {
    /// The pod, as its node reaches it.
    pub(crate) fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, self.number, 2)
    }
}

/// What is particular to a pod.
#[derive(Clone, Copy)]
pub(crate) struct Spec<'a> {
    /// Its own network; the node's otherwise.
    pub(crate) network: Option<&'a Network>,
    /// Who its user is to the node.
    pub(crate) host_uid: u32,
    /// Who its user is to itself.
    pub(crate) uid: u32,
    /// What is [`USER`]'s in the shared directory is its own to it, whoever it is to the node.
    pub(crate) idmapped: bool,
    /// A directory of its own, which outlives its processes.
    pub(crate) own: Option<&'a Path>,
}

impl Default for Spec<'_> {
    fn default() -> Self {
        Spec { network: None, host_uid: USER, uid: 1000, idmapped: false, own: None }
    }
}

/// A running pod: the `unshare` that waits for its first process.
pub(crate) struct Pod {
    pub(crate) process: Process,
}

impl Pod {
    /// Its first process, as the node calls it, once that runs its own program.
    pub(crate) fn init(&self) -> u32 {
        let init = only_child(self.process.id());
        wait_for("the pod's program", || {
            fs::read_link(format!("/proc/{init}/exe")).is_ok_and(|program| program.ends_with("program"))
                || has_ended(init)
        });
        init
    }

    /// Where its server listens, as the node reaches it.
    pub(crate) fn address(&self, network: Option<&Network>) -> SocketAddr {
        let address = network.map_or(Ipv4Addr::LOCALHOST, Network::address);
        wait_for("the server to listen", || {
            assert!(!has_ended(self.process.id()), "{}", self.process.stderr());
            self.process.stderr().contains("listening address=")
        });
        SocketAddr::new(address.into(), address_of(&self.process).port())
    }

    /// Sends a signal to its first process.
    pub(crate) fn signal(&self, what: Signal) {
        signal(self.init(), what);
    }

    /// Runs a script in it as its user, to which the program is `heirloom`, and waits for its end.
    pub(crate) fn exec(&self, spec: Spec, script: &str) -> Process {
        let mut entering = Command::new("nsenter");
        entering.arg(format!("--target={}", self.init())).args(["--mount", "--pid", "--net", "setpriv"]);
        entering.args([format!("--reuid={}", spec.host_uid), format!("--regid={}", spec.host_uid)]);
        entering.args(["--clear-groups", "sh", "-c", &format!("{HEIRLOOM}{script}")]);
        let mut entered = Process::start(&mut entering);
        entered.wait();
        entered
    }

    /// Its own namespaces, but for its network.
    pub(crate) fn namespaces(&self) -> Vec<Namespace> {
        let init = self.init();
        let of = |process: &str, kind| Namespace::open(kind, format!("/proc/{process}/ns/{kind}").as_ref());
        let own = |kind| {
            let own = of(&init.to_string(), kind);
            assert_ne!(own.name, of("self", kind).name, "it is the node's");
            own
        };
        ["pid", "mnt", "user"].into_iter().map(own).collect()
    }
}

/// A namespace, held open, so that no other one gets its number.
pub(crate) struct Namespace {
    kind: &'static str,
    /// As it is called in `/proc`.
    name: PathBuf,
    _held: File,
}

impl Namespace {
    fn open(kind: &'static str, path: &Path) -> Namespace {
        let held = File::open(path).expect("the namespace is there");
        let name = format!("{kind}:[{}]", held.metadata().expect("fstat").ino()).into();
        Namespace { kind, name, _held: held }
    }

    /// Fails if a process is in it.
    #[track_caller]
    pub(crate) fn assert_empty(&self) {
        let in_it = |process: &Path| {
            fs::read_link(process.join("ns").join(self.kind)).is_ok_and(|name| name == self.name)
        };
        let processes =
            fs::read_dir("/proc").expect("/proc").filter_map(|process| Some(process.ok()?.path()));
        let left: Vec<_> = processes.filter(|process| in_it(process)).collect();
        assert!(left.is_empty(), "in {}: {left:?}", self.name.display());
    }
}

fn network_of(process: &str) -> File {
    File::open(format!("/proc/{process}/ns/net")).expect("it has a network")
}

fn enter(network: &File) {
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
}
