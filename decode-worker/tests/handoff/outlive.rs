//! Requests that outlive their gateway: another one takes them over with every byte; nobody else does, and not for ever.

use baton_core::{Aborted, Refused, Request, RequestId, Sampling};
use baton_engine::HashBackend;
use baton_engine::testing::{hash_spec, request};

use crate::cluster::{Cluster, SIZES, eventually};
use crate::gate::Point;
use crate::gateway::{Gateway, NOTE, Order, alone};

const WINDOW_MS: u64 = 300_000;

fn order(cluster: &Cluster, id: u128, choices: u32) -> Order {
    let prompt: Vec<u32> = (0..50).map(|i| (i * 13 + id as u32) % 1000).collect();
    let sampling = Sampling { temperature: 0.7, seed: 5, ..Sampling::default() };
    let request = Request { choices, sampling, ..request(id, &prompt, 60) };
    let order = Order::new(request, &cluster.decodes[0], Some(&cluster.prefills[0]));
    Order { resumable_ms: WINDOW_MS, ..order }
}

/// The gateway dies at some token; a second one takes over while the worker stands still, a third one after the end.
#[tokio::test]
async fn another_gateway_takes_over_with_every_byte() {
    let cluster = Cluster::start(1, 1).await;
    let gate = &cluster.decodes[0].gate;
    for choices in [1, 3] {
        let order = order(&cluster, choices.into(), choices);
        let spec = hash_spec();
        let expected = alone(spec.clone(), SIZES, &mut HashBackend::new(spec.vocab), &order);
        gate.hold(Point::Step);
        let mut first = Gateway::connect(&cluster, &cluster.decodes[0]).await;
        let handle = first.start(&order);
        first.until(handle, |told| told.tokens.len() == choices as usize).await;
        gate.held().await;
        drop(first);
        let mut second = Gateway::connect(&cluster, &cluster.decodes[0]).await;
        let handle = second.resume(order.request.id, "tenant", choices as usize);
        let resumed = second.until(handle, |told| told.resumed.is_some()).await.resumed.unwrap();
        assert_eq!((&resumed.note[..], resumed.choices.len()), (NOTE, choices as usize));
        assert_eq!(resumed.request.unwrap().id, order.request.id.to_string());
        assert!(resumed.admitted.is_some_and(|admitted| !admitted.local_prefill));
        assert!(resumed.tokens.iter().all(|tokens| tokens.tokens.len() == 1));
        gate.open();
        let told = second.finish(handle).await;
        assert_eq!((told.tokens, told.finished.len()), (expected.clone(), choices as usize));
        drop(second);
        let mut third = Gateway::connect(&cluster, &cluster.decodes[0]).await;
        let handle = third.resume(order.request.id, "tenant", choices as usize);
        assert_eq!(third.finish(handle).await.tokens, expected);
    }
    cluster.is_clean().await;
}

/// A stream that is taken over from a gateway that lives tells it so.
#[tokio::test]
async fn a_gateway_that_lives_is_told_that_it_was_replaced() {
    let cluster = Cluster::start(1, 1).await;
    let order = order(&cluster, 1, 1);
    cluster.decodes[0].gate.hold(Point::Step);
    let mut first = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let handle = first.start(&order);
    first.until(handle, |told| !told.tokens.is_empty()).await;
    let mut second = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let taken = second.resume(order.request.id, "tenant", 1);
    assert_eq!(first.finish(handle).await.aborted(), Aborted::Superseded);
    drop(first);
    cluster.decodes[0].gate.open();
    assert_eq!(second.finish(taken).await.tokens[&0].len(), 60);
    cluster.is_clean().await;
}

#[tokio::test]
async fn nobody_else_takes_over_and_nothing_outlives_its_window() {
    let cluster = Cluster::start(1, 1).await;
    let gate = &cluster.decodes[0].gate;
    let mut second = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let cases = [(WINDOW_MS, "other", false), (0, "tenant", true), (50, "tenant", true)];
    for (id, (resumable_ms, tenant, ends)) in cases.into_iter().enumerate() {
        let order = Order { resumable_ms, ..order(&cluster, id as u128 + 1, 1) };
        gate.hold(Point::Step);
        let mut first = Gateway::connect(&cluster, &cluster.decodes[0]).await;
        let handle = first.start(&order);
        first.until(handle, |told| !told.tokens.is_empty()).await;
        gate.held().await;
        drop(first);
        if ends {
            // The engine is told at its next step at the latest.
            let since = tokio::time::Instant::now();
            eventually("its window is over", || since.elapsed().as_millis() > 200).await;
            gate.open();
            cluster.is_clean().await;
        }
        let handle = second.resume(order.request.id, tenant, 1);
        assert_eq!(second.finish(handle).await.refused(), Refused::Unknown, "{resumable_ms} ms, {tenant}");
        gate.open();
        if !ends {
            // Its own tenant may, and may end it.
            let handle = second.resume(order.request.id, "tenant", 1);
            second.until(handle, |told| told.resumed.is_some()).await;
            second.cancel(handle);
        }
        cluster.is_clean().await;
    }
    let unknown = second.resume(RequestId(99), "tenant", 1);
    assert_eq!(second.finish(unknown).await.refused(), Refused::Unknown);
}

/// Choices that are given up, before or while the engine has them, leave the others' bytes as they are.
#[tokio::test]
async fn single_choices_are_given_up() {
    let cluster = Cluster::start(1, 1).await;
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    for (id, (resumable_ms, early)) in
        [(0, true), (0, false), (WINDOW_MS, true), (WINDOW_MS, false)].into_iter().enumerate()
    {
        let order = Order { resumable_ms, ..order(&cluster, id as u128 + 1, 4) };
        let held = if early { &cluster.prefills[0].gate } else { &cluster.decodes[0].gate };
        held.hold(Point::Step);
        let handle = gateway.start(&order);
        held.held().await;
        gateway.cancel_choices(handle, &[0, 3]);
        // Commands are taken in order: with the answer to this one, the other has been taken.
        let behind = gateway.resume(RequestId(99), "tenant", 1);
        gateway.finish(behind).await;
        held.open();
        let told = gateway.until(handle, |told| [1, 2].iter().all(|choice| told.finished.contains_key(choice))).await;
        let spec = hash_spec();
        let expected = alone(spec.clone(), SIZES, &mut HashBackend::new(spec.vocab), &order);
        for choice in [1, 2] {
            assert_eq!(told.tokens[&choice], expected[&choice], "choice {choice}");
        }
        assert!(!early || told.finished.keys().eq(&[1, 2]), "{:?}", told.finished);
        gateway.cancel(handle);
        cluster.is_clean().await;
    }
}
