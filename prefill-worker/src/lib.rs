//! Serves Prefill: computes a request's blocks, hands them off layer by layer, and samples the first tokens.
#![forbid(unsafe_code)]

mod handoff;
mod service;

use baton_core::{Env, Role};
use baton_proto::v1::prefill_server::PrefillServer;
use baton_worker::{Config, LoadedModel};
use tonic::service::Routes;

pub use baton_worker::{Error, Running, StartError};

/// Starts a prefill worker; it is registered and serves when this returns.
pub async fn start(config: Config, model: LoadedModel, env: Env) -> Result<Running, StartError> {
    let opened = baton_worker::open(Role::Prefill, config, model, env).await?;
    let joined = opened.join().await?;
    let service = service::Prefills { shell: joined.shell().clone() };
    Ok(joined.serve(Routes::new(PrefillServer::new(service))))
}
