//! Keys, tenants and lanes: who may ask, how much, and with which priority.

use baton_proto::v1::{Access, AccessKey, Tenant};
use serde_json::json;

use crate::chat::hi;
use crate::client::{get, get_with, post, post_with};
use crate::world::{MODEL, World, start};

const PATH: &str = "/v1/chat/completions";

fn key(id: &str, tenant: &str) -> AccessKey {
    let hash = blake3::hash(format!("bk-{id}-secret").as_bytes()).as_bytes().to_vec();
    AccessKey { id: id.into(), secret_hash: hash.into(), tenant: tenant.into(), created_unix_s: 0 }
}

fn closed(keys: &[(&str, &str)]) -> Access {
    let keys = keys.iter().map(|(id, tenant)| key(id, tenant)).collect();
    let small = Tenant { name: "small".into(), prompt_tokens_max: 6, output_tokens_max: 4, ..Tenant::default() };
    Access { open: false, keys, tenants: vec![small], ..Access::default() }
}

async fn status(world: &World, authorization: &str) -> u16 {
    post_with(&world.address(), PATH, &[("authorization", authorization)], &hi(json!({}))).await.status
}

/// A key is asked for as soon as there is one, names its tenant, and is refused as soon as it is revoked.
#[tokio::test]
async fn keys_are_asked_for_and_revoked() {
    let world = World::hello().await;
    assert_eq!(post(&world.address(), PATH, &hi(json!({}))).await.status, 200, "an open cluster");
    world.ledger.access.send_replace(closed(&[("1", "small"), ("2", "large")]));
    while post(&world.address(), PATH, &hi(json!({}))).await.status != 401 {}
    let refused = post(&world.address(), PATH, &hi(json!({}))).await;
    assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    assert_eq!(refused.json()["error"]["type"], "invalid_request_error");
    assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    assert!(refused.header("x-request-id").is_some());
    for wrong in ["Bearer bk-1-secre", "Bearer bk-1-secret2", "Basic bk-1-secret", "bk-1-secret"] {
        assert_eq!(status(&world, wrong).await, 401, "{wrong}");
    }
    assert_eq!(status(&world, "Bearer bk-1-secret").await, 200);
    assert_eq!(status(&world, "Bearer bk-2-secret").await, 200);
    {
        let seen = world.seen.borrow();
        let [open, .., one, two] = seen.assigns.as_slice() else { panic!("three requests") };
        let named = |a: &baton_proto::v1::AssignRequest| (a.tenant.clone(), a.key.clone());
        assert_eq!(named(open), ("default".into(), String::new()));
        assert_eq!(named(one), ("small".into(), "1".into()));
        assert_eq!(named(two), ("large".into(), "2".into()));
        let salts: Vec<_> = seen.starts.iter().map(|(_, s)| s.request.clone().unwrap().cache_salt).collect();
        let [open, .., one, two] = salts.as_slice() else { panic!("three requests") };
        assert!(open != one && one != two && two != open, "tenants never share blocks: {salts:?}");
    }
    world.ledger.access.send_replace(closed(&[("2", "large")]));
    while status(&world, "Bearer bk-1-secret").await != 401 {}
    assert_eq!(status(&world, "Bearer bk-2-secret").await, 200);
    world.ledger.access.send_replace(closed(&[]));
    while status(&world, "Bearer bk-2-secret").await != 401 {}
}

#[tokio::test]
async fn every_route_that_shows_a_model_asks_for_the_key() {
    let world = World::hello().await;
    world.ledger.access.send_replace(closed(&[("1", "small")]));
    while get(&world.address(), "/v1/models").await.status != 401 {}
    for path in ["/v1/models/tiny", "/v1/streams/x", "/v1/nothing", "/tokenizer_info"] {
        assert_eq!(get(&world.address(), path).await.status, 401, "{path}");
    }
    for path in ["/tokenize", "/detokenize", "/v1/completions", "/v1/embeddings"] {
        assert_eq!(post(&world.address(), path, &json!({})).await.status, 401, "{path}");
    }
    for path in ["/health", "/live", "/ping", "/version", "/metrics"] {
        assert_eq!(get(&world.address(), path).await.status, 200, "{path}");
    }
    let models = get_with(&world.address(), "/v1/models", &[("authorization", "Bearer bk-1-secret")]).await;
    assert_eq!(models.status, 200);
}

