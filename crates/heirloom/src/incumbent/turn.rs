//! What an incumbent asks of its program, turn by turn: to write down what there is, to lend descriptors, to freeze.
//!
//! The types make the wrong order impossible: each turn borrows the incumbent until it is answered, and a [`Freeze`] can
//! only be released or resumed, both of which consume it.

use std::fmt;
use std::io;
use std::iter;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use super::Incumbent;
use super::asked::Asked;
use super::connection::{ConnectionId, failure};
use super::delegated::Delegated;
use crate::bundle::Bundle;
use crate::clock;
use crate::control::request::{FailureCode, ManifestSummary, NoRequests, Reply};
use crate::courtesy;
use crate::crash::{self, Point};
use crate::item::{CONTROL_NAME, Entry, ItemId};
use crate::kind::Kind;
use crate::manifest::{Base, Delta, Encoded, Listing, ManifestError, ServiceRecord, Written, seal};
use crate::protocol::Reason;
use crate::transport::socket::takeover::{Offered, Want};

/// How many entries are freed in a step.
const DROPPED: usize = 1024;

/// What the program has to do next.
///
/// ```
/// use heirloom::{Incumbent, Turn};
/// use std::time::Instant;
///
/// /// For a program that never lets itself be replaced.
/// fn refuse_all(incumbent: &mut Incumbent) -> std::io::Result<()> {
///     loop {
///         match incumbent.turn(Instant::now())? {
///             Turn::Idle => return Ok(()),
///             Turn::Offer(offer) => offer.refuse("this one stays"),
///             _ => {}
///         }
///     }
/// }
/// ```
pub enum Turn<'i, A = NoRequests> {
    /// Nothing; serve, and come back when the incumbent's descriptor is readable or its deadline has passed.
    Idle,
    /// Somebody wants to see what there is to hand over: write it down.
    Offer(Offer<'i, A>),
    /// Lend these items' descriptors, to be sent.
    Batch(Batch<'i, A>),
    /// The successor is ready: stop touching everything.
    Freeze(Freeze<'i, A>),
    /// A request of the application's own.
    Request(Asked<'i, A>),
    /// Somebody asked the program to end; it was told "Bye".
    Quit(ConnectionId),
    /// A connection that the application [watches](Asked::watch) has ended.
    Closed(ConnectionId),
    /// A request that the application answers itself: only where [`Config::delegate`](crate::Config::delegate) says so.
    Delegated(Delegated<'i, A>),
}

/// How a frozen takeover ended.
///
/// ```
/// use heirloom::Outcome;
///
/// fn say(outcome: &Outcome) -> String {
///     match outcome {
///         Outcome::Taken(by) => format!("replaced by {by}"),
///         Outcome::Resumed(reason) => format!("serving on; the takeover ended {reason}"),
///         Outcome::Superseded(reason) => format!("somebody else serves; the takeover ended {reason}"),
///     }
/// }
/// ```
#[derive(Debug)]
pub enum Outcome {
    /// The successor serves: exit, closing everything with a plain close, never a shutdown. Said 5 ms late: what is closed and
    /// freed from now on may cost more than the takeover, on the processor on which the successor begins to serve.
    Taken(TakenBy),
    /// Serve on.
    Resumed(Reason),
    /// Another process holds the service lock: a third one that serves or, with
    /// [`Fencing::GiveUp`](crate::protocol::Fencing::GiveUp), a successor that lingers. Exit.
    Superseded(Reason),
}

/// Why this side could not hand over. The takeover is aborted: serve on.
///
/// ```
/// use heirloom::{Bundle, HandoverError, Offer};
///
/// fn offer<A>(offer: Offer<'_, A>, bundle: &Bundle) {
///     match offer.begin_bundle(bundle) {
///         Ok(()) => {}
///         Err(HandoverError::Manifest(error)) => eprintln!("too much to hand over: {error}"),
///         Err(HandoverError::Io(error)) => eprintln!("no memory for it: {error}"),
///     }
/// }
/// ```
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// What is to be handed over exceeds a limit, or is in disorder.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A memfd could not be written (memory is full), or the incumbent's own descriptors fail.
    #[error("cannot hand over: {0}")]
    Io(#[from] io::Error),
}

/// Who has taken over.
///
/// ```
/// use heirloom::TakenBy;
///
/// let (program, version) = ("echod".into(), "2.0".into());
/// let by = TakenBy { pid: Some(7), program, version, items: 3, outsider: false };
/// assert_eq!(by.to_string(), "echod 2.0 (pid 7)");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenBy {
    /// Its process id, where it can be seen from here.
    pub pid: Option<u32>,
    /// Its program's name, as it says.
    pub program: String,
    /// Its program's version, as it says.
    pub version: String,
    /// How many items it got.
    pub items: u64,
    /// Whether it is no part of this process's unit, and has taken over by [force](crate::Config::force): it is not the service
    /// that this process's supervisor runs, and cannot use its store.
    pub outsider: bool,
}

impl fmt::Display for TakenBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "{} {} (pid {pid})", self.program, self.version),
            None => write!(f, "{} {} (in another pid namespace)", self.program, self.version),
        }
    }
}

