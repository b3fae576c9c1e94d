//! Prefill and decode workers together, in one process, over real sockets on loopback; the coordinator is a stand-in,
//! the gateway is the test.

mod audit;
mod cluster;
mod gate;
mod gateway;

mod faults;
mod lives;
mod outlive;
mod recall;
mod resume;
mod same_bytes;
