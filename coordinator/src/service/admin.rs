//! What operators ask: tenants and keys, orders to workers, membership, and why a request went where it went.

use baton_core::{Refused, WorkerId};
use baton_proto::convert::{refusal, request_id};
use baton_proto::v1;
use tonic::{Request, Response, Status};

use super::{Refusal, Service, Shared, access, ask, settings, unexpected};
use crate::state::{Command, Outcome};

type Answer<T> = Result<Response<T>, Status>;

impl Shared {
    /// Commits a command of an operator. `unknown`: what to say when what it names is not there.
    async fn administer(&self, command: Command, unknown: String) -> Result<(), Refusal> {
        self.leading().await?;
        match self.submit(command).await? {
            Outcome::Done => Ok(()),
            Outcome::Refused(Refused::Unknown) => Err(refusal(Refused::Unknown, unknown)),
            Outcome::Refused(Refused::Stale) => Err(refusal(Refused::Stale, "another key has this id: draw a new one")),
            Outcome::Refused(reason) => Err(refusal(reason, "the ledger takes no more of these: remove some first")),
            other => Err(unexpected(&other)),
        }
    }

    async fn list_tenants(&self) -> Result<v1::TenantList, Refusal> {
        self.leading().await?;
        let ledger = self.node.ledger();
        let usage = |(name, account): (&String, &crate::state::Account)| v1::TenantUsage {
            tenant: Some(access::tenant(name, account)),
            requests_open: account.requests_open,
            requests_total: account.used.requests,
            prompt_tokens_total: account.used.prompt_tokens,
            generated_tokens_total: account.used.generated_tokens,
        };
        Ok(v1::TenantList {
            tenants: ledger.tenants().map(usage).collect(),
            keys: access::keys(&ledger),
            refused: None,
        })
    }
}

impl Shared {
    async fn list_settings(&self) -> Result<v1::SettingsList, Refusal> {
        self.leading().await?;
        let ledger = self.node.ledger();
        let setting =
            |(name, value): (&String, &String)| v1::Setting { name: name.clone(), value: Some(value.clone()) };
        let set = ledger.settings().iter().map(setting).collect();
        let in_force = settings::told(&self.policies.of(&ledger).fresh);
        Ok(v1::SettingsList { set, in_force, refused: None })
    }
}

/// Counts what an operator is refused.
fn not_done(command: &'static str, refused: Refusal) -> Refusal {
    let reason = baton_proto::convert::refused(&refused).as_str();
    metrics::counter!("baton_coordinator_commands_refused_total", "command" => command, "reason" => reason)
        .increment(1);
    refused
}

/// What is no command at all.
fn malformed(command: &'static str, status: Status) -> Status {
    metrics::counter!("baton_coordinator_commands_refused_total", "command" => command, "reason" => "malformed")
        .increment(1);
    status
}

fn done(command: &'static str, result: Result<(), Refusal>) -> Answer<v1::Done> {
    use v1::done::Outcome;
    let outcome = match result {
        Ok(()) => Outcome::Done(v1::Nothing {}),
        Err(refused) => Outcome::Refused(not_done(command, refused)),
    };
    Ok(Response::new(v1::Done { outcome: Some(outcome) }))
}

#[tonic::async_trait]
impl v1::admin_server::Admin for Service {
    async fn set_tenant(&self, request: Request<v1::Tenant>) -> Answer<v1::Done> {
        const NAME: &str = "set_tenant";
        let (name, limits) = ask::tenant(request.into_inner()).map_err(|bad| malformed(NAME, bad.into()))?;
        tracing::info!(tenant = name, ?limits, "limits set");
        done(NAME, self.0.administer(Command::SetTenant { name, limits }, String::new()).await)
    }

    async fn remove_tenant(&self, request: Request<v1::TenantName>) -> Answer<v1::Done> {
        const NAME: &str = "remove_tenant";
        let name = ask::plain("name", request.into_inner().name).map_err(|bad| malformed(NAME, bad.into()))?;
        let unknown = format!("there is no tenant {name:?}");
        done(NAME, self.0.administer(Command::RemoveTenant { name }, unknown).await)
    }

