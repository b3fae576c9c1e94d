//! The services behind a coordinator's one socket, told apart by the first part of a call's path. tonic's own router
//! boxes every call three times more, which a call that is one command in a shared ledger entry can feel.

use std::convert::Infallible;
use std::task::{Context, Poll};

use baton_core::limits::MESSAGE_BYTES_MAX;
use baton_proto::v1::admin_server::{self, Admin, AdminServer};
use baton_proto::v1::coordinator_server::{self, Coordinator, CoordinatorServer};
use baton_proto::v1::raft_server::{self, Raft, RaftServer};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{BoxFuture, Service};

/// Clones serve the same.
pub(crate) struct Services<R, C> {
    raft: RaftServer<R>,
    coordinator: CoordinatorServer<C>,
    admin: AdminServer<C>,
}

impl<R: Raft, C: Coordinator + Admin + Clone> Services<R, C> {
    pub(crate) fn new(raft: R, coordinator: C) -> Services<R, C> {
        Services {
            raft: RaftServer::new(raft).max_decoding_message_size(MESSAGE_BYTES_MAX),
            admin: AdminServer::new(coordinator.clone()),
            coordinator: CoordinatorServer::new(coordinator).max_decoding_message_size(MESSAGE_BYTES_MAX),
        }
    }
}

impl<R, C> Clone for Services<R, C> {
    fn clone(&self) -> Services<R, C> {
        Services { raft: self.raft.clone(), coordinator: self.coordinator.clone(), admin: self.admin.clone() }
    }
}

impl<R: Raft, C: Coordinator + Admin> Service<Request<Body>> for Services<R, C> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Response<Body>, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> BoxFuture<Response<Body>, Infallible> {
        match request.uri().path().split('/').nth(1) {
            Some(coordinator_server::SERVICE_NAME) => self.coordinator.call(request),
            Some(raft_server::SERVICE_NAME) => self.raft.call(request),
            Some(admin_server::SERVICE_NAME) => self.admin.call(request),
            _ => Box::pin(std::future::ready(Ok(Status::unimplemented("no such service").into_http()))),
        }
    }
}
