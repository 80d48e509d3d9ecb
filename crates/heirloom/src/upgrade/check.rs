//! The incumbent's side of a preflight: a child that looks at the manifest and answers, while the incumbent serves.
//!
//! Whatever the child does, it gets nothing but a copy of the manifest, and does not outlive the [`Check`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::fstat;
use rustix::io::{Errno, ioctl_fionbio, read};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::launch::Launch;
use super::preflight::Verdict;
use super::role::Role;
use crate::courtesy;

/// The longest answer, in bytes; it is one line.
const LONGEST_ANSWER: usize = 64 * 1024;
/// How much of what the child says on stderr is kept for a failure's reason: its end, in bytes.
const KEPT_COMPLAINT: usize = 2048;

/// A preflight that is going on.
#[derive(Debug)]
pub(crate) struct Check {
    child: Child,
    pidfd: OwnedFd,
    answers: Option<OwnedFd>,
    complaints: Option<OwnedFd>,
    answer: Vec<u8>,
    complaint: VecDeque<u8>,
    limit: Duration,
    deadline: Instant,
    crc: u32,
}

/// How a preflight has ended.
#[derive(Debug)]
pub(crate) enum Finding {
    /// The new program could take over.
    Ready { program: String, version: String },
    /// It could not, for this reason.
    Failed(String),
}

