//! `baton bench transfer`: GB/s of every link, beside what the same bytes cost as a memcpy and through a plain socket
//! in the same round.

mod groups;
mod path;
mod plain;

use std::path::PathBuf;
use std::sync::Arc;

use baton_core::{Arena, BlockLayout, KvDtype, Role};
use baton_kvtransfer::Tls;
use baton_worker::TlsFiles;
use clap::Args;

use self::path::Paths;
use super::figure::{self, Figure};
use crate::device::{self, Device, Devices};
use crate::exit::Failure;
use crate::out::say;
use crate::table;

/// Bytes of one pass that no cache holds.
const STREAMED_BYTES: usize = 256 << 20;
/// Bytes of one pass that the caches hold, at both ends.
const RESIDENT_BYTES: usize = 1 << 20;
const RESIDENT_PASSES: usize = 64;
const LAYERS: u32 = 4;

/// Measure the links.
///
/// Moves the same bytes over every link of this machine, in blocks of several sizes (what one layer of one block
/// takes), checked and committed as a handoff is; and as a memcpy on one core, and through a plain blocking socket. All
/// are measured in turn in every round: figures are medians over the rounds, ratios are medians of each round's ratio,
/// spread is the distance from the slowest round to the fastest over the median. "streaming" goes through 256 MiB that
/// no cache holds, "resident" through 1 MiB again and again. "shm" sends blocks for the first time, "shm again" full blocks
/// that were sent before, whose checksums the sender has kept; "tcp" has as many connections as a worker's links, "tcp, one lane" has
/// one; "ucx" is there where the library is, "tls" with --tls.
///
/// "ranks 4 to 2" hands 64 MiB of a model's blocks from four arenas with a quarter of the heads each to two with half of them; "equal"
/// compares that with the better of two equal groups. "exposed" is what is left of a handoff when its last layer is there, in
/// percent of the whole, where each layer comes twice as long after the one before as it takes to move.
///
/// With --device cuda it measures the link between the GPUs of two processes instead: this one and a second one that it starts.
/// Rates count every byte twice, read and written, as do those of the copy that they are compared with.
#[derive(Args, Debug)]
pub(crate) struct TransferFlags {
    /// Rounds over all figures of a size
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Bytes of one layer of one block, in KiB; may be given several times [default: 16, 64, 256 and 1024]
    #[arg(long, value_name = "KIB", value_parser = ["16", "64", "256", "1024"])]
    size: Vec<String>,
    /// Only handoffs between groups of ranks; they are left out where --size is given
    #[arg(long, conflicts_with_all = ["size", "device", "tls"])]
    groups: bool,
    /// Move blocks between two processes' memory on a GPU, or on two of them: cuda, cuda:1, cuda:0,1 [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    device: Option<Devices>,
    /// Be the process that sends, told what by standard input
    #[arg(long, hide = true, requires = "device")]
    sender: bool,
    /// Also measure tcp under TLS, with these PEM files: the authority's certificate, one for 127.0.0.1, and its key
    #[arg(long, value_name = "FILE", num_args = 3, value_names = ["CA", "CERT", "KEY"], conflicts_with = "device")]
    tls: Vec<PathBuf>,
    /// Print one JSON object a line for each figure instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(flags: TransferFlags) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut figures = Vec::new();
    let tls = match &flags.tls[..] {
        [ca, cert, key] => {
            let files = TlsFiles { ca: ca.clone(), cert: cert.clone(), key: key.clone() };
            Some(files.read().map_err(Failure::refused)?)
        }
        _ => None,
    };
    if let Some(devices) = &flags.device {
        let (from, to) = (devices.of(Role::Prefill, 0), devices.of(Role::Decode, 0));
        if let (Device::Cuda(from), Device::Cuda(to)) = (from, to) {
            if flags.sender {
                return device::send(from, &runtime);
            }
            let figures = device::transfer(from, to, flags.rounds, &runtime)?;
            match flags.json {
                true => figure::print(&figures),
                false => say!("{}", render(&figures)),
            }
            return Ok(());
        }
    }
    for (kib, layout) in sizes() {
        if !flags.groups && (flags.size.is_empty() || flags.size.contains(&kib.to_string())) {
            for (pattern, bytes, passes) in
                [("streaming", STREAMED_BYTES, 1), ("resident", RESIDENT_BYTES.max(kib << 12), RESIDENT_PASSES)]
            {
                let name = format!("{kib}KiB/{pattern}");
                let measured = runtime.block_on(measure(layout, bytes, passes, flags.rounds, tls.clone()))?;
                figures.extend(measured.figures(&name, kib, passes * bytes));
            }
        }
    }
    if flags.size.is_empty() {
        figures.extend(runtime.block_on(groups::measure(flags.rounds))?);
    }
    match flags.json {
        true => figure::print(&figures),
        false => say!("{}", render(&figures)),
    }
    Ok(())
}

