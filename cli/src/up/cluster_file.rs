//! `<data>/cluster.json`: the processes of a running `baton up`. Rewritten whenever one starts, serves or dies; removed
//! at the end.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use baton_core::Role;
use serde::{Deserialize, Serialize};

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ClusterFile {
    /// The supervisor.
    pub(crate) pid: u32,
    /// When the supervisor started, in the kernel's ticks since boot: tells its pid from a later process with the same.
    pub(crate) pid_started: u64,
    pub(crate) url: String,
    pub(crate) model: String,
    pub(crate) started_unix_ms: u64,
    pub(crate) processes: Vec<Process>,
}

/// One child.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) role: Role,
    pub(crate) id: String,
    /// 0 while there is none.
    pub(crate) pid: u32,
    /// Empty until it serves.
    pub(crate) address: String,
    pub(crate) metrics: Option<String>,
    /// Processes of the ranks 1, 2, ... of a worker whose ranks are processes.
    #[serde(default)]
    pub(crate) ranks: Vec<u32>,
    /// starting, ready or down
    pub(crate) state: String,
    pub(crate) restarts: u32,
}

fn path(data: &Path) -> PathBuf {
    data.join("cluster.json")
}

impl ClusterFile {
    pub(crate) fn read(data: &Path) -> io::Result<ClusterFile> {
        let bytes = fs::read(path(data))?;
        serde_json::from_slice(&bytes).map_err(io::Error::from)
    }

    /// Replaces the file whole, so that a reader never sees half of it.
    pub(crate) fn write(&self, data: &Path) -> io::Result<()> {
        let aside = data.join("cluster.json.tmp");
        fs::write(&aside, serde_json::to_vec_pretty(self)?)?;
        fs::rename(aside, path(data))
    }

    pub(crate) fn remove(data: &Path) {
        let _ = fs::remove_file(path(data));
    }

    /// Whether the supervisor that wrote it still runs.
    pub(crate) fn runs(&self) -> bool {
        crate::process::exists(self.pid) && process_started(self.pid) == self.pid_started
    }

    /// Addresses of the processes of a role.
    pub(crate) fn addresses(&self, role: Role) -> Vec<String> {
        let of_role = self.processes.iter().filter(|p| p.role == role && !p.address.is_empty());
        of_role.map(|p| p.address.clone()).collect()
    }
}

/// When a process started, in ticks since boot (field 22 of proc_pid_stat(5)); 0 where the system does not say.
pub(crate) fn process_started(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name.split_whitespace().nth(19).and_then(|ticks| ticks.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(pid: u32, pid_started: u64) -> ClusterFile {
        let process = |role, address: &str| Process {
            role,
            id: "x".into(),
            pid: 1,
            address: address.into(),
            metrics: None,
            ranks: vec![2, 3],
            state: "ready".into(),
            restarts: 0,
        };
        let processes =
            vec![process(Role::Coordinator, "a:1"), process(Role::Coordinator, ""), process(Role::Decode, "b:1")];
        ClusterFile { pid, pid_started, url: "u".into(), model: "m".into(), started_unix_ms: 3, processes }
    }

    #[test]
    fn reads_back_what_was_written() {
        let data = std::env::temp_dir().join(format!("baton-cluster-test-{}", std::process::id()));
        fs::create_dir_all(&data).unwrap();
        let written = file(1, 2);
        written.write(&data).unwrap();
        assert_eq!(ClusterFile::read(&data).unwrap(), written);
        assert_eq!(written.addresses(Role::Coordinator), ["a:1"]);
        ClusterFile::remove(&data);
        assert!(ClusterFile::read(&data).is_err());
        fs::remove_dir_all(&data).unwrap();
    }

    #[test]
    fn a_pid_used_again_is_not_the_supervisor() {
        let me = std::process::id();
        let started = process_started(me);
        assert!(file(me, started).runs());
        assert!(!file(me, started + 1).runs());
        assert!(!file(0, 0).runs());
    }
}
