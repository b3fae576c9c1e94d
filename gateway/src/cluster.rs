//! The cluster as this gateway sees it: one coordinator's view, and the models whose cards it has fetched from workers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_core::{Env, Net, Process, limits};
use baton_proto::v1::worker_client::WorkerClient;
use baton_proto::v1::{CardRequest, ClusterView, Member, ModelCard, Role, WatchRequest};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::coordinators::{Client, Coordinators, deadline};
use crate::error::ApiError;
use crate::link::Links;
use crate::model::Model;

const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
const CARD_RETRY_PAUSE: Duration = Duration::from_millis(200);
/// So long may all coordinators be silent before the gateway calls itself unhealthy: an election is shorter.
const SILENCE_MAX: Duration = Duration::from_millis(2_000);
/// Models kept beyond those in view.
const MODELS_MAX: usize = 64;

/// What is known of the cluster.
pub(crate) struct Cluster {
    net: Arc<dyn Net>,
    process: Process,
    /// Streams to workers end when the view shows that their lives have.
    links: Arc<Links>,
    aliases: BTreeMap<String, String>,
    /// Whether a coordinator has shown its view, and the cards of all models in it have been fetched.
    settled: watch::Sender<bool>,
    state: Mutex<State>,
}

struct State {
    view: ClusterView,
    /// Since when no coordinator shows us its view.
    silent_since: Option<Instant>,
    models: BTreeMap<String, Arc<Model>>,
    fetching: BTreeSet<String>,
}

impl Cluster {
    pub(crate) fn new(env: &Env, links: Arc<Links>, aliases: BTreeMap<String, String>) -> Cluster {
        let silent_since = Some(Instant::now());
        let (view, models, fetching) = Default::default();
        let state = Mutex::new(State { view, silent_since, models, fetching });
        Cluster {
            net: env.net.clone(),
            process: env.process,
            links,
            aliases,
            settled: watch::Sender::new(false),
            state,
        }
    }

    /// The model a client names; with one model served the name may be left out.
    pub(crate) fn model(&self, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
        let state = self.lock();
        let served = state.served();
        let Some(name) = name else {
            return match served.as_slice() {
                [only] => Ok(only.clone()),
                [] => Err(nobody()),
                _ => Err(ApiError::invalid("model", "you must provide a model parameter")),
            };
        };
        let name = self.aliases.get(name).map_or(name, |alias| alias.as_str());
        let known = || state.models.values().find(|m| m.name == name).cloned();
        if let Some(model) = served.iter().find(|m| m.name == name).cloned().or_else(known) {
            return Ok(model);
        }
        // Those that are lost count, too: what they served exists, and somebody will serve it again. Gateways are members as
        // well: without any worker nobody knows which models there are.
        let mut models = state.view.members.iter().filter_map(|view| view.member.as_ref()?.model.as_ref()).peekable();
        let workers = models.peek().is_some();
        if !workers || models.any(|model| model.name == name) {
            return Err(nobody());
        }
        Err(ApiError::model_not_found(name))
    }

    /// Resolves once the cluster and its models are known.
    pub(crate) async fn settled(&self) {
        // The sender lives as long as `self`.
        let _ = self.settled.subscribe().wait_for(|settled| *settled).await;
    }

    /// The model with this card.
    pub(crate) fn model_of(&self, card: &str) -> Result<Arc<Model>, ApiError> {
        self.lock().models.get(card).cloned().ok_or_else(nobody)
    }

    /// Models that a live worker serves, by name; the one with a decode worker first among equal names.
    pub(crate) fn served(&self) -> Vec<Arc<Model>> {
        self.lock().served()
    }

    /// Names that stand for models, with the models they stand for.
    pub(crate) fn aliases(&self) -> &BTreeMap<String, String> {
        &self.aliases
    }

    /// Ok with a summary when a request sent now could be served; otherwise why not. `access`: it is known who may ask.
    pub(crate) fn health(&self, access: bool) -> Result<Value, Value> {
        let state = self.lock();
        let decode = state.live_of(Role::Decode);
        let summary = |status: &str| {
            json!({
                "status": status,
                "models": state.served().iter().map(|m| m.name.clone()).collect::<Vec<_>>(),
                "decode_workers": decode.len(),
                "prefill_workers": state.live_of(Role::Prefill).len(),
                "coordinator": state.view.node,
                "leader": state.view.leader,
            })
        };
        if state.silent_since.is_some_and(|since| since.elapsed() > SILENCE_MAX || state.view.cluster.is_empty()) {
            return Err(summary("no coordinator answers"));
        }
        if !access {
            return Err(summary("no coordinator has said who may ask"));
        }
        if decode.is_empty() {
            return Err(summary("no live decode worker"));
        }
        if state.view.broken {
            return Err(summary("no decode worker passes its canary"));
        }
        if !decode.iter().any(|hash| state.models.contains_key(*hash)) {
            return Err(summary("the model's card is not loaded yet"));
        }
        Ok(summary("ok"))
    }

