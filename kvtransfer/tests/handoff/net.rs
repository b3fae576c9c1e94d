//! `core::Net` over tokio's TCP, for tests.
#![allow(clippy::disallowed_methods)] // The tests' home of the seam.

use std::io;

use baton_core::net::BoxFuture;
use baton_core::{Listener, Net, Stream};
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
