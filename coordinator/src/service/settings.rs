//! Placement's knobs in force: those of this coordinator's own file, with what the ledger has set for the whole cluster in
//! their place, so that a new leader places as the last one did.

use std::sync::{Arc, PoisonError, RwLock};

use toml::{Table, Value};

use crate::placement::Policy;
use crate::state::{Ledger, Settings};

/// Knobs for requests that come, and for those that have been accepted.
pub(super) struct Policies {
    /// What they were made of.
    of: Settings,
    pub(super) fresh: Policy,
    /// These wait on workers rather than not at all.
    pub(super) accepted: Policy,
}

impl Policies {
    fn new(of: Settings, fresh: Policy) -> Arc<Policies> {
        let accepted = Policy { decode_waiting_max: u64::MAX, prefill_waiting_max: u64::MAX, ..fresh.clone() };
        Arc::new(Policies { of, fresh, accepted })
    }
}

/// The knobs as of the last look.
pub(super) struct Kept {
    own: Policy,
    now: RwLock<Arc<Policies>>,
}

impl Kept {
    pub(super) fn new(own: Policy) -> Kept {
        Kept { now: RwLock::new(Policies::new(Settings::default(), own.clone())), own }
    }

    /// Of this coordinator's own file.
    pub(super) fn own(&self) -> &Policy {
        &self.own
    }

    /// The knobs in force with this ledger.
    pub(super) fn of(&self, ledger: &Ledger) -> Arc<Policies> {
        let now = self.now.read().unwrap_or_else(PoisonError::into_inner).clone();
        if now.of == *ledger.settings() {
            return now;
        }
        let fresh = policy(ledger.settings(), &self.own).unwrap_or_else(|problem| {
            // Only a newer binary can have taken it.
            tracing::error!(
                problem,
                "the cluster's settings are not understood here; those of this node's file are used"
            );
            self.own.clone()
        });
        let changed = Policies::new(ledger.settings().clone(), fresh);
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = changed.clone();
        changed
    }
}

/// A coordinator's own knobs with the cluster's settings in their place. Err says which setting is none.
pub(super) fn policy(settings: &Settings, own: &Policy) -> Result<Policy, String> {
    let said = |error: toml::de::Error| error.message().to_string();
    let mut table = Table::try_from(own).map_err(|error| error.to_string())?;
    for (name, value) in settings.iter() {
        let read: Table = toml::from_str(&format!("value = {value}")).map_err(said)?;
        let mut values = read.into_iter().map(|(_, value)| value);
        match (values.next(), values.next()) {
            (Some(value), None) => drop(table.insert(name.clone(), value)),
            _ => return Err("it is not one value".to_string()),
        }
    }
    Value::Table(table).try_into::<Policy>().map_err(said)
}

/// Every knob and its value, as TOML.
pub(super) fn told(policy: &Policy) -> String {
    toml::to_string(policy).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Targets;

    #[test]
    fn settings_stand_in_place_of_the_own_file() {
        let own = Policy { queue_max: 7, canary_ms: 9, ..Policy::default() };
        let set = |settings: &[(&str, &str)]| {
            let settings =
                settings.iter().fold(Settings::default(), |settings, (name, value)| settings.with(name, Some(value)));
            policy(&settings, &own)
        };
        assert_eq!(set(&[]), Ok(own.clone()));
        let batch = Targets { ttft_ms: 5, itl_ms: 6 };
        assert_eq!(
            set(&[("queue_max", "8"), ("batch", "{ ttft_ms = 5, itl_ms = 6 }")]),
            Ok(Policy { queue_max: 8, batch, ..own.clone() })
        );
        for (name, value) in
            [("queue", "1"), ("queue_max", "many"), ("queue_max", "-1"), ("batch", "5"), ("queue_max", "")]
        {
            assert!(set(&[(name, value)]).is_err(), "{name} = {value}");
        }
        assert!(set(&[("queue_max", "1\nother = 2")]).is_err(), "one value, one setting");
        assert!(told(&own).contains("queue_max = 7") && told(&own).contains("[interactive]"), "{}", told(&own));
    }
}