/// Somebody wants to see the base manifest: a successor that was admitted, the preflight of an upgrade, or an operator
/// who inspects. Dropping it refuses.
///
/// ```
/// use heirloom::manifest::Base;
/// use heirloom::{Cbor, Codec, Offer};
///
/// fn hand_over<A>(offer: Offer<'_, A>, topic: &str) -> Result<(), Box<dyn std::error::Error>> {
///     Ok(offer.begin(Base { state: Some(Cbor::encode(topic)?), ..Base::default() })?)
/// }
/// ```
pub struct Offer<'i, A> {
    pub(super) incumbent: Option<&'i mut Incumbent<A>>,
    pub(super) audience: Audience,
}

/// Who is to see a base manifest.
#[derive(Clone, Debug)]
pub(super) enum Audience {
    Successor,
    Preflight,
    Inspectors(Vec<ConnectionId>),
}

impl<A> Offer<'_, A> {
    /// Writes the base manifest: the application's state and its items, as they are now. If it is for a successor, their
    /// descriptors are asked for in [`Turn::Batch`]es. The control listener and the service's record are added here.
    ///
    /// # Errors
    ///
    /// The manifest exceeds a limit or cannot be written (memory is full): whoever wanted it is told, serve on.
    pub fn begin(mut self, mut base: Base) -> Result<(), HandoverError> {
        let Some(incumbent) = self.incumbent.take() else { return Ok(()) };
        base.service = incumbent.record.clone();
        base.items.insert(0, control_entry());
        match &self.audience {
            Audience::Successor => {
                let encoded = base.encode(&incumbent.config.limits);
                let begun = incumbent.offer(encoded, base.items.iter().map(|entry| entry.id).collect());
                for (done, entry) in base.items.into_iter().enumerate() {
                    drop(entry);
                    courtesy::step(done, DROPPED);
                }
                begun
            }
            Audience::Preflight => incumbent.check(base),
            Audience::Inspectors(who) => incumbent.show_manifest(who, &base),
        }
    }

    /// Like [`Offer::begin`], for a program that keeps a [`Bundle`].
    ///
    /// # Errors
    ///
    /// See [`Offer::begin`].
    pub fn begin_bundle(mut self, bundle: &Bundle) -> Result<(), HandoverError> {
        if !matches!(self.audience, Audience::Successor) {
            return self.begin(bundle.base(ServiceRecord::default()));
        }
        let Some(incumbent) = self.incumbent.take() else { return Ok(()) };
        let control = control_entry();
        let written = written(&incumbent.record, &control, bundle);
        let encoded = written.encode(&incumbent.config.limits);
        let ids = written.items.iter().map(|entry| entry.id).collect();
        incumbent.offer(encoded, ids)
    }

    /// Whether it is for a successor, another process, that asks for everything.
    pub fn is_for_successor(&self) -> bool {
        matches!(self.audience, Audience::Successor)
    }

    /// Refuses: whoever wanted it is told why.
    pub fn refuse(mut self, why: &str) {
        self.end(why);
    }

    fn end(&mut self, why: &str) {
        let Some(incumbent) = self.incumbent.take() else { return };
        match &self.audience {
            Audience::Successor => incumbent.withdraw(Instant::now(), why),
            Audience::Preflight => incumbent.fail_upgrade(why),
            Audience::Inspectors(who) => {
                let line = failure(FailureCode::Failed, why);
                for &id in who {
                    incumbent.answer_later(id, line.clone(), Vec::new());
                }
            }
        }
    }
}

