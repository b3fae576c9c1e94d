//! The same blocks over the same kind of link, with nothing around them.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Arena, BlockId, Epoch, RequestId};
use baton_engine::ModelSpec;
use baton_kvtransfer::{Links, Preferred, Receiver, Ways};
use baton_proto::TcpNet;
use baton_worker::KvLink;
use tokio::time::Instant;

use crate::exit::Failure;

const DEADLINE: Duration = Duration::from_secs(60);
const MODEL: &str = "alone";

pub(super) struct Alone {
    receiver: Receiver,
    links: Links,
    ids: Vec<BlockId>,
    layers: usize,
}

impl Alone {
    pub(super) async fn new(spec: &ModelSpec, link: KvLink, blocks: usize) -> Result<Alone, Failure> {
        let (net, layout) = (Arc::new(TcpNet), spec.layout);
        let ways = || {
            let preferred = if link == KvLink::Tcp { Preferred::Tcp } else { Preferred::Best };
            Ways { preferred, tls: None, ..Ways::default() }
        };
        let source = if link == KvLink::Tcp { Arena::new(layout, blocks) } else { Arena::shared(layout, blocks)? };
        let target = Arc::new(Arena::new(layout, blocks));
        let receiver = Receiver::with(net.clone(), "127.0.0.1:0", target, MODEL, ways()).await?;
        let links = Links::with(net, Arc::new(source), MODEL, ways());
        let ids = (0..blocks as u32).map(|index| BlockId { index, generation: 1 }).collect();
        Ok(Alone { receiver, links, ids, layers: layout.layers as usize })
    }

    /// All blocks, layer by layer: from its first byte to the receiver's word that all are there.
    pub(super) async fn transfer(&mut self) -> Result<Duration, Failure> {
        // Another request's blocks: no checksum is known from before.
        self.ids.iter_mut().for_each(|id| id.generation += 1);
        let (grant, incoming) = self.receiver.open(RequestId(1), Epoch(1), self.ids.clone(), DEADLINE, ());
        let pairs: Vec<(usize, BlockId)> = self.ids.iter().copied().enumerate().collect();
        let (links, layers) = (self.links.clone(), self.layers);
        let sending = tokio::spawn(async move {
            let mut outgoing = links.open(grant).await?;
            let began = Instant::now();
            for layer in 0..layers {
                outgoing.send(layer, &pairs).await?;
            }
            outgoing.commit().await.map(|_| began.elapsed())
        });
        let received = incoming.wait().await.map_err(Failure::refused);
        let took = sending.await.map_err(|error| Failure::refuse(error.to_string()))?.map_err(Failure::refused)?;
        received.map(|_| took)
    }

    pub(super) async fn close(self) {
        self.receiver.close().await;
    }
}
