//! Cuts a byte stream into frames, in one buffer for the life of the connection.

use std::io;
use std::time::Duration;

use baton_core::limits::HANDOFF_IDLE_MS;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

use crate::wire::{BadFrame, HEADER_BYTES, Header, Message};

/// What is read at a time: enough to amortise a system call, little enough to stay in the second-level cache until it
/// is copied to its place.
const BUFFER_BYTES: usize = 256 << 10;

/// Why no further frame can be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] BadFrame),
}

pub(crate) struct Frames<R> {
    from: R,
    /// Received and not yet consumed: `buffer[start..end]`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    /// Frames of `from`, with room for small ones only until `widen`.
    pub(crate) fn new(from: R) -> Frames<R> {
        Frames { from, buffer: vec![0; 4096], start: 0, end: 0 }
    }

    /// Makes room for messages of any allowed length, and for pieces of DATA of `piece` bytes.
    pub(crate) fn widen(&mut self, piece: usize) {
        let mut wide = vec![0; piece.max(BUFFER_BYTES)];
        wide[..self.buffer.len()].copy_from_slice(&self.buffer);
        self.buffer = wide;
    }

    /// Whether the next frame's header has been received already.
    pub(crate) fn has_more(&self) -> bool {
        self.end - self.start >= HEADER_BYTES
    }

    /// The next frame's header. Its payload comes next, by `take` or by `pieces`.
    pub(crate) async fn header(&mut self) -> Result<Header, ReadError> {
        let head = self.take(HEADER_BYTES).await?;
        Ok(Header::decode(head.first_chunk().expect("taken"))?)
    }

    /// The next `length` bytes. Fails when the peer says nothing for the idle time.
    pub(crate) async fn take(&mut self, length: usize) -> Result<&[u8], ReadError> {
        if length > self.buffer.len() {
            return Err(BadFrame::Length { length: length as u32 }.into());
        }
        self.fill(length).await?;
        self.start += length;
        Ok(&self.buffer[self.start - length..self.start])
    }

    /// Reads what nobody wants.
    pub(crate) async fn skip(&mut self, mut bytes: usize) -> Result<(), ReadError> {
        while bytes > 0 {
            bytes -= self.pieces(1, bytes).await?.len();
        }
        Ok(())
    }

    /// As many pieces of `piece` bytes as are there, at least one and at most `count`.
    pub(crate) async fn pieces(&mut self, piece: usize, count: usize) -> Result<&[u8], ReadError> {
        self.fill(piece).await?;
        let whole = ((self.end - self.start) / piece).min(count);
        self.take(whole * piece).await
    }

    /// The next frame as a message; DATA is not one.
    pub(crate) async fn message(&mut self) -> Result<Message, ReadError> {
        let header = self.header().await?;
        let payload = self.take(header.length as usize).await?;
        Ok(Message::decode(&header, payload)?)
    }

    /// Reads until `length` bytes are there.
    async fn fill(&mut self, length: usize) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.start + length > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < length {
            let read = self.from.read(&mut self.buffer[self.end..]);
            let Ok(read) = timeout(Duration::from_millis(HANDOFF_IDLE_MS), read).await else {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("silent for {HANDOFF_IDLE_MS} ms")));
            };
            match read? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.end += n,
            }
        }
        Ok(())
    }
}
