//! A server's loop: connections over `core::Net` are accepted, bounded in number, and ended together. And gRPC without tonic's
//! own server around its services: its layers (timeouts, limits, boxes for each) cost a coordinator more per call than what
//! it does for one, and nothing here uses them.

use std::convert::Infallible;
use std::fmt::Display;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use baton_core::{Listener, Stream};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};

use crate::channel::KEEP_ALIVE;

const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// How many connections a server has at a time; further ones wait in the listener's queue.
#[derive(Clone, Copy)]
pub struct Bound {
    pub connections_max: usize,
    /// Called whenever as many are there, so that it can be counted.
    pub full: fn(),
}

impl Bound {
    /// For the few connections of a test.
    pub fn uncounted() -> Bound {
        Bound { connections_max: 1024, full: || {} }
    }
}

/// Turns true when the server stops.
#[derive(Clone)]
pub struct Stopping(watch::Receiver<bool>);

/// Accepts connections until `stopped` and has each served by `connection`; then lets the open ones end. Dropping it ends
/// them at once.
pub async fn accept<C>(
    mut listener: Box<dyn Listener>,
    bound: Bound,
    stopped: impl Future<Output = ()>,
    connection: impl Fn(Stream, Stopping) -> C,
) where
    C: Future<Output = ()> + Send + 'static,
{
    let (stop, stopping) = watch::channel(false);
    let stopping = Stopping(stopping);
    let mut connections = JoinSet::new();
    let mut stopped = std::pin::pin!(stopped);
    loop {
        let room = connections.len() < bound.connections_max;
        tokio::select! {
            biased;
            () = &mut stopped => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if room => match accepted {
                Ok(stream) => {
                    connections.spawn(connection(stream, stopping.clone()));
                    if connections.len() == bound.connections_max {
                        (bound.full)();
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    stop.send_replace(true);
    while connections.join_next().await.is_some() {}
}

/// Serves one of hyper's connections to its end; `shut` has it end in peace, once the server stops.
pub async fn until_end<C, E: Display>(connection: C, mut stopping: Stopping, shut: fn(Pin<&mut C>))
where
    C: Future<Output = Result<(), E>>,
{
    let mut connection = std::pin::pin!(connection);
    let stop = async move { drop(stopping.0.wait_for(|stopping| *stopping).await) };
    let ended = tokio::select! {
        biased;
        ended = &mut connection => ended,
        () = stop => {
            shut(connection.as_mut());
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

/// Serves a gRPC service that is always ready, as tonic's are, until `stopped`; then lets the open calls end. Dropping it
/// ends them at once.
pub async fn serve<S>(listener: Box<dyn Listener>, bound: Bound, service: S, stopped: impl Future<Output = ()>)
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let connection = |stream, stopping| grpc(stream, service.clone(), stopping);
    accept(listener, bound, stopped, connection).await;
}

async fn grpc<S>(stream: Stream, service: S, stopping: Stopping)
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let service = service_fn(move |request: Request<Incoming>| service.clone().call(request.map(Body::new)));
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(2 * KEEP_ALIVE)
        // gRPC has no use for the wall time, and what is sent would not repeat under simulated time.
        .auto_date_header(false);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    until_end(connection, stopping, |connection| connection.graceful_shutdown()).await;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use baton_core::Net;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    use super::*;
    use crate::TcpNet;

    static FULL: AtomicUsize = AtomicUsize::new(0);

    /// Goal: beyond the bound connections wait, are counted, and are served once there is room; the server's stop lets open
    /// ones end. Method: a bound of one, and three that connect.
    #[tokio::test]
    async fn connections_beyond_the_bound_wait_for_room() {
        let listener = TcpNet.listen("127.0.0.1:0").await.unwrap();
        let address = listener.address();
        fn count() {
            FULL.fetch_add(1, Ordering::Relaxed);
        }
        let bound = Bound { connections_max: 1, full: count };
        let served = Arc::new(AtomicUsize::new(0));
        let (stop, stopped) = oneshot::channel::<()>();
        let counted = served.clone();
        let connection = move |mut stream: Stream, _: Stopping| {
            let served = counted.clone();
            async move {
                served.fetch_add(1, Ordering::Relaxed);
                let mut byte = [0];
                while stream.read(&mut byte).await.is_ok_and(|count| count > 0) {
                    stream.write_all(&byte).await.unwrap();
                }
            }
        };
        let server = tokio::spawn(accept(listener, bound, async move { drop(stopped.await) }, connection));
        let echo = async |stream: &mut Stream| {
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
        };
        let mut first = TcpNet.connect(&address).await.unwrap();
        echo(&mut first).await;
        let mut second = TcpNet.connect(&address).await.unwrap();
        second.write_all(b"x").await.unwrap();
        echo(&mut first).await;
        assert_eq!((served.load(Ordering::Relaxed), FULL.load(Ordering::Relaxed)), (1, 1), "the second waits");
        drop(first);
        second.read_exact(&mut [0]).await.unwrap();
        assert_eq!((served.load(Ordering::Relaxed), FULL.load(Ordering::Relaxed)), (2, 2));
        stop.send(()).unwrap();
        echo(&mut second).await;
        assert!(!server.is_finished());
        drop(second);
        server.await.unwrap();
    }
}
