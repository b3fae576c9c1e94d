//! The network seam over turmoil: the same `core::Net` that production has over the operating system's TCP.

use std::io;

use baton_core::net::{BoxFuture, Listener, Net, Stream};
use turmoil::net::{TcpListener, TcpStream};

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
