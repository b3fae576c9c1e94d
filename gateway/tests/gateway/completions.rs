//! Completions: kinds of prompts, echo, log-probabilities as lm-eval reads them.

use serde_json::{Value, json};

use crate::client::{post, stream, text};
use crate::world::{EOS, MODEL, Script, World};

const PATH: &str = "/v1/completions";

fn ask(prompt: Value, more: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": prompt});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn prompts_of_every_kind() {
    let world = World::hello().await;
    let check = async |prompt: Value, prompts: &[&[u32]]| {
        let before = world.seen.borrow().starts.len();
        let whole = post(&world.address(), PATH, &ask(prompt, json!({}))).await.json();
        assert_eq!(whole["object"], "text_completion");
        assert!(whole["id"].as_str().unwrap().starts_with("cmpl-"));
        let texts: Vec<&Value> = whole["choices"].as_array().unwrap().iter().map(|c| &c["text"]).collect();
        assert_eq!(texts, vec!["Hello world"; prompts.len()]);
        let seen = world.seen.borrow();
        let mut sent: Vec<Vec<u32>> =
            seen.starts[before..].iter().map(|(_, s)| s.request.as_ref().unwrap().prompt.clone()).collect();
        sent.sort();
        assert_eq!(sent, prompts);
        let tokens: usize = prompts.iter().map(|p| p.len()).sum();
        assert_eq!(whole["usage"]["prompt_tokens"], tokens);
        assert_eq!(whole["usage"]["completion_tokens"], 12 * prompts.len());
    };
    check(json!("ab"), &[&[97, 98]]).await;
    check(json!(["ab", "c"]), &[&[97, 98], &[99]]).await;
    check(json!([1, 2, 3]), &[&[1, 2, 3]]).await;
    check(json!([[1], [2, 3], [4]]), &[&[1], &[2, 3], &[4]]).await;
}

#[tokio::test]
async fn choices_count_over_all_prompts() {
    let texts = vec![b"x".to_vec(), b"yy".to_vec()];
    let world = World::new(vec![Script { texts, ..Script::default() }]).await;
    let body = ask(json!(["p", "q", "r"]), json!({"n": 2, "stream": true, "stream_options": {"include_usage": true}}));
    let events = stream(&world.address(), PATH, &body).await.events().await;
    let texts: Vec<String> = (0..6).map(|i| text(&events, i)).collect();
    assert_eq!(texts, ["x", "yy", "x", "yy", "x", "yy"]);
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 3 * (2 + 3));
    assert_eq!(events.last().unwrap()["usage"]["prompt_tokens"], 3);
}

/// lm-eval's local-completions: token-id prompts, echo, one token, and float equality of chosen and best.
#[tokio::test]
async fn echo_with_log_probabilities_as_lm_eval_reads_them() {
    let world = World::says("xyz").await;
    let more = json!({"max_tokens": 1, "logprobs": 1, "echo": true, "temperature": 0, "seed": 1234});
    let whole = post(&world.address(), PATH, &ask(json!([[97, 98, 99], [100]]), more)).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "abcx");
    assert_eq!(choice["finish_reason"], "length");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["a", "b", "c", "x"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3]));
    assert_eq!(logprobs["token_logprobs"], json!([null, -0.375, -0.5, -0.25]));
    assert_eq!(logprobs["top_logprobs"], json!([null, {"b": -0.375}, {"c": -0.5}, {"x": -0.25}]));
    assert_eq!(whole["choices"][1]["text"], "dx");
    let seen = world.seen.borrow();
    let request = seen.starts[0].1.request.as_ref().unwrap();
    let sampling = request.sampling.as_ref().unwrap();
    assert_eq!((sampling.seed, sampling.temperature, request.prompt_logprobs), (1234, 0.0, Some(1)));
}

#[tokio::test]
async fn a_streamed_echo_begins_with_the_prompt() {
    let world = World::says("xy").await;
    let body = ask(json!("ab"), json!({"echo": true, "logprobs": 0, "stream": true}));
    let events = stream(&world.address(), PATH, &body).await.events().await;
    assert_eq!(text(&events, 0), "abxy");
    assert_eq!(events[0]["choices"][0]["text"], "ab");
    let parts =
        events.iter().flat_map(|e| e["choices"][0]["logprobs"]["text_offset"].as_array().cloned().unwrap_or_default());
    assert_eq!(parts.collect::<Vec<_>>(), [0, 1, 2, 3, 4].map(Value::from));
}

#[tokio::test]
async fn echo_alone_generates_nothing() {
    let world = World::says("xyz").await;
    let whole =
        post(&world.address(), PATH, &ask(json!("ab"), json!({"echo": true, "max_tokens": 0, "logprobs": 1}))).await;
    let whole = whole.json();
    assert_eq!(whole["choices"][0]["text"], "ab");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["choices"][0]["logprobs"]["tokens"], json!(["a", "b"]));
    assert_eq!(whole["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn prompt_logprobs_and_token_ids_as_in_vllm() {
    let world = World::says("x").await;
    let whole =
        post(&world.address(), PATH, &ask(json!("ab"), json!({"prompt_logprobs": 1, "return_token_ids": true}))).await;
    let choice = &whole.json()["choices"][0];
    assert_eq!(choice["text"], "x");
    assert_eq!(choice["prompt_token_ids"], json!([97, 98]));
    assert_eq!(choice["token_ids"], json!([120, EOS]));
    assert_eq!(choice["prompt_logprobs"], json!([null, {"98": {"logprob": -0.375, "rank": 1, "decoded_token": "b"}}]));
}

#[tokio::test]
async fn a_seed_is_fixed_once_and_salts_differ() {
    let world = World::hello().await;
    let ask_with = async |more: Value| {
        post(&world.address(), PATH, &ask(json!("ab"), more)).await;
        let seen = world.seen.borrow();
        let request = seen.starts.last().unwrap().1.request.clone().unwrap();
        (request.sampling.unwrap().seed, request.cache_salt)
    };
    let plain = ask_with(json!({})).await;
    let again = ask_with(json!({})).await;
    assert_ne!(plain.0, again.0, "each request draws its own seed");
    assert_eq!(plain.1, again.1);
    let seeded = ask_with(json!({"seed": -1, "cache_salt": "mine"})).await;
    assert_eq!(seeded.0, u64::MAX);
    assert_ne!(seeded.1, plain.1);
    assert!(!seeded.1.contains("mine"));
}
