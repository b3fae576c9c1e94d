//! Who may ask for how much: API keys and their revocation at every gateway, quotas across gateways, and clusters that are
//! open on one machine only.

use std::time::Duration;

use baton_tests::cluster::{baton, free_port, wait_for};
use baton_tests::{Client, Fault, Fleet, Reply, RoleProcess, Shape, Way};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::serving::{CHAT, COMPLETIONS, LONG, chat, long_prompt};

/// What takes a second by design may take so long on a busy machine.
const SOON: Duration = Duration::from_secs(3);
const MODELS: &str = "/v1/models";

async fn start(gateways: usize) -> Fleet {
    Fleet::start(&Shape { prefill: 0, gateways, ..Shape::default() }).await
}

/// A key of a new tenant with these limits.
async fn key(fleet: &Fleet, tenant: &str, limits: &[&str]) -> String {
    fleet.done(&[&["tenant", "create", tenant], limits].concat()).await;
    fleet.done(&["key", "create", "--tenant", tenant]).await
}

async fn status_is(client: &Client, path: &str, status: u16) {
    wait_for(&format!("{path} to answer {status}"), || async {
        (client.get(path).await.status == status).then_some(())
    })
    .await;
}

fn refused(reply: &Reply, status: u16, code: &str) {
    let body = reply.json();
    assert_eq!((reply.status, body["error"]["code"].as_str()), (status, Some(code)), "{body}");
}

/// A 429 says when to come again, within the minute that quotas are counted by.
fn comes_again(reply: &Reply) {
    refused(reply, 429, "rate_limit_exceeded");
    let seconds = reply.headers.get("retry-after").and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    assert!(seconds.is_some_and(|seconds| (1..=60).contains(&seconds)), "{:?}", reply.headers);
}

/// Goal: from the first key on every gateway wants one that is in force; a revoked one is refused at once by the ledger and
/// within a second by every gateway alone. Method: two gateways, two keys of one tenant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_opens_every_gateway_until_it_is_revoked() {
    let fleet = start(2).await;
    let clients = [fleet.client(0), fleet.client(1)];
    for client in &clients {
        assert_eq!(client.post(CHAT, &chat("hello", 2)).await.status, 200, "nobody has made a key yet");
    }
    let first = key(&fleet, "acme", &[]).await;
    let second = fleet.done(&["key", "create", "--tenant", "acme"]).await;
    let flipped = if first.ends_with('0') { "1" } else { "0" };
    let nearly = format!("{}{flipped}", &first[..first.len() - 1]);
    for client in &clients {
        status_is(client, MODELS, 401).await;
        status_is(&client.with_key(&second), MODELS, 200).await;
        for wrong in [None, Some(nearly.as_str()), Some("bk-"), Some("")] {
            let client = wrong.map_or(client.clone(), |key| client.with_key(key));
            for reply in [client.get(MODELS).await, client.post(CHAT, &chat("hello", 2)).await] {
                refused(&reply, 401, "invalid_api_key");
            }
        }
        for in_force in [&first, &second] {
            assert_eq!(client.with_key(in_force).post(CHAT, &chat("hello", 2)).await.status, 200);
        }
        assert_eq!(client.get("/health").await.status, 200, "what shows no model needs no key");
    }
    for gateway in ["gateway-0", "gateway-1"] {
        let wrong = fleet.metric(gateway, "baton_gateway_http_responses_total", "status=\"401\"").await;
        assert!(wrong >= 8.0, "{wrong} answers of 401 are counted at {gateway}");
    }
    let id = first.split('-').nth(1).expect("bk-<id>-<secret>").to_string();
    let listed = fleet.done(&["key", "list", "--json"]).await;
    let secret = first.rsplit('-').next().expect("bk-<id>-<secret>");
    assert!(listed.contains(&id) && !listed.contains(secret), "{listed}");

    let revoking = Instant::now();
    fleet.done(&["key", "revoke", &id]).await;
    let revoked = Instant::now();
    for client in &clients {
        status_is(&client.with_key(&first), MODELS, 401).await;
    }
    println!(
        "revoked at every gateway {} ms after the command began, {} ms after it ended",
        revoking.elapsed().as_millis(),
        revoked.elapsed().as_millis()
    );
    assert!(revoked.elapsed() < SOON, "revoked everywhere after {:?}", revoked.elapsed());
    for client in &clients {
        refused(&client.with_key(&first).post(CHAT, &chat("hello", 2)).await, 401, "invalid_api_key");
    }
    for client in &clients {
        assert_eq!(client.with_key(&second).post(CHAT, &chat("hello", 2)).await.status, 200);
    }
    fleet.done(&["tenant", "remove", "acme"]).await;
    for client in &clients {
        refused(&client.with_key(&second).post(CHAT, &chat("hello", 2)).await, 401, "invalid_api_key");
        status_is(client, MODELS, 401).await;
    }
}

