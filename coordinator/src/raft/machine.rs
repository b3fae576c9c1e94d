//! The ledger as openraft wants it: applies entries, makes and installs snapshots.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use baton_core::planted::{self, Bug};
use futures::{Stream, TryStreamExt};
use openraft::alias::{LogIdOf, SnapshotMetaOf, SnapshotOf, StoredMembershipOf};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot};
use openraft::{EntryPayload, OptionalSend};
use tokio::sync::watch;

use super::types::{Proposal, Reply, Types};
use super::wire::{decode, encode};
use crate::log::{Disk, LogError, Saved, load_snapshot, save_snapshot};
use crate::state::{self, Check, Command, Ledger, Outcome};

/// Entries between two hashes of the state, which is compared across nodes by its metric.
const HASH_EVERY: u64 = 1024;

type Meta = SnapshotMetaOf<Types>;

/// Hashes remembered, to compare with the leader's; the oldest is forgotten first.
const HASHES_MAX: usize = 16;

/// Clones share one ledger.
#[derive(Clone)]
pub(crate) struct Machine {
    disk: Arc<dyn Disk>,
    /// Version of what it writes; it takes none after it.
    entries: u16,
    ledger: Arc<RwLock<Ledger>>,
    applied: Arc<Mutex<Applied>>,
    /// False once the node has ended: what still saves then must not reach the disk of its successor.
    open: Arc<Mutex<bool>>,
    /// Bytes of entries applied since the ledger was saved.
    log_bytes: Arc<AtomicU64>,
    /// (index, hash) of this node's ledger, latest last.
    hashes: Arc<Mutex<VecDeque<(u64, u64)>>>,
    /// Set once this node's ledger was found to be another one than the leader's.
    difference: Arc<OnceLock<String>>,
    /// Index of the last entry that changed the cluster's name, its workers, tenants or keys.
    changed: Arc<watch::Sender<u64>>,
}

#[derive(Clone, Default)]
struct Applied {
    last: Option<LogIdOf<Types>>,
    membership: StoredMembershipOf<Types>,
}

impl Machine {
    /// Starts from the disk's snapshot, or empty. `entries`: version of what it writes and at most takes.
    pub(super) fn open(disk: Arc<dyn Disk>, entries: u16) -> Result<Machine, LogError> {
        let mut ledger = Ledger::default();
        let mut applied = Applied::default();
        if let Some(Saved { tag, body }) = load_snapshot(&*disk)? {
            let unreadable = |error: String| LogError::Io {
                path: disk.path("snapshot"),
                error: io::Error::new(io::ErrorKind::InvalidData, error),
            };
            let meta: Meta = decode(&tag).map_err(|error| unreadable(error.to_string()))?;
            let ours = state::refuse_newer(entries, &body).and_then(|()| state::decode_ledger(&body));
            ledger = ours.map_err(|error| unreadable(error.to_string()))?;
            applied = Applied { last: meta.last_log_id, membership: meta.last_membership };
        }
        Ok(Machine {
            disk,
            entries,
            ledger: Arc::new(RwLock::new(ledger)),
            applied: Arc::new(Mutex::new(applied)),
            open: Arc::new(Mutex::new(true)),
            log_bytes: Arc::default(),
            hashes: Arc::default(),
            difference: Arc::default(),
            changed: Arc::new(watch::Sender::new(0)),
        })
    }

    pub(super) fn ledger(&self) -> Arc<RwLock<Ledger>> {
        self.ledger.clone()
    }

    /// Shared by all clones: once it is false, nothing is saved any more.
    pub(super) fn open_mark(&self) -> Arc<Mutex<bool>> {
        self.open.clone()
    }

