//! The bytes of the handoff: pure encoding and decoding, no IO. All numbers are little endian.
//!
//! ```text
//! frame = header (64 bytes) | payload (`length` bytes)
//!
//!  0 magic "bKVh"   4 version   5 kind       6 flags (2)      8 transfer (8)
//! 16 epoch (8)     24 attempt (4)           28 layer (2)     30 layers (2)
//! 32 sequence (8)  40 blocks (4)            44 length (4)
//! 48 checksum of the payload (8)            56 checksum of bytes 0..56 (8)
//!
//! DATA payload = `blocks` entries of 24 bytes | `blocks` extents (one layer of one block each)
//! entry        = position (4) | index (4) | generation (4) | source (4) | checksum of its extent (8)
//! ```
//! With the flag BY_REFERENCE a DATA frame has no extents: each lies in block `source` of the sender's arena, which the
//! receiver has mapped; with ON_DEVICE as well, in that arena's memory on a device. Otherwise `source` is zero. What an end can do beyond the first release (`FEATURE_*`) stands in
//! the flags of its HELLO, so that a peer of the first release, which sets none and reads none, still pairs.
//! The payload checksum of DATA covers the entries; the entries' checksums cover the extents, so that bytes are hashed
//! once. `sequence` counts the DATA payload bytes of a link: in DATA those sent before it, in ACK those taken.

use baton_core::limits::{HANDOFF_FRAME_BYTES_MAX, HANDOFF_LANES_MAX};
use baton_core::planted::{self, Bug};
use baton_core::{Aborted, BlockId, BlockLayout, Epoch, Refused, RequestId, TransferId};
use xxhash_rust::xxh3::xxh3_64;

use crate::hash;

pub const HEADER_BYTES: usize = 64;
pub const ENTRY_BYTES: usize = 24;
/// Version of this format; the first thing two ends compare.
pub const VERSION: u8 = 1;
/// Blocks in one DATA frame.
pub const FRAME_BLOCKS_MAX: usize = 1024;
pub const LENGTH_MAX: usize = FRAME_BLOCKS_MAX * ENTRY_BYTES + HANDOFF_FRAME_BYTES_MAX;

const MAGIC: [u8; 4] = *b"bKVh";
/// In ABORT and ABORTED: the frame is its sender's last word on the transfer.
const QUIESCED: u16 = 1;
/// In DATA: the extents lie in the sender's arena.
pub const BY_REFERENCE: u16 = 2;
/// In DATA, with BY_REFERENCE: the extents lie in the sender's memory on a device.
pub const ON_DEVICE: u16 = 4;
/// In HELLO: extents that arrived damaged may be asked for again.
pub const FEATURE_RESEND: u16 = 1;
/// In HELLO: this end's arena can be shared with another process of the host, or it can map such an arena.
pub const FEATURE_SHARED: u16 = 2;
/// In HELLO: transfers may move some kv heads of blocks only. Asked of the other end by one that holds some heads only.
pub const FEATURE_HEADS: u16 = 4;
/// In HELLO: OPEN carries the grant's ticket.
pub const FEATURE_TICKETS: u16 = 8;
/// In HELLO: this end has its blocks on a device, whose memory can be shared with another process of the host or which can map
/// such memory. Over the socket of the host a receiver says it if it has mapped the sender's.
pub const FEATURE_DEVICE: u16 = 0x10;
/// In HELLO: a link over the network may have several connections. The receiver's HELLO names the link (`LinkKey`), and so does that of
/// each further connection, with its number.
pub const FEATURE_LANES: u16 = 0x20;
/// In HELLO: this end can read a shared arena whose blocks are several of those that the link moves.
pub const FEATURE_UNITS: u16 = 0x40;
/// In HELLO: this end has UCX and wants it; the receiver says in an OFFER of its own at which port.
pub const FEATURE_UCX: u16 = 0x100;
/// Extents one RESEND names at most: it has to fit the buffer of an end that reads small frames only.
pub const RESEND_MAX: usize = 256;
const TEXT_BYTES_MAX: usize = 1024;

