//! Streams that outlive their gateway: another one goes on with the same bytes, from the event after the last one read.

use std::collections::BTreeMap;

use baton_proto::v1::{Access, AccessKey};
use serde_json::{Value, json};

use crate::chat::hi;
use crate::client::{Stream, get_with, post_with, stream_with};
use crate::world::{MODEL, Script, World, start};

const CHAT: &str = "/v1/chat/completions";
const RESUMABLE: (&str, &str) = ("x-baton-resumable", "30");

fn texts() -> Vec<Vec<u8>> {
    vec!["the quick brown 🦊 jumps over".into(), "two: déjà vu, stop here, and more".into()]
}

fn script() -> Script {
    Script { texts: texts(), ..Script::default() }
}

fn completion(changes: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": "abc", "max_tokens": 40});
    body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    body
}

/// Every shape a stream can have.
fn bodies() -> Vec<(&'static str, Value)> {
    let all = json!({"include_usage": true, "continuous_usage_stats": true});
    let usage = json!({"include_usage": true});
    let bodies = [
        (CHAT, hi(json!({}))),
        (CHAT, hi(json!({"n": 2, "stream_options": usage}))),
        (CHAT, hi(json!({"logprobs": true, "top_logprobs": 3, "stream_options": all}))),
        (CHAT, hi(json!({"n": 2, "stop": ["brown", "stop"], "logprobs": true, "stream_options": usage}))),
        (CHAT, hi(json!({"n": 2, "return_token_ids": true}))),
        ("/v1/completions", completion(json!({"n": 2, "stop": "stop", "include_stop_str_in_output": true}))),
        ("/v1/completions", completion(json!({"logprobs": 2, "echo": true, "stream_options": usage}))),
    ];
    let streamed = |(path, mut body): (&'static str, Value)| {
        body["stream"] = true.into();
        (path, body)
    };
    bodies.into_iter().map(streamed).collect()
}

/// Events as they were sent, by choice; those without a choice under None. What names the reply is blanked.
#[derive(Debug, Default, PartialEq)]
struct Told(BTreeMap<Option<u64>, Vec<String>>);

impl Told {
    fn add(&mut self, raw: &str) -> String {
        let (id, data) = raw.split_once("\ndata: ").unwrap_or_else(|| panic!("an event without id: {raw}"));
        let mut choice = None;
        let mut text = data.trim_end().to_string();
        if let Ok(mut value) = serde_json::from_str::<Value>(&text) {
            assert!(value.get("error").is_none(), "{text}");
            choice = value["choices"].get(0).map(|choice| choice["index"].as_u64().unwrap());
            value["id"] = "".into();
            value["created"] = 0.into();
            text = value.to_string();
        }
        self.0.entry(choice).or_default().push(text);
        id.strip_prefix("id: ").unwrap().to_string()
    }

    async fn rest(&mut self, mut stream: Stream) {
        assert_eq!(stream.status, 200);
        while let Some(raw) = stream.raw().await {
            self.add(&raw);
        }
        let ends = self.0.get(&None).map(|ends| ends.iter().filter(|text| *text == "[DONE]").count());
        assert_eq!(ends, Some(1), "{self:?}");
    }
}

fn name(stream: &Stream) -> String {
    stream.headers["x-baton-stream"].to_str().unwrap().to_string()
}

async fn resume(address: &str, name: &str, last: Option<&str>) -> Stream {
    let headers: Vec<_> = last.map(|id| ("last-event-id", id)).into_iter().collect();
    get_with(address, &format!("/v1/streams/{name}"), &headers).await
}

async fn undisturbed(path: &str, body: &Value) -> (Told, u64) {
    let world = World::new(vec![script()]).await;
    let mut told = Told::default();
    told.rest(stream_with(&world.address(), path, &[RESUMABLE], body).await).await;
    world.until(|seen| seen.finishes.len() == 1).await;
    let generated = world.seen.borrow().finishes[0].generated_tokens;
    (told, generated)
}

