//! Which processes a cluster on one machine has, and with which arguments each is started. Pure.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use baton_core::Role;

use crate::device::Devices;

/// What the cluster shall be; every choice is made.
#[derive(Clone, Debug)]
pub(crate) struct Topology {
    pub(crate) model: PathBuf,
    /// Workers named so far.
    pub(crate) prefill: usize,
    pub(crate) decode: usize,
    /// Prefill workers are started when all decode workers serve: loading, and answering their first canary, at once they would
    /// be in each other's way, and decode workers serve without the others.
    pub(crate) decode_first: bool,
    /// Where each coordinator listens; node ids count from 1.
    pub(crate) coordinators: Vec<SocketAddr>,
    /// Where the gateway listens.
    pub(crate) gateway: SocketAddr,
    /// The gateway serves other machines without keys.
    pub(crate) open: bool,
    pub(crate) data: PathBuf,
    /// Per worker.
    pub(crate) prefill_threads: usize,
    pub(crate) decode_threads: usize,
    /// Tensor-parallel ranks per worker.
    pub(crate) prefill_tp: usize,
    pub(crate) decode_tp: usize,
    /// What those are: threads or processes.
    pub(crate) ranks: String,
    /// Where packed weights are kept.
    pub(crate) weights_cache: Option<PathBuf>,
    pub(crate) devices: Devices,
    /// Per worker; None lets it choose within `kv_bytes`.
    pub(crate) kv_blocks: Option<u64>,
    /// Per worker.
    pub(crate) kv_bytes: u64,
    /// Per worker.
    pub(crate) kv_host_bytes: Option<u64>,
    /// Has a folder for each worker.
    pub(crate) kv_disk: Option<PathBuf>,
    /// Per worker.
    pub(crate) kv_disk_bytes: Option<u64>,
    pub(crate) batch_tokens: Option<u64>,
    pub(crate) draft_tokens: Option<u32>,
    /// What workers turn floating-point weights into.
    pub(crate) quantize: Option<String>,
    /// What workers keep keys and values as.
    pub(crate) kv_dtype: Option<String>,
    pub(crate) seed: Option<u64>,
    /// Flags every child gets.
    pub(crate) log: Vec<String>,
}

/// One process to start.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    pub(crate) role: Role,
    pub(crate) id: String,
    pub(crate) arguments: Vec<String>,
}

impl Plan {
    /// A worker that has changed its role is started in the new one from now on.
    pub(crate) fn take_role(&mut self, role: Role) {
        self.role = role;
        if let Some(command) = self.arguments.first_mut() {
            *command = format!("{role}-worker");
        }
    }
}

impl Topology {
    /// Coordinators first, the gateway last.
    pub(crate) fn plans(&self) -> Vec<Plan> {
        let coordinators = (1..=self.coordinators.len()).map(|node| self.coordinator(node));
        let prefill = (0..self.prefill).map(|n| self.worker(Role::Prefill, n));
        let decode = (0..self.decode).map(|n| self.worker(Role::Decode, n));
        let mut plans: Vec<Plan> = coordinators.chain(prefill).chain(decode).collect();
        plans.push(self.gateway());
        plans.into_iter().enumerate().map(|(n, plan)| self.complete(plan, n)).collect()
    }

    /// One more worker, the `nth` process since the start. No two workers of one start ever have the same id.
    pub(crate) fn another(&mut self, role: Role, nth: usize) -> Plan {
        let count = match role {
            Role::Prefill => &mut self.prefill,
            _ => &mut self.decode,
        };
        *count += 1;
        let number = *count - 1;
        self.complete(self.worker(role, number), nth)
    }

    /// What every process is told.
    fn complete(&self, mut plan: Plan, nth: usize) -> Plan {
        plan.arguments.push("--events".into());
        plan.arguments.extend(self.seed.iter().flat_map(|seed| flag("--seed", seed.wrapping_add(nth as u64))));
        plan.arguments.extend(self.log.iter().cloned());
        plan
    }

    /// Where coordinators of a cluster of this size keep their ledger: groups of different sizes never share one.
    pub(crate) fn ledger(data: &Path, nodes: usize) -> PathBuf {
        data.join(format!("coordinators-{nodes}"))
    }

    fn coordinator(&self, node: usize) -> Plan {
        let data = Topology::ledger(&self.data, self.coordinators.len()).join(node.to_string());
        let mut arguments = vec!["coordinator".to_string()];
        arguments.extend(flag("--node", node));
        arguments.extend(flag("--listen", self.coordinators[node - 1]));
        arguments.extend(flag("--data", data.display()));
        for (index, address) in self.coordinators.iter().enumerate() {
            arguments.extend(flag("--peer", format!("{}={address}", index + 1)));
        }
        Plan { role: Role::Coordinator, id: format!("coordinator-{node}"), arguments }
    }

