//! What the kernel tells about the peer of a UNIX socket.

use std::os::unix::net::{UnixDatagram, UnixStream};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

#[test]
fn the_credentials_of_a_pair_are_our_own() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let credentials = heirloom_sys::peer_credentials(&ours).unwrap();
    assert_eq!(credentials.pid, std::process::id());
    assert_eq!(credentials.uid, rustix::process::geteuid().as_raw());
    assert_eq!(credentials.gid, rustix::process::getegid().as_raw());
}

#[test]
fn a_socket_without_a_peer_has_pid_zero_and_no_pidfd() {
    let alone = UnixDatagram::unbound().unwrap();
    assert_eq!(heirloom_sys::peer_credentials(&alone).unwrap().pid, 0);
    assert!(heirloom_sys::peer_pidfd(&alone).is_err());
}

#[test]
fn something_that_is_no_socket_is_an_error() {
    let file = std::fs::File::open("/proc/self/status").unwrap();
    let error = heirloom_sys::peer_credentials(&file).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOTSOCK.raw_os_error()));
}

#[test]
fn the_pidfd_of_a_pair_is_our_own_close_on_exec_and_not_readable() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let pidfd = match heirloom_sys::peer_pidfd(&ours) {
        Ok(pidfd) => pidfd,
        Err(error) => {
            // Linux before 6.5: the documented error, and nothing more to see.
            let expected = rustix::io::Errno::NOPROTOOPT.raw_os_error();
            assert_eq!(error.raw_os_error(), Some(expected));
            return;
        }
    };
    let flags = rustix::io::fcntl_getfd(&pidfd).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));

    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    assert_eq!(poll(&mut polled, Some(&Timespec::default())).unwrap(), 0);

    use std::os::fd::AsRawFd;
    let about = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let about = std::fs::read_to_string(about).unwrap();
    let pid = about.lines().find_map(|line| line.strip_prefix("Pid:"));
    assert_eq!(pid.unwrap().trim(), std::process::id().to_string());
}
