//! Registration, heartbeats, and the end of a life.

use baton_core::{BlockHash, Refused};
use baton_engine::Work;
use baton_engine::testing::{request, work};
use baton_proto::v1::CardRequest;
use baton_proto::v1::worker_client::WorkerClient;
use baton_worker::outlet::{Phases, outlet};
use baton_worker::testing::FakeCoordinator;
use baton_worker::{Error, Running, StartError, Submission};

use crate::{config, eventually, net, start};

/// Computes a prompt of `blocks` full blocks, whose hashes are returned.
async fn compute(worker: &Running, id: u128, blocks: u32) -> Vec<BlockHash> {
    let prompt: Vec<u32> = (0..blocks * 4).map(|token| token + id as u32).collect();
    let request = request(id, &prompt, 1);
    let (outlet, _inlet) = outlet(16);
    let started = tokio::time::Instant::now();
    let Work { choices, goal, filled, request } = work(&request);
    let work = Work { choices, goal, filled, request: request.clone() };
    let submission = Submission { work, outlet, tag: 0, phases: Phases::default(), started };
    worker.shell().engine.submit(submission).unwrap().ended().await;
    BlockHash::chain(&request.cache_salt, &prompt, 4)
}

#[tokio::test]
async fn registers_with_the_leader_after_being_sent_on() {
    let net = net();
    let (follower, leader) = (FakeCoordinator::start(&net).await.unwrap(), FakeCoordinator::start(&net).await.unwrap());
    follower.refuse(Some((Refused::NotLeader, &leader.address())));
    let worker = start(config(&[&follower])).await.unwrap();
    assert_eq!((follower.registrations(), leader.registrations()), (1, 1));
    assert_eq!(worker.shell().incarnation.0, 1);
}

#[tokio::test]
async fn keeps_asking_until_it_is_accepted() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    coordinator.refuse(Some((Refused::Unavailable, "")));
    let starting = tokio::spawn(start(config(&[&coordinator])));
    eventually("it has asked three times", || coordinator.registrations() >= 3).await;
    assert!(!starting.is_finished());
    coordinator.refuse(None);
    assert!(starting.await.unwrap().is_ok());
}

#[tokio::test]
async fn another_version_is_fatal() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    coordinator.refuse(Some((Refused::Incompatible, "")));
    assert!(matches!(start(config(&[&coordinator])).await, Err(StartError::Incompatible(_))));
}

#[tokio::test]
async fn a_busy_port_and_a_bad_config_are_named() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let busy = baton_worker::Config { listen: coordinator.address(), ..config(&[&coordinator]) };
    let error = start(busy).await.err().unwrap().to_string();
    assert!(error.contains(&coordinator.address()), "{error}");
    let error = start(config(&[])).await.err().unwrap().to_string();
    assert!(error.contains("coordinators"), "{error}");
    assert_eq!(coordinator.registrations(), 0);
}

#[tokio::test]
async fn a_later_life_ends_the_earlier_one() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let mut first = start(config(&[&coordinator])).await.unwrap();
    let _second = start(config(&[&coordinator])).await.unwrap();
    assert!(matches!(first.stopped().await, Err(Error::Superseded)));
    first.shell().closed().await;
}

#[tokio::test]
async fn heartbeats_carry_load_and_index() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let worker = start(config(&[&coordinator])).await.unwrap();
    let first = compute(&worker, 1, 5).await;
    let told = |hashes: &[BlockHash]| {
        let index = coordinator.index("prefill-0");
        hashes.iter().all(|hash| index.contains(hash))
    };
    eventually("the index has arrived", || told(&first)).await;
    let second = compute(&worker, 100, 7).await;
    eventually("its change has arrived", || told(&second) && told(&first)).await;
    eventually("the load has arrived", || coordinator.load("prefill-0").is_some_and(|load| load.blocks_cached == 12))
        .await;
    let load = coordinator.load("prefill-0").unwrap();
    assert_eq!((load.blocks_total, load.blocks_free, load.blocks_used, load.blocks_in_flight), (64, 52, 0, 0));
    assert!(load.steps >= 2 && load.prefill_tokens_per_s > 0 && !load.index_reset, "{load:?}");
    coordinator.want_index(true);
    eventually("the whole index is told", || coordinator.load("prefill-0").is_some_and(|load| load.index_reset)).await;
    assert_eq!(coordinator.index("prefill-0").len(), 12);
}

#[tokio::test]
async fn a_worker_that_stops_says_so() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let worker = start(config(&[&coordinator])).await.unwrap();
    let address = worker.address();
    worker.stop().await;
    assert!(coordinator.has_left("prefill-0"));
    assert!(net().connect(&address).await.is_err());
}

#[tokio::test]
async fn the_card_is_served() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let worker = start(config(&[&coordinator])).await.unwrap();
    let channel = baton_proto::channel(net(), &worker.address()).unwrap();
    let card = WorkerClient::new(channel).card(CardRequest {}).await.unwrap().into_inner();
    assert_eq!((card.name.as_str(), card.hash.as_str()), ("hash", "card"));
}
