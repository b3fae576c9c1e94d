//! Whatever goes wrong, the request ends with one word and both caches are free again.

use baton_core::{Aborted, Incarnation, Place, Refused, Request, RequestId, Role};
use baton_engine::EngineConfig;
use baton_engine::testing::request;
use baton_proto::v1::WorkerLife;
use baton_worker::testing::hash_model;

use crate::cluster::{Cluster, SIZES, eventually};
use crate::gate::Point;
use crate::gateway::{Gateway, Order, Told};

fn order(cluster: &Cluster, id: u128) -> Order {
    let prompt: Vec<u32> = (0..50).map(|i| (i * 13 + id as u32) % 1000).collect();
    Order::new(request(id, &prompt, 400), &cluster.decodes[0], Some(&cluster.prefills[0]))
}

/// How a gateway gives a request up.
#[derive(Clone, Copy, Debug)]
enum GiveUp {
    Cancel,
    BreakStream,
}

async fn give_up(mut gateway: Gateway, handle: u32, how: GiveUp) {
    match how {
        GiveUp::Cancel => {
            gateway.cancel(handle);
            // The stream goes on: another request ends by its own means.
            std::mem::forget(gateway);
        }
        GiveUp::BreakStream => drop(gateway),
    }
}

const BOTH: [GiveUp; 2] = [GiveUp::Cancel, GiveUp::BreakStream];

/// Holds the prefill worker at each point of its work; the gateway gives up there.
#[tokio::test]
async fn giving_up_while_prefill_works_frees_both_caches() {
    let cluster = Cluster::start(1, 1).await;
    let prefill = &cluster.prefills[0];
    let points = [Point::Step, Point::Layer(1), Point::Layer(2)];
    for (id, (point, how)) in points.into_iter().flat_map(|point| BOTH.map(|how| (point, how))).enumerate() {
        prefill.gate.hold(point);
        let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
        let handle = gateway.start(&order(&cluster, id as u128 + 1));
        prefill.gate.held().await;
        assert!(cluster.decodes[0].stats().in_flight > 0, "{point:?} {how:?}");
        give_up(gateway, handle, how).await;
        // Decode does not wait for the prefill worker's engine.
        eventually("decode holds nothing", || cluster.decodes[0].stats().in_flight == 0).await;
        prefill.gate.open();
        cluster.is_clean().await;
    }
}

#[tokio::test]
async fn giving_up_while_decode_works_frees_both_caches() {
    let cluster = Cluster::start(1, 1).await;
    for (id, how) in BOTH.into_iter().enumerate() {
        let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
        let handle = gateway.start(&order(&cluster, id as u128 + 1));
        gateway.until(handle, |told| told.tokens.get(&0).is_some_and(|tokens| tokens.len() > 2)).await;
        give_up(gateway, handle, how).await;
        cluster.is_clean().await;
    }
}

/// One request is cancelled, another on the same stream is not touched by it.
#[tokio::test]
async fn cancelling_one_request_leaves_the_others() {
    let cluster = Cluster::start(1, 1).await;
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let (first, second) = (gateway.start(&order(&cluster, 1)), gateway.start(&order(&cluster, 2)));
    gateway.until(first, |told| !told.tokens.is_empty()).await;
    gateway.cancel(first);
    assert_eq!(gateway.finish(second).await.tokens[&0].len(), 400);
    cluster.is_clean().await;
}

#[tokio::test]
async fn a_prefill_worker_that_dies_in_the_middle_is_named() {
    for point in [Point::Step, Point::Layer(1)] {
        let mut cluster = Cluster::start(1, 1).await;
        cluster.prefills[0].gate.hold(point);
        let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
        let order = order(&cluster, 1);
        let handle = gateway.start(&order);
        cluster.prefills[0].gate.held().await;
        cluster.prefills[0].kill();
        let told = gateway.finish(handle).await;
        assert_eq!(told.aborted(), Aborted::PrefillLost, "{point:?}: {told:?}");
        let life = WorkerLife::from(order.prefill.as_ref().unwrap());
        assert_eq!(told.aborted.unwrap().failed, Some(life));
        assert!(told.tokens.is_empty());
        cluster.prefills[0].gate.open();
        cluster.prefills.clear();
        cluster.is_clean().await;
        // The decode worker is as good as before.
        let local = Order { prefill: None, epoch: 2, ..order };
        assert_eq!(gateway.run(&local).await.tokens[&0].len(), 400);
    }
}