    fn worker(&self, role: Role, n: usize) -> Plan {
        let id = format!("{role}-{n}");
        let mut arguments = vec![format!("{role}-worker")];
        arguments.extend(flag("--id", &id));
        arguments.extend(flag("--model", self.model.display()));
        let (threads, tp) = match role {
            Role::Prefill => (self.prefill_threads, self.prefill_tp),
            _ => (self.decode_threads, self.decode_tp),
        };
        arguments.extend(flag("--threads", threads));
        arguments.extend(flag("--tp", tp));
        arguments.extend(flag("--ranks", &self.ranks));
        arguments.extend(self.weights_cache.iter().flat_map(|dir| flag("--weights-cache", dir.display())));
        arguments.extend(flag("--device", self.devices.of(role, n)));
        arguments.extend(flag("--kv-bytes", self.kv_bytes));
        arguments.extend(self.kv_blocks.iter().flat_map(|blocks| flag("--kv-blocks", blocks)));
        arguments.extend(self.kv_host_bytes.iter().flat_map(|bytes| flag("--kv-host-bytes", bytes)));
        arguments.extend(self.kv_disk.iter().flat_map(|folder| flag("--kv-disk", folder.join(&id).display())));
        arguments.extend(self.kv_disk_bytes.iter().flat_map(|bytes| flag("--kv-disk-bytes", bytes)));
        arguments.extend(self.batch_tokens.iter().flat_map(|tokens| flag("--batch-tokens", tokens)));
        arguments.extend(self.draft_tokens.iter().flat_map(|tokens| flag("--draft-tokens", tokens)));
        arguments.extend(self.quantize.iter().flat_map(|format| flag("--quantize", format)));
        arguments.extend(self.kv_dtype.iter().flat_map(|dtype| flag("--kv-dtype", dtype)));
        arguments.extend(self.coordinator_flags());
        Plan { role, id, arguments }
    }

    fn gateway(&self) -> Plan {
        let id = "gateway-0".to_string();
        let mut arguments = vec!["gateway".to_string()];
        arguments.extend(flag("--id", &id));
        arguments.extend(flag("--listen", self.gateway));
        arguments.extend(self.open.then(|| "--open".to_string()));
        arguments.extend(self.coordinator_flags());
        Plan { role: Role::Gateway, id, arguments }
    }

    fn coordinator_flags(&self) -> impl Iterator<Item = String> {
        self.coordinators.iter().flat_map(|address| flag("--coordinator", address))
    }
}

fn flag(name: &str, value: impl std::fmt::Display) -> [String; 2] {
    [name.to_string(), value.to_string()]
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn topology(prefill: usize, decode: usize, coordinators: u16) -> Topology {
        Topology {
            model: "/m/name".into(),
            prefill,
            decode,
            decode_first: false,
            coordinators: (0..coordinators).map(|n| SocketAddr::from(([127, 0, 0, 1], 100 + n))).collect(),
            gateway: SocketAddr::from(([127, 0, 0, 1], 8000)),
            open: true,
            data: "/d".into(),
            prefill_threads: 1,
            decode_threads: 2,
            prefill_tp: 1,
            decode_tp: 2,
            ranks: "processes".into(),
            weights_cache: Some("/d/weights".into()),
            devices: "cuda:0,1".parse().expect("two GPUs"),
            kv_blocks: Some(64),
            kv_bytes: 1 << 30,
            kv_host_bytes: Some(1 << 20),
            kv_disk: Some("/d".into()),
            kv_disk_bytes: None,
            batch_tokens: Some(512),
            draft_tokens: Some(4),
            quantize: Some("q8_0".into()),
            kv_dtype: Some("int8".into()),
            seed: Some(u64::MAX),
            log: vec!["--log-json".into()],
        }
    }

    #[test]
    fn every_planned_command_line_parses() {
        for (prefill, decode, coordinators) in [(1, 1, 1), (2, 2, 3), (0, 1, 1)] {
            let plans = topology(prefill, decode, coordinators).plans();
            assert_eq!(plans.len(), prefill + decode + coordinators as usize + 1);
            for plan in plans {
                let line = std::iter::once("baton".to_string()).chain(plan.arguments);
                crate::args::Arguments::try_parse_from(line).unwrap_or_else(|error| panic!("{}: {error}", plan.id));
            }
        }
    }

    #[test]
    fn further_workers_have_new_names() {
        let mut topology = topology(2, 1, 1);
        let ids: Vec<_> = [Role::Decode, Role::Decode, Role::Prefill].map(|role| topology.another(role, 9).id).into();
        assert_eq!(ids, ["decode-1", "decode-2", "prefill-2"]);
        let line = std::iter::once("baton".to_string()).chain(topology.another(Role::Decode, 12).arguments);
        assert!(crate::args::Arguments::try_parse_from(line).is_ok());
    }

    #[test]
    fn processes_have_names_of_their_own() {
        let ids: Vec<_> = topology(2, 1, 3).plans().into_iter().map(|plan| plan.id).collect();
        let expected =
            ["coordinator-1", "coordinator-2", "coordinator-3", "prefill-0", "prefill-1", "decode-0", "gateway-0"];
        assert_eq!(ids, expected);
    }
}
