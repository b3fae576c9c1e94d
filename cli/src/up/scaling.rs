//! Growing and shrinking the pools of a running cluster: which workers to add and which to drain, and how far that is.

use std::collections::BTreeSet;

use baton_core::Role;
use tokio::sync::mpsc;

use super::control::Answer;
use super::plan::Plan;

/// Workers of one role at most.
pub(crate) const WORKERS_MAX: usize = 64;

/// What is to be done so that there are as many workers as asked.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Change {
    /// How many to add.
    pub(crate) add: usize,
    /// The children to drain, by their number.
    pub(crate) drain: Vec<usize>,
}

/// Compares the workers of `role` with how many there shall be. Those with the highest number in their name go first.
pub(crate) fn change<'a>(workers: impl Iterator<Item = (usize, &'a Plan)>, role: Role, wanted: usize) -> Change {
    let mut present: Vec<_> = workers.filter(|(_, plan)| plan.role == role).collect();
    present.sort_by_key(|(child, plan)| (number(&plan.id), *child));
    Change {
        add: wanted.saturating_sub(present.len()),
        drain: present.iter().skip(wanted).rev().map(|(child, _)| *child).collect(),
    }
}

/// The number at the end of a worker's name.
pub(crate) fn number(id: &str) -> usize {
    id.rsplit('-').next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// A change under way.
#[derive(Debug)]
pub(crate) struct Scaling {
    answers: mpsc::Sender<Answer>,
    adding: BTreeSet<usize>,
    leaving: BTreeSet<usize>,
    failures: Vec<String>,
}

impl Scaling {
    pub(crate) fn new(answers: mpsc::Sender<Answer>) -> Scaling {
        Scaling { answers, adding: BTreeSet::new(), leaving: BTreeSet::new(), failures: Vec::new() }
    }

    pub(crate) fn add(&mut self, child: usize, id: &str) {
        self.adding.insert(child);
        self.note(format!("{id} starts"));
    }

    pub(crate) fn drain(&mut self, child: usize, id: &str) {
        self.leaving.insert(child);
        self.note(format!("{id} drains"));
    }

    pub(crate) fn adds(&self, child: usize) -> bool {
        self.adding.contains(&child)
    }

    pub(crate) fn drains(&self, child: usize) -> bool {
        self.leaving.contains(&child)
    }

    pub(crate) fn serves(&mut self, child: usize, id: &str, address: &str) {
        if self.adding.remove(&child) {
            self.note(format!("{id} serves at {address}"));
        }
    }

    pub(crate) fn gone(&mut self, child: usize, id: &str) {
        if self.leaving.remove(&child) {
            self.note(format!("{id} is gone"));
        }
    }

    /// The child is as it was, or not there at all.
    pub(crate) fn fail(&mut self, child: usize, why: String) {
        self.adding.remove(&child);
        self.leaving.remove(&child);
        self.failures.push(why);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.adding.is_empty() && self.leaving.is_empty()
    }

    /// The last line of the answer.
    pub(crate) fn finish(self, workers: &str) {
        let answer = match self.failures.is_empty() {
            true => Answer::Done(workers.to_string()),
            false => Answer::Failed(format!("{}; there are {workers}", self.failures.join("; "))),
        };
        // Whoever asked may have gone.
        let _ = self.answers.try_send(answer);
    }

    fn note(&self, line: String) {
        let _ = self.answers.try_send(Answer::Note(line));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surplus_workers_go_from_the_highest_number_down() {
        let plan = |role: Role, id: &str| Plan { role, id: id.into(), arguments: Vec::new() };
        // One that was started as a prefill worker decodes now.
        let plans = [
            plan(Role::Prefill, "prefill-0"),
            plan(Role::Decode, "decode-2"),
            plan(Role::Decode, "prefill-1"),
            plan(Role::Decode, "decode-10"),
            plan(Role::Gateway, "gateway-0"),
        ];
        let check = |role, wanted, add, drain: &[usize]| {
            let change = change(plans.iter().enumerate(), role, wanted);
            assert_eq!(change, Change { add, drain: drain.to_vec() }, "{role} {wanted}");
        };
        check(Role::Decode, 3, 0, &[]);
        check(Role::Decode, 1, 0, &[3, 1]);
        check(Role::Decode, 5, 2, &[]);
        check(Role::Prefill, 0, 0, &[0]);
        check(Role::Prefill, 1, 0, &[]);
    }

    #[tokio::test]
    async fn a_change_is_over_when_all_have_come_and_gone() {
        let (answers, mut received) = mpsc::channel(8);
        let mut scaling = Scaling::new(answers);
        scaling.add(7, "prefill-1");
        scaling.drain(3, "decode-1");
        scaling.serves(3, "decode-1", "a:1");
        assert!(!scaling.is_over() && scaling.adds(7) && scaling.drains(3));
        scaling.serves(7, "prefill-1", "a:1");
        scaling.gone(3, "decode-1");
        assert!(scaling.is_over());
        scaling.finish("2 prefill, 1 decode");
        let mut last = None;
        while let Some(answer) = received.recv().await {
            last = Some(answer);
        }
        assert_eq!(last, Some(Answer::Done("2 prefill, 1 decode".into())));
    }
}
