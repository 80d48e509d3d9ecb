//! What is expected when a process dies, hangs or stops at each point.

use heirloom::crash::Point;

/// What a process does at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Dies by SIGKILL.
    Kill,
    /// Does nothing any more, with everything open.
    Hang,
    /// Is stopped by SIGSTOP, and continued when the other process has made up its mind; at once, if there is no other that
    /// waits.
    Stop,
    /// Is stopped and continued at once.
    Pause,
}

impl Act {
    pub(crate) const ALL: [Act; 4] = [Act::Kill, Act::Hang, Act::Stop, Act::Pause];

    /// What it is called in the variable.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Act::Kill => "kill",
            Act::Hang => "hang",
            Act::Stop | Act::Pause => "stop",
        }
    }
}

/// Who serves in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Serves {
    /// Who served before; in place, the program that did.
    Incumbent,
    /// The successor; in place, the new program.
    Successor,
    /// Nobody: the only one who could serve is the one that has died or hangs.
    Nobody,
}

/// What a client sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sees {
    Nothing,
    /// Nobody reads or writes for a while.
    Pause,
    /// The connection ends.
    End,
}

pub(crate) type Outcome = (Serves, Sees);

const INC_NOTHING: Outcome = (Serves::Incumbent, Sees::Nothing);
const INC_PAUSE: Outcome = (Serves::Incumbent, Sees::Pause);
const SUC_PAUSE: Outcome = (Serves::Successor, Sees::Pause);
const NOBODY_END: Outcome = (Serves::Nobody, Sees::End);

/// What comes of a point: when a process dies there, hangs, or is stopped and continued.
pub(crate) struct Row {
    pub(crate) point: Point,
    kill: Outcome,
    hang: Outcome,
    stop: Outcome,
}

const fn row(point: Point, kill: Outcome, hang: Outcome, stop: Outcome) -> Row {
    Row { point, kill, hang, stop }
}

/// In a takeover. The incumbent gives up in the rows from `AbortSent` to `Relocked`: there the successor was stopped at
/// `LockTaken`, and is continued as soon as the incumbent has come to its point.
pub(crate) const TAKEOVER: &[Row] = &[
    row(Point::HelloAdmitted, NOBODY_END, NOBODY_END, INC_PAUSE),
    row(Point::OfferBegun, NOBODY_END, NOBODY_END, INC_PAUSE),
    row(Point::BatchSent, NOBODY_END, NOBODY_END, INC_PAUSE),
    row(Point::OfferSent, NOBODY_END, NOBODY_END, INC_PAUSE),
    row(Point::FreezeAsked, NOBODY_END, NOBODY_END, INC_PAUSE),
    row(Point::DeltaSealed, NOBODY_END, NOBODY_END, INC_PAUSE),
    row(Point::DeltaSent, SUC_PAUSE, NOBODY_END, INC_PAUSE),
    row(Point::AcceptRead, SUC_PAUSE, NOBODY_END, INC_PAUSE),
    row(Point::LockReleased, SUC_PAUSE, NOBODY_END, INC_PAUSE),
    row(Point::ReleasedSent, SUC_PAUSE, SUC_PAUSE, SUC_PAUSE),
    row(Point::TakenRead, SUC_PAUSE, SUC_PAUSE, SUC_PAUSE),
    row(Point::AbortSent, NOBODY_END, SUC_PAUSE, SUC_PAUSE),
    row(Point::Drained, NOBODY_END, NOBODY_END, INC_PAUSE),
    row(Point::Relocked, NOBODY_END, NOBODY_END, INC_PAUSE),
    row(Point::Connected, INC_NOTHING, INC_NOTHING, SUC_PAUSE),
    row(Point::HelloSent, INC_NOTHING, INC_NOTHING, INC_NOTHING),
    row(Point::WelcomeRead, INC_NOTHING, INC_NOTHING, INC_NOTHING),
    row(Point::BaseRead, INC_NOTHING, INC_NOTHING, INC_NOTHING),
    row(Point::BatchRead, INC_NOTHING, INC_NOTHING, INC_NOTHING),
    row(Point::OfferChecked, INC_NOTHING, INC_NOTHING, INC_NOTHING),
    row(Point::ReadySent, INC_PAUSE, INC_PAUSE, INC_PAUSE),
    row(Point::FreezeRead, INC_PAUSE, INC_PAUSE, INC_PAUSE),
    row(Point::AllChecked, INC_PAUSE, INC_PAUSE, INC_PAUSE),
    row(Point::AcceptSent, INC_PAUSE, INC_PAUSE, INC_PAUSE),
    row(Point::ReleasedRead, INC_PAUSE, INC_PAUSE, INC_PAUSE),
    row(Point::LockTaken, INC_PAUSE, INC_PAUSE, INC_PAUSE),
    row(Point::Committing, INC_PAUSE, INC_PAUSE, INC_PAUSE),
    row(Point::TakenSent, NOBODY_END, NOBODY_END, SUC_PAUSE),
    row(Point::Serving, NOBODY_END, NOBODY_END, SUC_PAUSE),
];

