//! Connections that stand still while new ones between the same hosts pass, as when one of several paths is lost: what is
//! written to them arrives when the path is back, even if the writer has long given the connection up.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use baton_core::net::Stream;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::watch;

/// What a connection may hold back; more breaks it.
const KEPT_MAX: usize = 1 << 20;
/// Between the last byte of a connection that was given up, and its end.
const LINGER: Duration = Duration::from_millis(20);

/// The connections that one host has made. Clones are the same host's.
#[derive(Clone, Default)]
pub struct Stalls(Arc<Mutex<BTreeMap<String, Way>>>);

/// To one peer.
struct Way {
    /// Connections made so far.
    made: u64,
    /// Those with smaller numbers stand still.
    still: watch::Sender<u64>,
}

impl Default for Way {
    fn default() -> Way {
        Way { made: 0, still: watch::Sender::new(0) }
    }
}

impl Stalls {
    /// What is connected to the peer stands still from now on, and what will be.
    pub fn begin(&self, peer: &str) {
        self.lock().entry(peer.to_string()).or_default().still.send_replace(u64::MAX);
    }

    /// What will be connected from now on passes.
    pub fn pass_new(&self, peer: &str) {
        if let Some(way) = self.lock().get(peer) {
            way.still.send_replace(way.made);
        }
    }

    pub fn end(&self, peer: &str) {
        if let Some(way) = self.lock().get(peer) {
            way.still.send_replace(0);
        }
    }

    /// The number of a new connection, and up to which number those to its peer stand still.
    pub(crate) fn connected(&self, address: &str) -> Number {
        let peer = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let mut ways = self.lock();
        let way = ways.entry(peer.to_string()).or_default();
        way.made += 1;
        Number { own: way.made - 1, still: way.still.subscribe() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Way>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which connection of its way one is.
pub(crate) struct Number {
    own: u64,
    still: watch::Receiver<u64>,
}

impl Number {
    fn stands_still(&self) -> bool {
        self.own < *self.still.borrow()
    }
}

/// A connection that may stand still.
pub(crate) struct Lane {
    /// None once it has been given up.
    stream: Option<Stream>,
    number: Number,
    kept: Vec<u8>,
}

impl Lane {
    pub(crate) fn new(stream: Stream, number: Number) -> Lane {
        Lane { stream: Some(stream), number, kept: Vec::new() }
    }

    fn stream(&mut self) -> Pin<&mut Stream> {
        Pin::new(self.stream.as_mut().expect("only a dropped lane has none"))
    }

    /// Writes what was kept back, as far as the connection moves again.
    fn poll_kept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.kept.is_empty() {
            let kept = std::mem::take(&mut self.kept);
            let written = self.stream().poll_write(cx, &kept);
            self.kept = kept;
            let count = ready!(written)?;
            self.kept.drain(..count);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Lane {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_read(cx, buf)
    }
}

impl AsyncWrite for Lane {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.number.stands_still() {
            if self.kept.len() + bytes.len() > KEPT_MAX {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            self.kept.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        ready!(self.poll_kept(cx))?;
        self.stream().poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.number.stands_still() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_kept(cx))?;
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.number.stands_still() && !self.kept.is_empty() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_kept(cx))?;
        self.stream().poll_shutdown(cx)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let (Some(mut stream), kept) = (self.stream.take(), std::mem::take(&mut self.kept)) else { return };
        // With its process, what a host holds back is lost.
        let Ok(host) = tokio::runtime::Handle::try_current() else { return };
        if kept.is_empty() || std::thread::panicking() {
            return;
        }
        let Number { own, mut still } = Number { own: self.number.own, still: self.number.still.clone() };
        host.spawn(async move {
            if still.wait_for(|still| own >= *still).await.is_ok() && stream.write_all(&kept).await.is_ok() {
                let _ = stream.flush().await;
                tokio::time::sleep(LINGER).await;
            }
        });
    }
}
