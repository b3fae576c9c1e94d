//! What a client is told when a request cannot be answered: OpenAI's error shape, and the one place that maps Baton's
//! reasons to HTTP statuses.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use baton_core::{Aborted, Refused, RequestId};
use serde_json::{Value, json};

/// An error in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` under a status.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub status: StatusCode,
    pub kind: &'static str,
    pub param: Option<Box<str>>,
    pub code: Option<&'static str>,
    pub message: String,
    /// Milliseconds after which a retry makes sense.
    pub retry_after_ms: Option<u64>,
    /// Word for the `x-baton-refused` header and the metrics' label.
    pub reason: &'static str,
    /// The request that was refused or failed, where it had got as far as a coordinator.
    pub request: Option<Box<RequestId>>,
}

const RETRY_AFTER_MS: u64 = 1_000;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, reason: &'static str, message: impl Into<String>) -> ApiError {
        let message = message.into();
        ApiError { status, kind, param: None, code: None, message, retry_after_ms: None, reason, request: None }
    }

    fn code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    fn retry_after(self, ms: u64) -> ApiError {
        ApiError { retry_after_ms: Some(if ms == 0 { RETRY_AFTER_MS } else { ms }), ..self }
    }

    /// 400: the parameter `param` is not acceptable.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", "invalid", message);
        ApiError { param: Some(param.into()), ..error }
    }

    /// 400: a parameter that would change the answer and that Baton cannot honour.
    pub(crate) fn unsupported(param: &str, message: impl Into<String>) -> ApiError {
        ApiError::invalid(param, message).code("unsupported_parameter")
    }

    /// 400: the body is not a JSON object.
    pub(crate) fn malformed(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", "malformed", message).code("invalid_json")
    }

    /// 400: prompt and answer do not fit the model.
    pub(crate) fn too_long(param: &str, message: impl Into<String>) -> ApiError {
        ApiError { reason: "too_long", ..ApiError::invalid(param, message).code("context_length_exceeded") }
    }

    /// 401: no key, or one that is not in force.
    pub(crate) fn unauthorized(message: impl Into<String>) -> ApiError {
        let kind = "invalid_request_error";
        ApiError::new(StatusCode::UNAUTHORIZED, kind, "unauthorized", message).code("invalid_api_key")
    }

    pub(crate) fn model_not_found(model: &str) -> ApiError {
        let message = format!("The model `{model}` does not exist.");
        let error = ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", "unknown_model", message);
        ApiError { param: Some("model".into()), ..error.code("model_not_found") }
    }

    /// 404: no such stream goes on, or it is not this caller's.
    pub(crate) fn stream_unknown() -> ApiError {
        let message = "No such stream: it has ended, was not resumable, or its time is over.";
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", "unknown", message).code("stream_not_found")
    }

    /// 410: the worker of a stream died with its gateway.
    pub(crate) fn stream_lost() -> ApiError {
        let message = "The stream was lost together with the worker that went on with it; send the request again.";
        ApiError::new(StatusCode::GONE, "server_error", "stream_lost", message).code("stream_lost")
    }

    pub(crate) fn unknown_route(path: &str) -> ApiError {
        let message = format!("Unknown path {path}.");
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", "unknown_route", message).code("unknown_url")
    }

    pub(crate) fn wrong_method(method: &str, path: &str) -> ApiError {
        let message = format!("{path} does not answer {method}.");
        let kind = "invalid_request_error";
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, kind, "wrong_method", message).code("method_not_allowed")
    }

    pub(crate) fn body_too_large(bytes_max: usize) -> ApiError {
        let message = format!("The request body exceeds {bytes_max} bytes.");
        let kind = "invalid_request_error";
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, kind, "body_too_large", message).code("request_too_large")
    }

    /// 429: refused at once because everything is full.
    pub(crate) fn overloaded(reason: &'static str, message: impl Into<String>, retry_after_ms: u64) -> ApiError {
        let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", reason, message);
        error.code("overloaded").retry_after(retry_after_ms)
    }

    /// 503: nobody can serve this now.
    pub(crate) fn unavailable(reason: &'static str, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", reason, message);
        error.code("service_unavailable").retry_after(RETRY_AFTER_MS)
    }

    /// 504: the request's time is over.
    pub(crate) fn deadline() -> ApiError {
        let message = "The request did not end within its deadline.";
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, "server_error", "deadline", message).code("deadline_exceeded")
    }

    /// 408: the client reads its stream too slowly.
    pub(crate) fn slow_client() -> ApiError {
        let message = "The stream was not read fast enough and has been cancelled.";
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "server_error", "slow_client", message).code("slow_client")
    }

    /// 500: a fault of Baton's own.
    pub(crate) fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal", message).code("internal_error")
    }

    /// The answer to a refusal that no retry can help any more.
    pub(crate) fn refused(reason: Refused, detail: &str, retry_after_ms: u64) -> ApiError {
        let word = reason.as_str();
        let say = |text: &str| if detail.is_empty() { text.to_string() } else { format!("{text} ({detail})") };
        match reason {
            Refused::NoWorkers => ApiError::unavailable(word, say("No live worker serves this model.")),
            Refused::NoCapacity => {
                ApiError::overloaded(word, say("All workers of this model are full."), retry_after_ms)
            }
            Refused::UnknownModel => {
                let error = ApiError::model_not_found("");
                ApiError { message: say("No such model is known to the cluster."), ..error }
            }
            Refused::TooLarge => {
                ApiError::too_long("prompt", say("The request exceeds what any worker can hold or its tenant may use."))
            }
            Refused::Draining => ApiError::unavailable(word, say("The workers of this model are draining.")),
            Refused::Stale | Refused::Fenced | Refused::Expired | Refused::NotLeader | Refused::Unavailable => {
                ApiError::unavailable(word, say("The coordinator cannot take requests at the moment."))
            }
            Refused::Quota => {
                let error = ApiError::overloaded(word, say("The tenant's quota is used up."), retry_after_ms);
                error.code("rate_limit_exceeded")
            }
            Refused::Overloaded => {
                ApiError::overloaded(word, say("The wait would exceed this lane's budget."), retry_after_ms)
            }
            Refused::Poisoned => {
                let message = say("The workers that ran this request died; it is not run again for a while.");
                ApiError { reason: word, ..ApiError::internal(message).code("poisoned") }
            }
            Refused::Unknown => ApiError::unavailable(word, say("Nothing is known of this request.")),
            Refused::Incompatible => ApiError::unavailable(word, say("Gateway and cluster do not fit together.")),
            Refused::Foreign => ApiError::unavailable(word, say("This gateway belongs to another cluster.")),
        }
    }

    /// The answer to an abort after the last attempt.
    pub(crate) fn aborted(reason: Aborted, detail: &str) -> ApiError {
        match reason {
            Aborted::Deadline => ApiError::deadline(),
            Aborted::NoCapacity => ApiError::refused(Refused::NoCapacity, detail, 0),
            Aborted::Draining => ApiError::refused(Refused::Draining, detail, 0),
            // What was lost may be there again: nothing of Baton's own is at fault, and a retry makes sense.
            Aborted::DecodeLost | Aborted::PrefillLost | Aborted::PrefillRefused | Aborted::TransferFailed => {
                let message = format!("The workers that had the request were lost: {reason} ({detail}).");
                ApiError::unavailable(reason.as_str(), message)
            }
            _ => {
                let message = format!("The request failed on its workers: {reason} ({detail}).");
                ApiError { reason: reason.as_str(), ..ApiError::internal(message) }
            }
        }
    }

    /// The JSON body, also sent as an event of a stream that had begun.
    pub(crate) fn body(&self) -> Value {
        let ApiError { message, kind, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        headers.insert("x-baton-refused", HeaderValue::from_static(self.reason));
        if let Some(request) = self.request {
            let request = HeaderValue::try_from(request.to_string()).expect("hexadecimal digits are a header value");
            headers.insert("x-baton-request", request);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(ms) = self.retry_after_ms {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000)));
            headers.insert("retry-after-ms", HeaderValue::from(ms));
        }
        response
    }
}
