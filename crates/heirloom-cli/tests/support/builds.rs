//! Programs of other builds, which are made once and kept.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};

/// The program of this workspace, built in the other profile: in release where this one is a debug build.
pub(crate) fn other_profile() -> PathBuf {
    build(&workspace(), if cfg!(debug_assertions) { "release" } else { "dev" }, "other-profile")
}

pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace is there")
}

/// Where the builds are made, and kept from one run of the tests to the next.
pub(crate) fn builds() -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("builds");
    std::fs::create_dir_all(&directory).expect("a directory for builds");
    directory
}

/// Builds the program of the workspace at `source`, one build at a time, and returns where it was put under this name.
pub(crate) fn build(source: &Path, profile: &str, name: &str) -> PathBuf {
    let builds = builds();
    let lock = File::create(builds.join("lock")).expect("a lock file");
    flock(&lock, FlockOperation::LockExclusive).expect("flock");
    // Beside the sources: cargo takes files in its target directory for the same ones, whichever commit they are of.
    let target = builds.join("target");
    let cargo = |offline: &[&str]| {
        Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--locked", "--package", "heirloom-cli", "--profile", profile])
            .args(offline)
            .arg("--target-dir")
            .arg(&target)
            // What makes it another program is the profile; this only makes it quick to build.
            .envs([("CARGO_PROFILE_DEV_DEBUG", "none"), ("CARGO_PROFILE_RELEASE_DEBUG", "none")])
            .envs([("CARGO_PROFILE_RELEASE_LTO", "off"), ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")])
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
    let built = target.join(if profile == "dev" { "debug" } else { profile }).join("heirloom");
    let (fresh, kept) = (builds.join(format!("{name}.new")), builds.join(name));
    let _ = std::fs::remove_file(&fresh);
    std::fs::hard_link(built, &fresh)
        .and_then(|()| std::fs::rename(&fresh, &kept))
        .expect("the program can be kept");
    kept
}
