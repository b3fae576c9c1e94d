//! The grant: which blocks a sender may write, under which names, until when.

use baton_core::{BlockId, BlockLayout, Epoch, RequestId, TransferId};
use xxhash_rust::xxh3::Xxh3;

use crate::wire::Tag;

/// Some kv heads of a sender's blocks, for a transfer between ends that cut a model's heads differently. How many they
/// are stands in the grant's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadSlice {
    /// kv heads of the sender's blocks.
    pub of: u32,
    /// The first of them that moves.
    pub first: u32,
}

/// What the decode worker hands to the prefill worker, inside the Prefill call.
#[derive(Clone, Debug, PartialEq)]
pub struct Grant {
    pub transfer: TransferId,
    pub attempt: u32,
    pub epoch: Epoch,
    pub request: RequestId,
    /// Where the receiver listens.
    pub address: String,
    /// Of what moves: the receiver's blocks, or the heads of a slice.
    pub layout: BlockLayout,
    /// None: whole blocks.
    pub slice: Option<HeadSlice>,
    /// The blocks to fill, in the sequence's order.
    pub blocks: Vec<BlockId>,
    /// Milliseconds from the grant until the receiver gives up.
    pub deadline_ms: u64,
    /// What opens the transfer, for its sender alone; zero: nothing is asked for.
    pub ticket: u128,
}

impl Grant {
    /// What names this transfer in every frame.
    pub fn tag(&self) -> Tag {
        Tag { transfer: self.transfer, attempt: self.attempt, epoch: self.epoch }
    }

    /// A hash of everything both ends must agree on. It is compared when the transfer opens, and every extent's
    /// checksum is bound to it, so that bytes of another transfer can never count.
    pub fn digest(&self) -> u128 {
        let mut hash = Xxh3::new();
        hash.update(&self.transfer.0.to_le_bytes());
        hash.update(&self.attempt.to_le_bytes());
        hash.update(&self.epoch.0.to_le_bytes());
        hash.update(&self.request.0.to_le_bytes());
        hash.update(self.layout.describe().as_bytes());
        if let Some(HeadSlice { of, first }) = self.slice {
            hash.update(&[of.to_le_bytes(), first.to_le_bytes()].concat());
        }
        // In one piece: a transfer of many blocks waits for it.
        let blocks: Vec<u8> = self
            .blocks
            .iter()
            .flat_map(|block| (u64::from(block.generation) << 32 | u64::from(block.index)).to_le_bytes())
            .collect();
        hash.update(&blocks);
        hash.digest128()
    }
}