/// What two ends must share, as text: equal texts may pair. `layout` is that of the model's blocks with all their heads.
pub fn compatibility(layout: &BlockLayout, model: &str) -> String {
    let model = if planted::is(Bug::IgnoreNumerics) { "any" } else { model };
    format!("wire {VERSION}, {}, model {model}", layout.describe())
}

/// Why bytes are not a frame. The stream they came from cannot be read any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    #[error("not a baton link")]
    Magic,
    #[error("wire version {theirs}, here {VERSION}")]
    Version { theirs: u8 },
    #[error("damaged frame header")]
    HeaderChecksum,
    #[error("damaged frame payload")]
    PayloadChecksum,
    #[error("unknown frame kind {0}")]
    Kind(u8),
    #[error("frame of {length} bytes exceeds {LENGTH_MAX}")]
    Length { length: u32 },
    #[error("frame of kind {0:?} is malformed or out of place")]
    Shape(Kind),
    #[error("frames are missing: {expected} bytes had passed, the next frame begins at {found}")]
    Gap { expected: u64, found: u64 },
    #[error("a frame about a transfer that was granted to somebody else")]
    Forged,
    #[error("{acknowledged} bytes acknowledged, {sent} sent")]
    Acknowledged { acknowledged: u64, sent: u64 },
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Hello = 1,
    Mismatch = 2,
    Open = 3,
    Opened = 4,
    Refused = 5,
    Data = 6,
    Ack = 7,
    Commit = 8,
    Committed = 9,
    Abort = 10,
    Aborted = 11,
    Ping = 12,
    Resend = 13,
    Offer = 14,
    Barrier = 15,
}

impl Kind {
    pub const ALL: [Kind; 15] = {
        use Kind::*;
        [
            Hello, Mismatch, Open, Opened, Refused, Data, Ack, Commit, Committed, Abort, Aborted, Ping, Resend, Offer,
            Barrier,
        ]
    };

    fn of(byte: u8) -> Result<Kind, BadFrame> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == byte).ok_or(BadFrame::Kind(byte))
    }
}

/// Names a transfer in every frame about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    pub transfer: TransferId,
    pub attempt: u32,
    pub epoch: Epoch,
}

/// Names a link to the connections that join it. It stands where other frames name a transfer, with the connection's number; that of
/// the first one, which only asks, is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkKey(pub u128);

impl LinkKey {
    pub fn tag(self, lane: u32) -> Tag {
        Tag { transfer: TransferId(self.0 as u64), epoch: Epoch((self.0 >> 64) as u64), attempt: lane }
    }

    /// The link, and the connection's number.
    pub fn of(tag: Tag) -> (LinkKey, u32) {
        (LinkKey(u128::from(tag.transfer.0) | u128::from(tag.epoch.0) << 64), tag.attempt)
    }
}

/// A decoded header. Its own checksum has been verified; the payload's has not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub flags: u16,
    pub tag: Tag,
    pub layer: u16,
    pub layers: u16,
    pub sequence: u64,
    pub blocks: u32,
    pub length: u32,
    pub payload_sum: u64,
}

