//! What senders write: DATA frames off the wire or out of a mapped arena, and a local sender's extents. What may be written is
//! written under its transfer's lock and counts once its checksum is the announced one; what may not is counted and dropped.

use std::sync::Arc;

use baton_core::planted::{self, Bug};
use baton_core::{Arena, BlockLayout};
use tokio::io::AsyncRead;

use super::flight::Flight;
use super::{Pending, Shared, lock};
use crate::HeadSlice;
use crate::connection::Frame;
use crate::counters::Dropped;
use crate::extent::{Landing, Sent};
use crate::frames::{Frames, ReadError};
use crate::link::{Link, LinkId};
use crate::wire::{self, BY_REFERENCE, BadFrame, Entry, Header, Kind, ON_DEVICE};

/// What is copied out of a mapped arena under one hold of the transfer's lock.
const LOCKED_BYTES: usize = 256 << 10;

impl Shared {
    /// Takes a DATA frame's entries, and what follows them out of `frames`: what may be written is written, what may not
    /// is counted. An error ends the link. What our device has begun to copy is returned.
    pub(super) async fn data<R: AsyncRead + Unpin>(
        self: &Arc<Self>,
        link: &Link,
        header: &Header,
        frames: &mut Frames<R>,
    ) -> Result<Option<Flight>, ReadError> {
        self.refuse_forged(link, header.tag)?;
        let Some((layout, slice)) = self.moving(header.tag.transfer) else {
            self.counts.drop(Dropped::Unknown);
            return frames.skip(header.length as usize).await.map(|()| None);
        };
        let Ok(lines) = wire::entries_bytes(header, layout.layer_bytes()) else {
            self.spoil(link.id, header, 0);
            return frames.skip(header.length as usize).await.map(|()| None);
        };
        let entries = wire::entries(header, frames.take(lines).await?).map(Vec::from_iter);
        let Ok(entries) = entries else {
            self.spoil(link.id, header, 0);
            return frames.skip(header.length as usize - lines).await.map(|()| None);
        };
        if header.flags & BY_REFERENCE == 0 {
            for entry in &entries {
                self.land(link, header, entry, &layout, frames).await?;
            }
            return Ok(None);
        }
        let Some(source) = &link.source else { return Err(BadFrame::Shape(Kind::Data).into()) };
        let part = slice.map(|HeadSlice { of, first }| source.view(of, first..first.saturating_add(layout.kv_heads)));
        let source: &Arena = match &part {
            None => source,
            Some(Some(part)) => part,
            Some(None) => {
                self.spoil(link.id, header, 0);
                return Ok(None);
            }
        };
        if header.flags & ON_DEVICE != 0 {
            return self.take_off(link, header, entries, source);
        }
        for entries in entries.chunks((LOCKED_BYTES / layout.layer_bytes()).max(1)) {
            for position in self.fetch_mapped(link, header, entries, source) {
                self.spoil(link.id, header, position);
            }
        }
        Ok(None)
    }

    /// Copies extents out of a mapped arena, all under the transfer's lock. Returns the positions of those that are not
    /// what was announced.
    fn fetch_mapped(&self, link: &Link, header: &Header, entries: &[Entry], source: &Arena) -> Vec<u32> {
        let Some(pending) = self.pending(header.tag.transfer) else {
            entries.iter().for_each(|_| self.counts.drop(Dropped::Unknown));
            return Vec::new();
        };
        let mut pending = lock(&pending);
        let (digest, layer) = (pending.transfer.digest(), header.layer as u32);
        let mut spoiled = Vec::new();
        let known = |entry: &Entry| Some(entry.source).filter(|index| (*index as usize) < source.blocks());
        for (entry, next) in entries.iter().zip(entries.iter().skip(1).map(known).chain([None])) {
            let transfer = &pending.transfer;
            if let Err(reason) = transfer.admit(link.id, header).and_then(|()| transfer.expects(layer, entry)) {
                self.counts.drop(reason);
                continue;
            }
            if entry.source as usize >= source.blocks() {
                spoiled.push(entry.position);
                continue;
            }
            let mut landing = Landing::between(source, &pending.arena);
            landing.fetch(&pending.arena, entry.block, layer, source, (entry.source, next));
            let (content, sum) = landing.finish(digest, layer, entry.position);
            match sum == entry.sum || planted::is(Bug::SkipChecksum) {
                true => self.arrived(&mut pending, layer, entry, content),
                false => spoiled.push(entry.position),
            }
        }
        spoiled
    }

