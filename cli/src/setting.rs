//! `baton setting`: what the whole cluster is set to. The ledger keeps it, so that every leader places by the same knobs.

use std::collections::BTreeMap;

use baton_proto::v1::{ListSettingsRequest, Setting, SettingsList};
use clap::{Args, Subcommand};
use serde_json::json;

use crate::admin::{self, ClusterFlags, EXIT_CODES, ask};
use crate::exit::Failure;
use crate::out::{say, sayln};

/// `baton setting …`
#[derive(Debug, Subcommand)]
pub(crate) enum SettingCommand {
    /// Show every knob of placement as it is in force, and which of them are set for the cluster
    #[command(after_help = EXIT_CODES)]
    List(ListFlags),
    /// Set one knob for the whole cluster, from the next request on
    ///
    /// It stands in place of what the coordinators' own files say under [policy], and every later leader goes by it.
    #[command(after_help = EXIT_CODES)]
    Set(SetFlags),
    /// Let a knob be what the coordinators' own files say again
    #[command(after_help = EXIT_CODES)]
    Unset(UnsetFlags),
}

#[derive(Args, Debug)]
pub(crate) struct ListFlags {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterFlags,
}

#[derive(Args, Debug)]
pub(crate) struct SetFlags {
    /// A key of the table [policy], as `baton setting list` shows it
    name: String,
    /// Its value, as in TOML: 128, or '{ ttft_ms = 500, itl_ms = 40 }'
    value: String,
    #[command(flatten)]
    cluster: ClusterFlags,
}

#[derive(Args, Debug)]
pub(crate) struct UnsetFlags {
    /// A key of the table [policy] that is set
    name: String,
    #[command(flatten)]
    cluster: ClusterFlags,
}

pub(crate) fn run(command: SettingCommand) -> Result<(), Failure> {
    match command {
        SettingCommand::List(flags) => admin::run(list(flags)),
        SettingCommand::Set(flags) => admin::run(change(flags.name, Some(flags.value), flags.cluster)),
        SettingCommand::Unset(flags) => admin::run(change(flags.name, None, flags.cluster)),
    }
}

async fn change(name: String, value: Option<String>, cluster: ClusterFlags) -> Result<(), Failure> {
    let setting = Setting { name, value };
    let call = |mut client: admin::Client| {
        let setting = setting.clone();
        async move { client.change_setting(setting).await }
    };
    ask(&cluster.coordinators()?, call).await
}

async fn list(flags: ListFlags) -> Result<(), Failure> {
    let call = |mut client: admin::Client| async move { client.list_settings(ListSettingsRequest {}).await };
    let list: SettingsList = ask(&flags.cluster.coordinators()?, call).await?;
    let set: BTreeMap<String, String> =
        list.set.into_iter().map(|setting| (setting.name, setting.value.unwrap_or_default())).collect();
    if flags.json {
        let in_force: toml::Table = toml::from_str(&list.in_force).map_err(|error| anyhow::anyhow!(error))?;
        sayln!("{}", json!({"set": set, "in_force": in_force}));
        return Ok(());
    }
    say!("{}", list.in_force);
    sayln!();
    match set.is_empty() {
        true => sayln!("# set for the cluster: nothing; all of it is of the leader's own file, or the default"),
        false => sayln!("# set for the cluster: {}", set.into_keys().collect::<Vec<_>>().join(", ")),
    }
    Ok(())
}
