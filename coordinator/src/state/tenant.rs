//! A tenant's account: its limits, what it has left of them, and what it has used. Whole numbers over ledger time only,
//! so that every node counts the same and a change of leader loses nothing.

use baton_core::Refused;
use serde::{Deserialize, Serialize};

use super::access::{Limits, TENANTS_MAX};
use super::{Ledger, Outcome};

const MINUTE_MS: u64 = 60_000;

/// Filled evenly over time up to one minute's worth; what is taken must be there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// Units times 60,000, so that each millisecond adds exactly `per_minute`. None: full.
    level: Option<u64>,
    /// Ledger time of `level`.
    at_ms: u64,
}

impl Bucket {
    fn level(&self, per_minute: u64, now_ms: u64) -> u64 {
        let full = per_minute.saturating_mul(MINUTE_MS);
        let Some(level) = self.level else { return full };
        let added = now_ms.saturating_sub(self.at_ms).saturating_mul(per_minute);
        level.saturating_add(added).min(full)
    }

    /// Milliseconds until `units` are there; 0 now, None never.
    pub fn wait_ms(&self, units: u64, per_minute: u64, now_ms: u64) -> Option<u64> {
        if units > per_minute {
            return None;
        }
        let missing = (units * MINUTE_MS).saturating_sub(self.level(per_minute, now_ms));
        Some(missing.div_ceil(per_minute.max(1)))
    }

    /// Takes what `wait_ms` has found to be there.
    fn take(&mut self, units: u64, per_minute: u64, now_ms: u64) {
        let left = self.level(per_minute, now_ms).saturating_sub(units.saturating_mul(MINUTE_MS));
        *self = Bucket { level: Some(left), at_ms: now_ms };
    }

    /// Gives back what was taken and not used.
    fn give(&mut self, units: u64, per_minute: u64, now_ms: u64) {
        let level = self.level(per_minute, now_ms).saturating_add(units.saturating_mul(MINUTE_MS));
        *self = Bucket { level: Some(level.min(per_minute.saturating_mul(MINUTE_MS))), at_ms: now_ms };
    }
}

/// What a tenant has used since it was created. Each request counts once, when it ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub requests: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub generated_tokens: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    pub limits: Limits,
    pub requests_open: u64,
    pub used: Usage,
    requests: Bucket,
    tokens: Bucket,
}

/// What a request asks of its tenant's account when it is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charge {
    pub prompt_tokens: u64,
    /// Of each choice.
    pub tokens_max: u64,
    pub choices: u64,
}

impl Charge {
    /// The most it can use: what the tokens bucket is charged until the real usage is known.
    pub fn tokens(&self) -> u64 {
        self.prompt_tokens.saturating_add(self.tokens_max.saturating_mul(self.choices))
    }
}

/// Why a tenant's account does not take a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverLimit {
    pub reason: Refused,
    /// When it is worth another try; 0 when waiting does not help, or until a request of the tenant ends.
    pub retry_after_ms: u64,
    pub limit: Limit,
}

/// Which limit it is, and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    RequestsPerMinute(u64),
    TokensPerMinute(u64),
    RequestsOpen(u64),
    PromptTokens(u64),
    OutputTokens(u64),
}

/// When a request that ends makes room, nobody knows when that is.
const RETRY_OPEN_MS: u64 = 1_000;

impl Account {
    /// Whether the account takes the request now. Changes nothing.
    pub fn check(&self, charge: &Charge, now_ms: u64) -> Result<(), OverLimit> {
        let limits = &self.limits;
        let over = |reason, retry_after_ms, limit| Err(OverLimit { reason, retry_after_ms, limit });
        let exceeds = |value: u64, limit: u64| limit > 0 && value > limit;
        if exceeds(charge.prompt_tokens, limits.prompt_tokens_max) {
            return over(Refused::TooLarge, 0, Limit::PromptTokens(limits.prompt_tokens_max));
        }
        if exceeds(charge.tokens_max, limits.output_tokens_max) {
            return over(Refused::TooLarge, 0, Limit::OutputTokens(limits.output_tokens_max));
        }
        if exceeds(self.requests_open + 1, limits.requests_open_max) {
            return over(Refused::Quota, RETRY_OPEN_MS, Limit::RequestsOpen(limits.requests_open_max));
        }
        let (requests, tokens) = (limits.requests_per_minute, limits.tokens_per_minute);
        let wait = |bucket: &Bucket, units, per_minute| match per_minute {
            0 => Some(0),
            _ => bucket.wait_ms(units, per_minute, now_ms),
        };
        match wait(&self.tokens, charge.tokens(), tokens) {
            None => return over(Refused::Quota, 0, Limit::TokensPerMinute(tokens)),
            Some(ms) if ms > 0 => return over(Refused::Quota, ms, Limit::TokensPerMinute(tokens)),
            Some(_) => {}
        }
        match wait(&self.requests, 1, requests) {
            Some(0) => Ok(()),
            ms => over(Refused::Quota, ms.unwrap_or(0), Limit::RequestsPerMinute(requests)),
        }
    }

