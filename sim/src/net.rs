//! The network seam over turmoil: the same `core::Net` that production has over the operating system's TCP. A host's
//! network also feeds the record, and can damage what goes out to a handoff's receiver.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use baton_core::Rng;
use baton_core::net::{BoxFuture, Listener, Net, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turmoil::net::{TcpListener, TcpStream};

use crate::record::Record;
use crate::stalls::{Lane, Stalls};
use crate::topology::KV_PORT;

/// TCP between turmoil's hosts. Only usable from inside a simulated host.
#[derive(Clone, Copy, Debug, Default)]
pub struct TurmoilNet;

impl Net for TurmoilNet {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move { Ok(Box::new(TcpStream::connect(address).await?) as Stream) })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?.to_string();
            Ok(Box::new(SimListener { listener, address }) as Box<dyn Listener>)
        })
    }
}

struct SimListener {
    listener: TcpListener,
    address: String,
}

impl Listener for SimListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(async move { Ok(Box::new(self.listener.accept().await?.0) as Stream) })
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}

/// The network of one host.
pub struct HostNet {
    pub host: String,
    pub record: Record,
    pub flips: Flips,
    pub stalls: Stalls,
}

impl Net for HostNet {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            let connected = TurmoilNet.connect(address).await;
            self.record.network(&self.host, if connected.is_ok() { b'c' } else { b'x' }, address.len());
            let flips = address.ends_with(&format!(":{KV_PORT}")).then(|| self.flips.clone());
            let stream = Box::new(Lane::new(connected?, self.stalls.connected(address)));
            let (host, record) = (self.host.clone(), self.record.clone());
            Ok(Box::new(Watched { stream, host, record, flips }) as Stream)
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move {
            let inner = TurmoilNet.listen(address).await?;
            let (host, record) = (self.host.clone(), self.record.clone());
            Ok(Box::new(WatchedListener { inner, host, record }) as Box<dyn Listener>)
        })
    }
}

struct WatchedListener {
    inner: Box<dyn Listener>,
    host: String,
    record: Record,
}

impl Listener for WatchedListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(async move {
            let stream = self.inner.accept().await?;
            self.record.network(&self.host, b'a', 0);
            Ok(Box::new(Watched { stream, host: self.host.clone(), record: self.record.clone(), flips: None })
                as Stream)
        })
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}

/// Damage that waits for the next bytes of KV on their way out of a host. Clones are the same host's.
#[derive(Clone)]
pub struct Flips(Arc<Mutex<Armed>>);

struct Armed {
    count: u64,
    rng: Rng,
}

/// Messages of fewer bytes carry no KV.
const KV_BYTES_MIN: usize = 48;

impl Flips {
    pub fn new(rng: Rng) -> Flips {
        Flips(Arc::new(Mutex::new(Armed { count: 0, rng })))
    }

    /// One bit in each of `count` writes, of the next few.
    pub fn arm(&self, count: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).count = count;
    }

    fn damage(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut armed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if armed.count == 0 || bytes.len() < KV_BYTES_MIN {
            return None;
        }
        // Not each one: what carries KV follows messages that carry none, and those end the link.
        if armed.rng.below(3) > 0 {
            return None;
        }
        armed.count -= 1;
        let bit = armed.rng.below(bytes.len() as u64 * 8) as usize;
        let mut damaged = bytes.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        Some(damaged)
    }
}

/// A stream that tells the record what passes.
struct Watched {
    stream: Stream,
    host: String,
    record: Record,
    flips: Option<Flips>,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_ready() {
            self.record.network(&self.host, b'r', buf.filled().len() - before);
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let damaged = self.flips.as_ref().and_then(|flips| flips.damage(bytes));
        if damaged.is_some() {
            self.record.note(&self.host, "a bit of KV on the wire flips");
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, damaged.as_deref().unwrap_or(bytes));
        if let Poll::Ready(Ok(count)) = written {
            self.record.network(&self.host, b'w', count);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
