//! `baton tenant` and `baton key`: who may ask for how much. A key's secret is drawn here, shown once and never sent:
//! the ledger gets its hash.

use baton_core::{Clock, SystemClock};
use baton_proto::v1::{AccessKey, KeyId, ListTenantsRequest, Tenant, TenantList, TenantName, TenantUsage};
use clap::{Args, Subcommand};
use serde_json::json;

use crate::admin::{self, ClusterFlags, EXIT_CODES, ask};
use crate::exit::Failure;
use crate::out::{say, sayln};
use crate::table;

/// `baton tenant …`
#[derive(Debug, Subcommand)]
pub(crate) enum TenantCommand {
    /// Create a tenant, or replace its limits
    #[command(after_help = EXIT_CODES)]
    Create(TenantFlags),
    /// Show every tenant: limits and what it has used
    #[command(after_help = EXIT_CODES)]
    List(ListFlags),
    /// Remove a tenant and revoke its keys
    #[command(after_help = EXIT_CODES)]
    Remove(NameFlags),
}

/// `baton key …`
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Create an API key and print it, once
    ///
    /// With the first key the cluster stops being open: from then on every request needs a key, also after the last key
    /// has been revoked.
    #[command(after_help = EXIT_CODES)]
    Create(KeyFlags),
    /// Show every key in force by its id
    #[command(after_help = EXIT_CODES)]
    List(ListFlags),
    /// Revoke a key; gateways refuse it within a second
    #[command(after_help = EXIT_CODES)]
    Revoke(RevokeFlags),
}

/// A tenant's limits. What is left out has no limit.
#[derive(Args, Debug)]
pub(crate) struct TenantFlags {
    /// Name: letters, digits, '-', '_' and '.'
    name: String,
    /// Requests a minute, on average
    #[arg(long, value_name = "N", default_value_t = 0)]
    requests_per_minute: u64,
    /// Prompt and generated tokens a minute, on average
    #[arg(long, value_name = "N", default_value_t = 0)]
    tokens_per_minute: u64,
    /// Requests at a time
    #[arg(long, value_name = "N", default_value_t = 0)]
    requests_open_max: u64,
    /// Tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 0)]
    prompt_tokens_max: u64,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 0)]
    output_tokens_max: u64,
    #[command(flatten)]
    cluster: ClusterFlags,
}

