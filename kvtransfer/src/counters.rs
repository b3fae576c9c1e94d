//! What receivers and links have seen, as numbers for metrics.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Why an extent, a frame or a message was not taken. The words are metric labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// No such transfer (any more), or not opened on this link.
    Unknown,
    /// The grant is another one: other request, blocks or layout.
    Foreign,
    StaleAttempt,
    StaleEpoch,
    StaleGeneration,
    /// Another block than the one granted at this position.
    WrongBlock,
    OutOfRange,
    /// The extent has already arrived.
    Duplicate,
    /// The link had already carried this frame.
    Replayed,
    /// The transfer had been aborted.
    Late,
    /// Checksum or shape.
    Damaged,
    /// Its sender was given no ticket for the transfer; the link is closed.
    Forged,
}

impl Dropped {
    pub const ALL: [Dropped; 12] = {
        use Dropped::*;
        [
            Unknown,
            Foreign,
            StaleAttempt,
            StaleEpoch,
            StaleGeneration,
            WrongBlock,
            OutOfRange,
            Duplicate,
            Replayed,
            Late,
            Damaged,
            Forged,
        ]
    };

    pub fn as_str(self) -> &'static str {
        match self {
            Dropped::Unknown => "unknown",
            Dropped::Foreign => "foreign",
            Dropped::StaleAttempt => "stale_attempt",
            Dropped::StaleEpoch => "stale_epoch",
            Dropped::StaleGeneration => "stale_generation",
            Dropped::WrongBlock => "wrong_block",
            Dropped::OutOfRange => "out_of_range",
            Dropped::Duplicate => "duplicate",
            Dropped::Replayed => "replayed",
            Dropped::Late => "late",
            Dropped::Damaged => "damaged",
            Dropped::Forged => "forged",
        }
    }
}

/// A receiver's snapshot. `granted` = `completed` + `failed` + those in flight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub granted: u64,
    pub completed: u64,
    pub failed: u64,
    /// Transfers that still hold blocks: in flight or quarantined.
    pub held: u64,
    /// Connections now.
    pub links: u64,
    /// Connections refused for layout, model or version.
    pub mismatched: u64,
    /// Links closed because their writer did not say that it had stopped.
    pub unquiesced: u64,
    pub extents: u64,
    pub bytes: u64,
    /// Damaged extents that were asked for again.
    pub again: u64,
    dropped: [u64; Dropped::ALL.len()],
    untrusted: [u64; Untrusted::ALL.len()],
}

impl Counters {
    pub fn dropped(&self, reason: Dropped) -> u64 {
        self.dropped[reason as usize]
    }

    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().sum()
    }

    /// Connections closed because one of the two ends does not trust the other's certificate.
    pub fn untrusted(&self, reason: Untrusted) -> u64 {
        self.untrusted[reason as usize]
    }
}

/// Why TLS does not come about between two ends. The words are metric labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untrusted {
    NoCertificate,
    /// The certificate is of an authority that this end was not given.
    UnknownAuthority,
    /// Not valid any more, or not yet.
    Expired,
    /// The receiver's certificate is not for the host that it was looked for at.
    OtherName,
    /// The other end does not speak TLS.
    NoTls,
    /// Whatever else is wrong with it.
    BadCertificate,
}

impl Untrusted {
    pub const ALL: [Untrusted; 6] = [
        Untrusted::NoCertificate,
        Untrusted::UnknownAuthority,
        Untrusted::Expired,
        Untrusted::OtherName,
        Untrusted::NoTls,
        Untrusted::BadCertificate,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Untrusted::NoCertificate => "no_certificate",
            Untrusted::UnknownAuthority => "unknown_authority",
            Untrusted::Expired => "expired",
            Untrusted::OtherName => "other_name",
            Untrusted::NoTls => "no_tls",
            Untrusted::BadCertificate => "bad_certificate",
        }
    }
}

/// Why a connection is not the best kind of link. The words are metric labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// This end's arena is not memory that another process could map.
    NotShared,
    /// The other end does not offer shared memory: an older release, or another system.
    NotOffered,
    /// Something stands between the two ends (a proxy, a mapped port), and is meant to see the bytes.
    Relayed,
    /// The other end is not on this host, or is another user's.
    Unreachable,
    /// The other end could not map the arena.
    Refused,
    /// UCX was wanted, and one of the ends has none.
    NoUcx,
    /// Both ends have UCX and RDMA devices, but not on one network: UCX would go over tcp.
    NoRdma,
    /// This end has its blocks on a GPU and the other end does not, or is an older release: they pass through the host.
    NotOnDevice,
    /// Both ends have GPUs, but this end's memory there cannot be given to another process.
    DeviceNotShared,
    /// The other end's GPU cannot read this end's: another GPU without access to it, or another driver's.
    DeviceRefused,
    /// A connection that the link was to have besides did not come about.
    FewerLanes,
}

