//! Groups that change while they work.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use baton_coordinator::{Join, Running, StartError, Stopped};
use baton_core::NodeId;
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::{TcpNet, v1};

use crate::group::{Client, Directory, Group, config, env, free_addresses, start, try_start};
use crate::load::Load;
use crate::wait_for;

async fn try_join(
    data: &Path,
    listen: &str,
    via: &str,
    replaces: Option<u64>,
    seed: u64,
) -> Result<Running, StartError> {
    let config = baton_coordinator::Config { data: data.to_path_buf(), listen: listen.into(), ..config(1, data, &[]) };
    let join = Join { via: vec![via.into()], replaces: replaces.map(NodeId) };
    baton_coordinator::join(config, join, env(seed)).await
}

/// A group that began as one node and has grown since.
struct Grown {
    directory: Directory,
    nodes: Vec<(PathBuf, String, Running)>,
}

impl Grown {
    async fn begin() -> Grown {
        let directory = Directory::new();
        let address = free_addresses(1).await.remove(0).1;
        let config = baton_coordinator::Config { listen: address.clone(), ..config(1, directory.path(), &[]) };
        let nodes = vec![(config.data.clone(), address, start(config).await)];
        Grown { directory, nodes }
    }

    async fn join(&mut self) -> u64 {
        let data = self.directory.path().join(format!("joined-{}", self.nodes.len()));
        let address = free_addresses(1).await.remove(0).1;
        let via = self.nodes[0].1.clone();
        let running = try_join(&data, &address, &via, None, 100 + self.nodes.len() as u64).await.unwrap();
        let node = running.node().0;
        self.nodes.push((data, address, running));
        self.voters(self.nodes.len()).await;
        node
    }

    fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|(_, address, _)| address.clone()).collect()
    }

    /// Waits until all nodes agree that so many vote and that nobody else is a member.
    async fn voters(&self, count: usize) {
        wait_for("the group has its voters", || async {
            for address in self.addresses() {
                let view = Client::new(&address).view().await?;
                let voters = view.coordinators.iter().filter(|c| c.voter).count();
                if voters != count || view.coordinators.len() != count || view.leader == 0 {
                    return None;
                }
            }
            Some(())
        })
        .await;
    }

    async fn leave(&mut self, node: u64) -> Result<(), Stopped> {
        remove(&self.addresses(), node).await.unwrap();
        let at = self.nodes.iter().position(|(_, _, running)| running.node().0 == node).unwrap();
        let (_, _, mut running) = self.nodes.remove(at);
        let ended = tokio::time::timeout(Duration::from_secs(10), running.stopped()).await;
        self.voters(self.nodes.len()).await;
        ended.expect("a removed node ends")
    }

    async fn leader(&self) -> u64 {
        Client::new(&self.nodes[0].1).view().await.unwrap().leader
    }

    async fn stop(self) {
        for (_, _, running) in self.nodes {
            running.stop().await;
        }
    }
}

fn admin(address: &str) -> AdminClient<tonic::transport::Channel> {
    AdminClient::new(baton_proto::channel(Arc::new(TcpNet), address).unwrap())
}

/// Asks each in turn, until the leader has answered.
async fn remove(addresses: &[String], node: u64) -> Result<(), v1::Refusal> {
    leader_done(addresses, |mut admin| async move { admin.remove_node(v1::NodeNumber { node }).await }).await
}

async fn transfer(addresses: &[String], node: u64) -> Result<(), v1::Refusal> {
    leader_done(addresses, |mut admin| async move { admin.transfer_leader(v1::NodeNumber { node }).await }).await
}

async fn leader_done<F>(
    addresses: &[String],
    call: impl Fn(AdminClient<tonic::transport::Channel>) -> F,
) -> Result<(), v1::Refusal>
where
    F: Future<Output = Result<tonic::Response<v1::Done>, tonic::Status>>,
{
    wait_for("the leader's answer", || async {
        for address in addresses {
            let Ok(done) = call(admin(address)).await else { continue };
            match done.into_inner().outcome.unwrap() {
                v1::done::Outcome::Done(_) => return Some(Ok(())),
                v1::done::Outcome::Refused(refused)
                    if matches!(refused.reason.as_str(), "not_leader" | "unavailable") => {}
                v1::done::Outcome::Refused(refused) => return Some(Err(refused)),
            }
        }
        None
    })
    .await
}

