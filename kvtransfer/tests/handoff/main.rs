//! The handoff over real TCP on loopback, over raw peers that misbehave, in one process, and on virtual time over
//! memory. `BATON_TEST_LONG=1` repeats what is random or counted (aborts, fuzzing) some hundred times more often.

mod aborts;
#[cfg(target_os = "linux")]
mod device;
mod fuzz;
mod happy;
mod lanes;
mod lessons;
mod links;
mod memory;
mod net;
mod ranks;
mod raw;
mod resend;
#[cfg(target_os = "linux")]
mod shm;
mod tickets;
mod time;
mod tls;
#[cfg(target_os = "linux")]
mod ucx;
mod wire_faults;
mod world;
