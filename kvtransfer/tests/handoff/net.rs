//! `core::Net` over tokio's TCP, for tests.
#![allow(clippy::disallowed_methods)] // The tests' home of the seam.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll};

use baton_core::net::BoxFuture;
use baton_core::{Listener, Net, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

pub(crate) struct Loopback;

impl Net for Loopback {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move { boxed(TcpStream::connect(address).await?) })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move { Ok(Box::new(Bound(TcpListener::bind(address).await?)) as Box<dyn Listener>) })
    }
}

struct Bound(TcpListener);

impl Listener for Bound {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(async { boxed(self.0.accept().await?.0) })
    }

    fn address(&self) -> String {
        self.0.local_addr().expect("bound").to_string()
    }
}

fn boxed(stream: TcpStream) -> io::Result<Stream> {
    stream.set_nodelay(true)?;
    Ok(Box::new(stream))
}

/// Loopback whose first connection dies once this many bytes have been written to it by the connecting side.
pub(crate) struct Cut(AtomicUsize);

impl Cut {
    pub(crate) fn after(bytes: usize) -> Cut {
        Cut(AtomicUsize::new(bytes))
    }
}

impl Net for Cut {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            let left = self.0.swap(usize::MAX, SeqCst);
            let stream = Some(TcpStream::connect(address).await?);
            Ok(Box::new(Mortal { stream, left, left_to_read: usize::MAX }) as Stream)
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Loopback.listen(address)
    }
}

/// Loopback whose first accepted connection dies once its end has read, or written, so many bytes.
pub(crate) struct CutAccepted(AtomicUsize, AtomicUsize);

impl CutAccepted {
    pub(crate) fn after(read: usize, written: usize) -> Arc<CutAccepted> {
        Arc::new(CutAccepted(AtomicUsize::new(read), AtomicUsize::new(written)))
    }
}

/// The network of a receiver that is to die.
pub(crate) struct Dying(pub(crate) Arc<CutAccepted>);

impl Net for Dying {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Loopback.connect(address)
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        let cut = self.0.clone();
        Box::pin(async move {
            let listener = TcpListener::bind(address).await?;
            Ok(Box::new(DyingBound(listener, cut)) as Box<dyn Listener>)
        })
    }
}

struct DyingBound(TcpListener, Arc<CutAccepted>);

impl Listener for DyingBound {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(async {
            let stream = Some(self.0.accept().await?.0);
            let (left_to_read, left) = (self.1.0.swap(usize::MAX, SeqCst), self.1.1.swap(usize::MAX, SeqCst));
            Ok(Box::new(Mortal { stream, left, left_to_read }) as Stream)
        })
    }

    fn address(&self) -> String {
        self.0.local_addr().expect("bound").to_string()
    }
}

struct Mortal {
    stream: Option<TcpStream>,
    /// Bytes that it may still write.
    left: usize,
    left_to_read: usize,
}

impl Mortal {
    fn alive(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }
}

impl AsyncRead for Mortal {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.left_to_read == 0 {
            self.stream = None;
        }
        let room = buf.remaining().min(self.left_to_read);
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(room));
        std::task::ready!(self.alive()?.poll_read(cx, &mut part))?;
        let read = part.filled().len();
        buf.advance(read);
        self.left_to_read -= read;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Mortal {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let length = bytes.len().min(self.left);
        if length == 0 {
            self.stream = None;
        }
        let written = std::task::ready!(self.alive()?.poll_write(cx, &bytes[..length]))?;
        self.left -= written;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.left == 0 {
            self.stream = None;
        }
        self.alive()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.alive()?.poll_shutdown(cx)
    }
}

/// Loopback that flips one bit of what the connecting side writes, once so many more bytes have been written.
pub(crate) struct Flip {
    armed: std::sync::Arc<Armed>,
}

struct Armed {
    /// Bytes until the flip; `usize::MAX`: none.
    after: AtomicUsize,
    flipped: AtomicUsize,
}

impl Flip {
    pub(crate) fn new() -> Flip {
        Flip { armed: std::sync::Arc::new(Armed { after: AtomicUsize::new(usize::MAX), flipped: AtomicUsize::new(0) }) }
    }

    pub(crate) fn flip_after(&self, bytes: usize) {
        self.armed.after.store(bytes, SeqCst);
    }

    pub(crate) fn flipped(&self) -> usize {
        self.armed.flipped.load(SeqCst)
    }
}

impl Net for Flip {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            Ok(Box::new(Flipping { stream, armed: self.armed.clone() }) as Stream)
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Loopback.listen(address)
    }
}

struct Flipping {
    stream: TcpStream,
    armed: std::sync::Arc<Armed>,
}

impl AsyncRead for Flipping {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Flipping {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let after = self.armed.after.load(SeqCst);
        let mut bytes = bytes.to_vec();
        if let Some(byte) = bytes.get_mut(after) {
            *byte ^= 0x10;
        }
        let written = std::task::ready!(Pin::new(&mut self.stream).poll_write(cx, &bytes))?;
        let left = if after == usize::MAX || written > after { usize::MAX } else { after - written };
        if after != usize::MAX && written > after {
            self.armed.flipped.fetch_add(1, SeqCst);
        }
        self.armed.after.store(left, SeqCst);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