    /// Follows a coordinator's view and fetches the cards of models it shows, for ever.
    pub(crate) async fn watch(&self, coordinators: &Coordinators) {
        let mut cards = JoinSet::new();
        loop {
            for address in coordinators.addresses() {
                if let Some(client) = coordinators.client(&address) {
                    let problem = self.follow(client, &mut cards, coordinators).await;
                    tracing::debug!(coordinator = %address, problem, "cluster view lost");
                }
                self.lock().silent_since.get_or_insert_with(Instant::now);
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
        }
    }

    async fn follow(&self, mut client: Client, cards: &mut JoinSet<Fetched>, coordinators: &Coordinators) -> String {
        let mut views =
            match deadline(client.watch(WatchRequest { cluster: coordinators.cluster(), ..WatchRequest::default() }))
                .await
            {
                Ok(views) => views,
                Err(status) => return status.message().to_string(),
            };
        loop {
            tokio::select! {
                view = views.message() => match view {
                    Ok(Some(view)) => {
                        coordinators.belong(&view.cluster);
                        coordinators.show_leader(leader(&view));
                        self.links.fence(&view);
                        self.see(view);
                    }
                    Ok(None) => return "the coordinator ended it".to_string(),
                    Err(status) => return status.message().to_string(),
                },
                Some(fetched) = cards.join_next() => self.take_card(fetched.unwrap_or_default()),
            }
            self.fetch_cards(cards);
        }
    }

    fn see(&self, view: ClusterView) {
        let mut state = self.lock();
        state.view = view;
        state.silent_since = None;
    }

    fn fetch_cards(&self, cards: &mut JoinSet<Fetched>) {
        let mut state = self.lock();
        for (hash, addresses) in state.missing() {
            state.fetching.insert(hash.clone());
            cards.spawn(fetch(self.net.clone(), self.process, hash, addresses));
        }
        if state.silent_since.is_none() && state.fetching.is_empty() {
            self.settled.send_if_modified(|settled| !std::mem::replace(settled, true));
        }
    }

    fn take_card(&self, (hash, model): Fetched) {
        let mut state = self.lock();
        state.fetching.remove(&hash);
        let Some(model) = model else { return };
        tracing::info!(model = %model.name, hash = %model.hash, numerics = %model.numerics, "model known");
        state.models.insert(hash, model);
        state.forget_old();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn live(&self) -> impl Iterator<Item = &Member> {
        self.view.members.iter().filter(|m| m.live).filter_map(|m| m.member.as_ref())
    }

    /// Card hashes of the live workers of a role, one per worker.
    fn live_of(&self, role: Role) -> Vec<&str> {
        let of_role = self.live().filter(|m| m.role() == role);
        of_role.filter_map(|m| m.model.as_ref()).map(|model| model.card_hash.as_str()).collect()
    }

    fn served(&self) -> Vec<Arc<Model>> {
        let decode: BTreeSet<&str> = self.live_of(Role::Decode).into_iter().collect();
        let mut hashes: Vec<&str> = decode.iter().copied().collect();
        hashes.extend(self.live_of(Role::Prefill).into_iter().filter(|hash| !decode.contains(hash)));
        let mut models: Vec<Arc<Model>> = hashes.into_iter().filter_map(|h| self.models.get(h).cloned()).collect();
        models.sort_by(|a, b| a.name.cmp(&b.name));
        models.dedup_by(|a, b| a.name == b.name);
        models
    }

    /// Hashes in view without a card, with the workers that can give it.
    fn missing(&self) -> BTreeMap<String, Vec<String>> {
        let mut missing = BTreeMap::<String, Vec<String>>::new();
        for member in self.live() {
            let Some(hash) = member.model.as_ref().map(|m| &m.card_hash) else { continue };
            if !self.models.contains_key(hash) && !self.fetching.contains(hash) {
                missing.entry(hash.clone()).or_default().push(member.address.clone());
            }
        }
        missing
    }

    fn forget_old(&mut self) {
        if self.models.len() <= MODELS_MAX {
            return;
        }
        let seen: BTreeSet<String> =
            self.live().filter_map(|m| m.model.as_ref()).map(|m| m.card_hash.clone()).collect();
        self.models.retain(|hash, _| seen.contains(hash));
    }
}

/// Where the coordinator that leads is.
fn leader(view: &ClusterView) -> Option<&str> {
    let leader = view.coordinators.iter().find(|node| node.id == view.leader)?;
    Some(leader.address.as_str()).filter(|address| !address.is_empty())
}

fn nobody() -> ApiError {
    ApiError::unavailable("no_workers", "No live worker serves a model yet.")
}

/// A card's hash and what became of it.
type Fetched = (String, Option<Arc<Model>>);

async fn fetch(net: Arc<dyn Net>, process: Process, hash: String, addresses: Vec<String>) -> Fetched {
    for address in addresses {
        match fetch_from(&net, process, &address).await {
            Ok(model) => return (hash, Some(Arc::new(model))),
            Err(problem) => tracing::warn!(worker = %address, problem, "no model card"),
        }
    }
    tokio::time::sleep(CARD_RETRY_PAUSE).await;
    (hash, None)
}

async fn fetch_from(net: &Arc<dyn Net>, process: Process, address: &str) -> Result<Model, String> {
    let channel = baton_proto::channel(net.clone(), address).map_err(|e| e.to_string())?;
    let mut client = WorkerClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES_MAX);
    let card: ModelCard = deadline(client.card(CardRequest {})).await.map_err(|s| s.message().to_string())?;
    if !process.threads {
        return Model::from_card(card).map_err(|e| e.to_string());
    }
    let parsed = tokio::task::spawn_blocking(move || Model::from_card(card)).await;
    parsed.map_err(|_| "the card's tokenizer cannot be read".to_string())?.map_err(|e| e.to_string())
}
