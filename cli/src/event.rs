//! What a role process tells the supervisor that started it: one JSON object a line on its stdout.

use std::io::Write;

use baton_core::Role;
use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// So much of the model has been read.
    Loading { done: u64, total: u64 },
    /// The process serves.
    Ready {
        role: Role,
        id: String,
        address: String,
        metrics: Option<String>,
        /// Process ids of the ranks 1, 2, ... of a worker whose ranks are processes.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ranks: Vec<u32>,
    },
    /// A life of a worker ends: `drained` ends the process for good, after any other one the process serves again.
    LifeEnds { how: String },
    /// The process is about to end because of this.
    Failed { message: String, code: u8 },
}

/// Where events go.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Voice {
    /// JSON lines, for `baton up`.
    Events,
    /// Sentences, for a person who started the role by hand.
    Lines,
}

impl Voice {
    /// Says it. A reader that has gone away is no reason to fail.
    pub(crate) fn say(self, event: &Event) {
        let line = match self {
            Voice::Events => serde_json::to_string(event).unwrap_or_default(),
            Voice::Lines => sentence(event),
        };
        if !line.is_empty() {
            let _ = writeln!(std::io::stdout().lock(), "{line}");
        }
    }
}

/// For a person; empty for what only a progress bar wants.
fn sentence(event: &Event) -> String {
    match event {
        Event::Loading { .. } | Event::Failed { .. } => String::new(),
        Event::LifeEnds { how } => format!("this life ends: {how}"),
        Event::Ready { id, address, metrics: None, .. } => format!("{id} serves at {address}"),
        Event::Ready { id, address, metrics: Some(metrics), .. } => {
            format!("{id} serves at {address}, metrics at http://{metrics}/metrics")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_as_agreed() {
        let ready = Event::Ready {
            role: Role::Decode,
            id: "decode-0".into(),
            address: "127.0.0.1:5".into(),
            metrics: Some("127.0.0.1:6".into()),
            ranks: Vec::new(),
        };
        let line =
            r#"{"event":"ready","role":"decode","id":"decode-0","address":"127.0.0.1:5","metrics":"127.0.0.1:6"}"#;
        assert_eq!(serde_json::to_string(&ready).unwrap(), line);
        assert_eq!(serde_json::from_str::<Event>(line).unwrap(), ready);
        let loading: Event = serde_json::from_str(r#"{"event":"loading","done":1,"total":2}"#).unwrap();
        assert_eq!(loading, Event::Loading { done: 1, total: 2 });
    }
}
