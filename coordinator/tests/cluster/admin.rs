//! What operators ask of a coordinator, and what gateways and workers see of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use baton_proto::v1::admin_client::AdminClient;
use baton_proto::{TcpNet, v1};
use tonic::transport::Channel;

use crate::group::{Client, Directory, config, member, request, start};
use crate::wait_for;

pub(crate) fn admin(address: &str) -> AdminClient<Channel> {
    AdminClient::new(baton_proto::channel(Arc::new(TcpNet), address).unwrap())
}

/// The reason it was refused for, or none.
fn refused(done: tonic::Response<v1::Done>) -> Option<String> {
    match done.into_inner().outcome.unwrap() {
        v1::done::Outcome::Done(_) => None,
        v1::done::Outcome::Refused(refused) => Some(refused.reason),
    }
}

fn tenant(name: &str, requests_open_max: u64) -> v1::Tenant {
    v1::Tenant { name: name.into(), requests_open_max, ..Default::default() }
}

fn key(id: &str, tenant: &str) -> v1::AccessKey {
    v1::AccessKey { id: id.into(), secret_hash: vec![7; 32].into(), tenant: tenant.into(), created_unix_s: 1 }
}

/// Goal: gateways hear of keys and tenants at once, and a cluster that has had a key is never open again.
#[tokio::test]
async fn access_is_told_at_once_and_stays_closed() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let (mut client, mut admin) = (Client::new(&running.address()), admin(&running.address()));
    assert_eq!(refused(admin.create_key(key("a", "t")).await.unwrap()).as_deref(), Some("unknown"), "no such tenant");
    let mut access = client.watch_access().await;
    assert!(access.message().await.unwrap().unwrap().open);
    assert_eq!(refused(admin.set_tenant(tenant("t", 2)).await.unwrap()), None);
    assert_eq!(access.message().await.unwrap().unwrap().tenants, [tenant("t", 2)]);
    assert_eq!(refused(admin.create_key(key("a", "t")).await.unwrap()), None);
    let told = access.message().await.unwrap().unwrap();
    assert_eq!((told.open, told.keys), (false, vec![key("a", "t")]));
    assert_eq!(refused(admin.create_key(key("a", "t")).await.unwrap()), None, "repeated");
    assert_eq!(refused(admin.revoke_key(v1::KeyId { id: "a".into() }).await.unwrap()), None);
    let told = access.message().await.unwrap().unwrap();
    assert_eq!((told.open, told.keys.len()), (false, 0));
    assert!(admin.set_tenant(tenant("no spaces", 0)).await.is_err());
    running.stop().await;
}

/// Goal: a tenant's limit is kept and its usage billed once, whatever is repeated.
#[tokio::test]
async fn a_tenant_is_limited_and_billed_once() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let (mut client, mut admin) = (Client::new(&running.address()), admin(&running.address()));
    client.register("decode-0", "k").await.unwrap();
    admin.set_tenant(tenant("t", 1)).await.unwrap();
    let of_tenant = |id| v1::AssignRequest { tenant: "t".into(), ..request(id, 1) };
    let first = client.assign(of_tenant(1)).await.unwrap();
    let over = client.assign(of_tenant(2)).await.unwrap_err();
    assert_eq!(over.reason, "quota");
    assert!(over.retry_after_ms > 0 && over.detail.contains("1 requests open"), "{over:?}");
    assert!(client.assign(request(3, 1)).await.is_ok(), "others are not limited by it");
    let finished = v1::FinishedRequest {
        request: first.request,
        epoch: first.epoch,
        outcome: "complete".into(),
        prompt_tokens: 100,
        generated_tokens: 7,
        ..Default::default()
    };
    for _ in 0..2 {
        client.finish_all(vec![finished.clone()]).await;
    }
    let usage = admin.list_tenants(v1::ListTenantsRequest {}).await.unwrap().into_inner().tenants.remove(0);
    assert_eq!((usage.requests_open, usage.requests_total), (0, 1));
    assert_eq!((usage.prompt_tokens_total, usage.generated_tokens_total), (100, 7));
    assert!(client.assign(of_tenant(2)).await.is_ok());
    running.stop().await;
}

