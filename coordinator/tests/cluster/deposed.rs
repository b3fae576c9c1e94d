//! Coordinators that are cut off from the others and can still be asked: what they know is from the past, and they say
//! nothing of it. The cuts are half open: nothing arrives and nothing is reset.

use std::collections::BTreeSet;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use baton_core::net::{BoxFuture, Listener, Stream};
use baton_core::{Env, Net};
use baton_proto::{TcpNet, v1};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, timeout};

use crate::admin::admin;
use crate::group::{Client, Directory, Group, config, env, free_addresses, request};
use crate::wait_for;

/// From which node to which address nothing passes, either way.
type Cuts = Arc<Mutex<BTreeSet<(usize, String)>>>;

/// One node's sockets.
struct CutNet {
    node: usize,
    cuts: Cuts,
}

impl Net for CutNet {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            let way = (self.node, address.to_string());
            if self.cuts.lock().unwrap().contains(&way) {
                return std::future::pending().await;
            }
            let stream = TcpNet.connect(address).await?;
            Ok(Box::new(Wire { stream, way, cuts: self.cuts.clone() }) as Stream)
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        TcpNet.listen(address)
    }
}

/// A connection that falls silent for good once its way is cut.
struct Wire {
    stream: Stream,
    way: (usize, String),
    cuts: Cuts,
}

impl Wire {
    fn is_cut(&self) -> bool {
        self.cuts.lock().unwrap().contains(&self.way)
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_cut() { Poll::Pending } else { Pin::new(&mut self.stream).poll_read(cx, buf) }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_cut() { Poll::Pending } else { Pin::new(&mut self.stream).poll_write(cx, bytes) }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_cut() { Poll::Pending } else { Pin::new(&mut self.stream).poll_flush(cx) }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_cut() { Poll::Pending } else { Pin::new(&mut self.stream).poll_shutdown(cx) }
    }
}

/// Three nodes, and what cuts one of them off.
async fn start() -> (Group, Cuts) {
    let (directory, peers, cuts) = (Directory::new(), free_addresses(3).await, Cuts::default());
    let mut group = Group { directory, peers, running: vec![None, None, None] };
    for at in 0..3 {
        let config = config(at as u64 + 1, group.directory.path(), &group.peers);
        let env = Env { net: Arc::new(CutNet { node: at, cuts: cuts.clone() }), ..env(at as u64 + 1) };
        group.running[at] = Some(baton_coordinator::start(config, env).await.unwrap());
    }
    (group, cuts)
}

/// Nothing passes between this node and the others any more; whoever asks it from outside still can.
fn cut_off(group: &Group, cuts: &Cuts, node: usize) {
    let address = |at: usize| group.peers[at].1.clone();
    let others = (0..3).filter(|at| *at != node);
    cuts.lock().unwrap().extend(others.flat_map(|other| [(node, address(other)), (other, address(node))]));
}

/// The leader among the nodes beside `node`.
async fn leader_beside(group: &Group, node: usize) -> usize {
    wait_for("the others to elect one of them", || async {
        for at in (0..3).filter(|at| *at != node) {
            let view = group.client(at).view().await?;
            if view.leader == view.node {
                return Some(at);
            }
        }
        None
    })
    .await
}

/// Goal: a leader that was deposed and does not know it answers neither where a request is, nor a repeated question, nor
/// that a life is over that it has never heard of. Method: it is cut off, the others move a request and end another one,
/// and it is asked about both.
#[tokio::test(flavor = "multi_thread")]
async fn a_deposed_leader_answers_nothing_from_its_own_ledger() {
    let (mut group, cuts) = start().await;
    let old = group.leader().await;
    let mut deposed = group.client(old);
    deposed.register("decode-0", "k").await.unwrap();
    let asked = |id| v1::AssignRequest { tenant: "t".into(), ..request(id, 1) };
    let first = deposed.assign(asked(1)).await.unwrap();
    let second = deposed.assign(asked(2)).await.unwrap();
    assert_eq!(deposed.assign(asked(1)).await.unwrap().epoch, first.epoch, "while it leads, it says so again");
    assert_eq!(deposed.locate(1, "", "t").await.unwrap().epoch, first.epoch);
    cut_off(&group, &cuts, old);
    let new = leader_beside(&group, old).await;
    let next = v1::AssignRequest { attempt: 2, previous_epoch: first.epoch, ..asked(1) };
    let moved = wait_for("the new leader to move it", || async {
        let mut client = group.client(new);
        // Nobody sends its heartbeats.
        client.try_register("decode-0", "k").await?;
        client.assign(next.clone()).await.ok()
    })
    .await;
    assert!(moved.epoch > first.epoch);
    wait_for("the new leader to end the other one", || async { group.client(new).finish(2, second.epoch).await.ok() })
        .await;
    let later = wait_for("a worker that only the new leader knows", || async {
        group.client(new).try_register("decode-1", "k").await
    })
    .await;

    for id in [1, 2] {
        let again = deposed.assign(asked(id)).await.unwrap_err();
        assert!(["unavailable", "not_leader"].contains(&again.reason.as_str()), "{again:?}");
        let located = deposed.locate(id, "", "t").await.unwrap_err();
        assert!(["unavailable", "not_leader"].contains(&located.as_str()), "{located}");
    }
    let never_seen = deposed.locate(9, "", "t").await.unwrap_err();
    assert!(["unavailable", "not_leader"].contains(&never_seen.as_str()), "{never_seen}");
    let beat = deposed.beat("decode-1", later, 1).await;
    assert!(beat.as_ref().is_ok_and(|accepted| !accepted.leader), "{beat:?}");
    assert_eq!(group.client(new).locate(1, "", "t").await.unwrap().epoch, moved.epoch);
    assert_eq!(group.client(new).locate(2, "", "t").await, Err("unknown".into()));
    group.stop_all().await;
}

