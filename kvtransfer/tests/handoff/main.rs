//! The handoff over real TCP on loopback, over raw peers that misbehave, in one process, and on virtual time over
//! memory.

mod aborts;
mod fuzz;
mod happy;
mod links;
mod memory;
mod net;
mod raw;
mod resend;
#[cfg(target_os = "linux")]
mod shm;
mod time;
mod wire_faults;
mod world;
