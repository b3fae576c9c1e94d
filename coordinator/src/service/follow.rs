//! What only the leader learns, on the other nodes: they look at its view now and then, so that gateways that watch
//! any node see broken pairs, and a new leader begins with what the last one knew.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Incarnation, Net, WorkerId};
use baton_proto::v1;
use baton_proto::v1::coordinator_client::CoordinatorClient;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tonic::transport::Channel;

use super::pairs::{Health, Pair, PairIndex};
use super::roster::Roster;
use super::{Shared, stopped};
use crate::placement::ALONE;

const EVERY: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(1);

/// Runs until this node stops.
pub(super) async fn keep(shared: Arc<Shared>, net: Arc<dyn Net>) {
    let mut stopping = shared.stopping.subscribe();
    let mut rounds = tokio::time::interval(EVERY);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut leader: Option<(String, Channel)> = None;
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stopping) => return,
            _ = rounds.tick() => {}
        }
        let Some(address) = elsewhere(&shared) else { continue };
        if leader.as_ref().is_none_or(|(known, _)| *known != address) {
            leader = baton_proto::channel(net.clone(), &address).ok().map(|channel| (address, channel));
        }
        let Some((_, channel)) = &leader else { continue };
        let view = tokio::select! {
            biased;
            () = stopped(&mut stopping) => return,
            view = timeout(PATIENCE, view(channel.clone())) => view.ok().flatten(),
        };
        if let Some(view) = view.filter(|view| view.leader == view.node && shared.lead.now().is_none()) {
            let told = {
                let mut roster = shared.roster();
                let told = pairs(&view, &roster, Instant::now());
                roster.adopt(told)
            };
            if told {
                shared.tell_members();
            }
        }
    }
}

/// The leader's address, if another node leads.
fn elsewhere(shared: &Shared) -> Option<String> {
    let leader = shared.node.standing().borrow().leader.filter(|leader| *leader != shared.node.id())?;
    Some(shared.address(leader)).filter(|address| !address.is_empty())
}

async fn view(channel: Channel) -> Option<v1::ClusterView> {
    let mut views = CoordinatorClient::new(channel).watch(v1::WatchRequest::default()).await.ok()?.into_inner();
    views.message().await.ok()?
}

/// The pairs of a view whose lives this node has heard of too.
fn pairs(view: &v1::ClusterView, roster: &Roster, now: Instant) -> Vec<(PairIndex, Pair)> {
    let index = |id: &str| {
        let members = view.members.iter().filter_map(|member| member.member.as_ref());
        let member = members.into_iter().find(|member| member.id == id)?;
        Some(roster.worker(&WorkerId(id.into()), Incarnation(member.incarnation))?.index())
    };
    let ago = |ms: u64| now.checked_sub(Duration::from_millis(ms)).unwrap_or(now);
    let pair = |told: &v1::PairView| {
        let health = match told.state.as_str() {
            "good" => Health::Good,
            "broken" => Health::Broken(told.reason.clone()),
            _ => return None,
        };
        let prefill = if told.prefill.is_empty() { ALONE } else { index(&told.prefill)? };
        let pair = Pair { health, since: ago(told.since_ms), seen: ago(told.seen_ms) };
        Some(((prefill, index(&told.decode)?), pair))
    };
    view.pairs.iter().filter_map(pair).collect()
}
