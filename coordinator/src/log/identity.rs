//! Who a data directory belongs to: node and cluster, written once, so that a directory cannot serve another node.

use std::collections::BTreeMap;

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
    /// The node came to a group that was there, and never founds one.
    pub joined: bool,
    /// The group that has taken it in then, by number: whom it asks about itself for as long as its log knows of no other.
    pub taken_by: BTreeMap<u64, String>,
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
        found.matches(disk, wanted.node, &wanted.cluster)?;
        Ok(found)
    }

    /// Whether `claim` would take this node and cluster, without writing anything.
    pub fn check(disk: &dyn Disk, node: NodeId, cluster: &str) -> Result<(), IdentityError> {
        match Identity::load(disk)? {
            Some(found) => found.matches(disk, node, cluster),
            None => Ok(()),
        }
    }

    fn matches(&self, disk: &dyn Disk, node: NodeId, cluster: &str) -> Result<(), IdentityError> {
        let path = disk.path(NAME);
        if self.node != node {
            return Err(IdentityError::OtherNode { path, found: self.node, wanted: node });
        }
        if !(self.cluster.is_empty() || cluster.is_empty() || self.cluster == cluster) {
            let (found, wanted) = (self.cluster.clone(), cluster.to_string());
            return Err(IdentityError::OtherCluster { path, found, wanted });
        }
        Ok(())
    }

    pub fn save(&self, disk: &dyn Disk) -> Result<(), LogError> {
        let by = self.taken_by.iter().map(|(node, address)| format!("by {node} {address}\n"));
        let joined = if self.joined { format!("joined\n{}", by.collect::<String>()) } else { String::new() };
        let text = format!("{TITLE}\nnode {}\ncluster {}\n{joined}", self.node, self.cluster);
        disk.replace(NAME, text.as_bytes()).map_err(|error| LogError::io(disk, NAME, error))
    }

    /// The identity of a directory that has one.
    pub fn load(disk: &dyn Disk) -> Result<Option<Identity>, IdentityError> {
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
        let joined = lines.next().is_some_and(|line| line == "joined");
        let by = |line: &str| {
            let (node, address) = line.strip_prefix("by ")?.split_once(' ')?;
            Some((node.parse().ok()?, address.to_string()))
        };
        Some(Identity { node: NodeId(node), cluster, joined, taken_by: lines.filter_map(by).collect() })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::MemoryDisk;
    use super::*;

    #[test]
    fn an_identity_is_read_back_and_one_without_a_group_too() {
        let disk = MemoryDisk::new(Duration::ZERO);
        let taken_by = BTreeMap::from([(1, "a:1".to_string()), (3, "c:3".to_string())]);
        let own = Identity { node: NodeId(4), cluster: "c".into(), joined: true, taken_by };
        own.save(&disk).unwrap();
        assert_eq!(Identity::load(&disk).unwrap(), Some(own.clone()));
        disk.replace(NAME, b"baton coordinator 1\nnode 4\ncluster c\njoined\n").unwrap();
        assert_eq!(Identity::load(&disk).unwrap(), Some(Identity { taken_by: BTreeMap::new(), ..own }));
    }
}