impl Fallback {
    pub const ALL: [Fallback; 11] = [
        Fallback::NotShared,
        Fallback::NotOffered,
        Fallback::Relayed,
        Fallback::Unreachable,
        Fallback::Refused,
        Fallback::NoUcx,
        Fallback::NoRdma,
        Fallback::NotOnDevice,
        Fallback::DeviceNotShared,
        Fallback::DeviceRefused,
        Fallback::FewerLanes,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Fallback::NotShared => "not_shared",
            Fallback::NotOffered => "not_offered",
            Fallback::Relayed => "relayed",
            Fallback::Unreachable => "unreachable",
            Fallback::Refused => "refused",
            Fallback::NoUcx => "no_ucx",
            Fallback::NoRdma => "no_rdma",
            Fallback::NotOnDevice => "not_on_device",
            Fallback::DeviceNotShared => "device_not_shared",
            Fallback::DeviceRefused => "device_refused",
            Fallback::FewerLanes => "fewer_lanes",
        }
    }
}

/// What a connection goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    Gpu,
    Shm,
    Ucx,
    Tls,
    Tcp,
}

impl LinkKind {
    pub const ALL: [LinkKind; 5] = [LinkKind::Gpu, LinkKind::Shm, LinkKind::Ucx, LinkKind::Tls, LinkKind::Tcp];

    pub fn as_str(self) -> &'static str {
        match self {
            LinkKind::Gpu => "gpu",
            LinkKind::Shm => "shm",
            LinkKind::Ucx => "ucx",
            LinkKind::Tls => "tls",
            LinkKind::Tcp => "tcp",
        }
    }
}

/// A snapshot of the sending side. `tcp` + `tls` + `shm` + `gpu` + `ucx` + `local` = `committed` + `failed` + those in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Transfers begun whose bytes go over a connection.
    pub tcp: u64,
    /// The same, encrypted.
    pub tls: u64,
    /// Transfers begun to a process of this host that copies out of this arena.
    pub shm: u64,
    /// Transfers begun to a process of this host whose GPU copies out of this one's memory.
    pub gpu: u64,
    /// Transfers begun whose bytes go over UCX.
    pub ucx: u64,
    /// Transfers begun to a receiver of this process.
    pub local: u64,
    pub committed: u64,
    pub failed: u64,
    /// Key and value bytes of committed transfers.
    pub bytes: u64,
    /// Connections made.
    pub connected: u64,
    /// Attempts to connect that failed.
    pub unconnected: u64,
    /// Extents sent again because they had arrived damaged.
    pub resent: u64,
    fallbacks: [u64; Fallback::ALL.len()],
    untrusted: [u64; Untrusted::ALL.len()],
    up: [u64; LinkKind::ALL.len()],
}

impl LinkCounters {
    /// Transfers begun, by link.
    pub fn begun(&self) -> [(&'static str, u64); 6] {
        let LinkCounters { gpu, shm, ucx, local, tls, tcp, .. } = *self;
        [("gpu", gpu), ("shm", shm), ("ucx", ucx), ("local", local), ("tls", tls), ("tcp", tcp)]
    }

    /// Connections that are up now.
    pub fn up(&self, kind: LinkKind) -> u64 {
        self.up[kind as usize]
    }

    /// In one line for people: transfers by link, the links that are up, and why they are not the best. Empty: there has been
    /// nothing yet.
    pub fn describe(&self) -> String {
        let some = |counts: &mut dyn Iterator<Item = (&'static str, u64)>| {
            let texts: Vec<String> =
                counts.filter(|(_, count)| *count > 0).map(|(name, count)| format!("{name} {count}")).collect();
            texts.join(", ")
        };
        let taken = some(&mut self.begun().into_iter());
        let up = some(&mut LinkKind::ALL.iter().map(|kind| (kind.as_str(), self.up(*kind))));
        let fallbacks = Fallback::ALL.iter().map(|reason| (reason.as_str(), self.fallbacks(*reason)));
        let untrusted = Untrusted::ALL.iter().map(|reason| (reason.as_str(), self.untrusted(*reason)));
        let reasons = some(&mut fallbacks.chain(untrusted));
        let up = if up.is_empty() { up } else { format!("up: {up}") };
        let parts = [taken, up].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ");
        match reasons.is_empty() {
            true => parts,
            false => format!("{parts} ({reasons})").trim_start().to_string(),
        }
    }

    /// Connections made that are not over the link that was wanted, for this reason.
    pub fn fallbacks(&self, reason: Fallback) -> u64 {
        self.fallbacks[reason as usize]
    }

    /// Attempts to connect that failed because one of the two ends does not trust the other's certificate.
    pub fn untrusted(&self, reason: Untrusted) -> u64 {
        self.untrusted[reason as usize]
    }
}

#[derive(Default)]
pub(crate) struct LinkCounts {
    pub(crate) tcp: Count,
    pub(crate) tls: Count,
    pub(crate) shm: Count,
    pub(crate) gpu: Count,
    pub(crate) ucx: Count,
    pub(crate) local: Count,
    pub(crate) committed: Count,
    pub(crate) failed: Count,
    pub(crate) bytes: Count,
    pub(crate) connected: Count,
    pub(crate) unconnected: Count,
    pub(crate) resent: Count,
    fallbacks: [Count; Fallback::ALL.len()],
    untrusted: [Count; Untrusted::ALL.len()],
    made: [Count; LinkKind::ALL.len()],
    ended: [Count; LinkKind::ALL.len()],
}

impl LinkCounts {
    pub(crate) fn fall_back(&self, reason: Fallback) {
        self.fallbacks[reason as usize].add(1);
    }