/// Layouts whose layer of a block has a given size in KiB.
fn sizes() -> impl Iterator<Item = (usize, BlockLayout)> {
    let shapes = [
        (16, 2, 128, KvDtype::Bf16),
        (64, 8, 128, KvDtype::Bf16),
        (256, 32, 128, KvDtype::Bf16),
        (1024, 32, 256, KvDtype::F32),
    ];
    shapes.into_iter().map(|(kib, kv_heads, head_dim, dtype)| {
        (kib, BlockLayout { layers: LAYERS, kv_heads, head_dim, block_tokens: 16, dtype })
    })
}

/// Seconds of every path, by round.
struct Measured {
    names: Vec<&'static str>,
    rounds: Vec<Vec<f64>>,
}

/// Moves `bytes` over every path `passes` times a round.
async fn measure(
    layout: BlockLayout,
    bytes: usize,
    passes: usize,
    rounds: u32,
    tls: Option<Tls>,
) -> Result<Measured, Failure> {
    let blocks = bytes / layout.block_bytes();
    let arena = || Arena::new(layout, blocks);
    let shared = Arena::shared(layout, blocks).ok().map(filled);
    let mut paths = Paths::new(filled(arena()), shared, filled(arena()), tls, passes).await?;
    paths.round().await?; // Connects, and touches every buffer.
    if !paths.are_what_they_say() {
        return Err(Failure::refuse("a transfer went over another link than the one to measure"));
    }
    let mut measured = Measured { names: paths.names(), rounds: Vec::new() };
    for _ in 0..rounds {
        measured.rounds.push(paths.round().await?);
    }
    paths.close().await;
    Ok(measured)
}

/// An arena whose memory is in use, so that no pass meets an untouched page.
fn filled(mut arena: Arena) -> Arc<Arena> {
    arena.bytes_mut().iter_mut().enumerate().for_each(|(i, byte)| *byte = ((i * 31) >> 3) as u8);
    Arc::new(arena)
}

impl Measured {
    fn figures(&self, size: &str, kib: usize, bytes: usize) -> Vec<Figure> {
        let speed = |seconds: f64| bytes as f64 / 1e9 / seconds;
        let mut figures = Vec::new();
        for (path, name) in self.names.iter().enumerate() {
            let speeds = sorted(self.rounds.iter().map(|round| speed(round[path])));
            let median = speeds[speeds.len() / 2];
            let spread = (speeds[speeds.len() - 1] - speeds[0]) / median * 100.0;
            figures.push(Figure::new(format!("{size}/{name}"), median, "GB/s"));
            figures.push(Figure::new(format!("{size}/{name}/spread"), spread, "%"));
        }
        for (name, over, target) in ratios(kib) {
            let (Some(path), Some(base)) = (self.path(name), self.path(over)) else { continue };
            let of_rounds = sorted(self.rounds.iter().map(|round| round[base] / round[path]));
            let (label, ratio) = (format!("{size}/{name}/{over}"), of_rounds[of_rounds.len() / 2]);
            figures.push(match target.filter(|_| size.ends_with("streaming")) {
                Some(target) => Figure::at_least(label, ratio, "ratio", target),
                None => Figure::new(label, ratio, "ratio"),
            });
        }
        figures
    }

    fn path(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|other| *other == name)
    }
}

/// Which path is compared with which, and what the ratio of their speeds must reach for blocks of `kib`.
fn ratios(kib: usize) -> Vec<(&'static str, &'static str, Option<f64>)> {
    let large = |target: f64| (kib == 1024).then_some(target);
    vec![
        ("tcp", "socket", large(0.9)),
        ("tcp, one lane", "socket", None),
        ("tls", "tcp", None),
        ("ucx", "socket", None),
        ("local", "memcpy", None),
        ("shm", "memcpy", large(0.8)),
        ("shm again", "memcpy", large(0.8)),
    ]
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn render(figures: &[Figure]) -> String {
    let number = |value: f64| format!("{value:.2}");
    let row = |f: &Figure| {
        let target = f.target.map_or(String::new(), number);
        let verdict = if f.ok { "" } else { "missed" };
        vec![f.name.clone(), number(f.value), f.unit.into(), target, verdict.into()]
    };
    table::render(&["FIGURE", "VALUE", "UNIT", "TARGET", ""], &figures.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ratio compares the speeds of one round, and its target counts for streams of large blocks only.
    #[test]
    fn ratios_are_of_rounds() {
        let measured =
            Measured { names: vec!["socket", "tcp"], rounds: vec![vec![1.0, 2.0], vec![4.0, 4.0], vec![3.0, 2.0]] };
        let of = |size: &str, kib| {
            let figures = measured.figures(size, kib, 1_000_000_000);
            figures.into_iter().find(|f| f.name.ends_with("tcp/socket")).expect("both are there")
        };
        let large = of("1024KiB/streaming", 1024);
        assert_eq!((large.value, large.target, large.ok), (1.0, Some(0.9), true));
        assert_eq!(of("1024KiB/resident", 1024).target, None);
        assert_eq!(of("16KiB/streaming", 16).target, None);
    }

    #[test]
    fn sizes_are_what_they_say() {
        for (kib, layout) in sizes() {
            assert_eq!(layout.layer_bytes(), kib << 10);
        }
    }
}