/// Goal: an order reaches its worker with the next heartbeat, and nothing more is placed on it.
#[tokio::test]
async fn an_order_reaches_its_worker() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let (mut client, mut admin) = (Client::new(&running.address()), admin(&running.address()));
    let decode = client.register("decode-0", "k").await.unwrap();
    assert_eq!(client.beat("decode-0", decode, 1).await.unwrap().order(), v1::Order::Serve);
    let order = |worker: &str| v1::OrderRequest { worker: worker.into(), order: v1::Order::Drain.into() };
    assert_eq!(refused(admin.order_worker(order("decode-9")).await.unwrap()).as_deref(), Some("unknown"));
    assert_eq!(refused(admin.order_worker(order("decode-0")).await.unwrap()), None);
    assert_eq!(client.beat("decode-0", decode, 2).await.unwrap().order(), v1::Order::Drain);
    assert_eq!(client.assign(request(1, 1)).await.unwrap_err().reason, "no_workers");
    let explained = admin.explain(v1::ExplainRequest { request: format!("{:032x}", 1) }).await.unwrap().into_inner();
    assert_eq!((explained.state.as_str(), explained.decisions[0].reason.as_str()), ("unknown", "no_workers"));
    running.stop().await;
}

/// Goal: a worker that computes something else than the others of its class does not come in.
#[tokio::test]
async fn golden_tokens_that_differ_are_refused() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    client.register_golden("decode-0", &[1, 2, 3, 4]).await.unwrap();
    assert_eq!(client.register_golden("prefill-0", &[1, 2, 3, 5]).await.unwrap_err().reason, "incompatible");
    client.register_golden("prefill-0", &[1, 2, 3, 4]).await.unwrap();
    running.stop().await;
}

/// Goal: a second process does not take the name of a worker that is alive; one that follows it where it listened does.
#[tokio::test]
async fn a_name_in_use_is_refused() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let first = client.register("decode-0", "k").await.unwrap();
    client.beat("decode-0", first, 1).await.unwrap();
    let elsewhere = || v1::Member { address: "decode-0:2".into(), ..member("decode-0") };
    let refused = client.register_as(elsewhere(), "other").await.unwrap_err();
    assert_eq!(refused.reason, "unavailable");
    assert!(refused.detail.contains("alive at decode-0:1"), "{refused:?}");
    client.beat("decode-0", first, 2).await.unwrap();
    let second = client.register("decode-0", "restarted").await.unwrap();
    assert!(second > first);
    let silent = wait_for("the one that lives falls silent", || {
        let mut client = client.clone();
        async move { client.register_as(elsewhere(), "other").await.ok() }
    });
    assert!(silent.await > second);
    running.stop().await;
}

/// A wall clock that somebody turns.
struct Turned(AtomicU64);

