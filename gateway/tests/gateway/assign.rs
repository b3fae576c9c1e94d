//! Questions for workers: gathered on one stream, asked again elsewhere when a coordinator goes or another one leads.

use serde_json::json;

use crate::chat::hi;
use crate::client::{post, stream};
use crate::world::{Script, World};

const PATH: &str = "/v1/chat/completions";

/// Questions that wait for the stream travel in one message.
#[tokio::test]
async fn questions_that_wait_go_together() {
    let world = World::hello().await;
    let prompts: Vec<String> = (0..200).map(|n| format!("prompt {n}")).collect();
    let body = json!({"model": "tiny", "prompt": prompts, "max_tokens": 1});
    assert_eq!(post(&world.address(), "/v1/completions", &body).await.status, 200);
    let seen = world.seen.borrow();
    assert_eq!(seen.batches.iter().map(|(_, count)| count).sum::<usize>(), 200);
    assert!(seen.batches.len() <= 10, "{:?}", seen.batches);
}

/// A question that was heard and not answered before its stream broke is asked again, by the same name, and answered once.
#[tokio::test]
async fn an_unanswered_question_is_asked_again() {
    let world = World::hello().await;
    world.ledger.holds.send_replace(true);
    let address = world.address();
    let asking = tokio::spawn(async move { post(&address, PATH, &hi(json!({}))).await });
    world.until(|seen| seen.assigns.len() == 1).await;
    world.ledger.cuts.send_modify(|cuts| *cuts += 1);
    world.until(|seen| seen.assigns.len() == 2).await;
    world.ledger.holds.send_replace(false);
    assert_eq!(asking.await.unwrap().status, 200);
    let seen = world.seen.borrow();
    let name = |i: usize| (seen.assigns[i].request.clone(), seen.assigns[i].attempt);
    assert_eq!(name(0), name(1));
    assert_eq!(seen.starts.len(), 1);
    assert_eq!(seen.starts[0].1.assignment.as_ref().unwrap().epoch, 1);
}

/// The leader is found by redirect, and again when another one leads.
#[tokio::test]
async fn questions_follow_the_leader() {
    let world = World::of(3, vec![Script::default()], |_| {}).await;
    for leader in [1, 2, 0, 2] {
        world.ledger.leader.send_replace(leader);
        assert_eq!(post(&world.address(), PATH, &hi(json!({}))).await.status, 200);
        assert_eq!(world.seen.borrow().batches.last().map(|(node, _)| *node), Some(leader));
    }
}

/// A leader that is silent is left when the view shows another one; nothing is asked twice.
#[tokio::test]
async fn a_silent_leader_is_left_for_the_one_in_view() {
    let world = World::of(2, vec![Script::default()], |_| {}).await;
    let second = world.ledger.addresses.lock().unwrap()[1].clone();
    world.ledger.holds.send_replace(true);
    let address = world.address();
    let asking = tokio::spawn(async move { post(&address, PATH, &hi(json!({}))).await.status });
    world.until(|seen| seen.batches.len() == 1).await;
    world.ledger.leader.send_replace(1);
    world.change_view(|view| {
        let node = baton_proto::v1::CoordinatorNode { id: 2, address: second, ..Default::default() };
        (view.leader, view.coordinators) = (2, vec![node]);
    });
    world.until(|seen| seen.batches.last().is_some_and(|(node, _)| *node == 1)).await;
    world.ledger.holds.send_replace(false);
    assert_eq!(asking.await.unwrap(), 200);
}

/// What was assigned after its client had gone is ended at once, not when its lease runs out.
#[tokio::test]
async fn an_assignment_that_nobody_waits_for_is_ended() {
    let world = World::with(vec![Script::default()], |config| config.requests_max = 1).await;
    world.ledger.holds.send_replace(true);
    let address = world.address();
    let asking = tokio::spawn(async move { stream(&address, PATH, &hi(json!({"stream": true}))).await.status });
    world.until(|seen| seen.assigns.len() == 1).await;
    asking.abort();
    assert!(asking.await.is_err());
    // There is room for one: a second request is taken when the first one is gone.
    let address = world.address();
    let waiting = tokio::spawn(async move {
        loop {
            match post(&address, PATH, &hi(json!({}))).await.status {
                429 => {}
                status => return status,
            }
        }
    });
    world.until(|seen| seen.assigns.len() == 2).await;
    world.ledger.holds.send_replace(false);
    assert_eq!(waiting.await.unwrap(), 200);
    // Told once, when it left, whatever the ledger had made of it by then.
    world.until(|seen| seen.finishes.len() == 2).await;
    let seen = world.seen.borrow();
    let cancelled: Vec<_> = seen.finishes.iter().filter(|f| f.outcome == "cancelled").collect();
    assert!(cancelled.iter().all(|f| f.request == seen.assigns[0].request), "{cancelled:?}");
    assert_eq!(cancelled.iter().map(|f| f.epoch).collect::<Vec<_>>(), [0]);
    assert_eq!(seen.starts.len(), 1);
}

/// A request that is refused when its question is asked for the second time is ended: whoever heard it first may have granted it.
#[tokio::test]
async fn what_was_asked_twice_and_refused_is_ended() {
    let world = World::hello().await;
    world.ledger.holds.send_replace(true);
    let address = world.address();
    let asking = tokio::spawn(async move { post(&address, PATH, &hi(json!({}))).await.status });
    world.until(|seen| seen.assigns.len() == 1).await;
    world.refuse_assigns(&["quota"]);
    world.ledger.cuts.send_modify(|cuts| *cuts += 1);
    world.until(|seen| seen.assigns.len() == 2).await;
    world.ledger.holds.send_replace(false);
    assert_eq!(asking.await.unwrap(), 429);
    world.until(|seen| seen.finishes.len() == 1).await;
    let seen = world.seen.borrow();
    assert_eq!((&seen.finishes[0].request, seen.finishes[0].epoch), (&seen.assigns[0].request, 0));
    // One that was asked once and refused is not.
    drop(seen);
    world.refuse_assigns(&["quota"]);
    assert_eq!(post(&world.address(), PATH, &hi(json!({}))).await.status, 429);
    assert_eq!(post(&world.address(), PATH, &hi(json!({}))).await.status, 200);
    world.until(|seen| seen.finishes.len() == 2).await;
    assert_eq!(world.seen.borrow().finishes[1].epoch, 2);
}

/// Coordinators that join are told and asked like the configured ones.
#[tokio::test]
async fn coordinators_that_join_are_heard_of() {
    let world = World::of(3, vec![Script::default()], |_| {}).await;
    world.until(|seen| (0..3).all(|node| seen.heartbeats.contains(&node))).await;
}
