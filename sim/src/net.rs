//! The network seam over turmoil: the same `core::Net` that production has over the operating system's TCP. A host's
//! network also feeds the record, and can damage what goes out to a handoff's receiver.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use baton_core::Rng;
use baton_core::net::{BoxFuture, Listener, Net, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turmoil::net::{TcpListener, TcpStream};

use crate::moment::Moment;
use crate::record::Record;
use crate::skew;
use crate::stalls::{Lane, Stalls};
use crate::topology::{KV_PORT, kind};

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

/// The network of one process.
pub struct HostNet {
    host: String,
    record: Record,
    flips: Flips,
    stalls: Stalls,
    moment: Moment,
    /// Whether the process is one of the release before.
    earlier: bool,
}

impl HostNet {
    /// Of a process that starts now, in its host.
    pub fn new(host: &str, record: &Record, flips: &Flips, stalls: &Stalls, earlier: bool) -> HostNet {
        let moment = Moment::default();
        tokio::spawn(moment.clone().end_each());
        let (host, record, flips, stalls) = (host.to_string(), record.clone(), flips.clone(), stalls.clone());
        HostNet { host, record, flips, stalls, moment, earlier }
    }
}

impl Net for HostNet {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            let connected = TurmoilNet.connect(address).await;
            self.record.network(&self.host, if connected.is_ok() { b'c' } else { b'x' }, address.len());
            let stream = Box::new(Lane::new(connected?, self.stalls.connected(address)));
            let kv = carries_kv(address);
            let (host, record, flips) = (self.host.clone(), self.record.clone(), kv.then(|| self.flips.clone()));
            let watched = Box::new(Watched { stream, host, record, flips });
            if kv {
                return Ok(watched as Stream);
            }
            let gathering = self.moment.connection(watched);
            Ok(if self.earlier { skew::connected(gathering) } else { gathering })
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move {
            let inner = TurmoilNet.listen(address).await?;
            let moment = (!carries_kv(address)).then(|| self.moment.clone());
            let earlier = self.earlier && moment.is_some() && kind(&self.host) != "gateway";
            let (host, record) = (self.host.clone(), self.record.clone());
            Ok(Box::new(WatchedListener { inner, host, record, moment, earlier }) as Box<dyn Listener>)
        })
    }
}

fn carries_kv(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(_, port)| port.parse() == Ok(KV_PORT))
}

struct WatchedListener {
    inner: Box<dyn Listener>,
    host: String,
    record: Record,
    /// None where nobody flushes.
    moment: Option<Moment>,
    earlier: bool,
}

impl Listener for WatchedListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(async move {
            let stream = self.inner.accept().await?;
            self.record.network(&self.host, b'a', 0);
            let (host, record) = (self.host.clone(), self.record.clone());
            let watched = Box::new(Watched { stream, host, record, flips: None });
            let Some(moment) = &self.moment else { return Ok(watched as Stream) };
            let gathering = moment.connection(watched);
            Ok(if self.earlier { skew::accepted(gathering) } else { gathering })
        })
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}

/// What becomes of a piece of KV on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Damage {
    /// One of its bits flips.
    Bit,
    /// It is there twice.
    Twice,
    /// Its second half comes first.
    Swapped,
}

/// Damage that waits for the next bytes of KV on their way out of a host. Clones are the same host's.
#[derive(Clone)]
pub struct Flips(Arc<Mutex<Armed>>);

struct Armed {
    /// How many pieces it is still to strike.
    counts: BTreeMap<Damage, u64>,
    rng: Rng,
}

/// Messages of fewer bytes carry no KV.
const KV_BYTES_MIN: usize = 48;

impl Flips {
    pub fn new(rng: Rng) -> Flips {
        Flips(Arc::new(Mutex::new(Armed { counts: BTreeMap::new(), rng })))
    }

    /// Damages `count` writes, of the next few.
    pub fn arm(&self, damage: Damage, count: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).counts.insert(damage, count);
    }

    fn damage(&self, bytes: &[u8]) -> Option<(Damage, Vec<u8>)> {
        let mut armed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let damage = armed.counts.iter().find(|(_, count)| **count > 0).map(|(damage, _)| *damage)?;
        if bytes.len() < KV_BYTES_MIN {
            return None;
        }
        // Not each one: what carries KV follows messages that carry none, and those end the link.
        if armed.rng.below(3) > 0 {
            return None;
        }
        armed.counts.entry(damage).and_modify(|count| *count -= 1);
        let mut damaged = bytes.to_vec();
        match damage {
            Damage::Bit => {
                let bit = armed.rng.below(bytes.len() as u64 * 8) as usize;
                damaged[bit / 8] ^= 1 << (bit % 8);
            }
            Damage::Twice => damaged.extend_from_slice(bytes),
            Damage::Swapped => damaged.rotate_left(bytes.len() / 2),
        }
        Some((damage, damaged))
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
        let Some((damage, damaged)) = damaged else {
            let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
            if let Poll::Ready(Ok(count)) = written {
                self.record.network(&self.host, b'w', count);
            }
            return written;
        };
        let what = match damage {
            Damage::Bit => "a bit of KV on the wire flips",
            Damage::Twice => "a piece of KV is on the wire twice",
            Damage::Swapped => "two pieces of KV on the wire change places",
        };
        self.record.note(&self.host, what);
        let count = ready!(Pin::new(&mut self.stream).poll_write(cx, &damaged))?;
        self.record.network(&self.host, b'w', count);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
