//! The grant on the wire.

use baton_core::{BlockId, BlockLayout, Epoch, TransferId};
use baton_kvtransfer::{Grant, HeadSlice};
use baton_proto::convert::{BadMessage, request_id, required};
use baton_proto::v1;

pub fn to_wire(grant: Grant) -> v1::Grant {
    v1::Grant {
        transfer: grant.transfer.0,
        attempt: grant.attempt,
        epoch: grant.epoch.0,
        request: grant.request.to_string(),
        address: grant.address,
        layout: Some(grant.layout.into()),
        slice: grant.slice.map(|HeadSlice { of, first }| v1::HeadSlice { of, first }),
        blocks: grant.blocks.into_iter().map(Into::into).collect(),
        deadline_ms: grant.deadline_ms,
        ticket: if grant.ticket == 0 { Default::default() } else { grant.ticket.to_le_bytes().to_vec().into() },
    }
}

pub fn from_wire(grant: Option<v1::Grant>) -> Result<Grant, BadMessage> {
    let grant = required("grant", grant)?;
    Ok(Grant {
        transfer: TransferId(grant.transfer),
        attempt: grant.attempt,
        epoch: Epoch(grant.epoch),
        request: request_id(&grant.request)?,
        address: grant.address,
        layout: BlockLayout::try_from(required("grant.layout", grant.layout)?)?,
        slice: grant.slice.map(|v1::HeadSlice { of, first }| HeadSlice { of, first }),
        blocks: grant.blocks.into_iter().map(BlockId::from).collect(),
        deadline_ms: grant.deadline_ms,
        ticket: ticket(&grant.ticket)?,
    })
}

/// A decode worker of an earlier release gives none.
fn ticket(bytes: &[u8]) -> Result<u128, BadMessage> {
    if bytes.is_empty() {
        return Ok(0);
    }
    let bytes = bytes.try_into().map_err(|_| BadMessage { field: "grant.ticket", problem: "has not 16 bytes" })?;
    Ok(u128::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use baton_core::{KvDtype, RequestId};

    use super::*;

    #[test]
    fn a_grant_round_trips() {
        let layout = BlockLayout { layers: 2, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
        let grant = Grant {
            transfer: TransferId(3),
            attempt: 1,
            epoch: Epoch(9),
            request: RequestId(7),
            address: "127.0.0.1:1".into(),
            layout,
            slice: Some(HeadSlice { of: 4, first: 3 }),
            blocks: vec![BlockId { index: 4, generation: 2 }],
            deadline_ms: 100,
            ticket: 0x1234_5678_9abc_def0_1111,
        };
        assert_eq!(from_wire(Some(to_wire(grant.clone()))), Ok(grant));
        assert!(from_wire(None).is_err());
    }
}
