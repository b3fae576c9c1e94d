//! What leaves placement although it is alive: pairs whose canary fails, workers that make no step. And what a new
//! leader knows from its first moment.

use std::collections::BTreeMap;
use std::future::pending;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_core::{BlockHash, Net, canary};
use baton_proto::convert::block_hash_bytes;
use baton_proto::server::Bound;
use baton_proto::v1::decode_server::{Decode, DecodeServer};
use baton_proto::v1::generate_command::Command;
use baton_proto::v1::request_output::Output;
use baton_proto::{TcpNet, v1};
use futures::{Stream, StreamExt};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use crate::group::{Client, Directory, Group, config, member, request, start};
use crate::wait_for;

const GOLDEN: [u32; 4] = [5, 6, 7, 8];

/// How a fake decode worker treats a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Good,
    Wrong,
    Hang,
    Refuse,
    Abort,
    Full,
}

/// A decode worker that answers as it is told to, by the prefill worker named in the assignment.
#[derive(Clone, Default)]
struct Fake {
    moods: Arc<Mutex<BTreeMap<String, Mood>>>,
    heard: Arc<Mutex<Vec<v1::Start>>>,
}

impl Fake {
    async fn serve(&self) -> (String, JoinHandle<()>) {
        let listener = TcpNet.listen("127.0.0.1:0").await.unwrap();
        let address = listener.address();
        let service = DecodeServer::new(self.clone());
        (address, tokio::spawn(baton_proto::server::serve(listener, Bound::uncounted(), service, pending())))
    }

    fn set(&self, prefill: &str, mood: Mood) {
        self.moods.lock().unwrap().insert(prefill.into(), mood);
    }

    fn count(&self) -> usize {
        self.heard.lock().unwrap().len()
    }

    fn answer(&self, start: v1::Start) -> Vec<Output> {
        let prefill = start.assignment.as_ref().unwrap().prefill.as_ref();
        let prefill = prefill.map_or(String::new(), |place| place.worker.clone());
        self.heard.lock().unwrap().push(start);
        let mood = self.moods.lock().unwrap().get(&prefill).copied().unwrap_or(Mood::Good);
        let say = |ids: [u32; 4]| {
            let tokens = ids.map(|id| v1::Token { id, ..Default::default() }).to_vec();
            vec![Output::Tokens(v1::Tokens { choice: 0, tokens }), Output::Finished(v1::ChoiceFinished::default())]
        };
        let refusal = |reason: &str| Output::Refused(v1::Refusal { reason: reason.into(), ..Default::default() });
        match mood {
            Mood::Good => say(GOLDEN),
            Mood::Wrong => say([5, 6, 7, 9]),
            Mood::Hang => vec![],
            Mood::Refuse => vec![refusal("incompatible")],
            Mood::Full => vec![refusal("no_capacity")],
            Mood::Abort => vec![Output::Aborted(v1::Abort { reason: "transfer_failed".into(), ..Default::default() })],
        }
    }
}

#[tonic::async_trait]
impl Decode for Fake {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::StepOutput, Status>> + Send>>;