/// Goal: a group grows from one to three to five and shrinks to three under load without losing anything it has
/// acknowledged, and without a pause longer than an election. Method: the founder and a leader are among those that leave.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_grows_and_shrinks_under_load() {
    let mut group = Grown::begin().await;
    let load = Load::start(&group.addresses()).await;
    for expected in 2..=5 {
        assert_eq!(group.join().await, expected, "numbers in order");
        load.more(20).await;
    }
    let full = try_join(&group.directory.path().join("sixth"), "127.0.0.1:0", &group.nodes[0].1, None, 9).await;
    assert!(full.err().unwrap().to_string().contains("5 coordinators vote already"));
    let leader = group.leader().await;
    let other = if leader == 1 { 2 } else { 1 };
    for node in [leader, other] {
        assert_eq!(group.leave(node).await, Err(Stopped::Removed(NodeId(node))));
        load.more(20).await;
    }
    let acknowledged = load.stop_and_check(&group.addresses()).await;
    assert!(acknowledged.gap < Duration::from_secs(3), "{:?} without an assignment", acknowledged.gap);
    println!("longest time without an assignment: {:?}", acknowledged.gap);
    assert_eq!(remove(&group.addresses(), 77).await.unwrap_err().reason, "unknown");
    group.stop().await;
}

/// Goal: joining goes on where it stopped, under the same number, also when the group's answer was all that was had.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn joining_again_on_the_same_directory_goes_on() {
    let mut group = Grown::begin().await;
    let node = group.join().await;
    let (data, address, running) = group.nodes.pop().unwrap();
    running.stop().await;
    let again = try_join(&data, &address, &group.nodes[0].1, None, 7).await.unwrap();
    assert_eq!(again.node().0, node);
    group.nodes.push((data.clone(), address.clone(), again));
    group.voters(2).await;

    // What a crash between the group's answer and the identity file leaves: only the key.
    let third = group.directory.path().join("third");
    let address = free_addresses(1).await.remove(0).1;
    let asked = v1::AddNodeRequest { address: address.clone(), process_key: "key".into(), replaces: 0 };
    let added = wait_for("a number", || async {
        for address in group.addresses() {
            let Ok(reply) = admin(&address).add_node(asked.clone()).await else { continue };
            if let Some(v1::add_node_reply::Outcome::Added(added)) = reply.into_inner().outcome {
                return Some(added);
            }
        }
        None
    })
    .await;
    std::fs::create_dir_all(&third).unwrap();
    std::fs::write(third.join("joining"), "key").unwrap();
    let running = try_join(&third, &address, &group.nodes[0].1, None, 8).await.unwrap();
    assert_eq!(running.node().0, added.node);
    group.nodes.push((third.clone(), address.clone(), running));
    group.voters(3).await;

    // Once it has taken part, a number without its log is of no use.
    let (_, _, running) = group.nodes.pop().unwrap();
    running.stop().await;
    for name in std::fs::read_dir(&third).unwrap().map(|entry| entry.unwrap().path()) {
        if name.extension().is_some_and(|extension| extension == "log") {
            std::fs::remove_file(name).unwrap();
        }
    }
    let refused = try_join(&third, &address, &group.nodes[0].1, None, 8).await.err().unwrap();
    assert!(refused.to_string().contains("has taken part before"), "{refused}");
    let plain = baton_coordinator::Config { node: NodeId(added.node), data: third, ..config(1, data.as_path(), &[]) };
    let refused = try_start(plain).await.err().unwrap();
    assert!(matches!(refused, StartError::Lost { .. }), "{refused}");

    // A directory of a node that never joined is not taken for one that did.
    let other = config(1, group.directory.path(), &[]).data;
    let founder = group.nodes.remove(0);
    founder.2.stop().await;
    let refused = try_join(&other, &founder.1, &group.nodes[0].1, None, 8).await.err().unwrap();
    assert!(refused.to_string().contains("belongs to node 1"), "{refused}");
    group.stop().await;
}

