//! A base as it has arrived: checked as a whole, its entries left where they are until somebody asks for one.
//!
//! A successor lends each item when its descriptor comes, whose entry is read if somebody asks, and makes items of all when all have
//! come. To read an entry twice costs less than to make it beforehand: what is dear is memory that is touched for the first time.

use minicbor::{Decode, Decoder, decode::Error};

use super::{
    Base, Header, ManifestError, Part, Section, ServiceRecord, check_entry, check_ids, decode_part,
    header::HEADER_BYTES, list, malformed, short_form,
};
use crate::{ItemId, Limits, item::EntryRef};

#[derive(Debug, Default)]
pub(crate) struct Listing<B = Vec<u8>> {
    bytes: B,
    crc: u32,
    places: Vec<Place>,
    /// What it says beside its items.
    rest: Base,
}

/// Where an entry is.
#[derive(Debug)]
struct Place {
    id: ItemId,
    /// From the beginning of the body.
    at: usize,
}

/// A base as it is read: the keys are those of [`Written`](super::Written).
#[derive(Decode)]
#[cbor(map, context_bound = "AsRef<Limits>")]
struct Read {
    #[n(0)]
    service: ServiceRecord,
    #[cbor(n(1), with = "minicbor::bytes", default)]
    state: Option<Vec<u8>>,
    #[cbor(n(2), decode_with = "list::decode")]
    places: Vec<Place>,
    #[n(3)]
    next_id: u64,
    #[cbor(n(4), decode_with = "list::decode", default)]
    sections: Vec<Section>,
}

impl<'b, C: AsRef<Limits>> Decode<'b, C> for Place {
    fn decode(d: &mut Decoder<'b>, ctx: &mut C) -> Result<Self, Error> {
        let at = d.position();
        let entry = match short_form::read(&d.input()[at..]) {
            Some((entry, length)) => {
                d.set_position(at + length);
                entry
            }
            None => d.decode()?,
        };
        check_entry(entry, ctx.as_ref()).map_err(Error::custom)?;
        Ok(Place { id: entry.id, at })
    }
}

impl<B: AsRef<[u8]>> Listing<B> {
    /// Reads a base.
    ///
    /// # Errors
    /// As [`Base::decode`].
    pub(crate) fn read(bytes: B, limits: &Limits) -> Result<Self, ManifestError> {
        let Read { service, state, places, next_id, sections } =
            decode_part(Part::Base, bytes.as_ref(), limits)?;
        let crc = Header::read(bytes.as_ref())?.crc;
        let rest = Base { service, state, items: Vec::new(), next_id, sections };
        rest.check(limits)?;
        check_ids("items", places.iter().map(|place| place.id), next_id)?;
        Ok(Listing { bytes, crc, places, rest })
    }

    /// The checksum that the delta must refer to.
    pub(crate) fn crc(&self) -> u32 {
        self.crc
    }

    /// What it says beside its items.
    pub(crate) fn rest(&self) -> &Base {
        &self.rest
    }

    pub(crate) fn into_rest(self) -> Base {
        self.rest
    }

    /// All of it.
    pub(crate) fn into_base(self) -> Result<Base, ManifestError> {
        let items =
            self.entries().map(|entry| Ok(entry?.to_entry())).collect::<Result<_, ManifestError>>()?;
        Ok(Base { items, ..self.rest })
    }

    /// How many entries there are.
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    /// The id of an entry, by its place in the list.
    pub(crate) fn id(&self, place: usize) -> Option<ItemId> {
        self.places.get(place).map(|place| place.id)
    }

    /// The place of the entry that has this id.
    pub(crate) fn find(&self, id: ItemId) -> Option<usize> {
        self.places.binary_search_by_key(&id, |place| place.id).ok()
    }

    /// All entries, in ascending order of their ids.
    pub(crate) fn entries(&self) -> impl Iterator<Item = Result<EntryRef<'_>, ManifestError>> {
        (0..self.places.len()).map(|place| self.entry(place))
    }

    /// An entry, by its place in the list.
    pub(crate) fn entry(&self, place: usize) -> Result<EntryRef<'_>, ManifestError> {
        let bytes = self.bytes.as_ref().get(HEADER_BYTES + self.places[place].at..).unwrap_or_default();
        match short_form::read(bytes) {
            Some((entry, _)) => Ok(entry),
            None => minicbor::decode(bytes).map_err(malformed),
        }
    }
}
