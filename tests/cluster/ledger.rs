//! Ledgers that are not what they were: one that differs from the leader's, although no checksum says so, stops its node;
//! one that began anew is another cluster's, which the workers of the old one stay out of.

use std::path::Path;
use std::sync::Arc;

use baton_proto::v1::Tenant;
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::{TcpNet, channel};
use baton_tests::cluster::wait_for;
use baton_tests::{Fleet, Shape};
use serde_json::json;

/// Exit code of damaged and differing data.
const DAMAGED: i32 = 78;
/// The leader tells its ledger's hash at every such index.
const HASH_EVERY: u64 = 1_024;
const SEGMENT_HEADER: usize = 24;
const FRAME_HEADER: usize = 16;
const RECORD_HEADER: usize = 9;

fn number(bytes: &[u8]) -> usize {
    u32::from_le_bytes(bytes[..4].try_into().expect("four bytes")) as usize
}

/// Replaces a word by another of the same length in every segment of a log, and makes all checksums right again: what a
/// binary with a mistake would have written. Returns how often.
fn forge(data: &Path, word: &str, other: &str) -> usize {
    let files = std::fs::read_dir(data).expect("a directory").flatten().map(|file| file.path());
    let mut count = 0;
    for path in files.filter(|path| path.is_file()) {
        let mut bytes = std::fs::read(&path).expect("readable");
        if !bytes.starts_with(b"BATONLOG") {
            continue;
        }
        let mut frame = SEGMENT_HEADER;
        while bytes.len() >= frame + FRAME_HEADER {
            let end = frame + FRAME_HEADER + number(&bytes[frame..]);
            let mut record = frame + FRAME_HEADER;
            while record < end {
                let next = record + RECORD_HEADER + number(&bytes[record..]);
                let found = bytes[record..next].windows(word.len()).position(|w| w == word.as_bytes());
                if let Some(at) = found {
                    bytes[record + at..record + at + word.len()].copy_from_slice(other.as_bytes());
                    let sum = crc32fast::hash(&bytes[record + 8..next]);
                    bytes[record + 4..record + 8].copy_from_slice(&sum.to_le_bytes());
                    count += 1;
                }
                record = next;
            }
            let sum = crc32fast::hash(&[&bytes[frame..frame + 4], &bytes[frame + 8..end]].concat());
            bytes[frame + 4..frame + 8].copy_from_slice(&sum.to_le_bytes());
            frame = end;
        }
        std::fs::write(&path, bytes).expect("writable");
    }
    count
}

/// One entry of the ledger.
async fn write(address: &str, tenant: &str) {
    let mut client = AdminClient::new(channel(Arc::new(TcpNet), address).expect("an address"));
    let tenant = Tenant { name: tenant.into(), ..Tenant::default() };
    client.set_tenant(tenant).await.expect("the leader answers");
}

/// Goal: a node that applied something else than the others ends with code 78 and names the index and both hashes; the
/// others go on. Method: another tenant's name in the log of one of three, with right checksums.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_ledger_differs_stops_and_says_why() {
    let shape = Shape { coordinators: 3, prefill: 0, decode: 0, gateways: 0, ..Shape::default() };
    let mut fleet = Fleet::start(&shape).await;
    let leader = fleet.leader().await;
    let address = fleet.address(&leader);
    write(&address, "mallory-a").await;
    fleet.agreed().await;
    let victim = fleet.ids("coordinator").into_iter().find(|id| *id != leader).expect("three of them");
    fleet.kill(&victim).await;
    assert_eq!(forge(&fleet.data(&victim), "mallory-a", "mallory-b"), 1);
    fleet.restart(&victim).await;
    fleet.agreed().await;

    // Entries until the leader has told the hash of the first index that has one, and some more.
    let index = || async { fleet.status_of(&leader).await?["ledger_index"].as_u64() };
    while wait_for("the leader's index", index).await <= HASH_EVERY {
        let writing = (0..4).map(|nth| {
            let address = address.clone();
            tokio::spawn(async move {
                for _ in 0..64 {
                    write(&address, &format!("t{nth}")).await;
                }
            })
        });
        for written in writing.collect::<Vec<_>>() {
            written.await.expect("written");
        }
    }
    let end = fleet.end(&victim).await;
    let message = end.last["message"].as_str().unwrap_or_default().to_string();
    assert_eq!((end.code, end.last["code"].as_i64()), (Some(DAMAGED), Some(i64::from(DAMAGED))), "{end:?}");
    assert!(message.contains(&format!("at index {HASH_EVERY} hashes to")), "{message}");
    assert!(message.contains("here and to") && message.contains("on the leader"), "{message}");
    assert_eq!(fleet.leader().await, leader, "the others are untouched");
    write(&address, "after").await;
}

/// Goal: a process belongs to the cluster that it has been in: a coordinator that began a new one refuses it, and says so.
/// A worker ends; a gateway serves nobody, in whichever way it is asked. Method: the only coordinator's directory is emptied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_follows_an_emptied_coordinator() {
    let mut fleet = Fleet::start(&Shape { prefill: 0, ..Shape::default() }).await;
    // Before that it sends no heartbeats, and an emptied coordinator would refuse it its registration.
    wait_for("the gateway to be registered", || async {
        let status = fleet.status().await?;
        status["processes"].as_array()?.iter().any(|process| process["role"] == "gateway").then_some(())
    })
    .await;
    fleet.kill("coordinator-1").await;
    std::fs::remove_dir_all(fleet.data("coordinator-1")).expect("it is there");
    fleet.restart("coordinator-1").await;
    let end = fleet.end("decode-0").await;
    let message = end.last["message"].as_str().unwrap_or_default().to_string();
    assert_eq!(end.code, Some(2), "{end:?}");
    assert!(message.contains("this is cluster") && message.contains("directory emptied"), "{message}");
    let refused = "baton_coordinator_registrations_refused_total";
    assert!(fleet.metric("coordinator-1", refused, "reason=\"cluster\"").await >= 1.0);
    let all = fleet.metric("coordinator-1", refused, "").await;
    assert_eq!(fleet.metric("coordinator-1", refused, "reason=\"cluster\"").await, all, "and for nothing else");
    let client = fleet.client(0);
    wait_for("the gateway to be unhealthy", || async { (client.get("/health").await.status == 503).then_some(()) })
        .await;
    let body = json!({"model": "baton-3m", "prompt": "And God said", "max_tokens": 2});
    let reply = client.post("/v1/completions", &body).await;
    assert_eq!((reply.status, reply.headers["x-baton-refused"].to_str().ok()), (503, Some("foreign")), "{reply:?}");
    let foreign = async |name: &str| fleet.metric("coordinator-1", name, "reason=\"foreign\"").await;
    wait_for("the worker's and the gateway's heartbeat to be refused", || async {
        (foreign("baton_coordinator_heartbeats_refused_total").await >= 2.0).then_some(())
    })
    .await;
    assert!(foreign("baton_coordinator_commands_refused_total").await >= 1.0);
}
