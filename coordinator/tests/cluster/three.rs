//! A group of three.

use std::time::Duration;

use baton_coordinator::state::WORKERS_MAX;
use baton_proto::v1;
use tokio::time::Instant;

use crate::admin::admin;
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

/// What the leader says of a request of a tenant, whoever leads; true: it is assigned, false: it is over the tenant's quota.
async fn is_within_quota(group: &Group, tenant: &str, id: u128) -> bool {
    wait_for("a leader's word on a request", || async {
        for at in (0..3).filter(|at| group.running[*at].is_some()) {
            let mut client = group.client(at);
            // The only worker lives as long as this test asks.
            if client.try_register("decode-0", "k").await.is_none() {
                continue;
            }
            let asked = v1::AssignRequest { tenant: tenant.into(), ..request(id, 1) };
            let reply = client.assign_raw(asked).await.ok()?.outcome?;
            match reply {
                v1::assign_reply::Outcome::Assignment(_) => return Some(true),
                v1::assign_reply::Outcome::Refused(refused) if refused.reason == "quota" => return Some(false),
                v1::assign_reply::Outcome::Refused(_) => {}
            }
        }
        None
    })
    .await
}

/// Goal: quotas are exact across leader changes: not one request too many or too few, none counted twice. Method: two tenants, one
/// limited in open requests, one by the minute; every request is asked for twice; the leader is stopped three times.
#[tokio::test(flavor = "multi_thread")]
async fn quotas_are_exact_across_leader_changes() {
    const OPEN: u64 = 20;
    const MINUTE: u64 = 6;
    let mut group = Group::start().await;
    let leader = group.leader().await;
    let tenant = |name: &str, requests_open_max, requests_per_minute| v1::Tenant {
        name: name.into(),
        requests_open_max,
        requests_per_minute,
        ..Default::default()
    };
    for tenant in [tenant("open", OPEN, 0), tenant("minute", 0, MINUTE)] {
        admin(&group.peers[leader].1).set_tenant(tenant).await.unwrap();
    }
    let started = Instant::now();
    let (mut open, mut minute) = (0, 0);
    for id in 0..40u128 {
        if [5, 12, 25].contains(&id) {
            let leader = group.leader().await;
            group.stop(leader).await;
            is_within_quota(&group, "open", 0).await;
            group.restart(leader).await;
        }
        let within = is_within_quota(&group, "open", id).await;
        assert_eq!(within, is_within_quota(&group, "open", id).await, "asked again, the same answer");
        open += u64::from(within);
        minute += u64::from(is_within_quota(&group, "minute", 1_000 + id).await);
    }
    let refilled = 1 + started.elapsed().as_secs() * MINUTE / 60;
    assert_eq!(open, OPEN);
    assert!((MINUTE..=MINUTE + refilled).contains(&minute), "{minute} in {:?}", started.elapsed());
    let leader = group.leader().await;
    let told = admin(&group.peers[leader].1).list_tenants(v1::ListTenantsRequest {}).await.unwrap().into_inner();
    let counted = |name: &str| {
        let of = |usage: &&v1::TenantUsage| usage.tenant.as_ref().is_some_and(|tenant| tenant.name == name);
        told.tenants.iter().find(of).map(|usage| usage.requests_open)
    };
    assert_eq!(counted("open"), Some(OPEN));
    assert_eq!(counted("minute"), Some(minute));
    assert!(started.elapsed() < Duration::from_secs(60), "longer than that and the first minute says nothing");
    group.stop_all().await;
}

/// Goal: a setting of the cluster counts for whoever leads, before and after a restart, and what is none is refused. Method: the knob
/// from which prompt tokens on a prefill worker is used is set beyond the prompt, the leader stops, then all do.
#[tokio::test(flavor = "multi_thread")]
async fn a_setting_holds_whoever_leads() {
    let mut group = Group::start().await;
    let leader = group.leader().await;
    workers(&group, leader).await;
    let prefills = async |group: &Group, id: u128| {
        wait_for("an assignment by some leader", || async {
            for at in (0..3).filter(|at| group.running[*at].is_some()) {
                let mut client = group.client(at);
                let lives = [client.try_register("prefill-0", "k").await, client.try_register("decode-0", "k").await];
                if lives.iter().any(Option::is_none) {
                    continue;
                }
                if let Ok(assignment) = client.assign(request(id, 1)).await {
                    return Some(assignment.prefill.is_some());
                }
            }
            None
        })
        .await
    };
    assert!(prefills(&group, 1).await);
    let set = |name: &str, value: Option<&str>| v1::Setting { name: name.into(), value: value.map(Into::into) };
    let mut asked = admin(&group.peers[leader].1);
    for (name, value) in [("prefill_tokens", "1000"), ("prefill_tokens_min", "many"), ("no name", "1")] {
        let refused = asked.change_setting(set(name, Some(value))).await.unwrap_err();
        assert!(refused.message().contains("name") || refused.message().contains(name), "{refused}");
    }
    let unset = asked.change_setting(set("queue_max", None)).await.unwrap().into_inner();
    assert!(matches!(unset.outcome, Some(v1::done::Outcome::Refused(r)) if r.reason == "unknown"));
    let done = asked.change_setting(set("prefill_tokens_min", Some("1000"))).await.unwrap().into_inner();
    assert!(matches!(done.outcome, Some(v1::done::Outcome::Done(_))), "{done:?}");
    assert!(!prefills(&group, 2).await, "from the next request on");

    group.stop(leader).await;
    assert!(!prefills(&group, 3).await, "the next leader goes by it");
    group.restart(leader).await;
    group.stop_all().await;
    for at in 0..3 {
        group.restart(at).await;
    }
    assert!(!prefills(&group, 4).await, "after a restart of all");
    let leader = group.leader().await;
    let mut asked = admin(&group.peers[leader].1);
    let list = asked.list_settings(v1::ListSettingsRequest {}).await.unwrap().into_inner();
    assert_eq!(list.set, [set("prefill_tokens_min", Some("1000"))]);
    assert!(list.in_force.contains("prefill_tokens_min = 1000") && list.in_force.contains("queue_max"), "{list:?}");
    asked.change_setting(set("prefill_tokens_min", None)).await.unwrap();
    assert!(prefills(&group, 5).await);
    group.stop_all().await;
}

/// Goal: a node that does not lead takes in so many workers that it does not know, and no more; known ones are heard on.
/// Method: heartbeats of made-up workers at a follower whose group is stopped, so that it does not lead.
#[tokio::test]
async fn a_follower_hears_a_bounded_number_of_workers() {
    let mut group = Group::start().await;
    let leader = group.leader().await;
    let (follower, other) = ((leader + 1) % 3, (leader + 2) % 3);
    group.stop(other).await;
    group.stop(leader).await;
    let mut client = group.client(follower);
    wait_for("it not to lead", || async {
        group.client(follower).try_beat("decode-0", 1, 1, v1::Load::default()).await.ok()
    })
    .await;
    let mut refused = None;
    for worker in 1..=WORKERS_MAX {
        match client.beat(&format!("decode-{worker}"), 1, 1).await {
            Ok(_) => {}
            Err(refusal) => {
                refused = Some((worker, refusal.reason));
                break;
            }
        }
    }
    assert_eq!(refused, Some((WORKERS_MAX, "no_capacity".to_string())));
    let last = format!("decode-{}", WORKERS_MAX - 1);
    client.beat(&last, 1, 2).await.expect("it has been heard before");
    group.stop_all().await;
}
