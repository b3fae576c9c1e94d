//! `baton gateway`: the OpenAI-compatible API.

use baton_core::Role;
use baton_gateway::Config;
use clap::Args;

use super::settings::{Settings, texts};
use super::{EXIT_CODES, RoleFlags, metrics, not_started};
use crate::exit::Failure;

/// Run one gateway.
///
/// It serves the OpenAI-compatible API, /health, /live and /metrics on one port, and finds models and workers through the
/// coordinators.
///
/// A gateway that others than this machine can reach asks for API keys (see `baton key`); while the cluster has none it
/// refuses to start there, unless --open is given.
///
/// Keys of the TOML file, as the flags of these names: id, listen, coordinators (a list), open. Besides: requests_max (requests
/// worked on at a time before more are refused with 429, 4096), deadline_ms (milliseconds a request may take, 600000), and
/// the table [aliases] of further names under which models answer.
#[derive(Args, Debug)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct GatewayFlags {
    #[command(flatten)]
    role: RoleFlags,
    /// Name, unique in the cluster [default: gateway-0]
    #[arg(long)]
    id: Option<String>,
    /// HTTP address; port 0 takes a free one [default: 127.0.0.1:8000]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// A coordinator's address; name each of them [default: 127.0.0.1:7400]
    #[arg(long = "coordinator", value_name = "HOST:PORT")]
    coordinators: Vec<String>,
    /// Serve other machines although the cluster has no keys: whoever reaches the address may ask
    #[arg(long)]
    open: bool,
}

pub(crate) fn run(flags: GatewayFlags) -> Result<(), Failure> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2);
    let common = flags.role.clone();
    super::process(runtime, &common, serve(flags))
}

async fn serve(flags: GatewayFlags) -> Result<(), Failure> {
    let voice = flags.role.voice();
    let env = flags.role.env()?;
    let mut settings = Settings::read(flags.role.config.as_deref())?;
    settings.flag("id", flags.id);
    settings.flag("listen", flags.listen);
    settings.flag("coordinators", texts(&flags.coordinators));
    settings.flag("open", flags.open.then_some(true));
    settings.fallback("id", "gateway-0");
    settings.fallback("listen", "127.0.0.1:8000");
    settings.fallback("coordinators", vec![super::coordinator::LISTEN]);
    let config: Config = settings.finish()?;

    let handle = metrics::install()?;
    let id = config.id.clone();
    let render = std::sync::Arc::new(move || handle.render());
    let running = baton_gateway::start(config, env, render).await.map_err(|error| not_started(&id, error))?;
    super::serve(running, Role::Gateway, id, None, voice).await
}
