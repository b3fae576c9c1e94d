//! Chats: what a client sees of a whole and of a streamed answer.

use serde_json::{Value, json};

use crate::client::{finish, post, stream, text};
use crate::world::{EOS, MODEL, Script, World};

const PATH: &str = "/v1/chat/completions";

pub(crate) fn hi(more: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_chat_in_one_piece() {
    let world = World::hello().await;
    let response = post(&world.address(), PATH, &hi(json!({}))).await;
    assert_eq!(response.status, 200);
    let body = response.json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], MODEL);
    assert_eq!(body["system_fingerprint"], "weights-f32acc-bf16");
    let message = json!({"role": "assistant", "content": "Hello world"});
    let choice =
        json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "stop", "stop_reason": null});
    assert_eq!(body["choices"], json!([choice]));
    let details = json!({"cached_tokens": 3});
    let usage =
        json!({"prompt_tokens": 4, "total_tokens": 16, "completion_tokens": 12, "prompt_tokens_details": details});
    assert_eq!(body["usage"], usage);
    let seen = world.seen.borrow();
    let prompt = &seen.starts[0].1.request.as_ref().unwrap().prompt;
    assert_eq!(*prompt, vec![257, 104, 105, 258], "template, special tokens and text");
    assert!(!prompt.contains(&EOS));
}

#[tokio::test]
async fn a_streamed_chat() {
    let world = World::hello().await;
    let body = hi(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let response = stream(&world.address(), PATH, &body).await;
    assert_eq!(response.status, 200);
    assert_eq!(response.headers["content-type"], "text/event-stream; charset=utf-8");
    let events = response.events().await;
    assert_eq!(text(&events, 0), "Hello world");
    assert_eq!(finish(&events, 0), Some("stop"));
    assert!(events.iter().all(|e| e["object"] == "chat.completion.chunk" && e["id"] == events[0]["id"]));
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let last = events.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 12);
    assert!(events[..events.len() - 1].iter().all(|e| e.get("usage").is_none()));
    world.until(|seen| seen.finishes.len() == 1).await;
    let seen = world.seen.borrow();
    assert_eq!((seen.finishes[0].outcome.as_str(), seen.finishes[0].generated_tokens), ("complete", 12));
    assert!(seen.cancels.is_empty());
}

#[tokio::test]
async fn characters_split_over_tokens_come_whole() {
    let said = "naïve 日本 👩‍👩‍👧 𝄞!";
    let world = World::says(said).await;
    let events = stream(&world.address(), PATH, &hi(json!({"stream": true}))).await.events().await;
    assert_eq!(text(&events, 0), said);
    assert!(events.iter().all(|e| !e.to_string().contains('\u{FFFD}')));
    let whole = post(&world.address(), PATH, &hi(json!({}))).await.json();
    assert_eq!(whole["choices"][0]["message"]["content"], said);
}

#[tokio::test]
async fn a_character_left_incomplete_at_the_end_shows_as_such() {
    let texts = vec![[b"ab".as_slice(), &"👍".as_bytes()[..2]].concat()];
    let world = World::new(vec![Script { texts, ..Script::default() }]).await;
    let events = stream(&world.address(), PATH, &hi(json!({"stream": true}))).await.events().await;
    assert_eq!(text(&events, 0), "ab\u{FFFD}");
}

#[tokio::test]
async fn stop_strings_end_the_text_and_never_show() {
    let world = World::says("one two STOP three").await;
    let check = async |more: Value, content: &str, reason: &str, stop: Value, tokens: u64| {
        let mut body = hi(more);
        let whole = post(&world.address(), PATH, &body).await.json();
        assert_eq!(whole["choices"][0]["message"]["content"], content);
        assert_eq!(whole["choices"][0]["finish_reason"], reason);
        assert_eq!(whole["choices"][0]["stop_reason"], stop);
        assert_eq!(whole["usage"]["completion_tokens"], tokens);
        body["stream"] = true.into();
        let events = stream(&world.address(), PATH, &body).await.events().await;
        assert_eq!(text(&events, 0), content);
        assert_eq!(finish(&events, 0), Some(reason));
    };
    check(json!({"stop": "STOP"}), "one two ", "stop", json!("STOP"), 12).await;
    check(json!({"stop": ["three", " STOP"]}), "one two", "stop", json!(" STOP"), 12).await;
    check(json!({"stop": "STOP", "include_stop_str_in_output": true}), "one two STOP", "stop", json!("STOP"), 12).await;
    check(json!({"stop": "STOPS"}), "one two STOP three", "stop", Value::Null, 19).await;
    check(json!({"stop": "one", "min_tokens": 5}), "one two STOP three", "stop", Value::Null, 19).await;
    check(json!({"stop_token_ids": [119]}), "one t", "stop", json!(119), 6).await;
    check(json!({"stop_token_ids": [119], "include_stop_str_in_output": true}), "one tw", "stop", json!(119), 6).await;
    check(json!({"max_tokens": 3}), "one", "length", Value::Null, 3).await;
    check(json!({"max_completion_tokens": 4, "max_tokens": 9}), "one ", "length", Value::Null, 4).await;
}

