//! The network of production: tokio's TCP, without Nagle's delay.

use std::io;

use baton_core::net::{BoxFuture, Listener, Net, Stream};

/// TCP of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpNet;

impl Net for TcpNet {
    #[allow(clippy::disallowed_methods)] // This is the seam's production side.
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            let stream = tokio::net::TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Stream)
        })
    }

    #[allow(clippy::disallowed_methods)] // This is the seam's production side.
    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move {
            let listener = tokio::net::TcpListener::bind(address).await?;
            let address = listener.local_addr()?.to_string();
            Ok(Box::new(TcpListener { listener, address }) as Box<dyn Listener>)
        })
    }

    fn shares_memory(&self) -> bool {
        true
    }
}

struct TcpListener {
    listener: tokio::net::TcpListener,
    address: String,
}

impl Listener for TcpListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(async move {
            let (stream, _) = self.listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Stream)
        })
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}
