//! The bundle: what is handed over.
//!
//! An incumbent keeps its descriptors and state in a [`Bundle`] (or makes one up when it is asked), and writes
//! it down as a manifest; a successor makes a bundle of the manifest and the descriptors that arrived, and takes
//! things out of it. A bundle owns its descriptors: what is neither taken nor handed on is closed, and it says
//! so. Putting in, taking out and closing never change a descriptor's open file description, which another
//! process may share.

use std::{
    any::type_name,
    collections::{BTreeMap, HashMap},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    Entry, EntryRef, Item, ItemId, Kind, RESERVED_PREFIX, Typed,
    codec::{Cbor, Codec, CodecError},
    manifest::{Base, Delta, ManifestError, ServiceRecord},
};

/// The application's state, and items: descriptors, each with an id, a name, a kind and its own state.
///
/// State is encoded with [`Cbor`]; an application with a [`Codec`] of its own uses the methods that speak of
/// *encoded* state. Looking up by id takes logarithmic time; the first look-up by name makes an index.
///
/// ```
/// use heirloom::{Bundle, manifest::ServiceRecord};
/// use std::{collections::BTreeMap, net::TcpListener, os::fd::OwnedFd};
///
/// // The incumbent:
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// let address = listener.local_addr()?;
/// let mut bundle = Bundle::new();
/// bundle.set_state(&"the topic")?;
/// let id = bundle.add("listener", listener, &128)?;
///
/// // What travels: the manifest, and the descriptors.
/// let base = bundle.base(ServiceRecord::default());
/// let descriptor: OwnedFd = bundle.remove(id).unwrap();
///
/// // The successor:
/// let mut bundle = Bundle::from_parts(base, BTreeMap::from([(id, descriptor)]))?;
/// assert_eq!(bundle.state::<String>()?.as_deref(), Some("the topic"));
/// let listener = bundle.take::<TcpListener>("listener")?;
/// assert_eq!(listener.descriptor.local_addr()?, address);
/// assert_eq!(listener.state::<u32>()?, Some(128));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Bundle {
    service: ServiceRecord,
    state: Option<Vec<u8>>,
    items: BTreeMap<ItemId, Item>,
    next_id: u64,
    /// Ids by name, made when first needed. An id in it may be gone by now: none is ever used again, so a look
    /// at `items` settles it, and removing an item need not touch the index.
    by_name: Option<HashMap<String, Vec<ItemId>>>,
}

/// An item that was taken out of a bundle.
///
/// ```
/// use heirloom::{Bundle, bundle::Taken};
/// use std::os::unix::net::UnixStream;
///
/// let (ours, _theirs) = UnixStream::pair()?;
/// let mut bundle = Bundle::new();
/// bundle.add("client", ours, &("alice", 3))?;
///
/// let client: Taken<UnixStream> = bundle.take("client")?;
/// assert_eq!(client.state::<(String, u32)>()?, Some(("alice".into(), 3)));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Taken<T> {
    /// The item's identity. An item that is handed on later keeps it.
    pub id: ItemId,
    /// The item's name.
    pub name: String,
    /// The descriptor.
    pub descriptor: T,
    /// The item's encoded state; empty when it has none.
    pub state: Vec<u8>,
}

