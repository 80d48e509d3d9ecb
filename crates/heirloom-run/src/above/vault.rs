//! The vault: which entry is in which page. See [`super`] for what always holds.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{PipeReader, pipe};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use heirloom::notify::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::inherited::StoredPage;
use super::page::{CAPACITY, Page, PageError, Refusal};
use super::record::{Lent, Record};
use super::voice::{Fate, Voice};

/// What pages are called in the store above, before their ids; and what is put there to see whether anything is kept.
pub(super) const PAGE: &str = "heirloom.page.";
pub(super) const PROBE: &str = "heirloom.probe.";

pub(super) fn page_name(id: u64) -> String {
    format!("{PAGE}{id}")
}

fn probe_name(id: u64) -> String {
    format!("{PROBE}{id}")
}

/// Why an unprivileged user cannot have everything in the vault.
const IN_FLIGHT: &str =
    "it would be more in flight than the limit on open files allows (LimitNOFILE=, `ulimit -n`)";

/// Who holds the entries, and lends them when they are to be put again.
pub(crate) trait Holder {
    /// What has this number.
    fn lend(&self, number: u64) -> Option<Lent<'_>>;
}

/// A page that was carried over an upgrade in place.
#[derive(Debug)]
pub(crate) struct CarriedPage {
    pub(crate) id: u64,
    pub(crate) inbox: OwnedFd,
    pub(crate) pen: OwnedFd,
}

impl CarriedPage {
    pub(crate) fn name(&self) -> String {
        page_name(self.id)
    }
}

/// The vault.
#[derive(Debug, Default)]
pub(crate) struct Vault {
    pages: BTreeMap<u64, Page>,
    /// The page that is written to.
    open: Option<u64>,
    /// The page whose message to the one above is not sent yet, and that message.
    on_its_way: Option<(u64, u64)>,
    next_page: u64,
    /// The page and the message that an entry is in.
    places: HashMap<u64, (u64, u64)>,
    missing: BTreeSet<u64>,
    /// Pages with forgotten entries, up to these messages.
    dirty: BTreeMap<u64, u64>,
    trials: Vec<Trial>,
    /// How many entries may be in it.
    most: Option<usize>,
    /// Something has changed, so that what is missing may find a page.
    retry: bool,
    /// The one above has not kept a page: it is not asked again until it has one less.
    refused: bool,
    refused_said: bool,
    crowded_said: bool,
}

/// Whether the one above has kept a page. It is sent one more descriptor behind the page, whose other end is here; and if
/// that is still open when a barrier is past, there was room for both.
#[derive(Debug)]
struct Trial {
    page: u64,
    probe: PipeReader,
    barrier: PipeReader,
    watched: bool,
}

