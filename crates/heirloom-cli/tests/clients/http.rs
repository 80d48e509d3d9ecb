//! nginx, which serves and takes files, and curl.

use std::path::PathBuf;
use std::process::Command;

use super::start_on_a_free_port;
use crate::support::{Process, Scratch, have, skip};

/// A server of the files in a directory.
pub(crate) struct Nginx {
    _server: Process,
    address: String,
    scratch: Scratch,
}

impl Nginx {
    /// Starts it, or skips the test.
    pub(crate) fn start() -> Option<Nginx> {
        const PROGRAM: &str = "/usr/sbin/nginx";
        if !have("curl") || !std::path::Path::new(PROGRAM).is_file() {
            skip("curl or nginx is not installed (apt-get install curl nginx-light)");
            return None;
        }
        let scratch = Scratch::new();
        let (config, files) = (scratch.path("nginx.conf"), scratch.path("files"));
        std::fs::create_dir(&files).expect("mkdir");
        let (server, address) = start_on_a_free_port(|port| {
            let at = |name| scratch.path(name).display().to_string();
            let text = format!(
                "daemon off; master_process off; pid {pid}; error_log stderr; events {{ }}
http {{ access_log off; client_body_temp_path {body}; proxy_temp_path {proxy}; fastcgi_temp_path {fastcgi};
 uwsgi_temp_path {uwsgi}; scgi_temp_path {scgi}; client_max_body_size 0;
 server {{ listen 127.0.0.1:{port}; root {files}; dav_methods PUT; }} }}\n",
                pid = at("pid"),
                body = at("body"),
                proxy = at("proxy"),
                fastcgi = at("fastcgi"),
                uwsgi = at("uwsgi"),
                scgi = at("scgi"),
                files = files.display(),
            );
            std::fs::write(&config, text).expect("write");
            let mut nginx = Command::new(PROGRAM);
            nginx.arg("-e").arg("stderr").arg("-c").arg(&config);
            nginx
        });
        Some(Nginx { _server: server, address, scratch })
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Where the file is that is served under this name.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.scratch.path("files").join(name)
    }
}

/// `curl` of this name at an address.
pub(crate) fn curl(address: &str, name: &str) -> Command {
    let mut command = Command::new("curl");
    // Not what a user has configured, and no other proxy.
    command.args(["--disable", "--silent", "--show-error", "--fail", "--noproxy", "*"]);
    command.arg(format!("http://{address}/{name}"));
    command
}
