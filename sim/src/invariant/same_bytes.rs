//! S1, S2: what a client has of a stream is, at every moment, the beginning of what the reference generates for it: no
//! token is lost, doubled, out of order, or another one. A stream that is complete has all of it.

use std::collections::{BTreeMap, BTreeSet};

use baton_core::TokenId;

use super::{Invariant, Look};
use crate::host::client::{End, Told};
use crate::oracle::Oracle;

#[derive(Default)]
pub(super) struct SameBytes {
    /// Tellings before the last look.
    looked: Option<u64>,
    /// Tokens of each request looked at so far, and whether its end was.
    seen: BTreeMap<usize, usize>,
    done: BTreeSet<usize>,
    references: BTreeMap<usize, Vec<Vec<TokenId>>>,
    /// Made for the first token of the run.
    oracle: Option<Oracle>,
}

impl Invariant for SameBytes {
    fn name(&self) -> &'static str {
        "S2 same bytes"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        if self.looked.replace(look.tellings) == Some(look.tellings) {
            return Ok(());
        }
        for told in look.told {
            let number = told.ask.number;
            let count = told.tokens.iter().map(Vec::len).sum();
            if self.done.contains(&number) || (self.seen.get(&number) == Some(&count) && told.ended.is_none()) {
                continue;
            }
            self.seen.insert(number, count);
            if count == 0 && told.ended.is_none() {
                continue;
            }
            if told.ended.is_some() {
                self.done.insert(number);
            }
            let oracle = || Oracle::new(look.told.iter().map(|told| &told.ask));
            let oracle = self.oracle.get_or_insert_with(oracle);
            let reference = self.references.entry(number).or_insert_with(|| oracle.reference(&told.ask));
            compare(told, reference)?;
        }
        Ok(())
    }
}

fn compare(told: &Told, reference: &[Vec<TokenId>]) -> Result<(), String> {
    let number = told.ask.number;
    if let Some(wrong) = &told.wrong {
        return Err(format!("request {number}: {wrong}"));
    }
    let complete = matches!(told.ended, Some((_, End::Complete)));
    for (choice, (tokens, expected)) in told.tokens.iter().zip(reference).enumerate() {
        if !expected.starts_with(tokens) {
            let at = tokens.iter().zip(expected).take_while(|(a, b)| a == b).count();
            let (has, wants) = (tokens.get(at), expected.get(at));
            return Err(format!(
                "request {number}, choice {choice}: token {at} of {} is {has:?} and must be {wants:?}",
                tokens.len()
            ));
        }
        let finish = told.finishes[choice].as_deref();
        if complete && (tokens.len() != expected.len() || finish != Some("length")) {
            let (has, all) = (tokens.len(), expected.len());
            return Err(format!(
                "request {number}, choice {choice}: complete with {has} of {all} tokens and finish {finish:?}"
            ));
        }
        if finish.is_some() && tokens.len() != expected.len() {
            return Err(format!("request {number}, choice {choice}: finished behind {} tokens", tokens.len()));
        }
    }
    Ok(())
}
