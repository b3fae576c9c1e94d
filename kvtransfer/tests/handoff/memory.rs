//! `core::Net` over memory, so that nothing but timers makes virtual time pass.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use baton_core::net::BoxFuture;
use baton_core::{Listener, Net, Stream};
use tokio::io::duplex;
use tokio::sync::mpsc;

const PIPE_BYTES: usize = 64 << 10;

/// Listeners by address. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Memory(Arc<Mutex<BTreeMap<String, mpsc::Sender<Stream>>>>);

impl Net for Memory {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        let listener = self.0.lock().unwrap().get(address).cloned();
        Box::pin(async move {
            let (here, there) = duplex(PIPE_BYTES);
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            listener.ok_or_else(refused)?.send(Box::new(there)).await.map_err(|_| refused())?;
            Ok(Box::new(here) as Stream)
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        let (accepted, accepting) = mpsc::channel(16);
        self.0.lock().unwrap().insert(address.to_string(), accepted);
        let listening = Listening { accepting, address: address.to_string() };
        Box::pin(async move { Ok(Box::new(listening) as Box<dyn Listener>) })
    }
}

struct Listening {
    accepting: mpsc::Receiver<Stream>,
    address: String,
}

impl Listener for Listening {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(async { self.accepting.recv().await.ok_or_else(|| io::ErrorKind::NotConnected.into()) })
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}
