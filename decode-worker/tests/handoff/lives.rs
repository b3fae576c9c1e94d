//! Lives that end while requests run: drained, fenced, or turned into the other role. The bytes stay the same.

use baton_core::{Aborted, Place, Refused, Role};
use baton_engine::HashBackend;
use baton_engine::testing::{hash_spec, request};
use baton_proto::v1;
use baton_worker::testing::hash_model;
use baton_worker::{Config, Ending, LoadedModel, Running};

use crate::cluster::{Cluster, SIZES, eventually};
use crate::gate::{Gate, Gated, Point};
use crate::gateway::{Gateway, Order, alone};

fn place(running: &Running) -> Place {
    let shell = running.shell();
    Place { worker: shell.id.clone(), incarnation: shell.incarnation, address: running.address() }
}

fn order(id: u128, decode: Place, prefill: Option<Place>) -> Order {
    let prompt: Vec<u32> = (0..50).map(|i| (i * 13 + id as u32) % 1000).collect();
    let request = request(id, &prompt, 300);
    let choices = vec![baton_engine::Choice::default()];
    Order { request, choices, decode, prefill, epoch: 1, resumable_ms: 0 }
}

fn expected(order: &Order) -> Vec<v1::Token> {
    let spec = hash_spec();
    alone(spec.clone(), SIZES, &mut HashBackend::new(spec.vocab), order).remove(&0).unwrap()
}

async fn decode(cluster: &Cluster, config: Config, gate: &Gate) -> Running {
    let model = hash_model();
    let backend = Box::new(Gated { backend: model.backend, gate: gate.clone() });
    baton_decode_worker::start(config, LoadedModel { backend, ..model }, cluster.env()).await.unwrap()
}

/// A request that outlasts the drain is given back; another worker goes on where it was, with the same bytes.
#[tokio::test]
async fn a_drain_gives_back_what_does_not_finish_in_time() {
    let cluster = Cluster::start(1, 1).await;
    let gate = Gate::default();
    let config = Config { drain_ms: 1, ..cluster.config(Role::Decode, "decode-9", SIZES) };
    let mut running = decode(&cluster, config, &gate).await;
    let mut gateway = Gateway::to(&cluster, &running.address()).await;
    let first = order(1, place(&running), Some(cluster.prefills[0].place()));
    gate.hold(Point::Step);
    let handle = gateway.start(&first);
    gateway.until(handle, |told| !told.tokens.is_empty()).await;
    gate.held().await;
    cluster.coordinator.order("decode-9", v1::Order::Drain);
    assert_eq!(running.ending().await.unwrap(), Ending::Drained);
    let shell = running.shell().clone();
    let ending = tokio::spawn(running.end(Ending::Drained));
    eventually("it says that it drains", || cluster.coordinator.load("decode-9").is_some_and(|load| load.draining))
        .await;
    gate.open();
    let told = gateway.finish(handle).await;
    assert_eq!(told.aborted(), Aborted::Draining, "{told:?}");
    ending.await.unwrap().unwrap();
    assert!(cluster.coordinator.has_left("decode-9"));
    let stats = shell.engine.cache().stats();
    assert_eq!((stats.used, stats.in_flight), (0, 0));
    // What the gateway does next.
    let mut tokens = told.tokens[&0].clone();
    let so_far = tokens.iter().map(|token| token.id).collect();
    let choices = vec![baton_engine::Choice { index: 0, so_far }];
    let second = Order { choices, epoch: 2, decode: cluster.decodes[0].place(), ..first.clone() };
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    tokens.extend(gateway.run(&second).await.tokens.remove(&0).unwrap_or_default());
    assert_eq!(tokens, expected(&first));
    cluster.is_clean().await;
}

/// A prefill worker becomes a decode worker and a prefill worker again, with one backend; each time it serves.
#[tokio::test]
async fn a_worker_changes_its_role_and_keeps_its_model() {
    let cluster = Cluster::start(1, 1).await;
    let config = |role| cluster.config(role, "worker-9", SIZES);
    let mut running = decode(&cluster, config(Role::Decode), &Gate::default()).await;
    let mut gateway = Gateway::to(&cluster, &running.address()).await;
    let first = order(1, place(&running), None);
    assert_eq!(gateway.run(&first).await.tokens[&0], expected(&first));
    cluster.coordinator.order("worker-9", v1::Order::BecomePrefill);
    let ending = running.ending().await.unwrap();
    assert_eq!(ending, Ending::Becomes(Role::Prefill));
    let left = running.end(ending).await.unwrap();
    let mut running = baton_prefill_worker::start(config(Role::Prefill), left.model, cluster.env()).await.unwrap();
    assert_eq!(running.shell().incarnation.0, 2);
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let second = order(2, cluster.decodes[0].place(), Some(place(&running)));
    let told = gateway.run(&second).await;
    assert_eq!(told.tokens[&0], expected(&second));
    assert!(!told.admitted.unwrap().local_prefill);
    cluster.coordinator.order("worker-9", v1::Order::BecomeDecode);
    let ending = running.ending().await.unwrap();
    let left = running.end(ending).await.unwrap();
    let running = baton_decode_worker::start(config(Role::Decode), left.model, cluster.env()).await.unwrap();
    let mut gateway = Gateway::to(&cluster, &running.address()).await;
    let third = order(3, place(&running), Some(cluster.prefills[0].place()));
    assert_eq!(gateway.run(&third).await.tokens[&0], expected(&third));
    cluster.is_clean().await;
}

/// A worker that was away too long: its stream ends, nothing meant for that life is served by the next one, which
/// serves anew.
#[tokio::test]
async fn a_fenced_worker_ends_its_streams_and_serves_as_a_new_life() {
    let cluster = Cluster::start(1, 1).await;
    let config = || cluster.config(Role::Decode, "decode-9", SIZES);
    let gate = Gate::default();
    let mut running = decode(&cluster, config(), &gate).await;
    let mut gateway = Gateway::to(&cluster, &running.address()).await;
    let first = order(1, place(&running), Some(cluster.prefills[0].place()));
    gate.hold(Point::Step);
    let handle = gateway.start(&first);
    gateway.until(handle, |told| !told.tokens.is_empty()).await;
    gate.held().await;
    cluster.coordinator.fence("decode-9");
    assert_eq!(running.ending().await.unwrap(), Ending::Fenced);
    // What had been said before the fence is still read; the step that is held, and what follows, is not.
    assert_eq!(gateway.ended().await.unwrap_err().code(), tonic::Code::Unavailable);
    assert_eq!(gateway.told(handle).tokens[&0].len(), 1);
    gate.open();
    let left = running.end(Ending::Fenced).await.unwrap();
    let running = baton_decode_worker::start(config(), left.model, cluster.env()).await.unwrap();
    let mut gateway = Gateway::to(&cluster, &running.address()).await;
    let stale = Order { decode: Place { address: running.address(), ..first.decode.clone() }, ..first.clone() };
    assert_eq!(gateway.run(&stale).await.refused(), Refused::Stale);
    let again = order(2, place(&running), Some(cluster.prefills[0].place()));
    assert_eq!(gateway.run(&again).await.tokens[&0], expected(&again));
    cluster.is_clean().await;
}