    /// Takes the request in, after `check` has found room for it.
    pub(super) fn accept(&mut self, charge: &Charge, now_ms: u64) {
        let (requests, tokens) = (self.limits.requests_per_minute, self.limits.tokens_per_minute);
        self.requests_open += 1;
        if requests > 0 {
            self.requests.take(1, requests, now_ms);
        }
        if tokens > 0 {
            self.tokens.take(charge.tokens(), tokens, now_ms);
        }
    }

    /// The request has ended: bills what it used, and gives back the tokens it was charged beyond that.
    /// `charged`: at acceptance. `used`: None if nobody knows; then nothing is given back and its prompt is billed.
    pub(super) fn settle(&mut self, charged: u64, prompt_tokens: u64, used: Option<Usage>, now_ms: u64) {
        self.requests_open = self.requests_open.saturating_sub(1);
        let billed = used.unwrap_or(Usage { prompt_tokens, ..Usage::default() });
        self.used.requests += 1;
        self.used.prompt_tokens = self.used.prompt_tokens.saturating_add(billed.prompt_tokens);
        self.used.cached_tokens = self.used.cached_tokens.saturating_add(billed.cached_tokens);
        self.used.generated_tokens = self.used.generated_tokens.saturating_add(billed.generated_tokens);
        let tokens = self.limits.tokens_per_minute;
        if let Some(used) = used.filter(|_| tokens > 0) {
            let spent = used.prompt_tokens.saturating_add(used.generated_tokens);
            self.tokens.give(charged.saturating_sub(spent), tokens, now_ms);
        }
    }

    /// The planted bug: nothing counts as spent any more.
    pub(super) fn refill(&mut self) {
        (self.requests, self.tokens) = Default::default();
    }

    /// Other limits from now on. What was spent stays spent, in units, as far as the new limit can tell.
    fn limit(&mut self, limits: Limits, now_ms: u64) {
        let respent = |bucket: &Bucket, before: u64, after: u64| match bucket.level {
            None => *bucket,
            Some(_) if before == 0 || after == 0 => Bucket::default(),
            Some(_) => {
                let spent = before.saturating_mul(MINUTE_MS) - bucket.level(before, now_ms);
                let level = after.saturating_mul(MINUTE_MS).saturating_sub(spent);
                Bucket { level: Some(level), at_ms: now_ms }
            }
        };
        self.requests = respent(&self.requests, self.limits.requests_per_minute, limits.requests_per_minute);
        self.tokens = respent(&self.tokens, self.limits.tokens_per_minute, limits.tokens_per_minute);
        self.limits = limits;
    }
}

impl Ledger {
    pub fn tenants(&self) -> impl Iterator<Item = (&String, &Account)> {
        self.tenants.iter()
    }

    /// The account a tenant's requests are counted on. A tenant that nobody created has none.
    pub fn account(&self, tenant: &str) -> Option<&Account> {
        self.tenants.get(tenant)
    }

    pub(super) fn set_tenant(&mut self, name: String, limits: Limits) -> Outcome {
        if !self.tenants.contains_key(&name) && self.tenants.len() >= TENANTS_MAX {
            return Outcome::Refused(Refused::NoCapacity);
        }
        let (now, open) = (self.time_ms, &self.open);
        // Requests that came before their tenant was created are its own from now on.
        let account = || {
            let requests_open = open.values().filter(|open| open.tenant == name).count() as u64;
            Account { requests_open, ..Account::default() }
        };
        self.tenants.entry(name.clone()).or_insert_with(account).limit(limits, now);
        Outcome::Done
    }