impl baton_core::Clock for Turned {
    fn unix_ms(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Goal: a wall clock that jumps by hours, back and forth, moves no quota, no deadline and no lease. Method: the seam's clock
/// is turned between every two steps.
#[tokio::test]
async fn a_clock_that_jumps_moves_nothing() {
    const HOUR_MS: u64 = 3_600_000;
    let clock = Arc::new(Turned(AtomicU64::new(1_000 * HOUR_MS)));
    let jump = |to: u64| clock.0.store(to * HOUR_MS, Ordering::Relaxed);
    let directory = Directory::new();
    let env = baton_core::Env { clock: clock.clone(), ..crate::group::env(1) };
    let running = baton_coordinator::start(config(1, directory.path(), &[]), env).await.unwrap();
    let (mut client, mut admin) = (Client::new(&running.address()), admin(&running.address()));
    let incarnation = client.register("decode-0", "k").await.unwrap();
    let limited = v1::Tenant { name: "t".into(), requests_per_minute: 2, ..v1::Tenant::default() };
    admin.set_tenant(limited).await.unwrap();
    let of_tenant = |id| v1::AssignRequest { tenant: "t".into(), ..request(id, 1) };
    let mut sequence = 0;
    let mut first = None;
    for (id, hour) in [(1, 1_001), (2, 990)] {
        jump(hour);
        sequence += 1;
        client.beat("decode-0", incarnation, sequence).await.expect("its lease holds");
        let assigned = client.assign(of_tenant(id)).await.unwrap();
        first.get_or_insert(assigned);
    }
    for hour in [991, 2_000, 1, 1_000] {
        jump(hour);
        let refused = client.assign(of_tenant(3)).await.unwrap_err();
        assert_eq!(refused.reason, "quota", "hour {hour}");
        assert!((1..=60_000).contains(&refused.retry_after_ms), "hour {hour}: {refused:?}");
        sequence += 1;
        client.beat("decode-0", incarnation, sequence).await.expect("its lease holds");
        let view = client.view().await.unwrap();
        assert!(view.members.iter().any(|m| m.live && m.member.as_ref().is_some_and(|m| m.id == "decode-0")));
        let again = client.assign(of_tenant(1)).await.unwrap();
        assert_eq!(Some(again.epoch), first.as_ref().map(|first| first.epoch), "it is open, as it was");
    }
    running.stop().await;
}

/// Goal: the ledger itself looks at keys: a gateway that has not heard of the first key or of a revocation gets nothing
/// accepted and finds no stream; what was accepted before goes on. Method: requests as such gateways send them.
#[tokio::test]
async fn keys_that_a_gateway_has_not_heard_of_are_asked_for_all_the_same() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let (mut client, mut admin) = (Client::new(&running.address()), admin(&running.address()));
    client.register("decode-0", "k").await.unwrap();
    let before = client.assign(request(1, 1)).await.unwrap();
    admin.set_tenant(tenant("t", 0)).await.unwrap();
    admin.create_key(key("a", "t")).await.unwrap();
    let refused = client.assign(request(2, 1)).await.unwrap_err();
    assert_eq!(refused.reason, "unknown");
    assert!(refused.detail.contains("without one"), "{refused:?}");
    let again = v1::AssignRequest { previous_epoch: before.epoch, ..request(1, 2) };
    client.assign(again).await.expect("it was accepted while the cluster was open");
    let with_key = v1::AssignRequest { key: "a".into(), tenant: "t".into(), ..request(3, 1) };
    client.assign(with_key).await.unwrap();
    assert_eq!(client.locate_with(3, "t", "a", &before.cluster).await, "");
    assert_eq!(
        client.locate_with(3, "t", "", &before.cluster).await,
        "fenced",
        "its gateway believes the cluster open"
    );
    assert_eq!(client.locate_with(3, "t", "", "").await, "", "a gateway of earlier releases names neither");
    admin.revoke_key(v1::KeyId { id: "a".into() }).await.unwrap();
    assert_eq!(client.locate_with(3, "t", "a", &before.cluster).await, "fenced");
    running.stop().await;
}

/// Goal: what was generated is billed though the client left while its request asked for the next worker, and the rest of
/// what was charged is given back. Method: an end of whatever assignment is in force.
#[tokio::test]
async fn a_client_that_leaves_between_two_workers_is_billed() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let (mut client, mut admin) = (Client::new(&running.address()), admin(&running.address()));
    client.register("decode-0", "k").await.unwrap();
    admin.set_tenant(v1::Tenant { tokens_per_minute: 210, ..tenant("t", 0) }).await.unwrap();
    let of_tenant = |id| v1::AssignRequest { tenant: "t".into(), tokens_max: 90, ..request(id, 1) };
    let first = client.assign(of_tenant(1)).await.unwrap();
    assert_eq!(client.assign(of_tenant(2)).await.unwrap_err().reason, "quota");
    let end = v1::FinishedRequest {
        request: first.request,
        outcome: "cancelled".into(),
        prompt_tokens: 10,
        generated_tokens: 5,
        ..Default::default()
    };
    let ends = v1::FinishRequest { requests: vec![end], gateway: "g".into(), ..Default::default() };
    client.tell(ends).await;
    let usage = admin.list_tenants(v1::ListTenantsRequest {}).await.unwrap().into_inner().tenants.remove(0);
    assert_eq!((usage.requests_open, usage.prompt_tokens_total, usage.generated_tokens_total), (0, 10, 5));
    client.assign(of_tenant(2)).await.expect("what was not used is given back");
    running.stop().await;
}
