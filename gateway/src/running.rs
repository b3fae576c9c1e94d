//! A gateway from its start to its stop: the socket, the routes and the tasks beside them.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_core::Env;
use baton_proto::channel::BadAddress;
use baton_proto::convert;
use baton_proto::v1::{Member, Role};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::access::Access;
use crate::cluster::Cluster;
use crate::config::Config;
use crate::coordinators::Coordinators;
use crate::generate::Gateway;
use crate::link::Links;
use crate::prompt::Encoder;
use crate::serve::Servers;
use crate::shed::Shed;
use crate::{access, assign, finish, http, membership, server};

/// How long the start waits to hear whether keys are asked for, where others than this machine's can ask. Until it is
/// known nobody is served.
const ACCESS_WAIT: Duration = Duration::from_secs(5);
/// How long after the start requests wait for what has to be known of the cluster.
const BEGINS_WITHIN: Duration = Duration::from_secs(2);
/// How long open streams may go on after `stop`.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the last ends of requests, and the goodbye, may take.
const FAREWELL: Duration = Duration::from_millis(500);

/// Renders the metrics that `/metrics` shows.
pub type RenderMetrics = Arc<dyn Fn() -> String + Send + Sync>;

/// Why a gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("listen on {address}: {error}")]
    Listen { address: String, error: io::Error },
    #[error(transparent)]
    Coordinator(#[from] BadAddress),
    #[error("no coordinator address is given")]
    NoCoordinators,
    #[error(
        "the cluster has no API keys, and {address} can be reached from other machines; create a key with \
         `baton key create --tenant NAME`, listen on 127.0.0.1, or allow it with --open"
    )]
    Open { address: String },
}

/// A gateway that ended by itself.
#[derive(Debug, thiserror::Error)]
#[error("the gateway's {task} ended: {problem}")]
pub struct Failed {
    task: &'static str,
    problem: String,
}

/// A gateway at work. Dropping it ends it at once.
pub struct Running {
    address: String,
    id: String,
    coordinators: Arc<Coordinators>,
    servers: Arc<Servers>,
    stop: oneshot::Sender<()>,
    /// The HTTP server.
    server: JoinSet<()>,
    /// The view of the cluster and the place in it.
    beside: JoinSet<()>,
    /// The ends of requests on their way to the ledger.
    finisher: JoinSet<()>,
}

/// Starts a gateway; `metrics` renders what `/metrics` shows.
pub async fn start(config: Config, mut env: Env, metrics: RenderMetrics) -> Result<Running, StartError> {
    if config.coordinators.is_empty() {
        return Err(StartError::NoCoordinators);
    }
    let coordinators = Arc::new(Coordinators::new(env.net.clone(), &config.coordinators)?);
    let listener = env.net.listen(&config.listen).await;
    let listener = listener.map_err(|error| StartError::Listen { address: config.listen.clone(), error })?;
    let address = listener.address();
    let id = config.id.clone();
    let links = Arc::new(Links::new(env.net.clone()));
    let cluster = Arc::new(Cluster::new(&env, links.clone(), config.aliases.clone()));
    let access = Arc::new(Access::new(!config.open && !access::is_loopback(&address)));
    let (finishes, queue) = finish::queue();
    let (assigner, asking) = assign::questions();
    let process_key = format!("{:032x}", env.rng.u128());
    let incarnation = 1 + env.rng.below(u64::from(u32::MAX));
    let member = member(&config, &address, incarnation, env.process.id);
    let life = convert::gateway_life(&member);

    let mut beside = JoinSet::new();
    let (followed, following) = (access.clone(), coordinators.clone());
    beside.spawn(async move { followed.watch(&following).await });
    if access.is_open_to_strangers(ACCESS_WAIT).await == Some(true) {
        return Err(StartError::Open { address });
    }
    beside.spawn(asking.run(coordinators.clone()));
    let (watched, watching) = (cluster.clone(), coordinators.clone());
    beside.spawn(async move { watched.watch(&watching).await });
    let (announcer, open) = (coordinators.clone(), links.clone());
    beside.spawn(async move {
        membership::announce(&announcer, member, process_key, || open.open_requests()).await;
    });

    let mut finisher = JoinSet::new();
    finisher.spawn(queue.run(coordinators.clone(), life.clone()));

    let servers = Servers {
        assigner,
        coordinators: coordinators.clone(),
        links,
        finishes,
        shed: Shed::default(),
        gateway: life,
        leaving: AtomicBool::new(false),
    };
    let servers = Arc::new(servers);
    let gateway = Gateway {
        places: Arc::new(Semaphore::new(config.requests_max.min(Semaphore::MAX_PERMITS))),
        config,
        cluster,
        access,
        servers: servers.clone(),
        encoder: Encoder::default(),
        clock: env.clock,
        rng: Mutex::new(env.rng),
        metrics,
        begins_by: Instant::now() + BEGINS_WITHIN,
    };
    let (stop, stopped) = oneshot::channel();
    let mut serving = JoinSet::new();
    let router = http::router(Arc::new(gateway));
    serving.spawn(server::serve(listener, router, async move { drop(stopped.await) }));
    Ok(Running { address, id, coordinators, servers, stop, server: serving, beside, finisher })
}

impl Running {
    /// The HTTP address, with the real port.
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Resolves when the gateway ended by itself, which it does only by failing.
    pub async fn stopped(&mut self) -> Result<(), Failed> {
        let (task, joined) = tokio::select! {
            joined = self.server.join_next() => ("server", joined),
            joined = self.beside.join_next() => ("view of the cluster", joined),
            joined = self.finisher.join_next() => ("finisher", joined),
        };
        let problem = match joined {
            Some(Err(error)) => error.to_string(),
            _ => "unexpectedly".to_string(),
        };
        Err(Failed { task, problem })
    }

    /// Takes no new connection, lets open streams end for a while, tells the ledger, and ends. Resumable streams that have
    /// not ended go on at their workers.
    pub async fn stop(mut self) {
        drop(self.stop);
        if timeout(DRAIN, self.server.join_next()).await.is_err() {
            // Until here a client that leaves ends its request, as ever.
            self.servers.leaving.store(true, Ordering::Relaxed);
            self.server.shutdown().await;
        }
        self.beside.shutdown().await;
        let _told_or_expired = timeout(FAREWELL, self.finisher.join_next()).await;
        let _heard_or_not = timeout(FAREWELL, membership::leave(&self.coordinators, &self.id)).await;
    }
}

fn member(config: &Config, address: &str, incarnation: u64, pid: u32) -> Member {
    Member {
        id: config.id.clone(),
        role: Role::Gateway.into(),
        address: address.to_string(),
        pid,
        incarnation,
        version: env!("CARGO_PKG_VERSION").into(),
        ..Member::default()
    }
}
