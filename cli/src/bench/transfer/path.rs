//! The ways that bytes take from one arena to the other.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Arena, BlockId, Epoch, RequestId};
use baton_kvtransfer::{Links, Preferred, Receiver, Tls, Ways};
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
const TLS: &str = "tls";
/// Over one connection, where `tcp` has as many as a worker's links have.
const ONE_LANE: &str = "tcp, one lane";

pub(super) struct Paths {
    plain: Plain,
    links: Vec<(&'static str, Links)>,
    receiver: Receiver,
    /// The one that asks for certificates.
    secured: Option<Receiver>,
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
        tls: Option<Tls>,
        passes: usize,
    ) -> Result<Paths, Failure> {
        let (layout, blocks) = (*source.layout(), source.blocks());
        let net = Arc::new(TcpNet);
        let ucx = has_ucx();
        let preferred = if ucx { Preferred::Ucx } else { Preferred::Best };
        let ways = Ways { preferred, tls: None, ..Ways::default() };
        let receiver = Receiver::with(net.clone(), "127.0.0.1:0", target.clone(), MODEL, ways).await?;
        let tcp = Links::new(net.clone(), source.clone(), MODEL);
        let one_lane = Links::with(net.clone(), source.clone(), MODEL, Ways { lanes: 1, ..Ways::default() });
        let local = Links::new(net.clone(), source.clone(), MODEL);
        local.add_local(&receiver);
        let shared =
            shared.map(|shared| [SHM, SHM_AGAIN].map(|name| (name, Links::new(net.clone(), shared.clone(), MODEL))));
        let plain = Plain::new(layout.layer_bytes(), blocks * layout.block_bytes())?;
        let ways = Ways { preferred: Preferred::Ucx, tls: None, ..Ways::default() };
        let ucx = ucx.then(|| ("ucx", Links::with(net.clone(), source.clone(), MODEL, ways)));
        let ways = Ways { preferred: Preferred::Tcp, tls, ..Ways::default() };
        let secured = match ways.tls {
            None => None,
            Some(_) => Some(Receiver::with(net.clone(), "127.0.0.1:0", target, MODEL, ways.clone()).await?),
        };
        let tls = secured.is_some().then(|| (TLS, Links::with(net.clone(), source, MODEL, ways)));
        let links = [("tcp", tcp), (ONE_LANE, one_lane), ("local", local)].into_iter().chain(tls);
        let links = links.chain(shared.into_iter().flatten()).chain(ucx).collect();
        Ok(Paths { plain, links, receiver, secured, blocks, layers: layout.layers as usize, passes })
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
                self.handoff(name, links).await?;
            }
            seconds.push(started.elapsed().as_secs_f64());
        }
        Ok(seconds)
    }

    /// One transfer of all blocks, layer by layer, from its grant to the receiver's word that it is complete.
    async fn handoff(&self, name: &str, links: &Links) -> Result<(), Failure> {
        // Full blocks: their checksums are kept from the first time that they are sent.
        let settled = name == SHM_AGAIN;
        let receiver = self.secured.as_ref().filter(|_| name == TLS).unwrap_or(&self.receiver);
        let ids: Vec<BlockId> = (0..self.blocks as u32).map(|index| BlockId { index, generation: 1 }).collect();
        let (grant, incoming) = receiver.open(RequestId(1), Epoch(1), ids.clone(), DEADLINE, ());
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
            let link = match *name {
                SHM_AGAIN => SHM,
                ONE_LANE => "tcp",
                name => name,
            };
            links.counters().begun().into_iter().all(|(other, count)| (count > 0) == (other == link))
        })
    }

    pub(super) async fn close(self) {
        self.receiver.close().await;
        if let Some(secured) = self.secured {
            secured.close().await;
        }
    }
}

/// Whether there is UCX (`baton doctor` says why not).
#[cfg(target_os = "linux")]
fn has_ucx() -> bool {
    baton_kvtransfer::describe_ucx().is_ok()
}

#[cfg(not(target_os = "linux"))]
fn has_ucx() -> bool {
    false
}
