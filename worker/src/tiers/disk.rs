//! The disk tier: one file of equal places, each a header and a block. Nothing in it is trusted: a block is given back
//! only when name, class and digest are right, so neither a torn write nor a lost one needs a flush.
//!
//! ```text
//! file  = head (4096 bytes: magic, version, bytes of a block, class) | place 0 | place 1 | ...
//! place = magic, version | moment | name | digest of the block | class | check of this header | block
//! ```

use std::collections::BTreeMap;
use std::io;

use baton_core::BlockHash;
use baton_engine::ModelSpec;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::Fault;
use super::store::Store;

/// What blocks of one file have in common: hash of layout and numerics class, which covers the weights.
pub(super) type Class = [u8; 32];

const HEAD_BYTES: u64 = 4096;
const MAGIC: [u8; 8] = *b"BATONKV\0";
const VERSION: u32 = 1;
const PLACE_MAGIC: u32 = 0x4b56_424c;
/// Header of a place.
const HEADER: usize = 64;
/// After the disk was found full, so many blocks take the place of older ones before the file is let grow again.
const GROW_AGAIN: u32 = 256;

pub(super) fn class(spec: &ModelSpec) -> Class {
    let text = format!("{}\n{}\n{}", spec.layout.describe(), spec.numerics.0, spec.weights_hash);
    *blake3::hash(text.as_bytes()).as_bytes()
}

/// The digest that stays with a block; bound to its name and class.
pub(super) fn digest(class: &Class, name: BlockHash, bytes: &[u8]) -> u128 {
    let mut hasher = Xxh3::new();
    hasher.update(class);
    hasher.update(&name.0.to_le_bytes());
    hasher.update(bytes);
    hasher.digest128()
}

pub(super) struct Disk<S> {
    store: S,
    class: Class,
    block_bytes: usize,
    places_max: u32,
    /// Places that the file has.
    places: u32,
    free: Vec<u32>,
    names: BTreeMap<BlockHash, Place>,
    /// By last use, oldest first.
    order: BTreeMap<u64, BlockHash>,
    moment: u64,
    /// Blocks to take without growing; 0 it may grow.
    grow_in: u32,
    /// A header and a block.
    scratch: Vec<u8>,
    /// What was wrong with the file when it was opened, and how often.
    pub(super) found: Vec<Fault>,
}

/// What became of a block that was to be written down.
pub(super) struct Put {
    pub(super) kept: Result<(), Fault>,
    /// The block that was here before, and is not any more.
    pub(super) gone: Option<BlockHash>,
}

#[derive(Clone, Copy)]
struct Place {
    index: u32,
    used: u64,
}

struct Header {
    moment: u64,
    name: BlockHash,
    digest: u128,
}

impl<S: Store> Disk<S> {
    /// Takes in what a store has kept of this class, within `bytes_max`; what it has of another class is dropped.
    ///
    /// # Errors
    /// If the store cannot be read or written at all, or is to be smaller than one block.
    pub(super) fn open(store: S, class: Class, block_bytes: usize, bytes_max: u64) -> io::Result<Disk<S>> {
        let stride = (HEADER + block_bytes) as u64;
        let places_max = u32::try_from(bytes_max.saturating_sub(HEAD_BYTES) / stride).unwrap_or(u32::MAX);
        if places_max == 0 {
            let problem = format!("{bytes_max} bytes hold no block of {block_bytes}; give it more");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        let (places, free, names, order, moment, grow_in, found) = Default::default();
        let scratch = vec![0; HEADER + block_bytes];
        let mut disk =
            Disk { store, class, block_bytes, places_max, places, free, names, order, moment, grow_in, scratch, found };
        disk.read_all()?;
        Ok(disk)
    }

    pub(super) fn class(&self) -> &Class {
        &self.class
    }

    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = BlockHash> + '_ {
        self.names.keys().copied()
    }

    pub(super) fn has(&self, name: BlockHash) -> bool {
        self.names.contains_key(&name)
    }

    /// Writes a block down, at the cost of the one unused longest where there is no room.
    pub(super) fn put(&mut self, name: BlockHash, digest: u128, bytes: &[u8]) -> Put {
        if self.has(name) {
            self.touch(name);
            return Put { kept: Ok(()), gone: None };
        }
        let (mut index, mut gone) = self.room();
        self.moment += 1;
        let header = Header { moment: self.moment, name, digest };
        self.scratch[..HEADER].copy_from_slice(&header.encode(&self.class));
        self.scratch[HEADER..].copy_from_slice(bytes);
        let mut written = self.store.write(self.at(index), &self.scratch);
        if written.is_err() && index == self.places {
            // It does not grow: then an older block goes.
            self.grow_in = GROW_AGAIN;
            if let Some(older) = self.evict() {
                (index, gone) = (older.0, Some(older.1));
                written = self.store.write(self.at(index), &self.scratch);
            }
        }
        if let Err(error) = written {
            if index < self.places {
                self.free.push(index);
            }
            return Put { kept: Err(Fault::of_write(&error)), gone };
        }
        self.places = self.places.max(index + 1);
        self.order.insert(self.moment, name);
        self.names.insert(name, Place { index, used: self.moment });
        Put { kept: Ok(()), gone }
    }