/// Reads so many events through a gateway that is killed once the last worker has the request, and the rest through
/// another one.
async fn broken_off(world: &mut World, path: &str, body: &Value, events: usize) -> Told {
    let gateway = world.mortal_gateway("gateway-1").await;
    let mut stream = stream_with(&gateway.address, path, &[RESUMABLE], body).await;
    assert_eq!(stream.status, 200);
    let (name, mut told, mut last) = (name(&stream), Told::default(), None);
    for _ in 0..events {
        last = Some(told.add(&stream.raw().await.unwrap()));
    }
    let workers = world.workers.len();
    world.until(|seen| seen.starts.len() == workers).await;
    drop(gateway);
    while stream.raw().await.is_some() {}
    for worker in 0..world.workers.len() {
        world.set_script(worker, script());
    }
    told.rest(resume(&world.address(), &name, last.as_deref()).await).await;
    told
}

/// Whatever the shape of the stream and wherever it breaks, the client has the same bytes, and is billed once.
#[tokio::test]
async fn another_gateway_goes_on_with_the_same_bytes() {
    for (path, body) in bodies() {
        let (expected, generated) = undisturbed(path, &body).await;
        for (pause_after, events) in [(1, 1), (6, 3), (16, 0)] {
            let pause = Script { pause_after: Some(pause_after), ..script() };
            let mut world = World::new(vec![pause]).await;
            let told = broken_off(&mut world, path, &body, events).await;
            assert_eq!(told, expected, "{body}, paused after {pause_after}, {events} events read");
            world.until(|seen| seen.finishes.len() == 1).await;
            let seen = world.seen.borrow();
            assert_eq!((seen.finishes[0].outcome.as_str(), seen.finishes[0].epoch), ("complete", 1));
            assert_eq!(seen.finishes[0].generated_tokens, generated, "{body}");
            assert_eq!((seen.starts.len(), seen.resumes.len(), seen.assigns.len()), (1, 1, 1));
            assert_eq!((seen.assigns[0].resumable_ms, seen.starts[0].1.resumable_ms), (30_000, 30_000));
            assert!(seen.locates.last().is_some_and(|l| l.gateway.starts_with("gateway-0/")));
        }
    }
}

/// A worker is lost before the gateway: the second worker's note knows what the first one said.
#[tokio::test]
async fn what_an_earlier_worker_said_is_not_lost() {
    for (path, body) in bodies() {
        let (expected, generated) = undisturbed(path, &body).await;
        let lose = Script { lose_after: Some(7), ..script() };
        let pause = Script { pause_after: Some(9), ..script() };
        let mut world = World::new(vec![lose, pause]).await;
        let told = broken_off(&mut world, path, &body, 2).await;
        assert_eq!(told, expected, "{body}");
        world.until(|seen| seen.finishes.len() == 1).await;
        assert_eq!(world.seen.borrow().finishes[0].generated_tokens, generated, "{body}");
        assert_eq!(world.seen.borrow().starts.len(), 2);
    }
}

/// The worker is lost after the gateway: the second gateway assigns anew, as the first one would have.
#[tokio::test]
async fn a_stream_taken_over_survives_the_loss_of_its_worker() {
    for (path, body) in bodies() {
        let (expected, _) = undisturbed(path, &body).await;
        let mut world = World::new(vec![Script { pause_after: Some(8), ..script() }, script()]).await;
        let gateway = world.mortal_gateway("gateway-1").await;
        let mut stream = stream_with(&gateway.address, path, &[RESUMABLE], &body).await;
        let (name, mut told) = (name(&stream), Told::default());
        let last = told.add(&stream.raw().await.unwrap());
        drop(gateway);
        let resumed = resume(&world.address(), &name, Some(&last)).await;
        assert_eq!((resumed.status, self::name(&resumed)), (200, name));
        world.workers[0].died.send_replace(true);
        told.rest(resumed).await;
        assert_eq!(told, expected, "{body}");
        let seen = world.seen.borrow();
        let [_, (_, second)] = seen.starts.as_slice() else { panic!("two starts") };
        assert_eq!(second.assignment.as_ref().map(|a| (a.attempt, a.epoch)), Some((2, 2)));
        assert_eq!(seen.assigns[1].previous_epoch, 1);
        assert!(seen.assigns[1].gateway.starts_with("gateway-0/"));
    }
}

