//! Who may ask: tenants with their limits, and API keys by the hash of their secret. No secret is ever here.

use std::collections::BTreeMap;

use baton_core::Refused;
use serde::{Deserialize, Serialize};

use super::{Ledger, Outcome};

/// Tenants at a time; more are refused.
pub const TENANTS_MAX: usize = 4096;
/// Keys at a time; more are refused.
pub const KEYS_MAX: usize = 16_384;

/// What a tenant may use. Zero: no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Accepted requests: so many at once, and so many a minute on average.
    pub requests_per_minute: u64,
    /// Prompt and generated tokens, counted likewise.
    pub tokens_per_minute: u64,
    pub requests_open_max: u64,
    pub prompt_tokens_max: u64,
    /// Of each choice.
    pub output_tokens_max: u64,
}

/// An API key in force, under its id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// BLAKE3 of the whole key text.
    pub secret_hash: [u8; 32],
    pub tenant: String,
    /// Wall time of whoever created it; shown, never compared.
    pub created_unix_s: u64,
}

/// All keys in force, and whether there has ever been one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    by_id: BTreeMap<String, Key>,
    /// Revoking the last key does not open the cluster again.
    closed: bool,
}

impl Keys {
    /// Whether whoever reaches a gateway may ask.
    pub fn open(&self) -> bool {
        !self.closed
    }

    pub fn iter(&self) -> impl Iterator<Item = (&String, &Key)> {
        self.by_id.iter()
    }

    pub fn get(&self, id: &str) -> Option<&Key> {
        self.by_id.get(id)
    }
}

impl Ledger {
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    pub(super) fn create_key(&mut self, id: String, key: Key) -> Outcome {
        match self.keys.by_id.get(&id) {
            Some(known) if *known == key => return Outcome::Done,
            Some(_) => return Outcome::Refused(Refused::Stale),
            None if self.keys.by_id.len() >= KEYS_MAX => return Outcome::Refused(Refused::NoCapacity),
            None => {}
        }
        if !self.tenants.contains_key(&key.tenant) {
            return Outcome::Refused(Refused::Unknown);
        }
        self.keys.by_id.insert(id, key);
        self.keys.closed = true;
        Outcome::Done
    }

    pub(super) fn revoke_key(&mut self, id: &str) -> Outcome {
        match self.keys.by_id.remove(id) {
            Some(_) => Outcome::Done,
            None => Outcome::Refused(Refused::Unknown),
        }
    }

    pub(super) fn revoke_keys_of(&mut self, tenant: &str) {
        self.keys.by_id.retain(|_, key| key.tenant != tenant);
    }
}
