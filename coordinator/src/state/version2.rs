//! Snapshots as version 2 wrote them, and what they are today; its entries are read as today's, which only add to them.
//! Never changed; goes when no version 2 log can be left anywhere.

use std::collections::{BTreeMap, BTreeSet};

use baton_core::{RequestId, WorkerId};
use serde::{Deserialize, Serialize};

use super::{EndedRequests, Nodes, OpenRequest, Worker, access, poison, tenant};

#[derive(Serialize, Deserialize)]
pub(super) struct Ledger {
    pub(super) cluster: String,
    pub(super) index: u64,
    pub(super) time_ms: u64,
    pub(super) workers: BTreeMap<WorkerId, Worker>,
    pub(super) open: BTreeMap<RequestId, OpenRequest>,
    pub(super) deadlines: BTreeSet<(u64, RequestId)>,
    pub(super) ended: EndedRequests,
    pub(super) gateways: BTreeMap<String, u64>,
    pub(super) tenants: BTreeMap<String, tenant::Account>,
    pub(super) keys: access::Keys,
    pub(super) poison: poison::Poison,
    pub(super) nodes: Nodes,
}

impl From<Ledger> for super::Ledger {
    fn from(old: Ledger) -> super::Ledger {
        let Ledger { cluster, index, time_ms, workers, open, deadlines, ended, gateways, tenants, keys, poison, nodes } =
            old;
        super::Ledger {
            cluster,
            index,
            time_ms,
            workers,
            open,
            deadlines,
            ended,
            gateways,
            tenants,
            keys,
            poison,
            nodes,
            settings: super::Settings::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CodecError, Settings, decode_batch, decode_ledger};

    /// From the log of a coordinator of version 2: it founds its cluster, notes itself as a node, and is told of a tenant and
    /// of its key; and the ledger after that.
    const ENTRIES: [&str; 4] = [
        "02000001001065383637343334363731303737663266",
        "020017020e02010e0201",
        "02008307010801740300000000",
        "02008d07010a086365303964663235d57c4b194762c29202322448da30004b1d7131fef2c82c663b3dcea3d4bc0aa40174f3e3a5d806",
    ];
    const LEDGER: &str = "02001065383637343334363731303737663266058d07000000000000010174030000000000000000000000000001086365303964663235d57c4b194762c29202322448da30004b1d7131fef2c82c663b3dcea3d4bc0aa40174f3e3a5d80601000000000000010100";

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn a_log_of_version_2_gives_the_ledger_of_version_2() {
        let mut ledger = super::super::Ledger::default();
        for (index, entry) in (2..).zip(ENTRIES) {
            ledger.apply(index, decode_batch(&bytes(entry)).unwrap());
        }
        let restored = decode_ledger(&bytes(LEDGER)).unwrap();
        assert_eq!((restored.cluster(), restored.index(), restored.time_ms()), ("e867434671077f2f", 5, 909));
        assert!(restored.account("t").is_some() && restored.settings() == &Settings::default());
        assert_eq!(restored, ledger);
        let torn = &bytes(LEDGER)[..bytes(LEDGER).len() - 1];
        assert!(matches!(decode_ledger(torn), Err(CodecError::Damaged(2, _))));
    }
}
