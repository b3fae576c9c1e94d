//! The command line.

use clap::{Parser, Subcommand};

use crate::exit::EXIT_CODES;
use crate::log::LogFlags;

/// Serves large language models from separate prefill and decode workers.
///
/// `baton up` starts a whole cluster on this machine, with a small model that ships in the binary.
#[derive(Debug, Parser)]
#[command(name = "baton", version, after_help = EXIT_CODES, propagate_version = true, max_term_width = 110)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) log: LogFlags,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// One thing the binary can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a cluster on this machine and keep it running
    Up(crate::up::UpFlags),
    /// Show every process, worker, pool and request of a cluster
    Status(crate::status::StatusFlags),
    /// Give the cluster of a `baton up` more or fewer workers
    Scale(crate::scale::ScaleFlags),
    /// Let a worker finish what it has, and end
    Drain(crate::order::DrainFlags),
    /// Let a worker serve the other role, without loading its weights again
    Role(crate::order::ChangeFlags),
    /// Show why a request was assigned where it was, or refused
    Explain(crate::explain::ExplainFlags),
    /// Create, show and remove tenants and their limits
    #[command(subcommand)]
    Tenant(crate::access::TenantCommand),
    /// Create, show and revoke API keys
    #[command(subcommand)]
    Key(crate::access::KeyCommand),
    /// Show and change the settings of the whole cluster
    #[command(subcommand)]
    Setting(crate::setting::SettingCommand),
    /// Talk to a model in the terminal
    Chat(crate::chat::ChatFlags),
    /// Measure an endpoint or this machine's engine
    #[command(subcommand)]
    Bench(crate::bench::Bench),
    /// Run clusters in a deterministic simulator, under faults that follow from a seed
    #[command(subcommand)]
    Sim(crate::sim::Sim),
    /// Say what this machine offers and what is missing
    Doctor(crate::doctor::DoctorFlags),
    /// Run one coordinator, or change the group of those that run
    Coordinator(crate::role::coordinator::CoordinatorFlags),
    /// Run one prefill worker
    PrefillWorker(crate::role::worker::WorkerFlags),
    /// Run one decode worker
    DecodeWorker(crate::role::worker::WorkerFlags),
    /// Run one gateway
    Gateway(crate::role::gateway::GatewayFlags),
    #[command(hide = true)]
    Rank(crate::role::rank::RankFlags),
}

impl Command {
    /// Whether this is one process of a cluster.
    pub(crate) fn is_role(&self) -> bool {
        use Command::{Coordinator, DecodeWorker, Gateway, PrefillWorker, Rank};
        match self {
            Coordinator(flags) => flags.is_role(),
            PrefillWorker(_) | DecodeWorker(_) | Gateway(_) | Rank(_) => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn command_lines_parse_or_are_refused() {
        let cases = [
            ("baton up", true),
            ("baton up --prefill 2 --decode 2 --coordinators 3 --port 8001 --model /m", true),
            ("baton up --coordinators 2", false),
            ("baton up --quantize q8_0", true),
            ("baton up --quantize q3", false),
            ("baton up --kv-dtype int8", true),
            ("baton up --kv-dtype int4", false),
            ("baton up --decode 0", false),
            ("baton up --prefill 0", true),
            ("baton up --tp 2 --prefill-tp 1 --decode-tp 4", true),
            ("baton up --tp 0", false),
            ("baton decode-worker --tp 2", true),
            ("baton decode-worker --tp 2 --ranks processes", true),
            ("baton up --tp 2 --ranks machines", false),
            ("baton decode-worker --kv-link ucx --kv-tls-ca a --kv-tls-cert b --kv-tls-key c", true),
            ("baton decode-worker --kv-link shm", false),
            ("baton bench transfer --tls a b c", true),
            ("baton bench transfer --tls a b", false),
            ("baton bench handoff --prompt 64 --prompt 512 --rounds 3 --json", true),
            ("baton up --device cuda:1", true),
            ("baton up --device cuda:0,1", true),
            ("baton decode-worker --device cuda:0,1", false),
            ("baton up --device gpu", false),
            ("baton doctor", true),
            ("baton doctor --gpu --measure --json", true),
            ("baton doctor --measure", false),
            ("baton up --port 70000", false),
            ("baton status --json", true),
            ("baton status --data d --coordinator a:1", false),
            ("baton bench serve --url http://a:1 --rate 3", true),
            ("baton bench serve --url http://a:1 --rate 3 --concurrency 2", false),
            ("baton bench serve", true),
            ("baton scale --prefill 0 --decode 3 --data d", true),
            ("baton scale --decode 0", false),
            ("baton scale", false),
            ("baton drain decode-1 --no-wait --coordinator a:1", true),
            ("baton drain", false),
            ("baton role decode-1 prefill --data d", true),
            ("baton role decode-1 gateway", false),
            ("baton decode-worker --coordinator a:1 --coordinator b:2 --log debug", true),
            ("baton coordinator --node 2 --data d", true),
            ("baton coordinator join --via a:1 --data d --listen 0.0.0.0:7400", true),
            ("baton coordinator join --data d", false),
            ("baton coordinator replace 2 --via a:1 --data d", true),
            ("baton coordinator replace --via a:1 --data d", false),
            ("baton coordinator leave 3 --coordinator a:1", true),
            ("baton coordinator leave 0", false),
            ("baton coordinator transfer-leader", true),
            ("baton coordinator --node 2 leave 3", false),
            ("baton tenant create a --tokens-per-minute 5 --coordinator a:1", true),
            ("baton tenant create", false),
            ("baton key create --tenant a --data d", true),
            ("baton key create", false),
            ("baton key revoke 0a --json", false),
            ("baton explain 00 --json --coordinator a:1", true),
            ("baton explain", false),
            ("baton gateway --open --listen 0.0.0.0:1", true),
            ("baton sim faults --seed 3 --profile crash --save plan.json", true),
            ("baton sim faults --seeds 3..9 --minutes 1 --json", true),
            ("baton sim faults --seeds 3..3", false),
            ("baton sim faults", false),
            ("baton sim faults --seed 3 --plan plan.json", false),
            ("baton sim meta --seed 3", true),
            ("baton sim shrink --plan plan.json", true),
            ("baton sim show --seed 3 --html page.html", true),
            ("baton sim show", false),
            ("baton", false),
        ];
        for (line, expected) in cases {
            let parsed = Arguments::try_parse_from(line.split(' '));
            assert_eq!(parsed.is_ok(), expected, "{line}: {parsed:?}");
        }
    }
}
