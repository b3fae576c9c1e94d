//! What all four role processes share: flags, readiness, metrics, signals, the end.

pub(crate) mod coordinator;
pub(crate) mod gateway;
pub(crate) mod metrics;
pub(crate) mod rank;
pub(crate) mod settings;
pub(crate) mod worker;

use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

use baton_core::{Env, Process, Role, SystemClock};
use baton_proto::TcpNet;
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::event::{Event, Voice};
use crate::exit::Failure;

/// Longest a role may take to end well before it is ended anyway.
const STOP_MAX: Duration = Duration::from_secs(3);
/// A gateway lets its streams end for a while, and then tells the ledger of those it has ended itself.
const GATEWAY_STOP_MAX: Duration = Duration::from_secs(8);

/// The end of every role's `--help`.
pub(crate) const EXIT_CODES: &str = "A flag overrides its key in the TOML file; unknown keys are refused.

Exit codes:
  0  ended as asked (Ctrl-C, SIGTERM)
  1  failed while it served
  2  refused before it served: flags, configuration, model or address
 78  a coordinator's data is damaged (path and offset are named) or differs from the leader's (index and hashes are named)";

/// Flags of every role.
#[derive(Args, Clone, Debug)]
pub(crate) struct RoleFlags {
    /// TOML file with this role's configuration; flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON lines (loading, ready, failed) on stdout for a supervisor
    #[arg(long)]
    events: bool,
    /// Fixes this process's random choices [default: from the operating system, and logged]
    #[arg(long)]
    seed: Option<u64>,
}

impl RoleFlags {
    fn voice(&self) -> Voice {
        match self.events {
            true => Voice::Events,
            false => Voice::Lines,
        }
    }

    /// The world this process lives in.
    fn env(&self) -> anyhow::Result<Env> {
        let rng = crate::seed::rng(self.seed)?;
        Ok(Env {
            net: std::sync::Arc::new(TcpNet),
            clock: std::sync::Arc::new(SystemClock),
            rng,
            process: Process::own(),
        })
    }
}

/// A role that has started, whichever it is.
pub(crate) trait Running {
    fn address(&self) -> String;
    /// Resolves when it ended by itself; Ok if somebody wanted it to, with the reason.
    async fn stopped(&mut self) -> Result<String, Failure>;
    /// Ends it well.
    async fn stop(self);
}

/// Implements `Running` for a role's own struct of that name.
macro_rules! running {
    ($($kind:ty),*) => {$(
        impl Running for $kind {
            fn address(&self) -> String {
                <$kind>::address(self)
            }

            async fn stopped(&mut self) -> Result<String, Failure> {
                match <$kind>::stopped(self).await {
                    Ok(()) => Err(anyhow::anyhow!("it ended by itself").into()),
                    Err(error) => Err(anyhow::anyhow!("{error}").into()),
                }
            }

            async fn stop(self) {
                <$kind>::stop(self).await;
            }
        }
    )*};
}
running!(baton_gateway::Running);

impl Running for baton_coordinator::Running {
    fn address(&self) -> String {
        baton_coordinator::Running::address(self)
    }

    async fn stopped(&mut self) -> Result<String, Failure> {
        use baton_coordinator::Stopped;
        let Err(stopped) = baton_coordinator::Running::stopped(self).await else {
            return Err(anyhow::anyhow!("it ended by itself").into());
        };
        let code = match &stopped {
            Stopped::Removed(_) => return Ok(stopped.to_string()),
            Stopped::Damaged(_) | Stopped::Differs(_) => crate::exit::DAMAGED,
            Stopped::Refused(_) => crate::exit::REFUSED,
            Stopped::Node(_) | Stopped::Server(_) => crate::exit::FAILED,
        };
        Err(Failure { code, error: anyhow::anyhow!("{stopped}") })
    }

    async fn stop(self) {
        baton_coordinator::Running::stop(self).await;
    }
}

/// Runs a role's process: builds the runtime, tells the supervisor why it failed.
pub(crate) fn process(
    mut runtime: tokio::runtime::Builder,
    flags: &RoleFlags,
    body: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    crate::process::raise_open_files();
    let outcome = match runtime.enable_all().build() {
        Ok(runtime) => {
            let outcome = runtime.block_on(body);
            runtime.shutdown_timeout(STOP_MAX);
            outcome
        }
        Err(error) => Err(error.into()),
    };
    if let Err(failure) = &outcome {
        flags.voice().say(&Event::Failed { message: failure.to_string(), code: failure.code });
    }
    outcome
}

/// The signals that ask a process to end.
pub(crate) struct Asked {
    interrupt: Signal,
    terminate: Signal,
}

impl Asked {
    pub(crate) fn new() -> std::io::Result<Asked> {
        Ok(Asked { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Resolves when one has come.
    pub(crate) async fn come(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Says that the role serves, and waits for its end.
pub(crate) async fn serve(
    mut running: impl Running,
    role: Role,
    id: String,
    metrics: Option<String>,
    voice: Voice,
) -> Result<(), Failure> {
    let mut asked = Asked::new()?;
    let address = running.address();
    tracing::info!(%role, id, address, "ready");
    voice.say(&Event::Ready { role, id: id.clone(), address, metrics, ranks: Vec::new() });
    tokio::select! {
        ended = running.stopped() => return match ended {
            Ok(why) => {
                tracing::info!(id, why, "ended");
                eprintln!("baton: {id}: {why}");
                Ok(())
            }
            Err(Failure { code, error }) => Err(Failure { code, error: error.context(format!("{id} failed")) }),
        },
        () = asked.come() => {}
    }
    tracing::info!(%role, id, "ending");
    let most = if role == Role::Gateway { GATEWAY_STOP_MAX } else { STOP_MAX };
    if tokio::time::timeout(most, running.stop()).await.is_err() {
        tracing::warn!(id, "did not end within {} s and is ended", most.as_secs());
    }
    Ok(())
}

/// A role that could not start, as a refusal that names an address in use as such.
pub(crate) fn not_started(what: &str, error: impl Display) -> Failure {
    Failure::refuse(format!("{what} did not start: {error}"))
}
