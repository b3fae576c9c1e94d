//! A small HTTP client: one connection per request, so that dropping a response is a client that goes away.

use baton_core::Net;
use baton_proto::TcpNet;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::task::JoinSet;

/// A response read to its end.
pub(crate) struct Response {
    pub status: u16,
    pub headers: hyper::HeaderMap,
    pub body: Bytes,
}

impl Response {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|v| v.to_str().ok())
    }
}

/// A response whose events are read one by one. Dropping it closes the connection.
pub(crate) struct Stream {
    pub status: u16,
    pub headers: hyper::HeaderMap,
    body: Incoming,
    buffer: Vec<u8>,
    _connection: JoinSet<()>,
}

pub(crate) async fn get(address: &str, path: &str) -> Response {
    send(address, Request::get(path), Bytes::new()).await.whole().await
}

pub(crate) async fn post(address: &str, path: &str, body: &Value) -> Response {
    post_bytes(address, path, body.to_string().into()).await
}

pub(crate) async fn post_bytes(address: &str, path: &str, body: Bytes) -> Response {
    send(address, Request::post(path), body).await.whole().await
}

/// A post with headers of its own.
pub(crate) async fn post_with(address: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> Response {
    stream_with(address, path, headers, body).await.whole().await
}

pub(crate) async fn stream_with(address: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> Stream {
    let request = headers.iter().fold(Request::post(path), |request, (name, value)| request.header(*name, *value));
    send(address, request, body.to_string().into()).await
}

pub(crate) async fn get_with(address: &str, path: &str, headers: &[(&str, &str)]) -> Stream {
    let request = headers.iter().fold(Request::get(path), |request, (name, value)| request.header(*name, *value));
    send(address, request, Bytes::new()).await
}

pub(crate) async fn stream(address: &str, path: &str, body: &Value) -> Stream {
    send(address, Request::post(path), body.to_string().into()).await
}

pub(crate) async fn send(address: &str, request: hyper::http::request::Builder, body: Bytes) -> Stream {
    let io = TcpNet.connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
    let mut connections = JoinSet::new();
    connections.spawn(async move { drop(connection.await) });
    let request = request.header(header::HOST, "test").body(Full::new(body)).unwrap();
    let response = sender.send_request(request).await.unwrap();
    let (head, body) = response.into_parts();
    let status = head.status.as_u16();
    Stream { status, headers: head.headers, body, buffer: Vec::new(), _connection: connections }
}

impl Stream {
    pub(crate) async fn whole(self) -> Response {
        let body = self.body.collect().await.unwrap().to_bytes();
        Response { status: self.status, headers: self.headers, body }
    }

    /// The data of the next event; None at the end of the stream.
    pub(crate) async fn event(&mut self) -> Option<String> {
        let event = self.raw().await?;
        Some(event.strip_prefix("data: ").expect("only data").trim_end().to_string())
    }

    /// The next event as it is sent; None when the stream ends or breaks.
    pub(crate) async fn raw(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|w| w == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                return Some(String::from_utf8(event).expect("an event is whole UTF-8"));
            }
            let frame = self.body.frame().await?.ok()?;
            self.buffer.extend(frame.into_data().unwrap());
        }
    }

    /// All events to `[DONE]`, which must be the last one.
    pub(crate) async fn events(mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.event().await {
            if event == "[DONE]" {
                assert_eq!(self.event().await, None);
                return events;
            }
            events.push(serde_json::from_str(&event).unwrap());
        }
        panic!("the stream ended without [DONE] after {events:?}");
    }
}

/// The text of a choice over the events of a stream.
pub(crate) fn text(events: &[Value], choice: u64) -> String {
    let choices = events.iter().flat_map(|e| e["choices"].as_array().into_iter().flatten());
    let own = choices.filter(|c| c["index"] == choice);
    own.filter_map(|c| c["delta"]["content"].as_str().or(c["text"].as_str())).collect()
}

/// The finish reason of a choice over the events of a stream.
pub(crate) fn finish(events: &[Value], choice: u64) -> Option<&str> {
    let choices = events.iter().flat_map(|e| e["choices"].as_array().into_iter().flatten());
    choices.filter(|c| c["index"] == choice).find_map(|c| c["finish_reason"].as_str())
}