impl Header {
    /// A header with nothing but a kind and a transfer.
    pub fn new(kind: Kind, tag: Tag) -> Header {
        Header { kind, flags: 0, tag, layer: 0, layers: 0, sequence: 0, blocks: 0, length: 0, payload_sum: 0 }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[5] = self.kind as u8;
        out[6..8].copy_from_slice(&self.flags.to_le_bytes());
        out[8..16].copy_from_slice(&self.tag.transfer.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.tag.epoch.0.to_le_bytes());
        out[24..28].copy_from_slice(&self.tag.attempt.to_le_bytes());
        out[28..30].copy_from_slice(&self.layer.to_le_bytes());
        out[30..32].copy_from_slice(&self.layers.to_le_bytes());
        out[32..40].copy_from_slice(&self.sequence.to_le_bytes());
        out[40..44].copy_from_slice(&self.blocks.to_le_bytes());
        out[44..48].copy_from_slice(&self.length.to_le_bytes());
        out[48..56].copy_from_slice(&self.payload_sum.to_le_bytes());
        let sum = xxh3_64(&out[..56]);
        out[56..64].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Magic and version are judged first, so that another version's peer is told so rather than called damaged.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, BadFrame> {
        let mut fields = Fields(bytes);
        if fields.take::<4>() != MAGIC {
            return Err(BadFrame::Magic);
        }
        let [version, kind] = fields.take();
        if version != VERSION {
            return Err(BadFrame::Version { theirs: version });
        }
        if bytes[56..] != xxh3_64(&bytes[..56]).to_le_bytes() {
            return Err(BadFrame::HeaderChecksum);
        }
        let (kind, flags) = (Kind::of(kind)?, fields.u16());
        let (transfer, epoch) = (TransferId(fields.u64()), Epoch(fields.u64()));
        let tag = Tag { transfer, attempt: fields.u32(), epoch };
        let (layer, layers, sequence) = (fields.u16(), fields.u16(), fields.u64());
        let (blocks, length, payload_sum) = (fields.u32(), fields.u32(), fields.u64());
        if length as usize > LENGTH_MAX {
            return Err(BadFrame::Length { length });
        }
        Ok(Header { kind, flags, tag, layer, layers, sequence, blocks, length, payload_sum })
    }
}

/// Every frame but DATA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub tag: Tag,
    pub body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// First frame in both directions: the compatibility text, and what this end can do (`FEATURE_*`).
    Hello {
        text: String,
        features: u16,
    },
    /// The answer to a Hello that does not fit: the text here.
    Mismatch(String),
    /// The sender wants to write; `grant` is the digest of the grant it holds. The ticket only if both ends know tickets.
    Open {
        request: RequestId,
        grant: u128,
        ticket: Option<u128>,
    },
    Opened,
    Refused(Refused),
    /// DATA payload bytes taken so far.
    Ack(u64),
    Commit(Summary),
    Committed(Summary),
    Abort {
        reason: Aborted,
        quiesced: bool,
    },
    Aborted {
        quiesced: bool,
    },
    /// Nothing to say, but alive.
    Ping,
    /// The answer to a COMMIT when extents arrived damaged: (layer, position) of those to send again before the next.
    Resend(Vec<(u32, u32)>),
    /// After the receiver's HELLO, when both ends can share memory: the name of its socket on this host, a blank, and
    /// the port that it listens on, so that a sender knows whether it came straight to it.
    Offer(String),
    /// What comes next is for when so many DATA payload bytes have been taken over other connections of the link: (connection, bytes).
    Barrier(Vec<(u32, u64)>),
}

/// What one end believes has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// (layer, block) pairs.
    pub extents: u64,
    pub bytes: u64,
    /// Wrapping sum of the extents' checksums: the order of arrival does not matter.
    pub digest: u64,
}

impl Message {
    pub fn encode(&self) -> Vec<u8> {
        let (kind, payload) = self.body.payload();
        let mut header = Header::new(kind, self.tag);
        header.length = payload.len() as u32;
        header.payload_sum = xxh3_64(&payload);
        match self.body {
            Body::Ack(bytes) => header.sequence = bytes,
            Body::Hello { features, .. } => header.flags = features,
            Body::Abort { quiesced, .. } | Body::Aborted { quiesced } => header.flags = QUIESCED * quiesced as u16,
            _ => {}
        }
        let mut out = header.encode().to_vec();
        out.extend_from_slice(&payload);
        out
    }

