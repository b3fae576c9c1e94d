//! What clients get for what cannot be served: status, type and parameter, one line per case; and none of it reaches a
//! worker.

use bytes::Bytes;
use hyper::Request;
use serde_json::{Value, json};

use crate::chat::hi;
use crate::client::{Response, get, post, post_bytes, send};
use crate::world::{MODEL, World};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn check(response: &Response, status: u16, param: Option<&str>, code: Option<&str>, case: &str) {
    let error = &response.json()["error"];
    assert_eq!(response.status, status, "{case}: {error}");
    assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{case}: {error}");
    assert!(error["type"].is_string(), "{case}: {error}");
    assert_eq!(error["param"].as_str(), param, "{case}: {error}");
    assert_eq!(error["code"].as_str(), code, "{case}: {error}");
}

#[tokio::test]
async fn bad_parameters_are_named() {
    let world = World::hello().await;
    let unsupported = Some("unsupported_parameter");
    let cases: &[(&str, Value, Option<&str>)] = &[
        ("temperature", json!("hot"), None),
        ("temperature", json!(-0.1), None),
        ("temperature", json!(2.1), None),
        ("top_p", json!(0), None),
        ("top_p", json!(1.5), None),
        ("top_k", json!(-2), None),
        ("top_k", json!(1.5), None),
        ("min_p", json!(-1), None),
        ("repetition_penalty", json!(0), None),
        ("presence_penalty", json!(3), None),
        ("frequency_penalty", json!([]), None),
        ("logit_bias", json!({"x": 1}), None),
        ("logit_bias", json!({"99999": 1}), None),
        ("logit_bias", json!({"1": 101}), None),
        ("logit_bias", json!([1]), None),
        ("seed", json!("s"), None),
        ("seed", json!(1.5), None),
        ("n", json!(0), None),
        ("n", json!(17), None),
        ("best_of", json!(2), unsupported),
        ("max_tokens", json!(-1), None),
        ("max_tokens", json!("many"), None),
        ("max_tokens", json!(100_000), Some("context_length_exceeded")),
        ("max_completion_tokens", json!(1.5), None),
        ("min_tokens", json!(-1), None),
        ("min_tokens", json!(100_000), None),
        ("stop", json!(5), None),
        ("stop", json!(["a", 5]), None),
        ("stop", json!(vec!["a"; 17]), None),
        ("stop", json!("a".repeat(257)), None),
        ("stop_token_ids", json!(["a"]), None),
        ("stop_token_ids", json!([-1]), None),
        ("stop_token_ids", json!([259]), None),
        ("ignore_eos", json!("yes"), None),
        ("stream", json!(1), None),
        ("stream_options", json!([]), None),
        ("return_token_ids", json!(0), None),
        ("prompt_logprobs", json!(21), None),
        ("cache_salt", json!(5), None),
        ("response_format", json!({"type": "json_schema"}), unsupported),
        ("guided_json", json!({}), unsupported),
        ("structured_outputs", json!({}), unsupported),
        ("model", json!(5), None),
    ];
    for (name, value, code) in cases {
        for (path, mut body) in [(CHAT, hi(json!({}))), (COMPLETIONS, json!({"model": MODEL, "prompt": "ab"}))] {
            body[*name] = value.clone();
            let response = post(&world.address(), path, &body).await;
            check(&response, 400, Some(name), *code, &format!("{path} {name}={value}"));
        }
    }
    assert!(world.seen.borrow().starts.is_empty() && world.seen.borrow().assigns.is_empty());
}

