//! Bounds: a full gateway, a slow client, a deadline.

use serde_json::json;

use crate::chat::hi;
use crate::client::{post, stream};
use crate::world::{MODEL, Script, World};

const PATH: &str = "/v1/chat/completions";

fn endless() -> Script {
    Script { texts: vec![b"again ".to_vec()], endless: true, ..Script::default() }
}

#[tokio::test]
async fn a_full_gateway_refuses_and_recovers() {
    let script = Script { pause_after: Some(1), ..Script::default() };
    let world = World::with(vec![script], |config| config.requests_max = 2).await;
    let three = json!({"model": MODEL, "prompt": ["a", "b", "c"]});
    let response = post(&world.address(), "/v1/completions", &three).await;
    assert_eq!((response.status, response.header("x-baton-refused")), (429, Some("gateway_full")));
    let body = hi(json!({"stream": true}));
    let (first, second) = (stream(&world.address(), PATH, &body).await, stream(&world.address(), PATH, &body).await);
    assert_eq!(post(&world.address(), PATH, &body).await.status, 429);
    world.set_script(0, Script::default());
    drop((first, second));
    world.until(|seen| seen.cancels.len() == 2).await;
    assert_eq!(post(&world.address(), PATH, &hi(json!({}))).await.status, 200);
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cancelled() {
    let world = World::new(vec![endless()]).await;
    let body = json!({"model": MODEL, "prompt": "a", "max_tokens": 500, "n": 16, "logprobs": 20, "stream": true});
    let mut slow = stream(&world.address(), "/v1/completions", &body).await;
    assert_eq!(slow.status, 200);
    world.until(|seen| !seen.cancels.is_empty()).await;
    let mut last = [String::new(), String::new()];
    while let Some(event) = slow.event().await {
        last = [std::mem::take(&mut last[1]), event];
    }
    assert!(last[0].contains("slow_client"), "{last:?}");
    assert_eq!(last[1], "[DONE]");
}

#[tokio::test]
async fn a_request_ends_at_its_deadline() {
    let script = Script { pause_after: Some(1), ..Script::default() };
    let world = World::with(vec![script], |config| config.deadline_ms = 300).await;
    let response = post(&world.address(), PATH, &hi(json!({}))).await;
    assert_eq!((response.status, &response.json()["error"]["code"]), (504, &json!("deadline_exceeded")));
    world.until(|seen| seen.cancels.len() == 1 && seen.finishes.len() == 1).await;
    assert_eq!(world.seen.borrow().finishes[0].outcome, "deadline");
}

/// What the coordinator has just said of one request holds for the next ones of its tenant and lane, for a moment; others
/// are asked about.
#[tokio::test]
async fn a_fresh_refusal_holds_for_those_who_come_next() {
    let world = World::hello().await;
    world.refuse_assigns(&["overloaded"; 64]);
    let asked = || world.seen.borrow().assigns.len();
    loop {
        let before = asked();
        let response = post(&world.address(), PATH, &hi(json!({}))).await;
        assert_eq!((response.status, response.header("x-baton-refused")), (429, Some("overloaded")));
        if asked() == before {
            break;
        }
    }
    let before = asked();
    assert_eq!(post(&world.address(), PATH, &hi(json!({"service_tier": "batch"}))).await.status, 429);
    assert_eq!(asked(), before + 1, "the batch lane was not refused before");
}