    pub(super) fn remove_tenant(&mut self, name: &str) -> Outcome {
        if self.tenants.remove(name).is_none() {
            return Outcome::Refused(Refused::Unknown);
        }
        self.revoke_keys_of(name);
        Outcome::Done
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn account(requests_per_minute: u64, tokens_per_minute: u64) -> Account {
        let limits = Limits { requests_per_minute, tokens_per_minute, ..Limits::default() };
        Account { limits, ..Account::default() }
    }

    fn charge(prompt_tokens: u64, tokens_max: u64) -> Charge {
        Charge { prompt_tokens, tokens_max, choices: 1 }
    }

    #[test]
    fn each_limit_refuses_with_its_own_word() {
        let over = |limits: Limits, open: u64| {
            let account = Account { limits, requests_open: open, ..Account::default() };
            account.check(&charge(10, 5), 0).unwrap_err()
        };
        let none = Limits::default();
        let check = |limits, open, reason, limit| {
            let over = over(limits, open);
            assert_eq!((over.reason, over.limit), (reason, limit));
        };
        check(Limits { prompt_tokens_max: 9, ..none.clone() }, 0, Refused::TooLarge, Limit::PromptTokens(9));
        check(Limits { output_tokens_max: 4, ..none.clone() }, 0, Refused::TooLarge, Limit::OutputTokens(4));
        check(Limits { requests_open_max: 2, ..none.clone() }, 2, Refused::Quota, Limit::RequestsOpen(2));
        check(Limits { tokens_per_minute: 14, ..none }, 0, Refused::Quota, Limit::TokensPerMinute(14));
        let mut account = account(1, 0);
        account.accept(&charge(1, 1), 0);
        let refused = account.check(&charge(1, 1), 1_000).unwrap_err();
        assert_eq!((refused.limit, refused.retry_after_ms), (Limit::RequestsPerMinute(1), 59_000));
    }

    #[test]
    fn unused_tokens_come_back_and_unknown_usage_does_not() {
        let mut account = account(0, 100);
        account.accept(&charge(10, 90), 0);
        assert!(account.check(&charge(1, 1), 0).is_err());
        account.settle(100, 10, Some(Usage { prompt_tokens: 10, generated_tokens: 5, ..Usage::default() }), 0);
        assert_eq!(account.check(&charge(10, 75), 0), Ok(()));
        assert!(account.check(&charge(10, 76), 0).is_err());
        account.accept(&charge(10, 75), 0);
        account.settle(85, 10, None, 0);
        assert!(account.check(&charge(1, 1), 0).is_err());
        assert_eq!((account.used.requests, account.used.prompt_tokens, account.used.generated_tokens), (2, 20, 5));
    }

    #[test]
    fn new_limits_do_not_forget_what_was_spent() {
        let mut account = account(0, 100);
        account.accept(&charge(50, 40), 0);
        account.limit(Limits { tokens_per_minute: 200, ..Limits::default() }, 0);
        assert_eq!(account.check(&charge(100, 10), 0), Ok(()));
        assert!(account.check(&charge(100, 11), 0).is_err());
    }

    proptest! {
        /// Whatever is asked when: over any stretch of time no more is used than one minute's worth and what that time
        /// adds, a refusal says when to come back, and then it is taken.
        #[test]
        fn a_quota_is_never_exceeded(
            per_minute in 1u64..5_000,
            asks in proptest::collection::vec((0u64..30_000, 1u64..3_000, 0u64..3_000, any::<bool>()), 1..60),
        ) {
            let mut account = account(0, per_minute);
            let (mut now, mut spent) = (0, Vec::new());
            for (pass, prompt, more, ends) in asks {
                now += pass;
                let charge = charge(prompt, more);
                match account.check(&charge, now) {
                    Ok(()) => {
                        account.accept(&charge, now);
                        // What it really uses: all, or the prompt alone, and it ends at once.
                        let used = Usage { prompt_tokens: prompt, generated_tokens: if ends { 0 } else { more }, ..Usage::default() };
                        account.settle(charge.tokens(), prompt, Some(used), now);
                        spent.push((now, used.prompt_tokens + used.generated_tokens));
                    }
                    Err(over) if over.retry_after_ms == 0 => prop_assert!(charge.tokens() > per_minute),
                    Err(over) => {
                        prop_assert!(account.check(&charge, now + over.retry_after_ms - 1).is_err(), "not sooner");
                        prop_assert_eq!(account.check(&charge, now + over.retry_after_ms), Ok(()));
                    }
                }
            }
            for (at, (from, _)) in spent.iter().enumerate() {
                let mut sum = 0;
                for (until, tokens) in &spent[at..] {
                    sum += tokens;
                    prop_assert!(sum * MINUTE_MS <= per_minute * (MINUTE_MS + until - from), "{sum} in {} ms", until - from);
                }
            }
        }
    }
}
