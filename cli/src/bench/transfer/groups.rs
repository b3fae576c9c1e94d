//! Handoffs between groups of ranks that cut the model's heads differently, beside those of equal groups with the same bytes; and how
//! much of a handoff is left when the last layer is there, if layers leave while the next ones are computed.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Arena, BlockId, BlockLayout, Epoch, KvDtype, RequestId};
use baton_kvtransfer::ranks::{Order, Receivers, Senders};
use baton_kvtransfer::{Links, Receiver};
use baton_proto::TcpNet;
use tokio::time::{Instant, sleep_until};

use super::figure::Figure;
use super::{filled, sorted};
use crate::exit::Failure;

/// The whole model's blocks: 64 KiB a layer.
const MODEL: BlockLayout =
    BlockLayout { layers: 16, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 };
/// Of one handoff: 64 MiB.
const BLOCKS: usize = 64;
const DEADLINE: Duration = Duration::from_secs(60);
/// (sending ranks, receiving ranks); equal ones are what the others are compared with.
const PAIRS: [(u32, u32); 4] = [(2, 2), (4, 4), (4, 2), (2, 4)];
/// A layer is computed in so many times the time in which it is moved: a slow link beside a fast model. Prefill takes longer.
const COMPUTES: u32 = 2;

/// Figures over so many rounds, over shared memory where there is some, and over tcp.
pub(super) async fn measure(rounds: u32) -> Result<Vec<Figure>, Failure> {
    let mut figures = Vec::new();
    for link in ["shm", "tcp"] {
        let mut groups = Vec::new();
        for (from, to) in PAIRS {
            groups.push(Group::new(link, from, to).await?);
        }
        for group in &groups {
            group.handoff(Duration::ZERO).await?; // Connects, and touches every buffer.
        }
        let (mut seconds, mut exposed) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let mut round = Vec::new();
            for group in &groups {
                round.push(group.handoff(Duration::ZERO).await?.whole);
            }
            let whole = round[0];
            let layer = Duration::from_secs_f64(whole / f64::from(MODEL.layers)) * COMPUTES;
            exposed.push(groups[0].handoff(layer).await?.exposed / whole * 100.0);
            seconds.push(round);
        }
        for (at, (from, to)) in PAIRS.into_iter().enumerate() {
            let gb = (BLOCKS * MODEL.block_bytes()) as f64 / 1e9;
            let speeds = sorted(seconds.iter().map(|round| gb / round[at]));
            figures.push(Figure::new(format!("ranks {from} to {to}/{link}"), speeds[speeds.len() / 2], "GB/s"));
            if from != to {
                let ratios = sorted(seconds.iter().map(|round| round[0].min(round[1]) / round[at]));
                let name = format!("ranks {from} to {to}/{link}/equal");
                figures.push(Figure::at_least(name, ratios[ratios.len() / 2], "ratio", 0.85));
            }
        }
        let exposed = sorted(exposed.into_iter());
        figures.push(Figure::at_most(format!("exposed/{link}"), exposed[exposed.len() / 2], "%", 10.0));
    }
    Ok(figures)
}

/// Two groups of ranks, each with an arena of its own.
struct Group {
    from: u32,
    receivers: Receivers,
    senders: Senders,
}

/// Seconds.
struct Took {
    whole: f64,
    /// From when the last layer was there.
    exposed: f64,
}

impl Group {
    async fn new(link: &str, from: u32, to: u32) -> Result<Group, Failure> {
        let of = |ranks| BlockLayout { kv_heads: MODEL.kv_heads / ranks, ..MODEL };
        let (net, mut receivers, mut senders) = (Arc::new(TcpNet), Vec::new(), Vec::new());
        for _ in 0..to {
            let arena = filled(Arena::new(of(to), BLOCKS));
            receivers.push(Receiver::of_rank(net.clone(), "127.0.0.1:0", arena, MODEL.kv_heads, "bench").await?);
        }
        for _ in 0..from {
            let arena = match link {
                "shm" => Arena::shared(of(from), BLOCKS)?,
                _ => Arena::new(of(from), BLOCKS),
            };
            senders.push(Links::of_rank(net.clone(), filled(arena), MODEL.kv_heads, "bench"));
        }
        let receivers = Receivers::new(receivers, MODEL.kv_heads);
        Ok(Group { from, receivers, senders: Senders::new(senders) })
    }

    /// One handoff, whose layers are there one after another, `layer` apart.
    async fn handoff(&self, layer: Duration) -> Result<Took, Failure> {
        let ids: Vec<BlockId> = (0..BLOCKS as u32).map(|index| BlockId { index, generation: 1 }).collect();
        let order = Order { request: RequestId(1), epoch: Epoch(1), blocks: &ids, deadline: DEADLINE };
        let (grants, arrivals) = self.receivers.open(self.from, order, ()).map_err(Failure::refused)?;
        let pairs: Vec<(usize, BlockId)> = ids.iter().copied().enumerate().collect();
        let senders = self.senders.clone();
        let began = Instant::now();
        let sending = tokio::spawn(async move {
            let mut departures = senders.open(grants).await?;
            let (start, mut last) = (Instant::now(), began);
            for at in 0..MODEL.layers {
                if !layer.is_zero() {
                    sleep_until(start + layer * (at + 1)).await;
                }
                last = Instant::now();
                departures.send(at as usize, &pairs).await?;
            }
            departures.commit().await.map(|_| last)
        });
        arrivals.wait().await.map_err(Failure::refused)?;
        let last = sending.await.map_err(|error| Failure::refuse(error.to_string()))?.map_err(Failure::refused)?;
        Ok(Took { whole: began.elapsed().as_secs_f64(), exposed: last.elapsed().as_secs_f64() })
    }
}
