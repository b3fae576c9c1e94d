//! A group of one.

use std::sync::Arc;

use baton_proto::v1::worker_client::WorkerClient;
use baton_proto::{TcpNet, v1};

use crate::group::{Client, Directory, config, request, start, try_start};
use crate::wait_for;

/// Goal: the whole life of a request on one node. Method: register two workers, assign, repeat, re-assign, finish.
#[tokio::test]
async fn a_request_is_assigned_repeated_moved_and_finished() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());

    assert_eq!(client.assign(request(1, 1)).await.unwrap_err().reason, "no_workers");
    let prefill = client.register("prefill-0", "k").await.unwrap();
    let decode = client.register("decode-0", "k").await.unwrap();
    assert_eq!(client.register("decode-0", "k").await, Ok(decode), "one process, one incarnation");
    assert!(client.beat("prefill-0", prefill, 1).await.unwrap().leader);
    assert_eq!(client.beat("prefill-0", prefill, 1).await.unwrap_err().reason, "expired");

    let first = client.assign(request(1, 1)).await.unwrap();
    assert_eq!(first.decode.as_ref().unwrap().worker, "decode-0");
    assert_eq!(first.prefill.as_ref().unwrap().incarnation, prefill);
    let again = client.assign(request(1, 1)).await.unwrap();
    assert_eq!((again.epoch, &again.decode, &again.prefill), (first.epoch, &first.decode, &first.prefill));
    assert_eq!(client.assign(request(1, 2)).await.unwrap_err().reason, "stale", "it follows nothing");
    let other = v1::AssignRequest { gateway: "another".into(), ..request(1, 1) };
    assert_eq!(client.assign(other).await.unwrap_err().reason, "stale", "one gateway runs it");
    let next = v1::AssignRequest { previous_epoch: first.epoch, ..request(1, 2) };
    let moved = client.assign(next).await.unwrap();
    assert!(moved.epoch > first.epoch);
    assert_eq!(client.view().await.unwrap().requests_open, 1);
    client.finish(1, first.epoch).await.unwrap();
    assert_eq!(client.view().await.unwrap().requests_open, 1, "an older epoch ends nothing");
    client.finish(1, moved.epoch).await.unwrap();
    client.finish(1, moved.epoch).await.unwrap();
    assert_eq!(client.view().await.unwrap().requests_open, 0);
    assert_eq!(client.assign(request(1, 3)).await.unwrap_err().reason, "stale");
    running.stop().await;
}

/// Goal: a call of a service that coordinators do not have is refused as such. Method: one is asked for a model's card.
#[tokio::test]
async fn a_service_of_others_is_unimplemented() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let channel = baton_proto::channel(Arc::new(TcpNet), &running.address()).unwrap();
    let status = WorkerClient::new(channel).card(v1::CardRequest {}).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unimplemented, "{status}");
    running.stop().await;
}

/// Goal: a silent worker is fenced, its later words are refused, and it comes back under a later incarnation.
#[tokio::test]
async fn a_silent_worker_is_fenced() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let decode = client.register("decode-0", "k").await.unwrap();
    client.beat("decode-0", decode, 1).await.unwrap();
    let mut watcher = client.clone();
    wait_for("the worker is fenced", || {
        let mut client = watcher.clone();
        async move { client.view().await?.members.iter().any(|m| !m.live).then_some(()) }
    })
    .await;
    assert_eq!(watcher.beat("decode-0", decode, 2).await.unwrap_err().reason, "fenced");
    assert_eq!(watcher.assign(request(1, 1)).await.unwrap_err().reason, "no_workers");
    assert!(watcher.register("decode-0", "k").await.unwrap() > decode);
    assert!(watcher.assign(request(1, 1)).await.is_ok());
    running.stop().await;
}

/// Goal: the ledger outlives the process, and incarnations and epochs go on growing.
#[tokio::test]
async fn a_restart_keeps_the_ledger() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let decode = client.register("decode-0", "k").await.unwrap();
    let assigned = client.assign(request(1, 1)).await.unwrap();
    let cluster = client.view().await.unwrap().cluster;
    running.stop().await;

    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    assert_eq!(client.register("decode-0", "k").await, Ok(decode));
    let again = client.assign(request(1, 1)).await.unwrap();
    assert_eq!((again.epoch, again.decode), (assigned.epoch, assigned.decode));
    assert!(client.assign(request(2, 1)).await.unwrap().epoch > assigned.epoch);
    assert_eq!(client.view().await.unwrap().cluster, cluster);
    running.stop().await;
}

