//! The proxies that are compared, how each is started and how it is told to hand over.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::ValueEnum;

/// More connections than any suite has, and few enough that their descriptors, and the pipes that HAProxy wants, are within
/// the usual limit of 20,000.
const MOST_CONNECTIONS: usize = 7000;
/// Where Debian has nginx's stream module.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// One of the proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Contender {
    /// This project's
    Heirloom,
    /// With `--pin-threads`; steady state only
    HeirloomPinned,
    /// As it comes: it copies
    Haproxy,
    /// With `option splice-request` and `splice-response`; steady state only
    HaproxySplice,
    /// As it comes, with buffers of 16 KiB
    Nginx,
    /// With buffers of 64 KiB; steady state only
    NginxLarge,
}

impl Contender {
    /// Its name in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Contender::Heirloom => "heirloom",
            Contender::HeirloomPinned => "heirloom pinned",
            Contender::Haproxy => "haproxy",
            Contender::HaproxySplice => "haproxy splice",
            Contender::Nginx => "nginx",
            Contender::NginxLarge => "nginx 64k",
        }
    }

    /// Whether it hands over as another one does, so that only its steady state is worth a look.
    pub(crate) fn differs_in_relaying_only(self) -> bool {
        matches!(self, Contender::HeirloomPinned | Contender::HaproxySplice | Contender::NginxLarge)
    }

    /// Whether it is this project's.
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Contender::Heirloom | Contender::HeirloomPinned)
    }

    pub(crate) fn is_nginx(self) -> bool {
        matches!(self, Contender::Nginx | Contender::NginxLarge)
    }

    /// How many processes it takes to serve.
    pub(crate) fn processes(self, threads: usize) -> usize {
        match self {
            Contender::Heirloom | Contender::HeirloomPinned => 1,
            // A master and a worker with so many threads.
            Contender::Haproxy | Contender::HaproxySplice => 2,
            // A master and so many workers.
            Contender::Nginx | Contender::NginxLarge => 1 + threads,
        }
    }

    /// Its program, if it is here; else what to do about it.
    pub(crate) fn program(self) -> Result<PathBuf, String> {
        let (program, needed) = match self {
            Contender::Heirloom | Contender::HeirloomPinned => {
                let beside =
                    std::env::current_exe().map_err(|error| error.to_string())?.with_file_name("heirloom");
                let build = if cfg!(debug_assertions) { "cargo build" } else { "cargo build --release" };
                return match beside.exists() {
                    true => Ok(beside),
                    false => {
                        Err(format!("there is no {}: build it, `{build} -p heirloom-cli`", beside.display()))
                    }
                };
            }
            Contender::Haproxy | Contender::HaproxySplice => ("/usr/sbin/haproxy", "/usr/sbin/haproxy"),
            Contender::Nginx | Contender::NginxLarge => ("/usr/sbin/nginx", STREAM_MODULE),
        };
        for path in [program, needed] {
            if !Path::new(path).exists() {
                return Err(format!(
                    "there is no {path} (apt-get install haproxy nginx-core libnginx-mod-stream)"
                ));
            }
        }
        Ok(program.into())
    }

    /// A command that starts its program, and ends at once.
    pub(crate) fn mere_start(self) -> anyhow::Result<Command> {
        let mut command = Command::new(self.program().map_err(anyhow::Error::msg)?);
        command.arg(if self.is_ours() { "--version" } else { "-v" });
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(command)
    }

    /// Writes its configuration into the directory, which is its own, and says with which arguments it is to be started.
    pub(crate) fn configure(
        self,
        directory: &Path,
        listen: SocketAddr,
        to: SocketAddr,
        threads: usize,
    ) -> anyhow::Result<Vec<OsString>> {
        let path = |name: &str| directory.join(name);
        let arguments: Vec<OsString> = match self {
            Contender::Heirloom | Contender::HeirloomPinned => {
                let [listen, to, threads] = [listen.to_string(), to.to_string(), threads.to_string()];
                let mut arguments: Vec<OsString> =
                    ["proxy", "--listen", &listen, "--to", &to, "--threads", &threads, "--control"]
                        .map(OsString::from)
                        .into();
                arguments.push(control(directory).into());
                if self == Contender::HeirloomPinned {
                    arguments.push("--pin-threads".into());
                }
                arguments
            }
            Contender::Haproxy | Contender::HaproxySplice => {
                let options = match self {
                    // `splice-auto` hardly ever does.
                    Contender::HaproxySplice => " option splice-request\n option splice-response\n",
                    _ => "",
                };
                let stats = path("stats.sock");
                std::fs::write(
                    path("haproxy.cfg"),
                    format!(
                        "global\n nbthread {threads}\n maxconn {MOST_CONNECTIONS}\n \
                         stats socket {} mode 600 level admin expose-fd listeners\n\
                         defaults\n mode tcp\n{options} timeout connect 5s\n timeout client 1h\n timeout server 1h\n\
                         frontend f\n bind {listen}\n default_backend b\n\
                         backend b\n server s {to}\n",
                        stats.display()
                    ),
                )?;
                vec!["-W".into(), "-f".into(), path("haproxy.cfg").into()]
            }
            Contender::Nginx | Contender::NginxLarge => {
                let size = if self == Contender::NginxLarge { "proxy_buffer_size 64k;" } else { "" };
                let connections = 2 * MOST_CONNECTIONS;
                // It ignores the signal to upgrade unless it has become a daemon.
                std::fs::write(
                    path("nginx.conf"),
                    format!(
                        "load_module {STREAM_MODULE};\ndaemon on;\nworker_processes {threads};\npid {};\n\
                         error_log {} notice;\nevents {{ worker_connections {connections}; }}\n\
                         stream {{ {size} server {{ listen {listen}; proxy_timeout 1h; proxy_pass {to}; }} }}\n",
                        nginx_pid(directory).display(),
                        path("log").display(),
                    ),
                )?;
                vec!["-c".into(), path("nginx.conf").into()]
            }
        };
        Ok(arguments)
    }
}

/// The control socket of a `heirloom proxy` in this directory.
pub(crate) fn control(directory: &Path) -> PathBuf {
    directory.join("control.sock")
}

/// The file in which an nginx in this directory says which process is its master.
pub(crate) fn nginx_pid(directory: &Path) -> PathBuf {
    directory.join("nginx.pid")
}
