//! What coordinators tell one another outside Raft: what a node knows of another one. A node with an empty directory
//! asks before it takes part, because a node that has lost its data must not vote again; a node that hears nothing of
//! a leader asks whether it was removed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_core::Net;
use baton_proto::v1::raft_client::RaftClient;
use serde::{Deserialize, Serialize};

use super::envelope::Envelope;
use super::wire::decode;

/// Asks after a node.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Question {
    pub(crate) node: u64,
}

/// What the asked node knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Known {
    /// Of the asked node; empty before it is founded.
    pub(crate) cluster: String,
    /// The asked node leads, a quorum follows it, and it has applied all that was ever committed.
    pub(crate) leads: bool,
    /// Nothing was ever committed as far as the asked node knows.
    pub(crate) fresh: bool,
    /// The node asked after has held a part of the log.
    pub(crate) seen: bool,
    /// It has left for good.
    pub(crate) removed: bool,
}

impl Known {
    /// Of a node that has nothing on its disk.
    pub(crate) fn nothing() -> Known {
        Known { fresh: true, ..Known::default() }
    }
}

/// Whether a node whose directory is empty may take part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It has never taken part.
    Begin,
    /// Not known yet.
    Wait,
    /// Its data is lost: it must be replaced.
    Lost,
    /// It was removed.
    Removed,
}

/// Judges by the answers of all other nodes of the group, None where none came. Only a leader surely knows every node
/// that ever took part; where nothing was ever committed, all have to say so.
pub(crate) fn judge(answers: &[Option<Known>]) -> Verdict {
    let known = || answers.iter().flatten();
    if known().any(|known| known.removed) {
        return Verdict::Removed;
    }
    if known().any(|known| known.seen) {
        return Verdict::Lost;
    }
    let all_fresh = answers.iter().all(|answer| answer.as_ref().is_some_and(|known| known.fresh));
    if all_fresh || known().any(|known| known.leads) { Verdict::Begin } else { Verdict::Wait }
}

/// Asks whoever is at these addresses after `node`, all at once, and waits so long for each: a node that has replaced the one
/// that was there knows as well.
pub(crate) async fn ask(
    net: &Arc<dyn Net>,
    envelope: &Envelope,
    addresses: &BTreeMap<u64, String>,
    node: u64,
    patience: Duration,
) -> Vec<Option<Known>> {
    let asked = addresses.values().map(|address| async move {
        let channel = baton_proto::channel(net.clone(), address).ok()?;
        let mut client = RaftClient::new(channel);
        let blob = envelope.seal(0, &Question { node });
        let reply = tokio::time::timeout(patience, client.ask(blob)).await.ok()?.ok()?;
        decode(&reply.into_inner().data).ok()
    });
    futures::future::join_all(asked).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_directory_begins_only_where_it_surely_never_was() {
        let fresh = Some(Known::nothing());
        let behind = Some(Known::default());
        let leader = Some(Known { leads: true, ..Known::default() });
        let seen = Some(Known { seen: true, ..Known::default() });
        let removed = Some(Known { removed: true, seen: true, ..Known::default() });
        let cases = [
            (vec![], Verdict::Begin),
            (vec![fresh.clone(), fresh.clone()], Verdict::Begin),
            (vec![fresh.clone(), None], Verdict::Wait),
            (vec![behind.clone(), fresh.clone()], Verdict::Wait),
            (vec![behind.clone(), leader.clone()], Verdict::Begin),
            (vec![None, leader.clone()], Verdict::Begin),
            (vec![leader, seen.clone()], Verdict::Lost),
            (vec![None, seen.clone()], Verdict::Lost),
            (vec![seen, removed], Verdict::Removed),
            (vec![None, None], Verdict::Wait),
        ];
        for (answers, verdict) in cases {
            assert_eq!(judge(&answers), verdict, "{answers:?}");
        }
    }
}
