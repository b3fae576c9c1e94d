//! The host of all clients: each sends one request over HTTP as an OpenAI client does, retries what was refused, takes a
//! resumable stream up again where another gateway can go on with it, and writes down what it was told.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_core::TokenId;
use baton_core::net::Net;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

use super::World;
use super::gateway::DEADLINE_MS;
use super::operator::Order;
use crate::model;
use crate::net::TurmoilNet;
use crate::topology::{CLIENTS, GATEWAY_PORT};
use crate::workload::Ask;

/// Times a request that was not accepted is sent again.
const TRIES_MAX: u32 = 8;
/// The longest pause before that, whatever the answer advises: the clients of a run are impatient.
const PAUSE_MAX: Duration = Duration::from_millis(1_000);
const CONNECT: Duration = Duration::from_millis(1_000);
/// How long a client waits for the next word. A gateway ends a request before.
const PATIENCE: Duration = Duration::from_millis(DEADLINE_MS + 5_000);
/// How often a stream is taken up again.
const RESUMES_MAX: u32 = 20;

/// How a request ended for its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Complete,
    /// An error of the gateway, before the first token or behind it.
    Error {
        status: u16,
        code: String,
        message: String,
    },
    /// The connection ended without a word.
    Broken(String),
    /// The client went away.
    Cancelled,
    /// No gateway could be reached.
    Unreached,
}

/// What one client was told.
#[derive(Clone, Debug)]
pub struct Told {
    pub ask: Ask,
    pub tokens: Vec<Vec<TokenId>>,
    pub finishes: Vec<Option<String>>,
    /// When the first answer with status 200 came.
    pub accepted: Option<Duration>,
    /// (gateway, which life of it) that accepted.
    pub gateway: Option<(String, u64)>,
    pub ended: Option<(Duration, End)>,
    /// What was told against the protocol.
    pub wrong: Option<String>,
}

/// All clients' notes, by the numbers of their requests.
#[derive(Clone)]
pub struct Notes {
    told: Arc<Mutex<Vec<Told>>>,
    /// How often a client was told anything.
    changes: Arc<AtomicU64>,
}

impl Notes {
    pub fn new(asks: &[Ask]) -> Notes {
        let told = |ask: &Ask| Told {
            ask: ask.clone(),
            tokens: vec![Vec::new(); ask.choices as usize],
            finishes: vec![None; ask.choices as usize],
            accepted: None,
            gateway: None,
            ended: None,
            wrong: None,
        };
        Notes { told: Arc::new(Mutex::new(asks.iter().map(told).collect())), changes: Arc::default() }
    }

    pub fn lock(&self) -> MutexGuard<'_, Vec<Told>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// While it stays the same, nobody has been told anything.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    fn change(&self, number: usize, change: impl FnOnce(&mut Told)) {
        self.changes.fetch_add(1, Ordering::Relaxed);
        change(&mut self.lock()[number]);
    }
}

/// Runs all clients, and the operator, to their ends. `healed` tells when the last requests may be sent.
pub async fn run(
    world: World,
    notes: Notes,
    healed: watch::Receiver<bool>,
    orders: mpsc::Receiver<Order>,
) -> turmoil::Result {
    let start = tokio::time::Instant::now();
    let asks: Vec<Ask> = notes.lock().iter().map(|told| told.ask.clone()).collect();
    let mut operator = JoinSet::new();
    operator.spawn(super::operator::run(world.clone(), orders));
    let mut clients = JoinSet::new();
    clients.spawn(super::askers::run(world.clone(), healed.clone()));
    for ask in asks {
        let (world, notes, mut healed) = (world.clone(), notes.clone(), healed.clone());
        let mut crowd = world.crowd.subscribe();
        clients.spawn(async move {
            match ask.at {
                Some(at) => tokio::select! {
                    biased;
                    () = sleep_until(start + at) => {}
                    _ = crowd.changed() => {}
                },
                None => drop(healed.wait_for(|healed| *healed).await),
            }
            Client { world, notes, ask, last_event: None, stream: None, name: String::new() }.live().await;
        });
    }
    while clients.join_next().await.is_some() {}
    // The operator is of this host: what it has been told to do and has not done yet would not be done any more.
    let _ = world.orders.subscribe().wait_for(|open| *open == 0).await;
    Ok(())
}

struct Client {
    world: World,
    notes: Notes,
    ask: Ask,
    last_event: Option<String>,
    /// Name under which a stream can be taken up again.
    stream: Option<String>,
    /// Id of the answer.
    name: String,
}

