//! Calls that a coordinator must not follow: each is refused with its reason's word and counted, and changes nothing.

use std::sync::Arc;

use baton_core::Net;
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::v1::raft_client::RaftClient;
use baton_proto::v1::{
    AssignRequest, Blob, FinishRequest, FinishedRequest, HeartbeatRequest, KeyId, Load, Member, ModelSummary,
    RegisterRequest, Role, TenantName, assign_reply, done, heartbeat_reply, register_reply,
};
use baton_proto::{TcpNet, WIRE_VERSION, channel};
use baton_tests::{Fleet, Shape};
use tonic::transport::Channel;

const NODE: &str = "coordinator-1";

fn member(id: &str, address: &str) -> Member {
    let model = ModelSummary {
        name: "m".into(),
        card_hash: "c".into(),
        numerics: "n".into(),
        block_tokens: 16,
        positions_max: 4096,
        layout: "l".into(),
        blocks_total: 1000,
        block_bytes: 1,
        ..ModelSummary::default()
    };
    Member {
        id: id.into(),
        role: Role::Decode.into(),
        address: address.into(),
        pid: 1,
        version: "1".into(),
        model: Some(model),
        ..Member::default()
    }
}

type Client = CoordinatorClient<Channel>;

/// The incarnation, or the reason of the refusal.
async fn register(client: &mut Client, request: RegisterRequest) -> Result<u64, String> {
    match client.register(request).await.expect("it answers").into_inner().outcome.expect("an outcome") {
        register_reply::Outcome::Registered(registered) => Ok(registered.incarnation),
        register_reply::Outcome::Refused(refusal) => Err(refusal.reason),
    }
}

async fn beat(client: &mut Client, member: Member, incarnation: u64, sequence: u64) -> Result<(), String> {
    let load = Load { blocks_total: 1000, blocks_free: 1000, ..Load::default() };
    let id = member.id.clone();
    let request =
        HeartbeatRequest { id, incarnation, sequence, load: Some(load), member: Some(member), ..Default::default() };
    match client.heartbeat(request).await.expect("it answers").into_inner().outcome.expect("an outcome") {
        heartbeat_reply::Outcome::Accepted(_) => Ok(()),
        heartbeat_reply::Outcome::Refused(refusal) => Err(refusal.reason),
    }
}

