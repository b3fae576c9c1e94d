//! The straight line of a call: checked JSON → tokens → requests → answers → reply.

use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use baton_core::planted::{self, Bug};
use baton_core::{BlockHash, Clock, Lane, Request, RequestId, Rng, Sampling};
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt, select_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::access::{Access, Caller};
use crate::answer::{Answer, Part};
use crate::cluster::Cluster;
use crate::config::Config;
use crate::error::ApiError;
use crate::measure::Phases;
use crate::note::Look;
use crate::openai::{Ask, Envelope, Params, Prompt, Reply, Shape, stream_error};
use crate::prompt::Encoder;
use crate::resume::{EventId, adopt, take_over};
use crate::serve::{Servers, Serving, Terms};
use crate::text::TextOptions;

/// A gateway at work; shared by all calls.
pub(crate) struct Gateway {
    pub config: Config,
    pub cluster: Arc<Cluster>,
    pub access: Arc<Access>,
    pub servers: Arc<Servers>,
    pub encoder: Encoder,
    pub clock: Arc<dyn Clock>,
    pub rng: Mutex<Rng>,
    pub places: Arc<Semaphore>,
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    /// Until then it may not know yet what it serves, and whom.
    pub begins_by: Instant,
}

/// One call, before its prompts are tokens.
pub(crate) struct Call {
    pub ask: Ask,
    pub caller: Caller,
    pub lane: Lane,
    /// How long the request shall outlive this gateway; None: not at all.
    pub resumable_ms: Option<u64>,
    /// The model as the client named it.
    pub model_name: String,
    pub received: Instant,
    pub parsed: Instant,
}

type Parts = BoxStream<'static, Result<Part, ApiError>>;

impl Gateway {
    /// Resolves once it is known who may ask and what is served, or the time for that is over.
    pub(crate) async fn begun(&self) {
        let known = async { tokio::join!(self.access.heard(), self.cluster.settled()) };
        let _known_or_late = tokio::time::timeout_at(self.begins_by, known).await;
    }

    /// Answers a call, streaming or in one piece. Errors before the first token have their own status.
    pub(crate) async fn answer(self: &Arc<Gateway>, call: Call) -> Result<Response, ApiError> {
        let Call { ask, caller, lane, resumable_ms, model_name, received, parsed } = call;
        let Ask { model, prompts: asked, params, shape } = ask;
        if resumable_ms.is_some() && !(params.stream && asked.len() == 1) {
            let message = "only a stream ('stream': true) with one prompt can be resumable";
            return Err(ApiError::invalid("x-baton-resumable", message));
        }
        let mut prompts = Vec::with_capacity(asked.len());
        let place = self.place(asked.len())?;
        for prompt in asked {
            prompts.push(match prompt {
                Prompt::Tokens(tokens) => tokens,
                Prompt::Text(text) => self.encoder.encode(&model, text, shape.prompt_param()).await?,
            });
        }
        let prompts: Vec<Arc<[u32]>> = prompts.into_iter().map(Arc::from).collect();
        let id = RequestId(self.lock_rng().u128());
        let mut parts = Vec::with_capacity(prompts.len());
        let mut places = Places(place);
        for (index, prompt) in prompts.iter().enumerate() {
            let asked = Asked { model: &model, params: &params, shape, caller: &caller, lane };
            let request = self.request(asked, prompt.clone(), (index == 0).then_some(id))?;
            let mut phases = Phases::new(model.meters.clone(), received);
            phases.parsed(parsed);
            phases.encoded();
            parts.push((request, phases));
        }
        let options = text_options(&model, &params);
        let silent = params.tokens_max == Some(0);
        let prefix = if shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
        let created = self.clock.unix_ms() / 1000;
        let envelope = Envelope { id: format!("{prefix}-{id}"), created, model: model_name };
        let look = |window_ms| Arc::new(Look::new(&envelope, &model.hash, shape, &params, window_ms));
        let resumable = resumable_ms.map(look);
        let named = resumable.is_some().then_some(id);
        let terms = Terms { block_tokens: model.block_tokens, key: caller.key, resumable };
        let answers = parts.into_iter().enumerate().map(|(index, (request, phases))| {
            let serving = Serving::new(self.servers.clone(), request.into(), terms.clone(), phases, places.take_one());
            Answer::new(index, serving, model.clone(), options.clone(), silent).parts().boxed()
        });
        let parts = merge(answers.collect());
        let (stream, choices) = (params.stream, params.choices as usize);
        let reply = Reply::new(envelope, model, shape, params, prompts);
        match (stream, named) {
            (false, _) => whole_reply(reply, parts).await,
            (true, None) => stream_reply(reply, parts, None).await,
            (true, Some(id)) => stream_reply(reply.resumable(EventId::start(choices)), parts, Some(id)).await,
        }
    }