/// How one try ended.
enum Tried {
    End(End),
    /// Not accepted; worth another try after the pause.
    Again(Duration, End),
}

impl Client {
    async fn live(mut self) {
        let (after, left) = (self.ask.cancel_after, self.left());
        let end = tokio::select! {
            biased;
            () = left => End::Cancelled,
            end = async {
                match after {
                    Some(after) => timeout(after, self.until_its_end()).await.unwrap_or(End::Cancelled),
                    None => self.until_its_end().await,
                }
            } => end,
        };
        let now = self.world.record.now();
        self.world.record.note(CLIENTS, format!("request {} ends: {end:?}", self.ask.number));
        self.told(|told| told.ended = Some((now, end)));
    }

    /// Resolves when the crowd goes away while this client waits for its first token.
    fn left(&self) -> impl Future<Output = ()> + use<> {
        let (mut crowd, notes, number) = (self.world.crowd.subscribe(), self.notes.clone(), self.ask.number);
        let stays = self.ask.at.is_none();
        async move {
            loop {
                if stays || crowd.changed().await.is_err() {
                    return std::future::pending().await;
                }
                if notes.lock()[number].accepted.is_none() {
                    return;
                }
            }
        }
    }

    fn told(&self, change: impl FnOnce(&mut Told)) {
        self.notes.change(self.ask.number, change);
    }

    async fn until_its_end(&mut self) -> End {
        let gateways = self.world.topology.gateway_names();
        let mut last = End::Unreached;
        let mut resumes = 0;
        for attempt in 0..TRIES_MAX as usize {
            let host = &gateways[(self.ask.gateway + attempt) % gateways.len()];
            match self.ask_once(host).await {
                Tried::End(End::Broken(why)) if self.ask.resumable_s.is_some() && self.stream.is_some() => {
                    last = End::Broken(why);
                    while resumes < RESUMES_MAX {
                        resumes += 1;
                        let host = &gateways[(self.ask.gateway + attempt + resumes as usize) % gateways.len()];
                        match self.resume(host).await {
                            Tried::End(End::Broken(_)) => sleep(Duration::from_millis(100)).await,
                            Tried::End(end) => return end,
                            Tried::Again(pause, end) => {
                                last = end;
                                sleep(pause).await;
                            }
                        }
                    }
                    return last;
                }
                Tried::End(end) => return end,
                Tried::Again(pause, end) => {
                    last = end;
                    sleep(pause).await;
                }
            }
        }
        last
    }

    fn body(&self) -> Value {
        let ask = &self.ask;
        let mut body = json!({
            "model": model::NAME, "prompt": ask.prompt, "max_tokens": ask.tokens_max, "n": ask.choices,
            "stream": ask.stream, "return_token_ids": true, "temperature": if ask.seed.is_some() { 1.0 } else { 0.0 },
        });
        if let Some(seed) = ask.seed {
            body["seed"] = json!(seed);
        }
        if ask.batch {
            body["service_tier"] = json!("batch");
        }
        body
    }

    async fn ask_once(&mut self, host: &str) -> Tried {
        let mut request = Request::post("/v1/completions").header("host", host);
        if let Some(seconds) = self.ask.resumable_s {
            request = request.header("x-baton-resumable", seconds.to_string());
        }
        let request = request.body(Full::new(Bytes::from(self.body().to_string()))).expect("a well-formed request");
        self.send(host, request).await
    }

    async fn resume(&mut self, host: &str) -> Tried {
        let name = self.stream.clone().unwrap_or_default();
        let mut request = Request::get(format!("/v1/streams/{name}")).header("host", host);
        if let Some(last) = &self.last_event {
            request = request.header("last-event-id", last);
        }
        let request = request.body(Full::new(Bytes::new())).expect("a well-formed request");
        self.world.record.note(CLIENTS, format!("request {} is taken up again at {host}", self.ask.number));
        self.send(host, request).await
    }

