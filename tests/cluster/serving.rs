//! A cluster from one command serves what a client expects, and ends as it began: with nothing left over.

use baton_tests::cluster::{Scratch, alive, baton, wait_for};
use baton_tests::{Client, Cluster, Streamed};
use serde_json::{Value, json};

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";

/// A greedy chat of so many tokens that no end-of-sequence cuts short.
pub(crate) fn chat(text: &str, tokens: u32) -> Value {
    json!({
        "model": "baton-3m", "messages": [{"role": "user", "content": text}], "temperature": 0,
        "max_tokens": tokens, "ignore_eos": true,
    })
}

/// Tokens that are still on their way when what is to meet them comes: 1,200 take 0.4 s. The model reads 4,096.
pub(crate) const LONG: u32 = 2_700;

/// A completion prompt of many tokens, so that prefill has work to hand over; different for each number.
pub(crate) fn long_prompt(number: usize) -> String {
    let line = |i: usize| format!("{} and the {}th of them went up to the mountain, saying, ", number * 31 + i, i);
    (0..40).map(line).collect()
}

#[tokio::test]
async fn every_process_is_shown_and_serves() {
    let cluster = Cluster::up(&[]).await;
    let processes = cluster.processes();
    let mut roles: Vec<_> = processes.iter().map(|p| p.role.as_str()).collect();
    roles.sort_unstable();
    assert_eq!(roles, ["coordinator", "decode", "gateway", "prefill"]);
    assert!(processes.iter().all(|p| alive(p.pid)), "{processes:?}");
    wait_for("every process to say where it listens", || async {
        cluster.processes().iter().all(|p| p.address.contains(':')).then_some(())
    })
    .await;

    let models = cluster.client.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "baton-3m");
    for path in ["/health", "/live", "/version", "/metrics"] {
        assert_eq!(cluster.client.get(path).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn chat_and_completion_stream_what_they_answer_whole() {
    let cluster = Cluster::up(&[]).await;
    let client = &cluster.client;
    let mut body = chat("In the beginning", 40);
    body["stream_options"] = json!({"include_usage": true});
    let streamed = client.stream(CHAT, &body).await;
    body.as_object_mut().expect("an object").remove("stream_options");
    let whole = client.post(CHAT, &body).await;
    let message = &whole.json()["choices"][0]["message"];
    assert_eq!((whole.status, message["role"].as_str()), (200, Some("assistant")));
    assert_eq!(message["content"].as_str(), Some(streamed.text[0].as_str()));
    assert_eq!(streamed.finish[0].as_deref(), Some("length"));
    assert_eq!(streamed.usage.expect("usage was asked for")["completion_tokens"], 40);
    assert!(streamed.done && whole.headers.contains_key("x-request-id"));

    let body = json!({"model": "baton-3m", "prompt": "And God said", "max_tokens": 20, "temperature": 0});
    let streamed = client.stream(COMPLETIONS, &body).await;
    let whole = client.post(COMPLETIONS, &body).await.json();
    assert_eq!(whole["choices"][0]["text"].as_str(), Some(streamed.text[0].as_str()));
}

#[tokio::test]
async fn prompts_come_as_text_lists_and_token_ids() {
    let cluster = Cluster::up(&[]).await;
    let client = &cluster.client;
    let text = "the voice of the LORD";
    let tokens = client.post("/tokenize", &json!({"model": "baton-3m", "prompt": text})).await.json()["tokens"].clone();
    let back = client.post("/detokenize", &json!({"model": "baton-3m", "tokens": tokens})).await.json();
    assert_eq!(back["prompt"], text);
    let body = |prompt: Value| json!({"model": "baton-3m", "prompt": prompt, "max_tokens": 12, "temperature": 0});
    let one = client.post(COMPLETIONS, &body(json!(text))).await.json()["choices"][0]["text"].clone();
    for (prompt, choices) in [(json!([text, text]), 2), (tokens.clone(), 1), (json!([tokens, tokens, tokens]), 3)] {
        let answer = client.post(COMPLETIONS, &body(prompt)).await.json();
        let texts: Vec<_> = answer["choices"].as_array().expect("choices").iter().map(|c| &c["text"]).collect();
        assert_eq!(texts, vec![&one; choices]);
    }
}

#[tokio::test]
async fn echo_gives_log_probabilities_of_the_prompt() {
    let cluster = Cluster::up(&[]).await;
    let body = json!({
        "model": "baton-3m", "prompt": "And it came to pass", "max_tokens": 1, "temperature": 0, "logprobs": 1,
        "echo": true, "seed": 1,
    });
    let answer = cluster.client.post(COMPLETIONS, &body).await.json();
    let logprobs = &answer["choices"][0]["logprobs"];
    let values = logprobs["token_logprobs"].as_array().expect("token_logprobs");
    let tokens = answer["usage"]["prompt_tokens"].as_u64().expect("usage") as usize;
    assert_eq!(values.len(), tokens + 1);
    assert!(values[0].is_null() && values[1..].iter().all(|v| v.as_f64().is_some_and(|v| v <= 0.0)), "{values:?}");
    assert!(answer["choices"][0]["text"].as_str().is_some_and(|t| t.starts_with("And it came to pass")));
}

#[tokio::test]
async fn a_stop_string_is_never_shown() {
    let cluster = Cluster::up(&[]).await;
    let mut body = chat("Tell me of the sea and the land", 60);
    let free = cluster.client.stream(CHAT, &body).await.text[0].clone();
    let middle = free.char_indices().map(|(i, _)| i).nth(free.chars().count() / 2).expect("some text");
    let stop: String = free[middle..].chars().take(5).collect();
    body["stop"] = json!([stop]);
    let cut = cluster.client.stream(CHAT, &body).await;
    assert_eq!(cut.text[0], free[..free.find(&stop).expect("taken from the text")]);
    assert_eq!(cut.finish[0].as_deref(), Some("stop"));
}

#[tokio::test]
async fn thirty_two_streams_at_once_all_end_whole() {
    let cluster = Cluster::up(&["--prefill", "2", "--decode", "2"]).await;
    let streams = (0..32).map(|i| {
        let client = cluster.client.clone();
        tokio::spawn(async move { client.stream(CHAT, &chat(&long_prompt(i), 48)).await })
    });
    for stream in streams.collect::<Vec<_>>() {
        let streamed: Streamed = stream.await.expect("a stream ends");
        assert_eq!((streamed.error, streamed.done), (None, true));
        assert_eq!(streamed.finish[0].as_deref(), Some("length"));
    }
    cluster.quiet().await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_everything() {
    let cluster = Cluster::up(&[]).await;
    for i in 0..8 {
        let mut events = cluster.client.open(CHAT, &chat(&long_prompt(i), 1500)).await;
        events.until_text(8).await;
        drop(events);
    }
    cluster.quiet().await;
}

#[tokio::test]
async fn metrics_carry_native_names_and_those_of_vllm() {
    let cluster = Cluster::up(&[]).await;
    cluster.client.post(CHAT, &chat("hello", 4)).await;
    wait_for("the request to be counted", || async {
        let text = String::from_utf8_lossy(&cluster.client.get("/metrics").await.body).into_owned();
        let names = ["vllm:request_success_total", "vllm:time_to_first_token_seconds_bucket", "baton_gateway_"];
        names.iter().all(|name| text.contains(name)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn ctrl_c_ends_every_process_and_frees_the_port() {
    let cluster = Cluster::up(&[]).await;
    let processes = cluster.processes();
    let client: Client = cluster.client.clone();
    let status = cluster.interrupt().await;
    assert!(status.success(), "{status:?}");
    let left: Vec<_> = processes.iter().filter(|p| alive(p.pid)).collect();
    assert!(left.is_empty(), "still running: {left:?}");
    assert!(client.try_get("/live").await.is_err());
}

/// A refused start says what to do, exits with 2 and leaves nothing behind.
fn refused(arguments: &[&str], words: &[&str]) {
    let output = baton(arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{arguments:?} does not say {word:?}: {text}");
    }
}

#[tokio::test]
async fn starts_that_cannot_work_are_refused_clearly() {
    let cluster = Cluster::up(&[]).await;
    let data = cluster.data().display().to_string();
    let port = cluster.client.address.rsplit(':').next().expect("host:port").to_string();
    refused(&["up", "--data", &data, "--port", "0"], &[&data]);

    let other = Scratch::new("refused");
    let other_data = other.path().display().to_string();
    refused(&["up", "--data", &other_data, "--port", &port], &[&port, "--port"]);
    refused(&["up", "--data", &other_data, "--model", "/no/such/model"], &["/no/such/model"]);

    let broken = Scratch::new("broken-model");
    std::fs::write(broken.path().join("config.json"), r#"{"architectures":["NoSuchModel"]}"#).expect("writable");
    refused(&["up", "--data", &other_data, "--model", &broken.path().display().to_string()], &["NoSuchModel"]);
    assert_eq!(cluster.client.get("/health").await.status, 200, "the running cluster is untouched");
}
