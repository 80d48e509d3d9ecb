//! `spawn` with real programs: what they find under which number, and how a failure is told.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, pipe};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use heirloom_sys::{SignalMask, Spawn, SpawnStage, spawn, spawn_sibling};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};
use rustix::process::{Pid, Signal, WaitOptions, getppid, waitpid};

fn shell(script: &str) -> Vec<CString> {
    ["sh", "-c", script].map(|word| CString::new(word).unwrap()).into()
}

fn wait(pid: u32) -> i32 {
    let pid = Pid::from_raw(pid as i32).unwrap();
    let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
    status.exit_status().unwrap_or(-1)
}

#[test]
fn descriptors_come_in_their_order_however_they_are_numbered_here() {
    let mut pipes: Vec<_> = (0..20).map(|_| pipe().unwrap()).collect();
    // Backwards, each twice, so that the numbers go every way.
    let order: Vec<usize> = (0..20).rev().chain(0..20).collect();
    let descriptors: Vec<BorrowedFd<'_>> = order.iter().map(|&index| pipes[index].1.as_fd()).collect();
    let mut script = String::new();
    for (place, index) in order.iter().enumerate() {
        script += &format!("echo {index} >/proc/self/fd/{}\n", place + 3);
    }
    script += "test $LISTEN_PID = $$ || exit 7; test -e /proc/self/fd/43 && exit 8; exit 0";
    let arguments = shell(&script);
    let pid = spawn(&Spawn {
        program: c"/bin/sh",
        arguments: &arguments,
        environment: &[],
        pid_variables: &[c"WATCHDOG_PID", c"LISTEN_PID"],
        descriptors: &descriptors,
        signal_mask: SignalMask(0),
        open_files: Some((64, 128)),
    })
    .unwrap();
    assert_eq!(wait(pid), 0);
    for (index, (mut reader, writer)) in pipes.drain(..).enumerate() {
        drop(writer);
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, format!("{index}\n{index}\n"));
    }
}

#[test]
fn who_is_passed_nothing_has_what_is_inherited_and_takes_nothing_from_here() {
    let null = File::open("/dev/null").unwrap();
    let mut many: Vec<OwnedFd> = (0..1000).map(|_| fcntl_dupfd_cloexec(&null, 0).unwrap()).collect();
    // One of the low numbers, and one of the others.
    let mut inherited = |numbers: Range<i32>| {
        let found = many.iter_mut().find(|descriptor| numbers.contains(&descriptor.as_raw_fd())).unwrap();
        fcntl_setfd(&*found, FdFlags::empty()).unwrap();
        found.as_raw_fd()
    };
    let (low, _) = (inherited(200..256), inherited(600..1000));
    let here = || many.iter().filter(|descriptor| fcntl_getfd(descriptor).is_ok()).count();
    let pid = spawn(&Spawn {
        program: c"/bin/sh",
        arguments: &shell(
            // What these tests were started with themselves may be there, too.
            &format!(
                "cd /proc/self/fd
                for number in *; do
                    test $number -lt 200 || test $number = {low} || test $(readlink $number) != /dev/null || exit 7
                done
                test -e {low} && kill -PIPE $$"
            ),
        ),
        environment: &[c"PATH=/bin:/usr/bin".into()],
        pid_variables: &[],
        descriptors: &[],
        signal_mask: SignalMask(0),
        open_files: None,
    });
    let pid = Pid::from_raw(pid.unwrap() as i32);
    let (_, status) = waitpid(pid, WaitOptions::empty()).unwrap().unwrap();
    assert_eq!(status.terminating_signal(), Some(Signal::PIPE.as_raw()), "{status:?}");
    assert_eq!(here(), 1000);
}

#[test]
fn a_failure_says_how_far_it_came_and_leaves_no_child() {
    let null = File::open("/dev/null").unwrap();
    let call = |program, open_files| {
        spawn(&Spawn {
            program,
            arguments: &[],
            environment: &[],
            pid_variables: &[],
            descriptors: &[null.as_fd()],
            signal_mask: SignalMask(0),
            open_files,
        })
        .unwrap_err()
    };
    let nowhere = call(c"/nowhere/at all", None);
    assert_eq!((nowhere.stage, nowhere.source.raw_os_error()), (SpawnStage::Exec, Some(2)));
    let directory = call(c"/", None);
    assert_eq!((directory.stage, directory.source.raw_os_error()), (SpawnStage::Exec, Some(13)));
    let limit = call(c"/bin/true", Some((2, 1)));
    assert_eq!((limit.stage, limit.source.raw_os_error()), (SpawnStage::Prepare, Some(22)));
}

#[test]
fn a_sibling_is_a_child_of_this_process_s_parent() {
    let (mut reader, writer) = pipe().unwrap();
    let arguments = shell("echo $PPID >/proc/self/fd/3; exit 9");
    let start = |program, descriptors: &[BorrowedFd<'_>]| {
        spawn_sibling(&Spawn {
            program,
            arguments: &arguments,
            environment: &[],
            pid_variables: &[],
            descriptors,
            signal_mask: SignalMask(0),
            open_files: None,
        })
    };
    let (pid, pidfd) = start(c"/bin/sh", &[writer.as_fd()]).unwrap();
    drop(writer);
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    assert_eq!(said.trim(), getppid().unwrap().as_raw_nonzero().to_string());
    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap();
    let waited = waitpid(Pid::from_raw(pid as i32), WaitOptions::empty());
    assert_eq!(waited.unwrap_err(), Errno::CHILD, "it is not ours to wait for");

    let failure = start(c"/nowhere/at all", &[]).unwrap_err();
    assert_eq!((failure.stage, failure.source.raw_os_error()), (SpawnStage::Exec, Some(2)));
}
