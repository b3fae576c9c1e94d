//! The handoff over real TCP on loopback, over raw sockets that misbehave, and in one process.

mod happy;
mod net;
mod world;