impl<A> Drop for Offer<'_, A> {
    fn drop(&mut self) {
        self.end("the application did not offer anything");
    }
}

impl<A> Incumbent<A> {
    /// Offers what is encoded.
    fn offer(
        &mut self,
        encoded: Result<Encoded, ManifestError>,
        ids: Vec<ItemId>,
    ) -> Result<(), HandoverError> {
        let now = Instant::now();
        let Some(takeover) = &mut self.takeover else { return Ok(()) };
        let result = encoded.map_err(HandoverError::from).and_then(|encoded| {
            takeover.bytes += encoded.bytes.len() as u64;
            courtesy::next_step();
            let memfd = seal("base", &encoded.bytes)?;
            courtesy::next_step();
            takeover.offered = Some(Offered { listing: Listing::default(), memfd });
            takeover.machine.offered(now, ids);
            Ok(encoded.bytes)
        });
        self.run_takeover(now);
        // The successor reads meanwhile.
        let listing = result.and_then(|bytes| Ok(Listing::read(bytes, &self.config.limits)?));
        let Some(takeover) = &mut self.takeover else { return listing.map(drop) };
        match (listing, &mut takeover.offered) {
            (Ok(listing), Some(offered)) => offered.listing = listing,
            (Ok(_), None) => {}
            (Err(error), _) => {
                takeover.machine.abort(format_args!("the incumbent cannot write its manifest: {error}"));
                self.run_takeover(now);
                return Err(error);
            }
        }
        Ok(())
    }

    fn show_manifest(&mut self, who: &[ConnectionId], base: &Base) -> Result<(), HandoverError> {
        let sealed = base
            .encode(&self.config.limits)
            .map_err(HandoverError::from)
            .and_then(|encoded| Ok((seal("base", &encoded.bytes)?, encoded.bytes.len())));
        for &id in who {
            let copy = match &sealed {
                Ok((memfd, _)) => memfd.try_clone().map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match (copy, &sealed) {
                (Ok(memfd), Ok((_, bytes))) => {
                    let summary = ManifestSummary {
                        bytes: *bytes as u64,
                        items: base.items.len() as u64,
                        state_bytes: base.state.as_ref().map_or(0, Vec::len) as u64,
                    };
                    self.answer_later(id, Reply::Manifest(summary).to_line(), vec![memfd]);
                }
                (copy, _) => {
                    let why = copy.err().unwrap_or_default();
                    let why = format!("the incumbent cannot write its manifest: {why}");
                    self.answer_later(id, failure(FailureCode::Failed, why), Vec::new());
                }
            }
        }
        sealed.map(drop)
    }
}

/// Some descriptors are to be sent.
///
/// ```
/// use heirloom::{Batch, ItemId};
/// use std::collections::BTreeMap;
/// use std::net::TcpStream;
/// use std::os::fd::AsFd;
///
/// fn lend<A>(batch: Batch<'_, A>, connections: &BTreeMap<ItemId, TcpStream>) {
///     batch.send(|id| connections.get(&id).map(AsFd::as_fd));
/// }
/// ```
pub struct Batch<'i, A> {
    pub(super) incumbent: &'i mut Incumbent<A>,
    pub(super) ids: Vec<ItemId>,
}

impl<A> Batch<'_, A> {
    /// Sends them; `descriptor` lends each. `None` means that the item has ended since it was offered; the delta must
    /// then say so.
    pub fn send<'d>(self, mut descriptor: impl FnMut(ItemId) -> Option<BorrowedFd<'d>>) {
        let now = Instant::now();
        self.incumbent.send_batch(now, self.ids, &mut descriptor);
        self.incumbent.run_takeover(now);
    }
}

