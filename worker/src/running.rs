//! A life of a worker that serves: until it is asked to end, the cluster ends it, or it cannot go on. Model and backend
//! outlive it.

use std::sync::Arc;
use std::time::Duration;

use baton_core::Role;
use baton_core::limits::{HANDOFF_IDLE_MS, HANDOFF_QUIESCE_MS};
use baton_core::net::Listener;
use baton_proto::server::Bound;
use baton_proto::v1::ModelCard;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tonic::service::Routes;

use crate::card::LoadedModel;
use crate::engine::EngineThread;
use crate::error::Error;
use crate::membership::Membership;
use crate::metrics;
use crate::shell::Shell;
use crate::standing::Ending;
use crate::tiers::Tiers;

/// How long requests may take to end after they have been told to.
const EVICT: Duration = Duration::from_secs(5);
/// How long others may still read blocks after the last request has ended; a handoff that was given up is quiet by then.
const UNREAD: Duration = Duration::from_millis(HANDOFF_IDLE_MS + HANDOFF_QUIESCE_MS);
/// How long connections may take to close after that.
const CLOSE: Duration = Duration::from_secs(1);
/// Far more than a cluster has processes.
const BOUND: Bound = Bound { connections_max: 16_384, full: metrics::connections_full };

/// What a running worker owns.
pub(crate) struct Parts {
    pub(crate) address: String,
    pub(crate) role: Role,
    pub(crate) cluster: String,
    pub(crate) engine: EngineThread,
    pub(crate) tiers: Option<Arc<Tiers>>,
    pub(crate) membership: Membership,
    pub(crate) listener: Box<dyn Listener>,
    pub(crate) card: ModelCard,
    /// How long requests may go on when the worker drains.
    pub(crate) drain: Duration,
}

/// What is left of a life that has ended: enough to begin another one without loading the model again.
pub struct Left {
    pub model: LoadedModel,
    /// The coordinators as last heard.
    pub coordinators: Vec<String>,
    /// The cluster that the life was in.
    pub cluster: String,
}

/// A serving worker. Dropping it ends everything at once; `stop` lets its requests finish.
pub struct Running {
    address: String,
    shell: Arc<Shell>,
    server: JoinSet<()>,
    shut: Option<oneshot::Sender<()>>,
    role: Role,
    cluster: String,
    card: ModelCard,
    drain: Duration,
    membership: Option<Membership>,
    engine: Option<EngineThread>,
    tiers: Option<Arc<Tiers>>,
}

impl Running {
    pub(crate) fn serve(
        shell: Arc<Shell>,
        parts: Parts,
        services: Routes,
        shut: oneshot::Sender<()>,
        shutdown: oneshot::Receiver<()>,
    ) -> Running {
        let Parts { address, role, cluster, engine, tiers, membership, listener, card, drain } = parts;
        // Dropped or used, both mean the end.
        let stopped = async { drop(shutdown.await) };
        let mut server = JoinSet::new();
        server.spawn(baton_proto::server::serve(listener, BOUND, services, stopped));
        tracing::info!(worker = %shell.id, incarnation = %shell.incarnation, %address, "serving");
        let (shut, membership, engine) = (Some(shut), Some(membership), Some(engine));
        Running { address, shell, server, shut, role, cluster, card, drain, membership, engine, tiers }
    }

    /// Where others reach the gRPC service.
    pub fn address(&self) -> String {
        self.address.clone()
    }

    pub fn shell(&self) -> &Arc<Shell> {
        &self.shell
    }

    /// Resolves when this life is to end: with what is to follow, or with the reason why nothing can. What is fenced or
    /// has failed has stopped serving by then; what was ordered to end serves until `end`.
    pub async fn ending(&mut self) -> Result<Ending, Error> {
        let Some(engine) = &mut self.engine else { return Err(Error::EngineDied) };
        let standing = &self.shell.standing;
        let ending = tokio::select! {
            () = standing.superseded() => Err(Error::Superseded),
            ending = standing.ending() => Ok(ending),
            () = standing.alone(self.shell.autonomy) => Ok(Ending::Alone),
            () = engine.died() => Err(Error::EngineDied),
            _ = self.server.join_next() => Err(Error::ServerEnded),
        };
        if !matches!(ending, Ok(Ending::Drained | Ending::Becomes(_))) {
            self.shell.close();
        }
        if ending.is_err() {
            self.server.abort_all();
        }
        ending
    }

    /// Ends this life. An ordered end takes no more requests, lets those it has finish within bounds, gives the rest
    /// back to their gateways, and leaves the cluster; any other one drops everything.
    pub async fn end(mut self, ending: Ending) -> Result<Left, Error> {
        let (worker, since) = (self.shell.id.clone(), Instant::now());
        let orderly = matches!(ending, Ending::Drained | Ending::Becomes(_));
        metrics::count_ending(ending.as_str());
        if orderly {
            tokio::select! {
                () = self.drained() => {}
                // Whoever is fenced meanwhile has nothing to wait for.
                () = self.shell.standing.over() => {}
            }
        }
        self.shell.close();
        let coordinators = self.membership.as_ref().map(Membership::coordinators).unwrap_or_default();
        if let Some(membership) = self.membership.take().filter(|_| orderly) {
            membership.leave().await;
        }
        drop(self.shut.take());
        let _ = timeout(CLOSE, self.server.join_next()).await;
        self.server.abort_all();
        self.shell.receiver().end();
        let engine = self.engine.take().ok_or(Error::EngineDied)?;
        let backend = engine.finish().await?;
        if let Some(tiers) = self.tiers.take() {
            // Off the runtime: it writes. Whatever still holds the shell can recall nothing afterwards.
            let _ = tokio::task::spawn_blocking(move || tiers.close()).await;
        }
        metrics::undescribe(self.role, &self.shell.spec);
        tracing::info!(%worker, ?ending, took_ms = since.elapsed().as_millis() as u64, "this life has ended");
        let mut spec = self.shell.spec.clone();
        // The next life cuts them anew.
        spec.layout.block_tokens = self.shell.units.tokens() as u32;
        let model = LoadedModel { spec, backend, card: self.card.clone() };
        Ok(Left { model, coordinators, cluster: self.cluster.clone() })
    }

    /// Takes no more requests, and waits until none is left and nobody reads a block.
    async fn drained(&self) {
        let shell = &self.shell;
        shell.standing.drain();
        if timeout(self.drain, shell.idle()).await.is_err() {
            tracing::warn!(worker = %shell.id, requests = shell.requests(), "the drain's time is up: they go on elsewhere");
            shell.evict();
            let _ = timeout(EVICT, shell.idle()).await;
        }
        if timeout(UNREAD, shell.engine.unread()).await.is_err() {
            tracing::warn!(worker = %shell.id, "somebody still holds blocks of this worker");
        }
    }

    /// Ends it as a drain does.
    pub async fn stop(self) {
        if let Err(error) = self.end(Ending::Drained).await {
            tracing::error!(%error, "the worker did not end well");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shell.close();
    }
}