    pub(super) fn log_bytes(&self) -> Arc<AtomicU64> {
        self.log_bytes.clone()
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn apply_one(&self, index: u64, proposal: &Proposal) -> io::Result<Vec<Outcome>> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        state::refuse_newer(self.entries, &proposal.0).map_err(invalid)?;
        let batch = state::decode_batch(&proposal.0).map_err(invalid)?;
        batch.commands.iter().try_for_each(|command| self.compare(command))?;
        let mut ledger = self.ledger.write().expect("ledger lock");
        if batch.time_ms < ledger.time_ms() {
            metrics::counter!("baton_coordinator_stamps_behind_total").increment(1);
        }
        let outcomes = ledger.apply(index, batch);
        self.log_bytes.fetch_add(proposal.0.len() as u64, Ordering::Relaxed);
        if index.is_multiple_of(HASH_EVERY) {
            self.remember_hash(&ledger);
        }
        drop(ledger);
        if outcomes.iter().any(changes_cluster) {
            self.changed.send_replace(index);
        }
        Ok(outcomes)
    }

    /// This node's own hashes, to be told to the others.
    pub(super) fn hashes(&self) -> Arc<Mutex<VecDeque<(u64, u64)>>> {
        self.hashes.clone()
    }

    /// How this node's ledger was found to differ from the leader's, once it was.
    pub(super) fn difference(&self) -> Arc<OnceLock<String>> {
        self.difference.clone()
    }

    /// The low 52 bits survive a float.
    fn remember_hash(&self, ledger: &Ledger) {
        let (index, hash) = (ledger.index(), state::hash(ledger));
        metrics::gauge!("baton_coordinator_state_hash").set((hash & ((1 << 52) - 1)) as f64);
        metrics::gauge!("baton_coordinator_state_hash_index").set(index as f64);
        tracing::debug!(index, hash, "state hash");
        let mut hashes = self.hashes.lock().expect("hashes lock");
        hashes.push_back((index, hash));
        if hashes.len() > HASHES_MAX {
            hashes.pop_front();
        }
    }

    /// Refuses to go on where the leader's ledger was another one at the same index. A binary that writes other bytes
    /// for the same ledger, and a node that has no hash of that index, have nothing to say.
    fn compare(&self, command: &Command) -> io::Result<()> {
        let Command::Check(Check { version, index, hash }) = command else { return Ok(()) };
        let hashes = self.hashes.lock().expect("hashes lock");
        let own = hashes.iter().find(|(at, _)| at == index && *version == self.entries);
        let Some((_, own)) = own.filter(|(_, own)| own != hash) else { return Ok(()) };
        metrics::counter!("baton_coordinator_state_mismatch_total").increment(1);
        tracing::error!(index, own, leader = hash, "this node's ledger is not the leader's");
        let problem = format!(
            "the ledger at index {index} hashes to {own:016x} here and to {hash:016x} on the leader: keep this node's directory for a report, and replace the node"
        );
        let problem = self.difference.get_or_init(|| problem).clone();
        Err(io::Error::new(io::ErrorKind::InvalidData, problem))
    }

    /// Saves without holding up the runtime where the disk blocks.
    async fn save(&self, meta: &Meta, body: Vec<u8>) -> io::Result<Vec<u8>> {
        let (disk, tag) = (self.disk.clone(), encode(meta));
        let open = self.open.clone();
        let save = move || {
            let open = open.lock().expect("open lock");
            if !*open {
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the node has ended"));
            }
            save_snapshot(&*disk, &tag, &body).map(|()| body).map_err(io::Error::other)
        };
        match self.disk.inline_delay() {
            Some(delay) => {
                tokio::time::sleep(delay).await;
                save()
            }
            None => tokio::task::spawn_blocking(save).await.map_err(io::Error::other)?,
        }
    }
}

