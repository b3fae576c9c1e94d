//! Three nodes over real TCP on disks in memory: snapshots, partitions, elections. Each node's network can be cut, and each
//! way between two nodes can fall silent.

use std::collections::BTreeSet;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use baton_core::Listener;
use baton_core::net::{BoxFuture, Stream};
use baton_proto::TcpNet;
use baton_proto::server::Bound;
use baton_proto::v1::raft_server::RaftServer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::JoinHandle;

use super::*;
use crate::log::MemoryDisk;
use crate::state::{self, Command};

/// How often what is silent looks whether it may speak again.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Which nodes cannot be heard by which: nothing passes from the first to the second, and nothing is lost, as with TCP.
#[derive(Default)]
struct Ways {
    nodes: BTreeMap<String, u64>,
    silent: BTreeSet<(u64, u64)>,
}

/// A node's sockets, all of which are dead while it is cut off.
#[derive(Clone, Default)]
struct Wire {
    node: u64,
    cut: Arc<AtomicBool>,
    ways: Arc<Mutex<Ways>>,
}

impl Wire {
    fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }

    fn check(&self) -> io::Result<()> {
        if self.cut.load(Ordering::Relaxed) { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }

    fn is_silent(&self, from: u64, to: u64) -> bool {
        self.ways.lock().unwrap().silent.contains(&(from, to))
    }
}

impl Net for Wire {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            self.check()?;
            let to = self.ways.lock().unwrap().nodes.get(address).copied();
            // A greeting needs both ways.
            while to.is_some_and(|to| self.is_silent(self.node, to) || self.is_silent(to, self.node)) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            let stream = TcpNet.connect(address).await?;
            Ok(Box::new(Wired { stream, wire: self.clone(), to, look: Box::pin(tokio::time::sleep(LOOK_EVERY)) })
                as Stream)
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move {
            let listener = TcpNet.listen(address).await?;
            Ok(Box::new(WiredListener { listener, wire: self.clone() }) as Box<dyn Listener>)
        })
    }
}

struct WiredListener {
    listener: Box<dyn Listener>,
    wire: Wire,
}

impl Listener for WiredListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(async {
            let stream = self.listener.accept().await?;
            let look = Box::pin(tokio::time::sleep(LOOK_EVERY));
            Ok(Box::new(Wired { stream, wire: self.wire.clone(), to: None, look }) as Stream)
        })
    }

    fn address(&self) -> String {
        self.listener.address()
    }
}

struct Wired {
    stream: Stream,
    wire: Wire,
    /// Who was called. The caller's end holds back what either of them says.
    to: Option<u64>,
    look: Pin<Box<tokio::time::Sleep>>,
}

impl Wired {
    /// Pending while the way is silent; looks again by itself.
    fn poll_way(&mut self, speaks: bool, cx: &mut Context<'_>) -> Poll<()> {
        let own = self.wire.node;
        while self.to.is_some_and(|to| if speaks { self.wire.is_silent(own, to) } else { self.wire.is_silent(to, own) })
        {
            std::task::ready!(self.look.as_mut().poll(cx));
            self.look.as_mut().reset(tokio::time::Instant::now() + LOOK_EVERY);
        }
        Poll::Ready(())
    }
}

