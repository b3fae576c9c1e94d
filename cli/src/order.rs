//! `baton drain` and `baton role`: orders for one worker, and waiting until it has done them.

use std::sync::Arc;
use std::time::Duration;

use baton_core::Role;
use baton_core::limits::RPC_TIMEOUT_MS;
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::v1::{ClusterView, MemberView, Order, OrderRequest, WatchRequest};
use baton_proto::{TcpNet, channel};
use clap::{Args, ValueEnum};
use tokio::time::{Instant, sleep, timeout};

use crate::admin::{self, ClusterFlags};
use crate::exit::Failure;
use crate::out::sayln;

const RPC_TIMEOUT: Duration = Duration::from_millis(RPC_TIMEOUT_MS);
const RETRY: Duration = Duration::from_millis(50);
/// How long a worker may take to do as ordered; its own bound on draining is far below.
const DONE_MAX: Duration = Duration::from_secs(900);

/// Let a worker finish what it has, and end.
///
/// It takes no more requests. What runs goes on for the worker's --drain-ms; what is left then goes on at other workers, with the
/// same bytes. When nobody reads its blocks any more the worker leaves the cluster and its process ends with code 0; `baton up`
/// does not start it again.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes:\n  0  the worker is gone (with --no-wait: ordered to go)\n  1  it is not gone yet, or no coordinator leads\n  2  there is no such worker or no such cluster"
)]
pub(crate) struct DrainFlags {
    /// The worker's id, as `baton status` shows it
    worker: String,
    #[command(flatten)]
    cluster: ClusterFlags,
    /// Do not wait until it is gone
    #[arg(long)]
    no_wait: bool,
}

/// Let a worker serve the other role.
///
/// It drains as with `baton drain`, leaves, and joins again in the other role, in the same process, under the same id and without
/// loading its weights again.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes:\n  0  the worker serves in that role (with --no-wait: ordered to)\n  1  it does not yet, or no coordinator leads\n  2  there is no such worker or no such cluster"
)]
pub(crate) struct ChangeFlags {
    /// The worker's id, as `baton status` shows it
    worker: String,
    /// The role it shall serve
    role: WorkerRole,
    #[command(flatten)]
    cluster: ClusterFlags,
    /// Do not wait until it serves
    #[arg(long)]
    no_wait: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WorkerRole {
    Prefill,
    Decode,
}

impl WorkerRole {
    fn role(self) -> Role {
        match self {
            WorkerRole::Prefill => Role::Prefill,
            WorkerRole::Decode => Role::Decode,
        }
    }

