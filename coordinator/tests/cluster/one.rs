//! A group of one.

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
    assert_eq!(client.beat("prefill-0", prefill, 1).await.unwrap_err().reason, "stale");

    let first = client.assign(request(1, 1)).await.unwrap();
    assert_eq!(first.decode.as_ref().unwrap().worker, "decode-0");
    assert_eq!(first.prefill.as_ref().unwrap().incarnation, prefill);
    let again = client.assign(request(1, 1)).await.unwrap();
    assert_eq!((again.epoch, &again.decode, &again.prefill), (first.epoch, &first.decode, &first.prefill));
    let moved = client.assign(request(1, 2)).await.unwrap();
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
    assert_eq!(watcher.beat("decode-0", decode, 2).await.unwrap_err().reason, "stale");
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
