//! Control groups that look like systemd's units, and processes in them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::skip;

/// A control group of the test's own, called `heirloom-test-N.service`. Goes with its processes, which are to have ended by then.
pub(crate) struct Unit {
    directory: PathBuf,
    pub(crate) name: String,
}

impl Unit {
    /// `None` where no control group can be made; says so.
    pub(crate) fn make() -> Option<Unit> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("heirloom-test-{}-{count}.service", std::process::id());
        let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc");
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let mounted =
            mounts.find(|fields| fields.get(2) == Some(&"cgroup2")).map(|fields| PathBuf::from(fields[1]));
        let unit = mounted.map(|mounted| Unit { directory: mounted.join(&name), name });
        // To be made is not enough: processes have to be let in.
        match unit.filter(|unit| fs::create_dir(&unit.directory).is_ok()) {
            Some(unit)
                if unit.command(&Command::new("true")).status().is_ok_and(|status| status.success()) =>
            {
                Some(unit)
            }
            _ => {
                skip("no control group can be made here (it needs root and a writable cgroup2)");
                None
            }
        }
    }

    /// The same command, as a process of this unit.
    pub(crate) fn command(&self, command: &Command) -> Command {
        self.command_below("", command)
    }

    /// As a process of a control group of the unit's own.
    pub(crate) fn command_below(&self, below: &str, command: &Command) -> Command {
        let directory = self.directory.join(below);
        fs::create_dir_all(&directory).expect("a control group");
        let mut inside = Command::new("sh");
        inside.args(["-c", "echo $$ >\"$0\" && exec \"$@\""]).arg(directory.join("cgroup.procs"));
        inside.arg(command.get_program()).args(command.get_args());
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        inside
    }

    /// The processes that belong to it, those of its own control groups apart.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let processes = fs::read_to_string(self.directory.join("cgroup.procs")).expect("it is there");
        processes.lines().map(|pid| pid.parse().expect("a pid")).collect()
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let below = fs::read_dir(&self.directory).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut directories: Vec<PathBuf> = below.filter(|path| path.is_dir()).collect();
        directories.push(self.directory.clone());
        // A process that was just killed may still be on its way out.
        let give_up = Instant::now() + Duration::from_secs(10);
        for directory in directories {
            while fs::remove_dir(&directory).is_err() && directory.exists() && Instant::now() < give_up {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}
