//! The small routes: models, tokens, health, metrics.

use serde_json::{Value, json};

use crate::client::{get, post};
use crate::world::{EOS, MODEL, POSITIONS_MAX, Script, World, start};

#[tokio::test]
async fn models_are_listed() {
    let world = World::with(vec![Script::default()], |c| drop(c.aliases.insert("gpt-4".into(), MODEL.into()))).await;
    let list = get(&world.address(), "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|m| &m["id"]).collect();
    assert_eq!(ids, [MODEL, "gpt-4"]);
    assert_eq!(list["data"][0]["max_model_len"], POSITIONS_MAX);
    let one = get(&world.address(), "/v1/models/gpt-4").await.json();
    assert_eq!((&one["id"], &one["root"]), (&json!("gpt-4"), &json!(MODEL)));
    assert_eq!(get(&world.address(), "/v1/models/none").await.status, 404);
    let body = json!({"model": "gpt-4", "prompt": "a"});
    assert_eq!(post(&world.address(), "/v1/completions", &body).await.json()["model"], "gpt-4");
    let unnamed = json!({"prompt": "a"});
    assert_eq!(post(&world.address(), "/v1/completions", &unnamed).await.json()["model"], MODEL);
}

#[tokio::test]
async fn texts_become_tokens_and_back() {
    let world = World::hello().await;
    let ask = async |path: &str, body: Value| post(&world.address(), path, &body).await.json();
    let tokens = ask("/tokenize", json!({"model": MODEL, "prompt": "aé<|end|>", "return_token_strs": true})).await;
    let expected = json!({"count": 4, "max_model_len": POSITIONS_MAX, "tokens": [97, 0xC3, 0xA9, EOS],
                          "token_strs": ["a", "\u{FFFD}", "\u{FFFD}", "<|end|>"]});
    assert_eq!(tokens, expected);
    let chat =
        ask("/tokenize", json!({"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": false})).await;
    assert_eq!(chat["tokens"], json!([257, 97]));
    let text = ask("/detokenize", json!({"model": MODEL, "tokens": [97, 0xC3, 0xA9, EOS]})).await;
    assert_eq!(text, json!({"prompt": "aé<|end|>"}));
    assert_eq!(ask("/detokenize", json!({"tokens": [1000]})).await["error"]["param"], "tokens");
    let info = get(&world.address(), "/tokenizer_info").await.json();
    assert_eq!(info["eos_token"], "<|end|>");
    assert!(info["chat_template"].as_str().unwrap().contains("add_generation_prompt"));
}

#[tokio::test]
async fn health_follows_the_decode_workers() {
    let world = World::hello().await;
    let healthy = get(&world.address(), "/health").await;
    assert_eq!((healthy.status, &healthy.json()["decode_workers"]), (200, &json!(1)));
    let becomes = async |status: u16| loop {
        let response = get(&world.address(), "/health").await;
        if response.status == status {
            break response.json()["status"].clone();
        }
    };
    world.change_view(|view| view.broken = true);
    assert_eq!(becomes(503).await, "no decode worker passes its canary");
    world.change_view(|view| view.broken = false);
    assert_eq!(becomes(200).await, "ok");
    world.change_view(|view| view.members[0].live = false);
    assert_eq!(becomes(503).await, "no live decode worker");
    for path in ["/live", "/ping", "/version"] {
        assert_eq!(get(&world.address(), path).await.status, 200);
    }
    assert_eq!(get(&world.address(), "/metrics").await.body, "metrics here\n");
}

#[tokio::test]
async fn without_any_worker_ever_seen_nothing_is_served() {
    let world = World::new(vec![]).await;
    assert_eq!(get(&world.address(), "/health").await.status, 503);
    let response = post(&world.address(), "/v1/completions", &json!({"model": MODEL, "prompt": "a"})).await;
    assert_eq!((response.status, response.header("retry-after")), (503, Some("1")));
}

#[tokio::test]
async fn the_gateway_registers_and_is_heard_of() {
    let world = World::hello().await;
    world.until(|seen| !seen.registered.is_empty() && !seen.heartbeats.is_empty()).await;
    let member = world.seen.borrow().registered[0].clone();
    assert_eq!((member.id.as_str(), member.address), ("gateway-0", world.address()));
    world.gateway.stop().await;
}

/// Goal: a gateway that has just started refuses nothing that it only does not know yet. Method: it is asked before anything
/// else, as soon as it listens, many times over.
#[tokio::test]
async fn the_first_requests_of_a_gateway_are_answered() {
    let world = World::hello().await;
    for nth in 0..20 {
        let gateway = start(world.config(&format!("g{nth}"))).await.unwrap();
        let body = json!({"model": MODEL, "prompt": "a"});
        let reply = post(&gateway.address(), "/v1/completions", &body).await;
        assert_eq!(reply.status, 200, "{:?}", reply.json());
        gateway.stop().await;
    }
}