/// Why something could not be put into a bundle or taken out of it.
///
/// ```
/// use heirloom::{Bundle, BundleError};
/// use std::net::TcpStream;
///
/// let error = Bundle::new().take::<TcpStream>("client").unwrap_err();
/// assert!(matches!(error, BundleError::NoSuchName { .. }));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// State could not be encoded or decoded.
    #[error("{of}: {source}")]
    State {
        /// Whose state.
        of: String,
        /// What is the matter with it.
        source: CodecError,
    },
    /// An application's item may not be called this.
    #[error("the name {name:?} is reserved: names that begin with {RESERVED_PREFIX:?} are Heirloom's own")]
    ReservedName {
        /// The name.
        name: String,
    },
    /// The id counter has come to its end.
    #[error("no item id is left")]
    OutOfIds,
    /// The kernel would not say what a descriptor is.
    #[error("could not find out what the descriptor of {item} is: {source}")]
    Unreadable {
        /// The item.
        item: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The manifest lists an item, and no descriptor came for it.
    #[error("the manifest lists item {item}, and no descriptor arrived for it")]
    NoDescriptor {
        /// The item.
        item: String,
    },
    /// A descriptor came for an item that the manifest does not list.
    #[error("a descriptor arrived for item {id}, which the manifest does not list")]
    NotListed {
        /// The id that it came with.
        id: ItemId,
    },
    /// What arrived is not what the manifest says.
    #[error("item {name:?} (id {id}) should be a {declared}, and the descriptor that arrived is a {real}")]
    WrongKind {
        /// The item's id.
        id: ItemId,
        /// The item's name.
        name: String,
        /// The kind in the manifest.
        declared: Kind,
        /// The kind of the descriptor.
        real: Kind,
    },
    /// No item has this name.
    #[error("the bundle holds no item called {name:?}")]
    NoSuchName {
        /// The name that was asked for.
        name: String,
    },
    /// Several items have this name.
    #[error("the bundle holds {count} items called {name:?}: take them all, or one by its id")]
    Ambiguous {
        /// The name that was asked for.
        name: String,
        /// How many there are.
        count: usize,
    },
    /// No item has this id.
    #[error("the bundle holds no item with id {id}")]
    NoSuchId {
        /// The id that was asked for.
        id: ItemId,
    },
    /// The descriptor cannot be had as this type. The item is still in the bundle.
    #[error("item {item} cannot be taken as a {asked}; it stays in the bundle")]
    WrongType {
        /// The item.
        item: String,
        /// The type that was asked for.
        asked: &'static str,
    },
    /// The manifest contradicts itself, or a delta does not fit.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

impl Default for Bundle {
    fn default() -> Self {
        Bundle::new()
    }
}

impl Bundle {
    /// An empty bundle. Its first item gets [`ItemId::FIRST`].
    #[must_use]
    pub fn new() -> Self {
        Bundle {
            service: ServiceRecord::default(),
            state: None,
            items: BTreeMap::new(),
            next_id: ItemId::FIRST.0,
            by_name: None,
        }
    }

    /// Puts a manifest and the descriptors that arrived together again.
    ///
    /// Every descriptor is checked against its entry with a few system calls, so that this belongs before the
    /// freeze; [`apply`](Bundle::apply) then brings in the delta. An item whose kind the other program did not
    /// know ([`Kind::Other`]) may be anything, and gets the kind that it really has. Sections are not kept.
    ///
    /// # Errors
    /// [`BundleError::NoDescriptor`], [`BundleError::NotListed`], [`BundleError::WrongKind`] or
    /// [`BundleError::Unreadable`]. All descriptors are closed then, which the incumbent's do not notice.
    pub fn from_parts(mut base: Base, descriptors: BTreeMap<ItemId, OwnedFd>) -> Result<Bundle, BundleError> {
        let items = matched(std::mem::take(&mut base.items), descriptors)?;
        Ok(Bundle::of_items(base, items))
    }

    /// What a base says, with these items, which were checked, in place of its own.
    pub(crate) fn of_items(base: Base, items: BTreeMap<ItemId, Item>) -> Bundle {
        let past_all = items.last_key_value().map_or(0, |(id, _)| id.0.saturating_add(1));
        Bundle {
            service: base.service,
            state: base.state,
            items,
            next_id: base.next_id.max(past_all),
            by_name: None,
        }
    }

    /// Brings a bundle that was made from a base to the moment of the delta.
    ///
    /// `descriptors` are those of the items that are new; those of items that have ended are closed. The bundle
    /// must still hold what the base listed: before this, borrow descriptors rather than take them. The work
    /// is proportional to what the delta holds.
    ///
    /// # Errors
    /// [`BundleError::Manifest`] when the delta does not fit, otherwise as [`from_parts`](Bundle::from_parts).
    /// The bundle is unchanged then.
    pub fn apply(
        &mut self,
        delta: Delta,
        base_crc: u32,
        descriptors: BTreeMap<ItemId, OwnedFd>,
    ) -> Result<(), BundleError> {
        self.check_fits(&delta, base_crc)?;
        let added = matched(delta.added, descriptors)?;

        for id in &delta.ended {
            self.items.remove(id);
        }
        for change in delta.changed {
            if let Some(item) = self.items.get_mut(&change.id) {
                item.entry.state = change.state;
            }
        }
        self.items.extend(added);
        self.by_name = None;
        self.next_id = delta.next_id;
        self.state = delta.state.or(self.state.take());
        self.service.counters.extend(delta.counters);
        Ok(())
    }

    /// Who handed this bundle over; an empty record in a bundle that was made here.
    #[must_use]
    pub fn service(&self) -> &ServiceRecord {
        &self.service
    }

    /// The bundle as it is written in a manifest, without the control listener.
    #[must_use]
    pub fn base(&self, service: ServiceRecord) -> Base {
        Base {
            service,
            state: self.state.clone(),
            items: self.entries().filter(|e| e.id != ItemId::CONTROL).cloned().collect(),
            next_id: self.next_id,
            sections: Vec::new(),
        }
    }

    /// Sets the application's state.
    ///
    /// # Errors
    /// [`BundleError::State`] when it cannot be encoded.
    pub fn set_state<T: Serialize + ?Sized>(&mut self, state: &T) -> Result<(), BundleError> {
        self.state = Some(encoded(state, application)?);
        Ok(())
    }

    /// Sets the application's state, already encoded.
    pub fn set_encoded_state(&mut self, state: Vec<u8>) {
        self.state = Some(state);
    }

    /// The application's state, `None` when there is none.
    ///
    /// # Errors
    /// [`BundleError::State`] when it is not a `T`.
    pub fn state<T: DeserializeOwned>(&self) -> Result<Option<T>, BundleError> {
        self.encoded_state().map(|bytes| decoded(bytes, application)).transpose()
    }

    /// The application's state, as it is encoded.
    #[must_use]
    pub fn encoded_state(&self) -> Option<&[u8]> {
        self.state.as_deref()
    }

    /// Adds an item with state. Its kind is that of the descriptor.
    ///
    /// # Errors
    /// [`BundleError::State`], [`BundleError::ReservedName`], [`BundleError::Unreadable`] or
    /// [`BundleError::OutOfIds`]; the descriptor is closed then.
    pub fn add<T: Serialize + ?Sized>(
        &mut self,
        name: impl Into<String>,
        descriptor: impl Into<OwnedFd>,
        state: &T,
    ) -> Result<ItemId, BundleError> {
        let name = name.into();
        let state = encoded(state, || format!("the state of item {name:?}"))?;
        self.add_encoded(name, descriptor, state)
    }

    /// Adds an item without state.
    ///
    /// # Errors
    /// As [`add`](Bundle::add).
    pub fn add_plain(
        &mut self,
        name: impl Into<String>,
        descriptor: impl Into<OwnedFd>,
    ) -> Result<ItemId, BundleError> {
        self.add_encoded(name, descriptor, Vec::new())
    }

    /// Adds an item with state that is already encoded; empty means none.
    ///
    /// # Errors
    /// As [`add`](Bundle::add).
    pub fn add_encoded(
        &mut self,
        name: impl Into<String>,
        descriptor: impl Into<OwnedFd>,
        state: Vec<u8>,
    ) -> Result<ItemId, BundleError> {
        let (name, descriptor) = (name.into(), descriptor.into());
        if name.starts_with(RESERVED_PREFIX) {
            return Err(BundleError::ReservedName { name });
        }
        let kind = Kind::of(&descriptor)
            .map_err(|source| BundleError::Unreadable { item: format!("{name:?}"), source })?;
        let id = ItemId(self.next_id);
        self.next_id = self.next_id.checked_add(1).ok_or(BundleError::OutOfIds)?;

        if let Some(index) = &mut self.by_name {
            index.entry(name.clone()).or_default().push(id);
        }
        self.items.insert(id, Item { entry: Entry { id, name, kind, state }, descriptor });
        Ok(id)
    }

    /// Replaces an item's state.
    ///
    /// # Errors
    /// [`BundleError::NoSuchId`] or [`BundleError::State`].
    pub fn update<T: Serialize + ?Sized>(&mut self, id: ItemId, state: &T) -> Result<(), BundleError> {
        let state = encoded(state, || format!("the state of item {id}"))?;
        self.update_encoded(id, state)
    }

    /// Replaces an item's state by one that is already encoded; empty means none.
    ///
    /// # Errors
    /// [`BundleError::NoSuchId`].
    pub fn update_encoded(&mut self, id: ItemId, state: Vec<u8>) -> Result<(), BundleError> {
        let item = self.items.get_mut(&id).ok_or(BundleError::NoSuchId { id })?;
        item.entry.state = state;
        Ok(())
    }

    /// Takes an item out and forgets it; dropping the descriptor closes it.
    pub fn remove(&mut self, id: ItemId) -> Option<OwnedFd> {
        self.items.remove(&id).map(|item| item.descriptor)
    }

    /// An item's descriptor, to register it with a poller or to send it.
    #[must_use]
    pub fn descriptor(&self, id: ItemId) -> Option<BorrowedFd<'_>> {
        self.items.get(&id).map(|item| item.descriptor.as_fd())
    }

    /// What is known about an item.
    #[must_use]
    pub fn entry(&self, id: ItemId) -> Option<&Entry> {
        self.items.get(&id).map(|item| &item.entry)
    }

    /// All items, in ascending order of their ids.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &Entry> {
        self.items.values().map(|item| &item.entry)
    }

    /// All items with their descriptors, in ascending order of their ids: to register them with a poller.
    pub fn items(&self) -> impl ExactSizeIterator<Item = (&Entry, BorrowedFd<'_>)> {
        self.items.values().map(|item| (&item.entry, item.descriptor.as_fd()))
    }

    /// How many items there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// The id that the next new item gets, for a program that gives out ids and writes its manifest by itself.
    #[must_use]
    pub fn next_id(&self) -> ItemId {
        ItemId(self.next_id)
    }

    /// Whether there are no items.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Takes the one item that has this name.
    ///
    /// # Errors
    /// [`BundleError::NoSuchName`], [`BundleError::Ambiguous`] or [`BundleError::WrongType`]; the bundle is
    /// unchanged then.
    pub fn take<T: Typed>(&mut self, name: &str) -> Result<Taken<T>, BundleError> {
        match self.ids(name)[..] {
            [] => Err(BundleError::NoSuchName { name: name.to_owned() }),
            [id] => self.take_id(id),
            ref ids => Err(BundleError::Ambiguous { name: name.to_owned(), count: ids.len() }),
        }
    }

    /// Takes the item that has this id.
    ///
    /// # Errors
    /// [`BundleError::NoSuchId`] or [`BundleError::WrongType`]; the bundle is unchanged then.
    pub fn take_id<T: Typed>(&mut self, id: ItemId) -> Result<Taken<T>, BundleError> {
        let entry = self.entry(id).ok_or(BundleError::NoSuchId { id })?;
        if !T::accepts(entry.kind) {
            return Err(BundleError::WrongType { item: entry.to_string(), asked: type_name::<T>() });
        }
        let Item { entry, descriptor } = self.items.remove(&id).ok_or(BundleError::NoSuchId { id })?;
        Ok(Taken { id, name: entry.name, descriptor: descriptor.into(), state: entry.state })
    }

    /// Takes every item that has this name and can be had as a `T`, in ascending order of their ids. Others of
    /// that name stay in the bundle.
    pub fn take_all<T: Typed>(&mut self, name: &str) -> Vec<Taken<T>> {
        self.ids(name).into_iter().filter_map(|id| self.take_id(id).ok()).collect()
    }

    /// Closes whatever was not taken, and tells what that was.
    ///
    /// It is a plain close: a duplicate in another process lives on. To end a connection for its peer as well,
    /// take it and shut it down.
    #[must_use = "what is closed here was handed over and never taken"]
    pub fn close_rest(mut self) -> Vec<Entry> {
        std::mem::take(&mut self.items).into_values().map(|item| item.entry).collect()
    }

    /// The ids of the items that have this name, ascending.
    fn ids(&mut self, name: &str) -> Vec<ItemId> {
        let index = self.by_name.get_or_insert_with(|| {
            let mut index: HashMap<String, Vec<ItemId>> = HashMap::new();
            for Item { entry, .. } in self.items.values() {
                match index.get_mut(&entry.name) {
                    Some(ids) => ids.push(entry.id),
                    None => drop(index.insert(entry.name.clone(), vec![entry.id])),
                }
            }
            index
        });
        let Some(ids) = index.get_mut(name) else { return Vec::new() };
        ids.retain(|id| self.items.contains_key(id));
        ids.clone()
    }

    fn check_fits(&self, delta: &Delta, base_crc: u32) -> Result<(), ManifestError> {
        delta.check_base(base_crc)?;
        delta.check_order()?;
        if delta.next_id < self.next_id {
            return Err(ManifestError::CounterBack { base: self.next_id, delta: delta.next_id });
        }
        if let Some(last) = delta.added.last().filter(|e| e.id.0 >= delta.next_id) {
            return Err(ManifestError::NotGivenOut { id: last.id, next_id: delta.next_id });
        }
        if let Some(entry) = delta.added.iter().find(|e| self.items.contains_key(&e.id)) {
            return Err(ManifestError::DuplicateItem { id: entry.id });
        }
        let gone = |id: &ItemId| !self.items.contains_key(id);
        if let Some(&id) = delta.ended.iter().find(|id| gone(id)) {
            return Err(ManifestError::UnknownItem { id });
        }
        let ends = |id: &ItemId| delta.ended.binary_search(id).is_ok();
        if let Some(change) = delta.changed.iter().find(|c| gone(&c.id) || ends(&c.id)) {
            return Err(ManifestError::UnknownItem { id: change.id });
        }
        let found = (self.items.len() - delta.ended.len() + delta.added.len()) as u64;
        if found != delta.count {
            return Err(ManifestError::Count { announced: delta.count, found });
        }
        Ok(())
    }
}

