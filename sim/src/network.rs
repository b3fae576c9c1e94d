//! The state of every link between two hosts, from the faults in force: faults may overlap, and a link is whole again when
//! the last one that concerns it has ended.

use std::collections::BTreeMap;

use turmoil::Sim;

use crate::plan::What;

/// What a link does. Listed from mild to grave: of several faults the gravest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Link {
    Whole,
    Held,
    /// Nothing passes from the first host to the second.
    Forth,
    Back,
    Cut,
}

/// The links that are not whole, by pair in order of names.
#[derive(Default)]
pub(crate) struct Network {
    links: BTreeMap<(String, String), Link>,
}

impl Network {
    /// Makes the links what these faults want.
    pub(crate) fn follow(&mut self, sim: &Sim, servers: &[String], active: &[What]) {
        let mut wanted = BTreeMap::new();
        for what in active {
            for (pair, link) in links(what, servers) {
                let worst = wanted.entry(pair).or_insert(Link::Whole);
                *worst = worse(*worst, link);
            }
        }
        let mut pairs: Vec<_> = self.links.keys().chain(wanted.keys()).cloned().collect();
        pairs.sort();
        pairs.dedup();
        for pair in pairs {
            let old = self.links.get(&pair).copied().unwrap_or(Link::Whole);
            let new = wanted.get(&pair).copied().unwrap_or(Link::Whole);
            if old != new {
                change(sim, &pair, old, new);
                self.links.insert(pair, new);
            }
        }
    }
}

fn worse(a: Link, b: Link) -> Link {
    match (a, b) {
        (Link::Forth, Link::Back) | (Link::Back, Link::Forth) => Link::Cut,
        _ => a.max(b),
    }
}

fn change(sim: &Sim, (a, b): &(String, String), old: Link, new: Link) {
    let (a, b) = (a.as_str(), b.as_str());
    match old {
        Link::Whole => {}
        Link::Held => sim.release(a, b),
        Link::Forth | Link::Back | Link::Cut => sim.repair(a, b),
    }
    match new {
        Link::Whole => {}
        Link::Held => sim.hold(a, b),
        Link::Forth => sim.partition_oneway(a, b),
        Link::Back => sim.partition_oneway(b, a),
        Link::Cut => sim.partition(a, b),
    }
}

/// The links a fault concerns, and what it makes of them.
fn links(what: &What, servers: &[String]) -> Vec<((String, String), Link)> {
    let pair = |a: &String, b: &String, link, back| match a < b {
        true => ((a.clone(), b.clone()), link),
        false => ((b.clone(), a.clone()), back),
    };
    match what {
        What::Partition { a, b } => vec![pair(a, b, Link::Cut, Link::Cut)],
        What::Hold { a, b } => vec![pair(a, b, Link::Held, Link::Held)],
        What::OneWay { from, to } => vec![pair(from, to, Link::Forth, Link::Back)],
        What::Isolate { host } => {
            let others = servers.iter().filter(|other| *other != host);
            others.map(|other| pair(host, other, Link::Cut, Link::Cut)).collect()
        }
        _ => Vec::new(),
    }
}
