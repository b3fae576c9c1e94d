//! Machines with several workers: what strikes one of them as a machine, by its power, its network card or its clock, strikes
//! all of its processes. Between these nothing fails, and what only concerns a process stays with it.

use crate::plan::{Fault, Plan, What};

/// The machines of a run that have more than one worker.
pub(crate) struct Machines(Vec<Vec<String>>);

impl Machines {
    pub(crate) fn of(plan: &Plan) -> Machines {
        Machines(plan.machines.clone())
    }

    /// Every process of the machine on which this one runs.
    pub(crate) fn all(&self, host: &str) -> Vec<String> {
        let machine = self.0.iter().find(|machine| machine.iter().any(|own| own == host));
        machine.cloned().unwrap_or_else(|| vec![host.to_string()])
    }

    /// The fault for each process that it strikes. A death in the middle of something stays one: it strikes all at the moment
    /// that one of them has, and so does what waits for its moment.
    pub(crate) fn spread(&self, fault: Fault, servers: &[String]) -> Vec<Fault> {
        let Fault { at_ms, for_ms, what } = fault;
        let whats = if self.0.is_empty() { vec![what] } else { self.whats(what, servers) };
        whats.into_iter().map(|what| Fault { at_ms, for_ms, what }).collect()
    }

    fn whats(&self, what: What, servers: &[String]) -> Vec<What> {
        match what {
            What::Crash { host, kept } => self.each(&host, |host| What::Crash { host, kept }),
            What::Drift { host, thousandths } => self.each(&host, |host| What::Drift { host, thousandths }),
            What::WallClock { host, ahead_ms } => self.each(&host, |host| What::WallClock { host, ahead_ms }),
            What::Isolate { host } => {
                let own = self.all(&host);
                let others = servers.iter().filter(|other| !own.contains(other));
                let cut = |b: &String| own.iter().map(|a| What::Partition { a: a.clone(), b: b.clone() }).collect();
                others.flat_map(|other: &String| -> Vec<What> { cut(other) }).collect()
            }
            What::Partition { a, b } => self.pairs(&a, &b, |a, b| What::Partition { a, b }),
            What::OneWay { from, to } => self.pairs(&from, &to, |from, to| What::OneWay { from, to }),
            What::Hold { a, b } => self.pairs(&a, &b, |a, b| What::Hold { a, b }),
            What::Latency { a, b, ms } => self.pairs(&a, &b, |a, b| What::Latency { a, b, ms }),
            What::Stall { from, to, new_ms } => self.pairs(&from, &to, |from, to| What::Stall { from, to, new_ms }),
            What::Leave { host, from, .. } if self.all(&host) == self.all(&from) => Vec::new(),
            other => vec![other],
        }
    }

    fn each(&self, host: &str, what: impl Fn(String) -> What) -> Vec<What> {
        self.all(host).into_iter().map(what).collect()
    }

    /// Between two machines; within one there is no network that could fail.
    fn pairs(&self, a: &str, b: &str, what: impl Fn(String, String) -> What) -> Vec<What> {
        let (from, to) = (self.all(a), self.all(b));
        if from == to {
            return Vec::new();
        }
        from.iter().flat_map(|a| to.iter().map(|b| what(a.clone(), b.clone()))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_strikes_a_machine_strikes_all_its_processes_and_nothing_between_them() {
        let machine: Vec<String> = ["decode-1", "prefill-1"].map(String::from).into();
        let machines = Machines(vec![machine.clone()]);
        let servers: Vec<String> =
            ["coordinator-1", "prefill-1", "decode-1", "decode-2", "gateway-1"].map(String::from).into();
        let spread = |what: What| -> Vec<What> {
            let spread = machines.spread(Fault { at_ms: 5, for_ms: 7, what }, &servers);
            assert!(spread.iter().all(|fault| (fault.at_ms, fault.for_ms) == (5, 7)));
            spread.into_iter().map(|fault| fault.what).collect()
        };
        let crash = |host: &str| What::Crash { host: host.into(), kept: 3 };
        assert_eq!(spread(crash("prefill-1")), [crash("decode-1"), crash("prefill-1")]);
        assert_eq!(spread(crash("decode-2")), [crash("decode-2")]);
        let hold = |a: &str, b: &str| What::Hold { a: a.into(), b: b.into() };
        assert_eq!(spread(hold("decode-1", "prefill-1")), []);
        assert_eq!(spread(hold("decode-1", "decode-2")), [hold("decode-1", "decode-2"), hold("prefill-1", "decode-2")]);
        let cut = spread(What::Isolate { host: "decode-1".into() });
        assert_eq!(cut.len(), 2 * 3);
        assert!(!cut.iter().any(|what| what.hosts().iter().all(|host| machine.contains(host))), "{cut:?}");
        let hang = What::Hang { host: "decode-1".into() };
        assert_eq!(spread(hang.clone()), [hang]);
    }
}
