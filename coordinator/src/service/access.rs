//! Who may ask for what, told to gateways. A node that may have missed a revocation says nothing: its streams end, and
//! gateways go to another node.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::v1;
use futures::Stream;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Status;

use super::{LEADER_PATIENCE, Shared, stopped};
use crate::state::{Account, Ledger};

/// How often a node looks whether it still hears of changes.
const LOOK: Duration = Duration::from_millis(50);
/// A follower that no leader has spoken to for so long may have missed something.
const LEADER_SILENCE_MAX: Duration = Duration::from_millis(200);

/// The access in force now, then after every change, until this node stops or is cut off from the others. `word_ms`: how
/// often at least something is said, so that whoever listens knows that this node knows; 0: not at all.
pub(super) fn accesses(shared: Arc<Shared>, word_ms: u64) -> impl Stream<Item = Result<v1::Access, Status>> + Send {
    let watcher = Watcher {
        changes: shared.node.changes(),
        stopping: shared.stopping.subscribe(),
        told: None,
        word: (word_ms > 0).then(|| Duration::from_millis(word_ms).max(LOOK)),
        said: Instant::now(),
        heard: Instant::now(),
        shared,
    };
    futures::stream::unfold(Some(watcher), |watcher| async move {
        let mut watcher = watcher?;
        match watcher.next().await? {
            Ok(access) => Some((Ok(access), Some(watcher))),
            Err(status) => Some((Err(status), None)),
        }
    })
}

struct Watcher {
    shared: Arc<Shared>,
    changes: watch::Receiver<u64>,
    stopping: watch::Receiver<bool>,
    told: Option<v1::Access>,
    /// How often something is said.
    word: Option<Duration>,
    /// When something was said last.
    said: Instant,
    /// When this node last took part in the group.
    heard: Instant,
}

impl Watcher {
    async fn next(&mut self) -> Option<Result<v1::Access, Status>> {
        loop {
            if self.shared.takes_part() {
                self.heard = Instant::now();
                self.changes.mark_unchanged();
                let word_ms = self.word.map_or(0, |word| word.as_millis() as u64);
                let now = v1::Access { word_ms, ..access(&self.shared.node.ledger()) };
                let unchanged = self.told.as_ref() == Some(&now);
                if !unchanged {
                    self.said = Instant::now();
                    self.told = Some(now.clone());
                    return Some(Ok(now));
                }
                if self.word.is_some_and(|word| self.said.elapsed() >= word) {
                    self.said = Instant::now();
                    return Some(Ok(v1::Access { word_ms, unchanged, ..v1::Access::default() }));
                }
            }
            if self.heard.elapsed() > LEADER_PATIENCE {
                return Some(Err(Status::unavailable("this coordinator is cut off from the others")));
            }
            tokio::select! {
                biased;
                () = stopped(&mut self.stopping) => return None,
                changed = self.changes.changed() => changed.ok()?,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }
}

impl Shared {
    /// Whether this node hears of what the group commits.
    fn takes_part(&self) -> bool {
        match self.node.standing().borrow().leader {
            None => false,
            Some(leader) if leader == self.node.id() => self.node.has_lease(),
            // A follower that is cut off goes on taking the last one that it knew for the leader.
            Some(_) => self.node.leader_silence().is_some_and(|silence| silence <= LEADER_SILENCE_MAX),
        }
    }
}

fn access(ledger: &Ledger) -> v1::Access {
    v1::Access {
        open: ledger.keys().open(),
        keys: keys(ledger),
        tenants: ledger.tenants().map(|(name, account)| tenant(name, account)).collect(),
        ..v1::Access::default()
    }
}

pub(super) fn keys(ledger: &Ledger) -> Vec<v1::AccessKey> {
    let key = |(id, key): (&String, &crate::state::Key)| v1::AccessKey {
        id: id.clone(),
        secret_hash: bytes::Bytes::copy_from_slice(&key.secret_hash),
        tenant: key.tenant.clone(),
        created_unix_s: key.created_unix_s,
    };
    ledger.keys().iter().map(key).collect()
}

pub(super) fn tenant(name: &str, account: &Account) -> v1::Tenant {
    let limits = &account.limits;
    v1::Tenant {
        name: name.into(),
        requests_per_minute: limits.requests_per_minute,
        tokens_per_minute: limits.tokens_per_minute,
        requests_open_max: limits.requests_open_max,
        prompt_tokens_max: limits.prompt_tokens_max,
        output_tokens_max: limits.output_tokens_max,
    }
}
