//! The network seam. Production hands in TCP (`baton_proto::TcpNet`), the simulator turmoil's TCP.

use std::future::Future;
use std::io;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};

/// A boxed future, as the object-safe seams return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One connection.
pub trait Io: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static> Io for T {}
pub type Stream = Box<dyn Io>;

/// Connects and listens. Addresses are `host:port`; port 0 asks for a free one.
pub trait Net: Send + Sync + 'static {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>>;
    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>>;

    /// Whether two processes that reach each other may be processes of one machine, which can share memory. The hosts of
    /// a simulated network cannot.
    fn shares_memory(&self) -> bool {
        false
    }
}

/// A bound socket that accepts connections.
pub trait Listener: Send + 'static {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Stream>>;
    /// The bound address, with the real port.
    fn address(&self) -> String;
}
