//! What becomes of requests whose gateway is lost.

use std::sync::Arc;
use std::time::Duration;

use baton_coordinator::log::MemoryDisk;
use baton_coordinator::start_on;
use baton_proto::v1;
use tokio::time::Instant;

use crate::group::{Client, Directory, config, env, request, start};
use crate::wait_for;

/// Waits until so many requests are open, while the gateway that stays sends its heartbeats.
async fn open(client: &Client, count: u64) {
    let of = || {
        let mut client = client.clone();
        async move {
            client.gateway_beat("stays").await;
            (client.view().await?.requests_open == count).then_some(())
        }
    };
    wait_for("requests to end", of).await;
}

/// Goal: a lost gateway's requests end within two seconds, those it may be resumed for go on, and whoever takes one over
/// keeps it. Method: three requests of a gateway that falls silent, one of another that goes on.
#[tokio::test]
async fn a_lost_gateway_takes_its_requests_along_but_those_that_may_be_resumed() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    client.register("decode-0", "k").await.unwrap();
    let of = |id: u128, gateway: &str, resumable_ms: u64| v1::AssignRequest {
        gateway: gateway.into(),
        tenant: "t".into(),
        resumable_ms,
        ..request(id, 1)
    };
    client.gateway_beat("stays").await;
    client.gateway_beat("goes").await;
    client.assign(of(1, "goes", 0)).await.unwrap();
    let taken = client.assign(of(2, "goes", 300_000)).await.unwrap();
    client.assign(of(3, "goes", 500)).await.unwrap();
    client.assign(of(4, "stays", 0)).await.unwrap();
    let lost = Instant::now();
    assert_eq!(client.locate(2, "stays", "other").await, Err("unknown".into()), "not of this tenant");
    assert_eq!(client.locate(9, "stays", "t").await, Err("unknown".into()));
    open(&client, 3).await;
    assert!(lost.elapsed() < Duration::from_secs(2), "{:?}", lost.elapsed());
    let found = client.locate(2, "stays", "t").await.unwrap();
    assert_eq!((found.epoch, found.decode), (taken.epoch, taken.decode));
    open(&client, 2).await;
    assert_eq!(client.locate(1, "stays", "t").await, Err("unknown".into()), "ended");
    assert!(client.locate(2, "", "t").await.is_ok() && client.locate(4, "", "t").await.is_ok());
    running.stop().await;
}

fn attempt(number: u32, gateway: &str, previous_epoch: u64) -> v1::AssignRequest {
    let gateway = gateway.into();
    v1::AssignRequest { gateway, tenant: "t".into(), resumable_ms: 60_000, previous_epoch, ..request(1, number) }
}

fn end(epoch: u64, gateway: &str) -> v1::FinishRequest {
    let (request, outcome) = (format!("{:032x}", 1), "cancelled".into());
    let requests = vec![v1::FinishedRequest { request, epoch, outcome, generated_tokens: 5, ..Default::default() }];
    v1::FinishRequest { requests, gateway: gateway.into(), ..Default::default() }
}

/// Goal: a gateway that wakes after another one has taken its stream over neither ends it nor takes it back; one of an
/// earlier release, which does not say who it is, ends what it ever did. Method: what each of them would say.
#[tokio::test]
async fn a_stream_taken_over_is_its_former_gateways_no_more() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    client.register("decode-0", "k").await.unwrap();
    let first = client.assign(attempt(1, "sleeps", 0)).await.unwrap();
    assert_eq!(client.locate(1, "wakes", "t").await.unwrap().epoch, first.epoch);
    let still_open = async |client: &mut Client, what: &str| {
        assert_eq!(client.view().await.unwrap().requests_open, 1, "{what}");
    };
    client.tell(end(first.epoch, "sleeps")).await;
    still_open(&mut client, "an end by the epoch").await;
    client.tell(end(0, "sleeps")).await;
    still_open(&mut client, "an end of whatever there is").await;
    let back = client.assign(attempt(2, "sleeps", first.epoch)).await.unwrap_err();
    assert_eq!(back.reason, "stale");
    let second = client.assign(attempt(2, "wakes", first.epoch)).await.unwrap();
    client.tell(end(second.epoch, "sleeps")).await;
    still_open(&mut client, "an end by the next epoch").await;
    client.tell(end(second.epoch, "")).await;
    assert_eq!(client.view().await.unwrap().requests_open, 0);
    running.stop().await;
}

/// Goal: a stream that is taken over is not taken back, nor ended, by what its former gateway says in that very moment.
/// Method: both speak at once to a coordinator whose disk is slow, again and again; the ledger has to agree with what each
/// was told.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_speaks_while_a_stream_is_taken_over_is_heard_before_or_after() {
    let directory = Directory::new();
    let disk = Arc::new(MemoryDisk::new(Duration::from_millis(10)));
    let running = start_on(config(1, directory.path(), &[]), env(1), disk).await.unwrap();
    let mut client = Client::new(&running.address());
    client.register("decode-0", "k").await.unwrap();
    let (mut adopted, mut kept) = (0, 0);
    for round in 0..24 {
        let of = |number, gateway: &str, previous_epoch| v1::AssignRequest {
            request: format!("{:032x}", 100 + round),
            ..attempt(number, gateway, previous_epoch)
        };
        let first = client.assign(of(1, "sleeps", 0)).await.unwrap();
        let (mut wakes, mut sleeps) = (client.clone(), client.clone());
        let pause = Duration::from_millis(round % 8);
        let located = async {
            tokio::time::sleep(Duration::from_millis(4)).await;
            wakes.locate(100 + u128::from(round), "wakes", "t").await
        };
        let back = async {
            tokio::time::sleep(pause).await;
            sleeps.assign(of(2, "sleeps", first.epoch)).await
        };
        let (located, back) = tokio::join!(located, back);
        let epoch = located.expect("it is resumable").epoch;
        match back {
            Ok(second) => {
                kept += 1;
                assert_eq!(epoch, second.epoch, "round {round}: taken back after it was taken over");
            }
            Err(refused) => {
                adopted += 1;
                assert!(["stale", "unavailable"].contains(&refused.reason.as_str()), "{refused:?}");
                assert_eq!(epoch, first.epoch);
            }
        }
        let open = client.view().await.unwrap().requests_open;
        client.tell(v1::FinishRequest { requests: vec![of_round(round, epoch)], ..end(epoch, "sleeps") }).await;
        assert_eq!(client.view().await.unwrap().requests_open, open, "round {round}: it is not its former gateway's");
        client.tell(v1::FinishRequest { requests: vec![of_round(round, epoch)], ..end(epoch, "wakes") }).await;
        assert_eq!(client.view().await.unwrap().requests_open, open - 1, "round {round}");
    }
    println!("{adopted} times the one who takes over was first, {kept} times its former gateway");
    running.stop().await;
}

fn of_round(round: u64, epoch: u64) -> v1::FinishedRequest {
    let (request, outcome) = (format!("{:032x}", 100 + round), "cancelled".into());
    v1::FinishedRequest { request, epoch, outcome, ..Default::default() }
}
