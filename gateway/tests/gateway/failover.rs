//! Workers that are lost, full or absent: the client's text stays the same, or the error has its own status.

use baton_proto::v1::{Abort, MemberView, WorkerLife, WorkerPair};
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
        let abort = abort.map(|reason| Script::aborting(reason).abort.unwrap());
        let world = World::new(vec![Script { refuse, abort: abort.clone(), ..says("good") }, says("good")]).await;
        let whole = post(&world.address(), PATH, &hi(json!({}))).await;
        assert_eq!(whole.json()["choices"][0]["message"]["content"], "good", "{refuse:?} {abort:?}");
    }
}

#[tokio::test]
async fn attempts_are_bounded_and_the_first_error_is_kept() {
    let scripts = vec![Script::aborting("internal"), Script::aborting("draining")];
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
    let began = tokio::time::Instant::now();
    let response = post(&world.address(), PATH, &hi(json!({}))).await;
    assert_eq!(response.status, 503);
    assert!(began.elapsed() < std::time::Duration::from_secs(1), "a typed error within a second");
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

/// An assignment whose fate is unknown may stand in the ledger: a client that leaves then ends it there all the same.
#[tokio::test]
async fn a_client_that_goes_away_while_an_assignment_is_asked_for_ends_it_in_the_ledger() {
    let world = World::new(vec![says("Hello")]).await;
    world.refuse_assigns(&["unavailable"; 64]);
    let address = world.address();
    let body = hi(json!({"stream": true}));
    let asking = tokio::spawn(async move { stream(&address, PATH, &body).await.status });
    world.until(|seen| !seen.assigns.is_empty()).await;
    asking.abort();
    world.until(|seen| seen.finishes.len() == 1).await;
    let seen = world.seen.borrow();
    let (asked, ended) = (&seen.assigns[0], &seen.finishes[0]);
    assert_eq!((&ended.request, ended.epoch, ended.outcome.as_str()), (&asked.request, 0, "cancelled"));
}

/// A worker that the view shows as gone is left at once, though its connection still stands; what it says later is not
/// heard.
#[tokio::test]
async fn a_fenced_worker_is_left_without_waiting_for_its_connection() {
    for fence in [
        |view: &mut MemberView| view.live = false,
        |view: &mut MemberView| {
            view.member.as_mut().unwrap().incarnation += 1;
            view.live = false;
        },
    ] {
        let world = World::new(vec![Script { pause_after: Some(4), ..says("Hello world") }, says("Hello world")]).await;
        let mut response = stream(&world.address(), PATH, &hi(json!({"stream": true}))).await;
        let mut events = vec![response.event().await.unwrap()];
        world.until(|seen| seen.generated == 4).await;
        world.change_view(|view| fence(&mut view.members[0]));
        world.until(|seen| seen.starts.len() == 2).await;
        world.set_script(0, says("Hello world"));
        while let Some(event) = response.event().await {
            events.push(event);
        }
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        let events: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
        assert_eq!(text(&events, 0), "Hello world");
        let seen = world.seen.borrow();
        let killed = &seen.assigns[1].killed;
        assert_eq!((killed.len(), killed[0].id.as_str(), killed[0].incarnation), (1, "decode-0", 1));
    }
}

/// The ledger is told which lives ended under a request: those whose connection broke, not those that ended it in order.
#[tokio::test]
async fn lives_that_ended_under_a_request_are_told() {
    let pause = |at| Script { pause_after: Some(at), ..says("Hello world") };
    let lose = Script { lose_after: Some(3), ..says("Hello world") };
    let world = World::new(vec![pause(3), lose, pause(8), says("Hello world")]).await;
    let mut response = stream(&world.address(), PATH, &hi(json!({"stream": true}))).await;
    let mut events = Vec::new();
    for (shown, dies) in [("Hel", Some(0usize)), ("Hello wo", Some(2)), ("Hello world", None)] {
        while text(&events, 0) != shown {
            events.push(serde_json::from_str(&response.event().await.unwrap()).unwrap());
        }
        if let Some(worker) = dies {
            world.workers[worker].died.send_replace(true);
        }
    }
    let seen = world.seen.borrow();
    let killed = |attempt: usize| seen.assigns[attempt].killed.iter().map(|l| l.id.as_str()).collect::<Vec<_>>();
    assert_eq!([killed(0), killed(1), killed(2)], [vec![], vec!["decode-0"], vec!["decode-0"]]);
    assert_eq!(killed(3), ["decode-0", "decode-2"]);
    assert_eq!(seen.assigns[3].exclude.len(), 3);
    let prints: Vec<_> = seen.assigns.iter().map(|a| a.fingerprint.clone()).collect();
    assert!(prints.iter().all(|print| print.len() == 16 && *print == prints[0]));
}

/// The same prompt and parameters have the same fingerprint, whoever asks; others have another.
#[tokio::test]
async fn a_fingerprint_names_prompt_and_parameters() {
    let world = World::hello().await;
    for changes in [json!({}), json!({"seed": 5}), json!({"user": "x"}), json!({"temperature": 0.5}), json!({"n": 2})] {
        post(&world.address(), PATH, &hi(changes)).await;
    }
    let prints: Vec<_> = world.seen.borrow().assigns.iter().map(|a| a.fingerprint.clone()).collect();
    assert!(prints[0] == prints[1] && prints[1] == prints[2], "neither the seed nor the user counts");
    assert!(prints[0] != prints[3] && prints[0] != prints[4] && prints[3] != prints[4]);
}

/// A transfer that failed blames the way between two workers, and neither of them.
#[tokio::test]
async fn a_failed_transfer_blames_the_pair() {
    let life = |id: &str| WorkerLife { id: id.into(), incarnation: 1 };
    let pair = WorkerPair { prefill: Some(life("prefill-0")), decode: Some(life("decode-0")) };
    let abort = Abort { reason: "transfer_failed".into(), failed_pair: Some(pair.clone()), ..Default::default() };
    let world = World::new(vec![Script { abort: Some(abort), ..says("") }]).await;
    world.ledger.holds.send_replace(true);
    let address = world.address();
    let asking = tokio::spawn(async move { post(&address, PATH, &hi(json!({}))).await });
    world.until(|seen| seen.assigns.len() == 1).await;
    world.ledger.holds.send_replace(false);
    world.until(|seen| seen.assigns.len() == 2).await;
    world.set_script(0, says("good"));
    assert_eq!(asking.await.unwrap().status, 200);
    let seen = world.seen.borrow();
    assert_eq!((&seen.assigns[1].exclude_pairs, seen.assigns[1].exclude.len()), (&vec![pair], 0));
    assert!(seen.assigns[1].killed.is_empty());
}

/// With n > 1 a choice whose stop string is complete is generated no further, and the others go on.
#[tokio::test]
async fn a_stopped_choice_is_cancelled_alone() {
    let texts = vec![b"one stop and so on".to_vec(), b"and two to the end".to_vec()];
    let world = World::new(vec![Script { texts: texts.clone(), pause_after: Some(12), ..Script::default() }]).await;
    let body = hi(json!({"stream": true, "n": 2, "stop": "stop"}));
    let response = stream(&world.address(), PATH, &body).await;
    world.until(|seen| seen.cancels.len() == 1).await;
    world.set_script(0, Script { texts, ..Script::default() });
    let events = response.events().await;
    assert_eq!([text(&events, 0), text(&events, 1)], ["one ", "and two to the end"]);
    world.until(|seen| seen.finishes.len() == 1).await;
    let seen = world.seen.borrow();
    assert_eq!(seen.cancels, [("decode-0".to_string(), vec![0])]);
    assert_eq!(seen.finishes[0].generated_tokens, 8 + 19);
    assert!(seen.generated < 2 * 19, "{} tokens", seen.generated);
}
