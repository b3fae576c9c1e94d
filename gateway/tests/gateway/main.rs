//! The gateway over real sockets against a fake coordinator and fake workers, which speak the wire and nothing more.

mod access;
mod assign;
mod bad_input;
mod chat;
mod client;
mod completions;
mod coordinator;
mod failover;
mod limits;
mod resume;
mod routes;
mod worker;
mod world;