    /// Reads a block back, if it is here. One that cannot be trusted is not here any more.
    pub(super) fn get(&mut self, name: BlockHash) -> Option<Result<&[u8], Fault>> {
        let place = self.names.get(&name).copied()?;
        match self.read(place.index, name) {
            Ok(()) => {
                self.touch(name);
                Some(Ok(&self.scratch[HEADER..]))
            }
            Err(fault) => {
                self.names.remove(&name);
                self.order.remove(&place.used);
                self.free.push(place.index);
                Some(Err(fault))
            }
        }
    }

    fn read(&mut self, index: u32, name: BlockHash) -> Result<(), Fault> {
        let at = self.at(index);
        self.store.read(at, &mut self.scratch).map_err(|error| Fault::of_read(&error))?;
        let header = Header::decode(&self.scratch[..HEADER], &self.class)?.ok_or(Fault::Damaged)?;
        let right = header.name == name && header.digest == digest(&self.class, name, &self.scratch[HEADER..]);
        if right { Ok(()) } else { Err(Fault::Damaged) }
    }

    /// A place to write to, and the name that goes for it: a free one, a new one, or that of the block unused longest.
    fn room(&mut self) -> (u32, Option<BlockHash>) {
        if let Some(index) = self.free.pop() {
            return (index, None);
        }
        let grows = self.places < self.places_max && self.grow_in == 0;
        self.grow_in = self.grow_in.saturating_sub(1);
        match grows {
            true => (self.places, None),
            // Without a free place and without a block there is none at all.
            false => self.evict().map_or((self.places, None), |(index, gone)| (index, Some(gone))),
        }
    }

    /// Forgets the block unused longest.
    fn evict(&mut self) -> Option<(u32, BlockHash)> {
        let (_, name) = self.order.pop_first()?;
        let place = self.names.remove(&name)?;
        Some((place.index, name))
    }

    fn touch(&mut self, name: BlockHash) {
        self.moment += 1;
        if let Some(place) = self.names.get_mut(&name) {
            self.order.remove(&place.used);
            place.used = self.moment;
            self.order.insert(self.moment, name);
        }
    }

    fn at(&self, index: u32) -> u64 {
        HEAD_BYTES + u64::from(index) * (HEADER + self.block_bytes) as u64
    }

    fn head(&self) -> Vec<u8> {
        let mut head = Vec::with_capacity(HEAD_BYTES as usize);
        head.extend(MAGIC);
        head.extend(VERSION.to_le_bytes());
        head.extend((self.block_bytes as u64).to_le_bytes());
        head.extend(self.class);
        head.resize(HEAD_BYTES as usize, 0);
        head
    }

    /// What is in the store when it is opened.
    fn read_all(&mut self) -> io::Result<()> {
        let (len, head) = (self.store.len()?, self.head());
        let mut theirs = vec![0; head.len()];
        let read = len > 0 && self.store.read(0, &mut theirs).is_ok();
        if !read || theirs != head {
            if len > 0 {
                let foreign = theirs.starts_with(&MAGIC);
                self.found.push(if foreign { Fault::Foreign } else { Fault::Damaged });
            }
            self.store.resize(0)?;
            return self.store.write(0, &head);
        }
        let stride = (HEADER + self.block_bytes) as u64;
        let places = (len - HEAD_BYTES).div_ceil(stride).min(u64::from(self.places_max));
        self.places = places as u32;
        if len > self.at(self.places_max) {
            self.store.resize(self.at(self.places_max))?;
        }
        for index in 0..self.places {
            self.read_header(index, len);
        }
        Ok(())
    }

    fn read_header(&mut self, index: u32, len: u64) {
        let mut header = [0; HEADER];
        let at = self.at(index);
        let whole = at + (HEADER + self.block_bytes) as u64 <= len;
        let header = match self.store.read(at, &mut header) {
            Ok(()) if whole => Header::decode(&header, &self.class),
            Ok(()) => Err(Fault::Truncated),
            Err(error) => Err(Fault::of_read(&error)),
        };
        match header {
            Ok(Some(header)) if !self.has(header.name) && !self.order.contains_key(&header.moment) => {
                self.moment = self.moment.max(header.moment);
                self.order.insert(header.moment, header.name);
                self.names.insert(header.name, Place { index, used: header.moment });
            }
            Ok(_) => self.free.push(index),
            Err(fault) => {
                self.found.push(fault);
                self.free.push(index);
            }
        }
    }
}

impl Header {
    fn encode(&self, class: &Class) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..4].copy_from_slice(&PLACE_MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.moment.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.name.0.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.digest.to_le_bytes());
        bytes[48..56].copy_from_slice(&class[..8]);
        let check = xxh3_64(&bytes[..56]);
        bytes[56..].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// None: the place was never written.
    fn decode(bytes: &[u8], class: &Class) -> Result<Option<Header>, Fault> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let u128_at = |at: usize| u128::from_le_bytes(bytes[at..at + 16].try_into().expect("16 bytes"));
        let begins = u64::from(PLACE_MAGIC) | u64::from(VERSION) << 32;
        if u64_at(56) != xxh3_64(&bytes[..56]) || u64_at(0) != begins {
            return Err(Fault::Damaged);
        }
        if bytes[48..56] != class[..8] {
            return Err(Fault::Foreign);
        }
        Ok(Some(Header { moment: u64_at(8), name: BlockHash(u128_at(16)), digest: u128_at(32) }))
    }
}
