//! Names of KV blocks: by content (BlockHash, chained and salted by tenant) and by place (BlockId).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::TokenId;

/// Content name of a full block: a hash of the salt, every block before it and its own tokens. Two blocks with equal
/// hashes hold the same keys and values for the same model; tenants with different salts never share one.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockHash(pub u128);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl BlockHash {
    /// The hash that precedes a sequence's first block, from the tenant's salt (derived by the gateway from the
    /// authenticated tenant, never taken from a client alone).
    pub fn root(salt: &str) -> BlockHash {
        BlockHash::of(blake3::Hasher::new_derive_key("baton block hash v1").update(salt.as_bytes()))
    }

    /// The hash of the block that holds `tokens` after the block (or root) named by `self`.
    pub fn child(self, tokens: &[TokenId]) -> BlockHash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0.to_le_bytes());
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        BlockHash::of(&hasher)
    }

    /// Hashes of all full blocks of `tokens`, first to last; the tail that fills no block has none.
    pub fn chain(salt: &str, tokens: &[TokenId], block_tokens: usize) -> Vec<BlockHash> {
        let mut last = BlockHash::root(salt);
        let full = tokens.chunks_exact(block_tokens);
        full.map(|block| {
            last = last.child(block);
            last
        })
        .collect()
    }

    fn of(hasher: &blake3::Hasher) -> BlockHash {
        let hash = hasher.finalize();
        let first: [u8; 16] = hash.as_bytes()[..16].try_into().expect("a blake3 hash has 32 bytes");
        BlockHash(u128::from_le_bytes(first))
    }
}

/// Place of a block in one worker's arena, with the generation that grows each time the place is given out anew.
/// A reference with an older generation is stale and is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockId {
    pub index: u32,
    pub generation: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_depends_on_salt_prefix_and_tokens() {
        let tokens: Vec<TokenId> = (0..40).collect();
        let chain = BlockHash::chain("a", &tokens, 16);
        assert_eq!(chain.len(), 2);
        assert_eq!(chain[..1], BlockHash::chain("a", &tokens[..16], 16)[..]);
        assert_ne!(chain[0], BlockHash::chain("b", &tokens, 16)[0]);
        let mut other = tokens.clone();
        other[3] = 99;
        let changed = BlockHash::chain("a", &other, 16);
        assert!(chain[0] != changed[0] && chain[1] != changed[1]);
    }
}
