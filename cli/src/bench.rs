//! `baton bench`: figures of an endpoint over HTTP, or of this machine's engine and links without one.

pub(crate) mod coordinator;
pub(crate) mod engine;
pub(crate) mod figure;
pub(crate) mod handoff;
pub(crate) mod percentile;
pub(crate) mod serve;
pub(crate) mod transfer;

use clap::Subcommand;

use crate::exit::Failure;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Drive an OpenAI-compatible endpoint and measure TTFT, ITL and throughput
    Serve(serve::ServeFlags),
    /// Measure prefill and decode of the engine in this process, beside the machine's own limits
    Engine(engine::EngineFlags),
    /// Measure how fast KV blocks move over each link, beside memcpy and a plain socket
    Transfer(transfer::TransferFlags),
    /// Measure what a request loses between its prefill worker and its decode worker
    Handoff(handoff::HandoffFlags),
    /// Measure how fast coordinators assign and write, with fsync on
    Coordinator(coordinator::CoordinatorFlags),
}

pub(crate) fn run(bench: Bench) -> Result<(), Failure> {
    match bench {
        Bench::Serve(flags) => serve::run(flags),
        Bench::Engine(flags) => engine::run(flags),
        Bench::Transfer(flags) => transfer::run(flags),
        Bench::Handoff(flags) => handoff::run(flags),
        Bench::Coordinator(flags) => coordinator::run(flags),
    }
}
