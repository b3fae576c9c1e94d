//! S4, K5, R2: what a worker has let in is what the ledger has assigned to that very life of it, under that epoch; an
//! attempt has one assignment; and a worker goes back to no older epoch.

use std::collections::BTreeMap;

use baton_coordinator::state::Ledger;
use baton_core::{Epoch, Incarnation, Place, RequestId};

use super::{Invariant, Look};

/// A life of a worker.
type Life = (String, Incarnation);

#[derive(Default)]
pub(super) struct Owners {
    /// Index of each coordinator's ledger at the last look.
    looked: BTreeMap<String, u64>,
    /// Who serves a request under an epoch: the decode worker, and the prefill worker where there is one.
    assigned: BTreeMap<(RequestId, Epoch), (Life, Option<Life>)>,
    attempts: BTreeMap<(RequestId, u32), Epoch>,
    let_in: BTreeMap<Life, BTreeMap<RequestId, Epoch>>,
}

impl Owners {
    fn learn(&mut self, ledger: &Ledger) -> Result<(), String> {
        for (request, open) in ledger.open() {
            let epoch = *self.attempts.entry((*request, open.attempt)).or_insert(open.epoch);
            if epoch != open.epoch {
                let attempt = open.attempt;
                return Err(format!("attempt {attempt} of {request} has the epochs {epoch} and {}", open.epoch));
            }
            let life = |place: &Place| (place.worker.to_string(), place.incarnation);
            let lives = || (life(&open.decode), open.prefill.as_ref().map(life));
            let (decode, prefill) = self.assigned.entry((*request, epoch)).or_insert_with(lives);
            let prefills = prefill.as_ref().zip(open.prefill.as_ref());
            let same =
                prefill.is_some() == open.prefill.is_some() && prefills.is_none_or(|(life, place)| is(life, place));
            if !same || !is(decode, &open.decode) {
                let (first, now) = ((decode, prefill), lives());
                return Err(format!("{request} is assigned to {first:?} and to {now:?} under epoch {epoch}"));
            }
        }
        Ok(())
    }

    fn check(&mut self, life: &Life, let_in: &[(RequestId, Epoch)]) -> Result<(), String> {
        if !self.let_in.contains_key(life) {
            self.let_in.insert(life.clone(), BTreeMap::new());
        }
        let known = self.let_in.get_mut(life).expect("was inserted");
        for (request, epoch) in let_in {
            let before = known.insert(*request, *epoch);
            if before.is_some_and(|before| before > *epoch) {
                return Err(format!("{life:?} has let {request} in under epoch {epoch} after a newer one"));
            }
            if before == Some(*epoch) {
                continue;
            }
            match self.assigned.get(&(*request, *epoch)) {
                Some((decode, prefill)) if decode != life && prefill.as_ref() != Some(life) => {
                    return Err(format!(
                        "{life:?} has let {request} in under epoch {epoch}, which is {decode:?}'s and {prefill:?}'s"
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn is(life: &Life, place: &Place) -> bool {
    life.1 == place.incarnation && *life.0 == *place.worker.0
}

impl Invariant for Owners {
    fn name(&self) -> &'static str {
        "S4 one owner an epoch"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        let seen = look.world.seen();
        for (host, observer) in &seen.coordinators {
            let Some(index) = observer.index() else { continue };
            if self.looked.insert(host.clone(), index) != Some(index) {
                observer.read(|ledger| self.learn(ledger)).unwrap_or(Ok(()))?;
            }
        }
        // A worker keeps what it has let in for longer.
        if !look.is_one_of(3) {
            return Ok(());
        }
        for (host, shell) in &seen.workers {
            self.check(&(host.clone(), shell.incarnation), &shell.let_in())?;
        }
        Ok(())
    }
}
