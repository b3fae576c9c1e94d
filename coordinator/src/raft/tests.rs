//! A group of one on a disk in memory, as the simulator runs it: no thread, and power can fail.

use std::time::Duration;

use baton_proto::TcpNet;

use super::*;
use crate::log::MemoryDisk;
use crate::state::Command;

async fn start(disk: &MemoryDisk) -> Node {
    let peers = BTreeMap::from([(1, "127.0.0.1:1".to_string())]);
    let (net, disk) = (Arc::new(TcpNet), Arc::new(disk.clone()));
    let parts = Parts {
        node: NodeId(1),
        peers,
        envelope: Envelope::new(1, ""),
        net,
        disk,
        seed: 7,
        entries: crate::state::VERSION,
    };
    let node = Node::start(parts).await.unwrap();
    let mut standing = node.standing();
    standing.wait_for(|standing| standing.leader == Some(NodeId(1))).await.unwrap();
    node
}

async fn expire(node: &Node, time_ms: u64) -> Result<Vec<Outcome>, ProposeError> {
    node.propose(&Batch { time_ms, commands: vec![Command::Expire] }).await
}

/// Goal: what was answered survives a power failure, through the log and through a snapshot with a purged log.
#[tokio::test]
async fn what_was_answered_survives_a_power_failure() {
    let disk = MemoryDisk::new(Duration::ZERO);
    for round in 1..=3u64 {
        let node = start(&disk).await;
        for time_ms in 1..=20 {
            expire(&node, round * 100 + time_ms).await.unwrap();
        }
        if round == 2 {
            node.raft.trigger().snapshot().await.unwrap();
            node.raft.wait(None).metrics(|m| m.snapshot.is_some(), "a snapshot").await.unwrap();
        }
        node.stop().await;
        node.close().await;
        disk.crash(3);
        let again = start(&disk).await;
        // A leader has applied all that was committed once it has committed an entry of its own.
        expire(&again, 0).await.unwrap();
        assert_eq!(again.ledger().time_ms(), round * 100 + 20);
        again.stop().await;
        again.close().await;
    }
}

/// Goal: a full disk never acknowledges what it did not write, and says so.
#[tokio::test]
async fn a_full_disk_stops_the_node_without_a_false_answer() {
    let disk = MemoryDisk::new(Duration::ZERO);
    let node = start(&disk).await;
    expire(&node, 10).await.unwrap();
    disk.limit(Some(0));
    assert!(matches!(expire(&node, 20).await, Err(ProposeError::Unknown(_))));
    let mut standing = node.standing();
    let failed = standing.wait_for(|standing| standing.failed.is_some()).await.unwrap().clone();
    assert!(failed.failed.is_some());
    disk.limit(None);
    node.stop().await;
    node.close().await;
    let again = start(&disk).await;
    expire(&again, 0).await.unwrap();
    assert_eq!(again.ledger().time_ms(), 10);
    again.stop().await;
}
