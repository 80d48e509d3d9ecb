//! What the supervisor is told of takeovers and upgrades while this process serves: that one is under way (`RELOADING=1`), and, if
//! nothing comes of it, that this process is ready as before, that it is the main one, and why.
//!
//! Of one that succeeds the successor tells, with its own `READY=1`.

use std::mem;

use heirloom::Incumbent;
use heirloom::control::LastTakeover;
use heirloom::notify::Message;

/// How much of a reason is told, in characters.
const LONGEST: usize = 160;

/// See the [module](self).
#[derive(Debug, Default)]
pub(crate) struct Reloads {
    running: bool,
    last: Option<LastTakeover>,
    failed: Option<String>,
}

impl Reloads {
    /// What is to be told now. After a failure the [status](Reloads::status) is another one, too.
    pub(crate) fn turn<A>(&mut self, incumbent: &Incumbent<A>) -> Vec<Message> {
        self.look(incumbent.is_being_replaced(), incumbent.last_takeover())
    }

    fn look(&mut self, running: bool, last: Option<&LastTakeover>) -> Vec<Message> {
        let was_running = mem::replace(&mut self.running, running);
        let is_new = self.last.as_ref() != last;
        if is_new {
            self.last = last.cloned();
        }
        // It may have begun and ended since the last look.
        let has_failed = is_new && last.is_some_and(has_failed);
        let mut messages = Vec::new();
        if !was_running && (running || has_failed) {
            messages.push(Message::new().reloading());
        }
        if !running && (was_running || has_failed) {
            let reason = last.and_then(|last| last.reason.as_deref()).unwrap_or("it was withdrawn");
            self.failed = Some(match reason.char_indices().nth(LONGEST) {
                Some((end, _)) => format!("{}…", &reason[..end]),
                None => reason.to_owned(),
            });
            messages.push(Message::new().ready().main_pid(std::process::id()));
        }
        messages
    }

    /// The status, with what has become of the last takeover if it has failed.
    pub(crate) fn status(&self, status: &str) -> String {
        match &self.failed {
            Some(reason) => format!("{status}; upgrade rolled back: {reason}"),
            None => status.to_owned(),
        }
    }
}

/// Whether a takeover had begun, or an upgrade; who is refused at once has begun none.
fn has_failed(last: &LastTakeover) -> bool {
    last.outcome == "resumed" || (last.outcome == "refused" && last.peer_pid.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(outcome: &str, reason: Option<&str>) -> LastTakeover {
        LastTakeover { outcome: outcome.into(), reason: reason.map(Into::into), ..LastTakeover::default() }
    }

    fn look(reloads: &mut Reloads, running: bool, last: &LastTakeover) -> String {
        reloads.look(running, Some(last)).iter().map(Message::as_str).collect()
    }

    fn serves_on() -> String {
        format!("READY=1\nMAINPID={}\n", std::process::id())
    }

    #[test]
    fn it_begins_and_fails_and_is_tried_again() {
        let mut reloads = Reloads::default();
        let mut before = last("taken", None);
        assert_eq!(look(&mut reloads, false, &before), "", "that was how this process came to serve");
        for reason in ["at step ready: no", "at step accept: no"] {
            let begun = look(&mut reloads, true, &before);
            assert!(
                begun.starts_with("RELOADING=1\nMONOTONIC_USEC=") && !begun.contains("READY=1"),
                "{begun}"
            );
            assert_eq!(look(&mut reloads, true, &before), "");
            before = last("resumed", Some(reason));
            assert_eq!(look(&mut reloads, false, &before), serves_on());
            assert_eq!(look(&mut reloads, false, &before), "");
            assert_eq!(reloads.status("connected"), format!("connected; upgrade rolled back: {reason}"));
        }
    }

    #[test]
    fn one_that_is_over_at_once_is_told_too_and_one_that_was_refused_is_not() {
        let mut reloads = Reloads::default();
        let stranger = LastTakeover { peer_pid: Some(7), ..last("refused", Some("wrong service")) };
        assert_eq!(look(&mut reloads, false, &stranger), "");
        assert_eq!(reloads.status("clients: 3"), "clients: 3");
        for outcome in ["resumed", "refused"] {
            let told = look(&mut reloads, false, &last(outcome, Some(&"ü".repeat(1000))));
            assert!(told.starts_with("RELOADING=1\n") && told.ends_with(&serves_on()), "{told}");
            assert!(reloads.status("").chars().count() < 200);
        }
    }
}
