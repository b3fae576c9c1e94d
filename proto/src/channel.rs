//! gRPC over `core::Net`: a lazily connected channel, and a listener's connections for tonic's server.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use baton_core::net::{Listener, Net, Stream};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::layer::util::{Identity, Stack};
use tower::util::MapResponseLayer;

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// A peer that stops answering is noticed within two of these; a lost segment in the simulator's TCP likewise.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_millis(500);
/// A refused connection can come back in no time at all; without a pause a reconnect loop would spin.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);

/// An address that is not `host:port`.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not an address (host:port)")]
pub struct BadAddress(pub String);

/// A channel to `address` that connects at its first call and again after every loss.
pub fn channel(net: Arc<dyn Net>, address: &str) -> Result<Channel, BadAddress> {
    let bad = || BadAddress(address.to_string());
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| bad())?;
    if endpoint.uri().port_u16().is_none() {
        return Err(bad());
    }
    let connector = tower::service_fn(move |uri: Uri| {
        let net = net.clone();
        async move {
            let address = uri.authority().map_or("", |a| a.as_str());
            match net.connect(address).await {
                Ok(stream) => Ok(TokioIo::new(stream)),
                Err(error) => {
                    tokio::time::sleep(CONNECT_PAUSE).await;
                    Err(error)
                }
            }
        }
    });
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .connect_with_connector_lazy(connector))
}

type Answer = http::Response<Body>;
/// Goes over every answer.
type Layers = Stack<MapResponseLayer<fn(Answer) -> Answer>, Identity>;
pub type Server = tonic::transport::Server<Layers>;
/// A server with its services.
pub type Serving = tonic::transport::server::Router<Layers>;

/// A tonic server with the keep-alive that every Baton process uses.
pub fn server() -> Server {
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(2 * KEEP_ALIVE))
        .layer(MapResponseLayer::new(undated as fn(Answer) -> Answer))
}

/// Keeps hyper from putting the wall time on every answer, which it does where there is no date yet. gRPC has no use for
/// it, and what is sent would not repeat under simulated time.
fn undated(mut answer: Answer) -> Answer {
    answer.headers_mut().insert(http::header::DATE, http::HeaderValue::from_static(""));
    answer
}

/// The connections of a listener, for `serve_with_incoming`.
pub fn incoming(listener: Box<dyn Listener>) -> impl futures::Stream<Item = io::Result<ServerIo>> {
    futures::stream::unfold(listener, |mut listener| async move {
        let accepted = listener.accept().await.map(ServerIo);
        Some((accepted, listener))
    })
}

/// An accepted connection as tonic wants it.
pub struct ServerIo(Stream);

impl Connected for ServerIo {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for ServerIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for ServerIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
