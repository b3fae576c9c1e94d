//! The numerics class of a worker: inside one class, equal requests give equal bits.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Hash over weights, kernel profile and KV dtype. Workers of one class may continue one another's sequences; a move
/// across classes is counted and labelled.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NumericsClass(pub String);

impl NumericsClass {
    /// `weights` is the content hash of the weights, `profile` the kernel profile (`bf16dp`, `f32acc`), `kv` the KV dtype.
    pub fn new(weights: &str, profile: &str, kv: &str) -> NumericsClass {
        NumericsClass(format!("{}-{profile}-{kv}", &weights[..weights.len().min(12)]))
    }
}

impl fmt::Display for NumericsClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
