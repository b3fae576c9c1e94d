//! A worker that serves: until it is asked to stop, or cannot go on.

use std::sync::Arc;
use std::time::Duration;

use baton_core::net::Listener;
use baton_proto::v1::ModelCard;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::server::Router;

use crate::engine::EngineThread;
use crate::error::Error;
use crate::membership::Membership;
use crate::shell::Shell;

/// How long a worker that stops lets its requests go on.
const DRAIN: Duration = Duration::from_secs(30);
/// How long connections may take to close after that.
const CLOSE: Duration = Duration::from_secs(1);

/// What a running worker owns.
pub(crate) struct Parts {
    pub(crate) address: String,
    pub(crate) engine: EngineThread,
    pub(crate) membership: Membership,
    pub(crate) listener: Box<dyn Listener>,
    pub(crate) card: ModelCard,
}

/// A serving worker. Dropping it ends everything at once; `stop` lets its requests finish.
pub struct Running {
    address: String,
    shell: Arc<Shell>,
    server: JoinSet<Result<(), tonic::transport::Error>>,
    shut: Option<oneshot::Sender<()>>,
    membership: Option<Membership>,
    engine: Option<EngineThread>,
}

impl Running {
    pub(crate) fn serve(
        shell: Arc<Shell>,
        parts: Parts,
        router: Router,
        shut: oneshot::Sender<()>,
        shutdown: oneshot::Receiver<()>,
    ) -> Running {
        let Parts { address, engine, membership, listener, .. } = parts;
        let connections = baton_proto::incoming(listener);
        let mut server = JoinSet::new();
        server.spawn(router.serve_with_incoming_shutdown(connections, async {
            // Dropped or used, both mean the end.
            let _ = shutdown.await;
        }));
        tracing::info!(worker = %shell.id, incarnation = %shell.incarnation, %address, "serving");
        Running { address, shell, server, shut: Some(shut), membership: Some(membership), engine: Some(engine) }
    }

    /// Where others reach the gRPC service.
    pub fn address(&self) -> String {
        self.address.clone()
    }

    pub fn shell(&self) -> &Arc<Shell> {
        &self.shell
    }

    /// Resolves when the worker cannot go on, with the reason; it has stopped serving by then.
    pub async fn stopped(&mut self) -> Result<(), Error> {
        let Some(engine) = &mut self.engine else { return Ok(()) };
        let end = tokio::select! {
            () = self.shell.standing.superseded() => Error::Superseded,
            () = engine.died() => Error::EngineDied,
            ended = self.server.join_next() => match ended {
                Some(Ok(Err(error))) => Error::Server(error),
                _ => Error::ServerEnded,
            },
        };
        self.shell.close();
        self.server.abort_all();
        Err(end)
    }

    /// Takes no more requests, lets those it has finish within bounds, leaves the cluster, and ends.
    pub async fn stop(mut self) {
        self.shell.standing.drain();
        if timeout(DRAIN, self.shell.idle()).await.is_err() {
            tracing::warn!(worker = %self.shell.id, "requests are still running after the drain; they end now");
        }
        self.shell.close();
        if let Some(membership) = self.membership.take() {
            membership.leave().await;
        }
        drop(self.shut.take());
        let _ = timeout(CLOSE, self.server.join_next()).await;
        if let Some(engine) = self.engine.take() {
            // Joining waits for the step that is being computed.
            let _ = tokio::task::spawn_blocking(move || drop(engine)).await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shell.close();
    }
}
