//! Calls to the coordinators: a list of addresses, of which one leads. A call goes to the last known leader, follows
//! redirects and tries the others; every attempt has the RPC deadline. The list follows the cluster's membership; the
//! configured addresses stay known.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use baton_core::{Net, Refused, limits};
use baton_proto::channel::BadAddress;
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::{convert, v1};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Response, Status};

pub(crate) type Client = CoordinatorClient<Channel>;

const RPC_TIMEOUT: Duration = Duration::from_millis(limits::RPC_TIMEOUT_MS);
/// Coordinators of a cluster, and addresses that redirects may add beyond the configured ones.
const MEMBERS_MAX: usize = 16;

/// An answer that is not the outcome asked for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub(crate) struct Refusal {
    pub reason: Refused,
    pub detail: String,
    pub retry_after_ms: u64,
    /// How much later each further client that is refused should come again; 0: not known.
    pub retry_step_us: u64,
    /// The question had been asked before, and whoever heard it then may still do what it asks for.
    pub unsettled: bool,
}

impl Refusal {
    pub(crate) fn unavailable(detail: impl Into<String>) -> Refusal {
        let (reason, detail) = (Refused::Unavailable, detail.into());
        Refusal { reason, detail, retry_after_ms: 0, retry_step_us: 0, unsettled: true }
    }
}

impl From<v1::Refusal> for Refusal {
    fn from(r: v1::Refusal) -> Refusal {
        let reason = convert::refused(&r);
        let unsettled = matches!(reason, Refused::Unavailable | Refused::NotLeader);
        let (retry_after_ms, retry_step_us) = (r.retry_after_ms, r.retry_step_us);
        Refusal { reason, detail: r.detail, retry_after_ms, retry_step_us, unsettled }
    }
}

/// The coordinators of the cluster.
pub(crate) struct Coordinators {
    net: Arc<dyn Net>,
    configured: Vec<String>,
    /// All of them as of now, as the leader told last; empty before that.
    members: watch::Sender<Vec<String>>,
    /// Who leads, as the cluster's view shows it.
    shown_leader: watch::Sender<Option<String>>,
    /// Name of the cluster that this process is of, once it is known; coordinators of another one refuse it.
    cluster: OnceLock<String>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    clients: BTreeMap<String, Client>,
    leader: Option<String>,
}

impl Coordinators {
    pub(crate) fn new(net: Arc<dyn Net>, addresses: &[String]) -> Result<Coordinators, BadAddress> {
        let clients = addresses.iter().map(|a| Ok((a.clone(), client(&net, a)?)));
        let clients = clients.collect::<Result<_, BadAddress>>()?;
        let state = Mutex::new(State { clients, leader: None });
        let (members, shown_leader) = (watch::Sender::default(), watch::Sender::default());
        Ok(Coordinators { net, configured: addresses.to_vec(), members, shown_leader, cluster: OnceLock::new(), state })
    }

    /// Name of the cluster that this process is of; empty: it is not known yet.
    pub(crate) fn cluster(&self) -> String {
        self.cluster.get().cloned().unwrap_or_default()
    }

    /// The first cluster that a process hears of is the one it stays in.
    pub(crate) fn belong(&self, cluster: &str) {
        if !cluster.is_empty() && self.cluster.set(cluster.to_string()).is_ok() {
            tracing::info!(cluster, "belongs to");
        }
    }

    /// The members of the cluster, then what is configured besides.
    pub(crate) fn addresses(&self) -> Vec<String> {
        let mut addresses = self.members.borrow().clone();
        let others: Vec<&String> = self.configured.iter().filter(|a| !addresses.contains(a)).collect();
        addresses.extend(others.into_iter().cloned().collect::<Vec<_>>());
        addresses
    }

    /// Takes in the list of all coordinators.
    pub(crate) fn learn(&self, members: Vec<String>) {
        if members.is_empty() || members.len() > MEMBERS_MAX || *self.members.borrow() == members {
            return;
        }
        tracing::info!(coordinators = members.join(" "), "coordinators known");
        self.members.send_replace(members);
        let addresses = self.addresses();
        self.lock().clients.retain(|address, _| addresses.contains(address));
    }

    /// Changes of the list of all coordinators.
    pub(crate) fn watch_members(&self) -> watch::Receiver<Vec<String>> {
        self.members.subscribe()
    }

    /// The cluster's view shows who leads.
    pub(crate) fn show_leader(&self, address: Option<&str>) {
        self.shown_leader.send_if_modified(|shown| {
            let changed = address.is_some() && shown.as_deref() != address;
            if changed {
                *shown = address.map(String::from);
            }
            changed
        });
    }

    /// Changes of the leader that the cluster's view shows.
    pub(crate) fn watch_leader(&self) -> watch::Receiver<Option<String>> {
        self.shown_leader.subscribe()
    }

