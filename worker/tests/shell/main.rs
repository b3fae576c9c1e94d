//! The shell both workers share, without a role's service: its place in the cluster, and its engine thread.

mod engine;
mod membership;

use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::{AUTONOMY_GRACE_MS, DRAIN_MS, KV_AUDIT};
use baton_core::{Env, Net, Process, Rng, Role, SystemClock, WorkerId};
use baton_engine::EngineConfig;
use baton_proto::TcpNet;
use baton_worker::testing::{FakeCoordinator, hash_model};
use baton_worker::{Config, LoadedModel, Running, StartError};
use tonic::service::Routes;

fn net() -> Arc<dyn Net> {
    Arc::new(TcpNet)
}

fn config(coordinators: &[&FakeCoordinator]) -> Config {
    Config {
        id: WorkerId("prefill-0".into()),
        role: Role::Prefill,
        listen: "127.0.0.1:0".into(),
        kv_listen: "127.0.0.1:0".into(),
        kv_advertise: None,
        cluster: String::new(),
        kv_tickets_required: false,
        kv_link: baton_worker::KvLink::Best,
        kv_tls: None,
        advertise_host: "127.0.0.1".into(),
        coordinators: coordinators.iter().map(|coordinator| coordinator.address()).collect(),
        drain_ms: DRAIN_MS,
        autonomy_ms: AUTONOMY_GRACE_MS,
        kv_pull: true,
        kv_block_tokens: None,
        kv_audit: KV_AUDIT,
        kv_host_bytes: 0,
        kv_disk: None,
        kv_disk_bytes: 0,
        engine: EngineConfig {
            blocks: 64,
            batch_tokens_max: 64,
            sequences_max: 8,
            queue_max: 8,
            prefix_cache: true,
            draft_tokens_max: 0,
        },
    }
}

async fn start_with(config: Config, model: LoadedModel) -> Result<Running, StartError> {
    let env = Env { net: net(), clock: Arc::new(SystemClock), rng: Rng::new(3), process: Process::own() };
    let joined = baton_worker::open(Role::Prefill, config, model, env).await?.join().await?;
    Ok(joined.serve(Routes::default()))
}

async fn start(config: Config) -> Result<Running, StartError> {
    start_with(config, hash_model()).await
}

/// Polls until `condition` holds.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let mut ticks = tokio::time::interval(Duration::from_millis(2));
    for _ in 0..5_000 {
        ticks.tick().await;
        if condition() {
            return;
        }
    }
    panic!("waited in vain until {what}");
}