impl Check {
    /// Starts the program with the manifest as its stdin. `crc` is the manifest's checksum.
    pub(crate) fn start(launch: &Launch, manifest: OwnedFd, crc: u32, limit: Duration) -> io::Result<Check> {
        let role = Role::Preflight { incumbent: std::process::id(), manifest: fstat(&manifest)?.st_ino };
        let mut command = launch.command(role);
        command.stdin(manifest).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = courtesy::starting(|| command.spawn())?;
        let watched = || -> io::Result<(OwnedFd, Option<OwnedFd>, Option<OwnedFd>)> {
            let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
            let answers = child.stdout.take().map(OwnedFd::from);
            let complaints = child.stderr.take().map(OwnedFd::from);
            for pipe in answers.iter().chain(&complaints) {
                ioctl_fionbio(pipe, true)?;
            }
            Ok((pidfd, answers, complaints))
        };
        match { watched }() {
            Ok((pidfd, answers, complaints)) => Ok(Check {
                child,
                pidfd,
                answers,
                complaints,
                answer: Vec::new(),
                complaint: VecDeque::new(),
                limit,
                deadline: Instant::now() + limit,
                crc,
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// What to poll for reading: its output, and its end.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [self.answers.as_ref(), self.complaints.as_ref(), Some(&self.pidfd)]
            .into_iter()
            .flatten()
            .map(AsFd::as_fd)
    }

    /// Looks at what has happened. Once there is a finding the child is of no more use: drop this.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<Finding> {
        // Whether it has ended comes first: what it wrote before is all there then.
        let ended = self.child.try_wait().ok().flatten();
        let (answer, complaint) = (&mut self.answer, &mut self.complaint);
        drain(&mut self.answers, |bytes| answer.extend(bytes));
        drain(&mut self.complaints, |bytes| {
            complaint.extend(bytes);
            complaint.drain(..complaint.len().saturating_sub(KEPT_COMPLAINT));
        });
        if let Some(end) = self.answer.iter().position(|&byte| byte == b'\n') {
            return Some(judge(&self.answer[..end], self.crc));
        }
        if self.answer.len() > LONGEST_ANSWER {
            return Some(nonsense(&self.answer));
        }
        if let Some(status) = ended {
            return Some(Finding::Failed(format!("it ended ({status}) without an answer{}", self.said())));
        }
        (now >= self.deadline).then(|| {
            Finding::Failed(format!("it did not answer within {:?} and was ended{}", self.limit, self.said()))
        })
    }

    /// What it has said on stderr, to be appended to a reason.
    fn said(&self) -> String {
        let complaint: Vec<u8> = self.complaint.iter().copied().collect();
        match String::from_utf8_lossy(&complaint).trim() {
            "" => "; it said nothing: is it a program that can be upgraded to?".into(),
            complaint => format!("; it said: {complaint}"),
        }
    }
}

impl Drop for Check {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a child's answer, one line, means. `crc` is the checksum of the manifest that it was given.
fn judge(answer: &[u8], crc: u32) -> Finding {
    match serde_json::from_slice(answer) {
        Ok(Verdict::Ready { program, version, crc: read }) if read == crc => {
            Finding::Ready { program, version }
        }
        Ok(Verdict::Ready { .. }) => Finding::Failed("it has not read the manifest that it was given".into()),
        Ok(Verdict::Refused { reason }) => Finding::Failed(reason),
        Err(_) => nonsense(answer),
    }
}

fn nonsense(answer: &[u8]) -> Finding {
    const SHOWN: usize = 80;
    let answer = String::from_utf8_lossy(&answer[..answer.len().min(SHOWN)]);
    Finding::Failed(format!(
        "it answers {:?}, which is no answer to a preflight; is it a program that can be upgraded to?",
        answer.trim_end()
    ))
}

/// Reads all there is, and lets go of a pipe that has ended.
fn drain(pipe: &mut Option<OwnedFd>, mut into: impl FnMut(&[u8])) {
    let mut buffer = [0; 4096];
    // A child that writes without end must not keep us here.
    for _ in 0..64 {
        let Some(open) = pipe else { return };
        match read(&*open, &mut buffer) {
            Ok(0) => *pipe = None,
            Ok(count) => into(&buffer[..count]),
            Err(Errno::AGAIN) => return,
            Err(Errno::INTR) => {}
            Err(_) => *pipe = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::manifest::seal;

    /// Runs a shell script as the preflight of a manifest with checksum 7.
    fn run(script: &str, limit: Duration) -> String {
        let launch = Launch {
            program: "/bin/sh".into(),
            name: "sh".into(),
            arguments: vec!["-c".into(), script.into()],
            in_place: false,
        };
        let manifest = seal("base", b"the manifest").unwrap();
        let mut check = Check::start(&launch, manifest, 7, limit).unwrap();
        loop {
            if let Some(finding) = check.poll(Instant::now()) {
                return match finding {
                    Finding::Ready { program, version } => format!("{program} {version}"),
                    Finding::Failed(why) => why,
                };
            }
            let left = check.deadline().saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            let mut fds: Vec<PollFd<'_>> =
                check.descriptors().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            poll(&mut fds, Some(&left.try_into().unwrap())).unwrap();
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn an_answer_is_taken_and_the_child_need_not_end() {
        let ready = r#"echo '{"Ready":{"program":"echod","version":"2","crc":7}}'; exec sleep 1000"#;
        assert_eq!(run(ready, LONG), "echod 2");
        let refused = r#"echo '{"Refused":{"reason":"no such backend"}}'"#;
        assert_eq!(run(refused, LONG), "no such backend");
    }

    #[test]
    fn a_program_that_knows_nothing_of_preflights_fails_it() {
        assert!(run("exit 2", LONG).contains("exit status: 2) without an answer; it said nothing"));
        assert!(
            run("echo the port is no number >&2; exit 1", LONG).contains("it said: the port is no number")
        );
        assert!(run("echo hello", LONG).contains("answers \"hello\", which is no answer"));
        assert!(run("cat", LONG).contains("without an answer"), "the manifest has no newline");
        assert!(run("yes | tr -d '\\n'", LONG).contains("no answer to a preflight"));
        let blind = r#"echo '{"Ready":{"program":"echod","version":"2","crc":8}}'"#;
        assert!(run(blind, LONG).contains("has not read"));
        assert!(run("kill -9 $$", LONG).contains("signal: 9"));
    }

    #[test]
    fn one_that_hangs_is_ended_and_only_the_end_of_what_it_says_is_kept() {
        let hangs = "seq 1 100000 >&2; echo the last word >&2; exec sleep 1000";
        let why = run(hangs, Duration::from_secs(1));
        assert!(why.contains("did not answer within 1s") && why.ends_with("the last word"), "{why}");
        assert!(why.len() < 2 * KEPT_COMPLAINT, "{}", why.len());
    }

    /// Bytes that are nearly an answer.
    fn answers() -> impl Strategy<Value = Vec<u8>> {
        let answer = prop_oneof![
            (".*", any::<u32>()).prop_map(|(program, crc)| {
                serde_json::to_vec(&Verdict::Ready { program, version: "2".into(), crc }).unwrap()
            }),
            ".*".prop_map(|reason| serde_json::to_vec(&Verdict::Refused { reason }).unwrap()),
            prop::collection::vec(any::<u8>(), 0..200),
        ];
        (answer, any::<prop::sample::Index>(), any::<Option<u8>>()).prop_map(|(mut answer, at, byte)| {
            if let (Some(byte), false) = (byte, answer.is_empty()) {
                let at = at.index(answer.len());
                answer[at] = byte;
            }
            answer
        })
    }

    proptest! {
        #[test]
        fn only_who_has_read_the_manifest_passes(answer in answers(), crc: u32) {
            match (judge(&answer, crc), serde_json::from_slice(&answer)) {
                (Finding::Ready { program, .. }, Ok(Verdict::Ready { program: said, crc: read, .. })) => {
                    prop_assert_eq!((program, crc), (said, read));
                }
                (Finding::Failed(why), Ok(Verdict::Refused { reason })) => prop_assert_eq!(why, reason),
                (Finding::Failed(_), Ok(Verdict::Ready { crc: read, .. })) => prop_assert_ne!(read, crc),
                // Of what is no answer only the beginning is shown, however it is written out.
                (Finding::Failed(why), Err(_)) => prop_assert!(why.len() < 1500),
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
