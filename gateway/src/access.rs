//! Who may ask: the keys and tenants of the ledger, followed from a coordinator. A key is known by its hash only, and
//! looked up in a time that does not depend on how much of it is right.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::{HeaderMap, header};
use baton_proto::v1::{self, WatchRequest};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::coordinators::{Client, Coordinators, deadline};
use crate::error::ApiError;

const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// So long may no coordinator have told of access before keys are taken for unknown where nobody but the gateway looks at
/// them: together with the fifth of a second for which a coordinator that is cut off goes on it bounds how long a revoked
/// key can be used.
const STALE: Duration = Duration::from_millis(750);
/// How often a coordinator is to say something, though nothing has changed.
const WORD_MS: u64 = 100;
/// One that has said it would and is silent for so long is left for another.
const SILENT: Duration = Duration::from_millis(450);
/// A presented key; longer ones are wrong without a look.
const KEY_BYTES_MAX: usize = 256;
/// Whose requests are those of an open cluster.
pub(crate) const OPEN_TENANT: &str = "default";

/// Who asks, as far as the ledger is concerned.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Caller {
    pub tenant: String,
    /// Id of the key; empty in an open cluster.
    pub key: String,
    /// Most tokens of a prompt; 0: no limit.
    pub prompt_tokens_max: u64,
    /// Most tokens of an answer; 0: no limit.
    pub output_tokens_max: u64,
}

/// What the ledger says about access, as last heard.
pub(crate) struct Access {
    known: watch::Sender<Option<Arc<Known>>>,
    /// Since when no coordinator tells of changes; None while one does.
    lost: Mutex<Option<Instant>>,
    /// Others than this machine's can reach the gateway, and nobody has said that they may without keys.
    exposed: bool,
}

struct Known {
    open: bool,
    keys: Vec<Key>,
    tenants: BTreeMap<String, v1::Tenant>,
}

struct Key {
    hash: blake3::Hash,
    id: String,
    tenant: String,
}

impl Access {
    pub(crate) fn new(exposed: bool) -> Access {
        Access { known: watch::Sender::new(None), lost: Mutex::new(None), exposed }
    }