/// Goal: another cluster's worker, another wire version, a name in use, an older life, a heartbeat that was overtaken, and
/// a message of another group are refused, each with its own reason and in its own counter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_the_past_are_refused_and_counted() {
    let fleet = Fleet::start(&Shape { prefill: 0, decode: 0, gateways: 0, ..Shape::default() }).await;
    let connect = || channel(Arc::new(TcpNet), &fleet.address(NODE)).expect("an address");
    let mut client = CoordinatorClient::new(connect());
    let here = "127.0.0.1:1";
    let asks = |cluster: &str, wire_version: u32, address: &str, process_key: &str| RegisterRequest {
        cluster: cluster.into(),
        wire_version,
        member: Some(member("decode-0", address)),
        process_key: process_key.into(),
    };
    let registrations = async |why: &str| {
        fleet.metric(NODE, "baton_coordinator_registrations_refused_total", &format!("\"{why}\"")).await
    };

    let foreign = register(&mut client, asks("another", WIRE_VERSION, here, "k")).await;
    assert_eq!((foreign, registrations("cluster").await), (Err("incompatible".into()), 1.0));
    let newer = register(&mut client, asks("", WIRE_VERSION + 1, here, "k")).await;
    assert_eq!((newer, registrations("wire_version").await), (Err("incompatible".into()), 1.0));

    // A name is held by whoever listens: this one does.
    let holder = TcpNet.listen("127.0.0.1:0").await.expect("loopback");
    let held = holder.address();
    let first = register(&mut client, asks("", WIRE_VERSION, &held, "k")).await.expect("nobody has the name");
    beat(&mut client, member("decode-0", &held), first, 5).await.expect("it is in force");
    let second = register(&mut client, asks("", WIRE_VERSION, here, "other")).await;
    assert_eq!((second, registrations("duplicate_id").await), (Err("unavailable".into()), 1.0));

    let beats =
        async |why: &str| fleet.metric(NODE, "baton_coordinator_heartbeats_refused_total", &format!("\"{why}\"")).await;
    let overtaken = beat(&mut client, member("decode-0", &held), first, 4).await;
    assert_eq!((overtaken, beats("expired").await), (Err("expired".into()), 1.0));
    let later = register(&mut client, asks("", WIRE_VERSION, &held, "restarted")).await.expect("it follows itself");
    assert!(later > first);
    let older = beat(&mut client, member("decode-0", &held), first, 6).await;
    assert_eq!((older, beats("stale").await), (Err("stale".into()), 1.0));
    let unknown = beat(&mut client, member("decode-9", here), 1, 1).await;
    assert_eq!((unknown, beats("fenced").await), (Err("fenced".into()), 1.0));
    beat(&mut client, member("decode-0", &held), later, 1).await.expect("the life in force is untouched");
    // Nobody listens there any more: whoever comes next need not wait until the silence is long enough.
    drop(holder);
    let moved = register(&mut client, asks("", WIRE_VERSION, here, "other")).await.expect("the name is free at once");
    assert!(moved > later);

    let ends = async |request: u128, epoch: u64| {
        let request = format!("{request:032x}");
        let ended = FinishedRequest { request, epoch, outcome: "complete".into(), ..Default::default() };
        CoordinatorClient::new(connect())
            .finish(FinishRequest { requests: vec![ended], ..Default::default() })
            .await
            .expect("it answers");
        let counted = async |name| fleet.metric(NODE, name, "").await;
        [counted("baton_coordinator_finished_total").await, counted("baton_coordinator_finishes_refused_total").await]
    };
    let ask = AssignRequest {
        request: format!("{:032x}", 9),
        attempt: 1,
        model: "m".into(),
        prompt_tokens: 10,
        tokens_max: 10,
        choices: 1,
        deadline_ms: 60_000,
        gateway: "g".into(),
        ..Default::default()
    };
    let other = AssignRequest { gateway: "h".into(), ..ask.clone() };
    let granted = client.assign(ask).await.expect("it answers").into_inner().outcome;
    let Some(assign_reply::Outcome::Assignment(granted)) = granted else { panic!("refused: {granted:?}") };
    let refused = client.assign(other).await.expect("it answers").into_inner().outcome;
    assert!(matches!(&refused, Some(assign_reply::Outcome::Refused(why)) if why.reason == "stale"), "{refused:?}");
    assert_eq!(fleet.metric(NODE, "baton_coordinator_refused_total", "reason=\"stale\"").await, 1.0);
    assert_eq!(ends(9, granted.epoch + 1).await, [0.0, 1.0], "another epoch ends nothing");
    assert_eq!(ends(9, granted.epoch).await, [1.0, 1.0]);

    let mut admin = AdminClient::new(connect());
    let unknown = KeyId { id: "nobody".into() };
    let refused = admin.revoke_key(unknown).await.expect("it answers").into_inner().outcome;
    assert!(matches!(&refused, Some(done::Outcome::Refused(why)) if why.reason == "unknown"), "{refused:?}");
    admin.remove_tenant(TenantName { name: "a b".into() }).await.expect_err("it is no name");
    for (command, reason) in [("revoke_key", "unknown"), ("remove_tenant", "malformed")] {
        let label = format!("command=\"{command}\",reason=\"{reason}\"");
        assert_eq!(fleet.metric(NODE, "baton_coordinator_commands_refused_total", &label).await, 1.0, "{label}");
    }

    let mut raft = RaftClient::new(connect());
    let newer = Blob { data: vec![99; 8].into(), cluster: String::new(), to: 1 };
    let refused = raft.vote(newer).await.expect_err("nobody here can read it");
    assert!(refused.message().contains("version 99"), "{refused}");
    assert_eq!(fleet.metric(NODE, "baton_coordinator_foreign_messages_total", "\"version\"").await, 1.0);
    for (kind, cluster, to) in [("cluster", "another", 1), ("node", "", 7)] {
        let blob = Blob { data: vec![0; 8].into(), cluster: cluster.into(), to };
        let refused = raft.vote(blob).await.expect_err("it is not for this node");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
        let counted = fleet.metric(NODE, "baton_coordinator_foreign_messages_total", &format!("\"{kind}\"")).await;
        assert_eq!(counted, 1.0, "{kind}");
    }
}

/// Goal: `baton sim show | head` ends with `head`, without a word, and so does every command that only tells. Method: nobody
/// reads from the first byte on. A full disk in its place is an error that says so.
#[test]
fn a_closed_output_ends_it_quietly() {
    for command in ["sim show --seed 1 --profile calm", "doctor"] {
        let mut telling = std::process::Command::new(baton_tests::cluster::binary());
        telling.args(["--log", "error"]).args(command.split(' '));
        telling.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut telling = telling.spawn().expect("the binary runs");
        drop(telling.stdout.take());
        let output = telling.wait_with_output().expect("it ends");
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*error), (Some(141), ""), "{command}");
    }
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    let mut telling = std::process::Command::new(baton_tests::cluster::binary());
    let output = telling.arg("doctor").stdout(full).output().expect("it runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.starts_with("error: standard output cannot be written"), "{error}");
}
