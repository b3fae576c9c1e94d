//! Registration, heartbeats, and the end of a life.

use baton_core::{BlockHash, Refused};
use baton_engine::Work;
use baton_engine::testing::{request, work};
use baton_proto::v1::worker_client::WorkerClient;
use baton_proto::v1::{CardRequest, Order};
use baton_worker::outlet::{Phases, outlet};
use baton_worker::testing::FakeCoordinator;
use baton_worker::{Ending, Error, Running, StartError, Submission};

use crate::{config, eventually, net, start, start_with};

/// Computes a prompt of `blocks` full blocks, whose hashes are returned.
async fn compute(worker: &Running, id: u128, blocks: u32) -> Vec<BlockHash> {
    let prompt: Vec<u32> = (0..blocks * 4).map(|token| token + id as u32).collect();
    let request = request(id, &prompt, 1);
    let (outlet, _inlet) = outlet(16);
    let started = tokio::time::Instant::now();
    let Work { choices, goal, filled, request, moved } = work(&request);
    let work = Work { choices, goal, filled, request: request.clone(), moved };
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
    assert!(matches!(first.ending().await, Err(Error::Superseded)));
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

/// A worker that was fenced drops what it has, and its process goes on as a new life with the same model.
#[tokio::test]
async fn a_fenced_worker_comes_back_as_a_new_life() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let mut first = start(config(&[&coordinator])).await.unwrap();
    let shell = first.shell().clone();
    let (outlet, mut inlet) = outlet(1024);
    let submission = Submission {
        work: work(&request(1, &[1, 2, 3], 1000)),
        outlet,
        tag: 0,
        phases: Phases::default(),
        started: tokio::time::Instant::now(),
    };
    let admission = shell.engine.submit(submission).unwrap();
    inlet.next().await.unwrap();
    coordinator.fence("prefill-0");
    assert_eq!(first.ending().await.unwrap(), Ending::Fenced);
    shell.closed().await;
    let left = first.end(Ending::Fenced).await.unwrap();
    assert!(!coordinator.has_left("prefill-0"));
    assert!(shell.engine.submit(submission_of(2)).is_err());
    drop(admission);
    let second = start_with(config(&[&coordinator]), left.model).await.unwrap();
    assert_eq!((second.shell().incarnation.0, coordinator.registrations()), (2, 2));
    compute(&second, 3, 2).await;
}

fn submission_of(id: u128) -> Submission {
    let (outlet, _) = outlet(16);
    let started = tokio::time::Instant::now();
    Submission { work: work(&request(id, &[1], 1)), outlet, tag: 0, phases: Phases::default(), started }
}

#[tokio::test]
async fn an_order_to_drain_ends_the_worker_in_peace() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let mut worker = start(config(&[&coordinator])).await.unwrap();
    coordinator.order("prefill-0", Order::Drain);
    assert_eq!(worker.ending().await.unwrap(), Ending::Drained);
    assert!(!coordinator.has_left("prefill-0"));
    worker.end(Ending::Drained).await.unwrap();
    assert!(coordinator.has_left("prefill-0"));
}

#[tokio::test]
async fn golden_tokens_are_registered() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let _first = start(config(&[&coordinator])).await.unwrap();
    let golden = || coordinator.member("prefill-0").unwrap().model.unwrap().canary_tokens;
    let first = golden();
    let _second = start(config(&[&coordinator])).await.unwrap();
    assert_eq!((first.len(), golden()), (4, first));
}

/// Heartbeats are messages of one call; when it ends they begin another.
#[tokio::test]
async fn heartbeats_keep_to_one_call() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let _worker = start(config(&[&coordinator])).await.unwrap();
    eventually("heartbeats come", || coordinator.beats() > 4).await;
    assert_eq!(coordinator.beat_calls(), 1);
    coordinator.end_beat_calls();
    let before = coordinator.beats();
    eventually("they go on", || coordinator.beats() > before + 4).await;
    assert_eq!(coordinator.beat_calls(), 2);
}

/// A coordinator of the release before knows no call for many heartbeats: it hears each by one of its own. The one that
/// replaces it hears them by one call again.
#[tokio::test]
async fn a_coordinator_of_an_earlier_release_hears_heartbeats_too() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    coordinator.be_earlier();
    let worker = start(config(&[&coordinator])).await.unwrap();
    let told = compute(&worker, 1, 5).await;
    eventually("the index has arrived", || told.iter().all(|hash| coordinator.index("prefill-0").contains(hash))).await;
    assert_eq!(coordinator.beat_calls(), 0);
    assert!(coordinator.load("prefill-0").is_some());
    coordinator.be_replaced();
    eventually("heartbeats keep to one call", || coordinator.beat_calls() == 1).await;
}

/// A coordinator that joins hears from the worker, one that is off the list does not any more.
#[tokio::test]
async fn heartbeats_follow_the_list_of_coordinators() {
    let net = net();
    let (first, second) = (FakeCoordinator::start(&net).await.unwrap(), FakeCoordinator::start(&net).await.unwrap());
    let worker = start(config(&[&first])).await.unwrap();
    assert_eq!(second.beats(), 0);
    first.list(&[&first, &second]);
    second.list(&[&second]);
    eventually("the second hears of it", || second.beats() > 0).await;
    eventually("the first is left alone", || {
        let (before, others) = (first.beats(), second.beats());
        // Both would be due in so many of the second's heartbeats.
        first.beats() == before && others > 8
    })
    .await;
    assert!(first.beats() < second.beats());
    let left = worker.end(Ending::Drained).await.unwrap();
    assert_eq!(left.coordinators, [second.address()]);
    assert!(second.has_left("prefill-0") && !first.has_left("prefill-0"));
}

/// Nobody answers: the worker serves on for its grace, and then stops taking part.
#[tokio::test]
async fn a_worker_that_nobody_answers_ends_after_its_grace() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let sizes = baton_worker::Config { autonomy_ms: 1_500, ..config(&[&coordinator]) };
    let mut worker = start(sizes).await.unwrap();
    let since = tokio::time::Instant::now();
    drop(coordinator);
    compute(&worker, 1, 2).await;
    assert_eq!(worker.ending().await.unwrap(), Ending::Alone);
    assert!(since.elapsed().as_millis() >= 1_200, "{:?}", since.elapsed());
    worker.shell().closed().await;
}
