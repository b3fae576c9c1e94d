//! A small client of the OpenAI API over one connection per call, so that a dropped call is a dropped connection; or, where a
//! crowd shall cost what a real one does, over connections that are kept, as OpenAI's own client keeps them.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap};
use hyper::{Method, Request, Response};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;

/// Talks to one gateway.
#[derive(Clone, Debug)]
pub struct Client {
    /// `host:port`
    pub address: String,
    /// Sent with every request.
    headers: Vec<(String, String)>,
    /// Connections that are used again, shared by all clones; None: each call has its own.
    kept: Option<legacy::Client<HttpConnector, Full<Bytes>>>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    /// # Panics
    /// If the body is not JSON.
    pub fn json(&self) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e} in {} answer {text:?}", self.status))
    }
}

/// Why a stream did not begin.
#[derive(Clone, Debug)]
pub enum NotOpened {
    /// Nobody answered, or the connection broke before the answer.
    Unreachable(String),
    /// An answer other than 200.
    Refused { status: u16, retry_after: Option<Duration>, body: String },
}

impl std::fmt::Display for NotOpened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NotOpened::Unreachable(why) => f.write_str(why),
            NotOpened::Refused { status, body, .. } => write!(f, "{status} {body}"),
        }
    }
}

/// Everything a stream said, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Streamed {
    /// Text of each choice.
    pub text: Vec<String>,
    pub finish: Vec<Option<String>>,
    /// Log-probabilities as the stream spelled them, per choice.
    pub logprobs: Vec<Vec<Value>>,
    pub usage: Option<Value>,
    pub error: Option<Value>,
    /// `[DONE]` arrived.
    pub done: bool,
}

impl Streamed {
    /// The same with each choice's log-probabilities in one list, so that the events' borders do not count.
    pub fn joined(mut self) -> Streamed {
        for choice in &mut self.logprobs {
            let entries = choice.iter().flat_map(|l| l["content"].as_array().cloned().unwrap_or_default()).collect();
            *choice = vec![Value::Array(entries)];
        }
        self
    }

    fn choice(&mut self, index: usize) {
        while self.text.len() <= index {
            self.text.push(String::new());
            self.finish.push(None);
            self.logprobs.push(Vec::new());
        }
    }

    fn take(&mut self, data: &str) {
        if data == "[DONE]" {
            self.done = true;
            return;
        }
        let event: Value = serde_json::from_str(data).unwrap_or_else(|e| panic!("{e} in event {data:?}"));
        if let Some(error) = event.get("error") {
            self.error = Some(error.clone());
        }
        if let Some(usage) = event.get("usage").filter(|u| !u.is_null()) {
            self.usage = Some(usage.clone());
        }
        for choice in event["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().unwrap_or(0) as usize;
            self.choice(index);
            let text = choice["delta"]["content"].as_str().or(choice["text"].as_str());
            self.text[index].push_str(text.unwrap_or_default());
            if let Some(finish) = choice["finish_reason"].as_str() {
                self.finish[index] = Some(finish.to_string());
            }
            if let Some(logprobs) = choice.get("logprobs").filter(|l| !l.is_null()) {
                self.logprobs[index].push(logprobs.clone());
            }
        }
    }
}

/// A stream being read.
pub struct Events {
    body: Incoming,
    unread: Vec<u8>,
    pub so_far: Streamed,
    pub headers: HeaderMap,
    /// Of the last event that had one, for `Last-Event-ID`.
    pub last_id: Option<String>,
    /// The answer's own, once an event has told it.
    pub answer: Option<String>,
}

impl Events {
    /// Reads one more network frame. False at the end.
    pub async fn advance(&mut self) -> bool {
        let Some(Ok(frame)) = self.body.frame().await else { return false };
        if let Ok(data) = frame.into_data() {
            self.unread.extend_from_slice(&data);
        }
        while let Some(end) = self.unread.windows(2).position(|w| w == b"\n\n") {
            let event: Vec<u8> = self.unread.drain(..end + 2).collect();
            let event = std::str::from_utf8(&event).expect("events are UTF-8");
            for line in event.lines() {
                if let Some(data) = line.strip_prefix("data:") {
                    self.answer = self.answer.take().or_else(|| answer_id(data));
                    self.so_far.take(data.trim());
                } else if let Some(id) = line.strip_prefix("id:") {
                    self.last_id = Some(id.trim().to_string());
                }
            }
        }
        true
    }

    /// Goes on where another connection's reading of the same stream ended.
    pub fn after(mut self, before: Events) -> Events {
        self.so_far = before.so_far;
        (self.last_id, self.answer) = (before.last_id, before.answer);
        self
    }