    async fn generate(
        &self,
        commands: Request<Streaming<v1::GenerateCommand>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let fake = self.clone();
        let answers = commands.into_inner().map(move |command| {
            let Some(Command::Start(start)) = command?.command else {
                return Err(Status::invalid_argument("not a start"));
            };
            let outputs = fake.answer(start).into_iter();
            let outputs = outputs.map(|output| v1::RequestOutput { handle: 1, output: Some(output) }).collect();
            Ok(v1::StepOutput { outputs })
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// A worker that knows its golden tokens.
fn golden(id: &str, address: &str) -> v1::Member {
    let mut member = member(id);
    member.address = address.into();
    let model = member.model.as_mut().unwrap();
    (model.canary_tokens, model.vocab) = (GOLDEN.to_vec(), 100);
    member
}

/// Sends heartbeats of these lives to these coordinators until it is dropped.
struct Heart(JoinHandle<()>);

impl Heart {
    fn beat(clients: Vec<Client>, lives: Vec<(&'static str, u64, v1::Load)>) -> Heart {
        Heart(tokio::spawn(async move {
            let mut rounds = tokio::time::interval(Duration::from_millis(100));
            for sequence in 2.. {
                rounds.tick().await;
                for (id, incarnation, load) in &lives {
                    for client in &clients {
                        // A coordinator that has stopped, or a life that is over, is what some tests are about.
                        drop(client.clone().try_beat(id, *incarnation, sequence, load.clone()).await);
                    }
                }
            }
        }))
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn idle() -> v1::Load {
    v1::Load { blocks_total: 1000, blocks_free: 1000, ..Default::default() }
}

async fn pair_is(client: &Client, prefill: &str, decode: &str, state: &str) -> v1::PairView {
    wait_for(&format!("{prefill}-{decode} {state}"), || async {
        let view = client.clone().view().await?;
        view.pairs.into_iter().find(|pair| pair.prefill == prefill && pair.decode == decode && pair.state == state)
    })
    .await
}

/// The prefill worker that a new request gets.
async fn prefill_of(client: &Client, id: u128) -> String {
    let assigned = client.clone().assign(request(id, 1)).await.unwrap();
    client.clone().finish(id, assigned.epoch).await.unwrap();
    assigned.prefill.map_or(String::new(), |place| place.worker)
}

/// Goal: a pair whose canary comes back wrong, refused, broken or not at all leaves placement within 5 s, is tried on,
/// and returns with the first good one; a full worker is not a broken one.
#[tokio::test(flavor = "multi_thread")]
async fn a_pair_is_placed_on_while_its_canary_sings() {
    let directory = Directory::new();
    let mut settings = config(1, directory.path(), &[]);
    settings.policy.canary_ms = 200;
    let running = start(settings).await;
    let mut client = Client::new(&running.address());
    let fake = Fake::default();
    let (address, _serving) = fake.serve().await;
    let mut lives = Vec::new();
    for id in ["decode-0", "prefill-0", "prefill-1"] {
        lives.push((id, client.register_as(golden(id, &address), "k").await.unwrap(), idle()));
    }
    let _heart = Heart::beat(vec![client.clone()], lives);
    for (nth, mood) in (0..).zip([Mood::Wrong, Mood::Refuse, Mood::Abort, Mood::Hang]) {
        pair_is(&client, "prefill-0", "decode-0", "good").await;
        assert_eq!(prefill_of(&client, 10 * nth + 1).await, "prefill-0");
        fake.set("prefill-0", mood);
        let since = Instant::now();
        let told = pair_is(&client, "prefill-0", "decode-0", "broken").await;
        assert!(since.elapsed() < Duration::from_secs(5), "{mood:?} took {:?}", since.elapsed());
        assert!(told.reason.contains("canary"), "{told:?}");
        assert_eq!(prefill_of(&client, 10 * nth + 2).await, "prefill-1");
        assert!(!client.view().await.unwrap().broken);
        fake.set("prefill-0", Mood::Good);
    }
    pair_is(&client, "prefill-0", "decode-0", "good").await;
    fake.set("prefill-0", Mood::Full);
    let before = fake.count();
    wait_for("canaries that find it full", || async { (fake.count() > before + 8).then_some(()) }).await;
    pair_is(&client, "prefill-0", "decode-0", "good").await;
    let heard = fake.heard.lock().unwrap().clone();
    let mut salts: Vec<_> = heard.iter().map(|start| start.request.as_ref().unwrap().cache_salt.clone()).collect();
    let asked = heard[0].request.as_ref().unwrap();
    assert_eq!((&asked.prompt, asked.tokens_max, asked.tenant.as_str()), (&canary::prompt(100, 4096), 4, ""));
    salts.sort_unstable();
    salts.dedup();
    assert_eq!(salts.len(), heard.len(), "no cache can answer for the link");
    running.stop().await;
}

/// Goal: where the last decode worker fails even by itself nothing is placed and the view says so; it comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_decode_worker_that_fails_by_itself_takes_nothing() {
    let directory = Directory::new();
    let mut settings = config(1, directory.path(), &[]);
    settings.policy.canary_ms = 200;
    let running = start(settings).await;
    let mut client = Client::new(&running.address());
    let fake = Fake::default();
    let (address, _serving) = fake.serve().await;
    let decode = client.register_as(golden("decode-0", &address), "k").await.unwrap();
    let _heart = Heart::beat(vec![client.clone()], vec![("decode-0", decode, idle())]);
    pair_is(&client, "", "decode-0", "good").await;
    assert!(client.assign(request(1, 1)).await.is_ok());
    fake.set("", Mood::Wrong);
    pair_is(&client, "", "decode-0", "broken").await;
    let view = client.view().await.unwrap();
    let told = view.members.iter().find(|m| m.member.as_ref().unwrap().id == "decode-0").unwrap();
    assert!(view.broken && view.canary_age_ms.is_some());
    assert_eq!(told.trouble, "its canary fails");
    assert_eq!(client.assign(request(2, 1)).await.unwrap_err().reason, "no_workers");
    fake.set("", Mood::Good);
    pair_is(&client, "", "decode-0", "good").await;
    assert!(!client.view().await.unwrap().broken);
    assert!(client.assign(request(2, 1)).await.is_ok());
    running.stop().await;
}

/// Goal: a request whose handoff failed leaves its pair at once, and so do the next requests.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_handoff_breaks_its_pair_for_all() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let mut lives = Vec::new();
    for id in ["decode-0", "prefill-0", "prefill-1"] {
        lives.push((id, client.register(id, "k").await.unwrap(), idle()));
    }
    let life = |nth: usize| Some(v1::WorkerLife { id: lives[nth].0.into(), incarnation: lives[nth].1 });
    let pair = v1::WorkerPair { prefill: life(1), decode: life(0) };
    let first = client.assign(request(1, 1)).await.unwrap();
    assert_eq!(first.prefill.unwrap().worker, "prefill-0");
    let again = v1::AssignRequest { exclude_pairs: vec![pair], previous_epoch: first.epoch, ..request(1, 2) };
    assert_eq!(client.assign(again).await.unwrap().prefill.unwrap().worker, "prefill-1");
    assert_eq!(prefill_of(&client, 2).await, "prefill-1");
    assert!(pair_is(&client, "prefill-0", "decode-0", "broken").await.reason.contains("handoff"));
    running.stop().await;
}

/// Goal: a worker that answers but makes no step takes nothing and is fenced, and so it stays when the same process
/// comes back. Method: its heartbeats go on with a running sequence and the same count of steps.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_makes_no_step_is_fenced() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let stuck = client.register("decode-0", "k").await.unwrap();
    let works = client.register("decode-1", "k").await.unwrap();
    let hung = v1::Load { steps: 7, sequences_running: 1, ..idle() };
    let lives = vec![("decode-0", stuck, hung.clone()), ("decode-1", works, idle())];
    let _heart = Heart::beat(vec![client.clone()], lives);
    let trouble = |client: Client| async move {
        let view = client.clone().view().await?;
        view.members.into_iter().find(|m| m.member.as_ref().unwrap().id == "decode-0")
    };
    wait_for("it is out of placement", || async {
        (trouble(client.clone()).await?.trouble == "has work and makes no step").then_some(())
    })
    .await;
    assert_eq!(client.assign(request(1, 1)).await.unwrap().decode.unwrap().worker, "decode-1");
    wait_for("it is fenced", || async { (!trouble(client.clone()).await?.live).then_some(()) }).await;
    let again = client.register("decode-0", "k").await.unwrap();
    assert!(again > stuck);
    client.beat_with("decode-0", again, 1, hung).await.unwrap();
    assert_eq!(client.assign(request(2, 1)).await.unwrap().decode.unwrap().worker, "decode-1");
    client.beat_with("decode-0", again, 2, v1::Load { steps: 8, ..idle() }).await.unwrap();
    wait_for("a step frees it", || async { trouble(client.clone()).await?.trouble.is_empty().then_some(()) }).await;
    running.stop().await;
}

/// Prompts whose blocks one of the decode workers holds.
fn prompts(holder: u32) -> Vec<Vec<BlockHash>> {
    let prompt = |nth: u32| (0..96).map(|at| holder * 1_000_000 + nth * 1_000 + at).collect::<Vec<u32>>();
    (0..20).map(|nth| BlockHash::chain("", &prompt(nth), 16)).collect()
}

/// Of 40 prompts, how many go where their blocks are.
async fn hits(client: &Client, first: u128) -> u32 {
    let mut hits = 0;
    let asked = prompts(0).into_iter().map(|p| (p, "decode-0")).chain(prompts(1).into_iter().map(|p| (p, "decode-1")));
    for (id, (chain, holder)) in (first..).zip(asked) {
        let block_hashes = chain.into_iter().map(block_hash_bytes).collect();
        let assigned = client.clone().assign(v1::AssignRequest { block_hashes, ..request(id, 1) }).await.unwrap();
        hits += u32::from(assigned.decode.unwrap().worker == holder);
        client.clone().finish(id, assigned.epoch).await.unwrap();
    }
    hits
}

/// Goal: a new leader is warm: it knows which worker holds what, which pairs are broken, and every worker's blocks.
/// Method: workers tell all three nodes once what they hold; the leader stops; the same prompts are asked again.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_knows_what_the_last_one_knew() {
    let mut group = Group::start().await;
    let leader = group.leader().await;
    let mut client = group.client(leader);
    let mut lives = Vec::new();
    for (nth, id) in (0..).zip(["decode-0", "decode-1", "prefill-0"]) {
        let incarnation = client.register(id, "k").await.unwrap();
        lives.push((id, incarnation, idle()));
        let held = if nth < 2 { prompts(nth).concat() } else { vec![] };
        let blocks_added = held.into_iter().map(block_hash_bytes).collect();
        let load = v1::Load { blocks_added, index_reset: true, ..idle() };
        for at in 0..3 {
            let all = || async { group.client(at).try_beat(id, incarnation, 1, load.clone()).await.ok() };
            wait_for("the node hears it", all).await;
        }
    }
    let life = |nth: usize| Some(v1::WorkerLife { id: lives[nth].0.into(), incarnation: lives[nth].1 });
    let pair = v1::WorkerPair { prefill: life(2), decode: life(0) };
    client.assign(v1::AssignRequest { exclude_pairs: vec![pair], ..request(1, 1) }).await.unwrap();
    let _heart = Heart::beat((0..3).map(|at| group.client(at)).collect(), lives.clone());
    let before = hits(&client, 100).await;
    assert_eq!(before, 40);
    let followers: Vec<usize> = (0..3).filter(|at| *at != leader).collect();
    for at in &followers {
        pair_is(&group.client(*at), "prefill-0", "decode-0", "broken").await;
    }
    group.stop(leader).await;
    let leader = group.leader().await;
    let client = group.client(leader);
    wait_for("the new leader assigns", || async { client.clone().assign(request(2, 1)).await.ok() }).await;
    let view = client.clone().view().await.unwrap();
    assert!(view.pairs.iter().any(|pair| pair.prefill == "prefill-0" && pair.state == "broken"), "{:?}", view.pairs);
    for told in &view.members {
        assert_eq!(told.load.as_ref().unwrap().blocks_total, 1000, "{told:?}");
    }
    let after = hits(&client, 200).await;
    assert!(before - after <= 1, "{after} of 40 prompts find their blocks, {before} before");
    group.stop_all().await;
}