    /// One extent off the wire: each slice is copied to its place as it comes, so that it is still in the cache. The
    /// transfer may end between two slices; the rest is then read and dropped.
    async fn land<R: AsyncRead + Unpin>(
        &self,
        link: &Link,
        header: &Header,
        entry: &Entry,
        layout: &BlockLayout,
        frames: &mut Frames<R>,
    ) -> Result<(), ReadError> {
        let mut landing = Landing::new(&self.arena, layout);
        while landing.left(layout) > 0 {
            let left = landing.left(layout);
            let bytes = frames.pieces(layout.slice_bytes(), left).await?;
            let rest = left * layout.slice_bytes() - bytes.len();
            let copied = self.writing(link, header, entry, |arena| {
                landing.copy(arena, entry.block, header.layer as u32, bytes);
            });
            if !copied {
                return frames.skip(rest).await;
            }
        }
        self.landed(link, header, entry, landing);
        Ok(())
    }

    /// Runs `write` while the extent's block cannot be given to anybody else. False: it may not be written, and that is
    /// counted.
    fn writing(&self, link: &Link, header: &Header, entry: &Entry, write: impl FnOnce(&Arena)) -> bool {
        let Some(pending) = self.pending(header.tag.transfer) else {
            self.counts.drop(Dropped::Unknown);
            return false;
        };
        let pending = lock(&pending);
        let transfer = &pending.transfer;
        match transfer.admit(link.id, header).and_then(|()| transfer.expects(header.layer as u32, entry)) {
            Ok(()) => {
                write(&pending.arena);
                true
            }
            Err(reason) => {
                self.counts.drop(reason);
                false
            }
        }
    }

    /// Counts an extent that was written, if it is the announced one.
    fn landed(&self, link: &Link, header: &Header, entry: &Entry, landing: Landing) {
        let Some(pending) = self.pending(header.tag.transfer) else { return };
        let layer = header.layer as u32;
        {
            let mut pending = lock(&pending);
            let digest = pending.transfer.digest();
            let (content, sum) = landing.finish(digest, layer, entry.position);
            if sum == entry.sum || planted::is(Bug::SkipChecksum) {
                if pending.transfer.admit(link.id, header).is_ok() {
                    self.arrived(&mut pending, layer, entry, content);
                }
                return;
            }
        }
        self.spoil(link.id, header, entry.position);
    }

    /// Counts an extent that is in its place, and keeps its checksum for audits, unless it is of some heads only.
    fn arrived(&self, pending: &mut Pending, layer: u32, entry: &Entry, content: u64) {
        pending.arrived(&self.counts, layer, entry);
        if pending.transfer.grant.slice.is_none() {
            self.sums.keep(layer as usize, entry.block, content);
        }
    }

    /// Something of a frame was not what was announced.
    pub(super) fn spoil(&self, link: LinkId, header: &Header, position: u32) {
        let id = header.tag.transfer;
        let Some(pending) = self.pending(id) else {
            return self.counts.drop(Dropped::Unknown);
        };
        let admitted = lock(&pending).transfer.admit(link, header);
        if let Err(reason) = admitted {
            return self.counts.drop(reason);
        }
        self.counts.drop(Dropped::Damaged);
        let event = lock(&pending).transfer.spoiled(header.layer as u32, position).err();
        if let Some(event) = event {
            self.step(id, link, event);
        }
    }

    /// Copies a local sender's extents out of its arena, as far as its transfer allows.
    pub(crate) fn fetch(&self, link: LinkId, frame: &Frame<'_>) -> Vec<Sent> {
        let tag = frame.grant.tag();
        let Some(pending) = self.pending(tag.transfer) else {
            self.counts.drop(Dropped::Unknown);
            return Vec::new();
        };
        let mut pending = lock(&pending);
        let header = Header { layer: frame.layer as u16, ..Header::new(Kind::Data, tag) };
        if let Err(reason) = pending.transfer.admit(link, &header) {
            self.counts.drop(reason);
            return Vec::new();
        }
        let layer = frame.layer as u32;
        let mut sent = Vec::with_capacity(frame.blocks.len());
        let after = frame.blocks.iter().skip(1).map(|(_, source)| Some(source.index)).chain([None]);
        for ((position, source), next) in frame.blocks.iter().zip(after) {
            let (block, at) = (frame.grant.blocks[*position], *position as u32);
            let mut entry = Entry { position: at, block, source: source.index, sum: 0 };
            if let Err(reason) = pending.transfer.expects(layer, &entry) {
                self.counts.drop(reason);
                continue;
            }
            let mut landing = Landing::between(frame.arena, &pending.arena);
            landing.fetch(&pending.arena, block, layer, frame.arena, (source.index, next));
            let (content, sum) = landing.finish(frame.digest, layer, at);
            entry.sum = sum;
            self.arrived(&mut pending, layer, &entry, content);
            sent.push(Sent { position: at, source: *source, sum: entry.sum });
        }
        sent
    }
}
