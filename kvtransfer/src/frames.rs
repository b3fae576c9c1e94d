//! Cuts a byte stream into frames, in one buffer for the life of the connection.

use std::io;
use std::time::Duration;

use baton_core::limits::HANDOFF_IDLE_MS;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

use crate::wire::{BadFrame, HEADER_BYTES, Header, LENGTH_MAX, Message};

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

    /// Makes room for frames of any allowed length.
    pub(crate) fn widen(&mut self) {
        let mut wide = vec![0; HEADER_BYTES + LENGTH_MAX];
        wide[..self.buffer.len()].copy_from_slice(&self.buffer);
        self.buffer = wide;
    }

    /// The next frame. Fails when the peer says nothing for the idle time.
    pub(crate) async fn next(&mut self) -> Result<(Header, &[u8]), ReadError> {
        self.fill(HEADER_BYTES).await?;
        let head = self.buffer[self.start..].first_chunk().expect("filled");
        let header = Header::decode(head)?;
        let length = HEADER_BYTES + header.length as usize;
        if length > self.buffer.len() {
            return Err(BadFrame::Length { length: header.length }.into());
        }
        self.fill(length).await?;
        let frame = &self.buffer[self.start..self.start + length];
        self.start += length;
        Ok((header, &frame[HEADER_BYTES..]))
    }

    /// The next frame as a message; DATA is not one.
    pub(crate) async fn message(&mut self) -> Result<Message, ReadError> {
        let (header, payload) = self.next().await?;
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
