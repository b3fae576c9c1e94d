//! Coordinators that join, leave and pass the lead on.

use baton_core::Refused;
use baton_proto::convert::refusal;
use baton_proto::v1;

use super::{Refusal, Shared};

fn unserved() -> Refusal {
    refusal(Refused::Unavailable, "not served by this node yet")
}

impl Shared {
    pub(super) async fn add_node(&self, _: v1::AddNodeRequest) -> Result<v1::NodeAdded, Refusal> {
        Err(unserved())
    }

    pub(super) async fn remove_node(&self, _: u64) -> Result<(), Refusal> {
        Err(unserved())
    }

    pub(super) async fn transfer_leader(&self, _: u64) -> Result<(), Refusal> {
        Err(unserved())
    }
}
