//! A chat server, and its clients as the test plays them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use rustix::net::sockopt::set_socket_recv_buffer_size;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

use super::{LONG, Process, heirloom, wait_for};

/// `heirloom chat --listen ADDRESS --control PATH` and further options.
pub(crate) fn listening(address: &str, control: &Path, options: &[&str]) -> Command {
    let mut command = heirloom();
    command.args(["chat", "--listen", address, "--control"]).arg(control).args(options);
    command
}

/// A server at a free port, and its address.
pub(crate) fn serve(control: &Path, options: &[&str]) -> (Process, SocketAddr) {
    let server = Process::start(&mut listening("127.0.0.1:0", control, options));
    let address = address_of(&server);
    (server, address)
}

/// Where a server listens, as it says.
pub(crate) fn address_of(server: &Process) -> SocketAddr {
    let mut address = None;
    wait_for("the server to listen", || {
        let said = server.stderr();
        let rest = said.split("listening address=").nth(1);
        address = rest.and_then(|rest| rest.split_whitespace().next()).map(str::to_owned);
        address.is_some()
    });
    address.expect("waited for").parse().expect("an address")
}

/// A client of a chat server.
pub(crate) struct Guest {
    socket: BufReader<TcpStream>,
    pub(crate) name: String,
}

impl Guest {
    /// Connects, and reads what the server says to that: who it is, and who is there.
    pub(crate) fn join(address: SocketAddr) -> Guest {
        Guest::greeted(TcpStream::connect(address).expect("the server listens"))
    }

    /// Like [`Guest::join`]; `None` if the connection ended before it was greeted.
    pub(crate) fn try_join(address: SocketAddr) -> Option<Guest> {
        let socket = TcpStream::connect(address).expect("somebody listens");
        socket.set_read_timeout(Some(LONG)).expect("setsockopt");
        match socket.peek(&mut [0]) {
            Ok(1..) => Some(Guest::greeted(socket)),
            Ok(0) => None,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("nobody is greeted: {error}"),
        }
    }

    /// Like [`Guest::join`], with little room in the kernel for what is not read.
    pub(crate) fn join_narrow(address: SocketAddr) -> Guest {
        let socket =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("socket");
        set_socket_recv_buffer_size(&socket, 16 * 1024).expect("setsockopt");
        connect(&socket, &address).expect("the server listens");
        Guest::greeted(socket.into())
    }

    /// A guest with a connection from which nothing has been read yet.
    pub(crate) fn greeted(socket: TcpStream) -> Guest {
        Guest::greeting(socket).0
    }

    /// Like [`Guest::greeted`], and how it was greeted.
    pub(crate) fn greeting(socket: TcpStream) -> (Guest, [String; 2]) {
        socket.set_nodelay(true).expect("setsockopt");
        // So that a test fails where a line is missing.
        socket.set_read_timeout(Some(LONG)).expect("setsockopt");
        let mut guest = Guest { socket: BufReader::new(socket), name: String::new() };
        let connected = guest.line();
        let name = connected.split("is connected as <").nth(1).and_then(|rest| rest.strip_suffix(">."));
        guest.name = name.unwrap_or_else(|| panic!("no greeting: {connected:?}")).to_owned();
        let there = guest.line();
        assert!(there.starts_with("<announce> already connected: "), "{there:?}");
        (guest, [connected, there])
    }

    /// The next line, without its newline.
    #[track_caller]
    pub(crate) fn line(&mut self) -> String {
        let line = self.try_line().unwrap_or_else(|error| panic!("{} hears nothing: {error}", self.name));
        line.unwrap_or_else(|| panic!("{} was disconnected", self.name))
    }

    /// The next line, without its newline; `None` at the end.
    pub(crate) fn try_line(&mut self) -> std::io::Result<Option<String>> {
        let mut line = Vec::new();
        self.socket.read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        assert_eq!(line.pop(), Some(b'\n'), "torn: {line:?}");
        Ok(Some(String::from_utf8(line).expect("UTF-8")))
    }

    /// Reads the next lines, and compares them.
    #[track_caller]
    pub(crate) fn hears(&mut self, lines: &[&str]) {
        for line in lines {
            assert_eq!(self.line(), *line);
        }
    }

    /// Reads everything up to the end.
    pub(crate) fn rest(&mut self) -> std::io::Result<Vec<u8>> {
        let mut rest = Vec::new();
        self.read_into(&mut rest).map(|()| rest)
    }

    /// Reads everything up to the end, or to an error.
    pub(crate) fn read_into(&mut self, heard: &mut Vec<u8>) -> std::io::Result<()> {
        self.socket.read_to_end(heard).map(drop)
    }

    #[track_caller]
    pub(crate) fn say(&mut self, text: impl AsRef<[u8]>) {
        self.socket.get_mut().write_all(text.as_ref()).expect("the server reads");
    }

    /// Has nothing more to say.
    pub(crate) fn shutdown(&self) {
        self.socket.get_ref().shutdown(Shutdown::Write).expect("connected");
    }

    /// The connection itself.
    pub(crate) fn socket(&self) -> &TcpStream {
        self.socket.get_ref()
    }
}