/// A client leaves while the gateway that takes its stream over asks to become responsible for it: the question is asked to its
/// end, and the end told after it, for an end that comes first is one of another gateway's request.
#[tokio::test]
async fn an_end_does_not_overtake_the_taking_over() {
    let mut world = World::new(vec![Script { pause_after: Some(3), ..script() }]).await;
    let gateway = world.mortal_gateway("gateway-1").await;
    let stream = stream_with(&gateway.address, CHAT, &[RESUMABLE], &hi(json!({"stream": true}))).await;
    let name = name(&stream);
    drop(gateway);
    world.ledger.holds.send_replace(true);
    let address = world.address();
    let client = tokio::spawn(async move { resume(&address, &name, None).await });
    world.until(|seen| seen.locates.iter().any(|locate| !locate.gateway.is_empty())).await;
    client.abort();
    world.until(|seen| seen.cancels.len() == 1).await;
    world.ledger.holds.send_replace(false);
    world.until(|seen| seen.finishes.len() == 1).await;
    let seen = world.seen.borrow();
    let ended = &seen.finishes[0];
    assert_eq!((ended.outcome.as_str(), ended.epoch), ("cancelled", 1));
    assert_eq!(
        seen.adopted,
        std::slice::from_ref(&ended.request),
        "the end was told before the request was this gateway's"
    );
}

/// A stream that ended while nobody listened is told to its end, and can be asked for again.
#[tokio::test]
async fn a_stream_that_has_ended_meanwhile_is_told_to_its_end() {
    let body = hi(json!({"stream": true, "n": 2}));
    let (expected, _) = undisturbed(CHAT, &body).await;
    let mut world = World::new(vec![Script { pause_after: Some(3), ..script() }]).await;
    let gateway = world.mortal_gateway("gateway-1").await;
    let mut stream = stream_with(&gateway.address, CHAT, &[RESUMABLE], &body).await;
    let (name, mut told) = (name(&stream), Told::default());
    let last = told.add(&stream.raw().await.unwrap());
    drop(gateway);
    world.set_script(0, script());
    let whole: usize = texts().iter().map(|text| text.len() + 1).sum();
    world.until(|seen| seen.generated == whole).await;
    told.rest(resume(&world.address(), &name, Some(&last)).await).await;
    assert_eq!(told, expected);
    let mut again = Told::default();
    again.rest(resume(&world.address(), &name, None).await).await;
    assert_eq!(again, expected);
    world.until(|seen| seen.finishes.len() == 2).await;
    let seen = world.seen.borrow();
    assert_eq!(seen.finishes[0], seen.finishes[1], "the ledger knows the second one as the same");
}

#[tokio::test]
async fn only_a_stream_that_goes_on_can_be_resumed() {
    let mut world = World::new(vec![Script { pause_after: Some(3), ..script() }]).await;
    let body = hi(json!({"stream": true}));
    let ask = async |name: &str, last| resume(&world.address(), name, last).await.whole().await;
    for unknown in ["x", &"0".repeat(32)] {
        let answer = ask(unknown, None).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (404, &json!("stream_not_found")), "{unknown}");
    }
    let gateway = world.mortal_gateway("gateway-1").await;
    let stream = stream_with(&gateway.address, CHAT, &[RESUMABLE], &body).await;
    let name = name(&stream);
    drop(gateway);
    let ask = async |last| resume(&world.address(), &name, last).await;
    for bad in ["", "1", "1.2.3", "a.b"] {
        assert_eq!(ask(Some(bad)).await.status, 400, "{bad:?}");
    }
    assert_eq!(ask(Some("1.0")).await.status, 200, "a bad question does not end it");
    world.workers[0].died.send_replace(true);
    let lost = ask(None).await.whole().await;
    assert_eq!((lost.status, &lost.json()["error"]["code"]), (410, &json!("stream_lost")));
}

