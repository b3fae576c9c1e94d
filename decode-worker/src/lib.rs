//! Serves Generate: brings a request's blocks here, from a prefill worker or by computing them, and streams its tokens.
//! Retries nothing: what fails goes up as a typed abort, and the gateway asks for another assignment.
#![forbid(unsafe_code)]

mod answers;
mod handoff;
mod kept;
mod outlive;
mod prefills;
mod request;
mod stream;

use std::sync::Arc;

use baton_core::limits::MESSAGE_BYTES_MAX;
use baton_core::{Env, Role};
use baton_kvtransfer::Receiver;
use baton_proto::v1::decode_server::DecodeServer;
use baton_worker::{Config, LoadedModel, Shell};
use tonic::service::Routes;

pub use baton_worker::{Error, Running, StartError};

use crate::kept::Keeper;
use crate::prefills::Prefills;

/// What all streams of a decode worker share.
pub(crate) struct Decode {
    shell: Arc<Shell>,
    receiver: Receiver,
    /// Where prefill workers reach the receiver.
    kv_address: String,
    prefills: Prefills,
    keeper: Keeper,
}

/// Starts a decode worker; it is registered and serves when this returns.
pub async fn start(config: Config, model: LoadedModel, env: Env) -> Result<Running, StartError> {
    let opened = baton_worker::open(Role::Decode, config, model, env).await?;
    let arena = opened.engine().cache().arena().clone();
    let (net, numerics) = (opened.net.clone(), opened.spec.numerics.0.clone());
    let listen = &opened.config.kv_listen;
    let receiver = Receiver::listen(net.clone(), listen, arena, &numerics).await;
    let receiver = receiver.map_err(|source| StartError::Listen { address: listen.clone(), source })?;
    receiver.issue_tickets(opened.secret(), opened.config.kv_tickets_required);
    let kv_advertise = opened.config.kv_advertise.clone();
    let kv_address = kv_advertise.unwrap_or_else(|| opened.config.advertised(&receiver.address()));
    let joined = opened.join().await?;
    let (shell, prefills, keeper) = (joined.shell().clone(), Prefills::new(net), Keeper::default());
    let decode = Decode { shell, receiver, kv_address, prefills, keeper };
    let service = DecodeServer::new(stream::Streams(Arc::new(decode))).max_decoding_message_size(MESSAGE_BYTES_MAX);
    Ok(joined.serve(Routes::new(service)))
}
