//! Another build of this program to be upgraded to: debug for release, and release for debug.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// The other build of a program in cargo's target directory: made now if cargo runs this one, or else the one that is
/// there, if it is. `tell` says what takes long.
pub(super) fn find(this: &Path, tell: &dyn Fn(&str)) -> anyhow::Result<Option<PathBuf>> {
    let Some((target, other)) = sibling(this) else { return Ok(None) };
    let file = target.join(other).join("heirloom");
    let (cargo, manifest) = (std::env::var_os("CARGO"), std::env::var_os("CARGO_MANIFEST_DIR"));
    let (Some(cargo), Some(directory)) = (cargo, manifest) else {
        return Ok(file.is_file().then_some(file));
    };
    tell(&format!("making the {other} build, to be upgraded to and back from"));
    let profile = if other == "debug" { "dev" } else { other };
    let built = Command::new(cargo)
        .args(["build", "--package", "heirloom-cli", "--profile", profile, "--target-dir"])
        .arg(&target)
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot start cargo")?;
    if !built.success() {
        bail!("cargo cannot make the {other} build ({built}); give one with --other FILE");
    }
    Ok(Some(file))
}

/// The target directory, and the name of the other profile's directory in it.
fn sibling(this: &Path) -> Option<(PathBuf, &'static str)> {
    let profile = this.parent()?;
    let other = match profile.file_name()?.to_str()? {
        "debug" => "release",
        "release" => "debug",
        _ => return None,
    };
    Some((profile.parent()?.into(), other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_profile_has_the_other_one() {
        assert_eq!(sibling("/t/debug/heirloom".as_ref()), Some(("/t".into(), "release")));
        assert_eq!(sibling("/t/release/heirloom".as_ref()), Some(("/t".into(), "debug")));
        assert_eq!(sibling("/usr/bin/heirloom".as_ref()), None);
    }
}
