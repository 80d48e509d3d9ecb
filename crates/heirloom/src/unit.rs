//! The unit that a process belongs to: what its supervisor knows as one service, told by its control group (`cgroups(7)`).
//!
//! A supervisor that restarts takes the service for ended when its main process is, unless the process that goes on is in the
//! same unit. So an incumbent that has a supervisor is not replaced from outside of its unit, unless that is
//! [forced](crate::Config::force): otherwise a rival would be started. This module says who is inside. It only reads `/proc`;
//! whoever cannot be seen there is outside.

use std::fmt;
use std::io;

use crate::config::Outsiders;
use crate::peer::Peer;

/// Somebody who does not belong to the unit of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outsider {
    unit: Unit,
    who: String,
}

impl Outsider {
    /// Finds out whether this peer is one, if that matters here.
    pub(crate) fn find(peer: &Peer, outsiders: Outsiders) -> Option<Outsider> {
        if !outsiders.are_refused() {
            return None;
        }
        // A process that cannot read of itself where it is has no unit that it could be asked for.
        let unit = ControlGroups::read("self").ok()?.unit()?;
        let theirs = control_groups(peer);
        if theirs.as_ref().is_some_and(|theirs| unit.contains(theirs)) {
            return None;
        }
        let place = theirs.and_then(|theirs| theirs.unit()).map(|unit| format!(" of {unit}"));
        Some(Outsider { unit, who: format!("{peer}{}", place.unwrap_or_default()) })
    }
}

/// Why it is refused, and what to do instead.
impl fmt::Display for Outsider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outsider { unit, who } = self;
        write!(
            f,
            "the incumbent belongs to {unit}, and the successor does not ({who}): the supervisor would take {unit} for ended, and \
             could start a rival; "
        )?;
        match unit.reload() {
            Some(command) => write!(f, "have it replaced from within (`{command}`, or `heirloom upgrade`)")?,
            None => f.write_str("have it replaced from within (`heirloom upgrade`)")?,
        }
        f.write_str(", or force it (--force)")
    }
}

/// Whether a process is one of this process's unit; `None` where this process is in no unit, or where that cannot be seen.
pub(crate) fn contains(pid: u32) -> Option<bool> {
    let unit = ControlGroups::read("self").ok()?.unit()?;
    Some(unit.contains(&ControlGroups::read(&pid.to_string()).ok()?))
}

/// Where a peer is, unless that cannot be seen from here.
fn control_groups(peer: &Peer) -> Option<ControlGroups> {
    let groups = ControlGroups::read(&peer.pid?.to_string()).ok()?;
    // If it has exited, the number may be another process's. A kernel without pidfds cannot tell.
    matches!(peer.exited(), Ok(Some(false) | None)).then_some(groups)
}

/// The hierarchies in which systemd keeps its units; where there are both, it has them in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hierarchy {
    /// Version 2.
    Unified,
    /// `name=systemd` of version 1.
    Named,
}

/// The control groups of a process, one in each hierarchy that there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ControlGroups {
    unified: Option<String>,
    named: Option<String>,
}

impl ControlGroups {
    fn read(process: &str) -> io::Result<ControlGroups> {
        Ok(ControlGroups::parse(&std::fs::read_to_string(format!("/proc/{process}/cgroup"))?))
    }

    /// From lines of the form `number:controllers:path`.
    fn parse(text: &str) -> ControlGroups {
        let mut groups = ControlGroups::default();
        for line in text.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            match (parts.next(), parts.next()) {
                (Some(""), Some(path)) => groups.unified = Some(path.into()),
                (Some("name=systemd"), Some(path)) => groups.named = Some(path.into()),
                _ => {}
            }
        }
        groups
    }

    fn path(&self, hierarchy: Hierarchy) -> Option<&str> {
        match hierarchy {
            Hierarchy::Unified => self.unified.as_deref(),
            Hierarchy::Named => self.named.as_deref(),
        }
    }

    /// The unit, if it is in one.
    fn unit(&self) -> Option<Unit> {
        let mut hierarchies = [Hierarchy::Unified, Hierarchy::Named].into_iter();
        hierarchies.find_map(|hierarchy| Unit::of(hierarchy, self.path(hierarchy)?))
    }
}

/// A unit, by its control group.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Unit {
    hierarchy: Hierarchy,
    path: String,
}

impl Unit {
    /// The innermost unit on this path. What is below it is the unit's own to divide.
    fn of(hierarchy: Hierarchy, path: &str) -> Option<Unit> {
        let is_unit = |part: &str| {
            [".service", ".scope"]
                .iter()
                .any(|kind| part.strip_suffix(kind).is_some_and(|name| !name.is_empty()))
        };
        let mut path = path;
        while !is_unit(path.rsplit('/').next()?) {
            path = path.rsplit_once('/')?.0;
        }
        Some(Unit { hierarchy, path: path.into() })
    }

