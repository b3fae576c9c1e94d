//! HTTP/1 connections: accepted and ended together.

use std::future::Future;
use std::time::Duration;

use axum::Router;
use baton_core::{Listener, Stream};
use baton_proto::server::{Bound, Stopping, accept, until_end};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;

use crate::measure;

const BOUND: Bound = Bound { connections_max: 16_384, full: measure::connections_full };
/// A client that has begun a request sends its head within this time.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves connections until `stopped`, then lets the open ones end. Dropping it ends them at once.
pub(crate) async fn serve(listener: Box<dyn Listener>, router: Router, stopped: impl Future<Output = ()>) {
    accept(listener, BOUND, stopped, |stream, stopping| connection(stream, router.clone(), stopping)).await;
}

async fn connection(stream: Stream, router: Router, stopping: Stopping) {
    let service = TowerToHyperService::new(router);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    until_end(connection, stopping, |connection| connection.graceful_shutdown()).await;
}
