//! What a role is handed at its start instead of reaching for it.

use std::sync::Arc;

use crate::{Clock, Net, Rng};

/// The world of one process: production makes it in `cli`, the simulator per host.
pub struct Env {
    pub net: Arc<dyn Net>,
    pub clock: Arc<dyn Clock>,
    pub rng: Rng,
}