/// No request waits for a link to be made: a prefill worker hears of the decode workers, which come after it, with its heartbeats.
#[tokio::test]
async fn links_are_made_before_they_are_needed() {
    let cluster = Cluster::start(1, 2).await;
    let links = || cluster.coordinator.load("prefill-0").map_or(String::new(), |load| load.links);
    eventually("both are linked", || links().contains("up: shm 2")).await;
}

/// It is done without, but the request has not killed it: that would be a strike against the request.
#[tokio::test]
async fn a_prefill_worker_that_is_not_there_refuses() {
    let mut cluster = Cluster::start(1, 1).await;
    let order = order(&cluster, 1);
    cluster.prefills[0].kill();
    // Its runtime ends beside this one: until the listener is closed, a connection is taken and then reset.
    let address = order.prefill.as_ref().unwrap().address.clone();
    while cluster.net.connect(&address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let told = gateway.run(&order).await;
    assert_eq!(told.aborted(), Aborted::PrefillRefused);
    assert_eq!(told.aborted.unwrap().failed, Some(order.prefill.as_ref().unwrap().into()));
    cluster.prefills.clear();
    cluster.is_clean().await;
}

#[tokio::test]
async fn only_this_life_under_the_newest_epoch_is_served() {
    let cluster = Cluster::start(1, 1).await;
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let order = order(&cluster, 1);
    let newest = Order { epoch: 5, ..order.clone() };
    assert_eq!(gateway.run(&newest).await.tokens[&0].len(), 400);
    let older = Order { epoch: 4, ..order.clone() };
    assert_eq!(gateway.run(&older).await.refused(), Refused::Stale);
    let mut other_life = Order { epoch: 6, ..order.clone() };
    other_life.decode.incarnation = Incarnation(other_life.decode.incarnation.0 + 1);
    assert_eq!(gateway.run(&other_life).await.refused(), Refused::Stale);
    let mut other_worker = Order { epoch: 6, ..order.clone() };
    other_worker.decode.worker.0 = "decode-9".into();
    assert_eq!(gateway.run(&other_worker).await.refused(), Refused::Stale);
    let mut other_prefill = another(&order, 2);
    other_prefill.prefill.as_mut().unwrap().incarnation = Incarnation(9);
    let told = gateway.run(&other_prefill).await;
    assert_eq!(told.aborted(), Aborted::PrefillRefused);
    assert!(told.aborted.unwrap().detail.starts_with("stale"));
    cluster.is_clean().await;
}

/// The order under another id and with another prompt, so that nothing of it is held yet.
fn another(order: &Order, id: u128) -> Order {
    let prompt: Vec<u32> = order.request.prompt.iter().map(|token| (token + id as u32 * 17) % 1000).collect();
    Order { request: Request { id: RequestId(id), prompt: prompt.into(), ..order.request.clone() }, ..order.clone() }
}

/// A newer assignment of the same request takes the place of the older one.
#[tokio::test]
async fn a_newer_epoch_supersedes_a_running_request() {
    let cluster = Cluster::start(1, 1).await;
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let older = order(&cluster, 1);
    // It stands still in its midst: a test that asks for that once it runs may find it finished.
    let gate = &cluster.decodes[0].gate;
    gate.hold(Point::After(gate.steps() + 20));
    let first = gateway.start(&older);
    gate.held().await;
    let second = gateway.start(&Order { epoch: 2, prefill: None, ..older });
    gate.open();
    assert_eq!(gateway.finish(second).await.tokens[&0].len(), 400);
    // Either the older one had finished by then, or it was told why it ended.
    let older = gateway.told(first);
    assert!(older.finished.len() == 1 || older.aborted() == Aborted::Superseded, "{older:?}");
    cluster.is_clean().await;
}

#[tokio::test]
async fn too_few_blocks_are_refused_at_once() {
    let sizes = EngineConfig { blocks: 128, ..SIZES };
    let cluster = Cluster::of(1, 1, sizes, hash_model).await;
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let large = |id: u128, len: u32| Order {
        request: Request { tokens_max: 4, ..request(id, &vec![id as u32; len as usize], 4) },
        ..order(&cluster, id)
    };
    assert_eq!(gateway.run(&large(1, 600)).await.refused(), Refused::TooLarge);
    assert_eq!(gateway.run(&large(2, 4096)).await.refused(), Refused::TooLarge);
    cluster.prefills[0].gate.hold(Point::Step);
    let first = gateway.start(&large(3, 400));
    cluster.prefills[0].gate.held().await;
    assert_eq!(gateway.run(&large(4, 400)).await.refused(), Refused::NoCapacity);
    cluster.prefills[0].gate.open();
    assert_eq!(gateway.finish(first).await.tokens[&0].len(), 4);
    cluster.is_clean().await;
}

#[tokio::test]
async fn the_deadline_ends_a_request_in_every_phase() {
    let cluster = Cluster::start(1, 1).await;
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let hasty = |id| {
        let order = order(&cluster, id);
        Order { request: Request { deadline_ms: 150, ..order.request }, ..order }
    };
    cluster.prefills[0].gate.hold(Point::Layer(1));
    let told: Told = gateway.run(&hasty(1)).await;
    assert_eq!(told.aborted(), Aborted::Deadline, "{told:?}");
    cluster.prefills[0].gate.open();
    cluster.is_clean().await;
    cluster.decodes[0].gate.hold(Point::Step);
    let handle = gateway.start(&hasty(2));
    cluster.decodes[0].gate.held().await;
    eventually("the deadline has passed", {
        let since = tokio::time::Instant::now();
        move || since.elapsed().as_millis() > 200
    })
    .await;
    cluster.decodes[0].gate.open();
    assert_eq!(gateway.finish(handle).await.aborted(), Aborted::Deadline);
    let expired = order(&cluster, 3);
    let expired = Order { request: Request { deadline_ms: 0, ..expired.request }, ..expired };
    assert_eq!(gateway.run(&expired).await.refused(), Refused::Expired);
    cluster.is_clean().await;
}

/// A worker that is asked to stop finishes what it has, refuses what comes, and then ends its streams.
#[tokio::test]
async fn a_worker_that_stops_finishes_its_requests() {
    let cluster = Cluster::start(1, 1).await;
    let config = cluster.config(Role::Decode, "decode-9", SIZES);
    let running = baton_decode_worker::start(config, hash_model(), cluster.env()).await.unwrap();
    let shell = running.shell().clone();
    let place = Place { worker: shell.id.clone(), incarnation: shell.incarnation, address: running.address() };
    let mut gateway = Gateway::to(&cluster, &running.address()).await;
    cluster.prefills[0].gate.hold(Point::Step);
    let order = Order { decode: place, ..order(&cluster, 1) };
    let first = gateway.start(&order);
    cluster.prefills[0].gate.held().await;
    let stopping = tokio::spawn(running.stop());
    let late = gateway.run(&another(&order, 2)).await;
    assert_eq!(late.refused(), Refused::Draining);
    cluster.prefills[0].gate.open();
    assert_eq!(gateway.finish(first).await.tokens[&0].len(), 400);
    assert_eq!(gateway.ended().await.unwrap_err().code(), tonic::Code::Unavailable);
    stopping.await.unwrap();
    assert!(cluster.coordinator.has_left("decode-9"));
    let stats = shell.engine.cache().stats();
    assert_eq!((stats.used, stats.in_flight), (0, 0));
    cluster.is_clean().await;
}
