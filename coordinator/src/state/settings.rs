//! What the cluster is set to: names and values as an operator wrote them. The ledger keeps them; what they mean is known
//! to whoever reads them, so that a binary that knows fewer names keeps those of one that knows more.

use std::collections::BTreeMap;

use baton_core::Refused;
use serde::{Deserialize, Serialize};

use super::{Ledger, Outcome};

/// Settings at a time.
pub const SETTINGS_MAX: usize = 64;
/// Bytes of a name, and of a value.
pub const SETTING_BYTES_MAX: usize = 256;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings(BTreeMap<String, String>);

impl Settings {
    pub fn iter(&self) -> impl Iterator<Item = (&String, &String)> {
        self.0.iter()
    }

    /// The same with one more, another or, without a value, one less.
    #[must_use]
    pub fn with(mut self, name: &str, value: Option<&str>) -> Settings {
        match value {
            Some(value) => drop(self.0.insert(name.to_string(), value.to_string())),
            None => drop(self.0.remove(name)),
        }
        self
    }
}

impl Ledger {
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Without a value the setting goes.
    pub(super) fn set(&mut self, name: String, value: Option<String>) -> Outcome {
        let settings = &mut self.settings.0;
        match value {
            None if settings.remove(&name).is_none() => Outcome::Refused(Refused::Unknown),
            None => Outcome::Done,
            Some(value) if name.len().max(value.len()) > SETTING_BYTES_MAX => Outcome::Refused(Refused::TooLarge),
            Some(_) if settings.len() >= SETTINGS_MAX && !settings.contains_key(&name) => {
                Outcome::Refused(Refused::NoCapacity)
            }
            Some(value) => {
                settings.insert(name, value);
                Outcome::Done
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Batch, Command};
    use super::*;

    #[test]
    fn settings_are_set_replaced_removed_and_bounded() {
        let mut ledger = Ledger::default();
        let mut set = |name: &str, value: Option<&str>| {
            let command = Command::Set { name: name.into(), value: value.map(Into::into) };
            let outcome = ledger.apply(1, Batch { time_ms: 1, commands: vec![command] }).remove(0);
            (outcome, ledger.settings().clone())
        };
        let one = Settings::default().with("a", Some("1"));
        assert_eq!(set("a", Some("1")), (Outcome::Done, one.clone()));
        assert_eq!(set("a", Some("2")), (Outcome::Done, one.clone().with("a", Some("2"))));
        assert_eq!(set("b", None).0, Outcome::Refused(Refused::Unknown));
        assert_eq!(set("a", None), (Outcome::Done, one.with("a", None)));
        assert_eq!(set("a", Some(&"x".repeat(SETTING_BYTES_MAX + 1))).0, Outcome::Refused(Refused::TooLarge));
        for n in 0..SETTINGS_MAX {
            assert_eq!(set(&n.to_string(), Some("x")).0, Outcome::Done);
        }
        assert_eq!(set("more", Some("x")).0, Outcome::Refused(Refused::NoCapacity));
        assert_eq!(set("0", Some("y")).0, Outcome::Done);
    }
}