impl Vault {
    /// Goes on with pages that another process has left, and gives what is in them, in the order of the numbers.
    pub(crate) fn restore(
        &mut self,
        pages: Vec<StoredPage>,
    ) -> Result<Vec<(Record<'static>, OwnedFd)>, PageError> {
        let mut found = BTreeMap::new();
        for StoredPage { id, inbox } in pages {
            self.next_page = self.next_page.max(id + 1);
            let see = |record: Record<'static>, descriptor| {
                found.insert(record.number, (record, descriptor));
            };
            if let Some(page) = Page::restore(inbox, see)? {
                self.add(id, page);
            }
        }
        Ok(found.into_values().collect())
    }

    /// Goes on with pages of this process.
    pub(crate) fn adopt(&mut self, pages: Vec<CarriedPage>) -> Result<(), PageError> {
        for CarriedPage { id, inbox, pen } in pages {
            self.next_page = self.next_page.max(id + 1);
            self.add(id, Page::adopt(pen, inbox)?);
        }
        Ok(())
    }

    fn add(&mut self, id: u64, page: Page) {
        for (number, message) in page.through(page.last()) {
            // Of one that is there twice the later place counts.
            if let Some((page, message)) = self.places.insert(number, (id, message)) {
                mark(&mut self.dirty, page, message);
            }
        }
        self.pages.insert(id, page);
    }

    /// Only these are to be in it: others are forgotten, and those that are not in it are missing.
    pub(crate) fn reconcile(&mut self, numbers: &[u64]) {
        let wanted: BTreeSet<u64> = numbers.iter().copied().collect();
        let stale: Vec<u64> = self.places.keys().filter(|number| !wanted.contains(number)).copied().collect();
        for number in stale {
            self.forget(number);
        }
        self.missing = wanted.into_iter().filter(|number| !self.places.contains_key(number)).collect();
        self.retry = true;
    }

    /// Puts an entry.
    pub(crate) fn keep(&mut self, lent: &Lent<'_>, voice: &mut Voice) {
        // What waits comes first; and where there was no room, there still is none.
        if self.room() == 0 {
            self.say_crowded(IN_FLIGHT);
        }
        if !self.missing.is_empty() || self.room() == 0 || self.write(std::slice::from_ref(lent), voice) == 0
        {
            self.missing.insert(lent.record.number);
        }
    }

    pub(crate) fn forget(&mut self, number: u64) {
        self.missing.remove(&number);
        if let Some((page, message)) = self.places.remove(&number) {
            mark(&mut self.dirty, page, message);
        }
    }

    /// Takes out what was forgotten, and puts what is missing if that may have become possible.
    pub(crate) fn settle(&mut self, holder: &impl Holder, voice: &mut Voice) {
        if let Some((id, message)) = self.on_its_way {
            match voice.fate(message) {
                Fate::Waits => {}
                Fate::Said => {
                    self.on_its_way = None;
                    self.retry = true;
                }
                Fate::Lost => {
                    self.on_its_way = None;
                    self.lose(id, voice);
                }
            }
        }
        while let Some((id, message)) = self.dirty.pop_first() {
            self.rewrite(id, message, holder, voice);
            self.retry = true;
        }
        if std::mem::take(&mut self.retry) && !self.missing.is_empty() {
            self.retry_missing(holder, voice);
        }
        self.remove_spares(voice);
    }

    /// Takes all messages up to this one out of a page, when what is to stay of them is in the page again behind.
    fn rewrite(&mut self, id: u64, mut message: u64, holder: &impl Holder, voice: &mut Voice) {
        let Some(page) = self.pages.get_mut(&id) else { return };
        let goes_on = page.has_pen_behind(message) || page.append_pen().is_ok();
        if !goes_on {
            // Not even for that is there room: all that is in it moves, and it is given up.
            message = page.last();
            page.close();
        }
        let stay = page.through(message).filter(|&(number, at)| self.places.get(&number) == Some(&(id, at)));
        let stay: Vec<Lent<'_>> = stay.filter_map(|(number, _)| holder.lend(number)).collect();
        let mut again = 0;
        while goes_on
            && again < stay.len()
            && let Ok((count, at)) = page.append_again(&stay[again..])
        {
            for lent in &stay[again..again + count] {
                self.places.insert(lent.record.number, (id, at));
            }
            again += count;
        }
        self.put_again(&stay[again..], voice);
        if let Some(page) = self.pages.get_mut(&id) {
            page.take_out(message);
        }
        if !goes_on {
            self.remove_page(id, voice);
        }
    }

    fn retry_missing(&mut self, holder: &impl Holder, voice: &mut Voice) {
        let room = self.room();
        let missing: Vec<u64> = self.missing.iter().copied().take(room).collect();
        for number in &missing {
            self.missing.remove(number);
        }
        let lent: Vec<Lent<'_>> = missing.iter().filter_map(|&number| holder.lend(number)).collect();
        self.put_again(&lent, voice);
        if self.missing.is_empty() {
            (self.refused_said, self.crowded_said) = (false, false);
        }
    }

    /// No more than this may be in it from now on; what is, stays.
    pub(crate) fn limit(&mut self, most: usize) {
        self.most = Some(most).filter(|&most| most < usize::MAX);
        self.retry = true;
    }

    fn room(&self) -> usize {
        self.most.map_or(usize::MAX, |most| most.saturating_sub(self.places.len()))
    }

    /// Whether more is to be in it than may be.
    pub(crate) fn is_limited(&self) -> bool {
        self.room() == 0 && !self.missing.is_empty()
    }

    /// Puts these, as far as there is room; what there is none for is missing.
    fn put_again(&mut self, lent: &[Lent<'_>], voice: &mut Voice) {
        let written = self.write(lent, voice);
        for lent in &lent[written..] {
            self.places.remove(&lent.record.number);
            self.missing.insert(lent.record.number);
        }
    }

    /// Writes these to pages with room, in their order; gives how many.
    fn write(&mut self, lent: &[Lent<'_>], voice: &mut Voice) -> usize {
        let mut written = 0;
        while written < lent.len() {
            let Some(id) = self.page_with_room(voice) else { break };
            let Some(page) = self.pages.get_mut(&id) else { break };
            match page.append(&lent[written..]) {
                Ok((count, message)) => {
                    for lent in &lent[written..written + count] {
                        self.places.insert(lent.record.number, (id, message));
                    }
                    written += count;
                }
                // Another page is looked for.
                Err(Refusal::Full) => page.close(),
                Err(Refusal::InFlight) => {
                    self.say_crowded(IN_FLIGHT);
                    break;
                }
                Err(Refusal::Other(why)) => {
                    self.say_crowded(&why);
                    break;
                }
            }
        }
        written
    }

    fn say_crowded(&mut self, why: &str) {
        if !std::mem::replace(&mut self.crowded_said, true) {
            tracing::warn!("not everything can be kept in the store above: {why}");
        }
    }

    /// A page that can be written to: the open one, one that is half empty, or a new one; any that has room if there is none.
    fn page_with_room(&mut self, voice: &mut Voice) -> Option<u64> {
        let room = |pages: &BTreeMap<u64, Page>, id| pages.get(&id).map_or(0, Page::room);
        if let Some(open) = self.open.filter(|&open| room(&self.pages, open) > 0) {
            return Some(open);
        }
        let on_its_way = self.on_its_way.map(|(id, _)| id);
        let sent = self.pages.keys().copied().filter(|&id| Some(id) != on_its_way);
        let emptiest = sent.max_by_key(|&id| room(&self.pages, id));
        let has = emptiest.map_or(0, |id| room(&self.pages, id));
        self.open = if has >= CAPACITY / 2 {
            emptiest
        } else if self.refused || on_its_way.is_some() {
            emptiest.filter(|_| has > 0)
        } else {
            self.new_page(voice).or(emptiest.filter(|_| has > 0))
        };
        self.open
    }

    fn new_page(&mut self, voice: &mut Voice) -> Option<u64> {
        let id = self.next_page;
        self.next_page += 1;
        let made = Page::new().and_then(|page| Ok((page, pipe()?, pipe()?)));
        let (page, (probe, theirs), (barrier, barred)) = match made {
            Ok(made) => made,
            Err(error) => {
                self.say_crowded(&error.to_string());
                return None;
            }
        };
        let message = voice.say(&Message::new().store(&page_name(id)), &[page.inbox()]);
        voice.say(&Message::new().store(&probe_name(id)), &[theirs.as_fd()]);
        voice.say(&Message::new().assign("BARRIER", "1"), &[barred.as_fd()]);
        self.trials.push(Trial { page: id, probe, barrier, watched: false });
        self.pages.insert(id, page);
        match voice.fate(message) {
            Fate::Said => Some(id),
            Fate::Waits => {
                self.on_its_way = Some((id, message));
                None
            }
            Fate::Lost => {
                self.lose(id, voice);
                None
            }
        }
    }

    /// What is to be waited for that was not before: the barriers behind new pages.
    pub(crate) fn new_trials(&mut self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        self.trials.iter_mut().filter_map(|trial| {
            let new = !std::mem::replace(&mut trial.watched, true);
            new.then(|| (trial.page, trial.barrier.as_fd()))
        })
    }

    /// Finds out which pages were kept.
    pub(crate) fn look_at_trials(&mut self, voice: &mut Voice) {
        let (over, going_on) = std::mem::take(&mut self.trials)
            .into_iter()
            .partition(|trial: &Trial| has_hung_up(&trial.barrier));
        self.trials = going_on;
        for trial in over {
            let kept = !has_hung_up(&trial.probe);
            voice.say(&Message::new().remove(&probe_name(trial.page)), &[]);
            if !kept {
                self.lose(trial.page, voice);
            }
        }
    }

    /// The one above does not keep this page.
    fn lose(&mut self, id: u64, voice: &mut Voice) {
        self.refused = true;
        if !std::mem::replace(&mut self.refused_said, true) {
            let pages = self.pages.len().saturating_sub(1);
            tracing::warn!(
                pages,
                "the supervisor above has no room for more: what is held here does not all survive a SIGKILL of heirloom run \
                 (FileDescriptorStoreMax= of the unit, or --store-max)"
            );
        }
        let lost = self.pages.get(&id).map(|page| page.through(page.last()).collect::<Vec<_>>());
        for (number, message) in lost.into_iter().flatten() {
            if self.places.get(&number) == Some(&(id, message)) {
                self.places.remove(&number);
                self.missing.insert(number);
            }
        }
        self.remove_page(id, voice);
    }

    /// Takes out all that is in a page, and has it removed above.
    fn remove_page(&mut self, id: u64, voice: &mut Voice) {
        if let Some(mut page) = self.pages.remove(&id) {
            page.take_out(page.last());
            voice.say(&Message::new().remove(&page_name(id)), &[]);
        }
        self.dirty.remove(&id);
        self.open.take_if(|open| *open == id);
        self.on_its_way.take_if(|(page, _)| *page == id);
    }

    /// Empty pages are removed above, but for one.
    fn remove_spares(&mut self, voice: &mut Voice) {
        let spare = |(&id, page): (&u64, &Page)| (page.is_empty() && self.open != Some(id)).then_some(id);
        let on_its_way = self.on_its_way.map(|(id, _)| id);
        let spares = self.pages.iter().filter_map(spare).filter(|&id| Some(id) != on_its_way);
        for id in spares.skip(1).collect::<Vec<_>>() {
            self.remove_page(id, voice);
            self.refused = false;
        }
    }

    /// Takes everything out.
    pub(crate) fn empty(&mut self, voice: &mut Voice) {
        for id in self.pages.keys().copied().collect::<Vec<_>>() {
            self.remove_page(id, voice);
        }
        self.end_trials(voice);
        self.places.clear();
        self.missing.clear();
    }

    /// Finds out no more about pages; what was sent is taken to be kept.
    pub(crate) fn end_trials(&mut self, voice: &mut Voice) {
        for trial in std::mem::take(&mut self.trials) {
            voice.say(&Message::new().remove(&probe_name(trial.page)), &[]);
        }
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, BorrowedFd<'_>)> {
        self.pages.iter().map(|(&id, page)| (id, page.inbox(), page.pen()))
    }

    /// Whether a page is not sent yet.
    pub(crate) fn is_behind(&self) -> bool {
        self.on_its_way.is_some()
    }

    /// Whether the one above has kept nothing at all.
    pub(crate) fn is_refused(&self) -> bool {
        self.refused && self.pages.is_empty()
    }

    #[cfg(test)]
    pub(crate) fn kept(&self) -> usize {
        self.places.len()
    }

    pub(crate) fn keeps(&self, number: u64) -> bool {
        self.places.contains_key(&number)
    }
}

fn mark(dirty: &mut BTreeMap<u64, u64>, page: u64, message: u64) {
    let through = dirty.entry(page).or_insert(message);
    *through = message.max(*through);
}

/// Whether nobody has the other end of a pipe any more.
fn has_hung_up(reader: &PipeReader) -> bool {
    let mut fds = [PollFd::new(reader, PollFlags::empty())];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
}

#[cfg(test)]
mod tests;