    /// Goes on with a stream whose gateway is gone, from the event after `last_event`.
    pub(crate) async fn resume(
        self: &Arc<Gateway>,
        caller: &Caller,
        name: &str,
        last_event: Option<&str>,
        received: Instant,
    ) -> Result<Response, ApiError> {
        let place = self.place(1)?;
        let taken = take_over(self, caller, name).await?;
        let (request, look) = (taken.request.clone(), taken.note.look.clone());
        let (model, has) = match (self.cluster.model_of(&look.card), last_seen(last_event, request.choices)) {
            (Ok(model), Ok(has)) => (model, has),
            (Err(error), _) | (_, Err(error)) => {
                // It goes on, for a client that asks better.
                taken.inbox.ended();
                return Err(error);
            }
        };
        let adopted = match adopt(self, caller, &taken).await {
            Ok(adopted) => adopted,
            Err(error) => {
                taken.inbox.ended();
                return Err(error);
            }
        };
        let mut phases = Phases::new(model.meters.clone(), received);
        phases.parsed(Instant::now());
        phases.encoded();
        let params = look.params(&request);
        let options = text_options(&model, &params);
        let resumable = Some(Arc::new(look.clone()));
        let terms = Terms { block_tokens: model.block_tokens, key: caller.key.clone(), resumable };
        let serving = Serving::resumed(self.servers.clone(), taken, terms, phases, place);
        adopted.served();
        let parts = Answer::new(0, serving, model.clone(), options, look.silent).parts().boxed();
        let reply = Reply::new(look.envelope(), model, look.shape, params, vec![request.prompt.clone()]);
        Ok(event_stream(Vec::new(), reply.resumable(has), parts, Some(request.id)))
    }

    fn place(&self, count: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let full = || ApiError::overloaded("gateway_full", "This gateway works on as many requests as it may.", 0);
        let count = u32::try_from(count).map_err(|_| full())?;
        self.places.clone().try_acquire_many_owned(count).map_err(|_| full())
    }

    fn request(&self, asked: Asked, prompt: Arc<[u32]>, id: Option<RequestId>) -> Result<Request, ApiError> {
        let Asked { model, params, shape, caller, lane } = asked;
        let (drawn_id, drawn_seed) = {
            let mut rng = self.lock_rng();
            (RequestId(rng.u128()), rng.u64())
        };
        let tokens_max = tokens_max(model, params, shape, prompt.len())?;
        let tokens_max = within_limits(caller, params, shape, prompt.len(), tokens_max)?;
        if params.tokens_min > tokens_max {
            let message = format!("'min_tokens' must not exceed 'max_tokens' ({tokens_max})");
            return Err(ApiError::invalid("min_tokens", message));
        }
        let echoed = if shape == (Shape::Completions { echo: true }) { params.logprobs } else { None };
        Ok(Request {
            id: id.unwrap_or(drawn_id),
            tenant: caller.tenant.clone(),
            lane,
            model: model.name.clone(),
            prompt,
            sampling: Sampling { seed: params.seed.unwrap_or(drawn_seed), ..params.sampling.clone() },
            choices: params.choices,
            tokens_max,
            tokens_min: params.tokens_min,
            stop_tokens: params.stop_tokens.clone(),
            ignore_eos: params.ignore_eos,
            logprobs: params.logprobs,
            prompt_logprobs: params.prompt_logprobs.max(echoed),
            cache_salt: cache_salt(&caller.tenant, &params.cache_salt),
            deadline_ms: self.config.deadline_ms,
        })
    }

    /// A new request id.
    pub(crate) fn draw_id(&self) -> u128 {
        self.lock_rng().u128()
    }

    fn lock_rng(&self) -> std::sync::MutexGuard<'_, Rng> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all requests of a call have in common.
#[derive(Clone, Copy)]
struct Asked<'a> {
    model: &'a crate::model::Model,
    params: &'a Params,
    shape: Shape,
    caller: &'a Caller,
    lane: Lane,
}

/// The events a client has, by the last one's id.
fn last_seen(last_event: Option<&str>, choices: u32) -> Result<EventId, ApiError> {
    let bad = || ApiError::invalid("Last-Event-ID", "'Last-Event-ID' is not the id of an event of this stream");
    match last_event {
        None => Ok(EventId::start(choices as usize)),
        Some(text) => EventId::parse(text, choices as usize).ok_or_else(bad),
    }
}

/// The places of a call's requests; what is not taken is given back.
struct Places(OwnedSemaphorePermit);

impl Places {
    fn take_one(&mut self) -> OwnedSemaphorePermit {
        self.0.split(1).expect("as many places were taken as there are prompts")
    }
}

/// OpenAI's default for `max_tokens` of completions.
const COMPLETION_TOKENS_DEFAULT: u32 = 16;

