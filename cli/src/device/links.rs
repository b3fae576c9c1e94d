//! `baton bench transfer --device cuda`: the handoff between the GPUs of two processes, this one, which receives, and one that it
//! starts, which sends; beside a copy inside the GPU and the link's kernels without the link. Every rate counts bytes read and
//! bytes written.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use baton_core::arena::{Arriving, DeviceSource, Extents};
use baton_core::{Arena, BlockId, BlockLayout, Epoch, KvDtype, RequestId, Rng, TransferId};
use baton_kernels::cuda::{Cubins, Gpu, GpuArena};
use baton_kvtransfer::{Fallback, Grant, LinkCounters, Links, Receiver};
use baton_proto::TcpNet;
use tokio::runtime::Runtime;
use tokio::time::Instant;

use crate::bench::figure::Figure;
use crate::exit::Failure;
use crate::out::sayln;
use crate::surroundings;

/// The two ends serve the same model.
const MODEL: &str = "bench";
const DEADLINE: Duration = Duration::from_secs(60);
/// What a handoff between two processes of one GPU has to reach of a copy inside it, in percent.
const COPY_SHARE: f64 = 70.0;

/// What is moved at a time.
#[derive(Clone, Copy)]
struct Load {
    layout: BlockLayout,
    blocks: usize,
}

/// Blocks as a model of 8 billion parameters has them, 64 KiB a layer: many gigabytes in few layers, as many handoffs side by side
/// have them under way, and one prompt of 4096 tokens in all layers.
const STREAM: Load = Load { layout: layout(4), blocks: 16_384 };
const PROMPT: Load = Load { layout: layout(32), blocks: 256 };

const fn layout(layers: u32) -> BlockLayout {
    BlockLayout { layers, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 }
}

impl Load {
    fn bytes(&self) -> usize {
        self.layout.block_bytes() * self.blocks
    }

    /// Read and written.
    fn gbps(&self, seconds: f64) -> f64 {
        2.0 * self.bytes() as f64 / 1e9 / seconds
    }

    fn ids(&self) -> Vec<BlockId> {
        (0..self.blocks as u32).map(|index| BlockId { index, generation: 1 }).collect()
    }
}

/// One end's blocks: on the GPU, and as the host's arena that stands for them.
struct End {
    gpu: Gpu,
    blocks: GpuArena,
    arena: Arc<Arena>,
}

impl End {
    fn new(gpu: Gpu, load: Load) -> Result<End, Failure> {
        let blocks = gpu.arena(load.layout, load.blocks).map_err(Failure::refused)?;
        let arena = Arc::new(Arena::shared(load.layout, load.blocks)?);
        arena.attach(blocks.shared(&gpu));
        Ok(End { gpu, blocks, arena })
    }

    /// Blocks that differ, out of one run of random bytes.
    fn fill(&mut self) -> Result<(), Failure> {
        let (bytes, mut rng) = (self.arena.layout().block_bytes(), Rng::new(1));
        let random: Vec<u8> = (0..bytes / 4).flat_map(|_| rng.u64().to_le_bytes()).collect();
        for block in 0..self.arena.blocks() {
            let at = block * 64 % bytes;
            self.blocks.write_block(block as u32, &random[at..at + bytes]).map_err(Failure::refused)?;
        }
        self.gpu.finish().map_err(Failure::refused)
    }
}

/// Measures `rounds` times, the sender on GPU `from` and the receiver on GPU `to`.
pub(crate) fn transfer(from: usize, to: usize, rounds: u32, runtime: &Runtime) -> Result<Vec<Figure>, Failure> {
    let open = || Gpu::open(to, &Cubins::new(surroundings::cubins())).map_err(Failure::refused);
    let mut figures = Vec::new();
    for (name, load) in [("stream", STREAM), ("prompt of 4096 tokens", PROMPT)] {
        let mut sender = Sender::start(from)?;
        let measured = runtime.block_on(measure(open()?, load, rounds, &mut sender))?;
        figures.extend(measured.figures(name, load, from == to));
    }
    Ok(figures)
}

