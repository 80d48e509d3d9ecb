//! Points on the way of a takeover or an upgrade at which a test makes the process die, hang or stop.
//!
//! Only with the feature `crash-points`, which nothing that serves anybody should have. Without it a point is an empty
//! function, and no name of one is in the program: `tests/basics.rs` of the program looks for them.
//!
//! `HEIRLOOM_CRASH_POINT=incumbent.delta-sent:kill` says where, and what: `kill` (by SIGKILL), `hang` (for ever, with
//! everything open) or `stop` (by SIGSTOP: until somebody sends SIGCONT). Before that the process creates the file that
//! `HEIRLOOM_CRASH_REPORT` names, with its pid and a newline in it: a test waits for that. What is reported already is
//! not acted on again, in whichever process: programs that are started in an upgrade inherit both variables.
#![cfg_attr(
    not(feature = "crash-points"),
    allow(unreachable_pub, reason = "with the feature the module is public, so that tests know the points")
)]

macro_rules! points {
    ($($(#[doc = $says:literal])+ $point:ident $name:literal)+) => {
        /// A point, in the order in which they are reached.
        ///
        /// ```
        /// # #[cfg(feature = "crash-points")]
        /// assert!(heirloom::crash::Point::ALL.iter().any(|point| point.name() == "incumbent.delta-sent"));
        /// ```
        #[derive(Clone, Copy, PartialEq, Eq)]
        pub enum Point {
            $($(#[doc = $says])+ $point,)+
        }

        #[cfg(any(test, feature = "crash-points"))]
        impl Point {
            /// All of them.
            pub const ALL: &[Point] = &[$(Point::$point),+];

            /// What it is called in the variable and in `docs/guarantees.md`: the process that comes by, and where it is.
            pub fn name(self) -> &'static str {
                match self {
                    $(Point::$point => $name,)+
                }
            }

            /// What has happened by then.
            pub fn says(self) -> &'static str {
                match self {
                    $(Point::$point => concat!($($says),+).trim_ascii(),)+
                }
            }
        }
    };
}

points! {
    /// it has agreed to a takeover; `Welcome` is not sent
    HelloAdmitted "incumbent.hello-admitted"
    /// `Offer` is sent, with the base manifest
    OfferBegun "incumbent.offer-begun"
    /// a `Batch` of descriptors is sent
    BatchSent "incumbent.batch-sent"
    /// `Offered` is sent
    OfferSent "incumbent.offered"
    /// `Ready` was read; the application is to stop
    FreezeAsked "incumbent.freeze-asked"
    /// frozen; the delta is written, and not sent
    DeltaSealed "incumbent.delta-sealed"
    /// `Freeze` is sent, with the delta
    DeltaSent "incumbent.delta-sent"
    /// `Accept` was read; the service lock is held
    AcceptRead "incumbent.accept-read"
    /// the service lock is free; `Released` is not sent
    LockReleased "incumbent.lock-released"
    /// `Released` is sent
    ReleasedSent "incumbent.released-sent"
    /// `Taken` was read; it is about to exit
    TakenRead "incumbent.taken-read"
    /// it gives the takeover up: `Abort` is sent, and a `Taken` could still come
    AbortSent "incumbent.abort-sent"
    /// its receiving side is shut, and was read to the end without a `Taken`
    Drained "incumbent.drained"
    /// it holds the service lock again, and does not serve yet
    Relocked "incumbent.relocked"

    /// somebody answers at the control socket; nothing is asked
    Connected "successor.connected"
    /// `Takeover` is asked for
    HelloSent "successor.hello-sent"
    /// it was admitted, and has the channel
    WelcomeRead "successor.welcome-read"
    /// it has the base manifest
    BaseRead "successor.base-read"
    /// it has a `Batch` of descriptors; no `Credit` is sent
    BatchRead "successor.batch-read"
    /// every early descriptor is there and belongs to an item
    OfferChecked "successor.offer-checked"
    /// `Ready` is sent
    ReadySent "successor.ready-sent"
    /// it has the delta
    FreezeRead "successor.freeze-read"
    /// everything is there and belongs together
    AllChecked "successor.all-checked"
    /// `Accept` is sent
    AcceptSent "successor.accept-sent"
    /// `Released` was read
    ReleasedRead "successor.released-read"
    /// it holds the service lock
    LockTaken "successor.lock-taken"
    /// it is about to send `Taken`
    Committing "successor.committing"
    /// `Taken` is sent; it does not serve yet
    TakenSent "successor.taken-sent"
    /// it answers at the control socket from here on
    Serving "successor.serving"

    /// the incumbent has started the new program, to look at its manifest
    PreflightStarted "upgrade.preflight-started"
    /// the new program has read the manifest; nothing is answered
    PreflightRead "preflight.manifest-read"
    /// the new program is about to answer that it could take over
    PreflightAnswering "preflight.answering"
    /// frozen, and signals wait
    FrozenInPlace "in-place.frozen"
    /// base and delta are written, as one manifest
    ManifestSealed "in-place.manifest-sealed"
    /// no descriptor of an item is close-on-exec any more
    LeftOpen "in-place.left-open"
    /// it is about to call execve(2)
    BeforeExec "in-place.before-execve"
    /// the new program has found the manifest
    ManifestAdopted "in-place.manifest-adopted"
    /// the new program has its lock
    LockAdopted "in-place.lock-adopted"
    /// the new program has every descriptor
    BundleMade "in-place.bundle-made"
    /// the new program answers at the control socket from here on
    ServingInPlace "in-place.serving"
}

/// Comes by a point.
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub(crate) fn reach(_: Point) {}

#[cfg(feature = "crash-points")]
pub(crate) use acting::reach;

#[cfg(feature = "crash-points")]
mod acting {
    use std::fs::File;
    use std::io::Write;
    use std::path::Path;
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    use super::Point;

    /// Comes by a point, and does there what the environment says.
    pub(crate) fn reach(point: Point) {
        let Ok(plan) = std::env::var("HEIRLOOM_CRASH_POINT") else { return };
        let Some(act) = plan.strip_prefix(point.name()).and_then(|rest| rest.strip_prefix(':')) else {
            return;
        };
        let report = std::env::var_os("HEIRLOOM_CRASH_REPORT");
        if report.is_some_and(|path| !is_first(path.as_ref())) {
            return;
        }
        match act {
            "kill" => signal(Signal::KILL),
            "stop" => return signal(Signal::STOP),
            // Whoever misspells an act is to see that, too.
            _ => {}
        }
        loop {
            std::thread::sleep(Duration::from_secs(3600));
        }
    }

    /// Reports this process, unless one was reported before.
    fn is_first(report: &Path) -> bool {
        let created = File::create_new(report);
        created.is_ok_and(|mut file| writeln!(file, "{}", std::process::id()).is_ok())
    }

    fn signal(signal: Signal) {
        let _ = kill_process(getpid(), signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_in_the_guarantees_and_nothing_else() {
        let documentation = include_str!("../../../docs/guarantees.md");
        let documented =
            documentation.lines().filter_map(|line| line.strip_prefix("| `")).filter_map(|row| {
                let mut cells = row.split(" | ");
                Some((cells.next()?.strip_suffix('`')?, cells.next()?))
            });
        let ours: Vec<_> = Point::ALL.iter().map(|point| (point.name(), point.says())).collect();
        assert_eq!(documented.collect::<Vec<_>>(), ours);
    }
}
