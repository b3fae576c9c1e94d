//! A client of OpenAI-compatible endpoints: connections over `core::Net`, kept and reused, and server-sent events.

use std::sync::{Arc, Mutex};

use baton_core::Net;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use serde_json::Value;

/// Longest event or whole body that is read.
const BODY_BYTES_MAX: usize = 32 << 20;

/// Why a call gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    #[error("{0:?} is no URL of the form http://host:port (https is not spoken; put a proxy before it)")]
    BadUrl(String),
    #[error("no connection to {address}: {error}")]
    Connect { address: String, error: std::io::Error },
    #[error("the connection broke: {0}")]
    Broken(#[from] hyper::Error),
    #[error("the answer is longer than {BODY_BYTES_MAX} bytes")]
    TooLong,
    #[error("the answer is no JSON: {0}")]
    NotJson(#[from] serde_json::Error),
    #[error("status {status}: {message}")]
    Status { status: u16, message: String },
}

impl HttpError {
    /// A short word to count by.
    pub(crate) fn kind(&self) -> String {
        match self {
            HttpError::BadUrl(_) => "bad url".into(),
            HttpError::Connect { .. } => "no connection".into(),
            HttpError::Broken(_) => "connection broke".into(),
            HttpError::TooLong => "answer too long".into(),
            HttpError::NotJson(_) => "answer no JSON".into(),
            HttpError::Status { status, .. } => format!("http {status}"),
        }
    }
}

/// One endpoint.
pub(crate) struct Client {
    net: Arc<dyn Net>,
    /// `host:port`
    address: String,
    /// What stands before `/v1`, without a slash at its end.
    prefix: String,
    key: Option<String>,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

impl Client {
    /// `url` may end in `/v1`, as other tools want it.
    pub(crate) fn new(net: Arc<dyn Net>, url: &str, key: Option<String>) -> Result<Client, HttpError> {
        let bad = || HttpError::BadUrl(url.to_string());
        let uri: Uri = url.parse().map_err(|_| bad())?;
        if uri.scheme_str().is_some_and(|scheme| scheme != "http") {
            return Err(bad());
        }
        let host = uri.host().ok_or_else(bad)?;
        let address = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        let path = uri.path().trim_end_matches('/');
        let prefix = path.strip_suffix("/v1").unwrap_or(path).to_string();
        Ok(Client { net, address, prefix, key, idle: Mutex::new(Vec::new()) })
    }

    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>, HttpError> {
        let kept = || self.idle.lock().expect("no holder panics").pop();
        while let Some(mut sender) = kept() {
            if sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
        let failed = |error| HttpError::Connect { address: self.address.clone(), error };
        let stream = self.net.connect(&self.address).await.map_err(failed)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Ends when the sender is dropped or the peer closes.
        tokio::spawn(connection);
        Ok(sender)
    }

    fn request(&self, path: &str, body: Option<&Value>) -> Request<Full<Bytes>> {
        let mut request = Request::builder().uri(format!("{}{path}", self.prefix)).header(HOST, &self.address);
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let bytes = match body {
            None => Bytes::new(),
            Some(body) => {
                request = request.method(Method::POST).header(CONTENT_TYPE, "application/json");
                body.to_string().into()
            }
        };
        request.header(ACCEPT, "*/*").body(Full::new(bytes)).expect("the parts were checked in `new`")
    }

    /// Sends a request (GET without a body, POST with one) and returns when the status is 2xx and the body begins.
    pub(crate) async fn open(&self, path: &str, body: Option<&Value>) -> Result<Answer<'_>, HttpError> {
        let mut sender = self.connection().await?;
        let response = sender.send_request(self.request(path, body)).await?;
        let status = response.status();
        let answer =
            Answer { client: self, sender: Some(sender), body: response.into_body(), events: Events::default() };
        match status.is_success() {
            true => Ok(answer),
            false => {
                let body = answer.bytes().await.unwrap_or_default();
                Err(HttpError::Status { status: status.as_u16(), message: error_message(&body) })
            }
        }
    }

    /// The whole answer as JSON.
    pub(crate) async fn json(&self, path: &str, body: Option<&Value>) -> Result<Value, HttpError> {
        let bytes = self.open(path, body).await?.bytes().await?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// The name of the first model the endpoint lists.
    pub(crate) async fn first_model(&self) -> Result<Option<String>, HttpError> {
        let list = self.json("/v1/models", None).await?;
        Ok(list["data"][0]["id"].as_str().map(str::to_string))
    }
}

/// An answer whose body is still to be read. Dropping it before its end closes the connection.
pub(crate) struct Answer<'a> {
    client: &'a Client,
    sender: Option<SendRequest<Full<Bytes>>>,
    body: Incoming,
    events: Events,
}

impl Answer<'_> {
    async fn bytes(mut self) -> Result<Bytes, HttpError> {
        let mut bytes = Vec::new();
        while let Some(frame) = self.frame().await? {
            if bytes.len() + frame.len() > BODY_BYTES_MAX {
                return Err(HttpError::TooLong);
            }
            bytes.extend_from_slice(&frame);
        }
        Ok(bytes.into())
    }

    /// More of the body; None at its end, where the connection goes back to be used again.
    async fn frame(&mut self) -> Result<Option<Bytes>, HttpError> {
        while let Some(frame) = self.body.frame().await {
            if let Ok(data) = frame?.into_data() {
                return Ok(Some(data));
            }
        }
        if let Some(sender) = self.sender.take() {
            self.client.idle.lock().expect("no holder panics").push(sender);
        }
        Ok(None)
    }

    /// The data of the next event; None at the end of the stream.
    pub(crate) async fn event(&mut self) -> Result<Option<String>, HttpError> {
        loop {
            if let Some(event) = self.events.take() {
                return Ok(Some(event));
            }
            let Some(bytes) = self.frame().await? else { return Ok(None) };
            self.events.push(&bytes)?;
        }
    }
}

/// The `data` of server-sent events, out of bytes that come in any cut.
/// https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
#[derive(Debug, Default)]
pub(crate) struct Events {
    unread: Vec<u8>,
    /// How far `unread` has been searched for a line's end.
    searched: usize,
    /// `data` lines of the event that is not over yet.
    data: Vec<String>,
}

impl Events {
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), HttpError> {
        self.unread.extend_from_slice(bytes);
        match self.unread.len() <= BODY_BYTES_MAX {
            true => Ok(()),
            false => Err(HttpError::TooLong),
        }
    }

    fn line(&mut self) -> Option<String> {
        let Some(end) = self.unread[self.searched..].iter().position(|&byte| byte == b'\n') else {
            self.searched = self.unread.len();
            return None;
        };
        let line: Vec<u8> = self.unread.drain(..=self.searched + end).collect();
        self.searched = 0;
        Some(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_string())
    }

    /// The next whole event that has data.
    pub(crate) fn take(&mut self) -> Option<String> {
        while let Some(line) = self.line() {
            if let Some(data) = line.strip_prefix("data:") {
                self.data.push(data.strip_prefix(' ').unwrap_or(data).to_string());
            } else if line.is_empty() && !self.data.is_empty() {
                return Some(std::mem::take(&mut self.data).join("\n"));
            }
        }
        None
    }
}