/// Tokens to generate at most: what was asked for, if it fits the model, or the default cut to what fits.
fn tokens_max(model: &crate::model::Model, params: &Params, shape: Shape, prompt: usize) -> Result<u32, ApiError> {
    let limit = model.positions_max;
    let param = shape.prompt_param();
    if prompt == 0 {
        return Err(ApiError::invalid(param, "the prompt has no tokens"));
    }
    if prompt >= limit {
        let message = format!("This model's maximum context length is {limit} tokens, and the prompt has {prompt}.");
        return Err(ApiError::too_long(param, message));
    }
    let room = u32::try_from(limit - prompt).unwrap_or(u32::MAX);
    match params.tokens_max {
        Some(asked) if asked > room => {
            let message = format!(
                "This model's maximum context length is {limit} tokens. However, you requested {} tokens \
                 ({prompt} in the prompt, {asked} in the completion).",
                prompt + asked as usize
            );
            Err(ApiError::too_long("max_tokens", message))
        }
        Some(asked) => Ok(asked.max(1)),
        None if shape == Shape::Chat => Ok(room.min(model.tokens_default())),
        None => Ok(room.min(COMPLETION_TOKENS_DEFAULT)),
    }
}

/// Tokens to generate at most under the tenant's limits: what was asked for is refused beyond them, a default is cut.
fn within_limits(
    caller: &Caller,
    params: &Params,
    shape: Shape,
    prompt: usize,
    tokens_max: u32,
) -> Result<u32, ApiError> {
    let (prompt_max, output_max) = (caller.prompt_tokens_max, caller.output_tokens_max);
    if prompt_max > 0 && prompt as u64 > prompt_max {
        let message = format!("The prompt has {prompt} tokens; this tenant's may have at most {prompt_max}.");
        return Err(ApiError::too_long(shape.prompt_param(), message));
    }
    if output_max == 0 || u64::from(tokens_max) <= output_max {
        return Ok(tokens_max);
    }
    if params.tokens_max.is_some() {
        let message =
            format!("You asked for {tokens_max} tokens; this tenant's answers may have at most {output_max}.");
        return Err(ApiError::too_long("max_tokens", message));
    }
    Ok(u32::try_from(output_max).unwrap_or(tokens_max))
}

/// Blocks are shared inside a tenant, and inside what the tenant's own salt parts further.
fn cache_salt(tenant: &str, salt: &str) -> String {
    format!("{:?}", BlockHash::root(&format!("{}:{tenant}:{salt}", tenant.len())))
}

fn text_options(model: &crate::model::Model, params: &Params) -> Arc<TextOptions> {
    let eos: &[u32] = if params.ignore_eos { &[] } else { &model.eos };
    let end_tokens = eos.iter().chain(&params.stop_tokens).copied().collect();
    Arc::new(TextOptions {
        stops: params.stops.clone(),
        skip_special: params.skip_special,
        tokens_min: params.tokens_min,
        end_tokens,
        all_tokens: params.return_token_ids,
    })
}

/// The parts of all answers as they come.
fn merge(mut answers: Vec<Parts>) -> Parts {
    if answers.len() == 1 { answers.remove(0) } else { select_all(answers).boxed() }
}

async fn whole_reply(mut reply: Reply, mut parts: Parts) -> Result<Response, ApiError> {
    while let Some(part) = parts.next().await {
        reply.collect(part?);
    }
    Ok(([(header::CONTENT_TYPE, "application/json")], reply.whole()).into_response())
}

/// Begins when the first part, or an error instead of it, is known. `name`: of a resumable stream.
async fn stream_reply(mut reply: Reply, mut parts: Parts, name: Option<RequestId>) -> Result<Response, ApiError> {
    let mut first = Vec::new();
    while first.is_empty() {
        match parts.next().await {
            Some(part) => reply.stream(part?, &mut first),
            None => reply.finish(&mut first),
        }
    }
    Ok(event_stream(first, reply, parts, name))
}

/// A response of `first` and all that follows.
fn event_stream(first: Vec<u8>, reply: Reply, parts: Parts, name: Option<RequestId>) -> Response {
    let rest = futures::stream::unfold(Some((reply, parts)), |state| async move {
        let (mut reply, mut parts) = state?;
        let mut out = Vec::new();
        while out.is_empty() {
            match parts.next().await {
                Some(Ok(part)) => reply.stream(part, &mut out),
                Some(Err(error)) => {
                    if !planted::is(Bug::SilentEnd) {
                        stream_error(&error.body(), &mut out);
                    }
                    return Some((out, None));
                }
                None => {
                    reply.finish(&mut out);
                    return Some((out, None));
                }
            }
        }
        Some((out, Some((reply, parts))))
    });
    let events = futures::stream::once(async move { first }).chain(rest);
    let body = Body::from_stream(events.map(|event| Ok::<_, std::convert::Infallible>(Bytes::from(event))));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    if let Some(name) = name {
        let name = HeaderValue::try_from(name.to_string()).expect("hexadecimal digits are a header value");
        headers.insert("x-baton-stream", name);
    }
    response
}