impl<A> Incumbent<A> {
    fn send_batch<'d>(
        &mut self,
        now: Instant,
        ids: Vec<ItemId>,
        descriptor: &mut dyn FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) {
        let listener = self.listener.as_fd();
        if let Some(takeover) = &mut self.takeover {
            takeover.send_batch(now, ids, &mut |id| {
                if id == ItemId::CONTROL { Some(listener) } else { descriptor(id) }
            });
        }
    }
}

/// The successor is ready, and nothing may be touched until this is released or resumed. Dropping it resumes.
///
/// In an upgrade in place there is no successor yet: a release becomes it, and returns only when that has failed. Signals
/// wait meanwhile, until the new program has started, or a resume: a program that acts on signals looks once more whether
/// one has come before it releases.
///
/// ```
/// use heirloom::{Bundle, Freeze, HandoverError, Outcome};
///
/// fn release<A>(freeze: Freeze<'_, A>, bundle: &Bundle) -> Result<bool, HandoverError> {
///     Ok(matches!(freeze.release_bundle(bundle)?, Outcome::Taken(_)))
/// }
/// ```
#[must_use = "a frozen incumbent serves nobody: release it or resume"]
pub struct Freeze<'i, A> {
    pub(super) incumbent: Option<&'i mut Incumbent<A>>,
}

impl<A> Freeze<'_, A> {
    /// Whether a release becomes the new program: then what other threads of this one have yet to do is never done.
    pub fn is_in_place(&self) -> bool {
        self.incumbent.as_ref().is_some_and(|incumbent| incumbent.frozen_in_place().is_some())
    }

    /// What was offered, to compare with.
    fn offered(&self) -> Option<&Listing> {
        let incumbent = self.incumbent.as_ref()?;
        let in_place = incumbent.frozen_in_place();
        let offered = in_place.or_else(|| incumbent.takeover.as_ref()?.offered.as_ref())?;
        Some(&offered.listing)
    }

    /// Releases everything: sends what has changed since the offer, lends the descriptors of added items (of all items,
    /// in an upgrade in place), and waits until the successor serves or has failed. Meanwhile the control socket is
    /// answered.
    ///
    /// The caller has stopped reading, writing and accepting in all its threads. `delta` says what changed; its
    /// checksum, counts, counters and time are filled in here.
    ///
    /// # Errors
    ///
    /// The delta exceeds a limit or cannot be written, or the incumbent's own descriptors fail. The takeover is
    /// aborted then: serve on.
    pub fn release<'d>(
        mut self,
        delta: Delta,
        mut descriptor: impl FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) -> Result<Outcome, HandoverError> {
        let Some(incumbent) = self.incumbent.take() else {
            return Err(io::Error::other("released twice").into());
        };
        if incumbent.frozen_in_place().is_some() {
            return incumbent.become_new_program(delta, &mut descriptor);
        }
        if let Err(error) = incumbent.seal_delta(delta) {
            let why = format!("the incumbent cannot write its delta: {error}");
            incumbent.finish(Some(&why), &mut |_| None)?;
            return Err(error);
        }
        Ok(incumbent.finish(None, &mut descriptor)?)
    }

    /// Like [`Freeze::release`], with everything as it is now instead of what has changed. Compares item by item: for
    /// programs with few of them.
    ///
    /// # Errors
    ///
    /// See [`Freeze::release`].
    pub fn release_all<'d>(
        self,
        mut now: Base,
        descriptor: impl FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) -> Result<Outcome, HandoverError> {
        now.items.insert(0, control_entry());
        self.release_written(&now.written(), descriptor)
    }

    fn release_written<'d>(
        self,
        now: &Written<'_>,
        descriptor: impl FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) -> Result<Outcome, HandoverError> {
        let delta = self.offered().map_or_else(|| Ok(Delta::default()), |base| Delta::since(base, now));
        match delta {
            Ok(delta) => self.release(delta, descriptor),
            Err(error) => {
                self.resume(&format!("the incumbent cannot write its delta: {error}"));
                Err(error.into())
            }
        }
    }

    /// Like [`Freeze::release_all`], for a program that keeps a [`Bundle`].
    ///
    /// # Errors
    ///
    /// See [`Freeze::release`].
    pub fn release_bundle(self, bundle: &Bundle) -> Result<Outcome, HandoverError> {
        let (service, control) = (ServiceRecord::default(), control_entry());
        self.release_written(&written(&service, &control, bundle), |id| bundle.descriptor(id))
    }

    /// Does not hand over; the successor is told why. Serve on.
    pub fn resume(mut self, why: &str) {
        self.end(why);
    }

    fn end(&mut self, why: &str) {
        let Some(incumbent) = self.incumbent.take() else { return };
        if incumbent.frozen_in_place().is_some() {
            incumbent.fail_upgrade(why);
        } else {
            let _ = incumbent.finish(Some(why), &mut |_| None);
        }
    }
}

