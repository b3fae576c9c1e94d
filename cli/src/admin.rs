//! Asking the coordinators' leader for something: finds it by redirect, and says what it refused.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::RPC_TIMEOUT_MS;
use baton_core::{Refused, Role};
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::{TcpNet, channel, v1};
use clap::Args;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::exit::Failure;
use crate::up::cluster_file::ClusterFile;

/// How long a leader is looked for.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(100);

/// Exit codes of the commands that only ask the leader.
pub(crate) const EXIT_CODES: &str = "Exit codes:
  0  done
  1  no coordinator that leads answered
  2  refused: there is no cluster, or the ledger does not take it";

/// Which cluster is meant.
#[derive(Args, Clone, Debug)]
pub(crate) struct ClusterFlags {
    /// A coordinator; several may be named, one that answers is enough
    #[arg(long = "coordinator", value_name = "HOST:PORT", conflicts_with = "data")]
    coordinators: Vec<String>,
    /// Data directory of a `baton up` on this machine [default: $HOME/.baton]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

impl ClusterFlags {
    /// Addresses to begin with.
    pub(crate) fn coordinators(&self) -> Result<Vec<String>, Failure> {
        if !self.coordinators.is_empty() {
            return Ok(self.coordinators.clone());
        }
        match self.up() {
            Some(file) => Ok(file.addresses(Role::Coordinator)),
            None => Err(Failure::refuse(format!(
                "no cluster runs on {}: name a coordinator with --coordinator, or the directory with --data",
                self.data().display()
            ))),
        }
    }

    /// The running `baton up` that is meant, unless coordinators are named.
    pub(crate) fn up(&self) -> Option<ClusterFile> {
        let file = self.coordinators.is_empty().then(|| ClusterFile::read(&self.data()).ok())?;
        file.filter(ClusterFile::runs)
    }

    fn data(&self) -> PathBuf {
        self.data.clone().unwrap_or_else(crate::surroundings::default_data)
    }
}

/// A client of one coordinator.
pub(crate) type Client = AdminClient<Channel>;

/// An answer of the Admin service: what was asked for, or a refusal.
pub(crate) trait Reply {
    type Answer;
    fn answer(self) -> Option<Result<Self::Answer, v1::Refusal>>;
}

impl Reply for v1::Done {
    type Answer = ();

    fn answer(self) -> Option<Result<(), v1::Refusal>> {
        self.outcome.map(|outcome| match outcome {
            v1::done::Outcome::Done(_) => Ok(()),
            v1::done::Outcome::Refused(refused) => Err(refused),
        })
    }
}

impl Reply for v1::TenantList {
    type Answer = v1::TenantList;

    fn answer(self) -> Option<Result<v1::TenantList, v1::Refusal>> {
        Some(self.refused.clone().map_or(Ok(self), Err))
    }
}

impl Reply for v1::SettingsList {
    type Answer = v1::SettingsList;

    fn answer(self) -> Option<Result<v1::SettingsList, v1::Refusal>> {
        Some(self.refused.clone().map_or(Ok(self), Err))
    }
}

impl Reply for v1::ExplainReply {
    type Answer = v1::ExplainReply;

    fn answer(self) -> Option<Result<v1::ExplainReply, v1::Refusal>> {
        Some(self.refused.clone().map_or(Ok(self), Err))
    }
}

/// Runs a command that only asks.
pub(crate) fn run(asking: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(asking)
}

/// Calls the leader. A call that may have been carried out is repeated, which changes nothing.
///
/// # Errors
/// Exit code 2 with the leader's words if it refuses, 1 if no leader answers within 10 s.
pub(crate) async fn ask<R: Reply, F>(coordinators: &[String], call: impl Fn(Client) -> F) -> Result<R::Answer, Failure>
where
    F: Future<Output = Result<Response<R>, Status>>,
{
    let deadline = Instant::now() + PATIENCE;
    let mut others = coordinators.iter().cycle().cloned();
    let mut leader: Option<String> = None;
    let mut last = "no coordinator was named".to_string();
    while Instant::now() < deadline {
        let Some(address) = leader.take().or_else(|| others.next()) else { break };
        let client = AdminClient::new(channel(Arc::new(TcpNet), &address).map_err(Failure::refused)?);
        match tokio::time::timeout(Duration::from_millis(RPC_TIMEOUT_MS), call(client)).await {
            Err(_) => last = format!("{address} does not answer"),
            Ok(Err(status)) if status.code() == Code::InvalidArgument => return Err(Failure::refuse(status.message())),
            Ok(Err(status)) => last = format!("{address}: {}", status.message()),
            Ok(Ok(reply)) => match reply.into_inner().answer() {
                None => last = format!("{address} answered nothing"),
                Some(Ok(answer)) => return Ok(answer),
                Some(Err(refused)) => match Refused::parse(&refused.reason) {
                    Some(Refused::NotLeader) => {
                        leader = Some(refused.leader_address).filter(|address| !address.is_empty());
                        last = refused.detail;
                    }
                    Some(Refused::Unavailable) => last = refused.detail,
                    _ => return Err(Failure::refuse(refused.detail)),
                },
            },
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(anyhow::anyhow!("not done within {} s: {last}", PATIENCE.as_secs()).into())
}