    fn contains(&self, groups: &ControlGroups) -> bool {
        let below = groups.path(self.hierarchy).and_then(|path| path.strip_prefix(&self.path));
        below.is_some_and(|below| below.is_empty() || below.starts_with('/'))
    }

    /// The command that has the service replace itself. A scope has none.
    fn reload(&self) -> Option<String> {
        let name = self.to_string();
        let is_users = self.path.split('/').rev().skip(1).any(|part| part.starts_with("user@"));
        let manager = if is_users { "systemctl --user" } else { "systemctl" };
        name.ends_with(".service").then(|| format!("{manager} reload {name}"))
    }
}

/// As people know it. systemd puts a `_` before what the kernel could take for a file of its own (`cpu.service`).
impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        f.write_str(name.strip_prefix('_').unwrap_or(name))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn unified(path: &str) -> ControlGroups {
        ControlGroups::parse(&format!("0::{path}\n"))
    }

    #[test]
    fn the_innermost_service_or_scope_is_the_unit() {
        for (path, unit) in [
            ("/system.slice/chat.service", "chat.service"),
            ("/system.slice/chat.service/workers/3", "chat.service"),
            ("/system.slice/system-chat.slice/chat@a-b.service/.control", "chat@a-b.service"),
            ("/user.slice/user-7.slice/session-3.scope", "session-3.scope"),
            ("/user.slice/user-7.slice/user@7.service/app.slice/chat.service", "chat.service"),
            ("/user.slice/user-7.slice/user@7.service/init.scope", "init.scope"),
            ("/system.slice/_cpu.service", "cpu.service"),
        ] {
            assert_eq!(unified(path).unit().expect("a unit").to_string(), unit);
        }
        for path in ["/", "", "/system.slice", "/kubepods/pod1/abc", "/.service", "/a.service.d/b", "/../.."]
        {
            assert_eq!(unified(path).unit(), None, "{path}");
        }
    }

    #[test]
    fn what_is_below_a_unit_belongs_to_it_and_what_is_beside_it_does_not() {
        let unit = unified("/system.slice/chat.service/main").unit().expect("a unit");
        for inside in [
            "/system.slice/chat.service",
            "/system.slice/chat.service/main",
            "/system.slice/chat.service/.control",
        ] {
            assert!(unit.contains(&unified(inside)), "{inside}");
        }
        for outside in [
            "/",
            "/system.slice",
            "/system.slice/chat.service2",
            "/system.slice/other.service",
            "/user.slice/user-7.slice/session-3.scope",
            "/../system.slice/chat.service",
        ] {
            assert!(!unit.contains(&unified(outside)), "{outside}");
        }
        assert!(!unit.contains(&ControlGroups::default()));
    }

    /// Of a hybrid and of an old system, and of one where version 2 is there and not used.
    #[test]
    fn both_sorts_of_hierarchies() {
        let hybrid =
            "2:cpu:/elsewhere.service\n1:name=systemd:/system.slice/a.service\n0::/system.slice/a.service\n";
        let old = "2:cpu,cpuacct:/x.service\n1:name=systemd:/system.slice/a.service\n";
        let unused = "1:name=systemd:/system.slice/a.service\n0::/\n";
        for text in [hybrid, old, unused] {
            let groups = ControlGroups::parse(text);
            let unit = groups.unit().expect("a unit");
            assert_eq!(unit.to_string(), "a.service");
            assert!(unit.contains(&groups));
            assert!(!unit.contains(&ControlGroups::parse("2:cpu:/system.slice/a.service\n")));
        }
        // A path may hold what separates.
        assert_eq!(unified("/a:b.service").unit().expect("a unit").to_string(), "a:b.service");
        assert_eq!(ControlGroups::parse("garbage\n\n0:\n"), ControlGroups { unified: None, named: None });
    }

    #[test]
    fn the_message_names_what_why_and_what_to_do() {
        let message = |path: &str| {
            let unit = unified(path).unit().expect("a unit");
            Outsider { unit, who: "pid 7 (uid 0) of session-1.scope".into() }.to_string()
        };
        let service = message("/system.slice/chat.service");
        for part in [
            "belongs to chat.service",
            "pid 7",
            "a rival",
            "`systemctl reload chat.service`",
            "upgrade",
            "--force",
        ] {
            assert!(service.contains(part), "{part:?} is not in: {service}");
        }
        let users = message("/user.slice/user-7.slice/user@7.service/app.slice/chat.service");
        assert!(users.contains("`systemctl --user reload chat.service`"), "{users}");
        let scope = message("/user.slice/user-7.slice/session-3.scope");
        assert!(!scope.contains("reload") && scope.contains("`heirloom upgrade`"), "{scope}");
    }

    #[test]
    fn this_process_is_inside_of_its_unit_whatever_that_is() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(Outsider::find(&Peer::of(&ours).unwrap(), Outsiders::Refuse), None);
        assert_eq!(Outsider::find(&Peer::of(&ours).unwrap(), Outsiders::Admit), None);
        assert!(control_groups(&Peer::of(&ours).unwrap()).is_some());
    }
}