    /// The client of one coordinator.
    pub(crate) fn client(&self, address: &str) -> Option<Client> {
        let mut state = self.lock();
        if let Some(client) = state.clients.get(address) {
            return Some(client.clone());
        }
        if state.clients.len() >= self.configured.len() + MEMBERS_MAX {
            return None;
        }
        let client = client(&self.net, address).ok()?;
        state.clients.insert(address.to_string(), client.clone());
        Some(client)
    }

    /// Asks the leader where a request is served now.
    pub(crate) async fn locate(&self, request: v1::LocateRequest) -> Result<v1::Assignment, Refusal> {
        let call = |mut client: Client| {
            let request = request.clone();
            async move { client.locate(request).await }
        };
        let outcome = |reply: v1::LocateReply| match reply.outcome {
            Some(v1::locate_reply::Outcome::Assignment(assignment)) => Ok(assignment),
            Some(v1::locate_reply::Outcome::Refused(refusal)) => Err(refusal),
            None => Err(convert::refusal(Refused::Unavailable, "an empty answer")),
        };
        self.ask_leader(call, outcome).await
    }

    /// Tells the leader which requests have ended.
    pub(crate) async fn finish(&self, request: v1::FinishRequest) -> Result<v1::Finished, Refusal> {
        let call = |mut client: Client| {
            let request = request.clone();
            async move { client.finish(request).await }
        };
        let outcome = |reply: v1::FinishReply| match reply.outcome {
            Some(v1::finish_reply::Outcome::Finished(finished)) => Ok(finished),
            Some(v1::finish_reply::Outcome::Refused(refusal)) => Err(refusal),
            None => Err(convert::refusal(Refused::Unavailable, "an empty answer")),
        };
        self.ask_leader(call, outcome).await
    }

    /// Announces this gateway.
    pub(crate) async fn register(&self, request: v1::RegisterRequest) -> Result<v1::Registered, Refusal> {
        let call = |mut client: Client| {
            let request = request.clone();
            async move { client.register(request).await }
        };
        let outcome = |reply: v1::RegisterReply| match reply.outcome {
            Some(v1::register_reply::Outcome::Registered(registered)) => Ok(registered),
            Some(v1::register_reply::Outcome::Refused(refusal)) => Err(refusal),
            None => Err(convert::refusal(Refused::Unavailable, "an empty answer")),
        };
        self.ask_leader(call, outcome).await
    }

    /// One round over the coordinators, the presumed leader first, redirects followed. Refusals that another node would
    /// repeat end it.
    async fn ask_leader<R, T, F>(
        &self,
        call: impl Fn(Client) -> F,
        outcome: impl Fn(R) -> Result<T, v1::Refusal>,
    ) -> Result<T, Refusal>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut queue = self.order();
        let mut last = Refusal::unavailable("no coordinator is configured");
        let mut calls_left = queue.len() + 2;
        while let Some(address) = queue.pop() {
            if calls_left == 0 {
                break;
            }
            calls_left -= 1;
            let Some(client) = self.client(&address) else { continue };
            let refusal = match deadline(call(client)).await.map(&outcome) {
                Ok(Ok(answer)) => {
                    self.led_by(&address);
                    return Ok(answer);
                }
                Ok(Err(refusal)) => refusal,
                Err(status) => {
                    self.forget_leader(&address);
                    last = Refusal::unavailable(format!("coordinator {address}: {}", status.message()));
                    continue;
                }
            };
            let leader = refusal.leader_address.clone();
            last = refusal.into();
            if !matches!(last.reason, Refused::NotLeader | Refused::Unavailable | Refused::Foreign) {
                return Err(last);
            }
            self.forget_leader(&address);
            if !leader.is_empty() && leader != address {
                queue.retain(|a| *a != leader);
                queue.push(leader);
            }
        }
        Err(last)
    }

    /// Addresses to try, the first one last.
    pub(crate) fn order(&self) -> Vec<String> {
        let known = self.lock().leader.clone();
        let leader = known.or_else(|| self.shown_leader.borrow().clone());
        let addresses = self.addresses();
        let others = addresses.into_iter().rev().filter(|a| Some(a) != leader.as_ref());
        others.chain(leader.clone()).collect()
    }

    /// A coordinator has answered as the leader does.
    pub(crate) fn led_by(&self, address: &str) {
        let mut state = self.lock();
        if state.leader.as_deref() != Some(address) {
            state.leader = Some(address.to_string());
        }
    }

    pub(crate) fn forget_leader(&self, address: &str) {
        let mut state = self.lock();
        if state.leader.as_deref() == Some(address) {
            state.leader = None;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn client(net: &Arc<dyn Net>, address: &str) -> Result<Client, BadAddress> {
    let channel = baton_proto::channel(net.clone(), address)?;
    Ok(CoordinatorClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES_MAX))
}

/// An RPC's answer within the deadline that every RPC has.
pub(crate) async fn deadline<R>(call: impl Future<Output = Result<Response<R>, Status>>) -> Result<R, Status> {
    in_time(call).await.map(Response::into_inner)
}

/// What is to be answered as soon as an RPC.
pub(crate) async fn in_time<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded("no answer in time");
    tokio::time::timeout(RPC_TIMEOUT, call).await.map_err(late)?
}