/// The process that sends: for each line of standard input one handoff.
pub(crate) fn send(from: usize, runtime: &Runtime) -> Result<(), Failure> {
    let mut sending = None;
    for line in std::io::stdin().lines() {
        let order = Order::parse(&line?)?;
        let open = || Gpu::open(from, &Cubins::new(surroundings::cubins())).map_err(Failure::refused);
        let counters = runtime.block_on(carry_out(&order, &mut sending, &open))?;
        sayln!("{}", report(&counters));
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Where the sender is told what to do.
trait Teller {
    fn tell(&mut self, order: &Order) -> Result<(), Failure>;

    /// Blocks until the last order has been carried out; empty if all is as it should be.
    fn hear(&mut self) -> Result<String, Failure>;
}

/// Seconds of each thing measured, by round.
#[derive(Default)]
struct Measured(Vec<(&'static str, Vec<f64>)>);

const COPY: &str = "copy inside the GPU";
const FETCH_UNCHECKED: &str = "fetch, no checksums";
const FETCH: &str = "fetch, checksums of what lands";
const SUM: &str = "checksums of what is sent";
const HANDOFF: &str = "handoff of full blocks sent before";
const FIRST: &str = "handoff of blocks sent for the first time";

async fn measure(gpu: Gpu, load: Load, rounds: u32, sender: &mut dyn Teller) -> Result<Measured, Failure> {
    let mut end = End::new(gpu, load)?;
    let receiver = Receiver::listen(Arc::new(TcpNet), "127.0.0.1:0", end.arena.clone(), MODEL).await?;
    let mut kernels = Kernels::new(&end, load)?;
    let mut measured = Measured::default();
    // The first round connects and warms up.
    for round in 0..=rounds {
        let mut took = vec![
            (COPY, kernels.copy(&mut end)?),
            (FETCH_UNCHECKED, kernels.fetch(&end, false)?),
            (FETCH, kernels.fetch(&end, true)?),
            (SUM, kernels.sum(&end)?),
        ];
        for (name, settled) in [(FIRST, false), (HANDOFF, true)] {
            took.push((name, handoff(&receiver, load, settled, sender).await?));
        }
        if round > 0 {
            took.into_iter().for_each(|(name, seconds)| measured.add(name, seconds));
        }
    }
    receiver.close().await;
    Ok(measured)
}

/// Seconds from the grant to the word that everything has arrived.
async fn handoff(receiver: &Receiver, load: Load, settled: bool, sender: &mut dyn Teller) -> Result<f64, Failure> {
    let (grant, incoming) = receiver.open(RequestId(1), Epoch(1), load.ids(), DEADLINE, ());
    let order = Order {
        transfer: grant.transfer.0,
        layers: load.layout.layers,
        blocks: load.blocks,
        settled,
        address: grant.address,
    };
    let started = Instant::now();
    sender.tell(&order)?;
    let waiting = tokio::spawn(async move { (incoming.wait().await.map(drop), Instant::now()) });
    let report = tokio::task::block_in_place(|| sender.hear())?;
    if !report.is_empty() {
        return Err(Failure::refuse(report));
    }
    let (arrived, at) = waiting.await.map_err(|error| Failure::refuse(error.to_string()))?;
    arrived.map_err(Failure::refused)?;
    Ok((at - started).as_secs_f64())
}

/// What the link does on the GPU, without the link: between two arenas of this process.
struct Kernels {
    source: GpuArena,
    mapped: Arc<dyn DeviceSource>,
    layers: Vec<Extents>,
    pairs: Vec<(u32, u32)>,
}

impl Kernels {
    fn new(end: &End, load: Load) -> Result<Kernels, Failure> {
        let source = end.gpu.arena(load.layout, load.blocks).map_err(Failure::refused)?;
        let mapped = end.blocks.shared(&end.gpu).map(source.shared(&end.gpu).descriptor()?, load.bytes())?;
        let layers = (0..load.layout.layers as usize).map(|layer| end.arena.extents(layer)).collect();
        let pairs = (0..load.blocks as u32).map(|block| (block, block)).collect();
        Ok(Kernels { source, mapped, layers, pairs })
    }

    fn copy(&mut self, end: &mut End) -> Result<f64, Failure> {
        end.gpu.finish().map_err(Failure::refused)?;
        let started = Instant::now();
        end.gpu.copy_arena(&self.source, &mut end.blocks).map_err(Failure::refused)?;
        end.gpu.finish().map_err(Failure::refused)?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn fetch(&self, end: &End, sums: bool) -> Result<f64, Failure> {
        all(
            end,
            self.layers.iter().map(|extents| {
                // SAFETY: no handoff is under way, and nobody else knows of these blocks.
                unsafe {
                    match sums {
                        true => self.mapped.fetch(extents, extents, &self.pairs),
                        false => self.mapped.fetch_unchecked(extents, extents, &self.pairs),
                    }
                }
            }),
        )
    }

    fn sum(&self, end: &End) -> Result<f64, Failure> {
        let device = self.source.shared(&end.gpu);
        let blocks: Vec<u32> = self.pairs.iter().map(|pair| pair.0).collect();
        all(end, self.layers.iter().map(|extents| device.sum(extents, &blocks)))
    }
}

/// Seconds until everything has ended that `begun` begins.
fn all(end: &End, begun: impl Iterator<Item = std::io::Result<Box<dyn Arriving>>>) -> Result<f64, Failure> {
    end.gpu.finish().map_err(Failure::refused)?;
    let started = Instant::now();
    for arriving in begun.collect::<std::io::Result<Vec<_>>>()? {
        arriving.wait()?;
    }
    Ok(started.elapsed().as_secs_f64())
}

impl Measured {
    fn add(&mut self, name: &'static str, seconds: f64) {
        match self.0.iter_mut().find(|(other, _)| *other == name) {
            Some((_, all)) => all.push(seconds),
            None => self.0.push((name, vec![seconds])),
        }
    }

    fn of(&self, name: &str) -> Option<&Vec<f64>> {
        self.0.iter().find(|(other, _)| *other == name).map(|(_, all)| all)
    }

    /// Rates, and as a share of each round's copy. The target counts for streams inside one GPU.
    fn figures(&self, of: &str, load: Load, one_gpu: bool) -> Vec<Figure> {
        let mut figures = Vec::new();
        for (name, seconds) in &self.0 {
            let rates: Vec<f64> = seconds.iter().map(|seconds| load.gbps(*seconds)).collect();
            let rate = if *name == SUM { median(rates) / 2.0 } else { median(rates) };
            figures.push(Figure::new(format!("{of}, {name}"), rate, "GB/s"));
        }
        for (name, target) in
            [(FETCH_UNCHECKED, None), (FETCH, None), (HANDOFF, Some(COPY_SHARE)), (FIRST, Some(COPY_SHARE))]
        {
            let (Some(seconds), Some(copies)) = (self.of(name), self.of(COPY)) else { continue };
            let shares = seconds.iter().zip(copies).map(|(seconds, copy)| 100.0 * copy / seconds).collect();
            let (name, share) = (format!("{of}, {name}, share of the copy"), median(shares));
            figures.push(match target.filter(|_| one_gpu && load.blocks == STREAM.blocks) {
                Some(target) => Figure::at_least(name, share, "%", target),
                None => Figure::new(name, share, "%"),
            });
        }
        figures.extend(
            self.of(FIRST).map(|seconds| Figure::new(format!("{of}, {FIRST}"), median(seconds.clone()) * 1e3, "ms")),
        );
        figures
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// One handoff, as the sender is told.
#[derive(Clone, Debug, PartialEq)]
struct Order {
    transfer: u64,
    layers: u32,
    blocks: usize,
    /// The blocks are full, and known from an earlier handoff.
    settled: bool,
    address: String,
}

impl Order {
    fn line(&self) -> String {
        let Order { transfer, layers, blocks, settled, address } = self;
        format!("{transfer} {layers} {blocks} {} {address}", u8::from(*settled))
    }

    fn parse(line: &str) -> Result<Order, Failure> {
        let bad = || Failure::refuse(format!("{line:?} is no order of a handoff"));
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [transfer, layers, blocks, settled, address] = fields[..] else { return Err(bad()) };
        Ok(Order {
            transfer: transfer.parse().map_err(|_| bad())?,
            layers: layers.parse().map_err(|_| bad())?,
            blocks: blocks.parse().map_err(|_| bad())?,
            settled: settled == "1",
            address: address.to_string(),
        })
    }
}

/// The sender's memory and links, made for the first order.
struct Sending {
    _end: End,
    links: Links,
}

async fn carry_out(
    order: &Order,
    sending: &mut Option<Sending>,
    open: &dyn Fn() -> Result<Gpu, Failure>,
) -> Result<LinkCounters, Failure> {
    let load = Load { layout: layout(order.layers), blocks: order.blocks };
    let links = match sending {
        Some(Sending { links, .. }) => links.clone(),
        None => {
            let mut end = End::new(open()?, load)?;
            end.fill()?;
            let links = Links::new(Arc::new(TcpNet), end.arena.clone(), MODEL);
            sending.insert(Sending { _end: end, links }).links.clone()
        }
    };
    let grant = Grant {
        transfer: TransferId(order.transfer),
        attempt: 1,
        epoch: Epoch(1),
        request: RequestId(1),
        address: order.address.clone(),
        layout: load.layout,
        slice: None,
        blocks: load.ids(),
        deadline_ms: DEADLINE.as_millis() as u64,
        ticket: 0,
    };
    let pairs: Vec<(usize, BlockId)> = load.ids().into_iter().enumerate().collect();
    let mut outgoing = links.open_from_device(grant).await.map_err(Failure::refused)?;
    outgoing.settle(if order.settled { pairs.len() } else { 0 });
    for layer in 0..order.layers as usize {
        outgoing.send_soon(layer, &pairs).await.map_err(Failure::refused)?;
    }
    outgoing.commit().await.map_err(Failure::refused)?;
    Ok(links.counters())
}

/// Empty if every transfer was from GPU to GPU.
fn report(counters: &LinkCounters) -> String {
    if counters.gpu > 0 && counters.shm + counters.tcp == 0 {
        return String::new();
    }
    let reasons = Fallback::ALL.into_iter().filter(|reason| counters.fallbacks(*reason) > 0);
    let reasons: Vec<&str> = reasons.map(Fallback::as_str).collect();
    format!(
        "blocks went {} from GPU to GPU and {} through the host: {}",
        counters.gpu,
        counters.shm + counters.tcp,
        reasons.join(", ")
    )
}

/// The other process.
struct Sender {
    child: Child,
    orders: ChildStdin,
    reports: BufReader<ChildStdout>,
}

impl Sender {
    fn start(from: usize) -> Result<Sender, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "transfer", "--sender", "--device", &format!("cuda:{from}")]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (orders, reports) = (child.stdin.take(), child.stdout.take());
        let (Some(orders), Some(reports)) = (orders, reports) else {
            return Err(Failure::refuse("the sending process has no standard input or output"));
        };
        Ok(Sender { child, orders, reports: BufReader::new(reports) })
    }
}

impl Teller for Sender {
    fn tell(&mut self, order: &Order) -> Result<(), Failure> {
        Ok(writeln!(self.orders, "{}", order.line())?)
    }

    fn hear(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        match self.reports.read_line(&mut line)? {
            0 => Err(Failure::refuse("the sending process has ended; see above why")),
            _ => Ok(line.trim_end().to_string()),
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver as Reports, SyncSender, sync_channel};

    use super::*;

    fn gpu() -> Result<Gpu, Failure> {
        let folder = std::env::temp_dir().join("baton-emulated");
        std::fs::create_dir_all(&folder)?;
        Gpu::emulated(&folder).map_err(Failure::refused)
    }

    /// The sending end in this process, on a thread of its own.
    struct Beside {
        orders: SyncSender<Order>,
        reports: Reports<Result<String, String>>,
    }

    impl Beside {
        fn start() -> Beside {
            let (orders, told) = sync_channel::<Order>(1);
            let (report_to, reports) = sync_channel(1);
            let runtime = tokio::runtime::Handle::current();
            tokio::task::spawn_blocking(move || {
                let mut sending = None;
                while let Ok(order) = told.recv() {
                    let carried = runtime.block_on(carry_out(&order, &mut sending, &gpu));
                    let _ =
                        report_to.send(carried.map(|counters| report(&counters)).map_err(|error| error.to_string()));
                }
            });
            Beside { orders, reports }
        }
    }

    impl Teller for Beside {
        fn tell(&mut self, order: &Order) -> Result<(), Failure> {
            self.orders.send(Order::parse(&order.line())?).map_err(Failure::refused)
        }

        fn hear(&mut self) -> Result<String, Failure> {
            self.reports.recv().map_err(Failure::refused)?.map_err(Failure::refuse)
        }
    }

    /// Over the emulated kernels and the whole protocol: every figure is there, and what arrives is what was sent.
    #[test]
    fn two_ends_are_measured() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let load = Load { layout: layout(2), blocks: 12 };
        let measured =
            runtime.block_on(async { measure(gpu().unwrap(), load, 1, &mut Beside::start()).await }).unwrap();
        let figures = measured.figures("test", load, true);
        assert_eq!(figures.len(), 11, "{figures:?}");
        assert!(figures.iter().all(|figure| figure.value > 0.0 && figure.ok), "{figures:?}");
    }

    #[test]
    fn orders_are_read_as_written() {
        let order = Order { transfer: 7, layers: 4, blocks: 9, settled: true, address: "127.0.0.1:1".to_string() };
        assert_eq!(Order::parse(&order.line()).unwrap(), order);
        for line in ["", "1 2 3 0", "1 2 x 0 a", "1 2 3 0 a b"] {
            assert!(Order::parse(line).is_err(), "{line}");
        }
    }
}
