//! K5: no two lives of a worker have one number, and later ones have larger numbers.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use baton_core::Incarnation;
use baton_worker::Shell;

use super::{Invariant, Look};

#[derive(Default)]
pub(super) struct Lives {
    latest: BTreeMap<String, (Incarnation, Weak<Shell>)>,
}

impl Invariant for Lives {
    fn name(&self) -> &'static str {
        "K5 a life has a number"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        for (host, shell) in &look.world.seen().workers {
            let before = self.latest.insert(host.clone(), (shell.incarnation, Arc::downgrade(shell)));
            let Some((number, earlier)) = before else { continue };
            if !std::ptr::eq(earlier.as_ptr(), Arc::as_ptr(shell)) && shell.incarnation <= number {
                return Err(format!("{host} began life {} after life {number}", shell.incarnation));
            }
        }
        Ok(())
    }
}
