//! Asking the leading coordinator for something an operator wants: who the coordinators are, redirects, patience.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_core::{Refused, Role};
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::{Done, Refusal, done};
use baton_proto::{TcpNet, channel, convert};
use clap::Args;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::exit::Failure;

/// Longest wait for one answer.
const CALL_MAX: Duration = Duration::from_secs(2);
/// Longest wait for a leader: an election is shorter.
const LEADER_MAX: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);

/// Exit codes of the commands that ask the leader.
pub(crate) const EXIT_CODES: &str = "Exit codes:
  0  done
  1  no coordinator that leads answered
  2  refused: there is no cluster, or the ledger does not take it";

/// Which cluster is meant.
#[derive(Args, Clone, Debug)]
pub(crate) struct ClusterFlags {
    /// Data directory of a `baton up` on this machine [default: $HOME/.baton]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// A coordinator's address; the leader is found through it
    #[arg(long = "coordinator", value_name = "HOST:PORT", conflicts_with = "data")]
    coordinators: Vec<String>,
}

pub(crate) type Client = AdminClient<Channel>;

/// The coordinators of a cluster.
pub(crate) struct Admin {
    coordinators: Vec<String>,
}

impl ClusterFlags {
    /// The coordinators named, or those of the cluster on this machine.
    pub(crate) fn admin(&self) -> Result<Admin, Failure> {
        if !self.coordinators.is_empty() {
            return Ok(Admin { coordinators: self.coordinators.clone() });
        }
        let data = self.data.clone().unwrap_or_else(crate::surroundings::default_data);
        let coordinators = crate::status::read(&data)?.addresses(Role::Coordinator);
        Ok(Admin { coordinators })
    }
}

impl Admin {
    /// Asks the leader, over redirects and elections; `outcome` tells an answer from a refusal.
    pub(crate) async fn ask<R, T, F>(
        &self,
        call: impl Fn(Client) -> F,
        outcome: impl Fn(R) -> Result<T, Refusal>,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let until = Instant::now() + LEADER_MAX;
        let mut queue: Vec<String> = self.coordinators.clone();
        let mut last = String::from("no coordinator is known");
        while Instant::now() < until {
            let Some(address) = queue.pop() else {
                tokio::time::sleep(PAUSE).await;
                queue = self.coordinators.iter().rev().cloned().collect();
                continue;
            };
            let channel = channel(Arc::new(TcpNet), &address).map_err(Failure::refused)?;
            let refusal = match timeout(CALL_MAX, call(AdminClient::new(channel))).await {
                Ok(Ok(response)) => match outcome(response.into_inner()) {
                    Ok(answer) => return Ok(answer),
                    Err(refusal) => refusal,
                },
                Ok(Err(status)) if status.code() == tonic::Code::InvalidArgument => {
                    return Err(Failure::refuse(status.message()));
                }
                Ok(Err(status)) => {
                    last = format!("{address}: {}", status.message());
                    continue;
                }
                Err(_) => {
                    last = format!("{address} does not answer");
                    continue;
                }
            };
            match convert::refused(&refusal) {
                Refused::NotLeader | Refused::Unavailable => last = format!("{address}: {}", refusal.detail),
                _ => return Err(Failure::refuse(refusal.detail)),
            }
            if !refusal.leader_address.is_empty() && refusal.leader_address != address {
                queue.push(refusal.leader_address);
            }
        }
        Err(anyhow::anyhow!("no coordinator that leads answered within {} s ({last})", LEADER_MAX.as_secs()).into())
    }

    /// Asks for something that is done or refused.
    pub(crate) async fn order<F>(&self, call: impl Fn(Client) -> F) -> Result<(), Failure>
    where
        F: Future<Output = Result<Response<Done>, Status>>,
    {
        let outcome = |done: Done| match done.outcome {
            Some(done::Outcome::Done(_)) => Ok(()),
            Some(done::Outcome::Refused(refusal)) => Err(refusal),
            None => Err(convert::refusal(Refused::Unavailable, "an empty answer")),
        };
        self.ask(call, outcome).await
    }
}

/// Runs a command that only asks.
pub(crate) fn run(asking: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(asking)
}