    pub(crate) fn distrust(&self, reason: Untrusted) {
        self.untrusted[reason as usize].add(1);
    }

    pub(crate) fn is_up(&self, kind: LinkKind) {
        self.connected.add(1);
        self.made[kind as usize].add(1);
    }

    pub(crate) fn is_down(&self, kind: LinkKind) {
        self.ended[kind as usize].add(1);
    }

    pub(crate) fn snapshot(&self) -> LinkCounters {
        LinkCounters {
            tcp: self.tcp.get(),
            tls: self.tls.get(),
            shm: self.shm.get(),
            gpu: self.gpu.get(),
            ucx: self.ucx.get(),
            local: self.local.get(),
            committed: self.committed.get(),
            failed: self.failed.get(),
            bytes: self.bytes.get(),
            connected: self.connected.get(),
            unconnected: self.unconnected.get(),
            resent: self.resent.get(),
            fallbacks: std::array::from_fn(|i| self.fallbacks[i].get()),
            untrusted: std::array::from_fn(|i| self.untrusted[i].get()),
            // Ended ones are read first, so that the difference is never below 0.
            up: std::array::from_fn(|i| (self.ended[i].get(), self.made[i].get())).map(|(ended, made)| made - ended),
        }
    }
}

/// A receiver's counters as they are counted.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) granted: Count,
    pub(crate) completed: Count,
    pub(crate) failed: Count,
    pub(crate) mismatched: Count,
    pub(crate) unquiesced: Count,
    pub(crate) extents: Count,
    pub(crate) bytes: Count,
    pub(crate) again: Count,
    dropped: [Count; Dropped::ALL.len()],
    untrusted: [Count; Untrusted::ALL.len()],
}

impl Counts {
    pub(crate) fn drop(&self, reason: Dropped) {
        self.dropped[reason as usize].add(1);
    }

    pub(crate) fn distrust(&self, reason: Untrusted) {
        self.untrusted[reason as usize].add(1);
    }

    pub(crate) fn snapshot(&self, held: usize, links: usize) -> Counters {
        Counters {
            granted: self.granted.get(),
            completed: self.completed.get(),
            failed: self.failed.get(),
            held: held as u64,
            links: links as u64,
            mismatched: self.mismatched.get(),
            unquiesced: self.unquiesced.get(),
            extents: self.extents.get(),
            bytes: self.bytes.get(),
            again: self.again.get(),
            dropped: std::array::from_fn(|i| self.dropped[i].get()),
            untrusted: std::array::from_fn(|i| self.untrusted[i].get()),
        }
    }
}

/// A number that only grows.
#[derive(Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_counters_are_told_in_a_line() {
        let counts = LinkCounts::default();
        assert_eq!(counts.snapshot().describe(), "");
        counts.fall_back(Fallback::NotOnDevice);
        assert_eq!(counts.snapshot().describe(), "(not_on_device 1)");
        counts.gpu.add(12);
        counts.tcp.add(3);
        assert_eq!(counts.snapshot().describe(), "gpu 12, tcp 3 (not_on_device 1)");
        counts.is_up(LinkKind::Gpu);
        counts.is_up(LinkKind::Tcp);
        counts.is_down(LinkKind::Tcp);
        counts.distrust(Untrusted::Expired);
        assert_eq!(counts.snapshot().describe(), "gpu 12, tcp 3; up: gpu 1 (not_on_device 1, expired 1)");
    }
}
