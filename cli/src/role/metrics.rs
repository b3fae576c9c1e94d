//! The process's metrics: recorder, buckets, and a small HTTP listener for roles that have no other.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use baton_core::net::Stream;
use baton_core::{Listener, Net};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::sync::Semaphore;

/// Content type of Prometheus' text format.
const TEXT: &str = "text/plain; version=0.0.4";
/// How often the recorder tidies what nobody has asked for.
const UPKEEP: Duration = Duration::from_secs(5);
/// Scrapers connected at a time.
const CONNECTIONS_MAX: usize = 16;
/// Longest a scraper may take to send its request.
const REQUEST_MAX: Duration = Duration::from_secs(5);

/// Baton's own durations, from a handoff on loopback to a long answer.
const SECONDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    300.0,
];
/// Counts of tokens or bytes: powers of four.
const COUNTS: &[f64] = &[
    1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0, 16777216.0,
    67108864.0,
];

/// Installs the process's one recorder, with the buckets the gateway names (vLLM's, so that boards made for it read
/// Baton unchanged) and the two kinds above for all else, and keeps it tidy for as long as the runtime lives.
pub(crate) fn install() -> anyhow::Result<PrometheusHandle> {
    let seconds = Matcher::Suffix("_seconds".to_string());
    let mut builder = PrometheusBuilder::new().set_buckets(COUNTS)?.set_buckets_for_metric(seconds, SECONDS)?;
    for (name, buckets) in baton_gateway::BUCKETS {
        builder = builder.set_buckets_for_metric(Matcher::Full(name.to_string()), buckets)?;
    }
    let handle = builder.install_recorder()?;
    tokio::spawn(tidy(handle.clone()));
    Ok(handle)
}

async fn tidy(handle: PrometheusHandle) {
    loop {
        tokio::time::sleep(UPKEEP).await;
        handle.run_upkeep();
    }
}

/// Serves `/metrics` and `/live` at `address`, and gives the real address back.
pub(crate) async fn serve(net: Arc<dyn Net>, address: &str, handle: PrometheusHandle) -> anyhow::Result<String> {
    let listener = net.listen(address).await.with_context(|| format!("listen on {address} for metrics"))?;
    let bound = listener.address();
    tokio::spawn(accept(listener, handle));
    Ok(bound)
}

async fn accept(mut listener: Box<dyn Listener>, handle: PrometheusHandle) {
    let seats = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(seat) = seats.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok(stream) => {
                let handle = handle.clone();
                tokio::spawn(async move {
                    talk(stream, handle).await;
                    drop(seat);
                });
            }
            Err(error) => {
                tracing::debug!("no scraper accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn talk(stream: Stream, handle: PrometheusHandle) {
    let service = service_fn(|request: Request<Incoming>| {
        let answer = answer(request.uri().path(), &handle);
        async move { Ok::<_, Infallible>(answer) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    let connection =
        http.timer(TokioTimer::new()).header_read_timeout(REQUEST_MAX).serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!("a scraper's connection ended: {error}");
    }
}

fn answer(path: &str, handle: &PrometheusHandle) -> Response<Full<Bytes>> {
    let (status, body) = match path {
        "/metrics" => (StatusCode::OK, handle.render()),
        "/live" => (StatusCode::OK, String::new()),
        _ => (StatusCode::NOT_FOUND, "/metrics and /live are served here\n".to_string()),
    };
    let response = Response::builder().status(status).header(CONTENT_TYPE, TEXT);
    response.body(Full::new(body.into())).expect("status and header are constants")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_grow() {
        for buckets in baton_gateway::BUCKETS.iter().map(|(_, buckets)| *buckets).chain([SECONDS, COUNTS]) {
            assert!(buckets.windows(2).all(|pair| pair[0] < pair[1]), "{buckets:?}");
        }
    }
}