    /// Follows one coordinator after the other, for ever. What was heard last holds while none answers, for requests that
    /// the ledger is asked about: it refuses keys that it no longer has.
    pub(crate) async fn watch(&self, coordinators: &Coordinators) {
        loop {
            for address in coordinators.addresses() {
                if let Some(client) = coordinators.client(&address) {
                    let problem = self.follow(client, coordinators.cluster()).await;
                    tracing::debug!(coordinator = %address, problem, "access lost");
                }
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
        }
    }

    /// Listens to one coordinator until it says nothing more, by which what is known begins to age.
    async fn follow(&self, mut client: Client, cluster: String) -> String {
        let mut changes = match deadline(client.watch_access(WatchRequest { cluster, word_ms: WORD_MS })).await {
            Ok(changes) => changes,
            Err(status) => {
                self.lose(Instant::now());
                return status.message().to_string();
            }
        };
        // An earlier version says something only when something changes.
        let (mut heard, mut patience) = (Instant::now(), None);
        loop {
            let message = match patience {
                Some(patience) => timeout(patience, changes.message()).await,
                None => Ok(changes.message().await),
            };
            let problem = match message {
                Ok(Ok(Some(access))) => {
                    heard = Instant::now();
                    patience = (access.word_ms > 0).then_some(SILENT);
                    self.hear(access);
                    continue;
                }
                Ok(Ok(None)) => "the coordinator ended it".to_string(),
                Ok(Err(status)) => status.message().to_string(),
                Err(_) => "the coordinator is silent".to_string(),
            };
            self.lose(if patience.is_some() { heard } else { Instant::now() });
            return problem;
        }
    }

    fn hear(&self, access: v1::Access) {
        match access.unchanged {
            true => *self.lost() = None,
            false => self.learn(access),
        }
    }

    /// Nobody tells of changes any more, since then.
    fn lose(&self, since: Instant) {
        self.lost().get_or_insert(since);
    }

    fn learn(&self, access: v1::Access) {
        let keys = access.keys.into_iter().filter_map(|key| {
            let hash: [u8; blake3::OUT_LEN] = key.secret_hash.as_ref().try_into().ok()?;
            Some(Key { hash: hash.into(), id: key.id, tenant: key.tenant })
        });
        let tenants = access.tenants.into_iter().map(|tenant| (tenant.name.clone(), tenant)).collect();
        let known = Known { open: access.open, keys: keys.collect(), tenants };
        if known.open && self.exposed {
            tracing::error!("the cluster has no keys and this gateway can be reached from elsewhere: all is refused");
        }
        tracing::debug!(open = known.open, keys = known.keys.len(), tenants = known.tenants.len(), "access");
        self.known.send_replace(Some(Arc::new(known)));
        *self.lost() = None;
    }

    fn lost(&self) -> MutexGuard<'_, Option<Instant>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anybody who reaches this gateway could use it, though nobody has said so; None: not heard within `wait`.
    pub(crate) async fn is_open_to_strangers(&self, wait: Duration) -> Option<bool> {
        if !self.exposed {
            return Some(false);
        }
        let mut heard = self.known.subscribe();
        let known = timeout(wait, heard.wait_for(Option::is_some)).await.ok()?.ok()?;
        known.as_ref().map(|known| known.open)
    }

    /// Resolves once a coordinator has said who may ask.
    pub(crate) async fn heard(&self) {
        // The sender lives as long as `self`.
        let _ = self.known.subscribe().wait_for(Option::is_some).await;
    }

    /// Whether a coordinator has said who may ask.
    pub(crate) fn is_known(&self) -> bool {
        self.known.borrow().is_some()
    }

    /// Who a call comes from that nobody but this gateway judges, so that it must know of every revocation.
    pub(crate) fn caller_alone(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let caller = self.caller(headers)?;
        let stale = self.lost().is_some_and(|since| since.elapsed() > STALE);
        match stale && !caller.key.is_empty() {
            true => {
                let message = "No coordinator can be reached that knows whether this key has been revoked.";
                Err(ApiError::unavailable("access_unknown", message))
            }
            false => Ok(caller),
        }
    }

    /// Who a call with these headers comes from.
    pub(crate) fn caller(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let known = self.known.borrow().clone();
        let Some(known) = known else {
            let message = "No coordinator has said yet who may use this gateway.";
            return Err(ApiError::unavailable("access_unknown", message));
        };
        if !known.open {
            return known.caller(bearer(headers));
        }
        if self.exposed {
            let message = "This cluster has no keys. Create one with `baton key create --tenant NAME`.";
            return Err(ApiError::unavailable("no_keys", message));
        }
        Ok(known.of_tenant(OPEN_TENANT, ""))
    }
}

impl Known {
    fn caller(&self, presented: Option<&[u8]>) -> Result<Caller, ApiError> {
        let Some(presented) = presented else {
            let message = "You did not provide an API key. Send it in the header `Authorization: Bearer KEY`.";
            return Err(ApiError::unauthorized(message));
        };
        let hash = blake3::hash(&presented[..presented.len().min(KEY_BYTES_MAX + 1)]);
        // What is compared is a hash of what was presented, which nobody can steer towards a stored one byte by byte; blake3
        // compares hashes in constant time besides; and every key is compared, so that the time says nothing of which one it
        // is, nor of whether it is one.
        let found = self.keys.iter().fold(None, |found, key| if key.hash == hash { Some(key) } else { found });
        match found {
            Some(key) => Ok(self.of_tenant(&key.tenant, &key.id)),
            None => Err(ApiError::unauthorized("Incorrect API key provided: it is wrong or has been revoked.")),
        }
    }

    fn of_tenant(&self, tenant: &str, key: &str) -> Caller {
        let limits = self.tenants.get(tenant);
        Caller {
            tenant: tenant.to_string(),
            key: key.to_string(),
            prompt_tokens_max: limits.map_or(0, |t| t.prompt_tokens_max),
            output_tokens_max: limits.map_or(0, |t| t.output_tokens_max),
        }
    }
}

/// The key of `Authorization: Bearer KEY`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii()).filter(|key| !key.is_empty())
}