    async fn list_tenants(&self, _: Request<v1::ListTenantsRequest>) -> Answer<v1::TenantList> {
        let list = self.0.list_tenants().await;
        Ok(Response::new(
            list.unwrap_or_else(|refused| v1::TenantList { refused: Some(refused), ..Default::default() }),
        ))
    }

    async fn create_key(&self, request: Request<v1::AccessKey>) -> Answer<v1::Done> {
        const NAME: &str = "create_key";
        let (id, key) = ask::key(request.into_inner()).map_err(|bad| malformed(NAME, bad.into()))?;
        let unknown = format!("there is no tenant {:?}: create it first", key.tenant);
        tracing::info!(key = id, tenant = key.tenant, "key created");
        done(NAME, self.0.administer(Command::CreateKey { id, key }, unknown).await)
    }

    async fn revoke_key(&self, request: Request<v1::KeyId>) -> Answer<v1::Done> {
        const NAME: &str = "revoke_key";
        let id = ask::plain("id", request.into_inner().id).map_err(|bad| malformed(NAME, bad.into()))?;
        let unknown = format!("there is no key {id:?}; it may be revoked already");
        tracing::info!(key = id, "key revoked");
        done(NAME, self.0.administer(Command::RevokeKey { id }, unknown).await)
    }

    async fn add_node(&self, request: Request<v1::AddNodeRequest>) -> Answer<v1::AddNodeReply> {
        use v1::add_node_reply::Outcome;
        let outcome = match self.0.add_node(request.into_inner()).await {
            Ok(added) => Outcome::Added(added),
            Err(refused) => Outcome::Refused(not_done("add_node", refused)),
        };
        Ok(Response::new(v1::AddNodeReply { outcome: Some(outcome) }))
    }

    async fn remove_node(&self, request: Request<v1::NodeNumber>) -> Answer<v1::Done> {
        done("remove_node", self.0.remove_node(request.into_inner().node).await)
    }

    async fn transfer_leader(&self, request: Request<v1::NodeNumber>) -> Answer<v1::Done> {
        done("transfer_leader", self.0.transfer_leader(request.into_inner().node).await)
    }

    async fn order_worker(&self, request: Request<v1::OrderRequest>) -> Answer<v1::Done> {
        let request = request.into_inner();
        const NAME: &str = "order_worker";
        let order = v1::Order::try_from(request.order);
        let order = order.map_err(|_| malformed(NAME, Status::invalid_argument("order is unknown")))?;
        let unknown = format!("no live worker is called {:?}", request.worker);
        tracing::info!(worker = request.worker, ?order, "ordered");
        let command = Command::Order { worker: WorkerId(request.worker.into()), order: ask::order(order) };
        done(NAME, self.0.administer(command, unknown).await)
    }

    async fn change_setting(&self, request: Request<v1::Setting>) -> Answer<v1::Done> {
        let v1::Setting { name, value } = request.into_inner();
        const NAME: &str = "change_setting";
        let name = ask::plain("name", name).map_err(|bad| malformed(NAME, bad.into()))?;
        let changed = self.0.node.ledger().settings().clone().with(&name, value.as_deref());
        settings::policy(&changed, self.0.policies.own())
            .map_err(|problem| malformed(NAME, Status::invalid_argument(format!("{name}: {problem}"))))?;
        let unknown = format!("{name} is not set");
        tracing::info!(name, value, "set");
        done(NAME, self.0.administer(Command::Set { name, value }, unknown).await)
    }

    async fn list_settings(&self, _: Request<v1::ListSettingsRequest>) -> Answer<v1::SettingsList> {
        let list = self.0.list_settings().await;
        Ok(Response::new(
            list.unwrap_or_else(|refused| v1::SettingsList { refused: Some(refused), ..Default::default() }),
        ))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Answer<v1::ExplainReply> {
        let request = request_id(&request.into_inner().request)?;
        let explained = self.0.explain(request).await;
        Ok(Response::new(
            explained.unwrap_or_else(|refused| v1::ExplainReply { refused: Some(refused), ..Default::default() }),
        ))
    }
}
