//! gRPC over `core::Net`: a lazily connected channel.

use std::sync::Arc;
use std::time::Duration;

use baton_core::net::Net;
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

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
