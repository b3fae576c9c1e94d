//! A group of three.

use crate::group::{Client, Group, request};
use crate::wait_for;

/// Registers a prefill and a decode worker at the leader and lets every node hear of them.
async fn workers(group: &Group, leader: usize) -> (u64, u64) {
    let mut client = group.client(leader);
    let prefill = client.register("prefill-0", "k").await.unwrap();
    let decode = client.register("decode-0", "k").await.unwrap();
    (prefill, decode)
}

/// Assigns at whichever node leads, as a gateway does: by redirect, and again when the outcome is unknown.
async fn assign_somewhere(group: &Group, id: u128, attempt: u32) -> (u64, usize) {
    wait_for("an assignment by some leader", || async {
        for at in (0..3).filter(|at| group.running[*at].is_some()) {
            if let Ok(assignment) = group.client(at).assign(request(id, attempt)).await {
                return Some((assignment.epoch, at));
            }
        }
        None
    })
    .await
}

/// Goal: any node can be asked, only the leader answers, and the others say who that is.
#[tokio::test(flavor = "multi_thread")]
async fn followers_redirect_to_the_leader() {
    let mut group = Group::start().await;
    let leader = group.leader().await;
    workers(&group, leader).await;
    for at in (0..3).filter(|at| *at != leader) {
        let refused = group.client(at).assign(request(1, 1)).await.unwrap_err();
        assert_eq!((refused.reason.as_str(), &refused.leader_address), ("not_leader", &group.peers[leader].1));
        let refused = group.client(at).register("decode-1", "k").await.unwrap_err();
        assert_eq!(refused.reason, "not_leader");
        Client::new(&refused.leader_address).register("decode-1", "k").await.unwrap();
    }
    assert!(group.client(leader).assign(request(1, 1)).await.is_ok());
    group.stop_all().await;
}

/// Goal: the leader's death loses nothing: the others go on with the same workers and requests, repeating an attempt
/// gives the same assignment, and epochs still grow.
#[tokio::test(flavor = "multi_thread")]
async fn the_others_go_on_when_the_leader_stops() {
    let mut group = Group::start().await;
    let leader = group.leader().await;
    let (_, decode) = workers(&group, leader).await;
    let first = group.client(leader).assign(request(1, 1)).await.unwrap();
    let second = group.client(leader).assign(request(2, 1)).await.unwrap();
    group.client(leader).finish(2, second.epoch).await.unwrap();
    group.stop(leader).await;

    let (epoch, next) = assign_somewhere(&group, 1, 1).await;
    assert_eq!(epoch, first.epoch, "a repeated attempt is the same assignment");
    assert_ne!(next, leader);
    let mut client = group.client(next);
    assert!(client.beat("decode-0", decode, 1).await.unwrap().leader, "workers live on under the new leader");
    assert_eq!(client.assign(request(2, 1)).await.unwrap_err().reason, "stale", "what has ended stays ended");
    assert!(client.assign(request(3, 1)).await.unwrap().epoch > second.epoch);
    group.stop_all().await;
}

/// Goal: a node that was away catches up from the others. Method: stop a follower, commit, restart it, compare views.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_away_catches_up() {
    let mut group = Group::start().await;
    let leader = group.leader().await;
    let away = (leader + 1) % 3;
    group.stop(away).await;
    workers(&group, leader).await;
    for id in 0..50 {
        group.client(leader).assign(request(id, 1)).await.unwrap();
    }
    group.restart(away).await;
    wait_for("the node that was away has the requests", || async {
        (group.client(away).view().await?.requests_open == 50).then_some(())
    })
    .await;
    group.stop_all().await;
}

/// Goal: when all restart together the ledger is what it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_all_keeps_the_ledger() {
    let mut group = Group::start().await;
    let leader = group.leader().await;
    workers(&group, leader).await;
    let first = group.client(leader).assign(request(1, 1)).await.unwrap();
    group.stop_all().await;
    for at in 0..3 {
        group.restart(at).await;
    }
    let (epoch, _) = assign_somewhere(&group, 1, 1).await;
    assert_eq!(epoch, first.epoch);
    group.stop_all().await;
}

/// Goal: without a quorum a request is refused within a second and with a time to come back, and after the quorum
/// is back it is served.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_requests_are_refused_in_time() {
    let mut group = Group::start().await;
    let leader = group.leader().await;
    workers(&group, leader).await;
    let others: Vec<usize> = (0..3).filter(|at| *at != leader).collect();
    for at in &others {
        group.stop(*at).await;
    }
    let started = tokio::time::Instant::now();
    let refused = group.client(leader).assign(request(1, 1)).await.unwrap_err();
    assert!(started.elapsed() < std::time::Duration::from_millis(1500), "{:?}", started.elapsed());
    assert_eq!(refused.reason, "unavailable");
    assert!(refused.retry_after_ms > 0);
    group.restart(others[0]).await;
    // Nobody sends heartbeats in this test, so the workers may be fenced meanwhile; they come back as workers do.
    wait_for("service after the quorum is back", || async {
        for at in [leader, others[0]] {
            let mut client = group.client(at);
            if client.register("decode-0", "k").await.is_ok() && client.assign(request(1, 1)).await.is_ok() {
                return Some(());
            }
        }
        None
    })
    .await;
    group.stop_all().await;
}
