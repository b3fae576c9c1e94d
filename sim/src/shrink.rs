//! Makes a failing plan smaller while the same invariant fails: first without halves of its faults, then without single
//! ones, then with shorter ones.

use crate::plan::Plan;
use crate::run::Report;

/// Runs a shrink may take.
const RUNS_MAX: usize = 200;

/// What became of a plan.
pub struct Shrunk {
    pub plan: Plan,
    pub report: Report,
    pub runs: usize,
}

/// The smallest plan found; None: this plan does not fail. `run` runs a plan, each time as if nothing had run before.
pub fn shrink<E>(plan: &Plan, mut run: impl FnMut(&Plan) -> Result<Report, E>) -> Result<Option<Shrunk>, E> {
    let report = run(plan)?;
    let Some(violation) = &report.violation else { return Ok(None) };
    let invariant = violation.invariant.clone();
    let best = Shrunk { plan: plan.clone(), report, runs: 1 };
    let mut shrinking = Shrinking { best, invariant, run };
    shrinking.drop_faults()?;
    shrinking.shorten_faults()?;
    Ok(Some(shrinking.best))
}

struct Shrinking<R> {
    best: Shrunk,
    invariant: String,
    run: R,
}

impl<E, R: FnMut(&Plan) -> Result<Report, E>> Shrinking<R> {
    /// Whether the plan fails as the first one did; it is then the best so far.
    fn still_fails(&mut self, plan: Plan) -> Result<bool, E> {
        if self.best.runs >= RUNS_MAX {
            return Ok(false);
        }
        self.best.runs += 1;
        let report = (self.run)(&plan)?;
        let fails = report.violation.as_ref().is_some_and(|violation| violation.invariant == self.invariant);
        if fails {
            (self.best.plan, self.best.report) = (plan, report);
        }
        Ok(fails)
    }

    fn drop_faults(&mut self) -> Result<(), E> {
        let mut size = self.best.plan.faults.len().div_ceil(2);
        while size > 0 {
            let mut at = 0;
            while at < self.best.plan.faults.len() {
                let mut plan = self.best.plan.clone();
                plan.faults.drain(at..plan.faults.len().min(at + size));
                if !self.still_fails(plan)? {
                    at += size;
                }
            }
            size = if size == 1 { 0 } else { size.div_ceil(2) };
        }
        Ok(())
    }

    fn shorten_faults(&mut self) -> Result<(), E> {
        for number in 0..self.best.plan.faults.len() {
            let mut plan = self.best.plan.clone();
            plan.faults[number].for_ms /= 2;
            if plan.faults[number].for_ms > 0 {
                self.still_fails(plan)?;
            }
        }
        Ok(())
    }
}
