//! Bad input ends at the gateway: each case has its status and names what was wrong, and no worker sees any of it.

use baton_tests::cluster::{Scratch, free_port, wait_for};
use baton_tests::{Client, Cluster, RoleProcess};
use serde_json::{Value, json};

use crate::serving::{CHAT, COMPLETIONS};

async fn check(cluster: &Cluster, path: &str, body: &Value, status: u16, wanted: &str) {
    let reply = cluster.client.post(path, body).await;
    let error = reply.json()["error"].clone();
    assert_eq!(reply.status, status, "{body} gave {error}");
    let named = [&error["param"], &error["code"], &error["message"]];
    assert!(named.iter().any(|v| v.to_string().contains(wanted)), "{body}: {error} does not name {wanted}");
    assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
}

fn with(key: &str, value: Value) -> Value {
    let mut body = json!({"model": "baton-3m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4});
    body[key] = value;
    body
}

#[tokio::test]
async fn each_mistake_has_its_answer() {
    let cluster = Cluster::up(&[]).await;
    for (key, value) in [
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("n", json!(0)),
        ("n", json!(1000)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-5)),
        ("presence_penalty", json!(9)),
        ("frequency_penalty", json!("x")),
        ("repetition_penalty", json!(0)),
        ("logit_bias", json!({"999999999": 1})),
        ("logit_bias", json!([1])),
        ("stop", json!(7)),
        ("stop", json!(vec!["x"; 100])),
        ("top_logprobs", json!(99)),
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("seed", json!("x")),
        ("stream", json!("yes")),
    ] {
        let param = key;
        check(&cluster, CHAT, &with(key, value), 400, param).await;
    }
    check(&cluster, CHAT, &with("model", json!("gpt-9")), 404, "model_not_found").await;
    let long = with("messages", json!([{"role": "user", "content": "word ".repeat(100_000)}]));
    check(&cluster, CHAT, &long, 400, "context_length_exceeded").await;
    check(&cluster, COMPLETIONS, &json!({"model": "baton-3m", "prompt": [999_999_999]}), 400, "prompt").await;
    check(&cluster, COMPLETIONS, &json!({"model": "baton-3m", "prompt": []}), 400, "prompt").await;
    check(&cluster, COMPLETIONS, &json!({"model": "baton-3m"}), 400, "prompt").await;

    for broken in ["", "{", "[]", "null", "{\"model\": }", "\u{0}"] {
        let reply = cluster.client.post_bytes(CHAT, broken.to_string().into()).await;
        assert_eq!(reply.status, 400, "{broken:?}");
        assert!(reply.json()["error"]["message"].is_string());
    }
    let huge = cluster.client.post_bytes(CHAT, vec![b' '; 9 << 20].into()).await;
    assert_eq!(huge.status, 413);
    assert_eq!(cluster.client.get("/v1/nothing").await.status, 404);
    assert_eq!(cluster.client.get(CHAT).await.status, 405);

    // Canaries make steps, so steps say nothing: what every request that was assigned leaves behind does.
    assert_eq!(cluster.counter("baton_gateway_prompt_tokens_total").await, 0.0);
    let answered = cluster.client.post(CHAT, &with("n", json!(1))).await;
    assert_eq!(answered.status, 200);
    assert!(cluster.counter("baton_gateway_prompt_tokens_total").await > 0.0);
}

#[tokio::test]
async fn without_workers_there_is_a_503() {
    let data = Scratch::new("no-workers");
    let (node, client) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let folder = data.path().display().to_string();
    let _coordinator = RoleProcess::start(&["coordinator", "--listen", &node, "--data", &folder]);
    let _gateway = RoleProcess::start(&["gateway", "--listen", &client, "--coordinator", &node]);
    let client = Client::new(client);
    let health = wait_for("the gateway to answer", || async { client.try_get("/health").await.ok() }).await;
    assert_eq!(health.status, 503);
    assert_eq!(client.get("/live").await.status, 200);
    let reply = client.post(CHAT, &with("n", json!(1))).await;
    assert_eq!(reply.status, 503, "{}", reply.json());
    assert!(reply.headers.contains_key("retry-after"), "{:?}", reply.headers);
}
