//! What a process writes to a connection in one moment leaves as one segment, when everything that can run in it has had its
//! turn: a kernel does so that has not sent the last one yet. HTTP/2 writes a request's head and body one after the other,
//! and a run costs as much as there are segments.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use baton_core::net::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is gathered at most before it is sent.
const GATHERED_MAX: usize = 1 << 16;

/// The connections of one process to which something was written in this moment. Clones are the same process's.
#[derive(Clone, Default)]
pub(crate) struct Moment(Arc<Mutex<Begun>>);

#[derive(Default)]
struct Begun {
    wires: Vec<Wire>,
    /// Of the task that ends the moment.
    waker: Option<Waker>,
}

impl Moment {
    /// A connection of the process.
    pub(crate) fn connection(&self, stream: Stream) -> Stream {
        let end = End { stream: Some(stream), gathered: Vec::new(), begun: false, failed: None, blocked: None };
        Box::new(Gathering { wire: Wire(Arc::new(Mutex::new(end))), moment: self.clone() })
    }

    /// Sends at the end of each moment what was written in it, as long as the process lives.
    pub(crate) async fn end_each(self) {
        let mut stuck: Vec<Wire> = Vec::new();
        loop {
            let begun = poll_fn(|cx| {
                stuck.retain(|wire| wire.poll_pass(cx).is_pending());
                self.poll_begun(cx)
            });
            begun.await;
            // Comes back when nothing else can run.
            tokio::task::yield_now().await;
            let begun = std::mem::take(&mut self.begun().wires);
            let ended = poll_fn(|cx| {
                stuck.extend(begun.iter().filter(|wire| wire.poll_pass(cx).is_pending()).cloned());
                Poll::Ready(())
            });
            ended.await;
        }
    }

    fn poll_begun(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut begun = self.begun();
        if begun.wires.is_empty() {
            begun.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    fn begin(&self, wire: Wire) {
        let mut begun = self.begun();
        begun.wires.push(wire);
        if let Some(waker) = begun.waker.take() {
            waker.wake();
        }
    }

    fn begun(&self) -> MutexGuard<'_, Begun> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection. Clones are the same.
#[derive(Clone)]
struct Wire(Arc<Mutex<End>>);

struct End {
    /// None once it has been given up.
    stream: Option<Stream>,
    /// Written, and not sent yet.
    gathered: Vec<u8>,
    /// Whether it is sent at the end of this moment.
    begun: bool,
    /// What became of the last sending, for whoever writes next.
    failed: Option<io::ErrorKind>,
    /// A writer that waits for room.
    blocked: Option<Waker>,
}

impl Wire {
    fn end(&self) -> MutexGuard<'_, End> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what was written in the moment that ends.
    fn poll_pass(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut end = self.end();
        end.begun = false;
        if let Err(error) = ready!(end.poll_send(cx)) {
            end.failed = Some(error.kind());
        }
        if let Some(blocked) = end.blocked.take() {
            blocked.wake();
        }
        Poll::Ready(())
    }
}

impl End {
    fn stream(&mut self) -> io::Result<Pin<&mut Stream>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.is_empty() {
            let gathered = std::mem::take(&mut self.gathered);
            let sent = self.stream().map(|stream| stream.poll_write(cx, &gathered));
            self.gathered = gathered;
            let count = ready!(sent?)?;
            self.gathered.drain(..count);
        }
        Poll::Ready(Ok(()))
    }

    fn check(&self) -> io::Result<()> {
        self.failed.map_or(Ok(()), |kind| Err(kind.into()))
    }
}

/// The process's end of a connection.
struct Gathering {
    wire: Wire,
    moment: Moment,
}

impl AsyncRead for Gathering {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.wire.end().stream()?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Gathering {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut end = self.wire.end();
        end.check()?;
        if end.gathered.len() + bytes.len() > GATHERED_MAX {
            let sent = end.poll_send(cx)?;
            if sent.is_pending() {
                end.blocked = Some(cx.waker().clone());
                return Poll::Pending;
            }
        }
        end.gathered.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut end = self.wire.end();
        end.check()?;
        if !end.gathered.is_empty() && !end.begun {
            end.begun = true;
            self.moment.begin(self.wire.clone());
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut end = self.wire.end();
        end.check()?;
        ready!(end.poll_send(cx))?;
        end.stream()?.poll_shutdown(cx)
    }
}

impl Drop for Gathering {
    /// A kernel sends what was written before the connection was given up; what a process that dies has not handed over is
    /// lost with it.
    fn drop(&mut self) {
        let mut end = self.wire.end();
        if !end.gathered.is_empty() && turmoil::sim_elapsed().is_some() && !std::thread::panicking() {
            let _ = end.poll_send(&mut Context::from_waker(Waker::noop()));
        }
        let (stream, _) = (end.stream.take(), std::mem::take(&mut end.gathered));
        drop(end);
        drop(stream);
    }
}
