//! A peer that speaks the wire format by hand and can say anything at any time.

use baton_core::{Arena, BlockId, Net, Stream};
use baton_kvtransfer::wire::{self, Body, HEADER_BYTES, Header, Kind, Message, Tag};
use baton_kvtransfer::{Data, Grant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::{LAYOUT, MODEL};

pub(crate) struct Raw {
    pub(crate) stream: Stream,
    /// DATA payload bytes sent.
    pub(crate) sequence: u64,
}

impl Raw {
    /// A connection that has said nothing yet.
    pub(crate) async fn connect(net: &dyn Net, address: &str) -> Raw {
        Raw::new(net.connect(address).await.unwrap())
    }

    pub(crate) fn new(stream: Stream) -> Raw {
        Raw { stream, sequence: 0 }
    }

    /// A greeted connection of a sender of the first release.
    pub(crate) async fn greeted(net: &dyn Net, address: &str) -> Raw {
        Raw::greeted_with(net, address, 0).await
    }

    pub(crate) async fn greeted_with(net: &dyn Net, address: &str, features: u16) -> Raw {
        let mut raw = Raw::connect(net, address).await;
        let text = wire::compatibility(&LAYOUT, MODEL);
        raw.say(Tag::default(), Body::Hello { text: text.clone(), features }).await;
        let Body::Hello { text: theirs, .. } = raw.hear().await.unwrap().body else { panic!("not greeted") };
        assert_eq!(theirs, text);
        raw
    }

    /// A greeted connection with the grant's transfer open.
    pub(crate) async fn opened(net: &dyn Net, grant: &Grant) -> Raw {
        let mut raw = Raw::greeted(net, &grant.address).await;
        assert_eq!(raw.open(grant).await, Body::Opened);
        raw
    }

    pub(crate) async fn open(&mut self, grant: &Grant) -> Body {
        self.ask(grant, None).await;
        self.hear().await.unwrap().body
    }

    /// OPEN with a ticket or without.
    pub(crate) async fn ask(&mut self, grant: &Grant, ticket: Option<u128>) {
        self.say(grant.tag(), Body::Open { request: grant.request, grant: grant.digest(), ticket }).await;
    }

    pub(crate) async fn say(&mut self, tag: Tag, body: Body) {
        self.bytes(&Message { tag, body }.encode()).await;
    }

    /// Sends a frame with the link's next sequence.
    pub(crate) async fn data(&mut self, mut frame: Frame) {
        frame.header.sequence = self.sequence;
        self.sequence += frame.header.length as u64;
        self.bytes(&frame.encode()).await;
    }

    /// The receiver may close at any time, so what cannot be written any more is not an error.
    pub(crate) async fn bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
        let _ = self.stream.flush().await;
    }

    /// The next message that is neither PING nor ACK; None once the connection is closed.
    pub(crate) async fn hear(&mut self) -> Option<Message> {
        loop {
            let message = self.hear_any().await?;
            if !matches!(message.body, Body::Ping | Body::Ack(_)) {
                return Some(message);
            }
        }
    }

    pub(crate) async fn hear_any(&mut self) -> Option<Message> {
        let (header, payload) = self.frame().await?;
        Some(Message::decode(&header, &payload).unwrap())
    }

    pub(crate) async fn frame(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head).await.ok()?;
        let header = Header::decode(&head).unwrap();
        let mut payload = vec![0; header.length as usize];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some((header, payload))
    }
}

/// A DATA frame to be tampered with before it is encoded.
#[derive(Clone)]
pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// An honest frame of one layer of `blocks`.
    pub(crate) fn new(arena: &Arena, grant: &Grant, layer: usize, blocks: &[(usize, BlockId)]) -> Frame {
        Frame::labelled(arena, grant, grant.digest(), layer, blocks)
    }

    /// A frame with the names of `grant`, its extents bound to the grant that `digest` is of.
    pub(crate) fn labelled(
        arena: &Arena,
        grant: &Grant,
        digest: u128,
        layer: usize,
        blocks: &[(usize, BlockId)],
    ) -> Frame {
        let mut data = Data::default();
        let header = data.gather(arena, grant, digest, layer, blocks);
        let payload = data.stamp(&header)[HEADER_BYTES..].to_vec();
        assert_eq!(header.kind, Kind::Data);
        Frame { header, payload }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        [&self.header.encode()[..], &self.payload].concat()
    }
}