/// Goal: a data directory serves one node of one cluster in one process at a time.
#[tokio::test]
async fn a_data_directory_has_one_user() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let second = try_start(config(1, directory.path(), &[])).await.err().unwrap();
    assert!(second.to_string().contains("in use by another process"), "{second}");
    running.stop().await;
    let mut other = config(2, directory.path(), &[]);
    other.data = config(1, directory.path(), &[]).data;
    let refused = try_start(other).await.err().unwrap();
    assert!(refused.to_string().contains("belongs to node 1, not to node 2"), "{refused}");
}

/// Goal: a watcher is told at once, again when a member comes, and of load in time.
#[tokio::test]
async fn a_watcher_sees_members_come_and_load_move() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let mut views = client.watch().await;
    let first = views.message().await.unwrap().unwrap();
    assert_eq!((first.node, first.members.len()), (1, 0));
    assert_eq!(first.coordinators[0].pid, std::process::id());

    let decode = client.register("decode-0", "k").await.unwrap();
    let free = |view: &v1::ClusterView| view.members.first().and_then(|m| m.load.as_ref()).map(|load| load.blocks_free);
    while free(&views.message().await.unwrap().unwrap()) != Some(1000) {}
    let load = v1::Load { blocks_free: 17, blocks_added: vec![vec![7; 16].into()], ..Default::default() };
    client.beat_with("decode-0", decode, 1, load).await.unwrap();
    let view = loop {
        let view = views.message().await.unwrap().unwrap();
        if free(&view) == Some(17) {
            break view;
        }
    };
    assert!(view.members[0].load.as_ref().unwrap().blocks_added.is_empty(), "the index stays where it is");
    running.stop().await;
    while let Ok(Some(_)) = views.message().await {}
}

/// Goal: prefix hits reported by heartbeats steer assignments, and a reported failure steers them away.
#[tokio::test]
async fn heartbeats_and_failures_steer_assignments() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let first = client.register("decode-0", "k").await.unwrap();
    let second = client.register("decode-1", "k").await.unwrap();
    let hash = bytes::Bytes::from(vec![7; 16]);
    let load = v1::Load { blocks_free: 1000, blocks_added: vec![hash.clone()], ..Default::default() };
    client.beat("decode-0", first, 1).await.unwrap();
    client.beat_with("decode-1", second, 1, load).await.unwrap();

    let asked = |id| v1::AssignRequest { block_hashes: vec![hash.clone()], ..request(id, 1) };
    let chosen = |assignment: v1::Assignment| assignment.decode.unwrap().worker;
    assert_eq!(chosen(client.assign(asked(1)).await.unwrap()), "decode-1");
    client.finish(1, 0).await.unwrap();
    let failed = v1::WorkerLife { id: "decode-1".into(), incarnation: second };
    let moved = v1::AssignRequest { exclude: vec![failed], ..asked(2) };
    assert_eq!(chosen(client.assign(moved).await.unwrap()), "decode-0");
    client.finish(2, 0).await.unwrap();
    assert_eq!(chosen(client.assign(asked(3)).await.unwrap()), "decode-0", "suspect until it is heard of again");
    client.finish(3, 0).await.unwrap();
    client.beat("decode-1", second, 2).await.unwrap();
    assert_eq!(chosen(client.assign(asked(4)).await.unwrap()), "decode-1");
    running.stop().await;
}

/// Goal: what no correct peer sends is refused with the field's name, and nothing breaks.
#[tokio::test]
async fn bad_messages_are_refused_by_field() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    client.register("decode-0", "k").await.unwrap();
    let good = request(1, 1);
    let bad = [
        ("request", v1::AssignRequest { request: "x".into(), ..good.clone() }),
        ("attempt", v1::AssignRequest { attempt: 0, ..good.clone() }),
        ("prompt_tokens", v1::AssignRequest { prompt_tokens: u64::MAX, ..good.clone() }),
        ("model", v1::AssignRequest { model: "m".repeat(300), ..good.clone() }),
        ("lane", v1::AssignRequest { lane: 7, ..good.clone() }),
        ("block_hash", v1::AssignRequest { block_hashes: vec![vec![1].into()], ..good.clone() }),
    ];
    for (field, message) in bad {
        let status = client.assign_raw(message).await.unwrap_err();
        assert!(status.message().contains(field), "{field}: {}", status.message());
    }
    assert_eq!(
        client.assign(v1::AssignRequest { model: "x".into(), ..good.clone() }).await.unwrap_err().reason,
        "unknown_model"
    );
    assert_eq!(client.assign(v1::AssignRequest { tokens_max: 9999, ..good }).await.unwrap_err().reason, "too_large");
    running.stop().await;
}
