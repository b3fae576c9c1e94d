//! The ways that bytes take from one arena to the other.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Arena, BlockId, Epoch, RequestId};
use baton_kvtransfer::{Links, Receiver};
use baton_proto::TcpNet;
use tokio::time::Instant;

use super::plain::Plain;
use crate::exit::Failure;

const DEADLINE: Duration = Duration::from_secs(60);
/// The receiver and its senders serve the same model.
const MODEL: &str = "bench";

/// Blocks that are sent for the first time, which both ends read.
const SHM: &str = "shm";
/// Full blocks that were sent before: the sender knows their checksums.
const SHM_AGAIN: &str = "shm again";

pub(super) struct Paths {
    plain: Plain,
    links: Vec<(&'static str, Links)>,
    receiver: Receiver,
    blocks: usize,
    layers: usize,
    passes: usize,
}

impl Paths {
    /// `shared` holds what `source` does, in memory that another process can map; None where there is no such memory.
    pub(super) async fn new(
        source: Arc<Arena>,
        shared: Option<Arc<Arena>>,
        target: Arc<Arena>,
        passes: usize,
    ) -> Result<Paths, Failure> {
        let (layout, blocks) = (*source.layout(), source.blocks());
        let net = Arc::new(TcpNet);
        let receiver = Receiver::listen(net.clone(), "127.0.0.1:0", target, MODEL).await?;
        let tcp = Links::new(net.clone(), source.clone(), MODEL);
        let local = Links::new(net.clone(), source.clone(), MODEL);
        local.add_local(&receiver);
        let shared =
            shared.map(|shared| [SHM, SHM_AGAIN].map(|name| (name, Links::new(net.clone(), shared.clone(), MODEL))));
        let plain = Plain::new(layout.layer_bytes(), blocks * layout.block_bytes())?;
        let ucx = over_ucx(&receiver, Links::new(net.clone(), source, MODEL)).await.map(|links| ("ucx", links));
        let links =
            [("tcp", tcp), ("local", local)].into_iter().chain(shared.into_iter().flatten()).chain(ucx).collect();
        Ok(Paths { plain, links, receiver, blocks, layers: layout.layers as usize, passes })
    }

    pub(super) fn names(&self) -> Vec<&'static str> {
        ["memcpy", "socket"].into_iter().chain(self.links.iter().map(|(name, _)| *name)).collect()
    }

    /// Seconds of all passes over each path, as `names` has them.
    pub(super) async fn round(&mut self) -> Result<Vec<f64>, Failure> {
        let passes = self.passes;
        let mut seconds = vec![
            tokio::task::block_in_place(|| self.plain.copy(passes)),
            tokio::task::block_in_place(|| self.plain.send(passes))?,
        ];
        for (name, links) in &self.links {
            let started = Instant::now();
            for _ in 0..passes {
                self.handoff(links, *name == SHM_AGAIN).await?;
            }
            seconds.push(started.elapsed().as_secs_f64());
        }
        Ok(seconds)
    }

    /// One transfer of all blocks, layer by layer, from its grant to the receiver's word that it is complete.
    /// `settled` blocks are full: their checksums are kept from the first time that they are sent.
    async fn handoff(&self, links: &Links, settled: bool) -> Result<(), Failure> {
        let ids: Vec<BlockId> = (0..self.blocks as u32).map(|index| BlockId { index, generation: 1 }).collect();
        let (grant, incoming) = self.receiver.open(RequestId(1), Epoch(1), ids.clone(), DEADLINE, ());
        let pairs: Vec<(usize, BlockId)> = ids.into_iter().enumerate().collect();
        let (links, layers) = (links.clone(), self.layers);
        let sending = tokio::spawn(async move {
            let mut outgoing = links.open(grant).await?;
            outgoing.settle(if settled { pairs.len() } else { 0 });
            for layer in 0..layers {
                outgoing.send(layer, &pairs).await?;
            }
            outgoing.commit().await
        });
        let received = incoming.wait().await.map_err(Failure::refused);
        sending.await.map_err(|error| Failure::refuse(error.to_string()))?.map_err(Failure::refused)?;
        received.map(drop)
    }

    /// Whether every transfer has taken the link that it is reported under.
    pub(super) fn are_what_they_say(&self) -> bool {
        self.links.iter().all(|(name, links)| {
            let counters = links.counters();
            let transfers =
                [("tcp", counters.tcp), (SHM, counters.shm), ("ucx", counters.ucx), ("local", counters.local)];
            let link = if *name == SHM_AGAIN { SHM } else { *name };
            transfers.into_iter().all(|(other, count)| (count > 0) == (other == link))
        })
    }

    pub(super) async fn close(self) {
        self.receiver.close().await;
    }
}

/// None where there is no UCX (`baton doctor` says why).
#[cfg(target_os = "linux")]
async fn over_ucx(receiver: &Receiver, links: Links) -> Option<Links> {
    receiver.offer_ucx().await.ok()?;
    links.prefer_ucx();
    Some(links)
}

#[cfg(not(target_os = "linux"))]
async fn over_ucx(_: &Receiver, _: Links) -> Option<Links> {
    None
}