/// Goal: whoever listens to a coordinator for keys knows within a second that it hears of revocations no more, and hears of
/// them from the others. Method: a follower and then the leader are cut off; each says nothing after its last word, though
/// nothing is reset.
#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_is_cut_off_has_no_word_on_keys() {
    for leads in [false, true] {
        let (mut group, cuts) = start().await;
        let leader = group.leader().await;
        let node = if leads { leader } else { (leader + 1) % 3 };
        let mut words = group.client(node).listen(50).await;
        let told = words.message().await.unwrap().unwrap();
        assert!(told.open && !told.unchanged && told.word_ms == 50, "{told:?}");
        for _ in 0..3 {
            let word = words.message().await.unwrap().unwrap();
            assert!(word.unchanged && word.word_ms == 50 && word.keys.is_empty(), "{word:?}");
        }
        let since = Instant::now();
        cut_off(&group, &cuts, node);
        // Its stream ends by itself; what counts is when it said something for the last time.
        let mut last = since;
        while let Ok(Ok(Some(word))) = timeout(Duration::from_secs(5), words.message()).await {
            assert!(word.unchanged, "{word:?}");
            last = Instant::now();
        }
        assert!(last - since < Duration::from_millis(600), "the last word came {:?} after the cut", last - since);
        let new = leader_beside(&group, node).await;
        let limits = v1::Tenant { name: "t".into(), ..Default::default() };
        wait_for("the others to go on", || async {
            admin(&group.peers[new].1).set_tenant(limits.clone()).await.ok()?.into_inner().outcome
        })
        .await;
        wait_for("one of the others to tell of it", || async {
            let mut access = group.client(new).listen(50).await;
            (access.message().await.ok()??.tenants.len() == 1).then_some(())
        })
        .await;
        let mut late = group.client(node).listen(50).await;
        let silent = timeout(Duration::from_secs(5), late.message()).await.expect("it ends");
        assert!(silent.is_err(), "{silent:?}");
        group.stop_all().await;
    }
}

/// Goal: a command that names another cluster is refused, whatever it asks for, and one that names none is served, as
/// earlier versions do. Method: every call of gateways and workers to one coordinator.
#[tokio::test]
async fn commands_of_another_cluster_are_refused() {
    let directory = Directory::new();
    let running = crate::group::start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let incarnation = client.register("decode-0", "k").await.unwrap();
    let own = client.view().await.unwrap().cluster;
    assert!(!own.is_empty());
    assert_eq!(client.assign(request(1, 1)).await.unwrap().cluster, own, "assignments say whose they are");
    for (cluster, expected) in [("", true), (own.as_str(), true), ("another", false)] {
        let said = client.say_as(cluster, incarnation).await;
        let wrong: Vec<_> =
            said.iter().filter(|(_, refused)| (refused.as_deref() != Some("foreign")) != expected).collect();
        assert!(wrong.is_empty(), "as {cluster:?}: {wrong:?}");
    }
    assert_eq!(client.view().await.unwrap().requests_open, 1, "nothing of another cluster's has happened");
    running.stop().await;
}

/// Goal: while the workers of one model are all lost and another model is served, a request for the lost one is told to come
/// again; one for a model that nobody has ever served is told that there is none.
#[tokio::test]
async fn a_lost_model_is_not_an_unknown_one() {
    let directory = Directory::new();
    let running = crate::group::start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let of_model = |id: &str, model: &str| {
        let mut member = crate::group::member(id);
        member.model.as_mut().unwrap().name = model.into();
        member
    };
    client.register_as(of_model("decode-0", "lost"), "k").await.unwrap();
    let lives = client.register_as(of_model("decode-1", "m"), "k").await.unwrap();
    let sequence = AtomicU64::new(0);
    wait_for("the silent worker to be fenced", || async {
        let mut client = client.clone();
        client.beat("decode-1", lives, sequence.fetch_add(1, Ordering::Relaxed) + 1).await.ok()?;
        let view = client.view().await?;
        let silent = view.members.iter().find(|one| one.member.as_ref().is_some_and(|member| member.id == "decode-0"));
        silent.is_some_and(|one| !one.live).then_some(())
    })
    .await;
    let of = |id, model: &str| v1::AssignRequest { model: model.into(), ..request(id, 1) };
    let since = Instant::now();
    let refused = client.assign(of(1, "lost")).await.unwrap_err();
    assert_eq!(refused.reason, "no_workers", "{refused:?}");
    assert!(refused.retry_after_ms > 0 && since.elapsed() < Duration::from_secs(1), "{refused:?}");
    assert_eq!(client.assign(of(2, "never")).await.unwrap_err().reason, "unknown_model");
    assert!(client.assign(of(3, "m")).await.is_ok());
    running.stop().await;
}