#[tokio::test]
async fn bad_messages_and_prompts_are_named() {
    let world = World::hello().await;
    let chat = |more: Value| hi(more);
    let cases: &[(Value, &str)] = &[
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": ["hi"]}), "messages[0]"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": 5, "content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "messages[0].content"),
        (json!({"messages": [{"role": "wizard", "content": "hi"}]}), "messages"),
        (json!({"logprobs": 5}), "logprobs"),
        (json!({"top_logprobs": 5}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"tool_choice": "required", "tools": []}), "tool_choice"),
        (json!({"tools": "hammer"}), "tools"),
        (json!({"chat_template_kwargs": 5}), "chat_template_kwargs"),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
    ];
    for (more, param) in cases {
        let response = post(&world.address(), CHAT, &chat(more.clone())).await;
        let code = response.json()["error"]["code"].as_str().map(String::from);
        check(&response, 400, Some(param), code.as_deref(), &more.to_string());
    }
    for prompt in [
        json!(null),
        json!(5),
        json!([]),
        json!([[]]),
        json!(["a", 5]),
        json!([1, "a"]),
        json!([300]),
        json!([[1], 2]),
        json!({}),
        json!(""),
    ] {
        let response = post(&world.address(), COMPLETIONS, &json!({"model": MODEL, "prompt": prompt})).await;
        check(&response, 400, Some("prompt"), None, &prompt.to_string());
    }
    for (name, value) in [
        ("logprobs", json!(21)),
        ("logprobs", json!(true)),
        ("suffix", json!("x")),
        ("max_tokens", json!(0)),
        ("echo", json!(1)),
    ] {
        let response = post(&world.address(), COMPLETIONS, &json!({"model": MODEL, "prompt": "a", name: value})).await;
        assert_eq!((response.status, &response.json()["error"]["param"]), (400, &json!(name)));
    }
    assert!(world.seen.borrow().assigns.is_empty());
}

#[tokio::test]
async fn bodies_models_routes_and_lengths() {
    let world = World::hello().await;
    let at = world.address();
    let long = json!({"model": MODEL, "prompt": "a".repeat(512)});
    let longer = json!({"model": MODEL, "prompt": "a".repeat(511), "max_tokens": 2});
    let other = json!({"model": "gpt-99", "prompt": "a"});
    check(&post_bytes(&at, CHAT, "{\"model\":".into()).await, 400, None, Some("invalid_json"), "cut");
    check(&post_bytes(&at, CHAT, "[]".into()).await, 400, None, Some("invalid_json"), "array");
    check(&post_bytes(&at, CHAT, "".into()).await, 400, None, Some("invalid_json"), "empty");
    check(&post_bytes(&at, CHAT, vec![0xFF, 0xFE].into()).await, 400, None, Some("invalid_json"), "not UTF-8");
    check(&post_bytes(&at, CHAT, "[".repeat(100_000).into()).await, 400, None, Some("invalid_json"), "deep");
    let huge = Bytes::from(vec![b' '; (8 << 20) + 1]);
    check(&post_bytes(&at, CHAT, huge).await, 413, None, Some("request_too_large"), "huge");
    check(&post(&at, COMPLETIONS, &other).await, 404, Some("model"), Some("model_not_found"), "model");
    check(&post(&at, COMPLETIONS, &long).await, 400, Some("prompt"), Some("context_length_exceeded"), "long");
    check(&post(&at, COMPLETIONS, &longer).await, 400, Some("max_tokens"), Some("context_length_exceeded"), "longer");
    check(&get(&at, "/v1/nothing").await, 404, None, Some("unknown_url"), "route");
    check(&get(&at, CHAT).await, 405, None, Some("method_not_allowed"), "method");
    check(&post(&at, "/v1/models", &json!({})).await, 405, None, Some("method_not_allowed"), "method");
    assert!(world.seen.borrow().assigns.is_empty());
}

#[tokio::test]
async fn requests_have_ids() {
    let world = World::hello().await;
    let given = Request::get("/live").header("x-request-id", "mine");
    let response = send(&world.address(), given, Bytes::new()).await.whole().await;
    assert_eq!(response.header("x-request-id"), Some("mine"));
    let response = get(&world.address(), "/v1/nothing").await;
    assert_eq!(response.header("x-request-id").map(str::len), Some(32));
}

#[tokio::test]
async fn unknown_fields_do_not_matter() {
    let world = World::hello().await;
    let body = hi(json!({"user": "u", "store": false, "service_tier": "auto", "metadata": {"a": 1}, "stop": null,
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "best_of": 1, "parallel_tool_calls": true,
        "n": 1.0, "made_up": [1, 2]}));
    assert_eq!(post(&world.address(), CHAT, &body).await.status, 200);
}
