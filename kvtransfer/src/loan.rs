//! A DATA frame between its sender, who holds the source blocks, and the link's writer, who reads them.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use baton_core::limits::HANDOFF_IDLE_MS;
use tokio::io::AsyncWrite;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::extent::Data;

/// Pieces of one vectored write.
const PIECES: usize = 64;

pub(crate) struct Loan {
    data: Mutex<Data>,
    written: Notify,
}

impl Loan {
    pub(crate) fn new(data: Data) -> Loan {
        Loan { data: Mutex::new(data), written: Notify::new() }
    }

    /// Writes the frame; the peer has to take some bytes within the idle time.
    pub(crate) async fn write<W: AsyncWrite + Unpin>(&self, to: &mut W) -> io::Result<()> {
        if !to.is_write_vectored() {
            self.lock().own();
        }
        let idle = Duration::from_millis(HANDOFF_IDLE_MS);
        loop {
            let Ok(more) = timeout(idle, self.write_some(to)).await else {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("no byte taken for {HANDOFF_IDLE_MS} ms")));
            };
            if !more? {
                self.written.notify_one();
                return Ok(());
            }
        }
    }

    /// False: all is written. The lock is held for the length of a system call, so that `Borrowed` can take its blocks
    /// back between two of them.
    async fn write_some<W: AsyncWrite + Unpin>(&self, to: &mut W) -> io::Result<bool> {
        poll_fn(|cx| {
            let mut data = self.lock();
            let mut pieces = [IoSlice::new(&[]); PIECES];
            let count = data.rest(&mut pieces);
            if count == 0 {
                data.forget();
                return Poll::Ready(Ok(false));
            }
            match std::task::ready!(Pin::new(&mut *to).poll_write_vectored(cx, &pieces[..count])) {
                Ok(0) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(bytes) => {
                    data.wrote(bytes);
                    Poll::Ready(Ok(true))
                }
                Err(error) => Poll::Ready(Err(error)),
            }
        })
        .await
    }

    fn lock(&self) -> MutexGuard<'_, Data> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sender's end of loans. Once it is dropped no source block is read any more: what is not written by then is
/// copied.
#[derive(Default)]
pub(crate) struct Borrowed(Vec<Arc<Loan>>);

impl Borrowed {
    pub(crate) fn push(&mut self, loan: Arc<Loan>) {
        self.0.push(loan);
    }

    /// Returns when everything is written, over whichever connections. To be waited for once.
    pub(crate) async fn written(&self) {
        for loan in &self.0 {
            loan.written.notified().await;
        }
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.0.iter().for_each(|loan| loan.lock().own());
    }
}
