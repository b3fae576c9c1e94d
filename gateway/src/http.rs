//! The routes, and what every response has: a caller who may ask, a request id, OpenAI's error shape, a count.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use baton_core::{Lane, RequestId, limits};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout};

use crate::access::Caller;
use crate::error::ApiError;
use crate::generate::{Call, Gateway};
use crate::measure;
use crate::model::Model;
use crate::openai::{Ask, Fields, chat, completions, tokens};

/// How long the rest of a body that is too large is read.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(2);

type Shared = State<Arc<Gateway>>;

/// All routes of a gateway.
pub(crate) fn router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/streams/{name}", get(stream))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/tokenizer_info", get(tokenizer_info))
        .route("/health", get(health))
        .route("/live", get(|| async {}))
        .route("/ping", get(|| async {}).post(|| async {}))
        .route("/version", get(|| async { Json(json!({"version": env!("CARGO_PKG_VERSION")})) }))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(|method: Method, uri: Uri| async move {
            ApiError::wrong_method(method.as_str(), uri.path())
        })
        .fallback(|uri: Uri| async move { ApiError::unknown_route(uri.path()) })
        .layer(from_fn_with_state(gateway.clone(), around))
        .with_state(gateway)
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_BYTES_MAX: usize = 256;

/// Around every request: its id comes back, its answer is counted.
async fn around(State(gateway): Shared, mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).filter(|id| id.len() <= REQUEST_ID_BYTES_MAX).cloned();
    let route = route_label(request.uri().path());
    let mut response = match admit(&gateway, &mut request).await {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    let id = given.unwrap_or_else(|| {
        let id = RequestId(gateway.draw_id()).to_string();
        HeaderValue::try_from(id).expect("hexadecimal digits are a header value")
    });
    response.headers_mut().insert(REQUEST_ID, id);
    measure::answered(route, response.status().as_u16());
    response
}

/// Lets a request pass whose key is in force, and notes whose it is. What shows no model and costs nothing needs none. A
/// gateway that has just started does not refuse what it only does not know yet.
async fn admit(gateway: &Gateway, request: &mut Request) -> Result<(), ApiError> {
    let path = request.uri().path();
    if path.starts_with("/v1/") || ["/tokenize", "/detokenize", "/tokenizer_info"].contains(&path) {
        let by_ledger = ["/v1/chat/completions", "/v1/completions"].contains(&path) || path.starts_with("/v1/streams/");
        gateway.begun().await;
        let caller = match by_ledger {
            true => gateway.access.caller(request.headers())?,
            false => gateway.access.caller_alone(request.headers())?,
        };
        request.extensions_mut().insert(caller);
    }
    Ok(())
}

/// Who asks; `admit` has let them pass.
fn caller(request: &mut Request) -> Caller {
    request.extensions_mut().remove().unwrap_or_default()
}

const LANE: HeaderName = HeaderName::from_static("x-baton-lane");

/// The lane a header names.
fn lane(headers: &HeaderMap) -> Result<Option<Lane>, ApiError> {
    match headers.get(LANE).map(HeaderValue::as_bytes) {
        None => Ok(None),
        Some(b"interactive") => Ok(Some(Lane::Interactive)),
        Some(b"batch") => Ok(Some(Lane::Batch)),
        Some(_) => Err(ApiError::invalid("x-baton-lane", "the header 'x-baton-lane' must be interactive or batch")),
    }
}

/// The lane that OpenAI's `service_tier` asks for.
fn lane_of_tier(fields: Fields) -> Result<Lane, ApiError> {
    let is_batch = matches!(fields.text("service_tier")?, Some("flex" | "batch"));
    Ok(if is_batch { Lane::Batch } else { Lane::Interactive })
}

const RESUMABLE: HeaderName = HeaderName::from_static("x-baton-resumable");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// How long a header asks a request to outlive its gateway.
fn resumable_ms(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let Some(value) = headers.get(RESUMABLE) else { return Ok(None) };
    let seconds = value.to_str().ok().and_then(|text| text.parse::<u64>().ok());
    let ms = seconds.and_then(|seconds| seconds.checked_mul(1000));
    let ms = ms.filter(|ms| (1..=limits::RESUMABLE_MS_MAX).contains(ms));
    let message = || format!("the header 'x-baton-resumable' must be 1 to {} seconds", limits::RESUMABLE_MS_MAX / 1000);
    ms.map(Some).ok_or_else(|| ApiError::invalid("x-baton-resumable", message()))
}

fn route_label(path: &str) -> &'static str {
    const ROUTES: &[&str] = &[
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/health",
        "/live",
        "/ping",
        "/version",
        "/metrics",
    ];
    let of_stream = path.starts_with("/v1/streams/").then_some("/v1/streams");
    ROUTES.iter().find(|route| **route == path).copied().or(of_stream).unwrap_or("other")
}

async fn chat_completions(State(gateway): Shared, request: Request) -> Result<Response, ApiError> {
    let clock = gateway.clock.clone();
    generate(&gateway, request, |fields, model| chat::read(fields, model, clock)).await
}

async fn text_completions(State(gateway): Shared, request: Request) -> Result<Response, ApiError> {
    generate(&gateway, request, completions::read).await
}

