//! Logs: to stderr, filtered by `--log` or `BATON_LOG`, as text or JSON lines. Never prompt text.

use std::io::IsTerminal;

use anyhow::Context;
use clap::Args;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// For commands a person runs.
pub(crate) const QUIET: &str = "warn";
/// For the processes of a cluster: one line per request, with numbers only.
pub(crate) const ROLE: &str = "warn,baton=info";

/// Flags every command understands.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct LogFlags {
    /// What to log: error, warn, info, debug, trace, or per crate (warn,baton_gateway=debug) [default: BATON_LOG, else warn; info for the processes of a cluster]
    #[arg(long, global = true, value_name = "FILTER", help_heading = "Logging")]
    pub(crate) log: Option<String>,
    /// Log JSON lines instead of text
    #[arg(long, global = true, help_heading = "Logging")]
    pub(crate) log_json: bool,
}

impl LogFlags {
    fn filter(&self, default: &str) -> String {
        let asked = self.log.clone().or_else(|| crate::surroundings::variable("BATON_LOG"));
        asked.unwrap_or_else(|| default.to_string())
    }

    /// The flags that give a child process the same logs.
    pub(crate) fn to_arguments(&self) -> Vec<String> {
        let filter = self.log.iter().flat_map(|filter| ["--log".to_string(), filter.clone()]);
        filter.chain(self.log_json.then(|| "--log-json".to_string())).collect()
    }

    /// Starts logging for this process.
    pub(crate) fn install(&self, default: &str) -> anyhow::Result<()> {
        let filter = self.filter(default);
        let filter = EnvFilter::try_new(&filter).with_context(|| format!("log filter {filter:?}"))?;
        // Spans write one line, with their duration, when they end.
        let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        let lines = lines.with_span_events(FmtSpan::CLOSE);
        match self.log_json {
            true => lines.json().init(),
            false => lines.with_ansi(std::io::stderr().is_terminal()).init(),
        }
        Ok(())
    }
}