impl Drop for Bundle {
    /// Closes the items that are left, and warns of it: [`close_rest`](Bundle::close_rest) does so knowingly.
    fn drop(&mut self) {
        const NAMED: usize = 10;
        if self.items.is_empty() {
            return;
        }
        let names: Vec<&str> = self.entries().take(NAMED).map(|e| e.name.as_str()).collect();
        tracing::warn!(
            count = self.items.len(),
            ?names,
            "a bundle was dropped with items that nobody took: their descriptors are closed"
        );
    }
}

impl<T> Taken<T> {
    /// The item's state, `None` when it has none.
    ///
    /// # Errors
    /// [`BundleError::State`] when it is not an `S`.
    pub fn state<S: DeserializeOwned>(&self) -> Result<Option<S>, BundleError> {
        if self.state.is_empty() {
            return Ok(None);
        }
        decoded(&self.state, || format!("the state of item {:?} (id {})", self.name, self.id)).map(Some)
    }
}

/// Gives each entry its descriptor, and checks that it is what the entry says.
fn matched(
    mut entries: Vec<Entry>,
    descriptors: BTreeMap<ItemId, OwnedFd>,
) -> Result<BTreeMap<ItemId, Item>, BundleError> {
    // They are sorted, unless they were made up here: one walk through both then finds what belongs together.
    entries.sort_by_key(|entry| entry.id);
    let mut descriptors = descriptors.into_iter().peekable();
    let items = entries
        .into_iter()
        .map(|mut entry| {
            let (_, descriptor) = match descriptors.peek() {
                Some(&(id, _)) if id < entry.id => return Err(BundleError::NotListed { id }),
                _ => descriptors.next_if(|(id, _)| *id == entry.id),
            }
            .ok_or_else(|| BundleError::NoDescriptor { item: entry.to_string() })?;
            entry.kind = checked_kind((&entry).into(), &descriptor)?;
            Ok((entry.id, Item { entry, descriptor }))
        })
        .collect::<Result<_, BundleError>>()?;
    match descriptors.next() {
        None => Ok(items),
        Some((id, _)) => Err(BundleError::NotListed { id }),
    }
}

/// What a descriptor is, if that is what the entry says.
pub(crate) fn checked_kind(entry: EntryRef<'_>, descriptor: &OwnedFd) -> Result<Kind, BundleError> {
    let real = entry
        .kind
        .expected(descriptor)
        .map_err(|source| BundleError::Unreadable { item: entry.to_string(), source })?;
    if entry.kind == real || entry.kind == Kind::Other {
        return Ok(real);
    }
    Err(BundleError::WrongKind { id: entry.id, name: entry.name.to_owned(), declared: entry.kind, real })
}

fn application() -> String {
    "the application state".to_owned()
}

fn encoded<T: Serialize + ?Sized>(value: &T, of: impl FnOnce() -> String) -> Result<Vec<u8>, BundleError> {
    Cbor::encode(value).map_err(|source| BundleError::State { of: of(), source })
}

fn decoded<T: DeserializeOwned>(bytes: &[u8], of: impl FnOnce() -> String) -> Result<T, BundleError> {
    Cbor::decode(bytes).map_err(|source| BundleError::State { of: of(), source })
}