    fn order(self) -> Order {
        match self {
            WorkerRole::Prefill => Order::BecomePrefill,
            WorkerRole::Decode => Order::BecomeDecode,
        }
    }
}

pub(crate) fn drain(flags: DrainFlags) -> Result<(), Failure> {
    admin::run(async {
        let (since, worker) = (Instant::now(), flags.worker.as_str());
        let coordinators = flags.cluster.coordinators()?;
        let life = life(&look(&coordinators).await?, worker)?;
        order(&coordinators, worker, Order::Drain).await?;
        if flags.no_wait {
            sayln!("{worker} drains");
            return Ok(());
        }
        until(&coordinators, worker, |view| view.is_none_or(|view| !view.live || incarnation(view) != life)).await?;
        until_ended(&flags.cluster, worker).await?;
        sayln!("{worker} is gone after {:.2} s", since.elapsed().as_secs_f64());
        Ok(())
    })
}

pub(crate) fn change(flags: ChangeFlags) -> Result<(), Failure> {
    admin::run(async {
        let (since, worker, role) = (Instant::now(), flags.worker.as_str(), flags.role.role());
        let coordinators = flags.cluster.coordinators()?;
        let view = look(&coordinators).await?;
        let life = life(&view, worker)?;
        if find(&view, worker).is_some_and(|view| role_of(view) == Some(role)) {
            sayln!("{worker} serves as {role} already");
            return Ok(());
        }
        order(&coordinators, worker, flags.role.order()).await?;
        if flags.no_wait {
            sayln!("{worker} becomes {role}");
            return Ok(());
        }
        let serves = |view: &MemberView| view.live && incarnation(view) != life && role_of(view) == Some(role);
        until(&coordinators, worker, |view| view.is_some_and(serves)).await?;
        sayln!("{worker} serves as {role} after {:.2} s", since.elapsed().as_secs_f64());
        Ok(())
    })
}

/// Gives an order to the leader, whichever of the coordinators that is.
pub(crate) async fn order(coordinators: &[String], worker: &str, order: Order) -> Result<(), Failure> {
    let request = OrderRequest { worker: worker.to_string(), order: order.into() };
    let call = |mut client: admin::Client| {
        let request = request.clone();
        async move { client.order_worker(request).await }
    };
    admin::ask(coordinators, call).await
}

/// The first coordinator's view that can be had.
async fn look(coordinators: &[String]) -> Result<ClusterView, Failure> {
    for address in coordinators {
        let asked = timeout(RPC_TIMEOUT, async {
            let mut client = CoordinatorClient::new(channel(Arc::new(TcpNet), address)?);
            let view = client.watch(WatchRequest::default()).await?.into_inner().message().await?;
            anyhow::Ok(view)
        });
        if let Ok(Ok(Some(view))) = asked.await {
            return Ok(view);
        }
    }
    Err(anyhow::anyhow!("no coordinator answers at {}", coordinators.join(", ")).into())
}

/// Looks again and again until what is seen of the worker satisfies `done`; says on the way what it still has to do.
async fn until(
    coordinators: &[String],
    worker: &str,
    done: impl Fn(Option<&MemberView>) -> bool,
) -> Result<(), Failure> {
    let deadline = Instant::now() + DONE_MAX;
    let mut said = String::new();
    while Instant::now() < deadline {
        // A view that cannot be had now can be had later.
        if let Ok(view) = look(coordinators).await {
            let member = find(&view, worker);
            if done(member) {
                return Ok(());
            }
            let line = member.map(progress).unwrap_or_default();
            if line != said {
                eprintln!("{worker}: {line}");
                said = line;
            }
        }
        sleep(RETRY).await;
    }
    Err(anyhow::anyhow!("{worker} has not done as ordered within {} s", DONE_MAX.as_secs()).into())
}

/// Waits until the process of a worker that has left the cluster is gone too, where a `baton up` on this machine says so.
async fn until_ended(cluster: &ClusterFlags, worker: &str) -> Result<(), Failure> {
    let deadline = Instant::now() + DONE_MAX;
    while cluster.up().is_some_and(|file| file.processes.iter().any(|process| process.id == worker)) {
        if Instant::now() >= deadline {
            let after = DONE_MAX.as_secs();
            return Err(anyhow::anyhow!("{worker} has left the cluster, but its process runs after {after} s").into());
        }
        sleep(RETRY).await;
    }
    Ok(())
}

fn progress(view: &MemberView) -> String {
    let load = view.load.clone().unwrap_or_default();
    let held = load.blocks_used + load.blocks_in_flight;
    let state = if load.draining { "drains" } else { "serves" };
    format!("{state}, {} running, {} waiting, {held} blocks held", load.sequences_running, load.sequences_waiting)
}

fn find<'a>(view: &'a ClusterView, worker: &str) -> Option<&'a MemberView> {
    view.members.iter().find(|view| view.member.as_ref().is_some_and(|member| member.id == worker))
}

fn incarnation(view: &MemberView) -> u64 {
    view.member.as_ref().map_or(0, |member| member.incarnation)
}

fn role_of(view: &MemberView) -> Option<Role> {
    view.member.as_ref().and_then(|member| Role::try_from(member.role()).ok())
}

/// The life of a worker that is there, or a refusal that names those that are.
fn life(view: &ClusterView, worker: &str) -> Result<u64, Failure> {
    let is_worker = |view: &&MemberView| view.live && matches!(role_of(view), Some(Role::Prefill | Role::Decode));
    if let Some(view) = find(view, worker).filter(is_worker) {
        return Ok(incarnation(view));
    }
    let live = view.members.iter().filter(is_worker).filter_map(|view| Some(view.member.as_ref()?.id.as_str()));
    let live: Vec<_> = live.collect();
    Err(Failure::refuse(format!("no live worker is called {worker:?}; there are: {}", live.join(", "))))
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::{self, Member};

    use super::*;

    fn view() -> ClusterView {
        let member = |id: &str, role: v1::Role, live| MemberView {
            member: Some(Member { id: id.into(), role: role.into(), incarnation: 7, ..Member::default() }),
            live,
            ..MemberView::default()
        };
        let members = vec![
            member("decode-0", v1::Role::Decode, true),
            member("decode-1", v1::Role::Decode, false),
            member("gateway-0", v1::Role::Gateway, true),
        ];
        ClusterView { members, ..ClusterView::default() }
    }

    #[test]
    fn only_live_workers_are_ordered() {
        assert_eq!(life(&view(), "decode-0").ok(), Some(7));
        for other in ["decode-1", "gateway-0", "decode-9"] {
            let refused = life(&view(), other).unwrap_err();
            assert_eq!(refused.code, crate::exit::REFUSED);
            assert!(refused.to_string().ends_with("there are: decode-0"), "{refused}");
        }
    }
}
