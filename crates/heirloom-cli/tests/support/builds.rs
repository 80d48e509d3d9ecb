//! Builds of the program: this workspace's in another profile, and older commits'.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};

use super::have;

/// What a commit must have for its program to know how to hand over.
const CHAT: &str = "crates/heirloom-cli/src/chat/mod.rs";

/// The directory of this workspace.
pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace is there")
}

/// Where the builds are made, and kept from one run of the tests to the next.
fn builds() -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("builds");
    std::fs::create_dir_all(&directory).expect("a directory for builds");
    directory
}

/// Builds the program of the workspace at `source`, one build at a time, and returns where it was put under this name.
pub(crate) fn build(source: &Path, profile: &str, name: &str) -> PathBuf {
    let builds = builds();
    let lock = File::create(builds.join("lock")).expect("a lock file");
    flock(&lock, FlockOperation::LockExclusive).expect("flock");
    let cargo = |offline: &[&str]| {
        Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--locked", "--package", "heirloom-cli", "--profile", profile])
            .args(offline)
            .arg("--target-dir")
            .arg(&builds)
            .current_dir(source)
            .stdin(Stdio::null())
            .output()
            .expect("cargo can be started")
    };
    let mut output = cargo(&[]);
    if !output.status.success() {
        // Perhaps the registry is not to be reached, and nothing of it is missing.
        let offline = cargo(&["--offline"]);
        if offline.status.success() {
            output = offline;
        }
    }
    assert!(output.status.success(), "cargo build:\n{}", String::from_utf8_lossy(&output.stderr));
    // All builds leave their program at the same place: give it a name of its own, also while an earlier one runs. A
    // link and no copy, since a file that was open for writing a moment ago may not be executable yet.
    let built = builds.join(if profile == "dev" { "debug" } else { profile }).join("heirloom");
    let (fresh, kept) = (builds.join(format!("{name}.new")), builds.join(name));
    let _ = std::fs::remove_file(&fresh);
    std::fs::hard_link(built, &fresh)
        .and_then(|()| std::fs::rename(&fresh, &kept))
        .expect("the program can be kept");
    kept
}

/// The commit that is called so, if it is there and its program knows how to hand over.
pub(crate) fn commit(name: &str) -> Option<String> {
    if !have("git") {
        return None;
    }
    git(["cat-file", "-e", &format!("{name}:{CHAT}")])?;
    git(["rev-parse", name]).map(|hash| String::from_utf8_lossy(&hash).trim().to_owned())
}

/// The files of a commit, in a directory of its own. Different commits have different ones, since cargo goes by times.
pub(crate) fn export(commit: &str) -> PathBuf {
    let source = builds().join(format!("source-{commit}"));
    if source.exists() {
        return source;
    }
    let unpacked = tempfile::tempdir_in(builds()).expect("a temporary directory");
    let archive = unpacked.path().join("archive.tar");
    git(["archive".as_ref(), "--output".as_ref(), archive.as_os_str(), commit.as_ref()])
        .expect("git archive");
    let tar = Command::new("tar").arg("-xf").arg(&archive).current_dir(&unpacked).status();
    assert!(tar.expect("tar can be started").success(), "tar cannot unpack {}", archive.display());
    std::fs::remove_file(archive).expect("the archive can be removed");
    // Somebody else may have been faster; then theirs is as good.
    let _ = std::fs::rename(unpacked.keep(), &source);
    source
}

/// What git says about this repository, if it has an answer.
fn git<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Option<Vec<u8>> {
    let output = Command::new("git")
        // The files may belong to another user, as in a container.
        .args(["-c", "safe.directory=*"])
        .args(arguments)
        .current_dir(workspace())
        .output()
        .expect("git can be started");
    output.status.success().then_some(output.stdout)
}