impl AsyncRead for Wired {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.wire.check()?;
        std::task::ready!(self.poll_way(false, cx));
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wired {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.wire.check()?;
        std::task::ready!(self.poll_way(true, cx));
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire.check()?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

struct Member {
    node: Arc<Node>,
    server: JoinHandle<()>,
    stop: watch::Sender<bool>,
}

struct Group {
    addresses: BTreeMap<u64, String>,
    disks: BTreeMap<u64, MemoryDisk>,
    wires: BTreeMap<u64, Wire>,
    ways: Arc<Mutex<Ways>>,
    members: BTreeMap<u64, Member>,
}

impl Group {
    async fn start() -> Group {
        let ways = Arc::<Mutex<Ways>>::default();
        let mut listeners = BTreeMap::new();
        let mut group = Group {
            addresses: BTreeMap::new(),
            disks: BTreeMap::new(),
            wires: BTreeMap::new(),
            ways: ways.clone(),
            members: BTreeMap::new(),
        };
        for id in 1..=3 {
            let wire = Wire { node: id, ways: ways.clone(), ..Wire::default() };
            let listener = wire.listen("127.0.0.1:0").await.unwrap();
            ways.lock().unwrap().nodes.insert(listener.address(), id);
            group.addresses.insert(id, listener.address());
            group.disks.insert(id, MemoryDisk::new(Duration::ZERO));
            group.wires.insert(id, wire);
            listeners.insert(id, listener);
        }
        for (id, listener) in listeners {
            group.run(id, listener).await;
        }
        group
    }

    async fn run(&mut self, id: u64, listener: Box<dyn Listener>) {
        let parts = Parts {
            node: NodeId(id),
            peers: self.addresses.clone(),
            envelope: Envelope::new(id, ""),
            net: Arc::new(self.wires[&id].clone()),
            disk: Arc::new(self.disks[&id].clone()),
            seed: id,
            entries: state::VERSION,
        };
        let node = Arc::new(Node::start(parts).await.unwrap());
        let stop = watch::Sender::new(false);
        let mut stopped = stop.subscribe();
        let stopped = async move { drop(stopped.wait_for(|stop| *stop).await) };
        let service = RaftServer::new(node.service());
        let server = tokio::spawn(baton_proto::server::serve(listener, Bound::uncounted(), service, stopped));
        self.members.insert(id, Member { node, server, stop });
    }

    async fn restart(&mut self, id: u64) {
        let listener = loop {
            if let Ok(listener) = self.wires[&id].listen(&self.addresses[&id]).await {
                break listener;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        self.run(id, listener).await;
    }

    async fn stop(&mut self, id: u64) {
        let Member { node, server, stop } = self.members.remove(&id).unwrap();
        stop.send_replace(true);
        node.stop().await;
        node.close().await;
        server.await.unwrap();
    }

    fn node(&self, id: u64) -> Arc<Node> {
        self.members[&id].node.clone()
    }

    /// Whom all of these nodes take for the leader.
    async fn leader(&self, of: &[u64]) -> u64 {
        wait(|| {
            let leaders: Vec<_> = of.iter().map(|id| self.node(*id).standing().borrow().leader).collect();
            leaders[0]
                .filter(|leader| of.contains(&leader.0) && leaders.iter().all(|l| *l == Some(*leader)))
                .map(|l| l.0)
        })
        .await
    }

    /// Commits commands, at whichever of these nodes leads.
    async fn commit(&self, of: &[u64], times: std::ops::Range<u64>) {
        for time_ms in times {
            self.commit_one(of, Batch { time_ms, commands: vec![Command::Expire] }).await;
        }
    }

    async fn commit_one(&self, of: &[u64], batch: Batch) {
        while self.node(self.leader(of).await).propose(&batch).await.is_err() {}
    }

    /// Waits until these nodes hold the same ledger up to this time.
    async fn agree(&self, of: &[u64], time_ms: u64) {
        // One look at each ledger: a second one while an entry waits to be applied would wait for ever.
        let seen = |id: &u64| {
            let node = self.node(*id);
            let ledger = node.ledger();
            (ledger.index(), state::hash(&ledger), ledger.time_ms())
        };
        wait(|| {
            let seen: Vec<_> = of.iter().map(seen).collect();
            (seen.iter().all(|one| *one == seen[0]) && seen[0].2 >= time_ms).then_some(())
        })
        .await;
    }

    async fn stop_all(mut self) {
        for id in self.members.keys().copied().collect::<Vec<_>>() {
            self.stop(id).await;
        }
    }
}

async fn wait<T>(mut check: impl FnMut() -> Option<T>) -> T {
    let polled = async {
        loop {
            if let Some(found) = check() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), polled).await.expect("it comes within 60 s")
}

const ALL: [u64; 3] = [1, 2, 3];

fn others(of: u64) -> Vec<u64> {
    ALL.into_iter().filter(|id| *id != of).collect()
}

/// Saves the ledger and drops the log before it.
async fn save_and_purge(node: &Node) {
    let applied = node.ledger().index();
    node.raft.trigger().snapshot().await.unwrap();
    let saved = |m: &openraft::RaftMetrics<types::Types>| m.snapshot.is_some_and(|saved| saved.index >= applied);
    node.raft.wait(None).metrics(saved, "a snapshot").await.unwrap();
    node.raft.trigger().purge_log(applied).await.unwrap();
    node.raft.wait(None).metrics(|m| m.purged.is_some_and(|p| p.index >= applied), "a purge").await.unwrap();
}

/// Ends of requests that nobody has heard of: they make the ledger, and its snapshot, large.
fn ends(nth: u64) -> Batch {
    let end = |id: u64| {
        Command::Finish(state::Finished {
            request: baton_core::RequestId(u128::MAX - u128::from(id)),
            epoch: baton_core::Epoch(0),
            outcome: "cancelled".into(),
            prompt_tokens: 0,
            cached_tokens: 0,
            generated_tokens: 0,
        })
    };
    let count = state::COMMANDS_MAX as u64;
    Batch { time_ms: 0, commands: (nth * count..(nth + 1) * count).map(end).collect() }
}

/// Goal: a node for which the others no longer have entries catches up by snapshot, of more parts than one, and goes on by
/// the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_far_behind_catches_up_by_snapshot() {
    let mut group = Group::start().await;
    group.commit(&ALL, 1..10).await;
    let away = others(group.leader(&ALL).await)[0];
    let present = others(away);
    group.stop(away).await;
    group.commit(&present, 10..200).await;
    for nth in 0..8 {
        group.commit_one(&present, ends(nth)).await;
    }
    let bytes = state::encode_ledger(&group.node(present[0]).ledger()).len();
    assert!(bytes > 1 << 20, "{bytes} bytes are one part");
    // A leader keeps what it still tries to send to a node that is down: one that has dropped it shall lead.
    let leader = group.leader(&present).await;
    let next = *present.iter().find(|id| **id != leader).unwrap();
    save_and_purge(&group.node(next)).await;
    while group.leader(&present).await != next {
        group.node(group.leader(&present).await).hand_over(next).await.unwrap();
        wait(|| group.node(next).standing().borrow().leader).await;
    }
    save_and_purge(&group.node(leader)).await;
    group.commit(&present, 200..210).await;
    group.restart(away).await;
    group.agree(&ALL, 209).await;
    let metrics = group.node(away).raft.metrics().borrow_watched().clone();
    assert!(metrics.snapshot.is_some_and(|saved| saved.index >= 190), "{:?}", metrics.snapshot);
    group.commit(&ALL, 210..220).await;
    group.agree(&ALL, 219).await;
    group.stop(away).await;
    group.restart(away).await;
    group.agree(&ALL, 219).await;
    group.stop_all().await;
}

/// Goal: saving the ledger and dropping the log while entries stream in loses and reorders nothing, on any node, over a
/// power failure too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_and_purges_under_load_lose_nothing() {
    let mut group = Group::start().await;
    let leader = group.leader(&ALL).await;
    let nodes: Vec<Arc<Node>> = ALL.iter().map(|id| group.node(*id)).collect();
    let saving = tokio::spawn(async move {
        for _ in 0..5 {
            for node in &nodes {
                save_and_purge(node).await;
            }
        }
    });
    let mut time_ms = 1;
    while !saving.is_finished() {
        let node = group.node(leader);
        let batches = (time_ms..time_ms + 16).map(|time_ms| Batch { time_ms, commands: vec![Command::Expire] });
        let batches: Vec<Batch> = batches.collect();
        let written = futures::future::join_all(batches.iter().map(|batch| node.propose(batch))).await;
        if written.iter().all(Result::is_ok) {
            time_ms += 16;
        }
    }
    saving.await.unwrap();
    group.agree(&ALL, time_ms - 1).await;
    let held = state::hash(&group.node(1).ledger());
    for id in ALL {
        group.stop(id).await;
        group.disks[&id].crash(0);
    }
    for id in ALL {
        group.restart(id).await;
    }
    group.agree(&ALL, time_ms - 1).await;
    assert_eq!(group.node(1).ledger().time_ms(), time_ms - 1);
    assert_eq!(state::hash(&group.node(1).ledger()), held);
    group.stop_all().await;
}

/// Goal: a node that was cut off and comes back disturbs nobody: the leader and its term stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_cut_off_forces_no_election() {
    let group = Group::start().await;
    group.commit(&ALL, 1..5).await;
    let leader = group.leader(&ALL).await;
    let cut = others(leader)[0];
    let term = group.node(leader).standing().borrow().term;
    group.wires[&cut].cut(true);
    let started = tokio::time::Instant::now();
    let mut time_ms = 5;
    while started.elapsed() < Duration::from_millis(5 * ELECTION_MS_MAX) {
        group.commit(&others(cut), time_ms..time_ms + 1).await;
        time_ms += 1;
    }
    assert_eq!(group.node(cut).standing().borrow().term, term, "it asked before it stood for election");
    group.wires[&cut].cut(false);
    group.agree(&ALL, time_ms - 1).await;
    group.commit(&ALL, time_ms..time_ms + 10).await;
    assert_eq!(group.leader(&ALL).await, leader);
    assert_eq!(group.node(leader).standing().borrow().term, term);
    group.stop_all().await;
}

/// Goal: a leader that is cut off says so within 900 ms, the others go on, and what it took in meanwhile is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_a_quorum_refuses_in_time() {
    let group = Group::start().await;
    group.commit(&ALL, 1..5).await;
    let old = group.leader(&ALL).await;
    group.wires[&old].cut(true);
    let batch = Batch { time_ms: 1_000_000, commands: vec![Command::Expire] };
    for attempt in 1..=3 {
        let started = tokio::time::Instant::now();
        let refused = group.node(old).propose(&batch).await;
        assert!(refused.is_err(), "attempt {attempt}");
        assert!(started.elapsed() < Duration::from_millis(900), "attempt {attempt} took {:?}", started.elapsed());
    }
    group.commit(&others(old), 5..20).await;
    assert!(group.node(old).propose(&batch).await.is_err(), "no two leaders take writes");
    group.wires[&old].cut(false);
    group.commit(&ALL, 20..30).await;
    group.agree(&ALL, 29).await;
    assert_eq!(group.node(old).ledger().time_ms(), 29);
    group.stop_all().await;
}