/// Goal: a gateway that no coordinator tells of revocations does not go on with what it knew where nobody else looks at the
/// key. Method: the only coordinator dies and comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_cut_off_knows_no_keys() {
    let mut fleet = start(1).await;
    let acme = key(&fleet, "acme", &[]).await;
    let client = fleet.client(0).with_key(&acme);
    let words = json!({"model": "baton-3m", "prompt": "And God said"});
    status_is(&client, MODELS, 200).await;
    fleet.kill("coordinator-1").await;
    status_is(&client, MODELS, 503).await;
    for reply in [client.get(MODELS).await, client.post("/tokenize", &words).await] {
        let body = reply.json();
        assert_eq!(
            (reply.status, reply.headers["x-baton-refused"].to_str().ok()),
            (503, Some("access_unknown")),
            "{body}"
        );
    }
    refused(&fleet.client(0).with_key("bk-x").get(MODELS).await, 401, "invalid_api_key");
    fleet.restart("coordinator-1").await;
    status_is(&client, MODELS, 200).await;
    assert_eq!(client.post("/tokenize", &words).await.status, 200);
}

/// Goal: revocation holds within a second also at a gateway whose connections to the coordinators are half open: nothing
/// arrives, nothing is reset. Method: a proxy before the only coordinator swallows what it says; a command that goes past
/// the proxy revokes a key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_hears_no_word_knows_no_keys() {
    let fleet = Fleet::start(&Shape { prefill: 0, coordinators_proxied: true, ..Shape::default() }).await;
    let acme = key(&fleet, "acme", &[]).await;
    let client = fleet.client(0).with_key(&acme);
    status_is(&client, MODELS, 200).await;
    // Longer than a coordinator may be silent: as long as it has its word, a gateway goes on.
    let until = Instant::now() + Duration::from_millis(1_500);
    let mut answers = Vec::new();
    while Instant::now() < until {
        answers.push(client.get(MODELS).await.status);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let good = answers.iter().filter(|status| **status == 200).count();
    assert!(good * 10 > answers.len() * 9, "{good} of {} answers while nothing is wrong", answers.len());

    let id = acme.split('-').nth(1).expect("bk-<id>-<secret>").to_string();
    let proxy = &fleet.control["coordinator-1"];
    proxy.set(Way::Down, Fault::Swallow);
    let since = Instant::now();
    fleet.done(&["key", "revoke", &id]).await;
    status_is(&client, MODELS, 503).await;
    println!("keys are unknown {} ms after the connection was half open", since.elapsed().as_millis());
    assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
    let reply = client.get(MODELS).await;
    assert_eq!(reply.headers["x-baton-refused"].to_str().ok(), Some("access_unknown"), "{:?}", reply.json());
    proxy.heal();
    status_is(&client, MODELS, 401).await;
}

