//! Clients that ask the coordinators themselves, several for the same request at the same time: to assign it, where it is,
//! and to end it. What they asked and heard, with times, is a history that must be that of one ledger.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Refused, Rng};
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::v1::{self, assign_reply, finish_reply, locate_reply};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use super::World;
use crate::draw::{Purpose, between, chance, rng};
use crate::model;
use crate::net::TurmoilNet;

const REQUESTS: u64 = 2;
const ASKERS: u64 = 2;
const QUESTIONS: u64 = 5;
const FIRST_MS: u64 = 1_400;
/// A question that is not answered by then may have been heard or not.
const CALL: Duration = Duration::from_millis(1_200);
/// Coordinators asked before the outcome of a question is left open.
const TRIES_MAX: usize = 4;
/// Whose requests these are; it has no limits.
const TENANT: &str = "askers";
/// Longer than any run.
const DEADLINE_MS: u64 = 600_000;

/// A question and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub request: u64,
    pub what: Question,
    pub at: Duration,
    /// None: whether it was heard is unknown.
    pub answer: Option<(Duration, Answer)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    Assign { attempt: u32 },
    Locate,
    Finish,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Assigned {
        epoch: u64,
    },
    /// Not open: not yet, or not any more.
    Unknown,
    Ended,
}

/// Asks until `healed`, and then ends every request.
pub async fn run(world: World, healed: watch::Receiver<bool>) {
    let mut askers = JoinSet::new();
    for (request, asker) in (0..REQUESTS).flat_map(|request| (0..ASKERS).map(move |asker| (request, asker))) {
        let asking =
            Asking { world: world.clone(), request, rng: rng(world.seed, Purpose::Asks, request * ASKERS + asker) };
        let healed = healed.clone();
        askers.spawn(asking.live(asker, healed));
    }
    while askers.join_next().await.is_some() {}
}

struct Asking {
    world: World,
    request: u64,
    rng: Rng,
}

impl Asking {
    async fn live(mut self, asker: u64, mut healed: watch::Receiver<bool>) {
        sleep(Duration::from_millis(between(&mut self.rng, FIRST_MS, FIRST_MS + 400))).await;
        let mut attempt = 1;
        for number in 0..QUESTIONS {
            let what = match number {
                1.. if chance(&mut self.rng, 40) => Question::Locate,
                _ => Question::Assign { attempt },
            };
            self.ask(what).await;
            attempt += u32::from(chance(&mut self.rng, 30));
            sleep(Duration::from_millis(between(&mut self.rng, 1, 1_500))).await;
        }
        if asker > 0 {
            return;
        }
        let _ = healed.wait_for(|healed| *healed).await;
        while !self.ask(Question::Finish).await {
            sleep(Duration::from_millis(100)).await;
        }
        self.ask(Question::Locate).await;
    }

    /// True when there was an answer.
    async fn ask(&mut self, what: Question) -> bool {
        let at = self.world.record.now();
        let number = {
            let mut history = self.world.history();
            history.push(Asked { request: self.request, what, at, answer: None });
            history.len() - 1
        };
        let addresses = self.world.coordinator_addresses();
        let first = self.rng.below(addresses.len() as u64) as usize;
        for turn in 0..TRIES_MAX {
            let address = &addresses[(first + turn) % addresses.len()];
            if let Ok(Some(answer)) = timeout(CALL, self.ask_one(address, what)).await {
                self.world.history()[number].answer = Some((self.world.record.now(), answer));
                return true;
            }
            sleep(Duration::from_millis(between(&mut self.rng, 5, 60))).await;
        }
        false
    }

    /// None: refused, or not heard as far as one can tell.
    async fn ask_one(&self, address: &str, what: Question) -> Option<Answer> {
        let channel = baton_proto::channel(Arc::new(TurmoilNet), address).ok()?;
        let client = CoordinatorClient::new(channel);
        match what {
            Question::Assign { attempt } => self.assign(client, attempt).await,
            Question::Locate => self.locate(client).await,
            Question::Finish => self.finish(client).await,
        }
    }

    fn name(&self) -> String {
        baton_core::RequestId(u128::from(self.request) + 1).to_string()
    }

    async fn assign(&self, mut client: CoordinatorClient<Channel>, attempt: u32) -> Option<Answer> {
        let question = v1::AssignRequest {
            request: self.name(),
            attempt,
            tenant: TENANT.to_string(),
            model: model::NAME.to_string(),
            prompt_tokens: 8,
            tokens_max: 8,
            choices: 1,
            deadline_ms: DEADLINE_MS,
            ..v1::AssignRequest::default()
        };
        match client.assign(question).await.ok()?.into_inner().outcome? {
            assign_reply::Outcome::Assignment(assignment) => Some(Answer::Assigned { epoch: assignment.epoch }),
            assign_reply::Outcome::Refused(_) => None,
        }
    }

    async fn locate(&self, mut client: CoordinatorClient<Channel>) -> Option<Answer> {
        let (request, tenant) = (self.name(), TENANT.to_string());
        let question = v1::LocateRequest { request, tenant, ..v1::LocateRequest::default() };
        match client.locate(question).await.ok()?.into_inner().outcome? {
            locate_reply::Outcome::Assignment(assignment) => Some(Answer::Assigned { epoch: assignment.epoch }),
            locate_reply::Outcome::Refused(refusal) => {
                (baton_proto::convert::refused(&refusal) == Refused::Unknown).then_some(Answer::Unknown)
            }
        }
    }

    async fn finish(&self, mut client: CoordinatorClient<Channel>) -> Option<Answer> {
        // Epoch 0 ends it whatever the ledger has made of it.
        let outcome = "cancelled".to_string();
        let end = v1::FinishedRequest { request: self.name(), outcome, ..v1::FinishedRequest::default() };
        match client
            .finish(v1::FinishRequest { requests: vec![end], ..Default::default() })
            .await
            .ok()?
            .into_inner()
            .outcome?
        {
            finish_reply::Outcome::Finished(_) => Some(Answer::Ended),
            finish_reply::Outcome::Refused(_) => None,
        }
    }
}