const RING: &str = "in a ring";

/// Which ways fall silent, by the leader and its two followers.
type Between = fn(u64, u64, u64) -> Vec<(u64, u64)>;

/// One acknowledged write: who took it, in which term, and when it was asked for and answered.
#[derive(Debug)]
struct Taken {
    node: u64,
    term: u64,
    asked: tokio::time::Instant,
    answered: tokio::time::Instant,
    request: u128,
}

/// Offers a write to one node again and again until `stop`; a write is the end of a request that nobody has heard of.
async fn offer(node: Arc<Node>, stop: watch::Receiver<bool>, taken: Arc<Mutex<Vec<Taken>>>) {
    for nth in 0u128.. {
        if *stop.borrow() {
            break;
        }
        let request = (u128::from(node.id().0) << 64) + nth;
        let end = state::Finished {
            request: baton_core::RequestId(request),
            epoch: baton_core::Epoch(0),
            outcome: "cancelled".into(),
            prompt_tokens: 0,
            cached_tokens: 0,
            generated_tokens: 0,
        };
        let (term, asked) = (node.standing().borrow().term, tokio::time::Instant::now());
        let answer = node.propose(&Batch { time_ms: 0, commands: vec![Command::Finish(end)] }).await;
        let answered = tokio::time::Instant::now();
        // A term that changed meanwhile leaves open in which one it was written.
        if answer.is_ok() && node.standing().borrow().term == term {
            taken.lock().unwrap().push(Taken { node: node.id().0, term, asked, answered, request });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// One silence from its beginning to its end; returns by how much the term grew in it.
async fn silence(kind: &str, between: Between) -> u64 {
    let group = Group::start().await;
    group.commit(&ALL, 1..5).await;
    let leader = group.leader(&ALL).await;
    let (term, others) = (group.node(leader).standing().borrow().term, others(leader));
    let (stop, stopped) = watch::channel(false);
    let taken = Arc::<Mutex<Vec<Taken>>>::default();
    let offering: Vec<_> =
        ALL.iter().map(|id| tokio::spawn(offer(group.node(*id), stopped.clone(), taken.clone()))).collect();
    group.ways.lock().unwrap().silent = between(leader, others[0], others[1]).into_iter().collect();
    let since = tokio::time::Instant::now();
    tokio::time::sleep(Duration::from_millis(5 * ELECTION_MS_MAX)).await;
    let during = || taken.lock().unwrap().iter().filter(|one| one.asked > since).count();
    // In a ring no two can talk to each other, and two are a majority.
    match kind {
        RING => assert_eq!(during(), 0, "{kind}: somebody took a write"),
        _ => wait(|| (during() > 0).then_some(())).await,
    }
    let grown = ALL.map(|id| group.node(id).standing().borrow().term).into_iter().max().unwrap() - term;
    println!("{kind}: {} writes during it, the term grew by {grown}", during());
    group.ways.lock().unwrap().silent.clear();
    group.leader(&ALL).await;
    stop.send_replace(true);
    for offered in offering {
        offered.await.unwrap();
    }
    let taken = std::mem::take(&mut *taken.lock().unwrap());
    for one in &taken {
        let other = taken.iter().find(|other| other.term == one.term && other.node != one.node);
        assert!(other.is_none(), "{kind}: two nodes took writes in one term: {one:?} {other:?}");
        let older = taken.iter().find(|other| other.asked > one.answered && other.term < one.term);
        assert!(older.is_none(), "{kind}: an older leader took a write after a newer one: {one:?} {older:?}");
    }
    let last = 1_000_000;
    group.commit(&ALL, last..last + 5).await;
    group.agree(&ALL, last + 4).await;
    for id in ALL {
        let node = group.node(id);
        let lost = taken.iter().find(|one| !node.ledger().has_ended(baton_core::RequestId(one.request)));
        assert!(lost.is_none(), "{kind}: node {id} has lost {lost:?}");
    }
    group.stop_all().await;
    grown
}

/// Goal: while some nodes cannot be heard by some others, never do two leaders take writes, somebody takes them where two can
/// talk, there are two elections at most, and all agree when the ways are open again, with everything that was acknowledged.
/// Method: every kind of one-way silence around the leader; writes are offered to all nodes all the while. A machine that
/// is too busy for heartbeats elects without any silence: the least of three counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_way_silence_makes_no_second_leader() {
    let kinds: [(&str, Between); 6] = [
        ("one does not hear the leader", |l, f, _| vec![(l, f)]),
        ("the leader does not hear one", |l, f, _| vec![(f, l)]),
        ("nobody hears the leader", |l, f, g| vec![(l, f), (l, g)]),
        ("the leader hears nobody", |l, f, g| vec![(f, l), (g, l)]),
        ("one follower does not hear the other", |_, f, g| vec![(f, g)]),
        (RING, |l, f, g| vec![(l, f), (f, g), (g, l)]),
    ];
    for (kind, between) in kinds {
        let mut grown = u64::MAX;
        for _ in 0..3 {
            grown = grown.min(silence(kind, between).await);
            if grown <= 2 {
                break;
            }
        }
        assert!(grown <= 2, "{kind}: {grown} elections");
    }
}
