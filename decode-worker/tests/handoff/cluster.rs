//! Workers of a test.

use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::{AUTONOMY_GRACE_MS, DRAIN_MS};
use baton_core::{Env, Net, Place, Process, Rng, Role, SystemClock, WorkerId};
use baton_engine::{CacheStats, EngineConfig};
use baton_proto::TcpNet;
use baton_worker::testing::{FakeCoordinator, hash_model};
use baton_worker::{Config, LoadedModel, Running};

use crate::gate::{Gate, Gated};

pub(crate) const SIZES: EngineConfig = EngineConfig {
    blocks: 256,
    batch_tokens_max: 16,
    sequences_max: 64,
    queue_max: 64,
    prefix_cache: true,
    draft_tokens_max: 0,
};

/// Polls until `condition` holds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let mut ticks = tokio::time::interval(Duration::from_millis(2));
    for _ in 0..5_000 {
        ticks.tick().await;
        if condition() {
            return;
        }
    }
    panic!("waited in vain until {what}");
}

pub(crate) struct Cluster {
    pub(crate) net: Arc<dyn Net>,
    /// Where decode workers listen for blocks, and what they say about it.
    kv: (&'static str, Option<&'static str>),
    /// Tokens in a block, if not the model's, of prefill and of decode workers.
    block_tokens: [Option<u32>; 2],
    pub(crate) coordinator: FakeCoordinator,
    pub(crate) prefills: Vec<Worker>,
    pub(crate) decodes: Vec<Worker>,
}

/// A worker on a runtime of its own, so that it can die at once.
pub(crate) struct Worker {
    pub(crate) running: Running,
    pub(crate) gate: Gate,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Cluster {
    /// Workers of the hash model.
    pub(crate) async fn start(prefills: usize, decodes: usize) -> Cluster {
        Cluster::of(prefills, decodes, SIZES, hash_model).await
    }

    pub(crate) async fn of(
        prefills: usize,
        decodes: usize,
        sizes: EngineConfig,
        model: impl Fn() -> LoadedModel,
    ) -> Cluster {
        Cluster::over(Arc::new(TcpNet), ("127.0.0.1:0", None), prefills, decodes, sizes, model).await
    }

    /// One worker of each kind, with blocks of so many tokens.
    pub(crate) async fn unlike(block_tokens: [u32; 2]) -> Cluster {
        let (net, kv, counts) = (Arc::new(TcpNet), ("127.0.0.1:0", None), (1, 1));
        Cluster::make(net, kv, block_tokens.map(Some), counts, SIZES, hash_model).await
    }

    pub(crate) async fn over(
        net: Arc<dyn Net>,
        kv: (&'static str, Option<&'static str>),
        prefills: usize,
        decodes: usize,
        sizes: EngineConfig,
        model: impl Fn() -> LoadedModel,
    ) -> Cluster {
        Cluster::make(net, kv, [None; 2], (prefills, decodes), sizes, model).await
    }

    async fn make(
        net: Arc<dyn Net>,
        kv: (&'static str, Option<&'static str>),
        block_tokens: [Option<u32>; 2],
        (prefills, decodes): (usize, usize),
        sizes: EngineConfig,
        model: impl Fn() -> LoadedModel,
    ) -> Cluster {
        let coordinator = FakeCoordinator::start(&net).await.unwrap();
        let mut cluster = Cluster { net, kv, block_tokens, coordinator, prefills: Vec::new(), decodes: Vec::new() };
        for n in 0..prefills {
            let worker = cluster.worker(Role::Prefill, &format!("prefill-{n}"), sizes, model()).await;
            cluster.prefills.push(worker);
        }
        for n in 0..decodes {
            let worker = cluster.worker(Role::Decode, &format!("decode-{n}"), sizes, model()).await;
            cluster.decodes.push(worker);
        }
        cluster
    }

    pub(crate) fn config(&self, role: Role, id: &str, engine: EngineConfig) -> Config {
        Config {
            id: WorkerId(id.into()),
            role,
            listen: "127.0.0.1:0".into(),
            kv_listen: self.kv.0.into(),
            kv_advertise: self.kv.1.map(Into::into),
            cluster: String::new(),
            kv_tickets_required: true,
            kv_link: baton_worker::KvLink::Best,
            kv_tls: None,
            advertise_host: "127.0.0.1".into(),
            coordinators: vec![self.coordinator.address()],
            drain_ms: DRAIN_MS,
            autonomy_ms: AUTONOMY_GRACE_MS,
            kv_pull: true,
            kv_block_tokens: self.block_tokens[usize::from(role == Role::Decode)],
            kv_audit: 1,
            kv_host_bytes: 0,
            kv_disk: None,
            kv_disk_bytes: 0,
            engine,
        }
    }

    pub(crate) fn env(&self) -> Env {
        Env { net: self.net.clone(), clock: Arc::new(SystemClock), rng: Rng::new(7), process: Process::own() }
    }

    async fn worker(&self, role: Role, id: &str, sizes: EngineConfig, model: LoadedModel) -> Worker {
        let gate = Gate::default();
        let backend = Box::new(Gated { backend: model.backend, gate: gate.clone() });
        let (config, env, model) = (self.config(role, id, sizes), self.env(), LoadedModel { backend, ..model });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let started = runtime.spawn(async move {
            match role {
                Role::Prefill => baton_prefill_worker::start(config, model, env).await,
                _ => baton_decode_worker::start(config, model, env).await,
            }
        });
        Worker { running: started.await.unwrap().unwrap(), gate, runtime: Some(runtime) }
    }

    pub(crate) fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.prefills.iter().chain(&self.decodes)
    }

    /// Waits until no block of any worker is used or in flight.
    pub(crate) async fn is_clean(&self) {
        for worker in self.workers() {
            let id = &worker.running.shell().id;
            eventually(&format!("{id} holds no block"), || is_free(worker.stats())).await;
        }
    }
}

fn is_free(stats: CacheStats) -> bool {
    assert_eq!(stats.free + stats.used + stats.in_flight + stats.cached, stats.total);
    stats.used == 0 && stats.in_flight == 0
}

impl Worker {
    pub(crate) fn place(&self) -> Place {
        let shell = self.running.shell();
        Place { worker: shell.id.clone(), incarnation: shell.incarnation, address: self.running.address() }
    }

    pub(crate) fn stats(&self) -> CacheStats {
        self.running.shell().engine.cache().stats()
    }

    /// Ends all its tasks and connections without a word.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.gate.open();
        self.kill();
    }
}