    /// The message of a header that is not DATA and its payload of `header.length` bytes.
    pub fn decode(header: &Header, payload: &[u8]) -> Result<Message, BadFrame> {
        if payload.len() != header.length as usize || xxh3_64(payload) != header.payload_sum {
            return Err(BadFrame::PayloadChecksum);
        }
        let body = Body::decode(header, payload).ok_or(BadFrame::Shape(header.kind))?;
        Ok(Message { tag: header.tag, body })
    }
}

impl Body {
    pub fn kind(&self) -> Kind {
        self.payload().0
    }

    fn payload(&self) -> (Kind, Vec<u8>) {
        match self {
            Body::Hello { text, .. } => (Kind::Hello, clipped(text)),
            Body::Mismatch(text) => (Kind::Mismatch, clipped(text)),
            Body::Open { request, grant, ticket } => {
                let fields = [request.0, *grant].into_iter().chain(*ticket);
                (Kind::Open, fields.flat_map(u128::to_le_bytes).collect())
            }
            Body::Opened => (Kind::Opened, Vec::new()),
            Body::Refused(reason) => (Kind::Refused, reason.as_str().into()),
            Body::Ack(_) => (Kind::Ack, Vec::new()),
            Body::Commit(summary) => (Kind::Commit, summary.encode()),
            Body::Committed(summary) => (Kind::Committed, summary.encode()),
            Body::Abort { reason, .. } => (Kind::Abort, reason.as_str().into()),
            Body::Aborted { .. } => (Kind::Aborted, Vec::new()),
            Body::Ping => (Kind::Ping, Vec::new()),
            Body::Resend(extents) => {
                let fields = extents.iter().flat_map(|(layer, position)| [*layer, *position]);
                (Kind::Resend, fields.flat_map(u32::to_le_bytes).collect())
            }
            Body::Offer(name) => (Kind::Offer, clipped(name)),
            Body::Barrier(lanes) => {
                let fields = lanes.iter().flat_map(|(lane, bytes)| [u64::from(*lane), *bytes]);
                (Kind::Barrier, fields.flat_map(u64::to_le_bytes).collect())
            }
        }
    }

    /// None: the payload does not fit the kind.
    fn decode(header: &Header, payload: &[u8]) -> Option<Body> {
        let text = || std::str::from_utf8(payload).ok().filter(|text| text.len() <= TEXT_BYTES_MAX);
        let empty = |body: Body| payload.is_empty().then_some(body);
        let quiesced = header.flags & QUIESCED != 0;
        match header.kind {
            Kind::Hello => Some(Body::Hello { text: text()?.to_string(), features: header.flags }),
            Kind::Mismatch => Some(Body::Mismatch(text()?.to_string())),
            Kind::Open => {
                let (fields, rest) = payload.as_chunks::<16>();
                let field = |at: usize| fields.get(at).map(|bytes| u128::from_le_bytes(*bytes));
                let shaped = rest.is_empty() && (2..=3).contains(&fields.len());
                let (request, grant, ticket) = (RequestId(field(0)?), field(1)?, field(2));
                shaped.then_some(Body::Open { request, grant, ticket })
            }
            Kind::Opened => empty(Body::Opened),
            Kind::Refused => Some(Body::Refused(Refused::parse(text()?)?)),
            Kind::Ack => empty(Body::Ack(header.sequence)),
            Kind::Commit => Some(Body::Commit(Summary::decode(payload)?)),
            Kind::Committed => Some(Body::Committed(Summary::decode(payload)?)),
            Kind::Abort => Some(Body::Abort { reason: Aborted::parse(text()?)?, quiesced }),
            Kind::Aborted => empty(Body::Aborted { quiesced }),
            Kind::Ping => empty(Body::Ping),
            Kind::Resend => {
                let (extents, rest) = payload.as_chunks::<8>();
                let named = rest.is_empty() && (1..=RESEND_MAX).contains(&extents.len());
                let extent = |bytes: &[u8; 8]| {
                    let mut fields = Fields(bytes);
                    (fields.u32(), fields.u32())
                };
                named.then(|| Body::Resend(extents.iter().map(extent).collect()))
            }
            Kind::Offer => Some(Body::Offer(text()?.to_string())),
            Kind::Barrier => {
                let (lanes, rest) = payload.as_chunks::<16>();
                let named = rest.is_empty() && (1..HANDOFF_LANES_MAX).contains(&lanes.len());
                let lane = |bytes: &[u8; 16]| {
                    let mut fields = Fields(bytes);
                    Some((u32::try_from(fields.u64()).ok()?, fields.u64()))
                };
                Some(Body::Barrier(lanes.iter().map(lane).collect::<Option<_>>().filter(|_| named)?))
            }
            Kind::Data => None,
        }
    }
}