#[derive(Args, Debug)]
pub(crate) struct NameFlags {
    /// The tenant's name
    name: String,
    #[command(flatten)]
    cluster: ClusterFlags,
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
pub(crate) struct KeyFlags {
    /// Whose requests the key's are
    #[arg(long, value_name = "NAME")]
    tenant: String,
    #[command(flatten)]
    cluster: ClusterFlags,
}

#[derive(Args, Debug)]
pub(crate) struct RevokeFlags {
    /// The key's id: what stands between the first two dashes behind `bk`, and in `baton key list`
    id: String,
    #[command(flatten)]
    cluster: ClusterFlags,
}

pub(crate) fn run_tenant(command: TenantCommand) -> Result<(), Failure> {
    match command {
        TenantCommand::Create(flags) => admin::run(create_tenant(flags)),
        TenantCommand::List(flags) => admin::run(list(flags, tenants_json, tenants_text)),
        TenantCommand::Remove(flags) => admin::run(remove_tenant(flags)),
    }
}

pub(crate) fn run_key(command: KeyCommand) -> Result<(), Failure> {
    match command {
        KeyCommand::Create(flags) => admin::run(create_key(flags)),
        KeyCommand::List(flags) => admin::run(list(flags, keys_json, keys_text)),
        KeyCommand::Revoke(flags) => admin::run(revoke_key(flags)),
    }
}

async fn create_tenant(flags: TenantFlags) -> Result<(), Failure> {
    let tenant = Tenant {
        name: flags.name,
        requests_per_minute: flags.requests_per_minute,
        tokens_per_minute: flags.tokens_per_minute,
        requests_open_max: flags.requests_open_max,
        prompt_tokens_max: flags.prompt_tokens_max,
        output_tokens_max: flags.output_tokens_max,
    };
    let call = |mut client: admin::Client| {
        let tenant = tenant.clone();
        async move { client.set_tenant(tenant).await }
    };
    ask(&flags.cluster.coordinators()?, call).await
}

async fn remove_tenant(flags: NameFlags) -> Result<(), Failure> {
    let call = |mut client: admin::Client| {
        let name = flags.name.clone();
        async move { client.remove_tenant(TenantName { name }).await }
    };
    ask(&flags.cluster.coordinators()?, call).await
}

async fn create_key(flags: KeyFlags) -> Result<(), Failure> {
    let drawn = crate::seed::secret()?;
    let (id, secret) = drawn.split_at(ID_BYTES);
    let id = hex(id);
    let text = format!("bk-{id}-{}", hex(secret));
    let key = AccessKey {
        id,
        secret_hash: blake3::hash(text.as_bytes()).as_bytes().to_vec().into(),
        tenant: flags.tenant,
        created_unix_s: SystemClock.unix_ms() / 1000,
    };
    let call = |mut client: admin::Client| {
        let key = key.clone();
        async move { client.create_key(key).await }
    };
    ask(&flags.cluster.coordinators()?, call).await?;
    sayln!("{text}");
    eprintln!("This is the only time the key is shown. Revoke it with `baton key revoke {}`.", key.id);
    Ok(())
}

async fn revoke_key(flags: RevokeFlags) -> Result<(), Failure> {
    let call = |mut client: admin::Client| {
        let id = flags.id.clone();
        async move { client.revoke_key(KeyId { id }).await }
    };
    ask(&flags.cluster.coordinators()?, call).await
}

async fn list(
    flags: ListFlags,
    as_json: fn(&TenantList) -> serde_json::Value,
    as_text: fn(&TenantList) -> String,
) -> Result<(), Failure> {
    let list = tenants(&flags.cluster).await?;
    match flags.json {
        true => sayln!("{}", as_json(&list)),
        false => say!("{}", as_text(&list)),
    }
    Ok(())
}

async fn tenants(cluster: &ClusterFlags) -> Result<TenantList, Failure> {
    let call = |mut client: admin::Client| async move { client.list_tenants(ListTenantsRequest {}).await };
    ask(&cluster.coordinators()?, call).await
}

/// Of the drawn bytes, those that name the key; the others are its secret.
const ID_BYTES: usize = 4;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn tenants_json(list: &TenantList) -> serde_json::Value {
    let tenant = |usage: &TenantUsage| {
        let tenant = usage.tenant.clone().unwrap_or_default();
        json!({
            "name": tenant.name,
            "requests_per_minute": tenant.requests_per_minute,
            "tokens_per_minute": tenant.tokens_per_minute,
            "requests_open_max": tenant.requests_open_max,
            "prompt_tokens_max": tenant.prompt_tokens_max,
            "output_tokens_max": tenant.output_tokens_max,
            "requests_open": usage.requests_open,
            "requests_total": usage.requests_total,
            "prompt_tokens_total": usage.prompt_tokens_total,
            "generated_tokens_total": usage.generated_tokens_total,
        })
    };
    json!({"tenants": list.tenants.iter().map(tenant).collect::<Vec<_>>()})
}

fn tenants_text(list: &TenantList) -> String {
    let limit = |limit: u64| if limit == 0 { "-".to_string() } else { limit.to_string() };
    let row = |usage: &TenantUsage| {
        let tenant = usage.tenant.clone().unwrap_or_default();
        let limits = [
            tenant.requests_per_minute,
            tenant.tokens_per_minute,
            tenant.requests_open_max,
            tenant.prompt_tokens_max,
            tenant.output_tokens_max,
        ];
        let used = [usage.requests_open, usage.requests_total, usage.prompt_tokens_total, usage.generated_tokens_total];
        let mut cells = vec![tenant.name];
        cells.extend(limits.map(limit));
        cells.extend(used.map(|count| count.to_string()));
        cells
    };
    let head = [
        "TENANT",
        "REQUESTS/MIN",
        "TOKENS/MIN",
        "OPEN MAX",
        "PROMPT MAX",
        "OUTPUT MAX",
        "OPEN",
        "REQUESTS",
        "PROMPT TOKENS",
        "GENERATED",
    ];
    table::render(&head, &list.tenants.iter().map(row).collect::<Vec<_>>())
}

fn keys_json(list: &TenantList) -> serde_json::Value {
    let key = |key: &AccessKey| json!({"id": key.id, "tenant": key.tenant, "created_unix_s": key.created_unix_s});
    json!({"keys": list.keys.iter().map(key).collect::<Vec<_>>()})
}

fn keys_text(list: &TenantList) -> String {
    let row = |key: &AccessKey| vec![key.id.clone(), key.tenant.clone(), key.created_unix_s.to_string()];
    table::render(&["KEY", "TENANT", "CREATED (UNIX S)"], &list.keys.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_show_limits_and_never_a_hash() {
        let tenant = Tenant { name: "a".into(), tokens_per_minute: 9, ..Tenant::default() };
        let usage = TenantUsage { tenant: Some(tenant), requests_total: 3, ..TenantUsage::default() };
        let key = AccessKey { id: "0a".into(), secret_hash: vec![7; 32].into(), tenant: "a".into(), created_unix_s: 5 };
        let list = TenantList { tenants: vec![usage], keys: vec![key], refused: None };
        let text = tenants_text(&list);
        let cells: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(cells, ["a", "-", "9", "-", "-", "-", "0", "3", "0", "0"]);
        assert_eq!(keys_text(&list).lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>(), ["0a", "a", "5"]);
        assert_eq!(keys_json(&list), json!({"keys": [{"id": "0a", "tenant": "a", "created_unix_s": 5}]}));
        assert_eq!(tenants_json(&list)["tenants"][0]["tokens_per_minute"], 9);
    }

    #[test]
    fn keys_are_long_and_differ() {
        let (one, two) = (crate::seed::secret().unwrap(), crate::seed::secret().unwrap());
        assert_ne!(one, two);
        assert_eq!(hex(&one).len(), 2 * (ID_BYTES + 32));
    }
}
