//! What the clients of a measurement do: one assignment after another, many in a message, or one ledger entry a call.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use baton_proto::v1;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::group::{Client, connect};

/// The model that the measurement's workers serve.
pub(super) const MODEL: &str = "bench";
/// Connections that clients with one entry a call share, as requests of gateways do.
const CONNECTIONS: usize = 8;
/// Pads an entry to about the 200 bytes with which ledgers of other projects are measured.
const PADDING: usize = 160;
/// Batches of ends that wait for the connection they share.
const ENDS_MAX: usize = 64;

/// So many, in this time; and how long each call took.
pub(super) struct Timed {
    pub(super) count: u64,
    pub(super) took: Duration,
    pub(super) milliseconds: Vec<f64>,
}

/// Names no other client of this measurement uses.
fn request(client: usize, serial: u64) -> v1::AssignRequest {
    v1::AssignRequest {
        request: format!("{:032x}", (client as u128 + 1) << 64 | u128::from(serial)),
        attempt: 1,
        model: MODEL.into(),
        prompt_tokens: 48,
        tokens_max: 100,
        choices: 1,
        deadline_ms: 60_000,
        gateway: "bench".into(),
        ..Default::default()
    }
}

fn finished(request: String, epoch: u64, outcome: String) -> v1::FinishedRequest {
    v1::FinishedRequest { request, epoch, outcome, ..Default::default() }
}

fn assigned(reply: Option<v1::AssignReply>) -> anyhow::Result<v1::Assignment> {
    match reply.and_then(|reply| reply.outcome) {
        Some(v1::assign_reply::Outcome::Assignment(assignment)) => Ok(assignment),
        Some(v1::assign_reply::Outcome::Refused(refusal)) => {
            anyhow::bail!("an assignment was refused: {} {}", refusal.reason, refusal.detail)
        }
        None => anyhow::bail!("an answer without outcome"),
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// One client that assigns and ends one request after another; assigning is timed.
pub(super) async fn assign_alone(leader: &str, length: Duration) -> anyhow::Result<Timed> {
    let mut client = connect(leader)?;
    let (started, mut times) = (Instant::now(), Vec::new());
    while started.elapsed() < length {
        let before = Instant::now();
        let reply = client.assign(request(0, times.len() as u64)).await.context("assign")?;
        times.push(milliseconds(before));
        let assignment = assigned(Some(reply.into_inner()))?;
        let requests = vec![finished(assignment.request, assignment.epoch, "complete".into())];
        client.finish(v1::FinishRequest { requests, ..Default::default() }).await.context("finish")?;
    }
    Ok(Timed { count: times.len() as u64, took: started.elapsed(), milliseconds: times })
}

/// Several streams, each with one message of many requests after another; all of them are ended too. A message's time is
/// that of its last answer.
pub(super) async fn assign_batched(
    leader: &str,
    streams: usize,
    batch: usize,
    length: Duration,
) -> anyhow::Result<Timed> {
    let started = Instant::now();
    let mut running = JoinSet::new();
    for nth in 0..streams {
        running.spawn(assign_stream(connect(leader)?, 1 + nth, batch, started + length));
    }
    gather(running, started).await
}

async fn gather(mut running: JoinSet<anyhow::Result<(u64, Vec<f64>)>>, started: Instant) -> anyhow::Result<Timed> {
    let mut timed = Timed { count: 0, took: Duration::ZERO, milliseconds: Vec::new() };
    while let Some(ended) = running.join_next().await {
        let (count, milliseconds) = ended.context("a client failed")??;
        timed.count += count;
        timed.milliseconds.extend(milliseconds);
    }
    timed.took = started.elapsed();
    Ok(timed)
}

async fn assign_stream(
    mut client: Client,
    name: usize,
    batch: usize,
    until: Instant,
) -> anyhow::Result<(u64, Vec<f64>)> {
    let (ask, asked) = mpsc::channel(2);
    let (end, ends) = mpsc::channel(ENDS_MAX);
    let ending = tokio::spawn(finish_all(client.clone(), ends));
    let batches = tokio_stream::wrappers::ReceiverStream::new(asked);
    let mut replies = client.assignments(batches).await.context("assignments")?.into_inner();
    let (mut count, mut times) = (0, Vec::new());
    while Instant::now() < until {
        let before = Instant::now();
        let requests: Vec<_> = (0..batch as u64).map(|n| request(name, count + n)).collect();
        let mut open: BTreeMap<String, ()> = requests.iter().map(|r| (r.request.clone(), ())).collect();
        ask.send(v1::AssignBatch { requests, ..Default::default() })
            .await
            .context("the stream of assignments ended")?;
        let mut done = Vec::new();
        while !open.is_empty() {
            let some = replies.message().await.context("assignments")?.context("the stream of assignments ended")?;
            for reply in some.replies {
                let assignment = assigned(reply.reply)?;
                open.remove(&assignment.request);
                done.push(finished(assignment.request, assignment.epoch, "complete".into()));
            }
        }
        times.push(milliseconds(before));
        count += batch as u64;
        end.send(done).await.context("requests can no longer be ended")?;
    }
    drop(end);
    ending.await.context("ending requests failed")??;
    Ok((count, times))
}

async fn finish_all(mut client: Client, mut ends: mpsc::Receiver<Vec<v1::FinishedRequest>>) -> anyhow::Result<()> {
    while let Some(requests) = ends.recv().await {
        client.finish(v1::FinishRequest { requests, ..Default::default() }).await.context("finish")?;
    }
    Ok(())
}

/// Many clients, each with one durable entry a call: the end of a request that never was.
pub(super) async fn write(leader: &str, clients: usize, length: Duration) -> anyhow::Result<Timed> {
    let connections = (0..CONNECTIONS.min(clients)).map(|_| connect(leader)).collect::<anyhow::Result<Vec<_>>>()?;
    let started = Instant::now();
    let mut running = JoinSet::new();
    for nth in 0..clients {
        running.spawn(write_one(connections[nth % connections.len()].clone(), 1_000 + nth, started + length));
    }
    gather(running, started).await
}

async fn write_one(mut client: Client, name: usize, until: Instant) -> anyhow::Result<(u64, Vec<f64>)> {
    let mut times = Vec::new();
    while Instant::now() < until {
        let before = Instant::now();
        let entry = finished(request(name, times.len() as u64).request, 0, "c".repeat(PADDING));
        let reply = client
            .finish(v1::FinishRequest { requests: vec![entry], ..Default::default() })
            .await
            .context("finish")?
            .into_inner();
        let Some(v1::finish_reply::Outcome::Finished(_)) = reply.outcome else {
            anyhow::bail!("an entry was refused: {reply:?}");
        };
        times.push(milliseconds(before));
    }
    Ok((times.len() as u64, times))
}
