//! Workers that are lost, full or absent: the client's text stays the same, or the error has its own status.

use serde_json::{Value, json};

use crate::chat::hi;
use crate::client::{finish, post, stream, text};
use crate::world::{Script, World};

const PATH: &str = "/v1/chat/completions";

fn says(text: &str) -> Script {
    Script { texts: vec![text.as_bytes().to_vec()], ..Script::default() }
}

#[tokio::test]
async fn a_stream_survives_the_loss_of_its_worker() {
    let said = "the quick brown 🦊 jumps";
    for lose_after in [1, 5, 18, 19, 26] {
        let world = World::new(vec![Script { lose_after: Some(lose_after), ..says(said) }, says(said)]).await;
        let events = stream(&world.address(), PATH, &hi(json!({"stream": true, "seed": 7}))).await.events().await;
        assert_eq!(text(&events, 0), said, "lost after {lose_after}");
        assert_eq!(finish(&events, 0), Some("stop"));
        let seen = world.seen.borrow();
        let [(_, first), (_, second)] = seen.starts.as_slice() else { panic!("two starts") };
        assert_eq!(first.request.as_ref().unwrap().sampling, second.request.as_ref().unwrap().sampling);
        assert_eq!(
            second.choices[0].so_far,
            said.as_bytes()[..lose_after].iter().map(|b| u32::from(*b)).collect::<Vec<_>>()
        );
        let [one, two] = seen.assigns.as_slice() else { panic!("two assigns") };
        assert_eq!((one.attempt, two.attempt, two.previous_epoch), (1, 2, 1));
        assert_eq!((two.exclude[0].id.as_str(), two.exclude[0].incarnation), ("decode-0", 1));
        assert_eq!(two.prompt_tokens, one.prompt_tokens + lose_after as u64);
    }
}

#[tokio::test]
async fn every_choice_survives_the_loss_of_its_worker() {
    let texts = vec![b"one".to_vec(), b"twenty two".to_vec(), "dröi und mehr".into()];
    let script = Script { texts, ..Script::default() };
    let world = World::new(vec![Script { lose_after: Some(17), ..script.clone() }, script]).await;
    let events = stream(&world.address(), PATH, &hi(json!({"stream": true, "n": 3}))).await.events().await;
    let texts: Vec<String> = (0..3).map(|i| text(&events, i)).collect();
    assert_eq!(texts, ["one", "twenty two", "dröi und mehr"]);
    let seen = world.seen.borrow();
    let again: Vec<u32> = seen.starts[1].1.choices.iter().map(|c| c.index).collect();
    assert_eq!(again, [1, 2], "only what was still open is started again");
}

#[tokio::test]
async fn workers_that_refuse_or_abort_are_passed_over() {
    for (refuse, abort) in [
        (Some("draining"), None),
        (Some("no_capacity"), None),
        (None, Some("transfer_failed")),
        (None, Some("internal")),
    ] {
        let world = World::new(vec![Script { refuse, abort, ..says("good") }, says("good")]).await;
        let whole = post(&world.address(), PATH, &hi(json!({}))).await;
        assert_eq!(whole.json()["choices"][0]["message"]["content"], "good", "{refuse:?} {abort:?}");
    }
}

#[tokio::test]
async fn attempts_are_bounded_and_the_first_error_is_kept() {
    let scripts = vec![Script { abort: Some("internal"), ..says("") }, Script { abort: Some("draining"), ..says("") }];
    let world = World::new(scripts).await;
    let response = post(&world.address(), PATH, &hi(json!({"stream": true}))).await;
    assert_eq!(response.status, 500);
    assert!(response.json()["error"]["message"].as_str().unwrap().contains("internal"));
    assert_eq!(world.seen.borrow().starts.len(), 8);
    world.until(|seen| seen.finishes.len() == 1).await;
    assert_eq!(world.seen.borrow().finishes[0].outcome, "internal");
}

#[tokio::test]
async fn a_full_cluster_refuses_at_once() {
    let world = World::hello().await;
    world.refuse_assigns(&["no_capacity"]);
    let response = post(&world.address(), PATH, &hi(json!({"stream": true}))).await;
    assert_eq!(response.status, 429);
    assert_eq!(response.header("retry-after"), Some("2"));
    assert_eq!(response.header("retry-after-ms"), Some("1500"));
    assert_eq!(response.header("x-baton-refused"), Some("no_capacity"));
    assert_eq!(response.json()["error"]["type"], "rate_limit_error");
}

#[tokio::test]
async fn a_request_waits_for_a_worker_and_for_a_leader() {
    let world = World::hello().await;
    for reason in ["no_workers", "not_leader", "unavailable", "draining"] {
        world.refuse_assigns(&[reason, reason, reason]);
        assert_eq!(post(&world.address(), PATH, &hi(json!({}))).await.status, 200, "{reason}");
    }
}

#[tokio::test]
async fn without_workers_a_request_ends_in_503() {
    let world = World::hello().await;
    world.change_view(|view| view.members[0].live = false);
    let response = post(&world.address(), PATH, &hi(json!({}))).await;
    assert_eq!(response.status, 503);
    assert!(response.header("retry-after").is_some());
    assert_eq!(response.header("x-baton-refused"), Some("no_workers"));
}

#[tokio::test]
async fn a_failure_in_the_middle_of_a_stream_is_an_event() {
    let world = World::new(vec![Script { lose_after: Some(4), ..says("Hello world") }]).await;
    let mut response = stream(&world.address(), PATH, &hi(json!({"stream": true}))).await;
    assert_eq!(response.status, 200);
    let mut events = Vec::new();
    while let Some(event) = response.event().await {
        events.push(event);
        if events.len() == 5 {
            world.change_view(|view| view.members[0].live = false);
        }
    }
    let [.., error, done] = events.as_slice() else { panic!("too few events") };
    assert_eq!(done, "[DONE]");
    let error: Value = serde_json::from_str(error).unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("decode_lost"), "{error}");
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_everywhere() {
    let world = World::new(vec![Script { pause_after: Some(3), ..says("Hello world") }]).await;
    let mut response = stream(&world.address(), PATH, &hi(json!({"stream": true}))).await;
    response.event().await.unwrap();
    drop(response);
    world.until(|seen| seen.cancels.len() == 1 && seen.finishes.len() == 1).await;
    assert_eq!(world.seen.borrow().finishes[0].outcome, "cancelled");
}

#[tokio::test]
async fn a_client_that_goes_away_before_the_first_token_cancels_too() {
    let world = World::new(vec![Script { pause_after: Some(0), texts: vec![vec![0xE2]], ..Script::default() }]).await;
    let address = world.address();
    let body = hi(json!({"stream": true}));
    let asking = tokio::spawn(async move { stream(&address, PATH, &body).await.status });
    world.until(|seen| seen.starts.len() == 1).await;
    asking.abort();
    world.until(|seen| seen.cancels.len() == 1 && seen.finishes.len() == 1).await;
}