    async fn send(&mut self, host: &str, request: Request<Full<Bytes>>) -> Tried {
        let address = format!("{host}:{GATEWAY_PORT}");
        let unreached = || Tried::Again(Duration::from_millis(200), End::Unreached);
        // Whose answer it is: by the time that it is here, another life may have begun.
        let life = self.world.seen().gateways.get(host).copied().unwrap_or_default();
        let Ok(Ok(stream)) = timeout(CONNECT, TurmoilNet.connect(&address)).await else { return unreached() };
        let Ok((mut sender, connection)) = http1::handshake(TokioIo::new(stream)).await else { return unreached() };
        // Ends with this function, and the connection with it.
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        let answered = timeout(PATIENCE, sender.send_request(request)).await;
        let response = match answered {
            Ok(Ok(response)) => response,
            // Whether it was accepted is unknown; asking again is what clients do.
            Ok(Err(_)) => return unreached(),
            Err(_) => return Tried::End(End::Broken("no answer within its deadline".into())),
        };
        if response.status() != 200 {
            return refused(response).await;
        }
        let now = self.world.record.now();
        self.world.record.note(CLIENTS, format!("request {} is accepted by {host}", self.ask.number));
        self.told(|told| {
            told.accepted.get_or_insert(now);
            told.gateway = Some((host.to_string(), life));
        });
        if let Some(name) = response.headers().get("x-baton-stream").and_then(|name| name.to_str().ok()) {
            self.stream = Some(name.to_string());
        }
        Tried::End(match self.ask.stream {
            true => self.read_stream(response.into_body()).await,
            false => self.read_whole(response.into_body()).await,
        })
    }

    async fn read_whole(&mut self, body: Incoming) -> End {
        match timeout(PATIENCE, body.collect()).await {
            Ok(Ok(body)) => {
                let object: Value = serde_json::from_slice(&body.to_bytes()).unwrap_or_default();
                self.take(&object);
                End::Complete
            }
            Ok(Err(error)) => End::Broken(error.to_string()),
            Err(_) => End::Broken("silent beyond its deadline".into()),
        }
    }

    async fn read_stream(&mut self, mut body: Incoming) -> End {
        let mut unread = Vec::new();
        loop {
            let slow_ms = self.world.slow_ms.load(Ordering::Relaxed);
            if slow_ms > 0 {
                sleep(Duration::from_millis(slow_ms)).await;
            }
            let frame = match timeout(PATIENCE, body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => return End::Broken(error.to_string()),
                Ok(None) => return End::Broken("the stream ended without its end".into()),
                Err(_) => return End::Broken("silent beyond its deadline".into()),
            };
            unread.extend_from_slice(&frame.into_data().unwrap_or_default());
            while let Some(at) = unread.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = unread.drain(..at + 2).collect();
                if let Some(end) = self.take_event(&String::from_utf8_lossy(&event)) {
                    return end;
                }
            }
        }
    }

    fn take_event(&mut self, event: &str) -> Option<End> {
        let mut end = None;
        for line in event.lines() {
            if let Some(id) = line.strip_prefix("id: ") {
                self.last_event = Some(id.to_string());
            }
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                end = Some(End::Complete);
                continue;
            }
            let object: Value = serde_json::from_str(data).unwrap_or_default();
            match object.get("error") {
                Some(error) => end = Some(error_of(200, error)),
                None => self.take(&object),
            }
        }
        end
    }

    /// Takes the tokens of an object in.
    fn take(&mut self, object: &Value) {
        let name = object["id"].as_str().unwrap_or_default();
        if self.name != name {
            self.name = name.to_string();
            self.world.record.detail(CLIENTS, format!("request {} is {name}", self.ask.number));
        }
        for choice in object["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().unwrap_or(u64::MAX) as usize;
            let tokens = choice["token_ids"].as_array().into_iter().flatten();
            let tokens: Vec<TokenId> = tokens.map(|id| id.as_u64().unwrap_or(u64::MAX) as TokenId).collect();
            let finish = choice["finish_reason"].as_str().map(str::to_string);
            self.world.record.network(CLIENTS, b't', tokens.len());
            self.told(|told| {
                if index >= told.tokens.len() {
                    told.wrong = Some(format!("a choice numbered {index} of {}", told.tokens.len()));
                    return;
                }
                if told.finishes[index].is_some() {
                    told.wrong = Some(format!("choice {index} goes on after its end"));
                }
                told.tokens[index].extend(tokens);
                if finish.is_some() {
                    told.finishes[index] = finish;
                }
            });
        }
    }
}

async fn refused(response: Response<Incoming>) -> Tried {
    let status = response.status().as_u16();
    let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let pause = Duration::from_millis(header("retry-after-ms").unwrap_or(100)).min(PAUSE_MAX);
    let body = match timeout(PATIENCE, response.into_body().collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        _ => Bytes::new(),
    };
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let end = error_of(status, &body["error"]);
    match status {
        429 | 503 => Tried::Again(pause, end),
        _ => Tried::End(end),
    }
}

fn error_of(status: u16, error: &Value) -> End {
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_string();
    End::Error { status, code: text("code"), message: text("message") }
}
