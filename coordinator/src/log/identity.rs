//! Who a data directory belongs to: node and cluster, written once, so that a directory cannot serve another node.

use baton_core::NodeId;

use super::LogError;
use super::disk::Disk;

const NAME: &str = "identity";
const TITLE: &str = "baton coordinator 1";

/// What the identity file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub node: NodeId,
    /// Empty until the first leader has founded the cluster.
    pub cluster: String,
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{path} belongs to node {found}, not to node {wanted}: every node has its own data directory")]
    OtherNode { path: String, found: NodeId, wanted: NodeId },
    #[error("{path} belongs to cluster {found:?}, not to {wanted:?}")]
    OtherCluster { path: String, found: String, wanted: String },
    #[error("{path} is not an identity file")]
    Unreadable { path: String },
    #[error(transparent)]
    Log(#[from] LogError),
}

impl Identity {
    /// The directory's identity; an empty directory takes the one given. An empty cluster matches any.
    pub fn claim(disk: &dyn Disk, wanted: Identity) -> Result<Identity, IdentityError> {
        let Some(found) = Identity::load(disk)? else {
            wanted.save(disk)?;
            return Ok(wanted);
        };
        let path = disk.path(NAME);
        if found.node != wanted.node {
            return Err(IdentityError::OtherNode { path, found: found.node, wanted: wanted.node });
        }
        if !(found.cluster.is_empty() || wanted.cluster.is_empty() || found.cluster == wanted.cluster) {
            return Err(IdentityError::OtherCluster { path, found: found.cluster, wanted: wanted.cluster });
        }
        Ok(found)
    }

    pub fn save(&self, disk: &dyn Disk) -> Result<(), LogError> {
        let text = format!("{TITLE}\nnode {}\ncluster {}\n", self.node, self.cluster);
        disk.replace(NAME, text.as_bytes()).map_err(|error| LogError::io(disk, NAME, error))
    }

    fn load(disk: &dyn Disk) -> Result<Option<Identity>, IdentityError> {
        let failed = |error| LogError::io(disk, NAME, error);
        if !disk.list().map_err(failed)?.iter().any(|name| name == NAME) {
            return Ok(None);
        }
        let bytes = disk.read(NAME).map_err(failed)?;
        let parsed = std::str::from_utf8(&bytes).ok().and_then(Identity::parse);
        parsed.map(Some).ok_or_else(|| IdentityError::Unreadable { path: disk.path(NAME) })
    }

    fn parse(text: &str) -> Option<Identity> {
        let mut lines = text.lines();
        if lines.next()? != TITLE {
            return None;
        }
        let node = lines.next()?.strip_prefix("node ")?.parse().ok()?;
        let cluster = lines.next()?.strip_prefix("cluster ")?.to_string();
        Some(Identity { node: NodeId(node), cluster })
    }
}