impl Summary {
    fn encode(&self) -> Vec<u8> {
        [self.extents, self.bytes, self.digest].map(u64::to_le_bytes).concat()
    }

    fn decode(payload: &[u8]) -> Option<Summary> {
        let payload: &[u8; 24] = payload.try_into().ok()?;
        let mut fields = Fields(payload);
        Some(Summary { extents: fields.u64(), bytes: fields.u64(), digest: fields.u64() })
    }
}

/// One extent's line in a DATA frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Index in the grant's blocks.
    pub position: u32,
    pub block: BlockId,
    /// By reference: the block of the sender's arena that holds the extent.
    pub source: u32,
    /// Checksum of the extent, bound to its place (`extent::bind`).
    pub sum: u64,
}

impl Entry {
    #[inline]
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut out = [0; ENTRY_BYTES];
        out[0..4].copy_from_slice(&self.position.to_le_bytes());
        out[4..8].copy_from_slice(&self.block.index.to_le_bytes());
        out[8..12].copy_from_slice(&self.block.generation.to_le_bytes());
        out[12..16].copy_from_slice(&self.source.to_le_bytes());
        out[16..24].copy_from_slice(&self.sum.to_le_bytes());
        out
    }

    #[inline]
    pub(crate) fn decode(bytes: &[u8; ENTRY_BYTES]) -> Entry {
        let mut fields = Fields(bytes);
        let position = fields.u32();
        let block = BlockId { index: fields.u32(), generation: fields.u32() };
        Entry { position, block, source: fields.u32(), sum: fields.u64() }
    }
}

/// Bytes of the entries of a DATA frame whose header makes sense. `layer_bytes` of extents follow for each entry, none by
/// reference.
pub fn entries_bytes(header: &Header, layer_bytes: usize) -> Result<usize, BadFrame> {
    let extent = if header.flags & BY_REFERENCE != 0 { 0 } else { layer_bytes };
    let blocks = header.blocks as usize;
    let shaped = header.layers == 1
        && (1..=FRAME_BLOCKS_MAX).contains(&blocks)
        && header.length as usize == blocks * (ENTRY_BYTES + extent);
    if shaped { Ok(blocks * ENTRY_BYTES) } else { Err(BadFrame::Shape(Kind::Data)) }
}

/// The entries of a DATA frame out of the `entries_bytes` that follow its header, once their checksum is verified.
pub fn entries<'a>(header: &Header, bytes: &'a [u8]) -> Result<impl Iterator<Item = Entry> + use<'a>, BadFrame> {
    if hash::of_bytes(bytes) != header.payload_sum {
        return Err(BadFrame::PayloadChecksum);
    }
    let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
    Ok(entries.iter().map(Entry::decode))
}

/// Takes fields off the front of a fixed-size record.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk().expect("records have a fixed size");
        self.0 = rest;
        *head
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// At most `TEXT_BYTES_MAX` bytes of a text, cut between characters.
fn clipped(text: &str) -> Vec<u8> {
    let end = text.floor_char_boundary(TEXT_BYTES_MAX);
    text.as_bytes()[..end].to_vec()
}

#[cfg(test)]
mod tests;