    /// Reads until the first choice holds so many bytes of text, or the stream ends.
    pub async fn until_text(&mut self, bytes: usize) {
        while self.so_far.text.first().map_or(0, String::len) < bytes {
            if !self.advance().await {
                return;
            }
        }
    }

    /// Reads to the end.
    pub async fn finish(mut self) -> Streamed {
        while self.advance().await {}
        self.so_far
    }
}

/// The id of the answer that an event belongs to.
fn answer_id(event: &str) -> Option<String> {
    let id = event.split_once("\"id\":\"")?.1;
    Some(id.split_once('"')?.0.to_string())
}

/// When to come again, as OpenAI's own client reads it: to the millisecond where the server says so, else in seconds.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let number = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    number("retry-after-ms").map(Duration::from_millis).or(number("retry-after").map(Duration::from_secs))
}

impl Client {
    pub fn new(address: impl Into<String>) -> Client {
        Client { address: address.into(), headers: Vec::new(), kept: None }
    }

    /// The same client with connections that are kept for further calls once an answer has been read to its end.
    pub fn keeping_connections(&self) -> Client {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let kept = legacy::Client::builder(TokioExecutor::new()).build(connector);
        Client { kept: Some(kept), ..self.clone() }
    }

    /// The same client with one more header in every request.
    pub fn with(&self, name: &str, value: impl Into<String>) -> Client {
        let mut client = self.clone();
        client.headers.push((name.to_string(), value.into()));
        client
    }

    /// The same client with an API key.
    pub fn with_key(&self, key: &str) -> Client {
        self.with("authorization", format!("Bearer {key}"))
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, String> {
        let request = |uri: String| {
            let mut request = Request::builder().method(method).uri(uri).header(HOST, &self.address);
            for (name, value) in &self.headers {
                request = request.header(name, value);
            }
            request.header(CONTENT_TYPE, "application/json").body(Full::new(body)).map_err(|e| e.to_string())
        };
        if let Some(kept) = &self.kept {
            return kept.request(request(format!("http://{}{path}", self.address))?).await.map_err(|e| e.to_string());
        }
        let stream = tokio::net::TcpStream::connect(&self.address).await.map_err(|e| e.to_string())?;
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        tokio::spawn(connection);
        sender.send_request(request(path.to_string())?).await.map_err(|e| e.to_string())
    }

    async fn reply(&self, method: Method, path: &str, body: Bytes) -> Result<Reply, String> {
        let response = self.send(method, path, body).await?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(|e| e.to_string())?.to_bytes();
        Ok(Reply { status: parts.status.as_u16(), headers: parts.headers, body })
    }

    pub async fn try_get(&self, path: &str) -> Result<Reply, String> {
        self.reply(Method::GET, path, Bytes::new()).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.try_get(path).await.unwrap_or_else(|e| panic!("GET {path}: {e}"))
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_bytes(path, body.to_string().into()).await
    }

    pub async fn post_bytes(&self, path: &str, body: Bytes) -> Reply {
        self.reply(Method::POST, path, body).await.unwrap_or_else(|e| panic!("POST {path}: {e}"))
    }

    /// Starts a stream; the answer's status must be 200.
    pub async fn open(&self, path: &str, body: &Value) -> Events {
        self.try_open(path, body).await.unwrap_or_else(|e| panic!("POST {path}: {e}"))
    }

    pub async fn try_open(&self, path: &str, body: &Value) -> Result<Events, NotOpened> {
        let mut body = body.clone();
        body["stream"] = true.into();
        self.events(Method::POST, path, body.to_string().into()).await
    }

    /// A stream that needs no body.
    pub async fn try_open_get(&self, path: &str) -> Result<Events, NotOpened> {
        self.events(Method::GET, path, Bytes::new()).await
    }

    async fn events(&self, method: Method, path: &str, body: Bytes) -> Result<Events, NotOpened> {
        let response = self.send(method, path, body).await.map_err(NotOpened::Unreachable)?;
        let (parts, body) = response.into_parts();
        let status = parts.status.as_u16();
        if status != 200 {
            let body = body.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
            let retry_after = retry_after(&parts.headers);
            let body = String::from_utf8_lossy(&body).into_owned();
            return Err(NotOpened::Refused { status, retry_after, body });
        }
        let (unread, so_far) = (Vec::new(), Streamed::default());
        Ok(Events { body, unread, so_far, headers: parts.headers, last_id: None, answer: None })
    }

    /// A stream read to its end.
    pub async fn stream(&self, path: &str, body: &Value) -> Streamed {
        self.open(path, body).await.finish().await
    }
}
