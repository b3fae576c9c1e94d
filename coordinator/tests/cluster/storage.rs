//! Disks that run full and disks that become slow, under load.

use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use baton_coordinator::Running;
use baton_coordinator::log::{self, Appender, Disk, MemoryDisk};
use baton_core::NodeId;

use crate::group::{Client, Directory, config, env, free_addresses};
use crate::load::Load;
use crate::wait_for;

async fn start_on(node: u64, peers: &[(NodeId, String)], disk: Arc<dyn Disk>) -> Running {
    let config = config(node, Path::new("unused"), peers);
    baton_coordinator::start_on(config, env(node), disk).await.unwrap()
}

async fn storage_is(address: &str, wanted: &str) {
    wait_for(&format!("storage is {wanted}"), || async {
        (Client::new(address).view().await?.storage == wanted).then_some(())
    })
    .await;
}

/// Waits until all of them know of the same leader and returns its place.
async fn leader(addresses: &[String]) -> usize {
    wait_for("one leader that all know", || async {
        let mut leaders = Vec::new();
        for address in addresses {
            leaders.push(Client::new(address).view().await?.leader);
        }
        (leaders[0] != 0 && leaders.iter().all(|leader| *leader == leaders[0])).then(|| leaders[0] as usize - 1)
    })
    .await
}

async fn caught_up(behind: &str, ahead: &str) {
    wait_for("the node that was full has caught up", || async {
        let ahead = Client::new(ahead).view().await?;
        let behind = Client::new(behind).view().await?;
        (behind.leader == ahead.leader && behind.ledger_index + 50 >= ahead.ledger_index).then_some(())
    })
    .await;
}

/// Goal: a coordinator whose disk is full steps aside, says so, acknowledges nothing that it did not write, and comes
/// back by itself when there is room, leader or not. Method: each of three in turn, the leader first, under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_makes_a_node_step_aside_and_come_back() {
    let peers = free_addresses(3).await;
    let addresses: Vec<String> = peers.iter().map(|(_, address)| address.clone()).collect();
    let disks: Vec<MemoryDisk> = (0..3).map(|_| MemoryDisk::new(Duration::ZERO)).collect();
    let mut running = Vec::new();
    for (at, disk) in disks.iter().enumerate() {
        running.push(start_on(at as u64 + 1, &peers, Arc::new(disk.clone())).await);
    }
    let first = leader(&addresses).await;
    let load = Load::start(&addresses).await;
    for at in [first, (first + 1) % 3, (first + 2) % 3] {
        disks[at].limit(Some(0));
        storage_is(&addresses[at], "full").await;
        load.more(30).await;
        disks[at].limit(None);
        storage_is(&addresses[at], "ok").await;
        caught_up(&addresses[at], &addresses[(at + 1) % 3]).await;
    }
    let acknowledged = load.stop_and_check(&addresses).await;
    println!("longest time without an assignment: {:?}", acknowledged.gap);
    for node in running {
        node.stop().await;
    }
}

/// Goal: the same where it is the only one: nothing is served meanwhile, and everything acknowledged is there after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_node_comes_back_from_a_full_disk_too() {
    let disk = MemoryDisk::new(Duration::ZERO);
    let running = start_on(1, &[], Arc::new(disk.clone())).await;
    let addresses = vec![running.address()];
    let load = Load::start(&addresses).await;
    load.more(20).await;
    disk.limit(Some(0));
    storage_is(&addresses[0], "full").await;
    disk.limit(None);
    storage_is(&addresses[0], "ok").await;
    load.more(20).await;
    load.stop_and_check(&addresses).await;
    running.stop().await;
}

/// Goal: a real file system that is full does the same. Method: a tmpfs of 2 MiB, where mounting one is permitted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_file_system_makes_a_node_step_aside_and_come_back() {
    let directory = Directory::new();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(directory.path()).output();
    if !mounted.as_ref().is_ok_and(|output| output.status.success()) {
        println!("skipped: mounting a tmpfs is not permitted here ({mounted:?})");
        return;
    }
    let disk = Arc::new(log::Directory::open(&directory.path().join("data")).unwrap());
    let running = start_on(1, &[], disk).await;
    let addresses = vec![running.address()];
    let load = Load::start(&addresses).await;
    let ballast = directory.path().join("ballast");
    // What does not fit whole leaves what did fit.
    assert!(std::fs::write(&ballast, vec![7u8; 4 << 20]).is_err());
    storage_is(&addresses[0], "full").await;
    std::fs::remove_file(&ballast).unwrap();
    storage_is(&addresses[0], "ok").await;
    load.more(20).await;
    load.stop_and_check(&addresses).await;
    running.stop().await;
    assert!(Command::new("umount").arg(directory.path()).status().unwrap().success());
}

/// A directory whose syncs can be made to take long.
struct Slow {
    disk: log::Directory,
    slow: Arc<AtomicBool>,
}

struct SlowEnd {
    end: Box<dyn Appender>,
    slow: Arc<AtomicBool>,
}

impl Disk for Slow {
    fn path(&self, name: &str) -> String {
        self.disk.path(name)
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }
    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.disk.read(name)
    }
    fn read_at(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.disk.read_at(name, offset, len)
    }
    fn append(&self, name: &str) -> io::Result<Box<dyn Appender>> {
        Ok(Box::new(SlowEnd { end: self.disk.append(name)?, slow: self.slow.clone() }))
    }
    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        self.disk.truncate(name, len)
    }
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.disk.replace(name, bytes)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }
    fn sync_directory(&self) -> io::Result<()> {
        self.disk.sync_directory()
    }
    fn inline_delay(&self) -> Option<Duration> {
        None
    }
}

impl Appender for SlowEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.end.write(bytes)
    }
    fn sync(&mut self) -> io::Result<()> {
        if self.slow.load(Ordering::Relaxed) {
            // The log's own thread: this is what a slow disk does to it.
            #[allow(clippy::disallowed_methods)]
            std::thread::sleep(Duration::from_millis(300));
        }
        self.end.sync()
    }
}

/// Goal: a leader whose disk has become slow hands leadership over, once; nobody else is disturbed by the slow one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_with_a_slow_disk_hands_over() {
    let directory = Directory::new();
    let peers = free_addresses(3).await;
    let addresses: Vec<String> = peers.iter().map(|(_, address)| address.clone()).collect();
    let (mut running, mut slow) = (Vec::new(), Vec::new());
    for node in 1..=3u64 {
        let disk = log::Directory::open(&directory.path().join(format!("node-{node}"))).unwrap();
        slow.push(Arc::new(AtomicBool::new(false)));
        let disk = Slow { disk, slow: slow.last().unwrap().clone() };
        running.push(start_on(node, &peers, Arc::new(disk)).await);
    }
    let first = leader(&addresses).await;
    let load = Load::start(&addresses).await;
    slow[first].store(true, Ordering::Relaxed);
    let next = wait_for("another one leads", || async {
        let view = Client::new(&addresses[(first + 1) % 3]).view().await?;
        (view.leader != 0 && view.leader as usize - 1 != first).then_some(view.leader)
    })
    .await;
    load.more(300).await;
    let view = Client::new(&addresses[next as usize - 1]).view().await.unwrap();
    assert_eq!(view.leader, next, "it stays with the new one");
    slow[first].store(false, Ordering::Relaxed);
    let acknowledged = load.stop_and_check(&addresses).await;
    println!("longest time without an assignment: {:?}", acknowledged.gap);
    for node in running {
        node.stop().await;
    }
}
