//! The harness of the black-box tests: real `baton up` clusters as child processes, and an HTTP client that reads
//! OpenAI's streams. Waits for conditions, never for a time.
#![allow(clippy::disallowed_methods)] // The harness stands outside the product: it opens sockets and reads the environment.

pub mod chaos;
pub mod client;
pub mod cluster;
pub mod fleet;
pub mod proxy;

pub use client::{Client, Reply, Streamed};
pub use cluster::{Cluster, Process, RoleProcess};
pub use fleet::{End, Fleet, Shape};
pub use proxy::{Fault, Proxy, Way};
