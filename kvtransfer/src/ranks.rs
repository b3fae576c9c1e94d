//! One handoff between two groups of ranks, each rank with an arena of its own, that may cut the model's kv heads
//! differently. It is one transfer for each pair of ranks that have heads in common: heads are outermost in a block, so
//! what one rank gives another is one run of bytes in each block, and a transfer of some heads is a transfer between views
//! of the two arenas. Who gives what is decided by the planner (`reslice`).

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use baton_core::{Aborted, BlockId, Epoch, RequestId};

use crate::receiver::Wanted;
use crate::reslice::{Cut, Heads, Unplannable, plan};
use crate::{Committed, Grant, HeadSlice, Incoming, Links, Outgoing, Received, Receiver, TransferError};

/// What one rank gives another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub from: u32,
    pub to: u32,
    pub slice: HeadSlice,
    /// The first head of the receiving rank's blocks that is written.
    pub first: u32,
    pub heads: u32,
    /// Positions in the sequence's blocks: all, unless several ranks hold these heads and share the giving.
    pub blocks: Vec<usize>,
}

/// The routes between `from` ranks and `to` ranks of a model with `kv_heads`, for a sequence of `blocks` blocks. Each head
/// of each block of each receiving rank is on exactly one of them.
pub fn routes(kv_heads: u32, from: u32, to: u32, blocks: usize) -> Result<Vec<Route>, Unplannable> {
    // Only heads and blocks matter: a block's head takes two bytes here, a key and a value.
    let heads = Heads { kv_heads, layers: 1, row_bytes: 1 };
    let cut = |ranks| Cut { ranks, block_tokens: 1 };
    let mut routes: BTreeMap<[u32; 5], Vec<usize>> = BTreeMap::new();
    for extent in plan(&heads, cut(from), cut(to), blocks as u32, 0..1)? {
        let [first_from, first_to, count] =
            [extent.from.offset, extent.to.offset, extent.bytes()].map(|n| n as u32 / 2);
        let key = [extent.to.rank, extent.from.rank, first_from, first_to, count];
        routes.entry(key).or_default().push(extent.to.block as usize);
    }
    let of = (kv_heads / from).max(1);
    let route = |([to, from, first_from, first, heads], blocks): ([u32; 5], Vec<usize>)| Route {
        from,
        to,
        slice: HeadSlice { of, first: first_from },
        first,
        heads,
        blocks,
    };
    Ok(routes.into_iter().map(route).collect())
}

/// A grant to one rank of the sending group.
#[derive(Clone, Debug, PartialEq)]
pub struct RankGrant {
    pub rank: u32,
    pub grant: Grant,
    /// Which of the sequence's blocks the grant's are.
    pub blocks: Vec<usize>,
}

/// What a handoff between groups is about.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    pub request: RequestId,
    pub epoch: Epoch,
    /// In the sequence's order, the same in each rank's arena.
    pub blocks: &'a [BlockId],
    pub deadline: Duration,
}

/// The receivers of a group, by rank (`Receiver::of_rank`).
pub struct Receivers {
    ranks: Vec<Receiver>,
    kv_heads: u32,
}

impl Receivers {
    /// # Panics
    /// If there is no rank.
    pub fn new(ranks: Vec<Receiver>, kv_heads: u32) -> Receivers {
        assert!(!ranks.is_empty(), "a group has a rank");
        Receivers { ranks, kv_heads }
    }

    pub fn ranks(&self) -> &[Receiver] {
        &self.ranks
    }

    /// Grants blocks to a group of `from` ranks. `guard` is what keeps the blocks of all ranks reserved; it is let go when
    /// none of them can be written any more.
    pub fn open<G: Send + Sync + 'static>(
        &self,
        from: u32,
        order: Order<'_>,
        guard: G,
    ) -> Result<(Vec<RankGrant>, Arrivals<G>), Unplannable> {
        let routes = routes(self.kv_heads, from, self.ranks.len() as u32, order.blocks.len())?;
        let guard = Arc::new(guard);
        let (mut grants, mut parts) = (Vec::with_capacity(routes.len()), Vec::with_capacity(routes.len()));
        for Route { from, to, slice, first, heads, blocks } in routes {
            let granted = blocks.iter().map(|position| order.blocks[*position]).collect();
            let Order { request, epoch, deadline, .. } = order;
            let wanted = Wanted { request, epoch, blocks: granted, deadline };
            let receiver = &self.ranks[to as usize];
            let opened = receiver.open_slice(wanted, slice, first, heads, guard.clone());
            // The planner asks for heads that a rank of so many has; the arena may have been made for another number.
            let (grant, part) = opened.ok_or(Unplannable::Empty)?;
            grants.push(RankGrant { rank: from, grant, blocks });
            parts.push(part);
        }
        Ok((grants, Arrivals { parts }))
    }
}

