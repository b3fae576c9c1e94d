//! Steady work on a group while something is done to it: a worker and a gateway that stay alive, and requests of which
//! every acknowledgement is remembered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::group::{Client, request};
use crate::wait_for;

const BEAT: Duration = Duration::from_millis(100);
/// Every so many requests one stays open.
const OPEN_EVERY: u128 = 10;

/// What was acknowledged.
#[derive(Default)]
pub(crate) struct Acknowledged {
    /// Epoch of each assignment of a request that stays open.
    open: BTreeMap<u128, u64>,
    finished: Vec<u128>,
    /// Longest time between two acknowledged assignments.
    pub(crate) gap: Duration,
}

pub(crate) struct Load {
    addresses: Arc<Mutex<Vec<String>>>,
    acknowledged: Arc<Mutex<Acknowledged>>,
    stop_requests: watch::Sender<bool>,
    stop_beats: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts, and waits for the first acknowledgement.
    pub(crate) async fn start(addresses: &[String]) -> Load {
        let load = Load {
            addresses: Arc::new(Mutex::new(addresses.to_vec())),
            acknowledged: Arc::default(),
            stop_requests: watch::Sender::new(false),
            stop_beats: watch::Sender::new(false),
            tasks: Vec::new(),
        };
        let beats = tokio::spawn(beats(load.addresses.clone(), load.stop_beats.subscribe()));
        let requests = requests(load.addresses.clone(), load.acknowledged.clone(), load.stop_requests.subscribe());
        let load = Load { tasks: vec![tokio::spawn(requests), beats], ..load };
        load.more(1).await;
        load
    }

    /// Waits until so many more requests have been served from begin to end.
    pub(crate) async fn more(&self, count: usize) {
        let before = self.acknowledged.lock().unwrap().finished.len();
        wait_for("requests go on", || async {
            (self.acknowledged.lock().unwrap().finished.len() >= before + count).then_some(())
        })
        .await;
    }

    /// Ends, and checks at these addresses that whatever was acknowledged is still so.
    pub(crate) async fn stop_and_check(mut self, addresses: &[String]) -> Acknowledged {
        // Worker and gateway live on: what belongs to a gateway that has gone silent is ended.
        self.stop_requests.send_replace(true);
        self.tasks.remove(0).await.unwrap();
        let acknowledged = std::mem::take(&mut *self.acknowledged.lock().unwrap());
        assert!(!acknowledged.open.is_empty() && !acknowledged.finished.is_empty());
        for (id, epoch) in &acknowledged.open {
            let again = somewhere(addresses, *id).await.map(|assignment| assignment.epoch);
            assert_eq!(again, Ok(*epoch), "request {id} is open under its epoch");
        }
        for id in &acknowledged.finished {
            assert_eq!(somewhere(addresses, *id).await.map(|a| a.epoch), Err("stale".into()), "request {id} has ended");
        }
        self.stop_beats.send_replace(true);
        self.tasks.remove(0).await.unwrap();
        acknowledged
    }
}

/// The leader's answer to the first attempt of a request.
async fn somewhere(addresses: &[String], id: u128) -> Result<baton_proto::v1::Assignment, String> {
    wait_for("a leader's answer", || async {
        for address in addresses {
            let Ok(reply) = Client::new(address).assign_raw(request(id, 1)).await else { continue };
            match reply.outcome.unwrap() {
                baton_proto::v1::assign_reply::Outcome::Assignment(assignment) => return Some(Ok(assignment)),
                baton_proto::v1::assign_reply::Outcome::Refused(refused) => {
                    if !matches!(refused.reason.as_str(), "not_leader" | "unavailable" | "no_workers") {
                        return Some(Err(refused.reason));
                    }
                }
            }
        }
        None
    })
    .await
}

/// A worker and a gateway that live, at every coordinator; they learn the coordinators from the answers.
async fn beats(addresses: Arc<Mutex<Vec<String>>>, stop: watch::Receiver<bool>) {
    let mut sequence = 0;
    let mut incarnation = 0;
    let mut clients: BTreeMap<String, Client> = BTreeMap::new();
    while !*stop.borrow() {
        sequence += 1;
        let known = addresses.lock().unwrap().clone();
        for address in &known {
            let client = clients.entry(address.clone()).or_insert_with(|| Client::new(address));
            if let Some(given) = client.try_register("decode-0", "k").await {
                incarnation = given;
            }
        }
        for address in &known {
            let client = clients.get_mut(address).unwrap();
            client.try_beat_gateway("g").await;
            if let Some(coordinators) = client.coordinators_told("decode-0", incarnation, sequence).await
                && !coordinators.is_empty()
            {
                *addresses.lock().unwrap() = coordinators;
            }
        }
        tokio::time::sleep(BEAT).await;
    }
}

async fn requests(
    addresses: Arc<Mutex<Vec<String>>>,
    acknowledged: Arc<Mutex<Acknowledged>>,
    stop: watch::Receiver<bool>,
) {
    let mut id = 0u128;
    let mut last: Option<Instant> = None;
    let mut clients: BTreeMap<String, Client> = BTreeMap::new();
    let mut leader = String::new();
    while !*stop.borrow() {
        let known = addresses.lock().unwrap().clone();
        if !known.contains(&leader) {
            leader = known[id as usize % known.len()].clone();
        }
        let client = clients.entry(leader.clone()).or_insert_with(|| Client::new(&leader));
        let Ok(reply) = client.assign_raw(request(id, 1)).await else {
            leader = next(&known, &leader);
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        match reply.outcome.unwrap() {
            baton_proto::v1::assign_reply::Outcome::Assignment(assignment) => {
                let mut acknowledged = acknowledged.lock().unwrap();
                acknowledged.gap = acknowledged.gap.max(last.map_or(Duration::ZERO, |last| last.elapsed()));
                last = Some(Instant::now());
                acknowledged.open.insert(id, assignment.epoch);
            }
            baton_proto::v1::assign_reply::Outcome::Refused(refused) => {
                let redirect = Some(refused.leader_address).filter(|address| !address.is_empty());
                leader = redirect.unwrap_or_else(|| next(&known, &leader));
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            }
        }
        if !id.is_multiple_of(OPEN_EVERY) && client.try_finish(id).await {
            let mut acknowledged = acknowledged.lock().unwrap();
            acknowledged.open.remove(&id);
            acknowledged.finished.push(id);
        } else if !id.is_multiple_of(OPEN_EVERY) {
            // Whether it has ended is not known: nothing was acknowledged about it.
            acknowledged.lock().unwrap().open.remove(&id);
        }
        id += 1;
    }
}

fn next(known: &[String], after: &str) -> String {
    let at = known.iter().position(|address| address == after).map_or(0, |at| at + 1);
    known[at % known.len()].clone()
}