/// Whether only this machine can reach the address.
pub(crate) fn is_loopback(address: &str) -> bool {
    address.parse::<SocketAddr>().is_ok_and(|address| address.ip().to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn access(exposed: bool, open: bool) -> Access {
        let access = Access::new(exposed);
        let key = |id: &str, secret: &str, tenant: &str| v1::AccessKey {
            id: id.into(),
            secret_hash: blake3::hash(secret.as_bytes()).as_bytes().to_vec().into(),
            tenant: tenant.into(),
            created_unix_s: 0,
        };
        let tenant = v1::Tenant { name: "a".into(), prompt_tokens_max: 5, output_tokens_max: 6, ..Default::default() };
        let broken = v1::AccessKey { secret_hash: vec![1].into(), ..key("broken", "x", "a") };
        let keys = vec![key("1", "bk-1", "a"), broken, key("2", "bk-2", "b")];
        access.learn(v1::Access { open, keys, tenants: vec![tenant], ..Default::default() });
        access
    }

    fn asks(access: &Access, authorization: &str) -> Result<Caller, u16> {
        let mut headers = HeaderMap::new();
        if !authorization.is_empty() {
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(authorization).unwrap());
        }
        access.caller(&headers).map_err(|error| error.status.as_u16())
    }

    #[test]
    fn a_key_names_its_tenant_and_nothing_else_does() {
        let closed = access(false, false);
        let caller = Caller { tenant: "a".into(), key: "1".into(), prompt_tokens_max: 5, output_tokens_max: 6 };
        assert_eq!(asks(&closed, "Bearer bk-1"), Ok(caller.clone()));
        assert_eq!(asks(&closed, "bearer  bk-1 "), Ok(caller));
        let unlimited = Caller { tenant: "b".into(), key: "2".into(), ..Caller::default() };
        assert_eq!(asks(&closed, "Bearer bk-2"), Ok(unlimited));
        for wrong in ["", "Bearer", "Bearer ", "Bearer bk-3", "Bearer bk-1x", "Basic bk-1", "bk-1", "Bearer x"] {
            assert_eq!(asks(&closed, wrong), Err(401), "{wrong:?}");
        }
        assert_eq!(asks(&closed, &format!("Bearer {}", "k".repeat(100_000))), Err(401));
    }

    #[test]
    fn an_open_cluster_asks_for_no_key_where_only_this_machine_can_reach_it() {
        assert_eq!(asks(&access(false, true), "").map(|caller| caller.tenant), Ok("default".into()));
        assert_eq!(asks(&access(false, true), "Bearer sk-any").map(|caller| caller.tenant), Ok("default".into()));
        assert_eq!(asks(&access(true, true), "Bearer bk-1"), Err(503));
        assert_eq!(asks(&access(true, false), "Bearer bk-1").map(|caller| caller.tenant), Ok("a".into()));
        assert_eq!(asks(&Access::new(false), "Bearer bk-1"), Err(503), "nothing is known yet");
    }

    /// Goal: what only the gateway judges is judged for as long as it hears of revocations, and a little longer.
    #[tokio::test(start_paused = true)]
    async fn keys_are_unknown_soon_after_the_last_coordinator_is_lost() {
        let access = access(false, false);
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer bk-1"));
        let alone = |access: &Access| access.caller_alone(&headers).map_err(|error| error.reason).map(|_| ());
        assert_eq!(alone(&access), Ok(()));
        *access.lost() = Some(Instant::now());
        tokio::time::advance(STALE).await;
        assert_eq!(alone(&access), Ok(()));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(alone(&access), Err("access_unknown"));
        assert!(access.caller(&headers).is_ok(), "the ledger judges it");
        let told = v1::Access::default();
        access.learn(told);
        assert_eq!(alone(&access), Err("unauthorized"), "told again, and it was revoked meanwhile");
        access.learn(v1::Access { open: true, ..Default::default() });
        *access.lost() = Some(Instant::now());
        tokio::time::advance(2 * STALE).await;
        assert_eq!(alone(&access), Ok(()), "an open cluster has no keys to revoke");
    }

    #[test]
    fn loopback_is_told_by_the_address() {
        let cases = [("127.0.0.1:1", true), ("[::1]:1", true), ("[::ffff:127.0.0.1]:1", true), ("0.0.0.0:1", false)];
        for (address, expected) in cases.into_iter().chain([("[::]:1", false), ("10.0.0.1:1", false), ("x", false)]) {
            assert_eq!(is_loopback(address), expected, "{address}");
        }
    }
}
