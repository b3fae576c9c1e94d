//! S3: an error tells what happened in the world, never that Baton itself is at fault. No request waits out its deadline:
//! that is longer than faults last.

use std::collections::BTreeSet;

use super::{Invariant, Look};
use crate::host::client::End;

/// What can be the matter with a cluster under faults. Faults kill workers under a request as a poisoned one does.
const TYPED: &[&str] =
    &["overloaded", "service_unavailable", "rate_limit_exceeded", "poisoned", "stream_not_found", "stream_lost"];

#[derive(Default)]
pub(super) struct TypedErrors {
    /// Tellings before the last look.
    looked: Option<u64>,
    done: BTreeSet<usize>,
}

impl Invariant for TypedErrors {
    fn name(&self) -> &'static str {
        "S3 typed errors"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        if self.looked.replace(look.tellings) == Some(look.tellings) {
            return Ok(());
        }
        for told in look.told {
            let Some((_, End::Error { status, code, message })) = &told.ended else { continue };
            if self.done.insert(told.ask.number) && !TYPED.contains(&code.as_str()) {
                return Err(format!("request {}: error {status} {code:?}: {message}", told.ask.number));
            }
        }
        Ok(())
    }
}
