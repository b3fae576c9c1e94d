//! `baton bench handoff`: what a request loses between the end of its prefill on one worker and its tokens from another, beside what
//! its bytes alone take over the same link.

mod alone;
mod pair;

use std::path::PathBuf;

use baton_core::Rng;
use baton_engine::{LoadOptions, Loaded, ModelSpec};
use baton_worker::{KvLink, LoadedModel};
use clap::Args;

use self::alone::Alone;
use self::pair::{Order, Pair, Seen};
use super::figure::{self, Figure};
use super::percentile::Distribution;
use crate::exit::Failure;
use crate::out::say;
use crate::{surroundings, table};

/// Tokens that one step computes at most, as in a worker.
const BATCH_TOKENS: usize = 512;
/// The first token comes from the prefill worker, the others from the decode worker.
const GENERATED: u32 = 4;
/// From the end of the prefill to the client's first token, beyond the transfer of the last layer.
const OVERHEAD_MS_MAX: f64 = 5.0;
/// Of a transfer's own time, what is left of it when the prefill ends.
const EXPOSED_PERCENT_MAX: f64 = 10.0;

/// Measure handoffs between two workers.
///
/// One prefill and one decode worker in this process, each with its own engine and runtime, that speak gRPC and move blocks as two
/// processes do: over shared memory, and again over tcp. Requests come one at a time, every prompt different. In each round the
/// same number of blocks also moves alone over the same kind of link, without prefill and gRPC, which is what "transfer" says.
///
/// "gap" is from the end of the prefill, first token sampled, to the client's first token; "begins" to the first step of the decode
/// worker; "overhead" is "gap" without what the last layer's bytes take at the transfer's rate. "exposed" is what of the transfer is
/// left when the prefill has ended, in milliseconds and as a share of the transfer alone. The share has a target where the transfer
/// takes 10 ms or more: in less, what is left is the one exchange that confirms it.
#[derive(Args, Debug)]
pub(crate) struct HandoffFlags {
    /// Hugging Face model directory or GGUF file [default: the model in the binary]
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// Tokens of a prompt; may be given several times [default: 64, 512 and 2048]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt: Vec<u32>,
    /// Requests of each length over each link
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
    /// Threads that each worker computes with [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Print one JSON object a line for each figure instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(flags: HandoffFlags) -> Result<(), Failure> {
    let lengths = if flags.prompt.is_empty() { vec![64, 512, 2048] } else { flags.prompt.clone() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut figures = Vec::new();
    for (name, link) in [("shm", KvLink::Best), ("tcp", KvLink::Tcp)] {
        let models = [model(&flags)?, model(&flags)?];
        let spec = models[0].spec.clone();
        check(&lengths, &spec)?;
        let longest = lengths.iter().copied().max().unwrap_or(1) as usize;
        let pair = runtime.block_on(Pair::start(models, link, longest))?;
        for length in &lengths {
            let measured = runtime.block_on(measure(&pair, &spec, link, *length, flags.rounds))?;
            figures.extend(measured.figures(&format!("{name}/{length}")));
        }
        if !pair.went_by(name) {
            return Err(Failure::refuse(format!("a handoff went by another link than {name}: see baton doctor")));
        }
    }
    match flags.json {
        true => figure::print(&figures),
        false => say!("{}", table::render(&["FIGURE", "VALUE", "UNIT", "TARGET", ""], &rows(&figures))),
    }
    Ok(())
}

fn rows(figures: &[Figure]) -> Vec<Vec<String>> {
    let number = |value: f64| format!("{value:.2}");
    let row = |f: &Figure| {
        let target = f.target.map_or(String::new(), number);
        vec![f.name.clone(), number(f.value), f.unit.into(), target, if f.ok { "" } else { "missed" }.into()]
    };
    figures.iter().map(row).collect()
}

fn check(lengths: &[u32], spec: &ModelSpec) -> Result<(), Failure> {
    let longest = spec.positions_max.saturating_sub(GENERATED as usize);
    match lengths.iter().find(|length| **length as usize > longest) {
        Some(length) => Err(Failure::refuse(format!("{} takes prompts of {longest} tokens, not {length}", spec.name))),
        None => Ok(()),
    }
}

fn model(flags: &HandoffFlags) -> Result<LoadedModel, Failure> {
    let directory = match &flags.model {
        Some(directory) => directory.clone(),
        None => crate::model::unpack(&surroundings::default_data()).map_err(Failure::refused)?,
    };
    let threads = flags.threads.map_or_else(surroundings::cores, |n| n as usize);
    let options = LoadOptions { threads, ..LoadOptions::default() };
    let Loaded { model, spec } = baton_engine::load(&directory, options, &mut |_| {}).map_err(Failure::refused)?;
    let card = baton_worker::card::read(&directory, &spec).map_err(Failure::refused)?;
    Ok(LoadedModel { backend: Box::new(model), spec, card })
}

/// What requests of one length saw, and what their blocks alone took, by round.
struct Measured {
    seen: Vec<Seen>,
    alone_ms: Vec<f64>,
    /// The part of the bytes that the last layer of the last step has.
    last: f64,
}

async fn measure(pair: &Pair, spec: &ModelSpec, link: KvLink, length: u32, rounds: u32) -> Result<Measured, Failure> {
    let blocks = (length as usize).div_ceil(spec.layout.block_tokens as usize);
    let mut alone = Alone::new(spec, link, blocks).await?;
    let mut client = pair.connect().await?;
    let mut rng = Rng::new(u64::from(length));
    let (mut seen, mut alone_ms) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let prompt = (0..length).map(|_| (rng.u64() % spec.vocab as u64) as u32).collect();
        let of_round = client.ask(pair, Order { id: rng.u128(), prompt, tokens: GENERATED }).await?;
        let took = alone.transfer().await?;
        // The first one connects, and touches memory.
        if round > 0 {
            seen.push(of_round);
            alone_ms.push(took.as_secs_f64() * 1e3);
        }
    }
    alone.close().await;
    let last_step = (length as usize - 1) % BATCH_TOKENS + 1;
    let last = last_step as f64 / f64::from(length) / f64::from(spec.layout.layers);
    Ok(Measured { seen, alone_ms, last })
}