#[tokio::test]
async fn a_stream_belongs_to_its_tenant() {
    let mut world = World::new(vec![Script { pause_after: Some(3), ..script() }]).await;
    let key = |id: &str| AccessKey {
        id: id.into(),
        secret_hash: blake3::hash(id.as_bytes()).as_bytes().to_vec().into(),
        tenant: format!("tenant-{id}"),
        created_unix_s: 0,
    };
    let gateway = world.mortal_gateway("gateway-1").await;
    world.ledger.access.send_replace(Access { keys: vec![key("one"), key("two")], ..Access::default() });
    let bearer = |id: &str| ("authorization", format!("Bearer {id}"));
    let (one, two) = (bearer("one"), bearer("two"));
    let body = hi(json!({"stream": true}));
    let stream = loop {
        let stream = stream_with(&gateway.address, CHAT, &[RESUMABLE, (one.0, &one.1)], &body).await;
        let tenant = world.seen.borrow().assigns.last().map(|a| a.tenant.clone());
        if stream.status == 200 && tenant.as_deref() == Some("tenant-one") {
            break stream;
        }
    };
    let path = format!("/v1/streams/{}", name(&stream));
    drop(gateway);
    while get_with(&world.address(), &path, &[]).await.status != 401 {}
    assert_eq!(get_with(&world.address(), &path, &[(two.0, &two.1)]).await.status, 404);
    assert_eq!(get_with(&world.address(), &path, &[(one.0, &one.1)]).await.status, 200);
}

#[tokio::test]
async fn what_cannot_be_resumable_is_refused() {
    let world = World::hello().await;
    let status = async |seconds: &str, path: &str, body: Value| {
        post_with(&world.address(), path, &[("x-baton-resumable", seconds)], &body).await.status
    };
    for seconds in ["0", "301", "-1", "x", "", "1.5", "99999999999999999999"] {
        assert_eq!(status(seconds, CHAT, hi(json!({"stream": true}))).await, 400, "{seconds:?}");
    }
    assert_eq!(status("30", CHAT, hi(json!({}))).await, 400, "not a stream");
    let many = json!({"model": MODEL, "prompt": ["a", "b"], "stream": true});
    assert_eq!(status("30", "/v1/completions", many).await, 400, "two prompts");
    assert_eq!(status("300", CHAT, hi(json!({"stream": true}))).await, 200);
    assert_eq!(world.seen.borrow().starts.len(), 1);
}

/// A gateway that is stopped in good order leaves its resumable streams to the others, and ends the rest.
#[tokio::test]
async fn a_gateway_that_stops_leaves_its_streams_going() {
    let world = World::new(vec![Script { pause_after: Some(3), ..script() }]).await;
    let stopping = start(world.config("gateway-1")).await.unwrap();
    while crate::client::get(&stopping.address(), "/health").await.status != 200 {}
    let body = hi(json!({"stream": true}));
    let mut kept = stream_with(&stopping.address(), CHAT, &[RESUMABLE], &body).await;
    let mut ended = stream_with(&stopping.address(), CHAT, &[], &body).await;
    let (name, mut told) = (name(&kept), Told::default());
    let last = told.add(&kept.raw().await.unwrap());
    assert_eq!(ended.status, 200);
    stopping.stop().await;
    while ended.raw().await.is_some() {}
    world.until(|seen| seen.finishes.len() == 1).await;
    assert_eq!(world.seen.borrow().finishes[0].outcome, "cancelled");
    world.set_script(0, script());
    told.rest(resume(&world.address(), &name, Some(&last)).await).await;
    assert_eq!(told, undisturbed(CHAT, &body).await.0);
    world.until(|seen| seen.finishes.len() == 2).await;
    assert_eq!(world.seen.borrow().finishes[1].outcome, "complete");
}

/// A client that leaves while its gateway drains ends its request, resumable or not.
#[tokio::test]
async fn who_leaves_a_gateway_that_drains_cancels() {
    let world = World::new(vec![Script { pause_after: Some(3), ..script() }]).await;
    let stopping = start(world.config("gateway-1")).await.unwrap();
    let address = stopping.address();
    while crate::client::get(&address, "/health").await.status != 200 {}
    let mut stream = stream_with(&address, CHAT, &[RESUMABLE], &hi(json!({"stream": true}))).await;
    stream.raw().await.unwrap();
    let stopped = tokio::spawn(stopping.stop());
    while baton_core::Net::connect(&baton_proto::TcpNet, &address).await.is_ok() {}
    drop(stream);
    world.until(|seen| seen.finishes.len() == 1).await;
    assert_eq!(world.seen.borrow().finishes[0].outcome, "cancelled");
    stopped.await.unwrap();
}