impl<A> Drop for Freeze<'_, A> {
    fn drop(&mut self) {
        self.end("the application resumed");
    }
}

impl<A> Incumbent<A> {
    /// Fills in what the application does not know of.
    pub(super) fn complete(&self, mut delta: Delta, offered: &Listing, frozen_at_ns: u64) -> Delta {
        delta.base_crc = offered.crc();
        // If the application ends more than there was, the successor finds out and refuses.
        let count = (offered.len() + delta.added.len()).saturating_sub(delta.ended.len());
        delta.count = count as u64;
        delta.counters = self.record.counters.clone();
        delta.frozen_at_ns = frozen_at_ns;
        delta
    }

    fn seal_delta(&mut self, delta: Delta) -> Result<(), HandoverError> {
        let Some(takeover) = &self.takeover else { return Ok(()) };
        let Some(offered) = &takeover.offered else { return Ok(()) };
        let frozen_at_ns = takeover.frozen_at_ns.unwrap_or_else(clock::monotonic_ns);
        let delta = self.complete(delta, &offered.listing, frozen_at_ns);
        let Some(takeover) = &mut self.takeover else { return Ok(()) };
        let late = delta.added.iter().map(|entry| entry.id).collect();
        let encoded = delta.encode(&self.config.limits)?;
        takeover.bytes += encoded.bytes.len() as u64;
        takeover.delta = Some(seal("delta", &encoded.bytes)?);
        crash::reach(Point::DeltaSealed);
        takeover.machine.frozen(Instant::now(), late);
        Ok(())
    }

    /// Drives the takeover to its end. Nothing else happens in the program meanwhile.
    fn finish<'d>(
        &mut self,
        abort: Option<&str>,
        descriptor: &mut dyn FnMut(ItemId) -> Option<BorrowedFd<'d>>,
    ) -> io::Result<Outcome> {
        if let (Some(why), Some(takeover)) = (abort, &mut self.takeover) {
            takeover.machine.abort(why);
        }
        loop {
            let now = Instant::now();
            self.catch_up(now);
            self.run_takeover(now);
            self.handle_timeouts(now);
            if let Some(outcome) = self.ended.take() {
                return Ok(outcome);
            }
            if self.takeover.is_none() {
                return Err(io::Error::other("the takeover has ended before"));
            }
            let want = self.takeover.as_mut().and_then(|takeover| takeover.want.take());
            if let Some(Want::Batch(ids)) = want {
                self.send_batch(now, ids, descriptor);
            } else if let Err(error) = self.handle_events(None) {
                self.withdraw(now, &format!("the incumbent's own event loop fails: {error}"));
                return Err(error);
            }
        }
    }
}

/// A bundle as it is written in a manifest, without a copy of it.
fn written<'a>(service: &'a ServiceRecord, control: &'a Entry, bundle: &'a Bundle) -> Written<'a> {
    let entries = bundle.entries().filter(|entry| entry.id != ItemId::CONTROL);
    Written {
        service,
        state: bundle.encoded_state(),
        items: iter::once(control).chain(entries).collect(),
        next_id: bundle.next_id().0,
        sections: &[],
    }
}

fn control_entry() -> Entry {
    Entry { id: ItemId::CONTROL, name: CONTROL_NAME.into(), kind: Kind::UnixListener, state: Vec::new() }
}