/// A granted handoff to a group. Dropping it aborts what is not complete.
pub struct Arrivals<G> {
    parts: Vec<Incoming<Arc<G>>>,
}

impl<G: Send + Sync + 'static> Arrivals<G> {
    /// Returns the guard once everything has arrived at every rank; as soon as one transfer fails all are given up.
    pub async fn wait(self) -> Result<(G, Received), TransferError> {
        let arrived = all(self.parts.into_iter().map(Incoming::wait)).await?;
        let (guards, parts): (Vec<Arc<G>>, Vec<Received>) = arrived.into_iter().unzip();
        let guard = guards.into_iter().filter_map(Arc::into_inner).next();
        // Every part has given its guard back: the last of them is the only one.
        let guard = guard.ok_or(TransferError::Aborted(Aborted::Internal))?;
        Ok((guard, total(parts)))
    }
}

/// The links of a group, by rank (`Links::of_rank`).
#[derive(Clone)]
pub struct Senders {
    ranks: Vec<Links>,
}

impl Senders {
    pub fn new(ranks: Vec<Links>) -> Senders {
        Senders { ranks }
    }

    /// Opens all transfers of a handoff.
    pub async fn open(&self, grants: Vec<RankGrant>) -> Result<Departures, TransferError> {
        let open = |RankGrant { rank, grant, blocks }: RankGrant| async move {
            let links = self.ranks.get(rank as usize).ok_or_else(|| TransferError::Incompatible {
                ours: format!("{} ranks", self.ranks.len()),
                theirs: format!("a grant to rank {rank}"),
            })?;
            Ok((blocks, links.open(grant).await?))
        };
        Ok(Departures { parts: all(grants.into_iter().map(open)).await? })
    }
}

/// An open handoff from a group. Dropping it aborts it.
pub struct Departures {
    parts: Vec<(Vec<usize>, Outgoing)>,
}

impl Departures {
    /// As `Outgoing::send`, for all ranks: for each block its position in the sequence, and the block that holds it in
    /// each rank's arena.
    pub async fn send(&mut self, layer: usize, blocks: &[(usize, BlockId)]) -> Result<(), TransferError> {
        let sending = self.parts.iter_mut().map(|(granted, outgoing)| async move {
            let place = |(position, block): &(usize, BlockId)| Some((granted.binary_search(position).ok()?, *block));
            let theirs: Vec<_> = blocks.iter().filter_map(place).collect();
            outgoing.send(layer, &theirs).await
        });
        all(sending).await.map(drop)
    }

    /// As `Outgoing::commit`, for all ranks.
    pub async fn commit(self) -> Result<Committed, TransferError> {
        Ok(total(all(self.parts.into_iter().map(|(_, outgoing)| outgoing.commit())).await?))
    }
}

fn total(parts: Vec<Received>) -> Received {
    parts.into_iter().fold(Received::default(), |sum, part| Received {
        extents: sum.extents + part.extents,
        bytes: sum.bytes + part.bytes,
        digest: sum.digest.wrapping_add(part.digest),
    })
}

/// Runs all futures; their results in order, or the first error, with which the others are dropped.
async fn all<T, E>(futures: impl Iterator<Item = impl Future<Output = Result<T, E>>>) -> Result<Vec<T>, E> {
    let mut running: Vec<Pin<Box<_>>> = futures.map(Box::pin).collect();
    let mut done: Vec<Option<T>> = running.iter().map(|_| None).collect();
    poll_fn(move |cx| {
        for (future, done) in running.iter_mut().zip(&mut done).filter(|(_, done)| done.is_none()) {
            match future.as_mut().poll(cx) {
                Poll::Ready(Ok(value)) => *done = Some(value),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {}
            }
        }
        match done.iter().all(Option::is_some) {
            true => Poll::Ready(Ok(done.drain(..).flatten().collect())),
            false => Poll::Pending,
        }
    })
    .await
}