fn changes_cluster(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Founded { .. } | Outcome::Registered { .. } | Outcome::Gone | Outcome::Done)
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = Machine;

    async fn applied_state(&mut self) -> io::Result<(Option<LogIdOf<Types>>, StoredMembershipOf<Types>)> {
        let applied = self.applied.lock().expect("applied lock");
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let mut reply = Reply::default();
            match &entry.payload {
                EntryPayload::Blank => {}
                // Only who proposed it answers somebody.
                EntryPayload::Normal(_)
                    if planted::is(Bug::SkipEntry) && responder.is_none() && entry.log_id.index.is_multiple_of(20) => {}
                EntryPayload::Normal(proposal) => reply = Reply(self.apply_one(entry.log_id.index, proposal)?),
                EntryPayload::Membership(membership) => {
                    let stored = StoredMembershipOf::<Types>::new(Some(entry.log_id), membership.clone());
                    self.applied.lock().expect("applied lock").membership = stored;
                }
            }
            self.applied.lock().expect("applied lock").last = Some(entry.log_id);
            metrics::gauge!("baton_coordinator_applied_index").set(entry.log_id.index as f64);
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Machine {
        let applied = self.applied.lock().expect("applied lock").clone();
        let ledger = self.ledger.read().expect("ledger lock").clone();
        Machine {
            disk: self.disk.clone(),
            entries: self.entries,
            ledger: Arc::new(RwLock::new(ledger)),
            applied: Arc::new(Mutex::new(applied)),
            open: self.open.clone(),
            log_bytes: self.log_bytes.clone(),
            hashes: self.hashes.clone(),
            difference: self.difference.clone(),
            changed: self.changed.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &Meta, snapshot: Vec<u8>) -> io::Result<()> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        state::refuse_newer(self.entries, &snapshot).map_err(invalid)?;
        let ledger = state::decode_ledger(&snapshot).map_err(invalid)?;
        self.save(meta, snapshot).await?;
        let index = ledger.index();
        *self.ledger.write().expect("ledger lock") = ledger;
        *self.applied.lock().expect("applied lock") =
            Applied { last: meta.last_log_id, membership: meta.last_membership.clone() };
        self.changed.send_replace(index);
        tracing::info!(index, "installed a snapshot of the ledger");
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<SnapshotOf<Types, Vec<u8>>>> {
        let Some(Saved { tag, body }) = load_snapshot(&*self.disk).map_err(io::Error::other)? else {
            return Ok(None);
        };
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        Ok(Some(Snapshot { meta: decode(&tag).map_err(invalid)?, snapshot: body }))
    }
}

impl RaftSnapshotBuilder<Types> for Machine {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf<Types, Vec<u8>>> {
        let body = match planted::is(Bug::SnapshotForgets) {
            true => state::encode_ledger_as(self.entries, &self.ledger.read().expect("ledger lock").without_ended()),
            false => state::encode_ledger_as(self.entries, &self.ledger.read().expect("ledger lock")),
        };
        let applied = self.applied.lock().expect("applied lock").clone();
        let meta = Meta { last_log_id: applied.last, last_membership: applied.membership };
        let snapshot = self.save(&meta, body).await?;
        tracing::info!(bytes = snapshot.len(), "saved a snapshot of the ledger");
        Ok(Snapshot { meta, snapshot })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::log::MemoryDisk;
    use crate::state::{Batch, encode_batch};

    fn named(cluster: &str) -> Proposal {
        let commands = vec![Command::Found { cluster: cluster.into() }];
        Proposal(encode_batch(&Batch { time_ms: 7, commands }).into())
    }

    /// Goal: a snapshot carries the whole ledger to another node and over a restart. Method: build on one machine,
    /// install on a second, reopen both disks.
    #[tokio::test]
    async fn a_snapshot_carries_the_ledger() {
        let disks = [MemoryDisk::new(Duration::ZERO), MemoryDisk::new(Duration::ZERO)];
        let open = |disk: &MemoryDisk| Machine::open(Arc::new(disk.clone()), state::VERSION).unwrap();
        let (mut first, mut second) = (open(&disks[0]), open(&disks[1]));
        first.apply_one(1, &named("c")).unwrap();
        let mut builder = first.get_snapshot_builder().await;
        first.apply_one(2, &named("later")).unwrap();
        let snapshot = builder.build_snapshot().await.unwrap();
        let changes = second.changes();
        second.install_snapshot(&snapshot.meta, snapshot.snapshot).await.unwrap();
        assert!(changes.has_changed().unwrap());
        for machine in [second, open(&disks[0]), open(&disks[1])] {
            let ledger = machine.ledger();
            let ledger = ledger.read().unwrap();
            assert_eq!((ledger.cluster(), ledger.index(), ledger.time_ms()), ("c", 1, 7));
        }
    }

    /// Goal: a leader whose clock is behind its predecessor's takes no time back, and is counted.
    #[tokio::test]
    async fn a_stamp_behind_takes_no_time_back() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let machine = Machine::open(Arc::new(MemoryDisk::new(Duration::ZERO)), state::VERSION).unwrap();
        let apply = |index, time_ms| {
            let commands = vec![Command::Found { cluster: "c".into() }];
            let proposal = Proposal(encode_batch(&Batch { time_ms, commands }).into());
            metrics::with_local_recorder(&recorder, || machine.apply_one(index, &proposal)).unwrap();
            machine.ledger().read().unwrap().time_ms()
        };
        let times = [(1, 7), (2, 9), (3, 8), (4, 9), (5, 10)].map(|(index, stamp)| apply(index, stamp));
        assert_eq!(times, [7, 9, 9, 9, 10]);
        let counted = recorder.handle().render();
        assert!(counted.contains("baton_coordinator_stamps_behind_total 1"), "{counted}");
    }

    /// Goal: a node whose ledger is not the leader's stops. Method: two machines, one of which was given another entry.
    #[tokio::test]
    async fn a_ledger_that_is_not_the_leaders_stops_the_node() {
        let open = || Machine::open(Arc::new(MemoryDisk::new(Duration::ZERO)), state::VERSION).unwrap();
        let (leader, same, other) = (open(), open(), open());
        leader.apply_one(HASH_EVERY, &named("c")).unwrap();
        same.apply_one(HASH_EVERY, &named("c")).unwrap();
        other.apply_one(HASH_EVERY, &named("d")).unwrap();
        let (index, hash) = leader.hashes().lock().unwrap().back().copied().unwrap();
        let check = |version| {
            let commands = vec![Command::Check(Check { version, index, hash })];
            Proposal(encode_batch(&Batch { time_ms: 8, commands }).into())
        };
        assert!(same.apply_one(HASH_EVERY + 1, &check(state::VERSION)).is_ok());
        assert!(other.apply_one(HASH_EVERY + 1, &check(state::VERSION - 1)).is_ok(), "other bytes, no verdict");
        let error = other.apply_one(HASH_EVERY + 1, &check(state::VERSION)).unwrap_err();
        assert!(error.to_string().contains(&format!("to {hash:016x} on the leader")), "{error}");
        assert_eq!(other.difference().get(), Some(&error.to_string()));
        assert_eq!(same.difference().get(), None);
        assert!(open().apply_one(HASH_EVERY + 1, &check(state::VERSION)).is_ok(), "no hash of its own");
    }

    #[tokio::test]
    async fn bytes_that_are_no_commands_stop_the_node() {
        let machine = Machine::open(Arc::new(MemoryDisk::new(Duration::ZERO)), state::VERSION).unwrap();
        assert!(machine.apply_one(1, &Proposal(vec![1, 0, 99].into())).is_err());
        assert!(machine.apply_one(1, &Proposal(vec![0xff, 0].into())).is_err(), "a newer version");
    }

    /// Goal: a node that writes an earlier version writes what that version's binary reads, and takes nothing newer. Method: two
    /// nodes, each given the same batch as each writes it.
    #[tokio::test]
    async fn a_node_of_an_earlier_version_takes_nothing_newer() {
        let open = |entries| Machine::open(Arc::new(MemoryDisk::new(Duration::ZERO)), entries).unwrap();
        let (earlier, now) = (open(state::VERSION_MIN), open(state::VERSION));
        let batch = Batch { time_ms: 7, commands: vec![Command::Expire] };
        let entry = |version| Proposal(state::encode_batch_as(version, &batch).into());
        for machine in [&earlier, &now] {
            machine.apply_one(1, &entry(state::VERSION_MIN)).unwrap();
        }
        now.apply_one(2, &entry(state::VERSION)).unwrap();
        let error = earlier.apply_one(2, &entry(state::VERSION)).unwrap_err().to_string();
        assert!(error.contains("version 4 is newer than this coordinator takes (up to 3)"), "{error}");
        let saved =
            |mut machine: Machine| async move { machine.get_snapshot_builder().await.build_snapshot().await.unwrap() };
        let (old, new) = (saved(earlier.clone()).await, saved(now.clone()).await);
        now.clone().install_snapshot(&old.meta, old.snapshot).await.unwrap();
        assert!(earlier.clone().install_snapshot(&new.meta, new.snapshot).await.is_err());
    }
}
