//! Clients that know every gateway: one that cannot reach the gateway it would ask asks another one, and one whose stream
//! breaks goes on with it there, as `docs/operations.md` tells clients to.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, timeout};

use super::load::{Expected, HUNG, Observed, PATH, Verdict, body, judge};
use crate::Client;
use crate::client::{Events, NotOpened};

/// How long a stream may be without a gateway, in seconds.
const RESUMABLE_S: &str = "30";
/// Before another gateway is asked.
const PAUSE: Duration = Duration::from_millis(20);

/// What clients had to do beyond asking.
#[derive(Debug, Default)]
pub struct Moves {
    /// Times that a gateway could not be reached and another one was asked.
    pub elsewhere: AtomicUsize,
    /// Streams that broke and went on at another gateway.
    pub resumed: AtomicUsize,
}

/// What a gateway is asked for.
enum Ask {
    Whole(Value),
    /// The events of a stream after the last one that has come.
    Rest {
        path: String,
        last: Option<String>,
    },
}

impl Ask {
    async fn of(&self, gateway: &Client) -> Result<Events, NotOpened> {
        match self {
            Ask::Whole(body) => gateway.with("x-baton-resumable", RESUMABLE_S).try_open(PATH, body).await,
            Ask::Rest { path, last: None } => gateway.try_open_get(path).await,
            Ask::Rest { path, last: Some(last) } => gateway.with("last-event-id", last).try_open_get(path).await,
        }
    }
}

/// A client of all gateways, with the one that it asks first in front.
#[derive(Clone)]
pub struct Moving {
    pub gateways: Vec<Client>,
    pub moves: Arc<Moves>,
}

impl Moving {
    /// One stream from its start to its end.
    pub async fn observe(mut self, expected: Expected, number: usize, salt: Option<u64>) -> Observed {
        let started = Instant::now();
        let mut moments = Vec::new();
        let (verdict, answer) = match self.whole(number, salt, &mut moments).await {
            Err(verdict) => (verdict, String::new()),
            Ok(events) => (judge(events.so_far.joined(), &expected[number]), events.answer.unwrap_or_default()),
        };
        Observed { number, answer, started, moments, ended: Instant::now(), verdict }
    }

    /// Reads the stream to its end, at as many gateways as that takes.
    async fn whole(&mut self, number: usize, salt: Option<u64>, moments: &mut Vec<Instant>) -> Result<Events, Verdict> {
        let mut events = self.opened(Ask::Whole(body(number, salt))).await?;
        let name = events.headers.get("x-baton-stream").and_then(|name| name.to_str().ok().map(String::from));
        loop {
            while timeout(HUNG, events.advance()).await.map_err(|_| Verdict::Hung)? {
                moments.push(Instant::now());
            }
            if events.so_far.done || events.so_far.error.is_some() {
                return Ok(events);
            }
            let path = format!("/v1/streams/{}", name.as_deref().ok_or(Verdict::Lost)?);
            let rest = Ask::Rest { path, last: events.last_id.clone() };
            self.move_on().await;
            events = self.opened(rest).await?.after(events);
            self.moves.resumed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The first gateway that can be reached has the answer.
    async fn opened(&mut self, ask: Ask) -> Result<Events, Verdict> {
        let reached = async {
            loop {
                match ask.of(&self.gateways[0]).await {
                    Err(NotOpened::Unreachable(_)) => {
                        self.moves.elsewhere.fetch_add(1, Ordering::Relaxed);
                        self.move_on().await;
                    }
                    Err(refused) => return Err(Verdict::Failed(refused.to_string())),
                    Ok(events) => return Ok(events),
                }
            }
        };
        timeout(HUNG, reached).await.unwrap_or(Err(Verdict::Hung))
    }

    async fn move_on(&mut self) {
        self.gateways.rotate_left(1);
        tokio::time::sleep(PAUSE).await;
    }
}
