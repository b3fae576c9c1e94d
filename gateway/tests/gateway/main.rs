//! The gateway over real sockets against a fake coordinator and fake workers, which speak the wire and nothing more.

mod chat;
mod client;
mod world;