/// Goal: a tenant's limits count over all gateways, whatever they limit, and none of them touches another tenant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_over_all_gateways() {
    let fleet = start(2).await;
    let free = key(&fleet, "free", &[]).await;
    let twice = key(&fleet, "twice", &["--requests-per-minute", "2"]).await;
    let alone = key(&fleet, "alone", &["--requests-open-max", "1"]).await;
    let brief = key(&fleet, "brief", &["--prompt-tokens-max", "12", "--output-tokens-max", "4"]).await;
    let spare = key(&fleet, "spare", &["--tokens-per-minute", "40"]).await;
    let client = |gateway, key: &str| fleet.client(gateway).with_key(key);
    for gateway in [0, 1] {
        for key in [&free, &twice, &alone, &brief, &spare] {
            status_is(&client(gateway, key), MODELS, 200).await;
        }
    }
    let ask = async |gateway, key: &str| client(gateway, key).post(CHAT, &chat("hello", 2)).await;

    assert_eq!([ask(0, &twice).await.status, ask(1, &twice).await.status], [200, 200]);
    let over = ask(0, &twice).await;
    comes_again(&over);
    comes_again(&ask(1, &twice).await);
    let id = over.headers["x-baton-request"].to_str().expect("an id");
    let why: Value = serde_json::from_str(&fleet.done(&["explain", id, "--json"]).await).expect("JSON");
    assert_eq!((&why["decisions"][0]["outcome"], &why["decisions"][0]["reason"]), (&json!("refused"), &json!("quota")));

    let mut open = client(0, &alone).open(CHAT, &chat(&long_prompt(1), LONG)).await;
    open.until_text(1).await;
    comes_again(&ask(1, &alone).await);
    drop(open);
    wait_for("the place of a client that left", || async { (ask(1, &alone).await.status == 200).then_some(()) }).await;

    let complete = async |prompt: &str, tokens: Option<u64>| {
        let mut body = json!({"model": "baton-3m", "prompt": prompt, "temperature": 0, "ignore_eos": true});
        if let Some(tokens) = tokens {
            body["max_tokens"] = tokens.into();
        }
        client(1, &brief).post(COMPLETIONS, &body).await
    };
    refused(&complete(&long_prompt(2), Some(1)).await, 400, "context_length_exceeded");
    refused(&complete("And God said", Some(5)).await, 400, "context_length_exceeded");
    assert_eq!(complete("And God said", Some(4)).await.status, 200);
    let cut: Value = complete("And God said", None).await.json();
    assert_eq!(cut["usage"]["completion_tokens"], 4, "a default is cut to what the tenant may have: {cut}");

    let tokens = async |max: u32| {
        client(0, &spare)
            .post(COMPLETIONS, &json!({"model": "baton-3m", "prompt": "God", "max_tokens": max, "temperature": 0}))
            .await
    };
    refused(&tokens(100).await, 400, "context_length_exceeded");
    assert_eq!(tokens(30).await.status, 200);
    comes_again(&tokens(38).await);

    assert_eq!(ask(0, &free).await.status, 200);
    let batch = client(1, &free).with("x-baton-lane", "batch").post(CHAT, &chat("hello", 2)).await;
    assert_eq!(batch.status, 200);
    let neither = client(1, &free).with("x-baton-lane", "express").post(CHAT, &chat("hello", 2)).await;
    assert_eq!(neither.status, 400, "{}", neither.json());
    let usage: Value = serde_json::from_str(&fleet.done(&["tenant", "list", "--json"]).await).expect("JSON");
    let twice = usage["tenants"].as_array().and_then(|all| all.iter().find(|t| t["name"] == "twice").cloned());
    assert_eq!(twice.expect("listed")["requests_total"], 2, "what was refused is not billed: {usage}");
    let over = fleet.metric("coordinator-1", "baton_coordinator_refused_total", "reason=\"quota\"").await;
    assert!(over >= 4.0, "{over} refusals by quota are counted");
    let none = fleet.metric("coordinator-1", "baton_coordinator_headroom", "").await;
    assert!(none < 1.0, "a cluster of one decode worker can lose nobody, and has no prefill pool: {none}");
}

/// Goal: a gateway that others can reach refuses to start while the cluster has no keys, unless it is told to be open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_for_others_needs_keys() {
    let fleet = start(1).await;
    let coordinator = fleet.address("coordinator-1");
    let arguments = |port: u16| {
        [
            "gateway".into(),
            "--id".into(),
            format!("outer-{port}"),
            "--listen".into(),
            format!("0.0.0.0:{port}"),
            "--coordinator".into(),
            coordinator.clone(),
        ]
    };
    let texts = |arguments: &[String]| arguments.to_vec();

    let exposed = texts(&arguments(free_port()));
    let output = tokio::task::spawn_blocking(move || baton(&exposed.iter().map(String::as_str).collect::<Vec<_>>()));
    let output = output.await.expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("no API keys") && said.contains("--open") && said.contains("baton key create"), "{said}");

    let serves = async |port: u16, more: &[&str], key: Option<&str>| {
        let arguments = arguments(port);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let process = RoleProcess::start(&arguments);
        let client = Client::new(format!("127.0.0.1:{port}"));
        let asks = key.map_or(client.clone(), |key| client.with_key(key));
        wait_for("the gateway to serve", || async { (asks.try_get(MODELS).await.ok()?.status == 200).then_some(()) })
            .await;
        (process, client)
    };
    drop(serves(free_port(), &["--open"], None).await);
    let key = key(&fleet, "acme", &[]).await;
    let (_process, client) = serves(free_port(), &[], Some(&key)).await;
    refused(&client.get(MODELS).await, 401, "invalid_api_key");
}