/// What an error body says: OpenAI's `error.message`, or its first characters.
fn error_message(body: &[u8]) -> String {
    let parsed: Value = serde_json::from_slice(body).unwrap_or_default();
    match parsed["error"]["message"].as_str() {
        Some(message) => message.to_string(),
        None => String::from_utf8_lossy(body).chars().take(300).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_in_any_cut() {
        let stream =
            "data: {\"a\":1}\n\n: keep-alive\n\nevent: x\r\ndata: two\r\ndata: lines\r\n\r\ndata:[DONE]\n\ndata: cut";
        let expected = ["{\"a\":1}", "two\nlines", "[DONE]"];
        for size in 1..=stream.len() {
            let (mut events, mut seen) = (Events::default(), Vec::new());
            for bytes in stream.as_bytes().chunks(size) {
                events.push(bytes).unwrap();
                seen.extend(std::iter::from_fn(|| events.take()));
            }
            assert_eq!(seen, expected, "in cuts of {size}");
        }
    }

    #[test]
    fn urls_are_read_as_people_write_them() {
        let net: Arc<dyn Net> = Arc::new(baton_proto::TcpNet);
        let read = |url: &str| Client::new(net.clone(), url, None).map(|c| (c.address, c.prefix)).ok();
        let pair = |a: &str, p: &str| Some((a.to_string(), p.to_string()));
        assert_eq!(read("http://127.0.0.1:8000"), pair("127.0.0.1:8000", ""));
        assert_eq!(read("http://host/v1/"), pair("host:80", ""));
        assert_eq!(read("http://host:1/api/v1"), pair("host:1", "/api"));
        assert_eq!(read("https://host"), None);
        assert_eq!(read(""), None);
    }

    #[test]
    fn error_bodies_give_their_message() {
        assert_eq!(error_message(br#"{"error":{"message":"too long"}}"#), "too long");
        assert_eq!(error_message(b"plain"), "plain");
    }
}