impl Measured {
    fn figures(&self, name: &str) -> Vec<Figure> {
        let of = |value: &dyn Fn(&Seen, f64) -> f64| -> Distribution {
            self.seen.iter().zip(&self.alone_ms).map(|(seen, alone)| value(seen, *alone)).collect()
        };
        let alone: Distribution = self.alone_ms.iter().copied().collect();
        let median = |values: &Distribution| values.percentile(50.0).unwrap_or(0.0);
        let mut figures = vec![Figure::new(format!("{name}/transfer/p50"), median(&alone), "ms")];
        let mut both = |what: &str, values: Distribution, unit: &'static str, target: Option<f64>| {
            for percent in [50.0, 99.0] {
                let (label, value) = (format!("{name}/{what}/p{percent}"), values.percentile(percent).unwrap_or(0.0));
                figures.push(match target {
                    Some(target) => Figure::at_most(label, value, unit, target),
                    None => Figure::new(label, value, unit),
                });
            }
        };
        both("gap", of(&|seen, _| seen.gap_ms), "ms", None);
        both("begins", of(&|seen, _| seen.begins_ms), "ms", None);
        both("overhead", of(&|seen, alone| seen.gap_ms - alone * self.last), "ms", Some(OVERHEAD_MS_MAX));
        both("exposed", of(&|seen, _| seen.exposed_ms), "ms", None);
        let share = of(&|seen, alone| seen.exposed_ms / alone * 100.0);
        let target = (median(&alone) >= 10.0).then_some(EXPOSED_PERCENT_MAX);
        let (label, share) = (format!("{name}/exposed/share"), median(&share));
        figures.push(match target {
            Some(target) => Figure::at_most(label, share, "%", target),
            None => Figure::new(label, share, "%"),
        });
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a gap only the last layer's own bytes are taken away, and a short transfer's exposed share has no target.
    #[test]
    fn overhead_is_what_the_last_layer_does_not_explain() {
        let seen = Seen { gap_ms: 3.0, begins_ms: 2.0, exposed_ms: 1.0 };
        let of = |alone: f64, name: &str| {
            let measured = Measured { seen: vec![seen], alone_ms: vec![alone], last: 0.25 };
            measured.figures("shm/64").into_iter().find(|f| f.name == format!("shm/64/{name}")).expect("is there")
        };
        assert_eq!((of(4.0, "overhead/p50").value, of(4.0, "overhead/p99").target), (2.0, Some(OVERHEAD_MS_MAX)));
        assert_eq!((of(4.0, "exposed/share").value, of(4.0, "exposed/share").target), (25.0, None));
        assert_eq!((of(20.0, "exposed/share").value, of(20.0, "exposed/share").ok), (5.0, true));
    }
}