#[tokio::test]
async fn a_complete_stop_string_cancels_at_the_worker() {
    let script = Script { texts: vec![b"abc".to_vec()], endless: true, pause_after: Some(3), ..Script::default() };
    let world = World::new(vec![script]).await;
    let whole = post(&world.address(), PATH, &hi(json!({"stop": ["bc"]}))).await.json();
    assert_eq!(whole["choices"][0]["message"]["content"], "a");
    world.until(|seen| seen.cancels.len() == 1 && seen.finishes.len() == 1).await;
    assert_eq!(world.seen.borrow().finishes[0].outcome, "complete");
}

#[tokio::test]
async fn several_choices_are_told_apart() {
    let texts = vec![b"first".to_vec(), b"second one".to_vec(), "dritte ü".into()];
    let world = World::new(vec![Script { texts, ..Script::default() }]).await;
    let events = stream(&world.address(), PATH, &hi(json!({"n": 3, "stream": true}))).await.events().await;
    let texts: Vec<String> = (0..3).map(|i| text(&events, i)).collect();
    assert_eq!(texts, ["first", "second one", "dritte ü"]);
    let whole = post(&world.address(), PATH, &hi(json!({"n": 3, "stop": "con"}))).await.json();
    let texts: Vec<&Value> = (0..3).map(|i| &whole["choices"][i]["message"]["content"]).collect();
    assert_eq!(texts, ["first", "se", "dritte ü"]);
    assert_eq!(whole["usage"]["completion_tokens"], 6 + 5 + 10);
}

#[tokio::test]
async fn log_probabilities_mirror_the_text() {
    let world = World::says("aé").await;
    let whole = post(&world.address(), PATH, &hi(json!({"logprobs": true, "top_logprobs": 2}))).await.json();
    let content = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 4, "a, two halves of é, the end");
    let first = json!({"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": [
        {"token": "a", "logprob": -0.25, "bytes": [97]}, {"token": "b", "logprob": -1.25, "bytes": [98]}]});
    assert_eq!(content[0], first);
    assert_eq!(content[1]["bytes"], json!([0xC3]));
    let events = stream(&world.address(), PATH, &hi(json!({"logprobs": true, "stream": true}))).await.events().await;
    let streamed =
        events.iter().flat_map(|e| e["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default());
    let streamed: Vec<Value> = streamed.map(|t| t["bytes"].clone()).collect();
    assert_eq!(streamed, content.iter().map(|t| t["bytes"].clone()).collect::<Vec<_>>());
    let stopped = post(&world.address(), PATH, &hi(json!({"logprobs": true, "stop": "é"}))).await.json();
    assert_eq!(stopped["choices"][0]["logprobs"]["content"].as_array().unwrap().len(), 1, "nothing of the stop string");
}

#[tokio::test]
async fn token_ids_come_back_when_asked_for() {
    let world = World::says("ab").await;
    let whole = post(&world.address(), PATH, &hi(json!({"return_token_ids": true}))).await.json();
    assert_eq!(whole["prompt_token_ids"], json!([257, 104, 105, 258]));
    assert_eq!(whole["choices"][0]["token_ids"], json!([97, 98, EOS]));
    let events =
        stream(&world.address(), PATH, &hi(json!({"return_token_ids": true, "stream": true}))).await.events().await;
    assert_eq!(events[0]["prompt_token_ids"], json!([257, 104, 105, 258]));
    let ids: Vec<Value> =
        events.iter().flat_map(|e| e["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default()).collect();
    assert_eq!(ids, [json!(97), json!(98), json!(EOS)]);
}

#[tokio::test]
async fn usage_on_every_chunk_when_asked_for() {
    let world = World::says("abc").await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let events =
        stream(&world.address(), PATH, &hi(json!({"stream": true, "stream_options": options}))).await.events().await;
    let counts: Vec<u64> = events.iter().map(|e| e["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted());
    assert_eq!(counts.last(), Some(&4));
    assert!(events.iter().all(|e| e["usage"]["prompt_tokens"] == 4));
}
