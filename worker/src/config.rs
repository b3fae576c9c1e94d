//! What an operator decides about one worker.

use std::path::{Path, PathBuf};

use baton_core::limits::{AUTONOMY_GRACE_MS, DRAIN_MS, KV_AUDIT, KV_DISK_BYTES};
use baton_core::{Role, WorkerId};
use baton_engine::EngineConfig;
use baton_kvtransfer::{BadTls, Preferred, Tls, Ways};
use serde::Deserialize;

use crate::error::StartError;

/// One worker, prefill or decode. Checked by `start`, which names the key at fault.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The worker's name, unique in the cluster (`prefill-0`). A process that registers under a name in use takes it
    /// over: the earlier life is fenced.
    pub id: WorkerId,
    /// `prefill` or `decode`.
    pub role: Role,
    /// Where gRPC listens, `host:port`; port 0 takes a free one.
    pub listen: String,
    /// Where blocks come in, `host:port`; port 0 takes a free one: handoffs at a decode worker, and at either kind what
    /// another worker holds.
    pub kv_listen: String,
    /// Where other workers reach `kv_listen`, `host:port`, if that is not its port at `advertise_host`: a mapped port, or
    /// something between that is meant to see the bytes. Handoffs that come that way never use shared memory.
    #[serde(default)]
    pub kv_advertise: Option<String>,
    /// Whether a prefill worker that knows no tickets for handoffs, of an earlier release, is turned away.
    #[serde(default)]
    pub kv_tickets_required: bool,
    /// Which link handoffs and pulls take where two workers share several.
    #[serde(default)]
    pub kv_link: KvLink,
    /// TLS on `kv_listen` and on links to others.
    #[serde(default)]
    pub kv_tls: Option<TlsFiles>,
    /// Host under which other processes reach this worker, without a port.
    pub advertise_host: String,
    /// gRPC addresses of the coordinators, at least one.
    pub coordinators: Vec<String>,
    /// The cluster that an earlier life of this process was in; empty for the first one.
    #[serde(skip)]
    pub cluster: String,
    /// How long a worker that drains lets its requests go on before they move to other workers, in milliseconds.
    #[serde(default = "drain_ms")]
    pub drain_ms: u64,
    /// How long a worker goes on serving while no coordinator answers, in milliseconds; then it drops everything and
    /// registers anew as soon as it can.
    #[serde(default = "autonomy_ms")]
    pub autonomy_ms: u64,
    /// Whether blocks that another worker holds are fetched from it when that takes less time than computing them.
    #[serde(default = "kv_pull")]
    pub kv_pull: bool,
    /// Tokens in a KV block, 1, 2, 4 or 8 times as many as the model's blocks have; handoffs take place between workers with blocks of
    /// any size. Unset: as many.
    #[serde(default)]
    pub kv_block_tokens: Option<u32>,
    /// Of so many blocks that are used again one is compared with what is known of it; 1: each, 0: none.
    #[serde(default = "kv_audit")]
    pub kv_audit: u32,
    /// Bytes of host memory for blocks that the cache has no room for any more; 0: none.
    #[serde(default)]
    pub kv_host_bytes: u64,
    /// Folder of this worker alone, for blocks that memory has no room for any more. They outlive the process.
    #[serde(default)]
    pub kv_disk: Option<PathBuf>,
    /// Bytes that `kv_disk` takes at most.
    #[serde(default = "kv_disk_bytes")]
    pub kv_disk_bytes: u64,
    /// Sizes of the engine.
    pub engine: EngineConfig,
}

fn kv_pull() -> bool {
    true
}

fn kv_audit() -> u32 {
    KV_AUDIT
}

fn kv_disk_bytes() -> u64 {
    KV_DISK_BYTES
}

fn drain_ms() -> u64 {
    DRAIN_MS
}

fn autonomy_ms() -> u64 {
    AUTONOMY_GRACE_MS
}

/// Which link is made where two workers share several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvLink {
    #[default]
    Best,
    Ucx,
    Tcp,
}

/// PEM files.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The certificates of the authorities that signed the workers'.
    pub ca: PathBuf,
    /// This worker's certificate, followed by those between it and its authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl TlsFiles {
    pub fn read(&self) -> Result<Tls, StartError> {
        let read =
            |path: &Path| std::fs::read(path).map_err(|error| StartError::Tls(format!("{}: {error}", path.display())));
        Tls::new(&read(&self.ca)?, &read(&self.cert)?, &read(&self.key)?).map_err(|bad| {
            let path = match bad {
                BadTls::Authority(_) => &self.ca,
                BadTls::Certificate(_) | BadTls::Pair(_) => &self.cert,
                BadTls::Key(_) => &self.key,
            };
            StartError::Tls(format!("{}: {bad}", path.display()))
        })
    }
}

impl Config {
    /// How this worker's links are made.
    pub(crate) fn ways(&self) -> Result<Ways, StartError> {
        let preferred = match self.kv_link {
            KvLink::Best => Preferred::Best,
            KvLink::Ucx => Preferred::Ucx,
            KvLink::Tcp => Preferred::Tcp,
        };
        let tls = self.kv_tls.as_ref().map(TlsFiles::read).transpose()?;
        if tls.is_some() && preferred == Preferred::Ucx {
            return Err(StartError::Config {
                key: "kv_link",
                problem: "is ucx, which does not encrypt: not beside TLS",
            });
        }
        Ok(Ways { preferred, tls, ..Ways::default() })
    }

    /// The address others use for a listener bound to `bound`.
    pub fn advertised(&self, bound: &str) -> String {
        let port = bound.rsplit(':').next().unwrap_or_default();
        format!("{}:{port}", self.advertise_host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_tls_that_is_no_good_is_named() {
        let folder = std::env::temp_dir().join(format!("baton-tls-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = |name: &str| folder.join(name);
        std::fs::write(file("ca.pem"), "nothing").unwrap();
        let files = TlsFiles { ca: file("ca.pem"), cert: file("cert.pem"), key: file("key.pem") };
        let error = |files: &TlsFiles| files.read().map(drop).unwrap_err().to_string();
        assert!(error(&files).contains("cert.pem"), "{}", error(&files));
        for name in ["cert.pem", "key.pem"] {
            std::fs::write(file(name), "nothing").unwrap();
        }
        assert!(error(&files).contains("ca.pem: the authority's file"), "{}", error(&files));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
