//! R2: what those who ask the coordinators were told is what one ledger tells: each question has one moment between it and
//! its answer at which the ledger heard it, also one that only looks something up. Requests have nothing to do with each
//! other, so that each is looked at alone.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Invariant, Look};
use crate::host::askers::{Answer, Asked, Question};

#[derive(Default)]
pub(super) struct Linear;

impl Invariant for Linear {
    fn name(&self) -> &'static str {
        "R2 one ledger answers"
    }

    fn end(&mut self, look: &Look) -> Result<(), String> {
        let history = look.world.history().clone();
        let requests: BTreeSet<u64> = history.iter().map(|asked| asked.request).collect();
        for request in requests {
            let own: Vec<Asked> = history.iter().filter(|asked| asked.request == request).cloned().collect();
            if !is_linear(&own) {
                return Err(format!("no order of these questions gives these answers: {own:?}"));
            }
        }
        Ok(())
    }
}

/// A request in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    New,
    Open {
        attempt: u32,
        /// None: nobody has been told it.
        epoch: Option<u64>,
        /// It is larger than this.
        above: u64,
    },
    Ended,
}

impl State {
    /// What a question that has that answer makes of it; None: it cannot have that answer. Without an answer, the question
    /// has been heard.
    fn after(self, what: Question, answer: Option<Answer>) -> Option<State> {
        match (what, answer, self) {
            (Question::Assign { attempt }, _, State::New) => State::assigned(attempt, answer, 0),
            (Question::Assign { attempt }, _, State::Open { attempt: now, epoch, above }) if attempt == now => {
                State::Open { attempt: now, epoch, above }.told(answer)
            }
            (Question::Assign { attempt }, _, State::Open { attempt: now, epoch, above }) if attempt > now => {
                State::assigned(attempt, answer, epoch.unwrap_or(above))
            }
            (Question::Locate, Some(Answer::Unknown), State::New | State::Ended) => Some(self),
            (Question::Locate, Some(Answer::Assigned { .. }), State::Open { .. }) => self.told(answer),
            (Question::Finish, _, _) => Some(State::Ended),
            // Heard, and refused or without effect.
            (_, None, _) => Some(self),
            _ => None,
        }
    }

    fn assigned(attempt: u32, answer: Option<Answer>, above: u64) -> Option<State> {
        State::Open { attempt, epoch: None, above }.told(answer)
    }

    /// The open request, once somebody has been told its epoch.
    fn told(self, answer: Option<Answer>) -> Option<State> {
        let State::Open { attempt, epoch, above } = self else { return None };
        match answer {
            None => Some(self),
            Some(Answer::Assigned { epoch: told }) if epoch.is_none_or(|epoch| epoch == told) && told > above => {
                Some(State::Open { attempt, epoch: Some(told), above })
            }
            Some(_) => None,
        }
    }
}

/// Whether the questions about one request have an order that explains the answers.
fn is_linear(history: &[Asked]) -> bool {
    let mut tried = BTreeSet::new();
    search(history, 0, State::New, &mut tried)
}

/// `done`: a bit for each question that has been given its moment.
fn search(history: &[Asked], done: u64, state: State, tried: &mut BTreeSet<(u64, State)>) -> bool {
    let left = || history.iter().enumerate().filter(|(number, _)| done >> number & 1 == 0);
    // Whoever has no answer need not have been heard.
    if left().all(|(_, asked)| asked.answer.is_none()) {
        return true;
    }
    if !tried.insert((done, state)) {
        return false;
    }
    // The next moment is not after an answer of what is left.
    let until = left().filter_map(|(_, asked)| asked.answer.map(|(at, _)| at)).min().unwrap_or(Duration::MAX);
    left().any(|(number, asked)| {
        let after = state.after(asked.what, asked.answer.map(|(_, answer)| answer));
        after.filter(|_| asked.at <= until).is_some_and(|after| search(history, done | 1 << number, after, tried))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_is_linear_when_one_ledger_could_have_told_it() {
        let asked = |what, at: u64, answer: Option<(u64, Answer)>| Asked {
            request: 0,
            what,
            at: Duration::from_millis(at),
            answer: answer.map(|(at, answer)| (Duration::from_millis(at), answer)),
        };
        let assign = |attempt| Question::Assign { attempt };
        let epoch = |epoch| Answer::Assigned { epoch };
        let check = |history: &[Asked], expected: bool| assert_eq!(is_linear(history), expected, "{history:?}");
        let first = asked(assign(1), 0, Some((9, epoch(5))));
        check(&[first.clone(), asked(assign(1), 20, Some((29, epoch(5))))], true);
        check(&[first.clone(), asked(assign(1), 20, Some((29, epoch(6))))], false);
        check(&[first.clone(), asked(assign(2), 5, Some((29, epoch(4))))], false);
        // Of a coordinator that is behind, or was deposed and does not know it.
        check(&[first.clone(), asked(Question::Locate, 20, Some((29, Answer::Unknown)))], false);
        check(&[first.clone(), asked(Question::Locate, 5, Some((29, Answer::Unknown)))], true);
        check(
            &[
                first.clone(),
                asked(Question::Finish, 10, None),
                asked(Question::Locate, 20, Some((29, Answer::Unknown))),
            ],
            true,
        );
        check(
            &[
                first.clone(),
                asked(Question::Finish, 10, Some((19, Answer::Ended))),
                asked(assign(2), 20, Some((29, epoch(7)))),
            ],
            false,
        );
        let unheard = asked(assign(2), 10, None);
        check(&[first.clone(), unheard.clone(), asked(Question::Locate, 20, Some((29, epoch(8))))], true);
        check(&[first.clone(), unheard.clone(), asked(Question::Locate, 20, Some((29, epoch(4))))], false);
        let back = asked(Question::Locate, 40, Some((49, epoch(5))));
        check(&[first.clone(), unheard.clone(), asked(Question::Locate, 20, Some((29, epoch(8)))), back], false);
        let second = asked(assign(2), 20, Some((29, epoch(8))));
        check(&[first, unheard, asked(assign(2), 5, Some((9, epoch(7)))), second], false);
    }
}