/// Why a node is not let in: at its start, or a little later where the others took their time to answer.
async fn not_let_in(config: baton_coordinator::Config) -> String {
    match try_start(config).await {
        Err(refused) => refused.to_string(),
        Ok(mut running) => {
            let ended = tokio::time::timeout(Duration::from_secs(10), running.stopped()).await;
            ended.expect("it ends by itself").unwrap_err().to_string()
        }
    }
}

/// Goal: a node whose directory was emptied does not take part again; it is replaced under a new number, at its own
/// address, and the old number stays refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_node_is_refused_and_replaced() {
    let mut group = Group::start().await;
    let lost = (group.leader().await + 1) % 3;
    let number = lost as u64 + 1;
    let others: Vec<String> = (0..3).filter(|at| *at != lost).map(|at| group.peers[at].1.clone()).collect();
    let load = Load::start(&others).await;
    // A node that holds nothing yet has nothing to lose and may begin anew.
    wait_for("the node holds a part of the ledger", || async {
        (group.client(lost).view().await?.ledger_index > 0).then_some(())
    })
    .await;
    group.stop(lost).await;
    let emptied = config(number, group.directory.path(), &group.peers);
    std::fs::remove_dir_all(&emptied.data).unwrap();
    let refused = not_let_in(emptied.clone()).await;
    assert!(refused.contains(&format!("baton coordinator replace {number}")), "{refused}");

    let data = group.directory.path().join("new");
    let new = try_join(&data, &group.peers[lost].1, &others[0], Some(number), 9).await.unwrap();
    assert_eq!(new.node(), NodeId(4));
    wait_for("the new one votes and the old one is gone", || async {
        let view = Client::new(&others[0]).view().await?;
        let voters: Vec<u64> = view.coordinators.iter().filter(|c| c.voter).map(|c| c.id).collect();
        (voters.contains(&4) && !voters.contains(&number) && view.coordinators.len() == 3).then_some(())
    })
    .await;
    load.more(20).await;
    load.stop_and_check(&others).await;
    new.stop().await;
    let refused = not_let_in(emptied).await;
    assert!(refused.contains(&format!("node {number} was removed")), "{refused}");
    group.stop_all().await;
}

/// Goal: leadership goes where it is asked to, without an election's pause; nobody else is asked to lead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_goes_where_it_is_asked_to() {
    let mut group = Group::start().await;
    let leader = group.leader().await as u64 + 1;
    let addresses: Vec<String> = group.peers.iter().map(|(_, address)| address.clone()).collect();
    let load = Load::start(&addresses).await;
    let next = leader % 3 + 1;
    transfer(&addresses, next).await.unwrap();
    assert_eq!(group.leader().await as u64 + 1, next);
    load.more(10).await;
    transfer(&addresses, 0).await.unwrap();
    assert_ne!(group.leader().await as u64 + 1, next);
    load.more(10).await;
    assert_eq!(transfer(&addresses, 9).await.unwrap_err().reason, "unknown");
    let acknowledged = load.stop_and_check(&addresses).await;
    assert!(acknowledged.gap < Duration::from_secs(3), "{:?} without an assignment", acknowledged.gap);
    group.stop_all().await;
}

/// Goal: no change is made after which a majority would be missing. Method: one of three is down; the leader must stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_would_lose_the_majority_is_refused() {
    let mut group = Group::start().await;
    let leader = group.leader().await;
    let down = (leader + 1) % 3;
    group.stop(down).await;
    let up = (leader + 2) % 3;
    wait_for("the leader notices that one is down", || async {
        let view = group.client(leader).view().await?;
        let silent = |c: &&v1::CoordinatorNode| c.id == down as u64 + 1 && c.silent_ms > 1000;
        view.coordinators.iter().find(silent).map(drop)
    })
    .await;
    let mut client = admin(&group.peers[leader].1);
    let reply = client.remove_node(v1::NodeNumber { node: up as u64 + 1 }).await.unwrap();
    let Some(v1::done::Outcome::Refused(refused)) = reply.into_inner().outcome else {
        panic!("two of three would be left, one of them down");
    };
    assert!(refused.detail.contains("no majority"), "{}", refused.detail);
    let view = group.client(leader).view().await.unwrap();
    assert_eq!(view.coordinators.iter().filter(|c| c.voter).count(), 3);
    remove(&[group.peers[leader].1.clone()], down as u64 + 1).await.unwrap();
    group.stop_all().await;
}
