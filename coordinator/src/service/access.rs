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
const LOOK: Duration = Duration::from_millis(100);

/// The access in force now, then after every change, until this node stops or is cut off from the others.
pub(super) fn accesses(shared: Arc<Shared>) -> impl Stream<Item = Result<v1::Access, Status>> + Send {
    let watcher = Watcher {
        changes: shared.node.changes(),
        stopping: shared.stopping.subscribe(),
        told: None,
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
    /// When this node last took part in the group.
    heard: Instant,
}

impl Watcher {
    async fn next(&mut self) -> Option<Result<v1::Access, Status>> {
        loop {
            if self.shared.takes_part() {
                self.heard = Instant::now();
                self.changes.mark_unchanged();
                let now = access(&self.shared.node.ledger());
                if self.told.as_ref() != Some(&now) {
                    self.told = Some(now.clone());
                    return Some(Ok(now));
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
        let leader = self.node.standing().borrow().leader;
        leader.is_some_and(|leader| leader != self.node.id() || self.node.has_quorum())
    }
}

fn access(ledger: &Ledger) -> v1::Access {
    v1::Access {
        open: ledger.keys().open(),
        keys: keys(ledger),
        tenants: ledger.tenants().map(|(name, account)| tenant(name, account)).collect(),
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
