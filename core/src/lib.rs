//! Words and seams: the types every other crate speaks, and the traits that stand between product code and the
//! world (network, wall clock, randomness, KV memory). Does no IO of its own.

pub mod arena;
pub mod assignment;
pub mod block;
pub mod canary;
pub mod clock;
pub mod env;
pub mod id;
pub mod limits;
pub mod net;
pub mod numerics;
pub mod planted;
pub mod reason;
pub mod request;
pub mod rng;
#[cfg(target_os = "linux")]
pub mod shared;
#[cfg(not(target_os = "linux"))]
#[path = "elsewhere.rs"]
pub mod shared;
pub mod token;

pub use arena::{Arena, BlockLayout, KvDtype};
pub use assignment::{Assignment, Holder, Place};
pub use block::{BlockHash, BlockId};
pub use clock::{Clock, SystemClock};
pub use env::{Env, Process};
pub use id::{Epoch, Incarnation, NodeId, RequestId, Role, TokenId, TransferId, WorkerId};
pub use net::{Listener, Net, Stream};
pub use numerics::NumericsClass;
pub use reason::{Aborted, Refused};
pub use request::{Lane, Request, Sampling};
pub use rng::{Philox, Rng};
pub use token::{Finish, SampledToken};