async fn generate(
    gateway: &Arc<Gateway>,
    mut request: Request,
    read: impl FnOnce(Fields, Arc<Model>) -> Result<Ask, ApiError>,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let (caller, lane) = (caller(&mut request), lane(request.headers())?);
    let resumable_ms = resumable_ms(request.headers())?;
    let body = body(request).await?;
    let (model, model_name) = named_model(gateway, Fields(&body))?;
    let lane_of_tier = lane_of_tier(Fields(&body))?;
    let lane = lane.unwrap_or(lane_of_tier);
    gateway.servers.shed.check(&model.name, &caller.tenant, lane)?;
    let ask = read(Fields(&body), model)?;
    gateway.answer(Call { ask, caller, lane, resumable_ms, model_name, received, parsed: Instant::now() }).await
}

async fn stream(State(gateway): Shared, Path(name): Path<String>, mut request: Request) -> Result<Response, ApiError> {
    let received = Instant::now();
    let caller = caller(&mut request);
    let last_event = match request.headers().get(LAST_EVENT_ID).map(HeaderValue::to_str) {
        None => None,
        Some(Ok(id)) => Some(id),
        Some(Err(_)) => return Err(ApiError::invalid("Last-Event-ID", "'Last-Event-ID' is not the id of an event")),
    };
    let resumed = gateway.resume(&caller, &name, last_event, received).await;
    measure::resumed(resumed.as_ref().map_or_else(|error| error.reason, |_| "resumed"));
    resumed
}

async fn tokenize(State(gateway): Shared, request: Request) -> Result<Json<Value>, ApiError> {
    let body = body(request).await?;
    let fields = Fields(&body);
    let (model, _) = named_model(&gateway, fields)?;
    let text = tokens::read_tokenize(fields, &model, gateway.clock.clone())?;
    let ids = gateway.encoder.encode(&model, text, "prompt").await?;
    tokens::tokenized(fields, &model, &ids).map(Json)
}

async fn detokenize(State(gateway): Shared, request: Request) -> Result<Json<Value>, ApiError> {
    let body = body(request).await?;
    let (model, _) = named_model(&gateway, Fields(&body))?;
    tokens::detokenized(Fields(&body), &model).map(Json)
}

async fn tokenizer_info(State(gateway): Shared, uri: Uri) -> Result<Json<Value>, ApiError> {
    let query = uri.query().unwrap_or_default();
    let name = query.split('&').find_map(|pair| pair.strip_prefix("model="));
    Ok(Json(tokens::tokenizer_info(&*gateway.cluster.model(name)?)))
}

async fn models(State(gateway): Shared) -> Json<Value> {
    let served = gateway.cluster.served();
    let own = served.iter().map(|m| tokens::model_entry(&m.name, m));
    let alias = |(alias, name): (&String, &String)| {
        served.iter().find(|m| m.name == *name).map(|m| tokens::model_entry(alias, m))
    };
    let data: Vec<Value> = own.chain(gateway.cluster.aliases().iter().filter_map(alias)).collect();
    Json(json!({"object": "list", "data": data}))
}

async fn model(State(gateway): Shared, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let model = gateway.cluster.model(Some(&id))?;
    Ok(Json(tokens::model_entry(&id, &model)))
}

async fn health(State(gateway): Shared) -> Response {
    match gateway.cluster.health(gateway.access.is_known()) {
        Ok(summary) => Json(summary).into_response(),
        Err(summary) => (StatusCode::SERVICE_UNAVAILABLE, Json(summary)).into_response(),
    }
}

async fn metrics(State(gateway): Shared) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], (gateway.metrics)()).into_response()
}

fn named_model(gateway: &Gateway, fields: Fields) -> Result<(Arc<Model>, String), ApiError> {
    let name = fields.text("model")?;
    let model = gateway.cluster.model(name)?;
    let name = name.unwrap_or(&model.name).to_string();
    Ok((model, name))
}

/// The JSON object of a request's body, whatever content type it claims.
async fn body(request: Request) -> Result<Map<String, Value>, ApiError> {
    let bytes = read(request).await?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ApiError::malformed("The body must be a JSON object.")),
        Err(e) => Err(ApiError::malformed(format!("The body is not JSON: {e}."))),
    }
}

/// The whole body, if it is within the limit. What is over it is read and thrown away, within bounds, because a client that
/// is still sending when its connection closes loses the answer that says why.
async fn read(request: Request) -> Result<Bytes, ApiError> {
    let too_large = ApiError::body_too_large(limits::HTTP_BODY_BYTES_MAX);
    let (head, mut body) = request.into_parts();
    let over = content_length(&head.headers).is_some_and(|length| length > limits::HTTP_BODY_BYTES_MAX);
    if over && head.headers.contains_key(header::EXPECT) {
        return Err(too_large);
    }
    let bytes = if over { None } else { collect(&mut body).await };
    if bytes.is_none() {
        let _ = timeout(DISCARD_TIMEOUT, discard(&mut body)).await;
    }
    bytes.ok_or(too_large)
}

/// None: too large, or broken off.
async fn collect(body: &mut Body) -> Option<Bytes> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        bytes.extend_from_slice(&frame.ok()?.into_data().unwrap_or_default());
        if bytes.len() > limits::HTTP_BODY_BYTES_MAX {
            return None;
        }
    }
    Some(bytes.freeze())
}

async fn discard(body: &mut Body) {
    let mut discarded = 0;
    while let Some(Ok(frame)) = body.frame().await {
        discarded += frame.data_ref().map_or(0, Bytes::len);
        if discarded > limits::HTTP_DISCARD_BYTES_MAX {
            return;
        }
    }
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