#[tokio::test]
async fn a_tenants_limits_are_told_before_anything_is_asked() {
    let world = World::hello().await;
    world.ledger.access.send_replace(closed(&[("1", "small"), ("2", "large")]));
    while status(&world, "").await != 401 {}
    let ask = async |key: &str, prompt: &str, tokens: Option<u32>| {
        let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": tokens});
        let bearer = format!("Bearer bk-{key}-secret");
        post_with(&world.address(), "/v1/completions", &[("authorization", &bearer)], &body).await
    };
    let asked = world.seen.borrow().assigns.len();
    for (prompt, tokens, param) in [("1234567", Some(1), "prompt"), ("123456", Some(5), "max_tokens")] {
        let refused = ask("1", prompt, tokens).await;
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!(param)));
    }
    assert_eq!(world.seen.borrow().assigns.len(), asked);
    assert_eq!(ask("1", "123456", Some(4)).await.status, 200);
    assert_eq!(ask("1", "123456", None).await.json()["usage"]["completion_tokens"], 4, "a default is cut");
    assert_eq!(ask("2", "1234567", Some(5)).await.status, 200, "another tenant has no limits");
}

/// A gateway that others than this machine can reach does not serve an open cluster, unless it is told to.
#[tokio::test]
async fn an_open_cluster_is_served_to_this_machine_only() {
    let world = World::hello().await;
    let listen = |id: &str, open: bool| baton_gateway::Config { listen: "0.0.0.0:0".into(), open, ..world.config(id) };
    let Err(refused) = start(listen("gateway-1", false)).await else { panic!("it serves") };
    assert!(refused.to_string().contains("baton key create"), "{refused}");
    let allowed = start(listen("gateway-2", true)).await.unwrap();
    allowed.stop().await;
    world.ledger.access.send_replace(closed(&[("1", "small")]));
    let keyed = start(listen("gateway-3", false)).await.unwrap();
    keyed.stop().await;
}

#[tokio::test]
async fn the_lane_comes_from_the_header_or_the_service_tier() {
    let world = World::hello().await;
    let cases = [
        (None, json!(null), Some(0)),
        (None, json!("auto"), Some(0)),
        (None, json!("flex"), Some(1)),
        (None, json!("batch"), Some(1)),
        (Some("batch"), json!(null), Some(1)),
        (Some("interactive"), json!("flex"), Some(0)),
        (Some("fast"), json!(null), None),
        (Some(""), json!(null), None),
        (None, json!(7), None),
    ];
    for (header, tier, lane) in cases {
        let headers: Vec<_> = header.map(|lane| ("x-baton-lane", lane)).into_iter().collect();
        let answer = post_with(&world.address(), PATH, &headers, &hi(json!({"service_tier": tier}))).await;
        assert_eq!(answer.status, if lane.is_some() { 200 } else { 400 }, "{header:?} {tier}");
        if lane.is_some() {
            assert_eq!(world.seen.borrow().assigns.last().map(|a| a.lane), lane, "{header:?} {tier}");
        }
    }
}

#[tokio::test]
async fn refusals_of_the_ledger_have_their_own_codes() {
    let world = World::hello().await;
    for (reason, status, code) in
        [("quota", 429, "rate_limit_exceeded"), ("poisoned", 500, "poisoned"), ("overloaded", 429, "overloaded")]
    {
        world.refuse_assigns(&[reason]);
        let refused = post(&world.address(), PATH, &hi(json!({}))).await;
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (status, &json!(code)));
        assert_eq!(refused.header("x-baton-refused"), Some(reason));
        let asked = world.seen.borrow().assigns.last().map(|asked| asked.request.clone());
        assert_eq!(refused.header("x-baton-request"), asked.as_deref(), "it can be explained");
        assert_eq!(refused.header("retry-after-ms"), (status == 429).then_some("1500"));
    }
    assert_eq!(world.seen.borrow().assigns.len(), 3, "none is asked again");
}