/// In an upgrade in place.
pub(crate) const IN_PLACE: &[Row] = &[
    row(Point::PreflightStarted, NOBODY_END, NOBODY_END, SUC_PAUSE),
    row(Point::PreflightRead, INC_NOTHING, INC_NOTHING, INC_NOTHING),
    row(Point::PreflightAnswering, INC_NOTHING, INC_NOTHING, INC_NOTHING),
    row(Point::FrozenInPlace, NOBODY_END, NOBODY_END, SUC_PAUSE),
    row(Point::ManifestSealed, NOBODY_END, NOBODY_END, SUC_PAUSE),
    row(Point::LeftOpen, NOBODY_END, NOBODY_END, SUC_PAUSE),
    row(Point::BeforeExec, NOBODY_END, NOBODY_END, SUC_PAUSE),
    row(Point::ManifestAdopted, NOBODY_END, NOBODY_END, SUC_PAUSE),
    row(Point::LockAdopted, NOBODY_END, NOBODY_END, SUC_PAUSE),
    row(Point::BundleMade, NOBODY_END, NOBODY_END, SUC_PAUSE),
    row(Point::ServingInPlace, NOBODY_END, NOBODY_END, SUC_PAUSE),
];

impl Row {
    pub(crate) fn expected(&self, act: Act) -> Outcome {
        match act {
            Act::Kill => self.kill,
            Act::Hang => self.hang,
            Act::Stop => self.stop,
            // The other cannot have noticed.
            Act::Pause => SUC_PAUSE,
        }
    }

    /// What is expected if it is the incumbent that has started the successor.
    pub(crate) fn expected_beside(&self, act: Act) -> Outcome {
        match (self.point, act) {
            // Its incumbent waits for it to ask, and ends it.
            (Point::Connected, Act::Stop) => INC_NOTHING,
            _ => self.expected(act),
        }
    }

    /// Whether the point is on the way of an incumbent that gives a takeover up.
    pub(crate) fn incumbent_gives_up(&self) -> bool {
        matches!(self.point, Point::AbortSent | Point::Drained | Point::Relocked)
    }

    /// The row in `docs/guarantees.md`.
    pub(crate) fn documented(&self) -> String {
        let outcome = |(serves, sees): Outcome| {
            let serves = match serves {
                Serves::Incumbent => "incumbent",
                Serves::Successor => "successor",
                Serves::Nobody => "nobody",
            };
            let sees = match sees {
                Sees::Nothing => "nothing",
                Sees::Pause => "pause",
                Sees::End => "end",
            };
            format!("{serves}; {sees}")
        };
        let (kill, hang, stop) = (outcome(self.kill), outcome(self.hang), outcome(self.stop));
        format!("| `{}` | {} | {kill} | {hang} | {stop} |", self.point.name(), self.point.says())
    }
}
