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
use baton_proto::v1::decode_server::DecodeServer;
use baton_worker::{Config, LoadedModel, Shell};
use tonic::service::Routes;

pub use baton_worker::{Error, Running, StartError};

use crate::kept::Keeper;
use crate::prefills::Prefills;

/// What all streams of a decode worker share.
pub(crate) struct Decode {
    shell: Arc<Shell>,
    prefills: Prefills,
    keeper: Keeper,
}

/// Starts a decode worker; it is registered and serves when this returns.
pub async fn start(config: Config, model: LoadedModel, env: Env) -> Result<Running, StartError> {
    let opened = baton_worker::open(Role::Decode, config, model, env).await?;
    let net = opened.net.clone();
    let joined = opened.join().await?;
    let (shell, prefills, keeper) = (joined.shell().clone(), Prefills::new(net), Keeper::default());
    let decode = Decode { shell, prefills, keeper };
    let service = DecodeServer::new(stream::Streams(Arc::new(decode))).max_decoding_message_size(MESSAGE_BYTES_MAX);
    Ok(joined.serve(Routes::new(service)))
}
