//! The sender's end of one TCP connection, which carries many transfers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_core::limits::{HANDOFF_CONNECT_MS, HANDOFF_CREDIT_BYTES};
use baton_core::{BlockId, Net, Refused, Stream, TransferId};
use tokio::io::{AsyncRead, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::frames::{Frames, ReadError};
use crate::outbox::{Outbox, write_all};
use crate::sending::Sending;
use crate::wire::{BadFrame, Body, ENTRY_BYTES, Header, Message, Tag, VERSION};
use crate::{TransferError, extent};

pub(crate) struct Connection {
    peer: String,
    pub(crate) outbox: Outbox,
    /// Payload bytes that may still be sent before the receiver acknowledges some.
    credits: Semaphore,
    /// None once the connection is dead.
    sending: Mutex<Option<BTreeMap<TransferId, Arc<Sending>>>>,
}

/// The two halves of a greeted stream.
pub(crate) struct Greeted {
    frames: Frames<ReadHalf<Stream>>,
    write: WriteHalf<Stream>,
}

/// Connects and compares texts.
pub(crate) async fn connect(net: &dyn Net, address: &str, ours: &str) -> Result<Greeted, TransferError> {
    let lost = |cause: String| TransferError::Lost { peer: address.to_string(), cause };
    let greeting = async {
        let stream = net.connect(address).await.map_err(|error| lost(format!("connect: {error}")))?;
        let (read, mut write) = tokio::io::split(stream);
        let hello = Message { tag: Tag::default(), body: Body::Hello(ours.to_string()) };
        let said = async {
            write_all(&mut write, &hello.encode()).await?;
            write.flush().await
        };
        said.await.map_err(|error| lost(format!("greet: {error}")))?;
        let mut frames = Frames::new(read);
        let theirs = match frames.message().await {
            Ok(Message { body: Body::Hello(theirs) | Body::Mismatch(theirs), .. }) => theirs,
            Err(ReadError::Frame(BadFrame::Version { theirs })) => format!("wire {theirs}"),
            Ok(message) => return Err(lost(format!("greeted with {:?}", message.body.kind()))),
            Err(error) => return Err(lost(format!("greeting: {error}"))),
        };
        if theirs != ours {
            return Err(TransferError::Incompatible { ours: ours.to_string(), theirs });
        }
        Ok(Greeted { frames, write })
    };
    let patience = Duration::from_millis(HANDOFF_CONNECT_MS);
    let silent = |_| lost(format!("no greeting in wire version {VERSION} within {HANDOFF_CONNECT_MS} ms"));
    timeout(patience, greeting).await.map_err(silent)?
}

impl Connection {
    pub(crate) fn new(peer: &str) -> Connection {
        Connection {
            peer: peer.to_string(),
            outbox: Outbox::new(),
            credits: Semaphore::new(HANDOFF_CREDIT_BYTES),
            sending: Mutex::new(Some(BTreeMap::new())),
        }
    }

    /// Reads and writes until the connection fails, and says why.
    pub(crate) async fn run(&self, greeted: Greeted) -> String {
        let Greeted { mut frames, mut write } = greeted;
        tokio::select! {
            cause = self.read(&mut frames) => cause.to_string(),
            cause = self.outbox.write(&mut write) => cause.to_string(),
            cause = self.outbox.closed() => cause.to_string(),
        }
    }

    /// Fails every transfer of the connection.
    pub(crate) fn fail(&self, cause: &str) {
        let sending = self.sending().take().unwrap_or_default();
        for transfer in sending.values() {
            transfer.fail(self.lost(cause));
        }
        self.credits.close();
        self.outbox.close();
    }

    pub(crate) fn enrol(&self, transfer: TransferId) -> Result<Arc<Sending>, TransferError> {
        let mut sending = self.sending();
        let Some(transfers) = sending.as_mut() else {
            return Err(self.lost("closed"));
        };
        if transfers.contains_key(&transfer) {
            return Err(TransferError::Refused(Refused::Stale));
        }
        let new = Arc::new(Sending::new());
        transfers.insert(transfer, new.clone());
        Ok(new)
    }

    pub(crate) fn strike(&self, transfer: TransferId) {
        if let Some(transfers) = self.sending().as_mut() {
            transfers.remove(&transfer);
        }
    }

    /// Sends one frame once there are credit and a place for it.
    pub(crate) async fn send(&self, sending: &Sending, frame: Frame<'_>) -> Result<u64, TransferError> {
        tokio::select! {
            biased;
            error = sending.failed() => Err(error),
            sent = self.send_when_possible(sending, frame) => sent,
        }
    }

    /// Returns the digest of what was sent. Nothing is lost or held when the future is dropped.
    async fn send_when_possible(&self, sending: &Sending, frame: Frame<'_>) -> Result<u64, TransferError> {
        let bytes = frame.blocks.len() * (ENTRY_BYTES + frame.arena.layout().layer_bytes());
        let Ok(credit) = self.credits.acquire_many(bytes as u32).await else {
            return Err(self.lost("closed"));
        };
        let Some(mut data) = self.outbox.place().await else {
            return Err(self.lost("closed"));
        };
        let header = frame.gather(&mut data);
        let digest = data.digest;
        let mut data = Some(data);
        let written = sending.writing(|| {
            credit.forget();
            self.outbox.push(header, data.take().expect("pushed once"));
        });
        if let Some(data) = data {
            self.outbox.spare(data);
        }
        written.map(|()| digest)
    }

    async fn read<R: AsyncRead + Unpin>(&self, frames: &mut Frames<R>) -> ReadError {
        let mut acknowledged = 0;
        loop {
            let message = match frames.message().await {
                Ok(message) => message,
                Err(error) => return error,
            };
            if let Err(error) = self.hear(message, &mut acknowledged) {
                return error.into();
            }
        }
    }

    fn hear(&self, message: Message, acknowledged: &mut u64) -> Result<(), BadFrame> {
        let Message { tag, body } = message;
        match body {
            Body::Ack(bytes) => {
                let sent = self.outbox.sequence();
                if !(*acknowledged..=sent).contains(&bytes) {
                    return Err(BadFrame::Acknowledged { acknowledged: bytes, sent });
                }
                self.credits.add_permits((bytes - *acknowledged) as usize);
                *acknowledged = bytes;
            }
            Body::Opened | Body::Committed(_) | Body::Refused(_) => self.hear_about(tag, body),
            Body::Abort { .. } => {
                self.hear_about(tag, body);
                self.outbox.tell(tag, Body::Aborted { quiesced: true });
            }
            Body::Ping => {}
            body => return Err(BadFrame::Shape(body.kind())),
        }
        Ok(())
    }

    fn hear_about(&self, tag: Tag, body: Body) {
        let sending = self.sending().as_ref().and_then(|transfers| transfers.get(&tag.transfer).cloned());
        if let Some(sending) = sending {
            sending.hear(body);
        }
    }

    fn lost(&self, cause: &str) -> TransferError {
        TransferError::Lost { peer: self.peer.clone(), cause: cause.to_string() }
    }

    fn sending(&self) -> MutexGuard<'_, Option<BTreeMap<TransferId, Arc<Sending>>>> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one DATA frame is gathered from.
pub(crate) struct Frame<'a> {
    pub(crate) arena: &'a baton_core::Arena,
    pub(crate) grant: &'a crate::Grant,
    pub(crate) digest: u128,
    pub(crate) layer: usize,
    pub(crate) blocks: &'a [(usize, BlockId)],
}

impl Frame<'_> {
    pub(crate) fn gather(&self, data: &mut extent::Data) -> Header {
        data.gather(self.arena, self.grant, self.digest, self.layer, self.blocks)
    }
}
